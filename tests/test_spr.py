"""
SPRTrainer against SFTTrainer and against closed forms: the limits of docs/spr.md, the loss and its gradient, layouts,
processes, adapters, resuming.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import tiny
from trl_extras import SPRConfig, SPRTrainer
from trl_extras.rounds.state import AdapterWeights


def threes(completions: Sequence[str], **kwargs: Any) -> list[float]:
    """One for every word that ends with a 3."""
    return [float(sum(word.endswith("3") for word in text.split())) for text in completions]


def lengths(completions: Sequence[str], **kwargs: Any) -> list[float]:
    return [0.1 * len(text.split()) for text in completions]


def make_prompts(rows: int = 12, seed: int = 0) -> datasets.Dataset:
    return tiny.make_pairs(rows, seed).remove_columns(["chosen", "rejected"])


def make_spr(base: Any, folder: Path, data: Any, **kwargs: Any) -> SPRTrainer:
    keys = (
        "eval_dataset", "callbacks", "peft_config", "reward_funcs", "reward_processing_classes", "offline_dataset",
        "optimizers",
    )  # fmt: skip
    given = {key: kwargs.pop(key) for key in keys if key in kwargs}
    defaults = {"num_rounds": 2, "max_completion_length": 5, "num_generations": 3}
    return SPRTrainer(
        model=str(base) if isinstance(base, Path) else base,
        args=SPRConfig(**tiny.arguments(folder, **{**defaults, **kwargs})),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **given,
    )


def make_sft(base: Any, folder: Path, data: Any, peft_config: Any = None, **kwargs: Any) -> SFTTrainer:
    return SFTTrainer(
        model=str(base) if isinstance(base, Path) else base,
        args=SFTConfig(**tiny.arguments(folder, **{"num_train_epochs": 1, **kwargs})),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        peft_config=peft_config,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows_of(folder: Path, round_index: int) -> dict[str, list[Any]]:
    return pq.read_table(folder / f"_rounds/round-{round_index:04d}/data.parquet").to_pydict()  # type: ignore[no-any-return]


class KeepRows(TrainerCallback):
    """Keeps what each round was trained on, which goes when the next one is complete."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[dict[str, list[Any]]] = []

    def on_round_end(self, args: Any, state: Any, control: Any, *, round_index: int, **kwargs: Any) -> None:
        self.rows.append(rows_of(self.folder, round_index))


# ---- Equal rewards ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_sampling_strategy": "sequential", "num_train_epochs": 2},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 4},
        {"max_length": 6},
        {"peft": True},
    ],
)
def test_equal_rewards_are_sft_to_the_bit(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if settings.pop("peft", False) else {}
    rows = tiny.make_sft_rows(12)
    stock = make_sft(base, tmp_path / "sft", rows, **copy.deepcopy(peft), **settings)
    ours = make_spr(
        base, tmp_path / "spr", rows.add_column("reward", [0.3] * 12), num_rounds=1, num_generations=0, **peft,
        **settings,
    )  # fmt: skip
    stock.train()
    ours.train()
    assert len(losses(stock)) > 2
    assert losses(stock) == losses(ours)
    assert tiny.same_weights(stock.model, ours.model)
    for kept in ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert [entry.get(kept) for entry in stock.state.log_history if "loss" in entry] == [
            entry.get(kept) for entry in ours.state.log_history if "loss" in entry
        ]


def test_different_rewards_are_not_sft(base: Path, tmp_path: Path) -> None:
    rows = tiny.make_sft_rows(12)
    stock = make_sft(base, tmp_path / "sft", rows)
    rewards = [0.1 * (i % 4) for i in range(12)]
    ours = make_spr(base, tmp_path / "spr", rows.add_column("reward", rewards), num_rounds=1, num_generations=0)
    stock.train()
    ours.train()
    assert not tiny.same_weights(stock.model, ours.model)


@pytest.mark.parametrize("offline", [False, True])
def test_equal_rewards_on_samples_are_sft_on_the_samples(base: Path, tmp_path: Path, offline: bool) -> None:
    """Through two rounds: each is SFTTrainer on the tokens that were sampled, from the weights of the round before."""
    data = tiny.make_sft_rows(12) if offline else make_prompts(12)
    kept = KeepRows(tmp_path / "spr")
    settings = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.5}
    ours = make_spr(
        base, tmp_path / "spr", data, reward_funcs=lambda completions, **_: [2.5] * len(completions),
        callbacks=[kept], **settings,
    )  # fmt: skip
    ours.train()
    assert [len(rows["weight"]) for rows in kept.rows] == ([36, 36] if offline else [18, 18])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = []
    for index, rows in enumerate(kept.rows):
        assert set(rows["weight"]) == {1.0}
        plain = datasets.Dataset.from_dict({name: rows[name] for name in ("input_ids", "labels")})
        stock = make_sft(model, tmp_path / f"sft{index}", plain, **settings)
        stock.train()
        model = stock.model
        found += losses(stock)
    assert losses(ours) == found
    assert tiny.same_weights(ours.model, model)


