"""Lines of text in, a pretrained generator and discriminator out: ELECTRA's replaced-token detection.

    python Pretraining.py                                   # a small demonstration, nothing else needed
    python Pretraining.py --config configs/electra_small.toml --corpus corpus.txt --vocab vocab.txt
    torchrun --nproc-per-node 4 Pretraining.py ...          # the same run on four GPUs
"""

import contextlib
import dataclasses
import json
import math
import re
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset import (TOKENIZER_FILES, Batch, Collator, Data, Masked, Store, TrainingBatches, Vocabulary, candidates,
                     documentation_corpus, hub_folder, mask_tokens, prepare)
from model import (TIED, Discriminator, Electra, ElectraOutput, EncoderSize, Generator, ModelConfig, corrupt,
                   from_transformers_config, load_transformers, sampler_draws, to_transformers, to_transformers_config,
                   training_flops)
from utils import (Adam, Curve, Events, InputError, Precision, checkpoints, decay_groups, detection_metrics, draw, flat,
                   from_table, gathered, joined, load, locked, pick_device, pick_precision, rank, ranks, read_settings,
                   replacing, reports_input_errors, save, scheduled_rate, share, stop_signals, to_toml, total, write_text)

HERE = Path(__file__).parent
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]
EXPORTED = {"model.safetensors", "config.json", "README.md", *TOKENIZER_FILES}
PIPELINES = {"ForMaskedLM": "fill-mask", "ForPreTraining": "feature-extraction",  # transformers' names for what a model does
             "ForSequenceClassification": "text-classification"}
MODEL_CARD = """---
library_name: transformers
pipeline_tag: {tag}
tags: [electra]
# license and language are yours to add
---

# ELECTRA {kind}

{millions:.2f} M parameters, {pieces:,} word pieces, texts of up to {longest} of them; {seen}.

```python
from transformers import AutoModel{head}, AutoTokenizer

model = AutoModel{head}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

{report}
"""
QUICKSTART = HERE / "configs" / "quickstart.toml"


@dataclass(frozen=True)
class Pretraining:
    """Pretrains ELECTRA's generator and discriminator. The defaults are the paper's ELECTRA-Small."""

    config: str = "configs/quickstart.toml"
    """TOML file of settings; flags override it."""
    corpus: tuple[str, ...] = ()
    """Text files (.gz, .bz2, .xz too), one sentence a line, blank lines between documents. None: documentation that is
    on this machine already."""
    vocab: str | None = None
    """WordPiece vocab.txt, tokenizer folder or hub name. None: learned from the corpus, of --model.vocab-size."""
    case: Literal["auto", "cased", "uncased", "uncased-accents"] = "auto"
    """What a learned vocabulary or a vocab.txt keeps of a text: capitals and accents, neither, or accents alone. auto: a
    learned one neither, a vocab.txt what its pieces have (or the tokenizer_config.json beside it says)."""
    init_from: str | None = None
    """Start from transformers' ELECTRA weights, sizes and vocabulary: a folder with generator/ and discriminator/, or a
    discriminator's folder or hub name (the generator then begins at random, of --model.generator-size)."""
    output: str = "runs/electra_small"
    """Run folder. The same command again continues where it stopped."""
    cache: str = "data/cache"
    """Where tokenized corpora are kept, by content."""
    steps: int = 1_000_000
    """Optimizer steps."""
    batch_size: int = 128
    """Examples of one optimizer step."""
    accumulate: int = 1
    """Parts into which a batch is cut to fit in memory; the result is the same."""
    grad_checkpointing: bool = False
    """Compute each layer again for its gradient rather than keep what it computed: less memory, more time."""
    max_length: int = 128
    """Tokens of an example, special ones counted."""
    examples: Literal["packed", "line"] = "packed"
    """Lines packed up to the length, as the original's, or each line an example."""
    learning_rate: float = 5e-4
    """Highest rate; it grows linearly over the warm-up and falls linearly to 0, multiplied."""
    warmup_steps: int = 10_000
    """Steps over which the rate grows."""
    weight_decay: float = 0.01
    """Decoupled, on all but LayerNorm and biases."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    mask_prob: float = 0.15
    """Share of an example's tokens the generator predicts."""
    disc_weight: float = 50.0
    """Weight of the discriminator's loss beside the generator's."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the hardware computes it, else fp16 on CUDA, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""
    compile: bool = False
    """torch.compile both networks (worth its minutes on CUDA)."""
    workers: int = 0
    """Processes that read batches ahead; 0: the training process reads."""
    seed: int = 0
    """Of initial weights, order, masks, samples and dropout."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 10_000
    """Steps between evaluations on held-out text."""
    eval_examples: int = 2_000
    """Held-out examples of an evaluation."""
    save_every: int = 5_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    max_minutes: float = 0.0
    """Save and leave before this much time is over, for a queue's limit; 0: no limit."""
    max_bad_steps: int = 20
    """Stop after this many steps in a row whose loss or gradient is not finite; they are skipped."""
    extend: bool = False
    """Continue a run with another schedule (steps, warm-up, rate), a finished one too."""
    export: str | None = None
    """Folder that gets generator/ and discriminator/ for transformers, with model cards, when the run is finished; the
    same command with it exports a finished run."""
    resume: bool = True
    """Continue a run found in --output; --no-resume refuses such a folder."""
    model: ModelConfig = field(default_factory=ModelConfig)


