"""Pages that stand alone: one HTML file with its style in it, and nothing fetched."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from moe_jax.analysis.text import escape


def page(title: str, body: str) -> str:
  """Returns a page with the style of all reports; `body` is HTML."""
  style = resources.files("moe_jax.analysis").joinpath("report.css").read_text("utf-8")
  # The policy makes browsers refuse anything that is not in the file itself.
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · moe_jax report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def plain_section(title: str, body: str, caption: str = "") -> str:
  """Returns a section of a page; `body` is HTML."""
  below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
  return f"<section><h2>{escape(title)}</h2>{body}{below}</section>"


def table(head: Iterable[str], rows: Iterable[str]) -> str:
  """Returns a table that scrolls where it is too wide; rows are HTML, from <tr> on."""
  names = "".join(f"<th>{escape(name)}</th>" for name in head)
  return (
    f'<div class="scroll"><table class="runs"><thead><tr>{names}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


@dataclasses.dataclass(frozen=True)
class Inset:
  """A page as a notebook shows it: in a frame, so that neither's style reaches the other.

  Attributes:
    html: the page.
    height: of the frame, in pixels; what is longer scrolls.
  """

  html: str
  height: int = 480

  def _repr_html_(self) -> str:
    # Jupyter looks for this name.
    return (
      f'<iframe srcdoc="{escape(self.html)}" height="{self.height}"'
      ' style="width: 100%; border: 0"></iframe>'
    )


def write_whole(path: Path, text: str) -> None:
  """Replaces `path` in one move, so that a reader never sees half a page."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
      file.write(text)
    os.chmod(temporary, 0o644)  # mkstemp's files are readable by their owner only
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
