"""
Whether *accelerated* preference optimization saves rounds of sampling, against iterative DPO at its own best.

    python recipes/benchmarks/acceleration.py --out DIR --workers 2 --resume
    python recipes/benchmarks/acceleration.py --out DIR --workers 2 --resume --floor
    python recipes/benchmarks/acceleration.py --quick

Needs `vaderSentiment`, and matplotlib for the plot. The task is `sentiment_task.py`'s. In the exact setting momentum
travels further along one path in a round (Theorem 4.1), as a larger learning rate, a smaller beta or more epochs do.
So every method is tuned over the same grid of these three, on seeds of their own, for the highest held-out reward
within a budget: distinct bigrams and the loss on unseen human text may move only so far from the start. What is
chosen so is run again on fresh seeds. Every finished run is a line of DIR/runs.jsonl; `--resume` goes on from there,
`--report` only writes the tables and the plot from it.

`--floor` asks something else: what the floor of Stable Preference Optimization changes in the rounds (APO x SPO). One
setting for all, nothing tuned: each alpha on the fresh seeds without a floor and with one under the chosen responses
and under separate human text, which is neither in the prompts nor in the unseen text that is measured; and with one
under either of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry

sys.path.insert(0, str(Path(__file__).parent))


# What is trained: (alpha, momentum_from).
TRAINED: dict[str, tuple[float, str]] = {
    "iterative DPO": (0.0, "previous_iterate"),
    "APO 0.3": (0.3, "previous_iterate"),
    "APO 0.6": (0.6, "previous_iterate"),
    "APO 0.9": (0.9, "previous_iterate"),
    "from reference 0.6": (0.6, "reference"),
}
# Measured on the iterates of iterative DPO: one extrapolation, after the last round only.
EXPO = {"ExPO 0.6": 0.6}
METHODS = (*TRAINED, *EXPO)
# (learning rate, beta, epochs a round), in the order in which they are run.
GRID = [
    (2e-4, 0.1, 1),
    (1e-4, 0.1, 1),
    (3e-4, 0.1, 1),
    (1e-4, 0.1, 2),
    (1e-4, 0.03, 1),
    (1e-4, 0.1, 4),
    (5e-5, 0.1, 4),
    (5e-5, 0.1, 2),
    (2e-4, 0.03, 1),
    (1e-4, 0.3, 2),
    (2e-4, 0.1, 2),
    (4e-4, 0.1, 1),
]
TUNING_SEEDS, FRESH_SEEDS = (0, 1), (2, 3, 4)
# Share of the start's distinct bigrams at least, nats a token above the start's loss on unseen text at most. The first
# is the benchmark's; the second one was added when tuning had shown how soon the first is spent.
BUDGETS = {"the budget": (0.8, 0.05), "a wide budget": (0.6, 0.1)}
# Held-out reward above the start's that rounds are counted to, within each budget.
LEVELS = {"the budget": (0.05, 0.1), "a wide budget": (0.2,)}
# Where along the path methods are compared: loss on unseen text above the start's.
AT_LOSS = 0.05

# With `--floor`: what lies above a floor ("none": plain APO), by method, in the order in which it is run.
FLOORED = [
    ("iterative DPO", "none"),
    ("iterative DPO", "both"),
    ("APO 0.6", "none"),
    ("APO 0.6", "both"),
    ("APO 0.6", "chosen"),
    ("APO 0.9", "none"),
    ("APO 0.9", "both"),
    ("APO 0.6", "separate"),
    ("iterative DPO", "separate"),
]
FLOOR_SETTING, FLOOR_ROUNDS = GRID[0], 4
# Human snippets under the floor: as many as four rounds draw.
FLOOR_TEXTS = 512
# Gains that with and without a floor are compared at.
FLOOR_GAINS = (0.2, 0.4, 0.6)
# The same for the loss above the start's.
FLOOR_LOSSES = (AT_LOSS, 2 * AT_LOSS)


# ---- One run, in a worker ----


def separate_text(job: dict[str, Any], without: set[str]) -> list[dict[str, str]]:
    """Snippets outside pretraining and the unseen text, of which none begins with a prompt of `without`."""
    import sentiment_task

    texts = sentiment_task.snippets(sentiment_task.fetch(Path(job["cache"])))
    parts = sentiment_task.split(texts, job["model_seed"], job["pretraining"])
    known = {*parts["pretraining"], *parts["unseen"]}
    left = [
        text
        for _, text in texts
        if text not in known and " ".join(text.split()[: sentiment_task.PROMPT_WORDS]) not in without
    ]
    return [{"text": text} for text in random.Random(job["seed"]).sample(left, min(job["floor_texts"], len(left)))]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train one configuration with one seed; returns the job with what was measured."""
    import datasets
    import sentiment_task
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, PrinterCallback
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    from trl_extras import APOConfig, APOSPOConfig, APOSPOTrainer, APOTrainer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cache, begun = Path(job["cache"]), time.monotonic()
    folder = sentiment_task.make(cache, job["model_seed"], job["pretraining"], job["pretraining_epochs"])
    if job["method"] is None:
        return {**job, "seconds": time.monotonic() - begun}
    task = sentiment_task.load(folder)
    # Seeds that share a model have prompts of their own all the same.
    random.Random(job["seed"]).shuffle(task.prompts)
    task.held_out, task.unseen = task.held_out[: job["held_out"]], task.unseen[: job["unseen"]]
    analyzer = SentimentIntensityAnalyzer()

    def vader(completions: list[str], **kwargs: Any) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    iterates = [{name: value.clone() for name, value in task.model.state_dict().items()}]
    # More than are wanted: some stand in for prompts whose completions are all judged alike.
    prompts = task.prompts[: job["prompts"] * 2 * job["rounds"]]
    alpha, momentum_from = TRAINED[job["method"]]
    config_class: type[APOConfig] = APOConfig
    trainer_class: type[APOTrainer] = APOTrainer
    settings: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if job["floor"] not in (None, "none"):
        # Whatever is not said here is its default: lambda 1, a hinge for each example.
        config_class, trainer_class = APOSPOConfig, APOSPOTrainer
        settings["lower_level"] = {"separate": "sft_dataset"}.get(job["floor"], job["floor"])
    if job["floor"] in ("separate", "both"):
        more["sft_dataset"] = datasets.Dataset.from_list(separate_text(job, {*prompts, *task.held_out}))
    with tempfile.TemporaryDirectory() as out:
        # All runs of a seed begin with the same policy and prompts: what it samples in the first round is sampled
        # once, and the trainer finds it as it finds its own after an interruption.
        shared = cache / f"first-{folder.name}-{job['seed']}-{job['rounds']}-{job['prompts']}"
        rollouts = Path(out) / "_rounds" / "rollouts" / "round-0000"
        if shared.exists():
            shutil.copytree(shared, rollouts)
        trainer = trainer_class(
            model=task.model,
            args=config_class(
                output_dir=out,
                num_rounds=job["rounds"],
                extrapolation_alpha=[alpha],
                momentum_from=momentum_from,
                keep_iterates=True,
                prompts_per_round=job["prompts"],
                num_generations=5,
                temperature=0.7,
                top_p=0.9,
                max_completion_length=20,
                generation_batch_size=5 * 128,
                learning_rate=job["rate"],
                lr_scheduler_type="linear",
                weight_decay=0.0,
                beta=job["beta"],
                num_train_epochs=job["epochs"],
                per_device_train_batch_size=8,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=64,
                max_length=64,
                seed=job["seed"],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1000,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=sentiment_task.as_prompts(prompts),
            reward_funcs=vader,
            processing_class=task.tokenizer,
            **more,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if not shared.exists():
            with tempfile.TemporaryDirectory(dir=cache) as temporary, contextlib.suppress(OSError):
                os.rename(shutil.copytree(rollouts, Path(temporary) / "kept"), shared)
        trained = time.monotonic() - begun
        held_out = sentiment_task.as_prompts(task.held_out)

        def measure(weights: dict[str, torch.Tensor]) -> dict[str, float]:
            """One completion of every held-out prompt, and the loss on unseen text; equal weights once."""
            digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
            kept = cache / f"measured-{folder.name}-{job['seed']}-{job['held_out']}-{digest[:16]}.json"
            if not kept.exists():
                trainer.model.load_state_dict(weights)
                measured = trainer.evaluate(held_out)
                names = ("reward", "reward_error", "distinct_bigrams", "share_cut", "mean_length")
                values = {name: measured[f"eval_{name}"] for name in names}
                values["unseen_loss"] = sentiment_task.loss_on(trainer.model, task.tokenizer, task.unseen)
                partial = kept.with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps(values), encoding="utf-8")
                partial.replace(kept)
            return json.loads(kept.read_text(encoding="utf-8"))

        for number in range(1, job["rounds"] + 1):
            kept_iterate = AutoModelForCausalLM.from_pretrained(Path(out) / "_rounds" / "iterates" / str(number))
            iterates.append(kept_iterate.state_dict())
        found = []
        for summary, before, last in zip(trainer.round_summaries, iterates, iterates[1:], strict=False):
            point = measure(last)
            point |= {name: summary[name] for name in ("tokens", "prompts", "pairs", "ties")}
            if alpha == 0 and job["floor"] is None:
                for name, step in EXPO.items():
                    point[name] = measure({key: last[key] + step * (last[key] - before[key]) for key in last})
            found.append(point)
        start = measure(iterates[0])
    return {**job, "start": start, "found": found, "trained": trained, "seconds": time.monotonic() - begun}


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    try:
        # The trainers' own lines would bury the campaign's.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            return work(job)
    except Exception:
        return {"error": traceback.format_exc()}


# ---- The campaign ----


def key(job: dict[str, Any]) -> tuple[Any, ...]:
    names = (
        "method",
        "rate",
        "beta",
        "epochs",
        "seed",
        "model_seed",
        "rounds",
        "prompts",
        "pretraining",
        "pretraining_epochs",
        "floor",
    )
    return tuple(job.get(name) for name in names)


class Campaign:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.path = options.out / "runs.jsonl"
        self.begun = time.monotonic()
        self.pool: Any = None
        self.runs: dict[tuple[Any, ...], dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                # A cut may have left half a line.
                if line.endswith("}"):
                    run = json.loads(line)
                    self.runs[key(run)] = run

    def model_seed(self, seed: int) -> int:
        fresh = self.options.fresh_seeds
        return fresh[0] if self.options.one_fresh_model and seed in fresh else seed

    def job(
        self, method: str | None, setting: tuple[float, float, int], seed: int, rounds: int, floor: str | None = None
    ) -> dict[str, Any]:
        rate, beta, epochs = setting
        return {
            "method": method,
            "rate": rate,
            "beta": beta,
            "epochs": epochs,
            "seed": seed,
            "model_seed": self.model_seed(seed),
            "held_out": self.options.held_out,
            "unseen": self.options.unseen,
            "rounds": rounds,
            "prompts": self.options.prompts,
            "pretraining": self.options.pretraining,
            "pretraining_epochs": self.options.pretraining_epochs,
            # None: a run of the campaign without floors.
            "floor": floor,
            "floor_texts": self.options.floor_texts,
            "cache": str(self.options.cache),
        }

    def run(self, jobs: Iterable[dict[str, Any]], what: str, until: float) -> None:
        """Work through `jobs` in their order until `until` seconds after the beginning."""
        left = [job for job in jobs if key(job) not in self.runs]
        print(f"{what}: {len(left)} runs to do", flush=True)
        if not left:
            return
        begun, skipped = time.monotonic(), 0

        def timely() -> Iterable[dict[str, Any]]:
            nonlocal skipped
            for job in left:
                # Drawn by a thread of the pool's, only as far as the semaphore allows: no run begins after its time.
                room.acquire()
                if time.monotonic() - self.begun > until:
                    skipped += 1
                    room.release()
                else:
                    yield job

        room = threading.Semaphore(self.options.workers)
        if self.pool is None:
            self.pool = multiprocessing.get_context("spawn").Pool(self.options.workers)
        for done, run in enumerate(self.pool.imap_unordered(attempt, timely()), start=1):
            room.release()
            if "error" in run:
                raise SystemExit(run["error"])
            self.runs[key(run)] = run
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: value for name, value in run.items() if name != "cache"}) + "\n")
            each = (time.monotonic() - begun) / done
            remaining = min(each * (len(left) - done), until - (time.monotonic() - self.begun) + each)
            setting = f"{run['method']}, {run['rate']:g}, {run['beta']:g}, {run['epochs']}, seed {run['seed']}"
            setting += f", floor: {run['floor']}" if run["floor"] else ""
            print(
                f"{what}: {done} of {len(left)} ({setting}), {run['seconds']:.0f} s, about "
                f"{max(remaining, 0) / 60:.0f} min left",
                flush=True,
            )
        if skipped:
            print(f"{what}: {skipped} runs left out, the time is up", flush=True)

    # ---- Reading the runs ----

    def points(
        self, method: str, setting: tuple[float, float, int], seed: int, rounds: int, floor: str | None = None
    ) -> list[dict] | None:
        """After each round: reward, loss above the start's, share of the start's distinct bigrams, tokens so far."""
        trained = method if method in TRAINED else "iterative DPO"
        run = self.runs.get(key(self.job(trained, setting, seed, rounds, floor)))
        if run is None:
            return None
        points, tokens = [], 0
        for found in run["found"]:
            tokens += found["tokens"]
            point = found if method in TRAINED else found[method]
            points.append(
                {
                    "reward": point["reward"],
                    "gain": point["reward"] - run["start"]["reward"],
                    "loss": point["unseen_loss"] - run["start"]["unseen_loss"],
                    "bigrams": point["distinct_bigrams"] / run["start"]["distinct_bigrams"],
                    "cut": point["share_cut"],
                    "tokens": tokens,
                }
            )
        return points

    def curves(self, method: str, setting: tuple[float, float, int], seeds: Sequence[int], rounds: int) -> list[list]:
        found = [self.points(method, setting, seed, rounds) for seed in seeds]
        return [points for points in found if points is not None]

    def floored(self, method: str, floor: str) -> dict[int, list[dict]]:
        """What `points` has of the runs with `--floor` that there are, by seed."""
        rounds = self.options.floor_rounds
        found = {s: self.points(method, FLOOR_SETTING, s, rounds, floor) for s in self.options.fresh_seeds}
        return {seed: points for seed, points in found.items() if points is not None}

    def grid(self) -> list[tuple[float, float, int]]:
        """The settings that every method has been tried with on every tuning seed: the same ones for each."""
        options = self.options
        return [
            setting
            for setting in options.grid
            if all(
                len(self.curves(method, setting, options.tuning_seeds, options.tuning_rounds))
                == len(options.tuning_seeds)
                for method in METHODS
            )
        ]

    def best(self, method: str, budget: str) -> list[tuple[tuple[float, float, int], int] | None]:
        """
        For T = 1, 2, ...: the setting and the round, at most T, with the highest reward, mean over the tuning seeds,
        where the means of loss and distinct bigrams are within the budget. None: nothing is.
        """
        options, candidates = self.options, []
        for setting in self.grid():
            curves = self.curves(method, setting, options.tuning_seeds, options.tuning_rounds)
            for index in range(options.tuning_rounds):
                if within(averaged(curves, index), budget):
                    candidates.append((averaged(curves, index)["gain"], setting, index + 1))
        chosen = []
        for most in range(1, options.tuning_rounds + 1):
            allowed = [candidate for candidate in candidates if candidate[2] <= most]
            chosen.append(max(allowed)[1:] if allowed else None)
        return chosen

    def soonest(self, method: str, level: float, budget: str) -> tuple[float, float, int] | None:
        """The setting whose mean curve over the tuning seeds reaches `level` in the fewest rounds in the budget."""
        options, found = self.options, []
        for setting in self.grid():
            curves = self.curves(method, setting, options.tuning_seeds, options.tuning_rounds)
            when = reaches([averaged(curves, index) for index in range(options.tuning_rounds)], level, budget)
            if when is not None:
                found.append((when, -averaged(curves, math.ceil(when) - 1)["reward"], setting))
        return min(found)[2] if found else None

    def chosen(self) -> dict[str, list[tuple[float, float, int]]]:
        """The settings of each method that the fresh seeds are run with."""
        found = {}
        for method in METHODS:
            tables = [self.best(method, budget)[::-1] for budget in BUDGETS]
            # The last round's choice of each budget first: the time may not suffice for all.
            entries = [entry for row in itertools.zip_longest(*tables) for entry in row]
            settings = [entry[0] for entry in entries if entry is not None]
            settings += [
                setting
                for budget, levels in LEVELS.items()
                for level in levels
                if (setting := self.soonest(method, level, budget)) is not None
            ]
            found[method] = list(dict.fromkeys(settings))
        return found


