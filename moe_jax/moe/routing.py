"""The router as five stages: score -> select -> weigh -> place, then dispatch and combine."""

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe import capacity, losses, metrics, scores, selection, weights
from moe_jax.moe.types import Overflow, RoutingConfig, RoutingPlan


def route(
  logits: jax.Array,
  config: RoutingConfig,
  *,
  token_mask: jax.Array | None = None,
  key: jax.Array | None = None,
  train: bool = False,
) -> RoutingPlan:
  """Routes the tokens of each group to experts. Lossy where experts are full: see the metrics.

  Args:
    logits: (G, S, E) router logits; computed on in float32.
    config: the choice at every stage.
    token_mask: (G, S) bool, True = real token; None = all real. Padding takes no slot, has no
      weight, and enters no loss (but see `LossPadding`) and no metric.
    key: for selections that draw random numbers in training.
    train: picks the train or eval capacity factor; outside training nothing is random.

  Returns:
    The plan, N = S * K assignments a group in token-major order.

  Raises:
    UserError: shapes that do not fit, or training with a constant combine weight.
  """
  if logits.ndim != 3 or logits.shape[-1] != config.num_experts:
    raise UserError(
      f"router logits have shape {logits.shape}; expected (groups, tokens,"
      f" num_experts = {config.num_experts})"
    )
  G, S, E = logits.shape
  if token_mask is None:
    token_mask = jnp.ones((G, S), bool)
  elif token_mask.shape != (G, S) or token_mask.dtype != bool:
    raise UserError(
      f"token_mask has shape {token_mask.shape} and dtype {token_mask.dtype};"
      f" expected {(G, S)} and bool, True = real token"
    )
  if train:
    config.check_trainable()
  with jax.named_scope("route"):
    return _route(logits.astype(jnp.float32), config, token_mask, key, train)


def _route(logits_GSE, config, mask_GS, key, train):
  G, S, E = logits_GSE.shape
  # Whatever stands in padding, an infinity or a NaN too, must reach no sum and no gradient.
  logits_GSE = jnp.where(mask_GS[..., None], logits_GSE, 0.0)
  probs_GSE = scores.softmax_scores(logits_GSE)
  expert_GSK, used_GSK = selection.select(probs_GSE, config, key=key, train=train)
  asked_GSK = used_GSK & mask_GS[..., None]

  C = capacity.expert_capacity(config, S, train=train)
  slot_GSK = capacity.place(expert_GSK, asked_GSK, jnp.max(probs_GSE, axis=-1), config)
  # Dropless, C is S and keeps all: without the comparison, ragged dispatch never counts the queues.
  dropless = config.overflow == Overflow.DROPLESS
  kept_GSK = asked_GSK if dropless else asked_GSK & (slot_GSK < C)
  weight_GSK = weights.weigh(probs_GSE, logits_GSE, expert_GSK, kept_GSK, config.weighting)

  token_GSK = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[:, None], expert_GSK.shape)
  token, expert, slot, weight, kept = (
    a.reshape(G, S * config.top_k) for a in (token_GSK, expert_GSK, slot_GSK, weight_GSK, kept_GSK)
  )
  return RoutingPlan(
    token=token,
    expert=expert,
    slot=slot,
    weight=weight,
    valid=kept,
    losses={
      "load_balance": losses.load_balance_loss(probs_GSE, expert_GSK, mask_GS, config),
      "router_z": losses.router_z_loss(logits_GSE, mask_GS, config.loss_padding),
    },
    metrics=metrics.routing_metrics(probs_GSE, expert_GSK, asked_GSK, kept_GSK, mask_GS, C, config),
    num_tokens=S,
    num_experts=E,
    capacity=C,
    top_k=config.top_k,
  )
