"""How much memory each phase of a round takes at its highest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


# Often enough to see the peak of a training step that takes a tenth of a second.
_SECONDS = 0.02


class PhaseMemory:
    """
    The highest memory of each phase, by its name, in bytes: on a GPU what torch has allocated there, elsewhere the
    whole process's resident memory, looked at fifty times a second.

    On a GPU torch's own peak is set back when a phase begins.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peaks: dict[str, int] = {}
        self._name: str | None = None
        self._watch: threading.Thread | None = None
        self._over = threading.Event()

    def begin(self, name: str) -> None:
        """Start a phase; one that is under way ends."""
        self.end()
        self._name = name
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._over.clear()
        self._watch = threading.Thread(target=self._look, args=(name,), daemon=True, name=f"memory of {name}")
        self._watch.start()

    def end(self) -> None:
        """End the phase that is under way, if there is one."""
        name, self._name = self._name, None
        if name is None:
            return
        if self._watch is not None:
            self._over.set()
            self._watch.join()
            self._watch = None
        elif self.device.type == "cuda":
            self._note(name, torch.cuda.max_memory_allocated(self.device))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def _look(self, name: str) -> None:
        process = psutil.Process()
        while True:
            self._note(name, process.memory_info().rss)
            if self._over.wait(_SECONDS):
                self._note(name, process.memory_info().rss)
                return

    def _note(self, name: str, used: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), used)
