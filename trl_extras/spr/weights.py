"""
The weights of Successive Policy Re-weighting: how much each response of a round counts in its fine-tuning.

Only the abstract of the paper (ICLR 2025 submission 12963) was at hand. It states that the policy is re-weighted by
the performance of its responses, again and again, on offline and online data; the formulas are our derivation, which
`docs/spr.md` gives in full.

| symbol | here |
|---|---|
| r(x, y), the reward of a response | `rewards` |
| beta, the strength of the pull towards the round's policy pi_k | `temperature`, in units of the reward |
| l = log pi_k(y given x) - log q(y given x), q being what y was drawn from; nats | `log_ratio` |
| c, the bound of l | `clip` |
| w, with mean 1 over the responses of a prompt | the result |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def policy_weights(
    rewards: Tensor,
    temperature: float,
    log_ratio: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """
    The weight of every response in the round's weighted fine-tuning: with z = r / beta + l,

        w_i = exp(z_i - max z) / mean_j exp(z_j - max z)

    over the responses of a prompt (our derivation: the self-normalised estimate of pi_k(y) exp(r / beta) / Z_k against
    the distribution that y was drawn from). Weights have mean 1 over the responses of a prompt, are exactly 1 for
    equal z in any precision, and do not change if a constant is added to all rewards or ratios of a prompt.

    A prompt with a single response carries no comparison: all such prompts together form one group (our choice).

    Args:
        rewards: (prompts, responses), finite where a response is.
        temperature: beta, finite and above 0. Large: plain fine-tuning on all responses. Small: on the best alone.
        log_ratio: l, nats, (prompts, responses); None for 0, which is right for responses sampled from the policy
            itself at temperature 1 without truncation.
        clip: c, above 0: the group's lower median is taken off the ratios, which changes no weight, and what is left
            is bounded to [-c, c]. None leaves them as they are, which is exact.
        mask: which responses are there, (prompts, responses), bool; None for all.

    Returns:
        (prompts, responses), of the dtype of `rewards`; 0 where no response is.

    Raises:
        ValueError: an argument is of the wrong shape, not finite, or out of range.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"`rewards` is {tuple(rewards.shape)} of {rewards.dtype}, but wants (prompts, responses), floating point."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` is {temperature!r}, but wants a finite number above 0.")
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"`clip` is {clip!r}, but wants a finite number above 0, or None.")
    present = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    if present.shape != rewards.shape or present.dtype != torch.bool:
        raise ValueError(
            f"`mask` is {tuple(present.shape)} of {present.dtype}, but wants {tuple(rewards.shape)}, bool."
        )
    ratio = torch.zeros_like(rewards) if log_ratio is None else log_ratio
    if ratio.shape != rewards.shape:
        raise ValueError(f"`log_ratio` is {tuple(ratio.shape)}, but wants {tuple(rewards.shape)}, as `rewards`.")
    for name, values in (("rewards", rewards), ("log_ratio", ratio)):
        if not values[present].isfinite().all():
            raise ValueError(f"`{name}` holds a value that is not finite.")

    # In half precision a sum of a few hundred equal terms is no longer their number.
    dtype, rewards, ratio = rewards.dtype, rewards.double(), ratio.double()
    weights = torch.zeros_like(rewards)
    if not rewards.numel():
        return weights.to(dtype)
    single = present.sum(dim=1) == 1
    alone = present & single[:, None]
    if single.any():
        row = _weights(rewards[alone][None], temperature, ratio[alone][None], clip, present[alone][None])
        weights[alone] = row[0]
    several = ~single
    if several.any():
        weights[several] = _weights(rewards[several], temperature, ratio[several], clip, present[several])
    return weights.to(dtype)


def _weights(rewards: Tensor, temperature: float, ratio: Tensor, clip: float | None, present: Tensor) -> Tensor:
    """Each row is one group."""
    away = ~present
    # The largest reward is taken off before the division: extreme rewards become -inf, which weighs nothing, not nan.
    z = (rewards - rewards.masked_fill(away, -torch.inf).amax(dim=1, keepdim=True)) / temperature
    z = z + (ratio if clip is None else _clipped(ratio, clip, present))
    z = z.masked_fill(away, -torch.inf)
    highest = z.amax(dim=1, keepdim=True)
    # A row without responses has no highest; its weights are 0.
    odds = (z - highest.masked_fill(highest == -torch.inf, 0)).exp()
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    mean = odds.sum(dim=1, keepdim=True) / count
    return odds / mean.masked_fill(mean == 0, 1)


def _clipped(ratio: Tensor, clip: float, present: Tensor) -> Tensor:
    """Ratios less the lower median of their row, bounded on both sides."""
    in_order = ratio.masked_fill(~present, torch.inf).sort(dim=1).values
    middle = ((present.sum(dim=1, keepdim=True) - 1) // 2).clamp(min=0)
    return (ratio - in_order.gather(1, middle)).clamp(-clip, clip)


def effective_sample_size(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    How many equally weighted responses the weights of each prompt amount to: 1 / sum_i (w_i / sum_j w_j)^2, between 1
    and the number of responses. Near 1 a prompt teaches one response alone: the temperature is too small for more.

    Args:
        weights: (prompts, responses), at least 0.
        mask: as for [`policy_weights`].

    Returns:
        (prompts,); 0 for a prompt without responses.
    """
    kept = (weights if mask is None else weights.masked_fill(~mask, 0)).double()
    total = kept.sum(dim=1)
    squares = kept.square().sum(dim=1)
    found = torch.where(squares > 0, total.square() / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
    return found.to(weights.dtype)
