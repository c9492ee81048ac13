"""A model called with the fields of a batch, whichever kind both are."""

from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.models.model_aux import ModelAux


def run_batch(model, batch: Mapping[str, jax.Array], **call: Any) -> tuple[jax.Array, ModelAux]:
  """Returns the logits and the aux record of a batch.

  Args:
    model: a decoder, or an encoder-decoder.
    batch: records or pairs, see `moe_jax.data`.
    **call: passed to the model.
  """
  if "source_tokens" in batch:
    return model(
      batch["source_tokens"],
      batch["tokens"],
      token_mask=batch["source_segment_ids"] > 0,
      decoder_mask=batch["segment_ids"] > 0,
      return_aux=True,
      **call,
    )
  return model(
    batch["tokens"],
    token_mask=batch["segment_ids"] > 0,
    segment_ids=batch["segment_ids"],
    positions=batch["positions"],
    **_images(model, batch),
    return_aux=True,
    **call,
  )


def _images(model, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the images of a batch and their places, which rows of padding have too."""
  if "pixel_values" not in batch:
    return {}
  mask = batch["tokens"] == model.config.vision.image_token
  return {"pixel_values": batch["pixel_values"], "image_mask": mask}
