"""A dense checkpoint of the hub is a Mixtral of one expert under other names."""

import json

import jax
import numpy as np
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from safetensors.numpy import load_file, save_file
from surgery_cases import MIXTRAL, leaves_of, logits_of

from moe_jax.convert import load_pretrained, save_pretrained
from moe_jax.convert.families import family_in
from moe_jax.convert.hub_config import HubConfig
from moe_jax.models import Decoder

ONE_EXPERT = {**MIXTRAL, "num_local_experts": 1, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5}
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_dense_checkpoint_is_read(architecture, tmp_path):
  hub = HubConfig({**ONE_EXPERT, "rope_theta": 500.0})
  config = family_in(hub).read(hub).dropless()
  model = Decoder(config, key=jax.random.key(0))
  save_pretrained(model, config, tmp_path / "mixtral")
  (tmp_path / "dense").mkdir()
  tensors = {}
  for key, tensor in load_file(tmp_path / "mixtral" / "model.safetensors").items():
    for theirs, ours in NAMES.items():
      key = key.replace(f"block_sparse_moe.experts.0.{theirs}", f"mlp.{ours}")
    if "block_sparse_moe" not in key:
      tensors[key] = tensor
  save_file(tensors, tmp_path / "dense" / "model.safetensors")
  settings = {**hub.values, "architectures": [architecture]}
  (tmp_path / "dense" / "config.json").write_text(json.dumps(settings))
  dense, dense_config = load_pretrained(tmp_path / "dense")
  assert dense_config.moe is None and dense_config.mlp.hidden_dim == 12
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  expected = logits_of(config, leaves_of(nnx.state(model)), tokens)
  made = logits_of(dense_config, leaves_of(nnx.state(dense)), tokens)
  # The same float32 products; the weight of the only expert is 1.
  assert relative_error(made, expected) < 1e-6
