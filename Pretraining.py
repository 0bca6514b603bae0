"""Lines of text in, a pretrained generator and discriminator out: ELECTRA's replaced-token detection.

    python Pretraining.py                                   # a small demonstration that needs nothing else
    python Pretraining.py --config configs/electra_small.toml --corpus corpus.txt --vocab vocab.txt
    torchrun --nproc-per-node 4 Pretraining.py ...          # the same run on four GPUs
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset import Batch, Data, Masked, TrainingBatches, Vocabulary, mask_tokens, maskable, prepare, stored_batch
from model import (Electra, ModelConfig, SavedNetwork, load_network, sampler_draws, save_network,
                   use_bf16_cpu_kernels)
from studies.compute import training_flops
from studies.tracking import (MetricsLog, RunningMeans, detection_metrics, draw_curves, learning_warnings,
                              report_skipped_steps, sample_table, unigram_baseline)
from utils import (Adam, InputError, Precision, barrier, bounded, checkpoints, decay_groups, flat, from_table,
                   gather_from_processes, iterating, load, locked, one_line, own_rows, pick_device, pick_precision,
                   process_group, rank, read_settings, reports_input_errors, require, save, scheduled_rate,
                   skip_unless_finite, stop_signals, sum_over_processes, to_toml, world_size, write_text)

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.toml"
CHECKPOINT_KEYS = {"step", "electra", "optimizer", "scaler", "means", "data", "vocabulary"}
# Settings that may change when a run is resumed: where and how it is computed and reported. Corpus and vocabulary are
# compared by content instead of by name.
FREE_ON_RESUME = {"config", "corpus", "vocab", "output", "cache", "accumulate", "grad_checkpointing", "precision", "device",
                  "compile", "workers", "log_every", "eval_every", "eval_examples", "save_every", "keep_checkpoints",
                  "resume", "max_minutes", "max_bad_steps", "extend"}
SCHEDULE = {"steps", "warmup_steps", "learning_rate"}  # settings that --extend may change as well


@dataclass(frozen=True)
class Pretraining:
    """Pretrains ELECTRA's generator and discriminator. The defaults are the paper's ELECTRA-Small."""

    config: str = "configs/quickstart.toml"
    """TOML file of settings; flags override it."""
    corpus: tuple[str, ...] = ()
    """Text files (.gz, .bz2, .xz too), one sentence a line, blank lines between documents. Without it: English
    documentation that is on this machine already."""
    vocab: str | None = None
    """WordPiece vocab.txt, tokenizer folder or hub name. None: learned from the corpus, of --model.vocab-size."""
    case: Literal["auto", "cased", "uncased", "uncased-accents"] = "auto"
    """Of a learned vocabulary or a vocab.txt. cased: keep case and accents; uncased: neither; uncased-accents: only accents;
    auto: uncased for a learned one, a vocab.txt follows the tokenizer_config.json beside it, else its pieces."""
    init_from: str | None = None
    """Start from the weights, vocabulary and all [model] settings (--model flags are then ignored) of a run folder or of
    transformers' ELECTRA: a folder with generator/ and discriminator/, or a discriminator's folder or hub name (the
    generator then begins with random weights)."""
    output: str = "runs/electra_small"
    """Run folder. Run the same command again to resume where it stopped."""
    cache: str = "data/cache"
    """Folder of tokenized corpora, named by content."""
    steps: int = bounded(1_000_000, at_least=1)
    """Optimizer steps."""
    batch_size: int = bounded(128, at_least=1)
    """Examples of one optimizer step."""
    accumulate: int = bounded(1, at_least=1)
    """Parts into which a batch is cut to save memory. The result is the same up to rounding and dropout."""
    grad_checkpointing: bool = False
    """Compute each layer again for its gradient rather than keep its activations: less memory, more time."""
    max_length: int = bounded(128, at_least=5)
    """Tokens of an example, special ones counted."""
    examples: Literal["packed", "line"] = "packed"
    """Lines packed up to the length, as in the original, or each line an example."""
    learning_rate: float = bounded(5e-4, above=0)
    """Base rate, multiplied by a linear warm-up from 0 to 1 and by a linear decay from 1 to 0 over all steps."""
    warmup_steps: int = bounded(10_000, at_least=0)
    """Steps over which the rate grows."""
    weight_decay: float = bounded(0.01, at_least=0)
    """Decoupled, on all but LayerNorm and biases."""
    clip_norm: float = bounded(1.0, above=0)
    """Largest global norm of the gradient."""
    mask_prob: float = bounded(0.15, above=0, below=1)
    """Share of an example's tokens that the generator predicts."""
    disc_weight: float = bounded(50.0, at_least=0)
    """Weight of the discriminator's loss; the generator's has weight 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the hardware computes it, else fp16 on CUDA, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""
    compile: bool = False
    """torch.compile the joint forward pass (worth its minutes on CUDA)."""
    workers: int = bounded(0, at_least=0)
    """Processes that read batches ahead; 0: the training process reads."""
    seed: int = bounded(0, at_least=0)
    """Seed of initial weights, order, masks, samples and dropout."""
    log_every: int = bounded(100, at_least=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int = bounded(10_000, at_least=1)
    """Steps between evaluations on held-out text."""
    eval_examples: int = bounded(2_000, at_least=1)
    """Held-out examples of an evaluation."""
    save_every: int = bounded(5_000, at_least=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = bounded(3, at_least=1)
    """Newest checkpoints kept."""
    max_minutes: float = bounded(0.0, at_least=0)
    """Save and stop before so many minutes have passed, for the time limit of a queue; 0: no limit."""
    max_bad_steps: int = bounded(20, at_least=1)
    """Stop after so many steps in a row whose loss or gradient is not finite, checked every --log-every steps."""
    extend: bool = False
    """Resume a run, a finished one too, with another schedule (steps, warm-up, rate)."""
    resume: bool = True
    """Resume the run in --output; --no-resume refuses a folder that holds one."""
    model: ModelConfig = field(default_factory=ModelConfig)


class Run(NamedTuple):
    """What the steps of one run share."""

    settings: Pretraining
    model: ModelConfig  # with the size of the actual vocabulary
    output: Path
    device: torch.device
    precision: Precision
    vocabulary: Vocabulary
    data: Data
    electra: Electra
    parallel: nn.Module  # electra, or what sums its gradients over processes
    optimizer: Adam
    scaler: torch.amp.GradScaler


@reports_input_errors
def main(argv: list[str]) -> int:
    started = time.monotonic()
    settings = read_settings(Pretraining, argv, QUICKSTART)
    device = pick_device(settings.device)
    with process_group(device):
        return pretrain(settings, device, started)


def pretrain(settings: Pretraining, device: torch.device, started: float) -> int:
    """The whole run, or what is left of it. Returns the exit code; `started` is in time.monotonic's seconds."""
    print(f"config: {settings.config}")
    if settings.corpus and Path(settings.config).resolve() == QUICKSTART.resolve():
        print("This is the small demonstration; the paper's model is --config configs/electra_small.toml")
    initial = read_initial(settings) if settings.init_from else {}
    if initial:
        settings = dataclasses.replace(settings, model=initial["discriminator"].config)
    check(settings)
    output = Path(settings.output)
    deadline = started + 60 * settings.max_minutes if settings.max_minutes else math.inf
    with contextlib.nullcontext() if rank() else locked(output / ".lock", wait=False):
        checkpoint = find_checkpoint(settings, output)
        first_step = checkpoint["step"] if checkpoint else 0
        require(first_step <= settings.steps, f"{output} is at step {first_step:,}, beyond --steps {settings.steps:,}")
        require(len(set(gather_from_processes(first_step))) == 1,
                f"the processes see different checkpoints in {output}: expected a folder that all of them share")
        if first_step == settings.steps:
            print(f"{output} is finished, all {settings.steps:,} steps of it; another --output starts a new run")
            return 0
        run = start(settings, output, device, checkpoint, initial)
        means = RunningMeans(device, checkpoint["means"] if checkpoint else {})
        with stop_signals() as received, iterating(training_loader(run, first_step)) as batches:
            done = train(run, batches, first_step, means, received, deadline)
    if done < settings.steps:
        reason = received[0].name if received else "time is over"
        print(f"{reason}: saved after step {done:,} in {output}; run the same command again to resume")
        return 128 + received[0] if received else 0
    print(f"\nNext:\n  python LM_DEMO.py --weights {output / 'gen.pt'}\n"
          f"  python Finetuning.py --task sst2 --weights {output / 'disc.pt'}")
    return 0


