"""The tensors of a checkpoint folder: safetensors files, one or several with an index."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = ("F64", "F32", "F16", "BF16")


class TensorFiles:
  """Open files of a checkpoint; only headers are read until a tensor is asked for.

  Attributes:
    shapes: of every tensor by its key.
    faults: what is wrong with the files, one phrase each.
    complete: all files could be opened, so that a key that `shapes` lacks is in none of them.
  """

  def __init__(self):
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.faults: list[str] = []
    self.complete = True
    self._files = {}

  def read(self, key: str) -> np.ndarray:
    """Reads one tensor into memory."""
    return self._files[key].get_tensor(key)

  def add(self, name: str, file, expected: set[str] | None) -> None:
    """Enters the tensors of an open file; `expected` are those the index says it has."""
    for key in file.keys():
      view = file.get_slice(key)
      if view.get_dtype() not in _DTYPES:
        self.faults.append(
          f"{key} is of the type {view.get_dtype()}, expected one of {', '.join(_DTYPES)}"
        )
      if key in self.shapes:
        self.faults.append(f"{key} is in {name} and in another file")
      self.shapes[key], self._files[key] = tuple(view.get_shape()), file
    for key in sorted((expected or set()) - set(file.keys())):
      self.faults.append(f"{INDEX_FILE} looks for {key} in {name}, which lacks it")


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[TensorFiles]:
  """Opens the files of a folder. What is wrong with them is in `faults`; nothing is raised.

  Reads safetensors alone: a pickle runs the code that it holds.
  """
  tensors = TensorFiles()
  with contextlib.ExitStack() as stack:
    found = _files(folder, tensors.faults)
    tensors.complete = not tensors.faults
    for name, expected in found.items():
      file = _open(folder / name, stack, tensors.faults)
      if file is None:
        tensors.complete = False
      else:
        tensors.add(name, file, expected)
    yield tensors


def _open(path: Path, stack: contextlib.ExitStack, faults: list[str]):
  """Returns the open file, or None and an entry in `faults`."""
  if path.suffix != _SUFFIX:
    faults.append(f"{INDEX_FILE} names {path.name!r}, which is no {_SUFFIX} file")
  elif not path.exists():
    faults.append(f"{path.name} is missing")
  elif not path.is_file():
    faults.append(f"{path.name} is not a file")
  else:
    try:
      # Reads what is asked for; mapped files would count as memory of this process.
      return stack.enter_context(safe_open(path, framework="np", backend="pread"))
    except SafetensorError as error:
      phrase = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
      faults.append(f"{path.name} is truncated or damaged ({phrase})")
    except OSError as error:
      faults.append(f"{path.name} cannot be read ({error})")
  return None


def _files(folder: Path, faults: list[str]) -> dict[str, set[str] | None]:
  """Returns the names of the files, with the keys that the index expects in each."""
  if (folder / SINGLE_FILE).exists():
    return {SINGLE_FILE: None}
  if (folder / INDEX_FILE).exists():
    return _indexed_files(folder / INDEX_FILE, faults)
  pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
  if pickles:
    faults.append(
      f"its weights are pickles ({pickles[0]}), which run code when they are read: expected"
      f" {SINGLE_FILE}, save it again as safetensors"
    )
  else:
    faults.append(f"it has neither {SINGLE_FILE} nor {INDEX_FILE}")
  return {}


def _file_name(name: Any) -> str:
  if not (isinstance(name, str) and name.isprintable()):
    raise ValueError(name)
  return name


def _indexed_files(path: Path, faults: list[str]) -> dict[str, set[str]]:
  try:
    keys = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    places = sorted((_file_name(name), key) for key, name in keys.items())
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    faults.append(f"{INDEX_FILE} is damaged: expected JSON with the names of files in 'weight_map'")
    return {}
  files: dict[str, set[str]] = {}
  for name, key in places:
    files.setdefault(name, set()).add(key)
  outside = [name for name in files if name != Path(name).name or name in ("", ".", "..")]
  for name in outside:
    faults.append(f"{INDEX_FILE} points outside the folder, to {name!r}")
    del files[name]
  return files
