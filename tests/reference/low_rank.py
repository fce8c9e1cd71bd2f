"""
Slow, obvious references for rounds with LoRA: every change is made as the dense matrix that it stands for, and the
rounds are walked by adding and subtracting those.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def dense(a: Tensor, b: Tensor) -> Tensor:
    """b[g] @ a[g] for every group, entry by entry of the sum over the rank: (groups, outputs, inputs)."""
    groups, rank, inputs = a.shape
    result = torch.zeros(groups, b.shape[1], inputs, dtype=a.dtype)
    for g in range(groups):
        for r in range(rank):
            result[g] += torch.outer(b[g, :, r], a[g, r])
    return result


def theorem_coefficient(t: int, i: int, alpha: float) -> float:
    """c_{t,i} of thetahat_{t+1}, with rounds and changes counted from 1: 1 + alpha + ... + alpha^(t-i)."""
    return sum(alpha**k for k in range(t + 1 - i))


def walk(changes: Sequence[Any], alphas: Sequence[float]) -> tuple[list[Any], list[Any]]:
    """
    Equations 3.5 and 3.6 on the weights, all relative to the start: the iterates thetahat_1.. and the policies
    theta_1.., where round t has added `changes[t]` to its policy.
    """
    policy = before = changes[0] * 0
    iterates, policies = [], []
    for t, change in enumerate(changes):
        iterate = policy + change
        alpha = alphas[t] if t < len(alphas) else 0.0
        policy = iterate + alpha * (iterate - before)
        before = iterate
        iterates.append(iterate)
        policies.append(policy)
    return iterates, policies


def truncated(change: Tensor, rank: int) -> tuple[Tensor, float]:
    """The nearest matrix of at most `rank` to each of (groups, outputs, inputs), and the squared norm left out."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    s = s.clone()
    left_out = float((s[:, rank:] ** 2).sum())
    s[:, rank:] = 0
    return torch.stack([u[g] @ torch.diag(s[g]) @ vh[g] for g in range(len(change))]), left_out


def ungrouped(model: nn.Module) -> nn.Module:
    """A copy whose grouped convolutions are plain ones with zeros between the groups, where a LoRA has values."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if getattr(layer, "groups", 1) > 1:
                setattr(parent, name, _plain_convolution(layer))
    return model


def _plain_convolution(layer: Any) -> nn.Module:
    plain = type(layer)(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        bias=layer.bias is not None,
    ).to(layer.weight.dtype)
    with torch.no_grad():
        plain.weight.zero_()
        outputs, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        for g in range(layer.groups):
            rows, columns = slice(g * outputs, (g + 1) * outputs), slice(g * inputs, (g + 1) * inputs)
            plain.weight[rows, columns] = layer.weight[rows]
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def weight_change(layer: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """
    What peft's factors of a base layer add to its weight, in that weight's layout (of `ungrouped` for a convolution).
    """
    kind = type(layer).__name__
    if kind == "Conv1D":
        return scaling * (b @ a).T  # (inputs, outputs)
    if isinstance(layer, nn.Embedding):
        return scaling * (b @ a).T  # (tokens, features)
    if isinstance(layer, nn.Linear):
        return scaling * (b @ a)
    # A convolution: a is (rank, inputs, *kernel) and b (outputs, rank of a group, 1, ...).
    outputs, rank = b.shape[0] // layer.groups, a.shape[0] // layer.groups
    rows = []
    for o in range(len(b)):
        own = a[(o // outputs) * rank : (o // outputs + 1) * rank]
        rows.append(sum(b[o, r].reshape(()) * own[r] for r in range(rank)))
    return scaling * torch.stack(rows)  # type: ignore[arg-type]
