"""The whole decoder equals a float64 forward pass of plain loops, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import relative_error
from flax import nnx
from oracles import decoder, language_model
from tiny_models import (
  ALTERNATING,
  DENSE,
  MOE,
  oracle_weights,
  random_parameters,
  random_tokens,
  run,
  tiny_config,
)

from moe_jax.layers.mlp import Activation

# Float32 sums of tens of terms through 4 blocks against float64.
TOLERANCE = 1e-5

L = 7


def oracle_options(config, length=L):
  """Returns the options of `oracles.decoder.logits` that say the same as the config."""
  route = {}
  if config.moe is not None:
    routing = config.moe.routing
    route = dict(top_k=routing.top_k, capacity=length, weighting=str(routing.weighting))
  return dict(
    activation=str((config.mlp or config.moe).activation),
    route=route,
    base=config.attention.rope_theta,
    epsilon=config.norm_epsilon,
  )


def oracle_logits(config, weights, tokens, **call):
  """Returns the oracle's logits (L, V) of one row; positions count from 0 unless given."""
  call = {"positions": np.arange(len(tokens)), **call}
  return decoder.logits(tokens, weights, **call, **oracle_options(config, len(tokens)))


CONFIGS = {
  "dense and moe, gated silu, untied": tiny_config(),
  "dense, plain relu, tied": tiny_config(
    segments=DENSE, gated=False, activation=Activation.RELU, tie_embeddings=True
  ),
  "moe, plain gelu, raw top-1": tiny_config(
    segments=MOE,
    gated=False,
    activation=Activation.GELU,
    norm_epsilon=1e-2,
    routing=dict(top_k=1, weighting="raw"),
  ),
  "moe, gated gelu, tied, mixtral weights": tiny_config(
    segments=MOE,
    activation=Activation.GELU,
    tie_embeddings=True,
    routing=dict(weighting="softmax_selected"),
  ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_the_float64_oracle(config):
  tokens = random_tokens(config, 2, L)
  weights = oracle_weights(config, random_parameters(config)[1])
  expected = [oracle_logits(config, weights, row) for row in tokens]
  assert relative_error(run(config, tokens), expected) <= TOLERANCE


# Padding left, right and in the middle; the last row has none.
TOKEN_MASK = np.array(
  [
    [0, 0, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 0, 1, 1, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
  ],
  bool,
)


def assert_real_logits_equal_the_oracle(config, token_mask, **call):
  """Compares a batch under a token mask with the oracle, row after row, at real tokens."""
  tokens = random_tokens(config, len(token_mask), L)
  logits = run(config, tokens, token_mask=token_mask, **call)
  weights = oracle_weights(config, random_parameters(config)[1])
  for row, mask in enumerate(token_mask):
    own = {name: value[row] for name, value in call.items()}
    own.setdefault("positions", np.cumsum(mask) - 1)
    expected = oracle_logits(config, weights, tokens[row], token_mask=mask, **own)
    assert relative_error(logits[row][mask], expected[mask]) <= TOLERANCE


def test_padding_anywhere_equals_the_float64_oracle():
  assert_real_logits_equal_the_oracle(tiny_config(), TOKEN_MASK)


def test_packed_and_padded_rows_equal_the_float64_oracle():
  segment_ids = np.array(
    [[1, 1, 1, 2, 2, 3, 0], [1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0], [4, 4, 4, 9, 9, 9, 9]]
  )
  positions = np.array([language_model.positions_of(row) for row in segment_ids])
  assert_real_logits_equal_the_oracle(
    tiny_config(), segment_ids > 0, segment_ids=segment_ids, positions=positions
  )


def test_full_experts_drop_what_the_float64_oracle_drops():
  # 14 assignments a row for 4 experts of 2 slots: at least 6 are dropped.
  config = tiny_config(
    routing=dict(overflow="drop", capacity=2, grouping="sequence"), moe=dict(dispatch="gather")
  )
  weights = oracle_weights(config, random_parameters(config)[1])
  tokens = random_tokens(config, 2, L)
  options = oracle_options(config)
  options["route"]["capacity"] = 2
  expected = [decoder.logits(row, weights, positions=np.arange(L), **options) for row in tokens]
  assert relative_error(run(config, tokens), expected) <= TOLERANCE
  dropless = [oracle_logits(config, weights, row) for row in tokens]
  assert relative_error(dropless, expected) > 1e-2


GRADIENT_CONFIG = tiny_config(segments=ALTERNATING, routing=dict(weighting="raw"))
GRADIENT_TOKENS = random_tokens(GRADIENT_CONFIG, L + 1, seed=5)


@jax.jit
@jax.grad
def loss_gradient(params):
  """Returns the gradient of the mean cross-entropy of one row."""
  model = nnx.merge(random_parameters(GRADIENT_CONFIG)[0], params)
  logits = model(jnp.asarray(GRADIENT_TOKENS[None, :-1]))[0]
  targets = jnp.asarray(GRADIENT_TOKENS[1:])
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def oracle_loss(params):
  """Returns the same loss in float64; `params` may hold float64 arrays."""
  weights = oracle_weights(GRADIENT_CONFIG, params)
  logits = oracle_logits(GRADIENT_CONFIG, weights, GRADIENT_TOKENS[:-1])
  return language_model.cross_entropy(logits, GRADIENT_TOKENS[1:])


def test_gradients_of_every_parameter_equal_finite_differences():
  params = random_parameters(GRADIENT_CONFIG)[1]
  paths = [path for path, _ in nnx.to_flat_state(params)]
  gradients = dict(nnx.to_flat_state(loss_gradient(params)))
  values = {path: np.asarray(p.get_value(), np.float64) for path, p in nnx.to_flat_state(params)}
  rng = np.random.default_rng(0)
  for path in paths:
    gradient = np.asarray(gradients[path].get_value(), np.float64)
    # A unit vector that weighs every entry: one difference quotient sees the whole array.
    direction = rng.normal(size=gradient.shape)
    direction /= np.linalg.norm(direction)
    quotient = difference_quotient(values, path, direction)
    # Float32 gradients against a quotient that is exact to about 1e-9.
    error = abs(np.sum(gradient * direction) - quotient) / np.linalg.norm(gradient)
    assert error <= 1e-5, f"{path}: {error}"


def difference_quotient(values, path, direction, step=1e-5):
  """Returns the central difference of the oracle's loss along a direction of one parameter."""
  sides = []
  for sign in (1.0, -1.0):
    moved = {**values, path: values[path] + sign * step * direction}
    sides.append(oracle_loss(nnx.State(unflatten(moved))))
  return (sides[0] - sides[1]) / (2.0 * step)


def unflatten(flat):
  """Returns the nested dict of a dict with tuples as keys."""
  tree = {}
  for path, value in flat.items():
    node = tree
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = value
  return tree
