"""Which class a method's name stands for, and which stock TRL class it replaces.

Importing this module imports neither torch nor trl: names are turned into classes only by [`Method.load`].
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any


ENTRY_POINT_GROUP = "trl_extras.trainers"


class MethodError(ValueError):
    """A trainer's name that does not lead to a usable class; the message says which part of it failed."""


@dataclass(frozen=True)
class Swap:
    """The four classes of a method: what a script asks for (`stock_*`) and what it gets instead."""

    trainer: type[Any]
    config: type[Any]
    stock_trainer: type[Any]
    stock_config: type[Any]


@dataclass(frozen=True)
class Method:
    """A method by name.

    Args:
        trainer: the trainer, as `package.module:Class`.
        config: its config, in the same form; `None` means the trainer's `config_class` attribute.
        stock_trainer: the TRL trainer it replaces, as `trl.Class`; `None` means the nearest one among the bases.
        stock_config: the TRL config it replaces, in the same form; `None` as above.
    """

    trainer: str
    config: str | None = None
    stock_trainer: str | None = None
    stock_config: str | None = None

    def load(self) -> Swap:
        """Import the method's classes. Raises [`MethodError`] if a part of the name does not resolve."""
        trainer = _import_class(self.trainer)
        if self.config and self.stock_trainer and self.stock_config:
            return Swap(
                trainer, *(_import_class(path) for path in (self.config, self.stock_trainer, self.stock_config))
            )
        return _infer(self.trainer, trainer)


# A method is one line here; a script of the same name in trl_extras/scripts makes it a subcommand too.
BUILT_IN: dict[str, Method] = {
    "apo": Method("trl_extras.apo:APOTrainer", "trl_extras.apo:APOConfig", "trl:DPOTrainer", "trl:DPOConfig"),
    "apo_spo": Method(
        "trl_extras.apo_spo:APOSPOTrainer", "trl_extras.apo_spo:APOSPOConfig", "trl:DPOTrainer", "trl:DPOConfig"
    ),
    "spo": Method("trl_extras.spo:SPOTrainer", "trl_extras.spo:SPOConfig", "trl:DPOTrainer", "trl:DPOConfig"),
    "spr": Method("trl_extras.spr:SPRTrainer", "trl_extras.spr:SPRConfig", "trl:SFTTrainer", "trl:SFTConfig"),
}


def registered() -> dict[str, Method]:
    """Third-party methods: every entry point of the group `trl_extras.trainers` that no built-in name hides."""
    return {
        point.name: Method(point.value.replace(" ", ""))
        for point in entry_points(group=ENTRY_POINT_GROUP)
        if point.name not in BUILT_IN
    }


def known_names() -> list[str]:
    """Names that [`resolve`] knows, built-in ones first. Imports none of them."""
    return [*BUILT_IN, *sorted(registered())]


def resolve(name: str) -> Method:
    """Find a method: a built-in name, else a registered one, else `package.module:Class`.

    Raises [`MethodError`], with the known names, for anything else. The classes are not imported yet.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    third_party = registered()
    if name in third_party:
        return third_party[name]
    if ":" in name:
        return Method(name)
    close = difflib.get_close_matches(name, [*BUILT_IN, *third_party], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise MethodError(
        f"unknown trainer {name!r}: known are {', '.join(known_names())}, or give package.module:Class{hint}"
    )


def _import_class(path: str) -> type[Any]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise MethodError(f"{path!r} is not of the form package.module:Class")
    try:
        value: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        # Told apart because the two need different cures: a wrong name, or a package that is not installed.
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise MethodError(f"{path}: there is no module {error.name!r}") from error
        raise MethodError(f"{path}: importing {module_name!r} failed: {error}") from error
    except Exception as error:
        raise MethodError(f"{path}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            public = [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []
            close = difflib.get_close_matches(part, public, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise MethodError(f"{path}: module {module_name!r} has no {attribute!r}{hint}") from None
    if not isinstance(value, type):
        raise MethodError(f"{path} is not a class but {type(value).__name__}")
    return value


def _of_trl(cls: type[Any]) -> bool:
    return cls.__module__ == "trl" or cls.__module__.startswith("trl.")


def _infer(path: str, trainer: type[Any]) -> Swap:
    """The config and the stock classes of a trainer that names none of them."""
    from transformers import Trainer, TrainingArguments

    if not issubclass(trainer, Trainer):
        raise MethodError(f"{path} is not a trainer: it does not derive from transformers.Trainer")
    # TRL's own common base is no class that a script could ask for; like everything private it starts with "_".
    bases = [
        base
        for base in trainer.__mro__[1:]
        if _of_trl(base) and issubclass(base, Trainer) and not base.__name__.startswith("_")
    ]
    if not bases:
        raise MethodError(f"{path} replaces nothing: there is no TRL trainer among its bases")
    stock_trainer = bases[0]
    config = getattr(trainer, "config_class", None)
    if config is None:
        raise MethodError(f"{path} has no config_class attribute, which names its config")
    if not (isinstance(config, type) and issubclass(config, TrainingArguments)):
        raise MethodError(f"{path}: config_class is no config class but {config!r}")

    expected_name = stock_trainer.__name__.removesuffix("Trainer") + "Config"
    module: ModuleType = sys.modules[stock_trainer.__module__]
    expected = getattr(module, expected_name, None)
    if expected is not None and not issubclass(config, expected):
        raise MethodError(
            f"{path}: config_class {config.__name__} does not derive from {expected_name}, "
            f"which {stock_trainer.__name__} takes"
        )
    configs = [base for base in config.__mro__ if _of_trl(base) and not base.__name__.startswith("_")]
    stock_config = expected if expected is not None else (configs[0] if configs else None)
    if stock_config is None:
        raise MethodError(f"{path}: there is no TRL config among the bases of config_class {config.__name__}")
    return Swap(trainer, config, stock_trainer, stock_config)
