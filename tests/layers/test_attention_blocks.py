"""Attention in blocks of queries is attention: outputs and all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.layers.attend import attend
from moe_jax.layers.attention_config import AttentionConfig, LatentAttentionConfig

B, L, H, N, K = 2, 10, 4, 2, 8


def arrays():
  keys = jax.random.split(jax.random.key(0), 5)
  mask = jnp.tril(jnp.ones((L, L), bool))[None] & (jnp.arange(L) != 3)[None, None]
  mask |= jnp.eye(L, dtype=bool)[None]
  return dict(
    q_BLHK=jax.random.normal(keys[0], (B, L, H, K)),
    k_BMNK=jax.random.normal(keys[1], (B, L, N, K)),
    v_BMNK=jax.random.normal(keys[2], (B, L, N, K)),
    bias_HBLM=jax.random.normal(keys[3], (H, B, L, L)),
    sinks_H=jax.random.normal(keys[4], (H,)),
  ), jnp.broadcast_to(mask, (B, L, L))


# 5 divides the length, 4 leaves a rest, 10 and 16 are one block.
@pytest.mark.parametrize("block", [1, 4, 5, 10, 16])
@pytest.mark.parametrize("options", [(), ("bias_HBLM", "sinks_H")])
def test_blocks_change_neither_output_nor_gradients(block, options):
  given, mask = arrays()
  given = {k: v for k, v in given.items() if k in ("q_BLHK", "k_BMNK", "v_BMNK", *options)}
  weight = jnp.arange(B * L * H * K, dtype=jnp.float32).reshape(B, L, H, K) / 100

  def loss(given, block):
    return jnp.sum(weight * attend(**given, mask_BLM=mask, block=block))

  expected = jax.value_and_grad(loss)(given, None)
  actual = jax.value_and_grad(loss)(given, block)
  # Only the order of sums over blocks differs.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected
  )


def test_blocks_hold_no_more_products_than_their_own():
  given, mask = arrays()

  def loss(q, k, v, block):
    return jnp.sum(attend(q, k, v, jnp.broadcast_to(mask[:1, :1, :1], (1, 512, 512)), block=block))

  q = jnp.zeros((1, 512, 8, 4))
  temp = {
    block: jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    .lower(q, q, q, block)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for block in (None, 32)
  }
  # One array of all products is 8 MiB; blocks of a sixteenth leave room for what else there is.
  assert temp[None] > 2**23
  assert temp[32] < temp[None] / 4


@pytest.mark.parametrize("config", [AttentionConfig(2, 2, 4), LatentAttentionConfig(2, 4, 4, 4, 4)])
def test_block_without_queries_is_refused(config):
  with pytest.raises(UserError, match="query_block = 0 is refused: it must be at least 1"):
    dataclasses.replace(config, query_block=0)
