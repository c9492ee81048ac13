"""What is saved is what is loaded; nothing is left half-written, and memory holds one tensor."""

import dataclasses
import errno
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert.conftest import SETTINGS, config_of
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from safetensors.numpy import load_file

from moe_jax import load_pretrained, save_pretrained
from moe_jax.cli import main
from moe_jax.convert import to_hub
from moe_jax.convert.rules import flat_leaves
from moe_jax.errors import UserError
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models import Decoder


def assert_same(a, b):
  a, b = flat_leaves(a), flat_leaves(b)
  assert a.keys() == b.keys()
  for path, leaf in a.items():
    assert leaf.dtype == b[path].dtype, path
    np.testing.assert_array_equal(leaf, b[path], err_msg=str(path))


def test_loaded_model_is_the_saved_one(model, config, pristine):
  loaded, read = load_pretrained(pristine)
  assert read == config
  assert_same(model, loaded)


def test_several_files_hold_what_one_does(model, config, pristine, tmp_path):
  save_pretrained(model, config, tmp_path / "shards", max_file_bytes=1000)
  names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
  assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
  assert all((tmp_path / "shards" / n).stat().st_size < 2500 for n in names)
  assert_same(model, load_pretrained(tmp_path / "shards")[0])
  whole = load_file(pristine / "model.safetensors")
  parts = [load_file(tmp_path / "shards" / name) for name in names]
  assert whole.keys() == set().union(*parts)


def test_bfloat16_keeps_the_router_in_float32_and_survives_saving(pristine, tmp_path):
  model, config = load_pretrained(pristine, dtype="bfloat16")
  dtypes = {path: leaf.dtype for path, leaf in flat_leaves(model).items()}
  assert all(
    dtype == (jnp.float32 if "router" in p else jnp.bfloat16) for p, dtype in dtypes.items()
  )
  save_pretrained(model, config, tmp_path / "half")
  assert_same(model, load_pretrained(tmp_path / "half", dtype="bfloat16")[0])


def test_gradients_come_under_the_hubs_names_and_shapes(model, config, pristine):
  tokens = jnp.arange(6, dtype=jnp.int32).reshape(1, 6)
  graph, params = nnx.split(model)
  gradient = jax.grad(lambda p: nnx.merge(graph, p)(tokens).sum())(params)
  hub = to_hub(gradient, config)
  stored = load_file(pristine / "model.safetensors")
  assert {key: value.shape for key, value in hub.items()} == {k: v.shape for k, v in stored.items()}
  router = gradient["segments"][0]["blocks"][0]["feed_forward"]["router"]["kernel"][...]
  np.testing.assert_array_equal(hub["model.layers.1.block_sparse_moe.gate.weight"], router[1].T)


def test_a_tree_that_does_not_fit_is_refused(model, config):
  leaves = nnx.to_pure_dict(nnx.state(model))
  leaves["final_norm"] = {"scale": np.zeros(9, np.float32), "shift": np.zeros(8, np.float32)}
  del leaves["embedding"]
  with pytest.raises(UserError) as caught:
    to_hub(leaves, config)
  for words in ("embedding is missing", "final_norm.scale has the shape (9,)", "final_norm.shift"):
    assert words in str(caught.value)


def test_a_config_of_no_family_names_the_nearest_and_the_difference(model, config):
  dropping = config.with_routing(overflow="drop")
  with pytest.raises(UserError, match="nearest is MixtralForCausalLM.*overflow = dropless instead"):
    to_hub(model, dropping)


def test_layers_of_multi_token_prediction_are_left_out_where_the_config_says_so(config, tmp_path):
  deeper = dataclasses.replace(config, mtp_depth=1)
  model = Decoder(deeper, key=jax.random.key(0))
  with pytest.raises(UserError, match="give a config with mtp_depth = 0"):
    save_pretrained(model, deeper, tmp_path / "saved")
  save_pretrained(model, config, tmp_path / "saved")
  kept = flat_leaves(load_pretrained(tmp_path / "saved")[0])
  whole = flat_leaves(model)
  assert {path for path in whole if path[0] != "mtp"} == kept.keys() < whole.keys()
  for path, leaf in kept.items():
    np.testing.assert_array_equal(leaf, whole[path])


