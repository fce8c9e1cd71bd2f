"""
Adapters where a method has more than rounds: floors, inner steps, sampled rows, references of several kinds, and runs
that go on. `tests/test_adapters.py` has the arithmetic of the rounds, `tests/test_common.py` what every method
promises.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests import tiny
from tests.reference import spo_objective as slow
from tests.test_common import logits, losses, model_of, relative, threes
from tests.test_spo import Case, far
from trl_extras import APOSPOTrainer
from trl_extras.errors import ConfigurationError


SOLVERS: dict[str, dict[str, Any]] = {
    "penalty": {},
    "penalty, batch hinge": {"hinge": "batch"},
    "unrolled": {"bilevel_solver": "unrolled"},
    "unrolled, exact": {"bilevel_solver": "unrolled", "hypergradient": "central_difference"},
    "alternating": {"bilevel_solver": "alternating"},
}
every_way = pytest.mark.parametrize("way", ["LoRA", "passed PeftModel"])


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def loaded(base: Path, folder: Path) -> Any:
    """A saved adapter on the original base, by plain peft."""
    return PeftModel.from_pretrained(plain(base), str(folder)).eval()


def start_of(way: str, base: Path) -> Any:
    """The model that the run begins with."""
    return plain(base) if way == "LoRA" else model_of(way, base)["model"].eval()


def without_dropout(way: str, base: Path) -> dict[str, Any]:
    """TRL draws dropout for its copy of an adapter too, but not where it computes the reference ahead."""
    given = model_of(way, base)
    if "peft_config" in given:
        given["peft_config"].lora_dropout = 0.0
    else:
        given["model"].peft_config["default"].lora_dropout = 0.0
        for module in given["model"].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return given


def log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        return float(slow.log_prob(model, {}, (prompt, response)))


def numbers(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- The objective ----


@every_way
@pytest.mark.parametrize("name", SOLVERS)
def test_the_adapter_moves_alone(make_spo: Any, base: Path, way: str, name: str) -> None:
    """Also within the window of a step, where inner steps have moved it."""
    inner = {"inner_learning_rate": 0.05} if "bilevel_solver" in SOLVERS[name] else {}
    trainer = make_spo(
        sft_dataset=tiny.make_sft_rows(),
        gradient_accumulation_steps=2,
        **SOLVERS[name],
        **inner,
        **model_of(way, base),
    )
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    compute_loss, calls = trainer.compute_loss, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        now = trainer.model.state_dict()
        calls.append({key for key, tensor in before.items() if not torch.equal(now[key], tensor)})
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    adapter = {key for key in before if ".default" in key}
    after = trainer.model.state_dict()
    assert {key for key, tensor in before.items() if not torch.equal(after[key], tensor)} == adapter
    assert all(moved <= adapter for moved in calls)
    assert not name.startswith("penalty") or not calls[0]
    assert name.startswith("penalty") or calls[0], "theta' of the first step"


@every_way
@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_are_plain_autograd(make_spo: Any, base: Path, way: str, name: str) -> None:
    """Of the adapter, with the model as it was handed in as the reference: TRL's copy of a passed adapter."""
    solver = SOLVERS[name]
    rate, steps = (0.05, 1) if "bilevel_solver" in solver else (0.0, 0)
    inner = {"inner_learning_rate": rate} if steps else {}
    case = Case(make_spo, 2, reference=start_of(way, base), **solver, **inner, **without_dropout(way, base))
    assert all(".default" in key for key in case.theta)
    gradient, value = case.step()
    exact = "hypergradient" in solver
    wanted, wanted_value = case.wanted(rate, steps, exact=exact)
    assert far(gradient, wanted) < (2e-3 if exact else 5e-5)
    assert value == pytest.approx(float(wanted_value), rel=5e-5)
    if steps:
        # What inner steps change is larger than the tolerance.
        assert far(case.wanted(0.0, 0, exact=False)[0], wanted) > 0.02
    if exact:
        assert far(case.wanted(rate, 1, exact=False)[0], wanted) > 0.004


