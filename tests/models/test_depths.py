"""Mixture-of-Depths: blocks that only some tokens take, against a loop over sequences."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from oracles import decoder, depth, finite_differences, language_model
from tiny_models import (
  forward,
  oracle_weights,
  random_parameters,
  random_tokens,
  run,
  tiny_config,
)

from moe_jax.errors import UserError
from moe_jax.layers.attention import Attention
from moe_jax.layers.attention_context import Places
from moe_jax.models import DepthConfig
from moe_jax.models.depths import DepthBlock
from moe_jax.moe.layer import RouterInputs, TokenInfo
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token

# Float32 sums of tens of terms through 3 blocks against float64.
TOLERANCE = 1e-5
# Decisions closer than this could differ between float32 and float64.
MARGIN = 1e-4
SEGMENTS = (("attention:dense attention:moe:depth", 1), ("attention:dense:depth", 1))
L = 7


def depth_config(segments=SEGMENTS, **fields):
  return tiny_config(segments=segments, depth=DepthConfig(**{"capacity": 0.5, **fields}))


CONFIG = depth_config()
# No id twice in a row: a token like the one before it would tie with it.
TOKENS = np.stack([np.random.default_rng(s).permutation(13)[:L] for s in (0, 1)]).astype(np.int32)
ALL = np.ones((2, L), bool)
MASKS = {
  "none": ALL,
  "padding": np.array([[0, 1, 1, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0, 1]], bool),
  "row": np.array([[1] * L, [0] * L], bool),
}


def weights_of(config):
  """Returns the oracle's weights, `depth_router` among those of depth blocks."""
  state = nnx.to_pure_dict(random_parameters(config)[1])
  routers = []
  for segment, parsed in zip(state["segments"].values(), config.parsed_segments(), strict=True):
    for index in range(len(parsed.pattern)):
      block = segment["blocks"][index]
      # Segments are not repeated here, so blocks come in the order of the layers.
      routers.append(block["router"][0] if "block" in block else None)
      segment["blocks"][index] = block.get("block", block)
  plain = dataclasses.replace(
    config,
    depth=None,
    segments=tuple((pattern.replace(":depth", ""), n) for pattern, n in config.segments),
  )
  copy = jax.tree.map(lambda a: a, random_parameters(plain)[1])
  nnx.replace_by_pure_dict(copy, state)
  weights = oracle_weights(plain, copy)
  for block, router in zip(weights["blocks"], routers, strict=True):
    if router is not None:
      block["depth_router"] = np.float64(router)
  return weights


def oracle_row(config, weights, tokens, *, mask, positions, segment_ids, train):
  """Returns logits (L, V), and each depth block's router logits (L,), of one row."""
  route = dict(top_k=2, capacity=L, weighting="renormalized")
  options = dict(
    activation="silu", route=route, base=config.attention.rope_theta, epsilon=config.norm_epsilon
  )
  options |= dict(token_mask=mask, positions=positions, segment_ids=segment_ids)
  x_LD, seen = weights["embedding"][tokens], []
  for block in weights["blocks"]:
    if "depth_router" not in block:
      x_LD = decoder.block(x_LD, block, **options)
      continue
    seen.append(x_LD @ block["depth_router"])
    slots = math.ceil(config.depth.capacity * L)
    choice = dict(capacity=slots, score=str(config.depth.score), train=train)
    x_LD = depth.block(x_LD, block, **choice, **options)
  normed = language_model.rms_norm(x_LD, weights["final_norm"], epsilon=config.norm_epsilon)
  return normed @ weights["head"], seen


def assert_margins(router_logits, mask):
  gaps = [np.diff(np.sort(logits_L[mask])) for logits_L in router_logits]
  gaps += [np.abs(logits_L[mask]) for logits_L in router_logits]
  assert min(np.min(gap, initial=1.0) for gap in gaps) > MARGIN


@pytest.mark.parametrize("train, score", [(True, "linear"), (False, "sigmoid")])
def test_logits_and_losses_equal_a_loop_over_the_tokens(train, score):
  config = depth_config(score=score)
  weights = weights_of(config)
  for mask in MASKS.values():
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    actual, aux = run(config, TOKENS, token_mask=mask, train=train, return_aux=True)
    entropy = 0.0
    for row in range(2):
      given = dict(mask=mask[row], positions=positions[row], segment_ids=None, train=train)
      wanted, seen = oracle_row(config, weights, TOKENS[row], **given)
      assert_margins(seen, mask[row])
      assert relative_error(actual[row][mask[row]], wanted[mask[row]]) <= TOLERANCE
      for record, logits_L in zip(aux.depths, seen, strict=True):
        best = depth.best_tokens(logits_L, slots=4, token_mask=mask[row])
        taken = best if train else depth.positive_tokens(logits_L, token_mask=mask[row])
        np.testing.assert_array_equal(np.flatnonzero(record.taken[row]), taken)
        entropy += depth.entropy(logits_L, best, token_mask=mask[row])
    # The experts of the first depth block see taken tokens alone, and two of them each.
    assert int(aux.plans[0].metrics["assignments"]) == 2 * int(aux.depths[0].taken.sum())
    assert relative_error(aux.losses["depth"], entropy / 2 / mask.sum()) <= TOLERANCE
    routers = config.moe.routing.balance_loss_weight * aux.losses["load_balance"]
    total = routers + 2 * config.depth.loss_weight * aux.losses["depth"]
    assert relative_error(aux.weighted_loss, total) <= TOLERANCE


