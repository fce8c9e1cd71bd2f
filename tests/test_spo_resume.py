"""Runs with a floor that go on from a checkpoint: to the bit the run that was never interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from tests import tiny
from trl_extras.errors import ConfigurationError


FLOOR = Path("_spo") / "sft_optimum.safetensors"
# Nine micro-batches an epoch in windows of two: five steps, the last one of a single micro-batch. The SFT rows come
# round within an epoch of the pairs.
RUN: dict[str, Any] = {
    "num_train_epochs": 2,
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "sft_batch_size": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "train_sampling_strategy": "random",
}
SOLVERS: dict[str, dict[str, Any]] = {
    "penalty": {"hinge": "batch"},
    "unrolled": {"bilevel_solver": "unrolled", "hypergradient": "central_difference"},
    "alternating": {"bilevel_solver": "alternating", "hinge": "batch", "inner_steps": 2, "inner_learning_rate": 5e-3},
}


def _sft_rows(response: str) -> datasets.Dataset:
    rows = tiny.make_pairs(18).select(range(7))
    return rows.select_columns(["prompt", response]).rename_column(response, "completion")


def _logs(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, without times, and without TRL's count of tokens, which starts anew."""
    dropped = ("num_tokens", "tokens_per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(dropped)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


@pytest.fixture
def make(make_spo: Callable[..., Any]) -> Callable[..., Any]:
    def make(folder: str | Path = "out", **kwargs: Any) -> Any:
        rows = {"data": tiny.make_pairs(18), "sft_dataset": _sft_rows("rejected")}
        return make_spo(folder, **{**rows, **RUN, **kwargs})

    return make


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_resumed_mid_epoch_is_the_uninterrupted_one(
    make: Callable[..., Any], tmp_path: Path, solver: str
) -> None:
    # A floor that is not reached: rows at another place would be seen in the logs.
    settings = {**SOLVERS[solver], "sft_optimum": "2.0"}
    whole = make("whole", **settings)
    whole.train()
    assert all(entry["spo/gap_sft"] > 0 for entry in _logs(whole))
    # In the middle of the first epoch; the run ends in the middle of the second.
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 8
    assert tiny.same_weights(resumed.model, whole.model)
    assert _logs(resumed) == _logs(whole)
    assert len(_logs(resumed)) == 8


def test_other_sft_rows_are_refused(make: Callable[..., Any]) -> None:
    make(max_steps=1, save_steps=1).train()
    other = make(max_steps=2, sft_dataset=_sft_rows("chosen"))
    with pytest.raises(ConfigurationError, match="`sft_dataset` does not hold the rows of the run that is resumed"):
        other.train(resume_from_checkpoint="last")
    # A fresh start may have any.
    other.train()
    assert other.state.global_step == 2


@pytest.mark.parametrize("solver", ["penalty", "alternating"])
def test_the_floor_is_the_first_models_whatever_model_resumes(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], solver: str
) -> None:
    # With a reference of its own: otherwise that would follow the model.
    settings = {**SOLVERS[solver], "max_steps": 4, "save_steps": 2}
    whole = make("whole", ref_model=tiny.make_model(seed=9), **settings)
    whole.train()
    floor = load_file(tmp_path / "whole" / FLOOR)["nll"]
    assert (tmp_path / "whole" / "checkpoint-2" / FLOOR).read_bytes() == (tmp_path / "whole" / FLOOR).read_bytes()

    folder = tmp_path / "out"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", folder / "checkpoint-2")
    resumed = make(folder, model=tiny.make_model(seed=5), ref_model=tiny.make_model(seed=9), **settings)
    # Before it is known that the run goes on, the floor is that of the model at hand.
    assert not torch.equal(resumed._spo_floor.nll, floor)
    capsys.readouterr()
    resumed.train(resume_from_checkpoint="last")
    assert "The floor of the SFT dataset is that of the run's initial model" in capsys.readouterr().out
    assert torch.equal(resumed._spo_floor.nll, floor)
    assert (folder / FLOOR).read_bytes() == (tmp_path / "whole" / FLOOR).read_bytes()
    assert (folder / "checkpoint-4" / FLOOR).read_bytes() == (tmp_path / "whole" / FLOOR).read_bytes()
    assert tiny.same_weights(resumed.model, whole.model)
    assert _logs(resumed) == _logs(whole)


def test_a_half_written_checkpoint_is_left_aside(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make("whole", max_steps=4, save_steps=1)
    whole.train()
    folder = tmp_path / "out"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", folder / "checkpoint-2")
    # As upstream writes it: in place, the weights first and its state last.
    half = folder / "checkpoint-3"
    half.mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint-3" / "model.safetensors", half)
    # And one whose manifest is there but not what it lists.
    damaged = folder / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", damaged)
    (damaged / FLOOR).unlink()

    resumed = make(folder, max_steps=4, save_steps=1)
    resumed.train(resume_from_checkpoint="last")
    said = capsys.readouterr().out
    assert "checkpoint-3 is left aside: it has neither a manifest nor a readable trainer_state.json" in said
    assert "checkpoint-4 is left aside: _spo/sft_optimum.safetensors is missing" in said
    assert tiny.same_weights(resumed.model, whole.model)
    assert _logs(resumed) == _logs(whole)
    # Both are whole now.
    for step in (3, 4):
        manifest = json.loads((folder / f"checkpoint-{step}" / "manifest.json").read_text(encoding="utf-8"))
        assert FLOOR.as_posix() in manifest["files"]


@pytest.mark.parametrize("by", ["train", "config"])
def test_a_stock_trainers_checkpoint_is_refused(base: Path, tmp_path: Path, make_spo: Any, by: str) -> None:
    """Its steps would count as done, and a finished one would end the run at once."""
    stock = DPOTrainer(
        model=str(base), args=DPOConfig(**tiny.arguments(tmp_path / "out", save_strategy="epoch", num_train_epochs=1)),
        train_dataset=tiny.make_pairs(4), processing_class=tiny.make_tokenizer(),
    )  # fmt: skip
    stock.train()
    with pytest.raises(ConfigurationError, match="checkpoint-2 was written by a stock trainer"):
        make_spo(resume_from_checkpoint="last" if by == "config" else None).train(resume_from_checkpoint="last")


def test_last_is_refused_where_every_checkpoint_is_damaged(make_spo: Any, tmp_path: Path) -> None:
    make_spo(save_strategy="steps", save_steps=3).train()
    for step in (3, 6):
        (tmp_path / f"out/checkpoint-{step}/optimizer.pt").write_bytes(b"damage")
    with pytest.raises(ConfigurationError, match=r"is damaged: checkpoint-6 \(optimizer.pt has 6 bytes"):
        make_spo().train(resume_from_checkpoint="last")
