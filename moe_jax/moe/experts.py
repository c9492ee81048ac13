"""The experts: E feed-forward networks with stacked weights, applied to dispatched rows."""

import dataclasses
import functools

import jax
from flax import nnx

from moe_jax.layers.mlp import FeedForwardConfig, feed_forward, feed_forward_weights
from moe_jax.moe.dispatch import (
  Dispatch,
  ExpertResults,
  ExpertRows,
  Plan,
  SlottedRows,
  TokenSums,
  get_dispatcher,
)
from moe_jax.moe.grouped import GroupedKernel, grouped_experts

Weights = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ExpertForm:
  """How experts are reached and computed; says nothing of the mesh.

  Attributes:
    network: one expert.
    dispatch: how tokens travel.
    kernel: what runs the experts of `ragged` dispatch.
  """

  network: FeedForwardConfig
  dispatch: Dispatch
  kernel: GroupedKernel = GroupedKernel.AUTO


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
    self.weights = nnx.Dict(feed_forward_weights(key, model_dim, config, scale, num_experts))

  def arrays(self) -> Weights:
    """Returns the weights by name."""
    return {name: value[...] for name, value in self.weights.items()}

  def axes(self) -> dict[str, tuple[str, ...]]:
    """Returns the logical axes of each weight, without the one that a segment stacks layers on."""
    return {
      name: value.get_metadata()["axes"][-value[...].ndim :] for name, value in self.weights.items()
    }


def apply_plan(
  x: jax.Array, plan: Plan, weights: Weights, key: jax.Array | None, form: ExpertForm
) -> jax.Array:
  """Returns each token's weighted sum over its experts, (G, S, D) in the dtype of x.

  Args:
    x: (G, S, D) tokens.
    plan: of those groups.
    weights: with a leading axis E.
    key: turns dropout on.
    form: see `ExpertForm`.
  """
  dispatcher = get_dispatcher(form.dispatch)
  with jax.named_scope("dispatch"):
    rows = dispatcher.dispatch(x, plan)
  rows = apply_experts(rows, weights, key, form.network, form.kernel)
  with jax.named_scope("combine"):
    return dispatcher.combine(rows, plan)


def apply_experts(
  rows: ExpertRows,
  weights: Weights,
  key: jax.Array | None,
  config: FeedForwardConfig,
  kernel: GroupedKernel = GroupedKernel.AUTO,
) -> ExpertResults:
  """Applies the expert networks as a function of arrays; `weights` have a leading axis E.

  Rows in slots come back in their slots, for combine to weigh; ragged rows come back as each
  token's weighted sum, see `moe_jax.moe.grouped`.
  """
  with jax.named_scope("experts"):
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
