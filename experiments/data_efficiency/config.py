"""E16: how many tokens a sparse model needs for a dense one's loss (GLaM, OLMoE, Switch)."""

from experiments.models import DOMAINS, NANO, TINY, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects, Speedup
from moe_jax.sweep.recipe import Profile, Recipe, Scale


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="data_efficiency",
    title="Data efficiency: tokens to the dense model's loss, at two sizes",
    hypothesis=(
      "At equal active FLOPs a sparse model reaches the dense model's last loss with a third"
      " of the tokens (OLMoE Figure 4), and its lead grows with the tokens (GLaM section 6)."
    ),
    scaled_down=(
      "8 experts; 8.2 million bytes; models of 0.13 and 0.9 million active parameters. The"
      " curve is evaluated every 1,000 steps and is straight between."
    ),
    matched="active parameters (but routers) and FLOPs, size by size",
    arms={
      "dense": language_model(NANO),
      "top1": language_model(NANO, switch()),
      "tiny_dense": language_model(TINY),
      "tiny_top1": language_model(TINY, switch()),
    },
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("dense", "top1")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1), arms=("dense", "top1")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=(
      Claim(
        name="fewer_tokens",
        text="the dense model needs over 1.3 times the tokens that the sparse one does",
        paper="olmoe2024_figure4",
        statistic=Speedup("top1", "dense"),
        expects=Expects.ABOVE,
        bound=1.3,
      ),
      Claim(
        name="fewer_tokens_when_larger",
        text="so does the larger dense model",
        paper="olmoe2024_figure4",
        statistic=Speedup("tiny_top1", "tiny_dense"),
        expects=Expects.ABOVE,
        bound=1.3,
      ),
      Claim(
        name="beats_dense_when_larger",
        text="the larger sparse model ends below the larger dense one",
        paper="switch2021_table1_switch_minus_dense",
        statistic=Contrast("eval.loss", "tiny_top1", "tiny_dense"),
        expects=Expects.BELOW,
      ),
    ),
    domains=DOMAINS,
  )
