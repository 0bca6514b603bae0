"""Every command of the README: run here at a fraction of its steps, by CI, or marked as a download or for CUDA."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import story, write_pair

from dataset import SPECIAL
from Pretraining import Pretraining, check
from utils import read_settings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
COMMANDS = [command.strip() for line in LINES if not line.endswith("# download") for command in line.split("&&")]
BY_CI = {"pip install -r requirements.txt", "python -m pytest"}  # .ci/run
SHORT = "--steps 2 --batch-size 4 --eval-examples 8 --device cpu --model.layers 1".split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path, monkeypatch, vocabulary, glue, cache):
    """A working folder with the files the commands name."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("\n\n".join(story()), encoding="utf-8")
    Path("greek.txt").write_text("\n".join(f"Στην Αθήνα {n} ήλιοι λάμπουν." for n in range(300)), encoding="utf-8")
    Path("sents.txt").write_text("The old dog sees [MASK].\na red cat eats.\n", encoding="utf-8")
    Path("pairs.txt").write_text("the old dog\ta red cat\n", encoding="utf-8")
    article = "The old dog sees a red cat, and the cat sees the dog."
    for name, text in (("wiki/AA/wiki_00", f'<doc id="1" title="Dogs">\nDogs\n\n{article}\n</doc>\n'),
                       ("books/dogs.txt", "CHAPTER I\n\nThe new dog sees no cat.\n")):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text, encoding="utf-8")
    write_pair(Path("runs/quickstart"), vocabulary, max_positions=128)
    Path("data").mkdir()
    Path("data/glue").symlink_to(glue)
    Path("data/cache").symlink_to(cache)
    letters = [chr(n) for n in range(97, 123)]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "."]
    Path("vocab.txt").write_text("\n".join(pieces + [f"unused{n}" for n in range(30522 - len(pieces))]), encoding="utf-8")
    return tmp_path


def test_ci_runs_what_the_readme_promises():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in script and command in COMMANDS for command in BY_CI)


def run(words, **more):
    """A command of the README, with the project's script and this interpreter."""
    launcher = []
    if words[0] == "torchrun":  # on two processes of this CPU
        launcher, words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["", *words[3:]]
    return subprocess.run([sys.executable, *launcher, str(ROOT / words[1]), *words[2:]], capture_output=True, text=True,
                          **more)


@pytest.mark.parametrize("command", [command for command in dict.fromkeys(COMMANDS) if command not in BY_CI])
def test_readme_command(command, folder):
    words = shlex.split(command, comments=True)
    if words[:2] == ["python", "dataset.py"]:
        Path("corpus.txt").unlink()
        result = run(words)
        assert result.returncode == 0, result.stderr
        assert "--help" in words or Path("corpus.txt").read_text().count("\n\n") == 2
        return
    if words[:2] == ["python", "LM_DEMO.py"]:
        result = run(words, input="the old dog\n")
        assert result.returncode == 0, result.stderr
        assert "--help" in words or "generated" in result.stdout
        return
    if words[:2] == ["python", "Finetuning.py"]:
        if "model.pt" in command:
            run("python Finetuning.py --task mrpc --save-model".split())
        result = run(words)
        assert result.returncode == 0, result.stderr
        assert "--help" in words or "median" in result.stdout or "predictions: " in result.stdout
        return
    start = 2 if words[0] == "python" else 4
    assert words[start - 1] == "Pretraining.py", "no test runs this command"
    flags = [str(ROOT / word) if word.startswith("configs/") else word for word in words[start:]]
    if "--help" not in flags:
        check(read_settings(Pretraining, flags, ROOT / "configs" / "quickstart.toml"))
    if "--init-from" in flags:
        run(["python", "Pretraining.py", "--export", "exported", *SHORT])
    result = run([*words[:start], *flags, *SHORT])
    assert result.returncode == 0, result.stderr
    assert "--help" in flags or "Finetuning.py" in result.stdout


def test_pictures_are_there_and_small():
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", TEXT):
        assert (ROOT / name).stat().st_size < 100_000


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", TEXT)


def test_every_file_the_readme_names_is_there():
    for name in re.findall(r"`(?:configs/)?(\w+\.(?:py|toml))`", TEXT):
        assert name == "config.toml" or (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name
