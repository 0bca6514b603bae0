"""Every command of the README and of studies/README.md: run here at a fraction of its steps, by CI, or a download."""

import bz2
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import story, write_pair

from dataset import SPECIAL_TOKENS
from model import ModelConfig, SavedNetwork, build_network, save_network
from Pretraining import Pretraining, check
from utils import read_settings, to_toml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES_TEXT = (ROOT / "studies" / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT + STUDIES_TEXT, re.DOTALL) for line in block.splitlines()]
COMMANDS = [command.strip() for line in LINES if not line.endswith("# download") for command in line.split("&&")]
BY_CI = {"pip install -r requirements.txt", "python -m pytest"}  # .ci/run
SHORT = "--steps 2 --batch-size 4 --eval-examples 8 --device cpu --model.layers 1".split()
SHORT_TRIALS = {"quickstart": "steps=2 batch_size=4 eval_examples=8 model.layers=1".split(), "finetuning": [],
                "bert_small_proxy": "steps=2 eval_examples=8 model.layers=1".split()}
ARTICLE = "The old dog sees a red cat, and the cat sees the dog."
DUMP = f"""<mediawiki><siteinfo/><page><title>Dogs</title><ns>0</ns><id>1</id>
<revision><text>{ARTICLE}</text></revision></page></mediawiki>"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path, monkeypatch, vocabulary, glue, cache):
    """A working folder with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("\n\n".join(story()), encoding="utf-8")
    Path("greek.txt").write_text("\n".join(f"Στην Αθήνα {n} ήλιοι λάμπουν." for n in range(300)), encoding="utf-8")
    Path("sents.txt").write_text("The old dog sees [MASK].\na red cat eats.\n", encoding="utf-8")
    Path("enwiki-latest-pages-articles-multistream.xml.bz2").write_bytes(bz2.compress(DUMP.encode()))
    Path("books").mkdir()
    Path("books/dogs.txt").write_text("CHAPTER I\n\nThe new dog sees no cat.\n", encoding="utf-8")
    config = ModelConfig(vocabulary.size, 8, 16, 1, 2, 32, max_positions=128)
    Path("runs/bert").mkdir(parents=True)
    save_network(Path("runs/bert/mlm.pt"),
                 SavedNetwork("mlm", build_network("mlm", config), config, vocabulary.to_json()))
    write_pair(Path("runs/short"), vocabulary, max_positions=128)  # of the first of two runs
    write_pair(Path("runs/quickstart"), vocabulary, max_positions=128)  # the newest run
    record = {"step": 2, "heldout": True, "mlm_loss": 9.0, "disc_auc": 0.5}
    Path("runs/quickstart/metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    study = Path("runs/search/quickstart")
    study.mkdir(parents=True)
    shutil.copy(ROOT / "studies" / "results" / "quickstart.jsonl", study / "results.jsonl")
    Path("data").mkdir()
    Path("data/glue").symlink_to(glue)
    Path("data/cache").symlink_to(cache)
    letters = [chr(n) for n in range(97, 123)]
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), "."]
    Path("vocab.txt").write_text("\n".join(pieces + [f"unused{n}" for n in range(30522 - len(pieces))]), encoding="utf-8")


def test_ci_runs_what_the_readme_promises():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in script and command in COMMANDS for command in BY_CI)


def run(words, text=""):
    """Runs a command of the README in the current folder, with this interpreter; `text` is its standard input."""
    program, *arguments = words
    if program == "torchrun":  # on two processes of this CPU
        assert arguments[0] == "--nproc-per-node"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = [*launcher, *arguments[2:]]
    else:
        assert program == "python"
    files = [str(ROOT / word) if word.endswith(".py") or word.startswith(("configs/", "studies/", "tasks/")) else word
             for word in arguments]
    return subprocess.run([sys.executable, *files], input=text, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def short_search(words):
    """One trial of a search, with few steps; its space is read as it is and checked in test_search.py."""
    space = Path(words[words.index("studies.search") + 1]).stem
    given = [word for word in words if "=" in word]
    others = [word for word in words if "=" not in word and word != "--set"]
    return [*others, "--trials", "1", "--threads", "1", "--set", *given, *SHORT_TRIALS[space]]


def is_done(script, words, output):
    """Whether a command did what the README says of it."""
    if "--help" in words:
        return "--corpus" in output
    if script == "corpus":
        return Path("corpus.txt").read_text(encoding="utf-8") == f"{ARTICLE}\n\nThe new dog sees no cat.\n\n"
    if script == "convert.to_transformers":
        return all(Path("exported", name, "model.safetensors").is_file() for name in ("generator", "discriminator"))
    if script == "studies.search":
        return "1 complete" in output and "best " in output
    if script == "studies.compare":
        return "common_disc_auc" in output and "| runs/short | " in output
    if script == "studies.report":
        return Path(output.strip()).is_file()
    if script == "studies.tracking":
        return Path("runs/quickstart/curves.png").is_file()
    return {"Pretraining.py": "Finetuning.py", "Finetuning.py": "median", "LM_DEMO.py": "original"}[script] in output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", [command for command in dict.fromkeys(COMMANDS) if command not in BY_CI])
def test_readme_command(command):
    words = shlex.split(command, comments=True)
    script = words[words.index("-m") + 1] if "-m" in words else next(word for word in words if word.endswith(".py"))
    if script == "corpus":
        Path("corpus.txt").unlink()
    if script == "studies.compare":  # of the reference; a new run of that name would be refused
        Path("runs/quickstart/config.toml").write_text(to_toml(Pretraining(corpus=("corpus.txt",), max_length=32)))
    if script == "Pretraining.py" and "--help" not in words:
        flags = [str(ROOT / word) if word.startswith("configs/") else word for word in words[words.index(script) + 1:]]
        check(read_settings(Pretraining, flags, ROOT / "configs" / "quickstart.toml"))  # before they are shortened
        words += SHORT
    if script == "studies.search":
        words = short_search(words)
    result = run(words, text="the old dog\n")
    assert result.returncode == 0, result.stderr
    assert is_done(script, words, result.stdout)


def test_pictures_are_there_and_small():
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", TEXT):
        assert (ROOT / name).stat().st_size < 100_000


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@|SPEED_", TEXT)


def test_every_file_the_readmes_name_is_there():
    for text, folder in ((TEXT, ROOT), (STUDIES_TEXT, ROOT / "studies")):
        names = re.findall(r"`(?:configs/)?(\w+\.(?:py|toml))`", text) + re.findall(r"\]\(([\w/]+\.md)\)", text)
        for name in names:
            assert any((place / name).exists() for place in (folder, ROOT, ROOT / "configs")), name


def test_the_tree_of_files_names_all_scripts_and_folders():
    tree = set(re.findall(r"^(\w+\.py|\w+/)  ", TEXT, re.MULTILINE))
    scripts = {path.name for path in ROOT.glob("*.py")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = {f"{path.split('/')[0]}/" for path in tracked if "/" in path and not path.startswith(".")}
    assert tree >= scripts and (not tracked or tree == scripts | folders)


def test_the_readme_is_short():
    assert len(TEXT.split()) <= 1600
