"""SPO's invariants, through the real trainer: what it must equal, bit for bit, and what plain autograd says."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from trl import DPOConfig, DPOTrainer

from tests import tiny
from tests.reference import spo_objective as slow
from tests.test_apo import LOSSES


HINGES = ("example", "batch")
SOLVERS: tuple[dict[str, Any], ...] = (
    {"bilevel_solver": "unrolled"},
    {"bilevel_solver": "unrolled", "inner_steps": 3},
    {"bilevel_solver": "unrolled", "hypergradient": "central_difference"},
    {"bilevel_solver": "alternating"},
    {"bilevel_solver": "alternating", "inner_steps": 2},
)
solver_ids = ["-".join(map(str, solver.values())) for solver in SOLVERS]


def dpo(base: Any, folder: Path, data: Any = None, **kwargs: Any) -> Any:
    """A plain DPOTrainer run; returns the trainer."""
    given = {key: kwargs.pop(key) for key in ("ref_model", "peft_config", "eval_dataset") if key in kwargs}
    defaults = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    trainer = DPOTrainer(
        model=str(base) if isinstance(base, Path) else base,
        args=DPOConfig(**tiny.arguments(folder, **{**defaults, **kwargs})),
        train_dataset=tiny.make_pairs(12) if data is None else data,
        processing_class=tiny.make_tokenizer(),
        **given,
    )
    trainer.train()
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without times and without what only this method logs."""
    return [
        {key: v for key, v in entry.items() if not key.startswith(("spo/", "eval_spo/")) and "per_second" not in key}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry and "eval_runtime" not in entry
    ]


