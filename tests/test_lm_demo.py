"""LM_DEMO.py: sentences through main(argv), the numbers of its last line, the page, and every kind of bad input."""

import gzip
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import story, write_pair
from sklearn.metrics import precision_score, recall_score, roc_auc_score

import LM_DEMO as script
from dataset import SPECIAL, Vocabulary, wordpiece
from LM_DEMO import Demo, Line, Tally, Words, encode, filled_in, load_pair, main
from utils import load, save

ROOT = Path(__file__).parent.parent
SENTENCES = ["The old dog sees a red cat.", "the bird eats, but the cats eats then!", "a tree near the river"]


@pytest.fixture
def weights(tmp_path, vocabulary):
    return write_pair(tmp_path / "run", vocabulary)


@pytest.fixture
def demo(tmp_path, weights, capsys):
    """Runs the demo on lines of text (bytes are written as they are) and gives its exit code, output and errors."""
    def run(text=SENTENCES, *flags):
        path = tmp_path / "sents.txt"
        path.write_bytes(text if isinstance(text, bytes) else "\n".join(text).encode())
        code = main(["--weights", str(weights[0]), "--input", str(path), "--device", "cpu", *flags])
        return code, *capsys.readouterr()
    return run


def rows(out, name):
    return re.findall(rf"^[\d ]{{4}} {re.escape(name)} +(.*)$", out, re.MULTILINE)


def plain(text):
    """Without the marks of plain text."""
    return re.sub(r"[*=~+]", "", text)


