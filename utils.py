"""What a training script needs whatever it trains: settings, devices, optimizer, files that survive a crash, metrics.

Nothing here knows text or ELECTRA.
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import itertools
import datetime
import json
import logging
import os
import signal
import sys
import time
import tomllib
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import tyro
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch import Tensor, distributed, nn
from typeguard import TypeCheckError, check_type

Settings = TypeVar("Settings")
# What users mend, not bugs: no space, no permission, a folder that is gone, a file in the way, a device that fails
UNUSABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
            errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO}
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=6)  # for which processes wait while one tokenizes
FEISTEL_ROUNDS = 4  # the fewest that give a pseudo-random permutation (Luby and Rackoff, 1988)


class InputError(Exception):
    """A user's mistake: what was found, what was wanted, what to do."""


def reports_input_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Turns an InputError or an unusable file into one line on stderr and exit code 2, Ctrl-C into 130.

    Argument errors keep their exit code, bugs their traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except SystemExit as stop:  # tyro's, after --help or a flag it can't read
            return stop.code or 0

    return wrapped


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that gets SIGINT or SIGTERM in place of dying of it; the second signal leaves at once, with its exit code."""
    received = []

    def receive(number: int, _: Any) -> None:
        if received:
            os._exit(128 + number)
        received.append(signal.Signals(number))
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Settings


def read_settings(kind: type[Settings], argv: list[str], default_config: Path) -> Settings:
    """Settings of dataclass `kind`: its defaults, then the TOML file named by its field `config`, then flags.

    `--help` shows the dataclass's own defaults. Raises InputError for a file that can't be read or holds an unknown key
    or a value of another type, SystemExit(2) for such a flag, its message printed.
    """
    if {"-h", "--help"} & set(argv):
        return tyro.cli(kind, args=argv)
    named = [value for flag, value in itertools.pairwise(argv) if flag == "--config"]
    named += [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]
    path = Path(named[-1]) if named else Path(os.path.relpath(default_config))  # runs tell others where they were configured
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path} can't be read as TOML: {error}") from None
    return tyro.cli(kind, args=argv, default=from_table(kind, {**table, "config": str(path)}, str(path)))


def from_table(kind: type[Settings], table: dict[str, Any], source: str) -> Settings:
    """An instance of dataclass `kind` from a TOML table; InputError names the key that doesn't fit."""
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise InputError(f"{source}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise InputError(f"{source}: {key} is a table of settings, found {value!r}")
            values[key] = from_table(hints[key], value, f"{source} [{key}]")
            continue
        value = tuple(value) if isinstance(value, list) else value
        try:
            check_type(value, hints[key])
            if isinstance(value, bool) and hints[key] is not bool:  # Python's True is an int
                raise TypeCheckError("is a truth value")
        except TypeCheckError as error:
            raise InputError(f"{source}: {key} = {value!r} {error}") from None
        values[key] = value
    return kind(**values)


def flat(settings: Any) -> dict[str, Any]:
    """The settings by their names, nested ones as section.name."""
    plain = {}
    for name, value in dataclasses.asdict(settings).items():
        plain |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return plain


def to_toml(settings: Any) -> str:
    """The settings as TOML that `from_table` reads back; fields that are None are left out."""
    plain = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items() if not isinstance(value, dict)]
    for name, table in plain.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


# Devices and precision


class Precision(NamedTuple):
    """How the forward pass is computed: `dtype` under autocast; weights stay fp32."""

    name: str
    dtype: torch.dtype
    device: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, on for fp16 only: its gradients underflow without."""
        return torch.amp.GradScaler(self.device, init_scale=2.0**11, enabled=self.dtype == torch.float16)


def pick_device(name: str) -> torch.device:
    """The device, of torchrun's processes on a machine each its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable CUDA device; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def pick_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the hardware computes it (V100 and T4 only emulate it), else fp16 on CUDA, else fp32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        capabilities = torch.cpu.get_capabilities()
        name = "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return Precision(name, dtype, device.type)


