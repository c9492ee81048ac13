"""What is measured of two models equals a float64 computation from their logits."""

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from surgery_cases import dense_config, logits_of, model_of, random_leaves
from tiny_models import random_tokens

from moe_jax.analysis.preservation import preservation

CONFIG = dense_config((("attention:dense", 1),))


def batch(seed):
  """Returns two packed rows, the end of the second of which is padding."""
  tokens = random_tokens(CONFIG, 2, 6, seed=seed)
  segments = np.ones((2, 6), np.int32)
  segments[1, 4:] = 0
  positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
  return {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, axis=1),
    "segment_ids": segments,
    "positions": positions,
    "loss_mask": segments,
  }


def variables(leaves):
  return nnx.state(model_of(CONFIG, leaves))


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_differences_are_those_of_the_logits_of_real_tokens():
  leaves = random_leaves(CONFIG)
  other = {
    path: a + 0.01 * np.cos(np.arange(a.size)).reshape(a.shape).astype(np.float32)
    for path, a in leaves.items()
  }
  batches = [batch(1), batch(2)]
  found = preservation((CONFIG, variables(leaves)), (CONFIG, variables(other)), batches)
  kl, nll, largest, difference = [], [[], []], 0.0, 0.0
  for each in batches:
    real = each["segment_ids"] > 0
    before, after = (logits_of(CONFIG, own, each["tokens"])[real] for own in (leaves, other))
    p, q = log_softmax(before), log_softmax(after)
    kl += list((np.exp(p) * (p - q)).sum(axis=-1))
    for total, log_probs in zip(nll, (p, q), strict=True):
      total += list(-np.take_along_axis(log_probs, each["targets"][real][:, None], -1)[:, 0])
    largest = max(largest, np.abs(before).max())
    difference = max(difference, np.abs(before - after).max())
  assert found.tokens == 20
  # Float32 logits and sums; the KL is a difference of numbers about 100 times its size.
  assert found.kl == pytest.approx(np.mean(kl), rel=1e-3)
  assert found.loss_before == pytest.approx(np.mean(nll[0]), rel=1e-5)
  assert found.loss_after == pytest.approx(np.mean(nll[1]), rel=1e-5)
  assert found.max_logit == pytest.approx(largest, rel=1e-5)
  assert found.max_logit_difference == pytest.approx(difference, rel=1e-4)
  assert found.relative_difference == pytest.approx(difference / largest, rel=1e-4)


def test_equal_models_differ_by_nothing():
  state = variables(random_leaves(CONFIG))
  found = preservation((CONFIG, state), (CONFIG, jax.tree.map(lambda a: a, state)), [batch(1)])
  assert found.max_logit_difference == found.kl == 0
  assert found.loss_before == found.loss_after
