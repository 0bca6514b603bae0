"""Records of books to raw documents: plain text, hard-wrapped or not, Markdown, and text with a sentence a line.

Headings, page numbers, notes and what Project Gutenberg adds to a book are left out.
"""

import re
from collections.abc import Iterator
from itertools import chain, groupby, pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from corpus.sentences import (BEFORE_NAME, CJK_LETTERS, LONGEST_HEADING, WIDEST_VERSE, WIDEST_WRAPPED, clean_paragraph,
                              ends_sentence, ends_with_hyphen, is_verse, join_paragraph, normalize, split_sentences)
from corpus.sources import RawDocument, Source

SAMPLE_LINES = 500  # the beginning of a text, by which it is decided whether it has a sentence a line

# What Project Gutenberg puts before, between and after the books of a file: from the beginning to the line that says
# START (in old files the end of the "small print"), and from the line that says END to the next START or to the end.
GUTENBERG = re.compile(
    r"\A.*?^(?:\*{3} ?START OF TH[EI]S? PROJECT GUTENBERG.{0,300}?\*{3}|\*END[* ]+THE SMALL PRINT[^\n]*)\s*$|"
    r"^(?:\*{3} ?END OF TH[EI]S? PROJECT GUTENBERG|End of (?:th(?:e|is) )?Project Gutenberg|"
    r"Ende (?:dieses|von|des) Proje[ck]t Gutenberg).*?"
    r"(?:^\*{3} ?START OF TH[EI]S? PROJECT GUTENBERG[^*]*\*{3}\s*$|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE)
# The beginning of a paragraph that names who made the electronic text, or says what they changed.
CREDITS = re.compile(
    r"[\[(*_]*(?:(?:this )?e-?(?:text|book) (?:was )?(?:produced|prepared|transcribed|scanned) by|produced by|"
    r"transcribed (?:from|by)|transcriber.?s?.? notes?|this (?:file|book) was produced from|distributed proofreader|"
    r"proofread by|(?:html|ebook) version by|"
    r"anmerkungen? (?:zur|der) transkription|hinweise? zur transkription|dieses (?:buch|e-?book) wurde|"
    r"notes? (?:du|de|sur la) transcri|nota d[ei]l? trascrittor|notas? del? transcriptor|opmerkingen? van de bewerker)\b",
    re.IGNORECASE)
# A line that holds the number of a page, perhaps with decoration: "12", "- xii -", "[Pg 12]".
PAGE_NUMBER = re.compile(r"\W*(?:(?:pg|page|p)\.?\s*)?(?:\d{1,4}|[ivxlc]{1,7})\W*", re.IGNORECASE)
# Numbers of notes ("[1]"), marks of pages ("{p. 12}"), pictures and notes in brackets, wherever they stand in the text.
# A mark that has a line to itself goes with its line, so that no empty line parts a paragraph there.
PAGE_MARK = re.compile(
    r"(^[ \t]*)?"
    r"(?:[\[{](?:\d{1,3}|p(?:g|age)\.?\s*[\divxlc]{1,7})[\]}]|"
    r"\[(?:illustration|illustrazione|illustratie|ilustraci[oó]n|ilustração|ilustracja|abbildung|figur[ae]?|footnote|"
    r"fußnote|note de bas de page|voetnoot|sidenote|transcriber.?s.? note|anmerkung)(?:[^\[\]]|\[[^\[\]]{0,99}\]){0,999}\])"
    r"(?(1)[ \t]*\n|)", re.IGNORECASE | re.MULTILINE)
EMPHASIS = re.compile(r"(?<!\w)_(?=[^\s_])(.{1,999}?)(?<=[^\s_])_(?!\w)", re.DOTALL)  # _as here_, not __this__
# Headings in capitals or not: "CHAPTER I. The Beginning", "Part the Second". A word in small letters after the number
# shows a sentence: "Part two of the letter came on Monday."
CHAPTER = re.compile(
    r"(?i:(?:chapter|book|part|volume|vol\.|canto|act|scene|section|stave|letter|appendix)\s+(?:the\s+)?"
    r"(?:[\divxlc]+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"first|second|third|fourth|fifth|last))\b(?![ ,;]+[a-z]).*")
FIRST_WORD = re.compile(rf"(?:[{CJK_LETTERS}]|\S[^\s{CJK_LETTERS}]*)")  # in Chinese and Japanese a character
PART_OF_BOOK = re.compile(
    r"(?:(?:table of )?contents|preface|prologue|epilogue|introduction|the end|finis|dedication|"
    r"(?:list of )?illustrations|footnotes?|notes|index|errata)\W*", re.IGNORECASE)


