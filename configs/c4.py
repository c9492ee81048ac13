"""A decoder with experts on C4 (arXiv 1910.10683), the corpus of most Mixture-of-Experts papers.

  configs/c4.py          every other block holds 8 experts, of which a token visits one
  configs/c4.py:mixture  the same on C4, Wikipedia and books, weighted as GLaM weighs such sources

The data come from TFDS, prepared by it once (`tfds build c4/en --file_format=array_record`; 305 GB)
and then tokenised and packed by us:

  moe-jax data train-tokenizer --config=configs/c4.py --out=c4.model --vocab_size=32000
  moe-jax data prepare --config=configs/c4.py --config.data.tokenizer=c4.model
  moe-jax train --config=configs/c4.py --config.data.tokenizer=c4.model --workdir=runs/c4

Without a tokenizer it reads bytes. Not run at full length yet: no result is claimed. The weights of
`:mixture` follow GLaM (arXiv 2112.06905, Table 3), which has 0.42 filtered web pages, 0.06
Wikipedia and 0.20 books, and three sources that are not public; mixing takes them relative to
their sum.
"""

from ml_collections import config_dict

from moe_jax.config import to_mapping
from moe_jax.moe import preset
from moe_jax.training.template import choose_variant, full_config

_WEB = "tfds:c4/en:3.1.0,heldout=validation"
VARIANTS = {
  "web": (_WEB,),
  "mixture": (
    f"{_WEB},weight=0.42",
    "tfds:wikipedia/20230601.en:1.0.0,weight=0.06",
    "tfds:pg19:0.1.1,text=book_text,heldout=validation,weight=0.2",
  ),
}


def get_config(variant: str = "web") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  return full_config(
    dict(
      steps=100_000,
      batch_size=64,
      data=dict(sources=choose_variant(variant, VARIANTS), sequence_length=512),
      model=dict(
        model_dim=128,
        segments=(("attention:dense attention:moe", 2),),
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        mlp=dict(hidden_dim=512, gated=True, activation="silu"),
      ),
      moe=dict(hidden_dim=512, dispatch="gather", **to_mapping(preset("switch", num_experts=8))),
      optimizer=dict(learning_rate=1e-3, warmup_steps=1000),
      eval=dict(every=5000, batch_size=64),
      checkpoint=dict(every=1000, keep=2),
    )
  )
