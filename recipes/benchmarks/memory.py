"""
Peak memory of SPRTrainer beside SFTTrainer, DPOTrainer and APOTrainer, on SmolLM2-135M-Instruct.

    python recipes/benchmarks/memory.py
    python recipes/benchmarks/memory.py --model FOLDER --repeats 3 --only sft spr-train spr-model

Each configuration runs in a process of its own, `--repeats` times, in turn: the same model in float32, AdamW, the same
number of rows a step and of tokens a row. Measured is the process's highest resident memory, imports included (on a
GPU: what torch has allocated there at its highest, whatever a trainer sets back in between).

- floor: everything is imported and the model is loaded, nothing else.
- sft: SFTTrainer.
- spr-train: SPRTrainer on given responses with rewards; nothing is sampled, so that it is the training phase alone.
- spr-function, spr-model: whole runs: each round samples `--generations` responses to each of `--prompts` prompts,
  scores them, with a function or with a reward model as large as the policy, and trains on them; held-out prompts are
  sampled for and scored too.
- dpo, dpo-precomputed, apo: on pairs, as many a step as there are rows elsewhere; dpo-half: half as many, and so as
  many responses.

All rows are equally long, sampled ones too: no response is ended by a stop token. Runs in rounds have two, so that the
second one's beginning, with whatever training has left behind, is inside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


os.environ.setdefault("CI", "1")  # no telemetry
sys.path.insert(0, str(Path(__file__).parent))

import common
import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_extras import APOConfig, APOTrainer, SPRConfig, SPRTrainer


datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# What makes measurements of time steady keeps glibc from giving memory back: not here.
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
ROUNDS = 2
NEVER = "<empty_output>"
TITLES = {
    "floor": "imports and the model, nothing else",
    "sft": "SFTTrainer",
    "spr-train": "SPRTrainer, training phase alone",
    "spr-function": "SPRTrainer, whole run, reward function",
    "spr-model": "SPRTrainer, whole run, reward model as large as the policy",
    "dpo": "DPOTrainer",
    "dpo-half": "DPOTrainer, half as many pairs (as many responses)",
    "dpo-precomputed": "DPOTrainer, reference log-probs computed ahead",
    "apo": "APOTrainer",
}
PHASES = ("sample", "score", "importance", "train")


# ---- Data ----


def words_of(tokenizer: Any) -> list[str]:
    """Words that are one token each with the space before them."""
    found = [token for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", token)]
    return sorted(token[1:] for token in found)


def make_text(draw: random.Random, words: list[str], tokens: int) -> str:
    return "".join(f" {draw.choice(words)}" for _ in range(tokens))


def make_rows(tokenizer: Any, prompts: int, of_each: int, options: argparse.Namespace, seed: int = 0) -> list[dict]:
    """`of_each` completions of each prompt, with a reward; exactly `tokens` tokens with the prompt and the EOS."""
    draw, words = random.Random(seed), words_of(tokenizer)
    length = options.tokens - options.prompt_tokens - 1
    rows = []
    for _ in range(prompts):
        prompt = make_text(draw, words, options.prompt_tokens)
        for _ in range(of_each):
            rows.append({"prompt": prompt, "completion": make_text(draw, words, length), "reward": draw.random()})
    row = rows[0]
    assert len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) == options.tokens - 1
    return rows


def as_pairs(rows: list[dict]) -> datasets.Dataset:
    """Rows of two completions a prompt as pairs."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return datasets.Dataset.from_list(
        [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in pairs]
    )


def last_letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that costs nothing and has few ties."""
    return [sum(map(ord, text[-6:])) / 1000 for text in completions]


def save_reward_model(options: argparse.Namespace) -> None:
    """The policy with a random head of one label."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(options.reward_model)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.reward_model)


# ---- One configuration, in its own process ----


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """The process's highest memory so far, GB."""
    if not torch.cuda.is_available():
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return
    seen = [0]
    reset = torch.cuda.reset_peak_memory_stats

    def noted(*args: Any) -> None:
        # A trainer that looks at its phases sets torch's peak back: what was before counts all the same.
        seen.append(torch.cuda.max_memory_allocated())
        reset(*args)

    torch.cuda.reset_peak_memory_stats = noted
    try:
        yield lambda: max(*seen, torch.cuda.max_memory_allocated()) / 1e9
    finally:
        torch.cuda.reset_peak_memory_stats = reset


