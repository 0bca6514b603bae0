"""studies/compare.py: networks of several runs on one held-out task."""

import dataclasses
import json
import re
import shutil
from typing import get_type_hints

import pytest

from conftest import metrics
from Pretraining import Pretraining
from Pretraining import main as pretrain
from studies.compare import TaskSettings, common_names, main

OWN = ["mlm_loss", "mlm_accuracy", "disc_auc"]


@pytest.fixture
def runs(tmp_path, command):
    """Two runs with different tasks: the second one masks more and has a smaller generator."""
    assert pretrain(command("first")) == 0
    assert pretrain(command("second", mask_prob=0.4, kept_prob=0.4, accumulate=2, model__generator_size=0.25, seed=1)) == 0
    return tmp_path / "first", tmp_path / "second"


@pytest.fixture
def compare(capsys):
    """Compares runs; returns the printed scores of each, as text."""
    def run(*folders, reference):
        capsys.readouterr()
        assert main([*map(str, folders), "--reference", str(reference)]) == 0
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                            for line in capsys.readouterr().out.splitlines()]
        assert header == ["run", *common_names()]
        return {row[0]: row[1:] for row in rows}
    return run


def last_evaluation(folder):
    """The last held-out metrics that the run itself wrote."""
    return [line for line in metrics(folder) if line["heldout"]][-1]


def test_the_references_scores_are_those_of_its_own_evaluation(runs, compare):
    for run in runs:
        own = last_evaluation(run)
        assert compare(run, reference=run) == {str(run): [f"{own[name]:.4f}" for name in OWN]}


def test_each_network_is_judged_alone_on_the_references_task(tmp_path, runs, compare):
    """A discriminator's score depends on its own weights and on the reference's generator, not on its own generator."""
    first, second = runs
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(first / "gen.pt", mixed)
    shutil.copy(second / "disc.pt", mixed)
    scores = compare(first, second, mixed, reference=first)
    assert scores[str(mixed)] == [*scores[str(first)][:2], scores[str(second)][2]]
    assert all(a != b for a, b in zip(scores[str(first)], scores[str(second)], strict=True))
    # On its own, easier or harder, task it has another score.
    assert scores[str(second)] != [f"{last_evaluation(second)[name]:.4f}" for name in OWN]


def test_trials_of_a_search_get_their_scores_into_its_results(tmp_path, runs, compare):
    study = tmp_path / "study"
    lines = []
    for number, run in enumerate(runs):
        name = f"000{number}-base-seed={number}"
        shutil.copytree(run, study / "trials" / name)
        lines.append({"trial": number, "state": "complete", "folder": name, "scores": {"mlm_loss": 9.0}})
    lines.append({"trial": 2, "state": "complete", "scores": {}})  # of an earlier version
    shutil.copytree(runs[0], study / "trials" / "0003-base-seed=3")  # has not ended
    (study / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = compare(study, reference=runs[0])
    assert len(printed) == 2
    written = [json.loads(line)["scores"] for line in (study / "results.jsonl").read_text().splitlines()]
    for scores, row in zip(written[:2], printed.values(), strict=True):
        assert scores.pop("mlm_loss") == 9.0
        assert [f"{scores[name]:.4f}" for name in common_names()] == row
    assert written[2] == {}


def test_the_settings_of_a_task_have_the_bounds_of_pretraining():
    bounds = {field.name: field.metadata for field in dataclasses.fields(Pretraining)}
    assert all(field.metadata == bounds[field.name] for field in dataclasses.fields(TaskSettings))
    types = get_type_hints(Pretraining)
    assert all(hint == types[name] for name, hint in get_type_hints(TaskSettings).items())


def test_networks_that_cannot_be_compared(tmp_path, runs, compare, command, capsys):
    assert pretrain(command("other", model__vocab_size=50, model__layers=1)) == 0
    scores = compare(tmp_path / "other", runs[0], reference=runs[0])
    assert scores[str(tmp_path / "other")] == ["", "", ""] and all(scores[str(runs[0])])
    assert pretrain(command("short", max_length=16, model__max_positions=16)) == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.toml").write_text("steps = ")
    outside = tmp_path / "outside"
    shutil.copytree(runs[0], outside)
    config = (runs[0] / "config.toml").read_text()
    (outside / "config.toml").write_text(re.sub(r"(?m)^batch_size = .*", "batch_size = 0", config))
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.toml").write_text("max_length = 24\n")
    for folder, reference, message in [(runs[0], damaged, "can't be read as TOML"),
                                       (runs[0], partial, "config.toml lacks corpus, cache, examples"),
                                       (runs[0], outside, "batch_size = 0 must be at least 1"),
                                       (tmp_path / "short", runs[0], "takes rows of 16 tokens at most"),
                                       (empty, runs[0], "holds no networks"),
                                       (runs[0], empty, "config.toml is missing")]:
        assert main([str(folder), "--reference", str(reference)]) == 2
        assert message in capsys.readouterr().err
