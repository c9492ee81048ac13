"""Every preset with few experts, for tests that take all of them."""

from moe_jax.moe import RoutingConfig, preset


def small_preset(name: str, num_experts: int, **overrides) -> RoutingConfig:
  """Returns a preset with an even number of experts of which a token takes at most half."""
  own = preset(name)
  sizes = dict(num_experts=num_experts, top_k=min(own.top_k, num_experts // 2))
  if own.num_expert_groups > 1:
    sizes |= dict(num_expert_groups=2, top_expert_groups=1)
  return preset(name, **{**sizes, **overrides})
