"""
The objective of Stable Preference Optimization by plain autograd: logits, a loop over examples, no trainer.

Every batch is a list of examples (prompt ids, response ids); log-probabilities come from `log_softmax` of the whole
logits, one example at a time, so that neither padding nor a fused head takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call


Example = tuple[Sequence[int], Sequence[int]]
Weights = dict[str, Tensor]


def log_prob(model: Any, weights: Weights, example: Example) -> Tensor:
    """log pi(response given prompt), nats."""
    prompt, response = example
    ids = torch.tensor([[*prompt, *response]])
    logits = functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
    found = F.log_softmax(logits, dim=-1)
    first = max(len(prompt), 1)
    return sum((found[t - 1, ids[0, t]] for t in range(first, ids.size(1))), torch.zeros(()))


def length(example: Example) -> int:
    """Tokens that are predicted."""
    prompt, response = example
    return len(response) if prompt else len(response) - 1


def gap(
    model: Any, weights: Weights, examples: Sequence[Example], floors: Sequence[float], tolerance: float, hinge: str
) -> Tensor:
    """The gap of one source; `floors` are nll* of each example, nats per token."""
    nlls = [-log_prob(model, weights, example) / length(example) for example in examples]
    if hinge == "example":
        terms = [torch.relu(nll - floor - tolerance) for nll, floor in zip(nlls, floors, strict=True)]
        return sum(terms, torch.zeros(())) / len(examples)
    tokens = sum(length(example) for example in examples)
    excess = [(nll - floor) * length(e) for nll, floor, e in zip(nlls, floors, examples, strict=True)]
    return torch.relu(sum(excess, torch.zeros(())) / tokens - tolerance)


def objective(
    model: Any,
    weights: Weights,
    pairs: Sequence[tuple[Example, Example]],
    references: Sequence[tuple[float, float]],
    sources: Sequence[tuple[Sequence[Example], Sequence[float]]],
    *,
    beta: float,
    coefficient: float,
    tolerance: float,
    hinge: str,
) -> Tensor:
    """F = the mean DPO loss of the pairs + coefficient * the sum of the sources' gaps."""
    total = torch.zeros(())
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(pairs, references, strict=True):
        margin = (log_prob(model, weights, chosen) - ref_chosen) - (log_prob(model, weights, rejected) - ref_rejected)
        total = total - F.logsigmoid(beta * margin) / len(pairs)
    for examples, floors in sources:
        total = total + coefficient * gap(model, weights, examples, floors, tolerance, hinge)
    return total


def lower_level(model: Any, weights: Weights, examples: Sequence[Example]) -> Tensor:
    """L_SFT: the negative log-likelihood of all examples over the number of their tokens."""
    tokens = sum(length(example) for example in examples)
    return -sum((log_prob(model, weights, example) for example in examples), torch.zeros(())) / tokens


def after_inner_steps(
    lower: Callable[[Weights], Tensor], weights: Weights, rate: float, steps: int, exact: bool
) -> Weights:
    """theta' after plain gradient steps; with `exact` still a function of theta, through second derivatives."""
    for _ in range(steps):
        gradients = torch.autograd.grad(lower(weights), list(weights.values()), create_graph=exact)
        weights = {
            name: weight - rate * gradient for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        if not exact:
            weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    return weights
