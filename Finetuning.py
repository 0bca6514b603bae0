"""A pretrained discriminator and a GLUE task in; dev scores over seeds, test predictions and a classifier out.

    python Finetuning.py --task sst2                         # the newest run's disc.pt, data/glue/SST-2
    python Finetuning.py --task all --weights disc.pt --seeds 5 --predict
"""

import dataclasses
import hashlib
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
import tyro
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from tqdm import tqdm

from dataset import (GLUE_URL, TASKS, Row, Segments, Task, Vocabulary, collate, encode_rows, fetch_task,
                     load_vocabulary, read_rows, similar_batches, task_folder, task_key, tsv_lines)
from model import (Classifier, Discriminator, Encoder, ModelConfig, classifier_to_transformers, from_transformers_config,
                   load_transformers)
from Pretraining import Pretrained, newest_weights, read_network, read_transformers, refuse_unfit, write_transformers
from utils import (Adam, InputError, Precision, locked, pick_device, pick_precision, replacing, reports_input_errors,
                   save, scheduled_rate, write_text)

ADAM_EPS = 1e-6
DEV_TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]  # of the paper's tables; WNLI is left out there
PUBLISHED = {  # dev, in the order of DEV_TASKS (google-research/electra; richarddwang/electra_pytorch)
    "ELECTRA-Small++, median": (57.0, 91.2, 88.0, 87.5, 89.0, 81.3, 88.4, 66.7),
    "ELECTRA-Small-OWT, median": (56.8, 88.3, 87.4, 86.8, 88.3, 78.9, 87.9, 68.5),
    "richarddwang Small-OWT, mean of 10": (58.7, 88.0, 86.0, 86.2, 88.6, 80.4, 87.5, 67.5),
}


@dataclass(frozen=True)
class Finetuning:
    """Fine-tunes a pretrained discriminator on GLUE. The defaults are the paper's for ELECTRA-Small."""

    task: str
    """cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, ax (predicted with mnli's model), or all whose files exist."""
    weights: str | None = None
    """disc.pt, a run folder, a folder of transformers' ELECTRA or its hub name; or a model.pt that --save-model kept, which
    is evaluated and predicts without training. None: the newest run's disc.pt."""
    data_dir: str = "data/glue"
    """Folder of GLUE's official folders (SST-2/train.tsv ...); a task that isn't there is fetched from the hub."""
    output: str | None = None
    """Results folder; finished runs in it are not repeated. None: runs/NAME/glue, named after the weights; for
    model.pt its own folder."""
    protocol: Literal["original", "robust"] = "original"
    """original: as the paper's code; robust: Adam with bias correction, and 20 epochs for small sets."""
    epochs: int | None = None
    """Epochs. None: the protocol's for the task (original: 10 for rte and stsb, else 3)."""
    batch_size: int = 32
    """Examples of an optimizer step."""
    learning_rate: float = 3e-4
    """Highest rate, the head's; it grows linearly over the warm-up and falls linearly to 0, multiplied."""
    warmup_share: float = 0.1
    """Share of the steps over which the rate grows."""
    layer_decay: float = 0.8
    """Factor on the rate from each layer to the one below."""
    layer_decay_exact: bool = False
    """The paper's formula; otherwise as its code has it: one power more for all below the head."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    dropout: float = 0.1
    """In encoder and head."""
    max_length: int = 128
    """Tokens of an example, special ones counted; pairs are cut longest first."""
    seed: int = 0
    """First seed: of the head's weights, order and dropout."""
    seeds: int = 1
    """Number of seeds."""
    from_scratch: bool = False
    """Random weights of the same sizes, without layer-wise decay: what pretraining is compared with."""
    predict: bool = False
    """Write the official submission files, a folder for each seed."""
    predict_file: str | None = None
    """Classify this text file too, a text a line, pairs split by TAB."""
    save_model: bool = False
    """Keep each fine-tuned model as a self-contained model.pt."""
    export: str | None = None
    """Folder that gets the model.pt named by --weights for transformers' ElectraForSequenceClassification."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the hardware computes it, else fp16 on CUDA, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""


# Settings that don't change a run's result, or that name the run
FREE = {"task", "weights", "data_dir", "output", "epochs", "seed", "seeds", "predict", "predict_file", "save_model",
        "export", "device"}


class Source(NamedTuple):
    """Weights to start from."""

    name: str
    encoder: Encoder
    config: ModelConfig
    vocabulary: Vocabulary
    classifier: Pretrained | None  # fine-tuned already


class TaskData(NamedTuple):
    """One task's files, read."""

    key: str
    task: Task
    train: list[Row]
    skipped: int  # malformed training rows
    dev: dict[str, list[Row]]
    tests: dict[str, list[Row]]  # by submission file


