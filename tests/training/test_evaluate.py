"""Evaluation without drops knows no batches; at the training capacity it drops as training does."""

import types

import numpy as np
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from training import tiny
from training.steps import initial_state, make_batch

from moe_jax.errors import UserError
from moe_jax.training.evaluate import Evaluator, InterruptedEvaluation, at_training_capacity
from moe_jax.training.step import make_eval_step

RECORDS = 6
# Half of what training needs, and room for all in evaluation, or the other way round.
TIGHT, AMPLE = 0.5, 8.0


def held_out():
  """Returns a batch of six records, the first of which is almost all padding."""
  batch = make_batch(rows=RECORDS)
  for name in ("segment_ids", "loss_mask"):
    batch[name][0, 3:] = 0
  return batch


def experiment(batch_size, train, evaluation, **fields):
  """Returns a model of one block with these capacity factors."""
  chosen = dict(
    model__segments=(("attention:moe", 1),),
    eval__batch_size=batch_size,
    moe__overflow="drop",
    moe__capacity_factor=train,
    moe__eval_capacity_factor=evaluation,
  )
  return tiny.experiment(**chosen | fields)


def evaluator(*settings, must_end=None, **fields):
  """Returns an evaluator on the held-out records of an `experiment`."""
  records = [{name: a[i] for name, a in held_out().items()} for i in range(RECORDS)]
  targets = sum(int(record["loss_mask"].sum()) for record in records)
  data = types.SimpleNamespace(heldout=records, heldout_bytes=100, heldout_targets=targets)
  return Evaluator(experiment(*settings, **fields), data, must_end=must_end)


@pytest.fixture(scope="module")
def model():
  """Returns the variables of a new model, which no capacity changes."""
  return initial_state(experiment(RECORDS, TIGHT, AMPLE)).model


def test_dropless_evaluation_does_not_depend_on_the_batch(model):
  expected = evaluator(RECORDS, TIGHT, TIGHT).dropless(model)
  # The second batch of four is half empty.
  actual = evaluator(4, TIGHT, TIGHT).dropless(model)
  assert actual.dropped_fraction == expected.dropped_fraction == 0
  # The same float32 sums in products of other shapes.
  assert relative_error(actual.loss, expected.loss) < 1e-6
  assert relative_error(actual.bits_per_byte, expected.bits_per_byte) < 1e-6


def test_an_evaluation_ends_between_batches(model):
  answers, asked = iter([False, False, True]), []

  def must_end():
    asked.append(next(answers))
    return asked[-1]

  told = evaluator(2, TIGHT, TIGHT, must_end=must_end)
  with pytest.raises(InterruptedEvaluation):
    told.dropless(model)
  assert asked == [False, False, True]


def test_evaluation_at_the_training_capacity_drops_as_training_does(model):
  tight = evaluator(RECORDS, TIGHT, AMPLE).at_training_capacity(model)
  ample = evaluator(RECORDS, AMPLE, TIGHT).at_training_capacity(model)
  assert tight.dropped_fraction > 0.2
  assert ample.dropped_fraction == 0


def test_both_evaluations_are_one_where_training_drops_nothing(model, monkeypatch):
  tight = evaluator(RECORDS, TIGHT, AMPLE)
  dropless, at_capacity = tight.both(model)
  assert (dropless, at_capacity) == (tight.dropless(model), tight.at_training_capacity(model))
  assert at_capacity.dropped_fraction > 0.2
  free = evaluator(RECORDS, TIGHT, AMPLE, moe__overflow="dropless", moe__dispatch="ragged")
  # Capacity factors mean nothing to it.
  assert free.dropless(model) == free.at_training_capacity(model)
  monkeypatch.setattr(Evaluator, "at_training_capacity", None)
  first, second = free.both(model)
  assert first is second and first.loss == pytest.approx(dropless.loss, rel=1e-5)


def test_an_evaluator_of_other_data_shares_what_is_compiled(model):
  whole, other = evaluator(RECORDS, TIGHT, AMPLE), evaluator(4, TIGHT, AMPLE)
  first = list(whole._data.heldout[:3])
  part = types.SimpleNamespace(heldout=first, heldout_bytes=50, heldout_targets=1)
  result = whole.on(part).dropless(model)
  assert whole.on(part)._dropless is whole._dropless
  assert result.loss == pytest.approx(other.on(part).dropless(model).loss, rel=1e-5)
  assert result.loss != pytest.approx(whole.dropless(model).loss, rel=1e-5)


def test_records_whose_second_halves_are_padding_are_refused():
  config = tiny.pair_experiment()
  record = {name: a[0] for name, a in held_out().items()}
  with pytest.raises(UserError, match="sequence_length = 32 is refused"):
    Evaluator(config, types.SimpleNamespace(heldout=[record]))


def test_drops_are_counted_over_all_batches(model):
  settings = 4, TIGHT, AMPLE
  step = make_eval_step(at_training_capacity(experiment(*settings).model))
  batch = held_out()
  empty = np.zeros_like(batch["tokens"][:2])
  last = {name: np.concatenate([a[4:], empty]) for name, a in batch.items()}
  sums = [step(model, part) for part in ({name: a[:4] for name, a in batch.items()}, last)]
  dropped, asked = (sum(float(each[name]) for each in sums) for name in ("dropped", "asked"))
  actual = evaluator(*settings).at_training_capacity(model).dropped_fraction
  assert actual == pytest.approx(dropped / asked)
  fractions = [float(each["dropped"] / each["asked"]) for each in sums]
  assert abs(np.mean(fractions) - dropped / asked) > 0.01
