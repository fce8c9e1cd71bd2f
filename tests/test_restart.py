"""Every round starts with a fresh optimizer and schedule, whoever makes them, and goes on exactly inside a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import TrainerCallback

from tests import tiny
from tests.reference.apo import apo_by_hand
from trl_extras import APOConfig, APOTrainer
from trl_extras.errors import ConfigurationError


ROUNDS, STEPS = 3, 4


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside those of the optimizer that it wraps, outside `.state`."""

    def __init__(self, inside: torch.optim.Optimizer):
        self.inside, self.slow, self.steps = inside, {}, 0
        super().__init__(inside.param_groups, inside.defaults)

    def step(self, closure: Any = None) -> None:
        self.inside.param_groups = self.param_groups
        self.inside.step()
        self.steps += 1
        for group in self.param_groups:
            for weight in group["params"]:
                slow = self.slow.setdefault(weight, weight.detach().clone())
                if self.steps % 2 == 0:
                    slow.add_(weight.detach() - slow, alpha=0.5)
                    weight.data.copy_(slow)


class Cosine(APOTrainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        over = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(over, lambda step: 1 / (1 + step))
        return self.lr_scheduler


class OneCycle(APOTrainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        made = OneCycleLR(
            self.optimizer if optimizer is None else optimizer, max_lr=1e-2, total_steps=num_training_steps
        )
        self.lr_scheduler = made
        return made


class Own(APOTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            decays = [p for p in self.model.parameters() if p.dim() > 1]
            others = [p for p in self.model.parameters() if p.dim() <= 1]
            self.optimizer = torch.optim.Adam([{"params": decays}, {"params": others, "lr": 3e-3}], lr=1e-2)
        return self.optimizer


class Ahead(APOTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = Lookahead(torch.optim.Adam(self.model.parameters(), lr=1e-2))
        return self.optimizer


def make(cls: Any, folder: Path, model: Any = None, data: Any = None, **settings: Any) -> Any:
    given = {name: settings.pop(name) for name in ("optimizers", "callbacks") if name in settings}
    defaults = {"num_rounds": ROUNDS, "extrapolation_alpha": 0.5, "train_sampling_strategy": "sequential"}
    return cls(
        model=tiny.make_model() if model is None else model,
        args=APOConfig(**tiny.arguments(folder, **{**defaults, **settings})),
        train_dataset=tiny.make_pairs(2 * STEPS * ROUNDS) if data is None else data,
        processing_class=tiny.make_tokenizer(),
        **given,
    )


def rates(trainer: Any) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


@pytest.mark.parametrize("cls", [APOTrainer, Cosine, OneCycle, Own, Ahead])
def test_rounds_are_separate_runs(cls: Any, tmp_path: Path) -> None:
    """Algorithm 1 with runs of one round of the same class: every bit of every iterate, and every learning rate."""
    trainer = make(cls, tmp_path / "rounds", keep_iterates=True)
    trainer.train()
    separate: list[float] = []

    def train(policy: Any, reference: Any, data: Any, t: int) -> Any:
        run = make(cls, tmp_path / f"separate-{t}", model=policy, data=data, num_rounds=1)
        run.train()
        separate.extend(rates(run))
        return run.model

    folds = [trainer._prepared_train_dataset.select(fold) for fold in trainer._folds]
    iterates = apo_by_hand(tiny.make_model(), folds, [0.5, 0.5, 0.0], train)
    assert rates(trainer) == separate
    assert len(separate) == ROUNDS * STEPS
    assert tiny.same_weights(trainer.model, iterates[-1])


@pytest.mark.parametrize("cls", [Cosine, OneCycle, Own])
@pytest.mark.parametrize("step", [5, 8])
def test_resumed_inside_and_between_rounds_is_uninterrupted(cls: Any, step: int, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = make(cls, tmp_path, **settings)
    whole.train()
    resumed = make(cls, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert tiny.same_weights(whole.model, resumed.model)
    assert rates(whole) == rates(resumed)


def test_a_passed_optimizer_that_cannot_start_afresh_is_refused(tmp_path: Path) -> None:
    model = tiny.make_model()
    ahead = Lookahead(torch.optim.Adam(model.parameters(), lr=1e-2))
    with pytest.raises(ConfigurationError, match=r"keeps something in `inside`.* Override `create_optimizer`"):
        make(APOTrainer, tmp_path, model=model, optimizers=(ahead, None))
    plain = torch.optim.Adam(model.parameters(), lr=1e-2)
    make(APOTrainer, tmp_path, model=model, optimizers=(plain, None)).train()


class Frozen(TrainerCallback):
    """Layers take turns, as with LISA: at a round's end another one is frozen than in it."""

    def __init__(self, model: Any):
        self.layers = list(model.model.layers)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn(state.global_step)

    def turn(self, step: int) -> None:
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(step % len(self.layers) == number)


def test_momentum_is_over_all_that_a_round_changed(tmp_path: Path) -> None:
    model = tiny.make_model(num_hidden_layers=2)
    # Both layers are trained in each round, and one is frozen at its end.
    trainer = make(APOTrainer, tmp_path, model=model, callbacks=[Frozen(model)], keep_iterates=True)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                found.update({name: weight.detach().clone() for name, weight in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    iterate = load_file(tmp_path / "_rounds/iterates/1/model.safetensors")
    moved = 0
    for name, old in start.items():
        if name not in iterate:
            continue
        new = iterate[name]
        expected = (
            (new.float() + (new.float() - old.float()) * 0.5).to(new.dtype) if not torch.equal(new, old) else new
        )
        assert torch.equal(found[name], expected), name
        moved += not torch.equal(found[name], new)
    assert moved > 10