def test_documents_of_a_packed_row_stay_apart():
  segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 3, 3]], np.int32)
  positions = np.stack([language_model.positions_of(row) for row in segment_ids])
  actual = run(CONFIG, TOKENS, segment_ids=segment_ids, positions=positions, train=True)
  for row in range(2):
    given = dict(positions=positions[row], segment_ids=segment_ids[row], train=True)
    wanted, _ = oracle_row(CONFIG, weights_of(CONFIG), TOKENS[row], mask=ALL[row], **given)
    assert relative_error(actual[row], wanted) <= TOLERANCE


def run_single_block(capacity):
  """Returns x, what a depth block and the ordinary block in it make of it, and the record."""
  config = depth_config((("attention:dense:depth", 1),), capacity=capacity)
  positions = jnp.broadcast_to(jnp.arange(L), (2, L))
  places = Places(jnp.arange(L), positions, positions, jnp.asarray(ALL))

  @jax.jit
  def both(key):
    block = DepthBlock(config, ("attention", "dense", "depth"), key=key)
    x = jax.random.normal(key, (2, L, config.model_dim))
    context = Attention.context(config.attention, places)
    call = x, context, TokenInfo(jnp.asarray(ALL)), None
    inputs = RouterInputs()
    y, _, aux = block(*call, inputs=inputs, key=None, train=True)
    return x, y, block.block(*call, inputs=inputs, key=None, train=True)[0], aux

  return both(jax.random.key(0))


def test_a_capacity_of_one_is_the_ordinary_block_scaled_by_the_weights():
  x, y, whole, aux = run_single_block(1.0)
  assert relative_error(y - x, aux.logits[..., None] * (whole - x)) <= TOLERANCE
  assert bool(jnp.all(aux.taken)) and float(aux.metrics["taken_fraction"]) == 1.0


def test_a_token_that_is_not_taken_passes_by_unchanged():
  x, y, _, aux = run_single_block(0.3)
  passed = ~np.asarray(aux.taken)
  assert passed.sum() == 2 * (L - 3)
  np.testing.assert_array_equal(np.asarray(y)[passed], np.asarray(x)[passed])
  assert np.all(np.any(np.asarray(y != x)[~passed], axis=-1))


@functools.partial(jax.jit, static_argnames="graph")
def decode(graph, params, tokens, cache, token_mask):
  return nnx.merge(graph, params).decode(tokens, cache, token_mask=token_mask)


@pytest.mark.parametrize("mask", [MASKS["none"], MASKS["padding"]], ids=["none", "padding"])
@pytest.mark.parametrize("sizes", [(1,) * L, (4, 1, 1, 1)], ids=str)
def test_cached_logits_equal_those_of_the_whole_sequence(sizes, mask):
  config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, dispatch="ragged"))
  graph, params = random_parameters(config)
  # One slot more than tokens: a free slot must not be looked at.
  cache, start, logits = nnx.merge(graph, params).init_cache(2, L + 1), 0, []
  for size in sizes:
    part = slice(start, start + size)
    step, cache = decode(graph, params, jnp.asarray(TOKENS[:, part]), cache, mask[:, part])
    logits.append(step)
    start += size
  whole, aux = run(config, TOKENS, token_mask=mask, return_aux=True)
  cached = np.concatenate(logits, axis=1)
  assert relative_error(cached[mask], np.asarray(whole)[mask]) <= TOLERANCE
  # Both kinds of tokens occur, so that the cache has something to leave out.
  assert all(0 < record.metrics["taken_fraction"] < 1 for record in aux.depths)


@pytest.mark.parametrize("train", [True, False])
def test_only_the_choice_of_training_looks_ahead(train):
  config = depth_config((("attention:dense:depth", 2),), capacity=0.3)
  graph, params = random_parameters(config)
  first, changed = random_tokens(config, 1, 16, seed=3), 0
  before = np.asarray(forward(graph, params, jnp.asarray(first), train=train))
  for seed in range(3):
    other = first.copy()
    other[:, 8:] = random_tokens(config, 1, 8, seed=10 + seed)
    after = np.asarray(forward(graph, params, jnp.asarray(other), train=train))
    changed += relative_error(after[:, :8], before[:, :8]) > TOLERANCE
  assert (changed > 0) == train


