"""What every training script needs: settings, devices, processes, optimizer, schedule, crash-safe files.

Nothing here depends on text or on ELECTRA's networks.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import gc
import itertools
import math
import operator
import os
import signal
import sys
import tomllib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import numpy as np
import tomli_w
import torch
import torch.distributed.nn  # before a group exists: functions there hold the one they are imported with, also after its end
import tyro
from torch import Tensor, distributed, nn
from typeguard import TypeCheckError, check_type

Settings = TypeVar("Settings")

# Errors of the file system that the user can fix: no space, no permission, a missing folder, a failing disk.
FIXABLE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
                  errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO}
BOUNDS = {"at_least": (operator.ge, "at least"), "above": (operator.gt, "above"),
          "at_most": (operator.le, "at most"), "below": (operator.lt, "below")}
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=6)  # the other processes wait while the first one tokenizes the corpus
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


# Errors and signals

class InputError(Exception):
    """A mistake of the user; the message says what was found, what was expected and what to do."""


def one_line(error: Exception) -> str:
    """The first 300 characters of an error's message, on one line."""
    return " ".join(str(error).split())[:300]


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def reports_input_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's `main`: a mistake of the user becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    That is an InputError or an OSError that the user can fix. Programming errors keep their traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno not in FIXABLE_ERRORS:
                raise
            print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except SystemExit as stop:  # raised by tyro after --help or a flag that it can't read
            return stop.code or 0

    return wrapped


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in a list instead of letting them end the process. A second signal ends it at once.

    Under torchrun it doesn't: torchrun passes on what a queue has sent to all processes, and ends those that stay itself.
    """
    received = []

    def receive(number: int, _: Any) -> None:
        if received and "WORLD_SIZE" not in os.environ:
            os._exit(128 + number)
        received.append(signal.Signals(number))

    previous_handlers = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def iterating(loader: torch.utils.data.DataLoader) -> Iterator[Iterator]:
    """An iterator over `loader` whose worker processes never receive SIGINT or SIGTERM and end with the block.

    A queue sends them to every process, but only the training process has to answer. The workers must be ended here,
    because Python would send them SIGTERM at its exit and wait for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # new processes inherit it
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


# Settings: frozen dataclasses are the one source of names, types, defaults, help and bounds

def bounded(default: Any, **bounds: float) -> Any:
    """A dataclass field with a default and bounds: at_least, above, at_most or below a number."""
    return dataclasses.field(default=default, metadata=bounds)


def read_settings(settings_class: type[Settings], argv: list[str], default_config: Path | None = None) -> Settings:
    """Settings from the class's defaults, then the TOML file that its field `config` names (if it has one), then flags.

    `--help` shows the defaults of the class. Raises InputError for a file that can't be read, an unknown key, a value of
    the wrong type or out of bounds, and SystemExit(2) for a flag that can't be read, after printing what is wrong.
    """
    try:
        "".join(argv).encode()
    except UnicodeEncodeError:
        raise InputError("a name on the command line is not UTF-8, so it can't be saved among the settings: rename the file "
                         "or folder") from None
    default = None
    if default_config is not None and not {"-h", "--help"} & set(argv):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config", default=os.path.relpath(default_config))
        path = Path(parser.parse_known_args(argv)[0].config)
        default = from_table(settings_class, read_toml(path, f"--config {path}") | {"config": str(path)}, str(path))
    settings = tyro.cli(settings_class, args=argv, default=default)
    check_bounds(settings)
    return settings


