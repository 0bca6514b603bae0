"""Raw text to clean paragraphs, and paragraphs to sentences: the rules that all kinds of sources share."""

import html
import re
import unicodedata
from functools import reduce
from html.entities import html5

import sentencex

LONGEST_HEADING = 160  # characters; a longer paragraph is taken as prose whatever it looks like
WIDEST_VERSE = 60  # characters; prose is wrapped at 65 and more
WIDEST_WRAPPED = 100  # characters; longer lines are neither hard-wrapped nor verse
SENTENCE_ENDS = {".", "!", "?", "…", "。", "！", "？", "．", "।", "॥", "؟", "۔"}
FORMULA = "\ufffc"  # stands where a formula was
UNKNOWN_TEMPLATE = "\ufffb"  # stands where a template was of which it isn't known what it shows

# Characters that a reader doesn't see: control characters other than white space, soft hyphens, zero-width characters,
# marks of the writing direction, and the byte order mark.
INVISIBLE = dict.fromkeys([
    *range(0x00, 0x09), *range(0x0E, 0x1C), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xAD,
    0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF])
# Joiners and non-joiners change how the letters beside them are written, in Persian and Hindi for instance.
JOINERS = re.compile("[\u200c\u200d]+")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|\w+);")

# What shows that markup was not understood: placeholders (WikiExtractor writes "formula_1" or "codice_1"), links,
# templates, tables, emphasis, headings, tags, variants of Chinese, bytes that are not of the encoding.
MARKUP = re.compile(
    rf"{FORMULA}|\b(?:formula|codice)_\d|\[\[|\]\]|\{{\{{|\}}\}}|\||'''|==|<[A-Za-z/]|-\{{|\}}-|\ufffd")

# An abbreviation at the end that continues with a number ("vol. 2", "Jan. 5").
BEFORE_NUMBER = re.compile(
    r"\b(?:art|ch|figs?|nos?|op|pp?|vols?|v|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\.$", re.IGNORECASE)
# A title at the end that continues with a name ("Dr. Smith"), or nothing but the number of a list entry ("12.").
BEFORE_NAME = re.compile(
    r"\b(?:M|Mme|Mrs?|Ms|Messrs|Dr|St|Prof|Rev|Hon|Capt|Col|Gen|Lt|Lieut|Maj|Sgt)\.$|^\W*\d+[.)]\W*$")
# A number at the end that is an ordinal in ORDINAL_LANGUAGES, whatever follows ("70. Geburtstag"). Cutting there would
# break more sentences than it would part.
ORDINAL = re.compile(r"(?<![\d.,])\d{1,3}\.$")
ORDINAL_LANGUAGES = {"bs", "cs", "da", "de", "et", "eu", "fi", "fo", "hr", "hu", "is", "lb", "lv", "nb", "nn", "no", "pl",
                     "sk", "sl", "sr", "tr"}
# A small letter at the beginning, perhaps after the dash between what is said and who says it ("—dijo él").
SMALL_BEGINNING = re.compile(r"(?:[—–―-]\s*)?([^\W\d_])")
CLOSING_MARKS = {"\"", "”", "»", "」", "』"}
# A quotation as a whole: its opening mark, what is quoted, its closing mark.
QUOTATION = re.compile(r"([\"“«„»「『])([^\"“”«»„「」『』]+)([\"”»“«」』])")
# A sentence in Chinese or Japanese, up to a full stop that is not inside of brackets or quotation marks.
CJK_STOPS = "。！？｡．"
LATIN_STOP = re.compile(r"[.!?]\s")
CJK_SENTENCE = re.compile(
    r"(?:「[^「」]*」|『[^『』]*』|（[^（）]*）|“[^“”]*”|《[^《》]*》|[^。！？｡．]|．(?=\d))*+(?:[。！？｡．]+[」』）”]*)?")
