"""Compute slots per expert with exact fractions: the judge of every capacity formula.

The literature has two conventions that differ by a factor of K: slots per token (Switch arXiv
2101.03961 Eq. 3, flaxformer) and slots per assignment (GShard arXiv 2006.16668, V-MoE arXiv
2106.05974).
"""

import fractions
import math

from oracles import routing


def capacity(
  *,
  tokens_per_group,
  num_experts,
  top_k,
  capacity_factor,
  convention,
  rounding="ceil",
  min_capacity=1,
  multiple_of=1,
):
  """Return C, the slots of one expert in one group.

  The steps in order: round, raise to `min_capacity`, round up to `multiple_of`, cap at S (more than
  S slots can never be used, because a token chooses an expert at most once).

  Args:
    tokens_per_group: S.
    num_experts: E.
    top_k: K; matters to "per_assignment" only.
    capacity_factor: CF, read as the decimal it is written as: 1.1 * 100 / 10 is 11, not the
      11.000000000000002 of binary floats, whose ceiling would be 12.
    convention: "per_token" (CF * S / E) or "per_assignment" (CF * K * S / E).
    rounding: "ceil", "floor" or "round_half_even".
    min_capacity: least number of slots.
    multiple_of: C is raised to a multiple of this, unless S is smaller.
  """
  routing.check_option("convention", convention, ("per_token", "per_assignment"))
  routing.check_option("rounding", rounding, ("ceil", "floor", "round_half_even"))
  wishes = tokens_per_group * (top_k if convention == "per_assignment" else 1)
  exact = fractions.Fraction(str(capacity_factor)) * wishes / num_experts
  slots = {"ceil": math.ceil, "floor": math.floor, "round_half_even": round}[rounding](exact)
  slots = max(slots, min_capacity)
  while slots % multiple_of:
    slots += 1
  return min(slots, tokens_per_group)
