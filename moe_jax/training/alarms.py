"""Alarms over logged rows: loss spikes, and layers whose experts get no tokens."""

import re
import statistics
from collections.abc import Mapping
from typing import Any

from moe_jax.training.events import Event
from moe_jax.training.faults_config import FaultsConfig

_DEAD = re.compile(r"moe/layer_(\d+)/dead_experts")


class Alarms:
  """Reads rows in order; what it remembers is part of a checkpoint, so restarts change nothing."""

  def __init__(self, config: FaultsConfig, num_experts: int):
    self._config, self._num_experts = config, num_experts
    self._losses: list[float] = []
    self._collapsed: dict[str, int] = {}

  def state(self) -> dict[str, Any]:
    """Returns what it remembers, JSON-serialisable."""
    return {"losses": list(self._losses), "collapsed": dict(self._collapsed)}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Remembers what `state` told; an empty one means nothing yet."""
    self._losses = [float(each) for each in state.get("losses", ())]
    self._collapsed = {str(k): int(v) for k, v in state.get("collapsed", {}).items()}

  def read(self, row: Mapping[str, Any]) -> list[Event]:
    """Returns what a row gives cause to say."""
    return [*self._spike(row), *self._collapse(row)]

  def _spike(self, row: Mapping[str, Any]) -> list[Event]:
    ratio, window, loss = self._config.spike_ratio, self._config.spike_window, row["loss"]
    if not ratio or loss is None:
      return []
    known = len(self._losses) >= max(1, window // 2)
    median = statistics.median(self._losses) if known else None
    self._losses = [*self._losses, loss][-window:]
    if median is None or loss <= ratio * median:
      return []
    return [{"event": "loss_spike", "step": row["step"], "loss": loss, "median": median}]

  def _collapse(self, row: Mapping[str, Any]) -> list[Event]:
    events = []
    for name, dead in row.items():
      match = _DEAD.fullmatch(name)
      if not match or dead is None:
        continue
      layer = match[1]
      violation = row[f"moe/layer_{layer}/max_violation"]
      lasting = self._collapsed.get(layer, 0) + 1 if self._collapses(dead, violation) else 0
      self._collapsed[layer] = lasting
      # Once for each collapse, however long it lasts.
      if lasting == self._config.collapse_rows:
        events.append(
          {
            "event": "expert_collapse",
            "step": row["step"],
            "layer": int(layer),
            "dead_experts": int(dead),
            "num_experts": self._num_experts,
            "max_violation": violation,
          }
        )
    return events

  def _collapses(self, dead: float, violation: float) -> bool:
    share, bound = self._config.collapse_share, self._config.collapse_violation
    return dead / self._num_experts > share or (bound > 0 and violation > bound)