def check(settings: Pretraining) -> None:
    """Raises InputError for a combination of settings that can't work."""
    settings.model.check()
    require(settings.max_length <= settings.model.max_positions,
            f"max_length = {settings.max_length} is beyond model.max_positions = {settings.model.max_positions}")
    require(settings.accumulate <= settings.batch_size,
            f"accumulate = {settings.accumulate} cuts batch_size = {settings.batch_size} into empty parts")
    require(world_size() <= settings.batch_size,
            f"batch_size = {settings.batch_size} leaves some of {world_size()} processes without a row")


# Starting and resuming

def read_initial(settings: Pretraining) -> dict[str, SavedNetwork]:
    """The discriminator and, if there is one, the generator that --init-from names."""
    folder = Path(settings.init_from)
    files = {"generator": folder / "gen.pt", "discriminator": folder / "disc.pt"}
    if files["discriminator"].is_file():
        networks = {name: load_network(path, [name], "--init-from") for name, path in files.items() if path.is_file()}
        require(len({(saved.config, saved.tokenizer) for saved in networks.values()}) == 1,
                f"gen.pt and disc.pt in {folder} have different sizes or vocabularies: expected files of one run")
        return networks
    from convert.from_transformers import read_pair  # imported where it is used: other runs don't need it
    return read_pair(settings.init_from, settings.model.generator_size, "--init-from")


