"""A run on spot slices that are taken away twice ends as one that nobody disturbed."""

import json
import sys

import jax
import numpy as np
import pytest
from cloud.stand_in import REQUEST, ROOT, World, faults_of, real_gcloud
from distributed.tiny_processes import cache, free_port
from training import tiny

from moe_jax.training.saved_run import load_run

pytestmark = pytest.mark.slow

# Steps long enough, and enough of them, that each preemption finds the run at work.
SIZES = dict(
  steps=36,
  batch_size=8,
  data__sequence_length=128,
  eval__every=1000,
  checkpoint__every=8,
  model__segments=(("attention:moe", 1),),
  model__scan_unroll=1,
  moe__grouping="sequence",
  sharding__layout="ep_fsdp",
  sharding__fsdp=2,
  sharding__expert=2,
)
# The first is told, the second is not.
PREEMPTIONS = [[6, "SIGTERM"], [22, "SIGKILL"]]
QUOTA_ERRORS = 2
WALL_CLOCK = {"tokens_per_second"}
BUCKET = "gs://bucket/run-1"


def train(folder, compiled, **faults):
  """Launches the run in such a world; returns the world, the outcome and the run folder."""
  workdir = folder / "shared" / "run"
  ports = [free_port() for _ in range(len(faults.get("preemptions", [])) + 1)]
  world = World(folder, hosts=2, workdir=str(workdir), ports=ports, **faults)
  variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"} | cache(compiled)
  variables |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  settings = " ".join(f"{name}={value}" for name, value in variables.items())
  program = f"{sys.executable} {ROOT / 'tests/distributed/tiny_processes.py'} lives"
  world.program("moe-jax", f'exec env {settings} {program} "$@"')
  words = [w for w in tiny.command(workdir, **SIZES)[1:] if not w.startswith("--workdir=")]
  request = (*REQUEST, f"--workdir={workdir}", "--share=ready", f"--bucket={BUCKET}")
  done = world.launch("run", *request, "--then=delete", "--", *words)
  return world, done, workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cloud")
  calm = train(folder / "calm", folder / "compiled")
  stormy = train(
    folder / "stormy", folder / "compiled", preemptions=PREEMPTIONS, quota_errors=QUOTA_ERRORS
  )
  return calm, stormy


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_both_runs_are_done_and_the_stand_in_was_what_they_called(runs):
  for world, done, workdir in runs:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (workdir / "summary.json").is_file()
    assert world.calls(), "no command reached the stand-in: the real gcloud comes first on the PATH"


def test_lost_slices_are_deleted_and_made_again(runs):
  (calm, *_), (stormy, done, _) = runs
  state = json.loads((stormy.folder / "state.json").read_text())
  assert state["preemptions"] == len(PREEMPTIONS) and state["quota_errors"] == QUOTA_ERRORS
  life = ["describe", "scp", "ssh"]
  assert calm.verbs() == ["describe", "create", *life, "describe", "delete"]
  again = [*life, "describe", "delete", "describe", "create"]
  assert stormy.verbs() == ["describe", "create", *again, *again, *life, "describe", "delete"]
  assert "Quota limit" in done.stderr and state["resource"] is None


def test_the_disturbed_run_went_on_from_checkpoints(runs):
  _, (_, done, workdir) = runs
  said = done.stdout + done.stderr
  assert said.count(f"resuming {workdir} at step") == len(PREEMPTIONS)


def test_the_disturbed_run_ends_with_the_bits_of_the_other(runs):
  (_, _, calm), (_, _, stormy) = runs
  assert [row["step"] for row in rows(stormy)] == list(range(1, SIZES["steps"] + 1))
  for a, b in zip(rows(calm), rows(stormy), strict=True):
    assert {k: v for k, v in a.items() if k not in WALL_CLOCK} == {
      k: v for k, v in b.items() if k not in WALL_CLOCK
    }
  states = [jax.tree.leaves(jax.device_get(load_run(workdir)[2])) for workdir in (calm, stormy)]
  for a, b in zip(*states, strict=True):
    np.testing.assert_array_equal(a, b)


def test_run_folder_and_logs_are_in_the_bucket(runs):
  _, (world, _, workdir) = runs
  bucket = world.folder / "buckets" / "bucket" / "run-1"
  assert (bucket / "run" / "summary.json").read_text() == (workdir / "summary.json").read_text()
  assert list((bucket / "logs").glob("*/run-1/log"))


@pytest.mark.skipif(real_gcloud() is None, reason="Google's command-line interface is not here")
def test_every_recorded_command_is_one_that_google_knows(runs):
  faults = faults_of([call for world, *_ in runs for call in world.calls()])
  assert not faults, faults
