"""Counts equal the real model's sizes, part by part, and those added up by hand."""

import jax
import pytest
from tiny_models import DENSE, MOE, random_parameters, tiny_config

from moe_jax.planning.count import count_parameters

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
