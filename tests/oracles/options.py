"""Name the choices that a router of the oracles can make."""

import dataclasses


def check_option(name, value, allowed):
  """Refuse an option the oracle does not know, so that a misspelt test cannot pass by accident."""
  if value not in allowed:
    raise ValueError(f"{name}={value!r} is not one of {allowed}.")


CHOICES = {
  "score": ("softmax", "sigmoid", "sqrt_softplus", "relu"),
  "granularity": ("token", "segment"),
  "selection": (
    "top_k",
    "random_second",
    "threshold_second",
    "sample",
    "random",
    "hash",
    "table",
    "positive",
    "hierarchical",
  ),
  "group_score": ("max", "top2_sum"),
  "weighting": (
    "raw",
    "renormalized",
    "renormalized_after_drop",
    "softmax_selected",
    "hard",
    "straight_through",
  ),
  "drop_order": ("choice_major", "token_major"),
  "priority": ("position", "max_score", "sum_score", "probability", "weight", "random"),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """One router.

  Attributes:
    top_k: K, experts per token.
    capacity: C, slots per expert. Dropless routing is capacity S: a token chooses an expert at most
      once.
    num_null_experts: experts with the last ids, which take no slot.
    score: logits -> scores.
    granularity: "segment" replaces the logits of a token by the mean over its segment.
    selection: scores -> experts.
    train: whether "random_second" and "sample" draw.
    second_threshold: the divisor of the draw of "random_second"; the least share of
      "threshold_second".
    num_expert_groups, top_expert_groups, group_score: a token asks experts of its best groups only;
      for "hierarchical" the number of first-level gates and how many of them are taken.
    hash_seed, hash_ngram: of "hash".
    weighting, norm_order, weight_scale: scores -> weights.
    drop_order, priority: who asks first.
    reroute_attempts: how often an assignment that found its expert full asks the next best one.
  """

  top_k: int
  capacity: int
  num_null_experts: int = 0
  score: str = "softmax"
  granularity: str = "token"
  selection: str = "top_k"
  train: bool = True
  second_threshold: float = 0.5
  num_expert_groups: int = 1
  top_expert_groups: int = 1
  group_score: str = "max"
  hash_seed: int = 0
  hash_ngram: int = 1
  weighting: str = "raw"
  norm_order: float = 1.0
  weight_scale: float = 1.0
  drop_order: str = "choice_major"
  priority: str = "position"
  reroute_attempts: int = 0

  def __post_init__(self):
    for name, allowed in CHOICES.items():
      check_option(name, getattr(self, name), allowed)
