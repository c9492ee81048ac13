"""Cuts a stream of documents into records of one fixed length, without loss.

A document becomes [bos] + tokens + [eos]; all documents are joined into one stream; the pairs
(token, next token) of the stream are cut into records of L pairs. Every token after the bos of its
document is a target with `loss_mask` 1 exactly once, the eos included; long documents go on in the
next record (without the context of the one before), short ones share a record.

A record is a dict of (L,) int32 arrays:

- `tokens`: the inputs; pad_id on padding.
- `targets`: the next token of the stream; pad_id on padding.
- `segment_ids`: 1, 2, ... for the documents of this record, 0 on padding.
- `positions`: 0, 1, ... within each segment of this record, 0 on padding.
- `loss_mask`: 1 where the target belongs to the document of the input; 0 where the input is an
  eos (the target is then the next document's bos) and on padding.

Only the end of the last record is padded.

On disk a record is what these follow from, in little-endian integers: how many documents begin in
it, the offsets at which they do (32 bits each), and its tokens and last target, in 16 bits each
where the vocabulary allows. Bytes of text so take two bytes each, not twenty.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")

Record = dict[str, np.ndarray]

_NO_STARTS = b"\0\0\0\0"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """The ids that packing adds to the tokens of a document."""

  pad: int
  bos: int
  eos: int


class Piece(NamedTuple):
  """A document, or a stretch of one that is too long to be held in memory.

  Attributes:
    tokens: (any length,) integers, without bos and eos.
    first, last: whether the document begins or ends here.
    image: (channels, rows, columns) uint8 beside the text, for `moe_jax.data.images` alone.
  """

  tokens: np.ndarray
  first: bool = True
  last: bool = True
  image: np.ndarray | None = None


@dataclasses.dataclass
class PackingCounts:
  """What went into the records so far.

  Attributes:
    documents: documents seen.
    records: records made.
    target_tokens: positions with loss_mask 1; equals tokens + documents (each has one eos).
    boundary_positions: positions that hold an eos input, whose target belongs to no document.
    padding_positions: padding at the end of the last record.
  """

  documents: int = 0
  records: int = 0
  target_tokens: int = 0
  boundary_positions: int = 0
  padding_positions: int = 0


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest type on disk that holds every id."""
  return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class Packer:
  """Packs documents into records of `sequence_length` and keeps count.

  Attributes:
    counts: totals over all records made so far.
    room: tokens of text in a record.
    record_bytes: of a record on disk in which no document begins.
  """

  def __init__(
    self, sequence_length: int, special: SpecialIds, dtype: str | np.dtype = "<u4"
  ) -> None:
    self._length, self._special, self._dtype = sequence_length, special, np.dtype(dtype)
    self.counts = PackingCounts()
    self.room, self.record_bytes = sequence_length, (sequence_length + 1) * self._dtype.itemsize
    # The stream from the first input of the next record on, and where documents begin in it.
    self._tokens = np.zeros(0, self._dtype)
    self._starts = np.zeros(0, np.int64)

  def pack(self, documents: Iterable[np.ndarray]) -> Iterator[Record]:
    """Yields the records of whole documents, each (any length,) of integers."""
    for document in documents:
      yield from map(self.unpack, self.add([Piece(document)]))
    yield from map(self.unpack, self.finish())

  def add(self, pieces: Sequence[Piece]) -> list[bytes]:
    """Returns the records that these pieces fill, as they lie on disk."""
    parts, starts, end = [self._tokens], [], len(self._tokens)
    bos, eos = (np.array([i], self._dtype) for i in (self._special.bos, self._special.eos))
    for tokens, first, last, _ in pieces:
      if first:
        starts.append(end)
        parts.append(bos)
      parts.append(tokens)
      if last:
        parts.append(eos)
      end += first + len(tokens) + last
    self.counts.documents += len(starts)
    self._tokens = np.concatenate(parts, dtype=self._dtype, casting="unsafe")
    self._starts = np.concatenate([self._starts, np.array(starts, np.int64)])
    return self._cut_full_records()

  def finish(self) -> list[bytes]:
    """Returns the last record, if tokens are left for one."""
    targets = len(self._tokens) - 1
    if targets < 1:
      return []
    payload = _payload(self._starts, self._tokens.tobytes())
    self._count(1, targets, int(np.count_nonzero(self._starts)))
    self.counts.padding_positions += self._length - targets
    self._tokens, self._starts = self._tokens[:0], self._starts[:0]
    return [payload]

  def unpack(self, payload: bytes) -> Record:
    """Returns the record of what lies on disk."""
    rows = unpack([payload], self._length, self._special.pad, self._dtype)
    return {name: values[0] for name, values in rows.items()}

  def state(self) -> dict[str, Any]:
    """Returns what JSON can hold of a packer between two calls; under L tokens."""
    return {
      "counts": dataclasses.asdict(self.counts),
      "tokens": self._tokens.tolist(),
      "starts": self._starts.tolist(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where `state` was taken."""
    self.counts = PackingCounts(**state["counts"])
    self._tokens = np.array(state["tokens"], self._dtype)
    self._starts = np.array(state["starts"], np.int64)

  def _cut_full_records(self) -> list[bytes]:
    # Record i has inputs i*L .. i*L+L-1 and a last target at (i+1)*L: one token more than L.
    length, width = self._length, self._dtype.itemsize
    full = max(0, (len(self._tokens) - 1) // length)
    if not full:
      return []
    data = self._tokens[: full * length + 1].tobytes()
    firsts = np.arange(full) * length
    lows = np.searchsorted(self._starts, firsts)
    highs = np.searchsorted(self._starts, firsts + length, side="right")
    records = []
    for first, low, high in zip(firsts.tolist(), lows.tolist(), highs.tolist(), strict=True):
      tokens = data[first * width : (first + length + 1) * width]
      records.append(
        _payload(self._starts[low:high] - first, tokens) if high > low else _NO_STARTS + tokens
      )
    end = full * length
    inside = (self._starts > 0) & (self._starts <= end)
    self._count(full, end, int(np.count_nonzero(inside)))
    self._tokens = self._tokens[end:].copy()
    self._starts = self._starts[self._starts >= end] - end
    return records

  def _count(self, records: int, targets: int, boundaries: int) -> None:
    self.counts.records += records
    self.counts.target_tokens += targets - boundaries
    self.counts.boundary_positions += boundaries


def _payload(starts: np.ndarray, tokens: bytes) -> bytes:
  """Joins the offsets at which documents begin and the tokens."""
  return len(starts).to_bytes(4, "little") + starts.astype("<u4").tobytes() + tokens


def unpack(payloads: Sequence[bytes], length: int, pad: int, dtype: np.dtype) -> Record:
  """Returns the rows of what lies on disk, each field (len(payloads), L) int32; see the module.

  Args:
    payloads: from `Packer.add` or `Packer.finish`.
    length: L.
    pad: the id of padding.
    dtype: the type of the tokens on disk.

  Raises:
    ValueError, IndexError: a payload is no record of this length.
  """
  # One array for all, and first what is true of a record that no document begins in: what is done
  # for each row is paid for at every training step.
  values = np.zeros((len(FIELDS), len(payloads), length), np.int32)
  tokens, targets, segment_ids, positions, loss_mask = values
  counting = np.arange(length, dtype=np.int32)
  segment_ids[:], positions[:], loss_mask[:] = 1, counting, 1
  for row, payload in enumerate(payloads):
    count = int.from_bytes(payload[:4], "little")
    stream = np.frombuffer(payload, dtype, offset=4 + 4 * count)
    inputs = len(stream) - 1
    tokens[row, :inputs] = stream[:-1]
    targets[row, :inputs] = stream[1:]
    for start in np.frombuffer(payload, "<u4", count, 4).tolist() if count else ():
      if start:
        loss_mask[row, start - 1] = 0
        segment_ids[row, start:] += 1
        positions[row, start:] = counting[: length - start]
    if inputs < length:
      values[:2, row, inputs:] = pad
      values[2:, row, inputs:] = 0
  return dict(zip(FIELDS, values, strict=True))
