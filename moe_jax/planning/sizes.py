"""Parameters of each kind of layer, in closed form.

Every function returns `Size(matrices, rest)`: what multiplies activations, one multiply-add a
parameter and token, and what costs next to nothing (biases, norm scales, attention sinks, tables
of relative positions).
"""

from typing import NamedTuple

from moe_jax.layers.attention_config import AttentionConfig, LatentAttentionConfig
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models.config import ModelConfig
from moe_jax.moe.layer import MoEConfig, SharedCombine
from moe_jax.moe.options import BiasUpdate, Noise, Projection

# Outputs of the gate that joins shared and routed experts.
_SHARED_GATES = {SharedCombine.ADD: 0, SharedCombine.GATED: 1, SharedCombine.COEFFICIENT: 2}


class Size(NamedTuple):
  """Parameters of a layer: those of matrices, and the rest."""

  matrices: int
  rest: int = 0


def norm_size(config: ModelConfig, width: int) -> Size:
  """Returns the size of one norm over `width`."""
  return Size(0, width * (2 if config.norm == "layernorm" else 1))


def mixer_size(config: ModelConfig, mixer: str) -> Size:
  """Returns the size of the mixer of that name, its own norms included."""
  section = config.mixers()[mixer]
  if isinstance(section, LatentAttentionConfig):
    return _latent_attention_size(config.model_dim, section)
  if isinstance(section, MambaConfig):
    return _mamba_size(config.model_dim, section)
  return attention_size(config.model_dim, section)


def attention_size(D: int, c: AttentionConfig) -> Size:
  """Returns the size of one attention layer, without a bias that it shares with others."""
  queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  rest = {"head": 2 * c.head_dim, "projection": queries + keys}.get(c.qk_norm, 0)
  rest += queries + 2 * keys if c.qkv_bias else 0
  rest += D if c.out_bias else 0
  rest += c.num_heads if c.sinks else 0
  rest += 0 if c.relative_bias_shared else relative_bias_size(c)
  return Size(2 * D * queries + 2 * D * keys, rest)


def relative_bias_size(c: AttentionConfig) -> int:
  """Returns the numbers of one table of relative biases, 0 without."""
  return c.num_heads * (c.relative_bias_buckets or 0)


def _latent_attention_size(D: int, c: LatentAttentionConfig) -> Size:
  """Multi-head latent attention (arXiv 2405.04434 section 2.1.2).

  Each matrix multiplies every token once where keys and values are expanded, as in training.
  """
  queries = c.num_heads * (c.nope_dim + c.rope_dim)
  if c.query_rank is None:
    matrices, rest = D * queries, c.kv_rank
  else:
    matrices, rest = (D + queries) * c.query_rank, c.query_rank + c.kv_rank
  matrices += D * (c.kv_rank + c.rope_dim)
  matrices += c.kv_rank * c.num_heads * (c.nope_dim + c.value_dim)
  return Size(matrices + c.num_heads * c.value_dim * D, rest)


def _mamba_size(D: int, c: MambaConfig) -> Size:
  """Mamba with Jamba's norms; a weight of the convolution multiplies every token once."""
  selected = c.step_rank + 2 * c.state_dim
  matrices = c.inner_dim * (3 * D + selected + c.step_rank + c.conv_width)
  # Decay, skip and the bias of the steps; the three norms have the width of what is selected.
  rest = c.inner_dim * (c.state_dim + 2) + selected
  rest += c.inner_dim if c.conv_bias else 0
  rest += 2 * c.inner_dim + D if c.proj_bias else 0
  return Size(matrices, rest)


def state_flops(c: MambaConfig) -> float:
  """Returns the FLOPs a token of a selective scan: 6 for each of the I N numbers of its state.

  Step times decay, what the state keeps plus what is written (and the product that makes it), and
  the product with what is read.
  """
  return 6.0 * c.inner_dim * c.state_dim


def state_bytes(c: MambaConfig, itemsize: int) -> int:
  """Returns the bytes that decoding keeps of a sequence in one layer, whatever its length.

  Args:
    c: the mixer.
    itemsize: bytes of an activation, of which the convolution's window is; the state is float32.
  """
  return c.inner_dim * ((c.conv_width - 1) * itemsize + 4 * c.state_dim)


def score_width(section: AttentionConfig | LatentAttentionConfig) -> int:
  """Returns the width, of one head, of the products with keys and with values together."""
  if isinstance(section, LatentAttentionConfig):
    return section.nope_dim + section.rope_dim + section.value_dim
  return 2 * section.head_dim


def cache_width(section: AttentionConfig | LatentAttentionConfig) -> int:
  """Returns the numbers that decoding keeps of one token in one layer.

  Keys and values; in latent attention the compressed latent and the shared rotary key (arXiv
  2405.04434 section 2.1.4: d_c + d_h^R).
  """
  if isinstance(section, LatentAttentionConfig):
    return section.kv_rank + section.rope_dim
  return 2 * section.num_kv_heads * section.head_dim


def feed_forward_size(D: int, c: FeedForwardConfig) -> Size:
  """Returns the size of one feed-forward network."""
  biases = (c.num_matrices - 1) * c.hidden_dim + D if c.bias else 0
  return Size(c.num_matrices * D * c.hidden_dim, biases)


def router_size(D: int, c: MoEConfig) -> Size:
  """Returns the size of one router, learned noise included."""
  maps = 2 if c.routing.noise == Noise.LEARNED else 1
  logits = c.routing.num_logits
  rest = {Projection.AFFINE: logits, Projection.NORMALIZED: 1}.get(c.routing.projection, 0)
  return Size(maps * D * logits, rest)


def router_state_size(vocab_size: int, c: MoEConfig) -> int:
  """Returns the numbers of one router that no gradient reaches, selection biases included."""
  biases = c.routing.num_logits if c.routing.bias_update != BiasUpdate.NONE else 0
  table = vocab_size if c.routing.selection == "table" else 0
  return biases + table + (c.routing.adaptive_target is not None)


def shared_experts_size(D: int, c: MoEConfig) -> Size:
  """Returns the size of one layer's shared experts and of the gate that joins them."""
  if not c.shared_hidden_dim:
    return Size(0)
  network = feed_forward_size(D, c.shared_feed_forward())
  return Size(network.matrices + D * _SHARED_GATES[c.shared_combine], network.rest)
