"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 section 2.2): training looks further ahead.

Depth k predicts the token after the next k. It takes the hidden states of depth k - 1 and the
embeddings of the tokens k places on, so every depth keeps the causal chain. Embedding and head are
the model's own.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.norms import make_norm
from moe_jax.layers.parameters import parameter
from moe_jax.models.config import ModelConfig, Segment
from moe_jax.models.mixers import Context
from moe_jax.models.stack import Record, ScannedSegment
from moe_jax.moe.layer import RouterInputs, TokenInfo


class MultiTokenModule(nnx.Module):
  """One depth: h = block(W [norm(h); norm(embedding)]) (Eqs. 21 and 22); its block is the last's.

  The hidden states of the model itself enter as its last block left them, before the final norm.

  Attributes:
    hidden_norm, embedding_norm: of what comes in.
    projection: (2 D, D), the hidden state's rows first.
    segment: the block, as a segment of its own.
    final_norm: before the head; the paper leaves it out, the released weights have one a depth.
  """

  def __init__(self, config: ModelConfig, *, key: jax.Array):
    projection_key, block_key = jax.random.split(key)
    D = config.model_dim
    self.hidden_norm = make_norm(config.norm, D, config.norm_epsilon)
    self.embedding_norm = make_norm(config.norm, D, config.norm_epsilon)
    self.projection = parameter(
      projection_key, (2 * D, D), ("joined", "embed"), fan_in=2 * D, scale=config.init_scale
    )
    kind = config.layers()[-1][:2]
    self.segment = ScannedSegment(config, Segment((kind,), 1), key=block_key)
    self.final_norm = make_norm(config.norm, D, config.norm_epsilon)

  def __call__(
    self,
    hidden: jax.Array,
    embedded: jax.Array,
    contexts: dict[str, Context],
    tokens: TokenInfo,
    *,
    inputs: RouterInputs,
    key: jax.Array | None,
  ) -> tuple[jax.Array, list[Record]]:
    """Maps hidden states and embeddings (B, L, D) to hidden states, and the experts' record."""
    joined = jnp.concatenate([self.hidden_norm(hidden), self.embedding_norm(embedded)], axis=-1)
    x = jnp.matmul(joined, self.projection[...].astype(joined.dtype))
    x, _, records = self.segment(x, contexts, tokens, None, inputs=inputs, key=key, train=True)
    return x, records


def look_ahead(tokens: TokenInfo, depth: int) -> tuple[jax.Array, TokenInfo]:
  """Returns the ids (B, L) of the tokens `depth` places on, and which tokens have such a one.

  Those at the end of a row or document have none: they are masked, so that they take no place in an
  expert. No other token sees them, since what follows them has none either.
  """
  length = tokens.ids.shape[1]

  def ahead(a, fill):
    return jnp.pad(a, ((0, 0), (0, depth)), constant_values=fill)[:, depth : depth + length]

  mask = tokens.mask & ahead(tokens.mask, False)
  if tokens.segment_ids is not None:
    mask &= tokens.segment_ids == ahead(tokens.segment_ids, -1)
  return ahead(tokens.ids, 0), TokenInfo(mask, tokens.ids, tokens.segment_ids)
