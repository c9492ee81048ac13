"""Runs on TPU node pools of GKE, as a JobSet: `python -m experiments.cloud.gke VERB --name=...`."""

import argparse
import dataclasses
import json
import re
import shlex
import string
import sys
from pathlib import Path, PurePosixPath

from experiments.cloud.commands import Shell
from experiments.cloud.flags import FlagParser, before_and_after, write_for_tool
from experiments.cloud.slices import Slice, parse_slice
from moe_jax.errors import UserError

_TEMPLATE = Path(__file__).with_name("jobset.yaml")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?")
_SPOT = '\n                cloud.google.com/gke-spot: "true"'
_VERBS = {
  "yaml": "print the JobSet",
  "create": "give it to the cluster",
  "watch": "its state and what the first process says",
  "resume": "delete what failed and create it again; the run goes on",
  "delete": "delete it; run folder and claim stay",
  "xpk": "print the command of xpk that does the same",
}


@dataclasses.dataclass(frozen=True)
class Job:
  """One run on GKE.

  Attributes:
    name: of the JobSet.
    piece: one slice, which is one node pool.
    slices: how many.
    image: container image with `moe-jax`.
    claim: PersistentVolumeClaim, ReadWriteMany, that holds the run folder.
    workdir: run folder, whose parent is where the claim is mounted.
    words: of `moe-jax train`, without --workdir.
    spot: whether the node pools are of spot capacity.
    restarts: of all pods together.

  Raises:
    UserError: a value that cannot work.
  """

  name: str
  piece: Slice
  slices: int
  image: str
  claim: str
  workdir: str
  words: tuple[str, ...]
  spot: bool = False
  restarts: int = 100

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise UserError(
        f"--name={self.name} is refused: expected up to 32 lower-case letters, digits and hyphens,"
        " a letter first, so that names of pods still fit behind it"
      )
    if self.slices < 1 or self.restarts < 0:
      raise UserError(
        f"--slices={self.slices}, --restarts={self.restarts} is refused: there is at least 1 slice"
        " and no negative number of restarts"
      )
    # Its parent is where the claim is mounted, and that cannot be the root of the container.
    if not self.workdir.startswith("/") or len(PurePosixPath(self.workdir).parts) < 3:
      raise UserError(
        f"--workdir={self.workdir} is refused: expected a folder within the mounted claim, for"
        " example /share/run"
      )

  @property
  def command(self) -> list[str]:
    """The words that every pod runs; GKE tells each which process it is."""
    return ["moe-jax", "train", f"--workdir={self.workdir}", *self.words]

  def yaml(self) -> str:
    """Returns the JobSet."""
    # JSON is YAML, and quotes whatever a word holds.
    return string.Template(_TEMPLATE.read_text()).substitute(
      name=self.name,
      restarts=self.restarts,
      slices=self.slices,
      hosts=self.piece.hosts,
      accelerator=self.piece.gke_accelerator,
      topology=self.piece.shape,
      spot=_SPOT if self.spot else "",
      image=json.dumps(self.image),
      command=json.dumps(self.command),
      chips=self.piece.chips_per_host,
      mount=json.dumps(str(PurePosixPath(self.workdir).parent)),
      claim=json.dumps(self.claim),
    )


def xpk_command(job: Job, cluster: str, project: str, zone: str) -> list[str]:
  """Returns the command of xpk for a job; xpk mounts storage that was attached to the cluster."""
  return [
    "xpk",
    "workload",
    "create",
    f"--workload={job.name}",
    f"--cluster={cluster}",
    f"--project={project}",
    f"--zone={zone}",
    f"--tpu-type={job.piece.accelerator_type}",
    f"--num-slices={job.slices}",
    f"--docker-image={job.image}",
    f"--max-restarts={job.restarts}",
    f"--command={shlex.join(job.command)}",
  ]


def main(words: list[str] | None = None) -> int:
  """Runs one verb; returns 0, or 2 for a fault of the user's, or the status of kubectl."""
  try:
    ours, train = before_and_after(sys.argv[1:] if words is None else words)
    return _run(_parser().parse_args(ours), tuple(train))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace, train: tuple[str, ...]) -> int:
  shell = Shell(args.dry_run)
  if args.verb == "watch":
    shell.show(["kubectl", "get", "jobset", args.name])
    # The first process of the first slice writes for all.
    first = f"jobset.sigs.k8s.io/jobset-name={args.name},jobset.sigs.k8s.io/job-index=0"
    first += ",batch.kubernetes.io/job-completion-index=0"
    return shell.show(["kubectl", "logs", "--follow", f"--selector={first}"])
  if args.verb == "delete":
    return shell.show(["kubectl", "delete", "jobset", args.name, "--ignore-not-found"])
  job = _job(args, train)
  if args.verb == "yaml":
    print(job.yaml(), end="")
    return 0
  if args.verb == "xpk":
    print(shlex.join(xpk_command(job, args.cluster, args.project, args.zone)))
    return 0
  if args.verb == "resume":
    shell.show(["kubectl", "delete", "jobset", args.name, "--ignore-not-found", "--wait"])
  return _apply(job, shell, Path(args.file or f"{args.name}.yaml"))


def _apply(job: Job, shell: Shell, path: Path) -> int:
  """Gives the job to the cluster; one that is there already, and equal, stays as it is."""
  if not shell.dry_run:
    write_for_tool(path, job.yaml())
  return shell.show(["kubectl", "apply", f"--filename={path}"])


def _job(args: argparse.Namespace, train: tuple[str, ...]) -> Job:
  missing = [n for n in ("accelerator", "image", "claim", "workdir") if not getattr(args, n)]
  if missing or not train:
    raise UserError(
      f"{args.verb} needs {', '.join('--' + name for name in missing) or 'a training'}; and, after"
      " --, the words of moe-jax train, for example -- --config=configs/mixtral.py:8x7b"
    )
  return Job(
    name=args.name,
    piece=parse_slice(args.accelerator, args.topology),
    slices=args.slices,
    image=args.image,
    claim=args.claim,
    workdir=args.workdir,
    words=train,
    spot=args.spot,
    restarts=args.restarts,
  )


def _parser() -> FlagParser:
  parser = FlagParser("experiments.cloud.gke", _VERBS)
  add = parser.add_argument
  add("--name", required=True, help="of the JobSet")
  add("--accelerator", default="", help="one slice, such as v5p-128 or v5p:4x4x4")
  add("--topology", help="such as 4x4x4, checked against --accelerator")
  add("--slices", type=int, default=1, help="how many")
  add("--image", default="", help="container image with moe-jax")
  add("--claim", default="", help="PersistentVolumeClaim (ReadWriteMany) for the run folder")
  add("--workdir", default="", help="run folder; the claim is mounted at its parent")
  add("--spot", action="store_true", help="node pools of spot capacity")
  add("--restarts", type=int, default=100, help="of all pods together")
  add("--file", help="where the YAML is written; NAME.yaml if left out")
  add("--cluster", default="CLUSTER", help="for xpk")
  add("--project", default="PROJECT", help="for xpk")
  add("--zone", default="ZONE", help="for xpk")
  add("--dry-run", action="store_true", help="print the commands only")
  return parser


if __name__ == "__main__":
  sys.exit(main())
