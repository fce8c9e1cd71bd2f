"""A user's own loss must not take the place of a method's: either its term is in the loss, or the run stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOTrainer, SFTTrainer

from tests import tiny
from tests.test_common import METHODS
from trl_extras import APOSPOTrainer, SPOTrainer, SPRTrainer
from trl_extras.errors import ConfigurationError


class _Replaced:
    """A loss that never asks the parent."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        name = "input_ids" if "input_ids" in inputs else "chosen_input_ids"
        outputs = model(input_ids=inputs[name])
        loss = outputs.logits.float().logsumexp(-1).mean()
        return (loss, outputs) if return_outputs else loss


class _Passed:
    """A loss that is the parent's, twice."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]


def stepping(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
    loss = self.accelerator.unwrap_model(model)(input_ids=inputs["input_ids"]).logits.mean()
    self.accelerator.backward(loss)
    return loss.detach()


def own(kind: type, method: type, way: str) -> type:
    """A user's class over the method, or over TRL's trainer with the method above or below it, as `run` swaps it."""
    stock = SFTTrainer if method is SPRTrainer else DPOTrainer
    users = type("Mine", (kind,) if way == "class" else (kind, stock), {})
    return type("Mine", (kind, method), {}) if way == "class" else type("Swapped", (users, method), {})


def trainer_of(cls: Any, name: str, folder: Path, **settings: Any) -> Any:
    method = METHODS[name]
    return cls(
        model=str(tiny.save_model(folder / "model")),
        args=method.config(**tiny.arguments(folder, **{**method.arguments, **settings})),
        train_dataset=method.data(),
        processing_class=tiny.make_tokenizer(),
        **method.given(),
    )


ALL = pytest.mark.parametrize(
    ("name", "method"), [("SPO", SPOTrainer), ("APO x SPO", APOSPOTrainer), ("SPR", SPRTrainer)]
)


@ALL
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_without_the_methods_term_stops_the_run(
    name: str, method: type, accumulate: int, tmp_path: Path
) -> None:
    trainer = trainer_of(own(_Replaced, method, "class"), name, tmp_path, gradient_accumulation_steps=accumulate)
    with pytest.raises(ConfigurationError, match=r"`_Replaced.compute_loss` leaves out .*super\(\).compute_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


@ALL
def test_a_users_trainer_below_or_above_is_the_same(name: str, method: type, tmp_path: Path) -> None:
    trainer = trainer_of(own(_Replaced, method, "flag"), name, tmp_path)
    with pytest.raises(ConfigurationError, match=r"`_Replaced.compute_loss` leaves out"):
        trainer.train()


@pytest.mark.parametrize(("name", "method"), [("SPO", SPOTrainer), ("SPR", SPRTrainer)])
def test_a_training_step_of_the_users_is_named(name: str, method: type, tmp_path: Path) -> None:
    trainer = trainer_of(type("Mine", (method,), {"training_step": stepping}), name, tmp_path)
    with pytest.raises(ConfigurationError, match=r"`Mine\.training_step` leaves out"):
        trainer.train()


@ALL
def test_a_loss_that_asks_the_parent_trains(name: str, method: type, tmp_path: Path) -> None:
    plain = trainer_of(method, name, tmp_path / "plain", optim="sgd", max_grad_norm=0.0, learning_rate=2e-4)
    twice = trainer_of(
        own(_Passed, method, "class"), name, tmp_path / "twice", optim="sgd", max_grad_norm=0.0, learning_rate=1e-4
    )
    plain.train()
    twice.train()
    for a, b in zip(plain.model.parameters(), twice.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_plain_dpo_takes_any_loss(tmp_path: Path) -> None:
    """With a coefficient of zero there is no term that could be missing."""
    trainer_of(own(_Replaced, SPOTrainer, "class"), "SPO", tmp_path, sft_coef=0.0).train()
