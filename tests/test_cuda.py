"""What has to hold on a GPU, each also run on the CPU so that the tests themselves are known to work.

    python -m pytest -m cuda     # where a GPU is
"""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import RefuseWaits, Killed, assert_same, metrics, stop_after_save
from scipy.stats import chisquare
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

import model
import Pretraining as script
from benchmarks.launches import cuda_attention, cuda_dropout
from convert.names import config_to_transformers, to_transformers
from dataset import Batch, Masked, TrainingBatches
from model import Electra, ModelConfig, gumbel_sample, sampler_draws
from Pretraining import main
from studies.tracking import RunningMeans
from utils import load

ROOT = Path(__file__).parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])])
ROWS = {"cpu": 8, "cuda": 128}  # of a step whose memory is measured
# Bytes that a step of ELECTRA-Small takes beyond weights and optimizer, for each row of 128 tokens: 18 MB in bf16 and 32 MB
# in fp32 for the layers, the rest for the logits and what is computed from them
BYTES_PER_ROW = {"bf16": 30e6, "fp32": 45e6}


@pytest.fixture(autouse=True)
def without_tf32():
    """Pretraining.py allows TF32, whose rounding would hide small errors; each test starts without it."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def begun(command, monkeypatch):
    """A run just before its first step, with its batches."""
    def begin(**flags):
        runs = []
        with monkeypatch.context() as patch:
            patch.setattr(script, "train", lambda run, *_: runs.append(run) or run.settings.steps)
            assert main(command(**flags)) == 0
        run = runs[0]
        return run, TrainingBatches(run.data.train, run.vocabulary, run.settings.max_length, run.settings.batch_size,
                                    run.settings.examples == "line", 0)
    return begin


def random_rows(config, device, B=6, L=40, K=5):
    """Rows with padding and two segments, masked at K slots, of which one is empty."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(2 * K, L + 1, (B, 1), generator=rng)
    attention_mask = torch.arange(L) < lengths
    ids = torch.randint(5, config.vocab_size, (B, L), generator=rng) * attention_mask
    segments = (torch.arange(L) >= lengths // 2).long() * attention_mask
    positions = torch.stack([torch.randperm(int(n), generator=rng)[:K] for n in lengths])
    chosen = torch.ones(B, K, dtype=torch.bool)
    chosen[1, -1] = False
    masked_ids = ids.scatter(1, positions, torch.where(chosen, 4, ids.gather(1, positions)))
    draws = sampler_draws(positions.shape, config.vocab_size, torch.device("cpu"), rng)
    return (Batch(ids.to(device), segments.to(device), attention_mask.to(device)),
            Masked(masked_ids.to(device), positions.to(device), chosen.to(device)), draws.to(device))


def peer_of(peer_class, network, config, size):
    """transformers' network with the same weights, in evaluation mode."""
    peer = peer_class(ElectraConfig(**config_to_transformers(config, size)))
    peer.load_state_dict(to_transformers(network))
    return peer.to(next(network.parameters()).device).eval()


@on_each_device
def test_losses_and_gradients_equal_those_of_transformers_in_fp32(device):
    config = ModelConfig(vocab_size=300, embedding_size=32, hidden_size=128, layers=2, heads=2, feed_forward_size=256,
                         generator_size=0.5, max_positions=64)
    electra = Electra(config)
    for weight in electra.parameters():
        weight.data += 0.1 * torch.randn_like(weight)  # far from the initial weights, so that a wrong wiring shows
    electra.to(device).eval()
    batch, masked, draws = random_rows(config, device)
    output = electra(batch, masked, draws)
    generator = peer_of(ElectraForMaskedLM, electra.generator, config, config.generator())
    discriminator = peer_of(ElectraForPreTraining, electra.discriminator, config, config.discriminator())
    discriminator.electra.embeddings = generator.electra.embeddings  # shared, as in Electra
    generator.electra.embeddings.word_embeddings.padding_idx = None  # the original's [PAD] learns when it is sampled

    given = {"attention_mask": batch.attention_mask.long(), "token_type_ids": batch.segments}
    logits = generator(input_ids=masked.ids, **given).logits
    logits = logits.gather(1, masked.positions[..., None].expand_as(output.generator_logits))
    losses = F.cross_entropy(logits.mT, batch.ids.gather(1, masked.positions), reduction="none") * masked.chosen
    torch.testing.assert_close(output.generator_losses, losses, rtol=1e-4, atol=1e-4)
    logits = discriminator(input_ids=output.corrupted_ids, **given).logits
    detection = F.binary_cross_entropy_with_logits(logits, output.replaced.float(), reduction="none")
    detection = detection * batch.attention_mask
    torch.testing.assert_close(output.discriminator_losses, detection, rtol=1e-4, atol=1e-4)

    (output.generator_losses.sum() + output.discriminator_losses.sum()).backward()
    (losses.sum() + detection.sum()).backward()
    lowest, highest = generator.electra.encoder.layer[0], discriminator.electra.encoder.layer[1]
    for own, peer in ((electra.generator.encoder.layers[0].feed_forward, lowest.intermediate.dense),
                      (electra.discriminator.encoder.layers[1].feed_forward, highest.intermediate.dense),
                      (electra.generator.encoder.embeddings.token, generator.electra.embeddings.word_embeddings)):
        assert (own.weight.grad - peer.weight.grad).norm() <= 1e-4 * peer.weight.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_each_device
def test_samples_follow_softmax(device, dtype):
    V, samples = 300, 100_000
    logits = (2 * torch.randn(V, generator=torch.Generator().manual_seed(1))).to(device, dtype)
    draws = sampler_draws((samples,), V, torch.device(device), torch.Generator(device).manual_seed(2))
    counts = torch.bincount(gumbel_sample(logits.expand(samples, V), draws), minlength=V).double().cpu()
    expected = logits.double().softmax(-1).cpu() * samples
    common = expected >= 5  # the rest is one class, as the chi-square test requires
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert chisquare(counts, expected, sum_check=False).pvalue > 1e-3


@on_each_device
def test_a_step_that_overflows_changes_nothing_but_the_loss_scale(device, begun):
    run, batches = begun(device=device, precision="fp16", steps=100)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**40})
    rng = torch.Generator(run.device)
    weights = [weight.clone() for weight in run.electra.parameters()]
    halvings, finite = 0, torch.tensor(False)
    while not finite:
        *_, finite = script.training_step(run, batches[1 + halvings], 1 + halvings, rng)
        halvings += not finite
        unchanged = all(map(torch.equal, weights, run.electra.parameters()))
        assert unchanged == (not finite) and run.scaler.get_scale() == 2.0 ** (40 - halvings)
        assert all(state["exp_avg"].isfinite().all() for state in run.optimizer.state.values())
        assert halvings < 40
    assert halvings > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@on_each_device
