"""
One extrapolation of *accelerated* preference optimization on checkpoints on disk: `trl-extras extrapolate`.

Writes `NEW + alpha * (NEW - OLD)`, the paper's equation 3.6 (arXiv 2410.06293) on the weights, as a folder that
transformers loads:

    trl-extras extrapolate runs/round_2 runs/round_1 --alpha 0.3 -o runs/theta_2

The weights never are in memory as a whole: every tensor is read, computed and written in pieces of 2 MiB, at the place
where NEW has it. Only safetensors are read, never a pickle. Two LoRA adapters of one base become one adapter of it
(`_adapters`).
"""

import argparse
import fnmatch
import math
import os
import re
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_extras.scripts._folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CheckpointError,
    Source,
    fsync,
    read_header,
    read_json,
    refuse_existing,
    written_whole,
)
from trl_extras.tensor_files import Entry, read_into


_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# safetensors' names of the dtypes that are extrapolated, with their sizes in bytes; integers and bools are NEW's own.
_FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_COPIED_DTYPES = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
# What of NEW's top level makes a model folder, and what of that belongs to a training run instead, or would point at
# weights that are not there. *.py is left out on purpose: a tool for weights should not hand on code.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("trainer_state.json", "*_results.json", "*manifest*.json", "adapter_*", "*.bin.index.json", "*.h5.*")
_CHAT_TEMPLATES = "additional_chat_templates"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Large enough that opening files and calling torch cost little beside it, small enough to stay in the cache.
_PIECE_BYTES = 2 << 20


@dataclass(frozen=True)
class _Checkpoint:
    shards: list[Path]
    tensors: dict[str, Entry]  # shard by shard, in the order of the bytes
    config: dict[str, Any]


@dataclass(frozen=True)
class _Piece:
    name: str
    dtype: str
    new_file: Path
    new_start: int
    old_file: Path
    old_start: int
    output: Path
    size: int


