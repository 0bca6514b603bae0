"""Kills, damages, fills and feeds nonsense to short pretraining runs, then compares them with an unbroken one.

    python benchmarks/fault_injection.py                     # some minutes on two CPU cores

Prints kills survived, damages survived, bad inputs answered and bytes lost; exit code 1 if any of them fell short.
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

import torch

ROOT = Path(__file__).resolve().parent.parent
SIZES = """--batch-size 6 --max-length 24 --warmup-steps 2 --log-every 5 --eval-every 50 --eval-examples 20 --save-every 2
--learning-rate 1e-3 --model.vocab-size 60 --model.embedding-size 8 --model.hidden-size 16 --model.layers 1 --model.heads 2
--model.feed-forward-size 32 --model.generator-size 0.5 --model.max-positions 32 --model.dropout 0.1 --device cpu
--precision fp32""".split()
WORDS = "the a old new red green cat dog bird house tree river sees likes finds eats near under over and but then".split()


class Lab:
    """A folder with a corpus, an unbroken run and what the trials leave."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        rng = random.Random(0)
        documents = ["\n".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) + "." for _ in range(8))
                     for _ in range(60)]
        (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
        assert self.train("unbroken").returncode == 0
        self.wanted = self.end("unbroken")

    def flags(self, output: str) -> list[str]:
        return ["--corpus", str(self.folder / "corpus.txt"), "--cache", str(self.folder / "cache"), "--output",
                str(self.folder / output), "--steps", str(self.steps), *SIZES]

    def run(self, script: str, *flags: str, **more: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, cwd=self.folder,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)

    def train(self, output: str, *flags: str, **more: object) -> subprocess.CompletedProcess:
        return self.run("Pretraining.py", *self.flags(output), *flags, **more)

    def end(self, output: str) -> list:
        """Weights, optimizer state and metrics without times."""
        folder = self.folder / output
        last = torch.load(folder / f"checkpoint-{self.steps}.pt", weights_only=True)
        last["window"].pop("seconds")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [last, torch.load(folder / "gen.pt", weights_only=True), torch.load(folder / "disc.pt", weights_only=True),
                [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]]

    def difference(self, output: str) -> int:
        """Bytes of the ended run's tensors that differ from the unbroken one's; -1 for anything else that differs."""
        lost = 0

        def compare(a: object, b: object) -> None:
            nonlocal lost
            if isinstance(a, torch.Tensor):
                x, y = (value.contiguous().reshape(-1).view(torch.uint8) for value in (a, b))
                lost += int((x != y).sum())
            elif isinstance(a, dict | list | tuple):
                assert len(a) == len(b)
                for key in a if isinstance(a, dict) else range(len(a)):
                    compare(a[key], b[key])
            else:
                assert a == b
        try:
            compare(self.wanted, self.end(output))
        except AssertionError:
            return -1
        return lost


def kills(lab: Lab, number: int) -> int:
    """kill -9 at random instants of a run that saves every second step, each continued by the next; kills that hit."""
    rng, hit = random.Random(1), 0
    while hit < number:
        output = "killed"
        if (lab.folder / output / f"checkpoint-{lab.steps}.pt").exists():
            if lab.difference(output):
                return hit
            shutil.rmtree(lab.folder / output)
        process = subprocess.Popen([sys.executable, str(ROOT / "Pretraining.py"), *lab.flags(output)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        metrics = lab.folder / output / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until the run trains: imports take most of its time
        time.sleep(rng.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            hit += 1
        elif process.returncode:
            print(process.stderr.read())
            return hit
    return hit


def damages(lab: Lab, number: int) -> int:
    """The newest checkpoint truncated, emptied or its bytes flipped; the run is continued and must end as unbroken."""
    rng, survived = random.Random(2), 0
    for trial in range(number):
        folder = lab.folder / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(lab.folder / "unbroken", folder)
        newest = folder / f"checkpoint-{lab.steps}.pt"
        content = bytearray(newest.read_bytes())
        if trial % 3 == 0:
            content = content[:rng.choice([0, rng.randrange(len(content))])]
        else:
            for place in rng.choices(range(len(content)), k=rng.choice([1, 8, 64])):
                content[place] ^= rng.randrange(1, 256)
        newest.write_bytes(content)
        result = lab.train("damaged")
        survived += result.returncode == 0 and "Traceback" not in result.stderr and lab.difference("damaged") == 0
    return survived


def full_disk(lab: Lab) -> bool:
    """Files limited to three quarters of a checkpoint: one message, exit code 2, then the run ends as unbroken."""
    folder = lab.folder / "full"
    shutil.copytree(lab.folder / "unbroken", folder)
    newest = folder / f"checkpoint-{lab.steps}.pt"
    limit = newest.stat().st_size * 3 // 4
    newest.unlink()
    result = lab.train("full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    told = result.returncode == 2 and "can't be written" in result.stderr and "Traceback" not in result.stderr
    return told and lab.train("full").returncode == 0 and lab.difference("full") == 0


def bad_inputs(lab: Lab) -> list[tuple[str, list[str], str]]:
    """Commands that can't work: script, flags, and what the message must name."""
    folder = lab.folder
    pre, fine, demo = "Pretraining.py", "Finetuning.py", "LM_DEMO.py"
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (folder / "cut.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    (folder / "bad.toml").write_text("steps = = 3")
    (folder / "unknown.toml").write_text("stepps = 3")
    (folder / "type.toml").write_text('steps = "many"')
    (folder / "junk.pt").write_bytes(b"junk")
    (folder / "empty.pt").write_bytes(b"")
    disc = folder / "unbroken" / "disc.pt"
    (folder / "half.pt").write_bytes(disc.read_bytes()[:5000])
    content = torch.load(disc, weights_only=True)
    torch.save(content | {"model": content["model"] | {"hidden_size": 1 << 40}}, folder / "huge.pt")
    torch.save(content | {"weights": {name: value * torch.nan for name, value in content["weights"].items()}},
               folder / "nan.pt")
    torch.save([1], folder / "list.pt")
    (folder / "vocab.txt").write_text("one\ntwo\n")
    for name, text in {"RTE": "index\tsentence1\tsentence2\tlabel\n0\ta cat\ta dog\tmaybe\n", "WNLI": "a\tb\n1\t2\n",
                       "SST-2": ""}.items():
        (folder / "glue" / name).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / "glue" / name / f"{split}.tsv").write_text(text)
    tune = ["--weights", str(disc), "--data-dir", "glue", "--max-length", "24", "--output", "tuned"]
    train = lab.flags("new")
    (folder / "readonly").write_text("a file where a folder is wanted")
    return [
        *((pre, [*train, *flags.split()], message) for flags, message in {
            "--steps 0": "steps", "--batch-size 0": "batch_size", "--learning-rate 0": "learning_rate",
            "--learning-rate nan": "learning_rate", "--clip-norm -1": "clip_norm", "--mask-prob 1.5": "mask_prob",
            "--model.heads 3": "heads", "--model.generator-size 0.01": "generator", "--max-length 64": "max_positions",
            "--accumulate 9": "accumulate", "--steps many": "many", "--nonsense 3": "nonsense", "--device cuda": "CUDA",
            "--corpus missing.txt": "missing.txt", "--corpus empty.txt": "empty.txt", "--corpus cut.gz": "cut.gz",
            "--corpus .": "directory", "--config missing.toml": "missing.toml", "--config bad.toml": "TOML",
            "--config unknown.toml": "stepps", "--config type.toml": "steps", "--vocab missing/name": "missing/name",
            "--vocab vocab.txt": "vocab.txt", "--output readonly": "readonly", "--workers -1": "workers",
            "--keep-checkpoints 0": "keep_checkpoints", "--max-bad-steps 0": "max_bad_steps", "--seed -1": "seed",
            "--output unbroken --seed 5": "seed = 0", "--output unbroken --no-resume": "--no-resume"}.items()),
        *((demo, flags.split(), message) for flags, message in {
            "--weights missing.pt": "missing.pt", "--weights junk.pt": "junk.pt", "--weights empty.pt": "empty.pt",
            f"--weights {disc}": "discriminator", "--weights list.pt": "list.pt",
            "--weights unbroken/gen.pt --input missing.txt": "missing.txt",
            "--weights unbroken/gen.pt --input empty.txt": "empty.txt"}.items()),
        *((fine, [*tune, *flags.split()], message) for flags, message in {
            "--task nothing": "nothing", "--task rte": "maybe", "--task wnli": "header", "--task sst2": "train.tsv",
            "--task rte --weights junk.pt": "junk.pt", "--task rte --weights half.pt": "half.pt",
            "--task rte --weights huge.pt": "huge.pt", "--task rte --weights nan.pt": "finite",
            "--task rte --weights unbroken/gen.pt": "generator", "--task rte --seeds 0": "seeds",
            "--task rte --max-length 512": "positions", "--task rte --predict-file missing.txt": "missing.txt",
            "--task all --data-dir missing": "missing"}.items()),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name), arguments.steps)
        hit = kills(lab, arguments.kills)
        assert lab.train("killed").returncode == 0
        lost = lab.difference("killed")
        print(f"kills survived: {hit if lost == 0 else 0} of {arguments.kills}; bytes lost: {lost}", flush=True)
        whole = damages(lab, arguments.damages)
        print(f"damages survived: {whole} of {arguments.damages}", flush=True)
        full = full_disk(lab)
        print(f"full disk: {'told, nothing lost' if full else 'FAILED'}", flush=True)
        inputs, answered = bad_inputs(lab), 0
        for script, flags, message in inputs:
            result = lab.run(script, *flags)
            right = result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
            answered += right
            if not right:
                print(f"{script} {' '.join(flags[-4:])}: {result.returncode}, wanted {message!r}: {result.stderr[-300:]}")
        print(f"bad inputs answered: {answered} of {len(inputs)}")
    return int(not (full and lost == 0 and (hit, whole, answered) == (arguments.kills, arguments.damages, len(inputs))))


if __name__ == "__main__":
    sys.exit(main())
