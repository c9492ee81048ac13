"""What a model is asked about a record: the next token, or a part that is hidden from its encoder.

Encoder-decoders are trained on pairs made of packed records. A pair has the fields of a record,
those of the decoder's sequence, and two of the encoder's, each (L',) int32: `source_tokens`, and
`source_segment_ids`, 1 on real tokens and 0 on padding. A whole record is one sequence there, as in
T5: its documents see each other.
"""

import dataclasses
import enum
import math

import numpy as np

from moe_jax.choices import as_choice
from moe_jax.data.packing import Record
from moe_jax.errors import UserError


class Objective(enum.StrEnum):
  """What is predicted, from what."""

  NEXT_TOKEN = "next_token"  # every token, from those before it; of decoders
  SECOND_HALF = "second_half"  # the second half of a record, from the first
  SPAN_CORRUPTION = "span_corruption"  # hidden spans, from the rest (T5, arXiv 1910.10683 3.1.4)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The objective of a run.

  Attributes:
    kind: the objective; encoder-decoders need one of pairs, decoders `next_token`.
    noise_density: the share of tokens that `span_corruption` hides.
    mean_span_length: tokens of a hidden span on average.
  """

  kind: Objective = Objective.NEXT_TOKEN
  noise_density: float = 0.15
  mean_span_length: float = 3.0

  def __post_init__(self):
    object.__setattr__(self, "kind", as_choice(Objective, "kind", self.kind))
    if not 0.0 < self.noise_density < 1.0:
      raise UserError(
        f"noise_density = {self.noise_density} is refused: it must be above 0 and below 1"
      )
    if not 1.0 <= self.mean_span_length < math.inf:
      raise UserError(
        f"mean_span_length = {self.mean_span_length} is refused: it must be at least 1"
      )


@dataclasses.dataclass(frozen=True)
class PairMaker:
  """Makes pairs of records; see the module.

  Attributes:
    config: the objective, one of pairs.
    start_token: what the decoder's sequence begins with.
    vocab_size: V of the model; the i-th hidden span is called V - 1 - i, as in T5.
  """

  config: ObjectiveConfig
  start_token: int
  vocab_size: int

  @property
  def question(self) -> tuple[int, ...]:
    """What follows a prompt to be continued: the name of a hidden span, if there are any."""
    return (self.vocab_size - 1,) if self.config.kind == Objective.SPAN_CORRUPTION else ()

  def __call__(self, record: Record, rng: np.random.Generator) -> Record:
    """Returns the pair of a record; `rng` draws the spans."""
    real = record["segment_ids"] > 0
    if self.config.kind == Objective.SECOND_HALF:
      return self._halves(record["tokens"], real)
    return self._corrupt(record["tokens"], real, rng)

  def _halves(self, tokens: np.ndarray, real: np.ndarray) -> Record:
    half = len(tokens) // 2
    return self._pair(tokens[:half], real[:half], tokens[half:], real[half:])

  def _corrupt(self, tokens: np.ndarray, real: np.ndarray, rng: np.random.Generator) -> Record:
    hidden = span_mask(len(tokens), self.config, rng)
    # What stands at the first token of a span is the span's name, on either side.
    first = hidden & ~np.concatenate([[False], hidden[:-1]])
    names = self.vocab_size - np.cumsum(first)
    kept = np.where(first, names, tokens)
    source = ~hidden | first
    targets, target_real = [], []
    for start in np.flatnonzero(first):
      end = start + np.argmin(np.append(hidden[start:], False))
      targets += [names[start], *tokens[start:end]]
      target_real += [real[start], *real[start:end]]
    return self._pair(kept[source], real[source], np.array(targets), np.array(target_real))

  def _pair(self, source, source_real, target, target_real) -> Record:
    decoder = np.concatenate([[self.start_token], target[:-1]])
    fields = {
      "source_tokens": np.where(source_real, source, 0),
      "source_segment_ids": source_real,
      "tokens": np.where(target_real, decoder, 0),
      "targets": np.where(target_real, target, 0),
      "segment_ids": target_real,
      "positions": np.where(target_real, np.arange(len(target)), 0),
      "loss_mask": target_real,
    }
    return {name: values.astype(np.int32) for name, values in fields.items()}


def span_counts(length: int, config: ObjectiveConfig) -> tuple[int, int]:
  """Returns how many tokens of a record of `length` are hidden, and in how many spans."""
  hidden = min(max(round(length * config.noise_density), 1), length - 1)
  spans = min(max(round(hidden / config.mean_span_length), 1), hidden, length - hidden)
  return hidden, spans


def span_mask(length: int, config: ObjectiveConfig, rng: np.random.Generator) -> np.ndarray:
  """Returns (length,) bool, True = hidden.

  Spans and the gaps before them are random cuts of their totals, so a record begins with a gap and
  ends with a span, and both numbers are fixed: T5's `random_spans_noise_mask`.
  """
  hidden, spans = span_counts(length, config)
  gaps = _random_parts(length - hidden, spans, rng)
  lengths = np.stack([gaps, _random_parts(hidden, spans, rng)], axis=1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _random_parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns `count` random positive integers of that total, every choice equally likely."""
  cuts = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
  return np.diff(np.concatenate([[0], cuts, [total]]))
