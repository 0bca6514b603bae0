"""Kills and damages short pretraining runs and compares what they end with to an undisturbed run; tries bad inputs.

    python benchmarks/fault_injection.py                                  # some minutes on two CPU cores
    python benchmarks/fault_injection.py --kills 1 --damages 1 --steps 8  # a short trial

Kills (SIGKILL at random moments), damaged checkpoints and a full disk must lose nothing: the resumed run must end with
the same weights, optimizer state and metrics, bit for bit. Bad inputs must end in one line on stderr and exit code 2.
Prints how many of each passed; the exit code is 1 if any didn't.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
SIZES = """--batch-size 6 --max-length 24 --warmup-steps 2 --log-every 5 --eval-every 50 --eval-examples 20
--save-every 2 --learning-rate 1e-3 --device cpu --precision fp32 --model.vocab-size 60 --model.embedding-size 8
--model.hidden-size 16 --model.layers 1 --model.heads 2 --model.feed-forward-size 32 --model.generator-size 0.5
--model.max-positions 32 --model.dropout 0.1""".split()
WORDS = "the a old new red green cat dog bird house tree river sees likes finds eats near under over and but".split()
LONGEST_WAIT = 0.8  # seconds of training before a kill

# Flags that can't work, and what the message has to name.
BAD_PRETRAINING = [
    ("--steps 0", "steps"), ("--batch-size 0", "batch_size"), ("--learning-rate 0", "learning_rate"),
    ("--learning-rate nan", "learning_rate"), ("--clip-norm -1", "clip_norm"), ("--mask-prob 1.5", "mask_prob"),
    ("--model.heads 3", "heads"), ("--model.generator-size 0.01", "generator"), ("--max-length 64", "max_positions"),
    ("--accumulate 9", "accumulate"), ("--steps many", "many"), ("--nonsense 3", "nonsense"),
    ("--corpus missing.txt", "missing.txt"), ("--corpus empty.txt", "empty.txt"), ("--corpus cut.gz", "cut.gz"),
    ("--corpus .", "directory"), ("--config missing.toml", "missing.toml"), ("--config bad.toml", "TOML"),
    ("--config unknown.toml", "stepps"), ("--config type.toml", "steps"), ("--vocab missing/name", "missing/name"),
    ("--vocab vocab.txt", "vocab.txt"), ("--output readonly", "readonly"), ("--workers -1", "workers"),
    ("--keep-checkpoints 0", "keep_checkpoints"), ("--max-bad-steps 0", "max_bad_steps"), ("--seed -1", "seed"),
    ("--output unbroken --seed 5", "seed = 0"), ("--output unbroken --no-resume", "--no-resume"),
]
BAD_DEMO = [
    ("--weights missing.pt", "missing.pt"), ("--weights junk.pt", "junk.pt"), ("--weights empty.pt", "empty.pt"),
    ("--weights unbroken/disc.pt", "discriminator"), ("--weights list.pt", "list.pt"),
    ("--weights unbroken/gen.pt --input missing.txt", "missing.txt"),
    ("--weights unbroken/gen.pt --input empty.txt", "empty.txt"),
]
BAD_FINETUNING = [
    ("--task nothing", "nothing"), ("--task rte", "maybe"), ("--task wnli", "header"), ("--task sst2", "train.tsv"),
    ("--task rte --weights junk.pt", "junk.pt"), ("--task rte --weights half.pt", "half.pt"),
    ("--task rte --weights huge.pt", "huge.pt"), ("--task rte --weights nan.pt", "finite"),
    ("--task rte --weights unbroken/gen.pt", "generator"), ("--task rte --seeds 0", "seeds"),
    ("--task rte --max-length 512", "positions"), ("--task rte --predict-file missing.txt", "missing.txt"),
    ("--task all --data-dir missing", "missing"),
]
BAD_GLUE_FILES = {
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\ta cat\ta dog\tmaybe\n",
    "WNLI": "a\tb\n1\t2\n",
    "SST-2": "",
}


class BadCommand(NamedTuple):
    script: str
    flags: list[str]
    message: str  # part of the line on stderr


class Trials:
    """A folder with a corpus, an undisturbed run `unbroken` and the runs that are compared with it."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        rng = random.Random(0)
        documents = []
        for _ in range(60):
            sentences = [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) + "." for _ in range(8)]
            documents.append("\n".join(sentences))
        (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
        result = self.pretrain("unbroken")
        assert result.returncode == 0, result.stderr
        self.expected = self.final_state("unbroken")

    def pretraining_flags(self, output: str) -> list[str]:
        return ["--corpus", str(self.folder / "corpus.txt"), "--cache", str(self.folder / "cache"),
                "--output", str(self.folder / output), "--steps", str(self.steps), *SIZES]

    def start(self, script: str, flags: list[str], limit: int | None = None) -> subprocess.Popen:
        """A script in the folder, without waiting for it; its files can't exceed `limit` bytes."""
        def limit_files() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True, cwd=self.folder,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=limit_files)

    def run(self, script: str, flags: list[str], limit: int | None = None) -> subprocess.CompletedProcess:
        process = self.start(script, flags, limit)
        _, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stderr=stderr)

    def pretrain(self, output: str, limit: int | None = None) -> subprocess.CompletedProcess:
        return self.run("Pretraining.py", self.pretraining_flags(output), limit)

    def final_state(self, output: str) -> list:
        """Last checkpoint, weights files and metrics of a finished run, without times."""
        folder = self.folder / output
        contents = [torch.load(folder / name, weights_only=True)
                    for name in (f"checkpoint-{self.steps}.pt", "gen.pt", "disc.pt")]
        contents[0]["means"].pop("seconds")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for record in records:
            record.pop("tokens_per_second", None)
        return [*contents, records]

    def is_unchanged(self, output: str) -> bool:
        """Whether a finished run ended exactly as the undisturbed one."""
        lost = lost_bytes(self.expected, self.final_state(output))
        if lost != 0:
            print(f"{output}: " + ("other values" if lost is None else f"{lost:,} bytes") + " differ")
        return lost == 0


