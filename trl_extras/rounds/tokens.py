"""
Rows whose chat template writes the date: what they became once stays with the run, so that a run which goes on
another day trains on the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import xxhash
from trl import is_conversational

from . import durable
from .data import rows_fingerprint


# Below the output folder; "_" keeps it out of uploads.
FOLDER = "_tokens"
# How transformers gives a template the time.
_CLOCK = "strftime_now"
# What upstream's preparation depends on, beside the rows and the tokenizer.
_SETTINGS = (
    "max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "packing", "packing_strategy",
    "dataset_text_field", "dataset_kwargs",
)  # fmt: skip


class DatedRows:
    """Tokenized rows by what they were made of: the rows as given, the tokenizer with its template, the settings."""

    def __init__(self) -> None:
        self._new: dict[str, datasets.Dataset] = {}
        # Set once training begins: until then nothing is written.
        self._keep: Callable[[], None] | None = None

    def rows(self, dataset: Any, processing_class: Any, args: Any, what: str, make: Callable[[], Any]) -> Any:
        """
        What `make` makes of a dataset, or what it made of it earlier in this run.

        Args:
            dataset: the rows as given.
            args: the training arguments; `output_dir` and the folder of `resume_from_checkpoint` are looked in.
            what: which preparation `make` is.
        """
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        template = f"{processing_class.chat_template} {tokenizer.chat_template}"
        if _CLOCK not in template or not isinstance(dataset, datasets.Dataset):
            return make()
        if len(dataset) == 0 or not is_conversational(dataset[0]):
            return make()
        settings = {name: value for name, value in vars(args).items() if name in _SETTINGS}
        made_of = [what, rows_fingerprint(dataset), template, sorted(tokenizer.get_vocab().items())]
        key = xxhash.xxh3_128_hexdigest(json.dumps([*made_of, settings], sort_keys=True, default=str).encode())
        here, resumed = Path(args.output_dir), Path(str(args.resume_from_checkpoint)).parent
        known = next(
            (f / FOLDER / key for f in (here, resumed) if (f / FOLDER / key / durable.MANIFEST).is_file()), None
        )
        if known is None:
            self._new[key] = rows = make()
        else:
            durable.verify(known)
            self._new[key] = rows = datasets.load_from_disk(known)
        if self._keep is not None:
            self._keep()
        return rows

    def keep(self, output_dir: Path, write: bool, barrier: Callable[[], None]) -> None:
        """Training begins: write what is not on disk, now and from now on. All processes call this."""

        def to_disk() -> None:
            for key, rows in self._new.items():
                if write and not (output_dir / FOLDER / key).is_dir():
                    with durable.new_folder(output_dir / FOLDER / key) as folder:
                        rows.save_to_disk(folder)
                        durable.write_manifest(folder, {"format": "trl-extras tokenized rows", "version": 1})
            self._new = {}
            barrier()

        self._keep = to_disk
        to_disk()
