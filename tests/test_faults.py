"""What may befall a run of days: signals, kills inside a save, damage, a full disk, bad numbers, changed settings."""

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Killed, assert_same, metrics, stop_after_save, write_pair

import Finetuning
import LM_DEMO
import Pretraining as script
import utils
from Pretraining import main
from utils import InputError, load, save

ROOT = Path(__file__).parent.parent


def end(folder, step=8):
    """Everything a run has computed: its last checkpoint but for times, weights files and metrics."""
    last = load(folder / f"checkpoint-{step}.pt")
    last["means"].pop("seconds")
    return [last, load(folder / "gen.pt"), load(folder / "disc.pt"), metrics(folder)]


@pytest.fixture
def unbroken(command, tmp_path):
    assert main(command("unbroken")) == 0
    return end(tmp_path / "unbroken")


# Leaving


def during_step(monkeypatch, wanted, action):
    """Does `action` within the training step that is the `wanted`-th from the run's beginning."""
    original = script.seed_step

    def acting(seed, step, rng):
        if step == wanted:
            action()
        original(seed, step, rng)
    monkeypatch.setattr(script, "seed_step", acting)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_ends_as_an_unbroken_run(
        command, tmp_path, monkeypatch, capsys, unbroken, number, code):
    with monkeypatch.context() as patch:
        during_step(patch, 2, lambda: os.kill(os.getpid(), number))
        assert main(command()) == code
    assert f"{number.name}: saved after step 3 in" in capsys.readouterr().out
    assert main(command()) == 0
    assert_same(end(tmp_path / "run"), unbroken)


LONG = {"steps": 150, "log_every": 10, "save_every": 50, "eval_every": 50, "workers": 2}


