"""Choose the experts of one token: a function for each selection.

Each takes a `View` and the token's index, and returns its experts, best first, and for each of them
whether it is asked after all.
"""

import dataclasses
import math

from oracles import decisions

# A score of zero has no logarithm; float32 code has to stop at the smallest normal number.
SMALLEST_SCORE = 2.0**-126


@dataclasses.dataclass
class View:
  """What a selection may read of one group.

  Attributes:
    options: the `Options`.
    num_experts: E, without null experts.
    logits: (S, E') noise included.
    scores: (S, E or more).
    ranking: (S, E or more): scores plus bias, -inf outside the token's expert groups.
    mask: (S,) True for a real token.
    token_ids, segment_ids: (S,) or None.
    draws: numbers for the group: (S,) uniform for "random_second", (S, E') Gumbel for "sample", (S,
      E') uniform for "random"; None otherwise.
  """

  options: object
  num_experts: int
  logits: object
  scores: object
  ranking: object
  mask: object
  token_ids: object
  segment_ids: object
  draws: object


def top_experts(scores, top_k):
  """Return the ids of the K largest scores of one token, best first; ties go to the lower id."""
  return decisions.best_first(scores)[:top_k]


def all_asked(experts):
  """Return the experts, every one of them asked."""
  return experts, [True] * len(experts)


def top_k(view, token):
  """Choose the K best by ranking."""
  return all_asked(top_experts(view.ranking[token], view.options.top_k))


def second_share(view, token, experts):
  """Return g2 / (g1 + g2) of the scores of two experts."""
  first, second = (view.scores[token][expert] for expert in experts)
  return second / (first + second) if first + second > 0 else 0.0


def random_second(view, token):
  """Ask the second with probability min(1, share / threshold): GShard's 2 g2 > u at 0.5."""
  experts, _ = top_k(view, token)
  if not view.options.train:
    return all_asked(experts)
  bar = view.draws[token] * view.options.second_threshold
  return experts, [True, decisions.exceeds(second_share(view, token, experts), bar)]


def threshold_second(view, token):
  """Ask the second where its share exceeds the threshold (Mesh TensorFlow)."""
  experts, _ = top_k(view, token)
  bar = view.options.second_threshold
  return experts, [True, decisions.exceeds(second_share(view, token, experts), bar)]


def sample(view, token):
  """Take the K largest of ln(score) + Gumbel: a sample without replacement (arXiv 1903.06059)."""
  if not view.options.train:
    return top_k(view, token)
  noisy = [
    math.log(max(score, SMALLEST_SCORE)) + draw
    for score, draw in zip(view.scores[token], view.draws[token], strict=True)
  ]
  return all_asked(top_experts(noisy, view.options.top_k))


def random(view, token):
  """Take the K largest uniform draws: K different experts, each as likely as any other."""
  draws = view.draws[token]
  order = sorted(range(len(draws)), key=lambda expert: (-draws[expert], expert))
  return all_asked(order[: view.options.top_k])


def positive(view, token):
  """Ask every expert whose score is above 0 (ReMoE, arXiv 2412.14711 Eq. 5)."""
  experts = top_experts(view.ranking[token], view.num_experts)
  return experts, [decisions.exceeds(view.ranking[token][expert], 0.0) for expert in experts]


def hierarchical(view, token):
  """Take the best gates, then the best experts inside each of them (arXiv 1701.06538 app. B)."""
  options = view.options
  size = view.num_experts // options.num_expert_groups
  gate_logits = view.logits[token][view.num_experts :]
  experts = []
  for gate in top_experts(gate_logits, options.top_expert_groups):
    inner = view.logits[token][gate * size : (gate + 1) * size]
    best = top_experts(inner, options.top_k // options.top_expert_groups)
    experts += [gate * size + index for index in best]
  return all_asked(experts)


def hash_ids(view, token):
  """Take K consecutive experts from the hash of the last token ids (arXiv 2106.04426).

  What stands before the sequence, and padding, counts as id 0.
  """
  hashed = view.options.hash_seed
  for back in range(view.options.hash_ngram):
    earlier = token - back
    known = same_sequence(view, earlier, token) and view.mask[earlier]
    token_id = int(view.token_ids[earlier]) if known else 0
    hashed = mix_bits(hashed ^ mix_bits(token_id + 1))
  return consecutive(hashed, view)


def same_sequence(view, earlier, token):
  """Tell whether no segment begins between an earlier place and a token."""
  if earlier < 0:
    return False
  ids = view.segment_ids
  return ids is None or all(ids[place] == ids[token] for place in range(earlier, token))


def table(view, token):
  """Take the token's id for the first expert."""
  return consecutive(int(view.token_ids[token]), view)


def consecutive(first, view):
  """Return K experts from `first` on, around the end."""
  return all_asked([(first + step) % view.num_experts for step in range(view.options.top_k)])


def mix_bits(value):
  """Return the 32-bit finaliser of MurmurHash3."""
  value = ((value ^ (value >> 16)) * 0x85EBCA6B) % 2**32
  value = ((value ^ (value >> 13)) * 0xC2B2AE35) % 2**32
  return value ^ (value >> 16)


SELECTIONS = {
  "top_k": top_k,
  "random_second": random_second,
  "threshold_second": threshold_second,
  "sample": sample,
  "random": random,
  "positive": positive,
  "hierarchical": hierarchical,
  "hash": hash_ids,
  "table": table,
}
