"""Sentences in; out come their masked and generated forms and the discriminator's opinion, in a terminal and on a page.

    python LM_DEMO.py                                        # the newest run, a prompt
    python LM_DEMO.py --weights gen.pt --input sents.txt --top-k 3 --html page.html
"""

import contextlib
import dataclasses
import gc
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro

from dataset import Vocabulary, candidates, collate, given_masks, mask_tokens, read_lines, standard_input
from model import Discriminator, Generator, corrupt, gumbel_sample, sampler_draws
from Pretraining import newest_weights, read_network
from utils import InputError, detection_metrics, pick_device, replacing, reports_input_errors

MASK = "[MASK]"
PAGE_TOP_K = 5  # the page's, where --top-k is not given
CHUNK = 512  # sentences sorted by length together
BATCH_TOKENS = 2048  # of one forward pass, padding counted
CLOSING, OPENING = set(".,;:!?)]}%'"), set("([{$'")  # no space before, no space after


@dataclass(frozen=True)
class Demo:
    """Masks sentences, lets the generator fill them in and the discriminator look for what was replaced."""

    weights: str | None = None
    """gen.pt of a run. None: the newest in runs/."""
    input: str | None = None
    """Text file (.gz, .bz2, .xz too), one sentence a line; - is standard input. None: a prompt. Where a line says [MASK],
    those places are filled in and no others."""
    discriminator: str | None = None
    """disc.pt of the same vocabulary. None: the one beside gen.pt, if there."""
    mask_prob: float = 0.15
    """Share of a sentence's pieces that are masked; at least one is."""
    top_k: int = 0
    """List the generator's K most likely pieces for each place. 0: none; the page shows 5."""
    greedy: bool = False
    """Take the most likely piece; otherwise one is sampled."""
    seed: int = 0
    """Of masks and samples."""
    html: str | None = None
    """Write a page to this file too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""


class Pair(NamedTuple):
    """The networks and what they share."""

    generator: Generator
    discriminator: Discriminator | None
    vocabulary: Vocabulary
    longest: int  # pieces of a row, [CLS] and [SEP] counted
    device: torch.device


class Line(NamedTuple):
    """A sentence as text and as ids."""

    text: str
    ids: list[int]
    gaps: list[str]  # before each piece, "" or " "
    dropped: int  # pieces beyond the networks' positions


class Part(NamedTuple):
    """A piece as it is shown."""

    gap: str
    text: str
    inside: bool  # a word that began before it
    mark: str  # a key of MARKS where the generator predicts, "" elsewhere
    original: str  # the piece that was here
    likely: Sequence[tuple[str, float]]  # the generator's pieces and their probabilities
    suspicion: float  # the discriminator's probability of "replaced"


class Sentence(NamedTuple):
    text: str
    masked: list[Part]
    generated: list[Part]


MARKS = {"hidden": ("", "2", "[MASK] hidden from the generator"),  # plain signs, terminal attributes, meaning
         "kept": ("+", "4", "predicted although left visible"),
         "replaced": ("*", "1;4;33", "generated, not the original"),
         "same": ("=", "4;32", "generated, the original again"),
         "filled": ("~", "1;4;36", "generated, no original known")}
HEAT = ((0.75, "30;48;5;209"), (0.5, "30;48;5;216"), (0.25, "30;48;5;223"), (0.1, "30;48;5;230"))  # black on light red


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = tyro.cli(Demo, args=argv)
    check(settings)
    path = Path(settings.weights) if settings.weights else newest_weights("gen.pt")
    beside = path.with_name("disc.pt")
    partner = Path(settings.discriminator) if settings.discriminator else beside if beside.is_file() else None
    pair = load_pair(path, partner, pick_device(settings.device))
    settings = dataclasses.replace(settings, weights=str(path), discriminator=partner and str(partner))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that lack a letter
    gc.freeze()  # the imports' objects outlive the run: walking through them again and again costs a tenth of it
    try:
        show(settings, pair)
        sys.stdout.flush()
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        return 141  # as a shell reports a program that SIGPIPE ended
    except KeyboardInterrupt:
        return 130
    return 0


def show(settings: Demo, pair: Pair) -> None:
    """Prints every sentence and writes it to the page; InputError if there is none."""
    tally = Tally()
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    lines = input_lines(settings.input) if settings.input else prompted_lines()
    name = "standard input" if settings.input in (None, "-") else settings.input
    print(text_head(settings, pair, colour))
    with contextlib.ExitStack() as files:
        page = None
        if settings.html:
            temporary = files.enter_context(replacing(Path(settings.html)))
            page = files.enter_context(open(temporary, "w", encoding="utf-8"))
            page.write(page_head(settings, pair))
        for number, sentence in enumerate(filled_in(lines, pair, settings, tally), 1):
            print(text_view(number, sentence, settings.top_k, pair.discriminator is not None, colour), flush=True)
            if page:
                page.write(page_view(number, sentence, pair.discriminator is not None))
        if settings.input and not tally.sentences:
            raise InputError(f"no text in {name}: one sentence a line is wanted")
        print(tally.summary(name))
        if page:
            page.write(PAGE_FOOT.format(escape(tally.summary(name))))


def check(settings: Demo) -> None:
    """InputError for a value that can't work."""
    html = Path(settings.html or "page.html")
    for wrong, message in (
        (not 0 <= settings.mask_prob <= 1, f"--mask-prob {settings.mask_prob} must be from 0 to 1"),
        (settings.top_k < 0, f"--top-k {settings.top_k} can't be negative"),
        (not -(1 << 63) <= settings.seed < 1 << 63, f"--seed {settings.seed} does not fit 64 bits"),
        (settings.html is not None and (html.is_dir() or not os.access(html.parent, os.W_OK)),
         f"--html {html} can't be written: name a file in a folder that is there"),
    ):
        if wrong:
            raise InputError(message)


