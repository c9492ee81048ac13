"""Router state over training steps: the rules of `moe_jax.moe.balance`, applied to every layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models import ModelConfig
from moe_jax.models.moe_stacks import MoEStack, moe_stacks
from moe_jax.moe import BiasUpdate, RoutingConfig
from moe_jax.moe.balance import update_balance_scale, update_bias
from moe_jax.training.layer_metrics import LayerMetrics, load_counts


def update_router_state(
  router_state: nnx.State,
  layers: list[LayerMetrics],
  tokens: Sequence[jax.Array],
  config: ModelConfig,
) -> nnx.State:
  """Returns the router state after a step.

  Args:
    router_state: the `RouterState` variables, stacked over a segment's repeats.
    layers: the metrics of the whole step, one record for each MoE layer.
    tokens: the real tokens of the step that each MoE layer saw.
    config: the model.
  """
  flat = dict(nnx.to_flat_state(router_state))
  for stack in moe_stacks(config):
    rows = [layers[layer] for layer in stack.layers]
    step = jax.tree.map(lambda *a: jnp.stack(a), *rows)
    # Not the metric experts_per_token: what capacity dropped is no matter of the router's sparsity.
    seen = jnp.stack([tokens[layer] for layer in stack.layers])
    step["experts_asked"] = step["assignments"] / jnp.maximum(seen, 1)
    for name, rule in _RULES.items():
      path = (*stack.path, "router", name)
      if path in flat:
        old = flat[path].get_value()
        new = jax.vmap(lambda a, b, rule=rule: rule(a, b, config.moe.routing))(old, step)
        flat[path] = flat[path].replace(new)
  return nnx.from_flat_state(flat.items())


def state_metrics(router_state: nnx.State, config: ModelConfig) -> list[LayerMetrics]:
  """Returns `bias_max` (largest absolute bias) and `balance_scale` of each layer that has them."""
  flat = dict(nnx.to_flat_state(router_state))
  layers = {}
  for stack in moe_stacks(config):
    for repeat, layer in enumerate(stack.layers):
      layers[layer] = _of_layer(flat, stack, repeat)
  return [layers[layer] for layer in sorted(layers)]


def _of_layer(flat, stack: MoEStack, repeat: int) -> LayerMetrics:
  bias = flat.get((*stack.path, "router", "bias"))
  scale = flat.get((*stack.path, "router", "balance_scale"))
  metrics = {} if bias is None else {"bias_max": jnp.max(jnp.abs(bias.get_value()[repeat]))}
  return metrics | ({} if scale is None else {"balance_scale": scale.get_value()[repeat]})


def _next_bias(bias: jax.Array, step: LayerMetrics, config: RoutingConfig) -> jax.Array:
  if config.bias_update == BiasUpdate.QUANTILE:
    # Without a real token there is no quantile.
    target = jnp.where(step["assignments"] > 0, step["bias_target"], bias[: config.num_experts])
    return bias.at[: config.num_experts].set(target)
  return update_bias(bias, load_counts(step), config)


def _next_scale(scale: jax.Array, step: LayerMetrics, config: RoutingConfig) -> jax.Array:
  measured = "experts_asked" if config.selection == "positive" else "max_violation"
  return update_balance_scale(scale, step[measured], config)


_RULES = {"bias": _next_bias, "balance_scale": _next_scale}
