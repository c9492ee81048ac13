"""Holds the planner's roofline against steps that can be measured here: on emulated devices.

Measures how fast this machine multiplies, moves memory and exchanges among eight emulated devices,
plans three small training steps with these rates instead of a TPU's, runs them, and writes both
into calibration.json. Everything is in CPU seconds of all threads: eight devices on two cores take
turns, and other work on the machine counts for nobody.

From the repository's root, in about two minutes: python -m experiments.pods.calibrate
"""

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models import ModelConfig
from moe_jax.moe import MoEConfig, preset
from moe_jax.planning.chips import Chip
from moe_jax.planning.collectives import CollectiveKind, find_collectives
from moe_jax.planning.hlo import parse_program
from moe_jax.planning.roofline import work_seconds
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.layout import make_layout
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.placed import place_batch
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step

RESULT = Path(__file__).parent / "calibration.json"
DEVICES = 8
_REPEATS, _ROWS, _LENGTH = 5, 16, 128
# Bytes a device takes part in: small and large, for a latency and a rate.
_SIZES = (2**14, 2**22)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """What a collective costs all devices together: CPU seconds a run, and a byte of a device."""

  latency: float
  per_byte: float


def main() -> None:
  """Measures rates and steps, writes and prints both."""
  jax.config.update("jax_num_cpu_devices", DEVICES)
  chip, exchanges = measure_chip(), measure_exchanges()
  rows = [compare(name, model, chip, exchanges) for name, model in models().items()]
  result = {
    "cores": os.cpu_count(),
    "flops_per_cpu_second": chip.peak_flops,
    "bytes_per_cpu_second": chip.hbm_bandwidth,
    "exchanges": {kind: dataclasses.asdict(each) for kind, each in exchanges.items()},
    "steps": rows,
  }
  RESULT.write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


def models() -> dict[str, ModelConfig]:
  """Returns the small models: dense, few large experts, many small ones."""
  attention = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=32)
  plain = functools.partial(ModelConfig, vocab_size=512, model_dim=256, attention=attention)

  def experts(hidden_dim, **routing):
    fields = dict(capacity_factor=1.25, overflow="drop", grouping="sequence")
    routing = preset("mixtral", **fields, **routing)
    return MoEConfig(routing, hidden_dim=hidden_dim, gated=True, activation="silu")

  layers = 2
  return {
    "dense": plain(
      segments=(("attention:dense", layers),), mlp=FeedForwardConfig(1024, True, "silu")
    ),
    "8 experts, top-2": plain(segments=(("attention:moe", layers),), moe=experts(1024)),
    "32 experts, top-4": plain(
      segments=(("attention:moe", layers),), moe=experts(256, num_experts=32, top_k=4)
    ),
  }


def measure_chip() -> Chip:
  """Returns this machine's rates, a CPU second each, as a chip's."""
  n = 1024
  product = jax.jit(lambda a, b: a @ b)
  a = jnp.ones((n, n))
  flops = 2.0 * n**3 / cpu_seconds(product, a, a)
  # As large as a step's activations on one device: larger ones would measure page faults.
  big = jnp.ones((2**20,))
  moved = 2 * big.nbytes / cpu_seconds(jax.jit(lambda x: x * 2 + 1), big)
  return Chip("cpu", "cpu", 0.0, flops, moved, 0.0, 0, 0, 0.0, DEVICES)


def measure_exchanges() -> dict[str, Exchange]:
  """Returns latency and rate of every kind of collective among all devices."""
  mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("x",))
  found = {}
  for kind, body in _BODIES.items():
    seconds = []
    for size in _SIZES:
      run = jax.jit(
        jax.shard_map(
          body,
          mesh=mesh,
          in_specs=PartitionSpec("x"),
          out_specs=PartitionSpec("x"),
          check_vma=False,
        )
      )
      # A gather's payload is what it makes.
      own = size // 4 // (DEVICES if kind == CollectiveKind.ALL_GATHER else 1)
      sharding = NamedSharding(mesh, PartitionSpec("x"))
      seconds.append(cpu_seconds(run, jax.device_put(jnp.ones((DEVICES * own,)), sharding)))
    per_byte = max(0.0, (seconds[1] - seconds[0]) / (_SIZES[1] - _SIZES[0]))
    found[kind.value] = Exchange(max(0.0, seconds[0] - per_byte * _SIZES[0]), per_byte)
  return found


_BODIES: dict[CollectiveKind, Callable] = {
  CollectiveKind.ALL_GATHER: lambda x: jax.lax.all_gather(x, "x", tiled=True),
  CollectiveKind.ALL_REDUCE: lambda x: jax.lax.psum(x, "x"),
  CollectiveKind.REDUCE_SCATTER: lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
  CollectiveKind.ALL_TO_ALL: lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True),
  CollectiveKind.PERMUTE: lambda x: jax.lax.ppermute(
    x, "x", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
  ),
}


def compare(
  name: str, model: ModelConfig, chip: Chip, exchanges: dict[str, Exchange]
) -> dict[str, float | str]:
  """Plans and runs one training step; CPU seconds of all devices together."""
  sharding = ShardingConfig(layout="fsdp", fsdp=DEVICES)
  if model.moe is not None:
    sharding = ShardingConfig(layout="ep_fsdp", fsdp=2, expert=DEVICES // 2)
  config = ExperimentConfig(model=model, batch_size=_ROWS, sharding=sharding)
  layout = make_layout(sharding, jax.devices())
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = init_state(model, optimizer, 0, layout=layout)
  batch = place_batch(_batch(model), layout)
  compiled = make_train_step(config, optimizer, layout).lower(state, batch).compile()
  program = parse_program(compiled.as_text())
  work = DEVICES * work_seconds(program, chip)
  links = sum(
    each.runs * (exchanges[each.kind].latency + each.num_bytes * exchanges[each.kind].per_byte)
    for each in find_collectives(program, layout.mesh)
  )
  measured = _measured(compiled, state, batch)
  return {
    "model": name,
    "predicted_work": work,
    "predicted_links": links,
    "predicted": work + links,
    "measured": measured,
    "error": (work + links) / measured - 1,
  }


def _measured(compiled, state, batch) -> float:
  seconds = []
  for _ in range(_REPEATS + 1):
    started = time.process_time()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.process_time() - started)
  return statistics.median(seconds[1:])


def _batch(model: ModelConfig) -> dict[str, np.ndarray]:
  shape = (_ROWS, _LENGTH)
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, dtype=np.int32)
  places = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), shape)
  ones = np.ones(shape, np.int32)
  names = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
  return dict(zip(names, (tokens, np.roll(tokens, -1, 1), ones, places, ones), strict=True))


def cpu_seconds(function: Callable, *args) -> float:
  """Returns the median CPU seconds of a call, all threads together."""
  jax.block_until_ready(function(*args))
  seconds = []
  for _ in range(_REPEATS):
    started = time.process_time()
    jax.block_until_ready(function(*args))
    seconds.append(time.process_time() - started)
  return statistics.median(seconds)


if __name__ == "__main__":
  main()
