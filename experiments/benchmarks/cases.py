"""The cases of the MoE layer benchmark: shapes, forms of the layer, and the limits they chase.

A case is a jitted pair: `forward`, and `backward`, which is forward and backward together, with
gradients for the input and every parameter.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.mlp import Activation, FeedForwardConfig, feed_forward, feed_forward_weights
from moe_jax.moe import (
  Dispatch,
  Grouping,
  MoEConfig,
  MoELayer,
  Overflow,
  RoutingConfig,
  Weighting,
)
from moe_jax.moe.dispatch import TokenSums, get_dispatcher
from moe_jax.moe.grouped import grouped_experts
from moe_jax.moe.groups import from_groups, to_groups

LIMIT_DENSE = "limit_dense"
LIMIT_BATCHED = "limit_batched"
NO_EXPERTS = "ragged, no experts"


@dataclasses.dataclass(frozen=True)
class Shape:
  """One MoE layer and its batch, in the axis letters of the package; `tokens` is B * L."""

  tokens: int
  model_dim: int
  num_experts: int
  top_k: int
  network: FeedForwardConfig
  rows_per_expert: tuple[int, ...]
  capacity_factors: tuple[float, ...]


def _swiglu(hidden_dim: int) -> FeedForwardConfig:
  return FeedForwardConfig(hidden_dim, gated=True, activation=Activation.SILU)


_GROUPS = (4096, 256)
SHAPES = {
  "mixtral": Shape(4096, 512, 8, 2, _swiglu(1024), _GROUPS, (1.25,)),
  "fine_grained": Shape(4096, 512, 64, 6, _swiglu(176), _GROUPS, (1.25,)),
  "switch": Shape(4096, 512, 128, 1, FeedForwardConfig(2048), _GROUPS, (1.25,)),
  # For an accelerator: the widths of Mixtral 8x7B and of a fine-grained model with 64 experts.
  "mixtral_8x7b": Shape(16384, 4096, 8, 2, _swiglu(14336), (256,), (1.25,)),
  "fine_grained_64x6": Shape(16384, 2048, 64, 6, _swiglu(1408), (256,), (1.25,)),
}
CPU_SHAPES = ("mixtral", "fine_grained", "switch")
ACCELERATOR_SHAPES = ("mixtral_8x7b", "fine_grained_64x6")
TINY = Shape(64, 16, 4, 2, _swiglu(32), (64, 16), (1.25,))


@dataclasses.dataclass(frozen=True)
class Case:
  """Something to time: a name for each column of the table, and functions of (weights, x).

  Attributes:
    form: a `Dispatch` form or the name of a limit.
    group_size: S, tokens per routing group; None where there are no groups.
    capacity_factor: slots per assignment asked for; None where nothing has a capacity.
    weights: the parameters, a pytree.
    x: the input.
    apply: (weights, x) -> (y, scalars); the scalars hold losses and metrics.
  """

  form: str
  group_size: int | None
  capacity_factor: float | None
  weights: Any
  x: jax.Array
  apply: Callable[[Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

  @property
  def label(self) -> str:
    """Returns the name shown for the case."""
    group = "" if self.group_size is None else f" g{self.group_size}"
    factor = "" if self.capacity_factor is None else f" cf{self.capacity_factor:g}"
    return f"{self.form}{group}{factor}"

  def forward(self, weights: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the output and the scalars."""
    return self.apply(weights, x)

  def backward(self, weights: Any, x: jax.Array) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Returns the gradients of a scalar of the output, and the scalars."""

    def loss(weights, x):
      y, scalars = self.apply(weights, x)
      # A square gives every output its own cotangent, so that no product can be simplified away.
      balance = scalars.get("load_balance", 0.0)
      return jnp.mean(jnp.square(y.astype(jnp.float32))) + 0.01 * balance, scalars

    (dweights, dx), scalars = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
    return dweights, dx, scalars


def make_cases(shape: Shape, forms: Sequence[Dispatch], dtype: jnp.dtype) -> list[Case]:
  """Returns the two limits and every form, at each group size and capacity factor it has.

  After `ragged`, which comes last, stands the same layer without its experts' products. All forms
  share one set of weights, float32 as in training, and compute in `dtype`.
  """
  x = jax.random.normal(jax.random.key(0), (1, shape.tokens, shape.model_dim), dtype)
  routings = [(form, routing) for form in forms for routing in _routings(shape, form)]
  weights = nnx.state(_layer(shape, *routings[0]))
  layers = [_layer_case(shape, form, routing, weights, x) for form, routing in routings]
  if routings[-1][0] == Dispatch.RAGGED:
    layers.append(_layer_case(shape, *routings[-1], weights, x, NO_EXPERTS))
  return [_limit(shape, LIMIT_DENSE, 1, dtype), _limit(shape, LIMIT_BATCHED, None, dtype)] + layers


def _routings(shape: Shape, form: Dispatch) -> Iterator[RoutingConfig]:
  """Yields the routers worth timing under a form."""
  base = RoutingConfig(
    num_experts=shape.num_experts,
    top_k=shape.top_k,
    weighting=Weighting.RAW if shape.top_k == 1 else Weighting.SOFTMAX_SELECTED,
  )
  if form == Dispatch.RAGGED:
    yield dataclasses.replace(base, overflow=Overflow.DROPLESS)
    return
  # Only the cost of the einsum depends on the group size.
  rows_per_expert = shape.rows_per_expert if form == Dispatch.EINSUM else shape.rows_per_expert[:1]
  for factor in shape.capacity_factors:
    for group_size in rows_per_expert:
      yield dataclasses.replace(
        base, capacity_factor=factor, grouping=Grouping.FIXED, group_size=group_size
      )


class _MovedRows(MoELayer):
  """A layer of experts without products: their rows are looked up and summed."""

  def _apply_experts(self, x, plan, copied, key):
    dispatcher = get_dispatcher(self.config.dispatch)
    rows = dispatcher.dispatch(to_groups(x, self.config.routing), plan)
    args = (rows.x, rows.weight, rows.moves, rows.rows_per_expert, {})
    sums = TokenSums(grouped_experts(lambda x, *_: x, *args))
    return from_groups(dispatcher.combine(sums, plan), x.shape)


def _layer(
  shape: Shape, form: Dispatch, routing: RoutingConfig, kind: type[MoELayer] = MoELayer
) -> MoELayer:
  config = MoEConfig(
    routing,
    hidden_dim=shape.network.hidden_dim,
    gated=shape.network.gated,
    activation=shape.network.activation,
    dispatch=form,
  )
  return kind(shape.model_dim, config, key=jax.random.key(1))


def _layer_case(
  shape: Shape,
  form: Dispatch,
  routing: RoutingConfig,
  weights: nnx.State,
  x: jax.Array,
  name: str | None = None,
) -> Case:
  kind = _MovedRows if name == NO_EXPERTS else MoELayer
  graph = nnx.graphdef(nnx.eval_shape(lambda: _layer(shape, form, routing, kind)))

  def apply(weights, x):
    y, aux = nnx.merge(graph, weights)(x, train=True)
    return y, aux.plan.losses | aux.plan.metrics

  capped = routing.overflow == Overflow.DROP
  factor = routing.capacity_factor if capped else None
  return Case(name or form, routing.group_size, factor, weights, x, apply)


def _limit(shape: Shape, form: str, experts: int | None, dtype: jnp.dtype) -> Case:
  """Returns the products alone: T * K rows through `experts` equal networks, all E if None."""
  experts = experts or shape.num_experts
  rows = shape.tokens * shape.top_k // experts
  x = jax.random.normal(jax.random.key(0), (experts, rows, shape.model_dim), dtype)
  weights = feed_forward_weights(jax.random.key(1), shape.model_dim, shape.network, 1.0, experts)
  weights = {name: weight[...] for name, weight in weights.items()}

  def apply(weights, x):
    if experts == 1:
      only = {name: weight[0] for name, weight in weights.items()}
      return feed_forward(x[0], only, None, shape.network), {}
    return jax.vmap(lambda x, w: feed_forward(x, w, None, shape.network))(x, weights), {}

  return Case(form, None, None, weights, x, apply)