# Networks


def load_pair(path: Path, partner: Path | None, device: torch.device) -> Pair:
    """InputError for files that don't hold a generator and a discriminator of one vocabulary."""
    generator, config, vocabulary = read_network(path, {"generator": Generator}, "--weights")[:3]
    discriminator, longest = None, config.max_positions
    if partner:
        discriminator, config, other = read_network(partner, {"discriminator": Discriminator}, "--discriminator")[:3]
        if other.state() != vocabulary.state():
            raise InputError(f"{path} ({vocabulary.size:,} pieces) and {partner} ({other.size:,}) have different "
                             "vocabularies: name the disc.pt of the same run with --discriminator")
        discriminator, longest = discriminator.to(device), min(longest, config.max_positions)
    return Pair(generator.to(device), discriminator, vocabulary, longest, device)


# Sentences


def input_lines(source: str) -> Iterator[str]:
    """Lines of a file or of standard input that hold text; InputError where it is binary or can't be read."""
    for line in read_lines([Path(source)]):
        if "\0" in line or line.count("\ufffd") > len(line) / 4:
            raise InputError(f"{source} is binary or not UTF-8: one sentence a line of text is wanted")
        if line:
            yield line


def prompted_lines() -> Iterator[str]:
    """Lines typed at a prompt until an empty one."""
    standard_input()
    print("Type a sentence; an empty line ends.")
    with contextlib.suppress(EOFError):
        while line := input("> ").strip():
            yield line