# ---- Loss and gradient ----


def weighted_nll(model: Any, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """-sum_i w_i log pi(y_i | x_i) / tokens, row by row, from the logits."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total = total - row["weight"] * logps[position, label]
                tokens += 1
    return total / tokens


def test_loss_and_gradient_are_those_of_the_reference(base: Path, tmp_path: Path) -> None:
    rewards = [0.05 * (i % 5) for i in range(8)]
    trainer = make_spr(
        base, tmp_path, tiny.make_sft_rows(8).add_column("reward", rewards), num_rounds=1, num_generations=0,
        per_device_train_batch_size=8, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer.train()
    stored = rows_of(tmp_path, 0)
    rows = [{name: stored[name][i] for name in ("input_ids", "labels", "weight")} for i in range(8)]
    assert len(set(stored["weight"])) == 5
    loss = weighted_nll(reference, rows)
    loss.backward()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=2e-6)
    for name, parameter in reference.named_parameters():
        moved = before[name] - dict(trainer.model.named_parameters())[name].detach()
        assert parameter.grad is not None
        assert torch.allclose(moved, parameter.grad, rtol=2e-4, atol=2e-6), name


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (3, 2)])
def test_layouts_agree(base: Path, tmp_path: Path, batch: int, accumulation: int) -> None:
    """A batch of 8 (of 6) at once, and in parts of uneven token counts."""
    rewards = [0.07 * (i % 5) for i in range(24)]
    found = []
    for size, parts in ((batch * accumulation, 1), (batch, accumulation)):
        trainer = make_spr(
            base, tmp_path / str(parts), tiny.make_sft_rows(24).add_column("reward", rewards), num_rounds=2,
            num_generations=0, per_device_train_batch_size=size, gradient_accumulation_steps=parts, optim="sgd",
            learning_rate=0.3,
        )  # fmt: skip
        trainer.train()
        found.append(trainer)
    whole, split = found
    assert losses(split) == pytest.approx(losses(whole), rel=2e-5)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6), name


# ---- The bandit ----


ARMS = ["w0", "w1", "w2"]


def arm_log_probs(model: torch.nn.Module) -> torch.Tensor:
    """Log-probabilities of all tokens after the prompt, (vocabulary,), float64."""
    prompt = tiny.make_tokenizer().apply_chat_template(
        [{"role": "user", "content": "w9"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        return model(**prompt).logits[0, -1].double().log_softmax(-1)  # type: ignore[no-any-return]


def bandit_rows(words: Sequence[str], rewards: Sequence[float]) -> datasets.Dataset:
    """Every answer once, with log mu = -log n."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "w9"}],
                "completion": [{"role": "assistant", "content": word}],
                "reward": reward,
                "mu": -math.log(len(words)),
            }
            for word, reward in zip(words, rewards, strict=True)
        ]
    )


