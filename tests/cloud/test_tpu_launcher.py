"""The launcher of TPU slices: what it asks for, what it refuses, what it does about faults."""

import dataclasses
import json
import shlex

import pytest
from cloud.stand_in import REQUEST, World, faults_of, real_gcloud

from experiments.cloud import cost, tpu
from experiments.cloud.commands import Outcome
from experiments.cloud.gcloud import State
from experiments.cloud.lifecycle import Patience, RunFailed, run, take_down
from experiments.cloud.request import Provisioning, Request, Through
from experiments.cloud.slices import parse_slice
from moe_jax.errors import UserError

TRAIN = ("--workdir=/mnt/share/run", "--share=10.0.0.2:/share", "--", "--config=configs/x.py")
QUICK = Patience(pause=0.0, tries=3, restarts=2)


def request(**changes) -> Request:
  values = dict(name="run-1", project="p", zone="us-east5-a", piece=parse_slice("v5p-16"))
  return Request(**(values | changes))


@pytest.mark.parametrize(
  ("text", "chips", "hosts", "shape"),
  [
    ("v4-8", 4, 1, "2x2x1"),
    ("v5p-128", 64, 16, "4x4x4"),
    ("v5p:8x8x8", 512, 128, "8x8x8"),
    ("v5litepod-8", 8, 1, "2x4"),
    ("v5litepod-256", 256, 64, "16x16"),
    ("v6e-16", 16, 4, "4x4"),
  ],
)
def test_slices_have_the_chips_and_hosts_that_google_sells(text, chips, hosts, shape):
  piece = parse_slice(text)
  assert (piece.chips, piece.hosts, piece.shape) == (chips, hosts, shape)
  assert ":" in text or piece.accelerator_type == text


REFUSED = [
  (["--accelerator=v5p-127"], "v5p-128"),
  (["--accelerator=h100"], "no TPU slice"),
  (["--topology=4x4x4"], "--accelerator=v5p-128, or --topology=2x2x2"),
  (["--zone=us-east5"], "us-east5 is no zone"),
  (["--zone="], "--zone is missing"),
  (["--project="], "--project is missing"),
  (["--name=Run_1"], "lower-case letters"),
  (["--slices=0"], "at least 1"),
  (["--slices=2", "--through=tpu-vm"], "--through=queued-resource"),
  (["--workdir=gs://bucket/run"], "--bucket"),
  (["--workdir=run"], "absolute"),
  (["--share=none"], "2 hosts"),
  (["--share=nfs"], "HOST:/EXPORT"),
  (["--bucket=s3://x"], "gs://"),
  (["--tries=0"], "at least 1"),
  (["--provisioning=spto"], "spot"),
  (["--zoen=us-east5-a"], "--zoen"),
  (["--price=-1"], "at least 0"),
  (["--price=nan"], "at least 0"),
  (["--hours=-3"], "at least 0"),
  (["--pause=nan"], "at least 0"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_bad_values_are_refused_in_one_sentence(flags, said, capsys):
  split = TRAIN.index("--")
  words = ["run", *REQUEST, *TRAIN[:split], *flags, "--dry-run", *TRAIN[split:]]
  assert tpu.main(words) == 2
  out, error = capsys.readouterr()
  assert said in error and error.count("\n") == 1 and not out


def test_a_run_without_a_training_is_refused(capsys):
  assert tpu.main(["run", *REQUEST]) == 2
  assert "--workdir" in capsys.readouterr().err


def test_settings_come_from_a_file_and_flags_win(tmp_path, capsys):
  path = tmp_path / "run.toml"
  path.write_text('name = "run-2"\nproject = "p"\nzone = "us-east5-a"\naccelerator = "v5p-8"\n')
  assert tpu.main(["create", f"--settings={path}", "--accelerator=v5p-16", "--dry-run"]) == 0
  out = capsys.readouterr().out
  assert "create run-2" in out and "--accelerator-type=v5p-16" in out
  path.write_text('zoen = "us-east5-a"\n')
  assert tpu.main(["create", f"--settings={path}"]) == 2
  assert "'zoen' is no flag that a file may hold; did you mean zone" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"dry-run = true", b"name = '\xff'", b"name ="])
