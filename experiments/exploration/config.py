"""E08: how a top-1 router explores: Table 11 of Switch Transformers, and experts with dropout."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale, vary

_ARMS = {
  "argmax": {},
  "jitter": {"moe.router_jitter": 0.01},
  "sampled": {"moe.selection": "sample"},
  # As V-MoE's: a standard deviation of 1 / E.
  "noisy": {"moe.noise": "gaussian", "moe.noise_std": 0.125},
  "expert_dropout": {"moe.expert_dropout": 0.1},
}


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="exploration",
    title="Exploration: the best expert, jitter, noise, a sampled expert, dropout in experts",
    hypothesis=(
      "Multiplying the router's input by small noise does as well as always taking the best"
      " expert; sampling the expert is far worse (Switch Table 11). Dropout in experts was"
      " used in fine-tuning alone (Switch Table 4)."
    ),
    scaled_down=(
      "8 experts, 8.2 million bytes. Dropout of the router's input, the fourth row of the"
      " table, is not offered. Held-out text is routed to the best expert in all arms."
    ),
    matched="active parameters, total parameters and FLOPs",
    arms=vary(language_model(NANO, switch()), _ARMS),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("argmax", "sampled")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2), arms=("argmax", "sampled")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=(
      Claim(
        name="sampling_is_worst",
        text="a sampled expert ends above the best one",
        paper="switch2021_table11_sampled",
        statistic=Contrast("eval.loss", "sampled", "argmax"),
        expects=Expects.ABOVE,
      ),
      Claim(
        name="jitter_changes_little",
        text="jitter of 1 % ends at most 0.02 nats from none",
        paper="switch2021_table11_jitter",
        statistic=Contrast("eval.loss", "jitter", "argmax"),
        expects=Expects.NO_DIFFERENCE,
        bound=0.02,
      ),
      Claim(
        name="noise_changes_little",
        text="noise of 1 / E on the logits ends at most 0.02 nats from none",
        statistic=Contrast("eval.loss", "noisy", "argmax"),
        expects=Expects.NO_DIFFERENCE,
        bound=0.02,
      ),
      Claim(
        name="expert_dropout_hurts_pretraining",
        text="with a tenth of the experts' units dropped the loss ends higher: nothing overfits",
        statistic=Contrast("eval.loss", "expert_dropout", "argmax"),
        expects=Expects.ABOVE,
      ),
    ),
    domains=DOMAINS,
  )
