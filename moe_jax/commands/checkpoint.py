"""The commands `moe-jax checkpoint ls`, `verify` and `diff`."""

import datetime
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from moe_jax.commands.tables import WIDTH, compact, plain_table
from moe_jax.errors import UserError
from moe_jax.training.checkpoint import DamagedCheckpoint
from moe_jax.training.manifest import Leaf, Manifest
from moe_jax.training.saved_arrays import Difference, compare_steps, verify_files, verify_step
from moe_jax.training.step_folders import checkpoints_of, find_step, saved_steps


def ls(args: SimpleNamespace) -> None:
  """Lists the checkpoints of a run, each read and compared with its manifest."""
  folder = checkpoints_of(Path(args.workdir))
  table = plain_table("step", "bytes", "saved (UTC)", "held-out loss", "files")
  for step in saved_steps(folder):
    try:
      table.add_row(str(step), *_told(verify_files(folder / str(step))), "sound")
    except DamagedCheckpoint as error:
      table.add_row(str(step), "", "", "", error.reason)
  # As wide as the reasons are: a table that is cut would hide them.
  Console(width=max(WIDTH, 300), highlight=False, color_system=None).print(table)


def verify(args: SimpleNamespace) -> None:
  """Reads all files and arrays of checkpoints and says which are as they were saved.

  Raises:
    UserError: one of them is not.
  """
  folder = checkpoints_of(Path(args.workdir))
  steps = saved_steps(folder) if args.step is None else [find_step(folder, args.step)]
  damaged = []
  for step in steps:
    try:
      manifest = verify_step(folder / str(step))
      print(f"step {step}: sound ({len(manifest.files)} files, {len(manifest.leaves)} arrays)")
    except DamagedCheckpoint as error:
      print(f"step {step}: damaged: {error.reason}")
      damaged.append(str(step))
  if damaged:
    raise UserError(
      f"{len(damaged)} of {len(steps)} checkpoints in {folder} are damaged (steps"
      f" {', '.join(damaged)}); training passes over them and goes on from the newest sound one"
    )


def diff(args: SimpleNamespace) -> None:
  """Compares the arrays of two checkpoints."""
  first, second = Path(args.workdir), Path(args.other or args.workdir)
  if args.other is None and args.other_step is None:
    raise UserError("moe-jax checkpoint diff needs a second run, or --other_step=INT of the same")
  a, b = _step_folder(first, args.step), _step_folder(second, args.other_step)
  differences, count = compare_steps(a, b)
  print(f"{a} and {b}: {count - len(differences)} of {count} arrays are equal")
  if not differences:
    return
  table = plain_table("array", "first", "second", "largest difference")
  for each in differences:
    table.add_row(each.name, _kind(each.first), _kind(each.second), _amount(each))
  Console(width=max(WIDTH, 300), highlight=False, color_system=None).print(table)


def _told(manifest: Manifest) -> tuple[str, str, str]:
  """Returns the cells of a sound step."""
  when = datetime.datetime.fromtimestamp(manifest.saved, datetime.UTC)
  loss = "" if manifest.metric is None else f"{manifest.metric:.4f}"
  return compact(manifest.size), f"{when:%Y-%m-%d %H:%M:%S}", loss


def _step_folder(workdir: Path, step: int | None) -> Path:
  folder = checkpoints_of(workdir)
  return folder / str(saved_steps(folder)[-1] if step is None else find_step(folder, step))


def _kind(leaf: Leaf | None) -> str:
  return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _amount(difference: Difference) -> str:
  if difference.largest is None:
    return ""
  # Equal numbers of another dtype, or zeros of another sign.
  return f"{difference.largest:.3g}" if difference.largest else "0, other bits"
