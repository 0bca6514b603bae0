"""Kills, damages and misuses short runs: nothing may be lost, and every mistake must end in one line.

    python benchmarks/fault_injection.py                                # 200 kills, 100 damaged files, 130 bad inputs
    python benchmarks/fault_injection.py --parts workers --kills 50     # one part of it
    python benchmarks/fault_injection.py --parts pretraining damages inputs --kills 2 --damages 6 --inputs 20 --steps 8

pretraining, workers, torchrun, finetuning
            a pretraining run, the same with two worker processes, the same as two processes under torchrun, and a
            fine-tuning run, each killed (SIGKILL to all its processes at a random moment) and started again until it
            ends: with the same files, bit for bit, as an undisturbed one. --kills are shared out among these parts.
damages     checkpoints, weights files, config.toml and metrics.jsonl, cut or with bytes changed: a resumed run must end
            like the undisturbed one; what can't be read must be refused
disk        a full disk while a checkpoint is written
inputs      bad flags, files, folders and weights: one line on stderr and exit code 2

Each trial is a process forked from this one, which has imported everything, so most take a fraction of a second; only
torchrun starts Python anew. Prints a line as each part ends; the exit code is 1 if a trial failed.
"""

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process that has threads can't be forked safely

import torch
from tqdm import tqdm

sys.path.pop(0)  # this folder: its names are those of other packages too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Finetuning import Finetuning
from LM_DEMO import Demo
from Pretraining import Pretraining
from utils import load

ROOT = Path(__file__).resolve().parent.parent
SIZES = """--batch-size 6 --max-length 24 --warmup-steps 2 --log-every 5 --eval-every 50 --eval-examples 20
--save-every 2 --learning-rate 1e-3 --device cpu --precision fp32 --model.vocab-size 60 --model.embedding-size 8
--model.hidden-size 16 --model.layers 1 --model.heads 2 --model.feed-forward-size 32 --model.generator-size 0.5
--model.max-positions 32 --model.dropout 0.1""".split()
TUNING = "--task rte --epochs 6 --batch-size 8 --max-length 24 --save-model --device cpu --precision fp32".split()
WORDS = "the a old new red green cat dog bird house tree river sees likes finds eats near under over and but".split()
KILLED = ("pretraining", "workers", "torchrun", "finetuning")
SCRIPTS = ("Pretraining", "Finetuning", "LM_DEMO", "corpus.__main__", "convert.to_transformers",
           "convert.from_transformers", "studies.tracking")
IMPORTED_LATE = ("matplotlib.figure", "scipy.stats", "sklearn.metrics", "torch.utils.tensorboard")  # by the scripts
Process = multiprocessing.get_context("fork").Process

