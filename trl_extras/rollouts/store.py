"""
Rollouts on disk, so that no phase of a round is done twice:

    _rounds/rollouts/round-0001/description.json      what these rollouts belong to; written first
    _rounds/rollouts/round-0001/samples/000003.parquet   a batch that has been sampled
    _rounds/rollouts/round-0001/scores/000003.parquet    a batch that has been judged
    _rounds/rollouts/round-0001/labels.jsonl          with `ranker="external"`: the file to fill
    _rounds/rollouts/round-0001/rollouts.parquet      the finished round; samples/ and scores/ are gone then
    _rounds/rollouts/round-0001/manifest.json         written last: size and checksum, and the round's statistics

All processes see the same folder. Each writes batches of its own; the finished table is written by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from ..errors import ConfigurationError
from ..rounds import durable


logger = logging.get_logger(__name__)

STORE_VERSION = 1
TABLE = "rollouts.parquet"
LABELS = "labels.jsonl"
_DESCRIPTION = "description.json"
_PARTS = ("samples", "scores")


def folders_to_sweep(rollouts: Path) -> list[Path]:
    """Where a killed run may have left files under temporary names, below a folder of several sets of rollouts."""
    sets = [path for path in rollouts.glob("*") if path.is_dir()]
    return [rollouts, *sets, *(path / part for path in sets for part in _PARTS)]


class RolloutStore:
    """
    One set of rollouts.

    Args:
        folder: where it lies.
        description: what the rollouts belong to, as JSON values; `policy` is the hash of the weights.
        write: whether this process writes what is written once.
        barrier: waits for all processes.
        name: what to call it in messages.
        replace: rollouts of other settings are removed too, instead of being refused: for measurements.
        sources: a hash of each judging function's source, or None: an edit is no other configuration, but is told.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        write: bool,
        barrier: Callable[[], None],
        name: str,
        replace: bool = False,
        sources: dict[str, str | None] | None = None,
    ):
        self.folder = folder
        self.description = json.loads(json.dumps({"version": STORE_VERSION, **description}))
        self.replace = replace
        self.sources = sources or {}
        self.write = write
        self.barrier = barrier
        self.name = name

    # ---- What they belong to ----

    def open(self) -> bool:
        """
        Make the folder, or take the one that is there, if it belongs to the same weights and settings. Rollouts of
        other weights are removed.

        Returns:
            Whether other rollouts have been removed.

        Raises:
            ValueError: there are rollouts of the same weights, but with other settings or prompts.
        """
        removed = False
        found = self._found_description()
        sources = found.pop("sources", {}) if found is not None else {}
        # All have looked before anyone writes.
        self.barrier()
        if found is not None and found != self.description:
            other = [
                name
                for name in sorted(found.keys() | self.description.keys())
                if found.get(name) != self.description.get(name)
            ]
            if not self.replace and ("policy" not in other or (self.folder / LABELS).exists()):
                name = next((name for name in other if name != "policy"), "policy")
                raise ConfigurationError(
                    f"{self.name}: the rollouts on disk ({self._where()}) have `{name}` {_shown(found.get(name))}, "
                    "but "
                    f"now it is {_shown(self.description.get(name))}: set it back, remove that folder, or use another "
                    "`output_dir`."
                )
            removed = True
        if self.write and (found is None or removed):
            durable.discard(self.folder)
            for part in _PARTS:
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            durable.write_json(self.folder / _DESCRIPTION, {**self.description, "sources": self.sources})
        elif self.write:
            self._tell_of_edits(sources)
        self.barrier()
        return removed

    def _tell_of_edits(self, sources: dict[str, str | None]) -> None:
        edited = [name for name, source in self.sources.items() if source and sources.get(name, source) != source]
        if edited:
            logger.warning(
                f"{self.name}: {', '.join(edited)} has been edited since it answered for the rollouts on disk; what "
                "it "
                f"answered is kept. Remove {self._where()} to sample and ask again."
            )

    def _found_description(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.folder / _DESCRIPTION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def _where(self) -> str:
        """The folder as seen from the output folder: no message names a path of this machine."""
        return "/".join(self.folder.parts[-3:])

    # ---- Batches ----

    def _shard(self, part: str, index: int) -> Path:
        return self.folder / part / f"{index:06d}.parquet"

    def has(self, part: str, index: int) -> bool:
        """Whether a batch has been sampled (`samples`) or judged (`scores`)."""
        return self._shard(part, index).is_file()

    def put(self, part: str, index: int, rows: list[dict[str, Any]]) -> None:
        """Write a batch; afterwards it is all there or not at all, whatever happens."""
        path = self._shard(part, index)
        partial = path.with_name(f"{durable.PARTIAL_PREFIX}{path.name}")
        pq.write_table(pa.Table.from_pylist(rows), partial)
        durable.sync(partial)
        partial.replace(path)
        durable.sync(path.parent)

    def get(self, part: str, index: int) -> list[dict[str, Any]]:
        """
        A batch from disk.

        Raises:
            DamagedStateError: it is not there for this process, or not whole.
        """
        path = self._shard(part, index)
        try:
            return pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise durable.DamagedStateError(
                f"{self._where()}/{part}/{path.name} is not there or not whole for this process: all processes have "
                "to "
                "see the same `output_dir`, and nothing else may change it."
            ) from error

    # ---- The finished table ----

    def finished(self) -> dict[str, Any] | None:
        """
        The manifest of a finished set; None while there is work left.

        Raises:
            ValueError: the set was finished, but its table is not whole.
        """
        if not (self.folder / durable.MANIFEST).is_file():
            return None
        try:
            manifest = durable.verify(self.folder)
        except durable.DamagedStateError as error:
            raise ConfigurationError(
                f"{self.name}: the rollouts on disk are damaged ({error}): remove {self._where()} to sample again."
            ) from error
        if self.write:
            # A kill may have come between the manifest and this.
            self._discard_batches()
        return manifest

    def finish(self, table: pa.Table, statistics: dict[str, Any]) -> None:
        """Write the table and, last, the manifest; then the batches go."""
        if self.write:
            path = self.folder / TABLE
            partial = path.with_name(f"{durable.PARTIAL_PREFIX}{TABLE}")
            pq.write_table(table, partial)
            durable.sync(partial)
            partial.replace(path)
            content = {
                "format": "trl-extras rollouts",
                "version": STORE_VERSION,
                "statistics": statistics,
                "files": {TABLE: {"size": path.stat().st_size, "xxh3_128": durable.checksum(path)}},
            }
            durable.write_json(self.folder / durable.MANIFEST, content)
            self._discard_batches()
        self.barrier()

    def _discard_batches(self) -> None:
        for part in _PARTS:
            durable.discard(self.folder / part)

    def table(self) -> pa.Table:
        """The finished rollouts, a row a prompt."""
        return pq.read_table(self.folder / TABLE)

    # ---- Labels from elsewhere ----

    def read_labels(self) -> list[tuple[int, dict[str, Any]]] | None:
        """The rows of the label file with their line numbers, or None where there is none yet."""
        path = self.folder / LABELS
        if not path.is_file():
            return None
        rows = []
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ConfigurationError(f"{self.name}: line {number} of {self._where()}/{LABELS} is not JSON.")
                rows.append((number, row))
        return rows

    def write_labels(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the label file to be filled."""
        if self.write:
            path = self.folder / LABELS
            partial = path.with_name(f"{durable.PARTIAL_PREFIX}{LABELS}")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            durable.sync(partial)
            partial.replace(path)
            durable.sync(self.folder)
        self.barrier()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
