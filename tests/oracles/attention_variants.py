"""Run one attention layer of any decoder family for one sequence, in float64 with plain loops.

Letters: L length, D model width, H query heads, N key/value heads, A width of one head, P rotated
channels, R rank of a latent.
"""

import math

import numpy as np


def frequencies(width, base, scaling=None):
  """Return the angle per position of each of the width / 2 pairs.

  Args:
    width: P.
    base: period scale.
    scaling: None, or a dict with `kind`: "linear" (arXiv 2306.15595) with `factor`; "yarn"
      (arXiv 2309.00071, released code) with also `original`, `fast`, `slow` and `truncate`;
      "llama3" (arXiv 2407.21783, released code) with also `original`, `low` and `high`.
  """
  plain = [base ** (-2.0 * i / width) for i in range(width // 2)]
  if scaling is None:
    return plain
  return [_scaled(i, f, width, base, scaling) for i, f in enumerate(plain)]


def _scaled(i, frequency, width, base, scaling):
  slowed = frequency / scaling["factor"]
  if scaling["kind"] == "linear":
    return slowed
  if scaling["kind"] == "llama3":
    wavelength = 2 * math.pi / frequency
    if wavelength > scaling["original"] / scaling["low"]:
      return slowed
    if wavelength < scaling["original"] / scaling["high"]:
      return frequency
    smooth = scaling["original"] / wavelength - scaling["low"]
    smooth /= scaling["high"] - scaling["low"]
    return (1 - smooth) * slowed + smooth * frequency

  def channel(turns):
    return width * math.log(scaling["original"] / (turns * 2 * math.pi)) / (2 * math.log(base))

  low, high = channel(scaling["fast"]), channel(scaling["slow"])
  if scaling["truncate"]:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  ramp = min(max((i - low) / (high - low), 0.0), 1.0)
  return ramp * slowed + (1 - ramp) * frequency


def rotate(x_A, position, angles, *, layout="halves", factor=1.0):
  """Return one head's channels with the first 2 * len(angles) of them turned in pairs."""
  y_A, half = np.array(x_A, np.float64), len(angles)
  for i, angle in enumerate(angles):
    first, second = (i, i + half) if layout == "halves" else (2 * i, 2 * i + 1)
    cos, sin = factor * math.cos(position * angle), factor * math.sin(position * angle)
    a, b = float(x_A[first]), float(x_A[second])
    y_A[first], y_A[second] = a * cos - b * sin, b * cos + a * sin
  return y_A


def rms(x, epsilon, scale=1.0):
  """Return x / sqrt(mean(x^2) + epsilon) * scale."""
  x = np.asarray(x, np.float64)
  return x / math.sqrt(sum(x * x) / len(x) + epsilon) * scale


def bucket(distance, num_buckets, max_distance):
  """Return T5's bucket of a key `distance` >= 0 tokens back (arXiv 1910.10683, causal)."""
  exact = num_buckets // 2
  if distance < exact:
    return distance
  steps = math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
  return min(exact + int(steps), num_buckets - 1)


def sees(query, key, positions, token_mask, *, window=None, chunk=None):
  """Return whether `query` attends to `key`: both are places in the sequence."""
  if key > query or not token_mask[key]:
    return False
  if window is not None and positions[query] - positions[key] >= window:
    return False
  return chunk is None or positions[query] // chunk == positions[key] // chunk


def mix(logits, values, sink=None):
  """Return the softmax-weighted sum of the values; a sink takes weight and adds nothing."""
  top = max([*logits, *([] if sink is None else [sink])])
  exponents = [math.exp(x - top) for x in logits]
  total = sum(exponents) + (0.0 if sink is None else math.exp(sink - top))
  return sum(e / total * v for e, v in zip(exponents, values, strict=True))


def attention_layer(
  x_LD,
  weights,
  *,
  positions,
  token_mask,
  scale,
  angles=(),
  layout="halves",
  factor=1.0,
  sight=None,
  qk_norm="none",
  epsilon=1e-6,
  clip=None,
  temperature=None,
  max_distance=None,
):
  """Return (L, D); padding gets zeros.

  Args:
    x_LD: normed input.
    weights: `query` (D, H, A), `key`, `value` (D, N, A), `out` (H, A, D), and where the family has
      them `query_bias` (H, A) and so on, `out_bias` (D,), `query_norm`, `key_norm`, `sinks` (H,),
      `relative_bias` (buckets, H).
    positions: (L,) integers.
    token_mask: (L,) True for a real token.
    scale: of the products.
    angles, layout, factor: see `rotate`; no angles, no rotation.
    sight: dict of `window` or `chunk`, see `sees`.
    qk_norm: "none", "head", "projection" or "l2".
    epsilon: of that norm.
    clip: bound of queries, keys and values.
    temperature: (floor, scale) of the queries' factor.
    max_distance: of the relative bias.
  """
  heads = {name: [] for name in ("query", "key", "value")}
  for x_D, position in zip(x_LD, positions, strict=True):
    for name, rows in heads.items():
      y = np.einsum("D,DHA->HA", x_D, weights[name]) + weights.get(f"{name}_bias", 0.0)
      if qk_norm == "projection" and name != "value":
        y = rms(y.reshape(-1), epsilon, weights[f"{name}_norm"]).reshape(y.shape)
      y = y if clip is None else np.minimum(np.maximum(y, -clip), clip)
      if name != "value":
        if qk_norm == "head":
          y = np.array([rms(y_A, epsilon, weights[f"{name}_norm"]) for y_A in y])
        y = np.array([rotate(y_A, position, angles, layout=layout, factor=factor) for y_A in y])
        y = np.array([rms(y_A, epsilon) for y_A in y]) if qk_norm == "l2" else y
      if temperature is not None and name == "query":
        y = y * (math.log(1 + (position + 1) // temperature[0]) * temperature[1] + 1)
      rows.append(y)
  out_LD = np.zeros(np.shape(x_LD))
  for query in range(len(positions)):
    keys = [
      key
      for key in range(len(positions))
      if sees(query, key, positions, token_mask, **(sight or {}))
    ]
    for head in range(weights["query"].shape[1] if keys else 0):
      kv = head * weights["key"].shape[1] // weights["query"].shape[1]
      logits = []
      for key in keys:
        logits.append(scale * float(heads["query"][query][head] @ heads["key"][key][kv]))
        if "relative_bias" in weights:
          table = weights["relative_bias"]
          distance = positions[query] - positions[key]
          logits[-1] += table[bucket(distance, len(table), max_distance), head]
      sink = weights["sinks"][head] if "sinks" in weights else None
      mixed_A = mix(logits, [heads["value"][key][kv] for key in keys], sink)
      out_LD[query] += mixed_A @ weights["out"][head]
    out_LD[query] += weights.get("out_bias", 0.0)
  return out_LD


def latent_attention_layer(
  x_LD, weights, *, positions, token_mask, scale, angles, layout="pairs", factor=1.0, epsilon=1e-6
):
  """Return (L, D) of multi-head latent attention (arXiv 2405.04434 Eqs. 37 to 47).

  Args:
    x_LD: normed input.
    weights: `query` (D, H, A + P), or `query_down` (D, Q), `query_norm` (Q,) and `query_up`
      (Q, H, A + P); `latent_down` (D, R), `latent_norm` (R,), `rope_key` (D, P), `key_up`
      (R, H, A), `value_up` (R, H, B), `out` (H, B, D).
    positions, token_mask, scale, angles, layout, factor: as in `attention_layer`.
    epsilon: of the norms of the latents.
  """
  queries, keys, values = [], [], []
  for x_D, position in zip(x_LD, positions, strict=True):
    latent_R = rms(x_D @ weights["latent_down"], epsilon, weights["latent_norm"])
    shared_P = rotate(x_D @ weights["rope_key"], position, angles, layout=layout, factor=factor)
    keys_HA = np.einsum("R,RHA->HA", latent_R, weights["key_up"])
    keys.append([np.concatenate([key_A, shared_P]) for key_A in keys_HA])
    values.append(np.einsum("R,RHB->HB", latent_R, weights["value_up"]))
    if "query" in weights:
      query_HA = np.einsum("D,DHA->HA", x_D, weights["query"])
    else:
      query_Q = rms(x_D @ weights["query_down"], epsilon, weights["query_norm"])
      query_HA = np.einsum("Q,QHA->HA", query_Q, weights["query_up"])
    width = query_HA.shape[1] - 2 * len(angles)
    queries.append(
      [
        np.concatenate(
          [q[:width], rotate(q[width:], position, angles, layout=layout, factor=factor)]
        )
        for q in query_HA
      ]
    )
  out_LD = np.zeros(np.shape(x_LD))
  for query in range(len(positions)):
    seen = [key for key in range(query + 1) if token_mask[key]]
    for head in range(weights["out"].shape[0] if seen else 0):
      logits = [scale * float(queries[query][head] @ keys[key][head]) for key in seen]
      mixed_B = mix(logits, [values[key][head] for key in seen])
      out_LD[query] += mixed_B @ weights["out"][head]
  return out_LD
