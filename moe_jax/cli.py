"""The command line: `moe-jax COMMAND --flag=value ...`.

Subcommands live where their work is and are imported only when run, so that `--help` and a faulty
command line answer at once. A `UserError` is one line and exit status 2, and so is a file that the
operating system refuses to read or write; any other exception is a bug and keeps its traceback.
"""

import errno
import io
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

from moe_jax import __version__
from moe_jax.choices import did_you_mean
from moe_jax.commands.catalogue import COMMANDS
from moe_jax.commands.help import PROGRAM, command_help, operations, program_help
from moe_jax.config import find_in_current_folder
from moe_jax.config.command_line import parse_command_line
from moe_jax.errors import EXIT_USER, UserError

# As of a program that the signal of a closed pipe ends.
_CLOSED = 128 + signal.SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
    return 130


def _refuse(sentence: str, status: int = EXIT_USER) -> int:
  """Prints a fault of the user's, or why a run has stopped, on one line; returns the status."""
  kind = "error: " if status == EXIT_USER else ""
  print(f"{PROGRAM}: {kind}{' '.join(sentence.split())}", file=sys.stderr)
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
    print(program_help(), file=sys.stderr)
    return 2
  name, *rest = argv
  if name in ("--help", "-h", "help"):
    print(program_help())
    return 0
  if name == "--version":
    print(f"{PROGRAM} {__version__}")
    return 0
  if rest and f"{name} {rest[0]}" in COMMANDS:
    name = f"{name} {rest.pop(0)}"
  elif rest and not rest[0].startswith("-"):
    _check_operation(name, rest[0])
  if name not in COMMANDS:
    if rest != ["--help"] or not operations(name):
      raise _unknown(name)
    print(f"usage: {PROGRAM} {name} OPERATION [--flag=value ...]{operations(name)}")
    return 0
  own = _split_command(rest)[0]
  if "--help" in own or "-h" in own:
    print(command_help(name))
    return 0
  command = COMMANDS[name]
  find_in_current_folder()
  rest, further = _split_command(rest)
  if further and not any(flag.name == "command" for flag in command.flags):
    raise UserError(f"{PROGRAM} {name} takes no command after --; leave out {further[0]!r}")
  rest = _named(rest, command.words)
  arguments = parse_command_line(rest, flags=command.flags, program=f"{PROGRAM} {name}")
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
    return UserError(f"{PROGRAM} {name} needs an operation, one of {choices}")
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
    raise UserError(f"{word!r} is no operation of {PROGRAM} {name}; {did_you_mean(word, known)}")


if __name__ == "__main__":
  sys.exit(main())
