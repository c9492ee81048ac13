"""E06: Table 8 of ST-MoE: capacity factors in training and in evaluation, for top-1 to top-3."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects, Statistic
from moe_jax.sweep.recipe import Profile, Recipe, Scale

TRAINED = ((1, 0.75), (1, 1.0), (1, 1.25), (1, 2.0), (2, 1.25), (2, 2.0), (3, 2.0))
EVALUATED = (0.75, 1.0, 1.25, 2.0, 3.0)


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="capacity_top_n",
    title="ST-MoE Table 8: training and evaluation capacity for top-1, top-2 and top-3",
    hypothesis=(
      "Room in training and room in evaluation both help a little, and so does another "
      "expert a token (ST-MoE Table 8)."
    ),
    scaled_down=(
      "8 experts in place of 32, 8.2 million bytes in place of 100 billion tokens. Slots "
      "are counted per token, as there."
    ),
    matched="total parameters; top-2 and top-3 have more active parameters and FLOPs",
    arms={
      f"top{top_k}_{factor:g}": language_model(NANO, switch(factor, top_k))
      for top_k, factor in TRAINED
    },
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("top1_1", "top1_2")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2), arms=("top1_1.25",)),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=_claims(),
    interventions={
      f"capacity_{factor:g}": f"overflow=drop,eval_capacity_factor={factor:g}"
      for factor in EVALUATED
    },
    domains=DOMAINS,
  )


def _at(factor: str, against: str, arm: str = "top1_1.25") -> Statistic:
  """Returns the difference between two capacities of the same weights."""
  own, other = (f"interventions.capacity_{each}.loss" for each in (factor, against))
  return Contrast(own, arm, arm, own_metric_of_against=other)


def _claims() -> tuple[Claim, ...]:
  return (
    Claim(
      name="more_room_in_evaluation",
      text="the same weights evaluated at capacity factor 2 lose less than at 1.25",
      paper="stmoe2022_table8_top1_eval",
      statistic=_at("2", "1.25"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="less_room_in_evaluation",
      text="the same weights evaluated at capacity factor 0.75 lose more than at 1.25",
      statistic=_at("0.75", "1.25"),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="more_room_in_training",
      text="top-1 trained at capacity factor 1.25 ends below one trained at 0.75",
      paper="stmoe2022_table8_top1_train",
      statistic=Contrast("eval.loss", "top1_1.25", "top1_0.75"),
      expects=Expects.BELOW,
    ),
    Claim(
      name="top3_as_top2",
      text="top-3 ends at most 0.02 nats from top-2, both at capacity factor 2",
      paper="stmoe2022_table8_top3_minus_top2",
      statistic=Contrast("eval.loss", "top3_2", "top2_2"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
  )
