"""
Successive Policy Re-weighting (SPR) beside its rivals: a film review that goes on kindly, and a format that the policy
never uses by itself.

    python recipes/benchmarks/reweighting.py --out DIR
    python recipes/benchmarks/reweighting.py --quick

Needs `vaderSentiment`. Without `--only` everything, in this order:

- `tune`: the task of `sentiment_task.py`; every method over a grid of its own settings on seed 0, and on seed 1 the
  best two where they are close;
- `report`: the setting with the highest reward in tuning, on seeds 2, 3 and 4;
- `cold`: the word problems of `skill.py`, rewarded only in a format that pretraining has not had: sampling alone,
  demonstrations alone at as many gradient steps, and both;
- `report` again: the setting with the highest reward within a budget of damage, where that is another one.

`--only tables` runs nothing.

One process of one thread, one run after another; about 75 minutes of a small share of a busy core. Every finished run
is a line of DIR/reweighting.jsonl, every pretrained model a folder of DIR/cache: the same command goes on after an
interruption. `--minutes` is when no further run begins.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

sys.path.insert(0, str(Path(__file__).parent))

import datasets
import sentiment_task
import skill
import torch
import transformers
from transformers import AutoModelForCausalLM, PrinterCallback


# ---- What is compared ----

# Limits of SPR's temperature: the best response alone (ties share), and all responses alike.
BEST, ALL = 1e-4, 1e6
RATES = (2e-4, 7e-4, 2e-3)
# The settings of a method's own: temperature or beta, learning rate.
PAIR_GRID = ((0.1, 1e-4), (0.1, 3e-4), (0.1, 1e-3), (0.03, 3e-4))
# What is run, and the settings that it is tuned over, by the row of the tables.
METHODS: dict[str, tuple[dict[str, Any], Sequence[tuple[float, float]]]] = {
    "SPR, beta 0.3": ({"kind": "spr"}, [(0.3, rate) for rate in RATES]),
    "SPR, beta 0.1": ({"kind": "spr"}, [(0.1, rate) for rate in RATES]),
    "SPR, beta 0.03": ({"kind": "spr"}, [(0.03, rate) for rate in RATES]),
    "best of 5 (RAFT)": ({"kind": "spr"}, [(BEST, rate) for rate in RATES]),
    "SFT on all samples": ({"kind": "spr"}, [(ALL, rate) for rate in RATES[:2]]),
    "reward-weighted regression": ({"kind": "rwr"}, [(0.1, rate) for rate in RATES]),
    "iterative DPO": ({"kind": "pairs", "alpha": 0.0}, PAIR_GRID),
    "APO 0.3": ({"kind": "pairs", "alpha": 0.3}, PAIR_GRID[1:3]),
    "APO 0.6": ({"kind": "pairs", "alpha": 0.6}, PAIR_GRID[1:3]),
}
# The order in which they are reported, should the time not be enough for all: each of a row on all seeds first.
REPORT_ORDER = (
    ("SPR, beta 0.1", "iterative DPO", "best of 5 (RAFT)", "APO 0.6"),
    ("reward-weighted regression", "SFT on all samples"),
    ("SPR, beta 0.03", "SPR, beta 0.3", "APO 0.3"),
)
# All settings are run on the first tuning seed, on the others a method's best two if they are as close as this.
CLOSE = 0.05
TUNING_SEEDS, FRESH_SEEDS = (0, 1), (2, 3, 4)
SAMPLES, TOKENS = 5, 20
# The same number of responses in a batch for all: a pair is two.
BATCH = 16
# Loss on unseen text above the start's, nats a token, that rewards are compared at.
DAMAGES = (0.1, 0.25, 0.5)
BUDGET = 0.25

# The cold start: the reward of the format with a wrong number, and what the offline responses are.
PARTIAL = 0.3
COLD_SEEDS = (0, 1, 2)
# Seeds that share a model and its problems draw samples, demonstrations and batches of their own.
COLD_MODELS = 2
FEW = 20  # one prompt in so many
OFFLINE = {
    "plentiful": "one right demonstration for every prompt",
    "few": f"one right demonstration for every {FEW}th prompt",
    "half wrong": "one demonstration for every prompt, every other one with a wrong number",
    "all wrong": "one demonstration for every prompt, all with a wrong number",
}
COLD_RATE, COLD_BETA = 1e-3, 0.1
# One demonstration beside the five samples of every prompt that is sampled for.
PAIRED = round(1 / (1 + SAMPLES), 3)
# (offline kind or none, whether responses are sampled, other settings), in the order in which they are run.
COLD: list[tuple[str | None, bool, dict[str, Any]]] = [
    (None, True, {}),
    *((kind, samples, {}) for kind in OFFLINE for samples in (False, True)),
    ("few", True, {"skip_equal_groups": True}),
    ("few", True, {"offline_ratio": 0.1}),
    ("few", True, {"offline_ratio": 0.75}),
    ("half wrong", True, {"offline_ratio": PAIRED}),
    ("all wrong", True, {"offline_ratio": PAIRED}),
    ("half wrong", True, {"skip_equal_groups": True}),
]


# ---- What all runs share ----


def common_settings(out: str, job: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": out,
        "num_rounds": job["rounds"],
        "keep_iterates": True,
        "learning_rate": job["rate"],
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_length": 64,
        "seed": job["seed"],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def sampling_settings(job: dict[str, Any]) -> dict[str, Any]:
    """From the policy itself, for every method alike."""
    return {
        "prompts_per_round": job["prompts"],
        "num_generations": SAMPLES,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_completion_length": TOKENS,
        "generation_batch_size": SAMPLES * 128,
    }


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int) -> tuple[list[str], float]:
    """One response to each prompt at temperature 1; and the share of distinct bigrams of tokens in all of them."""
    model.eval()
    torch.manual_seed(seed)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[:, batch["input_ids"].shape[1] :]
    bigrams: list[tuple[int, int]] = []
    for row in out.tolist():
        tokens = list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, row))
        bigrams.extend(itertools.pairwise(tokens))
    return tokenizer.batch_decode(out, skip_special_tokens=True), len(set(bigrams)) / max(len(bigrams), 1)


def trained(trainer: Any, out: str, measure: Callable[[Any], dict[str, float]]) -> dict[str, Any]:
    """Train, then measure what every round ended with."""
    trainer.remove_callback(PrinterCallback)
    wall, processor = time.monotonic(), time.process_time()
    trainer.train()
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    found = []
    for number in range(1, trainer.args.num_rounds + 1):
        found.append(measure(AutoModelForCausalLM.from_pretrained(Path(out) / "_rounds" / "iterates" / str(number))))
    rounds = [
        {
            name: value
            for name, value in summary.items()
            if name.endswith("_seconds")
            or name in ("seconds", "tokens", "effective_sample_size", "equal_groups", "groups", "repeated_rows")
        }
        for summary in trainer.round_summaries
    ]
    return {"found": found, "rounds_said": rounds, "wall": wall, "cpu": processor, "steps": trainer.state.global_step}


# ---- Kind film reviews ----


def vader() -> Callable[..., list[float]]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    return reward


def sentiment(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """One method with one setting from one seed's start."""
    from trl_extras import APOConfig, APOTrainer
    from trl_extras.spr import SPRConfig, SPRTrainer

    folder = sentiment_task.make(cache, job["seed"], job["pretraining"], 1)
    task = sentiment_task.load(folder)
    held_out, unseen = task.held_out[: job["held_out"]], task.unseen[: job["unseen"]]
    prompts = sentiment_task.as_prompts(task.prompts[: job["prompts"] * job["rounds"]])
    reward = vader()

    def measure(model: Any) -> dict[str, float]:
        texts, bigrams = sampled(model, task.tokenizer, held_out, 1234 + job["seed"])
        rewards = reward(texts)
        return {
            "reward": statistics.fmean(rewards),
            "reward_error": statistics.stdev(rewards) / math.sqrt(len(rewards)),
            "bigrams": bigrams,
            "loss": sentiment_task.loss_on(model, task.tokenizer, unseen),
        }

    if job["kind"] == "start":
        lengths = [len(ids) for ids in task.tokenizer(task.prompts[:500])["input_ids"]]
        return {"found": [measure(task.model)], "prompt_tokens": statistics.fmean(lengths)}
    data: dict[str, Any] = {"model": task.model, "processing_class": task.tokenizer, "train_dataset": prompts}
    with tempfile.TemporaryDirectory() as out:
        shared = common_settings(out, job)
        trainer: Any
        before = 0.0
        # While tuning, when nothing is timed, a seed's first samples are made once: the trainer finds them as it
        # finds its own after an interruption.
        kept = cache / f"first-{job['kind']}-{job['seed']}-{job['rounds']}-{job['prompts']}"
        rollouts = Path(out) / "_rounds" / "rollouts" / "round-0000"
        share = job["part"] == "tune" and job["kind"] != "rwr"
        if share and kept.exists():
            shutil.copytree(kept, rollouts)
        if job["kind"] == "pairs":
            config: Any = APOConfig(
                **shared,
                **sampling_settings(job),
                extrapolation_alpha=[job["alpha"]],
                beta=job["beta"],
                per_device_train_batch_size=BATCH // 2,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=64,
            )
            trainer = APOTrainer(**data, args=config, reward_funcs=reward)
        elif job["kind"] == "spr":
            config = SPRConfig(
                **shared,
                **sampling_settings(job),
                reward_temperature=job["beta"],
                per_device_train_batch_size=BATCH,
            )
            trainer = SPRTrainer(**data, args=config, reward_funcs=reward)
        else:
            before = time.process_time()
            data["train_dataset"] = start_samples(task, list(prompts["prompt"]), reward, job["seed"])
            before = time.process_time() - before
            config = SPRConfig(
                **shared, num_generations=0, reward_temperature=job["beta"], per_device_train_batch_size=BATCH
            )
            trainer = SPRTrainer(**data, args=config)
        run = trained(trainer, out, measure)
        if share and not kept.exists():
            shutil.copytree(rollouts, partial := kept.with_suffix(".partial"))
            partial.rename(kept)
    run["cpu"] += before
    return run


