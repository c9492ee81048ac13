"""Mixture-of-Depths: a block that a token takes or passes by (arXiv 2404.02258).

The block's own router scores the tokens of a row. In training it takes the C best of them, expert
choice over tokens, which is not causal: a token's place depends on the tokens after it. Outside
training, batched or with a cache, each token decides alone by the sign of its logit, for which a
binary cross-entropy against the choice of training prepares the router.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.layers.attention_context import AttentionContext
from moe_jax.layers.parameters import parameter
from moe_jax.models.block import Block
from moe_jax.models.config import ModelConfig
from moe_jax.models.depth_config import DepthScore
from moe_jax.models.mixers import Cache
from moe_jax.moe.layer import NO_INPUTS, MoEAux, RouterInputs, TokenInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthCache:
  """What the mixer keeps of all tokens, and which of them the block took: (B, M) bool."""

  mixer: Cache
  taken: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthAux:
  """What a depth block decided.

  Attributes:
    logits: (B, L) float32, the block router's.
    taken: (B, L) bool, the tokens that the block processed.
    loss: float32 scalar, the mean over real tokens of the binary cross-entropy of the logits
      against membership in the C best of the row, without coefficient.
    metrics: `taken_fraction` of real tokens, and `agreement`, the fraction of them whose causal
      choice is that of training.
    moe: the record of the block's experts, of the C tokens alone in training; None without.
  """

  logits: jax.Array
  taken: jax.Array
  loss: jax.Array
  metrics: dict[str, jax.Array]
  moe: MoEAux | None


class DepthBlock(nnx.Module):
  """x + score * (block(x) - x) for the tokens that the block takes, x for the others.

  Attention is among the taken tokens, at their own positions. Training computes C tokens of a row;
  outside it the number is not known ahead, so all are computed and the others' results dropped.
  """

  def __init__(self, config: ModelConfig, kind: tuple[str, ...], *, key: jax.Array):
    block_key, router_key = jax.random.split(key)
    self.config = config.depth
    self.block = Block(config, kind, key=block_key)
    D = config.model_dim
    self.router = parameter(router_key, (D,), ("embed",), fan_in=D, scale=config.init_scale)

  @property
  def has_experts(self) -> bool:
    """Whether the block's feed-forward is a MoE layer."""
    return self.block.has_experts

  def __call__(
    self,
    x: jax.Array,
    context: AttentionContext,
    tokens: TokenInfo,
    cache: DepthCache | None,
    *,
    inputs: RouterInputs = NO_INPUTS,
    key: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, DepthCache | None, DepthAux]:
    """Maps x (B, L, D) to x, the new cache and the record; see `Block`."""
    # Float32 as every router: rounded logits would change who is taken.
    logits_BL = jnp.matmul(
      x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST
    )
    index_BC, among_BC = best_tokens(logits_BL, tokens.mask, self.config.slots(x.shape[1]))
    best_BL = _scatter(jnp.zeros_like(tokens.mask), index_BC, among_BC)
    weight_BL = jax.nn.sigmoid(logits_BL) if self.config.score == DepthScore.SIGMOID else logits_BL
    if train:
      taken_BL = best_BL
      x, moe = self._run_best(x, weight_BL, index_BC, among_BC, context, tokens, inputs, key)
    else:
      taken_BL = (logits_BL > 0) & tokens.mask
      x, cache, moe = self._run_all(x, weight_BL, taken_BL, context, tokens, cache, inputs)
    loss, metrics = _summaries(logits_BL, best_BL, taken_BL, tokens.mask)
    return x, cache, DepthAux(logits_BL, taken_BL, loss, metrics, moe)

  def _run_best(self, x, weight_BL, index_BC, among_BC, context, tokens, inputs, key):
    """Runs the block on the tokens at `index` alone."""
    info = jax.tree.map(lambda a: _gather(a, index_BC), tokens)
    info = dataclasses.replace(info, mask=among_BC)
    if inputs.expert_ids is not None:
      inputs = dataclasses.replace(inputs, expert_ids=_gather(inputs.expert_ids, index_BC))
    context = _among(context, index_BC)
    first, second, _, moe = self.block.branches(
      _gather(x, index_BC), context, info, None, inputs=inputs, key=key, train=True
    )
    change = _scaled(first + second, _gather(weight_BL, index_BC), among_BC)
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, index_BC].add(change, unique_indices=True), moe

  def _run_all(self, x, weight_BL, taken_BL, context, tokens, cache, inputs):
    """Runs the block on every token, with the taken ones as keys, and keeps the taken."""
    keys_BM, start = taken_BL, 0
    if cache is not None:
      start = context.cache_index
      keys_BM = jax.lax.dynamic_update_slice_in_dim(cache.taken, taken_BL, start, axis=1)
    # Each query sees itself, so that the softmax of a token that is not taken is defined.
    itself_LM = jnp.arange(keys_BM.shape[1])[None] == start + jnp.arange(x.shape[1])[:, None]
    visible = context.mask & (keys_BM[:, None, :] | itself_LM[None])
    first, second, mixer_cache, moe = self.block.branches(
      x,
      dataclasses.replace(context, mask=visible),
      dataclasses.replace(tokens, mask=taken_BL),
      None if cache is None else cache.mixer,
      inputs=inputs,
      key=None,
      train=False,
    )
    cache = None if cache is None else DepthCache(mixer_cache, keys_BM)
    return x + _scaled(first + second, weight_BL, taken_BL), cache, moe


