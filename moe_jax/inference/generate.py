"""Autoregressive generation."""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.inference.sampling import Sampling, check_sampling, choose_token, make_sampling
from moe_jax.models import Model
from moe_jax.models.decoder import DecoderCache
from moe_jax.models.vision import image_places


def generate(
  model: Model,
  tokens: jax.Array,
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop_token: int | Sequence[int] | None = None,
  use_cache: bool = True,
  token_mask: jax.Array | None = None,
  decoder_tokens: jax.Array | None = None,
  pixel_values: jax.Array | None = None,
  key: jax.Array | None = None,
) -> jax.Array:
  """Continues prompts by a fixed number of tokens; an encoder-decoder answers them.

  A model that drops tokens when experts are full routes only the tokens of one call: with a cache
  that is one token a sequence, without it the whole prefix, so the two may differ, and a sequence
  may depend on its neighbours. Generate with a dropless model (`ModelConfig.dropless`) to have
  neither; then both ways give the same tokens.

  With a cache, prefill and step are compiled once, as one program, for each shape of `tokens`,
  `max_new_tokens`, and choice of greedy, top_k and top_p, whatever their numbers.

  Args:
    model: the language model; run as outside training.
    tokens: (B, L) int32 prompts, L >= 1.
    max_new_tokens: tokens to add to every row, 0 to 2**20.
    temperature: 0 takes the likeliest token, which top_k and top_p always keep; otherwise samples
      from softmax(logits / temperature).
    top_k: sample from the k likeliest tokens, and all equal to the k-th; None = from all.
    top_p: sample from the smallest set of likeliest tokens whose probabilities, after temperature
      and top_k, sum to top_p, 0 to 1; None = from all. Of equal tokens the lower id comes first.
    stop_token: id, or ids, that end a row: it is padded with the one it ended in, and routed no
      more. Generation ends with the last row. Ids in the prompt end nothing.
    use_cache: keep keys and values, or states. Without it every step runs the whole prefix and
      compiles for its length: a slow reference.
    token_mask: (B, L) bool, True = real token: prompts of different lengths, padded on either
      side. New tokens follow the last real token's position.
    decoder_tokens: (B, L') int32, what the answers of an encoder-decoder begin with, all of them
      real; None = `EncoderConfig.start_token` alone.
    pixel_values: (N, channels, rows, columns), the images of the prompts, see `Decoder`; a new
      token is never one of an image.
    key: random key, needed if temperature > 0.

  Returns:
    (B, L + max_new_tokens) int32, prompt (with its padding) included; of an encoder-decoder
    (B, L' + max_new_tokens), what the answers begin with included.

  Raises:
    UserError: an empty prompt, a row without a real token, an id outside the vocabulary, images
      that do not fit the prompts, or arguments out of range.
  """
  tokens = _rows("tokens", tokens)
  token_mask = (
    np.ones(tokens.shape, bool) if token_mask is None else _rows("token_mask", token_mask)
  )
  _check_prompts(tokens, token_mask, model.config.vocab_size)
  check_sampling(max_new_tokens, temperature, top_k, top_p)
  stop_ids = _stop_ids(stop_token, model.config.vocab_size)
  if temperature > 0 and key is None:
    raise UserError(
      f"temperature = {temperature} samples: key = None was given, a jax.random.key is needed"
    )
  tokens, token_mask = jnp.asarray(tokens, jnp.int32), jnp.asarray(token_mask)
  images = None
  if pixel_values is not None:
    pixel_values = jnp.asarray(pixel_values)
    images = pixel_values, image_places(model.config, tokens, token_mask, pixel_values)
  source, tokens, token_mask = _split(model, tokens, token_mask, decoder_tokens)
  if max_new_tokens == 0:
    return tokens
  key = jax.random.key(0) if key is None else key
  chooser = _Chooser(make_sampling(temperature, top_k, top_p), stop_ids, key)
  run = _generate_cached if use_cache else _generate_uncached
  new = run(*nnx.split(model), source, images, tokens, token_mask, chooser, max_new_tokens)
  return jnp.concatenate([tokens, new], axis=1)


# Tokens and mask of what an encoder reads; None without one.
_Source = tuple[jax.Array, jax.Array] | None
# Images (N, channels, rows, columns) and the prompts' tokens (B, L) that stand for them.
_Images = tuple[jax.Array, jax.Array] | None


