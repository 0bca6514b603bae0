"""Memory and speed of all that happens to text before training: conversion, tokenization, batches.

    python benchmarks/corpus.py memory rate --extracted wiki/ --vocab vocab.txt
    python benchmarks/corpus.py processes --dump enwiki-excerpt.xml.bz2
    python benchmarks/corpus.py loader rate --text corpus.txt --vocab vocab.txt

memory     peak proportional set size, summed over processes, of `python -m corpus` and of tokenization, at two sizes of
           text (--extracted repeated; each copy of an article gets a sentence of its own, so that it is no duplicate)
rate       text to the token store compared with `encode_batch_fast` alone on the same text, in turn
processes  conversion of a dump with one and with two processes, in turn; what a process spends its time on
loader     batches alone compared with training steps of ELECTRA-Small (32 x 128 tokens) on the CPU
"""

import argparse
import cProfile
import contextlib
import io
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.pop(0)  # this folder: its names are those of other packages too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.vocabulary import load_vocabulary
from corpus.__main__ import main as convert_corpus
from corpus.conversion import convert_unit, convert_units, work_units
from corpus.sources import find_sources
from dataset import CHUNK_LINES, TrainingBatches, build_store, prepare, read_lines, scan_corpus
from model import ModelConfig
from utils import pick_precision

ROOT = Path(__file__).parent.parent
COPY = "\nThis sentence says that the article is copy number {}.\n</doc>"
TOKENIZE = """import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from convert.vocabulary import load_vocabulary
from dataset import prepare
vocabulary = load_vocabulary({vocab!r})
prepare((Path({text!r}),), vocabulary, 128, "packed", Path({cache!r}))"""
# What a process spends its time on, and the name by which the profiler knows it.
PROFILED = {"mwparserfromhell": "parse_anything", "sentencex": "sentencex.segment", "XML": "XML"}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# Memory


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    articles = sorted(path for path in args.extracted.rglob("*") if path.is_file())
    peaks = {"conversion": [], "tokenization": []}
    for megabytes in args.megabytes:
        raw, text = folder / f"raw-{megabytes}", folder / f"text-{megabytes}.txt"
        write_copies(articles, raw, megabytes)
        convert = [sys.executable, "-m", "corpus", "--wiki", str(raw), "--output", str(text)]
        peaks["conversion"].append(peak_memory(convert))
        script = TOKENIZE.format(root=str(ROOT), text=str(text), vocab=str(args.vocab), cache=str(folder / "cache"))
        peaks["tokenization"].append(peak_memory([sys.executable, "-c", script]))
    for name, (small, large) in peaks.items():
        small_size, large_size = args.megabytes
        print(f"{name}: peak {small:,.0f} MB on {small_size} MB and {large:,.0f} MB on {large_size} MB: "
              f"{large / small:.2f}x")


def write_copies(paths: list[Path], target: Path, megabytes: int) -> None:
    """Writes the files again and again until there are so many megabytes."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    written = 0
    with open(target, "w", encoding="utf-8") as file:
        for number, text in enumerate(cycle(texts)):
            written += file.write(text.replace("\n</doc>", COPY.format(number)))
            if written >= megabytes * 1e6:
                return


def peak_memory(command: list[str]) -> float:
    """Megabytes: the largest sum of proportional set sizes of a command and its children, five times a second."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_size, family(process.pid))))
        time.sleep(0.2)
    assert process.returncode == 0, command
    return peak / 1e3


def family(pid: int) -> Iterator[int]:
    """A process and all its children."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def proportional_size(pid: int) -> int:
    """Kilobytes; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


# Rates


def measure_rate(args: argparse.Namespace, folder: Path) -> None:
    vocabulary = load_vocabulary(str(args.vocab))
    part = folder / "part.txt"
    lines = list(islice(read_lines([text_file(args, folder)]), args.lines))
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # In chunks as build_store has them: from one large batch the tokenizer is slower.
    chunks = [lines[begin:begin + CHUNK_LINES] for begin in range(0, len(lines), CHUNK_LINES)]
    corpus = scan_corpus((part,))
    megabytes = part.stat().st_size / 1e6

    def tokenize() -> None:
        for chunk in chunks:
            vocabulary.tokenizer.encode_batch_fast(chunk, add_special_tokens=False)

    def build() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as store:
            build_store(Path(store), corpus, vocabulary, 128, "packed")

    def prepare_all() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            prepare((part,), vocabulary, 128, "packed", Path(cache))

    works = {"encode_batch_fast": tokenize, "build_store": build, "prepare": prepare_all}
    turns = []
    for number in range(args.pairs):
        # Every other turn goes backwards, so that a drift of the machine's speed favors no one.
        order = reversed(works) if number % 2 else works
        times = {name: seconds(works[name]) for name in order}
        turns.append(times)
        rates = ", ".join(f"{name} {megabytes / times[name]:.2f} MB/s" for name in works)
        print(f"{megabytes:.1f} MB: {rates}", flush=True)
    store_share, prepare_share = (statistics.median(times["encode_batch_fast"] / times[name] for times in turns)
                                  for name in ("build_store", "prepare"))
    print(f"text to the token store: {store_share:.0%} of encode_batch_fast's rate; "
          f"with hashing and counting the corpus {prepare_share:.0%}")


