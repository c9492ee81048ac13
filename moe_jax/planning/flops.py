"""FLOPs of a token: what the model asks for, and what a dispatch form adds.

A multiply-add is 2 FLOPs. Norms, softmax, activations, rotary positions and the sorting of routing
are left out; nothing is dropped. A token is one of text: see `moe_jax.planning.vision` for images.
"""

import dataclasses
import math

from moe_jax.models import ModelConfig
from moe_jax.models.config import DEPTH
from moe_jax.moe.capacity import expert_capacity
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import Grouping
from moe_jax.planning.count import count_parameters
from moe_jax.planning.sizes import score_width, state_flops


@dataclasses.dataclass(frozen=True)
class DispatchCost:
  """What one MoE layer's dispatch costs beyond the experts' own work, a token and forward pass.

  Attributes:
    slots_per_token: rows that experts compute for a token, empty slots included; K without any.
    flops: of the one-hot products of `einsum`; 0 in the other forms.
    empty_slot_flops: of the experts on slots that no token of a balanced batch fills.
  """

  slots_per_token: float
  flops: float
  empty_slot_flops: float


def forward_flops(config: ModelConfig, sequence_length: int) -> dict[str, float]:
  """Returns the FLOPs a token of one forward pass by component; their sum is the model's.

  A token of an encoder-decoder is one of the encoder and one of the decoder together, whose
  sequences are of one length.

  Two for each active parameter of a matrix; under `attention_scores` the products with keys and
  values: a token looks back on what its mask shows, the mean over a sequence; under `state_scan`
  what Mamba layers do with their states.
  """
  parts = count_parameters(config).components
  flops = {name: 2.0 * float(part.matmul_active) for name, part in parts.items()}
  flops = {name: value for name, value in flops.items() if value}
  flops["attention_scores"] = _score_flops(config, sequence_length)
  if config.mamba is not None:
    layers = sum(block[0] == "mamba" for block in config.layers())
    flops["state_scan"] = layers * state_flops(config.mamba)
  return flops


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Returns the FLOPs a token of one forward pass over sequences of that length."""
  return sum(forward_flops(config, sequence_length).values())


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Returns forward + backward FLOPs a token: the backward pass costs two forward passes.

  Multi-token prediction is left out, see `multi_token_flops_per_token`, and so is what `remat`
  computes again: a price of memory and not the model's.
  """
  return 3.0 * forward_flops_per_token(config, sequence_length)


def multi_token_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Returns what multi-token prediction adds to the FLOPs a token in training, the head included.

  Every depth multiplies the head once more (arXiv 2412.19437 section 2.2); the few places at the
  end of a sequence that it leaves out are counted.
  """
  modules = count_parameters(config).multi_token.matmul_active
  head = config.vocab_size * config.model_dim
  last = config.layers()[-1][:2]
  scores = _block_scores(config, last, sequence_length)
  scores += state_flops(config.mamba) if last[0] == "mamba" else 0.0
  return 3.0 * (2.0 * float(modules + config.mtp_depth * head) + config.mtp_depth * scores)


def mean_visible(length: int, window: int | None = None, chunk: int | None = None) -> float:
  """Returns how many keys a query of a causal sequence sees on average, itself included.

  Args:
    length: tokens of the sequence.
    window: most keys that a query looks back on; None for all.
    chunk: queries see keys of their own chunk of positions alone; None for all.
  """
  if chunk is not None and chunk < length:
    whole, rest = divmod(length, chunk)
    seen = whole * chunk * mean_visible(chunk, window)
    return (seen + (rest * mean_visible(rest, window) if rest else 0.0)) / length
  reach = length if window is None else min(window, length)
  return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def dispatch_cost(
  config: MoEConfig, model_dim: int, batch_size: int, sequence_length: int
) -> DispatchCost:
  """Returns what one MoE layer's dispatch adds, see `DispatchCost`.

  Args:
    config: the layer.
    model_dim: D.
    batch_size: sequences of a call, on which the groups of `grouping = batch` depend.
    sequence_length: L.
  """
  routing = config.routing
  if config.dispatch == Dispatch.RAGGED:
    return DispatchCost(float(routing.top_k), 0.0, 0.0)
  tokens = _group_tokens(routing, batch_size, sequence_length)
  capacity = expert_capacity(routing, tokens, train=True)
  slots = routing.num_experts * capacity
  # Dispatch and combine multiply a (S, E*C) mask with S and E*C rows of width D.
  one_hot = 2 * 2.0 * slots * model_dim if config.dispatch == Dispatch.EINSUM else 0.0
  network = 2.0 * config.feed_forward().num_matrices * model_dim * config.hidden_dim
  empty = max(0.0, slots / tokens - routing.top_k)
  return DispatchCost(slots / tokens, one_hot, empty * network)


def _group_tokens(routing: RoutingConfig, batch_size: int, sequence_length: int) -> int:
  if routing.grouping == Grouping.SEQUENCE:
    return sequence_length
  tokens = batch_size * sequence_length
  return tokens if routing.grouping == Grouping.BATCH else min(tokens, routing.group_size)


def _score_flops(config: ModelConfig, length: int) -> float:
  """Returns the FLOPs a token of all layers' products with keys and values."""
  own = math.fsum(_block_scores(config, block, length) for block in config.layers())
  if config.encoder is None:
    return own
  # An encoder's tokens see all others, and so do the decoder's those of the encoder.
  encoder, across = config.encoder_stack(), config.cross_attention
  pairs = len(encoder.layers()) * encoder.attention.num_heads * score_width(encoder.attention)
  pairs += len(config.layers()) * across.num_heads * score_width(across)
  return own + 2.0 * length * pairs


def _block_scores(config: ModelConfig, block: tuple[str, ...], length: int) -> float:
  if block[0] == "mamba":
    return 0.0
  section = config.mixers()[block[0]]
  share, seen = 1.0, length
  if DEPTH in block:
    # Only the tokens that a block takes look at each other.
    seen = config.depth.slots(length)
    share = seen / length
  visible = mean_visible(seen, getattr(section, "window", None), getattr(section, "chunk", None))
  return 2.0 * share * visible * section.num_heads * score_width(section)
