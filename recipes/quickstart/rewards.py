"""The quickstart's reward: how favourable a completion reads, by VADER (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

import functools
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@functools.cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader(completions: list[Any], **kwargs: Any) -> list[float]:
    """
    VADER's compound score of each completion, in [-1, 1]; the prompt is not part of it.

    Args:
        completions: texts, or conversations whose last message is scored.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [analyzer().polarity_scores(text)["compound"] for text in texts]
