"""The recipe that trains a reward model: its splits, its metrics, and a run on made rows. No downloads."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from trl_extras.rollouts.judges import Rewards


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
for folder in ("quickstart", "spr"):
    sys.path.insert(0, str(RECIPES / folder))
film_lines = importlib.import_module("film_lines")
recipe = importlib.import_module("train_reward_model")

# Letters only: a line whose first words are others gives no opening.
WORDS = [first + second for first in "abcdefghij" for second in "klmnopqrst"]


def make_snippets(number: int = 500) -> list[Any]:
    """Film lines, every second one good, with words that say so after the opening."""
    draw = random.Random(0)
    snippets = []
    for row in range(number):
        words = draw.choices(WORDS, k=draw.randint(9, 14))
        words[5:8] = ["splendid" if row % 2 else "dreadful"] * 3
        snippets.append(film_lines.Snippet("film", draw.uniform(1, 3) * (1 if row % 2 else -1), " ".join(words)))
    return snippets


def texts(snippets: list[Any]) -> list[str]:
    return [film_lines.normalise(snippet.text) for snippet in snippets]


# ---- Splits ----


def test_no_line_is_in_two_splits_or_twice_in_one() -> None:
    snippets = make_snippets(200)
    shouted = [film_lines.Snippet("film", row.rating, row.text.upper() + " !") for row in snippets[:50]]
    others = [film_lines.Snippet("tweet", 1.0, f"not a film {number}") for number in range(20)]
    splits = recipe.split([*snippets, *shouted, *others], [])
    together = texts([*splits.train, *splits.validation, *splits.test])
    assert sorted(together) == sorted(texts(snippets))
    assert (len(splits.test), len(splits.validation)) == (20, 10)


def test_lines_that_begin_like_a_held_out_prompt_are_left_out() -> None:
    snippets = make_snippets()
    prompts = recipe.held_out_openings(snippets)
    assert len(prompts) == 200
    splits = recipe.split(snippets, prompts)
    begun = tuple(film_lines.normalise(prompt) for prompt in prompts)
    together = texts([*splits.train, *splits.validation, *splits.test])
    assert len(together) == 300
    assert not any(text.startswith(begun) for text in together)


def test_the_seed_draws_training_rows_but_not_what_is_measured() -> None:
    snippets = make_snippets(200)
    first, again, other = (recipe.split(snippets, [], rows=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.train != other.train
    assert (first.validation, first.test) == (other.validation, other.test)
    assert len(first.train) == 50


@pytest.mark.parametrize("rows", [0, 171])
def test_more_rows_than_there_are_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="1 to 170 are possible"):
        recipe.split(make_snippets(200), [], rows=rows)


# ---- Metrics ----


def test_ranks_of_ties_are_shared() -> None:
    assert recipe.ranks([3.0, 1.0, 3.0, -2.0]).tolist() == [3.5, 2.0, 3.5, 1.0]


def test_correlations() -> None:
    labels = [0.1, 0.2, 0.3, 0.4, 0.5]
    curved = np.exp(10 * np.asarray(labels))
    found = recipe.correlations(curved, labels)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(curved, labels)[0, 1])
    assert found["pearson"] < 0.9
    assert recipe.correlations([-label for label in labels], labels)["pearson"] == pytest.approx(-1.0)
    assert recipe.correlations([7.0] * 5, labels) == {"pearson": 0.0, "spearman": 0.0}


def test_squared_error_of_scores_and_of_a_constant() -> None:
    assert recipe.squared_error([1.0, 0.0], [0.0, 0.5]) == pytest.approx(0.625)
    assert recipe.squared_error(0.0, [1.0, -1.0]) == pytest.approx(1.0)


# ---- A run ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    vocabulary = ["[PAD]", "[UNK]", "splendid", "dreadful", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipe.parts, "ratings", lambda cache, say: tmp_path)
    monkeypatch.setattr(recipe.film_lines, "read_sdist", lambda path: make_snippets())


def run(out: Path, base: Path, *flags: str) -> int:
    return int(recipe.main(["--out", str(out), "--base", str(base), "--rows", "96", "--batch_size", "8", *flags]))


def scores(rewards: Rewards, prompts: list[Any], completions: list[Any]) -> list[float]:
    with rewards.loaded(torch.device("cpu")):
        judgement = rewards.judge("Round 1", prompts, completions, [[1]] * len(prompts), {}, None)
    return [float(value) for value in judgement.values[rewards.names[0]]]


def test_a_run_leaves_a_folder_that_rewards_can_name(
    base: Path, no_downloads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models" / "reward"
    assert run(out, base, "--learning_rate", "1e-2", "--epochs", "2") == 0
    assert "reward_funcs:" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["reward"]

    model = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert (out / "model.safetensors").is_file()

    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["rows"] == {"train": 96, "validation": 15, "test": 30}
    assert metrics["base"] == "tiny-bert"
    assert str(tmp_path) not in json.dumps(metrics)
    assert {"pearson", "spearman", "mse"} == metrics["test"].keys()
    # 24 steps are enough for two words that settle the label.
    assert metrics["test"]["pearson"] > 0.6
    assert metrics["test"]["mse"] < metrics["constant"]["mse"]

    rewards = Rewards([str(out)], None, None, False)
    assert rewards.names == ["reward"]
    plain = scores(rewards, ["ak bl ", "ak bl "], ["splendid splendid", "dreadful dreadful"])
    assert plain[0] > plain[1]
    chat = scores(
        rewards,
        [[{"role": "user", "content": "ak bl"}]] * 2,
        [[{"role": "assistant", "content": text}] for text in ("splendid splendid", "dreadful dreadful")],
    )
    assert chat == pytest.approx(plain, abs=1e-6)


def test_a_folder_with_something_in_it_is_refused(
    base: Path, no_downloads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reward").mkdir()
    kept = tmp_path / "reward" / "kept.txt"
    kept.write_text("mine")
    assert run(tmp_path / "reward", base) == 2
    said = capsys.readouterr().err.strip()
    assert "not empty" in said
    assert "\n" not in said
    assert kept.read_text() == "mine"


def test_a_run_that_fails_leaves_nothing(
    base: Path, no_downloads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(recipe, "fit", fail)
    assert run(tmp_path / "models" / "reward", base) == 2
    assert "no space left" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []
