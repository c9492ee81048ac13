"""Continuing a text."""

import jax
import numpy as np

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inference.generate import generate
from moe_jax.models import Decoder


def continue_text(
  model: Decoder,
  tokenizer: Tokenizer,
  prompt: str,
  max_new_tokens: int,
  *,
  temperature: float,
  key: jax.Array,
) -> str:
  """Returns what the model writes after `prompt`, up to the end of the document.

  The prompt is taken for the start of a document; generation always computes `max_new_tokens`, and
  what follows an end-of-document token is cut off.
  """
  tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)])[None]
  new = np.asarray(generate(model, tokens, max_new_tokens, temperature=temperature, key=key))
  new = new[0, tokens.shape[1] :]
  ends = np.flatnonzero(new == tokenizer.eos_id)
  return tokenizer.decode(new[: ends[0]] if ends.size else new)