# ---- The floor in rounds ----


class Policies(TrainerCallback):
    """Every round's theta_t, from its folder, by plain peft."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder = base, folder
        self.models: list[Any] = []

    def on_round_end(self, args: Any, state: Any, control: Any, *, round_index: int, **kwargs: Any) -> None:
        path = self.folder / f"_rounds/round-{round_index:04d}"
        own = path / "policy"
        self.models.append(loaded(self.base, own if own.is_dir() else path / "iterate"))


@every_way
@pytest.mark.parametrize("solver", ["penalty", "alternating"])
def test_floors_over_rounds(make_spo: Any, base: Path, tmp_path: Path, way: str, solver: str) -> None:
    """The chosen responses' floor is theta_t's likelihood, the SFT rows' stays the initial model's."""
    policies = Policies(base, tmp_path / "out")
    inner = {"inner_learning_rate": 0.01} if SOLVERS[solver] else {}
    trainer = make_spo(
        cls=APOSPOTrainer, num_rounds=3, extrapolation_alpha=[0.5], sft_dataset=tiny.make_sft_rows(),
        callbacks=[policies], save_strategy="no", **SOLVERS[solver], **inner, **without_dropout(way, base),
    )  # fmt: skip
    seen: list[tuple[int, list[int], list[int], float]] = []
    gap = trainer._gap

    def watched(source: str, log_probs: Any, tokens: Any, reference: Any, training: bool) -> Any:
        if source == "chosen":
            batch = trainer._rows[2 * (len(seen) // 2 % 2)], trainer._rows[2 * (len(seen) // 2 % 2) + 1]
            for row, value in zip(batch, reference.tolist(), strict=True):
                seen.append((trainer._round, row["prompt_ids"], row["chosen_ids"], value))
        return gap(source, log_probs, tokens, reference, training)

    trainer._gap = watched
    trainer.train()
    assert [entry[0] for entry in seen] == [t for t in range(3) for _ in range(4)]
    for t, prompt, chosen, value in seen:
        assert value == pytest.approx(log_prob(policies.models[t], prompt, chosen), rel=1e-4, abs=1e-4)
    # The policies differ by more than that.
    for t in (1, 2):
        _, prompt, chosen, value = seen[4 * t]
        assert value != pytest.approx(log_prob(policies.models[t - 1], prompt, chosen), rel=1e-3, abs=1e-3)
    initial = start_of(way, base)
    for row, nll in zip(trainer._spo_rows.rows, trainer._spo_floor.nll.tolist(), strict=True):
        answer = sum(label != -100 for label in row["labels"])
        value = log_prob(initial, row["input_ids"][:-answer], row["input_ids"][-answer:])
        assert nll == pytest.approx(-value / answer, rel=1e-4)


@every_way
@pytest.mark.parametrize(("output_policy", "precompute"), [("iterate", True), ("extrapolated", False)])
def test_evaluation_is_against_the_last_policy(
    make_spo: Any, base: Path, tmp_path: Path, way: str, output_policy: str, precompute: bool
) -> None:
    pairs = tiny.make_pairs(4, seed=8)
    trainer = make_spo(
        cls=APOSPOTrainer, num_rounds=2, extrapolation_alpha=[0.8], output_policy=output_policy, eval_dataset=pairs,
        precompute_ref_log_probs=precompute, keep_iterates=True, per_device_eval_batch_size=2, beta=0.5,
        learning_rate=5e-3, **without_dropout(way, base),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    output, reference = loaded(base, tmp_path / "out"), loaded(base, tmp_path / "out/_rounds/round-0001/policy")
    iterate = loaded(base, tmp_path / "out/_rounds/iterates/2")
    same = relative(logits(output), logits(iterate)) < 1e-5
    assert same == (output_policy == "iterate")
    changes, gaps = {"chosen": [], "rejected": []}, []
    for row in trainer.eval_dataset:
        for kind, change in changes.items():
            values = [log_prob(model, row["prompt_ids"], row[f"{kind}_ids"]) for model in (output, reference)]
            change.append(values[0] - values[1])
        gaps.append(max(-changes["chosen"][-1] / len(row["chosen_ids"]), 0.0))
    for kind, change in changes.items():
        assert found[f"eval_rewards/{kind}"] == pytest.approx(0.5 * sum(change) / 4, rel=1e-3, abs=2e-5)
    assert found["eval_spo/gap_chosen"] == pytest.approx(sum(gaps) / 4, rel=1e-3, abs=2e-5)
    assert max(map(abs, changes["chosen"])) > 0.01


@every_way
def test_gradient_checkpointing_changes_nothing(make_spo: Any, base: Path, way: str) -> None:
    """The history and the adapter are those of the forward pass when a layer is run again."""
    runs = []
    for checkpointing in (False, True):
        trainer = make_spo(
            f"{checkpointing}", cls=APOSPOTrainer, num_rounds=2, extrapolation_alpha=[0.5], optim="sgd",
            learning_rate=0.2, sft_dataset=tiny.make_sft_rows(), gradient_checkpointing=checkpointing,
            bilevel_solver="unrolled", inner_learning_rate=0.01, **model_of(way, base),
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert relative(logits(runs[0].model), logits(runs[1].model)) < 1e-5


@every_way
def test_a_loss_without_a_reference_has_the_floor_of_each_round(make_spo: Any, base: Path, way: str) -> None:
    """Its values are computed ahead, from theta_t, also where the run resumes inside a round."""

    def make() -> Any:
        return make_spo(
            cls=APOSPOTrainer, num_rounds=3, extrapolation_alpha=[0.5], sft_dataset=tiny.make_sft_rows(),
            loss_type="simpo", save_strategy="steps", save_steps=3, **without_dropout(way, base),
        )  # fmt: skip

    trainer = make()
    trainer.train()
    for step in (0, 2, 4):
        assert numbers(trainer, "spo/chosen_change")[step] == pytest.approx(0, abs=1e-4)
        assert abs(numbers(trainer, "spo/chosen_change")[step + 1]) > 1e-3
    resumed = make()
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))
    assert losses(resumed) == losses(trainer)
    assert tiny.same_weights(resumed.model, trainer.model)


@every_way
def test_a_loss_without_a_reference_evaluates_other_sets(make_spo: Any, base: Path, way: str) -> None:
    """The reference is in the model; with full weights it is gone, and that is refused."""
    trainer = make_spo(loss_type="simpo", learning_rate=2e-2, **without_dropout(way, base))
    trainer.train()
    found = trainer.evaluate(tiny.make_pairs(4, seed=8))
    start, rows = start_of(way, base), make_spo("other", data=tiny.make_pairs(4, seed=8)).train_dataset
    trainer.model.eval()
    changes = [
        log_prob(trainer.model, row["prompt_ids"], row["chosen_ids"])
        - log_prob(start, row["prompt_ids"], row["chosen_ids"])
        for row in rows
    ]
    assert found["eval_spo/chosen_change"] == pytest.approx(sum(changes) / 4, rel=1e-3, abs=1e-4)
    assert abs(found["eval_spo/chosen_change"]) > 1e-3


# ---- References of other kinds ----


@every_way
def test_a_reference_computed_ahead_is_the_same(make_apo: Any, base: Path, way: str) -> None:
    runs = []
    for ahead in (False, True):
        trainer = make_apo(
            f"{ahead}", data=tiny.make_pairs(12), extrapolation_alpha=[0.5], precompute_ref_log_probs=ahead,
            learning_rate=5e-3, **without_dropout(way, base),
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert relative(logits(runs[0].model), logits(runs[1].model)) < 1e-5


@pytest.mark.parametrize(("way", "ahead"), [("LoRA", False), ("LoRA", True), ("passed PeftModel", False)])
def test_a_given_reference_serves_the_first_round(
    make_apo: Any, base: Path, tmp_path: Path, way: str, ahead: bool
) -> None:
    """As in DPOTrainer; later rounds have theta_t, and the user's object stays as it is."""
    data = tiny.make_pairs(12)
    common = {"precompute_ref_log_probs": ahead, "train_sampling_strategy": "sequential", "learning_rate": 5e-3}
    stock = DPOTrainer(
        args=DPOConfig(**tiny.arguments(tmp_path / "dpo", num_train_epochs=1, **common)),
        ref_model=tiny.make_model(seed=5),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **without_dropout(way, base),
    )
    stock.train()
    reference = tiny.make_model(seed=5)

    def make(**kwargs: Any) -> Any:
        settings = {"num_rounds": 2, "round_data": "reuse", "save_strategy": "steps", "save_steps": 2, **common}
        return make_apo(data=data, ref_model=reference, **settings, **kwargs, **without_dropout(way, base))

    trainer = make()
    trainer.train()
    assert losses(trainer)[:6] == pytest.approx(losses(stock), rel=1e-5)
    assert losses(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)
    assert losses(trainer)[6] == pytest.approx(math.log(2), abs=1e-5)
    assert tiny.same_weights(reference, tiny.make_model(seed=5))
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert losses(resumed) == losses(trainer)
    assert tiny.same_weights(resumed.model, trainer.model)


