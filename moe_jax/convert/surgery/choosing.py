"""Which experts stay, join or double: by use, by their weights, or by their ids."""

import enum
from collections.abc import Sequence

import numpy as np
import scipy.optimize

from moe_jax.convert.surgery.expert_mixtures import Member, NewExpert
from moe_jax.convert.surgery.experts_from_dense import EXPERTS, HIDDEN_AXIS
from moe_jax.convert.surgery.layer_trees import Leaves, take_apart
from moe_jax.convert.surgery.operation import feed_forward_place, layers_of
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig


class Similarity(enum.StrEnum):
  """What experts are alike in: the cosine of these vectors."""

  ROUTER = "router"  # their columns of the router (M-SMoE, arXiv 2310.01334, compares logits)
  WEIGHTS = "weights"  # all their weights


class Alignment(enum.StrEnum):
  """The order of hidden units in which experts are averaged."""

  NONE = "none"  # as they are
  PERMUTATION = "permutation"  # the one most like the expert that the others join


def moe_layers(leaves: Leaves, config: ModelConfig) -> list[Leaves]:
  """Returns the arrays of the feed-forward of every MoE layer, by their places in it."""
  layers = take_apart(leaves, config).layers
  found = []
  for number in layers_of(config, "moe"):
    place = feed_forward_place(layers[number])
    found.append(
      {path[len(place) :]: a for path, a in layers[number].items() if path[: len(place)] == place}
    )
  return found


def weight_norms(layer: Leaves) -> np.ndarray:
  """Returns (E,) float64, the length of the vector of all of an expert's weights."""
  return np.linalg.norm(_flat_weights(layer), axis=1)


def kept(scores: np.ndarray, count: int) -> list[NewExpert]:
  """Returns the `count` experts of the highest scores (E,), in their order; ties: lower ids."""
  best = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]
  return [NewExpert((Member(int(expert)),)) for expert in sorted(best)]


def without(num_experts: int, dropped: Sequence[int]) -> list[NewExpert]:
  """Returns all experts but those.

  Raises:
    UserError: an id that is no expert's, or no expert left.
  """
  unknown = sorted(set(dropped) - set(range(num_experts)))
  if unknown or len(set(dropped)) == num_experts:
    fault = f"expert {unknown[0]} does not exist" if unknown else "no expert would be left"
    raise UserError(
      f"experts {', '.join(map(str, dropped))} cannot be dropped: {fault}; the layer's are 0 to"
      f" {num_experts - 1}"
    )
  return [NewExpert((Member(e),)) for e in range(num_experts) if e not in set(dropped)]


def merged(
  layer: Leaves, usage: np.ndarray, count: int, by: Similarity, align: Alignment
) -> list[NewExpert]:
  """Returns `count` experts, each the mean of a cluster (M-SMoE, arXiv 2310.01334 section 3.1).

  The most used experts lead the clusters; each of the others joins the leader that it is most like.
  The mean is weighted by usage (Eq. 2 there), that of router columns and selection biases too.

  Args:
    layer: the arrays of the layer, see `moe_layers`.
    usage: (E,) assignments of every expert; where a cluster has none, its experts count alike.
    count: how many experts there are to be.
    by: what experts are alike in.
    align: the order of hidden units in which they are averaged.
  """
  usage = np.asarray(usage, np.float64)
  leaders = sorted(np.argsort(-usage, kind="stable")[:count].tolist())
  likeness = _cosines(_vectors(layer, by))
  clusters = {leader: [leader] for leader in leaders}
  for expert in range(len(usage)):
    if expert not in clusters:
      clusters[max(leaders, key=lambda leader: likeness[expert, leader])].append(expert)
  return [_mean(layer, leader, members, usage, align) for leader, members in clusters.items()]


def grown(usage: np.ndarray, count: int, *, copies: bool, noise: float) -> list[NewExpert]:
  """Returns the experts of a layer and further ones, `count` in all.

  Args:
    usage: (E,) assignments of every expert.
    count: how many experts there are to be.
    copies: further experts are copies of the most used ones, in turn; otherwise drawn anew.
    noise: of copies, see `NewExpert`.
  """
  old = [NewExpert((Member(expert),)) for expert in range(len(usage))]
  if not copies:
    return old + [NewExpert(())] * (count - len(old))
  hottest = np.argsort(-np.asarray(usage, np.float64), kind="stable").tolist()
  sources = [hottest[i % len(old)] for i in range(count - len(old))]
  return old + [NewExpert((Member(expert),), noise) for expert in sources]


def _mean(layer, leader: int, members: list[int], usage: np.ndarray, align: Alignment) -> NewExpert:
  counts = usage[members]
  shares = counts / counts.sum() if counts.sum() else np.full(len(members), 1 / len(members))
  aligned = align == Alignment.PERMUTATION
  return NewExpert(
    tuple(
      Member(e, float(s), matching_units(layer, leader, e) if aligned and e != leader else None)
      for e, s in zip(members, shares, strict=True)
    )
  )


def matching_units(layer: Leaves, leader: int, expert: int) -> np.ndarray:
  """Returns (F,) the hidden units of `expert`, each at the place of its like in `leader`.

  The permutation with the largest sum of scalar products of what enters and leaves the units, which
  is the one of the smallest distance between the experts (Git Re-Basin, arXiv 2209.04836, section
  3.2). An expert computes the same in any order of its units.
  """
  a, b = _units(layer, leader), _units(layer, expert)
  _, units = scipy.optimize.linear_sum_assignment(a @ b.T, maximize=True)
  return units


def _units(layer: Leaves, expert: int) -> np.ndarray:
  """Returns (F, ...) float64, all that belongs to each hidden unit of an expert."""
  parts = []
  for path, stack in layer.items():
    if path[:2] == EXPERTS and path[-1] in HIDDEN_AXIS:
      array = np.moveaxis(stack[expert].astype(np.float64), HIDDEN_AXIS[path[-1]], 0)
      parts.append(array.reshape(len(array), -1))
  return np.concatenate(parts, axis=1)


def _vectors(layer: Leaves, by: Similarity) -> np.ndarray:
  if by == Similarity.WEIGHTS:
    return _flat_weights(layer)
  experts = len(layer[EXPERTS + ("up",)])
  return layer["router", "kernel"].T[:experts].astype(np.float64)


def _flat_weights(layer: Leaves) -> np.ndarray:
  arrays = [a.astype(np.float64) for path, a in layer.items() if path[:2] == EXPERTS]
  return np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)


def _cosines(vectors: np.ndarray) -> np.ndarray:
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  unit = vectors / np.where(lengths > 0, lengths, 1)
  return unit @ unit.T
