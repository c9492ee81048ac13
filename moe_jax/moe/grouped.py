"""Dropless experts: every expert applied to its own rows, without a capacity buffer.

One function, `grouped_experts`, and one implementation for each platform. All of them compute the
active FLOPs alone, in both directions. `jax.lax.ragged_dot` is none of them: on CPU it lowers to a
masked product over all experts, E times the work and the memory, and on accelerators its weight
gradient does so.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from moe_jax.choices import as_choice
from moe_jax.layers.mlp import Product
from moe_jax.moe.kernels.blocked import block_lengths, blocked_experts
from moe_jax.moe.kernels.megablox import Megablox
from moe_jax.moe.kernels.products import grouped_dot
from moe_jax.moe.kernels.triton import Triton
from moe_jax.moe.moves import Moves, collect, look_up, spread
from moe_jax.moe.options import WeightOn

# network(rows (M, D), weights, key or None, product, last_product) -> rows (M, D). A product maps
# rows, a weight and perhaps a bias to rows; they are those of one expert or, to other products, of
# all.
Network = Callable[[jax.Array, Any, jax.Array | None, Product, Product], jax.Array]


class GroupedKernel(enum.StrEnum):
  """Which program runs the experts of ragged dispatch: the same result, for one platform each."""

  AUTO = "auto"  # the one for the default platform of the process
  BLOCKED = "blocked"  # loops over blocks of rows: CPU, and slow but correct anywhere
  MEGABLOX = "megablox"  # JAX's Pallas kernels for TPU (MegaBlocks, arXiv 2211.15841)
  TRITON = "triton"  # Pallas kernels for GPU


_BY_PLATFORM = {
  "cpu": GroupedKernel.BLOCKED,
  "tpu": GroupedKernel.MEGABLOX,
  "gpu": GroupedKernel.TRITON,
}
_KERNELS = {GroupedKernel.MEGABLOX: Megablox(), GroupedKernel.TRITON: Triton()}


def grouped_experts(
  network: Network,
  x: jax.Array,
  weight: jax.Array,
  moves: Moves,
  rows_per_expert: jax.Array,
  weights: Any,
  *,
  weight_on: WeightOn = WeightOn.OUTPUT,
  key: jax.Array | None = None,
  kernel: GroupedKernel = GroupedKernel.AUTO,
) -> jax.Array:
  """Sums, for every token, its experts' outputs times their combine weights.

  Args:
    network: one expert as a function of rows, each on its own. It multiplies by weights and adds
      biases only through `product`, and makes its result by `last_product`. `blocked` calls it
      with the weights of one expert, the other kernels once with those of all.
    x: (T, D) tokens.
    weight: (N,) the combine weight of each assignment, used in float32.
    moves: which of R rows, sorted by expert, each assignment sits in.
    rows_per_expert: (E,) int32, sums to at most R; no assignment sits in a row beyond the sum.
    weights: a pytree of (E, ...) arrays.
    weight_on: whether combine weights multiply what enters an expert or what leaves it.
    key: random key for dropout; kernels draw different masks from one key.
    kernel: see `GroupedKernel`.

  Returns:
    (T, D) in the dtype of x, summed in float32. A token without a row gets zeros. Gradients: an
    expert without rows gets exactly 0; weight gradients accumulate in float32.

  Raises:
    UserError: an unknown kernel.
  """
  kernel = resolve_kernel(kernel)
  if kernel == GroupedKernel.BLOCKED:
    num_experts = rows_per_expert.shape[0]
    keys = None if key is None else jax.random.split(key, num_experts)
    blocks = block_lengths(moves.assignment.size, num_experts)
    arrays = x, weight, moves, rows_per_expert, weights, keys
    return blocked_experts(network, blocks, weight_on, *arrays)

  def product(rows, weights, bias=None):
    y = grouped_dot(_KERNELS[kernel], rows, weights, rows_per_expert)
    return y if bias is None else y + _by_row(bias, rows_per_expert, rows.shape[0])

  rows, weight = spread(x, moves), weight.astype(jnp.float32)
  if weight_on == WeightOn.INPUT:
    rows = (rows.astype(jnp.float32) * look_up(weight, moves.assignment)[:, None]).astype(x.dtype)
    weight = jnp.ones_like(weight)
  return collect(network(rows, weights, key, product, product), weight, moves)


def _by_row(bias_EF: jax.Array, rows_per_expert: jax.Array, num_rows: int) -> jax.Array:
  """Returns each row's expert's bias, (R, F); zeros in the rows beyond the groups."""
  ends = jnp.cumsum(rows_per_expert)
  return look_up(bias_EF, jnp.searchsorted(ends, jnp.arange(num_rows), side="right"))


def resolve_kernel(kernel: GroupedKernel) -> GroupedKernel:
  """Returns the kernel itself, or for `auto` that of the default platform.

  A program compiled ahead of time for another platform than the default one has to name its kernel.
  """
  kernel = as_choice(GroupedKernel, "grouped_kernel", kernel)
  return platform_kernel(jax.default_backend()) if kernel == GroupedKernel.AUTO else kernel


@functools.cache
def platform_kernel(platform: str) -> GroupedKernel:
  """Returns what `auto` means on a platform and, as results are cached, logs it once a process."""
  kernel = _BY_PLATFORM.get(platform, GroupedKernel.BLOCKED)
  logging.info("grouped_kernel = auto: using %s on platform %s", kernel, platform)
  return kernel
