"""The Mamba mixer equals its loop: values, gradients, padding, packed documents, decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from layers.attention_layers import cached, whole
from oracles import finite_differences, mamba

from moe_jax.errors import UserError
from moe_jax.layers.attention_context import Places
from moe_jax.layers.mamba import Mamba
from moe_jax.layers.mamba_config import MambaConfig

# Float32 sums of tens of terms against float64.
TOLERANCE = 1e-5
D, L = 3, 6
PLAIN = MambaConfig(inner_dim=4, step_rank=2, state_dim=2, conv_width=3, scan_chunk=4)
BIASED = "biases, none on the convolution, wide"
CONFIGS = {
  "plain": PLAIN,
  BIASED: dataclasses.replace(
    PLAIN, proj_bias=True, conv_bias=False, conv_width=4, activation="gelu_exact"
  ),
  "no convolution": dataclasses.replace(PLAIN, conv_width=1, norm_epsilon=0.1),
}
MASKS = np.array(
  [[1] * L, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]], bool
)
X = np.random.default_rng(1).normal(size=(*MASKS.shape, D)).astype(np.float32)
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@functools.cache
def random_mixer(config):
  """Returns the graph and random parameters, all of order 1."""
  layer = nnx.eval_shape(lambda: Mamba(D, config, key=jax.random.key(0), scale=1.0))
  graph, shapes = nnx.split(layer)
  rng = np.random.default_rng(0)

  def draw(param):
    value = 0.7 * rng.normal(size=param.get_value().shape)
    norm = param.get_metadata()["axes"] == ("norm",)
    return param.replace(jnp.asarray(value + norm, jnp.float32))

  return graph, jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, nnx.Variable))


def float64(params):
  """Returns the parameters as the oracle takes them."""
  weights = jax.tree.map(np.float64, nnx.to_pure_dict(params))
  return {name: w["scale"] if isinstance(w, dict) else w for name, w in weights.items()}


def loop(config, weights, row, x_LD=None, segment_ids=None):
  """Returns the oracle's output (L, D) of a row."""
  return mamba.mixer(
    X[row].astype(np.float64) if x_LD is None else x_LD,
    weights,
    token_mask=MASKS[row],
    segment_ids=segment_ids,
    epsilon=config.norm_epsilon,
    activation=str(config.activation),
  )


@configs
def test_output_is_that_of_the_loop_under_padding(config):
  graph, params = random_mixer(config)
  y = whole(graph, params, config, X, MASKS)
  for row, mask in enumerate(MASKS):
    assert relative_error(y[row][mask], loop(config, float64(params), row)[mask]) <= TOLERANCE


@configs
@pytest.mark.parametrize("sizes", [(1,) * L, (4, 1, 1), (2, 4)], ids=str)
def test_decoding_is_the_whole_sequence(config, sizes):
  graph, params = random_mixer(config)
  y, cache = cached(graph, params, config, X, MASKS, sizes)
  expected = whole(graph, params, config, X, MASKS)
  assert relative_error(y[MASKS], expected[MASKS]) <= TOLERANCE
  assert cache.state.shape == (len(MASKS), config.state_dim, config.inner_dim)


def test_padding_after_the_first_token_leaves_the_cache_as_it_is():
  config, mask = CONFIGS[BIASED], np.ones((2, 3), bool)
  layer = (*random_mixer(config), config)
  _, before = cached(*layer, X[:2, :3], mask, (3,))
  padded = np.pad(mask, ((0, 0), (0, 2)))
  _, after = cached(*layer, X[:2, :5], padded, (3, 1, 1))
  jax.tree.map(np.testing.assert_array_equal, before, after)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2], [1, 2, 2, 2, 0, 0]])


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def packed(graph, params, config, x, mask, segment_ids):
  layer, positions = nnx.merge(graph, params), jnp.zeros(mask.shape, jnp.int32)
  places = Places(jnp.arange(L), positions, positions, mask, segment_ids)
  return layer(x, layer.context(config, places))[0]


@configs
def test_nothing_crosses_the_start_of_a_document(config):
  graph, params = random_mixer(config)
  # The last row has padding inside a document and before the start of one.
  rows, masks = [0, 1, 2, 3], MASKS[:4]
  segments = np.concatenate([SEGMENTS, [[1, 1, 1, 1, 2, 2]]])
  y = packed(graph, params, config, X[rows], masks, segments)
  for row in rows:
    expected = loop(config, float64(params), row, segment_ids=segments[row])
    assert relative_error(y[row][masks[row]], expected[masks[row]]) <= TOLERANCE


