"""What every method that works in rounds can be configured with, and what it cannot do in more than one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError


ROUND_DATA = ("split", "reuse")

# Schedules that follow a metric: a round's schedule has to be a function of the step alone.
_METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# Optimisers that act during the backward pass, or keep state outside `optimizer.state`: it cannot be made fresh.
_UNRESETTABLE_OPTIMIZERS = ("lomo", "adalomo")
_LENGTH_SAMPLING = ("group_by_length", "batch_rebalance")


def as_list(name: str, value: Any, kind: type, check: Callable[[Any], bool], wants: str) -> list[Any]:
    """
    Read a list field that may come as a bare number or as text (YAML's `0.4`, `[1e-2, 1e-1]`), and check each value.

    Raises:
        ValueError: naming the field, what it got and what it wants.
    """
    try:
        values = [value] if isinstance(value, str) else list(value)
    except TypeError:
        values = [value]
    result = []
    for item in values:
        try:
            number = float(item)
            valid = not isinstance(item, bool) and (kind is float or number == int(number))
            number = number if kind is float else int(number)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid or not check(number):
            raise ConfigurationError(f"`{name}` is {value!r}, but wants {wants}.")
        result.append(number)
    return result


def set_number(config: Any, name: str, valid: Callable[[float], bool], wants: str) -> None:
    """
    Read a number field, which may come as text, check it, and set it as a float.

    Raises:
        ValueError: naming the field, what it got and what it wants.
    """
    value = getattr(config, name)
    try:
        right = not isinstance(value, bool) and math.isfinite(float(value)) and valid(float(value))
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ConfigurationError(f"`{name}` is {value!r}, but wants {wants}.")
    setattr(config, name, float(value))


def per_round(name: str, values: Sequence[Any], num_rounds: int) -> list[Any]:
    """
    One value a round from one value or `num_rounds` of them.

    Raises:
        ValueError: another number of values, naming the field.
    """
    if len(values) == 1:
        return list(values) * num_rounds
    if len(values) != num_rounds:
        raise ConfigurationError(
            f"`{name}` has {len(values)} values, but `num_rounds` is {num_rounds}: give one value, or one a round."
        )
    return list(values)


@dataclass
class RoundsConfig:
    """
    Mixin for a config dataclass of TRL: the fields of a run in rounds. A "round" is what the papers call an iteration
    (TRL's GRPO uses `num_iterations` for something else).

    Parameters:
        num_rounds (`int`, *optional*, defaults to `3`):
            Number of rounds (T). With one round the run is the parent trainer's.
        num_train_epochs (`float`, *optional*, defaults to `1`):
            Epochs **a round**; a whole number if there is more than one round.
        round_epochs (`list[int]`, *optional*):
            Epochs of each round, one value a round; overrides `num_train_epochs`.
        round_data (`str`, *optional*, defaults to `"split"`):
            `"split"` trains each round on its own fold of the training set: equally large, without a row in common,
            membership drawn with `seed`, equal prompts in one fold; the remainder is left out and logged. `"reuse"`
            trains every round on all rows.
        keep_iterates (`bool`, *optional*, defaults to `False`):
            Whether to keep the policy after every round, as a folder that transformers loads:
            `output_dir/_rounds/iterates/1` and so on.
    """

    num_rounds: int = field(
        default=3, metadata={"help": "Number of rounds (T). With one round the run is the parent trainer's."}
    )
    num_train_epochs: float = field(
        default=1, metadata={"help": "Epochs a round. A whole number if there is more than one round."}
    )
    round_epochs: list[int] | None = field(
        default=None,
        metadata={"help": "Epochs of each round, one value a round. Overrides `num_train_epochs`."},
    )
    round_data: str = field(
        default="split",
        metadata={
            "help": "'split': each round trains on its own fold of the training set. 'reuse': every round trains on "
            "all rows.",
            "choices": list(ROUND_DATA),
        },
    )
    keep_iterates: bool = field(
        default=False,
        metadata={"help": "Keep the policy after every round as a loadable folder in output_dir/_rounds/iterates."},
    )

    def validate_rounds(self) -> None:
        """
        Check the fields of this mixin, and that the rest of the configuration works with them.

        Raises:
            ValueError: naming the field, what it got, what it wants.
        """
        if isinstance(self.num_rounds, bool) or not isinstance(self.num_rounds, int) or self.num_rounds < 1:
            raise ConfigurationError(f"`num_rounds` is {self.num_rounds!r}, but wants a whole number of at least 1.")
        if self.round_data not in ROUND_DATA:
            raise ConfigurationError(f"`round_data` is {self.round_data!r}, but wants one of {', '.join(ROUND_DATA)}.")
        if self.round_epochs is not None:
            self.round_epochs = as_list(
                "round_epochs", self.round_epochs, int, lambda n: n >= 1, "whole numbers of at least 1"
            )
            if len(self.round_epochs) != self.num_rounds:
                raise ConfigurationError(
                    f"`round_epochs` has {len(self.round_epochs)} values, but `num_rounds` is {self.num_rounds}: give "
                    "one value a round."
                )
        if self.num_rounds == 1:
            return
        epochs = self.num_train_epochs
        if self.round_epochs is None and not (math.isfinite(epochs) and epochs >= 1 and epochs == int(epochs)):
            raise ConfigurationError(
                f"`num_train_epochs` is {epochs!r}, but means epochs a round and wants a whole number of at least 1 "
                "if there is more than one round."
            )
        for setting, reason in self.single_round_settings():
            raise ConfigurationError(
                f"{setting} does not work with more than one round (`num_rounds` is {self.num_rounds}): {reason}"
            )

    def single_round_settings(self) -> list[tuple[str, str]]:
        """The settings in force that only a run of one round can have, each with the reason."""
        args: Any = self
        found = []

        def refuse(condition: Any, setting: str, reason: str) -> None:
            if condition:
                found.append((setting, reason))

        refuse(
            getattr(args, "sync_ref_model", False),
            "`sync_ref_model=True`",
            "the reference belongs to the rounds. Leave it False.",
        )
        refuse(
            args.load_best_model_at_end,
            "`load_best_model_at_end=True`",
            "a round is a whole number of epochs, and the last iterate is the output. Leave it False and choose among "
            "the folders of `keep_iterates`.",
        )
        refuse(
            args.auto_find_batch_size,
            "`auto_find_batch_size=True`",
            "it would start the rounds again with another number of steps. Set `per_device_train_batch_size`.",
        )
        refuse(
            getattr(args, "enable_jit_checkpoint", False),
            "`enable_jit_checkpoint=True`",
            "it can save the extrapolated policy where the iterate is expected. Leave it False.",
        )
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        refuse(
            schedule in _METRIC_SCHEDULES,
            f"`lr_scheduler_type={schedule!r}`",
            "a round's schedule starts afresh and has to be a function of the step alone. Use 'linear' or 'cosine'.",
        )
        optim = str(getattr(args.optim, "value", args.optim))
        refuse(
            optim.startswith("schedule_free"),
            f"`optim={optim!r}`",
            "a schedule-free optimiser keeps the weights that count inside itself. Use 'adamw_torch'.",
        )
        refuse(
            optim in _UNRESETTABLE_OPTIMIZERS or optim.endswith("_layerwise"),
            f"`optim={optim!r}`",
            "its state cannot be made fresh at the start of a round. Use 'adamw_torch'.",
        )
        refuse(
            args.ignore_data_skip,
            "`ignore_data_skip=True`",
            "a run that resumes inside an epoch would count its rounds from there. Leave it False.",
        )
        refuse(
            args.dataloader_persistent_workers,
            "`dataloader_persistent_workers=True`",
            "persistent workers would go on reading the first round's data. Leave it False.",
        )
        sampling = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
        refuse(
            sampling in _LENGTH_SAMPLING,
            f"`train_sampling_strategy={sampling!r}`",
            "it reads the lengths of the rows once, and the rows change. Use 'random' or 'sequential'.",
        )
        return found

    def epochs_of_rounds(self) -> list[int]:
        """Epochs of each round, `num_rounds` of them."""
        if self.round_epochs is not None:
            return list(self.round_epochs)
        return [int(self.num_train_epochs)] * self.num_rounds
