"""Score stage: router logits -> scores in float32."""

import jax
import jax.numpy as jnp


def softmax_scores(logits_GSE: jax.Array) -> jax.Array:
  """Returns softmax over experts, (G, S, E) float32.

  Float32 whatever the activations are: bfloat16 scores change the selected experts of about 2 % of
  tokens (the selective precision of Switch, arXiv 2101.03961 section 2.4).
  """
  return jax.nn.softmax(logits_GSE.astype(jnp.float32), axis=-1)
