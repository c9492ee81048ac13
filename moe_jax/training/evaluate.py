"""Evaluation on the held-out split."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx

from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import eval_batches
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.options import Overflow
from moe_jax.sharding.layout import Layout
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.placed import own_rows, place_batches
from moe_jax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """Held-out figures.

  Attributes:
    loss: nats per target token.
    bits_per_byte: total nats / ln 2 / bytes of held-out text. Every byte is predicted from the
      tokens before it in its record alone, so short records cost a little. An encoder-decoder
      predicts a part of them, from the rest of the record: each of its targets counts as many bytes
      as a target of a decoder does on average.
    dropped_fraction: assignments of all MoE layers without a slot; 0 without experts.
    accuracy: images whose text is the greedy continuation, over all; None without images.
  """

  loss: float
  bits_per_byte: float
  dropped_fraction: float
  accuracy: float | None = None


class InterruptedEvaluation(Exception):  # noqa: N818 - no fault
  """An evaluation was told to end before its last batch."""


class Evaluator:
  """Evaluates `TrainState.model` on the held-out split, dropless and at the training capacity.

  Raises:
    UserError: held-out records of which an encoder-decoder would predict nothing.
  """

  def __init__(
    self,
    config: ExperimentConfig,
    data: PreparedData,
    layout: Layout | None = None,
    must_end: Callable[[], bool] | None = None,
  ):
    """Prepares to evaluate.

    Args:
      config: of the run.
      data: whose held-out split is read.
      layout: the devices; None = one.
      must_end: asked before every batch, in all processes alike; if it is true, the evaluation
        ends with InterruptedEvaluation. None = never.
    """
    self._data, self._layout, self._must_end = data, layout, must_end
    self._batch_size = config.eval.batch_size or config.batch_size // config.accumulation_steps
    self._pairs = config.pair_maker
    self._length = config.data.sequence_length
    self._check_targets()
    self._dropless = make_eval_step(config.model.dropless(), layout)
    self._at_capacity, self._trains_dropless = None, False
    if config.model.moe is not None:
      self._trains_dropless = config.model.moe.routing.overflow == Overflow.DROPLESS
      self._at_capacity = make_eval_step(at_training_capacity(config.model), layout)

  def dropless(self, model: nnx.State) -> EvalResult:
    """Evaluates with room for every token, so that the result depends on no other sequence."""
    return self._run(self._dropless, model)

  def at_training_capacity(self, model: nnx.State) -> EvalResult | None:
    """Evaluates with the drops of training; None for a model without experts."""
    return None if self._at_capacity is None else self._run(self._at_capacity, model)

  def both(self, model: nnx.State) -> tuple[EvalResult, EvalResult | None]:
    """Evaluates dropless and at the training capacity: once, if training drops nothing."""
    dropless = self.dropless(model)
    return dropless, dropless if self._trains_dropless else self.at_training_capacity(model)

  def on(self, data: PreparedData) -> "Evaluator":
    """Returns an evaluator of another held-out split, which shares what is compiled.

    Raises:
      UserError: see the class.
    """
    other = copy.copy(self)
    other._data = data
    other._check_targets()
    return other

  def under(self, config: ModelConfig, model: nnx.State) -> EvalResult:
    """Evaluates under another config with the same variables, for example another router."""
    return self._run(make_eval_step(config, self._layout), model)

  def _run(self, step: Callable, model: nnx.State) -> EvalResult:
    rows = own_rows(self._layout, self._batch_size)
    batches = eval_batches(
      self._data.heldout,
      self._batch_size,
      transform=self._pairs,
      process_index=rows.index,
      process_count=rows.count,
    )
    batches = place_batches(batches, self._layout, rows)
    # One host transfer at the end: the device never waits for the host in between.
    sums = jax.device_get(self._all_sums(step, model, batches))
    total = {name: math.fsum(float(s[name]) for s in sums) for name in sums[0]}
    return EvalResult(
      loss=total["nll"] / total["targets"],
      bits_per_byte=total["nll"] / math.log(2) / self._predicted_bytes(total["targets"]),
      dropped_fraction=total["dropped"] / max(total["asked"], 1.0),
      accuracy=total["right"] / total["images"] if "images" in total else None,
    )

  def _all_sums(self, step: Callable, model: nnx.State, batches: Iterable) -> list[dict]:
    sums = []
    for batch in batches:
      if self._must_end is not None and self._must_end():
        raise InterruptedEvaluation
      sums.append(step(model, batch))
      # Asking is of use only if few batches are under way: one is worked on, and one waits.
      if self._must_end is not None and len(sums) > 1:
        jax.block_until_ready(sums[-2])
    return sums

  def _check_targets(self) -> None:
    """Refuses records so long that the second half of each is padding."""
    if self._pairs is None:
      return
    records, rng = self._data.heldout, np.random.default_rng(0)
    if not any(self._pairs(records[i], rng)["loss_mask"].any() for i in range(len(records))):
      raise UserError(
        f"data.sequence_length = {self._length} is refused: the held-out text fills no record so"
        " far that a pair of it has something to predict; take shorter records"
      )

  def _predicted_bytes(self, targets: float) -> float:
    """Returns the bytes of held-out text behind so many targets: a decoder's are all there are."""
    return self._data.heldout_bytes * targets / self._data.heldout_targets


def at_training_capacity(model: ModelConfig) -> ModelConfig:
  """Returns the config whose evaluation capacity is that of training."""
  return model.with_routing(eval_capacity_factor=model.moe.routing.capacity_factor)
