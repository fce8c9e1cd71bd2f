"""
Rounds with LoRA for each kind of layer, against dense weights; and what a run leaves, takes up again and refuses.

The first half has no trainer: three rounds of made-up changes on a small model, whose weights the reference makes by
adding dense matrices.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.reference import low_rank as reference
from trl_extras.errors import ConfigurationError
from trl_extras.rounds.adapters import LoraRounds, why_not
from trl_extras.rounds.state import base_fingerprint


ALPHAS = [0.3, 0.7]


class Single(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Case(NamedTuple):
    """A model without an adapter, its input, and where the adapter goes."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    lora: dict[str, Any] = {"target_modules": ["layer"]}  # noqa: RUF012
    merges: bool = True


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def tokens() -> Tensor:
    return torch.arange(3, 11).view(2, 4)


CASES = {
    "linear": Case(lambda: Single(nn.Linear(6, 5)), lambda: torch.randn(3, 6)),
    "linear of three dimensions, rsLoRA": Case(
        lambda: Single(nn.Linear(6, 5, bias=False)),
        lambda: torch.randn(2, 3, 6),
        {"target_modules": ["layer"], "use_rslora": True, "lora_alpha": 3},
    ),
    "linear of one dimension": Case(lambda: Single(nn.Linear(6, 5)), lambda: torch.randn(6)),
    "transformers Conv1D": Case(
        lambda: Single(Conv1D(5, 6)),
        lambda: torch.randn(2, 3, 6),
        {"target_modules": ["layer"], "fan_in_fan_out": True},
    ),
    "embedding": Case(lambda: Single(nn.Embedding(12, 6, padding_idx=0)), tokens),
    "scaled embedding": Case(lambda: Single(Gemma3TextScaledWordEmbedding(12, 6, 0, embed_scale=2.5)), tokens),
    "embedding scaled by a float": Case(lambda: Single(BartScaledWordEmbedding(12, 6, 0, embed_scale=2.5)), tokens),
    "conv1d": Case(lambda: Single(nn.Conv1d(4, 6, 3, stride=2, padding=1)), lambda: torch.randn(2, 4, 9)),
    "conv1d, 2 groups": Case(
        lambda: Single(nn.Conv1d(4, 6, 3, padding=1, groups=2)), lambda: torch.randn(2, 4, 9), merges=False
    ),
    "conv2d": Case(lambda: Single(nn.Conv2d(4, 6, (3, 2), stride=2)), lambda: torch.randn(2, 4, 7, 7)),
    "conv2d of one place": Case(lambda: Single(nn.Conv2d(4, 6, 1)), lambda: torch.randn(2, 4, 3, 3)),
    "conv2d, 4 groups": Case(
        lambda: Single(nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False)),
        lambda: torch.randn(2, 4, 5, 5),
        merges=False,
    ),
    "conv3d": Case(lambda: Single(nn.Conv3d(2, 3, 2)), lambda: torch.randn(2, 2, 3, 3, 3)),
    "GPT-2": Case(_gpt2, tokens, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Llama": Case(
        lambda: tiny.make_model(tied=False),
        tokens,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"q_proj": 3, "embed_tokens": 1},
            "alpha_pattern": {"q_proj": 5, "v_proj": 1},
        },
    ),
}
MERGING = [name for name, case in CASES.items() if case.merges]


class Made(NamedTuple):
    rounds: LoraRounds
    model: Any
    x: Tensor
    # The models with dense weights: without an adapter, theta_2 (the reference of the third round), thetahat_3.
    start: nn.Module
    theta: nn.Module
    thetahat: nn.Module


def adapted(case: Case, dtype: torch.dtype, base: nn.Module | None = None) -> Any:
    torch.manual_seed(1)
    base = case.make().to(dtype) if base is None else base
    with warnings.catch_warnings():
        # peft says that it cannot merge grouped convolutions.
        warnings.simplefilter("ignore")
        return get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **case.lora}))


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """A made-up round: the adapter becomes one that changes the layers about as much as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn)


def dense_changes(model: Any) -> dict[str, Tensor]:
    """What each layer's adapter adds to its weight, by the weight's name in the base model."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            if "default" in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            # peft's definition, not its attribute: what the layer has to be scaled by.
            rank = len(a)
            config = model.peft_config["default"]
            alpha = next((v for k, v in config.alpha_pattern.items() if name.endswith(k)), config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            # 64 bits, so that the reference's own rounding does not count.
            change = reference.weight_change(layer.get_base_layer(), a.double(), b.double(), scaling)
            found[f"{name}.weight"] = change
    return found


def with_changes(start: nn.Module, changes: dict[str, Tensor]) -> nn.Module:
    """A copy of the plain model with changes added to its weights."""
    model = copy.deepcopy(start)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name).add_(change)
    return model


