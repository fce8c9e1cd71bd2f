"""From judgements to a pair, and what is said of a set of completions. Pure functions; no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """
    The completions with the highest and the lowest reward (the paper, section 5: best-ranked chosen, worst-ranked
    rejected), the first of several equal ones, or None if all are equal.

    Args:
        rewards: finite rewards of one prompt's completions, (K,).
    """
    best = max(range(len(rewards)), key=lambda i: rewards[i])
    worst = min(range(len(rewards)), key=lambda i: rewards[i])
    return None if rewards[best] == rewards[worst] else (best, worst)


def combine(rewards: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """
    The weighted sum of what the reward functions gave one completion, over those that apply; None if none does (the
    convention of TRL's GRPOTrainer).
    """
    given = [weight * reward for reward, weight in zip(rewards, weights, strict=True) if reward is not None]
    return sum(given) if given else None


def distinct_bigrams(texts: Sequence[str]) -> float:
    """
    Distinct pairs of neighbouring words as a share of all such pairs, over all texts together: words are what white
    space separates, in lower case. 0 where no text has two words. It falls with the number of texts, so compare
    equally many.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        words = text.lower().split()
        pairs.extend(itertools.pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample deviation over the root of the number; 0 for a single value)."""
    number = len(values)
    mean = math.fsum(values) / number
    if number < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    return mean, math.sqrt(variance / number)
