"""
Slow, obvious references of Successive Policy Re-weighting: weights by definition, one prompt and one response at a
time, in decimal numbers of so many digits that no maximum needs taking off; and the softmax bandit in closed form.

A prompt is the list of its responses' rewards, None where no response is; ratios are lists of the same shape, in nats.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal


Row = Sequence[float | None]
Ratios = Sequence[float]

# exp of anything: too large is infinite, too small is 0.
_MANY_DIGITS = decimal.Context(
    prec=120, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.InvalidOperation]
)


def lower_median(values: Sequence[float]) -> float:
    """The smallest of the values that at least half of them do not exceed."""
    return min(value for value in values if 2 * sum(other <= value for other in values) >= len(values))


def clipped(ratios: Ratios, bound: float) -> list[Decimal]:
    """Ratios less their lower median; one beyond a bound counts as the bound."""
    middle = Decimal(lower_median(ratios))
    found = []
    for ratio in ratios:
        offset = Decimal(ratio) - middle
        if offset > bound:
            offset = Decimal(bound)
        elif offset < -bound:
            offset = Decimal(-bound)
        found.append(offset)
    return found


def group_weights(rewards: Sequence[float], temperature: float, ratios: Ratios, clip: float | None) -> list[float]:
    """w_i = exp(z_i) / (the mean of all exp(z_j)) = n / sum_j exp(z_j - z_i), z = r / beta + l, over one group."""
    with decimal.localcontext(_MANY_DIGITS):
        bounded = [Decimal(ratio) for ratio in ratios] if clip is None else clipped(ratios, clip)
        z = [Decimal(reward) / Decimal(temperature) + ratio for reward, ratio in zip(rewards, bounded, strict=True)]
        return [float(len(z) / sum(((other - own).exp() for other in z), Decimal(0))) for own in z]


def policy_weights(
    rewards: Sequence[Row], temperature: float, ratios: Sequence[Ratios] | None = None, clip: float | None = None
) -> list[list[float]]:
    """A prompt with several responses is a group; the prompts with one are a group together; 0 without a response."""
    groups: list[list[tuple[int, int]]] = []
    singletons: list[tuple[int, int]] = []
    for prompt, row in enumerate(rewards):
        places = [(prompt, i) for i, reward in enumerate(row) if reward is not None]
        if len(places) == 1:
            singletons += places
        elif places:
            groups.append(places)
    if singletons:
        groups.append(singletons)
    found = [[0.0] * len(row) for row in rewards]
    for places in groups:
        earned = [rewards[prompt][i] for prompt, i in places]
        nats = [0.0 if ratios is None else ratios[prompt][i] for prompt, i in places]
        weights = group_weights([r for r in earned if r is not None], temperature, nats, clip)
        for (prompt, i), weight in zip(places, weights, strict=True):
            found[prompt][i] = weight
    return found


def effective_sample_size(weights: Sequence[float]) -> float:
    """1 / sum of the squared shares, of the responses that are there; 0 for none."""
    if not weights:
        return 0.0
    total = math.fsum(weights)
    return 1 / math.fsum((weight / total) ** 2 for weight in weights)


# ---- The softmax bandit: one prompt, every response enumerated ----


def softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    odds = [math.exp(logit - highest) for logit in logits]
    return [odd / math.fsum(odds) for odd in odds]


def improved(policy: Sequence[float], rewards: Sequence[float], temperature: float) -> list[float]:
    """pi*(y) = pi(y) exp(r(y) / beta) / Z, the best policy for E[r] - beta KL(pi* || pi)."""
    odds = [p * math.exp(reward / temperature) for p, reward in zip(policy, rewards, strict=True)]
    return [odd / math.fsum(odds) for odd in odds]


def objective(
    candidate: Sequence[float], policy: Sequence[float], rewards: Sequence[float], temperature: float
) -> float:
    """E[r] - beta KL(candidate || policy)."""
    return math.fsum(
        c * (reward - temperature * math.log(c / p)) for c, p, reward in zip(candidate, policy, rewards, strict=True)
    )


def weighted_nll(logits: Sequence[float], weights: Sequence[float]) -> float:
    """-sum_i w_i log pi(i)."""
    return -math.fsum(w * math.log(p) for w, p in zip(weights, softmax(logits), strict=True))


def weighted_nll_gradient(logits: Sequence[float], weights: Sequence[float]) -> list[float]:
    """By the logits: pi(j) * (the sum of all weights) - w_j."""
    total = math.fsum(weights)
    return [p * total - w for w, p in zip(weights, softmax(logits), strict=True)]
