"""Readers of text files, one a format; a file's suffix alone says which.

| suffix | a document |
|---|---|
| `.txt` | the file, or each of its lines (`documents=line`) |
| `.jsonl`, `.json` | the text field of each line, one JSON object a line |
| `.parquet` | the text column of each row |
| `.tfrecord`, `.array_record` | the text feature of each record, a tf.train.Example |

`.gz` or `.xz` may follow the first two, and `-00000-of-00001` the last. Text is yielded as the
bytes that were found; whether they are UTF-8 is looked at later, once for all formats.
"""

import contextlib
import dataclasses
import gzip
import json
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moe_jax.choices import did_you_mean
from moe_jax.data.sources import DocumentUnit, SourceConfig
from moe_jax.errors import UserError

# Memory follows from these two: what is read of a .txt file at once, and the longest record.
STRETCH_BYTES = 4 << 20
_RECORD_BYTES = 256 << 20
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}


class Stretch(NamedTuple):
  """A document, or a part of a long one.

  Attributes:
    text: what the file holds, in UTF-8 if the file is right.
    first, last: whether the document begins or ends here.
    offset: bytes of the file read so far.
    image: (rows, columns, channels) uint8 beside the text, of sources that have images.
  """

  text: bytes
  first: bool
  last: bool
  offset: int
  image: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class InputFile:
  """A file of documents: where it is, its name within its source, its size in bytes."""

  path: str
  name: str
  size: int

  def open(self) -> BinaryIO:
    """Opens the file as it lies on disk or in its bucket."""
    return open_binary(self.path)


def open_binary(path: str) -> BinaryIO:
  """Opens a local file, or one in a bucket."""
  if "://" not in path:
    return open(path, "rb")
  from etils import epath

  return epath.Path(path).open("rb")


def format_of(name: str) -> str | None:
  """Returns the format that a file's suffix names; None if none."""
  found = re.search(r"\.(txt|jsonl|json)(\.gz|\.xz)?$|\.(parquet)$", name)
  if found:
    return found[1] or found[3]
  found = re.search(r"\.(tfrecord|array_?record)(-\d+-of-\d+)?$", name)
  return found[1].replace("arrayrecord", "array_record") if found else None


def read_documents(file: InputFile, config: SourceConfig) -> Iterator[Stretch]:
  """Yields the documents of a file, in order.

  Raises:
    UserError: the file is empty where its format has no empty files, is damaged, or lacks the text
      field; names file, place and what mends it.
  """
  kind = format_of(file.name)
  if file.size == 0 and kind != "txt":
    raise UserError(f"{file.path} is empty; download or write it again, or delete it.")
  try:
    yield from _READERS[kind](file, config)
  except OSError as error:
    if error.filename is None:  # Of a library that reads a format, as gzip.
      raise _damaged(file, str(error)) from error
    raise UserError(
      f"{file.path} cannot be read ({error.strerror or error}); mend its permissions or delete it."
    ) from error
  except (EOFError, lzma.LZMAError, zlib.error) as error:
    raise _damaged(file, str(error)) from error


def _damaged(file: InputFile, reason: str) -> UserError:
  return UserError(
    f"{file.path} is damaged or no .{format_of(file.name)} file ({' '.join(reason.split())});"
    " download or write it again, or delete it."
  )


