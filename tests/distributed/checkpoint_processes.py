"""Several processes of two devices each that only save, or only restore, a small tree.

As a program: `python checkpoint_processes.py save|restore WORKDIR COORDINATOR COUNT ID`.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

ROOT = Path(__file__).parents[2]
STEPS = (2, 4)


def host_tree(step: int) -> dict[str, np.ndarray]:
  """Returns what a step holds: an array to split, one of another dtype, one to copy."""
  rng = np.random.default_rng(step)
  return {
    "split": rng.normal(size=(16, 6)).astype(np.float32),
    "half": rng.normal(size=(8, 3)).astype(jnp.bfloat16),
    "copied": np.asarray(step, np.int32),
  }


def abstract_tree() -> dict[str, jax.ShapeDtypeStruct]:
  """Returns its shapes on the mesh of all devices."""
  mesh = jax.make_mesh((jax.device_count(),), ("all",))
  places = {name: PartitionSpec("all") for name in ("split", "half")} | {"copied": PartitionSpec()}
  return {
    name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, places[name]))
    for name, a in host_tree(0).items()
  }


def start(what: str, workdir: Path, port: int, count: int, devices: int) -> list[subprocess.Popen]:
  """Starts the processes, with output to be read from their pipes."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
  }
  return [
    subprocess.Popen(
      [sys.executable, __file__, what, workdir, f"localhost:{port}", str(count), str(each)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for each in range(count)
  ]


def save_all(checkpoints) -> None:
  """Saves every step, each process the parts on its own devices."""
  for step in STEPS:
    tree = {
      name: jax.make_array_from_callback(a.shape, abstract.sharding, lambda i, a=a: a[i])
      for (name, a), abstract in zip(host_tree(step).items(), abstract_tree().values(), strict=True)
    }
    checkpoints.save(step, tree, {"step": step})


def restore_newest(checkpoints) -> None:
  """Restores the newest sound step, checks the parts on its own devices, and prints the step."""
  step, tree, data = checkpoints.restore_latest(abstract_tree())
  assert data == {"step": step}
  for name, array in tree.items():
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, host_tree(step)[name][shard.index])
  print(f"restored {step}")


if __name__ == "__main__":
  from moe_jax.sharding.processes import joined_processes
  from moe_jax.training.checkpoint import Checkpoints
  from moe_jax.training.config import CheckpointConfig

  what, workdir, coordinator, count, process = sys.argv[1:]
  with joined_processes(coordinator, int(count), int(process)):
    with Checkpoints(Path(workdir), CheckpointConfig(), say=print) as checkpoints:
      (save_all if what == "save" else restore_newest)(checkpoints)
