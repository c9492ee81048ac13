"""The experts: E feed-forward networks with stacked weights, applied to dispatched rows."""

import jax
from flax import nnx

from moe_jax.layers.mlp import FeedForwardConfig, feed_forward, feed_forward_weights
from moe_jax.moe.dispatch import ExpertRows, RaggedRows, SlottedRows
from moe_jax.moe.grouped import block_rows, grouped_apply


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
  ):
    self.config = config
    self.weights = nnx.Dict(feed_forward_weights(key, model_dim, config, scale, num_experts))

  def __call__(self, rows: ExpertRows, *, key: jax.Array | None = None) -> ExpertRows:
    """Applies each expert to its rows; the layout stays. `key` turns dropout on."""
    weights = {name: value[...] for name, value in self.weights.items()}
    num_experts = weights["up"].shape[0]
    keys = None if key is None else jax.random.split(key, num_experts)
    with jax.named_scope("experts"):
      return apply_experts(rows, weights, keys, self.config)


def apply_experts(
  rows: ExpertRows,
  weights: dict[str, jax.Array],
  keys: jax.Array | None,
  config: FeedForwardConfig,
) -> ExpertRows:
  """Applies the expert networks as a function of arrays; `weights` have a leading axis E."""

  def network(x, w, key):
    return feed_forward(x, w, key, config)

  if isinstance(rows, SlottedRows):
    return SlottedRows(jax.vmap(network)(rows.rows, weights, keys))
  block = block_rows(rows.rows.shape[0], rows.rows_per_expert.shape[0])
  out = grouped_apply(network, block, rows.rows, rows.rows_per_expert, weights, keys)
  return RaggedRows(out, rows.rows_per_expert, rows.position)
