"""What a trained model loses when its routing is changed at evaluation, without training anew.

Other K and capacities; the best experts of every token hidden, and shared experts removed
(DeepSeekMoE, arXiv 2401.06066, section 4.5: what another expert can stand in for is redundant).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from moe_jax.analysis.counterfactual import counterfactual, part_of
from moe_jax.models import ModelConfig
from moe_jax.models.moe_stacks import moe_stacks
from moe_jax.moe import RoutingConfig
from moe_jax.moe.registry import Chooser, SelectView, TokenChoice, temporary_selection
from moe_jax.moe.selection import ask
from moe_jax.sharding.local import row_top_k

_CAPACITY_FACTORS = (0.5, 1.0, 1.5, 2.0)
_HIDDEN = (1, 2, 4)
_HIDING = "without_best_{}"


@dataclasses.dataclass(frozen=True)
class Intervention:
  """A changed model.

  Attributes:
    name: what was changed, in words.
    config: of the changed model, dropless unless capacity is what was changed.
    model: its variables.
  """

  name: str
  config: ModelConfig
  model: nnx.State


@contextlib.contextmanager
def interventions(config: ModelConfig, model: nnx.State) -> Iterator[list[Intervention]]:
  """Gives all that apply to a model with experts; they can be evaluated while this is open."""
  routing = config.moe.routing
  with contextlib.ExitStack() as stack:
    for hidden in _hidden(routing):
      choose = functools.partial(_without_best, hidden)
      traits = dict(ranked=True, causal=routing.selector.causal)
      stack.enter_context(temporary_selection(_HIDING.format(hidden), choose, **traits))
    found = []
    for name, arm in _arms(routing):
      changed = counterfactual(config, arm)
      found.append(Intervention(name, changed, part_of(changed, model)[1]))
    yield found + _without_shared(config, model)


def _arms(routing: RoutingConfig) -> Iterator[tuple[str, str]]:
  """Yields names, and changes as `counterfactual` takes them."""
  for top_k in _other_k(routing):
    yield f"{top_k} expert{'s' if top_k > 1 else ''} a token", f"top_k={top_k}"
  if routing.selector.chooser == Chooser.TOKEN:
    for factor in _CAPACITY_FACTORS:
      yield f"capacity factor {factor:g}", f"overflow=drop,eval_capacity_factor={factor}"
  for hidden in _hidden(routing):
    what = "best expert" if hidden == 1 else f"best {hidden} experts"
    yield f"the {what} of every token hidden", f"selection={_HIDING.format(hidden)}"


def _other_k(routing: RoutingConfig) -> list[int]:
  if routing.selection != "top_k":
    return []
  wanted = {1, routing.top_k // 2, routing.top_k + 1, 2 * routing.top_k} - {0, routing.top_k}
  return sorted(k for k in wanted if k <= routing.num_experts)


def _hidden(routing: RoutingConfig) -> list[int]:
  """Returns how many of the best experts can be hidden."""
  if routing.selection != "top_k" or routing.num_expert_groups > 1:
    return []
  return [r for r in _HIDDEN if r + routing.top_k <= routing.num_experts]


def _without_best(hidden: int, view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Selects the K largest behind the first `hidden`."""
  _, expert_GSK = row_top_k(view.ranking, config.top_k + hidden)
  return ask(expert_GSK[..., hidden:])


def _without_shared(config: ModelConfig, model: nnx.State) -> list[Intervention]:
  if not config.moe.shared_hidden_dim:
    return []
  shared = [(*stack.path, "shared") for stack in moe_stacks(config)]

  def silenced(path, leaf):
    is_shared = any(path[: len(own)] == own for own in shared)
    return leaf.replace(jnp.zeros_like(leaf[...])) if is_shared else leaf

  flat = [(path, silenced(path, leaf)) for path, leaf in nnx.to_flat_state(model)]
  silent = nnx.from_flat_state(flat)
  found = [Intervention("shared experts removed", config.dropless(), silent)]
  routing = config.moe.routing
  if routing.top_k + 1 in _other_k(routing):
    more = counterfactual(config, f"top_k={routing.top_k + 1}")
    found.append(Intervention("shared experts removed, one more routed", more, silent))
  return found
