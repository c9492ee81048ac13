"""Turn numbers and tokens into what a reader sees, safely for HTML."""

import html
import math
from typing import Any

MISSING = "–"
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_NAMED_CONTROLS = {" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
# HTML forbids control characters and UTF-8 forbids lone surrogates, even when escaped.
_FORBIDDEN = {code: "\ufffd" for code in [*range(32), 127, *range(128, 160)]}
_FORBIDDEN |= {code: "\ufffd" for code in range(0xD800, 0xE000)}
_FORBIDDEN |= {ord("\n"): "\n", ord("\t"): "\t"}


def escape(text: Any) -> str:
  """Makes any text safe inside HTML content and quoted attributes."""
  return html.escape(str(text).translate(_FORBIDDEN), quote=True)


def visible_token(token: str) -> str:
  """Spells a token so that blanks and unprintable characters can be seen (not yet escaped)."""
  return "".join(_visible_character(character) for character in token) or "(empty)"


def _visible_character(character: str) -> str:
  if character in _NAMED_CONTROLS:
    return _NAMED_CONTROLS[character]
  if character.isprintable():
    return character
  code = ord(character)
  return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def finite(value: Any) -> bool:
  """Tells whether `value` is a number that can be shown (not None, NaN, infinite or a bool)."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fixed(value: Any, decimals: int) -> str:
  """Formats with a fixed number of decimals, thousands separated; a dash where not finite."""
  return f"{value:,.{decimals}f}".replace("-", "−") if finite(value) else MISSING


def significant(value: Any, digits: int = 3) -> str:
  """Formats with `digits` significant digits, without an exponent between 1e-4 and 1e6."""
  if not finite(value):
    return MISSING
  if value == 0:
    return "0"
  # The exponent after rounding: 0.9996 to three digits is 1.00.
  mantissa, power = f"{value:.{digits - 1}e}".split("e")
  exponent = int(power)
  if not -5 < exponent < 6:
    return f"{mantissa}e{exponent}".replace("-", "−")
  return fixed(value, max(digits - 1 - exponent, 0))


def compact(value: Any) -> str:
  """Formats a count: whole below 10,000, else three digits and k, M, B (1e9) or T."""
  if not finite(value):
    return MISSING
  for unit, suffix in _SUFFIXES:
    # 999,950 would round up to "1,000 k", so a unit starts where the one below would overflow.
    if abs(value) >= max(unit * 0.9995, 10_000):
      return f"{significant(value / unit)} {suffix}"
  return fixed(value, 0)


def percent(fraction: Any, decimals: int = 1) -> str:
  """Formats a fraction of 1 as a percentage."""
  return f"{fixed(fraction * 100, decimals)}%" if finite(fraction) else MISSING


def duration(seconds: Any) -> str:
  """Formats seconds with the two largest units that matter."""
  if not finite(seconds):
    return MISSING
  if seconds < 60:
    return f"{significant(seconds, 2)} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes_of_hour = divmod(minutes, 60)
  if not hours:
    return f"{minutes} min {rest:02d} s"
  days, hours_of_day = divmod(hours, 24)
  return f"{days} d {hours_of_day} h" if days else f"{hours} h {minutes_of_hour:02d} min"
