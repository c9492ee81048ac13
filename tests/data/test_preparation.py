"""A preparation that was killed anywhere is continued, and comes out byte for byte the same."""

import json

import pytest
from data.texts import TEXTS, json_lines, prepared

from moe_jax.cli import main
from moe_jax.data import ingest
from moe_jax.data.builders import prepare, verify
from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError


class Killed(BaseException):
  """Ends a preparation as a kill does: nothing tidies up after it."""


@pytest.fixture
def source(tmp_path, monkeypatch):
  """Three files that make about a dozen segments."""
  monkeypatch.setattr(ingest, "_BATCH_BYTES", 300)
  monkeypatch.setattr(ingest, "_SHARD_BYTES", 800)
  folder = tmp_path / "in"
  folder.mkdir()
  for name, texts in (("a", TEXTS[:5]), ("b", TEXTS), ("c", TEXTS[::-1])):
    (folder / f"{name}.jsonl").write_bytes(json_lines(texts))
  return f"{folder}/"


def manifest_of(data):
  (source,) = data.sources
  return source.manifest


def kill_at(monkeypatch, function, call):
  """Makes the `call`-th call of a method of Ingest the last thing that happens."""
  calls, original = [0], getattr(ingest.Ingest, function)

  def dying(self, *args):
    calls[0] += 1
    if calls[0] == call:
      raise Killed
    return original(self, *args)

  monkeypatch.setattr(ingest.Ingest, function, dying)


@pytest.mark.parametrize("call", [1, 2, 7, 8])
@pytest.mark.parametrize("function", ["_end_segment", "_pack", "_manifest"])
def test_a_killed_preparation_goes_on_to_the_same_files(
  source, tmp_path, monkeypatch, function, call
):
  whole = manifest_of(prepared(source, tmp_path / "whole"))
  assert len(whole.shards) > 10
  with monkeypatch.context() as patch:
    kill_at(patch, function, call if function != "_manifest" else 1)
    with pytest.raises(Killed):
      prepared(source, tmp_path / "killed")
  assert not list((tmp_path / "killed").glob("packed_text/*/manifest.json"))
  assert manifest_of(prepared(source, tmp_path / "killed")) == whole


def test_what_was_finished_before_a_kill_is_not_read_again(source, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    kill_at(patch, "_end_segment", 8)
    with pytest.raises(Killed):
      prepared(source, tmp_path / "killed")
  packed = []
  original = ingest.Ingest._pack
  monkeypatch.setattr(
    ingest.Ingest, "_pack", lambda self, batch: [packed.append(batch), original(self, batch)]
  )
  data = prepared(source, tmp_path / "killed")
  read_again = sum(len(stretch.text) for batch in packed for stretch, _ in batch)
  assert 0 < read_again < 0.6 * sum(data.text_bytes.values())


@pytest.mark.parametrize("damage", ["shard", "journal", "text"])
def test_only_sound_segments_are_kept(source, tmp_path, monkeypatch, damage):
  whole = manifest_of(prepared(source, tmp_path / "whole"))
  with monkeypatch.context() as patch:
    kill_at(patch, "_end_segment", 8)
    with pytest.raises(Killed):
      prepared(source, tmp_path / "killed")
  (folder,) = (tmp_path / "killed").glob("packed_text/*")
  victim = {"shard": "train-00003.array_record", "journal": "journal.jsonl", "text": "train.txt"}
  path = folder / victim[damage]
  content = bytearray(path.read_bytes())
  if damage == "text":
    content = content[: len(content) // 2]
  else:
    content[len(content) // 2] ^= 1
  path.write_bytes(content)
  assert manifest_of(prepared(source, tmp_path / "killed")) == whole


def test_every_flipped_byte_of_a_shard_is_found_and_named(source, tmp_path):
  data = prepared(source, tmp_path)
  config = DataConfig(sources=(source,), sequence_length=16, data_dir=str(tmp_path))
  assert [each.folder for each in verify(config)] == [data.sources[0].folder]
  path = data.sources[0].folder / "train-00002.array_record"
  sound = path.read_bytes()
  for place in range(7, len(sound), len(sound) // 9):
    path.write_bytes(sound[:place] + bytes([sound[place] ^ 16]) + sound[place + 1 :])
    with pytest.raises(UserError, match="train-00002.array_record does not have its checksum"):
      verify(config)
  path.write_bytes(sound)
  verify(config)


def test_what_was_prepared_outlasts_its_source(source, tmp_path):
  first = prepared(source, tmp_path)
  for path in (tmp_path / "in").iterdir():
    path.rename(tmp_path / path.name)
  assert prepared(source, tmp_path).fingerprint == first.fingerprint
  with pytest.raises(UserError, match="has no files"):
    prepared(source, tmp_path / "elsewhere")


def test_a_source_that_changed_is_prepared_anew(source, tmp_path):
  first = prepared(source, tmp_path)
  (tmp_path / "in" / "d.jsonl").write_bytes(json_lines(["more"]))
  assert prepared(source, tmp_path).fingerprint != first.fingerprint


def test_large_sources_are_not_prepared_on_the_way(source, tmp_path, monkeypatch):
  monkeypatch.setattr("moe_jax.data.builders._ON_THE_WAY_BYTES", 10)
  config = DataConfig(sources=(source,), sequence_length=16, data_dir=str(tmp_path))
  with pytest.raises(UserError, match="run moe-jax data prepare with the same --config"):
    prepare(config)
  made = prepare(config, on_the_way=False)
  assert prepare(config).fingerprint == made.fingerprint


def test_a_full_disk_is_one_sentence(source, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(ingest.ShardWriter, "close", full)
  with pytest.raises(UserError, match=r"cannot write prepared data .*No space left on device"):
    prepared(source, tmp_path)


def test_the_commands_say_what_was_met(source, tmp_path, capsys):
  (tmp_path / "in" / "z.jsonl").write_bytes(json_lines([""]) + b'{"text": "\xff\\u0000"}\n')
  words = [
    "--config=configs/quickstart.py",
    f"--config.data.sources=('{source}',)",
    f"--config.data.data_dir={tmp_path}",
  ]
  assert main(["data", "verify", *words]) == 2
  assert "nothing was prepared" in capsys.readouterr().err
  assert main(["data", "prepare", *words]) == 0
  said = capsys.readouterr().out
  for part in ("72 documents", "1 empty documents", "1 documents with invalid", "1 NUL bytes"):
    assert part in said
  assert "are longer than a record" in said
  assert main(["data", "verify", *words]) == 0
  assert "as written" in capsys.readouterr().out
  assert main(["data"]) == main(["data", "verfy", *words]) == 2
  assert "did you mean verify?" in capsys.readouterr().err


def test_the_journal_is_gone_when_all_is_done(source, tmp_path):
  folder = prepared(source, tmp_path).sources[0].folder
  assert not (folder / "journal.jsonl").exists()
  assert json.loads((folder / "manifest.json").read_text())["shards"]
  # Of one that was killed between the manifest and the journal.
  (folder / "journal.jsonl").write_text("left behind")
  prepared(source, tmp_path)
  assert not (folder / "journal.jsonl").exists()
