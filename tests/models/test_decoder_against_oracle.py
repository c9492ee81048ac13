"""The whole decoder equals a float64 forward pass of plain loops, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from comparison import relative_error
from moe_jax.layers.mlp import Activation
from oracles import decoder, language_model
from tiny_models import (
  ALTERNATING, DENSE, MOE, forward, oracle_weights, random_parameters, random_tokens, run,
  tiny_config)

# Float32 sums of tens of terms through 4 blocks against float64.
TOLERANCE = 1e-5

L = 7


def oracle_options(config, length=L):
  """Returns the options of `oracles.decoder.logits` that say the same as the config."""
  routing = config.moe.routing
  route = dict(top_k=routing.top_k, capacity=length, weighting=str(routing.weighting))
  return dict(
    activation=str(config.mlp.activation), route=route, base=config.attention.rope_theta,
    epsilon=config.norm_epsilon)


def oracle_logits(config, weights, tokens, **call):
  """Returns the oracle's logits (L, V) of one row; positions count from 0 unless given."""
  call = {"positions": np.arange(len(tokens)), **call}
  return decoder.logits(tokens, weights, **call, **oracle_options(config, len(tokens)))


CONFIGS = {
  "dense and moe, gated silu, untied": tiny_config(),
  "dense, plain relu, tied": tiny_config(
    segments=DENSE, gated=False, activation=Activation.RELU, tie_embeddings=True),
  "moe, plain gelu, raw top-1": tiny_config(
    segments=MOE, gated=False, activation=Activation.GELU, norm_epsilon=1e-2,
    routing=dict(top_k=1, weighting="raw")),
  "moe, gated gelu, tied, mixtral weights": tiny_config(
    segments=MOE, activation=Activation.GELU, tie_embeddings=True,
    routing=dict(weighting="softmax_selected")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_the_float64_oracle(config):
  tokens = random_tokens(config, 2, L)
  weights = oracle_weights(config, random_parameters(config)[1])
  expected = [oracle_logits(config, weights, row) for row in tokens]
  assert relative_error(run(config, tokens), expected) <= TOLERANCE
