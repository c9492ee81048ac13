"""Balanced hash tables: even loads, and routing by them."""

import numpy as np
import pytest
from moe.compiled import routed

from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig
from moe_jax.moe.hashing import balanced_table


def loads_of(counts, table, num_experts):
  return np.bincount(table, weights=counts, minlength=num_experts)


def test_the_most_frequent_ids_are_placed_first_by_hand():
  # 9 | 6 | 5, then 4 beside 5, 2 beside 6, 1 beside 6 + 2: loads 9, 9, 9.
  table = balanced_table(np.array([5, 1, 9, 2, 6, 4], np.uint32), 3)
  assert table[0] == table[5] and table[4] == table[3] == table[1]
  assert len({table[2], table[4], table[0]}) == 3
  np.testing.assert_array_equal(loads_of([5, 1, 9, 2, 6, 4], table, 3), 9)


@pytest.mark.parametrize("num_experts", [1, 4, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_loads_differ_by_at_most_one_id(num_experts, seed):
  # Zipf's law, as words have it.
  counts = np.random.default_rng(seed).permutation(10_000 // np.arange(1, 301))
  table = balanced_table(counts, num_experts, seed)
  assert table.dtype == np.int32 and table.shape == (300,)
  for expert, load in enumerate(loads_of(counts, table, num_experts)):
    # The last id an expert got is its rarest; without it, it was the emptiest.
    rarest = counts[table == expert].min()
    assert load - rarest <= loads_of(counts, table, num_experts).min()


def test_ids_that_never_occur_are_spread_evenly():
  table = balanced_table(np.zeros(40), 4)
  np.testing.assert_array_equal(np.bincount(table), 10)


def test_a_table_is_a_function_of_its_seed():
  counts = np.ones(64, int)
  np.testing.assert_array_equal(balanced_table(counts, 4, 3), balanced_table(counts, 4, 3))
  assert np.any(balanced_table(counts, 4, 3) != balanced_table(counts, 4, 4))


def test_routing_by_the_table_sends_each_id_to_its_expert():
  table = balanced_table(np.array([7, 1, 1, 5, 2, 2]), 3)
  tokens = np.array([[0, 3, 3, 5], [1, 0, 4, 2]])
  config = RoutingConfig(num_experts=3, selection="table", overflow="dropless")
  plan = routed(np.zeros((2, 4, 3), np.float32), config, token_ids=table[tokens])
  np.testing.assert_array_equal(plan.expert, table[tokens])


REFUSED = [
  (dict(counts=np.ones((2, 2))), r"shape \(2, 2\) .* one number a token id"),
  (dict(counts=np.array(["a"])), "dtype <U1"),
  (dict(counts=np.array([1.0, -2.0])), r"counts\[1\] = -2.0 .* 0 or greater"),
  (dict(counts=np.array([1.0, np.nan])), r"counts\[1\] = nan"),
  (dict(num_experts=0), "num_experts = 0 .* at least 1"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_refused_in_one_sentence(given, message):
  with pytest.raises(UserError, match=message) as caught:
    balanced_table(**{"counts": np.ones(3), "num_experts": 2, **given})
  assert "\n" not in str(caught.value)
