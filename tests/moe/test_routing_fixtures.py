"""`route` reproduces what two public libraries computed; see fixtures/gating/README.md."""

import pathlib
import re

import numpy as np
import pytest
from moe.compiled import routed

from moe_jax.moe import BalanceFraction, LossPadding, Priority, RoutingConfig, Weighting

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "gating"
# The files hold float32 results.
COMBINE_TOLERANCE = 1e-6
# Praxis adds 1e-6 to the real fraction, which is a relative 2e-6 of its loss.
LOSS_RELATIVE_TOLERANCE = 1e-5


def files(family):
  paths = sorted(FIXTURES.glob(f"{family}_*.npz"))
  assert paths, f"no {family} fixture in {FIXTURES}"
  return [pytest.param(path, id=path.stem) for path in paths]


def load(path):
  """Returns the arrays of a file and the numbers in its name, by their letters."""
  pairs = re.findall(r"([A-Za-z]+)(\d+)", path.stem.split("_", 2)[2])
  with np.load(path) as file:
    return dict(file), {letter: int(number) for letter, number in pairs}


def assert_same(plan, arrays):
  np.testing.assert_array_equal(plan.dispatch_mask(), arrays["dispatch"].astype(bool))
  np.testing.assert_allclose(
    plan.combine_weights(), arrays["combine"], rtol=0, atol=COMBINE_TOLERANCE
  )
  loss = float(plan.losses["load_balance"])
  assert loss == pytest.approx(float(arrays["aux_loss"]), rel=LOSS_RELATIVE_TOLERANCE)


@pytest.mark.parametrize("path", files("tokens_choose"))
def test_route_equals_flaxformer_tokens_choose(path):
  arrays, numbers = load(path)
  config = RoutingConfig(
    num_experts=numbers["E"],
    top_k=numbers["K"],
    capacity=numbers["C"],
    weighting=Weighting.RAW,
    priority=Priority.MAX_SCORE if numbers["bpr"] else Priority.POSITION,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    loss_padding=LossPadding.FLAXFORMER,
  )
  plan = routed(arrays["logits"], config, mask=arrays["padding_mask"] > 0)
  assert_same(plan, arrays)
  # The library's z-loss was taken of all logits as they stand, those of padding too.
  z_loss = float(routed(arrays["logits"], config).losses["router_z"])
  assert z_loss == pytest.approx(float(arrays["router_z_loss"]), rel=LOSS_RELATIVE_TOLERANCE)


@pytest.mark.parametrize("path", files("gshard_top2"))
def test_route_equals_praxis_top2(path):
  arrays, numbers = load(path)
  legacy = numbers["legacy"]
  config = RoutingConfig(
    num_experts=numbers["E"],
    top_k=2,
    capacity=numbers["C"],
    weighting=Weighting.RENORMALIZED if legacy else Weighting.RENORMALIZED_AFTER_DROP,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    loss_padding=LossPadding.FLAXFORMER if legacy else LossPadding.EXCLUDE,
  )
  plan = routed(arrays["logits"], config, mask=arrays["paddings"] == 0)
  assert_same(plan, arrays)
