"""A pretrained discriminator and a GLUE task in; dev scores over seeds, test predictions and a classifier out.

    python Finetuning.py --task sst2                         # the newest run's disc.pt, data/glue/SST-2
    python Finetuning.py --task all --weights disc.pt --seeds 5 --predict
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset import Vocabulary, content_key
from model import Classifier, ModelConfig, SavedNetwork, load_network, save_network
from tasks.encoding import encode_texts, length_batches, training_examples
from tasks.glue import TASKS, Row, Task, TaskData, read_all_tasks, read_task, read_user_rows, task_key
from tasks.results import (RunResult, glue_table, median_score, read_results, require_same_settings, scores_text,
                           statistics_text, write_results, write_tsv)
from utils import (Adam, Precision, bounded, locked, newest_run_file, pick_device, pick_precision,
                   read_settings, reports_input_errors, require, scheduled_rate, skip_unless_finite)

ADAM_EPS = 1e-6  # google-research/electra, model/optimization.py
# Settings that choose runs, files or a device. Runs of one folder may differ in these and in no others.
NOT_COMPARED = {"task", "weights", "data_dir", "output", "epochs", "seed", "seeds", "predict", "predict_file",
                "save_model", "device"}


@dataclass(frozen=True)
class Finetuning:
    """Fine-tunes a pretrained discriminator on GLUE. The defaults are the paper's for ELECTRA-Small."""

    task: str
    """cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, ax (predicted by mnli's model), or all whose files exist."""
    weights: str | None = None
    """disc.pt, a run folder, or the folder or hub name of an ELECTRA in transformers' layout; or a model.pt that
    --save-model kept, which is evaluated and predicts without training. None: the newest run's disc.pt."""
    data_dir: str = "data/glue"
    """Folder of GLUE's official folders (SST-2/train.tsv ...). A task that isn't there is read from the hub."""
    output: str | None = None
    """Results folder; finished runs in it are not repeated. None: runs/NAME/glue, named after the weights' run, or the
    folder of a model.pt."""
    protocol: Literal["original", "robust"] = "original"
    """original: as the paper's code; robust: Adam with bias correction, and 20 epochs for small sets."""
    epochs: int | None = bounded(None, at_least=1)
    """Number of epochs. None: the protocol's for the task (original: 10 for rte and stsb, else 3)."""
    batch_size: int = bounded(32, at_least=1)
    """Examples of an optimizer step."""
    learning_rate: float = bounded(3e-4, above=0)
    """Highest learning rate of the head; linear warm-up times linear decay to 0."""
    warmup_share: float = bounded(0.1, at_least=0, at_most=1)
    """Share of the steps over which the learning rate grows."""
    layer_decay: float = bounded(0.8, above=0, at_most=1)
    """Factor on the learning rate from each layer to the one below."""
    layer_decay_exact: bool = False
    """Layer-wise decay by the paper's formula; its code has one power more for all below the head."""
    clip_norm: float = bounded(1.0, above=0)
    """Largest global norm of the gradient."""
    dropout: float = bounded(0.1, at_least=0, below=1)
    """In encoder and head."""
    max_length: int = bounded(128, at_least=5)
    """Most tokens of an example, special tokens included; pairs are cut longest first."""
    seed: int = bounded(0, at_least=0, below=1 << 32)
    """First seed: of the head's weights, the order of the examples and dropout."""
    seeds: int = bounded(1, at_least=1)
    """Number of seeds."""
    from_scratch: bool = False
    """Random weights of the same sizes, without layer-wise decay: what pretraining is compared with."""
    predict: bool = False
    """Write the official submission files, in a folder for each seed."""
    predict_file: str | None = None
    """Classify this text file too: one text a line, or a pair separated by a tab."""
    save_model: bool = False
    """Keep each fine-tuned model as a self-contained model.pt."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format under autocast; auto: bf16 where the hardware computes it, else fp16 on CUDA, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""


class Experiment(NamedTuple):
    """What all runs of one command share."""

    settings: Finetuning
    source: str  # file, folder or hub name of the weights
    saved: SavedNetwork  # a discriminator, or a classifier that is fine-tuned already
    vocabulary: Vocabulary
    output: Path
    device: torch.device
    precision: Precision
    user_rows: list[Row]  # of --predict-file


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Finetuning, argv)
    check(settings)
    key = task_key(settings.task)  # "" for all
    device = pick_device(settings.device)
    source, saved = read_weights(settings, key)
    vocabulary = Vocabulary.of_network(saved, source)
    output = Path(settings.output or default_output(source, saved.kind, settings.from_scratch))
    precision = pick_precision(settings.precision, device)
    user_rows = read_user_rows(settings.predict_file, TASKS[key]) if settings.predict_file else []
    experiment = Experiment(settings, source, saved, vocabulary, output, device, precision, user_rows)
    print(f"weights: {source}{', sizes and vocabulary only' if settings.from_scratch else ''}; results: {output}; "
          f"{device}, {precision.name}")
    data_dir = Path(settings.data_dir)
    with locked(output / ".lock", wait=False):
        if saved.kind == "classifier":
            apply_classifier(experiment, read_task(key, data_dir, training=False, predicting=settings.predict))
        elif key:
            finetune_task(experiment, read_task(key, data_dir, training=True, predicting=settings.predict))
        else:
            tasks = read_all_tasks(data_dir, settings.predict)
            medians = {data.key: median_score(finetune_task(experiment, data)) for data in tasks}
            print(glue_table(medians, f"this model, median of {settings.seeds}"))
    return 0


def check(settings: Finetuning) -> None:
    """InputError for a value or a combination that can't work."""
    is_all = settings.task.lower() == "all"
    require(is_all or task_key(settings.task) != "", f"--task {settings.task} is not one of {', '.join(TASKS)}, all")
    require(not (is_all and settings.predict_file), "--predict-file expects one --task, not all")


