"""Write a bundled corpus, and tell the digests that its note records."""

import hashlib
import json
import lzma
import pathlib
from collections.abc import Sequence
from typing import Any


def check_digest(path: pathlib.Path, expected: str) -> None:
  """Ends the program unless a file has this SHA-256."""
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != expected:
    raise SystemExit(f"{path} has SHA-256 {found}, expected {expected}")


def write_corpus(folder: pathlib.Path, name: str, documents: Sequence[dict[str, Any]]) -> None:
  """Writes `NAME.jsonl.xz`, one JSON object a line, UTF-8, and prints what its note records.

  The lines are the same everywhere; the xz around them may differ between versions of liblzma.
  """
  lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents).encode()
  packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
  (folder / f"{name}.jsonl.xz").write_bytes(packed)
  text_bytes = sum(len(each["text"].encode()) for each in documents)
  print(f"documents {len(documents)}, text bytes {text_bytes}")
  print(f"jsonl {len(lines)} bytes, sha256 {hashlib.sha256(lines).hexdigest()}")
  print(f"xz {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")
