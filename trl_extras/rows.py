"""
What the rows of a dataset have to be, looked at before any weights load: upstream reads much of what is wrong here as
something else, or fails without saying in which row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
from jinja2 import TemplateError
from transformers.utils import logging
from trl import extract_prompt

from .errors import ConfigurationError


logger = logging.get_logger(__name__)

_TEXTS = ("prompt", "chosen", "rejected", "completion", "messages", "conversations")
# From so many rows on, the most frequent prompt must be that of fewer than half of them.
_ENOUGH_ROWS = 4


def plain(dataset: Any) -> Any:
    """
    A dataset as upstream reads it best: values as Python's, and messages whose content is a list of text parts with
    that text instead. Everything else is left alone, also parts that are images.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    if dataset.format["type"] is not None or set(dataset.format["columns"]) != set(dataset.column_names):
        dataset = dataset.with_format(None)
    names = [name for name in _TEXTS if name in dataset.column_names and _has_parts(dataset, name)]
    if not names:
        return dataset
    return dataset.map(
        lambda row: {name: [_with_text(turn) for turn in row[name]] for name in names}, desc="Reading text parts"
    )


def _has_parts(dataset: datasets.Dataset, name: str) -> bool:
    """Whether contents are parts, all of them text: of all rows alike, but for columns of JSON."""
    mixed = "Json" in repr(dataset.features[name])
    found = False
    for row in (
        dataset.select_columns([name]) if mixed else dataset.select_columns([name]).select(range(len(dataset) > 0))
    ):
        for turn in row[name] if isinstance(row[name], list) else ():
            content = turn.get("content") if isinstance(turn, dict) else None
            if isinstance(content, list):
                if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                    return False
                found = True
    return found


