"""Lines of the tables that most families share, and the settings behind them."""

from typing import Any

from moe_jax.convert.hub_config import HubConfig, write_activation, write_rope
from moe_jax.convert.rules import Rule, rule
from moe_jax.convert.transforms import FLAT, LINEAR, LINEAR_OUT, SAME
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models import ModelConfig
from moe_jax.moe.options import BalanceFraction, BalanceScope, Weighting

BLOCK = "model.layers.{layer}."

# The hub's usual names of an attention layer's matrices.
HEADS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}


def norm(hub: str, ours: str) -> tuple[Rule, ...]:
  """Returns the lines of a norm."""
  return (
    rule(f"{hub}.weight", f"{ours}.scale", SAME),
    rule(f"{hub}.bias", f"{ours}.bias", SAME),
  )


def matrix(hub: str, ours: str) -> tuple[Rule, ...]:
  """Returns the lines of a network's matrix and its bias."""
  return rule(f"{hub}.weight", ours, LINEAR), rule(f"{hub}.bias", f"{ours}_bias", SAME)


def attention(hub: str, ours: str, names: dict[str, str]) -> tuple[Rule, ...]:
  """Returns the lines of an attention layer.

  Args:
    hub: what the keys begin with.
    ours: its place in the block.
    names: the hub's names of `query`, `key`, `value` and `out`, by ours.
  """
  lines = []
  for own, theirs in names.items():
    matrix, bias = (LINEAR_OUT, SAME) if own == "out" else (LINEAR, FLAT)
    lines.append(rule(f"{hub}.{theirs}.weight", f"{ours}.{own}", matrix))
    lines.append(rule(f"{hub}.{theirs}.bias", f"{ours}.{own}_bias", bias))
  return tuple(lines)


# Embedding, final norm and head, as in LLaMA's converted checkpoints.
OUTER = (
  rule("model.embed_tokens.weight", "embedding", SAME),
  *norm("model.norm", "final_norm"),
  rule("lm_head.weight", "head", LINEAR),
  rule("lm_head.bias", "head_bias", SAME),
)
NORMS = (
  *norm(BLOCK + "input_layernorm", "mixer_norm"),
  *norm(BLOCK + "post_attention_layernorm", "feed_forward_norm"),
)
ATTENTION = (
  *attention(BLOCK + "self_attn", "mixer", HEADS),
  rule(BLOCK + "self_attn.q_norm.weight", "mixer.query_norm.scale", SAME),
  rule(BLOCK + "self_attn.k_norm.weight", "mixer.key_norm.scale", SAME),
)
LLAMA_PARTS = OUTER + NORMS + ATTENTION

# The layers after the last are those of multi-token prediction, which only training uses.
PREDICTION_LAYERS = r"model\.layers\.{prediction}\..*"


