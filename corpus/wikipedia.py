"""Records of Wikipedia to raw documents: pages of MediaWiki dumps, WikiExtractor's articles, rows of data sets.

An article keeps its running text, a paragraph a line. Tables, notes, pictures, headings and the sections that list
references and links are left out. So are redirects, disambiguation pages and pages that aren't articles.
"""

import html
import re
from collections.abc import Iterator
from itertools import groupby
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

from corpus.sentences import (FORMULA, UNKNOWN_TEMPLATE, WIDEST_WRAPPED, clean_paragraph, ends_sentence, is_verse,
                              join_paragraph)
from corpus.sources import RECORD_DAMAGED, RawDocument, Record, Source
from corpus.templates import shown_text

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
    "przypisy", "linki zewnętrzne", "zobacz też", "uwagi", "bibliografia",
    "bronnen", "referenties", "externe link", "externe links", "zie ook", "voetnoten", "noten", "literatuur",
    "bronnen, noten en/of referenties",
    "脚注", "出典", "注釈", "参考文献", "関連項目", "外部リンク", "関連文献", "注釈・出典", "出典・注釈",
    "参考资料", "參考資料", "参考来源", "參考來源", "參考文獻", "注释", "註釋", "外部链接", "外部連結",
    "参见", "參見", "参看", "相关条目", "相關條目", "延伸阅读", "延伸閱讀",
    "پانویس", "منابع", "پیوند به بیرون", "جستارهای وابسته", "یادداشت\u200cها",
    "सन्दर्भ", "संदर्भ", "बाहरी कड़ियाँ", "इन्हें भी देखें",
}
# Those with which an article ends. The others may stand in its middle, which shows in wikitext by the levels of the
# headings but not in extracted text, where a heading is a line like any other.
CLOSING_SECTIONS = LIST_SECTIONS - {"notes", "sources", "bibliography", "gallery", "note", "literatur", "литература",
                                    "literatuur", "uwagi", "bibliografia", "出典", "注释", "منابع"}

# The templates that mark a disambiguation page, with up to a few words before their names ("{{Place name
# disambiguation}}"); in Italian and Portuguese "nota" and "ver" begin the names of hints on top of ordinary articles.
DISAMBIGUATION_TEMPLATE = re.compile(
    r"\{\{\s*+(?!(?:nota|ver) )(?:[\w –-]+ )?"
    r"(?:disambig|disambiguation|disamb|dab|hndis|geodis|begriffsklärung|homonymie|desambiguación|desambiguação|"
    r"disambigua|неоднозначность|αποσαφήνιση|ujednoznacznienie|dp|aimai|曖昧さ回避|消歧义|消歧義|"
    r"ابهام.?زدایی|बहुविकल्पी शब्द)(?: page| cleanup)?\s*[|}]|__DISAMBIG__",
    re.IGNORECASE)
# The first paragraph of such a page where the template is gone: "Foo may refer to:", without a full stop before.
MAY_REFER = re.compile(
    r"[^.]{0,200}\b(?:(?:may|can|could|might) (?:\w+ )?(?:refer to|mean|stand for)|refers to)\b[^.]*:")

REDIRECT = re.compile(r"\s*#(?:redirect|[^\W\d_]+\s*[:：]?\s*\[\[)", re.IGNORECASE)  # the word in any language
HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)  # "== Title ==": its level in signs, its title
# What a reader of the page doesn't see at this place. The length of notes is bounded, because many notes without an
# end would cost quadratic time.
UNSEEN_MARKUP = re.compile(
    r"<!--.*?(?:-->|\Z)|"  # a comment, up to the end of the page if it isn't closed
    r"<ref\b[^<>]*/>|"  # a note that is written elsewhere
    r"<ref\b[^<>]*>(?:(?!<ref\b).){0,9999}?</ref\s*>|"  # a note, without another inside
    r"(?-i:__(?:[^\W\d_a-z]|_(?!_))+__)",  # a switch, such as __NOTOC__
    re.DOTALL | re.IGNORECASE)
# Links between the languages, such as [[de:Titel]].
LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:\S|simple:\S")
# Names of the namespaces of files and categories that old links use in the dump of any language.
FILE_NAMES = ("File|Image|Media|Category|Datei|Bild|Fichier|Imagen|Immagine|Imagem|Изображение|Plik|Grafika|Bestand|"
              "Afbeelding|ファイル|画像|文件|檔案|档案|图像|圖像|پرونده|تصویر|चित्र")

# Tags and templates that show formulas, or text that isn't right without the template's own rules.
FORMULAS = {"math", "mvar", "tmath", "chem", "chem2", "ce", "hiero", "score", "val", "frac", "sfrac", "music",
            "us$"}
# Tags whose content isn't prose.
UNSEEN_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "graph", "mapframe", "maplink",
               "pre", "templatestyles", "section", "indicator", "includeonly"}
