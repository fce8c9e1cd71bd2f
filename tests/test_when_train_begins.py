"""What is settled when `train()` begins: callbacks and arguments may have changed since the trainer was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import SyncRefModelCallback
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests import tiny
from trl_extras import APOSPOTrainer, APOTrainer, SPRConfig, SPRTrainer
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
    settings = {"num_rounds": 2, "num_generations": 0, "reward_temperature": 3, **settings}
    arguments = tiny.arguments(folder, **settings)
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


# ---- Arguments ----


CHANGES = {
    "apo": {
        "num_rounds": 3, "learning_rate": 3e-3, "extrapolation_alpha": 0.6, "round_beta": [0.1, 0.5, 1.0],
        "round_data": "reuse", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "weight_decay": 0.1, "lr_scheduler_type": "cosine",
    },
    "spo": {"sft_coef": 50.0, "learning_rate": 3e-3, "beta": 0.7, "sft_tolerance": 0.01, "hinge": "batch"},
    "apo_spo": {"sft_coef": 5.0, "num_rounds": 2, "extrapolation_alpha": [0.6, 0.1]},
    "spr": {"reward_temperature": 0.5, "num_rounds": 3, "skip_equal_groups": True, "learning_rate": 3e-3},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_arguments_count_as_they_are_when_train_begins(make: Any, base: Path, tmp_path: Path, name: str) -> None:
    def made(folder: str, **settings: Any) -> Any:
        if name == "spr":
            return make_spr(base, tmp_path / folder, **settings)
        return make(name, folder=folder, **settings)

    wanted = made("wanted", save_strategy="epoch", **CHANGES[name])
    wanted.train()
    changed = made("changed", save_strategy="epoch")
    for field, value in CHANGES[name].items():
        setattr(changed.args, field, value)
    changed.train()
    assert tiny.same_weights(wanted.model, changed.model)
    assert [row.get("loss") for row in wanted.state.log_history] == [
        row.get("loss") for row in changed.state.log_history
    ]
    before = made("before")
    before.train()
    assert not tiny.same_weights(before.model, changed.model), "nothing would be told"
    # What the run's folder and checkpoints say is what it was trained with.
    wanted = made("wanted", save_strategy="epoch", **CHANGES[name])
    (tmp_path / "wanted").rename(tmp_path / "away")
    (tmp_path / "changed").rename(tmp_path / "wanted")
    wanted = made("wanted", save_strategy="epoch", **CHANGES[name])
    wanted.train(resume_from_checkpoint="last")
    assert tiny.same_weights(wanted.model, changed.model)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("apo", "num_rounds", 1), ("apo", "max_length", 16), ("apo", "loss_type", ["ipo"]), ("apo", "bf16", True),
        ("apo", "precompute_ref_log_probs", True), ("apo", "adapter_rank", 4), ("spo", "lower_level", "both"),
        ("spo", "label_smoothing", 0.1), ("spo", "sft_optimum", 0.5), ("spr", "num_generations", 2),
        ("spr", "max_length", 16), ("spr", "behavior_logps_column", "mu"),
    ],
)  # fmt: skip
def test_a_change_that_cannot_count_is_refused(
    make: Any, base: Path, tmp_path: Path, name: str, field: str, value: Any
) -> None:
    given = {"sft_dataset": tiny.make_sft_rows(4)} if name == "spo" else {}
    trainer = make_spr(base, tmp_path) if name == "spr" else make(name, **given)
    setattr(trainer.args, field, value)
    with pytest.raises(ConfigurationError, match=f"`{field}` is .* when the trainer was made"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("apo", "extrapolation_alpha", -1), ("apo", "extrapolation_alpha", [0.1, 0.2]), ("apo", "num_rounds", 0),
        ("spo", "sft_coef", -1), ("spo", "sync_ref_model", True), ("spo", "sft_batch_size", 2),
        ("spr", "reward_temperature", 0), ("spr", "packing", True), ("apo", "load_best_model_at_end", True),
    ],
)  # fmt: skip
def test_a_change_is_checked_like_what_was_given(
    make: Any, base: Path, tmp_path: Path, name: str, field: str, value: Any
) -> None:
    trainer = make_spr(base, tmp_path) if name == "spr" else make(name)
    setattr(trainer.args, field, value)
    with pytest.raises(ConfigurationError, match=f"`{field}"):
        trainer.train()


def test_another_output_dir_is_looked_at_when_train_begins(make_apo: Any, tmp_path: Path) -> None:
    make_apo("there", num_rounds=2, learning_rate=1e-3).train()
    trainer = make_apo("here", num_rounds=2)
    trainer.args.output_dir = str(tmp_path / "there")
    with pytest.raises(ConfigurationError, match=r"`learning_rate` is 0.01, but the run whose rounds"):
        trainer.train()


# ---- Samplers ----


class Longest(torch.utils.data.Sampler):
    """The rows by their lengths, which are read when the sampler is made."""

    def __init__(self, dataset: Any, column: str):
        lengths = [len(ids) for ids in dataset[column]]
        assert [len(row[column]) for row in dataset] == lengths
        assert column in dataset.column_names
        self.order = sorted(range(len(dataset)), key=lambda i: -lengths[i])

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def seen_by(trainer: Any, column: str) -> list[list[int]]:
    """For each step the lengths of its rows."""
    seen: list[list[int]] = []
    collate = trainer.data_collator

    def watch(rows: Any) -> Any:
        seen.append([len(row[column]) for row in rows])
        return collate(rows)

    trainer.data_collator = watch
    return seen


@pytest.mark.parametrize("kind", ["folds", "builder", "spr"])
def test_a_sampler_reads_the_rows_of_its_round(make_apo: Any, base: Path, tmp_path: Path, kind: str) -> None:
    column = "input_ids" if kind == "spr" else "chosen_ids"
    trainer = make_spr(base, tmp_path) if kind == "spr" else make_apo(num_rounds=2)
    trainer._get_train_sampler = lambda dataset=None: Longest(trainer.train_dataset, column)
    if kind == "builder":
        trainer.round_data_builder = lambda round_index, policy, seed: tiny.make_pairs(12, seed=round_index + 5)
    seen = seen_by(trainer, column)
    trainer.train()
    half = len(seen) // 2
    rounds = [[length for step in steps for length in step] for steps in (seen[:half], seen[half:])]
    assert all(lengths == sorted(lengths, reverse=True) for lengths in rounds)
    assert all(len(set(lengths)) > 1 for lengths in rounds)


def test_a_sampler_reads_the_rows_of_the_round_that_it_resumes_in(make_apo: Any, tmp_path: Path) -> None:
    def made(folder: str) -> Any:
        trainer = make_apo(folder, num_rounds=2, save_strategy="steps", save_steps=1)
        trainer._get_train_sampler = lambda dataset=None: Longest(trainer.train_dataset, "chosen_ids")
        return trainer

    whole = made("out")
    whole.train()
    for step in (3, 6, 8):
        resumed = made(f"from {step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{step}"))
        assert tiny.same_weights(whole.model, resumed.model)


def test_a_random_sampler_that_reads_rows_shuffles_those_that_are_made(make_apo: Any) -> None:
    def shuffled(dataset: Any = None) -> Any:
        assert dataset["chosen_ids"]
        return torch.utils.data.RandomSampler(dataset, generator=torch.Generator().manual_seed(0))

    orders = []
    for sampler in (shuffled, torch.utils.data.SequentialSampler):
        trainer = make_apo(num_rounds=2)
        trainer._get_train_sampler = sampler
        trainer.round_data_builder = lambda round_index, policy, seed: tiny.make_pairs(12, seed=5)
        orders.append(seen_by(trainer, "chosen_ids"))
        trainer.train()
    assert orders[0] != orders[1]
    first, second = (sorted(length for step in steps for length in step) for steps in orders)
    assert first == second


def test_a_sampler_that_changes_its_length_is_refused(make_apo: Any) -> None:
    trainer = make_apo(num_rounds=2)
    trainer._get_train_sampler = lambda dataset=None: range(12 - 2 * max(trainer._round, 0))
    with pytest.raises(ConfigurationError, match="`_get_train_sampler` draws 10 rows in round 2, but every epoch"):
        trainer.train()


def test_rows_that_are_not_there_yet_are_said_to_be(make_apo: Any) -> None:
    class Reads(APOTrainer):
        def get_train_dataloader(self) -> Any:
            return self.train_dataset["chosen_ids"]

    trainer = make_apo(num_rounds=2)
    trainer.__class__ = Reads
    with pytest.raises(ConfigurationError, match="read before the first round has begun"):
        trainer.train()


# ---- Compilation ----


@pytest.mark.parametrize("name", ["apo", "spo", "spr"])
def test_a_compiled_model_trains_the_same(make: Any, base: Path, tmp_path: Path, name: str) -> None:
    """As TRL has it: the reference is compiled too. Dynamo without a compiler behind it has the same arithmetic."""
    trainers = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        folder = f"out{len(trainers)}"
        settings = {"save_strategy": "steps", "save_steps": 3, **compiled}
        settings |= {"num_rounds": 2} if name == "apo" else {}

        def made(folder: str = folder, settings: dict[str, Any] = settings) -> Any:
            if name == "spr":
                return make_spr(base, tmp_path / folder, **settings)
            return make(name, folder=folder, **settings)

        trainer = made()
        trainer.train()
        resumed = made()
        resumed.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-3"))
        assert tiny.same_weights(trainer.model, resumed.model)
        trainers.append(trainer)
    assert tiny.same_weights(trainers[0].model, trainers[1].model)
