"""SPO's parts against slow ones: the gap, the losses, the inner level, the configuration, the SFT rows."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.reference import spo as slow
from trl_extras import SPOConfig
from trl_extras.errors import ConfigurationError
from trl_extras.spo import inner, losses, objective, sft_data
from trl_extras.spo.sft_data import SFTRows, load_rows
from trl_extras.spo.trainer import SPOTrainer


# Uneven, and two responses without a token.
LENGTHS = (5, 1, 0, 7, 3, 0, 2, 9)
DTYPES = (torch.float64, torch.float32)
# Relative, and absolute on numbers around 1.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}


def draw(seed: int, lengths: Sequence[int] = LENGTHS) -> list[list[float]]:
    """Log-probabilities of the tokens of responses; of a number that float32 holds, so that both dtypes see one."""
    draws = random.Random(seed)
    return [[-draws.randrange(1, 4096) / 1024 for _ in range(length)] for length in lengths]


def padded(responses: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, (N, T), a leaf with a gradient; their sums and their numbers, (N,)."""
    width = max(len(response) for response in responses)
    mask = torch.tensor([[i < len(response) for i in range(width)] for response in responses])
    values = torch.tensor([[*response, *[0.0] * (width - len(response))] for response in responses], dtype=dtype)
    leaf = values.requires_grad_()
    return leaf, (leaf * mask).sum(dim=1), mask.sum(dim=1)


def assert_gradient(leaf: Tensor, expected: Sequence[Sequence[float]]) -> None:
    assert leaf.grad is not None
    bound = ROUNDING[leaf.dtype]
    for row, wanted in zip(leaf.grad.tolist(), expected, strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, rel=bound, abs=bound)
        # Padding is nobody's.
        assert not any(row[len(wanted) :])


def close(value: float, dtype: torch.dtype) -> Any:
    return pytest.approx(value, rel=ROUNDING[dtype], abs=ROUNDING[dtype])


# ---- objective.py ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nll_per_token_is_the_slow_one(dtype: torch.dtype) -> None:
    responses = draw(0)
    leaf, log_probs, tokens = padded(responses, dtype)
    nll = objective.nll_per_token(log_probs, tokens)
    assert nll.dtype == dtype
    assert nll.tolist() == close([slow.nll_per_token(response) for response in responses], dtype)
    assert nll[2] == 0
    nll.sum().backward()
    assert_gradient(leaf, [slow.nll_per_token_gradient(response) for response in responses])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimum", ["reference", 0.0, 1.25, 2.5])
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_example_gap_is_the_slow_one(dtype: torch.dtype, optimum: Any, tolerance: float) -> None:
    active = []
    for seed in range(4):
        responses, references = draw(seed), draw(seed + 100)
        floor: Any = references if optimum == "reference" else optimum
        leaf, log_probs, tokens = padded(responses, dtype)
        _, ref_log_probs, _ = padded(references, dtype)
        ours = objective.nll_per_token(ref_log_probs.detach(), tokens) if optimum == "reference" else optimum
        gap = objective.example_gap(objective.nll_per_token(log_probs, tokens), ours, tolerance)
        assert gap.item() == close(slow.example_gap(responses, floor, tolerance), dtype)
        gap.backward()
        wanted = slow.example_gap_gradient(responses, floor, tolerance)
        assert_gradient(leaf, wanted)
        active += [any(tokens) for tokens in wanted if tokens]
    # With and without a pull, but for a floor that nothing reaches.
    assert any(active)
    assert optimum == 0.0 or not all(active)


@pytest.mark.parametrize("tolerance", [0.0, 0.25])
def test_at_the_floor_and_inside_it_the_gradient_is_exactly_zero(tolerance: float) -> None:
    """Numbers that a sum does not round: the first row is at the floor to the bit, the last by one ulp below it."""
    optimum = torch.tensor([1.5, 1.5, 1.5, 1.5])
    at = 1.5 + tolerance
    nll = torch.tensor(
        [at, at - 0.5, 0.0, float(torch.nextafter(torch.tensor(at), torch.tensor(9.0)))], requires_grad=True
    )
    gap = objective.example_gap(nll, optimum, tolerance)
    assert 0 < gap.item() < 1e-6
    gap.backward()
    assert nll.grad is not None
    assert nll.grad.tolist() == [0, 0, 0, 0.25]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_policy_that_is_the_reference_is_not_pushed(dtype: torch.dtype) -> None:
    leaf, log_probs, tokens = padded(draw(3), dtype)
    floor = objective.nll_per_token(log_probs.detach(), tokens)
    gap = objective.example_gap(objective.nll_per_token(log_probs, tokens), floor, 0.0)
    assert gap.item() == 0
    gap.backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


