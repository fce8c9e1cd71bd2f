"""The arithmetic of a run in rounds: which step belongs to which round. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class RoundPlan:
    """
    A run of `len(epochs)` rounds; round t has `epochs[t]` epochs of `steps_per_epoch` optimiser steps each.

    Every epoch has the same number of steps, because transformers fixes that number once and derives the epoch from
    the global step when it resumes.
    """

    epochs: tuple[int, ...]
    steps_per_epoch: int

    @property
    def starts(self) -> tuple[int, ...]:
        """The global step at which each round begins, and, last, the one at which the run ends."""
        return tuple(self.steps_per_epoch * total for total in accumulate(self.epochs, initial=0))

    @property
    def num_rounds(self) -> int:
        return len(self.epochs)

    @property
    def total_epochs(self) -> int:
        return sum(self.epochs)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.total_epochs

    def steps(self, round_index: int) -> int:
        """Optimiser steps of a round."""
        return self.steps_per_epoch * self.epochs[round_index]

    def round_of(self, step: int) -> int:
        """The round that makes the step after `step` steps; the last one at the end of the run."""
        starts = self.starts
        return next((t for t in range(self.num_rounds) if step < starts[t + 1]), self.num_rounds - 1)

    def round_of_checkpoint(self, step: int) -> int:
        """
        The round whose training a checkpoint after `step` steps belongs to: at a boundary, the one just finished.
        """
        return self.round_of(max(step - 1, 0))

    def starts_at(self, step: int) -> int | None:
        """The round that begins at `step`, or None inside a round and at the end."""
        return self.starts.index(step) if step in self.starts[:-1] else None


def restarting(plan: RoundPlan, lambdas: Sequence[Callable[[int], float]]) -> Callable[[int], float]:
    """
    A learning-rate factor that starts again in every round.

    Args:
        plan: the rounds.
        lambdas: for each round its factor as a function of the step within that round.

    Returns:
        The factor as a function of the step of the run. At the step where a round begins it is that round's first, so
        the scheduler's own step at the end of a round already sets the next round's rate.
    """

    def factor(step: int) -> float:
        round_index = plan.round_of(step)
        return lambdas[round_index](step - plan.starts[round_index])

    return factor
