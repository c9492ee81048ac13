"""Weights' gradients by the logits equal the oracle's closed forms, for every weighting and score.

The closed forms themselves are held to finite differences in tests/oracles/test_moe_oracle.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from moe.compiled import FAST_COMPILE
from moe.oracle_draws import draws_of
from moe.oracle_view import TOLERANCE, options_of
from moe.router_cases import L, grouped_case, masks, trains
from oracles import routing

from moe_jax.moe import RoutingConfig, route

E, K = 6, 4
KEY = jax.random.key(3)
WEIGHTINGS = (
  "raw",
  "renormalized",
  "renormalized_after_drop",
  "softmax_selected",
  "hard",
  "straight_through",
)
SCORES = ("softmax", "sigmoid", "sqrt_softplus", "relu")
KINDS = {
  "plain": {},
  "norm_of_order_2": {"weight_norm_order": 2.0, "weight_scale": 2.5, "drop_order": "token_major"},
  "norm_of_order_half": {"weight_norm_order": 0.5, "selection": "positive", "score": "relu"},
  "rerouted": {"overflow": "reroute", "reroute_attempts": 2, "bias_update": "sign"},
  "identity": {"num_null_experts": 2, "null_expert": "identity", "score": "sigmoid"},
  "segment": {"granularity": "segment", "score": "sigmoid"},
  "expert_groups": {"num_expert_groups": 3, "top_expert_groups": 2, "group_score": "top2_sum"},
  "hierarchical": {"selection": "hierarchical", "num_expert_groups": 3, "top_expert_groups": 2},
  "noise": {"noise": "learned", "score": "sqrt_softplus"},
}


def config_of(**fields):
  return RoutingConfig(
    **{"num_experts": E, "top_k": K, "capacity": 4, "grouping": "sequence", **fields}
  )


def draws(config):
  return config.noise != "none" and trains(config)


@functools.cache
def compiled_gradients(config):
  """Returns the gradients of weights times a cotangent by logits and noise scale."""

  def total(logits, noise_scale, mask, cotangent, more):
    if config.noise == "learned":
      more = more | {"noise_scale": noise_scale}
    plan = route(logits, config, token_mask=mask, key=KEY, train=draws(config), **more)
    at_GN = jnp.arange(len(logits))[:, None]
    value = jnp.sum(plan.weight * cotangent[at_GN, plan.token, plan.expert])
    if plan.identity is not None:
      value += jnp.sum(plan.identity * cotangent[..., E])
    return value

  return jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=FAST_COMPILE)


def expected_gradients(config, logits, noise_scale, mask, cotangent, more):
  """Returns the oracle's gradients by logits and by the noise's scale."""
  train = draws(config)
  drawn = draws_of(config, KEY, logits.shape, train=train, noise_scale=noise_scale)
  groups = routing.route(
    logits,
    token_mask=mask,
    segment_ids=more["segment_ids"],
    bias=more.get("bias"),
    noise=drawn.noise,
    **options_of(config, logits.shape[1], train=train),
  )
  pairs = [routing.router_backward(*pair) for pair in zip(groups, cotangent, strict=True)]
  by_logits, by_noise = (np.stack(parts) for parts in zip(*pairs, strict=True))
  return by_logits, by_noise * (drawn.noise / drawn.std if train else 0.0)


def assert_gradients_equal_the_oracle(config):
  cotangent = np.random.default_rng(5).normal(size=(2, L, E + 2)).astype(np.float32)
  # The null experts of a token share one weight, that of the token itself.
  cotangent[..., E + 1] = cotangent[..., E]
  for name in ("none", "left"):
    logits, mask, more, _ = grouped_case(config, "plain", masks()[name], KEY, train=draws(config))
    noise_scale = more.pop("noise_scale", np.ones_like(logits))
    actual = compiled_gradients(config)(logits, noise_scale, mask, cotangent, more)
    expected = expected_gradients(config, logits, noise_scale, mask, cotangent, more)
    for own, right in zip(actual, expected, strict=True):
      assert relative_error(own, right) <= TOLERANCE
      assert not np.any(np.asarray(own)[~mask])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("score", SCORES)
def test_gradients_equal_the_oracle_for_every_score(score, weighting):
  assert_gradients_equal_the_oracle(config_of(score=score, weighting=weighting))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_oracle_in_every_kind_of_routing(kind, weighting):
  assert_gradients_equal_the_oracle(config_of(weighting=weighting, **KINDS[kind]))
