"""The oracle reproduces what two public libraries computed; see fixtures/gating/README.md."""

import pathlib
import re

import numpy as np
import pytest
from oracles import losses, metrics, routing

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "gating"
# The files hold float32 results; the oracle works in float64.
COMBINE_TOLERANCE = 1e-6
LOSS_RELATIVE_TOLERANCE = 1e-5


def fixture_names(family):
  """Return the names of one family's files; an empty folder must not read as a passing test."""
  names = sorted(path.stem for path in FIXTURES.glob(f"{family}_*.npz"))
  assert names, f"no {family} fixture in {FIXTURES}"
  return names


def load(name):
  """Return one file's arrays and the numbers in its name, by their letters."""
  numbers = {
    key: int(value) for key, value in re.findall(r"([A-Za-z]+)(\d+)", name.split("_", 2)[2])
  }
  with np.load(FIXTURES / f"{name}.npz") as file:
    return dict(file), numbers


def assert_routing_matches(groups, arrays):
  """Check dispatch exactly and combine closely against one file."""
  dispatch = np.stack([group.dispatch for group in groups])
  combine = np.stack([group.combine for group in groups])
  np.testing.assert_array_equal(dispatch, arrays["dispatch"].astype(bool))
  np.testing.assert_allclose(combine, arrays["combine"], rtol=0, atol=COMBINE_TOLERANCE)


def selections(groups, top_k):
  """Return the scores (G, S, E) and the K best experts (G, S, K) of routed groups."""
  scores = np.stack([group.scores for group in groups])
  selected = [[routing.top_experts(row, top_k) for row in group] for group in scores]
  return scores, np.array(selected)


@pytest.mark.parametrize("name", fixture_names("tokens_choose"))
def test_tokens_choose_matches_flaxformer(name):
  arrays, numbers = load(name)
  token_mask = arrays["padding_mask"] > 0
  groups = routing.route(
    arrays["logits"],
    top_k=numbers["K"],
    capacity=numbers["C"],
    weighting="raw",
    drop_order="choice_major",
    priority="max_score" if numbers["bpr"] else "position",
    token_mask=token_mask,
  )
  assert_routing_matches(groups, arrays)

  scores, selected = selections(groups, numbers["K"])
  aux_loss = losses.load_balance_loss(
    scores, selected, kind="all_choices", scope="group", padding="flaxformer", token_mask=token_mask
  )
  assert aux_loss == pytest.approx(float(arrays["aux_loss"]), rel=LOSS_RELATIVE_TOLERANCE)
  # The library's z-loss function knows no padding, and the files hold its value on the plain
  # logits.
  z_loss = losses.router_z_loss(arrays["logits"], token_mask=None)
  assert z_loss == pytest.approx(float(arrays["router_z_loss"]), rel=LOSS_RELATIVE_TOLERANCE)


@pytest.mark.parametrize("name", fixture_names("gshard_top2"))
def test_gshard_top2_matches_praxis(name):
  arrays, numbers = load(name)
  token_mask = arrays["paddings"] == 0
  groups = routing.route(
    arrays["logits"],
    top_k=2,
    capacity=numbers["C"],
    weighting="renormalized" if numbers["legacy"] else "renormalized_after_drop",
    drop_order="choice_major",
    priority="position",
    token_mask=token_mask,
  )
  assert_routing_matches(groups, arrays)

  scores, selected = selections(groups, 2)
  aux_loss = losses.load_balance_loss(
    scores,
    selected,
    kind="gshard",
    scope="group",
    padding="flaxformer" if numbers["legacy"] else "exclude",
    token_mask=token_mask,
  )
  assert aux_loss == pytest.approx(float(arrays["aux_loss"]), rel=LOSS_RELATIVE_TOLERANCE)

  assignments = metrics.all_assignments(groups)
  kept_choices = [metrics.kept_per_token(group.assignments, len(group.scores)) for group in groups]
  real_counts = np.concatenate(kept_choices)[token_mask.reshape(-1)]
  np.testing.assert_array_equal(np.bincount(real_counts, minlength=3), arrays["dispatched_0_1_2"])
  for choice in range(2):
    one_rank = [one for one in assignments if one.choice == choice]
    fraction = metrics.dropped_assignments(one_rank)
    assert fraction == pytest.approx(float(arrays["over_capacity"][choice]), abs=1e-6)