# Flags that can't work beside those out of bounds, and what the message has to name.
BAD_PRETRAINING = [
    ("--learning-rate nan", "learning_rate"), ("--clip-norm inf", "clip_norm"), ("--max-minutes nan", "max_minutes"),
    ("--model.heads 3", "heads"), ("--model.generator-size 0.01", "generator"), ("--max-length 64", "max_positions"),
    ("--accumulate 9", "accumulate"), ("--batch-size 100000", "too little text"), ("--steps many", "many"),
    ("--nonsense 3", "nonsense"), ("--precision fp8", "fp8"), ("--case lower", "lower"), ("--objective gan", "gan"),
    ("--corpus missing.txt", "missing.txt"), ("--corpus empty.txt", "empty.txt"), ("--corpus cut.gz", "cut.gz"),
    ("--corpus short.txt", "too little text"), ("--corpus binary.txt", "binary"), ("--corpus latin.txt", "UTF-8"),
    ("--corpus .", "directory"), ("--config missing.toml", "missing.toml"), ("--config bad.toml", "TOML"),
    ("--config unknown.toml", "stepps"), ("--config type.toml", "steps"), ("--config .", "can't be read"),
    ("--vocab missing/name", "missing/name"), ("--vocab vocab.txt", "vocab.txt"), ("--output readonly", "readonly"),
    ("--output readonly/below", "readonly"), ("--init-from missing/name", "missing/name"),
    ("--init-from badpair", "disc.pt"), ("--output unbroken --seed 5", "seed = 0"),
    ("--output unbroken --model.layers 2", "layers"), ("--output unbroken --steps 7", "steps"),
    ("--output unbroken --no-resume", "--no-resume"),
]
BAD_DEMO = [
    ("--weights missing.pt", "missing.pt"), ("--weights junk.pt", "junk.pt"), ("--weights empty.pt", "empty.pt"),
    ("--weights unbroken/disc.pt", "discriminator"), ("--weights list.pt", "list.pt"), ("--weights half.pt", "half.pt"),
    ("--weights unbroken/gen.pt --input missing.txt", "missing.txt"),
    ("--weights unbroken/gen.pt --input empty.txt", "empty.txt"),
    ("--weights unbroken/gen.pt --input corpus.txt --discriminator junk.pt", "junk.pt"),
    ("--weights unbroken/gen.pt --input corpus.txt --html missing/page.html", "missing"),
]
BAD_FINETUNING = [
    ("--task nothing", "nothing"), ("--task rte", "maybe"), ("--task wnli", "header"), ("--task sst2", "train.tsv"),
    ("--task rte --weights junk.pt", "junk.pt"), ("--task rte --weights half.pt", "half.pt"),
    ("--task rte --weights huge.pt", "huge.pt"), ("--task rte --weights nan.pt", "finite"),
    ("--task rte --weights list.pt", "list.pt"), ("--task rte --weights unbroken/gen.pt", "generator"),
    ("--task rte --max-length 512", "positions"), ("--task rte --predict-file missing.txt", "missing.txt"),
    ("--task all --data-dir missing", "missing"), ("--task all --predict-file corpus.txt", "predict-file"),
]
BAD_CONVERSION = [
    ("corpus.__main__", "--output new.txt", "--wiki"), ("corpus.__main__", "--output new.txt --books missing", "missing"),
    ("corpus.__main__", "--output corpus.txt --books corpus.txt", "already exists"),
    ("corpus.__main__", "--output new.txt --books empty.txt --processes 1", "empty.txt"),
    ("corpus.__main__", "--output readonly/new.txt --books corpus.txt", "readonly"),
    ("convert.to_transformers", "missing.pt new", "missing.pt"), ("convert.to_transformers", "junk.pt new", "junk.pt"),
    ("convert.to_transformers", "nan.pt new", "finite"), ("convert.to_transformers", "huge.pt new", "huge.pt"),
    ("convert.to_transformers", "glue new", "glue"), ("convert.from_transformers", "unbroken unbroken", "not empty"),
    ("convert.from_transformers", "badfolder new", "badfolder"), ("studies.tracking", "missing", "metrics.jsonl"),
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


class Result(NamedTuple):
    code: int  # negative: the signal that ended it
    stderr: str


# Running scripts


class Trials:
    """A folder with a corpus, a task, undisturbed runs of each kind and the runs that are compared with them."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.stderr = folder / "stderr.txt"
        rng = random.Random(0)

        def sentence() -> str:
            return " ".join(rng.choices(WORDS, k=rng.randint(3, 14))) + "."
        documents = ["\n".join(sentence() for _ in range(8)) for _ in range(60)]
        (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
        (folder / "sents.txt").write_text(documents[0], encoding="utf-8")
        (folder / "tasks" / "RTE").mkdir(parents=True)
        for split, rows in (("train", 80), ("dev", 20)):
            lines = [f"{n}\t{sentence()}\t{sentence()}\t{rng.choice(['', 'not_'])}entailment" for n in range(rows)]
            header = "index\tsentence1\tsentence2\tlabel"
            (folder / "tasks" / "RTE" / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        self.expected, self.seconds = {}, {}
        self.run_undisturbed("pretraining", "unbroken")

    def run_undisturbed(self, part: str, output: str) -> None:
        """The run that those of a part are compared with."""
        began = time.monotonic()
        result = wait(self.start_part(part, output), self.stderr)
        assert result.code == 0, result.stderr
        self.seconds[part] = time.monotonic() - began
        self.expected[part] = self.state(part, output)

    def flags(self, output: str) -> list[str]:
        return ["--corpus", str(self.folder / "corpus.txt"), "--cache", str(self.folder / "cache"),
                "--output", str(self.folder / output), "--steps", str(self.steps), *SIZES]

    def start_part(self, part: str, output: str) -> Process:
        """The run of a part, new or resumed, without waiting for it."""
        if part == "finetuning":
            return self.start("Finetuning", [*TUNING, "--weights", str(self.folder / "unbroken" / "disc.pt"), "--data-dir",
                                             str(self.folder / "tasks"), "--output", str(self.folder / output)])
        if part == "torchrun":
            return self.start("torchrun", self.flags(output))
        workers = ["--workers", "2"] if part == "workers" else []
        return self.start("Pretraining", [*self.flags(output), *workers])

    def start(self, script: str, flags: list[str], limit: int | None = None) -> Process:
        """A script in a process forked from this one, without waiting for it; its files can't exceed `limit` bytes."""
        process = Process(target=run_script, args=(script, flags, self.folder, self.stderr, limit))
        process.start()
        return process

    def run(self, script: str, flags: list[str], limit: int | None = None) -> Result:
        return wait(self.start(script, flags, limit), self.stderr)

    def state(self, part: str, output: str) -> list[Any]:
        """All that a finished run has written but for times."""
        folder = self.folder / output
        if part == "finetuning":
            return finetuning_state(folder)
        contents = [load(folder / name) for name in (f"checkpoint-{self.steps}.pt", "gen.pt", "disc.pt")]
        contents[0]["means"].pop("seconds")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for record in records:
            record.pop("tokens_per_second", None)
        return [*contents, records]

    def ends_unchanged(self, part: str, output: str) -> bool:
        """Whether a run can be resumed to its end and has then written what the undisturbed one has."""
        result = wait(self.start_part(part, output), self.stderr)
        if result.code != 0 or "Traceback" in result.stderr:
            print(f"{part}: exit code {result.code}, {result.stderr[-300:]}")
            return False
        lost = lost_bytes(self.expected[part], self.state(part, output))
        if lost != 0:
            print(f"{part}: " + ("other values" if lost is None else f"{lost:,} bytes") + " differ")
        return lost == 0


def run_script(script: str, flags: list[str], folder: Path, stderr: Path, limit: int | None) -> None:
    """Turns this process into one that a terminal has started with the script, and ends it with the script's exit code."""
    os.setsid()
    os.chdir(folder)
    for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, os.devnull, os.O_WRONLY),
                               (2, stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, mode, 0o600), stream)
    sys.stdin = open(0)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if script == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        os.execv(sys.executable, [sys.executable, *torchrun, str(ROOT / "Pretraining.py"), *flags])
    sys.exit(importlib.import_module(script).main(flags))


