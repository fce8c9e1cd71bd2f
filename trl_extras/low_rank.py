"""
Weight changes of low rank, as LoRA has them, and sums of them; pure, torch only.

For rounds with LoRA (our derivation; the papers train full weights): every round trains a fresh adapter, the change
`D_i = s B_i A_i` of a layer, so that every iterate and every policy of a run is

    W_0 + sum_i c_i D_i

and the extrapolation of *accelerated* preference optimization (arXiv 2410.06293, equation 3.6 on the weights),
`theta_{t+1} = thetahat_{t+1} + alpha * (thetahat_{t+1} - thetahat_t)`, is one of the coefficients alone. The sum is
one change of rank at most the sum of the ranks: the A one below the other, the B, scaled by c, side by side. With a
constant alpha and adapters that start at zero, the coefficients are those of the paper's theorem 4.1,
`c_{t,i} = (1 - alpha^(t+1-i)) / (1 - alpha)`.

A change is held as its two factors, `Factors(a, b)`:

- `a`: (groups, rank, inputs) and `b`: (groups, outputs, rank), so that the change of a group is `b[g] @ a[g]`.
- A linear layer or an embedding has one group. A convolution's inputs are its channels times its kernel's places; the
  groups are those of its second factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A change of a layer's weight, `b @ a` in each group: a (groups, rank, inputs), b (groups, outputs, rank)."""

    a: Tensor
    b: Tensor


def extrapolate_coefficients(new: Sequence[float], old: Sequence[float], alpha: float) -> list[float]:
    """
    `new + alpha * (new - old)` of two coefficient vectors over the same changes; a shorter one ends in zeros.

    With `new` those of thetahat_{t+1} and `old` those of thetahat_t, the result is theta_{t+1}'s (equation 3.6).
    """
    length = max(len(new), len(old))
    padded_new, padded_old = pad(new, length), pad(old, length)
    return [n + alpha * (n - o) for n, o in zip(padded_new, padded_old, strict=True)]


def pad(coefficients: Sequence[float], length: int) -> list[float]:
    """A coefficient vector over `length` changes: those that it does not name have none of it."""
    return [*coefficients, *[0.0] * (length - len(coefficients))]


def concatenate(changes: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """
    The sum of `coefficient * change` as one change, in float32 (float64 for float64 factors).

    Args:
        changes: of one layer, at least one.
        coefficients: one each; a change with coefficient 0 adds no rank.

    Returns:
        Factors of rank `sum of the ranks`, on the first change's device; of rank 0 if every coefficient is 0.
    """
    if not changes or len(changes) != len(coefficients):
        raise ValueError(f"got {len(changes)} changes and {len(coefficients)} coefficients: give one for each.")
    first = changes[0]
    dtype = torch.float64 if first.a.dtype == torch.float64 else torch.float32
    used = [(change, c) for change, c in zip(changes, coefficients, strict=True) if c != 0]
    if not used:
        return Factors(first.a[:, :0].to(dtype), first.b[:, :, :0].to(dtype))
    # The product with the coefficient is rounded once: it is taken in float64.
    return Factors(
        torch.cat([change.a.to(first.a.device, dtype) for change, _ in used], dim=1),
        torch.cat([(change.b.to(first.b.device, torch.float64) * c).to(dtype) for change, c in used], dim=2),
    )


def inner_product(first: Factors, second: Factors) -> float:
    """
    The sum of the products of the entries of two changes of one layer, without making either: `tr((B^T B')(A' A^T))`,
    in float64.
    """
    outputs = first.b.double().transpose(1, 2) @ second.b.to(first.b.device).double()
    inputs = first.a.double() @ second.a.to(first.a.device).double().transpose(1, 2)
    return float((outputs * inputs).sum())


def product_under(gram: Tensor, left: Sequence[float], right: Sequence[float]) -> float:
    """The inner product of two sums of n changes, from their coefficients and the changes' inner products, (n, n)."""
    size = len(gram)
    vectors = [torch.tensor(pad(c, size), dtype=torch.float64) for c in (left, right)]
    return float(vectors[0] @ gram @ vectors[1])


def truncate(change: Factors, rank: int) -> tuple[Factors, float, float]:
    """
    The nearest change of at most `rank` (a group), in the Frobenius norm: the largest singular values and their
    vectors (Eckart and Young). The change itself is never made: the singular values are those of a matrix as small as
    its rank.

    Returns:
        The factors, in the change's dtype, each with the roots of the singular values; the squared norm of what is
        left out; the squared norm of the whole change.
    """
    q_b, r_b = torch.linalg.qr(change.b.double())
    q_a, r_a = torch.linalg.qr(change.a.double().transpose(1, 2))
    u, s, vh = torch.linalg.svd(r_b @ r_a.transpose(1, 2), full_matrices=False)
    roots = s[:, :rank].sqrt()
    a = (q_a @ vh.transpose(1, 2)[:, :, :rank] * roots[:, None]).transpose(1, 2)
    b = q_b @ u[:, :, :rank] * roots[:, None]
    squares = s.square()
    left_out = float(squares[:, rank:].sum())
    return (
        Factors(a.to(change.a.dtype).contiguous(), b.to(change.b.dtype).contiguous()),
        left_out,
        float(squares.sum()),
    )
