"""
Weights of which every process may hold a part only: FSDP2's, which are DTensors, and DeepSpeed's.

Everything here is about one weight at a time. A part is a run of consecutive elements, in the order that files have
them: so each process reads its own part of a file, and an extrapolation touches nothing of another process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._compat import resharding_of
from ..errors import ConfigurationError
from . import zero


_Answer = TypeVar("_Answer")

# Set by accelerate and read by transformers: only the main process reads weights from disk.
_LOADS_ON_MAIN = "FSDP_CPU_RAM_EFFICIENT_LOADING"


class Part(NamedTuple):
    """
    What this process holds of a weight.

    Attributes:
        start: where it begins among the weight's elements, in row-major order.
        flat: its elements, (n,); a view, so that writing to it writes to the weight.
        counts: whether a sum over processes counts it here: each element counts once.
    """

    start: int
    flat: Tensor
    counts: bool


def _is_dtensor(tensor: Any) -> bool:
    # Its module takes a second to import, and whoever has made such a tensor has imported it.
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold parts of the model's weights."""
    return any(_is_dtensor(weight) or zero.divides(weight) for weight in model.parameters())


def has_masters(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed keeps the weights, with a precision of their own, beside what the model computes with."""
    return any(zero.divides(weight) for weight in model.parameters())


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return zero.shape_of(weight) if zero.divides(weight) else weight.shape


def dtype_of(weight: Tensor) -> torch.dtype:
    """What the weight is saved as, and what its part has."""
    return zero.dtype_of(weight) if zero.divides(weight) else weight.dtype


def several_processes() -> bool:
    """Whether there is anybody to agree with."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def of_all(value: _Answer) -> list[_Answer]:
    """What every process says, by rank; all of them call this."""
    if not several_processes():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def of_main(value: _Answer) -> _Answer:
    """What the main process says, on all of them; all of them call this."""
    if not several_processes():
        return value
    found = [value]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def from_main(look: Callable[[], _Answer]) -> _Answer:
    """What the main process finds, on all of them; only that one looks."""
    here = not several_processes() or torch.distributed.get_rank() == 0
    return of_main(look() if here else None)  # type: ignore[return-value]


def look_at(model: torch.nn.Module, look: Callable[[torch.nn.Module], _Answer]) -> _Answer:
    """
    What is found in a model, on all processes. Where they hold parts of it all look, because each whole weight takes
    all of them; elsewhere the main process alone: of a model that is loaded to save memory the others have nothing.
    """
    return look(model) if is_sharded(model) else from_main(lambda: look(model))


@contextmanager
def loading_whole() -> Iterator[None]:
    """Models that are loaded inside have their weights on every process, also where FSDP saves memory by loading."""
    kept = os.environ.pop(_LOADS_ON_MAIN, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[_LOADS_ON_MAIN] = kept


def part_of(weight: Tensor) -> Part:
    """What this process holds of a weight. Whoever writes to it calls [`publish`] when all is written."""
    if zero.divides(weight):
        return Part(*zero.part_of(weight), True)
    if not _is_dtensor(weight):
        return Part(0, weight.detach().view(-1), not several_processes() or torch.distributed.get_rank() == 0)
    tensor: Any = weight.detach()
    local = tensor.to_local()
    start, counts, divided, coordinate = 0, True, False, tensor.device_mesh.get_coordinate()
    # Of the shape: to index such a tensor is to gather it.
    rows, width = (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.dim() else (1, 1)
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            counts = counts and coordinate[dimension] == 0
        elif placement.is_shard(0) and not divided:
            divided = True
            # As torch.chunk divides: equal shares, rounded up, of which the last are shorter or empty.
            share = -(-rows // tensor.device_mesh.size(dimension))
            start = min(coordinate[dimension] * share, rows)
        else:
            raise ConfigurationError(
                f"A weight is distributed as {tensor.placements}, but rounds work with whole rows on each process "
                "(FSDP2 as accelerate sets it up), replicated or not: use that."
            )
    return Part(start * width, local.view(-1), counts)


def visible_part_of(weight: Tensor) -> Part:
    """As [`part_of`], of what the model computes with, which is something else under DeepSpeed."""
    return Part(*zero.visible_part_of(weight), True) if zero.divides(weight) else part_of(weight)


def publish(model: torch.nn.Module) -> None:
    """Parts of the model's weights have been written: bring what it computes with up to date. All call this."""
    zero.publish(model)


def whole(weight: Tensor) -> Tensor:
    """All of a weight, on every process; all of them call this. The live weight itself where it is not sharded."""
    if zero.divides(weight):
        return zero.whole(weight)
    return weight.detach().full_tensor() if _is_dtensor(weight) else weight.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def write_(weight: Tensor, values: Tensor) -> None:
    """Put values of a whole weight into what this process holds of it; then [`publish`]."""
    if not _is_dtensor(weight) and not zero.divides(weight):
        weight.detach().copy_(values.reshape(weight.shape))
        return
    part = part_of(weight)
    part.flat.copy_(values.reshape(-1)[part.start : part.start + len(part.flat)])


def settle(model: torch.nn.Module) -> None:
    """
    Give back the whole weights that FSDP2 has kept from a forward without a backward. They would be what is looked at
    and written to, and be thrown away later.
    """
    for module in _units(model):
        module.reshard()


def _units(model: torch.nn.Module) -> list[Any]:
    """The modules whose weights FSDP2 gathers at a time."""
    return [module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard")]


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """
    Every process holds the whole model, so that each can run it as often as it likes: sampling takes as many forwards
    as the longest completion has tokens. All processes enter and leave together; weights must not be written inside.
    """
    modules = _units(model)
    with resharding_of(modules) if modules else nullcontext(), zero.gathered(model):
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()


def agree(what: str, digest: str, cause: str) -> None:
    """
    Raise a ConfigurationError on every process if they do not have the same, naming the ranks that differ from the
    first. All processes call this.

    Args:
        what: what is compared, for the message.
        digest: a hash of it.
        cause: what to look at.
    """
    digests = of_all(digest)
    others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise ConfigurationError(
            f"{what} differs between processes: rank {', '.join(others[:8])} has another than rank 0. Look at "
            f"{cause}: it has to be the same on every process, in the same order."
        )
