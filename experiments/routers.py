"""The routers of recipes' arms at the scale of `experiments.models`, each as its paper has it."""

from moe_jax.moe import RoutingConfig, preset

NUM_EXPERTS = 8


def switch(capacity_factor: float = 1.25, top_k: int = 1, **fields) -> RoutingConfig:
  """Returns Switch's router, or GShard's top-2 in its place as Table 1 of the paper compares them.

  Slots are counted per token, as there; two weights sum to 1. Held-out text is routed without
  drops; what drops cost is evaluated beside it.
  """
  if top_k > 1:
    fields = {"weighting": "renormalized", **fields}
  fields = {"num_experts": NUM_EXPERTS, **fields}
  return preset("switch", top_k=top_k, capacity_factor=capacity_factor, **fields)


def fine_grained(times: int, **fields) -> RoutingConfig:
  """Returns a router over experts that are so many times smaller, and as many times more."""
  return switch(
    top_k=times,
    num_experts=NUM_EXPERTS * times,
    capacity_convention="per_assignment",
    balance_fraction="all_choices_mean",
    **fields,
  )
