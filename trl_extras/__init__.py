"""Accelerated Preference Optimization (APO) for TRL, as subclasses of TRL's own trainers.

Importing this package patches nothing and imports neither torch nor trl: public names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .apo import APOConfig, APOTrainer
    from .rounds import RoundDataBuilder
    from .state_dicts import extrapolate

__version__ = "0.1.0"

_PUBLIC = {
    "APOConfig": "trl_extras.apo",
    "APOTrainer": "trl_extras.apo",
    "RoundDataBuilder": "trl_extras.rounds",
    "extrapolate": "trl_extras.state_dicts",
}

__all__ = ["APOConfig", "APOTrainer", "RoundDataBuilder", "__version__", "extrapolate"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