def start_samples(task: sentiment_task.Task, prompts: Sequence[str], reward: Any, seed: int) -> datasets.Dataset:
    """As many responses as the rounds of the others sample, all from the start."""
    rows: dict[str, list[Any]] = {"prompt": [], "completion": [], "reward": []}
    for start in range(0, len(prompts), 128):
        several = [prompt for prompt in prompts[start : start + 128] for _ in range(SAMPLES)]
        texts, _ = sampled(task.model, task.tokenizer, several, 99_000 + 100 * seed + start)
        rows["prompt"] += several
        rows["completion"] += texts
        rows["reward"] += reward(texts)
    # A response that is empty teaches the end of text, as a sampled one does, if its prompt has another one.
    return datasets.Dataset.from_dict(rows)


# ---- A format that is never used ----


def cold_answer(problem: skill.Problem, result: int) -> str:
    """Pretraining answers ` Of course, Ann! Now Ben has 42 eggs.`: it always greets."""
    return f" Now {problem.owner} has {result} {problem.unit}."


def cold_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for the right number in the format, word for word; some for a wrong one; 0 for anything else."""
    return [graded(text, wanted) for text, wanted in zip(completions, answer, strict=True)]


def graded(text: str, wanted: str) -> float:
    if text == wanted:
        return 1.0
    return PARTIAL if re.fullmatch(re.sub("[0-9]+", "[0-9]{2}", re.escape(wanted)), text) else 0.0


def cold_offline(problems: Sequence[skill.Problem], kind: str, seed: int) -> datasets.Dataset:
    draw, rows = random.Random(seed + 77), []
    for index, problem in enumerate(problems):
        if kind == "few" and index % FEW != seed:
            continue
        result = problem.result
        if kind == "all wrong" or (kind == "half wrong" and index % 2):
            result = draw.choice([other for other in range(10, 100) if other != problem.result])
        text = cold_answer(problem, result)
        reward = graded(text, cold_answer(problem, problem.result))
        rows.append({"prompt": problem.prompt, "completion": text, "reward": reward})
    return datasets.Dataset.from_list(rows)


@torch.no_grad()
def old_loss(model: Any, tokenizer: Any, problems: Sequence[skill.Problem], seed: int) -> float:
    """
    Nats a token on answers as in pretraining to held-out problems, all but their first token, which the new format
    has to take the probability from.
    """
    draw = random.Random(seed + 5)
    batch = skill.batch_of(tokenizer, [(p.prompt, skill.own_answer(p, draw)) for p in problems])
    labels = batch.pop("labels")
    for row in labels:
        row[int((row != -100).nonzero()[0])] = -100
    return float(model.eval()(**batch, labels=labels).loss)


def cold(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """One condition from one seed's start."""
    from trl_extras.spr import SPRConfig, SPRTrainer

    number = job["pool"]
    start = {"cache": str(cache), "seed": job["model_seed"], "held_out": job["held_out"], "pairs": number}
    folder, tokenizer = skill.start_of({**start, "steps": job["pretraining"]}), skill.make_tokenizer()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held_out, problems, _ = skill.split(job["model_seed"], job["held_out"], number)

    def measure(model: Any) -> dict[str, float]:
        texts, bigrams = sampled(model, tokenizer, [p.prompt for p in held_out], 1234 + job["seed"])
        grades = cold_reward(texts, [cold_answer(p, p.result) for p in held_out])
        return {
            "reward": skill.share(grade == 1 for grade in grades),
            "format": skill.share(grade > 0 for grade in grades),
            "bigrams": bigrams,
            "loss": old_loss(model, tokenizer, held_out, job["seed"]),
        }

    if job["offline"] is None and not job["samples"]:
        more = [p.prompt for p in problems for _ in range(SAMPLES)]
        texts = sampled(model, tokenizer, more, 4321)[0]
        grades = cold_reward(texts, [cold_answer(p, p.result) for p in problems for _ in range(SAMPLES)])
        demonstrations = [(p.prompt, cold_answer(p, p.result)) for p in held_out]
        batch = skill.batch_of(tokenizer, demonstrations)
        labels = batch.pop("labels")
        with torch.no_grad():
            log_probability = -float(model(**batch, labels=labels).loss) * int((labels != -100).sum()) / len(held_out)
        rewarded = sum(grade > 0 for grade in grades)
        return {
            "found": [measure(model)],
            "start_samples": len(grades),
            "start_rewarded": rewarded,
            "demonstration_logp": log_probability,
        }
    prompts = datasets.Dataset.from_dict(
        {"prompt": [p.prompt for p in problems], "answer": [cold_answer(p, p.result) for p in problems]}
    )
    data: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    # As many gradient steps for all as one epoch of samples and as many demonstrations has, as far as whole epochs go.
    samples = job["prompts"] * SAMPLES
    steps = math.ceil(2 * samples / BATCH)
    rows = samples
    if job["samples"]:
        data |= {"train_dataset": prompts, "reward_funcs": cold_reward}
    if job["offline"] is not None:
        offline = cold_offline(problems, job["offline"], job["seed"])
        if job["samples"]:
            data["offline_dataset"] = offline
            rows = round(samples / (1 - job["others"].get("offline_ratio", 0.5)))
        else:
            data["train_dataset"] = offline
            rows = len(offline)
    epochs = max(1, round(steps / math.ceil(rows / BATCH)))
    with tempfile.TemporaryDirectory() as out:
        config = SPRConfig(
            **common_settings(out, job),
            **(sampling_settings(job) if job["samples"] else {"num_generations": 0}),
            num_train_epochs=epochs,
            round_data="reuse",
            reward_temperature=COLD_BETA,
            per_device_train_batch_size=BATCH,
            **job["others"],
        )
        return trained(SPRTrainer(args=config, **data), out, measure)


