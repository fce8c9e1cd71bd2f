"""
The on-policy half of the kill campaign (`python tests/kill_campaign.py 40 --on-policy`): runs that sample their own
rows, what such a run was doing when it was killed, and what no later life may do again.

While it runs, a child writes down what it has done, line by line, in a file outside the output folder: a batch
sampled, a batch judged (the judge itself writes this, after it has its answer), weights saved for a round, reference
log-probabilities computed, rows made. At every kill the parent looks at the output folder. Whatever was whole there

- is not done again by any later life: not in those that start anew, nor after a return to an earlier round;
- is the same file, by inode and time, until its phase is over, and a finished table for good;
- is, as far as it is a finished table, the table of the run left alone, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from tests import tiny
from trl_extras import APOTrainer, SPOTrainer
from trl_extras.rollouts.sampling import TransformersSampler
from trl_extras.rollouts.store import TABLE, RolloutStore
from trl_extras.rollouts.trainer import RolloutsTrainer
from trl_extras.rounds import durable
from trl_extras.rounds.saving import WholeCheckpoints
from trl_extras.rounds.state import ROUNDS_DIR, FullWeights, RoundFolder
from trl_extras.rounds.trainer import RoundsTrainer


SET_PHASES = ("opening the set", "sampling", "scoring", "finishing the table")
SETS = ("", "held-out at the start, ", "held-out, iterate, ", "held-out, extrapolated, ")
TRAINING = "training"
# What a run is doing, as a user would say it; the first is what is none of the others.
PHASES = (
    TRAINING,
    "start of a run",
    "extrapolating and writing weights",
    *(prefix + phase for prefix in SETS for phase in SET_PHASES),
    "writing rows",
    "reference log-probabilities",
    "saving a checkpoint",
    "end of a round: norms and summary",
    "between two rounds, otherwise",
    "end of the run",
    "a window's begin: inner steps",
    "a window's end",
)
_METHODS: tuple[tuple[type, str, str], ...] = (
    (WholeCheckpoints, "_tidy", "start of a run"),
    (RolloutsTrainer, "_start_run", "start of a run"),
    (RoundsTrainer, "_restore_folder", "start of a run"),
    (RolloutsTrainer, "_collect", "opening the set"),
    (RolloutsTrainer, "_sample", "sampling"),
    (RolloutsTrainer, "_ask", "scoring"),
    (RolloutStore, "finish", "finishing the table"),
    (RoundsTrainer, "_built_rows", "writing rows"),
    (APOTrainer, "_with_reference_logps", "reference log-probabilities"),
    (WholeCheckpoints, "_save_checkpoint", "saving a checkpoint"),
    (RoundsTrainer, "_finish_round", "end of a round: norms and summary"),
    (RoundsTrainer, "_write_weights", "extrapolating and writing weights"),
    (RoundsTrainer, "_enter_round", "between two rounds, otherwise"),
    (RoundsTrainer, "_reenter_round", "between two rounds, otherwise"),
    (RoundsTrainer, "_on_train_end", "end of the run"),
    (SPOTrainer, "_begin_window", "a window's begin: inner steps"),
    (SPOTrainer, "_end_window", "a window's end"),
)
_MEASURED = {"start": 1, "iterate": 2, "extrapolated": 3}


# ---- Judges ----

# What is being judged, for the judge to write down; a child's own.
_now: dict[str, Any] = {}


def _note(what: str, **content: Any) -> None:
    """A line of what has been done, on the disk before anything else happens."""
    line = json.dumps({"what": what, **content}) + "\n"
    descriptor = os.open(_now["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.fsync(descriptor)
    os.close(descriptor)


def _answered(name: str, prompts: Any, completions: Any) -> None:
    digest = hashlib.sha256(json.dumps([prompts, completions]).encode()).hexdigest()[:16]
    _note("judged", judge=name, asked=digest, **_now["batch"])


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _score(completion: Any, key: str) -> float:
    text = _text(completion)
    return int(hashlib.sha256(f"{key} {text}".encode()).hexdigest()[:8], 16) / 2**32


def plain(prompts: Any, completions: Any, shade: Any, log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
    values = [
        _score(completion, key) + len(_text(completion)) for completion, key in zip(completions, shade, strict=True)
    ]
    # Not every batch has this column.
    if any(len(_text(completion).split()) > 6 for completion in completions):
        log_extra("words", [len(_text(completion).split()) for completion in completions])
    log_metric("longest", max(len(_text(completion)) for completion in completions))
    _answered("plain", prompts, completions)
    return values


async def asynchronous(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.005)
    values = [_score(completion, "asynchronous") for completion in completions]
    _answered("asynchronous", prompts, completions)
    return values


def with_ties(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    """Two rewards are all there are: many prompts give no pair, so that others stand in."""
    values = [float(_score(completion, "ties") < 0.25) for completion in completions]
    _answered("with_ties", prompts, completions)
    return values


def not_always(prompts: Any, completions: Any, shade: Any, **kwargs: Any) -> list[float | None]:
    """Applies to some prompts alone."""
    values = [
        None if key == "dark" else _score(completion, key) for completion, key in zip(completions, shade, strict=True)
    ]
    _answered("not_always", prompts, completions)
    return values


def in_order(prompts: Any, completions: Any, **kwargs: Any) -> list[list[int] | None]:
    orders: list[list[int] | None] = []
    for group in completions:
        scores = [_score(completion, "order") for completion in group]
        tied = max(scores) < 0.4
        orders.append(None if tied else sorted(range(len(group)), key=lambda i: -scores[i]))
    _answered("in_order", prompts, completions)
    return orders


JUDGES: dict[str, dict[str, Any]] = {
    "plain": {"reward_funcs": plain},
    "asynchronous": {"reward_funcs": [asynchronous]},
    "two rewards": {"reward_funcs": [plain, asynchronous], "reward_weights": [0.5, -2.0]},
    "one that does not always apply": {"reward_funcs": [asynchronous, not_always], "reward_weights": [1.0, 3.0]},
    "ties": {"reward_funcs": with_ties},
    "ranker": {"ranker": in_order},
}


# ---- Runs ----


def make_prompts(rows: int, seed: int, conversational: bool, equal: bool) -> datasets.Dataset:
    """Prompts with a column for the judge; with `equal`, some of them twice."""
    draw = random.Random(seed)
    pairs = tiny.make_pairs(rows, seed=seed, conversational=conversational)
    prompts = list(pairs["prompt"])
    if equal:
        for index in range(1, rows, 7):
            prompts[index] = prompts[index - 1]
    shades = [draw.choice(["light", "dark"]) for _ in range(rows)]
    return datasets.Dataset.from_dict({"prompt": prompts, "shade": shades})


def draw_settings(draw: random.Random, processes: int) -> dict[str, Any]:
    rounds = draw.choice([1, 2, 2, 3])
    data = draw.choice(["split", "reuse"])
    generations = draw.choice([2, 3, 4])
    judge = draw.choice(list(JUDGES))
    share = 8 * processes
    wanted = draw.choice([None, 5 * processes, 6 * processes])
    if judge in ("ties", "ranker"):
        # Others have to be there to stand in.
        wanted, share = 4 * processes, 16 * processes
    return {
        "num_rounds": rounds,
        "round_data": data,
        "rows": share * (rounds if data == "split" else 1),
        "prompts_per_round": wanted,
        "num_generations": generations,
        "generation_batch_size": draw.choice([None, generations, 2 * generations, 3 * generations]),
        "judge": judge,
        "heldout": draw.choice([0, 0, 1, 1, 2]),
        "conversational": draw.random() < 0.3,
        "equal_prompts": draw.random() < 0.3,
        "temperature": draw.choice([0.7, 1.0]),
        "max_completion_length": 8,
        "round_epochs": draw.choice([None, None, [1, 2, 1][:rounds], [2, 1, 1][:rounds]]),
        "save_strategy": draw.choice(["steps"] * 5 + ["epoch", "no"]),
        "save_steps": draw.choice([1, 2, 3]),
        "save_total_limit": draw.choice([1, 1, 2, None]),
        "precompute_ref_log_probs": draw.random() < 0.4,
        "keep_iterates": draw.random() < 0.3,
        "momentum_from": draw.choice(["previous_iterate"] * 3 + ["reference"]),
        "output_policy": draw.choice(["iterate", "iterate", "extrapolated"]),
        "extrapolation_alpha": draw.choice([[0.3], [0.3], [0.0], [0.0, 0.6, 0.3][:rounds], [0.5, 0.0, 0.2][:rounds]]),
        "train_sampling_strategy": draw.choice(["sequential", "random"]),
        "lr_scheduler_type": draw.choice(["linear", "cosine"]),
    }


def make_trainer(
    base: Path, folder: Path, settings: dict[str, Any], cls: type[Any] = APOTrainer, **given: Any
) -> APOTrainer:
    settings = dict(settings)
    rows, heldout, equal = settings.pop("rows"), settings.pop("heldout"), settings.pop("equal_prompts")
    judge, conversational = dict(JUDGES[settings.pop("judge")]), settings.pop("conversational")
    heldout_sets = {
        name: make_prompts(number, seed, conversational, False)
        for name, number, seed in (("eval", 6, 100), ("other set", 3, 200))
    }
    evaluation = [None, heldout_sets["eval"], heldout_sets][heldout]
    if "reward_weights" in judge:
        settings["reward_weights"] = judge.pop("reward_weights")
    trainer: APOTrainer = cls(
        args=cls.config_class(**tiny.arguments(folder, **settings)),
        train_dataset=make_prompts(rows, 0, conversational, equal),
        eval_dataset=evaluation,
        processing_class=tiny.make_tokenizer(),
        **{"model": str(base), **judge, **given},
    )
    return trainer


def watch(status: Any, log: Path) -> None:
    """Patch this process so that it says which phase it is in, and writes down what it has done."""
    _now.update(log=log, set=0, batch={}, store=None, seeds={})

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        if name in SET_PHASES:
            name = SETS[_now["set"]] + name
        before, index = status.phase, PHASES.index(name)
        status.phase = index
        status.phases_seen |= 1 << index
        try:
            yield
        finally:
            status.phase = before

    def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(make(original)))

    def phased(name: str) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def patched(*args: Any, **kwargs: Any) -> Any:
                with phase(name):
                    return original(*args, **kwargs)

            return patched

        return make

    for owner, method, name in _METHODS:
        patch(owner, method, phased(name))

    def measure(original: Any) -> Any:
        def patched(self: Any, which: str, round_index: int) -> Any:
            _now["set"] = _MEASURED[which]
            try:
                return original(self, which, round_index)
            finally:
                _now["set"] = 0

        return patched

    def sample(original: Any) -> Any:
        def patched(self: Any, task: Any, batches: Any) -> Any:
            _now.update(store=task.store, seeds={batch.seed: batch.index for batch in batches})
            return original(self, task, batches)

        return patched

    def generate(original: Any) -> Any:
        def patched(self: Any, prompts: Any, num: int, seed: int) -> Any:
            found = original(self, prompts, num, seed)
            _note("sampled", **_identity(_now["store"], _now["seeds"][seed]))
            return found

        return patched

    def answer(original: Any) -> Any:
        def patched(self: Any, task: Any, batch: Any) -> Any:
            _now["batch"] = _identity(task.store, batch.index)
            return original(self, task, batch)

        return patched

    def save(original: Any) -> Any:
        def patched(self: Any, folder: Path, write: bool) -> Any:
            if write and (match := re.fullmatch(r"_partial-round-(\d+)", folder.parent.name)):
                _note("weights saved", round=int(match[1]))
            return original(self, folder, write)

        return patched

    def reference(original: Any) -> Any:
        def patched(self: Any, dataset: Any, name: str) -> Any:
            if self.args.should_save:
                _note("reference log-probabilities", round=self._round)
            return original(self, dataset, name)

        return patched

    def rows(original: Any) -> Any:
        def patched(self: Any, rollouts: Any, planned: int) -> Any:
            if self.args.should_save:
                _note("rows made", round=self._round)
            return original(self, rollouts, planned)

        return patched

    patch(RolloutsTrainer, "_measure", measure)
    patch(RolloutsTrainer, "_sample", sample)
    patch(TransformersSampler, "__call__", generate)
    patch(RolloutsTrainer, "_answer", answer)
    patch(FullWeights, "save", save)
    patch(APOTrainer, "_reference_logps", reference)
    patch(APOTrainer, "_rows_of_rollouts", rows)


def _identity(store: RolloutStore, batch: int) -> dict[str, Any]:
    return {"set": store.folder.name, "policy": store.description["policy"], "batch": batch}


# ---- In the parent ----


@dataclass
class _Set:
    """A set of rollouts as it lay on the disk."""

    policy: str
    finished: bool
    table: tuple[int, int] | None
    batches: dict[str, tuple[int, int]] = field(default_factory=dict)

    def has(self, part: str, batch: int) -> bool:
        return self.finished or f"{part}/{batch:06d}.parquet" in self.batches


def _file(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _sets(output_dir: Path) -> dict[str, _Set]:
    found = {}
    for description in (output_dir / ROUNDS_DIR / "rollouts").glob("*/description.json"):
        folder = description.parent
        if folder.name.startswith("_"):
            continue
        try:
            durable.verify(folder)
            finished = True
        except durable.DamagedStateError:
            finished = False
        found[folder.name] = _Set(
            json.loads(description.read_text(encoding="utf-8"))["policy"],
            finished,
            _file(folder / TABLE),
            {
                f"{part}/{path.name}": identity
                for part in ("samples", "scores")
                for path in (folder / part).glob("[0-9]*.parquet")
                if (identity := _file(path))
            },
        )
    return found


def _rounds(output_dir: Path) -> dict[int, set[str]]:
    """The files of every whole round folder."""
    found = {}
    for index in range(8):
        manifest = RoundFolder(output_dir, index).manifest(checksums=True)
        if manifest is not None:
            found[index] = set(manifest["files"])
    return found


class Ledger:
    """
    What was whole at each kill, and what has been done since.

    Args:
        folder: the output folder.
        log: what the children write down.
        tables: checksums of the finished tables of the run left alone, by set.
    """

    def __init__(self, folder: Path, log: Path, tables: dict[str, str]):
        self.folder = folder
        self.log = log
        self.tables = tables
        self._sets: dict[str, _Set] = {}
        self._rounds: dict[int, set[str]] = {}
        self._read = 0

    def problems(self, anew: bool) -> list[str]:
        """
        What is wrong after a life; what is whole now is taken down for the next.

        Args:
            anew: whether that life started from the beginning.
        """
        sets = _sets(self.folder)
        problems = [*self._repeated(anew), *self._replaced(sets)]
        for name, found in sets.items():
            table = self.folder / ROUNDS_DIR / "rollouts" / name / TABLE
            if found.finished and durable.checksum(table) != self.tables.get(name):
                problems.append(f"{name}: {TABLE} is not that of the run left alone")
        self._sets, self._rounds = sets, _rounds(self.folder)
        return problems

    def _repeated(self, anew: bool) -> list[str]:
        problems = []
        for entry in self._entries():
            what = entry["what"]
            if what in ("sampled", "judged"):
                before = self._sets.get(entry["set"])
                part = {"sampled": "samples", "judged": "scores"}[what]
                if before and before.policy == entry["policy"] and before.has(part, entry["batch"]):
                    problems.append(f"{entry['set']}: batch {entry['batch']} was there and is {what} again")
                continue
            had = self._rounds.get(entry["round"])
            again = (
                had is not None
                and {
                    "weights saved": True,
                    "reference log-probabilities": any(name.startswith("reference_logps-") for name in had),
                    # Whoever starts anew makes rows from the finished table: that costs nothing.
                    "rows made": "data.parquet" in had and not anew,
                }[what]
            )
            if again:
                problems.append(f"round {entry['round']}: {what}, which were there before the kill")
        return problems

    def _entries(self) -> list[dict[str, Any]]:
        if not self.log.is_file():
            return []
        lines = self.log.read_text(encoding="utf-8").splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [json.loads(line) for line in new]

    def _replaced(self, sets: dict[str, _Set]) -> list[str]:
        problems = []
        for name, before in self._sets.items():
            now = sets.get(name)
            if now is None or now.policy != before.policy:
                problems.append(f"{name}: {'gone' if now is None else 'of other weights'}")
            elif before.finished:
                if not now.finished or now.table != before.table:
                    problems.append(f"{name}: the finished table was written again")
            elif not now.finished:
                problems.extend(
                    f"{name}: {path} is another file than before the kill"
                    for path, identity in before.batches.items()
                    if now.batches.get(path) != identity
                )
        return problems


def tables(folder: Path) -> dict[str, str]:
    """Checksums of all finished tables of a run."""
    return {path.parent.name: durable.checksum(path) for path in (folder / ROUNDS_DIR / "rollouts").glob(f"*/{TABLE}")}


def in_order_of_a_run(phase: str) -> tuple[int, str]:
    """Sorts phases; what is none comes after them, by name."""
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def wait_for_phase(life: Any, seen: int, hits: Counter[str], draw: random.Random, seconds: float) -> None:
    """
    Wait until a run is in a phase that was drawn among those that such a run has, rather one that few kills have hit,
    and a while longer.
    """
    had = [index for index in range(1, len(PHASES)) if seen >> index & 1]
    target = draw.choices(had, [1 / (1 + hits[PHASES[index]]) ** 2 for index in had])[0]
    life.wait(lambda: life.status.phase == target, seconds)
    end = time.monotonic() + draw.choice([0.0, draw.uniform(0, 0.03), draw.uniform(0, 0.15)])
    # Not beyond the end of the phase, which may be short.
    life.wait(lambda: time.monotonic() >= end or life.status.phase != target, 1.0)
