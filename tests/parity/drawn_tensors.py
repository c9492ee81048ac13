"""Weights of the tiny reference models: drawn from a seed, so that no fixture has to hold them."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (NumPy's name of bfloat16)
import numpy as np
from safetensors.numpy import save_file

_ROUTERS = ("gate.weight", "router.weight", "router.layer.weight", "classifier.weight")


def draw_tensors(shapes: dict[str, list[int]], seed: int, gains: dict[str, float]):
  """Returns float32 tensors by key.

  NumPy promises that the numbers of `RandomState` never change. Matrices keep the variance of what
  they multiply, routers enlarge it fourfold, norms and biases leave their neutral values: a part
  that is ignored or wrong shows in the logits.

  Args:
    shapes: of every tensor by its key.
    seed: of the numbers.
    gains: factors of the tensors whose keys contain a text.
  """
  random = np.random.RandomState(seed)
  tensors = {}
  for key in sorted(shapes):
    value = _scaled(key, random.standard_normal(shapes[key]))
    for text, gain in gains.items():
      value = value * gain if text in key else value
    tensors[key] = value.astype(np.float32)
  return tensors


def _scaled(key: str, z: np.ndarray) -> np.ndarray:
  if "embed" in key or "wte" in key or key.endswith("sinks"):
    return z
  if key.endswith("e_score_correction_bias"):
    return 0.3 * z
  if key.endswith("bias"):
    return 0.2 * z
  if z.ndim == 1:
    return 1 + 0.15 * z
  router = key.endswith(_ROUTERS)
  # Fused experts (E, inputs, outputs); Linear keeps (outputs, inputs).
  inputs = z.shape[1] if z.ndim == 3 else z.shape[-1]
  return (2.0 if router else 1.0) * z / np.sqrt(inputs)


def write_checkpoint(fixture: Path, folder: Path) -> Path:
  """Writes the checkpoint of a fixture to a folder and returns it."""
  drawn = json.loads((fixture / "weights.json").read_text())
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text((fixture / "config.json").read_text())
  tensors = draw_tensors(drawn["shapes"], drawn["seed"], drawn["gains"])
  save_file(tensors, folder / "model.safetensors")
  return folder
