"""NLLB-MoE: translation with two experts a token (arXiv 2207.04672)."""

from typing import Any

from moe_jax.convert.encoder_parts import TIED_EMBEDDINGS, embeddings, networks
from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig, write_activation
from moe_jax.convert.parts import HEADS, attention, norm, pooled_balance, write_balance_weight
from moe_jax.convert.rules import Rule
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig, Positions
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.layers.norms import Norm
from moe_jax.models import EncoderConfig, ModelConfig, PositionEmbedding
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import Overflow, Priority, Projection, Weighting
from moe_jax.moe.presets import preset


def _read(hub: HubConfig) -> ModelConfig:
  hub.only("router_dtype", "float32")
  hub.only("second_expert_policy", "all")
  hub.only("router_ignore_padding_tokens", False)
  width, hidden = hub.get("d_model", 1024), hub.get("decoder_ffn_dim", 4096)
  hub.only("encoder_ffn_dim", hidden)
  blocks = {name: _blocks(hub, name) for name in ("encoder", "decoder")}
  network = dict(hidden_dim=hidden, activation=hub.activation("activation_function", "relu"))
  dense = any(block.endswith(":dense") for each in blocks.values() for block in each)
  decoder_attention = _attention(hub, "decoder", width)
  tied = bool(hub.get("tie_word_embeddings", True))
  return ModelConfig(
    vocab_size=hub.get("vocab_size", 128112),
    model_dim=width,
    segments=as_segments(blocks["decoder"]),
    attention=decoder_attention,
    mlp=FeedForwardConfig(**network, bias=True) if dense else None,
    moe=MoEConfig(
      _routing(hub, max(blocks.values(), key=_with_experts)), **network, expert_bias=True
    ),
    encoder=EncoderConfig(
      as_segments(blocks["encoder"]),
      _attention(hub, "encoder", width),
      start_token=hub.get("decoder_start_token_id", 2),
      own_embedding=not tied,
    ),
    cross_attention=decoder_attention,
    position_embedding=PositionEmbedding.SINUSOIDAL,
    position_offset=hub.get("pad_token_id", 1) + 1,
    norm=Norm.LAYERNORM,
    norm_epsilon=1e-5,
    tie_embeddings=tied,
    embedding_multiplier=width**0.5 if hub.get("scale_embedding", True) else 1.0,
    dropout=hub.get("dropout", 0.1),
  )


def _blocks(hub: HubConfig, name: str) -> list[str]:
  """Returns the blocks of a stack: with a step s, the s-th of every s has experts."""
  step = hub.get(f"{name}_sparse_step", 4)
  layers = range(1, hub.get(f"{name}_layers", 12) + 1)
  return [f"attention:{'moe' if step > 0 and i % step == 0 else 'dense'}" for i in layers]


def _with_experts(blocks: list[str]) -> int:
  return sum(block.endswith(":moe") for block in blocks)


def _attention(hub: HubConfig, name: str, width: int) -> AttentionConfig:
  heads = hub.get(f"{name}_attention_heads", 16)
  return AttentionConfig(
    heads, heads, width // heads, positions=Positions.NONE, qkv_bias=True, out_bias=True
  )


