"""E10: smaller and more experts, and a shared one (DeepSeekMoE, OLMoE)."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import NUM_EXPERTS, fine_grained, switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale

TIMES = (2, 4, 8)


def get_recipe() -> Recipe:
  """Returns the recipe."""
  arms = {"whole": language_model(NANO, switch(overflow="dropless"))}
  for times in TIMES:
    part = NANO.hidden_dim // times
    arms[f"parts_{times}"] = language_model(
      NANO, fine_grained(times, overflow="dropless"), expert_dim=part
    )
  # One of the four parts that a token takes is the same for all; one routed expert less in all.
  part = NANO.hidden_dim // 4
  routing = switch(
    top_k=3,
    num_experts=NUM_EXPERTS * 4 - 1,
    overflow="dropless",
    balance_fraction="all_choices_mean",
  )
  arms["parts_4_shared"] = language_model(
    NANO, routing, expert_dim=part, moe={"shared_hidden_dim": part}
  )
  return Recipe(
    name="granularity",
    title="Granularity: experts cut into parts, and one of four parts shared by all tokens",
    hypothesis=(
      "Cutting experts into smaller ones of which a token takes more lowers the loss, with "
      "ever smaller gains; whether a shared part helps is disputed (DeepSeekMoE section 4, "
      "OLMoE section 4.1)."
    ),
    scaled_down=("8 experts cut into at most 64 parts of 32 hidden units, 8.2 million bytes."),
    matched="active parameters (but routers), total parameters and FLOPs; nothing is dropped",
    arms=arms,
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("whole", "parts_4")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1), arms=("whole", "parts_4")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=(
      Claim(
        name="finer_is_better",
        text="quarters of experts, four a token, end below whole ones",
        paper="deepseekmoe2024_table1_fine_grained",
        statistic=Contrast("eval.loss", "parts_4", "whole"),
        expects=Expects.BELOW,
      ),
      Claim(
        name="gain_saturates",
        text="the step from quarters to eighths gains at most 0.02 nats",
        paper="olmoe2024_granularity",
        statistic=Contrast("eval.loss", "parts_8", "parts_4"),
        expects=Expects.NO_DIFFERENCE,
        bound=0.02,
      ),
      Claim(
        name="shared_helps",
        text="a shared part ends below routing all four (DeepSeekMoE; OLMoE found the opposite)",
        paper="deepseekmoe2024_shared",
        statistic=Contrast("eval.loss", "parts_4_shared", "parts_4"),
        expects=Expects.BELOW,
      ),
    ),
    domains=DOMAINS,
  )