SPLITS = ((4,), (2, 2), (1, 1, 1, 1), (3, 1), (1, 2, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_mean_over_micro_batches_is_the_excess_of_the_whole(
    split: tuple[int, ...], tolerance: float, dtype: torch.dtype
) -> None:
    for seed, lengths in enumerate([(5, 1, 0, 7), (9, 2, 3, 4), (0, 0, 1, 8)]):
        responses, references = draw(seed, lengths), draw(seed + 50, lengths)
        wanted = slow.batch_excess(responses, references, tolerance)
        gradient = slow.batch_excess_gradient(responses)

        leaf, log_probs, tokens = padded(responses, dtype)
        _, ref_log_probs, _ = padded(references, dtype)
        whole = objective.batch_excess(-log_probs.sum(), -ref_log_probs.detach().sum(), tokens.sum(), tolerance)
        assert whole.item() == close(wanted, dtype)
        whole.backward()
        assert_gradient(leaf, gradient)

        leaf, log_probs, tokens = padded(responses, dtype)
        parts = [
            objective.batch_part(-own.sum(), -ref.sum(), tokens.sum(), tolerance, len(split))
            for own, ref in zip(log_probs.split(split), ref_log_probs.detach().split(split), strict=True)
        ]
        mean = torch.stack(parts).mean()
        assert mean.item() == close(wanted, dtype)
        mean.backward()
        assert_gradient(leaf, gradient)


def test_a_batch_without_tokens_has_an_excess_of_minus_the_tolerance() -> None:
    nothing, none = torch.tensor(0.0), torch.tensor(0)
    assert float(objective.batch_excess(nothing, nothing, none, 0.25)) == -0.25
    assert float(objective.batch_part(nothing, nothing, none, 0.25, 4)) == -0.25


def test_the_hinge_of_a_sum_is_not_the_sum_of_hinges() -> None:
    """Two responses of two tokens, one half a nat per token below its floor, one a nat above: nothing to push."""
    responses, references = [[-1.5, -1.5], [-1.0, -1.0]], [[-1.0, -1.0], [-2.0, -2.0]]
    leaf, log_probs, tokens = padded(responses, torch.float64)
    _, ref_log_probs, _ = padded(references, torch.float64)
    excess = objective.batch_excess(-log_probs.sum(), -ref_log_probs.detach().sum(), tokens.sum(), 0.0)
    parts = [
        objective.batch_part(-own, -ref, tokens.sum(), 0.0, 2)
        for own, ref in zip(log_probs, ref_log_probs.detach(), strict=True)
    ]
    assert excess.relu() == 0
    assert torch.stack(parts).mean().relu() == 0
    assert torch.stack(parts).relu().mean() == 0.25
    gap = objective.example_gap(
        objective.nll_per_token(log_probs, tokens), objective.nll_per_token(ref_log_probs.detach(), tokens), 0.0
    )
    assert gap == 0.25
    gap.backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[-0.25, -0.25], [0, 0]]


@pytest.mark.parametrize(
    ("preference", "penalty", "share"),
    [(3.0, 1.0, 0.25), (-3.0, 1.0, 0.25), (0.0, 2.0, 1.0), (2.0, 0.0, 0.0), (0, 0, 0)],
)
def test_the_penaltys_share(preference: float, penalty: float, share: float) -> None:
    assert objective.penalty_share(preference, penalty) == share


# ---- losses.py ----

PAIRS = ((5, 3), (1, 8), (0, 4), (6, 0), (7, 7), (2, 1))


def draw_pairs(seed: int) -> tuple[list[list[float]], ...]:
    """Chosen and rejected responses, and both under the reference."""
    chosen, rejected = zip(*PAIRS, strict=True)
    lengths = (chosen, rejected, chosen, rejected)
    return tuple(draw(10 * seed + number, length) for number, length in enumerate(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.5), (2.0, 0.5), (2.5, 1.4), (2.0, 0.0)])