def test_the_bandit_limit(tmp_path: Path) -> None:
    """With every answer in the data and exact weights, log(pi_K / pi_0) = K r / beta + const: iterative DPO's line."""
    beta = 0.5
    model = tiny.make_model(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    start = arm_log_probs(model)
    rewards = [0.0, 0.15, -0.1]
    trainer = make_spr(
        model, tmp_path, bandit_rows(ARMS, rewards), num_rounds=3, num_generations=0, round_data="reuse",
        round_epochs=[350, 120, 120], per_device_train_batch_size=3, reward_temperature=beta, importance_clip="none",
        behavior_logps_column="mu", optim="sgd", learning_rate=0.25, lr_scheduler_type="constant", max_grad_norm=0.0,
        keep_iterates=True, logging_strategy="no",
    )  # fmt: skip
    trainer.train()
    reward = torch.tensor(rewards, dtype=torch.float64)
    for rounds in (1, 2, 3):
        iterate = AutoModelForCausalLM.from_pretrained(tmp_path / f"_rounds/iterates/{rounds}", dtype=torch.float32)
        moved = (arm_log_probs(iterate) - start)[tiny.make_tokenizer().convert_tokens_to_ids(ARMS)]
        for better, worse in ((1, 0), (0, 2), (1, 2)):
            slope = (moved[better] - moved[worse]) / ((reward[better] - reward[worse]) / beta)
            assert slope.item() == pytest.approx(rounds, rel=0.01), (rounds, better, worse)


def test_temperature_alone_does_not_sharpen(tmp_path: Path) -> None:
    """
    Samples at temperature 0.7 and equal rewards: with the ratios the policy stays where it was, up to what sampling
    does by chance; trained on the samples as they are, its likeliest answers grow.
    """
    model = tiny.make_model(tied=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    start = arm_log_probs(model)
    prompts = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "w9"}]}] * 16)
    found = {}
    for name, clip in (("corrected", "none"), ("plain", "1e-9")):
        trainer = make_spr(
            copy.deepcopy(model), tmp_path / name, prompts, num_rounds=3, num_generations=50, round_data="reuse",
            reward_funcs=lambda completions, **_: [1.0] * len(completions), temperature=0.7, max_completion_length=1,
            generation_batch_size=800, num_train_epochs=25, per_device_train_batch_size=800, optim="sgd",
            learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0, importance_clip=clip,
            logging_strategy="no",
        )  # fmt: skip
        trainer.train()
        found[name] = arm_log_probs(trainer.model)
    top = int(start.argmax())
    before, corrected, plain = (values[top].exp().item() for values in (start, found["corrected"], found["plain"]))
    expected = (start / 0.7**3).log_softmax(-1)[top].exp().item()
    assert 0.1 < before < 0.5
    # 800 samples a round: the standard error of a probability of a quarter is .015 a round.
    assert corrected == pytest.approx(before, abs=0.06)
    assert plain == pytest.approx(expected, rel=0.2)
    assert plain > 1.4 * before


# ---- Samples that are weighted together ----


def test_online_and_offline_responses_of_a_prompt_share_their_weights(base: Path, tmp_path: Path) -> None:
    """By hand: three samples and the data's own response, with its ratio, normalised as one group."""
    data = tiny.make_sft_rows(6).add_column("mu", [-8.0 - i for i in range(6)])
    trainer = make_spr(
        base, tmp_path, data, num_rounds=1, reward_funcs=lengths, reward_temperature=0.3, importance_clip="2",
        behavior_logps_column="mu", offline_ratio=0.25, temperature=0.8,
    )  # fmt: skip
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer.train()
    stored = rows_of(tmp_path, 0)
    sampled = pq.read_table(tmp_path / "_rounds/rollouts/round-0000/rollouts.parquet").to_pylist()
    drawn = {(tuple(row["prompt_ids"]), tuple(ids)): logp for row in sampled for ids, logp in
             zip(row["completion_ids"], row["logps"], strict=True)}  # fmt: skip
    tokenizer = tiny.make_tokenizer()
    mu = {tuple(tokenizer(row["prompt"])["input_ids"]): row["mu"] for row in data}
    groups: dict[tuple[int, ...], list[tuple[float, float, float]]] = {}
    for ids, labels, weight, reward, offline in zip(
        *(stored[name] for name in ("input_ids", "labels", "weight", "reward", "offline")), strict=True
    ):
        prompt = tuple(token for token, label in zip(ids, labels, strict=True) if label == -100)
        answer = tuple(label for label in labels if label != -100)
        with torch.no_grad():
            logps = start(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        policy = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        groups.setdefault(prompt, []).append(
            (reward, policy - (mu[prompt] if offline else drawn[prompt, answer]), weight)
        )
    assert [len(members) for members in groups.values()] == [4] * 6
    for members in groups.values():
        middle = sorted(ratio for _, ratio, _ in members)[1]
        odds = [math.exp(r / 0.3 + max(-2.0, min(2.0, ratio - middle))) for r, ratio, _ in members]
        assert [weight for *_, weight in members] == pytest.approx([4 * o / sum(odds) for o in odds], rel=1e-4)


# ---- Adapters ----


def with_adapter(base: Path, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def test_an_adapter_is_trained_on_through_the_rounds(base: Path, tmp_path: Path) -> None:
    kept = KeepRows(tmp_path)
    trainer = make_spr(
        base, tmp_path, make_prompts(), reward_funcs=threes, peft_config=LoraConfig(**LORA), keep_iterates=True,
        num_rounds=3, callbacks=[kept],
    )  # fmt: skip
    below = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    settings = trainer.model.get_base_model().generation_config
    assert isinstance(trainer._weights, AdapterWeights)
    trainer.train()
    trainer.save_model()
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.get_base_model().generation_config is settings
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, below[name]), name
    assert [summary["update_norm"] > 0 for summary in trainer.round_summaries] == [True] * 3
    for folder in (tmp_path, tmp_path / "_rounds/iterates/3"):
        loaded = with_adapter(base, folder)
        ids = torch.tensor([kept.rows[0]["input_ids"][0]])
        trainer.model.eval()
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, trainer.model(ids).logits, atol=1e-5)
    assert (tmp_path / "_rounds/iterates/1/adapter_model.safetensors").is_file()
    assert not (tmp_path / "_rounds/iterates/1/model.safetensors").exists()


