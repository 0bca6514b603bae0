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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset import Batch, Data, Masked, TrainingBatches, Vocabulary, mask_tokens, prepare
from model import NETWORK_FILES, Electra, Encoder, ModelConfig, SavedNetwork, save_network
from studies.compute import training_flops
from studies.heldout import evaluate, heldout_task
from studies.objectives import build_objective
from studies.tracking import (MetricsLog, RunningMeans, describe_text, draw_curves, learning_warnings, report_skipped_steps,
                              unigram_baseline)
from utils import (Adam, InputError, Precision, barrier, bounded, checkpoints, decay_groups, derived_seed, flat, from_table,
                   gather_from_processes, iterating, load, locked, one_line, own_rows, pick_device, pick_precision,
                   process_group, rank, read_settings, read_toml, reports_input_errors, require, save, scheduled_rate,
                   skip_unless_finite, stop_signals, sum_over_processes, to_toml, world_size, write_text)

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.toml"
CHECKPOINT_KEYS = {"step", "electra", "optimizer", "scaler", "means", "data", "vocabulary", "precision"}
# Settings that may change when a run is resumed: where and how it is computed and reported. Corpus and vocabulary are
# compared by content instead of by name.
FREE_ON_RESUME = {"config", "corpus", "vocab", "output", "cache", "accumulate", "grad_checkpointing", "precision", "device",
                  "compile", "workers", "log_every", "eval_every", "eval_examples", "save_every", "keep_checkpoints",
                  "resume", "max_minutes", "max_bad_steps", "extend"}
SCHEDULE = {"steps", "flops", "warmup_steps", "learning_rate"}  # settings that --extend may change as well


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
    generator then begins with random weights, as wide as --model.generator-size says)."""
    output: str = "runs/electra_small"
    """Run folder. Run the same command again to resume where it stopped."""
    cache: str = "data/cache"
    """Folder of tokenized corpora, named by content."""
    objective: Literal["electra", "mlm", "electra-15", "untied", "replace-mlm", "all-tokens-mlm", "two-stage",
                       "straight-through"] = "electra"
    """What is trained: ELECTRA or, to compare it with, BERT (mlm) or one of the others in studies/objectives.py."""
    temperature: float = bounded(1.0, above=0)
    """Of the soft samples through which the gradient of --objective straight-through passes."""
    steps: int = bounded(1_000_000, at_least=1)
    """Optimizer steps."""
    flops: float = bounded(0.0, at_least=0)
    """As many steps as cost so many FLOPs, instead of --steps; 0: --steps."""
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
    beta2: float = bounded(0.999, at_least=0, below=1)
    """Adam's decay of the mean squared gradient."""
    clip_norm: float = bounded(1.0, above=0)
    """Largest global norm of the gradient."""
    mask_prob: float = bounded(0.15, above=0, below=1)
    """Share of an example's tokens that the generator predicts."""
    kept_prob: float | None = bounded(None, at_least=0, at_most=0.9)
    """Share of the chosen tokens that stay visible. None: 0.15 as in ELECTRA, for --objective mlm BERT's 0.1."""
    disc_weight: float = bounded(50.0, at_least=0)
    """Weight of the discriminator's loss; the generator's has weight 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the hardware computes it, else fp16 on CUDA, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""
    compile: bool = False
    """torch.compile the joint forward pass (worth its minutes on CUDA), with CUDA graphs where they can be used."""
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
    ignored = {word.split("=")[0] for word in argv if word.startswith("--model.")} - {"--model.generator-size"}
    if settings.init_from and ignored:
        print(f"warning: {', '.join(sorted(ignored))} ignored, because --init-from decides on sizes", file=sys.stderr)
    device = pick_device(settings.device)
    with process_group(device):
        return pretrain(settings, device, started)


def pretrain(settings: Pretraining, device: torch.device, started: float) -> int:
    """The whole run, or what is left of it. Returns the exit code; `started` is in time.monotonic's seconds."""
    print(f"config: {settings.config}")
    if settings.corpus and Path(settings.config).resolve() == QUICKSTART.resolve():
        print("This is the small demonstration; the paper's model is --config configs/electra_small.toml")
    initial = {}
    if settings.init_from:
        from convert.initial import read_initial  # imported where it is used: other runs don't need it
        initial = read_initial(settings.init_from, settings.objective, settings.model.generator_size, "--init-from")
        settings = dataclasses.replace(settings, model=next(iter(initial.values())).config)
    check(settings)
    output = Path(settings.output)
    deadline = started + 60 * settings.max_minutes if settings.max_minutes else math.inf
    with contextlib.nullcontext() if rank() else locked(output / ".lock", wait=False):
        checkpoint = find_checkpoint(settings, output)
        vocabulary, data = load_data(settings, checkpoint, initial)
        # Weights from elsewhere may have rows of embeddings that no piece uses.
        model = settings.model if initial else dataclasses.replace(settings.model, vocab_size=vocabulary.size)
        if settings.flops:
            settings = dataclasses.replace(settings, steps=round(settings.flops / step_flops(settings, model)))
            require(settings.steps > 0, f"flops = {settings.flops:.2e} is less than one step: expected at least "
                                        f"{step_flops(settings, model):.2e}")
        first_step = checkpoint["step"] if checkpoint else 0
        require(first_step <= settings.steps, f"{output} is at step {first_step:,}, beyond --steps {settings.steps:,}")
        require(len(set(gather_from_processes(first_step))) == 1,
                f"the processes see different checkpoints in {output}: expected a folder that all of them share")
        if first_step == settings.steps:
            print(f"{output} is finished, all {settings.steps:,} steps of it; another --output starts a new run")
            return 0
        loader = training_loader(settings, vocabulary, data, device, first_step)  # too little text is refused here
        run = start(settings, model, vocabulary, data, output, device, checkpoint, initial)
        means = RunningMeans(device, checkpoint["means"] if checkpoint else {})
        with stop_signals() as received, iterating(loader) as batches:
            done = train(run, batches, first_step, means, received, deadline)
    if done < settings.steps:
        reason = received[0].name if received else "time is over"
        print(f"{reason}: saved after step {done:,} in {output}; run the same command again to resume")
        return 128 + received[0] if received else 0
    language_model, encoder = (output / NETWORK_FILES[run.electra.networks[number]] for number in (0, -1))
    print(f"\nNext:\n  python LM_DEMO.py --weights {language_model}\n"
          f"  python Finetuning.py --task sst2 --weights {encoder}")
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
    require(not settings.extend or settings.objective != "two-stage", "--extend would move the border between two stages")


