"""Encoder-decoders equal a float64 pass of plain loops; padding, packing, caches and refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import relative_error
from flax import nnx
from oracles import encoder_decoder, language_model
from tiny_models import (
  forward,
  oracle_block,
  random_model,
  random_parameters,
  random_tokens,
  run,
  tiny_config,
)

from moe_jax import generate
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.models import EncoderConfig, PositionEmbedding
from moe_jax.models.config import NormPlacement

# Float32 sums of tens of terms through 8 blocks against float64.
TOLERANCE = 1e-5
# What matters changes more, by far.
CHANGED = 1e-3

PLAIN = AttentionConfig(2, 2, 4, positions="none")
BIASED = dataclasses.replace(
  PLAIN,
  softmax_scale=1.0,
  relative_bias_buckets=8,
  relative_bias_max_distance=16,
  relative_bias_shared=True,
)
SEGMENTS = (("attention:dense attention:moe", 1),)


def pair_config(attention=BIASED, **changes):
  cross = dataclasses.replace(PLAIN, softmax_scale=attention.softmax_scale)
  fields = dict(
    gated=False,
    activation="relu",
    segments=SEGMENTS,
    attention=attention,
    encoder=EncoderConfig((("attention:moe attention:dense", 1),), attention, start_token=3),
    cross_attention=cross,
    tie_embeddings=True,
    logits_divisor=2.0,
  )
  return tiny_config(**{**fields, **changes})


T5 = pair_config()
POST = pair_config(
  PLAIN,
  norm_placement="post",
  position_embedding="sinusoidal",
  position_offset=2,
  embedding_multiplier=1.5,
)
CONFIGS = pytest.mark.parametrize("config", [T5, POST], ids=["relative bias", "post-norm"])

M, L = 6, 5
MASK = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * M], bool)
DECODER_MASK = np.array([[1] * L, [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
TOKENS = random_tokens(T5, 3, M, seed=4)
DECODER_TOKENS = random_tokens(T5, 3, L, seed=5)


def weights_of(config, params):
  """Returns the parameters as the oracle takes them."""
  tree = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))

  def stack(name):
    own = tree[name]
    blocks = [
      oracle_block(block, repeat)
      for segment in own["segments"].values()
      for repeat in range(1)
      for block in segment["blocks"].values()
    ]
    extra = {"relative_bias": own["relative_bias"]} if "relative_bias" in own else {}
    final = {"final_norm": own["final_norm"]["scale"]} if "final_norm" in own else {}
    return {"blocks": blocks, **extra, **final}

  return {
    "embedding": tree["decoder"]["embedding"],
    "encoder": stack("encoder"),
    "decoder": stack("decoder"),
  }


def options_of(config):
  routing = config.moe.routing
  sinusoidal = config.position_embedding == PositionEmbedding.SINUSOIDAL
  return dict(
    placement=str(config.norm_placement),
    epsilon=config.norm_epsilon,
    activation="relu",
    scale=config.attention.scale,
    max_distance=config.attention.relative_bias_max_distance,
    sinusoidal=config.position_offset if sinusoidal else None,
    multiplier=config.embedding_multiplier,
    divisor=config.logits_divisor,
    route=lambda length: dict(
      top_k=routing.top_k, capacity=length, weighting=str(routing.weighting)
    ),
  )


def oracle_logits(config, weights):
  rows = zip(TOKENS, DECODER_TOKENS, MASK, DECODER_MASK, strict=True)
  return np.array(
    [
      encoder_decoder.logits(
        one, other, weights, mask=mask, decoder_mask=decoder_mask, options=options_of(config)
      )
      for one, other, mask, decoder_mask in rows
    ]
  )


@CONFIGS
def test_logits_equal_the_float64_oracle(config):
  logits = run(config, TOKENS, DECODER_TOKENS, token_mask=MASK, decoder_mask=DECODER_MASK)
  expected = oracle_logits(config, weights_of(config, random_parameters(config)[1]))
  assert relative_error(logits[DECODER_MASK], expected[DECODER_MASK]) <= TOLERANCE


def test_gradients_equal_differences_of_the_oracle():
  config = POST
  graph, params = random_parameters(config)
  targets = np.roll(DECODER_TOKENS, -1, axis=1)

  @jax.jit
  def loss(params):
    logits = nnx.merge(graph, params)(
      TOKENS, DECODER_TOKENS, token_mask=jnp.asarray(MASK), decoder_mask=jnp.asarray(DECODER_MASK)
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(nll, where=DECODER_MASK)

  def oracle_loss(params):
    logits = oracle_logits(config, weights_of(config, params))[DECODER_MASK]
    return language_model.cross_entropy(logits, targets[DECODER_MASK])

  gradient = jax.jit(jax.grad(loss))(params)
  rng, step = np.random.default_rng(0), 1e-5
  for _ in range(2):
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), params)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    above, below = (
      oracle_loss(jax.tree.map(lambda a, d, s=sign: a + s * step * d, wide, direction))
      for sign in (1, -1)
    )
    slope = (above - below) / (2 * step)
    found = sum(
      float(np.sum(np.asarray(g, np.float64) * d))
      for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert abs(found - slope) <= 1e-4 * max(abs(slope), 1.0)


@CONFIGS
def test_cached_decoding_equals_the_whole_sequence(config):
  model = random_model(config)
  whole = run(config, TOKENS, DECODER_TOKENS, token_mask=MASK)

  @jax.jit
  def steps(state):
    model = nnx.merge(graph, state)
    cache = model.init_cache(model.encode(TOKENS, token_mask=jnp.asarray(MASK)), L)
    first, cache = model.decode(DECODER_TOKENS[:, :2], cache)
    rest = []
    for place in range(2, L):
      logits, cache = model.decode(DECODER_TOKENS[:, place : place + 1], cache)
      rest.append(logits)
    return jnp.concatenate([first, *rest], axis=1)

  graph, state = nnx.split(model)
  assert relative_error(steps(state), whole) <= TOLERANCE


def test_packed_pairs_have_the_logits_they_have_alone():
  first, second = TOKENS[:1, :3], TOKENS[1:2, :3]
  one, other = DECODER_TOKENS[:1, :2], DECODER_TOKENS[1:2, :3]
  packed = run(
    T5,
    np.concatenate([first, second], axis=1),
    np.concatenate([one, other], axis=1),
    segment_ids=np.array([[1, 1, 1, 2, 2, 2]]),
    positions=np.array([[0, 1, 2, 0, 1, 2]]),
    decoder_segment_ids=np.array([[1, 1, 2, 2, 2]]),
    decoder_positions=np.array([[0, 1, 0, 1, 2]]),
  )
  alone = np.concatenate([run(T5, first, one), run(T5, second, other)], axis=1)
  assert relative_error(packed, alone) <= TOLERANCE


def test_a_decoder_sees_the_whole_source_and_none_of_its_own_future():
  logits = run(T5, TOKENS, DECODER_TOKENS)
  later = DECODER_TOKENS.copy()
  later[:, 3] = (later[:, 3] + 1) % T5.vocab_size
  moved = run(T5, TOKENS, later)
  assert relative_error(moved[:, :3], logits[:, :3]) <= TOLERANCE
  source = TOKENS.copy()
  source[:, -1] = (source[:, -1] + 1) % T5.vocab_size
  moved = run(T5, source, DECODER_TOKENS)
  assert all(relative_error(moved[:, i], logits[:, i]) > CHANGED for i in range(L))


def test_a_source_of_padding_adds_nothing():
  none = np.zeros_like(MASK)
  logits = run(T5, TOKENS, DECODER_TOKENS, token_mask=none)
  other = run(T5, (TOKENS + 1) % T5.vocab_size, DECODER_TOKENS, token_mask=none)
  np.testing.assert_array_equal(logits, other)
  assert np.all(np.isfinite(logits))


def test_answers_begin_with_the_start_token_and_ignore_padding():
  model = random_model(T5, 1)
  answers = np.asarray(generate(model, TOKENS, 4, token_mask=MASK))
  assert answers.shape == (3, 5) and np.all(answers[:, 0] == 3)
  alone = np.asarray(generate(model, TOKENS[:1, :4], 4))
  np.testing.assert_array_equal(answers[:1], alone)
  begun = dict(token_mask=MASK, decoder_tokens=answers[:, :4], use_cache=False)
  np.testing.assert_array_equal(generate(model, TOKENS, 1, **begun), answers)


def test_layers_of_the_encoder_come_first():
  assert T5.moe_layers() == [0, 3]
  _, aux = run(T5, TOKENS, DECODER_TOKENS, return_aux=True)
  assert [logits.shape[1] for logits in aux.router_logits] == [M, L]


def test_own_embedding_is_the_encoders_alone():
  config = dataclasses.replace(T5, encoder=dataclasses.replace(T5.encoder, own_embedding=True))
  graph, params = random_parameters(config)
  before = forward(graph, params, TOKENS, DECODER_TOKENS)
  params = jax.tree.map(lambda a: a, params)
  params["encoder"]["embedding"][...] += 1.0
  assert relative_error(forward(graph, params, TOKENS, DECODER_TOKENS), before) > CHANGED


def test_a_decoder_without_attention_needs_no_section_for_it():
  recurrent = dict(segments=(("mamba:dense mamba:moe", 1),), mamba=MambaConfig(8, 2))
  config = dataclasses.replace(POST, attention=None, **recurrent)
  logits = run(config, TOKENS, DECODER_TOKENS, token_mask=MASK)
  cached = generate(random_model(config), TOKENS, 3, token_mask=MASK)
  uncached = generate(random_model(config), TOKENS, 3, token_mask=MASK, use_cache=False)
  assert np.isfinite(logits).all()
  np.testing.assert_array_equal(cached, uncached)


REFUSED = {
  "encoder is given alone": dict(cross_attention=None),
  "cross_attention is given alone": dict(encoder=None),
  "expected none": dict(cross_attention=AttentionConfig(2, 2, 4)),
  "0 to 12": dict(encoder=dataclasses.replace(T5.encoder, start_token=13)),
  "expected attention and dense or moe": dict(
    encoder=dataclasses.replace(T5.encoder, segments=(("latent_attention:dense", 1),))
  ),
  "behind an encoder": dict(mtp_depth=1),
  "position_offset = 2 would be ignored": dict(position_offset=2),
  "has no attention block, so attention would be ignored": dict(
    segments=(("mamba:dense mamba:moe", 1),), mamba=MambaConfig(8, 2)
  ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_together_is_refused(message):
  with pytest.raises(UserError, match=message):
    pair_config(**REFUSED[message])


def test_further_tokens_need_norms_before():
  with pytest.raises(UserError, match="that no norm cuts"):
    tiny_config(norm_placement=NormPlacement.POST, mtp_depth=1)


@pytest.mark.parametrize(
  ("message", "changes"),
  [
    ("even and at least 4", dict(relative_bias_buckets=5, relative_bias_max_distance=16)),
    ("looks both ways", dict(window=2)),
  ],
)
def test_an_encoders_attention_looks_both_ways(message, changes):
  with pytest.raises(UserError, match=message):
    EncoderConfig(SEGMENTS, dataclasses.replace(PLAIN, **changes))


@functools.cache
def decoder_of_a_pair():
  return random_model(T5).decoder


def test_calls_that_lack_their_other_half_are_refused():
  with pytest.raises(UserError, match="no encoder's output was given"):
    decoder_of_a_pair()(jnp.asarray(TOKENS))
  with pytest.raises(UserError, match="belong together"):
    random_model(T5)(TOKENS, DECODER_TOKENS, segment_ids=np.ones_like(TOKENS))
  with pytest.raises(UserError, match="has 2 rows; expected 3"):
    random_model(T5)(TOKENS[:2], DECODER_TOKENS)
  encoded = random_model(T5).encode(TOKENS)
  with pytest.raises(UserError, match="has 3 rows; expected 2"):
    random_model(T5).decoder.init_cache(2, 4, encoded)
  packed = dataclasses.replace(encoded, segment_ids=jnp.ones(TOKENS.shape, jnp.int32))
  with pytest.raises(UserError, match="packed sequences"):
    decoder_of_a_pair()(jnp.asarray(DECODER_TOKENS), encoded=packed)
  with pytest.raises(UserError, match="no encoder"):
    generate(random_model(tiny_config()), TOKENS, 1, decoder_tokens=DECODER_TOKENS)
  with pytest.raises(UserError, match="2 rows; expected 3"):
    generate(random_model(T5), TOKENS, 1, decoder_tokens=DECODER_TOKENS[:2])
