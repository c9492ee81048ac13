"""Reading a checkpoint of the hub into a model."""

import dataclasses
import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.convert.families import family_in
from moe_jax.convert.family import Family
from moe_jax.convert.hub_config import HubConfig, read_hub_config
from moe_jax.convert.rules import Link, links, parameter_shapes
from moe_jax.convert.rules import Path as Place
from moe_jax.convert.tensor_files import TensorFiles, open_tensors
from moe_jax.errors import UserError
from moe_jax.models import Model, ModelConfig, make_model
from moe_jax.moe.options import Overflow

_MOST_FAULTS = 12
# XLA's CPU backend uses host memory in place if it starts at such a multiple.
_ALIGNMENT = 64


def load_pretrained(path: str | Path, dtype: str = "float32") -> tuple[Model, ModelConfig]:
  """Loads a checkpoint folder of the hub: `config.json` and safetensors, one file or several.

  Tensors are read one by one: beyond the model and the tensor in hand, memory holds nothing on a
  CPU, and with an accelerator the host holds one parameter stacked over its segment's layers. The
  model routes without drops, by ragged dispatch, as the originals do outside training, unless its
  original drops there too (Switch, NLLB-MoE; `Family.drops`).

  Args:
    path: the folder.
    dtype: of parameters and activations, "float32" or "bfloat16"; the router stays float32.

  Returns:
    The model and its config.

  Raises:
    UserError: all faults of the folder at once: an unknown architecture, settings that are missing
      or not supported, files that are missing, damaged, outside the folder or pickles, tensors
      that are missing, unknown or of another shape. Nothing is loaded then.
  """
  folder = Path(path)
  hub = read_hub_config(folder)
  faults: list[str] = []
  family, config = _read_config(hub, dtype, faults)
  with open_tensors(folder) as files:
    faults += files.faults
    if config is None:
      _refuse(folder, faults)
    wanted = links(family.rules, config)
    faults += _tensor_faults(wanted, files, _ignored(family, config, hub))
    if faults:
      _refuse(folder, faults)
    leaves = _read_leaves(wanted, files, config)
  return _model(config, leaves), config


def _read_config(
  hub: HubConfig, dtype: str, faults: list[str]
) -> tuple[Family | None, ModelConfig | None]:
  """Returns family and config, or None and an entry in `faults`."""
  try:
    _check_plain(hub)
    family = family_in(hub)
    config = family.read(hub)
    if not (family.drops and config.moe.routing.overflow == Overflow.DROP):
      config = config.dropless()
    return family, dataclasses.replace(config, dtype=dtype)
  except UserError as error:
    faults.append(str(error))
    return None, None


def _check_plain(hub: HubConfig) -> None:
  if quantised := hub.get("quantization_config", {}):
    method = quantised.get("quant_method", "an unnamed method")
    raise UserError(
      f"its weights are quantised ({method!r}): expected float32, float16 or bfloat16, save them"
      " again without quantisation"
    )


def _ignored(family: Family, config: ModelConfig, hub: HubConfig) -> tuple[str, ...]:
  # Some files repeat a tied embedding as the head.
  tied = (r"(language_model\.)?lm_head\.weight",) if config.tie_embeddings else ()
  first, count = len(config.layers()), hub.get("num_nextn_predict_layers", 1)
  numbers = "|".join(str(first + i) for i in range(max(count, 1)))
  beyond = (pattern.replace("{prediction}", f"({numbers})") for pattern in family.ignored)
  return (*beyond, *tied, r".*\.rotary_emb\.inv_freq")


def _tensor_faults(wanted: list[Link], files: TensorFiles, ignored: tuple[str, ...]) -> list[str]:
  """Returns what is missing, of another shape, or unknown.

  Where a file is missing or damaged, that is the fault, and not each of the tensors it had.
  """
  faults, found = [], files.shapes
  for link in wanted:
    if link.key not in found:
      faults += [f"{link.key} is missing"] * files.complete
    elif found[link.key] != link.shape:
      faults.append(f"{link.key} has the shape {found[link.key]}, expected {link.shape}")
  known = {link.key for link in wanted}
  # A network of no width, which some files keep, is none.
  for key in sorted(key for key in set(found) - known if math.prod(found[key])):
    if not any(re.fullmatch(pattern, key) for pattern in ignored):
      faults.append(f"{key} has no place in the model")
  return faults


def _refuse(folder: Path, faults: list[str]) -> None:
  rest = len(faults) - _MOST_FAULTS
  shown = "; ".join(faults[:_MOST_FAULTS]) + (f"; and {rest} more" if rest > 0 else "")
  count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
  raise UserError(f"{folder} cannot be loaded, {count}: {shown}")


def _read_leaves(
  wanted: list[Link], files: TensorFiles, config: ModelConfig
) -> dict[Place, jax.Array]:
  shapes, leaves = parameter_shapes(config), {}
  for places, group in itertools.groupby(wanted, lambda link: [s.path for s in link.slices]):
    arrays = {place: _empty(shapes[place], _dtype(place, config)) for place in places}
    for link in group:
      _fill(arrays, link, files)
    leaves |= {place: jax.device_put(array) for place, array in arrays.items()}
  return leaves


def _fill(arrays: dict[Place, np.ndarray], link: Link, files: TensorFiles) -> None:
  """Reads one tensor into its slices; nothing keeps it when this returns."""
  parts = link.transform.to_ours(files.read(link.key), tuple(s.shape for s in link.slices))
  for part, value in zip(link.slices, parts, strict=True):
    arrays[part.path][part.index] = value


def _dtype(place: Place, config: ModelConfig) -> np.dtype:
  return jnp.dtype("float32" if "router" in place else config.dtype)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _model(config: ModelConfig, leaves: dict[Place, jax.Array]) -> Model:
  graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))))
  flat = [(path, leaf.replace(leaves[path])) for path, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graph, nnx.from_flat_state(flat))
