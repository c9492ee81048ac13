"""The command `moe-jax generate`."""

from pathlib import Path
from types import SimpleNamespace

import jax
from flax import nnx

from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.inference.text import continue_text
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import model_graph


def generate(args: SimpleNamespace) -> None:
  """Continues a prompt with the latest checkpoint of a run, dropless."""
  config, _, params = load_run(Path(args.workdir))
  text = continue_text(
    nnx.merge(model_graph(config.model.dropless()), params),
    get_tokenizer(config.data.tokenizer),
    args.prompt,
    args.max_new_tokens,
    temperature=args.temperature,
    key=jax.random.key(args.seed),
  )
  print(args.prompt + text)
