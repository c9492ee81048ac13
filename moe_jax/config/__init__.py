"""The edge of the program: config files and command lines in, frozen dataclasses out.

Inside the package nothing reads an `ml_collections` object or a command line; the edge turns both
into dataclasses that validate themselves, and every fault into one `UserError`.

`moe_jax.config.load` is left out of the names below: it imports `ml_collections`, which takes
longer than a command line needs to print its help.
"""

from moe_jax.config.command_line import Flag, FlagKind, parse_command_line
from moe_jax.config.imports import find_in_current_folder, import_modules
from moe_jax.config.schema import chosen_fields, dataclass_from, section, to_mapping

__all__ = [
  "Flag",
  "FlagKind",
  "chosen_fields",
  "dataclass_from",
  "find_in_current_folder",
  "import_modules",
  "parse_command_line",
  "section",
  "to_mapping",
]
