"""
Slow, obvious references of Stable Preference Optimization: values and gradients one example and one token at a time in
Python's floats, and the exact hypergradient by differentiating twice.

A response is the list of its tokens' log-probabilities, in nats. Gradients are by those, in lists of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


Response = Sequence[float]


def nll_per_token(response: Response) -> float:
    if len(response) == 0:
        return 0.0
    total = 0.0
    for token in response:
        total -= token
    return total / len(response)


def nll_per_token_gradient(response: Response) -> list[float]:
    return [-1 / len(response) for _ in response]


def _floors(references: Sequence[Response] | float, count: int) -> list[float]:
    if isinstance(references, float):
        return [references] * count
    return [nll_per_token(reference) for reference in references]


def example_gap(responses: Sequence[Response], references: Sequence[Response] | float, tolerance: float) -> float:
    total = 0.0
    for response, floor in zip(responses, _floors(references, len(responses)), strict=True):
        below = nll_per_token(response) - floor - tolerance
        if below > 0:
            total += below
    return total / len(responses)


def example_gap_gradient(
    responses: Sequence[Response], references: Sequence[Response] | float, tolerance: float
) -> list[list[float]]:
    gradients = []
    for response, floor in zip(responses, _floors(references, len(responses)), strict=True):
        active = nll_per_token(response) - floor - tolerance > 0
        gradients.append([-1 / len(response) / len(responses) if active else 0.0 for _ in response])
    return gradients


def batch_excess(responses: Sequence[Response], references: Sequence[Response], tolerance: float) -> float:
    """Token-mean nll - token-mean nll* - epsilon, over the tokens of all responses; of no tokens the mean is 0."""
    difference, count = 0.0, 0
    for response, reference in zip(responses, references, strict=True):
        for token, floor in zip(response, reference, strict=True):
            difference += floor - token
            count += 1
    return (difference / count if count else 0.0) - tolerance


def batch_excess_gradient(responses: Sequence[Response]) -> list[list[float]]:
    count = sum(len(response) for response in responses)
    return [[-1 / count for _ in response] for response in responses]


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _mean(response: Response) -> float:
    return math.fsum(response) / len(response) if response else 0.0


def simpo(chosen: Response, rejected: Response, beta: float, gamma: float) -> float:
    """Equation 6 of arXiv 2405.14734, for one pair."""
    return -_log_sigmoid(beta * _mean(chosen) - beta * _mean(rejected) - gamma)


def simpo_gradient(chosen: Response, rejected: Response, beta: float, gamma: float) -> tuple[list[float], list[float]]:
    slope = -_sigmoid(-(beta * _mean(chosen) - beta * _mean(rejected) - gamma)) * beta
    return [slope / len(chosen) for _ in chosen], [-slope / len(rejected) for _ in rejected]


def _ratio(response: Response, reference: Response) -> float:
    return math.fsum(response) - math.fsum(reference)


def dpo(chosen: Response, rejected: Response, ref_chosen: Response, ref_rejected: Response, beta: float) -> float:
    """Equation 7 of arXiv 2305.18290, for one pair."""
    return -_log_sigmoid(beta * _ratio(chosen, ref_chosen) - beta * _ratio(rejected, ref_rejected))


def dpop(
    chosen: Response, rejected: Response, ref_chosen: Response, ref_rejected: Response, beta: float, penalty: float
) -> float:
    """Equation 3 of arXiv 2402.13228, for one pair."""
    lost = max(0.0, -_ratio(chosen, ref_chosen))
    return -_log_sigmoid(beta * (_ratio(chosen, ref_chosen) - _ratio(rejected, ref_rejected) - penalty * lost))


def dpop_gradient(
    chosen: Response, rejected: Response, ref_chosen: Response, ref_rejected: Response, beta: float, penalty: float
) -> tuple[list[float], list[float]]:
    lost = max(0.0, -_ratio(chosen, ref_chosen))
    margin = beta * (_ratio(chosen, ref_chosen) - _ratio(rejected, ref_rejected) - penalty * lost)
    slope = -_sigmoid(-margin) * beta
    return [slope * (1 + penalty * (lost > 0)) for _ in chosen], [-slope for _ in rejected]


Loss = Callable[[Sequence[Tensor]], Tensor]


def hessian_vector(lower: Loss, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H @ vector, by the gradient of <gradient, vector>."""
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    gradients = torch.autograd.grad(lower(leaves), leaves, create_graph=True)
    inner = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
    return list(torch.autograd.grad(inner, leaves))


def hypergradient(
    lower: Loss, upper: Loss, weights: Sequence[Tensor], rate: float, steps: int = 1, exact: bool = True
) -> list[Tensor]:
    """
    The gradient of upper(theta'(theta)) by theta, theta' being `steps` plain gradient steps of `lower` from theta;
    by differentiating through them, or with them taken for constants (first order).
    """
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    moved: list[Tensor] = list(leaves)
    for _ in range(steps):
        gradients = torch.autograd.grad(lower(moved), moved, create_graph=True)
        if not exact:
            gradients = tuple(gradient.detach() for gradient in gradients)
        moved = [weight - rate * gradient for weight, gradient in zip(moved, gradients, strict=True)]
    return list(torch.autograd.grad(upper(moved), leaves))
