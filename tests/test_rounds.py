"""Rounds: resuming, checkpoints, what is on disk, what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from tests import tiny
from trl_extras import APOConfig, APOTrainer
from trl_extras.errors import ConfigurationError
from trl_extras.rounds import NonFiniteError, RoundDataBuilder, RoundPlan, RoundsConfig, RoundsTrainer, durable
from trl_extras.rounds.data import RoundDataset, group_keys, rows_fingerprint, split_folds


# For monkeypatch.setattr: what is refused is refused before any weights load.
NO_WEIGHTS = ("trl.trainer.dpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("weights loaded"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


# ---- Plan, folds, data: pure ----


def test_plan() -> None:
    plan = RoundPlan((1, 2, 1), 5)
    assert plan.starts == (0, 5, 15, 20)
    assert (plan.total_steps, plan.total_epochs, plan.num_rounds) == (20, 4, 3)
    assert [plan.round_of(s) for s in (0, 4, 5, 14, 15, 19, 20)] == [0, 0, 1, 1, 2, 2, 2]
    assert [plan.round_of_checkpoint(s) for s in (0, 1, 5, 6, 15, 16, 20)] == [0, 0, 0, 1, 1, 2, 2]
    assert [plan.starts_at(s) for s in (0, 3, 5, 10, 15, 20)] == [0, None, 1, None, 2, None]


def test_folds_are_disjoint_equal_ordered_and_drawn_with_the_seed() -> None:
    folds = split_folds(26, 3, seed=1)
    assert [len(fold) for fold in folds] == [8, 8, 8]
    assert len({i for fold in folds for i in fold}) == 24
    assert all(fold == sorted(fold) for fold in folds)
    assert folds == split_folds(26, 3, seed=1)
    assert folds != split_folds(26, 3, seed=2)
    assert folds[0] != list(range(8)), "membership is drawn, not cut"


def test_folds_keep_equal_prompts_together() -> None:
    keys = [f"p{i // 2}" for i in range(40)]
    folds = split_folds(keys, 4, seed=0)
    assert [len(fold) for fold in folds] == [10] * 4
    prompts = [{keys[i] for i in fold} for fold in folds]
    assert all(not a & b for n, a in enumerate(prompts) for b in prompts[:n])
    uneven = split_folds(["a"] * 7 + ["b"] * 2 + ["c", "d"], 2, seed=0)
    assert [len(fold) for fold in uneven] == [4, 4]


def test_folds_need_a_prompt_each() -> None:
    with pytest.raises(ValueError, match="2 distinct prompts, but `num_rounds` is 3"):
        split_folds(["a", "a", "b", "b"], 3, seed=0)


def test_group_keys() -> None:
    assert group_keys(datasets.Dataset.from_dict({"prompt_ids": [[1, 2], [3]]})) == [(1, 2), (3,)]
    sft = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [1, 2, 9], [5, 6]], "completion_mask": [[0, 0, 1], [0, 0, 1], [1, 1]]}
    )
    keys = group_keys(sft)
    assert keys is not None
    assert keys[0] == keys[1] != keys[2]
    assert group_keys(datasets.Dataset.from_dict({"x": [1]})) is None


def test_round_dataset_repeats_short_content_and_swaps() -> None:
    rows = RoundDataset(5)
    rows.swap(datasets.Dataset.from_dict({"x": [0, 1]}))
    assert [rows[i]["x"] for i in range(5)] == [0, 1, 0, 1, 0]
    assert [row["x"] for row in rows.__getitems__([4, 3])] == [0, 1]
    rows.swap(datasets.Dataset.from_dict({"x": [7] * 5}))
    assert rows[4]["x"] == 7
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="1 to 5"):
            rows.swap(datasets.Dataset.from_dict({"x": [0] * wrong}))


def test_rows_fingerprint_sees_content_and_order_only() -> None:
    rows = datasets.Dataset.from_dict({"a": [[1, 2], [3], [4]], "b": ["x", "y", "z"]})
    same = datasets.Dataset.from_dict({"b": ["q", "x", "y", "z"], "a": [[9], [1, 2], [3], [4]]}).select([1, 2, 3])
    assert rows_fingerprint(rows) == rows_fingerprint(same)
    assert rows_fingerprint(rows) != rows_fingerprint(rows.select([1, 0, 2]))
    assert rows_fingerprint(rows) != rows_fingerprint(rows.select([0, 1]))


# ---- Resuming ----


def final(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "extrapolation_alpha": [0.6]}


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "random", "round_epochs": [1, 2, 1]},
        {"precompute_ref_log_probs": True, "eval": True, "gradient_accumulation_steps": 2},
        {"momentum_from": "reference", "optim": "rmsprop", "round_beta": [0.01, 0.1, 1.0]},
    ],
    ids=["shuffled-epochs", "precomputed-accumulated", "reference-rmsprop"],
)
def test_resumed_equals_uninterrupted_at_every_step(make_apo: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    if settings.pop("eval", False):
        settings |= {"eval_dataset": tiny.make_pairs(4, seed=5), "eval_strategy": "epoch"}
    whole = make_apo("whole", **EVERY_STEP, **settings)
    whole.train()
    expected, rows = final(whole), whole.round_summaries
    steps = whole.state.global_step
    # Each resume goes on from a checkpoint that was copied elsewhere, so that it has to stand alone.
    for step in range(1, steps + 1):
        moved = tmp_path / "moved" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", moved)
        resumed = make_apo(f"resumed-{step}", **{**EVERY_STEP, "save_strategy": "no"}, **settings)
        resumed.train(resume_from_checkpoint=str(moved))
        assert same(final(resumed), expected), f"resumed at step {step} of {steps}"
        for key in ("update_norm", "momentum_norm", "update_cosine", "rows", "eval"):
            got = [row.get(key) for row in resumed.round_summaries]
            wanted = [row.get(key) for row in whole.round_summaries]
            if key != "eval":
                assert got == wanted, (step, key)
            # A checkpoint of an epoch's last step is older than that epoch's evaluation, which upstream does not
            # repeat.
            elif step not in [row["last_step"] for row in whole.round_summaries]:
                assert [e and e["loss"] for e in got] == [e and e["loss"] for e in wanted], step
    assert len(rows) == 3


INSTANTS = {
    "inside save_pretrained": ("transformers.PreTrainedModel.save_pretrained", range(0, 12, 2)),
    "before a manifest": ("trl_extras.rounds.durable.write_manifest", range(0, 12, 2)),
    "before a rename": ("trl_extras.rounds.durable.publish", range(0, 12, 2)),
    "before an old folder goes": ("trl_extras.rounds.durable.discard", range(0, 8, 2)),
    "half-way through removing": ("shutil.rmtree", range(0, 30, 6)),
    "before upstream's last file": ("transformers.trainer_callback.TrainerState.save_to_json", range(0, 6, 2)),
    "before the extrapolation": ("trl_extras.rounds.state.FullWeights.extrapolate", range(2)),
    "inside a JSON write": ("trl_extras.rounds.durable.write_json", range(0, 14, 3)),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_anywhere_resumes_to_the_same_bits(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    """
    With `save_total_limit=1`: whatever the run was doing, the newest whole checkpoint is the newest that was finished,
    and going on from it ends in the same weights. (SIGKILL itself is what tests/kill_campaign.py sends.)
    """
    settings = {**EVERY_STEP, "save_steps": 2, "save_total_limit": 1, "num_rounds": 2}
    whole = make_apo("whole", **settings)
    whole.train()
    expected = final(whole)
    target, counts = INSTANTS[instant]
    fired = 0
    for count in counts:
        folder = f"killed-{count}"
        calls = 0
        original = _resolve(target)

        def killer(*args: Any, _count: int = count, _original: Any = original, **kwargs: Any) -> Any:
            nonlocal calls, fired
            calls += 1
            if calls == _count + 1:
                fired += 1
                raise Killed
            return _original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, killer)
            first = make_apo(folder, **settings)
            with contextlib.suppress(Killed):
                first.train()
            reached = first.state.global_step
        last = get_last_checkpoint(str(tmp_path / folder)) if (tmp_path / folder).is_dir() else None
        if last is not None:
            durable.verify(Path(last))
        # At an even step it may be that very step's checkpoint that was being written.
        saved = reached // 2 * 2 - (2 if reached % 2 == 0 else 0)
        assert (0 if last is None else int(last.rsplit("-", 1)[1])) >= saved, "a finished checkpoint was lost"
        second = make_apo(folder, **settings)
        second.train(resume_from_checkpoint="True")
        assert same(final(second), expected), (instant, count)
        left = [
            p.name for p in (tmp_path / folder).rglob("_*") if p.name.startswith(("_partial", "_trash", "_staging"))
        ]
        assert not left
    assert fired, "the run never came there"


def _resolve(target: str) -> Any:
    parts = target.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found: Any = __import__(".".join(parts[:n]), fromlist=["_"])
        except ImportError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise AssertionError(target)


def test_a_finished_run_goes_on_with_more_rounds(make_apo: Any) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "round_data": "reuse", "extrapolation_alpha": [0.3]}
    whole = make_apo("whole", **settings, num_rounds=3)
    whole.train()
    for first in (1, 2):
        short = make_apo(f"short-{first}", **settings, num_rounds=first)
        short.train()
        longer = make_apo(f"short-{first}", **settings, num_rounds=3)
        longer.train(resume_from_checkpoint="last")
        assert same(final(longer), final(whole)), first
        rates = [e["learning_rate"] for e in longer.state.log_history if "loss" in e]
        assert rates == [e["learning_rate"] for e in whole.state.log_history if "loss" in e]
        assert rates[12 * first] == pytest.approx(1e-2), "the old plan's last rate is not the next round's first"
        assert [row["round"] for row in longer.round_summaries] == [0, 1, 2]


def test_more_rounds_than_folds_use_the_folds_again(make_apo: Any, capsys: Any) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "extrapolation_alpha": [0.3]}
    short = make_apo(num_rounds=2, **settings)
    short.train()
    longer = make_apo(num_rounds=3, **settings)
    longer.train(resume_from_checkpoint=True)
    assert "The run began with 2 folds" in capsys.readouterr().out
    assert [row["rows"] for row in longer.round_summaries] == [12, 12, 12]
    assert longer._folds == short._folds


def test_only_rounds_to_come_can_change(make_apo: Any) -> None:
    settings = {**EVERY_STEP, "save_steps": 4}
    settings["extrapolation_alpha"] = [0.3, 0.3, 0.3]
    make_apo(**settings).train()
    checkpoint = "checkpoint-8"

    def resume(**changes: Any) -> Any:
        trainer = make_apo(**{**settings, **changes})
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/{checkpoint}")
        return trainer

    resume(extrapolation_alpha=[0.3, 0.9, 0.9], round_epochs=[1, 1, 2], round_beta=[0.1, 0.1, 1.0])
    for changes, message in (
        ({"extrapolation_alpha": [0.6, 0.3, 0.3]}, "`alpha_before` of round 2 is 0.6, but checkpoint-8"),
        ({"round_beta": [0.1, 0.2, 0.1]}, "`beta` of round 2 is 0.2"),
        ({"round_epochs": [2, 1, 1]}, "`epochs` of round 1 is 2"),
        ({"num_rounds": 1, "extrapolation_alpha": [0.3]}, "`num_rounds` is 1, but checkpoint-8 is in round 2"),
    ):
        with pytest.raises(ValueError, match=message):
            resume(**changes)


@pytest.mark.parametrize("value", [True, "true", "True", "last"])
def test_resume_skips_half_written_folders(make_apo: Any, tmp_path: Path, value: Any, capsys: Any) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "num_rounds": 2}
    whole = make_apo(**settings)
    whole.train()
    newest = tmp_path / "out/checkpoint-12"
    assert get_last_checkpoint(str(tmp_path / "out")) == str(newest)
    (newest / durable.MANIFEST).unlink()
    (newest / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "out/checkpoint-99").mkdir()
    (tmp_path / "out/checkpoint-99/model.safetensors").write_bytes(b"half")
    with (tmp_path / "out/checkpoint-8/optimizer.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    resumed = make_apo(**settings)
    resumed.train(resume_from_checkpoint=value)
    told = capsys.readouterr().out
    assert "checkpoint-99 is left aside" in told
    assert "checkpoint-8 is left aside: optimizer.pt has another checksum" in told
    assert same(final(resumed), final(whole))


@pytest.mark.parametrize("rows", [0, 3, 6])
def test_resumed_with_another_eval_set_trains_the_same(make_apo: Any, tmp_path: Path, rows: int) -> None:
    """Its reference is theta_t, not the policy inside the round; what was computed for the training rows stays."""
    settings = {**EVERY_STEP, "precompute_ref_log_probs": True, "lr_scheduler_type": "constant"}
    whole = make_apo(**settings, eval_dataset=tiny.make_pairs(4, seed=5), eval_strategy="epoch")
    whole.train()
    other = {"eval_dataset": tiny.make_pairs(rows, seed=6), "eval_strategy": "epoch"} if rows else {}
    resumed = make_apo(**settings, **other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-6"))
    assert same(final(resumed), final(whole))
    for step in range(7, 13):
        durable.verify(tmp_path / f"out/checkpoint-{step}")
    if rows:
        # The same evaluation with the reference model itself.
        plain = make_apo("plain", **{**settings, "precompute_ref_log_probs": False}, **other)
        plain.train()
        got = [e["eval_loss"] for e in resumed.state.log_history if "eval_loss" in e][-2:]
        assert got == pytest.approx(
            [e["eval_loss"] for e in plain.state.log_history if "eval_loss" in e][-2:], abs=1e-6
        )


def test_reference_log_probs_belong_to_their_rows(make_apo: Any) -> None:
    """A fresh start in the same folder with other rows, of the same number, finds nothing to reuse."""
    settings = {"num_rounds": 2, "precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 1}
    warm = {**settings, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = True
            return control

    make_apo(**warm, eval_dataset=tiny.make_pairs(4, seed=5), callbacks=[Stop()]).train()
    again = make_apo(
        **warm, eval_dataset=tiny.make_pairs(4, seed=9), data=tiny.make_pairs(24, seed=11), callbacks=[Stop()]
    )
    again.train()
    assert again.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    losses = [e["eval_loss"] for e in again.state.log_history if "eval_loss" in e]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    built = make_apo(**warm, eval_dataset=tiny.make_pairs(4, seed=9), callbacks=[Stop()])
    calls = []
    built.round_data_builder = lambda round_index, policy, seed: (
        calls.append(round_index), tiny.make_pairs(12, seed=21))[1]  # fmt: skip
    built.train()
    assert built.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # A builder that was mended is asked again when a run begins anew.
    mended = make_apo(**warm, eval_dataset=tiny.make_pairs(4, seed=9), callbacks=[Stop()])
    mended.round_data_builder = built.round_data_builder
    mended.train()
    assert calls == [0, 0]


def test_one_round_has_its_beta_and_epochs_resumed_or_not(make_apo: Any, tmp_path: Path) -> None:
    settings = {"num_rounds": 1, "round_beta": [1.0], "save_strategy": "steps", "save_steps": 4}
    whole = make_apo(**settings)
    assert whole.beta == 1.0
    whole.train()
    resumed = make_apo("again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert resumed.beta == 1.0
    assert same(final(resumed), final(whole))
    parents = make_apo("parents", num_rounds=1, sync_ref_model=True, round_beta=[1.0], round_epochs=[2])
    parents.train()
    assert parents.beta == 1.0
    assert parents.state.global_step == 24


def test_the_last_checkpoint_survives_the_end_of_training(make_apo: Any, tmp_path: Path) -> None:
    settings = {"num_rounds": 2, "save_total_limit": 1, "save_strategy": "epoch", "eval_strategy": "epoch"}
    settings |= {"metric_for_best_model": "loss", "eval_dataset": tiny.make_pairs(4, seed=5), "learning_rate": 0.5}
    make_apo(**settings).train()
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-12"]


def test_manifests_hold_no_secret_and_no_path(make_apo: Any, base: Path, tmp_path: Path) -> None:
    kwargs = {"token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "dtype": "float32"}
    trainer = make_apo(num_rounds=2, save_strategy="steps", save_steps=6, model_init_kwargs=kwargs)
    trainer.train()
    out = tmp_path / "out"
    manifests = [*out.rglob("manifest.json"), out / "_rounds/run.json", out / "rounds.jsonl"]
    assert len(manifests) > 5
    for path in manifests:
        for private in ("hf_secret", str(tmp_path), str(base)):
            assert private not in path.read_text(), (path, private)


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_plugin_of_accelerate_launch_is_refused(make_apo: Any, monkeypatch: pytest.MonkeyPatch, plugin: str) -> None:
    trainer = make_apo("fine", num_rounds=1)
    config = trainer.args
    config.num_rounds = 2
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    monkeypatch.setattr(*NO_WEIGHTS)
    with pytest.raises(ValueError, match="does not work with more than one round"):
        type(trainer)(model="nowhere", args=config, train_dataset=tiny.make_pairs(24))


def test_fsdp2_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**settings: Any) -> list[str]:
        return [what for what, _ in RoundsTrainer._unsupported_shards(SimpleNamespace(deepspeed=None, **settings))]

    assert found(fsdp_plugin_args={"fsdp_version": 2}) == []
    assert found(fsdp_plugin_args={"fsdp_version": 1}) == ["FSDP1"]
    assert found(fsdp_plugin_args=None) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert found(fsdp_plugin_args=None) == ["FSDP1"]
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert found(fsdp_plugin_args=None) == []


def test_a_bad_checkpoint_in_the_configuration_is_refused_before_weights_load(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**EVERY_STEP, "save_steps": 6, "num_rounds": 2}
    make_apo(**settings).train()
    monkeypatch.setattr(*NO_WEIGHTS)
    (tmp_path / "out/checkpoint-12/model.safetensors").write_bytes(b"x")
    for changes, message in (
        ({"resume_from_checkpoint": str(tmp_path / "out/checkpoint-12")}, "not a whole checkpoint"),
        ({"resume_from_checkpoint": str(tmp_path / "out/checkpoint-6"), "beta": 0.7}, r"`beta` of round 1 is 0\.7"),
        ({"resume_from_checkpoint": "last", "save_only_model": True}, "leaves nothing to resume from"),
    ):
        with pytest.raises(ValueError, match=message):
            make_apo(**{**settings, **changes})


def test_a_given_reference_model_is_left_alone(make_apo: Any) -> None:
    reference = tiny.make_model(seed=9)
    before = {name: p.clone() for name, p in reference.state_dict().items()}
    trainer = make_apo(ref_model=reference, num_rounds=2)
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in reference.state_dict().items())
    with pytest.raises(ValueError, match="`ref_model` has served its round"):
        trainer.train()


def test_a_training_set_put_in_place_later_is_used(make_apo: Any) -> None:
    trainer = make_apo(num_rounds=2)
    trainer.train_dataset = trainer.train_dataset.select(range(8))
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_single_prompt_is_refused_before_weights_load(make_apo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*NO_WEIGHTS)
    rows = [{"prompt": "w1 ", "chosen": f"w{i}", "rejected": f"w{i + 1}"} for i in range(9)]
    with pytest.raises(ValueError, match="1 distinct prompts, but `num_rounds` is 3"):
        make_apo(data=datasets.Dataset.from_list(rows))


class WithKeyword(APOTrainer):
    def __init__(self, *args: Any, extra: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.extra = extra


def test_a_subclass_may_have_keywords_of_its_own(base: Path, tmp_path: Path) -> None:
    config = APOConfig(**tiny.arguments(tmp_path))
    trainer = WithKeyword(
        str(base), args=config, train_dataset=tiny.make_pairs(6), processing_class=tiny.make_tokenizer(), extra=3
    )
    assert trainer.extra == 3
    with pytest.raises(TypeError, match="each once"):
        APOTrainer(str(base), model=str(base), args=config, train_dataset=tiny.make_pairs(6))


def test_a_replaced_checkpoint_is_brought_back(make_apo: Any, tmp_path: Path) -> None:
    """Killed between the two renames: the old folder is all there is."""
    settings = {**EVERY_STEP, "save_steps": 6, "num_rounds": 2, "save_total_limit": 1}
    whole = make_apo(**settings)
    whole.train()
    (tmp_path / "out/checkpoint-12").rename(tmp_path / "out/_trash-checkpoint-12")
    again = make_apo(**settings)
    again.train(resume_from_checkpoint="last")
    assert same(final(again), final(whole))
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-12"]


def test_a_limit_is_kept_after_a_kill_between_checkpoint_and_rotation(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**EVERY_STEP, "save_steps": 6, "num_rounds": 2, "save_total_limit": 1}
    with monkeypatch.context() as patch:
        patch.setattr("trl_extras.rounds.checkpoints.rotate", lambda *args: None)
        make_apo(**settings).train()
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2
    make_apo(**settings).train(resume_from_checkpoint="last")
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-12"]


@pytest.mark.parametrize("rounds", [1, 2])
def test_resume_without_any_checkpoint_starts_from_the_beginning(make_apo: Any, rounds: int, capsys: Any) -> None:
    trainer = make_apo(num_rounds=rounds)
    trainer.train(resume_from_checkpoint="True")
    assert "no whole checkpoint" in capsys.readouterr().out
    assert trainer.state.global_step == 12


def test_explicit_checkpoints_that_cannot_be_resumed_are_refused(make_apo: Any, tmp_path: Path) -> None:
    settings = {**EVERY_STEP, "save_steps": 6, "num_rounds": 2}
    make_apo(**settings).train()
    good = tmp_path / "out/checkpoint-6"
    for name, damage in (
        ("gone", lambda d: shutil.rmtree(d)),
        ("cut", lambda d: (d / "model.safetensors").write_bytes(b"x")),
        ("without", lambda d: (d / "optimizer.pt").unlink()),
        ("changed", lambda d: (d / "scheduler.pt").write_bytes(b"y" * (d / "scheduler.pt").stat().st_size)),
        ("round", lambda d: shutil.rmtree(d / "_rounds")),
    ):
        copy = tmp_path / name / "checkpoint-6"
        shutil.copytree(good, copy)
        damage(copy)
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            make_apo("elsewhere", **settings).train(resume_from_checkpoint=str(copy))
    weights_only = make_apo("weights", **settings, save_only_model=True)
    weights_only.train()
    with pytest.raises(ValueError, match="save_only_model"):
        make_apo("weights", **settings).train(resume_from_checkpoint="last")


def test_another_runs_rounds_are_refused_before_weights_load(make_apo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_apo(num_rounds=2, **{**EVERY_STEP, "extrapolation_alpha": [0.3]}).train()
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("weights loaded")
    )
    with pytest.raises(ValueError, match=r"`learning_rate` is 0\.02, but the run whose rounds `output_dir` holds"):
        make_apo(num_rounds=2, learning_rate=2e-2)


def test_same_configuration_begins_anew_and_reuses_reference_log_probs(
    make_apo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_rounds": 2, "precompute_ref_log_probs": True, "extrapolation_alpha": [0.6]}
    first = make_apo(**settings)
    first.train()
    # The last round's folder is what a finished run leaves; its first round is computed again.
    second = make_apo(**settings)
    computed = []
    original = type(second)._reference_logps

    def counting(self: Any, dataset: Any, name: str) -> Any:
        computed.append((self._round, name))
        return original(self, dataset, name)

    monkeypatch.setattr(type(second), "_reference_logps", counting)
    second.train()
    assert computed == [(0, "train")]
    assert same(final(first), final(second))


def test_new_runs_ignore_an_earlier_runs_checkpoints(make_apo: Any, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "num_rounds": 2}
    make_apo(**settings).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 5
            return control

    again = make_apo(model=tiny.make_model(seed=3), **settings, callbacks=[Stop()])
    again.train()
    assert "Stopped at step 5 of 12" in capsys.readouterr().out
    assert "`output_dir` holds checkpoint-4, checkpoint-8, checkpoint-12 of an earlier run" in caplog.text
    resumed = make_apo(model=tiny.make_model(seed=3), **settings)
    resumed.train(resume_from_checkpoint="last")
    assert "checkpoint-12 is left aside: an earlier run" in capsys.readouterr().out
    whole = make_apo("whole", model=tiny.make_model(seed=3), **settings)
    whole.train()
    assert same(final(resumed), final(whole))


def test_other_rows_are_refused_when_a_run_goes_on(make_apo: Any, tmp_path: Path) -> None:
    settings = {**EVERY_STEP, "save_steps": 2, "num_rounds": 2}
    make_apo(**settings).train()
    other = make_apo(**settings, data=tiny.make_pairs(24, seed=77))
    with pytest.raises(ValueError, match="`train_dataset` does not give the rows"):
        other.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))


def test_training_twice_on_one_trainer_starts_a_new_run(make_apo: Any) -> None:
    trainer = make_apo(num_rounds=2)
    trainer.train()
    between = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    model = tiny.make_model()
    model.load_state_dict(between)
    expected = make_apo("other", model=model, num_rounds=2)
    expected.train()
    assert same(final(trainer), final(expected))


# ---- Checkpoints with one round ----


def test_best_model_and_rotation_with_one_round(make_apo: Any, tmp_path: Path) -> None:
    trainer = make_apo(
        num_rounds=1, num_train_epochs=4, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", save_total_limit=2, learning_rate=5e-2, eval_dataset=tiny.make_pairs(6, seed=8),
    )  # fmt: skip
    trainer.train()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"out/checkpoint-{best}")
    left = {p.name for p in (tmp_path / "out").glob("checkpoint-*")}
    assert left == {f"checkpoint-{best}", "checkpoint-48"} or (best == 48 and len(left) == 2)
    state = json.loads((tmp_path / "out/checkpoint-48/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"out/checkpoint-{best}")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"out/checkpoint-{best}", dtype=torch.float32)
    assert tiny.same_weights(trainer.model, kept)


def test_one_round_goes_on_from_a_stock_checkpoint(make_apo: Any, base: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    settings = {"save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": "sequential"}
    stock = DPOTrainer(
        model=str(base),
        args=DPOConfig(**tiny.arguments(tmp_path / "stock", num_train_epochs=1, **settings)),
        train_dataset=tiny.make_pairs(24),
        processing_class=tiny.make_tokenizer(),
    )
    stock.train()
    ours = make_apo(num_rounds=1, **settings)
    ours.train(resume_from_checkpoint=str(tmp_path / "stock/checkpoint-4"))
    assert tiny.same_weights(ours.model, stock.model)
    durable.verify(tmp_path / "out/checkpoint-12")
    with pytest.raises(ValueError, match="holds no rounds"):
        make_apo("more", num_rounds=2, **settings).train(resume_from_checkpoint=str(tmp_path / "stock/checkpoint-4"))


def test_save_total_limit_never_leaves_a_moment_without_a_checkpoint(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = shutil.rmtree

    def watching(path: Any, *args: Any, **kwargs: Any) -> None:
        last = get_last_checkpoint(str(tmp_path / "out")) if (tmp_path / "out").is_dir() else None
        if seen or last:
            assert last is not None
            durable.verify(Path(last))
            seen.append(last)
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watching)
    make_apo(**{**EVERY_STEP, "save_total_limit": 1}).train()
    assert len(set(seen)) > 5
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-12"]


def test_a_push_reads_the_checkpoint_under_its_final_name(make_apo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", lambda self, folder: pushed.append(folder))
    trainer = make_apo(num_rounds=1, save_strategy="steps", save_steps=6)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [f"{trainer.args.output_dir}/checkpoint-6", f"{trainer.args.output_dir}/checkpoint-12"]
    assert all(Path(folder).is_dir() for folder in pushed)


# ---- What is on disk ----


def test_kept_iterates_load_with_plain_transformers(make_apo: Any, tmp_path: Path) -> None:
    trainer = make_apo(keep_iterates=True, num_rounds=2)
    trainer.train()
    for number in (1, 2):
        folder = tmp_path / f"out/_rounds/iterates/{number}"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
    assert tiny.same_weights(model, trainer.model)


def test_disk_use_is_said_at_the_start(
    make_apo: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    make_apo("plenty", num_rounds=2).train()
    assert "disk: at most" in capsys.readouterr().out
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        make_apo("scarce", num_rounds=2).train()
    assert "This may not be enough" in caplog.text


@pytest.mark.parametrize("where", ["save_pretrained", "write_manifest"])
def test_a_full_disk_leaves_the_last_state_and_says_so(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "num_rounds": 2, "precompute_ref_log_probs": True}
    whole = make_apo("whole", **settings)
    whole.train()
    trainer = make_apo(**settings)
    target = {"save_pretrained": "transformers.PreTrainedModel.save_pretrained"}.get(
        where, "trl_extras.rounds.durable.write_manifest"
    )
    original = _resolve(target)

    def full(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(RuntimeError, match=r"Round 2, step 6: .*No space left on device.*GB are free"):
            trainer.train()
    assert {p.name for p in (tmp_path / "out/_rounds").glob("round-*")} == {"round-0000"}
    assert not list((tmp_path / "out/_rounds").glob("_partial*"))
    resumed = make_apo(**settings)
    resumed.train(resume_from_checkpoint="last")
    assert same(final(resumed), final(whole))


def test_non_finite_loss_stops_naming_round_and_step(make_apo: Any, tmp_path: Path) -> None:
    trainer = make_apo(num_rounds=2, **{**EVERY_STEP, "extrapolation_alpha": [0.3]})
    original = trainer.compute_loss

    def breaking(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        return loss * math.nan if trainer.state.global_step == 7 else loss

    trainer.compute_loss = breaking
    with pytest.raises(NonFiniteError, match="Round 2, step 8: the loss is nan"):
        trainer.train()
    last = Path(get_last_checkpoint(str(tmp_path / "out")))
    assert last.name == "checkpoint-7"
    durable.verify(last)


def test_non_finite_weights_are_never_saved(make_apo: Any, tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 6:
                with torch.no_grad():
                    model.model.norm.weight[0] = math.inf

    settings = {**EVERY_STEP, "save_steps": 3, "num_rounds": 2, "save_total_limit": 1}
    with pytest.raises(NonFiniteError, match=r"Round 1, step 6: model\.norm\.weight holds a nan or an infinity"):
        make_apo(**settings, callbacks=[Break()]).train()
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


# ---- A data builder ----


def test_data_builder_gets_round_policy_and_seed_and_survives_resume(make_apo: Any, tmp_path: Path) -> None:
    settings = {**EVERY_STEP, "save_steps": 1, "num_rounds": 2, "precompute_ref_log_probs": True}
    calls: list[tuple[int, float, int]] = []

    class Builder:
        def __call__(self, round_index: int, policy: torch.nn.Module, seed: int) -> datasets.Dataset:
            assert not policy.training
            calls.append((round_index, policy.lm_head.weight.sum().item(), seed))
            # Depends on the policy and on global random numbers, as sampling does.
            return tiny.make_pairs(12 - 3 * round_index, seed=int(torch.randint(100, ()).item()) + round_index)

    assert isinstance(Builder(), RoundDataBuilder)

    def run(folder: str, resume: Any = None) -> Any:
        trainer = make_apo(folder, **settings)
        trainer.round_data_builder = Builder()
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    assert [c[0] for c in calls] == [0, 1]
    assert calls[0][1] != calls[1][1]
    assert [row["rows"] for row in whole.round_summaries] == [12, 9]
    assert whole.state.global_step == 12
    for step in (3, 6, 8):
        calls.clear()
        resumed = run(f"resumed-{step}", str(tmp_path / f"whole/checkpoint-{step}"))
        assert same(final(resumed), final(whole)), step
        assert [c[0] for c in calls] == ([1] if step <= 6 else []), "a round's rows are built once"


def test_data_builder_needs_more_than_one_round(make_apo: Any) -> None:
    trainer = make_apo(num_rounds=1)
    trainer.round_data_builder = lambda round_index, policy, seed: tiny.make_pairs(4)
    with pytest.raises(ValueError, match="`round_data_builder` is set, but `num_rounds` is 1"):
        trainer.train()


def test_last_is_refused_where_every_checkpoint_of_the_run_is_damaged(make_apo: Any, tmp_path: Path) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "num_rounds": 2}
    make_apo(**settings).train()
    for step in (4, 8, 12):
        (tmp_path / f"out/checkpoint-{step}/optimizer.pt").write_bytes(b"damage")
    (tmp_path / "out/checkpoint-12" / durable.MANIFEST).write_text("{")
    with pytest.raises(ConfigurationError, match=r"is damaged: checkpoint-12 \(.* checkpoint-8 \(.* checkpoint-4 \("):
        make_apo(**settings).train(resume_from_checkpoint="last")
    # Those of an earlier run do not count, damaged or not.
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"out/checkpoint-{step}")
    durable.write_json(tmp_path / "out/_rounds/run.json", {**_read_run(tmp_path), "run_id": "another"})
    trainer = make_apo(**settings)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 12


def _read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/_rounds/run.json").read_text(encoding="utf-8"))


def test_a_fresh_start_sets_kept_iterates_aside(make_apo: Any, tmp_path: Path, capsys: Any) -> None:
    for _ in range(3):
        make_apo(num_rounds=2, keep_iterates=True).train()
    assert "are now in _rounds/replaced-iterates-2." in capsys.readouterr().out
    rounds = tmp_path / "out/_rounds"
    for name in ("iterates", "replaced-iterates-1", "replaced-iterates-2"):
        assert {path.name for path in (rounds / name).iterdir() if path.is_dir()} == {"1", "2"}
    assert len((rounds / "replaced-iterates-1/rounds.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_kept_iterates_are_this_runs_and_survive_a_kill_before_they_are_linked(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**EVERY_STEP, "save_steps": 4, "keep_iterates": True, "learning_rate": 1e-2}
    make_apo(**settings).train()
    kept = tmp_path / "out/_rounds/iterates"
    assert {p.name for p in kept.iterdir()} == {"1", "2", "3"}
    trainer = make_apo(**{**settings, "num_rounds": 2})

    def killer(folder: Any) -> None:
        raise Killed

    monkeypatch.setattr(trainer, "_link_iterate", killer)
    with pytest.raises(Killed):
        trainer.train()
    assert not kept.exists(), "an earlier run's iterates would pass for this run's"
    make_apo(**{**settings, "num_rounds": 2}).train(resume_from_checkpoint="last")
    assert {p.name for p in kept.iterdir()} == {"1", "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [(13, "returned 13 rows, but every round has 12"), (0, "no rows"), (None, "NoneType")],
)
def test_data_builder_mistakes_are_named(make_apo: Any, rows: int | None, message: str) -> None:
    trainer = make_apo(num_rounds=2)
    trainer.round_data_builder = lambda round_index, policy, seed: (
        None if rows is None else tiny.make_pairs(max(rows, 1)).select(range(rows))
    )
    with pytest.raises(ValueError, match=f"Round 1: .*{message}"):
        trainer.train()


# ---- Another method: rounds over SFTTrainer ----


@dataclass
class RoundsSFTConfig(RoundsConfig, SFTConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_rounds()


class RoundsSFT(RoundsTrainer, SFTTrainer):
    config_class = RoundsSFTConfig


def test_rounds_work_over_sft(base: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(
        {"prompt": [f"w{i} " for i in range(24)], "completion": [f"w{i + 1} w{i + 2}" for i in range(24)]}
    )

    def run(config: Any, trainer_class: Any, model: Any, rows: Any, resume: Any = None) -> Any:
        trainer = trainer_class(model=model, args=config, train_dataset=rows, processing_class=tiny.make_tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    common = {"train_sampling_strategy": "sequential"}
    stepwise = tiny.arguments(tmp_path / "rounds", num_rounds=2, save_strategy="steps", save_steps=1, **common)
    ours = run(RoundsSFTConfig(**stepwise), RoundsSFT, str(base), data)
    model: Any = str(base)
    for t, fold in enumerate(split_folds(24, 2, seed=42)):
        config = SFTConfig(**tiny.arguments(tmp_path / f"sft-{t}", num_train_epochs=1, **common))
        model = run(config, SFTTrainer, model, data.select(fold)).model
    assert tiny.same_weights(ours.model, model)
    elsewhere = RoundsSFTConfig(**tiny.arguments(tmp_path / "resumed", num_rounds=2, **common))
    resumed = run(elsewhere, RoundsSFT, str(base), data, str(tmp_path / "rounds/checkpoint-8"))
    assert tiny.same_weights(resumed.model, model)
    config = RoundsSFTConfig(**tiny.arguments(tmp_path / "built", num_rounds=2, **common))
    built = RoundsSFT(model=str(base), args=config, train_dataset=data, processing_class=tiny.make_tokenizer())
    folds = split_folds(24, 2, seed=42)
    built.round_data_builder = lambda round_index, policy, seed: data.select(folds[round_index])
    built.train()
    assert tiny.same_weights(built.model, model)


def test_what_a_builder_raises_is_its_own(make_apo: Any) -> None:
    trainer = make_apo(num_rounds=2)

    def builder(round_index: int, policy: Any, seed: int) -> Any:
        raise FileNotFoundError("pairs-1.jsonl")

    trainer.round_data_builder = builder
    with pytest.raises(FileNotFoundError, match=r"pairs-1\.jsonl"):
        trainer.train()


# ---- Bad input, before weights load ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "`num_rounds` is 0"),
        ({"num_rounds": 2.5}, r"`num_rounds` is 2\.5"),
        ({"extrapolation_alpha": [math.nan]}, "`extrapolation_alpha` is"),
        ({"extrapolation_alpha": [math.inf]}, "`extrapolation_alpha` is"),
        ({"extrapolation_alpha": -0.1}, r"`extrapolation_alpha` is -0\.1"),
        ({"extrapolation_alpha": [True]}, "`extrapolation_alpha` is"),
        ({"extrapolation_alpha": "lots"}, "`extrapolation_alpha` is 'lots'"),
        ({"extrapolation_alpha": [0.1, 0.2]}, "`extrapolation_alpha` has 2 values, but `num_rounds` is 3"),
        ({"extrapolation_alpha": None}, "`extrapolation_alpha` is None"),
        ({"extrapolation_alpha": []}, "`extrapolation_alpha` has 0 values"),
        ({"round_beta": [0.1, 0.1]}, "`round_beta` has 2 values"),
        ({"round_beta": [0.1, 0.0, 0.1]}, "`round_beta` is"),
        ({"round_epochs": [1, 1]}, "`round_epochs` has 2 values"),
        ({"round_epochs": [1, 0, 1]}, "`round_epochs` is"),
        ({"round_epochs": [1, 1.5, 1]}, "`round_epochs` is"),
        ({"round_data": "halves"}, "`round_data` is 'halves'"),
        ({"momentum_from": "nowhere"}, "`momentum_from` is 'nowhere'"),
        ({"output_policy": "both"}, "`output_policy` is 'both'"),
        ({"num_train_epochs": 1.5}, r"`num_train_epochs` is 1\.5"),
        ({"sync_ref_model": True}, "`sync_ref_model=True` does not work with more than one round"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "`load_best_model_at_end=True` does not work",
        ),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True`"),
        ({"enable_jit_checkpoint": True}, "`enable_jit_checkpoint=True`"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "`lr_scheduler_type="),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "`lr_scheduler_type="),
        ({"optim": "schedule_free_adamw"}, "`optim='schedule_free_adamw'`"),
        ({"optim": "lomo"}, "`optim='lomo'`"),
        ({"optim": "galore_adamw_layerwise"}, "`optim="),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "`dataloader_persistent_workers=True`"),
        ({"ignore_data_skip": True}, "`ignore_data_skip=True`"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy='group_by_length'`"),
        ({"train_sampling_strategy": "batch_rebalance"}, "`train_sampling_strategy='batch_rebalance'`"),
    ],
)
def test_config_refuses(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        APOConfig(**tiny.arguments(tmp_path, **settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"sync_ref_model": True}, {"num_train_epochs": 0.5}, {"auto_find_batch_size": True}, {"optim": "lomo"}],
)
def test_one_round_takes_what_the_parent_takes(tmp_path: Path, settings: dict[str, Any]) -> None:
    APOConfig(**tiny.arguments(tmp_path, num_rounds=1, **settings))


def test_config_reads_text_and_bare_numbers(tmp_path: Path) -> None:
    config = APOConfig(
        **tiny.arguments(tmp_path, extrapolation_alpha=0.4, round_beta=["1e-2", "1e-1", 1], round_epochs=["1", 2, 3.0])
    )
    assert config.extrapolation_alpha == [0.4]
    assert config.round_beta == [0.01, 0.1, 1.0]
    assert config.round_epochs == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"data": tiny.make_pairs(2)}, "`train_dataset` has 2 rows, but `num_rounds` is 3"),
        (lambda: {"max_steps": 13}, "`max_steps` is 13, but the rounds take 12 steps"),
        (lambda: {"callbacks": [EarlyStoppingCallback()]}, "EarlyStoppingCallback does not work"),
        (lambda: {"data": tiny.make_pairs(9).to_iterable_dataset()}, "A streaming `train_dataset` does not work"),
        (lambda: {"optimizers": (None, object())}, "A scheduler object in `optimizers` does not work"),
        (lambda: {"peft_config": object()}, "A PEFT adapter of type object does not work"),
        (lambda: {"num_rounds": 1, "peft_config": object(), "keep_iterates": True}, "`keep_iterates=True` needs"),
        (
            lambda: {"num_rounds": 1, "sync_ref_model": True, "output_policy": "extrapolated"},
            "`output_policy='extrapolated'` needs the rounds' state, which is not kept with `sync_ref_model=True`",
        ),
        (lambda: {"parallelism_config": SimpleNamespace(to_json=dict)}, "`parallelism_config` does not work"),
    ],
)
def test_trainer_refuses_before_weights_load(
    make_apo: Any, monkeypatch: pytest.MonkeyPatch, make: Any, message: str
) -> None:
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("weights loaded")
    )
    settings = make()
    parallelism = settings.pop("parallelism_config", None)
    if parallelism is not None:
        monkeypatch.setattr(APOConfig, "parallelism_config", parallelism, raising=False)
        monkeypatch.setattr(APOConfig, "__post_init__", _then_set(APOConfig.__post_init__, parallelism))
    with pytest.raises(ValueError, match=message) as error:
        make_apo(**settings)
    assert "\n" not in str(error.value)


def _then_set(post_init: Any, value: Any) -> Any:
    def wrapped(self: Any) -> None:
        post_init(self)
        self.parallelism_config = value

    return wrapped


def test_max_steps_short_of_the_plan_is_refused_before_training(make_apo: Any) -> None:
    with pytest.raises(ValueError, match="`max_steps` is 5, but the rounds take 12 steps"):
        make_apo(max_steps=5).train()
    exact = make_apo("exact", max_steps=12)
    exact.train()
    assert exact.state.global_step == 12


def test_a_plain_dpo_config_is_refused(base: Path, tmp_path: Path) -> None:
    from trl import DPOConfig

    from trl_extras import APOTrainer

    with pytest.raises(TypeError, match="`args` has to be of type APOConfig for APOTrainer, but is of type DPOConfig"):
        APOTrainer(model=str(base), args=DPOConfig(**tiny.arguments(tmp_path)), train_dataset=tiny.make_pairs(6))


# ---- Two processes ----

TWO_PROCESSES = """
import os, sys, time
from pathlib import Path
import torch
from tests import tiny
from trl_extras import APOConfig, APOTrainer
from trl_extras.rounds.state import FullWeights

