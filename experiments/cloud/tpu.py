"""Runs on TPU slices of Google Cloud, from request to result.

`python -m experiments.cloud.tpu VERB --name=... -- WORDS OF MOE-JAX TRAIN`, see the README beside.
"""

import argparse
import enum
import math
import sys
import tomllib
from pathlib import Path

from experiments.cloud import cost
from experiments.cloud.commands import Shell
from experiments.cloud.flags import FlagParser, before_and_after
from experiments.cloud.gcloud import Slices
from experiments.cloud.lifecycle import Patience, RunFailed, bring_up, run, say, take_down
from experiments.cloud.request import Install, Provisioning, Request, Through
from experiments.cloud.slices import parse_slice
from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError

_VERBS = {
  "estimate": "what it would cost",
  "create": "ask for the slices and wait for them",
  "run": "create, install, train, and again after every preemption",
  "resume": "the same as run, which goes on wherever the run stands",
  "watch": "the state of the slices and what the run says",
  "fetch": "bring logs and metrics here",
  "stop": "make the run save and end; its slices stay",
  "delete": "delete the slices",
}
_TRAINS = ("run", "resume")


def main(words: list[str] | None = None) -> int:
  """Runs one verb; returns 0, 1 for a run that failed, or 2 for a fault of the user's."""
  try:
    return _run(_parse(sys.argv[1:] if words is None else words))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except RunFailed as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("the run goes on without this launcher; run again to see it, stop ends it")
    return 130


def _run(args: argparse.Namespace) -> int:
  request, patience = _request(args), Patience(args.pause, args.tries, args.restarts)
  slices = Slices(request, Shell(args.dry_run))
  if args.verb == "estimate":
    print(cost.describe(cost.estimate(request), args.hours))
  elif args.verb == "create":
    _tell_cost(request, args.hours)
    bring_up(slices, patience)
  elif args.verb in _TRAINS:
    _tell_cost(request, args.hours)
    run(slices, patience)
    _end(slices, args.then, patience)
  elif args.verb == "watch":
    say(f"{request.name}: {slices.state()[1]}")
    return slices.on_first("log", request.name)
  elif args.verb == "fetch":
    slices.fetch(Path(args.to or f"runs/{request.name}"))
  elif args.verb == "stop":
    return slices.on_all("stop", request.name)
  else:
    take_down(slices, patience)
  return 0


def _end(slices: Slices, then: str, patience: Patience) -> None:
  if then == "delete":
    take_down(slices, patience)
  else:
    say(f"{slices.request.name} is done; its slices go on costing until you delete them")


def _tell_cost(request: Request, hours: float | None) -> None:
  """Says the estimate; without a price the run is the user's choice all the same."""
  try:
    say(cost.describe(cost.estimate(request), hours))
  except UserError as error:
    say(f"no estimate: {error}")


def _parse(words: list[str]) -> argparse.Namespace:
  """Reads the command line; a file of settings comes first, so that flags win."""
  words, train = before_and_after(words)
  parser = _parser()
  settings = parser.parse_known_args(words)[0].settings
  args = parser.parse_args(words[:1] + _from_file(settings, parser) + words[1:])
  args.words = tuple(train)
  return args


def _parser() -> FlagParser:
  parser = FlagParser("experiments.cloud.tpu", _VERBS)
  add = parser.add_argument
  add("--settings", metavar="FILE", help="TOML file of any of these flags")
  add("--name", default="", help="of the slices and of the run")
  add("--project", default="", help="id of the Google Cloud project")
  add("--zone", default="", help="where the slices are")
  add("--accelerator", default="", help="such as v5p-128 or v5p:4x4x4")
  add("--topology", help="such as 4x4x4, checked against --accelerator")
  add("--slices", type=int, default=1, help="how many equal ones")
  _add_choice(parser, "provisioning", Provisioning.SPOT)
  _add_choice(parser, "through", Through.QUEUED_RESOURCE)
  add("--runtime", default="", help="software version of the TPU VM")
  _add_choice(parser, "install", Install.COMMIT)
  add("--workdir", default="", help="run folder on the hosts")
  add("--share", default="none", help="NFS HOST:/EXPORT that holds it, or ready, or none")
  add("--bucket", help="gs:// folder for a copy of run folder and logs")
  add("--price", type=float, help="US dollars per chip-hour")
  add("--hours", type=float, help="to estimate for")
  add("--pause", type=float, default=60.0, help="seconds between two looks")
  add("--tries", type=int, default=10, help="to get slices")
  add("--restarts", type=int, default=100, help="of the training")
  add("--then", choices=("keep", "delete"), default="keep", help="with the slices of a done run")
  add("--to", metavar="FOLDER", help="for fetch")
  add("--dry-run", action="store_true", help="print the commands only")
  return parser


def _add_choice(parser: argparse.ArgumentParser, name: str, default: enum.Enum) -> None:
  values = [each.value for each in type(default)]
  parser.add_argument(f"--{name}", choices=values, default=default.value)


def _from_file(path: str | None, parser: argparse.ArgumentParser) -> list[str]:
  """Returns the flags of a file of settings."""
  if path is None:
    return []
  try:
    settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
  # A ValueError: no TOML, or not even text.
  except (OSError, ValueError) as error:
    raise UserError(f"--settings={path} cannot be read as TOML: {error}") from error
  flags = {word[2:] for action in parser._actions for word in action.option_strings}
  flags -= {"settings", "dry-run", "help"}
  for name in settings:
    if name not in flags:
      raise UserError(
        f"--settings={path}: {name!r} is no flag that a file may hold; {did_you_mean(name, flags)}"
      )
  return [f"--{name}={value}" for name, value in settings.items()]


def _request(args: argparse.Namespace) -> Request:
  if not args.accelerator:
    raise UserError("--accelerator is missing: give the slice, for example v5p-128")
  if args.hours is not None and not 0 <= args.hours < math.inf:
    raise UserError(f"--hours={args.hours} is refused: expected a number, at least 0")
  if args.verb == "fetch" and not (args.workdir or args.bucket):
    raise UserError(
      "fetch needs --bucket=gs://BUCKET/FOLDER, or --workdir=FOLDER of the first host"
    )
  if args.verb in _TRAINS and not (args.workdir and args.words):
    raise UserError(
      f"{args.verb} needs --workdir=FOLDER and, after --, the words of moe-jax train, for example"
      " -- --config=configs/mixtral.py:8x7b"
    )
  return Request(
    name=args.name,
    project=args.project,
    zone=args.zone,
    piece=parse_slice(args.accelerator, args.topology),
    num_slices=args.slices,
    provisioning=Provisioning(args.provisioning),
    through=Through(args.through),
    runtime=args.runtime,
    install=Install(args.install),
    workdir=args.workdir,
    share=args.share,
    bucket=args.bucket,
    words=args.words,
    price=args.price,
  )


if __name__ == "__main__":
  sys.exit(main())
