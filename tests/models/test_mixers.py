"""Models of several kinds of mixers, with the families' norms and multipliers, equal the loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from layers.attention_layers import latent_config, oracle
from oracles import language_model, networks
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
  "mixed": dense(MIXED),
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


def normed(config, x_LD, tree):
  """Returns the config's norm of each token, by loops."""
  if config.norm != "rmsnorm":
    x_LD = x_LD - np.mean(x_LD, axis=1, keepdims=True)
  y_LD = language_model.rms_norm(x_LD, tree["scale"], epsilon=config.norm_epsilon)
  return y_LD + tree.get("bias", 0.0)


def oracle_logits(config, tree, tokens, mask):
  """Returns the logits (L, V) of one row of a model without experts, by loops."""
  x_LD = tree["embedding"][tokens] * config.embedding_multiplier
  for index, segment in enumerate(config.parsed_segments()):
    for repeat in range(segment.repeats):
      for place, (word, _) in enumerate(segment.pattern):
        block = jax.tree.map(lambda a, i=repeat: a[i], tree["segments"][index]["blocks"][place])
        x_LD = _block(config, word, block, x_LD, mask)
  head = tree["embedding"].T if config.tie_embeddings else tree["head"]
  logits = normed(config, x_LD, tree["final_norm"]) @ head + tree.get("head_bias", 0.0)
  return logits / config.logits_divisor


def _block(config, word, block, x_LD, mask):
  mixer = {name: w["scale"] if isinstance(w, dict) else w for name, w in block["mixer"].items()}
  y_LD = oracle(config.mixers()[word], mixer, normed(config, x_LD, block["mixer_norm"]), mask)
  x_LD = x_LD + config.residual_multiplier * y_LD
  y_LD = normed(config, x_LD, block["feed_forward_norm"])
  weights, act = block["feed_forward"]["weights"], str(config.mlp.activation)
  return x_LD + config.residual_multiplier * np.array(
    [networks.network(y_D, weights, act) for y_D in y_LD]
  )


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_logits_equal_the_loops_under_padding(config):
  logits = run(config, TOKENS, token_mask=MASK)
  params = random_parameters(config)[1]
  tree = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))
  for row, mask in enumerate(MASK):
    expected = oracle_logits(config, tree, TOKENS[row], mask)
    assert relative_error(logits[row][mask], expected[mask]) <= TOLERANCE


def test_generation_is_the_same_with_and_without_a_cache():
  # 2 new tokens after prompts of 5, 6 and 8 reach a new chunk of 3 and go on in an old one.
  call = dict(max_new_tokens=2, token_mask=jnp.asarray(MASK))
  model = random_model(MIXED.dropless())
  cached = generate(model, TOKENS, **call)
  np.testing.assert_array_equal(cached, generate(model, TOKENS, use_cache=False, **call))


def test_padding_does_not_change_what_is_generated():
  model, prompt = random_model(MIXED.dropless()), TOKENS[2:, :5]
  alone = generate(model, prompt, max_new_tokens=6)[0, 5:]
  padded = generate(model, TOKENS, max_new_tokens=6, token_mask=jnp.asarray(MASK))
  np.testing.assert_array_equal(padded[2, L:], alone)


def test_every_mixer_has_a_cache_of_its_own_kind():
  model = nnx.eval_shape(lambda: Decoder(MIXED, key=jax.random.key(0)))
  latent, interleaved, _ = jax.eval_shape(lambda: model.init_cache(3, 10)).segments
  assert latent[0].latent.shape == (1, 3, 10, LATENT.kv_rank)
  assert latent[0].rope_key.shape == (1, 3, 10, LATENT.rope_dim)
  assert [each.key.shape for each in interleaved] == [(2, 3, 10, 2, 4), (2, 3, 10, 1, 4)]


def test_a_packed_document_does_not_see_its_neighbours_chunks():
  # Two documents in a row, each counted from 0, are two rows of one document each.
  segments = np.array([[1] * 3 + [2] * 5])
  positions = np.array([[*range(3), *range(5)]])
  packed = run(MIXED, TOKENS[:1], segment_ids=segments, positions=positions)
  for part in (slice(0, 3), slice(3, 8)):
    alone = run(MIXED, TOKENS[:1, part])
    assert relative_error(packed[:, part], alone) <= TOLERANCE


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
