"""The commands `moe-jax eval` and `moe-jax trace`."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import jax
from flax import nnx

from moe_jax.analysis.counterfactual import counterfactual, part_of
from moe_jax.analysis.replay import check_replay, join_traces, replayed_loss
from moe_jax.analysis.routing_trace import RoutingTrace, check_place, record_routing
from moe_jax.data.builders import prepare
from moe_jax.data.loader import eval_batches
from moe_jax.errors import UserError
from moe_jax.models.run_batch import run_batch
from moe_jax.training.evaluate import EvalResult, Evaluator
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import model_graph


def evaluate(args: SimpleNamespace) -> None:
  """Evaluates a checkpoint on the held-out split, as trained and under other routers."""
  workdir = Path(args.workdir)
  config, step, model = load_run(workdir, args.step)
  # Refused before minutes of evaluation, not after them.
  arms = {arm: counterfactual(config.model, arm) for arm in args.arm}
  replayed = None if args.replay is None else RoutingTrace.load(Path(args.replay))
  if replayed is not None:
    check_replay(config.model, replayed)
  evaluator = Evaluator(config, prepare(config.data))
  print(f"{workdir} at step {step}, held-out:")
  dropless, at_capacity = evaluator.both(model)
  _show("dropless", dropless)
  if at_capacity is not None:
    _show("at the training capacity", at_capacity)
  for arm, changed in arms.items():
    _show(arm, evaluator.under(changed, part_of(changed, model)[1]))
  if replayed is not None:
    own, forced = replayed_loss(config.model, model, replayed)
    print(f"  on the {replayed.token_mask.sum():,} tokens of {args.replay}, nats per token:")
    print(f"    with the run's own experts   {own:.4f}")
    print(f"    with the recorded experts    {forced:.4f}")


def trace(args: SimpleNamespace) -> None:
  """Writes the experts that a checkpoint's routers ask for, dropless, to a .npz file."""
  if args.batches < 1:
    raise UserError(f"--batches={args.batches} is refused: it must be at least 1")
  # Refused before minutes of recording, not after them.
  check_place(Path(args.out))
  workdir = Path(args.workdir)
  config, step, model = load_run(workdir, args.step)
  if config.model.moe is None:
    raise UserError(f"{workdir} holds a model without experts: there is nothing to record")
  if config.model.encoder is not None:
    raise UserError(f"{workdir} holds an encoder-decoder; traces are of decoders alone")
  if config.data.image is not None:
    raise UserError(f"{workdir} reads images, which no trace holds; traces are of text alone")
  graph = model_graph(config.model.dropless())

  @jax.jit
  def plans_of(model, batch):
    return run_batch(nnx.merge(graph, model), batch)[1].plans

  traces = []
  batches = eval_batches(prepare(config.data).heldout, config.batch_size)
  for batch in itertools.islice(batches, args.batches):
    masks = {"token_mask": batch["segment_ids"] > 0, "segment_ids": batch["segment_ids"]}
    plans = plans_of(model, batch)
    traces.append(record_routing(plans, batch["tokens"], run=workdir.name, step=step, **masks))
  joined = join_traces(traces)
  joined.save(Path(args.out))
  print(f"{args.out}: {joined.token_mask.sum():,} tokens, {len(joined.layers)} layers, step {step}")


def _show(name: str, result: EvalResult) -> None:
  right = "" if result.accuracy is None else f", {100 * result.accuracy:.2f} % of images right"
  print(
    f"  {name}: {result.loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per"
    f" byte, {100 * result.dropped_fraction:.2f} % of assignments dropped{right}"
  )
