"""Which part of the project imports which, and how long the files that a reader starts with are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ["Pretraining", "model", "dataset", "utils"]
SCRIPTS = [*CORE, "Finetuning", "LM_DEMO"]
PACKAGES = ["corpus", "tasks", "convert", "studies"]
LOCAL = {*SCRIPTS, *PACKAGES, "benchmarks"}
BELOW_PACKAGES = {"dataset", "model", "utils"}
ALLOWED = {"utils": set(), "dataset": {"utils"}, "model": {"utils"},
           **{part: BELOW_PACKAGES | {*PACKAGES} for part in PACKAGES},
           **{part: BELOW_PACKAGES | {*PACKAGES, "benchmarks"} for part in ("Pretraining", "Finetuning", "LM_DEMO")}}


def imported(path):
    """The parts of the project that a file imports, those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in for_types for node in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} & LOCAL


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_from_scripts_down_to_utils(part):
    """By import statements, no package or module imports a script, no script another, and dataset and model not each other.

    studies/space.py loads the script that a search runs by its name.
    """
    files = [ROOT / f"{part}.py"] if part in SCRIPTS else sorted((ROOT / part).glob("*.py"))
    assert files
    for file in files:
        assert imported(file) <= ALLOWED[part], file


def test_no_other_file_of_code_lies_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("names, limit", [(CORE, 2000), (SCRIPTS, 2900)])
def test_the_files_at_the_top_stay_short_enough_to_be_read(names, limit):
    assert sum(len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in names) < limit
