"""The experts: E feed-forward networks with stacked weights, applied to dispatched rows."""

import functools

import jax
from flax import nnx

from moe_jax.layers.mlp import FeedForwardConfig, feed_forward, feed_forward_weights
from moe_jax.moe.dispatch import ExpertResults, ExpertRows, SlottedRows, TokenSums
from moe_jax.moe.grouped import GroupedKernel, grouped_experts


class Experts(nnx.Module):
  """E gated or plain feed-forward networks; weights (E, D, F) and (E, F, D)."""

  def __init__(
    self,
    model_dim: int,
    num_experts: int,
    config: FeedForwardConfig,
    *,
    key: jax.Array,
    scale: float,
    kernel: GroupedKernel = GroupedKernel.AUTO,
  ):
    self.config = config
    self.kernel = kernel
    self.weights = nnx.Dict(feed_forward_weights(key, model_dim, config, scale, num_experts))

  def __call__(self, rows: ExpertRows, *, key: jax.Array | None = None) -> ExpertResults:
    """Applies each expert to its rows. `key` turns dropout on."""
    weights = {name: value[...] for name, value in self.weights.items()}
    with jax.named_scope("experts"):
      return apply_experts(rows, weights, key, self.config, self.kernel)


def apply_experts(
  rows: ExpertRows,
  weights: dict[str, jax.Array],
  key: jax.Array | None,
  config: FeedForwardConfig,
  kernel: GroupedKernel = GroupedKernel.AUTO,
) -> ExpertResults:
  """Applies the expert networks as a function of arrays; `weights` have a leading axis E.

  Rows in slots come back in their slots, for combine to weigh; ragged rows come back as each
  token's weighted sum, see `moe_jax.moe.grouped`.
  """
  if isinstance(rows, SlottedRows):
    keys = None if key is None else jax.random.split(key, rows.rows.shape[0])
    apply = jax.vmap(functools.partial(feed_forward, config=config))
    return SlottedRows(apply(rows.rows, weights, keys))

  def network(x, w, key, product, last_product):
    return feed_forward(x, w, key, config, product=product, last_product=last_product)

  sums = grouped_experts(
    network,
    rows.x,
    rows.weight,
    rows.moves,
    rows.rows_per_expert,
    weights,
    weight_on=rows.weight_on,
    key=key,
    kernel=kernel,
  )
  return TokenSums(sums)
