"""Where the MoE layers of a model are in its state, which stacks them over a segment's repeats."""

import dataclasses

from moe_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class MoEStack:
  """One MoE block of a segment's pattern, in all repeats.

  Attributes:
    path: of its `MoELayer` in the model's state; every array below it has a leading axis "layers".
    layers: for each repeat, the index of the layer among the model's MoE layers.
  """

  path: tuple[str | int, ...]
  layers: tuple[int, ...]


def moe_stacks(config: ModelConfig) -> list[MoEStack]:
  """Returns the stacks of a model's MoE layers, in the order of `moe_layers(train=True)`."""
  if config.encoder is not None:
    encoder = _of_segments(config.encoder_stack(), ("encoder",), 0)
    return encoder + _of_segments(config, ("decoder",), sum(len(s.layers) for s in encoder))
  stacks = _of_segments(config, (), 0)
  first = sum(len(stack.layers) for stack in stacks)
  if config.layers()[-1][1] == "moe":
    for depth in range(config.mtp_depth):
      path = ("mtp", depth, "segment", "blocks", 0, "feed_forward")
      stacks.append(MoEStack(path, (first + depth,)))
  return stacks


def _of_segments(config: ModelConfig, place: tuple[str, ...], first: int) -> list[MoEStack]:
  """Returns those of one stack, which stands at `place` and whose first MoE layer is `first`."""
  stacks = []
  for index, segment in enumerate(config.parsed_segments()):
    blocks = [block for block, kind in enumerate(segment.pattern) if kind[1] == "moe"]
    for number, block in enumerate(blocks):
      layers = (first + repeat * len(blocks) + number for repeat in range(segment.repeats))
      # A depth block holds the block that some tokens take.
      inner = ("block",) if segment.pattern[block][2:] else ()
      path = (*place, "segments", index, "blocks", block, *inner, "feed_forward")
      stacks.append(MoEStack(path, tuple(layers)))
    first += len(blocks) * segment.repeats
  return stacks