def lost_bytes(expected: object, actual: object) -> int | None:
    """Number of bytes of tensors that differ; None if anything else differs."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor) or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            return None
        first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (expected, actual))
        return int((first != second).sum())
    if not isinstance(expected, dict | list | tuple):
        return 0 if actual == expected else None
    if type(actual) is not type(expected) or len(actual) != len(expected):
        return None
    if isinstance(expected, dict):
        if actual.keys() != expected.keys():
            return None
        pairs = [(value, actual[key]) for key, value in expected.items()]
    else:
        pairs = list(zip(expected, actual, strict=True))
    parts = [lost_bytes(*pair) for pair in pairs]
    return None if None in parts else sum(parts)


def survived_kills(trials: Trials, number: int) -> int:
    """Kills runs that save every second step at random moments; the next process resumes each.

    Returns the number of kills, or 0 if a resumed run failed or ended differently.
    """
    rng, kills = random.Random(1), 0
    folder = trials.folder / "killed"
    last_checkpoint = folder / f"checkpoint-{trials.steps}.pt"
    while kills < number:
        if last_checkpoint.exists():  # the run has finished in spite of the kills: compare it and begin another
            if not finishes_unchanged(trials, "killed"):
                return 0
            shutil.rmtree(folder)
        process = trials.start("Pretraining.py", trials.pretraining_flags("killed"))
        wait_for_training(process, folder / "metrics.jsonl")
        time.sleep(rng.uniform(0, LONGEST_WAIT))
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
        elif process.returncode != 0:
            print(stderr)
            return 0
    return kills if finishes_unchanged(trials, "killed") else 0


def wait_for_training(process: subprocess.Popen, metrics: Path) -> None:
    """Waits until the process writes metrics, because imports take most of its time, or has ended."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)


def finishes_unchanged(trials: Trials, output: str) -> bool:
    """Whether the run can be resumed to its end and then equals the undisturbed one."""
    result = trials.pretrain(output)
    if result.returncode != 0 or "Traceback" in result.stderr:
        print(f"{output}: exit code {result.returncode}, {result.stderr[-300:]}")
        return False
    return trials.is_unchanged(output)


def survived_damages(trials: Trials, number: int) -> int:
    """Cuts the newest checkpoint or changes bytes of it; counts the runs that end as if nothing had happened."""
    rng, survived = random.Random(2), 0
    folder = trials.folder / "damaged"
    for trial in range(number):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trials.folder / "unbroken", folder)
        newest = folder / f"checkpoint-{trials.steps}.pt"
        newest.write_bytes(damaged(newest.read_bytes(), trial % 3 == 0, rng))
        survived += finishes_unchanged(trials, "damaged")
    return survived


