"""Hugging Face's Mixtral block with its `grouped_mm` experts, timed beside ours where it is there.

Neither torch nor transformers is a dependency: without them, or with versions that lack the grouped
product, `why_not` says why there is no row. The block has no balance loss and no metrics.
"""

import importlib.util
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks.cases import Shape
from experiments.benchmarks.timing import Program
from moe_jax.layers.mlp import Activation

LABEL = "hugging face grouped_mm"


def why_not(shape: Shape) -> str | None:
  """Returns why this shape cannot be timed here, or None if it can."""
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      return f"{package} is not installed"
  if not (shape.network.gated and shape.network.activation == Activation.SILU):
    return "the Mixtral block is a gated SiLU network"
  if importlib.util.find_spec("transformers.integrations.moe") is None:
    return "this version of transformers has no grouped experts"
  import torch

  if not hasattr(torch.nn.functional, "grouped_mm"):
    return "this version of torch has no grouped product"
  return None


def versions() -> str:
  """Returns what the row was measured with; `why_not` must be None."""
  import torch
  import transformers

  threads = torch.get_num_threads()
  return f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads"


def make_programs(shape: Shape, dtype: jnp.dtype) -> tuple[Program, Program]:
  """Returns forward, and forward with backward, ready to be timed; `why_not` must be None.

  Weights are normal with the variance 1 / D and tokens are normal, so that the load is close to
  even, as in our own cases. Gradients are those of every weight and of the input.
  """
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  block = _block(shape).to(device, _torch_dtype(torch, dtype))
  generator = torch.Generator().manual_seed(0)
  x = torch.randn(1, shape.tokens, shape.model_dim, generator=generator)
  x = x.to(device, _torch_dtype(torch, dtype))

  def forward(x):
    with torch.no_grad():
      return _synchronised(torch, _output(block, x))

  def backward(x):
    block.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_(True)
    _output(block, leaf).float().square().mean().backward()
    return _synchronised(torch, leaf.grad)

  programs = tuple(Program(fn, (x,), temp_bytes=None) for fn in (forward, backward))
  for program in programs:
    program.run(x)
  return programs


def _block(shape: Shape):
  import torch
  from transformers import MixtralConfig
  from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

  config = MixtralConfig(
    hidden_size=shape.model_dim,
    intermediate_size=shape.network.hidden_dim,
    num_local_experts=shape.num_experts,
    num_experts_per_tok=shape.top_k,
    hidden_act="silu",
    experts_implementation="grouped_mm",
  )
  block = MixtralSparseMoeBlock(config)
  with torch.no_grad():
    # Its weights are uninitialised memory until a model fills them.
    for parameter in block.parameters():
      parameter.normal_(std=shape.model_dim**-0.5)
  return block


def _output(block: Any, x: Any) -> Any:
  """Returns y; before version 5 the block returned its router logits beside it."""
  out = block(x)
  return out[0] if isinstance(out, tuple) else out


def _synchronised(torch: Any, value: Any) -> Any:
  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return value


def _torch_dtype(torch: Any, dtype: jnp.dtype) -> Any:
  return getattr(torch, jnp.dtype(dtype).name)
