"""Raw text to clean paragraphs, and paragraphs to sentences: the rules that all kinds of sources share."""

import html
import re
import unicodedata

import sentencex

LONGEST_HEADING = 160  # characters; a longer paragraph is taken as prose whatever it looks like
PLACEHOLDER = "\ufffc"  # stands where a formula was; a sentence that holds one is left out

# Characters that a reader doesn't see: control characters other than white space, soft hyphens, zero-width characters,
# marks of the writing direction, and the byte order mark.
INVISIBLE = dict.fromkeys([
    *range(0x00, 0x09), *range(0x0E, 0x1C), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xAD,
    *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])

# What shows that markup was not understood: placeholders (WikiExtractor writes "formula_1" or "codice_1"), links,
# templates, tables, emphasis, headings, tags and entities.
MARKUP = re.compile(
    rf"{PLACEHOLDER}|\b(?:formula|codice)_\d|\[\[|\]\]|\{{\{{|\}}\}}|\||'''|==|<[A-Za-z/]|&#?\w+;")

# An abbreviation at the end that continues with a number ("vol. 2", "Jan. 5").
BEFORE_NUMBER = re.compile(
    r"\b(?:art|ch|figs?|nos?|op|pp?|vols?|v|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\.$", re.IGNORECASE)
# A title at the end that continues with a name ("Dr. Smith"), or nothing but the number of a list entry ("12.").
BEFORE_NAME = re.compile(
    r"\b(?:M|Mme|Mrs?|Ms|Messrs|Dr|St|Prof|Rev|Hon|Capt|Col|Gen|Lt|Lieut|Maj|Sgt)\.$|^\W*\d+[.)]\W*$")
# A quotation as a whole: its opening mark, what is quoted, its closing mark.
QUOTATION = re.compile(r"([\"“«])([^\"“”«»]+)([\"”»])")

# Empty brackets or quotation marks with the blanks before them, and punctuation or list marks at the beginning.
EMPTY_BRACKETS = re.compile(r"\s*(?:[(\[][\s,;:/–-]*[)\]]|\"\"|“”)|^[\s,;:*#]+")
# What else templates, notes and dashes leave behind where they are dropped: (pattern, replacement), in this order.
GAPS = (
    (re.compile(r"([(\[])[\s,;:]+"), r"\1"),  # blanks and punctuation after an opening bracket
    (re.compile(r"(?<![\s,;])[\s,;]+([)\]])"), r"\1"),  # the same before a closing bracket
    (re.compile(r"\s+([,;]|\.(?=\s|$))"), r"\1"),  # blanks before a comma, a semicolon or a full stop
    (re.compile(r",(?=[,.])"), ""),  # a comma before another comma or a full stop
)


def normalize(text: str) -> str:
    """The text in Unicode's composed form (NFC) on one line: single blanks, no entities, no invisible characters."""
    if "&" in text:
        text = html.unescape(html.unescape(text))  # dumps escape the entities of wikitext once more
    text = unicodedata.normalize("NFC", text.translate(INVISIBLE))
    return " ".join(text.split())


def clean_paragraph(text: str) -> str:
    """A normalized paragraph without the gaps that dropped markup leaves in it."""
    text = normalize(text)
    text = EMPTY_BRACKETS.sub("", text)
    text = EMPTY_BRACKETS.sub("", text)  # once more for brackets that held nothing but empty brackets
    for pattern, replacement in GAPS:
        text = pattern.sub(replacement, text)
    return text


def is_prose(paragraph: str, min_bytes: int) -> bool:
    """Whether a paragraph is running text rather than a heading or a list entry.

    It is if it ends with punctuation and has at least `min_bytes` bytes of UTF-8, or if it is too long for a heading.
    """
    if len(paragraph) > LONGEST_HEADING:
        return True
    last_character = paragraph.rstrip(" )]*")[-1:]
    if not last_character or not unicodedata.category(last_character).startswith("P"):
        return False
    return len(paragraph.encode()) >= min_bytes


def split_sentences(text: str, language: str = "en") -> list[str]:
    """The sentences of a paragraph: split by sentencex, then corrected where it cuts too often or too rarely."""
    sentences: list[str] = []
    is_lowercase = text.islower()  # then a small letter says nothing about where a sentence begins
    for segment in map(str.strip, sentencex.segment(language, text)):
        if sentences and continues_sentence(sentences[-1], segment, is_lowercase):
            sentences[-1] += f" {segment}"
        elif quotation := QUOTATION.fullmatch(segment):
            # sentencex keeps a quotation whole, but it may hold several sentences.
            opening, quoted, closing = quotation.groups()
            parts = split_sentences(quoted, language) or [""]
            parts[0] = opening + parts[0]
            parts[-1] += closing
            sentences += parts
        elif segment:
            sentences.append(segment)
    return sentences


def continues_sentence(sentence: str, segment: str, is_lowercase: bool) -> bool:
    """Whether `segment` belongs to the sentence before it: it begins small, or it follows an abbreviation."""
    if segment[:1].islower() and not is_lowercase:
        return True
    if segment[:1].isdigit() and BEFORE_NUMBER.search(sentence):
        return True
    return BEFORE_NAME.search(sentence) is not None