# Weights


def read_weights(settings: Finetuning, key: str) -> tuple[str, SavedNetwork]:
    """The weights to start from and their name; InputError unless they are whole and suit the task."""
    path = Path(settings.weights) if settings.weights else newest_run_file("disc.pt")
    if (path / "disc.pt").is_file():
        path = path / "disc.pt"
    if path.suffix != ".pt" and not path.is_file():
        from convert.from_transformers import read_encoder  # imported where it is used: it takes a second
        saved = read_encoder(str(path), "--weights")
    else:
        kinds = ["discriminator"] if settings.from_scratch or not key else ["discriminator", "classifier"]
        saved = load_network(path, kinds, "--weights")
    if saved.kind == "classifier":
        task = TASKS[key].trained_on or key
        require(saved.task == task, f"{path} was fine-tuned on {saved.task}: expected --task {saved.task}")
        outputs = saved.network.prediction.out_features
        require(outputs == TASKS[task].outputs, f"{path} has {outputs} outputs, {task} has {TASKS[task].outputs}")
    require(settings.max_length <= saved.config.max_positions,
            f"--max-length {settings.max_length} is beyond the {saved.config.max_positions} positions of {path}")
    return str(path), saved


def default_output(source: str, kind: str, from_scratch: bool) -> Path:
    """The folder of a model.pt; else runs/NAME/glue, where NAME is the weights' run folder or name on the hub."""
    path = Path(source)
    if kind == "classifier":
        return path.parent
    run = (path.parent if path.suffix == ".pt" else path).resolve().name
    return Path("runs") / run / ("glue-scratch" if from_scratch else "glue")


def weights_key(saved: SavedNetwork, vocabulary: Vocabulary) -> str:
    """A text that changes with any weight of the encoder and any piece of the vocabulary."""
    digest = hashlib.blake2b(vocabulary.to_json().encode(), digest_size=8)
    for weight in saved.network.encoder.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


# Runs