def test_simpo_is_the_slow_one(beta: float, gamma: float, dtype: torch.dtype) -> None:
    chosen, rejected, _, _ = draw_pairs(0)
    chosen_leaf, chosen_sums, chosen_tokens = padded(chosen, dtype)
    rejected_leaf, rejected_sums, rejected_tokens = padded(rejected, dtype)
    loss = losses.simpo_loss(chosen_sums, rejected_sums, chosen_tokens, rejected_tokens, beta, gamma)
    pairs = list(zip(chosen, rejected, strict=True))
    assert loss.tolist() == close([slow.simpo(*pair, beta, gamma) for pair in pairs], dtype)
    loss.sum().backward()
    gradients = [slow.simpo_gradient(*pair, beta, gamma) for pair in pairs]
    assert_gradient(chosen_leaf, [own for own, _ in gradients])
    assert_gradient(rejected_leaf, [own for _, own in gradients])


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (0.1, 1.6)])
def test_simpo_is_trls(beta: float, gamma: float) -> None:
    """From logits on: TRL's average of log-probabilities, TRL's loss, and the gradients by the logits."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    stand_in = SimpleNamespace(
        alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (8, 7), generator=generator)
    for row, first in enumerate((1, 3, 5, 2, 4, 1, 6, 2)):
        labels[row, :first] = -100

    theirs = logits.clone().requires_grad_()
    averages = trainer.get_batch_logps(theirs, labels, average_log_prob=True)
    their_loss, _, _ = trainer.cpo_loss(stand_in, *averages.chunk(2))
    their_loss.mean().backward()

    ours = logits.clone().requires_grad_()
    mask = labels[:, 1:] != -100
    tokens = ours[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    sums, counts = (tokens * mask).sum(dim=1), mask.sum(dim=1)
    loss = losses.simpo_loss(*sums.chunk(2), *counts.chunk(2), beta, gamma)
    loss.mean().backward()

    torch.testing.assert_close(loss, their_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert theirs.grad is not None
    assert theirs.grad.abs().max() > 1e-3


def test_simpo_of_equal_averages_is_that_of_its_margin() -> None:
    chosen, rejected = torch.tensor([-6.0, -1.5]), torch.tensor([-2.0, -4.5])
    loss = losses.simpo_loss(chosen, rejected, torch.tensor([3, 1]), torch.tensor([1, 3]), beta=2.0, gamma=0.75)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(0.75))] * 2, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("beta", "penalty"), [(0.1, 50.0), (0.3, 0.5), (0.5, 0.0)])
def test_dpop_is_the_slow_one(beta: float, penalty: float, dtype: torch.dtype) -> None:
    lost = set()
    for seed in range(3):
        responses = draw_pairs(seed)
        (chosen_leaf, chosen, _), (rejected_leaf, rejected, _), (_, ref_chosen, _), (_, ref_rejected, _) = (
            padded(part, dtype) for part in responses
        )
        loss = losses.dpop_loss(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(), beta, penalty)
        rows = list(zip(*responses, strict=True))
        assert loss.tolist() == close([slow.dpop(*row, beta, penalty) for row in rows], dtype)
        loss.sum().backward()
        gradients = [slow.dpop_gradient(*row, beta, penalty) for row in rows]
        assert_gradient(chosen_leaf, [own for own, _ in gradients])
        assert_gradient(rejected_leaf, [own for _, own in gradients])
        lost |= {bool(value) for value in (chosen < ref_chosen)}
    # Some pairs have lost chosen probability and some have not.
    assert lost == {True, False}


def test_dpop_without_a_penalty_is_dpo() -> None:
    responses = draw_pairs(1)
    loss = losses.dpop_loss(*(padded(part, torch.float64)[1] for part in responses), beta=0.3, penalty=0.0)
    wanted = [slow.dpo(*row, 0.3) for row in zip(*responses, strict=True)]
    assert loss.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 50.0])
def test_dpop_at_the_start_is_ln_2_with_dpos_gradient(penalty: float) -> None:
    """The positive term has no slope where nothing is lost yet."""
    chosen_leaf, chosen, _ = padded(draw(0), torch.float64)
    rejected_leaf, rejected, _ = padded(draw(1), torch.float64)
    loss = losses.dpop_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1, penalty=penalty)
    assert loss.tolist() == pytest.approx([math.log(2)] * len(LENGTHS), rel=1e-12)
    loss.sum().backward()
    assert_gradient(chosen_leaf, [[-0.05] * length for length in LENGTHS])
    assert_gradient(rejected_leaf, [[0.05] * length for length in LENGTHS])


# ---- inner.py ----


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.detach().flatten().double() for tensor in tensors])))


def difference(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> float:
    """|left - right| / |right|."""
    return norm([a - b for a, b in zip(left, right, strict=True) if a is not None]) / norm(right)


def gradient_of(loss: slow.Loss, weights: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(weights), weights))


SENTENCES = torch.tensor([[1, 4, 2, 7, 0, 3], [5, 5, 1, 0, 6, 2], [3, 7, 7, 1, 2, 4], [6, 0, 4, 4, 5, 1]])


def log_probs_of(weights: Sequence[Tensor], rows: Tensor) -> Tensor:
    """A language model in one line: what comes after a token, from its embedding through one hidden layer."""
    embedding, hidden, head = weights
    logits = torch.tanh(embedding[rows[:, :-1]] @ hidden) @ head
    return logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0].sum(dim=1)


def lower_loss(weights: Sequence[Tensor]) -> Tensor:
    rows = SENTENCES[:3]
    return -log_probs_of(weights, rows).sum() / (rows.size(0) * (rows.size(1) - 1))


def upper_loss(weights: Sequence[Tensor]) -> Tensor:
    """DPO on the first two rows against the last two, and a floor that all four are below."""
    log_probs = log_probs_of(weights, SENTENCES)
    chosen, rejected = log_probs.chunk(2)
    preference = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    return preference + torch.relu(-log_probs / 5 - 0.1).mean()


def small_weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 4), (4, 5), (5, 8))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def test_a_step_is_the_weights_less_rate_times_gradient() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights, gradients = small_weights(dtype), [torch.rand(8, 4), None, torch.rand(5, 8).double()]
        before = inner.copies(weights)
        identities = [weight.data_ptr() for weight in weights]
        inner.step_(weights, gradients, 0.25)
        assert [weight.data_ptr() for weight in weights] == identities
        assert torch.equal(weights[1], before[1])
        for weight, old, gradient in ((weights[0], before[0], gradients[0]), (weights[2], before[2], gradients[2])):
            assert gradient is not None
            for new, was, slope in zip(
                *(t.flatten().tolist() for t in (weight, old, gradient.to(dtype))), strict=True
            ):
                # The rate is a power of two: one rounding, of the difference.
                assert new == float(torch.tensor(was - 0.25 * slope, dtype=torch.float64).to(dtype))


def test_a_gradient_short_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        inner.step_(small_weights(), [None, None], 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restored_weights_are_the_saved_bits_where_arithmetic_would_round(dtype: torch.dtype) -> None:
    weights = small_weights(dtype)
    gradients = [torch.rand_like(weight) for weight in weights]
    before = [weight.detach().clone() for weight in weights]
    saved = inner.copies(weights)
    identities = [weight.data_ptr() for weight in weights]
    inner.step_(weights, gradients, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(saved, before, strict=True))
    inner.step_(weights, gradients, -0.1)
    assert not all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    inner.restore_(weights, saved)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert [weight.data_ptr() for weight in weights] == identities
    assert all(weight.requires_grad and weight.is_leaf for weight in weights)


@pytest.mark.parametrize(("radius", "bound"), [(None, 1e-6), (3e-5, 1e-8)], ids=["rule", "wider"])
def test_hessian_vector_is_that_of_autograd(radius: float | None, bound: float) -> None:
    """Measured: 6e-8 at the radius that the rule gives in float64, where rounding rules; 1e-9 at a wider one."""
    weights = small_weights()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        vector = [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights]
        products = inner.hessian_vector(
            weights,
            vector,
            lambda: gradient_of(lower_loss, weights),
            inner.difference_radius(weights, vector) if radius is None else radius / norm(vector),
        )
        wanted = slow.hessian_vector(lower_loss, weights, vector)
        assert norm(wanted) > 0.01
        assert difference(products, wanted) < bound


def test_hessian_vector_of_a_quadratic_is_its_matrix() -> None:
    """No error but rounding, whatever the radius; and None is a gradient of zero, or a vector of zero."""
    matrix = torch.tensor([[2.0, 1.0], [1.0, -3.0]], dtype=torch.float64)
    theta, rest = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    vector = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for radius in (0.01, 1.0):
        products = inner.hessian_vector([theta, rest], [vector, None], lambda: [matrix @ theta, None], radius)
        assert products[1] is None
        assert products[0] is not None
        assert products[0].tolist() == pytest.approx([4.0, -5.0], rel=1e-12)


def tiny_llama(seed: int) -> tuple[list[Tensor], slow.Loss, Callable[[], list[Tensor]], list[Tensor]]:
    """A Llama in float32: its weights, the lower loss of any weights, its gradient at the live ones, and a v."""
    # Eager attention has a second derivative.
    model = tiny.make_model(seed=seed, attn_implementation="eager").eval()
    names, weights = zip(*model.named_parameters(), strict=True)
    # No padding token: of that, an embedding's gradient is not its derivative.
    rows = torch.randint(5, 64, (6, 9), generator=torch.Generator().manual_seed(seed))

    def nll(at: Sequence[Tensor], ids: Tensor) -> Tensor:
        logits = functional_call(model, dict(zip(names, at, strict=True)), kwargs={"input_ids": ids}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def upper(at: Sequence[Tensor]) -> Tensor:
        return -torch.nn.functional.logsigmoid(nll(at, rows[3:]) - nll(at, rows[:3])) + nll(at, rows[2:4])

    def lower(at: Sequence[Tensor]) -> Tensor:
        return nll(at, rows[:3])

    return list(weights), lower, lambda: gradient_of(lower, weights), gradient_of(upper, weights)


@pytest.mark.parametrize("seed", range(5))
def test_hessian_vector_of_a_llama_in_float32(seed: int) -> None:
    """Measured: 8e-5 to 1.2e-4, along the upper level's gradient, which is where the trainer looks."""
    weights, lower, gradient, vector = tiny_llama(seed)
    products = inner.hessian_vector(weights, vector, gradient, inner.difference_radius(weights, vector))
    assert difference(products, slow.hessian_vector(lower, weights, vector)) < 1e-3


