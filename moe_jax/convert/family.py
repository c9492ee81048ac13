"""What a family of checkpoints is: its settings and its table of tensors, both ways."""

import dataclasses
from collections.abc import Callable
from typing import Any

from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.rules import Rule
from moe_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture of the hub.

  Attributes:
    architecture: its name in `config.json`, under "architectures".
    model_type: its name under "model_type".
    mixers: the words of the blocks' mixers that it can have.
    read: the hub's settings -> our config.
    write: our config -> the hub's settings, without those two names. It may take for granted that
      the config has experts and no mixers but `mixers`; `moe_jax.convert.families.family_of`
      tells whether what it wrote means the config. None where models are read alone.
    rules: the table of tensors.
    ignored: regular expressions of tensors that checkpoints may have and a model does not need;
      "{prediction}" stands for the numbers of the layers of multi-token prediction, after the last.
    encoder_decoder: its models have an encoder.
    vision: its models have a vision tower.
    drops: the original drops tokens outside training too, where an expert is full.
  """

  architecture: str
  model_type: str
  mixers: tuple[str, ...]
  read: Callable[[HubConfig], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]] | None
  rules: tuple[Rule, ...]
  ignored: tuple[str, ...] = ()
  encoder_decoder: bool = False
  vision: bool = False
  drops: bool = False


def as_segments(blocks: list[str]) -> tuple[tuple[str, int], ...]:
  """Returns the shortest segments for a list of blocks: repeated patterns, scanned.

  At every block the pattern is taken that covers most blocks by repeating, the shortest of those.

  Args:
    blocks: "mixer:feed_forward" of every block in order.
  """
  segments, start = [], 0
  while start < len(blocks):
    width, repeats = _best_pattern(blocks[start:])
    segments.append((" ".join(blocks[start : start + width]), repeats))
    start += width * repeats
  return tuple(segments)


def _best_pattern(blocks: list[str]) -> tuple[int, int]:
  best = (1, _repeats(blocks, 1))
  for width in range(2, len(blocks) // 2 + 1):
    repeats = _repeats(blocks, width)
    if repeats > 1 and width * repeats > best[0] * best[1]:
      best = (width, repeats)
  return best


def _repeats(blocks: list[str], width: int) -> int:
  """Returns how often the first `width` blocks follow each other, at least once."""
  repeats = 1
  while blocks[repeats * width : (repeats + 1) * width] == blocks[:width]:
    repeats += 1
  return repeats