class Job(NamedTuple):
    """What the runs of one command share."""

    settings: Finetuning
    source: Source
    output: Path
    device: torch.device
    precision: Precision


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = tyro.cli(Finetuning, args=argv)
    check(settings)
    asked = task_key(settings.task)
    device = pick_device(settings.device)
    source = read_source(settings, asked)
    if settings.max_length > source.config.max_positions:
        raise InputError(f"--max-length {settings.max_length} is beyond the {source.config.max_positions} positions of "
                         f"{source.name}")
    if settings.export and not source.classifier:
        raise InputError(f"--export wants a fine-tuned model, {source.name} is not: --save-model keeps model.pt, name that "
                         "with --weights")
    beside = Path("runs") / run_name(Path(source.name)) / ("glue-scratch" if settings.from_scratch else "glue")
    output = Path(settings.output or (Path(source.name).parent if source.classifier else beside))
    job = Job(settings, source, output, device, pick_precision(settings.precision, device))
    lines = read_user_lines(settings.predict_file, TASKS[TASKS[asked].model or asked]) if settings.predict_file else None
    print(f"weights: {source.name}{', sizes and vocabulary only' if settings.from_scratch else ''}; results: {output}; "
          f"{device}, {job.precision.name}")
    with locked(output / ".lock", wait=False):
        results = read_results(output / "results.json")
        tasks = [read_task(settings, asked, source.classifier is None)] if asked else read_all_tasks(settings)
        for data in tasks:
            if data.skipped:
                print(f"{data.task.name}: {data.skipped:,} malformed training rows skipped")
            if source.classifier:
                use_classifier(job, data, lines)
                continue
            for seed in seeds_of(settings):
                finetune_once(job, data, seed, lines, results)
            print(statistics_text(data, [r for r in results if r["task"] == data.key and r["seed"] in seeds_of(settings)]))
        if not asked:
            print(glue_table(settings, results, [data.key for data in tasks]))
    return 0


def check(settings: Finetuning) -> None:
    """InputError for a value or a combination that can't work."""
    everything = settings.task.lower() == "all"
    for message, wrong in {
        f"--task {settings.task} is none of {', '.join(TASKS)}, all": not everything and not task_key(settings.task),
        "--predict-file wants one --task, not all": everything and settings.predict_file is not None,
        f"--epochs {settings.epochs} must be at least 1": settings.epochs is not None and settings.epochs < 1,
        f"--batch-size {settings.batch_size} must be at least 1": settings.batch_size < 1,
        f"--seeds {settings.seeds} must be at least 1": settings.seeds < 1,
        f"--seed {settings.seed} must be from 0 to 2^32": not 0 <= settings.seed < 1 << 32,
        f"--max-length {settings.max_length} must be at least 5": settings.max_length < 5,
        f"--learning-rate {settings.learning_rate} must be above 0": not 0 < settings.learning_rate < math.inf,
        f"--clip-norm {settings.clip_norm} must be above 0": not settings.clip_norm > 0,
        f"--layer-decay {settings.layer_decay} must be above 0 and at most 1": not 0 < settings.layer_decay <= 1,
        f"--warmup-share {settings.warmup_share} must be from 0 to 1": not 0 <= settings.warmup_share <= 1,
        f"--dropout {settings.dropout} must be from 0 to 1, below it": not 0 <= settings.dropout < 1,
    }.items():
        if wrong:
            raise InputError(message)