def averaged(curves: Sequence[Sequence[dict[str, float]]], index: int) -> dict[str, float]:
    """Means over seeds after round `index` + 1."""
    return {name: statistics.fmean(curve[index][name] for curve in curves) for name in curves[0][index]}


def within(point: dict[str, float], budget: str) -> bool:
    least_bigrams, most_loss = BUDGETS[budget]
    return point["bigrams"] >= least_bigrams and point["loss"] <= most_loss


def reaches(curve: Sequence[dict[str, float]], level: float, budget: str) -> int | None:
    """The first round after which the gain is at least `level` within the budget."""
    return next((i for i, p in enumerate(curve, start=1) if p["gain"] >= level and within(p, budget)), None)


def along(curve: Sequence[dict[str, float]], what: str, level: float) -> dict[str, float] | None:
    """Gain, bigrams, loss and number of rounds where `what` of them is first at `level`, on straight lines."""
    before = {"gain": 0.0, "bigrams": 1.0, "loss": 0.0}
    for number, point in enumerate(curve):
        if point[what] >= level:
            share = (level - before[what]) / (point[what] - before[what])
            found = {name: before[name] + share * (point[name] - before[name]) for name in ("gain", "bigrams", "loss")}
            return {**found, "rounds": number + share}
        before = point
    return None


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and from the least to the greatest of the seeds."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def named(setting: tuple[float, float, int]) -> str:
    return f"{setting[0]:g}, {setting[1]:g}, {setting[2]}"


