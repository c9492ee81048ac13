"""Select stage, whole groups at once: expert choice, Sinkhorn and balanced assignment.

None of them is causal: a token's experts depend on the tokens after it.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.registry import (
  Chooser,
  ExpertChoice,
  SelectView,
  TokenChoice,
  register_selection,
)
from moe_jax.moe.selection import ask, top_k
from moe_jax.sharding.local import row_top_k


@register_selection("expert_choice", chooser=Chooser.EXPERT, causal=False)
def expert_choice(view: SelectView, config: RoutingConfig) -> ExpertChoice:
  """Lets every expert take the C tokens that score it highest (arXiv 2202.09368 section 3.2).

  Padding is never taken; ties go to the earlier token. Evaluate causally by
  `selection = top_k` over the same parameters.
  """
  real_GS1 = view.mask[..., None]
  wanted_GES = jnp.where(real_GS1, view.scores, -jnp.inf).swapaxes(1, 2)
  score_GEC, token_GEC = row_top_k(wanted_GES, view.capacity)
  return ExpertChoice(token_GEC.astype(jnp.int32), score_GEC > -jnp.inf)


@register_selection("sinkhorn", causal=False)
def sinkhorn(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects by logits that Sinkhorn iterations have balanced over experts in training.

  Outside training, plain top-k (S-BASE, arXiv 2202.01169 section B.2; Megatron-core likewise).
  """
  if not view.train:
    return top_k(view, config)
  balanced_GSE = sinkhorn_logits(view.logits, view.mask, config.sinkhorn_iterations)
  return ask(row_top_k(balanced_GSE, config.top_k)[1])


def sinkhorn_logits(logits_GSE: jax.Array, mask_GS: jax.Array, iterations: int) -> jax.Array:
  """Returns log of exp(logits) scaled to equal expert sums and equal token sums, (G, S, E).

  In log space, over real tokens; padding stays at -inf. The last scaling is over experts' columns,
  as a row's scale does not change its top-k.
  """
  logits_GSE = jax.lax.stop_gradient(logits_GSE)
  masked_GSE = jnp.where(mask_GS[..., None], logits_GSE, -jnp.inf)

  def scale(_, column_G1E):
    row_GS1 = jax.nn.logsumexp(logits_GSE - column_G1E, axis=-1, keepdims=True)
    column = jax.nn.logsumexp(masked_GSE - row_GS1, axis=1, keepdims=True)
    return jnp.where(jnp.isfinite(column), column, 0.0)

  column_G1E = jnp.zeros((logits_GSE.shape[0], 1, logits_GSE.shape[2]), jnp.float32)
  return logits_GSE - jax.lax.fori_loop(0, iterations, scale, column_G1E)


@register_selection("base", causal=False)
def base(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Assigns equal numbers of tokens to experts for the largest sum of logits, in training.

  BASE layers (arXiv 2103.16716 section 2.2); outside training every token takes its best expert.
  """
  if not view.train:
    return top_k(view, config)
  logits_GSE = jax.lax.stop_gradient(view.logits)
  return ask(jax.vmap(balanced_assignment)(logits_GSE, view.mask)[..., None])


def balanced_assignment(score_SE: jax.Array, mask_S: jax.Array) -> jax.Array:
  """Returns (S,) int32, an expert for each token, at most ceil(real tokens / E) for each expert.

  Bertsekas' auction: every token without a slot bids for its best expert what it would lose by
  taking its second best; an expert keeps its highest bids and its price is the lowest of them. The
  sum of scores is within S * epsilon of the largest possible one, epsilon being a thousandth of the
  largest difference between two scores of a token. A padding token gets an arbitrary expert.
  """
  S, E = score_SE.shape
  if E == 1:
    return jnp.zeros((S,), jnp.int32)
  slots = (jnp.sum(mask_S) + E - 1) // E
  # A NaN would bid forever, and an infinity makes one: neither may hang a run that went astray.
  score_SE = jnp.clip(jnp.nan_to_num(score_SE), -1e30, 1e30)
  # What all experts score alike decides nothing, and would cost the prices their precision.
  score_SE = score_SE - jnp.max(score_SE, axis=1, keepdims=True)
  score_SE = jnp.where(mask_S[:, None], score_SE, 0.0)
  epsilon = jnp.maximum(-1e-3 * jnp.min(score_SE), 1e-6)

  def bid(state):
    expert_S, bid_S, price_E = state
    best_S2, choice_S2 = jax.lax.top_k(score_SE - price_E[None], 2)
    offer_S = price_E[choice_S2[:, 0]] + best_S2[:, 0] - best_S2[:, 1] + epsilon
    free_S = mask_S & (expert_S < 0)
    expert_S = jnp.where(free_S, choice_S2[:, 0], expert_S)
    bid_S = jnp.where(free_S, offer_S, bid_S)
    return _keep_highest(expert_S, bid_S, price_E, slots)

  expert_S = jnp.full((S,), -1, jnp.int32)
  state = expert_S, jnp.zeros((S,), jnp.float32), jnp.zeros((E,), jnp.float32)
  expert_S, _, _ = jax.lax.while_loop(lambda s: jnp.any(mask_S & (s[0] < 0)), bid, state)
  return jnp.maximum(expert_S, 0)


def _keep_highest(expert_S, bid_S, price_E, slots):
  """Keeps the `slots` highest bids of every expert; a full expert's price is its lowest bid."""
  E = price_E.shape[0]
  bid_SE = jnp.where(expert_S[:, None] == jnp.arange(E)[None], bid_S[:, None], -jnp.inf)
  # Rank of each bid at its expert, ties to the earlier token.
  order_SE = jnp.argsort(-bid_SE, axis=0, stable=True)
  rank_SE = jnp.argsort(order_SE, axis=0)
  kept_SE = (rank_SE < slots) & (bid_SE > -jnp.inf)
  lowest_E = jnp.take_along_axis(bid_SE, order_SE, axis=0)[slots - 1]
  price_E = jnp.where(lowest_E > -jnp.inf, lowest_E, price_E)
  return jnp.where(jnp.any(kept_SE, axis=1), expert_S, -1), bid_S, price_E
