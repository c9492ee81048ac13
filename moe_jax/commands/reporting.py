"""The command `moe-jax report`."""

from types import SimpleNamespace

from moe_jax.analysis.report import write_report


def report(args: SimpleNamespace) -> None:
  """Writes report.html of a run, with other runs beside it if asked for."""
  print(write_report(args.workdir, compare=args.compare))