@dataclass(frozen=True)
class Summary:
    """What `extrapolate_checkpoints` has done: tensors written, and the norm of the momentum NEW - OLD."""

    num_tensors: int
    momentum_norm: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-extras extrapolate",
        description="Write NEW + alpha * (NEW - OLD), the extrapolation step of accelerated preference optimization "
        "(arXiv 2410.06293, equation 3.6), as a new model folder.",
        epilog="NEW and OLD are folders with safetensors weights as transformers saves them, or Hub ids; or both are "
        "LoRA adapters of one base, which give an adapter of it, exactly, whose rank is the sum of theirs. OUT is "
        "written whole or not at all.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "new", metavar="NEW", help="the newer checkpoint, thetahat_{t+1}; configs and tokenizer are its"
    )
    parser.add_argument("old", metavar="OLD", help="the checkpoint before it, thetahat_t (not extrapolated)")
    parser.add_argument("--alpha", type=float, required=True, help="how far to go on; the paper uses 0.3")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to write; must not exist")
    parser.add_argument("--revision-new", metavar="REV", help="branch, tag or commit of NEW, where it is a Hub id")
    parser.add_argument("--revision-old", metavar="REV", help="branch, tag or commit of OLD, where it is a Hub id")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 after an error, 130 after Ctrl-C (SIGTERM exits with 143)."""
    args = build_parser().parse_args(argv)
    try:
        output = Path(args.output)
        _check_alpha_and_output(args.alpha, output)
        new = _resolve(args.new, args.revision_new, "--revision-new")
        old = _resolve(args.old, args.revision_old, "--revision-old")
        with _sigterm_as_exit():
            summary = extrapolate_checkpoints(new.folder, old.folder, args.alpha, output, new.hub_id, old.hub_id)
    except (ValueError, OSError) as error:
        print(f"trl-extras extrapolate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"trl-extras extrapolate: interrupted; {args.output} was not written", file=sys.stderr)
        return 130
    print(
        f"{summary.num_tensors} tensors, alpha {args.alpha:g}, ||NEW - OLD|| = {summary.momentum_norm:.6g}, "
        f"written to {output}"
    )
    return 0


def extrapolate_checkpoints(
    new: Path, old: Path, alpha: float, output: Path, new_hub_id: str | None = None, old_hub_id: str | None = None
) -> Summary:
    """
    Write the folder `output` with the weights `new + alpha * (new - old)` and everything else from `new`.

    The files have the names, the order of tensors and the metadata of `new`'s; `old` may be sharded otherwise. Every
    tensor keeps its dtype; floats are computed as `trl_extras.state_dicts` pins it, integers and bools are `new`'s.
    All checks come before the first write. The folder is written beside `output` under a temporary name, synced to
    disk, and renamed at the end; after an error or an interrupt nothing is left (after SIGKILL or a power cut perhaps
    a hidden `.OUT.partial-PID`, but no `OUT`).

    Two LoRA adapters of one base are extrapolated by the changes that they make in its weights: the result is an
    adapter of the same base whose rank is the sum of theirs, in float32 (float64 where they are); see `_adapters`. The
    summary's norm is that of the weights' change.

    Args:
        new, old: folders with `model.safetensors`, or its index and shards; or both with `adapter_config.json` and
            `adapter_model.safetensors`.
        alpha: finite and not negative.
        output: a path that does not exist, in a folder that does.
        new_hub_id, old_hub_id: names for the model card; local paths are never put there.

    Raises:
        CheckpointError: the folders do not fit each other, or cannot be extrapolated, or the disk is too full.
        ValueError: `alpha` cannot be used, or finite weights would overflow their dtype, naming the tensor.
        OSError: a file cannot be read or written.
    """
    _check_alpha_and_output(alpha, output)
    source_new, source_old = Source(new, new_hub_id), Source(old, old_hub_id)
    adapters = _are_adapters(source_new, source_old)
    copies = _files_to_copy(new)
    if adapters:
        # Here, because it imports torch.
        from trl_extras.scripts._adapters import extrapolate_adapters

        adapter = extrapolate_adapters(source_new, source_old, alpha)
        _check_space(output, adapter.nbytes, copies)
        with written_whole(output) as partial:
            _copy(copies, new, partial)
            card = _adapter_card(alpha, new_hub_id, old_hub_id, adapter.base_model, adapter.rank)
            (partial / "README.md").write_text(card, encoding="utf-8")
            adapter.save(partial)
        return Summary(adapter.num_tensors, adapter.momentum_norm)

    checkpoint_new = _read_checkpoint(source_new)
    checkpoint_old = _with_ties_of(checkpoint_new, _read_checkpoint(source_old))
    _check_pair(checkpoint_new, checkpoint_old, source_new, source_old)
    _check_space(output, 0, [*checkpoint_new.shards, *copies])
    if "auto_map" in checkpoint_new.config:
        print(
            f"trl-extras extrapolate: warning: {source_new.name} needs code of its own (auto_map), which is not "
            "copied: copy its *.py files yourself if you trust them.",
            file=sys.stderr,
        )
    with written_whole(output) as partial:
        _copy(copies, new, partial)
        card = _model_card(alpha, new_hub_id, old_hub_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        squared_norm = _write_shards(checkpoint_new, checkpoint_old, alpha, partial)
    return Summary(len(checkpoint_new.tensors), math.sqrt(squared_norm))


def _check_space(output: Path, nbytes: int, files: list[Path]) -> None:
    needed = nbytes + sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise CheckpointError(
            f"the output needs {needed / 1e9:.2f} GB, but {output.parent} has {free / 1e9:.2f} GB free: make room, or "
            "choose another place with --output."
        )


def _copy(files: list[Path], source: Path, target: Path) -> None:
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _check_alpha_and_output(alpha: float, output: Path) -> None:
    from trl_extras.state_dicts import check_alpha

    check_alpha(alpha)
    refuse_existing(output)
    if not output.parent.is_dir():
        raise CheckpointError(f"--output: the folder {output.parent} does not exist: create it first.")


def _resolve(text: str, revision: str | None, revision_flag: str) -> Source:
    """A local folder as it is; a Hub id downloaded (or from the cache), without pickles and code."""
    folder = Path(text)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{revision_flag} is for Hub ids, but {text} is a local folder: leave it out.")
        return Source(folder, None)
    if folder.exists() or not _HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"{text} is neither a folder nor a Hub id: pass a folder that save_pretrained has written."
        )

    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            text,
            revision=revision,
            allow_patterns=[_WEIGHTS, "model-*.safetensors", ADAPTER_WEIGHTS, *_COPIED],
            ignore_patterns=["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"],
        )
    except Exception as error:  # whatever the client and its HTTP library raise: the user needs one line, not a trace
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{text} is no local folder, and the Hub did not give it: {reason}") from error
    return Source(Path(snapshot), text)


def _are_adapters(new: Source, old: Source) -> bool:
    """Whether both are adapters (True) or models (False); one of each is refused, and a folder that is both."""
    kinds = []
    for source in (new, old):
        adapter = (source.folder / ADAPTER_CONFIG).is_file()
        model = (source.folder / _WEIGHTS).is_file() or (source.folder / _INDEX).is_file()
        if adapter and model and (source.folder / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(
                f"{source.name} holds a model and an adapter ({ADAPTER_CONFIG}), so that it is not clear which of "
                "them is meant: move one of them elsewhere."
            )
        kinds.append(adapter and not model)
    if kinds[0] != kinds[1]:
        adapter_name, adapter_source = ("NEW", new) if kinds[0] else ("OLD", old)
        other_name, other_source = ("OLD", old) if kinds[0] else ("NEW", new)
        raise CheckpointError(
            f"{adapter_name} ({adapter_source.name}) is a PEFT adapter and {other_name} ({other_source.name}) is not: "
            "pass two adapters of one base, or merge the adapter into its base first (merge_and_unload, in float32)."
        )
    return kinds[0]


def _read_checkpoint(source: Source) -> _Checkpoint:
    """Read index, configuration and headers of a checkpoint: all that is needed to check it, none of its weights."""
    folder = source.folder
    config_file, index_file = folder / "config.json", folder / _INDEX
    config = read_json(config_file) if config_file.is_file() else {}
    if (folder / _WEIGHTS).is_file():  # before the index, as transformers does
        weight_map = None
        shards = [folder / _WEIGHTS]
    elif index_file.is_file():
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
            raise CheckpointError(f"{index_file} has no usable weight_map: save the model again.")
        shards = [folder / file for file in sorted(set(weight_map.values()))]
    else:
        raise _no_weights(source)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{source.name} is quantised: packed weights and their scales cannot be extrapolated one by one. "
            "Pass unquantised checkpoints."
        )

    tensors: dict[str, Entry] = {}
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(
                f"{source.name} lacks {shard.name}, which its index names: the checkpoint is incomplete."
            )
        for name, entry in read_header(shard).items():
            if name in tensors:
                raise CheckpointError(f"{name!r} is in two shards of {source.name}: save the model again.")
            tensors[name] = entry
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{name!r} is not in {file}, where the index of {source.name} has it: save it again."
            )
    return _Checkpoint(shards, tensors, config)


def _no_weights(source: Source) -> CheckpointError:
    folder = source.folder
    if any(folder.glob("pytorch_model*.bin")):
        return CheckpointError(
            f"{source.name} has its weights as a pickle (pytorch_model.bin), which is not read because it can run "
            "code: convert it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    return CheckpointError(
        f"{source.name} has neither {_WEIGHTS} nor {_INDEX}: pass a full model that save_pretrained has written "
        "(safetensors; pickled weights have to be converted with it first), or a LoRA adapter."
    )


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and value == os.path.basename(value)


def _with_ties_of(new: _Checkpoint, old: _Checkpoint) -> _Checkpoint:
    """`old` with those copies of tied tensors that `new` stores: a tied head may lie beside its embedding, or not."""
    ties = _ties(new, old)
    needless = _ties(old, new)
    tensors = {name: entry for name, entry in old.tensors.items() if name not in needless}
    return replace(old, tensors=tensors | {name: old.tensors[partner] for name, partner in ties.items()})


def _ties(here: _Checkpoint, there: _Checkpoint) -> dict[str, str]:
    """The matrices that only `here` stores and that are copies of one that both store, with that one's name."""
    found = {}
    for name, entry in here.tensors.items():
        if name in there.tensors or len(entry.shape) < 2:
            continue
        for partner, other in here.tensors.items():
            alike = partner in there.tensors and (other.dtype, other.shape) == (entry.dtype, entry.shape)
            if alike and _same_values(entry, other):
                found[name] = partner
                break
    return found


