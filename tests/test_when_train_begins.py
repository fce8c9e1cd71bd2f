"""What is settled when `train()` begins: callbacks and arguments may have changed since the trainer was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import SyncRefModelCallback
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests import tiny
from trl_extras import APOSPOTrainer, SPRConfig, SPRTrainer
from trl_extras.errors import ConfigurationError


@pytest.fixture
def make(make_apo: Any, make_spo: Any) -> Any:
    """`make("apo", ...)`, `make("spo", ...)` or `make("apo_spo", ...)`."""
    made = {"apo": make_apo, "spo": make_spo, "apo_spo": lambda **kwargs: make_spo(cls=APOSPOTrainer, **kwargs)}
    return lambda name, **kwargs: made[name](**kwargs)


# ---- Callbacks ----


MOVERS = {
    "SyncRefModelCallback": lambda: SyncRefModelCallback(ref_model=None, accelerator=None),
    "BEMACallback": lambda: BEMACallback(update_ref_model=True),
}


@pytest.mark.parametrize("name", ["apo", "spo", "apo_spo"])
@pytest.mark.parametrize("mover", sorted(MOVERS))
def test_a_callback_that_moves_the_reference_is_refused(make: Any, name: str, mover: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{mover} .*reference"):
        make(name, callbacks=[MOVERS[mover]()])
    trainer = make(name)
    trainer.add_callback(MOVERS[mover]())
    with pytest.raises(ConfigurationError, match=f"{mover} .*reference"):
        trainer.train()


def test_the_class_of_one_is_refused_before_weights_load(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("loaded"))
    for name in ("apo", "spo"):
        with pytest.raises(ConfigurationError, match="SyncRefModelCallback"):
            make(name, callbacks=[SyncRefModelCallback])


def test_an_average_that_leaves_the_reference_alone_is_fine(make: Any) -> None:
    for name in ("apo", "spo"):
        make(name, callbacks=[BEMACallback(update_ref_model=False)])


@pytest.mark.parametrize(
    ("name", "settings"), [("apo", {"num_rounds": 2}), ("spo", {"bilevel_solver": "alternating"})]
)
def test_saving_between_steps_is_refused_as_an_object(make: Any, name: str, settings: dict[str, Any]) -> None:
    trainer = make(name, **settings)
    trainer.add_callback(JITCheckpointCallback())
    with pytest.raises(ConfigurationError, match="JITCheckpointCallback"):
        trainer.train()


def make_spr(base: Path, folder: Path, data: Any = None, collator: Any = None, **settings: Any) -> SPRTrainer:
    data = tiny.make_sft_rows(8).add_column("reward", [float(i) for i in range(8)]) if data is None else data
    arguments = tiny.arguments(folder, num_rounds=2, num_generations=0, reward_temperature=3, **settings)
    return SPRTrainer(
        model=str(base), args=SPRConfig(**arguments), train_dataset=data, processing_class=tiny.make_tokenizer(),
        data_collator=collator,
    )  # fmt: skip


def test_a_collator_that_makes_one_row_of_a_batch_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`data_collator` has `padding_free=True`"):
        make_spr(base, tmp_path, collator=DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with pytest.raises(ConfigurationError, match="`data_collator` made 1 rows of 2"):
        make_spr(base, tmp_path, collator=lambda rows: flat(rows)).train()
