"""The selective scan of state space models (Mamba, arXiv 2312.00752 section 3.2): linear in length.

Letters here: B rows, L length, T places of a chunk, I channels, N states of a channel. A channel
keeps N numbers, which fade and are written and read as the token says (Algorithm 2):

  state_t = exp(step_t * decay) * state_{t-1} + (step_t * x_t) write_t
  y_t = read_t . state_t

Only the states at the borders of chunks are kept for the backward pass, which computes those inside
a chunk again: memory is (L / T + T) B N I numbers instead of several L B N I. The backward pass is
written out, since the transposes that autodiff makes of the broadcasts are sums that XLA's CPU
backend does not vectorise; here all sums over channels or states are products of matrices, eight
times as fast. Forward-mode differentiation is therefore not available.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.sharding.context import current_layout
from moe_jax.sharding.layout import Layout

# On a TPU the default would round the float32 state to bfloat16.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class _Tokens(NamedTuple):
  """What the scan reads of tokens, whose places are the first axes.

  Attributes:
    x, step: (..., B, I).
    write, read: (..., B, N).
    starts: (..., B).
  """

  x: jax.Array
  step: jax.Array
  write: jax.Array
  read: jax.Array
  starts: jax.Array


def selective_scan(
  x_BLI: jax.Array,
  step_BLI: jax.Array,
  decay_NI: jax.Array,
  write_BLN: jax.Array,
  read_BLN: jax.Array,
  *,
  starts_BL: jax.Array,
  state_BNI: jax.Array,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns y (B, L, I) and the state (B, N, I) after the last token, float32.

  Args:
    x_BLI: the channels' input, float32 as everything here.
    step_BLI: step sizes, 0 or greater; a token with step 0 leaves the state as it is.
    decay_NI: below 0.
    write_BLN, read_BLN: what every token writes with and reads with.
    starts_BL: bool, True = the state before this token is forgotten.
    state_BNI: the state before the first token.
    chunk: T, at most L is used; it changes time and memory, not the result.
  """
  tokens = _Tokens(x_BLI, step_BLI, write_BLN, read_BLN, starts_BL)
  run, layout = functools.partial(_along, chunk), current_layout()
  if layout is not None and layout.parts("channels") > 1:
    run = _by_channels(run, layout, x_BLI.shape)
  return run(decay_NI, state_BNI, tokens)


def _along(chunk: int, decay_NI, state_BNI, tokens: _Tokens) -> tuple[jax.Array, jax.Array]:
  """Scans the whole length; tokens are (B, L, ...)."""
  L = tokens.x.shape[1]
  T = max(1, min(chunk, L))
  y, state_BNI = _scan(decay_NI, state_BNI, jax.tree.map(lambda a: _in_chunks(a, T), tokens))
  return y.reshape(-1, *y.shape[2:])[:L].swapaxes(0, 1), state_BNI


def _by_channels(run: Callable, layout: Layout, shape: tuple[int, ...]) -> Callable:
  """Returns `run` with whole sequences on every device, of its own channels.

  Channels know nothing of each other, and the length is the one axis that a scan cannot be split
  over: two all-to-alls exchange the parts. Nor is there a sum over devices inside the scan, but one
  after it, of the gradients of writes and reads.
  """
  batch, _, channels = layout.spec(("batch", None, "channels"), shape, "the selective scan")
  wide, narrow = PartitionSpec(batch, None, channels), PartitionSpec(batch)
  tokens = _Tokens(x=wide, step=wide, write=narrow, read=narrow, starts=narrow)
  return jax.shard_map(
    run,
    mesh=layout.mesh,
    in_specs=(PartitionSpec(None, channels), wide, tokens),
    out_specs=(wide, wide),
    check_vma=False,
  )