@functools.partial(jax.jit, static_argnames="graph")
@functools.partial(jax.grad, argnums=1)
def gradient(graph, params, loss_weight, cotangent, mask):
  """Returns the gradient of sum(cotangent * logits) + loss_weight * loss in training."""
  model = nnx.merge(graph, params)
  logits, aux = model(jnp.asarray(TOKENS), token_mask=mask, train=True, return_aux=True)
  return jnp.sum(cotangent * logits) + loss_weight * aux.losses["depth"]


def router_gradient(config, loss_weight, cotangent, mask):
  """Returns that gradient by the router of the only block, and checks that all is finite."""
  grads = gradient(*random_parameters(config), loss_weight, cotangent.astype(np.float32), mask)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(grads))
  return np.asarray(grads["segments"][0]["blocks"][0]["router"][...])[0]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_outputs_and_loss_send_the_router_the_gradient_of_the_loop(mask):
  config = depth_config((("attention:dense:depth", 1),), score="sigmoid")
  weights = weights_of(config)
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  cotangent = np.random.default_rng(5).normal(size=(2, L, 13)) * mask[..., None]

  def objective(router):
    weights["blocks"][0]["depth_router"] = router
    total = 0.0
    for row in range(2):
      given = dict(mask=mask[row], positions=positions[row], segment_ids=None, train=True)
      logits, (seen,) = oracle_row(config, weights, TOKENS[row], **given)
      best = depth.best_tokens(seen, slots=4, token_mask=mask[row])
      total += np.sum(cotangent[row] * logits)
      total += 0.5 * depth.entropy(seen, best, token_mask=mask[row]) / mask.sum()
    return total

  wanted = finite_differences.gradient(objective, weights["blocks"][0]["depth_router"])
  actual = router_gradient(config, 0.5, cotangent, mask)
  assert relative_error(actual, wanted) <= TOLERANCE
  assert np.any(router_gradient(config, 1.0, np.zeros_like(cotangent), mask))


def test_a_batch_of_padding_alone_has_finite_gradients():
  config = depth_config((("attention:dense:depth", 1),), score="sigmoid")
  nothing = router_gradient(config, 1.0, np.zeros((2, L, 13)), np.zeros((2, L), bool))
  assert not np.any(nothing)


def test_counts_take_the_fraction_of_tokens_into_account():
  plain = count_parameters(tiny_config(segments=(("attention:dense", 2),)))
  config = depth_config((("attention:dense attention:dense:depth", 1),), capacity=0.25)
  count = count_parameters(config)
  sizes = [a.size for a in jax.tree.leaves(random_parameters(config)[1])]
  # The router has D = 8 parameters; the block 384 in attention, 288 in its network, 2 * 8 in norms.
  assert count.total == sum(sizes) == plain.total + 8
  assert count.active == count.total - 0.75 * (384 + 288 + 16)
  assert count.matmul_active == plain.matmul_active + 8 - 0.75 * (384 + 288)
  # Attention of H = 4 heads of width 4, forward and backward: all tokens look at 16.5 of 32, a
  # quarter of them at 4.5 of the 8 that the block takes.
  attention = 3 * 2 * 2 * 16 * (16.5 + 4.5 / 4)
  assert training_flops_per_token(config, 32) == 6 * count.matmul_active + attention


def test_every_parameter_names_its_axes():
  state = random_parameters(CONFIG)[1]
  router = state["segments"][0]["blocks"][1]["router"]
  assert router.get_metadata()["axes"] == ("layers", "embed")
  assert router.get_value().shape == (1, 8)


def test_slots_read_the_fraction_as_it_was_written():
  # 0.07 * 100 is 7.000000000000001 in floating point.
  assert [DepthConfig(capacity=c).slots(100) for c in (0.07, 0.125, 1.0)] == [7, 13, 100]


REFUSED = [
  (lambda: DepthConfig(capacity=0.0), "capacity = 0.0 .* above 0 and at most 1"),
  (lambda: DepthConfig(capacity=1.5), "capacity = 1.5"),
  (lambda: DepthConfig(capacity=float("nan")), "capacity = nan"),
  (lambda: DepthConfig(loss_weight=-1.0), "loss_weight = -1.0 .* 0 or greater"),
  (lambda: DepthConfig(score="linaer"), "score = 'linaer' .* did you mean 'linear'"),
  (lambda: depth_config((("attention:dense:dept", 1),)), "did you mean attention:dense:depth"),
  (lambda: depth_config((("attention:dense", 1),)), "depth section such blocks$"),
  (lambda: tiny_config(segments=SEGMENTS), "depth = None contradict .* need a depth section"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_refused_in_one_sentence(make, message):
  with pytest.raises(UserError, match=message) as caught:
    make()
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