base, out, batch, resume = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
# The second process comes late to everything that is read from disk.
original = FullWeights.fingerprint
FullWeights.fingerprint = lambda self: (time.sleep(0.3 * int(os.environ["RANK"])), original(self))[1]
trainer = APOTrainer(
    model=base,
    args=APOConfig(**tiny.arguments(out, num_rounds=3, extrapolation_alpha=[0.6], per_device_train_batch_size=batch,
        train_sampling_strategy="sequential", save_strategy="steps", save_steps=1, optim="sgd", learning_rate=0.1,
        precompute_ref_log_probs=True)),
    train_dataset=tiny.make_pairs(24),
    processing_class=tiny.make_tokenizer(),
)
trainer.train(resume_from_checkpoint=None if resume == "no" else resume)
trainer.save_model()
"""


def test_two_processes_agree_with_one_and_resume(base: Path, tmp_path: Path, make_apo: Any) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)

    def launch(out: Path, resume: str) -> None:
        root = str(Path(__file__).parents[1])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        process = subprocess.Popen(
            [*command, str(script), str(base), str(out), "2", resume],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root, start_new_session=True,
            env={**os.environ, "PYTHONPATH": root},
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"two processes wait for each other: {process.communicate()[0][-2000:]}")
        assert process.returncode == 0, output[-3000:]

    launch(tmp_path / "two", "no")
    # Without the precomputation: it changes nothing but where the numbers come from.
    one = make_apo("one", extrapolation_alpha=[0.6], per_device_train_batch_size=4, optim="sgd", learning_rate=0.1)
    one.train()
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    for (name, a), b in zip(two.named_parameters(), one.model.parameters(), strict=True):
        # The order in which gradients are summed differs; measured 2e-7 here.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    launch(tmp_path / "resumed", str(tmp_path / "two/checkpoint-3"))
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed", dtype=torch.float32)
    assert tiny.same_weights(two, resumed)
    with pytest.raises(ValueError, match="was written by 2 processes, but there are 1"):
        make_apo(
            "wrong", precompute_ref_log_probs=True, optim="sgd", learning_rate=0.1, extrapolation_alpha=[0.6]
        ).train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-3"))


def test_a_run_that_starts_again_still_counts_its_rows(make_apo: Any, tmp_path: Path) -> None:
    """Phases of the same weights are taken over; the number of rows was left behind."""
    rows = []
    for _ in range(2):
        make_apo().train()
        lines = (tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()
        rows.append([json.loads(line)["rows"] for line in lines])
    assert rows == [[8, 8, 8]] * 2
