"""What the attention layers of one kind share in a call: positions, made into tables and masks."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.layers.rotary import RotaryTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
  """Where the L tokens of a call are among the M keys they may look at.

  Attributes:
    query_slots: (L,) int32, the queries' places among the keys.
    query_positions, key_positions: (B, L) and (B, M) int32, counted in real tokens.
    key_mask: (B, M) bool, True = real token.
    segment_ids: (B, L) int32 of packed documents, without a cache; None = one document a row.
    cache_index: int32 scalar, the cache slot of the first token; None without a cache, M = L.
    causal: a token sees none after it; an encoder's tokens see all.
  """

  query_slots: jax.Array
  query_positions: jax.Array
  key_positions: jax.Array
  key_mask: jax.Array
  segment_ids: jax.Array | None = None
  cache_index: jax.Array | None = None
  causal: bool = dataclasses.field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What every attention layer of one kind shares; made once a call.

  Attributes:
    rotary: cosines and sines of the tokens' positions, see `rotary_table`; None without rotation.
    mask: (B, L, M) bool, True = query l may look at slot m; M = L without a cache. Every query
      looks at one slot at least, but may find none in an encoder's output.
    cache_index: int32 scalar, the cache slot of the first token; None without a cache.
    query_scale: (B, L) float32, what queries are multiplied by; None = 1.
    buckets: (B, L, M) int32, see `relative_buckets`; None without a relative bias.
    bias: (H, B, L, M) float32, a relative bias that all layers share; None without.
    source: (B, M, D), what keys and values are made of where that is not what queries are made of:
      an encoder's output; None for self-attention, and where a cache holds them.
  """

  rotary: RotaryTable | None
  mask: jax.Array
  cache_index: jax.Array | None = None
  query_scale: jax.Array | None = None
  buckets: jax.Array | None = None
  bias: jax.Array | None = None
  source: jax.Array | None = None


def attention_mask(
  places: Places, *, window: int | None = None, chunk: int | None = None
) -> jax.Array:
  """Returns (B, L, M): a token sees the real tokens at or before it, within window and chunk.

  An encoder's tokens, which have neither, see the real ones after them too. A padding query sees
  itself, so that its (unused) softmax is defined.

  Args:
    places: of queries and keys; attention stays inside a segment.
    window, chunk: see `AttentionConfig`; both are measured in positions.
  """
  queries, keys = places.query_positions[:, :, None], places.key_positions[:, None, :]
  slots = jnp.arange(places.key_mask.shape[1])[None]
  mask = jnp.broadcast_to(places.key_mask[:, None, :], queries.shape[:2] + keys.shape[2:])
  if places.causal:
    mask &= (slots <= places.query_slots[:, None])[None]
  if window is not None:
    mask &= queries - keys < window
  if chunk is not None:
    mask &= queries // chunk == keys // chunk
  mask |= (slots == places.query_slots[:, None])[None]
  if places.segment_ids is not None:
    mask &= places.segment_ids[:, :, None] == places.segment_ids[:, None, :]
  return mask
