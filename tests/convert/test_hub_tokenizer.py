"""A checkpoint's tokenizer: ids, text, where it ends, and `moe-jax generate` with it."""

import json
import shutil
import sys

import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from moe_jax import generate
from moe_jax.cli import main
from moe_jax.convert.hub_tokenizer import HubTokenizer
from moe_jax.errors import UserError

WORDS = ["<unk>", "<s>", "</s>", *(f"▁{letter}" for letter in "abcdefghijklm")]


@pytest.fixture
def folder(checkpoint):
  """The tiny checkpoint with a tokenizer of one id a letter, which marks the beginning by <s>."""
  vocabulary = {word: index for index, word in enumerate(WORDS)}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.add_special_tokens(WORDS[:3])
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
  tokenizer.save(str(checkpoint / "tokenizer.json"))
  return checkpoint


def write_stop(folder, name, value):
  path = folder / name
  settings = json.loads(path.read_text()) if path.is_file() else {}
  path.write_text(json.dumps(settings | {"eos_token_id": value}))


def set_vocabulary(folder, size):
  settings = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": size}))


def test_a_prompt_begins_as_the_tokenizer_says_and_words_keep_their_space(folder):
  tokenizer = HubTokenizer(folder)
  ids = tokenizer.encode("a c")
  assert ids.tolist() == [1, 3, 5] and ids.dtype == np.int32
  assert tokenizer.decode(ids) == "a c"
  assert tokenizer.decode_after(ids, np.array([4, 2, 3])) == " b a"
  assert tokenizer.decode_after(ids, np.array([], np.int32)) == ""


def test_ids_that_end_a_text_come_from_the_settings_of_generation_first(folder):
  write_stop(folder, "config.json", None)
  assert HubTokenizer(folder).stop_ids == ()
  write_stop(folder, "config.json", 2)
  assert HubTokenizer(folder).stop_ids == (2,)
  write_stop(folder, "generation_config.json", [2, 7])
  assert HubTokenizer(folder).stop_ids == (2, 7)


def test_generate_writes_what_the_model_adds_up_to_the_end(folder, model, capsys):
  tokenizer = HubTokenizer(folder)
  prompt = tokenizer.encode("a c")
  new = np.asarray(generate(model, prompt[None], 6))[0, len(prompt) :]
  command = ["generate", f"--checkpoint={folder}", "--prompt=a c", "--max_new_tokens=6"]
  command += ["--temperature=0.01", "--top_k=1", "--top_p=0.9"]
  write_stop(folder, "config.json", None)
  assert main(command) == 0
  assert capsys.readouterr().out == "a c" + tokenizer.decode_after(prompt, new) + "\n"
  write_stop(folder, "config.json", int(new[0]))
  assert main(command) == 0
  assert capsys.readouterr().out == "a c\n"


def remove(folder, monkeypatch):
  (folder / "tokenizer.json").unlink()


def damage(folder, monkeypatch):
  (folder / "tokenizer.json").write_text('{"model": 3}')


def uninstall(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)


def shrink_model(folder, monkeypatch):
  set_vocabulary(folder, 15)


FAULTS = [
  (remove, "has neither tokenizer.json nor tokenizer.model; expected what transformers saves"),
  (damage, "tokenizer.json cannot be read"),
  (uninstall, "needs the package tokenizers, which is not installed: pip install 'moe_jax[hf]'"),
  (lambda folder, _: write_stop(folder, "config.json", "end"), 'eos_token_id = "end"'),
  (lambda folder, _: write_stop(folder, "generation_config.json", [2, 99]), "token_id = [2, 99]"),
  (lambda folder, _: shutil.rmtree(folder), "checkpoint is not a folder"),
  (shrink_model, "has 16 ids and config.json vocab_size = 15"),
]


@pytest.mark.parametrize("fault, message", FAULTS)
def test_what_is_missing_or_damaged_is_said_in_one_sentence(
  fault, message, folder, monkeypatch, capsys
):
  fault(folder, monkeypatch)
  assert main(["generate", f"--checkpoint={folder}", "--prompt=a"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_a_prompt_without_a_token_or_without_utf8_is_refused(folder):
  bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
  bare.post_processor = processors.TemplateProcessing("$A", None, [])
  bare.save(str(folder / "tokenizer.json"))
  tokenizer = HubTokenizer(folder)
  with pytest.raises(UserError, match="the prompt '' has no token"):
    tokenizer.encode("")
  with pytest.raises(UserError, match="is not UTF-8 text"):
    tokenizer.encode("a \udcff")


def test_new_bytes_that_spoil_the_prompts_do_not_repeat_it(folder):
  words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
  model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
  tokenizer = Tokenizer(model)
  tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
  tokenizer.save(str(folder / "tokenizer.json"))
  set_vocabulary(folder, len(words))
  tokenizer = HubTokenizer(folder)
  prompt = tokenizer.encode("é")
  assert tokenizer.decode_after(prompt, prompt) == "é"
  assert tokenizer.decode_after(prompt, prompt[:1]) == "�"


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "neither was given"),
    (["--workdir=a", "--checkpoint=b"], "both were given"),
    (["--checkpoint=b", "--top_k=0"], "top_k = 0"),
    (["--workdir=b", "--dtype=bfloat16"], "--dtype=bfloat16 goes with --checkpoint"),
    (["--workdir=b", "--top_p=2"], "top_p = 2.0"),
  ],
)
def test_generate_takes_a_run_or_a_checkpoint_and_numbers_in_range(flags, message, capsys):
  assert main(["generate", "--prompt=a", *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