# Starting and resuming

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
    table = read_toml(config_file, str(config_file), "repair it or choose another --output")
    saved = flat(from_table(Pretraining, table, str(config_file)))
    current = flat(settings)
    free = FREE_ON_RESUME | SCHEDULE if settings.extend else FREE_ON_RESUME
    if settings.flops == saved["flops"] > 0:
        free = free | {"steps"}  # they follow from the FLOPs
    changed = [name for name, value in saved.items() if value != current[name]]
    refused = [f"{name} = {saved[name]}, this command has {current[name]}" for name in changed if name not in free]
    require(not refused, f"{config_file.parent} holds a run with {'; '.join(refused)}: repeat its settings or choose "
                         "another --output (--extend resumes with other steps, warmup_steps, learning_rate)")
    changed_numerics = {"device", "accumulate", "compile"} & set(changed)
    if changed_numerics:
        print(f"warning: {', '.join(sorted(changed_numerics))} changed; the run continues, not bit for bit", file=sys.stderr)


def start(settings: Pretraining, model: ModelConfig, vocabulary: Vocabulary, data: Data, output: Path,
          device: torch.device, checkpoint: dict[str, Any] | None, initial: dict[str, SavedNetwork]) -> Run:
    """Networks and optimizer, new or restored. Prints what the run is and prepares the files of its folder."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; CPU results don't change
    precision = pick_precision(settings.precision, device)
    torch.manual_seed(settings.seed)
    electra = build_objective(settings.objective, model, settings.temperature, settings.kept_prob).to(device)
    for module in electra.modules():
        if isinstance(module, Encoder):
            module.grad_checkpointing = settings.grad_checkpointing
    if not checkpoint:
        # The embeddings are shared: those of the large network, loaded last, are used for both.
        for kind in electra.networks:
            if kind in initial:
                getattr(electra, kind).load_state_dict(initial[kind].network.state_dict())
    if precision.dtype == torch.bfloat16 and device.type == "cpu" and not settings.compile:
        from benchmarks.bf16_cpu_kernels import use_bf16_cpu_kernels  # nowhere else are they faster
        use_bf16_cpu_kernels(electra)
    optimizer = Adam(decay_groups(electra, settings.weight_decay), settings.learning_rate, settings.beta2)
    parallel = electra
    if world_size() > 1:
        parallel = DistributedDataParallel(electra, find_unused_parameters=electra.stages > 1)
    run = Run(settings, model, output, device, precision, vocabulary, data, electra, parallel, optimizer,
              precision.scaler())
    if checkpoint:
        restore(run, checkpoint)
    if settings.compile:
        electra.compile(mode=compile_mode(settings, device))
    describe(run)
    if rank() == 0:
        for unfinished in output.glob("*.tmp-*"):  # of a process that was killed while it saved
            unfinished.unlink()
        write_text(output / "vocab.txt", "\n".join(vocabulary.pieces()) + "\n")
        write_text(output / "config.toml", to_toml(settings))
    return run


def compile_mode(settings: Pretraining, device: torch.device) -> str:
    """The mode of torch.compile. "reduce-overhead" uses CUDA graphs, which replay all kernels of a pass with one launch.

    On an H200 a step of ELECTRA-Small takes 0.24 of the time of an eager one with them, 0.69 without. They are not used with
    --accumulate, because they sum the gradients of several parts wrongly (comments in PyTorch's issue 96693), with
    rows of varying width, which would need a graph each, and with several processes, where they were not tried.
    """
    graphs = device.type == "cuda" and settings.accumulate == 1 and settings.examples == "packed" and world_size() == 1
    return "reduce-overhead" if graphs else "default"


def load_data(settings: Pretraining, checkpoint: dict[str, Any] | None,
              initial: dict[str, SavedNetwork]) -> tuple[Vocabulary, Data]:
    """Vocabulary and tokenized corpus, built by the first process while the others wait."""
    vocabulary = None
    if settings.vocab:
        from convert.vocabulary import load_vocabulary  # imported where it is used, for --vocab NAME takes the hub along
        vocabulary = load_vocabulary(settings.vocab, settings.case)
        require(bool(initial) or vocabulary.size == settings.model.vocab_size,
                f"the vocabulary {settings.vocab} has {vocabulary.size:,} pieces, the model "
                f"{settings.model.vocab_size:,}: set --model.vocab-size {vocabulary.size}")
        vocabularies = [vocabulary, *(Vocabulary.of_network(saved, "") for saved in initial.values())]
        require(len({(tuple(one.pieces()), one.case_note) for one in vocabularies}) == 1,
                f"--vocab {settings.vocab} has other pieces than --init-from {settings.init_from}, or treats case "
                "in another way: leave --vocab out")
    elif checkpoint:
        vocabulary = Vocabulary.from_json(checkpoint["vocabulary"], settings.output)
    elif initial:
        vocabulary = Vocabulary.of_network(next(iter(initial.values())), settings.init_from)
    if rank() > 0:
        barrier()
    from corpus import corpus_files  # imported where it is used, as all of corpus/
    cache = Path(settings.cache)
    paths = corpus_files(settings.corpus, cache)
    if vocabulary is None:
        from corpus.vocabulary import learned_vocabulary
        vocabulary = learned_vocabulary(paths, settings.model.vocab_size, settings.case, cache)
    data = prepare(paths, vocabulary, settings.max_length, settings.examples, cache)
    if rank() == 0:
        barrier()
    return vocabulary, data


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Networks, optimizer and loss scale from a checkpoint; InputError if it is of another corpus or other sizes."""
    if checkpoint["precision"] != run.precision.name:  # also where "auto" means something else on this machine
        print(f"warning: the precision was {checkpoint['precision']} and is {run.precision.name}; the run continues, not "
              "bit for bit", file=sys.stderr)
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
    """Prints settings, text, model size and cost."""
    settings = run.settings
    print(to_toml(settings), end="")
    describe_text(run.data, run.vocabulary, run.electra.kept_prob)
    networks = [run.electra, getattr(run.electra, run.electra.networks[-1])]
    total_size, size = (sum(parameter.numel() for parameter in network.parameters()) for network in networks)
    print(f"model: {size / 1e6:.2f} M parameters in the {run.electra.networks[-1]}, {total_size / 1e6:.2f} M in all; "
          f"{settings.steps * step_flops(settings, run.model):.2e} FLOPs in {settings.steps:,} steps of "
          f"{settings.batch_size} x {settings.max_length} tokens")
    print(f"device: {run.device}, {run.precision.name}" + (f", one of {world_size()} processes" if world_size() > 1 else ""))


def step_flops(settings: Pretraining, model: ModelConfig) -> float:
    """FLOPs of one training step."""
    predictions = round(settings.mask_prob * settings.max_length)
    return settings.batch_size * training_flops(model, settings.max_length, predictions, settings.objective)


def write_checkpoint(run: Run, step: int, means: RunningMeans) -> None:
    """The networks' files, then all that resuming needs. The random state isn't saved: seed and step determine it."""
    if rank() > 0:
        return
    tokenizer = run.vocabulary.to_json()
    for kind in run.electra.networks:
        save_network(run.output / NETWORK_FILES[kind], SavedNetwork(kind, getattr(run.electra, kind), run.model, tokenizer))
    save(run.output / f"checkpoint-{step}.pt",
         {"step": step, "electra": run.electra.state_dict(), "optimizer": run.optimizer.state_dict(), "data": run.data.key,
          "scaler": run.scaler.state_dict(), "means": means.state(), "vocabulary": tokenizer,
          "precision": run.precision.name})
    for old in checkpoints(run.output)[:-run.settings.keep_checkpoints]:
        old.unlink()


# Training

def training_loader(settings: Pretraining, vocabulary: Vocabulary, data: Data, device: torch.device,
                    first_step: int) -> torch.utils.data.DataLoader:
    """The batches of all steps from `first_step` on; InputError if there are too few examples for one."""
    by_length = settings.examples == "line"
    # Compiled code and CUDA's memory are used again from step to step where the shapes stay the same.
    full_width = not by_length and (settings.compile or device.type == "cuda")
    batches = TrainingBatches(data.train, vocabulary, settings.max_length, settings.batch_size, by_length, settings.seed,
                              full_width)
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(first_step, settings.steps),
                                       num_workers=settings.workers, pin_memory=device.type == "cuda")


