"""Make the bundled corpus king_james.jsonl.xz from Debian's package bible-kjv-text.

  apt-get install bible-kjv bible-kjv-text
  bible -f 'Gen1:1-Rev22:21' < /dev/null > kjv.txt
  python -m moe_jax.data.corpora.make_king_james kjv.txt moe_jax/data/corpora

A document is a chapter, a line a verse, without the verse's place.
"""

import argparse
import itertools
import pathlib
import re
from collections.abc import Iterator

from moe_jax.data.corpora.bundling import check_digest, write_corpus

TEXT_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
CHAPTERS = 1189

_VERSE = re.compile(r"(?P<book>\d?[A-Za-z]+)(?P<chapter>\d+):\d+ (?P<text>.*)")


def read_chapters(path: pathlib.Path) -> Iterator[dict[str, int | str]]:
  """Yields the chapters in order."""
  verses = map(_VERSE.fullmatch, path.read_text("ascii").splitlines())
  for (book, chapter), own in itertools.groupby(verses, lambda verse: verse.group(1, 2)):
    text = "\n".join(verse["text"] for verse in own)
    yield {"book": book, "chapter": int(chapter), "text": text}


def main() -> None:
  """Writes the corpus into the given directory and prints the digests its note records."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("text", type=pathlib.Path)
  parser.add_argument("directory", type=pathlib.Path)
  arguments = parser.parse_args()
  check_digest(arguments.text, TEXT_SHA256)
  chapters = list(read_chapters(arguments.text))
  if len(chapters) != CHAPTERS:
    parser.error(f"{arguments.text} has {len(chapters)} chapters, expected {CHAPTERS}")
  write_corpus(arguments.directory, "king_james", chapters)


if __name__ == "__main__":
  main()
