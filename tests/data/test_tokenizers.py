"""ByteTokenizer loses nothing; get_tokenizer names the nearest choice."""

import numpy as np
import pytest

from moe_jax.data.tokenizers import ByteTokenizer, get_tokenizer
from moe_jax.errors import UserError


@pytest.mark.parametrize("text", ["", "Fellow-Citizens", "naïve 40° — 你好 🙂", "\x00\n\x7f"])
def test_text_survives_a_round_trip(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.shape == (len(text.encode()),)
  assert tokenizer.decode(ids) == text


def test_byte_b_is_id_b_plus_3():
  ids = ByteTokenizer().encode(bytes(range(256)))
  np.testing.assert_array_equal(ids, np.arange(3, 259))


def test_invalid_utf8_becomes_the_replacement_character():
  tokenizer = ByteTokenizer()
  assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"


def test_decode_skips_special_ids_and_ids_past_the_vocabulary():
  tokenizer = ByteTokenizer()
  a, b = tokenizer.encode("ab")
  assert tokenizer.decode([tokenizer.bos_id, a, 259, 300, b, tokenizer.eos_id, 0, 0]) == "ab"


def test_decode_takes_an_iterator():
  assert ByteTokenizer().decode(iter([100])) == "a"


def test_unknown_tokenizer_names_the_nearest():
  with pytest.raises(UserError, match="unknown tokenizer 'byte'; did you mean bytes"):
    get_tokenizer("byte")


def test_get_tokenizer_returns_bytes():
  assert get_tokenizer("bytes").vocab_size == 259
