"""Decoders of any mixers and norms, without experts, for one row in float64 by loops."""

import jax
import numpy as np
from flax import nnx
from layers.attention_layers import oracle
from oracles import language_model, networks


def normed(config, x_LD, tree):
  """Returns the config's norm of each token, by loops."""
  if config.norm != "rmsnorm":
    x_LD = x_LD - np.mean(x_LD, axis=1, keepdims=True)
  y_LD = language_model.rms_norm(x_LD, tree["scale"], epsilon=config.norm_epsilon)
  return y_LD + tree.get("bias", 0.0)


def oracle_tree(params):
  """Returns a model's parameters, float64."""
  return jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))


def hidden_states(config, tree, tokens, mask):
  """Returns what the last block leaves of one row, (L, D)."""
  x_LD = tree["embedding"][tokens] * config.embedding_multiplier
  for index, segment in enumerate(config.parsed_segments()):
    for repeat in range(segment.repeats):
      for place, (word, _) in enumerate(segment.pattern):
        block = jax.tree.map(lambda a, i=repeat: a[i], tree["segments"][index]["blocks"][place])
        x_LD = run_block(config, word, block, x_LD, mask)
  return x_LD


def head_logits(config, tree, x_LD, norm):
  """Returns the logits (L, V) of hidden states."""
  head = tree["embedding"].T if config.tie_embeddings else tree["head"]
  logits = normed(config, x_LD, norm) @ head + tree.get("head_bias", 0.0)
  return logits / config.logits_divisor


def oracle_logits(config, tree, tokens, mask):
  """Returns the logits (L, V) of one row."""
  return head_logits(config, tree, hidden_states(config, tree, tokens, mask), tree["final_norm"])


def run_block(config, word, block, x_LD, mask):
  """Returns (L, D): what a block with that mixer makes of x."""
  mixer = {name: w["scale"] if isinstance(w, dict) else w for name, w in block["mixer"].items()}
  y_LD = oracle(config.mixers()[word], mixer, normed(config, x_LD, block["mixer_norm"]), mask)
  x_LD = x_LD + config.residual_multiplier * y_LD
  y_LD = normed(config, x_LD, block["feed_forward_norm"])
  weights, act = block["feed_forward"]["weights"], str(config.mlp.activation)
  return x_LD + config.residual_multiplier * np.array(
    [networks.network(y_D, weights, act) for y_D in y_LD]
  )
