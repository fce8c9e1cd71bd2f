"""What a method that samples from its policy can be configured with; names as in TRL's GRPOConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import ConfigurationError
from ..rounds.config import as_list, set_number


# The word that stands for a labeller elsewhere.
EXTERNAL = "external"
# Prompts whose completions are sampled together unless `generation_batch_size` says otherwise.
_DEFAULT_BATCH_PROMPTS = 8


@dataclass
class SamplingConfig:
    """
    Mixin for a config dataclass of TRL: how responses are sampled and judged, where `train_dataset` holds
    prompts alone.

    Parameters:
        reward_funcs (`list[str]`, *optional*):
            Rewards: `package.module:function`, `path/to/file.py:function`, TRL's `package.module.function`, the name
            of a function in `trl.rewards`, or the id or folder of a sequence classification model with one label.
        reward_weights (`list[float]`, *optional*):
            One weight a reward; all 1 by default.
        ranker (`str`, *optional*):
            Instead of rewards: a function, named like a reward, that orders the completions of a prompt, or
            `"external"`: the run stops after sampling and goes on when the labels have been filled in.
        num_generations (`int`, *optional*, defaults to `5`):
            Completions per prompt (K).
        prompts_per_round (`int`, *optional*):
            Prompts that each round samples for, and the pairs that it trains on; further prompts of the round replace
            those that give no pair. By default all prompts of the round.
        temperature, top_p, top_k, min_p, repetition_penalty (*optional*):
            The distribution that is sampled from, whatever the checkpoint's own settings are. `top_k=0` and
            `min_p=None` are off.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens after which a completion is cut.
        generation_batch_size (`int`, *optional*):
            Completions that one process samples at a time, a multiple of `num_generations`; those of 8 prompts by
            default. What is sampled depends on it, but not on the number of processes.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: package.module:function, path/to/file.py:function, the name of a function in "
            "trl.rewards, or the id or folder of a reward model."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a reward; all 1 by default."}
    )
    ranker: str | None = field(
        default=None,
        metadata={
            "help": "Instead of rewards: a function that orders completions (named like a reward), or 'external': "
            "stop "
            "after sampling and go on when labels have been filled in."
        },
    )
    num_generations: int = field(default=5, metadata={"help": "Completions per prompt."})
    prompts_per_round: int | None = field(
        default=None,
        metadata={
            "help": "Prompts that each round samples for; further ones replace those that give no pair. By default "
            "all prompts of the round."
        },
    )
    temperature: float = field(default=0.7, metadata={"help": "Temperature for sampling."})
    top_p: float = field(default=0.9, metadata={"help": "Probability mass of the tokens to sample from; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens to sample from; 0 is off."})
    min_p: float | None = field(
        default=None, metadata={"help": "Least probability of a token, as a share of the likeliest one's."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty on tokens that have occurred, prompt included; 1 is off."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens after which a completion is cut."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions that one process samples at a time, a multiple of num_generations."},
    )

    def validate_sampling(self, least_generations: int = 2) -> None:
        """
        Check the fields of this mixin.

        Args:
            least_generations: how many completions of a prompt the method needs.

        Raises:
            ValueError: naming the field, what it got, what it wants.
        """

        def whole(name: str, least: int, wants: str) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"`{name}` is {value!r}, but wants {wants}.")

        whole(
            "num_generations",
            least_generations,
            f"a whole number of at least {least_generations}, the completions of a prompt",
        )
        if self.prompts_per_round is not None:
            whole("prompts_per_round", 1, "a whole number of at least 1, or nothing for all prompts of the round")
        whole("max_completion_length", 1, "a whole number of at least 1")
        whole("top_k", 0, "a whole number of at least 0; 0 is off")
        set_number(self, "temperature", lambda t: t > 0, "a finite number above 0")
        set_number(self, "top_p", lambda p: 0 < p <= 1, "a number above 0 and at most 1; 1 is off")
        set_number(self, "repetition_penalty", lambda p: p > 0, "a finite number above 0; 1 is off")
        if self.min_p is not None:
            set_number(self, "min_p", lambda p: 0 <= p <= 1, "a number from 0 to 1, or nothing")
        if self.generation_batch_size is not None:
            size, each = self.generation_batch_size, max(self.num_generations, 1)
            whole("generation_batch_size", 1, "a whole number of at least 1")
            if size % each:
                raise ConfigurationError(
                    f"`generation_batch_size` is {size}, but wants a multiple of `num_generations`, which is {each}: "
                    f"the completions of a prompt are sampled together. Use {max(size // each, 1) * each}."
                )
        self._validate_judges()

    def _validate_judges(self) -> None:
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if self.reward_funcs is not None:
            if not all(isinstance(name, str) and name.strip() for name in self.reward_funcs):
                raise ConfigurationError(
                    f"`reward_funcs` is {self.reward_funcs!r}, but wants names: package.module:function, "
                    "path/to/file.py:function, or a model; functions and models themselves are the trainer's argument "
                    "`reward_funcs`."
                )
            self.reward_funcs = list(self.reward_funcs) or None
        if self.ranker is not None and (not isinstance(self.ranker, str) or not self.ranker.strip()):
            raise ConfigurationError(
                f"`ranker` is {self.ranker!r}, but wants a name: package.module:function, path/to/file.py:function, "
                "or "
                f"{EXTERNAL!r}; a function itself is the trainer's argument `ranker`."
            )
        if self.reward_weights is not None:
            self.reward_weights = as_list(
                "reward_weights", self.reward_weights, float, math.isfinite, "finite numbers, one a reward"
            )
        if self.reward_funcs and self.ranker:
            raise ConfigurationError(
                "`reward_funcs` and `ranker` are both set, but a pair is chosen by one of them: leave one out."
            )
        if self.reward_funcs and self.reward_weights and len(self.reward_funcs) != len(self.reward_weights):
            raise ConfigurationError(
                f"`reward_weights` has {len(self.reward_weights)} values, but `reward_funcs` has "
                f"{len(self.reward_funcs)}: give one weight a reward."
            )

    @property
    def batch_prompts(self) -> int:
        """Prompts whose completions are sampled in one batch."""
        if self.generation_batch_size is None:
            return _DEFAULT_BATCH_PROMPTS
        return self.generation_batch_size // max(self.num_generations, 1)