@contextlib.contextmanager
def _unpacked(file: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
  """Opens a file that may be compressed; gives what it holds, and the file as it lies there."""
  with file.open() as raw:
    unpack = next((_COMPRESSED[end] for end in _COMPRESSED if file.name.endswith(end)), None)
    yield raw if unpack is None else unpack(raw), raw


def _lines(file: InputFile, limit: int) -> Iterator[tuple[bytes, int]]:
  """Yields lines, those of more than `limit` bytes in parts, and how far the file is read."""
  with _unpacked(file) as (stream, raw):
    offset = 0
    while line := stream.readline(limit):
      offset += len(line)
      yield line, offset if stream is raw else raw.tell()


def _read_text(file: InputFile, config: SourceConfig) -> Iterator[Stretch]:
  if config.documents == DocumentUnit.LINE:
    return _whole_characters(_text_lines(file))
  return _whole_characters(_whole_file(file))


def _text_lines(file: InputFile) -> Iterator[Stretch]:
  first = True
  for line, offset in _lines(file, STRETCH_BYTES):
    last = line.endswith(b"\n")
    yield Stretch(line.removesuffix(b"\n").removesuffix(b"\r"), first, last, offset)
    first = last
  if not first:
    yield Stretch(b"", False, True, file.size)


def _whole_file(file: InputFile) -> Iterator[Stretch]:
  """Yields one document in stretches that end, if they can, at the end of a line."""
  with _unpacked(file) as (stream, raw):
    rest, first = b"", True
    while data := stream.read(STRETCH_BYTES):
      if len(data) < STRETCH_BYTES and stream is raw:
        rest += data
        break
      end = data.rfind(b"\n") + 1 or len(data)
      yield Stretch(rest + data[:end], first, False, raw.tell())
      rest, first = data[end:], False
  yield Stretch(rest, first, True, file.size)


def _whole_characters(stretches: Iterator[Stretch]) -> Iterator[Stretch]:
  """Moves a character that was cut in two, at the end of a stretch, to the next one."""
  rest = b""
  for stretch in stretches:
    text, rest = rest + stretch.text, b""
    if not stretch.last:
      keep = len(text) - _cut_character(text)
      text, rest = text[:keep], text[keep:]
    yield stretch._replace(text=text)


def _cut_character(text: bytes) -> int:
  """Returns how many bytes at the end begin a UTF-8 character that is not complete."""
  for back in range(1, min(4, len(text) + 1)):
    byte = text[-back]
    if byte & 0xC0 != 0x80:
      length = 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4 if byte >> 3 == 30 else 1
      return back if length > back else 0
  return 0


def _read_json_lines(file: InputFile, config: SourceConfig) -> Iterator[Stretch]:
  for number, (line, offset) in enumerate(_lines(file, _RECORD_BYTES), start=1):
    if len(line) == _RECORD_BYTES and not line.endswith(b"\n"):
      raise UserError(
        f"{file.path}, line {number} is longer than {_RECORD_BYTES >> 20} MiB; cut that document"
        " into several, or write it as a .txt file, whose size has no limit."
      )
    if line.isspace():
      yield Stretch(b"", True, True, offset)
      continue
    yield Stretch(_json_text(line, f"{file.path}, line {number}", config.text), True, True, offset)


def _json_text(line: bytes, place: str, field: str) -> bytes:
  try:
    # Bytes that are no UTF-8 stay what they are, and are counted with those of other formats.
    entry = json.loads(line.decode(errors="surrogateescape"))
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{place} is no JSON ({' '.join(str(error).split())}); .jsonl needs one object a line,"
      " mend or delete that line."
    ) from None
  return text_of(entry, field, place)


def text_of(entry: Any, field: str, place: str) -> bytes:
  """Returns the text of a record with fields; what is null is empty.

  Args:
    entry: a mapping.
    field: the name of the one with the text.
    place: where the record is, for the sentence.

  Raises:
    UserError: no such field, or one that is no text.
  """
  if not isinstance(entry, dict):
    raise UserError(f"{place} is {type(entry).__name__}, expected an object with field {field!r}.")
  if field not in entry:
    names = [str(name) for name in entry]
    hint = did_you_mean(field, names)
    raise UserError(f"{place} has no field {field!r}; {hint} (option text=FIELD of the source)")
  value = entry[field]
  if value is None:
    return b""
  if isinstance(value, bytes):
    return value
  if shape := getattr(value, "shape", ()):
    raise UserError(
      f"{place} has an array of shape {shape} in field {field!r}, expected text; images and numbers"
      " are not read: name a field of text by the option text=FIELD of the source."
    )
  if not isinstance(value, str):
    raise UserError(
      f"{place} has {type(value).__name__} in field {field!r}, expected text; name another field"
      " by the option text=FIELD of the source."
    )
  try:
    return value.encode(errors="surrogateescape")
  except UnicodeEncodeError:
    return value.encode(errors="surrogatepass")


