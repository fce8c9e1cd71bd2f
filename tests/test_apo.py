"""APO's invariants, through the real trainer: what it must equal, bit for bit, and what the theorem says exactly."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests import tiny
from tests.reference.apo import apo_by_hand, coefficient
from trl_extras import APOConfig, APOTrainer
from trl_extras.rounds.data import split_folds


LOSSES = (
    ["sigmoid"], ["hinge"], ["ipo"], ["exo_pair"], ["nca_pair"], ["robust"], ["bco_pair"], ["sppo_hard"], ["aot"],
    ["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sft"], ["sigmoid_norm"], ["sigmoid", "sft"],
)  # fmt: skip


def dpo(model: Any, folder: Path, data: Any, reference: Any = None, **kwargs: Any) -> Any:
    """A plain DPOTrainer run; returns the trainer."""
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**tiny.arguments(folder, num_train_epochs=kwargs.pop("num_train_epochs", 1), **kwargs)),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
    )
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(
    base: Path, folder: Path, alphas: list[float], momentum_from: str = "previous_iterate", **kwargs: Any
) -> Any:
    """Algorithm 1 as separate DPOTrainer runs over the folds that `round_data="split"` makes."""
    data = tiny.make_pairs(24)
    folds = [data.select(indices) for indices in split_folds(24, len(alphas), seed=42)]
    betas = kwargs.pop("betas", [kwargs.pop("beta", 0.1)] * len(alphas))

    def train(policy: Any, reference: Any, fold: Any, t: int) -> Any:
        return dpo(
            policy, folder / f"dpo-{t}", fold, reference, beta=betas[t], train_sampling_strategy="sequential", **kwargs
        ).model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return apo_by_hand(model, folds, alphas, train, momentum_from)


@pytest.mark.parametrize("precompute", [False, True])
def test_one_round_is_dpo_bit_for_bit_shuffled(make_apo: Any, base: Path, tmp_path: Path, precompute: bool) -> None:
    common = {"train_sampling_strategy": "random", "precompute_ref_log_probs": precompute, "num_train_epochs": 2}
    stock = dpo(str(base), tmp_path / "dpo", tiny.make_pairs(24), **common)
    ours = make_apo(num_rounds=1, **common)
    ours.train()
    assert losses(ours) == losses(stock)
    assert tiny.same_weights(ours.model, stock.model)


@pytest.mark.parametrize("loss_type", LOSSES, ids="+".join)
def test_alpha_zero_is_iterative_dpo_bit_for_bit(
    make_apo: Any, base: Path, tmp_path: Path, loss_type: list[str]
) -> None:
    common = {"loss_type": loss_type, "learning_rate": 1e-3}
    if loss_type in (["exo_pair"], ["robust"]):
        common["label_smoothing"] = 0.1
    if loss_type == ["sppo_hard"]:
        common["beta"] = 0.01
    ours = make_apo(num_rounds=2, extrapolation_alpha=[0.0], **common)
    ours.train()
    expected = by_hand(base, tmp_path, [0.0, 0.0], **common)[-1]
    assert tiny.same_weights(ours.model, expected)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not tiny.same_weights(ours.model, start), "nothing was trained, so nothing was compared"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_rounds": 3, "round_beta": [0.01, 0.1, 1.0], "gradient_accumulation_steps": 2},
        {"num_rounds": 2, "precompute_ref_log_probs": True},
        {"num_rounds": 2, "model_init_kwargs": {"dtype": "bfloat16"}},
        {"num_rounds": 2, "dataloader_num_workers": 2},
        {"num_rounds": 2, "optim": "rmsprop", "warmup_steps": 0.5, "lr_scheduler_type": "cosine"},
    ],
    ids=["betas-accumulation", "precomputed", "bfloat16", "workers", "rmsprop-cosine"],
)
def test_alpha_zero_is_iterative_dpo_with_other_settings(
    make_apo: Any, base: Path, tmp_path: Path, settings: dict
) -> None:
    settings = dict(settings)
    ours = make_apo(extrapolation_alpha=[0.0], **settings)
    ours.train()
    rounds = settings.pop("num_rounds")
    settings["betas"] = settings.pop("round_beta", [0.1] * rounds)
    settings.pop("precompute_ref_log_probs", None)
    if settings.pop("model_init_kwargs", None):
        data = tiny.make_pairs(24)
        policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        for t, indices in enumerate(split_folds(24, rounds, seed=42)):
            reference = copy.deepcopy(policy)
            policy = dpo(
                copy.deepcopy(policy), tmp_path / f"b{t}", data.select(indices), reference,
                train_sampling_strategy="sequential",
            ).model  # fmt: skip
        expected = policy
    else:
        expected = by_hand(base, tmp_path, [0.0] * rounds, **settings)[-1]
    assert tiny.same_weights(ours.model, expected)


@pytest.mark.parametrize("momentum_from", ["previous_iterate", "reference"])
def test_extrapolation_is_equation_3_6_on_the_weights(
    make_apo: Any, base: Path, tmp_path: Path, momentum_from: str
) -> None:
    # SGD: an optimiser whose first step is a sign would blow one rounding up to a step.
    common = {"optim": "sgd", "learning_rate": 0.3}
    alphas = [0.3, 0.6, 0.9]
    ours = make_apo(extrapolation_alpha=alphas, momentum_from=momentum_from, keep_iterates=True, **common)
    ours.train()
    expected = by_hand(base, tmp_path, alphas, momentum_from, **common)
    for t, iterate in enumerate(expected):
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"out/_rounds/iterates/{t + 1}", dtype=torch.float32)
        assert tiny.same_weights(kept, iterate), f"iterate {t + 1}"
    assert tiny.same_weights(ours.model, expected[-1])


def test_momentum_from_reference_is_another_run(make_apo: Any) -> None:
    """
    The ablation differs from the method from the third round on (before, both momenta start at the same weights).
    """
    runs = []
    for origin in ("previous_iterate", "reference"):
        trainer = make_apo(origin, momentum_from=origin, extrapolation_alpha=[0.6], num_rounds=3)
        trainer.train()
        runs.append(trainer)
    assert not tiny.same_weights(runs[0].model, runs[1].model)


def test_output_policy_extrapolated_is_expo(make_apo: Any, base: Path) -> None:
    plain = make_apo("plain", num_rounds=1)
    plain.train()
    expo = make_apo("expo", num_rounds=1, output_policy="extrapolated", extrapolation_alpha=[0.5])
    expo.train()
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for got, new, old in zip(expo.model.parameters(), plain.model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(
            got.double(), new.double() + 0.5 * (new.double() - old.double()), rtol=1e-6, atol=1e-7
        )


def test_every_round_starts_at_its_own_reference(make_apo: Any) -> None:
    """theta_t is policy and reference, so that a sigmoid loss starts at ln 2 in every round; so does evaluation."""
    for precompute in (False, True):
        trainer = make_apo(
            f"p{precompute}", extrapolation_alpha=[0.6], precompute_ref_log_probs=precompute,
            eval_dataset=tiny.make_pairs(4, seed=5), eval_strategy="steps", eval_steps=1, learning_rate=1e-2,
            lr_scheduler_type="constant_with_warmup", warmup_steps=1,
        )  # fmt: skip
        trainer.train()
        first = [e for e in trainer.state.log_history if "loss" in e and e["step"] in (1, 5, 9)]
        assert [e["loss"] for e in first] == pytest.approx([math.log(2)] * 3, abs=1e-6)
        # The first step of a warm-up has rate 0: the policy still is its reference, on held-out pairs as well.
        held_out = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"] in (1, 5, 9)]
        assert held_out == pytest.approx([math.log(2)] * 3, abs=1e-6)


def test_learning_rate_restarts_and_settings_follow_the_round(make_apo: Any) -> None:
    trainer = make_apo(round_epochs=[1, 2, 1], round_beta=[0.01, 0.1, 1.0], learning_rate=0.5e-3)
    seen = []
    original = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (seen.append(trainer.beta), original(*a, **k))[1]
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    steps = 4
    expected = [0.5e-3 * (1 - s / n) for n in (steps, 2 * steps, steps) for s in range(n)]
    assert rates == pytest.approx(expected)
    assert seen == [0.01] * 4 + [0.1] * 8 + [1.0] * 4
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == list(range(1, 17))


# ---- Theorem 4.1 ----

ARMS = ["w0", "w1", "w2"]
REWARD = {"w0": math.log(3) + math.log(2), "w1": math.log(2), "w2": 0.0}


def bandit_rows() -> datasets.Dataset:
    """Exact Bradley-Terry labels of reward differences ln 3 and ln 2: 3 to 1 and 2 to 1."""
    pairs = [("w0", "w1")] * 3 + [("w1", "w0")] + [("w1", "w2")] * 2 + [("w2", "w1")]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "w9"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for chosen, rejected in pairs
        ]
    )


def bandit_log_probs(model: torch.nn.Module) -> torch.Tensor:
    """Log-probabilities of the arms, (arms,)."""
    tokenizer = tiny.make_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w9"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1].double()
    return logits.log_softmax(-1)[tokenizer.convert_tokens_to_ids(ARMS)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6])
def test_theorem_4_1_on_a_bandit(tmp_path: Path, alpha: float) -> None:
    """
    After T rounds solved exactly, log(pihat_T / pi_ref) = C_T r* / beta + const. The policy is softmax-linear (only
    the head is trained, the prompt is one), where the step on the weights is the paper's (3.6) itself.
    """
    beta = 0.5
    model = tiny.make_model(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    start = bandit_log_probs(model)
    config = APOConfig(
        **tiny.arguments(
            tmp_path,
            num_rounds=3,
            extrapolation_alpha=[alpha],
            round_data="reuse",
            num_train_epochs=60,
            per_device_train_batch_size=7,
            beta=beta,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            keep_iterates=True,
            logging_strategy="no",
        )
    )
    trainer = APOTrainer(model=model, args=config, train_dataset=bandit_rows(), processing_class=tiny.make_tokenizer())
    trainer.train()
    reward = torch.tensor([REWARD[arm] for arm in ARMS], dtype=torch.float64)
    for rounds in (1, 2, 3):
        iterate = AutoModelForCausalLM.from_pretrained(tmp_path / f"_rounds/iterates/{rounds}", dtype=torch.float32)
        moved = bandit_log_probs(iterate) - start
        for better, worse in ((0, 1), (1, 2), (0, 2)):
            measured = (moved[better] - moved[worse]) / ((reward[better] - reward[worse]) / beta)
            assert measured.item() == pytest.approx(coefficient(rounds, alpha), rel=0.01), (rounds, better, worse)
    assert tiny.same_weights(trainer.model, iterate)


def test_coefficients_are_the_papers() -> None:
    table = {0.0: [1, 2, 3, 4, 5], 0.3: [1, 2.3, 3.69, 5.107, 6.5321], 0.6: [1, 2.6, 4.56, 6.736, 9.0416]}
    for alpha, values in table.items():
        assert [coefficient(t, alpha) for t in range(1, 6)] == pytest.approx(values)


# ---- References and data ----


def test_reference_is_the_policy_as_handed_in(make_apo: Any, base: Path) -> None:
    """Upstream would reload the reference from the path, which here holds other weights."""
    changed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    trainer = make_apo(model=changed, num_rounds=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("precompute", [False, True])
def test_given_reference_serves_the_first_round_only(make_apo: Any, precompute: bool) -> None:
    trainer = make_apo(ref_model=tiny.make_model(seed=9), precompute_ref_log_probs=precompute)
    trainer.train()
    first = [e["loss"] for e in trainer.state.log_history if "loss" in e and e["step"] in (1, 5, 9)]
    assert first[0] != pytest.approx(math.log(2), abs=1e-3)
    assert first[1:] == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_given_reference_of_another_shape_is_refused(make_apo: Any) -> None:
    with pytest.raises(ValueError, match="`ref_model` differs from the policy in"):
        make_apo(ref_model=tiny.make_model(dtype=torch.bfloat16))


def test_precomputed_reference_needs_no_second_model(make_apo: Any) -> None:
    with_model, precomputed = (
        make_apo("a", extrapolation_alpha=[0.6]),
        make_apo("b", extrapolation_alpha=[0.6], precompute_ref_log_probs=True),
    )
    with_model.train()
    precomputed.train()
    assert precomputed.ref_model is None
    assert tiny.same_weights(with_model.model, precomputed.model)


def test_reuse_trains_every_round_on_all_rows(make_apo: Any) -> None:
    trainer = make_apo(round_data="reuse", num_rounds=2)
    trainer.train()
    assert trainer.state.global_step == 2 * 12
    assert [row["rows"] for row in trainer.round_summaries] == [24, 24]


# ---- What is recorded ----


def test_rounds_jsonl_norms_and_cosine(make_apo: Any, base: Path, tmp_path: Path) -> None:
    alphas = [0.3, 0.6, 0.9]
    common = {"optim": "sgd", "learning_rate": 0.3}
    trackers = tiny.Trackers()
    trainer = make_apo(extrapolation_alpha=alphas, callbacks=[trackers], **common)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text().splitlines()]
    assert rows == trainer.round_summaries
    iterates = by_hand(base, tmp_path, alphas, **common)

    def flat(model: Any) -> torch.Tensor:
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])

    hats = [flat(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)), *map(flat, iterates)]
    thetas = [hats[0]] + [hats[t + 1] + alphas[t] * (hats[t + 1] - hats[t]) for t in range(2)]
    for t, row in enumerate(rows):
        update, momentum = hats[t + 1] - thetas[t], hats[t + 1] - hats[t]
        assert row["round"] == t
        assert row["alpha"] == alphas[t]
        assert row["update_norm"] == pytest.approx(update.norm().item(), rel=1e-4)
        assert row["momentum_norm"] == pytest.approx(momentum.norm().item(), rel=1e-4)
        if t == 0:
            assert row["update_cosine"] is None
        else:
            before = hats[t] - thetas[t - 1]
            cosine = torch.nn.functional.cosine_similarity(update, before, dim=0).item()
            assert row["update_cosine"] == pytest.approx(cosine, abs=1e-3)
        assert row["train"]["loss"] == pytest.approx(losses(trainer)[4 * t + 3])
    logged = [e for e in trackers.rows if "round/update_norm" in e]
    assert [e["round/alpha"] for e in logged] == alphas


def test_card_says_accelerated_and_names_no_path(make_apo: Any, tmp_path: Path, base: Path) -> None:
    trainer = make_apo(num_rounds=2, hub_token="hf_secret", save_strategy="epoch")
    trainer.train()
    assert "| 2 | 0.3 | 0.1 |" in (tmp_path / "out/README.md").read_text(), "the card of a checkpoint lacks its round"
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved/README.md").read_text()
    assert "*accelerated* preference optimization" in card
    assert "2410.06293" in card
    assert "[None]" not in card
    assert "None" not in card
    for private in (str(tmp_path), str(base), "output_dir", "hf_secret"):
        assert private not in card, private
    assert "| 1 | 0.3 | 0.1 |" in card
    assert "| 2 | 0.3 | 0.1 |" in card
    assert "num_rounds: 2" in card
    assert "learning_rate: 0.01" in card


def test_card_links_a_base_model_of_the_hub(make_apo: Any, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config._name_or_path = "someone/some-model"
    trainer = make_apo(model=model, num_rounds=1)
    trainer.train()
    trainer.create_model_card(model_name="mine", dataset_name="someone/pairs", tags="extra")
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: someone/some-model" in card
    assert "https://huggingface.co/someone/some-model" in card
    assert "https://huggingface.co/datasets/someone/pairs" in card
    assert "- extra" in card


def test_callbacks_see_the_iterate_at_the_end_of_a_round(make_apo: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_round_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((kwargs["round_index"], copy.deepcopy(kwargs["model"])))
            torch.rand(3)
            kwargs["summary"]["mine"] = 1.5

    trainer = make_apo("watched", callbacks=[Watch()], keep_iterates=True)
    trainer.train()
    assert [t for t, _ in seen] == [0, 1, 2]
    for t, model in seen:
        kept = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"watched/_rounds/iterates/{t + 1}", dtype=torch.float32
        )
        assert tiny.same_weights(kept, model)
    assert [row["mine"] for row in trainer.round_summaries] == [1.5] * 3


def test_whatever_a_callback_puts_into_a_rounds_row_is_kept(make_apo: Any, tmp_path: Path, caplog: Any) -> None:
    """Also in checkpoints, and by a run that goes on."""
    from transformers import TrainerCallback

    class Puts(TrainerCallback):
        def on_round_end(self, args: Any, state: Any, control: Any, *, summary: Any, **kwargs: Any) -> None:
            summary |= {
                "nan": math.nan, "scores": {"inf": np.float32("inf"), 1: np.float32(0.5)}, "count": np.int64(3),
                "torch": torch.tensor(0.25, dtype=torch.bfloat16), "list": (np.bool_(True), np.arange(2)),
                "object": Path("a"), "text": "kept", "none": None,
            }  # fmt: skip

    settings = {"num_rounds": 2, "save_strategy": "steps", "save_steps": 8, "callbacks": [Puts()]}
    make_apo(**settings).train()
    assert caplog.text.count("Round 1: nan, scores/inf in the round's `summary` is not finite") == 1
    trackers = tiny.Trackers()
    resumed = make_apo(**{**settings, "callbacks": [Puts(), trackers]})
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == resumed.round_summaries
    assert len(rows) == 2
    for row in rows:
        assert (row["nan"], row["scores"]) == (None, {"inf": None, "1": 0.5})
        assert (row["count"], row["torch"], row["list"]) == (3, 0.25, [True, [0, 1]])
        assert (row["object"], row["text"], row["none"]) == ("a", "kept", None)
    (logged,) = [row for row in trackers.rows if "round/torch" in row]
    assert (logged["round/torch"], logged["round/scores/1"], logged["round/count"]) == (0.25, 0.5, 3)