def seeds_of(settings: Finetuning) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


# Weights


def run_name(path: Path) -> str:
    """What a run's folder is called after: the weights' folder, or the model's name on the hub."""
    return (path.parent if path.suffix == ".pt" else path).resolve().name


def read_source(settings: Finetuning, asked: str) -> Source:
    """The weights to start from; InputError unless every weight of the encoder is there, in its shape, and no other."""
    path = Path(settings.weights) if settings.weights else newest_weights("disc.pt")
    if (path / "disc.pt").is_file():
        path = path / "disc.pt"
    if path.suffix != ".pt" and not path.is_file():
        return read_encoder(str(path))
    key = TASKS[asked].model or asked if asked else ""
    kinds = {"discriminator": Discriminator}
    if key and not settings.from_scratch:
        kinds["classifier"] = partial(Classifier, outputs=outputs(TASKS[key]))
    found = read_network(path, kinds, "--weights", {"", key})
    return Source(str(path), found.network.encoder, found.config, found.vocabulary,
                  found if found.kind == "classifier" else None)


def outputs(task: Task) -> int:
    return len(task.labels) or 1


def read_encoder(name: str) -> Source:
    """A discriminator in transformers' layout, from a folder or the hub; its heads are left aside."""
    path, theirs, weights = read_transformers(name, "--weights")
    vocabulary = load_vocabulary(str(path))
    try:
        if any(key.startswith("generator_") for key in weights):
            raise ValueError("it is a generator, a discriminator is wanted")
        config = from_transformers_config(theirs)
        encoder = Discriminator(config).encoder
        load_transformers(encoder, weights)
    except Exception as error:  # sizes of other types, weights of other shapes: each its own type
        raise InputError(f"{name} does not fit together ({' '.join(str(error).split())[:300]}): --weights wants disc.pt, a "
                         "run folder, or an ELECTRA as transformers saves it") from None
    refuse_unfit(name, encoder, config, vocabulary)
    return Source(name, encoder, config, vocabulary, None)


def digest(source: Source) -> str:
    """Changes with any weight of the encoder or any piece of the vocabulary."""
    total = hashlib.blake2b(source.vocabulary.state().encode(), digest_size=8)
    for weight in source.encoder.state_dict().values():
        total.update(weight.numpy().tobytes())
    return total.hexdigest()


# Data


def read_task(settings: Finetuning, asked: str, training: bool) -> TaskData:
    """Training and dev rows (a fine-tuned model's dev if there), test rows where predictions are wanted.

    InputError for a file that is missing or isn't the task's.
    """
    data = Path(settings.data_dir)
    key = TASKS[asked].model or asked
    task, train, skipped, dev, tests = TASKS[key], [], 0, {}, {}
    folder = task_folder(data, key) or (fetch_task(key, data) if training else None)
    if folder and training:
        train, skipped = read_rows(folder / "train.tsv", task, "train")
    if folder:
        dev = {split: read_rows(folder / file, task, "dev")[0] for split, file in task.dev.items()
               if training or (folder / file).is_file()}
    predicted = [key, *(other for other, row in TASKS.items() if row.model == key)] if asked == key else [asked]
    for other in predicted if settings.predict or asked != key else ():
        place = task_folder(data, other) or (fetch_task(other, data) if other == asked else None)
        for name, file in TASKS[other].test_files().items() if place else ():
            if other == asked or (place / file).is_file():
                tests[name] = read_rows(place / file, TASKS[other], "test")[0]
    return TaskData(key, task, train, skipped, dev, tests)


