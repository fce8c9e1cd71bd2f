"""What prompts are sampled after and what judges read, with tokenizers and templates as they are found."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import decoders, pre_tokenizers, processors
from transformers.utils import chat_template_utils

from tests import tiny
from trl_extras import APOConfig, APOTrainer, SPOConfig, SPOTrainer, SPRConfig, SPRTrainer


PROMPTS = datasets.Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(4)]})
SAMPLING = {"num_generations": 4, "max_completion_length": 4}


def shortest(completions: list[Any], **kwargs: Any) -> list[float]:
    return [-float(len(str(completion))) for completion in completions]


def run(cls: Any, config: Any, folder: Path, data: Any, tokenizer: Any, resume: Any = None, **given: Any) -> Any:
    settings, extra = given.pop("settings", {}), {} if cls is SPOTrainer else {"num_rounds": 2}
    trainer = cls(
        model=tiny.make_model(),
        args=config(**tiny.arguments(folder, **extra, **settings)),
        train_dataset=data,
        processing_class=tokenizer,
        **given,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("cls", "config"), [(APOTrainer, APOConfig), (SPRTrainer, SPRConfig)])
@pytest.mark.parametrize("form", ["<eos> $A <eos>", "<eos> $A <bot>", "$A"])
def test_prompts_lose_what_the_tokenizer_appends(tmp_path: Path, cls: Any, config: Any, form: str):
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<eos>", 1), ("<bot>", 4)]
    )
    seen: list[list[int]] = []

    def reward(completions: list[str], prompts: list[str], completion_ids: Any, **kwargs: Any) -> list[float]:
        seen.extend(completion_ids)
        return shortest(completions)

    trainer = run(cls, config, tmp_path, PROMPTS, tokenizer, reward_funcs=reward, settings=SAMPLING)
    begin = [1] if form.startswith("<eos>") else []
    expected = [[*begin, *tokenizer.convert_tokens_to_ids(text.split())] for text in PROMPTS["prompt"]]
    assert trainer._prepared_train_dataset["prompt_ids"] == expected
    assert seen


def sentencepiece_like() -> Any:
    """A tokenizer that writes spaces into tokens, and takes the first one of a text for its start."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({w if w.startswith("<") else f"▁{w}": i for i, w in enumerate(tiny.WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.mark.parametrize(("cls", "config"), [(APOTrainer, APOConfig), (SPRTrainer, SPRConfig)])
def test_judges_read_completions_as_they_follow_their_prompts(tmp_path: Path, cls: Any, config: Any):
    tokenizer = sentencepiece_like()
    assert tokenizer.decode([5, 6]) == "w0 w1"
    read: list[tuple[str, str]] = []

    def reward(completions: list[str], prompts: list[str], **kwargs: Any) -> list[float]:
        read.extend(zip(prompts, completions, strict=True))
        return shortest(completions)

    run(cls, config, tmp_path, PROMPTS, tokenizer, reward_funcs=reward, settings=SAMPLING)
    words = [text for _, text in read if text.strip().startswith("w")]
    assert words
    assert all(text.startswith(" w") for text in words)


def on_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 12, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def dated_tokenizer() -> Any:
    tokenizer = tiny.make_tokenizer()
    # As in the templates of Llama 3.2, Granite and Mistral Small.
    tokenizer.chat_template = "{{ '<unk> w' + strftime_now('%d')[1:] + ' ' }}" + tiny.CHAT_TEMPLATE
    return tokenizer


def conversations(pairs: datasets.Dataset, kind: str) -> Any:
    if kind == "pairs":
        return pairs
    prompts = pairs.select_columns(["prompt"])
    return prompts if kind == "prompts" else prompts.add_column("completion", pairs["chosen"])


@pytest.mark.parametrize(
    ("cls", "config", "kind", "given", "settings"),
    [
        (APOTrainer, APOConfig, "prompts", {"reward_funcs": shortest}, SAMPLING),
        (APOTrainer, APOConfig, "pairs", {}, {"round_data": "split"}),
        (SPRTrainer, SPRConfig, "responses", {"reward_funcs": shortest}, SAMPLING | {"offline_ratio": 0.5}),
        (SPOTrainer, SPOConfig, "pairs", {"sft_dataset": "responses"}, {"num_train_epochs": 2}),
    ],
)
def test_a_run_that_goes_on_another_day_trains_on_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any, config: Any, kind: str, given: Any, settings: Any
):
    pairs = tiny.make_pairs(8, conversational=True)
    given = {name: conversations(pairs, value) if isinstance(value, str) else value for name, value in given.items()}
    settings = {"save_strategy": "steps", "save_steps": 1, **settings}
    data, tokenizer = conversations(pairs, kind), dated_tokenizer()

    on_day(monkeypatch, 1)
    whole = run(cls, config, tmp_path, data, tokenizer, settings=settings, **given)
    half = str(tmp_path / f"checkpoint-{whole.state.global_step // 2 + 1}")
    on_day(monkeypatch, 2)
    again = run(cls, config, tmp_path, data, tokenizer, half, settings=settings, **given)
    assert tiny.same_weights(again.model, whole.model)
    if cls is not SPOTrainer:
        # Other rows are still other rows.
        data = conversations(tiny.make_pairs(8, seed=5, conversational=True), kind)
        with pytest.raises(ValueError, match=r"train_dataset|rows|responses"):
            run(cls, config, tmp_path, data, tokenizer, half, settings=settings, **given)


def test_nothing_is_kept_of_a_template_without_the_date(tmp_path: Path):
    run(APOTrainer, APOConfig, tmp_path, tiny.make_pairs(4, conversational=True), tiny.make_tokenizer())
    assert not (tmp_path / "_tokens").exists()