def _same_values(a: Entry, b: Entry) -> bool:
    """Whether two stored tensors are equal, bit by bit; zeros alone tell nothing."""
    one, two = bytearray(_PIECE_BYTES), bytearray(_PIECE_BYTES)
    told = False
    for offset in range(0, a.end - a.start, _PIECE_BYTES):
        size = min(_PIECE_BYTES, a.end - a.start - offset)
        _read_into(one, a.file, a.start + offset, size)
        _read_into(two, b.file, b.start + offset, size)
        if one[:size] != two[:size]:
            return False
        told = told or any(one[:size])
    return told


def _check_pair(new: _Checkpoint, old: _Checkpoint, source_new: Source, source_old: Source) -> None:
    """Refuse checkpoints that do not fit each other, naming the first tensor."""
    tied_new, tied_old = _ties_embeddings(new.config), _ties_embeddings(old.config)
    only_new = [name for name in new.tensors if name not in old.tensors]
    only_old = [name for name in old.tensors if name not in new.tensors]
    if None not in (tied_new, tied_old) and tied_new != tied_old:
        lone = (only_new or only_old or ["lm_head.weight"])[0]
        tied, apart = (source_new, source_old) if tied_new else (source_old, source_new)
        raise CheckpointError(
            f"{tied.name} ties its embeddings (tie_word_embeddings) and {apart.name} does not, so that {lone!r} is a "
            "tensor of its own in one of them only: save both tied or both untied."
        )
    if only_new and only_old:
        raise CheckpointError(
            f"{only_new[0]!r} is in NEW ({source_new.name}) but not in OLD ({source_old.name}), and {only_old[0]!r} "
            "in OLD but not in NEW: if they are the same model (kept iterates have the names of a model in memory, "
            "others may have those of its original format), load both with transformers' from_pretrained and save "
            "both with save_pretrained(..., save_original_format=False)."
        )
    if only_new:
        raise CheckpointError(f"{only_new[0]!r} is in NEW ({source_new.name}) but not in OLD ({source_old.name}).")
    if only_old:
        raise CheckpointError(f"{only_old[0]!r} is in OLD ({source_old.name}) but not in NEW ({source_new.name}).")
    for name, entry in new.tensors.items():
        other = old.tensors[name]
        if entry.shape != other.shape:
            raise CheckpointError(
                f"{name!r} has shape {entry.shape} in NEW and {other.shape} in OLD: pass two checkpoints of one model "
                "(was the vocabulary resized in one of them?)."
            )
        if entry.dtype != other.dtype:
            raise CheckpointError(
                f"{name!r} has dtype {entry.dtype} in NEW and {other.dtype} in OLD: save both in the same dtype."
            )
        if entry.dtype not in _FLOAT_SIZES and entry.dtype not in _COPIED_DTYPES:
            raise CheckpointError(
                f"{name!r} has dtype {entry.dtype}, which is not extrapolated: save the model in float16, bfloat16, "
                "float32 or float64."
            )


