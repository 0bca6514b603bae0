"""Kernels for training in bf16 on a CPU, the one place where they are faster than PyTorch's own.

pretraining_step.py measures what each is worth, and tests compare each with the plain path of model.py. Pretraining.py and
Finetuning.py use them there and nowhere else.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model import Electra, Layer

CACHED_LOGITS = 2**19  # 2 MB in fp32
DROPOUT_RESOLUTION = 2**16  # dropout probabilities that the bf16 kernels for CPUs distinguish


def use_bf16_cpu_kernels(network: nn.Module) -> None:
    """Replaces dropout, attention, cross entropy and sampling. For training in bf16 on a CPU; elsewhere they are slower."""
    for module in network.modules():
        if isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout = CpuDropout(module.dropout.p)
        if isinstance(module, Layer):
            module.attention = CpuAttention.apply
        if isinstance(module, Electra):
            module.cross_entropy, module.sample = in_parts(module.cross_entropy), in_parts(module.sample)


def in_parts(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Applies `function` to so few rows of logits (B, K, V) at a time that their fp32 copy stays in the cache."""
    def apply(logits: Tensor, other: Tensor) -> Tensor:
        rows = max(1, CACHED_LOGITS // logits[0].numel())
        return torch.cat([function(*part) for part in zip(logits.split(rows), other.split(rows), strict=True)])
    return apply


class CpuDropout(nn.Dropout):
    """nn.Dropout with masks of 16 random bits an element, at a sixth of the cost."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept, scale = dropout_mask(x, self.p)
        return x * kept * scale


def dropout_mask(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """A mask of ones and zeros in the shape and type of `x`, and the factor by which kept elements grow.

    The probability is the nearest multiple of 1 / DROPOUT_RESOLUTION, and the factor is exact for that.
    """
    dropped_values = round(dropout * DROPOUT_RESOLUTION)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    bits = words.view(torch.int16)[:x.numel()].view(x.shape)
    kept = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(bits, dropped_values - DROPOUT_RESOLUTION // 2, out=kept)
    return kept, DROPOUT_RESOLUTION / max(1, DROPOUT_RESOLUTION - dropped_values)


class CpuAttention(torch.autograd.Function):
    """`attention` with its gradient written out: PyTorch's is slow on CPUs with dropout and keeps more copies."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, attention_mask: Tensor, dropout: float) -> Tensor:
        qkv = qkv.contiguous()
        q, k, v = qkv.flatten(1, 2)  # each (B x heads, L, H / heads)
        scores = scaled_bmm(q, k.mT, q.shape[-1] ** -0.5)  # (B x heads, L, L)
        scores.view(*qkv.shape[1:4], -1).masked_fill_(~attention_mask, -math.inf)
        weights = scores.softmax(-1)
        kept, ctx.scale = dropout_mask(weights, dropout) if dropout else (None, 1.0)
        ctx.save_for_backward(qkv, weights, kept)
        return scaled_bmm(weights if kept is None else weights * kept, v, ctx.scale).view(qkv.shape[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, weights, kept = ctx.saved_tensors
        q, k, v = qkv.flatten(1, 2)
        gradient = gradient.flatten(0, 1)
        qkv_gradient = torch.empty_like(qkv)
        q_gradient, k_gradient, v_gradient = qkv_gradient.flatten(1, 2)
        scaled_bmm((weights if kept is None else weights * kept).mT, gradient, ctx.scale, out=v_gradient)
        weights_gradient = scaled_bmm(gradient, v.mT, ctx.scale)
        if kept is not None:
            weights_gradient.mul_(kept)
        scores_gradient = torch._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
        scaled_bmm(scores_gradient, k, q.shape[-1] ** -0.5, out=q_gradient)
        scaled_bmm(scores_gradient.mT, q, q.shape[-1] ** -0.5, out=k_gradient)
        return qkv_gradient, None, None


def scaled_bmm(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor * (a @ b) in one kernel."""
    ignored = a.new_empty(())  # multiplied by beta = 0
    return torch.baddbmm(ignored, a, b, beta=0, alpha=factor, out=out)
