"""The floor of an SFT dataset: its rows' likelihood under the initial model, computed once and kept beside the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..rounds import durable
from ..rounds.state import FullWeights


logger = logging.get_logger(__name__)


@dataclass
class Floor:
    """
    nll* of every SFT row, (rows,), nats per token, and a key that says of which rows under which model.
    """

    key: str
    nll: Tensor

    @classmethod
    def read(cls, path: Path) -> Floor | None:
        """From a file that [`write`] wrote, or None if there is none that can be read."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return cls(str((file.metadata() or {}).get("key")), file.get_tensor("nll"))
        except Exception as error:
            logger.warning(f"{path.name} cannot be read ({type(error).__name__}).")
            return None

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{durable.PARTIAL_PREFIX}{path.name}")
        save_file({"nll": self.nll}, partial, metadata={"key": self.key})
        durable.sync(partial)
        partial.replace(path)


def model_fingerprint(model: torch.nn.Module, precision: str) -> str:
    """
    A hash of everything that the likelihood of a row depends on: weights, architecture, adapters, precision.

    Args:
        model: not wrapped.
        precision: of autocast, as accelerate calls it.
    """
    config: Any = model.config
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    rest = {
        "config": config.to_dict(),
        "adapters": adapters,
        "active": str(getattr(model, "active_adapter", None)),
        "precision": precision,
    }
    # Sets have another order in every process.
    text = json.dumps(rest, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))
    return f"{FullWeights(model).fingerprint()}-{xxhash.xxh3_128_hexdigest(text.encode())}"
