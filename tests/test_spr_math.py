"""SPR's weights against slow ones, in their limits, and on a softmax bandit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import spr as slow
from trl_extras.spr.weights import effective_sample_size, policy_weights


DTYPES = (torch.float64, torch.float32)
ALL_DTYPES = (*DTYPES, torch.bfloat16, torch.float16)
# Responses of each prompt: groups, singletons and prompts without any.
UNEVEN = (3, 1, 7, 0, 2, 1, 4, 1, 0, 6)
GROUPS = (3, 7, 2, 4, 6)
SINGLETONS = (1, 1, 1, 1, 1, 1)
GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -1e30)

Rewards = list[list[float | None]]
Ratios = list[list[float]]


def grid(draws: random.Random, low: float, high: float) -> float:
    """A number that every sum here keeps to the bit, in float32 too."""
    return draws.randrange(int(low * 64), int(high * 64) + 1) / 64


def draw(
    seed: int, counts: Sequence[int] = UNEVEN, low: float = -2, high: float = 2, nats: float = 3
) -> tuple[Rewards, Ratios]:
    """Rewards, None at the absent places, which lie anywhere; ratios within +-nats of a prompt's own level."""
    draws = random.Random(seed)
    width = max(counts) + 1
    rewards: Rewards = []
    ratios: Ratios = []
    for count in counts:
        places = draws.sample(range(width), count)
        rewards.append([grid(draws, low, high) if i in places else None for i in range(width)])
        level = grid(draws, -40, 0)
        ratios.append([level + grid(draws, -nats, nats) for _ in range(width)])
    return rewards, ratios


