"""Reads sentences and shows each one masked, filled in by a generator and judged piece by piece by a discriminator.

    python LM_DEMO.py                                        # the newest run; asks for sentences
    python LM_DEMO.py --weights gen.pt --input sents.txt --top-k 3 --html page.html
"""

import contextlib
import dataclasses
import gc
import io
import math
import os
import re
import signal
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from convert.pieces import piece_names, shown_pieces, spaces_before
from dataset import Vocabulary, batches_by_length, collate, existing_masks, mask_tokens, read_lines
from model import Discriminator, Generator, corrupt, gumbel_sample, load_network, sampler_draws
from studies.tracking import detection_metrics
from utils import bounded, newest_run_file, pick_device, read_settings, reports_input_errors, require, write_text

MASK = "[MASK]"
PAGE_TOP_K = 5  # pieces listed for each place on the page when --top-k isn't given
CHUNK_SIZE = 256  # most sentences that are sorted by length together
BATCH_SIZE = 16  # sentences in one forward pass
UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # white space, control characters, surrogates
NO_SPACE_BEFORE = set(".,;:!?)]}%'")
NO_SPACE_AFTER = set("([{$'")
MARKS = {  # signs in plain text, attributes in a terminal, meaning
    "hidden": ("", "2", "[MASK] hidden from the generator"),
    "kept": ("+", "4", "left visible, predicted all the same"),
    "replaced": ("*", "1;4;33", "generated, differs from the original"),
    "same": ("=", "4;32", "generated, equals the original"),
    "filled": ("~", "1;4;36", "generated where the line says [MASK]"),
}
SHADES = {0.75: "30;48;5;209", 0.5: "30;48;5;216", 0.25: "30;48;5;223", 0.1: "30;48;5;230"}  # black on light red


@dataclass(frozen=True)
class Demo:
    """Masks sentences, lets the generator fill them in and the discriminator look for replaced pieces."""

    weights: str | None = None
    """gen.pt or mlm.pt of a run. None: the newest one in runs/."""
    input: str | None = None
    """Text file (also .gz, .bz2, .xz) with one sentence a line; - is standard input. None: ask for sentences. If a line
    contains [MASK], those places are filled in and no others."""
    discriminator: str | None = None
    """disc.pt with the same vocabulary. None: the one beside --weights, if there is one."""
    mask_prob: float = bounded(0.15, at_least=0.0, at_most=1.0)
    """Share of a sentence's pieces to mask; at least one piece is masked."""
    top_k: int = bounded(0, at_least=0)
    """List the generator's K most likely pieces for each place. 0: no list; the page shows 5."""
    greedy: bool = False
    """Fill in the most likely piece instead of a sampled one."""
    seed: int = bounded(0, at_least=-2**63, below=2**63)
    """Seed of the masks and the samples."""
    html: str | None = None
    """Also write a page to this file. A file that already has this name is replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a CUDA device."""


class Pair(NamedTuple):
    """The two networks and what they have in common."""

    generator: Generator
    generator_path: Path
    vocabulary: Vocabulary
    names: list[str]  # of piece_names, by their ids
    max_length: int  # tokens of a row, [CLS] and [SEP] included
    device: torch.device
    discriminator: Discriminator | None = None
    discriminator_path: Path | None = None


class Piece(NamedTuple):
    """A word piece as it is shown."""

    space: str  # in front of it, "" or " "
    text: str
    mark: str  # a key of MARKS where the generator predicts, "" elsewhere
    continues: bool = False  # the word in front of it
    replaced: float = 0.0  # the discriminator's probability of "replaced"
    original: str = ""
    likely: Sequence[tuple[str, float]] = ()  # the generator's most likely pieces and their probabilities


