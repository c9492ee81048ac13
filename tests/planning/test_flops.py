"""FLOPs are those added up by hand and those that XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_models import DENSE, MOE, tiny_config

from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.models import Decoder, VisionConfig
from moe_jax.moe import MoEConfig, preset
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import (
  dispatch_cost,
  forward_flops,
  forward_flops_per_token,
  mean_visible,
  multi_token_flops_per_token,
  training_flops_per_token,
)
from moe_jax.planning.vision import vision_flops_per_image_token

CONFIGS = {
  "alternating": tiny_config(),
  "dense, tied": tiny_config(segments=DENSE, tie_embeddings=True),
  "moe, plain, top-1": tiny_config(segments=MOE, gated=False, routing=dict(top_k=1)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_flops_by_hand(config):
  # Forward: 2 a parameter; scores and values 2 * 16 each for a mean of 5.5 of 10 tokens. Backward:
  # twice that.
  per_layer = 2 * (2 * 16) * 5.5
  forward = 2 * count_parameters(config).matmul_active + len(config.layers()) * per_layer
  assert forward_flops_per_token(config, 10) == forward
  assert training_flops_per_token(config, 10) == 3 * forward


def test_components_of_an_alternating_model_by_hand():
  # D = 8, V = 13, 4 query and 2 key heads of width 4, F = 12 dense and 6 in experts, top-2 of 4.
  assert forward_flops(CONFIGS["alternating"], 10) == {
    "head": 2 * 13 * 8,
    "attention": 4 * 2 * (2 * 8 * 16 + 2 * 8 * 8),
    "dense_feed_forward": 2 * 2 * 3 * 8 * 12,
    "router": 2 * 2 * 8 * 4,
    "routed_experts": 2 * 2 * 2 * 3 * 8 * 6,
    "attention_scores": 4 * 2 * (2 * 16) * 5.5,
  }


def test_components_of_a_hybrid_by_hand():
  config = tiny_config(
    segments=(("mamba:dense attention:dense", 2),),
    mamba=MambaConfig(inner_dim=12, step_rank=3, state_dim=5, conv_width=4),
  )
  flops = forward_flops(config, 10)
  # D = 8 to 2 * 12 and back, 12 to 3 + 2 * 5, 3 to 12, 4 places of 12 channels; 12 * 5 states.
  matrices = 3 * 8 * 12 + 12 * 13 + 3 * 12 + 4 * 12
  assert flops["mamba"] == 2 * 2 * matrices
  assert flops["state_scan"] == 2 * 6 * 12 * 5
  assert flops["attention_scores"] == 2 * 2 * (2 * 16) * 5.5
  # A further token's block is like the last one.
  deeper = dataclasses.replace(config, segments=(("attention:dense mamba:dense", 2),), mtp_depth=1)
  block = matrices + 3 * 8 * 12 + 2 * 8 * 8 + 13 * 8
  assert multi_token_flops_per_token(deeper, 10) == 3 * (2 * block + 6 * 12 * 5)


def test_multi_token_prediction_by_hand():
  config = dataclasses.replace(CONFIGS["alternating"], mtp_depth=2)
  assert forward_flops_per_token(config, 10) == forward_flops_per_token(CONFIGS["alternating"], 10)
  # Each depth: 2 D to D, a block like the last one (attention, router, 2 of 4 experts), the head.
  matrices = 2 * 8 * 8 + (2 * 8 * 16 + 2 * 8 * 8) + 8 * 4 + 2 * 3 * 8 * 6 + 13 * 8
  depth = 3 * (2 * matrices + 2 * (2 * 16) * 5.5)
  assert multi_token_flops_per_token(config, 10) == 2 * depth


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize(
  "limits", [{}, {"window": 1}, {"window": 3}, {"window": 40}, {"chunk": 3}, {"chunk": 5}]
)
def test_visible_keys_are_those_of_a_mask(length, limits):
  window, chunk = limits.get("window", length), limits.get("chunk", length)
  seen = sum(
    q - k < window and q // chunk == k // chunk for q in range(length) for k in range(q + 1)
  )
  assert mean_visible(length, **limits) == pytest.approx(seen / length)


def test_a_window_sees_less_than_the_sequence():
  config = tiny_config(segments=DENSE)
  attention = dataclasses.replace(config.attention, window=4)
  windowed = dataclasses.replace(config, attention=attention)
  # Of 10 tokens the first four see 1, 2, 3 and 4, the others 4.
  saved = 5.5 - (1 + 2 + 3 + 7 * 4) / 10
  difference = forward_flops_per_token(config, 10) - forward_flops_per_token(windowed, 10)
  assert difference == pytest.approx(2 * 2 * (2 * 16) * saved)


def layer(dispatch: str, **routing) -> MoEConfig:
  """A layer of 8 experts of width 6 with 1.5 slots a token."""
  routing = preset("switch", **{"num_experts": 8, "capacity_factor": 1.5, **routing})
  return MoEConfig(routing, hidden_dim=6, dispatch=dispatch)


def test_einsum_dispatch_multiplies_masks_and_computes_empty_slots():
  # One group of 2 * 16 tokens: C = 1.5 * 32 / 8 = 6 slots of 8 experts.
  cost = dispatch_cost(layer("einsum"), 5, batch_size=2, sequence_length=16)
  assert cost.slots_per_token == 8 * 6 / 32
  # (S, E*C) x (E*C, D) twice, for S tokens.
  assert cost.flops == 2 * (2 * 8 * 6 * 5)
  assert cost.empty_slot_flops == 0.5 * 2 * (2 * 5 * 6)


def test_groups_of_a_sequence_have_their_own_capacity():
  cost = dispatch_cost(layer("einsum", grouping="sequence"), 5, batch_size=2, sequence_length=16)
  assert cost.slots_per_token == 8 * 3 / 16
  assert cost.flops == 2 * (2 * 8 * 3 * 5)


def test_gather_moves_for_nothing_and_ragged_has_no_slots():
  assert dispatch_cost(layer("gather"), 5, batch_size=2, sequence_length=16).flops == 0
  ragged = dispatch_cost(layer("ragged"), 5, batch_size=2, sequence_length=16)
  assert (ragged.slots_per_token, ragged.flops, ragged.empty_slot_flops) == (1, 0, 0)


def compiled_flops(config, B: int, L: int) -> float:
  """The FLOPs a token that XLA counts in a forward pass."""
  graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))
  tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
  compiled = jax.jit(lambda p, t: nnx.merge(graph, p)(t)).lower(params, tokens).compile()
  return compiled.cost_analysis()["flops"] / (B * L)


def test_forward_flops_agree_with_the_compilers_count():
  # Wide enough for products to outweigh norms and softmax; the whole scan unrolled, because XLA
  # counts the body of a loop once.
  config = dataclasses.replace(
    tiny_config(segments=DENSE, activation="relu", mlp=dict(hidden_dim=256)),
    model_dim=96,
    vocab_size=128,
    scan_unroll=2,
  )
  L = 16
  # XLA computes the masked scores too.
  masked = 2 * (2 * 16) * (L - mean_visible(L)) * len(config.layers())
  ours = forward_flops_per_token(config, L) + masked
  assert compiled_flops(config, 2, L) == pytest.approx(ours, rel=0.05)


def test_dispatch_flops_agree_with_the_compilers_count():
  # Two one-hot products that outweigh the experts.
  routing = dict(overflow="drop", capacity=32, top_k=1)
  config = dataclasses.replace(
    tiny_config(segments=MOE, routing=routing, moe=dict(dispatch="einsum", hidden_dim=8)),
    model_dim=128,
    scan_unroll=2,
  )
  B, L = 2, 32
  cost = dispatch_cost(config.moe, config.model_dim, B, L)
  masked = 2 * (2 * 16) * (L - mean_visible(L)) * 2
  capacity_share = cost.slots_per_token / config.moe.routing.top_k
  parts = forward_flops(config, L)
  experts = parts["routed_experts"] * (capacity_share - 1)
  ours = sum(parts.values()) + experts + masked + 2 * cost.flops
  assert compiled_flops(config, B, L) == pytest.approx(ours, rel=0.05)


def test_an_image_token_costs_its_part_of_the_tower_and_a_token_of_text_nothing():
  vision = VisionConfig(
    image_token=1,
    model_dim=8,
    num_layers=2,
    num_heads=2,
    hidden_dim=12,
    adapter_dim=6,
    image_size=8,
    patch_size=2,
    num_channels=3,
  )
  config = dataclasses.replace(CONFIGS["alternating"], vision=vision)
  assert forward_flops(config, 10) == forward_flops(CONFIGS["alternating"], 10)
  # 16 patches of 3 x 2 x 2 numbers and a class token; 4 tokens of 4 patches each, D = 8.
  patches = 16 * 12 * 8
  block = 17 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 17 * 17 * 8
  adapter = 4 * (32 * 6 + 6 * 6 + 6 * 8)
  assert vision_flops_per_image_token(config) == 2 * (patches + 2 * block + adapter) / 4
