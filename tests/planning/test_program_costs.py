"""FLOPs and traffic of compiled programs: by hand, by formulas, and against XLA where it counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_models import DENSE, MOE, tiny_config

from moe_jax.planning.flops import dispatch_cost, forward_flops, mean_visible
from moe_jax.planning.hlo import parse_program
from moe_jax.planning.program_costs import program_costs
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state
from moe_jax.training.step import make_train_step

B, L, LAYERS = 4, 32, 3


def costs_of(text):
  return program_costs(parse_program(text))


def compiled_step(model):
  config = ExperimentConfig(model=model, batch_size=B)
  optimizer = make_optimizer(config.optimizer, config.steps)
  fields = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
  batch = {name: jax.ShapeDtypeStruct((B, L), jnp.int32) for name in fields}
  lowered = make_train_step(config, optimizer).lower(abstract_state(model, optimizer), batch)
  # Optimising changes no product, and takes ten times as long.
  return lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})


def expected_flops(model):
  """The formulas' FLOPs of a step; attention multiplies masked places too."""
  flops = forward_flops(model, L)
  head = flops.pop("head")
  flops["attention_scores"] *= L / mean_visible(L)
  if model.moe:
    flops["empty"] = LAYERS * dispatch_cost(model.moe, model.model_dim, B, L).empty_slot_flops
  again = 0.0
  if model.remat == "full":
    # All of the forward pass but the last product of a block, whose result nothing needs.
    again = sum(flops.values()) - LAYERS * 2.0 * model.model_dim * model.mlp.hidden_dim
  return B * L * (3 * (head + sum(flops.values())) + again)


@pytest.mark.parametrize(
  ("segments", "remat"), [(DENSE, "none"), (DENSE, "full"), (DENSE, "dots"), (MOE, "none")]
)
def test_a_scanned_step_has_the_formulas_flops(segments, remat):
  model = dataclasses.replace(tiny_config(segments=((segments[0][0], LAYERS),)), remat=remat)
  program = costs_of(compiled_step(model).as_text())
  assert program.flops == pytest.approx(expected_flops(model), rel=1e-9)


def test_an_unrolled_step_has_as_many_and_xla_agrees():
  model = tiny_config(segments=(("attention:dense", LAYERS),))
  unrolled = compiled_step(dataclasses.replace(model, scan_unroll=LAYERS))
  flops = costs_of(unrolled.as_text()).flops
  assert flops == pytest.approx(expected_flops(model), rel=1e-9)
  # XLA counts element-wise work too, a quarter of all in a model as narrow as this.
  assert flops < unrolled.cost_analysis()["flops"] < 1.3 * flops


def test_products_alone_agree_with_xla_exactly():
  def step(x, w):
    return jnp.einsum("bij,bjk->bik", jnp.einsum("bij,jk->bik", x, w), jnp.ones((3, 7, 5)))

  lowered = jax.jit(step).lower(jnp.zeros((3, 4, 6)), jnp.zeros((6, 7)))
  compiled = lowered.compile()
  by_hand = 2 * 3 * 4 * 6 * 7 + 2 * 3 * 4 * 7 * 5
  assert costs_of(compiled.as_text()).flops == by_hand == compiled.cost_analysis()["flops"]


def entry(*lines, before=""):
  return f"{before}\nENTRY %main (p: f32[]) -> f32[] {{\n" + "\n".join(lines) + "\n}\n"


