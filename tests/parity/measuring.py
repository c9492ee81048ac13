"""How far a model is from its original: the largest differences from what the original gave.

`python tests/parity/measuring.py FOLDER ...` prints them for folders that hold a checkpoint beside
`inputs.npz` and `expected.npz`, as `make_fixtures.py` writes them, and the worst ones last.
"""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.convert import load_pretrained, to_hub
from moe_jax.inference import generate
from moe_jax.models import ModelConfig
from moe_jax.moe.hugging_face_loss import hugging_face_load_balance_loss
from moe_jax.moe.options import BalanceFraction

NEW_TOKENS = 16
# Prompt and new tokens: all forward runs are padded to it, so that one compiled program does them.
_LONGEST = 26


class Comparison:
  """A loaded checkpoint beside its original's inputs and results.

  Every method returns largest differences by name: absolute, but relative for balance losses.
  "_rp" is a run with right padding, where real tokens count; `generated` and `generated_uncached`
  count the greedy tokens that differ.
  """

  def __init__(self, checkpoint: Path, fixture: Path):
    self.model, self.config = load_pretrained(checkpoint)
    self.inputs, self.expected = (
      dict(np.load(fixture / f"{name}.npz")) for name in ("inputs", "expected")
    )
    self.tokens = self.inputs["input_ids"]
    images = [name for name in ("pixel_values",) if name in self.inputs]
    self.images = {name: jnp.asarray(self.inputs[name]) for name in images}

  def forward(self) -> dict[str, float]:
    """Compares logits, router logits, balance losses and the tokens that follow without a cache."""
    logits, router_logits, losses = self._run(self.tokens)
    real = self.inputs["attention_mask_rp"].astype(bool)
    logits_rp, _, losses_rp = self._run(self.inputs["input_ids_rp"], real)
    found = {
      "logits": distance(logits, self.expected["logits"]),
      "logits_rp": distance(logits_rp[real], self.expected["logits_rp"][real]),
      "router_logits": max(
        distance(mine.reshape(-1, mine.shape[-1]), self.expected[f"router_logits_{i}"])
        for i, mine in enumerate(router_logits)
      ),
    }
    for name, (pooled, summed) in (("aux_loss", losses), ("aux_loss_rp", losses_rp)):
      if name in self.expected and not (self.sums_losses and name == "aux_loss_rp"):
        theirs = self.expected[name]
        found[name] = distance(summed if self.sums_losses else pooled, theirs) / abs(theirs)
    return {name: float(value) for name, value in found.items()} | self._uncached()

  def _uncached(self) -> dict[str, float]:
    # Greedy tokens are those that the whole sequence, read at once, predicts at every place.
    prompt, theirs = self.expected["gen_prompt"], self.expected["gen_nocache"]
    logits, _, _ = self._run(np.concatenate([prompt, theirs], axis=1))
    mine = np.argmax(logits, axis=-1)[:, prompt.shape[1] - 1 : -1]
    return {"generated_uncached": float(np.sum(mine != theirs))}

  def cached(self) -> dict[str, float]:
    """Compares 16 greedy tokens with a cache."""
    prompt = jnp.asarray(self.expected["gen_prompt"], jnp.int32)
    tokens = np.asarray(generate(self.model, prompt, NEW_TOKENS, **self.images))[
      :, prompt.shape[1] :
    ]
    return {"generated": float(np.sum(tokens != self.expected["gen"]))}

  def gradients(self) -> dict[str, float]:
    """Compares the gradient of the original's training loss with respect to routers and images."""
    graph, params, rest = nnx.split(self.model, nnx.Param, ...)
    tokens = jnp.asarray(self.tokens, jnp.int32)
    gradient = _loss_gradient(graph, params, rest, tokens, self.images, self._hub_weight())
    mine = to_hub(gradient, self.config)
    worst = max(
      distance(mine[_key_of(name, theirs, mine)], theirs)
      for name, theirs in self.expected.items()
      if name.startswith("grad:")
    )
    return {"router_gradients": worst}

  @property
  def sums_losses(self) -> bool:
    """Whether the balance loss is a sum over layers, coefficient included (DeepSeekMoE)."""
    fraction = self.config.moe.routing.balance_fraction
    return fraction == BalanceFraction.ALL_CHOICES_MEAN

  def _hub_weight(self) -> float | None:
    """Returns the coefficient of the pooled loss, 0 without one, None for the summed one."""
    if "aux_loss" not in self.expected:
      return 0.0
    if self.sums_losses:
      return None
    return self.config.moe.routing.balance_loss_weight * len(self.config.moe_layers())

  def _run(self, tokens, real=None):
    length = tokens.shape[1]
    real = np.ones(tokens.shape, bool) if real is None else real
    width = ((0, 0), (0, _LONGEST - length))
    tokens, mask = jnp.asarray(np.pad(tokens, width), jnp.int32), jnp.asarray(np.pad(real, width))
    found = _forward(*nnx.split(self.model), tokens, mask, self.images)
    logits, router_logits, losses = jax.device_get(found)
    return logits[:, :length], [each[:, :length] for each in router_logits], losses


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph, state, tokens, mask, images):
  """Returns logits, router logits, and the balance loss pooled and summed over layers."""
  model = nnx.merge(graph, state)
  logits, aux = model(tokens, token_mask=mask, return_aux=True, **images)
  pooled = _pooled(model.config, aux, mask)
  return logits, aux.router_logits, (pooled, aux.weighted_loss)


