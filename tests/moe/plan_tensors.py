"""A plan's tensors in one compiled call: operation by operation, compiling takes longer."""

import functools

import jax
from moe.compiled import FAST_COMPILE


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def tensors(plan):
  """Returns dispatch mask and combine weights, each (G, S, E, C)."""
  return plan.dispatch_mask(), plan.combine_weights()
