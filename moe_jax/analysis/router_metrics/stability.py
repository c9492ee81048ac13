"""How routing moves during training: the same tokens, routed by several checkpoints.

Route without jitter, noise or drops, and with any selection bias. A comparison of other tokens is
meaningless and cannot be seen from ids alone.
"""

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import full_mask, masked_mean, ratio
from moe_jax.errors import UserError


@jax.jit
def router_saturation(
  expert: jax.Array, final_expert: jax.Array, token_mask: jax.Array | None = None
) -> jax.Array:
  """Returns the mean over real tokens of |E_t and E_T| / K (OLMoE, arXiv 2409.02060 Eq. 5).

  E_t are the token's K experts at one checkpoint, E_T those at the last. For K = 1 give the first
  choices `[..., :1]` of both. At random: `expected_saturation`.

  Args:
    expert, final_expert: (..., K) distinct expert ids.
    token_mask: (...) bool, True = real token.

  Raises:
    UserError: shapes that do not fit.
  """
  if expert.shape != final_expert.shape:
    raise UserError(
      f"expert has shape {expert.shape} and final_expert {final_expert.shape}; expected the same"
      " tokens and the same K"
    )
  same = jnp.any(expert[..., :, None] == final_expert[..., None, :], axis=-1)
  shared = jnp.sum(same, axis=-1) / expert.shape[-1]
  return masked_mean(shared, full_mask(token_mask, shared.shape, "token_mask"))


def expected_saturation(num_experts: int, top_k: int) -> float:
  """Returns K/E, the saturation of two unrelated routers."""
  return top_k / num_experts


@jax.jit
def routing_fluctuation(first_choice: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns the fraction of tokens whose first choice changes between consecutive checkpoints.

  The routing fluctuation of StableMoE (arXiv 2204.08396 section 1). At random:
  `expected_fluctuation`.

  Args:
    first_choice: (checkpoints, ...) expert ids, in the order of training.
    token_mask: (...) bool, True = real token.

  Returns:
    (checkpoints - 1,) float32.

  Raises:
    UserError: fewer than two checkpoints, or a mask that does not fit.
  """
  _require_checkpoints(first_choice)
  real = full_mask(token_mask, first_choice.shape[1:], "token_mask")
  changed = (first_choice[1:] != first_choice[:-1]) & real[None]
  return ratio(jnp.sum(changed, axis=tuple(range(1, changed.ndim))), jnp.sum(real))


def expected_fluctuation(num_experts: int) -> float:
  """Returns 1 - 1/E, the fluctuation of unrelated routers."""
  return 1.0 - 1.0 / num_experts


@jax.jit
def settled_fraction(first_choice: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns, for each checkpoint, the fraction of tokens settled from it on: (checkpoints,).

  A token's last fluctuation is the last checkpoint whose first choice differs from the final one
  (StableMoE, arXiv 2204.08396 section 1); it is settled after that. This is the cumulative
  distribution of that moment, and 1 at the last checkpoint.

  Args:
    first_choice: (checkpoints, ...) expert ids, in the order of training.
    token_mask: (...) bool, True = real token.

  Raises:
    UserError: fewer than two checkpoints, or a mask that does not fit.
  """
  _require_checkpoints(first_choice)
  real = full_mask(token_mask, first_choice.shape[1:], "token_mask")
  final = (first_choice == first_choice[-1:]).astype(jnp.int32)
  settled = jax.lax.cummin(final, axis=0, reverse=True) * real[None]
  return ratio(jnp.sum(settled, axis=tuple(range(1, settled.ndim))), jnp.sum(real))


def _require_checkpoints(first_choice: jax.Array) -> None:
  if first_choice.shape[0] < 2:
    raise UserError(
      f"first_choice holds {first_choice.shape[0]} checkpoints; expected at least 2 on its first"
      " axis"
    )
