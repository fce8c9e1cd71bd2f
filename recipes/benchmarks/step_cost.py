"""
What a training step of APOTrainer or SPOTrainer costs, against DPOTrainer on the same batches; and one of SPRTrainer
against SFTTrainer.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python recipes/benchmarks/step_cost.py
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python recipes/benchmarks/step_cost.py --methods spo spo-sft
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python recipes/benchmarks/step_cost.py --methods spr
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python recipes/benchmarks/step_cost.py --lora q_proj v_proj
    python recipes/benchmarks/step_cost.py --memory
    python recipes/benchmarks/step_cost.py --memory --lora q_proj v_proj

Time: whole trainers, two DPOTrainers and those of `--methods`, run in one process and take turns, one step each in a
drawn order (each takes about 3 GB); a turn lasts from one step's beginning to the next one's, with whatever the loop,
callbacks and loggers do. The ratio is taken turn by turn, and that of the two DPOTrainers to each other is the
yardstick: what the machine calls equal. Without the two allocator settings (they keep glibc from handing memory back
after every step) the noise is about three times as large.

`--methods spr`: two SFTTrainers and an SPRTrainer, which trains on given responses with rewards, the same rows,
`--batch-size` of them a step. The thread with which SPRTrainer looks at its memory runs during the others' turns too.

`--lora MODULES`: APOTrainer and DPOTrainer train the same adapter (rank 16, alpha 32, dropout 0.05, which are those of
`--use_peft` in TRL's scripts; its modules of a Llama are `q_proj v_proj`). APOTrainer has three rounds of
`--pairs` steps, so that the ratio of each round shows what the history of the rounds before costs. A round's first
steps are not counted, nor its last one, in whose turn the boundary lies.

Memory (SPR's: `memory.py`): each configuration in a process of its own, without those settings, six steps;
APOTrainer's are three rounds of two, with both boundaries inside. What is compared is the highest resident size (on a
GPU also its own peak).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry

sys.path.insert(0, str(Path(__file__).parent))

import common
import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_extras import APOConfig, APOTrainer, SPOConfig, SPOTrainer, SPRConfig, SPRTrainer
from trl_extras.spr.trainer import WEIGHT


datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


# What stands beside DPOTrainer: settings of SPOConfig, and whether there are SFT rows, as many as pairs in a batch.
SPO: dict[str, tuple[dict[str, Any], bool]] = {
    "spo": ({}, False),
    "spo-sft": ({}, True),
    "spo-unrolled": ({"bilevel_solver": "unrolled", "inner_learning_rate": 1e-6}, False),
    "spo-central": (
        {"bilevel_solver": "unrolled", "inner_learning_rate": 1e-6, "hypergradient": "central_difference"},
        False,
    ),
    "spo-simpo": ({"loss_type": "simpo", "beta": 2.0}, False),
}
# Of a run with `--lora`.
LORA_ROUNDS = 3
METHODS = ("apo", *SPO, "spr")
STOCK = {"dpo": "DPOTrainer", "sft": "SFTTrainer"}


def stock_of(methods: list[str]) -> str:
    return "sft" if "spr" in methods else "dpo"


class Turns:
    """Hands the machine from one trainer to the next; whoever has it takes one step."""

    def __init__(self, names: list[str], steps: int, seed: int):
        draw = random.Random(seed)
        self.order = [name for _ in range(steps) for name in draw.sample(names, len(names))]
        self.condition = threading.Condition()
        self.position = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.begun: float | None = None

    def step(self, name: str) -> None:
        """Called at the beginning of each of `name`'s steps: ends its last turn and waits for its next."""
        with self.condition:
            if self.begun is not None and self.order[self.position] == name:
                self.seconds[name].append(time.perf_counter() - self.begun)
                self.begun = None
                self.position += 1
                self.condition.notify_all()
            if self.position < len(self.order):
                self.condition.wait_for(lambda: self.position >= len(self.order) or self.order[self.position] == name)
            self.begun = time.perf_counter()


