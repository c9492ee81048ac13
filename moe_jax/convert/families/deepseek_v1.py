"""DeepSeekMoE 16B (arXiv 2401.06066), as in the code released with its checkpoint."""

from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import (
  DENSE,
  LLAMA_PARTS,
  SHARED_EXPERTS,
  dense,
  experts,
  read_attention,
  read_model,
  read_network,
  renormalized,
  router,
  shared_width,
  write_attention,
  write_dense_until,
  write_model,
  write_renormalized,
  write_shared,
)
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import BalanceScope, Grouping, Weighting
from moe_jax.moe.presets import preset


def _blocks(hub: HubConfig) -> list[str]:
  layers, first = hub.get("num_hidden_layers"), hub.get("first_k_dense_replace", 0)
  with_experts = _moe_layers(layers, first, hub.get("moe_layer_freq", 1))
  return [f"attention:{'moe' if i in with_experts else 'dense'}" for i in range(layers)]


def _moe_layers(layers: int, first: int, frequency: int) -> list[int]:
  """Returns the numbers of the layers with experts: from the first on, every multiple."""
  return [i for i in range(first, layers) if i % frequency == 0]


def _frequency(config: ModelConfig) -> int:
  """Returns the frequency that gives the config's layers with experts, 1 if none does."""
  wanted, layers = config.moe_layers(), len(config.layers())
  fitting = (n for n in range(1, layers + 1) if _moe_layers(layers, wanted[0], n) == wanted)
  return next(fitting, 1)


def _balance(hub: HubConfig) -> dict[str, Any]:
  """Returns the fields of the released gate's loss: of every sequence, or of all tokens."""
  of_sequences = hub.get("seq_aux", True)
  return dict(
    balance_loss_weight=hub.get("aux_loss_alpha", 0.001),
    grouping=Grouping.SEQUENCE if of_sequences else Grouping.BATCH,
    balance_scope=BalanceScope.GROUP if of_sequences else BalanceScope.BATCH,
  )


def _read(hub: HubConfig) -> ModelConfig:
  hub.only("scoring_func", "softmax")
  blocks, top_k = _blocks(hub), hub.get("num_experts_per_tok")
  biased = hub.get("attention_bias", False)
  routing = preset(
    "deepseek_moe",
    num_experts=hub.get("n_routed_experts"),
    top_k=top_k,
    # The released gate leaves a single weight as it is.
    weighting=renormalized(hub, False) if top_k > 1 else Weighting.RAW,
    **_balance(hub),
  )
  return ModelConfig(
    **read_model(hub),
    segments=as_segments(blocks),
    attention=read_attention(hub, qkv_bias=biased, out_bias=biased),
    mlp=dense(hub, blocks, hub.get("intermediate_size")),
    moe=MoEConfig(
      routing,
      **read_network(hub, hub.get("moe_intermediate_size")),
      shared_hidden_dim=shared_width(hub),
    ),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  routing = config.moe.routing
  attention = write_attention(config.attention)
  # The released code has no such setting: heads share the width.
  if config.attention.head_dim * config.attention.num_heads == config.model_dim:
    del attention["head_dim"]
  return {
    **write_model(config),
    **attention,
    **write_dense_until(config),
    **write_shared(config),
    **write_renormalized(config),
    "moe_layer_freq": _frequency(config),
    "attention_bias": config.attention.qkv_bias,
    "n_routed_experts": routing.num_experts,
    "num_experts_per_tok": routing.top_k,
    "scoring_func": "softmax",
    "aux_loss_alpha": routing.balance_loss_weight,
    "seq_aux": routing.balance_scope != BalanceScope.BATCH,
  }


DEEPSEEK_V1 = Family(
  architecture="DeepseekForCausalLM",
  model_type="deepseek",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    *DENSE,
    router("mlp.gate.weight"),
    *experts("mlp.experts"),
    *SHARED_EXPERTS,
  ),
)