BETWEEN_QUOTATIONS = re.compile(r"(?<=[。！？｡．][」』”])(?=[「『“])")
CJK_LETTERS = r"\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_LETTER = re.compile(f"[{CJK_LETTERS}]")

# Empty brackets or quotation marks. Brackets right behind a word belong to the text, as in "main()" and "x[]", but Chinese
# and Japanese have no blanks. (Each alternative begins with its mark, by which Python's re finds it fast.)
IN_WORD = rf"[^\W{CJK_LETTERS}]"
NOTHING = r"(?:[\s,;:/–、，；：-]|\b(?:or|and)\b)*"
EMPTY_BRACKETS = re.compile(
    rf"\((?<!{IN_WORD}\(){NOTHING}\)|\[(?<!{IN_WORD}\[){NOTHING}\]|（{NOTHING}）|「\s*」|『\s*』|“\s*”|„\s*“|«\s*»|《\s*》|"
    r"\"(?<!\S\")\"")
EMPTY_BRACKETS_AND_BLANKS = re.compile(rf"\s*(?:{EMPTY_BRACKETS.pattern})")
# What else templates, notes and dashes leave behind where they are dropped: (pattern, replacement), in this order.
GAPS = (
    (re.compile(r"^(?:[\s,;:、，；：]+|[*#:;]+\s+)"), ""),  # punctuation or list marks at the beginning
    # Blanks and punctuation after an opening bracket and before a closing one.
    (re.compile(rf"([(\[（])(?<!{IN_WORD}[(\[])[\s,;:、，；：]+"), r"\1"),
    (re.compile(r"[\s,;、，；]+(?<=[\s、，；])(?=[)\]）])"), ""),
    (re.compile(r"\s+([,;]|\.(?=\s|$))"), r"\1"),  # blanks before a comma, a semicolon or a full stop
    (re.compile(r",(?=[,.])"), ""),  # a comma before another comma or a full stop
)


def normalize(text: str) -> str:
    """The text in Unicode's composed form (NFC) on one line: single blanks, no entities, no invisible characters."""
    while "&" in text:  # dumps escape the entities of wikitext once more
        decoded = ENTITY.sub(decode_entity, text)
        if decoded == text:
            break
        text = decoded
    text = text.translate(INVISIBLE)
    if not text.isascii():
        text = unicodedata.normalize("NFC", JOINERS.sub(keep_between_letters, text))
    return " ".join(text.split())


def decode_entity(entity: re.Match) -> str:
    """The character of an entity. What only looks like one is kept, as in "AT&T;"."""
    name = entity[0][1:]
    return html.unescape(entity[0]) if name.startswith("#") or name in html5 else entity[0]


def keep_between_letters(joiners: re.Match) -> str:
    """Joiners between two letters or their marks, which they connect or part; elsewhere they are invisible."""
    neighbors = joiners.string[joiners.start() - 1:joiners.start()] + joiners.string[joiners.end():joiners.end() + 1]
    is_between = len(neighbors) == 2 and all(unicodedata.category(character)[0] in "LM" for character in neighbors)
    return joiners[0] if is_between else ""


def clean_paragraph(text: str) -> str:
    """A normalized paragraph without the gaps that dropped markup leaves in it."""
    text = normalize(text)
    for _ in range(3):  # again for brackets that held nothing but empty brackets
        if EMPTY_BRACKETS.search(text):
            text = EMPTY_BRACKETS_AND_BLANKS.sub("", text)
    for pattern, replacement in GAPS:
        text = pattern.sub(replacement, text)
    return text


def is_verse(lines: list[str]) -> bool:
    """Whether lines that follow each other are verse: short ones, a quarter of which end with punctuation.

    In titles and lists of names few do. Prose that is wrapped is taken as verse too; its lines are joined in the same way.
    """
    ended = sum(not line.rstrip()[-1].isalnum() for line in lines)
    return len(lines) > 1 and ended >= len(lines) / 4 and max(map(len, lines)) <= WIDEST_WRAPPED


