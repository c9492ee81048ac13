"""Layers split over the stages of a pipeline against the same layers on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sharding.layer_on_a_mesh import FAST_COMPILE, assert_close
from training.steps import make_batch
from training.tiny import experiment, pair_experiment

from moe_jax.errors import UserError
from moe_jax.planning.collectives import CollectiveKind, find_collectives
from moe_jax.planning.hlo import parse_program
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.context import constrain, use_layout
from moe_jax.sharding.layout import make_layout
from moe_jax.sharding.pipeline import through_stages
from moe_jax.training.microbatches import Microbatches, Share, sum_over
from moe_jax.training.placed import check_run_fits, place_batch
from moe_jax.training.state import init_state
from moe_jax.training.step import make_eval_step, make_train_step

STEPS = 3
# Rings of attention inside the stages, and experts split over both.
MESH = {"layout": "ep", "stage": 2, "expert": 2, "sequence": 2, "context": "ring"}


def _layout(**sizes):
  return make_layout(ShardingConfig(**sizes), jax.devices())


def _experiment(**changes):
  return experiment(
    batch_size=8,
    accumulation_steps=4,
    model__segments=(("attention:moe", 4),),
    model__num_kv_heads=2,
    moe__dispatch="gather",
    moe__grouping="fixed",
    moe__group_size=16,
    moe__bias_update="sign",
    moe__bias_rate=0.01,
    # f of the whole step: a forward pass of its own goes through the stages.
    moe__balance_scope="global_batch",
    **changes,
  )


def _run(config, layout):
  """Returns gradients and metrics of every step, router state, and an evaluation."""
  # Keeps the gradients themselves, and moves little enough for steps to stay comparable.
  optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(-1e-2))
  state = init_state(config.model, optimizer, config.seed, layout=layout)
  batches = [make_batch(seed, rows=8) for seed in range(STEPS)]
  if layout is not None:
    batches = [place_batch(batch, layout) for batch in batches]
  step = make_train_step(config, optimizer, layout)
  step = step.lower(state, batches[0]).compile(FAST_COMPILE)
  seen = []
  for batch in batches:
    state, metrics = step(state, batch)
    seen.append(jax.device_get((state.opt_state[0].trace, metrics)))
  score = make_eval_step(config.model, layout)
  score = score.lower(state.model, batches[0]).compile(FAST_COMPILE)
  return jax.device_get((seen, state.router_state, score(state.model, batches[0])))


def test_gradients_bias_metrics_and_drops_are_those_of_one_device():
  got, want = _run(_experiment(), _layout(**MESH)), _run(_experiment(), None)
  assert_close(got, want)
  drops = [name for name in want[0][0][1] if name.endswith("dropped_fraction")]
  assert len(drops) == 5 and any(want[0][0][1][name] > 0 for name in drops)
  for (_, a), (_, b) in zip(got[0], want[0], strict=True):
    np.testing.assert_array_equal([a[name] for name in drops], [b[name] for name in drops])


def _layers(weights, x, of_layers, shared):
  """Layers whose record tells which microbatch met which layer."""

  def one(x, layer):
    weight, own = layer
    x = jnp.tanh(x * weight) + shared
    return x, jnp.sum(x) + own

  return jax.lax.scan(one, x, (weights, of_layers))


def test_microbatches_meet_all_layers_in_order():
  R, M, layout = 4, 3, _layout(stage=4, data=2)
  rng = np.random.default_rng(0)
  arguments = [
    jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((R,), (M, 5), (M, R), (M, 5))
  ]

  def loss(run, *arguments):
    x, records = run(*arguments)
    return jnp.sum(jnp.sin(x)) + jnp.sum(records**2), (x, records)

  def together(weights, *own):
    return jax.vmap(functools.partial(through_stages, _layers, layout, weights))(*own)

  def alone(weights, *own):
    return jax.vmap(functools.partial(_layers, weights))(*own)

  grad = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4), has_aux=True), static_argnums=0)
  assert_close(grad(together, *arguments), grad(alone, *arguments))


def _compile_step(layout, num_microbatches):
  """Compiles the gradients of layers in a pipeline, between a product before and one behind."""
  R, D, rows = 4, 16, 8
  weights = {name: jax.ShapeDtypeStruct((D, D), jnp.float32) for name in ("before", "behind")}
  weights["layers"] = jax.ShapeDtypeStruct((R, D, D), jnp.float32)
  M = num_microbatches
  parts = Microbatches(
    {"x": jax.ShapeDtypeStruct((M, rows, D), jnp.float32)},
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), M)),
    Share(*[jax.ShapeDtypeStruct((M,), jnp.float32)] * 3),
  )

  def layers(weights, x, of_layers, shared):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)

  def objective(weights, batch, key, share):
    x = constrain(batch["x"] @ weights["before"], ("batch", None))
    x, _ = through_stages(layers, layout, weights["layers"], x, None, None)
    return jnp.sum(jnp.tanh(constrain(x @ weights["behind"], ("batch", None))))

  def total(weights, parts):
    with use_layout(layout):
      return sum_over(functools.partial(objective, weights), parts)

  whole = {name: layout.replicated for name in weights}
  places = whole | {"layers": layout.sharding(("layers", None, None), (R, D, D))}
  step = jax.jit(jax.grad(total), in_shardings=(places, layout.replicated), out_shardings=places)
  program = parse_program(step.lower(weights, parts).compile().as_text())
  return program, rows // layout.parts("batch") * D


def test_stages_hand_on_one_microbatch_a_tick_and_nothing_else():
  layout, M = _layout(stage=4, data=2), 8
  program, microbatch = _compile_step(layout, M)
  crossing = [each for each in find_collectives(program, layout.mesh) if each.axes != ("data",)]
  in_ticks = [each for each in crossing if each.runs > 1]
  assert {(each.kind, each.axes) for each in in_ticks} == {(CollectiveKind.PERMUTE, ("stage",))}
  assert {(each.runs, each.num_bytes) for each in in_ticks} == {(M + 3, 4 * microbatch)}
  # Layers never leave their stage: only microbatches are gathered before and after the ticks.
  gathered = [each for each in crossing if each.kind == CollectiveKind.ALL_GATHER]
  assert max((each.num_bytes for each in gathered), default=0) <= 4 * microbatch * M


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (_experiment(), "segment 0 has repeats = 4, which stage = 8 does not .*make it 8, .*stage = 4"),
    (pair_experiment(), "segment 0 has repeats = 1, which stage = 8 does not divide"),
    (_experiment(model__mtp_depth=1), "mtp_depth = 1 is refused with stage = 4: .* use stage = 1"),
  ],
)
def test_layers_that_stages_cannot_share_are_refused(config, message):
  if config.model.mtp_depth:
    layout = _layout(stage=4, data=2)
  else:
    layout = _layout(stage=8)
  with pytest.raises(UserError, match=message):
    check_run_fits(config, layout)
