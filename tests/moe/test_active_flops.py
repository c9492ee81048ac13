"""No program of ragged dispatch computes every expert on every row, on any platform.

Read off the programs: XLA's own ragged product is a masked product over all experts, which no test
of numbers can see.
"""

import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from moe.ragged_oracle import RaggedDot

from moe_jax.moe import Dispatch, MoEConfig, MoELayer, RoutingConfig, grouped
from moe_jax.moe.grouped import GroupedKernel

T, D, E, K, F = 256, 64, 16, 2, 32
ROWS = T * K
# The smallest array that gives every row to every expert.
EVERY_ROW_AT_EVERY_EXPERT = E * ROWS * min(D, F)


def traced(kernel):
  """Returns the traced gradient of a gated layer, by its weights and its input."""
  routing = RoutingConfig(num_experts=E, top_k=K, overflow="dropless", weighting="softmax_selected")
  config = MoEConfig(
    routing, F, gated=True, activation="silu", dispatch=Dispatch.RAGGED, grouped_kernel=kernel
  )
  graph, state = nnx.split(MoELayer(D, config, key=jax.random.key(0)))

  def loss(state, x):
    y, _ = nnx.merge(graph, state)(x, train=True)
    return jnp.sum(jnp.square(y))

  x = jax.ShapeDtypeStruct((1, T, D), jnp.float32)
  return jax.jit(jax.grad(loss, argnums=(0, 1))).trace(state, x)


def largest_array(text):
  """Returns the most elements of any array named in a program, XLA's or StableHLO's."""
  shapes = re.findall(r"\b(?:pred|[fsu]\d+|bf16)\[([\d,]+)\]", text)
  shapes += re.findall(r"tensor<([\dx]+)x\w+>", text)
  return max(math.prod(map(int, re.split("[,x]", shape))) for shape in shapes)


def test_cpu_program_holds_nothing_of_experts_times_rows():
  text = traced(GroupedKernel.AUTO).lower().compile().as_text()
  assert largest_array(text) < EVERY_ROW_AT_EVERY_EXPERT


def test_the_reading_finds_the_masked_product(monkeypatch):
  monkeypatch.setitem(grouped._KERNELS, GroupedKernel.TRITON, RaggedDot())
  text = traced(GroupedKernel.TRITON).lower().compile().as_text()
  assert largest_array(text) >= EVERY_ROW_AT_EVERY_EXPERT


@pytest.mark.parametrize(
  ("kernel", "platform", "call", "count"),
  [
    # Three products forward, and each gives two backward.
    (GroupedKernel.TRITON, "cuda", r'name = "grouped_(?:multiply|outer)"', 9),
    # The two of gate and up share a function in each direction.
    (GroupedKernel.MEGABLOX, "tpu", "@tpu_custom_call", 6),
  ],
)
def test_accelerator_program_calls_our_kernels_alone(kernel, platform, call, count):
  text = traced(kernel).lower(lowering_platforms=(platform,)).as_text()
  assert len(re.findall(call, text)) == count
  assert "ragged_dot" not in text
  assert largest_array(text) < EVERY_ROW_AT_EVERY_EXPERT


@pytest.mark.slow
def test_tpu_compiles_to_the_active_flops(monkeypatch):
  pytest.importorskip("libtpu", reason="libtpu, which compiles for TPU anywhere, is not installed")
  from jax.experimental import topologies

  # Keeps the compiler from asking a metadata server, which exists on Google's machines alone.
  monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
  device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  rows, dim, hidden, experts = 4096, 1024, 512, 8

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  def gradients(rows, weights, sizes, cotangent):
    kernels = grouped._KERNELS[GroupedKernel.MEGABLOX]
    _, vjp = jax.vjp(lambda r, w: grouped.grouped_dot(kernels, r, w, sizes), rows, weights)
    return vjp(cotangent)

  program = jax.jit(gradients).lower(
    shape(rows, dim),
    shape(experts, dim, hidden),
    shape(experts, dtype=jnp.int32),
    shape(rows, hidden),
  )
  flops = program.compile().cost_analysis()["flops"]
  active = 2 * 2 * rows * dim * hidden
  # The index arithmetic of tiles is the rest.
  assert active <= flops <= 1.05 * active
