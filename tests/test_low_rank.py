"""Sums of changes of low rank against the dense matrices that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.reference import low_rank as reference
from trl_extras import low_rank
from trl_extras.low_rank import Factors


DTYPES = [torch.float64, torch.float32]
# Groups, outputs, inputs and ranks; the last has more rank than its matrices can have.
SHAPES = [(1, 7, 5, (2, 3, 1)), (2, 4, 9, (1, 2, 2)), (3, 3, 2, (2, 4, 3))]


def near(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-5


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def make(shape: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[Factors]:
    groups, outputs, inputs, ranks = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return [Factors(draw(groups, rank, inputs), draw(groups, outputs, rank)) for rank in ranks]


def dense(change: Factors) -> Tensor:
    return reference.dense(change.a.double(), change.b.double())


# ---- Coefficients ----


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_coefficients_are_those_of_theorem_4_1(alpha: float) -> None:
    policy: list[float] = []
    before: list[float] = []
    for t in range(1, 6):
        iterate = [*low_rank.pad(policy, t - 1), 1.0]
        expected = [reference.theorem_coefficient(t, i, alpha) for i in range(1, t + 1)]
        assert iterate == pytest.approx(expected, rel=1e-12)
        closed = [(1 - alpha ** (t + 1 - i)) / (1 - alpha) for i in range(1, t + 1)]
        assert iterate == pytest.approx(closed, rel=1e-12)
        policy, before = low_rank.extrapolate_coefficients(iterate, before, alpha), iterate


def test_three_rounds_by_hand() -> None:
    """theta_2 = W_0 + (1 + a + a^2) D_1 + (1 + a) D_2, with exact numbers."""
    alpha = 0.5
    theta_1 = low_rank.extrapolate_coefficients([1.0], [], alpha)
    assert theta_1 == [1.5]
    assert low_rank.extrapolate_coefficients([*theta_1, 1.0], [1.0], alpha) == [1 + alpha + alpha**2, 1 + alpha]


@pytest.mark.parametrize("alphas", [[0.3, 0.7, 0.1], [0.9, 0.0, 0.4]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_schedule_is_the_walk_of_the_dense_weights(alphas: list[float], dtype: torch.dtype) -> None:
    changes = make((2, 4, 9, (1, 2, 2, 3)), dtype)
    iterates, policies = reference.walk([dense(change) for change in changes], alphas)
    policy: list[float] = []
    before: list[float] = []
    for t, alpha in enumerate([*alphas, 0.0]):
        iterate = [*low_rank.pad(policy, t), 1.0]
        policy, before = low_rank.extrapolate_coefficients(iterate, before, alpha), iterate
        known = changes[: t + 1]
        assert relative(dense(low_rank.concatenate(known, iterate)), iterates[t]) < near(dtype)
        assert relative(dense(low_rank.concatenate(known, policy)), policies[t]) < near(dtype)


def test_a_pause_leaves_the_weights() -> None:
    """Alpha 0 is the iterate itself, to the bit, and a shorter vector ends in zeros on either side."""
    assert low_rank.extrapolate_coefficients([0.1, 1 / 3], [0.7], 0.0) == [0.1, 1 / 3]
    assert low_rank.extrapolate_coefficients([1.0], [1.0, 2.0], 0.5) == [1.0, -1.0]


# ---- Sums ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_concatenated_is_the_dense_sum(shape: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
    changes, coefficients = make(shape, dtype), [1.69, -0.3, 1.0]
    whole = low_rank.concatenate(changes, coefficients)
    expected = sum(c * dense(change) for c, change in zip(coefficients, changes, strict=True))
    assert whole.a.dtype == whole.b.dtype == dtype
    assert whole.a.shape[1] == whole.b.shape[2] == sum(shape[3])
    assert relative(dense(whole), expected) < near(dtype)  # type: ignore[arg-type]
    fewer = low_rank.concatenate(changes, [0.0, 2.0, 0.0])
    assert fewer.a.shape[1] == shape[3][1]
    assert relative(dense(fewer), 2 * dense(changes[1])) < near(dtype)
    nothing = low_rank.concatenate(changes, [0.0, 0.0, 0.0])
    assert nothing.a.shape == (shape[0], 0, shape[2])
    assert nothing.b.shape == (shape[0], shape[1], 0)


def test_bf16_factors_are_summed_in_float32() -> None:
    changes = [Factors(*(t.bfloat16() for t in change)) for change in make(SHAPES[0], torch.float32)]
    whole = low_rank.concatenate(changes, [1.69, 1.3, 1.0])
    expected = sum(c * dense(change) for c, change in zip([1.69, 1.3, 1.0], changes, strict=True))
    assert whole.b.dtype == torch.float32
    assert relative(dense(whole), expected) < 1e-6  # type: ignore[arg-type]


def test_concatenate_wants_a_coefficient_for_each_change() -> None:
    changes = make(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="got 3 changes and 2 coefficients"):
        low_rank.concatenate(changes, [1.0, 1.0])
    with pytest.raises(ValueError, match="got 0 changes"):
        low_rank.concatenate([], [])


# ---- Inner products ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_products_are_those_of_the_dense_changes(
    shape: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype
) -> None:
    changes = make(shape, dtype)
    matrices = [dense(change) for change in changes]
    gram = torch.zeros(3, 3, dtype=torch.float64)
    for row, first in enumerate(changes):
        for column, second in enumerate(changes):
            gram[row, column] = low_rank.inner_product(first, second)
            expected = float((matrices[row] * matrices[column]).sum())
            # float32 factors are multiplied in float64 too.
            assert float(gram[row, column]) == pytest.approx(expected, rel=1e-11, abs=1e-11)
    left, right = [1.69, -0.3], [0.0, 2.0, 1.0]
    one = 1.69 * matrices[0] - 0.3 * matrices[1]
    other = 2 * matrices[1] + matrices[2]
    assert low_rank.product_under(gram, left, right) == pytest.approx(float((one * other).sum()), rel=1e-10)


# ---- Truncation ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_truncated_is_the_dense_svd(
    shape: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype, rank: int
) -> None:
    change = low_rank.concatenate(make(shape, dtype), [1.3, 0.7, 1.0])
    matrix = dense(change)
    expected, left_out = reference.truncated(matrix, rank)
    near_change, squared_error, squared_norm = low_rank.truncate(change, rank)
    assert near_change.a.dtype == near_change.b.dtype == dtype
    # Asked for more than there is, it gives what there is.
    assert near_change.a.shape[1] == near_change.b.shape[2] <= min(rank, *matrix.shape[1:], sum(shape[3]))
    assert relative(dense(near_change), expected) < near(dtype)
    assert squared_norm == pytest.approx(float((matrix**2).sum()), rel=1e-11)
    assert squared_error == pytest.approx(left_out, rel=1e-9, abs=1e-20 * squared_norm + 1e-24)
    assert math.sqrt(squared_error) == pytest.approx(
        float((matrix - expected).norm()), rel=1e-6, abs=1e-12 * math.sqrt(squared_norm)
    )


def test_truncation_of_nothing() -> None:
    zero = Factors(torch.zeros(1, 2, 5), torch.zeros(1, 7, 2))
    change, squared_error, squared_norm = low_rank.truncate(zero, 1)
    assert squared_error == squared_norm == 0.0
    assert not dense(change).any()