def test_the_radius_scales_with_the_vector_and_the_coarsest_weight() -> None:
    weights = small_weights()
    vector: list[Tensor | None] = [torch.ones(8, 4), None, torch.ones(5, 8)]
    radius = inner.difference_radius(weights, vector)
    doubled = [None if part is None else 2 * part for part in vector]
    assert inner.difference_radius(weights, doubled) == pytest.approx(radius / 2)
    coarse = [weights[0], weights[1].detach().float(), weights[2]]
    assert inner.difference_radius(coarse, vector) > 10 * radius
    assert inner.difference_radius([weight.detach() * 10 for weight in weights], vector) > radius
    assert inner.difference_radius(weights, [torch.zeros(8, 4), None, None]) == 0
    assert inner.difference_radius(weights, [None, None, None]) == 0


def test_without_a_radius_nothing_moves_and_nothing_is_asked() -> None:
    def never() -> list[Tensor | None]:
        raise AssertionError

    weights = small_weights()
    assert inner.hessian_vector(weights, [torch.zeros_like(w) for w in weights], never, 0.0) == [None, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_come_back_to_the_bit_after_a_look_ahead_and_one_behind(dtype: torch.dtype) -> None:
    weights = small_weights(dtype)
    before = [weight.detach().clone() for weight in weights]
    vector = [torch.rand_like(weight) for weight in weights]
    seen: list[list[Tensor]] = []

    def gradient() -> list[Tensor]:
        seen.append([weight.detach().clone() for weight in weights])
        return gradient_of(lower_loss, weights)

    inner.hessian_vector(weights, vector, gradient, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert all(weight.grad is None for weight in weights)
    ahead, behind = seen
    for at, sign in ((ahead, 0.01), (behind, -0.01)):
        for now, was, along in zip(at, before, vector, strict=True):
            torch.testing.assert_close(now, was + sign * along, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_to_the_bit_when_the_gradient_fails(failing: int, error: type[BaseException]) -> None:
    weights = small_weights(torch.float32)
    before = [weight.detach().clone() for weight in weights]
    calls = itertools.count(1)

    def gradient() -> list[Tensor]:
        if next(calls) == failing:
            raise error("out of memory")
        return gradient_of(lower_loss, weights)

    with pytest.raises(error, match="out of memory"):
        inner.hessian_vector(weights, [torch.rand_like(weight) for weight in weights], gradient, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def hypergradient(
    lower: slow.Loss, upper: slow.Loss, weights: list[Tensor], rate: float, steps: int = 1, exact: bool = True
) -> list[Tensor]:
    """With the parts that the trainer puts together, and its own correction of the gradient."""
    saved = inner.copies(weights)
    for _ in range(steps):
        inner.step_(weights, gradient_of(lower, weights), rate)
    for weight, gradient in zip(weights, gradient_of(upper, weights), strict=True):
        weight.grad = gradient
    inner.restore_(weights, saved)
    if exact:
        stand_in: Any = SimpleNamespace(
            _lower_gradient=lambda model, window, weights: gradient_of(lower, weights),
            args=SimpleNamespace(inner_rate=rate, bf16=False),
        )
        SPOTrainer._correct_gradient(stand_in, None, None, weights)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(weights, saved, strict=True))
    found = [weight.grad.clone() for weight in weights if weight.grad is not None]
    for weight in weights:
        weight.grad = None
    return found


@pytest.mark.parametrize("rate", [0.03, 0.3, 1.0])
def test_the_hypergradient_is_the_gradient_through_the_inner_step(rate: float) -> None:
    weights = small_weights()
    wanted = slow.hypergradient(lower_loss, upper_loss, weights, rate)
    first = slow.hypergradient(lower_loss, upper_loss, weights, rate, exact=False)
    # What is left out by the first order is a good deal more than the bound.
    assert difference(first, wanted) > 1e-3
    assert difference(hypergradient(lower_loss, upper_loss, weights, rate), wanted) < 1e-7
    assert difference(hypergradient(lower_loss, upper_loss, weights, rate, exact=False), first) < 1e-12


def test_the_first_order_goes_through_several_steps() -> None:
    weights = small_weights()
    wanted = slow.hypergradient(lower_loss, upper_loss, weights, 0.3, steps=3, exact=False)
    assert difference(hypergradient(lower_loss, upper_loss, weights, 0.3, steps=3, exact=False), wanted) < 1e-12


def test_the_hypergradient_without_a_rate_is_the_gradient() -> None:
    weights = small_weights()
    wanted = gradient_of(upper_loss, weights)
    for exact in (False, True):
        found = hypergradient(lower_loss, upper_loss, weights, 0.0, exact=exact)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_first_order_and_the_exact_hypergradient_agree_as_the_rate_goes_to_zero() -> None:
    """With an error in proportion to it: half the rate, half the difference."""
    weights = small_weights()
    apart = []
    for halvings in range(6):
        rate = 0.02 / 2**halvings
        first, exact = (hypergradient(lower_loss, upper_loss, weights, rate, exact=way) for way in (False, True))
        apart.append(norm([a - b for a, b in zip(first, exact, strict=True)]))
    ratios = [before / after for before, after in itertools.pairwise(apart)]
    assert ratios == pytest.approx([2.0] * 5, rel=0.03)
    assert abs(ratios[-1] - 2) < abs(ratios[0] - 2)


# ---- config.py ----

NAN, INF = math.nan, math.inf
UNROLLED: dict[str, Any] = {"bilevel_solver": "unrolled"}
NUMBER = "a finite number of at least 0"
WHOLE = "a whole number of at least 1"
FLOOR = "'reference' or a finite number of at least 0"
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

# What is given; the field that the message begins with; what it got and what it wants.
REFUSALS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"bilevel_solver": "pennalty"}, "bilevel_solver", ("'pennalty'", "'penalty', 'unrolled', 'alternating'")),
    ({"bilevel_solver": None}, "bilevel_solver", ("None", "'penalty', 'unrolled', 'alternating'")),
    ({"hinge": "sample"}, "hinge", ("'sample'", "'example', 'batch'")),
    ({"hypergradient": "exact"}, "hypergradient", ("'exact'", "'first_order', 'central_difference'")),
    ({"lower_level": "sft"}, "lower_level", ("'sft'", "'chosen', 'sft_dataset', 'both'")),
    *(
        ({name: value, **others}, name, (f"`{name}` is {value!r}", NUMBER))
        for name, others in (
            ("sft_coef", {}), ("sft_tolerance", {}), ("inner_learning_rate", UNROLLED),
            ("dpop_lambda", {"loss_type": "dpop"}),
        )
        for value in (-0.5, NAN, INF, "much", True)
    ),
    *(
        ({"simpo_gamma": value, "loss_type": "simpo"}, "simpo_gamma", (f"is {value!r}", "a finite number"))
        for value in (NAN, -INF, "wide", None)
    ),
    *(({"inner_steps": value, **UNROLLED}, "inner_steps", (f"is {value!r}", WHOLE)) for value in (0, -1, True, 1.5)),
    *(({"sft_batch_size": value}, "sft_batch_size", (f"is {value!r}", WHOLE)) for value in (0, -2, True, 2.0)),
    *(
        ({"sft_optimum": value}, "sft_optimum", (f"is {value!r}", FLOOR, "nats per token"))
        for value in ("refrence", NAN, -1, "-1", INF, None, True)
    ),
    # Options of one loss with another.
    ({"dpop_lambda": 5.0}, "dpop_lambda", ("5.0", "`loss_type='dpop'`", "['sigmoid']")),
    ({"dpop_lambda": 5.0, "loss_type": "simpo"}, "dpop_lambda", ("5.0", "`loss_type='dpop'`", "['simpo']")),
    ({"simpo_gamma": 1.4}, "simpo_gamma", ("1.4", "`loss_type='simpo'`", "['sigmoid']")),
    ({"simpo_gamma": 1.4, "loss_type": ["ipo", "dpop"]}, "simpo_gamma", ("1.4", "'simpo'", "['ipo', 'dpop']")),
    # The inner level.
    (
        {"hypergradient": "central_difference", "inner_steps": 2, **UNROLLED},
        "inner_steps", ("is 2", "hypergradient='central_difference'", "`inner_steps=1`"),
    ),
    (
        {"hypergradient": "central_difference", "bilevel_solver": "alternating"},
        "hypergradient", ("'central_difference'", "`bilevel_solver='unrolled'`", "'alternating'"),
    ),
    (
        {"hypergradient": "central_difference"},
        "hypergradient", ("'central_difference'", "`bilevel_solver='unrolled'`", "'penalty'"),
    ),
    ({"inner_steps": 2}, "inner_steps", ("is 2", "`bilevel_solver='penalty'`", "'unrolled' or 'alternating'")),
    ({"inner_learning_rate": 0.1}, "inner_learning_rate", ("is 0.1", "`bilevel_solver='penalty'`", "leave it out")),
    *(
        ({**given, "bilevel_solver": solver}, field, (f"`bilevel_solver='{solver}'`", *parts))
        for solver in ("unrolled", "alternating")
        for given, field, parts in (
            ({"fp16": True}, "fp16=True", ("`bf16=True` or float32",)),
            ({"optim": "lomo"}, "optim='lomo'", ("use another one",)),
            ({"optim": "adalomo"}, "optim='adalomo'", ("use another one",)),
            (
                {"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]},
                "optim='galore_adamw_layerwise'", ("use another one",),
            ),
            (REENTRANT, "gradient_checkpointing_kwargs={'use_reentrant': True}", ("leave it at False",)),
        )
    ),
    # Of DPO's own.
    ({"ld_alpha": 0.5}, "ld_alpha", ("is 0.5", "leave it out")),
    ({"sync_ref_model": True}, "sync_ref_model=True", ("the floor", "leave it out")),
    *(
        ({**given, "loss_type": loss}, field, (f"`loss_type='{loss}'`", *parts))
        for loss in ("simpo", "dpop")
        for given, field, parts in (
            ({"use_weighting": True}, "use_weighting", ("is True", "TRL's own losses")),
            ({"f_divergence_type": "js_divergence"}, "f_divergence_type", ("is 'js_divergence'",)),
        )
    ),
    ({"label_smoothing": 0.1, "loss_type": "simpo"}, "label_smoothing", ("is 0.1", "['simpo']", "leave it out")),
    ({"loss_type": "simop"}, "loss_type", ("'simop'", "did you mean 'simpo'?")),
    ({"loss_type": ["sigmoid", "dpo"]}, "loss_type", ("'dpo'", "did you mean 'dpop'?")),
    ({"loss_type": "sigmiod"}, "loss_type", ("'sigmiod'", "did you mean 'sigmoid'?")),
    # Data.
    ({"sft_dataset_split": "test"}, "sft_dataset_split", ("is 'test'", "`sft_dataset_name`")),
    ({"sft_dataset_config": "main"}, "sft_dataset_config", ("is 'main'", "`sft_dataset_name`")),
    (
        {"lower_level": "chosen", "sft_dataset_name": "a/b"},
        "sft_dataset_name", ("`lower_level='chosen'`", "`lower_level='both'`"),
    ),
]  # fmt: skip


def configure(folder: Path | str = "out", **given: Any) -> SPOConfig:
    return SPOConfig(**tiny.arguments(folder, **given))


@pytest.mark.parametrize(("given", "field", "parts"), REFUSALS, ids=[str(given) for given, _, _ in REFUSALS])
def test_a_setting_that_cannot_be_right_is_refused(given: dict[str, Any], field: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure(**given)
    message = str(caught.value)
    assert message.startswith(f"`{field}`")
    assert "\n" not in message
    for part in parts:
        assert part in message


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"sft_coef": 0, "sft_tolerance": 0},
    {"hinge": "batch", "lower_level": "sft_dataset", "sft_batch_size": 3},
    {"lower_level": "both", "sft_dataset_name": "a/b", "sft_dataset_config": "main", "sft_dataset_split": "test"},
    {"bilevel_solver": "unrolled", "inner_steps": 3},
    {"bilevel_solver": "unrolled", "inner_learning_rate": 0.0},
    {"bilevel_solver": "unrolled", "hypergradient": "central_difference"},
    {"bilevel_solver": "alternating", "inner_steps": 2, "sft_coef": 0.0},
    {"bilevel_solver": "unrolled", "gradient_checkpointing": True},
    # With the penalty nothing is taken back.
    {"fp16": True},
    {"optim": "lomo"},
    REENTRANT,
    {"loss_type": "dpop", "dpop_lambda": 0.0},
    {"loss_type": ["simpo", "dpop"], "simpo_gamma": -1.0, "dpop_lambda": 5.0, "loss_weights": [1.0, 0.5]},
    {"loss_type": ["robust", "simpo"], "label_smoothing": 0.1},
    {"loss_type": "ipo", "f_divergence_type": "js_divergence", "use_weighting": True},
    # Not like any that is known: it may be of a newer TRL.
    {"loss_type": "zzzz"},
]


