"""The compressor baselines."""

import shutil
import subprocess

import numpy as np
import pytest

from moe_jax.analysis.compressors import xz_bits_per_byte, xz_primed_bits_per_byte
from moe_jax.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
TEXT = b"To be, or not to be, that is the question. " * 300


def test_noise_costs_eight_bits_and_repetition_almost_nothing():
  assert 8.0 < xz_bits_per_byte(NOISE) < 8.1
  assert xz_bits_per_byte(TEXT) < 0.15


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the xz command")
def test_size_is_that_of_the_command():
  written = subprocess.run(
    ["xz", "-9", "--threads=1", "--stdout"], input=TEXT, stdout=subprocess.PIPE, check=True
  )
  assert xz_bits_per_byte(TEXT) == 8 * len(written.stdout) / len(TEXT)


def test_priming_with_the_same_text_leaves_little_to_code():
  # LZMA copies at most 273 bytes at a time and spends 3 to 5 bytes on saying so.
  assert xz_primed_bits_per_byte(NOISE, NOISE) < 8 * 5 / 273


def test_priming_with_unrelated_noise_does_not_help():
  half = len(NOISE) // 2
  assert xz_primed_bits_per_byte(NOISE[half:], NOISE[:half]) == pytest.approx(8.0, abs=0.1)


def test_nothing_held_out_is_refused():
  with pytest.raises(UserError, match="0 bytes"):
    xz_bits_per_byte(b"")
  with pytest.raises(UserError, match="0 bytes"):
    xz_primed_bits_per_byte(b"", b"abc")
