"""benchmarks/bf16_cpu_kernels.py: each kernel against the plain path of model.py."""

import dataclasses

import pytest
import torch
from test_model import SIZES, batch, draws_for, enlarged, joint

import model
from benchmarks.bf16_cpu_kernels import CpuAttention, CpuDropout, in_parts, dropout_mask, use_bf16_cpu_kernels
from model import Electra, attention, cross_entropy, sampler_draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_attention_and_its_gradient_equal_the_plain_ones(dtype):
    qkv = torch.randn(3, 4, 2, 19, 8, dtype=dtype).transpose(2, 3).contiguous().transpose(2, 3)  # strides as in a layer
    mask = torch.arange(19) < torch.tensor([19, 7, 1, 12])[:, None, None, None]
    weights = torch.randn(4, 2, 19, 8, dtype=dtype)
    results = []
    for compute in (CpuAttention.apply, attention):
        x = qkv.clone().requires_grad_()
        output = compute(x, mask, 0.0)
        (output * weights).sum().backward()
        results.append((output, x.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for kernel, plain in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=tolerance, atol=tolerance)


def test_cpu_attention_drops_its_weights():
    """With the mask that it drew, output and gradient are those of attention written out."""
    qkv = torch.randn(3, 2, 3, 16, 8, dtype=torch.float64)
    mask = torch.arange(16) < torch.tensor([16, 5])[:, None, None, None]
    results = []
    for written_out in (False, True):
        torch.manual_seed(5)
        x = qkv.clone().requires_grad_()
        if written_out:
            q, k, v = x
            weights = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            kept, scale = dropout_mask(weights, 0.25)
            assert 0.6 < kept.mean() < 0.9 and set(kept.unique().tolist()) == {0.0, 1.0}
            output = (weights * kept * scale) @ v
        else:
            output = CpuAttention.apply(x, mask, 0.25)
        output.square().sum().backward()
        results.append((output, x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_dropout_keeps_its_share_at_its_scale_forward_and_backward(dtype):
    torch.manual_seed(1)
    x = torch.ones(1_000_003, dtype=dtype, requires_grad=True)
    layer = CpuDropout(0.1)
    output = layer(x)
    output.sum().backward()
    kept = output > 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=5 * (0.09 / x.numel()) ** 0.5)
    pairs = (kept[1:] & kept[:-1]).double().mean().item()
    assert pairs == pytest.approx(0.81, abs=0.002)  # neighbours are independent
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / 0.9), rtol=1e-5, atol=0)
    assert torch.equal(x.grad, output)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [2, 37, 30522])
def test_cross_entropy_and_sampler_are_the_same_row_in_parts(dtype, V):
    logits, ids = (3 * torch.randn(5, 14, V)).to(dtype), torch.randint(V, (5, 14))
    draws = sampler_draws((5, 14), V, logits.device)
    assert torch.equal(in_parts(model.gumbel_sample)(logits, draws), model.gumbel_sample(logits, draws))
    weights, results = torch.rand(5, 14), []
    for function in (in_parts(cross_entropy), cross_entropy):
        x = logits.clone().requires_grad_()
        losses = function(x, ids)
        (losses * weights).sum().backward()
        results.append((losses, x.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_step_with_the_cpu_kernels_equals_the_plain_step():
    """Without dropout, whose masks differ: losses, samples and every gradient, in bf16."""
    config = dataclasses.replace(SIZES[0], dropout=0.0)
    given, results = batch(config), []
    for kernels in (False, True):
        torch.manual_seed(0)
        electra = enlarged(Electra(config)).train()
        if kernels:
            use_bf16_cpu_kernels(electra)
            assert all(layer.attention == CpuAttention.apply for layer in electra.discriminator.encoder.layers)
        with torch.autocast("cpu", torch.bfloat16):
            output = joint(electra, *given, draws_for(given[-1], config))
        (output.generator_losses.sum() + output.discriminator_losses.sum()).backward()
        results.append((output, {name: weight.grad for name, weight in electra.named_parameters()}))
    (plain, plain_gradients), (fast, fast_gradients) = results
    assert (plain.sampled_ids == fast.sampled_ids).float().mean() > 0.9  # rounding may tip a close draw
    torch.testing.assert_close(plain.generator_losses, fast.generator_losses, rtol=0.05, atol=0.05)
    total = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        assert (gradient - fast_gradients[name]).norm() <= 0.1 * gradient.norm() + 0.01 * total, name
