"""Does a model's output depend on later tokens? Logits and routing before and after a change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.causality import batch_causes, differs, future_causes
from moe_jax.analysis.routed_sample import by_row, decisions
from moe_jax.models import Decoder, ModelConfig

# A logit may move by this many rounding steps of the activations' dtype without a leak: other rows
# in an expert's buffer change the order of sums.
_ROUNDING_STEPS = 64


@dataclasses.dataclass(frozen=True)
class LayerLeak:
  """Shares of tokens whose routing changed in one MoE layer, see `causality.Leak`."""

  layer: int
  future: float
  batch: float


@dataclasses.dataclass(frozen=True)
class ModelLeak:
  """What changing the later tokens of the first row did to a model.

  Attributes:
    future: largest change of a logit of the first row before the cut.
    batch: largest change of a logit of any other row.
    tolerance: changes up to this are rounding.
    layers: one entry a MoE layer. Routing of deeper layers changes where the layers below leak.
    future_causes, batch_causes: see `causality.Leak`.
  """

  future: float
  batch: float
  tolerance: float
  layers: tuple[LayerLeak, ...]
  future_causes: tuple[str, ...]
  batch_causes: tuple[str, ...]


def audit_model(
  config: ModelConfig, *, train: bool, shape: tuple[int, int], seed: int = 0
) -> ModelLeak:
  """Compares a model at random parameters before and after changing tokens.

  Tokens from position L / 2 of the first row on are replaced by other random tokens.

  Args:
    config: the model.
    train: training capacity, dropout and selection, with one fixed key.
    shape: (B, L) of the tokens.
    seed: of parameters and tokens.
  """
  graph, params = jax.jit(lambda: nnx.split(Decoder(config, key=jax.random.key(seed))))()
  rng = np.random.default_rng(seed)
  cut = shape[1] // 2
  tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
  changed = tokens.copy()
  # Never the same id again.
  shift = rng.integers(1, config.vocab_size, shape[1] - cut)
  changed[0, cut:] = (tokens[0, cut:] + shift) % config.vocab_size
  before, after = (_run(graph, params, jnp.asarray(t), train=train) for t in (tokens, changed))
  moved = np.abs(before[0] - after[0])
  routed = [differs(*pair) for pair in zip(before[1], after[1], strict=True)]
  routing = () if config.moe is None else (config.moe.routing, shape)
  return ModelLeak(
    future=float(np.max(moved[0, :cut])),
    batch=float(np.max(moved[1:])),
    tolerance=_tolerance(before[0], config),
    layers=tuple(
      LayerLeak(layer, float(np.mean(r[0, :cut])), float(np.mean(r[1:])))
      for layer, r in zip(config.moe_layers(), routed, strict=True)
    ),
    future_causes=future_causes(*routing, train=train) if routing else (),
    batch_causes=batch_causes(*routing, train=train) if routing else (),
  )


def _tolerance(logits, config):
  epsilon = float(jnp.finfo(config.dtype).eps)
  return _ROUNDING_STEPS * epsilon * float(np.max(np.abs(logits)))


def _run(graph, params, tokens, *, train):
  """Returns the logits (B, L, V) and each MoE layer's decisions (B, L, X) as NumPy arrays."""
  return jax.device_get(_forward(graph, params, tokens, train=train))


@functools.partial(jax.jit, static_argnames=("graph", "train"))
def _forward(graph, params, tokens, *, train):
  key = jax.random.key(0) if train else None
  logits, aux = nnx.merge(graph, params)(tokens, return_aux=True, train=train, key=key)
  return logits, [by_row(decisions(plan), tokens.shape) for plan in aux.plans]
