"""
Folders that are complete or not there: written under another name, synced, listed in a manifest that comes last, then
renamed. Whatever is read back is checked against that manifest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash


MANIFEST = "manifest.json"
# Unfinished and abandoned folders. They begin with "_", which upstream leaves out of uploads, and never look like a
# checkpoint; whatever is found under these names at the start of a run is removed.
PARTIAL_PREFIX = "_partial-"
TRASH_PREFIX = "_trash-"

_READ_BYTES = 1 << 22


class DamagedStateError(ValueError):
    """Files on disk that are not what their manifest says."""


def checksum(path: Path) -> str:
    """xxh3-128 of a file, in hexadecimal: it guards against damage, not against an adversary."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def as_json(value: Any, not_finite: list[str], name: str = "") -> Any:
    """
    What JSON has of a value: numbers of numpy's and torch's as Python's, None where one is not finite, whose name is
    added to `not_finite`, and the text of other objects.
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {
            str(key): as_json(inner, not_finite, f"{name}/{key}" if name else str(key)) for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [as_json(inner, not_finite, name) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        not_finite.append(name)
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old content or the new, never half of it."""
    temporary = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_manifest(folder: Path, content: dict[str, Any], known: dict[str, dict[str, Any]] | None = None) -> None:
    """
    Sync every file below `folder`, then write its manifest: `content` with `files`, the size and checksum of each.

    Args:
        known: entries of files whose checksum is known already (links to files of another manifest), by relative path.
    """
    entries = dict(known or {})
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or path.name.startswith(PARTIAL_PREFIX):
            continue
        if name not in entries:
            sync(path)
            entries[name] = {"size": path.stat().st_size, "xxh3_128": checksum(path)}
    for directory in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(directory)
    write_json(folder / MANIFEST, {**content, "files": entries})


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    The manifest of a folder.

    Raises:
        DamagedStateError: it is missing or not JSON.
    """
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise DamagedStateError(
            f"{folder.name}/{MANIFEST} is missing or unreadable ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise DamagedStateError(f"{folder.name}/{MANIFEST} lists no files")
    return content


def verify(folder: Path, checksums: bool = True) -> dict[str, Any]:
    """
    The manifest of a folder whose files are all as it says; without `checksums` only their sizes are compared.

    Raises:
        DamagedStateError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedStateError(f"{name} is missing")
        if path.stat().st_size != entry["size"]:
            raise DamagedStateError(f"{name} has {path.stat().st_size} bytes, but should have {entry['size']}")
        if checksums and checksum(path) != entry["xxh3_128"]:
            raise DamagedStateError(f"{name} has another checksum than when it was written")
    return manifest


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """
    A folder to fill, which becomes `target` when the block ends, in one rename, and is removed if the block fails.
    What stood at `target` before is renamed away first and then removed.
    """
    partial = target.with_name(f"{PARTIAL_PREFIX}{target.name}")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, target)
    except BaseException:
        remove(partial)
        raise


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its name; a folder that stood there before is renamed away, then removed."""
    old = target.with_name(f"{TRASH_PREFIX}{target.name}")
    if target.exists():
        remove(old)
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    remove(old)


def discard(folder: Path) -> None:
    """Remove a folder so that it is never seen half-removed under its own name."""
    if folder.exists():
        trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}")
        remove(trash)
        folder.rename(trash)
        remove(trash)


def set_aside(folder: Path) -> Path:
    """Give a folder another name, which no run looks for, instead of removing it. Returns its new place."""
    number = 1
    while (target := folder.with_name(f"replaced-{folder.name}-{number}")).exists():
        number += 1
    return folder.rename(target)


def remove(folder: Path) -> None:
    """Remove a folder if it is there."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def sweep(parents: Iterable[Path]) -> list[str]:
    """Remove what an interrupted run left under temporary names; returns the names."""
    swept = []
    for parent in parents:
        for trash in sorted(parent.glob(f"{TRASH_PREFIX}checkpoint-*")) if parent.is_dir() else []:
            # Killed between the two renames of `publish`: what was to be replaced may be all there is.
            original = trash.with_name(trash.name.removeprefix(TRASH_PREFIX))
            with suppress(DamagedStateError):
                if not original.exists() and verify(trash):
                    trash.rename(original)
        for path in sorted(parent.glob("_*")) if parent.is_dir() else []:
            if path.name.startswith((PARTIAL_PREFIX, TRASH_PREFIX)):
                swept.append(path.name)
                if path.is_dir():
                    remove(path)
                else:
                    path.unlink(missing_ok=True)
    return swept


def link_tree(source: Path, target: Path) -> None:
    """Hard links of all files below `source` at `target`, or copies where links are not to be had."""
    for path in files_below(source):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, destination)
        except OSError:
            shutil.copy2(path, destination)
            sync(destination)
