"""Files of text in every format that is read, and what is made of them."""

import gzip
import json
import lzma
import struct

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.splits import Split

# One more than it takes to hold two out.
TEXTS = tuple(f"text {i}, naïve\n" + "word " * i for i in range(33))


def example(text: str | bytes, name: str = "text") -> bytes:
  """Returns a serialised tf.train.Example."""
  proto = tf_example_pb2.Example()
  data = text.encode() if isinstance(text, str) else text
  proto.features.feature[name].bytes_list.value.append(data)
  return proto.SerializeToString()


def write_tfrecord(path, records) -> None:
  # Checksums are not looked at.
  path.write_bytes(b"".join(struct.pack("<QI", len(r), 0) + r + b"\0\0\0\0" for r in records))


def write_array_record(path, records) -> None:
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def write_parquet(path, texts) -> None:
  pyarrow.parquet.write_table(pyarrow.table({"text": list(texts), "n": range(len(texts))}), path)


def json_lines(texts) -> bytes:
  return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


WRITERS = {
  "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
  "a.json.gz": lambda path, texts: path.write_bytes(gzip.compress(json_lines(texts))),
  "a.jsonl.xz": lambda path, texts: path.write_bytes(lzma.compress(json_lines(texts))),
  "a.parquet": write_parquet,
  "a.tfrecord": lambda path, texts: write_tfrecord(path, map(example, texts)),
  "a.array_record-00000-of-00001": lambda path, texts: write_array_record(
    path, map(example, texts)
  ),
}


def prepared(source, data_dir, length=16):
  """Prepares one source."""
  config = DataConfig(sources=(str(source),), sequence_length=length, data_dir=str(data_dir))
  return prepare(config)


def decoded(data, split=Split.TRAIN) -> list[str]:
  """Returns the documents of a split, read back from the targets of its records."""
  records = data.train if split == Split.TRAIN else data.heldout
  ids = [t for r in records for t in r["targets"][r["loss_mask"] == 1].tolist()]
  documents, start = [], 0
  for end, token in enumerate(ids):
    if token == data.tokenizer.eos_id:
      documents.append(data.tokenizer.decode(ids[start:end]))
      start = end + 1
  return documents