def weights_of(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---- lambda = 0 is the parent ----


@pytest.mark.parametrize("loss_type", LOSSES, ids="+".join)
def test_lambda_zero_is_dpo_bit_for_bit(make_spo: Any, base: Path, tmp_path: Path, loss_type: list[str]) -> None:
    common: dict[str, Any] = {"loss_type": loss_type, "learning_rate": 1e-3, "train_sampling_strategy": "random"}
    if loss_type in (["exo_pair"], ["robust"]):
        common["label_smoothing"] = 0.1
    stock = dpo(base, tmp_path / "dpo", **common)
    ours = make_spo(sft_coef=0.0, **common)
    ours.train()
    assert logged(ours) == logged(stock)
    assert tiny.same_weights(ours.model, stock.model)


@pytest.mark.parametrize(
    "setting",
    [
        {"precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"hinge": "batch", "gradient_accumulation_steps": 2},
        {"sft_optimum": 2.5},
    ],
    ids=str,
)
def test_lambda_zero_is_dpo_in_other_settings_too(
    make_spo: Any, base: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    # With SFT data, which then only give a metric and must not draw a random number.
    model = tiny.make_model(attention_dropout=0.2, attn_implementation="eager")
    reference = copy.deepcopy(model)
    stock_setting = {k: v for k, v in setting.items() if k in DPOConfig.__dataclass_fields__}
    stock = dpo(copy.deepcopy(model), tmp_path / "dpo", ref_model=copy.deepcopy(reference), **stock_setting)
    ours = make_spo(model=model, ref_model=reference, sft_dataset=tiny.make_sft_rows(), sft_coef=0.0, **setting)
    ours.train()
    assert tiny.same_weights(ours.model, stock.model)
    assert logged(ours) == logged(stock)


def test_lambda_zero_is_dpo_with_an_adapter(make_spo: Any, base: Path, tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    stock = dpo(base, tmp_path / "dpo", peft_config=adapter)
    ours = make_spo(sft_coef=0.0, peft_config=adapter, sft_dataset=tiny.make_sft_rows())
    ours.train()
    assert tiny.same_weights(ours.model, stock.model)


def test_evaluation_at_lambda_zero_is_dpos(make_spo: Any, base: Path, tmp_path: Path) -> None:
    common = {"eval_dataset": tiny.make_pairs(6, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    stock = dpo(base, tmp_path / "dpo", **common)
    ours = make_spo(sft_coef=0.0, sft_dataset=tiny.make_sft_rows(), **common)
    ours.train()
    assert logged(ours) == logged(stock)
    assert any("eval_spo/gap_sft" in entry for entry in ours.state.log_history)


# ---- An inner rate of 0 is the penalty ----


@pytest.mark.parametrize("hinge", HINGES)
@pytest.mark.parametrize("solver", SOLVERS, ids=solver_ids)
def test_inner_rate_zero_is_the_penalty_bit_for_bit(make_spo: Any, solver: dict[str, Any], hinge: str) -> None:
    def run(folder: str, **setting: Any) -> Any:
        trainer = make_spo(
            folder, model=tiny.make_model(attention_dropout=0.2, attn_implementation="eager"),
            ref_model=tiny.make_model(), sft_dataset=tiny.make_sft_rows(), hinge=hinge,
            gradient_accumulation_steps=2, per_device_train_batch_size=1, learning_rate=3e-2, **setting,
        )  # fmt: skip
        trainer.train()
        return trainer

    penalty = run("penalty")
    assert any(entry.get("spo/gap_chosen", 0) > 0 for entry in penalty.state.log_history), (
        "no gap: nothing is compared"
    )
    inside = run("inside", inner_learning_rate=0.0, **solver)
    assert tiny.same_weights(inside.model, penalty.model)
    moved = run("moved", inner_learning_rate=0.05, **solver)
    assert not tiny.same_weights(moved.model, penalty.model)


# ---- The gradients are those of plain autograd ----

SETTINGS: tuple[dict[str, Any], ...] = (
    {"sft_coef": 1.0},
    {"sft_coef": 0.7, "sft_tolerance": 0.05},
    {"sft_coef": 1.3, "sft_optimum": 3.0},
)


def leave_the_reference(model: torch.nn.Module, size: float = 0.5) -> None:
    """Somewhere below both floors."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # A fresh adapter's second factor is zero.
                scale = parameter.abs().mean() if parameter.any() else 0.1
                parameter.add_(size * torch.randn_like(parameter) * scale)


class Case:
    """A trainer whose policy has left its reference, a window of pairs, and the same by hand."""

    def __init__(self, make_spo: Any, micro_batches: int, sft: bool = True, reference: Any = None, **kwargs: Any):
        given = {"sft_dataset": tiny.make_sft_rows(7)} if sft else {}
        self.trainer = make_spo(
            per_device_train_batch_size=2, gradient_accumulation_steps=micro_batches, beta=0.3, **given, **kwargs
        )
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
        leave_the_reference(trainer.model)
        rows = [trainer.train_dataset[i] for i in range(2 * micro_batches)]
        self.batches = [trainer.data_collator(rows[i : i + 2]) for i in range(0, len(rows), 2)]
        self.pairs = [
            ((row["prompt_ids"], row["chosen_ids"]), (row["prompt_ids"], row["rejected_ids"])) for row in rows
        ]
        # An adapter's is no model of the trainer's.
        reference = trainer.ref_model if reference is None else reference
        initial = dict(reference.named_parameters())
        with torch.no_grad():
            score = lambda example: float(slow.log_prob(reference, initial, example))  # noqa: E731
            self.references = [(score(chosen), score(rejected)) for chosen, rejected in self.pairs]
            self.chosen = [chosen for chosen, _ in self.pairs]
            self.rows: list[slow.Example] = []
            if sft:
                for number in trainer._spo_rows.indices(0, 2 * micro_batches):
                    row = trainer._spo_rows.rows[number]
                    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
                    self.rows.append((row["input_ids"][:start], row["input_ids"][start:]))
            optimum = trainer.args.optimum
            floor = lambda example: (  # noqa: E731
                -score(example) / slow.length(example) if optimum is None else optimum
            )
            self.sources = [(self.chosen, [floor(example) for example in self.chosen])]
            if sft:
                self.sources.append((self.rows, [floor(example) for example in self.rows]))
        self.theta = {
            name: p.detach().clone().requires_grad_()
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        }

    def objective(self, weights: slow.Weights) -> torch.Tensor:
        args = self.trainer.args
        return slow.objective(
            self.trainer.model, weights, self.pairs, self.references, self.sources, beta=args.beta,
            coefficient=args.sft_coef, tolerance=args.sft_tolerance, hinge=args.hinge,
        )  # fmt: skip

    def lower(self, weights: slow.Weights) -> torch.Tensor:
        return slow.lower_level(self.trainer.model, weights, [*self.chosen, *self.rows])

    def wanted(self, rate: float, steps: int, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's gradient as a flat vector, and its value."""
        with sdpa_kernel(SDPBackend.MATH):
            start = {name: weight.detach().requires_grad_() for name, weight in self.theta.items()}
            inside = slow.after_inner_steps(self.lower, start, rate, steps, exact) if rate else start
            value = self.objective(inside)
            gradients = torch.autograd.grad(value, list((start if exact else inside).values()))
        return torch.cat([gradient.flatten() for gradient in gradients]), value.detach()

    def step(self) -> tuple[torch.Tensor, float]:
        """The gradient that the trainer's steps over the window leave, and the mean of the losses."""
        trainer = self.trainer
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(self.batches)
        trainer.get_batch_samples(iter(self.batches), len(self.batches), trainer.args.device)
        total = 0.0
        for batch in self.batches:
            total += float(trainer.training_step(trainer.model, batch))
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]), total


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("hinge", HINGES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_penalty_is_plain_autograd(make_spo: Any, setting: dict[str, Any], hinge: str, micro_batches: int) -> None:
    case = Case(make_spo, micro_batches, hinge=hinge, **setting)
    gradient, value = case.step()
    wanted, wanted_value = case.wanted(0.0, 0, exact=False)
    assert far(gradient, wanted) < 2e-5
    assert value == pytest.approx(float(wanted_value), rel=2e-5)
    # The gap takes part: without it the gradient is another one.
    case.trainer.args.sft_coef = 0.0
    assert far(case.wanted(0.0, 0, exact=False)[0], wanted) > 0.05


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("hinge", HINGES)
@pytest.mark.parametrize("solver", SOLVERS, ids=solver_ids)
def test_inner_solvers_are_plain_autograd(
    make_spo: Any, solver: dict[str, Any], hinge: str, micro_batches: int
) -> None:
    rate = 0.05
    case = Case(make_spo, micro_batches, hinge=hinge, inner_learning_rate=rate, **solver)
    gradient, value = case.step()
    exact = solver.get("hypergradient") == "central_difference"
    wanted, wanted_value = case.wanted(rate, solver.get("inner_steps", 1), exact=exact)
    assert far(gradient, wanted) < (5e-4 if exact else 5e-5)
    assert value == pytest.approx(float(wanted_value), rel=5e-5)
    # What was dropped, and what was added, is larger than the tolerance.
    assert far(gradient, case.wanted(0.0, 0, exact=False)[0]) > 0.02
    if exact:
        assert far(case.wanted(rate, 1, exact=False)[0], wanted) > 0.02
    theta = torch.cat([weight.detach().flatten() for weight in case.theta.values()])
    if solver["bilevel_solver"] == "unrolled":
        assert torch.equal(weights_of(case.trainer), theta), "unrolled: the weights are back, to the bit"
    else:
        inside = slow.after_inner_steps(case.lower, case.theta, rate, solver.get("inner_steps", 1), exact=False)
        kept = torch.cat([weight.detach().flatten() for weight in inside.values()])
        assert far(weights_of(case.trainer) - theta, kept - theta) < 1e-4, "alternating: the inner step is kept"


@pytest.mark.parametrize("hinge", HINGES)
def test_inside_the_region_the_gradient_is_dpos_to_the_bit(make_spo: Any, hinge: str) -> None:
    case = Case(make_spo, 2, hinge=hinge, sft_tolerance=50.0)
    inside, _ = case.step()
    case.trainer.args.sft_coef = 0.0
    alone, _ = case.step()
    assert torch.equal(inside, alone)


@pytest.mark.parametrize("solver", [{}, *SOLVERS], ids=["penalty", *solver_ids])
def test_gradient_checkpointing_changes_nothing(make_spo: Any, solver: dict[str, Any]) -> None:
    rate = {"inner_learning_rate": 0.05} if solver else {}
    plain, _ = Case(make_spo, 2, **solver, **rate).step()
    other, _ = Case(make_spo, 2, **solver, **rate, gradient_checkpointing=True).step()
    assert far(other, plain) < 1e-6


_AUTOCAST = """
import sys, torch
from transformers import TrainerCallback
from tests import tiny
from tests.test_spo import far, leave_the_reference
from trl_extras import SPOConfig, SPOTrainer

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        control.should_training_stop = True

def gradient(**setting):
    keep = Keep()
    trainer = SPOTrainer(
        model=sys.argv[1], processing_class=tiny.make_tokenizer(), train_dataset=tiny.make_pairs(8),
        sft_dataset=tiny.make_sft_rows(7), callbacks=[keep],
        args=SPOConfig(**tiny.arguments(
            sys.argv[2], train_sampling_strategy="sequential", max_grad_norm=0.0, bf16=sys.argv[3] == "bf16", **setting
        )),
    )
    leave_the_reference(trainer.model, 0.2)
    trainer.train()
    return keep.gradient

unrolled = {"bilevel_solver": "unrolled", "inner_learning_rate": 0.05}
found = {
    "penalty": gradient(), "at rate 0": gradient(bilevel_solver="unrolled", inner_learning_rate=0.0),
    "unrolled": gradient(**unrolled), "central": gradient(**unrolled, hypergradient="central_difference"),
}
torch.save(found, sys.argv[4])
"""


def test_bfloat16_autocast(base: Path, tmp_path: Path) -> None:
    """In processes of their own: accelerate keeps the precision of the first trainer in a process."""
    script = tmp_path / "script.py"
    script.write_text(_AUTOCAST, encoding="utf-8")
    found = {}
    for precision in ("bf16", "float32"):
        run_script([str(script), str(base), str(tmp_path / precision), precision, str(tmp_path / f"{precision}.pt")])
        found[precision] = torch.load(tmp_path / f"{precision}.pt", weights_only=True)
    coarse, fine = found["bf16"], found["float32"]
    assert torch.equal(coarse["at rate 0"], coarse["penalty"])
    assert not torch.equal(coarse["penalty"], fine["penalty"]), "autocast is at work"
    for name, gradient in coarse.items():
        assert far(gradient, fine[name]) < 0.1, name
    # What the correction adds is more than what bfloat16 loses.
    assert far(fine["unrolled"], fine["central"]) > 2 * far(coarse["central"], fine["central"])


def run_script(arguments: list[str]) -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, text=True, capture_output=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- Micro-batches and processes ----

LAYOUTS = ((4, 1), (2, 2), (1, 4))


def run_layout(make_spo: Any, size: int, accumulation: int, **kwargs: Any) -> Any:
    trainer = make_spo(
        f"{size}x{accumulation}", data=tiny.make_pairs(16), sft_dataset=tiny.make_sft_rows(11),
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", max_grad_norm=0.0,
        learning_rate=0.05, **kwargs,
    )  # fmt: skip
    leave_the_reference(trainer.model)
    trainer.train()
    return trainer


@pytest.mark.parametrize("hinge", HINGES)
@pytest.mark.parametrize("solver", [{}, *SOLVERS], ids=["penalty", *solver_ids])
def test_batches_and_accumulation_agree(make_spo: Any, solver: dict[str, Any], hinge: str) -> None:
    rate = {"inner_learning_rate": 0.005} if solver else {}
    runs = [run_layout(make_spo, *layout, hinge=hinge, **solver, **rate) for layout in LAYOUTS]
    model = tiny.make_model()
    leave_the_reference(model)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = float((weights_of(runs[0]) - start).norm())
    assert any(entry.get("spo/gap_sft", 0) > 0 for entry in runs[0].state.log_history)
    for other in runs[1:]:
        # A central difference divides roundings by a small number.
        bound = 1e-3 if solver.get("hypergradient") else 2e-5
        assert float((weights_of(other) - weights_of(runs[0])).norm()) < bound * moved
        for key in ("spo/gap_chosen", "spo/gap_sft", "spo/chosen_change", "loss"):
            ours, theirs = ([e[key] for e in run.state.log_history if key in e] for run in (runs[0], other))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5), key


_TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests import tiny
from tests.test_spo import leave_the_reference
from trl_extras import SPOConfig, SPOTrainer

base, out, size, settings = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
for number, setting in enumerate(settings):
    trainer = SPOTrainer(
        model=base, processing_class=tiny.make_tokenizer(), train_dataset=tiny.make_pairs(16),
        sft_dataset=tiny.make_sft_rows(11),
        args=SPOConfig(**tiny.arguments(
            out / f"run-{number}", per_device_train_batch_size=size, optim="sgd", max_grad_norm=0.0,
            learning_rate=0.05, num_train_epochs=1, train_sampling_strategy="sequential", **setting,
        )),
    )
    leave_the_reference(trainer.model)
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {n: p.detach().contiguous() for n, p in trainer.model.named_parameters()}
        save_file(weights, out / f"{number}.safetensors")
        logs = [e for e in trainer.state.log_history if "loss" in e]
        (out / f"{number}.json").write_text(json.dumps(logs))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one(base: Path, tmp_path: Path) -> None:
    inner = {"inner_learning_rate": 0.02}
    settings = [
        {"gradient_accumulation_steps": accumulation, "hinge": hinge, **solver, **(inner if solver else {})}
        for accumulation in (1, 2)
        for hinge in HINGES
        for solver in ({}, *SOLVERS[::2])
    ]
    settings.append({"gradient_checkpointing": True, "bilevel_solver": "unrolled", **inner})
    script = tmp_path / "script.py"
    script.write_text(_TWO_PROCESSES, encoding="utf-8")
    for processes, size in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if processes == 2 else []
        run_script([*launch, str(script), str(base), str(folder), str(size), json.dumps(settings)])
    model = tiny.make_model()
    leave_the_reference(model)
    start = dict(model.named_parameters())
    for number, setting in enumerate(settings):
        one, two = (load_file(tmp_path / str(n) / f"{number}.safetensors") for n in (1, 2))
        moved = max(float((one[name] - start[name]).abs().max()) for name in one)
        bound = 2e-3 if setting.get("hypergradient") else 5e-5
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < bound * moved, setting
        logs = [json.loads((tmp_path / str(n) / f"{number}.json").read_text()) for n in (1, 2)]
        for a, b in zip(*logs, strict=True):
            for key in ("spo/gap_chosen", "spo/gap_sft", "spo/displaced", "spo/chosen_change", "spo/penalty"):
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=5e-5), (setting, key)
