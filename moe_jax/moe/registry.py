"""The select stage by name: an open table of functions, so that a router is added without an edit.

A function takes a `SelectView` and the config and returns what was chosen; `register_selection`
gives it a name that configs can use. The README shows one.
"""

import contextlib
import dataclasses
import enum
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError

if TYPE_CHECKING:
  from moe_jax.moe.config import RoutingConfig


class Chooser(enum.StrEnum):
  """Who chooses whom: it decides which of the later stages apply."""

  TOKEN = "token"  # tokens ask for experts; experts may overflow
  EXPERT = "expert"  # experts fill their slots with tokens; a token may get none
  SLOT = "slot"  # every slot is a mixture of all tokens (Soft MoE)


@dataclasses.dataclass(frozen=True)
class SelectView:
  """What a selection sees. Everything about padding (mask False) is finite and meaningless.

  Attributes:
    scores: (G, S, E') float32, E' = `config.num_logits`.
    ranking: (G, S, E') float32: scores plus the selection bias, -inf for experts outside the
      token's expert groups. Rank by it; weights are read from `scores`.
    logits: (G, S, E') float32, noise included.
    mask: (G, S) bool, True = real token.
    token_ids, segment_ids: (G, S) integers, or None.
    expert_ids: (G, S, K) int32, the experts of a recorded run, or None.
    key: a key of its own, or None.
    capacity: C, slots per expert and group.
    train: outside training every choice is deterministic.
  """

  scores: jax.Array
  ranking: jax.Array
  logits: jax.Array
  mask: jax.Array
  token_ids: jax.Array | None
  segment_ids: jax.Array | None
  expert_ids: jax.Array | None
  key: jax.Array | None
  capacity: int
  train: bool


@dataclasses.dataclass(frozen=True)
class TokenChoice:
  """Experts asked for by each token.

  Attributes:
    expert: (G, S, K) int32, best first, no expert twice for a token.
    used: (G, S, K) bool, False where a selected expert is not asked after all.
    weight: (G, S, K) float32, weights that the selection itself defines, or None.
  """

  expert: jax.Array
  used: jax.Array
  weight: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
  """Tokens taken by each expert: token (G, E, C) int32, taken (G, E, C) bool."""

  token: jax.Array
  taken: jax.Array


@dataclasses.dataclass(frozen=True)
class SlotMixture:
  """Shares of tokens in slots, and of slots in tokens: both (G, S, E, C) float32."""

  dispatch: jax.Array
  combine: jax.Array


SelectFunction = Callable[[SelectView, "RoutingConfig"], TokenChoice | ExpertChoice | SlotMixture]


@dataclasses.dataclass(frozen=True)
class Selector:
  """A selection and what the other stages must know of it.

  Attributes:
    function: maps a `SelectView` and the config to what was chosen.
    chooser: who chooses; a TokenChoice, ExpertChoice or SlotMixture is returned accordingly.
    draws: whether training needs a key.
    learned: whether the choice depends on the router's logits; only then must a gradient reach
      them.
    ranked: whether it takes the best by `SelectView.ranking`, which re-routing goes on with, a
      selection bias shifts and expert groups limit.
    needs_token_ids, needs_expert_ids: whether it reads `SelectView.token_ids`, `expert_ids`.
    causal: whether a token's choice never depends on a later token's logits.
  """

  function: SelectFunction
  chooser: Chooser = Chooser.TOKEN
  draws: bool = False
  learned: bool = True
  ranked: bool = False
  needs_token_ids: bool = False
  needs_expert_ids: bool = False
  causal: bool = True


_SELECTORS: dict[str, Selector] = {}


def register_selection(name: str, **traits) -> Callable[[SelectFunction], SelectFunction]:
  """Returns a decorator that enters a function under `name`; traits as in `Selector`.

  A file that is run or imported again replaces what it registered itself.

  Raises:
    UserError: a name that is taken.
  """

  def register(function: SelectFunction) -> SelectFunction:
    if name in _SELECTORS and _origin(_SELECTORS[name].function) != _origin(function):
      raise UserError(f"selection {name!r} is registered already; choose another name")
    _SELECTORS[name] = Selector(function, **traits)
    return function

  return register


@contextlib.contextmanager
def temporary_selection(name: str, function: SelectFunction, **traits) -> Iterator[None]:
  """Has a selection under `name` while it is open, for a question that no config asks.

  Raises:
    UserError: a name that is taken.
  """
  register_selection(name, **traits)(function)
  try:
    yield
  finally:
    del _SELECTORS[name]


def _origin(function: SelectFunction) -> object:
  """Returns what tells one function of the source from another, whatever runs the file."""
  code = getattr(function, "__code__", None)
  # A file that is run by its relative path and one that is imported are the same.
  return function if code is None else (os.path.abspath(code.co_filename), code.co_qualname)


def get_selector(name: str) -> Selector:
  """Returns the selector of that name.

  Raises:
    UserError: an unknown name, naming the nearest one.
  """
  if name not in _SELECTORS:
    raise UserError(
      f"selection = {name} does not exist; {did_you_mean(name, _SELECTORS)} (one of your own needs"
      " the module that registers it in config.imports)"
    )
  return _SELECTORS[name]


def selection_names() -> list[str]:
  """Returns the names of all selections."""
  return sorted(_SELECTORS)
