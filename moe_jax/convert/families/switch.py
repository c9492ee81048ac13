"""Switch Transformers: T5 with one expert a token (arXiv 2101.03961)."""

import dataclasses
from typing import Any

from moe_jax.convert.encoder_parts import TIED_EMBEDDINGS, embeddings, networks
from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig, write_activation
from moe_jax.convert.parts import attention, norm, write_share
from moe_jax.convert.rules import Rule, rule
from moe_jax.convert.transforms import SAME
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig, Positions
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models import EncoderConfig, ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import Grouping, Overflow, Projection
from moe_jax.moe.presets import preset

# More slots than any sequence has tokens stand for experts that never drop.
_UNLIMITED = 2**20

# What the original multiplies the losses of each stack with, by the field here.
_LOSSES = {"balance_loss_weight": "router_aux_loss_coef", "z_loss_weight": "router_z_loss_coef"}


def _read(hub: HubConfig) -> ModelConfig:
  hub.only("router_dtype", "float32")
  width, heads = hub.get("d_model", 768), hub.get("num_heads", 12)
  layers = {"encoder": hub.get("num_layers", 12)}
  layers["decoder"] = hub.get("num_decoder_layers", layers["encoder"])
  stacks = {
    name: _blocks(count, hub.get(f"num_sparse_{name}_layers", 3)) for name, count in layers.items()
  }
  network = dict(
    hidden_dim=hub.get("d_ff", 2048), activation=hub.activation("dense_act_fn", "relu")
  )
  cross = AttentionConfig(
    heads, heads, hub.get("d_kv", 64), positions=Positions.NONE, softmax_scale=1.0
  )
  own = _with_bias(hub, cross)
  tied = bool(hub.get("tie_word_embeddings", True))
  dense = any(block.endswith(":dense") for blocks in stacks.values() for block in blocks)
  return ModelConfig(
    vocab_size=hub.get("vocab_size", 32128),
    model_dim=width,
    segments=as_segments(stacks["decoder"]),
    attention=own,
    mlp=FeedForwardConfig(**network) if dense else None,
    moe=MoEConfig(
      _routing(hub, stacks), router_jitter=hub.get("router_jitter_noise", 0.01), **network
    ),
    encoder=EncoderConfig(
      as_segments(stacks["encoder"]),
      own,
      start_token=hub.get("decoder_start_token_id", 0),
      own_embedding=not tied,
    ),
    cross_attention=cross,
    norm_epsilon=hub.get("layer_norm_epsilon", 1e-6),
    tie_embeddings=tied,
    logits_divisor=width**0.5 if tied else 1.0,
    dropout=hub.get("dropout_rate", 0.1),
  )


def _with_bias(hub: HubConfig, plain: AttentionConfig) -> AttentionConfig:
  return dataclasses.replace(
    plain,
    relative_bias_buckets=hub.get("relative_attention_num_buckets", 32),
    relative_bias_max_distance=hub.get("relative_attention_max_distance", 128),
    relative_bias_shared=True,
  )


def _blocks(layers: int, sparse: int) -> list[str]:
  """Returns the blocks of a stack: with a step s, those with experts are the second of every s."""
  step = layers // sparse if sparse > 0 else layers
  kinds = ["moe" if step == 1 or i % step == 1 else "dense" for i in range(layers)]
  return [f"attention:{kind}" for kind in kinds]


def _routing(hub: HubConfig, stacks: dict[str, list[str]]):
  """Returns the router: one expert, and so many slots of it in every sequence.

  The original's losses are of each stack, over the tokens of all its layers; ours are a sum over
  layers, so each layer has its share of the coefficients.
  """
  slots = hub.get("expert_capacity", 64)
  most = max(sum(block.endswith(":moe") for block in blocks) for blocks in stacks.values())
  room = dict(overflow=Overflow.DROPLESS) if slots >= _UNLIMITED else dict(capacity=slots)
  return preset(
    "switch",
    num_experts=hub.get("num_experts", 8),
    grouping=Grouping.SEQUENCE,
    projection=Projection.AFFINE if hub.get("router_bias", False) else Projection.LINEAR,
    **room,
    **{name: hub.get(theirs, 0.001) / max(most, 1) for name, theirs in _LOSSES.items()},
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  own, routing = config.attention, config.moe.routing
  stacks = {"encoder": config.encoder_stack(), "decoder": config}
  sparse = {name: [b[1] == "moe" for b in stack.layers()] for name, stack in stacks.items()}
  losses = {theirs: write_share(getattr(routing, name), config) for name, theirs in _LOSSES.items()}
  return {
    "vocab_size": config.vocab_size,
    "d_model": config.model_dim,
    "d_kv": own.head_dim,
    "d_ff": config.moe.hidden_dim,
    "num_heads": own.num_heads,
    "num_layers": len(sparse["encoder"]),
    "num_decoder_layers": len(sparse["decoder"]),
    **{f"num_sparse_{name}_layers": _count(each) for name, each in sparse.items()},
    "num_experts": routing.num_experts,
    "expert_capacity": _UNLIMITED if routing.capacity is None else routing.capacity,
    "router_bias": routing.projection == Projection.AFFINE,
    "router_dtype": "float32",
    "router_jitter_noise": config.moe.router_jitter,
    **losses,
    "relative_attention_num_buckets": own.relative_bias_buckets,
    "relative_attention_max_distance": own.relative_bias_max_distance,
    "dense_act_fn": write_activation(config.moe.activation),
    "dropout_rate": config.dropout,
    "layer_norm_epsilon": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
    "is_encoder_decoder": True,
    "decoder_start_token_id": config.encoder.start_token,
    "pad_token_id": config.encoder.start_token,
  }


def _count(sparse: list[bool]) -> int:
  """Returns the number of layers with experts that makes the original place them so.

  Raises:
    UserError: no number does.
  """
  for count in range(len(sparse) + 1):
    if [block.endswith(":moe") for block in _blocks(len(sparse), count)] == sparse:
      return count
  raise UserError(f"experts in every s-th layer from the second on, not in {sparse}")


_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_NETWORK = {"up": "wi", "down": "wo"}


def _stack(name: str, layer: str) -> tuple[Rule, ...]:
  """Returns the lines that the encoder and the decoder both have."""
  block = f"{name}.block.{layer}.layer"
  return (
    *attention(f"{block}.0.SelfAttention", "mixer", _ATTENTION),
    *norm(f"{block}.0.layer_norm", "mixer_norm"),
    rule(
      f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      f"{name}.relative_bias",
      SAME,
    ),
    rule(f"{name}.final_layer_norm.weight", f"{name}.final_norm.scale", SAME),
  )


def _feed_forward(layer: str) -> tuple[Rule, ...]:
  return (
    *networks(f"{layer}.mlp", _NETWORK),
    *norm(f"{layer}.layer_norm", "feed_forward_norm"),
  )


SWITCH = Family(
  architecture="SwitchTransformersForConditionalGeneration",
  model_type="switch_transformers",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *embeddings(),
    *_stack("encoder", "{encoder_layer}"),
    *_feed_forward("encoder.block.{encoder_layer}.layer.1"),
    *_stack("decoder", "{layer}"),
    *attention("decoder.block.{layer}.layer.1.EncDecAttention", "cross_attention", _ATTENTION),
    *norm("decoder.block.{layer}.layer.1.layer_norm", "cross_norm"),
    *_feed_forward("decoder.block.{layer}.layer.2"),
  ),
  ignored=TIED_EMBEDDINGS,
  encoder_decoder=True,
  drops=True,
)
