"""E09: routers of ten papers on one model, at equal active FLOPs."""

from experiments.models import DOMAINS, NANO, SMALL, Size, language_model, on_gpu
from experiments.routers import NUM_EXPERTS, fine_grained, switch
from moe_jax.moe import preset
from moe_jax.sweep.claims import Claim, Contrast, Expects, Rank
from moe_jax.sweep.recipe import Profile, Recipe, Scale

_PAGE = ("dense", "random", "hash", "top1", "top2_halves")


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="router_zoo",
    title="Routers of ten papers at equal active FLOPs",
    hypothesis=(
      "At equal active FLOPs routers order as random, dense, hash, Switch, top-2, "
      "fine-grained, the last one best (DeepSeekMoE Table 1, Hash Layers, S-BASE)."
    ),
    scaled_down=(
      "8 experts; bytes in place of subwords, of which a hash knows much less. Expert "
      "choice and Soft MoE look at later tokens of the sequence: their losses are no "
      "predictions, they are listed and not judged."
    ),
    matched="active parameters and FLOPs, but those of routers; nothing is dropped",
    arms=_arms(NANO),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=_PAGE),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1), arms=_PAGE),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
      Profile.GPU: on_gpu(_arms(SMALL)),
    },
    claims=_claims(),
    domains=DOMAINS,
  )


def _arms(size: Size) -> dict[str, dict]:
  own = {"num_experts": NUM_EXPERTS}
  # What one expert a token costs: c = 1, and as many slots as a sequence has tokens.
  expert_choice = preset("expert_choice", top_k=1, grouping="sequence", **own)
  soft = preset("soft_moe", capacity=16, **own)
  routers = {
    "random": preset("random", **own),
    "hash": preset("hash", **own),
    "hash_bigram": preset("hash", hash_ngram=2, **own),
    # The exact assignment of BASE takes 30 times the rest of a step; S-BASE (Clark et al.,
    # arXiv 2202.01169) has Sinkhorn's in its place.
    "s_base": preset("base", selection="sinkhorn", **own),
    "top1": switch(overflow="dropless"),
    "loss_free": switch(
      overflow="dropless", balance_loss_weight=0.0, bias_update="sign", bias_rate=1e-3
    ),
    "expert_choice": expert_choice,
    "soft": soft,
  }
  arms = {"dense": language_model(size)}
  arms |= {name: language_model(size, router) for name, router in routers.items()}
  for name, times in (("top2_halves", 2), ("top4_quarters", 4)):
    router = fine_grained(times, overflow="dropless")
    arms[name] = language_model(size, router, expert_dim=size.hidden_dim // times)
  return arms


def _claims() -> tuple[Claim, ...]:
  worst_first = ("random", "dense", "hash", "top1", "top2_halves", "top4_quarters")
  return (
    Claim(
      name="order_of_routers",
      text="random, dense, hash, top-1, top-2 of halves, top-4 of quarters: ever lower losses",
      paper="deepseekmoe2024_table1_order",
      statistic=Rank("eval.loss", worst_first),
      expects=Expects.ABOVE,
      bound=0.7,
    ),
    Claim(
      name="random_is_worst",
      text="random experts end above the dense model: experts that cannot specialise are no gain",
      statistic=Contrast("eval.loss", "random", "dense"),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="learned_beats_hash",
      text="a learned top-1 router ends below a hash of the token",
      paper="deepseekmoe2024_table1_switch_minus_hash",
      statistic=Contrast("eval.loss", "top1", "hash"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="balanced_as_top1",
      text="balanced assignment (S-BASE) ends at most 0.02 nats from Switch's top-1",
      statistic=Contrast("eval.loss", "s_base", "top1"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
  )
