"""An optimizer that is made fresh in place, at the start of a round: of torch alone, without a trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


def inner(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def groups_of(optimizer: Any, with_parameters: bool = False) -> list[dict[str, Any]]:
    """Copies of an optimizer's groups without their parameters: all, or those that have parameters."""
    return [
        copy.deepcopy({key: value for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
        if group["params"] or not with_parameters
    ]


def set_groups(optimizer: Any, groups: list[dict[str, Any]], keep_others: bool = False) -> None:
    """Give each group these settings; what else is in it goes, unless `keep_others`."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        if not keep_others:
            for key in group.keys() - values.keys() - {"params"}:
                del group[key]
        group.update(copy.deepcopy(values))


def take_over(optimizer: Any, fresh: Any) -> None:
    """Make an optimizer what a fresh one of its class is; hooks that somebody has registered stay."""
    if type(fresh) is not type(optimizer):
        raise TypeError(f"The optimizer was a {type(optimizer).__name__}, but a {type(fresh).__name__} has been made.")
    # One dict for both, because the fresh one's methods may be bound somewhere in it.
    fresh.__dict__.update({name: value for name, value in vars(optimizer).items() if name.endswith("_hooks")})
    optimizer.__dict__ = fresh.__dict__


def why_not(made: Any, given: bool = False) -> str | None:
    """
    Why rounds cannot make an optimizer or a schedule fresh, or None.

    Args:
        given: it is an object of the user's, which cannot be made again.
    """
    kind = type(made).__name__.lower()
    if isinstance(made, ReduceLROnPlateau) or "greedylr" in kind:
        return "a round's schedule has to be a function of the step alone. Use 'linear' or 'cosine'."
    if "schedulefree" in kind:
        return "it keeps the weights that count inside itself. Use another one."
    if not given:
        return None
    own = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    for name, value in vars(made).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        if any(isinstance(leaf, Optimizer) or id(leaf) not in own for leaf in _leaves(value)):
            return (
                f"it keeps something in `{name}`, which would be carried from one round into the next. Override "
                "`create_optimizer` instead, which each round calls anew."
            )
    return None


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and optimizers in nested containers."""
    if isinstance(value, Tensor | Optimizer):
        yield value
    elif isinstance(value, dict):
        for inside in value.values():
            yield from _leaves(inside)
    elif isinstance(value, list | tuple | set):
        for inside in value:
            yield from _leaves(inside)
