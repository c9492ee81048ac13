"""Named tables: which mesh axes each logical axis of parameters and activations is split over."""

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError

Rules = dict[str, tuple[str, ...]]

# Logical axes of activations, beside those of parameters (`moe_jax.layers.parameters`).
ACTIVATION_AXES = {
  "batch": "B",
  "length": "L",
  "group": "G, whole routing groups",
  "slots": "G*C, slots of an expert once they have reached it",
  "channels": "I, channels of a scan along whole sequences",
}

# Every device gets other tokens, whatever it holds of the parameters.
_ACTIVATIONS: Rules = {
  "batch": ("data", "fsdp", "expert"),
  "length": ("sequence",),
  "group": ("data", "fsdp", "expert", "sequence"),
  "layers": ("stage",),
  # A scan has no parallel length, so those who share a sequence share its channels instead.
  "channels": ("tensor", "sequence"),
}
_FSDP: Rules = {"embed": ("fsdp",), "expert_embed": ("fsdp",), "latent_in": ("fsdp",)}
_TENSOR: Rules = {
  name: ("tensor",) for name in ("vocab", "heads", "kv_heads", "mlp", "expert_mlp", "inner")
}
_EXPERT: Rules = {"expert": ("expert",)}

_WIDE: Rules = _FSDP | {"expert": ("data", "expert")}

RULES: dict[str, Rules] = {
  # Data parallelism: parameters are copied.
  "dp": {},
  # ZeRO-3 (arXiv 1910.02054). Over all dimensions of a TPU torus, XLA turns reduce-scatters of some
  # or all gradients into all-reduces of twice the bytes: leave a dimension to another axis.
  "fsdp": _FSDP,
  # Tensor parallelism of Megatron-LM (arXiv 1909.08053).
  "tp": _TENSOR,
  "fsdp_tp": _FSDP | _TENSOR,
  # Expert parallelism (GShard, arXiv 2006.16668): experts split, the rest copied.
  "ep": _EXPERT,
  "ep_tp": _EXPERT | _TENSOR,
  "ep_fsdp": _EXPERT | _FSDP,
  "ep_fsdp_tp": _EXPERT | _FSDP | _TENSOR,
  # Experts over data x expert, so that no two devices hold the same one (DeepSeek-V3, arXiv
  # 2412.19437 section 3.2): another mesh than attention's, of the same devices.
  "ep_wide": _WIDE,
  "ep_wide_tp": _WIDE | _TENSOR,
}


def rules_of(layout: str) -> Rules:
  """Returns the table of that name, with the axes of activations.

  Raises:
    UserError: there is no such table; names them all.
  """
  if layout not in RULES:
    hint = did_you_mean(layout, RULES)
    raise UserError(f"layout = {layout!r} is not one of {', '.join(RULES)}; {hint}")
  rules = _ACTIVATIONS | RULES[layout]
  experts = rules.get("expert", ())
  return rules | {"slots": tuple(axis for axis in rules["group"] if axis not in experts)}


def used_axes(layout: str) -> set[str]:
  """Returns the mesh axes that mean something to a layout: any can split batches and depth."""
  return {"data", "sequence", "stage"}.union(*RULES[layout].values())
