"""
A round's training rows: which responses are in it, what each of them weighs, and what is said of the weights. No
model, no disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .weights import effective_sample_size, policy_weights


@dataclass
class Response:
    """
    A judged response of a round.

    Args:
        prompt_ids: tokens of its prompt, templated; responses with the same ones belong together.
        input_ids, labels: the row that is trained on, prompt and response.
        reward: what it earned.
        offline: where it came from.
        source_logp: its log-probability under what it came from, nats; None where that is unknown or the policy.
        policy_logp: its log-probability under the round's policy, nats, where it is needed.
    """

    prompt_ids: tuple[int, ...]
    input_ids: Sequence[int]
    labels: Sequence[int]
    reward: float
    offline: bool
    source_logp: float | None = None
    policy_logp: float | None = None

    @property
    def log_ratio(self) -> float | None:
        """log pi_k - log q, nats; None where q is unknown."""
        if self.source_logp is None or self.policy_logp is None:
            return None
        return self.policy_logp - self.source_logp


@dataclass(frozen=True)
class Counts:
    """How many rows of a round are sampled responses, and how many offline ones."""

    online: int
    offline: int


def rows_of_run(samples: int, ratios: Sequence[float]) -> int:
    """
    Rows that every round has: all samples, and so many offline responses beside them as the smallest share asks for.

    Args:
        samples: responses that a round samples.
        ratios: the share of offline responses in each round; all 0 where there are none.
    """
    least = min(ratios)
    return samples + (round(samples * least / (1 - least)) if least < 1 else 0)


def counts_of_round(rows: int, samples: int, ratio: float) -> Counts:
    """
    The rows of one round, by where they come from. A larger share than the smallest one makes room for offline
    responses by leaving samples out.
    """
    offline = min(rows, max(round(ratio * rows), rows - samples)) if ratio > 0 else 0
    return Counts(rows - offline, offline)


def taken(available: Sequence[int], count: int, draw: np.random.Generator) -> list[int]:
    """
    `count` of the responses: all of them where they are as many, a random choice where there are more, and where there
    are fewer all of them several times and a random choice of the rest.
    """
    if not available or count <= 0:
        return []
    passes, rest = divmod(count, len(available))
    chosen = sorted(draw.choice(len(available), size=rest, replace=False).tolist()) if rest else []
    return [*available] * passes + [available[index] for index in chosen]


def weigh(
    responses: Sequence[Response], temperature: float, clip: float | None
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """
    The weight of every response of a round, normalised over all responses of its prompt; prompts with one response
    make one group together.

    Args:
        temperature, clip: as for [`policy_weights`].

    Returns:
        Weights, (responses,), float64; what is to be said of them; and which responses are in a group whose rewards
        are all equal, (responses,), bool.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, response in enumerate(responses):
        groups.setdefault(response.prompt_ids, []).append(index)
    several = [members for members in groups.values() if len(members) > 1]
    single = [members[0] for members in groups.values() if len(members) == 1]
    by_size: dict[int, list[list[int]]] = {}
    for members in several:
        by_size.setdefault(len(members), []).append(members)
    if single:
        # One group: a row of its own, whatever its length.
        by_size.setdefault(len(single), []).append(single)
    rewards = np.array([response.reward for response in responses], dtype=np.float64)
    ratios, known = _log_ratios(responses, [*several, *([single] if single else [])])
    weights, equal = np.zeros(len(responses)), np.zeros(len(responses), dtype=bool)
    sizes: list[float] = []
    shares: list[float] = []
    told_apart: list[float] = []
    spreads: list[float] = []
    clipped = equal_groups = 0
    for size, members_of in by_size.items():
        places = np.array(members_of)
        of_group, ratio = torch.from_numpy(rewards[places]), torch.from_numpy(ratios[places])
        found = policy_weights(of_group, temperature, ratio, clip)
        weights[places] = found.numpy()
        # A difference of two finite rewards can be too large for a number, and what is said has to be finite.
        spread = (of_group.amax(dim=1) - of_group.amin(dim=1)).clamp(max=1e300)
        same = spread == 0
        equal[places[same.numpy()]] = True
        effective = effective_sample_size(found)
        for row, members in enumerate(members_of):
            alone = members is single
            if not alone:
                sizes.append(float(effective[row]))
                shares.append(float(effective[row]) / size)
                equal_groups += int(same[row])
            if not same[row]:
                spreads.append(float(spread[row]))
                told_apart += [] if alone else [float(effective[row])]
        if clip is not None:
            middle = ratio.sort(dim=1).values[:, (size - 1) // 2, None]
            clipped += int(((ratio - middle).abs() > clip)[torch.from_numpy(known[places])].sum())
    said: dict[str, Any] = {
        "groups": len(several),
        "group_size": float(np.mean([len(members) for members in several])) if several else None,
        "equal_groups": equal_groups,
        "effective_sample_size": float(np.mean(sizes)) if sizes else None,
        "effective_share": float(np.mean(shares)) if shares else None,
        "effective_where_unequal": float(np.mean(told_apart)) if told_apart else None,
        "singletons": len(single),
        "singletons_effective": None,
        "weight_max": float(weights.max()),
        "reward_spread": float(np.mean(spreads)) if spreads else 0.0,
        "ratios_clipped": clipped / int(known.sum()) if known.any() and clip is not None else None,
    }
    if single:
        said["singletons_effective"] = float(effective_sample_size(torch.from_numpy(weights[single])[None])[0])
    return weights, said, equal


def _log_ratios(responses: Sequence[Response], groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """
    The log importance ratio of every response, and which of them are known. An unknown one counts as its group's lower
    median of the known ones, which is 0 where all come from the policy itself: it is neither favoured nor held back.
    """
    found = [response.log_ratio for response in responses]
    known = np.array([value is not None for value in found])
    ratios = np.array([0.0 if value is None else value for value in found])
    for members in groups:
        here = np.array(members)
        mine = known[here]
        if mine.any() and not mine.all():
            in_order = np.sort(ratios[here[mine]])
            ratios[here[~mine]] = in_order[(len(in_order) - 1) // 2]
    return ratios, known
