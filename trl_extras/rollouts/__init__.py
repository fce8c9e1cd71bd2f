"""Responses sampled from the policy, judged and kept on disk; for every method that trains on its own samples."""

from .config import SamplingConfig
from .labels import WaitingForLabels
from .trainer import RolloutsTrainer


__all__ = ["RolloutsTrainer", "SamplingConfig", "WaitingForLabels"]
