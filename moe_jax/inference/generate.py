"""Autoregressive generation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.models import Decoder

# Float32 arithmetic takes smaller numbers for 0, and 0 / 0 draws nothing sensible; it takes numbers
# a little larger than the hottest for infinity.
_COLDEST, _HOTTEST = 1e-37, 1e37
# The cache has a place for every new token from the start: more is a slip of the hand.
_MOST_NEW_TOKENS = 2**20


def generate(
  model: Decoder,
  tokens: jax.Array,
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  use_cache: bool = True,
  token_mask: jax.Array | None = None,
  key: jax.Array | None = None,
) -> jax.Array:
  """Continues prompts by a fixed number of tokens.

  A model that drops tokens when experts are full routes only the tokens of one call: with a cache
  that is one token a sequence, without it the whole prefix, so the two may differ, and a sequence
  may depend on its neighbours. Generate with a dropless model (`ModelConfig.dropless`) to have
  neither; then both ways give the same tokens.

  Args:
    model: the language model; run as outside training.
    tokens: (B, L) int32 prompts, L >= 1.
    max_new_tokens: tokens to add to every row, 0 to 2**20.
    temperature: 0 takes the likeliest token; otherwise samples from softmax(logits / temperature).
    use_cache: keep keys and values. Without it every step runs the whole prefix and compiles for
      its length: a slow reference.
    token_mask: (B, L) bool, True = real token: prompts of different lengths, padded on either
      side. New tokens follow the last real token's position.
    key: random key, needed if temperature > 0.

  Returns:
    (B, L + max_new_tokens) int32, prompt (with its padding) included.

  Raises:
    UserError: an empty prompt, a row without a real token, an id outside the vocabulary, or
      arguments out of range.
  """
  tokens = jnp.asarray(tokens)
  token_mask = jnp.ones(tokens.shape, bool) if token_mask is None else jnp.asarray(token_mask)
  _check_prompts(tokens, token_mask, model.config.vocab_size)
  check_sampling(max_new_tokens, temperature)
  if temperature > 0 and key is None:
    raise UserError(
      f"temperature = {temperature} samples: key = None was given, a jax.random.key is needed"
    )
  tokens = tokens.astype(jnp.int32)
  if max_new_tokens == 0:
    return tokens
  key = jax.random.key(0) if key is None else key
  graph, params = nnx.split(model)
  if not use_cache:
    return _generate_uncached(graph, params, tokens, token_mask, key, temperature, max_new_tokens)
  return _generate_cached(
    graph,
    params,
    tokens,
    token_mask,
    key,
    jnp.float32(temperature),
    max_new_tokens,
    temperature > 0,
  )


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "sample"))
def _generate_cached(graph, params, tokens, token_mask, key, temperature, max_new_tokens, sample):
  model = nnx.merge(graph, params)
  B, L = tokens.shape
  logits, cache = model.decode(
    tokens, model.init_cache(B, L + max_new_tokens - 1), token_mask=token_mask
  )
  first = _choose(_last_real(logits, token_mask), key, 0, temperature, sample)

  def step(carry, i):
    token, cache = carry
    logits, cache = model.decode(token[:, None], cache)
    token = _choose(logits[:, -1], key, i, temperature, sample)
    return (token, cache), token

  _, rest = jax.lax.scan(step, (first, cache), jnp.arange(1, max_new_tokens))
  return jnp.concatenate([tokens, first[:, None], rest.T], axis=1)


def _generate_uncached(graph, params, tokens, token_mask, key, temperature, max_new_tokens):
  for i in range(max_new_tokens):
    logits = _next_logits(graph, params, tokens, token_mask)
    token = _choose(logits, key, i, temperature, temperature > 0)
    tokens = jnp.concatenate([tokens, token[:, None]], axis=1)
    token_mask = jnp.pad(token_mask, ((0, 0), (0, 1)), constant_values=True)
  return tokens


@functools.partial(jax.jit, static_argnames="graph")
def _next_logits(graph, params, tokens, token_mask):
  return _last_real(nnx.merge(graph, params)(tokens, token_mask=token_mask), token_mask)


def _choose(logits_BV, key, i, temperature, sample: bool):
  """Returns the next token (B,) int32; draw i of the key."""
  if not sample:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  # Measured from the best logit, a tiny temperature sends the others to minus infinity; the best
  # one itself stays 0 instead of overflowing.
  below_best_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  draw = jax.random.categorical(jax.random.fold_in(key, i), below_best_BV / temperature)
  return draw.astype(jnp.int32)


def _last_real(logits_BLV: jax.Array, token_mask: jax.Array) -> jax.Array:
  """Returns the logits (B, V) at each row's last real token."""
  L = token_mask.shape[1]
  last_B = jnp.max(jnp.where(token_mask, jnp.arange(L)[None], 0), axis=1)
  return jnp.take_along_axis(logits_BLV, last_B[:, None, None], axis=1)[:, 0]


def _check_prompts(tokens, token_mask, vocab_size: int) -> None:
  if tokens.ndim != 2 or tokens.shape[1] == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise UserError(
      f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; expected (batch,"
      " length) integers with at least one token a prompt"
    )
  if token_mask.shape != tokens.shape or token_mask.dtype != bool:
    raise UserError(
      f"token_mask has shape {token_mask.shape} and dtype {token_mask.dtype};"
      f" expected {tokens.shape} and bool, True = real token"
    )
  if not bool(jnp.all(jnp.any(token_mask, axis=1))):
    raise UserError("token_mask has a row without a real token; a prompt needs at least one")
  unknown = token_mask & ((tokens < 0) | (tokens >= vocab_size))
  if bool(jnp.any(unknown)):
    raise UserError(
      f"tokens hold the id {int(tokens[unknown][0])}; expected ids between 0 and {vocab_size - 1}"
    )


def check_sampling(max_new_tokens: int, temperature: float) -> None:
  """Raises UserError unless both are in range.

  Args:
    max_new_tokens: 0 to 2**20.
    temperature: 0 (greedy) or a number that float32 can divide by.
  """
  if not 0 <= max_new_tokens <= _MOST_NEW_TOKENS:
    raise UserError(
      f"max_new_tokens = {max_new_tokens} is refused: it must be from 0 to {_MOST_NEW_TOKENS}"
    )
  if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
    raise UserError(
      f"temperature = {temperature} is refused: it must be 0 (greedy) or from {_COLDEST} to"
      f" {_HOTTEST}"
    )
