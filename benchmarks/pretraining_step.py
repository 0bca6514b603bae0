"""Speed and memory of one pretraining step, compared with other ways to compute it.

    python benchmarks/pretraining_step.py --json result.json
    python benchmarks/pretraining_step.py --precision bf16 --profile
    python benchmarks/pretraining_step.py --corpus corpus.txt --vocab vocab.txt

project           the step of Pretraining.py: mask, generator, sample, discriminator, losses, backward, clip, optimizer
checkpointed      the same with --grad-checkpointing
plain             the same without the kernels for bf16 on a CPU (bf16_cpu_kernels.py)
plain-vocabulary  the same with these kernels in the layers, but plain cross entropy and sampling
public            transformers' ElectraForMaskedLM and ElectraForPreTraining, wired as public re-implementations do:
                  logits of the whole vocabulary at every position, from which the chosen are then selected, Gumbel
                  noise of torch.distributions, AdamW
careful           the same modules, wired as well as they allow: logits at the chosen positions only, fused AdamW
products          the matrix multiplications of `project` alone, forward and backward: an upper limit of the speed

The variants take turns in one process, `--pairs` times after a warm-up. A ratio is the median of the ratios of the
turns. Memory is the peak above what is allocated before the step, measured in its own process. On a CPU it includes
the optimizer's state, which the first step allocates and which is equally large for all variants.

With --corpus, two other comparisons are made: Pretraining.py as a whole with `project`, and batches of similar lengths
(`--examples line`) with the same examples padded to the full length.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.pop(0)  # this folder: its names are those of other packages too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import (MASK_PROB, Step, Workload, matrix_products, new_run, project_step, seconds,
                              transformers_step)
from convert.vocabulary import load_vocabulary
from dataset import Batch, Data, Masked, TrainingBatches, Vocabulary, mask_tokens, prepare
from model import ModelConfig, sampler_draws
from Pretraining import Run, training_step
from utils import pick_device, pick_precision

ROOT = Path(__file__).resolve().parent.parent
WARMUP_STEPS = 2
WINDOW_STEPS = 10  # steps between two lines of Pretraining.py's metrics

VARIANTS: dict[str, Callable[[Workload], Step]] = {
    "project": project_step,
    "checkpointed": lambda workload: project_step(workload, grad_checkpointing=True),
    "plain": lambda workload: project_step(workload, kernels="none"),
    "plain-vocabulary": lambda workload: project_step(workload, kernels="layers"),
    "public": lambda workload: transformers_step(workload, "public"),
    "careful": lambda workload: transformers_step(workload, "careful"),
    "products": matrix_products,
}
WITHOUT_KERNELS = ("plain", "plain-vocabulary")  # the same as `project` except in bf16 on a CPU


# Time and memory


def peak_memory(workload: Workload, name: str) -> int:
    """Bytes at the peak of a step, above those of the model and, on CUDA, of the optimizer's state."""
    step = VARIANTS[name](workload)
    if workload.device.type == "cuda":
        step(0)  # the optimizer's state is allocated here
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(1)
        return torch.cuda.max_memory_allocated() - before
    before = process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    step(0)
    step(1)
    return process_bytes("VmHWM") - before


def process_bytes(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(f"/proc/self/status has no {field}")


def measure(workload: Workload, names: list[str], pairs: int) -> dict[str, dict[str, float]]:
    """Time, tokens per second, memory and the ratios to `project` of each variant."""
    steps = {name: VARIANTS[name](workload) for name in names}
    for number in range(WARMUP_STEPS):
        for step in steps.values():
            step(number)
    turns = [{name: seconds(step, number, workload.device) for name, step in steps.items()}
             for number in range(WARMUP_STEPS, WARMUP_STEPS + pairs)]
    results = {}
    for name in names:
        median = statistics.median(turn[name] for turn in turns)
        results[name] = {"seconds": median, "tokens_per_second": workload.batch_size * workload.length / median,
                         "time_ratio": statistics.median(turn[name] / turn["project"] for turn in turns)}
        if name != "products":
            command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", name,
                       "--precision", workload.precision.name]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            results[name]["memory"] = int(process.stdout)
            results[name]["memory_ratio"] = results[name]["memory"] / results["project"]["memory"]
    return results


