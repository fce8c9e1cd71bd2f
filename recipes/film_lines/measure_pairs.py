"""
Held-out pairs under a model and under what was trained from it: adapters, or whole models.

    python recipes/film_lines/measure_pairs.py data/film-lines MODEL runs/film-lines-apo-lora/_rounds/iterates/*

MODEL is the model that training began with, an id or a folder. A table with a row a folder: the share of pairs whose
margin, [log pi(chosen) - log pi_start(chosen)] - [log pi(rejected) - log pi_start(rejected)], is above 0, the mean
margin and the mean change of log pi(chosen), in nats, each with its standard error over the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


BATCH_SIZE = 16


def encode(tokenizer: Any, row: dict[str, Any], name: str) -> tuple[list[int], int]:
    """Prompt and response as tokens, and how many of them are the prompt."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False)
    return whole, len(prompt)


@torch.no_grad()
def log_probabilities(model: Any, encoded: list[tuple[list[int], int]]) -> list[float]:
    """Of each response, summed over its tokens, nats."""
    sums = []
    for start in range(0, len(encoded), BATCH_SIZE):
        batch = encoded[start : start + BATCH_SIZE]
        longest = max(len(tokens) for tokens, _ in batch)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch], device=model.device)
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t, _ in batch], device=model.device)
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        chosen = logps.gather(-1, ids[:, 1:, None])[..., 0]
        sums += [float(chosen[i, prompt - 1 : len(tokens) - 1].sum()) for i, (tokens, prompt) in enumerate(batch)]
    return sums


def pm(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with test.jsonl")
    parser.add_argument("model", help="the model that training began with")
    parser.add_argument("trained", type=Path, nargs="+", help="folders of adapters or of whole models")
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encoded = [encode(tokenizer, row, name) for name in ("chosen", "rejected") for row in rows]
    load = AutoModelForCausalLM.from_pretrained
    start = log_probabilities(load(options.model, dtype=torch.float32).eval(), encoded)
    print(f"{len(rows)} pairs\n\n| | held-out accuracy, % | margin | chosen log-prob. change |\n|---|---|---|---|")
    for folder in options.trained:
        if (folder / "adapter_config.json").is_file():
            model: Any = PeftModel.from_pretrained(load(options.model, dtype=torch.float32), folder)
        else:
            model = load(folder, dtype=torch.float32)
        change = [now - before for now, before in zip(log_probabilities(model.eval(), encoded), start, strict=True)]
        chosen, rejected = change[: len(rows)], change[len(rows) :]
        margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
        right = [float(margin > 0) for margin in margins]
        print(f"| {folder.name} | {pm(right, 100, 1)} | {pm(margins)} | {pm(chosen)} |", flush=True)


if __name__ == "__main__":
    main()
