"""
Checkpoints that are complete or not there, and which of them to resume from.

Upstream writes straight into `checkpoint-N` and deletes old checkpoints before callbacks could add anything, so a kill
leaves half-written folders, and with `save_total_limit=1` a moment without any whole one. Here a checkpoint is written
elsewhere, gets its manifest last, is synced and renamed, and only then are older ones removed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from . import durable


STAGING_DIR = "_staging"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NEWEST = ("true", "last")
_NONE = ("false", "none", "")


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in `output_dir` that is named like a checkpoint, oldest first."""
    if not output_dir.is_dir():
        return []
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def verify_checkpoint(folder: Path) -> dict[str, Any] | None:
    """
    The manifest of a whole checkpoint; None for a readable one that has no manifest, as the stock trainers write them.

    Raises:
        DamagedStateError: what is wrong with it.
    """
    if not folder.is_dir():
        raise durable.DamagedStateError("there is no such folder")
    if (folder / durable.MANIFEST).exists():
        return durable.verify(folder)
    # Upstream writes trainer_state.json last: without our manifest it is the only sign that a checkpoint is whole.
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise durable.DamagedStateError("it has neither a manifest nor a readable trainer_state.json") from error
    return None


def resolve(value: str | bool | None, output_dir: Path, run_id: str | None) -> tuple[Path | None, list[str]]:
    """
    The checkpoint to resume from.

    Args:
        value: `True`, `"true"`, `"True"` or `"last"` for the newest whole checkpoint in `output_dir`; a path; or
            `None`, `False` and their spellings as text.
        run_id: the run that `output_dir` belongs to, if known: checkpoints that an earlier run left there are no part
            of it.

    Returns:
        The folder, or None to start from the beginning, and what a user should be told.

    Raises:
        ConfigurationError: an explicit path is not a whole checkpoint, or every checkpoint of the run is damaged.
    """
    if value is None or value is False or (isinstance(value, str) and value.lower() in _NONE):
        return None, []
    if value is not True and str(value).lower() not in _NEWEST:
        folder = Path(value)
        try:
            verify_checkpoint(folder)
        except durable.DamagedStateError as error:
            raise ConfigurationError(
                f"`resume_from_checkpoint` is {str(value)!r}, but that is not a whole checkpoint: {error}. Name "
                "another "
                "one, or use 'last' for the newest whole one."
            ) from error
        return folder, []
    told, damaged = [], []
    for _, folder in reversed(list_checkpoints(output_dir)):
        try:
            manifest = verify_checkpoint(folder)
        except durable.DamagedStateError as error:
            told.append(f"{folder.name} is left aside: {error}.")
            if _is_ours(folder, run_id):
                damaged.append(f"{folder.name} ({error})")
            continue
        if run_id is not None and manifest is not None and manifest.get("run_id") != run_id:
            told.append(f"{folder.name} is left aside: an earlier run in this folder wrote it.")
            continue
        return folder, told
    if damaged:
        raise ConfigurationError(
            f"`resume_from_checkpoint` is {value!r}, but every checkpoint of the run in `output_dir` is damaged: "
            f"{', '.join(damaged)}. Put back a copy, or remove them or leave it out to begin anew."
        )
    told.append("There is no whole checkpoint to resume from: starting from the beginning.")
    return None, told


def _is_ours(damaged: Path, run_id: str | None) -> bool:
    """Whether a damaged checkpoint was whole once, and not one of another run; without a manifest it never was."""
    try:
        return run_id in (None, durable.read_manifest(damaged).get("run_id"))
    except durable.DamagedStateError:
        return (damaged / durable.MANIFEST).exists()


def rotate(output_dir: Path, limit: int | None, current_step: int, best: str | None) -> None:
    """
    Remove old checkpoints beyond `limit`: what an earlier run left with higher numbers first, then by number. The
    current one and the best one stay. A folder is renamed before it is removed.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = list_checkpoints(output_dir)
    protected = {f"checkpoint-{current_step}"} | ({Path(best).name} if best else set())
    keep = max(limit, len(protected))
    excess = len(checkpoints) - keep
    for _, folder in sorted(checkpoints, key=lambda item: (item[0] <= current_step, item[0])):
        if excess <= 0:
            break
        if folder.name not in protected:
            durable.discard(folder)
            excess -= 1
