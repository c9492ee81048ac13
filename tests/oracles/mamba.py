"""Run one Mamba mixer for one sequence, in float64 with plain loops (arXiv 2312.00752, 2403.19887).

Letters: L length, D model width, I channels, N states of a channel, R rank of the steps, W width of
the convolution.
"""

import math

import numpy as np
from oracles.attention_variants import rms
from oracles.networks import ACTIVATIONS


def selective_scan(x_LI, step_LI, decay_NI, write_LN, read_LN, starts_L, state_NI):
  """Return (L, I) and the last state (N, I): Algorithm 2, a number at a time."""
  state_NI, y_LI = np.array(state_NI, np.float64), np.zeros(np.shape(x_LI))
  for t in range(len(x_LI)):
    if starts_L[t]:
      state_NI = np.zeros_like(state_NI)
    for i in range(x_LI.shape[1]):
      for n in range(len(decay_NI)):
        kept = math.exp(step_LI[t, i] * decay_NI[n, i]) * state_NI[n, i]
        state_NI[n, i] = kept + step_LI[t, i] * x_LI[t, i] * write_LN[t, n]
        y_LI[t, i] += read_LN[t, n] * state_NI[n, i]
  return y_LI, state_NI


def mixer(x_LD, weights, *, token_mask, segment_ids=None, epsilon, activation="silu"):
  """Return (L, D); padding gets zeros, and leaves everything as it is.

  Padding before the first token alone is in the convolution's reach, as the projection of zeros.

  Args:
    x_LD: normed input.
    weights: `input`, `gate` (D, I), `kernel` (W, I), `selection` (I, R + 2 N), `step_norm` (R,),
      `write_norm`, `read_norm` (N,), `step` (R, I), `step_bias` (I,), `log_decay` (I, N), `skip`
      (I,), `output` (I, D), and where the config has them `kernel_bias`, `input_bias`, `gate_bias`
      (I,), `output_bias` (D,).
    token_mask: (L,) True for a real token.
    segment_ids: (L,) integers of packed documents; one document when None.
    epsilon: of the norms.
    activation: after the convolution.
  """
  rank, states = len(weights["step_norm"]), len(weights["write_norm"])
  decay_NI = -np.exp(weights["log_decay"]).T
  out_LD, inputs, state_NI, document = np.zeros(np.shape(x_LD)), [], np.zeros(decay_NI.shape), None
  for t, x_D in enumerate(x_LD):
    mine = None if segment_ids is None else segment_ids[t]
    if not token_mask[t]:
      if not np.any(token_mask[:t]):
        inputs.append(np.zeros(decay_NI.shape[1]) + weights.get("input_bias", 0.0))
        document = mine
      continue
    if document != mine:
      inputs, state_NI, document = [], np.zeros(decay_NI.shape), mine
    inputs.append(x_D @ weights["input"] + weights.get("input_bias", 0.0))
    inner_I = np.zeros(decay_NI.shape[1]) + weights.get("kernel_bias", 0.0)
    for back, kernel_I in enumerate(weights["kernel"][::-1]):
      if back < len(inputs):
        inner_I = inner_I + kernel_I * inputs[-1 - back]
    inner_I = np.array([ACTIVATIONS[activation](z) for z in inner_I])
    selected = inner_I @ weights["selection"]
    step_R = rms(selected[:rank], epsilon, weights["step_norm"])
    write_N = rms(selected[rank : rank + states], epsilon, weights["write_norm"])
    read_N = rms(selected[rank + states :], epsilon, weights["read_norm"])
    step_I = np.log1p(np.exp(step_R @ weights["step"] + weights["step_bias"]))
    y_LI, state_NI = selective_scan(
      inner_I[None], step_I[None], decay_NI, write_N[None], read_N[None], [False], state_NI
    )
    gate_I = x_D @ weights["gate"] + weights.get("gate_bias", 0.0)
    y_I = (y_LI[0] + weights["skip"] * inner_I) * gate_I / (1.0 + np.exp(-gate_I))
    out_LD[t] = y_I @ weights["output"] + weights.get("output_bias", 0.0)
  return out_LD