def test_settings_that_are_none_are_refused_in_one_sentence(content, tmp_path, capsys):
  path = tmp_path / "run.toml"
  path.write_bytes(content)
  assert tpu.main(["create", f"--settings={path}"]) == 2
  error = capsys.readouterr().err
  assert str(path) in error and error.count("\n") == 1 and "mean dry-run" not in error


def test_a_second_run_folder_behind_the_dashes_is_refused(capsys):
  assert tpu.main(["run", *REQUEST, *TRAIN, "--workdir=/other", "--dry-run"]) == 2
  assert "--workdir=/other is refused after --" in capsys.readouterr().err


def test_a_dry_run_of_fetch_makes_no_folder(tmp_path, capsys):
  words = ["fetch", *REQUEST, f"--to={tmp_path / 'here'}", "--dry-run"]
  assert tpu.main(words) == 2 and "--bucket" in capsys.readouterr().err
  assert tpu.main([*words, "--workdir=/w/run", "--share=ready"]) == 0
  assert not (tmp_path / "here").exists()
  fetched = shlex.split(capsys.readouterr().out)
  assert {"run-1:/w/run/metrics.jsonl", "run-1:moe_jax_runs/run-1/log"} < set(fetched)


def printed(capsys, *words) -> list[list[str]]:
  assert tpu.main([*words, "--dry-run", *TRAIN]) == 0
  return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


VARIANTS = [
  ["--provisioning=spot", "--slices=2"],
  ["--provisioning=reserved"],
  ["--provisioning=on-demand"],
  ["--through=tpu-vm", "--provisioning=spot"],
  ["--bucket=gs://bucket/run-1", "--accelerator=v6e-8"],
]


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, monkeypatch, capsys):
  world = World(tmp_path / "world")
  monkeypatch.setenv("PATH", str(world.folder / "bin"))
  commands = printed(capsys, "run", *REQUEST, *VARIANTS[0])
  verbs = [words[4] for words in commands]
  assert verbs == ["describe", "create", "describe", "scp", "ssh", "ssh"]
  assert {"--spot", "--node-count=2", "--node-prefix=run-1"} <= set(commands[1])
  train = shlex.split(commands[-1][-1].removeprefix("--command="))
  assert train[:3] == ["bash", "moe_jax_worker.sh", "train"]
  assert train[-4:] == ["moe-jax", "train", "--workdir=/mnt/share/run", "--config=configs/x.py"]
  assert not world.calls()


@pytest.mark.slow
@pytest.mark.skipif(real_gcloud() is None, reason="Google's command-line interface is not here")
def test_google_knows_the_commands_of_every_variant_and_verb(capsys):
  commands = []
  for flags in VARIANTS:
    commands += printed(capsys, "run", *REQUEST, *flags, "--then=delete")
  for verb in ("watch", "fetch", "stop"):
    commands += printed(capsys, verb, *REQUEST)
  commands += printed(capsys, "fetch", *REQUEST, *VARIANTS[-1])
  calls = [words[1:] for words in commands if words[0] == "gcloud"]
  assert len(calls) > 20
  assert faults_of(calls) == []
  assert faults_of([["compute", "tpus", "queued-resources", "ssh", "x", "--workers=all"]])


def test_the_estimate_says_price_source_and_what_it_leaves_out(capsys):
  words = ["estimate", *REQUEST, "--accelerator=v5p-128", "--slices=2", "--hours=10"]
  assert tpu.main(words) == 0
  out = capsys.readouterr().out
  # 128 chips at 1.68 dollars.
  assert "$215.04 an hour" in out and "$2,150 for 10 hours" in out
  assert "skypilot-catalog" in out and "read 2026-" in out and "not your bill" in out


@pytest.mark.parametrize(
  "change", [dict(zone="me-west1-b"), dict(provisioning=Provisioning.RESERVED)]
)
def test_a_price_that_is_not_known_is_not_made_up(change):
  with pytest.raises(UserError, match="--price"):
    cost.estimate(request(**change))
  assert cost.estimate(request(**change, price=2.0)).per_hour == 16.0


@dataclasses.dataclass
class Scripted:
  """Slices whose states and training go by a script."""

  request: Request
  states: list[State]
  statuses: list[int] = dataclasses.field(default_factory=list)
  creations: list[str] = dataclasses.field(default_factory=list)
  prepared: int = 0
  done: list[str] = dataclasses.field(default_factory=list)

  def state(self):
    state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
    return state, state.value

  def create(self):
    self.done.append("create")
    fault = self.creations.pop(0) if self.creations else ""
    return Outcome(1 if fault else 0, errors=fault)

  def delete(self):
    self.done.append("delete")

  def prepare(self):
    return self.prepared

  def train(self):
    self.done.append("train")
    return self.statuses.pop(0)

  def push(self):
    return 0


