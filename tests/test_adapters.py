"""Rounds with LoRA, through the real trainers: the sum of the rounds' changes, exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from tests import tiny


LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, **kwargs})


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def loaded(base: Path, folder: Path) -> torch.nn.Module:
    """The saved adapter on the original base, by plain peft."""
    return PeftModel.from_pretrained(load(base), folder).eval()


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def changes(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What a saved adapter changes in each weight of the base."""
    merged = PeftModel.from_pretrained(load(base).double(), folder).merge_and_unload().state_dict()
    before = load(base).double().state_dict()
    found = {name: merged[name] - before[name] for name in before}
    return {name: change for name, change in found.items() if change.any()}


def passed(base: Path, trained: bool = True, **kwargs: Any) -> Any:
    """A PeftModel of a user's; trained: its adapter changes the model."""
    set_seed(3)
    model = get_peft_model(load(base), lora(**kwargs))
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return model


class Iterates(TrainerCallback):
    """The logits of every round's iterate, as trained."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def on_round_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.logits.append(logits(model))


# ---- Done when 1 ----


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1}}]
)
def test_the_saved_adapter_is_the_sum_of_the_rounds(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    seen = Iterates()
    trainer = make_apo(
        peft_config=lora(**config),
        extrapolation_alpha=[0.3, 0.7, 0.0],
        keep_iterates=True,
        callbacks=[seen],
        learning_rate=5e-3,
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.train()
    trainer.save_model()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    whole = loaded(base, tmp_path / "out")
    assert whole.peft_config["default"].r == 6
    assert relative(logits(whole), logits(trainer.model)) < 1e-5
    assert relative(logits(trainer.model), logits(load(base))) > 1e-2
    iterates = [changes(base, tmp_path / "out/_rounds/iterates" / str(t)) for t in (1, 2, 3)]
    for t in (1, 2, 3):
        kept = loaded(base, tmp_path / "out/_rounds/iterates" / str(t))
        assert relative(logits(kept), seen.logits[t - 1]) < 1e-5
    # thetahat_1 = D1; theta_1 = 1.3 D1; thetahat_2 = 1.3 D1 + D2; theta_2 = thetahat_2 + .7 (thetahat_2 - thetahat_1)
    history = trainer._weights._bases
    scaling = {name: layer.scaling["default"] for name, layer in trainer._weights._layers.items()}
    current = {name: f.b[0].double() @ f.a[0].double() for name, f in trainer._weights._current().items()}
    rounds = [{n: f.b[0].double() @ f.a[0].double() for n, f in change.items()} for change in history] + [current]
    for t, coefficients in enumerate([[1], [1.3, 1], [1.3 + 0.7 * 0.3, 1.7, 1]]):
        for name in current:
            expected = scaling[name] * sum(c * change[name] for c, change in zip(coefficients, rounds, strict=False))
            got = iterates[t][f"{name.removeprefix('base_model.model.')}.weight"]
            assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("bf16", [False, True])
def test_the_bytes_of_the_base_stay(make_apo: Callable[..., Any], base: Path, bf16: bool) -> None:
    model = load(base, torch.bfloat16 if bf16 else torch.float32)
    trainer = make_apo(model=model, peft_config=lora(), learning_rate=5e-3)
    kept = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert kept
    assert all(now[name].dtype == p.dtype and torch.equal(now[name], p) for name, p in kept.items())


def test_alpha_zero_is_sequential_dpo(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """Each later run starts from the merged model, so that sums are rounded in another order."""
    data = tiny.make_pairs(24)
    settings = {"optim": "sgd", "learning_rate": 0.5, "num_train_epochs": 1, "round_data": "reuse"}
    trainer = make_apo(data=data, peft_config=lora(), extrapolation_alpha=[0.0], num_rounds=3, **settings)
    trainer.train()
    model = load(base)
    del settings["round_data"]
    for _ in range(3):
        config = DPOConfig(**tiny.arguments(tmp_path / "dpo", **settings, train_sampling_strategy="sequential"))
        stock = DPOTrainer(
            model=model, args=config, train_dataset=data, processing_class=tiny.make_tokenizer(), peft_config=lora()
        )
        stock.train()
        model = stock.model.merge_and_unload()
    assert relative(logits(trainer.model), logits(load(base))) > 1e-2
    assert relative(logits(trainer.model), logits(model)) < 1e-5


@pytest.mark.parametrize("way", ["peft_config", "passed", "passed fresh"])
def test_one_round_is_dpo(make_apo: Callable[..., Any], base: Path, tmp_path: Path, way: str) -> None:
    data = tiny.make_pairs(12)

    def arguments() -> dict[str, Any]:
        if way == "peft_config":
            return {"model": str(base), "peft_config": lora()}
        return {"model": passed(base, trained=way == "passed")}

    config = DPOConfig(**tiny.arguments(tmp_path / "dpo", num_train_epochs=1))
    stock = DPOTrainer(args=config, train_dataset=data, processing_class=tiny.make_tokenizer(), **arguments())
    stock.train()
    stock.save_model()
    ours = make_apo(data=data, num_rounds=1, train_sampling_strategy="random", **arguments())
    ours.train()
    ours.save_model()
    for name, tensor in stock.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("dpo", "out")]
    assert files[0] == files[1]


def test_later_rounds_have_the_policy_as_reference(make_apo: Callable[..., Any]) -> None:
    trainer = make_apo(
        peft_config=lora(lora_dropout=0.0),
        extrapolation_alpha=[0.5],
        logging_steps=1,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
    )
    trainer.train()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    for start in trainer._plan.starts[:-1]:
        assert losses[start + 1] == pytest.approx(math.log(2), abs=1e-6)
        assert losses[start + 2] != pytest.approx(math.log(2), abs=1e-6)


# ---- Killed and resumed ----


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("way", ["peft_config", "passed"])
@pytest.mark.parametrize("step", [2, 4, 7, 8, 11])
def test_resumed_is_uninterrupted(make_apo: Callable[..., Any], base: Path, way: str, step: int) -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        given: dict[str, Any] = {"peft_config": lora()} if way == "peft_config" else {"model": passed(base)}
        return make_apo(folder, save_strategy="steps", save_steps=1, learning_rate=5e-3, **given, **kwargs)

    whole = run("whole")
    whole.train()
    assert whole.state.global_step == 12
    killed = run("out", callbacks=[KillAt(step + 1)])
    with pytest.raises(Killed):
        killed.train()
    resumed = run("out")
    resumed.train(resume_from_checkpoint="last")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert whole._weights.fingerprint() == resumed._weights.fingerprint()


def test_equal_states_are_equal_files(make_apo: Callable[..., Any], tmp_path: Path) -> None:
    """A kill campaign, and whoever compares checksums, looks at bytes."""
    for folder in ("one", "two"):
        make_apo(folder, peft_config=lora(), keep_iterates=True).train()
    for file in ("adapter_rounds.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        one, two = [(tmp_path / folder / "_rounds/iterates/2" / file).read_bytes() for folder in ("one", "two")]
        assert one == two, file
    assert not (tmp_path / "one/_rounds/iterates/2/README.md").exists(), "peft's card tells where the base lies"


# ---- Models and trainers that are used again ----


def spr(model: Any, folder: Path, **kwargs: Any) -> Any:
    from trl_extras import SPRConfig, SPRTrainer

    peft_config = kwargs.pop("peft_config", None)
    rows = tiny.make_sft_rows(12).add_column("reward", [float(i % 3) for i in range(12)])
    return SPRTrainer(
        model=model,
        args=SPRConfig(**tiny.arguments(folder, **{"num_generations": 0, "num_rounds": 3, **kwargs})),
        train_dataset=rows,
        processing_class=tiny.make_tokenizer(),
        peft_config=peft_config,
    )


def test_a_model_with_a_history_is_refused(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """Else its history would lie below the new run's, in the forward pass and in nothing that is saved."""
    model = load(base)
    first = make_apo(model=model, peft_config=lora(), learning_rate=5e-3, num_rounds=2)
    first.train()
    for make in (
        lambda: make_apo("again", model=model, peft_config=lora()),
        lambda: make_apo("again", model=first.model),
        lambda: make_apo("again", model=first.model, num_rounds=1),
        lambda: make_apo("again", model=copy.deepcopy(first.model)),
        lambda: spr(first.model, tmp_path / "again"),
    ):
        with pytest.raises(ValueError, match="an earlier run in rounds has trained below its adapter"):
            make()
    plain = first.model.unload()
    again = make_apo("again", model=plain, peft_config=lora(), learning_rate=5e-3, num_rounds=2)
    again.train()
    assert again._weights.fingerprint() == first._weights.fingerprint()


