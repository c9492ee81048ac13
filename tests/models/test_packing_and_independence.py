"""What a token's logits depend on: the tokens before it in its own document, nothing else."""

import dataclasses

import numpy as np
import pytest
from comparison import relative_error
from tiny_models import DENSE, random_tokens, run, tiny_config

# The same float32 sums in products of other shapes and orders.
TOLERANCE = 1e-5
# What a token that does matter changes at least, by far.
CHANGED = 1e-3

ROUTERS = {
  "gather": tiny_config(),
  "ragged": tiny_config(moe=dict(dispatch="ragged")),
  "hash": tiny_config(routing=dict(selection="hash", hash_ngram=2, top_k=1, weighting="raw")),
}
every_router = pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS.keys())
CONFIG = ROUTERS["gather"]
TOKENS = random_tokens(CONFIG, 3, 8)


def full_experts(**routing):
  """Returns the config with room for 3 assignments an expert: most are dropped."""
  return tiny_config(routing=dict(overflow="drop", capacity=3, **routing))


@every_router
def test_packed_documents_have_the_logits_they_have_alone(config):
  packed = run(
    config,
    TOKENS,
    segment_ids=np.tile([1, 1, 1, 1, 2, 2, 2, 2], (3, 1)),
    positions=np.tile([0, 1, 2, 3, 0, 1, 2, 3], (3, 1)),
  )
  alone = run(config, TOKENS.reshape(6, 4))
  assert relative_error(packed, np.reshape(alone, packed.shape)) <= TOLERANCE
  # Without segment ids the second document reads the first.
  assert relative_error(run(config, TOKENS)[:, 4:], packed[:, 4:]) > CHANGED


def test_positions_matter_only_by_their_differences():
  shifted = run(CONFIG, TOKENS, positions=np.tile(np.arange(8) + 50, (3, 1)))
  assert relative_error(shifted, run(CONFIG, TOKENS)) <= TOLERANCE
  stretched = run(CONFIG, TOKENS, positions=np.tile(3 * np.arange(8), (3, 1)))
  assert relative_error(stretched, run(CONFIG, TOKENS)) > CHANGED


@every_router
@pytest.mark.parametrize("changed", [0, 4, 7])
def test_a_token_changes_no_logits_before_it(config, changed):
  other = TOKENS.copy()
  other[:, changed] = (other[:, changed] + 1) % config.vocab_size
  before, after = run(config, TOKENS), run(config, other)
  if changed:
    assert relative_error(after[:, :changed], before[:, :changed]) <= TOLERANCE
  for position in range(changed, 8):
    assert relative_error(after[:, position], before[:, position]) > CHANGED


def test_served_by_score_a_token_changes_logits_before_it():
  # Batch prioritised routing is not causal; the docstring says so, this shows it.
  config = full_experts(priority="max_score", grouping="sequence")
  before = run(config, TOKENS)
  others = [
    np.concatenate([TOKENS[:, :7], np.full_like(TOKENS[:, 7:], i)], axis=1) for i in range(13)
  ]
  assert max(relative_error(run(config, other)[:, :7], before[:, :7]) for other in others) > CHANGED


@every_router
def test_a_row_does_not_depend_on_its_neighbours(config):
  other = TOKENS.copy()
  other[1:] = (other[1:] + 5) % config.vocab_size
  together, apart = run(config, TOKENS), run(config, other)
  assert relative_error(together[0], apart[0]) <= TOLERANCE


def test_where_rows_share_full_experts_a_row_depends_on_earlier_rows():
  config = full_experts()
  together = run(config, TOKENS)
  assert relative_error(run(config, TOKENS[2:])[0], together[2]) > CHANGED
  # Groups of one sequence end the dependence, though tokens are still dropped.
  config = full_experts(grouping="sequence")
  assert relative_error(run(config, TOKENS[2:])[0], run(config, TOKENS)[2]) <= TOLERANCE


def test_what_padding_holds_does_not_matter():
  mask = np.array([[1, 1, 1, 0, 1, 1, 0, 0]] * 3, bool)
  before = run(full_experts(), TOKENS, token_mask=mask)
  # Not even an id outside the vocabulary.
  for filling in (0, -1, 10_000):
    other = np.where(mask, TOKENS, filling)
    after = run(full_experts(), other, token_mask=mask)
    assert relative_error(after[mask], before[mask]) <= TOLERANCE


@pytest.mark.parametrize("token", [-1, 13])
def test_an_id_outside_the_vocabulary_does_not_pass_for_a_word(token):
  tokens = TOKENS.copy()
  tokens[0, 3] = token
  assert np.isnan(run(CONFIG, tokens)[0, 3]).all()


def test_the_dropless_config_of_a_model_drops_nothing_and_keeps_its_parameters():
  config = full_experts()
  _, aux = run(config, TOKENS, return_aux=True)
  assert aux.metrics["dropped_fraction"] > 0.1
  logits, aux = run(config.dropless(), TOKENS, return_aux=True)
  assert aux.metrics["dropped_fraction"] == 0
  assert relative_error(logits, run(CONFIG, TOKENS)) <= TOLERANCE


def test_the_dropless_config_of_a_dense_model_is_itself():
  config = dataclasses.replace(tiny_config(segments=DENSE), moe=None)
  assert config.dropless() is config
