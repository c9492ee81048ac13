"""Documents to shards, once: reads, repairs, tokenises, packs, in memory that does not grow.

Work is saved a segment at a time. A segment is one shard of each split that got records in it, and
a line of the journal: the shards, where reading stands, and what the packers hold. A process that
was killed anywhere is continued from the last segment whose shards are sound, and what comes out
is what an undisturbed one writes, byte for byte.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config.schema import dataclass_from, to_mapping
from moe_jax.data.documents import Source
from moe_jax.data.formats import Stretch
from moe_jax.data.images import ImageConfig, ImagePacker, fit_image
from moe_jax.data.manifest import Manifest, Met, SplitFacts, StoredFile
from moe_jax.data.packing import Packer, Piece, SpecialIds, token_dtype
from moe_jax.data.shards import ShardWriter
from moe_jax.data.splits import HELDOUT_BYTES, HELDOUT_EVERY, Split, split_of
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

JOURNAL_FILE = "journal.jsonl"
# Text tokenised at once, and the size of a shard: what a kill can cost, in memory and in work.
_BATCH_BYTES = 4 << 20
_BATCH_STRETCHES = 4096
_SHARD_BYTES = 128 << 20
# Of the text itself so much of each split is kept, for what compares models with compressors.
_TEXT_BYTES = 16 << 20


@dataclasses.dataclass
class Place:
  """Where reading stands.

  Attributes:
    stream, stretch: the next stretch to read.
    index: number of the document that it begins or goes on with, empty ones not counted.
    open_split: the split of a document that is not at its end; empty between documents.
    open_tokens: of that document so far.
    segment: number of the segment.
  """

  stream: int = 0
  stretch: int = 0
  index: int = 0
  open_split: str = ""
  open_tokens: int = 0
  segment: int = 0


class Ingest:
  """Writes the shards of one source into one folder, which no other process writes to."""

  def __init__(
    self,
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    sequence_length: int,
    image: ImageConfig | None = None,
  ):
    self._folder, self._source, self._tokenizer = folder, source, tokenizer
    self._length, self._image = sequence_length, image
    self._dtype = token_dtype(tokenizer.vocab_size)
    self._packers = {split: self._make_packer() for split in Split}
    self._text_bytes = dict.fromkeys(Split, 0)
    self._place, self._met = Place(), Met(ignored_files=source.ignored)
    self._shards: list[StoredFile] = []
    self._kept: dict[str, int] = dict.fromkeys(Split, 0)  # bytes of text that outlast a kill
    self._writers: dict[Split, ShardWriter] = {}

  def run(self, update: Callable[[int, int], None]) -> Manifest:
    """Reads to the end, from where a process before this one came to.

    Args:
      update: called with how much of the source's size is read, and the bytes of text that were
        taken in by this process.

    Returns:
      What was written; the manifest itself is not.

    Raises:
      UserError: the source cannot be read, or has no text for one of the splits.
      OSError: the folder cannot be written.
    """
    self._resume()
    already = self._met.bytes
    with contextlib.ExitStack() as stack:
      self._texts = {s: stack.enter_context(self._text_path(s).open("ab")) for s in Split}
      for batch, done in self._batches():
        self._pack(batch)
        update(done, self._met.bytes - already)
        if sum(writer.size for writer in self._writers.values()) >= _SHARD_BYTES:
          self._end_segment()
      for split in Split:
        self._write(split, self._packers[split].finish())
      self._check_splits()
      self._end_segment()
    return self._manifest()

  def _batches(self) -> Iterator[tuple[list[tuple[Stretch, Split]], int]]:
    """Yields stretches to tokenise together, and how much of the source is read after them."""
    place, batch, size = self._place, [], 0
    while place.stream < self._source.streams:
      offset = self._source.offset(place.stream)
      for stretch in self._source.stretches(place.stream, place.stretch):
        split = self._split_of(stretch)
        place.stretch += 1
        if split is None:
          break
        stretch = self._repaired(stretch)
        if not stretch.text and stretch.first and stretch.last:
          self._met.empty_documents += 1
          place.open_split = ""
          continue
        place.open_split = "" if stretch.last else split
        place.index += stretch.last
        self._text_bytes[split] += len(stretch.text)
        size += len(stretch.text)
        if self._image is not None:
          stretch = stretch._replace(image=fit_image(stretch.image, self._image))
          size += stretch.image.nbytes
        batch.append((stretch, split))
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_STRETCHES:
          yield batch, offset + stretch.offset
          batch, size = [], 0
      place.stream, place.stretch = place.stream + 1, 0
    yield batch, self._source.size

  def _split_of(self, stretch: Stretch) -> Split | None:
    """Returns where a stretch belongs; None at the end of what is held out of a stream."""
    place, streams = self._place, self._source.heldout_streams
    if place.open_split:
      return Split(place.open_split)
    full = self._text_bytes[Split.HELDOUT] >= HELDOUT_BYTES
    if place.stream < streams:
      return None if full else Split.HELDOUT
    if streams or full:
      return Split.TRAIN
    return split_of(place.index)

  def _repaired(self, stretch: Stretch) -> Stretch:
    """Counts what is met in a stretch, and replaces what is no UTF-8."""
    text = stretch.text
    if not text.isascii():
      try:
        text.decode()
      except UnicodeDecodeError:
        self._met.repaired_documents += 1
        text = text.decode(errors="replace").encode()
        stretch = stretch._replace(text=text)
    self._met.bytes += len(text)
    self._met.nul_bytes += text.count(0)
    return stretch

  def _pack(self, batch: list[tuple[Stretch, Split]]) -> None:
    """Tokenises a batch and writes the records that it fills."""
    tokens = self._tokenizer.encode_batch([stretch.text for stretch, _ in batch])
    pieces: dict[Split, list[Piece]] = {split: [] for split in Split}
    for (stretch, split), ids in zip(batch, tokens, strict=True):
      if self._image is not None:
        stretch = self._cut(stretch, split, ids)
      pieces[split].append(Piece(ids, stretch.first, stretch.last, stretch.image))
      self._keep_text(split, stretch)
      self._place.open_tokens = len(ids) + (0 if stretch.first else self._place.open_tokens)
      if stretch.last:
        self._met.documents += 1
        self._met.longer_than_context += self._place.open_tokens > self._packers[split].room
    for split, some in pieces.items():
      if some:
        self._write(split, self._packers[split].add(some))

  def _cut(self, stretch: Stretch, split: Split, ids: np.ndarray) -> Stretch:
    """Leaves out of the text beside an image, and of its bytes, what no record holds."""
    kept = self._packers[split].room + 1  # The last one is a target alone.
    if len(ids) <= kept:
      return stretch
    text = self._tokenizer.decode(ids[:kept]).encode()
    self._text_bytes[split] += len(text) - len(stretch.text)
    return stretch._replace(text=text)

  def _keep_text(self, split: Split, stretch: Stretch) -> None:
    file = self._texts[split]
    room = _TEXT_BYTES - file.tell()
    if room > 0:
      joint = b"\n" if stretch.first and file.tell() else b""
      file.write((joint + stretch.text)[:room])

  def _write(self, split: Split, records: list[bytes]) -> None:
    if not records:
      return
    if split not in self._writers:
      path = self._folder / f"{split}-{self._place.segment:05d}.array_record"
      self._writers[split] = ShardWriter(path, self._packers[split].record_bytes)
    self._writers[split].write(records)

  def _end_segment(self) -> None:
    """Completes the open shards, and notes in the journal that they are."""
    shards = [writer.close(split) for split, writer in self._writers.items()]
    self._writers = {}
    self._shards += shards
    self._place.segment += 1
    for file in self._texts.values():
      file.flush()
      os.fsync(file.fileno())
    line = {
      "shards": [to_mapping(shard) for shard in shards],
      "place": to_mapping(self._place),
      "met": to_mapping(self._met),
      "text_bytes": self._text_bytes,
      "kept": {split: file.tell() for split, file in self._texts.items()},
      "packers": {split: packer.state() for split, packer in self._packers.items()},
    }
    with (self._folder / JOURNAL_FILE).open("a") as journal:
      journal.write(_signed(json.dumps(line)))
      journal.flush()
      os.fsync(journal.fileno())

  def _resume(self) -> None:
    """Takes over the sound segments that are there, and removes everything else."""
    kept = []
    for line in _journal(self._folder / JOURNAL_FILE):
      shards = [dataclass_from(StoredFile, shard) for shard in line["shards"]]
      if not self._has_texts(line) or not all(shard.is_sound(self._folder) for shard in shards):
        break
      self._set(line)
      self._shards += shards
      kept.append(_signed(json.dumps(line)))
    for split in Split:
      with self._text_path(split).open("ab") as file:
        file.truncate(self._kept[split])
    _remove_others(self._folder, {file.name for file in self._shards})
    (self._folder / JOURNAL_FILE).write_text("".join(kept))

  def _has_texts(self, line: dict[str, Any]) -> bool:
    """Tells whether the text that was kept up to the end of a segment is there."""
    paths = {self._text_path(split): line["kept"][split] for split in Split}
    return all(path.is_file() and path.stat().st_size >= size for path, size in paths.items())

  def _set(self, line: dict[str, Any]) -> None:
    """Moves to the end of a segment."""
    self._kept = line["kept"]
    self._place = dataclass_from(Place, line["place"])
    self._met = dataclass_from(Met, line["met"])
    self._text_bytes = {split: line["text_bytes"][split] for split in Split}
    for split in Split:
      self._packers[split].set_state(line["packers"][split])

  def _check_splits(self) -> None:
    """Refuses a source that leaves a split without records."""
    name, documents = self._source.config.name, self._met.documents
    if not self._source.heldout_streams and documents < HELDOUT_EVERY:
      raise UserError(
        f"source {name!r} has {documents} documents with text; at least {HELDOUT_EVERY} are needed,"
        f" as every {HELDOUT_EVERY}th is held out: add documents, or where they are the lines of"
        f" .txt files, write {name},documents=line."
      )
    for split in Split:
      if not self._packers[split].counts.records:
        raise UserError(
          f"source {name!r} has no text to {'hold out' if split == Split.HELDOUT else 'train on'};"
          " give another split, or more documents."
        )

  def _manifest(self) -> Manifest:
    facts = {
      split.value: SplitFacts(self._packers[split].counts, self._text_bytes[split])
      for split in Split
    }
    return Manifest(
      source=self._source.config.name,
      source_digest=self._source.digest,
      tokenizer_digest=self._tokenizer.digest,
      sequence_length=self._length,
      pad_id=self._tokenizer.pad_id,
      token_type=self._dtype.str,
      shards=tuple(self._shards),
      texts=tuple(StoredFile.of(self._text_path(split), split, 0) for split in Split),
      met=self._met,
      image=self._image,
      **facts,
    )

  def _make_packer(self) -> Packer | ImagePacker:
    ids = self._tokenizer
    special = SpecialIds(ids.pad_id, ids.bos_id, ids.eos_id)
    if self._image is None:
      return Packer(self._length, special, self._dtype)
    return ImagePacker(self._length, special, self._dtype, self._image)

  def _text_path(self, split: Split) -> Path:
    return self._folder / f"{split}.txt"


def _signed(line: str) -> str:
  """Returns a line of the journal: its checksum and itself."""
  return f"{hashlib.sha256(line.encode()).hexdigest()} {line}\n"


def _journal(path: Path) -> Iterator[dict[str, Any]]:
  """Yields the lines of the journal up to one that a kill cut short."""
  if not path.exists():
    return
  for signed in path.read_text(errors="replace").splitlines(keepends=True):
    line = signed.partition(" ")[2].removesuffix("\n")
    if signed != _signed(line):
      return
    yield json.loads(line)


def _remove_others(folder: Path, keep: set[str]) -> None:
  """Removes the shards that no line of the journal names."""
  for path in folder.glob("*.array_record*"):
    if path.name not in keep:
      path.unlink()
