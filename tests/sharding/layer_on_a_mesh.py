"""The MoE layer of any preset, on one device and on a mesh: output, gradients, losses, metrics."""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from moe.compiled import FAST_COMPILE
from sharding.meshes import MESHES, mesh_layout
from small_presets import small_preset

from moe_jax.errors import UserError
from moe_jax.moe import MoEConfig, MoELayer, preset_names
from moe_jax.moe.expert_parallel import check_exchange
from moe_jax.sharding.config import Exchange
from moe_jax.sharding.context import use_layout
from moe_jax.sharding.layout import Layout

E, D, F, B, L, V = 8, 8, 16, 16, 8, 32
# How tokens travel: the form of dispatch, and fields of the sharding config.
PATHS = {
  "einsum": ("einsum", {"exchange": Exchange.ALL_TO_ALL}),
  "compiler": ("einsum", {"exchange": Exchange.COMPILER}),
  "gather": ("gather", {"exchange": Exchange.ALL_TO_ALL}),
  "chunked": ("gather", {"exchange": Exchange.ALL_TO_ALL, "chunks": 2}),
  "staged": ("gather", {"exchange": Exchange.ALL_TO_ALL, "hierarchical": True}),
  "collected": ("gather", {"exchange": Exchange.ALL_GATHER}),
  "ragged": ("ragged", {"exchange": Exchange.ALL_TO_ALL}),
  "ring": ("ragged", {"exchange": Exchange.ALL_GATHER}),
}
# To a layer a split sequence is one more way to split tokens; the tests of whole steps have it.
WHOLE_SEQUENCES = tuple(name for name, sizes in MESHES.items() if "sequence" not in sizes)
FACTORS = {"preset": tuple(preset_names()), "path": tuple(PATHS), "mesh": WHOLE_SEQUENCES}


def layer_config(name: str, dispatch: str, **changes) -> MoEConfig:
  """Returns the layer of a preset, in groups small enough for every device to have some."""
  groups = dict(grouping="fixed", group_size=8)
  return MoEConfig(
    routing=small_preset(name, E, **groups),
    hidden_dim=F,
    gated=True,
    activation="silu",
    dispatch=dispatch,
    **changes,
  )


def applies(row: dict) -> bool:
  """Tells whether a preset, a path and a mesh go together."""
  dispatch, fields = PATHS[row["path"]]
  try:
    config = layer_config(row["preset"], dispatch)
    check_exchange(config.dispatch, mesh_layout(row["mesh"], **fields).config)
  except UserError:
    return False
  return True


def all_rows(factors: Mapping[str, tuple], allowed: Callable[[dict], bool]) -> list[dict]:
  """Returns every allowed combination of one value a factor."""
  rows = (
    dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())
  )
  return list(filter(allowed, rows))


def run(config: MoEConfig, layout: Layout | None, mask: np.ndarray | None = None) -> dict:
  """Returns the output, every gradient, the losses and metrics of a step of training."""
  layer = MoELayer(D, config, key=jax.random.key(0), vocab_size=V)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, L, D)).astype(np.float32)
  # Half of a row's tokens like one expert.
  x[:, ::2] += 0.5 * np.asarray(layer.router.kernel[...])[:, 0]
  ids, mask = rng.integers(0, V, (B, L)), rng.random((B, L)) < 0.8 if mask is None else mask
  weights = np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)

  def objective(params, x):
    with use_layout(layout):
      y, aux = nnx.merge(graph, params, rest)(
        x, token_mask=mask, token_ids=jnp.asarray(ids), train=True, key=jax.random.key(3)
      )
    return jnp.sum(y * weights) + aux.weighted_loss, (y, aux.plan.losses, aux.plan.metrics)

  if layout is not None:
    params = jax.device_put(params, layout.of_tree(params))
    x = jax.device_put(x, layout.sharding(("batch", "length", None), x.shape))
  step = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True), compiler_options=FAST_COMPILE)
  gradients, (y, losses, metrics) = jax.device_get(step(params, x))
  return {"gradients": gradients, "y": y, "losses": losses, "metrics": metrics}


@functools.cache
def run_alone(name: str, dispatch: str) -> dict:
  """Returns what `run` does on one device."""
  return run(layer_config(name, dispatch), None)


def counts(results: dict) -> dict:
  """Returns the metrics that are ratios of whole numbers, which no order of summation changes."""
  whole = ("assignments", "dropped_fraction")
  return {name: results["metrics"][name] for name in whole}


def assert_close(got, want, tolerance: float = 1e-5) -> None:
  """Compares trees tensor by tensor, relative to the largest entry; names the first to differ."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want), strict=True
  )
  for (path, a), (_, b) in pairs:
    # Metrics that tell yes or no are compared as numbers too.
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-6)
    assert error <= tolerance, (jax.tree_util.keystr(path), error)