def wait(process: Process, stderr: Path) -> Result:
    process.join()
    return Result(process.exitcode, stderr.read_text(encoding="utf-8", errors="replace"))


def finetuning_state(folder: Path) -> list[Any]:
    """Scores, model, dev predictions and metrics of a finished fine-tuning run."""
    text = (folder / "results.json").read_text(encoding="utf-8")
    run_folder = folder / "rte" / "seed-0"
    model = load(run_folder / "model.pt")
    model.pop("report")  # names the seconds
    files = [(run_folder / name).read_text(encoding="utf-8") for name in ("dev.tsv", "metrics.jsonl")]
    return [json.loads(text, object_hook=without_seconds), model, *files]


def without_seconds(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "seconds"}


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


# Kills


def survived_kills(trials: Trials, part: str, number: int) -> int:
    """Kills the processes of a run at random moments and starts it again, until `number` were killed.

    Returns the number of kills, or that of those before the first run which failed or ended differently.
    """
    rng, kills, survived, output = random.Random(part), 0, 0, f"killed-{part}"
    if part not in trials.expected:
        trials.run_undisturbed(part, f"unbroken-{part}")
    bar = tqdm(total=number, desc=f"kills, {part}", mininterval=10)
    while kills < number:
        process, span = trials.start_part(part, output), trials.seconds[part]
        if part == "torchrun":  # most of its time are imports
            wait_for_training(process, trials.folder / output / "metrics.jsonl")
            span = trials.seconds["pretraining"]
        if killed_in_time(process, rng.uniform(0, span)):
            kills += 1
            bar.update()
            continue
        # The run has ended in spite of the kills: compare it and begin another.
        if process.exitcode != 0 or not trials.ends_unchanged(part, output):
            print(f"{part}: exit code {process.exitcode}, {trials.stderr.read_text(encoding='utf-8')[-300:]}")
            return survived
        survived = kills
        shutil.rmtree(trials.folder / output)
    return kills if trials.ends_unchanged(part, output) else survived


def wait_for_training(process: Process, metrics: Path) -> None:
    """Waits until the processes write metrics or have ended."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.is_alive():
        if metrics.exists() and metrics.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)


def killed_in_time(process: Process, seconds: float) -> bool:
    """Kills the process and all its descendants after so many seconds; false if it has ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_alive():
            return False
        time.sleep(0.002)
    if not process.is_alive():
        return False
    family = descendants(process.pid)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.join()
    return True


