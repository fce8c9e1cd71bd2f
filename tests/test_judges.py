"""Reward functions, models and rankers: names, conventions, and every wrong answer."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from tests import tiny
from trl_extras import APOConfig, APOTrainer, SPRConfig, SPRTrainer
from trl_extras.errors import ConfigurationError
from trl_extras.rollouts.judges import JudgementError, Ranker, RewardError, Rewards, load_function, public_name


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def slow_length(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def judge(*sources: Any, weights: Any = None, columns: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    rewards = Rewards(list(sources), None, weights, trust_remote_code=False)
    return rewards.judge("Round 2", ["p", "q"], ["a", "bbb"], [[5], [6, 7]], columns or {}, None)


# ---- Names ----


def test_names_given_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my rewards.py"
    file.write_text("def short(completions, **kw):\n    return [-len(c) for c in completions]\nvalue = 3\n")
    assert load_function("reward_funcs", f"{file}:short")(completions=["ab"]) == [-2]
    (tmp_path / "beside_the_run.py").write_text("class Judge:\n    @staticmethod\n    def score(**kw): return [1]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_function("reward_funcs", "beside_the_run:Judge.score")() == [1]
    assert load_function("reward_funcs", "my rewards.py:short") is load_function("reward_funcs", f"{file}:short")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:pi", "of type float and cannot be called"),
        ("missing.py:f", "there is no file missing.py"),
        ("broken.py:f", "running broken.py failed: ZeroDivisionError"),
        ("imports_nothing.py:f", "No module named 'not_there_at_all'"),
        (":f", "wants package.module:function"),
        ("math:", "wants package.module:function"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "imports_nothing.py").write_text("import not_there_at_all\n")
    with pytest.raises(ConfigurationError) as caught:
        load_function("reward_funcs", name)
    assert said in str(caught.value)
    assert "`reward_funcs`" in str(caught.value)


def test_importing_leaves_no_half_imported_file(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text("x = 1\n1 / 0\n")
    with pytest.raises(ConfigurationError):
        load_function("ranker", f"{file}:f")
    file.write_text("def f(): return 7\n")
    assert load_function("ranker", f"{file}:f")() == 7


def test_names_of_trl() -> None:
    rewards = Rewards(["think_format_reward", "math.sqrt", "get_soft_overlong_punishment"], None, None, False)
    assert rewards.names == ["think_format_reward", "sqrt", "soft_overlong_punishment"]


def test_equal_names_are_told_apart() -> None:
    assert Rewards([length, length], None, None, False).names == ["length", "length_2"]


def test_names_without_folders() -> None:
    assert public_name("/home/someone/rewards.py:f") == "rewards.py:f"
    assert public_name("package.module:f") == "package.module:f"
    assert public_name("/home/someone/reward-model") == "reward-model"
    assert public_name("org/reward-model") == "org/reward-model"


def test_a_model_that_is_not_there_is_refused_before_it_loads() -> None:
    with pytest.raises(ConfigurationError, match="no-such-org/no-such-model"):
        Rewards("no-such-org/no-such-model", None, None, False)


@pytest.mark.parametrize("source", [3, object(), None])
def test_something_else_is_no_reward(source: Any) -> None:
    with pytest.raises(ConfigurationError, match="wants functions, models, or their names"):
        Rewards([source], None, None, False)


def test_lengths_have_to_agree() -> None:
    with pytest.raises(ConfigurationError, match="`reward_weights` has 1 values, but `reward_funcs` has 2"):
        Rewards([length, length], None, [1.0], False)
    with pytest.raises(ConfigurationError, match="`reward_processing_classes` has 1 entries"):
        Rewards([length, length], [tiny.make_tokenizer()], None, False)


# ---- Functions ----


def test_functions_get_what_trl_gives_them() -> None:
    seen: dict[str, Any] = {}

    def look(prompts: Any, completions: Any, completion_ids: Any, solution: Any, trainer_state: Any, **kw: Any) -> Any:
        seen.update(kw, prompts=prompts, completions=completions, ids=completion_ids, solution=solution)
        kw["log_extra"]("extracted", ["x", "y"])
        kw["log_metric"]("accuracy", 0.5)
        return [1, 2]

    judgement = judge(look, columns={"solution": [4, 5]})
    assert judgement.values == {"look": [1.0, 2.0]}
    assert (seen["prompts"], seen["completions"], seen["ids"]) == (["p", "q"], ["a", "bbb"], [[5], [6, 7]])
    assert seen["solution"] == [4, 5]
    assert judgement.extras == {"extracted": ["x", "y"]}
    assert judgement.metrics == {"accuracy": [0.5]}


class AsyncJudge:
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return await slow_length(completions)


@pytest.mark.parametrize("function", [slow_length, AsyncJudge(), functools.partial(slow_length, unused=1)])
def test_functions_may_be_async(function: Any) -> None:
    names = Rewards([function], None, None, False).names
    assert judge(function).values[names[0]] == [1.0, 3.0]
    # In a notebook a loop is running already.

    async def inside_a_loop() -> Any:
        return judge(function).values[names[0]]

    assert asyncio.run(inside_a_loop()) == [1.0, 3.0]


def test_async_functions_run_side_by_side_in_one_loop() -> None:
    """A client that holds on to the loop of its first call works in later batches too."""
    loops, running, most = set(), 0, 0

    async def one(completions: list[str], **kwargs: Any) -> list[float]:
        nonlocal running, most
        loops.add(id(asyncio.get_running_loop()))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return [0.0] * len(completions)

    for _ in range(2):
        judge(one, functools.partial(one))
    assert len(loops) == 1
    assert most == 2


def test_functions_may_do_what_they_like_with_their_lists() -> None:
    def meddles(prompts: Any, completions: Any, topic: Any, **kwargs: Any) -> list[float]:
        for prompt, completion, words in zip(prompts, completions, topic, strict=True):
            prompt.append(completion[0])
            words.append("more")
        return [float(len(prompt) + len(words)) for prompt, words in zip(prompts, topic, strict=True)]

    prompt, answer, topic = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}], ["x"]
    rewards = Rewards([meddles, functools.partial(meddles)], None, None, False)
    judgement = rewards.judge("R", [prompt, prompt], [answer, answer], [[1], [2]], {"topic": [topic, topic]}, None)
    assert judgement.values == {"meddles": [4.0, 4.0], "meddles_2": [4.0, 4.0]}
    assert (len(prompt), len(topic)) == (1, 1)


def test_async_functions_that_leave_do_not_hang() -> None:
    async def leaves(**kwargs: Any) -> Any:
        raise SystemExit(3)

    async def cancelled(**kwargs: Any) -> Any:
        raise asyncio.CancelledError

    with pytest.raises(SystemExit):
        judge(leaves)
    with pytest.raises(RewardError, match="'cancelled' raised CancelledError"):
        judge(cancelled)
    # The loop is still there.
    assert judge(slow_length).values["slow_length"] == [1.0, 3.0]


def test_a_wrapper_around_an_async_function() -> None:
    assert judge(lambda **kwargs: slow_length(**kwargs)).values["<lambda>"] == [1.0, 3.0]


def test_equal_names_never_meet() -> None:
    def named(name: str) -> Any:
        def function(completions: Any, **kwargs: Any) -> list[float]:
            return [0.0] * len(completions)

        function.__name__ = name
        return function

    names = Rewards([named("a"), named("a"), named("a_2")], None, None, False).names
    assert len(set(names)) == 3


def test_a_metric_has_to_be_finite() -> None:
    def mine(completions: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("acc", math.nan)
        return [0.0] * len(completions)

    with pytest.raises(
        RewardError, match="'mine' raised ValueError: log_metric\\('acc', nan\\) wants a finite number"
    ):
        judge(mine)


def test_values_of_any_numeric_type() -> None:
    assert judge(lambda completions, **kw: torch.tensor([1.5, 2.5])).values["<lambda>"] == [1.5, 2.5]
    assert judge(lambda completions, **kw: np.array([1, 2])).values["<lambda>"] == [1.0, 2.0]
    assert judge(lambda completions, **kw: (True, None), length).values["<lambda>"] == [1.0, None]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0, math.nan], "returned nan for completion 1"),
        ([math.inf, 1.0], "returned inf for completion 0"),
        ([1.0, "2"], "returned '2' \\(str\\) for completion 1"),
        ([1.0, [2.0]], "returned \\[2.0\\] \\(list\\)"),
        (1.0, "returned float, but has to return a list of 2 numbers"),
        (None, "returned NoneType"),
        ({0: 1.0, 1: 2.0}, "returned dict"),
        ("ab", "returned str"),
        ([None, 1.0], "no reward function applies to this completion"),
    ],
)
def test_wrong_answers_name_round_and_function(answer: Any, said: str) -> None:
    def mine(**kwargs: Any) -> Any:
        return answer

    async def mine_too(**kwargs: Any) -> Any:
        return answer

    for function in (mine, mine_too):
        with pytest.raises(JudgementError, match=said) as caught:
            judge(function)
        assert "Round 2" in str(caught.value)
        assert function.__name__ in str(caught.value)


def test_an_exception_keeps_its_own_traceback() -> None:
    def mine(**kwargs: Any) -> Any:
        raise KeyError("the service is down")

    async def mine_too(**kwargs: Any) -> Any:
        raise KeyError("the service is down")

    for function in (mine, mine_too):
        with pytest.raises(
            RewardError, match=f"Round 2: reward function '{function.__name__}' raised KeyError"
        ) as caught:
            judge(function)
        assert isinstance(caught.value.__cause__, KeyError)
        trace = caught.value.__cause__.__traceback__
        names = []
        while trace is not None:
            names.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert names[-1] == function.__name__


# ---- Models ----


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-reward"
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tiny.WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_labels=1, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def by_hand(model: Any, texts: list[str]) -> list[float]:
    """One text at a time, unpadded: the logit at its last token."""
    tokenizer = tiny.make_tokenizer()
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item() for text in texts]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("conversational", [True, False])
def test_models_read_what_reward_trainer_trains_on(
    reward_model: Path, tmp_path: Path, begins: bool, conversational: bool
) -> None:
    tokenizer = tiny.make_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bot> $A", special_tokens=[("<bot>", 4)]
        )
    pairs = tiny.make_pairs(6, conversational=conversational)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    args = RewardConfig(tmp_path, use_cpu=True, bf16=False, report_to="none")
    trained = RewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer).train_dataset["chosen_ids"]
    rewards, sizes, seen = Rewards(model, tokenizer, None, False, batch_size=4), [], []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        rows = zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True)
        seen.extend([token for token, mask in zip(*row, strict=True) if mask] for row in rows)

    model.register_forward_pre_hook(look, with_kwargs=True)
    with rewards.loaded(torch.device("cpu")):
        rewards.judge("Round 1", pairs["prompt"], pairs["chosen"], [[1]] * 6, {}, None)
    assert seen == list(trained)
    # One forward does not take all of a batch of samples.
    assert sizes == [4, 2]


def test_a_model_by_name_is_loaded_once_for_phases_that_follow_each_other(reward_model: Path) -> None:
    rewards = Rewards(str(reward_model), None, None, False)
    with rewards.held():
        for _ in range(2):
            with rewards.loaded(torch.device("cpu")):
                model = rewards.rewards[0].model
            assert rewards.rewards[0].model is model
    assert rewards.rewards[0].model is None


def test_a_tokenizer_that_cannot_pad_is_refused(reward_model: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="'tiny-reward', whose tokenizer has neither a padding token nor EOS"):
        Rewards(str(reward_model), tokenizer, None, False)


def test_a_model_without_a_template_is_refused_for_conversations(reward_model: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    rewards = Rewards(str(reward_model), tokenizer, None, False)
    rewards.check("`train_dataset`", set(), False)
    with pytest.raises(ConfigurationError, match="no chat template, but `train_dataset` has conversations"):
        rewards.check("`train_dataset`", set(), True)


def test_a_column_that_a_function_wants_has_to_be_there() -> None:
    rewards = Rewards(["accuracy_reward", length], None, None, False)
    rewards.check("`train_dataset`", {"solution"}, True)
    said = "'accuracy_reward', which wants a column `solution`, but `train_dataset` has only `answer`: add that column"
    with pytest.raises(ConfigurationError, match=said):
        rewards.check("`train_dataset`", {"answer"}, True)

    def ranks(prompts: Any, completions: Any, topic: Any, style: Any = None, **kwargs: Any) -> Any: ...

    with pytest.raises(ConfigurationError, match="'ranks', which wants a column `topic`, but here has only prompts"):
        Ranker(ranks).check("here", set(), False)


@pytest.mark.parametrize(("cls", "config"), [(APOTrainer, APOConfig), (SPRTrainer, SPRConfig)])
@pytest.mark.parametrize("evaluated", [False, True])
def test_what_cannot_be_scored_is_refused_before_weights_load(
    tmp_path: Path, cls: Any, config: Any, evaluated: bool
) -> None:
    bare = datasets.Dataset.from_dict({"prompt": ["w1", "w2"]})
    solved = bare.add_column("solution", ["w3", "w4"])
    args = config(**tiny.arguments(tmp_path, num_rounds=2, max_completion_length=4))
    sets = {"train_dataset": solved if evaluated else bare, "eval_dataset": bare if evaluated else None}
    with pytest.raises(ConfigurationError, match=r"wants a column `solution`, but `(train|eval)_dataset`.* has only"):
        cls("nowhere/at-all", args=args, reward_funcs="accuracy_reward", **sets)


def test_a_reward_model_is_loaded_once_for_all_replacements(
    tmp_path: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, loading = [], AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        "trl_extras.rollouts.judges.AutoModelForSequenceClassification.from_pretrained",
        lambda *args, **kwargs: loads.append(args) or loading(*args, **kwargs),
    )
    waves: list[int] = []

    class Waves(APOTrainer):
        def _judged(self, task: Any, batches: Any, wave: Any) -> Any:
            rows = super()._judged(task, batches, wave)
            waves.append(len(rows))
            if len(waves) == 1:
                # As with ties: other prompts stand in.
                for row in rows:
                    row["chosen"] = row["rejected"] = None
            return rows

    args = APOConfig(
        **tiny.arguments(tmp_path, num_rounds=1, prompts_per_round=4, num_generations=4, max_completion_length=4)
    )
    prompts = tiny.make_pairs(16).select_columns(["prompt"])
    trainer = Waves(
        tiny.make_model(), args=args, train_dataset=prompts, processing_class=tiny.make_tokenizer(),
        reward_funcs=str(reward_model),
    )  # fmt: skip
    trainer.train()
    assert len(waves) > 1
    assert len(loads) == 1


def test_a_rounds_reference_log_probabilities_leave_no_loader_behind(tmp_path: Path) -> None:
    kept = []
    for rounds in (1, 3):
        args = APOConfig(
            **tiny.arguments(tmp_path / str(rounds), num_rounds=rounds, precompute_ref_log_probs=True, max_length=None)
        )
        trainer = APOTrainer(
            tiny.make_model(), args=args, train_dataset=tiny.make_pairs(6), processing_class=tiny.make_tokenizer()
        )
        trainer.train()
        kept.append(len(trainer.accelerator._dataloaders))
    assert kept[1] <= kept[0]


def test_models_by_folder_and_loaded(reward_model: Path) -> None:
    loaded = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    prompts, completions = ["w1 w2 ", "w3 "], ["w4 w5 w6", "w7"]
    expected = by_hand(loaded, [f"{p}{c} <eos>" for p, c in zip(prompts, completions, strict=True)])
    for source in (str(reward_model), loaded):
        rewards = Rewards(source, None, None, False)
        assert rewards.names == ["tiny-reward"]
        with rewards.loaded(torch.device("cpu")):
            values = rewards.judge("Round 1", prompts, completions, [[1], [2]], {}, None).values["tiny-reward"]
        assert values == pytest.approx(expected, abs=1e-6)
    with rewards.loaded(torch.device("cpu")):
        pass


def test_a_model_by_name_is_there_for_its_phase_only(reward_model: Path) -> None:
    rewards = Rewards([str(reward_model), length], None, None, False)
    assert rewards.rewards[0].model is None
    with rewards.loaded(torch.device("cpu")):
        assert rewards.rewards[0].model is not None
    assert rewards.rewards[0].model is None


def test_models_read_conversations_by_their_own_template(reward_model: Path) -> None:
    loaded = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    rewards = Rewards(loaded, tiny.make_tokenizer(), None, False)
    prompt, answer = [{"role": "user", "content": "w1 w2"}], [{"role": "assistant", "content": "w3"}]
    with rewards.loaded(torch.device("cpu")):
        values = rewards.judge("Round 1", [prompt], [answer], [[1]], {}, None).values["tiny-reward"]
    assert values == pytest.approx(by_hand(loaded, ["<user> w1 w2 <bot> w3 "]), abs=1e-6)


def test_models_that_are_no_reward_models(reward_model: Path, tmp_path: Path) -> None:
    causal = tiny.save_model(tmp_path / "causal")
    with pytest.raises(ConfigurationError, match="'causal', which is a LlamaForCausalLM, but wants"):
        Rewards(str(causal), None, None, False)
    model = LlamaForSequenceClassification.from_pretrained(reward_model, num_labels=2, ignore_mismatched_sizes=True)
    for source in (model, str(tmp_path / "two")):
        model.save_pretrained(tmp_path / "two")
        with pytest.raises(ConfigurationError, match="has 2 labels, but wants one"):
            Rewards(source, tiny.make_tokenizer(), None, False)
    bare = tmp_path / "bare"
    LlamaForSequenceClassification.from_pretrained(reward_model).save_pretrained(bare)
    with pytest.raises(ConfigurationError, match="its tokenizer does not load"):
        Rewards(str(bare), None, None, False)


def test_a_users_model_is_given_back_as_it_was(reward_model: Path) -> None:
    loaded = LlamaForSequenceClassification.from_pretrained(reward_model).train()
    loaded.config.pad_token_id = 7
    rewards = Rewards(loaded, tiny.make_tokenizer(), None, False)
    with rewards.loaded(torch.device("cpu")):
        assert not loaded.training
    assert loaded.training
    assert loaded.config.pad_token_id == 7


def test_an_error_inside_a_model_names_it(reward_model: Path) -> None:
    rewards = Rewards(str(reward_model), None, None, False)
    with rewards.loaded(torch.device("cpu")):
        rewards.rewards[0].model.forward = None
        with pytest.raises(RewardError, match="Round 1: reward function 'tiny-reward' raised TypeError"):
            rewards.judge("Round 1", ["w1 "], ["w2"], [[1]], {}, None)


# ---- Rankers ----


def test_a_ranker_gives_orders_or_ends() -> None:
    def mine(prompts: Any, completions: Any, topic: Any, **kwargs: Any) -> Any:
        assert (prompts, completions, topic) == (["p", "q", "r"], [["a", "b", "c"]] * 3, [1, 2, 3])
        return [[2, 0, 1], (1, 0), None]

    async def mine_too(**kwargs: Any) -> Any:
        return mine(**kwargs)

    for function in (mine, mine_too):
        ranked = Ranker(function).judge("Round 1", ["p", "q", "r"], [["a", "b", "c"]] * 3, {"topic": [1, 2, 3]})
        assert ranked == [(2, 1), (1, 0), None]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([[0, 1]], "returned 1 orders for 2 prompts"),
        ([[0], [0, 1]], "ordered 3 completions as \\[0\\]"),
        ([[0, 0], [0, 1]], "from best to worst, each once"),
        ([[0, 3], [0, 1]], "indices \\(0 to 2\\)"),
        ([[0.5, 1], [0, 1]], "ordered 3 completions as \\[0.5, 1\\]"),
        ([["a", "b"], [0, 1]], "ordered 3 completions"),
        ([1, 0], "ordered 3 completions as 1"),
        (5, "returned int"),
    ],
)
def test_wrong_orders(answer: Any, said: str) -> None:
    def mine(**kwargs: Any) -> Any:
        return answer

    with pytest.raises(JudgementError, match=said) as caught:
        Ranker(mine).judge("Round 3", ["p", "q"], [["a", "b", "c"]] * 2, {})
    assert "Round 3" in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_a_reward_function_that_cannot_be_called_is_refused_at_once() -> None:
    def narrow(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ConfigurationError, match=r"'narrow', which has no parameter 'prompts'.*add `\*\*kwargs`"):
        Rewards([narrow], None, None, False)

    def wide(
        prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, log_extra: Any, log_metric: Any
    ) -> list[float]:
        return [0.0] * len(completions)

    assert Rewards([wide], None, None, False).names == ["wide"]