# ---- Tables and plot ----


def report(campaign: Campaign) -> str:
    options = campaign.options
    fresh, most = options.fresh_seeds, options.tuning_rounds
    tried = campaign.grid()
    lines = [
        f"{len(tried)} settings (learning rate, beta, epochs a round) tried with every method on seeds "
        f"{', '.join(map(str, options.tuning_seeds))}: {'; '.join(named(setting) for setting in tried)}.",
        "",
    ]
    if not tried:
        return "\n".join([*lines, "Nothing to report: no setting has been run with every method."])
    starts = [run["start"] for run in campaign.runs.values() if run["method"] and run["seed"] in fresh]
    if starts:
        lines += [
            "Start, fresh seeds: "
            + ", ".join(
                f"{label} {spread([start[name] for start in starts], 3)}"
                for name, label in (
                    ("reward", "reward"),
                    ("distinct_bigrams", "distinct bigrams"),
                    ("unseen_loss", "loss on unseen text"),
                )
            )
            + ".",
            "",
        ]
    for budget in BUDGETS:
        lines += best_table(campaign, budget)
    lines += reach_table(campaign)
    lines += path_table(campaign)
    lines += ["", f"### The same setting for all ({named(tried[0])}), tuning seeds", ""]
    lines += ["| method | " + " | ".join(f"round {number}" for number in range(1, most + 1)) + " |"]
    lines += ["|---|" + "---|" * most]
    for method in METHODS:
        curves = campaign.curves(method, tried[0], options.tuning_seeds, most)
        cells = [averaged(curves, index) for index in range(most)]
        lines.append(
            f"| {method} | "
            + " | ".join(f"{c['gain']:.2f}; {c['bigrams']:.2f}; {c['loss']:+.3f}" for c in cells)
            + " |"
        )
    lines += ["", "Each cell: gain; share of the start's distinct bigrams; loss above the start's."]
    return "\n".join(lines)