@functools.partial(jax.jit, static_argnames=("graph", "weight"))
def _loss_gradient(graph, params, rest, tokens, images, weight):
  def loss(params):
    model = nnx.merge(graph, params, rest)
    logits, aux = model(tokens, return_aux=True, **images)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    balance = aux.weighted_loss
    if weight is not None:
      balance = weight * _pooled(model.config, aux, None)
    return balance - jnp.mean(likelihood)

  return jax.grad(loss)(params)


def _pooled(config: ModelConfig, aux, mask):
  top_k = config.moe.routing.top_k
  return hugging_face_load_balance_loss(aux.router_logits, top_k, token_mask=mask)


def distance(mine, theirs) -> float:
  """Returns the largest absolute difference."""
  # NaN is no distance: it must not pass for one.
  return float(np.nan_to_num(np.max(np.abs(mine - theirs)), nan=np.inf))


def _key_of(name: str, theirs, mine: dict[str, np.ndarray]) -> str:
  """Returns the key of the tensor whose gradient the original calls `name`.

  A router's module in the original may have another name than the tensor in its checkpoint: both
  have the number of the layer, the shape, and the last word.
  """
  if (key := name.removeprefix("grad:")) in mine:
    return key
  layer, kind = re.search(r"\.\d+\.", name).group(), name.rpartition(".")[2]
  router = re.compile(r"(gate|router|router\.layer)\." + kind)
  (key,) = [
    key
    for key, value in mine.items()
    if layer in key and value.shape == theirs.shape and router.search(key)
  ]
  return key


def compare(checkpoint: Path, fixture: Path):
  """Returns the comparison of a checkpoint with its original's results."""
  # That module needs parts of this one.
  from parity.encoder_decoder_measuring import EncoderDecoderComparison

  with np.load(fixture / "inputs.npz") as inputs:
    pairs = "decoder_input_ids" in inputs
  return (EncoderDecoderComparison if pairs else Comparison)(checkpoint, fixture)


def main(folders: list[str]) -> None:
  """Prints the differences of every folder, and the worst of all."""
  worst: dict[str, float] = {}
  for folder in map(Path, folders):
    comparison = compare(folder, folder)
    found = comparison.forward() | comparison.cached() | comparison.gradients()
    found |= comparison.uncached() if hasattr(comparison, "uncached") else {}
    worst |= {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    print(folder.name, _line(found), flush=True)
  print("worst", _line(worst))


def _line(found: dict[str, float]) -> str:
  return " ".join(f"{name}={value:.2g}" for name, value in found.items())


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  main(sys.argv[1:])
