"""Recipes: the arms of an experiment, how long and how often each trains, what it shows."""

import copy
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from moe_jax.choices import as_choice, did_you_mean
from moe_jax.config import chosen_fields
from moe_jax.config.load import run_file
from moe_jax.errors import UserError
from moe_jax.sweep.cards import config_digest
from moe_jax.sweep.claims import Claim
from moe_jax.sweep.hyper import Point
from moe_jax.sweep.upcycled_start import UpcycledFrom
from moe_jax.training.config import experiment_from


class Profile(enum.StrEnum):
  """How much of a recipe is run."""

  SMOKE = "smoke"  # that it runs; too short for any verdict
  CPU = "cpu"  # a verdict in minutes, of the claims that a few arms decide
  FULL = "full"  # all arms and seeds, on CPU: what the recorded results are of
  GPU = "gpu"  # larger models on one accelerator, in runs of at most eight minutes


@dataclasses.dataclass(frozen=True)
class Scale:
  """What a profile trains.

  Attributes:
    steps: optimiser steps of a run.
    seeds: of the runs of each arm.
    arms: that are run; empty = all.
    steps_of: of arms that train for another number of steps.
    configs: of arms that have another config than the recipe's own, as a larger model.
    point: fields of every config that the profile sets besides.
  """

  steps: int
  seeds: tuple[int, ...]
  arms: tuple[str, ...] = ()
  steps_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
  configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  point: Point = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An experiment.

  Attributes:
    name: of its folder.
    title: one line.
    hypothesis: what is claimed and by whom, in a sentence or two.
    scaled_down: what sets this apart from the paper's own experiment.
    matched: what all arms have in common, as "active FLOPs".
    arms: the mapping of a config each, see `moe_jax.training.config`; `vary` makes them.
    scales: what each profile trains; a profile that is absent cannot be run.
    claims: what is judged, if all its arms are there.
    interventions: evaluations of the trained model under another router, by name: fields of the
      routing config as `moe-jax eval --arm` takes them.
    domains: name and source of each held-out text that is evaluated alone.
    starts: of arms that go on from a checkpoint of another arm's run, instead of new weights.
    history: whether cards have the measures of `moe-jax analyze` too, over the checkpoints that
      `checkpoint.at` and `checkpoint.keep` leave, of the texts of `domains`.
  """

  name: str
  title: str
  hypothesis: str
  scaled_down: str
  matched: str
  arms: Mapping[str, Mapping[str, Any]]
  scales: Mapping[Profile, Scale]
  claims: tuple[Claim, ...] = ()
  interventions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  domains: Mapping[str, str] = dataclasses.field(default_factory=dict)
  starts: Mapping[str, UpcycledFrom] = dataclasses.field(default_factory=dict)
  history: bool = False

  def __post_init__(self):
    scales = {as_choice(Profile, "profile", name): scale for name, scale in self.scales.items()}
    object.__setattr__(self, "scales", scales)
    named = [arm for claim in self.claims for arm in claim.arms]
    named += [arm for s in self.scales.values() for arm in (*s.arms, *s.steps_of, *s.configs)]
    named += [arm for own, start in self.starts.items() for arm in (own, start.arm)]
    for arm in named:
      if arm not in self.arms:
        raise UserError(f"recipe {self.name} has no arm {arm!r}; {did_you_mean(arm, self.arms)}")
    for scale in self.scales.values():
      for arm in set(scale.arms) & self.starts.keys():
        if self.starts[arm].arm not in scale.arms:
          raise UserError(
            f"recipe {self.name} runs arm {arm!r} without {self.starts[arm].arm!r}, from which it"
            " starts; add it to the arms of that profile"
          )

  def scale(self, profile: str) -> Scale:
    """Returns what a profile trains.

    Raises:
      UserError: no such profile, or not of this recipe.
    """
    chosen = as_choice(Profile, "--profile", profile)
    if chosen not in self.scales:
      raise UserError(
        f"--profile={chosen} is not one of recipe {self.name}; expected {', '.join(self.scales)}"
      )
    return self.scales[chosen]

  def runs(self, profile: str) -> "list[Run]":
    """Returns the runs of a profile: all arms of the first seed, then of the next.

    So a sweep that is cut short has all arms of the seeds it has.
    """
    scale = self.scale(profile)
    names = scale.arms or tuple(self.arms)
    return [Run(self, scale, arm, seed) for seed in scale.seeds for arm in names]

  def judged(self, profile: str) -> tuple[Claim, ...]:
    """Returns the claims that a profile decides: none of a smoke run."""
    scale = self.scale(profile)
    if profile == Profile.SMOKE:
      return ()
    there = set(scale.arms or self.arms)
    return tuple(claim for claim in self.claims if there.issuperset(claim.arms))


@dataclasses.dataclass(frozen=True)
class Run:
  """One arm under one seed."""

  recipe: Recipe
  scale: Scale
  arm: str
  seed: int

  @property
  def name(self) -> str:
    """Of its folder and its card."""
    return f"{self.arm}_{self.seed}"

  @property
  def steps(self) -> int:
    """Of its training."""
    return self.scale.steps_of.get(self.arm, self.scale.steps)

  @property
  def start(self) -> UpcycledFrom | None:
    """Where it starts, if not from new weights."""
    return self.recipe.starts.get(self.arm)

  @property
  def source(self) -> "Run | None":
    """The run it starts from."""
    return None if self.start is None else dataclasses.replace(self, arm=self.start.arm)

  @property
  def digest(self) -> str:
    """Names what decides its contents, see `config_digest`."""
    if self.start is None:
      return config_digest(self.mapping())
    origin = {"source": self.source.digest, **chosen_fields(self.start)}
    return config_digest(self.mapping(), origin)

  def mapping(self) -> dict[str, Any]:
    """Returns its whole config, as `moe-jax train` would be given it.

    Raises:
      UserError: a field that the arm's config lacks, or a value that is refused.
    """
    point = {**self.scale.point, "seed": self.seed, "steps": self.steps}
    config = self.scale.configs.get(self.arm, self.recipe.arms[self.arm])
    mapping = with_point(config, point)
    experiment_from(mapping)
    return mapping


def with_point(mapping: Mapping[str, Any], point: Point) -> dict[str, Any]:
  """Returns a copy of a config's mapping with the fields of a point.

  What the names and values are worth is checked where the config is read.

  Raises:
    UserError: a field of a section that the config has not.
  """
  changed = copy.deepcopy(dict(mapping))
  for field, value in point.items():
    *sections, name = field.split(".")
    place = changed
    for section in sections:
      place = place.get(section) if isinstance(place, dict) else None
    if not isinstance(place, dict):
      raise UserError(f"{field} = {value!r} is refused: the config of this arm has no such section")
    place[name] = value
  return changed


def vary(mapping: Mapping[str, Any], points: Mapping[str, Point]) -> dict[str, dict[str, Any]]:
  """Returns a config for each named point; `points` maps the names of arms to what they set."""
  return {name: with_point(mapping, point) for name, point in points.items()}


def load_recipe(path: str) -> Recipe:
  """Runs a recipe's config file and returns what its `get_recipe` returns.

  Raises:
    UserError: no such file, it fails, or it makes no recipe.
  """
  make = run_file(path).get("get_recipe")
  if not callable(make):
    raise UserError(f"{path} has no function get_recipe(), which the config of a sweep defines")
  recipe = make()
  if not isinstance(recipe, Recipe):
    raise UserError(f"get_recipe() of {path} returned {type(recipe).__name__}, expected a Recipe")
  return recipe
