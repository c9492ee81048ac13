"""What a run does about faults, and what it raises an alarm about."""

import dataclasses
import enum

from moe_jax.choices import as_choice
from moe_jax.config.bounds import at_least, below
from moe_jax.errors import UserError


class OnNonfinite(enum.StrEnum):
  """What follows a step whose loss, gradients or updates are not finite."""

  STOP = "stop"  # the run ends with one sentence; nothing of the step is saved
  SKIP = "skip"  # the step changes nothing but its number
  ROLLBACK = "rollback"  # back to the last checkpoint, and on with the batches after this one


class OnSpike(enum.StrEnum):
  """What follows a loss spike."""

  REPORT = "report"  # an event
  ROLLBACK = "rollback"  # as of steps that are not finite, on the same budget


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
  """Faults of a run; what happens is written to events.jsonl of its folder.

  Attributes:
    on_nonfinite: what follows a step whose loss, gradients or updates are not finite.
    budget: so many steps a run may skip or roll back from, restarts included; one more ends it.
    spike_ratio: a logged loss above so many times the median of those before it is a spike; 0 =
      never.
    spike_window: logged losses in that median; half of them must be there first.
    on_spike: what follows a spike. Only logged steps are looked at, so a rollback passes over all
      batches from the checkpoint before the spike to it, as PaLM's authors did by hand (arXiv
      2204.02311 section 5.1).
    collapse_share: a layer of which more than this share of experts gets no token is an event; 1 =
      never.
    collapse_violation: so is one with a larger max violation; 0 = never. Its largest value is
      num_experts / top_k - 1.
    collapse_rows: logged rows in a row that it must last.
    watchdog_seconds: a process in which no step ends for so long writes the stacks of its threads
      to the run folder and ends with status 124; 0 = never. Begins after the first step, which
      compiles. Let it exceed an evaluation and a save.
  """

  on_nonfinite: OnNonfinite = OnNonfinite.STOP
  budget: int = 3
  spike_ratio: float = 2.0
  spike_window: int = 20
  on_spike: OnSpike = OnSpike.REPORT
  collapse_share: float = 0.5
  collapse_violation: float = 0.0
  collapse_rows: int = 5
  watchdog_seconds: float = 0.0

  def __post_init__(self):
    object.__setattr__(
      self, "on_nonfinite", as_choice(OnNonfinite, "on_nonfinite", self.on_nonfinite)
    )
    object.__setattr__(self, "on_spike", as_choice(OnSpike, "on_spike", self.on_spike))
    at_least(self, 0, "budget", "spike_ratio", "collapse_share", "collapse_violation")
    at_least(self, 0, "watchdog_seconds")
    at_least(self, 1, "spike_window", "collapse_rows")
    below(self, float("inf"), "spike_ratio", "collapse_violation", "watchdog_seconds")
    if self.collapse_share > 1:
      raise UserError(f"collapse_share = {self.collapse_share} is refused: it must be at most 1")
    if 0 < self.spike_ratio <= 1:
      raise UserError(
        f"spike_ratio = {self.spike_ratio} is refused: every loss would be a spike; give more than"
        " 1, or 0 for none"
      )
    if self.on_spike != OnSpike.REPORT and not self.spike_ratio:
      raise UserError(
        f"on_spike = {self.on_spike} with spike_ratio = 0 is refused: no loss would be a spike;"
        " give a ratio such as 2"
      )
