"""How configs are trained on pods where they leave it open, and what is refused."""

import dataclasses
import re

import pytest
from training import tiny

from moe_jax.config.load import load_config
from moe_jax.errors import UserError
from moe_jax.planning import compiled
from moe_jax.planning.pod import default_sharding, pod_run
from moe_jax.planning.pod_plan import kernel_fill, model_flops_per_device
from moe_jax.planning.topology import Topology, parse_topology
from moe_jax.sharding.config import ShardingConfig
from moe_jax.training.config import experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state


def experiment(source: str):
  return experiment_from(load_config(f"{tiny.ROOT}/configs/{source}").to_dict())


def test_mixtral_on_64_chips():
  run = pod_run(experiment("mixtral.py:8x7b"), parse_topology("v5p:4x4x4"))
  sharding, routing = run.experiment.sharding, run.experiment.model.moe.routing
  assert (sharding.layout, sharding.fsdp, sharding.expert) == ("ep_fsdp", 8, 8)
  assert run.tokens == 64 * 8192
  # A device has two sequences, which share their slots.
  assert (routing.group_size, routing.capacity_factor, routing.overflow) == (8192, 1.25, "drop")
  said = " ".join(run.assumptions)
  for part in ("128 sequences", "in place of dropless", "8,192 tokens", "AdamW", "remat = full"):
    assert part in said


def test_what_the_user_says_is_kept():
  base, topology = experiment("mixtral.py:8x7b"), parse_topology("v5p:4x4x4")
  run = pod_run(base, topology, layout="fsdp", batch_size=64, dispatch="ragged")
  assert run.experiment.sharding.sizes["fsdp"] == 64
  assert run.experiment.batch_size == 64
  assert run.experiment.model.moe.routing == base.model.moe.routing
  assert pod_run(run.experiment, topology).experiment.sharding == run.experiment.sharding


@pytest.mark.parametrize("given", [dict(layout="fsdp", fsdp=-1), dict(layout="ep", expert=-1)])
def test_one_size_for_the_whole_pod_is_a_mesh(given):
  base, topology = experiment("mixtral.py:8x7b"), parse_topology("v5p:4x4x4")
  sharding = ShardingConfig(**given)
  run = pod_run(dataclasses.replace(base, sharding=sharding), topology)
  assert run.experiment.sharding == sharding


def test_what_the_config_says_of_devices_besides_sizes_is_kept():
  base, topology = experiment("mixtral.py:8x7b"), parse_topology("v5p:4x4x4")
  given = ShardingConfig(layout="ep", chunks=2)
  run = pod_run(dataclasses.replace(base, sharding=given), topology)
  sharding = run.experiment.sharding
  assert (sharding.layout, sharding.expert, sharding.chunks) == ("ep", 8, 2)
  given = ShardingConfig(exchange="all_gather")
  sharding = pod_run(dataclasses.replace(base, sharding=given), topology).experiment.sharding
  assert (sharding.layout, sharding.exchange) == ("ep_fsdp", "all_gather")


def test_long_attention_of_many_heads_runs_in_blocks():
  v3 = experiment("deepseek.py:v3")
  run = pod_run(v3, parse_topology("v5p:8x8x8"))
  assert run.experiment.model.latent_attention.query_block == 512
  assert "attention in blocks of 512 queries" in run.assumptions
  short = dataclasses.replace(v3, data=dataclasses.replace(v3.data, sequence_length=512))
  assert (
    pod_run(short, parse_topology("v5p:8x8x8")).experiment.model
    == pod_run(short, parse_topology("v5p:4x8x8")).experiment.model
  )


@pytest.mark.parametrize(
  ("source", "topology", "expected"),
  [
    # Two experts a device, and little else: nothing is gathered.
    ("switch.py:c", "v5p:8x8x16", dict(layout="ep", expert=1024)),
    # Dense layers are half a terabyte with their moments: more devices share them.
    ("glam.py:64b_64e", "v5p:8x8x16", dict(layout="ep_fsdp", expert=16, fsdp=64)),
    ("glam.py:8b", "v5p:4x4x4", dict(layout="fsdp", fsdp=64)),
    ("mixtral.py:8x7b", "v6e:2x4", dict(layout="ep_fsdp", expert=2, fsdp=4)),
  ],
)
def test_default_meshes(source, topology, expected):
  sharding = default_sharding(experiment(source).model, parse_topology(topology))
  assert {name: getattr(sharding, name) for name in expected} == expected


@pytest.mark.parametrize("layout", ["dp", "tp", "ep", "ep_tp", "ep_fsdp", "ep_wide", "fsdp_tp"])
def test_every_layout_fills_the_pod(layout):
  model = experiment("mixtral.py:8x7b").model
  for slices in (1, 2):
    topology = parse_topology("v5p:4x4x4", slices)
    sharding = default_sharding(model, topology, layout)
    product = 1
    for size in sharding.sizes.values():
      product *= size
    assert (product, sharding.num_slices) == (topology.num_chips, slices)


def test_a_mesh_of_another_size_is_refused():
  base = experiment("mixtral.py:8x7b")
  sharded = dataclasses.replace(
    base, sharding=default_sharding(base.model, parse_topology("v5e:4x8"))
  )
  with pytest.raises(UserError, match=r"config.sharding has 32 devices and v5p:4x4x4 \(64 chips\)"):
    pod_run(sharded, parse_topology("v5p:4x4x4"))


