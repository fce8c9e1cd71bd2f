"""Labels from elsewhere: the file that people, or a labeller on another machine, fill in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import xxhash

from ..errors import ConfigurationError
from .pairs import best_and_worst


_TIE = -1


class WaitingForLabels(SystemExit):
    """
    A run with `ranker="external"` has sampled and stops until its label file is filled. A script that does not catch
    it ends there, with exit status 0.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


def label_rows(prompts: Sequence[Any], completions: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The rows to fill: `rewards`, one number a completion, or `chosen` and `rejected`, indices from 0."""
    return [
        {
            "id": _identity(prompt, group),
            "prompt": prompt,
            "completions": list(group),
            "rewards": None,
            "chosen": None,
            "rejected": None,
        }
        for prompt, group in zip(prompts, completions, strict=True)
    ]


def _identity(prompt: Any, completions: Sequence[str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps([prompt, list(completions)], sort_keys=True).encode())


def read_labels(
    filled: Sequence[tuple[int, dict[str, Any]]],
    prompts: Sequence[Any],
    completions: Sequence[Sequence[str]],
    where: str,
) -> list[tuple[list[float] | None, tuple[int, int] | None]] | None:
    """
    What a label file says of each prompt: its rewards, if they were given, and its best and worst completion, None for
    a tie. None for the whole where nothing has been filled in yet.

    Args:
        filled: the file's rows with their line numbers, in any order.
        prompts: in the order of the result; prompts that occur twice with the same completions have to be labelled
            twice.
        completions: texts of each prompt.
        where: the round and the file, for errors.

    Raises:
        ValueError: naming the line that is foreign, unreadable or not filled in.
    """
    wanted: dict[str, list[int]] = {}
    for index, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        wanted.setdefault(_identity(prompt, group), []).append(index)
    result: dict[int, tuple[list[float] | None, tuple[int, int] | None]] = {}
    empty = []
    for number, row in filled:
        waiting = wanted.get(str(row.get("id")))
        if not waiting:
            raise ConfigurationError(
                f"{where}, line {number}: `id` is {row.get('id')!r}, which is none of this round's, or has come "
                "before: "
                "fill in the file that the run wrote and leave `id` as it is."
            )
        index = waiting.pop(0)
        group = completions[index]
        for name, ours in (("completions", list(group)), ("prompt", prompts[index])):
            if name in row and row[name] != ours:
                raise ConfigurationError(
                    f"{where}, line {number}: `{name}` is not what was sampled: leave it as it is, or away."
                )
        if all(row.get(name) is None for name in ("rewards", "chosen", "rejected")):
            empty.append(number)
        else:
            result[index] = _label(row, len(group), f"{where}, line {number}")
    missing = [index for waiting in wanted.values() for index in waiting]
    if not result and not missing:
        return None
    if empty or missing:
        raise ConfigurationError(
            f"{where} is filled in half: "
            + (f"{len(empty)} rows have no label yet (lines {_first(empty)})" if empty else "")
            + (" and " if empty and missing else "")
            + (f"{len(missing)} of {len(prompts)} rows are missing" if missing else "")
            + ". Give every row `rewards`, or `chosen` and `rejected` (both -1 for a tie)."
        )
    return [result[index] for index in range(len(prompts))]


def _label(row: dict[str, Any], number: int, where: str) -> tuple[list[float] | None, tuple[int, int] | None]:
    rewards, chosen, rejected = (row.get(name) for name in ("rewards", "chosen", "rejected"))
    if rewards is not None:
        if chosen is not None or rejected is not None:
            raise ConfigurationError(f"{where} has both `rewards` and `chosen` or `rejected`: give one of them.")
        valid = isinstance(rewards, list) and len(rewards) == number
        if not valid or not all(_is_number(reward) for reward in rewards):
            raise ConfigurationError(
                f"{where}: `rewards` is {rewards!r}, but wants {number} finite numbers, one a completion."
            )
        values = [float(reward) for reward in rewards]
        return values, best_and_worst(values)
    # A table program may have written 1 as 1.0.
    chosen, rejected = (int(i) if isinstance(i, float) and i == i // 1 else i for i in (chosen, rejected))
    if chosen == rejected == _TIE:
        return None, None
    indices = (chosen, rejected)
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < number for i in indices):
        raise ConfigurationError(
            f"{where}: `chosen` is {chosen!r} and `rejected` is {rejected!r}, but both want an index from 0 to "
            f"{number - 1}, or both -1 for a tie."
        )
    if chosen == rejected:
        raise ConfigurationError(
            f"{where}: `chosen` and `rejected` are both {chosen}: they have to differ, or both be -1 for a tie."
        )
    return None, (chosen, rejected)  # type: ignore[return-value]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _first(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:10])
    return shown if len(numbers) <= 10 else f"{shown} and {len(numbers) - 10} more"
