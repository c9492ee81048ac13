"""Adafactor (arXiv 1804.04235) for matrices that are stacked over layers and experts.

The paper's row and column statistics, its clipping of updates (section 6) and its step relative to
the parameter (section 8) are of one matrix. Here a matrix is what is left of an array without its
axes "layers" and "expert": how a model stacks its layers changes nothing, and no expert's
statistics hang on another's, so experts can be repaired and moved. optax does the rest.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

# Smaller axes are not worth factoring: optax's default.
_SMALLEST_FACTORED = 128
_STACKS = ("layers", "expert")
_MATRIX = optax.chain(
  optax.scale_by_factored_rms(min_dim_size_to_factor=_SMALLEST_FACTORED),
  optax.clip_by_block_rms(1.0),
  optax.scale_by_param_block_rms(),
)


def scale_by_adafactor() -> optax.GradientTransformation:
  """Returns the transformation of gradients into steps, to descend along, without a learning rate.

  There is no mean of gradients; the second moment of step t keeps 1 - t^-0.8 of the one before.
  Memory: a matrix of n x m, both at least 128, keeps n + m float32 numbers (an array with more axes
  those of its two largest summed over one of them), any other array as many as it has. What is kept
  are variables that name their own axes, so that a mesh splits them as it does the parameter.
  """
  return optax.GradientTransformation(_init, _update)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What belongs to one parameter; no pytree, so that a tree of it has the parameters' structure.

  Statistics that the parameter does not use are scalars.
  """

  v_row: nnx.Variable
  v_col: nnx.Variable
  v: nnx.Variable
  update: nnx.Variable | None = None


def _init(params: nnx.State) -> optax.FactoredState:
  return _state(jnp.zeros([], jnp.int32), jax.tree.map(_zeros, params, is_leaf=_is_variable))


def _update(grads: nnx.State, state: optax.FactoredState, params: nnx.State | None = None):
  def of_parameter(grad, param, v_row, v_col, v):
    return _stepped(grad, param, _Parts(v_row, v_col, v), state.count)

  trees = grads, params, state.v_row, state.v_col, state.v
  parts = jax.tree.map(of_parameter, *trees, is_leaf=_is_variable)
  return _column(parts, "update"), _state(optax.safe_increment(state.count), parts)


def _state(count: jax.Array, parts) -> optax.FactoredState:
  return optax.FactoredState(count, *(_column(parts, name) for name in ("v_row", "v_col", "v")))


def _column(parts, name: str):
  return jax.tree.map(lambda own: getattr(own, name), parts)


def _zeros(param: nnx.Variable) -> _Parts:
  axes, shape, kept = param.get_metadata()["axes"], param.get_value().shape, _kept_axes(param)

  def zeros(name):
    own = kept.get(name, ())
    value = jnp.zeros([shape[i] for i in own], jnp.float32)
    return param.replace(value, axes=tuple(axes[i] for i in own))

  return _Parts(zeros("v_row"), zeros("v_col"), zeros("v"))


def _num_stacks(param: nnx.Variable) -> int:
  axes = param.get_metadata()["axes"]
  return sum(1 for _ in itertools.takewhile(lambda name: name in _STACKS, axes))


def _kept_axes(param: nnx.Variable) -> dict[str, tuple[int, ...]]:
  """Returns which axes of the parameter each statistic has; a matrix's two largest are factored."""
  first, shape = _num_stacks(param), param.get_value().shape
  by_size = [first + int(i) for i in np.argsort(shape[first:])]
  if len(by_size) < 2 or shape[by_size[-2]] < _SMALLEST_FACTORED:
    return {"v": tuple(range(len(shape)))}
  # As in optax, rows are summed over the largest axis and columns over the next.
  without = {"v_row": by_size[-1], "v_col": by_size[-2]}
  return {name: tuple(i for i in range(len(shape)) if i != d) for name, d in without.items()}


def _stepped(grad: nnx.Variable, param: nnx.Variable, kept: _Parts, count: jax.Array) -> _Parts:
  """Returns the update and the new statistics of one parameter."""

  def of_matrix(grad, param, kept):
    factored, *rest = _MATRIX.init(param)
    before = factored._replace(count=count, **kept)
    update, (after, *_) = _MATRIX.update(grad, (before, *rest), param)
    return update, {name: getattr(after, name) for name in kept}

  run = of_matrix
  for _ in range(_num_stacks(param)):
    run = jax.vmap(run)
  used = {name: getattr(kept, name) for name in _kept_axes(param)}
  values = {name: variable.get_value() for name, variable in used.items()}
  update, values = run(grad.get_value(), param.get_value(), values)
  new = {name: used[name].replace(value) for name, value in values.items()}
  return dataclasses.replace(kept, update=grad.replace(update), **new)


def _is_variable(node) -> bool:
  return isinstance(node, nnx.Variable)
