"""Tiny checkpoints of every family compute here what they do in their original library.

Logits are of order 4, and float32 leaves 1e-5 of them at most (the originals' own distance between
float32 and float64); tolerances are what is promised, which a wrong detail misses by far.
"""

from pathlib import Path

import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from parity.drawn_tensors import write_checkpoint
from parity.encoder_decoder_measuring import STACKS
from parity.measuring import compare

from moe_jax.convert import save_pretrained, to_hub

FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = sorted(path.name for path in FIXTURES.iterdir())
TOLERANCES = {
  "logits": 1e-4,
  "logits_rp": 1e-4,
  "router_logits": 1e-4,
  "router_gradients": 1e-4,
  "aux_loss": 1e-5,
  "aux_loss_rp": 1e-5,
  **{f"{stack}_{loss}": 1e-5 for stack in STACKS for loss in ("aux_loss", "z_loss")},
  "generated": 0,
  "generated_uncached": 0,
}
# A window, a latent cache, images, a state, an encoder; the gradients of a plain and of a biased
# router, through a scan, with drops and from images. All: `make test-full`.
CACHED = (
  *("mixtral_swa", "deepseek_v3", "llama4_scout", "llama4_multimodal", "jamba_projbias_tied"),
  "switch_drop",
)
DIFFERENTIATED = ("mixtral_swa", "gpt_oss_clamp", "jamba", "nllb_moe_bpr", "llama4_multimodal")
ENCODER_DECODERS = [name for name in VARIANTS if name.startswith(("switch", "nllb"))]
FORWARD = (
  *("mixtral_swa", "olmoe_clip_gqa_norm", "qwen2_moe_mixed", "qwen3_moe_mixed"),
  *("deepseek_v1", "deepseek_v1_norm", "deepseek_v2", "deepseek_v3"),
  *("deepseek_v3_halves", "llama4_scout", "llama4_maverick", "llama4_multimodal"),
  *("gpt_oss_clamp", "granitemoe_tied"),
  *("phimoe_longrope", "dbrx_p2", "glm4_moe_groups", "jamba", "jamba_projbias_tied"),
  *("switch_drop", "switch_untied", "nllb_moe_bpr"),
)


def cases(always):
  full = [name for name in VARIANTS if name not in always]
  return [*always, *(pytest.param(name, marks=pytest.mark.full) for name in full)]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
  """Returns the comparison of a variant, loaded once."""
  loaded = {}

  def load(name):
    if name not in loaded:
      folder = write_checkpoint(FIXTURES / name, tmp_path_factory.mktemp("checkpoints") / name)
      loaded[name] = compare(folder, FIXTURES / name), folder
    return loaded[name]

  return load


def check(found):
  beyond = {name: value for name, value in found.items() if not value <= TOLERANCES[name]}
  assert not beyond


@pytest.mark.parametrize("name", cases(FORWARD))
def test_logits_router_logits_losses_and_greedy_tokens_are_the_originals(name, comparison):
  found = comparison(name)[0].forward()
  assert {"logits", "logits_rp", "router_logits"} <= set(found)
  assert name in ENCODER_DECODERS or "generated_uncached" in found
  check(found)


@pytest.mark.parametrize("name", cases(CACHED))
def test_tokens_generated_with_a_cache_are_the_originals(name, comparison):
  check(comparison(name)[0].cached())


@pytest.mark.full
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_tokens_of_encoder_decoders_without_a_cache_are_the_originals(name, comparison):
  check(comparison(name)[0].uncached())


@pytest.mark.parametrize("name", cases(DIFFERENTIATED))
def test_router_gradients_are_the_originals(name, comparison):
  check(comparison(name)[0].gradients())


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_checkpoint_has_the_tensors_and_the_meaning_of_the_loaded_one(
  name, comparison, tmp_path
):
  loaded, folder = comparison(name)
  save_pretrained(loaded.model, loaded.config, tmp_path / "saved")
  again = compare(tmp_path / "saved", FIXTURES / name)
  assert again.config == loaded.config
  first, second = (to_hub(each.model, each.config) for each in (loaded, again))
  assert first.keys() == second.keys()
  for key, tensor in first.items():
    np.testing.assert_array_equal(tensor, second[key], err_msg=key)
