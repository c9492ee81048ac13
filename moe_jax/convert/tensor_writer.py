"""Writing safetensors files tensor by tensor; the library's writer needs all of them in memory.

The format: the length of the header in 8 bytes, little-endian; the header, JSON with the type,
shape and place of every tensor; the tensors' bytes without gaps, row-major, little-endian.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moe_jax.convert.tensor_files import INDEX_FILE, SINGLE_FILE

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Readers map the tensors as they lie, so they start at a multiple of the largest item.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """What a file says of a tensor before its bytes."""

  key: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def num_bytes(self) -> int:
    """Returns the size of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
  folder: Path,
  specs: Sequence[TensorSpec],
  tensor: Callable[[int], np.ndarray],
  max_file_bytes: int,
) -> None:
  """Writes tensors to one file, or to several with an index where one would be too large.

  Args:
    folder: where to.
    specs: of all tensors.
    tensor: returns the tensor of a spec by its number; asked for each once, in order.
    max_file_bytes: a file's tensors together are at most this, or one tensor.
  """
  shards = _shards(specs, max_file_bytes)
  names = [SINGLE_FILE]
  if len(shards) > 1:
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i, _ in enumerate(shards)]
    _write_index(folder, specs, shards, names)
  for name, shard in zip(names, shards, strict=True):
    _write_file(folder / name, [specs[i] for i in shard], (tensor(i) for i in shard))


def _shards(specs: Sequence[TensorSpec], limit: int) -> list[range]:
  shards, start, size = [], 0, 0
  for i, spec in enumerate(specs):
    if i > start and size + spec.num_bytes > limit:
      shards.append(range(start, i))
      start, size = i, 0
    size += spec.num_bytes
  return [*shards, range(start, len(specs))]


def _write_index(folder, specs, shards, names) -> None:
  places = {specs[i].key: name for name, shard in zip(names, shards, strict=True) for i in shard}
  index = {
    "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
    "weight_map": dict(sorted(places.items())),
  }
  (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, specs: list[TensorSpec], tensors) -> None:
  # PyTorch's readers look for this entry.
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  end = 0
  for spec in specs:
    start, end = end, end + spec.num_bytes
    header[spec.key] = {
      "dtype": _TYPES[spec.dtype.name],
      "shape": list(spec.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGNMENT)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for spec, tensor in zip(specs, tensors, strict=True):
      file.write(np.ascontiguousarray(tensor, spec.dtype.newbyteorder("<")).view(np.uint8).data)