def _in_chunks(a: jax.Array, T: int) -> jax.Array:
  """Returns a (B, L, ...) as (chunks, T, B, ...); zeros at the end leave the state as it is."""
  a = jnp.pad(a.swapaxes(0, 1), ((0, -a.shape[1] % T), *((0, 0),) * (a.ndim - 1)))
  return a.reshape(-1, T, *a.shape[1:])


@jax.custom_vjp
def _scan(decay_NI, state_BNI, chunks: _Tokens):
  """Returns y (chunks, T, B, I) and the last state."""
  (y, state_BNI), _ = _forward(decay_NI, state_BNI, chunks)
  return y, state_BNI


def _forward(decay_NI, state_BNI, chunks: _Tokens):
  """Returns the results, and what the backward pass needs: the states before every chunk."""

  def one(state_BNI, token: _Tokens):
    state_BNI = _fade(state_BNI, decay_NI, token) + _written(token)
    return state_BNI, _product("BNI,BN->BI", state_BNI, token.read)

  def several(state_BNI, tokens: _Tokens):
    after_BNI, y = jax.lax.scan(one, state_BNI, tokens)
    return after_BNI, (y, state_BNI)

  after_BNI, (y, borders) = jax.lax.scan(several, state_BNI, chunks)
  return (y, after_BNI), (decay_NI, chunks, borders)


def _fade(state_BNI, decay_NI, token: _Tokens) -> jax.Array:
  """Returns what a token leaves of the state; also the derivative's way back."""
  faded = jnp.exp(token.step[:, None] * decay_NI[None]) * state_BNI
  return jnp.where(token.starts[:, None, None], 0.0, faded)


def _written(token: _Tokens) -> jax.Array:
  return (token.step * token.x)[:, None] * token.write[:, :, None]


def _backward(kept, gradients):
  """Returns the gradients of `_scan`'s arguments, from the last chunk to the first."""
  decay_NI, chunks, borders = kept
  dy, dstate_BNI = gradients

  def several(carry, of_chunk):
    tokens, border_BNI, dy = of_chunk

    def again(state_BNI, token):
      return _fade(state_BNI, decay_NI, token) + _written(token), state_BNI

    _, before = jax.lax.scan(again, border_BNI, tokens)
    one = functools.partial(_backward_one, decay_NI)
    return jax.lax.scan(one, carry, (tokens, before, dy), reverse=True)

  # Rows apart until the end: a sum over them at every token would cost more than the rest.
  carry = (dstate_BNI, jnp.zeros_like(dstate_BNI))
  (dstate_BNI, ddecay_BNI), dtokens = jax.lax.scan(
    several, carry, (chunks, borders, dy), reverse=True
  )
  return jnp.sum(ddecay_BNI, axis=0), dstate_BNI, dtokens


def _backward_one(decay_NI, carry, of_token):
  """Takes the gradient of the state after a token to that before it, and the token's own."""
  dstate_BNI, ddecay_BNI = carry
  token, before_BNI, dy_BI = of_token
  after_BNI = _fade(before_BNI, decay_NI, token) + _written(token)
  dstate_BNI = dstate_BNI + token.read[:, :, None] * dy_BI[:, None]
  dbefore_BNI = _fade(dstate_BNI, decay_NI, token)
  # The exponent's gradient: what is left of the state, times the state's gradient.
  dexponent_BNI = dbefore_BNI * before_BNI
  ones_N = jnp.ones(decay_NI.shape[0], decay_NI.dtype)
  dinput_BI = _product("BNI,BN->BI", dstate_BNI, token.write)
  dtoken = _Tokens(
    x=dinput_BI * token.step,
    step=_product("BNI,N->BI", dexponent_BNI * decay_NI[None], ones_N) + dinput_BI * token.x,
    write=_product("BNI,BI->BN", dstate_BNI, token.step * token.x),
    read=_product("BNI,BI->BN", after_BNI, dy_BI),
    starts=None,
  )
  return (dbefore_BNI, ddecay_BNI + dexponent_BNI * token.step[:, None]), dtoken


_scan.defvjp(_forward, _backward)