@pytest.mark.parametrize("way", ["peft_config", "passed"])
def test_one_round_trained_again_on_the_same_trainer(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path, way: str
) -> None:
    given: dict[str, Any] = {"peft_config": lora()} if way == "peft_config" else {"model": passed(base)}
    trainer = make_apo(
        num_rounds=1, output_policy="extrapolated", adapter_output="merged", learning_rate=5e-3, save_strategy="epoch",
        **given,
    )  # fmt: skip
    trainer.train()
    out = logits(trainer.model)
    trainer.train(resume_from_checkpoint="last")
    assert torch.equal(logits(trainer.model), out)
    trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))


# ---- What a resume is told ----


def stopped(make_apo: Callable[..., Any], step: int = 6, **given: Any) -> None:
    trainer = make_apo(save_strategy="steps", save_steps=1, learning_rate=5e-3, callbacks=[KillAt(step)], **given)
    with pytest.raises(Killed):
        trainer.train()


@pytest.mark.parametrize("change", [{"lora_alpha": 12}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 1}}])
def test_another_scaling_is_refused_on_resume(make_apo: Callable[..., Any], change: dict[str, Any]) -> None:
    stopped(make_apo, peft_config=lora())
    (name,) = change
    with pytest.raises(ValueError, match=f"`{name}` is .*, but .* was made with"):
        make_apo(peft_config=lora(**change), learning_rate=5e-3).train(resume_from_checkpoint="last")


