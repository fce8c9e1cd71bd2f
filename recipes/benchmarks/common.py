"""What the benchmarks share: a model of SmolLM2-135M's shape, pairs to train it on, and a table."""

from __future__ import annotations

import platform
import random
import statistics
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# The shape of HuggingFaceTB/SmolLM2-135M-Instruct. The weights are random: neither speed nor memory depends on them.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def make_model(seed: int = 0, layers: int = 30) -> LlamaForCausalLM:
    """134.5 million parameters in float32, or fewer with fewer layers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `w2` to `w999`."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def make_pairs(rows: int, tokens: int, seed: int = 0) -> datasets.Dataset:
    """Pairs of exactly `tokens` tokens each, prompt included, so that all batches cost the same."""
    draw = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(f"w{draw.randrange(2, 1000)}" for _ in range(n))

    prompt = tokens // 3
    return datasets.Dataset.from_list(
        [
            {"prompt": text(prompt) + " ", "chosen": text(tokens - prompt - 1), "rejected": text(tokens - prompt - 1)}
            for _ in range(rows)
        ]
    )


def arguments(output_dir: Path | str, batch_size: int, **kwargs: Any) -> dict[str, Any]:
    """Training arguments on whatever device there is; float32 on a CPU."""
    cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(output_dir),
        "use_cpu": cpu,
        "bf16": not cpu,
        "report_to": "none",
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **kwargs,
    }


def spread(values: list[float]) -> str:
    """Median and the middle half."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def machine() -> str:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
