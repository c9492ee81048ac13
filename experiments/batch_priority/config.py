"""E12: batch prioritised routing (V-MoE): who goes without when slots are short."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale

FACTORS = (0.125, 0.25, 0.5, 1.0)
PRIORITIES = {"position": "position", "priority": "max_score"}


def get_recipe() -> Recipe:
  """Returns the recipe: evaluations of weights that were trained without any priority."""
  return Recipe(
    name="batch_priority",
    title="Batch prioritised routing at small evaluation capacities, the same weights",
    hypothesis=(
      "When slots are short, giving them to the tokens whose router is surest loses less "
      "than giving them to the first ones (V-MoE section 4)."
    ),
    scaled_down=(
      "Language in place of images. The order looks at the whole batch, which a causal "
      "model may not do when it generates: these are scores, not a way to serve."
    ),
    matched="the weights themselves",
    arms={"top1_1.25": language_model(NANO, switch())},
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,)),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2)),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=tuple(
      Claim(
        name=f"priority_at_{factor:g}",
        text=f"at capacity factor {factor:g} the surest tokens first lose less than the first ones",
        paper="vmoe2021_batch_priority",
        statistic=Contrast(
          f"interventions.priority_{factor:g}.loss",
          "top1_1.25",
          "top1_1.25",
          own_metric_of_against=f"interventions.position_{factor:g}.loss",
        ),
        expects=Expects.BELOW,
      )
      for factor in FACTORS[:3]
    ),
    interventions={
      f"{name}_{factor:g}": f"overflow=drop,eval_capacity_factor={factor:g},priority={priority}"
      for name, priority in PRIORITIES.items()
      for factor in FACTORS
    },
    domains=DOMAINS,
  )
