"""How far an encoder-decoder is from its original; see `measuring`."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parity.measuring import NEW_TOKENS, distance

from moe_jax.convert import load_pretrained, to_hub
from moe_jax.inference import generate
from moe_jax.moe.hugging_face_loss import hugging_face_load_balance_loss, switch_router_losses

STACKS = ("encoder", "decoder")
# The originals' training losses.
_BALANCE, _Z = "aux_loss", "z_loss"


class EncoderDecoderComparison:
  """A loaded checkpoint beside its original's inputs and results; as `measuring.Comparison`."""

  def __init__(self, checkpoint: Path, fixture: Path):
    self.model, self.config = load_pretrained(checkpoint)
    self.inputs, self.expected = (
      dict(np.load(fixture / f"{name}.npz")) for name in ("inputs", "expected")
    )
    self.tokens, self.decoder_tokens = (
      jnp.asarray(self.inputs[name], jnp.int32) for name in ("input_ids", "decoder_input_ids")
    )

  def forward(self) -> dict[str, float]:
    """Compares logits, router logits and router losses."""
    real = jnp.asarray(self.inputs["attention_mask_rp"], bool)
    padded = jnp.asarray(self.inputs["input_ids_rp"], jnp.int32)
    split = nnx.split(self.model)
    logits, routers = _forward(*split, self.tokens, self.decoder_tokens, jnp.ones_like(real))
    logits_rp, _ = _forward(*split, padded, self.decoder_tokens, real)
    found = {
      "logits": distance(logits, self.expected["logits"]),
      "logits_rp": distance(logits_rp, self.expected["logits_rp"]),
      "router_logits": max(
        distance(mine.reshape(-1, mine.shape[-1]), theirs.reshape(-1, mine.shape[-1]))
        for name, stack in self._by_stack(routers).items()
        for i, mine in enumerate(stack)
        for theirs in [self.expected[f"{name}_router_logits_{i}"]]
      ),
    }
    for stack, losses in self._losses(routers).items():
      for name, value in losses.items():
        if (theirs := self.expected.get(f"{stack}_{name}")) is not None:
          found[f"{stack}_{name}"] = distance(value, theirs) / abs(float(theirs))
    return found

  def cached(self) -> dict[str, float]:
    """Compares 16 greedy tokens with a cache."""
    tokens = np.asarray(generate(self.model, self.tokens, NEW_TOKENS))
    return {"generated": float(np.sum(tokens != self.expected["gen"]))}

  def uncached(self) -> dict[str, float]:
    """Compares 16 greedy tokens without a cache: each run has slots for its own tokens."""
    tokens = np.asarray(generate(self.model, self.tokens, NEW_TOKENS, use_cache=False))
    return {"generated_uncached": float(np.sum(tokens != self.expected["gen_nocache"]))}

  def gradients(self) -> dict[str, float]:
    """Compares the gradient of the original's training loss with respect to routers."""
    graph, params, rest = nnx.split(self.model, nnx.Param, ...)

    def loss(params):
      model = nnx.merge(graph, params, rest)
      logits, aux = model(self.tokens, self.decoder_tokens, return_aux=True)
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), self.decoder_tokens[..., None], axis=-1
      )
      return self._weighted(self._losses(aux.router_logits)) - jnp.mean(chosen)

    mine = to_hub(jax.jit(jax.grad(loss))(params), self.config)
    worst = max(
      distance(mine[name.removeprefix("grad:")], theirs)
      for name, theirs in self.expected.items()
      if name.startswith("grad:")
    )
    return {"router_gradients": worst}

  def _by_stack(self, routers) -> dict[str, list]:
    count = sum(kind == "moe" for _, kind in self.config.encoder_stack().layers())
    return dict(zip(STACKS, (routers[:count], routers[count:]), strict=True))

  def _losses(self, routers) -> dict[str, dict[str, jax.Array]]:
    """Returns the original's losses of both stacks, those that are part of its training loss."""
    top_k = self.config.moe.routing.top_k
    stacks = dict(zip(STACKS, (self.config.encoder_stack(), self.config), strict=True))
    found = {}
    for name, logits in self._by_stack(routers).items():
      if top_k > 1:
        found[name] = {_BALANCE: hugging_face_load_balance_loss(logits, top_k)}
      elif len(logits) < len(stacks[name].layers()):
        found[name] = dict(zip((_BALANCE, _Z), switch_router_losses(logits), strict=True))
    return found

  def _weighted(self, losses) -> jax.Array:
    routing = self.config.moe.routing
    most = max(len(each) for each in self._by_stack(self.config.moe_layers()).values())
    weights = {_BALANCE: routing.balance_loss_weight * most, _Z: routing.z_loss_weight * most}
    return sum(
      (weights[name] * value for stack in losses.values() for name, value in stack.items()),
      jnp.float32(0.0),
    )


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph, state, tokens, decoder_tokens, mask):
  """Returns logits and router logits."""
  model = nnx.merge(graph, state)
  mask = mask.astype(bool)
  logits, aux = model(tokens, decoder_tokens, token_mask=mask, return_aux=True)
  return logits, aux.router_logits
