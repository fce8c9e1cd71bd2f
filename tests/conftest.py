"""Shared fixtures. Nothing here or below reaches for the network."""

from __future__ import annotations

import gc
import os


# Before anything of Hugging Face is imported: a test must neither wait for a hub nor report to one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# The models are tiny: a second thread costs more than it brings, above all on a machine that does something else too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Every `train()` collects garbage; what the imports left for good need not be looked through each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings and its tokenizer, in a folder."""
    return tiny.save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_apo(base: Path, tmp_path: Path) -> Callable[..., Any]:
    """An APOTrainer over the tiny model: `make_apo("folder", num_rounds=2, ...)`; arguments of APOConfig."""
    from trl_extras import APOConfig, APOTrainer

    def make(folder: str | Path = "out", *, model: Any = None, data: Any = None, **kwargs: Any) -> Any:
        trainer_keys = (
            "ref_model", "eval_dataset", "callbacks", "optimizers", "peft_config", "reward_funcs",
            "reward_processing_classes", "ranker",
        )  # fmt: skip
        trainer_kwargs = {key: kwargs.pop(key) for key in trainer_keys if key in kwargs}
        # The config's fields of the same names.
        kwargs |= {key.removeprefix("config_"): kwargs.pop(key) for key in list(kwargs) if key.startswith("config_")}
        defaults = {"num_rounds": 3, "train_sampling_strategy": "sequential"}
        return APOTrainer(
            model=str(base) if model is None else model,
            args=APOConfig(**tiny.arguments(tmp_path / folder, **{**defaults, **kwargs})),
            train_dataset=tiny.make_pairs(24) if data is None else data,
            processing_class=tiny.make_tokenizer(),
            **trainer_kwargs,
        )

    return make


@pytest.fixture
def make_spo(base: Path, tmp_path: Path) -> Callable[..., Any]:
    """An SPOTrainer over the tiny model: `make_spo("folder", sft_coef=0.5, ...)`; arguments of SPOConfig."""
    from trl_extras import SPOConfig, SPOTrainer

    def make(
        folder: str | Path = "out", *, model: Any = None, data: Any = None, cls: Any = SPOTrainer, **kwargs: Any
    ) -> Any:
        keys = ("ref_model", "eval_dataset", "callbacks", "optimizers", "peft_config", "sft_dataset", "reward_funcs")
        given = {key: kwargs.pop(key) for key in keys if key in kwargs}
        config: Any = getattr(cls, "config_class", SPOConfig)
        defaults = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
        return cls(
            model=str(base) if model is None else model,
            args=config(**tiny.arguments(tmp_path / folder, **{**defaults, **kwargs})),
            train_dataset=tiny.make_pairs(12) if data is None else data,
            processing_class=tiny.make_tokenizer(),
            **given,
        )

    return make
