"""Generation: greedy and sampled, cached and not, padded and not, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import DENSE, random_model, random_tokens, run, tiny_config

from moe_jax.errors import UserError
from moe_jax.inference import generate

CONFIG = tiny_config(moe=dict(dispatch="ragged"))
# Most random models repeat one token for ever, which would hide a wrong cache; this one does not.
SEED = 23
MODEL = random_model(CONFIG, SEED)
PROMPTS = random_tokens(CONFIG, 2, 4)
NEW = 4
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def greedy():
  return np.asarray(generate(MODEL, PROMPTS, NEW))


def test_the_prompt_comes_back_in_front(greedy):
  assert greedy.shape == (2, 4 + NEW) and greedy.dtype == np.int32
  np.testing.assert_array_equal(greedy[:, :4], PROMPTS)


def test_greedy_takes_the_likeliest_token_of_the_whole_prefix(greedy):
  # Causality: one pass over the result holds the logits of every prefix.
  logits = run(CONFIG, greedy, seed=SEED)
  np.testing.assert_array_equal(np.argmax(logits, axis=-1)[:, 3:-1], greedy[:, 4:])
  assert all(len(set(row)) > 2 for row in greedy[:, 4:].tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_without_cache_gives_the_same_tokens(temperature):
  choice = dict(temperature=temperature, key=KEY)
  cached = generate(MODEL, PROMPTS, NEW, **choice)
  uncached = generate(MODEL, PROMPTS, NEW, use_cache=False, **choice)
  np.testing.assert_array_equal(cached, uncached)


@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_prompts_continue_as_unpadded_ones(use_cache, greedy):
  # The prompts at the left, in the middle and at the right of a row of 7, twice each.
  tokens, mask = np.full((4, 7), 11, np.int32), np.zeros((4, 7), bool)
  for row, (prompt, start) in enumerate([(0, 0), (0, 3), (1, 2), (1, 3)]):
    tokens[row, start : start + 4], mask[row, start : start + 4] = PROMPTS[prompt], True
  padded = generate(MODEL, tokens, 3, token_mask=mask, use_cache=use_cache)
  np.testing.assert_array_equal(padded[:, :7], tokens)
  np.testing.assert_array_equal(padded[:, 7:], greedy[[0, 0, 1, 1], 4:7])


def test_prompts_of_different_lengths_continue_as_each_alone(greedy):
  mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1]], bool)
  together = generate(MODEL, PROMPTS, NEW, token_mask=mask)
  np.testing.assert_array_equal(together[0], greedy[0])
  alone = generate(MODEL, PROMPTS[1:, 1:], NEW)
  np.testing.assert_array_equal(together[1, 4:], alone[0, 3:])


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one_new_token(count, greedy):
  np.testing.assert_array_equal(generate(MODEL, PROMPTS, count), greedy[:, : 4 + count])


def test_sampling_is_reproduced_by_its_key_and_by_no_other():
  def sample(key):
    return np.asarray(generate(MODEL, PROMPTS, NEW, temperature=2.0, key=key))

  np.testing.assert_array_equal(sample(KEY), sample(KEY))
  others = [sample(jax.random.key(seed)) for seed in range(4)]
  assert len({other.tobytes() for other in others}) == 4


# The last one overflows logits / temperature in float32.
@pytest.mark.parametrize("temperature", [1e-3, 1e-37])
def test_a_low_temperature_approaches_greedy(temperature, greedy):
  np.testing.assert_array_equal(
    generate(MODEL, PROMPTS, NEW, temperature=temperature, key=KEY), greedy
  )


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_samples_have_the_probabilities_of_the_tempered_softmax(temperature):
  config = tiny_config(segments=DENSE)
  rows = 4000
  prompts = np.full((rows, 1), 5, np.int32)
  drawn = generate(random_model(config), prompts, 1, temperature=temperature, key=KEY)[:, 1]
  logits = np.asarray(run(config, prompts[:1])[0, 0], np.float64) / temperature
  expected = np.exp(logits - logits.max())
  expected /= expected.sum()
  shares = np.bincount(drawn, minlength=config.vocab_size) / rows
  # 4 standard deviations of a share.
  margin = 4 * np.sqrt(expected * (1 - expected) / rows)
  assert (np.abs(shares - expected) <= margin + 1e-12).all()
  assert (expected > 0.02).sum() >= 3


REFUSED = {
  "no prompt": (dict(tokens=np.zeros((0, 3), np.int32)), r"shape \(0, 3\).*at least one prompt"),
  "rows of two lengths": (dict(tokens=[[1], [2, 3]]), "expected rows of one length"),
  "an id that int32 takes for 1": (
    dict(tokens=np.full((1, 2), 2**32 + 1)),
    "expected ids between 0 and 12",
  ),
  "no token": (dict(tokens=np.zeros((1, 0), np.int32)), r"shape \(1, 0\).*at least one token"),
  "one row without batch": (dict(tokens=PROMPTS[0]), r"shape \(4,\)"),
  "fractions": (dict(tokens=PROMPTS + 0.5), "dtype float.* integers"),
  "an unknown id": (dict(tokens=PROMPTS + 13), "expected ids between 0 and 12"),
  "a negative id": (dict(tokens=PROMPTS - 13), "expected ids between 0 and 12"),
  "a mask of integers": (dict(token_mask=np.ones((2, 4), int)), "expected .* bool"),
  "a mask of another shape": (dict(token_mask=np.ones((2, 3), bool)), r"expected \(2, 4\)"),
  "a row of padding": (dict(token_mask=np.array([[True] * 4, [False] * 4])), "real token"),
  "a negative count": (dict(max_new_tokens=-1), "max_new_tokens = -1"),
  "a count that is a fraction": (dict(max_new_tokens=1.5), "max_new_tokens = 1.5"),
  "a temperature in words": (dict(temperature="0.5", key=KEY), "temperature = '0.5'"),
  "a negative temperature": (dict(temperature=-1.0, key=KEY), "temperature = -1.0"),
  "a temperature that is no number": (dict(temperature=float("nan"), key=KEY), "nan"),
  "a temperature that is 0 in float32": (dict(temperature=1e-46, key=KEY), "1e-46"),
  "sampling without a key": (dict(temperature=1.0), "key = None was given"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_generated_is_refused(given, message):
  arguments = dict(tokens=PROMPTS, max_new_tokens=2)
  with pytest.raises(UserError, match=message):
    generate(MODEL, **{**arguments, **given})


def test_an_unknown_id_in_padding_is_accepted():
  mask = np.array([[0, 1, 1, 1]] * 2, bool)
  filled = generate(MODEL, np.where(mask, PROMPTS, -1), NEW, token_mask=mask)
  np.testing.assert_array_equal(
    filled[:, 4:], generate(MODEL, jnp.asarray(PROMPTS), NEW, token_mask=mask)[:, 4:]
  )


def test_a_window_of_the_training_length_makes_far_tokens_forget_the_start():
  # Two prompts that differ in their first token alone: with a window of 2 over 2 layers nothing of
  # it reaches a token 5 places on, without a window it does.
  near = tiny_config(attention=dataclasses.replace(tiny_config().attention, window=2))
  a = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], np.int32)
  b = np.where(np.arange(10) == 0, 11, a).astype(np.int32)
  assert (run(near, a)[0, 9] == run(near, b)[0, 9]).all()
  assert (run(near, a)[0, 1] != run(near, b)[0, 1]).any()
  assert (run(tiny_config(), a)[0, 9] != run(tiny_config(), b)[0, 9]).any()


def test_a_window_gives_the_same_tokens_with_and_without_a_cache():
  config = tiny_config(attention=dataclasses.replace(tiny_config().attention, window=3))
  model = random_model(config)
  cached = generate(model, PROMPTS, 6)
  assert (cached == generate(model, PROMPTS, 6, use_cache=False)).all()