def started(words, folder, script="Pretraining.py"):
    """A run in a session of its own, once it has written metrics of training steps."""
    process = subprocess.Popen([sys.executable, script, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def descendants(pid):
    """The process and all that it started, directly or not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(number for child in children for number in descendants(int(child)))]


@pytest.mark.parametrize(("receivers", "number"), [("group", signal.SIGTERM), ("every process", signal.SIGTERM),
                                                   ("group", signal.SIGINT)])
def test_a_signal_to_the_workers_too_saves_and_the_run_can_be_resumed(command, tmp_path, receivers, number):
    assert main(command("unbroken", **LONG)) == 0
    process = started(command(**LONG), tmp_path / "run")
    family = descendants(process.pid)
    assert len(family) == 3
    if receivers == "group":
        os.killpg(process.pid, number)
    else:
        for pid in reversed(family):  # the workers first
            os.kill(pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err, err
    assert f"{number.name}: saved after step" in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert main(command(**LONG)) == 0
    assert_same(end(tmp_path / "run", 150), end(tmp_path / "unbroken", 150))


def test_a_run_killed_without_its_workers_can_be_resumed_at_once(command, tmp_path):
    """They find out after some seconds, and must not hold the folder's lock so long."""
    process = started(command(**LONG), tmp_path / "run")
    workers = descendants(process.pid)[1:]
    process.kill()
    process.wait()
    assert all("(zombie)" not in Path(f"/proc/{pid}/status").read_text() for pid in workers)
    assert main(command(**LONG)) == 0
    process.communicate()


@pytest.mark.parametrize("place", ["script.training_step", "script.TrainingBatches.__getitem__"])
def test_a_bug_ends_the_run_with_workers_too(command, place):
    """Workers that ignore SIGTERM would keep Python from ending."""
    code = ("import sys, Pretraining as script\ndef failing(*_):\n    raise ZeroDivisionError('a bug')\n"
            f"{place} = failing\nsys.exit(script.main())")
    result = subprocess.run([sys.executable, "-c", code, *command(workers=2)], cwd=ROOT, capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 1 and "a bug" in result.stderr


def test_a_second_signal_leaves_at_once(command, tmp_path):
    code = ("import os, signal, sys, Pretraining as script\n"
            "def twice(*_):\n    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
            "script.seed_step = twice\nsys.exit(script.main())")
    result = subprocess.run([sys.executable, "-c", code, *command()], cwd=ROOT, capture_output=True)
    assert result.returncode == 143 and not list((tmp_path / "run").glob("checkpoint-*"))


def test_under_torchrun_a_second_signal_is_the_same_request(monkeypatch):
    """A queue sends it to all processes, and torchrun passes on what it has received."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with utils.stop_signals() as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM] * 2


def test_max_minutes_saves_in_time(command, tmp_path, monkeypatch, capsys, unbroken):
    with monkeypatch.context() as patch:
        during_step(patch, 4, lambda: time.sleep(0.7))  # the slowest step by far, and it could come again
        assert main(command(max_minutes=100)) == 0
        assert "run the same command" not in capsys.readouterr().out
        began = time.monotonic()
        patch.setattr(script.time, "monotonic", lambda: began + 2 * (time.perf_counter() - perf))
        perf = time.perf_counter()
        assert main(command("short", max_minutes=1.5 / 60)) == 0
    assert "time is over: saved after step" in capsys.readouterr().out
    assert main(command("short")) == 0
    assert_same(end(tmp_path / "short"), unbroken)


@pytest.mark.parametrize("compiled", [False, True])
def test_max_minutes_expects_a_slow_first_step_again_unless_it_has_compiled(command, monkeypatch, capsys, compiled):
    now = [0.0]

    def slow():
        now[0] += 50

    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: None)
    during_step(monkeypatch, 0, slow)
    assert main(command(max_minutes=1, **({"compile": True} if compiled else {}))) == 0
    assert ("saved after step 1 in" in capsys.readouterr().out) != compiled


def test_extend_goes_on_with_a_longer_schedule(command, tmp_path, capsys):
    assert main(command()) == 0
    assert main(command(steps=12)) == 2
    assert main(command(steps=12, seed=3, batch_size=5)) == 2
    err = capsys.readouterr().err
    assert "steps = 8, this command has 12" in err and "--extend" in err and "seed = 0, this command has 3" in err
    assert main([*command(steps=12), "--extend"]) == 0
    lines = [line for line in metrics(tmp_path / "run") if not line["heldout"]]
    assert lines[-1]["step"] == 12 and lines[-1]["learning_rate"] == pytest.approx(1e-3 * (1 - 11 / 12))
    assert main([*command(steps=8), "--extend"]) == 2


# Files


def test_flipped_bytes_are_found(tmp_path):
    path = tmp_path / "file.pt"
    save(path, {"weights": torch.arange(1000.0), "note": "text" * 20})
    whole, content = path.read_bytes(), load(path)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1:])
        try:
            assert_same(load(path), content)  # padding between the parts
        except InputError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2],
                                    lambda b: b[:9000] + bytes(x ^ 1 for x in b[9000:9064]) + b[9064:]])
def test_a_damaged_newest_checkpoint_costs_only_its_steps(
        command, tmp_path, monkeypatch, capsys, unbroken, damage):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 6)
        main(command(save_every=2))
    newest = tmp_path / "run" / "checkpoint-6.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    assert main(command(save_every=2)) == 0
    out, err = capsys.readouterr()
    assert "checkpoint-6.pt" in err and "after step 4" in out
    assert_same(end(tmp_path / "run"), unbroken)


def test_a_kill_inside_a_save_leaves_the_checkpoint_before(command, tmp_path, unbroken):
    code = ("import os, sys, torch, Pretraining as script\nwrite = torch.save\n"
            "def half(content, file):\n"
            "    if content.get('step') == 8:\n        file.write(b'half')\n        file.flush()\n        os._exit(9)\n"
            "    write(content, file)\n"
            "torch.save = half\nsys.exit(script.main())")
    assert subprocess.run([sys.executable, "-c", code, *command()], cwd=ROOT, capture_output=True).returncode == 9
    assert list((tmp_path / "run").glob("*.tmp-*")) and load(tmp_path / "run" / "checkpoint-4.pt")["step"] == 4
    assert main(command()) == 0
    assert_same(end(tmp_path / "run"), unbroken)
    assert not list((tmp_path / "run").glob("*.tmp-*"))


def test_a_torn_line_of_metrics_is_dropped(command, tmp_path, monkeypatch, unbroken):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command())
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "held')
    assert main(command()) == 0
    assert_same(end(tmp_path / "run"), unbroken)


def test_a_full_disk_is_told_and_loses_nothing(command, tmp_path, capfd, unbroken):
    assert main(command()) == 0
    limit = max(path.stat().st_size for path in (tmp_path / "run").glob("*.pt")) * 3 // 4
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-8.pt").unlink()
    result = subprocess.run([sys.executable, str(ROOT / "Pretraining.py"), *command()], capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "can't be written (File too large)" in result.stderr
    assert main(command()) == 0
    assert_same(end(tmp_path / "run"), unbroken)


def test_a_folder_gone_while_running_is_told(command, tmp_path, monkeypatch, capsys):
    during_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "run"))
    assert main(command()) == 2
    assert "No such file" in capsys.readouterr().err


def test_config_toml_mended_wrongly_is_refused(command, tmp_path, capsys):
    assert main(command()) == 0
    (tmp_path / "run" / "config.toml").write_text("steps = = 3")
    assert main(command()) == 2
    assert "TOML" in capsys.readouterr().err


# Numbers


def poison(monkeypatch, steps):
    """Makes the gradients of these steps NaN."""
    backward, seen = script.forward_and_backward, []

    def poisoned(run, *given):
        losses = backward(run, *given)
        seen.append(0)
        if len(seen) - 1 in steps:
            for parameter in run.electra.parameters():
                parameter.grad.fill_(torch.nan)
        return losses
    monkeypatch.setattr(script, "forward_and_backward", poisoned)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_finite_numbers_is_skipped_and_told(command, tmp_path, monkeypatch, capsys, precision):
    poison(monkeypatch, {2, 5})
    assert main(command(precision=precision)) == 0
    warnings = re.findall(r"warning: (\d+) of the steps up to step [\d,]+ skipped", capsys.readouterr().out)
    skipped = sum(map(int, warnings))
    assert skipped == 2 if precision == "fp32" else skipped >= 2  # fp16 overflows until its scale fits
    last = load(tmp_path / "run" / "checkpoint-8.pt")
    assert all(weight.isfinite().all() for weight in last["electra"].values())
    assert all(state["exp_avg"].isfinite().all() for state in last["optimizer"]["state"].values())
    assert sum(line["skipped_steps"] for line in metrics(tmp_path / "run") if not line["heldout"]) == skipped


def test_a_run_refused_for_too_little_text_can_be_corrected(command, tmp_path, capsys):
    assert main(command(batch_size=100_000)) == 2
    assert "lower --batch-size" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.toml").exists() and main(command()) == 0


def test_too_many_bad_steps_end_the_run_with_the_last_good_checkpoint(command, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {4, 5, 6})
    assert main(command(max_bad_steps=3)) == 2
    assert "3 steps in a row" in capsys.readouterr().err
    assert load(tmp_path / "run" / "checkpoint-4.pt")["step"] == 4


# Untrusted files


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def weights_files(folder, vocabulary):
    """Named changes of disc.pt's content, each with what the refusal says."""
    whole = load(write_pair(folder, vocabulary)[1])
    sizes, weights = whole["model"], whole["weights"]
    first = next(iter(weights))
    return {
        "a list": ([1, 2], "not a weights file"),
        "absurd width": (whole | {"model": sizes | {"hidden_size": 1 << 40}}, "fit together"),
        "absurd depth": (whole | {"model": sizes | {"layers": 1 << 40}}, "layers from"),
        "absurd vocabulary": (whole | {"model": sizes | {"vocab_size": 1 << 45}}, "fit together"),
        "a shape without its numbers": (whole | {"weights": weights | {first: torch.zeros(1).expand(1 << 20, 1 << 20)}},
                                        first),
        "text for sizes": (whole | {"model": sizes | {"heads": "two"}}, "fit together"),
        "an unknown size": (whole | {"model": sizes | {"more": 1}}, "fit together"),
        "NaN": (whole | {"weights": weights | {first: torch.full_like(weights[first], torch.nan)}}, "not finite"),
        "a weight missing": (whole | {"weights": {k: v for k, v in weights.items() if k != first}}, first),
        "a surplus weight": (whole | {"weights": weights | {"more": torch.zeros(1)}}, "more"),
        "no vocabulary": (whole | {"vocabulary": "{}"}, "no usable tokenizer"),
        "text for weights": (whole | {"weights": "text"}, "fit together"),
    }


NAMES = ["a list", "absurd width", "absurd depth", "absurd vocabulary", "a shape without its numbers", "text for sizes",
         "an unknown size", "NaN", "a weight missing", "a surplus weight", "no vocabulary", "text for weights"]


@pytest.mark.parametrize("name", NAMES)
def test_untrusted_weights_are_refused_in_one_line(name, tmp_path, vocabulary, capsys, glue):
    content, message = weights_files(tmp_path / "pair", vocabulary)[name]
    torch.save(content, tmp_path / "bad.pt")
    assert Finetuning.main(["--task", "rte", "--weights", str(tmp_path / "bad.pt"), "--data-dir", str(glue),
                            "--max-length", "24", "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_pickle_bomb_is_refused_without_running_it(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    bombs = [tmp_path / "plain.pt", tmp_path / "zipped.pt", tmp_path / "run" / "checkpoint-4.pt"]
    assert main(command(steps=4)) == 0
    bombs[0].write_bytes(pickle.dumps(Bomb()))
    for path in bombs[1:]:
        torch.save({"kind": Bomb()}, path)
    for path in bombs[:2]:
        assert LM_DEMO.main(["--weights", str(path), "--input", "sents.txt"]) == 2
        assert Finetuning.main(["--task", "rte", "--weights", str(path)]) == 2
    assert main(command(steps=4)) == 2
    assert not Path("exploded").exists() and capsys.readouterr().err.count("error: ") == 5


# One place for errors


@pytest.mark.parametrize(("error", "code"), [(InputError("x"), 2), (PermissionError(13, "Permission denied", "f"), 2),
                                             (OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_errors_end_in_one_line_and_their_code(error, code, capsys):
    def failing(_):
        raise error
    assert utils.reports_input_errors(failing)([]) == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), BlockingIOError(11, "bug")])
def test_bugs_keep_their_traceback(error):
    def failing(_):
        raise error
    with pytest.raises(type(error)):
        utils.reports_input_errors(failing)([])
