"""Other routers over the same parameters: an arm of an evaluation, without training anew."""

import dataclasses

import jax
from flax import nnx

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig, make_model
from moe_jax.moe import RoutingConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.registry import Chooser

_FIELDS = {field.name: field.type for field in dataclasses.fields(RoutingConfig)}


def counterfactual(model: ModelConfig, arm: str) -> ModelConfig:
  """Returns the dropless evaluation of `model` with some routing fields changed.

  Args:
    model: the config that was trained.
    arm: "field=value,field=value", for example "top_k=2,weighting=renormalized", or
      "overflow=drop,eval_capacity_factor=1.0,priority=max_score".

  Raises:
    UserError: a model without experts, an unknown field, a value that the router refuses, or a
      router whose parameters are not those of the run.
  """
  if model.moe is None:
    raise UserError(f"--arm={arm}: the model has no experts, so there is no router to change")
  changes = dict(_parse_pair(arm, pair) for pair in arm.split(","))
  try:
    routing = dataclasses.replace(model.dropless().moe.routing, **changes)
    moe = dataclasses.replace(model.moe, routing=routing, dispatch=_dispatch(routing))
  except UserError as error:
    raise UserError(f"--arm={arm}: {error}") from None
  changed = dataclasses.replace(model, moe=moe)
  have, need = _shapes(model), _shapes(changed)
  if any(have.get(path) != shape for path, shape in need.items()):
    raise UserError(
      f"--arm={arm}: this router has parameters or a state that the run has not; change fields"
      " that keep num_experts, the projection, the noise and the number of logits"
    )
  return changed


def part_of(config: ModelConfig, model: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the graph of `config` and those variables of a run's model that it has.

  What it has not is left out: a router without a selection bias evaluates a run that has one.
  """
  graph, abstract = _abstract(config)
  have = dict(nnx.to_flat_state(model))
  return graph, nnx.from_flat_state((path, have[path]) for path, _ in nnx.to_flat_state(abstract))


def _parse_pair(arm: str, pair: str):
  name, equals, text = pair.strip().partition("=")
  if not equals:
    raise UserError(f"--arm={arm}: {pair!r} is no FIELD=VALUE, as in top_k=2")
  if name not in _FIELDS:
    raise UserError(f"--arm={arm}: a router has no field {name}; {did_you_mean(name, _FIELDS)}")
  kinds = {int: int, int | None: int, float: float, float | None: float}
  kind = kinds.get(_FIELDS[name], str)
  if text == "none" and _FIELDS[name] in (int | None, float | None):
    return name, None
  try:
    return name, kind(text)
  except ValueError:
    wanted = "an integer" if kind is int else "a number"
    raise UserError(f"--arm={arm}: {name} = {text} is refused: it must be {wanted}") from None


def _dispatch(routing: RoutingConfig) -> Dispatch:
  """Returns a form that carries the plan out without a buffer that grows with the batch."""
  return Dispatch.EINSUM if routing.selector.chooser == Chooser.SLOT else Dispatch.RAGGED


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx.split(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))))


def _shapes(config: ModelConfig) -> dict:
  return {path: a.get_value().shape for path, a in nnx.to_flat_state(_abstract(config)[1])}