def _with_text(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    return {**turn, "content": "".join(str(part.get("text") or "") for part in content)}


def _each(dataset: datasets.Dataset, names: list[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    number = 0
    for batch in dataset.select_columns(names).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield number, values
            number += 1


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "a list of messages" if _is_conversation(value) else f"{value!r:.60}"


def check_pairs(pairs: datasets.Dataset, where: str) -> None:
    """
    Preference pairs are all text or all messages, and a prompt stands in one place.

    Raises:
        ConfigurationError: with the row's number.
    """
    names = [name for name in ("chosen", "rejected", "prompt") if name in pairs.column_names]
    for number, values in _each(pairs, names):
        row = dict(zip(names, values, strict=True))
        for name, value in row.items():
            if not isinstance(value, str) and not _is_conversation(value):
                raise ConfigurationError(
                    f"{where}, row {number}: `{name}` is {value!r:.60}, but has to be text or a list of messages."
                )
        kinds = {name: _kind(value) for name, value in row.items()}
        if len(set(kinds.values())) > 1:
            said = ", ".join(f"`{name}` is {kind}" for name, kind in kinds.items())
            whole = isinstance(row.get("prompt"), str) and _is_conversation(row["chosen"]) and len(row["chosen"]) > 1
            advice = "leave `prompt` out, which the conversation begins with" if whole else "make all of one kind"
            raise ConfigurationError(f"{where}, row {number}: {said}: {advice}.")
        prompt = row.get("prompt")
        if isinstance(prompt, list):
            for name in ("chosen", "rejected"):
                if row[name][: len(prompt)] == prompt:
                    raise ConfigurationError(
                        f"{where}, row {number}: the turns of `prompt` are repeated in `{name}`, so that they would "
                        "be trained on twice: leave the column `prompt` out, or those turns."
                    )


def check_prompts(prompts: datasets.Dataset, where: str) -> None:
    """
    Prompts to sample for are text or messages that do not end with the assistant's.

    Raises:
        ConfigurationError: with the row's number.
    """
    for number, (prompt,) in _each(prompts, ["prompt"]):
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise ConfigurationError(
                f"{where}, row {number}: the prompt is {prompt!r:.60}, of type {type(prompt).__name__}, but has to be "
                "text or a list of messages."
            )
        if isinstance(prompt, list) and prompt[-1].get("role") == "assistant":
            raise ConfigurationError(
                f"{where}, row {number}: the prompt ends with a message of the assistant, but its answer is what is "
                "sampled: end prompts with the user's message."
            )


def check_extracted(pairs: datasets.Dataset, where: str) -> None:
    """
    Where pairs have no column `prompt`, it is what chosen and rejected begin with. If that is the same for half of the
    rows, the prompt is somewhere else.

    Raises:
        ConfigurationError: naming the columns that it may be in.
    """
    if "prompt" in pairs.column_names or len(pairs) < _ENOUGH_ROWS:
        return
    counts: Counter[str] = Counter()
    for _, (chosen, rejected) in _each(pairs, ["chosen", "rejected"]):
        if chosen != rejected:
            counts[repr(extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"])] += 1
    if not counts:
        return
    prompt, number = counts.most_common(1)[0]
    if 2 * number >= len(pairs):
        others = [f"`{name}`" for name in pairs.column_names if name not in ("chosen", "rejected")]
        raise ConfigurationError(
            f"{where} has no column `prompt`, and what `chosen` and `rejected` have in common at their beginning is "
            f"{prompt:.60} in {number} of {len(pairs)} rows: name the column with the prompts `prompt`"
            + (f" (the others are {', '.join(others)})." if others else ".")
        )


def check_templates(dataset: Any, where: str, tokenizer: Any) -> None:
    """
    A tokenizer's chat template takes conversations of the roles that a dataset has, and writes down what they say: one
    row of each sequence of roles is looked at.

    Raises:
        ConfigurationError: there is no template, or it refuses a row.
    """
    names = [name for name in _TEXTS[:5] if name in (getattr(dataset, "column_names", None) or ())]
    if not isinstance(dataset, datasets.Dataset) or not names or {"image", "images"} & set(dataset.column_names):
        return
    seen: set[Any] = set()
    for number, values in _each(dataset, names):
        row = dict(zip(names, values, strict=True))
        if not all(_is_conversation(value) for value in row.values()):
            return
        if not seen and tokenizer.chat_template is None:
            raise ConfigurationError(
                f"{where} has conversations, but the tokenizer has no chat template to turn them into text: set "
                "`processing_class.chat_template`, or use text."
            )
        roles = tuple(tuple(turn.get("role") for turn in value) for value in row.values())
        if roles in seen:
            continue
        seen.add(roles)
        prompt = row.pop("prompt", [])
        for name, value in (row or {"prompt": []}).items():
            rendered = _rendered(prompt + value, tokenizer, f"{where}, row {number}")
            if value and (lost := missing_text(value, rendered)):
                logger.warning_once(
                    f"{where}, row {number}: the chat template leaves out a part of `{name}` ({lost!r:.60}), so that "
                    "it is not trained on; others like it are not looked at."
                )


def _rendered(turns: list[dict[str, Any]], tokenizer: Any, where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"{where}: the tokenizer's chat template refuses the conversation ({error}): change the row, or the "
            "template."
        ) from error


def check_responses(rows: Any, where: str, tokenizer: Any) -> None:
    """
    Every response that is scored is what is trained on: the chat template writes all of it.

    Raises:
        ConfigurationError: with the row's number.
    """
    for number, (prompt, completion) in _each(rows, ["prompt", "completion"]):
        if not _is_conversation(completion):
            return
        rendered = _rendered(prompt + completion, tokenizer, f"{where}, row {number}")
        if lost := missing_text(completion, rendered):
            raise ConfigurationError(
                f"{where}, row {number}: the chat template leaves out a part of the response ({lost!r:.60}), so that "
                "its reward would be that of another text: use a template that keeps it, or leave that part out."
            )


def missing_text(turns: list[dict[str, Any]], rendered: str) -> str | None:
    """The content of the first of some turns that is not in a rendered conversation, whatever the spaces are."""
    written = "".join(rendered.split())
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, str) and "".join(content.split()) not in written:
            return content
    return None
