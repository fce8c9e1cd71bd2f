"""Rounds in one `Trainer.train()`: boundaries, durable state, checkpoints. Knows neither preferences nor rewards."""

from .config import RoundsConfig
from .data import RoundDataBuilder
from .plan import RoundPlan
from .state import TrainableState
from .trainer import NonFiniteError, RoundsTrainer


__all__ = ["NonFiniteError", "RoundDataBuilder", "RoundPlan", "RoundsConfig", "RoundsTrainer", "TrainableState"]