@pytest.mark.parametrize(
  ("convolution", "flops"),
  [
    # A product of (64, 32) and (32, 16).
    ("f32[64,16] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 64 * 32 * 16),
    # The same, 8 times as a batch: a kernel over a dilated batch meets one element each.
    (
      "f32[8,64,16] convolution(%c, %d), window={size=8 stride=7 lhs_dilate=8},"
      " dim_labels=0bf_0io->0bf",
      8 * 2 * 64 * 32 * 16,
    ),
    # Heads as a window that slides over one place from padding to padding.
    (
      "f32[64,4,16] convolution(%g, %h), window={size=4 pad=3_3 rhs_reversal=1},"
      " dim_labels=bf0_i0o->b0f",
      2 * 64 * 4 * 16 * 32,
    ),
    # Four heads contracted as a window: all places are inside.
    ("f32[64,16] convolution(%e, %f), window={size=4}, dim_labels=b0f_0io->bf0", None),
  ],
)
def test_convolutions_count_products_with_data_alone(convolution, flops):
  lines = [
    "  %a = f32[64,32] parameter(0)",
    "  %b = f32[32,16] parameter(1)",
    "  %c = f32[8,64,32] parameter(2)",
    "  %d = f32[8,32,16] parameter(3)",
    "  %e = f32[64,4,8] parameter(4)",
    "  %f = f32[4,8,16] parameter(5)",
    "  %g = f32[64,32,1] parameter(6)",
    "  %h = f32[32,4,16] parameter(7)",
  ]
  if flops is None:
    convolution, flops = convolution.replace("f32[64,16]", "f32[64,16,1]"), 2 * 64 * 4 * 8 * 16
  assert costs_of(entry(*lines, f"  ROOT %y = {convolution}")).flops == flops


def test_a_kernel_counts_what_its_author_says():
  call = (
    '  ROOT %k = f32[8] custom-call(), custom_call_target="tpu_custom_call", backend_config='
    '{"custom_call_config":{"cost_estimate":{"flops":"4096","bytes_accessed":"1"}}}'
  )
  assert costs_of(entry(call)).flops == 4096


FUSED = """
%fused (s: f32[24,64], t: f32[64], u: f32[64]) -> f32[24,64] {
  %s = f32[24,64] parameter(0)
  %t = f32[64] parameter(1)
  %u = f32[64] parameter(2)
  %row = f32[1,64] dynamic-slice(%s, %t), dynamic_slice_sizes={1,64}
  %flat = f32[64] bitcast(%row)
  %sum = f32[64] add(%flat, %u)
  %new = f32[1,64] bitcast(%sum)
  ROOT %out = f32[24,64] dynamic-update-slice(%s, %new, %t)
}
"""


def test_a_fusion_moves_its_slices_and_not_what_it_slices():
  lines = [
    "  %stack = f32[24,64] parameter(0)",
    "  %on_chip = f32[64]{0:T(128)S(1)} parameter(1)",
    "  %row = f32[64] parameter(2)",
    "  ROOT %f = f32[24,64] fusion(%stack, %on_chip, %row), kind=kLoop, calls=%fused",
  ]
  # Reads one row of the stack and the other row, writes one; what lies on the chip is free.
  assert costs_of(entry(*lines, before=FUSED)).hbm_bytes == 3 * 64 * 4


def test_plain_instructions_move_operands_and_result():
  lines = [
    "  %x = bf16[64] parameter(0)",
    "  %y = bf16[64] copy(%x)",
    "  %start = (bf16[64]{0:S(1)}, bf16[64], u32[]) copy-start(%y)",
    "  %done = bf16[64]{0:S(1)} copy-done(%start)",
    "  ROOT %z = f32[64] add(%done, %y)",
  ]
  # copy: in and out; the prefetch reads; add reads one operand from memory and writes floats.
  assert costs_of(entry(*lines)).hbm_bytes == 2 * 128 + 128 + 128 + 256


def test_what_is_passed_on_is_read_and_written_once():
  lines = [
    "  %x = bf16[64] parameter(0)",
    "  %start = (bf16[64], bf16[64], u32[]{:S(2)}) collective-permute-start(%x),"
    " source_target_pairs={{0,1},{1,0}}",
    "  ROOT %done = bf16[64] collective-permute-done(%start)",
  ]
  assert costs_of(entry(*lines)).hbm_bytes == 2 * 128
