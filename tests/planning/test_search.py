"""The search ranks by closed formulas and compiles the best; the compiler is a stand-in here."""

import dataclasses

import pytest
from training import tiny

from moe_jax.config.load import load_config
from moe_jax.errors import UserError
from moe_jax.planning import search as search_module
from moe_jax.planning.pod import pod_run
from moe_jax.planning.search import candidate_of, naive_run, rank, search
from moe_jax.planning.topology import Topology, parse_topology
from moe_jax.training.config import experiment_from


@pytest.fixture
def topology(monkeypatch):
  """A pod without libtpu."""

  def refuse(self):
    raise UserError("libtpu is missing")

  monkeypatch.setattr(Topology, "devices", refuse)
  return parse_topology("v5p:4x4x4")


@pytest.fixture
def libtpu(topology, monkeypatch):
  """As if it were there."""
  monkeypatch.setattr(Topology, "devices", Topology.places)


def run_on(topology, source="mixtral.py:8x7b", **options):
  experiment = experiment_from(load_config(f"{tiny.ROOT}/configs/{source}").to_dict())
  return pod_run(experiment, topology, **options)


def test_the_estimate_is_near_what_was_compiled(topology):
  # Compiled: 3.46 s and about 25 GiB; plain fsdp gathers eight times as much of experts.
  run = run_on(topology)
  estimate = candidate_of(run, topology).estimate
  assert estimate.step == pytest.approx(3.46, rel=0.15)
  assert estimate.compute == pytest.approx(2.37, rel=0.02)
  assert estimate.peak_bytes / 2**30 == pytest.approx(25, rel=0.3)
  assert estimate.links["tokens"] == pytest.approx(0.161, rel=0.01)
  naive = candidate_of(naive_run(run, topology), topology).estimate
  assert naive.links["weights of experts"] > 4 * estimate.links["weights of experts"]


def test_microbatches_gather_weights_again_and_remat_computes_again(topology):
  run = run_on(topology)
  once = candidate_of(run, topology).estimate
  config = dataclasses.replace(run.experiment, accumulation_steps=2)
  routing = dataclasses.replace(config.model.moe.routing, group_size=4096)
  moe = dataclasses.replace(config.model.moe, routing=routing)
  model = dataclasses.replace(config.model, moe=moe)
  twice = dataclasses.replace(run, experiment=dataclasses.replace(config, model=model))
  twice = candidate_of(twice, topology).estimate
  assert twice.links["weights of experts"] == 2 * once.links["weights of experts"]
  assert twice.links["tokens"] == once.links["tokens"]
  assert twice.peak_bytes < once.peak_bytes
  model = dataclasses.replace(run.experiment.model, remat="none")
  kept = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, model=model))
  kept = candidate_of(kept, topology).estimate
  assert kept.compute < once.compute and kept.peak_bytes > once.peak_bytes


def test_a_mesh_that_divides_no_batch_or_groups_is_no_candidate(topology):
  assert candidate_of(run_on(topology, batch_size=100), topology) is None
  run = run_on(topology)
  config = dataclasses.replace(run.experiment, accumulation_steps=4)
  # A microbatch has 64 groups for 64 devices only with groups of a quarter.
  assert candidate_of(dataclasses.replace(run, experiment=config), topology) is None


def few(monkeypatch):
  monkeypatch.setattr(search_module, "_TENSOR", (1,))
  monkeypatch.setattr(search_module, "_MICROBATCHES", (1,))


def test_ranked_by_expected_time_and_all_fit(topology, monkeypatch):
  few(monkeypatch)
  ranked, refused = rank(run_on(topology), topology)
  steps = [each.estimate.step for each in ranked]
  assert steps == sorted(steps) and refused > 0
  assert max(each.estimate.peak_bytes for each in ranked) <= 0.9 * topology.chip.hbm_bytes
  assert {each.run.experiment.sharding.layout for each in ranked} == {"fsdp", "ep_fsdp"}


def test_the_best_are_compiled_and_what_fails_is_kept_with_the_reason(
  topology, libtpu, monkeypatch
):
  few(monkeypatch)
  tried = []

  def compile_or_fail(run, _):
    tried.append(run)
    if len(tried) == 1:
      raise UserError("too large by 3 GiB")
    return type("Plan", (), {"step_seconds": 10.0 - len(tried)})()

  monkeypatch.setattr(search_module, "plan_pod", compile_or_fail)
  found = search(run_on(topology), topology, compile_best=2)
  assert [reason for _, reason in found.too_large] == ["too large by 3 GiB"]
  # The faster first, whatever the formulas thought.
  assert [plan.step_seconds for _, plan in found.compiled] == [7.0, 8.0]
  assert found.naive[0].label == "fsdp (fsdp 64)"
  assert len({each.experiment.sharding for each in tried[:3]} | {1}) > 2


def test_nothing_that_fits_once_compiled_is_one_sentence(topology, libtpu, monkeypatch):
  few(monkeypatch)

  def fail(run, _):
    raise UserError("too large by 3 GiB")

  monkeypatch.setattr(search_module, "plan_pod", fail)
  with pytest.raises(UserError, match=r"none of the \d+ layouts .* fitting does; .*by 3 GiB"):
    search(run_on(topology), topology)


def test_nothing_that_fits_is_one_sentence(topology, libtpu, monkeypatch):
  few(monkeypatch)
  monkeypatch.setattr(search_module, "_FILLED", 0.0)
  with pytest.raises(UserError, match=r"none of \d+ layouts of this model fits into v5p:4x4x4"):
    search(run_on(topology), topology)


def test_a_missing_compiler_is_told_before_the_ranking(topology, monkeypatch):
  monkeypatch.setattr(search_module, "rank", None)
  with pytest.raises(UserError, match="libtpu is missing"):
    search(run_on(topology), topology)
