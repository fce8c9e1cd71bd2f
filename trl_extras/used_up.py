"""What of a configuration a trainer's constructor has used up, so that another value would not count in `train()`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .errors import ConfigurationError


_ROWS = {
    "max_length", "truncation_mode", "pad_token", "eos_token", "chat_template_path", "dataset_text_field",
    "dataset_kwargs", "completion_only_loss", "assistant_only_loss", "shuffle_dataset", "pad_to_multiple_of",
    "max_completion_length", "behavior_logps_column", "lower_level", "sft_dataset_name", "sft_dataset_config",
    "sft_dataset_split", "offline_dataset_name", "offline_dataset_config", "offline_dataset_split",
}  # fmt: skip
_MODEL = {
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "use_liger_kernel", "neftune_noise_alpha", "seed",
    "adapter_output", "adapter_rank", "bf16", "fp16", "use_cpu", "deepspeed", "fsdp", "fsdp_config", "torch_compile",
}  # fmt: skip
_LOSS = {
    "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing",
    "label_smoothing_factor", "use_weighting", "router_aux_loss_coef", "precompute_ref_log_probs", "sync_ref_model",
}  # fmt: skip
_JUDGES = {"reward_funcs", "reward_weights", "ranker", "use_vllm"}
_ENGINE = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}


class UsedUp:
    """
    A configuration as a constructor has found it.

    Args:
        config: the configuration.
        partly: what the constructor has used of further fields, by their names: a function of the configuration.
    """

    def __init__(self, config: Any, partly: dict[str, Callable[[Any], Any]]):
        names = _ROWS | _MODEL | _LOSS | _JUDGES | (_ENGINE if vars(config).get("use_vllm") else set())
        self.partly = partly
        self.values = {
            field.name: copy.deepcopy(getattr(config, field.name))
            for field in fields(config)
            if field.name in names or field.name.startswith("vllm_") or field.name in partly
        }

    def check(self, config: Any) -> None:
        """
        Raises:
            ConfigurationError: a field has another value now, which could not count.
        """
        for name, before in self.values.items():
            now, used = getattr(config, name), self.partly.get(name, lambda value: value)
            if used(now) != used(before):
                raise ConfigurationError(
                    f"`{name}` is {now!r}, but was {before!r} when the trainer was made, which has used it up: make a "
                    "new trainer with that value."
                )
