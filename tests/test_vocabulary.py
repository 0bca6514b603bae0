"""convert/vocabulary.py and convert/hub.py: vocabularies of other projects, from files, folders and the hub."""

import time

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models

import Pretraining
from convert.vocabulary import load_vocabulary
from dataset import SPECIAL_TOKENS
from utils import InputError


def test_vocabularies_load_from_file_and_folder(tmp_path, vocabulary):
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary.pieces()) + "\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    vocabulary.tokenizer.save(str(tmp_path / "folder" / "tokenizer.json"))
    for source in ("vocab.txt", "folder", "."):
        loaded = load_vocabulary(str(tmp_path / source))
        assert loaded.encode(["The Éolian cats."]) == vocabulary.encode(["The Éolian cats."])
        assert loaded.pieces() == vocabulary.pieces()


def test_a_vocabulary_with_capitals_keeps_case(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "The", "the", "É"]), encoding="utf-8")
    assert load_vocabulary(str(tmp_path / "vocab.txt")).encode(["The É"]) == [[5, 7]]


def test_vocabularies_that_can_not_be_used_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "vocab.txt"

    def refused(pieces, message):
        path.write_text("\n".join(pieces), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            load_vocabulary(str(path))

    refused([*SPECIAL_TOKENS[:4], "cat"], r"no \[MASK\]")
    refused([*SPECIAL_TOKENS, *(f"w{n}" for n in range(70_000))], "at most 65,536")
    refused([*SPECIAL_TOKENS, "cat", "cat"], "'cat' more than once")
    with pytest.raises(InputError, match="no file or folder here"):
        load_vocabulary("no such file!")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(InputError, match="could not be downloaded"):
        load_vocabulary("nobody/nothing")
    assert time.perf_counter() - began < 30


def test_other_tokenizers_with_the_special_tokens_are_taken(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate([*SPECIAL_TOKENS, "cat"])}, "[UNK]"))
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(str(tmp_path)).encode(["cat"]) == [[5]]


def test_a_vocabulary_of_another_size_than_the_model_is_refused(command, tmp_path, vocabulary, capsys):
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary.pieces()), encoding="utf-8")
    assert Pretraining.main(command(vocab=tmp_path / "vocab.txt")) == 2
    assert f"set --model.vocab-size {vocabulary.size}" in capsys.readouterr().err
