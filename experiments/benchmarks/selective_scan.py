"""Times the selective scan of Mamba against a loop over tokens, and against attention.

    python -m experiments.benchmarks.selective_scan [--lengths 1024,2048] [--rounds 5]

The README beside this file says how to read the table.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from moe_jax.layers.attend import attend
from moe_jax.layers.selective_scan import selective_scan

# Jamba at a sixteenth of its width: D = 256, twice that in channels; 2 query heads of its width 128
# share one key-value head.
_CHANNELS, _STATES, _CHUNK = 512, 16, 64
_HEADS, _KV_HEADS, _HEAD_DIM = 2, 1, 128
# With backward, the scores of 16,384 tokens would take 10 GiB.
_LONGEST_ATTENTION = {False: 2**14, True: 2**13}


def main(argv: list[str] | None = None) -> None:
  """Runs the benchmark and prints its table."""
  args = _parse(argv)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.rounds} rounds")
  print(f"{args.clock} time; I {_CHANNELS}, N {_STATES}, chunk {_CHUNK}; ratios of fastest rounds")
  print(
    f"{'':8}{'length':>8}{'scan ms':>10}{'growth':>8}{'loop x':>8}{'attention x':>13}"
    f"{'scan MiB':>10}{'loop MiB':>10}{'attention MiB':>15}"
  )
  for backward in (False, True):
    before = None
    for length in args.lengths:
      programs = make_programs(length, backward)
      seconds = timing.time_interleaved(
        programs, [args.rounds] * len(programs), args.clock, on_round=lambda index: None
      )
      scan = min(seconds[0])
      print(_row(length, backward, programs, seconds, before and scan / before), flush=True)
      before = scan


def make_programs(length: int, backward: bool) -> list[timing.Program]:
  """Returns scan, loop and attention of one sequence, compiled, with all gradients or without.

  Attention is missing where its scores take too much memory.
  """
  draw = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)

  channels, states = (1, length, _CHANNELS), (1, length, _STATES)
  step = jax.nn.softplus(normal(*channels) - 3.0)
  decay = -jnp.exp(normal(_STATES, _CHANNELS))
  given = (normal(*channels), step, decay, normal(*states), normal(*states))
  queries = normal(1, length, _HEADS, _HEAD_DIM)
  keys, values = (normal(1, length, _KV_HEADS, _HEAD_DIM) for _ in range(2))
  cases = [(scan, given), (loop, given)]
  if length <= _LONGEST_ATTENTION[backward]:
    cases.append((causal_attention, (queries, keys, values)))
  return [
    timing.compile_program(_with_gradients(fn, len(args)) if backward else fn, *args)
    for fn, args in cases
  ]


def _with_gradients(fn: Callable[..., jax.Array], count: int) -> Callable:
  return jax.grad(lambda *args: jnp.sum(jnp.square(fn(*args))), argnums=tuple(range(count)))


def scan(x, step, decay, write, read) -> jax.Array:
  """Returns what `moe_jax.layers.selective_scan` makes of one sequence."""
  starts, state = jnp.zeros(x.shape[:2], bool), jnp.zeros((1, *decay.shape), x.dtype)
  return selective_scan(
    x, step, decay, write, read, starts_BL=starts, state_BNI=state, chunk=_CHUNK
  )[0]


def loop(x, step, decay, write, read) -> jax.Array:
  """Returns the same by the definition: one token after another, differentiated by JAX."""

  def one(state_BIN, token):
    x, step, write, read = token
    kept = jnp.exp(step[:, :, None] * decay.T[None]) * state_BIN
    state_BIN = kept + (step * x)[:, :, None] * write[:, None]
    return state_BIN, jnp.sum(state_BIN * read[:, None], axis=-1)

  tokens = tuple(a.swapaxes(0, 1) for a in (x, step, write, read))
  _, y = jax.lax.scan(one, jnp.zeros((1, *decay.shape[::-1]), x.dtype), tokens)
  return y.swapaxes(0, 1)


def causal_attention(queries, keys, values) -> jax.Array:
  """Returns the attention product of the project's layers, whose scores are all in memory."""
  length = queries.shape[1]
  return attend(queries, keys, values, jnp.tril(jnp.ones((1, length, length), bool)))


def _row(length, backward, programs, seconds, growth) -> str:
  own, *others = (min(each) for each in seconds)
  memory = [program.temp_bytes / 2**20 for program in programs]
  with_attention = len(others) > 1
  slower = f"{others[1] / own:.2f}" if with_attention else "-"
  scores = f"{memory[2]:.0f}" if with_attention else "-"
  return (
    f"{'fwd+bwd' if backward else 'forward':8}{length:8}{1e3 * own:10.1f}"
    f"{f'{growth:.2f}' if growth else '-':>8}{others[0] / own:8.1f}{slower:>13}"
    f"{memory[0]:10.0f}{memory[1]:10.0f}{scores:>15}"
  )


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=timing.integers, default=[2**n for n in range(10, 15)])
  parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
  timing.add_clock(parser)
  return parser.parse_args(argv)


if __name__ == "__main__":
  main()
