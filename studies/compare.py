"""Runs on one held-out task, so that their scores can be compared: run folders in, a table out.

    python -m studies.compare runs/a runs/b --reference runs/a
    python -m studies.compare runs/search --reference runs/search/trials/0000-base-seed=0

A run's own scores are those of its own task: its discriminator detects the replacements of its own generator, which are the
easier to detect the worse the generator is, and its generator predicts as many tokens as the run masks. Here every network
gets the held-out text, the masks and the replacements of the reference run.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from dataset import Vocabulary
from model import NETWORK_FILES, Electra, SavedNetwork, load_network
from Pretraining import Pretraining, Run, evaluate, load_data
from studies.search import RESULTS, add_scores, read_lines
from tasks.results import markdown_table
from utils import Precision, pick_device, read_settings, reports_input_errors, require

COMPARED = {"generator": ["mlm_loss", "mlm_accuracy"], "discriminator": ["disc_auc"]}


@dataclass(frozen=True)
class Compare:
    """Evaluates the networks of several runs on the held-out text, the masks and the replacements of one run."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders. Of a search whose space has keep = "networks", the complete trials: results.jsonl gets their scores."""
    reference: str
    """Folder of the run whose config.toml says what the task is, and whose gen.pt makes the replacements."""


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


def open_reference(folder: Path) -> Run:
    """The reference run with its generator and its held-out text. It can be evaluated but not trained."""
    path = folder / "config.toml"
    require(path.is_file(), f"{path} is missing: --reference expects the folder of a pretraining run")
    settings = replace(read_settings(Pretraining, [], path), vocab=None)  # the network's file has the vocabulary
    saved = load_network(folder / NETWORK_FILES["generator"], ["generator"], "--reference")
    vocabulary, data = load_data(settings, None, {"generator": saved})
    device = pick_device("auto")
    electra = Electra(saved.config).to(device)
    electra.generator = saved.network.to(device)
    kept_prob = electra.kept_prob if settings.kept_prob is None else settings.kept_prob
    precision = Precision("fp32", torch.float32, device.type)
    return Run(settings, saved.config, folder, device, precision, vocabulary, data, electra, electra, None, None, kept_prob)


def common_scores(reference: Run, folder: Path) -> dict[str, float]:
    """Scores of a run's networks on the reference's task; none of a network that has another vocabulary."""
    scores = {}
    for kind, names in COMPARED.items():
        path = folder / NETWORK_FILES[kind]
        if not path.is_file():
            continue
        saved = load_network(path, [kind], "a comparison")
        if Vocabulary.of_network(saved, str(path)).to_json() != reference.vocabulary.to_json():
            tqdm.write(f"warning: {path} has another vocabulary than the reference and is not compared", file=sys.stderr)
            continue
        require(saved.config.max_positions >= reference.settings.max_length,
                f"{path} takes rows of {saved.config.max_positions} tokens at most, the reference has rows of "
                f"{reference.settings.max_length}: choose a reference with shorter rows")
        metrics = evaluate_with(reference, kind, saved)
        scores |= {f"common_{name}": metrics[name] for name in names}
    return scores


def evaluate_with(reference: Run, kind: str, saved: SavedNetwork) -> dict[str, float]:
    """The reference's evaluation with one of its networks replaced by another run's."""
    own = getattr(reference.electra, kind)
    setattr(reference.electra, kind, saved.network.to(reference.device))
    metrics, _ = evaluate(reference)
    setattr(reference.electra, kind, own)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
