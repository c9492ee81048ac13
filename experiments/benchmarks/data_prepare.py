"""Throughput and memory of `moe-jax data prepare`.

  python -m experiments.benchmarks.data_prepare [--sizes 10,100] [--length 128] [--files 50000]
    [--tokenizers bytes,sentencepiece,tokenizer.json]

Writes the bundled addresses over and over, as JSON lines of 2,000 characters, and prepares them in
a process of its own for each row: with bytes, with a SentencePiece model and with a tokenizer.json,
both of 4,096 ids. The last row is a folder of many files; see `odd_folder`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.odd_folder import write_odd_folder
from experiments.benchmarks.timing import integers
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.corpus import get_corpus
from moe_jax.data.sources import parse_source
from moe_jax.data.tokenizer_training import train_sentencepiece

_CORPUS = "sotu_1790_1870"
_DOCUMENT = 2000
_IDS = 4096
_HEAD = "tokenizer         files     MB    MB/s  MB/CPU s  peak MiB  (before)  CPU s  load"


def write_text(path: Path, megabytes: int) -> None:
  """Writes JSON lines that hold so many megabytes of text."""
  text = "\n".join(document.text for document in get_corpus(_CORPUS).documents())
  lines = [
    json.dumps({"text": text[start : start + _DOCUMENT]}) + "\n"
    for start in range(0, len(text), _DOCUMENT)
  ]
  written = 0
  with path.open("w") as file:
    while written < megabytes * 1_000_000:
      file.writelines(lines)
      written += len(text)


def write_tokenizer(kind: str, folder: Path) -> str:
  """Trains a tokenizer on the bundled addresses; returns what a config calls it."""
  if kind == "bytes":
    return kind
  if kind == "sentencepiece":
    path = folder / f"{_IDS}.model"
    train_sentencepiece([parse_source(_CORPUS)], path, vocab_size=_IDS)
    return str(path)
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=_IDS,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  texts = (document.text for document in get_corpus(_CORPUS).documents())
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(folder / "tokenizer.json"))
  return str(folder / "tokenizer.json")


def peak_mib() -> float:
  """Returns the most memory that this process has had; getrusage counts its parent's too."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(source: str, tokenizer: str, length: int, data_dir: str) -> None:
  """Prepares one source; prints the figures as JSON."""
  config = DataConfig(
    sources=(source,), tokenizer=tokenizer, sequence_length=length, data_dir=data_dir
  )
  before = peak_mib()
  wall, cpu = time.perf_counter(), time.process_time()
  data = prepare(config, on_the_way=False)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  (prepared,) = data.sources
  figures = {
    "megabytes": sum(data.text_bytes.values()) / 1e6,
    "wall": wall,
    "cpu": cpu,
    "peak_mib": peak_mib(),
    "before_mib": before,
    "load": os.getloadavg()[0],
    "met": dataclasses.asdict(prepared.manifest.met),
  }
  print(json.dumps(figures))


def row(title: str, files: int, source: Path, tokenizer: str, args: Any) -> dict[str, Any]:
  """Prepares a source in a process of its own and prints a line; returns what was met."""
  words = ["--length", str(args.length), "--measure", str(source), tokenizer]
  with tempfile.TemporaryDirectory(dir=source.parent) as data_dir:
    command = [sys.executable, "-m", "experiments.benchmarks.data_prepare", *words, data_dir]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  f = json.loads(done.stdout)
  print(
    f"{title:<15}{files:8d}{f['megabytes']:7.0f}{f['megabytes'] / f['wall']:8.1f}"
    f"{f['megabytes'] / f['cpu']:10.1f}{f['peak_mib']:10.0f}{f['before_mib']:10.0f}"
    f"{f['cpu']:7.1f}{f['load']:6.1f}",
    flush=True,
  )
  return f["met"]


def main() -> None:
  """Prints the table."""
  args = _arguments()
  if args.measure:
    source, tokenizer, data_dir = args.measure
    measure(source, tokenizer, args.length, data_dir)
    return
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tokenizers = {kind: write_tokenizer(kind, folder) for kind in args.tokenizers.split(",")}
    print(_HEAD)
    for size in args.sizes:
      text = folder / f"{size}.jsonl"
      write_text(text, size)
      for kind, tokenizer in tokenizers.items():
        row(kind, 1, text, tokenizer, args)
    if args.files:
      expected = write_odd_folder(folder / "odd", args.files)
      met = row("bytes", args.files, folder / "odd", "bytes", args)
      same = "as written" if met == dataclasses.asdict(expected) else f"expected {expected}"
      print(f"met in the folder, {same}: {met}")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", type=integers, default=[10, 100], help="megabytes of text")
  parser.add_argument("--length", type=int, default=128, help="L")
  parser.add_argument("--files", type=int, default=50_000, help="of the odd folder; 0 = none")
  parser.add_argument("--tokenizers", default="bytes,sentencepiece,tokenizer.json")
  parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  main()
