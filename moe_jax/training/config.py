"""The experiment: everything a config file says, as dataclasses that validate themselves."""

import dataclasses
import enum
from typing import Any

from moe_jax.choices import as_choice
from moe_jax.config import dataclass_from, import_modules, section
from moe_jax.data.config import DataConfig
from moe_jax.data.objectives import Objective, ObjectiveConfig, PairMaker, span_counts
from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.sampling import check_sampling
from moe_jax.models import ModelConfig
from moe_jax.moe import MoEConfig, Overflow
from moe_jax.moe.registry import Chooser


def _at_least(config, least, *names: str) -> None:
  for name in names:
    # "not >=" rather than "<": a NaN must not pass.
    if not getattr(config, name) >= least:
      raise UserError(f"{name} = {getattr(config, name)} is refused: it must be at least {least}")


def _below(config, bound, *names: str) -> None:
  for name in names:
    if not getattr(config, name) < bound:
      raise UserError(f"{name} = {getattr(config, name)} is refused: it must be below {bound}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay.

  Attributes:
    learning_rate: the peak.
    warmup_steps: linear from 0.
    final_fraction: the last learning rate as a fraction of the peak.
    weight_decay: decoupled; not on norms and biases.
    clip_norm: global gradient norm above which gradients are scaled down; 0 = no clipping.
    b1, b2, epsilon: Adam's.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 100
  final_fraction: float = 0.1
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8

  def __post_init__(self):
    _at_least(
      self,
      0,
      "learning_rate",
      "warmup_steps",
      "final_fraction",
      "weight_decay",
      "clip_norm",
      "b1",
      "b2",
    )
    _below(self, 1, "b1", "b2")
    if not 0 < self.epsilon:
      raise UserError(f"epsilon = {self.epsilon} is refused: it must be greater than 0")
    if self.final_fraction > 1:
      raise UserError(f"final_fraction = {self.final_fraction} is refused: it must be at most 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation on the whole held-out split, dropless and at the training capacity.

  Attributes:
    every: optimiser steps between evaluations; the last step is always evaluated.
    batch_size: sequences a batch; 0 = a training microbatch, so that "at the training capacity"
      means the same group size too.
  """

  every: int = 500
  batch_size: int = 0

  def __post_init__(self):
    _at_least(self, 1, "every")
    _at_least(self, 0, "batch_size")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints: every `every` steps and at the end; the newest `keep` stay."""

  every: int = 500
  keep: int = 2

  def __post_init__(self):
    _at_least(self, 1, "every", "keep")


class RepairInit(enum.StrEnum):
  """What the weights of a cold expert are replaced by."""

  COPY = "copy"  # those of the layer's hottest expert, its router column and bias too, plus noise
  FRESH = "fresh"  # new ones, drawn as at initialisation


@dataclasses.dataclass(frozen=True)
class RepairConfig:
  """Periodic re-initialisation of cold experts, see `moe_jax.training.repair`.

  Attributes:
    every: optimiser steps between repairs, and the window over which loads are counted; 0 = never.
      The last step of a run repairs nothing.
    threshold: an expert is cold if its load in the window is below this share of the mean load.
    init: what a cold expert becomes.
    noise: with `copy`, the standard deviation of what is added, relative to the root mean square
      of the copied array; without it the two experts would route and learn alike.
  """

  every: int = 0
  threshold: float = 0.1
  init: RepairInit = RepairInit.COPY
  noise: float = 0.01

  def __post_init__(self):
    object.__setattr__(self, "init", as_choice(RepairInit, "init", self.init))
    _at_least(self, 0, "every", "threshold", "noise")
    if self.threshold > 1:
      raise UserError(f"threshold = {self.threshold} is refused: it must be at most 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Metrics: one line of metrics.jsonl every `every` steps, of that step alone.

  Attributes:
    every: steps between lines.
    tensorboard: also write TensorBoard events (needs the `tensorboard` extra).
  """

  every: int = 10
  tensorboard: bool = False

  def __post_init__(self):
    _at_least(self, 1, "every")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The text continued at the end of training."""

  prompt: str = "The President"
  max_new_tokens: int = 200
  temperature: float = 0.8

  def __post_init__(self):
    check_sampling(self.max_new_tokens, self.temperature)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The report: `baseline` names a JSON file with the curve to draw beside the run's, if any."""

  baseline: str = ""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One training run.

  Attributes:
    model: the architecture, its experts and vocabulary included.
    data: what to train on.
    objective: what is asked of it.
    seed: of initialisation, data order, and everything random in a step.
    steps: optimiser steps.
    batch_size: sequences an optimiser step.
    accumulation_steps: microbatches a step; must divide batch_size. Capacity and router losses see
      a microbatch (but see `BalanceScope.GLOBAL_BATCH`); the language-model loss, the selection
      bias and the adaptive coefficient see the whole batch.
    repair: of experts that the router has given up.
    imports: modules imported before the rest of the config is read; they register selections (see
      `moe_jax.moe.register_selection`). Whoever reads a run imports them too, so read only runs
      that you trust.
  """

  model: ModelConfig
  data: DataConfig = DataConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  repair: RepairConfig = RepairConfig()
  log: LogConfig = LogConfig()
  sample: SampleConfig = SampleConfig()
  report: ReportConfig = ReportConfig()
  seed: int = 0
  steps: int = 1000
  batch_size: int = 16
  accumulation_steps: int = 1
  imports: tuple[str, ...] = ()

  def __post_init__(self):
    _at_least(self, 0, "seed")
    _below(self, 2**32, "seed")
    _at_least(self, 1, "steps", "batch_size", "accumulation_steps")
    _below(self, 2**31, "steps")  # counted in int32
    if self.batch_size % self.accumulation_steps:
      raise UserError(
        f"accumulation_steps = {self.accumulation_steps} does not divide batch_size"
        f" = {self.batch_size}"
      )
    self._check_objective()
    if self.repair.every:
      self._check_repair()
    if self.model.moe is not None:
      routing = self.model.moe.routing
      routing.check_trainable()
      if routing.overflow == Overflow.DROPLESS and routing.capacity is not None:
        raise UserError(
          f"moe.capacity = {routing.capacity} contradicts moe.overflow = dropless; set overflow ="
          " drop to use it, or capacity = none"
        )

  @property
  def pair_maker(self) -> PairMaker | None:
    """What makes pairs of records for an encoder-decoder; None for a decoder."""
    if self.model.encoder is None:
      return None
    return PairMaker(self.objective, self.model.encoder.start_token, self.model.vocab_size)

  @property
  def question(self) -> tuple[int, ...]:
    """The ids that follow a prompt which the model is to continue."""
    return () if self.pair_maker is None else self.pair_maker.question

  def _check_objective(self) -> None:
    kind, pairs = self.objective.kind, self.model.encoder is not None
    if pairs == (kind == Objective.NEXT_TOKEN):
      fitting = "second_half or span_corruption" if pairs else "next_token"
      whose = "an encoder-decoder" if pairs else "a decoder"
      raise UserError(f"objective.kind = {kind} is refused for {whose}: use {fitting}")
    if kind != Objective.SPAN_CORRUPTION:
      return
    ids = get_tokenizer(self.data.tokenizer).vocab_size
    _, spans = span_counts(self.data.sequence_length, self.objective)
    if self.model.vocab_size < ids + spans:
      raise UserError(
        f"model.vocab_size = {self.model.vocab_size} is refused: the tokenizer"
        f" {self.data.tokenizer} has {ids} ids and span_corruption names {spans} spans of a record"
        f" by further ones; give at least {ids + spans}"
      )

  def _check_repair(self) -> None:
    refused = f"repair.every = {self.repair.every} is refused: it must be 0"
    if self.model.moe is None:
      raise UserError(f"{refused} for a model without experts")
    selector = self.model.moe.routing.selector
    if not selector.learned or selector.chooser != Chooser.TOKEN:
      raise UserError(
        f"{refused} with selection = {self.model.moe.routing.selection}, where no expert goes cold"
        " because tokens have turned from it; use a selection such as top_k"
      )


def experiment_from(mapping: Any) -> ExperimentConfig:
  """Builds an experiment from a config file's mapping.

  The mapping keeps `moe` beside `model`, and leaves the vocabulary to the tokenizer; here both
  join the model. The modules of `imports` are imported first.

  Raises:
    UserError: see `import_modules` and `dataclass_from`; paths are those of the file, such as
      config.moe.top_k.
  """
  sections = section(mapping, "config")
  import_modules(sections)
  data = dataclass_from(DataConfig, sections.get("data", {}), "config.data")
  vocab_size = get_tokenizer(data.tokenizer).vocab_size
  sections["model"] = _model(sections, {"vocab_size": vocab_size})
  sections.pop("moe", None)
  if sections["model"].vocab_size < vocab_size:
    raise UserError(
      f"config.model.vocab_size = {sections['model'].vocab_size} is refused: the tokenizer"
      f" {data.tokenizer} has {vocab_size} ids; give at least {vocab_size}, or take the field out"
      " of the config file"
    )
  return dataclass_from(ExperimentConfig, sections, "config")


def model_from(mapping: Any) -> ModelConfig:
  """Builds the model of a config file's mapping; a file with a vocabulary needs no tokenizer.

  Raises:
    UserError: see `experiment_from`.
  """
  sections = section(mapping, "config")
  if "vocab_size" not in section(sections.get("model", {}), "config.model"):
    return experiment_from(mapping).model
  import_modules(sections)
  return _model(sections, {})


def _model(sections: dict[str, Any], defaults: dict[str, Any]) -> ModelConfig:
  """Builds the model from the sections `model` and `moe`."""
  model = section(sections.get("model", {}), "config.model")
  if sections.get("moe") is not None:
    model["moe"] = dataclass_from(MoEConfig, sections["moe"], "config.moe")
  return dataclass_from(ModelConfig, defaults | model, "config.model")
