"""Pieces of any tokenizer in, what a reader can be shown of them out.

Word pieces can be read as they are. Those of other tokenizers, such as "▁film" or "Ġfilm", have marks that only their
decoder understands, and some are a blank or a few bytes of a character.
"""

from collections.abc import Sequence

from tokenizers import decoders

from dataset import SPECIAL_TOKENS, Vocabulary

BLANK = "\u2423"  # the name of a piece that is nothing but blanks
PART_OF_CHARACTER = "\ufffd"  # what a decoder makes of some of a character's bytes


def piece_names(vocabulary: Vocabulary) -> list[str]:
    """What each piece stands for, by its id; "##" in front says that it continues the word before it."""
    tokenizer = vocabulary.tokenizer
    if tokenizer.decoder is None or isinstance(tokenizer.decoder, decoders.WordPiece):
        return vocabulary.pieces()
    # The decoder shows what a piece looks like after another one, which ends a word if pieces have marks for that.
    before = "a" + (getattr(tokenizer.model, "end_of_word_suffix", None) or "")
    names = []
    for piece in vocabulary.pieces():
        decoded = tokenizer.decoder.decode([before, piece]).removeprefix("a")
        name = " ".join(decoded.split()) or BLANK
        continues = piece not in SPECIAL_TOKENS and not decoded[:1].isspace()
        names.append(f"##{name}" if continues else name)
    return names


def spaces_before(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """A space or nothing for each piece of a text, as the text has it; pieces may hold the blanks around their word."""
    spaces, end = [], 0
    for start, stop in spans:
        part = text[start:stop]
        gap = text[end:start] + part[:len(part) - len(part.lstrip())]
        spaces.append(" " if " " in gap else "")
        end = start + len(part.rstrip()) if part.strip() else stop
    return spaces


def shown_pieces(names: Sequence[str], text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The names of a text's pieces without "##"; in place of parts of a character the whole of it, with the first."""
    shown, end = [], 0
    for name, (start, stop) in zip(names, spans, strict=True):
        piece = "" if name == BLANK else name.removeprefix("##")
        if PART_OF_CHARACTER in name:
            piece = text[max(start, end):stop].strip()
            end = stop
        shown.append(piece)
    return shown
