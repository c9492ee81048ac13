"""Surgery on experts: dense models become sparse, and experts are removed, merged and added."""

from moe_jax.convert.surgery.choosing import (
  Alignment,
  Similarity,
  grown,
  kept,
  merged,
  moe_layers,
  weight_norms,
  without,
)
from moe_jax.convert.surgery.expert_mixtures import (
  ExpertMixtures,
  Member,
  NewExpert,
  expert_operation,
  resized_config,
)
from moe_jax.convert.surgery.operation import Operation, Role, layers_of
from moe_jax.convert.surgery.upcycling import (
  RouterStart,
  Scaling,
  UpcycleOptions,
  approximations,
  choose_layers,
  upcycled_config,
  upcycling,
  with_output_scale,
)

__all__ = [
  "Alignment",
  "ExpertMixtures",
  "Member",
  "NewExpert",
  "Operation",
  "RouterStart",
  "Role",
  "Scaling",
  "Similarity",
  "UpcycleOptions",
  "approximations",
  "choose_layers",
  "expert_operation",
  "grown",
  "kept",
  "layers_of",
  "merged",
  "moe_layers",
  "resized_config",
  "upcycled_config",
  "upcycling",
  "weight_norms",
  "with_output_scale",
  "without",
]
