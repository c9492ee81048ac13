"""The random numbers of one call of `route`, drawn by the key rule of its docstring."""

import dataclasses

import jax
import numpy as np

from moe_jax.moe import Noise, Priority, RoutingConfig

DRAWING = ("random_second", "sample", "random")


@dataclasses.dataclass(frozen=True)
class Draws:
  """Numbers for logits (G, S, E'); None for what is not drawn.

  Attributes:
    noise, std: (G, S, E') float64, what is added, and its standard deviation if it is normal.
    select: as in `oracles.selection.View`, with a leading axis G.
    place: (G, S).
  """

  noise: np.ndarray | None
  std: np.ndarray | None
  select: np.ndarray | None
  place: np.ndarray | None


def draws_of(config: RoutingConfig, key, shape, *, train: bool, noise_scale=None) -> Draws:
  """Draws for logits of a shape (G, S, E').

  A single stage that draws uses the key as it is; several split it in the order noise, selection,
  placement. Outside training only the selection `random` draws, alike for every group.
  """
  stages = {
    "noise": config.noise != Noise.NONE,
    "select": config.selection in DRAWING,
    "place": config.priority == Priority.RANDOM,
  }
  names = [name for name, draws in stages.items() if draws and train]
  own = [key] if len(names) == 1 else jax.random.split(key, len(names)) if names else []
  keys = dict(zip(names, own, strict=True))
  noise, std = _noise(config, keys.get("noise"), shape, noise_scale)
  place = np.array(jax.random.uniform(keys["place"], shape[:2])) if "place" in keys else None
  return Draws(noise, std, _select(config, keys.get("select"), shape), place)


def _noise(config, key, shape, noise_scale):
  if key is None:
    return None, None
  if config.noise == Noise.GUMBEL:
    return config.noise_std * np.float64(jax.random.gumbel(key, shape)), None
  fixed = config.noise == Noise.GAUSSIAN
  std = np.full(shape, config.noise_std) if fixed else np.float64(noise_scale)
  return std * np.float64(jax.random.normal(key, shape)), std


def _select(config, key, shape):
  if config.selection == "random" and key is None:
    own = jax.random.uniform(jax.random.key(config.hash_seed), (1, *shape[1:]))[0]
    return np.array([own] * shape[0])
  if key is None:
    return None
  if config.selection == "sample":
    return np.float64(jax.random.gumbel(key, shape))
  return np.array(jax.random.uniform(key, shape if config.selection == "random" else shape[:2]))