def finetune_task(experiment: Experiment, data: TaskData) -> list[RunResult]:
    """A run for each seed, except those in results.json that are complete; prints and returns all of them."""
    settings, path = experiment.settings, experiment.output / "results.json"
    if data.skipped:
        print(f"{data.task.name}: {data.skipped:,} malformed training rows skipped")
    results = read_results(path)
    compared = compared_settings(experiment, data)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed in seeds:
        run = results.get((data.key, seed))
        if run:
            require_same_settings(run, compared, experiment.output)
            if is_complete(experiment, data, seed):
                print(f"{data.task.name}, seed {seed}: finished before, {scores_text(run.scores)}")
                continue
        results[data.key, seed] = finetune(experiment, data, seed, compared)
        write_results(path, results.values())
    runs = [results[data.key, seed] for seed in seeds]
    print(statistics_text(data.task, runs))
    return runs


def compared_settings(experiment: Experiment, data: TaskData) -> dict[str, Any]:
    """All that a run's result depends on, besides task and seed."""
    settings, task = experiment.settings, data.task
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_COMPARED}
    epochs = settings.epochs or (task.robust_epochs if settings.protocol == "robust" else task.epochs)
    return values | {"epochs": epochs, "precision": experiment.precision.name,
                     "weights": weights_key(experiment.saved, experiment.vocabulary),
                     "data": content_key(data.train, data.dev)}


def is_complete(experiment: Experiment, data: TaskData, seed: int) -> bool:
    """Whether all files that the command asks for are there."""
    folder, submissions = run_folders(experiment.output, data.key, seed)
    files = [submissions / f"{name}.tsv" for name in data.tests]
    if experiment.user_rows:
        files.append(user_predictions(folder, experiment.settings))
    if experiment.settings.save_model:
        files.append(folder / "model.pt")
    return all(file.is_file() for file in files)


def run_folders(output: Path, key: str, seed: int) -> tuple[Path, Path]:
    """The folder of a run, and the folder for the submission files of all tasks with its seed."""
    return output / key / f"seed-{seed}", output / f"seed-{seed}"


