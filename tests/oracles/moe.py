"""Run a Mixture-of-Experts layer token by token in float64, with gradients derived by hand.

An expert is a dict of matrices: {"wi": (D, F), "wo": (F, D)} for the plain one, and
{"wi_gate": (D, F), "wi_up": (D, F), "wo": (F, D)} for the gated one (SwiGLU with "silu", GEGLU with
"gelu", arXiv 2002.05202). No biases. Assignments come from `routing`.
"""

import math

import numpy as np
from oracles import routing
from oracles.scores import sigmoid


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


def moe(x_SD, experts, assignments, activation, *, weight_on="output"):
  """Return (S, D): the weighted outputs of each token's experts; zero for a token with none.

  Args:
    x_SD: (S, D) tokens of one group.
    experts: list of E experts.
    assignments: list of routing.Assignment.
    activation: "relu", "gelu" or "silu".
    weight_on: "output", weight * FFN(x), or "input", FFN(weight * x).
  """
  routing.check_option("weight_on", weight_on, ("output", "input"))
  y_SD = np.zeros(np.shape(x_SD), np.float64)
  for one in assignments:
    if one.slot >= 0:
      before, after = (one.weight, 1.0) if weight_on == "input" else (1.0, one.weight)
      y_SD[one.token] += after * ffn(before * x_SD[one.token], experts[one.expert], activation)
  return y_SD


def dense_moe(x_SD, experts, weights_SE, activation):
  """Return (S, D): every expert on every token, weighted by a dense (S, E) matrix."""
  y_SD = np.zeros(np.shape(x_SD), np.float64)
  for token, x_D in enumerate(x_SD):
    for index, expert in enumerate(experts):
      y_SD[token] += weights_SE[token][index] * ffn(x_D, expert, activation)
  return y_SD


def moe_backward(x_SD, experts, assignments, activation, dy_SD, *, weight_on="output"):
  """Return the gradients of sum(dy * moe(x)), the choice of experts and slots held fixed.

  Returns:
    dx_SD: (S, D), through the experts only.
    d_experts: list of E dicts; all zeros for an expert without tokens.
    d_weights: (S, E) gradient of each kept assignment's weight; zero elsewhere.
  """
  dx_SD = np.zeros(np.shape(x_SD), np.float64)
  d_experts = [{name: np.zeros(w.shape) for name, w in expert.items()} for expert in experts]
  d_weights = np.zeros((len(x_SD), len(experts)))
  for one in assignments:
    if one.slot < 0:
      continue
    x_D, expert, dy_D = x_SD[one.token], experts[one.expert], dy_SD[one.token]
    if weight_on == "input":
      d_input, d_expert = ffn_backward(one.weight * x_D, expert, activation, dy_D)
      d_weights[one.token, one.expert] = d_input @ x_D
      dx_SD[one.token] += one.weight * d_input
    else:
      d_weights[one.token, one.expert] = dy_D @ ffn(x_D, expert, activation)
      dx_D, d_expert = ffn_backward(x_D, expert, activation, one.weight * dy_D)
      dx_SD[one.token] += dx_D
    for name, value in d_expert.items():
      d_experts[one.expert][name] += value
  return dx_SD, d_experts, d_weights


def layer(
  x_SD,
  router_DE,
  experts,
  activation,
  *,
  weight_on="output",
  null_expert="zero",
  shared=None,
  **options,
):
  """Return (S, D) of a whole layer: logits x @ router, `routing.route_group(**options)`, `moe`.

  Args:
    x_SD, experts, activation, weight_on: as in `moe`.
    router_DE: (D, E').
    null_expert: "zero", or "identity", which adds the token times the weight of its null experts.
    shared: what every token visits, see `join_shared`, or None.
    **options: as in `routing.route_group`.
  """
  group = routing.route_group(x_SD @ router_DE, **options)
  y_SD = moe(x_SD, experts, group.assignments, activation, weight_on=weight_on)
  if null_expert == "identity":
    y_SD += group.null_weight[:, None] * x_SD
  if shared is not None:
    for token, real in enumerate(group.token_mask):
      if real:
        y_SD[token] = join_shared(x_SD[token], y_SD[token], shared, activation)
  return y_SD


