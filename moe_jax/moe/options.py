"""The named choices of every stage of a router: one enum per choice.

Axis letters, used in names, docstrings and einsum strings throughout the package:

  B batch               L length              G routing groups     S tokens per group
  E experts (global)    K choices per token   C capacity: slots per expert per group
  D model width         F expert hidden       H heads              V vocabulary
  N assignments (token, expert) in the plan of one group

The select stage has no enum: its names are those of `moe_jax.moe.registry`, to which a user adds.
"""

import enum


class Score(enum.StrEnum):
  """Score stage: what turns the logits of a token into scores of its experts."""

  SOFTMAX = "softmax"  # over all experts; sums to 1
  SIGMOID = "sigmoid"  # each expert by itself (DeepSeek-V3, arXiv 2412.19437 Eq. 15; Llama 4)
  SQRT_SOFTPLUS = "sqrt_softplus"  # sqrt(log(1 + exp(z))), each expert by itself
  RELU = "relu"  # max(z, 0): zero for experts that are not wanted (ReMoE, arXiv 2412.14711 Eq. 5)


class Projection(enum.StrEnum):
  """Score stage: how the router makes logits of a token's activations x (arXiv 1701.06538 Eq. 3).

  Carried out by `moe_jax.moe.router.Router`; `route` takes logits.
  """

  LINEAR = "linear"  # x W
  AFFINE = "affine"  # x W + b, a learned bias for each logit (gpt-oss)
  # l2(x) (scale * l2(W)), x and W's columns of length 1, one learned scale (arXiv 2308.00951 2.3)
  NORMALIZED = "normalized"


class Noise(enum.StrEnum):
  """Score stage: what is added to the logits in training."""

  NONE = "none"
  GAUSSIAN = "gaussian"  # noise_std * normal (V-MoE, arXiv 2106.05974: 1 / E)
  LEARNED = "learned"  # normal * softplus(x W_noise) (Shazeer et al., arXiv 1701.06538 Eq. 4)
  GUMBEL = "gumbel"  # noise_std * Gumbel: with noise_std = 1, top-k samples from the softmax


class Granularity(enum.StrEnum):
  """Score stage: what is routed as one."""

  TOKEN = "token"
  SEGMENT = "segment"  # all tokens of a segment share the mean of their logits (arXiv 2110.03742)


class GroupScore(enum.StrEnum):
  """Select stage: the score of a group of experts, by which a token picks its groups."""

  MAX = "max"  # the best expert's (DeepSeek-V2, arXiv 2405.04434 section 2.1.2)
  TOP2_SUM = "top2_sum"  # the two best experts' sum (DeepSeek-V3, arXiv 2412.19437 section 2.1.2)


class NullExpert(enum.StrEnum):
  """What an expert without parameters returns (MoE++, arXiv 2410.07348 section 3.1)."""

  ZERO = "zero"
  IDENTITY = "identity"


class Weighting(enum.StrEnum):
  """Weigh stage: scores of the selected experts -> combine weights."""

  RAW = "raw"  # the score itself (Switch, arXiv 2101.03961 Eq. 2)
  RENORMALIZED = "renormalized"  # divided by their norm over the K choices, before any drop
  RENORMALIZED_AFTER_DROP = "renormalized_after_drop"  # divided by the norm of what got a slot
  SOFTMAX_SELECTED = "softmax_selected"  # softmax over the K selected logits (Mixtral)
  HARD = "hard"  # 1, without a gradient
  STRAIGHT_THROUGH = "straight_through"  # 1, with the gradient of the score
  SPARSEMIXER = "sparsemixer"  # see `moe_jax.moe.sparsemixer` (arXiv 2310.00811)


class WeightOn(enum.StrEnum):
  """Weigh stage: where the weight is applied."""

  OUTPUT = "output"
  INPUT = "input"  # to the token, before the expert (Llama 4)


class CapacityConvention(enum.StrEnum):
  """What a capacity factor CF counts; the literature has both."""

  PER_TOKEN = "per_token"  # slots = CF * S / E, whatever K is (Switch, GLaM, flaxformer)
  PER_ASSIGNMENT = "per_assignment"  # slots = CF * K * S / E (GShard, V-MoE, Megatron)


class Rounding(enum.StrEnum):
  """How a fractional number of slots becomes an integer."""

  CEIL = "ceil"
  FLOOR = "floor"
  ROUND_HALF_EVEN = "round_half_even"  # Python's round()
  # An expert's even share is rounded up first: floor(CF * ceil(K * S / E)) (MaxText) ...
  FLOOR_OF_CEILED_ASSIGNMENTS = "floor_of_ceiled_assignments"
  # ... or K * floor(CF * ceil(S / E)) (Tutel). K is left out of both under `per_token`.
  FLOOR_OF_CEILED_TOKENS = "floor_of_ceiled_tokens"


