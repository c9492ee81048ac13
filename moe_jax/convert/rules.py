"""Tables of a family, made concrete: which slices of which parameters a tensor of the hub holds."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
from flax import nnx

from moe_jax.convert.transforms import Shape, Transform
from moe_jax.models import ModelConfig, make_model
from moe_jax.moe.router import RouterState

# A place in the model's state, for example ("segments", 0, "blocks", 1, "mixer", "query").
Path = tuple[str | int, ...]

_LAYER, _EXPERT = "{layer}", "{expert}"
_ENCODER_LAYER, _VISION_LAYER = "{encoder_layer}", "{vision_layer}"


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a family's table.

  Attributes:
    hub: the tensor's key. "{layer}" stands for the number of the block and makes the rule one of
      blocks, "{encoder_layer}" one of an encoder's and "{vision_layer}" one of a vision tower's;
      "{expert}" for the number of an expert, whose parameters have a leading axis E here.
    ours: places of the parameters, separated by dots, in the model or in the block. The rule
      applies to the blocks that have them; a block that has some and not all is refused.
    transform: from the slices of one block (and expert) to the tensor.
    beside: a place in the model that must have a parameter for the rule to apply; None = none. Two
      rules may name one parameter: of two tensors read, the later rule's stays.
  """

  hub: str
  ours: tuple[str, ...]
  transform: Transform
  beside: str | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
  """A part of one parameter.

  Attributes:
    path: of the parameter.
    index: on its leading axes: repeat of the segment, expert.
    shape: of the part.
  """

  path: Path
  index: tuple[int, ...]
  shape: Shape


@dataclasses.dataclass(frozen=True)
class Link:
  """One tensor of the hub and the slices of our parameters that it holds."""

  key: str
  slices: tuple[Slice, ...]
  transform: Transform

  @property
  def shape(self) -> Shape:
    """Returns the shape of the hub's tensor."""
    return self.transform.hub_shape(tuple(part.shape for part in self.slices))


def rule(hub: str, ours: str, transform: Transform, *, beside: str | None = None) -> Rule:
  """Makes a rule; `ours` holds the places, separated by spaces."""
  return Rule(hub, tuple(ours.split()), transform, beside)


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: ModelConfig) -> dict[Path, Shape]:
  """Returns the shape of every variable of a model by its place, without allocating any."""
  state = nnx.state(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))))
  return {path: tuple(leaf.shape) for path, leaf in flat_leaves(state).items()}


def router_state(config: ModelConfig) -> frozenset[Path]:
  """Returns the places of the variables that no gradient reaches, as the selection bias."""
  state = nnx.state(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))), RouterState)
  return frozenset(flat_leaves(state))


def flat_leaves(tree) -> dict[Path, jax.Array]:
  """Returns the arrays of a module, a state or nested mappings by their places."""
  if isinstance(tree, nnx.Module):
    tree = nnx.state(tree)
  pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
  return dict(_walk((), pure))


def _walk(path: Path, tree) -> Iterator[tuple[Path, jax.Array]]:
  if not isinstance(tree, Mapping):
    yield path, tree
    return
  for name, branch in tree.items():
    yield from _walk((*path, name), branch)


def links(rules: tuple[Rule, ...], config: ModelConfig) -> list[Link]:
  """Returns every tensor that a checkpoint of this config has, a parameter's slices together.

  Parameters that no rule names are missing from the result: `uncovered` tells them.
  """
  shapes = parameter_shapes(config)
  found = []
  for each in rules:
    if each.beside is not None and tuple(each.beside.split(".")) not in shapes:
      continue
    if _ENCODER_LAYER in each.hub:
      stack, place = config.encoder_stack(), ("encoder",)
    elif _VISION_LAYER in each.hub:
      stack, place = config.vision_stack(), ("vision",)
    elif _LAYER in each.hub:
      stack, place = config, ("decoder",) if config.encoder else ()
    else:
      found += _top_links(each, shapes)
      continue
    for block in [] if stack is None else _blocks(stack, place):
      found += _block_links(each, block, shapes)
  return found


def uncovered(rules: tuple[Rule, ...], config: ModelConfig) -> list[str]:
  """Returns the parameters of a config that no rule of a family has a tensor for."""
  named = {part.path for link in links(rules, config) for part in link.slices}
  return [".".join(map(str, path)) for path in parameter_shapes(config) if path not in named]


@dataclasses.dataclass(frozen=True)
class _BlockStack:
  """One block of a segment's pattern: its place, and the numbers of its repeats' layers."""

  path: Path
  layers: tuple[int, ...]


def _blocks(config: ModelConfig, place: Path) -> list[_BlockStack]:
  """Returns the blocks of one stack, which stands at `place` in the model."""
  stacks, first = [], 0
  for index, segment in enumerate(config.parsed_segments()):
    width = len(segment.pattern)
    for number in range(width):
      layers = tuple(first + repeat * width + number for repeat in range(segment.repeats))
      stacks.append(_BlockStack((*place, "segments", index, "blocks", number), layers))
    first += segment.num_layers
  return stacks


def _top_links(each: Rule, shapes: dict[Path, Shape]) -> list[Link]:
  paths = [tuple(place.split(".")) for place in each.ours]
  if not all(path in shapes for path in paths):
    return []
  slices = tuple(Slice(path, (), shapes[path]) for path in paths)
  return [Link(each.hub, slices, each.transform)]


def _block_links(each: Rule, block: _BlockStack, shapes: dict[Path, Shape]) -> list[Link]:
  paths = [(*block.path, *place.split(".")) for place in each.ours]
  if not all(path in shapes for path in paths):
    return []
  experts = range(shapes[paths[0]][1]) if _EXPERT in each.hub else (None,)
  made = []
  for repeat, layer in enumerate(block.layers):
    for expert in experts:
      index = (repeat,) if expert is None else (repeat, expert)
      slices = tuple(Slice(path, index, shapes[path][len(index) :]) for path in paths)
      key = each.hub.replace(_EXPERT, str(expert))
      for number in (_LAYER, _ENCODER_LAYER, _VISION_LAYER):
        key = key.replace(number, str(layer))
      made.append(Link(key, slices, each.transform))
  return made
