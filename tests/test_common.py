"""
What every method promises for full weights, for a `peft_config` and for a PeftModel that is passed: it trains what it
should and nothing else, a killed run that is resumed is the uninterrupted one, plain transformers and peft load what
it leaves, and its limit is TRL's trainer. A new method adds an entry to `METHODS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests import tiny
from trl_extras import (
    APOConfig,
    APOSPOConfig,
    APOSPOTrainer,
    APOTrainer,
    SPOConfig,
    SPOTrainer,
    SPRConfig,
    SPRTrainer,
)


def threes(completions: list[str], **kwargs: Any) -> list[float]:
    """Words that end in a 3."""
    return [float(sum(word.endswith("3") for word in text.split())) for text in completions]


def pairs() -> Any:
    return tiny.make_pairs(12)


class Method(NamedTuple):
    trainer: Any
    config: Any
    data: Callable[[], Any]
    # Six steps of two rows: three rounds of two steps, where there are rounds.
    arguments: dict[str, Any]
    given: Callable[[], dict[str, Any]]
    # Arguments with which it is TRL's trainer on the same rows.
    limit: dict[str, Any]
    stock: Any = DPOTrainer
    stock_config: Any = DPOConfig
    rounds: bool = True


SPO = {"sft_coef": 1.0, "sft_batch_size": 2}
METHODS = {
    "APO": Method(
        APOTrainer,
        APOConfig,
        pairs,
        {"num_rounds": 3, "extrapolation_alpha": [0.3, 0.7, 0.0]},
        dict,
        {"num_rounds": 1},
    ),
    "SPO": Method(
        SPOTrainer,
        SPOConfig,
        pairs,
        {"num_train_epochs": 1, **SPO},
        lambda: {"sft_dataset": tiny.make_sft_rows()},
        {"num_train_epochs": 1, "sft_coef": 0.0},
        rounds=False,
    ),
    "APO x SPO": Method(
        APOSPOTrainer,
        APOSPOConfig,
        pairs,
        {"num_rounds": 3, "extrapolation_alpha": [0.3, 0.7, 0.0], **SPO},
        lambda: {"sft_dataset": tiny.make_sft_rows()},
        {"num_rounds": 1, "sft_coef": 0.0},
    ),
    "SPR": Method(
        SPRTrainer,
        SPRConfig,
        lambda: tiny.make_pairs(12).select_columns(["prompt"]),
        {"num_rounds": 3, "num_generations": 2, "prompts_per_round": 2, "max_completion_length": 5},
        lambda: {"reward_funcs": threes},
        # Responses of one reward: weights of one.
        {"num_rounds": 1, "num_generations": 0},
        SFTTrainer,
        SFTConfig,
    ),
}
WAYS = ("full", "LoRA", "passed PeftModel")
KILLED_AT = 4


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)


def model_of(way: str, base: Path) -> dict[str, Any]:
    """The arguments that say what is trained."""
    if way == "full":
        return {"model": str(base)}
    if way == "LoRA":
        return {"model": str(base), "peft_config": lora()}
    set_seed(3)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # Trained before: it changes the model.
                parameter.normal_(std=0.05)
    return {"model": model}


def make(way: str, method: Method, base: Path, folder: Path, **more: Any) -> Any:
    callbacks = more.pop("callbacks", None)
    arguments = {"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 3, **method.arguments, **more}
    return method.trainer(
        args=method.config(**tiny.arguments(folder, **arguments)),
        train_dataset=method.data(),
        processing_class=tiny.make_tokenizer(),
        callbacks=callbacks,
        **model_of(way, base),
        **method.given(),
    )


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Run(NamedTuple):
    """An uninterrupted run: the trainer afterwards, and the weights before."""

    trainer: Any
    before: dict[str, torch.Tensor]
    folder: Path


@pytest.fixture(scope="module")
def run_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """One for all tests of the same method and way."""

    @functools.cache
    def run(way: str, name: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        trainer = make(way, METHODS[name], base, folder)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train()
        return Run(trainer, before, folder)

    return run


every_method = pytest.mark.parametrize("name", METHODS)
every_way = pytest.mark.parametrize("way", WAYS)


@every_method
@every_way
def test_it_trains_what_it_should(run_of: Callable[[str, str], Run], base: Path, way: str, name: str) -> None:
    trainer, before, _ = run_of(way, name)
    assert trainer.state.global_step == 6
    after = trainer.model.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    if way == "full":
        assert moved == {name for name, _ in trainer.model.named_parameters()} | {"lm_head.weight"}
        return
    trained = {name for name in after if ".default" in name}
    assert moved == trained
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == trained
    # TRL's copy of an adapter that is passed is the reference of one round, and nothing more.
    assert set(trainer.model.peft_config) - {"default"} == (
        {"ref"} if way == "passed PeftModel" and not METHODS[name].rounds else set()
    )
    start = model_of(way, base)["model"]
    if isinstance(start, str):
        start = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    assert relative(logits(trainer.model), logits(start)) > 1e-2


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            raise Killed


@every_method
@every_way
def test_killed_and_resumed_is_uninterrupted(
    run_of: Callable[[str, str], Run], base: Path, tmp_path: Path, way: str, name: str
) -> None:
    """In the middle of the second round, where there are rounds: what comes after is the same, to the bit."""
    whole = run_of(way, name).trainer
    with pytest.raises(Killed):
        make(way, METHODS[name], base, tmp_path, callbacks=[Kill()]).train()
    resumed = make(way, METHODS[name], base, tmp_path)
    resumed.train(resume_from_checkpoint="last")
    assert losses(resumed) == losses(whole)
    wanted, found = whole.model.state_dict(), resumed.model.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    assert torch.equal(logits(resumed.model), logits(whole.model))


@every_method
@every_way
def test_what_is_saved_is_loaded_plainly(
    run_of: Callable[[str, str], Run], base: Path, tmp_path: Path, way: str, name: str
) -> None:
    trainer = run_of(way, name).trainer
    trainer.save_model(str(tmp_path))
    if way == "full":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    else:
        original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(original, str(tmp_path))
        with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
            assert all(".lora_" in key for key in file.keys())  # noqa: SIM118
        assert not (tmp_path / "model.safetensors").exists()
        # Outside of rounds TRL leaves its copy there.
        assert not METHODS[name].rounds or not (tmp_path / "ref").exists()
    assert relative(logits(loaded), logits(trainer.model)) < 1e-5


@every_method
@every_way
def test_its_limit_is_the_stock_trainer(base: Path, tmp_path: Path, way: str, name: str) -> None:
    """One round, or a floor that counts nothing, or equal weights; a PeftModel that is passed trains on."""
    method = METHODS[name]
    common = {"learning_rate": 5e-3, "train_sampling_strategy": "sequential"}
    data = pairs() if method.stock is DPOTrainer else tiny.make_sft_rows(12)
    stock = method.stock(
        args=method.stock_config(**tiny.arguments(tmp_path / "stock", num_train_epochs=1, **common)),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **model_of(way, base),
    )
    stock.train()
    scored = data.add_column("reward", [1.0] * len(data)) if method.stock is SFTTrainer else data
    ours = method.trainer(
        args=method.config(**tiny.arguments(tmp_path / "ours", **common, **method.limit)),
        train_dataset=scored,
        processing_class=tiny.make_tokenizer(),
        **model_of(way, base),
    )
    ours.train()
    assert losses(ours) == losses(stock)
    wanted, found = stock.model.state_dict(), ours.model.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
