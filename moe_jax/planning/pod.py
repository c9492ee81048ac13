"""What a config is trained as on a pod: batch, groups and mesh where the config leaves them open.

Published configs keep the batch of an experiment on one machine. Whatever is chosen here instead is
returned in words, to be printed with the plan.
"""

import dataclasses
import math

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.options import Grouping, Overflow
from moe_jax.moe.registry import Chooser
from moe_jax.planning.count import count_parameters
from moe_jax.planning.topology import Topology
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.rules import rules_of, used_axes
from moe_jax.training.config import ExperimentConfig

TOKENS_PER_DEVICE = 8192
CAPACITY_FACTOR = 1.25
# Experts are split over so many devices at most: all-to-alls grow with the ring that they cross.
_MOST_EXPERT_PARTS = 64
# Of groups for the one-hot products of `einsum`, whose cost is linear in it.
_EINSUM_GROUP = 512
# Float32 products of queries and keys, their softmax and their gradient, are in memory at a time.
_SCORE_BYTES = 3 * 4
_SCORE_SHARE = 0.3
_QUERY_BLOCK = 512
# Part of a chip's memory that weights and moments of dense layers may take.
_DENSE_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class PodRun:
  """A training run on a pod.

  Attributes:
    experiment: model, batch and mesh.
    sequence_length: L.
    assumptions: what was chosen for the user, one phrase each.
  """

  experiment: ExperimentConfig
  sequence_length: int
  assumptions: tuple[str, ...]

  @property
  def tokens(self) -> int:
    """Tokens of a step; of an encoder-decoder those that its decoder reads."""
    return self.experiment.batch_size * self.sequence_length


