"""Compute router losses with plain loops, float64.

Every load-balance loss here is scaled so that uniform routing gives 1, or K where all K choices
count. Importance and load losses (arXiv 1701.06538 Eq. 6-11) are 0 there.
"""

import math

import numpy as np
from oracles import decisions, routing
from oracles.scores import runs


def load_balance_loss(
  scores,
  selected,
  *,
  kind,
  scope="group",
  padding="exclude",
  token_mask=None,
  segment_ids=None,
  global_load=None,
):
  """Return the load-balance loss, E * sum_e f_e * P_e.

  f_e is the fraction of tokens that want expert e; P_e is its mean score.

  Args:
    scores: (G, S, E) router probabilities.
    selected: for each group and token the chosen expert ids, best first; any number of them; unused
      by "switch".
    kind: what f counts. "switch" (arXiv 2101.03961 Eq. 4-6): the argmax of the scores. "gshard"
      (arXiv 2006.16668 Algorithm 1: (1/E) sum_e (c_e/S) m_e, here times E^2): the first choice.
      "all_choices": all choices, so that with K of them f sums to K and uniform routing gives K.
    scope: over which tokens f and P are taken before they are multiplied; the loss is the mean over
      these pools. "group", "sequence" (every run of equal segment ids), "batch" (all tokens), or
      "global_batch", which is "batch" with f replaced by `global_load` if that is given.
    padding: "exclude" divides by the number of real tokens; a pool of padding alone has no loss and
      is left out of the average. "flaxformer" leaves pads out of both sums but divides by all
      tokens, so the loss shrinks with the square of the real fraction.
    token_mask: (G, S) True for a real token; all are real when None.
    segment_ids: (G, S) for the scope "sequence".
    global_load: (E,) or None.

  Returns:
    The loss; 0.0 when there is no real token.
  """
  routing.check_option("kind", kind, ("switch", "gshard", "all_choices"))
  routing.check_option("padding", padding, ("exclude", "flaxformer"))
  num_experts = np.shape(scores)[2]
  losses = []
  for tokens in pools(np.shape(scores)[:2], scope, segment_ids):
    real = [at for at in tokens if token_mask is None or token_mask[at[0]][at[1]]]
    if padding == "exclude" and not real:
      continue
    divisor = len(real) if padding == "exclude" else len(tokens)
    wanted = [0.0] * num_experts
    importance = [0.0] * num_experts
    for group, token in real:
      for expert in counted_experts(scores[group][token], selected[group][token], kind):
        wanted[expert] += 1.0 / divisor
      for expert in range(num_experts):
        importance[expert] += float(scores[group][token][expert]) / divisor
    if scope == "global_batch" and global_load is not None:
      wanted = global_load
    losses.append(num_experts * sum(f * p for f, p in zip(wanted, importance, strict=True)))
  return sum(losses) / len(losses) if losses else 0.0


def device_balance_loss(scores, selected, *, num_devices, global_load=None, **pooling):
  """Return the device-level balance loss (arXiv 2405.04434 Eq. 26-28).

  A device is a run of experts; f'_d is the mean of E f_e over a device's experts (E f_e / K is
  the f of Eq. 24), P'_d the sum of P_e.

  Args:
    scores, selected: as in `load_balance_loss`, all of `selected` counted.
    num_devices: D'.
    global_load: (E,) in place of f, or None.
    **pooling: scope, padding, token_mask and segment_ids, as there.
  """
  num_experts = np.shape(scores)[2]
  size = num_experts // num_devices
  losses = []
  for real, divisor in counted_pools(np.shape(scores)[:2], **pooling):
    f = [0.0] * num_experts
    for group, token in real:
      for expert in selected[group][token]:
        f[expert] += 1.0 / divisor
    f = f if global_load is None else global_load
    P = mean_scores(scores, real, divisor)
    loss = 0.0
    for device in range(num_devices):
      own = range(device * size, (device + 1) * size)
      loss += sum(num_experts * f[e] for e in own) / size * sum(P[e] for e in own)
    losses.append(loss)
  return sum(losses) / len(losses) if losses else 0.0


