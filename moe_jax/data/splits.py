"""The rule that holds documents out of training."""

import enum

HELDOUT_EVERY = 16
# Enough to tell models apart, and little enough to be read whole at every evaluation.
HELDOUT_BYTES = 4 << 20


class Split(enum.StrEnum):
  """The two halves of a corpus; the values are the names of the TFDS splits."""

  TRAIN = "train"
  HELDOUT = "heldout"


def split_of(index: int) -> Split:
  """Returns the split of the document at `index` (from 0) in its corpus.

  Every 16th document is held out: the 16th, the 32nd, and so on. Whole documents, so that no
  sentence is on both sides, and spread evenly, so that a corpus sorted by date is tested on all
  its eras. A corpus of fewer than 16 documents has nothing to hold out. Once HELDOUT_BYTES of text
  are held out, all that follow are for training.
  """
  return Split.HELDOUT if index % HELDOUT_EVERY == HELDOUT_EVERY - 1 else Split.TRAIN