# What continuing needs
CHECKPOINT = {"step", "electra", "optimizer", "scaler", "window", "data", "vocabulary"}
# Settings that may change when a run is continued: where and how it is computed and told; the corpus and the vocabulary
# are compared by content.
FREE_ON_RESUME = {"config", "corpus", "vocab", "output", "cache", "accumulate", "grad_checkpointing", "precision", "device",
                  "compile", "workers", "log_every", "eval_every", "eval_examples", "save_every", "keep_checkpoints",
                  "resume", "max_minutes", "max_bad_steps", "extend", "export"}
SCHEDULE = {"steps", "warmup_steps", "learning_rate"}  # what --extend may change besides
PATIENCE = 5  # evaluations without progress that are worth a warning
LOWEST = {"steps": 1, "batch_size": 1, "accumulate": 1, "max_length": 5, "warmup_steps": 0, "weight_decay": 0,
          "disc_weight": 0, "workers": 0, "seed": 0, "log_every": 1, "eval_every": 1, "eval_examples": 1, "save_every": 1,
          "keep_checkpoints": 1, "max_minutes": 0, "max_bad_steps": 1, "model.vocab_size": 6,
          "model.embedding_size": 1, "model.hidden_size": 1,
          "model.layers": 1, "model.heads": 1, "model.feed_forward_size": 1, "model.dropout": 0}
ABOVE_ZERO = ("learning_rate", "clip_norm", "mask_prob", "model.generator_size", "model.initializer_range")
SAMPLES = 4  # held-out examples shown in TensorBoard
PANELS = {"generator: loss": ["mlm_loss"], "discriminator: loss": ["disc_loss"], "discriminator: AUC": ["disc_auc"],
          "generator: accuracy": ["mlm_accuracy", "sampled_accuracy"],
          "discriminator: accuracy, precision, recall": ["disc_accuracy", "disc_precision", "disc_recall"],
          "learning rate": ["learning_rate"]}
STYLES = {"training": {"linewidth": 0.8, "alpha": 0.6}, "held out": {"marker": "o", "markersize": 3},
          "published": {"marker": "X", "markersize": 9, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}}
# ELECTRA-Small on OpenWebText, read off a picture in google-research/electra's issue 3: on training data, without dropout,
# the AUC with padding counted
PUBLISHED = [
    {"step": 10_000, "mlm_loss": 5.1, "disc_loss": 0.248},
    {"step": 50_000, "mlm_loss": 3.65, "disc_loss": 0.221, "disc_auc": 0.875},
    {"step": 100_000, "mlm_loss": 3.51, "disc_loss": 0.208, "disc_auc": 0.890},
    {"step": 200_000, "mlm_loss": 3.43, "disc_loss": 0.194, "disc_auc": 0.904, "mlm_accuracy": 0.433,
     "sampled_accuracy": 0.328, "disc_accuracy": 0.930, "disc_precision": 0.740},
    {"step": 1_000_000, "mlm_loss": 3.26, "disc_loss": 0.160, "disc_auc": 0.935, "mlm_accuracy": 0.454,
     "sampled_accuracy": 0.351, "disc_accuracy": 0.942, "disc_precision": 0.783}]


class Run(NamedTuple):
    """What the steps of one run share."""

    settings: Pretraining
    model: ModelConfig  # with the size of the vocabulary at hand
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
    began = time.monotonic()
    settings = read_settings(Pretraining, argv, QUICKSTART)
    device = pick_device(settings.device)
    with joined(device):
        return pretrain(settings, device, began)


def pretrain(settings: Pretraining, device: torch.device, began: float) -> int:
    """The whole run, or what was left of it, and its exit code; `began` in time.monotonic's seconds."""
    print(f"config: {settings.config}")
    if settings.corpus and Path(settings.config).resolve() == QUICKSTART.resolve():
        print("This is the small demonstration; the paper's model is --config configs/electra_small.toml")
    check(settings)
    initial = read_initial(settings) if settings.init_from else None
    if initial:
        settings = dataclasses.replace(settings, model=initial.model, vocab=settings.vocab or initial.vocab)
        check(settings)
    output = Path(settings.output)
    deadline = began + 60 * settings.max_minutes if settings.max_minutes else math.inf
    with contextlib.nullcontext() if rank() else locked(output / ".lock", wait=False):
        for left in () if rank() else output.glob("*.tmp-*"):  # by a process killed while it saved
            left.unlink()
        checkpoint = find_checkpoint(settings, output)
        first_step = checkpoint["step"] if checkpoint else 0
        if first_step == settings.steps:
            print(f"{output} is finished, all {settings.steps:,} steps of it; another --output starts a new run")
            if settings.export and rank() == 0:
                export(output, Path(settings.export))
            return 0
        if first_step > settings.steps:
            raise InputError(f"{output} is at step {first_step:,}, beyond --steps {settings.steps:,}")
        if len(set(gathered(first_step))) > 1:
            raise InputError(f"the processes see different checkpoints in {output}: a folder that all share is wanted")
        for kind in ("generator", "discriminator") if settings.export and not rank() else ():
            claim(Path(settings.export) / kind)
        run = start(settings, output, device, checkpoint, initial)
        with stop_signals() as received:
            done = train(run, first_step, Window(device, checkpoint["window"] if checkpoint else {}), received, deadline)
    if done < settings.steps:
        print(f"{received[0].name if received else 'time is over'}: saved after step {done:,} in {output}; run the same "
              "command to go on")
        return 128 + received[0] if received else 0
    if settings.export and rank() == 0:
        export(output, Path(settings.export))
    print(f"\nNext:\n  python LM_DEMO.py --weights {output / 'gen.pt'}\n"
          f"  python Finetuning.py --task sst2 --weights {output / 'disc.pt'}")
    return 0