def _split(
  model: Model, tokens: jax.Array, token_mask: jax.Array, decoder_tokens: jax.Array | None
) -> tuple[_Source, jax.Array, jax.Array]:
  """Returns what is encoded, and the tokens that are continued with their mask."""
  encoder = model.config.encoder
  if encoder is None:
    if decoder_tokens is not None:
      raise UserError("decoder_tokens were given, but the model has no encoder: give tokens alone")
    return None, tokens, token_mask
  if decoder_tokens is None:
    decoder_tokens = np.full((tokens.shape[0], 1), encoder.start_token)
  decoder_tokens = _rows("decoder_tokens", decoder_tokens)
  mask = np.ones(decoder_tokens.shape, bool)
  _check_prompts(decoder_tokens, mask, model.config.vocab_size)
  if decoder_tokens.shape[0] != tokens.shape[0]:
    raise UserError(
      f"decoder_tokens have {decoder_tokens.shape[0]} rows; expected {tokens.shape[0]}, those of"
      " tokens"
    )
  return (tokens, token_mask), jnp.asarray(decoder_tokens, jnp.int32), jnp.asarray(mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Chooser:
  """Chooses each row's next token until it stops.

  sampling: None = greedy. stop_ids: (number of ids,) int32. key: draw i is its fold i.
  """

  sampling: Sampling | None
  stop_ids: jax.Array
  key: jax.Array

  def __call__(self, logits_BV, last_B, running_B, i) -> tuple[jax.Array, jax.Array]:
    """Returns the i-th new tokens (B,), a stopped row's last one again, and who is running."""
    token_B = choose_token(logits_BV, self.sampling, jax.random.fold_in(self.key, i))
    token_B = jnp.where(running_B, token_B, last_B)
    return token_B, running_B & ~jnp.any(token_B[:, None] == self.stop_ids[None], axis=1)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _generate_cached(graph, params, source, images, tokens, token_mask, chooser, max_new_tokens):
  """Returns the new tokens (B, max_new_tokens)."""
  model = nnx.merge(graph, params)
  B, L = tokens.shape
  cache = _empty_cache(model, source, B, L + max_new_tokens - 1)
  own = {} if images is None else {"pixel_values": images[0]}
  logits, cache = model.decode(tokens, cache, token_mask=token_mask, **own)
  logits = _last_real(logits, token_mask)
  last, running = chooser(logits, jnp.zeros(B, jnp.int32), jnp.ones(B, bool), 0)
  new = jnp.zeros((B, max_new_tokens), jnp.int32).at[:, 0].set(last)

  def goes_on(state):
    i, _, _, running, _ = state
    return (i < max_new_tokens) & jnp.any(running)

  def step(state):
    i, new, last, running, cache = state
    logits, cache = model.decode(last[:, None], cache, token_mask=running[:, None])
    last, running = chooser(logits[:, -1], last, running, i)
    return i + 1, new.at[:, i].set(last), last, running, cache

  state = (jnp.int32(1), new, last, running, cache)
  i, new, last, _, _ = jax.lax.while_loop(goes_on, step, state)
  return jnp.where(jnp.arange(max_new_tokens)[None] < i, new, last[:, None])


def _empty_cache(model: Model, source: _Source, batch_size: int, num_slots: int) -> DecoderCache:
  if source is None:
    return model.init_cache(batch_size, num_slots)
  return model.init_cache(model.encode(source[0], token_mask=source[1]), num_slots)


def _generate_uncached(graph, params, source, images, tokens, token_mask, chooser, max_new_tokens):
  """Returns the new tokens (B, max_new_tokens)."""
  B, L = tokens.shape
  last, running = jnp.zeros(B, jnp.int32), jnp.ones(B, bool)
  for i in range(max_new_tokens):
    logits = _next_logits(graph, params, source, images, tokens, token_mask)
    last, running = chooser(logits, last, running, i)
    tokens = jnp.concatenate([tokens, last[:, None]], axis=1)
    token_mask = jnp.concatenate([token_mask, running[:, None]], axis=1)
    if not bool(jnp.any(running)):
      break
  left = L + max_new_tokens - tokens.shape[1]
  return jnp.pad(tokens[:, L:], ((0, 0), (0, left)), mode="edge")


@functools.partial(jax.jit, static_argnames="graph")
def _next_logits(graph, params, source, images, tokens, token_mask):
  model = nnx.merge(graph, params)
  if source is None:
    own = _of_images(images, tokens.shape[1])
    return _last_real(model(tokens, token_mask=token_mask, **own), token_mask)
  logits = model(source[0], tokens, token_mask=source[1], decoder_mask=token_mask)
  return _last_real(logits, token_mask)


def _of_images(images: _Images, length: int) -> dict[str, jax.Array]:
  """Returns what a model is told of the prompts' images when it reads `length` tokens a row."""
  if images is None:
    return {}
  pixel_values, mask = images
  new = ((0, 0), (0, length - mask.shape[1]))
  return {"pixel_values": pixel_values, "image_mask": jnp.pad(mask, new)}


def _last_real(logits_BLV: jax.Array, token_mask: jax.Array) -> jax.Array:
  """Returns the logits (B, V) at each row's last real token."""
  L = token_mask.shape[1]
  last_B = jnp.max(jnp.where(token_mask, jnp.arange(L)[None], 0), axis=1)
  return jnp.take_along_axis(logits_BLV, last_B[:, None, None], axis=1)[:, 0]


def _rows(name: str, given: Any) -> np.ndarray | jax.Array:
  """Returns an array in the precision given: as int32, large ids would pass for small ones."""
  try:
    return given if isinstance(given, jax.Array) else np.asarray(given)
  except ValueError as error:
    raise UserError(
      f"{name} cannot be made an array ({error}); expected rows of one length, padded ones with"
      " a token_mask"
    ) from None


def _check_prompts(tokens, token_mask, vocab_size: int) -> None:
  if tokens.ndim != 2 or tokens.size == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise UserError(
      f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; expected (batch,"
      " length) integers with at least one prompt and at least one token a prompt"
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


def _stop_ids(stop_token: int | Sequence[int] | None, vocab_size: int) -> jax.Array:
  """Returns the ids (number of ids,) int32, which may be none."""
  several = isinstance(stop_token, Sequence)
  ids = stop_token if several else [] if stop_token is None else [stop_token]
  for each in ids:
    if not (isinstance(each, numbers.Integral) and 0 <= each < vocab_size):
      raise UserError(
        f"stop_token = {stop_token!r} is refused: it must be an id, or a sequence of ids, between"
        f" 0 and {vocab_size - 1}"
      )
  return jnp.asarray(ids, jnp.int32)
