"""Prepared data sets: tokenised, packed, on disk once, read at random ever after.

Each source has a folder of its own under `packed_text` of the data directory, whatever it is mixed
with: shards of records, a manifest with their checksums, and the beginning of the text.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import logging

from moe_jax.data.config import DataConfig, check_local
from moe_jax.data.documents import Source, open_source
from moe_jax.data.files import MissingSourceError
from moe_jax.data.ingest import JOURNAL_FILE, Ingest
from moe_jax.data.manifest import MANIFEST_FILE, Manifest, damaged, read_manifest, write_manifest
from moe_jax.data.mixture import Mixture
from moe_jax.data.packing import PackingCounts, Record
from moe_jax.data.progress import PreparationProgress
from moe_jax.data.shards import Records
from moe_jax.data.sources import SourceConfig, SourceKind
from moe_jax.data.splits import HELDOUT_BYTES, HELDOUT_EVERY, Split
from moe_jax.data.tokenizers import Tokenizer, get_tokenizer
from moe_jax.errors import UserError

# Raise it whenever the same source, tokenizer and length would give other records.
FORMAT_VERSION = 2
FOLDER = "packed_text"
# What `prepare` makes on the way to something else; more takes a command of its own.
_ON_THE_WAY_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class PreparedSource:
  """The data set of one source: its folder, what it says of itself, its weight."""

  folder: Path
  manifest: Manifest
  weight: float

  def records(self, split: Split) -> Records:
    """Returns the records of a split."""
    return Records(self.folder, self.manifest, split)

  def text(self, split: Split) -> bytes:
    """Returns the beginning of the text of a split."""
    (file,) = (file for file in self.manifest.texts if file.split == split)
    return (self.folder / file.name).read_bytes()


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A prepared data set, of one source or a mixture.

  Attributes:
    sources: the data set of each source.
    train: records of the training documents; `len` and `[i]`, each a dict of (L,) int32 arrays. A
      `Mixture` where there are several sources.
    heldout: records of the held-out documents, those of one source after another.
    tokenizer: what made the ids.
    fingerprint: 64 hex digits that change whenever the records or the weights do, and only then.
    counts: what was packed, for each split.
    text_bytes: UTF-8 bytes of text in each split, separators and special tokens not counted.
  """

  sources: tuple[PreparedSource, ...]
  train: Sequence[Record]
  heldout: Sequence[Record]
  tokenizer: Tokenizer
  fingerprint: str
  counts: Mapping[Split, PackingCounts]
  text_bytes: Mapping[Split, int]

  @property
  def vocab_size(self) -> int:
    """Number of ids of the tokenizer."""
    return self.tokenizer.vocab_size

  @property
  def heldout_bytes(self) -> int:
    """Bytes of text in the held-out documents: the denominator of bits per byte."""
    return self.text_bytes[Split.HELDOUT]

  @property
  def heldout_targets(self) -> int:
    """Tokens of the held-out documents that a decoder predicts, the eos of each included."""
    return self.counts[Split.HELDOUT].target_tokens

  @functools.cached_property
  def train_text(self) -> bytes:
    """The training documents in UTF-8, joined by newlines; of a source at most 16 MiB."""
    return self._text(Split.TRAIN)

  @functools.cached_property
  def heldout_text(self) -> bytes:
    """The held-out documents in UTF-8, joined by newlines; of a source at most 16 MiB."""
    return self._text(Split.HELDOUT)

  def _text(self, split: Split) -> bytes:
    return b"\n".join(source.text(split) for source in self.sources)


def prepare(config: DataConfig, *, on_the_way: bool = True) -> PreparedData:
  """Returns the data set of `config`, making what of it is not there.

  Safe when called by several processes at once, and when one of them is killed: the next one goes
  on from what was finished.

  Args:
    config: the data set.
    on_the_way: whether the caller wants to use it at once. Then nothing is made of what would take
      long (TFDS data sets, buckets, more than a GiB of files), and progress shows on terminals
      alone.

  Raises:
    UserError: a source is missing, damaged, too large to be made on the way or has nothing to hold
      out; the data directory cannot be written, or what is there is damaged.
  """
  tokenizer = get_tokenizer(config.tokenizer)
  sources = tuple(_prepared(part, config, tokenizer, on_the_way) for part in config.parts)
  whole = {split: [source.records(split) for source in sources] for split in Split}
  weights = tuple(source.weight for source in sources)
  facts = {split: [source.manifest.facts(split) for source in sources] for split in Split}
  alone = len(sources) == 1
  return PreparedData(
    sources=sources,
    train=whole[Split.TRAIN][0] if alone else Mixture(tuple(whole[Split.TRAIN]), weights),
    heldout=whole[Split.HELDOUT][0] if alone else Mixture(tuple(whole[Split.HELDOUT]), weights),
    tokenizer=tokenizer,
    fingerprint=_fingerprint(sources),
    counts={split: _total([each.packing for each in facts[split]]) for split in Split},
    text_bytes={split: sum(each.text_bytes for each in facts[split]) for split in Split},
  )