class Sentence(NamedTuple):
    """A line with text, before and after it has been filled in."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]  # where each piece begins and ends in the text
    masked: Sequence[Piece] = ()  # what the generator sees
    generated: Sequence[Piece] = ()  # what the discriminator sees


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Demo, argv)
    if settings.html:
        page = Path(settings.html)
        require(os.access(page.parent, os.W_OK) and not page.is_dir(),
                f"--html {page} can't be written: expected a file name in an existing, writable folder")
    pair = load_pair(settings.weights, settings.discriminator, pick_device(settings.device))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a letter
    gc.freeze()  # a tenth faster: the garbage collector no longer visits what the imports created
    try:
        show(settings, pair)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at exit
        return 128 + signal.SIGPIPE
    return 0


def show(settings: Demo, pair: Pair) -> None:
    """Prints every sentence and writes the page. Raises InputError if the input contains no text."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    judged = pair.discriminator is not None
    page = [page_head(settings, pair)]
    number, places = 0, 0
    labels, probabilities = array("b"), array("d")  # of the pieces whose original is known: 9 bytes each
    print(text_head(pair, colour))
    for number, sentence in enumerate(filled_in(settings, pair), 1):
        print(text_view(number, sentence, settings.top_k, judged, colour), flush=True)
        if settings.html:
            page.append(page_view(number, sentence, judged))
        places += sum(piece.mark != "" for piece in sentence.generated)
        known = [piece for piece in sentence.generated if piece.mark != "filled"]
        labels.extend(piece.mark == "replaced" for piece in known)
        probabilities.extend(piece.replaced for piece in known)
    require(number > 0 or not settings.input, f"no text in {settings.input}: expected one sentence a line")
    source = "standard input" if settings.input in (None, "-") else settings.input
    summary = f"{source}: {number:,} sentences, {places:,} places filled in, {sum(labels):,} pieces replaced"
    if judged and any(labels):
        summary += detection_text(np.array(labels, dtype=bool), np.array(probabilities))
    print(summary)
    if settings.html:
        page.append(f"</main>\n<footer><p>{escape(summary)}</p></footer>\n</body></html>\n")
        write_text(Path(settings.html), "".join(page))


def load_pair(weights: str | None, discriminator: str | None, device: torch.device) -> Pair:
    """The networks from the files named, or from the newest run. Raises InputError if their vocabularies differ."""
    path = Path(weights) if weights else newest_run_file("gen.pt", "mlm.pt")
    saved = load_network(path, ["generator", "mlm"], "--weights")
    vocabulary = Vocabulary.of_network(saved, str(path))
    pair = Pair(saved.network.to(device), path, vocabulary, piece_names(vocabulary), saved.config.max_positions, device)
    path = Path(discriminator) if discriminator else path.with_name("disc.pt")
    if not discriminator and not path.is_file():
        return pair
    saved = load_network(path, ["discriminator"], "--discriminator")
    other = Vocabulary.of_network(saved, str(path))
    require(other.to_json() == vocabulary.to_json(),
            f"{pair.generator_path} ({vocabulary.size:,} pieces) and {path} ({other.size:,} pieces) have different "
            "vocabularies: expected the disc.pt of the same run, name it with --discriminator")
    max_length = min(pair.max_length, saved.config.max_positions)
    return pair._replace(discriminator=saved.network.to(device), discriminator_path=path, max_length=max_length)


def input_texts(source: str | None) -> Iterator[str]:
    """Lines of a file or standard input, or typed at a prompt; InputError if it is binary or can't be read."""
    if source is None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        print("Type a sentence; an empty line ends.")
        with contextlib.suppress(EOFError):
            while text := input("> ").strip():
                yield text
        return
    for text in read_lines([Path(source)]):
        is_text = "\0" not in text and text.count("\ufffd") <= len(text) / 4
        require(is_text, f"{source} is binary or not UTF-8: expected text with one sentence a line")
        yield text


def read_sentences(texts: Iterator[str], vocabulary: Vocabulary, max_pieces: int) -> Iterator[Sentence]:
    """Sentences of at most `max_pieces`; a longer text becomes several. Texts without any piece are left out."""
    for text in texts:
        text = UNPRINTABLE.sub(" ", text)
        ids, spans = encode(text, vocabulary)
        if not ids:
            continue
        parts = math.ceil(len(ids) / max_pieces)
        if parts > 1:
            print(f"note: {text[:30]!r}... is longer than the networks' {max_pieces + 2} positions; it is shown in {parts} "
                  "parts", file=sys.stderr)
        for numbers in np.array_split(np.arange(len(ids)), parts):
            part = slice(numbers[0], numbers[-1] + 1)
            begin, end = spans[part][0][0], spans[part][-1][1]
            yield Sentence(text[begin:end], ids[part], [(first - begin, last - begin) for first, last in spans[part]])


