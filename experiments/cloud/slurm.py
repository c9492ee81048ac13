"""Runs on GPUs under Slurm, of one node or many: `python -m experiments.cloud.slurm VERB`."""

import argparse
import dataclasses
import re
import shlex
import string
import sys
from pathlib import Path

from experiments.cloud.commands import Shell
from experiments.cloud.flags import FlagParser, before_and_after, write_for_tool
from moe_jax.errors import UserError

_TEMPLATE = Path(__file__).with_name("slurm.sbatch")
_NAME = re.compile(r"[A-Za-z][-\w]*")
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")
_VERBS = {
  "script": "print the batch script",
  "create": "submit it, unless the run is queued or running",
  "watch": "its place in the queue",
  "resume": "the same as create: the run goes on where it stands",
  "delete": "cancel it; the run folder stays",
}


@dataclasses.dataclass(frozen=True)
class Job:
  """One run under Slurm.

  Attributes:
    name: of the job.
    nodes: machines.
    gpus: of each machine; one process for each.
    time: limit, [DAYS-]HH:MM:SS.
    workdir: run folder on a file system that the nodes share.
    words: of `moe-jax train`, without --workdir.
    options: further options of sbatch, such as --partition=gpu.

  Raises:
    UserError: a value that cannot work.
  """

  name: str
  nodes: int
  gpus: int
  time: str
  workdir: str
  words: tuple[str, ...]
  options: tuple[str, ...] = ()

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise UserError(f"--name={self.name} is refused: expected letters, digits, - and _")
    if self.nodes < 1 or self.gpus < 1:
      raise UserError(
        f"--nodes={self.nodes}, --gpus={self.gpus} is refused: there is at least 1 of each"
      )
    if not _TIME.fullmatch(self.time):
      raise UserError(f"--time={self.time} is refused: expected [DAYS-]HH:MM:SS, as in 24:00:00")
    for option in self.options:
      if not re.fullmatch(r"--[a-z][-a-z]*(=\S+)?", option):
        raise UserError(f"--option={option} is refused: expected --NAME=VALUE of sbatch")

  def script(self) -> str:
    """Returns the batch script."""
    command = ["moe-jax", "train", f"--workdir={self.workdir}", *self.words]
    return string.Template(_TEMPLATE.read_text()).substitute(
      name=self.name,
      nodes=self.nodes,
      gpus=self.gpus,
      time=self.time,
      log=f"{self.name}.log",
      extra="".join(f"\n#SBATCH {option}" for option in self.options),
      command=shlex.join(command),
    )


def main(words: list[str] | None = None) -> int:
  """Runs one verb; returns 0, or 2 for a fault of the user's, or the status of Slurm's tool."""
  try:
    ours, train = before_and_after(sys.argv[1:] if words is None else words)
    return _run(_parser().parse_args(ours), tuple(train))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace, train: tuple[str, ...]) -> int:
  shell = Shell(args.dry_run)
  if args.verb == "watch":
    return shell.show(["squeue", "--me", f"--name={args.name}"])
  if args.verb == "delete":
    return shell.show(["scancel", "--me", f"--name={args.name}"])
  if not (args.workdir and train):
    raise UserError(
      f"{args.verb} needs --workdir=FOLDER and, after --, the words of moe-jax train, for example"
      " -- --config=configs/mixtral.py:8x7b"
    )
  options = tuple(args.option)
  job = Job(args.name, args.nodes, args.gpus, args.time, args.workdir, train, options)
  if args.verb == "script":
    print(job.script(), end="")
    return 0
  return _submit(job, shell, Path(args.file or f"{args.name}.sbatch"))


def _submit(job: Job, shell: Shell, path: Path) -> int:
  """Submits the job, unless one of its name is there."""
  queue = ["squeue", "--me", f"--name={job.name}", "--noheader", "--format=%i %T"]
  there = shell.must(queue, "see that this is a machine with Slurm").output.split()
  if there:
    print(f"{job.name} is job {there[0]}, {there[-1]}: nothing to submit")
    return 0
  if not shell.dry_run:
    write_for_tool(path, job.script())
  return shell.show(["sbatch", str(path)])


def _parser() -> FlagParser:
  parser = FlagParser("experiments.cloud.slurm", _VERBS)
  add = parser.add_argument
  add("--name", required=True, help="of the job")
  add("--nodes", type=int, default=1, help="machines")
  add("--gpus", type=int, default=8, help="of each machine")
  add("--time", default="24:00:00", help="limit, [DAYS-]HH:MM:SS")
  add("--workdir", default="", help="run folder on a file system that the nodes share")
  add("--option", action="append", default=[], help="further option of sbatch, may be repeated")
  add("--file", help="where the script is written; NAME.sbatch if left out")
  add("--dry-run", action="store_true", help="print the commands only")
  return parser


if __name__ == "__main__":
  sys.exit(main())
