"""The comparison of the quickstart's variants runs end to end and its table adds up."""

import json
import statistics
import sys

from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from experiments.quickstart import compare


def test_tiny_comparison(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tiny.ROOT)
  small = [f"{name}={value}" for name, value in tiny.OVERRIDES.items()]
  monkeypatch.setattr(
    sys,
    "argv",
    [
      "compare",
      f"--workdir={tmp_path / 'runs'}",
      f"--out={tmp_path / 'out'}",
      "--seeds=0,1",
      "--rounds=2",
      *small,
      "steps=3",
    ],
  )
  compare.main()
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  baseline = json.loads((tmp_path / "out" / "dense_baseline.json").read_text())
  assert results["moe"]["seeds"] == [0, 1]
  losses = results["dense"]["eval_loss"]
  assert baseline["points"][-1][1] == statistics.mean(losses)
  assert baseline["points"][-1][0] == 3
  assert results["step_time"]["ratio"] > 0
  shown = capsys.readouterr().out
  assert f"{statistics.mean(losses):.4f}" in shown
  assert "paired by seed" in shown


def test_recorded_results_are_those_of_the_shipped_config():
  """A config that changes must be compared again, or the README's table speaks of another."""
  from moe_jax.config.load import load_config
  from moe_jax.planning.count import count_parameters
  from moe_jax.training.config import experiment_from

  results = json.loads((tiny.ROOT / "experiments/quickstart/results.json").read_text())
  for variant in compare.VARIANTS:
    config = experiment_from(load_config(f"{tiny.ROOT}/configs/quickstart.py:{variant}").to_dict())
    assert results[variant]["parameters"] == count_parameters(config.model).total
    tokens = config.steps * config.batch_size * config.data.sequence_length
    assert results[variant]["tokens"] == tokens >= 8_000_000
    assert results[variant]["points"][-1][0] == config.steps
    assert len(results[variant]["seeds"]) >= 3
  assert statistics.mean(results["moe"]["eval_loss"]) < statistics.mean(
    results["dense"]["eval_loss"]
  )
  assert results["step_time"]["ratio"] <= 1.5
