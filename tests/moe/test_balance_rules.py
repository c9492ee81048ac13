"""The rules that move a selection bias and a loss coefficient, by hand and against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401

from moe_jax.errors import UserError
from moe_jax.moe import MoEConfig, RoutingConfig, route
from moe_jax.moe.balance import quantile_bias, update_balance_scale, update_bias
from moe_jax.moe.router import Router, RouterInit


def config(**fields):
  return RoutingConfig(**{"num_experts": 4, "bias_rate": 0.5} | fields)


LOAD = jnp.array([6.0, 2.0, 3.0, 1.0])  # mean 3


@pytest.mark.parametrize(
  "rule, expected", [("sign", [-0.5, 0.5, 0.0, 0.5]), ("magnitude", [-0.5, 1 / 6, 0.0, 1 / 3])]
)
def test_bias_moves_towards_the_mean_load(rule, expected):
  start = jnp.array([1.0, 0.0, -1.0, 0.0])
  bias = update_bias(start, LOAD, config(bias_update=rule))
  np.testing.assert_allclose(bias - start, expected, atol=1e-7)


@pytest.mark.parametrize("rule", ["sign", "magnitude"])
def test_null_experts_are_not_balanced_and_no_load_moves_nothing(rule):
  settings = config(bias_update=rule, num_null_experts=2)
  start = jnp.array([0.0, 0.0, 0.0, 0.0, 7.0, -7.0])
  np.testing.assert_array_equal(update_bias(start, LOAD, settings)[4:], [7.0, -7.0])
  np.testing.assert_array_equal(update_bias(start, jnp.zeros(4), settings), start)


def quantiles_by_loop(scores, bias, top_k):
  """Returns the quantile biases of scores (T, E) in float64."""
  T, E = scores.shape
  margins = np.empty((T, E))
  for t in range(T):
    biased = sorted(scores[t] + bias, reverse=True)
    margins[t] = scores[t] - biased[top_k]
  rank = T * top_k // E
  return np.array([-sorted(margins[:, e], reverse=True)[rank] for e in range(E)])


@pytest.mark.parametrize("tokens, top_k", [(7, 1), (12, 2), (9, 3), (1, 1)])
def test_quantile_bias_equals_a_loop_over_real_tokens(tokens, top_k):
  rng = np.random.default_rng(tokens)
  scores, bias = rng.normal(size=(2, 8, 4)), rng.normal(size=4)
  mask = np.zeros(16, bool)
  mask[rng.permutation(16)[:tokens]] = True
  padded = np.where(mask.reshape(2, 8, 1), scores, 99.0).astype(np.float32)
  ranking = padded + bias.astype(np.float32)
  ours = quantile_bias(
    padded, ranking, mask.reshape(2, 8), jnp.float32(tokens * top_k), config(top_k=top_k)
  )
  expected = quantiles_by_loop(scores.reshape(16, 4)[mask], bias, top_k)
  # Sums of float32 numbers of the order of 1.
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_quantile_bias_balances_skewed_scores_within_a_few_steps():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(1, 240, 4)) + [2.0, 1.0, 0.0, -2.0], jnp.float32)
  settings = config(top_k=2, bias_update="quantile", score="sigmoid", overflow="dropless")
  step = jax.jit(lambda bias: route(logits, settings, bias=bias, train=True).metrics)
  bias = jnp.zeros(4)
  violation = []
  for _ in range(6):
    metrics = step(bias)
    violation.append(float(metrics["max_violation"]))
    bias = metrics["bias_target"]
  assert violation[0] > 0.5
  assert violation[-1] < 0.05


def test_quantile_bias_is_collected_in_training_alone_and_of_real_experts():
  settings = config(top_k=2, bias_update="quantile", num_null_experts=3)
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 7)), jnp.float32)

  def collected(train):
    return jax.eval_shape(
      lambda logits: route(logits, settings, bias=jnp.zeros(7), train=train).metrics, logits
    )

  assert collected(train=True)["bias_target"].shape == (4,)
  assert "bias_target" not in collected(train=False)


@pytest.mark.parametrize("real", [3, 4])
def test_quantile_bias_is_finite_where_every_token_asks_every_real_expert(real):
  settings = config(num_experts=2, num_null_experts=2, top_k=3, bias_update="quantile")
  logits = jnp.broadcast_to(jnp.float32([3.0, 2.0, 1.0, 0.0]), (1, 4, 4))
  plan = route(logits, settings, token_mask=jnp.arange(4)[None] < real, train=True)
  score = np.exp([3.0, 2.0, 1.0, 0.0]) / np.exp([3.0, 2.0, 1.0, 0.0]).sum()
  # All margins of an expert are alike: its score less the fourth.
  np.testing.assert_allclose(plan.metrics["bias_target"], score[3] - score[:2], rtol=1e-5)


@pytest.mark.parametrize(
  "fraction, source, padding",
  [
    ("first_choice", "selection", "exclude"),
    ("all_choices_mean", "dispatch", "exclude"),
    ("all_choices", "selection", "flaxformer"),
  ],
)
def test_collected_load_is_the_fraction_that_the_loss_uses(fraction, source, padding):
  settings = config(
    top_k=2,
    capacity_factor=0.5,
    balance_scope="global_batch",
    balance_fraction=fraction,
    balance_source=source,
    loss_padding=padding,
  )
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 4)), jnp.float32)
  mask = jnp.asarray(np.arange(6) < np.array([[6], [2]]))

  @jax.jit
  def plan(load):
    return route(logits, settings, token_mask=mask, global_load=load, train=True)

  own = plan(None)
  given = plan(own.metrics["balance_load"])
  np.testing.assert_allclose(given.losses["load_balance"], own.losses["load_balance"], rtol=1e-6)
  doubled = plan(2 * own.metrics["balance_load"])
  np.testing.assert_allclose(
    doubled.losses["load_balance"], 2 * own.losses["load_balance"], rtol=1e-6
  )


@pytest.mark.parametrize("fields", [dict(num_expert_groups=2), dict(top_k=4)])
def test_quantile_bias_is_refused_where_it_has_no_meaning(fields):
  with pytest.raises(UserError, match="bias_update = quantile is refused: it must be sign or"):
    config(bias_update="quantile", **fields)


def test_coefficient_follows_the_target():
  settings = config(adaptive_target=2.0, adaptive_factor=1.5)
  scales = [update_balance_scale(jnp.float32(2.0), jnp.float32(x), settings) for x in (3, 2, 1)]
  np.testing.assert_allclose(scales, [3.0, 2.0, 2.0 / 1.5], rtol=1e-6)


@pytest.mark.parametrize("measured", [0.0, 9.0])
def test_coefficient_returns_from_both_ends(measured):
  settings = config(adaptive_target=2.0, adaptive_factor=10.0)
  scale = jnp.float32(1.0)
  for _ in range(60):
    scale = update_balance_scale(scale, jnp.float32(measured), settings)
  assert 0 < scale < np.inf
  back = update_balance_scale(scale, jnp.float32(4.0 - measured), settings)
  assert (back > scale) == (measured == 0.0) and back != scale


def test_orthogonal_router_columns_are_orthogonal_and_as_long_as_normal_ones():
  router = Router(
    32,
    config(num_experts=8),
    key=jax.random.key(0),
    scale=0.25,
    init=RouterInit.ORTHOGONAL,
  )
  kernel = router.kernel[...]
  # A QR factorisation in float32 of 8 columns.
  np.testing.assert_allclose(kernel.T @ kernel, 0.25 * np.eye(8), atol=1e-6)


def test_more_logits_than_dimensions_cannot_be_orthogonal():
  moe = MoEConfig(config(num_experts=9), 4, router_init="orthogonal")
  with pytest.raises(UserError, match="model_dim of at least 9, .*model_dim = 8"):
    moe.check_width(8)
  moe.check_width(9)
