"""A step's time and memory in closed form: rough, and quick enough to try every layout.

The search ranks by these numbers and compiles the best; what it then prints is the compiled
program's. The same chip and links as in `moe_jax.planning.roofline`; of a device:

* products: the model's, plus what `remat` computes again, empty slots, and masked places of
  attention, all at the chip's peak;
* memory: attention's products with all keys are written and read about `_SCORE_BYTES` a number in
  a step; the weights of a layer are read for each product with them, and the optimiser's state
  once. Of these and the products each part takes the longer one;
* links: fsdp gathers the weights of a layer for each pass and reduce-scatters their gradients,
  for each microbatch; experts' tokens go there and back in each pass; tensor parallelism sums
  activations twice a layer and pass; copies of parameters sum their gradients once;
* the peak: weights, moments and gradients in float32, the inputs of layers (all that `remat = full`
  keeps), and one layer's or all layers' activations.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moe_jax.models.config import ModelConfig, Remat
from moe_jax.moe.dispatch import Dispatch
from moe_jax.planning.collectives import Collective, CollectiveKind
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import dispatch_cost, forward_flops, mean_visible
from moe_jax.planning.links import link_time
from moe_jax.planning.pod import PodRun
from moe_jax.planning.pod_plan import model_flops_per_device
from moe_jax.planning.topology import Topology
from moe_jax.sharding.rules import rules_of

# Bytes moved for each product of a query with a key in a step: float32 products and their
# gradients, written and read by several fusions; kept ones are written and read once more. Measured
# on compiled programs of Mixtral (experiments/pods), but for that of `none`, which did not fit.
_SCORE_BYTES = {Remat.FULL: 87.0, Remat.DOTS: 114.0, Remat.NONE: 114.0}
# Of float32 weights, gradients and AdamW's moments: read and written once a step.
_STATE_TRAFFIC = 4 * (2 + 1 + 4)
_STATE_BYTES = 4 * (1 + 1 + 2)
# Passes that gather weights and exchange tokens: forward, forward again, backward.
_PASSES = {Remat.FULL: 3, Remat.DOTS: 2, Remat.NONE: 2}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a step is expected to cost a device.

  Attributes:
    compute, memory: seconds of products and of traffic.
    work: of both, part by part the longer.
    links: seconds of collectives.
    peak_bytes: of memory.
    mfu: of the model's FLOPs, no communication hidden.
  """

  compute: float
  memory: float
  work: float
  links: dict[str, float]
  peak_bytes: float
  mfu: float

  @property
  def step(self) -> float:
    """Seconds of a step."""
    return self.work + sum(self.links.values())


