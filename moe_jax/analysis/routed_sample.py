"""Random logits through any router: what each token got, comparable between routers.

Nothing is trained here. The logits prefer some experts over others, so that experts overflow and
drops show; float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.groups import to_groups
from moe_jax.moe.options import Noise
from moe_jax.moe.plan import DensePlan, RoutingPlan
from moe_jax.moe.routing import route

VOCABULARY = 1000


@dataclasses.dataclass(frozen=True)
class TokenSample:
  """Tokens of B sequences of length L, as a router sees them.

  Attributes:
    logits: (B, L, E') float32, normal with standard deviation 1 plus a preference that falls
      evenly from 1 for the first expert to -1 for the last.
    ids: (B, L) int32, vocabulary ids.
  """

  logits: np.ndarray
  ids: np.ndarray


def draw_sample(num_logits: int, shape: tuple[int, int], seed: int) -> TokenSample:
  """Draws B sequences of length L; the same on every platform.

  Logits are drawn expert after expert, so routers with more of them share the first ones.
  """
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, VOCABULARY, shape).astype(np.int32)
  normal = np.moveaxis(rng.normal(size=(num_logits, *shape)), 0, -1)
  return TokenSample((normal + np.linspace(1.0, -1.0, num_logits)).astype(np.float32), ids)


def route_rows(
  logits: jax.Array, ids: jax.Array, config: RoutingConfig, *, train: bool
) -> RoutingPlan | DensePlan:
  """Routes logits (B, L, E') with ids (B, L) in the groups that the config asks for.

  Every row is one sequence. Training draws with one fixed key: two calls differ by their tokens
  alone. Learned noise has standard deviation 1.
  """
  rows = jnp.broadcast_to(jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None], ids.shape)
  scale = jnp.ones_like(logits) if config.noise == Noise.LEARNED else None
  return route(
    to_groups(logits, config),
    config,
    token_mask=to_groups(jnp.ones(ids.shape, bool), config),
    token_ids=to_groups(ids, config),
    segment_ids=to_groups(rows, config),
    noise_scale=None if scale is None else to_groups(scale, config),
    key=jax.random.key(0) if train else None,
    train=train,
  )


def presence(plan: RoutingPlan | DensePlan) -> jax.Array:
  """Returns (G, S, E) float32: 1 where the expert sees the token; Soft MoE's see all."""
  if isinstance(plan, DensePlan):
    return (jnp.sum(plan.dispatch, axis=-1) > 0).astype(jnp.float32)
  return _by_token(plan, plan.valid.astype(jnp.float32))


def decisions(plan: RoutingPlan | DensePlan) -> jax.Array:
  """Returns (G, S, X) float32: all that the plan decides about a token's output.

  Which experts see it and the weight of each; for Soft MoE its shares in slots and of slots. The
  slot's number is left out, as it changes no output.
  """
  if isinstance(plan, DensePlan):
    shares = [a.reshape(*a.shape[:2], -1) for a in (plan.dispatch, plan.combine)]
    return jnp.concatenate(shares, axis=-1)
  columns = [presence(plan), _by_token(plan, plan.weight)]
  if plan.identity is not None:
    columns.append(plan.identity[..., None])
  return jnp.concatenate(columns, axis=-1)


def by_row(a: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Reshapes (G, S, ...) to (B, L, ...) and cuts the filling of groups off."""
  B, L = shape
  return a.reshape((-1,) + a.shape[2:])[: B * L].reshape((B, L) + a.shape[2:])


@functools.partial(jax.jit, static_argnames=("config", "train"))
def decided(logits: jax.Array, ids: jax.Array, config: RoutingConfig, train: bool) -> jax.Array:
  """Returns the decisions (B, L, X) of routing these rows, compiled."""
  return by_row(decisions(route_rows(logits, ids, config, train=train)), ids.shape)


def _by_token(plan, values_GN):
  groups = jnp.arange(plan.token.shape[0])[:, None]
  shape = (plan.token.shape[0], plan.num_tokens, plan.num_experts)
  # A null expert has an id from E on and is counted in `identity`; "drop" leaves it out.
  return (
    jnp.zeros(shape, values_GN.dtype)
    .at[groups, plan.token, plan.expert]
    .add(values_GN, mode="drop")
  )
