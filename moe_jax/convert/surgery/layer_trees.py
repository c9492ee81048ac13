"""A model's arrays layer by layer instead of stacked over segments, and back again.

Surgery works on single layers, and layers that become different no longer share a segment: the
stacks of the source are taken apart here, and those of the target are put together.
"""

import dataclasses

import numpy as np

from moe_jax.convert.rules import Path
from moe_jax.models import ModelConfig

# The arrays of a model, a layer or a feed-forward, by their places in it.
Leaves = dict[Path, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LayerTrees:
  """The arrays of a model.

  Attributes:
    top: those outside layers, such as the embedding, by their places in the model.
    layers: those of each layer by their places in the block, without the axis "layers": the blocks
      of the segments in order, then those of multi-token prediction.
  """

  top: Leaves
  layers: list[Leaves]


def layer_kinds(config: ModelConfig) -> list[tuple[str, ...]]:
  """Returns (mixer, feed-forward, ...) of every layer of `LayerTrees`."""
  kinds = config.layers()
  return kinds + [kinds[-1][:2]] * config.mtp_depth


def take_apart(leaves: Leaves, config: ModelConfig) -> LayerTrees:
  """Returns the arrays of a model layer by layer; they share memory with `leaves`."""
  places = _places(config)
  layers: list[Leaves] = [{} for _ in places]
  top, rows = {}, _rows(places)
  for path, stack in leaves.items():
    block = next((path[:n] for n in range(len(path)) if path[:n] in rows), None)
    if block is None:
      top[path] = stack
      continue
    for layer, repeat in rows[block]:
      layers[layer][path[len(block) :]] = stack[repeat]
  return LayerTrees(top, layers)


def put_together(trees: LayerTrees, config: ModelConfig) -> Leaves:
  """Returns the arrays of a model of this config, stacked over the repeats of its segments."""
  leaves = dict(trees.top)
  for block, rows in _rows(_places(config)).items():
    own = [trees.layers[layer] for layer, _ in rows]
    leaves |= {block + path: np.stack([layer[path] for layer in own]) for path in own[0]}
  return leaves


def _places(config: ModelConfig) -> list[tuple[Path, int]]:
  """Returns the place of every layer's block in the model, and its repeat there."""
  places = []
  for index, segment in enumerate(config.parsed_segments()):
    for repeat in range(segment.repeats):
      for block in range(len(segment.pattern)):
        places.append((("segments", index, "blocks", block), repeat))
  blocks = [("mtp", depth, "segment", "blocks", 0) for depth in range(config.mtp_depth)]
  return places + [(block, 0) for block in blocks]


def _rows(places: list[tuple[Path, int]]) -> dict[Path, list[tuple[int, int]]]:
  """Returns (layer, repeat) of the rows of every stack, in order of the repeats."""
  rows: dict[Path, list[tuple[int, int]]] = {}
  for layer, (block, repeat) in enumerate(places):
    rows.setdefault(block, []).append((layer, repeat))
  return rows
