"""What the Mamba layers of a call share: for every token, which tokens come before it in its row.

A row is read as if its padding were not there: padding writes nothing, is in no window of the
convolution, and leaves state and window as they are. The one exception is the original's: padding
in front of a row's first token enters the convolution, as what the projection makes of zeros. That
is its bias, and nothing without `proj_bias`. A packed document starts anew.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.layers.attention_context import Places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaContext:
  """The order of the L tokens of a call behind the W - 1 of a window, W the convolution's width.

  Attributes:
    mask: (B, L) bool, True = real token.
    starts: (B, L) bool, True = the first token of a packed document.
    sources: (B, L, W - 1) int32, where the token 1, 2, ... before is among window and call.
    same: (B, L, W - 1) bool, True = that token is of the same document.
    adjacent: bool scalar, True = every source of a real token is that many places before it.
    last: (B, W - 1) int32, the last W - 1 tokens among window and call: the next call's window.
  """

  mask: jax.Array
  starts: jax.Array
  sources: jax.Array
  same: jax.Array
  adjacent: jax.Array
  last: jax.Array


def mamba_context(places: Places, conv_width: int) -> MambaContext:
  """Returns the context of convolutions that read `conv_width` tokens."""
  mask = places.key_mask[:, places.query_slots]
  begun = (jnp.cumsum(places.key_mask, axis=1) > 0)[:, places.query_slots]
  present, W = mask | ~begun, conv_width
  B, L = mask.shape
  # The order of window and present tokens, and what is not there behind them.
  order = jnp.argsort(~present, axis=1, stable=True) + W - 1
  window = jnp.broadcast_to(jnp.arange(W - 1), (B, W - 1))
  order = jnp.concatenate([window, order], axis=1).astype(jnp.int32)
  rank = jnp.cumsum(present, axis=1) + W - 2
  back = jnp.arange(1, W)

  def at(a, index):
    flat = jnp.take_along_axis(a, index.reshape(B, -1), axis=1, mode="clip")
    return flat.reshape(index.shape)

  sources = at(order, rank[:, :, None] - back[None, None])
  starts, same = _documents(places.segment_ids, present, order, rank, sources)
  plain = jnp.arange(L)[:, None] + W - 1 - back[None]
  adjacent = jnp.all((sources == plain[None]) | ~mask[:, :, None])
  last = at(order, jnp.sum(present, axis=1, keepdims=True) + jnp.arange(W - 1)[None])
  return MambaContext(mask, starts, sources, same, adjacent, last)


def _documents(segment_ids, present, order, rank, sources):
  """Returns `starts` and `same` of a context."""
  B, L = present.shape
  if segment_ids is None:
    return jnp.zeros((B, L), bool), jnp.ones(sources.shape, bool)
  W = order.shape[1] - L + 1
  ordered = jnp.take_along_axis(segment_ids, order[:, W - 1 :] - (W - 1), axis=1)
  changes = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)), constant_values=False)
  starts = jnp.take_along_axis(changes, rank - (W - 1), axis=1, mode="clip") & present
  # Nothing was before the first token of the call: its window is zeros, whosever they are.
  document = jnp.cumsum(starts, axis=1)
  before = jnp.pad(document, ((0, 0), (W - 1, 0)))
  sources = jnp.take_along_axis(before, sources.reshape(B, -1), axis=1).reshape(sources.shape)
  return starts, sources == document[:, :, None]
