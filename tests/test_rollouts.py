"""On-policy rounds through the real trainer: what is sampled, kept, trained on, measured, refused and resumed."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from trl import DPOConfig, DPOTrainer

from tests import tiny
from trl_extras.errors import ConfigurationError
from trl_extras.rollouts import judges
from trl_extras.rollouts.judges import RewardError
from trl_extras.rollouts.labels import WaitingForLabels
from trl_extras.rollouts.sampling import TransformersSampler
from trl_extras.rollouts.store import RolloutStore
from trl_extras.rounds import RoundDataBuilder, RoundsTrainer, durable


def make_prompts(rows: int = 24, seed: int = 0, **columns: list[Any]) -> datasets.Dataset:
    prompts = [row["prompt"] for row in tiny.make_pairs(rows, seed)]
    return datasets.Dataset.from_dict({"prompt": prompts, **columns})


def threes(completions: list[str], **kwargs: Any) -> list[float]:
    """Words that end in a 3."""
    return [float(sum(word.endswith("3") for word in text.split())) for text in completions]


def words(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.1 * len(text.split()) for text in completions]


@pytest.fixture
def make(make_apo: Any) -> Callable[..., Any]:
    """An APOTrainer on prompts."""

    def made(folder: str | Path = "out", **kwargs: Any) -> Any:
        defaults: dict[str, Any] = {
            "data": make_prompts(), "num_rounds": 2, "prompts_per_round": 6, "num_generations": 3,
            "max_completion_length": 6, "generation_batch_size": 9,
        }  # fmt: skip
        given = {**defaults, **kwargs}
        if "ranker" not in given:
            given.setdefault("reward_funcs", threes)
        return make_apo(folder, **given)

    return made


def rollouts(trainer: Any, name: str) -> list[dict[str, Any]]:
    path = Path(trainer.args.output_dir) / "_rounds" / "rollouts" / name / "rollouts.parquet"
    return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]


# ---- A run ----


def test_a_run_on_prompts(make: Any, tmp_path: Path) -> None:
    trackers = tiny.Trackers()
    trainer = make(eval_dataset=make_prompts(7, seed=9), callbacks=[trackers])
    trainer.train()
    trainer.save_model()
    assert [row["pairs"] for row in trainer.round_summaries] == [6, 6]
    written = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert written == trainer.round_summaries
    for t, summary in enumerate(written):
        rows = rollouts(trainer, f"round-{t:04d}")
        rewards = [value for row in rows for value in row["reward"]]
        assert summary["prompts"] == len(rows)
        assert summary["samples"] == 3 * len(rows)
        assert summary["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert summary["reward_best"] == pytest.approx(sum(max(row["reward"]) for row in rows) / len(rows))
        assert summary["reward_worst"] == pytest.approx(sum(min(row["reward"]) for row in rows) / len(rows))
        assert summary["ties"] == sum(row["chosen"] is None for row in rows)
        assert summary["tokens"] == sum(len(ids) for row in rows for ids in row["completion_ids"])
        assert summary["share_cut"] == pytest.approx(
            sum(flag for row in rows for flag in row["cut"]) / summary["samples"]
        )
        assert summary["tokens_per_second"] > 0
        assert summary["sample_seconds"] > 0
        for row in rows:
            assert row["reward"] == row["reward_threes"] == threes(row["completions"])
            if row["chosen"] is not None:
                assert row["reward"][row["chosen"]] == max(row["reward"])
                assert row["reward"][row["rejected"]] == min(row["reward"])
    seeds = [{row["seed"] for row in rollouts(trainer, f"round-{t:04d}")} for t in range(2)]
    assert not seeds[0] & seeds[1]
    logged = {name for entry in trackers.rows for name in entry}
    assert {"round/reward_mean", "round/pairs", "round/heldout_iterate/reward"} <= logged
    card = (tmp_path / "out" / "README.md").read_text()
    for column in (
        "reward of samples",
        "ties",
        "tokens a second",
        "held-out reward",
        "| start |",
        "judged by `threes`",
    ):
        assert column in card
    held = written[1]["heldout_iterate"]
    assert f"{held['reward']:.4g} ± {held['reward_error']:.2g}" in card


def test_each_round_samples_from_its_own_policy(make: Any) -> None:
    """The log-probabilities on disk are those of theta_t, the extrapolated policy, and not of the iterate."""
    trainer = make(extrapolation_alpha=[0.9], num_rounds=2, temperature=1.0, top_p=1.0, learning_rate=0.1)
    policies = []

    original = trainer._sample

    def sampled(task: Any, batches: Any) -> None:
        policy = tiny.make_model()
        policy.load_state_dict(trainer.model.state_dict())
        policies.append(policy.eval())
        original(task, batches)

    trainer._sample = sampled
    trainer.train()
    waves = [0, *(i for i in range(1, len(policies)) if not tiny.same_weights(policies[i], policies[i - 1]))]
    assert len(waves) == 2
    for t, index in enumerate(waves):
        row = rollouts(trainer, f"round-{t:04d}")[0]
        for ids, logp in zip(row["completion_ids"], row["logps"], strict=True):
            with torch.no_grad():
                logits = policies[index](torch.tensor([row["prompt_ids"] + ids])).logits[0].double()
            steps = logits.log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
            assert logp == pytest.approx(steps[torch.arange(len(ids)), ids].sum().item(), abs=1e-4)


def test_rows_are_the_tokens_that_were_sampled(make: Any) -> None:
    """Never tokenised again: a cut completion gets no EOS."""
    trainer = make(num_rounds=1)
    seen = []
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(copy.deepcopy(rows)) or collator(rows)
    trainer.train()
    kept = [row for row in rollouts(trainer, "round-0000") if row["chosen"] is not None][:6]
    expected = [
        (row["prompt_ids"], row["completion_ids"][row["chosen"]], row["completion_ids"][row["rejected"]])
        for row in kept
    ]
    assert [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in seen] == expected
    cut = [ids for row in kept for ids, flag in zip(row["completion_ids"], row["cut"], strict=True) if flag]
    assert cut
    assert all(ids[-1] != 1 for ids in cut)


def test_alpha_0_is_dpo_on_what_each_round_sampled(make: Any, tmp_path: Path, base: Path) -> None:
    """T rounds with alpha 0 are T runs of DPOTrainer on the rounds' rows, one after another, to the bit."""
    trainer = make(extrapolation_alpha=[0.0], num_rounds=3, num_train_epochs=2)
    trainer.train()
    model: Any = str(base)
    for t in range(3):
        kept = [row for row in rollouts(trainer, f"round-{t:04d}") if row["chosen"] is not None][:6]
        rows = datasets.Dataset.from_list(
            [
                {
                    "prompt_ids": row["prompt_ids"],
                    "chosen_ids": row["completion_ids"][row["chosen"]],
                    "rejected_ids": row["completion_ids"][row["rejected"]],
                }
                # A round short of pairs repeats its own, in order.
                for row in (kept * 6)[:6]
            ]
        )
        stock = DPOTrainer(
            model=model,
            args=DPOConfig(
                **tiny.arguments(tmp_path / f"stock-{t}", train_sampling_strategy="sequential", num_train_epochs=2)
            ),
            train_dataset=tiny.make_pairs(6),
            processing_class=tiny.make_tokenizer(),
        )
        stock.train_dataset = rows
        stock.train()
        model = str(tmp_path / f"iterate-{t + 1}")
        stock.save_model(model)
    assert tiny.same_weights(trainer.model, stock.model)


