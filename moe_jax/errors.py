"""Errors the user can mend: one sentence that names the value and the nearest valid choice."""


class UserError(ValueError):
  """A fault in what the user gave: a config, a path, a shape.

  The command line prints it as one line and exits with status 2.
  """
