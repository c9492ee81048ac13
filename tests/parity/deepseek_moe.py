"""DeepSeekMoE 16B in PyTorch, after the code released with its checkpoint (arXiv 2401.06066).

The transformers library has no such class: it is LLaMA with other feed-forwards.
"""

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP


class Gate(nn.Module):
  """Softmax over all experts, K largest, renormalised if asked for; and the balance loss."""

  def __init__(self, config):
    super().__init__()
    self.config = config
    self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

  def forward(self, x):
    """Maps x (B, L, D) to logits (N, E), weights and experts (N, K), and the loss."""
    B, L, D = x.shape
    E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
    logits = F.linear(x.reshape(-1, D), self.weight)
    scores = logits.softmax(-1)
    weights, experts = scores.topk(K, dim=-1)
    if K > 1 and self.config.norm_topk_prob:
      weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    chosen = F.one_hot(experts, E).to(scores.dtype).sum(1)
    rows = (B, L, E) if self.config.seq_aux else (1, B * L, E)
    load = chosen.view(rows).mean(1) * E / K
    loss = (load * scores.view(rows).mean(1)).sum(1).mean() * self.config.aux_loss_alpha
    return logits, weights, experts, loss


class DeepseekMoE(nn.Module):
  """Routed experts and one network of all shared ones."""

  def __init__(self, config):
    super().__init__()
    self.gate = Gate(config)
    self.experts = nn.ModuleList(
      _network(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
    )
    width = config.moe_intermediate_size * config.n_shared_experts
    self.shared_experts = _network(config, width) if width else None

  def forward(self, x):
    """Maps x (B, L, D) to (B, L, D) and keeps logits and loss in `record`."""
    logits, weights, experts, loss = self.gate(x)
    self.record = (logits, loss)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(rows)
    for i, expert in enumerate(self.experts):
      token, choice = torch.where(experts == i)
      y = y.index_add(0, token, expert(rows[token]) * weights[token, choice, None])
    y = y.view_as(x)
    return y if self.shared_experts is None else y + self.shared_experts(x)


def _network(config, width):
  """Returns LLaMA's feed-forward of another width."""
  settings = {**config.to_dict(), "intermediate_size": width}
  return LlamaMLP(transformers.LlamaConfig(**settings))


class DeepseekForCausalLM(transformers.LlamaForCausalLM):
  """LLaMA whose layers have experts from `first_k_dense_replace` on."""

  def __init__(self, config):
    super().__init__(config)
    for i, layer in enumerate(self.model.layers):
      if i >= config.first_k_dense_replace and i % config.moe_layer_freq == 0:
        layer.mlp = DeepseekMoE(config)

  def forward(self, *args, output_router_logits=False, **kwargs):
    """Returns what LLaMA does; router logits and the balance loss beside it, and in the loss."""
    output = super().forward(*args, **kwargs)
    layers = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, DeepseekMoE)]
    if output_router_logits:
      output["router_logits"] = tuple(layer.record[0] for layer in layers)
      output["aux_loss"] = sum(layer.record[1] for layer in layers)
      if output.loss is not None:
        output["loss"] = output.loss + output["aux_loss"]
    return output
