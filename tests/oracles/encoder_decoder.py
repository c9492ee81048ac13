"""Run a whole encoder-decoder for one pair of sequences, in float64 with plain loops.

Letters: M and L lengths of encoder and decoder, D model width, V vocabulary.
"""

import math

import numpy as np
from oracles import attention_variants, language_model, moe, routing


def bucket_both_ways(query, key, num_buckets, max_distance):
  """Return T5's bucket in an encoder: the upper half of them is for keys ahead."""
  half = num_buckets // 2
  own = attention_variants.bucket(abs(query - key), half, max_distance)
  return own + (half if key > query else 0)


def attention(x_LD, source_MD, weights, *, visible, scale, bias=None):
  """Return (L, D): attention of x to a source; a query that sees nothing gets zeros.

  Args:
    x_LD: what queries are made of.
    source_MD: what keys and values are made of.
    weights: `query`, `key`, `value` (D, H, A) and `out` (H, A, D).
    visible: (query, key) -> whether the query may look at the key.
    scale: of the products.
    bias: (query, key) -> (H,) numbers added to the logits; None = none.
  """
  q, k, v = (
    np.einsum("LD,DHA->LHA", rows, weights[name])
    for rows, name in ((x_LD, "query"), (source_MD, "key"), (source_MD, "value"))
  )
  out_LD = np.zeros(np.shape(x_LD))
  for query in range(len(x_LD)):
    keys = [key for key in range(len(source_MD)) if visible(query, key)]
    for head in range(q.shape[1] if keys else 0):
      logits = [scale * float(q[query, head] @ k[key, head]) for key in keys]
      if bias is not None:
        logits = [x + bias(query, key)[head] for x, key in zip(logits, keys, strict=True)]
      mixed = attention_variants.mix(logits, [v[key, head] for key in keys])
      out_LD[query] += mixed @ weights["out"][head]
  return out_LD


def feed_forward(x_LD, weights, *, activation, token_mask, route):
  """Return (L, D) of `dense`, one network, or of `router` (D, E) and `experts`."""
  if "dense" in weights:
    return language_model.dense_ffn(x_LD, weights["dense"], activation)
  assignments = routing.route_group(x_LD @ weights["router"], token_mask=token_mask, **route)
  return moe.moe(x_LD, weights["experts"], assignments.assignments, activation)


def add(x_LD, function, scale, *, placement, epsilon):
  """Return x + f(norm(x)), or norm(x + f(x)) where norms stand behind."""
  if placement == "pre":
    return x_LD + function(language_model.rms_norm(x_LD, scale, epsilon=epsilon))
  return language_model.rms_norm(x_LD + function(x_LD), scale, epsilon=epsilon)


def sinusoid(position, width):
  """Return (D,): sines, then cosines, of frequencies from 1 to 1 / 10,000."""
  half = width // 2
  angles = [position * 10_000.0 ** (-i / (half - 1)) for i in range(half)]
  return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def stack(x_LD, weights, *, mask, causal, encoded, options):
  """Return (L, D) after all blocks and, where norms stand before, the last norm.

  Args:
    x_LD: embedded tokens.
    weights: `blocks`, and of those what `tests/tiny_models.py` makes; `relative_bias`.
    mask: (L,) True for a real token.
    causal: a token sees none after it.
    encoded: (output (M, D), mask (M,)) of an encoder; None = the blocks have no attention to it.
    options: of the model, see `logits`.
  """
  norm = dict(placement=options["placement"], epsilon=options["epsilon"])
  places = np.maximum(np.cumsum(mask) - 1, 0)

  def sees(query, key):
    return bool(mask[key]) and (key <= query or not causal)

  def bias(query, key):
    table, distance = weights["relative_bias"], options["max_distance"]
    if not causal:
      return table[bucket_both_ways(places[query], places[key], len(table), distance)]
    return table[attention_variants.bucket(places[query] - places[key], len(table), distance)]

  for one in weights["blocks"]:

    def mixer(x, one=one):
      own = bias if "relative_bias" in weights else None
      return attention(x, x, one["attention"], visible=sees, scale=options["scale"], bias=own)

    def across(x, one=one):
      output, real = encoded
      return attention(
        x, output, one["cross"], visible=lambda _, m: bool(real[m]), scale=options["scale"]
      )

    def network(x, one=one):
      return feed_forward(
        x, one, activation=options["activation"], token_mask=mask, route=options["route"](len(x))
      )

    x_LD = add(x_LD, mixer, one["mixer_norm"], **norm)
    if encoded is not None:
      x_LD = add(x_LD, across, one["cross_norm"], **norm)
    x_LD = add(x_LD, network, one["feed_forward_norm"], **norm)
  if options["placement"] == "pre":
    x_LD = language_model.rms_norm(x_LD, weights["final_norm"], epsilon=options["epsilon"])
  return x_LD


def logits(tokens, decoder_tokens, weights, *, mask, decoder_mask, options):
  """Return (L, V).

  Args:
    tokens, decoder_tokens: (M,) and (L,) token ids.
    weights: `embedding` (V, D), `encoder` and `decoder` as in `stack`; the head is the embedding.
    mask, decoder_mask: (M,) and (L,) True for a real token.
    options: `placement` "pre" or "post", `epsilon`, `activation`, `scale` of query-key products,
      `max_distance` of the relative bias, `sinusoidal` (offset, or None), `multiplier` of
      embeddings, `divisor` of logits, and `route`: length -> options of `routing.route_group`.
  """

  def embed(ids, real):
    x_LD = options["multiplier"] * weights["embedding"][np.where(real, ids, 0)]
    if options["sinusoidal"] is None:
      return x_LD
    places = np.maximum(np.cumsum(real) - 1, 0) + options["sinusoidal"]
    return x_LD + np.array([sinusoid(place, x_LD.shape[1]) for place in places])

  output = stack(
    embed(tokens, mask), weights["encoder"], mask=mask, causal=False, encoded=None, options=options
  )
  x_LD = stack(
    embed(decoder_tokens, decoder_mask),
    weights["decoder"],
    mask=decoder_mask,
    causal=True,
    encoded=(output, mask),
    options=options,
  )
  return x_LD @ weights["embedding"].T / options["divisor"]
