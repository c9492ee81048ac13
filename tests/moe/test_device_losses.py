"""Losses over devices: values by hand, coefficients, the load of a whole step, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from comparison import draw_logits, relative_error
from moe.compiled import routed

from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig, preset, route
from moe_jax.moe.device_losses import communication_loss, device_balance_loss
from moe_jax.moe.losses import load_balance_loss, loss_weights

FIELDS = dict(num_expert_groups=2, top_expert_groups=2, balance_fraction="all_choices_mean")
CONFIG = RoutingConfig(
  num_experts=4, top_k=2, device_loss_weight=0.05, communication_loss_weight=0.02, **FIELDS
)
REAL = jnp.array([[True, True, True, False]])
# Three tokens: two that ask both experts of device 0, one that asks one of each; then padding.
ASKED = jnp.array([[[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]], jnp.float32)
PROBS = jnp.array(
  [[[0.4, 0.3, 0.2, 0.1], [0.4, 0.4, 0.1, 0.1], [0.4, 0.1, 0.1, 0.4], [9.0, 9.0, 9.0, 9.0]]]
)


def test_the_device_loss_by_hand():
  # f of choices / K: 3/6, 2/6, 0, 1/6, so F = 5/6 and 1/6; P = 2.0 / 3 and 1.0 / 3.
  loss = device_balance_loss(PROBS, ASKED, REAL, CONFIG)
  assert float(loss) == pytest.approx(2 * (5 / 6 * 2 / 3 + 1 / 6 * 1 / 3), rel=1e-6)


def test_the_communication_loss_counts_a_device_once_for_each_token():
  # Device 0 is sent 3 tokens of 3, device 1 one; M = 2.
  loss = communication_loss(PROBS, ASKED, REAL, CONFIG)
  assert float(loss) == pytest.approx(2 * (3 / 6 * 2 / 3 + 1 / 6 * 1 / 3), rel=1e-6)


def test_even_routing_gives_one():
  asked = jnp.tile(jnp.array([[[1, 0, 0, 1], [0, 1, 1, 0]]], jnp.float32), (1, 2, 1))
  probs, mask = jnp.full((1, 4, 4), 0.25), jnp.ones((1, 4), bool)
  for loss in (device_balance_loss, communication_loss, load_balance_loss):
    assert float(loss(probs, asked, mask, CONFIG)) == pytest.approx(1.0)


def test_with_one_expert_a_device_the_device_loss_is_that_over_experts():
  fields = dict(FIELDS, num_expert_groups=4, device_loss_weight=0.1)
  config = RoutingConfig(num_experts=4, top_k=2, **fields)
  plan = routed(draw_logits(0, (2, 6, 4)), config)
  assert relative_error(plan.losses["device_balance"], plan.losses["load_balance"]) <= 1e-6
  assert "communication" not in plan.losses


def test_the_load_of_a_whole_step_replaces_both_fractions():
  config = RoutingConfig(
    num_experts=4,
    top_k=2,
    balance_scope="global_batch",
    device_loss_weight=0.05,
    communication_loss_weight=0.02,
    **FIELDS,
  )
  logits = draw_logits(0, (2, 6, 4))
  plan = routed(logits, config)
  load = plan.metrics["balance_load"]
  assert load.shape == (6,)
  assert float(jnp.sum(load[:4])) == pytest.approx(1.0)
  again = routed(logits, config, global_load=load)
  other = routed(logits, config, global_load=2 * load)
  for name in ("load_balance", "device_balance", "communication"):
    assert relative_error(again.losses[name], plan.losses[name]) <= 1e-6
    assert relative_error(other.losses[name], 2 * plan.losses[name]) <= 1e-6
  with pytest.raises(UserError, match=r"global_load has shape \(4,\); expected \(6,\)"):
    route(logits, config, global_load=np.ones(4))


def test_the_preset_of_deepseek_v2_has_the_coefficients_of_its_paper():
  weights = loss_weights(preset("deepseek_v2"))
  names = ("load_balance", "device_balance", "communication")
  assert [weights[name] for name in names] == [0.003, 0.05, 0.02]


@pytest.mark.parametrize("name", ["device_loss_weight", "communication_loss_weight"])
@pytest.mark.parametrize("fields", [{}, {"selection": "expert_choice"}])
def test_without_expert_groups_there_are_no_devices(name, fields):
  with pytest.raises(UserError, match=f"{name} = 0.1 .* num_expert_groups = 1"):
    RoutingConfig(num_experts=4, **{name: 0.1}, **fields)
