"""Vocabularies, learned from a corpus and of other projects: letters, Unicode's forms, files, folders and the hub."""

import math
import multiprocessing
import random
import time
import unicodedata

import pytest
from conftest import WORDS
from huggingface_hub import constants
from tokenizers import Tokenizer, models, normalizers

import Pretraining
from convert.vocabulary import load_vocabulary
from corpus.vocabulary import CASES, learn_vocabulary, wordpiece
from dataset import SPECIAL_TOKENS, Vocabulary, scan_corpus
from tasks.encoding import encode_texts
from utils import InputError

# Learned from a corpus


def learned(path, lines, size, case="cased"):
    path.write_text("\n".join(lines), encoding="utf-8")
    return learn_vocabulary(scan_corpus((path,)), size, case)


def unknown_share(vocabulary, lines):
    encoded = vocabulary.encode(lines)
    return sum(ids.count(vocabulary.unk) for ids in encoded) / sum(map(len, encoded))


def test_learned_vocabulary_knows_its_corpus_and_special_tokens_come_first(corpus_file):
    vocabulary = learn_vocabulary(scan_corpus((corpus_file,)), 200)
    assert vocabulary.pieces()[:5] == SPECIAL_TOKENS and (vocabulary.pad, vocabulary.mask) == (0, 4)
    assert vocabulary.size <= 200
    assert vocabulary.unk not in vocabulary.encode([" ".join(WORDS)])[0]
    again = Vocabulary.from_json(vocabulary.to_json(), "state")
    assert again.encode(["the cat eats"]) == vocabulary.encode(["the cat eats"])


def learn_elsewhere(path, output):
    output.put(learn_vocabulary(scan_corpus((path,)), 120).pieces())


