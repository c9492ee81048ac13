"""The command `moe-jax sweep`: runs, cards, resuming, refusals."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.analysis.routing_measures import Measure
from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.sweep import workers
from moe_jax.sweep.comparison_page import render
from moe_jax.sweep.recipe import Profile, Recipe, Scale, load_recipe, with_point
from moe_jax.sweep.results import arm_rows, cards_by_arm, loss_text
from moe_jax.sweep.routing_history import by_name
from moe_jax.sweep.running import finished_card, run_and_write, run_folder
from moe_jax.sweep.upcycled_start import UpcycledFrom
from moe_jax.sweep.workers import Job, run_jobs

RECIPE = str(Path(__file__).with_name("tiny_recipe.py"))


def _sweep(workdir, *flags) -> int:
  return main(["sweep", f"--config={RECIPE}", f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A folder with both runs of the smoke profile done, one after another by index."""
  workdir = tmp_path_factory.mktemp("sweep")
  for index in range(2):
    assert _sweep(workdir, f"--index={index}") == 0
  return workdir


def _card(workdir, name="moe_0"):
  return json.loads((workdir / "cards/tiny/smoke" / f"{name}.json").read_text())


def test_card_holds_what_the_run_came_to(swept):
  card = _card(swept)
  assert (card["arm"], card["seed"], card["steps"]) == ("moe", 0, 2)
  assert card["tokens"] == 2 * 4 * 32
  assert card["curve"][-1] == [2, card["eval"]["loss"]]
  assert card["config"]["seed"] == 0 and card["config"]["steps"] == 2
  assert 0 < card["cpu_seconds"]
  assert card["origin"]["packages"]["jax"]
  # The one domain is the whole held-out text.
  assert card["domains"]["all"] == pytest.approx(card["eval"]["loss"], rel=1e-6)
  assert card["routing"]["max_violation"] >= 0
  assert len(card["routing"]["per_layer"]) == 2
  assert card["interventions"]["wide"]["dropped_fraction"] == 0
  assert card["interventions"]["tight"]["dropped_fraction"] > 0.3
  dense = _card(swept, "dense_0")
  assert "routing" not in dense
  assert dense["parameters"]["total"] < card["parameters"]["total"]


def test_sweep_shows_the_table_without_running_anything_again(swept, capsys):
  before = _card(swept)
  assert _sweep(swept) == 0
  shown = capsys.readouterr().out
  assert "2 runs, 2 done before" in shown
  assert f"{before['eval']['loss']:.4f}" in shown
  assert "decides no claim" in shown
  assert not any(verdict in shown for verdict in ("REPRODUCED", "INCONCLUSIVE"))
  assert _card(swept) == before


def test_page_says_the_tokens_of_the_shortest_and_the_longest_runs(swept):
  recipe, moe, dense = load_recipe(RECIPE), _card(swept), _card(swept, "dense_0")
  assert "1 seed, 256 tokens a run" in render(recipe, {"moe": [moe], "dense": [dense]}, [])
  short = dense | {"tokens": 128}
  assert "1 seed, 128 to 256 tokens a run" in render(recipe, {"moe": [moe], "dense": [short]}, [])


def test_list_names_runs_and_what_is_there(swept, capsys):
  assert _sweep(swept, "--list", "--profile=cpu") == 0
  shown = capsys.readouterr().out
  assert "moe_0" in shown and "moe_1" in shown and "there" not in shown
  assert _sweep(swept, "--list") == 0
  assert capsys.readouterr().out.count("there") == 2


def test_recipes_share_runs_of_the_same_config(swept, capsys, monkeypatch):
  """The cpu profile trains `moe` as the smoke profile did: its card is measured, not trained."""
  from moe_jax.sweep import running

  def no_step(*args, **kwargs):
    raise AssertionError("trained again")

  import moe_jax.training.loop as loop

  monkeypatch.setattr(loop._Training, "advance", no_step)
  assert _sweep(swept, "--profile=cpu", "--index=0") == 0
  card = json.loads((swept / "cards/tiny/cpu/moe_0.json").read_text())
  assert card["eval"] == _card(swept)["eval"]
  assert running.finished_card(load_recipe(RECIPE).runs("cpu")[0], swept / "cards/tiny/cpu")


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--profile=gpu",), ["--profile=gpu", "smoke, cpu"]),
    (("--profile=tiny",), ["'tiny'"]),
    (("--index=7",), ["--index=7", "2 runs"]),
    (("--workers=0",), ["--workers=0", "at least 1"]),
  ],
)
def test_bad_flags_are_refused_in_a_sentence(tmp_path, capsys, flags, words):
  assert _sweep(tmp_path, *flags) == 2
  said = capsys.readouterr().err
  assert all(word in said for word in words), said
  assert not list(tmp_path.iterdir())