def encode(lines: list[str], vocabulary: Vocabulary, longest: int) -> list[Line]:
    """At most `longest` pieces of each line. [MASK] becomes the mask piece; all else is text, control characters blank."""
    lines = [re.sub(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", line) for line in lines]
    parts = [part for line in lines for part in line.split(MASK)]
    encodings = iter(vocabulary.tokenizer.encode_batch(parts, add_special_tokens=False))
    encoded = []
    for line in lines:
        ids, spans, start = [], [], 0
        for part in line.split(MASK):
            if start:  # a [MASK] before it
                ids.append(vocabulary.mask)
                spans.append((start - len(MASK), start))
            encoding = next(encodings)
            ids += encoding.ids
            spans += [(start + first, start + end) for first, end in encoding.offsets]
            start += len(part) + len(MASK)
        between = [line[end:first] for (_, end), (first, _) in pairwise([(0, 0), *spans[:longest]])]
        text = line if len(ids) <= longest else f"{line[:spans[longest - 1][1]]} ..."
        encoded.append(Line(text, ids[:longest], [" " if " " in some else "" for some in between],
                            max(0, len(ids) - longest)))
    return encoded


class Tally:
    """What the sentences of one file add up to; 5 bytes a piece."""

    def __init__(self) -> None:
        self.sentences = self.places = 0
        self.labels, self.scores = [], []  # of the pieces whose original is known, batch by batch

    def summary(self, name: str) -> str:
        """The last line: how many of the replaced pieces the discriminator found."""
        labels = np.concatenate([np.zeros(0, dtype=bool), *self.labels])
        text = f"{name}: {self.sentences:,} sentences, {self.places:,} places filled in, {labels.sum():,} pieces replaced"
        if not self.scores or not labels.any():
            return text
        scores = np.concatenate(self.scores)
        found = detection_metrics(labels, scores)
        return (f"{text}; the discriminator found {(labels & (scores > 0)).sum():,} of them: precision "
                f"{found.precision:.3f}, recall {found.recall:.3f}, AUC {found.auc:.3f} over {len(labels):,} pieces")


@torch.inference_mode()
def fill_in(lines: list[Line], pair: Pair, words: "Words", settings: Demo, rng: torch.Generator,
            tally: Tally) -> list[Sentence]:
    """One batch through both networks. Of its lines, all or none hold [MASK]."""
    vocabulary = pair.vocabulary
    batch = collate([(line.ids, []) for line in lines], vocabulary, pair.longest).to(pair.device)
    masked = (given_masks(batch, vocabulary) if vocabulary.mask in lines[0].ids else
              mask_tokens(batch, vocabulary, settings.mask_prob, pair.longest, rng))
    logits = pair.generator(masked.ids, batch.segments, batch.mask, masked.positions)  # (B, K, V)
    draws = sampler_draws(logits.shape[:-1], logits.shape[-1], logits.device, rng)
    sampled = logits.argmax(-1) if settings.greedy else gumbel_sample(logits, draws)
    generated = corrupt(batch.ids, masked.positions, masked.chosen, sampled)
    scores = torch.full(batch.ids.shape, -torch.inf)
    known = candidates(batch, vocabulary)
    tally.sentences += len(lines)
    tally.places += int(masked.chosen.sum())
    tally.labels.append((generated != batch.ids)[known].cpu().numpy())
    if pair.discriminator:
        scores = pair.discriminator(generated, batch.segments, batch.mask)
        tally.scores.append(scores[known].cpu().numpy())
    top_k = settings.top_k or (PAGE_TOP_K if settings.html else 0)
    top = logits.topk(min(top_k, vocabulary.size))
    shares = (top.values - (logits.logsumexp(-1, keepdim=True) if top_k else 0.0)).exp()
    rows = (masked.ids, generated, scores.sigmoid(), masked.positions, masked.chosen, top.indices, shares)
    return [words.sentence(line, *row) for line, *row in zip(lines, *(tensor.tolist() for tensor in rows), strict=True)]


def filled_in(lines: Iterator[str], pair: Pair, settings: Demo, tally: Tally) -> Iterator[Sentence]:
    """Sentences in the order of their lines, computed in batches of similar lengths a chunk at a time.

    Chunks grow, so that the first sentences are soon there; a prompt's are single lines.
    """
    words, rng = Words(pair.vocabulary), torch.Generator(pair.device).manual_seed(settings.seed)
    size, before = 1, 0
    while chunk := list(islice(lines, size)):
        encoded = [line for line in encode(chunk, pair.vocabulary, pair.longest - 2) if line.ids]
        for number, line in enumerate(encoded, before + 1):
            if line.dropped:
                print(f"warning: sentence {number} is longer than the networks' {pair.longest} positions, its last "
                      f"{line.dropped:,} pieces are left out", file=sys.stderr)
        done = {}
        for batch in similar(encoded, pair.vocabulary.mask):
            done |= zip(batch, fill_in([encoded[n] for n in batch], pair, words, settings, rng, tally), strict=True)
        yield from (done[n] for n in range(len(encoded)))
        before += len(encoded)
        size = min(2 * size, CHUNK) if settings.input else 1


def similar(lines: list[Line], mask: int) -> Iterator[list[int]]:
    """Numbers of the lines in batches of at most BATCH_TOKENS, those with a [MASK] apart from those without."""
    batch: list[int] = []
    given = [mask in line.ids for line in lines]
    for n in sorted(range(len(lines)), key=lambda n: (given[n], len(lines[n].ids))):
        if batch and (given[n] != given[batch[0]] or (len(batch) + 1) * (len(lines[n].ids) + 2) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


# Words


class Words:
    """Turns ids into words: ## pieces joined, and the line's own spaces wherever the pieces' kinds have not changed."""

    def __init__(self, vocabulary: Vocabulary):
        self.mask = vocabulary.mask
        self.pieces = vocabulary.pieces()
        self.kinds = ["inside" if re.match("##.", piece) else "word" if any(map(str.isalnum, piece)) else "sign"
                      for piece in self.pieces]
        self.texts = [piece[2:] if kind == "inside" else piece for piece, kind in zip(self.pieces, self.kinds, strict=True)]

    def sentence(self, line: Line, masked: list[int], generated: list[int], suspicion: list[float], positions: list[int],
                 chosen: list[bool], likely: list[list[int]], shares: list[list[float]]) -> Sentence:
        """What `fill_in` computed for a row that begins with [CLS], in words."""
        masks, fillings, places = {}, {}, {}
        for position, used, some, probabilities in zip(positions, chosen, likely, shares, strict=True):
            if used:
                old, new, n = line.ids[position - 1], generated[position], position - 1
                masks[n] = "hidden" if masked[position] == self.mask else "kept"
                fillings[n] = "filled" if old == self.mask else "same" if old == new else "replaced"
                places[n] = list(zip((self.pieces[piece] for piece in some), probabilities, strict=True))
        return Sentence(line.text, self.parts(line, masked[1:], suspicion[1:], masks, {}),
                        self.parts(line, generated[1:], suspicion[1:], fillings, places))

    def parts(self, line: Line, ids: list[int], suspicion: list[float], marks: dict[int, str],
              likely: dict[int, list[tuple[str, float]]]) -> list[Part]:
        """The pieces `ids` in the places of the line's own; what is beyond them is padding."""
        parts, before, changed_before = [], "", False
        for n, (old, gap, new, doubt) in enumerate(zip(line.ids, line.gaps, ids, suspicion, strict=False)):
            kind, text = self.kinds[old if new == self.mask else new], self.texts[new]
            changed = kind != self.kinds[old]
            if changed or changed_before:
                gap = "" if kind == "inside" or not parts or text in CLOSING or before in OPENING else " "
            parts.append(Part(gap, text, kind == "inside", marks.get(n, ""), self.pieces[old], likely.get(n, ()), doubt))
            before, changed_before = text, changed
        return parts


# The terminal


def text_head(settings: Demo, pair: Pair, colour: bool) -> str:
    """What is used, and how to read the rest."""
    shading = " ".join(painted(f" {least:.0%} ", ansi) for least, ansi in reversed(HEAT)) + " and more"
    suspicion = f"shading {shading}" if colour else "word/percent, a percentage for each piece of the word"
    return "\n".join([
        f"generator: {settings.weights}; discriminator: {settings.discriminator or 'none'}; {pair.device}",
        f"marks: {', '.join(marked(meaning, name, colour) for name, (*_, meaning) in MARKS.items())}",
        *([f"replaced?: the discriminator's probability, {suspicion}"] if pair.discriminator else []),
        *([pair.vocabulary.seen] if pair.vocabulary.seen else []), ""])


def text_view(number: int, sentence: Sentence, top_k: int, detected: bool, colour: bool) -> str:
    rows = [("original", sentence.text)]
    rows += [(name, "".join(part.gap + marked(part.text, part.mark, colour) for part in parts))
             for name, parts in (("masked", sentence.masked), ("generated", sentence.generated))]
    rows += [("replaced?", suspicions(sentence.generated, colour))] * detected
    rows += [(f"top {top_k}", f"{part.original}: " + ", ".join(f"{piece} {share:.1%}" for piece, share in part.likely))
             for part in sentence.generated if top_k and part.mark]
    return "\n".join(f"{number if n == 0 else '':<4} {name:<10} {text}" for n, (name, text) in enumerate(rows)) + "\n"


def suspicions(parts: list[Part], colour: bool) -> str:
    """Shaded words, or each word with the percentages of its pieces."""
    if colour:
        return "".join(part.gap + painted(part.text, next((ansi for least, ansi in HEAT if part.suspicion >= least), ""))
                       for part in parts)
    words: list[tuple[str, str]] = []
    for part in parts:
        text, percents = words.pop() if part.inside and words else ("", "")
        words.append((text + part.text, f"{percents},{100 * part.suspicion:.0f}".lstrip(",")))
    return " ".join(f"{text}/{percents}" for text, percents in words)


def marked(text: str, mark: str, colour: bool) -> str:
    if not mark:
        return text
    sign, ansi, _ = MARKS[mark]
    return painted(text, ansi) if colour else f"{sign}{text}{sign}"


def painted(text: str, ansi: str) -> str:
    return f"\x1b[{ansi}m{text}\x1b[0m" if ansi else text


# The page


def page_head(settings: Demo, pair: Pair) -> str:
    """Title, legend and settings."""
    legend = [f"<span class={name}>{meaning}</span>" for name, (*_, meaning) in MARKS.items()]
    legend.append("a dotted frame: on hover or focus (Tab) the generator's most likely pieces and their probabilities")
    if pair.discriminator:
        examples = " ".join(heated(Part("", "word", False, "", "", (), share)) for share in (0.1, 0.4, 0.7, 1.0))
        legend.append(f"{examples}: the probability of “replaced” that the discriminator gives the piece, from 10% on")
    if pair.vocabulary.seen:
        legend.append(pair.vocabulary.seen)
    rows = "".join(f"<tr><th scope=row>{name.replace('_', ' ')}</th><td>{escape(str(value))}</td></tr>"
                   for name, value in (dataclasses.asdict(settings) | {"device": pair.device}).items())
    return (f"{PAGE_HEAD}<ul>{''.join(f'<li>{entry}</li>' for entry in legend)}</ul>"
            f"<details><summary>Settings</summary><table>{rows}</table></details></header>\n<main>\n")


def page_view(number: int, sentence: Sentence, detected: bool) -> str:
    """One sentence as an <article>; every text escaped."""
    rows = {"original": escape(sentence.text),
            "masked": "".join(part.gap + spanned(part) for part in sentence.masked),
            "generated": "".join(part.gap + (place(part, f"t{number}-{n}") if part.mark else spanned(part))
                                 for n, part in enumerate(sentence.generated))}
    if detected:
        rows["replaced?"] = "".join(part.gap + heated(part) for part in sentence.generated)
    inner = "".join(f"<dt>{name}</dt><dd dir=auto>{text}</dd>\n" for name, text in rows.items())
    return f"<article><h2>Sentence {number}</h2><dl>\n{inner}</dl></article>\n"


def place(part: Part, name: str) -> str:
    """A filled place: a button, which the keyboard reaches, and its tooltip."""
    origin = "no original known" if part.mark == "filled" else f"original: {part.original}"
    rows = "".join(f"<span>{escape(piece)} <b>{share:.1%}</b></span> " for piece, share in part.likely)
    return (f'<span class=place><button type=button class={part.mark} aria-describedby={name}>{escape(part.text)}</button>'
            f"<span class=tip role=tooltip id={name}><span>{escape(origin)}</span> {rows}</span></span>")


def spanned(part: Part) -> str:
    return f"<span class={part.mark}>{escape(part.text)}</span>" if part.mark else escape(part.text)


def heated(part: Part) -> str:
    if part.suspicion < HEAT[-1][0]:
        return escape(part.text)
    percent = round(100 * part.suspicion)
    return f'<span class=heat style="--p:{percent}">{escape(part.text)}<sub>{percent}%</sub></span>'


PAGE_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ELECTRA fills in the blanks</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ground: #fdfdfb; --ink: #1b1b1f; --soft: #5c5c66; --line: #d9d9de; --card: #fff;
  --replaced: #9a3412; --same: #166534; --filled: #1d4ed8; --hot: 255 96 40 }
@media (prefers-color-scheme: dark) { :root { --ground: #16161a; --ink: #ececf1; --soft: #a5a5b2; --line: #3a3a44;
  --card: #1f1f25; --replaced: #fdba74; --same: #86efac; --filled: #93c5fd; --hot: 220 70 20 } }
body { position: relative; max-width: 56rem; margin: auto; padding: 1rem 1rem 12rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.7 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { line-height: 1.2 } h2 { margin: 0; font-size: .85rem } h2, dt, th, .hidden { color: var(--soft) }
ul { padding-left: 1.2rem } th { text-align: left; font-weight: normal; padding-right: 1rem }
article { margin: 1rem 0; padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
dl { display: grid; grid-template-columns: 6rem 1fr; gap: .25rem 1rem; margin: 0 }
dd { margin: 0; min-width: 0 }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dt { margin-top: .4rem; font-size: .85rem } }
.kept { text-decoration: underline dotted } .replaced, .same, .filled { font-weight: bold } .same { color: var(--same) }
.replaced { color: var(--replaced); text-decoration: underline } .filled { color: var(--filled); font-style: italic }
button { font: inherit; padding: 0 .2rem; background: none; border: 1px dotted; border-radius: .25rem; cursor: help;
  scroll-margin-bottom: 14rem }
button:focus-visible { outline: 3px solid var(--filled); outline-offset: 1px }
.tip { display: none; position: absolute; left: 0; z-index: 1; width: max-content; max-width: 100%; margin-top: 1.8em;
  padding: .4rem .7rem; background: var(--ink); color: var(--ground); border-radius: .4rem; font-size: .9rem }
.tip span { display: flex; justify-content: space-between; gap: 1rem }
.place:hover .tip, .place:focus-within .tip { display: block }
.place { anchor-scope: --word; anchor-name: --word }
@supports (position-area: bottom) {
  .tip { position-anchor: --word; position-area: bottom; left: auto; margin-top: .4rem } }
.heat { background: rgb(var(--hot) / calc(var(--p) * .55%)); border-radius: .2rem; padding: 0 .1rem }
sub { font-size: .65em; margin-left: .1em }
</style></head><body>
<header><h1>ELECTRA fills in the blanks</h1>
<p>A generator fills in what is masked; a discriminator says which pieces it takes for replaced.</p>
"""
PAGE_FOOT = "</main>\n<footer><p>{}</p></footer>\n</body></html>\n"


if __name__ == "__main__":
    sys.exit(main())