@pytest.mark.parametrize("given", ACCEPTED, ids=str)
def test_what_can_be_right_is_accepted(given: dict[str, Any]) -> None:
    config = configure(**given)
    for name, value in given.items():
        assert getattr(config, name) == ([value] if name == "loss_type" and isinstance(value, str) else value)


def test_every_loss_that_trl_names_is_accepted() -> None:
    known = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop"
    for name in [*known.split(), "sft", "simpo", "dpop"]:
        assert configure(loss_type=name).loss_type == [name]


def test_numbers_may_be_text_as_yaml_has_them() -> None:
    config = configure(
        sft_coef="1e-2", sft_tolerance="0.5", inner_learning_rate="1e-3", bilevel_solver="unrolled",
        loss_type=["simpo", "dpop"], simpo_gamma="1", dpop_lambda="5e0",
    )  # fmt: skip
    values = (config.sft_coef, config.sft_tolerance, config.inner_learning_rate, config.simpo_gamma)
    assert values == (0.01, 0.5, 0.001, 1.0)
    assert config.dpop_lambda == 5.0
    assert all(type(value) is float for value in values)
    assert config.inner_rate == 0.001


def test_inner_steps_take_the_learning_rate_by_default() -> None:
    assert configure(learning_rate=3e-4, **UNROLLED).inner_rate == 3e-4
    assert configure(learning_rate="3e-4", **UNROLLED).inner_rate == 3e-4
    # 0 is a rate, not the lack of one.
    assert configure(learning_rate=3e-4, inner_learning_rate=0, **UNROLLED).inner_rate == 0.0


