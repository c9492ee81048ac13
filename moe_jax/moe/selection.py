"""Select stage: scores -> the experts a token asks for."""

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.types import RoutingConfig, Selection


def select(
  scores_GSE: jax.Array,
  config: RoutingConfig,
  *,
  key: jax.Array | None,
  train: bool,
) -> tuple[jax.Array, jax.Array]:
  """Chooses K experts a token.

  Args:
    scores_GSE: (G, S, E) float32.
    config: `top_k` and `selection` are read.
    key: needed by `random_second` in training.
    train: outside training every choice is deterministic.

  Returns:
    expert_GSK (G, S, K) int32, best first, ties to the lower id; used_GSK (G, S, K) bool, False
    where a selected expert is not asked after all.

  Raises:
    UserError: `random_second` in training without a key.
  """
  top_GSK, expert_GSK = jax.lax.top_k(scores_GSE, config.top_k)
  # On CPU, XLA makes a full sort over E out of a top-k whose result is sliced, as the balance loss
  # slices it: 22 ms for 4,096 tokens and 64 experts, where selecting takes 2.
  expert_GSK = jax.lax.optimization_barrier(expert_GSK)
  used_GSK = jnp.ones_like(expert_GSK, bool)
  if config.selection == Selection.RANDOM_SECOND and train:
    if key is None:
      raise UserError(
        "selection = random_second draws random numbers in training: key = None"
        " was given, a jax.random.key is needed"
      )
    used_GSK = used_GSK.at[..., 1].set(_second_is_used(top_GSK, key))
  return expert_GSK, used_GSK


def _second_is_used(top_GSK: jax.Array, key: jax.Array) -> jax.Array:
  """Draws the second expert with probability min(1, 2 g2) (GShard, arXiv 2006.16668 Algorithm 1).

  g2 is the second score divided by the sum of both.
  """
  second_GS = top_GSK[..., 1] / jnp.sum(top_GSK, axis=-1)
  return 2.0 * second_GS > jax.random.uniform(key, second_GS.shape)