def test_a_resumed_run_equals_an_unbroken_run(device, precision, command, tmp_path, monkeypatch):
    flags = {"device": device, "precision": precision}
    assert main(command("unbroken", **flags)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command("broken", **flags))
    assert main(command("broken", **flags)) == 0
    unbroken, broken = (load(tmp_path / name / "checkpoint-8.pt")["electra"] for name in ("unbroken", "broken"))
    if device == "cpu":
        assert_same(unbroken, broken)
    for name, weight in unbroken.items():  # a GPU may add gradients in another order
        torch.testing.assert_close(weight, broken[name], rtol=1e-3, atol=1e-5)


@on_each_device
def test_one_process_under_torchrun_computes_what_a_plain_one_does(device, command, tmp_path):
    flags = {"device": device, "model__dropout": 0.0}  # dropout is seeded by rank
    assert main(command("plain", **flags)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run([*torchrun, "Pretraining.py", *command("group", **flags)], cwd=ROOT, capture_output=True,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert result.returncode == 0, result.stderr
    plain, group = (metrics(tmp_path / name) for name in ("plain", "group"))
    for expected, actual in zip(plain, group, strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)


@contextlib.contextmanager
def refused_waits(device):
    """CUDA reports every wait itself; on the CPU the operations that would cause one are refused."""
    if device == "cpu":
        with RefuseWaits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flags", [{"precision": "fp32"}, {"precision": "bf16"}, {"precision": "fp16"},
                                   {"precision": "bf16", "accumulate": 2}, {"precision": "bf16", "examples": "line"}])