def test_an_adapter_that_could_not_be_resumed_is_refused(base: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**LORA))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="peft does not save"):
        make_spr(model, tmp_path, make_prompts(), reward_funcs=threes)


def test_an_adapter_of_another_name_is_trained_too(base: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**LORA), adapter_name="mine")
    trainer = make_spr(model, tmp_path, make_prompts(), reward_funcs=threes, keep_iterates=True)
    trainer.train()
    loaded = with_adapter(base, tmp_path / "_rounds/iterates/2")
    trainer.model.eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, trainer.model(ids).logits, atol=1e-5)
    assert trainer.round_summaries[0]["update_norm"] > 0


def test_rollouts_of_another_model_below_the_adapter_are_set_aside(base: Path, tmp_path: Path) -> None:
    """A fresh adapter has the same bits on every model of one shape."""
    other = tiny.save_model(tmp_path / "other", seed=7)
    found = []
    for model in (base, other):
        peft = LoraConfig(**LORA)
        trainer = make_spr(
            model, tmp_path / "out", make_prompts(), reward_funcs=threes, peft_config=peft, num_rounds=1
        )
        trainer.train()
        found.append(rows_of(tmp_path / "out", 0)["input_ids"])
    assert found[0] != found[1]


# ---- Resuming ----


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("step", [4, 9, 11])
def test_resumed_is_uninterrupted(base: Path, tmp_path: Path, step: int, lora: bool) -> None:
    """Inside a round, and at the boundary; dropout and shuffling included."""

    def make(folder: str, **more: Any) -> SPRTrainer:
        peft = {"peft_config": LoraConfig(**LORA)} if lora else {}
        return make_spr(
            base, tmp_path / folder, tiny.make_sft_rows(12), reward_funcs=threes, save_strategy="steps",
            save_steps=step, save_total_limit=1, num_generations=2, offline_ratio=0.33, temperature=0.8,
            **peft, **more,
        )  # fmt: skip

    whole = make("whole")
    whole.train()
    # Made when the first one is done: a constructor sets the seed that training goes on from.
    stopped = make("stopped", callbacks=[StopAt(step)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("stopped")
    resumed.train(resume_from_checkpoint="last")
    assert whole.state.global_step == 18
    assert losses(whole) == losses(resumed)
    assert tiny.same_weights(whole.model, resumed.model)
    assert rows_of(tmp_path / "whole", 1) == rows_of(tmp_path / "stopped", 1)
    for a, b in zip(whole.round_summaries, resumed.round_summaries, strict=True):
        timed = {name for name in a if name.endswith(("_seconds", "_gb", "per_second"))}
        for summary in (a, b):
            # Upstream counts them from the resume on.
            summary["train"].pop("num_tokens")
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_other_offline_responses_are_refused_when_resuming(base: Path, tmp_path: Path) -> None:
    def make(rewards: list[float]) -> SPRTrainer:
        rows = tiny.make_sft_rows(12).add_column("reward", rewards)
        return make_spr(base, tmp_path, rows, num_generations=0, save_strategy="steps", save_steps=1)

    make([0.1] * 12).train()
    with pytest.raises(ValueError, match="offline responses are not those of the run"):
        make([0.2] * 12).train(resume_from_checkpoint="last")


def test_a_start_that_is_refused_leaves_the_run_that_was_there(base: Path, tmp_path: Path) -> None:
    """An edited reward, whose old answers about the offline responses are on disk."""
    source = "def score(completions, **_): return [{} * len(text) for text in completions]"
    (tmp_path / "rewards.py").write_text(source.format(0.1))

    def make(**more: Any) -> SPRTrainer:
        sys.modules.pop(next((name for name in sys.modules if name.startswith("_trl_extras_rewards_")), ""), None)
        return make_spr(
            base, tmp_path / "out", tiny.make_sft_rows(12), num_generations=0, save_strategy="epoch",
            reward_funcs=f"{tmp_path / 'rewards.py'}:score", **more,
        )  # fmt: skip

    make().train()
    before = (tmp_path / "out/_rounds/run.json").read_text()
    (tmp_path / "rewards.py").write_text(source.format(0.2))
    with pytest.raises(ValueError, match="'score' has been edited since it judged the rollouts on disk"):
        make().train()
    assert (tmp_path / "out/_rounds/run.json").read_text() == before
    (tmp_path / "rewards.py").write_text(source.format(0.1))
    again = make(num_rounds=3, round_data="split")
    again.train(resume_from_checkpoint="last")
    assert [summary["round"] for summary in again.round_summaries] == [0, 1, 2]


def test_offline_responses_are_scored_once(base: Path, tmp_path: Path) -> None:
    """Whatever part of them a round draws; also by a run that resumes."""
    asked: list[str] = []

    def score(completions: Sequence[str], **_: Any) -> list[float]:
        asked.extend(completions)
        return lengths(completions)

    def make(**more: Any) -> SPRTrainer:
        return make_spr(
            base, tmp_path, make_prompts(4), offline_dataset=tiny.make_sft_rows(24, seed=5), reward_funcs=score,
            num_generations=1, offline_ratio=0.7, round_data="reuse", num_rounds=4, save_strategy="epoch", **more,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[StopAt(21)]).train()
    resumed = make()
    resumed.train(resume_from_checkpoint="last")
    offline = set(tiny.make_sft_rows(24, seed=5)["completion"])
    scored = [text for text in asked if text in offline]
    assert len(scored) > 9
    assert len(scored) == len(set(scored))
    assert {summary["offline_rows"] for summary in resumed.round_summaries} == {9}


# ---- One model at a time ----


def test_a_reward_model_is_there_for_its_phase_alone(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    scorer = tmp_path / "scorer"
    config = copy.deepcopy(tiny.make_model().config)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(scorer)
    tiny.make_tokenizer().save_pretrained(scorer)
    trainer = make_spr(base, tmp_path / "out", make_prompts(), reward_funcs=str(scorer))
    alive: list[bool] = []
    reward = trainer._judge.rewards[0]  # type: ignore[union-attr]
    sample, score, loss = trainer._sample, trainer._ask_about, trainer.compute_loss
    trainer._sample = lambda *a: (alive.append(reward.model is not None), sample(*a))[1]  # type: ignore[method-assign]
    trainer.compute_loss = lambda *a, **k: (  # type: ignore[method-assign]
        alive.append(reward.model is not None),
        loss(*a, **k),
    )[1]
    scoring: list[bool] = []
    trainer._ask_about = lambda *a: (scoring.append(reward.model is not None), score(*a))[1]  # type: ignore[method-assign]
    trainer.train()
    assert len(alive) > 10
    assert not any(alive)
    assert scoring == [True, True]


def test_phases_tell_their_memory(base: Path, tmp_path: Path) -> None:
    trainer = make_spr(base, tmp_path, tiny.make_sft_rows(6), reward_funcs=threes, temperature=0.9)
    trainer.train()
    for summary in trainer.round_summaries:
        for phase in ("sample", "score", "importance", "train"):
            # A process that has imported torch takes more than a tenth of a gigabyte.
            assert 0.1 < summary[f"{phase}_memory_gb"] < 100, phase


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_policy_leaves_the_gpu_while_a_reward_model_is_on_it(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(tiny.make_model().config)
    config.num_labels = 1
    scorer = LlamaForSequenceClassification(config)
    trainer = make_spr(
        base, tmp_path, make_prompts(), reward_funcs=scorer, reward_processing_classes=tiny.make_tokenizer(),
        use_cpu=False,
    )  # fmt: skip
    score, where = trainer._ask_about, []

    def look(*given: Any) -> None:
        where.append((next(trainer.model.parameters()).device.type, next(scorer.parameters()).device.type))
        score(*given)

    trainer._ask_about = look  # type: ignore[method-assign]
    trainer.train()
    assert set(where) == {("cpu", "cuda")}
    assert next(trainer.model.parameters()).device.type == "cuda"
    assert next(scorer.parameters()).device.type == "cpu"


# ---- As its users start it ----


REWARDS = """
def threes(completions, **kwargs):
    return [float(sum(word.endswith("3") for word in text.split())) for text in completions]
"""


def launch(parts: Path, out: Path, processes: int, batch_size: int, *more: str) -> subprocess.CompletedProcess[str]:
    """TRL's own `sft.py`, unmodified, in one process or several."""
    spec = find_spec("trl.scripts.sft")
    assert spec is not None
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [
        sys.executable, *(torchrun if processes > 1 else []), "-m", "trl_extras.run", "--trainer", "spr",
        str(spec.origin), "--model_name_or_path", str(parts / "model"), "--dataset_name", str(parts / "data"),
        "--num_rounds", "2", "--round_data", "reuse", "--per_device_train_batch_size", str(batch_size),
        "--learning_rate", "1e-2", "--optim", "sgd", "--train_sampling_strategy", "sequential",
        "--gradient_checkpointing", "false", "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
        "--save_strategy", "no", "--max_length", "32", "--max_completion_length", "6", "--output_dir", str(out),
        *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(parts / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=parts, env=environment, timeout=240,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny.save_model(folder / "model")
    (folder / "data").mkdir()
    for split, rows, seed in (("train", 16, 0), ("test", 6, 9)):
        data = tiny.make_sft_rows(rows, seed).add_column("reward", [0.1 * (i % 4) for i in range(rows)])
        data = data.add_column("mu", [-6.0 - i % 3 for i in range(rows)])
        data.to_json(folder / "data" / f"{split}.jsonl")
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def test_one_process_and_two_agree_on_samples_and_data(parts: Path, tmp_path: Path) -> None:
    """Ratios are computed by both, too: the behaviour's column, and a temperature."""
    online = [
        "--reward_funcs", "my_rewards.py:threes", "--num_generations", "3", "--generation_batch_size", "9",
        "--temperature", "0.8", "--behavior_logps_column", "mu", "--offline_ratio", "0.25", "--eval_strategy",
        "epoch",
    ]  # fmt: skip
    found = []
    for processes, batch_size in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        done = launch(parts, out, processes, batch_size, *online)
        assert done.returncode == 0, done.stdout[-3000:]
        assert done.stdout.count("trl-extras: SFTTrainer -> trl_extras.spr.SPRTrainer") == 1
        assert done.stdout.count("'eval_loss'") == 2
        assert "held-out prompts (iterate)" in done.stdout
        found.append((rows_of(out, 1), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)))
    (one, first), (two, second) = found
    assert len(one["weight"]) == 64
    for name in one:
        assert one[name] == (pytest.approx(two[name], rel=1e-4, abs=1e-5) if name == "weight" else two[name]), name
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6), name


def test_the_stock_script_without_samples(parts: Path, tmp_path: Path) -> None:
    done = launch(parts, tmp_path, 1, 4, "--num_generations", "0", "--reward_temperature", "0.2")
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(rows_of(tmp_path, 1)["weight"]) == 16
    assert (tmp_path / "model.safetensors").is_file()
    assert "reward_temperature: 0.2" in (tmp_path / "README.md").read_text()
