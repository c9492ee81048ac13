"""The report of complete, partial and damaged run folders."""

import base64
import json
import os
import re
import zlib
from html.parser import HTMLParser

import pytest
from analysis.synthetic_run import write_metrics, write_run

from moe_jax.analysis.report import write_report
from moe_jax.errors import UserError

SECTIONS = ("loss", "load", "balance", "experts", "optimisation", "sample", "config")
_VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
  """Collects tags, ids and text, and checks that every tag is closed in order."""

  def __init__(self, html):
    super().__init__()
    self.html, self.tags, self.ids, self.links, self.text = html, [], [], [], []
    self.open = []
    self.feed(html)
    self.close()
    assert not self.open, f"unclosed {self.open}"

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    attributes = dict(attributes)
    self.ids += [attributes["id"]] if "id" in attributes else []
    self.links += [attributes[name] for name in ("href", "src") if name in attributes]
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    self.open.pop()

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
    self.open.pop()

  def handle_data(self, data):
    self.text.append(data)

  @property
  def words(self):
    return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


def read_report(folder, **options):
  return Page(write_report(folder, **options).read_text("utf-8"))


@pytest.fixture
def run(tmp_path):
  return write_run(tmp_path / "quickstart", rows=40)


def edit_json(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_page_has_every_section_once_and_well_formed(run):
  page = read_report(run)
  assert [identifier for identifier in page.ids if identifier in SECTIONS] == list(SECTIONS)
  assert len(page.ids) == len(set(page.ids))
  assert {"#" + name for name in SECTIONS} <= set(page.links)


def test_page_loads_nothing_from_outside_and_runs_no_script(run):
  page = read_report(run)
  assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
  assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", page.html)
  assert "script" not in page.tags
  assert "default-src 'none'" in page.html


def test_headline_shows_the_summary_numbers(run):
  summary = json.loads((run / "summary.json").read_text())
  words = read_report(run).words
  for expected in (
    f"{summary['eval']['bits_per_byte']:.3f}",
    f"{summary['eval']['loss']:.3f}",
    "3.41 M",
    "1.18 M active",
    "xz -9 2.710 · primed 2.330",
    "4 min 07 s",
    "40.9 k",
    "1.3% dropped",
  ):
    assert expected in words


@pytest.mark.parametrize(
  ("bits", "expected"),
  [(2.0, "20.0% less than xz -9"), (3.0, "20.0% more than xz -9"), (2.5, "no fewer than xz -9")],
)
def test_verdict_says_less_or_more_than_the_compressor(run, bits, expected):
  def set_results(summary):
    summary["eval"]["bits_per_byte"] = bits
    summary["compressors"] = {"xz": 2.5}

  edit_json(run / "summary.json", set_results)
  assert expected in read_report(run).words


def test_text_of_the_run_cannot_inject_markup(run):
  attack = "</pre><img src=x onerror=alert(1)>&\"'"

  def attack_summary(summary):
    summary["sample"] = {"prompt": attack, "text": attack + attack, "temperature": 1.0}
    summary["environment"] = {"device": attack, "jax": attack, "commit": attack}
    token = summary["routing"][0]["experts"][0]["top_tokens"][0]
    token |= {"token": attack, "count": attack}

  def attack_config(config):
    config[attack] = {attack: attack}
    config["moe"]["preset"] = attack

  def attack_baseline(baseline):
    baseline |= {"name": attack, "note": attack}

  edit_json(run / "summary.json", attack_summary)
  edit_json(run / "config.json", attack_config)
  edit_json(run / "baseline.json", attack_baseline)
  folder = run.rename(run.with_name("<b onclick=1>"))
  edit_json(
    folder / "config.json", lambda c: c["report"].update(baseline=str(folder / "baseline.json"))
  )
  page = read_report(folder)
  assert "img" not in page.tags
  assert "<b onclick" not in page.html
  assert page.words.count("onerror=alert(1)") >= 6


def test_sample_marks_the_prompt_and_keeps_line_breaks(run):
  html = read_report(run).html
  assert '<pre class="sample"><b>ROMEO:</b>\nWhat, &lt;script&gt;' in html


def test_characters_that_no_page_may_hold_are_replaced(run):
  edit_json(
    run / "summary.json", lambda s: s["sample"].update(text="ROMEO:a\x00b\x1bc\ud800d", prompt="")
  )
  assert "ROMEO:a\ufffdb\ufffdc\ufffdd" in read_report(run).html


def test_blank_tokens_are_spelt_out(run):
  edit_json(
    run / "summary.json",
    lambda s: s["routing"][0]["experts"][0].update(
      top_tokens=[{"token": text, "count": 9, "lift": 2.0} for text in (" a", "\n", "\x07", "")]
    ),
  )
  html = read_report(run).html
  for shown in ("␣a", "\\n", "\\x07", "(empty)"):
    assert f"<code>{shown}</code><span>×2.0</span>" in html


def test_dense_run_says_that_there_is_no_routing(tmp_path):
  page = read_report(write_run(tmp_path / "dense", rows=20, layers=()))
  assert "dense model" in page.words
  assert page.words.count("the model is dense, or this was not recorded") == 3
  assert "image" not in page.tags


@pytest.mark.parametrize("num_experts", [1, 2, 64])
@pytest.mark.parametrize("rows", [1, 2, 30])
def test_any_number_of_experts_and_rows(tmp_path, num_experts, rows):
  page = read_report(write_run(tmp_path / "run", rows=rows, num_experts=num_experts))
  assert page.tags.count("image") == 2
  assert "nan" not in re.sub(r"base64,[^\"]*", "", page.html).lower()


def test_many_layers_share_the_page(tmp_path):
  page = read_report(write_run(tmp_path / "deep", rows=12, layers=tuple(range(1, 20, 2))))
  assert page.tags.count("image") == 10
  assert "6 more layers" in page.words


def test_only_metrics_are_needed_and_what_is_missing_is_said(tmp_path):
  write_metrics(tmp_path / "bare", [{"step": 10, "loss": 2.0}])
  words = read_report(tmp_path / "bare").words
  for expected in (
    "holds no summary.json",
    "holds no config.json",
    "holds no held-out loss",
    "names no baseline",
    "holds no sample",
    "holds no auxiliary loss",
  ):
    assert expected in words


def test_named_but_absent_baseline_is_said(run):
  (run / "baseline.json").unlink()
  assert "The baseline file that the config names is not there: baseline.json" in (
    read_report(run).words
  )


def test_baseline_without_points_draws_the_rest(run):
  edit_json(run / "baseline.json", lambda baseline: baseline.update(points=[]))
  assert "dense, same active FLOPs" in read_report(run).words


def test_values_that_are_not_finite_break_the_line_and_are_counted(tmp_path):
  losses = [3.0, 2.5, float("nan"), None, float("inf"), 2.0, 1.9]
  rows = [{"step": 10 * i + 10, "loss": loss} for i, loss in enumerate(losses)]
  rows[0] |= {"grad_norm": float("nan"), "moe/layer_1/load": [float("nan"), 0.5]}
  write_metrics(tmp_path / "nan", rows)
  page = read_report(tmp_path / "nan")
  assert "not finite in 3 of 7 logged rows, first at step 30" in page.words
  path = re.search(r'class="line c1 faint" d="([^"]*)"', page.html)[1]
  assert path.count("M") == 2
  assert "nan" not in path


def test_training_loss_never_finite_still_gives_a_page(tmp_path):
  write_metrics(tmp_path / "nan", [{"step": 1, "loss": None}, {"step": 2, "loss": None}])
  assert "not finite in 2 of 2" in read_report(tmp_path / "nan").words


def test_truncated_last_line_is_tolerated_and_said(run):
  with open(run / "metrics.jsonl", "a") as file:
    file.write('{"step": 500, "lo')
  words = read_report(run).words
  assert "last line of metrics.jsonl is incomplete" in words
  assert "the report ends at step 400" in words


@pytest.mark.parametrize(
  ("damage", "fragments"),
  [
    (lambda run: (run / "metrics.jsonl").unlink(), ["not a run folder", "--workdir"]),
    (lambda run: (run / "metrics.jsonl").write_text(""), ["no complete line"]),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "l'), ["no complete line"]),
    (
      lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n'),
      ["line 2", "'{\"ste'"],
    ),
    (
      lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n{"step": 3}\n'),
      ["line 2", "`step`"],
    ),
    (
      lambda run: (run / "metrics.jsonl").write_text('{"step": 7}\n{"step": 7}\n'),
      ["line 2", "step 7 after step 7"],
    ),
    (
      lambda run: (run / "metrics.jsonl").write_text(
        '{"step": 1, "moe/layer_1/load": [1.0]}\n{"step": 2, "moe/layer_1/load": [0.5, 0.5]}\n'
      ),
      ["moe/layer_1/load", "number of experts"],
    ),
    (lambda run: (run / "summary.json").write_text("{"), ["summary.json", "not valid JSON"]),
    (lambda run: (run / "config.json").write_text("[]"), ["config.json", "list"]),
    (lambda run: (run / "baseline.json").write_text("{}"), ["baseline.json", "points"]),
  ],
)
def test_damaged_folder_is_refused_in_one_sentence_and_nothing_is_written(run, damage, fragments):
  damage(run)
  with pytest.raises(UserError) as refusal:
    write_report(run)
  message = str(refusal.value)
  assert "\n" not in message
  for fragment in fragments:
    assert fragment in message
  assert not (run / "report.html").exists()


def test_report_replaces_the_old_one_whole(run, monkeypatch):
  (run / "report.html").write_text("old")

  def fail(*_):
    raise OSError("disk")

  with monkeypatch.context() as patched:
    patched.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
      write_report(run)
  assert (run / "report.html").read_text() == "old"
  assert not list(run.glob(".report*"))
  write_report(run)
  assert (run / "report.html").read_text() != "old"
  assert (run / "report.html").stat().st_mode & 0o777 == 0o644


def test_same_files_give_the_same_page(run):
  first = write_report(run).read_bytes()
  assert write_report(run).read_bytes() == first


def test_compared_runs_are_laid_over_and_their_settings_listed(run, tmp_path):
  other = write_run(tmp_path / "other" / "wide", rows=30, num_experts=16, seed=3)
  twin = write_run(tmp_path / "twin" / "wide", rows=30, seed=4)
  page = read_report(run, compare=[other, twin])
  assert "comparison" in page.ids
  assert "other/wide (held-out)" in page.words
  assert "twin/wide (held-out)" in page.words
  assert "moe.num_experts=16, seed=3" in page.words


def test_compared_folder_that_is_no_run_is_refused(run, tmp_path):
  with pytest.raises(UserError, match="nowhere is not a run folder"):
    write_report(run, compare=[tmp_path / "nowhere"])


def test_heat_map_pictures_are_valid_png(run):
  for link in read_report(run).links:
    if link.startswith("data:"):
      picture = base64.b64decode(link.split(",")[1])
      start = picture.index(b"IDAT") + 4
      pixels = zlib.decompress(picture[start : picture.index(b"IEND") - 8])
      assert len(pixels) == 8 * (1 + 40 * 4)  # 8 experts, 40 columns of RGBA and a filter byte
