"""SPR's data: what may be given, what is refused and how, and which rows a round is trained on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests import tiny
from trl_extras import SPRConfig, SPRTrainer
from trl_extras.errors import ConfigurationError
from trl_extras.rollouts.judges import RewardError
from trl_extras.rollouts.labels import WaitingForLabels
from trl_extras.rollouts.sampling import TransformersSampler
from trl_extras.spr.offline import has_responses, read_responses
from trl_extras.spr.rows import Counts, Response, counts_of_round, rows_of_run, taken, weigh
from trl_extras.spr.weights import effective_sample_size, policy_weights


WHERE = "`offline_dataset`"
EOS = 1


# ---- Data and helpers ----


def prompts_of(rows: int = 6, **columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [row["prompt"] for row in tiny.make_pairs(rows)], **columns})


def answers(prompts: int = 6, each: int = 2, rewards: bool = True, seed: int = 0, **columns: Any) -> datasets.Dataset:
    """Completions, all of them different, `each` of a prompt one after the other, with rewards from 0 to 0.9."""
    number = prompts * each
    texts = [text for row in tiny.make_pairs(number, seed=seed + 50) for text in (row["chosen"],)]
    found: dict[str, Any] = {
        "prompt": [row["prompt"] for row in tiny.make_pairs(prompts, seed=seed) for _ in range(each)],
        # The first words count, so that no two are alike.
        "completion": [f"w{index // 59} w{index % 59} {text}" for index, text in enumerate(texts)],
    }
    if rewards:
        found["reward"] = [(7 * index % 10) / 10 for index in range(number)]
    return datasets.Dataset.from_dict({**found, **columns})


def pairs_of(rows: int = 6, **columns: Any) -> datasets.Dataset:
    data = tiny.make_pairs(rows)
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


def talk(role: str, content: str | None) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def threes(completions: list[str], **kwargs: Any) -> list[float]:
    """Words that hold a 3."""
    return [0.1 * sum("3" in word for word in text.split()) for text in completions]


def lengths(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.1 * len(text.split()) for text in completions]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., SPRConfig]:
    def made(**kwargs: Any) -> SPRConfig:
        return SPRConfig(**tiny.arguments(tmp_path / "out", **kwargs))

    return made


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., Any]:
    """An SPRTrainer over the tiny model: `make("folder", num_rounds=2, ...)`; arguments of SPRConfig and trainer."""

    def made(folder: str | Path = "out", *, model: Any = None, data: Any = None, **kwargs: Any) -> Any:
        keys = (
            "eval_dataset", "callbacks", "optimizers", "peft_config", "reward_funcs", "reward_processing_classes",
            "ranker", "offline_dataset", "formatting_func", "compute_loss_func",
        )  # fmt: skip
        given = {key: kwargs.pop(key) for key in keys if key in kwargs}
        defaults: dict[str, Any] = {
            "num_rounds": 2, "num_generations": 2, "max_completion_length": 4, "round_data": "reuse",
            "per_device_train_batch_size": 6, "learning_rate": 1e-3,
        }  # fmt: skip
        return SPRTrainer(
            model=str(base) if model is None else model,
            args=SPRConfig(**tiny.arguments(tmp_path / folder, **{**defaults, **kwargs})),
            train_dataset=prompts_of() if data is None else data() if callable(data) else data,
            processing_class=tiny.make_tokenizer(),
            **given,
        )

    return made


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged."""
    import transformers

    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *args, **kwargs: pytest.fail("the weights were loaded")
    )


class Kept(TrainerCallback):
    """The rows of every round, as they lay on disk when it was over: later the folder goes."""

    def __init__(self) -> None:
        self.rows: list[list[dict[str, Any]]] = []

    def on_round_end(self, args: Any, state: Any, control: Any, *, round_index: int, **kwargs: Any) -> None:
        path = Path(args.output_dir) / "_rounds" / f"round-{round_index:04d}" / "data.parquet"
        self.rows.append(pq.read_table(path).to_pylist())


def train(trainer: Any, **kwargs: Any) -> list[list[dict[str, Any]]]:
    """Train, and give the rows of each round."""
    kept = Kept()
    trainer.add_callback(kept)
    trainer.train(**kwargs)
    for rows, summary in zip(kept.rows, trainer.round_summaries, strict=True):
        assert summary["rows"] == len(rows)
        assert summary["offline_rows"] == sum(row["offline"] for row in rows)
        assert summary["online_rows"] == sum(not row["offline"] for row in rows)
    return kept.rows


def rollouts(trainer: Any, name: str) -> list[dict[str, Any]]:
    path = Path(trainer.args.output_dir) / "_rounds" / "rollouts" / name / "rollouts.parquet"
    return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny.make_tokenizer()(text)["input_ids"])