class Turn(TrainerCallback):
    def __init__(self, turns: Turns, name: str):
        self.turns, self.name = turns, name

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.turns.step(self.name)
        if self.turns.position >= len(self.turns.order):
            control.should_training_stop = True
        return control


def make_model(options: argparse.Namespace) -> Any:
    if options.model is None:
        return common.make_model(layers=options.layers)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, num_hidden_layers=options.layers)


def make_responses(rows: int, tokens: int) -> datasets.Dataset:
    """The same rows as pairs would give, one a response, with a reward."""
    draw = random.Random(0)
    return datasets.Dataset.from_list(
        [
            {"prompt": pair["prompt"], "completion": pair[name], "reward": draw.random()}
            for pair in common.make_pairs(rows // 2, tokens)
            for name in ("chosen", "rejected")
        ]
    )


def make_fine_tuner(name: str, folder: Path, options: argparse.Namespace, steps: int) -> Any:
    """An SFTTrainer or an SPRTrainer."""
    settings = common.arguments(
        folder / name, options.batch_size, gradient_checkpointing=options.gradient_checkpointing
    )
    # Two rounds of so many steps, of which the first is measured.
    rows = make_responses(4 * steps * options.batch_size, options.tokens)
    given = {"model": make_model(options), "processing_class": common.make_tokenizer()}
    if name == "spr":
        config: Any = SPRConfig(**settings, num_generations=0, num_rounds=2)
        return SPRTrainer(args=config, train_dataset=rows, **given)
    config = SFTConfig(**settings, num_train_epochs=1)
    return SFTTrainer(args=config, train_dataset=rows.remove_columns("reward"), **given)


def make_trainer(name: str, folder: Path, options: argparse.Namespace, steps: int, **kwargs: Any) -> Any:
    if name.startswith(("sft", "spr")):
        return make_fine_tuner(name, folder, options, steps)
    tokenizer = common.make_tokenizer()
    rounds = kwargs.pop("num_rounds", 2)
    own = {
        "precompute_ref_log_probs": options.precompute,
        "gradient_checkpointing": options.gradient_checkpointing,
        **kwargs,
    }
    settings = common.arguments(folder / name, options.batch_size, **own)
    rows = steps * options.batch_size
    method = name.removesuffix("-precomputed")
    more: dict[str, Any] = {}
    if options.lora:
        target: Any = options.lora[0] if options.lora == ["all-linear"] else options.lora
        more["peft_config"] = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules=target, task_type="CAUSAL_LM"
        )
        rounds = LORA_ROUNDS
        rows *= 1 if method == "apo" else LORA_ROUNDS
    if method == "apo":
        config: Any = APOConfig(**settings, num_rounds=rounds, round_data="split")
        rows *= rounds
    elif method in SPO:
        own, has_rows = SPO[method]
        config = SPOConfig(**{**settings, **own}, num_train_epochs=1)
        if has_rows:
            pairs = common.make_pairs(64, options.tokens, seed=1)
            more["sft_dataset"] = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    else:
        config = DPOConfig(**settings, num_train_epochs=1)
    loads = options.lora or method == "apo" or config.precompute_ref_log_probs
    trainer: Any = {"apo": APOTrainer, **dict.fromkeys(SPO, SPOTrainer)}.get(method, DPOTrainer)
    return trainer(
        model=make_model(options),
        # Upstream would load a reference from the model's path; it has none.
        ref_model=None if loads else make_model(options),
        args=config,
        train_dataset=common.make_pairs(rows, options.tokens),
        processing_class=tokenizer,
        **more,
    )