def verify(config: DataConfig) -> list[PreparedSource]:
  """Reads every file of a data set that is there and compares it with its checksum.

  Raises:
    UserError: nothing was prepared, or a file is not what was written; names the first.
  """
  tokenizer = get_tokenizer(config.tokenizer)
  found = [_find(part, config, tokenizer)[1] for part in config.parts]
  prepared = []
  for part, folder in zip(config.parts, found, strict=True):
    if not (folder / MANIFEST_FILE).exists():
      raise UserError(
        f"nothing was prepared of source {part.name!r}; run moe-jax data prepare with this --config"
      )
    manifest = read_manifest(folder)
    for file in (*manifest.shards, *manifest.texts):
      if not file.is_sound(folder):
        raise damaged(folder, f"{file.name} does not have its checksum")
    prepared.append(PreparedSource(folder, manifest, part.weight))
  return prepared


def _fingerprint(sources: Sequence[PreparedSource]) -> str:
  if len(sources) == 1:
    return sources[0].manifest.fingerprint
  facts = [(source.manifest.fingerprint, source.weight) for source in sources]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _total(counts: Sequence[PackingCounts]) -> PackingCounts:
  names = [field.name for field in dataclasses.fields(PackingCounts)]
  return PackingCounts(**{name: sum(getattr(each, name) for each in counts) for name in names})


def _prepared(
  part: SourceConfig, config: DataConfig, tokenizer: Tokenizer, on_the_way: bool
) -> PreparedSource:
  """Opens the data set of one source, after making it if it is not there."""
  source, folder = _find(part, config, tokenizer)
  if not (folder / MANIFEST_FILE).exists():
    if on_the_way:
      _check_quick(source)
    _make(config, source, folder, tokenizer, show=not on_the_way)
  # Here, and not where the manifest is written: a kill can come between the two.
  with contextlib.suppress(OSError):
    (folder / JOURNAL_FILE).unlink(missing_ok=True)
  return PreparedSource(folder, read_manifest(folder), part.weight)


def _find(
  part: SourceConfig, config: DataConfig, tokenizer: Tokenizer
) -> tuple[Source | None, Path]:
  """Returns a source and the folder of its data set; None for one that only was there once.

  The name has two digests. The first is of what was asked for; the second, of the documents, keeps
  a source that changed from reading what was made before.
  """
  asked = {
    "source": dataclasses.asdict(dataclasses.replace(part, weight=1.0)),
    "tokenizer": tokenizer.digest,
    "sequence_length": config.sequence_length,
    "image": None if config.image is None else dataclasses.asdict(config.image),
    "heldout": [HELDOUT_EVERY, HELDOUT_BYTES],
    "format": FORMAT_VERSION,
  }
  digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
  slugs = [_slug(part.name), _slug(os.path.basename(tokenizer.name))]
  stem = "-".join([*slugs, str(config.sequence_length), digest[:8]])
  root = Path(_data_dir(config)) / FOLDER
  try:
    source = open_source(part)
  except MissingSourceError:
    found = [path.parent for path in root.glob(f"{stem}-*/{MANIFEST_FILE}")]
    if len(found) != 1:
      raise
    logging.info("source %s is not there; using what was prepared of it: %s", part.name, found[0])
    return None, found[0]
  return source, root / f"{stem}-{source.digest[:12]}"


def _slug(name: str) -> str:
  return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[-40:]


def _check_quick(source: Source) -> None:
  config = source.config
  if config.kind == SourceKind.TFDS or "://" in config.name or source.size > _ON_THE_WAY_BYTES:
    raise UserError(
      f"source {config.name!r} is not prepared, and too large for that to be done on the way; run"
      " moe-jax data prepare with the same --config and --config.data fields first"
    )


def _data_dir(config: DataConfig) -> str:
  """Returns the root of all prepared data sets."""
  folder = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  check_local(folder)
  return os.path.abspath(os.path.expanduser(folder))


def _make(
  config: DataConfig, source: Source, folder: Path, tokenizer: Tokenizer, *, show: bool
) -> None:
  """Writes the data set, unless another process did while this one waited for the lock."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
      if not (folder / MANIFEST_FILE).exists():
        progress = PreparationProgress(source.config.name, source.size, lines=show)
        with contextlib.closing(progress):
          ingest = Ingest(folder, source, tokenizer, config.sequence_length, config.image)
          write_manifest(folder, ingest.run(progress.update))
  except OSError as error:
    raise UserError(
      f"cannot write prepared data to data_dir {_data_dir(config)!r} ({error}); "
      "set data_dir or TFDS_DATA_DIR to a local folder that can be written."
    ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
  """Waits for, then holds an exclusive lock; the kernel frees it even from a killed process."""
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
