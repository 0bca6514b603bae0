"""Records of Wikipedia to raw documents: pages of MediaWiki dumps, WikiExtractor's articles, rows of data sets.

An article keeps its running text, a paragraph a line. Templates, tables, notes, pictures, headings and the sections
that list references and links are left out. So are redirects, disambiguation pages and pages that aren't articles.
"""

import html
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

from corpus.sentences import PLACEHOLDER, clean_paragraph
from corpus.sources import RECORD_DAMAGED, RawDocument, Record, Source

DISAMBIGUATION_PAGE = "disambiguation pages"

# Headings of sections that list things rather than tell them, in the languages of the larger Wikipedias.
LIST_SECTIONS = {
    "references", "external links", "see also", "notes", "notes and references", "references and notes", "footnotes",
    "citations", "sources", "bibliography", "further reading", "works cited", "gallery",
    "einzelnachweise", "weblinks", "siehe auch", "literatur",
    "notes et références", "références", "liens externes", "voir aussi",
    "примечания", "ссылки", "см. также", "литература",
    "referencias", "enlaces externos", "véase también",
    "note", "collegamenti esterni", "altri progetti", "voci correlate",
    "ligações externas", "ver também", "referências",
}
# Those with which an article ends. The others may stand in its middle, which shows in wikitext by the levels of the
# headings but not in extracted text, where a heading is a line like any other.
CLOSING_SECTIONS = LIST_SECTIONS - {"notes", "sources", "bibliography", "gallery", "note", "literatur", "литература"}

# The templates that mark a disambiguation page, with up to a few words before their names ("{{Place name
# disambiguation}}"); in Italian and Portuguese "nota" and "ver" begin the names of hints on top of ordinary articles.
DISAMBIGUATION_TEMPLATE = re.compile(
    r"\{\{\s*+(?!(?:nota|ver) )(?:[\w –-]+ )?"
    r"(?:disambig|disambiguation|disamb|dab|hndis|geodis|begriffsklärung|homonymie|desambiguación|desambiguação|"
    r"disambigua|неоднозначность|αποσαφήνιση)(?: page| cleanup)?\s*[|}]|__DISAMBIG__",
    re.IGNORECASE)
# The first paragraph of such a page where the template is gone: "Foo may refer to:", without a full stop before.
MAY_REFER = re.compile(
    r"[^.]{0,200}\b(?:(?:may|can|could|might) (?:\w+ )?(?:refer to|mean|stand for)|refers to)\b[^.]*:")

REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)
HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)  # "== Title ==": its level in signs, its title
# What a reader of the page doesn't see at this place. The length of notes is bounded, because many notes without an
# end would cost quadratic time.
UNSEEN_MARKUP = re.compile(
    r"<!--.*?(?:-->|\Z)|"  # a comment, up to the end of the page if it isn't closed
    r"<ref\b[^<>]*/>|"  # a note that is written elsewhere
    r"<ref\b[^<>]*>(?:(?!<ref\b).){0,9999}?</ref\s*>|"  # a note, without another inside
    r"__[^\W\d_]+__",  # a switch, such as __NOTOC__
    re.DOTALL | re.IGNORECASE)
# Links between the languages, such as [[de:Titel]].
LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:\S|simple:\S")
# Names of the namespaces of files and categories that old links use in the dump of any language.
FILE_NAMES = "File|Image|Media|Category|Bild|Fichier|Imagen|Immagine|Imagem|Изображение"

# Tags and templates that show formulas, or text that isn't right without the template's own rules.
FORMULAS = {"math", "mvar", "tmath", "chem", "chem2", "ce", "hiero", "score", "val", "frac", "sfrac", "music",
            "us$"}
# Tags whose content isn't prose.
UNSEEN_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "graph", "mapframe", "maplink",
               "source", "syntaxhighlight", "pre", "templatestyles", "section", "indicator", "includeonly"}
