"""
Does a skill survive preference training? Word problems whose answers a preference says nothing about.

    python recipes/benchmarks/skill.py --out DIR
    python recipes/benchmarks/skill.py --quick

A small Llama learns to solve word problems; one person asks about another, and its answers speak to either of the
two, half the time each. The preference: speak to the one who asked. Chosen and rejected differ in that one name; both
have the right number. So nothing in the pairs asks for an answer to change, and every problem that a trained model
gets wrong is damage. Which learning rates reach the preference and keep the skill, and how wide is their range?

Every finished run is a line of DIR/runs.jsonl, every trained start a folder of DIR/cache: the same command goes on
after an interruption, `--report` only writes the tables and the figure (needs matplotlib) from what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Before any import of them, in the workers too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry

import datasets
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# ---- The task ----

NAMES = ("Tom", "Ann", "Ben", "Eve", "Max", "Ida", "Sam", "Lea", "Jim", "Zoe")
UNITS = ("apples", "books", "coins", "cards", "shells", "stamps", "eggs", "pens")
GAINS = ("buys", "finds", "wins", "gets", "earns", "picks")
LOSSES = ("loses", "sells", "drops", "breaks", "donates", "wastes")
# Two words each: chosen and rejected have the same length.
OPENINGS = ("Good question", "Of course", "Thank you", "Hello there")
FRAME = ("asks", "has", "and", "How", "many", "now", "Now")
# A word or a digit with the space before it: a prompt's tokens are then a prefix of the whole's.
TOKEN = " ?[A-Za-z]+| ?[0-9]|[.,!?:]"
MAX_NEW_TOKENS = 18  # an answer has 13 and the end


# ---- What is compared ----

# Fields of SPOConfig beside the shared ones; None is stock DPOTrainer. The fields of SPO itself are left at their
# defaults, except where an entry is another method on the same code: `sft_optimum=0` is a floor that is never
# reached, which makes the gap plain supervised fine-tuning, token mean of chosen plus token mean of the SFT rows.
SFT = {"hinge": "batch", "sft_optimum": "0"}
METHODS: dict[str, dict[str, Any] | None] = {
    "DPO": None,
    "SimPO": {"loss_type": ["simpo"], "sft_coef": 0.0},
    "DPOP": {"loss_type": ["dpop"], "sft_coef": 0.0},
    "DPO + SFT 0.1": {**SFT, "sft_coef": 0.1},
    "DPO + SFT 1": {**SFT, "sft_coef": 1.0},
    "SPO": {},
    "SPO, chosen only": {"lower_level": "chosen"},
    "SimPO + SPO": {"loss_type": ["simpo"]},
    "DPOP + SPO": {"loss_type": ["dpop"]},
    # SimPO's paper has larger betas, because its margin is one of means over tokens.
    "SimPO, beta 2": {"loss_type": ["simpo"], "sft_coef": 0.0, "beta": 2.0},
    "SimPO, beta 2 + SPO": {"loss_type": ["simpo"], "beta": 2.0},
}
# (methods, learning rates, seeds), in the order in which they are run: the middle of the range and the rivals first.
FIRST = ("DPO", "SPO", "SimPO, beta 2", "SimPO, beta 2 + SPO", "DPO + SFT 0.1", "DPO + SFT 1")
OTHERS = ("DPOP", "SPO, chosen only", "DPOP + SPO", "SimPO", "SimPO + SPO")
MIDDLE, FINER, ENDS = (3e-4, 1e-4, 3e-5, 1e-5), (1e-3, 5e-5, 2e-5), (3e-3, 3e-6, 1e-6)
STAGES: list[tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]] = [
    (FIRST, MIDDLE, (0, 1)),
    (("DPO", "SPO"), FINER, (0, 1)),
    (OTHERS, MIDDLE, (0, 1)),
    (FIRST[2:] + OTHERS, FINER, (0, 1)),
    (("DPO", "SPO"), ENDS, (0, 1)),
    (FIRST, MIDDLE + FINER, (2,)),
]
QUICK: list[tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]] = [(("DPO", "SPO"), (3e-5, 1e-4, 3e-4), (0,))]
# The share of held-out problems from which on the skill counts as kept, and the preference as reached.
ENOUGH = 0.95


@dataclass(frozen=True)
class Problem:
    asker: str
    owner: str
    unit: str
    verb: str
    first: int
    second: int

    @property
    def result(self) -> int:
        return self.first + self.second if self.verb in GAINS else self.first - self.second

    @property
    def sum(self) -> tuple[bool, int, int]:
        """What has to be disjoint: the same numbers with other names are no new problem."""
        return self.verb in GAINS, self.first, self.second

    @property
    def prompt(self) -> str:
        story = f"{self.owner} has {self.first} {self.unit} and {self.verb} {self.second}"
        return f"{self.asker} asks: {story}. How many now?"

    def answer(self, opening: str, to: str) -> str:
        return f" {opening}, {to}! Now {self.owner} has {self.result} {self.unit}."


def draw_problem(draw: random.Random) -> Problem:
    """Sums and differences alike often, of two-digit numbers with a two-digit result."""
    gain = draw.random() < 0.5
    while True:
        first, second = draw.randrange(10, 100), draw.randrange(10, 100)
        if 10 <= (first + second if gain else first - second) <= 99:
            break
    asker, owner = draw.sample(NAMES, 2)
    return Problem(asker, owner, draw.choice(UNITS), draw.choice(GAINS if gain else LOSSES), first, second)


def own_answer(problem: Problem, draw: random.Random) -> str:
    """As in pretraining: the two people alike often."""
    return problem.answer(draw.choice(OPENINGS), draw.choice((problem.asker, problem.owner)))


def split(seed: int, held_out: int, pairs: int) -> tuple[list[Problem], list[Problem], set[tuple[bool, int, int]]]:
    """Held-out problems, problems for pairs, and the sums of both, which pretraining and SFT rows must not have."""
    draw, used = random.Random(seed), set()
    found: list[Problem] = []
    while len(found) < held_out + pairs:
        problem = draw_problem(draw)
        if problem.sum not in used:
            used.add(problem.sum)
            found.append(problem)
    return found[:held_out], found[held_out:], used


def fresh_problem(draw: random.Random, without: set[tuple[bool, int, int]]) -> Problem:
    while True:
        problem = draw_problem(draw)
        if problem.sum not in without:
            return problem


def as_pairs(problems: Sequence[Problem], seed: int) -> datasets.Dataset:
    """Prompt, chosen, rejected: the asker's name against the owner's, everything else equal."""
    draw, rows = random.Random(seed), []
    for problem in problems:
        opening = draw.choice(OPENINGS)
        chosen, rejected = (problem.answer(opening, to) for to in (problem.asker, problem.owner))
        rows.append({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected})
    return datasets.Dataset.from_list(rows)


def as_sft(number: int, without: set[tuple[bool, int, int]], seed: int) -> datasets.Dataset:
    """The starting model's own kind of training data: answers to either person, the preference is not in them."""
    draw = random.Random(seed)
    problems = [fresh_problem(draw, without) for _ in range(number)]
    return datasets.Dataset.from_list([{"prompt": p.prompt, "completion": own_answer(p, draw)} for p in problems])


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {*NAMES, *UNITS, *GAINS, *LOSSES, *" ".join(OPENINGS).split(), *FRAME}
    tokens = [*sorted({*NAMES, *(f" {word}" for word in words)}), *".,!?:"]
    tokens += [*(str(digit) for digit in range(10)), *(f" {digit}" for digit in range(10))]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def batch_of(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Prompts and completions, padded on the right; labels on completions and their end alone."""
    encoded = [
        (tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id])
        for prompt, completion in rows
    ]
    longest = max(len(prompt) + len(completion) for prompt, completion in encoded)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)  # (B, T)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, (prompt, completion) in enumerate(encoded):
        end = len(prompt) + len(completion)
        ids[index, :end] = torch.tensor(prompt + completion)
        labels[index, len(prompt) : end] = torch.tensor(completion)
        mask[index, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pretrain(seed: int, steps: int, without: set[tuple[bool, int, int]]) -> LlamaForCausalLM:
    """Fresh problems in batches of 64, loss on the answers; AdamW, 2e-3 with warm-up and cosine decay."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.train()
    draw = random.Random(seed + 1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        problems = [fresh_problem(draw, without) for _ in range(64)]
        model(**batch_of(tokenizer, [(p.prompt, own_answer(p, draw)) for p in problems])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def start_of(job: dict[str, Any]) -> Path:
    """The folder with a seed's starting model; trained once."""
    folder = Path(job["cache"]) / f"start-{job['seed']}"
    if not folder.exists():
        used = split(job["seed"], job["held_out"], job["pairs"])[2]
        model = pretrain(job["seed"], job["steps"], used)
        with tempfile.TemporaryDirectory(dir=job["cache"]) as temporary:
            model.save_pretrained(Path(temporary) / "made")
            # Another process may have been faster.
            with contextlib.suppress(OSError):
                os.rename(Path(temporary) / "made", folder)
    return folder


# ---- What is measured ----


@torch.no_grad()
def measure(
    model: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], pairs: datasets.Dataset
) -> dict[str, Any]:
    """Greedy answers to held-out problems, and the log-probabilities of held-out pairs."""
    model.eval()
    prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    log_probs = {}
    for side in ("chosen", "rejected"):
        batch = batch_of(tokenizer, list(zip(pairs["prompt"], pairs[side], strict=True)))
        labels = batch.pop("labels")[:, 1:]
        each = model(**batch).logits[:, :-1].log_softmax(-1)  # (B, T - 1, V)
        each = each.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        log_probs[side] = each.masked_fill(labels == -100, 0.0).sum(-1)
    return {
        "exact": share(is_right(problem, answer) for problem, answer in zip(problems, answers, strict=True)),
        "preferred": share(is_preferred(problem, answer) for problem, answer in zip(problems, answers, strict=True)),
        "pairs": float((log_probs["chosen"] > log_probs["rejected"]).float().mean()),
        "chosen": float(log_probs["chosen"].mean()),
        "rejected": float(log_probs["rejected"].mean()),
        "examples": answers[:3],
    }


def share(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def is_right(problem: Problem, answer: str) -> bool:
    """Its last number is the result."""
    numbers = re.findall("[0-9]+", answer)
    return bool(numbers) and numbers[-1] == str(problem.result)


def is_preferred(problem: Problem, answer: str) -> bool:
    """It speaks to the asker and not to the owner, whatever the words around that are."""
    return f", {problem.asker}!" in answer and f", {problem.owner}!" not in answer


# ---- One run, in a worker ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train one method at one learning rate from one seed's start; returns the job with what was measured."""
    import transformers
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    begun = time.monotonic()
    folder, tokenizer = start_of(job), make_tokenizer()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held_out, training, used = split(job["seed"], job["held_out"], job["pairs"])
    held_out_pairs = as_pairs(held_out, job["seed"] + 1)
    if job["method"] is None:
        found = measure(model, tokenizer, held_out, held_out_pairs)
        return {**job, "found": found, "seconds": time.monotonic() - begun}
    fields = METHODS[job["method"]]
    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {
            "output_dir": out,
            "learning_rate": job["rate"],
            "lr_scheduler_type": "linear",
            "weight_decay": 0.0,
            "beta": 0.1,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8,
            "precompute_ref_log_probs": True,
            "precompute_ref_batch_size": 100,
            "max_length": 64,
            "seed": job["seed"],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 50,
            "disable_tqdm": True,
            **(fields or {}),
        }
        data = {"train_dataset": as_pairs(training, job["seed"]), "processing_class": tokenizer}
        trainer: Any
        if fields is None:
            trainer = DPOTrainer(model=model, args=DPOConfig(**settings), **data)
        else:
            from trl_extras import SPOConfig, SPOTrainer

            # Without a floor there is nothing to give rows to.
            if fields.get("sft_coef") != 0 and fields.get("lower_level") != "chosen":
                data["sft_dataset"] = as_sft(job["sft_rows"], used, job["seed"] + 2)
            trainer = SPOTrainer(model=model, args=SPOConfig(**settings), **data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = time.monotonic() - begun
        logged = [line for line in trainer.state.log_history if "loss" in line][-1]
    found = measure(trainer.model, tokenizer, held_out, held_out_pairs)
    return {**job, "found": found, "logged": logged, "trained": trained, "seconds": time.monotonic() - begun}


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    try:
        # The trainers' own lines would bury the campaign's.
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            return work(job)
    except Exception:
        return {**job, "error": traceback.format_exc()}


# ---- The campaign ----


def key(job: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(job[name] for name in ("method", "rate", "seed", "held_out", "pairs", "sft_rows"))


class Campaign:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.path = options.out / "runs.jsonl"
        self.begun = time.monotonic()
        self.runs: dict[tuple[Any, ...], dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                # A cut may have left half a line.
                with contextlib.suppress(json.JSONDecodeError):
                    run = json.loads(line)
                    self.runs[key(run)] = run

    def job(self, method: str | None, rate: float, seed: int) -> dict[str, Any]:
        options = self.options
        sizes = {name: getattr(options, name) for name in ("steps", "held_out", "pairs", "sft_rows")}
        return {"method": method, "rate": rate, "seed": seed, **sizes, "cache": str(options.cache)}

    def jobs(self) -> list[dict[str, Any]]:
        """Each stage by seed, then rate, each start before the first run that needs it."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for methods, rates, seeds in self.options.stages:
            for seed in seeds:
                if seed not in self.options.seeds:
                    continue
                found.setdefault(key(start := self.job(None, 0.0, seed)), start)
                for rate in rates:
                    for method in methods:
                        found.setdefault(key(job := self.job(method, rate, seed)), job)
        return list(found.values())

    def run(self) -> None:
        left = [job for job in self.jobs() if key(job) not in self.runs]
        total, done, waiting = len(left), 0, left[::-1]
        print(f"{total} runs to do, {len(self.runs)} done before", flush=True)
        until = self.options.minutes * 60
        running: set[Future] = set()
        starting: set[int] = set()
        with ProcessPoolExecutor(self.options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            while waiting or running:
                while waiting and len(running) < self.options.workers:
                    # A start is trained once: its runs wait for it, and others go first.
                    index = next(
                        (i for i in reversed(range(len(waiting))) if waiting[i]["seed"] not in starting), None
                    )
                    if index is None:
                        break
                    job = waiting.pop(index)
                    if job["method"] is None:
                        starting.add(job["seed"])
                    running.add(pool.submit(attempt, job))
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    run = future.result()
                    if "error" in run:
                        raise SystemExit(f"{run['method']}, {run['rate']:g}, seed {run['seed']}:\n{run['error']}")
                    if run["method"] is None:
                        starting.discard(run["seed"])
                    self.keep(run)
                    done += 1
                    passed = time.monotonic() - self.begun
                    remaining = min(passed / done * (total - done), max(until - passed, 0))
                    found = run["found"]
                    print(
                        f"{done} of {total} ({run['method'] or 'start'}, {run['rate']:g}, seed {run['seed']}): "
                        f"exact {found['exact']:.3f}, preferred {found['preferred']:.3f}, pairs {found['pairs']:.3f}; "
                        f"{run['seconds']:.0f} s, about {remaining / 60:.0f} min left",
                        flush=True,
                    )
                if waiting and time.monotonic() - self.begun > until:
                    print(f"{len(waiting)} runs left out, the time is up", flush=True)
                    waiting = []

    def keep(self, run: dict[str, Any]) -> None:
        run = {name: value for name, value in run.items() if name != "cache"}
        self.runs[key(run)] = run
        # After a cut the file may end within a line.
        before = self.path.read_bytes()[-1:] if self.path.exists() else b""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if before not in (b"", b"\n") else "") + json.dumps(run) + "\n")

    # ---- Reading the runs ----

    def seeds(self) -> list[int]:
        return [seed for seed in self.options.seeds if self.point(None, 0.0, seed) is not None]

    def point(self, method: str | None, rate: float, seed: int) -> dict[str, Any] | None:
        run = self.runs.get(key(self.job(method, rate, seed)))
        return None if run is None else run["found"]

    def rates(self, method: str | None = None, seed: int | None = None) -> list[float]:
        """The learning rates that have been run, of one method and seed or of any."""
        found = {
            rate
            for name, rate, number, *_ in self.runs
            if name is not None and method in (None, name) and seed in (None, number)
        }
        return sorted(found)

    def safe_range(self, method: str, seed: int) -> tuple[list[float], float | None, float | None] | None:
        """
        The longest run of neighbouring learning rates that reach the preference and keep the skill (by its ratio),
        and the rates below and above it that do not; None where there are no runs.
        """
        rates = self.rates(method, seed)
        if not rates:
            return None
        points = {rate: self.point(method, rate, seed) for rate in rates}
        good = [p is not None and min(p["exact"], p["preferred"]) >= ENOUGH for p in points.values()]
        best: tuple[int, int] | None = None
        for first in range(len(rates)):
            last = first
            while last < len(rates) and good[last]:
                last += 1
            if last > first and (best is None or rates[last - 1] / rates[first] > rates[best[1]] / rates[best[0]]):
                best = first, last - 1
        if best is None:
            return [], None, None
        below = rates[best[0] - 1] if best[0] > 0 else None
        above = rates[best[1] + 1] if best[1] + 1 < len(rates) else None
        return rates[best[0] : best[1] + 1], below, above


def number(value: float) -> str:
    """Two digits, and never 1.00 for what is not 1."""
    text = f"{value:.2f}"
    return text if text != "1.00" or value == 1 else ">.99"


def short(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def report(campaign: Campaign) -> str:
    seeds = campaign.seeds()
    lines = ["## What was measured", "", "Starting models: " + "; ".join(starts(campaign, seeds)) + ".", ""]
    for name, title in (
        ("exact", "Held-out problems with the right number (exact match of greedy answers)"),
        ("preferred", "Greedy answers that speak to the asker (the preference)"),
        ("pairs", "Held-out pairs whose chosen response is more likely"),
    ):
        lines += [f"### {title}", "", *by_rate(campaign, seeds, name), ""]
    lines += [f"### Learning rates that reach the preference and keep the skill (both >= {ENOUGH:g})", ""]
    lines += [*ranges(campaign, seeds), ""]
    lines += ["### The chosen response's log-probability on held-out pairs, change in nats", ""]
    lines += [*by_rate(campaign, seeds, "chosen"), ""]
    if missing := [job for job in campaign.jobs() if key(job) not in campaign.runs]:
        lines += [f"{len(missing)} runs of the plan are missing.", ""]
    return "\n".join(lines)


def starts(campaign: Campaign, seeds: Sequence[int]) -> list[str]:
    found = []
    for seed in seeds:
        point = campaign.point(None, 0.0, seed)
        assert point is not None
        values = ", ".join(
            f"{label} {number(point[name])}"
            for name, label in (("exact", "right"), ("preferred", "to the asker"), ("pairs", "pairs"))
        )
        steps = campaign.runs[key(campaign.job(None, 0.0, seed))]["steps"]
        found.append(f"seed {seed}: {values}, {steps} steps")
    return found


def by_rate(campaign: Campaign, seeds: Sequence[int], name: str) -> list[str]:
    """A row for each method, a column for each learning rate, the seeds in order; a dash where one is missing."""
    rates = campaign.rates()
    lines = ["| | " + " | ".join(map(short, rates)) + " |", "|---|" + "---|" * len(rates)]
    for method in METHODS:
        if not campaign.rates(method):
            continue
        cells = []
        for rate in rates:
            values = []
            for seed in seeds:
                point, start = campaign.point(method, rate, seed), campaign.point(None, 0.0, seed)
                if point is not None and start is not None:
                    change = name == "chosen"
                    values.append(f"{point[name] - start[name]:+.1f}" if change else number(point[name]))
                else:
                    values.append("-")
            cells.append(" / ".join(values) if set(values) != {"-"} else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def ranges(campaign: Campaign, seeds: Sequence[int]) -> list[str]:
    lines = [
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | width, by seed |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for method in METHODS:
        if not campaign.rates(method):
            continue
        cells, widths = [], []
        for seed in seeds:
            found = campaign.safe_range(method, seed)
            if found is None:
                cells.append("not run")
                continue
            good, below, above = found
            tried = f" (of {len(campaign.rates(method, seed))})"
            if not good:
                cells.append(f"none{tried}")
                widths.append("0")
                continue
            # The true ends lie between a rate that does and its neighbour that does not.
            cells.append(" to ".join(map(short, dict.fromkeys((good[0], good[-1])))) + tried)
            least = good[-1] / good[0]
            most = f"{above / below:.3g}" if above is not None and below is not None else "open"
            widths.append(f"{least:.3g} ({most})")
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {' / '.join(widths)} |")
    lines += [
        "",
        "The longest row of neighbouring rates that do both, of so many that were run. Width: "
        "greatest over smallest of them; in brackets what "
        "it could be at most, from the neighbours that do not, or `open` where there is none on one side.",
    ]
    return lines


def plot(campaign: Campaign, path: Path) -> None:
    """Exact match and preference over the learning rate, a panel for each method, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods, seeds = [method for method in METHODS if campaign.rates(method)], campaign.seeds()
    columns = 3
    rows = max(1, math.ceil(len(methods) / columns))
    size = (9, 2.1 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharex=True, sharey=True, layout="constrained")
    panels = list(axes.flat)
    for panel in panels[len(methods) :]:
        panel.set_visible(False)
    for panel, method in zip(panels, methods, strict=False):
        for seed in seeds:
            rates = campaign.rates(method, seed)
            for name, colour, style in (("exact", "tab:blue", "-"), ("preferred", "tab:orange", "--")):
                values = [campaign.point(method, rate, seed) for rate in rates]
                shown = [point[name] for point in values if point is not None]
                panel.plot(rates, shown, style, color=colour, marker="o", markersize=2.5, linewidth=0.9)
        panel.axhline(ENOUGH, color="grey", linestyle=":", linewidth=0.8)
        panel.set(xscale="log", ylim=(-0.03, 1.03))
        panel.set_title(method, fontsize=9)
    panels[0].plot([], [], "-", color="tab:blue", label="right number")
    panels[0].plot([], [], "--", color="tab:orange", label="speaks to the asker")
    panels[0].legend(fontsize=7, frameon=False, loc="lower left")
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("share of held-out problems", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where runs.jsonl, report.md and the cache go; goes on with its runs")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="of pretraining; a start that is there stays")
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables and the figure")
    parser.add_argument("--quick", action="store_true", help="DPO and SPO at three rates with one seed: some minutes")
    parser.add_argument("--plot", type=Path, help="the figure's file; by default skill.png in --out")
    options = parser.parse_args()
    options.held_out, options.pairs, options.sft_rows = 500, 400, 400
    options.stages = STAGES
    if options.quick:
        options.stages, options.seeds = QUICK, [0]
        options.out = options.out or Path(tempfile.mkdtemp())
    if options.out is None:
        parser.error("--out is missing: a folder for the runs")
    options.cache = options.out / "cache"
    options.cache.mkdir(parents=True, exist_ok=True)
    # Every process has one thread: two workers share the machine without getting in each other's way.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore"
    campaign = Campaign(options)
    if not options.report:
        campaign.run()
    text = report(campaign)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    plot(campaign, options.plot or options.out / "skill.png")


if __name__ == "__main__":
    main()
