"""Bytes of weights, optimizer state and cache, over all devices together."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models import ModelConfig, make_model
from moe_jax.moe.capacity import expert_capacity
from moe_jax.moe.layer import MoEConfig
from moe_jax.planning.count import count_parameters
from moe_jax.planning.sizes import cache_width, router_state_size, state_bytes
from moe_jax.training.adafactor import scale_by_adafactor
from moe_jax.training.optimizer_config import OptimizerName

# Of float32, and of the int32 of tables.
_WORD_BYTES = 4


def weight_bytes(config: ModelConfig) -> int:
  """Returns the bytes of the parameters, float32 as training keeps them.

  Router state and the modules of multi-token prediction are included.
  """
  state = 0
  if config.moe is not None:
    layers = len(config.moe_layers(train=True))
    state = layers * router_state_size(config.vocab_size, config.moe)
  return _WORD_BYTES * (_all_parameters(config) + state)


def optimizer_bytes(config: ModelConfig, name: OptimizerName = OptimizerName.ADAMW) -> int:
  """Returns the bytes that an optimiser keeps, float32; its step counters are left out.

  AdamW: two moments of every parameter. Adafactor: see `scale_by_adafactor`; the shapes are those
  of the real model, since they and not their number decide.
  """
  if name == OptimizerName.ADAMW:
    return 2 * _WORD_BYTES * _all_parameters(config)

  def statistics():
    params = nnx.state(make_model(config, key=jax.random.key(0)), nnx.Param)
    return scale_by_adafactor().init(params)._replace(count=None)

  kept = jax.tree.leaves(jax.eval_shape(statistics))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def cache_bytes_per_token(config: ModelConfig) -> int:
  """Returns the bytes that decoding keeps of one token it writes, in the dtype of activations.

  A window or chunk does not shorten the cache, which has a slot for every token. What says which
  slots are real (one byte a slot, one more in a block that takes only some tokens) is left out.
  Mamba layers keep nothing of a token, see `cache_bytes_per_sequence`.
  """
  mixers = config.mixers()
  words = [block[0] for block in config.layers() if block[0] != "mamba"]
  numbers = sum(cache_width(mixers[word]) for word in words)
  return numbers * jnp.dtype(config.dtype).itemsize


def encoded_cache_bytes_per_token(config: ModelConfig) -> int:
  """Returns the bytes that decoding keeps of one token of an encoder; 0 without one."""
  if config.encoder is None:
    return 0
  numbers = len(config.layers()) * cache_width(config.cross_attention)
  return numbers * jnp.dtype(config.dtype).itemsize


def cache_bytes_per_sequence(config: ModelConfig) -> int:
  """Returns the bytes that decoding keeps of a sequence whatever its length: Mamba's states."""
  layers = sum(block[0] == "mamba" for block in config.layers())
  return layers * state_bytes(config.mamba, jnp.dtype(config.dtype).itemsize) if layers else 0


def _all_parameters(config: ModelConfig) -> int:
  count = count_parameters(config)
  return count.total + count.multi_token.total


def padded_exchange_bytes(
  config: MoEConfig, model_dim: int, tokens: int, *, train: bool, itemsize: int = 4
) -> int:
  """Returns the bytes that a MoE layer takes for slots on a device, without its weights.

  A device exchanges as many slots as it has, whatever the mesh: E * C for each of its groups. What
  is alive at once is, of each slot: forward, the row that arrived, and `gate` and `up`; in training
  the row that arrived and the one that went back, three hidden rows that the backward pass reads,
  and the gradients of as many.

  Args:
    config: the layer; `gather` or `einsum` dispatch.
    model_dim: D.
    tokens: of the device, whole groups.
    train: forward and backward.
    itemsize: bytes of an activation.
  """
  size = config.routing.group_size or tokens
  slots = config.routing.num_experts * (tokens // size)
  slots *= expert_capacity(config.routing, size, train=True)
  hidden = config.feed_forward().num_matrices - 1
  rows, widths = (2, 3 * hidden) if train else (1, hidden)
  return itemsize * slots * (rows * model_dim + widths * config.hidden_dim)
