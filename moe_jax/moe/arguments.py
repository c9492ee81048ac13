"""What `route` refuses: misfitting shapes, what a call lacks, what no selection may return."""

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import BalanceScope, Granularity, Noise
from moe_jax.moe.registry import Chooser, ExpertChoice, SlotMixture, TokenChoice


def checked_mask(
  logits: jax.Array, config: RoutingConfig, token_mask: jax.Array | None
) -> jax.Array:
  """Returns the mask (G, S), all True if None was given; refuses shapes that do not fit."""
  if logits.ndim != 3 or logits.shape[-1] != config.num_logits:
    raise UserError(
      f"router logits have shape {logits.shape}; expected (groups, tokens,"
      f" {_logits_in_words(config)})"
    )
  shape = logits.shape[:2]
  if 0 in shape:
    raise UserError(
      f"router logits have shape {logits.shape}, without a token; expected (groups, tokens,"
      f" {_logits_in_words(config)}), groups and tokens at least 1"
    )
  if token_mask is None:
    return jnp.ones(shape, bool)
  if token_mask.shape != shape or token_mask.dtype != bool:
    raise UserError(
      f"token_mask has shape {token_mask.shape} and dtype {token_mask.dtype};"
      f" expected {shape} and bool, True = real token"
    )
  return token_mask


def _logits_in_words(config):
  if config.num_logits == config.num_experts:
    return f"num_experts = {config.num_experts}"
  return f"{config.num_logits} logits for num_experts = {config.num_experts}"


def check_ids(
  config: RoutingConfig, shape: tuple[int, int], ids: dict[str, jax.Array | None]
) -> None:
  """Refuses ids that are needed and missing, or that do not fit tokens of `shape` (G, S)."""
  selector, selection = config.selector, f"selection = {config.selection}"
  needed = {
    "token_ids": (selector.needs_token_ids, selection, shape),
    "segment_ids": (*_needs_segments(config), shape),
    "expert_ids": (selector.needs_expert_ids, selection, (*shape, config.top_k)),
  }
  for name, (needs, reader, expected) in needed.items():
    value = ids[name]
    if value is None:
      if needs:
        raise UserError(f"{reader} reads {name}: None was given, integers {expected} expected")
    elif value.shape != expected or not jnp.issubdtype(value.dtype, jnp.integer):
      raise UserError(
        f"{name} has shape {value.shape} and dtype {value.dtype}; expected {expected} and integers"
      )


def check_vectors(
  config: RoutingConfig, bias: jax.Array | None, global_load: jax.Array | None
) -> None:
  """Refuses a selection bias where nothing ranks by it, and vectors of another length."""
  if bias is not None and not config.selector.ranked:
    raise UserError(
      f"selection = {config.selection} does not rank experts: bias = None is expected, an array"
      f" of shape {bias.shape} was given"
    )
  fractions = config.num_load_fractions
  lengths = {"bias": (bias, config.num_logits), "global_load": (global_load, fractions)}
  for name, (vector, length) in lengths.items():
    if vector is not None and vector.shape != (length,):
      raise UserError(f"{name} has shape {vector.shape}; expected ({length},)")


def check_key(config: RoutingConfig, key: jax.Array | None) -> None:
  """Refuses training without a key that the config needs."""
  if key is None and config.needs_key:
    raise UserError(
      f"{_what_draws(config)} draws random numbers in training: key = None was given, a"
      " jax.random.key is needed"
    )


def check_choice(config: RoutingConfig, chosen: object) -> None:
  """Refuses what a selection of one's own may not return."""
  chooser = config.selector.chooser
  expected = _CHOICES[chooser]
  if not isinstance(chosen, expected):
    raise UserError(
      f"selection = {config.selection} returned a {type(chosen).__name__}; one with chooser ="
      f" {chooser} returns a moe_jax.moe.registry.{expected.__name__}"
    )


_CHOICES = {
  Chooser.TOKEN: TokenChoice,
  Chooser.EXPERT: ExpertChoice,
  Chooser.SLOT: SlotMixture,
}


def _needs_segments(config):
  if config.granularity == Granularity.SEGMENT:
    return True, "granularity = segment"
  return config.balance_scope == BalanceScope.SEQUENCE, "balance_scope = sequence"


def _what_draws(config):
  if config.selector.draws:
    return f"selection = {config.selection}"
  if config.noise != Noise.NONE:
    return f"noise = {config.noise}"
  return f"priority = {config.priority}"