def parse_book(source: Source, text: str, language: str) -> Iterator[RawDocument]:
    """A book as one document, or the documents of a text that has a sentence a line and blank lines between."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = GUTENBERG.sub("", text)
    if source.format == "markdown":
        paragraphs = [paragraph for paragraph in markdown_paragraphs(text) if not is_heading(paragraph)]
        yield RawDocument(source.name, [clean_paragraph(paragraph) for paragraph in paragraphs])
        return
    lines = text.split("\n")
    if has_sentence_lines(lines, language):
        for block in blocks(lines):
            yield RawDocument(source.name, [normalize(line) for line in block], is_split=True)
        return
    paragraphs = []
    for paragraph in join_wrapped_lines(PAGE_MARK.sub("", text).split("\n")):
        if not is_heading(paragraph) and not CREDITS.match(paragraph):
            paragraphs.append(clean_paragraph(paragraph))
    yield RawDocument(source.name, paragraphs)


def is_heading(paragraph: str) -> bool:
    """Whether a paragraph is a heading: by its words, or because it is short, in capitals and no quotation."""
    if len(paragraph) > LONGEST_HEADING:
        return False
    if CHAPTER.fullmatch(paragraph) or PART_OF_BOOK.fullmatch(paragraph):
        return True
    return paragraph.isupper() and paragraph[0] not in "\"“‘'"


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """The runs of lines between blank lines."""
    for is_blank, block in groupby(lines, lambda line: not line.strip()):
        if not is_blank:
            yield list(block)


# Markdown


def markdown_paragraphs(text: str) -> list[str]:
    """The paragraphs of a Markdown text without headings, code blocks, pictures, addresses of links and emphasis."""
    paragraphs = []
    for opening, content in pairwise(MarkdownIt().parse(text)):
        if opening.type == "paragraph_open":
            paragraphs.append("".join(map(markdown_text, content.children)))
    return paragraphs


def markdown_text(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return " "
    return token.content if token.type in ("text", "code_inline") else ""


# Text with a sentence a line


def has_sentence_lines(lines: list[str], language: str = "en") -> bool:
    """Whether most lines are single sentences, as in BookCorpus, rather than paragraphs or parts of one."""
    sample = list(blocks(lines[:SAMPLE_LINES]))
    texts = [line.strip() for block in sample for line in block]
    if len(texts) < 2 * len(sample):
        return False  # with a blank line after almost every line they are paragraphs
    if sum(map(is_heading, texts)) > 0.1 * len(texts):
        return False  # with so many lines in capitals, which name the speakers, they are a play
    ended = sum(not text[-1].isalnum() and text[-1] not in ",;，、；" for text in texts)
    if ended <= 0.8 * len(texts):
        return False  # with so many lines that break off they are hard-wrapped
    return sum(len(split_sentences(text, language)) for text in texts) < 1.1 * len(texts)


# Text whose lines may be hard-wrapped


def join_wrapped_lines(lines: list[str]) -> list[str]:
    """The paragraphs of a text whose lines may be hard-wrapped or verse, and whose pages may end inside a paragraph."""
    lines = drop_page_numbers(lines)
    lengths = sorted(len(line) for line in lines if line)
    usual_width = lengths[len(lengths) * 9 // 10] if lengths else 0  # nine lines in ten are no longer
    paragraphs: list[list[str]] = []
    last_block: list[str] = []
    for block in blocks(lines):
        width = wrapping_width(block, usual_width)
        verse = is_verse(block)
        for previous, line in pairwise(["", *block]):
            continues = paragraphs and (
                is_wrapped(previous, line, width) or is_torn(" ".join(paragraphs[-1]), line)
                or (verse and is_open(previous) and not is_heading(line.strip()))
                or (not previous and goes_on(last_block, block)))
            if continues:
                paragraphs[-1].append(line.strip())
            else:
                paragraphs.append([line.strip()])
        last_block = block
    joined = chain.from_iterable(map(join_paragraph, paragraphs))
    return [EMPHASIS.sub(r"\1", paragraph) for paragraph in joined]


def goes_on(stanza: list[str], next_stanza: list[str]) -> bool:
    """Whether two blocks are verse beyond doubt, and the first stops inside of a sentence."""
    widest = max(map(len, stanza + next_stanza))
    if len(stanza) < 3 or widest > WIDEST_VERSE or not is_verse(stanza) or not is_verse(next_stanza):
        return False
    return stanza[-1][-1].isalnum() and not is_heading(next_stanza[0].strip())


def is_open(line: str) -> bool:
    """Whether a line of verse doesn't end a sentence, so that the next line continues it."""
    return line != "" and not ends_sentence(line) and not is_heading(line.strip())


def drop_page_numbers(lines: list[str]) -> list[str]:
    """The lines without blanks at their ends, and without those that are page numbers.

    A number just below text that ends with a full stop is kept: it ends a sentence, as in "the spring of / 1815."
    """
    kept = []
    for previous, line in pairwise(["", *lines]):
        line = line.rstrip()
        is_end = previous.strip() != "" and line[-1:] in (".", "!", "?", "”", '"')
        if not line or is_end or not PAGE_NUMBER.fullmatch(line):
            kept.append(line)
    return kept


def wrapping_width(block: list[str], usual_width: int) -> int:
    """The width to which the lines of a block were wrapped, in characters; 0 if they weren't.

    It is that of the whole text unless its lines are too long; then a block may still be wrapped, by its widest line.
    """
    if usual_width <= WIDEST_WRAPPED:
        return usual_width
    widest = max(map(len, block))
    return widest if WIDEST_WRAPPED // 2 <= widest <= WIDEST_WRAPPED else 0


def is_wrapped(previous: str, line: str, width: int) -> bool:
    """Whether a line goes on where the line above it stops: its first word would hardly have fitted there."""
    if not previous or not width:
        return False
    if line[0].isspace() and not previous[0].isspace():
        return False  # an indent begins a paragraph
    first_word = FIRST_WORD.match(line.lstrip())[0]
    # Lines of one text differ in width, hence four fifths.
    return len(previous) + 1 + len(first_word) > 0.8 * width


def is_torn(paragraph: str, line: str) -> bool:
    """Whether a page ended inside a paragraph that goes on with `line`.

    The paragraph then stops without punctuation, and it is a long one or the line begins with a small letter.
    """
    if is_heading(paragraph) or is_heading(line):
        return False
    if BEFORE_NAME.search(paragraph):
        return True
    if not paragraph[-1:].isalnum() and not ends_with_hyphen(paragraph):
        return False
    return line.lstrip()[0].islower() or len(paragraph) > LONGEST_HEADING
