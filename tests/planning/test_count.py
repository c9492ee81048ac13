"""Counts equal the real model's sizes, and FLOPs what a hand and XLA's own count say."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_models import DENSE, MOE, random_parameters, tiny_config

from moe_jax.models import Decoder
from moe_jax.planning.count import count_parameters, training_flops_per_token

CONFIGS = {
  "alternating": tiny_config(),
  "dense, tied": tiny_config(segments=DENSE, tie_embeddings=True),
  "moe, plain, top-1": tiny_config(segments=MOE, gated=False, routing=dict(top_k=1)),
  "all experts": tiny_config(segments=MOE + DENSE, routing=dict(top_k=4)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_total_is_the_size_of_the_real_model(config):
  sizes = [a.size for a in jax.tree.leaves(random_parameters(config)[1])]
  assert count_parameters(config).total == sum(sizes)


# D = 8, V = 13; 4 query heads and 2 key-value heads of width 4; F = 12 dense, 6 in experts.
EMBEDDING = 13 * 8
ATTENTION = 8 * (4 * 4) + 2 * 8 * (2 * 4) + (4 * 4) * 8
DENSE_GATED = 3 * 8 * 12
ROUTER = 8 * 4
EXPERT_GATED, EXPERT_PLAIN = 3 * 8 * 6, 2 * 8 * 6
NORM = 8


def test_counts_of_an_alternating_model_by_hand():
  count = count_parameters(CONFIGS["alternating"])
  blocks = 4 * ATTENTION + 2 * DENSE_GATED + 2 * ROUTER
  norms = (4 * 2 + 1) * NORM
  assert count.routed_experts == 2 * 4 * EXPERT_GATED
  assert count.total == 2 * EMBEDDING + blocks + norms + 2 * 4 * EXPERT_GATED
  assert count.active == 2 * EMBEDDING + blocks + norms + 2 * 2 * EXPERT_GATED
  # The embedding is looked up, the head is multiplied.
  assert count.matmul_active == EMBEDDING + blocks + 2 * 2 * EXPERT_GATED


def test_a_tied_embedding_is_one_matrix_and_multiplies():
  count = count_parameters(CONFIGS["dense, tied"])
  assert count.total == count.active == EMBEDDING + 2 * (ATTENTION + DENSE_GATED) + 5 * NORM
  assert count.matmul_active == count.total - 5 * NORM
  assert count.routed_experts == 0


def test_a_token_visits_top_k_experts():
  count = count_parameters(CONFIGS["moe, plain, top-1"])
  assert count.total - count.active == 2 * 3 * EXPERT_PLAIN
  everywhere = count_parameters(CONFIGS["all experts"])
  assert everywhere.total == everywhere.active


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_flops_by_hand(config):
  # Forward: 2 a parameter; scores and values 2 * 16 each for half of 10 tokens. Backward: twice.
  per_layer = 2 * (2 * 16) * (10 / 2)
  forward = 2 * count_parameters(config).matmul_active + len(config.layers()) * per_layer
  assert training_flops_per_token(config, 10) == 3 * forward


def test_forward_flops_agree_with_the_compilers_count():
  # Wide enough for products to outweigh norms and softmax; the whole scan unrolled, because XLA
  # counts the body of a loop once.
  config = dataclasses.replace(
    tiny_config(segments=DENSE, activation="relu", mlp=dict(hidden_dim=256)),
    model_dim=96,
    vocab_size=128,
    scan_unroll=2,
  )
  graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))
  B, L = 2, 16
  tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
  compiled = jax.jit(lambda p, t: nnx.merge(graph, p)(t)).lower(params, tokens).compile()
  attention = 2 * (2 * 16) * L * len(config.layers())
  # XLA computes the masked half of the scores too; the formula has the other half.
  ours = training_flops_per_token(config, L) / 3 + attention / 2
  assert compiled.cost_analysis()["flops"] / (B * L) == pytest.approx(ours, rel=0.05)