def test_model_flops_of_a_device():
  run = pod_run(experiment("mixtral.py:8x7b"), parse_topology("v5p:4x4x4"))
  # 79.7 GFLOP a token, as the config's docstring says, for 8,192 tokens a device.
  assert model_flops_per_device(run, parse_topology("v5p:4x4x4")) == pytest.approx(
    79.7e9 * 8192, rel=1e-3
  )


def test_rows_of_ragged_kernels_that_are_tokens():
  topology = parse_topology("v5p:4x4x4")
  base = experiment("mixtral.py:8x7b")

  def fill(**sizes):
    sharding = ShardingConfig(layout="ep_fsdp", **sizes)
    run = pod_run(dataclasses.replace(base, sharding=sharding), topology, dispatch="ragged")
    return kernel_fill(run, compiled.make_layout(sharding, topology.places()).mesh)

  # Eight devices can each send all their tokens to one expert, where a quarter arrives.
  assert fill(fsdp=8, expert=8) == 2 / 8
  # Two can each send every token to both of its experts, of which half arrives.
  assert fill(fsdp=32, expert=-1) == 1 / 2


def test_microbatches_that_the_pod_does_not_divide_are_refused():
  topology = parse_topology("v5p:4x4x4")
  run = pod_run(experiment("mixtral.py:8x7b"), topology)
  config = dataclasses.replace(run.experiment, accumulation_steps=4)
  layout = compiled.make_layout(config.sharding, topology.places())
  with pytest.raises(UserError, match="the axis batch of a microbatch has size 32, .* make it 64"):
    compiled.abstract_batch(dataclasses.replace(run, experiment=config), layout)


@pytest.mark.parametrize(
  ("text", "need"),
  [
    ("RESOURCE_EXHAUSTED: Used 120.00G of 95.74G hbm. Exceeded", 120.0),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
      " (100.58G) exceeds available HBM (95.74G).",
      None,
    ),
    ("RESOURCE_EXHAUSTED: Used 30.00G of 15.75G hbm", 30.0),
  ],
)
def test_a_step_that_does_not_fit_says_what_would(text, need):
  topology = parse_topology("v5p:4x4x4")
  run = pod_run(experiment("mixtral.py:8x7b"), topology)
  config = run.experiment
  layout = compiled.make_layout(config.sharding, topology.places())
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = abstract_state(config.model, optimizer, layout=layout)
  message = str(compiled._refusal(ValueError(text), run, state, topology))
  # Experts are on 64 devices, the rest on the 8 of fsdp.
  held = (45.1e9 / 64 + 1.6e9 / 8) * 12 / 2**30
  found = re.search(r"needs ([\d.]+) GiB .* has ([\d.]+), ([\d.]+) of them", message)
  assert float(found[3]) == pytest.approx(held, rel=0.01)
  assert float(found[1]) == pytest.approx(need or 100.58 + held, rel=0.01)
  assert "fewer than these 8,192 tokens a device" in message
  assert "\n" not in message


def test_state_that_is_too_large_names_a_larger_slice(monkeypatch):
  topology = parse_topology("v5p:2x2x1")
  run = pod_run(experiment("mixtral.py:8x7b"), topology)
  monkeypatch.setattr(compiled, "bytes_per_device", lambda tree: 140 * 2.0**30)
  error = ValueError("Used 160.00G of 95.00G hbm")
  # 140 GiB of state on 4 chips and 20 GiB for the rest: 75 GiB a chip hold it on 7.5 of them.
  assert "use v5p:2x2x2 (8 chips)" in str(compiled._refusal(error, run, None, topology))
  topology = parse_topology("v5p:2x2x1", 2)
  run = pod_run(experiment("mixtral.py:8x7b"), topology)
  message = str(compiled._refusal(error, run, None, topology))
  assert "use 2 slices of v5p:2x2x2 (16 chips)" in message


@pytest.mark.parametrize(
  ("source", "used", "advice"),
  [
    ("mixtral.py:8x7b", 160, "ep_fsdp"),
    ("glam.py:8b", 160, "fsdp"),
    # No batch is small enough where the weights alone are too large.
    ("mixtral.py:8x7b", 300, "ep_fsdp"),
  ],
)
def test_copies_that_are_too_large_are_no_smaller_on_more_chips(source, used, advice, monkeypatch):
  topology = parse_topology("v5p:4x4x4")
  run = pod_run(experiment(source), topology, layout="dp")
  monkeypatch.setattr(compiled, "bytes_per_device", lambda tree: 140 * 2.0**30)
  error = ValueError(f"Used {used}.00G of 95.00G hbm")
  message = str(compiled._refusal(error, run, None, topology))
  assert f"use --layout={advice}, which splits every parameter" in message


def test_libtpu_that_is_missing_is_told(monkeypatch):
  def none(**_):
    raise RuntimeError("libtpu.so not found")

  monkeypatch.setattr("moe_jax.planning.topology.topologies.get_topology_desc", none)
  with pytest.raises(UserError, match="needs the compiler of libtpu.*pip install 'moe_jax"):
    Topology(parse_topology("v5p:4x4x4").chip, (4, 4, 4)).devices()
