"""GKE and Slurm: what is written equals golden files, and what the tools are asked for."""

import shlex

import pytest
from cloud.stand_in import HERE

from experiments.cloud import gke, slurm

# What --spot, quotes within words and several slices or nodes make of the templates.
WORDS = [
  "--config=configs/mixtral.py:8x7b",
  "--config.sharding.layout=ep_fsdp",
  "--config.model.segments=(('attention:moe',1),)",
]
POD = ["--claim=share", "--workdir=/share/run"]
GOLDEN = {
  "jobset_v5p_two_spot_slices.yaml": (
    gke.main,
    ["yaml", "--name=mixtral", "--accelerator=v5p-128", "--slices=2", "--spot"]
    + ["--image=us-docker.pkg.dev/p/r/moe_jax:1", *POD, "--", *WORDS],
  ),
  "jobset_v6e_one_host.yaml": (
    gke.main,
    ["yaml", "--name=small", "--accelerator=v6e-8", "--image=moe_jax:1", *POD]
    + ["--", "--config=configs/quickstart.py"],
  ),
  "slurm_two_nodes.sbatch": (
    slurm.main,
    ["script", "--name=mixtral", "--nodes=2", "--option=--partition=gpu"]
    + ["--workdir=/shared/run", "--", *WORDS],
  ),
  "slurm_one_gpu.sbatch": (
    slurm.main,
    ["script", "--name=quick", "--gpus=1", "--time=04:00:00", "--workdir=/shared/quick"]
    + ["--", "--config=configs/quickstart.py"],
  ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_written_is_the_golden_file(name, capsys):
  launch, words = GOLDEN[name]
  assert launch(words) == 0
  assert capsys.readouterr().out == (HERE / "golden" / name).read_text()


def printed(capsys, launch, *words) -> list[list[str]]:
  assert launch(list(words)) == 0
  return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_gke_asks_kubectl(capsys):
  _, words = GOLDEN["jobset_v6e_one_host.yaml"]
  (create,) = printed(capsys, gke.main, "create", "--dry-run", *words[1:])
  assert create == ["kubectl", "apply", "--filename=small.yaml"]
  resume = printed(capsys, gke.main, "resume", "--dry-run", *words[1:])
  assert [each[1] for each in resume] == ["delete", "apply"]
  watch = printed(capsys, gke.main, "watch", "--dry-run", "--name=small")
  assert [each[1] for each in watch] == ["get", "logs"]
  (delete,) = printed(capsys, gke.main, "delete", "--dry-run", "--name=small")
  assert "--ignore-not-found" in delete


def test_xpk_gets_the_same_run(capsys):
  _, words = GOLDEN["jobset_v5p_two_spot_slices.yaml"]
  (command,) = printed(capsys, gke.main, "xpk", "--cluster=c", *words[1:])
  assert command[:3] == ["xpk", "workload", "create"]
  assert {"--tpu-type=v5p-128", "--num-slices=2", "--cluster=c"} <= set(command)
  inner = shlex.split(command[-1].removeprefix("--command="))
  assert inner == ["moe-jax", "train", "--workdir=/share/run", *WORDS]


def test_slurm_submits_a_name_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
  monkeypatch.chdir(tmp_path)
  queue = tmp_path / "queue"
  for name, line in {"sbatch": f"echo 7 RUNNING >{queue}", "squeue": f"cat {queue}"}.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
    (tmp_path / name).chmod(0o755)
  queue.touch()
  _, words = GOLDEN["slurm_one_gpu.sbatch"]
  assert slurm.main(["create", *words[1:]]) == 0
  assert queue.read_text() == "7 RUNNING\n"
  assert (tmp_path / "quick.sbatch").read_text() == (
    HERE / "golden/slurm_one_gpu.sbatch"
  ).read_text()
  assert slurm.main(["create", *words[1:]]) == 0
  assert "job 7, RUNNING: nothing to submit" in capsys.readouterr().out


X, FILE = ("--", "x"), "--file=/dev/null/job"


@pytest.mark.parametrize(
  ("launch", "words", "said"),
  [
    (gke.main, ["yaml", "--name=small"], "--accelerator"),
    (gke.main, ["yaml", "--name=Small", "--accelerator=v6e-8"], "--image"),
    (gke.main, ["apply", "--name=small"], "--help"),
    (
      gke.main,
      ["yaml", *GOLDEN["jobset_v6e_one_host.yaml"][1][1:5], "--workdir=/w/", *X],
      "/share",
    ),
    (gke.main, ["create", *GOLDEN["jobset_v6e_one_host.yaml"][1][1:6], FILE, *X], "--file=PATH"),
    (gke.main, ["yaml", "--name=a", "--", "--workdir=/b"], "before"),
    (slurm.main, ["script", "--name=a", "--workdir=/w"], "--config"),
    (slurm.main, ["script", "--name=a b", "--workdir=/w", "--", "x"], "letters"),
    (slurm.main, ["script", "--name=a", "--workdir=/w", "--time=1h", "--", "x"], "HH:MM:SS"),
    (slurm.main, ["script", "--name=a", "--workdir=/w", "--nodes=0", "--", "x"], "at least 1"),
    (slurm.main, ["script", "--name=a", "--workdir=/w", "--option=x", "--", "x"], "sbatch"),
  ],
)
def test_bad_values_are_refused_in_one_sentence(launch, words, said, capsys):
  assert launch(words) == 2
  error = capsys.readouterr().err
  assert said in error and error.count("\n") == 1
