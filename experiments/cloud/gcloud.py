"""The commands of `gcloud` for one request, and what its answers mean."""

import enum
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cloud.commands import Outcome, Shell
from experiments.cloud.request import Install, Provisioning, Request, Through
from moe_jax.errors import UserError

_WORKER = Path(__file__).with_name("worker.sh")
_ROOT = Path(__file__).parents[2]
_SCRIPT, _ARCHIVE = "moe_jax_worker.sh", "moe_jax_source.tar.gz"
_LABEL = "moe-jax-run"
# Google's software for each kind of chip (docs.cloud.google.com/tpu/docs/runtimes).
_RUNTIME = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}


class State(enum.Enum):
  """What can be done with slices."""

  ABSENT = "absent"
  COMING = "coming"
  READY = "ready"
  GOING = "going"
  LOST = "lost"


# QueuedResourceState.State and Node.State of the Cloud TPU API, v2.
_STATES = {
  Through.QUEUED_RESOURCE: {
    State.COMING: ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
    State.READY: ("ACTIVE",),
    State.GOING: ("SUSPENDING", "DELETING"),
    State.LOST: ("SUSPENDED", "FAILED"),
  },
  Through.TPU_VM: {
    State.COMING: ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING"),
    State.READY: ("READY",),
    State.GOING: ("STOPPING", "DELETING"),
    State.LOST: ("STOPPED", "PREEMPTED", "TERMINATED"),
  },
}
_COLLECTION = {Through.QUEUED_RESOURCE: "queued-resources", Through.TPU_VM: "tpu-vm"}


