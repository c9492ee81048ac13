"""How far a model is from its original: the largest differences from what the original gave.

`python tests/parity/measuring.py FOLDER ...` prints them for folders that hold a checkpoint together
with `inputs.npz` and `expected.npz`, as `make_fixtures.py --weights` writes them.
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


def measure(checkpoint: Path, fixture: Path) -> dict[str, float]:
  """Returns the largest differences between a checkpoint here and its original's results.

  Absolute, but relative for `aux_loss` and `aux_loss_rp`; `generated` and `generated_uncached`
  count the tokens that differ. "_rp" is the run with right padding, where only real tokens count.

  Args:
    checkpoint: folder with `config.json` and weights.
    fixture: folder with `inputs.npz` and `expected.npz`.
  """
  model, config = load_pretrained(checkpoint)
  inputs, expected = (dict(np.load(fixture / f"{name}.npz")) for name in ("inputs", "expected"))
  return {
    **_unpadded(model, config, inputs, expected),
    **_padded(model, config, inputs, expected),
    **_generated(model, expected),
  }


def _unpadded(model, config: ModelConfig, inputs, expected) -> dict[str, float]:
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  tokens = jnp.asarray(inputs["input_ids"], jnp.int32)
  weight = _hub_weight(config, expected)
  gradient, (logits, router_logits, aux) = _with_gradient(graph, params, rest, tokens, weight)
  found = {"logits": _distance(logits, expected["logits"])}
  for i, mine in enumerate(router_logits):
    theirs = expected[f"router_logits_{i}"]
    found["router_logits"] = max(
      found.get("router_logits", 0.0), _distance(mine.reshape(theirs.shape), theirs)
    )
  if "aux_loss" in expected:
    mine = aux.weighted_loss if weight is None else _pooled(config, router_logits)
    found["aux_loss"] = _relative(mine, expected["aux_loss"])
  return found | {"router_gradients": _gradient_distance(to_hub(gradient, config), expected)}


def _padded(model, config: ModelConfig, inputs, expected) -> dict[str, float]:
  real = inputs["attention_mask_rp"].astype(bool)
  logits, aux = _forward(*nnx.split(model), *_padded_to_longest(inputs["input_ids_rp"], real))
  logits = logits[:, : real.shape[1]]
  found = {"logits_rp": _distance(logits[real], expected["logits_rp"][real])}
  if "aux_loss_rp" in expected and _hub_weight(config, expected) is not None:
    router_logits = [each[:, : real.shape[1]] for each in aux.router_logits]
    mine = _pooled(config, router_logits, jnp.asarray(real))
    found["aux_loss_rp"] = _relative(mine, expected["aux_loss_rp"])
  return found


def _generated(model, expected) -> dict[str, float]:
  prompt = jnp.asarray(expected["gen_prompt"], jnp.int32)
  length = prompt.shape[1]
  cached = np.asarray(generate(model, prompt, NEW_TOKENS))[:, length:]
  # Greedy tokens are those that the whole sequence, read at once, predicts at every place.
  theirs = expected["gen_nocache"]
  whole = np.concatenate([prompt, theirs], axis=1)
  logits, _ = _forward(*nnx.split(model), *_padded_to_longest(whole, np.ones(whole.shape, bool)))
  uncached = np.argmax(logits, axis=-1)[:, length - 1 : -1]
  return {
    "generated": float(np.sum(cached != expected["gen"])),
    "generated_uncached": float(np.sum(uncached != theirs)),
  }


def _padded_to_longest(tokens, real):
  """Pads to one length, so that one compiled program serves all runs."""
  width = ((0, 0), (0, 26 - tokens.shape[1]))
  return jnp.asarray(np.pad(tokens, width), jnp.int32), jnp.asarray(np.pad(real, width))


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph, state, tokens, mask):
  return nnx.merge(graph, state)(tokens, token_mask=mask, return_aux=True)


@functools.partial(jax.jit, static_argnames=("graph", "weight"))
def _with_gradient(graph, params, rest, tokens, weight):
  """Returns the gradient of the hub's training loss, and logits, router logits and aux."""

  def loss(params):
    model = nnx.merge(graph, params, rest)
    logits, aux = model(tokens, return_aux=True)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    pooled = aux.weighted_loss
    if weight is not None:
      top_k = model.config.moe.routing.top_k
      pooled = weight * hugging_face_load_balance_loss(aux.router_logits, top_k)
    return pooled - jnp.mean(likelihood), (logits, aux.router_logits, aux)

  return jax.grad(loss, has_aux=True)(params)


def _hub_weight(config: ModelConfig, expected) -> float | None:
  """Returns the coefficient of the pooled loss, 0 without one, None for the summed one."""
  if "aux_loss" not in expected:
    return 0.0
  if config.moe.routing.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN:
    return None  # DeepSeekMoE's own
  return config.moe.routing.balance_loss_weight * len(config.moe_layers())


def _pooled(config: ModelConfig, router_logits, mask=None):
  top_k = config.moe.routing.top_k
  return hugging_face_load_balance_loss(router_logits, top_k, token_mask=mask)


def _distance(mine, theirs) -> float:
  # NaN is no distance: it must not pass for one.
  return float(np.nan_to_num(np.max(np.abs(np.asarray(mine) - theirs)), nan=np.inf))


def _relative(mine, theirs) -> float:
  return _distance(mine, theirs) / float(np.abs(theirs))


def _gradient_distance(mine: dict[str, np.ndarray], expected) -> float:
  """Returns the largest distance of a router's gradient, tensor by tensor.

  The original's module may have another name than the tensor in its checkpoint: both have the
  number of the layer and the shape.
  """
  worst = 0.0
  for name, theirs in expected.items():
    if name.startswith("grad:"):
      layer = re.search(r"\.\d+\.", name).group()
      (key,) = [
        key
        for key, value in mine.items()
        if layer in key
        and value.shape == theirs.shape
        and re.search(r"(gate|router|router\.layer)\.(weight|bias)$", key)
        and key.rpartition(".")[2] == name.rpartition(".")[2]
      ]
      worst = max(worst, _distance(mine[key], theirs))
  return worst


def main(folders: list[str]) -> None:
  """Prints the differences of every folder."""
  for folder in map(Path, folders):
    found = measure(folder, folder)
    print(folder.name, " ".join(f"{name}={value:.2g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  main(sys.argv[1:])
