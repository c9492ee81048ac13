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
from moe_jax.errors import EXIT_USER, UserError

_PROGRAM = "moe-jax"
# As of a program that the signal of a closed pipe ends.
_CLOSED = 128 + signal.SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Command:
  """Describes one subcommand.

  Attributes:
    help: one line.
    entry: "module:function", called with the parsed flags.
    flags: that it takes.
    words: names of flags whose values may also come first, without names, in this order.
  """

  help: str
  entry: str
  flags: tuple[Flag, ...]
  words: tuple[str, ...] = ()


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
_DATA = Flag("config", FlagKind.CONFIG, "config file, whose section data says what to read")
_ROUTER_STD = Flag("router_std", FlagKind.NUMBER, "standard deviation of new router columns", 0.02)

COMMANDS = {
  "train": Command(
    "train the model of a config file; the same command again resumes the run",
    "moe_jax.commands.training:train",
    (
      Flag(
        "config",
        FlagKind.CONFIG,
        "config file, and one of the variants its docstring lists",
        instead="replay",
      ),
      Flag("workdir", FlagKind.FOLDER, "folder of the run: metrics, checkpoints, report"),
      Flag("replay", FlagKind.FOLDER, "a run to train again from its own config", None),
      Flag("coordinator", FlagKind.TEXT, "HOST:PORT of process 0, if there are several", None),
      Flag("num_processes", FlagKind.INTEGER, "how many; found on TPU, GKE and Slurm", None),
      Flag("process_id", FlagKind.INTEGER, "which one this is, from 0", None),
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
      Flag("image", FlagKind.FILE, "file of an image to show first, with --workdir", None),
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
    "make a run with experts from a dense one: each a copy, or a part of it",
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
    "make a run with fewer experts: the most used, the largest, or some ids",
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
    "make a run with fewer experts: weighted means of those that are alike",
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
  "checkpoint ls": Command(
    "list the checkpoints of a run, and whether each is as it was saved",
    "moe_jax.commands.checkpoint:ls",
    (_RUN,),
    ("workdir",),
  ),
  "checkpoint verify": Command(
    "read all of a run's checkpoints; exit status 2 if one is damaged",
    "moe_jax.commands.checkpoint:verify",
    (_RUN, Flag("step", FlagKind.INTEGER, "checkpoint to read; all if absent", None)),
    ("workdir",),
  ),
  "checkpoint diff": Command(
    "tell in which arrays two checkpoints differ, and by how much",
    "moe_jax.commands.checkpoint:diff",
    (
      _RUN,
      Flag("other", FlagKind.FOLDER, "another run; the same one if absent", None),
      _STEP,
      Flag("other_step", FlagKind.INTEGER, "the other checkpoint; the latest if absent", None),
    ),
    ("workdir", "other"),
  ),
  "supervise": Command(
    "start moe-jax train again when it was stopped or has died",
    "moe_jax.commands.supervise:supervise",
    (
      Flag("restarts", FlagKind.INTEGER, "so many at most", 100),
      Flag("backoff", FlagKind.NUMBER, "seconds before a restart; doubled by each crash", 1.0),
      Flag("command", FlagKind.TEXTS, "written as -- train --config=... --workdir=...", ()),
    ),
  ),
  "watch": Command(
    "show a run as it goes: loss, load of experts, speed, events",
    "moe_jax.commands.watch:watch",
    (
      _RUN,
      Flag("once", FlagKind.SWITCH, "print one picture and end", False),
      Flag("every", FlagKind.NUMBER, "seconds between two pictures", 2.0),
    ),
    ("workdir",),
  ),
  "analyze": Command(
    "measure how a run routes, beside chance: a page and tables",
    "moe_jax.commands.analysis:analyze",
    (
      _RUN,
      _STEP,
      Flag("out", FlagKind.FOLDER, "folder to write; analysis in the run's if absent", None),
      Flag("domain", FlagKind.TEXTS, "NAME=SOURCE of a text to route; the run's own if absent", ()),
      Flag("batches", FlagKind.INTEGER, "batches of each text", 16),
    ),
  ),
  "report": Command(
    "write the report of a run, or the pages of a folder of recipes",
    "moe_jax.commands.reporting:report",
    (
      Flag("workdir", FlagKind.FOLDER, "folder of a run, or of recipes as experiments/"),
      Flag("compare", FlagKind.FOLDERS, "another run to set beside it; repeatable", ()),
    ),
    ("workdir",),
  ),
  "sweep": Command(
    "train all arms of a recipe over seeds and judge a paper's claims by them",
    "moe_jax.commands.sweeping:sweep",
    (
      Flag("config", FlagKind.FILE, "file of the recipe, with a function get_recipe()"),
      Flag("profile", FlagKind.TEXT, "smoke, cpu, full or gpu", "smoke"),
      Flag("workdir", FlagKind.FOLDER, "folder of all runs, shared by recipes", "runs/sweeps"),
      Flag("cards", FlagKind.FOLDER, "folder of the cards; one in the workdir if absent", None),
      Flag("workers", FlagKind.INTEGER, "runs at a time, each on cores of its own", 1),
      Flag("index", FlagKind.INTEGER, "do this run alone, as in a job array", None),
      Flag("list", FlagKind.SWITCH, "list the runs and end", False),
    ),
  ),
  "plan": Command(
    "count what a model costs, or compile its training step for a pod",
    "moe_jax.commands.planning:plan",
    (
      Flag("config", FlagKind.CONFIG, "config file, and one of the variants its docstring lists"),
      Flag("topology", FlagKind.TEXT, "compile for a slice of TPUs, as v5p:4x4x4", None),
      Flag("slices", FlagKind.INTEGER, "such slices, joined by the data-centre network", 1),
      Flag("layout", FlagKind.TEXT, "which arrays are split, as fsdp or ep_fsdp", None),
      Flag("batch", FlagKind.INTEGER, "sequences a step; 8,192 tokens a chip if absent", None),
      Flag("dispatch", FlagKind.TEXT, "gather, einsum or ragged, over the config's", None),
      Flag("search", FlagKind.SWITCH, "try layouts, remat, microbatches and group sizes", False),
      Flag("json", FlagKind.SWITCH, "print all numbers exactly, as JSON", False),
    ),
  ),
  "data prepare": Command(
    "tokenise and pack the data of a config, once; again, it goes on",
    "moe_jax.commands.data:prepare_data",
    (_DATA,),
  ),
  "data verify": Command(
    "compare every file of a prepared data set with its checksum",
    "moe_jax.commands.data:verify_data",
    (_DATA,),
  ),
  "data train-tokenizer": Command(
    "train a SentencePiece model on the training documents of a config",
    "moe_jax.commands.data:train_tokenizer",
    (
      _DATA,
      Flag("out", FlagKind.FILE, "the .model file to write"),
      Flag("vocab_size", FlagKind.INTEGER, "ids, special ones and 256 bytes included", 8192),
      Flag("kind", FlagKind.TEXT, "bpe or unigram", "bpe"),
      Flag("megabytes", FlagKind.INTEGER, "text to learn from, the first of each source", 64),
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
    "change later tokens of a model or router, report what leaks back",
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
    0 on success, 2 after a fault of the user's, 75 when a run was told to end and is saved, 130
    after an interrupt, 141 when the reader of the output has closed it.
  """
  # A terminal that cannot show a character must not end a run that has been trained.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")
  try:
    status = _run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    return status
  except UserError as error:
    return _refuse(str(error), error.status)
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


def _refuse(sentence: str, status: int = EXIT_USER) -> int:
  """Prints a fault of the user's, or why a run has stopped, on one line; returns the status."""
  kind = "error: " if status == EXIT_USER else ""
  print(f"{_PROGRAM}: {kind}{' '.join(sentence.split())}", file=sys.stderr)
  return status


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
    if rest != ["--help"] or not _operations(name):
      raise _unknown(name)
    print(f"usage: {_PROGRAM} {name} OPERATION [--flag=value ...]{_operations(name)}")
    return 0
  own = _split_command(rest)[0]
  if "--help" in own or "-h" in own:
    print(_command_help(name))
    return 0
  command = COMMANDS[name]
  find_in_current_folder()
  rest, further = _split_command(rest)
  if further and not any(flag.name == "command" for flag in command.flags):
    raise UserError(f"{_PROGRAM} {name} takes no command after --; leave out {further[0]!r}")
  rest = _named(rest, command.words)
  arguments = parse_command_line(rest, flags=command.flags, program=f"{_PROGRAM} {name}")
  if further:
    arguments.command = tuple(further)
  return pkgutil.resolve_name(command.entry)(arguments) or 0


def _named(argv: list[str], names: Sequence[str]) -> list[str]:
  """Puts the names of flags to the values that may come without."""
  count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
  named = [f"--{name}={word}" for name, word in zip(names, argv[:count], strict=False)]
  return named + argv[len(named) :]


def _unknown(name: str) -> UserError:
  """Explains a first word that is no command, or none without a second word."""
  operations = [each.removeprefix(f"{name} ") for each in COMMANDS if each.startswith(f"{name} ")]
  if operations:
    choices = ", ".join(operations)
    return UserError(f"{_PROGRAM} {name} needs an operation, one of {choices}")
  return UserError(f"{name!r} is not a command; {did_you_mean(name, _first_words())}")


def _first_words() -> list[str]:
  return list(dict.fromkeys(each.partition(" ")[0] for each in COMMANDS))


def _split_command(words: list[str]) -> tuple[list[str], list[str]]:
  """Returns the words before a "--", and the command after it."""
  if "--" not in words:
    return words, []
  place = words.index("--")
  return words[:place], words[place + 1 :]


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