def test_file_without_a_recipe_is_refused(tmp_path, capsys):
  config = tiny.ROOT / "configs/quickstart.py"
  assert main(["sweep", f"--config={config}", f"--workdir={tmp_path}"]) == 2
  assert "get_recipe" in capsys.readouterr().err


def test_card_of_another_config_is_refused(swept, tmp_path, capsys):
  cards = tmp_path / "cards"
  cards.mkdir()
  card = _card(swept) | {"config_digest": "0" * 16}
  (cards / "moe_0.json").write_text(json.dumps(card))
  assert _sweep(swept, f"--cards={cards}") == 2
  assert "another config" in capsys.readouterr().err
  (cards / "moe_0.json").write_text("{")
  assert _sweep(swept, f"--cards={cards}") == 2
  assert "no card of a run" in capsys.readouterr().err


def test_missing_card_is_named(tmp_path):
  with pytest.raises(UserError, match="no card of run dense_0"):
    cards_by_arm(load_recipe(RECIPE), "smoke", tmp_path)


def test_point_sets_fields_of_sections_that_are_there():
  mapping = {"steps": 1, "moe": {"top_k": 1}}
  assert with_point(mapping, {"moe.top_k": 2, "steps": 3}) == {"steps": 3, "moe": {"top_k": 2}}
  assert mapping == {"steps": 1, "moe": {"top_k": 1}}
  with pytest.raises(UserError, match="no such section"):
    with_point({"steps": 1}, {"moe.top_k": 2})


def _job(folder, name, code):
  card = folder / f"{name}.json"
  return Job(
    name=name,
    command=(sys.executable, "-c", code.format(card=str(card))),
    folder=folder / name,
    log=folder / "logs" / f"{name}.txt",
    is_done=card.exists,
  )


@pytest.mark.parametrize("count", [1, 3])
def test_jobs_run_so_many_at_a_time(tmp_path, monkeypatch, count):
  monkeypatch.setattr(workers, "_POLL_SECONDS", 0.02)
  write = "open({card!r}, 'w').close()"
  done = []
  run_jobs(
    [_job(tmp_path, f"run{i}", write) for i in range(4)], count, lambda job: done.append(job.name)
  )
  assert sorted(done) == [f"run{i}" for i in range(4)]


def test_failing_job_ends_the_sweep_with_what_it_said(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, "_POLL_SECONDS", 0.02)
  jobs = [_job(tmp_path, "bad", "import sys; sys.exit('the reason')"), _job(tmp_path, "next", "")]
  with pytest.raises(UserError, match="run bad ended with status 1 and said: the reason"):
    run_jobs(jobs, 1, lambda job: None)
  assert not (tmp_path / "logs/next.txt").exists()


def _recipe(**fields) -> Recipe:
  scale = Scale(steps=4, seeds=(0,), steps_of={"short": 2})
  arms = {"short": tiny.mapping("dense"), "long": tiny.mapping("dense")}
  texts = dict.fromkeys(("title", "hypothesis", "scaled_down", "matched"), "")
  made = dict(name="made", arms=arms, scales={Profile.SMOKE: scale}, **texts)
  return Recipe(**(made | fields))


def test_arms_may_train_for_another_number_of_steps():
  short, long = _recipe().runs("smoke")
  assert (short.steps, long.steps) == (2, 4)
  assert (short.mapping()["steps"], long.mapping()["steps"]) == (2, 4)
  with pytest.raises(UserError, match="no arm 'shrot'; did you mean short"):
    _recipe(scales={Profile.SMOKE: Scale(steps=4, seeds=(0,), steps_of={"shrot": 2})})


def test_a_run_that_diverges_has_a_card_that_says_so(tmp_path):
  arms = {"far": tiny.mapping("dense", optimizer__learning_rate=1e30, optimizer__clip_norm=0.0)}
  recipe = _recipe(arms=arms, scales={Profile.SMOKE: Scale(steps=4, seeds=(0,))})
  (run,) = recipe.runs("smoke")
  card = run_and_write(run, tmp_path, tmp_path / "cards")
  assert card["diverged"] == 1 and "not finite" in card["why"]
  assert "eval" not in card and card["cpu_seconds"] > 0
  assert finished_card(run, tmp_path / "cards")["why"] == card["why"]
  (row,) = arm_rows(cards_by_arm(recipe, "smoke", tmp_path / "cards"))
  assert (row.loss, row.diverged, loss_text(row)) == (None, 1, "1 diverged")


