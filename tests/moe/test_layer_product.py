"""Output and gradients of MoELayer equal the oracle's for every kind of plan in every dispatch.

Plans made by tokens; the few of selections that look at a whole group meet every form of dispatch
in `test_whole_group_layers.py`.
"""

import itertools
import random
import time

import pytest
from memory_maps import bound_memory_maps
from moe.layer_and_oracle import (
  MASKS,
  NEVER,
  compiled_layer,
  run_and_compare,
  split_layer,
  without_expert,
)

from moe_jax.errors import UserError
from moe_jax.moe import Dispatch, MoEConfig, RoutingConfig, grouped

# The router's gradients are between 0.2 and 7 for most inputs, and sum larger terms. Thousands of
# inputs have some where the terms cancel, to 0 even; float32 has rounded them at their own size.
ROUTER_FLOOR = 0.1
# What a plan looks like: how many ask, who does not, who is moved, dropped or null.
PLANS = {
  # E and K: nothing to choose (E = 1), one choice, two, all experts.
  "size": ((1, 1), (5, 1), (4, 2), (4, 4)),
  "overflow": ("drop", "reroute", "dropless"),
  "weighting": (
    "raw",
    "renormalized",
    "renormalized_after_drop",
    "softmax_selected",
    "hard",
    "straight_through",
  ),
  "weight_on": ("output", "input"),
  "null": ("none", "zero", "identity"),
}
# What fills such a plan with other numbers; drawn, since dispatch does the same with any of them.
DRAWN = {
  "score": ("softmax", "sigmoid", "sqrt_softplus", "relu"),
  "weight_norm_order": (1.0, 2.0),
  "weight_scale": (1.0, 2.5),
  "drop_order": ("choice_major", "token_major"),
  "priority": ("position", "max_score", "probability"),
  "capacity": (1, 2, 3),
  "reroute_attempts": (1, 2),
  # 10 tokens in groups of 4, the last with two fillers.
  "grouping": ("batch", "sequence", "fixed"),
  "gated": (False, True),
  # Not gelu: for large arguments its derivative cancels, and float32 leaves errors of 5e-6.
  "activation": ("relu", "silu"),
  "shared": (None, "add", "gated", "coefficient"),
}
# All choices asked; one that may not ask; as many as are positive; two levels of scores. The other
# selections differ in which experts they name alone.
SELECTIONS = ("top_k", "threshold_second", "positive", "hierarchical")


def config_of(selection, row):
  """Returns the config of a row of PLANS and DRAWN."""
  fields = dict(row)
  num_experts, top_k = fields.pop("size")
  null, shared = fields.pop("null"), fields.pop("shared")
  network = {name: fields.pop(name) for name in ("gated", "activation")}
  if selection == "hierarchical":
    fields |= {"num_expert_groups": 2, "top_expert_groups": 2, "score": "softmax"}
  if selection == "positive":
    fields["score"] = "relu"
  if fields["overflow"] == "dropless":
    del fields["capacity"]
  routing = RoutingConfig(
    num_experts,
    top_k,
    selection=selection,
    second_threshold=0.4,
    group_size=4 if fields["grouping"] == "fixed" else None,
    num_null_experts=0 if null == "none" else 2,
    null_expert="zero" if null == "none" else null,
    **fields,
  )
  joined = {"shared_hidden_dim": 3, "shared_combine": shared} if shared else {}
  return MoEConfig(routing, 5, **network, **joined)


def configs_of(selection):
  """Yields a config of every kind of plan that the selection can make and training accepts.

  No drawn value makes a kind of plan impossible.
  """
  for seed, values in enumerate(itertools.product(*PLANS.values())):
    generator = random.Random(seed)
    drawn = {name: generator.choice(choices) for name, choices in DRAWN.items()}
    try:
      config = config_of(selection, dict(zip(PLANS, values, strict=True)) | drawn)
      config.routing.check_trainable()
    except UserError:
      continue
    yield config


def inputs_of(config):
  """Returns (state, x, name of a mask): every padding, and an expert that nobody wants."""
  shut = 0 if config.routing.num_experts > 1 else None
  _, state, x = split_layer(config, shut)
  inputs = [(state, x, mask) for mask in MASKS]
  return inputs + ([] if shut is None else [(without_expert(state, shut, NEVER), x, "padding")])


def compared(config, form):
  """Yields one entry for every input: None, or a line that says how the layer is wrong."""
  # There are thousands of programs.
  compiled_layer.cache_clear()
  for number, (state, x, mask) in enumerate(inputs_of(config)):
    try:
      run_and_compare(config, form, state, x, mask, ROUTER_FLOOR)
      yield None
    except AssertionError as error:
      yield f"input {number}, mask {mask}, {config}: {error}"


@pytest.fixture
def short_blocks(monkeypatch):
  """Makes experts need several blocks, and end in the middle of one."""
  monkeypatch.setattr(grouped, "block_lengths", lambda num_rows, num_experts: (4, 2))


@pytest.mark.usefixtures("short_blocks")
def test_layer_equals_the_oracle_for_the_last_kind_of_plan():
  # The product below is run rarely, and must not rot meanwhile.
  *_, config = configs_of("top_k")
  assert not any(compared(config, Dispatch.RAGGED))


@pytest.mark.full
@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("form", Dispatch)
def test_layer_equals_the_oracle_for_every_kind_of_plan(form, selection, record_property):
  start, configs, results = time.process_time(), list(configs_of(selection)), []
  for config in configs:
    results += compared(config, form)
    bound_memory_maps()
  record_property("configs", len(configs))
  record_property("inputs", len(results))
  record_property("cpu_seconds", round(time.process_time() - start, 1))
  failures = [result for result in results if result]
  assert not failures, f"{len(failures)} failed: " + "; ".join(failures[:20])
