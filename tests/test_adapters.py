"""Rounds with LoRA, through the real trainers: the sum of the rounds' changes, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
