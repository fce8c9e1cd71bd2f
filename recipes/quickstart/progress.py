"""How far a run is, and how long it will take: a bar with the time left, or lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass
class Stage:
    """A stretch of work of one kind, in seconds that it takes on two idle cores."""

    label: str
    kind: str
    seconds: float
    done: float = 0.0


# Seconds a unit on two idle cores, for the first estimate alone: the pace of each kind of work is measured as it goes.
SECONDS = {"sampling": 0.15, "reference": 0.13, "training": 0.45, "reading": 0.05}


class Meter:
    """
    One bar with the time left, over all stages; without a terminal a line at every stage and every 15 seconds.

    Kinds of work differ in speed, and machines in which kind they are slow at: the time left of each kind is what that
    kind has taken so far, and as long as little of it is done, what the others have taken.
    """

    def __init__(self, console: Console, stages: list[Stage]):
        self.console, self.stages, self.current = console, stages, -1
        self.begun = self.told = self.seen = time.monotonic()
        self.took: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.share = 0.0
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Meter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def enter(self, label: str) -> None:
        """A stage begins. Those before it are over, also where a resumed run has found their work done."""
        index = next(index for index, stage in enumerate(self.stages) if stage.label == label)
        if index != self.current:
            self.current, self.seen = index, time.monotonic()
            self._show(at_once=True)

    def advance(self, units: float) -> None:
        """So much of the current stage is done, in the units of its kind."""
        stage, now = self.stages[self.current], time.monotonic()
        seconds = min(units * SECONDS[stage.kind], stage.seconds - stage.done)
        stage.done += seconds
        self.done[stage.kind] = self.done.get(stage.kind, 0.0) + seconds
        self.took[stage.kind] = self.took.get(stage.kind, 0.0) + now - self.seen
        self.seen = now
        self._show()

    def left(self) -> float | None:
        """Seconds; None before anything has been done here."""
        done, took = sum(self.done.values()), sum(self.took.values())
        if done < 1:
            return None
        seconds = 0.0
        for stage in self.stages[self.current :]:
            # As if ten seconds of this kind had gone at the pace of all work so far.
            kind_done, kind_took = self.done.get(stage.kind, 0.0), self.took.get(stage.kind, 0.0)
            pace = (kind_took + 10 * took / done) / (kind_done + 10)
            seconds += max(stage.seconds - stage.done, 0.0) * pace
        return seconds

    def _show(self, at_once: bool = False) -> None:
        left, now, label = self.left(), time.monotonic(), self.stages[self.current].label
        if left is not None:
            # Never back: an estimate that has grown shows in the time left.
            self.share = max(self.share, (now - self.begun) / max(now - self.begun + left, 1e-9))
        about = "" if left is None else f"about {duration(left)} left"
        if self.bar:
            self.bar.update(self.task, completed=self.share, description=label, left=about)
        elif at_once or now - self.told >= 15:
            self.told = now
            self.say(f"  {100 * self.share:3.0f} %  {label}{', ' if about else ''}{about}")


class Watch:
    """
    Tells the meter what a run is at, from outside: how a forward pass is called says which stage it belongs to.
    Sampling is in inference mode, a training step has gradients, and the reference is what else there is.
    """

    def __init__(self, meter: Meter, model: Any, prompts: int, batch_size: int):
        self.meter, self.model = meter, model
        self.steps = math.ceil(prompts / batch_size)
        self.batch_size = batch_size
        self.trained = self.ended = 0  # rounds
        self.sampled: float | None = None  # completions' worth of a forward pass while sampling
        self.measuring = False
        self.generate = model.generate
        self.handles: list[Any] = []

    def __enter__(self) -> Watch:
        self.model.generate = self.sample
        self.handles = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        del self.model.generate
        for handle in self.handles:
            handle.remove()

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs["generation_config"]
        completions = kwargs["input_ids"].shape[0] * config.num_return_sequences
        if config.num_return_sequences > 1:
            self.meter.enter(sampling_label(self.trained))
        else:
            self.meter.enter(held_out_label(self.trained, self.ended == self.trained))
        self.sampled = completions / config.max_new_tokens
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        handle = self.model.register_forward_hook(count)
        try:
            return self.generate(*args, **kwargs)
        finally:
            handle.remove()
            # All completions may have ended before the limit.
            self.meter.advance(self.sampled * (config.max_new_tokens - passes))
            self.sampled = None

    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        # In inference mode outside of sampling the sampler looks at the model: one short pass, which is no stage.
        if self.sampled is None and not self.measuring and not torch.is_inference_mode_enabled():
            label = training_label if torch.is_grad_enabled() else reference_label
            self.meter.enter(label(self.trained))

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        import torch

        if self.sampled is not None:
            self.meter.advance(self.sampled)
        elif not (self.measuring or torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.meter.advance(ids.shape[0] / 2)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Forward passes of our own, which `measure` counts."""
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False

    def resume(self, global_step: int) -> None:
        """Checkpoints are written at the last step of a round, before its end is measured."""
        self.trained = global_step // self.steps
        self.ended = max(self.trained - 1, 0)

    def step(self, global_step: int) -> None:
        self.meter.advance(self.batch_size)
        self.trained = global_step // self.steps


def sampling_label(round_index: int) -> str:
    return f"round {round_index + 1}: sampling from the policy"


def reference_label(round_index: int) -> str:
    return f"round {round_index + 1}: reference log-probabilities"


def training_label(round_index: int) -> str:
    return f"round {round_index + 1}: training"


def held_out_label(trained: int, ended: bool) -> str:
    """Of the start, of an iterate (`ended` is false: its round is being finished), or of what follows from it."""
    if trained == 0:
        return "held-out prompts: the start"
    return f"held-out prompts: round {trained}{', extrapolated' if ended else ''}"


def reading_label(round_index: int) -> str:
    return f"round {round_index + 1}: loss on unseen text"


def plan(settings: dict[str, Any], held_out: int, texts: int) -> list[Stage]:
    """All that a run does, in its order."""

    def stage(label: str, kind: str, units: float) -> Stage:
        return Stage(label, kind, units * SECONDS[kind])

    prompts = settings["prompts"]
    stages = [
        stage("the start: loss on unseen text", "reading", texts),
        stage(held_out_label(0, True), "sampling", held_out),
    ]
    for index in range(settings["rounds"]):
        stages += [
            stage(sampling_label(index), "sampling", prompts * settings["num_generations"]),
            stage(reference_label(index), "reference", prompts),
            stage(training_label(index), "training", prompts),
            stage(held_out_label(index + 1, False), "sampling", held_out),
            stage(reading_label(index), "reading", texts),
        ]
        if settings["alpha"] > 0:
            stages.append(stage(held_out_label(index + 1, True), "sampling", held_out))
    return stages


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