def _ties_embeddings(config: dict[str, Any]) -> bool | None:
    """`tie_word_embeddings` as a configuration states it; None where it leaves that to its class."""
    text_config = config.get("text_config")
    nested = text_config.get("tie_word_embeddings") if isinstance(text_config, dict) else None
    value = config.get("tie_word_embeddings", nested)
    return None if value is None else bool(value)


def _files_to_copy(new: Path) -> list[Path]:
    """Configurations, tokenizer, chat templates and licences of a model folder; nothing of a training run, no code."""

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    files = [
        path
        for path in sorted(new.iterdir())
        if path.is_file() and matches(path.name, _COPIED) and not matches(path.name, _NOT_COPIED)
    ]
    if (new / _WEIGHTS).is_file():
        files = [path for path in files if path.name != _INDEX]
    return files + [path for path in sorted((new / _CHAT_TEMPLATES).glob("*.jinja")) if path.is_file()]


def _model_card(alpha: float, new_hub_id: str | None, old_hub_id: str | None) -> str:
    hub_ids = [hub_id for hub_id in dict.fromkeys((new_hub_id, old_hub_id)) if hub_id]
    base = "base_model:\n" + "".join(f"- {hub_id}\n" for hub_id in hub_ids) if hub_ids else ""
    head = f"""---
library_name: transformers
{base}tags:
- accelerated-preference-optimization
- trl-extras
---

# Extrapolated model

These weights are one extrapolation step of *accelerated* preference optimization
([arXiv 2410.06293](https://arxiv.org/abs/2410.06293), equation 3.6): `NEW + alpha * (NEW - OLD)`, computed tensor by
tensor without data or training.
"""
    return head + _card_body(alpha, new_hub_id, old_hub_id)


def _adapter_card(
    alpha: float, new_hub_id: str | None, old_hub_id: str | None, base_model: str | None, rank: int
) -> str:
    # A path on somebody's disk is nobody else's business, and no link.
    on_hub = base_model and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    base = f"base_model: {base_model}\n" if on_hub else ""
    head = f"""---
library_name: peft
{base}tags:
- accelerated-preference-optimization
- lora
- trl-extras
---

# Extrapolated adapter

This LoRA adapter is one extrapolation step of *accelerated* preference optimization
([arXiv 2410.06293](https://arxiv.org/abs/2410.06293), equation 3.6): the change of the base's weights is that of
`NEW + alpha * (NEW - OLD)`, of two adapters of one base, computed without data or training. It is exact,
at rank {rank}. Load it with peft on the original base.
"""
    return head + _card_body(alpha, new_hub_id, old_hub_id)


