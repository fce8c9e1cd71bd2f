"""*Accelerated* Preference Optimization (arXiv 2410.06293); not the Anchored one that TRL has as `loss_type`."""

from .config import APOConfig
from .trainer import APOTrainer


__all__ = ["APOConfig", "APOTrainer"]
