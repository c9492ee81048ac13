"""Tiny encoder-decoders and what the transformers library computes with them; needs torch.

NLLB-MoE runs as its authors released it: transformers 5.23 makes one-hot vectors of what are such
vectors already, so that only experts 0 and 1 ever run.
"""

import copy

import numpy as np
import torch
import transformers
from transformers.models.nllb_moe import modeling_nllb_moe

ROWS, SOURCE, LENGTH, PADDING, NEW_TOKENS = 2, 24, 16, 7, 16
_WIDEST_GAP, _LEAST_MARGIN = 2e-5, 2e-4


def _switch(**changes):
  settings = dict(
    vocab_size=128,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=4,
    num_sparse_encoder_layers=2,
    num_decoder_layers=4,
    num_sparse_decoder_layers=2,
    num_heads=4,
    num_experts=4,
    expert_capacity=64,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    router_z_loss_coef=0.01,
    router_aux_loss_coef=0.02,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=None,
  )
  return transformers.SwitchTransformersConfig(**{**settings, **changes})


def _nllb(**changes):
  settings = dict(
    vocab_size=128,
    d_model=32,
    encoder_layers=4,
    decoder_layers=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
    num_experts=4,
    max_position_embeddings=64,
    moe_token_dropout=0.2,
    moe_eval_capacity_token_fraction=1.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=None,
    decoder_start_token_id=2,
  )
  return transformers.NllbMoeConfig(**{**settings, **changes})


CONFIGS = {
  "switch_nodrop": _switch,
  "switch_drop": lambda: _switch(expert_capacity=3),
  "switch_allsparse": lambda: _switch(
    num_sparse_encoder_layers=4,
    num_sparse_decoder_layers=4,
    num_experts=5,
    expert_capacity=2,
    d_ff=40,
  ),
  "switch_untied": lambda: _switch(
    tie_word_embeddings=False, num_experts=6, expert_capacity=4, router_bias=True
  ),
  "switch_gelu_uneven": lambda: _switch(
    dense_act_fn="gelu", num_sparse_encoder_layers=1, expert_capacity=5
  ),
  "nllb_moe_nodrop": _nllb,
  "nllb_moe_drop": lambda: _nllb(moe_eval_capacity_token_fraction=0.25),
  "nllb_moe_bpr": lambda: _nllb(
    moe_eval_capacity_token_fraction=0.25,
    batch_prioritized_routing=True,
    normalize_router_prob_before_dropping=True,
  ),
}


def repair_nllb() -> None:
  """Makes every expert with a combine weight run, as in fairseq and in transformers 4."""
  modeling_nllb_moe.NllbMoeExperts.forward = _every_expert


def _every_expert(self, hidden_states, router_mask, router_probs):
  del router_mask
  out = torch.zeros_like(hidden_states)
  for expert in range(self.num_experts):
    token = torch.where(router_probs[:, expert] != 0)[0]
    weight = router_probs[token, expert, None] * (1 - self.moe_token_dropout)
    out.index_add_(0, token, self[f"expert_{expert}"](hidden_states[token]) * weight)
  return out


def draw_inputs(config, seed: int) -> dict[str, np.ndarray]:
  """Returns tokens of encoder and decoder; 7 of the encoder's are masked at the end of row 1."""
  random = np.random.RandomState(seed)
  tokens = random.randint(3, 97, (ROWS, SOURCE))
  decoder_tokens = random.randint(3, 97, (ROWS, LENGTH))
  decoder_tokens[:, 0] = config.decoder_start_token_id
  mask = np.ones_like(tokens)
  mask[1, SOURCE - PADDING :] = 0
  return {
    "input_ids": tokens,
    "input_ids_rp": np.where(mask, tokens, config.pad_token_id),
    "attention_mask_rp": mask,
    "decoder_input_ids": decoder_tokens,
  }


def expected_of(model, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor] | None:
  """Returns the original's results, or None if rounding could change a decision in them."""
  given = {name: torch.tensor(value) for name, value in inputs.items()}
  tokens, decoder_tokens = given["input_ids"], given["decoder_input_ids"]
  exact_model = copy.deepcopy(model).double()
  call = dict(input_ids=tokens, decoder_input_ids=decoder_tokens, output_router_logits=True)
  output = model(**call, labels=decoder_tokens)
  output.loss.backward()
  with torch.no_grad():
    exact = exact_model(input_ids=tokens, decoder_input_ids=decoder_tokens).logits
    padded = model(
      input_ids=given["input_ids_rp"],
      attention_mask=given["attention_mask_rp"],
      decoder_input_ids=decoder_tokens,
    )
  uncached, margin = _greedy(model, tokens)
  gap = (exact - output.logits).abs().max() / max(1.0, output.logits.abs().max())
  if gap > _WIDEST_GAP or margin < _LEAST_MARGIN:
    return None
  cached = model.generate(
    tokens,
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
    num_beams=1,
    pad_token_id=model.config.pad_token_id,
  )
  found = {"logits": output.logits, "logits_rp": padded.logits}
  found |= {"gen": cached, "gen_nocache": uncached}
  for stack in ("encoder", "decoder"):
    routers = getattr(output, f"{stack}_router_logits")
    found |= {f"{stack}_router_logits_{i}": each for i, each in enumerate(routers)}
    for name in ("aux_loss", "z_loss"):
      if torch.is_tensor(value := getattr(output, f"{stack}_{name}", None)):
        found[f"{stack}_{name}"] = value
  return found


@torch.no_grad()
def _greedy(model, tokens):
  """Returns 16 tokens after the start token without a cache, and the least lead of a chosen one."""
  margin = float("inf")
  new = torch.full((len(tokens), 1), model.config.decoder_start_token_id)
  for _ in range(NEW_TOKENS):
    logits = model(input_ids=tokens, decoder_input_ids=new, use_cache=False).logits
    best = logits[:, -1].topk(2)
    margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
    new = torch.cat([new, best.indices[:, :1]], dim=1)
  return new, margin
