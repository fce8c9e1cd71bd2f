"""
What scripts read of a trainer of TRL's that has trained: the rows of `state.log_history`, what `train`, `evaluate` and
`predict` return, and which callbacks are called in which order. A method of ours leaves all of it where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from trl import SFTTrainer

from tests import tiny
from tests.test_common import METHODS, Method, threes


EPOCHS = 3
# A row of the trainer's own loss is a training row; upstream's other rows say which they are.
TRAIN_ROW = {
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss", "epoch", "step",
}  # fmt: skip


class Events(TrainerCallback):
    """The events of a run, in order, with the keys of what is logged; what our rounds tell trackers is left out."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not any(key.startswith("round/") for key in logs):
            self.seen.append("on_log")

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("on_") or name in ("on_log", "on_init_end"):
            return found
        return lambda *args, **kwargs: self.seen.append(name)


def data_of(method: Method, rows: int) -> Any:
    """Rows whose loss both the method and its stock trainer have."""
    return tiny.make_sft_rows(rows) if method.stock is SFTTrainer else tiny.make_pairs(rows)


def make(name: str, base: Path, folder: Path, rounds: int, **more: Any) -> Any:
    """A trainer of a method that makes as many steps as the stock one: `EPOCHS` epochs of 4 rows."""
    method = METHODS[name]
    given: dict[str, Any] = {key: more.pop(key) for key in ("callbacks", "eval_dataset") if key in more}
    settings = {**method.arguments, **more}
    rows = 4
    if method.rounds:
        settings |= {"num_rounds": rounds, "num_train_epochs": EPOCHS // rounds}
        if "extrapolation_alpha" in settings:
            settings["extrapolation_alpha"] = [0.3]
        rows = 4 * rounds
    else:
        settings["num_train_epochs"] = EPOCHS
    data = data_of(method, rows)
    if name == "SPR":
        # Two rows a round are sampled, and two are the data's.
        settings |= {"num_generations": 2, "prompts_per_round": 1, "offline_ratio": [0.5]}
        given["reward_funcs"] = threes
    return method.trainer(
        model=str(base),
        args=method.config(**tiny.arguments(folder, **settings)),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **({} if name == "SPR" else method.given()),
        **given,
    )


def make_stock(name: str, base: Path, folder: Path, **more: Any) -> Any:
    method = METHODS[name]
    given: dict[str, Any] = {key: more.pop(key) for key in ("callbacks", "eval_dataset") if key in more}
    return method.stock(
        model=str(base),
        args=method.stock_config(**tiny.arguments(folder, num_train_epochs=EPOCHS, **more)),
        train_dataset=data_of(method, 4),
        processing_class=tiny.make_tokenizer(),
        **given,
    )


def keys(row: dict[str, Any]) -> set[str]:
    """Without what SPO adds to upstream's metrics, in upstream's rows."""
    return {key for key in row if "spo/" not in key}


every_method = pytest.mark.parametrize("name", METHODS)
every_length = pytest.mark.parametrize("rounds", [1, EPOCHS])


@every_method
@every_length
def test_the_rows_are_upstreams(base: Path, tmp_path: Path, name: str, rounds: int) -> None:
    """As many, in the same order, with the same keys; the last one is the summary of `train`, which it returns."""
    evaluation = {"eval_dataset": data_of(METHODS[name], 4), "eval_strategy": "epoch"}
    stock, ours = (
        make_stock(name, base, tmp_path / "stock", **evaluation),
        make(name, base, tmp_path / "ours", rounds, **evaluation),
    )
    expected, found = stock.train(), ours.train()
    assert [keys(row) for row in ours.state.log_history] == [keys(row) for row in stock.state.log_history]
    assert ours.state.log_history[-1].keys() == stock.state.log_history[-1].keys() == TRAIN_ROW
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.metrics["train_loss"] == ours.state.log_history[-1]["train_loss"] == found.training_loss
    assert found.global_step == expected.global_step
    # And what is saved with a checkpoint or by `save_state`.
    ours.save_state()
    assert (tmp_path / "ours/trainer_state.json").is_file()


@every_method
@every_length
def test_an_override_of_log_meets_upstreams_rows_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rounds: int
) -> None:
    trainer = make(name, base, tmp_path, rounds)
    losses = []
    stock = type(trainer).log

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" not in logs:
            losses.append(logs["loss"])
        stock(self, logs, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "log", log)
    trainer.train()
    assert len(losses) == trainer.state.global_step


@every_method
@every_length
def test_callbacks_are_called_as_upstream_does(base: Path, tmp_path: Path, name: str, rounds: int) -> None:
    evaluation = {"eval_dataset": data_of(METHODS[name], 4), "eval_strategy": "epoch", "save_strategy": "epoch"}
    expected, found = Events(), Events()
    make_stock(name, base, tmp_path / "stock", callbacks=[expected], **evaluation).train()
    make(name, base, tmp_path / "ours", rounds, callbacks=[found], **evaluation).train()
    assert found.seen == expected.seen


@every_method
@every_length
def test_evaluate_and_predict(base: Path, tmp_path: Path, name: str, rounds: int) -> None:
    rows = data_of(METHODS[name], 6)
    stock, ours = (
        make_stock(name, base, tmp_path / "stock", eval_dataset=rows),
        make(name, base, tmp_path / "ours", rounds, eval_dataset=rows),
    )
    for trainer in (stock, ours):
        trainer.train()
    # SPR's judge has something to say of prompts, too, where it is asked by name.
    expected, found = stock.evaluate(), ours.evaluate()
    assert keys(found) == keys(expected)
    assert ours.state.log_history[-1]["eval_loss"] == found["eval_loss"]
    assert keys(ours.state.log_history[-1]) == keys(stock.state.log_history[-1])
    prefixed = ours.evaluate(metric_key_prefix="test")
    assert prefixed["test_loss"] == found["eval_loss"]
    assert "test_loss" in ours.state.log_history[-1]
    prepared = (stock.eval_dataset, ours.eval_dataset)
    predictions = [trainer.predict(one) for trainer, one in zip((stock, ours), prepared, strict=True)]
    assert keys(predictions[1].metrics) == keys(predictions[0].metrics)
    assert predictions[1].metrics["test_loss"] == pytest.approx(found["eval_loss"])
    stock.predict(stock.eval_dataset)
    assert "eval_loss" not in ours.state.log_history[-1], "predict logs nothing, as upstream"
