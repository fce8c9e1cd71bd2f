"""
What on-policy rounds cost: sampling, memory and a boundary by phase, each beside its yardstick in one run.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python recipes/benchmarks/rollouts.py sampling
    python recipes/benchmarks/rollouts.py memory
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python recipes/benchmarks/rollouts.py phases

`sampling`: the sampler (with the log-probabilities that it keeps) and the whole phase (decoding and writing included)
against `model.generate` on the same batches with the same settings, in turn, in random order; `model.generate` against
itself is the yardstick.

`memory`: peak resident memory (on a GPU: allocated) of a run of two rounds on prompts against one on given pairs, both
with precomputed reference log-probabilities, pairs of the same length, a process each.

`phases`: where the time between two rounds goes.

A model of SmolLM2-135M's shape with random weights, so completions are never ended by a stop token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import datasets
import torch
from transformers import GenerationConfig

from trl_extras import APOConfig, APOTrainer
from trl_extras.rollouts.sampling import SamplingSettings, TransformersSampler, plan_batches
from trl_extras.rollouts.store import RolloutStore
from trl_extras.rollouts.trainer import RolloutsTrainer


ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def make_prompts(rows: int, tokens: int, seed: int = 0) -> datasets.Dataset:
    """Prompts of 1 to 2 times `tokens` / 2 tokens."""
    draw = random.Random(seed)
    return datasets.Dataset.from_dict(
        {
            "prompt": [
                " ".join(f"w{draw.randrange(2, 1000)}" for _ in range(draw.randint(tokens // 2, tokens)))
                for _ in range(rows)
            ]
        }
    )


def last_word(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that costs nothing and has few ties."""
    return [float(sum(map(ord, text[-6:]))) for text in completions]


# ---- Sampling ----


def measure_sampling(options: argparse.Namespace) -> None:
    model = common.make_model().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # Random weights give nearly flat distributions, whose nucleus is most of the vocabulary: as peaked as a trained
    # model's, they cost what sampling costs in use.
    model.lm_head.weight.data.mul_(10)
    tokenizer = common.make_tokenizer()
    prompts = make_prompts(options.prompts, 32)
    prompts = prompts.add_column("prompt_ids", [tokenizer(text)["input_ids"] for text in prompts["prompt"]])
    lengths = [len(ids) for ids in prompts["prompt_ids"]]
    batches = plan_batches(lengths, range(len(prompts)), 8, 0, 0, "benchmark")
    settings = SamplingSettings(0.7, 0.9, 0, None, 1.0, options.tokens, (1,), 0)
    sampler = TransformersSampler(model, settings)
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=options.tokens, eos_token_id=1,
        pad_token_id=0, num_return_sequences=options.generations,
    )  # fmt: skip

    @torch.inference_mode()
    def generate(batch: Any) -> None:
        ids = [prompts[position]["prompt_ids"] for position in batch.positions]
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
        torch.manual_seed(batch.seed)
        model.generate(input_ids=padded, attention_mask=mask, generation_config=config)

    def sample(batch: Any) -> None:
        sampler([prompts[position]["prompt_ids"] for position in batch.positions], options.generations, batch.seed)

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        phase = make_phase(Path(folder), model, tokenizer, settings, prompts, options.generations)
        kinds: dict[str, Callable[[Any], None]] = {
            "generate": generate, "generate again": generate, "sampler": sample, "phase": phase,
        }  # fmt: skip
        for work in kinds.values():
            work(batches[0])
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        draw = random.Random(0)
        for turn in range(options.turns):
            for name in draw.sample(list(kinds), len(kinds)):
                started = time.perf_counter()
                kinds[name](batches[turn % len(batches)])
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - started)
            print(f"turn {turn + 1} of {options.turns}", end="\r", file=sys.stderr, flush=True)
    tokens = 8 * options.generations * options.tokens
    print(
        f"\n{common.machine()}; 8 prompts x {options.generations} x {options.tokens} tokens, {options.turns} turns\n"
    )
    print("| | time against `generate`, median (middle half) | tokens a second, median |\n|---|---|---|")
    titles = {
        "generate again": "`model.generate` against itself (the yardstick)",
        "sampler": "the sampler, log-probabilities kept",
        "phase": "the whole phase: decoded and written too",
    }
    print(f"| `model.generate` | 1 | {tokens / statistics.median(seconds['generate']):.0f} |")
    for name, title in titles.items():
        ratios = [b / a for a, b in zip(seconds["generate"], seconds[name], strict=True)]
        print(f"| {title} | {common.spread(ratios)} | {tokens / statistics.median(seconds[name]):.0f} |")