def _read_parquet(file: InputFile, config: SourceConfig) -> Iterator[Stretch]:
  import pyarrow
  import pyarrow.parquet

  row = 0
  try:
    with file.open() as raw:
      table = pyarrow.parquet.ParquetFile(raw)
      names = table.schema_arrow.names
      if config.text not in names:
        text_of(dict.fromkeys(names), config.text, file.path)
      rows = max(table.metadata.num_rows, 1)
      for batch in table.iter_batches(batch_size=256, columns=[config.text]):
        for value in batch.column(0):
          row += 1
          text = text_of({config.text: _plain(value)}, config.text, f"{file.path}, row {row}")
          yield Stretch(text, True, True, file.size * row // rows)
  except (pyarrow.ArrowException, OSError) as error:
    raise _damaged(file, str(error)) from error


def _plain(value: Any) -> Any:
  """Returns a value of Arrow; text as the bytes that are stored, which need not be UTF-8."""
  import pyarrow

  kind = value.type
  if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
    buffer = value.as_buffer()
    return None if buffer is None else buffer.to_pybytes()
  return value.as_py()


def _read_tfrecord(file: InputFile, config: SourceConfig) -> Iterator[Stretch]:
  decode = example_decoder(config.text)
  for number, (record, offset) in enumerate(tfrecords(file), start=1):
    yield Stretch(decode(record, f"{file.path}, record {number}"), True, True, offset)


def tfrecords(file: InputFile) -> Iterator[tuple[bytes, int]]:
  """Yields the records of a TFRecord file, and how far it has been read after each.

  A record is its length (64 bits), a checksum of that, the data and a checksum of them.
  """
  with file.open() as raw:
    offset = 0
    while header := raw.read(12):
      length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
      # A file of another format gives a length that the file has no room for.
      if not 0 <= length <= min(file.size - offset - 16, _RECORD_BYTES):
        raise _damaged(file, f"no whole record at byte {offset}")
      data = raw.read(length + 4)[:length]
      if len(data) < length:
        raise _damaged(file, f"no whole record at byte {offset}")
      offset += length + 16
      yield data, offset


def _read_array_record(file: InputFile, config: SourceConfig) -> Iterator[Stretch]:
  if "://" in file.path:
    raise UserError(
      f"{file.path} is in a bucket, where array_record files cannot be read; copy it to a disk."
    )
  from array_record.python import array_record_module

  decode = example_decoder(config.text)
  try:
    reader = array_record_module.ArrayRecordReader(file.path)
    count = reader.num_records()
    if not count:
      raise _damaged(file, "it has no records")
    for start in range(0, count, 64):
      records = reader.read(start, min(start + 64, count))
      for number, record in enumerate(records, start=start + 1):
        text = decode(record, f"{file.path}, record {number}")
        yield Stretch(text, True, True, file.size * number // count)
  except (RuntimeError, ValueError, IndexError) as error:
    if isinstance(error, UserError):
      raise
    raise _damaged(file, str(error)) from error


def example_decoder(field: str) -> Callable[[bytes, str], bytes]:
  """Returns what reads the text of a serialised tf.train.Example, found at a place."""
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2

  def decode(record: bytes, place: str) -> bytes:
    try:
      features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError:
      raise UserError(
        f"{place} is no tf.train.Example; expected examples with the feature {field!r}."
      ) from None
    names = list(features)
    if field not in names:
      return text_of(dict.fromkeys(names), field, place)
    values = features[field].bytes_list.value
    if len(values) != 1:
      raise UserError(
        f"{place} has {len(values)} byte strings in feature {field!r}, expected one; name another"
        " by the option text=FEATURE of the source."
      )
    return values[0]

  return decode


_READERS = {
  "txt": _read_text,
  "jsonl": _read_json_lines,
  "json": _read_json_lines,
  "parquet": _read_parquet,
  "tfrecord": _read_tfrecord,
  "array_record": _read_array_record,
}
