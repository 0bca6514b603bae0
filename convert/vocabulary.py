"""Vocabularies of other projects in: a vocab.txt, a tokenizer.json, a folder with either, or a name on the hub."""

import json
import unicodedata
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, normalizers

from convert.hub import hub_folder
from corpus.vocabulary import CASES, wordpiece
from dataset import Vocabulary
from utils import InputError, require

TOKENIZER_FILES = ["tokenizer.json", "vocab.txt", "tokenizer_config.json"]  # of a tokenizer folder
# A vocabulary is taken as cased, or as one with accents, if more than this share of its words has capitals or accents.
# Learned with --case cased from English and Japanese documentation, 14% and 38% have capitals (of those that could). To
# vocabularies without any, users add a few, such as "COVID".
CAPITALS_SHARE = 0.02
ACCENTS_SHARE = 0.005  # smaller, because a Japanese vocabulary has thousands of characters and 50 with voicing marks


def load_vocabulary(source: str, case: str = "auto") -> Vocabulary:
    """From a vocab.txt, a folder with a tokenizer.json or vocab.txt, or a name on the Hugging Face hub.

    `case`, a key of CASES, is for a vocab.txt; auto: what detect_case says. InputError if it is given for a tokenizer.json.
    """
    path = Path(source)
    if not path.exists():
        path = hub_folder(source, f"the vocabulary {source} is no file or folder here", TOKENIZER_FILES)
    if path.is_dir():
        files = [path / name for name in TOKENIZER_FILES[:2] if (path / name).is_file()]
        require(bool(files), f"the folder {source} has no vocabulary: expected tokenizer.json or vocab.txt in it")
        path = files[0]
    is_json = path.suffix == ".json"
    require(not is_json or case == "auto",
            f"--case {case} is for vocab.txt and learned vocabularies, but {path} says itself what it does: leave --case "
            "out or name a vocab.txt with --vocab")
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the byte order mark that Windows editors write
        if is_json:
            return Vocabulary(Tokenizer.from_str(text), source)
        return Vocabulary(read_vocab_txt(text, source, case, path.with_name("tokenizer_config.json")), source)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the vocabulary {source} can't be read: {error}") from None


def read_vocab_txt(text: str, source: str, case: str, settings_file: Path) -> Tokenizer:
    """A WordPiece tokenizer from one piece a line; InputError for a piece that comes twice."""
    pieces = text.rstrip("\n").split("\n")
    piece, count = Counter(pieces).most_common(1)[0]
    require(count == 1, f"the vocabulary {source} has {piece!r} more than once: expected one piece a line")
    lowercase, strip_accents = CASES.get(case) or detect_case(pieces, settings_file)
    return wordpiece({piece: number for number, piece in enumerate(pieces)}, lowercase, strip_accents)


def detect_case(pieces: list[str], settings_file: Path) -> tuple[bool, bool | None]:
    """Whether to lowercase and to strip accents: as tokenizer_config.json beside a vocab.txt says, if it is there.

    Otherwise by the pieces that are words, made of nothing but letters, which leaves out markers such as [URL] and <S>:
    cased if more than a few of them have a capital, and with accents if stripping accents would change more than a few.
    """
    settings = json.loads(settings_file.read_text(encoding="utf-8-sig")) if settings_file.is_file() else {}
    if settings.get("do_lower_case") is not None:
        return settings["do_lower_case"], settings.get("strip_accents")
    words = [piece for piece in pieces if all(unicodedata.category(sign)[0] in "LM" for sign in piece)]
    with_case = [word for word in words if word.lower() != word.upper()]
    capitalized = [word for word in with_case if word != word.lower()]
    if len(capitalized) > CAPITALS_SHARE * len(with_case):
        return CASES["cased"]
    stripper = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
    accented = [word for word in words if stripper.normalize_str(word) != word]
    return CASES["uncased-accents" if len(accented) > ACCENTS_SHARE * len(words) else "uncased"]
