"""Makes tiny checkpoints and what their original, the transformers library, computes with them.

    python tests/parity/make_fixtures.py --out=DIR [--seed=0] [--only=mixtral,olmoe] [--weights]
    python tests/parity/make_fixtures.py --verify=DIR

Needs torch and transformers, which the tests do not. Every variant's folder holds `config.json`,
`weights.json` (seed and shapes, of which `drawn_tensors.py` makes the weights), `inputs.npz` and
`expected.npz`; with --weights also `model.safetensors`. The committed fixtures are those of seed 0,
made with torch 2.13.0 and transformers 5.23.0 on a CPU, in float32, eagerly.

`expected.npz` of a decoder: `logits`; `logits_rp` of the same tokens with 7 of row 1 masked at the
end; `router_logits_i` of MoE layer i; `aux_loss[_rp]`, the balance loss without its coefficient (of
DeepSeekMoE with it); `gen`, 16 greedy tokens after `gen_prompt` with a cache, and `gen_nocache`;
`grad:NAME`, the gradient of the training loss for every router.
Encoder-decoders (`encoder_decoders.py`) have `decoder_input_ids` beside the encoder's tokens, which
are those that are masked; routers and losses are told apart by `encoder_` and `decoder_`, and `gen`
begins with the start token. Models that read images (`image_models.py`) have `pixel_values`, and
gradients of the tower's first parameters.

--verify loads checkpoints that moe_jax wrote, `resaved` in every folder of DIR, with transformers,
and prints how far their logits are from `expected.npz`.
"""

import argparse
import copy
import json
import os
import re
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import encoder_decoders  # noqa: E402
import image_models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from deepseek_moe import DeepseekForCausalLM  # noqa: E402
from drawn_tensors import draw_tensors, write_checkpoint  # noqa: E402
from reference_models import CONFIGS, GAINS, DeepseekConfig, model_class  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROWS, LENGTH, PADDING, PROMPT, NEW_TOKENS = 2, 24, 7, 10, 16
# Draws whose decisions rounding could change are drawn again.
_WIDEST_GAP, _LEAST_MARGIN = 2e-5, 2e-4
_CONFIGS = CONFIGS | encoder_decoders.CONFIGS | image_models.CONFIGS
_GAINS = GAINS | image_models.GAINS
_ROUTER = re.compile(r"(gate|router|router\.layer|classifier)\.(weight|bias)$")


def make(name: str, seed: int, folder: Path, with_weights: bool) -> None:
  """Writes the fixture of one variant."""
  config = _CONFIGS[name]()
  for attempt in range(20):
    drawn = {"seed": 1000 * seed + attempt, "gains": _GAINS.get(name, {})}
    drawn["shapes"] = _write_settings(config, folder)
    (folder / "weights.json").write_text(json.dumps(drawn, sort_keys=True) + "\n")
    model = _drawn_model(config, folder, drawn)
    inputs, expected = _run(model, config, drawn["seed"])
    if expected is not None:
      break
  else:
    raise SystemExit(f"{name}: no well-conditioned draw in 20 from seed {seed}")
  np.savez_compressed(folder / "inputs.npz", **inputs)
  np.savez_compressed(folder / "expected.npz", **expected)
  if with_weights:
    write_checkpoint(folder, folder)
  print(f"{name}: attempt {attempt}, largest logit {np.abs(expected['logits']).max():.2f}")


def _run(model, config, seed: int):
  """Returns inputs and the original's results as arrays, None for the latter of a bad draw."""
  if getattr(config, "is_encoder_decoder", False):
    inputs = encoder_decoders.draw_inputs(config, seed)
    found = encoder_decoders.expected_of(model, inputs)
  else:
    inputs = _inputs(seed)
    if hasattr(config, "vision_config"):
      inputs = image_models.with_images(config, inputs, seed)
    found = _expected(model, inputs)
  if found is None:
    return inputs, None
  for name, parameter in model.named_parameters():
    compared = _ROUTER.search(name) and "proj" not in name or name.endswith(image_models.TOWER)
    if compared and parameter.grad is not None:
      found[f"grad:{name}"] = parameter.grad
  return inputs, {name: each.detach().numpy() for name, each in found.items()}