@pytest.mark.parametrize(
    ("given", "optimum"),
    [("reference", None), (2, 2.0), ("2.5", 2.5), (2.5, 2.5), ("1e-1", 0.1), (0, 0.0), ("0", 0.0)],
)
def test_the_floor_is_the_references_or_a_number(given: Any, optimum: float | None) -> None:
    config = configure(sft_optimum=given)
    assert config.optimum == optimum
    # As text, and the same once more: what is saved with a run can be read again.
    assert isinstance(config.sft_optimum, str)
    again = configure(sft_optimum=config.sft_optimum)
    assert (again.sft_optimum, again.optimum) == (config.sft_optimum, optimum)


@pytest.mark.parametrize(
    ("loss_type", "free"),
    [
        ("simpo", True), ("sft", True), (["simpo", "sft"], True), ("sigmoid", False), ("dpop", False),
        (["simpo", "dpop"], False), (["simpo", "sigmoid"], False),
    ],
)  # fmt: skip
def test_losses_without_a_reference_take_its_values_before_training(loss_type: Any, free: bool) -> None:
    config = configure(loss_type=loss_type)
    assert config.is_reference_free is free
    # The trainer computes the reference's values ahead for it, on a copy of the config.
    assert config.is_reference_free is free
    assert not config.precompute_ref_log_probs
    assert configure(loss_type=loss_type, precompute_ref_log_probs=True).precompute_ref_log_probs


# ---- sft_data.py ----


def messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def texts() -> list[tuple[str, str]]:
    """Prompts and answers of 2 to 6 words."""
    return [(row["prompt"].strip(), row["chosen"]) for row in tiny.make_pairs(10, seed=4)]


def numbered(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


# Rows of every format of SFTTrainer's.
FORMATS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "text": lambda: [{"text": f"{p} {c}"} for p, c in texts()],
    "messages": lambda: [{"messages": messages(p, c)} for p, c in texts()],
    "conversations": lambda: [
        {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]} for p, c in texts()
    ],
    "prompt and completion": lambda: [{"prompt": f"{p} ", "completion": c, "source": "x"} for p, c in texts()],
    "conversational prompt and completion": lambda: [
        {"prompt": messages(p, c)[:1], "completion": messages(p, c)[1:]} for p, c in texts()
    ],
    "input_ids": lambda: [{"input_ids": numbered(p + " " + c)} for p, c in texts()],
    "input_ids and labels": lambda: [
        {"input_ids": numbered(p + " " + c), "labels": [-100] * len(p.split()) + numbered(c)} for p, c in texts()
    ],
    "input_ids and completion_mask": lambda: [
        {
            "input_ids": numbered(p + " " + c),
            "completion_mask": [0] * len(p.split()) + [1] * len(c.split()),
        }
        for p, c in texts()
    ],
}


def sft_rows(rows: list[dict[str, Any]], folder: Path | str = "out", **given: Any) -> SFTRows:
    return SFTRows(datasets.Dataset.from_list(rows), tiny.make_tokenizer(), configure(folder, **given))


