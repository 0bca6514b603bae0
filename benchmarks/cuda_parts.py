"""The parts of benchmarks/cuda.py, each in a process of its own; prints what it has measured so far, a JSON object a line.

    python -m benchmarks.cuda_parts speed --device cuda --seconds 150
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.launches import batch_milliseconds, count_launches
from benchmarks.peers import SPECIAL_IDS, Step, Workload, matrix_products, new_run, project_step, transformers_step
from dataset import prepare
from model import ModelConfig
from Pretraining import training_step
from studies.tracking import read_metrics
from utils import one_line, pick_device, pick_precision, reports_input_errors

ROOT = Path(__file__).resolve().parent.parent
TURNS = 5  # of the variants that are compared
TURN_SECONDS = 0.6  # of a variant in a turn: the public wiring takes a second a step, because it samples on the CPU
COMPILED = ("reduce-overhead", "default", "max-autotune-no-cudagraphs")  # modes of torch.compile, Pretraining.py's first
COMPILE_GROWTH = {"max-autotune-no-cudagraphs": 4.0}  # how much longer than the slowest mode before it a mode may compile
EVALUATIONS = 8  # of the real run
STARTUP_SECONDS = 40.0  # of the real run: imports, the first evaluation, the last one and saving
KERNELS_LISTED = 12


class Scale(NamedTuple):
    """The sizes of the measurements on one kind of device."""

    config: ModelConfig
    batch_size: int
    length: int
    window: int  # steps of a turn
    product: int  # rows and columns of the large matrix product
    sizes: tuple[tuple[int, int], ...]  # batch and length
    training: tuple[str, ...]  # flags of the real run


ON_GPU = Scale(
    ModelConfig(), 128, 128, 20, 8192,
    ((32, 128), (64, 128), (128, 128), (256, 128), (512, 128), (256, 64), (64, 256), (32, 512)),
    ("--config", "configs/electra_small.toml", "--workers", "4"))
TINY = ModelConfig(vocab_size=2000, embedding_size=32, hidden_size=64, layers=2, heads=1, feed_forward_size=128)
ON_CPU = Scale(
    dataclasses.replace(TINY, vocab_size=30522), 8, 32, 2, 256, ((4, 32), (8, 16)),
    ("--config", "configs/electra_small.toml", "--batch-size", "8", "--max-length", "32", "--precision", "fp32",
     "--model.vocab-size", "2000", "--model.embedding-size", "32", "--model.hidden-size", "64", "--model.layers", "2",
     "--model.heads", "1", "--model.feed-forward-size", "128"))


def workload_of(options: argparse.Namespace, batch_size: int = 0, length: int = 0) -> Workload:
    """A step of the device's scale, or of another size."""
    scale, device = options.scale, options.device
    return Workload(scale.config, batch_size or scale.batch_size, length or scale.length, device,
                    pick_precision("bf16" if device.type == "cpu" else "auto", device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(step: Step, first: int, steps: int, device: torch.device) -> float:
    """The host runs ahead of a GPU as in training, and waits at the end."""
    synchronize(device)
    began = time.perf_counter()
    for number in range(first, first + steps):
        step(number)
    synchronize(device)
    return (time.perf_counter() - began) / steps


# Machine and limits


def machine(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Versions, the card, and its rates of a large matrix product and of copying."""
    device = options.device
    facts = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda,
             "transformers": metadata.version("transformers"), "cores": os.cpu_count(), "device": str(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "memory GB": round(card.total_memory / 1e9, 1),
                  "multiprocessors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}",
                  "cuDNN": torch.backends.cudnn.version(), "driver": driver_version()}
    yield facts
    size = options.scale.product
    for name, dtype in (("bf16", torch.bfloat16), ("fp32, TF32 allowed", torch.float32)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rate = median_rate(lambda a=a, b=b: torch.mm(a, b), 2 * size**3, device)
        facts[f"matrix product TFLOP/s, {name}"] = round(rate / 1e12, 1)
    source, target = (torch.empty(size * size, device=device) for _ in range(2))
    rate = median_rate(lambda: target.copy_(source), 2 * 4 * size * size, device)
    facts["copy GB/s, read and written"] = round(rate / 1e9)
    yield facts


def driver_version() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


def median_rate(operation: Callable[[], Any], amount: float, device: torch.device) -> float:
    """Amount a second."""
    times = [seconds_a_step(lambda _: operation(), 0, 10, device) for _ in range(TURNS + 1)]
    return amount / statistics.median(times[1:])


# Tests


def tests(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of tests/test_cuda.py by the tests' names, and the end of the output if one failed."""
    chosen = "cuda" if options.device.type == "cuda" else "not cuda"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "tests/test_cuda.py", "-m", chosen, "-vv", "--tb=short",
               "-p", "no:cacheprovider"]
    results, lines = {}, []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            match = re.search(r"::(test_\S+) (PASSED|FAILED|SKIPPED|ERROR)", line)
            if match:
                results[match[1]] = match[2].lower()
                yield {"counts": Counter(results.values()), "results": results}
    failed = {"failed", "error"} & set(results.values()) or process.returncode
    yield {"counts": Counter(results.values()), "results": results} | ({"output": lines[-150:]} if failed else {})


# Kernels


def kernels(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Launches of an eager step, the host's time for a batch, and on a GPU what the profiler sees."""
    workload = workload_of(options)
    launches = count_launches(workload)
    facts = {"launches": launches.total(), "most frequent": dict(launches.most_common(KERNELS_LISTED))}
    yield facts
    facts["host ms for a batch"] = round(batch_milliseconds(workload.batch_size, workload.length), 3)
    yield facts
    if workload.device.type == "cuda":
        yield facts | profiled(project_step(workload))


def profiled(step: Step) -> dict[str, Any]:
    """Kernels of a step on a GPU: their number, the time of the longest, and which of them compute attention."""
    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(3)
        torch.cuda.synchronize()
    times = Counter()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        times[event.name[:100]] += event.device_time / 1e3
    attention = sorted(name for name in times if re.search("fmha|flash|attention|sdp", name, re.IGNORECASE))
    return {"kernels": len(events), "kernel ms": round(times.total(), 2), "attention kernels": attention,
            "longest kernels, ms": {name: round(ms, 3) for name, ms in times.most_common(KERNELS_LISTED)}}


# Speed


def compiled_step(workload: Workload, mode: str) -> Step:
    """This project's step with a compiled forward pass. On a CPU, where Inductor takes minutes, only traced."""
    run = new_run(workload, SPECIAL_IDS)
    if workload.device.type == "cuda":
        run.electra.compile(mode=mode)
    else:
        run.electra.compile(backend="aot_eager")
    rng, batch = torch.Generator(workload.device), workload.batch()
    return lambda number: training_step(run, batch, number, rng)


def speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Medians of turns: the eager step beside those of transformers, then beside one more compiled one at a time."""
    workload, window = workload_of(options), options.scale.window
    variants = {"project, eager": project_step,
                "transformers, careful": lambda workload: transformers_step(workload, "careful"),
                "transformers, public": lambda workload: transformers_step(workload, "public"),
                "matrix products": matrix_products}
    results, steps = {}, {}
    for name, build in variants.items():
        results[name] = add_variant(steps, name, lambda build=build: build(workload), workload.device)
        yield results
    yield measured(results, steps, workload, window)
    references = {name: steps[name] for name in ("project, eager", "matrix products") if name in steps}
    longest = 0.0
    for mode in COMPILED if workload.device.type == "cuda" else COMPILED[:1]:
        name = f"project, compiled: {mode}"
        expected = longest * COMPILE_GROWTH.get(mode, 1.0)
        if time.monotonic() + expected > options.deadline:
            results[name] = {"left out": f"about {expected:.0f} s for compiling were not left"}
            yield results
            continue
        compiled: dict[str, Step] = {}
        results[name] = add_variant(compiled, name, lambda mode=mode: compiled_step(workload, mode), workload.device)
        longest = max(longest, results[name].get("first steps s", 0.0))
        yield measured(results, compiled, workload, window, references)
        if workload.device.type == "cuda" and name in compiled:
            results[name] |= profiled(compiled[name])
            yield results


def add_variant(steps: dict[str, Step], name: str, build: Callable[[], Step], device: torch.device) -> dict[str, Any]:
    """Builds and warms up a variant. What fails is reported and left out, so that the others are still measured."""
    began = time.perf_counter()
    try:
        step = build()
        for number in range(3):
            step(number)
        synchronize(device)
        facts = {"first steps s": round(time.perf_counter() - began, 1)}
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(3)
            torch.cuda.synchronize()
            facts["peak GB of a step"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
    except Exception as error:  # of the compiler, of memory: whatever it is belongs into the report
        return {"error": f"{type(error).__name__}: {one_line(error)}"}
    steps[name] = step
    return facts


def measured(results: dict[str, Any], steps: dict[str, Step], workload: Workload, window: int,
             references: dict[str, Step] | None = None) -> dict[str, Any]:
    """The results with tokens a second and ratios of times of the steps, which take turns with one another and with the
    references, whose own results were reported before."""
    turns, device, running = [], workload.device, steps | (references or {})
    counts = {name: min(window, max(1, int(TURN_SECONDS / seconds_a_step(step, 4, 1, device))))
              for name, step in running.items()}
    for turn in range(TURNS):
        turns.append({name: seconds_a_step(step, 5 + turn * window, counts[name], device)
                      for name, step in running.items()})
    for name in steps:
        median = statistics.median(turn[name] for turn in turns)
        results[name] |= {"ms a step": round(1e3 * median, 2),
                          "tokens/s": round(workload.batch_size * workload.length / median)}
        for column, other in (("time, eager = 1", "project, eager"), ("time, limit = 1", "matrix products")):
            if other in running:
                results[name][column] = round(statistics.median(turn[name] / turn[other] for turn in turns), 3)
    return results


def sizes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens a second of this project's step for each batch and length: eager, then compiled while time is left."""
    results, longest = {}, 0.0
    for compiled in (False, True):
        for batch_size, length in options.scale.sizes:
            if time.monotonic() + 1.5 * longest > options.deadline:
                return
            began = time.monotonic()
            workload = workload_of(options, batch_size, length)
            torch._dynamo.reset()
            steps: dict[str, Step] = {}
            name = f"{batch_size} x {length}, {'compiled' if compiled else 'eager'}"
            build = (lambda workload=workload: compiled_step(workload, COMPILED[0])) if compiled else (
                lambda workload=workload: project_step(workload))
            results[name] = add_variant(steps, name, build, workload.device)
            measured(results, steps, workload, options.scale.window)
            longest = max(longest, time.monotonic() - began)
            yield results


# A real run


def preparation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Learns the vocabulary and tokenizes the corpus, into the cache."""
    corpus = corpus_of(options)
    if corpus is None:
        yield {"left out": "no --corpus, and the packages that convert the documentation are not installed"}
        return
    began = time.monotonic()
    from corpus.vocabulary import learned_vocabulary
    vocab_size = (options.scale.config if options.device.type == "cuda" else TINY).vocab_size
    vocabulary = learned_vocabulary((corpus,), vocab_size, "uncased", options.cache)
    data = prepare((corpus,), vocabulary, options.scale.length, "packed", options.cache)
    yield {"corpus": corpus.name, "pieces": data.counts["tokens"], "vocabulary": vocabulary.size,
           "preparation s": round(time.monotonic() - began, 1)}


def training(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pretraining.py for the time left; yields its held-out metrics as they are written."""
    facts = next(preparation(options))  # waits for the process that has begun it, if it hasn't ended
    yield facts
    corpus = corpus_of(options)
    if corpus is None:
        return
    output = options.output / "electra_small"
    shutil.rmtree(output, ignore_errors=True)  # of an earlier call
    command, facts["steps"], facts["compiled"] = training_command(options, corpus, output)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(1.0)
            yield facts | curves(output / "metrics.jsonl")
        error = process.stderr.read()
    facts["exit code"] = process.returncode
    yield facts | curves(output / "metrics.jsonl") | ({"error": error[-2000:]} if process.returncode else {})


def corpus_of(options: argparse.Namespace) -> Path | None:
    if options.corpus:
        return options.corpus.resolve()
    try:
        from corpus.documentation import documentation_corpus  # needs a sentence splitter
        return documentation_corpus(options.cache)
    except ImportError:
        return None


def training_command(options: argparse.Namespace, corpus: Path, output: Path) -> tuple[list[str], int, bool]:
    """The command, the number of its steps, so that the whole schedule fits into the time, and whether it compiles."""
    scale, left = options.scale, options.deadline - time.monotonic()
    size = f"{scale.batch_size} x {scale.length}"
    eager = first_measured(options.rates, "project, eager", f"{size}, eager")
    compiled = first_measured(options.rates, f"project, compiled: {COMPILED[0]}", f"{size}, compiled")
    startup, tokens = min(STARTUP_SECONDS, left / 4), scale.batch_size * scale.length
    ways = [(False, eager.get("tokens/s", 1000.0), startup)]  # whether it compiles, its rate, and when that begins
    if options.device.type == "cuda" and compiled:
        ways.append((True, compiled["tokens/s"], startup + compiled["first steps s"]))
    # Reading batches and evaluating take some of the time that bare steps would have.
    steps, compiles = max((int(0.7 * (left - begin) * rate / tokens), compiles) for compiles, rate, begin in ways)
    steps = max(EVALUATIONS, steps)
    flags = {"--corpus": corpus, "--cache": options.cache, "--output": output, "--device": options.device.type,
             "--steps": steps, "--warmup-steps": min(10_000, steps // 10), "--log-every": max(1, steps // 50),
             "--eval-every": max(1, steps // EVALUATIONS), "--eval-examples": 1000, "--save-every": steps,
             "--max-minutes": max(0.05, left - 5.0) / 60}
    command = [sys.executable, "Pretraining.py", *scale.training]
    for flag, value in flags.items():
        command += [flag, str(value)]
    return command + (["--compile"] if compiles else []), steps, compiles


def first_measured(rates: dict[str, dict[str, Any]], *names: str) -> dict[str, Any]:
    """The first of these that has a rate: a part that was stopped early has not measured all that it lists."""
    return next((rates[name] for name in names if "tokens/s" in rates.get(name, {})), {})


def curves(path: Path) -> dict[str, Any]:
    """The held-out records and the last rate of a run that may not have begun."""
    records = read_metrics(path) if path.exists() else []
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {"held out": [record for record in records if record["heldout"]],
            "tokens/s without padding": round(statistics.median(rates)) if rates else None}


PARTS = {"preparation": preparation, "machine": machine, "tests": tests, "kernels": kernels, "speed": speed,
         "sizes": sizes, "training": training}


@reports_input_errors
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=600.0, help="time of this part")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "cuda")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache")
    parser.add_argument("--rates", type=json.loads, default={}, help="what `sizes` and `speed` found, for `training`")
    options = parser.parse_args(argv)
    options.deadline = time.monotonic() + options.seconds
    if options.part == "preparation":
        os.nice(10)  # it runs beside the measurements, which wait for the host
    options.device = pick_device(options.device)
    options.scale = ON_GPU if options.device.type == "cuda" else ON_CPU
    torch.set_float32_matmul_precision("high")  # as Pretraining.py
    for facts in PARTS[options.part](options):
        print(json.dumps(facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
