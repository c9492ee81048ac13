"""Give slots to assignments in the order in which they are served.

Papers: GShard arXiv 2006.16668 (Algorithm 1), V-MoE arXiv 2106.05974 (batch prioritised routing).
"""

from oracles import decisions


def token_order(scores, chosen_scores, options, draws):
  """Return token ids in the order in which they are served.

  "position", "probability" and "weight" are left to right; "max_score": the token with the largest
  best score first; "sum_score": with the largest sum of its chosen scores; "random": by the draws,
  smallest first, or left to right without any. Equal tokens go left to right.
  """
  if options.priority == "max_score":
    return decisions.best_first([max(row) for row in scores])
  if options.priority == "sum_score":
    return decisions.best_first([sum(row) for row in chosen_scores])
  tokens = list(range(len(scores)))
  if options.priority == "random" and draws is not None:
    tokens.sort(key=lambda token: draws[token])
  return tokens


def serving_order(tokens, chosen_scores, options):
  """Return (token, choice) pairs in the order in which slots are given."""
  top_k = len(chosen_scores[0])
  if options.drop_order == "choice_major":
    pairs = [(token, choice) for choice in range(top_k) for token in tokens]
  else:
    pairs = [(token, choice) for token in tokens for choice in range(top_k)]
  if options.priority in ("probability", "weight"):
    values = [chosen_scores[token][choice] for token, choice in pairs]
    pairs = [pairs[index] for index in decisions.best_first(values)]
  return pairs


def place(experts, order, ranked, capacity, attempts):
  """Give slots, and let those that found none ask on.

  Args:
    experts: {(token, choice): expert} of the assignments that ask.
    order: (token, choice) pairs in serving order.
    ranked: for each token the experts that it has not chosen, next best first.
    capacity: C.
    attempts: rounds of asking again. In one round every refused choice of a token, in the order of
      choices, takes the next of `ranked`; then all of them are served in serving order.

  Returns:
    {(token, choice): (expert asked last, slot or -1)}.
  """
  asked, slots, used = dict(experts), {}, {}
  serve(order, asked, slots, used, capacity)
  left = [list(row) for row in ranked]
  for _ in range(attempts):
    again = {}
    for token, choice in sorted(asked):
      if (token, choice) not in slots and left[token]:
        again[token, choice] = left[token].pop(0)
    asked |= again
    serve(order, again, slots, used, capacity)
  return {pair: (expert, slots.get(pair, -1)) for pair, expert in asked.items()}


def serve(order, wishes, slots, used, capacity):
  """Enter into `slots` the wishes that find one, in the given order."""
  for pair in order:
    if pair in wishes and used.get(wishes[pair], 0) < capacity:
      slots[pair] = used.get(wishes[pair], 0)
      used[wishes[pair]] = slots[pair] + 1