LINE_TAGS = {"br", "li", "dd", "dt", "p"}  # that begin a new line
# The most frequent templates inside sentences, and what they show of their arguments. All others show nothing.
TEMPLATES = {
    "lang": "{2}", "nowrap": "{1}", "nobr": "{1}", "abbr": "{1}", "ill": "{1}", "interlanguage link": "{1}",
    "nihongo": "{1}", "as of": "As of {1}", "as of lc": "as of {1}", "circa": "c. {1}", "c.": "c. {1}",
    "nbsp": " ", "snd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—", "'": "'", "'s": "'s",
    "uss": "USS {1}", "hms": "HMS {1}", "ss": "SS {1}", "quote": "\n{1}\n", "blockquote": "\n{1}\n",
    "convert": "{1} {2}", "cvt": "{1} {2}",
}
RANGES = {"to", "and", "or", "by", "x", "-", "–"}  # the second argument of {{convert|5|to|10|km}}

# Tags of HTML that WikiExtractor leaves in its text. Others in angle brackets may belong to the text.
HTML_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|br|center|cite|code|dd|div|dl|dt|em|font|h\d|hr|i|li|nowiki|ol|p|poem|ref|s|small|"
    r"span|strike|strong|su[bp]|t[dhrt]|table|tt|u|ul|var)\b[^<>]*>", re.IGNORECASE)
# Lines of lists in the text of older versions of WikiExtractor, which write "Section::::" before a heading.
EXTRACTOR_LIST_LINE = re.compile(r"^(?:BULLET|INDENT|NUMBERED)::::.*$", re.MULTILINE)


# Pages of a dump


def parse_pages(source: Source, record: bytes) -> Iterator[RawDocument]:
    """The page of a MediaWiki dump with which the record ends, then the damaged ones before it, if there are any."""
    head, *pages = record.split(b"<page>")
    damaged = pages[:-1]  # pages without an end: another one begins inside
    if b"<title>" in head:
        damaged.append(head)  # a page without its beginning
    if pages:
        try:
            tree = ElementTree.fromstring(b"<page>" + pages[-1])
        except ElementTree.ParseError:
            damaged.append(pages[-1])
        else:
            yield parse_page(tree, source.hidden_namespaces)
    for page in damaged:
        yield RawDocument(record_title(source, page), [], RECORD_DAMAGED)


def parse_page(page: ElementTree.Element, hidden_namespaces: str) -> RawDocument:
    title = page.findtext("title", "")
    revisions = page.findall("revision/text")
    wikitext = (revisions[-1].text or "") if revisions else ""
    if page.findtext("ns", "0") != "0":
        return RawDocument(title, [], "pages of other namespaces")
    if page.find("redirect") is not None or REDIRECT.match(wikitext):
        return RawDocument(title, [], "redirects")
    if "(disambiguation)" in title or DISAMBIGUATION_TEMPLATE.search(wikitext):
        return RawDocument(title, [], DISAMBIGUATION_PAGE)
    return RawDocument(title, clean_paragraphs(wikitext_to_prose(wikitext, hidden_namespaces)))


def record_title(source: Source, record: Record) -> str:
    """What a message calls a record, which may be damaged: the title of its last page or article, and its source."""
    text = record.decode(errors="replace") if isinstance(record, bytes) else str(record)
    page = text.rpartition("<page>")[2][:2_000]
    title = re.search(r"<title>([^<\n]{0,300})</title>|<doc [^>\n]{0,999}?title=\"([^\n]{0,300}?)\">", page)
    if title is None:
        return source.name
    return f"{html.unescape(title[1] or title[2])} in {source.name}"


# Wikitext


def wikitext_to_prose(wikitext: str, hidden_namespaces: str) -> str:
    """What a page shows as prose: a paragraph a line, PLACEHOLDER for formulas."""
    names = f"{FILE_NAMES}|{hidden_namespaces}" if hidden_namespaces else FILE_NAMES
    hidden_link = re.compile(rf"\s*(?:{names})\s*:", re.IGNORECASE)
    sections = drop_list_sections(UNSEEN_MARKUP.sub("", wikitext))
    return visible_text(mwparserfromhell.parse(sections), hidden_link)


def drop_list_sections(wikitext: str) -> str:
    """Wikitext without its headings, and without LIST_SECTIONS with the sections below them."""
    parts = []
    start = 0
    dropped_level = 0  # of the heading whose section is being dropped; 0 where none is
    for heading in HEADING.finditer(wikitext):
        if not dropped_level:
            parts.append(wikitext[start:heading.start()])
        level = len(heading[1])
        if not dropped_level or level <= dropped_level:
            title = heading[2].strip("' \t").casefold()
            dropped_level = level if title in LIST_SECTIONS else 0
        start = heading.end()
    if not dropped_level:
        parts.append(wikitext[start:])
    return "\n".join(parts)


