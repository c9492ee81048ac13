"""`route` equals the loops of the oracle for the whole product of the options that interact."""

import time

import jax
import pytest
from memory_maps import bound_memory_maps
from moe.compiled import compiled_route
from moe.oracle_view import assert_plan_matches
from moe.router_cases import FACTORS, cases_of, grouped_case, masks, product_configs, trains

KEY = jax.random.key(3)


def failures_of(config):
  """Yields one line for every kind of input whose plan is not the oracle's."""
  train = trains(config)
  # Compiled once for all kinds of input, and not kept: there are thousands of configs.
  compiled_route.cache_clear()
  for kind, mask in cases_of(config):
    try:
      arrays = grouped_case(config, kind, masks()[mask], KEY, train=train)
      logits, grouped_mask, more, expected = arrays
      plan = compiled_route(config, train)(logits, grouped_mask, KEY, more)
      assert_plan_matches(plan, expected)
    except AssertionError as error:
      yield f"{kind} logits, mask {mask}, {config}: {error}"


def test_route_equals_the_oracle_for_the_last_of_the_product():
  # The product below is run rarely, and must not rot meanwhile.
  *_, config = product_configs("hierarchical", "raw")
  assert not list(failures_of(config))


@pytest.mark.full
@pytest.mark.parametrize("weighting", FACTORS["weighting"])
@pytest.mark.parametrize("selection", FACTORS["selection"])
def test_route_equals_the_oracle_in_the_whole_product(selection, weighting, record_property):
  start, configs = time.process_time(), list(product_configs(selection, weighting))
  failures = []
  for config in configs:
    failures += failures_of(config)
    bound_memory_maps()
  record_property("configs", len(configs))
  record_property("inputs", sum(len(cases_of(config)) for config in configs))
  record_property("cpu_seconds", round(time.process_time() - start, 1))
  assert not failures, f"{len(failures)} failed: " + "; ".join(failures[:20])
