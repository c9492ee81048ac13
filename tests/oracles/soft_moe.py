"""Run a Soft MoE layer (arXiv 2308.00951 Eq. 1-3) on one group in float64, gradients by hand.

Letters: S tokens, D model width, E experts, C slots per expert, J = E * C slots in all.
"""

import numpy as np
from oracles import moe, whole_groups
from oracles.scores import softmax, softmax_backward


def mixtures(logits_SJ, *, token_mask=None):
  """Return dispatch and combine, both (S, J).

  Dispatch is a softmax over the real tokens of each slot (Eq. 1), combine one over all slots of
  each token (Eq. 3); both are 0 for padding.
  """
  dispatch, combine = (np.zeros(np.shape(logits_SJ), np.float64) for _ in range(2))
  real = whole_groups.real_tokens(token_mask, len(logits_SJ))
  for slot in range(np.shape(logits_SJ)[1] if real else 0):
    shares = softmax([logits_SJ[token][slot] for token in real])
    for token, share in zip(real, shares, strict=True):
      dispatch[token, slot] = share
  for token in real:
    combine[token] = softmax(logits_SJ[token])
  return dispatch, combine


def layer(x_SD, router_DJ, experts, activation, *, capacity, token_mask=None):
  """Return (S, D): slot j belongs to expert j // C; Y = combine f(dispatch^T X) (Eq. 2)."""
  dispatch, combine = mixtures(x_SD @ router_DJ, token_mask=token_mask)
  y_SD = np.zeros(np.shape(x_SD), np.float64)
  for slot in range(dispatch.shape[1]):
    mixed_D = sum(share * x_D for share, x_D in zip(dispatch[:, slot], x_SD, strict=True))
    out_D = moe.ffn(mixed_D, experts[slot // capacity], activation)
    for token in range(len(x_SD)):
      y_SD[token] += combine[token, slot] * out_D
  return y_SD


def layer_backward(x_SD, router_DJ, experts, activation, dy_SD, *, capacity, token_mask=None):
  """Return the gradients of sum(dy * layer(x)): dx (S, D), d_router (D, J), a list of E dicts."""
  dispatch, combine = mixtures(x_SD @ router_DJ, token_mask=token_mask)
  dx_SD = np.zeros(np.shape(x_SD), np.float64)
  d_experts = [{name: np.zeros(w.shape) for name, w in expert.items()} for expert in experts]
  d_dispatch, d_combine = np.zeros_like(dispatch), np.zeros_like(combine)
  for slot in range(dispatch.shape[1]):
    expert = slot // capacity
    mixed_D = dispatch[:, slot] @ x_SD
    d_combine[:, slot] = dy_SD @ moe.ffn(mixed_D, experts[expert], activation)
    d_out_D = combine[:, slot] @ dy_SD
    d_mixed_D, d_expert = moe.ffn_backward(mixed_D, experts[expert], activation, d_out_D)
    d_dispatch[:, slot] = x_SD @ d_mixed_D
    dx_SD += np.outer(dispatch[:, slot], d_mixed_D)
    for name, value in d_expert.items():
      d_experts[expert][name] += value
  rows = zip(combine, d_combine, strict=True)
  d_logits = np.array([softmax_backward(p_J, d_J) for p_J, d_J in rows])
  columns = zip(dispatch.T, d_dispatch.T, strict=True)
  d_logits += np.array([softmax_backward(p_S, d_S) for p_S, d_S in columns]).T
  return dx_SD + d_logits @ router_DJ.T, x_SD.T @ d_logits, d_experts
