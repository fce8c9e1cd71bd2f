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
import xxhash
from transformers.utils import logging

from ..errors import ConfigurationError
from ..rounds import durable
from .judges import same_judges


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
        judges: which judges answer, by name; see `judges.same_judges`.
        resumes: the user goes on with a run: what an edited judge answered before is kept. Otherwise that is refused
            where it had answered everything; where it had not, it was mended.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        write: bool,
        barrier: Callable[[], None],
        name: str,
        replace: bool = False,
        judges: dict[str, dict[str, str]] | None = None,
        resumes: bool = False,
    ):
        self.folder = folder
        self.description = json.loads(json.dumps({"version": STORE_VERSION, **description}))
        self.replace = replace
        self.judges = judges or {}
        self.resumes = resumes
        self.write = write
        self.barrier = barrier
        self.name = name

    # ---- What they belong to ----

    def open(self) -> bool:
        """
        Make the folder, or take the one that is there, if it belongs to the same weights, settings and judges.
        Rollouts of other weights are set aside.

        Returns:
            Whether other rollouts have made room.

        Raises:
            ValueError: as `check`.
        """
        found, replaced = self.check()
        # All have looked before anyone writes.
        self.barrier()
        if self.write and (found is None or replaced):
            if replaced and not self.replace:
                # Somebody may have paid for what was said of them.
                durable.set_aside(self.folder)
            durable.discard(self.folder)
            for part in _PARTS:
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            durable.write_json(self.folder / _DESCRIPTION, {**self.description, "judges": self.judges})
        elif self.write and found is not None:
            edited = same_judges(self.judges, found)[1]
            if edited:
                logger.warning(
                    f"{self.name}: {', '.join(edited)} has been edited since it answered for the rollouts on disk; "
                    "what "
                    f"it answered is kept. Remove {self._where()} to sample and ask again."
                )
        self.barrier()
        return replaced

    def check(self) -> tuple[dict[str, Any] | None, bool]:
        """
        Look at what is there without touching it.

        Returns:
            The judges of the rollouts on disk, or None if there are no rollouts; and whether they have to make room.

        Raises:
            ValueError: there are rollouts of the same weights, but with other settings, prompts or judges; or labels,
                which are not removed.
        """
        found = self._found_description()
        labelled = (self.folder / LABELS).exists()
        if found is None:
            if labelled:
                raise ConfigurationError(
                    f"{self.name}: {self._where()} holds labels, but its {_DESCRIPTION} is missing or unreadable, so "
                    "that what they are for is unknown: move that folder away."
                )
            return None, False
        known = found.pop("judges", {})
        names = sorted(found.keys() | self.description.keys())
        other = [name for name in names if found.get(name) != self.description.get(name)]
        other_judges, edited = same_judges(self.judges, known)
        if edited and not self.resumes and (self.folder / durable.MANIFEST).is_file() and "policy" not in other:
            if not self.replace:
                raise ConfigurationError(
                    f"{self.name}: {edited[0]!r} has been edited since it judged the rollouts on disk "
                    f"({self._where()} in the output folder): remove `_rounds/rollouts` there to sample and "
                    "ask again, set `resume_from_checkpoint='last'` to go on with what it said, or use another "
                    "`output_dir`."
                )
            other_judges = edited
        if not self.replace:
            if "policy" in other:
                if labelled:
                    raise ConfigurationError(
                        f"{self.name}: the labels on disk ({self._where()}) are for samples of other weights: go on "
                        "from "
                        "the checkpoint before this round, with `resume_from_checkpoint='last'`, or move that folder "
                        "away."
                    )
            elif other:
                raise ConfigurationError(
                    f"{self.name}: the rollouts on disk ({self._where()}) have `{other[0]}` "
                    f"{_shown(found.get(other[0]))}, but now it is {_shown(self.description.get(other[0]))}: set it "
                    "back, "
                    "remove that folder, or use another `output_dir`."
                )
            elif other_judges:
                raise ConfigurationError(
                    f"{self.name}: the rollouts on disk ({self._where()}) were judged by another {other_judges[0]!r} "
                    "than now: use that one, remove the folder to sample and ask again, or use another `output_dir`."
                )
        return known, bool(other or other_judges)

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

    def _answer_file(self, index: int, name: str) -> Path:
        return self.folder / "scores" / f"{index:06d}-{xxhash.xxh3_64_hexdigest(name.encode())}.json"

    def keep_answer(self, index: int, name: str, answer: dict[str, Any]) -> None:
        """What one reward said of a batch, while others are still to be asked."""
        durable.write_json(self._answer_file(index, name), json.loads(json.dumps(answer, default=str)))

    def kept_answers(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        """What rewards said of a batch before another one failed."""
        files = {name: self._answer_file(index, name) for name in names}
        return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}

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
        """Write the table and, last, the manifest; then the batches go. All processes have read them by then."""
        self.barrier()
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

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The finished rollouts, a row a prompt; all columns or some."""
        return pq.read_table(self.folder / TABLE, columns=None if columns is None else list(columns))

    # ---- Labels from elsewhere ----

    def read_labels(self) -> list[tuple[int, dict[str, Any]]] | None:
        """The rows of the label file with their line numbers, or None where there is none yet."""
        path = self.folder / LABELS
        if not path.is_file():
            return None
        try:
            # Some editors begin a file with a byte order mark.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{self.name}: {self._where()}/{LABELS} is not UTF-8: save it as that."
            ) from error
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ConfigurationError(
                    f"{self.name}: line {number} of {self._where()}/{LABELS} is not a JSON object in one line."
                )
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
