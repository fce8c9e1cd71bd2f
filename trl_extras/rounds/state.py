"""
What has to survive between rounds: the interface to "the weights", and the folders in `output_dir/_rounds`.

    _rounds/run.json                      which run these rounds belong to
    _rounds/round-0002/manifest.json      what the folder holds; written last
    _rounds/round-0002/iterate/           thetahat_2, the policy that round 1 ended with (transformers loads it)
    _rounds/round-0002/policy/            theta_2, the policy and reference that round 2 starts from, if it differs
    _rounds/round-0002/previous_policy/   theta_1, for the cosine between two updates (links)
    _rounds/round-0002/*.safetensors      what the method adds, such as reference log-probabilities
    _rounds/round-0002/data.parquet       the round's rows, if a data builder made them
    _rounds/iterates/2/                   with `keep_iterates`, thetahat_2 (links)
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from .. import state_dicts
from ..errors import ConfigurationError
from ..tensor_files import WeightsFolder
from . import durable, sharding


ROUNDS_DIR = "_rounds"
STATE_VERSION = 1

# Elements worked on at a time: few enough to stay in the cache from one operation to the next.
_PIECE = 1 << 17

# Of one file of a model that is saved from shards: what a process holds of it in memory at most, as transformers does.
_FILE_BYTES = 5_000_000_000

# Values of a frozen weight that tell it from another model's.
_SAMPLED = 1024
_PRIME = 1_000_003
_ADAPTER_PARTS = ("lora_", "modules_to_save", "trainable_tokens")

_Function = TypeVar("_Function", bound=Callable[..., Any])


class TrainableState(ABC):
    """
    What "the weights" of a run are. The rounds save, load, compare and extrapolate them through this interface alone,
    so that adapters and sharded parameters are other implementations of it.

    All processes call every method; only those with `write=True` write.
    """

    model: Any

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that one saved copy takes on disk."""

    @property
    def sharded(self) -> bool:
        """Whether processes hold parts of the weights."""
        return sharding.is_sharded(self.model)

    def gathered(self) -> AbstractContextManager[None]:
        """
        Inside, every process can run the model by itself, without the others. All enter and leave it together, and
        nothing inside writes weights.
        """
        return sharding.gathered(self.model)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a process may save the weights by itself. All enter and leave it together."""
        yield

    @abstractmethod
    def save(self, folder: Path, write: bool) -> None:
        """Write the current weights to a folder that plain transformers loads."""

    def save_state(self, folder: Path) -> None:  # noqa: B027
        """Add to a checkpoint what going on from it takes beside the weights as upstream saves them."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Copy saved weights into the live ones, in place."""

    @abstractmethod
    def copy_to(self, reference: torch.nn.Module) -> None:
        """Copy the live weights into the reference model, in place."""

    @abstractmethod
    def load_into(self, reference: torch.nn.Module, folder: Path) -> None:
        """Copy saved weights into the reference model, in place."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the live weights: equal for equal bits."""

    @abstractmethod
    def non_finite(self) -> str | None:
        """The name of the first weight that holds a nan or an infinity, or None."""

    @property
    def has_reference(self) -> bool:
        """Whether the model holds the policy at the start of the round as well, so that none is kept beside it."""
        return False

    @property
    def base(self) -> str | None:
        """A hash of what lies below the weights and does not change, if anything does."""
        return None

    def begin(self, fresh: bool) -> None:  # noqa: B027  (most need nothing)
        """
        `train()` has been called.

        Args:
            fresh: a run in rounds begins, with the live weights as its start.
        """

    def holds_state(self, folder: Path) -> bool:
        """Whether a checkpoint is to be loaded by `load`, and not by upstream."""
        return False

    def rebase(self, hold_reference: bool = False) -> bool:
        """
        The live weights, thetahat_t, are on disk: make them what the next round starts from. Returns whether their
        saved form changes by it.

        Args:
            hold_reference: keep the reference that the model holds.
        """
        return False

    @abstractmethod
    def extrapolate(self, previous: Path, alpha: float) -> None:
        """thetahat + alpha * (thetahat - previous) of the live weights thetahat, in place."""

    @abstractmethod
    def distances(self, policy: Path, iterate: Path, previous_policy: Path | None) -> dict[str, float | None]:
        """
        How far a round has moved: with the live weights thetahat_{t+1}, and theta_t, thetahat_t, theta_{t-1} on disk,
        `update_norm` = |thetahat_{t+1} - theta_t|, `momentum_norm` = |thetahat_{t+1} - thetahat_t| and
        `update_cosine`, the cosine between thetahat_{t+1} - theta_t and thetahat_t - theta_{t-1} (None in the first
        round).
        """