def ends_sentence(line: str) -> bool:
    """Whether a line ends with a full stop or the like, perhaps inside of quotation marks or brackets."""
    return line.rstrip("\"'”’»“‘)]」』）_* ")[-1:] in SENTENCE_ENDS


def join_paragraph(lines: list[str]) -> list[str]:
    """The lines of a paragraph as one; those behind the last punctuation of a stanza apart.

    A short stanza that ends with them would be taken for a heading and be lost as a whole.
    """
    whole = reduce(join_lines, lines)
    if not whole[-1].isalnum() or len(whole) > LONGEST_HEADING or max(map(len, lines)) > WIDEST_VERSE:
        return [whole]
    ended = [number for number, line in enumerate(lines, 1) if not line[-1].isalnum()]
    if not ended:
        return [whole]
    return [reduce(join_lines, lines[:ended[-1]]), reduce(join_lines, lines[ended[-1]:])]


def join_lines(line: str, next_line: str) -> str:
    """Two lines of a paragraph as one: without a blank inside of a word and in Chinese and Japanese."""
    if ends_with_hyphen(line):
        return line + next_line
    is_cjk = CJK_LETTER.match(next_line[:1]) and (CJK_LETTER.match(line[-1:]) or line[-1:] in CJK_STOPS + "，、；：")
    return line + next_line if is_cjk else f"{line} {next_line}"


def ends_with_hyphen(line: str) -> bool:
    """Whether a line ends inside a word, rather than with a dash."""
    return line.endswith("-") and line[-2:-1].isalpha()


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
    for segment in segments(text, language):
        if sentences and continues_sentence(sentences[-1], segment, is_lowercase, language):
            sentences[-1] += segment
        elif quotation := QUOTATION.fullmatch(segment.strip()):
            # sentencex keeps a quotation whole, but it may hold several sentences.
            opening, quoted, closing = quotation.groups()
            parts = split_sentences(quoted, language) or [""]
            parts[0] = opening + parts[0]
            parts[-1] += closing + segment[len(segment.rstrip()):]
            sentences += parts
        else:
            sentences.append(segment)
    return [sentence.strip() for sentence in sentences if sentence.strip()]


def segments(text: str, language: str) -> list[str]:
    """Where sentencex cuts a text, and the full stops of Chinese and Japanese; the segments together are the text."""
    is_cjk = any(stop in text for stop in CJK_STOPS)
    cut = []
    for piece in CJK_SENTENCE.findall(text) if is_cjk else [text]:
        if is_cjk and not LATIN_STOP.search(piece):  # sentencex would cut inside of brackets, and not before digits
            cut += BETWEEN_QUOTATIONS.split(piece)
        else:
            cut += sentencex.segment(language, piece)
    for number, segment in enumerate(cut[:-1]):
        # sentencex leaves an apostrophe or opening mark at the end of the sentence before: "It was late. '|Twas dark."
        if segment[-1:] in "'’‘" and segment[-2:-1].isspace():
            cut[number] = segment[:-1]
            cut[number + 1] = segment[-1] + cut[number + 1]
    return [segment for segment in cut if segment]


def continues_sentence(sentence: str, segment: str, is_lowercase: bool, language: str) -> bool:
    """Whether `segment` belongs to the sentence before it: it begins small, or it follows an abbreviation."""
    beginning = SMALL_BEGINNING.match(segment)
    if beginning and beginning[1].islower() and not is_lowercase:
        return True
    sentence = sentence.rstrip()
    if sentence[-1:] in CLOSING_MARKS and unicodedata.category(segment[0]) == "Lo":
        return True  # who says what was quoted, in a writing without small letters
    if segment[:1].isdigit() and BEFORE_NUMBER.search(sentence):
        return True
    if language in ORDINAL_LANGUAGES and ORDINAL.search(sentence):
        return True
    return BEFORE_NAME.search(sentence) is not None
