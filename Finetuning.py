"""A pretrained encoder and a task in; dev scores over seeds, predictions and a classifier out.

    python Finetuning.py --task sst2                         # the newest run's network, data/glue/SST-2
    python Finetuning.py --task reviews.toml --save-model    # your own task (tasks/README.md)
    python Finetuning.py --task all --weights runs/a runs/b --seeds 5
"""

import dataclasses
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
from model import CLASSIFIERS, NETWORK_FILES, Classifier, ModelConfig, SavedNetwork, load_network, save_network
from studies.tracking import MetricsLog
from tasks.data import Row, TaskData
from tasks.encoding import Examples, length_batches, training_examples
from tasks.glue import read_tasks, saved_task
from tasks.prediction import Predictor, UserFile, evaluate, read_user_file, write_predictions
from tasks.results import (RunResult, models_table, output_folders, read_results, require_same_settings, run_report,
                           scores_text, statistics_text, weights_key, write_held_out, write_results)
from tasks.task import Task
from utils import (Adam, InputError, Precision, bounded, load, locked, newest_run_file, pick_device, pick_precision,
                   read_settings, reports_input_errors, require, save, scheduled_rate, skip_unless_finite)

ADAM_EPS = 1e-6  # google-research/electra, model/optimization.py
ENCODERS = ["discriminator", "mlm"]  # kinds of networks to fine-tune; a run folder's first one is taken
LOG_STEPS = 20  # between lines of metrics.jsonl
CHECKPOINT = "checkpoint.pt"  # of an unfinished run
# Settings that choose runs, files or a device. Runs of one folder may differ in these and in no others.
NOT_COMPARED = {"task", "weights", "data_dir", "output", "epochs", "seed", "seeds", "predict", "predict_file",
                "probabilities", "save_model", "device"}


@dataclass(frozen=True)
class Finetuning:
    """Fine-tunes pretrained encoders on a task. The defaults are the paper's for ELECTRA-Small."""

    task: str | None = None
    """TOML file of a task of your own (tasks/README.md); or cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, ax
    (predicted by mnli's model), or all of these whose files exist. None: that of a model.pt."""
    weights: tuple[str, ...] = ()
    """disc.pt, mlm.pt, a run folder, or the folder or hub name of an ELECTRA in transformers' layout; several are compared.
    Or a model.pt that --save-model kept, which is evaluated and predicts without training. None: the newest run's."""
    data_dir: str = "data/glue"
    """Folder of GLUE's official folders (SST-2/train.tsv ...). A task that isn't there is read from the hub."""
    output: str | None = None
    """Results folder; finished runs in it are not repeated, unfinished ones go on. None: runs/NAME/glue or, for a task of
    your own, runs/NAME/tasks, named after the weights' run; or the folder of a model.pt."""
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
    max_length: int | None = bounded(None, at_least=5)
    """Most tokens of an example, special tokens included; pairs are cut longest first. None: the task's (128 unless its file
    says otherwise), or the model's positions if they are fewer; of a model.pt that of its training."""
    seed: int = bounded(0, at_least=0, below=1 << 32)
    """First seed: of the head's weights, the order of the examples and dropout."""
    seeds: int = bounded(1, at_least=1)
    """Number of seeds."""
    from_scratch: bool = False
    """Random weights of the same sizes, without layer-wise decay: what pretraining is compared with."""
    predict: bool = False
    """Predict the task's unlabelled files, in a folder for each seed; for GLUE the official submission files."""
    predict_file: str | None = None
    """Label the rows of this file too: .csv, .tsv, .jsonl or .parquet with the task's text columns, whose other columns are
    kept; or .txt with one text a line, or a pair separated by a tab."""
    probabilities: bool = False
    """Write the probability of every class beside each prediction."""
    save_model: bool = False
    """Keep each fine-tuned model as a self-contained model.pt."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format under autocast; auto: bf16 where the hardware computes it, else fp16 on CUDA, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is one."""


