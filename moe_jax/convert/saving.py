"""Writing a model as a checkpoint of the hub, and any tree of its shape under the hub's names."""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.convert.families import architecture_settings, family_of
from moe_jax.convert.hub_config import CONFIG_FILE, read_hub_config
from moe_jax.convert.rules import Link, flat_leaves, links, parameter_shapes, router_state
from moe_jax.convert.rules import Path as Place
from moe_jax.convert.tensor_files import INDEX_FILE
from moe_jax.convert.tensor_writer import TensorSpec, write_tensors
from moe_jax.errors import UserError
from moe_jax.models import Model, ModelConfig
from moe_jax.new_folder import check_free, draft_of

_MOST_FAULTS = 4
_FIVE_GB = 5_000_000_000
# Settings that stand under other names in what is written here.
_OTHER_STYLE = ("dtype", "rope_parameters")


def to_hub(tree: Any, config: ModelConfig) -> dict[str, np.ndarray]:
  """Returns a tree of the parameters' shape under the hub's keys and in the hub's layout.

  Values are moved and never computed with, so gradients may be given as well as parameters.

  Args:
    tree: a model, its state, the state of its parameters alone, or nested mappings of that shape.
    config: the model's; with `mtp_depth` = 0, layers of multi-token prediction are left out.

  Returns:
    One array a tensor of the checkpoint. Tensors of variables that the tree lacks, as gradients
    lack the selection bias, are left out.

  Raises:
    UserError: no architecture of the hub has such models, or leaves that do not fit the config.
  """
  leaves = _leaves(tree, config)
  shapes = parameter_shapes(config)
  absent = router_state(config) - set(leaves)
  _check_leaves(leaves, {place: shapes[place] for place in shapes if place not in absent})
  wanted = [
    link
    for link in links(family_of(config).rules, config)
    if absent.isdisjoint(part.path for part in link.slices)
  ]
  return {link.key: tensor for link, tensor in _tensors(wanted, leaves)}


def save_pretrained(
  model: Model,
  config: ModelConfig,
  path: str | Path,
  *,
  like: str | Path | None = None,
  max_file_bytes: int = _FIVE_GB,
) -> None:
  """Writes a checkpoint folder that the original library loads.

  The family follows from the config. The folder appears at once, when it is complete. Memory
  beyond the model holds one tensor on a CPU; with an accelerator, also one parameter stacked over
  its segment's layers.

  Args:
    model: the model; tensors keep their dtypes.
    config: its config; with `mtp_depth` = 0, layers of multi-token prediction are left out.
    path: the folder to write; it must be absent or empty.
    like: a checkpoint folder whose settings of other kinds (ids of special tokens, context length)
      and other files (tokenizer, generation) are copied.
    max_file_bytes: above it the tensors are spread over several files.

  Raises:
    UserError: no architecture of the hub has such models, leaves that do not fit the config, or a
      folder that holds something.
    OSError: the folder cannot be written, or the disk is full; nothing is left then.
  """
  folder = Path(path)
  check_free(folder)
  family = family_of(config)
  leaves = _leaves(model, config)
  _check_leaves(leaves, parameter_shapes(config))
  settings = dict(architecture_settings(family, config))
  settings["torch_dtype"] = str(_embedding(leaves).dtype)
  if like is not None:
    settings = _over(_other_settings(Path(like), settings), settings)
  with draft_of(folder) as draft:
    _write(draft, links(family.rules, config), leaves, settings, max_file_bytes)
    if like is not None:
      _copy_companions(Path(like), draft)


def _write(folder: Path, wanted: list[Link], leaves, settings, max_file_bytes: int) -> None:
  specs = [TensorSpec(link.key, link.shape, _dtype(link, leaves)) for link in wanted]
  tensors = _tensors(wanted, leaves)
  write_tensors(folder, specs, lambda _: next(tensors)[1], max_file_bytes)
  text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
  (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _dtype(link: Link, leaves: Mapping[Place, jax.Array]) -> np.dtype:
  return np.result_type(*(leaves[part.path].dtype for part in link.slices))


def _tensors(
  wanted: list[Link], leaves: Mapping[Place, jax.Array]
) -> Iterator[tuple[Link, np.ndarray]]:
  """Yields the tensors in order, one parameter's after another, one in memory at a time."""
  for places, group in itertools.groupby(wanted, lambda link: [s.path for s in link.slices]):
    arrays = {place: _on_host(leaves[place]) for place in places}
    for link in group:
      yield link, link.transform.to_hub(*(arrays[s.path][s.index] for s in link.slices))


def _on_host(array: jax.Array) -> np.ndarray:
  if isinstance(array, jax.Array):
    # The copy that NumPy makes of an accelerator's array would stay with the array.
    array = jax.device_put(array, jax.local_devices(backend="cpu")[0])
  return np.asarray(array)


def _embedding(leaves: Mapping[Place, jax.Array]) -> jax.Array:
  return next(leaf for place, leaf in leaves.items() if place[-1] == "embedding")


def _leaves(tree: Any, config: ModelConfig) -> dict[Place, jax.Array]:
  leaves = flat_leaves(tree)
  if config.mtp_depth:
    return leaves
  return {place: leaf for place, leaf in leaves.items() if place[0] != "mtp"}


def _check_leaves(leaves: Mapping[Place, Any], shapes: Mapping[Place, tuple[int, ...]]) -> None:
  """Raises UserError unless the tree has exactly these leaves, of these shapes."""
  faults = [f"{_name(place)} is missing" for place in shapes if place not in leaves]
  for place, leaf in leaves.items():
    if place not in shapes:
      faults.append(f"{_name(place)} has no place in it")
    elif tuple(np.shape(leaf)) != shapes[place]:
      faults.append(f"{_name(place)} has the shape {np.shape(leaf)}, expected {shapes[place]}")
  if faults:
    rest = len(faults) - _MOST_FAULTS
    more = f"; and {rest} more" if rest > 0 else ""
    raise UserError(f"the tree does not fit the config: {'; '.join(faults[:_MOST_FAULTS])}{more}")


def _name(place: Place) -> str:
  return ".".join(map(str, place))


def _other_settings(folder: Path, own: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of a checkpoint that this library does not write.

  Raises:
    UserError: it is a checkpoint of another architecture.
  """
  hub = read_hub_config(folder)
  if hub.get("model_type", own["model_type"]) != own["model_type"]:
    raise UserError(
      f"like = {folder} is a checkpoint of {hub.get('model_type')}; expected one of"
      f" {own['model_type']}"
    )
  return hub.values


def _over(others: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
  """Returns settings with our own over the others', also in sections that are models' settings."""
  merged = {name: value for name, value in others.items() if name not in _OTHER_STYLE} | dict(own)
  for name, value in own.items():
    if isinstance(value, Mapping) and "model_type" in value:
      merged[name] = _over(others.get(name) or {}, value)
  return merged


def _copy_companions(source: Path, target: Path) -> None:
  """Copies the files of a checkpoint that are neither weights nor settings nor code."""
  for path in sorted(source.iterdir()):
    weights = path.name == INDEX_FILE or path.name == CONFIG_FILE
    if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja") and not weights:
      shutil.copyfile(path, target / path.name)
