"""The command line: `moe-jax COMMAND --flag=value ...`.

Subcommands live where their work is and are imported only when run, so that `--help` and a faulty
command line answer at once. A `UserError` is one line and exit status 2, and so is a file that the
operating system refuses to read or write; any other exception is a bug and keeps its traceback.
"""

import dataclasses
import errno
import io
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

from moe_jax import __version__
from moe_jax.choices import did_you_mean
from moe_jax.config import find_in_current_folder
from moe_jax.config.command_line import REQUIRED, Flag, FlagKind, parse_command_line
from moe_jax.errors import UserError

_PROGRAM = "moe-jax"
# As of a program that the signal of a closed pipe ends.
_CLOSED = 128 + signal.SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Command:
  """Describes one subcommand; `entry` is "module:function", called with the parsed flags."""

  help: str
  entry: str
  flags: tuple[Flag, ...]


_RUN = Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train")
_STEP = Flag("step", FlagKind.INTEGER, "checkpoint to read; the latest if absent", None)

_HUB = Flag("checkpoint", FlagKind.FOLDER, "Hugging Face checkpoint to read instead of a run", None)

# What all operations on experts take.
_OPERATION = (
  Flag("out", FlagKind.FOLDER, "run folder to write; it must be absent or empty"),
  Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train", None),
  _STEP,
  _HUB,
  Flag(
    "set",
    FlagKind.TEXTS,
    "a field of the new run's config, as steps=400 or moe.top_k=1; repeatable",
    (),
  ),
  Flag("moments", FlagKind.TEXT, "carry or reset what the optimiser remembers", "carry"),
  Flag(
    "schedule", FlagKind.TEXT, "keep or reset step, learning rate and place in the data", "keep"
  ),
  Flag("batches", FlagKind.INTEGER, "held-out batches to measure on", 4),
  Flag("seed", FlagKind.SEED, "seed of whatever is drawn", 0),
  Flag("json", FlagKind.SWITCH, "print what was measured as JSON", False),
)
_TRACE = Flag(
  "trace", FlagKind.FILE, "a trace to count the use of experts in; --batches if absent", None
)
_ROUTER_STD = Flag("router_std", FlagKind.NUMBER, "standard deviation of new router columns", 0.02)