@on_each_device
def test_a_step_never_waits_for_the_device(device, flags, begun):
    run, batches = begun(device=device, **flags)
    means, rng = RunningMeans(run.device, {}), torch.Generator(run.device)
    means.add(*script.training_step(run, batches[0], 0, rng))  # allocates the loss scale and what libraries need
    host_batches = [batches[step] for step in (1, 2)]
    if device == "cuda":
        host_batches = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in host_batches]
    with refused_waits(device):
        for step, batch in enumerate(host_batches, 1):
            means.add(*script.training_step(run, batch, step, rng))
    values = means.close()
    assert values["skipped_steps"] == 3 or math.isfinite(values["mlm_loss"])  # fp16 overflows until its scale fits


@pytest.mark.parametrize("length", [64, 128])
@on_each_device
def test_attention_has_its_gradients_where_all_scores_are_far_below_zero(device, length):
    """cuDNN's kernels, which model.py turns off, give NaN at 64 tokens; at 128 they don't."""
    qkv = torch.randn(3, 2, 2, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    qkv[0, ..., 0], qkv[1, ..., 0] = 1.0, -120 * 32**0.5
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = qkv.bfloat16().to(device, dtype).requires_grad_()
        attention_mask = (torch.arange(length, device=device) < length - 3).expand(2, 1, 1, -1)
        model.attention(inputs, attention_mask, 0.0).square().sum().backward()
        gradients.append(inputs.grad.double())
    expected, actual = gradients
    # The gradient of the first element, by which the scores are low, is a sum of large terms that cancel out.
    for name, exact, rounded in zip("qkv", expected[..., 1:], actual[..., 1:], strict=True):
        assert (exact - rounded).norm() < 0.05 * exact.norm(), name


@on_each_device
def test_a_compiled_run_learns_what_an_eager_one_does(device, command, tmp_path, monkeypatch):
    if device == "cpu":  # where Inductor takes minutes
        compile_module = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: compile_module(module, backend="aot_eager"))
    flags = {"device": device, "model__dropout": 0.0, "steps": 4}
    for name, compiled in (("eager", {}), ("compiled", {"compile": True})):
        assert main(command(name, **flags, **compiled)) == 0
    eager, compiled = (metrics(tmp_path / name) for name in ("eager", "compiled"))
    for expected, actual in zip(eager, compiled, strict=True):
        assert actual["mlm_loss"] == pytest.approx(expected["mlm_loss"], rel=1e-3)
        assert actual["disc_loss"] == pytest.approx(expected["disc_loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@on_each_device
def test_a_step_of_electra_small_fits_into_the_stated_memory(device, precision, monkeypatch):
    """On a GPU the peak of a step; on the CPU what CUDA's operations would keep for the backward pass."""
    if device == "cpu":
        monkeypatch.setattr(F, "dropout", cuda_dropout)
        monkeypatch.setattr(model, "attention", cuda_attention)
    electra = Electra(ModelConfig()).to(device).train()
    batch, masked, draws = random_rows(ModelConfig(), device, B=ROWS[device], L=128, K=19)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for _ in range(2):  # libraries allocate what they need in the first step
        electra.zero_grad()
        kept.clear()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with (torch.autocast(device, dtype, enabled=dtype != torch.float32),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)):
            output = electra(batch, masked, draws)
        (output.generator_losses.sum() + output.discriminator_losses.sum()).backward()
    if device == "cuda":
        used = torch.cuda.max_memory_allocated() - before
    else:
        weights = {weight.untyped_storage().data_ptr() for weight in electra.parameters()}
        used = sum(size for address, size in kept.items() if address not in weights)
    print(f"{used / ROWS[device] / 1e6:.1f} MB for each row of 128 tokens, {precision}, {device}")
    assert 0.5 * BYTES_PER_ROW[precision] < used / ROWS[device] < BYTES_PER_ROW[precision]