class Experiment(NamedTuple):
    """What all runs of one model share."""

    settings: Finetuning
    source: str  # file, folder or hub name of the weights
    saved: SavedNetwork  # a pretrained network, or a classifier that is fine-tuned already
    vocabulary: Vocabulary
    output: Path
    device: torch.device
    precision: Precision
    user_file: UserFile | None  # of --predict-file

    def max_length(self, task: Task) -> int:
        """Most tokens of an example."""
        return self.settings.max_length or min(task.max_length, self.saved.config.max_positions)

    def predictor(self, task: Task, classifier: Classifier) -> Predictor:
        """The classifier with all that its answers depend on."""
        return Predictor(classifier, task, self.vocabulary, self.precision, self.max_length(task),
                         4 * self.settings.batch_size, self.settings.probabilities)


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Finetuning, argv)
    networks = dict(read_weights(settings, source) for source in settings.weights or [newest_run_file("disc.pt", "mlm.pt")])
    check(settings, networks)
    source, saved = next(iter(networks.items()))
    trained = saved_task(saved.task, source) if saved.kind in CLASSIFIERS else None
    data = read_tasks(settings.task, Path(settings.data_dir), trained, settings.predict)
    user_file = read_user_file(Path(settings.predict_file), data[0].task) if settings.predict_file else None
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    for note in (note for task_data in data for note in task_data.notes):
        print(note)
    models = {}
    name = ("tasks" if str(settings.task).endswith(".toml") else "glue") + ("-scratch" if settings.from_scratch else "")
    outputs = output_folders(list(networks), settings.output, "" if trained else name)
    for (source, saved), output in zip(networks.items(), outputs, strict=True):
        vocabulary = Vocabulary.of_network(saved, source)
        experiment = Experiment(settings, source, saved, vocabulary, output, device, precision, user_file)
        print(f"weights: {source}{', sizes and vocabulary only' if settings.from_scratch else ''}; results: {output}; "
              f"{device}, {precision.name}")
        with locked(output / ".lock", wait=False):
            if trained:
                apply_classifier(experiment, data[0])
                return 0
            models[source] = {task_data.key: finetune_task(experiment, task_data) for task_data in data}
    if len(models) > 1 or len(data) > 1:
        print(models_table({f"{source}, median of {settings.seeds}": runs for source, runs in models.items()}))
    return 0


def check(settings: Finetuning, networks: dict[str, SavedNetwork]) -> None:
    """InputError for a combination that can't work."""
    is_all = settings.task is not None and settings.task.lower() == "all"
    is_trained = any(saved.kind in CLASSIFIERS for saved in networks.values())
    require(not (is_all and settings.predict_file), "--predict-file expects one --task, not all")
    require(settings.task is not None or is_trained,
            "--task is missing: name a TOML file, a task of GLUE or all, or a model.pt with --weights")
    require(not is_trained or (len(networks) == 1 and not is_all),
            "--weights names a model.pt, which is fine-tuned already: expected no other weights and one task or none")


# Weights


def read_weights(settings: Finetuning, source: str | Path) -> tuple[str, SavedNetwork]:
    """The weights to start from and their name; InputError unless they are whole."""
    path = Path(source)
    files = [path / NETWORK_FILES[kind] for kind in ENCODERS]
    path = next((file for file in files if file.is_file()), path)
    if path.suffix != ".pt" and not path.is_file():
        from convert.from_transformers import read_encoder  # imported where it is used: it takes a second
        saved = read_encoder(str(path), "--weights")
    else:
        saved = load_network(path, [*ENCODERS, *([] if settings.from_scratch else CLASSIFIERS)], "--weights")
    require((settings.max_length or 0) <= saved.config.max_positions,
            f"--max-length {settings.max_length} is beyond the {saved.config.max_positions} positions of {path}")
    return str(path), saved


# Runs


def finetune_task(experiment: Experiment, data: TaskData) -> list[RunResult]:
    """A run for each seed, except those in results.json that are complete; prints and returns all of them."""
    settings, output = experiment.settings, experiment.output
    results = read_results(output / "results.json")
    compared = compared_settings(experiment, data)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for run in (results[data.key, seed] for seed in seeds if (data.key, seed) in results):
        require_same_settings(f"{run.task}, seed {run.seed}", run.settings, compared, output)
    new_seeds = [seed for seed in seeds if (data.key, seed) not in results or not is_complete(experiment, data, seed)]
    if data.held_out:
        write_held_out(output / data.key / "held-out.tsv", data)
        print(f"{data.task.name}: the dev rows are a tenth of the training file, {output / data.key / 'held-out.tsv'}")
    examples = training_examples(data.train, data.task, experiment.vocabulary, compared["max_length"])
    if examples.cut:
        print(f"warning: {examples.cut:,} of {len(examples.segments):,} training examples are longer than "
              f"{compared['max_length']} tokens and are cut: see --max-length")
    steps = compared["epochs"] * math.ceil(len(examples.segments) / settings.batch_size)
    with tqdm(total=len(new_seeds) * steps, unit=" steps", mininterval=1, disable=not new_seeds) as bar:
        for seed in seeds:
            if seed not in new_seeds:
                tqdm.write(f"{data.task.name}, seed {seed}: finished before, {scores_text(results[data.key, seed].scores)}")
                continue
            results[data.key, seed] = finetune(experiment, data, examples, seed, compared, bar)
            write_results(output, list(results.values()))
            (run_folders(output, data.key, seed)[0] / CHECKPOINT).unlink(missing_ok=True)
    runs = [results[data.key, seed] for seed in seeds]
    print(statistics_text(data.task.name, runs))
    return runs


