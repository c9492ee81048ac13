"""The command `moe-jax convert`."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
from flax import nnx

from moe_jax.commands.source import check_source
from moe_jax.convert import load_pretrained, save_pretrained
from moe_jax.convert.families import family_of
from moe_jax.models import Model, ModelConfig
from moe_jax.new_folder import check_free
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import model_graph


def convert(args: SimpleNamespace) -> None:
  """Writes the model of a run, or of a checkpoint, as a checkpoint of the hub.

  Raises:
    UserError: not exactly one of --workdir and --checkpoint, a flag of the other one, or a model
      that cannot be read or written.
  """
  check_source("convert", args, of_run=("step",), of_checkpoint=("dtype",))
  # Large models take minutes to read.
  check_free(Path(args.out))
  if args.workdir is not None:
    model, config = _trained(Path(args.workdir), args.step)
  else:
    model, config = load_pretrained(args.checkpoint, dtype=args.dtype or "float32")
  save_pretrained(model, config, args.out, like=args.checkpoint)
  size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
  print(f"{family_of(config).architecture}, {size:,} numbers, in {args.out}")


def _trained(workdir: Path, step: int | None) -> tuple[Model, ModelConfig]:
  """Returns the model of a run, and its config as the originals have it outside training.

  That is dropless, and without layers of multi-token prediction, which the model still has.
  """
  experiment, _, state = load_run(workdir, step)
  config = experiment.model.dropless()
  if config != experiment.model:
    print("note: the run's router drops tokens when experts are full; the checkpoint's never does")
  if config.mtp_depth:
    print("note: the layers of multi-token prediction, which only training uses, are left out")
  return nnx.merge(model_graph(config), state), dataclasses.replace(config, mtp_depth=0)
