"""LM_DEMO.py: sentences through main(argv), the numbers of its last line, the page, and bad input of every sort."""

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import LM_DEMO
from convert.pieces import piece_names
from corpus.vocabulary import wordpiece
from dataset import SPECIAL_TOKENS, Vocabulary
from LM_DEMO import Demo, encode, filled_in, in_words, load_pair, main, read_sentences, with_percentages
from model import ModelConfig, SavedNetwork, build_network, save_network
from utils import load, save

ROOT = Path(__file__).parent.parent
SENTENCES = ["The old dog sees a red cat.", "the bird eats, but the cats eats then!", "a tree near the river"]


@pytest.fixture
def weights(tmp_path, vocabulary):
    """gen.pt and disc.pt with random weights."""
    return write_pair(tmp_path / "run", vocabulary)


@pytest.fixture
def demo(tmp_path, weights, capsys):
    """A function that runs the demo on lines of text, or on bytes, and returns exit code, output and errors."""
    def run(text=SENTENCES, *flags):
        path = tmp_path / "sents.txt"
        path.write_bytes(text if isinstance(text, bytes) else "\n".join(text).encode())
        code = main(["--weights", str(weights[0]), "--input", str(path), "--device", "cpu", *flags])
        return code, *capsys.readouterr()
    return run


def rows(out, name):
    """The texts of all rows with this name."""
    return re.findall(rf"^[\d ]{{4}} {re.escape(name)} +(.*)$", out, re.MULTILINE)


def without_signs(text):
    return re.sub(r"[*=~+]", "", text)


def percentages(row):
    """The numbers of a row "replaced?", one for each piece."""
    return [int(percentage) for word in row.split() for percentage in word.split("/")[1].split(",")]


def networks(weights):
    return load_pair(str(weights[0]), str(weights[1]), torch.device("cpu"))


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


def test_same_seed_gives_same_output_and_another_seed_does_not(demo):
    lines = "\n\n".join(story(8)).split("\n")
    first, repeated, other = (demo(lines, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == repeated
    assert rows(first, "masked") != rows(other, "masked") and rows(first, "generated") != rows(other, "generated")
    assert rows(first, "original") == [line for line in lines if line]  # in order, without the blank lines


def test_mask_prob_is_the_share_of_predicted_pieces_and_at_least_one_is_predicted(demo):
    for share, least in (("0", 1), ("0.5", 4)):
        out = demo(SENTENCES, "--mask-prob", share)[1]
        for row in rows(out, "masked"):
            assert row.count("[MASK]") + row.count("+") // 2 >= least
    places = int(re.search(r"([\d,]+) places", demo(SENTENCES, "--mask-prob", "0")[1])[1])
    assert places == len(SENTENCES)


def test_greedy_fills_in_the_first_listed_piece_and_the_list_has_the_networks_probabilities(demo, weights, vocabulary):
    line = "the old [MASK] sees a [MASK]"
    out = demo([line], "--greedy", "--top-k", "3")[1]
    ids = [vocabulary.cls, *encode(line, vocabulary)[0], vocabulary.sep]
    assert ids.count(vocabulary.mask) == 2
    ids = torch.tensor([ids])
    positions = (ids == vocabulary.mask).nonzero()[None, :, 1]
    with torch.no_grad():
        logits = networks(weights).generator(ids, torch.zeros_like(ids), ids > -1, positions)
    pieces = vocabulary.pieces()
    expected = []
    for place in logits.softmax(-1)[0]:
        top = zip(*(values.tolist() for values in place.topk(3)), strict=True)
        expected.append("[MASK]: " + ", ".join(f"{pieces[number]} {probability:.1%}" for probability, number in top))
    assert rows(out, "top 3") == expected
    filled = re.findall("~(.*?)~", rows(out, "generated")[0])
    assert filled == [row.split(": ")[1].split()[0].removeprefix("##") for row in expected]


def test_samples_follow_the_generators_probabilities(demo):
    out = demo(["the [MASK] sees"] * 600, "--top-k", "1", "--seed", "3")[1]
    piece, share = re.fullmatch(r"\[MASK\]: (\S+) ([\d.]+)%", rows(out, "top 1")[0]).groups()
    hits = np.mean([f"~{piece.removeprefix('##')}~" in row for row in rows(out, "generated")])
    assert hits == pytest.approx(float(share) / 100, abs=0.08)


def test_only_the_masks_of_a_line_are_filled_in_if_it_has_any(demo):
    out = demo(["[MASK] old dog[MASK] the [MASK]", "the [mask] sees"])[1]
    assert rows(out, "original")[0] == "[MASK] old dog[MASK] the [MASK]" == rows(out, "masked")[0]
    assert rows(out, "generated")[0].count("~") == 6 and "*" not in rows(out, "generated")[0]
    assert re.sub("~.*?~", "", rows(out, "generated")[0]).split() == ["old", "dog", "the"]
    assert ", 0 pieces replaced" in demo(["the [MASK]"])[1]  # the only original is not masked


@pytest.mark.parametrize("greedy", [False, True])
def test_last_line_has_the_counts_and_metrics_of_what_is_shown(demo, tmp_path, weights, greedy):
    lines = [*"\n".join(story(4)).split("\n"), "the old [MASK] sees [MASK] tree."]
    flags = ["--greedy"] if greedy else []
    out = demo(lines, "--mask-prob", "0.4", *flags)[1]
    settings = Demo(input=str(tmp_path / "sents.txt"), mask_prob=0.4, greedy=greedy)
    sentences = list(filled_in(settings, networks(weights)))
    pieces = [piece for sentence in sentences for piece in sentence.generated]
    marks = [piece.mark for piece in pieces]
    assert sum(row.count("*") // 2 for row in rows(out, "generated")) == marks.count("replaced")
    known = [piece for piece in pieces if piece.mark != "filled"]
    labels = np.array([piece.mark == "replaced" for piece in known])
    scores = np.array([piece.replaced for piece in known])
    predicted, places = scores > 0.5, sum(bool(piece.mark) for piece in pieces)
    assert out.splitlines()[-1].endswith(
        f": {len(lines)} sentences, {places} places filled in, {labels.sum()} pieces replaced; the discriminator "
        f"detected {(predicted & labels).sum()} of them: precision {precision_score(labels, predicted):.3f}, recall "
        f"{recall_score(labels, predicted):.3f}, AUC {roc_auc_score(labels, scores):.3f} over {len(labels)} pieces")
    for row, sentence in zip(rows(out, "replaced?"), sentences, strict=True):
        assert percentages(row) == pytest.approx([100 * piece.replaced for piece in sentence.generated], abs=0.51)


def test_discriminator_sees_the_generated_row(demo, weights, vocabulary):
    out = demo(["the old [MASK] sees a [MASK] ."], "--greedy")[1]
    row = rows(out, "generated")[0].replace("~", "")
    ids = torch.tensor([[vocabulary.cls, *vocabulary.encode([row])[0], vocabulary.sep]])
    with torch.no_grad():
        logits = networks(weights).discriminator(ids, torch.zeros_like(ids), ids > -1)[0, 1:-1]
    assert percentages(rows(out, "replaced?")[0]) == pytest.approx((100 * logits.sigmoid()).tolist(), abs=0.51)


def test_a_masked_language_model_alone_fills_in(tmp_path, vocabulary, capsys, monkeypatch):
    config = ModelConfig(vocab_size=vocabulary.size, embedding_size=8, hidden_size=16, layers=1, heads=2,
                         feed_forward_size=32, max_positions=30)
    (tmp_path / "runs" / "bert").mkdir(parents=True)
    save_network(tmp_path / "runs" / "bert" / "mlm.pt",
                 SavedNetwork("mlm", build_network("mlm", config), config, vocabulary.to_json()))
    monkeypatch.chdir(tmp_path)
    Path("sents.txt").write_text("the old [MASK] sees\nthe dog\n")
    assert main(["--input", "sents.txt", "--device", "cpu", "--html", "page.html"]) == 0  # the newest run's
    out = capsys.readouterr().out
    assert out.startswith("generator: runs/bert/mlm.pt; discriminator: none") and not rows(out, "replaced?")
    assert "~" in rows(out, "generated")[0] and "2 sentences" in out and "replaced?" not in Path("page.html").read_text()
    for name in ("gen.pt", "mlm.pt"):
        assert name in demo_help(capsys)


def demo_help(capsys):
    assert main(["--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_says_that_a_page_is_replaced(capsys):
    assert "file that already has this name is replaced" in re.sub(r"[│\s]+", " ", demo_help(capsys))


def test_without_a_discriminator_only_its_row_and_metrics_are_missing(demo, weights):
    both = demo()[1]
    weights[1].unlink()
    code, out, _ = demo()
    assert code == 0 and "discriminator: none" in out and not rows(out, "replaced?")
    assert rows(out, "generated") == rows(both, "generated") and out.rstrip().endswith("pieces replaced")


def test_generated_rows_keep_the_spaces_of_the_line_and_join_pieces_of_a_word():
    letters = [chr(number) for number in range(97, 123)]
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *"().,'-", "well", "known", *"中文"]
    vocabulary = Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, lowercase=True), "test")

    def shown(text, changes=None):
        """The generated row of a line in which the generator replaced pieces by number."""
        sentence = next(read_sentences(iter([text]), vocabulary, 99))
        names = [(changes or {}).get(n, pieces[original]) for n, original in enumerate(sentence.ids)]
        row = [vocabulary.cls, *map(vocabulary.tokenizer.token_to_id, names), vocabulary.sep]
        sentence = in_words(pieces, sentence, row, row, [0.0 for _ in row], {})
        return "".join(piece.space + piece.text for piece in sentence.generated)

    for text in ("(well-known), don't.", "a  b", "é.g", "中文 well", "well\u00a0known", "[MASK] well([MASK])."):
        assert shown(text) == text.replace("é", "e").replace("  ", " ").replace("\u00a0", " ")
    assert shown("well known.", {1: "##s"}) == "wells."  # a continuation joins the word in front of it
    assert shown("well known.", {2: "well"}) == "well known well"  # a word does not join a word
    assert shown("well known.", {1: ","}) == "well,."
    assert shown("well (known)", {1: "well"}) == "well well known)"
    assert shown("well-known", {2: "[MASK]"}) == "well-[MASK]"
    assert shown("well-known", {2: "a"}) == "well-a"


def byte_level_tokenizer():
    """Byte-level BPE with a few words, and single bytes for all other characters."""
    merges = [(word[:end - 1], word[end - 1]) for word in ("film", "the") for end in range(2, len(word) + 1)]
    merges += [("\u0120", "film"), ("\u0120", "the")]
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def unigram_tokenizer():
    """Unigram with a few words, as SentencePiece marks them, and a piece that is a blank."""
    scores = [(token, 0.0) for token in SPECIAL_TOKENS] + [("\u2581the", -1.0), ("\u2581film", -1.0), ("film", -2.0)]
    scores += [(sign, -9.0) for sign in "\u2581.,()thefilmo日é"]
    tokenizer = Tokenizer(models.Unigram(scores, 1))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("build", [byte_level_tokenizer, unigram_tokenizer])
def test_pieces_of_other_tokenizers_are_shown_as_words(build):
    vocabulary = Vocabulary(build(), "test")
    names = piece_names(vocabulary)
    word = {"byte_level_tokenizer": "\u0120film", "unigram_tokenizer": "\u2581film"}[build.__name__]

    def shown(text, changes=None):
        """The generated row and the words with percentages, with pieces that the generator replaced by number."""
        sentence = next(read_sentences(iter([text]), vocabulary, 99))
        changed = {number: vocabulary.tokenizer.token_to_id(piece) for number, piece in (changes or {}).items()}
        row = [vocabulary.cls, *(changed.get(n, original) for n, original in enumerate(sentence.ids)), vocabulary.sep]
        sentence = in_words(names, sentence, row, row, [0.0 for _ in row], {})
        return "".join(piece.space + piece.text for piece in sentence.generated), with_percentages(sentence.generated)

    for text in ("the film.", "the (film), the film", "film [MASK] the film", "the 日 film", "thé 日日 film"):
        row, words = shown(text)
        assert row == text
        assert [word.rsplit("/", 1)[0] for word in words.split(" ")] == text.split(" ")
    assert shown("the the", {0: word})[0] == "film the" and shown("the the", {1: word})[0] == "the film"
    assert shown("the film", {1: "film"})[0] == "thefilm"  # it continues the word in front of it
    assert names[vocabulary.tokenizer.token_to_id(word)] == "film"
    assert names[vocabulary.tokenizer.token_to_id("film")] == "##film" and names[vocabulary.mask] == "[MASK]"


def test_batches_have_similar_lines_and_sentences_keep_their_order(demo, vocabulary, monkeypatch):
    batches, fill_in = [], LM_DEMO.fill_in

    def recording(sentences, *rest):
        batches.append([(vocabulary.mask in sentence.ids, len(sentence.ids)) for sentence in sentences])
        return fill_in(sentences, *rest)
    monkeypatch.setattr(LM_DEMO, "fill_in", recording)
    monkeypatch.setattr(LM_DEMO, "BATCH_SIZE", 7)
    lines = ["cat " * (1 + 5 * number % 23) + ("[MASK]" if 50 <= number < 70 else "dog") for number in range(200)]
    out = demo(lines)[1]
    assert rows(out, "original") == lines
    assert sum(len(batch) for batch in batches) == 200 and max(len(batch) for batch in batches) == 7
    assert all(len({has_mask for has_mask, _ in batch}) == 1 for batch in batches)
    lengths = [[length for _, length in batch] for batch in batches]
    assert sum(max(batch) * len(batch) for batch in lengths) < 1.3 * sum(map(sum, lengths))  # little padding


# Input


def test_standard_input_is_read_and_an_empty_line_ends_the_prompt(demo, weights, capsys, monkeypatch):
    expected = demo(["the old dog", "a cat"])[1]
    result = subprocess.run([sys.executable, LM_DEMO.__file__, "--weights", str(weights[0]), "--input", "-",
                             "--device", "cpu"], input="\ufeffthe old dog\na cat\n".encode(), capture_output=True)
    out = result.stdout.decode()
    assert result.returncode == 0, result.stderr
    assert rows(out, "generated") == rows(expected, "generated") and "\nstandard input: 2 sentences" in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["--weights", str(weights[0]), "--device", "cpu"]) == 0 and "0 sentences" in capsys.readouterr().out
    for end in ("\nnever read\n", ""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"the old dog\n{end}".encode())))
        assert main(["--weights", str(weights[0]), "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert out.count("> ") == 2 and len(rows(out.replace("> ", ""), "original")) == 1


def test_line_longer_than_the_positions_is_shown_in_parts_of_about_equal_length(demo):
    code, out, err = demo(["the dog", "  " + "cat  " * 39 + "the cat"])  # 30 positions, two of them [CLS] and [SEP]
    parts = ["the dog", *[" ".join(["cat"] * 21)], " ".join(["cat"] * 18 + ["the", "cat"])]
    assert code == 0 and [" ".join(row.split()) for row in rows(out, "original")] == parts
    assert len(err.splitlines()) == 1 and "30 positions" in err and "2 parts" in err


def test_lines_without_pieces_are_left_out_and_unknown_words_become_unk(demo):
    code, out, _ = demo(["\u200b", "   ", "the zzz \x1b[31mdog"], "--mask-prob", "0")
    assert code == 0 and len(rows(out, "original")) == 1 and "\x1b" not in out
    assert "[UNK]" in out


@pytest.mark.parametrize("text, message", [
    (b"", "no text"), (b"\n \n\n", "no text"), (b"the dog\n\0\1\2", "binary"), (bytes(range(128, 256)), "binary"),
    ("the dog\n".encode("utf-16"), "binary")])
def test_empty_or_binary_input_is_refused_and_no_page_is_left(demo, tmp_path, text, message):
    code, _, err = demo(text, "--html", str(tmp_path / "page.html"))
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("page*"))


def assert_refused(argv, capsys, *parts):
    """The demo ends with exit code 2 and one line that contains all these parts."""
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(part in err for part in parts), err


def test_files_that_do_not_fit_are_refused(tmp_path, weights, vocabulary, capsys):
    gen, disc = weights
    text = tmp_path / "sents.txt"
    text.write_text("the dog")
    rest = ["--input", text, "--device", "cpu"]
    assert_refused(["--weights", disc, *rest], capsys, "holds a discriminator", "--weights expects the generator")
    assert_refused(["--weights", gen, "--discriminator", gen, *rest], capsys, "holds a generator",
                   "--discriminator expects")
    assert_refused(["--weights", tmp_path / "none.pt", *rest], capsys, "none.pt is missing")
    assert_refused(["--weights", tmp_path, *rest], capsys, "is a folder")
    assert_refused(["--weights", gen, "--input", tmp_path / "none.txt"], capsys, "none.txt", "can't be read")
    assert_refused(["--weights", gen, "--input", tmp_path], capsys, "can't be read")
    packed = tmp_path / "sents.txt.gz"
    packed.write_bytes(gzip.compress(b"the dog")[:10] + b"no deflate stream")
    assert_refused(["--weights", gen, "--input", packed], capsys, "can't be read")

    other = Vocabulary(wordpiece({piece: n for n, piece in enumerate([*SPECIAL_TOKENS, "a"])}, lowercase=True), "other")
    _, other_disc = write_pair(tmp_path / "other", other)
    assert_refused(["--weights", gen, "--discriminator", other_disc, *rest], capsys, "different vocabularies")

    content, bad = load(gen), tmp_path / "bad.pt"
    larger = Vocabulary(wordpiece({piece: n for n, piece in enumerate([*SPECIAL_TOKENS, *map(str, range(95))])}, True), "x")
    tensors = content["weights"]
    name, tensor = next(iter(tensors.items()))
    for wrong, part in [
        ([1, 2], "not a weights file"), ({"electra": {}}, "not a weights file"), (content | {"kind": 3}, "holds a 3"),
        (content | {"model": {"size": 1}}, "size"), (content | {"model": content["model"] | {"layers": 2}}, "layers.1"),
        (content | {"model": content["model"] | {"embedding_size": 9}}, "size mismatch"),
        (content | {"vocabulary": "{}"}, "no usable tokenizer"),
        (content | {"vocabulary": larger.to_json()}, "100 pieces"),
        (content | {"weights": tensors | {name: torch.full_like(tensor, float("nan"))}}, "not finite"),
    ]:
        save(bad, wrong)
        assert_refused(["--weights", bad, *rest], capsys, "bad.pt", part)
    bad.write_bytes(gen.read_bytes()[:2000])
    assert_refused(["--weights", bad, *rest], capsys, "damaged")
    bad.write_text("no weights at all")
    assert_refused(["--weights", bad, *rest], capsys, "damaged")


@pytest.mark.parametrize("flags, message", [
    (["--mask-prob", "1.5"], "mask_prob = 1.5"), (["--mask-prob", "nan"], "mask_prob = nan"),
    (["--top-k", "-1"], "top_k = -1"), (["--seed", str(2**70)], "seed = 1180591620717411303424"),
    (["--html", "no/such/page.html"], "--html"), (["--html", "."], "--html")])
def test_impossible_values_are_refused(flags, message, capsys):
    assert_refused(flags, capsys, message)


def test_newest_run_is_used_and_named_by_default(tmp_path, vocabulary, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused([], capsys, "no runs/*/gen.pt", "Pretraining.py")
    for age, name in enumerate(("new", "old")):
        gen, _ = write_pair(Path("runs") / name, vocabulary)
        os.utime(gen, (1e9 - age, 1e9 - age))
    Path("sents.txt").write_text("the dog")
    assert main(["--input", "sents.txt", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("generator: runs/new/gen.pt; discriminator: runs/new/disc.pt")


# Terminals and pipes


def test_colours_appear_only_on_a_terminal_without_no_color(demo, monkeypatch):
    piped = demo()[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = demo()[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert demo()[1] == piped and "\x1b" not in piped and "*" in piped
    assert "\x1b[1;4;33m" in coloured and "\x1b[30;48;5;" in coloured
    without_colours = [re.sub("\x1b.*?m", "", row) for row in rows(coloured, "generated")]
    assert without_colours == [without_signs(row) for row in rows(piped, "generated")]


def test_broken_pipe_ends_without_a_message_and_leaves_no_page(tmp_path, weights):
    text = tmp_path / "long.txt"
    text.write_text("the old dog sees a red cat.\n" * 3000)
    page = tmp_path / "page.html"
    command = [sys.executable, ROOT / "LM_DEMO.py", "--weights", weights[0], "--input", text, "--html", page]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    assert not list(tmp_path.glob("page*"))


# The page


def test_page_escapes_all_text(tmp_path, capsys):
    pieces = [*SPECIAL_TOKENS, "<", ">", "/", "script", "<script>", "&", "lt", ";", "alert"]  # even a whole tag
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


def test_page_is_complete_in_one_file_without_scripts_and_has_a_dark_mode(demo, tmp_path):
    page = tmp_path / "page.html"
    demo(SENTENCES, "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in Page(text).elements}
    assert "default-src 'none'" in text and "color-scheme: light dark" in text and "width=device-width" in text


def test_keyboard_reaches_every_filled_in_piece_and_its_description(demo, tmp_path):
    page = tmp_path / "page.html"
    out = demo([*SENTENCES, "the [MASK]"], "--html", str(page), "--mask-prob", "0.3")[1]
    parsed = Page(page.read_text(encoding="utf-8"))
    described = [attributes["aria-describedby"] for tag, attributes in parsed.elements if tag == "button"]
    tips = [attributes["id"] for _, attributes in parsed.elements if attributes.get("role") == "tooltip"]
    assert described == tips and len(set(tips)) == len(tips) == int(re.search(r"(\d+) places", out)[1])
    assert parsed.text.count("original: ") + parsed.text.count("no original known") >= len(tips)
    assert not rows(out, "top 5") and len(re.findall(r"\d\.\d%|\d\d\.\d%", parsed.text)) == 5 * len(tips)
    assert re.search(r"\d+%", parsed.text) and out.splitlines()[-1] in parsed.text  # shading has numbers; the last line