def three_rounds(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> Made:
    """Two rounds that are over, extrapolated, and a third that has been trained; and the same by dense weights."""
    case = CASES[name]
    torch.manual_seed(2)
    x = case.x()
    x = x.to(dtype) if x.is_floating_point() else x
    model = adapted(case, dtype)
    start = reference.ungrouped(copy.deepcopy(model).unload()).double()
    rounds = LoraRounds(model, passed=False, seed=0, num_rounds=3)
    rounds.begin(fresh=True)
    rounds.save(folder / "0", True)
    changes = []
    for t in range(3):
        randomize(model, t)
        changes.append(dense_changes(model))
        if t < 2:
            rounds.save(folder / str(t + 1), True)
            rounds.rebase()
            rounds.extrapolate(folder / str(t), ALPHAS[t])
    walks = {key: reference.walk([change[key] for change in changes], ALPHAS) for key in changes[0]}
    theta = with_changes(start, {key: policies[1] for key, (_, policies) in walks.items()})
    thetahat = with_changes(start, {key: iterates[2] for key, (iterates, _) in walks.items()})
    model.eval()
    return Made(rounds, model, x, start.eval(), theta.eval(), thetahat.eval())


def outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    return (result if isinstance(result, Tensor) else result.logits).double()


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    return outputs(model, x.double() if x.is_floating_point() else x)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def near(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]


def loaded(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    """The saved adapter on the original base, by plain peft."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(case.make().to(dtype), folder).eval()


# ---- Forward, backward ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_dense_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """For a bf16 base the adapter is in float32, as peft makes it."""
    _rounds, model, x, start, theta, thetahat = three_rounds(name, tmp_path, dtype)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32 if dtype == torch.bfloat16 else dtype}
    expected = by_hand(thetahat, x)
    # A whole bf16 model rounds in every layer.
    bound = 0.1 if dtype == torch.bfloat16 and name in ("GPT-2", "Llama") else near(dtype)
    assert relative(by_hand(start, x), expected) > 0.2
    assert relative(by_hand(theta, x), expected) > 0.2
    assert relative(outputs(model, x), expected) < bound
    with model.disable_adapter():
        assert relative(outputs(model, x), by_hand(theta, x)) < bound
    assert relative(outputs(model, x), expected) < bound


@pytest.mark.parametrize("name", CASES)
def test_forward_under_autocast(name: str, tmp_path: Path) -> None:
    rounds, model, x, _start, theta, thetahat = three_rounds(name, tmp_path, torch.float32)
    rounds.save(tmp_path / "saved", True)
    plain = loaded(CASES[name], tmp_path / "saved", torch.float32)
    bound = 0.1 if name in ("GPT-2", "Llama") else near(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, peft = model(x), plain(x)
        ours, peft = (r if isinstance(r, Tensor) else r.logits for r in (ours, peft))
        assert ours.dtype == peft.dtype
        assert relative(ours, by_hand(thetahat, x)) < bound
        with model.disable_adapter():
            assert relative(outputs(model, x), by_hand(theta, x)) < bound


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_on_merged_weights(name: str, tmp_path: Path) -> None:
    """The adapter's gradients on a history are those on a base whose weights hold it; the history has none."""
    _rounds, model, x, _start, theta, _thetahat = three_rounds(name, tmp_path)
    dense, leaves = {}, {}
    base = dict(theta.named_parameters())
    for key, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            own = (
                (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
                if "default" in layer.lora_embedding_A
                else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            )
            copies = [p.detach().clone().requires_grad_() for p in own]
            leaves[key] = (own, copies)
            change = reference.weight_change(layer.get_base_layer(), *copies, layer.scaling["default"])
            dense[f"{key}.weight"] = base[f"{key}.weight"].detach() + change

    def loss(result: Any) -> Tensor:
        result = result if isinstance(result, Tensor) else result.logits
        return (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)).sum()

    ours, hand = loss(model(x)), loss(functional_call(theta, dense, (x,)))
    assert ours.item() == pytest.approx(hand.item(), rel=1e-10)
    ours.backward()
    hand.backward()
    for own, copies in leaves.values():
        for parameter, copied in zip(own, copies, strict=True):
            assert copied.grad.norm() > 0
            assert relative(parameter.grad, copied.grad) < 1e-10
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    def step(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, x = three_rounds("Llama", tmp_path / str(checkpointing))[1:3]
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        loss = model(x, labels=x).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = step(False), step(True)
    assert torch.equal(plain[0], checkpointed[0])
    assert plain[1].keys() == checkpointed[1].keys()
    assert all(torch.equal(gradient, checkpointed[1][name]) for name, gradient in plain[1].items())


def test_dropout_is_the_adapters_alone(tmp_path: Path) -> None:
    """In training, too, the history is not dropped: with an adapter of no change, outputs are theta's."""
    case = CASES["linear"]
    model = adapted(case._replace(lora={**case.lora, "lora_dropout": 0.5}), torch.float64)
    rounds = LoraRounds(model, passed=False, seed=0, num_rounds=2)
    randomize(model, 0)
    model.eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = outputs(model, x)
    rounds.rebase()
    model.train()
    assert relative(outputs(model, x), before) < 1e-12


# ---- What is saved ----


@pytest.mark.parametrize("name", CASES)
def test_plain_peft_loads_the_whole_on_the_original_base(name: str, tmp_path: Path) -> None:
    rounds, model, x, start, _theta, thetahat = three_rounds(name, tmp_path, torch.float32)
    rounds.save(tmp_path / "saved", True)
    model.save_pretrained(tmp_path / "by the model")
    plain = loaded(CASES[name], tmp_path / "saved", torch.float32)
    assert relative(outputs(plain, x), outputs(model, x)) < 1e-5
    assert relative(outputs(plain, x), by_hand(thetahat, x)) < 1e-5
    with plain.disable_adapter():
        assert relative(outputs(plain, x), by_hand(start, x)) < 1e-5
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "by the model" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    # The live adapter and its configuration are as before.
    assert model.peft_config["default"].r == 4
    assert relative(outputs(model, x), by_hand(thetahat, x)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_saved_state_is_the_state(name: str, tmp_path: Path) -> None:
    rounds, model, x, start, _theta, _thetahat = three_rounds(name, tmp_path, torch.float32)
    rounds.save(tmp_path / "saved", True)
    fingerprint, vector, expected = rounds.fingerprint(), rounds._vector(), outputs(model, x)
    other = LoraRounds(adapted(CASES[name], torch.float32), passed=False, seed=5, num_rounds=3)
    assert other.fingerprint() != fingerprint
    other.load(tmp_path / "saved")
    assert other.fingerprint() == fingerprint
    assert other._vector() == vector
    assert torch.equal(outputs(other.model.eval(), x), expected)
    # And back to where the same object has been: the history goes, too.
    rounds.load(tmp_path / "0")
    assert relative(outputs(model, x), by_hand(start, x)) < 1e-5
    rounds.load(tmp_path / "saved")
    assert rounds.fingerprint() == fingerprint
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize("change", ["adapter", "coefficient", "history", "base"])
def test_a_fingerprint_tells_policies_apart(change: str, tmp_path: Path) -> None:
    def make(seed: int, alpha: float, base: int) -> str:
        torch.manual_seed(base)
        model = adapted(CASES["linear"], torch.float32, Single(nn.Linear(6, 5)))
        rounds = LoraRounds(model, passed=False, seed=0, num_rounds=3)
        folder = tmp_path / f"{seed} {alpha} {base}"
        rounds.save(folder, True)
        randomize(model, seed)
        rounds.rebase()
        rounds.extrapolate(folder, alpha)
        if change == "adapter" and seed:
            randomize(model, seed)
        return rounds.fingerprint()

    first = make(0, 0.5, 0)
    assert make(0, 0.5, 0) == first
    other = {"adapter": (1, 0.5, 0), "coefficient": (0, 0.6, 0), "history": (1, 0.5, 0), "base": (0, 0.5, 1)}
    assert make(*other[change]) != first


@pytest.mark.parametrize("name", ["linear", "conv1d, 2 groups", "embedding", "Llama"])
def test_a_held_reference_stays(name: str, tmp_path: Path) -> None:
    """What is evaluated after the last extrapolation is measured against the last round's reference."""
    rounds, model, x, _, theta, thetahat = three_rounds(name, tmp_path)
    rounds.save(tmp_path / "3", True)
    rounds.rebase(hold_reference=True)
    assert relative(outputs(model, x), by_hand(thetahat, x)) < 1e-12
    rounds.extrapolate(tmp_path / "2", 0.5)
    assert relative(outputs(model, x), by_hand(thetahat, x)) > 0.01
    with model.disable_adapter():
        assert relative(outputs(model, x), by_hand(theta, x)) < 1e-12
    rounds.load(tmp_path / "3")
    assert relative(outputs(model, x), by_hand(thetahat, x)) < 1e-12
    with model.disable_adapter():
        assert relative(outputs(model, x), by_hand(theta, x)) < 1e-12


@pytest.mark.parametrize("name", ["linear of three dimensions, rsLoRA", "conv1d, 2 groups", "embedding", "Llama"])
def test_distances_are_those_of_the_dense_weights(name: str, tmp_path: Path) -> None:
    model = adapted(CASES[name], torch.float64)
    rounds = LoraRounds(model, passed=False, seed=0, num_rounds=3)
    rounds.save(tmp_path / "iterate 0", True)
    rounds.save(tmp_path / "policy 0", True)
    changes, measured = [], []
    for t in range(3):
        randomize(model, t)
        changes.append(torch.cat([change.flatten() for change in dense_changes(model).values()]))
        folders = [tmp_path / f"policy {t}", tmp_path / f"iterate {t}", tmp_path / f"policy {t - 1}" if t else None]
        measured.append(rounds.distances(*folders))
        rounds.save(tmp_path / f"iterate {t + 1}", True)
        rounds.rebase()
        rounds.extrapolate(tmp_path / f"iterate {t}", [*ALPHAS, 0.0][t])
        rounds.save(tmp_path / f"policy {t + 1}", True)
    iterates, policies = reference.walk(changes, ALPHAS)
    iterates, policies = [changes[0] * 0, *iterates], [changes[0] * 0, *policies]
    for t, got in enumerate(measured):
        update, momentum = iterates[t + 1] - policies[t], iterates[t + 1] - iterates[t]
        assert got["update_norm"] == pytest.approx(float(update.norm()), rel=1e-9)
        assert got["momentum_norm"] == pytest.approx(float(momentum.norm()), rel=1e-9)
        if t == 0:
            assert got["update_cosine"] is None
        else:
            before = iterates[t] - policies[t - 1]
            assert got["update_cosine"] == pytest.approx(
                float(update @ before / update.norm() / before.norm()), rel=1e-9, abs=1e-12
            )


# ---- Merged ----


@pytest.mark.parametrize("name", MERGING)
def test_merging_takes_history_and_adapter_together(name: str, tmp_path: Path) -> None:
    _rounds, model, x, _start, theta, thetahat = three_rounds(name, tmp_path)
    expected = by_hand(thetahat, x)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    merged = dict(model.get_base_model().named_parameters())
    for weight, wanted in thetahat.named_parameters():
        path = weight.rpartition(".")
        own = merged.get(weight, merged.get(f"{path[0]}.base_layer.{path[2]}"))
        assert torch.allclose(own, wanted, rtol=1e-10, atol=1e-12), weight
    assert relative(outputs(model, x), expected) < 1e-12
    model.unmerge_adapter()
    assert all(relative(p, kept[n]) < 1e-12 for n, p in model.named_parameters() if kept[n].any())
    assert relative(outputs(model, x), expected) < 1e-12
    # Disabling unmerges; then the reference is the history alone.
    model.merge_adapter()
    with model.disable_adapter():
        assert relative(outputs(model, x), by_hand(theta, x)) < 1e-12
    plain = model.merge_and_unload()
    assert not any("lora" in n for n, _ in plain.named_parameters())
    assert relative(outputs(plain, x), expected) < 1e-12


@pytest.mark.parametrize("name", ["linear", "embedding", "Llama"])
def test_unloading_leaves_no_hooks(name: str, tmp_path: Path) -> None:
    _rounds, model, x, start, _theta, thetahat = three_rounds(name, tmp_path)
    copied = copy.deepcopy(model)
    assert relative(outputs(copied.unload(), x), by_hand(start, x)) < 1e-12
    assert relative(outputs(model, x), by_hand(thetahat, x)) < 1e-12
    plain = model.merge_and_unload()
    assert not any(module._forward_hooks for module in plain.modules())
    assert relative(outputs(plain, x), by_hand(thetahat, x)) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_a_copy_has_a_history_of_its_own(name: str, tmp_path: Path) -> None:
    rounds, model, x, _start, _theta, _thetahat = three_rounds(name, tmp_path, torch.float32)
    copied = copy.deepcopy(model)
    before = outputs(copied, x)
    assert torch.equal(before, outputs(model, x))
    # The original goes on.
    rounds.save(tmp_path / "3", True)
    rounds.rebase()
    rounds.extrapolate(tmp_path / "2", 0.9)
    randomize(model, 9)
    assert relative(outputs(model, x), before) > 0.05
    assert torch.equal(outputs(copied, x), before)
    copied.save_pretrained(tmp_path / "copy")
    assert relative(outputs(loaded(CASES[name], tmp_path / "copy", torch.float32), x), before) < 1e-5
    randomize(copied, 10)
    changed = outputs(copied, x)
    copied.save_pretrained(tmp_path / "copy")
    assert relative(outputs(loaded(CASES[name], tmp_path / "copy", torch.float32), x), changed) < 1e-5
    if CASES[name].merges:
        assert relative(outputs(copied.merge_and_unload(), x), changed) < 1e-5


# ---- The output: truncated, merged ----


@pytest.mark.parametrize("name", CASES)
def test_a_truncated_adapter_is_the_svd_of_the_dense_change(name: str, tmp_path: Path) -> None:
    """With the relative error of the whole model's change; 40 is more rank than these layers can have."""
    rounds, model, x, start, _theta, thetahat = three_rounds(name, tmp_path)
    before = dict(start.named_parameters())
    changes = {n: p.detach() - before[n].detach() for n, p in thetahat.named_parameters()}
    changes = {n: change for n, change in changes.items() if change.any()}
    for rank in (4, 40):
        *_, error = rounds.truncated(rank)
        left_out = whole = 0.0
        expected = {}
        for key, change in changes.items():
            groups = rounds._current()[f"base_model.model.{key.removesuffix('.weight')}"].a.shape[0]
            matrix = change[None] if change.dim() == 2 else change.reshape(groups, change.shape[0] // groups, -1)
            truncated, squared = reference.truncated(matrix, rank // groups)
            expected[key] = truncated.reshape(change.shape)
            left_out, whole = left_out + squared, whole + float((change**2).sum())
        assert error == pytest.approx(math.sqrt(left_out / whole), rel=1e-6, abs=1e-12)
        rounds.set_output(rank, merged=False)
        model.save_pretrained(tmp_path / "truncated")
        assert json.loads((tmp_path / "truncated/adapter_config.json").read_text())["r"] == rank
        plain = loaded(CASES[name], tmp_path / "truncated", torch.float64)
        assert relative(outputs(plain, x), by_hand(with_changes(start, expected), x)) < 1e-6
    # The run's own state is never truncated.
    rounds.save(tmp_path / "whole", True)
    whole_again = loaded(CASES[name], tmp_path / "whole", torch.float64)
    assert relative(outputs(whole_again, x), by_hand(thetahat, x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 40])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_merged_output_is_float32(name: str, dtype: torch.dtype, rank: int | None, tmp_path: Path) -> None:
    rounds, model, x, start, _theta, thetahat = three_rounds(name, tmp_path, dtype)
    rounds.check_merge()
    rounds.set_output(rank, merged=True)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.float32}
    wanted = dict(thetahat.named_parameters())
    for key, parameter in merged.named_parameters():
        assert torch.allclose(parameter.double(), wanted[key], rtol=1e-6, atol=1e-6), key
    if dtype == torch.float32:
        # Casting a model to bf16 rounds the buffers of its rotary embedding, which are made anew here.
        assert relative(outputs(merged, x), by_hand(thetahat, x)) < 1e-5
    assert merged.config.tie_word_embeddings == start.config.tie_word_embeddings
    # What is in memory is the adapter on its base, still.
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {dtype}


def test_a_policy_that_is_the_base_is_saved_truncated_and_merged(tmp_path: Path) -> None:
    model = adapted(CASES["Llama"], torch.float32).eval()
    rounds = LoraRounds(model, passed=False, seed=0, num_rounds=2)
    rounds.rebase()
    expected = outputs(model, tokens())
    for rank, merged in ((None, False), (2, False), (None, True), (2, True)):
        rounds.set_output(rank, merged)
        folder = tmp_path / f"{rank} {merged}"
        model.save_pretrained(folder)
        again: Any = (
            AutoModelForCausalLM.from_pretrained(folder) if merged else loaded(CASES["Llama"], folder, torch.float32)
        )
        assert relative(outputs(again, tokens()), expected) < 1e-6


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_is_refused_where_a_weight_is_shared(target: str) -> None:
    case = Case(tiny.make_model, tokens, {"target_modules": ["q_proj", target]})
    with pytest.raises(ConfigurationError, match=f"{target}.*shares") as error:
        LoraRounds(adapted(case, torch.float32), passed=False, seed=0, num_rounds=2).check_merge()
    assert "\n" not in str(error.value)
    untied = case._replace(make=lambda: tiny.make_model(tied=False))
    LoraRounds(adapted(untied, torch.float32), passed=False, seed=0, num_rounds=2).check_merge()


def test_merging_is_refused_for_grouped_convolutions() -> None:
    """A change of low rank couples all inputs there, for which the weight has no place."""
    rounds = LoraRounds(adapted(CASES["conv1d, 2 groups"], torch.float32), passed=False, seed=0, num_rounds=2)
    with pytest.raises(ConfigurationError, match="2 groups"):
        rounds.check_merge()


def test_merging_is_refused_where_the_files_are_quantized() -> None:
    rounds = LoraRounds(adapted(CASES["Llama"], torch.float32), passed=False, seed=0, num_rounds=2)
    rounds.check_merge()
    rounds.model.get_base_model().is_quantized = True
    with pytest.raises(ConfigurationError, match="the base is quantized"):
        rounds.check_merge()


def test_an_embedding_that_writes_to_itself_is_refused() -> None:
    model = adapted(CASES["embedding"], torch.float32, Single(nn.Embedding(12, 6, max_norm=1.0)))
    with pytest.raises(ConfigurationError, match=r"layer is an embedding with `max_norm`"):
        LoraRounds(model, passed=False, seed=0, num_rounds=2)


def test_a_rank_is_refused_that_groups_cannot_share() -> None:
    rounds = LoraRounds(adapted(CASES["conv2d, 4 groups"], torch.float32), passed=False, seed=0, num_rounds=2)
    rounds.check_rank(8)
    with pytest.raises(ConfigurationError, match=r"`adapter_rank` is 6, but .*4 groups.*multiple"):
        rounds.check_rank(6)


# ---- Through the trainer: what a run leaves ----


LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
FAST = {"num_rounds": 2, "num_train_epochs": 1, "learning_rate": 5e-3, "per_device_train_batch_size": 4}


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, **kwargs})


def ids() -> Tensor:
    return torch.arange(4, 20)[None]


def base_model(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_ends_merged(make_apo: Callable[..., Any], base: Path, tmp_path: Path, bf16: bool) -> None:
    given = {"model": base_model(base, torch.bfloat16)} if bf16 else {}
    trainer = make_apo(
        peft_config=lora(), adapter_output="merged", extrapolation_alpha=[0.5], save_strategy="epoch", **FAST, **given
    )
    trainer.train()
    trainer.save_model()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.dtype == torch.float32
    assert not (tmp_path / "out/adapter_config.json").exists()
    change = trainer._weights._summed(trainer._weights._vector())
    start = base_model(base, torch.bfloat16 if bf16 else torch.float32).state_dict()
    names = {f"{name.removeprefix('base_model.model.')}.weight": f for name, f in change.items()}
    assert len(names) == 2
    for name, tensor in merged.state_dict().items():
        expected = start[name].double()
        if name in names:
            difference = names[name].b.double() @ names[name].a.double()
            expected = expected + difference
            # bf16 weights would lose most of it.
            assert relative(tensor.double() - start[name].double(), difference) < 1e-3
        assert relative(tensor, expected) < 1e-6
    expected_logits = outputs(trainer.model.eval(), ids())
    assert relative(outputs(merged, ids()), expected_logits) < (0.1 if bf16 else 1e-5)
    # Checkpoints hold adapters, the last one too.
    last = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    assert (last / "adapter_model.safetensors").exists()
    assert not (last / "model.safetensors").exists()
    again = PeftModel.from_pretrained(base_model(base), last).eval()
    assert relative(outputs(again, ids()), expected_logits) < (0.1 if bf16 else 1e-5)


def test_a_finished_trainer_that_goes_on_checkpoints_adapters(make_apo: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_apo(peft_config=lora(), adapter_output="merged", save_strategy="epoch", **FAST)
    trainer.train()
    first = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    trainer.train(resume_from_checkpoint=str(first))
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "model.safetensors").exists()


def test_a_run_ends_truncated(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    settings = {"peft_config": lora(), "extrapolation_alpha": [0.5], **FAST}
    trainer = make_apo(adapter_rank=3, adapter_rank_tolerance=0.9, **settings)
    trainer.train()
    trainer.save_model()
    weights = trainer._weights
    left_out = whole = 0.0
    expected = base_model(base)
    for name, factors in weights._summed(weights._vector()).items():
        change = reference.dense(factors.a[None].double(), factors.b[None].double())
        near_change, squared = reference.truncated(change, 3)
        left_out, whole = left_out + squared, whole + float((change**2).sum())
        with torch.no_grad():
            expected.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").add_(near_change[0])
    row = rows_of(tmp_path / "out")[-1]
    assert row["adapter_rank_error"] == pytest.approx(math.sqrt(left_out / whole), rel=1e-5)
    assert 0 < row["adapter_rank_error"] < 0.9
    saved = PeftModel.from_pretrained(base_model(base), tmp_path / "out").eval()
    assert saved.peft_config["default"].r == 3
    assert relative(outputs(saved, ids()), outputs(expected.eval(), ids())) < 1e-5


def test_truncation_beyond_the_bound_saves_the_whole_and_refuses(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    trainer = make_apo(peft_config=lora(), adapter_rank=1, adapter_rank_tolerance=1e-6, **FAST)
    with pytest.raises(ConfigurationError, match=r"`adapter_rank` is 1, .*rank 4.*tolerance` is 1e-06") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert rows_of(tmp_path / "out")[-1]["adapter_rank_error"] > 1e-6
    whole = PeftModel.from_pretrained(base_model(base), tmp_path / "out").eval()
    assert whole.peft_config["default"].r == 4
    assert relative(outputs(whole, ids()), outputs(trainer.model.eval(), ids())) < 1e-5


def test_truncated_and_merged_is_the_truncated_adapter_merged(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    settings = {"adapter_rank": 2, "adapter_rank_tolerance": 0.99, **FAST}
    for output in ("adapter", "merged"):
        trainer = make_apo(output, peft_config=lora(), adapter_output=output, **settings)
        trainer.train()
        trainer.save_model()
    adapter = PeftModel.from_pretrained(base_model(base), tmp_path / "adapter").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        assert relative(tensor, adapter.state_dict()[name]) < 1e-6


def test_an_embedding_adapter_on_tied_embeddings(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """The head keeps the base's weight, in the run and where plain peft loads the result; merging is refused."""
    settings = {"peft_config": lora(target_modules=["embed_tokens", "q_proj"]), **FAST}
    with pytest.raises(ConfigurationError, match=r"embed_tokens, whose weight lm_head\.weight shares"):
        make_apo("merged", adapter_output="merged", **settings)
    assert not (tmp_path / "merged/_rounds").exists()
    trainer = make_apo(extrapolation_alpha=[0.5], **settings)
    head = trainer.model.get_output_embeddings().weight.detach().clone()
    trainer.train()
    trainer.save_model()
    assert torch.equal(trainer.model.get_output_embeddings().weight, head)
    whole = PeftModel.from_pretrained(base_model(base), tmp_path / "out").eval()
    assert relative(outputs(whole, ids()), outputs(trainer.model.eval(), ids())) < 1e-5
    plain = base_model(base)
    assert relative(outputs(whole, ids()), outputs(plain.eval(), ids())) > 1e-3


# ---- Refused before any weights load ----


def loftq() -> LoraConfig:
    config = lora()
    # Made with it, it asks for scipy.
    config.init_lora_weights = "loftq"
    return config


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "IA3": (
        lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "A PEFT adapter of type IA3",
    ),
    "prompts": (
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "A PEFT adapter of type PROMPT_TUNING",
    ),
    "DoRA": (lambda: lora(use_dora=True), "`use_dora`"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
    "fast PiSSA": (lambda: lora(init_lora_weights="pissa_niter_4"), "`init_lora_weights='pissa_niter_4'`"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "`init_lora_weights='olora'`"),
    "LoftQ": (loftq, "`init_lora_weights='loftq'`"),
    "CorDA": (lambda: lora(init_lora_weights="corda"), "`init_lora_weights='corda'`"),
    "random start": (lambda: lora(init_lora_weights=False), "`init_lora_weights=False`"),
    "orthogonal": (lambda: lora(init_lora_weights="orthogonal"), "`init_lora_weights='orthogonal'`"),
    "modules_to_save": (lambda: lora(modules_to_save=["lm_head"]), "`modules_to_save`"),
    "bias": (lambda: lora(bias="all"), "`bias`"),
    "lora_bias": (lambda: lora(lora_bias=True), "`lora_bias`"),
    "tokens": (lambda: lora(trainable_token_indices=[3, 4]), "`trainable_token_indices`"),
    "target_parameters": (lambda: lora(target_parameters=["q_proj.weight"]), "`target_parameters`"),
    "layer_replication": (lambda: lora(layer_replication=[(0, 1), (0, 1)]), "`layer_replication`"),
}
# What DPOTrainer itself takes, of these, on the tiny model; the rest needs something prepared, or layers with biases.
TAKEN_BY_DPO = sorted(REFUSED.keys() - {"LoftQ", "CorDA", "lora_bias", "target_parameters", "tokens"})


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_rounds_before_weights_load(
    make_apo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("weights loaded")
    )
    make, field = REFUSED[name]
    with pytest.raises(ConfigurationError) as error:
        make_apo(num_rounds=3, peft_config=make())
    message = str(error.value)
    assert message.startswith(field)
    assert "does not work with more than one round (`num_rounds` is 3): " in message
    assert "\n" not in message
    # What to do about it comes last.
    assert re.search(r"\. (Use|Leave|Name) [^.]*\.$", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TAKEN_BY_DPO)
def test_one_round_takes_what_dpo_takes(make_apo: Callable[..., Any], name: str) -> None:
    make, field = REFUSED[name]
    trainer = make_apo(num_rounds=1, peft_config=make(), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    # An option that needs the sum of the rounds' changes says what stands in its way.
    with pytest.raises(ConfigurationError, match="`adapter_rank=2` needs the rounds' state") as error:
        make_apo("other", num_rounds=1, peft_config=make(), adapter_rank=2)
    assert field in str(error.value)


def test_understood_configurations_are_taken() -> None:
    for config in (
        lora(), lora(use_rslora=True), lora(init_lora_weights="gaussian"), lora(init_lora_weights="eva"),
        lora(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 1}), lora(lora_dropout=0.1), lora(bias="none"),
        lora(exclude_modules=["v_proj"]), lora(layers_to_transform=[0]), lora(modules_to_save=[]),
    ):  # fmt: skip
        assert why_not(config, passed=False, fresh=True) is None
    # A user's own adapter may have any value by now.
    assert why_not(lora(init_lora_weights=False), passed=True, fresh=True) is None
    assert why_not(lora(init_lora_weights="pissa"), passed=True, fresh=True) is not None


# ---- Refused when a run is taken up, and passed models ----


@pytest.mark.parametrize("what", ["base", "dtype", "targets"])
def test_a_resume_with_another_model_is_refused(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path, what: str
) -> None:
    settings = {**FAST, "save_strategy": "epoch", "extrapolation_alpha": [0.5]}
    make_apo(peft_config=lora(), **settings).train()
    given: dict[str, Any] = {"peft_config": lora()}
    match what:
        case "base":
            given["model"] = base_model(base)
            with torch.no_grad():
                given["model"].model.layers[0].mlp.up_proj.weight[0].add_(1e-3)
            message = "The model below the adapter is not the one"
        case "dtype":
            given["model"] = base_model(base, torch.bfloat16)
            message = "dtypes or values of its weights differ"
        case _:
            given["peft_config"] = lora(target_modules=["q_proj", "down_proj"])
            message = "another structure: .*down_proj is adapted in memory only. Use the `target_modules`"
    before = listing(tmp_path / "out")
    trainer = make_apo(**given, **settings)
    expected = outputs(trainer.model.eval(), ids())
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert listing(tmp_path / "out") == before
    assert torch.equal(outputs(trainer.model.eval(), ids()), expected)


def test_another_rank_is_refused(make_apo: Callable[..., Any], tmp_path: Path) -> None:
    """By its field's name before any weights load; and by the state itself, whatever the fields say."""
    settings = {**FAST, "save_strategy": "epoch"}
    make_apo(peft_config=lora(), **settings).train()
    with pytest.raises(ValueError, match="`r` is 3, but the run whose rounds"):
        make_apo(peft_config=lora(r=3), **settings)
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    other = make_apo("other", peft_config=lora(r=3), **settings)
    with pytest.raises(ValueError, match=r"another structure: .*q_proj has factors of shape .*Use the rank"):
        other._weights.load(checkpoint)


@pytest.mark.parametrize("what", ["value", "shape", "dtype", "name"])
def test_the_base_is_known_by_a_sample(what: str) -> None:
    """Names, shapes, dtypes and values of the base; the adapter is none of it."""
    model = adapted(CASES["Llama"], torch.float32)
    before = base_fingerprint(model)
    randomize(model, 0)
    assert base_fingerprint(model) == before
    other: dict[str, Any] = {"value": {"seed": 1}, "shape": {"num_hidden_layers": 2}, "dtype": {}, "name": {}}
    changed = adapted(CASES["Llama"], torch.float32, tiny.make_model(tied=False, **other[what]))
    own = changed.get_base_model()
    if what == "dtype":
        own.model.norm.bfloat16()
    elif what == "name":
        own.model.other = own.model.norm
        del own.model.norm
    assert base_fingerprint(changed) != before


def test_the_base_is_known_in_a_second() -> None:
    """A hundred million values, in a fraction of the time that reading them takes."""
    model = nn.ParameterList([nn.Parameter(torch.empty(10_000_000), requires_grad=False) for _ in range(10)])
    started = time.perf_counter()
    base_fingerprint(model)
    assert time.perf_counter() - started < 1


def two_adapters(model: Any) -> None:
    model.add_adapter("other", lora())


def merged(model: Any) -> None:
    model.merge_adapter()


def beside(model: Any) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (two_adapters, "A PeftModel with the adapters default, other, of which default is active, does not work with"),
        (merged, r"A PeftModel whose adapter is merged into .*q_proj does not work with"),
        (beside, r"norm\.weight, which is trained beside the adapter, does not work with"),
    ],
)
def test_a_passed_model_is_refused_with_rounds_alone(
    make_apo: Callable[..., Any], base: Path, tmp_path: Path, prepare: Any, message: str
) -> None:
    def model() -> Any:
        made = get_peft_model(base_model(base), lora())
        prepare(made)
        return made

    with pytest.raises(ConfigurationError, match=message) as error:
        make_apo(model=model())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigurationError, match=message):
        LoraRounds(model(), passed=True, seed=0, num_rounds=2)
    # As DPOTrainer does.
    trainer = make_apo(num_rounds=1, model=model(), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
