"""What SPOTrainer and APOSPOTrainer do besides the mathematics: floors, refusals, metrics, errors in the middle."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from tests import tiny
from tests.reference import spo_objective as slow
from tests.test_spo import leave_the_reference, weights_of
from trl_extras import APOConfig, APOSPOConfig, APOSPOTrainer, APOTrainer, SPOConfig, SPOTrainer
from trl_extras.errors import ConfigurationError
from trl_extras.rounds import NonFiniteError
from trl_extras.spo import trainer as spo_trainer
from trl_extras.spo.trainer import _FOLDER, _OPTIMUM_FILE


def numbers(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def all_floors(trainer: Any, model: Any) -> torch.Tensor:
    """nll* of every SFT row under a model, by hand."""
    weights = dict(model.named_parameters())
    found = []
    with torch.no_grad():
        for row in trainer._spo_rows.rows:
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            example = (row["input_ids"][:start], row["input_ids"][start:])
            found.append(-float(slow.log_prob(model, weights, example)) / slow.length(example))
    return torch.tensor(found)


# ---- The floor of the SFT rows ----


def test_the_floor_is_the_initial_models_and_cached(
    make_spo: Any, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = make_spo(sft_dataset=tiny.make_sft_rows(), per_device_eval_batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.allclose(trainer._spo_floor.nll, all_floors(trainer, model), rtol=1e-5)
    stored = load_file(tmp_path / "out" / _FOLDER / _OPTIMUM_FILE)["nll"]
    assert torch.equal(stored, trainer._spo_floor.nll)

    calls = []
    monkeypatch.setattr(SPOTrainer, "_write_floor", lambda self, *args: calls.append(args))
    make_spo(sft_dataset=tiny.make_sft_rows(), per_device_eval_batch_size=3)
    assert not calls, "the same model and rows: taken from disk"
    make_spo(sft_dataset=tiny.make_sft_rows(seed=3))
    other = tiny.make_model(seed=1)
    make_spo(model=other, ref_model=copy.deepcopy(other), sft_dataset=tiny.make_sft_rows())
    assert len(calls) == 2, "other rows, another model: made anew"


def test_a_checkpoint_has_the_runs_own_floor(make_spo: Any, tmp_path: Path) -> None:
    """Whatever another trainer has put into the folder meanwhile."""
    rows = tiny.make_sft_rows()
    ours = make_spo(sft_dataset=rows, save_strategy="steps", save_steps=2, max_steps=4)
    other = tiny.make_model(seed=4)
    make_spo(model=other, ref_model=tiny.make_model(), sft_dataset=rows.select(range(3)))
    ours.train()
    for step in (2, 4):
        stored = load_file(tmp_path / f"out/checkpoint-{step}" / _FOLDER / _OPTIMUM_FILE)["nll"]
        assert torch.equal(stored, ours._spo_floor.nll)


def test_another_architecture_with_the_same_weights_has_another_floor(make_spo: Any) -> None:
    floors = []
    for theta in (10_000.0, 100.0):
        model = tiny.make_model(rope_parameters={"rope_type": "default", "rope_theta": theta})
        floors.append(make_spo(model=model, ref_model=tiny.make_model(), sft_dataset=tiny.make_sft_rows())._spo_floor)
    assert floors[0].key != floors[1].key
    assert not torch.equal(floors[0].nll, floors[1].nll)


def test_a_checkpoint_without_a_floor_is_refused(make_spo: Any, tmp_path: Path) -> None:
    settings = {"sft_dataset": tiny.make_sft_rows(), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_spo(sft_optimum=2.0, **settings).train()
    with pytest.raises(ConfigurationError, match=r"checkpoint-4 does not hold the floor .* a number as"):
        make_spo(**settings).train(resume_from_checkpoint="last")
    make_spo(sft_optimum=2.0, **settings).train(resume_from_checkpoint="last")


def test_a_config_can_be_used_again_with_another_loss(make_spo: Any) -> None:
    seen = []

    class Given(SPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            seen.append(kwargs["args"])
            super().__init__(*args, **kwargs)

    trainer = make_spo(cls=Given, loss_type="simpo")
    assert trainer.args.precompute_ref_log_probs
    assert not seen[0].precompute_ref_log_probs


def test_a_field_that_was_set_later_is_checked_too(make_spo: Any, monkeypatch: Any) -> None:
    original = SPOConfig.__post_init__

    def later(self: Any) -> None:
        original(self)
        self.sft_coef = -1.0

    monkeypatch.setattr(SPOConfig, "__post_init__", later)
    with pytest.raises(ConfigurationError, match=r"`sft_coef` is -1.0"):
        make_spo()


def test_a_reference_free_loss_lets_a_given_reference_go(make_spo: Any) -> None:
    reference = tiny.make_model(seed=3)
    trainer = make_spo(loss_type="simpo", ref_model=reference)
    assert trainer.ref_model is None
    row = trainer.train_dataset[0]
    with torch.no_grad():
        example = (row["prompt_ids"], row["chosen_ids"])
        wanted = float(slow.log_prob(reference, dict(reference.named_parameters()), example))
    assert row["ref_chosen_logps"] == pytest.approx(wanted, rel=1e-5)
    trainer.train()
    with pytest.raises(ConfigurationError, match=r"another `eval_dataset` cannot be had once training has begun"):
        trainer.evaluate(tiny.make_pairs(4, seed=8))


def test_a_batch_size_that_was_lowered_lowers_that_of_the_sft_rows(make_spo: Any) -> None:
    trainer = make_spo(sft_dataset=tiny.make_sft_rows(), per_device_train_batch_size=4)
    assert len(trainer._sft_indices(0, training=True)) == 4
    trainer.state.train_batch_size = 2  # as `auto_find_batch_size` leaves it
    assert len(trainer._sft_indices(0, training=True)) == 2


def test_a_policy_at_its_reference_is_not_pushed(make_spo: Any) -> None:
    trainer = make_spo(sft_dataset=tiny.make_sft_rows(), sft_coef=1e6)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch)
    assert trainer._metrics["train"]["spo/gap_chosen"] == [0.0]
    # The floor was computed in batches of other lengths, so that it is the same but for roundings.
    assert trainer._metrics["train"]["spo/gap_sft"][0] < 1e-6


@pytest.mark.parametrize("loss_type", ["simpo", "sft"])
def test_a_reference_free_loss_keeps_no_reference_model(make_spo: Any, base: Path, loss_type: str) -> None:
    trainer = make_spo(loss_type=loss_type, learning_rate=3e-2)
    assert trainer.ref_model is None
    trainer.train()
    assert any(gap > 0 for gap in numbers(trainer, "spo/gap_chosen")) or loss_type == "sft"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        row = trainer.train_dataset[0]
        wanted = float(slow.log_prob(model, weights, (row["prompt_ids"], row["chosen_ids"])))
    assert row["ref_chosen_logps"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["simpo", "dpop"])
def test_own_losses_and_combinations_through_the_trainer(make_spo: Any, loss_type: str) -> None:
    option = {"simpo": {"simpo_gamma": 0.8}, "dpop": {"dpop_lambda": 5.0}}[loss_type]
    trainer = make_spo(
        loss_type=["sigmoid", loss_type], loss_weights=[0.25, 2.0], sft_coef=0.0, beta=0.7, **option
    )  # fmt: skip
    leave_the_reference(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    value = float(trainer.compute_loss(trainer.model, dict(batch)))
    policy, reference = trainer.model, trainer.ref_model
    total = 0.0
    for row in (trainer.train_dataset[i] for i in range(2)):
        chosen, rejected = ((row["prompt_ids"], row[f"{kind}_ids"]) for kind in ("chosen", "rejected"))
        with torch.no_grad():
            c, r, rc, rr = (
                slow.log_prob(model, dict(model.named_parameters()), example)
                for model in (policy, reference)
                for example in (chosen, rejected)
            )
        sigmoid = -torch.nn.functional.logsigmoid(0.7 * ((c - rc) - (r - rr)))
        if loss_type == "simpo":
            own = 0.7 * c / len(row["chosen_ids"]) - 0.7 * r / len(row["rejected_ids"]) - 0.8
        else:
            own = 0.7 * ((c - rc) - (r - rr) - 5.0 * max(0.0, float(rc - c)))
        total += float(0.25 * sigmoid - 2.0 * torch.nn.functional.logsigmoid(own)) / 2
    assert value == pytest.approx(total, rel=1e-5)


# ---- Evaluation and metrics ----


def test_evaluations_see_the_same_sft_rows(make_spo: Any) -> None:
    trainer = make_spo(sft_dataset=tiny.make_sft_rows(11), eval_dataset=tiny.make_pairs(6, seed=3))
    leave_the_reference(trainer.model)
    first, second = trainer.evaluate(), trainer.evaluate()
    for key in ("eval_loss", "eval_spo/gap_sft", "eval_spo/gap_chosen", "eval_spo/displaced", "eval_spo/penalty"):
        assert first[key] == second[key] if key in first else True
    logs = [entry for entry in trainer.state.log_history if "eval_spo/gap_sft" in entry]
    assert len(logs) == 2
    assert logs[0]["eval_spo/gap_sft"] == logs[1]["eval_spo/gap_sft"] > 0
    assert first["eval_loss"] == second["eval_loss"]


def test_metrics_are_what_the_pairs_say(make_spo: Any) -> None:
    trainer = make_spo(sft_coef=0.5, sft_tolerance=0.1)
    leave_the_reference(trainer.model)
    rows = [trainer.train_dataset[i] for i in range(2)]
    loss = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
    metrics = {key: values[0] for key, values in trainer._metrics["eval"].items() if key.startswith("spo/")}
    changes: dict[str, list[float]] = {"chosen": [], "rejected": []}
    gaps = []
    with torch.no_grad():
        for row in rows:
            for kind, found in changes.items():
                example = (row["prompt_ids"], row[f"{kind}_ids"])
                now, before = (
                    float(slow.log_prob(model, dict(model.named_parameters()), example))
                    for model in (trainer.model, trainer.ref_model)
                )
                found.append(now - before)
                if kind == "chosen":
                    gaps.append(max(0.0, (before - now) / len(row["chosen_ids"]) - 0.1))
    gap = sum(gaps) / 2
    assert metrics["spo/chosen_change"] == pytest.approx(sum(changes["chosen"]) / 2, rel=1e-4)
    assert metrics["spo/rejected_change"] == pytest.approx(sum(changes["rejected"]) / 2, rel=1e-4)
    assert metrics["spo/displaced"] == sum(change < 0 for change in changes["chosen"]) / 2
    assert metrics["spo/gap_chosen"] == pytest.approx(gap, rel=1e-4)
    assert metrics["spo/penalty"] == pytest.approx(0.5 * gap, rel=1e-4)
    assert metrics["spo/preference_loss"] == pytest.approx(loss - 0.5 * gap, rel=1e-4)


@pytest.mark.parametrize(("coefficient", "warned"), [(0.0, 1), (0.5, 0)])
def test_displacement_without_a_floor_is_said_once(
    make_spo: Any, caplog: Any, monkeypatch: Any, coefficient: float, warned: int
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_extras"), "propagate", True)
    trainer = make_spo(sft_coef=coefficient)
    leave_the_reference(trainer.model, 2.0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum(numbers(trainer, "spo/displaced")[:2]) > 1, "pairs are displaced"
    assert sum("less likely than under the reference" in record.message for record in caplog.records) == warned


# ---- Errors in the middle of a window ----


@pytest.mark.parametrize("solver", ["unrolled", "alternating"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_a_window_brings_the_weights_back(
    make_spo: Any, monkeypatch: Any, solver: str, error: type[BaseException]
) -> None:
    trainer = make_spo(bilevel_solver=solver, inner_learning_rate=0.1, gradient_accumulation_steps=2)
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    before = weights_of(trainer)
    rows = [trainer.train_dataset[i] for i in range(4)]
    batches = [trainer.data_collator(rows[:2]), trainer.data_collator(rows[2:])]
    trainer.current_gradient_accumulation_steps = 2
    trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    trainer.training_step(trainer.model, batches[0])
    assert not torch.equal(weights_of(trainer), before), "inside the window"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("in the middle")

    monkeypatch.setattr(trainer, "compute_ref_log_probs", fail)
    with pytest.raises(error, match="in the middle"):
        trainer.training_step(trainer.model, batches[1])
    assert torch.equal(weights_of(trainer), before)


def test_an_error_between_two_micro_batches_brings_the_weights_back(make_spo: Any) -> None:
    class Fails(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("between")

    trainer = make_spo(
        bilevel_solver="unrolled", inner_learning_rate=0.1, gradient_accumulation_steps=2, callbacks=[Fails()]
    )  # fmt: skip
    before = weights_of(trainer)
    with pytest.raises(RuntimeError, match="between"):
        trainer.train()
    assert torch.equal(weights_of(trainer), before)


def test_a_window_that_is_left_half_done_brings_the_weights_back(make_spo: Any) -> None:
    trainer = make_spo(bilevel_solver="unrolled", inner_learning_rate=0.1, gradient_accumulation_steps=2)
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.current_gradient_accumulation_steps = 2
    before = weights_of(trainer)
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(3)]
    trainer.get_batch_samples(iter(batches[:2]), 2, trainer.args.device)
    trainer.training_step(trainer.model, batches[0])
    assert not torch.equal(weights_of(trainer), before)
    trainer.training_step(trainer.model, batches[2])
    assert torch.equal(weights_of(trainer), before)


def test_the_share_is_that_of_the_windows_means(make_spo: Any) -> None:
    """The parts of one hinge over several micro-batches may be negative; their mean is not."""
    trainer = make_spo(
        hinge="batch", gradient_accumulation_steps=3, sft_dataset=tiny.make_sft_rows(), learning_rate=3e-2
    )  # fmt: skip
    leave_the_reference(trainer.model)
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "spo/penalty" in entry]
    assert any(row["spo/penalty"] > 0 for row in rows)
    for row in rows:
        whole = abs(row["spo/preference_loss"]) + row["spo/penalty"]
        assert row["spo/penalty_share"] == pytest.approx(row["spo/penalty"] / whole)
        assert row["loss"] == pytest.approx(row["spo/preference_loss"] + row["spo/penalty"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(make_spo: Any) -> None:
    trainer = make_spo(bilevel_solver="unrolled")
    before = weights_of(trainer)
    trainer.beta = float("nan")
    with pytest.raises(NonFiniteError, match=r"Step 1: the loss is nan"):
        trainer.train()
    assert torch.equal(weights_of(trainer), before)


def test_a_bare_training_step_is_a_window_of_one(make_spo: Any) -> None:
    trainer = make_spo(bilevel_solver="unrolled", inner_learning_rate=0.1, gradient_accumulation_steps=4)
    before = weights_of(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(3):
        trainer.training_step(trainer.model, batch)
        assert torch.equal(weights_of(trainer), before)


def test_an_adapter_moves_alone(make_spo: Any) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = make_spo(
        peft_config=adapter, bilevel_solver="alternating", inner_learning_rate=0.1, sft_dataset=tiny.make_sft_rows()
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


# ---- Refused before any weights load ----


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lower_level": "both"}, r"`lower_level` is 'both', but there is no SFT dataset: give `sft_dataset`"),
        ({"lower_level": "sft_dataset"}, r"`lower_level` is 'sft_dataset', but there is no SFT dataset"),
        ({"lower_level": "chosen", "sft_dataset": "rows"}, r"`sft_dataset` is given, but `lower_level='chosen'`"),
        ({"sft_batch_size": 2}, r"`sft_batch_size` is 2, but there is no SFT dataset"),
        ({"sft_dataset": "empty"}, r"`sft_dataset` is empty"),
        ({"sft_dataset": "masked"}, r"none of its 2 rows has a token to learn"),
        ({"sft_dataset": "hole"}, r"`sft_dataset` has no 'text' in row 1: leave such rows out"),
        (
            {"sft_dataset": "chat", "no_template": True},
            r"`sft_dataset` has conversations in 'messages', but the token",
        ),
        ({"data": "rows"}, r"`train_dataset` has the columns \['completion', 'prompt'\], but wants preference pairs"),
        ({"sft_dataset": "pairs"}, r"these look like preference pairs|These look like preference pairs"),
        ({"sft_dataset_name": "/nowhere/at/all"}, r"`sft_dataset_name` \('/nowhere/at/all'\), split 'train', cannot"),
        ({"bilevel_solver": "unrolled", "deepspeed_env": True}, r"`bilevel_solver='unrolled'` .* DeepSpeed"),
        ({"bilevel_solver": "unrolled", "fsdp_env": "1"}, r"`bilevel_solver='unrolled'` .* FSDP1"),
        ({"loss_type": "simpo", "data": "stream"}, r"`loss_type=\['simpo'\]` keeps no reference .* streams"),
        ({"bilevel_solver": "unrolled", "data": "images"}, r"`bilevel_solver='unrolled'` .* images"),
        (
            {"hinge": "batch", "gradient_accumulation_steps": 2, "data": "images"},
            r"`hinge='batch'` with gradient accumulation .* images",
        ),
    ],
    ids=str,
)
def test_refused(make_spo: Any, monkeypatch: Any, tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    sets = {
        "rows": tiny.make_sft_rows(),
        "empty": tiny.make_sft_rows().select([]),
        "masked": datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]], "labels": [[-100, -100], [7]]}),
        "pairs": tiny.make_pairs(3),
        "hole": datasets.Dataset.from_dict({"text": ["w1 w2", None]}),
        "chat": datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "w1"}]]}),
    }
    pairs = tiny.make_pairs(4)
    data = {
        "stream": pairs.to_iterable_dataset(),
        "rows": tiny.make_sft_rows(),
        "images": pairs.add_column("images", [["x"]] * 4),
    }
    setting = dict(setting)
    if setting.pop("no_template", False):
        tokenizer = tiny.make_tokenizer()
        tokenizer.chat_template = None
        monkeypatch.setattr(tiny, "make_tokenizer", lambda: tokenizer)
    for name in ("deepspeed", "fsdp"):
        if setting.pop(f"{name}_env", False):
            # As after `accelerate launch` with such a configuration.
            monkeypatch.setattr(spo_trainer, "asked_for", lambda plugin, name=name: plugin == name.upper())
            monkeypatch.setattr(spo_trainer, "fsdp_version", lambda config, name=name: 1 if name == "fsdp" else None)
    if "sft_dataset" in setting:
        setting["sft_dataset"] = sets[setting["sft_dataset"]]
    if "data" in setting:
        setting["data"] = data[setting["data"]]
    # A model that is not there: had its weights been asked for, the error would be another one.
    with pytest.raises(ConfigurationError, match=message):
        make_spo(model="nobody/no-such-model", **setting)
    assert not (tmp_path / "out" / _FOLDER).exists()


def test_low_precision_weights_are_refused_for_inner_steps(make_spo: Any) -> None:
    model = tiny.make_model(dtype=torch.bfloat16)
    with pytest.raises(ConfigurationError, match=r"bfloat16 and would lose them to rounding: load .* float32"):
        make_spo(model=model, ref_model=copy.deepcopy(model), bilevel_solver="unrolled")


def test_another_config_class_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SPOConfig for SPOTrainer"):
        SPOTrainer(model=str(base), args=APOConfig(**tiny.arguments(tmp_path)), train_dataset=tiny.make_pairs(4))


# ---- Rounds with momentum over the objective ----


def apo_spo(make_spo: Any, folder: str = "out", **kwargs: Any) -> Any:
    defaults = {"num_rounds": 2, "data": tiny.make_pairs(12), "learning_rate": 3e-2}
    return make_spo(folder, cls=APOSPOTrainer, **{**defaults, **kwargs})


@pytest.mark.parametrize("setting", [{}, {"precompute_ref_log_probs": True}], ids=str)
def test_apo_spo_with_lambda_zero_is_apo(make_spo: Any, setting: dict[str, Any]) -> None:
    ours = apo_spo(make_spo, "ours", sft_coef=0.0, sft_dataset=tiny.make_sft_rows(), **setting)
    ours.train()
    apo = make_spo("apo", cls=APOTrainer, num_rounds=2, data=tiny.make_pairs(12), learning_rate=3e-2, **setting)
    apo.train()
    assert tiny.same_weights(ours.model, apo.model)


@pytest.mark.parametrize("setting", [{}, {"bilevel_solver": "unrolled", "inner_learning_rate": 0.05}], ids=str)
def test_apo_spo_with_one_round_is_spo(make_spo: Any, setting: dict[str, Any]) -> None:
    common = {"data": tiny.make_pairs(12), "sft_dataset": tiny.make_sft_rows(), "learning_rate": 3e-2, **setting}
    ours = apo_spo(make_spo, "ours", **{**common, "num_rounds": 1})
    ours.train()
    spo = make_spo("spo", **common)
    spo.train()
    assert any(gap > 0 for gap in numbers(spo, "spo/gap_sft"))
    assert tiny.same_weights(ours.model, spo.model)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize("solver", [{}, {"bilevel_solver": "alternating", "inner_learning_rate": 0.01}], ids=str)
def test_floors_over_rounds(make_spo: Any, base: Path, loss_type: str, solver: dict[str, Any]) -> None:
    """The chosen responses' floor follows the round's reference, the SFT rows' stays the initial model's."""
    trainer = apo_spo(make_spo, sft_dataset=tiny.make_sft_rows(), loss_type=loss_type, **solver)
    trainer.train()
    initial = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.allclose(trainer._spo_floor.nll, all_floors(trainer, initial), rtol=1e-5)
    change, gap_chosen, gap_sft = (
        numbers(trainer, f"spo/{key}") for key in ("chosen_change", "gap_chosen", "gap_sft")
    )
    if not solver:
        # The first step of each round: the policy is its own reference, and no longer the initial model.
        for step in (0, 3):
            assert change[step] == pytest.approx(0, abs=1e-4)
            assert gap_chosen[step] < 1e-5
        assert gap_sft[3] > 1e-3
    assert gap_sft[0] < 1e-3


def test_apo_spo_on_prompts(make_spo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    trainer = apo_spo(
        make_spo, data=tiny.make_pairs(8).select_columns(["prompt"]), sft_dataset=tiny.make_sft_rows(),
        reward_funcs=reward, num_generations=3, max_completion_length=4,
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    assert all("spo/gap_sft" in row["train"] and row["pairs"] for row in rows)
    assert "Chosen responses that the policy has sampled have a floor too" in capsys.readouterr().out


def test_manifests_name_no_folder_of_this_machine(make_spo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sft-rows"
    tiny.make_sft_rows().to_parquet(str(folder / "train.parquet"))
    trainer = apo_spo(make_spo, sft_dataset_name=str(folder), save_strategy="steps", save_steps=2)
    trainer.train()
    texts = [
        *(tmp_path / "out").rglob("*.json"),
        *(tmp_path / "out").rglob("*.md"),
        *(tmp_path / "out").rglob("*.jsonl"),
    ]
    assert len(texts) > 5
    assert not [path for path in texts if str(folder) in path.read_text(encoding="utf-8")]


def test_public_fields_of_apo_spo_are_those_of_both() -> None:
    from dataclasses import fields

    names = {field.name for field in fields(APOSPOConfig)}
    assert names == {f.name for f in fields(APOConfig)} | {f.name for f in fields(SPOConfig)}
