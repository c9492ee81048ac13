"""The stack: segments of block patterns whose parameters are stacked and scanned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attention import KVCache, relative_bias_table
from moe_jax.layers.attention_context import AttentionContext, Places
from moe_jax.layers.norms import make_norm
from moe_jax.models.block import Block, CrossCache
from moe_jax.models.config import DEPTH, ModelConfig, NormPlacement, Remat, Segment
from moe_jax.models.depths import DepthAux, DepthBlock, DepthCache
from moe_jax.models.mixers import Cache, Context, empty_cache, mixer_contexts
from moe_jax.moe.layer import NO_INPUTS, MoEAux, RouterInputs, TokenInfo
from moe_jax.sharding.context import constrain, current_layout
from moe_jax.sharding.local import in_dtype
from moe_jax.sharding.pipeline import num_stages, through_stages

# The key of `contexts` under which attention to an encoder's output has its own.
CROSS = "cross"

# One cache a block of the pattern, each stacked over the repeats; None without a cache.
SegmentCache = tuple[Cache | DepthCache | CrossCache | None, ...] | None

# What a block tells of its experts, or of the tokens that took it.
Record = MoEAux | DepthAux

_REMAT_POLICIES = {
  Remat.FULL: None,
  Remat.DOTS: jax.checkpoint_policies.dots_saveable,
}


class ScannedSegment(nnx.Module):
  """The blocks of one pattern; every parameter has a leading axis "layers" of size repeats.

  A scan keeps compile time and program size those of one pattern, whatever the depth.
  """

  def __init__(self, config: ModelConfig, segment: Segment, *, key: jax.Array):
    self.remat, self.unroll = config.remat, config.scan_unroll
    self.mixers = tuple(kind[0] for kind in segment.pattern)

    def pattern(key):
      keys = jax.random.split(key, len(segment.pattern))
      return nnx.List(
        [_make_block(config, kind, k) for kind, k in zip(segment.pattern, keys, strict=True)]
      )

    # Each repeat draws its own parameters.
    graphdef, _ = nnx.split(nnx.eval_shape(pattern, key))
    state = jax.vmap(lambda key: nnx.split(pattern(key))[1])(jax.random.split(key, segment.repeats))
    self.blocks = nnx.merge(graphdef, _name_layer_axis(state))
    self.repeats = segment.repeats
    self.num_moe_layers = segment.repeats * sum(block.has_experts for block in self.blocks)

  def __call__(
    self,
    x: jax.Array,
    contexts: dict[str, Context],
    tokens: TokenInfo,
    cache: SegmentCache,
    *,
    inputs: RouterInputs = NO_INPUTS,
    key: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, SegmentCache, list[Record]]:
    """Runs the segment; returns x, the new cache and a record a MoE or depth block, in order.

    `contexts` holds that of every mixer word, and under `CROSS` that of an encoder's output;
    `inputs` has a leading axis of the segment's MoE layers.
    """
    graphdef, state = nnx.split(self.blocks)
    keys = None if key is None else jax.random.split(key, self.repeats)
    by_repeat = jax.tree.map(lambda a: a.reshape(self.repeats, -1, *a.shape[1:]), inputs)
    own = [contexts[word] for word in self.mixers], contexts.get(CROSS), tokens
    layout, of_layers = current_layout(), (cache, by_repeat, keys)

    def run(state, x, of_layers, own):
      def body(x, per_repeat):
        state, (cache, inputs, key) = per_repeat
        x = constrain(x, ("batch", "length", None))
        blocks = nnx.merge(graphdef, in_dtype(state, x.dtype))
        return _run_pattern(blocks, x, *own, cache, inputs=inputs, key=key, train=train)

      if self.remat != Remat.NONE:
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[self.remat])
      return jax.lax.scan(body, x, (state, of_layers), unroll=self.unroll)

    if num_stages(layout) == 1:
      x, (new, aux) = run(state, x, of_layers, own)
    else:
      x, (new, aux) = through_stages(run, layout, state, x, of_layers, own)
    records = [record for i in range(self.repeats) for record in _take(aux, i)]
    return x, _with_encoded(cache, new), records


class Stack(nnx.Module):
  """Segments one after another, and the norm of what the last one gives.

  Attributes:
    segments: `ScannedSegment` each.
    final_norm: of the residual stream, if that is not normalised already; see `finish`.
    relative_bias: (buckets, H), the table that all layers share with `relative_bias_shared`.
  """

  def __init__(self, config: ModelConfig, *, key: jax.Array):
    self.config = config
    segments = config.parsed_segments()
    keys = jax.random.split(key, len(segments))
    self.segments = nnx.List(
      [ScannedSegment(config, s, key=k) for s, k in zip(segments, keys, strict=True)]
    )
    if config.norm_placement == NormPlacement.PRE:
      self.final_norm = make_norm(config.norm, config.model_dim, config.norm_epsilon)
    if config.attention and config.attention.relative_bias_shared:
      self.relative_bias = relative_bias_table(config.attention)

  def finish(self, x: jax.Array) -> jax.Array:
    """Returns the residual stream (B, L, D) as heads and decoders read it."""
    return self.final_norm(x) if hasattr(self, "final_norm") else x

  def empty_caches(self, batch_size: int, num_slots: int) -> list[SegmentCache]:
    """Returns caches of all blocks for `num_slots` tokens a row."""

    def empty(repeats, block):
      slots = (repeats, batch_size, num_slots)
      cache = empty_cache(self.config, block[0], slots)
      return DepthCache(cache, jnp.zeros(slots, bool)) if DEPTH in block else cache

    return [
      tuple(empty(s.repeats, block) for block in s.pattern) for s in self.config.parsed_segments()
    ]

  def with_encoded(
    self, caches: list[SegmentCache], encoded: jax.Array, context: AttentionContext
  ) -> list[SegmentCache]:
    """Returns the caches with every block's keys and values of an encoder's output (B, M, D)."""
    return [
      tuple(
        CrossCache(cache, _cross_keys_values(block, encoded, context))
        for cache, block in zip(caches_of_segment, segment.blocks, strict=True)
      )
      for caches_of_segment, segment in zip(caches, self.segments, strict=True)
    ]

  def contexts(self, places: Places) -> dict[str, Context]:
    """Returns what the layers of a call share, by the word of their mixer."""
    contexts = mixer_contexts(self.config, places)
    if hasattr(self, "relative_bias"):
      own = contexts["attention"]
      bias = self.relative_bias[...].T[:, own.buckets]
      contexts["attention"] = dataclasses.replace(own, buckets=None, bias=bias)
    return contexts

  def run(
    self,
    x: jax.Array,
    contexts: dict[str, Context],
    tokens: TokenInfo,
    caches: list[SegmentCache] | None,
    *,
    inputs: RouterInputs = NO_INPUTS,
    keys: list[jax.Array | None],
    train: bool,
  ) -> tuple[jax.Array, list[SegmentCache], list[Record]]:
    """Maps x (B, L, D) to x before the norm, the new caches and the blocks' records, in order.

    `keys` has one a segment; `contexts` is what `contexts` returned.
    """
    caches = [None] * len(self.segments) if caches is None else caches
    new_caches, records, layer = [], [], 0
    for segment, cache, segment_key in zip(self.segments, caches, keys, strict=True):
      mine = slice(layer, layer := layer + segment.num_moe_layers)
      own = jax.tree.map(lambda a, mine=mine: a[mine], inputs)
      x, cache, aux = segment(x, contexts, tokens, cache, inputs=own, key=segment_key, train=train)
      new_caches.append(cache)
      records.extend(aux)
    return x, new_caches, records


def _make_block(config: ModelConfig, kind: tuple[str, ...], key: jax.Array) -> Block | DepthBlock:
  return (DepthBlock if kind[2:] else Block)(config, kind, key=key)


def _cross_keys_values(block: Block, encoded, context) -> KVCache:
  """Returns what the attention of stacked blocks reads, with a leading axis of repeats."""
  graph, state = nnx.split(block.cross_attention)
  return jax.vmap(lambda one: nnx.merge(graph, one).keys_values(encoded, context))(state)


def _run_pattern(blocks, x, contexts, encoded, tokens, cache, *, inputs, key, train):
  more = {} if encoded is None else {"encoded": encoded}
  keys = [None] * len(blocks) if key is None else jax.random.split(key, len(blocks))
  caches = (None,) * len(blocks) if cache is None else cache
  new_caches, records, layer = [], [], 0
  for block, context, block_cache, block_key in zip(blocks, contexts, caches, keys, strict=True):
    own = _take(inputs, layer) if block.has_experts else NO_INPUTS
    layer += block.has_experts
    x, new_cache, aux = block(
      x, context, tokens, block_cache, inputs=own, key=block_key, train=train, **more
    )
    new_caches.append(new_cache)
    records.extend([] if aux is None else [aux])
  return x, (None if cache is None else tuple(new_caches), records)


def _with_encoded(old: SegmentCache, new: SegmentCache) -> SegmentCache:
  """Puts back what blocks only read, which a scan would copy."""
  if old is None:
    return new
  return tuple(
    dataclasses.replace(before, mixer=after) if isinstance(before, CrossCache) else after
    for before, after in zip(old, new, strict=True)
  )


def _take(stacked: Any, i: int) -> Any:
  return jax.tree.map(lambda a: a[i], stacked)


def _name_layer_axis(state: nnx.State) -> nnx.State:
  def named(param):
    return param.replace(axes=("layers", *param.get_metadata()["axes"]))

  return jax.tree.map(named, state, is_leaf=lambda p: isinstance(p, nnx.Variable))
