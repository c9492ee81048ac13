"""What `--help` prints, of the program and of a command."""

from moe_jax.commands.catalogue import COMMANDS
from moe_jax.config.command_line import REQUIRED, Flag, FlagKind

PROGRAM = "moe-jax"


def program_help() -> str:
  """Returns the list of all commands."""
  rows = [(name, command.help) for name, command in COMMANDS.items()]
  return (
    f"usage: {PROGRAM} COMMAND [--flag=value ...]\n\n"
    "Train, run and inspect Mixture-of-Experts models.\n\n"
    f"commands:\n{_aligned(rows)}\n\n"
    f"{PROGRAM} COMMAND --help lists the flags of a command."
  )


def command_help(name: str) -> str:
  """Returns the flags of a command, and its operations if it has any."""
  command = COMMANDS[name]
  needed = [
    flag.kind.value if flag.name in command.words else _spelt(flag)
    for flag in command.flags
    if flag.default is REQUIRED
  ]
  rest = "" if len(needed) == len(command.flags) else " [--flag=value ...]"
  rows = [(_spelt(flag), flag.help + _default_note(flag)) for flag in command.flags]
  if command.flags[0].kind is FlagKind.CONFIG:
    rest += "\n  [--config.FIELD=VALUE ...]"
    rows.append(("--config.FIELD=VALUE", "set one field, for example --config.moe.top_k=1"))
  return (
    f"usage: {' '.join([PROGRAM, name, *needed])}{rest}\n\n"
    f"{command.help[0].upper()}{command.help[1:]}.\n\n"
    f"flags:\n{_aligned(rows)}{operations(name)}"
  )


def operations(name: str) -> str:
  """Returns the part of a command's help that lists its operations, if it has any."""
  rows = [(each, command.help) for each, command in COMMANDS.items() if each.startswith(f"{name} ")]
  return f"\n\noperations:\n{_aligned(rows)}" if rows else ""


def _spelt(flag: Flag) -> str:
  if flag.kind is FlagKind.SWITCH:
    return f"--{flag.name}"
  return f"--{flag.name}={flag.kind.value.removesuffix(' ...')}"


def _default_note(flag: Flag) -> str:
  absent = flag.default is REQUIRED or flag.default in (None, (), False)
  return "" if absent else f" (default {flag.default})"


def _aligned(rows: list[tuple[str, str]]) -> str:
  width = max(len(left) for left, _ in rows)
  return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
