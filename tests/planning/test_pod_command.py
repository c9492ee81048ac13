"""`moe-jax plan --topology=...` prints a compiled step; the compiler is a stand-in here."""

import json

import pytest
from training import tiny

from moe_jax.cli import main
from moe_jax.planning import pod_plan
from moe_jax.planning import search as search_module
from moe_jax.planning.compiled import CompiledStep, Memory
from moe_jax.planning.hlo import parse_program
from moe_jax.planning.topology import Topology
from moe_jax.sharding.layout import make_layout

MIXTRAL = f"--config={tiny.ROOT}/configs/mixtral.py:8x7b"

# A product of 459 TFLOP that reads nothing, and an all-to-all of 32 GB among the last axis' eight.
STEP = """
ENTRY %main (a: bf16[16]) -> bf16[16] {
  %a = bf16[1000,153]{1,0:S(1)} parameter(0)
  %b = bf16[153,1500000000]{1,0:S(1)} parameter(1)
  %c = bf16[1000,1500000000]{1,0:S(1)} dot(%a, %b), lhs_contracting_dims={1}
  %d = bf16[8,2000000000]{1,0:S(1)} parameter(2)
  ROOT %e = bf16[8,2000000000]{1,0:S(1)} all-to-all(%d), replica_groups=[8,8]<=[64]
}
"""


@pytest.fixture
def pod(monkeypatch):
  def stand_in(run, topology):
    mesh = make_layout(run.experiment.sharding, topology.devices()).mesh
    memory = Memory(2.0**30, 2.0**31, 2.0**32, 7 * 2.0**30, topology.chip.hbm_bytes)
    return CompiledStep(parse_program(STEP), mesh, memory, 12.0)

  monkeypatch.setattr(Topology, "devices", Topology.places)
  monkeypatch.setattr(pod_plan, "compile_step", stand_in)


def test_json_has_all_numbers(pod, capsys):
  assert main(["plan", MIXTRAL, "--topology=v5p:4x4x4", "--json"]) == 0
  plan = json.loads(capsys.readouterr().out)
  assert (plan["num_chips"], plan["mesh"], plan["fits"]) == (64, {"fsdp": 8, "expert": 8}, True)
  assert plan["compute_seconds"] == pytest.approx(1.0)
  (exchange,) = plan["collectives"]
  assert (exchange["kind"], exchange["axes"]) == ("all-to-all", ["expert"])
  assert plan["step_seconds"] == pytest.approx(1.0 + plan["ici_seconds"])
  assert plan["overlapped_step_seconds"] == pytest.approx(1.0)
  # 79.7 GFLOP for each of 8,192 tokens, of 459 TFLOP in that second.
  assert plan["overlapped_mfu"] == pytest.approx(79.7e9 * 8192 / 459e12, rel=1e-3)


def test_the_table_says_what_fits_and_what_was_assumed(pod, capsys):
  assert main(["plan", MIXTRAL, "--topology=v5p:4x4x4", "--layout=fsdp", "--batch=64"]) == 0
  out = capsys.readouterr().out
  for part in ("v5p:4x4x4 (64 chips)", "fsdp 64", "88.00", "all-to-all", "MFU", "compile time"):
    assert part in out
  assert "Assumed: 64 sequences of 4,096 tokens" in " ".join(out.split())


def test_the_search_says_by_how_much_and_why(pod, monkeypatch, capsys):
  monkeypatch.setattr(search_module, "_TENSOR", (1,))
  monkeypatch.setattr(search_module, "_MICROBATCHES", (1,))
  assert main(["plan", MIXTRAL, "--topology=v5p:4x4x4", "--search"]) == 0
  out = " ".join(capsys.readouterr().out.split())
  assert "fsdp (fsdp 64)" in out and "candidates by closed formulas" in out
  assert "plain fsdp" in out and "points" in out and "A step saves" in out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--topology=v5p:4x4x5"], "did you mean v5p:4x4x4 (64 chips)?"),
    (["--topology=v5x:4x4x4"], "did you mean v5"),
    (["--topology=v5p:4x4x4", "--layout=epp"], "layout = 'epp' is not one of"),
    (["--topology=v5p:4x4x4", "--dispatch=sorted"], "sorted"),
    (["--topology=v5p:4x4x4", "--batch=0"], "--batch=0 is refused: it must be at least 1"),
    (["--search"], "--search plans a pod: give --topology too"),
    (["--layout=fsdp"], "--layout plans a pod"),
    (["--slices=2"], "--slices plans a pod"),
    (
      ["--topology=v5p:4x4x4", "--search", "--layout=fsdp"],
      "--layout=fsdp is refused with --search",
    ),
  ],
)
def test_bad_input_is_one_sentence(pod, words, message, capsys):
  assert main(["plan", MIXTRAL, *words]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1
