"""The command `moe-jax watch`."""

import time
from pathlib import Path
from types import SimpleNamespace

import rich.console
import rich.live

from moe_jax.commands.watch_picture import picture, read_snapshot
from moe_jax.errors import UserError


def watch(args: SimpleNamespace) -> None:
  """Shows a run until it is finished, or once; a run that is not running is shown too.

  Raises:
    UserError: the folder holds no run, or `every` is no time.
  """
  workdir = Path(args.workdir)
  if not 0.1 <= args.every <= 3600:
    raise UserError(f"--every={args.every} is refused: it must be from 0.1 to 3600 seconds")
  console = rich.console.Console()
  snapshot = read_snapshot(workdir)
  if args.once or not console.is_terminal:
    console.print(picture(snapshot))
    return
  with rich.live.Live(picture(snapshot), console=console, auto_refresh=False) as live:
    while snapshot.status != "finished":
      time.sleep(args.every)
      snapshot = read_snapshot(workdir)
      live.update(picture(snapshot), refresh=True)
