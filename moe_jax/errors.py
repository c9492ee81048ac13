"""Errors that are the user's to mend: each message is one sentence that names the value and the nearest valid choice."""


class UserError(ValueError):
  """A fault in what the user gave (a config, a path, a shape); the command line prints it as one line and exits with 2."""
