"""The extrapolation step of *accelerated* preference optimization, one number at a time: slow and obvious."""

import torch
from torch import Tensor


def extrapolate_exactly(new: Tensor, old: Tensor, alpha: float) -> Tensor:
    """
    theta_{t+1} = thetahat_{t+1} + alpha * (thetahat_{t+1} - thetahat_t), in Python's float64, not rounded to a dtype.
    """
    values = []
    for new_value, old_value in zip(new.flatten().tolist(), old.flatten().tolist(), strict=True):
        # An infinity minus itself is a nan.
        values.append(new_value if new_value == old_value else new_value + alpha * (new_value - old_value))
    return torch.tensor(values, dtype=torch.float64).reshape(new.shape)


def extrapolate_as_pinned(new: Tensor, old: Tensor, alpha: float) -> Tensor:
    """The roundings that trl_extras.state_dicts promises, one operation after the other on whole tensors."""
    dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
    acc = new.to(dtype)
    delta = acc - old.to(dtype)
    product = torch.tensor(alpha, dtype=dtype) * delta
    return (acc + product).to(new.dtype)


def dot_exactly(a: Tensor, b: Tensor) -> float:
    total = 0.0
    for left, right in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        total += left * right
    return total
