"""Configuration of rounds with momentum over the objective with a floor."""

from __future__ import annotations

from dataclasses import dataclass

from ..apo.config import APOConfig
from ..spo.config import SPOConfig


@dataclass
class APOSPOConfig(APOConfig, SPOConfig):
    """
    Configuration of the [`APOSPOTrainer`]: the fields of [`APOConfig`] (*accelerated* preference optimization) and of
    [`SPOConfig`] (Stable Preference Optimization).
    """
