"""The arrays of a mixture of experts from those of the dense network that it replaces."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from moe_jax.convert.rules import Path, flat_leaves
from moe_jax.convert.surgery.draws import generator
from moe_jax.convert.surgery.layer_trees import Leaves
from moe_jax.convert.surgery.operation import Role
from moe_jax.models import ModelConfig
from moe_jax.moe.router import Router

# The axis of the hidden units, from the right: the same in a dense network and in stacked experts.
HIDDEN_AXIS = {"gate": -1, "gate_bias": -1, "up": -1, "up_bias": -1, "down": -2}
_NAMES = (*HIDDEN_AXIS, "down_bias")
_UNITS, _REINIT, _NOISE = range(3)
DENSE: Path = ("weights",)
EXPERTS: Path = ("experts", "weights")
SHARED: Path = ("shared", "network", "weights")


@dataclasses.dataclass(frozen=True)
class DenseToExperts:
  """Makes the feed-forward of one layer; see `UpcycleOptions` for the fields.

  Expert r G' + g is copy r of routed part g, G' of them. The bias of the last matrix, which no
  hidden unit owns, is shared out over the parts.

  Attributes:
    target: the config of the model.
    in_groups: the parts of a copy share their router column.
    factor: what the last matrix and its bias are multiplied by, in routed experts.
    key: of this layer.
  """

  target: ModelConfig
  parts: int
  shared_parts: int
  noise: float
  reinit: float
  in_groups: bool
  router_std: float
  factor: float
  key: jax.Array

  def __call__(self, dense: Leaves, role: Role) -> Leaves:
    """Returns the arrays of the layer; see `FeedForwardEdit`."""
    weights = {path[-1]: array for path, array in dense.items() if path[:-1] == DENSE}
    made = {EXPERTS + (name,): array for name, array in self._experts(weights, role).items()}
    if self.shared_parts:
      shared = self._units(weights["up"])[: self.shared_parts].reshape(-1)
      own = {name: self._part(name, weights[name], shared, role) for name in weights}
      made |= {SHARED + (name,): array for name, array in own.items()}
    return made | self._router(role)

  def _experts(self, weights: Leaves, role: Role) -> Leaves:
    units = self._units(weights["up"])[self.shared_parts :]
    copies = self.target.moe.routing.num_experts // len(units)
    made = {}
    for name, array in weights.items():
      parts = [self._part(name, array, part, role) for part in units]
      if name in ("down", "down_bias"):
        parts = [role.scaled(part, self.factor) for part in parts]
      made[name] = np.stack(parts * copies)
    for name in made:
      fresh = self._reinitialised(name, made[name], role)
      made[name] = self._noisy(name, fresh, role)
    return made

  def _units(self, up: np.ndarray) -> np.ndarray:
    """Returns (parts, F / parts), the hidden units of every part."""
    return np.arange(up.shape[-1]).reshape(self.parts, -1)

  def _part(self, name: str, array: np.ndarray, units: np.ndarray, role: Role) -> np.ndarray:
    if name in HIDDEN_AXIS:
      return np.take(array, units, axis=HIDDEN_AXIS[name])
    share = len(units) / (self.parts * self.target.moe.hidden_dim)
    return array * np.asarray(share, array.dtype) if role is Role.VALUE else array

  def _reinitialised(self, name: str, stack: np.ndarray, role: Role) -> np.ndarray:
    """Draws a fraction of every expert's hidden units anew (arXiv 2502.19261 section 3.2).

    Normal, with mean and standard deviation of the entries that it replaces, array by array. The
    same units in all arrays of an expert.
    """
    if not self.reinit or name not in HIDDEN_AXIS:
      return stack
    made = np.moveaxis(stack.copy(), HIDDEN_AXIS[name], 1)
    for expert, units in enumerate(self._drawn_units(made.shape[0], made.shape[1])):
      old = made[expert, units].astype(np.float64)
      if role is Role.VALUE:
        normal = self._generator(_REINIT, name, expert).standard_normal(old.shape)
        made[expert, units] = old.mean() + old.std() * normal
      else:
        made[expert, units] = 0
    return np.moveaxis(made, 1, HIDDEN_AXIS[name])

  def _drawn_units(self, experts: int, hidden: int) -> list[np.ndarray]:
    count = round(self.reinit * hidden)
    draws = [generator(self.key, _UNITS, expert) for expert in range(experts)]
    return [draw.permutation(hidden)[:count] for draw in draws]

  def _noisy(self, name: str, stack: np.ndarray, role: Role) -> np.ndarray:
    if not self.noise or role is not Role.VALUE:
      return stack
    scale = self.noise * np.sqrt(np.mean(np.square(stack, dtype=np.float64)))
    drawn = self._generator(_NOISE, name).standard_normal(stack.shape)
    return (stack + scale * drawn).astype(stack.dtype)

  def _generator(self, purpose: int, name: str, expert: int = 0) -> np.random.Generator:
    return generator(self.key, purpose, _NAMES.index(name), expert)

  def _router(self, role: Role) -> Leaves:
    """Returns a new router's arrays, with its state where values are asked for; moments are 0."""
    router = new_router(self.target, self.router_std, self.key)
    if role is not Role.VALUE:
      params = flat_leaves(nnx.state(router, nnx.Param))
      return {("router", *path): np.zeros(a.shape, a.dtype) for path, a in params.items()}
    leaves = {("router", *path): np.asarray(a) for path, a in flat_leaves(router).items()}
    if self.in_groups:
      kernel, group = leaves["router", "kernel"], self.parts - self.shared_parts
      leaves["router", "kernel"] = np.repeat(kernel[:, : kernel.shape[1] // group], group, axis=1)
    return leaves


def new_router(target: ModelConfig, std: float, key: jax.Array) -> Router:
  """Makes a router whose columns have the standard deviation `std`, or that mean length."""
  return Router(
    target.model_dim,
    target.moe.routing,
    key=key,
    scale=std**2 * target.model_dim,
    init=target.moe.router_init,
    vocab_size=target.vocab_size,
  )
