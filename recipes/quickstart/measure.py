"""The loss on unseen human text: what the quickstart measures beside the trainer's own held-out sampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache


BATCH_SIZE = 32


@dataclass(frozen=True)
class Unseen:
    """One model on the unseen texts."""

    log_probs: torch.Tensor  # (M,) log-probability of a whole text, nats, fp32
    tokens: torch.Tensor  # (M,)

    def to_json(self) -> dict[str, list[float]]:
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, list[float]]) -> Unseen:
        return cls(**{name: torch.tensor(numbers) for name, numbers in values.items()})


def log_probs(
    model: PreTrainedModel,
    prefix: list[int],
    completions: Sequence[list[int]],
    advance: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """
    Log-probabilities of completions that share a prefix.

    Args:
        prefix: token ids, at least one.
        completions: token ids, at least one each.
        advance: told how many completions a batch has finished.

    Returns:
        (N,) fp32, nats: the sum over a completion's tokens.
    """
    device = model.device
    result = torch.empty(len(completions))
    # Alike lengths together: little padding. Padding is on the right, where causal attention does not look.
    order = sorted(range(len(completions)), key=lambda index: len(completions[index]))
    with torch.no_grad():
        start = model(torch.tensor([prefix], device=device), past_key_values=DynamicCache(), use_cache=True)
        for at in range(0, len(order), BATCH_SIZE):
            indices = order[at : at + BATCH_SIZE]
            rows = [completions[index] for index in indices]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (B, T)
            real = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows], device=device)
            cache = copy.deepcopy(start.past_key_values)
            cache.batch_repeat_interleave(len(rows))
            # The last prefix position predicts the first token, the completion's own positions the others.
            logits = [start.logits[:, -1:].expand(len(rows), -1, -1)]
            if longest > 1:
                logits.append(model(ids[:, :-1], past_key_values=cache, use_cache=True).logits)
            flat = torch.cat(logits, dim=1).float().flatten(0, 1)  # (B * T, V)
            nll = torch.nn.functional.cross_entropy(flat, ids.flatten(), reduction="none").view_as(real)
            result[indices] = -(nll * real).sum(1).cpu()
            advance(len(rows))
    return result


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    advance: Callable[[int], None] = lambda done: None,
) -> Unseen:
    """`advance` is told how many texts a batch has finished."""
    training = model.training
    model.eval()
    # Texts as the model knew them in pre-training: after its document separator, without a chat around them.
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = log_probs(model, [separator], rows, advance)
    model.train(training)
    return Unseen(found, torch.tensor([float(len(row)) for row in rows]))


def compare(now: Unseen, start: Unseen) -> dict[str, float]:
    """The loss on the unseen texts, nats per token over all tokens, and its change with a standard error."""
    tokens = now.tokens.double()
    loss = -(now.log_probs.double().sum() / tokens.sum()).item()
    start_loss = -(start.log_probs.double().sum() / tokens.sum()).item()
    # A ratio of two means: its error by the usual linearisation, on the paired change.
    residual = (start.log_probs - now.log_probs).double() - (loss - start_loss) * tokens
    error = residual.std(unbiased=True).item() * math.sqrt(len(tokens)) / tokens.sum().item()
    return {"loss": loss, "change": loss - start_loss, "change_error": error}