def measure_time(options: argparse.Namespace) -> None:
    missing = [f"{name}={value}" for name, value in ALLOCATOR.items() if os.environ.get(name) != value]
    if missing and not torch.cuda.is_available():
        print(
            f"Set {' '.join(missing)} in front of the command: without them the noise is about three times as large."
        )
    stock = stock_of(options.methods)
    names = [stock, f"{stock} again", *options.methods]
    steps = options.warmup + options.pairs + (1 if options.lora else 3)
    # Trainers have a few steps more than turns: a turn is over when the next step begins.
    turns = Turns(names, LORA_ROUNDS * steps - 3 if options.lora else steps - 3, options.seed)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        trainers = {name: make_trainer(name, Path(folder), options, steps) for name in names}
        threads = []
        for name, trainer in trainers.items():
            trainer.add_callback(Turn(turns, name))
            threads.append(threading.Thread(target=trainer.train, name=name))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if options.lora:
        print_rounds(options, turns, steps, trainers)
        return
    seconds = {name: values[options.warmup :] for name, values in turns.seconds.items()}
    rows = list(zip(*(seconds[name] for name in names), strict=True))
    print(
        f"\n{common.machine()}; {options.layers} layers, {options.batch_size} {'rows' if stock == 'sft' else 'pairs'} "
        f"of {options.tokens} tokens, {len(rows)} turns each\n"
    )
    title = STOCK[stock]
    print("| | ratio, median (middle half) |\n|---|---|")
    print(f"| {title} against itself (the yardstick) | {common.spread([row[1] / row[0] for row in rows])} |")
    for number, name in enumerate(options.methods, start=2):
        print(f"| {name} against {title} | {common.spread([row[number] / row[0] for row in rows])} |")
        print(f"| {name} against the second {title} | {common.spread([row[number] / row[1] for row in rows])} |")


def print_rounds(options: argparse.Namespace, turns: Turns, steps: int, trainers: dict[str, Any]) -> None:
    """The ratio of every round of each method, with `--lora`."""
    print(
        f"\n{common.machine()}; {options.layers} layers, LoRA of rank 16 on {' '.join(options.lora)}, "
        f"{options.batch_size} pairs of {options.tokens} tokens\n"
    )
    first, second, *ours = turns.seconds
    print("| | round | turns | ratio, median (middle half) |\n|---|---|---|---|")
    pairs = [(second, first, "DPOTrainer against itself (the yardstick)")]
    pairs += [(name, stock, f"{name} against {stock}") for name in ours for stock in (first, second)]
    for name, stock, title in pairs:
        for number in range(LORA_ROUNDS):
            # A round's beginning is warm-up, and its end has the boundary in its turn.
            some = slice(number * steps + options.warmup, (number + 1) * steps - 1)
            each = [b / a for a, b in zip(turns.seconds[stock][some], turns.seconds[name][some], strict=True)]
            print(f"| {title} | {number + 1} | {len(each)} | {common.spread(each)} |")
    for name in ours:
        rows = trainers[name].round_summaries
        print(f"\n{name}: boundaries took {', '.join(str(row['boundary_weights_seconds']) for row in rows)} s")


def measure_bare(options: argparse.Namespace) -> None:
    """Only `training_step` and the optimizer's step on one batch, without the loop around them: quicker."""
    stock = stock_of(options.methods)
    names = [stock, f"{stock} again", *options.methods]
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        trainers = {name: make_trainer(name, Path(folder), options, 4) for name in names}

        def step(trainer: Any) -> float:
            begun = time.perf_counter()
            trainer.training_step(trainer.model, trainer.data_collator(batch[trainer]))
            trainer.optimizer.step()
            trainer.model.zero_grad()
            return time.perf_counter() - begun

        given = {
            t: t._prepared_train_dataset if isinstance(t, SPRTrainer) else t.train_dataset for t in trainers.values()
        }
        batch = {t: [rows[i] for i in range(options.batch_size)] for t, rows in given.items()}
        for row in batch[trainers["spr"]] if "spr" in trainers else ():
            row[WEIGHT] = 1.5
        for trainer in trainers.values():
            trainer.create_optimizer_and_scheduler(10)
            trainer.current_gradient_accumulation_steps = 1
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(options.warmup + options.pairs):
            for name in draw.sample(names, len(names)):
                taken = step(trainers[name])
                if turn >= options.warmup:
                    seconds[name].append(taken)
    print(
        f"\n{common.machine()}; {options.layers} layers, {options.batch_size} {'rows' if stock == 'sft' else 'pairs'} "
        f"of {options.tokens} tokens\n"
    )
    print(f"| | ratio to {STOCK[stock]}, median (middle half) |\n|---|---|")
    for name in names[1:]:
        print(f"| {name} | {common.spread([b / a for a, b in zip(seconds[stock], seconds[name], strict=True)])} |")


