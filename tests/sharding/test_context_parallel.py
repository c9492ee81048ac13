"""Models whose sequences are split over devices against the same models on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sharding.layer_on_a_mesh import FAST_COMPILE, assert_close
from tiny_models import random_parameters, random_tokens, tiny_config

from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig, LatentAttentionConfig
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.context import use_layout
from moe_jax.sharding.layout import make_layout

B, L, V = 4, 16, 16
MESH = {"layout": "tp", "data": 2, "sequence": 2, "tensor": 2}
_MAMBA = MambaConfig(inner_dim=12, step_rank=2, state_dim=4, scan_chunk=4)
_ROUTED = dict(routing=dict(grouping="fixed", group_size=8))
MODELS = {
  "windows_and_sinks": tiny_config(
    vocab_size=V,
    segments=(("global_attention:dense attention:dense", 1),),
    attention=AttentionConfig(4, 2, 4, window=5, sinks=True),
    global_attention=AttentionConfig(4, 2, 4, sinks=True),
  ),
  "latent_attention": tiny_config(
    vocab_size=V,
    segments=(("latent_attention:moe", 1),),
    attention=None,
    latent_attention=LatentAttentionConfig(4, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=6),
    **_ROUTED,
  ),
  "relative_bias": tiny_config(
    vocab_size=V,
    segments=(("attention:dense", 2),),
    attention=AttentionConfig(
      4, 4, 4, positions="none", relative_bias_buckets=8, relative_bias_shared=True
    ),
  ),
  "mamba": tiny_config(
    vocab_size=V, segments=(("mamba:moe", 1),), attention=None, mamba=_MAMBA, **_ROUTED
  ),
}


def _layout(**changes):
  return make_layout(ShardingConfig(**MESH | changes), jax.devices())


def _run(config, layout):
  """Returns the logits of packed rows with padding, and every gradient of a sum of them."""
  graph, params = random_parameters(config)
  places = np.broadcast_to(np.arange(L), (B, L))
  mask = jnp.asarray(places < np.array([L, L - 1, L - 6, L])[:, None])
  segments = jnp.asarray(np.where(places < 7, 1, 2))

  def objective(params, tokens):
    with use_layout(layout):
      logits = nnx.merge(graph, params)(tokens, token_mask=mask, segment_ids=segments)
    # What a query of padding sees is used by nobody.
    logits = jnp.where(mask[..., None], logits, 0)
    weights = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
    return jnp.sum(logits * weights), logits

  tokens = random_tokens(config, B, L)
  if layout is not None:
    params = jax.device_put(params, layout.of_tree(params))
    tokens = jax.device_put(tokens, layout.sharding(("batch", "length"), tokens.shape))
  step = jax.jit(jax.grad(objective, has_aux=True), compiler_options=FAST_COMPILE)
  return jax.device_get(step(params, tokens))


@pytest.mark.parametrize(
  ("model", "context"),
  [
    ("windows_and_sinks", "all_gather"),
    ("windows_and_sinks", "ring"),
    ("latent_attention", "ring"),
    ("relative_bias", "ring"),
    ("mamba", "all_gather"),
  ],
)
def test_split_sequences_give_the_logits_and_gradients_of_one_device(model, context):
  assert_close(_run(MODELS[model], _layout(context=context)), _run(MODELS[model], None))


def test_channels_that_a_scan_cannot_share_are_refused():
  config = tiny_config(
    vocab_size=V,
    segments=(("mamba:dense", 1),),
    attention=None,
    mamba=MambaConfig(inner_dim=10, step_rank=2, state_dim=4),
  )
  with pytest.raises(UserError, match="channels of the selective scan has size 10, which .* = 4"):
    _run(config, _layout())
