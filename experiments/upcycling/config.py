"""E13: a dense model upcycled in the middle of its training, against going on and starting anew."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.convert.surgery import UpcycleOptions
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale, vary
from moe_jax.sweep.upcycled_start import UpcycledFrom

_STEPS, _BRANCH = 4000, 2000
# With two experts of two layers a token costs 1.5 times the FLOPs of the dense model.
_SAME_FLOPS = _BRANCH + 1333
_STARTS = {
  "upcycled": UpcycledFrom("dense", _BRANCH),
  "upcycled_flops": UpcycledFrom("dense", _BRANCH),
  "upcycled_noise": UpcycledFrom("dense", _BRANCH, UpcycleOptions(noise=0.1)),
}


def get_recipe() -> Recipe:
  """Returns the recipe."""
  dense = language_model(NANO)
  experts = language_model(NANO, switch(top_k=2, overflow="dropless"))
  return Recipe(
    name="upcycling",
    title="Sparse upcycling against more dense training and against experts from the start",
    hypothesis=(
      "A dense model whose networks are copied into experts ends below the same model trained "
      "on, and below experts trained from scratch for as many steps as it got after that (sparse "
      "upcycling); experts trained from scratch all along end lower still (OLMoE section 4.1)."
    ),
    scaled_down=(
      "8 experts, two a token, in both layers of a nano model in place of 32 in every other "
      f"layer of T5; the dense model is upcycled at step {_BRANCH:,} of {_STEPS:,} with optimiser, "
      "schedule and place in the data. The cost of an upcycled arm is that after the branch."
    ),
    matched=(
      f"data and seeds; two experts a token cost 1.5 times the dense FLOPs, and `upcycled_flops` "
      f"gets {_SAME_FLOPS - _BRANCH:,} steps after the branch, as many FLOPs as the dense "
      f"{_STEPS - _BRANCH:,}"
    ),
    arms=vary(dense, {"dense": {"checkpoint.at": (_BRANCH,)}})
    | vary(experts, dict.fromkeys((*_STARTS, "scratch", "scratch_half"), {})),
    starts=_STARTS,
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("dense", "scratch")),
      Profile.CPU: Scale(steps=_STEPS, seeds=(0, 1), arms=("dense", "upcycled")),
      Profile.FULL: Scale(
        steps=_STEPS,
        seeds=(0, 1, 2),
        steps_of={"upcycled_flops": _SAME_FLOPS, "scratch_half": _STEPS - _BRANCH},
      ),
    },
    claims=_claims(),
    domains=DOMAINS,
  )


def _claims() -> tuple[Claim, ...]:
  return (
    Claim(
      name="exact",
      text="copies with renormalised weights are the dense model (largest difference of a logit)",
      statistic=Contrast("branch.relative_difference", "upcycled"),
      expects=Expects.BELOW,
      bound=1e-5,
    ),
    Claim(
      name="beats_dense",
      text="an upcycled model ends below the dense one, both trained on for as many steps",
      paper="upcycling2022_dense",
      statistic=Contrast("eval.loss", "upcycled", "dense"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="beats_dense_by_flops",
      text="so it does with as many FLOPs",
      statistic=Contrast("eval.loss", "upcycled_flops", "dense"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="beats_scratch",
      text="it ends below experts from scratch that got the steps it got after the branch",
      paper="upcycling2022_scratch",
      statistic=Contrast("eval.loss", "upcycled", "scratch_half"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="scratch_beats",
      text="experts from scratch with all steps end below it",
      paper="olmoe2024_upcycling",
      statistic=Contrast("eval.loss", "scratch", "upcycled"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="noise",
      text="noise of a tenth on the copies changes the loss by at most 0.02 nats",
      paper="upcycling2022_noise",
      statistic=Contrast("eval.loss", "upcycled_noise", "upcycled"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
  )