def visible_text(code: Wikicode, hidden_link: re.Pattern) -> str:
    """The text that a reader sees of parsed wikitext, without the links whose titles match `hidden_link`."""
    return "".join(node_text(node, hidden_link) for node in code.nodes)


def node_text(node: nodes.Node, hidden_link: re.Pattern) -> str:
    if isinstance(node, nodes.Text):
        return node.value
    if isinstance(node, nodes.Wikilink):
        return link_text(node, hidden_link)
    if isinstance(node, nodes.ExternalLink):
        return "" if node.title is None else visible_text(node.title, hidden_link)
    if isinstance(node, nodes.HTMLEntity):
        return html.unescape(str(node))
    if isinstance(node, nodes.Template):
        return template_text(node, hidden_link)
    if isinstance(node, nodes.Tag):
        return tag_text(node, hidden_link)
    return ""


def link_text(link: nodes.Wikilink, hidden_link: re.Pattern) -> str:
    title = str(link.title)
    if hidden_link.match(title):
        return ""
    if link.text is not None:
        return visible_text(link.text, hidden_link)
    return "" if LANGUAGE_LINK.match(title) else title.lstrip(":")


def tag_text(tag: nodes.Tag, hidden_link: re.Pattern) -> str:
    name = str(tag.tag).strip().lower()
    if name in FORMULAS:
        return PLACEHOLDER
    line_break = "\n" if name in LINE_TAGS else ""
    if name in UNSEEN_TAGS or tag.contents is None:
        return line_break
    return line_break + visible_text(tag.contents, hidden_link)


def template_text(template: nodes.Template, hidden_link: re.Pattern) -> str:
    name = str(template.name).strip().casefold()
    if name in FORMULAS:
        return PLACEHOLDER
    if name == "as of" and template.has("lc"):
        name = "as of lc"
    if name not in TEMPLATES:
        return ""
    arguments = {}
    for argument in template.params:
        arguments[str(argument.name).strip()] = visible_text(argument.value, hidden_link).strip()
    pattern = TEMPLATES[name]
    if name in ("convert", "cvt") and arguments.get("2") in RANGES:
        pattern = "{1} {2} {3} {4}"
    return re.sub(r"\{(\d)\}", lambda place: arguments.get(place[1], ""), pattern)


# Articles as plain text


def parse_extracted(source: Source, record: bytes) -> Iterator[RawDocument]:
    """The articles of WikiExtractor's output in a record: all but the last lack their end and are damaged."""
    _, *articles = record.decode(errors="replace").split("<doc ")
    for number, article in enumerate(articles, 1):
        attributes, _, text = article.replace("\r\n", "\n").partition(">\n")
        title = record_title(source, f"<doc {attributes}>")
        if number < len(articles) or not text.endswith("</doc>"):
            yield RawDocument(title, [], RECORD_DAMAGED)
            continue
        body = text.removesuffix("</doc>").partition("\n")[2]  # the first line is the title
        yield parse_article(title, body)


def parse_row(source: Source, record: str) -> Iterator[RawDocument]:
    """The article that a row of a data set is; its beginning serves as its title."""
    yield parse_article(record[:80], record)


def parse_article(title: str, text: str) -> RawDocument:
    """An article as plain text, with a paragraph or a heading a line."""
    text = EXTRACTOR_LIST_LINE.sub("", text.replace("\nSection::::", "\n"))
    lines = []
    for line in text.split("\n"):
        if line.strip(" .:").casefold() in CLOSING_SECTIONS:
            break
        lines.append(line)
    paragraphs = clean_paragraphs("\n".join(lines))
    first_paragraph = next(filter(None, paragraphs), "")
    if "(disambiguation)" in title or MAY_REFER.fullmatch(first_paragraph):
        return RawDocument(title, paragraphs, DISAMBIGUATION_PAGE)
    return RawDocument(title, paragraphs)


def clean_paragraphs(text: str) -> list[str]:
    """The lines of an article without tags, emphasis and gaps."""
    text = HTML_TAG.sub("", html.unescape(text))
    text = text.replace("'''", "").replace("''", "")
    return [clean_paragraph(line) for line in text.split("\n")]
