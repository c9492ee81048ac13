"""Jamba (arXiv 2403.19887): Mamba mixers, attention without positions now and then, experts."""

import math
from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig, write_activation
from moe_jax.convert.parts import (
  ATTENTION,
  BLOCK,
  PROJECTIONS,
  dense,
  experts,
  network,
  pooled_balance,
  read_model,
  read_network,
  router,
  write_balance_weight,
  write_model,
)
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import LINEAR, SAME, Transform, joined
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig, Positions
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset

# A convolution of channels by themselves, ours (W, I), as torch.nn.Conv1d's (I, 1, W).
_DEPTHWISE = Transform(lambda a: a.T[:, None, :], lambda t, shapes: (t[:, 0, :].T,))


def _chosen(hub: HubConfig, name: str, period: int, offset: int) -> list[bool]:
  """Tells of every layer whether its number has this remainder, as `{name}_layer_period` says.

  Raises:
    UserError: no layer has it.
  """
  period = hub.get(f"{name}_layer_period", period)
  offset = hub.get(f"{name}_layer_offset", offset)
  if not 0 <= offset < period:
    raise UserError(
      f"{CONFIG_FILE} has {name}_layer_offset = {offset} with {name}_layer_period = {period}:"
      f" expected an offset from 0 to {period - 1}"
    )
  return [layer % period == offset for layer in range(hub.get("num_hidden_layers", 32))]


def _blocks(hub: HubConfig) -> list[str]:
  with_attention, with_experts = _chosen(hub, "attn", 8, 4), _chosen(hub, "expert", 2, 1)
  several = hub.get("num_experts", 16) > 1
  return [
    f"{'attention' if attends else 'mamba'}:{'moe' if sparse and several else 'dense'}"
    for attends, sparse in zip(with_attention, with_experts, strict=True)
  ]


def _read_attention(hub: HubConfig) -> AttentionConfig:
  heads = hub.get("num_attention_heads")
  return AttentionConfig(
    heads,
    hub.get("num_key_value_heads", heads),
    hub.get("head_dim", hub.get("hidden_size") // heads),
    positions=Positions.NONE,
  )


def _read_mamba(hub: HubConfig) -> MambaConfig:
  D, rank = hub.get("hidden_size"), hub.get("mamba_dt_rank", "auto")
  return MambaConfig(
    inner_dim=hub.get("mamba_expand", 2) * D,
    step_rank=math.ceil(D / 16) if rank == "auto" else rank,
    state_dim=hub.get("mamba_d_state", 16),
    conv_width=hub.get("mamba_d_conv", 4),
    conv_bias=hub.get("mamba_conv_bias", True),
    proj_bias=hub.get("mamba_proj_bias", False),
    activation=hub.activation(),
    norm_epsilon=hub.get("rms_norm_eps", 1e-6),
  )


def _read(hub: HubConfig) -> ModelConfig:
  blocks, width = _blocks(hub), hub.get("intermediate_size")
  mixers = {block.partition(":")[0] for block in blocks}
  moe = None
  if any(block.endswith(":moe") for block in blocks):
    routing = preset(
      "jamba",
      num_experts=hub.get("num_experts", 16),
      top_k=hub.get("num_experts_per_tok", 2),
      **pooled_balance(hub, blocks, 0.001),
    )
    moe = MoEConfig(routing, **read_network(hub, width))
  return ModelConfig(
    **read_model(hub),
    segments=as_segments(blocks),
    attention=_read_attention(hub) if "attention" in mixers else None,
    mamba=_read_mamba(hub) if "mamba" in mixers else None,
    mlp=dense(hub, blocks, width),
    moe=moe,
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  layers, routing = config.layers(), config.moe.routing
  return {
    **write_model(config),
    **_write_period("attn", [block[0] == "attention" for block in layers]),
    **_write_period("expert", [block[1] == "moe" for block in layers]),
    **_write_attention(config),
    **_write_mamba(config),
    "intermediate_size": config.moe.hidden_dim,
    "num_experts": routing.num_experts,
    "num_experts_per_tok": routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
  }


def _write_period(name: str, chosen: list[bool]) -> dict[str, int]:
  """Returns the shortest period and its offset that choose these layers, or at least the first."""
  first = chosen.index(True) if True in chosen else len(chosen)
  for period in range(first + 1, len(chosen) + 2):
    if [layer % period == first for layer in range(len(chosen))] == chosen:
      break
  return {f"{name}_layer_period": period, f"{name}_layer_offset": first}


def _write_attention(config: ModelConfig) -> dict[str, int]:
  # The hub's settings have heads even where no layer attends.
  c = config.attention or AttentionConfig(1, 1, config.model_dim, positions=Positions.NONE)
  settings = {"num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads}
  if c.num_heads * c.head_dim != config.model_dim:
    settings["head_dim"] = c.head_dim
  return settings


def _write_mamba(config: ModelConfig) -> dict[str, Any]:
  c = config.mamba
  if c is None:
    return {}
  return {
    "mamba_expand": c.inner_dim // config.model_dim,
    "mamba_dt_rank": c.step_rank,
    "mamba_d_state": c.state_dim,
    "mamba_d_conv": c.conv_width,
    "mamba_conv_bias": c.conv_bias,
    "mamba_proj_bias": c.proj_bias,
    "hidden_act": write_activation(c.activation),
  }


def _mamba(hub: str, ours: str, transform: Transform):
  places = " ".join(f"mixer.{place}" for place in ours.split())
  return rule(f"{BLOCK}mamba.{hub}", places, transform)


JAMBA = Family(
  architecture="JambaForCausalLM",
  model_type="jamba",
  mixers=("attention", "mamba"),
  read=_read,
  write=_write,
  rules=(
    rule("model.embed_tokens.weight", "embedding", SAME),
    rule("model.final_layernorm.weight", "final_norm.scale", SAME),
    rule("lm_head.weight", "head", LINEAR),
    rule(BLOCK + "input_layernorm.weight", "mixer_norm.scale", SAME),
    rule(BLOCK + "pre_ff_layernorm.weight", "feed_forward_norm.scale", SAME),
    *ATTENTION,
    _mamba("in_proj.weight", "input gate", joined(LINEAR)),
    _mamba("in_proj.bias", "input_bias gate_bias", joined(SAME)),
    _mamba("conv1d.weight", "kernel", _DEPTHWISE),
    _mamba("conv1d.bias", "kernel_bias", SAME),
    _mamba("x_proj.weight", "selection", LINEAR),
    _mamba("dt_layernorm.weight", "step_norm.scale", SAME),
    _mamba("b_layernorm.weight", "write_norm.scale", SAME),
    _mamba("c_layernorm.weight", "read_norm.scale", SAME),
    _mamba("dt_proj.weight", "step", LINEAR),
    _mamba("dt_proj.bias", "step_bias", SAME),
    _mamba("A_log", "log_decay", SAME),
    _mamba("D", "skip", SAME),
    _mamba("out_proj.weight", "output", LINEAR),
    _mamba("out_proj.bias", "output_bias", SAME),
    *network("feed_forward", "feed_forward.weights", PROJECTIONS),
    router("feed_forward.router.weight"),
    *experts("feed_forward.experts"),
  ),
)