@every_way
def test_another_set_is_evaluated_against_the_reference_of_now(make_apo: Any, base: Path, way: str) -> None:
    """Also where the same set has been evaluated before, against another one, and values computed ahead are kept."""
    found, another = [], tiny.make_pairs(4, seed=8)
    for ahead in (False, True):
        trainer = make_apo(
            f"{ahead}", data=tiny.make_pairs(8), num_rounds=2, extrapolation_alpha=[0.5], learning_rate=2e-2,
            precompute_ref_log_probs=ahead, **without_dropout(way, base),
        )  # fmt: skip
        before = trainer.evaluate(another)
        trainer.train()
        found.append((before["eval_rewards/chosen"], trainer.evaluate(another)["eval_rewards/chosen"]))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[0][0] == pytest.approx(0, abs=1e-6)
    assert abs(found[0][1]) > 1e-3


# ---- Sampled rows ----


@every_way
@pytest.mark.parametrize("method", ["APO", "SPR"])
def test_each_round_samples_from_its_own_policy(
    make_apo: Any, base: Path, tmp_path: Path, way: str, method: str
) -> None:
    """Base, history and adapter together: what was noted of the samples is what the saved policy gives them."""
    policies = Policies(base, tmp_path / "out")
    arguments = {
        "num_rounds": 3, "num_generations": 2, "max_completion_length": 5, "prompts_per_round": 4, "temperature": 1.0,
        "top_p": 1.0, "learning_rate": 2e-2,
    }  # fmt: skip
    prompts = tiny.make_pairs(12).select_columns(["prompt"])
    if method == "APO":
        trainer = make_apo(
            data=prompts, reward_funcs=threes, callbacks=[policies], extrapolation_alpha=[0.8], **arguments,
            **model_of(way, base),
        )  # fmt: skip
    else:
        from trl_extras import SPRConfig, SPRTrainer

        trainer = SPRTrainer(
            args=SPRConfig(**tiny.arguments(tmp_path / "out", **arguments)), train_dataset=prompts,
            processing_class=tiny.make_tokenizer(), reward_funcs=threes, callbacks=[policies], **model_of(way, base),
        )  # fmt: skip
    trainer.train()
    differs = []
    for t in range(3):
        rows = pq.read_table(tmp_path / f"out/_rounds/rollouts/round-{t:04d}/rollouts.parquet").to_pylist()
        for row in rows:
            for ids, logp in zip(row["completion_ids"], row["logps"], strict=True):
                assert logp == pytest.approx(log_prob(policies.models[t], row["prompt_ids"], ids), abs=1e-3)
                differs.append(t > 0 and abs(logp - log_prob(policies.models[t - 1], row["prompt_ids"], ids)) > 0.02)
    assert any(differs)


