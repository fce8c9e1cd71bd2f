"""Offline responses: what a dataset brings in completions or preference pairs, one row a response."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from trl import extract_prompt

from ..errors import ConfigurationError
from ..rows import check_extracted
from .config import SPRConfig


REWARD = "reward"
TRAINING_SET = "`train_dataset`"
# What a dataset's own columns may be called without getting in the way.
_OWN = {"prompt_ids", "completion_ids", "input_ids", "labels", "completion_mask", "assistant_masks"}


@dataclass(frozen=True)
class Responses:
    """
    Offline responses.

    Args:
        rows: `prompt` and `completion` as they were given, and whatever else reward functions may want; once prepared
            also `prompt_ids`, `completion_ids` (the tokens that are trained on), `input_ids` and `labels`.
        rewards: (rows,), nan where a response has none yet.
        behavior: (rows,), log-probability of each response under what it came from, nats; None where unknown.
        where: what to call the dataset in messages.
    """

    rows: Any
    rewards: np.ndarray
    behavior: np.ndarray | None
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int] | np.ndarray) -> Responses:
        """Some of them, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        behavior = None if self.behavior is None else self.behavior[chosen]
        return replace(self, rows=self.rows.select(chosen), rewards=self.rewards[chosen], behavior=behavior)


def prompts_of(dataset: Any, config: SPRConfig) -> Any:
    """The prompts of a dataset that may hold responses too, with whatever reward functions may want of its columns."""
    if "prompt" not in dataset.column_names:
        dataset = dataset.map(extract_prompt, desc="Extracting the prompts of the training pairs")
    gone = {"completion", "chosen", "rejected"}
    for name in (REWARD, config.behavior_logps_column):
        gone |= {f"{kind}{name}" for kind in ("", "chosen_", "rejected_")} if name else set()
    return without(dataset, gone)


def each_once(prompts: Any) -> Any:
    """Each prompt once, in order, with the columns of its first row."""
    first: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(prompts["prompt_ids"]):
        first.setdefault(tuple(ids), index)
    return prompts if len(first) == len(prompts) else prompts.select(list(first.values()))


def without(dataset: Any, columns: set[str]) -> Any:
    """A dataset without some columns, whether it has them or not."""
    return dataset.remove_columns([name for name in dataset.column_names if name in columns])


def has_responses(dataset: Any) -> bool:
    """Whether a dataset's rows carry responses."""
    columns = getattr(dataset, "column_names", None)
    return isinstance(columns, list) and bool({"completion", "chosen", "rejected"} & set(columns))


def read_responses(dataset: Any, where: str, config: SPRConfig) -> Responses | None:
    """
    The responses of a dataset of completions (`prompt`, `completion`) or preference pairs (`prompt`, `chosen`,
    `rejected`), checked. A row of the training set whose completion is None is a prompt alone; None if all are.

    Raises:
        ValueError: naming the column and the row that cannot be used, and what is wanted.
    """
    columns = set(dataset.column_names)
    found = sorted(columns & {"image", "images", "tools"})
    if found:
        raise ConfigurationError(
            f"{where} has the column `{found[0]}`, but images and tool calls cannot be weighted so far: use text."
        )
    if columns & _OWN:
        raise ConfigurationError(
            f"{where} has the column `{sorted(columns & _OWN)[0]}`, but SPR needs text, to sample and to score, and "
            "turns it into tokens itself: give another name to that column, or leave it out."
        )
    pairs = {"chosen", "rejected"} <= columns
    if not pairs and not {"prompt", "completion"} <= columns:
        raise ConfigurationError(
            f"{where} has the columns {sorted(columns)}, but wants responses: `prompt` and `completion`, or `prompt`, "
            "`chosen` and `rejected`."
        )
    if pairs and "completion" in columns:
        raise ConfigurationError(
            f"{where} has `completion` as well as `chosen` and `rejected`: leave one of the two kinds out."
        )
    if len(dataset) == 0:
        raise ConfigurationError(f"{where} is empty, but wants at least one response.")
    logps = config.behavior_logps_column
    names = [REWARD] + ([logps] if logps else [])
    if pairs:
        for name in sorted(columns & set(names)):
            raise ConfigurationError(
                f"{where} has preference pairs with one column `{name}`: give each response its own, as "
                f"`chosen_{name}` and `rejected_{name}`, or leave it out."
            )
        check_extracted(dataset, where)
        dataset = _expanded(dataset, where, names)
    if logps and logps not in dataset.column_names:
        wanted = f"`chosen_{logps}` and `rejected_{logps}`" if pairs else f"`{logps}`"
        raise ConfigurationError(
            f"`behavior_logps_column` is {logps!r}, but {where} has no {wanted} (its columns: {sorted(columns)})."
        )
    # A training set may hold prompts with a response and prompts without.
    mixed = where == TRAINING_SET and not pairs
    answered = [completion is not None or not mixed for completion in dataset["completion"]]
    _check_texts(dataset, where, pairs, answered)
    rewards, behavior = np.full(len(dataset), np.nan), None
    if REWARD in dataset.column_names:
        wants = "a finite number, or nothing where it is to be scored"
        rewards = _numbers(dataset, REWARD, where, wants, pairs, [True] * len(dataset))
    if logps:
        wants = "a log-probability, finite and at most 0, in nats"
        behavior = _numbers(dataset, logps, where, wants, pairs, [not there for there in answered])
        for index in np.flatnonzero(behavior > 0)[:1]:
            _refuse(int(index), behavior[index], where, logps, "at most 0: a log-probability, in nats", pairs)
    responses = Responses(without(dataset, set(names)), rewards, behavior, where)
    kept = np.flatnonzero(answered)
    if len(kept) == len(responses):
        return responses
    return responses.select(kept) if len(kept) else None


