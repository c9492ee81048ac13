"""The shapes of a real model, added up part by part: what closed formulas are held to."""

import math

import jax
from flax import nnx

from moe_jax.models import Model, ModelConfig, make_model
from moe_jax.moe.router import RouterState


def abstract_model(config: ModelConfig) -> Model:
  """Returns the model with shapes in place of arrays."""
  return nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0)))


def sizes_by_component(config: ModelConfig) -> dict[str, int]:
  """Returns the parameters of each component, multi-token modules and biases under their own."""
  model, sizes = abstract_model(config), {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    name = "multi_token" if path[0] == "mtp" else component(config, path)
    if isinstance(variable, RouterState):
      name = f"{name} state"
    sizes[name] = sizes.get(name, 0) + math.prod(variable.get_value().shape)
  return sizes


def component(config: ModelConfig, path: tuple) -> str:
  """Names the component that a parameter belongs to."""
  words = [word for word in path if isinstance(word, str) and word not in ("encoder", "decoder")]
  if words[0] == "vision":
    return "vision"
  if words[0] in ("embedding", "head", "head_bias"):
    return words[0].removesuffix("_bias")
  if words[0] == "final_norm" or {"mixer_norm", "cross_norm", "feed_forward_norm"} & set(words):
    return "norms"
  if "cross_attention" in words:
    return "cross_attention"
  if words[0] == "relative_bias":
    return "attention"
  if "mixer" in words:
    number, place = (each for each in path if isinstance(each, int))
    stack = config.encoder_stack() if path[0] == "encoder" else config
    word = stack.parsed_segments()[number].pattern[place][0]
    return "mamba" if word == "mamba" else "attention"
  if "feed_forward" not in words:
    return "depth_router"
  inner = words[words.index("feed_forward") + 1]
  names = {"router": "router", "experts": "routed_experts", "shared": "shared_experts"}
  return names.get(inner, "dense_feed_forward")
