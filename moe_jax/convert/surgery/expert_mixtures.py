"""New experts from old ones: what pruning, merging and growing have in common.

Every new expert is a weighted mean of old ones, most often of a single one, or drawn anew. Its
column of the router goes with it.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from moe_jax.convert.rules import Path, flat_leaves
from moe_jax.convert.surgery.draws import generator
from moe_jax.convert.surgery.experts_from_dense import EXPERTS, HIDDEN_AXIS, new_router
from moe_jax.convert.surgery.layer_trees import Leaves
from moe_jax.convert.surgery.operation import Operation, Role, layers_of
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.experts import Experts
from moe_jax.moe.registry import Chooser


@dataclasses.dataclass(frozen=True)
class Member:
  """An old expert's part in a new one.

  Attributes:
    expert: its number.
    share: its weight in the mean; those of an expert's members add up to 1.
    units: (F,) the order in which its hidden units are taken; None as they are.
  """

  expert: int
  share: float = 1.0
  units: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class NewExpert:
  """Where an expert comes from.

  Attributes:
    members: old experts; none for an expert that is drawn as at initialisation.
    noise: standard deviation of what is added to its arrays and its column of the router, relative
      to the root mean square of each.
  """

  members: tuple[Member, ...]
  noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class ExpertMixtures:
  """Makes the feed-forward of one layer from new experts, in their order.

  Columns of the router that are no expert's (null experts) stay behind the others. An expert drawn
  anew has moments of zero, and the mean selection bias of the old ones.

  Attributes:
    target: the config of the model.
    experts: one an expert of the target.
    router_std: of the columns of experts drawn anew.
    key: of this layer.
  """

  target: ModelConfig
  experts: tuple[NewExpert, ...]
  router_std: float
  key: jax.Array

  def __call__(self, old: Leaves, role: Role) -> Leaves:
    """Returns the arrays of the layer; see `FeedForwardEdit`."""
    fresh = self._fresh() if not all(new.members for new in self.experts) else {}
    made = dict(old)
    for index, path in enumerate(sorted(path for path in old if _is_of_experts(path))):
      axis = 0 if path[:2] == EXPERTS else old[path].ndim - 1
      stack = self._mix(path, np.moveaxis(old[path], axis, 0), fresh, role, index)
      made[path] = np.moveaxis(stack, 0, axis)
    return made

  def _mix(self, path: Path, old: np.ndarray, fresh: Leaves, role: Role, index: int) -> np.ndarray:
    """Returns the new array, experts first, from the old one."""
    rows = []
    for number, new in enumerate(self.experts):
      if not new.members:
        rows.append(_drawn(path, number, old, fresh, role))
        continue
      row = sum(_units(path, old[m.expert], m) * m.share for m in new.members)
      if new.noise and role is Role.VALUE:
        size = new.noise * np.sqrt(np.mean(np.square(row, dtype=np.float64)))
        row = row + size * generator(self.key, index, number).standard_normal(row.shape)
      rows.append(row.astype(old.dtype))
    extra = self.target.moe.routing.num_null_experts if path[0] == "router" else 0
    return np.concatenate([np.stack(rows), old[len(old) - extra :]])

  def _fresh(self) -> Leaves:
    """Returns experts and router as at initialisation, experts first."""
    config, moe = self.target, self.target.moe
    experts_key, router_key = jax.random.split(self.key)
    experts = Experts(
      config.model_dim,
      moe.routing.num_experts,
      moe.feed_forward(),
      key=experts_key,
      scale=config.init_scale,
    )
    router = new_router(config, self.router_std, router_key)
    leaves = {("experts", *path): np.asarray(a) for path, a in flat_leaves(experts).items()}
    params = flat_leaves(nnx.state(router, nnx.Param))
    columns = {
      ("router", *path): np.moveaxis(np.asarray(a), -1, 0) for path, a in params.items() if a.ndim
    }
    return leaves | columns


def _is_of_experts(path: Path) -> bool:
  names = ("kernel", "logit_bias", "noise_kernel", "bias")
  return path[:2] == EXPERTS or (path[0] == "router" and path[1] in names)


def _units(path: Path, array: np.ndarray, member: Member) -> np.ndarray:
  """Returns an old expert's array with its hidden units in the member's order."""
  if member.units is None or path[:2] != EXPERTS or path[-1] not in HIDDEN_AXIS:
    return array
  return np.take(array, member.units, axis=HIDDEN_AXIS[path[-1]])


def _drawn(path: Path, number: int, old: np.ndarray, fresh: Leaves, role: Role) -> np.ndarray:
  if role is not Role.VALUE:
    return np.zeros_like(old[0])
  return fresh[path][number].astype(old.dtype) if path in fresh else old.mean(axis=0)


def resized_config(config: ModelConfig, num_experts: int) -> ModelConfig:
  """Returns the config with another number of experts.

  Raises:
    UserError: a model without experts, or whose routers are not changed expert by expert.
  """
  if config.moe is None:
    raise UserError(
      f"segments = {config.segments} has no experts; expected a model with some, as moe-jax convert"
      " upcycle makes"
    )
  routing = config.moe.routing
  plain = routing.selector.learned and routing.selector.chooser != Chooser.SLOT
  if not plain or routing.num_expert_groups > 1:
    raise UserError(
      f"selection = {routing.selection} with num_expert_groups = {routing.num_expert_groups} is"
      " refused: experts are removed, merged and added one by one where tokens and experts choose"
      " each other by learned columns without groups, as with selection = top_k"
    )
  return config.with_routing(num_experts=num_experts)


def expert_operation(
  source: ModelConfig,
  target: ModelConfig,
  layers: Sequence[Sequence[NewExpert]],
  key: jax.Array,
  router_std: float = 0.02,
) -> Operation:
  """Returns the operation that gives every MoE layer new experts.

  Args:
    source, target: configs of `resized_config`.
    layers: the experts of each MoE layer, those of multi-token prediction last.
    key: of noise and experts drawn anew.
    router_std: of the columns of experts drawn anew.

  Raises:
    UserError: another number of layers, or of experts in a layer, than the model has, or a
      `router_std` or noise that no normal distribution has.
  """
  numbers = layers_of(source, "moe")
  if len(layers) != len(numbers):
    raise UserError(f"experts are given for {len(layers)} layers; the model has {len(numbers)}")
  _check_draws(target, layers, router_std)
  edits = {
    layer: ExpertMixtures(target, tuple(new), router_std, jax.random.fold_in(key, layer))
    for layer, new in zip(numbers, layers, strict=True)
  }
  return Operation(source, target, edits)


def _check_draws(target: ModelConfig, layers: Sequence[Sequence[NewExpert]], std: float) -> None:
  experts = target.moe.routing.num_experts
  if (made := len(layers[0])) != experts:
    raise UserError(
      f"num_experts = {experts} is refused: the operation makes {made} experts of a layer"
    )
  for new in layers[0]:
    if not 0 <= new.noise < math.inf:
      raise UserError(f"noise = {new.noise} is refused: it must be 0 or greater and finite")
  if not 0 < std < math.inf:
    raise UserError(f"router_std = {std} is refused: it must be greater than 0 and finite")