def _expanded(dataset: Any, where: str, names: Sequence[str]) -> Any:
    """One row a response, chosen before rejected, from pairs whose prompt may be inside the responses."""
    if "prompt" not in dataset.column_names:
        dataset = dataset.map(extract_prompt, desc="Extracting the prompts of the offline pairs")
    for name in names:
        missing = [half for half in (f"chosen_{name}", f"rejected_{name}") if half not in dataset.column_names]
        if len(missing) == 1:
            there = ({f"chosen_{name}", f"rejected_{name}"} - set(missing)).pop()
            raise ConfigurationError(f"{where} has `{there}`, but no `{missing[0]}`: give both, or none.")
    own = [name for name in names if {f"chosen_{name}", f"rejected_{name}"} <= set(dataset.column_names)]
    gone = {"chosen", "rejected", *(f"{kind}_{name}" for name in own for kind in ("chosen", "rejected"))}
    kept = [name for name in dataset.column_names if name not in gone]

    def expand(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        both: dict[str, list[Any]] = {name: [value for value in batch[name] for _ in range(2)] for name in kept}
        for name, chosen, rejected in [
            ("completion", "chosen", "rejected"),
            *((name, f"chosen_{name}", f"rejected_{name}") for name in own),
        ]:
            both[name] = [value for pair in zip(batch[chosen], batch[rejected], strict=True) for value in pair]
        return both

    return dataset.map(
        expand, batched=True, remove_columns=dataset.column_names, desc="Taking the offline pairs apart"
    )


def _row(index: int, pairs: bool) -> str:
    """Where a response stands in the dataset that the user gave."""
    return f"row {index // 2} ({('chosen', 'rejected')[index % 2]})" if pairs else f"row {index}"


def _check_texts(dataset: Any, where: str, pairs: bool, there: Sequence[bool]) -> None:
    """Prompts and responses of one kind, and no prompt with nothing but empty responses."""
    answered: dict[str, int | None] = {}
    for index, row in enumerate(_texts(dataset)):
        prompt, completion = row["prompt"], row["completion"]
        here = f"{where}, {_row(index, pairs)}"
        messages = isinstance(prompt, list)
        if not messages and not isinstance(prompt, str):
            raise ConfigurationError(
                f"{here}: the prompt is {prompt!r:.60}, but has to be text or a list of messages."
            )
        if messages and (not prompt or not isinstance(prompt[-1], dict) or prompt[-1].get("role") == "assistant"):
            raise ConfigurationError(f"{here}: the prompt has to end with a message that is not the assistant's.")
        if not there[index]:
            continue
        if isinstance(completion, list) != messages or not isinstance(completion, (str, list)) or completion == []:
            raise ConfigurationError(
                f"{here}: the response is {completion!r:.60}, but has to be "
                + ("a list of messages, as the prompt is." if messages else "text, as the prompt is.")
            )
        text = completion if isinstance(completion, str) else _content(completion)
        key = repr(prompt)
        if text.strip():
            answered[key] = None
        else:
            answered.setdefault(key, index)
    empty = [index for index in answered.values() if index is not None]
    if empty:
        raise ConfigurationError(
            f"{where}, {_row(empty[0], pairs)}: all responses of this prompt are empty"
            + (f" (and of {len(empty) - 1} other prompts)" if len(empty) > 1 else "")
            + ": leave those rows out."
        )


def _content(messages: list[Any]) -> str:
    return "".join(str(turn.get("content") or "") for turn in messages if isinstance(turn, dict))


def _texts(dataset: Any) -> Iterator[dict[str, Any]]:
    yield from dataset.select_columns(["prompt", "completion"])


def _numbers(dataset: Any, name: str, where: str, wants: str, pairs: bool, may_lack: Sequence[bool]) -> np.ndarray:
    values = np.empty(len(dataset))
    for index, value in enumerate(dataset[name]):
        if value is None and may_lack[index]:
            values[index] = np.nan
            continue
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            _refuse(index, value, where, name, wants, pairs)
        values[index] = float(value)
    return values


def _refuse(index: int, value: Any, where: str, name: str, wants: str, pairs: bool) -> None:
    raise ConfigurationError(f"{where}, {_row(index, pairs)}: `{name}` is {value!r:.60}, but wants {wants}.")