def estimate_step(run: PodRun, mesh: Mesh, topology: Topology) -> Estimate:
  """Returns what a run's step is expected to cost on a mesh of a topology."""
  shape = _Shape(run, mesh)
  compute, memory, work = _work(shape, topology)
  links = {name: seconds for name, seconds in _links(shape, topology).items() if seconds}
  least = model_flops_per_device(run, topology) / topology.chip.peak_flops
  return Estimate(compute, memory, work, links, _peak(shape), least / (work + sum(links.values())))


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Sizes of a run on a mesh, of one device where not said otherwise."""

  run: PodRun
  mesh: Mesh

  @property
  def model(self) -> ModelConfig:
    return self.run.experiment.model

  @property
  def rules(self):
    return rules_of(self.run.experiment.sharding.layout)

  def axes(self, name: str) -> tuple[str, ...]:
    return tuple(axis for axis in self.rules.get(name, ()) if self.mesh.shape[axis] > 1)

  def parts(self, *names: str) -> int:
    axes = {axis for name in names for axis in self.axes(name)}
    return math.prod(self.mesh.shape[axis] for axis in axes)

  @property
  def microbatches(self) -> int:
    return self.run.experiment.accumulation_steps

  @property
  def tokens(self) -> float:
    """Of a step; tensor parallelism repeats them."""
    return self.run.tokens / self.parts("batch", "length")

  @functools.cached_property
  def parameters(self) -> tuple[int, int]:
    """All of experts, and all others."""
    count = count_parameters(self.model)
    total = count.total + count.multi_token.total
    return count.routed_experts, total - count.routed_experts

  @property
  def passes(self) -> int:
    return _PASSES[self.model.remat]


def _work(shape: _Shape, topology: Topology) -> tuple[float, float, float]:
  """Returns the seconds of products, of traffic, and of the longer one part by part."""
  chip, model, length = topology.chip, shape.model, shape.run.sequence_length
  forward = forward_flops(model, length)
  all_keys = length / mean_visible(length) if model.encoder is None else 1.0
  scores = forward.pop("attention_scores") * all_keys
  experts = forward.get("routed_experts", 0.0)
  if experts and model.moe.dispatch != Dispatch.RAGGED:
    cost = dispatch_cost(model.moe, model.model_dim, shape.run.experiment.batch_size, length)
    layers = len(model.moe_layers())
    forward["routed_experts"] += layers * (cost.flops + cost.empty_slot_flops)
  again = 1 if model.remat == Remat.FULL else 0
  tokens = shape.run.tokens / topology.num_chips
  head = forward.get("head", 0.0)
  others = tokens * ((3 + again) * (sum(forward.values()) - head) + 3 * head) / chip.peak_flops
  attention = tokens * (3 + again) * scores / chip.peak_flops
  logits = tokens * _heads(model) * length
  score_traffic = logits * _SCORE_BYTES[model.remat] / chip.hbm_bandwidth
  routed, rest = shape.parameters
  held = routed / shape.parts("expert", "expert_mlp") + rest / shape.parts("mlp", "heads")
  weight_traffic = shape.microbatches * held * 2 * (2 + shape.passes) / chip.hbm_bandwidth
  state = _state(shape) / _STATE_BYTES * _STATE_TRAFFIC / chip.hbm_bandwidth
  work = max(others, weight_traffic) + max(attention, score_traffic) + state
  return others + attention, score_traffic + weight_traffic + state, work


def _heads(model: ModelConfig) -> int:
  """Returns the heads of all attention layers together."""
  mixers = model.mixers()
  own = sum(mixers[block[0]].num_heads for block in model.layers() if block[0] != "mamba")
  if model.encoder is None:
    return own
  encoder = model.encoder_stack()
  across = len(model.layers()) * model.cross_attention.num_heads
  return own + across + len(encoder.layers()) * encoder.attention.num_heads


def _state(shape: _Shape) -> float:
  routed, rest = shape.parameters
  parts = shape.parts("expert", "expert_embed", "expert_mlp"), shape.parts("embed", "mlp")
  return _STATE_BYTES * (routed / parts[0] + rest / parts[1])


def _peak(shape: _Shape) -> float:
  """Returns the bytes that a device needs at most."""
  model, tokens = shape.model, shape.tokens / shape.microbatches
  D, layers = (
    model.model_dim,
    len(model.layers()) + (0 if model.encoder is None else len(model.encoder_stack().layers())),
  )
  section = model.attention or model.latent_attention
  block = (
    shape.run.sequence_length
    if section is None
    else (section.query_block or shape.run.sequence_length)
  )
  heads = max(1, _heads(model) // layers) / shape.parts("heads")
  scores = 3 * 4 * tokens * heads * min(block, shape.run.sequence_length)
  hidden = 2 * tokens * _hidden(shape) * 6
  logits = 3 * 4 * tokens * model.vocab_size / shape.parts("vocab")
  kept = 2 * tokens * D * layers
  if model.remat != Remat.FULL:
    kept += layers * (hidden / 3 + scores / (1 if model.remat == Remat.NONE else 2))
  return _state(shape) + kept + max(scores, hidden, logits)


def _hidden(shape: _Shape) -> float:
  """Returns the numbers that a token has inside a feed-forward at most."""
  model = shape.model
  dense = model.mlp.hidden_dim if model.mlp else 0
  if model.moe is None:
    return dense
  slots = dispatch_cost(
    model.moe, model.model_dim, shape.run.experiment.batch_size, shape.run.sequence_length
  ).slots_per_token
  routed = slots * (model.moe.hidden_dim / shape.parts("expert_mlp") + model.model_dim)
  return max(dense, routed + model.moe.shared_hidden_dim)


def _links(shape: _Shape, topology: Topology) -> dict[str, float]:
  """Returns the seconds of every kind of exchange."""
  routed, rest = shape.parameters
  experts = _Weights(
    2 * routed / shape.parts("expert", "expert_mlp"), shape.axes("expert_embed"), True
  )
  others = _Weights(2 * rest / shape.parts("mlp"), shape.axes("embed"), False)
  found = {}
  for name, weights in (("experts", experts), ("others", others)):
    gathers, sums = _weight_links(weights, shape, topology)
    found |= {f"weights of {name}": gathers, f"gradients of {name}": sums}
  model, run = shape.model, shape.run
  if model.moe is not None:
    slots = dispatch_cost(
      model.moe, model.model_dim, run.experiment.batch_size, run.sequence_length
    ).slots_per_token
    rows = 2 * shape.passes * len(model.moe_layers()) * shape.tokens * slots
    found["tokens"] = _seconds(
      CollectiveKind.ALL_TO_ALL, 2 * rows * model.model_dim, shape.axes("expert"), shape, topology
    )
  sums = 2 * shape.passes * len(model.layers()) * shape.tokens * 2 * model.model_dim
  found["activations"] = _seconds(
    CollectiveKind.ALL_REDUCE, sums, shape.axes("mlp"), shape, topology
  )
  return found


class _Weights(NamedTuple):
  """Weights that are gathered together: bfloat16 bytes when whole, over which axes, of experts."""

  num_bytes: float
  axes: tuple[str, ...]
  of_experts: bool


def _weight_links(weights: _Weights, shape: _Shape, topology: Topology) -> tuple[float, float]:
  """Returns the seconds of gathering weights and scattering gradients, and of summing copies."""
  kinds = CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_REDUCE
  gather, scatter = (
    _seconds(kind, weights.num_bytes, weights.axes, shape, topology) for kind in kinds[:2]
  )
  owned = shape.axes("expert") if weights.of_experts else ()
  copies = tuple(axis for axis in shape.axes("batch") if axis not in (*weights.axes, *owned))
  parts = math.prod(shape.mesh.shape[axis] for axis in weights.axes)
  # Gradients are float32 where they are summed over copies.
  sums = _seconds(kinds[2], 2 * weights.num_bytes / parts, copies, shape, topology)
  return shape.microbatches * (shape.passes * gather + scatter), sums


def _seconds(
  kind: CollectiveKind,
  num_bytes: float,
  axes: tuple[str, ...],
  shape: _Shape,
  topology: Topology,
) -> float:
  """Returns the seconds of one collective over mesh axes; 0 over none."""
  if not axes:
    return 0.0
  collective = Collective(kind, num_bytes, axes, groups_along(shape.mesh, axes), 1.0, "")
  time = link_time(collective, shape.mesh, topology)
  return time.ici + time.dcn


def groups_along(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
  """Returns (groups, members) of places in a mesh that differ along the axes alone."""
  places = np.arange(mesh.size).reshape(mesh.devices.shape)
  inner = [mesh.axis_names.index(axis) for axis in axes]
  outer = [i for i in range(places.ndim) if i not in inner]
  members = math.prod(mesh.shape[axis] for axis in axes)
  return places.transpose(outer + inner).reshape(-1, members)