def _routing(hub: HubConfig, blocks: list[str]) -> RoutingConfig:
  """Returns the router; outside training it has room for a fraction of the call's tokens.

  What experts give is scaled by the share that training's expert output masking leaves, as the
  original does outside training. Training itself has the two slots a token of its paper, section
  6.2.2, without that masking.
  """
  experts, fraction = (
    hub.get("num_experts", 128),
    hub.get("moe_eval_capacity_token_fraction", 1.0),
  )
  before = hub.get("normalize_router_prob_before_dropping", False)
  first = hub.get("batch_prioritized_routing", False)
  room = dict(eval_capacity_factor=float(f"{fraction * experts:.12g}"))
  if fraction <= 0:
    room = dict(capacity=hub.get("expert_capacity", 64))
  elif fraction == 1:
    room = dict(overflow=Overflow.DROPLESS)
  return preset(
    "nllb",
    num_experts=experts,
    projection=Projection.AFFINE if hub.get("router_bias", False) else Projection.LINEAR,
    weighting=Weighting.RENORMALIZED if before else Weighting.RENORMALIZED_AFTER_DROP,
    weight_scale=1.0 - hub.get("moe_token_dropout", 0.2),
    priority=Priority.MAX_SCORE if first else Priority.POSITION,
    **room,
    **pooled_balance(hub, blocks, 0.001),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  routing = config.moe.routing
  stacks = {"encoder": config.encoder_stack(), "decoder": config}
  settings = {}
  for name, stack in stacks.items():
    settings |= {
      f"{name}_layers": len(stack.layers()),
      f"{name}_sparse_step": _step([block[1] == "moe" for block in stack.layers()]),
      f"{name}_attention_heads": stack.attention.num_heads,
      f"{name}_ffn_dim": config.moe.hidden_dim,
    }
  return {
    **settings,
    **_write_room(routing),
    "vocab_size": config.vocab_size,
    "d_model": config.model_dim,
    "activation_function": write_activation(config.moe.activation),
    "num_experts": routing.num_experts,
    "router_bias": routing.projection == Projection.AFFINE,
    "router_dtype": "float32",
    "second_expert_policy": "all",
    "router_aux_loss_coef": write_balance_weight(config),
    "normalize_router_prob_before_dropping": routing.weighting == Weighting.RENORMALIZED,
    "batch_prioritized_routing": routing.priority == Priority.MAX_SCORE,
    "moe_token_dropout": float(f"{1.0 - routing.weight_scale:.12g}"),
    "scale_embedding": config.embedding_multiplier != 1.0,
    "dropout": config.dropout,
    "tie_word_embeddings": config.tie_embeddings,
    "is_encoder_decoder": True,
    "decoder_start_token_id": config.encoder.start_token,
    "pad_token_id": config.position_offset - 1,
  }


def _write_room(routing: RoutingConfig) -> dict[str, float]:
  if routing.capacity is not None:
    return {"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": routing.capacity}
  if routing.overflow == Overflow.DROPLESS:
    return {"moe_eval_capacity_token_fraction": 1.0}
  fraction = routing.eval_capacity_factor / routing.num_experts
  return {"moe_eval_capacity_token_fraction": float(f"{fraction:.12g}")}


def _step(sparse: list[bool]) -> int:
  """Returns the step that makes the original place its experts so, 0 for none.

  Raises:
    UserError: no step does.
  """
  step = sparse.index(True) + 1 if any(sparse) else 0
  if sparse != [step > 0 and i % step == 0 for i in range(1, len(sparse) + 1)]:
    raise UserError(f"experts in every s-th layer, not in {sparse}")
  return step


_ATTENTION = HEADS | {"out": "out_proj"}
_NETWORK = {"up": "fc1", "down": "fc2"}


def _stack(name: str, layer: str) -> tuple[Rule, ...]:
  block = f"model.{name}.layers.{layer}"
  return (
    *attention(f"{block}.self_attn", "mixer", _ATTENTION),
    *norm(f"{block}.self_attn_layer_norm", "mixer_norm"),
    *attention(f"{block}.cross_attention", "cross_attention", _ATTENTION),
    *norm(f"{block}.cross_attention_layer_norm", "cross_norm"),
    *networks(f"{block}.ffn", _NETWORK),
    *norm(f"{block}.ff_layer_norm", "feed_forward_norm"),
    *norm(f"model.{name}.layer_norm", f"{name}.final_norm"),
  )


NLLB_MOE = Family(
  architecture="NllbMoeForConditionalGeneration",
  model_type="nllb-moe",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *embeddings("model."),
    *_stack("encoder", "{encoder_layer}"),
    *_stack("decoder", "{layer}"),
  ),
  ignored=TIED_EMBEDDINGS,
  encoder_decoder=True,
  drops=True,
)
