"""Sums over segments: runs of equal `segment_ids` inside a routing group."""

import jax
import jax.numpy as jnp


def segment_runs(segment_ids_GS: jax.Array) -> jax.Array:
  """Returns (G, S) int32, the number of each token's run in its group, from 0."""
  changes_GS = segment_ids_GS[:, 1:] != segment_ids_GS[:, :-1]
  return jnp.pad(jnp.cumsum(changes_GS, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def sum_by_run(values_GSE: jax.Array, run_GS: jax.Array) -> jax.Array:
  """Returns (G, S, E): the sum of each run, zeros beyond the last one."""
  num_runs = run_GS.shape[1]
  return jax.vmap(lambda values, run: jax.ops.segment_sum(values, run, num_runs))(
    values_GSE, run_GS
  )


def mean_of_segment(
  values_GSE: jax.Array, mask_GS: jax.Array, segment_ids_GS: jax.Array
) -> jax.Array:
  """Gives every token the mean over the real tokens of its segment, (G, S, E)."""
  run_GS = segment_runs(segment_ids_GS)
  real_GS1 = mask_GS[..., None].astype(values_GSE.dtype)
  total = sum_by_run(values_GSE * real_GS1, run_GS)
  mean = total / jnp.maximum(sum_by_run(real_GS1, run_GS), 1.0)
  return jnp.take_along_axis(mean, run_GS[..., None], axis=1)
