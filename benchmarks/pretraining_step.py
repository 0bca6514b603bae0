"""One pretraining step: this project's, beside the step wired from transformers' modules and its bare matrix products.

    python benchmarks/pretraining_step.py --json result.json
    python benchmarks/pretraining_step.py --precision bf16 --profile
    python benchmarks/pretraining_step.py --corpus corpus.txt --vocab vocab.txt

ours        the step of Pretraining.py: mask, generator, sample, discriminator, losses, backward, clip, optimizer
recomputed  the same with --grad-checkpointing
public      ElectraForMaskedLM and ElectraForPreTraining as public re-implementations wire them: shared embeddings, logits
            of the whole vocabulary at every position and then a selection, torch.distributions' Gumbel noise, AdamW
careful     the same modules wired as well as they allow untouched: logits at the chosen positions, fused AdamW
products    the matrix multiplications of ours alone, forward and backward: the limit
All run in turn, `--pairs` times after a warm-up; ratios are medians of the ratios of each turn. Memory is the peak above the
built model and optimizer's, in a process of its own. With a corpus: Pretraining.py itself beside the bare step, and
`--examples line` beside the same examples padded to the full length.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import Batch, Collator, TrainingBatches, mask_tokens, prepare
from model import Electra, ModelConfig, sampler_draws, to_transformers_config
from Pretraining import Pretraining, Run, training_step
from utils import Adam, Precision, decay_groups, pick_device, pick_precision

IDS = SimpleNamespace(pad=0, unk=100, cls=101, sep=102, mask=103)  # of BERT's vocabulary
CHOSEN = 0.15
WARMUP = 2
SCRIPT_STEPS = 10  # of a window of Pretraining.py's metrics


def settings_of(args: argparse.Namespace) -> Pretraining:
    model = dataclasses.replace(ModelConfig(), **{name: getattr(args, name) for name in ("layers", "hidden_size")},
                                heads=args.hidden_size // 64, feed_forward_size=4 * args.hidden_size)
    return Pretraining(batch_size=args.batch, max_length=args.length, warmup_steps=1, model=model)


def batch_of(args: argparse.Namespace) -> Batch:
    """Full rows of random pieces."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (args.batch, args.length), generator=rng)
    ids[:, 0], ids[:, args.length // 2], ids[:, -1] = IDS.cls, IDS.sep, IDS.sep
    segments = (torch.arange(args.length) > args.length // 2).long().expand_as(ids).contiguous()
    return Batch(ids, segments, torch.ones_like(ids, dtype=torch.bool))


def ours(args: argparse.Namespace, precision_name: str, grad_checkpointing: bool = False) -> Callable[[int], None]:
    settings = dataclasses.replace(settings_of(args), grad_checkpointing=grad_checkpointing)
    device = pick_device(args.device)
    run = run_of(settings, pick_precision(precision_name, device), device, IDS)
    rng, batch = torch.Generator(device), batch_of(args)
    return lambda step: training_step(run, batch, step, rng)


def run_of(settings: Pretraining, precision: Precision, device: torch.device, vocabulary: Any) -> Run:
    electra = Electra(settings.model, settings.grad_checkpointing).to(device).train()
    optimizer = Adam(decay_groups(electra, settings.weight_decay), settings.learning_rate)
    return Run(settings, settings.model, Path(), device, precision, vocabulary, None, electra, electra, optimizer,
               precision.scaler())


class Peer(nn.Module):
    """transformers' two models with shared embeddings."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining
        self.generator = ElectraForMaskedLM(ElectraConfig(**to_transformers_config(model, model.generator())))
        self.discriminator = ElectraForPreTraining(ElectraConfig(**to_transformers_config(model, model.discriminator())))
        self.discriminator.electra.embeddings = self.generator.electra.embeddings
        self.gumbel = torch.distributions.Gumbel(0.0, 1.0)

    def public(self, ids: Tensor, attended: Tensor, segments: Tensor, chosen: Tensor, masked: Tensor) -> Tensor:
        logits = self.generator(masked, attended, segments).logits[chosen]
        mlm_loss = F.cross_entropy(logits.float(), ids[chosen])
        with torch.no_grad():
            sampled = (logits.float() + self.gumbel.sample(logits.shape).to(logits.device)).argmax(-1)
        return mlm_loss + self.detection_loss(ids, attended, segments, chosen, sampled)

    def careful(self, ids: Tensor, attended: Tensor, segments: Tensor, chosen: Tensor, masked: Tensor) -> Tensor:
        generator = self.generator
        hidden = generator.electra(masked, attended, segments).last_hidden_state[chosen]
        logits = generator.generator_lm_head(generator.generator_predictions(hidden)).float()
        mlm_loss = F.cross_entropy(logits, ids[chosen])
        with torch.no_grad():
            sampled = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
        return mlm_loss + self.detection_loss(ids, attended, segments, chosen, sampled)

    def detection_loss(self, ids: Tensor, attended: Tensor, segments: Tensor, chosen: Tensor, sampled: Tensor) -> Tensor:
        corrupted = ids.clone()
        corrupted[chosen] = sampled
        logits = self.discriminator(corrupted, attended, segments).logits
        return 50 * F.binary_cross_entropy_with_logits(logits.float(), (corrupted != ids).float())


def peer_step(args: argparse.Namespace, precision_name: str, wiring: str) -> Callable[[int], None]:
    settings, device = settings_of(args), pick_device(args.device)
    precision = pick_precision(precision_name, device)
    peer = Peer(settings.model).to(device).train()
    optimizer = torch.optim.AdamW(decay_groups(peer, settings.weight_decay), 5e-4, eps=1e-6,
                                  fused=wiring == "careful" or None)
    scaler, batch = precision.scaler(), batch_of(args)

    def step(_: int) -> None:
        ids, segments, mask = batch.to(device)
        special = (ids == IDS.cls) | (ids == IDS.sep)
        chosen = (torch.rand(ids.shape, device=device) < CHOSEN) & ~special
        masked = ids.masked_fill(chosen & (torch.rand(ids.shape, device=device) < 0.85), IDS.mask)
        with precision.autocast():
            loss = getattr(peer, wiring)(ids, mask.long(), segments, chosen, masked)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return step


def products(args: argparse.Namespace, precision_name: str) -> Callable[[int], None]:
    """Every matrix multiplication of `ours`: (M, K) by (K, N), then the gradients of both factors."""
    model, device = settings_of(args).model, pick_device(args.device)
    dtype = pick_precision(precision_name, device).dtype
    tokens, shapes = args.batch * args.length, []
    for hidden, heads, inner in (model.generator(), model.discriminator()):
        many = args.batch * heads
        layer = [(1, tokens, hidden, 3 * hidden), (1, tokens, hidden, hidden), (1, tokens, hidden, inner),
                 (1, tokens, inner, hidden), (many, args.length, hidden // heads, args.length),
                 (many, args.length, args.length, hidden // heads)]
        shapes += [(1, tokens, model.embedding_size, hidden), *(layer * model.layers)]
    slots = args.batch * round(CHOSEN * args.length)
    shapes += [(1, tokens, model.hidden_size, model.hidden_size), (1, slots, model.generator().hidden, model.embedding_size),
               (1, slots, model.embedding_size, model.vocab_size)]
    factors = {shape: [torch.randn(size, device=device, dtype=dtype)
                       for size in ((shape[0], shape[1], shape[2]), (shape[0], shape[2], shape[3]),
                                    (shape[0], shape[1], shape[3]))] for shape in set(shapes)}

    def step(_: int) -> None:
        for shape in shapes:
            a, b, gradient = factors[shape]
            multiply = torch.bmm if shape[0] > 1 else lambda x, y: torch.mm(x[0], y[0])
            multiply(a, b)
            multiply(gradient, b.mT)
            multiply(a.mT, gradient)
    return step


STEPS = {"ours": ours, "recomputed": lambda *given: ours(*given, grad_checkpointing=True),
         "public": lambda *given: peer_step(*given, "public"),
         "careful": lambda *given: peer_step(*given, "careful"), "products": products}


def seconds(step: Callable[[int], None], number: int, device: torch.device) -> float:
    began = time.perf_counter()
    step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(args: argparse.Namespace, name: str, precision_name: str) -> int:
    """Bytes above those of model and optimizer, after a step has filled its state, in the steps that follow."""
    device = pick_device(args.device)
    step = STEPS[name](args, precision_name)
    if device.type == "cuda":
        step(0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(1)
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    for number in range(2):
        step(number)
    return (kilobytes("VmHWM") - before) * 1024


def measure(args: argparse.Namespace, precision_name: str) -> dict[str, dict[str, float]]:
    device = pick_device(args.device)
    steps = {name: STEPS[name](args, precision_name) for name in args.steps}
    for number in range(WARMUP):
        for step in steps.values():
            step(number)
    turns = [{name: seconds(step, number, device) for name, step in steps.items()}
             for number in range(WARMUP, WARMUP + args.pairs)]
    found = {}
    for name in steps:
        time_of = statistics.median(turn[name] for turn in turns)
        found[name] = {"seconds": time_of, "tokens_per_second": args.batch * args.length / time_of,
                       "ours_is_faster": statistics.median(turn[name] / turn["ours"] for turn in turns)}
        if name != "products":
            command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", name, "--precision", precision_name]
            found[name]["memory"] = int(subprocess.run(command, check=True, capture_output=True, text=True,
                                                       env=os.environ).stdout)
            found[name]["memory_ours"] = found["ours"]["memory"] / found[name]["memory"]
    return found


def script_beside_step(args: argparse.Namespace, precision_name: str) -> None:
    """Pretraining.py's own tokens_per_second over its last steps, evaluations and saves (one in 5,000 steps) left out."""
    steps, device = 2 * SCRIPT_STEPS, pick_device(args.device)
    ratios, settings = [], settings_of(args)
    vocabulary, data = prepare((args.corpus,), str(args.vocab), settings.model.vocab_size, args.length, "packed", args.cache)
    batches = TrainingBatches(Collator(data.train, vocabulary, args.length), args.batch, False, 0)
    some = [batches[SCRIPT_STEPS + number] for number in range(SCRIPT_STEPS)]  # those of the script's window
    run, rng = run_of(settings, pick_precision(precision_name, device), device, vocabulary), torch.Generator(device)
    seconds(lambda step: training_step(run, some[0], step, rng), 0, device)
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory() as folder:
            flags = {"--config": Path(__file__).parent.parent / "configs" / "electra_small.toml", "--corpus": args.corpus,
                     "--vocab": args.vocab, "--output": Path(folder) / "run", "--cache": args.cache, "--steps": steps,
                     "--batch-size": args.batch, "--max-length": args.length, "--precision": precision_name,
                     "--log-every": SCRIPT_STEPS, "--save-every": steps, "--eval-examples": 32,
                     "--device": device.type}
            command = [sys.executable, "Pretraining.py", *(str(word) for flag in flags.items() for word in flag)]
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
            *_, last = (json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
                        if "tokens_per_second" in line)
        bare = sum(seconds(lambda step, batch=batch: training_step(run, batch, step, rng), 1, device) for batch in some)
        ratios.append(last["tokens_per_second"] * bare / sum(batch.mask.sum().item() for batch in some))
    print(f"{precision_name}: Pretraining.py runs at {statistics.median(ratios):.3f} of the bare step's rate "
          f"({', '.join(f'{ratio:.3f}' for ratio in ratios)})")


def lines_beside_padding(args: argparse.Namespace, precision_name: str) -> None:
    """Tokens that aren't padding, a second, of batches of similar length and of the same padded to the full length."""
    settings, device = settings_of(args), pick_device(args.device)
    vocabulary, data = prepare((args.corpus,), str(args.vocab), settings.model.vocab_size, args.length, "line", args.cache)
    batches = TrainingBatches(Collator(data.train, vocabulary, args.length), args.batch, True, 0)
    short = [batches[number] for number in range(args.pairs)]

    def padded(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, args.length - tensor.shape[1]))
    run = run_of(settings, pick_precision(precision_name, device), device, vocabulary)
    rng = torch.Generator(device)
    ratios, rates, differences = [], [], []
    for number, batch in enumerate([short[0], *short]):  # the first warms up
        times = []
        for some in (batch, Batch(*map(padded, batch))):
            times.append(seconds(lambda step, some=some: training_step(run, some, step, rng), 1, device))
        masked = mask_tokens(batch, vocabulary, settings.mask_prob, args.length, rng)
        draws = sampler_draws(masked.positions.shape, settings.model.vocab_size, device, rng)
        run.electra.eval()
        with torch.no_grad():
            one = run.electra(*batch, *masked, draws)
            other = run.electra(*map(padded, batch), padded(masked.ids), *masked[1:], draws)
        run.electra.train()
        differences += [abs(a.sum() / b.sum() - 1).item() for a, b in zip(one[:2], other[:2], strict=True)]
        if number:
            ratios.append(times[1] / times[0])
            rates.append(batch.mask.sum().item() / times[0])
    print(f"{precision_name}: line examples, {statistics.median(rates):,.0f} tokens/s that aren't padding, "
          f"{statistics.median(ratios):.2f} times those of full-length batches ({', '.join(f'{r:.2f}' for r in ratios)}); "
          f"losses differ by at most {max(differences):.1e} relative")


def profile(args: argparse.Namespace, precision_name: str) -> None:
    step = STEPS[args.steps[0]](args, precision_name)
    step(0)
    with torch.profiler.profile() as profiler:
        step(1)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32", "fp16"])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="ours first")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--corpus", type=Path, help="text for Pretraining.py beside the bare step")
    parser.add_argument("--vocab", type=Path, help="BERT's vocab.txt, with --corpus")
    parser.add_argument("--cache", type=Path, default=Path("data/cache").resolve())
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--profile", action="store_true", help="show where a step of the first of --steps spends its time")
    parser.add_argument("--measure-memory", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.measure_memory:
        print(peak_memory(args, args.measure_memory, args.precision[-1]))
        return
    results = {}
    for precision_name in args.precision:
        if args.profile:
            profile(args, precision_name)
            continue
        if args.corpus:
            script_beside_step(args, precision_name)
            lines_beside_padding(args, precision_name)
            continue
        results[precision_name] = found = measure(args, precision_name)
        print(f"\n{precision_name}, {args.batch} x {args.length} tokens, {pick_device(args.device)}, "
              f"{torch.get_num_threads()} threads, medians of {args.pairs}")
        print(f"{'':12}{'s/step':>8}{'tokens/s':>10}{'ours is':>14}{'of limit':>10}{'peak MB':>9}{'ours needs':>12}")
        for name, values in found.items():
            share = found["products"]["seconds"] / values["seconds"] if "products" in found else float("nan")
            memory = (f"{values['memory'] / 1e6:9.0f}{values['memory_ours']:11.2f}x" if "memory" in values else "")
            print(f"{name:12}{values['seconds']:8.3f}{values['tokens_per_second']:10,.0f}"
                  f"{values['ours_is_faster']:7.2f}x faster{share:10.0%}{memory}")
    if args.json and results:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
