"""Saving and restoring the place in the training stream, never on other data.

The state of the iterator is a batch number. It means nothing for another data set, seed or batch
size, so it is saved with the identity of its stream and restored only on the same one. The number
of processes is no part of that: the global batches are the same.
"""

import dataclasses
from typing import Any

import grain

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StreamIdentity:
  """What decides the order of the records in a training stream.

  Attributes:
    fingerprint: `PreparedData.fingerprint`.
    batch_size: rows in a global batch.
    seed: the seed of the shuffle.
  """

  fingerprint: str
  batch_size: int
  seed: int


def save_state(iterator: grain.DatasetIterator, identity: StreamIdentity) -> dict[str, Any]:
  """Returns a JSON-serialisable record of where the iterator stands and in which stream."""
  return {"identity": dataclasses.asdict(identity), "iterator": iterator.get_state()}


def check_state(iterator: grain.DatasetIterator, state: Any) -> None:
  """Checks that `state` is a record of `save_state`, of the iterator's stream or of another.

  Raises:
    KeyError, TypeError, ValueError: it is none.
  """
  StreamIdentity(**state["identity"])
  if not _is_like(state["iterator"], iterator.get_state()):
    raise ValueError(f"the iterator's state is {state['iterator']!r}")


def _is_like(saved: Any, own: Any) -> bool:
  """Tells whether a state has the keys of another one, and counts where that has counts."""
  if isinstance(own, dict):
    if not isinstance(saved, dict) or saved.keys() != own.keys():
      return False
    return all(_is_like(saved[key], own[key]) for key in own)
  return type(saved) is type(own) and (type(own) is not int or 0 <= saved < 2**63)


def restore_state(
  iterator: grain.DatasetIterator, state: dict[str, Any], identity: StreamIdentity
) -> None:
  """Moves the iterator to where `state` was saved; the next batch is the one that came next then.

  Args:
    iterator: a new `train_iterator` of the stream `identity` describes.
    state: from `save_state`.
    identity: the stream of `iterator`.

  Raises:
    UserError: the state was saved from another stream; names the first field that differs.
  """
  for name, here in dataclasses.asdict(identity).items():
    saved = state["identity"][name]
    if saved != here:
      raise UserError(
        f"the checkpoint's data stream has {name} {saved!r}, this run has {here!r}; "
        "use the same value, or start in a new workdir."
      )
  iterator.set_state(state["iterator"])
