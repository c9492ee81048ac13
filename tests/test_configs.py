"""Every shipped config, in every variant its docstring lists, builds and trains two steps.

Those of published sizes are counted (tests/planning) instead, and their tiny variants trained
(tests/training/test_family_configs.py).
"""

import re

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.config.load import load_config
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token
from moe_jax.training.config import experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step


def variants() -> list[str]:
  """The file itself, and each file.py:variant that its docstring names."""
  found = []
  for path in sorted((tiny.ROOT / "configs").glob("*.py")):
    named = re.findall(rf"configs/{path.name}(:\w+)", path.read_text())
    if ":tiny" in named:
      continue
    found += [f"{path}{variant}" for variant in ["", *dict.fromkeys(named)]]
  return found


@pytest.mark.parametrize("source", variants(), ids=lambda source: source.rsplit("/", 1)[1])
def test_config_trains_two_steps(source):
  config = load_config(source)
  config.batch_size, config.steps = 2, 2
  experiment = experiment_from(config.to_dict())
  optimizer = make_optimizer(experiment.optimizer, experiment.steps)
  state = init_state(experiment.model, optimizer, 0)
  step = make_train_step(experiment, optimizer)
  L = experiment.data.sequence_length
  tokens = np.random.default_rng(0).integers(3, 259, (2, L + 1)).astype(np.int32)
  ones = np.ones((2, L), np.int32)
  batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": ones,
    "loss_mask": ones,
    "positions": np.tile(np.arange(L, dtype=np.int32), (2, 1)),
  }
  losses = []
  for _ in range(2):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all()
  assert int(state.step) == 2
  sizes = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert sizes == count_parameters(experiment.model).total


def test_quickstart_variants_have_the_same_active_flops_and_train_on_eight_million_tokens():
  moe, dense = (
    experiment_from(load_config(f"{tiny.ROOT}/configs/quickstart.py{v}").to_dict())
    for v in ("", ":dense")
  )
  flops = [training_flops_per_token(c.model, c.data.sequence_length) for c in (moe, dense)]
  # The router's own product is the difference.
  router = 6 * moe.model.model_dim * moe.model.moe.routing.num_experts * 2
  assert flops[0] - flops[1] == router < 0.02 * flops[1]
  assert moe.steps * moe.batch_size * moe.data.sequence_length >= 8_000_000
  assert moe.model.moe.routing.num_experts == 8