def pod_run(
  experiment: ExperimentConfig,
  topology: Topology,
  *,
  layout: str | None = None,
  batch_size: int | None = None,
  dispatch: str | None = None,
) -> PodRun:
  """Returns how a config is trained on a topology.

  Args:
    experiment: the config; a mesh of more than one device in it is kept.
    topology: the pod.
    layout: a table of `moe_jax.sharding.rules`, on a mesh of its own; None for the config's or the
      default.
    batch_size: sequences a step; None for `TOKENS_PER_DEVICE` or one sequence a device.
    dispatch: None makes dropless dispatch `gather` with a capacity: fixed shapes, and room for
      1.25 instead of all rows that a device might get.

  Raises:
    UserError: a mesh that does not fit the topology.
  """
  length = experiment.data.sequence_length
  rows = batch_size or topology.num_chips * max(1, TOKENS_PER_DEVICE // length)
  said = [f"{rows} sequences of {length:,} tokens a step"]
  if batch_size is None:
    said[0] += f", {rows * length // topology.num_chips:,} tokens a device"
  own_tokens = max(rows // topology.num_chips, 1) * length
  model, phrases = _for_pod(experiment.model, own_tokens, dispatch)
  model, blocks = _in_blocks(model, own_tokens, length, topology)
  sharding = _on_pod(experiment.sharding, model, topology, layout)
  experiment = dataclasses.replace(experiment, model=model, batch_size=rows, sharding=sharding)
  said.append(
    f"AdamW, float32 weights and moments, {model.dtype} activations, remat = {model.remat}"
  )
  if model.encoder is not None:
    said.append("encoder and decoder read sequences of that length each")
  return PodRun(experiment, length, (*said, *phrases, *blocks))


def _on_pod(
  given: ShardingConfig, model: ModelConfig, topology: Topology, layout: str | None
) -> ShardingConfig:
  """Returns the config's mesh, or the default one with what else the config says of devices."""
  sizes = given.sizes.values()
  if layout is not None or all(size == 1 for size in sizes):
    # A config that says nothing has the layout that splits nothing.
    named = None if given.layout == ShardingConfig.layout else given.layout
    chosen = default_sharding(model, topology, layout or named)
    return dataclasses.replace(
      chosen, exchange=given.exchange, hierarchical=given.hierarchical, chunks=given.chunks
    )
  if -1 not in sizes and math.prod(sizes) != topology.num_chips:
    raise UserError(
      f"config.sharding has {math.prod(sizes)} devices and {topology.describe()} has"
      f" {topology.num_chips}: set one of its sizes to -1, or leave the section out"
    )
  return given


def default_sharding(
  model: ModelConfig, topology: Topology, layout: str | None = None
) -> ShardingConfig:
  """Returns a mesh for a model; `layout` names the table, None chooses one.

  Experts are split over as many devices as they divide, the rest of the devices share each
  parameter (`ep_fsdp`). Where every device can have experts of its own and the other parameters are
  small, those are copied (`ep`): then no weight is ever gathered.
  """
  inside, slices = topology.num_chips // topology.num_slices, topology.num_slices
  experts = 1 if model.moe is None else model.moe.routing.num_experts
  share = _dense_state_bytes(model) / topology.chip.hbm_bytes
  if layout is None:
    layout = "fsdp" if model.moe is None else "ep_fsdp"
    if experts >= inside and experts % inside == 0 and share < _DENSE_SHARE:
      layout = "ep"
  rules = rules_of(layout)
  expert = 1
  if "expert" in rules.get("expert", ()):
    most = inside if layout == "ep" else _MOST_EXPERT_PARTS
    expert = _common_power(experts, min(inside, most))
  if "embed" in rules:
    while expert > 1 and share * expert / inside > _DENSE_SHARE:
      expert //= 2
  rest = inside // expert
  tensor = (
    _common_power(_heads(model), rest)
    if "tensor" in used_axes(layout) and "embed" not in rules
    else 1
  )
  sizes = {"expert": expert, "tensor": tensor}
  sizes["fsdp" if "embed" in rules else "data"] = rest // tensor
  if slices > 1:
    sizes["data"] = sizes.get("data", 1) * slices
    sizes["dcn_data"] = slices
  return ShardingConfig(layout=layout, **sizes)


def _dense_state_bytes(model: ModelConfig) -> float:
  """Returns the bytes of weights and moments, float32, of everything but routed experts."""
  count = count_parameters(model)
  return 12.0 * (count.total + count.multi_token.total - count.routed_experts)


def _for_pod(
  model: ModelConfig, own_tokens: int, dispatch: str | None
) -> tuple[ModelConfig, list[str]]:
  """Returns the model with routing groups that devices can hold, and what was changed.

  Groups are as large as a device's tokens: with few tokens an expert, rounding capacity up to whole
  slots would cost more than the capacity factor. The one-hot products of `einsum` grow with them.
  """
  if model.moe is None:
    return model, []
  routing, said, changes = model.moe.routing, [], {}
  form = as_choice(Dispatch, "dispatch", dispatch or model.moe.dispatch)
  if dispatch is None and form == Dispatch.RAGGED:
    form = Dispatch.GATHER
    said.append("dispatch = gather in place of ragged")
  fixed = routing.selector.chooser == Chooser.TOKEN and form != Dispatch.RAGGED
  if fixed and routing.overflow == Overflow.DROPLESS:
    changes |= {"overflow": Overflow.DROP, "capacity_factor": CAPACITY_FACTOR, "capacity": None}
    said.append(f"overflow = drop with capacity_factor = {CAPACITY_FACTOR} in place of dropless")
  if form == Dispatch.RAGGED:
    said.append("experts get equal loads")
  if form != Dispatch.RAGGED and routing.grouping == Grouping.BATCH:
    size = math.gcd(own_tokens, _EINSUM_GROUP) if form == Dispatch.EINSUM else own_tokens
    changes |= {"grouping": Grouping.FIXED, "group_size": size}
    said.append(f"routing groups of {size:,} tokens")
  routing = dataclasses.replace(routing, **changes)
  moe = dataclasses.replace(model.moe, routing=routing, dispatch=form)
  return dataclasses.replace(model, moe=moe), said


def _in_blocks(
  model: ModelConfig, own_tokens: int, length: int, topology: Topology
) -> tuple[ModelConfig, list[str]]:
  """Returns the model with attention in blocks of queries where all at once would fill memory."""
  changes = {}
  for name in ("attention", "global_attention", "latent_attention", "cross_attention"):
    section = getattr(model, name)
    if section is None or section.query_block is not None:
      continue
    scores = _SCORE_BYTES * own_tokens * length * section.num_heads
    if scores > _SCORE_SHARE * topology.chip.hbm_bytes and length > _QUERY_BLOCK:
      changes[name] = dataclasses.replace(section, query_block=_QUERY_BLOCK)
  if not changes:
    return model, []
  said = f"attention in blocks of {_QUERY_BLOCK} queries"
  return dataclasses.replace(model, **changes), [said]


def _heads(model: ModelConfig) -> int:
  section = model.attention or model.latent_attention
  return getattr(section, "num_kv_heads", section.num_heads) if section else 1


def _common_power(number: int, bound: int) -> int:
  """Returns the largest power of two up to `bound` that divides a number."""
  return min(number & -number, 2 ** int(math.log2(max(bound, 1))))
