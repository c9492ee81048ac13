"""Errors the user can mend: one sentence that names the value and the nearest valid choice.

Exit statuses of a training process: 0 done, 2 a fault of the user's, 75 stopped with everything
saved, 124 hung and ended by its watchdog, 1 anything else.
"""

EXIT_USER = 2
# EX_TEMPFAIL of sysexits.h: the same command again goes on.
EXIT_AGAIN = 75
# As timeout(1) ends with.
EXIT_HUNG = 124


class UserError(ValueError):
  """A fault in what the user gave: a config, a path, a shape.

  The command line prints it as one line and exits with its status.
  """

  status = EXIT_USER


class DivergedRun(UserError):
  """A run whose loss or gradients are not finite, or spike, more often than its config allows."""


class StoppedRun(UserError):
  """A run that was told to end: its last step is saved, and the same command goes on from there."""

  status = EXIT_AGAIN
