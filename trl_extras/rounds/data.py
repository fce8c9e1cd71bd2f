"""A round's rows: the builder protocol, folds of a dataset, and a dataset whose rows can change between epochs."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
import xxhash
from accelerate.data_loader import prepare_data_loader

from ..errors import ConfigurationError


@runtime_checkable
class RoundDataBuilder(Protocol):
    """
    Makes the rows that a round trains on. Bring one of your own with `trainer.round_data_builder = builder` before
    `trainer.train()`; it is called once a round, on every process, with random numbers of its own (those of training
    are left alone), and has to return the same rows for the same arguments.

    Rows are of the form that the trainer's `train_dataset` has, raw or tokenised. Every epoch of a run is equally
    long, as long as a round's share of `train_dataset` (a fold with `round_data="split"`, all rows with `"reuse"`):
    fewer rows are repeated in order until that length is reached, which is logged; more are refused.

    Args:
        round_index (`int`): the round, from 0.
        policy (`torch.nn.Module`): the round's policy theta_t, unwrapped, in eval mode.
        seed (`int`): the run's `seed` and the round made into one number; also set globally while the builder runs.

    Returns:
        `datasets.Dataset`.
    """

    def __call__(self, round_index: int, policy: torch.nn.Module, seed: int) -> Any: ...


class NoRowsYetError(ConfigurationError):
    """Somebody reads a round's rows before the round has begun."""


class RoundDataset(torch.utils.data.Dataset):
    """
    A map-style dataset of fixed length whose content is swapped at the start of a round. Content shorter than the
    length is repeated in order. Samplers may read it, by row or by column, like a `datasets.Dataset`.
    """

    def __init__(self, length: int):
        self.length = length
        self.content: Any = None

    def swap(self, content: Any) -> None:
        """Put the rows of a round in place: a `datasets.Dataset` of 1 to `length` rows."""
        if not 0 < len(content) <= self.length:
            raise ConfigurationError(f"a round's data have {len(content)} rows, but have to have 1 to {self.length}.")
        self.content = content

    @property
    def rows(self) -> Any:
        """The round's rows, before any of them is repeated."""
        if self.content is None:
            raise NoRowsYetError(
                "`train_dataset` is read before the first round has begun, but each round has rows of its own: read "
                "them in `_get_train_sampler`, which every round calls anew."
            )
        return self.content

    @property
    def column_names(self) -> list[str]:
        """The rows' columns."""
        names: list[str] = self.rows.column_names
        return names

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            column = self.rows[key]
            return [column[index % len(column)] for index in range(self.length)]
        return self.rows[key % len(self.rows)]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return self.rows.__getitems__([index % len(self.rows) for index in indices])


def split_folds(keys: Sequence[Hashable] | int, num_folds: int, seed: int) -> list[list[int]]:
    """
    Split rows into folds of equal size without a row or a key in common.

    Args:
        keys: a key for every row; rows with the same key (the same prompt) land in the same fold. Or the number of
            rows, where every row stands alone.
        num_folds: how many folds.
        seed: draws which keys land where.

    Returns:
        For each fold the indices of its rows, ascending: the rows keep their order. What does not fit into equal folds
        is left out: at most `num_folds - 1` rows if all keys differ, more if a prompt has many rows.

    Raises:
        ValueError: fewer distinct keys than folds.
    """
    groups: dict[Hashable, list[int]] = {}
    if isinstance(keys, int):
        groups = {index: [index] for index in range(keys)}
    else:
        for index, key in enumerate(keys):
            groups.setdefault(key, []).append(index)
    if len(groups) < num_folds:
        raise ConfigurationError(
            f"the training set has {len(groups)} distinct prompts, but `num_rounds` is {num_folds} and "
            "`round_data='split'` gives each round its own: use fewer rounds, more data, or `round_data='reuse'`."
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    # Large groups first, each into the emptiest fold: the folds end as equal as the groups allow. The sort is stable,
    # so that among groups of one size, the usual case, the draw decides alone.
    order.sort(key=len, reverse=True)
    folds: list[list[int]] = [[] for _ in range(num_folds)]
    for group in order:
        min(folds, key=len).extend(group)
    size = min(len(fold) for fold in folds)
    return [sorted(fold)[:size] for fold in folds]


def group_keys(dataset: Any) -> list[Hashable] | None:
    """
    For every row of a tokenised dataset what identifies its prompt: `prompt_ids`, or the tokens before the completion;
    None where rows have no prompt.
    """
    columns = getattr(dataset, "column_names", None) or []
    if "prompt_ids" in columns:
        return [tuple(ids) for ids in dataset["prompt_ids"]]
    if "completion_mask" in columns and "input_ids" in columns:
        prompts = (
            tuple(token for token, in_completion in zip(ids, mask, strict=True) if not in_completion)
            for ids, mask in zip(dataset["input_ids"], dataset["completion_mask"], strict=True)
        )
        # A row without a prompt shares it with no other.
        return [prompt or ("row", index) for index, prompt in enumerate(prompts)]
    return None


def batches_of(loader: torch.utils.data.DataLoader[Any], accelerator: Any) -> Any:
    """This process's batches on its device; not by the accelerator's own method, which would keep every round's."""
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
    )


def rows_fingerprint(rows: Any) -> str:
    """A hash of a `datasets.Dataset`'s content, the same in every process and run."""
    digest = xxhash.xxh3_128()
    for table in rows.with_format("arrow").iter(batch_size=2000):
        sink = pa.BufferOutputStream()
        table = table.select(sorted(table.column_names)).combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()
