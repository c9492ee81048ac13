"""E04: what becomes of a router without a balance loss, and how much of one it needs."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale, vary

WEIGHTS = ("0", "1e-5", "1e-3", "1e-2", "1e-1")
_POINTS = {weight: {"moe.balance_loss_weight": float(weight)} for weight in WEIGHTS}


def get_recipe() -> Recipe:
  """Returns the recipe."""
  dropping, dropless = switch(), switch(overflow="dropless")
  return Recipe(
    name="balance_loss",
    title="Balance loss: none, and weights over four orders of magnitude",
    hypothesis=(
      "Without a balance loss a router feeds few experts and the model ends worse; over a "
      "wide range its weight hardly matters (Shazeer et al. Table 6, Switch section 2.2, "
      "OLMoE Figure 9)."
    ),
    scaled_down=(
      "8 experts and top-1 in place of 256 and top-4; 8.2 million bytes in place of ten "
      "epochs of a billion words."
    ),
    matched="active parameters, total parameters and FLOPs",
    arms=vary(
      language_model(NANO, dropping),
      {f"weight_{weight}": point for weight, point in _POINTS.items()},
    )
    | vary(
      language_model(NANO, dropless),
      {f"dropless_{weight}": _POINTS[weight] for weight in ("0", "1e-2")},
    ),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("weight_0", "weight_1e-2")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2), arms=("weight_0", "weight_1e-2")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=_claims(),
    domains=DOMAINS,
  )


def _claims() -> tuple[Claim, ...]:
  return (
    Claim(
      name="worse_without",
      text="trained with drops, a model without a balance loss ends worse",
      paper="shazeer2017_table6_perplexity",
      statistic=Contrast("eval.loss", "weight_0", "weight_1e-2"),
      expects=Expects.ABOVE,
      bound=0.03,
    ),
    Claim(
      name="unbalanced_without",
      text="without a balance loss the held-out max violation is over 1.5 times that with one",
      paper="shazeer2017_table6_max_over_mean",
      statistic=Contrast("train.max_violation", "weight_0", "weight_1e-2", relative=True),
      expects=Expects.ABOVE,
      bound=1.5,
    ),
    Claim(
      name="worse_without_drops",
      text="a model without a balance loss ends worse also where nothing is dropped",
      statistic=Contrast("eval.loss", "dropless_0", "dropless_1e-2"),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="any_weight_will_do",
      text="a tenth of Switch's weight gives the same loss",
      paper="switch2021_section2_2_alpha",
      statistic=Contrast("eval.loss", "weight_1e-3", "weight_1e-2"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
    Claim(
      name="too_much_hurts",
      text="ten times Switch's weight ends worse",
      paper="switch2021_section2_2_alpha",
      statistic=Contrast("eval.loss", "weight_1e-1", "weight_1e-2"),
      expects=Expects.ABOVE,
    ),
  )
