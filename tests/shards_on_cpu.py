"""
FSDP2 without a GPU. accelerate has no version of it for a CPU and quietly runs DDP instead; these processes tell it to
go on as it would on a GPU. The arithmetic of the shards is the same.
"""

from __future__ import annotations

import os
from typing import Any


ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def asked() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def allow() -> None:
    """Let accelerate shard in this process, from the next training arguments on; they make the process group."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    stock: Any = TrainingArguments.__post_init__

    def post_init(self: Any) -> None:
        stock(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    TrainingArguments.__post_init__ = post_init  # type: ignore[method-assign]
