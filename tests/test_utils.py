"""utils.py: settings, optimizer and schedule, and files, each against a plain reference."""

import multiprocessing
import random
import time
import tomllib
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch

from utils import (Adam, InputError, bounded, checkpoints, decay_groups, flat, from_table, load, locked,
                   pick_device, pick_precision, read_settings, replacing, reports_input_errors,
                   save, scheduled_rate, skip_unless_finite, to_toml)

# Settings


@dataclass(frozen=True)
class Part:
    width: int = 5
    share: float = 0.5


@dataclass(frozen=True)
class Whole:
    config: str = "none"
    steps: int = 10
    files: tuple[str, ...] = ()
    name: str | None = None
    mode: Literal["fast", "slow"] = "fast"
    quiet: bool = False
    part: Part = field(default_factory=Part)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('steps = 20\nquiet = true\nfiles = ["a"]\n[part]\nwidth = 7\nshare = 1\n', encoding="utf-8")
    settings = read_settings(Whole, ["--config", str(path), "--steps", "30", "--part.share", "0.25", "--no-quiet"], path)
    assert settings == Whole(str(path), 30, ("a",), None, "fast", False, Part(7, 0.25))
    assert read_settings(Whole, [], path).steps == 20  # the default configuration
    assert read_settings(Whole, [f"--config={path}"], tmp_path / "none").steps == 20


def test_settings_survive_toml():
    settings = Whole("runs/emoji\U0001f600", 3, ("a b", 'c"\\', "\x7f\n\t𠮷é"), None, "slow", True, Part(1, 1e-9))
    assert from_table(Whole, tomllib.loads(to_toml(settings)), "text") == settings
    assert flat(settings)["part.share"] == 1e-9 and flat(settings)["steps"] == 3


def test_every_string_survives_a_file_of_toml(tmp_path):
    rng, path = random.Random(0), tmp_path / "config.toml"
    planes = [(0, 0x20), (0x20, 0x7F), (0x7F, 0xA0), (0xA0, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    strings = ["".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(12))) for _ in range(500)]
    for string in [*strings, "\r\n", '"""', "'''", "\\u0041", "\u2028", "\ufeff"]:
        settings = Whole(string, name=string, files=(string, string))
        path.write_text(to_toml(settings), encoding="utf-8")
        assert from_table(Whole, tomllib.loads(path.read_text(encoding="utf-8")), "text") == settings, ascii(string)


def test_a_name_that_is_no_unicode_is_refused(tmp_path):
    """As Python has it for a file name with bytes that are not UTF-8."""
    with pytest.raises(InputError, match="not UTF-8"):
        read_settings(Whole, ["--name", "runs/\udcff"])


@dataclass(frozen=True)
class Bounded:
    config: str = "none"
    count: int = bounded(1, at_least=1)
    share: float = bounded(0.5, above=0, below=1)
    limit: float | None = bounded(None, at_most=3)
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(("flags", "message"), [
    ("--count 0", "count = 0 must be at least 1"), ("--share 0", "share = 0.0 must be above 0"),
    ("--share 1", "share = 1.0 must be below 1"), ("--share nan", "share = nan must be above 0"),
    ("--limit 3.5", "limit = 3.5 must be at most 3"), ("--limit inf", "limit = inf must be at most 3")])
