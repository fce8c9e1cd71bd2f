"""
The one importer of private TRL and transformers names, and where versions are looked at.

Private methods that the trainers override are listed here as well; `tests/test_upstream_contract.py` pins every name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.data_utils import _tokenize
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer


TRAINER_STATE_NAME = "trainer_state.json"

# Overridden by the rounds mixin (transformers.Trainer) and by APOTrainer (trl.DPOTrainer).
OVERRIDDEN_TRAINER_METHODS = ("_get_output_dir", "_save_checkpoint", "_push_from_checkpoint")
# Overridden to load weights as they were saved: on a resume, and the best model's.
OVERRIDDEN_LOADING = ("_load_from_checkpoint", "_load_best_model")
# What DPOTrainer calls its frozen copy of an adapter that is passed, and has as the reference while it is there.
REFERENCE_ADAPTER = "ref"
# Users override it; called on a transformers.Trainer in every round.
CALLED_IN_ROUNDS = ("_get_train_sampler",)
# Set on a transformers.Trainer: it reads the batch size that was in its arguments when it was made.
TRAINER_ATTRIBUTES = ("_train_batch_size",)
# Called on a transformers.Trainer.
CALLED_TRAINER_METHODS = ("_finish_current_push",)
# Called by SPOTrainer on a transformers.Trainer.
CALLED_BY_SPO = ("_prepare_inputs",)
OVERRIDDEN_DPO_METHODS = ("_precompute_ref_logps",)
# Overridden by SPRTrainer, and what it adds to.
OVERRIDDEN_SFT_METHODS = ("_set_signature_columns_if_needed",)
SPR_ATTRIBUTES = ("completion_only_loss", "data_collator")
# Overridden by the rollouts mixin, on any TRL trainer.
OVERRIDDEN_DATA_METHODS = ("_prepare_dataset",)
# Read or set on a DPOTrainer.
DPO_ATTRIBUTES = ("beta", "ref_model", "precompute_ref_logps")
# Read and set by SPOTrainer.
SPO_ATTRIBUTES = ("loss_types", "loss_weights", "precompute_ref_logps", "_metrics")

__all__ = [
    "CALLED_BY_SPO",
    "CALLED_IN_ROUNDS",
    "CALLED_TRAINER_METHODS",
    "DPO_ATTRIBUTES",
    "OVERRIDDEN_DATA_METHODS",
    "OVERRIDDEN_DPO_METHODS",
    "OVERRIDDEN_LOADING",
    "OVERRIDDEN_SFT_METHODS",
    "OVERRIDDEN_TRAINER_METHODS",
    "PREFIX_CHECKPOINT_DIR",
    "REFERENCE_ADAPTER",
    "SPO_ATTRIBUTES",
    "SPR_ATTRIBUTES",
    "TRAINER_ATTRIBUTES",
    "TRAINER_STATE_NAME",
    "_BaseConfig",
    "_BaseTrainer",
    "_tokenize",
    "outside_zero3",
    "resharding_of",
    "without_zero3_hooks",
]


@contextmanager
def resharding_of(modules: Iterable[Any]) -> Iterator[None]:
    """
    Leave FSDP2's modules with the settings of resharding after a forward that they had: torch has a setter alone.
    """
    states = {id(state): state for state in (module._get_fsdp_state() for module in modules)}
    kept = [
        (state, state._auto_reshard_after_forward, [(group, group.post_forward_mesh_info) for group in groups])
        for state in states.values()
        for groups in [state._fsdp_param_groups]
    ]
    try:
        yield
    finally:
        for state, automatic, groups in kept:
            state._auto_reshard_after_forward = automatic
            for group, info in groups:
                # A root that decides by itself never reshards, which its first forward would have settled.
                group.post_forward_mesh_info = None if automatic and state._is_root else info


@contextmanager
def without_zero3_hooks(optimizer: Any) -> Iterator[None]:
    """
    Take DeepSpeed's ZeRO-3 hooks off a model and put them back, as TRL does around sampling; TRL's functions want the
    engine for its optimizer alone.
    """
    # Here, because TRL's module takes a second to import and few runs have such hooks.
    from trl.models.utils import add_hooks, remove_hooks

    engine: Any = SimpleNamespace(optimizer=optimizer)
    remove_hooks(engine)
    try:
        yield
    finally:
        add_hooks(engine)


@contextmanager
def outside_zero3() -> Iterator[None]:
    """
    Let transformers think that this is no ZeRO-3 run: models are loaded whole, and sampling does not wait for the
    other processes after every token.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
