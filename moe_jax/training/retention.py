"""Which saved steps stay."""

from collections.abc import Mapping

from moe_jax.training.config import CheckpointConfig


def steps_to_keep(saved: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
  """Returns the newest `keep` steps, the multiples of `keep_every`, those of `at`, the best.

  Args:
    saved: for each step its held-out loss, None if it was not evaluated.
    config: the policy.
  """
  newest = sorted(saved)[-config.keep :]
  periodic = [step for step in saved if config.keep_every and step % config.keep_every == 0]
  # Of equal losses the earlier step stays, as it would if the later one had never been saved.
  ranked = sorted((loss, step) for step, loss in saved.items() if loss is not None)
  best = [step for _, step in ranked[: config.keep_best]]
  return {*newest, *periodic, *best, *saved.keys() & set(config.at)}
