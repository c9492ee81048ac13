"""E02: Table 1 of Switch Transformers: dense, top-1 and top-2 at three capacity factors."""

from experiments.models import DOMAINS, NANO, SMALL, Size, language_model, on_gpu
from experiments.routers import fine_grained, switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale

FACTORS = (1.0, 1.25, 2.0)


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="switch_table1",
    title="Switch Table 1: dense, top-1 and top-2 at three capacity factors",
    hypothesis=(
      "A sparse model of the same FLOPs is far better than the dense one, one expert a "
      "token does as well as two, and small capacities do as well as large ones (Switch "
      "Table 1)."
    ),
    scaled_down=(
      "8 experts in both layers of a two-layer decoder in place of 128 in every other "
      "layer of T5-Base; 8.2 million bytes."
    ),
    matched="active parameters and FLOPs, but top-2 of whole experts, which has more of both",
    arms=_arms(NANO),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("dense", "top1_1.25", "top2_1.25")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2), arms=("dense", "top1_1.25")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
      Profile.GPU: on_gpu(_arms(SMALL)),
    },
    claims=_claims(),
    interventions={
      f"capacity_{factor:g}": f"overflow=drop,eval_capacity_factor={factor:g}" for factor in FACTORS
    },
    domains=DOMAINS,
  )


def _arms(size: Size) -> dict[str, dict]:
  arms = {"dense": language_model(size)}
  for top_k in (1, 2):
    for factor in FACTORS:
      arms[f"top{top_k}_{factor:g}"] = language_model(size, switch(factor, top_k))
  # Top-2 costs the FLOPs of two experts: halves of experts compare at equal ones.
  arms["top2_halves"] = language_model(size, fine_grained(2), expert_dim=size.hidden_dim // 2)
  return arms


def _claims() -> tuple[Claim, ...]:
  return (
    Claim(
      name="beats_dense",
      text="Switch is at least 0.05 nats below the dense model of the same active FLOPs",
      paper="switch2021_table1_switch_minus_dense",
      statistic=Contrast("eval.loss", "top1_1.25", "dense"),
      expects=Expects.BELOW,
      bound=-0.05,
    ),
    Claim(
      name="top1_as_top2",
      text="top-1 ends as low as top-2 of whole experts, which has twice their FLOPs",
      paper="switch2021_table1_top1_minus_top2",
      statistic=Contrast("eval.loss", "top1_1.25", "top2_1.25"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
    Claim(
      name="top1_as_halves",
      text="top-1 ends as low as top-2 of half experts at the same FLOPs",
      statistic=Contrast("eval.loss", "top1_1.25", "top2_halves"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
    Claim(
      name="small_factors_do",
      text="Switch trained at capacity factor 1 ends at most 0.025 nats from one trained at 2",
      paper="switch2021_table1_capacity",
      statistic=Contrast("eval.loss", "top1_1", "top1_2"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.025,
    ),
  )
