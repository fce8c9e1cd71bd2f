"""Stops a run in which somebody else's override takes the place of a method's loss: it would train another method."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .errors import ConfigurationError


_LOSS_METHODS = ("training_step", "compute_loss", "_compute_loss")
_UPSTREAM = ("trl_extras.", "trl.", "transformers.")


def override_of_the_loss(trainer: Any) -> str:
    """The method of a user's that takes part in a trainer's loss, as `Class.method`, for messages."""
    for name in _LOSS_METHODS:
        if name in vars(trainer):
            return f"`{name}`, which has been set on the trainer,"
    for cls in type(trainer).__mro__:
        for name in _LOSS_METHODS:
            if name in vars(cls) and not f"{cls.__module__}.".startswith(_UPSTREAM):
                return f"`{cls.__name__}.{name}`"
    return "an override of the loss"


def refuse_override(trainer: Any, term: str, how: str) -> ConfigurationError:
    """
    The error that says which override leaves a method's term out.

    Args:
        term: what is missing.
        how: what the override has to do, after "it".
    """
    return ConfigurationError(
        f"{override_of_the_loss(trainer)} leaves out {term}, so that the run would be another method: it has to {how}."
    )


class OwnLoss(TrainerCallback):
    """
    Looks after every micro-batch whether the method's term was in its loss.

    Args:
        trainer: the trainer.
        term: what is missing otherwise, for the message.
    """

    def __init__(self, trainer: Any, term: str):
        self.trainer, self.term = trainer, term
        self._seen = False

    def seen(self) -> None:
        """The term is in the loss of the micro-batch at hand."""
        self._seen = True

    def _look(self) -> None:
        if not self._seen:
            raise refuse_override(
                self.trainer, self.term, "call `super().compute_loss(model, inputs, ...)` with what it was given"
            )
        self._seen = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look()
