"""
The one importer of private TRL and transformers names, and where versions are looked at.

Private methods that the trainers override are listed here as well; `tests/test_upstream_contract.py` pins every name.
"""

from __future__ import annotations

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.data_utils import _tokenize
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer


TRAINER_STATE_NAME = "trainer_state.json"

# Overridden by the rounds mixin (transformers.Trainer) and by APOTrainer (trl.DPOTrainer).
OVERRIDDEN_TRAINER_METHODS = ("_get_output_dir", "_save_checkpoint", "_push_from_checkpoint")
# Overridden where a run goes on with adapters, by the checkpoints and by the rounds.
OVERRIDDEN_LOADING = ("_load_from_checkpoint",)
# What DPOTrainer calls its frozen copy of an adapter that is passed, and has as the reference while it is there.
REFERENCE_ADAPTER = "ref"
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
    "TRAINER_STATE_NAME",
    "_BaseConfig",
    "_BaseTrainer",
    "_tokenize",
]
