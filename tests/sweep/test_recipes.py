"""The recipes that ship: every arm is a config that trains, and is matched by what it says."""

from pathlib import Path

import pytest
from training import tiny

from moe_jax.planning.flops import training_flops_per_token
from moe_jax.sweep.cards import config_digest
from moe_jax.sweep.paper_values import read_paper_values
from moe_jax.sweep.recipe import Profile, load_recipe, with_point
from moe_jax.training.config import experiment_from

FILES = sorted((tiny.ROOT / "experiments").glob("*/config.py"))
# Arms that cost more than the others by design: Soft MoE has a logit for every slot.
DEARER = {
  "switch_table1": ("top2_",),
  "capacity_top_n": ("top2_", "top3_"),
  "router_zoo": ("soft",),
  "data_efficiency": ("tiny_",),
  "upcycling": ("upcycled", "scratch"),
}


def _name(path: Path) -> str:
  return path.parent.name


@pytest.fixture(scope="module", params=FILES, ids=_name)
def recipe(request):
  return load_recipe(str(request.param))


def test_all_arms_are_configs(recipe):
  for profile in recipe.scales:
    names = [run.name for run in recipe.runs(profile)]
    assert len(set(names)) == len(names)
    for run in recipe.runs(profile):
      assert run.mapping()["steps"] == run.steps


def test_arms_have_the_same_flops(recipe):
  dearer = DEARER.get(recipe.name, ("-",))
  for arms in (recipe.arms, *(scale.configs for scale in recipe.scales.values() if scale.configs)):
    flops = {
      name: training_flops_per_token(experiment_from({**arm, "steps": 1}).model, 128)
      for name, arm in arms.items()
      if not name.startswith(dearer) or name == "top2_halves"
    }
    # Routers differ in size; all else is equal.
    assert max(flops.values()) / min(flops.values()) < 1.06, flops


def test_claims_about_quality_have_tokens_and_seeds(recipe):
  for profile in (Profile.CPU, Profile.FULL):
    scale = recipe.scale(profile)
    assert scale.steps * 2048 >= 8_000_000
    assert len(scale.seeds) >= (3 if profile == Profile.FULL else 2)
  assert not recipe.judged(Profile.SMOKE)
  assert recipe.judged(Profile.FULL) == recipe.claims


def test_claims_read_interventions_that_are_made(recipe):
  under = {f"interventions.{name}" for name in recipe.interventions}
  for claim in recipe.claims:
    fields = vars(claim.statistic)
    for metric in (fields.get("metric", ""), fields.get("own_metric_of_against", "")):
      if metric.startswith("interventions."):
        assert metric.rpartition(".")[0] in under, claim.name


def test_papers_are_quoted_from_the_one_list(recipe):
  values = read_paper_values(tiny.ROOT / "experiments" / "paper_values.yaml")
  for claim in recipe.claims:
    assert not claim.paper or claim.paper in values, claim.name


def test_what_changes_no_result_leaves_a_digest_as_it_is():
  mapping = tiny.mapping()
  digest = config_digest(mapping)
  assert config_digest(mapping | {"checkpoint": {"every": 1}, "faults": {"budget": 7}}) == digest
  without = {name: part for name, part in mapping.items() if name not in ("repair", "objective")}
  assert config_digest(without) == digest
  spelt_out = with_point(mapping, {"moe.z_loss_weight": 0.0})
  assert config_digest(spelt_out) == digest
  # What is saved at single steps is what other runs start from.
  points = [{"checkpoint.at": (2,)}, {"seed": 1}, {"moe.top_k": 2}, {"data.sequence_length": 16}]
  for point in [*points, {"log.every": 2}]:
    assert config_digest(with_point(mapping, point)) != digest


def test_recipe_is_named_like_its_folder():
  for path in FILES:
    assert load_recipe(str(path)).name == _name(path)


def test_every_quoted_number_is_used():
  used = {claim.paper for path in FILES for claim in load_recipe(str(path)).claims}
  values = read_paper_values(tiny.ROOT / "experiments" / "paper_values.yaml")
  assert set(values) <= used
  assert all(value.source.startswith("arXiv ") for value in values.values())
