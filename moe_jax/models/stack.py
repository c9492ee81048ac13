"""The stack: segments of block patterns whose parameters are stacked and scanned."""

from typing import Any

import jax
from flax import nnx

from moe_jax.models.block import Block
from moe_jax.models.config import ModelConfig, Remat, Segment
from moe_jax.models.depths import DepthAux, DepthBlock, DepthCache
from moe_jax.models.mixers import Cache, Context
from moe_jax.moe.layer import NO_INPUTS, MoEAux, RouterInputs, TokenInfo

# One cache a block of the pattern, each stacked over the repeats; None without a cache.
SegmentCache = tuple[Cache | DepthCache | None, ...] | None

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

    `contexts` holds that of every mixer word; `inputs` has a leading axis of the segment's MoE
    layers.
    """
    graphdef, state = nnx.split(self.blocks)
    keys = None if key is None else jax.random.split(key, self.repeats)
    own = [contexts[word] for word in self.mixers]
    by_repeat = jax.tree.map(lambda a: a.reshape(self.repeats, -1, *a.shape[1:]), inputs)

    def body(x, per_repeat):
      state, cache, inputs, key = per_repeat
      blocks = nnx.merge(graphdef, state)
      return _run_pattern(blocks, x, own, tokens, cache, inputs=inputs, key=key, train=train)

    if self.remat != Remat.NONE:
      body = jax.checkpoint(body, policy=_REMAT_POLICIES[self.remat])
    x, (cache, aux) = jax.lax.scan(body, x, (state, cache, by_repeat, keys), unroll=self.unroll)
    records = [record for i in range(self.repeats) for record in _take(aux, i)]
    return x, cache, records


def _make_block(config: ModelConfig, kind: tuple[str, ...], key: jax.Array) -> Block | DepthBlock:
  return (DepthBlock if kind[2:] else Block)(config, kind, key=key)


def _run_pattern(blocks, x, contexts, tokens, cache, *, inputs, key, train):
  keys = [None] * len(blocks) if key is None else jax.random.split(key, len(blocks))
  caches = (None,) * len(blocks) if cache is None else cache
  new_caches, records, layer = [], [], 0
  for block, context, block_cache, block_key in zip(blocks, contexts, caches, keys, strict=True):
    own = _take(inputs, layer) if block.has_experts else NO_INPUTS
    layer += block.has_experts
    x, new_cache, aux = block(
      x, context, tokens, block_cache, inputs=own, key=block_key, train=train
    )
    new_caches.append(new_cache)
    records.extend([] if aux is None else [aux])
  return x, (None if cache is None else tuple(new_caches), records)


def _take(stacked: Any, i: int) -> Any:
  return jax.tree.map(lambda a: a[i], stacked)


def _name_layer_axis(state: nnx.State) -> nnx.State:
  def named(param):
    return param.replace(axes=("layers", *param.get_metadata()["axes"]))

  return jax.tree.map(named, state, is_leaf=lambda p: isinstance(p, nnx.Variable))
