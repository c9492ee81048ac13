"""The routing of one MoE layer as sums that add up over microbatches, steps and devices.

Ratios do not add up, counts do: count each microbatch, add (`+`, or `jax.lax.psum` over devices),
and take the ratios once, with `finish`. Integers add up exactly; float32 sums up to rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics import balance, confidence, drops
from moe_jax.analysis.router_metrics.arrays import full_mask, ratio
from moe_jax.analysis.router_metrics.information import entropy
from moe_jax.errors import UserError
from moe_jax.moe.plan import RoutingPlan

# Sums cannot carry a maximum, so tokens are binned by the power of two above their largest |z|.
_LOGIT_EDGES = tuple(2.0**power for power in range(15))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingCounts:
  """Sums over the real tokens of one layer; every field adds up.

  The letters are those of `moe_jax.moe.options`; K is 1 for plans whose assignments have no rank.
  Integers are int32: at most 2^31 - 1 assignments or slots, then start anew.

  Attributes:
    asked: (E,) int32 assignments asked for, before any drop.
    kept: (E,) int32 assignments that got a slot.
    first: (E,) int32 first choices.
    asked_by_choice, kept_by_choice: (K,) int32, by the rank of the choice.
    tokens: int32 real tokens.
    lost_tokens: int32 tokens that asked and got no slot at all.
    experts_per_token: (5,) int32 tokens by how many experts took them, in
      `drops.EXPERTS_PER_TOKEN_BINS`.
    slots: int32 slots offered, G * E * C of each call.
    logit_magnitude: (16,) int32 tokens whose largest |z| is below 1, 2, 4, ..., 2^14, and above.
    importance: (E,) float32 probabilities of the experts asked for.
    probability: (E,) float32 probabilities of all experts.
    confidence, margin, token_entropy, squared_logsumexp: float32 sums over tokens of the largest
      probability, of its lead over the second, of the entropy in nats, of logsumexp(z)^2.
  """

  asked: jax.Array
  kept: jax.Array
  first: jax.Array
  asked_by_choice: jax.Array
  kept_by_choice: jax.Array
  tokens: jax.Array
  lost_tokens: jax.Array
  experts_per_token: jax.Array
  slots: jax.Array
  logit_magnitude: jax.Array
  importance: jax.Array
  probability: jax.Array
  confidence: jax.Array
  margin: jax.Array
  token_entropy: jax.Array
  squared_logsumexp: jax.Array

  @classmethod
  def zeros(cls, num_experts: int, top_k: int) -> "RoutingCounts":
    """Returns the counts of no tokens, to start a sum with."""
    shapes = {
      **dict.fromkeys(("asked", "kept", "first", "importance", "probability"), (num_experts,)),
      **dict.fromkeys(("asked_by_choice", "kept_by_choice"), (top_k,)),
      "experts_per_token": (len(drops.EXPERTS_PER_TOKEN_BINS),),
      "logit_magnitude": (len(_LOGIT_EDGES) + 1,),
    }
    floats = ("importance", "probability", "confidence", "margin", "token_entropy")
    floats += ("squared_logsumexp",)
    names = [field.name for field in dataclasses.fields(cls)]
    dtypes = {name: jnp.float32 if name in floats else jnp.int32 for name in names}
    return cls(**{name: jnp.zeros(shapes.get(name, ()), dtypes[name]) for name in names})

  def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
    """Returns the counts of both; associative and commutative, exact for integers."""
    return jax.tree.map(jnp.add, self, other)


def count_routing(
  expert: jax.Array,
  asked: jax.Array,
  kept: jax.Array,
  probs: jax.Array,
  logits: jax.Array,
  token_mask: jax.Array,
  num_slots: int,
) -> RoutingCounts:
  """Counts one call of a token-choice router. Carries no gradient.

  Args:
    expert: (..., K) expert ids, best first.
    asked: (..., K) bool, the choices that were made.
    kept: (..., K) bool, those of them that got a slot.
    probs: (..., E) float32 probabilities that sum to 1; scale other scores by
      `confidence.as_probabilities`.
    logits: (..., E) router logits.
    token_mask: (...) bool, True = real token; nothing is counted where it is False.
    num_slots: G * E * C.

  Raises:
    UserError: masks that do not fit the ids.
  """
  real = full_mask(token_mask, expert.shape[:-1], "token_mask")
  asked = full_mask(asked, expert.shape, "asked") & real[..., None]
  kept = full_mask(kept, expert.shape, "kept") & asked
  lost = jnp.any(asked, axis=-1) & ~jnp.any(kept, axis=-1)
  gate = jnp.take_along_axis(probs, jnp.where(asked, expert, 0), axis=-1)
  return RoutingCounts(
    **_assignment_sums(expert, asked, kept, gate, probs.shape[-1]),
    **_score_sums(probs, logits, real),
    first=balance.expert_counts(expert[..., :1], probs.shape[-1], asked[..., :1]),
    lost_tokens=_sum(lost),
    experts_per_token=drops.experts_per_token_histogram(jnp.sum(kept, axis=-1), real),
    slots=jnp.int32(num_slots),
  )


def count_plan(
  plan: RoutingPlan,
  probs_GSE: jax.Array,
  logits_GSE: jax.Array,
  token_mask_GS: jax.Array,
  asked: jax.Array | None = None,
) -> RoutingCounts:
  """Counts a plan of any order, with an entry for each assignment. Carries no gradient.

  Where experts choose tokens nothing is asked for in vain: what no expert took is in
  `experts_per_token`, and the first choice of a token is its most probable expert.

  Args:
    plan: (G, N) assignments.
    probs_GSE, logits_GSE, token_mask_GS: as in `count_routing`.
    asked: bool, the choices that were made: (G, S, K) if `plan.top_k` is set, None = those of
      every real token; else (G, N), None = those that are valid.

  Raises:
    UserError: a plan, probabilities and a mask of different shapes.
  """
  G, S, E = probs_GSE.shape
  if (G, S, E) != (plan.token.shape[0], plan.num_tokens, plan.num_experts):
    shape = (plan.token.shape[0], plan.num_tokens, plan.num_experts)
    raise UserError(f"probs have shape {probs_GSE.shape}; expected {shape}, as in the plan")
  slots = G * E * plan.capacity
  if plan.top_k is not None:
    GSK = (G, S, plan.top_k)
    expert, kept = plan.expert.reshape(GSK), plan.valid.reshape(GSK)
    asked = jnp.ones(GSK, bool) if asked is None else asked
    return count_routing(expert, asked, kept, probs_GSE, logits_GSE, token_mask_GS, slots)
  return _count_unranked(plan, probs_GSE, logits_GSE, token_mask_GS, asked, slots)


def _count_unranked(plan, probs_GSE, logits_GSE, token_mask_GS, asked, slots) -> RoutingCounts:
  real_GS = full_mask(token_mask_GS, probs_GSE.shape[:2], "token_mask")
  groups_GN = jnp.arange(plan.token.shape[0])[:, None]
  real_GN = real_GS[groups_GN, plan.token]
  asked_GN = full_mask(plan.valid if asked is None else asked, plan.token.shape, "asked") & real_GN
  kept_GN = plan.valid & asked_GN
  gate_GN = probs_GSE[groups_GN, plan.token, plan.expert]
  taken_GS = drops.experts_per_token(plan.token, kept_GN, plan.num_tokens)
  wanted_GS = drops.experts_per_token(plan.token, asked_GN, plan.num_tokens)
  favourite_GS1 = jnp.argmax(probs_GSE, axis=-1, keepdims=True)
  flat = (a[..., None] for a in (plan.expert, asked_GN, kept_GN, gate_GN))
  return RoutingCounts(
    **_assignment_sums(*flat, plan.num_experts),
    **_score_sums(probs_GSE, logits_GSE, real_GS),
    first=balance.expert_counts(favourite_GS1, plan.num_experts, real_GS[..., None]),
    lost_tokens=_sum((wanted_GS > 0) & (taken_GS == 0)),
    experts_per_token=drops.experts_per_token_histogram(taken_GS, real_GS),
    slots=jnp.int32(slots),
  )


def _assignment_sums(expert, asked, kept, gate, num_experts: int) -> dict[str, jax.Array]:
  tokens = tuple(range(expert.ndim - 1))
  gate = jax.lax.stop_gradient(gate)
  return {
    "asked": balance.expert_counts(expert, num_experts, asked),
    "kept": balance.expert_counts(expert, num_experts, kept),
    "asked_by_choice": _sum(asked, axis=tokens),
    "kept_by_choice": _sum(kept, axis=tokens),
    "importance": balance.importance(expert, gate, num_experts, asked),
  }


def _score_sums(probs, logits, real) -> dict[str, jax.Array]:
  probs, logits = jax.lax.stop_gradient((probs, logits))
  # What stands in padding, a NaN too, must reach no sum.
  probs, logits = (jnp.where(real[..., None], a.astype(jnp.float32), 0.0) for a in (probs, logits))
  magnitude = jnp.max(jnp.abs(logits), axis=-1)
  bins = jnp.searchsorted(jnp.array(_LOGIT_EDGES), magnitude, side="right")
  squared = jnp.square(jax.nn.logsumexp(logits, axis=-1))
  return {
    "tokens": _sum(real),
    "probability": jnp.sum(probs, axis=tuple(range(real.ndim))),
    "confidence": jnp.sum(jnp.max(probs, axis=-1)),
    "margin": jnp.sum(confidence.margin_of_tokens(probs)),
    "token_entropy": jnp.sum(entropy(probs)),
    "squared_logsumexp": jnp.sum(jnp.where(real, squared, 0.0)),
    "logit_magnitude": jnp.zeros(len(_LOGIT_EDGES) + 1, jnp.int32).at[bins].add(real),
  }


def _sum(mask, axis=None) -> jax.Array:
  return jnp.sum(mask, axis=axis, dtype=jnp.int32)


@jax.jit
def finish(counts: RoutingCounts) -> dict[str, jax.Array]:
  """Takes the ratios: float32 scalars, but for `load`, `dropped_fraction_by_choice` and bins.

  | name | meaning |
  |---|---|
  | `load` (E,), `assignments`, `tokens` | what was counted |
  | `load_entropy`, `effective_experts`, `load_cv`, `max_violation`, `max_over_mean_load` | spread |
  | `load_cv_floor` | what random assignments would show |
  | `dead_experts`, `starved_experts` | asked for by nobody; by under a tenth of the mean |
  | `importance_cv` | spread of the chosen probabilities |
  | `balance_loss_first_choice`, `balance_loss_all_choices` | normalised: 1 at uniform |
  | `dropped_fraction`, `dropped_fraction_by_choice` (K,) | of assignments |
  | `dropped_token_fraction` | of tokens: asked and got nothing |
  | `experts_per_token_histogram` (5,) | of tokens, by how many experts took them |
  | `unrouted_fraction` | of tokens: no expert took them |
  | `capacity_utilization`, `slots_per_assignment` | kept / slots, slots / asked |
  | `router_confidence`, `chosen_mass`, `top_margin` | mean probabilities of tokens |
  | `token_entropy`, `expert_entropy`, `routing_information` | nats |
  | `router_z` | mean logsumexp^2 |
  | `max_abs_logit_bound` | the power of two above max |z|, inf from 2^14 |

  Without a token all are 0 but `dead_experts` and `starved_experts` (E), `effective_experts`,
  `max_over_mean_load` and, for E = 1, `load_entropy` (1).
  """
  return {**_load_ratios(counts), **_drop_ratios(counts), **_score_ratios(counts)}


def _load_ratios(counts: RoutingCounts) -> dict[str, jax.Array]:
  asked = counts.asked
  total = jnp.sum(asked).astype(jnp.float32)
  return {
    "load": balance.load_fractions(asked),
    "assignments": total,
    "load_entropy": balance.normalized_load_entropy(asked),
    "effective_experts": balance.effective_experts(asked),
    "load_cv": balance.coefficient_of_variation(asked),
    "load_cv_floor": jnp.sqrt(ratio(asked.shape[0] - 1, total)),
    "max_violation": balance.max_violation(asked),
    "max_over_mean_load": balance.max_over_mean_load(asked),
    "dead_experts": balance.dead_experts(asked).astype(jnp.float32),
    "starved_experts": balance.dead_experts(asked, tau=0.1).astype(jnp.float32),
    "importance_cv": balance.coefficient_of_variation(counts.importance),
    "balance_loss_first_choice": balance.normalized_balance_loss(counts.first, counts.probability),
    "balance_loss_all_choices": balance.normalized_balance_loss(asked, counts.probability),
  }


def _drop_ratios(counts: RoutingCounts) -> dict[str, jax.Array]:
  asked, kept = jnp.sum(counts.asked), jnp.sum(counts.kept)
  lost_by_choice = counts.asked_by_choice - counts.kept_by_choice
  per_token = ratio(counts.experts_per_token, counts.tokens)
  return {
    "dropped_fraction": ratio(asked - kept, asked),
    "dropped_fraction_by_choice": ratio(lost_by_choice, counts.asked_by_choice),
    "dropped_token_fraction": ratio(counts.lost_tokens, counts.tokens),
    "experts_per_token_histogram": per_token,
    "unrouted_fraction": per_token[0],
    "capacity_utilization": drops.capacity_utilization(kept, counts.slots),
    "slots_per_assignment": ratio(counts.slots, asked),
  }


def _score_ratios(counts: RoutingCounts) -> dict[str, jax.Array]:
  token_entropy = ratio(counts.token_entropy, counts.tokens)
  expert_entropy = entropy(counts.probability)
  bounds = jnp.array([*_LOGIT_EDGES, jnp.inf])
  return {
    "tokens": counts.tokens.astype(jnp.float32),
    "router_confidence": ratio(counts.confidence, counts.tokens),
    "chosen_mass": ratio(jnp.sum(counts.importance), counts.tokens),
    "top_margin": ratio(counts.margin, counts.tokens),
    "token_entropy": token_entropy,
    "expert_entropy": expert_entropy,
    "routing_information": expert_entropy - token_entropy,
    "router_z": ratio(counts.squared_logsumexp, counts.tokens),
    "max_abs_logit_bound": jnp.max(jnp.where(counts.logit_magnitude > 0, bounds, 0.0)),
  }
