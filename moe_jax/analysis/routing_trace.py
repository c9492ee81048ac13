"""The record of one routing: which experts took which tokens, layer by layer, in one .npz file.

What analyses over checkpoints and counterfactual routings start from. Token-choice routers only:
every token has K ranked experts.
"""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.moe.plan import RoutingPlan

_FORMAT = "moe_jax routing trace"
_VERSION = 1
_HEADER = "header"
_TOKEN_ARRAYS = ("tokens", "token_mask", "segment_ids")
_LAYER_ARRAYS = ("expert", "weight", "kept")


@dataclasses.dataclass(frozen=True)
class LayerTrace:
  """What one MoE layer decided.

  Attributes:
    expert: (B, L, K) int16, or int32 above 32,767 experts: the experts asked for, best first; from
      E on it is a null expert, and not kept. Meaningless where the token is padding.
    weight: (B, L, K) float32 combine weights, 0 where not kept.
    kept: (B, L, K) bool, False where dropped, not selected, or padding.
    num_experts: E.
  """

  expert: np.ndarray
  weight: np.ndarray
  kept: np.ndarray
  num_experts: int


@dataclasses.dataclass(frozen=True)
class RoutingTrace:
  """The routing of some tokens by one checkpoint of a run.

  Attributes:
    run: the run's name.
    step: of the checkpoint.
    tokens: (B, L) int32 token ids.
    token_mask: (B, L) bool, True = real token.
    segment_ids: (B, L) int32 packed documents; zeros where each row is one document.
    layers: one `LayerTrace` a MoE layer, in order.
  """

  run: str
  step: int
  tokens: np.ndarray
  token_mask: np.ndarray
  segment_ids: np.ndarray
  layers: tuple[LayerTrace, ...]

  def save(self, path: Path) -> None:
    """Writes the trace to `path`, which must end in .npz: whole or not at all.

    Raises:
      UserError: another ending, or a folder that cannot be written to.
    """
    path = Path(path)
    check_place(path)
    arrays = {name: getattr(self, name) for name in _TOKEN_ARRAYS}
    for index, layer in enumerate(self.layers):
      arrays.update({_key(index, name): getattr(layer, name) for name in _LAYER_ARRAYS})
    try:
      _write_whole(path, {_HEADER: np.array(self._header()), **arrays})
    except OSError as error:
      raise UserError(
        f"{path} cannot be written ({error.strerror}); give a path in a folder you may write to"
      ) from error

  def _header(self) -> str:
    experts = [layer.num_experts for layer in self.layers]
    return json.dumps(
      dict(format=_FORMAT, version=_VERSION, run=self.run, step=self.step, num_experts=experts)
    )

  @classmethod
  def load(cls, path: Path) -> "RoutingTrace":
    """Reads a trace that `save` wrote.

    Raises:
      UserError: no such file, a damaged one, one of another kind or version, or arrays that
        contradict each other.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    header = _parse_header(path, arrays)
    try:
      layers = tuple(
        LayerTrace(*(arrays[_key(index, name)] for name in _LAYER_ARRAYS), experts)
        for index, experts in enumerate(header["num_experts"])
      )
      tokens = [arrays[name] for name in _TOKEN_ARRAYS]
      trace = cls(header["run"], header["step"], *tokens, layers)
    except (KeyError, TypeError) as error:
      raise UserError(f"{path} is damaged: {error} is missing; record the trace anew") from None
    if fault := _first_fault(trace):
      raise UserError(f"{path} is damaged: {fault}; record the trace anew")
    return trace


def check_place(path: Path) -> None:
  """Refuses a path that no trace can be written to, before one is recorded.

  Raises:
    UserError: another ending than .npz, a folder, or no folder to write in.
  """
  if path.suffix != ".npz":
    raise UserError(f"{path} is no place for a trace: expected {path.with_suffix('.npz').name}")
  if path.is_dir():
    raise UserError(f"{path} is no place for a trace: it is a folder, expected a file")
  if not os.access(path.parent, os.W_OK | os.X_OK):
    raise UserError(
      f"{path} cannot be written: its folder is missing or may not be written to; give a path in"
      " another one"
    )


def record_routing(
  plans: Sequence[RoutingPlan],
  tokens: jax.Array,
  *,
  run: str,
  step: int,
  token_mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> RoutingTrace:
  """Makes the trace of one call of a model from `aux.plans`.

  Args:
    plans: one a MoE layer; groups in any of the layouts of `moe_jax.moe.groups`.
    tokens: (B, L) token ids of that call.
    run: the run's name.
    step: of the checkpoint.
    token_mask: (B, L) bool, True = real token; None = all real.
    segment_ids: (B, L) packed documents; None = each row is one.

  Raises:
    UserError: a plan that is not token choice, or shapes that do not fit.
  """
  tokens = np.asarray(jax.device_get(tokens), np.int32)
  mask = np.ones(tokens.shape, bool) if token_mask is None else np.asarray(token_mask)
  segments = np.zeros(tokens.shape) if segment_ids is None else np.asarray(segment_ids)
  layers = tuple(_layer_trace(index, plan, tokens.shape) for index, plan in enumerate(plans))
  trace = RoutingTrace(run, int(step), tokens, mask, segments.astype(np.int32), layers)
  if fault := _first_fault(trace):
    raise UserError(f"the trace cannot be recorded: {fault}")
  return trace


def _layer_trace(index: int, plan: RoutingPlan, shape: tuple[int, int]) -> LayerTrace:
  if plan.top_k is None:
    raise UserError(
      f"plan {index} has top_k = None: a trace needs K ranked experts for every token; expected a"
      " router that selects by token, such as selection = top_k"
    )
  B, L = shape
  size = plan.token.shape[0] * plan.num_tokens
  if size < B * L:
    raise UserError(f"plan {index} routes {size} tokens; expected {B * L}, those of {shape} tokens")
  expert, weight, kept = (
    # Groups are the flattened batch in order, its last one filled up.
    np.asarray(a).reshape(-1, plan.top_k)[: B * L].reshape(B, L, plan.top_k)
    for a in jax.device_get((plan.expert, plan.weight, plan.valid))
  )
  small = plan.num_experts <= np.iinfo(np.int16).max
  expert = expert.astype(np.int16 if small else np.int32)
  return LayerTrace(expert, weight.astype(np.float32), kept, plan.num_experts)


def _key(layer: int, name: str) -> str:
  return f"layer_{layer}_{name}"


def _write_whole(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes through a temporary file and a rename, so that no reader sees half of it."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with open(temporary, "wb") as file:
      np.savez_compressed(file, **arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    raise UserError(f"{path} does not exist; expected a routing trace (.npz)")
  if not zipfile.is_zipfile(path):
    raise UserError(f"{path} is damaged or no .npz file; expected a routing trace")
  try:
    # Reading checks the sums of the whole archive; pickled objects are never loaded.
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f"{path} is damaged ({error}); record the trace anew") from None


def _parse_header(path: Path, arrays: dict[str, np.ndarray]) -> dict:
  try:
    header = json.loads(str(arrays[_HEADER]))
    kind, version = header["format"], header["version"]
  except (KeyError, TypeError, ValueError):
    kind, version = None, None
  if kind != _FORMAT:
    raise UserError(f"{path} is an .npz file of another kind; expected a routing trace")
  if version != _VERSION:
    raise UserError(f"{path} has version {version} of the format; expected {_VERSION}")
  return header


def _first_fault(trace: RoutingTrace) -> str | None:
  """Names what contradicts the documented shapes, dtypes and ranges, if anything does."""
  shape = trace.tokens.shape
  if len(shape) != 2:
    return f"tokens have shape {shape}, expected (batch, length)"
  for name, kind in zip(_TOKEN_ARRAYS, (np.int32, bool, np.int32), strict=True):
    array = getattr(trace, name)
    if array.shape != shape or array.dtype != kind:
      return f"{name} has shape {array.shape} and dtype {array.dtype}, expected {shape} {kind}"
  faults = (_layer_fault(i, layer, trace.token_mask) for i, layer in enumerate(trace.layers))
  return next(filter(None, faults), None)


def _layer_fault(index: int, layer: LayerTrace, token_mask: np.ndarray) -> str | None:
  shapes = {getattr(layer, name).shape for name in _LAYER_ARRAYS}
  if len(shapes) != 1 or layer.expert.ndim != 3 or layer.expert.shape[:2] != token_mask.shape:
    return f"layer {index} has arrays of shapes {sorted(shapes)}, expected {token_mask.shape} and K"
  kinds = (layer.expert.dtype.kind, layer.weight.dtype, layer.kept.dtype)
  if kinds != ("i", np.float32, bool):
    return f"layer {index} has dtypes {kinds}, expected integers, float32 and bool"
  ids, kept = layer.expert[token_mask], layer.kept[token_mask]
  wrong = ids[(ids < 0) | (kept & (ids >= layer.num_experts))]
  if wrong.size:
    return f"layer {index} names expert {wrong[0]}, expected 0 to {layer.num_experts - 1}"
  return None
