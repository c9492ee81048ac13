"""What `moe-jax conventions` and `moe-jax audit` say, and that it is so."""

import dataclasses
import itertools

import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.analysis.conventions import compare, differences, same_size
from moe_jax.analysis.routing_words import MEANINGS, capacity_words
from moe_jax.cli import main
from moe_jax.moe import RoutingConfig, preset, preset_names


def test_every_field_has_a_meaning():
  assert list(MEANINGS) == [field.name for field in dataclasses.fields(RoutingConfig)]


def test_the_table_holds_every_preset_in_120_columns(capsys):
  assert main(["conventions"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 120
  first_words = [line.split()[0] for line in lines if line.strip()]
  assert set(preset_names()) <= set(first_words)
  assert "\x1b" not in "".join(lines)


def test_differences_name_exactly_the_fields_that_matter():
  found = {d.field: d.values for d in differences(preset("mixtral"), preset("jamba"))}
  assert found == {
    "num_experts": ("8", "16"),
    "weighting": ("softmax_selected", "raw"),
    "balance_loss_weight": ("0.02", "0.001"),
  }
  assert differences(preset("mixtral"), preset("mixtral")) == []


def test_a_field_that_nobody_reads_is_no_difference():
  dropless = preset("mixtral")
  unread = dict(capacity_factor=3.0, drop_order="token_major", weight_norm_order=2.0)
  other = dataclasses.replace(dropless, **unread)
  assert differences(dropless, other) == []
  assert {d.field for d in differences(dropless, dataclasses.replace(other, overflow="drop"))} >= {
    "overflow",
    "capacity_factor",
    "drop_order",
  }


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("switch", "floor(f S/E); f = 1.25, eval 2"),
    ("flaxformer", "max(round(f S/E), 4); f = 1"),
    ("praxis", "floor(f S/E) to multiple of 4; f = 2"),
    ("maxtext", "floor(f ceil(K S/E)); f = 1.25"),
    ("tutel", "K floor(f ceil(S/E)); f = 1"),
    ("mixtral", "S"),
    ("soft_moe", "1"),
  ],
)
def test_capacity_is_told_as_a_formula(name, words):
  assert capacity_words(preset(name)) == words


def test_equal_routers_route_alike_and_drop_order_moves_drops_alone():
  a = preset("maxtext", num_experts=4, capacity_factor=1.0)
  b = dataclasses.replace(a, drop_order="choice_major")
  same = compare(a, a, shape=(2, 32))
  assert (same.asked_differently, same.seen_differently, same.dropped_differently) == (0, 0, 0)
  moved = compare(a, b, shape=(2, 32))
  assert moved.asked_differently == 0
  assert moved.seen_differently > 0 and moved.dropped_differently > 0
  one, two = moved.outcomes
  assert one.capacity == two.capacity == 16
  assert one.balance_loss == two.balance_loss > one.balance_at_uniform == 2


def test_a_comparison_has_one_k_where_both_accept_it():
  assert [config.top_k for config in same_size("mixtral", "olmoe")] == [2, 2]
  assert [config.top_k for config in same_size("switch", "gshard")] == [2, 2]
  assert [config.top_k for config in same_size("base", "gshard")] == [1, 2]


def test_the_difference_of_two_presets_is_printed_with_what_it_changes(capsys):
  assert main(["conventions", "--diff", "mixtral", "jamba", "--sample=3"]) == 0
  text = capsys.readouterr().out
  assert "scores to combine weights" in text and "seed 3" in text
  # Softmax over two and raw weights change no choice.
  assert "0.0 % of tokens ask different sets of experts" in text


def test_any_two_presets_can_be_compared_as_in_training():
  for first, second in itertools.product(preset_names(), repeat=2):
    for config in same_size(first, second):
      config.check_trainable()


def test_a_comparison_tells_whose_number_of_choices_gave_way(capsys):
  assert main(["conventions", "--diff", "switch", "mixtral"]) == 0
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["K", "2,", "own", "1", "2"] in rows


def test_an_audit_of_a_config_reports_the_moe_layers(capsys):
  words = [word for word in tiny.command("unused") if "workdir" not in word]
  words += [
    "--config.moe.top_k=2",
    "--config.model.segments=(('attention:dense attention:moe',1),)",
  ]
  assert main(["audit", *words[1:]]) == 0
  text = capsys.readouterr().out
  assert text.count("MoE layer 1:") == 2
  assert "verdict, training: the model" in text and "verdict, evaluation: the model" in text
  assert "grouping = batch" in text


FAULTS = [
  (["conventions", "--diff", "switch", "gshrd"], ["gshrd", "gshard?"]),
  (["conventions", "--diff=switch"], ["--diff=switch", "--diff=A,B"]),
  (["conventions", "--diff", "switch", "--sample=1"], ["--diff needs", "--diff=A,B"]),
  (["conventions", "--dif", "a", "b"], ["--dif", "--diff"]),
  (["audit"], ["--config", "--preset", "neither"]),
  (["audit", "--preset=mixtrl"], ["mixtrl", "mixtral?"]),
  (["audit", "--preset=switch", "--config.moe.top_k=2"], ["--config.moe.top_k", "--config=FILE"]),
]


@pytest.mark.parametrize(("words", "fragments"), FAULTS, ids=lambda value: " ".join(value))
def test_a_fault_is_one_line(capsys, words, fragments):
  assert main(words) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1, message
  for fragment in fragments:
    assert fragment in message
