"""E07: what keeps training stable: float32 routers, the router z-loss, small initial weights."""

from experiments.models import DOMAINS, NANO, language_model
from experiments.routers import switch
from moe_jax.sweep.claims import Claim, Contrast, Expects, Requirement
from moe_jax.sweep.recipe import Profile, Recipe, Scale, vary

_BF16 = {"model.dtype": "bfloat16"}
_BF16_ROUTER = {**_BF16, "moe.router_dtype": "bfloat16"}
_Z_LOSS = {"moe.z_loss_weight": 1e-3}
# 16 times the rate of all recipes.
_FAST = {"optimizer.learning_rate": 6.4e-2}
_FAST_ARMS = ("fast", "fast_z_loss", "fast_bf16", "fast_bf16_router")
_FAST_STEPS = 1000


def get_recipe() -> Recipe:
  """Returns the recipe."""
  return Recipe(
    name="stability",
    title="Stability: bfloat16 routers, the router z-loss, the scale of initial weights",
    hypothesis=(
      "A router in float32 keeps a bfloat16 model from diverging, smaller initial weights end "
      "better (Switch Tables 2 and 3), and a z-loss keeps logits small at no cost in quality "
      "(ST-MoE Table 4)."
    ),
    scaled_down=(
      "8 experts in place of 32, 2 layers, 8.2 million bytes; on CPU bfloat16 products are "
      "summed in float32. Sixteen times the learning rate stands for the scale at which runs "
      f"diverge, for {_FAST_STEPS:,} steps."
    ),
    matched="active parameters, total parameters and FLOPs",
    arms=vary(
      language_model(NANO, switch()),
      {
        "plain": {},
        "z_loss": _Z_LOSS,
        "large_init": {"model.init_scale": 1.0},
        "bf16": _BF16,
        "bf16_router": _BF16_ROUTER,
        "fast": _FAST,
        "fast_z_loss": {**_FAST, **_Z_LOSS},
        "fast_bf16": {**_FAST, **_BF16},
        "fast_bf16_router": {**_FAST, **_BF16_ROUTER},
      },
    ),
    scales={
      Profile.SMOKE: Scale(steps=60, seeds=(0,), arms=("plain", "bf16_router")),
      Profile.CPU: Scale(steps=4000, seeds=(0, 1), arms=("plain", "z_loss")),
      Profile.FULL: Scale(
        steps=4000, seeds=(0, 1, 2), steps_of=dict.fromkeys(_FAST_ARMS, _FAST_STEPS)
      ),
    },
    claims=_claims(),
    domains=DOMAINS,
  )


def _claims() -> tuple[Claim, ...]:
  return (
    Claim(
      name="router_diverges",
      text="at 16 times the learning rate a bfloat16 router diverges, and a float32 one does not",
      paper="switch2021_table2_bf16",
      statistic=Contrast("diverged", "fast_bf16_router", "fast_bf16"),
      expects=Expects.ABOVE,
      bound=0.5,
      requires=Requirement("diverged", _FAST_ARMS, "no run diverged, of any of the fast arms"),
    ),
    Claim(
      name="selective_precision",
      text="a bfloat16 model with a float32 router ends at most 0.02 nats from a float32 one",
      paper="switch2021_table2_selective",
      statistic=Contrast("eval.loss", "bf16", "plain"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
    Claim(
      name="bf16_router",
      text="a bfloat16 router ends above a float32 one in the same bfloat16 model",
      paper="switch2021_table2_bf16",
      statistic=Contrast("eval.loss", "bf16_router", "bf16"),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="large_init",
      text="ten times the variance of initial weights ends above",
      paper="switch2021_table3_init",
      statistic=Contrast("eval.loss", "large_init", "plain"),
      expects=Expects.ABOVE,
    ),
    Claim(
      name="z_loss_free",
      text="the z-loss costs or gains at most 0.02 nats",
      paper="stmoe2022_table4_z_loss",
      statistic=Contrast("eval.loss", "z_loss", "plain"),
      expects=Expects.NO_DIFFERENCE,
      bound=0.02,
    ),
    Claim(
      name="z_loss_works",
      text="it halves the mean squared log-sum-exp of the router's logits",
      statistic=Contrast("train.z_loss", "z_loss", "plain", relative=True),
      expects=Expects.BELOW,
      bound=0.5,
    ),
  )
