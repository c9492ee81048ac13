"""A run folder that begins with a state made elsewhere, for `moe-jax train` to go on from."""

import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config import to_mapping
from moe_jax.new_folder import check_free, draft_of
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.run_folder import CONFIG_FILE, METRICS_FILE, write_json
from moe_jax.training.state import TrainState
from moe_jax.training.template import full_config

CONFIG_SOURCE = "config.py"
_CONFIG_TEXT = '''"""{title}"""

from moe_jax.training.template import full_config

FIELDS = {fields}


def get_config():
  """Returns the config of the run."""
  return full_config(FIELDS)
'''


def config_fields(config: ExperimentConfig) -> dict[str, Any]:
  """Returns the fields of an experiment as a config file has them: `moe` beside `model`."""
  fields = to_mapping(config)
  moe = fields["model"].pop("moe")
  return fields if moe is None else fields | {"moe": moe}


def write_run(
  folder: Path,
  config: ExperimentConfig,
  state: TrainState,
  place: Mapping[str, Any],
  *,
  title: str,
  metrics: str = "",
  notes: Mapping[str, Mapping[str, Any]],
) -> None:
  """Writes the folder of a run that has come to `state`; it appears at once, when it is complete.

  Args:
    folder: absent or empty.
    config: of the run.
    state: what its next step starts from.
    place: in the data stream, as checkpoints keep it.
    title: the first line of its config file.
    metrics: the rows of the steps that the state has behind it.
    notes: further JSON files by name.
  """
  check_free(folder)
  with draft_of(folder) as draft:
    fields = config_fields(config)
    text = pprint.pformat(fields, width=96, sort_dicts=False)
    source = _CONFIG_TEXT.format(title=title, fields=text)
    (draft / CONFIG_SOURCE).write_text(source, encoding="utf-8")
    write_json(draft / CONFIG_FILE, full_config(fields).to_dict())
    (draft / METRICS_FILE).write_text(metrics, encoding="utf-8")
    for name, note in notes.items():
      write_json(draft / name, note)
    with Checkpoints(draft, config.checkpoint) as checkpoints:
      checkpoints.save(int(state.step), state, dict(place))
      checkpoints.wait()