def test_a_state_of_another_scaling_is_refused(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """Whatever its configuration says: the scaling is no part of the factors."""
    make_apo(peft_config=lora(), num_rounds=2, keep_iterates=True).train()
    other = make_apo("other", peft_config=lora(lora_alpha=12), num_rounds=2)
    with pytest.raises(ValueError, match=r"has a scaling of 3\.0 there and 6\.0 in memory"):
        other._weights.load(tmp_path / "out/_rounds/iterates/2")


def test_another_adapter_in_the_same_folder_is_refused(make_apo: Callable[..., Any]) -> None:
    make_apo(peft_config=lora(), num_rounds=2).train()
    with pytest.raises(ValueError, match="`r` is 4, but the run whose rounds `output_dir` holds"):
        make_apo(peft_config=lora(r=4), num_rounds=2)
    with pytest.raises(ValueError, match="`peft_type` is None, but the run whose"):
        make_apo(num_rounds=2)


def test_another_start_on_resume_leaves_the_reference_alone(make_apo: Callable[..., Any], base: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3}
    whole = make_apo("whole", model=passed(base), **settings)
    whole.train()
    stopped(make_apo, step=3, model=passed(base))
    other = passed(base)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    resumed = make_apo(model=other, **settings)
    resumed.train(resume_from_checkpoint="last")
    assert whole._weights.fingerprint() == resumed._weights.fingerprint()


@pytest.mark.parametrize("trained", [False, True])
def test_dropout_is_drawn_alike_on_resume(make_apo: Callable[..., Any], base: Path, trained: bool) -> None:
    """TRL's copy of a passed adapter draws dropout of its own: a resume has to keep it as long as the run did."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3, "disable_dropout": False}
    whole = make_apo("whole", model=passed(base, trained), **settings)
    whole.train()
    killed = make_apo(model=passed(base, trained), callbacks=[KillAt(3)], **settings)
    with pytest.raises(Killed):
        killed.train()
    resumed = make_apo(model=passed(base, trained), **settings)
    resumed.train(resume_from_checkpoint="last")
    assert whole._weights.fingerprint() == resumed._weights.fingerprint()


def test_spr_is_told_of_another_base(base: Path, tmp_path: Path) -> None:
    settings = {"peft_config": lora(), "save_strategy": "steps", "save_steps": 1}
    trainer = spr(str(base), tmp_path / "out", **settings)
    trainer.add_callback(KillAt(3))
    with pytest.raises(Killed):
        trainer.train()
    with pytest.raises(ValueError, match="below the adapter is not the one that checkpoint-2 was trained on"):
        spr(tiny.make_model(seed=5), tmp_path / "out", **settings).train(resume_from_checkpoint="last")


# ---- What can be passed ----


def test_spr_takes_other_adapters_in_one_round(base: Path, tmp_path: Path) -> None:
    other = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    spr(str(base), tmp_path / "one", peft_config=other, num_rounds=1).train()
    with pytest.raises(ValueError, match=r"type IA3 does not work .* have been made to work with LoRA alone"):
        spr(str(base), tmp_path / "three", peft_config=other)


def test_models_that_rounds_cannot_train(make_apo: Callable[..., Any], base: Path) -> None:
    named = get_peft_model(load(base), lora(), adapter_name="mine")
    with pytest.raises(ValueError, match="Call it that"):
        make_apo(model=named)
    # What transformers' `add_adapter` does, which wants a peft of its own choice.
    integrated = inject_adapter_in_model(lora(), load(base))
    integrated._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="has adapters but is no PeftModel does not work"):
        make_apo(model=integrated)
    frozen = passed(base)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="Load it with `is_trainable=True`"):
        make_apo(model=frozen)
    with pytest.raises(ValueError, match=r"`adapter_rank_tolerance` is 0.5, but nothing is truncated"):
        make_apo(peft_config=lora(), adapter_rank_tolerance=0.5)


def test_embeddings_that_were_resized_are_saved(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """As peft does beside an adapter: new rows are drawn at random and are nowhere else."""
    model = load(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    trainer = make_apo(model=model, peft_config=lora(), num_rounds=2, learning_rate=5e-3)
    trainer.train()
    trainer.save_model()
    fresh = load(base)
    fresh.resize_token_embeddings(model.config.vocab_size)
    assert relative(logits(PeftModel.from_pretrained(fresh, tmp_path / "out")), logits(trainer.model)) < 1e-5


def test_an_adapter_beside_a_whole_model_is_told(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(base).save_pretrained(tmp_path / "out")
    trainer = make_apo(peft_config=lora(), num_rounds=2)
    trainer.train()
    with caplog.at_level("WARNING"):
        trainer.save_model()
    assert "holds a whole model, beside which an adapter is saved now" in caplog.text


def test_processes_that_drew_other_values_begin_alike(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh adapter of a user's is drawn in each process; DDP makes them equal only after the rounds have looked."""
    from trl_extras.rounds.adapters import LoraRounds

    first = LoraRounds(passed(base, trained=False), True, 0, 3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    def broadcast(values: list[Any]) -> None:
        # The base's hash, at which the first process alone looks; then the factors.
        values[0] = first._base if values[0] is None else copy.deepcopy(first._current())

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    set_seed(99)
    second = LoraRounds(get_peft_model(load(base), lora()), True, 0, 3)
    assert second.fingerprint() == first.fingerprint()