def encode(text: str, vocabulary: Vocabulary) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the pieces, and where each begins and ends in the text. "[MASK]" is the mask, "[SEP]" is plain text."""
    ids, spans, start = [], [], 0
    for part in re.split(r"(\[MASK\])", text):
        if part == MASK:
            ids.append(vocabulary.mask)
            spans.append((start, start + len(MASK)))
        else:
            # Some tokenizers make a piece of the blank before [MASK], which belongs to the word in its place.
            encoding = vocabulary.tokenizer.encode(part.rstrip(), add_special_tokens=False)
            ids += encoding.ids
            spans += [(start + begin, start + end) for begin, end in encoding.offsets]
        start += len(part)
    return ids, spans


# Filling in


def filled_in(settings: Demo, pair: Pair) -> Iterator[Sentence]:
    """The sentences of the input, in its order. A batch has similar lengths, and [MASK] in all sentences or in none."""
    sentences = read_sentences(input_texts(settings.input), pair.vocabulary, pair.max_length - 2)  # [CLS] and [SEP]
    rng = torch.Generator(pair.device).manual_seed(settings.seed)
    chunk_size = 1
    for _, group in groupby(sentences, key=lambda sentence: pair.vocabulary.mask in sentence.ids):
        while chunk := list(islice(group, chunk_size)):
            for numbers in batches_by_length(np.array([len(sentence.ids) for sentence in chunk]), BATCH_SIZE):
                batch = fill_in([chunk[number] for number in numbers], pair, settings, rng)
                for number, sentence in zip(numbers, batch, strict=True):
                    chunk[number] = sentence
            yield from chunk
            if settings.input:  # at a prompt each line is answered before the next one is read
                chunk_size = min(2 * chunk_size, CHUNK_SIZE)  # chunks grow, so that the first sentences appear soon


@torch.inference_mode()
def fill_in(sentences: list[Sentence], pair: Pair, settings: Demo, rng: torch.Generator) -> list[Sentence]:
    """One batch through both networks. Either all of its sentences contain [MASK] or none does."""
    vocabulary = pair.vocabulary
    batch = collate([(sentence.ids, []) for sentence in sentences], vocabulary, pair.max_length).to(pair.device)
    if vocabulary.mask in sentences[0].ids:
        masked = existing_masks(batch, vocabulary)
    else:
        masked = mask_tokens(batch, vocabulary, settings.mask_prob, pair.max_length, rng)

    logits = pair.generator(masked.ids, batch.segments, batch.attention_mask, masked.positions)
    logits = logits[..., :vocabulary.size]  # (B, K, V): the embeddings can have more rows than there are pieces
    draws = sampler_draws(logits.shape[:-1], logits.shape[-1], logits.device, rng)
    sampled = logits.argmax(-1) if settings.greedy else gumbel_sample(logits, draws)
    top_k = settings.top_k or (PAGE_TOP_K if settings.html else 0)
    top = logits.topk(min(top_k, vocabulary.size))  # (B, K, top_k)
    shares = (top.values - logits.logsumexp(-1, keepdim=True)).exp() if top_k else top.values

    generated = corrupt(batch.ids, masked.positions, masked.chosen, sampled)
    replaced = torch.zeros(batch.ids.shape)
    if pair.discriminator:
        scores = pair.discriminator(generated, batch.segments, batch.attention_mask)
        replaced = scores.double().sigmoid()  # high scores would all round to 1 in fp32, and the AUC needs their order

    likely = [{} for _ in sentences]  # the most likely pieces and their probabilities by position
    positions, top_ids, shares = masked.positions.tolist(), top.indices.tolist(), shares.tolist()
    for row, slot in masked.chosen.nonzero().tolist():
        pieces = [pair.names[number] for number in top_ids[row][slot]]
        likely[row][positions[row][slot]] = list(zip(pieces, shares[row][slot], strict=True))
    rows = zip(sentences, masked.ids.tolist(), generated.tolist(), replaced.tolist(), likely, strict=True)
    return [in_words(pair.names, *row) for row in rows]


def in_words(names: list[str], sentence: Sentence, masked_ids: list[int], generated_ids: list[int],
             replaced: list[float], likely: dict[int, list[tuple[str, float]]]) -> Sentence:
    """The sentence with its pieces; the lists are over its tokens (L) from [CLS] on, `likely` by predicted position."""
    masked, generated = [], []
    previous, previous_changed = "", False
    originals = [names[number] for number in sentence.ids]
    columns = zip(sentence.ids, originals, shown_pieces(originals, sentence.text, sentence.spans),
                  spaces_before(sentence.text, sentence.spans), strict=True)
    for position, (number, original, shown, space) in enumerate(columns, 1):  # 0 is [CLS]
        masked_id, generated_id = masked_ids[position], generated_ids[position]
        name = names[generated_id]
        seen_mark, mark = "", ""
        if position in likely:
            seen_mark = "kept" if masked_id == number and original != MASK else "hidden"
            mark = "same" if generated_id == number else "replaced"
            if original == MASK:
                mark = "filled"
        masked.append(Piece(space, shown if masked_id == number else MASK, seen_mark))

        # The line's own spaces fit, except beside a piece of another type, such as a continuation in a word's place
        continues, text = name.startswith("##"), shown if generated_id == number else name.removeprefix("##")
        changed = piece_type(name) != piece_type(original)
        if changed or previous_changed:
            joined = continues or not generated or text in NO_SPACE_BEFORE or previous in NO_SPACE_AFTER
            space = "" if joined else " "
        generated.append(Piece(space, text, mark, continues and not space, replaced[position], original,
                               likely.get(position, ())))
        previous, previous_changed = text, changed
    return sentence._replace(masked=masked, generated=generated)


def piece_type(name: str) -> str:
    if name.startswith("##"):
        return "continuation"
    return "word" if any(map(str.isalnum, name)) else "sign"


def detection_text(labels: np.ndarray, probabilities: np.ndarray) -> str:
    """How many of the replaced pieces the discriminator detected; bool and fp64 arrays over the pieces (N,)."""
    scores = probabilities - 0.5  # positive: rather replaced than original
    metrics = detection_metrics(labels, scores)
    detected = (labels & (scores > 0)).sum()
    return (f"; the discriminator detected {detected:,} of them: precision {metrics.precision:.3f}, "
            f"recall {metrics.recall:.3f}, AUC {metrics.auc:.3f} over {len(labels):,} pieces")


# Text view


def text_head(pair: Pair, colour: bool) -> str:
    """The files in use and the meaning of the marks."""
    marks = ", ".join(marked(meaning, mark, colour) for mark, (_, _, meaning) in MARKS.items())
    lines = [f"generator: {pair.generator_path}; discriminator: {pair.discriminator_path or 'none'}; {pair.device}",
             f"marks: {marks}"]
    if pair.discriminator:
        shades = " ".join(painted(f" {least:.0%} ", SHADES[least]) for least in sorted(SHADES))
        form = f"as shading from {shades} on" if colour else "in percent: word/percent, one for each piece of the word"
        lines.append(f"replaced?: the discriminator's probability that the piece was replaced, {form}")
    return "\n".join([*lines, pair.vocabulary.case_note]).rstrip() + "\n"


def text_view(number: int, sentence: Sentence, top_k: int, judged: bool, colour: bool) -> str:
    """One sentence as rows of text."""
    rows = [("original", sentence.text)]
    for name, pieces in (("masked", sentence.masked), ("generated", sentence.generated)):
        rows.append((name, "".join(piece.space + marked(piece.text, piece.mark, colour) for piece in pieces)))
    if judged and colour:
        shaded = (piece.space + painted(piece.text, shade(piece.replaced)) for piece in sentence.generated)
        rows.append(("replaced?", "".join(shaded)))
    elif judged:
        rows.append(("replaced?", with_percentages(sentence.generated)))
    for piece in sentence.generated:
        if top_k and piece.mark:
            likely = ", ".join(f"{name} {share:.1%}" for name, share in piece.likely)
            rows.append((f"top {top_k}", f"{piece.original}: {likely}"))
    lines = [f"     {name:<10} {text}\n" for name, text in rows]
    return f"{number:<4}" + "".join(lines)[4:]


def with_percentages(pieces: Sequence[Piece]) -> str:
    """The words, each with the discriminator's percentages for its pieces, as in "playing/3,70"."""
    words = []
    for piece in pieces:
        percentage = f"{100 * piece.replaced:.0f}"
        if words and (piece.continues or words[-1].startswith("/")):  # the latter is a blank
            text, percentages = words.pop().rsplit("/", 1)
            words.append(f"{text}{piece.text}/{percentages},{percentage}")
        else:
            words.append(f"{piece.text}/{percentage}")
    return " ".join(words)


