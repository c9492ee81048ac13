"""Strategies for what disks, copies and editors do to files and to JSON."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# What people and programs write in the place of something else.
_HUGE = [2**31 - 1, 2**31, 2**63, 10**30, -(10**30)]
_NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-30, 1e308, *_HUGE]
_NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
_WORDS = ["", " ", "none", "null", "true", "abc", "1", "é\u2028", "a\nb", "\x00", "../..", "\ud800"]
_OTHERS = [None, True, False, [], {}, [1, 2], ["a"], [[]], {"a": 1}, [None]]

scalars = st.one_of(
  st.sampled_from(_NUMBERS),
  st.sampled_from(_NOT_FINITE),
  st.sampled_from(_WORDS),
  st.sampled_from(_OTHERS),
  st.integers(-5, 300),
)
# Evenly over a file or a list: numbers that hypothesis draws itself crowd at the ends.
places = st.integers(0, 2**32 - 1).map(lambda seed: random.Random(seed).random())


def _flip(content: bytes, place: int, draw: int) -> bytes:
  return content[:place] + bytes([content[place] ^ (1 + draw % 255)]) + content[place + 1 :]


def _cut(content: bytes, place: int, draw: int) -> bytes:
  return content[:place]


def _insert(content: bytes, place: int, draw: int) -> bytes:
  return (
    content[:place] + (draw * 2654435761).to_bytes(8, "little")[: 1 + draw % 8] + content[place:]
  )


def _remove(content: bytes, place: int, draw: int) -> bytes:
  return content[:place] + content[place + 1 + draw % 64 :]


def _repeat(content: bytes, place: int, draw: int) -> bytes:
  return content[:place] + content[:place][-64:] + content[place:]


def _blank(content: bytes, place: int, draw: int) -> bytes:
  size = min(len(content) - place, 1 + draw)
  return content[:place] + b"\0" * size + content[place + size :]


BYTES = (_flip, _cut, _insert, _remove, _repeat, _blank)
# Kind, place in the file, and what the kind makes of it.
byte_damages = st.lists(
  st.tuples(st.sampled_from(BYTES), places, st.integers(0, 511)), min_size=1, max_size=4
)


def damaged_bytes(content: bytes, damages: list[tuple[Callable, float, int]]) -> bytes:
  """Returns a file's content after some damages, one after the other."""
  for damage, place, draw in damages:
    if content:
      content = damage(content, int(place * len(content)), draw)
  return content


_JSON = ("replace", "replace", "replace", "drop", "rename", "wrap", "text", "swap")
# Kind, place among all keys and items, and what is written in a replacement.
json_damages = st.lists(st.tuples(st.sampled_from(_JSON), places, scalars), min_size=1, max_size=3)


def damaged_json(value: Any, damages: list[tuple[str, float, Any]]) -> Any:
  """Returns a JSON value after some damages, each to one key or item of it."""
  value = copy.deepcopy(value)
  for kind, place, new in damages:
    found = _places(value)
    if not found:
      return new
    parent, key = found[int(place * len(found))]
    _damage(parent, key, kind, new, found[int(1e9 * place) % len(found)])
  return value


def _damage(parent: Any, key: Any, kind: str, new: Any, other: tuple[Any, Any]) -> None:
  if kind == "drop":
    del parent[key]
  elif kind == "rename" and isinstance(parent, dict):
    parent[key[:-1] if len(key) % 2 else key + "s"] = parent.pop(key)
  elif kind == "wrap":
    parent[key] = [parent[key]]
  elif kind == "text":
    parent[key] = json.dumps(parent[key])
  elif kind == "swap":
    parent[key] = copy.deepcopy(other[0][other[1]])
  else:
    parent[key] = copy.deepcopy(new)


def _places(value: Any) -> list[tuple[Any, Any]]:
  """Lists (parent, key) of everything in a JSON value."""
  found = []
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, item in items:
    found.append((value, key))
    if isinstance(item, dict | list):
      found += _places(item)
  return found


_FILES = (
  *(
    "bytes",
    "bytes",
    "json",
    "empty",
    "lose",
    "rename",
    "swap",
    "folder",
    "link",
    "copy",
    "foreign",
  ),
)
file_damages = st.lists(
  st.tuples(st.sampled_from(_FILES), places, places, byte_damages, json_damages),
  min_size=1,
  max_size=2,
)


def damage_files(folder: Path, damages: list[tuple]) -> None:
  """Damages files of a folder, each drawn by its place among all."""
  for kind, place, second, changes, json_changes in damages:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
      return
    path, other = (files[int(each * len(files))] for each in (place, second))
    if kind == "json":
      texts = [each for each in files if each.suffix == ".json"] or files
      _rewrite(texts[int(place * len(texts))], changes, json_changes)
    elif kind == "bytes":
      path.write_bytes(damaged_bytes(path.read_bytes(), changes))
    else:
      _misplace(kind, path, other)


def _rewrite(path: Path, changes: list[tuple], json_changes: list[tuple]) -> None:
  """Changes values of a JSON file; any other has its bytes damaged."""
  try:
    value = damaged_json(json.loads(path.read_bytes()), json_changes)
  except (ValueError, TypeError):
    path.write_bytes(damaged_bytes(path.read_bytes(), changes))
    return
  path.write_text(json.dumps(value), encoding="utf-8")


def _misplace(kind: str, path: Path, other: Path) -> None:
  if kind == "empty":
    path.write_bytes(b"")
  elif kind == "lose":
    # A whole folder, now and then.
    shutil.rmtree(path.parent) if len(other.name) % 3 == 0 else path.unlink()
  elif kind == "rename":
    path.rename(path.with_name(path.name + ".bak"))
  elif kind == "swap":
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
  elif kind == "folder":
    path.unlink()
    path.mkdir()
  elif kind == "link":
    path.unlink()
    path.symlink_to("nowhere")
  elif kind == "copy":
    shutil.copyfile(path, path.with_name("0" + path.name))
  else:
    (path.parent / "notes.txt").write_text("mine")
