"""
The separate rows of the lower level: prepared as SFTTrainer prepares them, drawn in an order that is a function of the
seed and the step alone, so that a run which resumes finds its place without anything on disk.
"""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoProcessor
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import named_data
from ..errors import ConfigurationError
from ..rounds.data import rows_fingerprint
from ..rounds.tokens import DatedRows


logger = logging.get_logger(__name__)

IGNORED = -100


def load_rows(sft_dataset: Any, config: Any) -> Any:
    """
    The SFT dataset as given to the trainer or named in its config; None if there is none.

    Raises:
        ValueError: it is not a dataset of rows that can be kept, saying what is wanted.
    """
    sft_dataset, where = named_data.load_rows("sft_dataset", sft_dataset, config, "its rows are drawn by number")
    if sft_dataset is None:
        return None
    columns = set(sft_dataset.column_names)
    if columns & {"image", "images", "tools"}:
        raise ConfigurationError(
            f"{where} has the column `{sorted(columns & {'image', 'images', 'tools'})[0]}`, but images and tool calls "
            "cannot be kept so far: use text."
        )
    turns = next(iter(sft_dataset))["conversations"] if columns & {"conversations"} and "text" not in columns else None
    if turns and "from" not in turns[0]:
        raise ConfigurationError(
            f"{where} has `conversations` with the keys {sorted(turns[0])}, but SFTTrainer takes `from` and `value` "
            "there: rename the column to `messages` if these are `role` and `content`."
        )
    if not columns & {"text", "messages", "conversations", "input_ids"} and not {"prompt", "completion"} <= columns:
        hint = ""
        if "chosen" in columns:
            hint = " These look like preference pairs: the trainer keeps their chosen responses by itself."
        raise ConfigurationError(
            f"{where} has the columns {sorted(columns)}, but wants a format of SFTTrainer's: `text`, `messages`, or "
            f"`prompt` and `completion`.{hint}"
        )
    return _used_columns(sft_dataset, where)


# In the order in which they are looked for; the first that a dataset has is used.
_FORMATS: tuple[tuple[str, ...], ...] = (
    ("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), ("text",),
)  # fmt: skip


def _used_columns(dataset: datasets.Dataset, where: str) -> datasets.Dataset:
    """Rows in one format: SFTTrainer looks at several, and puts the end of text after one of them alone."""
    columns = set(dataset.column_names)
    used = next(names for names in _FORMATS if set(names) <= columns)
    others = sorted({name for names in _FORMATS for name in names} & columns - set(used))
    if not others:
        return dataset
    names, left = (", ".join(f"`{name}`" for name in some) for some in (used, others))
    logger.warning(f"{where}: {names} is trained on, and not {left}.")
    return dataset.remove_columns(others)


def processing_class_of(given: dict[str, Any], config: Any) -> Any:
    """What turns text into tokens: as given, or as upstream would load it with the model."""
    if given.get("processing_class") is not None:
        return given["processing_class"]
    model = given["model"]
    named = isinstance(model, str)
    revision = (config.model_init_kwargs or {}).get("revision") if named else None
    return AutoProcessor.from_pretrained(
        model if named else model.config._name_or_path,
        revision=revision,
        trust_remote_code=bool(getattr(config, "trust_remote_code", False)),
    )


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer, also of a processor that has one inside."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_texts(dataset: Any, tokenizer: Any) -> None:
    """
    Refuse what SFTTrainer's preparation would stumble over without a name.

    Raises:
        ValueError: a text is missing, or a conversation has no template to become text by.
    """
    for name in ("text", "messages", "conversations", "prompt", "completion"):
        if name not in dataset.column_names:
            continue
        size = 1000
        for start, batch in enumerate(dataset.select_columns([name]).iter(batch_size=size)):
            for number, value in enumerate(batch[name], start=start * size):
                if value is None:
                    raise ConfigurationError(f"`sft_dataset` has no {name!r} in row {number}: leave such rows out.")
        if isinstance(dataset[0][name], list) and not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                f"`sft_dataset` has conversations in {name!r}, but the tokenizer has no chat template to turn them "
                "into text: set `processing_class.chat_template`, or use a column `text`."
            )


class SFTRows:
    """
    Rows with `input_ids` and `labels`, and batches of them.

    Args:
        dataset: in any format of SFTTrainer's.
        processing_class: tokenizer or processor.
        config: the trainer's config; its `max_length` and `truncation_mode` hold for these rows too.
        dated: the run's, for chat templates that write the date.

    Raises:
        ValueError: no row has a token to learn.
    """

    def __init__(self, dataset: datasets.Dataset, processing_class: Any, config: Any, dated: DatedRows | None = None):
        tokenizer = tokenizer_of(processing_class)
        # What SFTTrainer's method reads of a trainer and of its arguments.
        stand_in = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=None, completion_only_loss="completion" in dataset.column_names
        )
        settings = SimpleNamespace(**{f.name: f.default for f in fields(SFTConfig)})
        for name in ("max_length", "truncation_mode", "dataset_num_proc", "seed"):
            setattr(settings, name, getattr(config, name))
        settings.packing = False
        given = len(dataset)
        check_texts(dataset, tokenizer)
        prepare: Any = SFTTrainer._prepare_dataset
        rows = (dated or DatedRows()).rows(
            dataset,
            processing_class,
            config,
            "SFT",
            lambda: prepare(stand_in, dataset, processing_class, settings, False, None, "SFT"),
        )
        rows = rows.select_columns(["input_ids", "labels"])
        # The first token is predicted from nothing.
        rows = rows.filter(
            lambda row: any(label != IGNORED for label in row["labels"][1:]),
            num_proc=config.dataset_num_proc,
            desc="Looking for SFT rows without a token to learn",
        )
        if len(rows) == 0:
            raise ConfigurationError(
                f"`sft_dataset`: none of its {given} rows has a token to learn: they are empty, or their prompts "
                f"alone fill `max_length` ({config.max_length})."
            )
        if len(rows) < given:
            logger.warning(
                f"{given - len(rows)} of {given} SFT rows are left out: they are empty, or their prompts alone fill "
                f"`max_length` ({config.max_length})."
            )
        self.rows = rows
        self.seed = int(config.seed)
        self._collator = DataCollatorForLanguageModeling(
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            pad_to_multiple_of=config.pad_to_multiple_of,
        )
        self._order: tuple[int, list[int]] = (-1, [])
        self.fingerprint = rows_fingerprint(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def indices(self, position: int, count: int, shuffled: bool = True) -> list[int]:
        """
        The rows at `position` and the `count - 1` after it in an endless sequence of epochs, each in an order of its
        own, drawn from the seed.
        """
        found = []
        for place in range(position, position + count):
            epoch, offset = divmod(place, len(self.rows))
            found.append(self._shuffle(epoch)[offset] if shuffled else offset)
        return found

    def _shuffle(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed + 7_368_787 * (epoch + 1)) % 2**63)
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._order[1]

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """A padded batch with `input_ids`, `attention_mask` and `labels`, (N, T) each."""
        columns = self.rows[indices]
        examples = [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]
        batch: dict[str, Tensor] = self._collator(examples)
        return batch
