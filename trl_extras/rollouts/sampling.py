"""
Sampling from the policy with transformers, batch by batch: which prompts make a batch, and what a batch is seeded
with, do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Likeliest tokens to look for a nucleus among, before the whole vocabulary is sorted.
_NUCLEUS_TOKENS = 256


@dataclass(frozen=True)
class SamplingSettings:
    """The distribution that is sampled from, completely: nothing is taken from the checkpoint's own settings."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    repetition_penalty: float
    max_completion_length: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}

    def processors(self, mask: Tensor | None = None) -> LogitsProcessorList:
        """In the order in which transformers applies them; `mask` is that of the prompts, (sequences, tokens)."""
        found: list[LogitsProcessor] = []
        if self.repetition_penalty != 1:
            found.append(_PenaltyOnText(self.repetition_penalty, mask))
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(NucleusFilter(self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(found)


class _PenaltyOnText(LogitsProcessor):
    """
    The repetition penalty without that on padding: where the padding token is EOS too, it would make a completion's
    end depend on how long its neighbours' prompts are.
    """

    def __init__(self, penalty: float, mask: Tensor | None):
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty)
        self._mask = mask

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._mask is not None:
            # Padding is on the left, so the last prompt token is one of text; that it occurs twice changes nothing.
            length = self._mask.shape[1]
            prompt = torch.where(self._mask.bool(), input_ids[:, :length], input_ids[:, length - 1 : length])
            input_ids = torch.cat([prompt, input_ids[:, length:]], dim=1)
        return self._penalty(input_ids, scores)


class NucleusFilter(LogitsProcessor):
    """
    Keeps the smallest set of likeliest tokens whose probability is at least `top_p`, as transformers' TopPLogitsWarper
    does, which sorts the whole vocabulary at every step: a quarter of the time of sampling from a small model. The set
    is nearly always among a few hundred tokens, and then only those are sorted.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        probabilities = scores.softmax(dim=-1)
        filtered = torch.full_like(scores, -torch.inf)
        likeliest, tokens = probabilities.topk(min(_NUCLEUS_TOKENS, scores.shape[-1]), dim=-1)
        wide = likeliest.sum(dim=-1) < self.top_p
        self._keep(filtered, scores, likeliest, tokens)
        if tokens.shape[-1] < scores.shape[-1] and bool(wide.any()):
            # Flat distributions: all tokens of those rows.
            rows = filtered[wide]
            self._keep(rows, scores[wide], *probabilities[wide].sort(dim=-1, descending=True))
            filtered[wide] = rows
        return filtered

    def _keep(self, filtered: Tensor, scores: Tensor, likeliest: Tensor, tokens: Tensor) -> None:
        # A token stays if those before it have not yet reached top_p; the likeliest always does.
        stays = likeliest.cumsum(dim=-1) - likeliest < self.top_p
        stays[:, 0] = True
        filtered.scatter_(-1, tokens, scores.gather(-1, tokens).masked_fill(~stays, -torch.inf))


def stop_tokens(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """
    Where a completion ends: the tokenizer's EOS and whatever the model's generation config calls one. A chat model may
    end its turns with another token than its tokenizer's EOS; that is a property of the model, not a setting.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, (list, tuple)) else [named])}
    return tuple(sorted(int(token) for token in found if token is not None))


@dataclass(frozen=True)
class Batch:
    """Prompts that are sampled together: their positions among the round's prompts, and the batch's seed."""

    index: int
    positions: tuple[int, ...]
    seed: int


def plan_batches(
    lengths: Sequence[int], positions: Sequence[int], batch_prompts: int, first: int, seed: int, purpose: str
) -> list[Batch]:
    """
    Batches of prompts of similar length.

    Args:
        lengths: tokens of every prompt, by position.
        positions: the prompts to sample for.
        batch_prompts: prompts a batch.
        first: index of the first batch.
        seed: the run's seed.
        purpose: what the batches are for, such as the round; it sets their seeds apart.
    """
    order = sorted(positions, key=lambda position: (lengths[position], position))
    chunks = [order[start : start + batch_prompts] for start in range(0, len(order), batch_prompts)]
    return [Batch(first + i, tuple(chunk), batch_seed(seed, purpose, first + i)) for i, chunk in enumerate(chunks)]


def batch_seed(seed: int, purpose: str, index: int) -> int:
    """A seed for one batch, from the run's seed, the batch's purpose and its index."""
    return xxhash.xxh3_64_intdigest(f"{seed} {purpose} {index}".encode()) % 2**31


@dataclass
class Completion:
    """One sampled response: its tokens, stop token included, and the log-probability of sampling them, in nats."""

    ids: list[int]
    logp: float
    cut: bool


class _Recorder(LogitsProcessor):
    """
    Last in the list: keeps each sampled token's log-probability under the distribution as it was sampled from, without
    keeping the distributions.
    """

    def __init__(self) -> None:
        self.logps: list[Tensor] = []
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._record(input_ids[:, -1])
        self._scores = scores
        return scores

    def _record(self, tokens: Tensor) -> None:
        if self._scores is not None:
            chosen = self._scores.gather(1, tokens[:, None]).squeeze(1)
            self.logps.append(chosen - self._scores.logsumexp(dim=1))

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probabilities of all sampled tokens, (sequences, steps); anything after a sequence's end is not one."""
        if self._scores is not None:
            self._record(sequences[:, -1])
        return torch.stack(self.logps, dim=1)


class TransformersSampler:
    """
    Samples with `model.generate`.

    Args:
        model: the policy, unwrapped, in eval mode.
        settings: what to sample from.
        autocast: makes the context that training runs its forward passes in.
    """

    def __init__(self, model: Any, settings: SamplingSettings, autocast: Any = nullcontext):
        self.model = model
        self.settings = settings
        self._autocast = autocast
        self._ignores_mask: bool | None = None

    def batches(self, mine: Sequence[Batch], num: int) -> Iterator[Batch]:
        """The batches to sample, in their order; a sampler whose processes work in step does more here."""
        yield from mine

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], num: int, seed: int) -> list[list[Completion]]:
        """
        `num` completions of each prompt. The same arguments give the same completions, on the same machine.

        Args:
            prompts: token ids.
            num: completions a prompt.
            seed: of the batch; the random numbers of the caller are left alone.
        """
        lengths = {len(ids) for ids in prompts}
        if self._reads_padding(prompts[0]) and len(lengths) > 1:
            # Each length by itself, with a seed of its own.
            found: dict[int, list[Completion]] = {}
            for length in sorted(lengths):
                places = [place for place, ids in enumerate(prompts) if len(ids) == length]
                groups = self([prompts[place] for place in places], num, batch_seed(seed, "length", length))
                found |= dict(zip(places, groups, strict=True))
            return [found[place] for place in range(len(prompts))]
        device = self.model.device
        longest = max(lengths)
        pad = self.settings.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        repeated, recorder = mask.repeat_interleave(num, dim=0), _Recorder()
        config = GenerationConfig(
            do_sample=True,
            # The processors below do the rest; these are the values that transformers takes for "off".
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=self.settings.max_completion_length,
            num_return_sequences=num,
            eos_token_id=list(self.settings.stop_token_ids),
            pad_token_id=pad,
            # Where padding is read, the cached state of several sequences is mixed up as well (RWKV in transformers).
            use_cache=not self._ignores_mask,
        )
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), self._own_settings(config), self._autocast():
            torch.manual_seed(seed)
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([*self.settings.processors(repeated), recorder]),
                # Each process has batches of its own, and the whole model meanwhile: it waits for nobody.
                synced_gpus=False,
            )
        sampled = sequences[:, longest:]
        return _split(sampled, recorder.finish(sequences)[:, : sampled.shape[1]], self.settings.stop_token_ids, num)

    def _reads_padding(self, prompt: Sequence[int]) -> bool:
        """Whether the model ignores the mask, as RWKV does: what is below it then changes what comes next."""
        if self._ignores_mask is None:
            pad, device = self.settings.pad_token_id, self.model.device
            fills = (pad, next((token for token in prompt if token != pad), 0 if pad else 1))
            input_ids = torch.tensor([[fill] * 4 + list(prompt[:8]) for fill in fills], device=device)
            mask = torch.ones_like(input_ids)
            mask[:, :4] = 0
            with self._autocast():
                logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, -1].float()
            same = torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
            self._ignores_mask = not same
            if self._ignores_mask:
                logger.warning_once(
                    "The model ignores the padding mask, so that prompts are sampled in batches of equal length and "
                    "without a cache, which is slow."
                )
        return self._ignores_mask

    @contextmanager
    def _own_settings(self, config: GenerationConfig) -> Iterator[None]:
        """transformers fills whatever a config leaves open from the model's own: there is none meanwhile."""
        # peft hands the settings of an adapter's model on to the model below it, and leaves them there.
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        kept = self.model.generation_config, base.generation_config
        self.model.generation_config = config
        try:
            yield
        finally:
            self.model.generation_config, base.generation_config = kept


def _split(sampled: Tensor, logps: Tensor, stop: Sequence[int], num: int) -> list[list[Completion]]:
    """Cut every sequence after its first stop token, and sum the log-probabilities of what is left."""
    stops = torch.isin(sampled, torch.tensor(list(stop), device=sampled.device, dtype=sampled.dtype))
    steps = sampled.shape[1]
    ended = stops.any(dim=1)
    lengths = torch.where(ended, stops.int().argmax(dim=1) + 1, steps)
    kept = torch.arange(steps, device=sampled.device)[None, :] < lengths[:, None]
    sums = torch.where(kept, logps.double(), 0.0).sum(dim=1).tolist()
    rows = [
        Completion(ids[:length], total, not has_ended)
        for ids, length, total, has_ended in zip(sampled.tolist(), lengths.tolist(), sums, ended.tolist(), strict=True)
    ]
    return [rows[start : start + num] for start in range(0, len(rows), num)]
