"""Multi-token prediction equals loops, sees no more than it may, and trains its experts too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from models.mixer_loops import head_logits, hidden_states, normed, oracle_tree, run_block
from tiny_models import (
  DENSE,
  forward,
  random_model,
  random_parameters,
  random_tokens,
  run,
  tiny_config,
)
from training.tiny import experiment

from moe_jax.errors import UserError
from moe_jax.models.moe_stacks import moe_stacks
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step, multi_token_nll

# Float32 sums of tens of terms through 4 blocks against float64.
TOLERANCE = 1e-5
DEPTH = 2
CONFIG = tiny_config(segments=DENSE, mtp_depth=DEPTH, embedding_multiplier=2.0)
L = 7
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0]])
TOKENS = random_tokens(CONFIG, 2, L)
PACKED = dict(segment_ids=SEGMENTS, positions=POSITIONS, token_mask=SEGMENTS > 0)


def mtp_logits(config, tokens, **call):
  return run(config, tokens, return_aux=True, train=True, **call)[1].mtp_logits


def loops(config, tree, tokens):
  """Returns the logits (L - k, V) of every depth k for one document."""
  x_LD = hidden_states(config, tree, tokens, np.ones(len(tokens), bool))
  logits = []
  for depth, module in enumerate(tree["mtp"], start=1):
    embedded = tree["embedding"][tokens[depth:]] * config.embedding_multiplier
    pair = [
      normed(config, x_LD[: len(embedded)], module["hidden_norm"]),
      normed(config, embedded, module["embedding_norm"]),
    ]
    block = jax.tree.map(lambda a: a[0], module["segment"]["blocks"][0])
    x_LD = np.concatenate(pair, axis=1) @ module["projection"]
    x_LD = run_block(config, "attention", block, x_LD, np.ones(len(x_LD), bool))
    logits.append(head_logits(config, tree, x_LD, module["final_norm"]))
  return logits


def test_each_depth_equals_the_loops_within_its_document():
  tree = oracle_tree(random_parameters(CONFIG)[1])
  tree["mtp"] = [tree["mtp"][k] for k in range(DEPTH)]
  actual = mtp_logits(CONFIG, TOKENS, **PACKED)
  for row, part in ((0, slice(0, 4)), (0, slice(4, 7)), (1, slice(0, 6))):
    for logits, expected in zip(actual, loops(CONFIG, tree, TOKENS[row, part]), strict=True):
      own = np.asarray(logits[row, part])[: len(expected)]
      assert relative_error(own, expected) <= TOLERANCE


def test_depth_k_sees_k_tokens_ahead_and_no_more():
  changed = TOKENS.copy()
  changed[:, 4] = (changed[:, 4] + 1) % CONFIG.vocab_size
  before, after = (mtp_logits(CONFIG, tokens) for tokens in (TOKENS, changed))
  for depth, (a, b) in enumerate(zip(before, after, strict=True), start=1):
    moved = np.any(np.asarray(a) != np.asarray(b), axis=(0, 2))
    assert moved[4 - depth :].all() and not moved[: 4 - depth].any()


def test_the_model_itself_does_not_change():
  plain = dataclasses.replace(CONFIG, mtp_depth=0)
  assert mtp_logits(plain, TOKENS) == []
  model = random_model(CONFIG)
  del model.mtp
  without = forward(*nnx.split(model), jnp.asarray(TOKENS))
  np.testing.assert_array_equal(without, run(CONFIG, TOKENS))


def test_the_loss_counts_targets_of_the_same_document():
  batch = dict(
    segment_ids=jnp.asarray(SEGMENTS),
    targets=jnp.asarray(random_tokens(CONFIG, 2, L, seed=2)),
    # The last token of a document has no target.
    loss_mask=jnp.asarray([[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]]),
  )
  _, aux = run(CONFIG, TOKENS, return_aux=True, train=True, **PACKED)
  expected = 0.0
  pairs = [(1, [(0, 0), (0, 1), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3)])]
  pairs += [(2, [(0, 0), (1, 0), (1, 1), (1, 2)])]
  for depth, places in pairs:
    logp = jax.nn.log_softmax(aux.mtp_logits[depth - 1])
    for row, at in places:
      expected -= float(logp[row, at, batch["targets"][row, at + depth]]) / DEPTH
  np.testing.assert_allclose(multi_token_nll(aux, batch), expected, rtol=1e-5)


def test_the_experts_of_a_depth_are_balanced_and_trained_with_the_others():
  routing = dict(bias_update="sign", bias_rate=0.25, weighting="raw", score="sigmoid")
  model = tiny_config(
    segments=(("attention:moe", 1),), gated=False, mtp_depth=1, routing=routing, vocab_size=259
  )
  config = dataclasses.replace(experiment(), model=model)
  assert [stack.layers for stack in moe_stacks(model)] == [(0,), (1,)]
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = init_state(model, optimizer, seed=0)
  batch = {
    "tokens": np.tile(TOKENS, (2, 1)),
    "targets": np.tile(TOKENS, (2, 1)),
    "segment_ids": np.tile(SEGMENTS, (2, 1)),
    "positions": np.tile(POSITIONS, (2, 1)),
    "loss_mask": np.tile((SEGMENTS > 0).astype(np.int32), (2, 1)),
  }
  step = make_train_step(config, optimizer)
  # The first step of a warm-up has the learning rate 0.
  state, metrics = step(state, batch)
  before = jax.tree.map(np.array, state.params["mtp"])
  state, _ = step(state, batch)
  assert metrics["moe/layer_1/bias_max"] == 0.25
  assert np.isfinite(metrics["mtp_loss"]) and metrics["mtp_loss"] > 0
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params["mtp"], before)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("changes", [dict(mtp_depth=-1), dict(mtp_loss_weight=float("nan"))])
def test_refused_in_one_sentence(changes):
  with pytest.raises(UserError, match="mtp_depth = .* mtp_loss_weight = .* 0 or greater"):
    dataclasses.replace(CONFIG, **changes)
