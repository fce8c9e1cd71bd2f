"""Stable Preference Optimization (arXiv 2507.07723); several unrelated papers share the three letters."""

from .config import SPOConfig
from .trainer import SPOTrainer


__all__ = ["SPOConfig", "SPOTrainer"]
