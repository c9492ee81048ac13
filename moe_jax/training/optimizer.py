"""The optimiser: AdamW or Adafactor, cosine schedule, clipping; no decay on norms and biases."""

import jax
import optax
from flax import nnx

from moe_jax.layers.parameters import is_elementwise, logical_axes
from moe_jax.training.adafactor import scale_by_adafactor
from moe_jax.training.optimizer_config import OptimizerConfig, OptimizerName


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns learning rate by step: linear warm-up, then cosine to `final_fraction` at the end."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=min(config.warmup_steps, steps - 1),
    decay_steps=steps,
    end_value=config.learning_rate * config.final_fraction,
  )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Returns the optimiser; its updates are added to the parameters.

  Whatever its name: gradients are clipped by their global norm, an update is the learning rate
  times (a step + weight_decay * the parameter), and decay spares what `decayed` spares. Adafactor's
  step has the size of the parameter, AdamW's that of 1.
  """
  make = {OptimizerName.ADAMW: _adamw, OptimizerName.ADAFACTOR: _adafactor}[config.name]
  optimizer = make(config, learning_rate_schedule(config, steps))
  if config.clip_norm == 0:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=decayed,
  )


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  # Not optax.adafactor, which decays by a rate of its own whatever the learning rate is.
  return optax.chain(
    scale_by_adafactor(),
    optax.add_decayed_weights(config.weight_decay, mask=decayed),
    optax.scale_by_learning_rate(schedule),
  )


def num_updates(opt_state: optax.OptState) -> jax.Array:
  """Returns the int32 number of updates that the learning rate goes by."""

  def is_schedule(path, _):
    names = (getattr(key, "tuple_name", None) for key in path)
    return "ScaleByScheduleState" in names

  return optax.tree.get(opt_state, "count", filtering=is_schedule)


def decayed(params: nnx.State) -> nnx.State:
  """Returns the tree of booleans: which parameters weight decay acts on.

  Not scales and biases: decay would pull them to a wrong zero.
  """
  return jax.tree.map(
    lambda axes: not is_elementwise(axes),
    logical_axes(params),
    is_leaf=lambda axes: isinstance(axes, tuple),
  )