def compared_settings(experiment: Experiment, data: TaskData) -> dict[str, Any]:
    """All that a run's result depends on, besides task and seed."""
    settings, task = experiment.settings, data.task
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_COMPARED}
    epochs = settings.epochs or (task.robust_epochs if settings.protocol == "robust" else task.epochs)
    return values | {"epochs": epochs, "max_length": experiment.max_length(task), "metrics": list(task.metrics),
                     "precision": experiment.precision.name,
                     "weights": weights_key(experiment.saved, experiment.vocabulary),
                     "data": content_key(data.train, data.dev, data.test, task.classes, task.range)}


def is_complete(experiment: Experiment, data: TaskData, seed: int) -> bool:
    """Whether all files that the command asks for are there."""
    folder, submissions = run_folders(experiment.output, data.key, seed)
    files = [submissions / f"{name}.tsv" for name in data.unlabelled]
    files += [folder / experiment.user_file.target] if experiment.user_file else []
    files += [folder / "model.pt"] if experiment.settings.save_model else []
    return all(file.is_file() for file in files)


def run_folders(output: Path, key: str, seed: int) -> tuple[Path, Path]:
    """The folder of a run, and the folder for the predictions of all tasks' unlabelled files with its seed."""
    return output / key / f"seed-{seed}", output / f"seed-{seed}"