class Page(HTMLParser):
    """A page's elements as (tag, attributes) and its text outside <style>."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self.style else data

    def handle_endtag(self, tag):
        self.style = False


# Sentences


def test_a_seed_repeats_everything_and_another_changes_it(demo):
    lines = "\n\n".join(story(8)).split("\n")
    first, again, other = (demo(lines, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again
    assert rows(first, "masked") != rows(other, "masked") and rows(first, "generated") != rows(other, "generated")
    assert rows(first, "original") == [line for line in lines if line]  # in order, blank lines skipped


def test_at_least_one_piece_and_the_share_asked_for_are_predicted(demo):
    for share, least in (("0", 1), ("0.5", 4)):
        out = demo(SENTENCES, "--mask-prob", share)[1]
        for row in rows(out, "masked"):
            assert row.count("[MASK]") + row.count("+") // 2 >= least
    places = int(re.search(r"([\d,]+) places", demo(SENTENCES, "--mask-prob", "0")[1])[1])
    assert places == len(SENTENCES)


def test_greedy_takes_the_first_of_the_listed_pieces_with_the_networks_probabilities(demo, weights, vocabulary):
    line = "the old [MASK] sees a [MASK]"
    out = demo([line], "--greedy", "--top-k", "3")[1]
    pair = load_pair(*weights, torch.device("cpu"))
    ids = [vocabulary.cls, *encode([line], vocabulary, 28)[0].ids, vocabulary.sep]
    assert ids.count(vocabulary.mask) == 2
    ids = torch.tensor([ids])
    positions = (ids == vocabulary.mask).nonzero()[None, :, 1]
    with torch.no_grad():
        share = pair.generator(ids, torch.zeros_like(ids), ids > -1, positions).softmax(-1)
    pieces = vocabulary.pieces()
    wanted = ["[MASK]: " + ", ".join(f"{pieces[n]} {p:.1%}" for p, n in zip(*(x.tolist() for x in one.topk(3)), strict=True))
              for one in share[0]]
    assert rows(out, "top 3") == wanted
    filled = re.findall("~(.*?)~", rows(out, "generated")[0])
    assert filled == [row.split(": ")[1].split()[0].removeprefix("##") for row in wanted]


def test_samples_follow_the_generators_probabilities(demo):
    out = demo(["the [MASK] sees"] * 600, "--top-k", "1", "--seed", "3")[1]
    piece, share = re.fullmatch(r"\[MASK\]: (\S+) ([\d.]+)%", rows(out, "top 1")[0]).groups()
    hits = np.mean([f"~{piece.removeprefix('##')}~" in row for row in rows(out, "generated")])
    assert hits == pytest.approx(float(share) / 100, abs=0.08)


def test_a_lines_own_masks_are_the_places_and_have_no_original(demo):
    out = demo(["[MASK] old dog[MASK] the [MASK]", "the [mask] sees"])[1]
    assert rows(out, "original")[0] == "[MASK] old dog[MASK] the [MASK]" == rows(out, "masked")[0]
    assert rows(out, "generated")[0].count("~") == 6 and "*" not in rows(out, "generated")[0]
    assert re.sub("~.*?~", "", rows(out, "generated")[0]).split() == ["old", "dog", "the"]
    assert ", 0 pieces replaced" in demo(["the [MASK]"])[1]  # nothing known could have been


@pytest.mark.parametrize("greedy", [False, True])
def test_the_last_line_counts_what_is_shown(demo, weights, greedy):
    lines = [*"\n".join(story(4)).split("\n"), "the old [MASK] sees [MASK] tree."]
    out = demo(lines, "--mask-prob", "0.4", *["--greedy"] * greedy)[1]
    pair, tally = load_pair(*weights, torch.device("cpu")), Tally()
    settings = Demo(input="sents.txt", mask_prob=0.4, greedy=greedy)
    sentences = list(filled_in(iter(lines), pair, settings, tally))
    parts = [part for sentence in sentences for part in sentence.generated]
    assert sum(row.count("*") // 2 for row in rows(out, "generated")) == sum(part.mark == "replaced" for part in parts)
    known = [part for part in parts if part.mark != "filled"]
    labels, scores = (np.array([part.mark == "replaced" for part in known]), np.array([part.suspicion for part in known]))
    predicted, places = scores > 0.5, sum(bool(part.mark) for part in parts)
    assert out.splitlines()[-1].endswith(
        f": {len(lines)} sentences, {places} places filled in, {labels.sum()} pieces replaced; the discriminator found "
        f"{(predicted & labels).sum()} of them: precision {precision_score(labels, predicted):.3f}, recall "
        f"{recall_score(labels, predicted):.3f}, AUC {roc_auc_score(labels, scores):.3f} over {len(labels)} pieces")
    for row, sentence in zip(rows(out, "replaced?"), sentences, strict=True):
        percents = [int(percent) for word in row.split() for percent in word.split("/")[1].split(",")]
        assert percents == pytest.approx([100 * part.suspicion for part in sentence.generated], abs=0.51)


def test_the_discriminator_judges_the_generated_row(demo, weights, vocabulary):
    out = demo(["the old [MASK] sees a [MASK] ."], "--greedy")[1]
    pair = load_pair(*weights, torch.device("cpu"))
    row = rows(out, "generated")[0].replace("~", "")
    ids = torch.tensor([[vocabulary.cls, *vocabulary.encode([row])[0], vocabulary.sep]])
    with torch.no_grad():
        wanted = 100 * pair.discriminator(ids, torch.zeros_like(ids), ids > -1).sigmoid()[0, 1:-1]
    percents = [int(percent) for word in rows(out, "replaced?")[0].split() for percent in word.split("/")[1].split(",")]
    assert percents == pytest.approx(wanted.tolist(), abs=0.51)


def test_without_a_discriminator_the_generators_half_is_shown(demo, weights):
    both = demo()[1]
    weights[1].unlink()
    code, out, _ = demo()
    assert code == 0 and "discriminator: none" in out and not rows(out, "replaced?")
    assert rows(out, "generated") == rows(both, "generated") and out.rstrip().endswith("pieces replaced")


def test_words_keep_the_lines_own_spaces_and_join_pieces():
    letters = [chr(n) for n in range(97, 123)]
    pieces = [*SPECIAL, *letters, *(f"##{c}" for c in letters), *"().,'-", "well", "known", "中", "文"]
    vocabulary = Vocabulary(wordpiece({piece: n for n, piece in enumerate(pieces)}, lowercase=True), "test")
    words = Words(vocabulary)

    def shown(text, **changes):
        line = encode([text], vocabulary, 99)[0]
        ids = [vocabulary.tokenizer.token_to_id(changes.get(f"at{n}", "")) or old for n, old in enumerate(line.ids)]
        return "".join(part.gap + part.text for part in words.parts(line, ids, [0.0] * len(ids), {}, {}))

    for text in ("(well-known), don't.", "a  b", "é.g", "中文 well", "well\u00a0known", "[MASK] well([MASK])."):
        assert shown(text) == text.replace("é", "e").replace("  ", " ").replace("\u00a0", " ")
    assert shown("well known.", at1="##s") == "wells."  # a piece of a word joins it
    assert shown("well known.", at2="well") == "well known well"  # a word does not stick to a word
    assert shown("well known.", at1=",") == "well,."
    assert shown("well (known)", at1="well") == "well well known)"
    assert shown("well-known", at2="[MASK]") == "well-[MASK]"
    assert shown("well-known", at2="a") == "well-a"


def test_batches_hold_rows_of_one_kind_and_bounded_size(monkeypatch):
    monkeypatch.setattr(script, "BATCH_TOKENS", 40)
    rng = np.random.default_rng(0)
    lines = [Line("", [4 if rng.random() < 0.02 else 9] * int(rng.integers(1, 30)), [], 0) for _ in range(200)]
    batches = list(script.similar(lines, mask=4))
    assert sorted(n for batch in batches for n in batch) == list(range(200))
    for batch in batches:
        assert len({4 in lines[n].ids for n in batch}) == 1
        assert len(batch) == 1 or len(batch) * (max(len(lines[n].ids) for n in batch) + 2) <= 40


# Input


def test_standard_input_is_read_and_the_prompt_ends_at_an_empty_line(demo, weights, capsys, monkeypatch):
    wanted = demo(["the old dog", "a cat"])[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffthe old dog\na cat\n".encode())))
    assert main(["--weights", str(weights[0]), "--input", "-", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert rows(out, "generated") == rows(wanted, "generated") and "\nstandard input: 2 sentences" in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["--weights", str(weights[0]), "--device", "cpu"]) == 0 and "0 sentences" in capsys.readouterr().out
    for end in ("\nnever read\n", ""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"the old dog\n{end}".encode())))
        assert main(["--weights", str(weights[0]), "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert out.count("> ") == 2 and len(rows(out.replace("> ", ""), "original")) == 1


def test_lines_longer_than_the_positions_are_cut_with_a_warning(demo):
    code, out, err = demo(["the dog", "cat " * 40])  # 30 positions, two of them [CLS] and [SEP]
    assert code == 0 and rows(out, "original")[1] == " ".join(["cat"] * 28) + " ..."
    assert len(err.splitlines()) == 1 and "sentence 2" in err and "12 pieces" in err


def test_lines_that_hold_no_pieces_are_skipped_and_unknown_words_are_shown_so(demo):
    code, out, _ = demo(["\u200b", "   ", "the zzz \x1b[31mdog"], "--mask-prob", "0")
    assert code == 0 and len(rows(out, "original")) == 1 and "\x1b" not in out
    assert "[UNK]" in out


@pytest.mark.parametrize("text, message", [
    (b"", "no text"), (b"\n \n\n", "no text"), (b"the dog\n\0\1\2", "binary"), (bytes(range(128, 256)), "binary"),
    ("the dog\n".encode("utf-16"), "binary")])
def test_text_that_can_not_be_read_is_refused(demo, tmp_path, text, message):
    code, _, err = demo(text, "--html", str(tmp_path / "page.html"))
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("page*"))


def assert_refused(argv, capsys, *found):
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(text in err for text in found), err


def test_weights_that_do_not_fit_are_refused(tmp_path, weights, vocabulary, capsys):
    gen, disc = weights
    text = tmp_path / "sents.txt"
    text.write_text("the dog")
    rest = ["--input", text, "--device", "cpu"]
    assert_refused(["--weights", disc, *rest], capsys, "holds a discriminator", "--weights wants the generator")
    assert_refused(["--weights", gen, "--discriminator", gen, *rest], capsys, "holds a generator", "--discriminator wants")
    assert_refused(["--weights", tmp_path / "none.pt", *rest], capsys, "none.pt is missing")
    assert_refused(["--weights", tmp_path, *rest], capsys, "is a folder")
    assert_refused(["--weights", gen, "--input", tmp_path / "none.txt"], capsys, "none.txt", "can't be read")
    assert_refused(["--weights", gen, "--input", tmp_path], capsys, "can't be read")
    packed = tmp_path / "sents.txt.gz"
    packed.write_bytes(gzip.compress(b"the dog")[:10] + b"no deflate stream")
    assert_refused(["--weights", gen, "--input", packed], capsys, "can't be read")

    other = Vocabulary(wordpiece({piece: n for n, piece in enumerate([*SPECIAL, "a"])}, lowercase=True), "other")
    _, stranger = write_pair(tmp_path / "other", other)
    assert_refused(["--weights", gen, "--discriminator", stranger, *rest], capsys, "different vocabularies")

    content, bad = load(gen), tmp_path / "bad.pt"
    weights = content["weights"]
    name, weight = next(iter(weights.items()))
    for wrong, found in [
        ([1, 2], "something else"), ({"electra": {}}, "something else"), (content | {"kind": 3}, "holds a 3"),
        (content | {"model": {"size": 1}}, "size"), (content | {"model": content["model"] | {"layers": 2}}, "layers.1"),
        (content | {"model": content["model"] | {"embedding_size": 9}}, "is wanted"),
        (content | {"vocabulary": "{}"}, "does not fit together"), (content | {"vocabulary": other.state()}, "6 pieces"),
        (content | {"weights": weights | {name: torch.full_like(weight, float("nan"))}}, "not finite"),
    ]:
        save(bad, wrong)
        assert_refused(["--weights", bad, *rest], capsys, "bad.pt", found)
    bad.write_bytes(gen.read_bytes()[:2000])
    assert_refused(["--weights", bad, *rest], capsys, "damaged")
    bad.write_text("no weights at all")
    assert_refused(["--weights", bad, *rest], capsys, "damaged")


@pytest.mark.parametrize("flags, message", [
    (["--mask-prob", "1.5"], "--mask-prob 1.5"), (["--mask-prob", "nan"], "--mask-prob nan"),
    (["--top-k", "-1"], "--top-k -1"), (["--seed", str(2**70)], "--seed"),
    (["--html", "no/such/page.html"], "--html"), (["--html", "."], "--html")])
def test_values_that_can_not_work_are_refused(flags, message, capsys):
    assert_refused(flags, capsys, message)


def test_the_newest_run_is_taken_and_named(tmp_path, vocabulary, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused([], capsys, "no runs/*/gen.pt", "Pretraining.py")
    for age, name in enumerate(("new", "old")):
        gen, _ = write_pair(Path("runs") / name, vocabulary)
        os.utime(gen, (1e9 - age, 1e9 - age))
    Path("sents.txt").write_text("the dog")
    assert main(["--input", "sents.txt", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("generator: runs/new/gen.pt; discriminator: runs/new/disc.pt")


# Terminals and pipes


def test_colour_only_on_a_terminal_and_never_with_no_color(demo, monkeypatch):
    piped = demo()[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = demo()[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert demo()[1] == piped and "\x1b" not in piped and "*" in piped
    strip = lambda text: re.sub("\x1b.*?m", "", text)  # noqa: E731
    assert "\x1b[1;4;33m" in coloured and "\x1b[30;48;5;" in coloured
    assert [strip(row) for row in rows(coloured, "generated")] == [plain(row) for row in rows(piped, "generated")]


def test_a_broken_pipe_ends_quietly(tmp_path, weights):
    text = tmp_path / "long.txt"
    text.write_text("the old dog sees a red cat.\n" * 3000)
    page = tmp_path / "page.html"
    process = subprocess.Popen([sys.executable, str(ROOT / "LM_DEMO.py"), "--weights", str(weights[0]), "--input", str(text),
                                "--html", str(page)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    assert not list(tmp_path.glob("page*"))


# The page


def test_the_page_escapes_every_text(tmp_path, capsys):
    pieces = [*SPECIAL, "<", ">", "/", "script", "<script>", "&", "lt", ";", "alert"]  # each can be drawn, also whole tags
    vocabulary = Vocabulary(wordpiece({piece: n for n, piece in enumerate(pieces)}, lowercase=True), "markup")
    gen, _ = write_pair(tmp_path / "run", vocabulary)
    page, text = tmp_path / "a<b>&.html", tmp_path / "sents.txt"
    lines = ["<script>alert</script> & &lt;", "<script> [MASK] </script> [MASK]"] * 20
    text.write_text("\n".join(lines), encoding="utf-8")
    assert main(["--weights", str(gen), "--input", str(text), "--html", str(page), "--mask-prob", "0.5"]) == 0
    content = page.read_text(encoding="utf-8")
    parsed = Page(content)
    assert "script" not in {tag for tag, _ in parsed.elements} and "<script" not in content
    assert all(parsed.text.count(line) >= 20 for line in lines[:2]) and str(page) in parsed.text
    written = re.sub("~|[*=+]|\x1b.*?m", "", "".join(rows(capsys.readouterr().out, "generated")))
    assert "<script>" in written and parsed.text.count("<script>") > 60  # in the tooltips and the generated rows too


def test_the_page_needs_nothing_from_elsewhere(demo, tmp_path):
    page = tmp_path / "page.html"
    demo(SENTENCES, "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in Page(text).elements}
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_keyboard_reaches_every_place_and_its_description(demo, tmp_path):
    page = tmp_path / "page.html"
    out = demo([*SENTENCES, "the [MASK]"], "--html", str(page), "--mask-prob", "0.3")[1]
    parsed = Page(page.read_text(encoding="utf-8"))
    described = [attributes["aria-describedby"] for tag, attributes in parsed.elements if tag == "button"]
    tips = [attributes["id"] for _, attributes in parsed.elements if attributes.get("role") == "tooltip"]
    assert described == tips and len(set(tips)) == len(tips) == int(re.search(r"(\d+) places", out)[1])
    assert parsed.text.count("original: ") + parsed.text.count("no original known") >= len(tips)
    assert not rows(out, "top 5") and len(re.findall(r"\d\.\d%|\d\d\.\d%", parsed.text)) == 5 * len(tips)
    assert re.search(r"\d+%", parsed.text) and out.splitlines()[-1] in parsed.text  # heat has numbers; the summary is there
