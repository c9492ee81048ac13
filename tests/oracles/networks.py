"""Run one feed-forward network of any decoder family for one token, in float64 with plain loops."""

import math

from oracles.moe import gelu, relu, silu


def _exact_gelu(z):
  return 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))


def _quick_gelu(z):
  return z / (1.0 + math.exp(-1.702 * z))


ACTIVATIONS = {
  "relu": lambda z: relu(z)[0],
  "gelu": lambda z: gelu(z)[0],
  "silu": lambda z: silu(z)[0],
  "gelu_exact": _exact_gelu,
  "quick_gelu": _quick_gelu,
  "squared_relu": lambda z: relu(z)[0] ** 2,
  "shifted_quick_gelu": _quick_gelu,
}


def network(x_D, weights, activation, *, clamp=None):
  """Return (D,): the output for one token.

  Args:
    x_D: input.
    weights: `up` (D, F), `down` (F, D) and, if gated, `gate` (D, F); with biases also `up_bias`
      (F,), `down_bias` (D,) and `gate_bias` (F,).
    activation: its name; "shifted_quick_gelu" multiplies by up + 1 in place of up.
    clamp: upper bound of the gate, and bound of `up` on both sides.
  """
  up_F = x_D @ weights["up"] + weights.get("up_bias", 0.0)
  if "gate" not in weights:
    hidden = [ACTIVATIONS[activation](z) for z in up_F]
  else:
    gate_F = x_D @ weights["gate"] + weights.get("gate_bias", 0.0)
    hidden = [_gated(g, u, activation, clamp) for g, u in zip(gate_F, up_F, strict=True)]
  return hidden @ weights["down"] + weights.get("down_bias", 0.0)


def _gated(gate, up, activation, clamp):
  if clamp is not None:
    gate, up = min(gate, clamp), min(max(up, -clamp), clamp)
  shift = 1.0 if activation == "shifted_quick_gelu" else 0.0
  return ACTIVATIONS[activation](gate) * (up + shift)
