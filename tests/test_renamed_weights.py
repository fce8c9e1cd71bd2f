"""
Architectures that transformers saves under other names than they have in memory (GPT-NeoX, mixtures of experts):
whatever is loaded is what was saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from tests import tiny
from tests.test_common import METHODS, losses
from trl_extras import APOConfig, APOTrainer
from trl_extras.errors import ConfigurationError


SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def make_model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "GPT-NeoX":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))


@pytest.fixture(scope="module", params=["GPT-NeoX", "Mixtral"])
def renamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("renamed")
    model = make_model(request.param)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert not {name for name, _ in model.named_parameters()} <= set(file.keys()), "nothing is renamed"
    return folder


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """After the checkpoint of that step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def make(name: str, base: Path, folder: Path, **more: Any) -> Any:
    method = METHODS[name]
    callbacks = more.pop("callbacks", None)
    settings = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, **method.arguments, **more}
    return method.trainer(
        model=str(base),
        args=method.config(**tiny.arguments(folder, **settings)),
        train_dataset=method.data(),
        processing_class=tiny.make_tokenizer(),
        callbacks=callbacks,
        **method.given(),
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("step", [2, 3], ids=["at a boundary", "inside a round"])
def test_a_resumed_run_is_the_uninterrupted_one(renamed: Path, tmp_path: Path, name: str, step: int) -> None:
    whole = make(name, renamed, tmp_path / "whole")
    start = {key: tensor.clone() for key, tensor in whole.model.state_dict().items()}
    whole.train()
    with pytest.raises(Killed):
        make(name, renamed, tmp_path / "killed", callbacks=[KillAt(step)]).train()
    resumed = make(name, renamed, tmp_path / "killed")
    resumed.train(resume_from_checkpoint="last")
    assert losses(resumed) == losses(whole)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key
        assert not torch.equal(start[key], tensor), f"{key} was not trained, so that this shows nothing"


@pytest.mark.parametrize("name", ["APO", "SPO"])
def test_the_best_model_is_the_one_that_was_saved(renamed: Path, tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    settings = {"num_rounds": 1} if method.rounds else {}
    bests = []
    for greater in (True, False):
        trainer = method.trainer(
            model=str(renamed),
            args=method.config(
                **tiny.arguments(
                    tmp_path / str(greater), num_train_epochs=1, learning_rate=1e-2, save_strategy="steps",
                    save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                    metric_for_best_model="loss", greater_is_better=greater, **settings,
                )
            ),
            train_dataset=tiny.make_pairs(12),
            eval_dataset=tiny.make_pairs(4, seed=3),
            processing_class=tiny.make_tokenizer(),
        )  # fmt: skip
        trainer.train()
        bests.append(Path(trainer.state.best_model_checkpoint).name)
        saved = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint, dtype=torch.float32)
        assert tiny.same_weights(trainer.model, saved)
    assert bests != ["checkpoint-6"] * 2


def test_kept_iterates_and_what_is_saved_at_the_end(renamed: Path, tmp_path: Path) -> None:
    trainer = make("APO", renamed, tmp_path, keep_iterates=True)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "_rounds/iterates/3"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert tiny.same_weights(trainer.model, loaded)


@pytest.mark.parametrize("method", ["APO", "SPO"])
def test_other_weights_than_those_that_were_saved_are_refused(base: Path, tmp_path: Path, method: str) -> None:
    """A name that upstream does not find keeps what the model was built with."""
    with pytest.raises(Killed):
        make(method, base, tmp_path, callbacks=[KillAt(3)]).train()
    again = make(method, base, tmp_path)
    stock = type(again)._load_from_checkpoint

    def forgets(path: str, model: Any = None) -> None:
        stock(again, path, model)
        with torch.no_grad():
            again.model.model.norm.weight.mul_(0.5)

    again._load_from_checkpoint = forgets
    with pytest.raises(ConfigurationError, match="The weights after loading checkpoint-3 are not those that it was"):
        again.train(resume_from_checkpoint="last")


def test_a_reference_from_disk_is_the_one_that_was_saved(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make("APO", base, tmp_path, callbacks=[KillAt(3)]).train()
    again = make("APO", base, tmp_path)
    again._weights.load_into = lambda reference, folder: None
    with pytest.raises(ValueError, match="The reference in policy is not what was saved there"):
        again.train(resume_from_checkpoint="last")


def test_another_dtype_is_refused_on_a_resume(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make("APO", base, tmp_path, callbacks=[KillAt(3)]).train()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    again = APOTrainer(
        model=model,
        args=APOConfig(
            **tiny.arguments(
                tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=1, **METHODS["APO"].arguments
            )
        ),
        train_dataset=METHODS["APO"].data(),
        processing_class=tiny.make_tokenizer(),
    )
    with pytest.raises(ConfigurationError, match="in the same dtype"):
        again.train(resume_from_checkpoint="last")
