"""How far a model that was made from another one still computes the same function."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models import ModelConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.run_batch import run_batch

# Sums over tokens; the others are maxima.
_SUMS = ("tokens", "targets", "kl", "nll_before", "nll_after")


@dataclasses.dataclass(frozen=True)
class Preservation:
  """Differences between two models on the same tokens, both evaluated dropless.

  Attributes:
    tokens: how many real tokens were looked at.
    max_logit: the largest absolute logit of the first model.
    max_logit_difference: the largest absolute difference of a logit.
    kl: nats per token, the mean of KL(first || second) over predictions of the next token.
    loss_before, loss_after: nats per target.
  """

  tokens: int
  max_logit: float
  max_logit_difference: float
  kl: float
  loss_before: float
  loss_after: float

  @property
  def relative_difference(self) -> float:
    """Returns the largest difference of a logit over the largest logit."""
    return self.max_logit_difference / self.max_logit if self.max_logit else math.inf


def preservation(
  before: tuple[ModelConfig, nnx.State],
  after: tuple[ModelConfig, nnx.State],
  batches: Iterable[Mapping[str, jax.Array]],
) -> Preservation:
  """Compares two models, given as config and variables.

  Args:
    before, after: the models; they share a vocabulary. Evaluated with room for every token.
    batches: of records, see `moe_jax.data`.
  """
  first, second = _graph(before[0]), _graph(after[0])

  @jax.jit
  def compare(states, batch):
    logits = [
      run_batch(nnx.merge(graph, state), batch)[0]
      for graph, state in zip((first, second), states, strict=True)
    ]
    return _compare(*logits, batch)

  found = [jax.device_get(compare((before[1], after[1]), batch)) for batch in batches]
  total = {name: math.fsum(float(each[name]) for each in found) for name in _SUMS}
  return Preservation(
    tokens=int(total["tokens"]),
    max_logit=max(float(each["largest"]) for each in found),
    max_logit_difference=max(float(each["difference"]) for each in found),
    # Of equal functions it is 0, and below that only by rounding.
    kl=max(0.0, total["kl"] / total["tokens"]),
    loss_before=total["nll_before"] / total["targets"],
    loss_after=total["nll_after"] / total["targets"],
  )


def _graph(config: ModelConfig) -> nnx.GraphDef:
  config = config.dropless()
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))[0]


def _compare(before: jax.Array, after: jax.Array, batch) -> dict[str, jax.Array]:
  real, targets = batch["segment_ids"] > 0, batch["targets"]
  p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
  nll = optax.softmax_cross_entropy_with_integer_labels
  return {
    "tokens": jnp.sum(real),
    "targets": jnp.sum(batch["loss_mask"]),
    "largest": jnp.max(jnp.abs(before) * real[..., None]),
    "difference": jnp.max(jnp.abs(after - before) * real[..., None]),
    "kl": jnp.sum(jnp.sum(jnp.exp(p) * (p - q), axis=-1) * real),
    "nll_before": jnp.sum(nll(before, targets) * batch["loss_mask"]),
    "nll_after": jnp.sum(nll(after, targets) * batch["loss_mask"]),
  }
