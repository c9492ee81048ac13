"""Models and layers that surgery is tested on, and a plain float64 mixture of experts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles.networks import network
from tiny_models import forward, random_parameters, tiny_config

from moe_jax.convert.rules import flat_leaves
from moe_jax.models import Decoder

MIXTRAL = {
  "architectures": ["MixtralForCausalLM"],
  "vocab_size": 16,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "num_local_experts": 4,
  "num_experts_per_tok": 2,
}
DENSE_4 = (("attention:dense attention:dense", 2),)


def dense_config(segments=DENSE_4, **changes):
  """Returns a dense decoder config."""
  return tiny_config(segments=segments, moe=None, **changes)


def random_leaves(config, seed=0):
  """Returns random arrays for every variable of a model, by their places."""
  return leaves_of(random_parameters(config, seed)[1])


def leaves_of(state):
  """Returns the arrays of a state on the host."""
  return {path: np.asarray(array) for path, array in flat_leaves(state).items()}


def model_of(config, leaves):
  """Returns the decoder with these arrays, dropless."""
  graph, state = nnx.split(
    nnx.eval_shape(lambda: Decoder(config.dropless(), key=jax.random.key(0)))
  )
  filled = [(p, v.replace(jnp.asarray(leaves[p]))) for p, v in nnx.to_flat_state(state)]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def logits_of(config, leaves, tokens):
  """Returns the decoder's logits; equal configs share the compiled program."""
  return np.asarray(forward(*nnx.split(model_of(config, leaves)), jnp.asarray(tokens)))


def float64(leaves):
  """Returns the arrays in float64."""
  return {path: np.asarray(array, np.float64) for path, array in leaves.items()}


def dense_output(x_TD, layer, config):
  """Returns (T, D) float64: a dense feed-forward, token by token."""
  weights = {path[-1]: array for path, array in layer.items()}
  settings = config.activation.value, config.clamp
  return np.stack([network(x, weights, settings[0], clamp=settings[1]) for x in x_TD])


def experts_output(x_TD, layer, moe):
  """Returns (T, D) float64: top-k of the router, softmax over the selected, shared expert added."""
  layer = float64(layer)
  experts = {p[-1]: a for p, a in layer.items() if p[0] == "experts"}
  shared = {p[-1]: a for p, a in layer.items() if p[0] == "shared"}
  rows = []
  for x in x_TD:
    logits = x @ layer["router", "kernel"]
    chosen = np.argsort(-logits, kind="stable")[: moe.routing.top_k]
    weights = np.exp(logits[chosen] - logits[chosen].max())
    weights *= moe.routing.weight_scale / weights.sum()
    own = [{name: a[e] for name, a in experts.items()} for e in chosen]
    outputs = [network(x, each, moe.activation.value, clamp=moe.clamp) for each in own]
    y = weights @ np.stack(outputs)
    rows.append(y + (network(x, shared, moe.activation.value, clamp=moe.clamp) if shared else 0))
  return np.stack(rows)