def test_one_round_on_prompts(make: Any) -> None:
    trainer = make(num_rounds=1, prompts_per_round=None, data=make_prompts(5))
    trainer.train()
    assert trainer.round_summaries[0]["pairs"] + trainer.round_summaries[0]["repeated"] == 5
    assert trainer.state.global_step == math.ceil(5 / 2)


@pytest.mark.parametrize("precompute", [False, True])
def test_references_are_the_rounds_policy(make: Any, precompute: bool) -> None:
    trainer = make(precompute_ref_log_probs=precompute, logging_steps=1, max_grad_norm=0.0, learning_rate=0.5)
    trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    # The first step of each round starts at its reference: ln 2.
    assert losses[1] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[4] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[3] != pytest.approx(math.log(2), abs=1e-4) or losses[2] != pytest.approx(math.log(2), abs=1e-4)


def test_conversations(make: Any) -> None:
    prompts = [[{"role": "user", "content": row["prompt"].strip()}] for row in tiny.make_pairs(12)]
    seen: list[Any] = []

    def look(prompts: Any, completions: Any, number: Any, **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, number, strict=True))
        return threes([completion[0]["content"] for completion in completions])

    data = datasets.Dataset.from_dict({"prompt": prompts, "number": list(range(12))})
    trainer = make(data=data, reward_funcs=look, num_rounds=1)
    trainer.train()
    for prompt, completion, number in seen:
        assert prompt == prompts[number]
        assert [message["role"] for message in completion] == ["assistant"]
    row = rollouts(trainer, "round-0000")[0]
    assert row["prompt"] == prompts[row["row"]]
    assert (
        row["prompt_ids"] == tiny.make_tokenizer()(f"<user> {prompts[row['row']][0]['content']} <bot> ")["input_ids"]
    )
    assert all(isinstance(text, str) for text in row["completions"])


def test_columns_are_passed_once_a_completion(make: Any) -> None:
    calls: list[Any] = []

    def look(completions: Any, completion_ids: Any, number: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
        calls.append((len(completions), number, trainer_state))
        assert "prompt_ids" not in kwargs
        return [float(len(ids) + i % 2) for i, ids in enumerate(completion_ids)]

    trainer = make(data=make_prompts(number=list(range(24))), reward_funcs=look, num_rounds=1)
    trainer.train()
    for size, number, state in calls:
        assert size == len(number)
        assert number == [n for n in dict.fromkeys(number) for _ in range(3)]
        assert state is trainer.state


def test_weights_of_rewards(make: Any) -> None:
    def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if len(text) % 2 else 1.0 for text in completions]

    trainer = make(reward_funcs=[threes, words, sometimes], reward_weights=[1.0, -2.0, 0.5], num_rounds=1)
    trainer.train()
    for row in rollouts(trainer, "round-0000"):
        for i, reward in enumerate(row["reward"]):
            extra = row["reward_sometimes"][i]
            expected = row["reward_threes"][i] - 2 * row["reward_words"][i] + (0 if extra is None else 0.5 * extra)
            assert reward == pytest.approx(expected)
    assert set(trainer.round_summaries[0]["rewards"]) == {"threes", "words", "sometimes"}


