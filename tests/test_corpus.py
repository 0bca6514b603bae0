"""The package corpus: sources of every format become the lines that a reader would write down by hand."""

import bz2
import gzip
import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from corpus import __main__ as command
from corpus import conversion, documentation, sources, wikipedia
from corpus.books import has_sentence_lines, join_wrapped_lines
from corpus.documentation import docstring_paragraphs, documentation_corpus
from corpus.sentences import split_sentences
from dataset import read_lines

ROOT = Path(__file__).parent.parent

PAGE = """  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>7</id>{redirect}
    <revision>
      <text xml:space="preserve">{text}</text>
    </revision>
  </page>
"""
HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="en">
  <siteinfo><namespaces><namespace key="6" case="first-letter">Datei</namespace></namespaces></siteinfo>
"""
WIKITEXT = """{{Infobox river | name = Foo | length = {{convert|5|km}} }}
[[File:Foo.jpg|thumb|left|The [[river]] in [[spring]].]] [[Datei:Bar.jpg|mini|Ein Bild, das niemand sehen soll.]]
{| class="wikitable"
|-
| a table || that is dropped
|}
The '''Foo''' ({{IPA|fu}}; {{lang|de|Fu}}) is a [[river (water)|river]] in the [[U.S.]] state of [[Ohio]].\
<ref name="a">{{cite web|title=Rivers}}</ref>\
 It is {{convert|5|km}} long &amp; deep<ref name="a" />, as Dr. Smith said.<!-- not shown --> Its\
 area is <math>x^2</math> large. It was ''first'' seen by [http://x.org J. R. Bar] on 5 May 1802 ( , ).

== History ==
* an entry of a list
* Another entry that is a whole sentence, and a good one.
Nobody knew the river before the year [[1802]] at all.
=== See also ===
* [[Something that nobody wants to read here.]]
== Geography ==
The river runs &ndash; slowly &ndash; into the {{nowrap|great lake}} of the north.\
<gallery>File:A.jpg|A picture.</gallery>
== References ==
{{reflist}} The references are left out of this text altogether.
[[Category:Rivers]] [[de:Fu]]
"""
LINES = """The Foo (Fu) is a river in the U.S. state of Ohio.
It is 5 km long & deep, as Dr. Smith said.
It was first seen by J. R. Bar on 5 May 1802.
Another entry that is a whole sentence, and a good one.
Nobody knew the river before the year 1802 at all.
The river runs – slowly – into the great lake of the north.
""".splitlines()
PROSE = "The cat number {} sat on the mat, as cats will do. It was content."


def page(title, text, ns=0, redirect=""):
    return PAGE.format(title=html.escape(title), text=html.escape(text), ns=ns, redirect=redirect)


def dump(*pages):
    return HEAD + "".join(pages) + "</mediawiki>\n"


def cats(first, last):
    return [page(f"Cat {n}", PROSE.format(n)) for n in range(first, last)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def convert(tmp_path, capfd):
    """Runs the command; returns its exit code, the documents it wrote and what it printed."""
    def run(*flags, output="corpus.txt"):
        code = command.main([*map(str, flags), "--output", str(tmp_path / output)])
        path = tmp_path / output
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        assert text == "" or text.endswith("\n\n")
        printed = capfd.readouterr()
        return code, [document.split("\n") for document in text.split("\n\n")[:-1]], printed.out + printed.err
    return run


def cat_lines(*numbers):
    return [[f"The cat number {n} sat on the mat, as cats will do.", "It was content."] for n in numbers]


# Wikipedia


def test_a_dump_becomes_clean_sentences(tmp_path, convert):
    path = write(tmp_path / "wiki.xml", dump(
        page("Foo", WIKITEXT), page("Old Foo", "#REDIRECT [[Foo]]", redirect='\n    <redirect title="Foo" />'),
        page("Talk:Foo", PROSE, ns=1),
        page("Foo (disambiguation)", "'''Foo''' may refer to many things, which are named in the following list:"),
        page("Fu", "'''Fu''' is written in many ways, all of which are shown here.\n{{Place name disambiguation}}"),
        page("Nothing", "{{stub}}"), *cats(1, 2)))
    code, documents, printed = convert("--wiki", path)
    assert code == 0
    assert documents == [LINES, *cat_lines(1)]
    for count, name in ((2, "documents"), (8, "sentences"), (1, "redirects"), (1, "pages of other namespaces"),
                        (2, "disambiguation pages"), (1, "documents without prose"),
                        (1, "sentences with formulas or left-over markup")):
        assert f"{count} {name}\n" in printed


def test_compressed_multistream_and_split_dumps_are_read_alike(tmp_path, convert):
    whole = dump(*cats(0, 9)).encode()
    middle = whole.index(b"  <page>", len(whole) // 2)
    write(tmp_path / "a" / "enwiki-pages-articles.xml", whole)
    write(tmp_path / "b" / "enwiki-multistream.xml.bz2", bz2.compress(whole[:middle]) + bz2.compress(whole[middle:]))
    write(tmp_path / "c" / "enwiki-articles1.xml-p1p5.gz", gzip.compress(whole[:middle]))
    write(tmp_path / "c" / "enwiki-articles2.xml-p6p9", whole[middle:])
    for name in "abc":
        assert convert("--wiki", tmp_path / name, output=f"{name}.txt")[:2] == (0, cat_lines(*range(9)))


def test_unbalanced_wikitext_leaves_no_markup(tmp_path, convert):
    texts = ["A page with {{an open template and [[an open link in it. "
             "The next sentence of it is quite fine, I hope.",
             "}} ]] The brackets close what was never opened here. '''Bold without an end. "
             "{| A table that is left open.",
             "|- The row || of a table. <ref>An open note in the text. "
             "<div style='x'>The block is open, too, all the way.",
             "Some &nbsp;&amp;nbsp; and &lt;b&gt; entities of all sorts are in this &copy; sentence. "
             "== Not a heading =="]
    pages = [page(text[:5], text) for text in texts]
    code, documents, _ = convert("--wiki", write(tmp_path / "w.xml", dump(*pages, *cats(0, 1))))
    text = "\n".join(line for document in documents for line in document)
    assert code == 0
    assert "The next sentence of it is quite fine, I hope." in text
    assert not any(mark in text for mark in ("{{", "}}", "[[", "]]", "'''", "||", "<", "&nbsp;", "&lt;", "{|", "=="))


def test_extracted_articles_and_rows_become_the_same_lines(tmp_path, convert):
    text = (f"{PROSE.format(1)}\nHistory.\nThe cat &amp; the dog () live in the house ( , 1900) , as formula_1 shows.\n"
            "The cat was seen by &lt;br&gt; Mr. Brown in the garden.\n"
            "See also.\nThe other cats are listed here, all.\n")
    expected = [[*cat_lines(1)[0], "The cat was seen by Mr. Brown in the garden."]]
    write(tmp_path / "doc" / "AA" / "wiki_00", f'<doc id="1" url="u" title="Cat">\nCat\n\n{text}\n</doc>\n'
          '<doc id="2" url="u" title="Dog">\nDog\n\n'
          'A "dog" may also refer to the following pages of this work:\n\n</doc>\n')
    rows = [{"id": "1", "url": "u", "title": "Cat", "text": text},
            {"text": "Dog may refer to these pages of this work:"}]
    write(tmp_path / "json" / "AA" / "wiki_00", "".join(json.dumps(row) + "\n" for row in rows))
    data = datasets.Dataset.from_list([{"text": row["text"]} for row in rows])
    data.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    data.save_to_disk(tmp_path / "arrow")
    for name in ("doc", "json", "parquet", "arrow"):
        code, documents, printed = convert("--wiki", tmp_path / name, output=f"{name}.txt")
        assert (code, documents) == (0, expected), name
        assert "1 disambiguation pages" in printed and "damaged" not in printed


def test_a_data_set_on_the_hub_is_streamed(tmp_path, convert, monkeypatch):
    asked = []

    def load_dataset(*names, **how):
        asked.append((*names, how))
        return datasets.Dataset.from_list([{"text": PROSE.format(n)} for n in range(3)]).to_iterable_dataset()
    monkeypatch.setattr(sources, "reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert convert("--wiki", "wikimedia/wikipedia:20231101.en")[:2] == (0, cat_lines(0, 1, 2))
    # Once to check that it is there, once to read it.
    assert asked == 2 * [("wikimedia/wikipedia", "20231101.en", {"split": "train", "streaming": True})]


def test_a_hub_out_of_reach_ends_in_one_message_before_any_conversion(tmp_path, convert, monkeypatch):
    def unreachable():
        raise OSError("no route")
    monkeypatch.setattr(sources, "reach_hub", unreachable)
    monkeypatch.setattr(command, "convert_units", None)  # never called
    write(tmp_path / "w" / "w.xml", dump(*cats(0, 3)))
    code, documents, printed = convert("--wiki", tmp_path / "w", "wikimedia/wikipedia:20231101.en")
    assert (code, documents) == (2, [])
    assert "could not be downloaded" in printed.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("text, expected", [
    ("''Foo'' ({{lang-ru|Фу}}, [{{IPA|fu}}]) is “{{lang|de|gut}}” and (“{{x}}”) here.", "Foo is “gut” and here."),
    ("__NOTOC__ The foo is {{convert|5|to|10|km}} long and 5{{nbsp}}km wide.",
     "The foo is 5 to 10 km long and 5 km wide."),
    ("{{As of|2010}}, the foo has {{as of|2011|lc=y}} no name.", "As of 2010, the foo has as of 2011 no name."),
    ("{{nota disambigua|il fiume|Foo}}The river is called the foo by all.", "The river is called the foo by all."),
    ("{{disambiguation page}} The foo is one of many things, all of them here.", None),
    ("The {{USS|Foo}} cost {{US$|5 million}} in all. The ship was sold in the year after.",
     "The ship was sold in the year after."),
    ("[[Bild:Foo.jpg|mini|Ein Bild. Und noch ein Satz darunter.]]The foo is shown in the picture.",
     "The foo is shown in the picture."),
    ("The foo is long.\n== Notes ==\nThese are notes.\n=== Books ===\nThis is a book.\n== Uses ==\nIt is used.",
     "The foo is long. It is used."),
    ("The foo is long and wide.\n== Siehe auch ==\nThis is a list of other pages.\n"
     "==  Foo\t==\nIt ends in a quiet lake.",
     "The foo is long and wide. It ends in a quiet lake.")])
def test_templates_links_and_sections_of_other_dumps_become_prose(tmp_path, convert, monkeypatch, text, expected):
    monkeypatch.setattr(conversion, "SHORTEST_PARAGRAPH", 1)
    documents = convert("--wiki", write(tmp_path / "w.xml", dump(page("Foo", text), *cats(0, 1))))[1]
    assert [" ".join(lines) for lines in documents[:-1]] == ([expected] if expected else [])


@pytest.fixture
def sentences(tmp_path, convert, monkeypatch):
    """The sentences of an article with this wikitext, however short, and what was printed."""
    monkeypatch.setattr(conversion, "SHORTEST_PARAGRAPH", 1)

    def run(text, *flags):
        path = write(tmp_path / "w.xml", dump(page("Foo", text), *cats(0, 1)))
        _, documents, printed = convert("--wiki", path, *flags)
        return [line for document in documents[:-1] for line in document], printed
    return run


@pytest.mark.parametrize("text, expected", [
    # What is shown: links to other wikis, numbers, foreign words, titles, signs.
    ("Die Sage nennt {{ill|Odo|fr|Odon|lt=Odo den Alten}} und {{Nowrap|drei Söhne}}.",
     "Die Sage nennt Odo den Alten und drei Söhne."),
    ("翌年に{{仮リンク|青の塔|en|Blue Tower|label=青塔}}が建てられた。", "翌年に青塔が建てられた。"),
    ("該協議由{{link-en|某人|Somebody}}及{{tsl|en|Other|他人|另一人}}提出。", "該協議由某人及另一人提出。"),
    ("Elle mesure {{unité|12|km|2}}, selon {{Mme|Petit}} et {{Lien|langue=en|fr=Jean Dupré|trad=John}}.",
     "Elle mesure 12 km2, selon Mme Petit et Jean Dupré."),
    ("Книгу написал {{нп5|Джон Доу||en|John Doe}}, ей {{nobr|5 лет}}.", "Книгу написал Джон Доу, ей 5 лет."),
    ("Mieszka tu {{formatnum:12500}} osób{{r|spis}}, {{fakt|dużo|data=2010}}.", "Mieszka tu 12500 osób, dużo."),
    ("It holds {{convert|5|-|6|m3}} of {{transl|ru|kvas}} and is {{convert|6|ft|2|in|cm}} high.",
     "It holds 5–6 m3 of kvas and is 6 ft 2 in high."),
    ("El {{siglo|XV||s}} fue largo.{{cita requerida}}", "El siglo XV fue largo."),
    ("{{PAGENAME}} is what the page is called.", "Foo is what the page is called."),
    # What is silent: notes, pronunciation, marks of doubt, anchors, coordinates, boxes.
    ("The mill{{sfn|Doe|1990}} stands{{by whom?}} here{{citation needed|date=May 2001}}, at {{coord|1|2}} a brook.",
     "The mill stands here, at a brook."),
    ("{{Infobox mill\n| name = Mill\n}}'''The mill''' {{IPAc-en|m|ɪ|l}} is old.{{odd note|1}} It is{{Anchor|x}} tall.",
     "The mill is old. It is tall."),
    ("این شهر{{مدرک}} بزرگ است.", "این شهر بزرگ است."),
    # Brackets lose what is not known, a sentence is left out with it.
    ("The mill ({{native name|xx|Mul}}; {{IPA|x}} or {{respell|X}}; old: {{strange|y}}, built 1802) is old.",
     "The mill (built 1802) is old."),
    ("東京（{{謎|x}}）は「{{lang|en|big}}」だ。", "東京は「big」だ。"),
    ("The {{strange|tall}} mill is old. It is kept.\nNobody saw {{odd}}. The mill {{strange}}, they say, burns.",
     "It is kept."),
    ("{{Odd}} was a mill.\n{{Odd box|1}}\n'''It''' was old.\n{{odd|1}} '''It''' fell. {{clear odd}}",
     "It was old. It fell."),
    ("See http://a.org/b for all.[http://a.org] The <syntaxhighlight inline>x</syntaxhighlight> is code.",
     "See http://a.org/b for all."),
    # Variants of Chinese.
    ("快速-{zh-hans:连接;zh-hant:連線}-和-{A|zh-tw:軟體; zh-cn:软件}-在-{里}-。-{H|zh-cn:甲;zh-tw:乙}-[[A|-{zh-tw:丙}-]]"
     "好。",
     "快速连接和软件在里。 丙好。"),
    # Characters that only look like markup.
    ("The __init__ of main() sets x[] and y[:5] (1,) for AT&amp;T; R&amp;D; and &amp;amp;nbsp;co. #1 is &lt;3.",
     "The __init__ of main() sets x[] and y[:5] (1,) for AT&T; R&D; and co. #1 is <3."),
    # Verse and other lines of one paragraph.
    ("<poem>\nThe wind was a torrent\n:of darkness among\nthe gusty trees,\nthe moon was a ghost.\n\nThe road\nwas long;\n"
     "a ribbon\n</poem>\n:One line,<br />another\n:ends.\nIt goes on\nin prose.\n;Term\n:Its meaning.",
     "The wind was a torrent of darkness among the gusty trees, the moon was a ghost. The road was long; "
     "One line, another ends. It goes on in prose. Its meaning.")])
def test_a_sentence_is_whole_or_left_out(sentences, text, expected):
    assert " ".join(sentences(text)[0]) == expected


def test_sentences_with_templates_that_are_not_known_are_counted(sentences):
    lines, printed = sentences("The {{strange|tall}} mill is old. It is kept. It {{odd}}.")
    assert lines == ["It is kept."]
    assert "2 sentences with templates that are not known\n" in printed


@pytest.mark.parametrize("heading", ["脚注", "外部链接", "Zie ook", "Przypisy", "منابع", "बाहरी कड़ियाँ"])
def test_list_sections_and_pictures_of_other_wikis_are_left_out(sentences, heading):
    text = ("It stays.[[Plik:A.jpg|mini|A picture. Not text.]][[ファイル:B.jpg|thumb|Nor this.]]\n"
            f"== {heading} ==\nThis is a list.\n")
    assert sentences(text)[0] == ["It stays."]


def test_pages_of_old_dumps_are_told_apart_by_the_names_of_namespaces(tmp_path, convert):
    head = HEAD.replace('<namespace key="6"', '<namespace key="0" /><namespace key="3">Benutzer Diskussion</namespace>'
                        '<namespace key="6"')
    titles = ["Cat 1: the return", "Talk:Cat 2", "benutzer Diskussion:Cat 3", "Datei:Cat 4.jpg", "Benutzer: the film"]
    pages = [page(title, PROSE.format(n)).replace("<ns>0</ns>", "") for n, title in enumerate(titles, 1)]
    code, documents, printed = convert("--wiki", write(tmp_path / "w.xml", head + "".join([*pages, "</mediawiki>"])))
    assert (code, documents) == (0, cat_lines(1, 5))
    assert "3 pages of other namespaces\n" in printed


def test_of_several_revisions_the_newest_is_taken(tmp_path, convert):
    revision = "<revision><timestamp>{}</timestamp><text>{}</text></revision>"
    revisions = "".join(revision.format(f"20{year}-05-01T00:00:00Z", PROSE.format(year)) for year in (11, 15, 13))
    path = write(tmp_path / "w.xml", f"{HEAD}<page><title>Cat</title><ns>0</ns>{revisions}</page></mediawiki>")
    assert convert("--wiki", path)[1] == cat_lines(15)


@pytest.mark.parametrize("text, expected", [
    ("{0}\nSection::::References.\nThe reference is a sentence that nobody wants to read.", True),
    ("The sources of the river are told of here, at some length.\n\nSources\n\n{0}", False)])
def test_extracted_articles_end_where_their_lists_of_links_begin(tmp_path, convert, text, expected):
    text = text.format(PROSE.format(1)).replace("\n", "\r\n")
    write(tmp_path / "wiki_00", f'<doc id="1" url="u" title="Cat">\r\nCat\r\n\r\n{text}\r\n</doc>\r\n')
    documents = convert("--wiki", tmp_path)[1]
    assert documents == (cat_lines(1) if expected else [["The sources of the river are told of here, at some length.",
                                                       *cat_lines(1)[0]]])


# Books

BOOK = """The Project Gutenberg EBook of The House, by A. Writer
This eBook is for the use of anyone anywhere.

*** START OF THE PROJECT GUTENBERG EBOOK THE HOUSE ***

Produced by A. Volunteer and the team

THE HOUSE

by A. Writer

CHAPTER I. The Beginning.

The house stood at the end of the street, where nobody went any more after
the sun had gone down; Mr. Brown had seen to that. “Who lives there?” asked
the child. “I do not _know_, and I never did,” said the elder Mr.
Brown, and he went on

[Pg 12]

walking down the well-
known street.

  12

“I shall see,” said the child. “I shall go there. I am not afraid.”

“I shall go. I am not afraid. I shall see!”

II

The second part begins here, quite as the first one did before it, only later
in the year.

THE END

*** END OF THE PROJECT GUTENBERG EBOOK THE HOUSE ***

The licence, which nobody needs to learn by heart.
"""
BOOK_LINES = """The house stood at the end of the street, where nobody went any more after the sun had gone down; \
Mr. Brown had seen to that.
“Who lives there?” asked the child.
“I do not know, and I never did,” said the elder Mr. Brown, and he went on walking down the well-known street.
“I shall see,” said the child.
“I shall go there.
I am not afraid.”
“I shall go.
I am not afraid.
I shall see!”
The second part begins here, quite as the first one did before it, only later in the year.""".splitlines()


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_book_becomes_its_sentences(tmp_path, convert, coding):
    write(tmp_path / "books" / "house.txt", BOOK.replace("\n", "\r\n").encode(coding))
    write(tmp_path / "books" / "cover.jpg", b"\xff\xd8\xff")
    code, documents, _ = convert("--books", tmp_path / "books")
    assert code == 0
    assert documents[0] == BOOK_LINES


GUTENBERG = ("*** START OF THE PROJECT GUTENBERG EBOOK {0} ***\n\n{1}\n\n"
             "*** END OF THE PROJECT GUTENBERG EBOOK {0} ***\n\nA licence that nobody needs to learn by heart.\n\n")


@pytest.mark.parametrize("text, expected", [
    (GUTENBERG.format("ONE", "One is the first.") + GUTENBERG.format("TWO", "Two is the second."),
     ["One is the first.", "Two is the second."]),
    ("This etext was prepared by A. Volunteer, email a@b.org\n\nIt begins here.\n\n"
     "End of this Project Gutenberg Etext\n",
     ["It begins here."]),
    ("Anmerkungen zur Transkription:\n\nEs war spät.\n\n[Illustrazione: Il ponte]\n\nEs war kalt.\n\n"
     "Ende dieses Projekt Gutenberg Etextes\n\nDie Lizenz.\n", ["Es war spät.", "Es war kalt."]),
    ("The preface[1] says it[Pg vii] all.\n\n[Footnote 1: See [Greek: logos].]\n\n[Illustration: A [by X]. It is.]\n",
     ["The preface says it all."]),
    ("She had been with us for a year and more, and nobody knew she was very\nill.\n\nHe said as much -\n\n"
     "“You know.”\n\nThe old man came to us by the evening train in the early spring of\n1815.\n",
     ["She had been with us for a year and more, and nobody knew she was very ill.", "He said as much -", "“You know.”",
      "The old man came to us by the evening train in the early spring of 1815."])])
def test_books_lose_licences_notes_and_page_breaks(tmp_path, convert, text, expected):
    for name in ("book.txt", "book.md")[:1 + text.startswith("***")]:
        assert convert("--books", write(tmp_path / name, text), output=f"{name}.out")[1] == [expected]


def test_markdown_books_lose_their_markup(tmp_path, convert):
    text = ("# A Book\n\nThe *first* paragraph has [a link](http://x.org) and\n`code` in it. It ends.\n\n"
            "![picture](p.jpg)\n\n```\ncode that is dropped, all of it.\n```\n\n"
            "- An entry that is a sentence of its own.\n")
    assert convert("--books", write(tmp_path / "book.md", text))[1] == [
        ["The first paragraph has a link and code in it.", "It ends.", "An entry that is a sentence of its own."]]


def test_lines_that_are_paragraphs_are_not_joined(tmp_path, convert):
    lines = ["“Yes.”", "“No, and that is that, whatever you may say.”", "He went to St. Albans at 5 p.m. and slept."]
    assert convert("--books", write(tmp_path / "b.txt", "\n".join([*lines, "A long line. " * 20])))[1] == [
        [*lines, *["A long line."] * 20]]


def test_text_with_a_sentence_a_line_is_kept_and_blank_lines_separate_documents(tmp_path, convert):
    lines = [f"the {n} th door was opened by mr. smith , who smiled ." for n in range(30)]
    text = "\n".join([*lines[:10], "", *lines[10:]])
    assert convert("--books", write(tmp_path / "bookcorpus.txt", text))[1] == [lines[:10], lines[10:]]
    rows = datasets.Dataset.from_list([{"text": line} for line in lines])
    rows.to_parquet(tmp_path / "rows" / "bookcorpus.parquet")
    assert convert("--books", tmp_path / "rows", output="rows.txt")[1] == [lines]


def test_long_texts_are_cut_into_documents(tmp_path, convert, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_TEXT", 1000)
    monkeypatch.setattr(sources, "READ_BYTES", 100)
    monkeypatch.setattr(conversion, "UNIT_BYTES", 100)
    lines = [f"the {n} th door was opened by mr. smith , who smiled ." for n in range(100)]
    documents = convert("--books", write(tmp_path / "bookcorpus.txt", "\n".join(lines)))[1]
    assert [line for document in documents for line in document] == lines
    assert 5 <= len(documents) <= 8


def test_lines_of_verse_are_joined_to_sentences():
    verse = ["They went not with the soulless,", "Nor let a snare their path environ", "Their only pitfall was a mine."]
    prose = ["The owners of the works were the elder brothers, and had been so", "for generations, as everybody knew."]
    assert join_wrapped_lines([*prose, "", *prose, "", *prose, "", *verse]) == [" ".join(prose)] * 3 + [" ".join(verse)]


def test_verse_loses_no_words(tmp_path, convert):
    poem = ["HAMLET:", "  The moon was late, and on the hill", "  the shepherd counted all his sheep",
            "  and all the mill was still", "  until they fell asleep.", "", "THE RIVER", "",
            "Who goes there in the rain", "with neither coat nor hat,", "nor any kind of cane", "",
            "To lean on when the hill is steep", "or hold against the cat?", "", "A last one,", "unended"]
    assert convert("--books", write(tmp_path / "poem.txt", "\n".join(poem)))[1] == [[
        "The moon was late, and on the hill the shepherd counted all his sheep and all the mill was still until they fell "
        "asleep.",
        "Who goes there in the rain with neither coat nor hat, nor any kind of cane To lean on when the hill is steep or "
        "hold against the cat?", "A last one,"]]


def test_wrapped_lines_of_chinese_are_joined_without_blanks(tmp_path, convert):
    lines = ["他走进房间很久没有说话只是看着窗外灰色的天空。老人没有回", "答只是摇了摇头。已经很晚了屋里的人都睡着了。"]
    assert convert("--books", write(tmp_path / "b.txt", "\n".join(lines)), "--language", "zh")[1] == [[
        "他走进房间很久没有说话只是看着窗外灰色的天空。", "老人没有回答只是摇了摇头。", "已经很晚了屋里的人都睡着了。"]]


def test_blank_lines_end_short_documents_of_a_sentence_a_line(tmp_path, convert):
    documents = [[f"The door number {n} was opened.", f"Nobody came out of it for {n} days."] for n in range(20)]
    text = "\n\n".join("\n".join(lines) for lines in documents)
    assert convert("--books", write(tmp_path / "b.txt", text))[1] == documents


def test_text_with_a_sentence_a_line_is_distinguished_from_paragraphs():
    assert has_sentence_lines([f"it was day {n} ." for n in range(20)])
    assert not has_sentence_lines([f"It was day {n}. The sun shone. He slept." for n in range(20)])
    assert not has_sentence_lines(["the sun shone on the wall and on", "the old house, and on all who"] * 9)
    assert not has_sentence_lines(["It was day."] + [""] * 1 + ["It was night."])
    assert not has_sentence_lines(["ANNA.", "It is day.", "", "BERT.", "It is night.", ""] * 9)


@pytest.mark.parametrize("expected", [
    ["Dr. Smith went to the U.S.", "He liked it."], ["It cost $3.5 million.", "J. R. R. Tolkien wrote it."],
    ["See vol. 2, no. 5 and p. 45 for details.", "Next."], ["He left on Jan. 5, 2010.", "Mrs. O'Riordan could not."],
    ["“Who is he?” asked Mr. Brown.", "“I don't know!”"], ["“It is late.", "Go home!", "Why not?”"],
    ["12. The house stood there.", "Lieut. Smith saw it."],
    ["It was cold.", "'twas May."], ["It was cold.", "'Twas May."], ["“So late?” —she asked.", "—Yes."]])
def test_sentences_are_not_cut_at_abbreviations_and_initials(expected):
    assert split_sentences(" ".join(expected)) == expected


@pytest.mark.parametrize("language, expected", [
    ("el", ["Ο κ. Παπαδόπουλος ήρθε.", " Πού είναι;"]),
    ("ja", ["塔は800年に建った。", "900年に「もう古い。捨てよう。」と言われた。",
            "A国が買った（安く。本当に。）後に売った。", "「え？」", "「ああ。」"]),
    ("zh", ["他走了！", "2001年才回来。", "“你好。”她说。", "圆周率是３．１４。"]),
    ("de", ["Zum 50. Geburtstag kam der 3. Bruder.", " Er blieb bis 1995.", " Dann ging er."]),
    ("fi", ["Hän tuli 5. Joulukuuta."]),
    ("es", ["—¿Quién? —preguntó Ana.", " —Yo."]), ("pl", ["– Kto? – spytał Jan.", " – Ja."]),
    ("hi", ["वह आया।", " 5 लोग गए।", " “हाँ।” वह बोला।"]), ("ru", ["«Что?» — спросил он.", " Да."])])
def test_sentences_of_other_languages(language, expected):
    assert split_sentences("".join(expected), language) == [sentence.strip() for sentence in expected]


def test_text_is_normalized(tmp_path, convert):
    text = "The cafe\u200b\u0301 had a so\u00adft\u200b\u00a0  \t “tone” — &amp; that was all\u2028 there was to it."
    assert convert("--wiki", write(tmp_path / "w.xml", dump(page("A", text))))[1] == [
        ["The café had a soft “tone” — & that was all there was to it."]]


def test_joiners_stay_between_letters(tmp_path, convert):
    text = "\u200cمی\u200cخواهم\u200c و क्\u200dष \u200dहै और n\u0303 a\u200c."
    assert convert("--books", write(tmp_path / "b.txt", text))[1] == [["می\u200cخواهم و क्\u200dष है और ñ a."]]


# Encodings and files that are not read


RUSSIAN = "Он вошёл в комнату и долго молчал, глядя в окно. Старик ничего не ответил.\n\nБыло уже поздно, и все спали."
POLISH = "Wszedł do pokoju i długo milczał, patrząc w okno.\n\nBył już późny wieczór, a wszyscy w domu spali."
GERMAN = "Er ging über die Straße zum Fluß und schwieg.\n\nDie Bäume rauschten, es war schon spät."
JAPANESE = "吾輩は猫である。名前はまだ無い。\n\nどこで生れたかとんと見当がつかぬ。"
CHINESE = "他走进房间，很久没有说话。\n\n老人没有回答，只是摇了摇头。已经很晚了。"


@pytest.mark.parametrize("text, encodings", [
    (RUSSIAN, ["windows-1251", "koi8-r", "cp866", "utf-16-le", "utf-32"]), (POLISH, ["iso-8859-2", "cp1250", "utf-8"]),
    (GERMAN, ["cp1252", "latin-1", "utf-16"]), (JAPANESE, ["shift_jis", "euc_jp", "iso2022_jp"]),
    (CHINESE, ["gb2312", "gb18030", "utf-16-be"])])
def test_texts_in_any_encoding_are_read_alike(tmp_path, convert, text, encodings):
    outputs = []
    for encoding in ("utf-8-sig", *encodings):
        path = write(tmp_path / encoding / "b.txt", text.encode(encoding))
        outputs.append(convert("--books", path, output=f"{encoding}.txt")[1])
    assert text.split("\n\n")[1] in "".join(outputs[0][0])
    assert outputs == [outputs[0]] * len(outputs)


def test_an_encoding_can_be_named(tmp_path, convert):
    write(tmp_path / "b" / "a.txt", "Où est-il allé ?".encode("mac_roman"))
    write(tmp_path / "b" / "b.txt", "Où est-elle allée ?")
    write(tmp_path / "b" / "c.txt", "Où sont-ils allés ?".encode("utf-16"))
    assert convert("--books", tmp_path / "b", "--encoding", "mac_roman")[1] == [
        ["Où est-il allé ?"], ["Où est-elle allée ?"], ["Où sont-ils allés ?"]]
    assert "--encoding klingon is not known" in convert("--books", tmp_path / "b", "--encoding", "klingon", output="x")[2]


def test_a_long_text_keeps_its_encoding_and_single_bytes_are_windows_1252(tmp_path, convert, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_TEXT", 1000)
    monkeypatch.setattr(sources, "READ_BYTES", 101)
    lines = [f"Tür {n} ging auf, und es war späte Nacht.\n\n" for n in range(200)]
    write(tmp_path / "b" / "a.txt", "".join(lines).encode("utf-16"))
    write(tmp_path / "b" / "b.txt",
          b"".join(line.encode("cp1252" if n % 9 == 5 else "utf-8") for n, line in enumerate(lines)))
    documents = convert("--books", tmp_path / "b")[1]
    assert [line for document in documents for line in document][:200] == [line.strip() for line in lines]
    assert len(documents) > 5 and documents[len(documents) // 2][0].startswith("Tür")


def test_what_is_not_read_is_counted_and_named(tmp_path, convert):
    books = tmp_path / "books"
    text = "The door number {} was opened, and nobody came out of it."
    read = {"a.TXT": b"%", "b.text": b"%", "c.MD": b"%", "d.txt.GZ": gzip.compress(b"%"), "_e.txt": b"%", "f.txt": b"%\0",
            "g.JSONL": b'{"text": "%"}\n'}
    for n, (name, content) in enumerate(read.items()):
        number = text.format(n).encode()
        write(books / name, gzip.compress(number) if name.endswith("GZ") else content.replace(b"%", number))
    unread = {"h.zip": b"PK\3\4\0\0", "i.tar.gz": gzip.compress(b"b.txt\0\0"), "j.txt.zst": b"\x28\xb5\x2f\xfd",
              "noext": b"Text.", "k.csv": b"a,b\n1,2\n", "l.jsonl": b'{"body": "b"}\n', "m.html": b"<html>A.</html>",
              "n.txt": bytes(range(256)) * 9}
    for name, content in unread.items():
        write(books / name, content)
    write(books / ".git" / "o.txt", "Hidden.")
    code, documents, printed = convert("--books", books)
    assert (code, sorted(documents)) == (0, [[text.format(n)] for n in range(len(read))])
    for line in ("7 files of unknown formats\n", "1 files whose encoding is not recognized", "1 hidden files\n"):
        assert line in printed
    assert all(f"{name} is left out" in printed for name in unread)
    for n, name in enumerate(unread):  # named one by one they are refused, but for text without a suffix
        code, _, printed = convert("--books", books / name, output=f"{n}.txt")
        assert code == (0 if name == "noext" else 2), name
        assert code == 0 or f"{name} holds no file of a known format" in printed.splitlines()[-1]


def test_training_reads_compressed_files_with_suffixes_in_capitals(tmp_path):
    assert list(read_lines([write(tmp_path / "corpus.TXT.GZ", gzip.compress(b"One.\n"))])) == ["One.", ""]


# All


def test_the_output_does_not_depend_on_processes(tmp_path, convert, monkeypatch):
    monkeypatch.setattr(sources, "READ_BYTES", 2000)
    monkeypatch.setattr(conversion, "UNIT_BYTES", 2000)
    write(tmp_path / "a.xml.bz2", bz2.compress(dump(*cats(0, 60), page("Foo", WIKITEXT), *cats(60, 90)).encode()))
    write(tmp_path / "b.txt", BOOK)
    flags = ["--books", tmp_path / "b.txt", "--wiki", tmp_path / "a.xml.bz2", "--processes"]
    outputs = [convert(*flags, n, output=f"{n}.txt")[1] for n in (1, 2, 3)]
    assert len(outputs[0]) == 92
    assert outputs[0][-1] == BOOK_LINES  # books after Wikipedia
    assert outputs[0] == outputs[1] == outputs[2]


def test_duplicate_documents_are_dropped(tmp_path, convert):
    path = write(tmp_path / "w.xml", dump(*cats(0, 3), *cats(1, 5)))
    code, documents, printed = convert("--wiki", path, path)
    assert (code, documents) == (0, cat_lines(0, 1, 2, 3, 4))
    assert "9 duplicates of other documents" in printed


def test_duplicate_filter_takes_bounded_shared_memory(monkeypatch):
    monkeypatch.setattr(command, "HASH_SLOTS", 64)
    seen = command.DuplicateFilter()
    assert [seen.add(str(n)) for n in range(40)] == [True] * 40
    assert [seen.add(str(n)) for n in range(40)] == [False] * 40
    for n in range(2000):
        seen.add(str(n))
        assert not seen.add(str(n))  # the newest is never forgotten
    child = os.fork()
    if not child:
        seen.add("of the child")
        os._exit(0)
    os.waitpid(child, 0)
    assert not seen.add("of the child")  # processes share the memory, none has a copy


# Damage


def test_a_truncated_archive_loses_only_its_end(tmp_path, convert):
    packed = b"".join(bz2.compress(part.encode()) for part in (dump(*cats(0, 5))[:-13], *cats(5, 20)))
    code, documents, printed = convert("--wiki", write(tmp_path / "w.xml.bz2", packed[:-40]))
    assert code == 0
    assert documents == cat_lines(*range(19))
    assert "1 files damaged" in printed and "w.xml.bz2" in printed


@pytest.mark.parametrize("damage", [
    lambda text: text.replace("<title>Cat 3</title>", "<title>Cat 3</tit"),
    lambda text: text.replace("number 3 sat", "number 3 & < sat"),
    lambda text: text.replace("number 3 sat", "number 3 \x01 sat"),
    lambda text: text.replace(page("Cat 3", PROSE.format(3)), page("Cat 3", PROSE.format(3)).replace("</page>", "")),
    lambda text: text.replace(page("Cat 3", PROSE.format(3)), page("Cat 3", PROSE.format(3)).replace("<page>", "")),
    lambda text: text.replace(page("Cat 3", PROSE.format(3)), page("Cat 3", PROSE.format(3))[:60])])
def test_a_damaged_page_loses_only_itself(tmp_path, convert, damage):
    text = damage(dump(*cats(0, 9)))
    code, documents, printed = convert("--wiki", write(tmp_path / "w.xml", text))
    assert code == 0
    assert documents == cat_lines(0, 1, 2, *range(4, 9))
    assert "1 pages and rows damaged" in printed
    assert ("Cat 3 in" in printed) == ("<title>Cat 3</title>" in text)


def test_a_column_that_holds_no_strings_is_damage(tmp_path, convert):
    datasets.Dataset.from_list([{"text": 5}]).to_parquet(tmp_path / "w" / "a.parquet")
    write(tmp_path / "w" / "b.xml", dump(*cats(0, 2)))
    code, documents, printed = convert("--wiki", tmp_path / "w")
    assert (code, documents) == (0, cat_lines(0, 1))
    assert "1 files damaged" in printed and "a.parquet" in printed


def test_damaged_rows_and_files_are_counted(tmp_path, convert):
    rows = "".join(json.dumps({"text": PROSE.format(n)}) + "\n" for n in range(3))
    write(tmp_path / "w" / "a.jsonl", '{"id": "1", "ti\n' + rows + '{"text": 5\n{"no": 1}\n["x"]\n' + '{"title": "a"')
    write(tmp_path / "w" / "b.parquet", b"PAR1 and nothing that is one")
    write(tmp_path / "w" / "c.xml.bz2", b"not bz2")
    write(tmp_path / "w" / "d", f'<doc id="1" title="x">\nx\n\nThis text has no end and {PROSE}')
    code, documents, printed = convert("--wiki", tmp_path / "w")
    assert (code, documents) == (0, cat_lines(0, 1, 2))
    assert "6 pages and rows damaged" in printed and "2 files damaged" in printed


def test_a_lone_surrogate_loses_only_itself(tmp_path, convert):
    rows = [json.dumps({"text": f"the {n} th door was opened by mr. smith ."}) for n in range(9)]
    rows[3] = rows[3].replace("door", "\\ud83d door")
    documents = convert("--books", write(tmp_path / "rows.jsonl", "\n".join(rows) + "\n"))[1]
    assert documents == [[json.loads(row)["text"].replace("\ud83d ", "") for row in rows]]


def test_titles_of_damaged_records_are_searched_in_linear_time(tmp_path):
    source = sources.Source("w.xml", None, "dump", True)
    began = time.process_time()
    for record in ("<page>" + "<title>" * 100_000, '<doc title="' * 100_000, "<page>" * 100_000):
        assert wikipedia.record_title(source, record.encode()) == "w.xml"
    assert time.process_time() - began < 5  # quadratic, it would be hours


@pytest.mark.parametrize("fate, name", [
    (lambda: 1 / 0, "1 pages on which the parser fails"),
    (lambda: os._exit(3), "1 pages on which the parser hangs or dies"),
    (lambda: time.sleep(60), "1 pages on which the parser hangs or dies"),
    (lambda: (_ for _ in ()).throw(RecursionError), "1 pages on which the parser fails")])
def test_a_page_that_breaks_the_parser_loses_only_itself(tmp_path, convert, monkeypatch, fate, name):
    parse = wikipedia.mwparserfromhell.parse
    monkeypatch.setattr(conversion, "UNIT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(wikipedia.mwparserfromhell, "parse",
                        lambda text: fate() if "number 5 sat" in text else parse(text))
    code, documents, printed = convert("--wiki", write(tmp_path / "w.xml", dump(*cats(0, 9))), "--processes", 2)
    assert code == 0
    assert documents == cat_lines(0, 1, 2, 3, 4, 6, 7, 8)
    assert name in printed and "Cat 5" in printed


@pytest.mark.parametrize("flags, words", [
    ([], "nothing to convert"), (["--wiki", "no/such/thing/here"], "no file or folder"),
    (["--books", "{0}/empty"], "holds no file"), (["--wiki", "{0}/book.txt"], "holds no file of a known format"),
    (["--wiki", "{0}/broken.xml"], "no document"),
    (["--wiki", "{0}/column.parquet"], "column"), (["--books", "{0}/book.txt", "--processes", "-1"], "processes = -1"),
    (["--wiki", "{0}/cut.bz2"], "no document"), (["--books", "{0}/novel.epub"], "holds no file of a known format")])
def test_unusable_input_ends_in_one_message_and_no_file(tmp_path, convert, flags, words):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "book.txt", "Some text that is no Wikipedia.")
    write(tmp_path / "novel.epub", b"PK\3\4\0\0 Some text. And more of it. " * 9)
    write(tmp_path / "broken.xml", "<mediawiki><page><title>A</ti")
    write(tmp_path / "cut.bz2", bz2.compress(b"<mediawiki>")[:20])
    datasets.Dataset.from_list([{"words": "a"}]).to_parquet(tmp_path / "column.parquet")
    code, documents, printed = convert(*(flag.format(tmp_path) for flag in flags))
    assert (code, documents) == (2, [])
    assert printed.splitlines()[-1].startswith("error: ") and words in printed.splitlines()[-1]
    assert not list(tmp_path.glob("corpus*"))


def test_an_existing_output_is_not_overwritten(tmp_path, convert):
    write(tmp_path / "corpus.txt", "days of work\n\n")
    code, _, printed = convert("--books", write(tmp_path / "b.txt", BOOK))
    assert code == 2 and "already exists" in printed
    assert (tmp_path / "corpus.txt").read_text() == "days of work\n\n"


def restore_interrupts():
    """In a child process: Ctrl-C's signal works even where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number):
    write(tmp_path / "w.xml", dump(*(page(f"Cat {n}", PROSE.format(n) + WIKITEXT * 20) for n in range(800))))
    flags = ["--wiki", tmp_path / "w.xml", "--output", tmp_path / "corpus.txt"]
    process = subprocess.Popen([sys.executable, "-m", "corpus", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               preexec_fn=restore_interrupts)
    while not any(path.stat().st_size for path in tmp_path.glob("corpus.txt.tmp-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["w.xml"]


# The embedded documentation


def test_documentation_is_prose(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('''"""This module holds the tools with which a reader can open a :class:`~pkg.File` and close it.

Parameters
----------
x : int, a thing that one passes here and that the function then takes

    >>> print("an example of how this is to be used in practice")
"""
def f():
    """Returns."""
''', encoding="utf-8")
    prose = "This module holds the tools with which a reader can open a pkg.File and close it."
    assert docstring_paragraphs(module) == [prose]
    module.write_text("not python(", encoding="utf-8")
    assert docstring_paragraphs(module) == []


def test_documentation_drops_repeated_paragraphs_and_is_built_once(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    paragraphs = [f"This is the paragraph number {n} of a text that has words enough. It has two sentences."
                  for n in "abc"]
    for name, module_paragraphs in (("one", paragraphs[:2]), ("same", paragraphs[:2]), ("two", paragraphs[1:])):
        (library / f"{name}.py").write_text('"""' + "\n\n".join(module_paragraphs) + '"""\n', encoding="utf-8")
    (tmp_path / "requirements.txt").write_text("no-such-package==1  # reason\n", encoding="utf-8")
    monkeypatch.setattr(documentation.sysconfig, "get_path", lambda _: str(library))
    path = documentation_corpus(tmp_path / "cache", tmp_path / "requirements.txt")
    documents = path.read_text(encoding="utf-8").split("\n\n")[:-1]
    assert documents == [paragraph.replace(". ", ".\n") for paragraph in ("\n".join(paragraphs[:2]), paragraphs[2])]
    monkeypatch.setattr(documentation, "ProcessPoolExecutor", lambda: pytest.fail("built again"))
    assert documentation_corpus(tmp_path / "cache", tmp_path / "requirements.txt") == path


def test_documentation_needs_no_parser_of_other_sources():
    """Pretraining imports the module of the documentation corpus, and no parser of Wikipedia or books with it."""
    heavy = ("mwparserfromhell", "datasets", "pyarrow", "markdown_it", "pebble")
    script = f"import sys, corpus.documentation; print(*(name for name in {heavy} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# The README


README = (ROOT / "corpus" / "README.md").read_text(encoding="utf-8")
README_LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in README_LINES if not line.endswith("# download")])
def test_readme_command_writes_a_corpus(tmp_path, line):
    words = shlex.split(line, comments=True)
    assert words[:3] == ["python", "-m", "corpus"], "no test runs this command"
    write(tmp_path / "wiki" / "AA" / "wiki_00", f'<doc id="1" title="Cat">\nCat\n\n{PROSE.format(1)}\n</doc>\n')
    write(tmp_path / "books" / "house.txt", BOOK)
    write(tmp_path / "dump.xml.bz2", bz2.compress(dump(*cats(0, 3)).encode()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if "--help" not in words:
        output = tmp_path / words[words.index("--output") + 1]
        assert output.read_text(encoding="utf-8").endswith(".\n\n")