def damaged(content: bytes, cut: bool, rng: random.Random) -> bytes:
    """The content cut at a random place, or with up to 64 bytes changed."""
    if cut:
        return content[:rng.choice([0, rng.randrange(len(content))])]
    changed = bytearray(content)
    for place in rng.choices(range(len(changed)), k=rng.choice([1, 8, 64])):
        changed[place] ^= rng.randrange(1, 256)
    return bytes(changed)


def survives_full_disk(trials: Trials) -> bool:
    """With files limited to three quarters of a checkpoint: one message and exit code 2, then a run that can go on."""
    folder = trials.folder / "full"
    shutil.copytree(trials.folder / "unbroken", folder)
    newest = folder / f"checkpoint-{trials.steps}.pt"
    limit = newest.stat().st_size * 3 // 4
    newest.unlink()
    if not is_answered(trials.pretrain("full", limit), "can't be written"):
        return False
    return finishes_unchanged(trials, "full")


def is_answered(result: subprocess.CompletedProcess, message: str) -> bool:
    """Whether a command ended as user errors should."""
    return result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def bad_commands(trials: Trials) -> list[BadCommand]:
    """Commands with values, files or weights that can't work."""
    write_bad_files(trials.folder)
    training = trials.pretraining_flags("new")
    tuning = ["--weights", "unbroken/disc.pt", "--data-dir", "glue", "--max-length", "24", "--output", "tuned"]
    commands = []
    for script, begin, table in (("Pretraining.py", training, BAD_PRETRAINING), ("LM_DEMO.py", [], BAD_DEMO),
                                 ("Finetuning.py", tuning, BAD_FINETUNING)):
        commands += [BadCommand(script, [*begin, *flags.split()], message) for flags, message in table]
    if not torch.cuda.is_available():
        commands.append(BadCommand("Pretraining.py", [*training, "--device", "cuda"], "CUDA"))
    return commands


def write_bad_files(folder: Path) -> None:
    # Text, settings and a vocabulary
    (folder / "empty.txt").write_text("")
    (folder / "cut.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    (folder / "bad.toml").write_text("steps = = 3")
    (folder / "unknown.toml").write_text("stepps = 3")
    (folder / "type.toml").write_text('steps = "many"')
    (folder / "vocab.txt").write_text("one\ntwo\n")
    (folder / "readonly").write_text("a file in the place of a folder")
    # Weights
    (folder / "junk.pt").write_bytes(b"junk")
    (folder / "empty.pt").write_bytes(b"")
    torch.save([1], folder / "list.pt")
    weights_file = folder / "unbroken" / "disc.pt"
    (folder / "half.pt").write_bytes(weights_file.read_bytes()[:5000])
    content = torch.load(weights_file, weights_only=True)
    torch.save(content | {"model": content["model"] | {"hidden_size": 1 << 40}}, folder / "huge.pt")
    not_finite = {name: weight * torch.nan for name, weight in content["weights"].items()}
    torch.save(content | {"weights": not_finite}, folder / "nan.pt")
    # Tasks
    for name, text in BAD_GLUE_FILES.items():
        (folder / "glue" / name).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / "glue" / name / f"{split}.tsv").write_text(text)


def count_answered(trials: Trials, commands: list[BadCommand]) -> int:
    answered = 0
    for script, flags, message in commands:
        result = trials.run(script, flags)
        if is_answered(result, message):
            answered += 1
        else:
            print(f"{script} {' '.join(flags[-4:])}: exit code {result.returncode}, expected 2 and {message!r} in: "
                  f"{result.stderr[-300:]}")
    return answered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60, help="length of the runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trials = Trials(Path(name), arguments.steps)
        kills = survived_kills(trials, arguments.kills)
        print(f"kills survived: {kills} of {arguments.kills}", flush=True)
        damages = survived_damages(trials, arguments.damages)
        print(f"damages survived: {damages} of {arguments.damages}", flush=True)
        survives = survives_full_disk(trials)
        print(f"full disk: {'reported, nothing lost' if survives else 'FAILED'}", flush=True)
        commands = bad_commands(trials)
        answered = count_answered(trials, commands)
        print(f"bad inputs answered: {answered} of {len(commands)}")
    passed = survives and (kills, damages, answered) == (arguments.kills, arguments.damages, len(commands))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
