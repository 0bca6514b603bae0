"""Pretraining.py under torchrun: two processes on the CPU (gloo) compute what one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import metrics

from Pretraining import main
from utils import load, own_rows

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def two_processes(script, words):
    return subprocess.run([*TORCHRUN, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def weights(folder):
    return load(folder / "checkpoint-8.pt")["electra"]


@pytest.mark.parametrize("flags", [
    {}, {"examples": "line", "accumulate": 2, "batch_size": 9, "grad_checkpointing": True},
    {"objective": "all-tokens-mlm", "accumulate": 2},
    {"objective": "two-stage", "model__generator_size": 1, "model__heads": 1, "model__feed_forward_size": 64}])
def test_two_processes_compute_what_one_does(command, tmp_path, flags):
    # The biases of the keys have no gradient but rounding, which a large weight would lift above Adam's epsilon.
    flags |= {"model__dropout": 0.0, "precision": "fp32", "learning_rate": 1e-3, "disc_weight": 50.0}
    assert main(command("one", **flags)) == 0
    result = two_processes("Pretraining.py", command("two", **flags))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("config: ") == 1 and "one of 2 processes" in result.stdout
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-6, msg=name)
    assert len(metrics(tmp_path / "one")) == len(metrics(tmp_path / "two"))
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-6)


def test_a_run_goes_on_with_another_number_of_processes(command, tmp_path):
    flags = {"model__dropout": 0.0, "precision": "fp32"}
    assert main(command("one", **flags)) == 0
    late = tmp_path / "run"
    assert main(command(**flags)) == 0
    for path in late.glob("checkpoint-*"):
        if path.name != "checkpoint-4.pt":
            path.unlink()
    result = two_processes("Pretraining.py", command(**flags))
    assert "resuming" in result.stdout and result.returncode == 0, result.stderr
    for name, weight in weights(late).items():
        torch.testing.assert_close(weight, weights(tmp_path / "one")[name], rtol=1e-4, atol=2e-6, msg=name)


def test_no_thread_of_the_group_outlives_it(command, tmp_path):
    """One that still runs when Python ends can abort the process."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom pathlib import Path\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\nfrom Pretraining import main\n"
                      "assert main(sys.argv[1:]) == 0\n"
                      "names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]\n"
                      "assert not any('gloo' in name for name in names), names\n")
    result = two_processes(str(script), command())
    assert result.returncode == 0, result.stderr


def descendants(pid):
    """The process and all that it started, directly or not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(number for child in children for number in descendants(int(child)))]


def test_a_signal_to_torchrun_ranks_and_workers_saves(command, tmp_path):
    """As a queue sends it: to every process, though torchrun sends its own to the ranks, too."""
    words = command(steps=3000, log_every=10, eval_every=3000, save_every=3000, workers=1)
    process = subprocess.Popen([*TORCHRUN, "Pretraining.py", *words], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    file, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or len(metrics(file.parent)) < 3:  # step 0, 10 and 20
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    family = descendants(process.pid)
    assert len(family) == 5  # torchrun, two ranks, a worker each
    for pid in family:
        os.kill(pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "SIGTERM: saved after step" in out
    assert 10 < load(*(tmp_path / "run").glob("checkpoint-*"))["step"] < 3000
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_failed_process_ends_the_run_with_a_message(command, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text("import os, sys\nsys.path.insert(0, os.getcwd())\nimport Pretraining as script\n"
                      "from utils import rank\n"
                      "original = script.seed_step\n"
                      "def failing(seed, step, rng):\n    original(seed, step, rng)\n"
                      "    if step == 3 and rank() == 1:\n        raise MemoryError('no memory left on this one')\n"
                      "script.seed_step = failing\nsys.exit(script.main())\n")
    result = two_processes(str(script), command())
    assert result.returncode != 0 and "no memory left on this one" in result.stderr
    assert "rank 0 lost its connection" in result.stderr


def test_bad_input_is_told_by_every_process_and_ends_them(command):
    result = two_processes("Pretraining.py", command(batch_size=1))
    assert result.returncode != 0 and "without a row" in result.stderr and "InputError" not in result.stderr


def test_the_shares_of_all_processes_make_the_whole(monkeypatch):
    for rows, processes in ((9, 2), (128, 8), (7, 7), (10, 4)):
        monkeypatch.setattr("utils.world_size", lambda n=processes: n)
        found = []
        for number in range(processes):
            monkeypatch.setattr("utils.rank", lambda n=number: n)
            found += range(rows)[own_rows(rows)]
        assert found == list(range(rows))
