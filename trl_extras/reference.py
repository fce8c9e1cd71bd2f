"""Which model a DPOTrainer has as its reference where the user passes none: the policy as it was handed in."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from trl import BEMACallback, SyncRefModelCallback

from .rounds import sharding
from .rounds.saving import fsdp_version
from .rounds.state import FullWeights


def with_reference(given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """
    A DPOTrainer's arguments with a copy of the policy as `ref_model`: TRL reloads the reference from the model's path,
    which gives other weights where the model was changed in memory.

    Returns:
        The arguments, and whether `copy_into_reference` has to follow once the trainer is made.
    """
    model, config = given.get("model"), given["args"]
    adapted = given.get("peft_config") is not None or hasattr(model, "peft_config")
    # With FSDP the parent keeps a model for values that are computed ahead, too.
    needed = not config.precompute_ref_log_probs or bool(fsdp_version(config))
    if given.get("ref_model") is not None or adapted or not needed or not isinstance(model, PreTrainedModel):
        return given, False
    if sharding.is_sharded(model):
        # ZeRO 3 has divided it while it was loaded, and a copy would be empty.
        return given, True
    return {**given, "ref_model": copy.deepcopy(model)}, False


def mover_of_reference(callbacks: Iterable[Any]) -> str | None:
    """The callback, or class of one, that writes the policy into the reference while it is trained, by its name."""
    for callback in callbacks:
        cls = callback if isinstance(callback, type) else type(callback)
        # TRL's experimental BEMACallback derives from its stable one, which leaves the reference alone.
        moves = issubclass(cls, BEMACallback) and vars(callback).get("update_ref_model", False)
        if issubclass(cls, SyncRefModelCallback) or moves:
            return cls.__name__
    return None


def plain_reference(trainer: Any) -> Any:
    """A trainer's reference model without what accelerate has put around it; `torch_compile` compiles it, too."""
    return trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)


def copy_into_reference(trainer: Any) -> None:
    """Write a policy that was passed divided into the reference that TRL has loaded."""
    FullWeights(trainer.model).copy_to(plain_reference(trainer))
