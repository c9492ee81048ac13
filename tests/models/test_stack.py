"""The same layers give the same numbers, however they are scanned, cut or recomputed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from tiny_models import forward, random_parameters, random_tokens, run, tiny_config

from moe_jax.models import Decoder

# The same float32 operations, fused otherwise.
TOLERANCE = 1e-6

BLOCKS = "attention:dense attention:moe"
CONFIG = tiny_config(segments=((BLOCKS, 4),))
TOKENS = random_tokens(CONFIG, 2, 5)


@pytest.mark.parametrize("unroll", [3, 9])
def test_unrolled_scan_gives_the_same_logits(unroll):
  unrolled = run(dataclasses.replace(CONFIG, scan_unroll=unroll), TOKENS)
  assert relative_error(unrolled, run(CONFIG, TOKENS)) <= TOLERANCE


def cut_parameters(config, sizes):
  """Returns graph and parameters of a model whose one segment is cut into several."""
  tree = nnx.to_pure_dict(random_parameters(config)[1])
  (stacked,) = tree["segments"].values()
  ends = np.cumsum(sizes)
  tree["segments"] = {
    i: jax.tree.map(lambda a, i=i: a[ends[i] - sizes[i] : ends[i]], stacked)
    for i in range(len(sizes))
  }
  cut = dataclasses.replace(config, segments=tuple((BLOCKS, size) for size in sizes))
  graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(cut, key=jax.random.key(0))))
  nnx.replace_by_pure_dict(params, tree)
  return graph, params


def test_one_scan_equals_the_same_layers_in_several_segments():
  cut = forward(*cut_parameters(CONFIG, (3, 1)), jnp.asarray(TOKENS))
  assert relative_error(cut, run(CONFIG, TOKENS)) <= TOLERANCE


LOSS_WEIGHTS = dict(balance_loss_weight=0.5, z_loss_weight=0.25)


def value_and_gradient(remat):
  """Returns logits and router losses, and the gradients of a scalar of both."""
  graph, params = random_parameters(tiny_config(routing=LOSS_WEIGHTS, remat=remat))

  def objective(params):
    logits, aux = nnx.merge(graph, params)(jnp.asarray(TOKENS), return_aux=True)
    losses = aux.weighted_loss, [plan.losses for plan in aux.plans]
    return jnp.mean(jnp.sin(logits)) + losses[0], (logits, losses)

  (_, values), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
  return values, gradient


@pytest.fixture(scope="module")
def stored():
  return value_and_gradient("none")


def test_weighted_loss_sums_over_the_layers(stored):
  (_, (weighted, losses)), _ = stored
  assert len(losses) == 2
  expected = sum(0.5 * own["load_balance"] + 0.25 * own["router_z"] for own in losses)
  np.testing.assert_allclose(weighted, expected, rtol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_neither_values_nor_gradients(remat, stored):
  recomputed = value_and_gradient(remat)
  for ours, theirs in zip(jax.tree.leaves(recomputed), jax.tree.leaves(stored), strict=True):
    # A backward pass adds the same terms in another order.
    assert relative_error(ours, theirs) <= 1e-5


def test_records_come_one_a_moe_layer_in_the_order_of_the_layers():
  config = tiny_config(
    segments=(("attention:moe attention:dense attention:moe", 2), ("attention:moe", 1))
  )
  assert config.moe_layers() == [0, 2, 3, 5, 6]
  _, aux = run(config, TOKENS, return_aux=True)
  assert len(aux.plans) == len(aux.router_logits) == 5
  # A layer's router changes its own record first.
  for changed, (block, repeat) in {0: (0, 0), 1: (2, 0), 2: (0, 1), 3: (2, 1)}.items():
    after = run_with_scaled_router(config, block, repeat)
    same = [
      relative_error(a, b) <= TOLERANCE
      for a, b in zip(after.router_logits, aux.router_logits, strict=True)
    ]
    assert same[:changed] == [True] * changed and not same[changed]


def run_with_scaled_router(config, block, repeat):
  """Returns the aux record after the router of one layer of the first segment is doubled."""
  graph, params = random_parameters(config)
  kernel = params["segments"][0]["blocks"][block]["feed_forward"]["router"]["kernel"]
  scaled = jax.tree.map(lambda a: a, params)
  scaled["segments"][0]["blocks"][block]["feed_forward"]["router"]["kernel"] = kernel.replace(
    kernel.get_value().at[repeat].multiply(2.0)
  )
  return forward(graph, scaled, jnp.asarray(TOKENS), return_aux=True)[1]


def test_a_dense_model_has_an_empty_record():
  _, aux = run(tiny_config(segments=(("attention:dense", 1),)), TOKENS, return_aux=True)
  assert (aux.router_logits, aux.plans, aux.losses, aux.metrics) == ([], [], {}, {})
