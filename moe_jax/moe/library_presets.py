"""Routers as other libraries compute them, read in their sources.

They differ from each other where papers are silent: rounding of the capacity, drop order, what the
balance loss counts, how padding enters it. Coefficients of losses are a run's choice in all of
them; where a library has no default that trains, Switch's 0.01 stands here.
"""

from moe_jax.moe.options import (
  BalanceFraction,
  BalanceScope,
  CapacityConvention,
  DropOrder,
  Grouping,
  LossPadding,
  Overflow,
  Priority,
  Rounding,
  Weighting,
)

LIBRARY_PRESETS: dict[str, dict] = {
  # google/flaxformer, architectures/moe/routing.py `TokensChooseMaskedRouter` and
  # t5x/configs/moe/architectures/moe.gin: raw softmax weights, choice-major, capacity
  # max(round(CF S / E), 4) with both factors 1, groups of up to 4,096 tokens. f counts all choices
  # (uniform = K) and padding is zeroed but stays in every denominator. Its encoders set
  # `priority = max_score`.
  "flaxformer": dict(
    num_experts=8,
    top_k=1,
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    capacity_rounding=Rounding.ROUND_HALF_EVEN,
    min_capacity=4,
    drop_order=DropOrder.CHOICE_MAJOR,
    priority=Priority.POSITION,
    grouping=Grouping.FIXED,
    group_size=4096,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.GROUP,
    loss_padding=LossPadding.FLAXFORMER,
    balance_loss_weight=0.01,
  ),
  # google/praxis, gshard_utils.py `top2_gating_on_logits` as layers/transformers.py calls it: the
  # second expert always, weights normalised before drops, capacity int(2 S / E) raised to a
  # multiple of 4, f of first choices, padding in the denominators (`legacy_mtf_behavior=True`).
  # `legacy_mtf_behavior=False` is `weighting = renormalized_after_drop, loss_padding = exclude`.
  "praxis": dict(
    num_experts=8,
    top_k=2,
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=2.0,
    eval_capacity_factor=2.0,
    capacity_rounding=Rounding.FLOOR,
    capacity_multiple=4,
    drop_order=DropOrder.CHOICE_MAJOR,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    loss_padding=LossPadding.FLAXFORMER,
    balance_loss_weight=0.01,
  ),
  # deepspeedai/DeepSpeed, deepspeed/moe/sharded_moe.py `top1gating`: raw weight, capacity
  # max(ceil(CF S / E), 4), tokens served in a random order (`use_rts`; there also at evaluation,
  # here in training alone). Sizes and 0.01 of DeepSpeed-MoE, arXiv 2201.05596: top-1 of 128.
  "deepspeed_moe": dict(
    num_experts=128,
    top_k=1,
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    capacity_rounding=Rounding.CEIL,
    min_capacity=4,
    priority=Priority.RANDOM,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.01,
  ),
  # microsoft/Tutel, tutel/impls/fast_dispatch.py `extract_critical`: top-2 normalised before
  # drops, choice-major, capacity K int(CF ceil(S / E)), GShard's loss of first choices
  # (`is_gshard_loss`). Paper: arXiv 2206.03382.
  "tutel": dict(
    num_experts=8,
    top_k=2,
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    capacity_rounding=Rounding.FLOOR_OF_CEILED_TOKENS,
    drop_order=DropOrder.CHOICE_MAJOR,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.01,
  ),
  # databricks/megablocks, megablocks/layers/{arguments,router,moe,dmoe}.py: dropless top-1 of 64
  # (arXiv 2211.15841 section 6), raw softmax weights, f / K, weight 0.1. Its loss is the mean over
  # layers, ours their sum. With `overflow = drop` the capacity is int(CF K S / E), as in its `MoE`,
  # where an expert serves its assignments in token order.
  "megablocks": dict(
    num_experts=64,
    top_k=1,
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    capacity_rounding=Rounding.FLOOR,
    overflow=Overflow.DROPLESS,
    drop_order=DropOrder.TOKEN_MAJOR,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.1,
  ),
  # AI-Hypercomputer/maxtext, layers/moe.py `generate_masks` (the path with capacity_factor > 0;
  # below 0 it is dropless): softmax over the selected logits, token-major in each sequence,
  # capacity int(ceil(K S / E) CF), f of all choices (uniform = K) per sequence. Mixtral's sizes;
  # 1.25 is an example's, the default weight of its loss is 0.
  "maxtext": dict(
    num_experts=8,
    top_k=2,
    weighting=Weighting.SOFTMAX_SELECTED,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.25,
    eval_capacity_factor=1.25,
    capacity_rounding=Rounding.FLOOR_OF_CEILED_ASSIGNMENTS,
    drop_order=DropOrder.TOKEN_MAJOR,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # NVIDIA/Megatron-LM, core/transformer/moe/{router,moe_utils}.py with
  # `moe_expert_capacity_factor` set (None, its default, is `overflow = dropless`): softmax over the
  # selected logits, capacity ceil(CF K S / E), the assignments of the least weight dropped
  # (`moe_token_drop_policy = probs`), f / K. `moe_router_pre_softmax` is weighting = raw. 0.01 is
  # the value it recommends for `moe_aux_loss_coeff`; Mixtral's sizes.
  "megatron": dict(
    num_experts=8,
    top_k=2,
    weighting=Weighting.SOFTMAX_SELECTED,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    capacity_rounding=Rounding.CEIL,
    priority=Priority.WEIGHT,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.01,
  ),
}