def communication_loss(scores, selected, *, num_devices, max_devices, global_load=None, **pooling):
  """Return the communication balance loss (arXiv 2405.04434 Eq. 29-31).

  f''_d = D' / (M T) times the tokens of which any of `selected` is on device d.

  Args:
    scores, selected, num_devices, **pooling: as in `device_balance_loss`.
    max_devices: M.
    global_load: (D',), the shares of tokens sent to each device / M, or None.
  """
  size = np.shape(scores)[2] // num_devices
  losses = []
  for real, divisor in counted_pools(np.shape(scores)[:2], **pooling):
    sent = [0] * num_devices
    for group, token in real:
      for device in {expert // size for expert in selected[group][token]}:
        sent[device] += 1
    share = [count / (max_devices * divisor) for count in sent]
    share = share if global_load is None else global_load
    P = mean_scores(scores, real, divisor)
    own = [sum(P[device * size : (device + 1) * size]) for device in range(num_devices)]
    losses.append(num_devices * sum(f * p for f, p in zip(share, own, strict=True)))
  return sum(losses) / len(losses) if losses else 0.0


def counted_pools(shape, *, scope, padding, token_mask, segment_ids=None):
  """Yield the real tokens and the divisor of every pool that has a loss."""
  for tokens in pools(shape, scope, segment_ids):
    real = [at for at in tokens if token_mask[at[0]][at[1]]]
    if real or padding == "flaxformer":
      yield real, len(real) if padding == "exclude" else len(tokens)


def mean_scores(scores, real, divisor):
  """Return P_e, the sum of the scores of real tokens over the divisor."""
  num_experts = np.shape(scores)[2]
  return [sum(float(scores[g][t][e]) for g, t in real) / divisor for e in range(num_experts)]


def pools(shape, scope, segment_ids=None):
  """Return lists of (group, token) over which a loss is taken before the mean."""
  routing.check_option("scope", scope, ("group", "sequence", "batch", "global_batch"))
  num_groups, num_tokens = shape
  if scope == "sequence":
    return [
      [(group, token) for token in run]
      for group in range(num_groups)
      for run in runs(segment_ids[group])
    ]
  groups = [[(group, token) for token in range(num_tokens)] for group in range(num_groups)]
  return groups if scope == "group" else [sum(groups, [])]


def counted_experts(scores, selected, kind):
  """Return the experts that one token adds to the counts of `load_balance_loss`."""
  if kind == "switch":
    return routing.top_experts(scores, 1)
  if kind == "gshard":
    return list(selected[:1])
  return list(selected)


def router_z_loss(logits, *, padding="exclude", token_mask=None):
  """Return the mean over tokens of logsumexp(logits)^2 (ST-MoE arXiv 2202.08906 Eq. 5).

  Args:
    logits: (G, S, E) router logits.
    padding: "exclude" takes the mean over real tokens of the whole batch; "flaxformer" sets the
      logits of pads to zero and takes the mean over all tokens, so that every pad adds ln(E)^2 to
      the sum.
    token_mask: (G, S) True for a real token; all are real when None.

  Returns:
    The loss; 0.0 when there is no real token.
  """
  routing.check_option("padding", padding, ("exclude", "flaxformer"))
  logits = np.asarray(logits, np.float64)
  squares = []
  for group in range(logits.shape[0]):
    for token in range(logits.shape[1]):
      is_real = token_mask is None or bool(token_mask[group][token])
      if is_real:
        squares.append(log_sum_exp(logits[group, token]) ** 2)
      elif padding == "flaxformer":
        squares.append(math.log(logits.shape[2]) ** 2)
  return sum(squares) / len(squares) if squares else 0.0


def log_sum_exp(logits):
  """Return ln(sum(exp(logits))) of one vector, shifted by its maximum against overflow."""
  largest = max(logits)
  return largest + math.log(sum(math.exp(logit - largest) for logit in logits))


def importance_loss(values, *, per_group, padding="exclude", token_mask=None):
  """Return the squared coefficient of variation over experts of the sums over tokens.

  Args:
    values: (G, S, E) weights or scores, 0 for padding.
    per_group: take it in each group and average; otherwise of all tokens together.
    padding: "flaxformer" averages over groups of padding alone too.
    token_mask: (G, S) True for a real token, or None.
  """
  values = np.asarray(values, np.float64)
  sums = [sum(group) for group in values]
  if not per_group:
    return squared_variation(sum(sums))
  counted = len(sums)
  if padding != "flaxformer" and token_mask is not None:
    counted = sum(1 for group in token_mask if any(group))
  return sum(squared_variation(group) for group in sums) / max(counted, 1)


def squared_variation(values):
  """Return the population variance over the squared mean; 0.0 for zeros."""
  mean = sum(values) / len(values)
  variance = sum((value - mean) ** 2 for value in values) / len(values)
  return float(variance / mean**2) if mean > 0 else 0.0


def load_loss(
  logits, noise, std, *, top_k, exclude_self, per_group, padding="exclude", token_mask=None
):
  """Return the importance loss of the probabilities with which new noise selects each expert.

  P(x, e) = Phi((logit_e - threshold) / std_e): only e's own noise is drawn again. The threshold is
  the K-th largest noisy logit of the others (arXiv 1701.06538 Eq. 8-9), or of all experts.

  Args:
    logits: (G, S, E) without noise.
    noise: (G, S, E).
    std: (G, S, E) standard deviation of the noise.
    top_k: K.
    exclude_self: which threshold.
    per_group, padding: as in `importance_loss`.
    token_mask: (G, S) True for a real token, or None.
  """
  probabilities = np.zeros(np.shape(logits))
  for group, token in np.ndindex(*np.shape(logits)[:2]):
    if token_mask is not None and not token_mask[group][token]:
      continue
    noisy = [
      float(a) + float(b) for a, b in zip(logits[group][token], noise[group][token], strict=True)
    ]
    for expert in range(len(noisy)):
      threshold = kth_largest(noisy, top_k, expert if exclude_self else None)
      distance = float(logits[group][token][expert]) - threshold
      probabilities[group, token, expert] = normal_cdf(distance / float(std[group][token][expert]))
  return importance_loss(probabilities, per_group=per_group, padding=padding, token_mask=token_mask)


def kth_largest(values, top_k, without):
  """Return the K-th largest value, leaving one index out; -inf where there are fewer than K."""
  order = [index for index in decisions.best_first(values) if index != without]
  return values[order[top_k - 1]] if top_k <= len(order) else -math.inf


def normal_cdf(x):
  """Return Phi(x) of the standard normal distribution."""
  return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))