def text_file(args: argparse.Namespace, folder: Path) -> Path:
    """--text, or else what --extracted is converted to."""
    if not args.text:
        args.text = folder / "corpus.txt"
        with contextlib.redirect_stdout(io.StringIO()):
            assert convert_corpus(["--wiki", str(args.extracted), "--output", str(args.text)]) == 0
    return args.text


# Processes


def measure_processes(args: argparse.Namespace, folder: Path) -> None:
    """Converts the dump four times over, so that both processes have work to the end."""
    sources = 4 * find_sources(str(args.dump), is_wiki=True)

    def convert(processes: int) -> None:
        for _ in convert_units(work_units(sources, tqdm(disable=True)), processes, "en"):
            pass

    pairs = [(seconds(lambda: convert(1)), seconds(lambda: convert(2))) for _ in range(args.pairs)]
    megabytes = 4 * args.dump.stat().st_size / 1e6
    for one, two in pairs:
        print(f"{megabytes:.1f} MB of compressed dump: one process {one:.1f} s, two {two:.1f} s")
    print(f"two processes: {statistics.median(one / two for one, two in pairs):.2f}x as fast as one")
    units = list(work_units(sources[:1], tqdm(disable=True)))
    profile = cProfile.Profile()
    profile.enable()
    for unit in units:
        convert_unit(unit, "en")
    profile.disable()
    cumulative = {function: row[3] for (_, _, function), row in pstats.Stats(profile).stats.items()}
    parts = []
    for name, key in PROFILED.items():
        spent = max(value for function, value in cumulative.items() if key in function)
        parts.append(f"{name} {spent / cumulative['convert_unit']:.0%}")
    print(f"of a process's time: {', '.join(parts)}")


# Loader


def measure_loader(args: argparse.Namespace, folder: Path) -> None:
    from benchmarks.peers import Workload, project_step  # imported where it is used, with all of Pretraining.py
    vocabulary = load_vocabulary(str(args.vocab))
    text = text_file(args, folder)
    data = prepare((text,), vocabulary, 128, "packed", folder / "cache")
    batches = TrainingBatches(data.train, vocabulary, 128, batch_size=32, by_length=False, seed=0)
    device = torch.device("cpu")
    step = project_step(Workload(ModelConfig(), 32, 128, device, pick_precision("fp32", device)))
    step(0)  # the first step allocates memory
    shares = []
    for pair in range(args.pairs):
        numbers = range(100 * pair, 100 * (pair + 1))
        one_step = seconds(lambda: step(1))
        hundred_batches = seconds(lambda: [batches[number] for number in numbers])  # noqa: B023
        shares.append(100 * one_step / hundred_batches)
    threads = torch.get_num_threads()
    print(f"loader: {statistics.median(shares):.0f} times as fast as training on {threads} threads")


MEASURES = {"memory": measure_memory, "rate": measure_rate, "processes": measure_processes, "loader": measure_loader}


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="+", choices=list(MEASURES))
    parser.add_argument("--extracted", type=Path, help="folder of WikiExtractor's output")
    parser.add_argument("--dump", type=Path, help="MediaWiki dump")
    parser.add_argument("--text", type=Path, help="one sentence a line, in place of --extracted")
    parser.add_argument("--vocab", type=Path, help="BERT's vocab.txt")
    parser.add_argument("--megabytes", type=int, nargs=2, default=(100, 400), help="sizes at which memory is measured")
    parser.add_argument("--pairs", type=int, default=5, help="how often the two sides of a comparison take turns")
    parser.add_argument("--lines", type=int, default=200_000, help="of the text whose tokenization is timed")
    args = parser.parse_args()
    for name in args.measures:
        with tempfile.TemporaryDirectory() as folder:
            MEASURES[name](args, Path(folder))


if __name__ == "__main__":
    run_all()
