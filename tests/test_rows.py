"""Rows as they are found: what is read as something else is refused with its number, what is only unusual works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from trl import DPOConfig, DPOTrainer

from tests import tiny
from tests.test_common import METHODS
from trl_extras import APOConfig, APOTrainer, SPOConfig, SPOTrainer, SPRConfig, SPRTrainer, named_data
from trl_extras.errors import ConfigurationError


SAMPLING = {"num_generations": 4, "max_completion_length": 4}
DPO = pytest.mark.parametrize(("cls", "config"), [(APOTrainer, APOConfig), (SPOTrainer, SPOConfig)])


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def bot(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def longest(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


def make(cls: Any, config: Any, folder: Path, data: Any, model: Any = "nowhere/at-all", **given: Any) -> Any:
    tokenizer = given.pop("tokenizer", None) or tiny.make_tokenizer()
    settings = {"num_rounds": 2} if config is not SPOConfig else {}
    args = config(**tiny.arguments(folder, **{**settings, **given.pop("settings", {})}))
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer, **given)


GOOD = [{"prompt": f"w{i} ", "chosen": f"w{i + 1}", "rejected": f"w{i + 2}"} for i in range(3)]
TALK = [{"prompt": user(f"w{i}"), "chosen": bot("w1"), "rejected": bot("w2")} for i in range(3)]


@DPO
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*GOOD, {"prompt": "w1", "chosen": None, "rejected": "w2"}], "row 3: `chosen` is None, but has to be text"),
        ([*GOOD, {"prompt": None, "chosen": "w1", "rejected": "w2"}], "row 3: `prompt` is None, but has to be text"),
        ([{"prompt": "w1", "chosen": 1, "rejected": 2}], "row 0: `chosen` is 1, but has to be text or a list"),
        ([{"prompt": user("w1"), "chosen": "w1", "rejected": "w2"}], "row 0: `chosen` is text.*make all of one kind"),
        (
            [{"prompt": "w1", "chosen": user("w1") + bot("w2"), "rejected": user("w1") + bot("w3")}],
            "row 0: .*leave `prompt` out, which the conversation begins with",
        ),
        (
            [*TALK, {"prompt": user("w1"), "chosen": user("w1") + bot("w2"), "rejected": user("w1") + bot("w3")}],
            "row 3: the turns of `prompt` are repeated in `chosen`",
        ),
        ([*TALK, {"prompt": [], "chosen": bot("w2"), "rejected": bot("w3")}], r"row 3: `prompt` is \[\]"),
    ],
)
def test_pairs_that_would_be_read_as_something_else(cls: Any, config: Any, rows: Any, said: str, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=f"`train_dataset`, {said}"):
        make(cls, config, tmp_path, datasets.Dataset.from_list(rows))
    with pytest.raises(ConfigurationError, match=f"`eval_dataset`, {said}"):
        make(cls, config, tmp_path, tiny.make_pairs(4), eval_dataset=datasets.Dataset.from_list(rows))


@pytest.mark.parametrize(("cls", "config"), [(APOTrainer, APOConfig), (SPRTrainer, SPRConfig)])
@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["w1", None], "row 1: the prompt is None"),
        ([1, 2], "row 0: the prompt is 1"),
        ([user("w1"), []], r"row 1: the prompt is \[\]"),
        ([user("w1"), user("w1") + bot("w2")], "row 1: the prompt ends with a message of the assistant"),
    ],
)
def test_prompts_that_cannot_be_sampled_for(cls: Any, config: Any, prompts: Any, said: str, tmp_path: Path):
    data = datasets.Dataset.from_dict({"prompt": prompts})
    with pytest.raises(ConfigurationError, match=f"`train_dataset`, {said}"):
        make(cls, config, tmp_path, data, reward_funcs=longest, settings=SAMPLING)


QUESTIONS = datasets.Dataset.from_list(
    [{"question": f"w{i}", "chosen": f"w9 w{i + 1}", "rejected": f"w9 w{i + 2}"} for i in range(6)]
)


@pytest.mark.parametrize(
    ("cls", "config"), [(APOTrainer, APOConfig), (SPOTrainer, SPOConfig), (SPRTrainer, SPRConfig)]
)
def test_a_prompt_that_is_the_same_for_all_rows_is_somewhere_else(cls: Any, config: Any, tmp_path: Path):
    given = {"reward_funcs": longest, "settings": SAMPLING} if cls is SPRTrainer else {}
    with pytest.raises(ConfigurationError, match=r"has no column `prompt`.*6 of 6 rows.*others are `question`"):
        make(cls, config, tmp_path, QUESTIONS, **given)
    if cls is SPRTrainer:
        with pytest.raises(ConfigurationError, match=r"`offline_dataset` has no column `prompt`"):
            make(cls, config, tmp_path, tiny.make_pairs(4), offline_dataset=QUESTIONS, **given)


def test_templates_are_looked_at_before_weights_load(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="has conversations, but the tokenizer has no chat template"):
        make(APOTrainer, APOConfig, tmp_path, datasets.Dataset.from_list(TALK), tokenizer=tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    system = [{"role": "system", "content": "w5"}, *user("w1")]
    rows = datasets.Dataset.from_list([*TALK, {"prompt": system, "chosen": bot("w1"), "rejected": bot("w2")}])
    with pytest.raises(ConfigurationError, match=r"row 3: .*refuses the conversation \(no system turn\)"):
        make(APOTrainer, APOConfig, tmp_path, rows, tokenizer=tokenizer)


def thinking() -> Any:
    """Drops what comes before the end of a thought, as R1's distilled models do."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("m['content']", "m['content'].split('<unk>')[-1]")
    return tokenizer