def marked(text: str, mark: str, colour: bool) -> str:
    """The text in the colour or between the signs of a key of MARKS; as it is if the key is ""."""
    sign, ansi, _ = MARKS.get(mark, ("", "", ""))
    return painted(text, ansi) if colour else sign + text + sign


def shade(probability: float) -> str:
    return next((ansi for least, ansi in SHADES.items() if probability >= least), "")


def painted(text: str, ansi: str) -> str:
    return f"\x1b[{ansi}m{text}\x1b[0m" if ansi else text


# Page


def page_head(settings: Demo, pair: Pair) -> str:
    """The beginning of the page: style, title, legend and settings."""
    legend = [f"<span class={mark}>{meaning}</span>" for mark, (_, _, meaning) in MARKS.items()]
    legend.append("a dotted frame: point at it or go there with Tab to see the generator's most likely pieces")
    if pair.discriminator:
        examples = " ".join(page_heat("word", probability) for probability in (0.1, 0.4, 0.7, 1.0))
        legend.append(f"{examples}: the discriminator's probability that the piece was replaced, from 10% on")
    if pair.vocabulary.case_note:
        legend.append(pair.vocabulary.case_note)
    used = {"weights": pair.generator_path, "discriminator": pair.discriminator_path, "device": pair.device}
    values = dataclasses.asdict(settings) | used
    rows = {name.replace("_", " "): escape(str(value)) for name, value in values.items()}
    return (f"{PAGE_HEAD}<ul><li>{'<li>'.join(legend)}</ul>\n"
            f"<details><summary>Settings</summary>{page_list(rows)}</details></header>\n<main>\n")


def page_view(number: int, sentence: Sentence, judged: bool) -> str:
    """One sentence as an <article>, with every text escaped."""
    generated = [page_piece(piece, f"tip-{number}-{place}") for place, piece in enumerate(sentence.generated)]
    rows = {"original": escape(sentence.text), "masked": "".join(page_piece(piece) for piece in sentence.masked),
            "generated": "".join(generated)}
    if judged:
        rows["replaced?"] = "".join(piece.space + page_heat(piece.text, piece.replaced) for piece in sentence.generated)
    return f"<article><h2>Sentence {number}</h2>{page_list(rows)}</article>\n"


def page_list(rows: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{name}</dt><dd dir=auto>{text}</dd>\n" for name, text in rows.items()) + "</dl>"


def page_piece(piece: Piece, tip: str = "") -> str:
    """A piece. With a `tip` it is a button, so that the keyboard can reach it, which shows the most likely pieces."""
    text = escape(piece.text)
    if not piece.mark:
        return piece.space + text
    if not tip:
        return f"{piece.space}<span class={piece.mark}>{text}</span>"
    original = "no original known" if piece.mark == "filled" else f"original: {escape(piece.original)}"
    likely = "".join(f"<span>{escape(name)} <b>{share:.1%}</b></span> " for name, share in piece.likely)
    button = f"<button type=button class={piece.mark} aria-describedby={tip}>{text}</button>"
    tooltip = f"<span class=tip role=tooltip id={tip}><span>{original}</span> {likely}</span>"
    return f"{piece.space}<span class=place>{button}{tooltip}</span>"


def page_heat(text: str, probability: float) -> str:
    """The text on a ground that is the redder, the higher the probability; plain if it is below 10%."""
    percent = round(100 * probability)
    if percent < 10:
        return escape(text)
    return f'<span class=heat style="--percent:{percent}">{escape(text)}<sub>{percent}%</sub></span>'


PAGE_HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>ELECTRA fills in the blanks</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: light-dark(#1b1b1f, #ececf1); --ground: light-dark(#fdfdfb, #16161a) }
body { max-width: 56rem; margin: auto; padding: 1rem 1rem 12rem; font: 1rem/1.7 system-ui, sans-serif;
  color: var(--ink); background: var(--ground); overflow-wrap: anywhere }
article { margin: 1rem 0; padding: .75rem 1rem; border: 1px solid light-dark(#d9d9de, #3a3a44); border-radius: 8px }
h2 { margin: 0; font-size: .85rem } h2, dt, .hidden { color: light-dark(#5c5c66, #a5a5b2) }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .25rem 1rem; margin: 0 } dd { position: relative; margin: 0 }
@media (max-width: 40rem) { dl { display: block } }
.kept { text-decoration: underline dotted } .replaced, .same, .filled { font-weight: bold }
.replaced { color: light-dark(#9a3412, #fdba74); text-decoration: underline }
.same { color: light-dark(#166534, #86efac) } .filled { color: light-dark(#1d4ed8, #93c5fd); font-style: italic }
.heat { background: rgb(255 96 40 / calc(var(--percent) * .55%)); border-radius: .2rem } sub { font-size: .65em }
button { font: inherit; background: none; border: 1px dotted; border-radius: .25rem; scroll-margin-bottom: 14rem }
.tip { display: none; position: absolute; top: 100%; left: 0; z-index: 1; padding: .4rem .7rem; border-radius: .4rem;
  color: var(--ground); background: var(--ink) } .tip span { display: flex; justify-content: space-between; gap: 1rem }
button:focus-visible { outline: 3px solid } .place:hover .tip, .place:focus-within .tip { display: block }
</style></head><body><header><h1>ELECTRA fills in the blanks</h1>
<p>The generator fills in the masked pieces; the discriminator estimates which pieces were replaced.</p>
"""


if __name__ == "__main__":
    sys.exit(main())
