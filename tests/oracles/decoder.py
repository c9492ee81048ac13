"""Run a whole decoder for one sequence, in float64, from the pieces of the other oracles.

Letters: L length, D model width, V vocabulary.
"""

import numpy as np
from oracles import language_model, moe, routing


def block(x_LD, weights, *, activation, token_mask, route, epsilon, **attention):
  """Return (L, D): x + attention(norm(x)), then x + feed_forward(norm(x)).

  Args:
    x_LD: (L, D) activations.
    weights: `mixer_norm` (D,), `attention` as in `language_model.attention_layer`,
      `feed_forward_norm` (D,), and either `dense`, one network as in `moe.ffn`, or `router` (D, E)
      and `experts`, a list of E networks.
    activation: "relu", "gelu" or "silu".
    token_mask: (L,) True for a real token; padding visits no expert.
    route: options of `routing.route_group`.
    epsilon: of both norms.
    **attention: options of `language_model.attention_layer`.
  """
  normed_LD = language_model.rms_norm(x_LD, weights["mixer_norm"], epsilon=epsilon)
  x_LD = x_LD + language_model.attention_layer(
    normed_LD, weights["attention"], token_mask=token_mask, **attention
  )
  normed_LD = language_model.rms_norm(x_LD, weights["feed_forward_norm"], epsilon=epsilon)
  if "dense" in weights:
    return x_LD + language_model.dense_ffn(normed_LD, weights["dense"], activation)
  logits_LE = normed_LD @ weights["router"]
  assignments = routing.route_group(logits_LE, token_mask=token_mask, **route).assignments
  return x_LD + moe.moe(normed_LD, weights["experts"], assignments, activation)


def logits(
  tokens, weights, *, positions, token_mask=None, segment_ids=None, epsilon=1e-6, **options
):
  """Return (L, V) next-token logits of one sequence.

  Args:
    tokens: (L,) token ids.
    weights: `embedding` (V, D), `blocks` (a list, as in `block`), `final_norm` (D,), `head` (D, V).
    positions: (L,) integers for the rotation.
    token_mask: (L,) True for a real token; all are real when None.
    segment_ids: (L,) integers; attention stays inside a segment.
    epsilon: of every norm.
    **options: `activation`, `route` and `base` of `block`.
  """
  mask = np.ones(len(tokens), bool) if token_mask is None else token_mask
  x_LD = weights["embedding"][tokens]
  for one in weights["blocks"]:
    x_LD = block(
      x_LD,
      one,
      positions=positions,
      token_mask=mask,
      segment_ids=segment_ids,
      epsilon=epsilon,
      **options,
    )
  return language_model.rms_norm(x_LD, weights["final_norm"], epsilon=epsilon) @ weights["head"]