def finetune(experiment: Experiment, data: TaskData, seed: int, compared: dict[str, Any]) -> RunResult:
    """One run: trains, evaluates, predicts, and keeps the model if --save-model."""
    start = time.perf_counter()
    folder, submissions = run_folders(experiment.output, data.key, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(experiment.saved.config, dropout=experiment.settings.dropout)
    classifier = new_classifier(experiment, config, data.task, seed)
    scores = train(experiment, data, classifier, compared["epochs"], seed, folder)
    write_predictions(experiment, data, classifier, submissions, folder)
    dev_rows = {split or "dev": len(rows) for split, rows in data.dev.items()}
    run = RunResult(data.key, seed, scores, compared, experiment.source, len(data.train), data.skipped, dev_rows,
                    str(experiment.device), round(time.perf_counter() - start, 1))
    if experiment.settings.save_model:
        report = (f"Fine-tuned on {data.task.name}; dev: {scores_text(scores)}.\n\n## The run\n\n```json\n"
                  f"{json.dumps(run._asdict(), indent=1)}\n```")
        tokenizer = experiment.vocabulary.to_json()
        save_network(folder / "model.pt", SavedNetwork("classifier", classifier, config, tokenizer, data.key, report))
    return run


def apply_classifier(experiment: Experiment, data: TaskData) -> None:
    """Dev scores and predictions of a model that is fine-tuned already."""
    require(bool(data.dev or data.tests or experiment.user_rows),
            f"nothing to do for {experiment.source}: {data.task.name}'s dev.tsv is not in "
            f"{experiment.settings.data_dir}; set --data-dir or name texts with --predict-file")
    classifier = experiment.saved.network.to(experiment.device)
    if data.dev:
        print(f"{data.task.name}, dev: {scores_text(evaluate(experiment, data, classifier))}")
    folder = experiment.output / "predictions"
    write_predictions(experiment, data, classifier, folder, folder)


# Training


def new_classifier(experiment: Experiment, config: ModelConfig, task: Task, seed: int) -> Classifier:
    """A random head on the pretrained encoder, or on a random one if --from-scratch."""
    torch.manual_seed(seed)
    classifier = Classifier(config, task.outputs)
    if not experiment.settings.from_scratch:
        classifier.encoder.load_state_dict(experiment.saved.network.encoder.state_dict())
    if experiment.device.type == "cpu" and experiment.precision.dtype == torch.bfloat16:
        from benchmarks.bf16_cpu_kernels import use_bf16_cpu_kernels  # nowhere else are they faster
        use_bf16_cpu_kernels(classifier)
    return classifier.to(experiment.device)


def layerwise_groups(classifier: Classifier, rate: float, decay: float, exact: bool) -> list[dict[str, Any]]:
    """Parameter groups with their highest learning rates, from the embeddings up to the head (paper, appendix B).

    The published formula is rate * decay^(layers + 1 - depth); the code has one power more for all below the head
    (google-research/electra issue 51, model/optimization.py).
    """
    groups = []
    parameters_by_depth = classifier.parameters_by_depth()
    head = len(parameters_by_depth) - 1
    for depth, parameters in enumerate(parameters_by_depth):
        power = head - depth if exact or depth == head else head - depth + 1
        groups.append({"params": parameters, "lr": rate * decay**power, "highest_rate": rate * decay**power})
    return groups


def new_optimizer(settings: Finetuning, classifier: Classifier) -> torch.optim.Optimizer:
    """The original's Adam, or the robust protocol's with bias correction."""
    decay = 1.0 if settings.from_scratch else settings.layer_decay  # it would all but freeze random lower layers
    groups = layerwise_groups(classifier, settings.learning_rate, decay, settings.layer_decay_exact)
    if settings.protocol == "robust":
        return torch.optim.AdamW(groups, eps=ADAM_EPS, weight_decay=0.0, fused=True)
    return Adam(groups, settings.learning_rate)


def train(experiment: Experiment, data: TaskData, classifier: Classifier, epochs: int, seed: int,
          folder: Path) -> dict[str, float]:
    """All epochs of one run, evaluated after each; the scores after the last, as the original reports them.

    `folder` gets metrics.jsonl and the last dev predictions. A step whose gradient is not finite changes nothing.
    """
    settings, task, device, precision = experiment.settings, data.task, experiment.device, experiment.precision
    examples, labels = training_examples(data.train, task, experiment.vocabulary, settings.max_length)
    optimizer, scaler = new_optimizer(settings, classifier), precision.scaler()
    total = epochs * math.ceil(len(examples) / settings.batch_size)
    warmup = int(total * settings.warmup_share)
    step, scores = 0, {}
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    with (open(folder / "metrics.jsonl", "w", encoding="utf-8") as log,
          tqdm(total=total, desc=f"{task.name}, seed {seed}", unit=" steps", mininterval=1) as bar):
        for epoch in range(epochs):
            classifier.train()
            loss_sum = torch.zeros((), device=device)  # as `skipped`, read at the epoch's end: the host needn't wait
            for numbers, batch in length_batches(examples, experiment.vocabulary, settings.max_length,
                                                 settings.batch_size, np.random.default_rng((seed, epoch))):
                # Forward and backward pass
                with precision.autocast():
                    logits = classifier(*batch.to(device))
                loss = task_loss(logits.float(), torch.tensor(labels[numbers], device=device), task)
                scaler.scale(loss).backward()
                # Clip the gradient and follow the schedule
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), settings.clip_norm)
                for group in optimizer.param_groups:
                    group["lr"] = scheduled_rate(step, group["highest_rate"], warmup, total)
                # The step, which the device leaves out if the gradient is not finite
                skip_unless_finite(optimizer, norm.isfinite())
                optimizer.step()
                scaler.update()
                optimizer.zero_grad()
                # Progress
                loss_sum += torch.where(loss.isfinite(), loss.detach(), 0.0) * len(numbers)
                skipped += ~norm.isfinite()
                step += 1
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
            if skipped:
                tqdm.write(f"warning: {int(skipped)} of {step} steps were skipped: their gradients were not finite")
            scores = evaluate(experiment, data, classifier, folder)
            record = {"epoch": epoch + 1, "step": step, "loss": loss_sum.item() / len(examples),
                      "learning_rate": optimizer.param_groups[-1]["lr"]}
            print(json.dumps(record | scores), file=log, flush=True)
            bar.set_postfix_str(scores_text(scores))
    require(skipped < step, "no step had a finite gradient: the model has diverged, lower --learning-rate")
    return scores