def tensors(rewards: Rewards, ratios: Ratios, dtype: torch.dtype, garbage: float = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, ratios, mask), with garbage where no response is."""
    mask = torch.tensor([[reward is not None for reward in row] for row in rewards])
    filled = torch.tensor([[garbage if reward is None else reward for reward in row] for row in rewards], dtype=dtype)
    return filled, torch.tensor(ratios, dtype=dtype).masked_fill(~mask, garbage), mask


def bound(dtype: torch.dtype, *nats: float) -> float:
    """The relative error of exp(z), z being a sum of terms of at most so many nats, each rounded a few times."""
    return 4 * torch.finfo(dtype).eps * (4 + sum(nats))


def assert_weights(found: Tensor, wanted: Sequence[Sequence[float]], dtype: torch.dtype, *nats: float) -> None:
    assert found.dtype == dtype
    # exp underflows in the denormals.
    smallest = torch.finfo(dtype).tiny
    for row, expected in zip(found.tolist(), wanted, strict=True):
        assert row == pytest.approx(expected, rel=bound(dtype, *nats), abs=smallest)


def close(wanted: Any, dtype: torch.dtype = torch.float64, *nats: float) -> Any:
    return pytest.approx(wanted, rel=bound(dtype, *nats), abs=torch.finfo(dtype).tiny)


# ---- The definition ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.75, 2.0, 50.0])
@pytest.mark.parametrize("counts", [UNEVEN, GROUPS, SINGLETONS, (1,), (5,), (0, 0), (2, 1, 0)], ids=str)
def test_weights_are_the_slow_ones(counts: tuple[int, ...], clip: float | None, dtype: torch.dtype) -> None:
    for seed, (garbage, temperature) in enumerate(zip(GARBAGE, (0.05, 0.3, 1.0, 4.0, 20.0), strict=True)):
        rewards, ratios = draw(seed, counts)
        given, ratio, mask = tensors(rewards, ratios, dtype, garbage)
        # Singletons compare ratios of different levels.
        nats = 4 / temperature, 2 * 43
        found = policy_weights(given, temperature, ratio, clip, mask)
        assert_weights(found, slow.policy_weights(rewards, temperature, ratios, clip), dtype, *nats)
        found = policy_weights(given, temperature, mask=mask)
        assert_weights(found, slow.policy_weights(rewards, temperature), dtype, 4 / temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_mask_every_response_is_there(dtype: torch.dtype) -> None:
    rewards, ratios = draw(1, (8, 8, 8))
    full: Rewards = [[reward for reward in row if reward is not None] for row in rewards]
    given, ratio, mask = tensors(full, [row[:8] for row in ratios], dtype)
    for clip in (None, 1.0):
        found = policy_weights(given, 0.5, ratio, clip)
        assert torch.equal(found, policy_weights(given, 0.5, ratio, clip, mask))
        assert_weights(found, slow.policy_weights(full, 0.5, [row[:8] for row in ratios], clip), dtype, 8, 86)


def test_a_pair_by_hand() -> None:
    """Two responses: 2 * sigmoid of the difference of z."""
    found = policy_weights(torch.tensor([[0.5, 2.0]]).double(), 0.5, torch.tensor([[-7.0, -9.0]]).double())
    odds = math.exp(2.0 / 0.5 - 9 - (0.5 / 0.5 - 7))
    assert found.tolist() == [close([2 / (1 + odds), 2 * odds / (1 + odds)])]
    # The clip by hand: the lower median is -9, so the offsets are 2 and 0, and 2 becomes 0.25.
    found = policy_weights(torch.zeros(1, 2).double(), 1.0, torch.tensor([[-7.0, -9.0]]).double(), clip=0.25)
    odds = math.exp(0.25)
    assert found.tolist() == [close([2 * odds / (1 + odds), 2 / (1 + odds)])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_the_mean_over_the_present_is_one(clip: float | None, dtype: torch.dtype) -> None:
    rewards, ratios = draw(2)
    given, ratio, mask = tensors(rewards, ratios, dtype, math.nan)
    found = policy_weights(given, 0.4, ratio, clip, mask)
    assert (found >= 0).all()
    assert not found[~mask].any()
    counts = mask.sum(dim=1)
    means = found.sum(dim=1)[counts > 1] / counts[counts > 1]
    assert means.tolist() == close([1.0] * len(means), dtype)
    assert found[counts == 1].sum().item() / int((counts == 1).sum()) == close(1.0, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_what_lies_at_an_absent_place_does_not_matter(dtype: torch.dtype) -> None:
    rewards, ratios = draw(3)
    for clip in (None, 1.0):
        found = []
        for garbage in (0.0, 300.0, -300.0, math.nan, math.inf, -math.inf):
            given, ratio, mask = tensors(rewards, ratios, dtype, garbage)
            before = given.clone(), ratio.clone(), mask.clone()
            found.append(policy_weights(given, 0.4, ratio, clip, mask))
            # And the arguments are left alone.
            for now, then in zip((given, ratio, mask), before, strict=True):
                assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))
        for other in found:
            assert other.isfinite().all()
            assert torch.equal(other, found[0])


# ---- Singletons and empty prompts ----


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_lone_singleton_weighs_exactly_one(clip: float | None, dtype: torch.dtype) -> None:
    for reward, nats in ((0.0, 0.0), (0.3, -17.0), (-60000.0, 400.0), (60000.0, -400.0)):
        given = torch.tensor([[reward]], dtype=dtype)
        assert policy_weights(given, 0.01, torch.tensor([[nats]], dtype=dtype), clip).tolist() == [[1.0]]
        # Beside a group and an empty prompt, which do not enter.
        given = torch.tensor([[math.nan, reward, math.inf], [1.0, 2.0, 3.0], [math.nan] * 3], dtype=dtype)
        ratio = torch.tensor([[math.nan, nats, math.inf], [5.0, 2.0, 3.0], [math.nan] * 3], dtype=dtype)
        mask = torch.tensor([[False, True, False], [True, True, False], [False] * 3])
        found = policy_weights(given, 0.01, ratio, clip, mask)
        assert found[0].tolist() == [0, 1, 0]
        assert found[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_singletons_are_the_prompt_that_holds_them_all(clip: float | None, dtype: torch.dtype) -> None:
    """To the bit: one response in each of eight prompts, or eight responses of one prompt."""
    rewards, ratios = draw(4, (1,) * 8)
    places = [(p, i) for p, row in enumerate(rewards) for i, reward in enumerate(row) if reward is not None]
    earned, nats = [rewards[p][i] for p, i in places], [ratios[p][i] for p, i in places]
    given, ratio, mask = tensors(rewards, ratios, dtype, math.nan)
    together = policy_weights(torch.tensor([earned], dtype=dtype), 0.3, torch.tensor([nats], dtype=dtype), clip)
    assert torch.equal(policy_weights(given, 0.3, ratio, clip, mask)[mask], together[0])
    assert len(set(together[0].tolist())) > 3
    # A single column, as purely offline rows come.
    column = policy_weights(
        torch.tensor(earned, dtype=dtype)[:, None], 0.3, torch.tensor(nats, dtype=dtype)[:, None], clip
    )
    assert torch.equal(column[:, 0], together[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_singletons_and_groups_do_not_see_each_other(clip: float | None, dtype: torch.dtype) -> None:
    rewards, ratios = draw(5)
    given, ratio, mask = tensors(rewards, ratios, dtype, math.nan)
    found = policy_weights(given, 0.3, ratio, clip, mask)
    single = mask.sum(dim=1) == 1
    assert 1 < int(single.sum()) < len(single) - 3
    for rows in (single, ~single):
        assert torch.equal(found[rows], policy_weights(given[rows], 0.3, ratio[rows], clip, mask[rows]))
    for row in (~single).nonzero()[:, 0]:
        one = slice(row, row + 1)
        assert torch.equal(found[one], policy_weights(given[one], 0.3, ratio[one], clip, mask[one]))


def test_prompts_without_a_response_weigh_nothing() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for clip in (None, 1.0):
        found = policy_weights(torch.full((3, 4), math.nan), 1.0, torch.full((3, 4), math.inf), clip, nothing)
        assert torch.equal(found, torch.zeros(3, 4))
    assert policy_weights(torch.zeros(0, 4), 1.0, torch.zeros(0, 4), 1.0).shape == (0, 4)


# ---- Exactly one ----


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_equal_z_weigh_exactly_one(clip: float | None, dtype: torch.dtype) -> None:
    """In any precision and for any number of responses: fine-tuning with these weights is plain fine-tuning."""
    for count in (*range(1, 65), 257, 1000, 2049, 4099):
        for reward, nats, temperature in ((0.0, 0.0, 1.0), (0.3, -17.3, 0.07), (-41.7, 301.0, 13.0)):
            given, ratio = torch.full((2, count), reward, dtype=dtype), torch.full((2, count), nats, dtype=dtype)
            assert (policy_weights(given, temperature, ratio, clip) == 1).all(), count


@pytest.mark.parametrize(
    "dtype",
    [
        *DTYPES,
        torch.bfloat16,
        torch.float16,
    ],
    ids=str,
)
def test_equal_z_of_many_singletons_weigh_exactly_one(dtype: torch.dtype) -> None:
    """A group of singletons is as large as a dataset, and one row: no number of them is special."""
    for count in (*range(2, 300), 1000, 2049, 4099):
        given = torch.full((count, 1), 0.3, dtype=dtype)
        assert (policy_weights(given, 0.7, given) == 1).all(), count
        assert (policy_weights(given.T, 0.7, given.T) == 1).all(), count


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_equal_z_weigh_exactly_one_beside_absent_ones(dtype: torch.dtype) -> None:
    draws = random.Random(6)
    mask = torch.tensor([[draws.random() < 0.7 for _ in range(61)] for _ in range(40)])
    given = torch.full(mask.shape, 0.3, dtype=dtype).masked_fill(~mask, math.nan)
    for clip in (None, 0.3):
        assert torch.equal(policy_weights(given, 0.7, given, clip, mask), mask.to(dtype))
    # Equal within a prompt is enough.
    given = given + torch.arange(40, dtype=dtype)[:, None]
    assert torch.equal(policy_weights(given, 0.7, mask=mask), mask.to(dtype))


def test_rewards_that_the_ratios_cancel_weigh_exactly_one() -> None:
    """z = r / beta + l, with binary fractions: +, not -, and divided, not multiplied."""
    given = torch.tensor([[0.5, -1.0, 3.25]])
    assert policy_weights(given, 0.5, -2 * given).tolist() == [[1, 1, 1]]
    assert policy_weights(given, 4.0, -given / 4).tolist() == [[1, 1, 1]]
    # A clip that reaches none of them changes nothing; one that does, something.
    assert policy_weights(given, 0.5, -2 * given, clip=9.0).tolist() == [[1, 1, 1]]
    assert policy_weights(given, 0.5, -2 * given, clip=1.0).tolist() != [[1, 1, 1]]


# ---- What changes no weight ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("counts", [GROUPS, SINGLETONS], ids=["groups", "singletons"])
def test_a_constant_changes_no_weight(counts: tuple[int, ...], clip: float | None, dtype: torch.dtype) -> None:
    """Rewards and ratios are so drawn that adding the constant rounds nothing."""
    given, ratio, mask = tensors(*draw(7, counts), dtype, math.nan)
    found = policy_weights(given, 0.25, ratio, clip, mask)
    # Each prompt its own constant; singletons are one group.
    level = torch.arange(len(counts), dtype=dtype)[:, None] if counts == GROUPS else torch.ones(1, 1, dtype=dtype)
    for constant in (level, -1000 * level - 0.5, 512 * level):
        assert torch.equal(policy_weights(given + constant, 0.25, ratio, clip, mask), found)
        moved = policy_weights(given, 0.25, ratio + constant, clip, mask)
        if clip is None:
            assert_weights(moved, found.tolist(), dtype, 16, constant.abs().max().item() + 43)
        else:
            # Under a clip the ratios count from their median, so to the bit.
            assert torch.equal(moved, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("counts", [UNEVEN, SINGLETONS], ids=["uneven", "singletons"])
def test_the_order_of_responses_and_prompts_does_not_matter(
    counts: tuple[int, ...], clip: float | None, dtype: torch.dtype
) -> None:
    given, ratio, mask = tensors(*draw(8, counts), dtype, math.nan)
    found = policy_weights(given, 0.3, ratio, clip, mask)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        columns, rows = (torch.randperm(size, generator=generator) for size in reversed(given.shape))
        moved = policy_weights(*(given[rows][:, columns], 0.3, ratio[rows][:, columns], clip, mask[rows][:, columns]))
        assert_weights(moved, found[rows][:, columns].tolist(), dtype)


def test_only_rewards_over_the_temperature_count() -> None:
    given, ratio, mask = tensors(*draw(9), torch.float32)
    for clip in (None, 1.0):
        found = policy_weights(given, 0.3, ratio, clip, mask)
        for factor in (2.0, 0.25, 1024.0):
            assert torch.equal(policy_weights(given * factor, 0.3 * factor, ratio, clip, mask), found)


def test_a_ratio_is_a_reward_in_nats() -> None:
    given, ratio, mask = tensors(*draw(10), torch.float64)
    assert torch.equal(
        policy_weights(torch.zeros_like(given), 1.0, given, None, mask), policy_weights(given, 1.0, mask=mask)
    )
    none, zero = (policy_weights(given, 0.3, r, 1.0, mask) for r in (None, torch.zeros_like(ratio)))
    assert torch.equal(none, zero)
    # More of either is more weight.
    assert policy_weights(torch.tensor([[0.0, 1.0]]), 1.0).diff().item() > 0
    assert policy_weights(torch.zeros(1, 2), 1.0, torch.tensor([[0.0, 1.0]])).diff().item() > 0


def test_ratios_take_the_precision_of_the_rewards() -> None:
    given, ratio, mask = tensors(*draw(11), torch.float64)
    for dtype in (torch.float32, torch.float64):
        for other in DTYPES:
            found = policy_weights(given.to(dtype), 0.25, ratio.to(other), 1.0, mask)
            assert torch.equal(found, policy_weights(given.to(dtype), 0.25, ratio.to(dtype), 1.0, mask))
            assert found.dtype == dtype


# ---- Extreme values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 4.0])
def test_extreme_rewards_stay_finite(clip: float | None, dtype: torch.dtype) -> None:
    """Differences over the temperature far beyond float32: the best alone, and ties of it share."""
    rewards: Rewards = [
        [1e30, -1e30, 0.0, 1e30],
        [-1e30, -1e30, -1e30, -1e30],
        [-1e30, 1.0, 0.0, -2e30],
        [0.0, 0.0, 0.0, 1e-20],
        [3e38, -3e38, 0.0, 1e38],
        [None, None, 1e30, None],
        [-1e30, None, None, None],
    ]
    ratios = [[0.0, 300.0, 300.0, 0.0], [2.0, 2.0, 2.0, 2.0], *[[0.0] * 4] * 5]
    given, ratio, mask = tensors(rewards, ratios, dtype, math.nan)
    found = policy_weights(given, 1e-30, ratio, clip, mask)
    expected = [
        [2, 0, 0, 2], [1, 1, 1, 1], [0, 4, 0, 0], [0, 0, 0, 4], [4, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]
    ]  # fmt: skip
    assert found.tolist() == expected
    # The slow ones, of the numbers that the precision holds, say the same.
    held = [[None if math.isnan(reward) else reward for reward in row] for row in given.tolist()]
    assert slow.policy_weights(held, 1e-30, ratios, clip) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rewards_that_the_temperature_matches(dtype: torch.dtype) -> None:
    """Large numbers are no matter if their quotient is small."""
    rewards: Rewards = [[1e30, -1e30, 0.0, 5e29], [2e30, None, 1e30, None], [None, None, -3e29, None]]
    given, _, mask = tensors(rewards, [[0.0] * 4] * 3, dtype, math.inf)
    assert_weights(policy_weights(given, 1e30, mask=mask), slow.policy_weights(rewards, 1e30), dtype, 2)
    small = [[None if reward is None else reward * 1e-60 for reward in row] for row in rewards]
    given, _, mask = tensors(small, [[0.0] * 4] * 3, dtype, math.inf)
    assert_weights(policy_weights(given, 1e-30, mask=mask), slow.policy_weights(small, 1e-30), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nats", [30, 300, 3000])
@pytest.mark.parametrize("clip", [None, 5.0, 100.0])
@pytest.mark.parametrize("level", [0, -700, 700], ids=str)
def test_ratios_of_hundreds_of_nats(level: int, clip: float | None, nats: int, dtype: torch.dtype) -> None:
    """Beyond what exp holds on either side (88 nats in float32, 709 in float64)."""
    for counts in (GROUPS, SINGLETONS):
        rewards, ratios = draw(12, counts, nats=nats)
        ratios = [[ratio + level for ratio in row] for row in ratios]
        given, ratio, mask = tensors(rewards, ratios, dtype, math.nan)
        found = policy_weights(given, 0.5, ratio, clip, mask)
        assert found.isfinite().all()
        wanted = slow.policy_weights(rewards, 0.5, ratios, clip)
        assert_weights(found, wanted, dtype, 8, 40 + 2 * nats + abs(level))


def test_a_ratio_outweighs_a_reward() -> None:
    """The highest reward need not be the highest z, by far: its exponent alone must not be the yardstick."""
    found = policy_weights(torch.tensor([[0.0, 1.0, 2.0]]), 1.0, torch.tensor([[900.0, 0.0, -900.0]]))
    assert found.tolist() == [[3, 0, 0]]
    found = policy_weights(torch.tensor([[0.0, 1000.0]]), 1.0, torch.tensor([[-500.0, -1500.0]]))
    assert found.tolist() == [[1, 1]]


# ---- The limits of the temperature ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_temperature_weighs_all_alike(dtype: torch.dtype) -> None:
    given, ratio, mask = tensors(*draw(13), dtype, math.nan)
    assert torch.equal(policy_weights(given, 1e30, mask=mask), mask.to(dtype))
    # To first order on the way there: w - 1 = (r - mean r) / beta.
    row = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    found = policy_weights(row, 1e5)
    assert ((found - 1) * 1e5).tolist()[0] == pytest.approx([-2, -1, 3], abs=1e-3)
    # The ratios stay.
    wanted = policy_weights(torch.zeros_like(given), 1.0, ratio, None, mask)
    assert torch.equal(policy_weights(given, 1e30, ratio, None, mask), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_temperature_weighs_the_best_alone(dtype: torch.dtype) -> None:
    rewards, ratios = draw(14)
    given, ratio, mask = tensors(rewards, ratios, dtype, math.nan)
    # Two prompts with ties: among rewards on a grid they need arranging.
    given[2, mask[2].nonzero()[:3, 0]] = 5.0
    given[9, mask[9].nonzero()[1:3, 0]] = 5.0
    rewards = [[None if math.isnan(reward) else reward for reward in row] for row in given.tolist()]
    alone = [reward for row in rewards for reward in row if reward is not None and row.count(None) == len(row) - 1]
    wanted: Ratios = []
    for row in rewards:
        group = [reward for reward in row if reward is not None]
        group = alone if len(group) == 1 else group
        share = len(group) / max(group.count(max(group, default=0)), 1)
        wanted.append([share if group and reward == max(group) else 0.0 for reward in row])
    assert max(wanted[2]) == 7 / 3
    assert max(wanted[9]) == 3
    assert sum(map(sum, wanted)) == pytest.approx(sum(UNEVEN))
    for temperature in (1e-5, 1e-30):
        assert_weights(policy_weights(given, temperature, mask=mask), wanted, dtype)
        # No ratio of this size outweighs a reward then, but among ties it counts.
        found = policy_weights(given, temperature, ratio, None, mask)
        assert (found > 0).tolist() == [[weight > 0 for weight in row] for row in wanted]
        assert_weights(found, slow.policy_weights(rewards, temperature, ratios), dtype, 86)
        assert found[2, mask[2]].unique().numel() > 2


# ---- The clip ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clip_saturates_on_both_sides(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 5, dtype=dtype)
    ratio = torch.tensor([[-500.0, -101.0, -100.0, -99.0, 300.0]], dtype=dtype)
    # The median is -100: -400, -1, 0, 1, 400.
    found = policy_weights(zero, 1.0, ratio, clip=2.0)
    odds = [math.exp(x) for x in (-2, -1, 0, 1, 2)]
    assert found.tolist() == [close([5 * odd / math.fsum(odds) for odd in odds], dtype, 4)]
    # Both ends at a bound: how far beyond does not matter, and the two bounds are c and -c.
    assert torch.equal(
        found, policy_weights(zero, 1.0, ratio * 1.0 + ratio.new_tensor([-1e6, 0, 0, 0, 1e6]), clip=2.0)
    )
    assert (found[0, 4] / found[0, 0]).log().item() == close(4.0, dtype, 4)
    # A small clip: almost equal, but in order.
    found = policy_weights(zero, 1.0, ratio, clip=0.01)
    assert found.log().tolist()[0] == pytest.approx([-0.01, -0.01, 0, 0.01, 0.01], abs=1e-4)
    # A large one: none of it.
    assert_weights(policy_weights(zero, 1.0, ratio, 1e4), policy_weights(zero, 1.0, ratio).tolist(), dtype, 800)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clip_counts_from_the_lower_median_of_the_present(dtype: torch.dtype) -> None:
    """Of 0, 10, 20 and 100 it is 10; the upper were 20, the mean of both 15, that of all 32.5."""
    ratio = torch.tensor([[20.0, math.nan, 100.0, 0.0, -math.inf, 10.0, math.inf]], dtype=dtype)
    mask = ratio.isfinite()
    zero = torch.zeros_like(ratio)
    found = policy_weights(zero, 1.0, ratio, 3.0, mask)[mask].log()
    # 20 and 100 at 3, 0 at -3, 10 at 0.
    assert (found - found[3]).tolist() == pytest.approx([3, 3, -3, 0], abs=bound(dtype, 12))
    # Of two it is the lower.
    found = policy_weights(zero[:, :2], 1.0, torch.tensor([[9.0, 2.0]], dtype=dtype), 3.0).log()
    assert found.diff().item() == pytest.approx(-3, abs=bound(dtype, 12))
    # Of singletons it is that of all singletons.
    ratios = torch.tensor([[20.0, 0.0], [math.nan, 100.0], [0.0, math.inf], [3.0, 4.0], [math.nan, 10.0]], dtype=dtype)
    there = torch.tensor([[True, False], [False, True], [True, False], [True, True], [False, True]])
    found = policy_weights(torch.zeros_like(ratios), 1.0, ratios, 3.0, there)[there].log()
    offsets = (found[[0, 1, 2, 5]] - found[5]).tolist()
    assert offsets == pytest.approx([3, 3, -3, 0], abs=bound(dtype, 12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clip_does_not_touch_the_rewards(dtype: torch.dtype) -> None:
    given = torch.tensor([[0.0, 20.0, 40.0]], dtype=dtype)
    found = policy_weights(given, 4.0, torch.zeros_like(given), clip=0.5)
    assert torch.equal(found, policy_weights(given, 4.0))
    assert (found[0, 2] / found[0, 0]).log().item() == close(10.0, dtype, 10)
    # The bound is of the ratio alone, whatever the reward and the temperature.
    found = policy_weights(given, 4.0, torch.tensor([[9.0, 0.0, -9.0]], dtype=dtype), clip=0.5)
    assert (found[0, 2] / found[0, 0]).log().item() == close(9.0, dtype, 10)


def test_without_a_clip_it_is_exact() -> None:
    """None leaves even 600 nats, which any bound below would cut."""
    ratio = torch.tensor([[0.0, 600.0, 599.0]]).double()
    found = policy_weights(torch.zeros_like(ratio), 1.0, ratio)
    assert found[0, 0].item() == close(3 / (1 + math.exp(-1)) * math.exp(-600), torch.float64, 600)
    assert found[0, 0] > 0


# ---- The softmax bandit ----

BANDIT_REWARDS = [0.0, 1.0, -0.75, 0.5, 2.0, 0.125]
BANDIT_LOGITS = [0.5, -1.0, 2.0, 0.0, -3.0, 1.25]


def enumerated(logits: Tensor, rewards: Sequence[float], temperature: float) -> Tensor:
    """The weights over n of a bandit with one row for every response: log mu = -log n, no clip."""
    n = len(rewards)
    log_ratio = logits.log_softmax(dim=0) + math.log(n)
    return policy_weights(torch.tensor([rewards]).to(logits), temperature, log_ratio[None])[0] / n


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_bandit_is_improved_exactly(temperature: float) -> None:
    policy = slow.softmax(BANDIT_LOGITS)
    found = enumerated(torch.tensor(BANDIT_LOGITS).double(), BANDIT_REWARDS, temperature)
    wanted = slow.improved(policy, BANDIT_REWARDS, temperature)
    assert found.tolist() == close(wanted, torch.float64, 3 / temperature, 6)
    # It is the best there is: every policy nearby is worse.
    best = slow.objective(wanted, policy, BANDIT_REWARDS, temperature)
    assert slow.objective(found.tolist(), policy, BANDIT_REWARDS, temperature) == pytest.approx(best, rel=1e-12)
    draws = random.Random(15)
    for _ in range(50):
        nearby = slow.softmax([math.log(p) + draws.uniform(-0.3, 0.3) for p in wanted])
        assert slow.objective(nearby, policy, BANDIT_REWARDS, temperature) < best


def test_the_bandit_of_uniform_draws_needs_no_ratio() -> None:
    """A uniform policy drawn from uniformly: l = 0."""
    found = enumerated(torch.zeros(6).double(), BANDIT_REWARDS, 0.5)
    assert found.tolist() == close(slow.improved([1 / 6] * 6, BANDIT_REWARDS, 0.5), torch.float64, 8)
    plain = policy_weights(torch.tensor([BANDIT_REWARDS]).double(), 0.5)[0] / 6
    assert found.tolist() == close(plain.tolist(), torch.float64, 8)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_repeated_the_bandit_moves_on_a_line(temperature: float) -> None:
    """log(pi_K / pi_0) = K r / beta + const, each round fitting the weights exactly."""
    log_pi = torch.tensor(BANDIT_LOGITS).double().log_softmax(dim=0)
    start = log_pi.tolist()
    for repetition in range(1, 9):
        log_pi = enumerated(log_pi, BANDIT_REWARDS, temperature).log()
        moved = [now - then for now, then in zip(log_pi.tolist(), start, strict=True)]
        assert math.fsum(log_pi.exp().tolist()) == pytest.approx(1, abs=1e-13)
        line = [repetition * reward / temperature for reward in BANDIT_REWARDS]
        offsets = [m - x for m, x in zip(moved, line, strict=True)]
        assert offsets == pytest.approx([offsets[0]] * 6, abs=1e-12 * repetition / temperature)


def test_a_sharpened_proposal_is_corrected() -> None:
    """Responses in the proportions of pi at temperature 0.7: with l, equal rewards leave pi; without, it sharpens."""
    log_pi = torch.tensor(BANDIT_LOGITS).double().log_softmax(dim=0)
    # Multiplicities of a proposal that is a whole number of draws for each response.
    counts = [(1 + round(4000 * q)) for q in (log_pi / 0.7).softmax(dim=0).tolist()]
    index = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    proposal = torch.tensor(counts).double() / len(index)
    zero = torch.zeros(1, len(index)).double()
    weights = policy_weights(zero, 1.0, (log_pi - proposal.log())[index][None])[0]
    fitted = torch.zeros(6).double().index_add(0, index, weights) / len(index)
    assert fitted.tolist() == pytest.approx(log_pi.exp().tolist(), rel=1e-11)
    uncorrected = torch.zeros(6).double().index_add(0, index, policy_weights(zero, 1.0)[0]) / len(index)
    assert uncorrected.max() > fitted.max() + 0.05


# ---- The gradient of the weighted fine-tuning ----


def test_the_weights_carry_no_gradient() -> None:
    """They come of tensors without one: numbers, computed once a round."""
    given, ratio, mask = tensors(*draw(16), torch.float32)
    found = policy_weights(given, 0.3, ratio, 2.0, mask)
    assert not found.requires_grad
    assert not effective_sample_size(found, mask).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_gradient_of_the_weighted_nll_is_the_one_by_hand(clip: float | None, dtype: torch.dtype) -> None:
    """-sum_i w_i log pi(i): pi(j) sum w - w_j by the logits; and at differences of the slow value."""
    ratio = [0.5, -3.0, 1.0, 0.25, 2.0, -0.5]
    weights = policy_weights(
        torch.tensor([BANDIT_REWARDS], dtype=dtype), 0.5, torch.tensor([ratio], dtype=dtype), clip
    )[0]
    reference = slow.policy_weights([BANDIT_REWARDS], 0.5, [ratio], clip)[0]
    logits = torch.tensor(BANDIT_LOGITS, dtype=dtype, requires_grad=True)
    loss = -(weights * logits.log_softmax(dim=0)).sum()
    loss.backward()
    assert logits.grad is not None
    assert loss.item() == close(slow.weighted_nll(BANDIT_LOGITS, reference), dtype, 16)
    by_hand = slow.weighted_nll_gradient(BANDIT_LOGITS, reference)
    assert logits.grad.tolist() == pytest.approx(by_hand, rel=bound(dtype, 16), abs=6 * bound(dtype, 16))
    for j in range(6):
        ends = [
            slow.weighted_nll([x + step * (i == j) for i, x in enumerate(BANDIT_LOGITS)], reference)
            for step in (-1e-5, 1e-5)
        ]
        assert (ends[1] - ends[0]) / 2e-5 == pytest.approx(by_hand[j], abs=1e-8)


def test_the_bandit_is_fitted_at_the_improved_policy_and_nowhere_else() -> None:
    """The gradient of one enumerated round is pi_theta - pi*, which the logits of pi* alone make 0."""
    weights = enumerated(torch.tensor(BANDIT_LOGITS).double(), BANDIT_REWARDS, 0.5)
    target = slow.improved(slow.softmax(BANDIT_LOGITS), BANDIT_REWARDS, 0.5)
    for at, wanted in (
        (target, [0.0] * 6),
        (slow.softmax(BANDIT_LOGITS), [p - q for p, q in zip(slow.softmax(BANDIT_LOGITS), target, strict=True)]),
    ):
        logits = torch.tensor([math.log(p) for p in at], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(-(weights * logits.log_softmax(dim=0)).sum(), logits)
        assert gradient.tolist() == pytest.approx(wanted, abs=1e-13)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_equal_rewards_are_plain_fine_tuning_to_the_bit(dtype: torch.dtype) -> None:
    taken = torch.tensor([0, 3, 3, 5, 1, 2, 0])
    weights = policy_weights(torch.full((1, 7), 0.7, dtype=dtype), 0.1)[0]
    gradients = []
    for weight in (weights, None):
        logits = torch.tensor(BANDIT_LOGITS, dtype=dtype, requires_grad=True)
        log_probs = logits.log_softmax(dim=0)[taken]
        loss = -(log_probs if weight is None else weight * log_probs).mean()
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.equal(*gradients)
    assert gradients[0].any()


# ---- What is refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": torch.zeros(3)}, r"`rewards` is \(3,\) of torch.float32"),
        ({"rewards": torch.zeros(1, 2, 3)}, r"`rewards` is \(1, 2, 3\)"),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, r"`rewards` is \(2, 3\) of torch.int64"),
        ({"temperature": 0.0}, r"`temperature` is 0.0, .*above 0"),
        ({"temperature": -1.0}, r"`temperature` is -1.0"),
        ({"temperature": math.inf}, r"`temperature` is inf"),
        ({"temperature": math.nan}, r"`temperature` is nan"),
        ({"clip": 0.0}, r"`clip` is 0.0, .*above 0, or None"),
        ({"clip": -2.0}, r"`clip` is -2.0"),
        ({"clip": math.inf}, r"`clip` is inf"),
        ({"clip": math.nan}, r"`clip` is nan"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, r"`mask` is \(3, 2\) .*wants \(2, 3\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"`mask` is \(3,\)"),
        ({"mask": torch.ones(2, 3)}, r"`mask` is \(2, 3\) of torch.float32.*bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.int64)}, r"`mask` is \(2, 3\) of torch.int64"),
        ({"log_ratio": torch.zeros(3, 2)}, r"`log_ratio` is \(3, 2\), .*wants \(2, 3\)"),
        ({"log_ratio": torch.zeros(1, 3)}, r"`log_ratio` is \(1, 3\)"),
        ({"log_ratio": torch.zeros(3)}, r"`log_ratio` is \(3,\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"rewards": torch.zeros(2, 3), "temperature": 1.0}
    policy_weights(**valid)
    with pytest.raises(ValueError, match=message):
        policy_weights(**{**valid, **arguments})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rewards", "log_ratio"])
@pytest.mark.parametrize("counts", [(2, 3), (1, 1), (3, 1)], ids=str)
def test_what_is_not_finite_is_refused_where_a_response_is(name: str, value: float, counts: tuple[int, int]) -> None:
    mask = torch.tensor([[i < count for i in range(3)] for count in counts])
    for row, column in mask.nonzero().tolist():
        given = {"rewards": torch.zeros(2, 3), "log_ratio": torch.zeros(2, 3)}
        given[name][row, column] = value
        with pytest.raises(ValueError, match=f"`{name}` holds a value that is not finite"):
            policy_weights(temperature=1.0, mask=mask, **given)
        if mask.all():
            with pytest.raises(ValueError, match=f"`{name}` holds a value that is not finite"):
                policy_weights(temperature=1.0, **given)
    for row, column in (~mask).nonzero().tolist():
        given[name].zero_()[row, column] = value
        assert torch.equal(policy_weights(temperature=1.0, mask=mask, **given), mask.float())


# ---- The effective sample size ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_effective_sample_size_is_the_slow_one(dtype: torch.dtype) -> None:
    for seed in range(10):
        draws = random.Random(seed)
        weights: Rewards = [
            [draws.randrange(1, 512) / 64 if i < count else None for i in range(8)] for count in UNEVEN
        ]
        filled, _, mask = tensors(weights, [[0.0] * 8] * len(weights), dtype, draws.choice(GARBAGE))
        wanted = [slow.effective_sample_size([w for w in row if w is not None]) for row in weights]
        found = effective_sample_size(filled, mask)
        assert found.shape == (len(UNEVEN),)
        assert found.dtype == dtype
        assert found.tolist() == close(wanted, dtype)
        # Absent ones that are 0, as `policy_weights` leaves them, need no mask.
        assert torch.equal(found, effective_sample_size(filled.masked_fill(~mask, 0)))
        # It is of the shares: scale does not matter, and singletons have one.
        assert torch.equal(found, effective_sample_size(filled * 8, mask))
        assert found[torch.tensor(UNEVEN) == 1].tolist() == [1, 1, 1]
        assert found[torch.tensor(UNEVEN) == 0].tolist() == [0, 0]


def test_the_effective_sample_size_at_its_ends() -> None:
    for n in (1, 2, 7, 100):
        assert effective_sample_size(torch.ones(2, n)).tolist() == [n, n]
        alone = torch.zeros(1, n)
        alone[0, n // 2] = n
        assert effective_sample_size(alone).tolist() == [1]
    assert effective_sample_size(torch.zeros(2, 3)).tolist() == [0, 0]
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    assert effective_sample_size(torch.ones(3, 3), mask).tolist() == [2, 0, 1]
    garbage = torch.ones(3, 3).masked_fill(~mask, math.nan)
    assert effective_sample_size(garbage, mask).tolist() == [2, 0, 1]
    # Two of three, unevenly: 1 / (0.75^2 + 0.25^2).
    assert effective_sample_size(torch.tensor([[3.0, 0.0, 1.0]])).item() == pytest.approx(1.6)


def test_the_effective_sample_size_falls_with_the_temperature() -> None:
    given = torch.tensor([[0.0, 1.0, 2.0, 5.0, 5.5]]).double()
    sizes = [effective_sample_size(policy_weights(given, t)).item() for t in (1e9, 10.0, 3.0, 1.0, 0.3, 0.05, 0.001)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(5)
    assert sizes[-1] == 1
