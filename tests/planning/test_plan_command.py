"""`moe-jax plan` prints the numbers of a plan, needs no tokenizer, and refuses what is none."""

import json

import pytest
from training import tiny

from moe_jax.cli import main

V3 = f"--config={tiny.ROOT}/configs/deepseek.py:v3"


def planned(capsys, *words: str) -> dict:
  assert main(["plan", "--json", *words]) == 0
  return json.loads(capsys.readouterr().out)


def test_json_has_exact_numbers(capsys):
  plan = planned(capsys, V3)
  assert plan["total_parameters"] == 671_026_404_352
  assert plan["active_parameters"] == 37_552_282_624
  assert plan["active_parameters_without_input_embedding"] == 36_625_603_584
  assert plan["selection_biases"] == 58 * 256
  # Apart: a projection of 2 D to D, three norms, and a block of 256 + 1 experts.
  assert plan["multi_token_prediction_parameters"] == 11_610_067_968
  assert plan["cache_bytes_per_token"] == 2 * 576 * 61
  everything = plan["total_parameters"] + plan["multi_token_prediction_parameters"]
  assert plan["optimizer_bytes"] == 2 * plan["gradient_bytes"] == 8 * everything
  assert plan["flops_per_token_training"] == 3 * plan["flops_per_token_forward"]
  parts = plan["components"].values()
  assert sum(part["total_parameters"] for part in parts) == plan["total_parameters"]
  assert sum(part["active_parameters"] for part in parts) == plan["active_parameters"]
  forward = plan["flops_per_token_forward_by_component"].values()
  assert sum(forward) == plan["flops_per_token_forward"]


def test_overrides_change_the_plan(capsys):
  plan = planned(capsys, V3, "--config.moe.top_k=4", "--config.data.sequence_length=8192")
  assert plan["sequence_length"] == 8192
  # Four experts fewer of three matrices 7,168 x 2,048 in 58 layers.
  assert plan["active_parameters"] == 37_552_282_624 - 4 * 58 * 3 * 7168 * 2048


def test_dispatch_is_counted_for_a_microbatch(capsys):
  words = ["--config.batch_size=8", "--config.accumulation_steps=4"]
  dispatch = "--config.moe.dispatch=einsum"
  plan = planned(capsys, f"--config={tiny.ROOT}/configs/glam.py:tiny", dispatch, *words)
  assert (plan["batch_size"], plan["sequence_length"]) == (2, 64)
  # Groups of 64 tokens, capacity factor 2 a token: 16 slots of 8 experts, in 2 layers of width 32.
  assert plan["slots_per_token"] == 2
  assert plan["dispatch_flops_per_token_forward"] == 2 * 2 * (2 * 8 * 16 * 32)


def test_a_file_with_a_vocabulary_needs_no_tokenizer(tmp_path, capsys):
  path = tmp_path / "config.py"
  path.write_text(
    "from ml_collections import config_dict\n"
    "def get_config():\n"
    "  model = dict(vocab_size=11, model_dim=8, segments=(('attention:dense', 1),), num_heads=1,\n"
    "    num_kv_heads=1, head_dim=8, mlp=dict(hidden_dim=16))\n"
    "  return config_dict.ConfigDict(dict(model=model, data=dict(tokenizer='absent.json')))\n"
  )
  assert planned(capsys, f"--config={path}")["components"]["embedding"]["total_parameters"] == 88


def test_the_table_shows_the_same_numbers(capsys):
  assert main(["plan", V3]) == 0
  shown = capsys.readouterr().out
  for text in (
    "671,026,404,352",
    "37,552,282,624",
    "36,625,603,584",
    "14,848",
    "70,272",
    "11,610,067,968",
  ):
    assert text in shown


@pytest.mark.parametrize("variant", ["deepseek.py:v3", "glam.py:64b_64e", "granite_moe.py:tiny"])
def test_the_table_fits_a_terminal_of_80_columns(variant, capsys):
  assert main(["plan", f"--config={tiny.ROOT}/configs/{variant}"]) == 0
  assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([V3 + "0"], "'v30' is not one of tiny, moe_16b, v2_lite, v2, v3; did you mean v3?"),
    ([V3, "--json=yes"], "--json=yes: 'yes' is not true or false"),
    ([V3, "--jsn"], "--jsn is no flag of moe-jax plan; did you mean --json?"),
    ([V3, "--config.batch_size=0"], "batch_size = 0 is refused"),
    ([V3, "--config.moe.top_k=300"], "top_k = 300 is refused"),
  ],
)
def test_faults_are_one_line(words, message, capsys):
  assert main(["plan", *words]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
