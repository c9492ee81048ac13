#!/usr/bin/env python3
"""A stand-in for gcloud: queued resources with states, faults by script, hosts that are processes.

Everything lies in the folder $FAKE_GCLOUD: `script.json` says what happens, `state.json` what is,
`calls.jsonl` records every command. Hosts are folders, in which `ssh` runs commands as processes
that the environment tells of each other, as it does on Slurm; buckets are folders too.

script.json: hosts; quota_errors, how many creations fail first; preemptions, a list of [STEP,
SIGNAL]: when metrics.jsonl has that step, the hosts' processes get the signal and the slices are
suspended.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])
# One look a state, so that each of them is seen.
COMING = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def load(name: str, default):
  path = ROOT / name
  return json.loads(path.read_text()) if path.exists() else default


def update(change) -> dict:
  """Changes the state while no other call does."""
  with (ROOT / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = load("state.json", {"quota_errors": 0, "preemptions": 0, "resource": None})
    change(state)
    (ROOT / "state.json").write_text(json.dumps(state))
    return state


def fail(text: str, status: int = 1):
  print(f"ERROR: (gcloud) {text}", file=sys.stderr)
  sys.exit(status)


def flag(words: list[str], name: str) -> str:
  return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def create(words):
  script = load("script.json", {})

  def change(state):
    if state["quota_errors"] < script.get("quota_errors", 0):
      state["quota_errors"] += 1
      return
    node = {"acceleratorType": flag(words, "accelerator-type")}
    label = flag(words, "labels").split("=")
    node["labels"] = {label[0]: label[1]}
    state["resource"] = {"name": words[0], "looks": 0, "lost": None, "node": node}
    state["created"] = state.get("created", 0) + 1

  before = load("state.json", {}).get("quota_errors", 0)
  if update(change)["quota_errors"] > before:
    fail("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptiblePodPerProjectPerZone' exceeded.")
  for host in range(script["hosts"]):
    shutil.rmtree(ROOT / f"host{host}", ignore_errors=True)
    (ROOT / f"host{host}").mkdir()


def describe(words):
  def change(state):
    if state["resource"]:
      state["resource"]["looks"] += 1

  resource = update(change)["resource"]
  if resource is None:
    fail(f"NOT_FOUND: Resource '{words[0]}' was not found")
  word = resource["lost"] or COMING[min(resource["looks"], len(COMING)) - 1]
  if resource["lost"] == "SUSPENDING":
    update(lambda state: state["resource"].update(lost="SUSPENDED"))
  print(json.dumps({"state": {"state": word}, "tpu": {"nodeSpec": [{"node": resource["node"]}]}}))


def delete(words):
  if "--force" not in words:
    fail("FAILED_PRECONDITION: the queued resource has nodes")
  update(lambda state: state.update(resource=None))


def scp(words):
  source, target = words[:2]
  for host in hosts(words):
    shutil.copy(source, ROOT / host / target.partition(":")[2])


def hosts(words) -> list[str]:
  if flag(words, "worker") == "0":
    return ["host0"]
  return [f"host{i}" for i in range(load("script.json", {})["hosts"])]


def ssh(words):
  resource = load("state.json", {})["resource"]
  if resource is None or resource["lost"]:
    fail("the TPU has a terminal state", 255)
  names = hosts(words)
  processes = [
    subprocess.Popen(
      ["bash", "-c", flag(words, "command")],
      cwd=ROOT / name,
      env=environment(i, len(names)),
      stdin=subprocess.DEVNULL,
    )
    for i, name in enumerate(names)
  ]
  if " train " in flag(words, "command"):
    threading.Thread(target=preempt, args=(names,), daemon=True).start()
  statuses = [process.wait() for process in processes]
  sys.exit(next((status % 256 for status in statuses if status), 0))


def environment(process: int, number: int) -> dict[str, str]:
  # A host knows nothing of the launcher's machine but where its programs are.
  kept = {name: os.environ[name] for name in ("PATH", "FAKE_GCLOUD")}
  resource = load("state.json", {})
  return kept | {
    "HOME": str(ROOT / f"host{process}"),
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": str(number),
    "SLURM_PROCID": str(process),
    "SLURM_LOCALID": str(process),
    "JAX_COORDINATOR_PORT": str(load("script.json", {})["ports"][resource["created"] - 1]),
  }


def preempt(names):
  """Takes the slices away when the run has come to the next step of the script."""
  script, done = load("script.json", {}), load("state.json", {})["preemptions"]
  if done >= len(script.get("preemptions", [])):
    return
  step, name = script["preemptions"][done]
  metrics = Path(script["workdir"]) / "metrics.jsonl"
  while not (metrics.exists() and last_step(metrics) >= step):
    time.sleep(0.01)

  def change(state):
    state["preemptions"] += 1
    state["resource"]["lost"] = "SUSPENDING"

  update(change)
  for host in names:
    for path in (ROOT / host / "moe_jax_runs").glob("*/pid"):
      os.killpg(int(path.read_text()), signal.Signals[name])


def last_step(metrics: Path) -> int:
  rows = metrics.read_text().splitlines()
  return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0


def storage(words):
  verb, *rest = words
  paths = [ROOT / "buckets" / w[5:] if w.startswith("gs://") else w for w in rest if w[0] != "-"]
  if verb == "ls":
    if not Path(paths[0]).exists():
      fail("One or more URLs matched no objects.")
    return
  shutil.copytree(*paths, dirs_exist_ok=True)


if __name__ == "__main__":
  arguments = sys.argv[1:]
  with (ROOT / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
  if arguments[0] == "storage":
    storage(arguments[1:])
  elif arguments[:3] == ["compute", "tpus", "queued-resources"]:
    verb = {"create": create, "describe": describe, "delete": delete, "scp": scp, "ssh": ssh}
    verb[arguments[3]](arguments[4:])
  else:
    fail(f"Invalid choice: {arguments}", 2)
