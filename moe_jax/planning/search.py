"""A search for the layout of a run: all candidates by closed formulas, the best few compiled."""

import dataclasses
import itertools
from collections.abc import Iterator

from moe_jax.errors import UserError
from moe_jax.models.config import Remat
from moe_jax.moe.options import Grouping
from moe_jax.planning.estimate import Estimate, estimate_step
from moe_jax.planning.pod import PodRun
from moe_jax.planning.pod_plan import PodPlan, plan_pod
from moe_jax.planning.topology import Topology
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.layout import Layout, make_layout
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, abstract_state, state_shardings

_MICROBATCHES = (1, 2, 4)
# Tokens of a routing group, besides all of a device.
_SMALL_GROUP = 1024
_TENSOR = (1, 2, 4, 8)
# Part of a chip's memory that closed formulas may fill: they know no fragmentation.
_FILLED = 0.9


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A run and what it is expected to cost."""

  run: PodRun
  estimate: Estimate

  @property
  def label(self) -> str:
    """What sets it apart, in words."""
    config = self.run.experiment
    sizes = " x ".join(f"{axis} {n}" for axis, n in config.sharding.sizes.items() if n > 1)
    return f"{config.sharding.layout} ({sizes})"

  @property
  def kind(self) -> tuple[str, Remat]:
    """Its layout and what it computes again."""
    config = self.run.experiment
    return config.sharding.layout, config.model.remat


@dataclasses.dataclass(frozen=True)
class Found:
  """Result of a search.

  Attributes:
    tried: candidates that were estimated.
    refused: those that the formulas found too large for the memory.
    compiled: candidates with the plan of their compiled program, the fastest first.
    too_large: compiled ones that did not fit after all, with the reason.
    naive: plain `fsdp` over all devices, with the config's remat, and its compiled plan.
  """

  tried: int
  refused: int
  compiled: tuple[tuple[Candidate, PodPlan], ...]
  too_large: tuple[tuple[Candidate, str], ...]
  naive: tuple[Candidate, PodPlan] | None


def search(run: PodRun, topology: Topology, compile_best: int = 2) -> Found:
  """Finds the layout, remat policy, number of microbatches and group size of the fastest step.

  Args:
    run: what to train; its batch stays.
    topology: the pod.
    compile_best: candidates to compile, besides plain `fsdp`.

  Raises:
    UserError: libtpu is not installed, or no candidate fits, by the formulas or once compiled.
  """
  # Ranking needs no compiler: that one is missing should be told before it.
  topology.devices()
  ranked, refused = rank(run, topology)
  if not ranked:
    raise UserError(
      f"none of {refused} layouts of this model fits into {topology.describe()} by the closed"
      " formulas: use a larger slice or a smaller batch"
    )
  compiled, too_large, kinds = [], [], set()
  for candidate in _distinct(ranked):
    if len(compiled) == compile_best:
      break
    # Another mesh of the same kind would be near it, and compiling is slow.
    if candidate.kind in kinds:
      continue
    plan = _try(candidate, topology, too_large)
    if plan is not None:
      kinds.add(candidate.kind)
      compiled.append((candidate, plan))
  compiled.sort(key=lambda pair: pair[1].step_seconds)
  naive = candidate_of(naive_run(run, topology), topology)
  plan = None if naive is None else _try(naive, topology, too_large)
  if not compiled and plan is None:
    raise UserError(
      f"none of the {len(too_large)} layouts that the closed formulas took for fitting does; the"
      f" first: {too_large[0][1]}"
    )
  return Found(
    len(ranked) + refused,
    refused,
    tuple(compiled),
    tuple(too_large),
    None if plan is None else (naive, plan),
  )


def rank(run: PodRun, topology: Topology) -> tuple[list[Candidate], int]:
  """Returns the candidates that fit by the closed formulas, the fastest first, and the others.

  Nothing is compiled, and libtpu is not needed; the others are counted.
  """
  found, refused = [], 0
  for variant, layout in _variants(run, topology):
    candidate = _on_mesh(variant, layout, topology)
    if candidate is None:
      continue
    if candidate.estimate.peak_bytes > _FILLED * topology.chip.hbm_bytes:
      refused += 1
    else:
      found.append(candidate)
  return sorted(found, key=lambda each: each.estimate.step), refused


def candidate_of(run: PodRun, topology: Topology) -> Candidate | None:
  """Returns a run with its estimate; None where the mesh does not divide its arrays.

  Nothing is compiled, and libtpu is not needed.
  """
  layout = make_layout(run.experiment.sharding, topology.places())
  return None if layout is None else _on_mesh(run, layout, topology)


def _on_mesh(run: PodRun, layout: Layout, topology: Topology) -> Candidate | None:
  """Returns a run with its estimate on a mesh; None where its batch or groups do not split."""
  try:
    rows = run.experiment.batch_size // run.experiment.accumulation_steps
    layout.spec(("batch", "length"), (rows, run.sequence_length))
  except UserError:
    return None
  moe = run.experiment.model.moe
  if moe is not None and moe.routing.grouping == Grouping.FIXED:
    whole, rest = divmod(rows * run.sequence_length, moe.routing.group_size)
    if rest or whole % layout.parts("group"):
      return None
  return Candidate(run, estimate_step(run, layout.mesh, topology))


def naive_run(run: PodRun, topology: Topology) -> PodRun:
  """Returns the run with every parameter split over all devices, and no other parallelism."""
  sizes = {"fsdp": topology.num_chips}
  if topology.num_slices > 1:
    sizes["dcn_fsdp"] = topology.num_slices
  return _with(run, sharding=ShardingConfig(layout="fsdp", **sizes))


def _try(candidate: Candidate, topology: Topology, too_large: list) -> PodPlan | None:
  """Compiles a candidate; notes why where it does not fit."""
  try:
    return plan_pod(candidate.run, topology)
  except UserError as error:
    too_large.append((candidate, str(error)))
    return None


def _distinct(ranked: list[Candidate]) -> Iterator[Candidate]:
  """Yields the best candidate of every mesh and remat: its other variants are near it."""
  seen = set()
  for candidate in ranked:
    config = candidate.run.experiment
    key = config.sharding, config.model.remat
    if key not in seen:
      seen.add(key)
      yield candidate


def _variants(run: PodRun, topology: Topology) -> Iterator[tuple[PodRun, Layout]]:
  """Yields the runs to try, those whose parameters the mesh does not divide left out."""
  config = run.experiment
  state = abstract_state(config.model, make_optimizer(config.optimizer, config.steps))
  for sharding in _shardings(run, topology):
    layout = make_layout(sharding, topology.places())
    if layout is None or not _divides(state, layout):
      continue
    for remat, count in itertools.product(Remat, _MICROBATCHES):
      if run.experiment.batch_size % count == 0:
        for size in _group_sizes(run, sharding, count):
          yield _with(run, sharding=sharding, remat=remat, count=count, group_size=size), layout


def _shardings(run: PodRun, topology: Topology) -> Iterator[ShardingConfig]:
  chips, slices = topology.num_chips, topology.num_slices
  dcn = {"dcn_data": slices} if slices > 1 else {}
  moe = run.experiment.model.moe
  experts = [1] if moe is None else _powers(moe.routing.num_experts, chips // slices)
  for tensor, expert in itertools.product(_TENSOR, experts):
    rest = chips // (tensor * expert)
    if rest * tensor * expert != chips or rest % slices:
      continue
    for data in _powers(rest, rest):
      if data % slices == 0:
        fsdp = rest // data
        yield ShardingConfig(
          layout=_table(tensor, expert),
          data=data,
          fsdp=fsdp,
          expert=expert,
          tensor=tensor,
          **dcn,
        )


def _table(tensor: int, expert: int) -> str:
  if expert == 1:
    return "fsdp_tp" if tensor > 1 else "fsdp"
  return "ep_fsdp_tp" if tensor > 1 else "ep_fsdp"


def _divides(state: TrainState, layout: Layout) -> bool:
  """Tells whether a mesh divides all arrays of a state."""
  try:
    state_shardings(state, layout)
  except UserError:
    return False
  return True


def _group_sizes(run: PodRun, sharding: ShardingConfig, count: int) -> tuple[int | None, ...]:
  """Returns the sizes of routing groups to try, None where groups are no matter of size."""
  moe = run.experiment.model.moe
  if moe is None or moe.routing.grouping != Grouping.FIXED:
    return (None,)
  parts = count * sharding.data * sharding.fsdp * sharding.expert
  own = max(1, run.tokens // parts)
  return (own, _SMALL_GROUP) if own > _SMALL_GROUP else (own,)


def _with(
  run: PodRun,
  *,
  sharding: ShardingConfig,
  remat: Remat | None = None,
  count: int | None = None,
  group_size: int | None = None,
) -> PodRun:
  config = run.experiment
  model = config.model
  if remat is not None:
    model = dataclasses.replace(model, remat=remat)
  if group_size is not None:
    routing = dataclasses.replace(model.moe.routing, group_size=group_size)
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, routing=routing))
  experiment = dataclasses.replace(
    config, model=model, sharding=sharding, accumulation_steps=count or config.accumulation_steps
  )
  return dataclasses.replace(run, experiment=experiment)


def _powers(number: int, bound: int) -> list[int]:
  """Returns the powers of two up to `bound` that divide a number."""
  return [2**i for i in range(bound.bit_length()) if number % 2**i == 0 and 2**i <= bound]
