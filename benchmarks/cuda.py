"""Everything a GPU can show about this project, in one command that ends in time.

    python benchmarks/cuda.py --corpus corpus.txt                # nine minutes on a GPU
    python benchmarks/cuda.py --device cpu --minutes 2           # all of it small, to try the script itself

machine   the card and the versions, its rates of a large matrix product and of copying
tests     pytest -m cuda: parity with transformers, sampler, loss scale, resuming, torchrun with nccl, memory, no waits
kernels   launches of an eager training step, which kernels compute attention, the host's time for a batch
speed     tokens per second of this project's step, eager and compiled, of two wirings of transformers' networks, and
          of the step's matrix products alone, which are the limit; the variants take turns
sizes     tokens per second of the step against batch size and length
training  a real run of configs/electra_small.toml in the minutes left: held-out curve and AUC

Each part (benchmarks/cuda_parts.py) is a process that is ended when its share of the time is over; what it has measured
until then is kept. results.json and results.md in --output are written after each part. Without --corpus the run
trains on the documentation that is on this machine, if the packages that convert it are installed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
# Each part's share of the minutes; the last one gets what is left.
SHARES = {"machine": 0.08, "tests": 0.20, "kernels": 0.08, "speed": 0.40, "sizes": 0.12, "training": 1.0}
MARGIN = 8.0  # seconds at the end for stopping a part and writing
GRACE = 3.0  # seconds between asking a part to stop and killing it


def start_part(name: str, flags: list[str], limit: float, output: IO | int, messages: IO | int) -> subprocess.Popen:
    """A part in a session of its own, so that the processes which it starts end with it."""
    command = [sys.executable, "-m", "benchmarks.cuda_parts", name, "--seconds", f"{limit:.1f}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=messages, start_new_session=True)


def run_part(name: str, flags: list[str], limit: float) -> dict[str, Any]:
    """The last result that a part has printed in `limit` seconds, and how it ended if not by itself."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as messages:
        process = start_part(name, flags, limit, output, messages)
        try:
            process.wait(limit)
            ended = "" if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after its {limit:.0f} s"
        finally:
            end_session(process)
        output.seek(0)
        messages.seek(0)
        lines = [line for line in output.read().split("\n")[:-1] if line.startswith("{")]
        result = json.loads(lines[-1]) if lines else {}
        if ended:
            result["ended"] = ended
        if process.returncode > 0:
            result["messages"] = messages.read()[-2000:]
    return result


def end_session(process: subprocess.Popen) -> None:
    """Ends a part and everything it has started: first it may save, then it must go."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # all of it has ended
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def to_markdown(title: str, value: Any, level: int = 1) -> list[str]:
    """A heading, and below it a result as tables: one for plain values, one for equal records, then what is nested."""
    lines = [f"{'#' * level} {title}", ""]
    if isinstance(value, list) and not all(isinstance(entry, dict) for entry in value):
        return [*lines, "```text", *map(str, value), "```", ""]
    if isinstance(value, list):
        value = dict(enumerate(value, 1))
    plain = {name: entry for name, entry in value.items() if not isinstance(entry, dict | list)}
    nested = {name: entry for name, entry in value.items() if name not in plain}
    if plain:
        lines += ["| | |", "|---|---|", *(f"| {name} | {cell(entry)} |" for name, entry in plain.items()), ""]
    if level > 1 and are_records(list(nested.values())):
        return [*lines, *table_of_records(nested), ""]
    for name, entry in nested.items():
        lines += to_markdown(name, entry, level + 1)
    return lines


def are_records(values: list[Any]) -> bool:
    """Whether these are several dicts with a name in common."""
    return len(values) > 1 and all(isinstance(value, dict) for value in values) and bool(set.intersection(*map(set, values)))


def table_of_records(records: dict[Any, dict[str, Any]]) -> list[str]:
    """A row for each record; what some of them lack stays empty, and what is nested is left to results.json."""
    columns = list(dict.fromkeys(name for record in records.values() for name, value in record.items()
                                 if not isinstance(value, dict | list)))
    rows = [f"| {key} | " + " | ".join(cell(record.get(name, "")) for name in columns) + " |"
            for key, record in records.items()]
    return ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *rows]


def cell(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(str(value).split()).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """results.json and results.md."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text("\n".join(to_markdown("benchmarks/cuda.py", results)), encoding="utf-8")


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="when it ends at the latest")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--corpus", type=Path, help="text file, one sentence a line, for the real run")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "cuda")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache")
    options = parser.parse_args()
    if options.corpus and not options.corpus.is_file():
        parser.error(f"--corpus {options.corpus} is not a file")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part that is running, too
    options.output.mkdir(parents=True, exist_ok=True)
    flags = ["--device", options.device, "--output", str(options.output.resolve()), "--cache", str(options.cache.resolve())]
    if options.corpus:
        flags += ["--corpus", str(options.corpus.resolve())]
    results: dict[str, Any] = {}
    # The corpus is tokenized on other cores while the GPU is measured.
    preparation = start_part("preparation", flags, 60 * options.minutes, subprocess.DEVNULL, subprocess.DEVNULL)
    try:
        for name, share in SHARES.items():
            left = 60 * options.minutes - (time.monotonic() - started) - MARGIN
            limit = min(left, share * 60 * options.minutes)
            if limit <= 0:
                results[name] = {"left out": "no time was left"}
            else:
                rates = results.get("sizes", {}) | results.get("speed", {})
                results[name] = run_part(name, [*flags, "--rates", json.dumps(rates)], limit)
            if results[name].get("ended") == "exit code 2":  # no such device, or a corpus that can't be used
                print(results[name]["messages"], end="", file=sys.stderr)
                return 2
            write_results(options.output, results)
            print("\n".join(to_markdown(name, results[name], 2)), flush=True)
    finally:
        end_session(preparation)
    print(f"{time.monotonic() - started:.0f} s; {options.output / 'results.md'}")
    complete = all("ended" not in facts and "left out" not in facts for facts in results.values())
    failures = results["tests"].get("counts", {}).get("failed", 0)
    return 0 if complete and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
