"""Successive Policy Re-weighting (ICLR 2025 submission 12963)."""

from .config import SPRConfig
from .trainer import SPRTrainer


__all__ = ["SPRConfig", "SPRTrainer"]
