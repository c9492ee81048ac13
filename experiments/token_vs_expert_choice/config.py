"""E11: tokens that choose experts against experts that choose tokens, and what of it is a leak."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import NUM_EXPERTS, switch
from moe_jax.moe import preset
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale

# The same weights with every token at the expert that its own router likes best.
_CAUSAL = "selection=top_k,top_k=1,priority=position,overflow=dropless"


def get_recipe() -> Recipe:
  """Returns the recipe."""
  # c = 1: as many assignments as tokens, what top-1 costs.
  chosen = preset("expert_choice", num_experts=NUM_EXPERTS, top_k=1, grouping="sequence")
  return Recipe(
    name="token_vs_expert_choice",
    title="Expert choice against token choice in a language model, with a causal evaluation",
    hypothesis=(
      "Experts that choose are perfectly balanced and learn faster (Expert Choice, section"
      " 4), but which tokens they take depends on later ones: as a language model they are"
      " not causal, and token choice is the better router (OLMoE section 4.1)."
    ),
    scaled_down="8 experts, one a token on average; sequences of 128 bytes, 8.2 million in all.",
    matched="active parameters (but routers), total parameters and FLOPs",
    arms={
      "token_choice": language_model(NANO, switch(overflow="dropless")),
      "expert_choice": language_model(NANO, chosen),
    },
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,)),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2)),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=(
      Claim(
        name="experts_are_balanced",
        text="where experts choose, their load in training is even",
        paper="expertchoice2022_balance",
        statistic=Contrast("train.max_violation", "expert_choice"),
        expects=Expects.NO_DIFFERENCE,
        bound=0.02,
      ),
      Claim(
        name="the_leak_is_used",
        text="evaluated causally, with tokens choosing, the weights of expert choice lose more",
        statistic=Contrast(
          "interventions.causal.loss",
          "expert_choice",
          "expert_choice",
          own_metric_of_against="eval.loss",
        ),
        expects=Expects.ABOVE,
      ),
      Claim(
        name="token_choice_is_better_causally",
        text="evaluated causally, expert choice ends above token choice",
        paper="olmoe2024_token_choice",
        statistic=Contrast(
          "interventions.causal.loss",
          "expert_choice",
          "token_choice",
          own_metric_of_against="eval.loss",
        ),
        expects=Expects.ABOVE,
      ),
    ),
    interventions={"causal": _CAUSAL},
    domains=DOMAINS,
  )
