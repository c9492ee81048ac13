"""What a user asks of Google Cloud: which slices, where, and what is to run on them."""

import dataclasses
import enum
import math
import re
from pathlib import PurePosixPath

from experiments.cloud.slices import Slice
from moe_jax.errors import UserError

# The names that Google Cloud takes for resources.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,53}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_NFS = re.compile(r"[^:/\s]+:/\S*")


class Provisioning(enum.Enum):
  """How the capacity is paid for."""

  ON_DEMAND = "on-demand"
  SPOT = "spot"
  RESERVED = "reserved"


class Through(enum.Enum):
  """By which resource slices are asked for."""

  QUEUED_RESOURCE = "queued-resource"
  TPU_VM = "tpu-vm"


class Install(enum.Enum):
  """How the package comes to the workers: the last commit of this checkout, or with the image."""

  COMMIT = "commit"
  IMAGE = "image"


@dataclasses.dataclass(frozen=True)
class Request:
  """One run on TPU slices.

  Attributes:
    name: of the resource, and of the run.
    project: of Google Cloud.
    zone: where the slices are.
    piece: one slice.
    num_slices: equal slices, joined by the network of the data centre.
    provisioning: spot, reserved or on demand.
    through: queued resource or plain TPU VM.
    runtime: software version of the TPU VM.
    install: how the package gets there.
    workdir: run folder on the workers, an absolute path.
    share: HOST:/EXPORT of the NFS that holds `workdir`, `ready` where the image has it mounted
      on all workers, `none` for one host.
    bucket: gs:// folder that gets a copy of the run folder and the logs; None for none.
    words: of `moe-jax train`, without --workdir.
    price: US dollars per chip-hour, where the table is not to be asked.

  Raises:
    UserError: a value, or a combination of them, that cannot work.
  """

  name: str
  project: str
  zone: str
  piece: Slice
  num_slices: int = 1
  provisioning: Provisioning = Provisioning.SPOT
  through: Through = Through.QUEUED_RESOURCE
  runtime: str = ""
  install: Install = Install.COMMIT
  workdir: str = ""
  share: str = "none"
  bucket: str | None = None
  words: tuple[str, ...] = ()
  price: float | None = None

  def __post_init__(self):
    self._check_place()
    if self.num_slices < 1:
      raise UserError(f"--slices={self.num_slices} is refused: there is at least 1")
    if self.num_slices > 1 and self.through is Through.TPU_VM:
      raise UserError(
        f"--slices={self.num_slices} with --through=tpu-vm is refused: several slices come as one"
        " queued resource; give --through=queued-resource"
      )
    if self.price is not None and not 0 <= self.price < math.inf:
      raise UserError(f"--price={self.price} is refused: give US dollars per chip-hour, at least 0")
    if self.workdir:
      self._check_folders()

  @property
  def hosts(self) -> int:
    """Processes of the run."""
    return self.piece.hosts * self.num_slices

  @property
  def region(self) -> str:
    """The region of the zone, which sets the price."""
    return self.zone.rpartition("-")[0]

  @property
  def train_command(self) -> list[str]:
    """The words of the training itself; the TPU tells each process which one it is."""
    return ["moe-jax", "train", f"--workdir={self.workdir}", *self.words]

  def _check_place(self) -> None:
    if not _NAME.fullmatch(self.name):
      raise UserError(
        f"--name={self.name} is refused: expected up to 55 lower-case letters, digits and hyphens,"
        " a letter first, for example moe-run-1"
      )
    if not self.project:
      raise UserError("--project is missing: give the id of a project, as in gcloud projects list")
    if not _ZONE.fullmatch(self.zone):
      given = f"--zone={self.zone} is no zone" if self.zone else "--zone is missing"
      raise UserError(
        f"{given}: give one that has the chips, for example us-east5-a (gcloud compute tpus"
        " locations list)"
      )

  def _check_folders(self) -> None:
    if self.workdir.startswith("gs:"):
      raise UserError(
        f"--workdir={self.workdir} is refused: a run folder needs a file system with locks; give a"
        " folder of the workers, for example --workdir=/mnt/share/run, and --bucket for the copy"
      )
    if not PurePosixPath(self.workdir).is_absolute():
      raise UserError(f"--workdir={self.workdir} is refused: give an absolute path of the workers")
    if self.share not in ("none", "ready") and not _NFS.fullmatch(self.share):
      raise UserError(
        f"--share={self.share} is refused: expected HOST:/EXPORT of an NFS server, ready or none"
      )
    if self.share == "none" and self.hosts > 1:
      raise UserError(
        f"--share=none is refused with {self.hosts} hosts, which must see one run folder: give"
        " --share=HOST:/EXPORT (Filestore), or --share=ready where the image has it mounted"
      )
    if self.bucket is not None and not self.bucket.startswith("gs://"):
      raise UserError(f"--bucket={self.bucket} is refused: expected gs://BUCKET/FOLDER")