# Many processes, started by torchrun; one without it


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Connects the processes that torchrun started, of which the first alone prints; does nothing for a process alone.

    InputError if another of them has ended.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
            gathered(None)  # none leaves while another still talks to it
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise InputError(f"rank {rank()} lost its connection: another process of the run has ended, its message tells "
                             "why; the same command continues from the last checkpoint") from None
        raise
    finally:
        gc.collect()  # what DistributedDataParallel's cycles keep would outlive the group, and abort the process at its end
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(rows: int) -> slice:
    """This process's part of so many rows."""
    return slice(rank() * rows // ranks(), (rank() + 1) * rows // ranks())


def total(values: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    if ranks() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def gathered(values: Any) -> list[Any]:
    """All processes' values, in the order of their ranks."""
    if ranks() == 1:
        return [values]
    found = [None] * ranks()
    distributed.all_gather_object(found, values)
    return found


# Optimizer and schedule


class Adam(torch.optim.AdamW):
    """Adam with decoupled weight decay and without bias correction, as BERT's and ELECTRA's (model/optimization.py).

    torch's fused kernel always corrects the bias; the learning rate, eps and decay it is given each step undo that
    exactly: with b1 = 1 - beta1^t and s = sqrt(1 - beta2^t), they are lr * b1 / s, eps / s and decay * s / b1.
    """

    def __init__(self, groups: Iterable[dict], lr: float, eps: float = 1e-6, weight_decay: float = 0.0):
        super().__init__(groups, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)
        # GradScaler then leaves out overflowed steps itself, before they are counted (at one host sync a step, in fp16)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group["steps"] = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        wanted = [{key: group[key] for key in ("lr", "eps", "weight_decay")} for group in self.param_groups]
        for group in self.param_groups:
            group["steps"] += 1
            beta1, beta2 = group["betas"]
            b1 = 1 - beta1 ** group["steps"]
            s = (1 - beta2 ** group["steps"]) ** 0.5
            group.update(lr=group["lr"] * b1 / s, eps=group["eps"] / s, weight_decay=group["weight_decay"] * s / b1)
        super().step()
        for group, values in zip(self.param_groups, wanted, strict=True):
            group.update(values)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and embeddings are decayed, LayerNorm and biases (one dimension) are not."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def scheduled_rate(step: int, base: float, warmup: int, total: int) -> float:
    """Linear decay times linear warm-up, multiplied as the original does; the first step (0) has rate 0."""
    return base * (1 - step / total) * min(1.0, step / max(1, warmup))


# Order without memory


def shuffled(positions: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Images (N,) of int `positions` (N,) in a random permutation of range(size) that `key` picks, in constant memory.

    A Feistel network permutes the next power of four; images beyond `size` are permuted again until they fall inside.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng(key).integers(1 << 63, size=FEISTEL_ROUNDS, dtype=np.uint64)
    images = positions.astype(np.uint64)
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():
        left, right = images[outside] >> half, images[outside] & low
        for round_key in keys:
            mixed = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)  # golden-ratio multiplicative hash
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        images[outside] = (left << half) | right
        outside = images >= size
    return images.astype(np.int64)


# Files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name, durably, once the block has ended without an error.

    InputError if it can't be written; what had the name before is then still there, whole.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise InputError(f"{path} can't be written ({error.strerror}); what was saved before is whole: mend the folder or "
                         "free some space, then run the same command") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: Path, content: dict) -> None:
    """A zip file with a CRC-32 of every part, which `load` compares."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load(path: Path) -> dict:
    """What `save` wrote, on the CPU; never runs code from the file. InputError for a damaged or foreign file."""
    try:
        if zipfile.is_zipfile(path):  # torch itself leaves the checksums out
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        raise InputError(f"{path} can't be loaded ({type(error).__name__}): it is damaged or not of this project") from None


def checkpoints(folder: Path) -> list[Path]:
    """The files checkpoint-STEP.pt of a run folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if path.stem.split("-")[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on `path` that dies with the process; InputError if it is held and `wait` is false."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise InputError(f"{path.parent} can't be written ({error.strerror}): choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"{path.parent} is in use by another process: wait for it or choose another") from None
        yield


# Metrics


class Events:
    """TensorBoard's event file of one start of a run; it voids what earlier starts wrote of step `begin` and later.

    Written at once, as metrics are. SummaryWriter would leave that to a thread, whose failures end in a traceback.
    """

    def __init__(self, folder: Path, begin: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # needless to wait for where nothing is trained
        self.path = folder / f"events.out.tfevents.{time.time():.6f}"  # TensorBoard reads them in the order of their names
        self.add([Event(file_version="brain.Event:2"),
                  Event(step=begin, session_log=SessionLog(status=SessionLog.START))])

    def write(self, step: int, scalars: dict[str, float], texts: dict[str, str]) -> None:
        """Numbers and Markdown, by their tags."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar, text
        summaries = [*itertools.starmap(scalar, scalars.items()), *itertools.starmap(text, texts.items())]
        self.add([Event(step=step, summary=summary) for summary in summaries])

    def add(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter
        with open(self.path, "ab") as file:
            for event in events:
                event.wall_time = time.time()
                RecordWriter(file).write(event.SerializeToString())


class Curve(NamedTuple):
    """A line of a panel, in matplotlib's terms."""

    label: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]


def draw(path: Path, panels: dict[str, list[Curve]], x: str, caption: str) -> None:
    """A PNG of the panels, named by their titles, in two rows over one positive quantity `x`, whose scale is logarithmic."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it tells of its font cache
    from matplotlib.figure import Figure  # a second that other commands need not wait for
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
    columns = -(-len(panels) // 2)
    figure = Figure((4.0 * columns, 6.0), dpi=72)
    margins = {"left": 0.04, "right": 0.99, "bottom": 0.12, "top": 0.95, "hspace": 0.2, "wspace": 0.15}
    grid = figure.subplots(2, columns, sharex=True, squeeze=False, gridspec_kw=margins)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for curve in curves:
            axes.plot(curve.x, curve.y, label=curve.label, **curve.style)
        axes.set(title=title, xscale="log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize="small")
    for axes in grid[1]:
        axes.set_xlabel(x)
    figure.text(0.5, 0.02, caption, ha="center", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


class Detection(NamedTuple):
    """How well scores tell positives (true) from negatives; `error` is the AUC's standard error."""

    accuracy: float
    precision: float
    recall: float
    auc: float
    error: float


def detection_metrics(labels: np.ndarray, scores: np.ndarray) -> Detection:
    """Of bool `labels` (N,) and real `scores` (N,), positive meaning true; NaN where there is only one class."""
    predicted = scores > 0
    auc = float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else float("nan")
    return Detection(float((predicted == labels).mean()), float(precision_score(labels, predicted, zero_division=0.0)),
                     float(recall_score(labels, predicted, zero_division=0.0)), auc, auc_error(auc, labels))


def auc_error(auc: float, labels: np.ndarray) -> float:
    """Standard error of an AUC (Hanley and McNeil, 1982, equation 2)."""
    positives, negatives = max(1, int(labels.sum())), max(1, int((~labels).sum()))
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc * auc) + (negatives - 1) * (q2 - auc * auc)
    return (variance / (positives * negatives)) ** 0.5
