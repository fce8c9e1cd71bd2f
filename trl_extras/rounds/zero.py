"""
DeepSpeed's part of `sharding`: weights under ZeRO 1, 2 and 3.

A weight that is trained there has two forms. The visible one is what the model computes with: whole on every process
(ZeRO 1 and 2) or divided (ZeRO 3), in the precision of training. Its master, in float32 and always divided, is what
the optimizer moves, and what the next step writes the visible one from. **The weight is its master**: that is saved,
compared and extrapolated. Whatever writes masters calls `publish` afterwards, so that both agree at once; a change of
the visible form alone would be lost with the next step.

A weight that is not trained has no master, and under ZeRO 1 and 2 nothing about it is DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._compat import outside_zero3, without_zero3_hooks


def divides(weight: Any) -> bool:
    """Whether DeepSpeed keeps a weight, or the master of it, in parts."""
    return hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping")


def shape_of(weight: Any) -> torch.Size:
    """The shape of the whole weight: ZeRO 3 leaves an empty tensor between two uses."""
    shape: torch.Size = weight.ds_shape if hasattr(weight, "ds_id") else weight.shape
    return shape


def _rank(weight: Any) -> int:
    return int(torch.distributed.get_rank(weight.ds_process_group))


def _master(weight: Any) -> Tensor | None:
    """This process's part of a master under ZeRO 3, padded as DeepSpeed has it, or None of a weight without one."""
    if not weight.requires_grad or getattr(weight, "_z3_optimizer", None) is None:
        return None
    from deepspeed.utils import safe_get_local_fp32_param

    # A view: what offloading to the CPU or to a disk makes a copy is refused before any weights load.
    found: Tensor = safe_get_local_fp32_param(weight)
    return found.detach()


def dtype_of(weight: Any) -> torch.dtype:
    """What a weight is saved as."""
    if hasattr(weight, "ds_id"):
        master = _master(weight)
        return weight.dtype if master is None else master.dtype
    # Also on a process that has nothing of it.
    return torch.float32


def part_of(weight: Any) -> tuple[int, Tensor]:
    """Where this process's part begins, and its elements, as a view."""
    if hasattr(weight, "ds_id"):
        master = _master(weight)
        padded = weight.ds_tensor.detach() if master is None else master
        start = min(_rank(weight) * padded.numel(), weight.ds_numel)
        return start, padded.view(-1)[: weight.ds_numel - start]
    mapping = weight._hp_mapping
    if mapping is None:
        # Nothing of it is this process's.
        return 0, torch.empty(0, dtype=torch.float32, device=weight.device)
    return int(mapping.lp_fragment_address.start), mapping.hp_fragment.detach().view(-1)


def visible_part_of(weight: Any) -> tuple[int, Tensor]:
    """As [`part_of`], of the visible form."""
    if hasattr(weight, "ds_id"):
        padded = weight.ds_tensor.detach().view(-1)
        start = min(_rank(weight) * padded.numel(), weight.ds_numel)
        return start, padded[: weight.ds_numel - start]
    return 0, weight.detach().view(-1)


def _gather(weight: Any, padded: Tensor) -> Tensor:
    """A whole weight of ZeRO 3, from the parts of all processes."""
    group = weight.ds_process_group
    everything = padded.new_empty(padded.numel() * torch.distributed.get_world_size(group))
    torch.distributed.all_gather_into_tensor(everything, padded.view(-1).contiguous(), group=group)
    return everything[: weight.ds_numel].view(weight.ds_shape)


def whole(weight: Any) -> Tensor:
    """All of a weight, on every process; all of them call this."""
    if hasattr(weight, "ds_id"):
        master = _master(weight)
        return _gather(weight, weight.ds_tensor.detach() if master is None else master)
    start, flat = part_of(weight)
    # As integers: a sum of numbers would make -0 into 0.
    bits = torch.zeros(weight.numel(), dtype=torch.int32, device=flat.device)
    bits[start : start + len(flat)] = flat.view(torch.int32)
    torch.distributed.all_reduce(bits, group=weight._dp_group)
    return bits.view(torch.float32).view(weight.shape)


