"""Compute the laboratory's router metrics with plain loops over tokens, in float64.

A token is the list of experts it asked for, best first; padding is no token.
"""

import itertools
import math
from collections import Counter


def tokens_of(expert, asked):
  """Return one list of expert ids for each token that asks for something, from (..., K) arrays."""
  rows = zip(expert.reshape(-1, expert.shape[-1]), asked.reshape(-1, expert.shape[-1]), strict=True)
  lists = [[int(e) for e, a in zip(ids, used, strict=True) if a] for ids, used in rows]
  return [experts for experts in lists if experts]


def entropy(weights):
  """Return -sum p ln p of nonnegative weights scaled to sum to 1."""
  total = sum(weights)
  return -sum(w / total * math.log(w / total) for w in weights if w > 0)


def mutual_information(table):
  """Return the information of a joint table as H(rows) + H(columns) - H(cells)."""
  cells = [cell for row in table for cell in row]
  return (
    entropy([sum(r) for r in table])
    + entropy([sum(c) for c in zip(*table, strict=True)])
    - (entropy(cells))
  )


def jensen_shannon(p, q):
  """Return H((p + q) / 2) - (H(p) + H(q)) / 2."""
  p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
  return entropy([a + b for a, b in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2


def coefficient_of_variation(values):
  """Return the population deviation over the mean."""
  mean = sum(values) / len(values)
  return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) / mean


def saturation(tokens, final_tokens):
  """Return the mean overlap of two lists of expert lists."""
  overlaps = [len(set(a) & set(b)) / len(a) for a, b in zip(tokens, final_tokens, strict=True)]
  return sum(overlaps) / len(overlaps)


def settled(checkpoints):
  """Return for each checkpoint the fraction of tokens that keep their expert from it on.

  Args:
    checkpoints: list of lists of first choices.
  """
  histories = list(zip(*checkpoints, strict=True))
  return [
    sum(all(e == history[-1] for e in history[start:]) for history in histories) / len(histories)
    for start in range(len(checkpoints))
  ]


def coactivation(tokens, num_experts):
  """Return Coact(i, j) = N_ij / N_i over all pairs of each token's experts."""
  single, pairs = Counter(), Counter()
  for experts in tokens:
    single.update(experts)
    pairs.update(itertools.permutations(experts, 2))
  return [
    [pairs[i, j] / single[i] if single[i] else 0.0 for j in range(num_experts)]
    for i in range(num_experts)
  ]


def label_table(labelled_tokens, num_labels, num_experts):
  """Count (label, experts) pairs in a nested list."""
  table = [[0] * num_experts for _ in range(num_labels)]
  for label, experts in labelled_tokens:
    for expert in experts:
      table[label][expert] += 1
  return table


def vocabulary_specialization(labelled_first_choices, min_count):
  """Return the mean over tokens, and over token types, of the largest share of one expert."""
  by_type = {}
  for label, expert in labelled_first_choices:
    by_type.setdefault(label, Counter())[expert] += 1
  often = [c for c in by_type.values() if c.total() >= min_count]
  weighted = sum(max(c.values()) for c in often) / sum(c.total() for c in often)
  return weighted, sum(max(c.values()) / c.total() for c in by_type.values()) / len(by_type)


def repetition(rows):
  """Return the fraction of consecutive tokens that share an expert.

  Args:
    rows: lists of expert lists, None for a token at which a text ends or padding stands.
  """
  repeats = pairs = 0
  for row in rows:
    for before, after in itertools.pairwise(row):
      if before is not None and after is not None:
        pairs += 1
        repeats += bool(set(before) & set(after))
  return repeats / pairs


def distinct_devices(tokens, width):
  """Return the mean number of blocks of `width` experts that a token's experts lie in."""
  return sum(len({expert // width for expert in experts}) for experts in tokens) / len(tokens)