def columns(rows: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    return list(zip(rows["input_ids"], rows["labels"], strict=True))


@pytest.mark.parametrize("given", [{"max_length": 32}, {"max_length": 7}, {"max_length": None}], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_that_sft_trainer_prepares(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path, **given)
    theirs = SFTTrainer(
        model=tiny.make_model(), args=SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(FORMATS[name]()), processing_class=tiny.make_tokenizer(),
    ).train_dataset  # fmt: skip
    ours = sft_rows(FORMATS[name](), tmp_path, **given)
    assert len(ours) == 10
    assert columns(ours.rows) == columns(theirs)
    assert sorted(ours.rows.column_names) == ["input_ids", "labels"]
    if given["max_length"] == 7:
        assert max(map(len, ours.rows["input_ids"])) == 7


@pytest.mark.filterwarnings("ignore:.*keep_end")
def test_rows_are_cut_at_the_end_that_the_config_names(tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path, max_length=5, truncation_mode="keep_end")
    theirs = SFTTrainer(
        model=tiny.make_model(), args=SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(FORMATS["text"]()), processing_class=tiny.make_tokenizer(),
    ).train_dataset  # fmt: skip
    ours = sft_rows(FORMATS["text"](), tmp_path, max_length=5, truncation_mode="keep_end")
    assert columns(ours.rows) == columns(theirs)
    assert all(ids[-1] == 1 for ids in ours.rows["input_ids"])


def test_completions_alone_are_learned() -> None:
    """Against tokens counted by hand; an answer ends with EOS where no chat template says otherwise."""
    for (ids, labels), (prompt, answer) in zip(
        columns(sft_rows(FORMATS["prompt and completion"]()).rows), texts(), strict=True
    ):
        assert ids == [*numbered(prompt), *numbered(answer), 1]
        assert labels == [*[-100] * len(prompt.split()), *numbered(answer), 1]
    for (ids, labels), (prompt, answer) in zip(
        columns(sft_rows(FORMATS["conversational prompt and completion"]()).rows), texts(), strict=True
    ):
        assert ids == [3, *numbered(prompt), 4, *numbered(answer)]
        assert labels == [*[-100] * (len(prompt.split()) + 2), *numbered(answer)]


def test_whole_texts_are_learned() -> None:
    for name in ("text", "messages", "input_ids"):
        for ids, labels in columns(sft_rows(FORMATS[name]()).rows):
            assert ids == labels
            assert len(ids) > 1


def test_rows_without_a_token_to_learn_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "w1 w2 ", "completion": "w3"},
        # Fills the length by itself.
        {"prompt": "w1 w2 w3 w4 w5 w6 ", "completion": "w7"},
        {"prompt": "w4 ", "completion": "w5 w6"},
    ]
    found = sft_rows(rows, max_length=5)
    assert found.rows["input_ids"] == [[6, 7, 8, 1], [9, 10, 11, 1]]
    assert "1 of 3 SFT rows are left out" in caplog.text
    assert "`max_length` (5)" in caplog.text
    caplog.clear()
    # A first token is predicted from nothing: EOS alone teaches nothing.
    found = sft_rows([{"text": "w1"}, {"text": ""}, {"text": "w2 w3"}, {"text": ""}])
    assert found.rows["input_ids"] == [[6, 1], [7, 8, 1]]
    assert "2 of 4 SFT rows are left out" in caplog.text
    caplog.clear()
    sft_rows([{"text": "w1"}])
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    "rows",
    [[{"text": ""}, {"text": ""}], [{"prompt": "w1 w2 w3 w4 w5 w6 ", "completion": "w7"}] * 3],
    ids=["empty", "long prompts"],
)
def test_rows_none_of_which_has_a_token_to_learn_are_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigurationError, match=rf"`sft_dataset`: none of its {len(rows)} rows .*`max_length` \(5\)"):
        sft_rows(rows, max_length=5)


def test_batches_are_padded_and_padding_is_not_learned() -> None:
    rows = sft_rows([{"prompt": "w1 ", "completion": "w2 w3"}, {"prompt": "w4 ", "completion": "w5"}])
    batch = rows.batch([1, 0, 1])
    assert batch["input_ids"].tolist() == [[9, 10, 1, 0], [6, 7, 8, 1], [9, 10, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 10, 1, -100], [-100, 7, 8, 1], [-100, 10, 1, -100]]
    assert sft_rows([{"text": "w1 w2"}], pad_to_multiple_of=8).batch([0])["input_ids"].shape == (1, 8)


def test_a_tokenizer_without_padding_pads_with_its_eos() -> None:
    tokenizer: PreTrainedTokenizerFast = tiny.make_tokenizer()
    tokenizer.pad_token = None
    dataset = datasets.Dataset.from_list([{"text": "w1 w2"}, {"text": "w3"}])
    for given in (tokenizer, SimpleNamespace(tokenizer=tokenizer)):
        assert sft_data.tokenizer_of(given) is tokenizer
    batch = SFTRows(dataset, tokenizer, configure()).batch([0, 1])
    assert batch["input_ids"].tolist() == [[6, 7, 1], [8, 1, 1]]
    assert batch["labels"].tolist() == [[6, 7, 1], [8, 1, -100]]


def test_the_fingerprint_is_that_of_the_rows() -> None:
    rows = FORMATS["text"]()
    assert sft_rows(rows).fingerprint == sft_rows(rows, seed=5).fingerprint
    assert sft_rows(rows).fingerprint != sft_rows(rows[::-1]).fingerprint
    assert sft_rows(rows).fingerprint != sft_rows(rows, max_length=4).fingerprint


@pytest.fixture(scope="module")
def seven() -> SFTRows:
    """Seven rows: no batch divides an epoch."""
    return sft_rows(FORMATS["text"]()[:7], seed=3)


def fresh(rows: SFTRows, seed: int | None = None) -> SFTRows:
    """Another life of the same rows, with nothing remembered."""
    other = SFTRows.__new__(SFTRows)
    other.__dict__.update(rows.__dict__)
    other._order = (-1, [])
    other.seed = rows.seed if seed is None else seed
    return other


def test_every_row_comes_once_in_an_epoch_and_epochs_differ(seven: SFTRows) -> None:
    epochs = [fresh(seven).indices(7 * epoch, 7) for epoch in range(30)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(7))
    assert len({tuple(epoch) for epoch in epochs}) >= 29
    # Nor is one epoch a constant change of the last: any row may come first.
    assert {epoch[0] for epoch in epochs} == set(range(7))


def test_orders_differ_between_seeds(seven: SFTRows) -> None:
    orders = {tuple(fresh(seven, seed).indices(0, 7)) for seed in range(10)}
    assert len(orders) >= 9
    # Not the same orders one epoch later.
    assert fresh(seven, 0).indices(7, 7) != fresh(seven, 1).indices(0, 7)
    # The largest seeds that the trainer takes, after many epochs.
    assert sorted(fresh(seven, 2**32 - 1).indices(7 * 10**9, 7)) == list(range(7))


