"""Dropout in training only, under a key, where it is asked for and nowhere else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from tiny_models import DENSE, MOE, random_model, random_tokens, run, tiny_config

from moe_jax.errors import UserError
from moe_jax.layers.attention_context import AttentionContext
from moe_jax.layers.rotary import rotary_table
from moe_jax.models.stack import ScannedSegment

PLAIN = tiny_config(segments=DENSE)
DROPPING = dataclasses.replace(PLAIN, dropout=0.3)
TOKENS = random_tokens(DROPPING, 2, 6)
KEYS = [jax.random.key(seed) for seed in range(2)]

# The same float32 operations, fused otherwise.
TOLERANCE = 1e-6

train = functools.partial(run, tokens=TOKENS, train=True)


def test_dropout_is_off_outside_training():
  assert relative_error(run(DROPPING, TOKENS), run(PLAIN, TOKENS)) <= TOLERANCE
  # Even where a key is given.
  with_key = run(DROPPING, TOKENS, key=KEYS[0])
  assert relative_error(with_key, run(DROPPING, TOKENS)) <= TOLERANCE


def test_a_key_reproduces_a_training_pass_and_another_does_not():
  first, again, other = (train(DROPPING, key=key) for key in (KEYS[0], KEYS[0], KEYS[1]))
  np.testing.assert_array_equal(first, again)
  assert relative_error(other, first) > 0.1
  assert relative_error(run(DROPPING, TOKENS), first) > 0.1


def test_unrolling_the_scan_draws_the_same_numbers():
  unrolled = train(dataclasses.replace(DROPPING, scan_unroll=2), key=KEYS[0])
  assert relative_error(unrolled, train(DROPPING, key=KEYS[0])) <= 1e-5


@pytest.mark.parametrize(
  "config, draws",
  [
    (tiny_config(segments=DENSE, moe=dict(expert_dropout=0.5, dispatch="ragged")), False),
    (tiny_config(segments=MOE, moe=dict(expert_dropout=0.5, dispatch="ragged")), True),
    (tiny_config(segments=MOE, moe=dict(expert_dropout=0.5)), True),
    (tiny_config(segments=DENSE, mlp=dict(dropout=0.5)), True),
    (tiny_config(segments=MOE, mlp=dict(dropout=0.5)), False),
    (tiny_config(segments=MOE, moe=dict(router_jitter=0.5)), True),
  ],
  ids=["experts dense", "experts ragged", "experts gather", "mlp", "mlp moe", "jitter"],
)
def test_each_rate_touches_its_own_part_alone(config, draws):
  changed = relative_error(train(config, key=KEYS[0]), train(config, key=KEYS[1]))
  assert changed > 1e-2 if draws else changed <= TOLERANCE


def test_expert_dropout_leaves_the_first_router_as_it_was():
  config = tiny_config(segments=MOE, moe=dict(expert_dropout=0.5))
  aux = [train(config, key=key, return_aux=True)[1] for key in KEYS]
  assert relative_error(aux[0].router_logits[0], aux[1].router_logits[0]) <= TOLERANCE
  assert relative_error(aux[0].router_logits[1], aux[1].router_logits[1]) > 1e-2


@pytest.mark.parametrize(
  "config",
  [
    DROPPING,
    tiny_config(mlp=dict(dropout=0.1)),
    tiny_config(moe=dict(expert_dropout=0.1)),
    tiny_config(moe=dict(router_jitter=0.1)),
    tiny_config(routing=dict(selection="random_second")),
  ],
  ids=["dropout", "mlp", "expert", "jitter", "random second"],
)
def test_training_without_a_key_is_refused_where_one_is_drawn_from(config):
  with pytest.raises(UserError, match="key = None was given"):
    random_model(config)(jnp.asarray(TOKENS), train=True)


def test_a_model_that_draws_nothing_trains_without_a_key():
  assert relative_error(train(PLAIN), run(PLAIN, TOKENS)) <= TOLERANCE


def segment_of_two_equal_small_layers():
  """Returns a segment of 2 layers with dropout 0.5 that add the same small y: attention is off."""
  config = tiny_config(segments=DENSE, dropout=0.5)
  segment = ScannedSegment(config, config.parsed_segments()[0], key=KEYS[0])
  for path, param in nnx.to_flat_state(nnx.state(segment)):
    value = jnp.broadcast_to(param.get_value()[:1], param.get_value().shape)
    param.set_value({"out": 0.0, "down": 1e-4}.get(path[-1], 1.0) * value)
  return segment


def test_repeats_of_a_scan_draw_different_masks():
  # x grows by (mask_1 + mask_2) * y; equal masks would never keep exactly one y.
  segment = segment_of_two_equal_small_layers()
  x = jax.random.normal(KEYS[1], (4, 16, 8))
  mask = jnp.ones((4, 16), bool)
  rotary = rotary_table(jnp.zeros((4, 16), jnp.int32), 4, 1.0)
  contexts = {"attention": AttentionContext(rotary, jnp.tril(jnp.ones((4, 16, 16), bool)))}
  call = jax.jit(lambda key: segment(x, contexts, mask, None, key=key, train=True)[0] - x)
  both = call(None)
  kept = np.round(np.asarray(call(KEYS[1]) / both)[np.abs(both) > 1e-5])
  # Each mask keeps half and doubles it: 0, 1 or 2 times the sum of both, with shares 1/4, 1/2, 1/4.
  shares = [np.mean(kept == count) for count in (0, 1, 2)]
  np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=5 * 0.5 / np.sqrt(kept.size))
