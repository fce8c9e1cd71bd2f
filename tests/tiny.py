"""A model, a tokenizer and data small enough for a test, made here: nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback


WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>"] + [f"w{i}" for i in range(59)]
# No EOS after an answer: for arithmetic on the probability of a single token.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ('<user> ' if m['role'] == 'user' else '<bot> ') + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True, **config: Any
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=config.pop("hidden_size", 16),
            intermediate_size=32,
            num_hidden_layers=config.pop("num_hidden_layers", 1),
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            **config,
        )
    )
    # Larger than a fresh model's weights, so that steps and extrapolations move something that counts.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.to(dtype)


def save_model(folder: Path, **kwargs: Any) -> Path:
    make_model(**kwargs).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_pairs(rows: int = 24, seed: int = 0, conversational: bool = False) -> datasets.Dataset:
    """Preference pairs; every prompt is another one."""
    draw = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(draw.choice(WORDS[5:]) for _ in range(n))

    prompts = [f"{WORDS[5 + i % 59]} {WORDS[5 + (i // 59) % 59]} {text(2)}" for i in range(rows)]
    pairs = [(prompt, text(draw.randint(2, 6)), text(draw.randint(2, 6))) for prompt in prompts]
    if conversational:
        return datasets.Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": p}],
                    "chosen": [{"role": "assistant", "content": c}],
                    "rejected": [{"role": "assistant", "content": r}],
                }
                for p, c, r in pairs
            ]
        )
    return datasets.Dataset.from_list([{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in pairs])


def make_sft_rows(rows: int = 10, seed: int = 9) -> datasets.Dataset:
    """Prompts and completions of uneven lengths."""
    pairs = make_pairs(rows, seed=seed)
    return datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])


def arguments(output_dir: Path | str, **kwargs: Any) -> dict[str, Any]:
    """Training arguments that suit a test on a CPU."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 32,
        "dataloader_pin_memory": False,
        **kwargs,
    }


class Trackers(TrainerCallback):
    """What a run gives to its trackers, call by call."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have the same bits in every parameter."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
