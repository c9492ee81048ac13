"""Trains SentencePiece models (arXiv 1808.06226) that lose nothing of a text."""

import enum
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_jax.choices import as_choice
from moe_jax.data.documents import open_source
from moe_jax.data.sources import SourceConfig
from moe_jax.data.splits import Split, split_of
from moe_jax.errors import UserError

# SentencePiece passes over what is longer than its limit; text is cut below it instead.
_SENTENCE_BYTES = 4096
_SPECIAL = 4
_BYTES = 256


class TokenizerKind(enum.StrEnum):
  """How pieces are found."""

  BPE = "bpe"
  UNIGRAM = "unigram"


def train_sentencepiece(
  sources: Sequence[SourceConfig],
  path: Path,
  *,
  vocab_size: int,
  kind: str = "bpe",
  text_bytes: int = 64 << 20,
) -> int:
  """Trains on the first training documents of each source and writes a `.model`.

  Ids 0, 1 and 2 are pad, bos and eos, as of bytes; 3 is never used, because what no piece covers is
  spelt in bytes. Nothing is normalised, so that decoding gives back the text.

  Args:
    sources: where documents come from; their weights play no part.
    path: the file to write.
    vocab_size: ids, the special ones and 256 bytes included.
    kind: `bpe` or `unigram`.
    text_bytes: of each source.

  Returns:
    The number of ids.

  Raises:
    UserError: a source cannot be read, the text is too little for so many ids, or the library is
      not installed.
  """
  kind = as_choice(TokenizerKind, "kind", kind)
  if vocab_size <= _SPECIAL + _BYTES:
    raise UserError(
      f"vocab_size = {vocab_size} is refused: {_SPECIAL} special ids and {_BYTES} bytes are among"
      f" them; give more than {_SPECIAL + _BYTES}"
    )
  if path.suffix != ".model":
    raise UserError(f"--out={path} is refused: the name of a SentencePiece model ends in .model")
  data = _train(_sentences(sources, text_bytes), vocab_size, kind)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)
  return vocab_size


def _train(sentences: Iterator[str], vocab_size: int, kind: TokenizerKind) -> bytes:
  try:
    import sentencepiece
  except ImportError:
    raise UserError(
      "training a tokenizer needs the package sentencepiece, which is not installed: pip install"
      " 'moe_jax[hf]'"
    ) from None
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      model_type=kind.value,
      vocab_size=vocab_size,
      max_sentence_length=2 * _SENTENCE_BYTES,
      byte_fallback=True,
      character_coverage=0.9995,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      minloglevel=2,
    )
  except RuntimeError as error:
    # Before that the library names a line of its own source.
    reason = " ".join(str(error).rpartition("] ")[2].split()).rstrip(".")
    raise UserError(
      f"no vocabulary of {vocab_size} ids can be learned from this text ({reason}); give another"
      " vocab_size, or more text"
    ) from error
  return model.getvalue()


def _sentences(sources: Sequence[SourceConfig], text_bytes: int) -> Iterator[str]:
  """Yields the lines of the first training documents, long ones in parts."""
  for config in sources:
    room = text_bytes
    for text in _training_text(config):
      for line in text.decode(errors="replace").splitlines():
        for start in range(0, len(line), _SENTENCE_BYTES // 4):
          # SentencePiece takes a NUL for the end of the line.
          yield line[start : start + _SENTENCE_BYTES // 4].replace("\0", " ")
      room -= len(text)
      if room <= 0:
        break


def _training_text(config: SourceConfig) -> Iterator[bytes]:
  """Yields the text of training documents, whose rule is that of preparing."""
  source, index = open_source(config), 0
  held_streams = source.heldout_streams
  for stream in range(held_streams, source.streams):
    for stretch in source.stretches(stream):
      if not stretch.text and stretch.first and stretch.last:
        continue
      if held_streams or split_of(index) == Split.TRAIN:
        yield stretch.text
      index += stretch.last