PARSER_FUNCTIONS = {"formatnum", "lc", "uc", "lcfirst", "ucfirst"}  # that show their argument
CODE_TAGS = {"source", "syntaxhighlight"}  # whose content may be part of a sentence
LINE_TAGS = {"li", "dt", "p"}  # that begin a new line
MARKED_TAGS = {"br": "\v", "dd": "\r"}  # whose lines may be verse
LINE_BREAK = re.compile(r"[ \t]*\v\s*")  # what <br> leaves, of several and of the ends of lines only one
# Where an indented line, which begins with the mark of its tag, is apart: from a term that it defines, and from lines
# before and behind it that aren't indented.
APART_INDENT = re.compile(r"(?<=[^\n\r])\r+|^([^\r\n].*)\n(?=\r)|^(\r.*)\n(?=[^\r\n])", re.MULTILINE)

PAGE_NAME = re.compile(r"\{\{\s*(?:FULL|BASE|SUB)?PAGENAME\s*\}\}")
# Templates that are not known and whose gaps no sentence shows: those that have their line to themselves; those before the
# bold title at the beginning of a line; notes right behind punctuation; and what follows the last full stop of a line.
GAP = UNKNOWN_TEMPLATE
GAPS = rf"[ \t{GAP}]*"
APART_TEMPLATE = re.compile(
    rf"^\r*{GAPS}{GAP}{GAPS}(?=$|\'\'\')|(?<=[.,;:!?…»”\")]){GAP}+(?=\s|$)|(?<=[.!?。！？」』）]){GAPS}{GAP}{GAPS}$",
    re.MULTILINE)
# An addition in brackets in which such a template stands, and the parts of it that hold nothing else but a label.
INSIDE = r"(?:[^()（）\n]|\([^()（）\n]*\))*"
BRACKETS = re.compile(rf"[ \t]*[(（]({INSIDE}{GAP}{INSIDE})[)）]")
CONJUNCTION = r"\b(?:or|and|und|oder|et|ou|y|o|e|и)\b"
UNKNOWN_PART = re.compile(
    rf"(?:[^:：]{{1,40}}[:：])?[\s\[\]\"“”„«»/–-]*{GAP}(?:[\s{GAP}\[\]\"“”„«»:/–-]|{CONJUNCTION})*|"
    rf"(?:[\s/]|{CONJUNCTION})*")

# A choice between variants of Chinese and other languages, with its flags: "-{zh-hans:接;zh-hant:線}-".
VARIANTS = re.compile(r"-\{(?:([A-Z+-]{1,2}|[a-z-]+(?:;[a-z-]+)*)\|)?([^{}]*)\}-")
VARIANT = re.compile(r"(?:^|;)\s*(?:[^;:]*=>)?\s*([a-z]{2,3}(?:-[a-z]+)*)\s*:\s*([^;]*)")
PREFERRED_VARIANTS = ("zh-hans", "zh-cn", "zh")  # one writing for the whole corpus, where there is a choice
UNSEEN_VARIANT_FLAGS = {"H", "T", "-"}  # rules for other places, titles

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
            yield parse_page(tree, source)
    for page in damaged:
        yield RawDocument(record_title(source, page), [], RECORD_DAMAGED)


def parse_page(page: ElementTree.Element, source: Source) -> RawDocument:
    title = page.findtext("title", "")
    # The newest revision; of several without a timestamp the last.
    revisions = sorted(page.iterfind("revision"), key=lambda revision: revision.findtext("timestamp", ""))
    wikitext = revisions[-1].findtext("text", "") if revisions else ""
    if not is_article(title, page.findtext("ns"), source.namespaces):
        return RawDocument(title, [], "pages of other namespaces")
    if page.find("redirect") is not None or REDIRECT.match(wikitext):
        return RawDocument(title, [], "redirects")
    if "(disambiguation)" in title or DISAMBIGUATION_TEMPLATE.search(wikitext):
        return RawDocument(title, [], DISAMBIGUATION_PAGE)
    wikitext = PAGE_NAME.sub(lambda _: title, wikitext)
    return RawDocument(title, clean_paragraphs(wikitext_to_prose(wikitext, source.hidden_namespaces)))


def is_article(title: str, namespace: str | None, namespaces: str) -> bool:
    """Whether a page is an article: by its namespace, or by its title in dumps that are too old to have that."""
    if namespace is not None:
        return namespace == "0"
    prefix, colon, _ = title.partition(":")
    return not colon or re.fullmatch(namespaces, prefix.strip(), re.IGNORECASE) is None


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
    """What a page shows as prose: a paragraph a line, FORMULA and UNKNOWN_TEMPLATE for what has gone."""
    names = f"{FILE_NAMES}|{hidden_namespaces}" if hidden_namespaces else FILE_NAMES
    hidden_link = re.compile(rf"\s*(?:{names})\s*:", re.IGNORECASE)
    sections = drop_list_sections(choose_variants(UNSEEN_MARKUP.sub("", wikitext)))
    text = visible_text(mwparserfromhell.parse(sections), hidden_link)
    if UNKNOWN_TEMPLATE in text:
        text = BRACKETS.sub(drop_unknown_parts, APART_TEMPLATE.sub("", text))
    if "\r" in text:
        text = APART_INDENT.sub(r"\1\2\n\n", text).replace("\r", "")
    lines = [line.rstrip() for line in LINE_BREAK.sub("\n", text).split("\n")]
    return "\n".join(join_open_lines(lines))