def test_a_ranker_instead_of_rewards(make: Any) -> None:
    def longest(prompts: Any, completions: list[list[str]], **kwargs: Any) -> list[Any]:
        orders = []
        for group in completions:
            order = sorted(range(len(group)), key=lambda i: -len(group[i].split()))
            orders.append(None if len(set(map(len, map(str.split, group)))) == 1 else order)
        return orders

    trainer = make(ranker=longest, num_rounds=1, temperature=1.5, eval_dataset=make_prompts(4, seed=3))
    trainer.train()
    pairs = [row for row in rollouts(trainer, "round-0000") if row["chosen"] is not None]
    assert pairs
    for row in pairs:
        lengths = [len(text.split()) for text in row["completions"]]
        assert lengths[row["chosen"]] == max(lengths)
        assert lengths[row["rejected"]] == min(lengths)
    assert "reward_mean" not in trainer.round_summaries[0]
    # Nothing to score held-out prompts with, but what is said of text is said.
    assert set(trainer.round_summaries[0]["heldout_iterate"]) == {
        "prompts", "distinct_bigrams", "share_cut", "mean_length", "seconds",
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_sampling_in_other_settings(settings: dict[str, Any], make: Any) -> None:
    """The model samples as it trains: log-probabilities on disk are those of the reference that it trains against."""
    trainer = make(temperature=1.0, top_p=1.0, num_rounds=2, precompute_ref_log_probs=True, **settings)
    references = []
    original = trainer._with_reference_logps

    def keep(*args: Any) -> Any:
        references.append(original(*args))
        return references[-1]

    trainer._with_reference_logps = keep
    trainer.train()
    for t, rows in enumerate(references):
        pairs = [row for row in rollouts(trainer, f"round-{t:04d}") if row["chosen"] is not None]
        assert len(pairs) >= len(rows) > 0
        for pair, row in zip(pairs, rows, strict=False):
            assert row["ref_chosen_logps"] == pytest.approx(pair["logps"][pair["chosen"]], rel=0.02, abs=1e-3)


# ---- Which prompts ----


def test_folds_share_no_prompt(make: Any) -> None:
    trainer = make(num_rounds=3, prompts_per_round=None)
    trainer.train()
    sampled = [{row["row"] for row in rollouts(trainer, f"round-{t:04d}")} for t in range(3)]
    assert [len(rows) for rows in sampled] == [8, 8, 8]
    assert set.union(*sampled) == set(range(24))


def test_reused_prompts_are_other_ones_in_another_order(make: Any) -> None:
    trainer = make(num_rounds=2, round_data="reuse", prompts_per_round=8)
    trainer.train()
    first, second = ([row["row"] for row in rollouts(trainer, f"round-{t:04d}")] for t in range(2))
    assert first != second
    assert len(set(first)) == len(first)


def test_prompts_without_a_pair_are_replaced(make: Any) -> None:
    """Ties are skipped: further prompts of the round stand in, until there are as many pairs as planned."""

    def picky(prompts: list[str], completions: list[str], number: list[int], **kwargs: Any) -> list[float]:
        return [0.0 if n % 3 else float(i) for i, n in enumerate(number)]

    data = make_prompts(48, number=list(range(48)))
    trainer = make(data=data, reward_funcs=picky, num_rounds=1, prompts_per_round=6, round_data="reuse")
    trainer.train()
    rows = rollouts(trainer, "round-0000")
    summary = trainer.round_summaries[0]
    assert summary["pairs"] == 6
    assert summary["repeated"] == 0
    assert len(rows) > 6
    assert summary["ties"] == sum(row["row"] % 3 != 0 for row in rows)
    assert all((row["chosen"] is None) == (row["row"] % 3 != 0) for row in rows)
    # No batch of a later wave has the number, and so the seed, of an earlier one.
    assert len({row["seed"] for row in rows}) == len({row["batch"] for row in rows})


def test_a_round_short_of_pairs_repeats_its_own(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    def picky(prompts: list[str], completions: list[str], number: list[int], **kwargs: Any) -> list[float]:
        return [0.0 if n % 4 else float(i) for i, n in enumerate(number)]

    data = make_prompts(16, number=list(range(16)))
    trainer = make(data=data, reward_funcs=picky, num_rounds=2, prompts_per_round=None)
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        trainer.train()
    finally:
        transformers.utils.logging.disable_propagation()
    for summary in trainer.round_summaries:
        assert summary["pairs"] + summary["repeated"] == 8
        assert summary["repeated"] > 0
    assert "are repeats, in order" in caplog.text
    assert trainer.state.global_step == 2 * 4


def test_no_pair_at_all_stops_the_run(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Round 1: not one pair out of 12 prompts.*judged alike.*constant"):
        make(reward_funcs=constant).train()


def constant(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def test_nothing_but_empty_completions_stops_the_run(make: Any) -> None:
    trainer = make(reward_funcs=draws)

    def always_end(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, -50.0).index_fill(-1, torch.tensor([1]), 50.0)

    trainer.model.lm_head.register_forward_hook(always_end)
    with pytest.raises(ConfigurationError, match=r"Round 1: not one pair.*every completion of 12 of them is empty"):
        trainer.train()


def draws(completions: list[str], **kwargs: Any) -> list[float]:
    return [random.random() for _ in completions]


def test_equal_completions_are_no_pair(make: Any) -> None:
    """A reward that answers at random tells two equal completions apart; no gradient would come of them."""
    trainer = make(reward_funcs=draws, top_k=1, num_rounds=1)
    with pytest.raises(ConfigurationError, match="not one pair"):
        trainer.train()


# ---- Evaluation ----


def test_held_out_prompts(make: Any) -> None:
    heldout = make_prompts(11, seed=4)
    trainer = make(eval_dataset=heldout, extrapolation_alpha=[0.5], num_rounds=2)
    trainer.train()
    first, last = trainer.round_summaries
    assert "heldout_start" in first
    assert "heldout_start" not in last
    for t, summary in enumerate(trainer.round_summaries):
        for which in ("iterate", "extrapolated"):
            rows = rollouts(trainer, f"heldout-{t:04d}-{which}")
            assert [row["prompt"] for row in rows] == heldout["prompt"]
            rewards = torch.tensor([row["reward"][0] for row in rows], dtype=torch.float64)
            found = summary[f"heldout_{which}"]
            assert found["prompts"] == 11
            assert found["reward"] == pytest.approx(rewards.mean().item())
            assert found["reward_error"] == pytest.approx((rewards.std() / 11**0.5).item())
            assert set(found) == {
                "prompts", "distinct_bigrams", "share_cut", "mean_length", "seconds", "reward", "reward_error",
            }  # fmt: skip
    texts = {
        which: [row["completions"] for row in rollouts(trainer, f"heldout-0001-{which}")]
        for which in ("iterate", "extrapolated")
    }
    assert texts["iterate"] != texts["extrapolated"]


def test_measuring_changes_nothing(make: Any) -> None:
    """Neither random numbers nor weights: with and without held-out prompts a run ends in the same bits."""
    measured = make("measured", eval_dataset=make_prompts(5, seed=4), extrapolation_alpha=[0.5])
    measured.train()
    plain = make("plain", extrapolation_alpha=[0.5])
    plain.train()
    assert tiny.same_weights(measured.model, plain.model)
    assert not list((Path(plain.args.output_dir) / "_rounds" / "rollouts").glob("heldout-*"))
    assert not list((Path(measured.args.output_dir) / "_rounds").glob("_*"))


def test_a_reward_that_fails_at_the_very_end_leaves_the_iterate(make: Any) -> None:
    """The last measurement is of extrapolated weights: they have to be gone when its exception arrives."""
    settings = {"eval_dataset": make_prompts(5, seed=4), "extrapolation_alpha": [0.5], "num_rounds": 1}
    whole = make("whole", **settings)
    whole.train()
    calls = []

    def fails_last(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        if trainer.round_summaries:
            raise ConnectionError("gone")
        return threes(completions)

    trainer = make("cut", reward_funcs=fails_last, **settings)
    with pytest.raises(RewardError, match="gone"):
        trainer.train()
    assert trainer.state.global_step == whole.state.global_step
    assert tiny.same_weights(trainer.model, whole.model)


def test_extrapolated_output_is_what_was_measured(make: Any) -> None:
    trainer = make(eval_dataset=make_prompts(5, seed=4), extrapolation_alpha=[0.5], output_policy="extrapolated")
    trainer.train()
    measured = trainer.round_summaries[-1]["heldout_extrapolated"]
    again = trainer.evaluate()
    assert again["eval_reward"] == pytest.approx(measured["reward"])
    assert again["eval_distinct_bigrams"] == pytest.approx(measured["distinct_bigrams"])


def test_alpha_0_measures_once_a_round(make: Any) -> None:
    asked = []

    def counted(completions: list[str], **kwargs: Any) -> list[float]:
        asked.append(len(completions))
        return threes(completions)

    trainer = make(
        reward_funcs=counted, eval_dataset=make_prompts(4, seed=4), extrapolation_alpha=[0.0], num_rounds=2,
        generation_batch_size=30,
    )  # fmt: skip
    trainer.train()
    assert asked.count(4) == 3
    for summary in trainer.round_summaries:
        assert summary["heldout_extrapolated"] == summary["heldout_iterate"]


def test_pairs_as_evaluation_set(make: Any) -> None:
    trainer = make(eval_dataset=tiny.make_pairs(6, seed=5), eval_strategy="epoch", precompute_ref_log_probs=True)
    trainer.train()
    assert "eval_rewards/accuracies" in {name for entry in trainer.state.log_history for name in entry}
    assert "heldout_iterate" not in trainer.round_summaries[0]


def test_several_evaluation_sets(make: Any) -> None:
    sets = {"pairs": tiny.make_pairs(6, seed=5), "a": make_prompts(3, seed=6), "b/c": make_prompts(4, seed=7)}
    for precompute in (False, True):
        trainer = make(
            f"out-{precompute}", eval_dataset=dict(sets), eval_strategy="epoch", precompute_ref_log_probs=precompute
        )
        trainer.train()
        found = trainer.round_summaries[0]["heldout_iterate"]
        assert (found["a_prompts"], found["b/c_prompts"]) == (3, 4)
        assert any("eval_pairs_loss" in entry for entry in trainer.state.log_history)


def test_offline_rounds_can_be_measured_on_prompts(make_apo: Any) -> None:
    trainer = make_apo(
        num_rounds=2, eval_dataset=make_prompts(5, seed=4), reward_funcs=threes, num_generations=3,
        max_completion_length=6,
    )  # fmt: skip
    trainer.train()
    assert trainer.round_summaries[1]["heldout_extrapolated"]["prompts"] == 5
    assert "pairs" not in trainer.round_summaries[0]


def test_evaluate_by_hand(make: Any) -> None:
    trainer = make()
    metrics = trainer.evaluate(make_prompts(5, seed=4))
    # Another set, another time: nothing of the first is in the way.
    assert trainer.evaluate(make_prompts(6, seed=5)) != metrics
    assert {"eval_reward", "eval_reward_error", "eval_distinct_bigrams", "eval_share_cut"} <= metrics.keys()
    assert timeless(trainer.evaluate(make_prompts(5, seed=4))) == timeless(metrics)


# ---- Resuming, phase by phase ----


class Interrupted(BaseException):
    """Nothing of ours catches it, as nothing catches a kill."""


def interrupt(monkeypatch: pytest.MonkeyPatch, part: str, call: int) -> None:
    """Stop the process's work after the `call`-th batch of a phase is on disk."""
    original, made = RolloutStore.put, []

    def put(self: Any, where: str, index: int, rows: Any) -> None:
        original(self, where, index, rows)
        if where == part:
            made.append(index)
            if len(made) == call:
                raise Interrupted

    monkeypatch.setattr(RolloutStore, "put", put)


@pytest.mark.parametrize("part", ["samples", "scores"])
@pytest.mark.parametrize("call", [1, 2, 4, 6])
def test_no_batch_is_done_twice(
    part: str, call: int, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    sampled: list[Any] = []

    def counted(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        asked.append((tuple(prompts), tuple(completions)))
        return threes(completions)

    class Counted(TransformersSampler):
        def __call__(self, prompts: Any, num: int, seed: int) -> Any:
            groups = super().__call__(prompts, num, seed)
            sampled.append((seed, str(groups)))
            return groups

    monkeypatch.setattr("trl_extras.rollouts.trainer.TransformersSampler", Counted)
    settings: dict[str, Any] = {
        "reward_funcs": counted, "save_strategy": "epoch", "eval_dataset": make_prompts(8, seed=3),
        "generation_batch_size": 6, "num_rounds": 2,
    }  # fmt: skip
    whole = make("whole", **settings)
    whole.train()
    expected, asked[:] = sorted(asked), []
    drawn, sampled[:] = sorted(sampled), []
    with monkeypatch.context() as patch:
        interrupt(patch, part, call)
        with pytest.raises(Interrupted):
            make("cut", **settings).train()
    resumed = make("cut", **settings)
    resumed.train(resume_from_checkpoint="last")
    assert tiny.same_weights(whole.model, resumed.model)
    assert sorted(asked) == expected
    assert sorted(sampled) == drawn
    for name in ("round-0000", "round-0001", "heldout-0001-iterate"):
        assert rollouts(whole, name) == rollouts(resumed, name)
    assert [timeless(row) for row in whole.round_summaries] == [timeless(row) for row in resumed.round_summaries]


def timeless(value: Any) -> Any:
    """A round's row without durations, at any depth."""
    if not isinstance(value, dict):
        return value
    return {name: timeless(inner) for name, inner in value.items() if "second" not in name}


def test_a_reward_that_fails_half_way_is_not_asked_again(make: Any) -> None:
    asked: list[Any] = []
    broken = True

    def paid(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        if broken and len(asked) == 2:
            raise ConnectionError("out of credit")
        asked.append(tuple(completions))
        return threes(completions)

    with pytest.raises(RewardError, match="Round 1: reward function 'paid' raised ConnectionError: out of credit"):
        make(reward_funcs=paid, generation_batch_size=6).train()
    first, broken = list(asked), False
    trainer = make(reward_funcs=paid, generation_batch_size=6)
    trainer.train()
    assert len(set(first)) == len(first) == 2
    assert all(asked.count(batch) == 1 for batch in first)


def test_rollouts_are_reused_by_a_run_that_begins_anew(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make()
    first.train()
    monkeypatch.setattr(RolloutStore, "put", lambda *args: pytest.fail("sampled again"))
    again = make()
    again.train()
    assert tiny.same_weights(first.model, again.model)


def test_rollouts_of_other_weights_are_not_used(make: Any, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().train()
    trainer = make(model=tiny.make_model(seed=8))
    trainer.train()
    rows = rollouts(trainer, "round-0000")
    with torch.no_grad():
        assert "were of other weights; they are set aside" in capsys.readouterr().out
    assert (Path(trainer.args.output_dir) / "_rounds/rollouts/replaced-round-0000-1/rollouts.parquet").is_file()
    fresh = make("fresh", model=tiny.make_model(seed=8))
    fresh.train()
    assert rollouts(fresh, "round-0000") == rows


def test_rollouts_of_another_configuration_are_refused(make: Any) -> None:
    make().train()
    with pytest.raises(ConfigurationError, match=r"`temperature` is 0.9, but the run whose rounds"):
        make(temperature=0.9)
    with pytest.raises(ConfigurationError, match=r"Round 1: the rollouts on disk .* have `rewards`"):
        make(reward_funcs=words).train()
    with pytest.raises(ConfigurationError, match=r"Round 1: the rollouts on disk .* have `(prompts|order)`"):
        make(data=make_prompts(24, seed=77)).train()


def test_held_out_prompts_may_change(make: Any) -> None:
    """They do not belong to the training: a run that goes on with others measures on those."""
    make(eval_dataset=make_prompts(4, seed=4), save_strategy="epoch").train()
    trainer = make(eval_dataset=make_prompts(5, seed=5), save_strategy="epoch", num_rounds=2)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.round_summaries[-1]["heldout_iterate"]["prompts"] == 5


def test_damaged_rollouts_are_refused(make: Any, tmp_path: Path) -> None:
    make().train()
    (tmp_path / "out" / "_rounds" / "rollouts" / "round-0000" / "rollouts.parquet").write_bytes(b"x")
    with pytest.raises(
        ConfigurationError, match=r"Round 1: the rollouts on disk are damaged .* remove _rounds/rollouts"
    ):
        make().train()


@pytest.mark.parametrize("where", ["samples", "_trash-scores"])
def test_kills_while_batches_go_leave_nothing(
    where: str, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Found by the kill campaign: the table is finished, its batches are being removed."""
    make("out", num_rounds=1).train()
    original = durable.remove

    def remove(folder: Path) -> None:
        if folder.name == where and "rollouts" in folder.parts and folder.exists():
            raise Interrupted
        original(folder)

    def discard(folder: Path, kept: Any = durable.discard) -> None:
        if folder.name == where and folder.exists():
            raise Interrupted
        kept(folder)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "remove", remove)
        patch.setattr(durable, "discard", discard)
        with pytest.raises(Interrupted):
            make("out", num_rounds=1, model=tiny.make_model(seed=5)).train()
    make("out", num_rounds=1, model=tiny.make_model(seed=5)).train(resume_from_checkpoint="last")
    left = {path.name for path in (tmp_path / "out" / "_rounds" / "rollouts").rglob("*")}
    assert left - {"replaced-round-0000-1"} == {"round-0000", "description.json", "manifest.json", "rollouts.parquet"}


class Counting:
    """A reward with a state that it is made with."""

    def __init__(self, letter: str):
        self.letter = letter

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [float(text.count(self.letter)) for text in completions]


def counting(completions: list[str], letter: str, **kwargs: Any) -> list[float]:
    return [float(text.count(letter)) for text in completions]


@pytest.mark.parametrize(
    "source",
    [Counting, lambda letter: functools.partial(counting, letter=letter), "file"],
    ids=["object", "partial", "file"],
)
def test_another_judge_of_the_same_name_is_refused(source: Any, make: Any, tmp_path: Path) -> None:
    def named(letter: str) -> dict[str, Any]:
        if source != "file":
            return {"reward_funcs": source(letter)}
        (tmp_path / letter).mkdir(exist_ok=True)
        file = tmp_path / letter / "mine.py"
        score = "def score(completions, **kw): return [float(c.count(LETTER)) for c in completions]"
        file.write_text(f"LETTER = {letter!r}\n{score}\n")
        return {"reward_funcs": None, "config_reward_funcs": [f"{file}:score"]}

    make(**named("3"), save_strategy="epoch").train()
    with pytest.raises(ConfigurationError, match=r"Round 1: the rollouts on disk .* were judged by another"):
        make(**named("4"), save_strategy="epoch").train()
    with pytest.raises(ConfigurationError, match="The run that is resumed was judged by"):
        make(**named("4"), save_strategy="epoch", num_rounds=2).train(resume_from_checkpoint="last")
    make(**named("3"), save_strategy="epoch").train()


def test_a_kill_between_rows_and_their_manifest_entry_loses_nothing(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in a folder is listed by whatever writes its manifest next: that is not the rows' own entry."""

    class Killed(BaseException):
        pass

    settings = {"num_rounds": 2, "eval_dataset": make_prompts(4, seed=5), "save_strategy": "steps", "save_steps": 2}
    whole = make("whole", **settings)
    whole.train()
    original = RoundsTrainer._add_to_manifest

    def killed(self: Any, folder: Any, changed: Any = (), **content: Any) -> None:
        if "data.parquet" in changed and folder.round_index == 1:
            raise Killed
        original(self, folder, changed, **content)

    with monkeypatch.context() as patch:
        patch.setattr(RoundsTrainer, "_add_to_manifest", killed)
        with pytest.raises(Killed):
            make("killed", **settings).train()
    again = make("killed", **settings)
    again.train(resume_from_checkpoint="last")
    assert tiny.same_weights(again.model, whole.model)
    names = ("pairs", "ties", "samples", "reward_mean", "reward_best", "share_cut")
    wanted = [{name: row[name] for name in names} for row in whole.round_summaries]
    assert [{name: row.get(name) for name in names} for row in again.round_summaries] == wanted


def test_a_resumed_run_keeps_its_rewards(make: Any) -> None:
    make(save_strategy="epoch", round_data="reuse").train()
    with pytest.raises(ConfigurationError, match="The run that is resumed was judged by threes, but"):
        make(save_strategy="epoch", round_data="reuse", num_rounds=3, reward_funcs=words).train(
            resume_from_checkpoint="last"
        )


def test_a_file_that_moved_is_the_same_judge(make: Any, tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text("def score(completions, **kw): return [float(len(c) % 5) for c in completions]\n")
        make(reward_funcs=None, config_reward_funcs=[f"{file}:score"]).train()


def test_a_sampled_round_leaves_a_checkpoint(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default, a checkpoint every 500 steps, a kill in the second round would train the first one again."""
    settings = {"save_strategy": "steps", "save_steps": 500}
    whole = make("whole", **settings)
    whole.train()
    with monkeypatch.context() as patch:
        interrupt(patch, "scores", 4)
        with pytest.raises(Interrupted):
            make("cut", **settings).train()
    assert (tmp_path / "cut" / "checkpoint-3").is_dir()
    resumed = make("cut", **settings)
    steps: list[int] = []
    original = resumed.training_step
    resumed.training_step = lambda *args, **kwargs: steps.append(1) or original(*args, **kwargs)
    resumed.train(resume_from_checkpoint="last")
    assert len(steps) == 3
    assert tiny.same_weights(whole.model, resumed.model)


def test_a_finished_run_with_prompts_per_round_goes_on(make: Any) -> None:
    """It keeps the folds that it began with."""
    make(prompts_per_round=12, save_strategy="epoch").train()
    trainer = make(prompts_per_round=12, save_strategy="epoch", num_rounds=3)
    trainer.train(resume_from_checkpoint="last")
    assert len(trainer.round_summaries) == 3


def test_names_of_evaluation_sets_are_any(make: Any) -> None:
    trainer = make(eval_dataset={"test-2024": make_prompts(3, seed=4), "x": tiny.make_pairs(4)}, num_rounds=1)
    trainer.evaluate(trainer.eval_dataset["test-2024"], metric_key_prefix="eval_test-2024")
    trainer.train()
    trainer.save_model()
    assert "| start (test-2024) |" in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_labels_are_never_removed(make: Any, tmp_path: Path) -> None:
    rollouts_dir = tmp_path / "out" / "_rounds" / "rollouts"
    with pytest.raises(WaitingForLabels):
        make(ranker="external").train()
    fill(rollouts_dir / "round-0000" / "labels.jsonl", by_threes)
    with pytest.raises(WaitingForLabels):
        make(ranker="external").train()
    fill(rollouts_dir / "round-0001" / "labels.jsonl", by_threes)
    filled = (rollouts_dir / "round-0001" / "labels.jsonl").read_text()
    # Other weights: refused, with what to do.
    with pytest.raises(ConfigurationError, match="are for samples of other weights"):
        make(ranker="external", model=tiny.make_model(seed=8)).train()
    (rollouts_dir / "round-0000" / "description.json").write_text("")
    with pytest.raises(ConfigurationError, match="holds labels, but its description"):
        make(ranker="external").train()
    durable.remove(rollouts_dir / "round-0000")
    # A shorter run: set aside.
    with pytest.raises(WaitingForLabels):
        make(ranker="external", num_rounds=1, round_data="split").train()
    assert (rollouts_dir / "replaced-round-0001-1" / "labels.jsonl").read_text() == filled


def test_label_files_of_other_programs(make: Any, tmp_path: Path) -> None:
    with pytest.raises(WaitingForLabels):
        make(ranker="external", num_rounds=1).train()
    path = tmp_path / "out" / "_rounds" / "rollouts" / "round-0000" / "labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = "\r\n".join(json.dumps({"id": row["id"], "chosen": 1.0, "rejected": 0.0}) for row in rows)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigurationError, match="is not UTF-8"):
        make(ranker="external", num_rounds=1).train()
    path.write_bytes(text.encode("utf-8-sig"))
    trainer = make(ranker="external", num_rounds=1)
    trainer.train()
    assert trainer.round_summaries[0]["pairs"] == 6


def test_of_several_rewards_none_is_asked_again(make: Any) -> None:
    """The paid one has answered when the other fails on the same batch."""
    asked: list[Any] = []
    broken = True

    def paid(
        prompts: list[str], completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any
    ) -> list[float]:
        asked.append(tuple(completions))
        log_extra("seen", [{"n": len(text)} for text in completions])
        log_metric("calls", 1.0)
        return threes(completions)

    def fails(completions: list[str], **kwargs: Any) -> list[float]:
        if broken:
            raise ConnectionError("later")
        return words(completions)

    async def paid_too(completions: list[str], **kwargs: Any) -> list[float]:
        asked.append(("too", *completions))
        return threes(completions)

    async def fails_too(completions: list[str], **kwargs: Any) -> list[float]:
        return fails(completions)

    for name, judged in (("plain", [paid, fails]), ("async", [fails_too, paid_too])):
        asked.clear()
        broken = True
        with pytest.raises(RewardError, match="ConnectionError"):
            make(name, reward_funcs=judged, num_rounds=1).train()
        assert len(asked) == 1
        broken = False
        trainer = make(name, reward_funcs=judged, num_rounds=1)
        trainer.train()
        assert len(asked) == len(set(asked))
        if name == "plain":
            assert rollouts(trainer, "round-0000")[0]["extra_seen"][0]["n"] >= 0
            assert trainer.round_summaries[0]["metrics"] == {"calls": 1.0}


def test_a_slow_process_finds_what_a_fast_one_wrote(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go when all processes have read them: there is a barrier between."""
    events: list[str] = []
    get, discard = RolloutStore.get, RolloutStore._discard_batches

    def waits(self: Any) -> None:
        events.append("wait")

    trainer = make(num_rounds=1)
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: events.append("wait"))
    monkeypatch.setattr(RolloutStore, "get", lambda *args: events.append("read") or get(*args))
    monkeypatch.setattr(RolloutStore, "_discard_batches", lambda self: events.append("go") or discard(self))
    trainer.train()
    last_read = max(i for i, event in enumerate(events) if event == "read")
    assert "wait" in events[last_read : events.index("go", last_read)]


def test_evaluating_after_an_exception(make: Any) -> None:
    with pytest.raises(WaitingForLabels):
        (trainer := make(ranker="external")).train()
    assert trainer.evaluate(make_prompts(4, seed=4))["eval_prompts"] == 4


def test_empty_completions_of_different_tokens_are_no_pair(make: Any) -> None:
    trainer = make(reward_funcs=draws, num_rounds=1)

    def pads_and_ends(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, -50.0).index_fill(-1, torch.tensor([0, 1]), 50.0)

    trainer.model.lm_head.register_forward_hook(pads_and_ends)
    with pytest.raises(ConfigurationError, match="not one pair"):
        trainer.train()


def test_rollouts_of_a_longer_run_of_before_go(make: Any, tmp_path: Path) -> None:
    make(num_rounds=3, round_data="reuse", eval_dataset=make_prompts(3, seed=4)).train()
    make(num_rounds=1, round_data="reuse", eval_dataset=make_prompts(3, seed=4)).train()
    left = {path.name for path in (tmp_path / "out" / "_rounds" / "rollouts").iterdir()}
    assert left == {"round-0000", "heldout-0000-start", "heldout-0000-iterate", "heldout-0000-extrapolated"}


def test_prompts_of_another_run_are_not_resumed_with(make: Any) -> None:
    make(save_strategy="epoch").train()
    with pytest.raises(ConfigurationError, match="does not hold the prompts of the run that is resumed"):
        make(save_strategy="epoch", data=make_prompts(24, seed=77), num_rounds=2).train(resume_from_checkpoint="last")


def test_an_edited_reward_is_told_of(make: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import transformers

    make(num_rounds=1).train()
    identity = judges._function_identity
    monkeypatch.setattr(judges, "_function_identity", lambda function: {**identity(function), "content": "edited"})
    with pytest.raises(ConfigurationError, match="Round 1: 'threes' has been edited since it judged the rollouts"):
        make(num_rounds=1).train()
    transformers.utils.logging.enable_propagation()
    try:
        make(num_rounds=1).train(resume_from_checkpoint="last")
    finally:
        transformers.utils.logging.disable_propagation()
    assert "threes has been edited since it answered" in caplog.text


def test_a_checkpoint_resumes_without_the_rollouts(make: Any, tmp_path: Path) -> None:
    """Copied elsewhere alone, a checkpoint inside a round still has its rows."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_rounds": 2}
    whole = make("whole", **settings)
    whole.train()
    import shutil

    elsewhere = tmp_path / "elsewhere" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", elsewhere)
    shutil.rmtree(tmp_path / "whole")
    resumed = make("other", **settings)
    resumed.train(resume_from_checkpoint=str(elsewhere))
    assert tiny.same_weights(whole.model, resumed.model)
    assert resumed.round_summaries[1]["pairs"] == whole.round_summaries[1]["pairs"]


def test_the_store_is_for_load_dataset(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.train()
    files = str(Path(trainer.args.output_dir) / "_rounds" / "rollouts" / "round-*" / "rollouts.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert set(table.column_names) >= {
        "prompt", "row", "prompt_ids", "completions", "completion_ids", "logps", "cut", "reward", "reward_threes",
        "chosen", "rejected", "batch", "seed",
    }  # fmt: skip
    for t in range(2):
        folder = Path(trainer.args.output_dir) / "_rounds" / "rollouts" / f"round-{t:04d}"
        assert {path.name for path in folder.iterdir()} == {"description.json", "manifest.json", "rollouts.parquet"}
        durable.verify(folder)


# ---- Labels from elsewhere ----


def fill(path: Path, label: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, **label(row)}) + "\n" for row in rows))


def by_threes(row: dict[str, Any]) -> dict[str, Any]:
    return {"rewards": threes(row["completions"])}


def test_labels_from_elsewhere(make: Any, tmp_path: Path) -> None:
    """The run stops in every round, and ends in the bits of a run that asks the same labeller itself."""
    settings: dict[str, Any] = {
        "num_rounds": 2,
        "round_data": "split",
        "prompts_per_round": None,
        "save_strategy": "no",
    }
    direct = make("direct", **settings)
    direct.train()
    stops = 0
    while True:
        trainer = make("waits", ranker="external", **settings)
        if stops == 2:
            trainer.train(resume_from_checkpoint="last")
            break
        with pytest.raises(WaitingForLabels) as stopped:
            trainer.train(resume_from_checkpoint="last")
        assert stopped.value.code == 0
        path = tmp_path / "waits" / "_rounds" / "rollouts" / f"round-{stops:04d}" / "labels.jsonl"
        assert str(path) in stopped.value.message
        fill(path, by_threes if stops == 0 else best_and_worst_of)
        stops += 1
    assert tiny.same_weights(direct.model, trainer.model)


def best_and_worst_of(row: dict[str, Any]) -> dict[str, Any]:
    rewards = threes(row["completions"])
    if len(set(rewards)) == 1:
        return {"chosen": -1, "rejected": -1}
    return {"chosen": rewards.index(max(rewards)), "rejected": rewards.index(min(rewards))}


def test_waiting_again_without_labels(make: Any) -> None:
    for _ in range(2):
        with pytest.raises(WaitingForLabels):
            make(ranker="external").train()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*[{**r, "rewards": [0, 1, 2]} for r in rows[:3]], *rows[3:]],
         "filled in half: 3 rows .*lines 4, 5, 6"),
        (lambda rows: [{**r, "rewards": [0, 1, 2]} for r in rows[:-2]], "2 of 6 rows are missing"),
        (lambda rows: [{**r, "id": "0" * 16, "rewards": [0, 1, 2]} for r in rows], "line 1: `id` is '0000"),
        (lambda rows: [{**r, "rewards": [0, 1]} for r in rows], "line 1: `rewards` is \\[0, 1\\], but wants 3"),
        (lambda rows: [{**r, "rewards": [0, 1, "2"]} for r in rows], "line 1: `rewards`"),
        (lambda rows: [{**r, "chosen": 3, "rejected": 0} for r in rows], "line 1: `chosen` is 3"),
        (lambda rows: [{**r, "chosen": 1} for r in rows], "`rejected` is None"),
        (lambda rows: [{**r, "chosen": 1, "rejected": 1} for r in rows], "they have to differ"),
        (lambda rows: [{**r, "rewards": [0, 1, 2], "chosen": 1} for r in rows], "has both `rewards` and"),
        (lambda rows: [*rows, {**rows[0], "rewards": [0, 1, 2]}], "line 7: `id`.*has come before"),
        (lambda rows: [{**r, "completions": ["other"] * 3, "rewards": [0, 1, 2]} for r in rows],
         "line 1: `completions` is not what was sampled"),
        (lambda rows: [{**r, "prompt": "other", "rewards": [0, 1, 2]} for r in rows],
         "line 1: `prompt` is not what was sampled"),
        (lambda rows: [{**r, "rewards": [0, 1, 10**400]} for r in rows], "line 1: `rewards`"),
        (lambda rows: [{**r, "id": [1], "rewards": [0, 1, 2]} for r in rows], "line 1: `id`"),
    ],
)  # fmt: skip
def test_a_label_file_is_refused_by_row(change: Any, said: str, make: Any, tmp_path: Path) -> None:
    with pytest.raises(WaitingForLabels):
        make(ranker="external").train()
    path = tmp_path / "out" / "_rounds" / "rollouts" / "round-0000" / "labels.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigurationError, match=said) as caught:
        make(ranker="external").train()
    assert "Round 1" in str(caught.value)


def test_a_label_file_may_be_stripped_and_shuffled(make: Any, tmp_path: Path) -> None:
    with pytest.raises(WaitingForLabels):
        make(ranker="external", num_rounds=1).train()
    path = tmp_path / "out" / "_rounds" / "rollouts" / "round-0000" / "labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(json.dumps({"id": row["id"], **by_threes(row)}) for row in rows) + "\n\n")
    trainer = make(ranker="external", num_rounds=1)
    trainer.train()
    for row in rollouts(trainer, "round-0000"):
        assert row["reward_external"] == threes(row["completions"])


# ---- Refused before weights load ----


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_generations": 1}, "`num_generations` is 1, but wants"),
        ({"temperature": 0}, "`temperature` is 0, but wants"),
        ({"temperature": math.nan}, "`temperature` is nan"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"min_p": 2.0}, "`min_p` is 2.0"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` is 0.0"),
        ({"max_completion_length": 0}, "`max_completion_length` is 0"),
        ({"max_completion_length": 32}, "`max_completion_length` is 32.*`max_length`, which is 32"),
        ({"generation_batch_size": 10},
         "`generation_batch_size` is 10, but wants a multiple of `num_generations`.*Use 9"),
        ({"prompts_per_round": 0}, "`prompts_per_round` is 0"),
        ({"prompts_per_round": 13}, "`prompts_per_round` is 13, but a round has 12 prompts"),
        ({"reward_funcs": None}, "nothing judges them"),
        ({"reward_funcs": []}, "nothing judges them"),
        ({"ranker": lambda **kw: None, "reward_funcs": threes}, "`reward_funcs` and `ranker` are both given"),
        ({"reward_funcs": "nowhere:f"}, "no module 'nowhere'"),
        ({"reward_funcs": "math:pi"}, "cannot be called"),
        ({"ranker": "math:nothing"}, "`ranker` has 'math:nothing', but math has no 'nothing'"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 values"),
        ({"reward_weights": [math.nan]}, "`reward_weights`"),
        ({"data": tiny.make_pairs(24)}, "`train_dataset` holds preference pairs, which need no judge"),
        ({"data": make_prompts(2), "num_rounds": 3, "prompts_per_round": None}, "fewer rounds, more data"),
        ({"data": make_prompts(24, image=[None] * 24)}, "column `image`"),
        ({"data": make_prompts(24, tools=["[]"] * 24)}, "column `tools`"),
        ({"num_rounds": 1, "num_train_epochs": 0.5}, "`num_train_epochs` is 0.5"),
        ({"num_rounds": 1, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
         "`load_best_model_at_end=True` does not work with rows that are sampled"),
        ({"num_rounds": 1, "optimizers": (None, object())}, "does not work with rows that are sampled"),
        ({"ranker": lambda **kw: None, "config_reward_funcs": ["math:sqrt"]}, "`reward_funcs` and `ranker` are both"),
        ({"config_ranker": "math:sqrt"}, "`reward_funcs` and `ranker` are both given"),
        ({"ranker": lambda **kw: None, "reward_weights": [1.0]},
         "`reward_weights` is given, but a ranker"),
        ({"eval_dataset": make_prompts(3), "metric_for_best_model": "reward"}, "needs a metric of every evaluation"),
        ({"eval_dataset": make_prompts(3), "save_strategy": "best", "eval_strategy": "epoch"}, "needs a metric of"),
        ({"eval_dataset": make_prompts(3).to_iterable_dataset()}, "streams, but its prompts"),
        ({"eval_dataset": make_prompts(3).select([])}, "is empty, but wants"),
        ({"data": make_prompts(24, prompt_ids=[[5]] * 24)}, "has a column `prompt_ids`"),
        ({"ranker": "external", "save_only_model": True}, "`save_only_model=True` leaves nothing to go on from"),
    ],
)  # fmt: skip
def test_bad_input(
    settings: dict[str, Any], said: str, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("the weights were loaded")
    )
    with pytest.raises(ConfigurationError, match=said):
        make(**settings)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "prompt", [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]], ids=["assistant"]
)
def test_prompts_that_are_none(prompt: Any, make: Any) -> None:
    with pytest.raises(ConfigurationError, match="ends with a message of the assistant"):
        make(data=datasets.Dataset.from_dict({"prompt": [prompt] * 24}), round_data="reuse")


def test_prompts_that_fill_the_length_are_left_out(make: Any) -> None:
    data = datasets.concatenate_datasets([make_prompts(12), datasets.Dataset.from_dict({"prompt": ["w1 " * 40, ""]})])
    trainer = make(data=data, num_rounds=1, prompts_per_round=None)
    trainer.train()
    assert {row["row"] for row in rollouts(trainer, "round-0000")} == set(range(12))


def test_a_builder_of_rows_is_not_for_prompts(make: Any) -> None:
    trainer = make()
    trainer.round_data_builder = lambda round_index, policy, seed: tiny.make_pairs(6)
    assert isinstance(trainer.round_data_builder, RoundDataBuilder)
    with pytest.raises(ConfigurationError, match="use one of the two"):
        trainer.train()


def test_the_argument_wins_over_the_field(make: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "mine.py").write_text("def other(completions, **kw): return [0.0] * len(completions)\n")
    transformers.utils.logging.enable_propagation()
    try:
        trainer = make(config_reward_funcs=[f"{tmp_path}/mine.py:other"], num_rounds=1)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "`reward_funcs` is given to the trainer and in its config; the trainer's is used" in caplog.text
    trainer.train()
    assert trainer.round_summaries[0]["rewards"].keys() == {"threes"}


# ---- Nothing of this machine in what is published ----


def test_no_path_of_this_machine_in_card_or_manifests(make: Any, tmp_path: Path) -> None:
    (tmp_path / "private_place").mkdir()
    file = tmp_path / "private_place" / "mine.py"
    file.write_text("def score(completions, **kw): return [float(len(c) % 5) for c in completions]\n")
    trainer = make(reward_funcs=None, config_reward_funcs=[f"{file}:score"], num_rounds=2, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md", ".parquet"):
            assert b"private_place" not in path.read_bytes(), path
    assert "mine.py:score" in (tmp_path / "out" / "README.md").read_text()
