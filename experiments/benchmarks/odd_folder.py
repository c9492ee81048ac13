"""A folder of many small files, with everything among them that text found in the wild has."""

import dataclasses
import json
from pathlib import Path

from moe_jax.data.manifest import Met

LINE_BYTES = 10_000_000
_FILES_A_FOLDER = 500


@dataclasses.dataclass(frozen=True)
class _Kind:
  """Files of one kind: suffix, content, and what is to be met in each."""

  suffix: str
  content: bytes
  met: Met


def write_odd_folder(folder: Path, files: int) -> Met:
  """Writes so many files, in folders of 500, and two documents of one line of 10 MB.

  Args:
    folder: to write into; made if it is not there.
    files: how many there are to be in all, at least 8.

  Returns:
    What is to be met in them by records shorter than 10 MB, but longer than all other documents.
  """
  kinds, counts = _kinds(), []
  for number in range(files):
    # The two long ones once, and the others in turn.
    kind = kinds[number] if number < len(kinds) else kinds[2 + number % (len(kinds) - 2)]
    path = folder / f"{number // _FILES_A_FOLDER:03d}" / f"{number:06d}{kind.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kind.content)
    counts.append(dataclasses.asdict(kind.met))
  return Met(**{name: sum(each[name] for each in counts) for name in counts[0]})


def _kinds() -> list[_Kind]:
  line = b"ten megabytes " * (LINE_BYTES // 14)
  long = Met(documents=1, bytes=len(line), longer_than_context=1)
  entries = [b'{"text": "one"}', b'{"text": ""}', b'{"text": null}', b"", b'{"text": "n\\u0000"}']
  plain = "naïve words\n".encode()
  replaced = "a\ufffdb\n".encode()
  return [
    _Kind(".txt", line, long),
    _Kind(".jsonl", json.dumps({"text": line.decode()}).encode() + b"\n", long),
    _Kind(".txt", plain, Met(documents=1, bytes=len(plain))),
    _Kind(".txt", b"", Met(empty_documents=1)),
    _Kind(".txt", b"a\xffb\n", Met(documents=1, bytes=len(replaced), repaired_documents=1)),
    _Kind(".txt", b"\0nul\0", Met(documents=1, bytes=5, nul_bytes=2)),
    _Kind(
      ".jsonl",
      b"\n".join(entries) + b"\n",
      Met(documents=2, bytes=5, empty_documents=3, nul_bytes=1),
    ),
    _Kind(".md", b"not read", Met(ignored_files=1)),
  ]
