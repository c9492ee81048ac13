"""The commands `moe-jax data prepare`, `verify` and `train-tokenizer`."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_jax.config import dataclass_from, import_modules, section
from moe_jax.data.builders import PreparedSource, prepare, verify
from moe_jax.data.config import DataConfig
from moe_jax.data.splits import Split
from moe_jax.data.tokenizer_training import TokenizerKind, train_sentencepiece
from moe_jax.training.config import experiment_from


def prepare_data(args: SimpleNamespace) -> None:
  """Makes what is not there of a config's data set, and says what was met in it."""
  config = _data_config(args)
  if config.image is not None:
    experiment_from(args.config.to_dict())  # Refuses a tower that could not read them.
  data = prepare(config, on_the_way=False)
  for source in data.sources:
    print("\n".join(_lines(source)))
  print(f"fingerprint {data.fingerprint}")


def verify_data(args: SimpleNamespace) -> None:
  """Reads every file of a config's data set; the first that is not what was written is an error."""
  for source in verify(_data_config(args)):
    files = (*source.manifest.shards, *source.manifest.texts)
    size = sum(file.size for file in files) / 1e6
    print(f"{source.manifest.source}: {len(files)} files, {size:.1f} MB, as written")


def train_tokenizer(args: SimpleNamespace) -> None:
  """Trains a SentencePiece model on the training documents of a config's sources."""
  # The tokenizer of the config may be the one to be trained.
  config = _data_config(args, tokenizer="bytes")
  size = train_sentencepiece(
    config.parts,
    Path(args.out),
    vocab_size=args.vocab_size,
    kind=args.kind,
    text_bytes=args.megabytes << 20,
  )
  print(f"{args.out}: {size} ids, {TokenizerKind(args.kind)}")
  print(f"use it with --config.data.tokenizer={args.out}")


def _data_config(args: SimpleNamespace, **changes: Any) -> DataConfig:
  sections: dict[str, Any] = section(args.config.to_dict(), "config")
  import_modules(sections)  # They may register corpora.
  fields = section(sections.get("data", {}), "config.data") | changes
  return dataclass_from(DataConfig, fields, "config.data")


def _lines(source: PreparedSource) -> Iterator[str]:
  """Yields what a user should know about a data set."""
  manifest, met = source.manifest, source.manifest.met
  length = manifest.sequence_length
  yield f"{manifest.source} in {source.folder}"
  yield f"  {met.documents:,} documents, {met.bytes:,} bytes of text"
  for split in Split:
    packed = manifest.facts(split).packing
    records = f"{packed.records:,} records of {length} tokens"
    yield f"  {split}: {packed.documents:,} documents, {records}"
  counts = {
    "empty documents left out": met.empty_documents,
    "documents with invalid UTF-8, replaced by U+FFFD": met.repaired_documents,
    "NUL bytes kept": met.nul_bytes,
    "files of no known format, or hidden, not read": met.ignored_files,
  }
  yield from (f"  {count:,} {what}" for what, count in counts.items() if count)
  if met.longer_than_context and manifest.image is not None:
    yield (
      f"  {met.longer_than_context:,} texts are cut at the end of their record; longer records:"
      " --config.data.sequence_length"
    )
  elif met.longer_than_context:
    yield (
      f"  {met.longer_than_context:,} documents are longer than a record and go on in the next one"
      " without what came before; longer records: --config.data.sequence_length"
    )
