"""What models and adapters share in `trl-extras extrapolate`: folders, read and written."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_extras.tensor_files import Entry
from trl_extras.tensor_files import read_header as read_safetensors_header


# An adapter's files, as peft names them.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint or a path, in one line for the user."""


@dataclass(frozen=True)
class Source:
    """A checkpoint argument, resolved to a folder."""

    folder: Path
    hub_id: str | None  # None for a local folder, whose path is nobody else's business

    @property
    def name(self) -> str:
        return self.hub_id or str(self.folder)


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object: save the model again.")
    return value


def read_header(file: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError

    try:
        return read_safetensors_header(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise CheckpointError(
            f"--output: {output} exists already and is not overwritten: remove it or choose another."
        )


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that is synced to disk and becomes it at the end, or leaves nothing."""
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            fsync(path)
        fsync(partial)
        refuse_existing(output)  # again: a rename would replace an empty folder made in the meantime
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(output.parent)


def fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
