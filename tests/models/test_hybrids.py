"""Models of Mamba and attention layers: decoding, padding, packed documents, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from tiny_models import random_model, random_parameters, random_tokens, run, tiny_config

from moe_jax import generate
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.models import DepthConfig

# The same float32 sums in products of other shapes and orders.
TOLERANCE = 1e-5
CONFIG = tiny_config(
  segments=(("mamba:moe attention:dense", 2),),
  attention=AttentionConfig(4, 2, 4, positions="none"),
  mamba=MambaConfig(inner_dim=12, step_rank=2, state_dim=4, scan_chunk=4),
  moe=dict(dispatch="ragged"),
)
LENGTH = 7
TOKENS = random_tokens(CONFIG, 2, LENGTH)


@functools.partial(jax.jit, static_argnames="graph")
def decode(graph, params, tokens, cache, token_mask):
  return nnx.merge(graph, params).decode(tokens, cache, token_mask=token_mask)


MASKS = {
  "no padding": [[1] * LENGTH] * 2,
  "left and right padding": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
  "padding between": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (4, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_cached_logits_equal_those_of_the_whole_sequence(mask, sizes):
  mask, (graph, params) = np.array(mask, bool), random_parameters(CONFIG)
  cache, start, logits = random_model(CONFIG).init_cache(2, LENGTH + 1), 0, []
  for size in sizes:
    part = slice(start, start + size)
    step, cache = decode(graph, params, TOKENS[:, part], cache, mask[:, part])
    logits.append(step)
    start += size
  whole = run(CONFIG, TOKENS, token_mask=mask)
  assert relative_error(np.concatenate(logits, axis=1)[mask], whole[mask]) <= TOLERANCE


def test_padded_prompts_continue_as_alone():
  model, new, width = random_model(CONFIG, 3), 2, 2
  tokens = np.full((4, LENGTH + width), 11, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, (prompt, start) in enumerate([(0, 0), (0, width), (1, 0), (1, width)]):
    place = slice(start, start + LENGTH)
    tokens[row, place], mask[row, place] = TOKENS[prompt], True
  alone = np.asarray(generate(model, TOKENS, new))[:, LENGTH:]
  assert len(set(alone.ravel().tolist())) > 2
  padded = generate(model, tokens, new, token_mask=mask)
  np.testing.assert_array_equal(padded[:, LENGTH + width :], alone[[0, 0, 1, 1]])


def test_packed_documents_have_the_logits_they_have_alone():
  tokens = random_tokens(CONFIG, 2, 8)
  packed = run(CONFIG, tokens, segment_ids=np.tile([1, 1, 1, 1, 2, 2, 2, 2], (2, 1)))
  alone = np.reshape(run(CONFIG, tokens.reshape(4, 4)), packed.shape)
  assert relative_error(packed, alone) <= TOLERANCE


def test_a_token_changes_no_logits_before_it_and_all_after():
  other = TOKENS.copy()
  other[:, 3] = (other[:, 3] + 1) % CONFIG.vocab_size
  before, after = run(CONFIG, TOKENS), run(CONFIG, other)
  assert relative_error(after[:, :3], before[:, :3]) <= TOLERANCE
  for position in range(3, LENGTH):
    assert relative_error(after[:, position], before[:, position]) > 1e-3


def test_a_cache_has_states_that_do_not_grow():
  few, many = (random_model(CONFIG).init_cache(2, slots).segments[0] for slots in (3, 9))
  assert [cache.window.shape for cache in (few[0], many[0])] == [(2, 2, 3, 12)] * 2
  assert [cache.state.shape for cache in (few[0], many[0])] == [(2, 2, 4, 12)] * 2
  assert (few[1].key.shape[2], many[1].key.shape[2]) == (3, 9)


def test_further_tokens_are_predicted_through_a_mamba_block():
  config = dataclasses.replace(CONFIG, mtp_depth=1, segments=(("attention:dense mamba:moe", 1),))
  graph, params = random_parameters(config)

  def call(params, tokens):
    return nnx.merge(graph, params)(tokens, train=True, return_aux=True)

  _, aux = jax.eval_shape(call, params, jax.ShapeDtypeStruct((2, 5), jnp.int32))
  assert [each.shape for each in aux.mtp_logits] == [(2, 5, config.vocab_size)]


REFUSED = [
  (
    dict(segments=(("mamba:dense:depth attention:moe", 1),), depth=DepthConfig()),
    "mamba block that only some tokens take, which is not supported: .*'mamba:dense'",
  ),
  (dict(mamba=None), "has mamba blocks but mamba is None"),
  (dict(segments=(("attention:dense attention:moe", 1),)), "no mamba block, so mamba would be"),
  (dict(segments=(("manba:dense attention:moe", 1),)), "did you mean mamba:dense"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused_in_one_sentence(changes, message):
  with pytest.raises(UserError, match=message) as caught:
    dataclasses.replace(CONFIG, **changes)
  assert "\n" not in str(caught.value)
