"""*Accelerated* preference optimization in rounds, over the objective of Stable Preference Optimization."""

from .config import APOSPOConfig
from .trainer import APOSPOTrainer


__all__ = ["APOSPOConfig", "APOSPOTrainer"]