def train(run: Run, batches: Iterator[Batch], first_step: int, means: RunningMeans, received: list[signal.Signals],
          deadline: float) -> int:
    """The steps from `first_step` on, one for each batch, with metrics, evaluations and checkpoints at their intervals.

    Returns the number of steps done. It is less than all of them, and saved, once a signal was `received` or twice the
    slowest step so far (evaluating and saving included; with --compile, after the first) could pass the `deadline`, in
    time.monotonic's seconds.
    """
    settings = run.settings
    rng = torch.Generator(run.device)
    log = MetricsLog(run.output, first_step)
    log.write_markdown(first_step, "settings", f"```toml\n{to_toml(settings)}```")
    if first_step == 0:
        with means.paused():
            evaluate_and_report(run, log, 0)
    run.electra.train()
    # The first step of a compiled run takes minutes that later steps don't.
    slowest, before = 0.0, math.inf if settings.compile else time.monotonic()
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


def training_step(run: Run, batch: Batch, step: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One optimizer step, without waiting for the device. A step that is not finite changes no weight.

    Returns what RunningMeans.add takes: the batch's losses and accuracies by name, each (), its tokens (), and whether loss
    and gradient were finite (), bool. Every process masks the whole batch, then trains on its rows: masks don't depend on
    the number of processes.
    """
    settings = run.settings
    batch = batch.to(run.device)
    stage_steps = math.ceil(settings.steps / run.electra.stages)  # all steps, but for --objective two-stage
    stage, stage_step = divmod(step, stage_steps)
    run.electra.begin_step(stage, first=stage_step == 0)

    # Mask the batch and draw the random numbers of the sampler.
    seed_step(settings.seed, step, rng)
    masked = mask_tokens(batch, run.vocabulary, settings.mask_prob, settings.max_length, rng, run.electra.kept_prob,
                         run.electra.random_prob)
    draws = run.electra.draws(masked, rng)

    # Forward and backward.
    means = forward_and_backward(run, batch, masked, draws)

    # Clip the gradient. Under fp16 it is scaled: undo that first.
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.electra.parameters(), settings.clip_norm)
    finite = (norm + sum(means.values())).isfinite()

    # Schedule and step.
    for group in run.optimizer.param_groups:
        group["lr"] = scheduled_rate(stage_step, settings.learning_rate, settings.warmup_steps, stage_steps)
    skip_unless_finite(run.optimizer, finite)  # does what scaler.step() would, without waiting for the device
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scaler.update()
    return means, batch.attention_mask.sum(), finite


def seed_step(seed: int, step: int, rng: torch.Generator) -> None:
    """Seeds masks and samples (`rng`) by seed and step, and dropout (the global generator) by the rank as well."""
    rng.manual_seed(derived_seed(seed, step))
    torch.manual_seed(derived_seed(seed, step, 1 + rank()))


def forward_and_backward(run: Run, batch: Batch, masked: Masked, draws: Tensor) -> dict[str, Tensor]:
    """Accumulates the gradient of the joint loss, part by part. Returns the batch's losses and accuracies by name, each ().

    They are means over the whole batch, however it is cut and shared out: over its chosen positions or over the tokens
    that the discriminator judges (paper, section 2.1).
    """
    counts = {"chosen": masked.chosen.sum().clamp(min=1),
              "judged": run.electra.judged(batch, masked).sum().clamp(min=1)}
    rows = own_rows(len(batch.ids))
    part_size = math.ceil((rows.stop - rows.start) / run.settings.accumulate)
    sums = 0.0
    for begin in range(rows.start, rows.stop, part_size):
        part = slice(begin, min(begin + part_size, rows.stop))
        part_batch = Batch(*(tensor[part] for tensor in batch))
        part_masked = Masked(*(tensor[part] for tensor in masked))
        # Gradients are summed over processes once, with the last part.
        postpone_sync = world_size() > 1 and part.stop < rows.stop
        with run.parallel.no_sync() if postpone_sync else contextlib.nullcontext():
            with run.precision.autocast():
                output = run.parallel(part_batch, part_masked, draws[part])
            measured = run.electra.measure(output, part_batch, part_masked)
            means = {name: total / counts[over] for name, (total, over) in measured.items()}
            loss = run.electra.loss(means, run.settings.disc_weight)
            run.scaler.scale(loss * world_size()).backward()  # DistributedDataParallel averages, we want sums
        sums = sums + torch.stack(list(means.values())).detach()
    return dict(zip(means, sum_over_processes(sums), strict=True))


# Reports on held-out text

def evaluate_and_report(run: Run, log: MetricsLog, step: int) -> None:
    """Evaluates, writes the metrics, curves.png and samples, and warns if the run doesn't learn."""
    metrics, samples = evaluate(run.electra, heldout_task(run.data, run.vocabulary, run.settings), run.precision)
    log.write(step, True, metrics)
    log.write_markdown(step, "samples", samples)
    tqdm.write(f"step {step:,}, held out: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    frequency_loss = (1 - run.electra.kept_prob) * unigram_baseline(run.data.heldout.ids)[0]
    for warning in learning_warnings([record for record in log.records if record["heldout"]], frequency_loss):
        tqdm.write(f"warning: {warning}")
    if rank() == 0 and step > 0:
        draw_curves(run.output, has_papers_settings(run.settings, run.model))


def has_papers_settings(settings: Pretraining, model: ModelConfig) -> bool:
    """Whether the run is the paper's ELECTRA-Small, so that the published curve says what to expect."""
    actual, paper = flat(dataclasses.replace(settings, model=model)), flat(Pretraining())
    return all(actual[name] == value for name, value in paper.items() if name not in FREE_ON_RESUME | {"seed"})


if __name__ == "__main__":
    sys.exit(main())
