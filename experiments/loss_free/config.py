"""E05: balance by a bias that only the selection sees, instead of by a loss."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects
from moe_jax.sweep.recipe import Profile, Recipe, Scale, vary

_BIAS = {"moe.balance_loss_weight": 0.0}


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="loss_free",
    title="Loss-free balancing: a selection bias by its rate and rule, against a balance loss",
    hypothesis=(
      "A selection bias that follows the load balances better than a loss and costs no "
      "quality (Loss-Free Balancing Table 2 and 3)."
    ),
    scaled_down=(
      "8 experts and top-1 in place of 64 and top-6; 4,000 steps in place of tens of "
      "thousands, so that a rate of 1e-3 can move a bias by 4 at most."
    ),
    matched="active parameters, total parameters and FLOPs; nothing is dropped in training",
    arms=vary(
      language_model(NANO, switch(overflow="dropless")),
      {
        "loss_1e-2": {"moe.balance_loss_weight": 1e-2},
        "loss_1e-3": {"moe.balance_loss_weight": 1e-3},
        "sign_1e-2": {**_BIAS, "moe.bias_update": "sign", "moe.bias_rate": 1e-2},
        "sign_1e-3": {**_BIAS, "moe.bias_update": "sign", "moe.bias_rate": 1e-3},
        "magnitude_1e-2": {**_BIAS, "moe.bias_update": "magnitude", "moe.bias_rate": 1e-2},
        "sigmoid_loss_1e-2": {"moe.score": "sigmoid", "moe.balance_loss_weight": 1e-2},
        "sigmoid_sign_1e-3": {
          **_BIAS,
          "moe.score": "sigmoid",
          "moe.bias_update": "sign",
          "moe.bias_rate": 1e-3,
        },
      },
    ),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("loss_1e-2", "sign_1e-3")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1, 2), arms=("loss_1e-2", "sign_1e-3")),
      Profile.FULL: Scale(steps=4000, seeds=(0, 1, 2)),
    },
    claims=_claims(),
    domains=DOMAINS,
  )


def _claims() -> tuple[Claim, ...]:
  return (
    Claim(
      name="better_balanced",
      text="the bias leaves at most 0.7 times the held-out max violation of the loss",
      paper="lossfree2024_table2_max_violation",
      statistic=Contrast("routing.max_violation", "sign_1e-3", "loss_1e-2", relative=True),
      expects=Expects.BELOW,
      bound=0.7,
    ),
    Claim(
      name="no_worse",
      text="the bias ends with no worse a loss (at most 0.01 nats more)",
      paper="lossfree2024_table2_perplexity",
      statistic=Contrast("eval.loss", "sign_1e-3", "loss_1e-2"),
      expects=Expects.BELOW,
      bound=0.01,
    ),
    Claim(
      name="sign_as_magnitude",
      text="updates by sign and by magnitude end with the same loss",
      paper="lossfree2024_table3_perplexity",
      statistic=Contrast("eval.loss", "magnitude_1e-2", "sign_1e-3"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
    Claim(
      name="fast_rates_oscillate",
      text="a rate of 1e-2 balances training batches worse than 1e-3",
      paper="lossfree2024_rates",
      statistic=Contrast("train.max_violation", "sign_1e-2", "sign_1e-3"),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="sigmoid_better_balanced",
      text="with sigmoid scores too, the bias leaves at most 0.7 times the max violation",
      statistic=Contrast(
        "routing.max_violation", "sigmoid_sign_1e-3", "sigmoid_loss_1e-2", relative=True
      ),
      expects=Expects.BELOW,
      bound=0.7,
    ),
  )