def find_checkpoint(settings: Pretraining, output: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in the run folder; InputError if it is another run's or --no-resume was given."""
    config_file = output / "config.toml"
    if not config_file.exists():
        require(not checkpoints(output), f"{output} holds checkpoints without their config.toml; choose another --output")
        return None
    require(settings.resume, f"--no-resume: {output} holds a run; choose another --output")
    compare_settings(settings, config_file)
    for path in reversed(checkpoints(output)):
        try:
            checkpoint = load(path)
        except InputError as error:
            print(f"warning: {error}; the checkpoint before it, if any, is used", file=sys.stderr)
            continue
        complete = isinstance(checkpoint, dict) and checkpoint.keys() >= CHECKPOINT_KEYS
        require(complete, f"{path} is no checkpoint of this version of Pretraining.py: remove it or choose another --output")
        print(f"resuming {output} after step {checkpoint['step']:,}")
        return checkpoint
    require(not checkpoints(output), f"no checkpoint in {output} is whole: choose another --output to begin again")
    return None


def compare_settings(settings: Pretraining, config_file: Path) -> None:
    """Raises InputError if a run was begun with other settings than these, those that may change excepted."""
    try:
        table = tomllib.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config_file} can't be read as TOML ({error}): repair it or choose another --output") from None
    saved, current = flat(from_table(Pretraining, table, str(config_file))), flat(settings)
    free = FREE_ON_RESUME | SCHEDULE if settings.extend else FREE_ON_RESUME
    changed = [name for name, value in saved.items() if value != current[name]]
    refused = [f"{name} = {saved[name]}, this command has {current[name]}" for name in changed if name not in free]
    require(not refused, f"{config_file.parent} holds a run with {'; '.join(refused)}: repeat its settings or choose "
                         "another --output (--extend resumes with other steps, warmup_steps, learning_rate)")
    changed_numerics = {"precision", "device", "accumulate", "compile"} & set(changed)
    if changed_numerics:
        print(f"warning: {', '.join(sorted(changed_numerics))} changed; the run continues, not bit for bit", file=sys.stderr)


