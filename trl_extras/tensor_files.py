"""
safetensors files read in pieces, without mapping them.

The library hands out tensors as maps of the file: their pages count as the process's memory, and reading them for the
first time costs more than copying them into a buffer that stays. The format is safetensors' published one: eight bytes
of length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

# Beside an adapter of a run in rounds: its parts, and in one entry of the metadata, as JSON, what is said of them.
ADAPTER_STATE_FILE, ADAPTER_STATE_ENTRY = "adapter_rounds.safetensors", "trl_extras"

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies on disk."""

    file: Path
    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """
    The tensors of a safetensors file, in the order of their bytes.

    Raises:
        safetensors.SafetensorError: the file is truncated or its header makes no sense.
    """
    from safetensors import safe_open

    # Opening it makes the library check the header: sizes, offsets without holes or overlaps, no truncation.
    with safe_open(file, framework="pt"):
        pass
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
    header.pop("__metadata__", None)
    entries = {}
    for name, info in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, end = info["data_offsets"]
        entries[name] = Entry(file, info["dtype"], tuple(info["shape"]), 8 + length + start, 8 + length + end)
    return entries


def read_adapter_state(file: Path) -> dict[str, Any]:
    """What an adapter's state file says of itself; nothing, of another file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        about: dict[str, Any] = json.loads((opened.metadata() or {}).get(ADAPTER_STATE_ENTRY, "{}"))
    return about


def read_into(buffer: bytearray, file: Path, start: int, size: int) -> None:
    """
    Read `size` bytes from `start` into the beginning of `buffer`.

    Raises:
        EOFError: the file has become shorter since its header was read.
    """
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        if stream.readinto(memoryview(buffer)[:size]) != size:
            raise EOFError(f"{file} became shorter while it was read.")


class WeightsFolder:
    """The tensors of a folder that `save_pretrained` wrote, one file or several, read a piece at a time."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            # A model's, or an adapter's.
            names = ["model.safetensors", "adapter_model.safetensors"]
            files = [next((name for name in names if (folder / name).is_file()), names[0])]
        self.entries = {name: entry for file in files for name, entry in read_header(folder / file).items()}
        self._buffer = bytearray()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is saved as."""
        import torch

        found: torch.dtype = getattr(torch, _TORCH_NAMES[self.entries[name].dtype])
        return found

    def piece(self, name: str, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """
        Elements `start` to `start + count` of a tensor, `(count,)`, valid until the next call.

        Args:
            dtype: what the tensor is expected to hold.

        Raises:
            ValueError: it holds another dtype, or too few elements.
        """
        import torch

        entry, size = self.entries[name], torch.empty((), dtype=dtype).element_size()
        if entry.dtype != _NAMES.get(str(dtype)) or (start + count) * size > entry.end - entry.start:
            raise ValueError(f"{name!r} is saved as {entry.dtype} {entry.shape}, which is not what is in memory.")
        if len(self._buffer) < count * size:
            self._buffer = bytearray(count * size)
        read_into(self._buffer, entry.file, entry.start + start * size, count * size)
        return torch.frombuffer(self._buffer, dtype=dtype, count=count)


_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_TORCH_NAMES = {saved: name.removeprefix("torch.") for name, saved in _NAMES.items()}
