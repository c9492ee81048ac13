"""Dataclasses from mappings: what is accepted, what is refused and in which words, the way back."""

import dataclasses
import enum
import json
from dataclasses import field
from typing import Literal, Optional

import pytest
from ml_collections import config_dict

from moe_jax.config import dataclass_from, to_mapping
from moe_jax.errors import UserError


class Place(enum.Enum):
  DROP = "drop"
  REROUTE = "reroute"


@dataclasses.dataclass(frozen=True)
class Routing:
  num_experts: int
  top_k: int = 2
  place: Place = Place.DROP

  def __post_init__(self):
    if self.top_k > self.num_experts:
      raise UserError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")


@dataclasses.dataclass(frozen=True)
class MoE:
  routing: Routing = field(metadata={"flatten": True})
  hidden: int = 8
  capacity_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Noise:
  scale: float = 0.5
  kinds: tuple[Place, ...] = ()


@dataclasses.dataclass(frozen=True)
class OptionallyFlat:
  noise: Noise = field(default=Noise(scale=2.0), metadata={"flatten": True})
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Model:
  moe: MoE
  steps: int = 10
  rate: float = 1.0
  name: str = "tiny"
  causal: bool = True
  shape: tuple[int, ...] = (1,)
  window: tuple[int, float] = (1, 0.5)
  blocks: tuple[Noise, ...] = ()
  noise: Optional[Noise] = None  # noqa: UP045 - both spellings must work
  dtype: Literal["float32", "bfloat16"] = "float32"
  derived: int = field(init=False, default=3)


GOOD = {"moe": {"num_experts": 4}}


def _with(**values):
  return {**GOOD, **values}


def test_defaults_fill_what_is_absent():
  assert dataclass_from(Model, GOOD) == Model(moe=MoE(routing=Routing(num_experts=4)))


def test_flattened_keys_live_in_the_parent_section():
  model = dataclass_from(Model, {"moe": {"num_experts": 4, "top_k": 1, "hidden": 3}})
  assert model.moe == MoE(routing=Routing(num_experts=4, top_k=1), hidden=3)


def test_flattened_default_survives_when_none_of_its_keys_is_given():
  assert dataclass_from(OptionallyFlat, {"seed": 1}).noise == Noise(scale=2.0)
  assert dataclass_from(OptionallyFlat, {"scale": 3.0}).noise == Noise(scale=3.0)


def test_int_becomes_float_where_a_float_is_expected():
  rate = dataclass_from(Model, _with(rate=3)).rate
  assert rate == 3.0 and isinstance(rate, float)


def test_config_dict_with_placeholder_and_reference_is_read():
  config = config_dict.ConfigDict({"moe": {"num_experts": 4}, "steps": 6})
  config.moe.capacity_factor = config_dict.placeholder(float)
  config.moe.hidden = config.get_ref("steps") * 4
  model = dataclass_from(Model, config)
  assert model.moe.capacity_factor is None and model.moe.hidden == 24


def test_lists_become_tuples_of_converted_elements():
  model = dataclass_from(Model, _with(shape=[1, 2], window=[3, 4], blocks=[{"kinds": ["drop"]}]))
  assert model.shape == (1, 2)
  assert model.window == (3, 4.0)
  assert model.blocks == (Noise(kinds=(Place.DROP,)),)


def test_instances_are_accepted_in_place_of_sections_and_values():
  moe = MoE(routing=Routing(num_experts=4, place=Place.REROUTE))
  assert dataclass_from(Model, {"moe": moe}).moe is moe
  assert dataclass_from(Routing, {"num_experts": 4, "place": Place.DROP}).place is Place.DROP