def _card_body(alpha: float, new_hub_id: str | None, old_hub_id: str | None) -> str:
    new, old = (f"[{i}](https://huggingface.co/{i})" if i else "a local checkpoint" for i in (new_hub_id, old_hub_id))
    return f"""
| | |
|---|---|
| alpha | {alpha} |
| NEW | {new} |
| OLD | {old} |

In the paper's algorithm such weights are the policy and reference of the next round. Its output is the last iterate
before extrapolation, so measure this model before you use it as a result.

Made with `trl-extras extrapolate`.
"""


def _write_shards(new: _Checkpoint, old: _Checkpoint, alpha: float, folder: Path) -> float:
    """Write every shard of `new`, extrapolated, and sync it; returns the squared norm of the momentum."""
    import torch
    from tqdm import tqdm

    local = threading.local()
    # Pieces are independent of each other, so that threads read, compute and write at once. More of them would only
    # wait for the disk. A shard is synced while the next one is computed.
    workers = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    syncer = ThreadPoolExecutor(max_workers=1)
    squared_norm = 0.0
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the threads
    try:
        pending: list[tuple[Path, list[tuple[int, Future[float]]]]] = []
        for shard in new.shards:
            output = folder / shard.name
            entries = {name: entry for name, entry in new.tensors.items() if entry.file == shard}
            _start_shard(shard, output)
            futures = [
                (piece.size, workers.submit(_extrapolate_piece, piece, alpha, local))
                for piece in _pieces(entries, old, output)
            ]
            pending.append((output, futures))
        total = sum(size for _, futures in pending for size, _ in futures)
        syncs: list[Future[None]] = []
        with tqdm(total=total, unit="B", unit_scale=True, desc="Extrapolating", disable=None) as bar:
            for output, futures in pending:
                for size, future in futures:
                    squared_norm += future.result()
                    bar.update(size)
                syncs.append(syncer.submit(fsync, output))
            for sync in syncs:
                sync.result()
    finally:
        torch.set_num_threads(torch_threads)
        # Nothing may still write when the caller removes the folder.
        workers.shutdown(wait=True, cancel_futures=True)
        syncer.shutdown(wait=True, cancel_futures=True)
    return squared_norm


def _start_shard(shard: Path, output: Path) -> None:
    """Make a file of the size of `shard` with its header: names, shapes, places and metadata stay as they are."""
    with shard.open("rb") as source, output.open("wb") as target:
        prefix = source.read(8)
        (length,) = struct.unpack("<Q", prefix)
        target.write(prefix + source.read(length))
        target.truncate(shard.stat().st_size)


def _pieces(entries: dict[str, Entry], old: _Checkpoint, output: Path) -> Iterator[_Piece]:
    for name, entry in entries.items():
        other = old.tensors[name]
        for offset in range(0, entry.end - entry.start, _PIECE_BYTES):
            size = min(_PIECE_BYTES, entry.end - entry.start - offset)
            yield _Piece(
                name, entry.dtype, entry.file, entry.start + offset, other.file, other.start + offset, output, size
            )


def _extrapolate_piece(piece: _Piece, alpha: float, local: threading.local) -> float:
    """Read, compute and write one piece, in buffers that the thread keeps; returns its share of the squared norm."""
    import torch

    from trl_extras.state_dicts import extrapolate_

    if not hasattr(local, "new"):
        local.new, local.old = bytearray(_PIECE_BYTES), bytearray(_PIECE_BYTES)
    squared_norm = 0.0
    _read_into(local.new, piece.new_file, piece.new_start, piece.size)
    if piece.dtype in _FLOAT_SIZES:
        _read_into(local.old, piece.old_file, piece.old_start, piece.size)
        dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[piece.dtype]
        count = piece.size // _FLOAT_SIZES[piece.dtype]
        new = torch.frombuffer(local.new, dtype=dtype, count=count)
        old = torch.frombuffer(local.old, dtype=dtype, count=count)
        try:
            squared_norm = extrapolate_(new, old, alpha)
        except ValueError as error:
            raise CheckpointError(f"{piece.name!r}: {error}") from None
    with piece.output.open("r+b") as stream:
        stream.seek(piece.new_start)
        stream.write(memoryview(local.new)[: piece.size])
    return squared_norm


def _read_into(buffer: bytearray, file: Path, start: int, size: int) -> None:
    try:
        read_into(buffer, file, start, size)
    except EOFError as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the temporary folder is removed; a no-op outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