def print_table(workload: Workload, results: dict[str, dict[str, float]], pairs: int) -> None:
    """One row a variant. The columns "x project" divide time and memory by those of `project`."""
    print(f"\n{workload.precision.name}, {workload.batch_size} x {workload.length} tokens, {workload.device}, "
          f"{torch.get_num_threads()} threads, medians of {pairs} turns")
    print(f"{'':17}{'s/step':>8}{'x project':>11}{'tokens/s':>10}{'of limit':>10}{'peak MB':>9}{'x project':>11}")
    for name, values in results.items():
        row = f"{name:17}{values['seconds']:8.3f}{values['time_ratio']:11.2f}{values['tokens_per_second']:10,.0f}"
        if "products" in results:
            row += f"{results['products']['seconds'] / values['seconds']:10.0%}"
        else:
            row += f"{'':10}"
        if "memory" in values:
            row += f"{values['memory'] / 1e6:9.0f}{values['memory_ratio']:11.2f}"
        print(row)


def profile(workload: Workload, name: str) -> None:
    """Shows on which operations a step spends its time."""
    step = VARIANTS[name](workload)
    step(0)
    with torch.profiler.profile() as profiler:
        step(1)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


# Comparisons on a corpus


def tokenized(options: argparse.Namespace, workload: Workload, examples: str) -> tuple[Vocabulary, Data]:
    vocabulary = load_vocabulary(str(options.vocab))
    return vocabulary, prepare((options.corpus,), vocabulary, workload.length, examples, options.cache)


def compare_script(options: argparse.Namespace, workload: Workload) -> None:
    """Pretraining.py's tokens per second over its last window, compared with bare steps on the same batches.

    Evaluating and saving, once in thousands of steps, are left out of both.
    """
    vocabulary, data = tokenized(options, workload, "packed")
    batches = TrainingBatches(data.train, vocabulary, workload.length, workload.batch_size, by_length=False, seed=0)
    window = [batches[WINDOW_STEPS + number] for number in range(WINDOW_STEPS)]
    run, rng = new_run(workload, vocabulary), torch.Generator(workload.device)

    def window_steps(number: int) -> None:
        for batch in window:
            training_step(run, batch, number, rng)

    training_step(run, window[0], 0, rng)  # the first step allocates memory
    tokens = sum(batch.attention_mask.sum().item() for batch in window)
    ratios = []
    for _ in range(options.pairs):
        script_rate = script_tokens_per_second(options, workload)
        bare_rate = tokens / seconds(window_steps, 1, workload.device)
        ratios.append(script_rate / bare_rate)
    print(f"{workload.precision.name}: Pretraining.py runs at {statistics.median(ratios):.3f} of the bare step's rate "
          f"({', '.join(f'{ratio:.3f}' for ratio in ratios)})")


def script_tokens_per_second(options: argparse.Namespace, workload: Workload) -> float:
    """The last rate that a run of two windows writes to its metrics."""
    steps, model = 2 * WINDOW_STEPS, workload.model
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        flags = {"--config": ROOT / "configs" / "electra_small.toml", "--corpus": options.corpus.resolve(),
                 "--vocab": options.vocab.resolve(), "--output": output, "--cache": options.cache.resolve(),
                 "--steps": steps, "--batch-size": workload.batch_size, "--max-length": workload.length,
                 "--precision": workload.precision.name, "--device": workload.device.type, "--log-every": WINDOW_STEPS,
                 "--save-every": steps, "--eval-examples": 32, "--model.layers": model.layers,
                 "--model.hidden-size": model.hidden_size, "--model.heads": model.heads,
                 "--model.feed-forward-size": model.feed_forward_size}
        command = [sys.executable, "Pretraining.py"]
        for flag, value in flags.items():
            command += [flag, str(value)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return rates[-1]


def compare_padding(options: argparse.Namespace, workload: Workload) -> None:
    """Time of batches of similar lengths, compared with the same examples padded to the full length."""
    vocabulary, data = tokenized(options, workload, "line")
    batches = TrainingBatches(data.train, vocabulary, workload.length, workload.batch_size, by_length=True, seed=0)
    run, rng = new_run(workload, vocabulary), torch.Generator(workload.device)
    ratios, rates, differences = [], [], []
    for number in range(options.pairs + 1):
        short = batches[max(0, number - 1)]  # the first batch comes twice, at first to warm up
        padded = pad_batch(short, workload.length, vocabulary.pad)
        times = [seconds(lambda step, batch=batch: training_step(run, batch, step, rng), 1, workload.device)
                 for batch in (short, padded)]
        differences.append(largest_loss_difference(run, short, workload.length, rng))
        if number > 0:
            ratios.append(times[1] / times[0])
            rates.append(short.attention_mask.sum().item() / times[0])
    print(f"{workload.precision.name}: with one line an example, {statistics.median(rates):,.0f} tokens/s, padding not "
          f"counted, {statistics.median(ratios):.2f} times the rate of batches padded to the full length "
          f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); relative difference of the losses at most "
          f"{max(differences):.1e}")