def test_numbers_out_of_bounds_are_refused_by_name(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_settings(Bounded, flags.split())
    (tmp_path / "run.toml").write_text("count = 0", encoding="utf-8")
    with pytest.raises(InputError, match="count = 0 must be at least 1"):
        read_settings(Bounded, [], tmp_path / "run.toml")
    assert read_settings(Bounded, ["--limit", "3", "--count", "1"]).limit == 3


@pytest.mark.parametrize(("text", "message"), [
    ("stepz = 3", "unknown key 'stepz', did you mean 'steps'"),
    ("steps = '3'", "steps = '3'"),
    ("steps = 1.5", "steps = 1.5"),
    ("steps = true", "steps = True"),
    ("quiet = 1", "quiet = 1"),
    ("mode = 'medium'", "mode = 'medium'"),
    ("files = 'a'", "files = 'a'"),
    ("files = [1]", "files"),
    ("part = 3", "expected part to be a table"),
    ("[part]\nwide = 3", r"\[part\]: unknown key 'wide'"),
    ("[part]\nwidth = 'x'", r"\[part\]: width = 'x'"),
    ("steps = ", "can't be read as TOML"),
])
def test_a_toml_key_is_checked_as_strictly_as_a_flag(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text("\ufeff" + text, encoding="utf-8")  # as some editors begin a file
    with pytest.raises(InputError, match=message):
        read_settings(Whole, [], path)
    with pytest.raises(InputError, match="can't be read"):
        read_settings(Whole, [], tmp_path / "missing.toml")


def test_input_errors_become_one_line_and_exit_code_2(capsys):
    @reports_input_errors
    def main(argv):
        if argv == ["bug"]:
            raise KeyError("bug")
        if argv == ["flag"]:
            raise SystemExit(2)
        raise InputError("found x, expected y")

    assert main([]) == 2
    assert capsys.readouterr().err == "error: found x, expected y\n"
    assert main(["flag"]) == 2
    with pytest.raises(KeyError):  # a bug keeps its traceback
        main(["bug"])


# Devices and precision


def test_auto_precision_follows_the_hardware(monkeypatch):
    cuda = torch.device("cuda")
    for supported, name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert pick_precision("auto", cuda).name == name
    cpu = torch.device("cpu")
    for able, name in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert pick_precision("auto", cpu).name == name
    assert pick_precision("fp16", cpu).scaler().is_enabled()
    assert not pick_precision("bf16", cpu).scaler().is_enabled()


def test_cuda_asked_for_and_absent_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no usable CUDA"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


# Optimizer and schedule


def test_adam_is_berts_without_bias_correction():
    """Against the update of model/optimization.py, written plainly in float64."""
    torch.manual_seed(1)
    weights = [torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    optimizer = Adam([{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}], lr=1.0)
    plain = [(w.detach().double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()) for w in weights]
    for step in range(300):
        rate = scheduled_rate(step, 1e-2, 20, 300)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for weight in weights:
            weight.grad = torch.randn_like(weight) * 10.0 ** (step % 7 - 5)
        for n, (weight, (w, m, v), decay) in enumerate(zip(weights, plain, (0.1, 0.0), strict=True)):
            g = weight.grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            plain[n] = (w - rate * (m / (v.sqrt() + 1e-6) + decay * w), m, v)
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
    for weight, (w, _, _) in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight.double(), w, rtol=1e-5, atol=1e-6)


def test_adam_resumes_from_its_state():
    def steps(optimizer, weight, numbers):
        for number in numbers:
            weight.grad = torch.full_like(weight, float(number))
            optimizer.step()

    unbroken, broken = torch.zeros(3), torch.zeros(3)
    steps(Adam([{"params": [unbroken]}], lr=0.1), unbroken, range(1, 8))
    first = Adam([{"params": [broken]}], lr=0.1)
    steps(first, broken, range(1, 4))
    second = Adam([{"params": [broken]}], lr=0.1)
    second.load_state_dict(first.state_dict())
    steps(second, broken, range(4, 8))
    assert torch.equal(unbroken, broken)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(precision):
    """Neither weights nor moments nor the step counter, bit for bit, with and without loss scaling."""
    states = []
    for gradients in ([1.0, 2.0], [1.0, torch.inf, torch.nan, 2.0]):
        weight = torch.ones(3, requires_grad=True)
        optimizer, scaler = Adam([{"params": [weight]}], lr=0.1), pick_precision(precision, torch.device("cpu")).scaler()
        for gradient in gradients:
            scaler.scale((weight * gradient).sum()).backward()
            scaler.unscale_(optimizer)
            skip_unless_finite(optimizer, weight.grad.isfinite().all())
            optimizer.step()
            optimizer.zero_grad()
            scaler.update()
        states.append([weight, *optimizer.state[weight].values()])
    assert all(torch.equal(plain, skipping) for plain, skipping in zip(*states, strict=True))
    assert precision == "fp32" or scaler.get_scale() == 2.0**11 / 4  # halved by each overflow


def test_layer_norm_and_biases_are_not_decayed_but_embeddings_are():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decayed, plain = decay_groups(model, 0.01)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 2), (2, 2)] and decayed["weight_decay"] == 0.01
    assert len(plain["params"]) == 3 and plain["weight_decay"] == 0


def test_schedule_is_the_product_of_decay_and_warmup():
    rates = [scheduled_rate(step, 2.0, 10, 100) for step in (0, 5, 10, 55, 99)]
    assert rates == pytest.approx([0, 2 * 0.95 * 0.5, 2 * 0.9, 2 * 0.45, 2 * 0.01])
    assert scheduled_rate(0, 2.0, 0, 100) == 0  # as the original's first step


# Files


def test_a_file_takes_its_name_only_when_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of the file ran",))


def test_damaged_and_foreign_files_are_refused_and_run_no_code(tmp_path):
    path = tmp_path / "checkpoint-7.pt"
    save(path, {"weights": torch.arange(5)})
    assert load(path)["weights"].tolist() == [0, 1, 2, 3, 4]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="can't be loaded"):
        load(path)
    torch.save({"weights": Bomb()}, path)
    with pytest.raises(InputError, match="can't be loaded"):
        load(path)
    with pytest.raises(InputError, match="can't be loaded"):
        load(tmp_path / "missing.pt")


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    for step in (9, 100, 10, "best"):
        (tmp_path / f"checkpoint-{step}.pt").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9.pt", "checkpoint-10.pt", "checkpoint-100.pt"]


def hold(path, ready):
    with locked(path):
        ready.set()
        time.sleep(60)


def test_a_lock_dies_with_its_holder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / ".lock", ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="in use by another process"), locked(tmp_path / ".lock", wait=False):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path / ".lock", wait=False):
        pass
