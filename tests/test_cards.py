"""Model cards of real runs: the method, its numbers and its settings, and nothing of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests import tiny
from trl_extras import APOSPOTrainer, SPRConfig, SPRTrainer
from trl_extras.cards import _hub_id


METRICS = ("chosen_change", "rejected_change", "displaced", "gap_chosen", "gap_sft", "penalty_share")
PAPERS = {"apo": "arxiv.org/abs/2410.06293", "spo": "arxiv.org/abs/2507.07723"}
SPR_PAPER = "openreview.net/forum?id=LglOy15bqe"


def sft_rows() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(6)])


def cells(card: str, metric: str) -> list[str]:
    """The values of a metric in the card's table, in training and evaluation."""
    (row,) = re.findall(rf"^\| `?{re.escape(metric)}\b[^|]*\|(.*)\|$", card, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def make_spr(base: Path, folder: Path, data: datasets.Dataset, **kwargs: Any) -> SPRTrainer:
    given = {key: kwargs.pop(key) for key in ("eval_dataset", "offline_dataset", "reward_funcs") if key in kwargs}
    return SPRTrainer(
        model=str(base),
        args=SPRConfig(**tiny.arguments(folder, num_rounds=2, hub_token="hf_secret", **kwargs)),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **given,
    )


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def table(card: str, *titles: str) -> list[dict[str, str]]:
    """The rows of the table that has these columns, by their titles."""
    lines = card.splitlines()
    for number, line in enumerate(lines):
        columns = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and set(titles) <= set(columns):
            rows = []
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    return rows
                rows.append(dict(zip(columns, (cell.strip() for cell in row.strip("|").split("|")), strict=True)))
    raise AssertionError(f"no table has {titles}")


def configuration(card: str) -> dict[str, Any]:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return dict(yaml.safe_load(block))


def assert_private(folder: Path, *names: str) -> None:
    """No card below a folder names one of these, or any absolute path."""
    cards = [path.read_text(encoding="utf-8") for path in folder.rglob("README.md")]
    assert cards
    for card in cards:
        for name in (*names, str(folder), "output_dir", "hf_secret", "None"):
            assert name not in card, name
        assert not re.search(r"(?<![\w/:.<])/(?!abs|huggingface)[\w.-]+/", card)


def test_spo(make_spo: Any, tmp_path: Path, base: Path) -> None:
    trainer = make_spo(
        sft_dataset=sft_rows(), eval_dataset=tiny.make_pairs(4, seed=3), eval_strategy="epoch", save_strategy="epoch",
        hub_token="hf_secret", sft_coef=0.5,
    )  # fmt: skip
    trainer.train()
    # Upstream has the card written with each checkpoint, into the run's folder.
    checkpoint = (tmp_path / "out/README.md").read_text()
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved/README.md").read_text()
    flat = " ".join(card.split())
    assert re.search(
        r"trained by Stable Preference Optimization \(\[.*?\]\(https://arxiv.org/abs/2507.07723\)\)", flat
    )
    assert (
        "a preference loss (`sigmoid`) plus 0.5 times the gap by which the likelihood of the chosen responses and 6 "
        "rows of an SFT dataset has fallen below a floor" in flat
    )
    assert "each example has its own (`hinge`: `example`)" in flat
    assert "taken at the weights (`bilevel_solver`: `penalty`)" in flat
    for word in ("accelerated", "round", "alpha", "iterate", "2410.06293", "None"):
        assert not re.search(rf"\b{word}", card), word
    # The numbers are those that were logged last.
    train = next(row for row in reversed(trainer.state.log_history) if "spo/displaced" in row)
    evaluation = next(row for row in reversed(trainer.state.log_history) if "eval_loss" in row)
    for name in METRICS:
        values = [train[f"spo/{name}"], evaluation[f"eval_spo/{name}"]]
        assert cells(card, f"spo/{name}") == [f"{value:.4g}" for value in values], name
    assert cells(card, "loss") == [f"{value:.4g}" for value in (train["loss"], evaluation["eval_loss"])]
    assert cells(card, "accuracy")[0] == f"{train['rewards/accuracies']:.4g}"
    shown = configuration(card)
    wanted = {"sft_coef": 0.5, "hinge": "example", "sft_optimum": "reference", "learning_rate": 0.01, "seed": 42}
    assert wanted.items() <= shown.items()
    assert all(cells(checkpoint, f"spo/{name}") == cells(card, f"spo/{name}") for name in METRICS)
    assert "- stable-preference-optimization\n" in card
    assert_private(tmp_path, str(base))


def test_spo_with_inner_steps_and_a_floor_for_the_batch(make_spo: Any, tmp_path: Path) -> None:
    trainer = make_spo(
        bilevel_solver="unrolled", inner_steps=2, inner_learning_rate=1e-3, hinge="batch", sft_optimum=1.5,
        sft_tolerance=0.25, loss_type=["simpo"], sft_dataset=sft_rows(), lower_level="sft_dataset", num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    flat = " ".join(card.split())
    assert "(`simpo`) plus 1 times the gap by which the likelihood of 6 rows of an SFT dataset has" in flat
    assert "The floor is a loss of 1.5 nats per token, with a tolerance of 0.25 nats per token; it holds" in flat
    assert "after 2 steps of supervised fine-tuning on what is to be kept, of size 0.001, which are taken back" in flat
    # No evaluation, and no chosen responses: no empty columns or rows.
    assert len(cells(card, "spo/gap_sft")) == 1
    assert "spo/gap_chosen" not in card


def test_spo_that_only_measures(make_spo: Any, tmp_path: Path) -> None:
    evaluations = {"near": tiny.make_pairs(4, seed=3), "far": tiny.make_pairs(4, seed=4)}
    trainer = make_spo(sft_coef=0, eval_dataset=evaluations, eval_strategy="epoch")
    trainer.create_model_card()
    before = (tmp_path / "out/README.md").read_text()
    assert "Nothing has been logged yet." in before
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    assert "is measured, but has the weight 0" in " ".join(card.split())
    assert "| training, step 6 | evaluation (near), step 6 | evaluation (far), step 6 |" in card
    assert len(cells(card, "spo/displaced")) == 3


def test_rounds_above_a_floor(make_spo: Any, tmp_path: Path, base: Path) -> None:
    trainer = make_spo(
        cls=APOSPOTrainer, num_rounds=2, sft_dataset=sft_rows(), eval_dataset=tiny.make_pairs(4, seed=3),
        eval_strategy="epoch", save_strategy="epoch", hub_token="hf_secret",
    )  # fmt: skip
    trainer.train()
    assert "| 2 | 0.3 | 0.1 |" in (tmp_path / "out/README.md").read_text(), "the card of a checkpoint lacks its round"
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    flat = " ".join(card.split())
    assert "by *accelerated* preference optimization" in flat
    assert "over the objective of Stable Preference Optimization" in flat
    assert "what the round's reference gives the chosen responses and what the initial model gave the SFT rows" in flat
    assert "In 2 rounds of 1 epoch each" in flat
    assert all(paper in card for paper in PAPERS.values())
    assert "he2024accelerated" in card
    assert "arXiv:2507.07723" in card
    assert card.index("## Rounds") < card.index("## What was kept") < card.index("## Configuration")
    assert "| 2 | 0.3 | 0.1 |" in card
    assert all(len(cells(card, f"spo/{name}")) == 2 for name in METRICS)
    assert "The reference is the last round's." in card
    assert {"num_rounds": 2, "sft_coef": 1.0, "extrapolation_alpha": [0.3]}.items() <= configuration(card).items()
    assert_private(tmp_path, str(base))


def test_sft_dataset_in_a_folder_is_not_named(make_spo: Any, tmp_path: Path) -> None:
    (tmp_path / "private_place").mkdir()
    sft_rows().to_json(tmp_path / "private_place/train.jsonl")
    trainer = make_spo(sft_dataset_name=str(tmp_path / "private_place"), sft_coef=0.25, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    assert "6 rows of an SFT dataset" in " ".join(card.split())
    assert "sft_dataset_name" not in configuration(card)
    assert_private(tmp_path / "out", "private_place")


def test_names_on_the_hub_are_linked(make_spo: Any, tmp_path: Path, base: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: sft_rows())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config._name_or_path = "someone/some-model"
    # Without a reference model, which upstream would load by that name.
    trainer = make_spo(
        model=model, sft_dataset_name="someone/kept", sft_dataset_split="train[:6]", precompute_ref_log_probs=True
    )
    trainer.create_model_card(model_name="mine", dataset_name="someone/pairs", tags="extra")
    card = (tmp_path / "out/README.md").read_text()
    assert "6 rows of [someone/kept](https://huggingface.co/datasets/someone/kept)" in " ".join(card.split())
    assert "[someone/pairs](https://huggingface.co/datasets/someone/pairs)" in card
    assert "base_model: someone/some-model" in card
    kept = {"sft_dataset_name": "someone/kept", "sft_dataset_split": "train[:6]"}
    assert kept.items() <= configuration(card).items()


def test_rows_that_were_passed_are_not_called_by_the_configs_name(make_spo: Any, tmp_path: Path) -> None:
    make_spo(sft_dataset=sft_rows(), sft_dataset_name="someone/kept").create_model_card()
    assert "someone/kept" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", ["../data/kept", "/data/kept", "C:\\data\\kept", "~/kept", "a/b/c", "", None])
def test_what_cannot_be_on_the_hub_is_not_linked(name: str | None) -> None:
    assert _hub_id(name) is None


def test_a_folder_is_not_taken_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _hub_id("data/kept") == "data/kept"
    (tmp_path / "data/kept").mkdir(parents=True)
    assert _hub_id("data/kept") is None


def test_spr_on_samples_and_responses_of_a_dataset(tmp_path: Path, base: Path) -> None:
    trainer = make_spr(
        base, tmp_path / "out", tiny.make_sft_rows(8), eval_dataset=tiny.make_sft_rows(4, seed=3),
        reward_funcs=letters, num_generations=3, max_completion_length=4, temperature=0.7, reward_temperature=2,
        eval_strategy="epoch", save_strategy="epoch", offline_ratio=[0.2, 0.5],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved/README.md").read_text()
    flat = " ".join(card.split())
    assert "trained by successive policy re-weighting" in flat
    assert f"https://{SPR_PAPER}" in card
    assert "Submission 12963 to ICLR 2025" in card
    assert (
        "In 2 rounds of 1 epoch each, the policy is fine-tuned on 3 responses a prompt, sampled from the policy that "
        "the round starts from and judged by `letters` and on 8 responses of a dataset (20% to 50% of a round's rows)"
        in flat
    )
    assert "A response weighs exp(reward / 2), relative to the others of its prompt" in flat
    assert "importance ratio, whose logarithm is bounded to 5 nats around the prompt's median; the loss" in flat
    assert "abstract was at hand alone" in flat
    assert "- successive-policy-re-weighting\n" in card
    for word in ("accelerated", "alpha", "momentum", "margin", "2410.06293", "preference"):
        assert not re.search(rf"\b{word}", card), word
    # The numbers are those of the rounds.
    weights = table(card, "effective sample size")
    for row, summary in zip(weights, trainer.round_summaries, strict=True):
        assert row["round"] == str(summary["round"] + 1)
        for title, key in (
            ("effective sample size", "effective_sample_size"), ("largest weight", "weight_max"),
            ("sampled rows", "online_rows"), ("offline rows", "offline_rows"), ("repeated rows", "repeated_rows"),
            ("offline share of the weight", "offline_weight_share"),
            ("prompts with several responses", "groups"), ("reward of offline responses", "offline_reward_mean"),
        ):  # fmt: skip
            value = summary[key]
            assert row[title] == (f"{value:.4g}" if isinstance(value, float) else str(value)), title
    assert [row["offline rows"] for row in weights] == ["3", "8"]
    assert [row["reward of samples"] for row in table(card, "reward of samples", "importance, s")] == [
        f"{row['reward_mean']:.4g}" for row in trainer.round_summaries
    ]
    assert [row["after round"] for row in table(card, "held-out reward")] == ["start", "1", "2"]
    assert all(row["eval loss"] for row in table(card, "update norm", "eval loss"))
    shown = configuration(card)
    wanted = {"reward_temperature": 2.0, "temperature": 0.7, "num_generations": 3, "offline_ratio": [0.2, 0.5]}
    assert {**wanted, "importance_clip": "5.0", "num_rounds": 2, "learning_rate": 0.01}.items() <= shown.items()
    assert_private(tmp_path, str(base))


def test_spr_on_a_dataset_alone(tmp_path: Path, base: Path) -> None:
    rows = tiny.make_sft_rows(8).add_column("reward", [float(i) for i in range(8)])
    trainer = make_spr(
        base, tmp_path / "out", rows, num_generations=0, importance_clip="none", reward_temperature=4,
        round_data="reuse", round_epochs=[1, 2],
    )  # fmt: skip
    trainer.create_model_card()
    assert "No round is finished yet." in (tmp_path / "out/README.md").read_text()
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    flat = " ".join(card.split())
    assert (
        "In 2 rounds of 1 to 2 epochs each, the policy is fine-tuned on 8 responses of a dataset (100% of a round's "
        "rows). A response weighs exp(reward / 4)" in flat
    )
    assert "relative to the others of its prompt; the loss" in flat
    assert "sampled from" not in flat
    assert "judged by" not in flat
    rows_of_weights = table(card, "prompts with one", "largest weight")
    assert [row["prompts with one"] for row in rows_of_weights] == ["8", "8"]
    assert [row["offline rows"] for row in rows_of_weights] == ["8", "8"]
    effective = trainer.round_summaries[0]["singletons_effective"]
    assert 1 < effective < 8
    assert f"{effective:.4g}" in rows_of_weights[0].values()
    # Nothing was sampled, so that there is no table of it.
    assert "reward of samples" not in card
    assert "held-out" not in card
    assert {"num_generations": 0, "importance_clip": "none"}.items() <= configuration(card).items()
    assert_private(tmp_path, str(base))


def test_offline_responses_in_a_folder_are_not_named(tmp_path: Path, base: Path) -> None:
    (tmp_path / "private_place").mkdir()
    tiny.make_sft_rows(6).to_json(tmp_path / "private_place/train.jsonl")
    prompts = tiny.make_pairs(6, seed=1).select_columns(["prompt"])
    trainer = make_spr(
        base, tmp_path / "out", prompts, offline_dataset_name=str(tmp_path / "private_place"),
        offline_dataset_split="train", reward_funcs=letters, num_generations=2, max_completion_length=4,
    )  # fmt: skip
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    assert "6 responses of a dataset" in " ".join(card.split())
    assert "offline_dataset_name" not in configuration(card)
    assert_private(tmp_path / "out", "private_place")


@pytest.mark.parametrize(
    ("settings", "library", "saved"),
    [
        ({}, "peft", "one adapter of rank 4 for the original model"),
        ({"adapter_rank": 3, "adapter_rank_tolerance": 0.9}, "peft", "of the change) for the original model"),
        ({"adapter_output": "merged"}, "transformers", "That sum, of rank 4, is merged into the weights"),
    ],
)
def test_of_adapters(make_apo: Any, tmp_path: Path, settings: dict[str, Any], library: str, saved: str) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = make_apo(num_rounds=2, peft_config=adapter, learning_rate=1e-2, **settings)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == library
    text = " ".join(card.split())
    assert "Each round trained a fresh adapter of it (LORA, rank 2)" in text
    assert saved in text
    assert str(tmp_path) not in card
