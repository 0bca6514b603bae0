"""Kernel launches of an eager training step and the host's time for a batch: what slows a fast GPU down.

    python benchmarks/launches.py                        # ELECTRA-Small, 128 x 128 and 32 x 128 tokens, bf16
    python benchmarks/launches.py --precision fp32 --top 20

A launch is a dispatched operation that is neither a view nor a bare allocation. Without a GPU the step runs on the CPU,
with attention and dropout as CUDA dispatches them: each one operation forward and one backward.
The host's time is that of TrainingBatches for one batch, read from a token store in the file system's cache.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if not __package__:  # run as a script
    sys.path.pop(0)  # this folder: its names are those of other packages too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from benchmarks.peers import SPECIAL_IDS, Step, Workload, project_step
from dataset import Segments, Store, TrainingBatches, write_examples
from model import ModelConfig
from utils import pick_device, pick_precision

# Operations that start no kernel: allocations, and views that torch doesn't mark as such
WITHOUT_KERNEL = {"empty", "empty_like", "_unsafe_view", "detach", "alias", "_record_function_enter_new",
                  "_record_function_exit"}
STORED_EXAMPLES = 20_000  # an epoch of some hundred batches
TIMED_BATCHES = 400


class LaunchCounter(TorchDispatchMode):
    """Counts launches by the operation's name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in WITHOUT_KERNEL:
            self.launches[name] += 1
        return function(*args, **(kwargs or {}))


def count_launches(workload: Workload) -> Counter:
    """Launches of one eager step by operation, as on CUDA whatever the workload's device."""
    if workload.device.type == "cuda":
        return launches_of(project_step(workload))
    with mock.patch.object(F, "dropout", cuda_dropout), mock.patch.object(model, "attention", cuda_attention):
        return launches_of(project_step(workload, kernels="none"))


def launches_of(step: Step) -> Counter:
    step(0)  # the first step allocates what later ones reuse
    with LaunchCounter() as counter:
        step(1)
    return counter.launches


def cuda_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch.nn.functional.dropout in one operation, as CUDA has it."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def cuda_attention(qkv: Tensor, attention_mask: Tensor, dropout: float) -> Tensor:
    """Stands in for scaled_dot_product_attention: CUDA's number of operations, but no attention."""
    q, k, v = qkv
    # The operation turns a bool mask into one of the queries' type.
    zero, infinity = torch.zeros((), dtype=q.dtype), torch.full((), -torch.inf, dtype=q.dtype)
    bias = torch.where(attention_mask, zero, infinity)
    return fused_attention(q, k, v, bias.expand(-1, q.shape[1], q.shape[2], -1), dropout)


@torch.library.custom_op("benchmarks::fused_attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    return empty_with_heads_inside(q)


@torch.library.custom_op("benchmarks::fused_attention_backward", mutates_args=())
def fused_attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [empty_with_heads_inside(x) for x in (q, k, v)]


def empty_with_heads_inside(x: Tensor) -> Tensor:
    """Zeros of the shape of `x` (B, heads, L, H / heads), laid out as CUDA's kernels do: (B, L, heads, H / heads)."""
    return torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def keep_factors(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def backward_of_attention(ctx: Any, gradient: Tensor) -> tuple:
    return (*fused_attention_backward(gradient, *ctx.saved_tensors), None, None)


fused_attention.register_autograd(backward_of_attention, setup_context=keep_factors)


def batch_milliseconds(batch_size: int, length: int) -> float:
    """Median time of one batch of packed examples, on one core."""
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder) / "train", random_examples(length))
        batches = TrainingBatches(Store(Path(folder) / "train"), SPECIAL_IDS, length, batch_size, False, seed=0)
        times = []
        for step in range(TIMED_BATCHES):
            began = time.perf_counter()
            batches[step]
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def random_examples(length: int) -> Iterator[Segments]:
    """Two segments each, half to fully as long as a row, so that some padding remains."""
    rng = np.random.default_rng(0)
    for _ in range(STORED_EXAMPLES):
        pieces = rng.integers(1000, 30000, rng.integers(length // 2, length - 2)).tolist()
        middle = int(rng.integers(1, len(pieces)))
        yield pieces[:middle], pieces[middle:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32", "fp16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--top", type=int, default=8, help="operations listed")
    options = parser.parse_args()
    device = pick_device(options.device)
    for batch_size in options.batch:
        config = ModelConfig(layers=options.layers)
        workload = Workload(config, batch_size, options.length, device, pick_precision(options.precision, device))
        launches = count_launches(workload)
        most = ", ".join(f"{name} {number}" for name, number in launches.most_common(options.top))
        print(f"{options.precision}, {batch_size} x {options.length} tokens, {device}: {launches.total():,} launches a "
              f"step ({most}); {batch_milliseconds(batch_size, options.length):.2f} ms on the host for a batch")


if __name__ == "__main__":
    main()
