"""Models of several kinds of mixers, with the families' norms and multipliers, equal the loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from layers.attention_layers import latent_config
from models.mixer_loops import oracle_logits, oracle_tree
from tiny_models import random_model, random_parameters, random_tokens, run, tiny_config

from moe_jax import generate
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.models import Decoder, ModelConfig

# Float32 sums of tens of terms through 4 blocks against float64.
TOLERANCE = 1e-5

CHUNKED = AttentionConfig(
  4, 2, 4, rope_theta=100.0, chunk=3, qk_norm="l2", rotary_layout="pairs", qkv_bias=True
)
GLOBAL = AttentionConfig(4, 1, 4, positions="none", query_temperature_floor=2, sinks=True)
LATENT = latent_config(query_rank=3)
SEGMENTS = (
  ("latent_attention:dense", 1),
  ("attention:dense global_attention:moe", 2),
  ("latent_attention:moe", 1),
)
MIXED = tiny_config(
  segments=SEGMENTS, attention=CHUNKED, global_attention=GLOBAL, latent_attention=LATENT
)
L = 8
MASK = np.array([[1] * L, [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], bool)
TOKENS = random_tokens(MIXED, *MASK.shape)


def dense(config):
  """The same model without experts, whose loops need no router."""
  segments = tuple((pattern.replace(":moe", ":dense"), n) for pattern, n in config.segments)
  return dataclasses.replace(config, segments=segments, moe=None)


FAMILIES = {
  "layernorm, multipliers, head bias": dataclasses.replace(
    dense(MIXED),
    norm="layernorm",
    norm_epsilon=0.01,
    embedding_multiplier=3.0,
    residual_multiplier=0.4,
    logits_divisor=2.0,
    head_bias=True,
  ),
  "layernorm without bias, tied": dataclasses.replace(
    dense(MIXED), norm="layernorm_no_bias", tie_embeddings=True
  ),
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_logits_equal_the_loops_under_padding(config):
  logits = run(config, TOKENS, token_mask=MASK)
  tree = oracle_tree(random_parameters(config)[1])
  for row, mask in enumerate(MASK):
    expected = oracle_logits(config, tree, TOKENS[row], mask)
    assert relative_error(logits[row][mask], expected[mask]) <= TOLERANCE


def test_generation_is_the_same_with_and_without_a_cache():
  # 2 new tokens after prompts of 5, 6 and 8 reach a new chunk of 3 and go on in an old one.
  call = dict(max_new_tokens=2, token_mask=jnp.asarray(MASK))
  model = random_model(MIXED.dropless())
  cached = generate(model, TOKENS, **call)
  np.testing.assert_array_equal(cached, generate(model, TOKENS, use_cache=False, **call))


def test_every_mixer_has_a_cache_of_its_own_kind():
  model = nnx.eval_shape(lambda: Decoder(MIXED, key=jax.random.key(0)))
  latent, interleaved, _ = jax.eval_shape(lambda: model.init_cache(3, 10)).segments
  assert latent[0].latent.shape == (1, 3, 10, LATENT.kv_rank)
  assert latent[0].rope_key.shape == (1, 3, 10, LATENT.rope_dim)
  assert [each.key.shape for each in interleaved] == [(2, 3, 10, 2, 4), (2, 3, 10, 1, 4)]


def test_a_packed_document_does_not_see_its_neighbours_chunks():
  # Two documents in a row, each counted from 0, are two rows of one document each.
  segments, positions = np.array([[1] * 4 + [2] * 4]), np.array([[*range(4)] * 2])
  packed = run(MIXED, TOKENS[:1], segment_ids=segments, positions=positions)
  alone = run(MIXED, TOKENS[:1].reshape(2, 4))
  assert relative_error(packed.reshape(alone.shape), alone) <= TOLERANCE


REFUSED = [
  (dict(global_attention=None), "has global_attention blocks but global_attention is None"),
  (dict(attention=None), "has attention blocks but attention is None"),
  (dict(mlp=None), "has dense blocks but mlp is None"),
  (
    dict(segments=(("attention:dense", 1),), moe=None, latent_attention=None),
    "no global_attention block, so global_attention would be ignored; .*global_attention:dense",
  ),
  (dict(segments=(("latent_attenton:dense", 1),)), "did you mean latent_attention:dense"),
  (dict(norm="layer_norm"), "norm = 'layer_norm' .* did you mean 'layernorm'"),
  (dict(residual_multiplier=0.0), "residual_multiplier = 0.0 .* greater than 0"),
  (dict(logits_divisor=float("inf")), "logits_divisor = inf .* greater than 0"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_contradicting_sections_are_refused(changes, message):
  with pytest.raises(UserError, match=message) as caught:
    dataclasses.replace(MIXED, **changes)
  assert "\n" not in str(caught.value)


def test_a_model_of_experts_alone_needs_no_dense_section():
  config = ModelConfig(
    vocab_size=5, model_dim=8, segments=(("attention:moe", 1),), attention=CHUNKED, moe=MIXED.moe
  )
  assert config.mlp is None and list(config.mixers()) == ["attention"]