def one_thread(function: _Function) -> _Function:
    """
    Work through pieces on one thread. Threads that have to meet after every short operation gain little on an idle
    machine, and on a busy one each meeting waits for the scheduler: a boundary has then taken ten times as long.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return wrapped  # type: ignore[return-value]


def _pieces(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """
    What this process holds of a contiguous weight as flat pieces, each with its place in the whole: views, so that
    writing to them writes to it.
    """
    start, flat, _ = sharding.part_of(weight)
    for offset in range(0, len(flat), _PIECE):
        yield start + offset, flat[offset : offset + _PIECE]


def _size_of(weight: Tensor) -> int:
    """Bytes that the whole weight takes on disk."""
    return sharding.shape_of(weight).numel() * sharding.dtype_of(weight).itemsize


def base_fingerprint(model: torch.nn.Module) -> str:
    """
    A hash of the frozen weights below an adapter: names, shapes, dtypes and a sample of the values, so that it takes
    no longer for a large model.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or any(part in name for part in _ADAPTER_PARTS):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        digest.update(f"{name}:{parameter.dtype}:{tuple(sharding.shape_of(parameter))}".encode())
        flat = sharding.whole(parameter).reshape(-1)
        # Strides that are multiples of a row would look at one column alone.
        places = torch.arange(min(_SAMPLED, len(flat)), device=flat.device) * _PRIME % max(len(flat), 1)
        digest.update(flat[places].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(weights: Iterable[tuple[str, Tensor]], sharded: bool) -> str:
    """
    A hash of names, dtypes, shapes and values; where processes hold parts, all of them call this together.

    Args:
        weights: contiguous, by name.
        sharded: whether processes hold parts. The hash then depends on how they are divided.
    """
    digest = xxhash.xxh3_128()
    for name, weight in weights:
        digest.update(f"{name}:{sharding.dtype_of(weight)}:{tuple(sharding.shape_of(weight))}".encode())
        part = sharding.part_of(weight)
        if len(part.flat):
            digest.update(part.flat.cpu().view(torch.uint8).numpy().data)
    if not sharded:
        return digest.hexdigest()
    # Of all parts, in order: the same on every process.
    return xxhash.xxh3_128_hexdigest(" ".join(sharding.of_all(digest.hexdigest())).encode())


class FullWeights(TrainableState):
    """
    All parameters of a model, of which every process holds all, or, where they are sharded, its part. On disk they are
    one whole model in either case.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        for parameter in model.parameters():
            # Files hold contiguous tensors, and so does nearly every model.
            parameter.data = parameter.data.contiguous()

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        sharding.settle(self.model)
        # named_parameters yields tied weights once, under the name that save_pretrained keeps.
        yield from self.model.named_parameters()

    @property
    def nbytes(self) -> int:
        return sum(_size_of(p) for _, p in self._parameters())

    def save(self, folder: Path, write: bool) -> None:
        if self.sharded:
            self._save_shards(folder, write)
        elif write:
            folder.mkdir(parents=True, exist_ok=True)
            with _no_progress_bars():
                # In memory's own names: some architectures are saved under older ones, which could not be read back by
                # name.
                self.model.save_pretrained(folder, save_original_format=False)
        if write:
            saved = WeightsFolder(folder)
            for name, _ in self._parameters():
                if name not in saved:
                    raise ValueError(
                        f"{type(self.model).__name__} is not saved under the names it has in memory ({name!r} is "
                        "missing), so its rounds could not be read back."
                    )

    def _save_shards(self, folder: Path, write: bool) -> None:
        """
        Files of each process, in the layout of a model that is saved in several: the weights are gathered one after
        another, and each is kept by the process whose file it goes into, until that is full.
        """
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        # By shapes alone, alike on all processes: which process writes each weight, and into which of its files.
        held, total = [0] * world, 0
        files: list[tuple[int, list[str]]] = []
        open_file: dict[int, int] = {}
        filled: dict[int, int] = {}
        for name, weight in self._saved():
            size = _size_of(weight)
            owner = held.index(min(held))
            if owner not in open_file or filled[owner] + size > _FILE_BYTES:
                open_file[owner], filled[owner] = len(files), 0
                files.append((owner, []))
            files[open_file[owner]][1].append(name)
            held[owner], filled[owner], total = held[owner] + size, filled[owner] + size, total + size
        titles = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
        places = {name: number for number, (_, names) in enumerate(files) for name in names}
        parts: dict[int, dict[str, Tensor]] = {}
        for name, weight in self._saved():
            values, number = sharding.whole(weight), places[name]
            if files[number][0] == rank:
                part = parts.setdefault(number, {})
                part[name] = values.detach().cpu().contiguous()
                if part[name].data_ptr() == weight.data_ptr():
                    # Of a weight that every process holds.
                    part[name] = part[name].clone()
                if len(part) == len(files[number][1]):
                    folder.mkdir(parents=True, exist_ok=True)
                    save_file(parts.pop(number), folder / titles[number], metadata={"format": "pt"})
                    durable.sync(folder / titles[number])
                del part
            del values
        sharding.of_all(None)
        if write:
            weights = {name: titles[places[name]] for name in sorted(places)}
            index = {"metadata": {"total_size": total}, "weight_map": weights}
            durable.write_json(folder / "model.safetensors.index.json", index)
            self._save_configuration(folder)

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters, and the buffers that belong to a saved model."""
        parameters = dict(self._parameters())
        yield from parameters.items()
        state = self.model.state_dict()
        yield from ((name, buffer) for name, buffer in self.model.named_buffers() if name in state)

    def _save_configuration(self, folder: Path) -> None:
        model: Any = self.model
        config = copy.deepcopy(model.config)
        # FSDP2 gives a model a class of its own.
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = next(sharding.dtype_of(weight) for weight in model.parameters())
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.load_into(self.model, folder)

    @torch.no_grad()
    def load_into(self, reference: torch.nn.Module, folder: Path) -> None:
        saved = WeightsFolder(folder)
        for name, _ in reference.named_parameters():
            if name not in saved:
                raise durable.DamagedStateError(f"{name!r} is missing in {folder.name}, which is loaded.")
        # A reference may be of a coarser dtype: DeepSpeed and, with mixed precision, FSDP2 train copies in float32.
        same = reference is self.model and not sharding.has_masters(self.model)
        sharding.settle(reference)
        for name, target in [*reference.named_parameters(), *reference.named_buffers()]:
            # Buffers that are not saved are derived from the configuration.
            if name in saved:
                dtype = target.dtype if same else saved.dtype(name)
                for start, flat in _pieces(target):
                    flat.copy_(saved.piece(name, start, len(flat), dtype))
        sharding.publish(reference)

    @torch.no_grad()
    def copy_to(self, reference: torch.nn.Module) -> None:
        sharding.settle(reference)
        source = dict(self._parameters()) | dict(self.model.named_buffers())
        for name, target in [*reference.named_parameters(), *reference.named_buffers()]:
            here, there = sharding.visible_part_of(source[name]), sharding.visible_part_of(target)
            if (here.start, len(here.flat)) != (there.start, len(there.flat)):
                raise ValueError(f"{name!r} is sharded in another way in the reference model than in the policy.")
            there.flat.copy_(here.flat)
        sharding.publish(reference)

    def fingerprint(self) -> str:
        return fingerprint(self._parameters(), self.sharded)

    @one_thread
    def non_finite(self) -> str | None:
        found = self._first_non_finite()
        return next((name for name in sharding.of_all(found) if name), None) if self.sharded else found

    def _first_non_finite(self) -> str | None:
        for name, parameter in self._parameters():
            # A sum of squares is finite only if every element is; one that overflows is looked at again.
            for _, flat in _pieces(parameter) if parameter.is_floating_point() else ():
                if not math.isfinite(torch.dot(flat, flat).item()) and not flat.isfinite().all():
                    return name
        return None

    @one_thread
    def extrapolate(self, previous: Path, alpha: float) -> None:
        saved = WeightsFolder(previous)
        # All of them: a weight that is frozen now may have been trained in the round (LISA, gradual unfreezing).
        for name, parameter in self._parameters():
            for start, flat in _pieces(parameter) if parameter.is_floating_point() else ():
                before = saved.piece(name, start, len(flat), flat.dtype)
                if not parameter.requires_grad and torch.equal(flat.cpu(), before):
                    # To the bit, signed zeros included.
                    continue
                try:
                    state_dicts.extrapolate_(flat, before, alpha)
                except ValueError as error:
                    raise ValueError(f"{name!r}: {error}") from None
        sharding.publish(self.model)

    @one_thread
    @torch.no_grad()
    def distances(self, policy: Path, iterate: Path, previous_policy: Path | None) -> dict[str, float | None]:
        theta, thetahat = WeightsFolder(policy), WeightsFolder(iterate)
        before = None if previous_policy is None else WeightsFolder(previous_policy)
        update = momentum = previous = product = 0.0
        buffers = torch.empty(3, _PIECE)
        sharded = self.sharded
        for name, parameter in self._parameters():
            if not parameter.is_floating_point() or (sharded and not sharding.part_of(parameter).counts):
                continue
            for start, flat in _pieces(parameter):
                # float32 differences and sums of a piece, summed over the pieces in float64; on the CPU, where the
                # saved weights are, so that the accelerator neither waits nor needs memory.
                where = (start, len(flat), flat.dtype)
                now, was, hat = flat.cpu().float(), theta.piece(name, *where), thetahat.piece(name, *where)
                moved, from_hat, moved_before = buffers[:, : len(flat)]
                torch.sub(now, was, out=moved)
                update += torch.dot(moved, moved).item()
                if policy != iterate:
                    torch.sub(now, hat, out=from_hat)
                    momentum += torch.dot(from_hat, from_hat).item()
                if before is not None:
                    torch.sub(hat.float(), before.piece(name, *where), out=moved_before)
                    previous += torch.dot(moved_before, moved_before).item()
                    product += torch.dot(moved, moved_before).item()
        if sharded:
            sums = zip(*sharding.of_all((update, momentum, previous, product)), strict=True)
            update, momentum, previous, product = (math.fsum(values) for values in sums)
        return {
            "update_norm": math.sqrt(update),
            "momentum_norm": math.sqrt(momentum if policy != iterate else update),
            "update_cosine": None if before is None else state_dicts.cosine(product, update, previous),
        }


class AdapterWeights(FullWeights):
    """
    The trained weights of a PeftModel, under the names that peft saves them by; the weights below them never change.
    For methods that neither move weights between rounds nor keep a reference.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        active = getattr(model, "active_adapters", [])
        if len(active) != 1:
            raise ConfigurationError(
                f"The model has {len(active)} active adapters ({', '.join(active)}), but rounds train one: make one "
                "of them active."
            )
        self._adapter = str(active[0])
        self._below = sharding.look_at(model, base_fingerprint)
        trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        if trained - {tensor.data_ptr() for _, tensor in self._parameters()}:
            raise ConfigurationError(
                "The adapter trains weights that peft does not save with it, so its rounds could not be resumed: list "
                "them in `modules_to_save`, or freeze them."
            )

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        from peft import get_peft_model_state_dict

        sharding.settle(self.model)
        # The parameters themselves.
        state = get_peft_model_state_dict(
            self.model, self.model.state_dict(keep_vars=True), self._adapter, save_embedding_layers=False
        )
        yield from state.items()

    def save(self, folder: Path, write: bool) -> None:
        # Not by the model's own method: that gives an adapter of another name than peft's default a folder of its own.
        state = {name: sharding.whole(tensor).cpu().contiguous().clone() for name, tensor in self._parameters()}
        if not write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config: Any = copy.deepcopy(self.model.peft_config[self._adapter])
        config.inference_mode = True
        config.save_pretrained(str(folder))

    @property
    def base(self) -> str:
        return self._below

    def fingerprint(self) -> str:
        """Of the adapter and of what lies below it: a fresh adapter has the same bits on every model of one shape."""
        return xxhash.xxh3_128_hexdigest(f"{super().fingerprint()} {self.base}".encode())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = WeightsFolder(folder)
        for name, target in self._parameters():
            for start, flat in _pieces(target):
                flat.copy_(saved.piece(name, start, len(flat), flat.dtype))
        sharding.publish(self.model)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar for every copy of the weights would bury the one that shows the training."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class RoundFolder:
    """The durable state of one round, at `_rounds/round-000t` of an output folder or of a checkpoint."""

    def __init__(self, parent: Path, round_index: int):
        self.path = parent / ROUNDS_DIR / f"round-{round_index:04d}"
        self.round_index = round_index

    @property
    def iterate(self) -> Path:
        """thetahat_t."""
        return self.path / "iterate"

    @property
    def policy(self) -> Path:
        """theta_t, which is thetahat_t where nothing was extrapolated."""
        own = self.path / "policy"
        return own if own.is_dir() else self.iterate

    @property
    def previous_policy(self) -> Path | None:
        """theta_{t-1}, or None in the first round."""
        own = self.path / "previous_policy"
        return own if own.is_dir() else None

    def manifest(self, checksums: bool = False) -> dict[str, Any] | None:
        """The manifest, if the folder is there and whole; None otherwise."""
        try:
            manifest = durable.verify(self.path, checksums=checksums)
        except durable.DamagedStateError:
            return None
        return manifest if manifest.get("version") == STATE_VERSION else None

    def whole_manifest(self) -> dict[str, Any]:
        """
        The manifest of a folder that has to be there and whole.

        Raises:
            DamagedStateError: it is not, for this process.
        """
        manifest = self.manifest()
        if manifest is None:
            raise durable.DamagedStateError(
                f"{self.path} is not there or not whole for this process: all processes have to see the same "
                "`output_dir`, and nothing else may change it."
            )
        return manifest