def check(settings: Pretraining) -> None:
    """InputError for a value or a combination that can't work."""
    values, model = flat(settings), settings.model
    for name, lowest in LOWEST.items():
        if not lowest <= values[name] < math.inf:
            raise InputError(f"{name} = {values[name]} must be at least {lowest}")
    for name in ABOVE_ZERO:
        if not 0 < values[name] < math.inf:
            raise InputError(f"{name} = {values[name]} must be above 0")
    width, heads, _ = model.generator()
    combinations = {
        f"max_length = {settings.max_length} is beyond model.max_positions = {model.max_positions}":
            settings.max_length > model.max_positions,
        f"accumulate = {settings.accumulate} cuts batch_size = {settings.batch_size} into parts of nothing":
            settings.accumulate > settings.batch_size,
        f"batch_size = {settings.batch_size} leaves some of {ranks()} processes without a row":
            ranks() > settings.batch_size,
        f"mask_prob = {settings.mask_prob} must be below 1": settings.mask_prob >= 1,
        f"model.dropout = {model.dropout} must be below 1": model.dropout >= 1,
        f"model.generator_size = {model.generator_size} must be at most 1": model.generator_size > 1,
        f"model.hidden_size = {model.hidden_size} is no multiple of model.heads = {model.heads}":
            model.hidden_size % model.heads > 0,
        f"model.generator_size = {model.generator_size} makes the generator {width} wide with {heads} heads: a positive "
        "multiple is wanted": width < 1 or width % heads > 0,
    }
    for message, wrong in combinations.items():
        if wrong:
            raise InputError(message)


# A run's beginning and end


