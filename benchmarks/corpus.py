"""The way from raw text to batches: memory at two sizes, tokenization's rate, two processes beside one, the loader's rate.

    python benchmarks/corpus.py memory rate --extracted wiki/ --vocab vocab.txt
    python benchmarks/corpus.py processes --dump enwiki-excerpt.xml.bz2
    python benchmarks/corpus.py loader rate --text corpus.txt --vocab vocab.txt

memory     peak proportional set size, summed over processes, of dataset.py and of tokenization, on 100 MB and on 400 MB of
           text (--extracted repeated; each copy of an article gets a sentence of its own, so that it's no duplicate)
rate       text to the token store beside `encode_batch_fast` alone, in turn over parts of the text
processes  conversion of a dump with one and with two processes, in turn; what a process spends its time on
loader     batches alone beside the CPU's training steps of ELECTRA-Small (32 x 128 tokens)
"""

import argparse
import cProfile
import contextlib
import io
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from pretraining_step import ours

from dataset import (Collator, TrainingBatches, build_store, bundled, convert, converted, find_sources, load_vocabulary,
                     main, prepare, read_lines, scan_corpus)

MEGABYTES = (100, 400)
COPY = "\nThis sentence says that the article is copy number {}.\n</doc>"
TOKENIZE = """import sys; sys.path.insert(0, {root!r}); from dataset import *
prepare((Path({text!r}),), {vocab!r}, 30522, 128, "packed", Path({cache!r}))"""


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# Memory


