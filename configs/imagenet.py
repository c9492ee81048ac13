"""Naming what an image shows: ImageNet, read by a tower, through a decoder with experts.

The decoder reads the tokens that the tower makes of an image (early fusion, as in Llama 4), and
writes the name of the class, letter by letter: patches and letters share the experts. The accuracy
on held-out images, of names that are right to the last letter, is logged as `eval_accuracy`.

  configs/imagenet.py        224 x 224 pixels, 14 x 14 patches, of which 2 x 2 become a token
  configs/imagenet.py:small  64 x 64 pixels, 16 tokens: the layout for a first try

The data come from TFDS, which has to be given the archives of ImageNet (its page says how), and are
then fitted and packed by us, 150 KB an image at 224 x 224 and 12 KB at 64 x 64:

  tfds build imagenet2012 --file_format=array_record
  moe-jax data prepare --config=configs/imagenet.py
  moe-jax train --config=configs/imagenet.py --workdir=runs/imagenet
  moe-jax generate --workdir=runs/imagenet --image=photo.jpg --prompt= --temperature=0

Class names are TFDS's, WordNet ids such as n01440764. Any TFDS data set with images and a text or a
class fits the same fields. There is no augmentation: an image is its middle square. Not run at full
length: no result is claimed.
"""

from ml_collections import config_dict

from moe_jax.config import to_mapping
from moe_jax.moe import preset
from moe_jax.training.template import choose_variant, full_config

# Behind the 259 ids of the byte tokenizer.
_IMAGE_TOKEN = 259
_PIXEL_SHUFFLE = 2
VARIANTS = {
  "full": dict(size=224, patch=16, width=192, heads=3, layers=6, length=64, batch_size=256),
  "small": dict(size=64, patch=8, width=64, heads=2, layers=2, length=32, batch_size=64),
}


def get_config(variant: str = "full") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  chosen = choose_variant(variant, VARIANTS)
  width, size = chosen["width"], chosen["size"]
  tokens = (size // chosen["patch"] // _PIXEL_SHUFFLE) ** 2
  return full_config(
    dict(
      steps=100_000,
      batch_size=chosen["batch_size"],
      data=dict(
        sources=("tfds:imagenet2012:5.1.0,image=image,text=label,heldout=validation",),
        sequence_length=chosen["length"],
        image=dict(size=size, tokens=tokens, token=_IMAGE_TOKEN),
      ),
      model=dict(
        model_dim=width,
        segments=(("attention:dense attention:moe", chosen["layers"] // 2),),
        num_heads=chosen["heads"],
        num_kv_heads=chosen["heads"],
        head_dim=width // chosen["heads"],
        vocab_size=_IMAGE_TOKEN + 1,
        mlp=dict(hidden_dim=4 * width, gated=True, activation="silu"),
        vision=dict(
          image_token=_IMAGE_TOKEN,
          model_dim=width,
          num_layers=chosen["layers"],
          num_heads=chosen["heads"],
          hidden_dim=4 * width,
          adapter_dim=width,
          image_size=size,
          patch_size=chosen["patch"],
          pixel_shuffle=_PIXEL_SHUFFLE,
        ),
      ),
      moe=dict(
        hidden_dim=4 * width, dispatch="gather", **to_mapping(preset("switch", num_experts=8))
      ),
      optimizer=dict(learning_rate=1e-3, warmup_steps=5000),
      eval=dict(every=5000),
      checkpoint=dict(every=1000, keep=2),
      sample=dict(prompt="", max_new_tokens=12, temperature=0.0),
    )
  )
