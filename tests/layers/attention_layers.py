"""One attention layer of a config with random parameters, run whole, cached, and by the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles import attention_variants

from moe_jax.layers.attention import Attention
from moe_jax.layers.attention_config import AttentionConfig, LatentAttentionConfig
from moe_jax.layers.attention_context import Places
from moe_jax.layers.latent_attention import LatentAttention

D = 6
MODULES = {AttentionConfig: Attention, LatentAttentionConfig: LatentAttention}


def attention_config(**changes):
  return AttentionConfig(
    **{**dict(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=100.0), **changes}
  )


def latent_config(**changes):
  fields = dict(num_heads=2, kv_rank=5, nope_dim=4, rope_dim=4, value_dim=3, rope_theta=100.0)
  return LatentAttentionConfig(**{**fields, **changes})


@functools.cache
def random_layer(config, seed=0):
  """Returns the graph and the parameters of a layer: norm scales near 1, all others of order 1."""
  module = MODULES[type(config)]
  layer = nnx.eval_shape(lambda: module(D, config, key=jax.random.key(0), scale=1.0))
  graph, shapes = nnx.split(layer)
  rng = np.random.default_rng(seed)

  def draw(param):
    shape, axes = param.get_value().shape, param.get_metadata()["axes"]
    if axes == ("norm",):
      return param.replace(jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32))
    scale = 1.0 if "bias" in axes else np.sqrt(1.0 / np.prod(shape[:-1]) * shape[1])
    return param.replace(jnp.asarray(scale * rng.normal(size=shape), jnp.float32))

  return graph, jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, nnx.Variable))


def random_input(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=(*shape, D)).astype(np.float32)


def positions_of(token_mask):
  return np.maximum(np.cumsum(token_mask, axis=-1) - 1, 0)


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def whole(graph, params, config, x, token_mask):
  """Returns the layer's output (B, L, D) of whole sequences."""
  layer, positions = nnx.merge(graph, params), _count(token_mask)
  places = Places(jnp.arange(x.shape[1]), positions, positions, token_mask)
  return layer(x, layer.context(config, places))[0]


@functools.partial(jax.jit, static_argnames=("graph", "config", "sizes"))
def cached(graph, params, config, x, token_mask, sizes):
  """Returns the same, fed to a cache in pieces, and the cache; it has one slot too many."""
  layer, (B, L) = nnx.merge(graph, params), token_mask.shape
  cache = layer.empty_cache(config, (B, L + 1), jnp.float32)
  written = jnp.zeros((B, L + 1), bool)
  outputs, start = [], 0
  for size in sizes:
    part = slice(start, start + size)
    written = written.at[:, part].set(token_mask[:, part])
    positions = _count(written)
    places = Places(
      jnp.arange(start, start + size),
      positions[:, part],
      positions,
      written,
      cache_index=jnp.int32(start),
    )
    y, cache = layer(x[:, part], layer.context(config, places), cache)
    outputs.append(y)
    start += size
  return jnp.concatenate(outputs, axis=1), cache


def _count(token_mask):
  return jnp.maximum(jnp.cumsum(token_mask, axis=1) - 1, 0)


def oracle_weights(params):
  """Returns the layer's parameters as the oracle takes them, float64."""
  weights = jax.tree.map(np.float64, nnx.to_pure_dict(params))
  return {
    name: value["scale"] if isinstance(value, dict) else value for name, value in weights.items()
  }


def oracle(config, weights, x_LD, token_mask):
  """Returns the oracle's output (L, D) of one sequence."""
  call = dict(
    positions=positions_of(token_mask), token_mask=token_mask, layout=str(config.rotary_layout)
  )
  if isinstance(config, LatentAttentionConfig):
    return attention_variants.latent_attention_layer(
      x_LD,
      weights,
      scale=_latent_scale(config),
      angles=_angles(config, config.rope_dim),
      factor=_table_factor(config),
      epsilon=config.norm_epsilon,
      **call,
    )
  rotary = config.positions == "rotary"
  floor = config.query_temperature_floor
  return attention_variants.attention_layer(
    x_LD,
    weights,
    scale=config.softmax_scale or config.head_dim**-0.5,
    angles=_angles(config, config.rotary_dim or config.head_dim) if rotary else (),
    factor=_table_factor(config),
    sight=dict(window=config.window, chunk=config.chunk),
    qk_norm=str(config.qk_norm),
    epsilon=config.qk_norm_epsilon,
    clip=config.qkv_clip,
    temperature=None if floor is None else (floor, config.query_temperature_scale),
    max_distance=config.relative_bias_max_distance,
    **call,
  )


def _angles(config, width):
  return attention_variants.frequencies(width, config.rope_theta, oracle_scaling(config))


def oracle_scaling(config):
  """Returns the rope scaling as the oracle takes it."""
  s = config.rope_scaling
  if s is None:
    return None
  return dict(
    kind=str(s.kind),
    factor=s.factor,
    original=s.original_max_position,
    fast=s.beta_fast,
    slow=s.beta_slow,
    truncate=s.truncate,
    low=s.low_freq_factor,
    high=s.high_freq_factor,
  )


def _mscale(factor, scale):
  return 0.1 * scale * np.log(factor) + 1.0


def _table_factor(config):
  s = config.rope_scaling
  if s is None or s.kind != "yarn":
    return 1.0
  if s.attention_factor is not None:
    return s.attention_factor
  if s.mscale is not None and s.mscale_all_dim is not None:
    return _mscale(s.factor, s.mscale) / _mscale(s.factor, s.mscale_all_dim)
  return _mscale(s.factor, 1.0)


def _latent_scale(config):
  scale, s = (config.nope_dim + config.rope_dim) ** -0.5, config.rope_scaling
  if s is not None and s.mscale_all_dim is not None:
    scale *= _mscale(s.factor, s.mscale_all_dim) ** 2
  return scale
