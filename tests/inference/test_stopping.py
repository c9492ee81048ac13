"""Rows that stop, and what generation compiles and runs."""

import jax
import numpy as np
import pytest
from tiny_models import random_model, random_tokens, tiny_config

from moe_jax.errors import UserError
from moe_jax.inference import generate
from moe_jax.models import Decoder

CONFIG = tiny_config(moe=dict(dispatch="ragged"))
# A model that does not repeat itself: most random ones do.
MODEL = random_model(CONFIG, 23)
PROMPTS = random_tokens(CONFIG, 2, 4)
NEW = 4


@pytest.fixture(scope="module")
def free():
  """The new tokens of rows that never stop."""
  return np.asarray(generate(MODEL, PROMPTS, NEW))[:, 4:]


def stopped(rows, ids):
  """Returns the rows with each one's first id of `ids` repeated to its end."""
  rows = rows.copy()
  for row in rows:
    ends = np.flatnonzero(np.isin(row, ids))
    if ends.size:
      row[ends[0] :] = row[ends[0]]
  return rows


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_is_padded_with_the_token_it_stopped_at(use_cache, free):
  ids = (int(free[0, 1]), int(free[1, 2]))
  expected = stopped(free, ids)
  # The rows stop apart from each other, and without stopping would go on differently.
  assert (expected != free).any(axis=1).all()
  new = generate(MODEL, PROMPTS, NEW, stop_token=ids, use_cache=use_cache)[:, 4:]
  np.testing.assert_array_equal(new, expected)


def test_a_single_id_stops_too_and_the_prompt_s_own_does_not(free):
  stop = int(free[0, 1])
  prompts = PROMPTS.copy()
  prompts[1, 0] = stop
  new = np.asarray(generate(MODEL, prompts, NEW, stop_token=stop))[:, 4:]
  np.testing.assert_array_equal(new[0], stopped(free, [stop])[0])
  free_of_it = np.asarray(generate(MODEL, prompts, NEW))[:, 4:]
  np.testing.assert_array_equal(new, stopped(free_of_it, [stop]))


@pytest.mark.parametrize("given", [13, -1, "2", (2, 13), 1.5])
def test_a_stop_token_outside_the_vocabulary_is_refused(given):
  with pytest.raises(UserError, match="stop_token = .* between 0 and 12"):
    generate(MODEL, PROMPTS, NEW, stop_token=given)


class Counter:
  """Counts the traces of `Decoder.decode` by its tokens' shapes, and its runs."""

  def __init__(self, monkeypatch):
    self.traced, self.runs = [], 0
    original = Decoder.decode

    def decode(model, tokens, cache, **options):
      self.traced.append(tokens.shape)
      jax.debug.callback(self.count)
      return original(model, tokens, cache, **options)

    monkeypatch.setattr(Decoder, "decode", decode)

  def count(self):
    self.runs += 1

  def runs_of(self, call):
    self.runs = 0
    jax.block_until_ready(call())
    jax.effects_barrier()
    return self.runs


def test_prefill_and_step_are_compiled_once_and_run_once_a_token(monkeypatch, free):
  counter = Counter(monkeypatch)
  # 7 new tokens: a shape that no other test has compiled.
  sample = dict(max_new_tokens=7, temperature=1.0, top_k=3, top_p=0.9, key=jax.random.key(0))
  assert counter.runs_of(lambda: generate(MODEL, PROMPTS, **sample)) == 7
  assert sorted(set(counter.traced)) == [(2, 1), (2, 4)]
  traces = len(counter.traced)
  others = dict(temperature=0.5, top_k=9, top_p=0.2, key=jax.random.key(5))
  counter.runs_of(lambda: generate(MODEL, PROMPTS + 1 - PROMPTS // 12, **{**sample, **others}))
  assert len(counter.traced) == traces
  # Generation ends with the last row: the first tokens stop both rows after the prefill.
  greedy = dict(max_new_tokens=7, stop_token=(int(free[0, 0]), int(free[1, 0])))
  assert counter.runs_of(lambda: generate(MODEL, PROMPTS, **greedy)) == 1
