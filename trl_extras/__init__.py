"""Accelerated (APO) and Stable (SPO) Preference Optimization and Successive Policy Re-weighting (SPR) for TRL.

Importing this package patches nothing and imports neither torch nor trl: public names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .apo import APOConfig, APOTrainer
    from .apo_spo import APOSPOConfig, APOSPOTrainer
    from .rounds import RoundDataBuilder
    from .spo import SPOConfig, SPOTrainer
    from .spr import SPRConfig, SPRTrainer
    from .state_dicts import extrapolate

__version__ = "0.1.0"

_PUBLIC = {
    "APOConfig": "trl_extras.apo",
    "APOTrainer": "trl_extras.apo",
    "APOSPOConfig": "trl_extras.apo_spo",
    "APOSPOTrainer": "trl_extras.apo_spo",
    "RoundDataBuilder": "trl_extras.rounds",
    "SPOConfig": "trl_extras.spo",
    "SPOTrainer": "trl_extras.spo",
    "SPRConfig": "trl_extras.spr",
    "SPRTrainer": "trl_extras.spr",
    "extrapolate": "trl_extras.state_dicts",
}

__all__ = [
    "APOConfig",
    "APOSPOConfig",
    "APOSPOTrainer",
    "APOTrainer",
    "RoundDataBuilder",
    "SPOConfig",
    "SPOTrainer",
    "SPRConfig",
    "SPRTrainer",
    "__version__",
    "extrapolate",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