def make_phase(
    folder: Path, model: Any, tokenizer: Any, settings: SamplingSettings, prompts: Any, generations: int
) -> Callable[[Any], None]:
    """The trainer's own sampling phase for one batch, without the rest of a trainer."""
    store = RolloutStore(folder / "store", {"policy": "none"}, True, lambda: None, "Benchmark")
    store.open()
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1, process_index=0, unwrap_model=lambda model: model, autocast=torch.no_grad,
            wait_for_everyone=lambda: None,
        ),
        model=model, args=SimpleNamespace(disable_tqdm=True), is_world_process_zero=lambda: True,
        _text_tokenizer=lambda: tokenizer, _sampling_settings=lambda: settings,
    )  # fmt: skip
    trainer._mine = lambda batches: list(batches)
    trainer._vllm, trainer._gathered = None, nullcontext
    for name in ("_sampler", "_sample_here"):
        setattr(trainer, name, partial(getattr(RolloutsTrainer, name), trainer))
    trainer._progress = lambda total, what: RolloutsTrainer._progress(trainer, total, what)
    task: Any = SimpleNamespace(
        store=store, prompts=prompts, num_generations=generations, where="Benchmark", given=False
    )

    def phase(batch: Any) -> None:
        RolloutsTrainer._sample(trainer, task, [batch])
        (store.folder / "samples" / f"{batch.index:06d}.parquet").unlink()

    return phase


# ---- A run ----


def run(options: argparse.Namespace, folder: Path, on_policy: bool) -> Any:
    rounds, tokens = 2, options.tokens
    rows = options.prompts
    settings = common.arguments(folder / "run", options.batch_size, precompute_ref_log_probs=True)
    judged: dict[str, Any] = {}
    if on_policy:
        # As many prompt tokens as make the pairs as long as the given ones.
        data = datasets.Dataset.from_dict(
            {"prompt": [row["prompt"].strip() for row in common.make_pairs(rows * rounds, tokens)]}
        )
        judged = {"reward_funcs": last_word, "eval_dataset": data.select(range(options.heldout))}
        length = tokens - tokens // 3
        settings |= {"num_generations": options.generations, "max_completion_length": length}
    else:
        data = common.make_pairs(rows * rounds, tokens)
    trainer = APOTrainer(
        model=common.make_model(), args=APOConfig(**settings, num_rounds=rounds), train_dataset=data,
        processing_class=common.make_tokenizer(), **judged,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def measure_memory(options: argparse.Namespace) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    peaks: dict[str, list[float]] = {"offline": [], "on-policy": []}
    for repeat in range(options.repeats):
        for name, found in peaks.items():
            command = [sys.executable, __file__, "memory", "--child", name]
            for flag in ("batch-size", "tokens", "prompts", "generations", "heldout"):
                command += [f"--{flag}", str(getattr(options, flag.replace("-", "_")))]
            command += ["--dir", options.dir or tempfile.gettempdir()]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(output.splitlines()[-1])["peak_gb"])
            print(f"{repeat + 1}: {name} {found[-1]:.3f} GB", flush=True)
    print(f"\n{common.machine()}; {options.batch_size} pairs of {options.tokens} tokens a step\n")
    print("| | peak, GB, each run | ratio of the medians |\n|---|---|---|")
    for name, found in peaks.items():
        ratio = statistics.median(found) / statistics.median(peaks["offline"])
        print(f"| {name} | {', '.join(f'{peak:.2f}' for peak in sorted(found))} | {ratio:.3f} |")


def memory_child(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        run(options, Path(folder), options.child == "on-policy")
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"peak_gb": peak}))


def measure_phases(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        first, second = run(options, Path(folder), True).round_summaries
    print(
        f"\n{common.machine()}; {options.prompts} prompts x {options.generations} completions, {options.heldout} "
        f"held-out prompts, {options.tokens - options.tokens // 3} tokens each; training in batches of "
        f"{options.batch_size}\n"
    )
    # The second round's boundary: the first one extrapolates nothing.
    parts = {
        "held-out prompts, the iterate": first["heldout_iterate"]["seconds"],
        "held-out prompts, the extrapolated policy": first["heldout_extrapolated"]["seconds"],
        "weights: checked, written, extrapolated, written": second["boundary_weights_seconds"],
        "sampling": second["sample_seconds"],
        "scoring": second["score_seconds"],
        "pairs and the tables on disk": (
            second["boundary_rows_seconds"] - second["sample_seconds"] - second["score_seconds"]
        ),
        "reference log-probabilities": second["boundary_reference_seconds"],
        "(the round's training, for comparison)": second["train_seconds"],
    }
    print("| phase | seconds | share of the boundary |\n|---|---|---|")
    whole = sum(value for name, value in parts.items() if not name.startswith("("))
    for name, value in parts.items():
        print(f"| {name} | {value:.2f} | {'' if name.startswith('(') else f'{value / whole:.0%}'} |")
    print(f"\nSampling: {second['tokens_per_second']:.0f} tokens a second.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sampling", "memory", "phases"))
    parser.add_argument("--turns", type=int, default=12, help="sampling: batches of each kind that count")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a round")
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--heldout", type=int, default=16, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=24, help="tokens a completion; memory, phases: of a pair's row")
    parser.add_argument("--batch-size", type=int, default=2, help="pairs a training step")
    parser.add_argument("--repeats", type=int, default=3, help="memory: processes of each kind")
    parser.add_argument("--dir", help="where to put temporary files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (
        options.what != "memory"
        and not torch.cuda.is_available()
        and any(name not in os.environ for name in ALLOCATOR)
    ):
        print("Set the allocator as the command above does: without it the noise is about three times as large.")
    if options.child:
        memory_child(options)
    elif options.what == "sampling":
        measure_sampling(options)
    elif options.what == "memory":
        measure_memory(options)
    else:
        measure_phases(options)


if __name__ == "__main__":
    main()
