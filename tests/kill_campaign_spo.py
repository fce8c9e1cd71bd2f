"""
The part of the kill campaign with a floor (`python tests/kill_campaign.py 30 --method spo`, or `apo_spo`): what such
runs are drawn from, where they can be hit besides, and what has to hold for them beyond the rest:

- the SFT rows of every window are those of the run left alone, in whatever life it was computed: children write down
  which they drew;
- the floor in every whole checkpoint is that of the run left alone, at every kill, and so is the one beside the run
  unless the life that was killed had another initial model in memory.

In some lives that go on from a checkpoint the model handed over is another one: the newest checkpoint's weights, or
weights that no run had. The floor has to stay the first model's. Not where the reference would follow the model: a
run without rounds reads it from the model if it is computed ahead and no `ref_model` is given. Rounds keep their own.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from trl import DPOTrainer

from tests import tiny
from trl_extras import APOSPOTrainer, SPOTrainer
from trl_extras.rounds import checkpoints, durable
from trl_extras.spo.sft_data import SFTRows


METHODS: dict[str, Any] = {"spo": SPOTrainer, "apo_spo": APOSPOTrainer}
FLOOR_FILE = Path("_spo") / "sft_optimum.safetensors"
SFT_KINDS = ("text", "prompt-completion", "messages", "conversations", "conversational prompt-completion")

# As in `kill_campaign.LEVELS`: what the trainer is doing, and the operation inside it.
FLOOR = "floor of the SFT rows"
DOING = (
    (SPOTrainer, "_begin", "start of a run"),
    (SPOTrainer, "_begin_window", "a window's begin"),
    (SPOTrainer, "_end_window", "a window's end"),
    (SPOTrainer, "_initial_floor", FLOOR),
    (DPOTrainer, "_precompute_ref_logps", "reference log-probs, ahead"),
)
OPERATIONS = (
    (SFTRows, "batch", "SFT rows drawn"),
    (SPOTrainer, "_write_floor", "floor written"),
    (SPOTrainer, "_move_inside", "inner steps"),
    (SPOTrainer, "_settle_hinges", "hinges settled"),
    (SPOTrainer, "_correct_gradient", "hypergradient"),
)


# ---- What is drawn ----


def draw_objective(draw: random.Random, processes: int) -> dict[str, Any]:
    """The settings of the objective, of its SFT rows, and of the model."""
    solver = draw.choice(["penalty", "unrolled", "unrolled", "alternating"])
    loss = draw.choice([["sigmoid"], ["sigmoid"], ["simpo"], ["simpo"], ["dpop"], ["ipo"], ["sigmoid", "simpo"]])
    lower_level = draw.choice([None, "both", "both", "sft_dataset", "sft_dataset", "chosen"])
    kind = draw.choice(SFT_KINDS)
    settings: dict[str, Any] = {
        "bilevel_solver": solver,
        "loss_type": loss,
        "lower_level": lower_level,
        "sft": None if lower_level == "chosen" else {"rows": draw.randint(3, 17), "kind": kind},
        "sft_coef": draw.choice([1.0, 1.0, 0.3, 0.0 if solver == "penalty" else 2.0]),
        "sft_tolerance": draw.choice([0.0, 0.0, 0.05]),
        "sft_optimum": draw.choice(["reference", "reference", "reference", "1.5"]),
        "hinge": draw.choice(["example", "batch"]),
        "gradient_accumulation_steps": draw.choice([1, 2, 3]),
        # Attention with dropout; GPT-2 drops embeddings and residuals as well.
        "model": draw.choice(["plain", "plain", "attention dropout", "gpt2"]),
    }
    if len(loss) > 1:
        settings["loss_weights"] = [1.0, 0.5]
    if settings["sft"] is not None:
        settings["sft_batch_size"] = draw.choice([None, 1, 3])
    if solver != "penalty":
        settings["inner_learning_rate"] = draw.choice([None, 5e-3])
        settings["inner_steps"] = draw.choice([1, 2])
    if solver == "unrolled" and draw.random() < 0.5:
        settings.update(hypergradient="central_difference", inner_steps=1)
    return settings


def draw_settings(draw: random.Random, processes: int) -> dict[str, Any]:
    """A run without rounds."""
    save = draw.choice([1, 2, 3])
    settings = {
        # The last window of an epoch is often a short one.
        "rows": 2 * processes * draw.randint(4, 7),
        "num_train_epochs": draw.choice([1, 2, 2, 3]),
        "save_strategy": draw.choice(["steps"] * 6 + ["epoch", "no"]),
        "save_steps": save,
        "save_total_limit": draw.choice([1, 1, 2, None]),
        "precompute_ref_log_probs": draw.random() < 0.3,
        "train_sampling_strategy": draw.choice(["sequential", "random"]),
        "lr_scheduler_type": draw.choice(["linear", "cosine"]),
        "optim": draw.choice(["adamw_torch"] * 3 + ["rmsprop"]),
        "ref_model": draw.random() < 0.5,
        "eval_strategy": draw.choice(["no", "no", "steps"]),
        **draw_objective(draw, processes),
    }
    if settings["eval_strategy"] == "steps":
        settings["eval_steps"] = save
    return settings


def may_take_another_model(method: str | None, settings: dict[str, Any]) -> bool:
    """Whether nothing but the floor can depend on the model that a resumed run gets."""
    if method == "apo_spo":
        return True
    ahead = settings["precompute_ref_log_probs"] or set(settings["loss_type"]) <= {"simpo"}
    return method == "spo" and (settings["ref_model"] or not ahead)


# ---- Runs ----


def save_models(base: Path) -> None:
    """The models of [`draw_objective`], in folders below `base`."""
    tiny.save_model(base / "plain")
    tiny.save_model(base / "attention dropout", attention_dropout=0.1)
    make_gpt2(seed=0).save_pretrained(base / "gpt2")
    tiny.make_tokenizer().save_pretrained(base / "gpt2")


def make_gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tiny.WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0,
            eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def make_sft(rows: int, kind: str) -> datasets.Dataset:
    """
    SFT rows in one of SFTTrainer's formats, of uneven lengths: what preference learning pushes down, so that it sinks
    below the floor.
    """
    content = []
    for row in tiny.make_pairs(rows):
        prompt, completion = row["prompt"], row["rejected"]
        asked, answered = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        said = [{"from": "user", "value": prompt}, {"from": "assistant", "value": completion}]
        content.append(
            {
                "text": {"text": prompt + completion},
                "prompt-completion": {"prompt": prompt, "completion": completion},
                "messages": {"messages": [asked, answered]},
                "conversations": {"conversations": said},
                "conversational prompt-completion": {"prompt": [asked], "completion": [answered]},
            }[kind]
        )
    return datasets.Dataset.from_list(content)


def make_eval_rows() -> datasets.Dataset:
    return tiny.make_pairs(5, seed=50)


def save_sft(case: Any) -> None:
    """The SFT rows where all processes can read them."""
    if case.method is not None and case.settings["sft"] is not None:
        make_sft(**case.settings["sft"]).save_to_disk(case.folder / "sft")


def arguments(case: Any, other: str | None) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """
    Of a case the folder of its first model, the settings of the config, and arguments of the constructor.

    Args:
        other: see [`other_model`].
    """
    settings = dict(case.settings)
    kind, sft = settings.pop("model"), settings.pop("sft")
    base = case.base / kind
    given: dict[str, Any] = {}
    if settings.pop("ref_model", False):
        given["ref_model"] = make_gpt2(seed=9) if kind == "gpt2" else tiny.make_model(seed=9)
    if kind != "plain":
        settings.update(disable_dropout=False, model_init_kwargs={"attn_implementation": "eager"})
    if sft is not None:
        given["sft_dataset"] = (
            datasets.load_from_disk(str(case.folder / "sft")) if case.processes > 1 else make_sft(**sft)
        )
    if settings.get("eval_strategy", "no") != "no":
        given["eval_dataset"] = make_eval_rows()
        settings["per_device_eval_batch_size"] = 2
    if other is not None:
        given["model"] = other_model(base, other, settings.get("model_init_kwargs") or {})
    return base, settings, given


def other_model(base: Path, other: str, how: dict[str, Any]) -> Any:
    """
    A model of the same name as the first one with other weights.

    Args:
        other: a folder with weights, or "" for weights that no run had.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how)
    if other:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict())
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    return model


