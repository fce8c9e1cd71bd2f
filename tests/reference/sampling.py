"""Slow, obvious sampling arithmetic: one sequence at a time, no cache, no batches, float64 where it matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def sampling_distribution(
    logits: torch.Tensor,
    before: Sequence[int],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> list[float]:
    """
    The probabilities that a next token is drawn with.

    Args:
        logits: (vocabulary,).
        before: all tokens so far, prompt included.
    """
    values = [float(value) for value in logits]
    for token in set(before):
        values[token] = values[token] / repetition_penalty if values[token] > 0 else values[token] * repetition_penalty
    values = [value / temperature for value in values]
    kept = set(range(len(values)))
    if top_k:
        least = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        kept = {token for token in kept if values[token] >= least}
    if top_p < 1:
        probabilities = _softmax(values, kept)
        # From the least likely upwards, tokens go while those gone amount to at most 1 - top_p.
        gone = 0.0
        for token in sorted(kept, key=lambda token: probabilities[token]):
            gone += probabilities[token]
            if gone <= 1 - top_p and len(kept) > 1:
                kept = kept - {token}
    if min_p is not None:
        probabilities = _softmax(values, kept)
        best = max(probabilities)
        kept = {token for token in kept if probabilities[token] >= min_p * best}
    return _softmax(values, kept)


def _softmax(values: Sequence[float], kept: set[int]) -> list[float]:
    highest = max(values[token] for token in kept)
    powers = [math.exp(value - highest) if token in kept else 0.0 for token, value in enumerate(values)]
    total = math.fsum(powers)
    return [power / total for power in powers]


@torch.no_grad()
def log_probability(model: Any, prompt: Sequence[int], completion: Sequence[int], **settings: Any) -> float:
    """The log-probability with which `completion` is drawn after `prompt`, in nats."""
    tokens, total = list(prompt), 0.0
    for token in completion:
        logits = model(torch.tensor([tokens])).logits[0, -1]
        total += math.log(sampling_distribution(logits, tokens, **settings)[token])
        tokens.append(token)
    return total
