"""E15: training with drops at three capacity factors against training without any."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale

FACTORS = (1.0, 1.5, 2.0)


def get_recipe() -> Recipe:
  """Returns the recipe."""
  arms = {f"capacity_{factor:g}": language_model(NANO, switch(factor)) for factor in FACTORS}
  arms["dropless"] = language_model(NANO, switch(overflow="dropless"))
  return Recipe(
    name="dropless_vs_drop",
    title="Dropless training against capacity factors",
    hypothesis=(
      "Tokens that are dropped in training cost quality: the smaller the capacity, the "
      "more (MegaBlocks Figure 2)."
    ),
    scaled_down=(
      "8 experts and a two-layer decoder in place of 64 experts and GPT-2 sizes. Speed is "
      "compared in experiments/benchmarks."
    ),
    matched="active parameters and total parameters; drops save their FLOPs",
    arms=arms,
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,)),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2), arms=("capacity_1", "dropless")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=tuple(
      Claim(
        name=f"dropless_beats_{factor:g}",
        text=f"trained without drops a model ends below one trained at capacity factor {factor:g}",
        paper="megablocks2022_figure2",
        statistic=Contrast("eval.loss", "dropless", f"capacity_{factor:g}"),
        expects=Expects.BELOW,
      )
      for factor in FACTORS
    ),
    domains=DOMAINS,
  )
