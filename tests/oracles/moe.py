"""Run a Mixture-of-Experts layer token by token in float64, with gradients derived by hand.

An expert is a dict of matrices: {"wi": (D, F), "wo": (F, D)} for the plain one, and
{"wi_gate": (D, F), "wi_up": (D, F), "wo": (F, D)} for the gated one (SwiGLU with "silu", GEGLU with
"gelu", arXiv 2002.05202). No biases. Assignments come from `routing`.
"""

import math

import numpy as np
from oracles import routing


def relu(z):
  """Return max(z, 0) and its derivative (0 at z = 0)."""
  return (z, 1.0) if z > 0 else (0.0, 0.0)


def gelu(z):
  """Return the tanh form of GELU (arXiv 1606.08415) and its derivative."""
  scale = math.sqrt(2.0 / math.pi)
  t = math.tanh(scale * (z + 0.044715 * z**3))
  inner_slope = scale * (1.0 + 3.0 * 0.044715 * z**2)
  return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner_slope


def silu(z):
  """Return z * sigmoid(z) and its derivative."""
  s = 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
  return z * s, s + z * s * (1.0 - s)


ACTIVATIONS = {"relu": relu, "gelu": gelu, "silu": silu}


def activate(z_F, activation):
  """Return the activation of a vector and its elementwise derivative, both (F,)."""
  pairs = [ACTIVATIONS[activation](float(z)) for z in z_F]
  return np.array([value for value, _ in pairs]), np.array([slope for _, slope in pairs])


def ffn(x_D, expert, activation):
  """Return the (D,) output of one expert for one token."""
  if "wi_gate" in expert:
    gate_F, _ = activate(x_D @ expert["wi_gate"], activation)
    return (gate_F * (x_D @ expert["wi_up"])) @ expert["wo"]
  hidden_F, _ = activate(x_D @ expert["wi"], activation)
  return hidden_F @ expert["wo"]


def ffn_backward(x_D, expert, activation, dy_D):
  """Return the gradients of sum(dy * ffn(x)) for one token.

  Returns:
    dx: (D,).
    d_expert: dict of the expert's shapes.
  """
  dh_F = expert["wo"] @ dy_D
  if "wi_gate" in expert:
    gate_F, slope_F = activate(x_D @ expert["wi_gate"], activation)
    up_F = x_D @ expert["wi_up"]
    dgate_F, dup_F = dh_F * up_F * slope_F, dh_F * gate_F
    d_expert = {
      "wi_gate": np.outer(x_D, dgate_F),
      "wi_up": np.outer(x_D, dup_F),
      "wo": np.outer(gate_F * up_F, dy_D),
    }
    return expert["wi_gate"] @ dgate_F + expert["wi_up"] @ dup_F, d_expert
  hidden_F, slope_F = activate(x_D @ expert["wi"], activation)
  dz_F = dh_F * slope_F
  return expert["wi"] @ dz_F, {"wi": np.outer(x_D, dz_F), "wo": np.outer(hidden_F, dy_D)}


def moe(x_SD, experts, assignments, activation):
  """Return (S, D): for each kept assignment, weight * FFN_expert(x); zero for a token with none.

  Args:
    x_SD: (S, D) tokens of one group.
    experts: list of E experts.
    assignments: list of routing.Assignment.
    activation: "relu", "gelu" or "silu".
  """
  y_SD = np.zeros(np.shape(x_SD), np.float64)
  for one in assignments:
    if one.slot >= 0:
      y_SD[one.token] += one.weight * ffn(x_SD[one.token], experts[one.expert], activation)
  return y_SD


def dense_moe(x_SD, experts, weights_SE, activation):
  """Return (S, D): every expert on every token, weighted by a dense (S, E) matrix."""
  y_SD = np.zeros(np.shape(x_SD), np.float64)
  for token, x_D in enumerate(x_SD):
    for index, expert in enumerate(experts):
      y_SD[token] += weights_SE[token][index] * ffn(x_D, expert, activation)
  return y_SD