def network(hub: str, ours: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
  """Returns the lines of a gated network.

  Args:
    hub: what the keys begin with, inside the block.
    ours: the place of `gate`, `up` and `down` in the block.
    names: the hub's names of those three.
  """
  return tuple(
    rule(f"{BLOCK}{hub}.{theirs}.weight", f"{ours}.{own}", LINEAR)
    for theirs, own in zip(names, ("gate", "up", "down"), strict=True)
  )


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE = network("mlp", "feed_forward.weights", PROJECTIONS)


def experts(hub: str, names: tuple[str, str, str] = PROJECTIONS) -> tuple[Rule, ...]:
  """Returns the lines of routed experts that the hub keeps one by one."""
  return network(hub + ".{expert}", "feed_forward.experts.weights", names)


def router(hub: str) -> Rule:
  """Returns the line of the router's matrix; `hub` stands inside the block."""
  return rule(BLOCK + hub, "feed_forward.router.kernel", LINEAR)


def head_width(hub: HubConfig) -> int:
  """Returns the width of a head, by default its share of the model's."""
  return hub.get("head_dim", hub.get("hidden_size") // hub.get("num_attention_heads"))


def read_attention(hub: HubConfig, *, theta: float = 10_000.0, **changes) -> AttentionConfig:
  """Returns softmax attention with rotary positions; `changes` are further fields.

  Args:
    hub: the settings.
    theta: base of the frequencies where the file has none.
    **changes: with `rotary_dim`, for families that rotate a part of a head.
  """
  heads, head_dim = hub.get("num_attention_heads"), head_width(hub)
  theta, scaling = hub.rope(theta, partial="rotary_dim" in changes)
  fields = dict(
    num_heads=heads,
    num_kv_heads=hub.get("num_key_value_heads", heads),
    head_dim=head_dim,
    rope_theta=theta,
    rope_scaling=scaling,
  )
  return AttentionConfig(**{**fields, **changes})


def write_attention(c: AttentionConfig) -> dict[str, Any]:
  """Returns the settings that `read_attention` reads."""
  settings = {
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    **write_rope(c.rope_theta, c.rope_scaling),
  }
  if c.rotary_dim is not None:
    settings["partial_rotary_factor"] = c.rotary_dim / c.head_dim
  return settings


def read_model(hub: HubConfig, *, epsilon: float = 1e-6) -> dict[str, Any]:
  """Returns the fields of `ModelConfig` that all families have; epsilon is the norms' default."""
  return dict(
    vocab_size=hub.get("vocab_size"),
    model_dim=hub.get("hidden_size"),
    norm_epsilon=hub.get("rms_norm_eps", epsilon),
    tie_embeddings=bool(hub.get("tie_word_embeddings", False)),
  )


def write_model(config: ModelConfig, hidden_act: str | None = None) -> dict[str, Any]:
  """Returns the settings that `read_model` reads, the number of layers and the nonlinearity.

  Args:
    config: the model's.
    hidden_act: the nonlinearity's name where it is not that of the experts.
  """
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.model_dim,
    "num_hidden_layers": len(config.layers()),
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
    "hidden_act": hidden_act or write_activation(config.moe.activation),
  }


def read_network(hub: HubConfig, width: int) -> dict[str, Any]:
  """Returns the fields of a gated network of a width F, dense or of one expert."""
  return dict(hidden_dim=width, gated=True, activation=hub.activation())


def dense(hub: HubConfig, blocks: list[str], width: int) -> FeedForwardConfig | None:
  """Returns the dense feed-forward of width F, None if no block has one."""
  has_dense = any(block.endswith(":dense") for block in blocks)
  return FeedForwardConfig(**read_network(hub, width)) if has_dense else None


def pooled_balance(hub: HubConfig, blocks: list[str], default: float) -> dict[str, Any]:
  """Returns the routing fields of the hub's balance loss, as close as a loss of one layer comes.

  The hub's loss pools the tokens of all layers
  (`moe_jax.moe.hugging_face_loss.hugging_face_load_balance_loss`); ours is a sum over layers
  (`moe_jax.models.ModelAux.weighted_loss`), so each layer gets its share of the coefficient.

  Args:
    hub: the settings.
    blocks: of the model.
    default: the coefficient where the file has none.
  """
  layers = sum(block.endswith(":moe") for block in blocks)
  return dict(
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=hub.get("router_aux_loss_coef", default) / max(layers, 1),
  )


def write_balance_weight(config: ModelConfig) -> float:
  """Returns the hub's coefficient of the balance loss."""
  return write_share(config.moe.routing.balance_loss_weight, config)


def write_share(weight: float, config: ModelConfig) -> float:
  """Returns the hub's coefficient of a loss that pools a stack's layers, see `pooled_balance`.

  Of an encoder and a decoder, the one with more MoE layers counts; twelve digits undo the division.
  """
  encoder = config.encoder_stack()
  stacks = [config] if encoder is None else [encoder, config]
  most = max(sum(block[1] == "moe" for block in stack.layers()) for stack in stacks)
  return float(f"{weight * most:.12g}")


def renormalized(hub: HubConfig, default: bool) -> Weighting:
  """Returns the weighting that `norm_topk_prob` stands for."""
  return Weighting.RENORMALIZED if hub.get("norm_topk_prob", default) else Weighting.RAW


def write_renormalized(config: ModelConfig) -> dict[str, bool]:
  """Returns `norm_topk_prob`."""
  return {"norm_topk_prob": config.moe.routing.weighting != Weighting.RAW}


def dense_until(hub: HubConfig, mixer: str) -> list[str]:
  """Returns the blocks of models whose first layers are dense, all others with experts."""
  layers, first = hub.get("num_hidden_layers"), hub.get("first_k_dense_replace", 0)
  kinds = ["dense" if layer < first else "moe" for layer in range(layers)]
  return [f"{mixer}:{kind}" for kind in kinds]


def write_dense_until(config: ModelConfig) -> dict[str, Any]:
  """Returns what `dense_until` reads besides the number of layers, and the dense width."""
  moe = config.moe_layers()
  width = config.moe.hidden_dim if config.mlp is None else config.mlp.hidden_dim
  return {"first_k_dense_replace": moe[0], "intermediate_size": width}


def shared_width(hub: HubConfig) -> int:
  """Returns the width of the shared experts together."""
  return hub.get("n_shared_experts", 0) * hub.get("moe_intermediate_size")


def write_shared(config: ModelConfig) -> dict[str, int]:
  """Returns the width of an expert and the number of shared ones."""
  width, shared = config.moe.hidden_dim, config.moe.shared_hidden_dim
  return {"moe_intermediate_size": width, "n_shared_experts": shared // width}


SHARED_EXPERTS = network("mlp.shared_experts", "feed_forward.shared.network.weights", PROJECTIONS)