def test_quota_that_stays_exhausted_is_told_after_the_tries():
  slices = Scripted(request(), [State.ABSENT], creations=["Quota exceeded"] * 3)
  with pytest.raises(UserError, match="after 3 tries .*ask for quota"):
    run(slices, QUICK)
  assert slices.done == ["create"] * 3


def test_any_other_fault_of_a_creation_is_told_at_once():
  slices = Scripted(request(), [State.ABSENT], creations=["PERMISSION_DENIED: no"])
  with pytest.raises(UserError, match="cannot be created: PERMISSION_DENIED"):
    run(slices, QUICK)
  assert slices.done == ["create"]


def test_a_run_that_saved_and_ended_is_started_again_on_the_same_slices():
  slices = Scripted(request(), [State.READY], statuses=[75, 0])
  run(slices, QUICK)
  assert slices.done == ["train", "train"]


def test_a_lost_connection_is_taken_up_again():
  slices = Scripted(request(), [State.READY], statuses=[255, 0])
  run(slices, QUICK)
  assert slices.done == ["train", "train"]


def test_a_slice_that_is_told_lost_late_is_replaced():
  # Ready when the run starts and when it is first looked at, then lost.
  states = [State.READY, State.READY, State.GOING, State.LOST, State.ABSENT, State.READY]
  slices = Scripted(request(), states, statuses=[1, 0])
  run(slices, QUICK)
  assert slices.done == ["train", "delete", "create", "train"]


@pytest.mark.parametrize(("status", "error"), [(1, RunFailed), (2, UserError)])
def test_a_run_that_fails_by_itself_is_not_repeated(status, error):
  slices = Scripted(request(), [State.READY], statuses=[status])
  with pytest.raises(error):
    run(slices, QUICK)
  assert slices.done == ["train"]


@pytest.mark.parametrize("status", [1, 2, 75])
def test_hosts_that_cannot_be_set_up_are_not_said_to_be_a_training(status):
  slices = Scripted(request(), [State.READY], prepared=status)
  with pytest.raises(RunFailed, match="setting the hosts up failed"):
    run(slices, QUICK)


def test_restarts_are_bounded():
  slices = Scripted(request(), [State.READY], statuses=[75] * 3)
  with pytest.raises(RunFailed, match="after 2 restarts"):
    run(slices, QUICK)


def test_deleting_what_is_not_there_does_nothing():
  slices = Scripted(request(), [State.ABSENT])
  take_down(slices, QUICK)
  assert slices.done == []


@pytest.fixture
def world(tmp_path, monkeypatch):
  world = World(tmp_path / "world", hosts=2)
  for name, value in world.environment().items():
    monkeypatch.setenv(name, value)
  return world


def test_creating_twice_creates_once(world):
  assert tpu.main(["create", *REQUEST]) == tpu.main(["create", *REQUEST]) == 0
  assert [call[3] for call in world.calls()].count("create") == 1


def test_a_name_that_something_else_has_is_refused(world, capsys):
  assert tpu.main(["create", *REQUEST]) == 0
  assert tpu.main(["create", *REQUEST, "--accelerator=v5p-32"]) == 2
  assert "--name=run-1 is taken in us-east5-a by a v5p-16" in capsys.readouterr().err
  state = json.loads((world.folder / "state.json").read_text())
  state["resource"]["node"]["labels"] = {}
  (world.folder / "state.json").write_text(json.dumps(state))
  for verb in ("create", "delete"):
    assert tpu.main([verb, *REQUEST]) == 2
    assert "something this launcher did not make" in capsys.readouterr().err


def test_an_answer_that_is_no_answer_is_told(world, capsys):
  world.program("gcloud", "echo 'You do not currently have an active account' >&2; exit 1")
  assert tpu.main(["create", *REQUEST]) == 2
  assert "active account" in capsys.readouterr().err


def test_all_states_of_both_apis_are_known():
  from experiments.cloud.gcloud import _STATES

  for through in Through:
    names = [name for names in _STATES[through].values() for name in names]
    assert len(names) == len(set(names))
