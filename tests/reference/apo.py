"""
Slow, obvious references of Algorithm 1: separate DPOTrainer runs, and the theorem's coefficients by its recursion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


def coefficient(rounds: int, alpha: float) -> float:
    """
    C_T of Theorem 4.1 by the recursion behind it: a round adds 1 to the policy's coefficient, an extrapolation adds
    alpha times the difference of two iterates.
    """
    policy = iterate = 0.0
    for _ in range(rounds):
        new = policy + 1.0
        policy, iterate = new + alpha * (new - iterate), new
    return iterate


def apo_by_hand(
    model: torch.nn.Module,
    folds: list[Any],
    alphas: list[float],
    train: Callable[[torch.nn.Module, torch.nn.Module, Any, int], torch.nn.Module],
    momentum_from: str = "previous_iterate",
) -> list[torch.nn.Module]:
    """
    The iterates thetahat_1..thetahat_T of Algorithm 1.

    Args:
        model: thetahat_0.
        folds: the data of each round.
        alphas: the extrapolation after each round; the last is not used.
        train: from (policy, reference, data, round index) to the trained policy.
    """
    iterate, policy = copy.deepcopy(model), copy.deepcopy(model)
    iterates = []
    for t, fold in enumerate(folds):
        new = train(copy.deepcopy(policy), copy.deepcopy(policy), fold, t)
        origin = iterate if momentum_from == "previous_iterate" else policy
        extrapolated = copy.deepcopy(new)
        with torch.no_grad():
            for target, a, b in zip(extrapolated.parameters(), new.parameters(), origin.parameters(), strict=True):
                # The order of operations that state_dicts pins; alpha 0 leaves the bits alone.
                if alphas[t] != 0:
                    difference = a.float() - b.float()
                    target.copy_((a.float() + difference * alphas[t]).to(target.dtype))
        iterate, policy = new, extrapolated
        iterates.append(new)
    return iterates
