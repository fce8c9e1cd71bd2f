"""Adapters on a base of four bits: rounds and objectives are the same, and the quantised base never changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from tests import tiny
from tests.test_common import METHODS, Kill, Killed, logits, lora, losses, relative


Linear4bit = pytest.importorskip("bitsandbytes").nn.Linear4bit

every_method = pytest.mark.parametrize("name", METHODS)
every_way = pytest.mark.parametrize("way", ["QLoRA", "passed PeftModel"])


def quantized(base: Path) -> Any:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On processors with AVX-512 bf16 evaluation repacks the base in place, rounding its scales, and wants
            # widths of whole blocks.
            module.support_avx512bf16_for_cpu = False
    return model


def make(way: str, name: str, base: Path, folder: Path, **more: Any) -> Any:
    method, callbacks = METHODS[name], more.pop("callbacks", None)
    given: dict[str, Any] = {"model": quantized(base), "peft_config": lora()}
    if way != "QLoRA":
        set_seed(3)
        given = {"model": get_peft_model(given["model"], lora())}
    arguments = {"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 3, **method.arguments, **more}
    return method.trainer(
        args=method.config(**tiny.arguments(folder, **arguments)),
        train_dataset=method.data(),
        processing_class=tiny.make_tokenizer(),
        callbacks=callbacks,
        **given,
        **method.given(),
    )


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}


@every_method
@every_way
def test_the_adapter_moves_alone_and_a_killed_run_goes_on(base: Path, tmp_path: Path, way: str, name: str) -> None:
    whole = make(way, name, base, tmp_path / "whole")
    before = copies(whole.model)
    assert any(tensor.dtype == torch.uint8 for tensor in before.values())
    whole.train()
    after = copies(whole.model)
    adapter = {key for key in before if ".default" in key}
    assert {key for key, tensor in after.items() if not torch.equal(tensor, before[key])} == adapter

    with pytest.raises(Killed):
        make(way, name, base, tmp_path / "out", callbacks=[Kill()]).train()
    resumed = make(way, name, base, tmp_path / "out")
    resumed.train(resume_from_checkpoint="last")
    assert losses(resumed) == losses(whole)
    found = copies(resumed.model)
    assert found.keys() == after.keys()
    for key, tensor in after.items():
        assert torch.equal(found[key], tensor), key
    assert torch.equal(logits(resumed.model), logits(whole.model))

    # TRL trains these adapters in bfloat16, and peft loads every adapter in float32: rounding, of 4 in 1,000 of what
    # the adapter changes here, 3 for DPOTrainer's own.
    resumed.save_model()
    loaded = PeftModel.from_pretrained(quantized(base), str(tmp_path / "out"))
    wanted, start = logits(whole.model), logits(quantized(base))
    assert float((logits(loaded) - wanted).norm() / (wanted - start).norm()) < 2e-2
    assert relative(wanted, start) > 1e-2


def test_a_quantised_base_is_not_merged_into(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`adapter_output` is 'merged', but the base is quantized"):
        make("QLoRA", "APO", base, tmp_path, adapter_output="merged")


@pytest.mark.parametrize("name", ["SPO", "APO x SPO"])
@pytest.mark.parametrize("solver", ["unrolled", "alternating"])
def test_inner_steps_in_bfloat16_are_refused(base: Path, tmp_path: Path, name: str, solver: str) -> None:
    with pytest.raises(ValueError, match="TRL trains the adapter of a quantized model in bfloat16"):
        make("QLoRA", name, base, tmp_path, bilevel_solver=solver, inner_learning_rate=0.01)


def test_a_quantised_model_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    method = METHODS["APO"]
    with pytest.raises(ValueError, match="A quantized model does not work with more than one round"):
        method.trainer(
            model=quantized(base),
            args=method.config(**tiny.arguments(tmp_path, num_rounds=2)),
            train_dataset=method.data(),
            processing_class=tiny.make_tokenizer(),
        )