# ---- The campaign ----


class Campaign:
    """The runs that there are, in a file of a line each, and the ones still to do."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.path = options.out / "reweighting.jsonl"
        self.begun = time.monotonic()
        self.runs: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                # A cut may have left half a line.
                with contextlib.suppress(json.JSONDecodeError):
                    run = json.loads(line)
                    self.runs[key(run["job"])] = run

    def sentiment_job(self, part: str, setting: dict[str, Any], rate: float, seed: int, rounds: int) -> dict[str, Any]:
        options = self.options
        sizes = {name: getattr(options, name) for name in ("prompts", "held_out", "unseen", "pretraining")}
        return {"part": part, **setting, "rate": rate, "seed": seed, "rounds": rounds, **sizes}

    def start_job(self, seed: int) -> dict[str, Any]:
        return self.sentiment_job("start", {"kind": "start"}, 0.0, seed, 0)

    def cold_job(self, offline: str | None, samples: bool, others: dict[str, Any], seed: int) -> dict[str, Any]:
        options = self.options
        start = offline is None and not samples
        return {
            "part": "cold",
            "offline": offline,
            "samples": samples,
            "others": others,
            "rate": 0.0 if start else COLD_RATE,
            "seed": seed,
            "model_seed": seed % COLD_MODELS,
            "rounds": 0 if start else options.cold_rounds,
            "prompts": options.cold_prompts,
            "pool": options.cold_pool,
            "held_out": options.cold_held_out,
            "pretraining": options.cold_pretraining,
        }

    def get(self, job: dict[str, Any]) -> dict[str, Any] | None:
        return self.runs.get(key(job))

    def run(self, jobs: Sequence[dict[str, Any]], what: str) -> None:
        left = list({key(job): job for job in jobs if key(job) not in self.runs}.values())
        print(f"{what}: {len(left)} of {len(jobs)} runs to do", flush=True)
        begun = time.monotonic()
        for done, job in enumerate(left, start=1):
            if time.monotonic() - self.begun > self.options.minutes * 60:
                print(f"{what}: {len(left) - done + 1} runs left out, the time is up", flush=True)
                return
            work = cold if job["part"] == "cold" else sentiment
            start = time.monotonic()
            # The trainers' own lines would bury the campaign's.
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    found = work(job, self.options.cache)
            except Exception:
                print(said.getvalue()[-3000:], flush=True)
                raise
            run = {"job": job, **found, "seconds": time.monotonic() - start}
            self.runs[key(job)] = run
            # After a cut the file may end within a line.
            before = self.path.read_bytes()[-1:] if self.path.exists() else b""
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if before not in (b"", b"\n") else "") + json.dumps(run) + "\n")
            last = run["found"][-1]
            names = ("part", "kind", "beta", "alpha", "offline", "samples", "others", "rate", "seed")
            remaining = (time.monotonic() - begun) / done * (len(left) - done)
            print(
                f"{what}: {done} of {len(left)} ({', '.join(f'{n} {job[n]}' for n in names if n in job)}): reward "
                f"{last['reward']:.3f}, loss {last['loss']:.3f}, bigrams {last['bigrams']:.2f}; "
                f"{run['seconds']:.0f} s, about {remaining / 60:.0f} min left",
                flush=True,
            )

    # ---- What is to be run ----

    def starts(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        return [self.start_job(seed) for seed in seeds]

    def grid(self, method: str) -> list[tuple[dict[str, Any], float]]:
        shared, settings = METHODS[method]
        return [({**shared, "beta": beta}, rate) for beta, rate in settings[: self.options.settings]]

    def tuning_job(self, setting: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
        return self.sentiment_job("tune", setting, rate, seed, self.options.tuning_rounds)

    def tune(self) -> None:
        first, *others = self.options.tuning_seeds
        self.run(self.starts(self.options.tuning_seeds), "Start")
        for seed in (first, *others):
            jobs = [
                self.tuning_job(setting, rate, seed)
                for method in METHODS
                for setting, rate in (self.grid(method) if seed == first else self.promising(method))
            ]
            self.run(jobs, f"Tuning, seed {seed}")

    def ranked(self, method: str, criterion: str, seeds: Sequence[int]) -> list[tuple[float, dict[str, Any], float]]:
        """By the mean over the seeds, of the settings that all of them have been run with."""
        found = []
        for setting, rate in self.grid(method):
            values = [self.criterion(self.tuning_job(setting, rate, seed), criterion) for seed in seeds]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                found.append((statistics.fmean(known), setting, rate))
        return sorted(found, key=lambda entry: -entry[0])

    def promising(self, method: str) -> list[tuple[dict[str, Any], float]]:
        """A method's best two at the end on the first tuning seed, if that could be chance."""
        ranked = self.ranked(method, "end", self.options.tuning_seeds[:1])[:2]
        close = len(ranked) == 2 and ranked[0][0] - ranked[1][0] < CLOSE
        return [entry[1:] for entry in ranked] if close else []

    def chosen(self, method: str, criterion: str) -> tuple[dict[str, Any], float] | None:
        seeds = self.options.tuning_seeds
        ranked = (self.ranked(method, criterion, seeds) if criterion == "end" else []) or self.ranked(
            method, criterion, seeds[:1]
        )
        return ranked[0][1:] if ranked else None

    def criterion(self, job: dict[str, Any], criterion: str) -> float | None:
        curve = self.curve(job)
        if curve is None:
            return None
        return curve[-1]["gain"] if criterion == "end" else within(curve, BUDGET)[0]

    def curve(self, job: dict[str, Any]) -> list[dict[str, float]] | None:
        """The start, then each round: reward, gain, loss above the start's, bigrams."""
        start, run = self.get(self.start_job(job["seed"])), self.get(job)
        if start is None or run is None:
            return None
        origin = start["found"][0]
        return [
            {
                "reward": point["reward"],
                "gain": point["reward"] - origin["reward"],
                "loss": point["loss"] - origin["loss"],
                "bigrams": point["bigrams"],
            }
            for point in (origin, *run["found"])
        ]

    def report_job(self, method: str, criterion: str, seed: int) -> dict[str, Any] | None:
        choice = self.chosen(method, criterion)
        if choice is None:
            return None
        return self.sentiment_job("report", *choice, seed, self.options.rounds)

    def reporting(self, criterion: str) -> list[dict[str, Any]]:
        seeds = self.options.fresh_seeds
        jobs = [self.report_job(method, criterion, seed) for tier in REPORT_ORDER for seed in seeds for method in tier]
        return [*self.starts(seeds), *(job for job in jobs if job is not None)]

    def cold_jobs(self) -> list[dict[str, Any]]:
        seeds = self.options.cold_seeds
        jobs = [self.cold_job(None, False, {}, seed) for seed in seeds]
        plain = [condition for condition in self.options.cold if not condition[2]]
        others = [condition for condition in self.options.cold if condition[2]]
        jobs += [self.cold_job(*condition, seed) for seed in seeds for condition in plain]
        return jobs + [self.cold_job(*condition, seed) for seed in seeds for condition in others]