def read_toml(path: Path, source: str, advice: str = "correct it or name another file") -> dict[str, Any]:
    """The table of a TOML file, in UTF-8 with or without a byte order mark; InputError names the `source`, with `advice`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{source} can't be read as TOML ({error}): {advice}") from None


def from_table(settings_class: type[Settings], table: dict[str, Any], source: str) -> Settings:
    """An instance of a settings class from a TOML table; InputError names the key that doesn't fit and the `source`."""
    hints = get_type_hints(settings_class)
    values = {}
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise InputError(f"{source}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if dataclasses.is_dataclass(hints[key]):
            require(isinstance(value, dict), f"{source}: expected {key} to be a table of settings, got {value!r}")
            values[key] = from_table(hints[key], value, f"{source} [{key}]")
            continue
        values[key] = tuple(value) if isinstance(value, list) else value  # TOML has no tuples
        # Python takes True for an int, settings don't.
        require(hints[key] is bool or not isinstance(value, bool), f"{source}: {key} = {value!r}: expected no true or false")
        try:
            check_type(values[key], hints[key])
        except TypeCheckError as error:
            raise InputError(f"{source}: {key} = {value!r}: {error}") from None
    return settings_class(**values)


def check_bounds(settings: Any, section: str = "") -> None:
    """Raises InputError for the first number outside the bounds of its field."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{field.name}.")
            continue
        for bound, limit in field.metadata.items():
            compare, words = BOUNDS[bound]
            inside = value is None or (math.isfinite(value) and compare(value, limit))
            require(inside, f"{section}{field.name} = {value} must be {words} {limit}")


def flat(settings: Any) -> dict[str, Any]:
    """The settings by name; those of a nested section as section.name."""
    values = {}
    for name, value in dataclasses.asdict(settings).items():
        values |= {f"{name}.{key}": nested for key, nested in value.items()} if isinstance(value, dict) else {name: value}
    return values


def to_toml(settings: Any) -> str:
    """The settings as TOML that `from_table` reads back; fields that are None are left out."""
    return tomli_w.dumps({name: value for name, value in dataclasses.asdict(settings).items() if value is not None})


# Devices and precision

class Precision(NamedTuple):
    """The number format of the forward pass under autocast; weights stay fp32."""

    name: str
    dtype: torch.dtype
    device: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, enabled for fp16 only, whose gradients would underflow without it."""
        return torch.amp.GradScaler(self.device, init_scale=2.0**11, enabled=self.dtype == torch.float16)


def pick_device(name: str) -> torch.device:
    """The device for a setting of auto, cpu or cuda. Each process that torchrun starts gets a GPU of its own."""
    require(name != "cuda" or torch.cuda.is_available(),
            "--device cuda: this machine has no usable CUDA device; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def pick_precision(name: str, device: torch.device) -> Precision:
    """auto is bf16 where the hardware computes it (V100 and T4 only emulate it), else fp16 on CUDA, else fp32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        capabilities = torch.cpu.get_capabilities()
        name = "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return Precision(name, dtype, device.type)


# Processes: one alone, or those that torchrun started

@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connects the processes that torchrun started, of which only rank 0 prints to stdout. Alone it does nothing.

    Raises InputError when another process of the group has ended.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull if rank() else sys.stdout):
            yield
            barrier()  # no process leaves while another one still communicates with it
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise InputError(f"rank {rank()} lost its connection because another process of the run has ended; its "
                             "message says why. Run the same command again to resume from the last checkpoint") from None
        raise
    finally:
        gc.collect()  # DistributedDataParallel keeps reference cycles, which would abort the process after the group
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 for a process alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_rows(rows: int) -> slice:
    """This process's share of so many rows."""
    return slice(rank() * rows // world_size(), (rank() + 1) * rows // world_size())


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    if world_size() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def gather_from_processes(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every process has come here."""
    gather_from_processes(None)


# Optimizer and schedule

class Adam(torch.optim.AdamW):
    """Adam with decoupled weight decay and without bias correction, as BERT's and ELECTRA's (G, model/optimization.py).

    torch divides the two moments by 1 - beta^step. A step counter of infinity makes both divisors exactly 1.
    """

    def __init__(self, groups: Iterable[dict], lr: float, beta2: float = 0.999):
        super().__init__(groups, lr=lr, betas=(0.9, beta2), eps=1e-6, weight_decay=0.0, fused=True)
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            self.state[parameter] = {"step": torch.tensor(math.inf, device=parameter.device),
                                     "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def skip_unless_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Makes the next step of a fused optimizer change nothing where the bool tensor `finite` () is false.

    The device decides, so that the host needn't wait for it. This is the interface that GradScaler uses.
    """
    optimizer.found_inf = 1.0 - finite.float()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and embeddings are decayed, LayerNorm and biases (one dimension) are not."""
    parameters = list(model.parameters())
    return [{"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0}]


def derived_seed(*key: int) -> int:
    """A 62-bit seed that follows from the key."""
    return int(np.random.default_rng(key).integers(1 << 62))


def scheduled_rate(step: int, base: float, warmup: int, total: int) -> float:
    """Linear decay times linear warm-up, multiplied as the original does; the first step (0) has rate 0."""
    return base * (1 - step / total) * min(1.0, step / max(1, warmup))


# Files

@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name, durably, once the block has ended without an error.

    Raises InputError if it can't be written; the previous file of that name is then still whole.
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
        if error.errno not in FIXABLE_ERRORS:
            raise
        raise InputError(f"{path} can't be written ({error.strerror}). The previous file is intact: make the folder "
                         "writable or free some space, then run the same command again") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: Path, content: dict) -> None:
    """Writes tensors and plain values as a zip file with a checksum of every part, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load(path: Path) -> dict:
    """What `save` wrote, on the CPU. Never runs code from the file; InputError for a damaged or foreign file."""
    try:
        if zipfile.is_zipfile(path):  # torch doesn't compare the checksums
            with zipfile.ZipFile(path) as file:
                damaged_part = file.testzip()
                require(damaged_part is None, f"wrong checksum of {damaged_part}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        raise InputError(f"{path} can't be loaded ({type(error).__name__}): "
                         "it is damaged or was not written by this project") from None


def checkpoints(folder: Path) -> list[Path]:
    """The files checkpoint-STEP.pt of a run folder, oldest first."""
    paths = [path for path in folder.glob("checkpoint-*.pt") if path.stem.split("-")[1].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem.split("-")[1]))


def newest_run_file(*names: str) -> Path:
    """The newest runs/*/NAME of these names; InputError if there is none."""
    paths = [path for name in names for path in Path("runs").glob(f"*/{name}")]
    require(bool(paths), f"no runs/*/{' or '.join(names)} here: train a model with python Pretraining.py, or name one with "
                         "--weights")
    return max(paths, key=lambda path: path.stat().st_mtime)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on `path` that ends with the process; InputError if it is held and `wait` is false."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise InputError(f"{path.parent} can't be written ({error.strerror}): choose another folder") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # unlike flock, not shared with workers
        except BlockingIOError:
            raise InputError(f"{path.parent} is in use by another process: wait for it or choose another folder") from None
        try:
            yield
        finally:
            if not wait and list(path.parent.iterdir()) == [path]:  # nothing came of it: leave no folder
                path.unlink()
                path.parent.rmdir()
