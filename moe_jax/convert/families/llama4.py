"""Llama 4 Scout and Maverick, the text models (released code; no report)."""

import dataclasses
from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig
from moe_jax.convert.parts import (
  BLOCK,
  LLAMA_PARTS,
  PROJECTIONS,
  dense,
  network,
  pooled_balance,
  read_attention,
  read_model,
  read_network,
  router,
  write_attention,
  write_balance_weight,
  write_model,
)
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import SAME, joined
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig, Positions, QKNorm, RotaryLayout
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset

_ROTATED, _PLAIN = "attention", "global_attention"
_CHUNKED, _FULL = "chunked_attention", "full_attention"
# The library's code asks for a size, where no layer has chunks too.
_CHUNK = 8192
_KINDS = {_ROTATED: _CHUNKED, _PLAIN: _FULL}


def _words(hub: HubConfig) -> list[str]:
  """Returns the mixer of every layer: with rotary positions or without."""
  layers, interval = hub.get("num_hidden_layers"), hub.get("no_rope_layer_interval", 4)
  every = [(layer + 1) % interval != 0 for layer in range(layers)]
  rotated = hub.get("no_rope_layers", []) or every
  if len(rotated) < layers:
    raise UserError(
      f"{CONFIG_FILE} has {len(rotated)} no_rope_layers, expected num_hidden_layers = {layers}"
    )
  # The library's code reads the first entries of a longer list.
  return [_ROTATED if each else _PLAIN for each in rotated[:layers]]


def _chunks(hub: HubConfig) -> dict[str, int | None]:
  """Returns the chunk of each mixer, None for those that see everything.

  Raises:
    UserError: layers of one mixer differ in it.
  """
  words = _words(hub)
  kinds = hub.each_layer("layer_types", [_KINDS[word] for word in words], (_CHUNKED, _FULL))
  found = {}
  for word, kind in zip(words, kinds, strict=True):
    if found.setdefault(word, kind) != kind:
      raise UserError(
        f"{CONFIG_FILE} has layer_types = {kinds}, which is not supported: expected one kind for"
        " all layers with rotary positions, and one for all without"
      )
  chunk = hub.get("attention_chunk_size", None)
  return {word: chunk if kind == _CHUNKED else None for word, kind in found.items()}


def _moe_layers(hub: HubConfig) -> list[int]:
  step = hub.get("interleave_moe_layer_step", 1)
  return hub.get("moe_layers", list(range(step - 1, hub.get("num_hidden_layers"), step)))


def _blocks(hub: HubConfig) -> list[str]:
  with_experts = _moe_layers(hub)
  return [
    f"{word}:{'moe' if layer in with_experts else 'dense'}"
    for layer, word in enumerate(_words(hub))
  ]


def _attentions(hub: HubConfig) -> dict[str, AttentionConfig]:
  """Returns the two mixers, those of them that are used."""
  chunks = _chunks(hub)
  biased = hub.get("attention_bias", False)
  norm = QKNorm.L2 if hub.get("use_qk_norm", True) else QKNorm.NONE
  rotated = read_attention(
    hub,
    theta=500_000.0,
    rotary_layout=RotaryLayout.PAIRS,
    chunk=chunks.get(_ROTATED),
    qk_norm=norm,
    qk_norm_epsilon=hub.get("rms_norm_eps", 1e-5),
    qkv_bias=biased,
    out_bias=biased,
  )
  tuned = bool(hub.get("attn_temperature_tuning", True))
  plain = AttentionConfig(
    rotated.num_heads,
    rotated.num_kv_heads,
    rotated.head_dim,
    chunk=chunks.get(_PLAIN),
    positions=Positions.NONE,
    qkv_bias=biased,
    out_bias=biased,
    query_temperature_floor=hub.get("floor_scale", 8192) if tuned else None,
    query_temperature_scale=hub.get("attn_scale", 0.1) if tuned else 0.1,
  )
  return {word: c for word, c in ((_ROTATED, rotated), (_PLAIN, plain)) if word in chunks}


def _read(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(num_key_value_heads=8, head_dim=128, attention_chunk_size=_CHUNK)
  blocks, width = _blocks(hub), hub.get("intermediate_size")
  routing = preset(
    "llama4",
    num_experts=hub.get("num_local_experts", 16),
    top_k=hub.get("num_experts_per_tok", 1),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **read_model(hub, epsilon=1e-5),
    **_attentions(hub),
    segments=as_segments(blocks),
    mlp=dense(hub, blocks, hub.get("intermediate_size_mlp", 16384)),
    moe=MoEConfig(routing, **read_network(hub, width), shared_hidden_dim=width),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, rotated, plain = config.moe, config.attention, config.global_attention
  any_attention = rotated or dataclasses.replace(plain, positions=Positions.ROTARY)
  words = [block[0] for block in config.layers()]
  mixers = {_ROTATED: rotated, _PLAIN: plain}
  settings = {
    **write_model(config),
    **write_attention(any_attention),
    "intermediate_size": moe.hidden_dim,
    "intermediate_size_mlp": config.mlp.hidden_dim if config.mlp else moe.hidden_dim,
    "moe_layers": config.moe_layers(),
    "no_rope_layers": [int(word == _ROTATED) for word in words],
    "layer_types": [_FULL if mixers[word].chunk is None else _CHUNKED for word in words],
    "attention_bias": any_attention.qkv_bias,
    "attention_chunk_size": next((c.chunk for c in mixers.values() if c and c.chunk), _CHUNK),
    "use_qk_norm": any_attention.qk_norm == QKNorm.L2,
    "num_local_experts": moe.routing.num_experts,
    "num_experts_per_tok": moe.routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
  }
  tuned = plain is not None and plain.query_temperature_floor is not None
  settings["attn_temperature_tuning"] = tuned
  if tuned:
    settings["floor_scale"] = plain.query_temperature_floor
    settings["attn_scale"] = plain.query_temperature_scale
  return settings


_EXPERTS = BLOCK + "feed_forward.experts."

LLAMA4 = Family(
  architecture="Llama4ForCausalLM",
  model_type="llama4_text",
  mixers=(_ROTATED, _PLAIN),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    *network("feed_forward", "feed_forward.weights", PROJECTIONS),
    router("feed_forward.router.weight"),
    rule(
      _EXPERTS + "gate_up_proj",
      "feed_forward.experts.weights.gate feed_forward.experts.weights.up",
      joined(SAME, axis=-1),
    ),
    rule(_EXPERTS + "down_proj", "feed_forward.experts.weights.down", SAME),
    *network("feed_forward.shared_expert", "feed_forward.shared.network.weights", PROJECTIONS),
  ),
)
