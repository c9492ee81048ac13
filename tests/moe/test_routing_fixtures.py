"""Presets reproduce what two public libraries computed; see fixtures/gating/README.md.

`preset_of` needs a file's name alone, so files of other seeds and shapes are judged alike: put them
in the folder.
"""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from moe.compiled import FAST_COMPILE

from moe_jax.moe import preset, route

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "gating"
# The files hold float32 results.
COMBINE_TOLERANCE = 1e-6
# Praxis adds 1e-6 to the real fraction, which is a relative 2e-6 of its loss.
LOSS_RELATIVE_TOLERANCE = 1e-5


def files(family):
  paths = sorted(FIXTURES.glob(f"{family}_*.npz"))
  assert paths, f"no {family} fixture in {FIXTURES}"
  return [pytest.param(path, id=path.stem) for path in paths]


def numbers_in(name):
  """Returns the numbers of a file's name by the letters before them."""
  return {letters: int(digits) for letters, digits in re.findall(r"([A-Za-z]+)(\d+)", name)}


def preset_of(name):
  """Returns the router of a file, from its name alone."""
  numbers = numbers_in(name)
  sizes = dict(num_experts=numbers["E"], capacity=numbers["C"])
  if name.startswith("tokens_choose"):
    priority = "max_score" if numbers["bpr"] else "position"
    return preset("flaxformer", top_k=numbers["K"], priority=priority, **sizes)
  if name.startswith("experts_choose"):
    return preset("expert_choice", **sizes)
  if numbers["legacy"]:
    return preset("praxis", **sizes)
  return preset("praxis", weighting="renormalized_after_drop", loss_padding="exclude", **sizes)


def mask_of(arrays):
  if "paddings" in arrays:
    return arrays["paddings"] == 0
  return arrays["padding_mask"] > 0 if "padding_mask" in arrays else everything(arrays)


def everything(arrays):
  return np.ones(arrays["logits"].shape[:2], bool)


@functools.cache
def compiled(config):
  """Returns a function of (logits, mask) that gives dispatch, combine and losses alone."""

  def call(logits, mask):
    plan = route(logits, config, token_mask=mask)
    return plan.dispatch_mask(), plan.combine_weights(), plan.losses

  return jax.jit(call, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("path", files("*"))
def test_a_preset_and_the_name_of_the_file_give_what_the_library_computed(path):
  with np.load(path) as file:
    arrays = dict(file)
  route_it = compiled(preset_of(path.stem))
  dispatch, combine, losses = route_it(arrays["logits"], mask_of(arrays))
  np.testing.assert_array_equal(dispatch, arrays["dispatch"].astype(bool))
  np.testing.assert_allclose(combine, arrays["combine"], rtol=0, atol=COMBINE_TOLERANCE)
  if "aux_loss" in arrays:
    loss = float(losses["load_balance"])
    assert loss == pytest.approx(float(arrays["aux_loss"]), rel=LOSS_RELATIVE_TOLERANCE)
  if "router_z_loss" in arrays:
    # The library's z-loss was taken of all logits as they stand, those of padding too.
    z_loss = float(route_it(arrays["logits"], everything(arrays))[2]["router_z"])
    assert z_loss == pytest.approx(float(arrays["router_z_loss"]), rel=LOSS_RELATIVE_TOLERANCE)


def test_every_family_is_there():
  families = [path.stem.split("_G")[0] for path in FIXTURES.glob("*.npz")]
  counts = {family: families.count(family) for family in set(families)}
  assert counts == {"tokens_choose": 20, "gshard_top2": 16, "experts_choose": 5}