@pytest.mark.parametrize(
  ("mapping", "message"),
  [
    (
      {"moe": {"num_expert": 4}},
      "config.moe.num_expert is not a field; did you mean config.moe.num_experts?",
    ),
    ({"moe": {"routing": {"num_experts": 4}}}, "config.moe.routing is not a field"),
    (_with(xyzzy=1), "config.xyzzy is not a field; expected one of config.moe, config.steps"),
    (_with(derived=1), "config.derived is not a field"),
    ({}, "config.moe is missing, expected a section"),
    ({"moe": {"top_k": 1}}, "config.moe.num_experts is missing, expected an int"),
    ({"moe": {}}, "config.moe.num_experts is missing, expected an int"),
    ({"moe": 3}, "config.moe is 3, expected a section"),
    (None, "config is None, expected a section"),
    (_with(steps="abc"), "config.steps is 'abc', expected an int"),
    (_with(steps=1.5), "config.steps is 1.5, expected an int"),
    (_with(steps=2.0), "config.steps is 2.0, expected an int"),
    (_with(steps=True), "config.steps is True, expected an int"),
    (_with(steps=None), "config.steps is None, expected an int"),
    (_with(steps={"a": 1}), "config.steps is a section, expected an int"),
    (_with(rate=True), "config.rate is True, expected a float"),
    (_with(rate="1"), "config.rate is '1', expected a float"),
    (_with(rate=float("inf")), "config.rate is inf, expected a finite float"),
    (_with(rate=float("nan")), "config.rate is nan, expected a finite float"),
    (_with(rate=10**400), "config.rate is inf, expected a finite float"),
    (_with(window=(1, float("-inf"))), "config.window[1] is -inf, expected a finite float"),
    (_with(name="\udcff"), "config.name is '\\udcff', expected text that UTF-8 can encode"),
    (_with(causal=1), "config.causal is 1, expected true or false"),
    (_with(name=1), "config.name is 1, expected a string"),
    (_with(shape=3), "config.shape is 3, expected a tuple, each element an int"),
    (_with(shape="12"), "config.shape is '12', expected a tuple"),
    (_with(shape=(1, "b")), "config.shape[1] is 'b', expected an int"),
    (_with(window=(1,)), "config.window is (1,), expected a tuple of 2 values"),
    (_with(blocks=[{"scal": 1}]), "config.blocks[0].scal is not a field; did you mean"),
    (_with(noise={"scale": "x"}), "config.noise.scale is 'x', expected a float"),
    (_with(dtype="float16"), "expected one of float32, bfloat16; did you mean bfloat16?"),
    (
      {"moe": {"num_experts": 4, "place": "rerout"}},
      "config.moe.place is 'rerout', expected one of drop, reroute; did you mean reroute?",
    ),
    ({"moe": {"num_experts": 4, "place": 1}}, "config.moe.place is 1, expected one of drop"),
    ({"moe": {"num_experts": 1}}, "config.moe: top_k=2 exceeds num_experts=1"),
  ],
)
def test_fault_names_path_value_and_what_was_expected(mapping, message):
  with pytest.raises(UserError) as caught:
    dataclass_from(Model, mapping)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_path_prefix_is_the_callers():
  with pytest.raises(UserError, match=r"^config\.json\.moe\.top_k is 'a'"):
    dataclass_from(Model, {"moe": {"num_experts": 4, "top_k": "a"}}, path="config.json")


def test_field_shared_with_a_flattened_class_is_a_bug_and_not_the_users_fault():
  @dataclasses.dataclass(frozen=True)
  class Twice:
    noise: Noise = field(default=Noise(), metadata={"flatten": True})
    scale: float = 1.0

  with pytest.raises(TypeError, match="share the fields"):
    dataclass_from(Twice, {})


@pytest.mark.parametrize(
  "mapping",
  [
    GOOD,
    {"moe": {"num_experts": 8, "top_k": 1, "place": "reroute", "capacity_factor": 1.25}},
    _with(shape=(3, 4), blocks=({"scale": 1.0}, {"kinds": ("drop", "reroute")}), noise={}),
  ],
)
def test_round_trip_through_json_gives_an_equal_config(mapping):
  model = dataclass_from(Model, mapping)
  plain = to_mapping(model)
  assert json.loads(json.dumps(plain)) == plain
  assert dataclass_from(Model, plain) == model


def test_to_mapping_shows_enums_by_value_and_flattened_fields_in_the_parent():
  moe = to_mapping(MoE(routing=Routing(num_experts=4)))
  assert moe == {
    "num_experts": 4,
    "top_k": 2,
    "place": "drop",
    "hidden": 8,
    "capacity_factor": None,
  }
