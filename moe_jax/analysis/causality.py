"""Does a later token decide what happens to an earlier one? Routers and models under perturbation.

Two questions, asked apart, both of one row (sequence) whose tokens from a position t on change:

* **Future**: does anything change for the tokens of that row before t? A router for which nothing
  does is *causal*. One that leaks may not be used, or evaluated, as an autoregressive model.
* **Batch**: does anything change for the tokens of other rows? Sequences then compete for the same
  slots, and an output depends on what else is in the batch: not a leak of the future, but results
  change with batch size and order.

So a router that serves tokens in order (`token_major`, by position) is causal however many rows
share a group, and then depends on the batch. Rows are what counts: documents packed into one row
share its routing group. A selection bias and the losses act between steps and are not looked at.
"""

import dataclasses

import numpy as np

from moe_jax.analysis.routed_sample import decided, draw_sample
from moe_jax.moe.capacity import expert_capacity
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import DropOrder, Granularity, Grouping, Overflow, Priority
from moe_jax.moe.registry import Chooser

# Weights are of order 1; a changed order of sums moves them by less than this.
_TOLERANCE = 1e-6
# Selections that are a plain top-k outside training.
_TOP_K_OUTSIDE_TRAINING = ("sinkhorn", "base")


@dataclasses.dataclass(frozen=True)
class Leak:
  """What a change of later tokens changed.

  Attributes:
    future: share of the earlier tokens of the changed row with another decision.
    batch: share of the tokens of other rows with another decision.
    future_causes, batch_causes: the fields by which it can happen, in words; empty if it cannot.
  """

  future: float
  batch: float
  future_causes: tuple[str, ...]
  batch_causes: tuple[str, ...]

  @property
  def verdict(self) -> str:
    """Says what was found, see `verdict`."""
    found = self.future > 0, self.batch > 0
    return verdict(*found, self.future_causes, self.batch_causes)


def audit_router(
  config: RoutingConfig, *, train: bool, shape: tuple[int, int] = (4, 64), seed: int = 0
) -> Leak:
  """Changes the later tokens of the first row of a random sample, at three cuts, and compares.

  Args:
    config: the router.
    train: training capacity and selection, with one fixed key; otherwise those of evaluation.
    shape: (B, L) of the sample, see `draw_sample`.
    seed: of the sample.
  """
  sample, other = (draw_sample(config.num_logits, shape, s) for s in (seed, seed + 1))
  before = np.asarray(decided(sample.logits, sample.ids, config, train))
  future, batch = [], []
  for cut in (shape[1] // 4, shape[1] // 2, 3 * shape[1] // 4):
    logits, ids = sample.logits.copy(), sample.ids.copy()
    logits[0, cut:], ids[0, cut:] = other.logits[0, cut:], other.ids[0, cut:]
    changed = differs(before, np.asarray(decided(logits, ids, config, train)))
    future.append(changed[0, :cut])
    batch.append(changed[1:].ravel())
  return Leak(
    float(np.mean(np.concatenate(future))),
    float(np.mean(np.concatenate(batch))),
    future_causes(config, shape, train=train),
    batch_causes(config, shape, train=train),
  )


def differs(before: np.ndarray, after: np.ndarray, tolerance: float = _TOLERANCE) -> np.ndarray:
  """Tells for each token (B, L) whether its decisions (B, L, X) changed by more than this."""
  return np.any(np.abs(before - after) > tolerance, axis=-1)


def future_causes(config: RoutingConfig, shape: tuple[int, int], *, train: bool) -> tuple[str, ...]:
  """Returns the fields by which a later token can decide an earlier one's fate, in words."""
  causes = []
  if _looks_ahead(config, train):
    causes.append(f"selection = {config.selection} chooses among all tokens of a group at once")
  if config.granularity == Granularity.SEGMENT:
    causes.append("granularity = segment routes by the mean over the whole segment")
  if _can_drop(config, shape, train):
    causes += _placement_causes(config, train)
  return tuple(causes)


def batch_causes(config: RoutingConfig, shape: tuple[int, int], *, train: bool) -> tuple[str, ...]:
  """Returns the fields by which sequences of a batch depend on each other, in words."""
  shared = config.grouping != Grouping.SEQUENCE
  if shared and (_looks_ahead(config, train) or _can_drop(config, shape, train)):
    return (f"grouping = {config.grouping} lets sequences compete for the same slots",)
  return ()


def _looks_ahead(config, train):
  return not config.selector.causal and (train or config.selection not in _TOP_K_OUTSIDE_TRAINING)


def _can_drop(config, shape, train):
  """Tells whether an expert of a group may be asked by more tokens than it has slots."""
  if config.selector.chooser != Chooser.TOKEN or config.overflow == Overflow.DROPLESS:
    return False
  B, L = shape
  tokens = L if config.grouping == Grouping.SEQUENCE else B * L
  if config.grouping == Grouping.FIXED:
    tokens = min(tokens, config.group_size)
  return expert_capacity(config, tokens, train=train) < tokens


def _placement_causes(config, train):
  causes = []
  asked = config.num_experts if config.selection == "positive" else config.top_k
  random = config.priority == Priority.RANDOM
  if config.priority != Priority.POSITION and (train or not random):
    causes.append(f"priority = {config.priority} may serve a later token first")
  elif config.drop_order == DropOrder.CHOICE_MAJOR and asked > 1:
    causes.append(
      "drop_order = choice_major serves a later token's first choice before an earlier token's"
      " second"
    )
  if config.overflow == Overflow.REROUTE:
    causes.append("overflow = reroute asks again only after every token has asked")
  return causes


def verdict(
  future: bool, batch: bool, future_causes: tuple[str, ...], batch_causes: tuple[str, ...]
) -> str:
  """Says in words whether something leaked, or could, from the future and between sequences."""
  first = _sentence(future, future_causes, "LEAKS the future", "is causal")
  second = _sentence(
    batch,
    batch_causes,
    "depends on the rest of the batch",
    "is independent of the rest of the batch",
  )
  return f"{first}; it {second}"


def _sentence(leaks: bool, causes: tuple[str, ...], bad: str, good: str) -> str:
  reason = " and ".join(causes)
  if leaks:
    return f"{bad} ({reason or 'by a selection that is registered as causal and is not'})"
  return f"{good} on this sample, but not by design ({reason})" if causes else good
