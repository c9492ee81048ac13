"""The command `moe-jax plan`."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.commands.tables import WIDTH, compact, plain_table
from moe_jax.config import dataclass_from, section
from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError
from moe_jax.planning.plan import Plan, plan_model
from moe_jax.training.config import ExperimentConfig, model_from


@dataclasses.dataclass(frozen=True)
class _Call:
  """What a plan takes of a config beside the model."""

  batch_size: int = ExperimentConfig.batch_size
  accumulation_steps: int = ExperimentConfig.accumulation_steps
  sequence_length: int = DataConfig.sequence_length

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise UserError(
          f"{field.name} = {getattr(self, field.name)} is refused: it must be at least 1"
        )


def plan(args: SimpleNamespace) -> None:
  """Prints what the model of a config costs, as a table or as JSON; on a pod with `--topology`."""
  _check_pod_flags(args)
  if args.topology is not None:
    # Imported late: compiling for TPUs needs what counting does not.
    from moe_jax.commands.pod_planning import plan_on_pod, search_on_pod

    (search_on_pod if args.search else plan_on_pod)(args)
    return
  mapping = args.config.to_dict()
  call = _call_of(mapping)
  result = plan_model(
    model_from(mapping),
    # A microbatch is what the model is called with.
    batch_size=max(1, call.batch_size // call.accumulation_steps),
    sequence_length=call.sequence_length,
  )
  if args.json:
    print(json.dumps({"config": args.config_source} | dataclasses.asdict(result), indent=2))
    return
  console = Console(width=WIDTH, highlight=False, color_system=None)
  console.print(f"{args.config_source}")
  console.print(_parts(result))
  console.print(_costs(result))


def _check_pod_flags(args: SimpleNamespace) -> None:
  """Refuses flags that only a topology gives a meaning."""
  if args.batch is not None and args.batch < 1:
    raise UserError(f"--batch={args.batch} is refused: it must be at least 1")
  if args.topology is not None:
    if args.search and args.layout is not None:
      raise UserError(
        f"--layout={args.layout} is refused with --search, which tries layouts itself: leave one of"
        " them out"
      )
    return
  given = {name: getattr(args, name) for name in ("search", "layout", "batch", "dispatch")}
  for name, value in {**given, "slices": args.slices != 1}.items():
    if value:
      raise UserError(f"--{name} plans a pod: give --topology too, for example v5p:4x4x4")


def _call_of(mapping: dict[str, Any]) -> _Call:
  given = section(mapping, "config") | section(mapping.get("data", {}), "config.data")
  names = [field.name for field in dataclasses.fields(_Call)]
  return dataclass_from(_Call, {name: given[name] for name in names if name in given})


def _parts(plan: Plan) -> Table:
  """Returns parameters and FLOPs of the forward pass by component."""
  table = plain_table("parameters", "total", "active", "FLOPs a token")
  flops = dict(plan.flops_per_token_forward_by_component)
  for name, part in plan.components.items():
    total, active = part["total_parameters"], part["active_parameters"]
    table.add_row(_words(name), f"{total:,}", f"{active:,}", compact(flops.pop(name, 0.0)))
  for name, value in flops.items():
    table.add_row(_words(name), "", "", compact(value))
  table.add_section()
  table.add_row(
    "all",
    f"{plan.total_parameters:,}",
    f"{plan.active_parameters:,}",
    compact(plan.flops_per_token_forward),
  )
  without = plan.active_parameters_without_input_embedding
  table.add_row("without input embedding", "", f"{without:,}", "")
  if plan.multi_token_prediction_parameters:
    further = plan.multi_token_prediction_parameters
    table.add_row("apart: multi-token part", f"{further:,}", "", "")
  if plan.selection_biases:
    table.add_row("apart: selection biases", f"{plan.selection_biases:,}", "", "")
  return table


def _costs(plan: Plan) -> Table:
  """Returns FLOPs and bytes of the whole model."""
  L, B = plan.sequence_length, plan.batch_size
  table = plain_table("cost", "", "")
  rows = [
    ("forward FLOPs a token", compact(plan.flops_per_token_forward), f"{L:,} tokens a sequence"),
    ("training FLOPs a token", compact(plan.flops_per_token_training), "forward and backward"),
    ("cache bytes a token", f"{plan.cache_bytes_per_token:,}", "in the dtype of activations"),
    ("weight bytes", compact(plan.weight_bytes), "float32"),
    ("gradient bytes", compact(plan.gradient_bytes), "float32"),
    ("optimizer bytes", compact(plan.optimizer_bytes), "AdamW, float32"),
  ]
  further = plan.multi_token_prediction_flops_per_token_training
  if further:
    rows.insert(2, ("multi-token FLOPs", compact(further), "in training, on top"))
  if plan.encoded_cache_bytes_per_token:
    read = f"{plan.encoded_cache_bytes_per_token:,}"
    rows.insert(-3, ("cache bytes a token read", read, "of the encoder's output"))
  if plan.cache_bytes_per_sequence:
    kept = f"{plan.cache_bytes_per_sequence:,}"
    rows.insert(-3, ("cache bytes a sequence", kept, "states, whatever its length"))
  tower = plan.vision_flops_per_image_token_forward
  if tower:
    rows.insert(1, ("vision FLOPs an image token", compact(tower), "forward, on top"))
  if plan.dispatch_form is not None:
    form = f"dispatch = {plan.dispatch_form}, batch of {B}"
    before = [row[0] for row in rows].index("cache bytes a token")
    extra = plan.dispatch_flops_per_token_forward + plan.empty_slot_flops_per_token_forward
    rows.insert(before, ("rows experts compute a token", f"{plan.slots_per_token:.4g}", form))
    rows.insert(before + 1, ("FLOPs of moves, empty slots", compact(extra), "forward, on top"))
  for row in rows:
    table.add_row(*row)
  table.columns[2].justify = "left"
  return table


def _words(name: str) -> str:
  return name.replace("_", " ")