def make_trainer(name: str, folder: Path, options: argparse.Namespace) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    # A token that is not said: sampled rows are then as long as given ones. Rows of changing lengths take more memory
    # (glibc's heap has holes), whoever trains on them.
    tokenizer.eos_token = NEVER
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    batch = options.batch_size
    own = {"gradient_checkpointing": options.gradient_checkpointing}
    if name == "floor":
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        # Files are mapped: what has not been read takes no memory yet.
        sum(float(parameter.detach().sum()) for parameter in model.parameters())
        return None
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    if name.startswith("dpo"):
        batch = batch // 2 if name == "dpo-half" else batch
        data = as_pairs(make_rows(tokenizer, options.steps * ROUNDS * batch, 2, options))
        own |= {"precompute_ref_log_probs": name == "dpo-precomputed", "num_train_epochs": 1}
        return DPOTrainer(args=DPOConfig(**common.arguments(folder, batch, **own)), train_dataset=data, **given)
    if name == "apo":
        data = as_pairs(make_rows(tokenizer, options.steps * ROUNDS * batch, 2, options))
        own |= {"num_rounds": ROUNDS, "round_data": "split"}
        return APOTrainer(args=APOConfig(**common.arguments(folder, batch, **own)), train_dataset=data, **given)
    if name == "sft":
        rows = datasets.Dataset.from_list(make_rows(tokenizer, options.steps * ROUNDS, batch, options))
        config = SFTConfig(**common.arguments(folder, batch, num_train_epochs=1, **own))
        return SFTTrainer(args=config, train_dataset=rows.remove_columns("reward"), **given)
    own |= {"num_rounds": ROUNDS, "round_data": "split"}
    if name == "spr-train":
        # The rows of a prompt stay together: a step's worth for each.
        rows = datasets.Dataset.from_list(make_rows(tokenizer, options.steps * ROUNDS, batch, options))
        config = SPRConfig(**common.arguments(folder, batch, num_generations=0, **own))
        return SPRTrainer(args=config, train_dataset=rows, **given)
    prompts = datasets.Dataset.from_list(make_rows(tokenizer, options.prompts * ROUNDS + options.heldout, 1, options))
    prompts = prompts.select_columns(["prompt"])
    train = options.prompts * ROUNDS
    own |= {
        "num_generations": options.generations,
        "max_completion_length": options.tokens - options.prompt_tokens,
        "generation_batch_size": options.generation_batch_size,
    }
    return SPRTrainer(
        args=SPRConfig(**common.arguments(folder, batch, **own)),
        train_dataset=prompts.select(range(train)),
        eval_dataset=prompts.select(range(train, train + options.heldout)),
        reward_funcs=last_letters if name == "spr-function" else options.reward_model,
        **given,
    )


def run_child(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    with peak() as highest, tempfile.TemporaryDirectory(dir=options.dir) as folder:
        trainer = make_trainer(options.child, Path(folder), options)
        phases = []
        if trainer is not None:
            trainer.train()
            trainer.save_model()
            phases = [
                {phase: row.get(f"{phase}_memory_gb") for phase in PHASES}
                for row in getattr(trainer, "round_summaries", [])
                if "train_memory_gb" in row
            ]
        found = {"peak_gb": highest(), "phases": phases, "seconds": time.monotonic() - begun}
    print(json.dumps(found))


# ---- All of them ----


def start_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    if Path(options.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, __file__, "--child", name]
    for flag, value in vars(options).items():
        if flag in ("child", "only", "repeats") or value is None or value is False:
            continue
        command += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {} if name == "reward-model" else json.loads(output.splitlines()[-1])


def measure(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        options.reward_model = str(Path(folder) / "reward-model")
        if "spr-model" in found:
            start_child("reward-model", options)
        for repeat in range(options.repeats):
            for name, runs in found.items():
                runs.append(start_child(name, options))
                print(
                    f"{repeat + 1}: {name} {runs[-1]['peak_gb']:.3f} GB, {runs[-1]['seconds']:.0f} s, "
                    f"{runs[-1]['phases']}",
                    file=sys.stderr,
                    flush=True,
                )
    print(
        f"\n{common.machine()}; {options.batch_size} rows of {options.tokens} tokens a step; "
        f"{options.prompts} prompts x {options.generations} responses a round, {options.heldout} held-out prompts"
        f"{'; gradient checkpointing' * options.gradient_checkpointing}\n"
    )
    peaks = {name: [run["peak_gb"] for run in runs] for name, runs in found.items()}
    stock = statistics.median(peaks["sft"]) if "sft" in peaks else None
    print("| | peak, GB, median | each run | ratio to SFTTrainer |\n|---|---|---|---|")
    for name, each in peaks.items():
        middle = statistics.median(each)
        ratio = "-" if stock is None else f"{middle / stock:.3f}"
        print(f"| {TITLES[name]} | {middle:.3f} | {', '.join(f'{p:.3f}' for p in sorted(each))} | {ratio} |")
    phases = {name: runs for name, runs in found.items() if runs[0]["phases"]}
    if not phases:
        return
    print(f"\n| peak of a phase, GB, median | round | {' | '.join(PHASES)} |\n|---|---|{'---|' * len(PHASES)}")
    for name, runs in phases.items():
        for number in range(len(runs[0]["phases"])):
            cells = []
            for phase in PHASES:
                values = [run["phases"][number][phase] for run in runs if run["phases"][number][phase] is not None]
                cells.append(f"{statistics.median(values):.3f}" if values else "-")
            print(f"| {TITLES[name]} | {number + 1} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES), help="configurations")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each configuration")
    parser.add_argument("--batch-size", type=int, default=4, help="rows (or pairs) a training step")
    parser.add_argument("--tokens", type=int, default=64, help="of a row, prompt included")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="of each half of a run, where nothing is sampled")
    parser.add_argument("--prompts", type=int, default=8, help="that a round samples for")
    parser.add_argument("--generations", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--heldout", type=int, default=8, help="held-out prompts")
    parser.add_argument("--generation-batch-size", type=int, help="responses sampled at a time; 8 prompts' by default")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--dir", help="where to put temporary files")
    parser.add_argument("--reward-model", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps wants at least 2: gradients meet Adam's state in a round's second step")
    if options.child == "reward-model":
        save_reward_model(options)
    elif options.child:
        run_child(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
