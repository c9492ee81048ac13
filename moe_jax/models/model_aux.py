"""What the routers of a model decided in one call."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax.models.config import ModelConfig
from moe_jax.models.depths import DepthAux
from moe_jax.models.stack import Record
from moe_jax.moe.plan import DensePlan, RoutingPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelAux:
  """What the routers decided, one entry a MoE layer in order of `ModelConfig.moe_layers`.

  Attributes:
    router_logits: list of (B, L, E) float32.
    plans: list of `RoutingPlan` (or `DensePlan`).
    losses: float32 means over layers by name, without coefficients, see `moe_jax.moe.losses`, and
      `depth` of the depth blocks.
    weighted_loss: float32 scalar, the sum over layers of coefficient * loss: the term added to the
      objective (Switch, arXiv 2101.03961 section 2.2: "for each Switch layer"). Some code bases
      take the mean over layers instead: divide the coefficients by the number of MoE layers.
    weighted_losses: list of the same of every MoE layer alone.
    metrics: float32 means over layers; per layer see `plans[i].metrics`.
    depths: list of `DepthAux`, one a depth block in order.
    mtp_logits: list of (B, L, V) float32, in training one for each depth k = 1, 2, ... of
      multi-token prediction: of the token k + 1 places on.
  """

  router_logits: list[jax.Array]
  plans: list[RoutingPlan | DensePlan]
  losses: dict[str, jax.Array]
  weighted_loss: jax.Array
  weighted_losses: list[jax.Array]
  metrics: dict[str, jax.Array]
  depths: list[DepthAux]
  mtp_logits: list[jax.Array]


def make_aux(
  config: ModelConfig, records: Sequence[Record], mtp_logits: Sequence[jax.Array] = ()
) -> ModelAux:
  """Returns the record of a call; `records` are those of its MoE and depth blocks in order."""
  depths = [record for record in records if isinstance(record, DepthAux)]
  records = [record.moe if isinstance(record, DepthAux) else record for record in records]
  records = [record for record in records if record is not None]
  plans = [record.plan for record in records]
  losses = _mean([plan.losses for plan in plans])
  metrics = _mean([plan.metrics for plan in plans])
  weighted = sum((record.weighted_loss for record in records), jnp.float32(0.0))
  if depths:
    losses |= _mean([{"depth": each.loss} for each in depths])
    metrics |= _mean([{f"depth_{n}": m for n, m in d.metrics.items()} for d in depths])
    weighted += config.depth.loss_weight * sum(each.loss for each in depths)
  logits = [record.router_logits for record in records]
  of_layers = [record.weighted_loss for record in records]
  return ModelAux(logits, plans, losses, weighted, of_layers, metrics, depths, list(mtp_logits))


def _mean(layers: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Returns the mean over layers of each entry; nothing without layers."""
  names = layers[0] if layers else ()
  return {name: sum(layer[name] for layer in layers) / len(layers) for name in names}