def descendants(pid: int) -> list[int]:
    """The process and all that it has started, directly or not."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(number for child in children for number in descendants(int(child)))]


# Damaged files


def survived_damages(trials: Trials, number: int) -> int:
    """Damages files of copies of the undisturbed run; counts those that lose nothing or are refused in one line."""
    rng, survived = random.Random("damages"), 0
    kinds = (damaged_checkpoint, damaged_checkpoint, damaged_weights, damaged_config, torn_metrics)
    for trial in tqdm(range(number), "damages", mininterval=10):
        copy = trials.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(trials.folder / "unbroken", copy)
        kind = kinds[trial % len(kinds)]
        passed = kind(trials, copy, rng)
        if not passed:
            print(f"damage {trial}, {kind.__name__}: FAILED")
        survived += passed
    return survived


def damaged_checkpoint(trials: Trials, folder: Path, rng: random.Random) -> bool:
    """Without its newest checkpoint the run must be computed again from the one before."""
    damage(folder / f"checkpoint-{trials.steps}.pt", rng)
    return trials.ends_unchanged("pretraining", folder.name)


def damaged_weights(trials: Trials, folder: Path, rng: random.Random) -> bool:
    """Refused, unless the bytes that changed mean nothing."""
    name = rng.choice(["gen.pt", "disc.pt"])
    damage(folder / name, rng)
    result = trials.run("LM_DEMO", ["--weights", str(folder / "gen.pt"), "--discriminator", str(folder / "disc.pt"),
                                    "--input", "sents.txt"])
    if result.code == 0:
        return lost_bytes(load(trials.folder / "unbroken" / name), load(folder / name)) == 0
    return is_answered(result, name)


def damaged_config(trials: Trials, folder: Path, rng: random.Random) -> bool:
    """Refused with the checkpoints kept, so that the run can be ended once the file is restored."""
    (folder / f"checkpoint-{trials.steps}.pt").unlink()
    kept = {path: path.read_bytes() for path in folder.glob("checkpoint-*")}
    config = folder / "config.toml"
    whole = config.read_bytes()
    damage(config, rng)
    result = trials.run("Pretraining", trials.flags(folder.name))
    if result.code != 0:
        intact = all(path.read_bytes() == content for path, content in kept.items())
        if not (is_answered(result, "") and intact):
            print(result.stderr[-300:])
            return False
        config.write_bytes(whole)
    return trials.ends_unchanged("pretraining", folder.name)


def torn_metrics(trials: Trials, folder: Path, rng: random.Random) -> bool:
    """Lines beyond the last checkpoint, the last one torn, as a power failure leaves them."""
    (folder / f"checkpoint-{trials.steps}.pt").unlink()
    metrics = folder / "metrics.jsonl"
    line = metrics.read_text(encoding="utf-8").splitlines()[-1]
    with open(metrics, "a", encoding="utf-8") as file:
        file.write(line + "\n" + line[:rng.randrange(len(line))])
    (folder / "gen.pt.tmp-1").write_bytes(b"half")
    return trials.ends_unchanged("pretraining", folder.name) and not list(folder.glob("*.tmp-*"))


def damage(path: Path, rng: random.Random) -> None:
    """Cuts the file at a random place, or changes up to 64 of its bytes."""
    content = path.read_bytes()
    if rng.random() < 1 / 3:
        path.write_bytes(content[:rng.choice([0, rng.randrange(len(content))])])
        return
    changed = bytearray(content)
    for place in rng.choices(range(len(changed)), k=rng.choice([1, 8, 64])):
        changed[place] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(changed))


def survives_full_disk(trials: Trials) -> bool:
    """With files limited to three quarters of a checkpoint: one message and exit code 2, then a run that can go on."""
    folder = trials.folder / "full"
    shutil.copytree(trials.folder / "unbroken", folder)
    newest = folder / f"checkpoint-{trials.steps}.pt"
    limit = newest.stat().st_size * 3 // 4
    newest.unlink()
    if not is_answered(trials.run("Pretraining", trials.flags("full"), limit), "can't be written"):
        return False
    return trials.ends_unchanged("pretraining", "full")


# Bad inputs


def is_answered(result: Result, message: str) -> bool:
    """Whether a command ended as user errors should."""
    return result.code == 2 and message in result.stderr and "Traceback" not in result.stderr


def bad_commands(trials: Trials) -> list[BadCommand]:
    """Commands with values, files or weights that can't work, those of a script far apart from each other."""
    write_bad_files(trials.folder)
    training = trials.flags("new")
    tuning = ["--weights", "unbroken/disc.pt", "--data-dir", "glue", "--max-length", "24", "--output", "tuned"]
    commands = [BadCommand("Pretraining", [*training, *flags], name) for flags, name in out_of_bounds(Pretraining)]
    commands += [BadCommand("Finetuning", [*tuning, "--task", "rte", *flags], name)
                 for flags, name in out_of_bounds(Finetuning)]
    commands += [BadCommand("LM_DEMO", ["--weights", "unbroken/gen.pt", *flags], name)
                 for flags, name in out_of_bounds(Demo)]
    for script, begin, table in (("Pretraining", training, BAD_PRETRAINING), ("LM_DEMO", [], BAD_DEMO),
                                 ("Finetuning", tuning, BAD_FINETUNING)):
        commands += [BadCommand(script, [*begin, *flags.split()], message) for flags, message in table]
    commands += [BadCommand(script, flags.split(), message) for script, flags, message in BAD_CONVERSION]
    if not torch.cuda.is_available():
        commands.append(BadCommand("Pretraining", [*training, "--device", "cuda"], "CUDA"))
    random.Random("inputs").shuffle(commands)
    return commands


