"""A faulty checkpoint is refused in one sentence that names every fault; a good one is not."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import load_pretrained
from moe_jax.errors import UserError

NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def rewrite(folder, change):
  tensors = dict(load_file(folder / "model.safetensors"))
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def set_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder):
  with pytest.raises(UserError) as caught:
    load_pretrained(folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def index(folder, **places):
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").rename(folder / "part.safetensors")
  weight_map = {**dict.fromkeys(tensors, "part.safetensors"), **places}
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"weight_map": weight_map}))


def test_all_faults_of_tensors_are_named_at_once(checkpoint):
  def change(tensors):
    del tensors[NORM]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors[HEAD] = np.zeros((5, 8), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((16, 8), np.int32)

  rewrite(checkpoint, change)
  text = refusal(checkpoint)
  assert f"{NORM} is missing" in text
  assert "model.extra has no place in the model" in text
  assert f"{HEAD} has the shape (5, 8), expected (16, 8)" in text
  assert "model.embed_tokens.weight is of the type I32" in text
  assert "4 faults" in text


def test_many_faults_are_counted(checkpoint):
  rewrite(checkpoint, lambda tensors: [tensors.pop(key) for key in list(tensors)[1:]])
  assert re.search(r"\d+ faults: .*; and \d+ more$", refusal(checkpoint))


def test_unknown_architecture_names_the_nearest_beside_faults_of_files(checkpoint):
  set_config(checkpoint, architectures=["MixtralForCausalLLM"], model_type="mixtrall")
  (checkpoint / "model.safetensors").unlink()
  text = refusal(checkpoint)
  assert "did you mean MixtralForCausalLM?" in text and "2 faults" in text
  assert "neither model.safetensors nor model.safetensors.index.json" in text


def test_missing_setting_is_named(checkpoint):
  set_config(checkpoint, vocab_size=None)
  assert "config.json has vocab_size = null; expected a value" in refusal(checkpoint)
  settings = json.loads((checkpoint / "config.json").read_text())
  del settings["vocab_size"]
  (checkpoint / "config.json").write_text(json.dumps(settings))
  assert "config.json has no 'vocab_size'" in refusal(checkpoint)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantised ('fp8')"),
    ({"num_experts_per_tok": 3}, "top_k = 3"),
    ({"hidden_size": "8"}, 'hidden_size = "8"; expected an integer from 1'),
    ({"num_attention_heads": 0}, "num_attention_heads = 0; expected an integer from 1"),
    ({"hidden_size": 10**30}, "expected an integer from 1 to 2147483647"),
    ({"num_hidden_layers": 2**31 - 1}, "expected an integer from 1 to 10000"),
    ({"num_local_experts": 2**31 - 1}, "expected an integer from 1 to 10000"),
    ({"rope_theta": float("nan")}, "rope_theta = NaN; expected a finite number"),
    ({"rope_scaling": "yarn"}, 'rope_scaling = "yarn"; expected an object'),
    ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no"; expected true or false'),
    ({"architectures": 3}, "architectures = 3; expected a list of strings"),
  ],
)
def test_settings_that_are_not_supported_are_refused(checkpoint, changes, words):
  set_config(checkpoint, **changes)
  assert words in refusal(checkpoint)


def test_truncated_file_is_one_fault_and_not_one_a_tensor(checkpoint):
  path = checkpoint / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-4])
  text = refusal(checkpoint)
  assert "1 fault: model.safetensors is truncated or damaged" in text
  assert "is missing" not in text


def test_folder_in_the_place_of_a_file_is_refused(checkpoint):
  (checkpoint / "model.safetensors").unlink()
  (checkpoint / "model.safetensors").mkdir()
  assert "1 fault: model.safetensors is not a file" in refusal(checkpoint)


def test_index_that_names_other_kinds_of_files_is_refused_and_they_stay_unread(checkpoint):
  index(checkpoint, **{NORM: "weights.bin"})
  (checkpoint / "weights.bin").write_bytes(b"no pickle at all")
  assert "names 'weights.bin', which is no .safetensors file" in refusal(checkpoint)


@pytest.mark.parametrize("outside", ["../part.safetensors", "/etc/passwd", "sub/../../x"])
def test_index_that_points_outside_the_folder_is_refused(checkpoint, outside):
  index(checkpoint, **{NORM: outside})
  assert f"points outside the folder, to {outside!r}" in refusal(checkpoint)


def test_index_is_refused_where_files_or_tensors_are_missing(checkpoint):
  index(checkpoint, **{NORM: "lost.safetensors", "model.absent": "part.safetensors"})
  text = refusal(checkpoint)
  assert "lost.safetensors is missing" in text
  assert "looks for model.absent in part.safetensors, which lacks it" in text


@pytest.mark.parametrize(
  "text", ['{"weight_map": ', "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "b\\nc"}}']
)
def test_damaged_index_is_refused(checkpoint, text):
  index(checkpoint)
  (checkpoint / "model.safetensors.index.json").write_text(text)
  assert "model.safetensors.index.json is damaged" in refusal(checkpoint)


def test_folder_of_pickles_is_refused_unread(checkpoint):
  (checkpoint / "model.safetensors").unlink()
  (checkpoint / "pytorch_model.bin").write_bytes(b"no pickle at all")
  assert "weights are pickles (pytorch_model.bin)" in refusal(checkpoint)


def test_folder_and_settings_must_exist_and_be_json(checkpoint, tmp_path):
  assert "is not a folder" in refusal(tmp_path / "nowhere")
  (checkpoint / "config.json").write_text("{")
  assert "is not valid JSON" in refusal(checkpoint)
  (checkpoint / "config.json").unlink()
  assert "has no config.json" in refusal(checkpoint)


def test_type_of_activations_is_checked(checkpoint):
  with pytest.raises(UserError, match="dtype = 'int8' is not one of float32, bfloat16"):
    load_pretrained(checkpoint, dtype="int8")


def test_networks_of_no_width_are_ignored(checkpoint):
  key = "model.layers.0.mlp.shared_experts.up_proj.weight"
  rewrite(checkpoint, lambda tensors: tensors.update({key: np.zeros((0, 8), np.float32)}))
  load_pretrained(checkpoint)


def test_buffers_of_older_releases_are_ignored(checkpoint):
  key = "model.layers.0.self_attn.rotary_emb.inv_freq"
  rewrite(checkpoint, lambda tensors: tensors.update({key: np.zeros(2, np.float32)}))
  load_pretrained(checkpoint)
