"""Sampling: what is drawn, from which distribution, with which random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, RwkvConfig, RwkvForCausalLM, TopPLogitsWarper

from tests import tiny
from tests.reference.sampling import log_probability, sampling_distribution
from trl_extras.rollouts.sampling import (
    Batch,
    NucleusFilter,
    SamplingSettings,
    TransformersSampler,
    batch_seed,
    plan_batches,
    stop_tokens,
)


PROMPTS = [[5, 9, 12], [7], [30, 31, 32, 33, 34]]


def settings(**given: Any) -> SamplingSettings:
    defaults: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
        "max_completion_length": 6, "stop_token_ids": (1,), "pad_token_id": 0,
    }  # fmt: skip
    return SamplingSettings(**{**defaults, **given})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model(seed=3).eval()


DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_p": 0.3},
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.1},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("drawn_from", DISTRIBUTIONS, ids=str)
def test_logps_are_those_of_the_distribution_that_was_sampled_from(model: Any, drawn_from: dict[str, Any]) -> None:
    groups = TransformersSampler(model, settings(**drawn_from))(PROMPTS, 4, seed=11)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 4
        for completion in group:
            expected = log_probability(model, prompt, completion.ids, **drawn_from)
            assert completion.logp == pytest.approx(expected, abs=2e-4)


def test_a_model_that_ignores_the_padding_mask_is_sampled_in_equal_lengths() -> None:
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=len(tiny.WORDS), hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    rwkv = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in rwkv.parameters():
            parameter.mul_(5)
    prompts = [*PROMPTS, [8, 9, 10]]
    groups = TransformersSampler(rwkv, settings())(prompts, 4, seed=11)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            assert completion.logp == pytest.approx(log_probability(rwkv, prompt, completion.ids), abs=2e-4)


@pytest.mark.parametrize("drawn_from", DISTRIBUTIONS[2:7], ids=str)
def test_reference_distribution_is_transformers_own(model: Any, drawn_from: dict[str, Any]) -> None:
    """The slow reference is checked against transformers as well, so that they cannot be wrong together."""
    out = model.generate(
        torch.tensor([PROMPTS[0]]),
        generation_config=GenerationConfig(
            do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
            **{"top_k": 0, "top_p": 1.0, "temperature": 1.0, **drawn_from},
        ),
    )  # fmt: skip
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = torch.tensor(sampling_distribution(logits, PROMPTS[0], **drawn_from))
    torch.testing.assert_close(out.scores[0].softmax(-1)[0].double(), expected.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_nucleus_is_that_of_transformers(top_p: float, spread: float) -> None:
    """Flat distributions do not fit into the tokens that are looked at first."""
    torch.manual_seed(0)
    scores = torch.randn(6, 3000) * torch.tensor([spread, 0.5, 1.0, 2.0, 4.0, 9.0])[:, None]
    if spread == 0.0:
        scores[0] += torch.linspace(0, 1e-3, 3000)
    ours = NucleusFilter(top_p)(None, scores).softmax(-1)
    theirs = TopPLogitsWarper(top_p)(None, scores.clone()).softmax(-1)
    # One token at the edge may go either way, by the rounding of a sum of thousands.
    assert ((ours > 0) != (theirs > 0)).sum(dim=-1).max() <= 2
    torch.testing.assert_close(ours, theirs, atol=2e-3 if spread else 1e-2, rtol=0.02 if top_p > 0.1 else 1.0)
    kept = scores.softmax(-1) * (ours > 0)
    assert (kept.sum(-1) >= top_p - 1e-5).all()
    smallest = torch.where(ours > 0, scores.softmax(-1), torch.inf).min(dim=-1).values
    assert ((kept.sum(-1) - smallest < top_p + 1e-5) | ((ours > 0).sum(-1) == 1)).all()


def test_draws_what_generate_draws(model: Any) -> None:
    """With the same settings and seed, to the token: only the seeds and the bookkeeping are ours."""
    ours = TransformersSampler(model, settings(temperature=0.7, top_p=0.9, top_k=40))([PROMPTS[0]], 5, seed=4)
    torch.manual_seed(4)
    theirs = model.generate(
        torch.tensor([PROMPTS[0]]),
        generation_config=GenerationConfig(
            do_sample=True, temperature=0.7, top_p=0.9, top_k=40, max_new_tokens=6, num_return_sequences=5,
            eos_token_id=1, pad_token_id=0,
        ),
    )[:, 3:].tolist()  # fmt: skip
    for completion, row in zip(ours[0], theirs, strict=True):
        assert row[: len(completion.ids)] == completion.ids
        assert all(token == 0 for token in row[len(completion.ids) :])


def test_padding_is_not_penalised(model: Any) -> None:
    """Where it is EOS too, the end of a completion would depend on its neighbours' prompts."""
    penalised = settings(repetition_penalty=3.0, pad_token_id=1)
    groups = TransformersSampler(model, penalised)(PROMPTS, 6, seed=2)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = log_probability(model, prompt, completion.ids, repetition_penalty=3.0)
            assert completion.logp == pytest.approx(expected, abs=2e-4)


def test_nothing_of_the_checkpoints_own_settings_leaks_in(model: Any) -> None:
    clean = TransformersSampler(model, settings(temperature=0.9))(PROMPTS, 3, seed=1)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=9.0, min_new_tokens=6, num_beams=1,
        max_length=4, eos_token_id=[1, 20], bad_words_ids=[[8], [9]], suppress_tokens=[10, 11, 12], pad_token_id=3,
    )  # fmt: skip
    try:
        meddled = model.generation_config
        assert TransformersSampler(model, settings(temperature=0.9))(PROMPTS, 3, seed=1) == clean
        assert model.generation_config is meddled
    finally:
        model.generation_config = own


def test_random_numbers_of_the_caller_are_left_alone(model: Any) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = TransformersSampler(model, settings())(PROMPTS, 2, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert TransformersSampler(model, settings())(PROMPTS, 2, seed=7) == first
    assert TransformersSampler(model, settings())(PROMPTS, 2, seed=8) != first


def test_a_completion_ends_with_its_stop_token_or_is_cut(model: Any) -> None:
    stops = (1, 20, 25)
    sampler = TransformersSampler(model, settings(stop_token_ids=stops, max_completion_length=9))
    completions = [completion for seed in range(8) for group in sampler(PROMPTS, 4, seed) for completion in group]
    assert {completion.cut for completion in completions} == {True, False}
    for completion in completions:
        assert not set(completion.ids[:-1]) & set(stops)
        assert completion.cut == (completion.ids[-1] not in stops)
        if completion.cut:
            assert len(completion.ids) == 9


def test_stop_tokens_are_the_tokenizers_and_the_models(model: Any) -> None:
    assert stop_tokens(tiny.make_tokenizer(), model) == (1,)
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[20, 1, 7])
    try:
        assert stop_tokens(tiny.make_tokenizer(), model) == (1, 7, 20)
    finally:
        model.generation_config = own


def test_batches_hold_prompts_of_similar_length() -> None:
    batches = plan_batches([5, 1, 3, 1, 9, 2], [4, 0, 1, 3, 5], 2, first=10, seed=0, purpose="round 1")
    assert [batch.positions for batch in batches] == [(1, 3), (5, 0), (4,)]
    assert [batch.index for batch in batches] == [10, 11, 12]
    assert batches[1] == Batch(11, (5, 0), batch_seed(0, "round 1", 11))


def test_seeds_differ_by_run_round_and_batch() -> None:
    seeds = {batch_seed(run, f"round {t}", i) for run in range(3) for t in range(3) for i in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**31 for seed in seeds)
