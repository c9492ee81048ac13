"""One optimiser step: what it minimises, what it logs, what accumulation and seeds change."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from small_presets import small_preset
from training import tiny
from training.steps import compiled_step, fresh, make_batch, one_step

from moe_jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer
from moe_jax.training.state import Stream, init_state, stream_key
from moe_jax.training.step import make_eval_step


def leaves(params: nnx.State) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def router_kernel(state) -> np.ndarray:
  """The router of the first MoE block of the repeated pattern, all repeats."""
  return np.asarray(
    state.params["segments"][0]["blocks"][1]["feed_forward"]["router"]["kernel"][...]
  )


def test_first_loss_is_that_of_a_uniform_guess():
  # Small initial weights (init_scale 0.1) leave the logits of the head near unit variance, which
  # adds about half a nat to ln V.
  _, metrics = one_step(tiny.experiment(), make_batch())
  assert math.log(259) - 0.1 < metrics["loss"] < math.log(259) + 1.0


@pytest.mark.parametrize("variant", ["moe", "dense"])
def test_a_batch_is_learnt_by_heart(variant):
  config = tiny.experiment(variant, steps=60, optimizer__learning_rate=1e-2)
  _, metrics = one_step(config, make_batch(), steps=60)
  assert metrics["loss"] < 3.0


def test_accumulation_changes_nothing_for_a_dense_model():
  config = tiny.experiment("dense")
  whole, whole_metrics = one_step(config, make_batch(), steps=2)
  cut, cut_metrics = one_step(
    dataclasses.replace(config, accumulation_steps=4), make_batch(), steps=2
  )
  assert relative_error(cut_metrics["loss"], whole_metrics["loss"]) < 1e-6
  assert relative_error(cut_metrics["grad_norm"], whole_metrics["grad_norm"]) < 1e-5
  # Adam divides by the gradient's size, so a rounding of a tiny gradient is amplified.
  for a, b in zip(leaves(cut.params), leaves(whole.params), strict=True):
    assert relative_error(a, b) < 1e-4


def test_accumulation_weighs_microbatches_by_their_targets():
  batch = make_batch()
  batch["loss_mask"][:2, 5:] = 0
  config = tiny.experiment("dense")
  _, whole = one_step(config, batch)
  _, cut = one_step(dataclasses.replace(config, accumulation_steps=2), batch)
  assert relative_error(cut["loss"], whole["loss"]) < 1e-6
  assert relative_error(cut["grad_norm"], whole["grad_norm"]) < 1e-5


def test_accumulated_load_is_that_of_the_whole_batch():
  config = tiny.experiment()
  batch = make_batch()
  # Microbatches with unequal numbers of real tokens: a mean of fractions would be wrong.
  batch["segment_ids"][:2, 9:] = 0
  batch["loss_mask"][:2, 9:] = 0
  _, whole = one_step(config, batch)
  _, cut = one_step(dataclasses.replace(config, accumulation_steps=2), batch)
  for layer in config.model.moe_layers():
    for name in ("load", "max_violation", "max_violation_floor", "assignments"):
      name = f"moe/layer_{layer}/{name}"
      assert relative_error(cut[name], whole[name]) < 1e-5


def test_padding_has_no_influence():
  batch, other = make_batch(), make_batch()
  padding = batch["segment_ids"] == 0
  for name in ("tokens", "targets"):
    other[name] = np.where(padding, 77, other[name])
  a, a_metrics = one_step(tiny.experiment(), batch, steps=2)
  b, b_metrics = one_step(tiny.experiment(), other, steps=2)
  assert a_metrics["loss"] == b_metrics["loss"]
  # The embedding of the token that padding holds gets no gradient either.
  for x, y in zip(leaves(a.params), leaves(b.params), strict=True):
    np.testing.assert_array_equal(x, y)


def test_auxiliary_losses_move_the_router_and_are_logged_apart():
  batch = make_batch()
  # The learning rate of step 0 is 0: the second loss is still that of equal models.
  with_loss, metrics = one_step(tiny.experiment(), batch, steps=2)
  without, metrics_without = one_step(tiny.experiment(moe__balance_loss_weight=0.0), batch, steps=2)
  assert metrics["loss"] == metrics_without["loss"]
  assert metrics["aux_loss"] == metrics_without["aux_loss"] > 0.9
  assert metrics["z_loss"] > 0
  routers = [router_kernel(state) for state in (with_loss, without)]
  assert relative_error(*routers) > 1e-3


def test_metrics_have_the_documented_names():
  config = tiny.experiment()
  _, metrics = one_step(config, make_batch())
  expected = {"loss", "aux_loss", "z_loss", "grad_norm", "learning_rate"}
  router = {"dropped_fraction", "max_violation", "load_entropy", "dead_experts"}
  expected |= {f"moe/{name}" for name in router}
  for layer in (1, 3):
    expected |= {f"moe/layer_{layer}/{name}" for name in router | {"load"}}
  assert expected <= set(metrics)
  assert not [name for name in metrics if name.startswith(("moe/layer_0", "moe/layer_2"))]
  _, dense = one_step(tiny.experiment("dense"), make_batch())
  assert set(dense) == {"loss", "grad_norm", "learning_rate", "finite"}


def test_model_metric_is_the_mean_over_layers():
  _, metrics = one_step(tiny.experiment(), make_batch())
  layers = [metrics[f"moe/layer_{i}/max_violation"] for i in (1, 3)]
  assert relative_error(metrics["moe/max_violation"], np.mean(layers)) < 1e-6


def test_same_seed_same_step_bit_for_bit():
  config = tiny.experiment(model__dropout=0.1, moe__router_jitter=0.01, moe__expert_dropout=0.2)
  a, _ = one_step(config, make_batch(), steps=2)
  b, _ = one_step(config, make_batch(), steps=2)
  c, _ = one_step(dataclasses.replace(config, seed=1), make_batch(), steps=2)
  for x, y in zip(leaves(a.params), leaves(b.params), strict=True):
    np.testing.assert_array_equal(x, y)
  assert any((x != y).any() for x, y in zip(leaves(a.params), leaves(c.params), strict=True))


# The layer's own test holds every preset; here one of each way in which a choice reaches the loss.
@pytest.mark.parametrize("name", ["switch", "gshard", "expert_choice", "deepseek_v3", "soft_moe"])
def test_the_language_model_loss_alone_trains_the_router(name):
  config = tiny.experiment(optimizer__weight_decay=0.0)
  routing = small_preset(name, 4, balance_loss_weight=0.0)
  dispatch = "einsum" if name == "soft_moe" else "gather"
  moe = dataclasses.replace(config.model.moe, routing=routing, dispatch=dispatch)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
  before, _ = compiled_step(config)
  # The first step of the warm-up has learning rate 0.
  after, metrics = one_step(config, make_batch(), steps=2)
  assert np.isfinite(metrics["loss"])
  assert (router_kernel(before) != router_kernel(after)).any()


@pytest.mark.parametrize(
  "source", ["model__dropout", "moe__expert_dropout", "moe__router_jitter", None]
)
def test_each_step_draws_its_own_random_numbers(source):
  config = tiny.experiment(**({source: 0.2} if source else {}))
  state, step = compiled_step(config)
  losses = []
  for number in (7, 8, 8):
    numbered = dataclasses.replace(fresh(state), step=jnp.int32(number))
    losses.append(float(step(numbered, make_batch())[1]["loss"]))
  assert losses[1] == losses[2]
  assert (losses[0] != losses[1]) == (source is not None)


def test_no_two_purposes_of_a_seed_share_a_key():
  root = jax.random.key(3)
  keys = [root, *jax.random.split(root, 3)]
  for stream in Stream:
    own = stream_key(3, stream)
    keys += [own, *(jax.random.fold_in(own, step) for step in range(3))]
  data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
  assert len(data) == len(keys)


def test_norms_are_not_decayed_and_matrices_are():
  params = init_state(
    tiny.experiment().model, make_optimizer(tiny.experiment().optimizer, 5), 0
  ).params
  flags = jax.tree_util.tree_leaves_with_path(decayed(params))
  norms = {bool(flag) for path, flag in flags if "norm" in jax.tree_util.keystr(path)}
  others = {bool(flag) for path, flag in flags if "norm" not in jax.tree_util.keystr(path)}
  assert norms == {False}
  assert others == {True}


def test_schedule_warms_up_linearly_and_ends_at_its_final_fraction():
  c = tiny.experiment(
    optimizer__warmup_steps=10, optimizer__learning_rate=0.5, optimizer__final_fraction=0.2
  ).optimizer
  rate = learning_rate_schedule(c, 110)
  assert rate(0) == 0.0
  assert rate(5) == pytest.approx(0.25)
  assert rate(10) == pytest.approx(0.5)
  assert rate(60) == pytest.approx(0.1 + 0.4 * 0.5)
  assert rate(110) == pytest.approx(0.1)


def first_moment(state) -> float:
  """Returns the norm of Adam's first moment, after a step (1 - b1) times the clipped gradient's."""
  adam = next(
    part
    for part in jax.tree.leaves(state.opt_state, is_leaf=lambda part: hasattr(part, "mu"))
    if hasattr(part, "mu")
  )
  return float(optax.tree.norm(adam.mu))


def test_clipping_scales_the_gradient_but_not_the_logged_norm():
  bound = 1e-3
  loose, metrics = one_step(tiny.experiment(optimizer__clip_norm=0.0), make_batch())
  tight, tight_metrics = one_step(tiny.experiment(optimizer__clip_norm=bound), make_batch())
  assert metrics["grad_norm"] == tight_metrics["grad_norm"] > bound
  b1 = tiny.experiment().optimizer.b1
  assert relative_error(first_moment(loose), (1 - b1) * metrics["grad_norm"]) < 1e-5
  assert relative_error(first_moment(tight), (1 - b1) * bound) < 1e-5


def test_eval_step_sums_over_targets_only():
  config = tiny.experiment("dense")
  params = init_state(config.model, make_optimizer(config.optimizer, 5), 0).params
  step = make_eval_step(config.model)
  batch = make_batch()
  whole = step(params, batch)
  assert whole["targets"] == batch["loss_mask"].sum()
  halves = [step(params, {k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2)]
  assert relative_error(sum(h["nll"] for h in halves), whole["nll"]) < 1e-6
  empty = {name: np.zeros_like(value) for name, value in batch.items()}
  assert step(params, empty)["nll"] == 0.0


def test_bfloat16_activations_keep_parameters_in_float32():
  config = tiny.experiment(model__dtype="bfloat16")
  state, metrics = one_step(config, make_batch())
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  _, exact = one_step(tiny.experiment(), make_batch())
  # bfloat16 has 8 bits of mantissa: relative errors of 2^-8 on activations.
  assert relative_error(metrics["loss"], exact["loss"]) < 1e-2