@configs
def test_chunks_change_nothing(config):
  graph, params = random_mixer(config)
  expected = whole(graph, params, config, X, MASKS)
  for chunk in (1, 5, 64):
    other = dataclasses.replace(config, scan_chunk=chunk)
    y = whole(random_mixer(other)[0], params, other, X, MASKS)
    assert relative_error(y[MASKS], expected[MASKS]) <= TOLERANCE


@functools.partial(jax.jit, static_argnames=("graph", "config"))
@functools.partial(jax.grad, argnums=(0, 1))
def gradient(params, x, graph, config, mask, cotangent):
  return jnp.sum(cotangent * whole(graph, params, config, x, mask))


@pytest.mark.parametrize("name, row", [("plain", 0), (BIASED, 3)])
def test_every_gradient_is_that_of_the_loop(name, row):
  config, mask = CONFIGS[name], MASKS[row]
  graph, params = random_mixer(config)
  cotangent = np.random.default_rng(2).normal(size=(L, D)) * mask[:, None]
  found, dx = gradient(params, X[[row]], graph, config, mask[None], cotangent[None])
  mine, weights = float64(found), float64(params)

  def of_weight(name, value):
    return np.sum(cotangent * loop(config, weights | {name: value}, row))

  for name, value in weights.items():
    theirs = finite_differences.gradient(functools.partial(of_weight, name), value)
    assert relative_error(mine[name], theirs) <= TOLERANCE, name

  def of_input(x_LD):
    return np.sum(cotangent * loop(config, weights, row, x_LD))

  assert relative_error(dx[0], finite_differences.gradient(of_input, X[row])) <= TOLERANCE


def test_what_padding_holds_reaches_nothing():
  graph, params = random_mixer(PLAIN)
  other = np.where(MASKS[..., None], X, np.nan)
  y = whole(graph, params, PLAIN, other, MASKS)
  assert relative_error(y[MASKS], whole(graph, params, PLAIN, X, MASKS)[MASKS]) == 0
  found, dx = gradient(params, other, graph, PLAIN, MASKS, MASKS[..., None] * np.ones_like(X))
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))
  assert not np.any(dx[~MASKS])


def test_states_are_float32_whatever_the_activations():
  config = PLAIN
  graph, params = random_mixer(config)
  layer = nnx.merge(graph, params)
  cache = layer.empty_cache(config, (2, 9), jnp.bfloat16)
  assert (cache.window.dtype, cache.state.dtype) == (jnp.bfloat16, jnp.float32)
  y = whole(graph, params, config, jnp.asarray(X, jnp.bfloat16), MASKS)
  assert y.dtype == jnp.bfloat16
  # Activations of 8 bits through five products: 2^-8 times a few.
  assert relative_error(y[MASKS], whole(graph, params, config, X, MASKS)[MASKS]) <= 0.05


def test_births_are_the_papers():
  layer = Mamba(8, MambaConfig(4096, 2, state_dim=3), key=jax.random.key(0), scale=1.0)
  steps = np.log(jax.nn.softplus(layer.step_bias[...]))
  # Evenly spread between the logarithms of 0.001 and 0.1.
  assert np.log(1e-3) <= steps.min() + 1e-3 and steps.max() <= np.log(0.1) + 1e-3
  assert abs(steps.mean() - np.log(1e-2)) <= 5 * np.log(100) / np.sqrt(12 * 4096)
  np.testing.assert_allclose(
    np.exp(layer.log_decay[...]), np.tile([1.0, 2.0, 3.0], (4096, 1)), 1e-6
  )
  np.testing.assert_array_equal(layer.skip[...], 1.0)


REFUSED = [
  (dict(inner_dim=0), "inner_dim = 0 .* at least 1"),
  (dict(step_rank=-1), "step_rank = -1"),
  (dict(scan_chunk=0), "scan_chunk = 0"),
  (dict(conv_width=0), "conv_width = 0"),
  (dict(norm_epsilon=0.0), "norm_epsilon = 0.0 .* greater than 0"),
  (dict(activation="silo"), "did you mean 'silu'"),
  (dict(activation="shifted_quick_gelu"), "no gate; expected for example silu"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused_in_one_sentence(changes, message):
  with pytest.raises(UserError, match=message) as caught:
    dataclasses.replace(PLAIN, **changes)
  assert "\n" not in str(caught.value)
