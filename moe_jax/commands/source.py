"""Where a command takes its model from: a run, or a checkpoint of the hub."""

from types import SimpleNamespace

from moe_jax.errors import UserError


def check_source(
  command: str,
  args: SimpleNamespace,
  *,
  of_run: tuple[str, ...] = (),
  of_checkpoint: tuple[str, ...] = (),
) -> None:
  """Checks that a command line names one model and no flag that this kind does not have.

  Args:
    command: the name, for the sentence.
    args: with `workdir` and `checkpoint`, None if absent.
    of_run, of_checkpoint: flags that only one kind has, None if absent.

  Raises:
    UserError: both kinds or neither, or a flag of the other kind.
  """
  if (args.workdir is None) == (args.checkpoint is None):
    given = "both were" if args.workdir is not None else "neither was"
    raise UserError(f"moe-jax {command} takes --workdir=DIR or --checkpoint=DIR; {given} given")
  kind, others = ("workdir", of_checkpoint) if args.checkpoint is None else ("checkpoint", of_run)
  other = "checkpoint" if kind == "workdir" else "workdir"
  for name in others:
    if getattr(args, name) is not None:
      raise UserError(
        f"--{name}={getattr(args, name)} goes with --{other}; with --{kind} leave it out"
      )