def peak_memory(command: list[str]) -> float:
    """Megabytes: the largest sum of proportional set sizes of a command and its children, five times a second."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_size, family(process.pid))))
        time.sleep(0.2)
    assert process.returncode == 0, command
    return peak / 1e3


def family(pid: int) -> Iterator[int]:
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


def write_copies(sources: list[Path], target: Path, megabytes: int) -> None:
    """The files again and again until so many megabytes are there."""
    texts, written = [path.read_text(encoding="utf-8") for path in sources], 0
    with open(target, "w", encoding="utf-8") as file:
        for number, text in islice(enumerate(cycle(texts)), 1_000_000):
            written += file.write(text.replace("\n</doc>", COPY.format(number)))
            if written >= megabytes * 1e6:
                return


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    root = str(Path(__file__).parent.parent)
    files = sorted(path for path in args.extracted.rglob("*") if path.is_file())
    for name in ("conversion", "tokenization"):
        peaks = []
        for megabytes in MEGABYTES:
            raw, text = folder / f"raw-{megabytes}", folder / f"text-{megabytes}.txt"
            if name == "conversion":
                write_copies(files, raw, megabytes)
                command = [sys.executable, f"{root}/dataset.py", "--wiki", str(raw), "--output", str(text)]
            else:
                script = TOKENIZE.format(root=root, text=str(text), vocab=str(args.vocab), cache=str(folder / "cache"))
                command = [sys.executable, "-c", script]
            peaks.append(peak_memory(command))
        sizes = " and ".join(f"{peak:,.0f} MB on {size} MB" for peak, size in zip(peaks, MEGABYTES, strict=True))
        print(f"{name}: peak {sizes}: {peaks[1] / peaks[0]:.2f}x")


# Rates


def measure_rate(args: argparse.Namespace, folder: Path) -> None:
    vocabulary, text = load_vocabulary(str(args.vocab)), text_of(args, folder)
    lines, part, shares = read_lines([text]), folder / "part.txt", []
    for number in range(args.pairs):
        some = list(islice(lines, args.lines))
        part.write_text("\n".join(some) + "\n", encoding="utf-8")
        some = [line for line in some if line]
        sizes = part.stat().st_size / 1e6
        store = folder / f"store-{number}"
        store.mkdir()
        corpus = scan_corpus((part,))
        works = {"alone": lambda: vocabulary.tokenizer.encode_batch_fast(some, add_special_tokens=False),  # noqa: B023
                 "store": lambda: build_store(store, corpus, vocabulary, 128, "packed"),  # noqa: B023
                 "prepare": lambda: prepare((part,), vocabulary, vocabulary.size, 128, "packed", folder / f"cache-{number}")}  # noqa: B023
        took = {name: seconds(works[name]) for name in (works if number % 2 else reversed(works))}
        shares.append([took["alone"] / took["store"], took["alone"] / took["prepare"]])
        print(f"{sizes:.1f} MB: " + ", ".join(f"{name} {sizes / value:.2f} MB/s" for name, value in took.items()))
    store, whole = map(statistics.median, zip(*shares, strict=True))
    print(f"text to the store: {store:.0%} of encode_batch_fast's rate; with hashing and counting the corpus {whole:.0%}")


def text_of(args: argparse.Namespace, folder: Path) -> Path:
    if not args.text:
        args.text = folder / "corpus.txt"
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["--wiki", str(args.extracted), "--output", str(args.text)]) == 0
    return args.text


def measure_processes(args: argparse.Namespace, folder: Path) -> None:
    """The dump four times over, so that both processes have work to the end."""
    sources = 4 * find_sources(str(args.dump), wiki=True)

    def run(processes: int) -> None:
        bundles = (bundle for source in sources for bundle in bundled(source, tqdm(disable=True)))
        for _ in converted(bundles, processes, "en"):
            pass
    pairs = [(seconds(lambda: run(1)), seconds(lambda: run(2))) for _ in range(args.pairs)]
    for one, two in pairs:
        print(f"{4 * args.dump.stat().st_size / 1e6:.1f} MB of packed dump: one process {one:.1f} s, two {two:.1f} s")
    print(f"two processes: {statistics.median(one / two for one, two in pairs):.2f}x as fast as one")
    profile = cProfile.Profile()
    bundles = list(bundled(sources[0], tqdm(disable=True)))
    profile.enable()
    for source, records in bundles:
        convert(source, records, "en")
    profile.disable()
    stats = pstats.Stats(profile)
    names = {"mwparserfromhell": "parse_anything", "sentencex": "sentencex.segment", "XML": "XML", "all": "convert"}
    spent = {name: max(row[3] for (_, _, function), row in stats.stats.items() if key in function)
             for name, key in names.items()}
    print("of a process's time: " + ", ".join(f"{name} {value / spent['all']:.0%}" for name, value in spent.items()))


def measure_loader(args: argparse.Namespace, folder: Path) -> None:
    vocabulary = load_vocabulary(str(args.vocab))
    _, data = prepare((text_of(args, folder),), vocabulary, vocabulary.size, 128, "packed", folder / "cache")
    batches = TrainingBatches(Collator(data.train, vocabulary, 128), 32, False, 0)
    step = ours(SimpleNamespace(layers=12, hidden_size=256, batch=32, length=128, device="cpu"), "fp32")
    step(0)
    shares = []
    for pair in range(args.pairs):
        one = seconds(lambda: step(1))
        hundred = seconds(lambda first=100 * pair: [batches[n] for n in range(first, first + 100)])
        shares.append(100 * one / hundred)
    print(f"loader: {statistics.median(shares):.0f} times as fast as training on {torch.get_num_threads()} threads")


MEASURES = {"memory": measure_memory, "rate": measure_rate, "processes": measure_processes, "loader": measure_loader}


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="+", choices=list(MEASURES))
    parser.add_argument("--extracted", type=Path, help="folder of WikiExtractor's output")
    parser.add_argument("--dump", type=Path, help="MediaWiki dump")
    parser.add_argument("--text", type=Path, help="one sentence a line, in place of --extracted")
    parser.add_argument("--vocab", type=Path, help="BERT's vocab.txt")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--lines", type=int, default=60_000, help="of a part that `rate` tokenizes")
    args = parser.parse_args()
    for name in args.measures:
        with tempfile.TemporaryDirectory() as folder:
            MEASURES[name](args, Path(folder))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run_all()