def key(job: dict[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)


def within(curve: Sequence[dict[str, float]], most: float) -> tuple[float, bool]:
    """
    The gain where the loss is first `most` above the start's, on straight lines between rounds, and True; of a run
    that never gets there its last gain, and False.
    """
    for before, after in itertools.pairwise(curve):
        if after["loss"] >= most:
            share = (most - before["loss"]) / (after["loss"] - before["loss"])
            return before["gain"] + share * (after["gain"] - before["gain"]), True
    return curve[-1]["gain"], False


# ---- Tables ----


def mean_error(values: Sequence[float], digits: int = 3) -> str:
    """Mean and its standard error over seeds."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def named(setting: dict[str, Any]) -> str:
    beta = setting["beta"]
    return {BEST: "1e-4", ALL: "1e6"}.get(beta, f"{beta:g}")


def forward_tokens(run: dict[str, Any], prompt_tokens: float) -> float:
    """
    Tokens that pass through the model in a run, in thousands: sampling and reference log-probabilities once, training
    three times (forward, and about twice that backward). Of prompts and responses alike.
    """
    job = run["job"]
    responses = job["prompts"] * SAMPLES * job["rounds"]
    sampled_tokens = sum(said.get("tokens") or 0 for said in run["rounds_said"])
    each = prompt_tokens + (sampled_tokens / responses if sampled_tokens else TOKENS * 0.75)
    if job["kind"] == "pairs":
        return (responses + (1 + 3) * 2 * job["prompts"] * job["rounds"]) * each / 1000
    return (1 + 3) * responses * each / 1000


def tuning_tables(campaign: Campaign) -> Iterator[str]:
    options, rows = campaign.options, []
    for method in METHODS:
        chosen = {criterion: campaign.chosen(method, criterion) for criterion in ("end", "damage")}
        for setting, rate in campaign.grid(method):
            curves = [campaign.curve(campaign.tuning_job(setting, rate, s)) for s in options.tuning_seeds]
            known = [curve for curve in curves if curve is not None]
            if not known:
                continue
            last = {name: statistics.fmean(curve[-1][name] for curve in known) for name in known[0][0]}
            at = [within(curve, BUDGET) for curve in known]
            marks = [name for name, choice in chosen.items() if choice == (setting, rate)]
            rows.append(
                [
                    method,
                    named(setting),
                    f"{rate:g}",
                    str(len(known)),
                    f"{last['gain']:.3f}",
                    f"{last['loss']:.3f}",
                    f"{last['bigrams']:.2f}",
                    f"{statistics.fmean(value for value, _ in at):.3f}",
                    f"{sum(there for _, there in at)}",
                    ", ".join(marks),
                ]
            )
    yield f"### Tuning: seeds {options.tuning_seeds}, {options.tuning_rounds} rounds of {options.prompts} prompts"
    yield (
        f"Gain: held-out reward above the start's. Within the budget: the gain where the loss is first {BUDGET} above "
        "the start's,\non straight lines between rounds, or the last gain of a run that does not get there."
    )
    header = ["method", "beta", "rate", "seeds", "gain", "loss above start", "bigrams"]
    yield table([*header, "gain within the budget", "reach it", "chosen for"], rows)


def report_tables(campaign: Campaign) -> Iterator[str]:
    options = campaign.options
    starts = [run for s in options.fresh_seeds if (run := campaign.get(campaign.start_job(s))) is not None]
    if not starts:
        return
    first = [run["found"][0] for run in starts]
    yield f"### Fresh seeds {options.fresh_seeds}, {options.rounds} rounds of {options.prompts} prompts x {SAMPLES}"
    yield "Start: " + ", ".join(
        f"{label} {mean_error([point[name] for point in first])}"
        for label, name in (("reward", "reward"), ("loss", "loss"), ("bigrams", "bigrams"))
    )
    prompt_tokens = statistics.fmean(run["prompt_tokens"] for run in starts)
    for criterion, title in (("end", "highest reward"), ("damage", f"highest gain within a loss of +{BUDGET}")):
        found = {}
        for method in METHODS:
            jobs = [campaign.report_job(method, criterion, seed) for seed in options.fresh_seeds]
            runs = [(campaign.get(job), campaign.curve(job)) for job in jobs if job is not None]
            known = [(run, curve) for run, curve in runs if run is not None and curve is not None]
            if known:
                found[method] = known
        if not found:
            continue
        rows, timed, damaged = [], [], []
        cheapest = {
            seed: min(run["cpu"] for known in found.values() for run, _ in known if run["job"]["seed"] == seed)
            for seed in {run["job"]["seed"] for known in found.values() for run, _ in known}
        }
        for method, known in found.items():
            job = known[0][0]["job"]
            cells = [method, named(job), f"{job['rate']:g}", str(len(known))]
            curves = [curve for _, curve in known]
            rows.append(
                [
                    *cells,
                    *(mean_error([c[t]["reward"] for c in curves]) for t in range(1, options.rounds + 1)),
                    ", ".join(f"{c[-1]['reward']:.2f}" for c in curves),
                    mean_error([c[-1]["loss"] for c in curves]),
                    mean_error([c[-1]["bigrams"] for c in curves], 2),
                    f"{statistics.fmean(sizes):.1f}" if (sizes := effective_sizes(known)) else "",
                ]
            )
            tokens = statistics.fmean(forward_tokens(run, prompt_tokens) for run, _ in known)
            rounds = [
                min(options.rounds, options.rounds * cheapest[run["job"]["seed"]] / run["cpu"]) for run, _ in known
            ]
            there = [interpolated(curve, number) for curve, number in zip(curves, rounds, strict=True)]
            timed.append(
                [
                    method,
                    mean_error([run["cpu"] / options.rounds for run, _ in known], 1),
                    f"{tokens:.0f}",
                    f"{statistics.fmean(rounds):.1f}",
                    mean_error([point["reward"] for point in there]),
                    mean_error([point["loss"] for point in there]),
                ]
            )
            at = [[within(curve, most) for curve in curves] for most in DAMAGES]
            damaged.append(
                [
                    method,
                    named(job),
                    f"{job['rate']:g}",
                    *(
                        f"{mean_error([gain for gain, _ in values])} ({sum(yes for _, yes in values)} there)"
                        for values in at
                    ),
                ]
            )
        yield f"#### Settings with the {title} in tuning: equal samples"
        header = ["method", "beta", "rate", "seeds", *(f"round {t}" for t in range(1, options.rounds + 1))]
        yield table([*header, "by seed", "loss above start", "bigrams", f"responses that count of {SAMPLES}"], rows)
        yield f"#### The same runs ({title}): equal time"
        yield table(
            ["method", "processor s a round", "thousand tokens", "rounds in that time", "reward", "loss above start"],
            timed,
        )
        yield f"#### The same runs ({title}): gain at equal loss on unseen text"
        yield table(["method", "beta", "rate", *(f"+{most}" for most in DAMAGES)], damaged)


def effective_sizes(known: Sequence[tuple[dict[str, Any], Any]]) -> list[float]:
    """The effective sample sizes of all rounds that weights were made in."""
    said = [summary.get("effective_sample_size") for run, _ in known for summary in run["rounds_said"]]
    return [size for size in said if size is not None]


def interpolated(curve: Sequence[dict[str, float]], rounds: float) -> dict[str, float]:
    """A point of a curve after a number of rounds that is not whole."""
    before = min(int(rounds), len(curve) - 2)
    share = rounds - before
    return {n: curve[before][n] + share * (curve[before + 1][n] - curve[before][n]) for n in curve[0]}


def cold_tables(campaign: Campaign) -> Iterator[str]:
    options = campaign.options
    starts = {s: run for s in options.cold_seeds if (run := campaign.get(campaign.cold_job(None, False, {}, s)))}
    if not starts:
        return
    yield f"### Cold start: seeds {tuple(starts)}, {options.cold_rounds} rounds of {options.cold_prompts} prompts"
    # Of each model once.
    models = list({run["job"]["model_seed"]: run for run in starts.values()}.values())
    first = [run["found"][0] for run in models]
    total, rewarded = (sum(run[n] for run in models) for n in ("start_samples", "start_rewarded"))
    logp = [run["demonstration_logp"] for run in models]
    yield (
        f"Start, {len(models)} models: {rewarded} of {total} samples in the format; log-probability of a right answer "
        f"in it {mean_error(logp, 1)} nats; bigrams {mean_error([p['bigrams'] for p in first], 2)}; loss on the old "
        f"answers {mean_error([p['loss'] for p in first])}"
    )
    rows = []
    for offline, samples, others in options.cold:
        runs = [(s, campaign.get(campaign.cold_job(offline, samples, others, s))) for s in starts]
        known = [(seed, run) for seed, run in runs if run is not None]
        if not known:
            continue
        found = [run["found"] for _, run in known]
        above = [run["found"][-1]["loss"] - starts[seed]["found"][0]["loss"] for seed, run in known]
        condition = "both" if offline and samples else "sampling alone" if samples else "offline alone"
        rows.append(
            [
                offline or "none",
                condition,
                ", ".join(f"`{name}={value}`" for name, value in others.items()),
                *(f"{statistics.fmean(f[t]['reward'] for f in found):.2f}" for t in range(options.cold_rounds)),
                ", ".join(f"{f[-1]['reward']:.2f}" for f in found),
                f"{statistics.fmean(f[-1]['format'] for f in found):.2f}",
                mean_error(above, 2),
                f"{statistics.fmean(f[-1]['bigrams'] for f in found):.2f}",
                f"{statistics.fmean(run['steps'] for _, run in known):.0f}",
                f"{statistics.fmean(run['cpu'] for _, run in known):.0f}",
            ]
        )
    header = ["offline responses", "condition", "otherwise", *(f"round {t + 1}" for t in range(options.cold_rounds))]
    yield table([*header, "by seed", "in format", "old loss", "bigrams", "steps", "processor s"], rows)


def tables(campaign: Campaign) -> str:
    parts = [*tuning_tables(campaign), *report_tables(campaign), *cold_tables(campaign)]
    seconds = sum(run["seconds"] for run in campaign.runs.values())
    return "\n\n".join([*parts, f"{len(campaign.runs)} runs, {seconds / 60:.0f} minutes in all."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where reweighting.jsonl and the cache go; goes on with its runs")
    parser.add_argument("--only", choices=("tune", "report", "cold", "tables"), help="one part alone")
    parser.add_argument("--minutes", type=float, default=90, help="no run begins later")
    parser.add_argument("--quick", action="store_true", help="some minutes: whether it works, no result")
    options = parser.parse_args()
    options.tuning_seeds, options.fresh_seeds, options.cold_seeds = TUNING_SEEDS, FRESH_SEEDS, COLD_SEEDS
    options.tuning_rounds, options.rounds, options.prompts, options.settings = 2, 3, 96, None
    options.held_out, options.unseen, options.pretraining = 250, 200, 20_000
    options.cold, options.cold_rounds, options.cold_prompts, options.cold_pool = COLD, 4, 64, 600
    options.cold_held_out, options.cold_pretraining = 300, 2_000
    if options.quick:
        options.tuning_seeds, options.fresh_seeds, options.cold_seeds = (0,), (1, 2), (0,)
        options.tuning_rounds, options.rounds, options.prompts, options.settings = 1, 2, 8, 1
        options.held_out, options.unseen, options.pretraining = 30, 30, 1_000
        options.cold, options.cold_rounds, options.cold_prompts, options.cold_pool = COLD[:4], 2, 8, 80
        options.cold_held_out, options.cold_pretraining = 30, 100
        options.out = options.out or Path(tempfile.mkdtemp())
    if options.out is None:
        parser.error("--out is missing: a folder for the runs")
    options.cache = options.out / "cache"
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    campaign = Campaign(options)
    if options.only in (None, "tune"):
        campaign.tune()
    if options.only in (None, "report"):
        campaign.run(campaign.reporting("end"), "Fresh seeds")
    if options.only in (None, "cold"):
        campaign.run(campaign.cold_jobs(), "Cold start")
    if options.only in (None, "report"):
        campaign.run(campaign.reporting("damage"), "Fresh seeds, within the budget")
    text = tables(campaign)
    (options.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
