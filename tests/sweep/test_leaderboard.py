"""The pages made of cards: the committed ones, and those of made-up cards."""

import json
import shutil

import pytest
from training import tiny

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.sweep.cards import card_file, config_digest, write_card
from moe_jax.sweep.leaderboard import CARDS, load_results, recipe_page, write_pages
from moe_jax.sweep.paper_values import read_paper_values
from moe_jax.sweep.recipe import Profile, load_recipe

ROOT = tiny.ROOT / "experiments"
RECIPE = "dropless_vs_drop"


def test_committed_pages_are_those_of_the_committed_cards(tmp_path):
  copy = tmp_path / "experiments"
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
  for path in write_pages(copy):
    assert path.read_bytes() == (ROOT / path.relative_to(copy)).read_bytes(), path.name


@pytest.fixture
def recipes(tmp_path):
  """A folder with one recipe and cards of all its runs, in which dropless is always better."""
  for name in ("paper_values.yaml", RECIPE):
    source = ROOT / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
  shutil.rmtree(tmp_path / RECIPE / CARDS, ignore_errors=True)
  recipe = load_recipe(str(tmp_path / RECIPE / "config.py"))
  for place, run in enumerate(recipe.runs(Profile.FULL)):
    loss = 1.5 + 0.001 * run.seed + (0.0 if run.arm == "dropless" else 0.1 + 0.001 * (place % 3))
    card = {
      "arm": run.arm,
      "seed": run.seed,
      "config_digest": config_digest(run.mapping()),
      "parameters": {"total": 10, "active": 5},
      "flops_per_token": 7.0,
      "curve": [[1000, loss + 1], [4000, loss]],
      "eval": {"loss": loss},
      "train": {"dropped_fraction": 0.25},
      "routing": {"max_violation": 0.5},
      "cpu_seconds": 60.0,
      "origin": {"commit": "abc1234"},
    }
    write_card(card_file(tmp_path / RECIPE / CARDS, run.arm, run.seed), card)
  return tmp_path


def test_pages_say_what_became_of_claims(recipes, capsys):
  assert main(["report", str(recipes)]) == 0
  assert "RESULTS.md" in capsys.readouterr().out
  rows = (recipes / "RESULTS.md").read_text()
  assert rows.count("**REPRODUCED**") == 3
  assert rows.count("abc1234") == 3
  page = (recipes / RECIPE / "README.md").read_text()
  assert "| dropless | 10 | 5 | 7 | 1.5010 ±" in page
  assert "25.00 %" in page and "12 CPU minutes for the 12 runs" in page
  picture = (recipes / RECIPE / "curves.svg").read_text()
  assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
  assert "dropless 1.5010" in picture


def test_a_claim_waits_for_all_seeds_of_its_arms(recipes):
  card_file(recipes / RECIPE / CARDS, "capacity_1", 2).unlink()
  write_pages(recipes)
  rows = (recipes / "RESULTS.md").read_text()
  assert rows.count("not run yet") == 1
  assert rows.count("**REPRODUCED**") == 2
  assert "1 runs have no card yet." in (recipes / RECIPE / "README.md").read_text()


def test_a_number_that_no_list_has_is_refused(recipes):
  results = load_results(recipes / RECIPE / "config.py")
  with pytest.raises(UserError, match="megablocks2022_figure2"):
    recipe_page(results, {})
  assert recipe_page(results, read_paper_values(recipes / "paper_values.yaml"))


def test_a_card_of_another_config_is_refused(recipes, capsys):
  path = card_file(recipes / RECIPE / CARDS, "dropless", 0)
  card = json.loads(path.read_text())
  path.write_text(json.dumps(card | {"config_digest": "0"}))
  assert main(["report", str(recipes)]) == 2
  assert "another config" in capsys.readouterr().err