def task_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Cross entropy, or the squared error of labels scaled to 0..1 (finetune/classification_tasks.py)."""
    if task.labels:
        return F.cross_entropy(logits, labels.long())
    return F.mse_loss(logits.squeeze(-1), (labels / task.highest).float())


# Evaluation and predictions


@torch.inference_mode()
def predict(experiment: Experiment, classifier: Classifier, rows: list[Row]) -> np.ndarray:
    """The head's outputs (N, outputs) for every row, in their order; InputError if one is not finite."""
    settings, head = experiment.settings, classifier.prediction
    classifier.eval()
    examples = encode_texts([row.texts for row in rows], experiment.vocabulary, settings.max_length)
    outputs = np.empty((len(rows), head.out_features), np.float32)
    for numbers, batch in length_batches(examples, experiment.vocabulary, settings.max_length,
                                         4 * settings.batch_size, np.random.default_rng(0)):
        with experiment.precision.autocast():
            logits = classifier(*batch.to(head.weight.device))
        outputs[numbers] = logits.float().cpu().numpy()
    require(bool(np.isfinite(outputs).all()),
            "the model's outputs are not finite numbers: it has diverged, lower --learning-rate")
    return outputs


def predicted_labels(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Numbers of classes (N,), or real labels on the task's scale."""
    return outputs.argmax(-1) if task.labels else outputs[:, 0].astype(np.float64) * task.highest


def evaluate(experiment: Experiment, data: TaskData, classifier: Classifier,
             folder: Path | None = None) -> dict[str, float]:
    """The task's metrics over all dev rows; labels and predictions go into dev.tsv or dev-SPLIT.tsv of `folder`."""
    from tasks.metrics import METRICS  # imported where it is used: scikit-learn and scipy take two seconds
    task, scores = data.task, {}
    for split, rows in data.dev.items():
        labels = np.array([row.label for row in rows])
        predictions = predicted_labels(task, predict(experiment, classifier, rows))
        for name in task.metrics:
            scores[f"{split}_{name}" if split else name] = float(METRICS[name](labels, predictions))
        if folder:
            path = folder / (f"dev-{split}.tsv" if split else "dev.tsv")
            write_tsv(path, ["label", "prediction"], task.label_texts(labels), task.label_texts(predictions))
    return scores


def write_predictions(experiment: Experiment, data: TaskData, classifier: Classifier, submissions: Path,
                      folder: Path) -> None:
    """The official submission files into `submissions`, and predictions of the user's texts into `folder`."""
    task = data.task
    for name, rows in data.tests.items():
        labels = predicted_labels(task, predict(experiment, classifier, rows))
        if not task.labels:
            labels = labels.clip(0, task.highest)
        write_tsv(submissions / f"{name}.tsv", ["index", "prediction"], [row.index for row in rows],
                  task.label_texts(labels))
        tqdm.write(f"predictions: {submissions / f'{name}.tsv'}")
    if not experiment.user_rows:
        return
    outputs = predict(experiment, classifier, experiment.user_rows)
    probabilities = ["" for _ in outputs]  # a regression task has none
    if task.labels:
        probabilities = [f"{value:.4f}" for value in torch.tensor(outputs).softmax(-1).amax(-1).tolist()]
    path = user_predictions(folder, experiment.settings)
    names = ["text"] if len(task.texts) == 1 else ["text1", "text2"]
    texts = [list(column) for column in zip(*(row.texts for row in experiment.user_rows), strict=True)]
    write_tsv(path, ["line", "prediction", "probability", *names], [row.index for row in experiment.user_rows],
              task.label_texts(predicted_labels(task, outputs)), probabilities,
              *texts)
    tqdm.write(f"predictions: {path}")


def user_predictions(folder: Path, settings: Finetuning) -> Path:
    return folder / f"{Path(settings.predict_file).stem}-predictions.tsv"


if __name__ == "__main__":
    sys.exit(main())
