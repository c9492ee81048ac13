"""A step's batch in microbatches: their shares of it, and sums over them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.models import ModelConfig
from moe_jax.moe import RoutingConfig
from moe_jax.moe.options import LossPadding
from moe_jax.sharding.context import current_layout
from moe_jax.sharding.pipeline import num_stages

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Share:
  """The part of a step's batch that one microbatch is; over microbatches each adds up to 1.

  Attributes:
    tokens: float32, of the real tokens.
    losses: float32, of the tokens that router losses count: the real ones, or all under
      `loss_padding = flaxformer`.
    count: float32, of the microbatches.
    encoder: the same of what an encoder reads, where the others are of what its decoder reads;
      None without one.
  """

  tokens: jax.Array
  losses: jax.Array
  count: jax.Array
  encoder: "Share | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatches:
  """All microbatches of a step, stacked: every array has a leading axis M.

  Attributes:
    batch: the fields of a batch, (M, B / M, L).
    key: (M,) random keys.
    share: `Share` of (M,) arrays.
  """

  batch: Batch
  key: jax.Array
  share: Share


# Which places of a record, or of a pair's decoder, hold a token, and which of its encoder.
_OWN, _SOURCE = "segment_ids", "source_segment_ids"


def real_tokens(batch: Batch) -> jax.Array:
  """Returns the number of real tokens, int32 scalar, an encoder's included."""
  return sum(jnp.sum(batch[name] > 0) for name in (_OWN, _SOURCE) if name in batch)


def real_tokens_by_layer(batch: Batch, model: ModelConfig) -> list[jax.Array]:
  """Returns the number of real tokens that each MoE layer sees, int32 scalars."""
  source = jnp.sum(batch[_SOURCE] > 0) if _SOURCE in batch else None
  return by_layer(model, jnp.sum(batch[_OWN] > 0), source)


def num_places_by_layer(batch: Batch, model: ModelConfig) -> list[int]:
  """Returns the number of places for tokens of each MoE layer."""
  return by_layer(model, batch[_OWN].size, batch[_SOURCE].size if _SOURCE in batch else None)


def by_layer(model: ModelConfig, own: Any, of_encoder: Any) -> list[Any]:
  """Returns one of both for each MoE layer of training, an encoder's first."""
  layers, encoder = len(model.moe_layers(train=True)), model.encoder_stack()
  first = 0 if encoder is None else len(encoder.moe_layers())
  return [of_encoder] * first + [own] * (layers - first)


def cut(batch: Batch, key: jax.Array, count: int, routing: RoutingConfig | None) -> Microbatches:
  """Cuts a batch of B rows into `count` microbatches of consecutive rows."""
  pieces = jax.tree.map(lambda a: a.reshape((count, -1) + a.shape[1:]), batch)
  # The one microbatch of a step without accumulation draws from the step's own key.
  keys = key[None] if count == 1 else jax.random.split(key, count)
  equal = jnp.full((count,), 1.0 / count)
  padded = routing is not None and routing.loss_padding == LossPadding.FLAXFORMER

  def share(name, encoder=None):
    real = jnp.sum(pieces[name] > 0, axis=(1, 2))
    tokens = real / jnp.maximum(jnp.sum(real), 1)
    return Share(tokens, equal if padded else tokens, equal, encoder)

  return Microbatches(pieces, keys, share(_OWN, share(_SOURCE) if _SOURCE in pieces else None))


def sum_over(function: Callable[[Batch, jax.Array, Share], Any], parts: Microbatches) -> Any:
  """Returns the sum of function(batch, key, share) over microbatches, one in memory at a time.

  In a pipeline all of them are in memory, since they fill its stages together; what stands before
  and behind the stages, embeddings and logits, is done for all at once. Gradients of such a sum
  exist, but none can be taken inside the function.
  """
  arguments = parts.batch, parts.key, parts.share
  if num_stages(current_layout()) > 1:
    of_parts = jax.vmap(function)(*arguments)
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), of_parts)
  first = jax.tree.map(lambda a: a[0], arguments)
  if parts.share.count.shape[0] == 1:
    return function(*first)

  def add(total, microbatch):
    return jax.tree.map(jnp.add, total, function(*microbatch)), None

  shapes = jax.eval_shape(function, *first)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return jax.lax.scan(add, zeros, arguments)[0]
