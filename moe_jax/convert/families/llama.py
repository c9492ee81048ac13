"""Dense models to upcycle: LLaMA (arXiv 2302.13971, 2407.21783) and Mistral 7B (2310.06825).

They are read and not written: what this library trains has experts.
"""

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import DENSE, LLAMA_PARTS, dense, read_attention, read_model
from moe_jax.models import ModelConfig


def _read(hub: HubConfig) -> ModelConfig:
  blocks = ["attention:dense"] * hub.get("num_hidden_layers")
  biased = hub.get("attention_bias", False)
  return ModelConfig(
    **read_model(hub),
    segments=as_segments(blocks),
    attention=read_attention(
      hub, window=hub.get("sliding_window", None), qkv_bias=biased, out_bias=biased
    ),
    mlp=dense(hub, blocks, hub.get("intermediate_size")),
  )


def _family(architecture: str, model_type: str) -> Family:
  return Family(
    architecture=architecture,
    model_type=model_type,
    mixers=("attention",),
    read=_read,
    write=None,
    rules=(*LLAMA_PARTS, *DENSE),
  )


LLAMA = _family("LlamaForCausalLM", "llama")
MISTRAL = _family("MistralForCausalLM", "mistral")