def test_responses_that_a_template_cuts_are_refused(tmp_path: Path):
    rows = datasets.Dataset.from_list(
        [
            {"prompt": user("w1"), "completion": bot("w3"), "reward": 1.0},
            {"prompt": user("w2"), "completion": bot("w4 <unk> w5"), "reward": 0.0},
        ]
    )
    settings = {"num_generations": 0, "num_rounds": 1}
    with pytest.raises(ConfigurationError, match=r"row 1: the chat template leaves out a part of the response \('w4"):
        make(SPRTrainer, SPRConfig, tmp_path, rows, tiny.make_model(), tokenizer=thinking(), settings=settings)
    make(SPRTrainer, SPRConfig, tmp_path, rows, tiny.make_model(), settings=settings)


def test_sft_rows_are_trained_on_in_one_format(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = tiny.make_sft_rows()
    whole = rows.add_column("text", [row["prompt"] + row["completion"] for row in rows])
    chats = datasets.Dataset.from_list(
        [{"prompt": "w1", "prompt_id": str(i), "messages": user("w1") + bot(f"w{i}")} for i in range(4)]
    )

    def labels(sft: Any) -> Any:
        trainer = make(SPOTrainer, SPOConfig, tmp_path, tiny.make_pairs(4), tiny.make_model(), sft_dataset=sft)
        return trainer._spo_rows.rows["labels"][:]

    assert labels(whole) == labels(rows)
    assert all(row[-1] == 1 for row in labels(whole))
    assert "`prompt`, `completion` is trained on, and not `text`" in caplog.text
    assert labels(chats) == labels(chats.select_columns(["messages"]))


def parts(rows: datasets.Dataset) -> datasets.Dataset:
    """The same conversations, with content as a list of one part."""
    return datasets.Dataset.from_list(
        [
            {
                name: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in value]
                for name, value in row.items()
            }
            for row in rows
        ]
    )


def weights_after(name: str, folder: Path, change: Any, conversational: bool = True, **settings: Any) -> Any:
    method = METHODS[name]
    pairs = tiny.make_pairs(12, conversational=conversational)
    data = pairs.select_columns(["prompt"]) if name == "SPR" else pairs
    arguments = {**method.arguments, **settings}
    arguments.pop("sft_batch_size", None)
    given = {"reward_funcs": longest} if name == "SPR" else {}
    args = method.config(**tiny.arguments(folder, **arguments))
    trainer = method.trainer(
        model=tiny.make_model(), args=args, train_dataset=change(data), processing_class=tiny.make_tokenizer(), **given
    )
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("name", ["APO", "SPO", "SPR"])
@pytest.mark.parametrize(
    "change", [parts, lambda rows: rows.with_format("torch"), lambda rows: rows.with_format("numpy", ["prompt"])]
)
def test_unusual_forms_of_the_same_rows_train_the_same(name: str, change: Any, tmp_path: Path):
    plain = weights_after(name, tmp_path / "plain", lambda rows: rows)
    other = weights_after(name, tmp_path / "other", change)
    assert tiny.same_weights(plain, other)


