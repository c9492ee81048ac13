"""The command `moe-jax generate`."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.commands.source import check_source
from moe_jax.convert import load_pretrained
from moe_jax.convert.hub_tokenizer import HubTokenizer
from moe_jax.data.images import ImageConfig, fit_image, pixel_values, read_image
from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.sampling import check_sampling
from moe_jax.inference.text import continue_text, continue_tokens
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import model_graph


def generate(args: SimpleNamespace) -> None:
  """Continues a prompt with the latest checkpoint of a run, or with one of the hub, dropless.

  Raises:
    UserError: not exactly one of --workdir and --checkpoint, a flag of the other one, or one that
      cannot be read.
  """
  check_source("generate", args, of_checkpoint=("dtype",), of_run=("image",))
  # Large models take minutes to read.
  check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
  sampling = dict(
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    key=jax.random.key(args.seed),
  )
  write = _continue_run if args.checkpoint is None else _continue_checkpoint
  print(args.prompt + write(args, sampling))


def _continue_run(args: SimpleNamespace, sampling: dict[str, Any]) -> str:
  config, _, params = load_run(Path(args.workdir))
  dropless = config.model.dropless()
  if dropless != config.model:
    print("note: trained with drops when experts are full, continued without", file=sys.stderr)
  model = nnx.merge(model_graph(dropless), params)
  tokenizer = get_tokenizer(config.data.tokenizer)
  return continue_text(
    model,
    tokenizer,
    args.prompt,
    args.max_new_tokens,
    question=config.question,
    image=None if args.image is None else _shown(args, config.data.image),
    **sampling,
  )


def _shown(args: SimpleNamespace, config: ImageConfig | None) -> np.ndarray:
  if config is None:
    raise UserError(f"{args.workdir} was trained on text alone; leave out --image")
  return pixel_values(fit_image(read_image(Path(args.image)), config))


def _continue_checkpoint(args: SimpleNamespace, sampling: dict[str, Any]) -> str:
  tokenizer = HubTokenizer(args.checkpoint)
  prompt = tokenizer.encode(args.prompt)
  model, _ = load_pretrained(args.checkpoint, dtype=args.dtype or "float32")
  new = continue_tokens(model, prompt, args.max_new_tokens, tokenizer.stop_ids, **sampling)
  return tokenizer.decode_after(prompt, new)
