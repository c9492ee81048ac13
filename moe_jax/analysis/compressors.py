"""General-purpose compressors as baselines for a language model, in bits per byte.

A model that predicts text better than a compressor codes it in fewer bits. `xz` sees only the
held-out text; the primed figure also gives it the training text to copy from, which is the fairer
opponent of a model that was trained on it.
"""

import functools
import lzma

from moe_jax.errors import UserError

XZ_PRESET = 9  # what `xz -9` uses: a 64 MiB window, about 700 MB of memory while compressing


def xz_bits_per_byte(heldout: bytes) -> float:
  """Measures how many bits `xz -9` spends on each byte of `heldout`, its container included.

  Raises:
    UserError: `heldout` is empty.
  """
  _refuse_empty(heldout)
  return 8 * _xz_size(heldout) / len(heldout)


def xz_primed_bits_per_byte(heldout: bytes, prime: bytes) -> float:
  """Measures what `heldout` adds, in bits per byte of it, to the `xz -9` of `prime` before it.

  A byte can be copied only from the 64 MiB before it, so the start of a longer `prime` is no help.

  Args:
    heldout: the text to code.
    prime: the text the compressor has read before; empty leaves only the container uncounted.

  Raises:
    UserError: `heldout` is empty.
  """
  _refuse_empty(heldout)
  return 8 * (_xz_size(prime + heldout) - _xz_size(prime)) / len(heldout)


# A sweep asks about the same text once a run.
@functools.lru_cache(maxsize=4)
def _xz_size(text: bytes) -> int:
  return len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=XZ_PRESET))


def _refuse_empty(heldout: bytes) -> None:
  if not heldout:
    raise UserError(
      "the held-out text is empty (0 bytes), so it has no bits per byte; give at least 1 byte"
    )
