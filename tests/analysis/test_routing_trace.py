"""The record of one routing, and its file."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import tiny_models
from comparison import draw_logits
from fast_compilation import compile_fast  # noqa: F401
from moe.compiled import routed

from moe_jax.analysis import routing_trace
from moe_jax.analysis.routing_trace import RoutingTrace, record_routing
from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig
from moe_jax.moe.groups import to_groups

B, L, E, K = 2, 5, 4, 2
GROUPINGS = [
  dict(grouping="batch"),
  dict(grouping="sequence"),
  dict(grouping="fixed", group_size=4),  # the last group is filled up
]
TOKENS = np.arange(B * L).reshape(B, L)
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)


@functools.cache
def plan_of(**grouping):
  config = RoutingConfig(num_experts=E, top_k=K, capacity=2, **grouping)
  logits = to_groups(draw_logits(0, (B, L, E)), config)
  return routed(np.asarray(logits), config, mask=np.asarray(to_groups(MASK, config)))


def trace(**changes):
  plans = [plan_of(), plan_of(grouping="sequence")]
  made = record_routing(plans, TOKENS, run="tiny", step=30, token_mask=MASK)
  return dataclasses.replace(made, **changes)


def assert_equal(a: RoutingTrace, b: RoutingTrace) -> None:
  a, b = dataclasses.asdict(a), dataclasses.asdict(b)
  assert (a["run"], a["step"]) == (b["run"], b["step"])
  for name in ("tokens", "token_mask", "segment_ids"):
    np.testing.assert_array_equal(a[name], b[name], strict=True)
  for ours, theirs in zip(a["layers"], b["layers"], strict=True):
    for name, value in ours.items():
      np.testing.assert_array_equal(value, theirs[name], strict=True)


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda fields: fields["grouping"])
def test_groups_are_laid_out_as_the_batch_again(grouping):
  layer = record_routing([plan_of(**grouping)], TOKENS, run="r", step=0, token_mask=MASK).layers[0]
  assert layer.expert.dtype == np.int16 and layer.num_experts == E
  best = np.argsort(-draw_logits(0, (B, L, E)), axis=-1)[..., :K]
  np.testing.assert_array_equal(layer.expert[MASK], best[MASK])
  assert not layer.kept[~MASK].any()
  assert not layer.weight[~layer.kept].any()
  assert layer.kept[MASK].any() and not layer.kept[MASK].all()


def test_plans_of_a_model_hold_the_largest_logits():
  config = tiny_models.tiny_config()
  tokens = tiny_models.random_tokens(config, 2, 6)
  _, aux = tiny_models.run(config, tokens, return_aux=True)
  made = record_routing(aux.plans, tokens, run="tiny", step=0)
  assert len(made.layers) == 2
  for layer, logits in zip(made.layers, aux.router_logits, strict=True):
    order = np.argsort(-np.asarray(logits), axis=-1)
    np.testing.assert_array_equal(layer.expert, order[..., :2])
    np.testing.assert_allclose(layer.weight.sum(axis=-1), 1.0, rtol=1e-6)


def test_many_experts_need_wider_ids():
  plan = dataclasses.replace(plan_of(), num_experts=40_000)
  layer = record_routing([plan], TOKENS, run="r", step=0).layers[0]
  assert layer.expert.dtype == np.int32


def test_saved_trace_reads_back_the_same(tmp_path):
  path = tmp_path / "a.npz"
  segments = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], np.int32)
  made = trace(segment_ids=segments)
  made.save(path)
  assert_equal(RoutingTrace.load(path), made)
  assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  trace().save(path)

  def fail(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(routing_trace.np, "savez_compressed", fail)
  with pytest.raises(UserError, match="No space left on device"):
    trace(step=31).save(path)
  monkeypatch.undo()
  assert RoutingTrace.load(path).step == 30
  assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_cuts_and_flipped_bits_are_noticed(tmp_path):
  path = tmp_path / "a.npz"
  trace().save(path)
  whole = path.read_bytes()
  for length in range(0, len(whole), 97):
    path.write_bytes(whole[:length])
    with pytest.raises(UserError, match="damaged"):
      RoutingTrace.load(path)
  # The eighth byte of a directory entry says, among others, whether the file is encrypted.
  for position in (whole.index(b"PK\x01\x02") + 8, *range(0, len(whole), 61)):
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
    try:
      # What is not data (a date in the archive's directory) may change unseen.
      assert_equal(RoutingTrace.load(path), trace())
    except UserError:
      continue


def test_foreign_files_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  with pytest.raises(UserError, match="does not exist"):
    RoutingTrace.load(path)
  path.write_text("not an archive")
  with pytest.raises(UserError, match="no .npz file"):
    RoutingTrace.load(path)
  np.savez(path, weights=np.zeros(3))
  with pytest.raises(UserError, match="another kind"):
    RoutingTrace.load(path)
  np.savez(path, header=np.array([{}], dtype=object))
  with pytest.raises(UserError, match="damaged"):
    RoutingTrace.load(path)
  np.savez(path, header=np.array(json.dumps(dict(format="moe_jax routing trace", version=2))))
  with pytest.raises(UserError, match="version 2 .* expected 1"):
    RoutingTrace.load(path)


def test_choices_of_null_experts_are_recorded_as_not_kept(tmp_path):
  config = RoutingConfig(num_experts=E, num_null_experts=2, top_k=K, overflow="dropless")
  logits = draw_logits(0, (B, L, E + 2))
  plan = routed(logits, config, mask=MASK)
  made = record_routing([plan], TOKENS, run="r", step=0, token_mask=MASK)
  layer = made.layers[0]
  best = np.argsort(-logits, axis=-1)[..., :K]
  np.testing.assert_array_equal(layer.expert[MASK], best[MASK])
  np.testing.assert_array_equal(layer.kept[MASK], best[MASK] < E)
  made.save(tmp_path / "a.npz")
  assert_equal(RoutingTrace.load(tmp_path / "a.npz"), made)


def test_arrays_that_contradict_each_other_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  layer = trace().layers[0]

  def fault(**arrays):
    trace(layers=(dataclasses.replace(layer, **arrays),)).save(path)
    with pytest.raises(UserError) as caught:
      RoutingTrace.load(path)
    return str(caught.value)

  assert "names expert 9, expected 0 to 3" in fault(expert=np.full_like(layer.expert, 9))
  assert "layer 0 has arrays of shapes" in fault(kept=layer.kept[:, :, :1])
  assert "layer 0 has dtypes" in fault(weight=layer.weight.astype(np.float64))
  trace(token_mask=MASK[:1]).save(path)
  with pytest.raises(UserError, match="token_mask has shape"):
    RoutingTrace.load(path)


def test_what_cannot_be_recorded_is_refused(tmp_path):
  record = functools.partial(record_routing, run="r", step=0)
  unranked = dataclasses.replace(plan_of(), top_k=None)
  with pytest.raises(UserError, match="plan 0 has top_k = None"):
    record([unranked], TOKENS)
  with pytest.raises(UserError, match="plan 0 routes 10 tokens; expected 20"):
    record([plan_of()], np.zeros((4, 5)))
  with pytest.raises(UserError, match="token_mask has shape"):
    record([plan_of()], TOKENS, token_mask=MASK[0])
  with pytest.raises(UserError, match=r"expected a\.npz"):
    trace().save(tmp_path / "a.npy")
  with pytest.raises(UserError, match="cannot be written"):
    trace().save(tmp_path / "missing" / "a.npz")
