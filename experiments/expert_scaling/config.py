"""E03: more experts at the same FLOPs, and the law of Clark et al. (arXiv 2202.01169)."""

from experiments.models import DOMAINS, NANO, SMALL, Size, language_model, on_gpu
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects, Rank, Slope
from moe_jax.sweep.recipe import Profile, Recipe, Scale

EXPERTS = (1, 2, 4, 8, 16, 32)


def get_recipe() -> Recipe:
  """Returns the recipe."""
  arms = _arms(NANO)
  names = tuple(arms)
  return Recipe(
    name="expert_scaling",
    title="Expert scaling: 1 (dense) to 32 experts of which a token takes one",
    hypothesis=(
      "More experts at the same FLOPs lower the loss, by a power law with ever smaller "
      "gains (Switch Figure 4, Clark et al.)."
    ),
    scaled_down=(
      "1 to 32 experts in place of 1 to 512; one model size, so that the law's term of "
      "both is not fitted."
    ),
    matched="active parameters (but routers) and FLOPs",
    arms=arms,
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=names[:2]),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1), arms=(names[0], names[2], names[3])),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
      Profile.GPU: on_gpu(_arms(SMALL)),
    },
    claims=(
      Claim(
        name="loss_falls_with_experts",
        text="the loss falls with every doubling of the experts",
        paper="switch2021_figure4",
        statistic=Rank("eval.loss", names),
        expects=Expects.ABOVE,
        bound=0.8,
      ),
      Claim(
        name="power_law",
        text="the logarithm of the loss falls linearly with that of the number of experts",
        paper="clark2022_table_b",
        statistic=Slope("eval.loss", tuple(zip(names, EXPERTS, strict=True))),
        expects=Expects.BELOW,
      ),
      Claim(
        name="two_experts_help",
        text="two experts already end below the dense model",
        paper="switch2021_figure12",
        statistic=Contrast("eval.loss", "experts_2", "experts_1"),
        expects=Expects.BELOW,
      ),
    ),
    domains=DOMAINS,
  )


def _arms(size: Size) -> dict[str, dict]:
  arms = {"experts_1": language_model(size)}
  for count in EXPERTS[1:]:
    router = switch(num_experts=count, overflow="dropless")
    arms[f"experts_{count}"] = language_model(size, router)
  return arms