def find_checkpoint(settings: Pretraining, output: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in the run folder; InputError if it is another run's or --no-resume was given."""
    before = output / "config.toml"
    if not before.exists():
        if checkpoints(output):
            raise InputError(f"{output} holds checkpoints without their config.toml; choose another --output")
        return None
    if not settings.resume:
        raise InputError(f"--no-resume: {output} holds a run; choose another --output")
    now = flat(settings)
    try:
        table = tomllib.loads(before.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{before} can't be read as TOML ({error}): mend it or choose another --output") from None
    then = flat(from_table(Pretraining, table, str(before)))
    free = FREE_ON_RESUME | (SCHEDULE if settings.extend else set())
    changed = [name for name, value in then.items() if value != now[name]]
    if refused := [f"{name} = {then[name]}, this command has {now[name]}" for name in changed if name not in free]:
        raise InputError(f"{output} holds a run with {'; '.join(refused)}: repeat its settings or choose another --output"
                         " (--extend continues with other steps, warmup_steps, learning_rate)")
    if {"precision", "device"} & set(changed):
        print("warning: precision or device has changed, the run goes on but not bit for bit", file=sys.stderr)
    for path in reversed(checkpoints(output)):
        try:
            checkpoint = load(path)
        except InputError as error:
            print(f"warning: {error}; the one before it is used", file=sys.stderr)
            continue
        if not isinstance(checkpoint, dict) or CHECKPOINT - checkpoint.keys():
            raise InputError(f"{path} is no checkpoint of Pretraining.py: remove it or choose another --output")
        print(f"continuing {output} after step {checkpoint['step']:,}")
        return checkpoint
    if checkpoints(output):
        raise InputError(f"no checkpoint in {output} is whole: choose another --output to begin again")
    return None


def start(settings: Pretraining, output: Path, device: torch.device, checkpoint: dict[str, Any] | None,
          initial: "Initial | None" = None) -> Run:
    """Data, networks and optimizer, new or as a checkpoint holds them; describes the run and its folder's files."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; CPU results don't change
    precision = pick_precision(settings.precision, device)
    cache = Path(settings.cache)
    paths = tuple(map(Path, settings.corpus)) or (documentation_corpus(cache, HERE / "requirements.txt"),)
    learned = checkpoint and settings.vocab is None
    source = Vocabulary.from_state(checkpoint["vocabulary"], str(output)) if learned else settings.vocab
    if rank():
        gathered(None)  # once the first process has built what is missing
    vocabulary, data = prepare(paths, source, settings.model.vocab_size, settings.max_length, settings.examples, cache,
                               settings.case)
    if not rank():
        gathered(None)
    model = dataclasses.replace(settings.model, vocab_size=vocabulary.size)
    torch.manual_seed(settings.seed)
    electra = Electra(model, settings.grad_checkpointing).to(device)
    optimizer = Adam(decay_groups(electra, settings.weight_decay), settings.learning_rate)
    parallel = DistributedDataParallel(electra) if ranks() > 1 else electra
    run = Run(settings, model, output, device, precision, vocabulary, data, electra, parallel, optimizer,
              precision.scaler())
    if checkpoint:
        if checkpoint["data"] != data.key:
            raise InputError(f"the corpus or the vocabulary has changed since {output} was begun: restore it or choose "
                             "another --output")
        try:
            electra.load_state_dict(checkpoint["electra"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:  # empty unless the run was fp16
                run.scaler.load_state_dict(checkpoint["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the checkpoint in {output} doesn't fit its config.toml "
                             f"({' '.join(str(error).split())[:300]}): choose another --output") from None
    elif initial:
        fill(electra, initial)
    if settings.compile:
        electra.generator.compile()
        electra.discriminator.compile()
    describe(run)
    files = {"vocab.txt": "\n".join(vocabulary.pieces()) + "\n", "config.toml": to_toml(settings)}
    for name, text in () if rank() else files.items():
        write_text(output / name, text)
    return run


def describe(run: Run) -> None:
    """Prints settings, data, model size and cost."""
    settings, counts = run.settings, run.data.counts
    print(to_toml(settings), end="")
    if counts["invalid"]:
        print(f"{counts['invalid']:,} of {counts['lines']:,} lines had bytes that are not UTF-8, read as U+FFFD")
    print(f"data: {counts['lines']:,} lines, {counts['tokens']:,} word pieces of which {counts['kept']:,} are in examples "
          f"and {counts['unknown']:,} unknown; {len(run.data.train):,} training examples of "
          f"{int(run.data.train.ends[-1]):,} pieces an epoch, {len(run.data.heldout):,} held out")
    entropy, share = unigram_baseline(run.data.heldout)
    print(f"held-out text: unigram entropy {entropy:.3f} nats; always guessing the most frequent piece is right {share:.3f}")
    both, one = (sum(p.numel() for p in module.parameters()) for module in (run.electra, run.electra.discriminator))
    predictions = round(settings.mask_prob * settings.max_length)
    flops = settings.steps * settings.batch_size * training_flops(run.model, settings.max_length, predictions)
    print(f"model: {one / 1e6:.2f} M parameters in the discriminator, {both / 1e6:.2f} M with the generator; {flops:.2e} "
          f"FLOPs in {settings.steps:,} steps of {settings.batch_size} x {settings.max_length} tokens")
    print(f"device: {run.device}, {run.precision.name}" + (f", one of {ranks()} processes" if ranks() > 1 else ""))


def unigram_baseline(store: Store) -> tuple[float, float]:
    """Entropy in nats of the pieces' frequencies and the most frequent one's share: what needs no context."""
    frequencies = np.bincount(store.ids[:10_000_000])
    p = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(p * np.log(p)).sum()), float(p.max())


def write_models(output: Path, electra: Electra, model: ModelConfig, vocabulary: Vocabulary) -> None:
    """gen.pt and disc.pt: weights, sizes and vocabulary, all that users of them need."""
    shared = {"model": dataclasses.asdict(model), "vocabulary": vocabulary.state()}
    for name, kind in (("gen.pt", "generator"), ("disc.pt", "discriminator")):
        save(output / name, shared | {"kind": kind, "weights": getattr(electra, kind).state_dict()})


class TransformersFolder(NamedTuple):
    """One network as transformers saves it."""

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]


class Initial(NamedTuple):
    """Where a run with --init-from begins."""

    model: ModelConfig
    vocab: str
    networks: dict[str, TransformersFolder]  # by kind; without a generator, perhaps


def read_transformers(name: str, flag: str) -> TransformersFolder:
    """Configuration and weights in a folder or on the hub; InputError if they can't be read."""
    folder = Path(name)
    if not folder.is_dir():
        folder = hub_folder(name, f"{flag} {name} is no file or folder here",
                            ["config.json", *TOKENIZER_FILES, *WEIGHT_FILES])
    found = [folder / file for file in WEIGHT_FILES if (folder / file).is_file()]
    if not found or not (folder / "config.json").is_file():
        raise InputError(f"{name} lacks {'config.json' if found else ' or '.join(WEIGHT_FILES)}: {flag} wants config.json, "
                         "tokenizer and weights of ELECTRA as transformers saves them")
    try:
        weights = safetensors.torch.load_file(found[0]) if found[0].suffix == ".safetensors" else load(found[0])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(weights, dict):
            raise ValueError("no table of settings or of weights")
    except InputError:
        raise
    except Exception as error:  # JSON and safetensors have a type each
        raise InputError(f"{name} can't be read ({' '.join(str(error).split())[:300]})") from None
    return TransformersFolder(folder, config, weights)


def read_initial(settings: Pretraining) -> Initial:
    """The networks that --init-from names and the sizes they have; InputError for a pair that can't be one of ours."""
    name = settings.init_from
    pair = (Path(name) / "discriminator").is_dir()
    networks = {"discriminator": read_transformers(str(Path(name) / "discriminator") if pair else name, "--init-from")}
    if pair and (Path(name) / "generator").is_dir():
        networks["generator"] = read_transformers(str(Path(name) / "generator"), "--init-from")
    try:
        model = from_transformers_config(networks["discriminator"].config)
        model = dataclasses.replace(model, generator_size=settings.model.generator_size)
        if "generator" in networks:
            size = from_transformers_config(networks["generator"].config)
            model = dataclasses.replace(model, generator_size=size.hidden_size / model.hidden_size)
            wanted = dataclasses.replace(model, hidden_size=size.hidden_size, heads=model.generator().heads,
                                         feed_forward_size=model.generator().feed_forward, dropout=size.dropout,
                                         generator_size=size.generator_size, initializer_range=size.initializer_range)
            if differ := [f"{name} = {value} where {flat(wanted)[name]} is wanted" for name, value in flat(size).items()
                          if value != flat(wanted)[name]]:
                raise ValueError(f"the generator has {', '.join(differ)}")
    except (ValueError, TypeError) as error:
        raise InputError(f"--init-from {name}: {error}") from None
    return Initial(model, str(networks["discriminator"].path), networks)


def fill(electra: Electra, initial: Initial) -> None:
    """Weights from transformers. Embeddings are shared here: where a pair's differ, the discriminator's are used."""
    for kind in ("generator", "discriminator"):
        if kind in initial.networks:
            try:
                load_transformers(getattr(electra, kind), initial.networks[kind].weights)
            except (KeyError, RuntimeError) as error:
                raise InputError(f"{initial.networks[kind].path} is no whole {kind} ({' '.join(str(error).split())[:300]}): "
                                 "--init-from wants what ElectraForMaskedLM and ElectraForPreTraining save") from None
    own = initial.networks["discriminator"].weights
    other = initial.networks.get("generator", initial.networks["discriminator"]).weights
    if differ := [name for name in own if ".embeddings." in name and not torch.equal(own[name], other.get(name, own[name]))]:
        print(f"warning: generator and discriminator have different embeddings ({', '.join(differ)}); the discriminator's "
              "are used for both", file=sys.stderr)


def export(output: Path, target: Path) -> None:
    """A finished run's networks as folders that transformers' Auto classes load, each with a model card."""
    for kind, network, file, head in (("generator", Generator, "gen.pt", "ForMaskedLM"),
                                      ("discriminator", Discriminator, "disc.pt", "ForPreTraining")):
        found = read_network(output / file, {kind: network}, "--export")._replace(report=pretraining_report(output))
        write_transformers(target / kind, found, getattr(found.config, kind)(), to_transformers(found.network), head)


def claim(folder: Path) -> None:
    """Makes a folder for an export; InputError if it holds files that an export would not replace but mingle with."""
    folder.mkdir(parents=True, exist_ok=True)
    if foreign := sorted({path.name for path in folder.glob("[!.]*")} - EXPORTED):
        raise InputError(f"--export: {folder} holds {', '.join(foreign)[:200]}, which no export wrote: choose another")


def write_transformers(folder: Path, found: "Pretrained", size: EncoderSize, weights: dict[str, Tensor], head: str,
                       **config: Any) -> None:
    """A network as transformers' AutoModel + `head` loads it, `config` added to its sizes, with tokenizer and model card."""
    from transformers import ElectraConfig  # seconds that training need not wait for
    claim(folder)
    theirs = ElectraConfig(**to_transformers_config(found.config, size), architectures=[f"Electra{head}"],
                           pad_token_id=found.vocabulary.pad, **config)
    longest = found.config.max_positions
    card = MODEL_CARD.format(kind=found.kind, head=head, tag=PIPELINES[head], report=found.report, longest=longest,
                             pieces=found.vocabulary.size, seen=found.vocabulary.seen or "cased",
                             millions=sum(weight.numel() for weight in found.network.parameters()) / 1e6)
    texts = found.vocabulary.to_transformers(longest) | {"config.json": theirs.to_json_string(), "README.md": card}
    for name, text in texts.items():
        write_text(folder / name, text)
    with replacing(folder / "model.safetensors") as temporary:
        own = {name: weight.clone() for name, weight in weights.items() if name != TIED[0]}
        temporary.write_bytes(safetensors.torch.save(own, {"format": "pt"}))
    print(f"exported: {folder}")


def pretraining_report(output: Path) -> str:
    """Data, held-out curve and settings of a run, for its model cards."""
    settings = (output / "config.toml").read_text(encoding="utf-8")
    files = ", ".join(Path(name).name for name in tomllib.loads(settings)["corpus"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["step", "mlm_loss", "mlm_accuracy", "sampled_accuracy", "disc_loss", "disc_precision", "disc_recall",
             "disc_auc"]
    rows = [[f"{line[name]:,}" if name == "step" else f"{line[name]:.4f}" for name in names]
            for line in lines if line["heldout"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows))
    return ("Pretrained by replaced-token detection (Clark et al., ICLR 2020) on "
            f"{files or 'docstrings of Python packages, in English'}.\n\n## On held-out text\n\n{table}\n\n"
            f"## Settings\n\n```toml\n{settings}```")


class Pretrained(NamedTuple):
    """What a weights file holds."""

    network: nn.Module
    config: ModelConfig
    vocabulary: Vocabulary
    kind: str
    task: str  # of a classifier
    report: str  # how it was trained, for a model card


def newest_weights(name: str) -> Path:
    """The newest runs/*/`name`; InputError if there is none."""
    found = sorted(Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"no runs/*/{name} here: train one with python Pretraining.py, or name one with --weights")
    return found[-1]


def read_network(path: Path, kinds: dict[str, Callable[[ModelConfig], nn.Module]], flag: str,
                 tasks: Iterable[str] = ("",)) -> Pretrained:
    """A network that these scripts wrote, of one of `kinds` and `tasks`, for inference; InputError for any other file."""
    wanted = f"{flag} wants the {' or '.join(kinds)} that Pretraining.py wrote"
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}: {wanted}")
    content = load(path)
    if not isinstance(content, dict) or not {"kind", "model", "vocabulary", "weights"} <= content.keys():
        raise InputError(f"{path} holds something else: {wanted}")
    if content["kind"] not in kinds:
        raise InputError(f"{path} holds a {content['kind']}: {wanted}")
    task = content.get("task", "")
    if task not in tasks:
        raise InputError(f"{path} was fine-tuned on {task}: --task {task} is wanted")
    try:
        config = from_table(ModelConfig, content["model"], "model")
        vocabulary = Vocabulary.from_state(content["vocabulary"], str(path))
        build, weights = kinds[content["kind"]], content["weights"]
        if config.layers > len(weights):
            raise ValueError(f"{config.layers} layers from {len(weights)} weights")
        with torch.device("meta"):  # sizes that the file itself doesn't hold take no memory
            shapes = {name: weight.shape for name, weight in build(config).state_dict().items()}
        for name, shape in shapes.items():
            if name in weights and not (weights[name].shape == shape and weights[name].is_contiguous()):
                raise ValueError(f"{name} is {tuple(weights[name].shape)}, {tuple(shape)} is wanted")
        if missing := sorted(shapes.keys() - weights.keys()):
            raise ValueError(f"{', '.join(missing)} missing")
        network = build(config)
        network.load_state_dict(weights)
    except Exception as error:  # each part has its own types; tokenizers raises bare Exception
        raise InputError(f"{path} does not fit together ({' '.join(str(error).split())[:300]}): {wanted}") from None
    refuse_unfit(str(path), network, config, vocabulary)
    return Pretrained(network.eval(), config, vocabulary, content["kind"], task, str(content.get("report", "")))


def refuse_unfit(source: str, network: nn.Module, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """InputError for weights that aren't numbers or aren't of this vocabulary."""
    if vocabulary.size != config.vocab_size:
        raise InputError(f"{source} has {vocabulary.size:,} pieces and weights for {config.vocab_size:,}: they belong to "
                         "different models")
    if not all(weight.isfinite().all() for weight in network.parameters()):
        raise InputError(f"{source} has weights that are not finite numbers, so its training failed: name another")


def write_checkpoint(run: Run, step: int, window: "Window") -> None:
    """The models, then what continuing needs. Randomness needs nothing, it follows from seed and step. Rank 0 writes."""
    if rank():
        return
    write_models(run.output, run.electra, run.model, run.vocabulary)
    save(run.output / f"checkpoint-{step}.pt",
         {"step": step, "electra": run.electra.state_dict(), "optimizer": run.optimizer.state_dict(),
          "scaler": run.scaler.state_dict(), "window": window.state(), "data": run.data.key,
          "vocabulary": run.vocabulary.state()})
    for old in checkpoints(run.output)[:-run.settings.keep_checkpoints]:
        old.unlink()


# Training


def train(run: Run, first_step: int, window: "Window", received: list[signal.Signals], deadline: float) -> int:
    """The steps from `first_step` on, with evaluations, metrics and checkpoints at their intervals.

    Returns the steps done: fewer than wanted, and saved, once a signal was `received` or twice the slowest step so far
    (evaluating and saving included) could pass the `deadline`, in time.monotonic's seconds.
    """
    settings = run.settings
    collate = Collator(run.data.train, run.vocabulary, settings.max_length)
    batches = TrainingBatches(collate, settings.batch_size, settings.examples == "line", settings.seed)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(first_step, settings.steps),
                                         num_workers=settings.workers, pin_memory=run.device.type == "cuda")
    rng = torch.Generator(run.device)
    metrics = Metrics(run.output, first_step, to_toml(settings), is_the_papers(settings, run.model))
    if first_step == 0:
        with window.paused():
            metrics.write(0, *evaluate(run))
    entropy, _ = unigram_baseline(run.data.heldout)
    run.electra.train()
    bad, slowest, before = 0, 0.0, time.monotonic()
    bar = tqdm(loader, "Pretraining", settings.steps, initial=first_step, unit=" steps", mininterval=1, disable=rank() > 0)
    for step, batch in enumerate(bar, first_step):
        losses, finite, rate = training_step(run, batch, step, rng)
        window.add(losses, finite)
        done = step + 1
        bad = 0 if finite else bad + 1
        if bad:
            scale = f"; loss scale {run.scaler.get_scale():g}" if run.scaler.is_enabled() else ""
            tqdm.write(f"step {done:,} skipped: its loss or gradient is not finite{scale}")
        if bad == settings.max_bad_steps:
            raise InputError(f"{bad} steps in a row without a finite loss and gradient: the run has diverged, the last "
                             f"checkpoint in {run.output} is from before; lower --learning-rate")
        if done % settings.log_every == 0 or done == settings.steps:
            values = window.close() | {"learning_rate": rate}
            metrics.write(done, values)
            bar.set_postfix({"mlm": f"{values['mlm_loss']:.3f}", "disc": f"{values['disc_loss']:.4f}",
                             "tokens/s": f"{values['tokens_per_second']:,.0f}"})
        if done % settings.eval_every == 0 or done == settings.steps:
            with window.paused():
                metrics.write(done, *evaluate(run))
                for doubt in stuck(metrics.heldout, entropy):
                    tqdm.write(f"warning: {doubt}")
        slowest = max(slowest, time.monotonic() - before)
        stopping = bool(received) or time.monotonic() + 2 * slowest > deadline
        stopping = bool(total(torch.tensor(float(stopping), device=run.device))) if ranks() > 1 else stopping
        if done % settings.save_every == 0 or done == settings.steps or stopping:
            write_checkpoint(run, done, window)
        if stopping:
            return done
        slowest, before = max(slowest, time.monotonic() - before), time.monotonic()
    return settings.steps


def stuck(heldout: list[dict[str, float]], entropy: float) -> Iterator[str]:
    """What PATIENCE evaluations without progress suggest; `entropy` of the held-out text's word pieces, in nats."""
    *_, before = heldout[:-PATIENCE] or [None]
    last = heldout[-PATIENCE:]
    if not before:
        return
    if all(values["disc_auc"] < 0.5 + 2 * values["disc_auc_error"] for values in last):
        yield (f"the discriminator has been at chance for {PATIENCE} evaluations: the learning rate may be too high, "
               "disc_weight too low, or the generator may know no more than word frequencies yet")
    if min(values["mlm_loss"] for values in last) > max(0.99 * before["mlm_loss"], 0.9 * entropy):
        yield (f"the generator's loss has not moved for {PATIENCE} evaluations and is near that of word frequencies "
               f"({entropy:.2f}): the learning rate may be too high or too low, or more steps are wanted")


def seed_step(seed: int, step: int, rng: torch.Generator) -> None:
    """Makes masks and samples (`rng`) follow from seed and step, dropout (the global generator) from the rank too."""
    rng.manual_seed(int(np.random.default_rng((seed, step)).integers(1 << 62)))
    torch.manual_seed(int(np.random.default_rng((seed, step, 1 + rank())).integers(1 << 62)))


def training_step(run: Run, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, bool, float]:
    """One optimizer step; returns the batch's Window.COLUMNS, whether loss and gradient were finite, and the rate.

    Every process masks the whole batch and draws for it, then trains on its share of the rows: what a row gets does not
    depend on how many they are. A step that is not finite changes no weight.
    """
    settings = run.settings
    batch = batch.to(run.device)
    seed_step(settings.seed, step, rng)
    masked = mask_tokens(batch, run.vocabulary, settings.mask_prob, settings.max_length, rng)
    draws = sampler_draws(masked.positions.shape, run.model.vocab_size, run.device, rng)
    losses = total(backward(run, batch, masked, draws))
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.electra.parameters(), settings.clip_norm)
    finite = bool((norm + losses.sum()).isfinite())
    rate = scheduled_rate(step, settings.learning_rate, settings.warmup_steps, settings.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    if finite or run.scaler.is_enabled():  # which leaves out such steps itself and lowers its scale
        run.scaler.step(run.optimizer)
        run.scaler.update()
    run.optimizer.zero_grad()
    return losses, finite, rate


def backward(run: Run, batch: Batch, masked: Masked, draws: Tensor) -> Tensor:
    """Accumulates the gradient of the joint loss, part by part, and returns this process's share of Window.COLUMNS.

    Gradients are summed over processes with the last part alone. Loss (paper, section 2.1): mean cross entropy over the
    chosen positions + disc_weight * mean binary cross entropy over all tokens that are not padding, both means over the
    whole batch however it is cut and shared out.
    """
    sums = torch.zeros(len(Window.COLUMNS), device=run.device)
    chosen, tokens = masked.chosen.sum().clamp(min=1), batch.mask.sum()
    rows = share(len(batch.ids))
    parts = list(zip(*(tensor[rows].chunk(run.settings.accumulate) for tensor in (*batch, *masked, draws)), strict=True))
    for number, (ids, segments, mask, masked_ids, positions, used, some_draws) in enumerate(parts, 1):
        synced = ranks() == 1 or number == len(parts)
        with contextlib.nullcontext() if synced else run.parallel.no_sync():
            with run.precision.autocast():
                output = run.parallel(ids, segments, mask, masked_ids, positions, used, some_draws)
            mlm_loss = output.generator_losses.sum() / chosen
            disc_loss = output.discriminator_losses.sum() / tokens
            loss = mlm_loss + run.settings.disc_weight * disc_loss
            run.scaler.scale(loss * ranks()).backward()  # over processes gradients are averaged
        with torch.no_grad():
            guessed = (output.sampled == ids.gather(1, positions)) & used
            detected = ((output.discriminator_logits > 0) == output.replaced) & mask
            sums += torch.stack([mlm_loss, disc_loss, guessed.sum() / chosen, detected.sum() / tokens, mask.sum()])
    return sums


@torch.no_grad()
def evaluate(run: Run) -> tuple[dict[str, float], str]:
    """Metrics on evenly spread held-out examples, with the same masks each time, and, in rank 0, the first of them as a
    table; InputError if the run has diverged.

    The losses are the training's. Everything else about the discriminator is judged on the tokens that could have been
    replaced: neither padding nor special, which would be easy negatives.
    """
    settings, store = run.settings, run.data.heldout
    numbers = np.linspace(0, len(store) - 1, min(settings.eval_examples, len(store))).astype(np.int64)
    collate = Collator(store, run.vocabulary, settings.max_length)
    rng = torch.Generator(run.device)
    sums = torch.zeros(6, dtype=torch.float64, device=run.device)
    labels, scores, samples = [], [], ""
    run.electra.eval()
    parts = np.array_split(numbers, math.ceil(len(numbers) * settings.accumulate / settings.batch_size))
    for number in range(rank(), len(parts), ranks()):
        rng.manual_seed(int(np.random.default_rng((settings.seed, number)).integers(1 << 62)))
        batch = collate(parts[number]).to(run.device)
        masked = mask_tokens(batch, run.vocabulary, settings.mask_prob, settings.max_length, rng)
        draws = sampler_draws(masked.positions.shape, run.model.vocab_size, run.device, rng)
        with run.precision.autocast():
            output = run.electra(*batch, *masked, draws)
        originals = batch.ids.gather(1, masked.positions)
        predicted = output.generator_logits.argmax(-1) == originals
        sums += torch.stack([output.generator_losses.sum(), (predicted & masked.chosen).sum(),
                             ((output.sampled == originals) & masked.chosen).sum(), masked.chosen.sum(),
                             output.discriminator_losses.sum(), batch.mask.sum()])
        real = candidates(batch, run.vocabulary)
        labels.append(output.replaced[real].cpu().numpy())
        scores.append(output.discriminator_logits[real].cpu().numpy())
        if number == 0:
            samples = sample_table(run.vocabulary, batch, masked, output)
    run.electra.train()
    mlm_loss, correct, sampled, chosen, disc_loss, tokens = total(sums).tolist()
    if not math.isfinite(mlm_loss + disc_loss):
        raise InputError("the losses on held-out text are not finite: the run has diverged, lower --learning-rate")
    labels, scores = (np.concatenate([part for parts in gathered(own) for part in parts]) for own in (labels, scores))
    found = detection_metrics(labels, scores)
    chosen = max(1.0, chosen)
    return {"mlm_loss": mlm_loss / chosen, "mlm_accuracy": correct / chosen, "sampled_accuracy": sampled / chosen,
            "disc_loss": disc_loss / tokens, "disc_accuracy": found.accuracy, "disc_precision": found.precision,
            "disc_recall": found.recall, "disc_auc": found.auc, "disc_auc_error": found.error}, samples


def sample_table(vocabulary: Vocabulary, batch: Batch, masked: Masked, output: ElectraOutput) -> str:
    """The batch's first examples as a Markdown table: their pieces before, in and after the generator, and those that the
    discriminator flags."""
    generated = corrupt(batch.ids, masked.positions, masked.chosen, output.sampled)
    rows = {"original": (batch.ids, torch.zeros_like(batch.mask)), "masked": (masked.ids, masked.ids != batch.ids),
            "generated": (generated, output.replaced), "flagged": (generated, output.discriminator_logits > 0)}
    lines = ["| example | in bold what is masked, replaced, or flagged as replaced |", "|---|---|"]
    for number, real in enumerate(batch.mask[:SAMPLES]):
        for name, (ids, marks) in rows.items():
            pieces = map(vocabulary.tokenizer.id_to_token, ids[number, real].tolist())
            shown = [re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", piece) for piece in pieces]
            text = " ".join(f"**{piece}**" if mark else piece
                            for piece, mark in zip(shown, marks[number, real].tolist(), strict=True))
            lines.append(f"| {number + 1} {name} | {text.replace(' &#35;&#35;', '')} |")
    return "\n".join(lines)


class Window:
    """Means since the last line of metrics; on the device until `close`, so that steps needn't wait for it."""

    COLUMNS = ("mlm_loss", "disc_loss", "sampled_accuracy", "disc_accuracy", "tokens_per_second")

    def __init__(self, device: torch.device, state: dict[str, Any]):
        self.sums = torch.tensor(state.get("sums", [0.0] * len(self.COLUMNS)), device=device)
        self.steps, self.skipped, self.seconds = (state.get(name, 0) for name in ("steps", "skipped", "seconds"))
        self.began = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What a continued run's window begins with."""
        return {"sums": self.sums.tolist(), "steps": self.steps, "skipped": self.skipped,
                "seconds": self.seconds + time.perf_counter() - self.began}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of tokens_per_second."""
        self.seconds += time.perf_counter() - self.began
        yield
        self.began = time.perf_counter()

    def add(self, values: Tensor, finite: bool) -> None:
        if finite:
            self.sums += values
        self.steps += finite
        self.skipped += not finite

    def close(self) -> dict[str, float]:
        *means, tokens = self.sums.tolist()
        seconds = self.seconds + time.perf_counter() - self.began
        values = [*(mean / max(1, self.steps) for mean in means), tokens / seconds]
        skipped = {"skipped_steps": self.skipped}
        self.__init__(self.sums.device, {})
        return dict(zip(self.COLUMNS, values, strict=True)) | skipped


class Metrics:
    """metrics.jsonl, one object a line, and what is made of it: TensorBoard's events and, with each evaluation, curves.png.

    Lines of steps beyond `first_step` are a stopped run's and are dropped. Rank 0 writes.
    """

    def __init__(self, output: Path, first_step: int, settings: str, published: bool):
        self.path, self.published = output / "metrics.jsonl", published
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if first_step and self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a torn line
                kept += [line] * (json.loads(line)["step"] <= first_step)
        self.heldout = [values for values in map(json.loads, kept) if values["heldout"]]
        if rank():
            return
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        begin = first_step + 1 if first_step else 0
        self.events = Events(output, begin)
        self.events.write(begin, {}, {"settings": f"```toml\n{settings}```"})

    def write(self, step: int, values: dict[str, float], samples: str | None = None) -> None:
        """Training's means, or an evaluation's metrics with its samples."""
        heldout = samples is not None
        if not rank():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "heldout": heldout} | values) + "\n")
            side = "heldout" if heldout else "train"
            self.events.write(step, {f"{side}/{name}": value for name, value in values.items()},
                              {"samples": samples} if heldout else {})
            if heldout and step:
                draw_curves(self.path, self.published)
        if heldout:
            self.heldout.append(values)
            tqdm.write(f"step {step:,}, held out: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def is_the_papers(settings: Pretraining, model: ModelConfig) -> bool:
    """Whether the run is the paper's ELECTRA-Small, so that the published curve says what to expect."""
    ours = flat(dataclasses.replace(settings, model=model))
    return all(ours[name] == value for name, value in flat(Pretraining()).items() if name not in FREE_ON_RESUME | {"seed"})


def draw_curves(path: Path, published: bool) -> None:
    """curves.png beside metrics.jsonl, with the published points up to the step reached if `published`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = {"training": [line for line in lines if not line["heldout"]],
             "held out": [line for line in lines if line["heldout"] and line["step"]],  # the axis begins above 0
             "published": [line for line in PUBLISHED if published and line["step"] <= lines[-1]["step"]]}
    panels = {}
    for title, names in PANELS.items():
        found = [(f"{name}, {kind}", [line for line in some if name in line], name, {"color": f"C{number}"} | STYLES[kind])
                 for number, name in enumerate(names) for kind, some in kinds.items()]
        panels[title] = [Curve(label, [line["step"] for line in some], [line[name] for line in some], style)
                         for label, some, name, style in found if some]
    note = ("; published: Small on OpenWebText, google-research/electra issue 3, read off a picture"
            if kinds["published"] else "")
    draw(path.with_name("curves.png"), panels, "steps", f"{path.parent}{note}")


if __name__ == "__main__":
    sys.exit(main())