@every_way
@pytest.mark.parametrize("rounds", [1, 2])
def test_what_is_measured_leaves_the_output_alone(
    make_apo: Any, base: Path, tmp_path: Path, way: str, rounds: int
) -> None:
    """Held-out prompts are also answered by the last iterate extrapolated, which is not the output."""
    prompts = tiny.make_pairs(8).select_columns(["prompt"])
    runs = []
    for evaluation in (None, {"prompts": prompts.select(range(3)), "pairs": tiny.make_pairs(4, seed=8)}):
        trainer = make_apo(
            f"{evaluation is None}", data=prompts, reward_funcs=threes, num_rounds=rounds, extrapolation_alpha=[0.9],
            num_generations=3, max_completion_length=5, learning_rate=2e-2, eval_dataset=evaluation,
            **without_dropout(way, base),
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert runs[1].round_summaries[-1]["heldout_extrapolated"] is not None
    assert losses(runs[0]) == losses(runs[1])
    # Each layer adds the same changes, but as a history where the iterate has been read back.
    assert relative(logits(runs[1].model), logits(runs[0].model)) < 1e-6
    runs[1].save_model()
    assert relative(logits(loaded(base, tmp_path / "False")), logits(runs[0].model)) < 1e-5
    assert runs[1].evaluate(runs[1].eval_dataset["pairs"])["eval_loss"] == pytest.approx(
        runs[0].evaluate(runs[1].eval_dataset["pairs"])["eval_loss"], rel=1e-5
    )


# ---- Runs that go on ----


@every_way
@pytest.mark.parametrize("output_policy", ["iterate", "extrapolated"])
def test_a_finished_run_goes_on(make_apo: Any, base: Path, tmp_path: Path, way: str, output_policy: str) -> None:
    """With more rounds, as if it had had them from the start: nothing of its output comes in between."""

    def run(folder: str, rounds: int, resume: Any = None) -> Any:
        trainer = make_apo(
            folder, data=tiny.make_pairs(4), num_rounds=rounds, round_data="reuse", extrapolation_alpha=[0.6],
            output_policy=output_policy, save_strategy="epoch", learning_rate=5e-3, **model_of(way, base),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", 3)
    run("out", 2).save_model()
    extended = run("out", 3, "last")
    assert losses(extended) == losses(whole)
    assert tiny.same_weights(extended.model, whole.model)
    assert torch.equal(logits(extended.model), logits(whole.model))
    extended.save_model()
    assert relative(logits(loaded(base, tmp_path / "out")), logits(whole.model)) < 1e-5


@every_way
@pytest.mark.parametrize("output_policy", ["iterate", "extrapolated"])
def test_train_called_again_goes_on_from_the_output(
    make_apo: Any, base: Path, tmp_path: Path, way: str, output_policy: str
) -> None:
    policies = Policies(base, tmp_path / "out")
    trainer = make_apo(
        data=tiny.make_pairs(8), num_rounds=2, extrapolation_alpha=[0.6], output_policy=output_policy,
        callbacks=[policies], learning_rate=5e-3, save_strategy="steps", save_steps=3, **without_dropout(way, base),
    )  # fmt: skip
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".default" not in n}
    trainer.train()
    first = logits(trainer.model)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items() if name in now)
    assert relative(logits(policies.models[2]), first) < 1e-5
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert relative(logits(trainer.model), first) > 1e-3
    trainer.save_model()
    assert relative(logits(loaded(base, tmp_path / "out")), logits(trainer.model)) < 1e-5

    resumed = make_apo(
        data=tiny.make_pairs(8), num_rounds=2, extrapolation_alpha=[0.6], output_policy=output_policy,
        learning_rate=5e-3, save_strategy="steps", save_steps=3, **without_dropout(way, base),
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert losses(resumed) == losses(trainer)
    assert torch.equal(logits(resumed.model), logits(trainer.model))


@every_way
def test_spr_goes_on_too(base: Path, tmp_path: Path, way: str) -> None:
    """With more rounds than it had, and when `train()` is called again: one adapter all along."""
    from trl_extras import SPRConfig, SPRTrainer

    def make(folder: str, rounds: int) -> Any:
        arguments = {"num_rounds": rounds, "num_generations": 2, "max_completion_length": 5, "prompts_per_round": 2}
        return SPRTrainer(
            args=SPRConfig(
                **tiny.arguments(
                    tmp_path / folder, round_data="reuse", keep_iterates=True, save_strategy="steps", save_steps=2,
                    **arguments,
                )
            ),
            train_dataset=tiny.make_pairs(6).select_columns(["prompt"]),
            processing_class=tiny.make_tokenizer(), reward_funcs=threes, **model_of(way, base),
        )  # fmt: skip

    whole = make("whole", 3)
    whole.train()
    make("out", 2).train()
    extended = make("out", 3)
    extended.train(resume_from_checkpoint="last")
    assert losses(extended) == losses(whole)
    assert tiny.same_weights(extended.model, whole.model)
    first = logits(whole.model)
    assert relative(logits(loaded(base, tmp_path / "whole/_rounds/iterates/3")), first) < 1e-5
    whole.train()
    assert relative(logits(loaded(base, tmp_path / "whole/_rounds/iterates/3")), logits(whole.model)) < 1e-5
    assert relative(logits(whole.model), first) > 1e-3
    assert set(whole.model.peft_config) == {"default"}


# ---- Two processes ----

TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from tests.test_adapters_spo import trainers_of_processes

torch.set_num_threads(1)
base, out = Path(sys.argv[1]), Path(sys.argv[2])
for resumed in ("", "-resumed"):
    for name, trainer in trainers_of_processes(base, out, 2, resumed):
        trainer.train(resume_from_checkpoint=str(out / name / "checkpoint-3") if resumed else None)
        trainer.save_model()
torch.distributed.destroy_process_group()
"""


def trainers_of_processes(base: Path, out: Path, batch: int, suffix: str = "") -> Any:
    """The trainers that are run by two processes and by one, each by its name."""
    from trl_extras import APOConfig, APOSPOConfig, APOTrainer

    common = {
        "num_rounds": 3, "extrapolation_alpha": [0.6], "per_device_train_batch_size": batch, "optim": "sgd",
        "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.5,
    }  # fmt: skip
    for name, way in (("apo", "LoRA"), ("apo-spo", "passed PeftModel")):
        arguments = tiny.arguments(out / f"{name}{suffix}", **common)
        given = {"train_dataset": tiny.make_pairs(24), "processing_class": tiny.make_tokenizer()}
        given |= without_dropout(way, base)
        if name == "apo":
            yield name, APOTrainer(args=APOConfig(**arguments), **given)
        else:
            arguments |= {"bilevel_solver": "alternating", "inner_learning_rate": 0.01, "sft_batch_size": batch}
            rows = tiny.make_sft_rows()
            yield name, APOSPOTrainer(args=APOSPOConfig(**arguments), sft_dataset=rows, **given)


def test_two_processes_agree_with_one_and_resume(base: Path, tmp_path: Path) -> None:
    script, root = tmp_path / "two.py", str(Path(__file__).parents[1])
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, str(base), str(tmp_path / "two")], capture_output=True, text=True, timeout=180, cwd=root,
        env={**os.environ, "PYTHONPATH": root}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, trainer in trainers_of_processes(base, tmp_path / "one", 4):
        trainer.train()
        trainer.save_model()
        folders = [tmp_path / "one" / name, tmp_path / "two" / name, tmp_path / "two" / f"{name}-resumed"]
        one, two, resumed = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        for key, tensor in one.items():
            # The order in which gradients are summed differs.
            torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
            assert torch.equal(resumed[key], two[key]), key
        assert two.keys() == resumed.keys() == one.keys()
        assert relative(logits(loaded(base, folders[1])), logits(trainer.model)) < 1e-4
        manifest = json.loads((folders[1] / "checkpoint-3/manifest.json").read_text(encoding="utf-8"))
        assert manifest["world_size"] == 2
        with pytest.raises(ConfigurationError, match="was written by 2 processes, but there are 1"):
            trainer.train(resume_from_checkpoint=str(folders[1] / "checkpoint-3"))
