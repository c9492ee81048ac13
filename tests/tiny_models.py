"""Tiny decoders with random parameters in every place, and the same parameters for the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mlp import Activation, FeedForwardConfig
from moe_jax.models import Model, ModelConfig, make_model
from moe_jax.moe import MoEConfig, Overflow, RoutingConfig, Weighting

ALTERNATING = (("attention:dense attention:moe", 2),)
DENSE = (("attention:dense", 2),)
MOE = (("attention:moe", 2),)


def tiny_routing(**changes) -> RoutingConfig:
  """Returns a dropless top-2 router over 4 experts, with some fields replaced."""
  fields = dict(
    num_experts=4, top_k=2, weighting=Weighting.RENORMALIZED, overflow=Overflow.DROPLESS
  )
  return RoutingConfig(**{**fields, **changes})


def tiny_config(
  *, gated=True, activation=Activation.SILU, routing=None, moe=None, mlp=None, **changes
) -> ModelConfig:
  """Returns a decoder config of width 8 with grouped queries, with some fields replaced.

  Args:
    gated: of the dense feed-forward and of the experts.
    activation: of both.
    routing: fields of the router to replace.
    moe: fields of `MoEConfig` to replace.
    mlp: fields of `FeedForwardConfig` to replace.
    **changes: fields of `ModelConfig` to replace.
  """
  network = dict(gated=gated, activation=activation)
  config = ModelConfig(
    vocab_size=13,
    model_dim=8,
    segments=ALTERNATING,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rope_theta=100.0),
    mlp=FeedForwardConfig(**{"hidden_dim": 12, **network, **(mlp or {})}),
    moe=MoEConfig(tiny_routing(**(routing or {})), **{"hidden_dim": 6, **network, **(moe or {})}),
  )
  segments = changes.get("segments", ALTERNATING)
  for word, section in (("moe", "moe"), ("dense", "mlp")):
    if isinstance(segments, (list, tuple)) and f":{word}" not in str(segments):
      changes.setdefault(section, None)
  return dataclasses.replace(config, **changes)


@functools.cache
def random_parameters(config: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns a model's graph and random parameters; norm scales are random too, not ones."""
  graph, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))))
  rng = np.random.default_rng(seed)

  def draw(param):
    shape, axes = param.get_value().shape, param.get_metadata()["axes"]
    if axes[-1] == "norm":
      return param.replace(jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32))
    return param.replace(jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32))

  return graph, jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, nnx.Variable))


def random_model(config: ModelConfig, seed: int = 0) -> Model:
  """Returns a model with the random parameters of that config and seed."""
  return nnx.merge(*random_parameters(config, seed))


def random_tokens(config: ModelConfig, *shape: int, seed: int = 1) -> np.ndarray:
  """Returns random token ids, int32."""
  return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("graph", "train", "return_aux"))
def forward(graph, params, *tokens, **call):
  """Runs a model compiled; equal configs share the compiled program."""
  return nnx.merge(graph, params)(*tokens, **call)


def run(config: ModelConfig, *tokens, seed: int = 0, **call):
  """Runs the model with the random parameters of that config and seed."""
  return forward(*random_parameters(config, seed), *map(jnp.asarray, tokens), **call)


def oracle_weights(config: ModelConfig, params: nnx.State) -> dict:
  """Returns the parameters as `oracles.decoder.logits` takes them: float64, block after block."""
  tree = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))
  blocks = []
  for index, segment in enumerate(config.parsed_segments()):
    stacked = tree["segments"][index]["blocks"]
    for repeat in range(segment.repeats):
      blocks += [oracle_block(stacked[i], repeat) for i in range(len(segment.pattern))]
  head = tree["embedding"].T if config.tie_embeddings else tree["head"]
  return {
    "embedding": tree["embedding"],
    "blocks": blocks,
    "final_norm": tree["final_norm"]["scale"],
    "head": head,
  }


def oracle_block(stacked: dict, repeat: int) -> dict:
  """Returns one repeat of a block of a segment, as `oracles.decoder.block` takes it."""
  tree = jax.tree.map(lambda a: a[repeat], stacked)
  block = {
    "mixer_norm": tree["mixer_norm"]["scale"],
    "feed_forward_norm": tree["feed_forward_norm"]["scale"],
    "attention": tree["mixer"],
  }
  if "cross_attention" in tree:
    block |= {"cross": tree["cross_attention"], "cross_norm": tree["cross_norm"]["scale"]}
  feed_forward = tree["feed_forward"]
  if "router" not in feed_forward:
    return block | {"dense": _oracle_network(feed_forward["weights"])}
  experts = feed_forward["experts"]["weights"]
  return block | {
    "router": feed_forward["router"]["kernel"],
    "experts": [
      _oracle_network({name: w[e] for name, w in experts.items()})
      for e in range(len(experts["up"]))
    ],
  }


def _oracle_network(weights: dict) -> dict:
  if "gate" in weights:
    return {"wi_gate": weights["gate"], "wi_up": weights["up"], "wo": weights["down"]}
  return {"wi": weights["up"], "wo": weights["down"]}
