"""A dataset that is given to a trainer, or named in its config because a script can pass text only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from .errors import ConfigurationError
from .rows import plain


logger = logging.get_logger(__name__)


def check_kinds(given: dict[str, Any]) -> None:
    """
    Refuse what is passed as `train_dataset` or `eval_dataset` and is no dataset.

    Raises:
        ConfigurationError: saying what it is, and how to make a dataset of it.
    """
    train, evaluation = given.get("train_dataset"), given.get("eval_dataset")
    if train is None:
        raise ConfigurationError("`train_dataset` is missing: pass a `datasets.Dataset`.")
    if isinstance(train, dict):
        raise ConfigurationError(f"`train_dataset` holds splits ({', '.join(train)}): pass one of them.")
    sets = {"`train_dataset`": train}
    if isinstance(evaluation, dict):
        sets |= {f"`eval_dataset` {name!r}": rows for name, rows in evaluation.items()}
    elif evaluation is not None:
        sets["`eval_dataset`"] = evaluation
    for where, rows in sets.items():
        if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
            raise ConfigurationError(
                f"{where} is a {type(rows).__name__}, but wants a `datasets.Dataset`: make one with "
                "`datasets.Dataset.from_list(rows)`, or `datasets.load_dataset` for files."
            )


# What reads a file by its suffix.
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def load(name: str, config: str | None = None, **more: Any) -> Any:
    """What `datasets.load_dataset` loads, of a file as well as of a folder or a dataset on the Hub."""
    reader = _READERS.get(Path(name).suffix)
    if reader is not None and Path(name).is_file():
        return datasets.load_dataset(reader, data_files=name, **more)
    return datasets.load_dataset(name, name=config, **more)


def load_rows(field: str, given: Any, config: Any, why_kept: str) -> tuple[Any, str]:
    """
    The dataset as given to the trainer, or named by the config's fields `{field}_name`, `{field}_config` and
    `{field}_split`.

    Args:
        field: the trainer's argument.
        given: what was passed as that.
        why_kept: why the rows cannot stream, for the message.

    Returns:
        The dataset, None if there is none; and what to call it in messages.

    Raises:
        ValueError: it is not a dataset of rows that can be kept, saying what is wanted.
    """
    where, name = f"`{field}`", getattr(config, f"{field}_name")
    if given is not None and name is not None:
        logger.warning(f"`{field}` is given to the trainer and named in its config; the trainer's is used.")
    elif name is not None:
        where, split = f"`{field}_name` ({name!r})", getattr(config, f"{field}_split") or "train"
        try:
            given = load(name, getattr(config, f"{field}_config"), split=split)
        except Exception as error:
            raise ConfigurationError(f"{where}, split {split!r}, cannot be loaded: {error}") from error
    if given is None:
        return None, where
    if isinstance(given, dict):
        raise ConfigurationError(f"{where} holds splits ({', '.join(given)}): pass one of them.")
    if not isinstance(given, datasets.Dataset):
        raise ConfigurationError(
            f"{where} is {type(given).__name__}, but wants a `datasets.Dataset`: {why_kept}, so it cannot stream."
        )
    if len(given) == 0:
        raise ConfigurationError(f"{where} is empty, but wants at least one row.")
    return plain(given), where
