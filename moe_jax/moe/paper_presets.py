"""Routers as papers define them: the values of the stages, and where each of them stands.

`num_experts` and `top_k` are those of the paper's main model. A field that is not listed has the
default of `RoutingConfig`. A figure that a source leaves open is said to be open.
"""

from moe_jax.moe.options import (
  BalanceFraction,
  BalanceScope,
  BiasUpdate,
  CapacityConvention,
  DropOrder,
  Grouping,
  GroupScore,
  Importance,
  LoadThreshold,
  Noise,
  Overflow,
  Priority,
  Projection,
  Rounding,
  Score,
  Weighting,
  WeightOn,
)


def one_over_experts(num_experts: int) -> float:
  """Returns 1 / E."""
  return 1.0 / num_experts


# One entry a paper, oldest first. A value may be a function of `num_experts`.
PAPER_PRESETS: dict[str, dict] = {
  # Shazeer et al., arXiv 1701.06538: noisy top-k (Eq. 3-5) and a softmax over the kept logits;
  # k = 4 in flat layers, MoE-256 with both loss weights 0.1 (appendix C.1, Table 6). Importance
  # is the sum of the gate values (Eq. 6), the load's threshold excludes the expert itself (Eq. 8).
  # No expert has a limit: batches are the size that memory allows.
  "shazeer": dict(
    num_experts=256,
    top_k=4,
    noise=Noise.LEARNED,
    weighting=Weighting.SOFTMAX_SELECTED,
    overflow=Overflow.DROPLESS,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.0,
    importance=Importance.WEIGHTS,
    importance_loss_weight=0.1,
    load_threshold=LoadThreshold.EXCLUDE_SELF,
    load_loss_weight=0.1,
  ),
  # GShard, arXiv 2006.16668 Algorithm 1: top-2 in local groups, weights normalised before drops,
  # second expert with probability 2 g2, capacity 2S/E, auxiliary loss of first choices per group;
  # 2,048 experts in the 600B model. The rounding and the coefficient of the loss are open; 0.01 is
  # that of the authors' library (lingvo, `aux_loss_coef`).
  "gshard": dict(
    num_experts=2048,
    top_k=2,
    selection="random_second",
    second_threshold=0.5,
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    drop_order=DropOrder.CHOICE_MAJOR,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # NLLB-MoE, arXiv 2207.04672 section 6.2 and the released checkpoint (fairseq): GShard's top-2
  # without its random second choice, weights renormalised over what got a slot, two slots a token
  # in training. The release evaluates with room for every token; expert output masking of 0.2 is
  # not part of the router, but scales its weights outside training. Fairseq rounds the two slots up
  # as 2 * ceil(tokens / experts).
  "nllb": dict(
    num_experts=128,
    top_k=2,
    weighting=Weighting.RENORMALIZED_AFTER_DROP,
    weight_scale=0.8,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=2.0,
    eval_capacity_factor=lambda num_experts: float(num_experts),
    capacity_rounding=Rounding.CEIL,
    drop_order=DropOrder.CHOICE_MAJOR,
    grouping=Grouping.BATCH,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.01,
  ),
  # Switch Transformer, arXiv 2101.03961: top-1 weighted by its probability (Eq. 2), capacity
  # tokens / experts * factor (Eq. 3), loss Eq. 4 with alpha = 0.01; 128 experts in Switch-Base
  # (Table 9). The paper gives no rounding and no evaluation factor; Mesh TensorFlow, where it was
  # trained, floors and takes 1.25 and 2.0 (tensorflow/mesh, mesh_tensorflow/transformer/moe.py).
  # The input jitter of 1e-2 (Table 11) is `router_jitter` of the layer.
  "switch": dict(
    num_experts=128,
    top_k=1,
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    capacity_rounding=Rounding.FLOOR,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # BASE layers, arXiv 2103.16716: a balanced assignment in training, the best expert outside it
  # (section 2.2), and the sigmoid of the token's own logit as weight (Eq. 1 and 2); one expert on
  # each of 128 devices. Equal shares cannot overflow; evaluation has no limit. The authors assign
  # among the tokens of one worker after a random exchange, here among those of the call.
  "base": dict(
    num_experts=128,
    top_k=1,
    score=Score.SIGMOID,
    selection="base",
    weighting=Weighting.RAW,
    overflow=Overflow.DROPLESS,
    balance_loss_weight=0.0,
  ),
  # V-MoE, arXiv 2106.05974: softmax of noisy logits with standard deviation 1 / E (section 2.1),
  # every second layer 32 experts, k = 2, capacity ratio 1.05, importance and load loss (appendix
  # A). From the authors' library (google-research/vmoe): capacity rounded up to a multiple of 4
  # (the paper has round(k N P C / E)), both weights 0.005, and the expert itself counted in the
  # load's threshold. Batch prioritised routing is `priority = max_score`; training goes by
  # position. Inference varies the ratio, so evaluation has that of training here.
  "vmoe": dict(
    num_experts=32,
    top_k=2,
    noise=Noise.GAUSSIAN,
    noise_std=one_over_experts,
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.05,
    eval_capacity_factor=1.05,
    capacity_multiple=4,
    drop_order=DropOrder.CHOICE_MAJOR,
    priority=Priority.POSITION,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.0,
    importance=Importance.SCORES,
    importance_loss_weight=0.005,
    load_threshold=LoadThreshold.INCLUDE_SELF,
    load_loss_weight=0.005,
  ),
  # Hash layers, arXiv 2106.04426: the expert is a random hash of the token id (section 3), used
  # with weight 1, no loss, no limit; 64 experts in the main comparison. Its balanced hash is
  # `selection = table`, the hash of two tokens `hash_ngram = 2`.
  "hash": dict(
    num_experts=64,
    top_k=1,
    selection="hash",
    weighting=Weighting.HARD,
    overflow=Overflow.DROPLESS,
    balance_loss_weight=0.0,
  ),
  # The floor of any router: a uniformly random expert, as in THOR's training (arXiv 2110.04260
  # section 3), which draws one for a batch where this draws one for each token.
  "random": dict(
    num_experts=8,
    top_k=1,
    selection="random",
    weighting=Weighting.HARD,
    overflow=Overflow.DROPLESS,
    balance_loss_weight=0.0,
  ),
  # GLaM, arXiv 2112.06905 section 5: GShard's gating with the second expert always used; 64
  # experts, loss coefficient 0.01. The capacity factor 2 counts slots per token; its rounding is
  # open and floors as in praxis.
  "glam": dict(
    num_experts=64,
    top_k=2,
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=2.0,
    eval_capacity_factor=2.0,
    capacity_rounding=Rounding.FLOOR,
    drop_order=DropOrder.CHOICE_MAJOR,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # ST-MoE, arXiv 2202.08906: top-2 with the second expert at random above a share of 0.2 (appendix
  # C), factor 1.25 in training and 2.0 outside counting slots per token (Table 8), loss weights
  # 1e-2 and 1e-3 (sections 3 and 4); 64 experts in ST-MoE-32B. Rounding as in Mesh TensorFlow;
  # the routing groups are open.
  "st_moe": dict(
    num_experts=64,
    top_k=2,
    selection="random_second",
    second_threshold=0.2,
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    capacity_rounding=Rounding.FLOOR,
    drop_order=DropOrder.CHOICE_MAJOR,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
    z_loss_weight=0.001,
  ),
  # Expert choice, arXiv 2202.09368 section 3.2: every expert takes its k = n c / E best tokens of
  # the batch, c = 2 experts per token on average, weighted by the softmax score; 64 experts. The
  # rounding of k is open and floors as in praxis. Balanced by design, so there is no loss.
  "expert_choice": dict(
    num_experts=64,
    top_k=2,
    selection="expert_choice",
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    capacity_rounding=Rounding.FLOOR,
    balance_loss_weight=0.0,
  ),
  # Soft MoE, arXiv 2308.00951: slots mix the tokens of one image (section 2.1); 128 experts with
  # one slot each, which the paper finds best (section 3.4); tokens and slot parameters of length 1
  # and a learned scale (section 2.3).
  "soft_moe": dict(
    num_experts=128,
    projection=Projection.NORMALIZED,
    selection="soft",
    capacity=1,
    grouping=Grouping.SEQUENCE,
    balance_loss_weight=0.0,
  ),
  # Mixtral, arXiv 2401.04088 section 2.1: softmax over the two selected logits, no token dropped;
  # the auxiliary loss counts both choices over all tokens. The released code takes one loss over
  # the tokens of all layers times 0.02; ours adds up layers (`ModelAux.weighted_loss`), so divide
  # the coefficient by their number for the released strength.
  "mixtral": dict(
    num_experts=8,
    top_k=2,
    weighting=Weighting.SOFTMAX_SELECTED,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.02,
  ),
  # DeepSeekMoE 16B, arXiv 2401.06066: 6 of 64 fine-grained experts by softmax, not renormalised
  # (Eq. 9-11), expert-level loss with f / K' (Eq. 12-14), coefficient 0.001 and no drops at 16B
  # (section 5.1); the released gate averages it per sequence (`seq_aux`). The two shared experts
  # are `shared_hidden_dim` of the layer.
  "deepseek_moe": dict(
    num_experts=64,
    top_k=6,
    weighting=Weighting.RAW,
    overflow=Overflow.DROPLESS,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.001,
  ),
  # Jamba, arXiv 2403.19887 section 2: 2 of 16 experts, no drops; raw softmax weights and the
  # coefficient 0.001 from the released config. The paper does not define its loss; it is read as
  # Mixtral's, as in the released code.
  "jamba": dict(
    num_experts=16,
    top_k=2,
    weighting=Weighting.RAW,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.001,
  ),
  # DeepSeek-V2, arXiv 2405.04434: 6 of 160 experts within 3 of 8 device groups by their best expert
  # (section 2.1.2), losses over experts, devices and communication (Eq. 23-31) with alpha = 0.003,
  # 0.05 and 0.02 (section 3.1.2); weights times 16 and losses a sequence from the released config
  # (`routed_scaling_factor`, `seq_aux`). Not expressed here: the drops by a budget for each device
  # in training.
  "deepseek_v2": dict(
    num_experts=160,
    top_k=6,
    num_expert_groups=8,
    top_expert_groups=3,
    group_score=GroupScore.MAX,
    weighting=Weighting.RAW,
    weight_scale=16.0,
    overflow=Overflow.DROPLESS,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.003,
    device_loss_weight=0.05,
    communication_loss_weight=0.02,
  ),
  # OLMoE, arXiv 2409.02060: 8 of 64 experts, raw softmax weights (`norm_topk_prob` false), no
  # drops, loss weights 0.01 and 0.001 (section 4.1); f divided by K and averaged over a device's
  # batch as in MegaBlocks, where it was trained.
  "olmoe": dict(
    num_experts=64,
    top_k=8,
    weighting=Weighting.RAW,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.01,
    z_loss_weight=0.001,
  ),
  # GRIN, arXiv 2409.12136: SparseMixer-v2 (section 2.1) picks 2 of 16 experts, no drops, balance
  # loss over all data-parallel ranks (section 2.2). Its coefficient is open; 0.01 is Switch's.
  "grin": dict(
    num_experts=16,
    top_k=2,
    selection="sparsemixer",
    weighting=Weighting.SPARSEMIXER,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.GLOBAL_BATCH,
    balance_loss_weight=0.01,
  ),
  # ReMoE, arXiv 2412.14711: every expert with a positive ReLU score (Eq. 5), weighted by it. The
  # loss is E sum f P with f / k (Eq. 10), its coefficient starts at 1e-8 and is multiplied or
  # divided by 1.2 until tokens have k experts on average (Eq. 9, section 3.5); E = 8, k = 1.
  "remoe": dict(
    num_experts=8,
    top_k=1,
    score=Score.RELU,
    selection="positive",
    weighting=Weighting.RAW,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=1e-8,
    adaptive_target=1.0,
    adaptive_factor=1.2,
  ),
  # DeepSeek-V3, arXiv 2412.19437: sigmoid scores (Eq. 15), a bias for selection alone with speed
  # 0.001 (section 2.1.2), 8 of 256 experts within 4 of 8 groups by the sum of their two best,
  # weights renormalised times 2.5, no drops, a loss a sequence with alpha = 1e-4 (Eq. 17-20).
  "deepseek_v3": dict(
    num_experts=256,
    top_k=8,
    score=Score.SIGMOID,
    num_expert_groups=8,
    top_expert_groups=4,
    group_score=GroupScore.TOP2_SUM,
    bias_update=BiasUpdate.SIGN,
    bias_rate=0.001,
    weighting=Weighting.RENORMALIZED,
    weight_scale=2.5,
    overflow=Overflow.DROPLESS,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.ALL_CHOICES_MEAN,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.0001,
  ),
  # Llama 4 Scout, released code: the best of 16 experts, whose sigmoid score multiplies the
  # expert's input; no drops. No report tells the training loss; the coefficient 0.001 is that of
  # the released config. The shared expert is `shared_hidden_dim` of the layer.
  "llama4": dict(
    num_experts=16,
    top_k=1,
    score=Score.SIGMOID,
    weighting=Weighting.RAW,
    weight_on=WeightOn.INPUT,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.001,
  ),
  # Qwen3 MoE, arXiv 2505.09388 section 2: 8 of 128 experts, balance over the global batch
  # (arXiv 2501.11873); renormalised weights (`norm_topk_prob`) and 0.001 from the released config.
  "qwen3_moe": dict(
    num_experts=128,
    top_k=8,
    weighting=Weighting.RENORMALIZED,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.GLOBAL_BATCH,
    balance_loss_weight=0.001,
  ),
  # gpt-oss-120b, arXiv 2508.10925 section 2.2: 4 of 128 experts, softmax over the selected logits.
  # The training loss is open. The released config has 0.9, for a loss that it turns off
  # (`output_router_logits`); 0.001 is the present default of its class in transformers. The learned
  # bias on the logits is that of the released router.
  "gpt_oss": dict(
    num_experts=128,
    top_k=4,
    projection=Projection.AFFINE,
    weighting=Weighting.SOFTMAX_SELECTED,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.001,
  ),
}
