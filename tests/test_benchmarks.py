"""The benchmarks that run where nobody watches: what they count, and that they end in time with their results written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import story
from torch import nn

from benchmarks.cuda import to_markdown
from benchmarks.launches import LaunchCounter, count_launches
from benchmarks.peers import Workload
from model import ModelConfig
from utils import Precision

ROOT = Path(__file__).parent.parent


def test_launches_are_operations_that_start_a_kernel():
    linear, x = nn.Linear(4, 4), torch.randn(3, 2, 4)
    with LaunchCounter() as counter:
        y = linear(x.flatten(0, 1)).relu().view(3, 2, 4).transpose(0, 1)
        torch.empty_like(y)
        (y.transpose(0, 1) * 2).sum()
    assert counter.launches == {"addmm": 1, "relu": 1, "mul": 1, "sum": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eager_step_of_electra_small_starts_at_most_1700_kernels(dtype):
    precision = Precision({torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], dtype, "cpu")
    launches = count_launches(Workload(ModelConfig(), 2, 128, torch.device("cpu"), precision))
    assert launches["fused_attention"] == launches["fused_attention_backward"] == 24  # layers of both networks
    assert launches["native_dropout"] == 50  # two a layer and one on each network's embeddings
    assert launches["_fused_adamw_"] == 2
    assert launches.total() <= 1700


def test_the_command_for_a_gpu_does_all_of_it_small_on_a_cpu(tmp_path):
    """Every part has a result, and none goes beyond the minutes however slow the machine is."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(story()), encoding="utf-8")
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "benchmarks/cuda.py", "--device", "cpu", "--minutes", "2", "--corpus", str(corpus),
         "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert time.monotonic() - began < 121
    parts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(parts) == ["machine", "tests", "kernels", "speed", "sizes", "training"], result.stderr
    assert not any("messages" in part for part in parts.values()), parts
    assert parts["machine"]["torch"] == torch.__version__
    assert parts["tests"]["counts"]["passed"] >= 3 and set(parts["tests"]["results"].values()) == {"passed"}
    assert parts["kernels"]["launches"] > 100
    for name in ("project, eager", "transformers, careful", "transformers, public", "matrix products"):
        assert parts["speed"][name]["tokens/s"] > 0, parts["speed"]
    assert parts["sizes"]["4 x 32, eager"]["tokens/s"] > 0
    assert parts["training"]["steps"] > 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert result.stdout.startswith("## machine") and all(f"## {name}" in table for name in parts)


def test_a_missing_gpu_is_reported_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = subprocess.run([sys.executable, "benchmarks/cuda.py", "--output", str(tmp_path)], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --device cuda") and result.stderr.count("\n") == 1


def test_results_become_tables():
    text = "\n".join(to_markdown("all", {"speed": {"ended": "late", "eager": {"tokens/s": 123456, "ms": 1.5},
                                                   "compiled": {"tokens/s": 200000}},
                                         "tests": {"counts": {"passed": 3}, "output": ["a", "b"]}}))
    assert "| | tokens/s | ms |\n|---|---|---|\n| eager | 123,456 | 1.5 |\n| compiled | 200,000 |  |" in text
    assert "| ended | late |" in text and "| passed | 3 |" in text and "```text\na\nb\n```" in text


@pytest.mark.parametrize(("command", "output"), [
    ("launches.py --layers 1 --batch 2 --precision fp32", "launches a step"),
    ("pretraining_step.py --layers 1 --hidden-size 64 --batch 2 --length 16 --pairs 1 --precision fp32 "
     "--variants careful", "careful"),
    ("fault_injection.py --parts pretraining damages inputs --kills 1 --damages 5 --inputs 5 --steps 8",
     "kills survived, pretraining: 1 of 1\ndamaged files survived: 5 of 5\nbad inputs answered: 5 of 5"),
])
def test_the_other_benchmarks_run(command, output):
    result = subprocess.run([sys.executable, *f"benchmarks/{command}".split()], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert output in result.stdout
