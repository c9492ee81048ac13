"""Times one token with a cache against reading the whole prefix again.

    python -m experiments.benchmarks.generation [--contexts 64,256] [--rounds 10]

The README beside this file says how to read the table.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks import timing
from moe_jax.layers.attention_config import AttentionConfig, LatentAttentionConfig
from moe_jax.models import Decoder, ModelConfig
from moe_jax.moe import MoEConfig, preset
from moe_jax.planning.flops import forward_flops_per_token
from moe_jax.planning.memory import cache_bytes_per_token

_ATTENTIONS = {
  "attention": dict(attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32)),
  "latent": dict(
    latent_attention=LatentAttentionConfig(
      num_heads=8, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32
    )
  ),
}


def main(argv: list[str] | None = None) -> None:
  """Runs the benchmark and prints its table."""
  args = _parse(argv)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.rounds} rounds")
  print(
    f"{'cache':10}{'context':>8}{'cached ms':>11}{'again ms':>10}{'ratio':>8}{'median':>8}"
    f"{'FLOPs ratio':>13}{'bytes/token':>13}"
  )
  for name in _ATTENTIONS:
    config = make_config(name)
    model = make_model(config)
    for context in args.contexts:
      print(_row(name, config, context, measure(model, context, args)), flush=True)


def make_config(attention: str) -> ModelConfig:
  """Returns a model of 4 blocks of width 256, each with 2 of 8 dropless experts."""
  mixer = "latent_attention" if attention == "latent" else "attention"
  return ModelConfig(
    vocab_size=1024,
    model_dim=256,
    segments=((f"{mixer}:moe", 4),),
    moe=MoEConfig(preset("mixtral"), hidden_dim=256, gated=True, activation="silu"),
    **_ATTENTIONS[attention],
  ).dropless()


def make_model(config: ModelConfig) -> Decoder:
  """Returns the model with random parameters, made by one program."""
  graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))
  params = jax.jit(lambda key: nnx.split(Decoder(config, key=key))[1])(jax.random.key(0))
  return nnx.merge(graph, params)


def measure(model: Decoder, context: int, args: argparse.Namespace) -> list[list[float]]:
  """Returns the seconds a round of the token after `context` others: cached, and all again."""
  graph, params = nnx.split(model)
  ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (args.batch, context + 1))
  tokens = jnp.asarray(ids, jnp.int32)

  def step(params, tokens, cache):
    logits, cache = nnx.merge(graph, params).decode(tokens, cache)
    return logits[:, -1], cache

  def again(params, tokens):
    return nnx.merge(graph, params)(tokens)[:, -1]

  cache = model.init_cache(args.batch, context + 1)
  _, cache = jax.jit(step)(params, tokens[:, :-1], cache)
  programs = [
    timing.compile_program(step, params, tokens[:, -1:], cache),
    timing.compile_program(again, params, tokens),
  ]
  rounds = [args.rounds] * 2
  return timing.time_interleaved(programs, rounds, args.clock, on_round=lambda index: None)


def _row(name: str, config: ModelConfig, context: int, seconds: list[list[float]]) -> str:
  cached, again = seconds
  fastest, median = timing.ratio(again, cached)
  # A token's attention scores are the mean over a sequence: the last one has twice those.
  length = context + 1
  flops = forward_flops_per_token(config, length), forward_flops_per_token(config, 2 * length)
  return (
    f"{name:10}{context:8}{1e3 * min(cached):11.2f}{1e3 * min(again):10.2f}{fastest:8.1f}"
    f"{median:8.1f}{length * flops[0] / flops[1]:13.1f}{cache_bytes_per_token(config):13}"
  )


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--contexts", type=timing.integers, default=[64, 256, 1024], metavar="A,B")
  parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
  parser.add_argument("--rounds", type=int, default=10, help="rounds (default: 10)")
  timing.add_clock(parser)
  return parser.parse_args(argv)


if __name__ == "__main__":
  main()