def test_the_same_corpus_gives_the_same_vocabulary_in_every_process(corpus_file):
    context = multiprocessing.get_context("spawn")  # each with its own hash seeds
    output = context.Queue()
    processes = [context.Process(target=learn_elsewhere, args=(corpus_file, output)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = output.get(timeout=120), output.get(timeout=120)
    assert first == second == learn_vocabulary(scan_corpus((corpus_file,)), 120).pieces()


# Letters of large scripts, and what stands between words. Chinese is cut into its characters; the others are not, and so
# their letters take two pieces, one at the beginning of a word and one inside.
SCRIPTS = {"Chinese": (range(0x4E00, 0x5A00), ""), "Korean": (range(0xAC00, 0xB800), " "),
           "Yi": (range(0xA000, 0xA48C), " ")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_letters_of_large_scripts_are_known_and_leave_room_for_words(tmp_path, script):
    letters, space = SCRIPTS[script]
    rng = random.Random(0)
    weights = [math.exp(-rank / 200) for rank in range(len(letters))]  # the first 256 are 72% of the text
    lines = [space.join("".join(map(chr, rng.choices(letters, weights, k=2))) for _ in range(20)) + " international edition"
             for _ in range(400)]
    vocabulary = learned(tmp_path / "text.txt", lines, 4096)
    assert vocabulary.size <= 4096
    assert unknown_share(vocabulary, lines) < 0.005
    assert {"international", "edition"} <= set(vocabulary.pieces())


def test_more_letters_than_there_is_room_for_leave_a_quarter_of_the_pieces(tmp_path):
    lines = [chr(number) * 2 + " the common words" for number in range(0x4E00, 0x5600)]
    pieces = learned(tmp_path / "text.txt", lines, 1000, "uncased").pieces()
    assert 600 < sum(len(piece) == 1 for piece in pieces) <= 750 and {"the", "common", "words"} <= set(pieces)


def test_letters_of_a_small_script_are_all_known_however_rare(tmp_path):
    lines = ["the common words of a long text"] * 5000
    lines[7] = "façade über §5 ½ ∑ ж"
    vocabulary = learned(tmp_path / "text.txt", lines, 300)
    assert unknown_share(vocabulary, lines[7:8]) == 0


# Unicode's forms


VIETNAMESE = "Thành phố Hà Nội là thủ đô của Việt Nam"
FORMS = {"Vietnamese": VIETNAMESE, "German": "Der große Übergang über die Brücke", "Korean": "한국어 문장을 읽는다",
         "Japanese": "ガラスのコップで水を飲みました", "Yoruba": "Ọjọ́ ẹ̀kọ́ ni òní", "Greek": "Η Αθήνα είναι ωραία"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("language", FORMS)
def test_composed_and_decomposed_text_are_the_same_text(tmp_path, language, case):
    text = FORMS[language]
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert composed != decomposed
    for known, other in ((composed, decomposed), (decomposed, composed)):  # whatever the corpus has
        vocabulary = learned(tmp_path / "text.txt", [known] * 50, 400, case)
        assert vocabulary.unk not in vocabulary.encode([other])[0]
        assert vocabulary.encode([other]) == vocabulary.encode([known])
        (first, second), = encode_texts([(other, known)], vocabulary, 99)[0]
        assert first.tolist() == second.tolist() == vocabulary.encode([known])[0]


JOINED = {"Persian": ("من کتاب\u200cها را می\u200cخوانم", "من کتابها را میخوانم"),
          "Hindi": ("क्\u200dष और क्\u200cष में अंतर है", "क्ष और क्ष में अंतर है")}


@pytest.mark.parametrize("language", JOINED)
@pytest.mark.parametrize("case", CASES)
def test_joiners_between_letters_are_kept_and_others_are_not(tmp_path, language, case):
    text, without = JOINED[language]
    vocabulary = learned(tmp_path / "text.txt", [text, without] * 50, 300, case)
    again = Vocabulary.from_json(vocabulary.to_json(), "saved")
    for kept in (vocabulary, again):
        ids, ids_without = kept.encode([text, without])
        assert ids != ids_without and kept.unk not in ids + ids_without
        spelled = "".join(kept.tokenizer.id_to_token(number).removeprefix("##") for number in ids)
        assert {sign: spelled.count(sign) for sign in "\u200c\u200d"} == {sign: text.count(sign) for sign in "\u200c\u200d"}
        assert any(sign in piece and len(piece.removeprefix("##")) > 1 for piece in kept.pieces() for sign in "\u200c\u200d")
        astray = " ".join(f"\u200c{word}\u200d" for word in text.split())
        assert kept.encode([astray]) == [ids]
    # A vocabulary that doesn't have them reads the text without them, as BERT does.
    other = learned(tmp_path / "text.txt", [without] * 50, 300, case)
    assert other.encode([text]) == other.encode([without]) and other.unk not in other.encode([text])[0]


def test_a_tokenizer_that_keeps_joiners_cleans_all_other_characters_as_bert_does():
    peer = normalizers.BertNormalizer(lowercase=True)
    kept = wordpiece({"##\u200c": 0, "##\u200d": 1}, True).normalizer
    newer = {"\u0890", "\u0891", "\u08e2"}  # format characters that tokenizers' tables don't know yet
    for number in range(0x10000):
        sign = chr(number)
        if unicodedata.category(sign) != "Cs" and sign not in {"\u200c", "\u200d"} | newer:
            assert kept.normalize_str(f"a{sign}b").split() == peer.normalize_str(f"a{sign}b").split(), hex(number)


def test_uncased_english_is_tokenized_as_before_by_berts_own_normalizer():
    state = normalizers.BertNormalizer(lowercase=True).__getstate__()
    assert wordpiece({"the": 0}, True).normalizer.__getstate__() == state


# Of other projects


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


@pytest.mark.parametrize("form", ["\ufeff{}", "{}\n", "\ufeff{}\n", "{}\n\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_vocab_txt_as_windows_editors_save_it_is_read_right(tmp_path, vocabulary, form, line_end):
    text = form.format("\n".join(vocabulary.pieces())).replace("\n", line_end)
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    (tmp_path / "tokenizer_config.json").write_bytes("\ufeff{}".encode())
    assert load_vocabulary(str(tmp_path / "vocab.txt"), "uncased").to_json() == vocabulary.to_json()
    (tmp_path / "tokenizer.json").write_bytes(f"\ufeff{vocabulary.to_json()}".encode())
    assert load_vocabulary(str(tmp_path)).to_json() == vocabulary.to_json()


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