class Overflow(enum.StrEnum):
  """Place stage: what happens to an assignment whose expert is full.

  Re-routing is not causal: a later token's first wish is served before an earlier token's second.
  """

  DROP = "drop"  # it is dropped; the token keeps its other experts and the residual
  REROUTE = "reroute"  # it asks the token's next best expert, up to reroute_attempts times
  DROPLESS = "dropless"  # never happens: an expert takes all that ask for it


class DropOrder(enum.StrEnum):
  """Place stage: which assignments ask first.

  With K >= 2 and drops, choice-major is not causal: a later token's first choice can take the slot
  of an earlier token's second.
  """

  CHOICE_MAJOR = "choice_major"  # every first choice before any second choice
  TOKEN_MAJOR = "token_major"  # all choices of a token before the next token's


class Priority(enum.StrEnum):
  """Place stage: which tokens ask first. All but `position` are not causal."""

  POSITION = "position"  # in the order of the sequence
  MAX_SCORE = "max_score"  # by largest score (batch prioritised routing, arXiv 2106.05974)
  SUM_SCORE = "sum_score"  # by the sum of the K selected scores (the same paper)
  PROBABILITY = "probability"  # each assignment by its own score, whatever the drop order
  WEIGHT = "weight"  # each assignment by its combine weight before drops (Megatron-LM's `probs`)
  RANDOM = "random"  # in a random order in training, by position outside it (DeepSpeed)


class Grouping(enum.StrEnum):
  """Which tokens compete for the same slots."""

  BATCH = "batch"  # all tokens of the call
  SEQUENCE = "sequence"  # the tokens of one sequence
  FIXED = "fixed"  # group_size consecutive tokens, the last group padded with masked tokens


class BalanceFraction(enum.StrEnum):
  """Which assignments the load fraction f of the balance loss counts."""

  FIRST_CHOICE = "first_choice"  # sums to 1: the loss is 1 at uniform routing
  ALL_CHOICES = "all_choices"  # sums to K: the loss is K at uniform routing
  ALL_CHOICES_MEAN = "all_choices_mean"  # divided by K: the loss is 1 at uniform routing


class BalanceSource(enum.StrEnum):
  """When the load fraction f of the balance loss is counted."""

  SELECTION = "selection"  # what was asked for, before any drop
  DISPATCH = "dispatch"  # what got a slot: smaller where experts overflow


class BalanceScope(enum.StrEnum):
  """Over which tokens f and P of the balance loss are averaged before they are multiplied."""

  GROUP = "group"  # per routing group, then the mean over groups
  SEQUENCE = "sequence"  # per segment of `segment_ids`, then the mean over segments
  BATCH = "batch"  # all tokens of the call: one microbatch under gradient accumulation
  GLOBAL_BATCH = "global_batch"  # P of the call, f of all microbatches of the step (2501.11873)


class Importance(enum.StrEnum):
  """What the importance loss sums for each expert."""

  WEIGHTS = "weights"  # the combine weights before drops (Shazeer et al., arXiv 1701.06538 Eq. 6)
  SCORES = "scores"  # the scores of all experts, without noise (V-MoE, arXiv 2106.05974 Eq. 7)


class LoadThreshold(enum.StrEnum):
  """The noisy logit that an expert must exceed to be among a token's K, in the load loss."""

  EXCLUDE_SELF = "exclude_self"  # the K-th largest of the others (arXiv 1701.06538 Eq. 8)
  INCLUDE_SELF = "include_self"  # the K-th largest of all (V-MoE's code, Tutel)


class LossPadding(enum.StrEnum):
  """How padding enters the router losses."""

  EXCLUDE = "exclude"  # not at all
  FLAXFORMER = "flaxformer"  # that library's: zeroed, but counted in every denominator


class BiasUpdate(enum.StrEnum):
  """How the selection bias follows the load, once per optimiser step."""

  NONE = "none"  # there is no bias
  SIGN = "sign"  # b += rate * sign(mean load - load) (arXiv 2408.15664 Algorithm 1)
  MAGNITUDE = "magnitude"  # b += rate * (1 - load / mean load) (the same paper, section 4.3)
  QUANTILE = "quantile"  # b = minus the quantile of the margins that gives every expert its share
