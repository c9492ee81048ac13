"""The command `moe-jax generate`."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.inference.generate import generate as generate_tokens
from moe_jax.training.commands import load_run
from moe_jax.training.state import model_graph


def generate(args: SimpleNamespace) -> None:
  """Continues a prompt with the latest checkpoint of a run, dropless."""
  config, _, params = load_run(Path(args.workdir))
  tokenizer = get_tokenizer(config.data.tokenizer)
  model = nnx.merge(model_graph(config.model.dropless()), params)
  prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(args.prompt)])[None]
  tokens = generate_tokens(
    model, prompt, args.max_new_tokens, temperature=args.temperature, key=jax.random.key(args.seed)
  )
  print(args.prompt + tokenizer.decode(np.asarray(tokens)[0, prompt.shape[1] :]))
