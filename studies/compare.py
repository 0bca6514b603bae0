"""Runs on one held-out task, so that their scores can be compared: run folders in, a table out.

    python -m studies.compare runs/a runs/b --reference runs/a
    python -m studies.compare runs/search --reference runs/search/trials/0000-base-seed=0

A run's own scores are those of its own task: its discriminator detects the replacements of its own generator, which are the
easier to detect the worse the generator is, and its generator predicts as many tokens as the run masks. Here every network
gets the held-out text, the masks and the replacements of the reference run.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from torch import nn
from tqdm import tqdm

from corpus import corpus_files
from dataset import Vocabulary, prepare
from model import NETWORK_FILES, Electra, load_network
from studies.heldout import HeldoutTask, evaluate, heldout_task
from studies.objectives import build_objective
from studies.search import RESULTS, add_scores, read_lines
from tasks.results import markdown_table
from utils import (InputError, bounded, check_bounds, from_table, pick_device, pick_precision, read_settings, read_toml,
                   reports_input_errors, require)

COMPARED = {"generator": ["mlm_loss", "mlm_accuracy"], "discriminator": ["disc_auc"]}


@dataclass(frozen=True)
class Compare:
    """Evaluates the networks of several runs on the held-out text, the masks and the replacements of one run."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders. Of a search whose space has keep = "networks", the complete trials: results.jsonl gets their scores."""
    reference: str
    """Folder of the run whose config.toml says what the task is, and whose gen.pt makes the replacements."""


@dataclass(frozen=True)
class TaskSettings:
    """The settings of a run that an evaluation on its held-out text needs, with the bounds of Pretraining.py."""

    corpus: tuple[str, ...]
    cache: str
    examples: Literal["packed", "line"]
    max_length: int = bounded(128, at_least=5)
    mask_prob: float = bounded(0.15, above=0, below=1)
    kept_prob: float | None = bounded(None, at_least=0, at_most=0.9)
    seed: int = bounded(0, at_least=0)
    eval_examples: int = bounded(2_000, at_least=1)
    batch_size: int = bounded(128, at_least=1)
    accumulate: int = bounded(1, at_least=1)


class Reference(NamedTuple):
    """The run whose task all networks get."""

    electra: Electra
    task: HeldoutTask


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Compare, argv)
    reference = open_reference(Path(settings.reference))
    rows = []
    for folder in map(Path, settings.runs):
        scores = {run: common_scores(reference, run) for run in tqdm(run_folders(folder), f"Comparing {folder}")}
        if (folder / RESULTS).is_file():
            add_scores(folder / RESULTS, {run.name: values for run, values in scores.items()})
        rows += [[str(run), *(f"{values[name]:.4f}" if name in values else "" for name in common_names())]
                 for run, values in scores.items()]
    print(markdown_table(["run", *common_names()], rows))
    return 0


def common_names() -> list[str]:
    """The names of all scores."""
    return [f"common_{name}" for names in COMPARED.values() for name in names]


def run_folders(folder: Path) -> list[Path]:
    """The folder itself, or those of a search's complete trials, where they hold a network; InputError if none does."""
    runs = [folder]
    if (folder / RESULTS).is_file():
        complete = [line for line in read_lines(folder / RESULTS) if line["state"] == "complete"]
        runs = [folder / "trials" / line["folder"] for line in complete if "folder" in line]  # earlier versions wrote none
    runs = [run for run in runs if any((run / NETWORK_FILES[kind]).is_file() for kind in COMPARED)]
    require(bool(runs), f"{folder} holds no networks: expected the folder of a run, with gen.pt or disc.pt, or that of a "
                        'search with complete trials, whose space has keep = "networks"')
    return runs


def open_reference(folder: Path) -> Reference:
    """The reference's generator, with a discriminator that is not trained, and its held-out task."""
    settings = task_settings(folder / "config.toml")
    saved = load_network(folder / NETWORK_FILES["generator"], ["generator"], "--reference")
    vocabulary = Vocabulary.of_network(saved, str(folder))
    cache = Path(settings.cache)
    data = prepare(corpus_files(settings.corpus, cache), vocabulary, settings.max_length, settings.examples, cache)
    electra = build_objective("electra", saved.config, temperature=1.0, kept_prob=settings.kept_prob)
    electra.generator = saved.network
    return Reference(electra.to(pick_device("auto")), heldout_task(data, vocabulary, settings))


def task_settings(config_file: Path) -> TaskSettings:
    """What a run's config.toml says about its task; InputError if it is no such file or a value is out of bounds."""
    require(config_file.is_file(), f"{config_file} is missing: --reference expects the folder of a pretraining run")
    table = read_toml(config_file, str(config_file))
    defaults = {field.name: field.default for field in fields(TaskSettings)}
    # A config.toml leaves out what is None.
    missing = [name for name, default in defaults.items() if name not in table and default is not None]
    require(not missing, f"{config_file} lacks {', '.join(missing)}: it was not written by this version of Pretraining.py; "
                         "choose another --reference")
    settings = from_table(TaskSettings, {name: table[name] for name in defaults if name in table}, str(config_file))
    check_bounds(settings)
    return settings


def common_scores(reference: Reference, folder: Path) -> dict[str, float]:
    """Scores of a run's networks on the reference's task; none of a network that has another vocabulary."""
    task = reference.task
    scores = {}
    for kind, names in COMPARED.items():
        path = folder / NETWORK_FILES[kind]
        if not path.is_file():
            continue
        saved = load_network(path, [kind], "a comparison")
        if Vocabulary.of_network(saved, str(path)).to_json() != task.vocabulary.to_json():
            tqdm.write(f"warning: {path} has another vocabulary than the reference and is not compared", file=sys.stderr)
            continue
        require(saved.config.max_positions >= task.max_length,
                f"{path} takes rows of {saved.config.max_positions} tokens at most, the reference has rows of "
                f"{task.max_length}: choose a reference with shorter rows")
        try:
            metrics = evaluate_with(reference, kind, saved.network)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        scores |= {f"common_{name}": metrics[name] for name in names}
    return scores


def evaluate_with(reference: Reference, kind: str, network: nn.Module) -> dict[str, float]:
    """The reference's evaluation with one of its networks replaced by another run's."""
    electra = reference.electra
    own, device = getattr(electra, kind), next(electra.parameters()).device
    setattr(electra, kind, network.to(device))
    # In fp32, whatever the runs were trained in. (A CPU and a GPU draw different masks from one seed.)
    metrics, _ = evaluate(electra, reference.task, pick_precision("fp32", device))
    setattr(electra, kind, own)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