def prompt_of(row: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that are not trained on; all others are."""
    prompt = tuple(token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    return prompt


def distinct(rows: Sequence[dict[str, Any]]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row["input_ids"]) for row in rows)


class CountedSampler(TransformersSampler):
    """Prompts that are sampled for."""

    asked: list[tuple[int, ...]]

    def __call__(self, prompts: Any, num: int, seed: int) -> Any:
        self.asked.extend(tuple(prompt) for prompt in prompts)
        return super().__call__(prompts, num, seed)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The prompts that have been sampled for so far."""
    CountedSampler.asked = []
    monkeypatch.setattr("trl_extras.rollouts.trainer.TransformersSampler", CountedSampler)
    return CountedSampler.asked


# ---- Refused: the configuration ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_temperature": 0}, "`reward_temperature` is 0, but wants a finite number above 0"),
        ({"reward_temperature": -0.5}, "`reward_temperature` is -0.5, but wants"),
        ({"reward_temperature": math.nan}, "`reward_temperature` is nan, but wants"),
        ({"reward_temperature": math.inf}, "`reward_temperature` is inf, but wants"),
        ({"reward_temperature": "hot"}, "`reward_temperature` is 'hot', but wants"),
        ({"reward_temperature": True}, "`reward_temperature` is True, but wants"),
        ({"reward_temperature": None}, "`reward_temperature` is None, but wants"),
        ({"temperature": 0}, "`temperature` is 0, but wants"),
        ({"temperature": -1.0}, "`temperature` is -1.0, but wants"),
        ({"temperature": math.nan}, "`temperature` is nan, but wants"),
        ({"temperature": math.inf}, "`temperature` is inf, but wants"),
        ({"top_p": 0.0}, "`top_p` is 0.0, but wants"),
        ({"top_k": -1}, "`top_k` is -1, but wants"),
        ({"min_p": 1.5}, "`min_p` is 1.5, but wants"),
        ({"repetition_penalty": 0}, "`repetition_penalty` is 0, but wants"),
        ({"importance_clip": 0}, "`importance_clip` is 0, but wants a finite number above 0, in nats, or 'none'"),
        ({"importance_clip": "0"}, "`importance_clip` is '0', but wants"),
        ({"importance_clip": -1.0}, "`importance_clip` is -1.0, but wants"),
        ({"importance_clip": "nan"}, "`importance_clip` is 'nan', but wants"),
        ({"importance_clip": math.inf}, "`importance_clip` is inf, but wants"),
        ({"importance_clip": "never"}, "`importance_clip` is 'never', but wants"),
        ({"importance_clip": None}, "`importance_clip` is None, but wants"),
        ({"importance_clip": True}, "`importance_clip` is True, but wants"),
        ({"offline_ratio": -0.1}, "`offline_ratio` is -0.1, but wants numbers from 0 to 1"),
        ({"offline_ratio": 1.1}, "`offline_ratio` is 1.1, but wants"),
        ({"offline_ratio": [0.5, math.nan, 0.5]}, r"`offline_ratio` is \[0.5, nan, 0.5\], but wants"),
        ({"offline_ratio": [0.5, "half"]}, r"`offline_ratio` is \[0.5, 'half'\], but wants"),
        ({"offline_ratio": True}, "`offline_ratio` is True, but wants"),
        ({"offline_ratio": [0.5, 0.5]}, "`offline_ratio` has 2 values, but `num_rounds` is 3: give one value, or one"),
        ({"offline_ratio": [0.5] * 4}, "`offline_ratio` has 4 values, but `num_rounds` is 3"),
        ({"offline_ratio": []}, "`offline_ratio` has 0 values, but `num_rounds` is 3"),
        ({"offline_ratio": 0.5, "num_generations": 0}, r"`offline_ratio` is \[0.5\], but with `num_generations=0`"),
        ({"offline_ratio": [1, 1, 0], "num_generations": 0},
         r"`offline_ratio` is \[1.0, 1.0, 0.0\], but with `num_generations=0`"),
        ({"offline_ratio": 1}, r"`offline_ratio` is \[1.0\], so that no sampled .* `num_generations` is 5: set"),
        ({"offline_ratio": [1, 1, 1]}, r"`offline_ratio` is \[1.0, 1.0, 1.0\], so that no sampled"),
        ({"num_generations": -1}, "`num_generations` is -1, but wants a whole number of at least 0"),
        ({"num_generations": 2.0}, "`num_generations` is 2.0, but wants"),
        ({"num_generations": 0, "prompts_per_round": 4}, "`prompts_per_round` is 4, but with `num_generations=0`"),
        ({"prompts_per_round": 0}, "`prompts_per_round` is 0, but wants"),
        ({"generation_batch_size": 7}, "`generation_batch_size` is 7, but wants a multiple of `num_generations`"),
        ({"max_completion_length": 0}, "`max_completion_length` is 0, but wants"),
        ({"offline_dataset_config": "en"}, "`offline_dataset_config` is 'en', but there is no `offline_dataset_name`"),
        ({"offline_dataset_split": "test"}, "`offline_dataset_split` is 'test', but there is no"),
        ({"ranker": "math:sqrt"}, "`ranker` is 'math:sqrt', which orders responses, but SPR weights them by rewards"),
        ({"ranker": "external", "reward_funcs": ["math:sqrt"]}, "`reward_funcs` and `ranker` are both set"),
        ({"packing": True}, "`packing=True` does not work with SPR: .* Leave it False"),
        ({"padding_free": True}, "`padding_free=True` does not work with SPR"),
        ({"loss_type": "dft"}, "`loss_type='dft'` does not work with SPR: .* Use 'nll'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` does not work with SPR: .* Use 0"),
        ({"completion_only_loss": False}, "`completion_only_loss=False` does not work with SPR"),
        ({"assistant_only_loss": True}, "`assistant_only_loss=True` does not work with SPR"),
        ({"shuffle_dataset": True}, "`shuffle_dataset=True` does not work with SPR: .*='random'` shuffles"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "skip_prepare_dataset': True}` does not work with SPR"),
        # What the rounds refuse.
        ({"num_rounds": 0}, "`num_rounds` is 0, but wants"),
        ({"round_data": "all"}, "`round_data` is 'all', but wants one of split, reuse"),
        ({"round_epochs": [1, 2]}, "`round_epochs` has 2 values, but `num_rounds` is 3"),
        ({"num_train_epochs": 1.5}, "`num_train_epochs` is 1.5, but means epochs a round"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` does not work with more than one round"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "`lr_scheduler_type='reduce_lr_on_plateau'` does not work"),
    ],
)  # fmt: skip
def test_bad_configuration(settings: dict[str, Any], message: str, config: Any) -> None:
    if settings.get("lr_scheduler_type"):
        settings = {**settings, "eval_strategy": "epoch"}
    with pytest.raises(ConfigurationError, match=message):
        config(**settings)


def test_what_may_be_text(config: Any) -> None:
    read = config(reward_temperature="0.5", importance_clip="2", offline_ratio="0.25", top_p="0.9")
    assert (read.reward_temperature, read.clip, read.offline_ratio, read.top_p) == (0.5, 2.0, [0.25], 0.9)
    assert config(importance_clip=3).clip == 3.0
    assert config(importance_clip="none").clip is None
    assert config().clip == 5.0


def test_the_ratio_of_each_round(config: Any) -> None:
    assert [config().ratio_of(t) for t in range(3)] == [0.5, 0.5, 0.5]
    assert [config(offline_ratio=0.25).ratio_of(t) for t in range(3)] == [0.25] * 3
    assert [config(offline_ratio=[1, 0.5, 0]).ratio_of(t) for t in range(3)] == [1, 0.5, 0]
    assert [config(num_generations=0).ratio_of(t) for t in range(3)] == [1, 1, 1]
    assert config(num_generations=0, offline_ratio=1).ratio_of(2) == 1


def test_what_is_sampled_exactly(config: Any) -> None:
    assert config().samples_exactly
    assert config().truncates == []
    assert not config(temperature=0.7).samples_exactly
    assert not config(repetition_penalty=1.1).samples_exactly
    cut = config(top_p=0.9, top_k=5, min_p=0.1)
    assert not cut.samples_exactly
    assert cut.truncates == ["top_p=0.9", "top_k=5", "min_p=0.1"]
    for one in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        assert not config(**one).samples_exactly
    assert config(min_p=0.0).samples_exactly


# ---- Refused: what is given to the trainer, before any weights load ----


def broken(index: int, **values: Any) -> Callable[[], datasets.Dataset]:
    """Completions, with other values in one row."""

    def data() -> datasets.Dataset:
        rows = answers().to_list()
        rows[index] = {**rows[index], **values}
        return datasets.Dataset.from_list(rows)

    return data


def rows(*made: dict[str, Any]) -> Callable[[], datasets.Dataset]:
    return lambda: datasets.Dataset.from_list(list(made))


LOGPS = {"behavior_logps_column": "logp", "num_generations": 0}
OFFLINE = {"num_generations": 0}
USER, BOT = talk("user", "w1"), talk("assistant", "w2")
STREAMS = "(?i)stream.*`train_dataset`|`train_dataset`.*stream"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Nothing to train on, nothing to score with.
        ({**OFFLINE, "data": prompts_of}, "`num_generations` is 0, but there are no offline responses"),
        ({**OFFLINE, "data": prompts_of, "reward_funcs": threes}, "`num_generations` is 0, but there are no offline"),
        ({}, r"responses are sampled \(`num_generations` is 2\), but nothing scores them: give `reward_funcs`"),
        ({"reward_funcs": []}, "responses are sampled .* but nothing scores them"),
        ({"data": answers}, r"responses are sampled \(`num_generations` is 2\), but nothing scores them"),
        ({**OFFLINE, "data": lambda: answers(rewards=False)},
         "`train_dataset` has 12 of 12 responses without a reward, and there is no function to score them: give them "
         "a column `reward` of finite numbers, or give `reward_funcs`"),
        ({**OFFLINE, "data": broken(3, reward=None)}, "`train_dataset` has 1 of 12 responses without a reward"),
        ({**OFFLINE, "data": pairs_of}, "`train_dataset` has 12 of 12 responses without a reward"),
        ({"ranker": "external", "data": lambda: answers(rewards=False)}, "has 12 of 12 responses without a reward"),
        ({"offline_dataset": answers(rewards=False), **OFFLINE}, "`offline_dataset` has 12 of 12 responses without"),
        ({**OFFLINE, "data": answers, "eval_dataset": prompts_of(3)}, "`eval_dataset` holds prompts alone, so that"),
        ({"ranker": lambda **kwargs: None}, "`ranker` is given, which orders responses, but SPR weights them"),
        ({**OFFLINE, "data": answers, "ranker": "external"},
         "`ranker` is 'external', but `num_generations` is 0, so that there is nothing to label"),
        ({"ranker": "external", "reward_funcs": threes}, "`reward_funcs` and `ranker` are both given"),
        ({"ranker": "external", "reward_weights": [1.0]}, "`reward_weights` is given, but a ranker gives no rewards"),
        ({"ranker": "external", "save_only_model": True}, "`save_only_model=True` leaves nothing to go on from"),
        ({"reward_funcs": [threes, lengths], "reward_weights": [1.0]}, "`reward_weights` has 1 values"),
        ({"reward_funcs": "nowhere:f"}, "no module 'nowhere'"),
        # Settings for offline responses that are not there.
        ({"reward_funcs": threes, "behavior_logps_column": "logp"},
         "`behavior_logps_column` is 'logp', but there are no offline responses"),
        ({"reward_funcs": threes, "offline_ratio": 0.5}, r"`offline_ratio` is \[0.5\], but there are no offline"),
        # Kinds of data.
        ({"formatting_func": str}, "`formatting_func` does not work with SPR"),
        ({"compute_loss_func": max}, "`compute_loss_func` does not work with SPR"),
        ({"data": rows({"text": "w1 w2"})}, r"`train_dataset` has the columns \['text'\], but SPR wants prompts"),
        ({"data": rows({"messages": [*USER, *BOT]})}, "conversations have to be split into `prompt` and `completion`"),
        ({"data": rows({"completion": "w1", "reward": 1.0})}, r"`train_dataset` has the columns \['completion', 'rew"),
        ({"data": rows({"prompt": "w1", "chosen": "w2"})}, "`train_dataset` has the columns .* but wants responses"),
        ({"offline_dataset": prompts_of()}, r"`offline_dataset` has the columns \['prompt'\], but wants responses"),
        ({"data": lambda: pairs_of(completion=["w1"] * 6)}, "`completion` as well as `chosen` and `rejected`"),
        ({"data": lambda: pairs_of(reward=[0.5] * 6)},
         "preference pairs with one column `reward`: give each response its own, as `chosen_reward` and"),
        ({**OFFLINE, "data": lambda: answers().select([])}, "`train_dataset` is empty, but wants at least one"),
        ({"reward_funcs": threes, "data": lambda: prompts_of().select([])}, "`train_dataset` is empty, but wants"),
        ({"data": lambda: answers(images=[["a"]] * 12)}, "`train_dataset` has the column `images`"),
        ({"data": lambda: answers(tools=["[]"] * 12)}, "`train_dataset` has the column `tools`"),
        ({"reward_funcs": threes, "data": lambda: prompts_of(image=[None] * 6)}, "has the column `image`"),
        ({"data": lambda: answers(input_ids=[[5]] * 12)}, "`train_dataset` has the column `input_ids`, but SPR needs"),
        ({"data": lambda: answers(labels=[[5]] * 12)}, "`train_dataset` has the column `labels`, but SPR needs text"),
        ({"data": lambda: answers(prompt_ids=[[5]] * 12)}, "`train_dataset` has the column `prompt_ids`"),
        ({"reward_funcs": threes, "data": lambda: prompts_of(prompt_ids=[[5]] * 6)}, "has a column `prompt_ids`"),
        ({"offline_dataset": {"train": answers()}}, r"`offline_dataset` holds splits \(train\): pass one of them"),
        ({"offline_dataset": answers().to_iterable_dataset()}, "`offline_dataset` is IterableDataset, but wants"),
        ({"offline_dataset": answers().select([])}, "`offline_dataset` is empty, but wants at least one row"),
        ({"offline_dataset": [{"prompt": "w1", "completion": "w2"}]}, "`offline_dataset` is list, but wants"),
        ({"offline_dataset_name": "/nowhere/at/all"}, r"`offline_dataset_name` \('/nowhere/at/all'\), split 'train'"),
        # Rewards.
        ({"data": broken(4, reward=math.nan)}, "`train_dataset`, row 4: `reward` is nan, but wants a finite number"),
        ({"data": broken(5, reward=math.inf)}, "`train_dataset`, row 5: `reward` is inf, but wants"),
        ({"data": broken(0, reward=-math.inf)}, "`train_dataset`, row 0: `reward` is -inf, but wants"),
        ({"data": lambda: answers(reward=["0.5"] * 12)}, "`train_dataset`, row 0: `reward` is '0.5', but wants"),
        ({"data": lambda: answers(reward=[[0.5]] * 12)}, r"`train_dataset`, row 0: `reward` is \[0.5\], but wants"),
        ({"data": lambda: pairs_of(chosen_reward=[0.5] * 6, rejected_reward=[0.1] * 5 + [math.nan])},
         r"`train_dataset`, row 5 \(rejected\): `reward` is nan"),
        ({"offline_dataset": broken(4, reward=math.nan)()}, "`offline_dataset`, row 4: `reward` is nan"),
        # Behaviour columns.
        ({**LOGPS, "data": answers}, "`behavior_logps_column` is 'logp', but `train_dataset` has no `logp`"),
        ({**LOGPS, "data": lambda: pairs_of(logp=[-1.0] * 6)}, "`chosen_logp` and `rejected_logp`"),
        ({**LOGPS, "data": lambda: pairs_of(chosen_logp=[-1.0] * 6)}, "has `chosen_logp`, but no `rejected_logp`"),
        ({**LOGPS, "data": lambda: answers(logp=[-1.0] * 7 + [0.5] * 5)},
         "`train_dataset`, row 7: `logp` is .*0.5.*, but wants at most 0: a log-probability, in nats"),
        ({**LOGPS, "data": lambda: answers(logp=[-1.0] * 11 + [math.nan])},
         "`train_dataset`, row 11: `logp` is nan, but wants a log-probability"),
        ({**LOGPS, "data": lambda: answers(logp=[-math.inf] * 12)}, "row 0: `logp` is -inf, but wants"),
        ({**LOGPS, "data": lambda: answers(logp=[-1.0] * 2 + [None] * 10)}, "row 2: `logp` is None, but wants"),
        ({**LOGPS, "data": lambda: answers(logp=["-1"] * 12)}, "row 0: `logp` is '-1', but wants"),
        ({**LOGPS, "data": lambda: pairs_of(chosen_logp=[-1.0] * 6, rejected_logp=[-1.0, 2.0] * 3)},
         r"`train_dataset`, row 1 \(rejected\): `logp` is .*2.0.*, but wants at most 0"),
        # Prompts and responses.
        ({"data": rows({"prompt": "w1", "completion": "w2"}, {"prompt": "w3", "completion": " "})},
         "`train_dataset`, row 1: all responses of this prompt are empty: leave those rows out"),
        ({"data": rows(*({"prompt": f"w{i}", "completion": ""} for i in range(3)))},
         r"row 0: all responses of this prompt are empty \(and of 2 other prompts\)"),
        ({"data": rows({"prompt": "w1", "chosen": "", "rejected": " "})},
         r"row 0 \(chosen\): all responses of this prompt are empty"),
        ({"data": rows({"prompt": USER, "completion": talk("assistant", "")})}, "row 0: all responses of this prompt"),
        ({"data": rows({"prompt": USER, "completion": talk("assistant", None)})}, "row 0: all responses of this"),
        ({"data": rows({"prompt": 5, "completion": "w1"})}, "row 0: the prompt is 5, but has to be text or a list of"),
        ({"data": rows({"prompt": None, "completion": "w1"})}, "row 0: the prompt is None, but has to be text"),
        ({"data": rows({"prompt": [*USER, *BOT], "completion": BOT})}, "row 0: the prompt has to end with a message"),
        ({"data": rows({"prompt": USER, "completion": "w1"})}, "row 0: the response is 'w1', but has to be a list of"),
        ({"data": rows({"prompt": "w1", "completion": BOT})}, "row 0: the response is .* but has to be text, as the"),
        ({"offline_dataset": rows({"prompt": "w1", "completion": None})()},
         "row 0: the response is None, but has to be text"),
        ({"data": rows({"prompt": "w1", "completion": None}), "num_generations": 0}, "there are no offline responses"),
        ({"data": rows({"prompt": USER, "completion": BOT}, {"prompt": USER, "completion": []})},
         r"row 1: the response is \[\], but has to be a list of messages"),
        # The rounds.
        ({**OFFLINE, "data": lambda: answers(1, 12), "round_data": "split"}, "1 distinct prompts, but `num_rounds`"),
        ({**OFFLINE, "data": lambda: answers(1, 1), "round_data": "split"}, "1 rows, but `num_rounds` is 2"),
        ({"reward_funcs": threes, "data": lambda: prompts_of(1), "round_data": "split"}, "1 rows, but `num_rounds`"),
        ({"reward_funcs": threes, "prompts_per_round": 7}, "`prompts_per_round` is 7, but a round has 6 prompts"),
        ({"reward_funcs": threes, "prompts_per_round": 4, "round_data": "split"}, "is 4, but a round has 3 prompts"),
        ({"reward_funcs": threes, "max_completion_length": 32}, "`max_completion_length` is 32, but prompt and"),
        ({"reward_funcs": threes, "num_rounds": 1, "num_train_epochs": 0.5}, "`num_train_epochs` is 0.5"),
        ({"reward_funcs": threes, "callbacks": [EarlyStoppingCallback()]}, "EarlyStoppingCallback does not work"),
        ({"reward_funcs": threes, "optimizers": (None, object())}, "A scheduler object in `optimizers` does not work"),
        ({"reward_funcs": threes, "data": lambda: prompts_of().to_iterable_dataset()}, STREAMS),
        ({**OFFLINE, "data": lambda: answers().to_iterable_dataset()}, STREAMS),
        ({"reward_funcs": threes, "offline_ratio": 0.5, "data": lambda: answers().to_iterable_dataset()},
         STREAMS),
        ({"reward_funcs": threes, "max_steps": 5000}, "`max_steps` is 5000, but the rounds take"),
        ({"reward_funcs": threes, "eval_dataset": prompts_of(3).to_iterable_dataset()}, "streams, but its prompts"),
        ({"reward_funcs": threes, "eval_dataset": prompts_of(3), "metric_for_best_model": "reward"},
         "`metric_for_best_model='reward'` needs a metric of every evaluation"),
        ({**OFFLINE, "data": answers, "eval_dataset": pairs_of(2)}, "`eval_dataset`"),
    ],
)  # fmt: skip
def test_bad_input(settings: dict[str, Any], message: str, make: Any, no_weights: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**settings)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_empty_response_beside_others_is_one(make: Any) -> None:
    (found,) = train(make(data=broken(3, completion=""), num_generations=0, num_rounds=1))
    assert [*ids(answers()["prompt"][3]), EOS] in [row["input_ids"] for row in found]


@pytest.mark.parametrize(
    "data", [datasets.DatasetDict(train=prompts_of()), [{"prompt": "w1"}]], ids=["splits", "list"]
)
def test_other_kinds_of_training_sets(data: Any, make: Any, no_weights: None) -> None:
    """Upstream refuses them, by name, as early."""
    with pytest.raises((ConfigurationError, TypeError), match="`train_dataset`"):
        make(data=data, reward_funcs=threes)


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (lambda: answers(prompt_ids=[[5, 6]] * 12), "prompt_ids"),
        (lambda: answers().select([]), "empty"),
        (lambda: answers(images=[["a"]] * 12), "images"),
    ],
    ids=["tokens", "empty", "images"],
)
def test_prompts_with_responses_are_checked_like_prompts_alone(
    mine: Any, message: str, make: Any, no_weights: None
) -> None:
    """Where the responses are those of another dataset."""
    with pytest.raises(ConfigurationError, match=f"`train_dataset`.*{message}"):
        make(data=mine, offline_dataset=answers(), reward_funcs=threes)


def test_a_training_set_is_needed(config: Any, no_weights: None) -> None:
    with pytest.raises(ConfigurationError, match="`train_dataset` is missing"):
        SPRTrainer("/nowhere", args=config(), processing_class=tiny.make_tokenizer(), reward_funcs=threes)


# ---- Refused on the way ----


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda completions: [math.nan] * len(completions), "nan"),
        (lambda completions: [math.inf] * len(completions), "inf"),
        (lambda completions: [0.5] * (len(completions) - 1), r"returned \d+ rewards for \d+ completions"),
        (lambda completions: [None] * len(completions), "no reward function applies"),
        (lambda completions: ["good"] * len(completions), "'good'"),
        (lambda completions: 0.5, "float"),
    ],
    ids=["nan", "infinite", "too few", "none", "text", "a number"],
)
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "sampled"])
def test_rewards_that_cannot_be_used(answer: Any, message: str, offline: bool, make: Any) -> None:
    def scored(completions: list[str], **kwargs: Any) -> Any:
        return answer(completions)

    data = answers(rewards=False) if offline else prompts_of()
    trainer = make(data=data, reward_funcs=scored, num_generations=0 if offline else 2, generation_batch_size=None)
    with pytest.raises(ConfigurationError, match=message) as caught:
        trainer.train()
    assert str(caught.value).startswith("Round 1, offline responses" if offline else "Round 1")
    assert "'scored'" in str(caught.value) or "scored" in str(caught.value)


def test_a_reward_function_that_fails_names_the_phase(make: Any) -> None:
    def fails(completions: list[str], **kwargs: Any) -> Any:
        raise ConnectionError("gone")

    with pytest.raises(RewardError, match=r"Round 1, offline responses.*fails.*gone"):
        make(data=answers(rewards=False), num_generations=0, reward_funcs=fails).train()


def test_sampled_responses_have_to_fit(make: Any, said: Any) -> None:
    """Prompts are of 4 tokens."""
    for data in (prompts_of(), answers()):
        with pytest.raises(ConfigurationError) as caught:
            make(data=data, reward_funcs=threes, max_length=7)
        for part in ("6 of 6 prompts", "up to 4 tokens", "`max_completion_length` (4)", "`max_length` (7)"):
            assert part in str(caught.value)
    make(data=answers(), reward_funcs=threes, max_length=8)
    # Nothing is sampled.
    make(data=answers(), num_generations=0, max_length=7)


def test_offline_prompts_that_fill_the_length(make: Any, said: Any) -> None:
    long = "w1 " * 12
    data = datasets.concatenate_datasets([broken(0, prompt=long)().select([0]), answers()])
    trainer = make(data=data, num_generations=0, max_length=10)
    assert "1 of 13 responses of `train_dataset` are left out, because their prompts alone fill `max_length` (10)" in (
        said.text
    )
    for rows_of in train(trainer):
        assert len(rows_of) == 12
        assert ids(long) not in {prompt_of(row) for row in rows_of}
        # The rewards are still those of their responses.
        rewards = {(*ids(row["prompt"] + row["completion"]), EOS)[:10]: row["reward"] for row in answers()}
        assert {tuple(row["input_ids"]): row["reward"] for row in rows_of} == rewards
    with pytest.raises(ConfigurationError, match=r"`train_dataset`: the prompts alone fill `max_length` \(4\)"):
        make("other", data=answers(), num_generations=0, max_length=4)


def test_log_probabilities_of_cut_responses_are_refused(make: Any) -> None:
    data = answers(logp=[-5.0] * 12)
    settings = {"data": data, "num_generations": 0, "behavior_logps_column": "logp"}
    full = [len(ids(row["prompt"] + row["completion"])) + 1 for row in data]
    longest = max(full)
    with pytest.raises(ConfigurationError) as caught:
        make(**settings, max_length=longest - 1)
    for part in ("`train_dataset`: ", "responses are cut", f"`max_length` ({longest - 1})", "log-probabilities"):
        assert part in str(caught.value)
    # One token more is room for all.
    make(**settings, max_length=longest + 1)
    # Without the column they are only cut.
    make(data=data, num_generations=0, max_length=longest - 1)


def test_a_response_of_exactly_the_length_is_whole(make: Any) -> None:
    data = answers(logp=[-5.0] * 12)
    full = [len(ids(row["prompt"] + row["completion"])) + 1 for row in data]
    settings = {"data": data, "num_generations": 0, "behavior_logps_column": "logp"}
    trainer = make(**settings, max_length=max(full))
    assert sorted(map(len, trainer._offline.rows["input_ids"])) == sorted(full)
    with pytest.raises(ConfigurationError, match=f"`train_dataset`: {full.count(max(full))} responses are cut"):
        make(**settings, max_length=max(full) - 1)


def test_a_round_needs_offline_responses_of_its_own(make: Any) -> None:
    data = answers(1, 2)
    settings = {"data": prompts_of(), "offline_dataset": data, "reward_funcs": threes, "round_data": "split"}
    with pytest.raises(ConfigurationError, match=r"`offline_ratio` is 0.5 in round [12], but none of the 2 offline"):
        make(**settings).train()
    with pytest.raises(ConfigurationError, match=r"`offline_ratio` is 0.25 in round [12], but none of the 2 offline"):
        make(**settings, offline_ratio=[0.25]).train()


def test_prompts_per_round_counts_prompts(make: Any) -> None:
    """12 rows, 6 prompts."""
    with pytest.raises(ConfigurationError, match="`prompts_per_round` is 7, but a round has 6 prompts"):
        make(data=answers(), reward_funcs=threes, prompts_per_round=7).train()


def test_a_damaged_policy_is_told_of(make: Any) -> None:
    model = tiny.make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids("w1")[0]] = math.nan
    data = answers(logp=[-5.0] * 12)
    with pytest.raises(ConfigurationError, match="Round 1: the policy gives a response the log-probability nan"):
        make(data=data, num_generations=0, behavior_logps_column="logp", model=model).train()


def test_other_offline_responses_are_not_resumed_with(make: Any) -> None:
    settings: dict[str, Any] = {"num_generations": 0, "save_strategy": "epoch"}
    offline = {**settings, "data": prompts_of(), "offline_dataset": answers(), "num_generations": 1}
    make(**offline, reward_funcs=threes).train()
    other = answers()
    changed = other.remove_columns("reward").add_column("reward", [0.25, *other["reward"][1:]])
    with pytest.raises(ConfigurationError, match="The offline responses are not those of the run that is resumed"):
        make(**{**offline, "offline_dataset": changed}, reward_funcs=threes).train(resume_from_checkpoint="last")


# ---- Reading ----


def read(data: datasets.Dataset, config: Any, **settings: Any) -> list[dict[str, Any]]:
    """Offline responses as rows, with what is known of each."""
    found = read_responses(data, WHERE, config(**settings))
    behavior = [None] * len(found) if found.behavior is None else found.behavior.tolist()
    rewards = [None if math.isnan(value) else value for value in found.rewards]
    assert found.where == WHERE
    return [
        {**row, "reward": reward, "logp": logp}
        for row, reward, logp in zip(found.rows, rewards, behavior, strict=True)
    ]


def test_completions_are_read(config: Any) -> None:
    data = datasets.Dataset.from_list(
        [
            {"prompt": "w1 ", "completion": "w2", "reward": 1, "logp": -2.0, "topic": "a"},
            {"prompt": "w1 ", "completion": "", "reward": None, "logp": 0.0, "topic": "b"},
            {"prompt": "w3 ", "completion": "w4", "reward": -3, "logp": -7.5, "topic": "c"},
        ]
    )
    found = read(data, config, behavior_logps_column="logp")
    assert found == [{**row, "reward": None if i == 1 else float(row["reward"])} for i, row in enumerate(data)]
    # Not asked for, the column is one like any other.
    assert [row["logp"] for row in read_responses(data, WHERE, config()).rows] == [-2.0, 0.0, -7.5]
    assert read_responses(data, WHERE, config()).behavior is None


def test_completions_without_rewards(config: Any) -> None:
    assert [row["reward"] for row in read(answers(rewards=False), config)] == [None] * 12


def test_messages_are_read(config: Any) -> None:
    history = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, *talk("user", "w3")]
    data = datasets.Dataset.from_list(
        [{"prompt": history, "completion": BOT, "reward": 0.5}, {"prompt": USER, "completion": BOT, "reward": 0.0}]
    )
    found = read(data, config)
    assert [row["prompt"] for row in found] == [history, USER]
    assert [row["completion"] for row in found] == [BOT, BOT]
    assert [row["reward"] for row in found] == [0.5, 0.0]


@pytest.mark.parametrize("implicit", [False, True], ids=["prompt apart", "prompt inside"])
@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_pairs_are_taken_apart(implicit: bool, conversational: bool, config: Any) -> None:
    pairs: list[dict[str, Any]] = [
        {"prompt": f"w{i} w7 ", "chosen": f"yes{i}", "rejected": f"no{i}"} for i in range(3)
    ]
    if conversational:
        names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        pairs = [{name: talk(names[name], text) for name, text in row.items()} for row in pairs]
    given = [
        {**row, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        if implicit
        else row
        for row in pairs
    ]
    extra = [
        {"chosen_reward": i + 0.5, "rejected_reward": None if i == 1 else -i, "chosen_logp": -1.0 - i,
         "rejected_logp": -11.0 - i, "topic": f"t{i}", "chosen_by": f"c{i}"}
        for i in range(3)
    ]  # fmt: skip
    made = [{**row, **more} for row, more in zip(given, extra, strict=True)]
    if implicit:
        made = [{name: value for name, value in row.items() if name != "prompt"} for row in made]
    found = read(datasets.Dataset.from_list(made), config, behavior_logps_column="logp")
    expected = [
        {"prompt": row["prompt"], "completion": row[kind], "reward": more[f"{kind}_reward"],
         "logp": more[f"{kind}_logp"], "topic": more["topic"], "chosen_by": more["chosen_by"]}
        for row, more in zip(pairs, extra, strict=True)
        for kind in ("chosen", "rejected")
    ]  # fmt: skip
    if not conversational:
        # A prompt that is found inside ends before the space.
        for row in (*found, *expected):
            row["prompt"], row["completion"] = row["prompt"].strip(), row["completion"].strip()
    assert found == expected


def test_pairs_without_rewards(config: Any) -> None:
    assert [row["reward"] for row in read(pairs_of(2), config)] == [None] * 4


@pytest.mark.parametrize(("there", "missing"), [("chosen", "rejected"), ("rejected", "chosen")])
def test_half_of_the_rewards_of_pairs_is_refused(there: str, missing: str, config: Any) -> None:
    """They would be asked for again, of the reward functions, without a word."""
    with pytest.raises(ConfigurationError, match=f"{missing}_reward"):
        read(pairs_of(2, **{f"{there}_reward": [1.0, 2.0]}), config)


def test_which_datasets_have_responses() -> None:
    assert has_responses(answers())
    assert has_responses(pairs_of())
    assert has_responses(pairs_of().remove_columns("prompt"))
    assert not has_responses(prompts_of())
    assert not has_responses(datasets.DatasetDict(train=answers()))
    assert not has_responses(None)


# ---- Which rewards are asked for, and with what ----


class Asked:
    """A reward function that remembers its questions."""

    __name__ = "asked"

    def __init__(self) -> None:
        self.calls: list[dict[str, list[Any]]] = []

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        own = {
            name: values for name, values in kwargs.items() if name not in ("trainer_state", "log_extra", "log_metric")
        }
        self.calls.append({"prompts": prompts, "completions": completions, **own})
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [0.01 * len(text) for text in texts]

    def all(self, name: str) -> list[Any]:
        return [value for call in self.calls for value in call[name]]


def asked_for(trainer: Any) -> Asked:
    return trainer._judge.rewards[0].function  # type: ignore[no-any-return]


def test_only_what_lacks_a_reward_is_scored(make: Any) -> None:
    data = broken(3, reward=None)().to_list()
    data[8]["reward"] = None
    trainer = make(data=datasets.Dataset.from_list(data), num_generations=0, num_rounds=1, reward_funcs=Asked())
    (found,) = train(trainer)
    asked = asked_for(trainer)
    assert sorted(asked.all("completions")) == sorted([data[3]["completion"], data[8]["completion"]])
    tokens = [[*ids(row["prompt"] + row["completion"]), EOS] for row in data]
    assert sorted(row["input_ids"] for row in found) == sorted(tokens)
    for row in found:
        given = data[tokens.index(row["input_ids"])]
        expected = 0.01 * len(given["completion"]) if given["reward"] is None else given["reward"]
        assert row["reward"] == pytest.approx(expected)


def test_columns_reach_reward_functions(make: Any) -> None:
    """An offline response's are those of its row, a sampled one's those of its prompt's first."""
    topics = [f"topic {index}" for index in range(12)]
    data = answers(rewards=False, topic=topics)
    trainer = make(data=data, num_rounds=1, num_generations=3, reward_funcs=Asked())
    train(trainer)
    mine = {row["completion"]: row for row in data}
    first = {row["prompt"]: row["topic"] for row in reversed(data.to_list())}
    seen = Counter()
    for call in asked_for(trainer).calls:
        assert "completion" not in call
        assert "_row" not in call
        for prompt, text, topic in zip(call["prompts"], call["completions"], call["topic"], strict=True):
            offline = text in mine
            seen[offline] += 1
            assert topic == (mine[text]["topic"] if offline else first[prompt])
            if offline:
                assert prompt == mine[text]["prompt"]
    assert seen == {True: 12, False: 18}


def test_offline_responses_are_asked_about_like_sampled_ones(make: Any) -> None:
    """With the same arguments: a function need not take more than the dataset's columns and TRL's."""
    names = set()

    def strict(
        prompts: Any, completions: Any, completion_ids: Any, topic: Any, trainer_state: Any, log_extra: Any,
        log_metric: Any, **others: Any,
    ) -> list[float]:  # fmt: skip
        names.update(others)
        return [0.5 * (index % 2) for index in range(len(completions))]

    data = answers(rewards=False, topic=["a"] * 12)
    heldout = answers(2, 1, rewards=False, seed=3, topic=["a"] * 2)
    train(make(data=data, num_rounds=1, reward_funcs=strict, eval_dataset=heldout))
    assert names == set()


def test_columns_of_the_prompts_reach_reward_functions(make: Any) -> None:
    """Beside an `offline_dataset` each set brings its own."""
    trainer = make(
        data=prompts_of(topic=["mine"] * 6), offline_dataset=answers(rewards=False, topic=["theirs"] * 12),
        num_rounds=1, reward_funcs=Asked(),
    )  # fmt: skip
    train(trainer)
    offline = set(answers()["completion"])
    for call in asked_for(trainer).calls:
        for text, topic in zip(call["completions"], call["topic"], strict=True):
            assert topic == ("theirs" if text in offline else "mine")


def test_messages_reach_reward_functions_as_messages(make: Any) -> None:
    data = tiny.make_pairs(4, conversational=True)
    trainer = make(data=data, num_rounds=1, reward_funcs=Asked())
    (found,) = train(trainer)
    asked = asked_for(trainer)
    texts = {row["content"] for kind in ("chosen", "rejected") for turn in data[kind] for row in turn}
    assert all(isinstance(text, list) and text[-1]["role"] == "assistant" for text in asked.all("completions"))
    assert texts < {text[-1]["content"] for text in asked.all("completions")}
    tokenizer = tiny.make_tokenizer()
    prompts = {
        tuple(tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"])
        for p in data["prompt"]
    }
    # Offline and sampled responses belong to the same prompts.
    for offline in (True, False):
        assert {prompt_of(row) for row in found if row["offline"] is offline} == prompts
    assert trainer.round_summaries[0]["groups"] == 4


@pytest.mark.parametrize("name", ["text", "_row", "weight", "offline"])
def test_an_extra_column_changes_no_response(name: str, make: Any) -> None:
    """Whatever it is called."""
    data = answers(**{name: ["w9"] * 12})
    (found,) = train(make(data=data, num_generations=0, num_rounds=1))
    check_weights(found, 0.1)
    assert all(row["input_ids"][-1] == EOS for row in found)
    assert distinct(found) == Counter((*ids(row["prompt"] + row["completion"]), EOS) for row in data)


def test_offline_rows_are_scored_once(make: Any) -> None:
    """Rounds on the same rows ask for them once, whatever the policy is by then."""
    offline = set(answers()["completion"])
    for settings in ({"num_generations": 0}, {"num_generations": 2}):
        folder = f"out-{settings['num_generations']}"
        trainer = make(folder, data=answers(rewards=False), num_rounds=3, reward_funcs=Asked(), **settings)
        found = train(trainer)
        texts = Counter(asked_for(trainer).all("completions"))
        assert {text: texts[text] for text in offline} == dict.fromkeys(offline, 1)
        assert sum(count for text, count in texts.items() if text not in offline) == 36 * (folder == "out-2")
        rewards = [sorted((tuple(row["input_ids"]), row["reward"]) for row in of if row["offline"]) for of in found]
        assert rewards[0] == rewards[1] == rewards[2]


def test_offline_rows_of_folds_are_scored_once(make: Any) -> None:
    trainer = make(
        data=answers(rewards=False), num_rounds=3, num_generations=0, round_data="split", reward_funcs=Asked()
    )
    train(trainer)
    assert Counter(asked_for(trainer).all("completions")) == Counter(answers()["completion"])


# ---- Two datasets ----


def test_responses_of_a_dataset_of_their_own(make: Any, said: Any) -> None:
    offline = answers(3, 4)
    (found, _) = train(make(data=prompts_of(), offline_dataset=offline, reward_funcs=threes))
    assert distinct([row for row in found if row["offline"]]) == Counter(
        (*ids(row["prompt"] + row["completion"]), EOS) for row in offline
    )
    assert {prompt_of(row) for row in found if not row["offline"]} == {ids(p) for p in prompts_of()["prompt"]}
    assert "are not used, its prompts alone" not in said.text


@pytest.mark.parametrize("kind", ["completions", "pairs", "pairs with the prompt inside"])
def test_responses_of_the_training_set_beside_another(kind: str, make: Any, said: Any) -> None:
    """They are not used, and this is said."""
    if kind == "completions":
        mine = answers(reward=[math.nan] * 12)
    else:
        mine = pairs_of()
        if "inside" in kind:
            mine = mine.map(lambda row: {name: f"{row['prompt']}{name} w1" for name in ("chosen", "rejected")})
            mine = mine.remove_columns("prompt")
    offline = answers(6, 2, seed=0)
    trainer = make(data=mine, offline_dataset=offline, reward_funcs=threes, num_rounds=1)
    assert "`offline_dataset` is given, so that the responses in `train_dataset` are not used, its prompts alone" in (
        said.text
    )
    (found,) = train(trainer)
    assert distinct([row for row in found if row["offline"]]).keys() == {
        (*ids(row["prompt"] + row["completion"]), EOS) for row in offline
    }
    sampled_for = Counter(prompt_of(row) for row in found if not row["offline"])
    assert set(sampled_for) == {ids(prompt) for prompt in prompts_of()["prompt"]}
    if kind != "completions":
        assert set(sampled_for.values()) == {2}


def test_a_named_dataset(make: Any, tmp_path: Path) -> None:
    offline = answers(5, 3)
    (tmp_path / "responses").mkdir()
    offline.to_json(tmp_path / "responses" / "train.jsonl")
    answers(2, 2, seed=4).to_json(tmp_path / "responses" / "test.jsonl")
    for split, wanted in ((None, offline), ("test", answers(2, 2, seed=4))):
        trainer = make(
            f"out-{split}", data=prompts_of(), offline_dataset_name=str(tmp_path / "responses"),
            offline_dataset_split=split, reward_funcs=threes, num_rounds=1, offline_ratio=0.75,
        )  # fmt: skip
        (found,) = train(trainer)
        got = {(tuple(row["input_ids"]), row["reward"]) for row in found if row["offline"]}
        assert got == {((*ids(row["prompt"] + row["completion"]), EOS), row["reward"]) for row in wanted}
    with pytest.raises(ConfigurationError, match=r"`offline_dataset_name` \('.*responses'\), split 'none', cannot"):
        make(
            reward_funcs=threes,
            offline_dataset_name=str(tmp_path / "responses"),
            offline_dataset_split="none",
        )


def test_the_argument_wins_over_the_name(make: Any, said: Any, tmp_path: Path) -> None:
    make(reward_funcs=threes, offline_dataset=answers(), offline_dataset_name="/nowhere")
    assert "`offline_dataset` is given to the trainer and named in its config; the trainer's is used" in said.text


# ---- A round's rows, without a model ----


@pytest.mark.parametrize(
    ("samples", "ratios", "wanted"),
    [
        (24, [0.5], 48),
        (24, [0.25], 32),
        (24, [0.75], 96),
        (24, [0.0], 24),
        (24, [0.0, 0.5], 24),
        (24, [0.5, 0.25, 1.0], 32),
        (24, [1.0, 0.5], 48),
        (10, [0.1], 11),
        (0, [1.0], 0),
        # As near as whole rows come.
        (10, [1 / 3], 15),
        (7, [0.3], 10),
        (3, [0.1], 3),
    ],
)
def test_rows_of_a_run(samples: int, ratios: list[float], wanted: int) -> None:
    assert rows_of_run(samples, ratios) == wanted


@pytest.mark.parametrize(
    ("rows_", "samples", "ratio", "wanted"),
    [
        (48, 24, 0.5, Counts(24, 24)),
        (32, 24, 0.25, Counts(24, 8)),
        # A larger share than the smallest one leaves samples out.
        (32, 24, 0.5, Counts(16, 16)),
        (32, 24, 0.75, Counts(8, 24)),
        (32, 24, 1.0, Counts(0, 32)),
        (24, 24, 0.0, Counts(24, 0)),
        (24, 24, 0.25, Counts(18, 6)),
        (24, 24, 1.0, Counts(0, 24)),
        (3, 3, 0.1, Counts(3, 0)),
        (15, 10, 1 / 3, Counts(10, 5)),
    ],
)
def test_counts_of_a_round(rows_: int, samples: int, ratio: float, wanted: Counts) -> None:
    assert counts_of_round(rows_, samples, ratio) == wanted


@pytest.mark.parametrize(
    "ratios", [[0.1], [0.5], [0.9], [0.0, 1.0], [0.3, 0.6, 0.9], [0.25, 0.5], [0.0, 0.1]], ids=str
)
@pytest.mark.parametrize("samples", [1, 2, 7, 24, 1000])
def test_every_round_has_as_many_rows_and_its_share(samples: int, ratios: list[float]) -> None:
    total = rows_of_run(samples, ratios)
    for ratio in ratios:
        counts = counts_of_round(total, samples, ratio)
        assert counts.online + counts.offline == total
        assert 0 <= counts.online <= samples
        # No row more or less than rounding takes.
        assert abs(counts.offline - ratio * total) <= 1
        if ratio in (0, 1):
            assert counts.offline == ratio * total


def test_taken_has_no_repeats_where_there_are_enough() -> None:
    available = list(range(100, 120))
    for count in (1, 7, 19, 20):
        found = taken(available, count, np.random.default_rng(0))
        assert len(found) == len(set(found)) == count
        assert found == sorted(found)
        assert set(found) <= set(available)
    assert taken(available, 20, np.random.default_rng(0)) == available
    assert taken(available, 0, np.random.default_rng(0)) == []
    assert taken([], 5, np.random.default_rng(0)) == []


def test_taken_goes_through_all_before_it_repeats() -> None:
    available = [4, 8, 15, 16, 23]
    for count in (5, 6, 10, 13, 24):
        found = taken(available, count, np.random.default_rng(1))
        assert len(found) == count
        times = Counter(found)
        assert times.keys() == set(available)
        assert set(times.values()) <= {count // 5, -(-count // 5)}
    assert taken([7], 3, np.random.default_rng(0)) == [7, 7, 7]


def test_taken_is_a_draw() -> None:
    available = list(range(50))
    same = [taken(available, 20, np.random.default_rng(3)) for _ in range(2)]
    assert same[0] == same[1]
    assert taken(available, 20, np.random.default_rng(4)) != same[0]
    # Every one has its turn.
    draw = np.random.default_rng(0)
    times = Counter(index for _ in range(200) for index in taken(available, 20, draw))
    assert len(times) == 50
    assert min(times.values()) > 40


def response(
    prompt: int, reward: float, offline: bool = False, source: float | None = None, policy: float | None = None
) -> Response:
    return Response((prompt,), [prompt, 9], [-100, 9], reward, offline, source, policy)


def test_the_ratio_of_a_response() -> None:
    assert response(1, 0.0, True, -5.0, -3.0).log_ratio == 2.0
    assert response(1, 0.0, True, None, -3.0).log_ratio is None
    assert response(1, 0.0, True, -5.0).log_ratio is None
    assert response(1, 0.0, False, 0.0, 0.0).log_ratio == 0.0


def test_weights_go_over_all_responses_of_a_prompt() -> None:
    """Wherever they stand and whatever they are from."""
    given = [
        response(1, 0.0), response(2, 1.0, offline=True), response(1, 1.0, offline=True), response(2, 1.0),
        response(1, 2.0),
    ]  # fmt: skip
    weights, said, equal = weigh(given, 0.5, None)
    odds = [math.exp(reward / 0.5) for reward in (0, 1, 2)]
    mean = sum(odds) / 3
    assert weights[[0, 2, 4]].tolist() == pytest.approx([value / mean for value in odds], rel=1e-12)
    assert weights[[1, 3]].tolist() == [1.0, 1.0]
    assert weights.dtype == np.float64
    assert equal.tolist() == [False, True, False, True, False]
    total = sum(odds)
    effective = total**2 / sum(value**2 for value in odds)
    assert said["groups"] == 2
    assert said["equal_groups"] == 1
    assert said["effective_sample_size"] == pytest.approx((effective + 2) / 2)
    assert said["effective_share"] == pytest.approx((effective / 3 + 1) / 2)
    assert said["weight_max"] == pytest.approx(odds[2] / mean)
    # Of those that differ.
    assert said["reward_spread"] == 2.0
    assert (said["singletons"], said["singletons_effective"], said["ratios_clipped"]) == (0, None, None)


def test_prompts_with_one_response_are_one_group() -> None:
    given = [response(1, 0.0), response(2, 1.0, offline=True), response(3, 5.0), response(3, 5.5), response(4, 0.5)]
    weights, said, equal = weigh(given, 1.0, 5.0)
    odds = [math.exp(reward) for reward in (0, 1, 0.5)]
    mean = sum(odds) / 3
    assert weights[[0, 1, 4]].tolist() == pytest.approx([value / mean for value in odds], rel=1e-12)
    two = [math.exp(5.0), math.exp(5.5)]
    assert weights[[2, 3]].tolist() == pytest.approx([2 * value / sum(two) for value in two], rel=1e-12)
    assert not equal.any()
    assert (said["groups"], said["equal_groups"], said["singletons"]) == (1, 0, 3)
    assert said["singletons_effective"] == pytest.approx(sum(odds) ** 2 / sum(value**2 for value in odds))
    assert said["effective_sample_size"] == pytest.approx(sum(two) ** 2 / sum(value**2 for value in two))
    assert said["reward_spread"] == pytest.approx((0.5 + 1.0) / 2)


def test_as_many_singletons_as_a_group_has_members() -> None:
    """They share a size, but not a group."""
    given = [response(1, 0.0), response(1, 1.0), response(2, 10.0), response(3, 12.0)]
    weights, said, _ = weigh(given, 1.0, None)
    for places, distance in (((0, 1), 1.0), ((2, 3), 2.0)):
        odds = [1.0, math.exp(distance)]
        assert weights[list(places)].tolist() == pytest.approx([2 * value / sum(odds) for value in odds], rel=1e-12)
    assert (said["groups"], said["singletons"]) == (1, 2)


def test_singletons_with_equal_rewards() -> None:
    weights, said, equal = weigh([response(1, 0.3), response(2, 0.3)], 0.1, 5.0)
    assert weights.tolist() == [1.0, 1.0]
    assert equal.all()
    assert (said["groups"], said["equal_groups"], said["effective_sample_size"]) == (0, 0, None)
    assert said["reward_spread"] == 0.0
    weights, said, equal = weigh([response(1, 0.3)], 0.1, 5.0)
    assert weights.tolist() == [1.0]


@pytest.mark.parametrize("clip", [None, 1.5])
def test_the_ratios_of_known_responses_count(clip: float | None) -> None:
    given = [response(1, 0.1 * i, True, source, -4.0) for i, source in enumerate((-4.0, -7.0, -1.0, -3.5))]
    weights, said, equal = weigh(given, 0.5, clip)
    ratios = torch.tensor([[0.0, 3.0, -3.0, -0.5]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 0.1, 0.2, 0.1 * 3]], dtype=torch.float64)
    expected = policy_weights(rewards, 0.5, ratios, clip)
    assert weights.tolist() == expected[0].tolist()
    assert said["effective_sample_size"] == float(effective_sample_size(expected)[0])
    # By hand: the lower median is -0.5, so that the offsets are 0.5, 3.5, -2.5 and 0.
    offsets = [0.5, 3.5, -2.5, 0.0] if clip is None else [0.5, 1.5, -1.5, 0.0]
    odds = [math.exp(0.1 * i / 0.5 + offset) for i, offset in enumerate(offsets)]
    assert weights.tolist() == pytest.approx([4 * value / sum(odds) for value in odds], rel=1e-9)
    assert said["ratios_clipped"] == (None if clip is None else 0.5)
    assert not equal.any()


def test_an_unknown_ratio_is_the_median_of_the_known() -> None:
    known = (2.0, -1.0, 0.5, 7.0)
    given = [response(1, 0.0, True, -4.0, -4.0 + ratio) for ratio in known]
    given += [response(1, 0.0, offline=True), response(2, 0.0, offline=True), response(2, 1.0, offline=True)]
    weights, said, _ = weigh(given, 1.0, None)
    # Of four the lower median is the second.
    odds = [math.exp(ratio) for ratio in (*known, 0.5)]
    assert weights[:5].tolist() == pytest.approx([5 * value / sum(odds) for value in odds], rel=1e-12)
    assert weights[4] == weights[2]
    # Where none is known, rewards alone count.
    odds = [1.0, math.e]
    assert weights[5:].tolist() == pytest.approx([2 * value / sum(odds) for value in odds], rel=1e-12)
    assert said["ratios_clipped"] is None
    # Beside samples of the policy itself it is 0.
    weights, *_ = weigh([response(1, 0.0, False, 0.0, 0.0)] * 2 + [response(1, 0.0, True)], 1.0, 5.0)
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_the_unknown_of_one_group_do_not_see_another() -> None:
    given = [
        response(1, 0.0, True, -9.0, 0.0), response(1, 0.0, True), response(1, 0.0, True, -3.0, 0.0),
        response(2, 0.0, True, -1.0, 0.0), response(2, 0.0, True),
        # One group, together.
        response(3, 0.0, True, -5.0, 0.0), response(4, 0.0, True), response(5, 0.0, True, -5.5, 0.0),
    ]  # fmt: skip
    weights, said, _ = weigh(given, 1.0, 100.0)
    for places, ratios in (((0, 1, 2), (9, 3, 3)), ((3, 4), (1, 1)), ((5, 6, 7), (5, 5, 5.5))):
        odds = [math.exp(ratio - max(ratios)) for ratio in ratios]
        expected = [len(odds) * value / sum(odds) for value in odds]
        assert weights[list(places)].tolist() == pytest.approx(expected, rel=1e-12)
    assert said["ratios_clipped"] == 0.0


def test_the_clipped_share_is_that_of_the_known() -> None:
    """Of 5 known ratios 2 are cut: one on either side, in two groups; those that are unknown do not count."""
    given = [
        response(1, 0.0, True, 0.0, -3.0), response(1, 0.0, True, 0.0, 0.0), response(1, 0.0, True, 0.0, 1.0),
        response(1, 0.0, True), response(2, 0.0, True, 0.0, 0.5), response(2, 0.0, True, 0.0, 9.0),
        response(3, 0.0, True), response(3, 1.0, True),
    ]  # fmt: skip
    _, said, _ = weigh(given, 1.0, 2.0)
    assert said["ratios_clipped"] == pytest.approx(2 / 5)
    _, said, _ = weigh(given, 1.0, None)
    assert said["ratios_clipped"] is None


def test_many_groups_of_many_sizes() -> None:
    """As `policy_weights` has it, a row a prompt."""
    draw = np.random.default_rng(5)
    sizes = [1, 2, 2, 3, 5, 1, 3, 1, 4]
    given = [
        response(prompt, float(draw.normal()), bool(draw.integers(2)), float(-draw.random() * 9), -5.0)
        for prompt, size in enumerate(sizes)
        for _ in range(size)
    ]
    order = draw.permutation(len(given))
    weights, said, _ = weigh([given[index] for index in order], 0.4, 1.0)
    back = np.empty(len(given))
    back[order] = weights
    mask = torch.tensor([[place < size for place in range(5)] for size in sizes])
    rewards, ratios = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    rewards[mask] = torch.tensor([r.reward for r in given], dtype=torch.float64)
    ratios[mask] = torch.tensor([r.log_ratio for r in given], dtype=torch.float64)
    expected = policy_weights(rewards, 0.4, ratios, 1.0, mask)
    assert back.tolist() == pytest.approx(expected[mask].tolist(), rel=1e-12)
    several = torch.tensor([size > 1 for size in sizes])
    effective = effective_sample_size(expected, mask)[several]
    assert said["effective_sample_size"] == pytest.approx(effective.mean().item())
    assert said["effective_share"] == pytest.approx((effective / mask.sum(dim=1)[several]).mean().item())
    assert (said["groups"], said["singletons"]) == (6, 3)


# ---- The rows of a run ----


def check_weights(found: Sequence[dict[str, Any]], temperature: float, reward_of: Any = None) -> None:
    """Of rows that hold every response of their prompts, once each: exp(r / beta) over its mean."""
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(prompt_of(row), []).append(row)
    for group in groups.values():
        highest = max(row["reward"] for row in group)
        odds = [math.exp((row["reward"] - highest) / temperature) for row in group]
        mean = sum(odds) / len(odds)
        assert [row["weight"] for row in group] == pytest.approx([value / mean for value in odds], rel=1e-9)
        assert sum(row["weight"] for row in group) / len(group) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [
        # 12 responses are sampled each round, and there are 12 offline ones.
        (None, [(12, 12)] * 2),
        (0.25, [(12, 4)] * 2),
        (0.75, [(12, 36)] * 2),
        (0, [(12, 0)] * 2),
        ([0.25, 0.5], [(12, 4), (8, 8)]),
        ([0.0, 1.0], [(12, 0), (0, 12)]),
        ([1.0, 0.5, 0.75], [(0, 24), (12, 12), (6, 18)]),
    ],
    ids=str,
)
def test_the_share_of_offline_rows(ratio: Any, wanted: list[tuple[int, int]], make: Any, said: Any) -> None:
    data = answers()
    trainer = make(data=data, offline_ratio=ratio, num_rounds=len(wanted), reward_funcs=threes)
    rounds = train(trainer)
    assert len(rounds) == len(wanted)
    for t, (found, (online, offline)) in enumerate(zip(rounds, wanted, strict=True)):
        mine = [row for row in found if row["offline"]]
        assert (len(found) - len(mine), len(mine)) == (online, offline)
        times = distinct(mine)
        assert len(times) == min(offline, 12)
        assert set(times.values()) <= {offline // 12, -(-offline // 12)}
        rewards = {(*ids(row["prompt"] + row["completion"]), EOS): row["reward"] for row in data}
        assert all(row["reward"] == rewards[tuple(row["input_ids"])] for row in mine)
        # Samples are taken once at most, as they were sampled.
        folder = Path(trainer.args.output_dir) / "_rounds" / "rollouts" / f"round-{t:04d}"
        assert folder.exists() == (online > 0)
        if online:
            made = Counter(
                ((*row["prompt_ids"], *answer), reward)
                for row in rollouts(trainer, f"round-{t:04d}")
                for answer, reward in zip(row["completion_ids"], row["reward"], strict=True)
            )
            used = Counter((tuple(row["input_ids"]), row["reward"]) for row in found if not row["offline"])
            assert used <= made
            assert online < 12 or used == made
        repeats = max(offline - 12, 0)
        summary = trainer.round_summaries[t]
        assert summary["repeated_rows"] == repeats
        assert (f"Round {t + 1}: {repeats} of {online + offline} rows are repeats" in said.text) == (repeats > 0)
        weight = sum(row["weight"] for row in mine) / sum(row["weight"] for row in found)
        assert summary["offline_weight_share"] == pytest.approx(weight)
        assert {prompt_of(row) for row in found} <= {ids(prompt) for prompt in data["prompt"]}


def test_the_weights_of_a_round(make: Any) -> None:
    """All responses of a prompt are in one group, sampled or not; half of the rewards are the function's."""
    data = [{**row, "reward": None if i % 2 else row["reward"]} for i, row in enumerate(answers())]
    trainer = make(
        data=datasets.Dataset.from_list(data), reward_funcs=threes, reward_temperature=0.3, num_generations=3,
        offline_ratio=0.4,
    )  # fmt: skip
    for t, found in enumerate(train(trainer)):
        assert len(found) == 18 + 12
        check_weights(found, 0.3)
        assert {len([row for row in found if prompt_of(row) == ids(p)]) for p in prompts_of()["prompt"]} == {5}
        summary = trainer.round_summaries[t]
        assert (summary["groups"], summary["singletons"]) == (6, 0)
        assert summary["weight_max"] == max(row["weight"] for row in found)
        offline = [row["reward"] for row in found if row["offline"]]
        assert summary["offline_reward_mean"] == pytest.approx(sum(offline) / 12)
        made = {
            ((*row["prompt_ids"], *answer), reward)
            for row in rollouts(trainer, f"round-{t:04d}")
            for answer, reward in zip(row["completion_ids"], row["reward"], strict=True)
        }
        assert made == {(tuple(row["input_ids"]), row["reward"]) for row in found if not row["offline"]}


@pytest.mark.parametrize("clip", ["none", "2.0"])
def test_the_weights_of_a_round_with_log_probabilities(clip: str, make: Any) -> None:
    """The policy's own, of the tokens that are trained on, are set against the column's."""
    data = answers(logp=[-20.0 - 3 * (5 * i % 12) for i in range(12)])
    trainer = make(
        data=data, behavior_logps_column="logp", importance_clip=clip, num_generations=0, num_rounds=1,
        reward_temperature=0.5,
    )  # fmt: skip
    (found,) = train(trainer)
    model = tiny.make_model().eval()
    z: dict[tuple[int, ...], list[tuple[tuple[int, ...], float, float]]] = {}
    for row in data:
        tokens = [*ids(row["prompt"] + row["completion"]), EOS]
        start = len(ids(row["prompt"]))
        with torch.no_grad():
            steps = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        policy = sum(float(steps[place - 1, tokens[place]]) for place in range(start, len(tokens)))
        z.setdefault(tuple(tokens[:start]), []).append((tuple(tokens), row["reward"], policy - row["logp"]))
    for group in z.values():
        middle = sorted(ratio for *_, ratio in group)[(len(group) - 1) // 2]
        bound = math.inf if clip == "none" else 2.0
        odds = {
            tokens: math.exp(reward / 0.5 + min(max(ratio - middle, -bound), bound)) for tokens, reward, ratio in group
        }
        mean = sum(odds.values()) / len(odds)
        for row in found:
            if tuple(row["input_ids"]) in odds:
                assert row["weight"] == pytest.approx(odds[tuple(row["input_ids"])] / mean, rel=1e-4)
    summary = trainer.round_summaries[0]
    assert summary["importance_seconds"] > 0
    assert (summary["ratios_clipped"] is None) == (clip == "none")


def test_labels_hide_the_prompt(make: Any) -> None:
    """What is trained on is the response, its end included where it has one."""
    trainer = make(data=pairs_of(), reward_funcs=threes, num_rounds=1)
    (found,) = train(trainer)
    offline = {(ids(row["prompt"]), (*ids(row[kind]), EOS)) for row in pairs_of() for kind in ("chosen", "rejected")}
    made = {
        (tuple(row["prompt_ids"]), tuple(answer))
        for row in rollouts(trainer, "round-0000")
        for answer in row["completion_ids"]
    }
    for row in found:
        prompt = prompt_of(row)
        answer = tuple(label for label in row["labels"] if label != -100)
        assert (prompt, answer) in (offline if row["offline"] else made)
        assert row["input_ids"] == [*prompt, *answer]
    assert len(offline) == sum(row["offline"] for row in found)


def test_an_offline_response_is_trained_on_with_its_prompt(make: Any, sampled: list[tuple[int, ...]]) -> None:
    """In the round whose fold the prompt is in, whatever dataset it is from."""
    others = datasets.concatenate_datasets([answers(8, 2), answers(5, 2, seed=9)])
    for name, settings in (
        ("own", {"data": answers(8, 2)}),
        ("apart", {"data": prompts_of(8), "offline_dataset": others, "offline_ratio": 2 / 3}),
    ):
        rounds = train(make(name, round_data="split", num_rounds=4, reward_funcs=threes, **settings))
        seen: list[tuple[int, ...]] = []
        known = {ids(prompt) for prompt in prompts_of(8)["prompt"]}
        for found in rounds:
            fold = {prompt_of(row) for row in found if not row["offline"]}
            offline = {prompt_of(row) for row in found if row["offline"]}
            assert len(fold) == 2
            assert offline & known == fold
            seen.extend(offline)
        # Each prompt has a round, and only one.
        assert Counter(seen) == dict.fromkeys(
            {ids(p) for p in (others if name == "apart" else prompts_of(8))["prompt"]}, 1
        )
        if name == "own":
            check_weights([row for found in rounds for row in found], 0.1)


def test_prompts_of_their_own_are_dealt_out_evenly(make: Any) -> None:
    """Offline responses to prompts that are not sampled for: all responses of a prompt in one round."""
    offline = answers(7, 3, seed=9)
    settings = {"data": prompts_of(), "offline_dataset": offline, "round_data": "split", "num_rounds": 3}
    rounds = train(make(reward_funcs=threes, offline_ratio=0.7, **settings))
    of_rounds = [{prompt_of(row) for row in found if row["offline"]} for found in rounds]
    assert sorted(map(len, of_rounds)) == [2, 2, 3]
    assert len(set.union(*of_rounds)) == 7
    for found, prompts in zip(rounds, of_rounds, strict=True):
        texts = {tuple(row["input_ids"]) for row in found if row["offline"]}
        assert len(texts) == 3 * len(prompts)


def test_a_round_of_offline_rows_samples_nothing(make: Any, sampled: list[tuple[int, ...]]) -> None:
    trainer = make(data=answers(), offline_ratio=[1, 0.5, 1.0], num_rounds=3, reward_funcs=Asked())
    rounds = train(trainer)
    assert sorted(sampled) == sorted(ids(prompt) for prompt in prompts_of()["prompt"])
    assert [len(call["completions"]) for call in asked_for(trainer).calls] == [12]
    assert [sum(row["offline"] for row in found) for found in rounds] == [24, 12, 24]
    assert [summary.get("samples") for summary in trainer.round_summaries] == [None, 12, None]


def test_prompts_per_round(make: Any, sampled: list[tuple[int, ...]]) -> None:
    """Offline responses of the prompts that are sampled for come first."""
    trainer = make(data=answers(9, 2), prompts_per_round=4, num_rounds=3, reward_funcs=threes)
    rounds = train(trainer)
    assert len(sampled) == 12
    chosen = []
    for t, found in enumerate(rounds):
        prompts = set(sampled[4 * t : 4 * t + 4])
        assert len(prompts) == 4
        assert len(found) == 16
        for offline in (True, False):
            rows_of = [row for row in found if row["offline"] is offline]
            assert Counter(prompt_of(row) for row in rows_of) == dict.fromkeys(prompts, 2)
            assert not offline or set(distinct(rows_of).values()) == {1}
        check_weights(found, 0.1)
        chosen.append(prompts)
    assert chosen[0] != chosen[1] or chosen[1] != chosen[2]


def test_more_offline_responses_than_a_round_takes(make: Any) -> None:
    """Another choice in every round, the same in every run."""
    settings = {"data": answers(6, 8), "num_rounds": 3, "offline_ratio": 0.5, "reward_funcs": threes}
    rounds = train(make("a", **settings))
    chosen = [distinct([row for row in found if row["offline"]]) for found in rounds]
    for times in chosen:
        assert sum(times.values()) == len(times) == 12
    assert chosen[0] != chosen[1] != chosen[2]
    assert train(make("b", **settings)) == rounds
    assert train(make("c", **settings, seed=7)) != rounds


def test_equal_groups_can_be_skipped(make: Any) -> None:
    equal = prompts_of()["prompt"][:2]
    data = [{**row, "reward": 0.5 if row["prompt"] in equal else row["reward"]} for row in answers(6, 3)]
    settings: dict[str, Any] = {"data": datasets.Dataset.from_list(data), "num_generations": 0, "num_rounds": 1}
    trainer = make("skips", skip_equal_groups=True, **settings)
    (found,) = train(trainer)
    left = {ids(prompt) for prompt in prompts_of()["prompt"][2:]}
    assert {prompt_of(row) for row in found} == left
    # A round is as long as ever.
    assert len(found) == 18
    assert set(distinct(found).values()) == {1, 2}
    assert trainer.round_summaries[0]["skipped_groups"] == 2
    assert trainer.round_summaries[0]["equal_groups"] == 2
    trainer = make("keeps", **settings)
    (found,) = train(trainer)
    assert {prompt_of(row) for row in found} == left | {ids(prompt) for prompt in equal}
    assert {row["weight"] for row in found if prompt_of(row) not in left} == {1.0}
    assert trainer.round_summaries[0]["skipped_groups"] == 0


def test_skipped_samples_make_room_for_offline_rows(make: Any) -> None:
    def flat(prompts: list[str], **kwargs: Any) -> list[float]:
        return [0.5] * len(prompts)

    offline = answers(3, 2, seed=9)
    trainer = make(data=prompts_of(), offline_dataset=offline, reward_funcs=flat, skip_equal_groups=True, num_rounds=1)
    (found,) = train(trainer)
    assert len(found) == 24
    assert all(row["offline"] for row in found)
    assert trainer.round_summaries[0]["skipped_groups"] == 6


def test_a_round_of_equal_rewards_alone_is_trained_on(make: Any, said: Any) -> None:
    def flat(prompts: list[str], **kwargs: Any) -> list[float]:
        return [0.5] * len(prompts)

    trainer = make(data=prompts_of(), reward_funcs=flat, skip_equal_groups=True, num_rounds=1)
    (found,) = train(trainer)
    assert "Round 1: the responses of every prompt have equal rewards, so that" in said.text
    assert {row["weight"] for row in found} == {1.0}
    assert trainer.round_summaries[0]["skipped_groups"] == 0


@pytest.mark.parametrize("answered", [2, 0])
def test_rows_without_a_response_are_prompts(make: Any, answered: int) -> None:
    """As with demonstrations for some of the prompts only."""
    data = answers()
    completions = [text if i < answered else None for i, text in enumerate(data["completion"])]
    data = data.remove_columns("completion").add_column("completion", completions)
    trainer = make(data=data, reward_funcs=threes, num_rounds=1)
    (found,) = train(trainer)
    assert {prompt_of(row) for row in found if not row["offline"]} == {ids(prompt) for prompt in data["prompt"]}
    assert trainer.round_summaries[0]["offline_responses"] == answered


class Silent(TransformersSampler):
    """Ends at once for some prompts."""

    silent: tuple[tuple[int, ...], ...] = ()

    def __call__(self, prompts: Any, num: int, seed: int) -> Any:
        return [
            [dataclasses.replace(found, ids=[EOS], logp=-1.0, cut=False) for found in group]
            if tuple(prompt) in self.silent
            else group
            for prompt, group in zip(prompts, super().__call__(prompts, num, seed), strict=True)
        ]


def test_prompts_with_nothing_but_empty_responses(make: Any, monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    monkeypatch.setattr("trl_extras.rollouts.trainer.TransformersSampler", Silent)
    all_prompts = [ids(prompt) for prompt in prompts_of()["prompt"]]
    monkeypatch.setattr(Silent, "silent", tuple(all_prompts[:2]))
    trainer = make(data=prompts_of(), reward_funcs=threes, num_rounds=1)
    (found,) = train(trainer)
    assert "Round 1: 2 prompts got nothing but empty responses and are left out" in said.text
    assert {prompt_of(row) for row in found} == set(all_prompts[2:])
    assert len(found) == 12
    assert trainer.round_summaries[0]["empty"] == 2
    assert trainer.round_summaries[0]["repeated_rows"] == 4
    # Their offline responses stay.
    trainer = make("both", data=answers(), reward_funcs=threes, num_rounds=1)
    (found,) = train(trainer)
    assert {prompt_of(row) for row in found if row["offline"]} == set(all_prompts)
    assert {prompt_of(row) for row in found if not row["offline"]} == set(all_prompts[2:])
    monkeypatch.setattr(Silent, "silent", tuple(all_prompts))
    with pytest.raises(
        ConfigurationError, match="Round 1: all responses of all 6 prompts are empty, so that there is"
    ):
        make("none", data=prompts_of(), reward_funcs=threes).train()


def test_evaluation_rows_with_responses(make: Any) -> None:
    """They have a loss, and their prompts are sampled for."""
    heldout = answers(4, 1, seed=3)
    trainer = make(data=answers(), reward_funcs=threes, eval_dataset=heldout, eval_strategy="epoch")
    train(trainer)
    for t, summary in enumerate(trainer.round_summaries):
        assert math.isfinite(summary["eval"]["loss"])
        measured = rollouts(trainer, f"heldout-{t:04d}-iterate")
        assert [row["prompt"] for row in measured] == heldout["prompt"]
        assert [row["prompt_ids"] for row in measured] == [list(ids(prompt)) for prompt in heldout["prompt"]]
        rewards = [row["reward"][0] for row in measured]
        assert summary["heldout_iterate"]["reward"] == pytest.approx(sum(rewards) / 4)
        assert rewards == threes([row["completions"][0] for row in measured])
    assert trainer.round_summaries[0]["heldout_start"]["prompts"] == 4
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.round_summaries[-1]["eval"]["loss"], rel=1e-4)
    # Plain: the mean over the responses' tokens, whatever the rewards are.
    total = tokens = 0.0
    for row in heldout:
        sequence = [*ids(row["prompt"] + row["completion"]), EOS]
        start = len(ids(row["prompt"]))
        with torch.no_grad():
            steps = trainer.model(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
        total -= sum(float(steps[place - 1, sequence[place]]) for place in range(start, len(sequence)))
        tokens += len(sequence) - start
    assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_evaluation_rows_without_a_judge(make: Any) -> None:
    trainer = make(data=answers(), num_generations=0, eval_dataset=answers(4, 1, seed=3), eval_strategy="epoch")
    train(trainer)
    assert math.isfinite(trainer.round_summaries[1]["eval"]["loss"])
    assert "heldout_iterate" not in trainer.round_summaries[1]


def test_evaluation_prompts(make: Any) -> None:
    trainer = make(data=answers(), num_generations=0, reward_funcs=threes, eval_dataset=prompts_of(5))
    train(trainer)
    assert trainer.round_summaries[1]["heldout_iterate"]["prompts"] == 5


# ---- Offline alone ----


def test_offline_alone(make: Any, sampled: list[tuple[int, ...]]) -> None:
    """Nothing is sampled, nothing scored; each prompt has one response, and all weigh against each other."""
    data = answers(8, 1)
    trainer = make("reuse", data=data, num_generations=0, num_rounds=3, reward_temperature=0.4)
    rounds = train(trainer)
    assert trainer._judge is None
    odds = [math.exp(reward / 0.4) for reward in data["reward"]]
    mean = sum(odds) / 8
    expected = {
        (*ids(row["prompt"] + row["completion"]), EOS): value / mean for row, value in zip(data, odds, strict=True)
    }
    for found in rounds:
        assert {tuple(row["input_ids"]): row["weight"] for row in found} == pytest.approx(expected)
        assert len(found) == 8
        assert all(row["offline"] for row in found)
    # Each round a fold of its own, weighed by itself.
    rounds = train(make("split", data=data, num_generations=0, num_rounds=4, round_data="split"))
    assert [len(found) for found in rounds] == [2] * 4
    assert {tuple(row["input_ids"]) for found in rounds for row in found} == expected.keys()
    for found in rounds:
        assert sum(row["weight"] for row in found) == pytest.approx(2.0)
    assert not sampled


def test_offline_alone_from_a_dataset_of_its_own(make: Any, sampled: list[tuple[int, ...]]) -> None:
    offline = answers(4, 3)
    rounds = train(make(data=prompts_of(2), offline_dataset=offline, num_generations=0))
    for found in rounds:
        assert distinct(found) == Counter((*ids(row["prompt"] + row["completion"]), EOS) for row in offline)
        check_weights(found, 0.1)
    assert not sampled


def test_a_reward_function_for_nothing_is_told_of(make: Any, said: Any) -> None:
    trainer = make(data=answers(), num_generations=0, reward_funcs=Asked())
    assert "`reward_funcs` is given, but every response has its `reward` already and none is sampled" in said.text
    train(trainer)
    assert asked_for(trainer).calls == []
    said.clear()
    make("some", data=broken(3, reward=None), num_generations=0, reward_funcs=Asked())
    make("sampled", data=answers(), reward_funcs=Asked())
    assert "every response has its `reward` already" not in said.text


def test_what_is_cut_away_is_told_of(make: Any, said: Any) -> None:
    make(reward_funcs=threes, top_p=0.9, top_k=5)
    assert "top_p=0.9, top_k=5: responses that are cut away can never be sampled" in said.text
    said.clear()
    make(reward_funcs=threes)
    make(data=answers(), num_generations=0, top_p=0.9)
    assert "cut away" not in said.text


# ---- Rewards from elsewhere ----


def labels_of(trainer: Any, round_index: int) -> Path:
    return Path(trainer.args.output_dir) / "_rounds" / "rollouts" / f"round-{round_index:04d}" / "labels.jsonl"


def fill(path: Path, label: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, **label(i, row)}) + "\n" for i, row in enumerate(lines)))


def test_rewards_from_elsewhere(make: Any) -> None:
    settings = {"data": answers(), "ranker": "external", "save_strategy": "epoch"}
    with pytest.raises(WaitingForLabels):
        (trainer := make(**settings)).train()
    fill(labels_of(trainer, 0), lambda i, row: {"rewards": [0.1 * i, 0.05]})
    with pytest.raises(WaitingForLabels, match="Round 2"):
        (trainer := make(**settings)).train(resume_from_checkpoint="last")
    fill(labels_of(trainer, 1), lambda i, row: {"rewards": [0.3, 0.2 * i]})
    trainer = make(**settings)
    kept = Kept()
    trainer.add_callback(kept)
    trainer.train(resume_from_checkpoint="last")
    # The first round ends once more.
    *_, found = kept.rows
    lines = [json.loads(line) for line in labels_of(trainer, 1).read_text().splitlines()]
    assert [line["rewards"] for line in lines] == [[0.3, 0.2 * i] for i in range(6)]
    labelled = Counter((ids(line["prompt"]), reward) for line in lines for reward in line["rewards"])
    assert Counter((prompt_of(row), row["reward"]) for row in found if not row["offline"]) == labelled
    own = Counter((*ids(row["prompt"] + row["completion"]), EOS, row["reward"]) for row in answers())
    assert Counter((*row["input_ids"], row["reward"]) for row in found if row["offline"]) == own
    check_weights(found, 0.1)


@pytest.mark.parametrize("label", [{"chosen": 0, "rejected": 1}, {"chosen": -1, "rejected": -1}], ids=["order", "tie"])
def test_an_order_from_elsewhere_is_refused(label: dict[str, int], make: Any) -> None:
    with pytest.raises(WaitingForLabels):
        (trainer := make(ranker="external")).train()
    fill(labels_of(trainer, 0), lambda i, row: label if i == 3 else {"rewards": [0.5, 0.0]})
    message = "Round 1: the label file's row 4 has no `rewards`, which SPR weights responses by: give 2 numbers there"
    with pytest.raises(ConfigurationError, match=message):
        make(ranker="external").train()


@pytest.mark.parametrize("rewards", [[0.5], [0.5, math.nan], [0.5, "1"]], ids=["too few", "nan", "text"])
def test_rewards_from_elsewhere_that_cannot_be_used(rewards: list[Any], make: Any) -> None:
    with pytest.raises(WaitingForLabels):
        (trainer := make(ranker="external")).train()
    fill(labels_of(trainer, 0), lambda i, row: {"rewards": rewards if i == 2 else [0.5, 0.0]})
    with pytest.raises(ConfigurationError, match=r"Round 1, labels.jsonl, line 3: `rewards` is .* wants 2 finite"):
        make(ranker="external").train()


def test_rounds_that_cannot_build_on_each_other_are_told(make: Any, said: Any) -> None:
    make(data=answers(), num_generations=0, num_rounds=2)
    assert "2 rounds weigh by the rewards alone" in said.text
    said.clear()
    make("one", data=answers(), num_generations=0, num_rounds=1)
    make("known", data=answers(logp=[-9.0] * 12), num_generations=0, num_rounds=2, behavior_logps_column="logp")
    assert "weigh by the rewards alone" not in said.text


def test_rewards_without_responses_are_told(make: Any, said: Any) -> None:
    make(data=prompts_of(reward=[1.0] * 6, response=["w1"] * 6), reward_funcs=threes)
    assert "has a column `reward`, but no responses that have earned it" in said.text


def test_all_responses_of_a_sampled_prompt_are_weighted(make: Any) -> None:
    """Also where fewer rows are offline than there are responses: none is weighed against a part of its prompt's."""
    trainer = make(data=answers(4, 5), reward_funcs=threes, num_generations=1, offline_ratio=0.5, num_rounds=1)
    found, *_ = train(trainer)
    assert sum(row["offline"] for row in found) == 4
    assert trainer.round_summaries[0]["offline_responses"] == 20
    assert trainer.round_summaries[0]["group_size"] == 6