def measure_memory(options: argparse.Namespace) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    peaks: dict[str, list[float]] = {}
    names = [f"{name}{suffix}" for suffix in ("", "-precomputed") for name in ("dpo", *options.methods)]
    for repeat in range(options.repeats):
        for name in names:
            command = [sys.executable, __file__, "--child", name, "--batch-size", str(options.batch_size)]
            command += ["--layers", str(options.layers)]
            command += ["--lora", *options.lora] if options.lora else []
            command += ["--gradient-checkpointing"] * options.gradient_checkpointing
            command += ["--tokens", str(options.tokens), "--dir", options.dir or tempfile.gettempdir()]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            peak = json.loads(output.splitlines()[-1])["peak_gb"]
            peaks.setdefault(name, []).append(peak)
            print(f"{repeat + 1}: {name} {peak:.3f} GB", flush=True)
    print("\n| | peak, GB, each run | ratio of the medians |\n|---|---|---|")
    for suffix in ("", "-precomputed"):
        stock = sorted(peaks[f"dpo{suffix}"])
        middle = len(stock) // 2
        what = ", reference log-probs computed ahead" if suffix else ""
        for name in ("dpo", *options.methods):
            ours = sorted(peaks[f"{name}{suffix}"])
            each = ", ".join(f"{peak:.2f}" for peak in ours)
            print(f"| {name}{what} | {each} | {ours[middle] / stock[middle]:.3f} |")


def memory_child(options: argparse.Namespace) -> None:
    name = options.child
    options.precompute = name.endswith("precomputed")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        rounds = {"num_rounds": 3} if name.startswith("apo") else {}
        # With --lora all of them get three times as many steps.
        trainer = make_trainer(name, Path(folder), options, 2 if rounds or options.lora else 6, **rounds)
        trainer.train()
        trainer.save_model()
        assert trainer.state.global_step == 6
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=36, help="turns of each trainer that count")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precompute", action="store_true", help="reference log-probabilities computed ahead")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["apo"], help="what stands beside the stock trainer"
    )
    parser.add_argument("--model", help="SmolLM2-135M-Instruct's id or folder, for its weights instead of random ones")
    parser.add_argument("--layers", type=int, default=30, help="of the model; fewer for a quicker look")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--lora", nargs="+", metavar="MODULE", help="train an adapter on these modules, or all-linear")
    parser.add_argument(
        "--bare", action="store_true", help="training steps alone, on one batch, without a loop: quick"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each configuration, with --memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where to put temporary files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "spr" in options.methods and (len(set(options.methods)) > 1 or options.memory):
        parser.error("`spr` has SFTTrainer beside it: measure it alone, and its memory with memory.py")
    if options.lora and options.methods != ["apo"]:
        parser.error("--lora is about the rounds of `apo`: leave --methods out")
    if options.lora and options.bare:
        parser.error("--lora goes through rounds, which --bare has none of: leave one out")
    if options.child:
        memory_child(options)
    elif options.memory:
        measure_memory(options)
    elif options.bare:
        measure_bare(options)
    else:
        measure_time(options)


if __name__ == "__main__":
    main()