def read_all_tasks(settings: Finetuning) -> list[TaskData]:
    """Every task whose training and dev files exist; the others are named."""
    data, tasks = Path(settings.data_dir), []
    for key, task in TASKS.items():
        folder = task_folder(data, key)
        missing = [file for file in ("train.tsv", *task.dev.values()) if not folder or not (folder / file).is_file()]
        if task.dev and missing:
            print(f"{task.name} left out: no {', '.join(missing)} in {folder or data / task.name}")
        elif task.dev:
            tasks.append(read_task(settings, key, True))
    if not tasks:
        raise InputError(f"no task's train.tsv and dev.tsv below {data}: get them from {GLUE_URL} or set --data-dir")
    return tasks


def read_user_lines(path: str, task: Task) -> list[Row]:
    """A user's texts, indexed by their line's number."""
    rows = []
    for number, fields in tsv_lines(Path(path)):
        if len(fields) != len(task.texts):
            raise InputError(f"{path}, line {number}: {len(fields)} texts split by TAB, {task.name} wants {len(task.texts)}")
        rows.append(Row(str(number), tuple(fields), math.nan))
    if not rows:
        raise InputError(f"no text in {path}: one a line is wanted, pairs split by TAB")
    return rows


# Results


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs of results.json; none if there is no such file."""
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} can't be read as results: delete it or choose another --output") from None


def fingerprint(job: Job, data: TaskData, epochs: int) -> dict[str, Any]:
    """All that a run's result depends on beside its seed."""
    settings = {name: value for name, value in dataclasses.asdict(job.settings).items() if name not in FREE}
    rows = hashlib.blake2b(repr((data.train, data.dev)).encode(), digest_size=8).hexdigest()
    return settings | {"epochs": epochs, "precision": job.precision.name, "weights": digest(job.source), "data": rows}


def finished(job: Job, found: dict[str, Any] | None, wanted: dict[str, Any], folder: Path, files: list[Path]) -> bool:
    """Whether this run and its `files` are there; InputError if it was run with other settings."""
    if not found:
        return False
    for name, value in wanted.items():
        if found["settings"].get(name) != value:
            raise InputError(f"{job.output} holds {found['task']}, seed {found['seed']}, with {name} = "
                             f"{found['settings'].get(name)}, this command has {value}: choose another --output")
    return all(file.is_file() for file in files)


# One run


