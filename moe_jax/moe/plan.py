"""The plan: what a router decided, as arrays of static size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.moe.options import WeightOn


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["token", "expert", "slot", "weight", "valid", "identity", "losses", "metrics"],
  meta_fields=["num_tokens", "num_experts", "capacity", "top_k", "weight_on"],
)
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
  """A flat list of assignments (token, expert) of static size, for each group.

  Token choice, expert choice and routers with a variable number of experts all fit in it.

  Attributes:
    token: (G, N) int32, the token's index in its group.
    expert: (G, N) int32, the expert's id; from E on it is a null expert, and not valid.
    slot: (G, N) int32, its place in that expert's buffer, below C where valid. Two valid
      assignments of a group never share (expert, slot).
    weight: (G, N) float32, the combine weight, 0 where not valid.
    valid: (G, N) bool, False where dropped, not selected, or padding.
    identity: (G, S) float32, the weight of the token itself in its output (identity experts), or
      None.
    losses: float32 scalars by name, not yet multiplied by their coefficients, see
      `moe_jax.moe.losses`.
    metrics: see `moe_jax.moe.metrics`.
    num_tokens: S. num_experts: E. capacity: C; S when dropless, which is always enough.
    top_k: K if N = S*K in token-major order, which lets combine sum without a scatter; None if
      assignments come in any other order.
    weight_on: whether weights multiply what enters an expert or what leaves it.
  """

  token: jax.Array
  expert: jax.Array
  slot: jax.Array
  weight: jax.Array
  valid: jax.Array
  identity: jax.Array | None
  losses: dict[str, jax.Array]
  metrics: dict[str, jax.Array]
  num_tokens: int
  num_experts: int
  capacity: int
  top_k: int | None = None
  weight_on: WeightOn = WeightOn.OUTPUT

  def dispatch_mask(self) -> jax.Array:
    """Returns (G, S, E, C) bool: token s sits in slot c of expert e."""
    return self._scatter(self.valid)

  def combine_weights(self) -> jax.Array:
    """Returns (G, S, E, C) float32: the weight of slot c of expert e in token s's output."""
    return self._scatter(self.weight)

  def _scatter(self, values_GN: jax.Array) -> jax.Array:
    groups_GN = jnp.arange(self.token.shape[0])[:, None]
    shape = (self.token.shape[0], self.num_tokens, self.num_experts, self.capacity)
    # A slot beyond C marks an assignment that has none; "drop" leaves it out.
    slot_GN = jnp.where(self.valid, self.slot, self.capacity)
    return (
      jnp.zeros(shape, values_GN.dtype)
      .at[groups_GN, self.token, self.expert, slot_GN]
      .set(values_GN, mode="drop")
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["dispatch", "combine", "losses", "metrics"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DensePlan:
  """Soft MoE: every slot mixes all tokens, every token mixes all slots (arXiv 2308.00951).

  Only einsum dispatch can carry it out.

  Attributes:
    dispatch: (G, S, E, C) float32, the share of token s in slot c of expert e; sums to 1 over s.
    combine: (G, S, E, C) float32, the weight of that slot in the token's output; sums to 1 over
      (e, c) for a real token, 0 for padding.
    losses, metrics: as in `RoutingPlan`.
  """

  dispatch: jax.Array
  combine: jax.Array
  losses: dict[str, jax.Array]
  metrics: dict[str, jax.Array]

  @property
  def num_experts(self) -> int:
    """E."""
    return self.dispatch.shape[2]

  @property
  def capacity(self) -> int:
    """C, slots per expert."""
    return self.dispatch.shape[3]

  def dispatch_mask(self) -> jax.Array:
    """Returns (G, S, E, C) float32."""
    return self.dispatch

  def combine_weights(self) -> jax.Array:
    """Returns (G, S, E, C) float32."""
    return self.combine
