"""
Whether *accelerated* preference optimization saves rounds of sampling, against iterative DPO at its own best.

    python recipes/benchmarks/acceleration.py --out DIR --workers 2 --resume
    python recipes/benchmarks/acceleration.py --quick

Needs `vaderSentiment`, and matplotlib for the plot. The task is `sentiment_task.py`'s. In the exact setting momentum
travels further along one path in a round (Theorem 4.1), as a larger learning rate, a smaller beta or more epochs do.
So every method is tuned over the same grid of these three, on seeds of their own, for the highest held-out reward
within a budget: distinct bigrams and the loss on unseen human text may move only so far from the start. What is
chosen so is run again on fresh seeds. Every finished run is a line of DIR/runs.jsonl; `--resume` goes on from there,
`--report` only writes the tables and the plot from it.
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


# ---- One run, in a worker ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train one configuration with one seed; returns the job with what was measured."""
    import datasets
    import sentiment_task
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, PrinterCallback
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    from trl_extras import APOConfig, APOTrainer

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
    with tempfile.TemporaryDirectory() as out:
        # All runs of a seed begin with the same policy and prompts: what it samples in the first round is sampled
        # once, and the trainer finds it as it finds its own after an interruption.
        shared = cache / f"first-{folder.name}-{job['seed']}-{job['rounds']}-{job['prompts']}"
        rollouts = Path(out) / "_rounds" / "rollouts" / "round-0000"
        if shared.exists():
            shutil.copytree(shared, rollouts)
        trainer = APOTrainer(
            model=task.model,
            args=APOConfig(
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
            ),
            train_dataset=sentiment_task.as_prompts(prompts),
            reward_funcs=vader,
            processing_class=task.tokenizer,
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
            if alpha == 0:
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

    def job(self, method: str | None, setting: tuple[float, float, int], seed: int, rounds: int) -> dict[str, Any]:
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
            print(
                f"{what}: {done} of {len(left)} ({setting}), {run['seconds']:.0f} s, about "
                f"{max(remaining, 0) / 60:.0f} min left",
                flush=True,
            )
        if skipped:
            print(f"{what}: {skipped} runs left out, the time is up", flush=True)

    # ---- Reading the runs ----

    def points(self, method: str, setting: tuple[float, float, int], seed: int, rounds: int) -> list[dict] | None:
        """After each round: reward, loss above the start's, share of the start's distinct bigrams, tokens so far."""
        trained = method if method in TRAINED else "iterative DPO"
        run = self.runs.get(key(self.job(trained, setting, seed, rounds)))
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


def at_loss(curve: Sequence[dict[str, float]], loss: float) -> dict[str, float] | None:
    """Gain, bigrams and number of rounds where the loss is first so far above the start's, on straight lines."""
    before = {"gain": 0.0, "bigrams": 1.0, "loss": 0.0}
    for number, point in enumerate(curve):
        if point["loss"] >= loss:
            share = (loss - before["loss"]) / (point["loss"] - before["loss"])
            found = {name: before[name] + share * (point[name] - before[name]) for name in ("gain", "bigrams")}
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
            points = [point for curve in curves if (point := at_loss(curve, AT_LOSS)) is not None]
            if not curves:
                continue
            cells = [method, named(setting), f"{label}, {len(points)} of {len(curves)}"]
            if points:
                cells += [spread([point[name] for point in points]) for name in ("gain", "bigrams")]
                cells += [spread([point["rounds"] for point in points], 1)]
            lines.append("| " + " | ".join(cells + [""] * (6 - len(cells))) + " |")
    return lines


def plot(campaign: Campaign, path: Path) -> None:
    """Reward over the loss on unseen text and over distinct bigrams, after every round, fresh seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options = campaign.options
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    colours = dict(zip(METHODS, pyplot.get_cmap("tab10").colors, strict=False))
    for method, setting in itertools.product(METHODS, options.grid):
        for curve in campaign.curves(method, setting, options.fresh_seeds, options.fresh_rounds):
            style = {"color": colours[method], "marker": "o", "markersize": 2.5, "linewidth": 0.6, "alpha": 0.7}
            rewards = [point["gain"] for point in curve]
            axes[0].plot([point["loss"] for point in curve], rewards, **style)
            axes[1].plot([point["bigrams"] for point in curve], rewards, **style)
    for method, colour in colours.items():
        axes[0].plot([], [], color=colour, marker="o", markersize=3, label=method)
    for least_bigrams, most_loss in BUDGETS.values():
        axes[0].axvline(most_loss, color="grey", linestyle=":", linewidth=0.8)
        axes[1].axvline(least_bigrams, color="grey", linestyle=":", linewidth=0.8)
    axes[0].set(
        xlabel="loss on unseen text above the start's, nats a token",
        ylabel="held-out reward above the start's",
        xlim=(-0.01, 0.25),
    )
    axes[1].set(xlabel="share of the start's distinct bigrams")
    axes[1].invert_xaxis()
    axes[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where runs.jsonl, tables and the cache go")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that --out holds")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables and the plot")
    parser.add_argument("--quick", action="store_true", help="about a minute: whether it works, no result")
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--tuning-minutes", type=float, help="no tuning run begins later; by default 0.6 of --minutes")
    parser.add_argument("--plot", type=Path, help="the plot's file; by default acceleration.png in --out")
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
    if options.quick:
        options.grid, options.tuning_seeds, options.fresh_seeds = GRID[:1], (0,), (1,)
        options.tuning_rounds = options.fresh_rounds = 2
        options.prompts, options.pretraining, options.pretraining_epochs = 16, 1_000, 1
        options.held_out, options.unseen = 40, 40
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
    text = report(campaign)
    (options.out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    plot(campaign, options.plot or options.out / "acceleration.png")


if __name__ == "__main__":
    main()
