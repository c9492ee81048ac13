"""A recipe whose runs take a second, on a corpus of the tests."""

from training import tiny

from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale


def get_recipe() -> Recipe:
  """Returns the recipe: a dense arm, and one with experts."""
  return Recipe(
    name="tiny",
    title="A recipe of the tests",
    hypothesis="Experts help.",
    scaled_down="Everything is.",
    matched="active FLOPs",
    arms={"dense": tiny.mapping("dense"), "moe": tiny.mapping("moe")},
    scales={
      Profile.SMOKE: Scale(steps=2, seeds=(0,)),
      Profile.CPU: Scale(steps=2, seeds=(0, 1), arms=("moe",)),
    },
    claims=(
      Claim("less", "experts lose less", Contrast("eval.loss", "moe", "dense"), Expects.BELOW),
      Claim(
        "drops",
        "room helps",
        Contrast(
          "interventions.tight.dropped_fraction",
          "moe",
          "moe",
          own_metric_of_against="interventions.wide.dropped_fraction",
        ),
        Expects.ABOVE,
      ),
    ),
    interventions={
      "tight": "overflow=drop,eval_capacity_factor=0.5",
      "wide": "overflow=drop,eval_capacity_factor=4.0",
    },
    domains={"all": "beginnings"},
  )
