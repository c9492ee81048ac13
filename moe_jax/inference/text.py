"""Continuing a text."""

from collections.abc import Sequence

import jax
import numpy as np

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inference.generate import generate
from moe_jax.models import Model


def continue_text(
  model: Model,
  tokenizer: Tokenizer,
  prompt: str,
  max_new_tokens: int,
  *,
  temperature: float,
  key: jax.Array,
  top_k: int | None = None,
  top_p: float | None = None,
  question: Sequence[int] = (),
  image: np.ndarray | None = None,
) -> str:
  """Returns what the model writes after `prompt`, up to the end of the document.

  The prompt is taken for the start of a document; the ids of `question` follow it, and those of an
  image (channels, rows, columns) float32 precede it.
  """
  sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, key=key)
  before = [tokenizer.bos_id]
  if image is not None:
    vision = model.config.vision
    before += [vision.image_token] * vision.tokens_per_image
    sampling["pixel_values"] = image[None]
  tokens = np.concatenate([before, tokenizer.encode(prompt), question]).astype(np.int32)
  stop_ids = (tokenizer.eos_id,)
  return tokenizer.decode(continue_tokens(model, tokens, max_new_tokens, stop_ids, **sampling))


def continue_tokens(
  model: Model, tokens: np.ndarray, max_new_tokens: int, stop_ids: Sequence[int], **sampling
) -> np.ndarray:
  """Returns the ids that the model adds to one prompt (L,), up to the first of `stop_ids`.

  `sampling` are arguments of `generate`.
  """
  new = generate(model, tokens[None], max_new_tokens, stop_token=stop_ids, **sampling)
  # An encoder-decoder's answer begins with its start token, and not with the prompt.
  new = np.asarray(new)[0, new.shape[1] - max_new_tokens :]
  ends = np.flatnonzero(np.isin(new, stop_ids))
  return new[: ends[0]] if ends.size else new
