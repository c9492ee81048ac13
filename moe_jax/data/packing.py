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
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")

Record = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """The ids that packing adds to the tokens of a document."""

  pad: int
  bos: int
  eos: int


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


class Packer:
  """Packs documents into records of `sequence_length` and keeps count.

  Attributes:
    counts: totals over all records yielded so far.
  """

  def __init__(self, sequence_length: int, special: SpecialIds):
    self._length = sequence_length
    self._special = special
    self.counts = PackingCounts()

  def pack(self, documents: Iterable[np.ndarray]) -> Iterator[Record]:
    """Yields the records of token arrays, each (any length,) of integers, without bos and eos.

    Holds one document and one record in memory.
    """
    rest_tokens, rest_owners = np.zeros(0, np.int32), np.zeros(0, np.int64)
    for owner, document in enumerate(documents):
      self.counts.documents += 1
      framed = np.concatenate([[self._special.bos], document, [self._special.eos]])
      tokens = np.concatenate([rest_tokens, framed.astype(np.int32)])
      owners = np.concatenate([rest_owners, np.full(len(framed), owner)])
      # Record i has inputs i*L .. i*L+L-1 and a last target at (i+1)*L: one token more than L.
      full = max(0, (len(tokens) - 1) // self._length)
      for start in range(0, full * self._length, self._length):
        piece = slice(start, start + self._length + 1)
        yield self._record(tokens[piece], owners[piece])
      rest_tokens, rest_owners = tokens[full * self._length :], owners[full * self._length :]
    if len(rest_tokens) > 1:
      yield self._record(rest_tokens, rest_owners)

  def _record(self, tokens: np.ndarray, owners: np.ndarray) -> Record:
    """Makes a record of up to L + 1 tokens of the stream and the documents that own them."""
    inputs, input_owners = tokens[:-1], owners[:-1]
    same_document = input_owners == owners[1:]
    starts = np.flatnonzero(np.diff(input_owners, prepend=-1))
    lengths = np.diff(starts, append=len(inputs))
    record = {
      "tokens": self._pad(inputs, self._special.pad),
      "targets": self._pad(tokens[1:], self._special.pad),
      "segment_ids": self._pad(input_owners - input_owners[0] + 1),
      "positions": self._pad(np.arange(len(inputs)) - np.repeat(starts, lengths)),
      "loss_mask": self._pad(same_document),
    }
    self.counts.records += 1
    self.counts.target_tokens += int(same_document.sum())
    self.counts.boundary_positions += int((~same_document).sum())
    self.counts.padding_positions += self._length - len(inputs)
    return record

  def _pad(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
    """Returns the values as (L,) int32, filled up at the end."""
    padded = np.full(self._length, fill, np.int32)
    padded[: len(values)] = values
    return padded