def pad_batch(batch: Batch, length: int, pad: int) -> Batch:
    missing = (0, length - batch.ids.shape[1])
    return Batch(F.pad(batch.ids, missing, value=pad), F.pad(batch.segments, missing),
                 F.pad(batch.attention_mask, missing))


@torch.no_grad()
def largest_loss_difference(run: Run, batch: Batch, length: int, rng: torch.Generator) -> float:
    """By how much padding changes generator and discriminator losses, relative to them, without dropout."""
    batch = batch.to(run.device)
    masked = mask_tokens(batch, run.vocabulary, MASK_PROB, length, rng)
    draws = sampler_draws(masked.positions.shape, run.model.vocab_size, run.device, rng)
    padded_batch = pad_batch(batch, length, run.vocabulary.pad)
    padded_ids = F.pad(masked.ids, (0, length - masked.ids.shape[1]), value=run.vocabulary.pad)
    run.electra.eval()
    output = run.electra(batch, masked, draws)
    padded_output = run.electra(padded_batch, Masked(padded_ids, masked.positions, masked.chosen), draws)
    run.electra.train()
    pairs = ((output.generator_losses, padded_output.generator_losses),
             (output.discriminator_losses, padded_output.discriminator_losses))
    return max(abs(losses.sum() / padded_losses.sum() - 1).item() for losses, padded_losses in pairs)


# Command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32", "fp16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS),
                        help="what to measure beside `project`; those that equal it on this device are left out")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5, help="how often the variants take turns")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--corpus", type=Path, help="text file, for the comparisons on a corpus")
    parser.add_argument("--vocab", type=Path, help="BERT's vocab.txt, needed with --corpus")
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "cache")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--profile", action="store_true",
                        help="show on what a step of the first of --variants spends its time")
    parser.add_argument("--measure-memory", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def new_workload(options: argparse.Namespace, precision_name: str) -> Workload:
    model = dataclasses.replace(ModelConfig(), layers=options.layers, hidden_size=options.hidden_size,
                                heads=options.hidden_size // 64, feed_forward_size=4 * options.hidden_size)
    device = pick_device(options.device)
    return Workload(model, options.batch, options.length, device, pick_precision(precision_name, device))


def main() -> None:
    options = parse_arguments()
    torch.set_float32_matmul_precision("high")
    if options.measure_memory:
        print(peak_memory(new_workload(options, options.precision[-1]), options.measure_memory))
        return
    results: dict[str, Any] = {}
    for precision_name in options.precision:
        workload = new_workload(options, precision_name)
        if options.profile:
            profile(workload, options.variants[0])
        elif options.corpus:
            compare_script(options, workload)
            compare_padding(options, workload)
        else:
            names = ["project"]
            for name in options.variants:
                if name not in names and (workload.uses_kernels() or name not in WITHOUT_KERNELS):
                    names.append(name)
            results[precision_name] = measure(workload, names, options.pairs)
            print_table(workload, results[precision_name], options.pairs)
    if options.json and results:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