def out_of_bounds(settings_class: type, section: str = "") -> Iterator[tuple[list[str], str]]:
    """A flag with a value beyond each bound of a settings class, and the setting's name."""
    for field in dataclasses.fields(settings_class):
        flag = f"--{section}{field.name.replace('_', '-')}"
        if field.default_factory is not dataclasses.MISSING:
            yield from out_of_bounds(field.default_factory, f"{field.name}.")
        for bound, limit in field.metadata.items():
            beyond = {"at_least": limit - 1, "above": limit, "at_most": limit + 1, "below": limit}[bound]
            yield [flag, str(beyond)], field.name


def write_bad_files(folder: Path) -> None:
    """Writes the damaged or unsuitable files that the commands with bad input are given."""
    # Text, settings and a vocabulary
    (folder / "empty.txt").write_text("")
    (folder / "cut.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    (folder / "bad.toml").write_text("steps = = 3")
    (folder / "unknown.toml").write_text("stepps = 3")
    (folder / "type.toml").write_text('steps = "many"')
    (folder / "vocab.txt").write_text("one\ntwo\n")
    (folder / "readonly").write_text("a file in the place of a folder")
    (folder / "short.txt").write_text("the cat sees a dog.\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (folder / "latin.txt").write_bytes("Ümläüt für älle\n".encode("latin-1") * 100)
    # Folders in the place of models
    (folder / "badpair").mkdir()
    (folder / "badpair" / "disc.pt").write_bytes(b"junk")
    (folder / "badfolder").mkdir()
    (folder / "badfolder" / "config.json").write_text("{")
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
    for script, flags, message in tqdm(commands, "bad inputs", mininterval=10):
        shutil.rmtree(trials.folder / "new", ignore_errors=True)
        result = trials.run(script, flags)
        if is_answered(result, message):
            answered += 1
        else:
            print(f"{script} {' '.join(flags[-4:])}: exit code {result.code}, expected 2 and {message!r} in: "
                  f"{result.stderr[-300:]}", flush=True)
    return answered


def run_part(trials: Trials, part: str, options: argparse.Namespace) -> bool:
    """One part of the benchmark; prints how many of its trials passed."""
    if part in KILLED:
        parts = [name for name in KILLED if name in options.parts]
        total = options.kills // len(parts) + (parts.index(part) < options.kills % len(parts))
        passed, noun = survived_kills(trials, part, total), f"kills survived, {part}"
    elif part == "damages":
        total = options.damages
        passed, noun = survived_damages(trials, total), "damaged files survived"
    elif part == "disk":
        passed, total, noun = int(survives_full_disk(trials)), 1, "full disks survived"
    else:
        commands = bad_commands(trials)[:options.inputs]
        passed, total, noun = count_answered(trials, commands), len(commands), "bad inputs answered"
    print(f"{noun}: {passed} of {total}", flush=True)
    return passed == total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*KILLED, "damages", "disk", "inputs"],
                        choices=[*KILLED, "damages", "disk", "inputs"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=1000, help="at most so many; all there are by default")
    parser.add_argument("--steps", type=int, default=60, help="length of the pretraining runs")
    options = parser.parse_args()
    for script in [*SCRIPTS, *IMPORTED_LATE]:
        importlib.import_module(script)
    with tempfile.TemporaryDirectory() as name:
        trials = Trials(Path(name), options.steps)
        passed = [run_part(trials, part, options) for part in options.parts]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
