"""Make the bundled corpus python_3_11.jsonl.xz from Debian's packages of Python 3.11.2.

  apt-get download libpython3.11-stdlib libpython3.11-minimal python3.11-doc
  for each in *.deb; do dpkg-deb -x $each extracted; done
  python -m moe_jax.data.corpora.make_python extracted moe_jax/data/corpora

Documents are the modules at the top of the standard library and the tutorial, the reference and
the how-tos of the documentation, by path. Left out are modules whose name begins with "_", those
that name a copyright holder of their own, and those above 80,000 bytes.
"""

import argparse
import hashlib
import pathlib
from collections.abc import Iterator

from moe_jax.data.corpora.bundling import write_corpus

MODULES = "usr/lib/python3.11"
MANUAL = "usr/share/doc/python3.11/html/_sources"
CHAPTERS = ("howto", "reference", "tutorial")
MOST_BYTES = 80_000
# SHA-256 of all documents, one after the other.
DIGEST = "43b9bf0d1275ce255a940f63bc2570afc385effed5c496e2bbc1b6415a46a3b5"


def read_documents(root: pathlib.Path) -> Iterator[dict[str, str]]:
  """Yields the documents in order."""
  for chapter in CHAPTERS:
    for path in sorted((root / MANUAL / chapter).rglob("*.rst.txt")):
      name = path.relative_to(root / MANUAL).as_posix().removesuffix(".txt")
      yield {"path": f"Doc/{name}", "kind": "documentation", "text": path.read_text("utf-8")}
  for path in sorted((root / MODULES).glob("*.py")):
    text = path.read_text("utf-8")
    small = len(text.encode()) <= MOST_BYTES
    if small and "opyright" not in text and not path.name.startswith("_"):
      yield {"path": f"Lib/{path.name}", "kind": "code", "text": text}


def main() -> None:
  """Writes the corpus into the given directory and prints the digests its note records."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("extracted", type=pathlib.Path)
  parser.add_argument("directory", type=pathlib.Path)
  arguments = parser.parse_args()
  documents = list(read_documents(arguments.extracted))
  found = hashlib.sha256("".join(each["text"] for each in documents).encode()).hexdigest()
  if found != DIGEST:
    parser.error(f"the documents have SHA-256 {found}, expected {DIGEST}: other packages?")
  write_corpus(arguments.directory, "python_3_11", documents)


if __name__ == "__main__":
  main()