def best_table(campaign: Campaign, budget: str) -> list[str]:
    options = campaign.options
    bigrams, loss = BUDGETS[budget]
    lines = [
        f"### Within {budget}: bigrams at least {bigrams:g} of the start's, loss at most {loss:g} above the start's",
        "",
        "Gain: held-out reward above the start's. After at most so many rounds; the round is the one that is kept.",
        "",
        "| method | rounds | learning rate, beta, epochs | round | gain, tuning seeds | gain, fresh seeds | "
        "loss above start | bigrams | in budget | tokens sampled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for rounds, entry in enumerate(campaign.best(method, budget), start=1):
            if entry is None:
                lines.append(f"| {method} | {rounds} | none within it | | | | | | | |")
                continue
            setting, number = entry
            tuned = campaign.curves(method, setting, options.tuning_seeds, options.tuning_rounds)
            curves = campaign.curves(method, setting, options.fresh_seeds, options.fresh_rounds)
            points = [curve[number - 1] for curve in curves]
            cells = [method, str(rounds), named(setting), str(number), f"{averaged(tuned, number - 1)['gain']:.2f}"]
            if points:
                cells += [spread([point["gain"] for point in points]), spread([point["loss"] for point in points], 3)]
                cells += [spread([point["bigrams"] for point in points])]
                cells += [f"{sum(within(point, budget) for point in points)} of {len(points)}"]
                cells += [f"{statistics.fmean(point['tokens'] for point in points) / 1000:.0f} k"]
            lines.append("| " + " | ".join(cells + [""] * (10 - len(cells))) + " |")
    return [*lines, ""]


def reach_table(campaign: Campaign) -> list[str]:
    options = campaign.options
    lines = ["### Rounds, on tuning and on fresh seeds, and sampled tokens to a gain", ""]
    lines += [
        "| gain | within | method | learning rate, beta, epochs | rounds, tuning | rounds, fresh seeds | tokens |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for budget, level, method in ((b, level, m) for b, levels in LEVELS.items() for level in levels for m in METHODS):
        setting = campaign.soonest(method, level, budget)
        if setting is None:
            lines.append(f"| {level:g} | {budget} | {method} | not reached | | | |")
            continue
        tuned = campaign.curves(method, setting, options.tuning_seeds, options.tuning_rounds)
        number = reaches([averaged(tuned, index) for index in range(options.tuning_rounds)], level, budget)
        curves = campaign.curves(method, setting, options.fresh_seeds, options.fresh_rounds)
        reached = [reaches(curve, level, budget) for curve in curves]
        tokens = [c[r - 1]["tokens"] / 1000 for c, r in zip(curves, reached, strict=True) if r is not None]
        shown = ", ".join("never" if r is None else str(r) for r in reached)
        sampled = f"{statistics.fmean(tokens):.0f} k" if tokens else ""
        lines.append(f"| {level:g} | {budget} | {method} | {named(setting)} | {number} | {shown} | {sampled} |")
    return [*lines, ""]


def path_table(campaign: Campaign) -> list[str]:
    """Every setting at one place along the path, whatever the number of rounds: is one path better than another?"""
    options = campaign.options
    lines = [
        f"### Where the loss on unseen text is {AT_LOSS:g} above the start's, on straight lines between rounds",
        "",
        "| method | learning rate, beta, epochs | seeds | gain | bigrams | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for method, setting in itertools.product(METHODS, options.grid):
        for label, seeds, rounds in (
            ("tuning", options.tuning_seeds, options.tuning_rounds),
            ("fresh", options.fresh_seeds, options.fresh_rounds),
        ):
            curves = campaign.curves(method, setting, seeds, rounds)
            points = [point for curve in curves if (point := along(curve, "loss", AT_LOSS)) is not None]
            if not curves:
                continue
            cells = [method, named(setting), f"{label}, {len(points)} of {len(curves)}"]
            if points:
                cells += [spread([point[name] for point in points]) for name in ("gain", "bigrams")]
                cells += [spread([point["rounds"] for point in points], 1)]
            lines.append("| " + " | ".join(cells + [""] * (6 - len(cells))) + " |")
    return lines


def floor_report(campaign: Campaign) -> str:
    options = campaign.options
    lines = [
        f"Learning rate, beta, epochs a round: {named(FLOOR_SETTING)}. Mean (least to greatest) of the seeds "
        f"{', '.join(map(str, options.fresh_seeds))}.",
        "",
        "### After each round",
        "",
        "| method | floor | seeds | round | reward | gain | bigrams | loss above start | cut |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, floor), number in itertools.product(FLOORED, range(options.floor_rounds)):
        points = [curve[number] for curve in campaign.floored(method, floor).values()]
        if points:
            cells = [method, floor, str(len(points)), str(number + 1)]
            cells += [spread([point[name] for point in points]) for name in ("reward", "gain", "bigrams")]
            cells += [spread([point["loss"] for point in points], 3), spread([point["cut"] for point in points])]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "### At equal reward, on straight lines between rounds", ""]
    lines += [
        "Without and with the floor, of the seeds that get there both ways; the ratio is that of the means.",
        "",
        "| method | floor | gain | seeds | loss above start | | ratio | less in | rounds | | later | bigrams | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    above = [(method, floor) for method, floor in FLOORED if floor != "none"]
    for (method, floor), gain in itertools.product(above, FLOOR_GAINS):
        cells, sides = both_ways(campaign, method, floor, "gain", gain)
        if sides:
            loss, rounds = sides["loss"], sides["rounds"]
            cells += [*(spread(side, 3) for side in loss)]
            cells += [f"{statistics.fmean(loss[1]) / statistics.fmean(loss[0]):.2f}"]
            cells += [f"{sum(b < a for a, b in zip(*loss, strict=True))} of {len(loss[0])}"]
            cells += [*(spread(side, 1) for side in rounds)]
            cells += [spread([b - a for a, b in zip(*rounds, strict=True)], 1)]
            cells += [spread(side) for side in sides["bigrams"]]
        lines.append("| " + " | ".join(cells + [""] * (13 - len(cells))) + " |")
    lines += ["", "### At equal loss, on straight lines between rounds", ""]
    lines += [
        "| method | floor | loss above start | seeds | gain | | more in | rounds | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, floor), level in itertools.product(above, FLOOR_LOSSES):
        cells, sides = both_ways(campaign, method, floor, "loss", level)
        if sides:
            cells += [*(spread(side) for side in sides["gain"])]
            cells += [f"{sum(b > a for a, b in zip(*sides['gain'], strict=True))} of {len(sides['gain'][0])}"]
            cells += [*(spread(side, 1) for side in sides["rounds"])]
        lines.append("| " + " | ".join(cells + [""] * (9 - len(cells))) + " |")
    return "\n".join(lines)


def both_ways(
    campaign: Campaign, method: str, floor: str, what: str, level: float
) -> tuple[list[str], dict[str, list[list[float]]]]:
    """The first cells of a row; and `along` without and with the floor, of the seeds that get there both ways."""
    bare, kept = campaign.floored(method, "none"), campaign.floored(method, floor)
    seeds = [seed for seed in bare if seed in kept]
    places = [(along(bare[seed], what, level), along(kept[seed], what, level)) for seed in seeds]
    both = [(without, above) for without, above in places if without is not None and above is not None]
    sides = (
        {name: [[point[name] for point in side] for side in zip(*both, strict=True)] for name in both[0][0]}
        if both
        else {}
    )
    return [method, floor, f"{level:g}", f"{len(both)} of {len(seeds)}"], sides


def plot(campaign: Campaign, path: Path) -> None:
    """Reward over the loss on unseen text and over distinct bigrams, after every round, fresh seeds."""
    options = campaign.options
    colours = {method: f"C{number}" for number, method in enumerate(METHODS)}
    curves = [
        (curve, {"color": colours[method]})
        for method, setting in itertools.product(METHODS, options.grid)
        for curve in campaign.curves(method, setting, options.fresh_seeds, options.fresh_rounds)
    ]
    draw(curves, {method: {"color": colour} for method, colour in colours.items()}, 0.25, path)


def floor_plot(campaign: Campaign, path: Path) -> None:
    """The same with and without a floor."""
    colours = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(m for m, _ in FLOORED))}
    names = {"none": "", "separate": " + floor under separate text"}
    lines = {"none": {"linestyle": "--", "markerfacecolor": "white"}, "separate": {"linestyle": "-"}}
    styles = {(m, floor): {"color": colours[m], **lines[floor]} for m, floor in FLOORED if floor in lines}
    curves = [(curve, styles[what]) for what in styles for curve in campaign.floored(*what).values()]
    most = max((point["loss"] for curve, _ in curves for point in curve), default=0.25)
    draw(curves, {method + names[floor]: style for (method, floor), style in styles.items()}, 1.05 * most, path)


def draw(
    curves: Sequence[tuple[list[dict], dict[str, str]]], legend: dict[str, dict[str, str]], most: float, path: Path
) -> None:
    """Every curve in its style, to a loss of `most` above the start's; dotted: the budgets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for curve, style in curves:
        rewards = [point["gain"] for point in curve]
        for axis, name in zip(axes, ("loss", "bigrams"), strict=True):
            values = [point[name] for point in curve]
            axis.plot(values, rewards, marker="o", markersize=2.5, linewidth=0.6, alpha=0.7, **style)
    for label, style in legend.items():
        axes[0].plot([], [], marker="o", markersize=3, label=label, **style)
    for least_bigrams, most_loss in BUDGETS.values():
        axes[0].axvline(most_loss, color="grey", linestyle=":", linewidth=0.8)
        axes[1].axvline(least_bigrams, color="grey", linestyle=":", linewidth=0.8)
    axes[0].set(
        xlabel="loss on unseen text above the start's, nats a token",
        ylabel="held-out reward above the start's",
        xlim=(-0.01, most),
    )
    axes[1].set(xlabel="share of the start's distinct bigrams")
    axes[1].invert_xaxis()
    axes[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def tune(campaign: Campaign) -> None:
    """Every method over the grid on the tuning seeds, and what is chosen so on the fresh ones."""
    options = campaign.options
    seconds = options.minutes * 60
    tuning_seconds = seconds * 0.6 if options.tuning_minutes is None else options.tuning_minutes * 60
    pretrained = {seed: campaign.job(None, (0, 0, 0), seed, 0) for seed in options.seeds}
    campaign.run([pretrained[seed] for seed in options.tuning_seeds], "Pretraining", seconds)
    tuning = [
        campaign.job(method, setting, seed, options.tuning_rounds)
        for setting, method, seed in itertools.product(options.grid, TRAINED, options.tuning_seeds)
    ]
    # The fresh seeds' models are made meanwhile.
    models = dict.fromkeys(campaign.model_seed(seed) for seed in options.fresh_seeds)
    campaign.run([pretrained[seed] for seed in models] + tuning, "Tuning", tuning_seconds)
    chosen = campaign.chosen()
    fresh = [
        campaign.job(method if method in TRAINED else "iterative DPO", setting, seed, options.fresh_rounds)
        for rank in range(max(map(len, chosen.values()), default=0))
        for seed in options.fresh_seeds
        for method, settings in chosen.items()
        for setting in settings[rank : rank + 1]
    ]
    campaign.run(list({key(job): job for job in fresh}.values()), "Fresh seeds", seconds)


def compare_floors(campaign: Campaign) -> None:
    """Every alpha with and without a floor, on the fresh seeds."""
    options = campaign.options
    seconds = options.minutes * 60
    models = dict.fromkeys(campaign.model_seed(seed) for seed in options.fresh_seeds)
    campaign.run([campaign.job(None, (0, 0, 0), seed, 0) for seed in models], "Pretraining", seconds)
    jobs = [
        campaign.job(method, FLOOR_SETTING, seed, options.floor_rounds, floor)
        for (method, floor), seed in itertools.product(FLOORED, options.fresh_seeds)
    ]
    campaign.run(jobs, "Floors", seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where runs.jsonl, tables and the cache go")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that --out holds")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables and the plot")
    parser.add_argument("--quick", action="store_true", help="about a minute: whether it works, no result")
    parser.add_argument(
        "--floor", action="store_true", help="instead of all this: rounds with and without SPO's floor"
    )
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--tuning-minutes", type=float, help="no tuning run begins later; by default 0.6 of --minutes")
    parser.add_argument("--plot", type=Path, help="the plot's file; by default in --out")
    parser.add_argument("--prompts", type=int, default=128, help="pairs a round")
    parser.add_argument(
        "--one-fresh-model", action="store_true", help="pretrain once for all fresh seeds instead of once for each"
    )
    options = parser.parse_args()
    options.grid = GRID
    options.tuning_seeds, options.fresh_seeds = TUNING_SEEDS, FRESH_SEEDS
    options.tuning_rounds = options.fresh_rounds = 3
    options.pretraining, options.pretraining_epochs = 20_000, 1
    options.held_out, options.unseen = 300, 400
    options.floor_rounds, options.floor_texts = FLOOR_ROUNDS, FLOOR_TEXTS
    if options.quick:
        options.grid, options.tuning_seeds, options.fresh_seeds = GRID[:1], (0,), (1,)
        options.tuning_rounds = options.fresh_rounds = 2
        options.prompts, options.pretraining, options.pretraining_epochs = 16, 1_000, 1
        options.held_out, options.unseen = 40, 40
        options.floor_rounds, options.floor_texts = 2, 32
        options.out = options.out or Path(tempfile.mkdtemp())
    options.seeds = (*options.tuning_seeds, *options.fresh_seeds)
    if options.out is None:
        parser.error("--out is missing: a folder for the runs")
    options.cache = options.out / "cache"
    options.cache.mkdir(parents=True, exist_ok=True)
    if (options.out / "runs.jsonl").exists() and not (options.resume or options.report):
        parser.error(f"{options.out} holds runs: --resume goes on with them, --report shows them")
    # Every process has one thread: two workers share the machine without getting in each other's way.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore"
    campaign = Campaign(options)
    if not options.report:
        (compare_floors if options.floor else tune)(campaign)
    if options.floor:
        name, text, draw_plot = "floor", floor_report(campaign), floor_plot
    else:
        name, text, draw_plot = "report", report(campaign), plot
    (options.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    draw_plot(campaign, options.plot or options.out / f"acceleration{'_floor' * options.floor}.png")


if __name__ == "__main__":
    main()