def _upcycling_recipe() -> Recipe:
  experts = dict(moe__top_k=2, moe__weighting="renormalized", moe__overflow="dropless")
  sparse = tiny.mapping("moe", moe__dispatch="ragged", **experts)
  dense = tiny.mapping("dense", checkpoint__at=(4,))
  return _recipe(
    arms={"dense": dense, "upcycled": sparse, "scratch": sparse},
    starts={"upcycled": UpcycledFrom("dense", 4)},
    scales={Profile.SMOKE: Scale(steps=6, seeds=(0,))},
  )


def test_an_arm_starts_from_the_upcycled_checkpoint_of_another(tmp_path):
  recipe, cards = _upcycling_recipe(), tmp_path / "cards"
  dense, upcycled, scratch = recipe.runs("smoke")
  assert upcycled.mapping() == scratch.mapping()
  assert len({run_folder(run, tmp_path) for run in (dense, upcycled, scratch)}) == 3
  with pytest.raises(UserError, match="no checkpoint of step 4, .* run of arm dense"):
    run_and_write(upcycled, tmp_path, cards)
  rows = {}
  for run in (dense, upcycled):
    card = run_and_write(run, tmp_path, cards)
    lines = (run_folder(run, tmp_path) / "metrics.jsonl").read_text().splitlines()
    rows[run.arm] = [json.loads(line) for line in lines]
  assert card["branch"]["relative_difference"] < 1e-5
  assert card["branch"]["max_logit"] > 0.1
  assert [row["step"] for row in rows["upcycled"]] == [1, 2, 3, 4, 5, 6]
  assert rows["upcycled"][:4] == rows["dense"][:4]
  # The fifth step sees the same batch with the same function.
  first, other = (rows[arm][4] for arm in ("upcycled", "dense"))
  assert "moe/max_violation" in first and "moe/max_violation" not in other
  assert first["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_arms_that_start_from_another_need_it():
  recipe = _upcycling_recipe()
  with pytest.raises(UserError, match="runs arm 'upcycled' without 'dense', from which it starts"):
    scales = {Profile.SMOKE: Scale(steps=6, seeds=(0,), arms=("upcycled",))}
    dataclasses.replace(recipe, scales=scales)
  with pytest.raises(UserError, match="no arm 'dens'; did you mean dense"):
    dataclasses.replace(recipe, starts={"upcycled": UpcycledFrom("dens", 4)})


def test_a_job_waits_for_the_one_that_it_starts_from(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, "_POLL_SECONDS", 0.02)
  write = "open({card!r}, 'w').close()"
  first = _job(tmp_path, "first", write)
  # Would fail if it were started before.
  needs = f"open({str(tmp_path / 'first.json')!r}); " + write
  second = dataclasses.replace(_job(tmp_path, "second", needs), may_start=first.is_done)
  done = []
  run_jobs([second, first], 2, lambda job: done.append(job.name))
  assert done == ["first", "second"]


def test_measures_of_a_card_are_nested_by_name_step_and_layer():
  measures = [
    Measure("saturation", layer, value, None, step)
    for step, values in {10: (0.2, 0.4), 20: (0.6, 0.7)}.items()
    for layer, value in enumerate(values)
  ] + [Measure("repetition_first", 0, 0.3, 0.1), Measure("repetition_first", 1, 0.5, 0.2)]
  assert by_name(measures) == {
    "saturation": {
      "step_10": pytest.approx({"layer_0": 0.2, "layer_1": 0.4, "mean": 0.3, "max": 0.4}),
      "step_20": pytest.approx({"layer_0": 0.6, "layer_1": 0.7, "mean": 0.65, "max": 0.7}),
    },
    "repetition_first": pytest.approx(
      {"layer_0": 0.3, "layer_1": 0.5, "floor": 0.15, "mean": 0.4, "max": 0.5}
    ),
  }


def test_train_metrics_are_means_over_the_last_steps(swept):
  card = _card(swept)
  folder = next(
    path.parent for path in (swept / "trained").glob("*/config.json") if "moe" in path.read_text()
  )
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  if "moe/max_violation" in rows[0]:
    values = [row["moe/max_violation"] for row in rows]
    assert card["train"]["max_violation"] == pytest.approx(math.fsum(values) / len(values))
