"""
A small real task for on-policy methods: a Llama of about a million parameters, trained on human snippets, goes on
from the first words of a film review, and VADER says how kind its words are.

The snippets are those of Hutto and Gilbert (ICWSM 2014; MIT), which the source distribution of `vaderSentiment` holds.
A seed draws the split, the tokenizer's training text, the initial weights and the order of training.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FILM = "movieReviewSnippets_GroundTruth.txt"
FILES = (
    FILM,
    "amazonReviewSnippets_GroundTruth.txt",
    "nytEditorialSnippets_GroundTruth.txt",
    "tweets_GroundTruth.txt",
)

PROMPT_WORDS = 4
HELD_OUT_PROMPTS = 300
UNSEEN_TEXTS = 400
MAX_TOKENS = 64
VOCABULARY = 2000


@dataclass
class Task:
    """What one seed's runs begin with."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    prompts: list[str]
    held_out: list[str]
    unseen: list[str]


def fetch(cache: Path) -> Path:
    """The source distribution (the wheel has no ratings), from the index that pip is configured for, checked."""
    kept = cache / "vaderSentiment-3.3.2.tar.gz"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, PACKAGE, "-d", folder], check=True)
            os.replace(next(Path(folder).glob("*.tar.gz")), kept)
    if hashlib.sha256(kept.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{kept} is not the {PACKAGE} that was expected: remove it and run again")
    return kept


def snippets(sdist: Path) -> list[tuple[str, str]]:
    """(file, text) of every snippet, equal ones (lower case, letters and digits) once."""
    with tarfile.open(sdist) as outer:
        name = next(n for n in outer.getnames() if n.endswith("/additional_resources/hutto_ICWSM_2014.tar.gz"))
        packed: Any = outer.extractfile(name)
        contents = {}
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            for file in FILES:
                member: Any = inner.extractfile(f"hutto_ICWSM_2014/{file}")
                contents[file] = member.read().decode("utf-8")
    seen, found = {""}, []
    for file, content in contents.items():
        for line in content.split("\n"):
            if not line.strip():
                continue
            _, _, text = line.rstrip("\r").split("\t")
            text = " ".join(html.unescape(text).split())
            key = "".join(letter for letter in text.lower() if letter.isalnum())
            if key not in seen:
                seen.add(key)
                found.append((file, text))
    return found


def split(texts: Sequence[tuple[str, str]], seed: int, pretraining: int) -> dict[str, list[str]]:
    """
    Text for pretraining, unseen text (none of it in pretraining), and prompts: the first words of film snippets that
    are longer. Held-out prompts belong to snippets outside pretraining; training prompts to any other film snippets.
    """
    draw = random.Random(seed)
    order = list(range(len(texts)))
    draw.shuffle(order)
    seen, rest = order[:pretraining], order[pretraining:]
    unseen = [texts[i][1] for i in rest[:UNSEEN_TEXTS]]

    def beginnings(indices: Sequence[int], without: set[str]) -> list[str]:
        found: dict[str, None] = {}
        for index in indices:
            file, text = texts[index]
            words = text.split()
            if file == FILM and len(words) > PROMPT_WORDS:
                prompt = " ".join(words[:PROMPT_WORDS])
                if prompt not in without:
                    found[prompt] = None
        return list(found)

    held_out = beginnings(rest[UNSEEN_TEXTS:], set())[:HELD_OUT_PROMPTS]
    prompts = beginnings(order, set(held_out))
    draw.shuffle(prompts)
    return {"pretraining": [texts[i][1] for i in seen], "unseen": unseen, "held_out": held_out, "prompts": prompts}


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE. A text's first words are a prefix of its tokens: words begin with their space."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _batch(rows: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:MAX_TOKENS] for text in texts]


@torch.no_grad()
def loss_on(model: Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Nats a token, all tokens counted alike."""
    was_training = model.training
    model.eval()
    rows = sorted(_encode(tokenizer, texts), key=len)
    total = tokens = 0.0
    for start in range(0, len(rows), 100):
        batch = _batch(rows[start : start + 100], tokenizer.pad_token_id)
        number = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * number
        tokens += number
    model.train(was_training)
    return total / tokens


def pretrain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], seed: int, epochs: int) -> LlamaForCausalLM:
    """AdamW, 2e-3 with warm-up and cosine decay, batches of 32 snippets of similar length."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.train()
    draw = random.Random(seed)
    rows = sorted(_encode(tokenizer, texts), key=len)
    batches = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(epochs):
        draw.shuffle(batches)
        for batch in batches:
            model(**_batch(batch, tokenizer.pad_token_id)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def make(cache: Path, seed: int, pretraining: int, epochs: int) -> Path:
    """The folder with a seed's model and texts; made once."""
    folder = cache / f"task-{seed}-{pretraining}-{epochs}"
    if folder.exists():
        return folder
    parts = split(snippets(fetch(cache)), seed, pretraining)
    tokenizer = make_tokenizer(parts["pretraining"])
    model = pretrain(tokenizer, parts["pretraining"], seed, epochs)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        kept = {name: parts[name] for name in ("prompts", "held_out", "unseen")}
        (made / "texts.json").write_text(json.dumps(kept), encoding="utf-8")
        # Another process may have been faster.
        with contextlib.suppress(OSError):
            os.rename(made, folder)
    return folder


def load(folder: Path) -> Task:
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Task(model, tokenizer, texts["prompts"], texts["held_out"], texts["unseen"])


def as_prompts(texts: Sequence[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": list(texts)})