def test_a_model_without_experts_is_refused(model, config):
  dense = dataclasses.replace(
    config, segments=(("attention:dense", 2),), moe=None, mlp=FeedForwardConfig(12)
  )
  with pytest.raises(UserError, match="has no experts"):
    save_pretrained(model, dense, "never written")


def test_a_folder_that_holds_something_is_left_alone(model, config, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="is not an empty folder"):
    save_pretrained(model, config, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_save_leaves_nothing(model, config, tmp_path, monkeypatch):
  def fail(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr("moe_jax.convert.saving.write_tensors", fail)
  with pytest.raises(KeyboardInterrupt):
    save_pretrained(model, config, tmp_path / "new" / "checkpoint")
  assert list((tmp_path / "new").iterdir()) == []


def test_other_settings_and_files_are_copied_from_a_likeness(model, config, pristine, tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  settings = {**SETTINGS, "eos_token_id": 7, "hidden_size": 999}
  (source / "config.json").write_text(json.dumps(settings))
  (source / "tokenizer.json").write_text("{}")
  (source / "modeling.py").write_text("")
  save_pretrained(model, config, tmp_path / "target", like=source)
  written = json.loads((tmp_path / "target" / "config.json").read_text())
  assert written["eos_token_id"] == 7 and written["hidden_size"] == 8
  assert (tmp_path / "target" / "tokenizer.json").exists()
  assert not (tmp_path / "target" / "modeling.py").exists()


def test_memory_beyond_the_model_stays_under_two_tensors(tmp_path):
  # Experts of 1 MiB in 16 tensors a matrix: stacked they are 16 MiB.
  wide = {**SETTINGS, "hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 8}
  config = config_of({**wide, "num_attention_heads": 4, "num_key_value_heads": 4})
  model = Decoder(config, key=jax.random.key(0))
  size = sum(leaf.nbytes for leaf in flat_leaves(model).values())
  tensor = 256 * 1024 * 4
  save_pretrained(model, config, tmp_path / "warm")
  tracemalloc.start()
  save_pretrained(model, config, tmp_path / "measured")
  saving = tracemalloc.get_traced_memory()[1]
  tracemalloc.reset_peak()
  loaded, _ = load_pretrained(tmp_path / "measured")
  loading = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert saving < 2 * tensor
  # NumPy's arrays, which the model uses in place, are counted by tracemalloc.
  assert loading < size + 2 * tensor
  assert_same(model, loaded)


def test_the_command_converts_a_checkpoint(pristine, tmp_path, capsys):
  assert main(["convert", f"--checkpoint={pristine}", f"--out={tmp_path / 'out'}"]) == 0
  assert "MixtralForCausalLM" in capsys.readouterr().out
  assert_same(load_pretrained(pristine)[0], load_pretrained(tmp_path / "out")[0])


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "neither was given"),
    (["--workdir=a", "--checkpoint=b"], "both were given"),
    (["--workdir=a", "--dtype=bfloat16"], "--dtype=bfloat16 goes with --checkpoint"),
    (["--checkpoint=a", "--step=3"], "--step=3 goes with --workdir"),
  ],
)
def test_the_command_takes_one_source_and_its_flags(flags, message, tmp_path, capsys):
  assert main(["convert", f"--out={tmp_path / 'out'}", *flags]) == 2
  assert message in capsys.readouterr().err


def test_the_command_looks_at_the_target_before_it_reads(tmp_path, capsys):
  (tmp_path / "notes.txt").write_text("mine")
  assert main(["convert", "--checkpoint=nowhere", f"--out={tmp_path}"]) == 2
  assert "is not an empty folder" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_nothing(pristine, tmp_path, monkeypatch, capsys):
  def write(*args):
    (args[0] / "model.safetensors").write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("moe_jax.convert.saving.write_tensors", write)
  assert main(["convert", f"--checkpoint={pristine}", f"--out={tmp_path / 'out'}"]) == 2
  error = capsys.readouterr().err
  assert f"{tmp_path / 'out'} cannot be read or written (No space left on device)" in error
  assert error.count("\n") == 1
  assert list(tmp_path.iterdir()) == []