def finetune(experiment: Experiment, data: TaskData, examples: Examples, seed: int, compared: dict[str, Any],
             bar: tqdm) -> RunResult:
    """One run: trains, evaluates, predicts, and keeps the model if --save-model."""
    start = time.perf_counter()
    folder, submissions = run_folders(experiment.output, data.key, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(experiment.saved.config, dropout=experiment.settings.dropout)
    classifier = new_classifier(experiment, config, data.task, seed)
    predictor = experiment.predictor(data.task, classifier)
    run = Run(seed, folder, compared, examples, predictor, bar)
    scores = train(run, new_optimizer(experiment.settings, classifier), experiment.precision.scaler(), data.dev)
    test_scores = evaluate(predictor, {"test": data.test}, folder) if data.test else {}
    write_predictions(predictor, data.unlabelled, submissions, experiment.user_file, folder)
    dev_rows = {split or "dev": len(rows) for split, rows in data.dev.items()}
    result = RunResult(data.key, seed, scores, test_scores, compared, experiment.source, len(data.train), data.skipped,
                       dev_rows, str(experiment.device), round(time.perf_counter() - start, 1))
    if experiment.settings.save_model:
        task, tokenizer = dataclasses.replace(data.task, max_length=compared["max_length"]), experiment.vocabulary.to_json()
        save_network(folder / "model.pt", SavedNetwork(task.network, classifier, config, tokenizer, task.to_json(),
                                                       run_report(task, result)))
    return result


def apply_classifier(experiment: Experiment, data: TaskData) -> None:
    """Scores and predictions of a model that is fine-tuned already."""
    require(bool(data.dev or data.test or data.unlabelled or experiment.user_file),
            f"nothing to do for {experiment.source}: {data.task.name}'s labelled files are not there; set --task and "
            "--data-dir or name texts with --predict-file")
    predictor = experiment.predictor(data.task, experiment.saved.network.to(experiment.device))
    folder = experiment.output / "predictions"
    splits = data.dev | ({"test": data.test} if data.test else {})
    if splits:
        print(f"{data.task.name}: {scores_text(evaluate(predictor, splits))}")
    write_predictions(predictor, data.unlabelled, folder, experiment.user_file, folder)


# Training


def new_classifier(experiment: Experiment, config: ModelConfig, task: Task, seed: int) -> Classifier:
    """A random head on the pretrained encoder, or on a random one if --from-scratch."""
    torch.manual_seed(seed)
    classifier = Classifier(config, task.outputs, every_token=task.kind == "tokens")
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


class Run(NamedTuple):
    """What the epochs of one seed share."""

    seed: int
    folder: Path
    compared: dict[str, Any]  # settings on which the result depends
    examples: Examples
    predictor: Predictor  # with the classifier that is trained
    bar: tqdm  # of the steps of all seeds

    def epoch_steps(self) -> int:
        return math.ceil(len(self.examples.segments) / self.compared["batch_size"])


def train(run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
          dev: dict[str, list[Row]]) -> dict[str, float]:
    """The epochs that are not done yet, each evaluated; the scores after the last, as the original reports them.

    The run's folder gets metrics.jsonl, TensorBoard events, the last answers to the dev rows, and after each epoch all
    that resuming needs. The random state isn't saved: seed and epoch determine it.
    """
    classifier, name = run.predictor.classifier, f"{run.predictor.task.name}, seed {run.seed}"
    begin, skipped, scores = 0, 0, {}
    checkpoint = read_checkpoint(run.folder / CHECKPOINT, run.compared)
    if checkpoint:
        begin, skipped, scores = (checkpoint[name] for name in ("epochs", "skipped", "scores"))
        for part, key in ((classifier, "weights"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(checkpoint[key])
        tqdm.write(f"{name}: goes on after epoch {begin}")
    log = MetricsLog(run.folder, begin * run.epoch_steps())
    run.bar.update(begin * run.epoch_steps())
    for epoch in range(begin, run.compared["epochs"]):
        run.bar.set_description(f"{name}, epoch {epoch + 1} of {run.compared['epochs']}")
        skipped += train_epoch(run, optimizer, scaler, epoch, log)
        step = (epoch + 1) * run.epoch_steps()
        if skipped:
            tqdm.write(f"warning: {skipped} of {step} steps were skipped: their gradients were not finite")
        require(skipped < step, "no step had a finite gradient: the model has diverged, lower --learning-rate")
        scores = evaluate(run.predictor, dev, run.folder)
        log.write(step, True, scores)
        run.bar.set_postfix_str(scores_text(scores))
        save(run.folder / CHECKPOINT,
             {"epochs": epoch + 1, "skipped": skipped, "scores": scores, "settings": json.dumps(run.compared),
              "weights": classifier.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
    log.events.close()
    return scores


def read_checkpoint(path: Path, compared: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted run saved after its last whole epoch, {} if there is nothing; InputError for other settings."""
    if not path.exists():
        return {}
    try:
        checkpoint = load(path)
    except InputError as error:
        raise InputError(f"{error}: delete it to begin this run again") from None
    require_same_settings("an unfinished run", json.loads(checkpoint["settings"]), compared, path.parent)
    return checkpoint


def train_epoch(run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, epoch: int,
                log: MetricsLog) -> int:
    """One epoch; how many of its steps were skipped. Such a step, without a finite gradient, changes nothing."""
    classifier, task, vocabulary, precision, max_length, *_ = run.predictor
    examples, device = run.examples, classifier.prediction.weight.device
    first_step, total = epoch * run.epoch_steps(), run.compared["epochs"] * run.epoch_steps()
    warmup = int(total * run.compared["warmup_share"])
    batches = length_batches(examples.segments, vocabulary, max_length, run.compared["batch_size"],
                             np.random.default_rng((run.seed, epoch)))
    torch.manual_seed(int(np.random.default_rng((run.seed, epoch, 1)).integers(1 << 62)))  # of dropout
    classifier.train()
    sums, made = torch.zeros(2, device=device), 0  # loss and number of steps made since the last line of metrics
    for step, (numbers, batch) in enumerate(batches, first_step):
        # Forward and backward pass
        with precision.autocast():
            outputs = classifier(*batch.to(device))
        logits = examples.answers(numbers, outputs).float()
        labels = np.concatenate([examples.labels[number] for number in numbers])
        loss = task_loss(logits, torch.tensor(labels, device=device), task)
        scaler.scale(loss).backward()
        # Clip the gradient and follow the schedule
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), run.compared["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, group["highest_rate"], warmup, total)
        # The step, which the device leaves out if the gradient is not finite
        skip_unless_finite(optimizer, norm.isfinite())
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        # Progress
        sums += torch.stack([torch.where(norm.isfinite(), loss.detach(), 0.0), norm.isfinite()])
        run.bar.update()
        done = step + 1
        if done % LOG_STEPS == 0 or done == first_step + run.epoch_steps():
            loss_sum, steps_made = sums.tolist()
            made += int(steps_made)
            sums.zero_()
            rate = optimizer.param_groups[-1]["lr"]
            log.write(done, False, {"loss": loss_sum / max(1, steps_made), "learning_rate": rate})
    return run.epoch_steps() - made


def task_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Cross entropy, or the squared error of labels scaled to 0..1 (finetune/classification_tasks.py)."""
    if task.classes:
        return F.cross_entropy(logits, labels.long())
    factor, offset = task.scale
    return F.mse_loss(logits.squeeze(-1), ((labels - offset) / factor).float())


if __name__ == "__main__":
    sys.exit(main())