def finetune_once(job: Job, data: TaskData, seed: int, lines: list[Row] | None, results: list[dict[str, Any]]) -> None:
    """Trains, evaluates and predicts unless that is done; appends to `results` and writes results.json."""
    settings, task = job.settings, data.task
    robust = settings.protocol == "robust"
    epochs = settings.epochs or (task.robust_epochs if robust else task.epochs)
    folder = job.output / data.key / f"seed-{seed}"
    predicted = job.output / f"seed-{seed}"
    files = [predicted / f"{name}.tsv" for name in data.tests] + [folder / "model.pt"] * settings.save_model
    files += [user_file(folder, settings)] if lines else []
    wanted = fingerprint(job, data, epochs)
    found = next((r for r in results if (r["task"], r["seed"]) == (data.key, seed)), None)
    if finished(job, found, wanted, folder, files):
        print(f"{task.name}, seed {seed}: finished before, {scores_text(found['scores'])}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = new_model(job, task, seed)
    scores = train(job, data, model, epochs, seed, folder)
    predict_tests(job, data, model, predicted)
    if lines:
        predict_lines(job, data, model, lines, user_file(folder, settings))
    result = {"task": data.key, "seed": seed, "scores": scores, "settings": wanted, "source": job.source.name,
              "train_rows": len(data.train), "skipped_rows": data.skipped,
              "dev_rows": {split or "dev": len(rows) for split, rows in data.dev.items()},
              "device": str(job.device), "seconds": round(time.perf_counter() - began, 1)}
    if settings.save_model:
        report = (f"Fine-tuned on {task.name}; dev: {scores_text(scores)}.\n\n## The run\n\n```json\n"
                  f"{json.dumps(result, indent=1)}\n```")
        save(folder / "model.pt", {"kind": "classifier", "task": data.key, "model": dataclasses.asdict(model_config(job)),
                                   "vocabulary": job.source.vocabulary.state(), "weights": model.state_dict(),
                                   "report": report})
    results[:] = [r for r in results if r is not found] + [result]
    write_text(job.output / "results.json", json.dumps({"runs": results}, indent=1))


def model_config(job: Job) -> ModelConfig:
    return dataclasses.replace(job.source.config, dropout=job.settings.dropout)


def new_model(job: Job, task: Task, seed: int) -> Classifier:
    """A random head on the pretrained encoder, on a random one if --from-scratch."""
    torch.manual_seed(seed)
    model = Classifier(model_config(job), outputs(task))
    if not job.settings.from_scratch:
        model.encoder.load_state_dict(job.source.encoder.state_dict())
    return model.to(job.device)


def layerwise_groups(model: Classifier, rate: float, decay: float, exact: bool) -> list[dict[str, Any]]:
    """Parameter groups with their highest rates, from the embeddings up to the head (paper, appendix B).

    The published formula is rate * decay^(layers + 1 - depth); the code has one power more for all below the head
    (google-research/electra issue 51, model/optimization.py).
    """
    groups = model.depths()
    top = len(groups) - 1
    powers = [top - depth + (0 if exact or depth == top else 1) for _, depth in groups]
    return [{"params": parameters, "lr": rate * decay**power, "highest_rate": rate * decay**power}
            for (parameters, _), power in zip(groups, powers, strict=True)]


def train(job: Job, data: TaskData, model: Classifier, epochs: int, seed: int, folder: Path) -> dict[str, float]:
    """All epochs of one run, evaluated after each; the scores after the last, as the original reports them.

    `folder` gets metrics.jsonl and the last dev predictions.
    """
    settings, task, vocabulary = job.settings, data.task, job.source.vocabulary
    examples, labels = training_examples(data.train, task, vocabulary, settings.max_length)
    lengths = row_lengths(examples)
    decay = 1.0 if settings.from_scratch else settings.layer_decay  # which would freeze random lower layers
    groups = layerwise_groups(model, settings.learning_rate, decay, settings.layer_decay_exact)
    optimizer = (torch.optim.AdamW(groups, eps=ADAM_EPS, weight_decay=0.0, fused=True) if settings.protocol == "robust" else
                 Adam(groups, settings.learning_rate, ADAM_EPS))
    scaler = job.precision.scaler()
    total = epochs * math.ceil(len(examples) / settings.batch_size)
    warmup = int(total * settings.warmup_share)
    bar = tqdm(total=total, desc=f"{task.name}, seed {seed}", unit=" steps", mininterval=1)
    step, scores = 0, {}
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for epoch in range(epochs):
            model.train()
            loss_sum = torch.zeros((), device=job.device)
            for numbers in similar_batches(lengths, settings.batch_size, np.random.default_rng((seed, epoch))):
                batch = collate([examples[n] for n in numbers], vocabulary, settings.max_length).to(job.device)
                with job.precision.autocast():
                    logits = model(*batch)
                loss = task_loss(logits.float(), torch.tensor(labels[numbers], device=job.device), task)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
                for group in optimizer.param_groups:
                    group["lr"] = scheduled_rate(step, group["highest_rate"], warmup, total)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                loss_sum += loss.detach() * len(numbers)
                step += 1
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
            scores = evaluate(job, data, model, folder / "dev")
            line = {"epoch": epoch + 1, "step": step, "loss": loss_sum.item() / len(examples),
                    "learning_rate": optimizer.param_groups[-1]["lr"]}
            print(json.dumps(line | scores), file=file, flush=True)
            bar.set_postfix_str(scores_text(scores))
    bar.close()
    return scores


def training_examples(rows: list[Row], task: Task, vocabulary: Vocabulary,
                      max_length: int) -> tuple[list[Segments], np.ndarray]:
    """Examples and their labels (N,), each pair in both orders where the task is trained so."""
    orders = (False, True) if task.both_orders else (False,)
    examples = [example for swap in orders for example in encode_rows(rows, vocabulary, max_length, swap)]
    return examples, np.array([row.label for row in rows] * len(orders))


def task_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Cross entropy, or the squared error of labels scaled to 0..1 (finetune/classification_tasks.py)."""
    if task.labels:
        return F.cross_entropy(logits, labels.long())
    return F.mse_loss(logits.squeeze(-1), (labels / task.highest).float())


# Evaluation and predictions


def row_lengths(examples: Sequence[Segments]) -> np.ndarray:
    return np.array([len(first) + len(second) for first, second in examples])


@torch.inference_mode()
def predict(job: Job, model: Classifier, rows: list[Row]) -> np.ndarray:
    """The head's outputs (N, outputs) for every row, in their order, from batches of similar length."""
    examples = encode_rows(rows, job.source.vocabulary, job.settings.max_length)
    order = np.argsort(row_lengths(examples), kind="stable")
    model.eval()
    found = []
    for numbers in np.split(order, range(4 * job.settings.batch_size, len(order), 4 * job.settings.batch_size)):
        batch = collate([examples[n] for n in numbers], job.source.vocabulary, job.settings.max_length).to(job.device)
        with job.precision.autocast():
            found.append(model(*batch).float().cpu().numpy())
    values = np.empty_like(np.concatenate(found))
    values[order] = np.concatenate(found)
    if not np.isfinite(values).all():
        raise InputError("the model's outputs are not finite numbers: it has diverged, lower --learning-rate")
    return values


def answers(task: Task, values: np.ndarray) -> np.ndarray:
    """Class numbers (N,), or real labels on the task's scale."""
    return values.argmax(-1) if task.labels else values[:, 0].astype(np.float64) * task.highest


def correlation(measure: Any, labels: np.ndarray, predicted: np.ndarray) -> float:
    """Of real labels; 0 where all predictions are the same and nothing is ordered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        value = float(measure(labels, predicted).statistic)
    return 0.0 if math.isnan(value) else value


METRICS = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef,
           "pearson": partial(correlation, scipy.stats.pearsonr), "spearman": partial(correlation, scipy.stats.spearmanr)}


def evaluate(job: Job, data: TaskData, model: Classifier, stem: Path | None = None) -> dict[str, float]:
    """The task's metrics over all its dev rows; with `stem`, labels and predictions are written to STEM[-SPLIT].tsv."""
    task, scores = data.task, {}
    for split, rows in data.dev.items():
        labels = np.array([row.label for row in rows])
        predicted = answers(task, predict(job, model, rows))
        for name in task.metrics:
            scores[f"{split}_{name}".lstrip("_")] = float(METRICS[name](labels, predicted))
        if stem:
            words = [task.labels[int(n)] for n in labels] if task.labels else labels
            write_tsv(stem.with_name(f"{stem.name}{split and '-' + split}.tsv"), "label\tprediction",
                      zip(words, answer_words(task, predicted), strict=True))
    return scores


def answer_words(task: Task, predicted: np.ndarray) -> list[str]:
    return [task.labels[n] for n in predicted] if task.labels else [repr(float(value)) for value in predicted]


def predict_tests(job: Job, data: TaskData, model: Classifier, folder: Path) -> None:
    """The official submission files: index and prediction, real ones clipped to the task's range."""
    for name, rows in data.tests.items():
        predicted = answers(data.task, predict(job, model, rows))
        if not data.task.labels:
            predicted = predicted.clip(0, data.task.highest)
        folder.mkdir(parents=True, exist_ok=True)
        write_tsv(folder / f"{name}.tsv", "index\tprediction",
                  zip((row.index for row in rows), answer_words(data.task, predicted), strict=True))
        tqdm.write(f"predictions: {folder / f'{name}.tsv'}")


def user_file(folder: Path, settings: Finetuning) -> Path:
    return folder / f"{Path(settings.predict_file).stem}-predictions.tsv"


def predict_lines(job: Job, data: TaskData, model: Classifier, rows: list[Row], path: Path) -> None:
    """A user's texts with their line's number, prediction and (of classes) its probability."""
    values = predict(job, model, rows)
    predicted = answers(data.task, values)
    shares = torch.tensor(values).softmax(-1).amax(-1).tolist() if data.task.labels else [math.nan] * len(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tsv(path, "line\tprediction\tprobability\ttext",
              ((row.index, word, "" if math.isnan(share) else f"{share:.4f}", "\t".join(row.texts))
               for row, word, share in zip(rows, answer_words(data.task, predicted), shares, strict=True)))
    tqdm.write(f"predictions: {path}")


def write_tsv(path: Path, header: str, rows: Any) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        print(header, file=file)
        for row in rows:
            print(*row, sep="\t", file=file)


def use_classifier(job: Job, data: TaskData, lines: list[Row] | None) -> None:
    """Dev scores and predictions of a model that is fine-tuned already."""
    if not (data.dev or data.tests or lines or job.settings.export):
        raise InputError(f"nothing to do for {job.source.name}: {data.task.name}'s dev.tsv is not below "
                         f"{job.settings.data_dir}; set --data-dir or name texts with --predict-file")
    if job.settings.export:
        export(job.source.classifier, data.task, Path(job.settings.export))
    model = job.source.classifier.network.to(job.device)
    if data.dev:
        print(f"{data.task.name}, dev: {scores_text(evaluate(job, data, model))}")
    predict_tests(job, data, model, job.output / "predictions")
    if lines:
        predict_lines(job, data, model, lines, user_file(job.output / "predictions", job.settings))


def export(found: Pretrained, task: Task, folder: Path) -> None:
    """A fine-tuned model for transformers, whose logits are its outputs, real ones on the task's scale."""
    labels = dict(enumerate(task.labels or [task.label]))
    weights = classifier_to_transformers(found.network, task.highest or 1.0)
    write_transformers(folder, found, found.config.discriminator(), weights, "ForSequenceClassification", id2label=labels,
                       label2id={label: number for number, label in labels.items()},
                       problem_type="single_label_classification" if task.labels else "regression",
                       classifier_dropout=0.0)  # its head's falls on the outputs too


# Statistics


def scores_text(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def statistics_text(data: TaskData, runs: list[dict[str, Any]]) -> str:
    """Median, mean, standard deviation (n - 1) and each run, in hundredths, a line for each metric."""
    lines = []
    for name in runs[0]["scores"]:
        values = [100 * run["scores"][name] for run in sorted(runs, key=lambda run: run["seed"])]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        lines.append(f"{data.task.name} {name}: median {statistics.median(values):.2f}, mean {statistics.mean(values):.2f}, "
                     f"std {spread}, n {len(values)} ({', '.join(f'{value:.2f}' for value in values)})")
    return "\n".join(lines)


def glue_table(settings: Finetuning, results: list[dict[str, Any]], keys: list[str]) -> str:
    """Medians over the seeds of each task's first metric beside the published dev scores, averaged over the same tasks."""
    columns = [key for key in DEV_TASKS if key in keys]
    rows = {}
    for name, published in PUBLISHED.items():
        rows[name] = [dict(zip(DEV_TASKS, published, strict=True))[key] for key in columns]
    ours = []
    for key in columns:
        runs = [run["scores"] for run in results if run["task"] == key and run["seed"] in seeds_of(settings)]
        ours.append(100 * statistics.median(next(iter(scores.values())) for scores in runs))
    rows[f"this model, median of {settings.seeds}"] = ours
    heads = [f"{TASKS[key].name} {TASKS[key].metrics[0]}" for key in columns]
    lines = ["| dev | " + " | ".join([*heads, "average"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, values in rows.items():
        mean = [statistics.mean(values)] if values else []
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in [*values, *mean]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
