"""Decoding with a cache gives the logits of the whole sequence at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from tiny_models import DENSE, random_model, random_parameters, random_tokens, run, tiny_config

from moe_jax.errors import UserError

# The same float32 sums in products of other shapes.
TOLERANCE = 1e-5

CONFIG = tiny_config(moe=dict(dispatch="ragged"))
TOKENS = random_tokens(CONFIG, 2, 6)


@functools.partial(jax.jit, static_argnames="graph")
def decode(graph, params, tokens, cache, token_mask):
  return nnx.merge(graph, params).decode(tokens, cache, token_mask=token_mask)


def decode_in_chunks(config, sizes, token_mask, num_slots):
  """Returns the logits (B, L, V) of TOKENS fed to the cache in chunks."""
  graph, params = random_parameters(config)
  cache = random_model(config).init_cache(len(TOKENS), num_slots)
  logits, start = [], 0
  for size in sizes:
    part = slice(start, start + size)
    step, cache = decode(
      graph, params, jnp.asarray(TOKENS[:, part]), cache, jnp.asarray(token_mask[:, part])
    )
    logits.append(step)
    start += size
  assert int(cache.index) == start
  np.testing.assert_array_equal(cache.token_mask[:, :start], token_mask)
  return np.concatenate(logits, axis=1)


MASKS = {
  "no padding": [[1] * 6] * 2,
  "left and right padding": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
  "padding between": [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1]],
}


@pytest.mark.parametrize("sizes", [(1,) * 6, (6,), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_cached_logits_equal_those_of_the_whole_sequence(mask, sizes):
  mask = np.array(mask, bool)
  # One slot more than tokens: a free slot must not be looked at.
  cached = decode_in_chunks(CONFIG, sizes, mask, num_slots=7)
  assert relative_error(cached[mask], run(CONFIG, TOKENS, token_mask=mask)[mask]) <= TOLERANCE


def test_a_cache_of_bfloat16_activations_is_bfloat16():
  config = tiny_config(segments=DENSE, dtype="bfloat16")
  cache = random_model(config).init_cache(2, 3)
  assert {a.dtype for a in jax.tree.leaves(cache.segments)} == {jnp.dtype("bfloat16")}
  # 2 layers, 2 rows, 3 slots, 2 key-value heads of width 4.
  assert {a.shape for a in jax.tree.leaves(cache.segments)} == {(2, 2, 3, 2, 4)}


def filled_cache(used, slots):
  """Returns a dense model and its cache of `slots` slots, of which `used` are taken."""
  model = random_model(tiny_config(segments=DENSE))
  cache = model.init_cache(2, slots)
  return model, model.decode(jnp.asarray(TOKENS[:, :used]), cache)[1]


def test_a_full_cache_is_refused():
  model, cache = filled_cache(2, 3)
  with pytest.raises(UserError, match=r"3 slots and 2 are taken: 2 more .* at least 4$"):
    model.decode(jnp.asarray(TOKENS[:, :2]), cache)


def test_a_cache_that_overflows_inside_jit_gives_nan():
  model, cache = filled_cache(2, 3)
  step = jax.jit(lambda cache: model.decode(jnp.asarray(TOKENS[:, :1]), cache))
  logits, cache = step(cache)
  assert np.isfinite(logits).all()
  assert np.isnan(step(cache)[0]).all()


def test_a_cache_of_another_batch_is_refused():
  model, cache = filled_cache(1, 3)
  with pytest.raises(UserError, match="cache has 2 rows; expected 1"):
    model.decode(jnp.asarray(TOKENS[:1, :1]), cache)


def test_a_hash_of_earlier_ids_is_refused():
  config = tiny_config(routing=dict(selection="hash", hash_ngram=2))
  model = random_model(config)
  with pytest.raises(UserError, match="hash_ngram = 2"):
    model.decode(jnp.asarray(TOKENS), model.init_cache(TOKENS.shape[0], 16))
