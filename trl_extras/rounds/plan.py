"""The arithmetic of a run in rounds: which step belongs to which round. Pure."""

from __future__ import annotations

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
