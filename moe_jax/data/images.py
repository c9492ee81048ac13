"""Images beside their texts: fitted once when data are prepared, one a record.

A record holds one document: bos, the places that the tower's tokens take, the text. Targets are the
text and its eos; nothing is predicted of an image. On disk it is the image's channels, rows and
columns, a byte each, and then bos, text and eos in the integers of other records. A text that is
longer than what the image leaves of a record is cut there.
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.packing import FIELDS, PackingCounts, Piece, Record, SpecialIds
from moe_jax.errors import UserError

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
  """What becomes of the image of a document; a model's `vision` must agree.

  Attributes:
    size: rows and columns: the middle of the image, as large a square as there is, resized to this.
    tokens: places in a record that an image takes.
    token: the id in these places; no text may hold it.
    channels: 3 for colour, 1 for grey.
  """

  size: int
  tokens: int
  token: int
  channels: int = 3

  def __post_init__(self):
    for name, least in (("size", 1), ("tokens", 1), ("token", 0)):
      value = getattr(self, name)
      if value < least:
        raise UserError(f"{name} = {value} is refused: it must be at least {least}")
    if self.channels not in _MODES:
      raise UserError(f"channels = {self.channels} is refused: expected 3 (colour) or 1 (grey)")

  @property
  def shape(self) -> tuple[int, int, int]:
    """Returns (channels, rows, columns)."""
    return self.channels, self.size, self.size


def read_image(path: Path) -> np.ndarray:
  """Returns the image in a file as it is shown, (rows, columns, 3) uint8, on white if transparent.

  Raises:
    UserError: there is none, or Pillow is not there.
  """
  check_pillow(str(path))
  from PIL import Image, ImageOps

  try:
    with warnings.catch_warnings(), Image.open(path) as picture:
      warnings.simplefilter("ignore")  # of odd colours, and of pixels by the hundred million
      if picture.mode in _DEEP:
        raise UserError(
          f"{path} has more than 8 bits a channel (mode {picture.mode}); convert it to 8 first"
        )
      upright = ImageOps.exif_transpose(picture).convert("RGBA")
      white = Image.new("RGBA", upright.size, "white")
      return np.asarray(Image.alpha_composite(white, upright).convert("RGB"))
  # The next two are of damaged PNGs, the last of images that would fill the memory.
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(f"{path} cannot be read as an image ({error})") from error


def check_pillow(what: str) -> None:
  """Refuses to go on without the package that reads images."""
  if importlib.util.find_spec("PIL") is None:
    raise UserError(
      f"{what} needs Pillow to be read: install moe_jax's extra images, or pip install pillow."
    )


def fit_image(image: np.ndarray, config: ImageConfig) -> np.ndarray:
  """Returns the middle of an image (rows, columns, 1 or 3) uint8, as `config.shape` uint8."""
  from PIL import Image, ImageOps

  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  picture = picture.convert(_MODES[config.channels])
  # Bicubic in Pillow is antialiased: every pixel counts, however much smaller the image becomes.
  square = ImageOps.fit(picture, (config.size, config.size), Image.Resampling.BICUBIC)
  return np.moveaxis(np.asarray(square).reshape(config.size, config.size, -1), -1, 0)


def pixel_values(images: np.ndarray) -> np.ndarray:
  """Maps bytes to float32 from -1 to 1, as the released processor of Llama 4 does."""
  return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


class ImagePacker:
  """Makes a record of each document; otherwise as `moe_jax.data.packing.Packer`.

  Attributes:
    counts: totals over all records made so far.
    room: tokens of text in a record.
    record_bytes: of the longest record on disk.
  """

  def __init__(
    self, sequence_length: int, special: SpecialIds, dtype: np.dtype, config: ImageConfig
  ) -> None:
    self._length, self._special, self._dtype = sequence_length, special, np.dtype(dtype)
    self._config = config
    self.counts = PackingCounts()
    self.room = sequence_length - 1 - config.tokens
    self.record_bytes = int(np.prod(config.shape)) + (self.room + 2) * self._dtype.itemsize

  def add(self, pieces: Sequence[Piece]) -> list[bytes]:
    """Returns the records of documents, each of one piece, as they lie on disk.

    Raises:
      UserError: a text holds the id of images.
    """
    return [self._record(piece) for piece in pieces]

  def finish(self) -> list[bytes]:
    """Returns nothing: no record waits for another document."""
    return []

  def state(self) -> dict[str, Any]:
    """Returns what JSON can hold of a packer between two calls."""
    return {"counts": dataclasses.asdict(self.counts)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where `state` was taken."""
    self.counts = PackingCounts(**state["counts"])

  def _record(self, piece: Piece) -> bytes:
    if self._config.token in piece.tokens:
      raise UserError(
        f"a text holds the id {self._config.token}, which data.image.token gives to images; choose"
        " an id there that the tokenizer does not make of this text"
      )
    text = np.concatenate([[self._special.bos], piece.tokens, [self._special.eos]])
    text = text[: self.room + 2].astype(self._dtype)
    self.counts.documents += 1
    self.counts.records += 1
    self.counts.target_tokens += len(text) - 1
    self.counts.padding_positions += self.room + 2 - len(text)
    return piece.image.tobytes() + text.tobytes()


def unpack_images(
  payloads: Sequence[bytes], length: int, pad: int, dtype: np.dtype, config: ImageConfig
) -> Record:
  """Returns the rows of what lies on disk: the fields of other records, and `pixel_values`.

  Args:
    payloads: from `ImagePacker.add`.
    length: L.
    pad: the id of padding.
    dtype: the type of the tokens on disk.
    config: of the images.

  Returns:
    (len(payloads), L) int32 arrays, `pixel_values` (len(payloads), channels, rows, columns) float32
    from -1 to 1.

  Raises:
    ValueError: a payload is no record of this length.
  """
  size, image = int(np.prod(config.shape)), [config.token] * config.tokens
  rows = {name: np.zeros((len(payloads), length), np.int32) for name in FIELDS}
  rows["tokens"][:], rows["targets"][:] = pad, pad
  for row, payload in enumerate(payloads):
    text = np.frombuffer(payload, dtype, offset=size)
    stream = np.concatenate([text[:1], image, text[1:]])
    end = len(stream) - 1
    rows["tokens"][row, :end], rows["targets"][row, :end] = stream[:-1], stream[1:]
    rows["segment_ids"][row, :end], rows["positions"][row, :end] = 1, np.arange(end)
    rows["loss_mask"][row, config.tokens : end] = 1
  pixels = np.stack([np.frombuffer(payload, np.uint8, size) for payload in payloads])
  return {**rows, "pixel_values": pixel_values(pixels.reshape(-1, *config.shape))}