def start(settings: Pretraining, output: Path, device: torch.device, checkpoint: dict[str, Any] | None,
          initial: dict[str, SavedNetwork]) -> Run:
    """Data, networks and optimizer, new or restored. Prints what the run is and prepares the files of its folder."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; CPU results don't change
    precision = pick_precision(settings.precision, device)
    vocabulary, data = load_data(settings, checkpoint, initial)
    model = dataclasses.replace(settings.model, vocab_size=vocabulary.size)
    torch.manual_seed(settings.seed)
    electra = Electra(model, settings.grad_checkpointing).to(device)
    if initial and not checkpoint:
        # The embeddings are shared: the discriminator's, loaded last, are used for both.
        for name in ("generator", "discriminator"):
            if name in initial:
                getattr(electra, name).load_state_dict(initial[name].network.state_dict())
    if precision.dtype == torch.bfloat16 and device.type == "cpu":
        use_bf16_cpu_kernels(electra)
    optimizer = Adam(decay_groups(electra, settings.weight_decay), settings.learning_rate)
    parallel = DistributedDataParallel(electra) if world_size() > 1 else electra
    run = Run(settings, model, output, device, precision, vocabulary, data, electra, parallel, optimizer,
              precision.scaler())
    if checkpoint:
        restore(run, checkpoint)
    if settings.compile:
        electra.compile()
    describe(run)
    if rank() == 0:
        for unfinished in output.glob("*.tmp-*"):  # of a process that was killed while it saved
            unfinished.unlink()
        write_text(output / "vocab.txt", "\n".join(vocabulary.pieces()) + "\n")
        write_text(output / "config.toml", to_toml(settings))
    return run


def load_data(settings: Pretraining, checkpoint: dict[str, Any] | None,
              initial: dict[str, SavedNetwork]) -> tuple[Vocabulary, Data]:
    """Vocabulary and tokenized corpus, built by the first process while the others wait."""
    vocabulary = None
    if settings.vocab:
        from convert.vocabulary import load_vocabulary  # imported where it is used, for --vocab NAME takes the hub along
        vocabulary = load_vocabulary(settings.vocab, settings.case)
        require(vocabulary.size == settings.model.vocab_size,
                f"the vocabulary {settings.vocab} has {vocabulary.size:,} pieces, the model "
                f"{settings.model.vocab_size:,}: set --model.vocab-size {vocabulary.size}")
        require(not initial or vocabulary.pieces() == Vocabulary.of_network(initial["discriminator"], "").pieces(),
                f"--vocab {settings.vocab} has other pieces than --init-from {settings.init_from}: leave --vocab out")
    elif checkpoint:
        vocabulary = Vocabulary.from_json(checkpoint["vocabulary"], settings.output)
    elif initial:
        vocabulary = Vocabulary.of_network(initial["discriminator"], settings.init_from)
    if rank() > 0:
        barrier()
    cache, paths = Path(settings.cache), tuple(map(Path, settings.corpus))
    if not paths:
        from corpus.documentation import documentation_corpus  # imported where it is used: it needs a sentence splitter
        paths = (documentation_corpus(cache, Path(__file__).with_name("requirements.txt")),)
    if vocabulary is None:
        from corpus.vocabulary import learned_vocabulary
        case = "uncased" if settings.case == "auto" else settings.case
        vocabulary = learned_vocabulary(paths, settings.model.vocab_size, case, cache)
    data = prepare(paths, vocabulary, settings.max_length, settings.examples, cache)
    if rank() == 0:
        barrier()
    return vocabulary, data


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Networks, optimizer and loss scale from a checkpoint; InputError if it is of another corpus or other sizes."""
    require(checkpoint["data"] == run.data.key, f"the corpus or the vocabulary has changed since {run.output} was begun: "
                                                "restore it or choose another --output")
    try:
        run.electra.load_state_dict(checkpoint["electra"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless the run was fp16
            run.scaler.load_state_dict(checkpoint["scaler"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint in {run.output} doesn't fit its config.toml ({one_line(error)}): "
                         "choose another --output") from None


def describe(run: Run) -> None:
    """Prints settings, data, model size and cost."""
    settings, counts = run.settings, run.data.counts
    print(to_toml(settings), end="")
    if counts["invalid"]:
        print(f"{counts['invalid']:,} of {counts['lines']:,} lines had bytes that are not UTF-8, read as U+FFFD")
    print(f"data: {counts['lines']:,} lines, {counts['tokens']:,} word pieces of which {counts['kept']:,} are in examples "
          f"and {counts['unknown']:,} unknown; an epoch has {len(run.data.train):,} training examples with "
          f"{int(run.data.train.ends[-1]):,} pieces in all; {len(run.data.heldout):,} examples are held out")
    entropy, share = unigram_baseline(run.data.heldout.ids)
    print(f"held-out text: unigram entropy {entropy:.3f} nats; the most frequent piece has a share of {share:.3f}")
    total_size, discriminator_size = (sum(parameter.numel() for parameter in module.parameters())
                                      for module in (run.electra, run.electra.discriminator))
    predictions = round(settings.mask_prob * settings.max_length)
    flops = settings.steps * settings.batch_size * training_flops(run.model, settings.max_length, predictions)
    print(f"model: {discriminator_size / 1e6:.2f} M parameters in the discriminator, {total_size / 1e6:.2f} M in all; "
          f"{flops:.2e} FLOPs in {settings.steps:,} steps of {settings.batch_size} x {settings.max_length} tokens")
    print(f"device: {run.device}, {run.precision.name}" + (f", one of {world_size()} processes" if world_size() > 1 else ""))


def write_checkpoint(run: Run, step: int, means: RunningMeans) -> None:
    """gen.pt and disc.pt, then all that resuming needs. The random state isn't saved: seed and step determine it."""
    if rank() > 0:
        return
    tokenizer = run.vocabulary.to_json()
    for name, file in (("generator", "gen.pt"), ("discriminator", "disc.pt")):
        save_network(run.output / file, SavedNetwork(name, getattr(run.electra, name), run.model, tokenizer))
    save(run.output / f"checkpoint-{step}.pt",
         {"step": step, "electra": run.electra.state_dict(), "optimizer": run.optimizer.state_dict(), "data": run.data.key,
          "scaler": run.scaler.state_dict(), "means": means.state(), "vocabulary": tokenizer})
    for old in checkpoints(run.output)[:-run.settings.keep_checkpoints]:
        old.unlink()


# Training

def training_loader(run: Run, first_step: int) -> torch.utils.data.DataLoader:
    """The batches of all steps from `first_step` on."""
    settings = run.settings
    batches = TrainingBatches(run.data.train, run.vocabulary, settings.max_length, settings.batch_size,
                              settings.examples == "line", settings.seed)
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(first_step, settings.steps),
                                       num_workers=settings.workers, pin_memory=run.device.type == "cuda")


def train(run: Run, batches: Iterator[Batch], first_step: int, means: RunningMeans, received: list[signal.Signals],
          deadline: float) -> int:
    """The steps from `first_step` on, one for each batch, with metrics, evaluations and checkpoints at their intervals.

    Returns the number of steps done. It is less than all of them, and saved, once a signal was `received` or twice the
    slowest step so far (evaluating and saving included) could pass the `deadline`, in time.monotonic's seconds.
    """
    settings = run.settings
    rng = torch.Generator(run.device)
    log = MetricsLog(run.output, first_step)
    log.write_markdown(first_step, "settings", f"```toml\n{to_toml(settings)}```")
    if first_step == 0:
        with means.paused():
            evaluate_and_report(run, log, 0)
    run.electra.train()
    slowest, before = 0.0, time.monotonic()
    bar = tqdm(batches, "Pretraining", settings.steps, initial=first_step, unit=" steps", mininterval=1, disable=rank() > 0)
    for step, batch in enumerate(bar, first_step):
        means.add(*training_step(run, batch, step, rng))
        done = step + 1
        last = done == settings.steps

        # Log. A run of one process waits for the device only here and when it evaluates.
        if done % settings.log_every == 0 or last:
            values = means.close()
            report_skipped_steps(values, done, settings.max_bad_steps)
            log.write(done, False, values | {"learning_rate": run.optimizer.param_groups[0]["lr"]})
            bar.set_postfix({name: f"{values[name]:,.2f}" for name in ("mlm_loss", "disc_loss", "tokens_per_second")
                             if name in values})

        # Evaluate on held-out text.
        if done % settings.eval_every == 0 or last:
            with means.paused():
                evaluate_and_report(run, log, done)

        # Save, early if the run has to stop now. Several processes must agree on that, so they wait in every step.
        slowest = max(slowest, time.monotonic() - before)
        stopping = bool(received) or time.monotonic() + 2 * slowest > deadline
        if world_size() > 1:
            stopping = bool(sum_over_processes(torch.tensor(float(stopping), device=run.device)))
        if done % settings.save_every == 0 or last or stopping:
            write_checkpoint(run, done, means)
        if stopping:
            return done
        slowest = max(slowest, time.monotonic() - before)  # with the time for saving
        before = time.monotonic()
    return settings.steps


def training_step(run: Run, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One optimizer step, without waiting for the device. A step that is not finite changes no weight.

    Returns RunningMeans.COLUMNS (5,) of the batch and whether loss and gradient were finite, () bool. Every process masks
    the whole batch, then trains on its rows: masks don't depend on the number of processes.
    """
    settings = run.settings
    batch = batch.to(run.device)

    # Mask the batch and draw the random numbers of the sampler.
    seed_step(settings.seed, step, rng)
    masked = mask_tokens(batch, run.vocabulary, settings.mask_prob, settings.max_length, rng)
    draws = sampler_draws(masked.positions.shape, run.model.vocab_size, run.device, rng)

    # Forward and backward.
    values = sum_over_processes(forward_and_backward(run, batch, masked, draws))

    # Clip the gradient. Under fp16 it is scaled: undo that first.
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.electra.parameters(), settings.clip_norm)
    finite = (norm + values.sum()).isfinite()

    # Schedule and step.
    for group in run.optimizer.param_groups:
        group["lr"] = scheduled_rate(step, settings.learning_rate, settings.warmup_steps, settings.steps)
    skip_unless_finite(run.optimizer, finite)  # does what scaler.step() would, without waiting for the device
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scaler.update()
    return values, finite


def seed_step(seed: int, step: int, rng: torch.Generator) -> None:
    """Seeds masks and samples (`rng`) by seed and step, and dropout (the global generator) by the rank as well."""
    rng.manual_seed(derived_seed(seed, step))
    torch.manual_seed(derived_seed(seed, step, 1 + rank()))


def derived_seed(*key: int) -> int:
    """A 62-bit seed that follows from the key."""
    return int(np.random.default_rng(key).integers(1 << 62))


def forward_and_backward(run: Run, batch: Batch, masked: Masked, draws: Tensor) -> Tensor:
    """Accumulates the gradient of the joint loss, part by part. Returns RunningMeans.COLUMNS (5,) of this process's rows.

    Loss (paper, section 2.1): mean cross entropy over the chosen positions + disc_weight * mean binary cross entropy over
    all tokens that are not padding, both means over the whole batch, however it is cut and shared out.
    """
    settings = run.settings
    values = torch.zeros(len(RunningMeans.COLUMNS), device=run.device)
    chosen_count, token_count = masked.chosen.sum().clamp(min=1), batch.attention_mask.sum()
    rows = own_rows(len(batch.ids))
    part_size = math.ceil((rows.stop - rows.start) / settings.accumulate)
    for begin in range(rows.start, rows.stop, part_size):
        part = slice(begin, min(begin + part_size, rows.stop))
        part_batch = Batch(*(tensor[part] for tensor in batch))
        part_masked = Masked(*(tensor[part] for tensor in masked))
        # Gradients are summed over processes once, with the last part.
        postpone_sync = world_size() > 1 and part.stop < rows.stop
        with run.parallel.no_sync() if postpone_sync else contextlib.nullcontext():
            with run.precision.autocast():
                output = run.parallel(part_batch, part_masked, draws[part])
            mlm_loss = output.generator_losses.sum() / chosen_count
            disc_loss = output.discriminator_losses.sum() / token_count
            loss = mlm_loss + settings.disc_weight * disc_loss
            run.scaler.scale(loss * world_size()).backward()  # DistributedDataParallel averages, we want sums
        with torch.no_grad():
            original_ids = part_batch.ids.gather(1, part_masked.positions)
            guessed = (output.sampled_ids == original_ids) & part_masked.chosen
            detected = ((output.discriminator_logits > 0) == output.replaced) & part_batch.attention_mask
            values += torch.stack([mlm_loss, disc_loss, guessed.sum() / chosen_count, detected.sum() / token_count,
                                   part_batch.attention_mask.sum()])
    return values


# Evaluation on held-out text

def evaluate_and_report(run: Run, log: MetricsLog, step: int) -> None:
    """Evaluates, writes the metrics, curves.png and samples, and warns if the run doesn't learn."""
    metrics, samples = evaluate(run)
    log.write(step, True, metrics)
    log.write_markdown(step, "samples", samples)
    tqdm.write(f"step {step:,}, held out: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    for warning in learning_warnings([record for record in log.records if record["heldout"]],
                                     unigram_baseline(run.data.heldout.ids)[0]):
        tqdm.write(f"warning: {warning}")
    if rank() == 0 and step > 0:
        draw_curves(run.output, has_papers_settings(run.settings, run.model))


@torch.no_grad()
def evaluate(run: Run) -> tuple[dict[str, float], str]:
    """Metrics on evenly spread held-out examples, with the same masks each time, and the first examples as a table.

    The losses are the training's. Everything else about the discriminator is measured on the tokens that could have been
    replaced: padding and special tokens would be easy negatives. Raises InputError if the run has diverged.
    """
    settings, store = run.settings, run.data.heldout
    numbers = np.linspace(0, len(store) - 1, min(settings.eval_examples, len(store))).astype(np.int64)
    parts = np.array_split(numbers, math.ceil(len(numbers) * settings.accumulate / settings.batch_size))
    rng = torch.Generator(run.device)
    sums = torch.zeros(6, dtype=torch.float64, device=run.device)
    labels, scores, samples = [], [], ""
    run.electra.eval()
    for number in range(rank(), len(parts), world_size()):
        rng.manual_seed(derived_seed(settings.seed, number))
        batch = stored_batch(store, parts[number], run.vocabulary, settings.max_length).to(run.device)
        masked = mask_tokens(batch, run.vocabulary, settings.mask_prob, settings.max_length, rng)
        draws = sampler_draws(masked.positions.shape, run.model.vocab_size, run.device, rng)
        with run.precision.autocast():
            output = run.electra(batch, masked, draws)
        original_ids = batch.ids.gather(1, masked.positions)
        predicted_right = (output.generator_logits.argmax(-1) == original_ids) & masked.chosen
        sampled_right = (output.sampled_ids == original_ids) & masked.chosen
        sums += torch.stack([output.generator_losses.sum(), predicted_right.sum(), sampled_right.sum(), masked.chosen.sum(),
                             output.discriminator_losses.sum(), batch.attention_mask.sum()])
        judged = maskable(batch, run.vocabulary)
        labels.append(output.replaced[judged].cpu().numpy())
        scores.append(output.discriminator_logits[judged].cpu().numpy())
        if number == 0:
            samples = sample_table(run.vocabulary, batch, masked, output)
    run.electra.train()
    mlm_loss, predicted_count, sampled_count, chosen_count, disc_loss, tokens = sum_over_processes(sums).tolist()
    require(math.isfinite(mlm_loss + disc_loss),
            "the losses on held-out text are not finite: the run has diverged, lower --learning-rate")
    all_labels = np.concatenate([array for arrays in gather_from_processes(labels) for array in arrays])
    all_scores = np.concatenate([array for arrays in gather_from_processes(scores) for array in arrays])
    chosen_count = max(1.0, chosen_count)
    detection = detection_metrics(all_labels, all_scores)._asdict()
    metrics = {"mlm_loss": mlm_loss / chosen_count, "mlm_accuracy": predicted_count / chosen_count,
               "sampled_accuracy": sampled_count / chosen_count, "disc_loss": disc_loss / tokens}
    return metrics | {f"disc_{name}": value for name, value in detection.items()}, samples


def has_papers_settings(settings: Pretraining, model: ModelConfig) -> bool:
    """Whether the run is the paper's ELECTRA-Small, so that the published curve says what to expect."""
    actual, paper = flat(dataclasses.replace(settings, model=model)), flat(Pretraining())
    return all(actual[name] == value for name, value in paper.items() if name not in FREE_ON_RESUME | {"seed"})


if __name__ == "__main__":
    sys.exit(main())