def _write_settings(config, folder: Path) -> dict[str, list[int]]:
  """Writes `config.json` as the library does, and returns the checkpoint's keys and shapes."""
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as saved:
    model_class(config)(copy.deepcopy(config)).save_pretrained(saved)
    tensors = load_file(Path(saved) / "model.safetensors")
    settings = json.loads((Path(saved) / "config.json").read_text())
  settings.pop("_experts_implementation", None)
  (folder / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
  return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _drawn_model(config, folder: Path, drawn):
  tensors = draw_tensors(drawn["shapes"], drawn["seed"], drawn["gains"])
  with tempfile.TemporaryDirectory() as saved:
    path = Path(saved)
    (path / "config.json").write_text((folder / "config.json").read_text())
    save_file(
      {key: torch.tensor(value) for key, value in tensors.items()},
      path / "model.safetensors",
      {"format": "pt"},
    )
    return _load(model_class(config), path, config)


def _load(kind, path: Path, config=None):
  model = kind.from_pretrained(
    path,
    **({} if config is None else {"config": copy.deepcopy(config)}),
    attn_implementation="eager",
    experts_implementation="eager",
    dtype=torch.float32,
  )
  return model.eval()


def _inputs(seed: int) -> dict[str, np.ndarray]:
  tokens = np.random.RandomState(seed).randint(3, 97, (ROWS, LENGTH))
  mask = np.ones_like(tokens)
  mask[1, LENGTH - PADDING :] = 0
  return {"input_ids": tokens, "input_ids_rp": tokens * mask, "attention_mask_rp": mask}


def _expected(model, inputs) -> dict[str, torch.Tensor] | None:
  """Returns the original's results, or None if rounding could change a decision in them."""
  tokens, mask = (torch.tensor(inputs[name]) for name in ("input_ids", "attention_mask_rp"))
  images = {name: torch.tensor(inputs[name]) for name in ("pixel_values",) if name in inputs}
  # Before a run: modules may keep tensors of theirs.
  exact_model = copy.deepcopy(model).double()
  output = model(tokens, **images, labels=tokens, output_router_logits=True)
  output.loss.backward()
  with torch.no_grad():
    exact_images = {name: each.double() for name, each in images.items()}
    exact = exact_model(tokens, **exact_images).logits
    padded = model(tokens * mask, **images, attention_mask=mask, output_router_logits=True)
  prompt = tokens[:, :PROMPT]
  uncached, margin = _greedy(model, prompt, images)
  gap = (exact - output.logits).abs().max() / max(1.0, output.logits.abs().max())
  if gap > _WIDEST_GAP or margin < _LEAST_MARGIN:
    return None
  cached = model.generate(
    prompt,
    **images,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
    pad_token_id=0,
  )
  found = {"logits": output.logits, "logits_rp": padded.logits, "gen_prompt": prompt}
  found |= {"gen": cached[:, PROMPT:], "gen_nocache": uncached}
  found |= {f"router_logits_{i}": each for i, each in enumerate(output.router_logits)}
  for name, each in (("aux_loss", output), ("aux_loss_rp", padded)):
    if getattr(each, "aux_loss", None) is not None:
      found[name] = each.aux_loss
  return found


@torch.no_grad()
def _greedy(model, tokens, images):
  """Returns 16 tokens after a prompt without a cache, and the least lead of a chosen one."""
  margin, start = float("inf"), tokens.shape[1]
  for _ in range(NEW_TOKENS):
    best = model(tokens, **images, use_cache=False).logits[:, -1].topk(2)
    margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
    if images and (best.indices[:, 0] == model.config.image_token_index).any():
      # The original would look for an image.
      return tokens[:, start:], 0.0
    tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
  return tokens[:, start:], margin


def verify(folder: Path) -> None:
  """Prints how far the logits of a checkpoint that moe_jax wrote are from the original's."""
  saved = folder / "resaved"
  if json.loads((saved / "config.json").read_text())["model_type"] == "deepseek":
    model = _load(DeepseekForCausalLM, saved, DeepseekConfig.from_pretrained(saved))
  else:
    config = transformers.AutoConfig.from_pretrained(saved)
    model = _load(model_class(config), saved)
  inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")
  names = [name for name in ("input_ids", "decoder_input_ids", "pixel_values") if name in inputs]
  with torch.no_grad():
    logits = model(**{name: torch.tensor(inputs[name]) for name in names}).logits.numpy()
  print(f"{folder.name}: {np.abs(logits - expected['logits']).max():.2g}", flush=True)


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="beginnings of names, separated by commas")
  parser.add_argument("--weights", action="store_true")
  parser.add_argument("--verify", type=Path)
  args = parser.parse_args()
  encoder_decoders.repair_nllb()
  # More threads gain nothing on models of this size.
  torch.set_num_threads(1)
  if args.verify is not None:
    for folder in sorted(path.parent for path in args.verify.glob("*/resaved")):
      verify(folder)
    return
  for name in _CONFIGS:
    if name.startswith(tuple(args.only.split(","))):
      make(name, args.seed, args.out / name, args.weights)


if __name__ == "__main__":
  main()
