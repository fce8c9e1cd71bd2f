"""
The gap of Stable Preference Optimization: how far the lower level's responses have fallen below a floor.

The objective is F(theta) = L_pref(theta) + lambda * gap(theta), the gap summed over the sources of lower-level data.
The penalty form is that of the paper's second version (arXiv 2507.07723v2); the two hinges are our choice, and
`docs/spo.md` derives them.

| symbol | here |
|---|---|
| log pi_theta(y_i given x_i), nats | `log_probs`, (N,) |
| number of tokens of y_i | `tokens`, (N,) |
| nll_i = -log pi_theta(y_i given x_i) / tokens of y_i | [`nll_per_token`] |
| nll*_i, the same under the reference, or a number | `optimum`, (N,) |
| epsilon, nats per token | `tolerance` |
"""

from __future__ import annotations

import torch
from torch import Tensor


def nll_per_token(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """
    Negative log-likelihood of each response per token, in nats.

    Args:
        log_probs: log-probability of each response, (N,), nats.
        tokens: its number of tokens, (N,). A response without any has the value 0.
    """
    return -log_probs / tokens.clamp(min=1)


def example_gap(nll: Tensor, optimum: Tensor | float, tolerance: float) -> Tensor:
    """
    The gap with a hinge on each example: mean_i [ nll_i - nll*_i - epsilon ]_+, nats per token.

    At the floor itself the gradient is zero: a policy that has not moved is not pushed.

    Args:
        nll: (N,).
        optimum: (N,), or one number for all.
        tolerance: epsilon.
    """
    return torch.relu(nll - optimum - tolerance).mean()


def batch_excess(nll_sum: Tensor, optimum_sum: Tensor, tokens: Tensor, tolerance: float) -> Tensor:
    """
    What the hinge over a whole batch is taken of: token-mean nll - token-mean nll* - epsilon, nats per token.

    Args:
        nll_sum, optimum_sum: sums over all tokens of the global batch, nats.
        tokens: their number.
    """
    return (nll_sum - optimum_sum) / tokens.clamp(min=1) - tolerance


def batch_part(nll_sum: Tensor, optimum_sum: Tensor, tokens: Tensor, tolerance: float, parts: int) -> Tensor:
    """
    The part of [`batch_excess`] that one of `parts` micro-batches brings, scaled so that the MEAN over the parts is
    the excess of the whole: that is how trainers add up micro-batches and processes.

    The hinge of a sum is not the sum of hinges, so whether it is active has to be decided on the whole.

    Args:
        nll_sum, optimum_sum: sums over this part's tokens, nats.
        tokens: the number of tokens of ALL parts.
    """
    return parts * (nll_sum - optimum_sum) / tokens.clamp(min=1) - tolerance


def penalty_share(preference_loss: float, penalty: float) -> float:
    """The penalty's share of the objective: penalty / (|L_pref| + penalty), 0 where both vanish."""
    whole = abs(preference_loss) + penalty
    return penalty / whole if whole > 0 else 0.0
