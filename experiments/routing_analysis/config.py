"""E14: when routing settles, and what experts come to read (OLMoE, Mixtral)."""

from experiments.models import DOMAINS, NANO, Size, language_model
from experiments.routers import fine_grained, switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale, vary

# 1, 10 and 40 % of the full profile's steps.
_CHECKPOINTS = (40, 400, 1600)
_FOUR_LAYERS = Size(NANO.model_dim, NANO.num_heads, NANO.hidden_dim, (("attention:FFN", 4),))


def get_recipe() -> Recipe:
  """Returns the recipe."""
  half = _FOUR_LAYERS.hidden_dim // 2
  whole = language_model(_FOUR_LAYERS, switch())
  halves = language_model(_FOUR_LAYERS, fine_grained(2), expert_dim=half)
  followed = {"checkpoint.at": _CHECKPOINTS}
  return Recipe(
    name="routing_analysis",
    title="Routing over training: when it settles, what repeats, who reads what",
    hypothesis=(
      "Routing settles early, in later layers first; experts specialise by domain and by "
      "token (OLMoE section 5); consecutive tokens go to the same expert more often than chance "
      "and unequal load explain (Mixtral section 5)."
    ),
    scaled_down=(
      "Four layers of 8 experts, or of 16 halves of which a token takes two, in place of 16 "
      "layers of 64 and of 32 of 8; bytes in place of words; 8.2 million tokens in place of 5 "
      "trillion."
    ),
    matched="active parameters (but routers), total parameters and FLOPs",
    arms=vary(whole, {"top_1": followed}) | vary(halves, {"top_2": followed}),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,)),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1), arms=("top_2",)),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=_claims(),
    domains=DOMAINS,
    history=True,
  )


def _claims() -> tuple[Claim, ...]:
  saturation, repetition = "history.saturation.step_{}.{}", "history.repetition_first.{}"
  return (
    Claim(
      name="settles_at_once",
      text="after 1 % of the steps a layer chooses 60 % of the experts that it ends with",
      paper="olmoe2024_saturation_1",
      statistic=Contrast(saturation.format(40, "max"), "top_2"),
      expects=Expects.ABOVE,
      bound=0.6,
    ),
    Claim(
      name="settled",
      text="after 40 % of the steps a layer chooses 80 % of them",
      paper="olmoe2024_saturation_40",
      statistic=Contrast(saturation.format(1600, "max"), "top_2"),
      expects=Expects.ABOVE,
      bound=0.8,
    ),
    Claim(
      name="later_layers_first",
      text="after 10 % of the steps the last layer has settled further than the first",
      paper="olmoe2024_saturation_layers",
      statistic=_layers(
        "top_2", saturation.format(400, "layer_3"), saturation.format(400, "layer_0")
      ),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="repeats",
      text="in the last layer consecutive tokens share the first choice more often than by chance",
      paper="mixtral2024_repetition",
      statistic=_layers("top_2", repetition.format("layer_3"), repetition.format("floor")),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="repeats_beyond_load",
      text="and by over a tenth more often than unequal load explains",
      statistic=Contrast("history.repetition_lift.layer_3", "top_2"),
      expects=Expects.ABOVE,
      bound=1.1,
    ),
    Claim(
      name="domains",
      text="the experts tell over 2 % of the domain, more than by chance",
      paper="olmoe2024_domains",
      statistic=_layers(
        "top_2", "history.domain_information.mean", "history.domain_information.floor"
      ),
      expects=Expects.ABOVE,
      bound=0.02,
    ),
    Claim(
      name="tokens",
      text="the last layer is more specialised by token than the first",
      paper="olmoe2024_vocabulary",
      statistic=_layers(
        "top_2",
        "history.vocabulary_specialization.layer_3",
        "history.vocabulary_specialization.layer_0",
      ),
      expects=Expects.ABOVE,
    ),
  )


def _layers(arm: str, metric: str, other: str) -> Contrast:
  """Returns one number of a run's routing minus another one of the same run."""
  return Contrast(metric, arm, arm, own_metric_of_against=other)
