"""Between text and tokens: what a prompt is sampled after, and what a completion reads as after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def appended_tokens(tokenizer: Any) -> list[int]:
    """
    The special tokens that a tokenizer puts after a text, such as EOS with `add_eos_token=True` or BERT's separator.
    A prompt goes on, so that it is sampled after without them; upstream drops them from the prompts of pairs, too.
    """
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[start + len(bare) :])
    return []


def without_appended(ids: Sequence[int], appended: Sequence[int]) -> list[int]:
    """A text prompt's tokens without those that [`appended_tokens`] found, where it ends with them."""
    end = len(ids) - len(appended)
    return list(ids[:end]) if appended and list(ids[end:]) == list(appended) else list(ids)


def completion_text(tokenizer: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """
    What a completion adds to the text of its prompt. Decoded alone, its leading space is lost with tokenizers that
    take it for the start of a text, such as Llama 2's.
    """
    prompt = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=True)
    if whole.startswith(prompt):
        return str(whole[len(prompt) :])
    return str(tokenizer.decode(list(completion_ids), skip_special_tokens=True))
