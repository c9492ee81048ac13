"""gpt-oss-20b and 120b (arXiv 2508.10925)."""

import dataclasses
from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import (
  BLOCK,
  LLAMA_PARTS,
  pooled_balance,
  read_attention,
  read_model,
  router,
  write_attention,
  write_balance_weight,
  write_model,
)
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import INTERLEAVED, SAME
from moe_jax.layers.mlp import Activation
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset

_WORDS = {"sliding_attention": "attention", "full_attention": "global_attention"}
# The library's code asks for a window, where no layer has one too.
_WINDOW = 128
_YARN = {
  "rope_type": "yarn",
  "factor": 32.0,
  "truncate": False,
  "original_max_position_embeddings": 4096,
}
# Of no scaling: an absent one would stand for the above.
_PLAIN = {"rope_type": "default", "type": "default"}


def _words(hub: HubConfig) -> list[str]:
  """Returns the mixer of every layer: with a window and without one in turn."""
  turns = ["sliding_attention", "full_attention"] * hub.get("num_hidden_layers")
  kinds = hub.layer_types(tuple(_WORDS), turns[: hub.get("num_hidden_layers")])
  return [_WORDS[kind] for kind in kinds]


def _with_defaults(hub: HubConfig) -> HubConfig:
  """Returns the settings with those of the library's class: a file without rotary ones has YaRN."""
  if hub.get("rope_parameters", None) is None and not hub.get("rope_scaling", None):
    hub = HubConfig({**hub.values, "rope_parameters": _YARN})
  return hub.with_defaults(num_key_value_heads=8, head_dim=64, sliding_window=_WINDOW)


def _read(hub: HubConfig) -> ModelConfig:
  hub.only("hidden_act", "silu")
  hub.only("swiglu_alpha", 1.702)
  hub = _with_defaults(hub)
  words = _words(hub)
  blocks = [f"{word}:moe" for word in words]
  biased = hub.get("attention_bias", True)
  windowed = read_attention(
    hub,
    theta=150_000.0,
    window=hub.get("sliding_window", None),
    sinks=True,
    qkv_bias=biased,
    out_bias=biased,
  )
  kinds = {"attention": windowed, "global_attention": dataclasses.replace(windowed, window=None)}
  routing = preset(
    "gpt_oss",
    num_experts=hub.get("num_local_experts"),
    top_k=hub.get("num_experts_per_tok", 4),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **read_model(hub, epsilon=1e-5),
    **{word: kinds[word] for word in dict.fromkeys(words)},
    segments=as_segments(blocks),
    moe=MoEConfig(
      routing,
      hidden_dim=hub.get("intermediate_size"),
      gated=True,
      activation=Activation.SHIFTED_QUICK_GELU,
      expert_bias=True,
      clamp=hub.get("swiglu_limit", 7.0),
    ),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, attention = config.moe, config.attention or config.global_attention
  window = config.attention.window if config.attention else None
  kinds = {word: kind for kind, word in _WORDS.items()}
  if window is None:
    kinds["attention"] = "full_attention"
  rope = {} if attention.rope_scaling else {"rope_scaling": _PLAIN}
  return {
    # The name is the same whatever the library computes.
    **write_model(config, hidden_act="silu"),
    **write_attention(attention),
    **rope,
    "attention_bias": attention.qkv_bias,
    "sliding_window": window or _WINDOW,
    "layer_types": [kinds[block[0]] for block in config.layers()],
    "intermediate_size": moe.hidden_dim,
    "swiglu_limit": moe.clamp,
    "num_local_experts": moe.routing.num_experts,
    "num_experts_per_tok": moe.routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
  }


_EXPERTS, _OURS = BLOCK + "mlp.experts.", "feed_forward.experts.weights."

GPT_OSS = Family(
  architecture="GptOssForCausalLM",
  model_type="gpt_oss",
  mixers=("attention", "global_attention"),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    rule(BLOCK + "self_attn.sinks", "mixer.sinks", SAME),
    router("mlp.router.weight"),
    rule(BLOCK + "mlp.router.bias", "feed_forward.router.logit_bias", SAME),
    rule(_EXPERTS + "gate_up_proj", f"{_OURS}gate {_OURS}up", INTERLEAVED),
    rule(_EXPERTS + "gate_up_proj_bias", f"{_OURS}gate_bias {_OURS}up_bias", INTERLEAVED),
    rule(_EXPERTS + "down_proj", f"{_OURS}down", SAME),
    rule(_EXPERTS + "down_proj_bias", f"{_OURS}down_bias", SAME),
  ),
)
