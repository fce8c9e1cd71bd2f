"""What the quickstart measures, and how, on a CPU.

All held-out rows share one prompt: its keys and values are computed once and the completions run on top of them, which
is the same arithmetic as whole rows at a third of the cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from film_lines import FilmLines
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache


BATCH_SIZE = 32


@dataclass(frozen=True)
class Measured:
    """One model on the held-out pairs and the unseen texts. Log-probabilities are nats per response, fp32."""

    chosen: torch.Tensor  # (N,)
    rejected: torch.Tensor  # (N,)
    unseen: torch.Tensor  # (M,) log-probability of a whole text
    unseen_tokens: torch.Tensor  # (M,)

    def to_json(self) -> dict[str, list[float]]:
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, list[float]]) -> Measured:
        return cls(**{name: torch.tensor(numbers) for name, numbers in values.items()})


def completion_ids(tokenizer: PreTrainedTokenizerBase, row: dict, side: str) -> tuple[list[int], list[int]]:
    """Prompt and completion as DPOTrainer tokenises them: the completion is what the chat template adds."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
    if whole[: len(prompt)] != prompt:
        raise ValueError("the chat template does not begin a conversation with its prompt")
    return prompt, whole[len(prompt) :]


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
    data: FilmLines,
    advance: Callable[[int], None] = lambda done: None,
) -> Measured:
    """`advance` is told of every batch; there are `2 * len(data.held_out) + len(data.unseen)` texts in all."""
    training = model.training
    model.eval()
    sides = {}
    for side in ("chosen", "rejected"):
        tokenised = [completion_ids(tokenizer, row, side) for row in data.held_out]
        prompts = {tuple(prompt) for prompt, _ in tokenised}
        if len(prompts) != 1:
            raise ValueError(f"the held-out rows have {len(prompts)} prompts, expected one that all share")
        sides[side] = log_probs(model, tokenised[0][0], [completion for _, completion in tokenised], advance)
    # Texts as the model knew them in pre-training: after its document separator, without a chat around them.
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in data.unseen]
    unseen = log_probs(model, [separator], texts, advance)
    model.train(training)
    return Measured(sides["chosen"], sides["rejected"], unseen, torch.tensor([float(len(text)) for text in texts]))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    values = values.double()
    return values.mean().item(), values.std(unbiased=True).item() / math.sqrt(len(values))


def compare(now: Measured, start: Measured) -> dict[str, float]:
    """
    A row of the table.

    The implicit reward of a response is log pi(response) - log pi_start(response), and a pair's margin is that of the
    chosen response minus that of the rejected one. The start against itself has margins of exactly 0: ties, which
    count one half.
    """
    margin = (now.chosen - now.rejected) - (start.chosen - start.rejected)
    accuracy, accuracy_error = mean_and_error((margin > 0).double() + 0.5 * (margin == 0).double())
    margin_mean, margin_error = mean_and_error(margin)
    likelier, likelier_error = mean_and_error((now.chosen > now.rejected).double())
    change, change_error = mean_and_error(now.chosen - start.chosen)
    tokens = now.unseen_tokens.double()
    loss = -(now.unseen.double().sum() / tokens.sum()).item()
    # Per token over all tokens is a ratio of two means: its error by the usual linearisation, on the paired change.
    start_loss = -(start.unseen.double().sum() / tokens.sum()).item()
    residual = (start.unseen - now.unseen).double() - (loss - start_loss) * tokens
    loss_change_error = residual.std(unbiased=True).item() * math.sqrt(len(tokens)) / tokens.sum().item()
    return {
        "accuracy": accuracy,
        "accuracy_error": accuracy_error,
        "margin": margin_mean,
        "margin_error": margin_error,
        "chosen_likelier": likelier,
        "chosen_likelier_error": likelier_error,
        "chosen_change": change,
        "chosen_change_error": change_error,
        "rejected_change": mean_and_error(now.rejected - start.rejected)[0],
        "unseen_loss": loss,
        "unseen_loss_change": loss - start_loss,
        "unseen_loss_change_error": loss_change_error,
    }
