"""
Pairwise losses that DPOTrainer has no `loss_type` for, as functions of log-probabilities.

Everywhere: log-probabilities are sums over a response's tokens, (N,), nats; the result is the loss of each pair, (N,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def simpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float, gamma: float
) -> Tensor:
    """
    SimPO (Meng, Xia, Chen 2024, arXiv 2405.14734, equation 6), which needs no reference:
    -log sigmoid( beta / |y_w| * log pi(y_w) - beta / |y_l| * log pi(y_l) - gamma ).

    Args:
        chosen, rejected: log pi(y_w) and log pi(y_l).
        chosen_tokens, rejected_tokens: |y_w| and |y_l|, the numbers of tokens.
        gamma: the target margin of the rewards.
    """
    reward_margin = beta * (chosen / chosen_tokens.clamp(min=1) - rejected / rejected_tokens.clamp(min=1))
    return -F.logsigmoid(reward_margin - gamma)


def dpop_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, penalty: float
) -> Tensor:
    """
    DPO-Positive (Pal et al. 2024, "Smaug", arXiv 2402.13228, equation 3):
    -log sigmoid( beta * ( log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)
    - lambda * max(0, log pi_ref(y_w)/pi(y_w)) ) ).

    Args:
        chosen, rejected: log pi(y_w) and log pi(y_l).
        ref_chosen, ref_rejected: the same under the reference.
        penalty: the paper's lambda; not SPO's.
    """
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - penalty * torch.relu(-chosen_ratio)))