def test_columns_of_json_are_kept(tmp_path: Path):
    """Turns whose arguments are of several types."""
    calls = [{"city": "w5"}, {"days": 3, "units": ["w6"]}, {"nested": {"x": 1}}, {"none": None}]
    prompts = [[{"role": "user", "content": f"w{i}", "arguments": json.dumps(call)}] for i, call in enumerate(calls)]
    rows = datasets.Dataset.from_dict(
        {"prompt": prompts}, features=datasets.Features({"prompt": datasets.List(datasets.Json())})
    ) if hasattr(datasets, "Json") else datasets.Dataset.from_dict({"prompt": prompts})  # fmt: skip
    trainer = make(APOTrainer, APOConfig, tmp_path, rows, tiny.make_model(), reward_funcs=longest, settings=SAMPLING)
    trainer.train()
    assert len(trainer.round_summaries) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_is_a_dataset(suffix: str, tmp_path: Path):
    rows, file = tiny.make_sft_rows(4), tmp_path / f"rows.{suffix}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix, rows.to_json)(file)
    assert named_data.load(str(file), split="train")["prompt"] == rows["prompt"]
    args = SPOConfig(**tiny.arguments(tmp_path, sft_dataset_name=str(file)))
    trainer = SPOTrainer(
        tiny.make_model(), args=args, train_dataset=tiny.make_pairs(4), processing_class=tiny.make_tokenizer()
    )
    assert len(trainer._spo_rows) == 4


@DPO
def test_no_row_is_left(cls: Any, config: Any, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"All 4 rows of the train set are dropped.*`max_length` \(2\)"):
        make(
            cls,
            config,
            tmp_path,
            tiny.make_pairs(4),
            tiny.make_model(),
            settings={"max_length": 2, "num_train_epochs": 1} if cls is SPOTrainer else {"max_length": 2},
        )


@pytest.mark.parametrize(
    ("cls", "config"), [(APOTrainer, APOConfig), (SPOTrainer, SPOConfig), (SPRTrainer, SPRConfig)]
)
def test_a_padding_token_needs_an_embedding(cls: Any, config: Any, tmp_path: Path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<another>"})
    given = {"reward_funcs": longest, "settings": SAMPLING} if cls is SPRTrainer else {}
    data = tiny.make_pairs(4).select_columns(["prompt"]) if cls is SPRTrainer else tiny.make_pairs(4)
    trainer = make(cls, config, tmp_path, data, tiny.make_model(), tokenizer=tokenizer, **given)
    with pytest.raises(ConfigurationError, match="the id 64, but the model has 64 embeddings"):
        trainer.train()


@pytest.mark.parametrize(("cls", "config"), [(APOTrainer, APOConfig), (SPRTrainer, SPRConfig)])
def test_prompts_longer_than_the_models_positions(cls: Any, config: Any, tmp_path: Path):
    data = datasets.Dataset.from_dict({"prompt": ["w1", "w2", "w3 " * 61]})
    settings = {**SAMPLING, "max_length": None}
    trainer = make(cls, config, tmp_path, data, tiny.make_model(), reward_funcs=longest, settings=settings)
    with pytest.raises(ConfigurationError, match=r"61 tokens, which with `max_completion_length` .* 64 positions"):
        trainer.train()


def test_what_the_stock_trainer_reads_is_read_the_same(tmp_path: Path):
    """Implicit prompts, as text and as messages, with and without a system turn."""
    talks = [
        {
            "chosen": [{"role": "system", "content": "w3"}, *user(f"w{i}"), *bot("w1")],
            "rejected": [{"role": "system", "content": "w3"}, *user(f"w{i}"), *bot("w2")],
        }
        for i in range(6)
    ]
    texts = [{"chosen": f"w{i} w{i + 1} w5", "rejected": f"w{i} w{i + 1} w6"} for i in range(6)]
    for rows in (talks, texts):
        data = datasets.Dataset.from_list(rows)
        ours = make(APOTrainer, APOConfig, tmp_path, data, tiny.make_model())
        args = DPOConfig(**tiny.arguments(tmp_path))
        theirs = DPOTrainer(
            tiny.make_model(), tiny.make_model(), args=args, train_dataset=data, processing_class=tiny.make_tokenizer()
        )
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours._prepared_train_dataset[name][:] == theirs.train_dataset[name][:]
