"""What is passed as a dataset and is none, streams, or has nothing to learn: the message gives the right reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests import tiny
from tests.test_when_train_begins import make_spr
from trl_extras import APOConfig, APOSPOTrainer, APOTrainer
from trl_extras.errors import ConfigurationError


KINDS = {
    "list": (list, "is a list, but wants a `datasets.Dataset`"),
    "frame": (lambda rows: rows.to_pandas(), "is a DataFrame, but wants a `datasets.Dataset`"),
    "path": (lambda rows: "rows.jsonl", "is a str, but wants a `datasets.Dataset`"),
}


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def make(make_apo: Any, make_spo: Any, base: Path, tmp_path: Path) -> Any:
    """`make("apo", change)`: a trainer on what `change` makes of its rows."""

    def make(name: str, change: Any, **given: Any) -> Any:
        pairs = tiny.make_pairs(6)
        if name == "spr":
            return make_spr(base, tmp_path, change(tiny.make_sft_rows(6).add_column("reward", [1.0] * 6)))
        if name == "prompts":
            return make_apo(data=change(pairs.select_columns(["prompt"])), num_rounds=1, reward_funcs=reward)
        if name == "apo_spo":
            return make_spo(data=change(pairs), cls=APOSPOTrainer, num_rounds=2)
        return {"apo": make_apo, "spo": make_spo}[name](data=change(pairs), **given)

    return make


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dpo_trainer", "sft_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.create_model_from_path", lambda *a, **k: pytest.fail("loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["apo", "prompts", "spo", "apo_spo", "spr"])
def test_what_is_no_dataset(make: Any, name: str) -> None:
    for change, message in KINDS.values():
        with pytest.raises(ConfigurationError, match=f"`train_dataset` {message}"):
            make(name, change)
    with pytest.raises(ConfigurationError, match=r"`train_dataset` holds splits \(train\): pass one of them"):
        make(name, lambda rows: datasets.DatasetDict(train=rows))


def test_no_training_set(base: Path, tmp_path: Path) -> None:
    """With judges it was said to hold pairs."""
    with pytest.raises(ConfigurationError, match="`train_dataset` is missing"):
        APOTrainer(str(base), args=APOConfig(**tiny.arguments(tmp_path)), reward_funcs=reward)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["apo", "spo"])
def test_what_is_no_set_for_evaluation(make: Any, name: str) -> None:
    for change, message in KINDS.values():
        rows = change(tiny.make_pairs(3))
        for given, where in ((rows, ""), ({"test": rows}, " 'test'")):
            with pytest.raises(ConfigurationError, match=f"`eval_dataset`{where} {message}"):
                make(name, lambda rows: rows, eval_dataset=given)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["apo", "prompts", "apo_spo", "spr"])
def test_streams_are_said_to_be(make: Any, name: str) -> None:
    with pytest.raises(ConfigurationError, match="A streaming `train_dataset` does not work"):
        make(name, lambda rows: rows.to_iterable_dataset())
    # Its columns are not known before it is read.
    with pytest.raises(ConfigurationError, match="A streaming `train_dataset` does not work"):
        make(name, lambda rows: datasets.IterableDataset.from_generator(rows.to_list().__iter__))


def test_an_empty_response_is_not_too_long(base: Path, tmp_path: Path, caplog: Any) -> None:
    def row(prompt: str, completion: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
            "reward": 1.0,
        }

    rows = [row("w1", "w2"), row("w1", ""), row("w2", "w3"), row(" ".join(["w4"] * 40), "w5")]
    make_spr(base, tmp_path, datasets.Dataset.from_list(rows[:3]), num_rounds=1)
    assert "1 of 3 responses of `train_dataset` are left out, because their texts are empty." in caplog.text
    make_spr(base, tmp_path, datasets.Dataset.from_list(rows), num_rounds=1)
    assert "2 of 4 responses of `train_dataset` are left out, because their prompts alone fill" in caplog.text
