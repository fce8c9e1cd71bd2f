"""Configuration of *accelerated* preference optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import DPOConfig

from ..errors import ConfigurationError
from ..rollouts.config import SamplingConfig
from ..rounds.config import RoundsConfig, as_list, per_round, set_number


MOMENTUM_FROM = ("previous_iterate", "reference")
OUTPUT_POLICY = ("iterate", "extrapolated")
ADAPTER_OUTPUT = ("adapter", "merged")


@dataclass
class APOConfig(SamplingConfig, RoundsConfig, DPOConfig):
    r"""
    Configuration of the [`APOTrainer`]: *Accelerated* Preference Optimization (arXiv 2410.06293), which is iterative
    DPO with an extrapolation of the policy after every round. Not to be confused with *Anchored* Preference
    Optimization, which TRL has as `loss_type="apo_zero"` and `"apo_down"`.

    The fields of [`~trl.DPOConfig`], those of [`~trl_extras.rounds.RoundsConfig`] (`num_rounds`, `round_epochs`,
    `round_data`, `keep_iterates`; `num_train_epochs` means epochs a round), those of
    [`~trl_extras.rollouts.SamplingConfig`], which matter where `train_dataset` holds prompts alone, and:

    Parameters:
        extrapolation_alpha (`list[float]`, *optional*, defaults to `[0.3]`):
            The extrapolation parameter alpha (the paper's value; equation 3.6): one value, or one a round, the t-th
            used after round t. The last one shows in `output_policy="extrapolated"` only. 0 is iterative DPO.
        round_beta (`list[float]`, *optional*):
            One `beta` a round (the paper: 0.01, 0.1, 1.0). Overrides `beta`.
        momentum_from (`str`, *optional*, defaults to `"previous_iterate"`):
            Where the momentum starts: `"previous_iterate"`, thetahat_{t+1} - thetahat_t (the paper), or `"reference"`,
            thetahat_{t+1} - theta_t, its ablation (Table 3, last row), which it finds unstable.
        output_policy (`str`, *optional*, defaults to `"iterate"`):
            What the run ends with: `"iterate"`, the last iterate (the paper's Algorithm 1), or `"extrapolated"`, one
            extrapolation more (with one round this is ExPO, arXiv 2404.16792).
        adapter_output (`str`, *optional*, defaults to `"adapter"`):
            With a LoRA adapter, what is saved at the end (our choice): `"adapter"`, the sum of the rounds' changes as
            one adapter for the original base, of rank at most `num_rounds` times the adapter's; or `"merged"`, the
            whole model with that sum in its weights, in float32. Checkpoints hold adapters in either case.
        adapter_rank (`int`, *optional*):
            With a LoRA adapter, the rank to truncate the saved one to, layer by layer, to the nearest change of that
            rank (singular values). `None` saves the sum as it is.
        adapter_rank_tolerance (`float`, *optional*, defaults to `0.05`):
            The largest relative error of the weights' change (Frobenius norm) that truncation to `adapter_rank` may
            make. Where it makes a larger one, the whole adapter is saved and the run ends with an error.
    """

    extrapolation_alpha: list[float] = field(
        default_factory=lambda: [0.3],  # the paper, section 5
        metadata={"help": "Extrapolation parameter alpha: one value, or one a round. 0 is iterative DPO."},
    )
    round_beta: list[float] | None = field(
        default=None, metadata={"help": "One `beta` a round (the paper: 0.01 0.1 1.0). Overrides `beta`."}
    )
    momentum_from: str = field(
        default="previous_iterate",
        metadata={
            "help": "'previous_iterate': momentum between un-extrapolated iterates (the paper). 'reference': from the "
            "round's reference (its ablation).",
            "choices": list(MOMENTUM_FROM),
        },
    )
    output_policy: str = field(
        default="iterate",
        metadata={
            "help": "'iterate': the last iterate (the paper). 'extrapolated': one extrapolation more (ExPO's output).",
            "choices": list(OUTPUT_POLICY),
        },
    )

    adapter_output: str = field(
        default="adapter",
        metadata={
            "help": "With a LoRA adapter, what is saved at the end. 'adapter': the rounds' changes as one adapter for "
            "the original base. 'merged': the whole model with them in its weights, in float32.",
            "choices": list(ADAPTER_OUTPUT),
        },
    )
    adapter_rank: int | None = field(
        default=None,
        metadata={
            "help": "With a LoRA adapter, the rank to truncate the saved one to. Default: the rounds' together."
        },
    )
    adapter_rank_tolerance: float = field(
        default=0.05,
        metadata={"help": "The largest relative error of the change that truncation to `adapter_rank` may make."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_apo()

    def validate_apo(self) -> None:
        """
        Check the fields of this class and its mixins; the trainer does it again, because fields can be set later.

        Raises:
            ConfigurationError: naming the field, what it got, what it wants.
        """
        # argparse checks choices for flags only: a YAML file or a program can bring anything.
        for name, choices in (
            ("momentum_from", MOMENTUM_FROM),
            ("output_policy", OUTPUT_POLICY),
            ("adapter_output", ADAPTER_OUTPUT),
        ):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"`{name}` is {getattr(self, name)!r}, but wants one of {', '.join(choices)}."
                )
        self.validate_rounds()
        self.validate_sampling()
        self.extrapolation_alpha = as_list(
            "extrapolation_alpha",
            self.extrapolation_alpha,
            float,
            lambda alpha: math.isfinite(alpha) and alpha >= 0,
            "finite numbers of at least 0, one or one a round (the paper: 0.3)",
        )
        per_round("extrapolation_alpha", self.extrapolation_alpha, self.num_rounds)
        if self.round_beta is not None:
            self.round_beta = as_list(
                "round_beta",
                self.round_beta,
                float,
                lambda beta: math.isfinite(beta) and beta > 0,
                "finite numbers above 0, one a round",
            )
            if len(self.round_beta) != self.num_rounds:
                raise ConfigurationError(
                    f"`round_beta` has {len(self.round_beta)} values, but `num_rounds` is {self.num_rounds}: give one "
                    "value a round."
                )

        set_number(self, "adapter_rank_tolerance", lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
        if self.adapter_rank is None and self.adapter_rank_tolerance != 0.05:
            raise ConfigurationError(
                f"`adapter_rank_tolerance` is {self.adapter_rank_tolerance:g}, but nothing is truncated: set "
                "`adapter_rank`, or leave it out."
            )
        if self.adapter_rank is not None and (
            not isinstance(self.adapter_rank, int) or isinstance(self.adapter_rank, bool) or self.adapter_rank < 1
        ):
            raise ConfigurationError(
                f"`adapter_rank` is {self.adapter_rank!r}, but has to be a whole number of at least 1: leave it out "
                "to save the rounds' changes whole."
            )

    def alpha_of(self, round_index: int) -> float:
        """The alpha used after round `round_index`."""
        return per_round("extrapolation_alpha", self.extrapolation_alpha, self.num_rounds)[round_index]

    def beta_of(self, round_index: int) -> float:
        """The beta of round `round_index`."""
        return self.beta if self.round_beta is None else self.round_beta[round_index]