@torch.no_grad()
def publish(model: torch.nn.Module) -> None:
    """Make the visible form of each weight what its master, or under ZeRO 3 its part, has become; all call this."""
    for weight in _divided(model):
        if not hasattr(weight, "ds_id"):
            weight.detach().copy_(whole(weight))
            continue
        master = _master(weight)
        if master is not None:
            weight.ds_tensor.detach().copy_(master)
        if weight.numel() == weight.ds_numel:
            # Small ones stay whole between two uses.
            weight.detach().copy_(_gather(weight, weight.ds_tensor.detach()))


def _divided(model: torch.nn.Module) -> Iterator[Any]:
    yield from (weight for weight in model.parameters() if divides(weight))


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Every process holds all of the visible weights, and forwards by itself; all enter and leave together."""
    weights = [weight for weight in _divided(model) if hasattr(weight, "ds_id")]
    if not weights:
        # ZeRO 1 and 2: they do already.
        yield
        return
    import deepspeed

    optimizer = next((o for weight in weights if (o := getattr(weight, "_z3_optimizer", None)) is not None), None)
    # The hooks gather a module's weights, together, whenever it runs, and take them away again.
    hooks = nullcontext() if optimizer is None else without_zero3_hooks(optimizer)
    with deepspeed.zero.GatheredParameters(weights), hooks, outside_zero3():
        yield


def reset_state(optimizer: Any) -> None:
    """Forget what an optimizer has gathered; DeepSpeed's, around the one that steps."""
    optimizer.state.clear()
    for group in getattr(optimizer, "bit16_groups", ()):
        for weight in group:
            if weight._hp_mapping is not None:
                # Views of the moments, which would keep them in memory; linked anew after the next step.
                weight._hp_mapping.optim_fragment = None
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False


def why_not(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """
    What a DeepSpeed configuration has that rounds are not right with, or have not been tried with; each with the
    reason.
    """
    zero = settings.get("zero_optimization") or {}
    if zero.get("stage") not in (2, 3):
        yield (
            f"DeepSpeed with ZeRO {zero.get('stage', 0)}",
            "rounds have been made to work with 2 and 3. Set `stage` in `zero_optimization`.",
        )
    for block in ("optimizer", "scheduler"):
        if settings.get(block):
            yield (
                f"`{block}` in the DeepSpeed configuration",
                "each round starts a fresh optimizer and schedule, which DeepSpeed's own cannot. Leave it out, and "
                "set `optim` and `lr_scheduler_type` in the arguments.",
            )
    for block in ("offload_optimizer", "offload_param"):
        device = (zero.get(block) or {}).get("device", "none")
        if str(device) != "none":
            yield (
                f"`{block}` in the DeepSpeed configuration",
                "rounds have not been made to work with weights that are kept elsewhere. Leave it out.",
            )
    untried = [
        name
        for name, off in (
            ("zero_hpz_partition_size", 1), ("mics_shard_size", -1), ("zero_quantized_weights", False),
            ("zero_quantized_nontrainable_weights", False), ("zenflow", None), ("super_offload", False),
        )
        if zero.get(name, off) not in (off, None, "auto")
    ]  # fmt: skip
    untried += [name for name in ("tensor_parallel", "expert_parallel", "compile", "pipeline") if settings.get(name)]
    if (settings.get("fp16") or {}).get("enabled") is True:
        untried.append("fp16")
    if (settings.get("torch_autocast") or {}).get("enabled") is True:
        untried.append("torch_autocast")
    untried += [
        f"{block}.{name}"
        for block in ("bf16", "fp16")
        for name in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads", "bf16_optimizer_states")
        if (settings.get(block) or {}).get(name)
    ]
    for name in untried:
        yield (
            f"`{name}` in the DeepSpeed configuration",
            "rounds have not been tried with it. Leave it out.",
        )
