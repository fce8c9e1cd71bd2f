"""Configuration of Successive Policy Re-weighting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from ..errors import ConfigurationError
from ..rollouts.config import EXTERNAL, SamplingConfig
from ..rounds.config import RoundsConfig, as_list, per_round, set_number


NO_CLIP = "none"


@dataclass
class SPRConfig(SamplingConfig, RoundsConfig, SFTConfig):
    r"""
    Configuration of the [`SPRTrainer`]: Successive Policy Re-weighting (ICLR 2025 submission 12963), which is rounds
    of supervised fine-tuning on responses that are weighted by their rewards.

    The fields of [`~trl.SFTConfig`], those of [`~trl_extras.rounds.RoundsConfig`] (`num_rounds`, `round_epochs`,
    `round_data`, `keep_iterates`; `num_train_epochs` means epochs a round), those of
    [`~trl_extras.rollouts.SamplingConfig`], and:

    Parameters:
        reward_temperature (`float`, *optional*, defaults to `0.1`):
            beta, in units of the reward: a response weighs exp(reward / beta), relative to the prompt's others. Large
            is fine-tuning on all responses, small on the best alone.
        importance_clip (`str`, *optional*, defaults to `"5.0"`):
            Bound on the log importance ratio of a response, in nats, around its group's median; `"none"` for none.
        behavior_logps_column (`str`, *optional*):
            Column of the offline responses with the log-probability of the whole response under the distribution that
            it came from, in nats, of the tokens that are trained on. Without it offline responses count as if they
            came from the policy (advantage-weighted regression). Of preference pairs: `chosen_` and `rejected_` and
            this name.
        offline_dataset_name, offline_dataset_config, offline_dataset_split (`str`, *optional*):
            Offline responses, by the id or folder of a dataset (split `"train"` by default). Then the training set
            holds prompts.
        offline_ratio (`list[float]`, *optional*):
            The offline responses' share of a round's training rows, one value or one a round. By default 0.5 where
            there are any, 1 with `num_generations=0`.
        skip_equal_groups (`bool`, *optional*, defaults to `False`):
            Whether to leave out prompts whose responses all have the same reward, which teach plain fine-tuning.
        num_generations (`int`, *optional*, defaults to `5`):
            Responses sampled for each prompt; 0 samples none: reward-weighted regression on offline responses.
        temperature, top_p (*optional*, default to `1.0`):
            The distribution that is sampled from. A temperature is corrected for by the importance ratio; what
            `top_p`, `top_k` or `min_p` cut away cannot be.
    """

    num_rounds: int = field(default=3, metadata={"help": "Number of rounds."})
    num_train_epochs: float = field(default=1, metadata={"help": "Epochs a round, a whole number."})
    ranker: str | None = field(
        default=None,
        metadata={
            "help": "'external': stop after sampling and go on when rewards have been filled in. Rankers proper have "
            "no rewards to weigh by."
        },
    )
    reward_temperature: float = field(
        default=0.1,
        metadata={
            "help": "beta, in units of the reward: a response weighs exp(reward / beta), relative to the prompt's "
            "others."
        },
    )
    importance_clip: str = field(
        default="5.0",
        metadata={
            "help": "Bound on the log importance ratio of a response, in nats, around its group's median; 'none' for "
            "none."
        },
    )
    behavior_logps_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the offline responses with their log-probability under the distribution that they came "
            "from, in nats."
        },
    )
    offline_dataset_name: str | None = field(
        default=None, metadata={"help": "Offline responses: id or folder of a dataset."}
    )
    offline_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    offline_dataset_split: str | None = field(default=None, metadata={"help": "Its split; 'train' by default."})
    offline_ratio: list[float] | None = field(
        default=None,
        metadata={
            "help": "The offline responses' share of a round's training rows, one value or one a round. By default "
            "0.5 where there are any, 1 with num_generations 0."
        },
    )
    skip_equal_groups: bool = field(
        default=False, metadata={"help": "Leave out prompts whose responses all have the same reward."}
    )
    num_generations: int = field(
        default=5, metadata={"help": "Responses sampled for each prompt; 0 trains on offline responses alone."}
    )
    prompts_per_round: int | None = field(
        default=None, metadata={"help": "Prompts that each round samples for. By default all prompts of the round."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature for sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass of the tokens to sample from; 1 is off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_spr()

    def validate_spr(self) -> None:
        """
        Check the fields of this class and its mixins; the trainer does it again, because fields can be set later.

        Raises:
            ConfigurationError: naming the field, what it got, what it wants.
        """
        self.validate_rounds()
        self.validate_sampling(least_generations=0)
        set_number(
            self,
            "reward_temperature",
            lambda beta: beta > 0,
            "a finite number above 0, in units of the reward (the smaller, the more the best response counts)",
        )
        if str(self.importance_clip) != NO_CLIP:
            set_number(
                self, "importance_clip", lambda clip: clip > 0, f"a finite number above 0, in nats, or {NO_CLIP!r}"
            )
            # As text, like everything that may be a word or a number.
            self.importance_clip = repr(float(self.importance_clip))
        if self.offline_ratio is not None:
            self.offline_ratio = as_list(
                "offline_ratio",
                self.offline_ratio,
                float,
                lambda share: math.isfinite(share) and 0 <= share <= 1,
                "numbers from 0 to 1, one or one a round: the share of offline responses among the training rows",
            )
            per_round("offline_ratio", self.offline_ratio, self.num_rounds)
            self._check_ratio(self.offline_ratio)
        if self.num_generations == 0 and self.prompts_per_round is not None:
            raise ConfigurationError(
                f"`prompts_per_round` is {self.prompts_per_round}, but with `num_generations=0` no prompt is sampled "
                "for: leave it out."
            )
        for name in ("offline_dataset_config", "offline_dataset_split"):
            if getattr(self, name) is not None and self.offline_dataset_name is None:
                raise ConfigurationError(
                    f"`{name}` is {getattr(self, name)!r}, but there is no `offline_dataset_name` for it: give that, "
                    "or leave it out."
                )
        if self.ranker is not None and self.ranker != EXTERNAL:
            raise ConfigurationError(
                f"`ranker` is {self.ranker!r}, which orders responses, but SPR weights them by rewards: give "
                f"`reward_funcs`, or the ranker {EXTERNAL!r} with `rewards` in its label file."
            )
        self._check_parent()

    def _check_ratio(self, ratio: list[float]) -> None:
        if self.num_generations == 0 and any(share != 1 for share in ratio):
            raise ConfigurationError(
                f"`offline_ratio` is {ratio}, but with `num_generations=0` all training rows are offline responses: "
                "leave it out, or sample some."
            )
        if self.num_generations > 0 and all(share == 1 for share in ratio):
            raise ConfigurationError(
                f"`offline_ratio` is {ratio}, so that no sampled response would be trained on, but `num_generations` "
                f"is {self.num_generations}: set `num_generations` to 0, or use a smaller share."
            )

    def _check_parent(self) -> None:
        """Refuse what only plain fine-tuning can have."""
        for condition, setting, reason in (
            (
                self.packing,
                "`packing=True`",
                "packing puts several responses into one row, and each has a weight of its own. Leave it False.",
            ),
            (
                self.padding_free,
                "`padding_free=True`",
                "it makes one row of a batch, and each response has a weight of its own. Leave it False.",
            ),
            (
                self.loss_type != "nll",
                f"`loss_type={self.loss_type!r}`",
                "the weights are those of a log-likelihood. Use 'nll'.",
            ),
            (
                self.label_smoothing_factor > 0,
                f"`label_smoothing_factor={self.label_smoothing_factor:g}`",
                "the weights are those of a log-likelihood. Use 0.",
            ),
            (
                self.completion_only_loss is False,
                "`completion_only_loss=False`",
                "it is responses that are weighted, not prompts. Leave it out.",
            ),
            (
                self.assistant_only_loss,
                "`assistant_only_loss=True`",
                "the loss is that of the whole response already. Leave it False.",
            ),
            (
                self.shuffle_dataset,
                "`shuffle_dataset=True`",
                "responses belong to their prompts. Leave it False; `train_sampling_strategy='random'` shuffles the "
                "rows of a round.",
            ),
            (
                (self.dataset_kwargs or {}).get("skip_prepare_dataset", False),
                "`dataset_kwargs={'skip_prepare_dataset': True}`",
                "SPR needs prompts and responses as text, to sample and to score. Leave it out.",
            ),
        ):
            if condition:
                raise ConfigurationError(f"{setting} does not work with SPR: {reason}")

    @property
    def clip(self) -> float | None:
        """c, nats."""
        return None if self.importance_clip == NO_CLIP else float(self.importance_clip)

    @property
    def samples_exactly(self) -> bool:
        """Whether responses are drawn from the policy's own distribution."""
        return self.temperature == 1 and self.repetition_penalty == 1 and not self.truncates

    @property
    def truncates(self) -> list[str]:
        """The settings in force that make some responses impossible."""
        found = {
            "top_p": self.top_p < 1,
            "top_k": self.top_k > 0,
            "min_p": self.min_p is not None and self.min_p > 0,
        }
        return [f"{name}={getattr(self, name)}" for name, on in found.items() if on]

    def ratio_of(self, round_index: int) -> float:
        """The share of offline responses in a round's rows, where there are any."""
        ratio = self.offline_ratio or [1.0 if self.num_generations == 0 else 0.5]
        return per_round("offline_ratio", ratio, self.num_rounds)[round_index]
