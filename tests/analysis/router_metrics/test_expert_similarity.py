"""How alike experts are."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.router_metrics import similarity
from moe_jax.errors import UserError


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_copies_are_alike_and_independent_weights_are_not():
  one = {"up": normal(0, 1, 6, 5), "down": normal(1, 1, 5, 6)}
  copies = {name: np.repeat(w, 4, axis=0) for name, w in one.items()}
  np.testing.assert_allclose(similarity.weight_similarity(copies), 1.0, rtol=1e-5)
  independent = {"up": normal(2, 4, 40, 50), "down": normal(3, 4, 50, 40)}
  # 4,000 weights: standard deviation 0.016 of each of 6 pairs.
  np.testing.assert_allclose(similarity.weight_similarity(independent), 0.0, atol=0.025)


def test_hand_solved_cosine():
  weights = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
  np.testing.assert_allclose(similarity.weight_similarity([weights]), 2 / 6 / np.sqrt(2), rtol=1e-6)


def test_outputs_equal_up_to_shift_rotation_and_scale_are_the_same():
  x = normal(0, 30, 4)
  rotation = np.linalg.qr(normal(1, 4, 4))[0]
  outputs = np.stack([x, 3.0 * x @ rotation + 5.0])
  np.testing.assert_allclose(similarity.output_similarity(outputs), 1.0, rtol=1e-4)


def test_cka_equals_the_formula_on_features():
  x, y = normal(0, 20, 3).astype(np.float64), normal(1, 20, 3).astype(np.float64)
  a, b = x - x.mean(axis=0), y - y.mean(axis=0)
  norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
  expected = np.linalg.norm(a.T @ b) ** 2 / norms
  table = np.asarray(similarity.linear_cka(np.stack([x, y]).astype(np.float32)))
  np.testing.assert_allclose(table, [[1, expected], [expected, 1]], rtol=1e-5)


def test_a_single_expert_has_no_pair():
  with pytest.raises(UserError, match="1 was given, expected at least 2"):
    similarity.output_similarity(normal(0, 1, 5, 2))
  with pytest.raises(UserError, match="one first axis"):
    similarity.weight_similarity([normal(0, 2, 3), normal(0, 3, 3)])
