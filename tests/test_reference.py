"""The reference starts as the policy that was handed in, also where that was changed in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.test_common import METHODS


def changed(base: Path, how: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if how == "merged":
        torch.manual_seed(1)
        adapted: Any = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        return adapted.merge_and_unload().requires_grad_(True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    return model


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("how", ["scaled", "merged"])
@pytest.mark.parametrize("name", ["APO", "SPO", "APO x SPO"])
def test_the_first_loss_is_ln_2(name: str, how: str, ahead: bool, base: Path, tmp_path: Path) -> None:
    method, model = METHODS[name], changed(base, how)
    args = method.config(**tiny.arguments(tmp_path, precompute_ref_log_probs=ahead, **method.arguments))
    trainer = method.trainer(
        model=model, args=args, train_dataset=method.data(), processing_class=tiny.make_tokenizer(), **method.given()
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["APO", "SPO"])
def test_a_given_reference_is_left_alone(name: str, base: Path, tmp_path: Path) -> None:
    method, reference = METHODS[name], tiny.make_model(seed=5)
    before = {key: value.clone() for key, value in reference.state_dict().items()}
    trainer = method.trainer(
        model=changed(base, "scaled"), ref_model=reference, train_dataset=method.data(),
        args=method.config(**tiny.arguments(tmp_path, **method.arguments)), processing_class=tiny.make_tokenizer(),
        **method.given(),
    )  # fmt: skip
    trainer.train()
    assert next(row for row in trainer.state.log_history if "loss" in row)["loss"] != pytest.approx(
        math.log(2), abs=1e-3
    )
    assert all(torch.equal(value, before[key]) for key, value in reference.state_dict().items())