def join_open_lines(lines: list[str]) -> Iterator[str]:
    """The lines of an article; in verse and in paragraphs of several lines those that don't end a sentence are joined."""
    for is_short, group in groupby(lines, lambda line: 0 < len(line) <= WIDEST_WRAPPED):
        block = list(group)
        is_code = all(line.startswith(" ") for line in block)
        if not is_short or is_code or not is_verse(block):
            yield from block
            continue
        first = 0
        for number, line in enumerate(block, 1):
            if ends_sentence(line) or number == len(block):
                yield from join_paragraph(block[first:number])
                first = number


def choose_variants(text: str) -> str:
    """Text with one of the variants where it offers several: the first of PREFERRED_VARIANTS, or the first of all."""
    return VARIANTS.sub(choose_variant, text) if "-{" in text else text


def choose_variant(variants: re.Match) -> str:
    flags, rule = variants.groups()
    if flags in UNSEEN_VARIANT_FLAGS:
        return ""
    texts = {language: text.strip() for language, text in VARIANT.findall(rule)}
    preferred = [texts[language] for language in PREFERRED_VARIANTS if language in texts]
    return [*preferred, *texts.values(), rule][0]


def drop_unknown_parts(brackets: re.Match) -> str:
    """Brackets without the parts that are nothing but templates which are not known; "" if nothing else is in them."""
    parts = re.split(r"([;；,，、])", brackets[1])
    kept = []
    for part, separator in zip(parts[::2], [*parts[1::2], ""], strict=True):
        if not UNKNOWN_PART.fullmatch(part):
            kept += [part, separator]
    if not "".join(kept).strip():
        return ""
    inner = "".join(kept).strip().rstrip(";；,，、")
    return brackets[0].replace(brackets[1], inner)




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
    parts = []
    at_line_start = True
    for node in code.nodes:
        part = node_text(node, hidden_link)
        if part == UNKNOWN_TEMPLATE and at_line_start and "\n" in str(node):
            continue  # a box, even if text follows right behind it
        parts.append(part)
        at_line_start = part.endswith("\n") or (at_line_start and not part.strip())
    return "".join(parts)


def node_text(node: nodes.Node, hidden_link: re.Pattern) -> str:
    if isinstance(node, nodes.Text):
        return node.value
    if isinstance(node, nodes.Wikilink):
        return link_text(node, hidden_link)
    if isinstance(node, nodes.ExternalLink):
        return external_link_text(node, hidden_link)
    if isinstance(node, nodes.HTMLEntity):
        return html.unescape(str(node))
    if isinstance(node, nodes.Template):
        return template_text(node, hidden_link)
    if isinstance(node, nodes.Tag):
        return tag_text(node, hidden_link)
    return ""


def external_link_text(link: nodes.ExternalLink, hidden_link: re.Pattern) -> str:
    if link.title is not None:
        return visible_text(link.title, hidden_link)
    return "" if link.brackets else str(link.url)


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
        return FORMULA
    if name in CODE_TAGS:
        return UNKNOWN_TEMPLATE
    if name in MARKED_TAGS:
        return MARKED_TAGS[name]
    line_break = "\n" if name in LINE_TAGS else ""
    if name in UNSEEN_TAGS or tag.contents is None:
        return line_break
    text = visible_text(tag.contents, hidden_link)
    if name == "b":
        return f"'''{text}'''"  # removed in the end; it shows where the text of an article begins
    if name == "poem":
        return "\n\n" + text.replace("\r", "") + "\n\n"
    return line_break + text


def template_text(template: nodes.Template, hidden_link: re.Pattern) -> str:
    """What a template shows; UNKNOWN_TEMPLATE for one that is neither in the table nor silent."""
    name = " ".join(str(template.name).replace("_", " ").split()).casefold()
    if name in FORMULAS:
        return FORMULA
    arguments = {}
    function, colon, value = str(template.name).partition(":")
    if colon and function.strip().casefold() in PARSER_FUNCTIONS:
        return visible_text(mwparserfromhell.parse(value.strip()), hidden_link)
    for argument in template.params:
        arguments[str(argument.name).strip()] = visible_text(argument.value, hidden_link).strip()
    text = shown_text(name, arguments)
    return UNKNOWN_TEMPLATE if text is None else text


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
    text = EXTRACTOR_LIST_LINE.sub("", choose_variants(text).replace("\nSection::::", "\n"))
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