def moe_backward(x_SD, experts, assignments, activation, dy_SD):
  """Return the gradients of sum(dy * moe(x)), the choice of experts and slots held fixed.

  Returns:
    dx_SD: (S, D), through the experts only.
    d_experts: list of E dicts; all zeros for an expert without tokens.
    d_weights: (S, E) gradient of each kept assignment's weight, dy . FFN_e(x); zero elsewhere.
  """
  dx_SD = np.zeros(np.shape(x_SD), np.float64)
  d_experts = [{name: np.zeros(w.shape) for name, w in expert.items()} for expert in experts]
  d_weights = np.zeros((len(x_SD), len(experts)))
  for one in assignments:
    if one.slot < 0:
      continue
    x_D, expert, dy_D = x_SD[one.token], experts[one.expert], dy_SD[one.token]
    d_weights[one.token, one.expert] = dy_D @ ffn(x_D, expert, activation)
    dx_D, d_expert = ffn_backward(x_D, expert, activation, one.weight * dy_D)
    dx_SD[one.token] += dx_D
    for name, value in d_expert.items():
      d_experts[one.expert][name] += value
  return dx_SD, d_experts, d_weights


def router_backward(logits_SE, assignments, d_weights, *, top_k, weighting):
  """Return (S, E) the gradient of the router logits, given that of the weights.

  The choice of experts and slots is held fixed. Over the set of experts that share a denominator Z
  (the chosen ones, or the kept ones for "renormalized_after_drop"), w_k = p_k / Z, so with
  a = sum_k dw_k * w_k
    dp_j = (dw_j - a) / Z,
  and through the softmax p over all experts
    dlogit_j = p_j * (dp_j - sum_i dp_i * p_i).
  "softmax_selected" is the second formula over the chosen experts alone.

  Args:
    logits_SE: (S, E) router logits.
    assignments: list of routing.Assignment; tokens without one (pads) get zeros.
    d_weights: (S, E) from `moe_backward`; zero where nothing was kept.
    top_k: K.
    weighting: one of routing.WEIGHTINGS.
  """
  routing.check_option("weighting", weighting, routing.WEIGHTINGS)
  d_logits = np.zeros(np.shape(logits_SE), np.float64)
  for token in sorted({one.token for one in assignments}):
    scores = routing.softmax(logits_SE[token])
    kept = [one.expert for one in assignments if one.token == token and one.slot >= 0]
    shared = kept if weighting == "renormalized_after_drop" else routing.top_experts(scores, top_k)
    if not kept:
      continue
    dw = d_weights[token]
    if weighting == "raw":
      d_logits[token] = softmax_backward(scores, dw)
      continue
    total = sum(scores[expert] for expert in shared)
    weights = {expert: scores[expert] / total for expert in shared}
    mean = sum(dw[expert] * weights[expert] for expert in shared)
    if weighting == "softmax_selected":
      for expert in shared:
        d_logits[token, expert] = weights[expert] * (dw[expert] - mean)
      continue
    d_scores = np.zeros(len(scores))
    for expert in shared:
      d_scores[expert] = (dw[expert] - mean) / total
    d_logits[token] = softmax_backward(scores, d_scores)
  return d_logits


def softmax_backward(scores, d_scores):
  """Return the logits' gradient of one softmax: p * (dp - sum(dp * p))."""
  mean = sum(d * p for d, p in zip(d_scores, scores, strict=True))
  return np.array([p * (d - mean) for d, p in zip(d_scores, scores, strict=True)])


def layer(x_SD, router_DE, experts, activation, **options):
  """Return (S, D) of a whole layer: logits x @ router, `routing.route_group(**options)`, `moe`."""
  assignments = routing.route_group(x_SD @ router_DE, **options).assignments
  return moe(x_SD, experts, assignments, activation)


def layer_backward(x_SD, router_DE, experts, activation, dy_SD, **options):
  """Return the gradients of sum(dy * layer(x)).

  Returns:
    dx_SD: (S, D), through the experts and through the router.
    d_router: (D, E).
    d_experts: list of E dicts.
  """
  logits_SE = x_SD @ router_DE
  assignments = routing.route_group(logits_SE, **options).assignments
  dx_SD, d_experts, d_weights = moe_backward(x_SD, experts, assignments, activation, dy_SD)
  d_logits = router_backward(
    logits_SE,
    assignments,
    d_weights,
    top_k=options["top_k"],
    weighting=options.get("weighting", "raw"),
  )
  return dx_SD + d_logits @ router_DE.T, x_SD.T @ d_logits, d_experts