def best_tokens(
  logits_BL: jax.Array, mask_BL: jax.Array, slots: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the places (B, C) of each row's best tokens, in order, and which are real, (B, C) bool.

  Padding is taken only where a row has too few real tokens; ties go to the earlier token.
  """
  ranked_BL = jnp.where(mask_BL, jax.lax.stop_gradient(logits_BL), -jnp.inf)
  index_BC = jnp.sort(jax.lax.top_k(ranked_BL, slots)[1], axis=1)
  return index_BC, _gather(mask_BL, index_BC)


def _summaries(logits_BL, best_BL, taken_BL, mask_BL):
  """Returns the loss and the metrics of `DepthAux`."""
  real = jnp.maximum(jnp.sum(mask_BL), 1)
  # Whatever stands in padding must reach no sum and no gradient.
  logits_BL = jnp.where(mask_BL, logits_BL, 0.0)
  entropy_BL = optax.sigmoid_binary_cross_entropy(logits_BL, best_BL.astype(jnp.float32))
  agree_BL = mask_BL & ((logits_BL > 0) == best_BL)
  metrics = {
    "taken_fraction": jnp.sum(taken_BL) / real,
    "agreement": jnp.sum(agree_BL) / real,
  }
  return jnp.sum(jnp.where(mask_BL, entropy_BL, 0.0)) / real, metrics


def _scaled(change, weight, taken):
  """Returns the change of the residual stream in its dtype, 0 where a token is not taken."""
  scaled = (change.astype(jnp.float32) * weight[..., None]).astype(change.dtype)
  return jnp.where(taken[..., None], scaled, 0)


def _among(context: AttentionContext, index_BC: jax.Array) -> AttentionContext:
  """Returns the context of some of the tokens, with their own positions."""

  def of_tokens(a_BL):
    return _gather(a_BL, index_BC)

  def of_pairs(a_BLL):
    return jnp.take_along_axis(of_tokens(a_BLL), index_BC[:, None, :], axis=2)

  return AttentionContext(
    rotary=jax.tree.map(of_tokens, context.rotary),
    mask=of_pairs(context.mask),
    query_scale=jax.tree.map(of_tokens, context.query_scale),
    buckets=jax.tree.map(of_pairs, context.buckets),
  )


def _gather(a, index_BC):
  """Returns a (B, L, ...) at some places of each row, (B, C, ...)."""
  return jnp.take_along_axis(a, index_BC.reshape(index_BC.shape + (1,) * (a.ndim - 2)), axis=1)


def _scatter(a_BL, index_BC, values_BC):
  return a_BL.at[jnp.arange(a_BL.shape[0])[:, None], index_BC].set(values_BC, unique_indices=True)
