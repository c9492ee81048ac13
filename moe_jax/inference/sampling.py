"""Choosing the next token: temperature, then the k likeliest, then the smallest set of mass p."""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError

# Float32 arithmetic takes smaller numbers for 0, and 0 / 0 draws nothing sensible; it takes numbers
# a little larger than the hottest for infinity.
_COLDEST, _HOTTEST = 1e-37, 1e37
# The cache has a place for every new token from the start: more is a slip of the hand.
_MOST_NEW_TOKENS = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn; other numbers need no other compiled program, another None does.

  Attributes:
    temperature: float32 scalar.
    top_k: int32 scalar, see `keep_top_k`; None keeps all.
    tail_mass: float32 scalar, 1 - top_p, see `keep_top_p`; None keeps all.
  """

  temperature: jax.Array
  top_k: jax.Array | None
  tail_mass: jax.Array | None


def make_sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling | None:
  """Returns how to draw, None for taking the likeliest token (temperature 0)."""
  if temperature == 0:
    return None
  return Sampling(
    jnp.float32(temperature),
    None if top_k is None else jnp.int32(min(top_k, 2**31 - 1)),
    # Subtracted in float64: the nucleus of mass 0.8 of (0.8, 0.2) is one token.
    None if top_p is None else jnp.float32(1 - float(top_p)),
  )


def choose_token(logits_BV: jax.Array, sampling: Sampling | None, key: jax.Array) -> jax.Array:
  """Returns the next token of each row, (B,) int32; greedy without `sampling`."""
  if sampling is None:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return jax.random.categorical(key, keep_likely(logits_BV, sampling)).astype(jnp.int32)


def keep_likely(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns the tempered logits (B, V), minus infinity where a token must not be drawn."""
  # Measured from the best logit, a tiny temperature sends the others to minus infinity; the best
  # one itself stays 0 instead of overflowing.
  below_best_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  tempered_BV = below_best_BV / sampling.temperature
  if sampling.top_k is not None:
    tempered_BV = keep_top_k(tempered_BV, sampling.top_k)
  if sampling.tail_mass is not None:
    tempered_BV = keep_top_p(tempered_BV, sampling.tail_mass)
  return tempered_BV


def keep_top_k(logits_BV: jax.Array, top_k: jax.Array | int) -> jax.Array:
  """Replaces all but the `top_k` largest logits of a row by minus infinity.

  Logits equal to the k-th largest are all kept; k beyond V keeps all
  (transformers' `TopKLogitsWarper`).
  """
  V = logits_BV.shape[-1]
  kth = jnp.take(jnp.sort(logits_BV, axis=-1), V - jnp.minimum(top_k, V), axis=-1)
  return jnp.where(logits_BV < kth[:, None], -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, tail_mass: jax.Array | float) -> jax.Array:
  """Replaces all but the nucleus of a row by minus infinity (arXiv 1904.09751 section 3.1).

  The nucleus is the smallest set of likeliest tokens whose probabilities sum to at least
  1 - tail_mass, and at least one token. Of equal logits the lower id comes first, where
  transformers' `TopPLogitsWarper` leaves the order to its sort. Sums are float32.
  """
  # The unlikeliest first: their small probabilities are summed before large ones swallow them.
  order_BV = jnp.flip(jnp.argsort(-logits_BV, axis=-1, stable=True), axis=-1)
  ascending_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
  kept_BV = jnp.cumsum(ascending_BV, axis=-1) > tail_mass
  kept_BV = kept_BV.at[:, -1].set(True)
  kept_BV = jnp.take_along_axis(kept_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def check_sampling(
  max_new_tokens: int,
  temperature: float,
  top_k: int | None = None,
  top_p: float | None = None,
) -> None:
  """Raises UserError unless all are in range.

  Args:
    max_new_tokens: 0 to 2**20.
    temperature: 0 (greedy) or a number that float32 can divide by.
    top_k: an integer of at least 1, or None.
    top_p: 0 to 1, or None.
  """
  if not (_is_integer(max_new_tokens) and 0 <= max_new_tokens <= _MOST_NEW_TOKENS):
    raise UserError(
      f"max_new_tokens = {max_new_tokens!r} is refused: it must be an integer from 0 to"
      f" {_MOST_NEW_TOKENS}"
    )
  heat = _number(temperature)
  if heat != 0 and not _COLDEST <= heat <= _HOTTEST:
    raise UserError(
      f"temperature = {temperature!r} is refused: it must be 0 (greedy) or from {_COLDEST} to"
      f" {_HOTTEST}"
    )
  if top_k is not None and not (_is_integer(top_k) and top_k >= 1):
    raise UserError(
      f"top_k = {top_k!r} is refused: it must be an integer of at least 1 (1 keeps the likeliest"
      " token, None keeps all)"
    )
  if top_p is not None and not 0 <= _number(top_p) <= 1:
    raise UserError(
      f"top_p = {top_p!r} is refused: it must be from 0 (the likeliest token alone) to 1 (all)"
    )


def _is_integer(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(value: Any) -> float:
  """Returns a number, or an array of none, as a float; anything else is no number."""
  array = np.asarray(value)
  return float(array) if array.ndim == 0 and array.dtype.kind in "iuf" else math.nan
