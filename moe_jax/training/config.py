"""The experiment: everything a config file says, as dataclasses that validate themselves."""

import dataclasses
import enum
from typing import Any

from moe_jax.choices import as_choice
from moe_jax.config import dataclass_from, import_modules, section
from moe_jax.config.bounds import at_least, below
from moe_jax.data.config import DataConfig
from moe_jax.data.objectives import Objective, ObjectiveConfig, PairMaker, span_counts
from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.sampling import check_sampling
from moe_jax.models import ModelConfig
from moe_jax.moe import MoEConfig, Overflow
from moe_jax.moe.expert_parallel import check_exchange
from moe_jax.moe.registry import Chooser
from moe_jax.sharding.config import ShardingConfig
from moe_jax.training.faults_config import FaultsConfig
from moe_jax.training.optimizer_config import OptimizerConfig
from moe_jax.training.placement_config import BalancePlacementConfig


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
    at_least(self, 1, "every")
    at_least(self, 0, "batch_size")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints, and which of them stay.

  Attributes:
    every: optimiser steps between them; the last step is always saved.
    at: further steps that are saved, and stay, as early ones of a run whose routing is to be
      followed.
    keep: so many of the newest stay.
    keep_every: steps that it divides stay too; 0 = none.
    keep_best: so many of the lowest held-out loss stay too, of those that were evaluated at their
      own step (let `eval.every` divide `every`); 0 = none.
  """

  every: int = 500
  at: tuple[int, ...] = ()
  keep: int = 2
  keep_every: int = 0
  keep_best: int = 0

  def __post_init__(self):
    at_least(self, 1, "every", "keep")
    at_least(self, 0, "keep_every", "keep_best")
    if any(type(step) is not int or step < 1 for step in self.at):
      raise UserError(f"at = {self.at} is refused: expected steps, each at least 1, as (10, 100)")

  def is_due(self, step: int, last: int) -> bool:
    """Tells whether a step of a run of so many is saved."""
    return step == last or step % self.every == 0 or step in self.at


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
    at_least(self, 0, "every", "threshold", "noise")
    if self.threshold > 1:
      raise UserError(f"threshold = {self.threshold} is refused: it must be at most 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Metrics: one line of metrics.jsonl every `every` steps, of that step alone.

  Attributes:
    every: steps between lines.
    tensorboard: also write TensorBoard events (needs the `tensorboard` extra).
    wandb: also write to this project of Weights & Biases (needs wandb); empty = no.
    trackio: also write to this project of trackio (needs trackio); empty = no.
    profile: (first step, number of steps) of a `jax.profiler` trace; 0 steps = none. SIGUSR1 takes
      one of five steps at any time.
  """

  every: int = 10
  tensorboard: bool = False
  wandb: str = ""
  trackio: str = ""
  profile: tuple[int, int] = (0, 0)

  def __post_init__(self):
    at_least(self, 1, "every")
    first, count = self.profile
    if count < 0 or (count and first < 1):
      raise UserError(
        f"profile = {self.profile} is refused: expected (first step, number of steps) from 1 on, or"
        " (0, 0) for none"
      )


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
    balance_placement: of devices, by moving experts.
    faults: what follows steps that are not finite, and what raises an alarm.
    sharding: the devices; changes neither the results nor what a checkpoint holds.
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
  balance_placement: BalancePlacementConfig = BalancePlacementConfig()
  faults: FaultsConfig = FaultsConfig()
  log: LogConfig = LogConfig()
  sample: SampleConfig = SampleConfig()
  report: ReportConfig = ReportConfig()
  sharding: ShardingConfig = ShardingConfig()
  seed: int = 0
  steps: int = 1000
  batch_size: int = 16
  accumulation_steps: int = 1
  imports: tuple[str, ...] = ()

  def __post_init__(self):
    at_least(self, 0, "seed")
    below(self, 2**32, "seed")
    at_least(self, 1, "steps", "batch_size", "accumulation_steps")
    below(self, 2**31, "steps")  # counted in int32
    if self.batch_size % self.accumulation_steps:
      raise UserError(
        f"accumulation_steps = {self.accumulation_steps} does not divide batch_size"
        f" = {self.batch_size}"
      )
    if self.checkpoint.keep_best and self.checkpoint.every % self.eval.every:
      raise UserError(
        f"checkpoint.keep_best = {self.checkpoint.keep_best} needs the held-out loss of each"
        f" checkpoint, but eval.every = {self.eval.every} does not divide checkpoint.every ="
        f" {self.checkpoint.every}; set eval.every = {self.checkpoint.every}"
      )
    self._check_objective()
    self._check_images()
    if self.repair.every:
      self._check_repair()
    if self.balance_placement.every:
      self._check_balance_placement()
    if self.model.moe is not None:
      routing = self.model.moe.routing
      routing.check_trainable()
      check_exchange(self.model.moe.dispatch, self.sharding)
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

  def _check_images(self) -> None:
    image, vision = self.data.image, self.model.vision
    if image is None:
      return
    if vision is None:
      raise UserError(
        "data.image is given for a model without model.vision: add the tower that reads images, or"
        " leave data.image out"
      )
    pairs = {
      "size": ("image_size", vision.image_size),
      "tokens": ("tokens_per_image", vision.tokens_per_image),
      "token": ("image_token", vision.image_token),
      "channels": ("num_channels", vision.num_channels),
    }
    for name, (of_tower, value) in pairs.items():
      if getattr(image, name) != value:
        raise UserError(
          f"data.image.{name} = {getattr(image, name)} is refused: the {of_tower} of model.vision"
          f" is {value}; give data.image.{name} = {value}"
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

  def _check_balance_placement(self) -> None:
    if self.model.moe is None:
      every = self.balance_placement.every
      raise UserError(
        f"balance_placement.every = {every} is refused: it must be 0 for a model without experts"
      )
    self.balance_placement.check(self.model.moe)
    if all(size == 1 for size in self.sharding.sizes.values()):
      self.balance_placement.packed_to(1, self.model.moe)


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
