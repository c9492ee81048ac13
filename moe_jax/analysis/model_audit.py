"""Does a model's output depend on later tokens? Logits and routing before and after a change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.causality import batch_causes, differs, future_causes, verdict
from moe_jax.analysis.routed_sample import by_row, decisions
from moe_jax.models import ModelConfig, make_model

# Rounding steps of the activations' dtype, relative to the largest value, by which a logit or a
# weight may move without a leak: other rows in an expert's buffer change the order of sums.
_ROUNDING_STEPS = 16


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

  @property
  def verdict(self) -> str:
    """Says what was found, see `causality.verdict`."""
    future = self.future > self.tolerance or any(layer.future for layer in self.layers)
    batch = self.batch > self.tolerance or any(layer.batch for layer in self.layers)
    return verdict(future, batch, self.future_causes, self.batch_causes)


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
  graph, params = _initial(config, seed)
  rng = np.random.default_rng(seed)
  cut = shape[1] // 2
  tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
  changed = tokens.copy()
  # Never the same id again.
  shift = rng.integers(1, config.vocab_size, shape[1] - cut)
  changed[0, cut:] = (tokens[0, cut:] + shift) % config.vocab_size
  before, after = (_run(graph, params, jnp.asarray(t), train=train) for t in (tokens, changed))
  moved = np.abs(before[0] - after[0])
  rounding = _ROUNDING_STEPS * float(jnp.finfo(config.dtype).eps)
  routed = [differs(*pair, rounding) for pair in zip(before[1], after[1], strict=True)]
  routing = () if config.moe is None else (config.moe.routing, shape)
  return ModelLeak(
    future=float(np.max(moved[0, :cut])),
    batch=float(np.max(moved[1:])),
    tolerance=rounding * float(np.max(np.abs(before[0]))),
    layers=tuple(
      LayerLeak(layer, float(np.mean(r[0, :cut])), float(np.mean(r[1:])))
      # In training those of multi-token prediction follow, which are told tokens ahead.
      for layer, r in zip(config.moe_layers(), routed, strict=False)
    ),
    future_causes=future_causes(*routing, train=train) if routing else (),
    batch_causes=batch_causes(*routing, train=train) if routing else (),
  )


@functools.lru_cache(maxsize=1)
def _initial(config, seed):
  """Returns the model's graph and random parameters."""

  def model():
    return make_model(config, key=jax.random.key(seed))

  graph = nnx.split(nnx.eval_shape(model))[0]
  return graph, jax.jit(lambda: nnx.split(model())[1], compiler_options=_compiler_options())()


def _run(graph, params, tokens, *, train):
  """Returns the logits (B, L, V) and each MoE layer's decisions (B, L, X) as NumPy arrays."""
  return jax.device_get(_compiled(graph, train)(params, tokens))


@functools.cache
def _compiled(graph, train):
  def forward(params, tokens):
    key = jax.random.key(0) if train else None
    logits, aux = nnx.merge(graph, params)(tokens, return_aux=True, train=train, key=key)
    return logits, [by_row(decisions(plan), tokens.shape) for plan in aux.plans]

  return jax.jit(forward, compiler_options=_compiler_options())


def _compiler_options() -> dict[str, str] | None:
  """A program that runs twice is not worth optimising on CPU."""
  return {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
