"""Pairs and the statistics of text: pure functions against obvious ones."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from trl_extras.rollouts.pairs import best_and_worst, combine, distinct_bigrams, mean_and_error


def test_best_and_worst() -> None:
    assert best_and_worst([0.1, 0.9, -0.3]) == (1, 2)
    assert best_and_worst([2, 1]) == (0, 1)
    assert best_and_worst([1.0, 1.0, 1.0]) is None
    # The first of several equal ones, so that the pair does not depend on anything but the rewards.
    assert best_and_worst([0, 5, 5, 0]) == (1, 0)


def test_best_and_worst_against_sorting() -> None:
    draw = random.Random(0)
    for _ in range(200):
        rewards = [draw.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(draw.randint(2, 5))]
        order = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))
        lowest = min(rewards)
        expected = None if len(set(rewards)) == 1 else (order[0], rewards.index(lowest))
        assert best_and_worst(rewards) == expected


def test_combine() -> None:
    assert combine([1.0, 2.0], [1.0, 0.5]) == 2.0
    # What does not apply counts nothing, not zero times its weight and not nan.
    assert combine([None, 2.0], [1.0, 0.5]) == 1.0
    assert combine([None, None], [1.0, 0.5]) is None


def test_distinct_bigrams() -> None:
    assert distinct_bigrams(["a b a b", "A b"]) == pytest.approx(2 / 4)
    assert distinct_bigrams(["one", "", "two"]) == 0.0
    # Pairs do not span texts.
    assert distinct_bigrams(["a b", "b a"]) == 1.0
    texts = ["the film is good the film", "is good the end"]
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    assert distinct_bigrams(texts) == len(set(pairs)) / len(pairs)


def test_mean_and_error() -> None:
    values = [0.5, -1.0, 2.0, 0.25]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_error([3.0]) == (3.0, 0.0)
