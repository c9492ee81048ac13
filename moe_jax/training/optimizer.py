"""The optimiser: AdamW, cosine schedule, clipping; no decay on norms and biases."""

import jax
import optax
from flax import nnx

from moe_jax.layers.parameters import is_elementwise, logical_axes
from moe_jax.training.config import OptimizerConfig


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
  """Returns the optimiser; its updates are added to the parameters."""
  adamw = optax.adamw(
    learning_rate_schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  if config.clip_norm == 0:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decayed(params: nnx.State) -> nnx.State:
  """Returns the tree of booleans: which parameters weight decay acts on.

  Not scales and biases: decay would pull them to a wrong zero.
  """
  return jax.tree.map(
    lambda axes: not is_elementwise(axes),
    logical_axes(params),
    is_leaf=lambda axes: isinstance(axes, tuple),
  )