class Slices:
  """The slices of one request: finds, makes, uses and deletes them.

  In a dry run nothing is asked, and every command is taken to do what it should.
  """

  def __init__(self, request: Request, shell: Shell):
    self.request = request
    self._shell = shell
    self._imagined = State.ABSENT
    self._queued = request.through is Through.QUEUED_RESOURCE

  def state(self) -> tuple[State, str]:
    """Returns the state, and Google's word for it.

    Raises:
      UserError: the name belongs to something else, or Google does not answer.
    """
    found = self._shell.keep([*self._words("describe"), *self._where(), "--format=json"])
    if self._shell.dry_run:
      return self._imagined, self._imagined.value.upper()
    if found.status:
      if "NOT_FOUND" in found.errors:
        return State.ABSENT, "absent"
      raise UserError(
        f"Google Cloud does not tell of {self.request.name} ({found.reason}): see that gcloud auth"
        " login was run, and that --project and --zone are right"
      )
    described = json.loads(found.output)
    self._check_ours(described)
    word = described["state"]["state"] if self._queued else described["state"]
    for state, names in _STATES[self.request.through].items():
      if word in names:
        return state, word
    raise UserError(
      f"{self.request.name} is in the state {word}, in which this launcher can do nothing; look at"
      " it in the console, and delete it there if it is lost"
    )

  def create(self) -> Outcome:
    """Asks for the slices; a queued resource then waits for them."""
    request = self.request
    words = [*self._words("create"), *self._where()]
    words += [f"--accelerator-type={request.piece.accelerator_type}"]
    runtime = request.runtime or _RUNTIME[request.piece.chip]
    words += [f"--{'runtime-version' if self._queued else 'version'}={runtime}"]
    if self._queued and request.num_slices > 1:
      words += [f"--node-count={request.num_slices}", f"--node-prefix={request.name}"]
    elif self._queued:
      words += [f"--node-id={request.name}"]
    if request.provisioning is not Provisioning.ON_DEMAND:
      words += [f"--{request.provisioning.value}"]
    outcome = self._shell.keep([*words, f"--labels={_LABEL}={request.name}"])
    self._imagined = State.READY
    return outcome

  def delete(self) -> None:
    """Deletes the slices, in whatever state, and waits until they are gone."""
    words = [*self._words("delete"), *self._where(), "--quiet"]
    # Without it a queued resource refuses while it has nodes.
    words += ["--force"] if self._queued else []
    self._shell.must(words, "run delete again, and see in the console that nothing goes on costing")
    self._imagined = State.ABSENT

  def prepare(self) -> int:
    """Brings script and package to all hosts; returns an exit status."""
    request, commit, files = self.request, Install.IMAGE.value, [(_WORKER, _SCRIPT)]
    if request.install is Install.COMMIT:
      archive, commit = self._archive()
      files.append((archive, _ARCHIVE))
    for source, name in files:
      if status := self._shell.show([*self._words("scp", (str(source), f":{name}")), *self._all()]):
        return status
    return self.on_all("setup", commit, request.share, request.workdir)

  def train(self) -> int:
    """Starts the training on all hosts, or joins it, and shows it; returns its exit status."""
    request = self.request
    # The only host of a run copies its folder while it trains; of several, they share it.
    bucket = request.bucket if request.hosts == 1 and request.bucket else "none"
    return self.on_all("train", request.name, request.workdir, bucket, *request.train_command)

  def push(self) -> int:
    """Makes the first host copy run folder and logs to the bucket, if there is one."""
    if self.request.bucket is None:
      return 0
    return self.on_first("push", self.request.workdir, self.request.bucket)

  def fetch(self, folder: Path) -> None:
    """Brings logs and metrics to a folder here, from the bucket if there is one.

    Raises:
      UserError: they cannot be had.
    """
    if not self._shell.dry_run:
      _make_folder(folder)
    if self.request.bucket is not None:
      words = ["gcloud", "storage", "rsync", self.request.bucket, str(folder)]
      words += ["--exclude=.*/checkpoints/.*", "--recursive"]
    else:
      sources = f":{self.request.workdir}/metrics.jsonl", f":moe_jax_runs/{self.request.name}/log"
      words = [*self._words("scp", (*sources, str(folder))), *self._where(), "--worker=0"]
    self._shell.must(words, "see that the run has begun, and that its slices or its bucket exist")

  def on_all(self, *words: str) -> int:
    """Runs a verb of the worker's script on all hosts; returns an exit status."""
    return self._shell.show([*self._words("ssh"), *self._all(), _remote(words)])

  def on_first(self, *words: str) -> int:
    """Runs a verb of the worker's script on the first host; returns an exit status."""
    return self._shell.show([*self._words("ssh"), *self._where(), "--worker=0", _remote(words)])

  def _archive(self) -> tuple[Path, str]:
    """Packs the last commit of this checkout; returns the file and the commit."""
    git = ["git", "-C", str(_ROOT)]
    remedy = "run from a checkout of the project, or give --install=image"
    commit = self._shell.must([*git, "rev-parse", "HEAD"], remedy).output.strip() or "HEAD"
    archive = _ROOT / "build" / _ARCHIVE
    if not self._shell.dry_run:
      archive.parent.mkdir(exist_ok=True)
    self._shell.must([*git, "archive", "--format=tar.gz", f"--output={archive}", commit], remedy)
    return archive, commit

  def _words(self, verb: str, files: Sequence[str] | None = None) -> list[str]:
    """Returns a command up to its arguments; a file that begins with a colon is on the hosts."""
    name = self.request.name
    targets = [name] if files is None else [name + f if f[0] == ":" else f for f in files]
    return ["gcloud", "compute", "tpus", _COLLECTION[self.request.through], verb, *targets]

  def _where(self) -> list[str]:
    return [f"--project={self.request.project}", f"--zone={self.request.zone}"]

  def _all(self) -> list[str]:
    return [*self._where(), *(["--node=all"] if self._queued else []), "--worker=all"]

  def _check_ours(self, described: dict[str, Any]) -> None:
    nodes = [described]
    if self._queued:
      nodes = [each["node"] for each in described["tpu"]["nodeSpec"]]
    request, kind = self.request, nodes[0].get("acceleratorType")
    label = nodes[0].get("labels", {}).get(_LABEL)
    if label != request.name or kind != request.piece.accelerator_type:
      raise UserError(
        f"--name={request.name} is taken in {request.zone} by"
        f" {'a ' + kind if label == request.name else 'something this launcher did not make'};"
        " choose another --name, or delete that one first"
      )


def _make_folder(folder: Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--to={folder} cannot be made ({error.strerror}); give another") from error


def _remote(words: Sequence[str]) -> str:
  """Returns the flag of ssh that runs the worker's script; ssh takes no list of words."""
  return f"--command={shlex.join(['bash', _SCRIPT, *words])}"