def draw_other(case: Any, folder: Path, draw: random.Random) -> str | None:
    """The model of the next life: None for the first one, or see [`other_model`]."""
    found = checkpoints.list_checkpoints(folder)
    if not found or not may_take_another_model(case.method, case.settings) or draw.random() < 0.3:
        return None
    return draw.choice([str(found[-1][1]), str(found[-1][1]), ""])


# ---- What is written down, and compared ----


def write_down_rows(log: Path, rank: int) -> None:
    """Patch this process so that it writes down which SFT rows it takes, with the place in the run."""
    original: Callable[..., list[int]] = SPOTrainer._sft_indices

    def patched(self: Any, position: int, training: bool) -> list[int]:
        rows = original(self, position, training)
        if training:
            line = json.dumps([rank, self.state.global_step, position, rows]) + "\n"
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        return rows

    SPOTrainer._sft_indices = patched  # type: ignore[method-assign]


def drawn_rows(log: Path) -> dict[tuple[int, int, int], set[tuple[int, ...]]]:
    """The SFT rows by process, step and micro-batch; more than one set of them where lives do not agree."""
    found: dict[tuple[int, int, int], set[tuple[int, ...]]] = {}
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            rank, step, position, rows = json.loads(line)
            found.setdefault((rank, step, position), set()).add(tuple(rows))
    return found


def problems(folder: Path, alone: Path, logs: tuple[Path, Path], first_model: bool, done: bool) -> list[str]:
    """
    What is wrong with the floor and the SFT rows after a life.

    Args:
        logs: what [`write_down_rows`] wrote for `folder` and for `alone`.
        first_model: whether the life had the run's first model.
        done: whether it has come to its end.
    """
    found = []
    expected = durable.checksum(alone / FLOOR_FILE) if (alone / FLOOR_FILE).is_file() else None
    places = [folder / FLOOR_FILE] if first_model or done else []
    for _, checkpoint in checkpoints.list_checkpoints(folder):
        places.append(checkpoint / FLOOR_FILE)
        if expected is not None and not places[-1].is_file():
            found.append(f"{checkpoint.name} has no floor")
    found.extend(
        f"{path.relative_to(folder)}: not the floor of the run left alone"
        for path in places
        if path.is_file() and durable.checksum(path) != expected
    )
    here, there = map(drawn_rows, logs)
    for place in sorted(here):
        if here[place] != there.get(place):
            rank, step, position = place
            found.append(
                f"step {step}, micro-batch {position}, process {rank}: SFT rows {sorted(here[place])}, but "
                f"{sorted(there.get(place, set()))} in the run left alone"
            )
            break
    if done and here.keys() != there.keys():
        found.append("other steps take SFT rows than in the run left alone")
    return found
