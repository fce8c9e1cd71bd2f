"""The formulas of `trl_extras.sizing`, against cases by hand and against what small models and runs really take."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor
from trl.trainer.utils import add_fused_lm_head

from tests import tiny
from trl_extras import sizing
from trl_extras.rounds import durable


WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROOT = Path(__file__).resolve().parent.parent


def llama(layers: int, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, num_hidden_layers=layers, tie_word_embeddings=tied))


def decoder(layers: int = 2, tied: bool = True) -> sizing.Decoder:
    return sizing.Decoder(64, 32, 80, layers, 4, 2, 8, tied)


def test_needs_no_torch() -> None:
    code = "import sys, trl_extras.sizing; print('torch' in sys.modules, 'trl' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ["False", "False"]


# ---- Parameters ----


@pytest.mark.parametrize("tied", [True, False])
def test_counts_parameters(tied: bool) -> None:
    assert decoder(3, tied).parameters == sum(p.numel() for p in llama(3, tied).parameters())


@pytest.mark.parametrize("everywhere", [False, True])
def test_counts_an_adapters_parameters(everywhere: bool) -> None:
    targets = "all-linear" if everywhere else ["q_proj", "v_proj"]
    adapted = get_peft_model(llama(2), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    found = sizing.lora(decoder(2), 4, everywhere)
    assert found.parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found.modules == (7 if everywhere else 2)


def test_published_sizes() -> None:
    counts = {name: round(model.parameters / 1e9, 2) for name, model in sizing.MODELS.items()}
    assert counts == {"1.5B": 1.54, "8B": 8.03, "70B": 70.55}


# ---- Optimisers ----


def state_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optimizers_state(name: str, dtype: torch.dtype) -> None:
    model = llama(1).to(dtype)
    made: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adamw_torch": torch.optim.AdamW,
        "adamw_torch_fused": torch.optim.AdamW,
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
        "adafactor": lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False),
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    real = state_of(made[name](model.parameters()), model)
    elements = sum(p.numel() for p in model.parameters())
    sides = sum(p.numel() if p.dim() < 2 else sum(p.shape) for p in model.parameters())
    width = dtype.itemsize
    if name == "adafactor" and dtype == torch.bfloat16:
        # It keeps factors in float32, vectors in the weights' dtype: the formula is at most twice as large for those.
        assert real <= sizing.optimizer_bytes(name, elements, width, sides) <= 2 * real
        return
    assert sizing.optimizer_bytes(name, elements, width, sides) == real


def test_optimizers_by_hand() -> None:
    assert sizing.optimizer_bytes("adamw_8bit", 1000, embedding=200) == 2 * (800 * (1 + 4 / 256) + 800)
    assert sizing.optimizer_bytes("paged_adamw_8bit", 1000) == 2 * 1000 * (1 + 4 / 256)
    assert sizing.optimizer_bytes("lion_8bit", 1000) == 1000 * (1 + 4 / 256)
    assert sizing.optimizer_bytes("paged_adamw_32bit", 1000, 2) == 8000
    assert sizing.optimizer_bytes("lion_32bit", 1000) == 4000
    for unknown in ("galore_adamw", "adamw_torch_4bit", "stable_adamw", "apollo_adamw"):
        assert sizing.optimizer_bytes(unknown, 1000) is None


# ---- Activations ----


def saved_by(layers: int, dtype: torch.dtype, autocast: bool, adapted: bool, rows: int, tokens: int) -> int:
    """Bytes that autograd keeps of a forward pass with a padded batch, weights and their copies left out."""
    model: Any = llama(layers).to(dtype)
    add_fused_lm_head(model)
    if adapted:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tuple(tensor.shape) not in shapes:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 64, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mixed = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    return sum(found.values())


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_a_layers_activations_are_what_autograd_saves(dtype: torch.dtype, autocast: bool, adapted: bool) -> None:
    # Shapes that no weight has; the first layer of a frozen model keeps less, so that a later one is looked at.
    rows, tokens = 3, 13
    real = saved_by(3, dtype, autocast, adapted, rows, tokens) - saved_by(2, dtype, autocast, adapted, rows, tokens)
    adapter = sizing.lora(decoder(2), 4) if adapted else None
    setup = sizing.Setup(
        1, decoder(2), adapter, weight_width=dtype.itemsize, autocast=autocast, gpu=False, gradient_checkpointing=False
    )
    assert rows * tokens * sizing.layer_activations(setup, tokens) == pytest.approx(real, rel=0.01)


# ---- Memory ----


def plain(**kwargs: Any) -> sizing.Setup:
    """1000 parameters, and no activations to speak of."""
    given = {"parameters": 1000, "decoder": None, "autocast": False, "rows": 2, "tokens": 8, **kwargs}
    return sizing.Setup(**given)


def parts(**kwargs: Any) -> dict[str, float | None]:
    found = sizing.memory(plain(**kwargs)).phases["training"]
    return {name: size for name, size in found.items() if name not in ("activations", "head", "gathered layers")}


def test_memory_of_one_process() -> None:
    assert parts() == {"weights": 4000, "optimiser": 8000, "gradients": 4000}
    assert parts(reference="model") == {
        "weights": 4000, "reference model": 4000, "optimiser": 8000, "gradients": 4000,
    }  # fmt: skip
    # bfloat16 weights have their gradients and moments in bfloat16 too; TRL's default has float32 weights.
    assert parts(weight_width=2, autocast=True) == {"weights": 2000, "optimiser": 4000, "gradients": 2000}
    assert parts(autocast=True) == parts()
    assert parts(process=77.0)["process"] == 77
    assert parts(optimizer="galore_adamw")["optimiser"] is None
    assert "optimiser" in sizing.memory(plain(optimizer="galore_adamw")).unknown


def test_memory_of_several_processes() -> None:
    four = {"processes": 4, "autocast": True, "reference": "model"}
    assert parts(**four) == {
        "weights": 4000, "reference model": 4000, "optimiser": 8000, "gradients": 4000, "DDP's buckets": 4000,
    }  # fmt: skip
    assert parts(**four, sharding=sizing.FSDP) == {
        "weights": 1000, "reference model": 1000, "optimiser": 2000, "gradients": 1000,
    }  # fmt: skip
    # DeepSpeed: weights and gradients in 16 bit, masters and two moments in float32.
    assert parts(**four, sharding=sizing.ZERO2) == {
        "weights": 2000, "reference model": 2000, "optimiser": 3000, "gradients": 500,
    }  # fmt: skip
    assert parts(**four, sharding=sizing.ZERO3) == {
        "weights": 500, "reference model": 500, "optimiser": 3000, "gradients": 500,
    }  # fmt: skip


def test_memory_of_an_adapter() -> None:
    adapter = sizing.Adapter(parameters=100, modules=2, inputs=64, rank=4)
    # float32 adapters on a 16-bit base; the reference is the base itself.
    found = parts(adapter=adapter, weight_width=2, autocast=True, reference="adapter")
    assert found == {"weights": 2400, "optimiser": 800, "gradients": 400}
    assert parts(adapter=adapter, weights=600.0, weight_width=2, autocast=True)["weights"] == 1000


def test_memory_of_a_batch() -> None:
    model = decoder(2)
    setup = sizing.Setup(model.parameters, model, autocast=False, rows=4, tokens=8, gradient_checkpointing=False)
    found = sizing.memory(setup)
    kept = 2 * 4 * 8 * sizing.layer_activations(setup, 8)
    assert found.phases["backward pass begins"]["activations"] == kept
    # Hidden states and their gradient, a tile of logits, the gradient of the head's weights.
    assert found.phases["backward pass begins"]["head"] == 2 * 4 * 32 * 32 + 32 * 64 * 4 + 4 * 64 * 32
    assert "gradients" not in found.phases["backward pass begins"]
    accumulating = sizing.memory(replace(setup, accumulates=True))
    assert accumulating.phases["backward pass begins"]["gradients"] == 4 * model.parameters
    checkpointed = sizing.memory(replace(setup, gradient_checkpointing=True))
    assert checkpointed.phases["backward pass begins"]["activations"] == 2 * 32 * 32 * 4
    assert checkpointed.phases["backward pass, first layer"]["activations"] == 2 * 32 * 32 * 4 + kept / 2
    # Under autocast the copies of float32 weights live as long as what is saved; sharded ones come in 16 bit.
    copies = 2 * 2 * model.layer_matrices
    mixed = sizing.memory(replace(setup, autocast=True))
    own = 2 * 32 * sizing.layer_activations(replace(setup, autocast=True), 8)
    assert mixed.phases["backward pass begins"]["activations"] == own + copies
    longer = sizing.memory(replace(setup, tokens=16)).phases["forward pass"]["activations"]
    assert longer is not None
    assert longer > 2 * kept


def test_memory_of_other_phases() -> None:
    model = decoder(2)
    setup = sizing.Setup(model.parameters, model, autocast=False, rows=4, tokens=8)
    ahead = sizing.memory(replace(setup, reference_rows=8)).phases["reference log-probabilities"]
    assert "optimiser" not in ahead  # it has no state yet, or none any more
    assert "optimiser" in sizing.memory(replace(setup, evaluation_rows=8)).phases["evaluation"]
    sampling = sizing.memory(replace(setup, sampled=10, sampled_tokens=20)).phases["sampling"]
    assert sampling["key-value cache"] == 10 * 20 * 2 * 2 * 16 * 4
    assert "gathered model" not in sampling
    sharded = replace(setup, sampled=10, sampled_tokens=20, processes=2, sharding=sizing.FSDP)
    assert sizing.memory(sharded).phases["sampling"]["gathered model"] == model.parameters * 4
    inner = sizing.memory(replace(setup, inner="unrolled")).phases["backward pass ends"]["inner steps"]
    assert inner == 2 * 4 * model.parameters
    shares = replace(setup, inner="unrolled", processes=4, sharding=sizing.FSDP)
    assert sizing.memory(shares).phases["backward pass ends"]["inner steps"] == 2 * model.parameters
    both = sizing.memory(replace(setup, other_rows=2, other_tokens=8)).phases["backward pass of the pairs"]
    assert both["gradients"] == 4 * model.parameters


def test_the_peak_is_that_of_the_highest_phase() -> None:
    found = sizing.Memory({"a": {"x": 1, "y": None}, "b": {"x": 2, "z": 3.0}})
    assert (found.highest, found.peak, found.unknown) == ("b", 5, ["y"])


# ---- Disk ----


def saving(rounds: int = 3, changes: bool = True, **kwargs: Any) -> sizing.Saving:
    given: dict[str, Any] = {"strategy": "no", "saves_output": False, **kwargs}
    moved = tuple(changes and t > 0 for t in range(rounds))
    return sizing.Saving((1,) * rounds, 10, moved, **given)


def peak(rounds: int = 3, changes: bool = True, **kwargs: Any) -> float:
    return sizing.disk(sizing.full_files(1.0, rounds, optimizer=2.0), saving(rounds, changes, **kwargs)).peak


def test_disk_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_SMALL_FILES", 0)
    # A boundary has the iterate and the policy of both rounds, and the policy before those.
    assert [peak(rounds) for rounds in (1, 2, 3, 4)] == [1, 3, 5, 5]
    assert [peak(rounds, changes=False) for rounds in (1, 2, 3, 4)] == [1, 2, 3, 3]
    # Every iterate is kept once, under several names.
    assert [peak(rounds, changes=False, keep_iterates=True) for rounds in (3, 4, 5)] == [3, 4, 5]
    # The end: three copies of the last round, and the output.
    assert sizing.disk(sizing.full_files(1.0, 3), saving(saves_output=True)).left == 4
    # A checkpoint has weights and two moments of its own, and keeps the state of its round.
    assert peak(1, strategy="epoch") == 4
    found = sizing.disk(sizing.full_files(1.0, 3, optimizer=2.0), saving(strategy="epoch"))
    assert (found.checkpoints, found.at_once, found.left) == (3, 3, 9 + 3 + 2)
    only = sizing.disk(sizing.full_files(1.0, 3, optimizer=2.0), saving(strategy="epoch", only_model=True))
    assert only.left == 3 + 3 + 2
    limited = sizing.disk(sizing.full_files(1.0, 3, optimizer=2.0), saving(strategy="epoch", limit=1))
    # One more for a moment, at the end of round 3 with the state of round 2 alive.
    assert (limited.at_once, limited.left) == (2, 3 + 3)
    assert limited.peak == 2 * 3 + 5
    assert sum(limited.parts.values()) == limited.peak


def test_steps_of_checkpoints() -> None:
    assert list(saving(2, strategy="epoch").checkpoint_steps()) == [10, 20]
    assert list(saving(2, strategy="steps", save_steps=7).checkpoint_steps()) == [7, 14, 20]
    assert list(saving(2, strategy="steps", save_steps=10).checkpoint_steps()) == [10, 20]
    assert list(saving(2, strategy="no").checkpoint_steps()) == []
    assert list(saving(2, strategy="best").checkpoint_steps()) == [10, 20]
    assert list(sizing.Saving((1, 3), 5, (False, True)).checkpoint_steps()) == [5, 10, 15, 20]


def test_steps_of_checkpoints_where_rounds_make_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(**kwargs: Any) -> list[int]:
        return list(saving(3, makes_rows=True, **kwargs).checkpoint_steps())

    assert steps(strategy="steps", save_steps=500) == [10, 20, 30]
    assert steps(strategy="steps", save_steps=8) == [8, 10, 16, 20, 24, 30]
    assert steps(strategy="epoch") == [10, 20, 30]
    assert steps(strategy="best") == [10, 20, 30]
    assert steps(strategy="no") == []
    # A run that stops for labels has to be gone on from; the end has no boundary after it.
    assert steps(strategy="no", waits=True) == [10, 20]
    monkeypatch.setattr(sizing, "_SMALL_FILES", 0)
    files = sizing.full_files(1.0, 3, optimizer=2.0)
    all_of_them = sizing.disk(files, saving(makes_rows=True, strategy="steps"))
    assert (all_of_them.checkpoints, all_of_them.at_once) == (3, 3)
    limited = sizing.disk(files, saving(makes_rows=True, strategy="steps", limit=1))
    assert (limited.checkpoints, limited.at_once, limited.peak) == (3, 2, 2 * 3 + 5)


def test_sizes_for_people() -> None:
    shown = [sizing.shown(size) for size in (0, 640, 4_200, 3.4e6, 2.5e8, 7e9)]
    assert shown == ["0.00 kB", "0.64 kB", "4.20 kB", "3.40 MB", "0.25 GB", "7.00 GB"]


def test_rollouts_stay() -> None:
    files = sizing.full_files(0.0, 2, rollouts=(5.0, 7.0))
    found = sizing.disk(files, saving(2))
    assert (found.left, found.parts) == (12, {"rollouts": 12})
    assert sizing.rollout_bytes(10, 4, 20, 30) == 16 * 10 * (20 + 4 * 30)


def used(folder: Path) -> int:
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            about = os.lstat(os.path.join(where, name))
            found[about.st_ino] = about.st_size
    return sum(found.values())


@contextlib.contextmanager
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Disk use wherever something is about to be removed: it is highest there, or at the end."""
    seen: list[int] = []
    remove = durable.remove

    def looked(target: Path) -> None:
        if target.exists():
            seen.append(used(folder))
        remove(target)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "remove", looked)
        yield seen
    seen.append(used(folder))


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"save_strategy": "no"}, {"strategy": "no"}),
        ({"save_strategy": "epoch"}, {}),
        ({"save_strategy": "epoch", "save_total_limit": 1}, {"limit": 1}),
        ({"save_strategy": "epoch", "save_only_model": True, "keep_iterates": True},
         {"only_model": True, "keep_iterates": True}),
        ({"save_strategy": "steps", "save_steps": 3, "extrapolation_alpha": [0]},
         {"strategy": "steps", "save_steps": 3, "changes": (False,) * 3}),
        ({"save_strategy": "epoch", "num_rounds": 1}, {"epochs": (1,), "changes": (False,)}),
    ],
    ids=["no", "epoch", "limit", "iterates", "steps", "one round"],
)  # fmt: skip
def test_disk_of_a_real_run(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], saved: dict[str, Any]
) -> None:
    # Large enough that the small files beside the weights do not count.
    model = tiny.make_model(hidden_size=512)
    trainer = make_apo(model=model, data=tiny.make_pairs(12), **settings)
    with watched(tmp_path / "out", monkeypatch) as seen:
        trainer.train()
        trainer.save_model()
    weights = 4 * sum(p.numel() for p in model.parameters())
    rounds = settings.get("num_rounds", 3)
    steps = 2 if rounds == 3 else 6
    given: dict[str, Any] = {
        "epochs": (1,) * rounds,
        "steps_per_epoch": steps,
        "changes": (False, True, True),
        **saved,
    }
    found = sizing.disk(sizing.full_files(weights, rounds, optimizer=2 * weights), sizing.Saving(**given))
    assert found.left == pytest.approx(seen[-1], rel=0.05)
    assert found.peak == pytest.approx(max(seen), rel=0.05)
    assert found.checkpoints >= len(list((tmp_path / "out").glob("checkpoint-*"))) > 0 or given.get("strategy") == "no"


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_disk_of_a_real_run_with_an_adapter(
    make_apo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    config = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_apo(
        model=tiny.make_model(hidden_size=256), data=tiny.make_pairs(12), peft_config=config, num_rounds=rounds,
        save_strategy="epoch", keep_iterates=True,
    )  # fmt: skip
    adapter = 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    with watched(tmp_path / "out", monkeypatch) as seen:
        trainer.train()
        trainer.save_model()
    files = sizing.adapter_files(adapter, rounds, optimizer=2 * adapter)
    moved = tuple(t > 0 for t in range(rounds))
    found = sizing.disk(files, sizing.Saving((1,) * rounds, 6 // rounds, moved, keep_iterates=True))
    assert found.left == pytest.approx(seen[-1], rel=0.05)
    assert found.peak == pytest.approx(max(seen), rel=0.05)


# ---- The page ----


def test_the_pages_tables_are_what_the_code_prints() -> None:
    page = (ROOT / "docs/sizing.md").read_text(encoding="utf-8")
    assert sizing.tables() in page