def test_the_row_at_a_position_does_not_depend_on_what_was_asked_before(seven: SFTRows) -> None:
    sequence = fresh(seven).indices(0, 70)
    asked = [(position, count) for position in range(60) for count in (1, 2, 7, 10)]
    random.Random(0).shuffle(asked)
    one_life = fresh(seven)
    for position, count in asked:
        assert one_life.indices(position, count) == sequence[position : position + count]
    for position, count in asked[:20]:
        assert fresh(seven).indices(position, count) == sequence[position : position + count]


def test_global_random_numbers_neither_decide_nor_move(seven: SFTRows) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = fresh(seven).indices(0, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert fresh(seven).indices(0, 20) == first


def test_unshuffled_rows_come_in_order(seven: SFTRows) -> None:
    assert seven.indices(5, 10, shuffled=False) == [5, 6, 0, 1, 2, 3, 4, 5, 6, 0]


def drawn(rows: SFTRows, step: int, batch: int, accumulation: int, processes: int) -> list[int]:
    """The rows beside one global batch, by the trainer's own arithmetic on each process."""
    found = []
    for process in range(processes):
        stand_in: Any = SimpleNamespace(
            _spo_rows=fresh(rows),
            args=SimpleNamespace(
                sft_batch_size=None, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
            ),
            accelerator=SimpleNamespace(num_processes=processes, process_index=process),
            state=SimpleNamespace(global_step=step, train_batch_size=None),
        )
        for position in range(accumulation):
            found += SPOTrainer._sft_indices(stand_in, position, training=True)
    return found


# Rows for each micro-batch, micro-batches, processes.
LAYOUTS = ((4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_of_a_global_batch_draws_the_same_rows(seven: SFTRows, layout: tuple[int, int, int]) -> None:
    for step in range(15):
        assert sorted(drawn(seven, step, *layout)) == sorted(seven.indices(4 * step, 4))


def test_sft_batch_size_is_for_each_micro_batch(seven: SFTRows) -> None:
    for processes in (1, 2):
        found = []
        for step, position, process in itertools.product(range(3), range(2), range(processes)):
            stand_in: Any = SimpleNamespace(
                _spo_rows=seven,
                args=SimpleNamespace(sft_batch_size=3, per_device_train_batch_size=2, gradient_accumulation_steps=2),
                accelerator=SimpleNamespace(num_processes=processes, process_index=process),
                state=SimpleNamespace(global_step=step, train_batch_size=None),
            )
            found += SPOTrainer._sft_indices(stand_in, position, training=True)
        assert found == seven.indices(0, 18 * processes)


def sources(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"sft_dataset_name": None, "sft_dataset_config": None, "sft_dataset_split": None, **given}
    )


def dataset(*names: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: ["w1"] for name in names})


BAD_DATASETS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "splits": (
        lambda: datasets.DatasetDict({"train": dataset("text"), "test": dataset("text")}),
        ("holds splits (train, test)", "pass one of them"),
    ),
    "a dict": (lambda: {"text": ["w1"]}, ("holds splits (text)",)),
    "streaming": (
        lambda: dataset("text").to_iterable_dataset(),
        ("is IterableDataset", "`datasets.Dataset`", "stream"),
    ),
    "a list": (lambda: [{"text": "w1"}], ("is list", "`datasets.Dataset`")),
    "empty": (lambda: dataset("text").select([]), ("is empty", "at least one row")),
    "preference pairs": (
        lambda: dataset("prompt", "chosen", "rejected"),
        ("['chosen', 'prompt', 'rejected']", "`text`, `messages`, or `prompt` and `completion`", "preference pairs"),
    ),
    "images": (lambda: dataset("text", "images"), ("the column `images`", "use text")),
    "one image": (lambda: dataset("messages", "image"), ("the column `image`", "use text")),
    "tools": (lambda: dataset("messages", "tools"), ("the column `tools`", "use text")),
    "unknown columns": (lambda: dataset("question", "answer"), ("['answer', 'question']", "`messages`")),
    "a prompt alone": (lambda: dataset("prompt"), ("['prompt']", "`prompt` and `completion`")),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_a_dataset_that_cannot_be_kept_is_refused(name: str) -> None:
    make, parts = BAD_DATASETS[name]
    with pytest.raises(ConfigurationError) as caught:
        load_rows(make(), sources())
    message = str(caught.value)
    assert message.startswith("`sft_dataset`")
    for part in parts:
        assert part in message
    assert ("preference pairs" in message) == (name == "preference pairs")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_let_through_as_it_is(name: str) -> None:
    given = datasets.Dataset.from_list(FORMATS[name]())
    assert load_rows(given, sources()) is given


def test_no_dataset_is_none() -> None:
    assert load_rows(None, sources()) is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets.load_dataset` can read, with two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data"
    path.mkdir()
    (path / "train.jsonl").write_text(json.dumps({"text": "w1"}) + "\n" + json.dumps({"text": "w2"}) + "\n")
    (path / "test.jsonl").write_text(json.dumps({"text": "w3"}) + "\n")
    return path


def test_a_dataset_is_loaded_by_name_and_split(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_rows(None, sources(sft_dataset_name=str(folder)))["text"] == ["w1", "w2"]
    assert load_rows(None, sources(sft_dataset_name=str(folder), sft_dataset_split="test"))["text"] == ["w3"]
    assert not caplog.text
    given = dataset("text")
    assert load_rows(given, sources(sft_dataset_name=str(folder))) is given
    assert "`sft_dataset` is given to the trainer and named in its config; the trainer's is used" in caplog.text


@pytest.mark.parametrize("split", [None, "validation"])
def test_a_name_or_split_that_is_not_there_is_refused(folder: Path, split: str | None) -> None:
    name = str(folder if split else folder.parent / "nowhere")
    with pytest.raises(ConfigurationError) as caught:
        load_rows(None, sources(sft_dataset_name=name, sft_dataset_split=split))
    message = str(caught.value)
    assert message.startswith(f"`sft_dataset_name` ({name!r}), split {split or 'train'!r}, cannot be loaded: ")


def test_what_a_name_holds_is_looked_at_as_well(folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({"chosen": "w1", "rejected": "w2"}) + "\n")
    (folder / "test.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"^`sft_dataset_name` \(.*\) has the columns .* preference pairs"):
        load_rows(None, sources(sft_dataset_name=str(folder)))
