"""Vocabularies of other projects in: a vocab.txt, a tokenizer.json, a folder with either, or a name on the hub."""

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, normalizers

from convert.hub import hub_folder
from dataset import CASES, SPECIAL_TOKENS, Vocabulary, wordpiece
from utils import InputError, require

TOKENIZER_FILES = ["tokenizer.json", "vocab.txt", "tokenizer_config.json"]  # of a tokenizer folder


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
        text = path.read_text(encoding="utf-8")
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

    Otherwise cased if any piece has a capital letter, and with accents if stripping them would change any piece.
    """
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    if "do_lower_case" in settings:
        return settings["do_lower_case"], settings.get("strip_accents")
    text = "\n".join(set(pieces) - set(SPECIAL_TOKENS))
    if text != text.lower():
        return CASES["cased"]
    stripper = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
    return CASES["uncased" if stripper.normalize_str(text) == text else "uncased-accents"]
