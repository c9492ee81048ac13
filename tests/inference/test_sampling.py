"""Temperature, top-k and top-p keep what plain loops keep, and draw with those probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.inference.sampling import check_sampling, choose_token, keep_likely, make_sampling

V = 12
# Quarters: many logits of a row are equal, and float32 holds them exactly.
LOGITS = (np.random.default_rng(5).integers(-8, 9, (40, V)) / 4).astype(np.float32)
CHOICES = [
  (1.0, 3, None),
  (0.5, V, None),
  (1.0, V + 5, None),
  (1.0, None, 0.0),
  (1.0, None, 0.3),
  (2.0, None, 0.9),
  (0.7, None, 1.0),
  (1.5, 4, 0.6),
  (0.5, 1, 0.99),
]


def kept_by_loops(row, temperature, top_k, top_p):
  """Returns the kept ids and their probabilities, in float64."""
  row = np.asarray(row, np.float64) / temperature
  ids = sorted(range(len(row)), key=lambda v: (-row[v], v))
  if top_k is not None:
    kth = row[ids[min(top_k, len(ids)) - 1]]
    ids = [v for v in ids if row[v] >= kth]
  probabilities = np.exp(row[ids] - row[ids[0]])
  probabilities /= probabilities.sum()
  if top_p is not None:
    nucleus, mass = [], 0.0
    for v, probability in zip(ids, probabilities, strict=True):
      if nucleus and mass >= top_p:
        break
      nucleus.append(v)
      mass += probability
    ids = nucleus
    probabilities = probabilities[: len(ids)] / probabilities[: len(ids)].sum()
  return dict(zip(ids, probabilities, strict=True))


@pytest.mark.parametrize("temperature, top_k, top_p", CHOICES)
def test_the_kept_tokens_are_those_of_plain_loops(temperature, top_k, top_p):
  kept = keep_likely(jnp.asarray(LOGITS), make_sampling(temperature, top_k, top_p))
  for mine, row in zip(np.asarray(kept), LOGITS, strict=True):
    expected = kept_by_loops(row, temperature, top_k, top_p)
    assert set(np.flatnonzero(mine > -np.inf)) == set(expected)
    ids = sorted(expected)
    # Kept logits differ from the tempered ones by a constant alone.
    shift = mine[ids] - row[ids] / temperature
    np.testing.assert_allclose(shift, shift[0], atol=1e-5)


def kept_of(probabilities, top_k=None, top_p=None):
  logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
  kept = keep_likely(logits, make_sampling(1.0, top_k, top_p))[0]
  return np.flatnonzero(np.asarray(kept) > -np.inf).tolist()


def test_a_mass_reached_exactly_takes_no_further_token():
  assert kept_of([0.25, 0.5, 0.25], top_p=0.5) == [1]
  assert kept_of([0.8, 0.2], top_p=0.8) == [0]


def test_of_equal_tokens_a_nucleus_takes_the_lower_id_and_top_k_takes_both():
  assert kept_of([0.25, 0.25, 0.5], top_p=0.6) == [0, 2]
  assert kept_of([0.25, 0.25, 0.5], top_k=2) == [0, 1, 2]


def test_the_nucleus_is_that_of_the_tokens_which_top_k_left():
  # Of 0.4 + 0.3 the first alone is 0.57.
  assert kept_of([0.4, 0.3, 0.2, 0.1], top_p=0.55) == [0, 1]
  assert kept_of([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.55) == [0]


@pytest.mark.parametrize(
  "choice", [(1.0, None, None), (2.0, 4, None), (0.8, None, 0.7), CHOICES[7]]
)
def test_tokens_are_drawn_with_the_probabilities_of_the_kept(choice):
  draws = 20_000
  logits = np.random.default_rng(1).normal(size=V).astype(np.float32)
  rows = jnp.broadcast_to(jnp.asarray(logits)[None], (draws, V))
  drawn = jax.jit(choose_token)(rows, make_sampling(*choice), jax.random.key(7))
  shares = np.bincount(drawn, minlength=V) / draws
  expected = np.zeros(V)
  for v, probability in kept_by_loops(logits, *choice).items():
    expected[v] = probability
  # 4 standard deviations of a share, which a token that must not be drawn does not have.
  margin = 4 * np.sqrt(expected * (1 - expected) / draws)
  assert (np.abs(shares - expected) <= margin + 1e-12).all()
  assert (expected > 0.02).sum() >= 2


@pytest.mark.parametrize("top_k, top_p", [(1, None), (None, 0.0), (1, 1.0)])
def test_the_likeliest_alone_is_the_greedy_token(top_k, top_p):
  distinct = jnp.asarray(LOGITS) + jnp.linspace(0, 0.1, V)[None]
  drawn = choose_token(distinct, make_sampling(9.0, top_k, top_p), jax.random.key(0))
  np.testing.assert_array_equal(drawn, choose_token(distinct, None, jax.random.key(0)))


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(top_k=0), "top_k = 0 is refused: .* at least 1"),
    (dict(top_k=2.5), "top_k = 2.5 is refused"),
    (dict(top_p=-0.1), "top_p = -0.1 is refused: .* from 0 .* to 1"),
    (dict(top_p=90), "top_p = 90"),
    (dict(top_p=float("nan")), "top_p = nan"),
    (dict(top_p="0.5"), "top_p = '0.5'"),
  ],
)
def test_what_cannot_be_kept_is_refused(given, message):
  with pytest.raises(UserError, match=message):
    check_sampling(1, 1.0, **given)