def layer_backward(
  x_SD,
  router_DE,
  experts,
  activation,
  dy_SD,
  *,
  weight_on="output",
  null_expert="zero",
  shared=None,
  **options,
):
  """Return the gradients of sum(dy * layer(x)).

  Returns:
    dx_SD: (S, D), through the experts, the shared ones and the router.
    d_router: (D, E').
    d_experts: list of E dicts.
    d_shared: as `shared`; None without it.
  """
  group = routing.route_group(x_SD @ router_DE, **options)
  dx_shared, d_shared = np.zeros(x_SD.shape), None
  if shared is not None:
    routed = moe(x_SD, experts, group.assignments, activation, weight_on=weight_on)
    if null_expert == "identity":
      routed += group.null_weight[:, None] * x_SD
    dx_shared, dy_SD, d_shared = shared_backward(
      x_SD, routed, shared, activation, dy_SD, group.token_mask
    )
  dx_SD, d_experts, d_weights = moe_backward(
    x_SD, experts, group.assignments, activation, dy_SD, weight_on=weight_on
  )
  d_null = np.zeros((len(x_SD), 1))
  if null_expert == "identity":
    d_null = np.sum(dy_SD * x_SD, axis=1, keepdims=True)
    dx_SD += group.null_weight[:, None] * dy_SD
  nulls = options.get("num_null_experts", 0)
  d_weights = np.concatenate([d_weights, np.repeat(d_null, nulls, axis=1)], axis=1)
  d_logits, _ = routing.router_backward(group, d_weights)
  dx_SD += dx_shared + d_logits @ router_DE.T
  return dx_SD, x_SD.T @ d_logits, d_experts, d_shared


def join_shared(x_D, routed_D, shared, activation):
  """Return (D,) of one token: the output of its routed experts joined with that of the shared ones.

  Args:
    x_D: (D,) the token.
    routed_D: (D,).
    shared: a dict of "network", one expert; "combine": "add" (DeepSeekMoE arXiv 2401.06066),
      "gated" by a sigmoid (Qwen2-MoE arXiv 2407.10671) or "coefficient", a softmax of two numbers
      that weighs the routed and the shared output (PR-MoE arXiv 2201.05596); and "gate", the matrix
      (D, 0, 1 or 2) that makes those numbers.
    activation: of the network.
  """
  kept, added = shares(x_D, shared)
  return kept * routed_D + added * ffn(x_D, shared["network"], activation)


def shares(x_D, shared):
  """Return what the routed and the shared output of one token are multiplied by."""
  routing.check_option("combine", shared["combine"], ("add", "gated", "coefficient"))
  if shared["combine"] == "add":
    return 1.0, 1.0
  numbers = x_D @ shared["gate"]
  if shared["combine"] == "gated":
    return 1.0, sigmoid(float(numbers[0]))
  return tuple(routing.softmax(numbers))


def shared_backward(x_SD, routed_SD, shared, activation, dy_SD, token_mask):
  """Return the gradients of the inputs x and routed of `join_shared`, and of `shared`."""
  dx_SD, d_routed = np.zeros(x_SD.shape), np.zeros(x_SD.shape)
  d_network = {name: np.zeros(w.shape) for name, w in shared["network"].items()}
  d_gate = np.zeros(shared["gate"].shape)
  for token, real in enumerate(token_mask):
    if not real:
      continue
    x_D, dy_D = x_SD[token], dy_SD[token]
    kept, added = shares(x_D, shared)
    d_routed[token] = kept * dy_D
    dx_SD[token], d_own = ffn_backward(x_D, shared["network"], activation, added * dy_D)
    for name, value in d_own.items():
      d_network[name] += value
    if shared["combine"] != "add":
      d_added = dy_D @ ffn(x_D, shared["network"], activation)
      d_kept = dy_D @ routed_SD[token]
      slope = kept * added if shared["combine"] == "coefficient" else added * (1.0 - added)
      d_numbers = np.array([slope * d_added])
      if shared["combine"] == "coefficient":
        d_numbers = slope * np.array([d_kept - d_added, d_added - d_kept])
      d_gate += np.outer(x_D, d_numbers)
      dx_SD[token] += shared["gate"] @ d_numbers
  return dx_SD, d_routed, {"network": d_network, "gate": d_gate}