COMMANDS = {
  "train": Command(
    "train the model of a config file; the same command again resumes the run",
    "moe_jax.commands.training:train",
    (
      Flag("config", FlagKind.CONFIG, "config file, and one of the variants its docstring lists"),
      Flag("workdir", FlagKind.FOLDER, "folder of the run: metrics, checkpoints, report"),
    ),
  ),
  "eval": Command(
    "evaluate a checkpoint of a run, also under other routers",
    "moe_jax.commands.evaluation:evaluate",
    (
      _RUN,
      _STEP,
      Flag(
        "arm",
        FlagKind.TEXTS,
        "dropless with other routing fields, as top_k=2,weighting=hard; repeatable",
        (),
      ),
      Flag("replay", FlagKind.FILE, "a trace whose experts are forced on its own tokens", None),
    ),
  ),
  "trace": Command(
    "record which experts the held-out tokens ask for",
    "moe_jax.commands.evaluation:trace",
    (
      _RUN,
      _STEP,
      Flag("out", FlagKind.FILE, "the .npz file to write"),
      Flag("batches", FlagKind.INTEGER, "held-out batches to record", 4),
    ),
  ),
  "generate": Command(
    "continue a prompt with the model of a run, or of a checkpoint",
    "moe_jax.commands.generation:generate",
    (
      Flag("prompt", FlagKind.TEXT, "text to continue"),
      Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train", None),
      Flag(
        "checkpoint",
        FlagKind.FOLDER,
        "Hugging Face checkpoint with its tokenizer instead of a run",
        None,
      ),
      Flag("dtype", FlagKind.TEXT, "float32 (default) or bfloat16, with --checkpoint", None),
      Flag("max_new_tokens", FlagKind.INTEGER, "most tokens to add", 200),
      Flag("temperature", FlagKind.NUMBER, "0 takes the likeliest token each time", 0.8),
      Flag("top_k", FlagKind.INTEGER, "sample from so many likeliest tokens", None),
      Flag("top_p", FlagKind.NUMBER, "sample from the likeliest tokens of this mass", None),
      Flag("seed", FlagKind.SEED, "seed of the sampling", 0),
    ),
  ),
  "convert": Command(
    "write the model of a run, or of a checkpoint, as a Hugging Face checkpoint",
    "moe_jax.commands.conversion:convert",
    (
      Flag("out", FlagKind.FOLDER, "folder to write; it must be absent or empty"),
      Flag("workdir", FlagKind.FOLDER, "folder of a run made by moe-jax train", None),
      _STEP,
      _HUB,
      Flag("dtype", FlagKind.TEXT, "float32 (default) or bfloat16, with --checkpoint", None),
    ),
  ),
  "convert upcycle": Command(
    "make a run with experts from a dense one: every expert a copy, or a part of one",
    "moe_jax.commands.surgery:upcycle",
    (
      Flag(
        "layers", FlagKind.TEXT, "all, every_other, last_half, or numbers as 1,3", "every_other"
      ),
      Flag("preset", FlagKind.TEXT, "router preset; its fields change by --set=moe.x", "mixtral"),
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer; the preset's if absent", None),
      Flag("top_k", FlagKind.INTEGER, "experts of a token; the preset's if absent", None),
      Flag("parts", FlagKind.INTEGER, "cut a dense network into so many, one an expert", 1),
      Flag("shared_parts", FlagKind.INTEGER, "parts that become a shared expert", 0),
      Flag("noise", FlagKind.NUMBER, "added to experts, relative to their weights", 0.0),
      Flag("reinit", FlagKind.NUMBER, "fraction of hidden units that start anew", 0.0),
      Flag("router", FlagKind.TEXT, "normal, or virtual_groups: tokens take all parts", "normal"),
      _ROUTER_STD,
      Flag("scaling", FlagKind.TEXT, "what keeps the scale: router, weights or none", "router"),
      *_OPERATION,
    ),
  ),
  "convert prune": Command(
    "make a run with fewer experts: the most used, the largest, or all but some ids",
    "moe_jax.commands.surgery:prune",
    (
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer that stay", None),
      Flag("by", FlagKind.TEXT, "which stay: usage, or norm of their weights", "usage"),
      Flag("drop", FlagKind.TEXTS, "ids instead, as 0,3; or LAYER:IDS for each layer", ()),
      _TRACE,
      *_OPERATION,
    ),
  ),
  "convert merge": Command(
    "make a run with fewer experts: means of those that are alike, weighted by use",
    "moe_jax.commands.surgery:merge",
    (
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer that there are to be"),
      Flag("by", FlagKind.TEXT, "what they are alike in: router or weights", "router"),
      Flag("align", FlagKind.TEXT, "order hidden units before: none or permutation", "permutation"),
      _TRACE,
      *_OPERATION,
    ),
  ),
  "convert grow": Command(
    "make a run with more experts: noisy copies of the most used, or fresh ones",
    "moe_jax.commands.surgery:grow",
    (
      Flag("num_experts", FlagKind.INTEGER, "experts of a layer that there are to be"),
      Flag("init", FlagKind.TEXT, "what further experts are: copy or fresh", "copy"),
      Flag("noise", FlagKind.NUMBER, "added to copies, relative to their weights", 0.01),
      _ROUTER_STD,
      _TRACE,
      *_OPERATION,
    ),
  ),
  "report": Command(
    "write the report of a run: curves, routing, samples",
    "moe_jax.commands.reporting:report",
    (_RUN, Flag("compare", FlagKind.FOLDERS, "another run to set beside it; repeatable", ())),
  ),
  "plan": Command(
    "count what a model costs: parameters, FLOPs and bytes, without building it",
    "moe_jax.commands.planning:plan",
    (
      Flag("config", FlagKind.CONFIG, "config file, and one of the variants its docstring lists"),
      Flag("json", FlagKind.SWITCH, "print all numbers exactly, as JSON", False),
    ),
  ),
  "conventions": Command(
    "list the conventions of all router presets, or what sets two of them apart",
    "moe_jax.commands.conventions:conventions",
    (
      Flag("diff", FlagKind.PAIR, "two presets to compare, also written --diff A B", None),
      Flag("sample", FlagKind.SEED, "seed of the random logits that both route", 0),
    ),
  ),
  "audit": Command(
    "change later tokens of a model or router, report what leaks into earlier ones",
    "moe_jax.commands.audit:audit",
    (
      Flag("config", FlagKind.CONFIG, "config file of a model, with a variant if it has any", None),
      Flag("preset", FlagKind.TEXT, "a router preset instead of a model", None),
      Flag("seed", FlagKind.SEED, "seed of parameters and tokens", 0),
    ),
  ),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and returns its exit status.

  Args:
    argv: the words after the program's name; those of this process when None.

  Returns:
    0 on success, 2 after a fault of the user's, 130 after an interrupt, 141 when the reader of the
    output has closed it.
  """
  # A terminal that cannot show a character must not end a run that has been trained.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")
  try:
    status = _run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    return status
  except UserError as error:
    return _refuse(str(error))
  except BrokenPipeError:
    # The reader, as `head`, has what it wanted; Python would try what is left again at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _CLOSED
  except OSError as error:
    if error.filename is None and error.errno not in _FULL:
      raise
    return _refuse(_os_fault(error))
  except KeyboardInterrupt:
    print(f"\n{_PROGRAM}: interrupted", file=sys.stderr)
    return 130


def _refuse(sentence: str) -> int:
  """Prints a fault of the user's on one line and returns its exit status."""
  print(f"{_PROGRAM}: error: {' '.join(sentence.split())}", file=sys.stderr)
  return 2


def _os_fault(error: OSError) -> str:
  """Says which file the operating system refused, and why."""
  if error.filename is None:
    return f"the output cannot be written ({error.strerror}); make room for it"
  # The second file of a rename is the one that was to be written.
  path = error.filename if error.filename2 is None else error.filename2
  return (
    f"{path} cannot be read or written ({error.strerror}); mend its place or permissions, or give"
    " another path"
  )


def _run(argv: list[str]) -> int:
  """Answers help and version, otherwise parses and runs the subcommand."""
  if not argv:
    print(_program_help(), file=sys.stderr)
    return 2
  name, *rest = argv
  if name in ("--help", "-h", "help"):
    print(_program_help())
    return 0
  if name == "--version":
    print(f"{_PROGRAM} {__version__}")
    return 0
  if rest and f"{name} {rest[0]}" in COMMANDS:
    name = f"{name} {rest.pop(0)}"
  elif rest and not rest[0].startswith("-"):
    _check_operation(name, rest[0])
  if name not in COMMANDS:
    single = [each for each in COMMANDS if " " not in each]
    raise UserError(f"{name!r} is not a command; {did_you_mean(name, single)}")
  if "--help" in rest or "-h" in rest:
    print(_command_help(name))
    return 0
  command = COMMANDS[name]
  find_in_current_folder()
  arguments = parse_command_line(rest, flags=command.flags, program=f"{_PROGRAM} {name}")
  return pkgutil.resolve_name(command.entry)(arguments) or 0


def _check_operation(name: str, word: str) -> None:
  """Refuses a second word that is no operation of a command that has some."""
  known = [each.removeprefix(f"{name} ") for each in COMMANDS if each.startswith(f"{name} ")]
  if known:
    raise UserError(f"{word!r} is no operation of {_PROGRAM} {name}; {did_you_mean(word, known)}")


def _program_help() -> str:
  rows = [(name, command.help) for name, command in COMMANDS.items()]
  return (
    f"usage: {_PROGRAM} COMMAND [--flag=value ...]\n\n"
    "Train, run and inspect Mixture-of-Experts models.\n\n"
    f"commands:\n{_aligned(rows)}\n\n"
    f"{_PROGRAM} COMMAND --help lists the flags of a command."
  )


def _command_help(name: str) -> str:
  command = COMMANDS[name]
  needed = [_spelt(flag) for flag in command.flags if flag.default is REQUIRED]
  rest = "" if len(needed) == len(command.flags) else " [--flag=value ...]"
  rows = [(_spelt(flag), flag.help + _default_note(flag)) for flag in command.flags]
  if command.flags[0].kind is FlagKind.CONFIG:
    rest += " [--config.FIELD=VALUE ...]"
    rows.append(("--config.FIELD=VALUE", "set one field, for example --config.moe.top_k=1"))
  return (
    f"usage: {' '.join([_PROGRAM, name, *needed])}{rest}\n\n"
    f"{command.help[0].upper()}{command.help[1:]}.\n\n"
    f"flags:\n{_aligned(rows)}{_operations(name)}"
  )


def _operations(name: str) -> str:
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


if __name__ == "__main__":
  sys.exit(main())
