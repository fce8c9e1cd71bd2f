"""
Likelihood displacement, with and without Stable Preference Optimization: what becomes of the preferred responses, and
of text that nobody asked the model to forget, when two responses of a pair are nearly alike.

    python recipes/benchmarks/displacement.py --out DIR --workers 2
    python recipes/benchmarks/displacement.py --quick

Needs `vaderSentiment`'s source distribution (fetched with pip), and matplotlib for the plot. A seed draws everything:
which human snippets (those of `sentiment_task.py`) a Llama of about a million parameters is trained on, the pairs, the
separate text, the unseen text, the weights and the order of training. A pair is a snippet against the same snippet
with two tokens replaced. Seeds 0 and 1 are for tuning alone, the tables are of the seeds 2, 3 and 4. Every
finished run is a line of DIR/runs.jsonl; the same command goes on after the last one, and `--only report` writes the
tables and the plot alone.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


TUNING_SEEDS, FRESH_SEEDS = (0, 1), (2, 3, 4)
SIZES = {"train": 400, "test": 200, "sft": 400, "unseen": 800}
PROMPT_WORDS = 2
REPLACED = 2  # tokens of the rejected response
# Tokens of a response, for two replaced ones to leave it much like the other, and of the whole with its end.
SHORTEST, LONGEST = 8, 32
BATCH, EPOCHS, BETA = 8, 4, 0.1
# `TUNING` tries others on the tuning seeds; what is best there by accuracy on their test pairs belongs here.
RATE = 3e-4
SIMPO_BETA = 2.0  # as SimPO's authors have it for base models (arXiv 2405.14734)


# ---- What is compared ----


def spo(coefficient: float, **kwargs: Any) -> dict[str, Any]:
    return {"sft_coef": coefficient, **kwargs}


def mixed(weight: float) -> dict[str, Any]:
    """DPO + SFT on the very data of SPO's lower level: above an optimum of 0 the gap is the token-mean loss itself."""
    return spo(weight, hinge="batch", sft_optimum=0.0)


SIMPO = {"loss_type": ["simpo"], "beta": SIMPO_BETA}
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0)
WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)


def dpop(weight: float) -> dict[str, Any]:
    return {"loss_type": ["dpop"], "dpop_lambda": weight}


# A row of the tables: its group, its name, its own arguments. Rows without `sft_coef` are stock DPOTrainer's.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("Bases", "DPO", {}),
    ("SPO", "SPO, lambda 1 (the default)", spo(1.0)),
    *[("SPO", f"SPO, lambda {value:g}", spo(value)) for value in LAMBDAS if value != 1],
    *[("DPO + SFT", f"DPO + SFT, weight {value:g}", mixed(value)) for value in WEIGHTS],
    ("Bases", "DPOP, lambda 5", {**dpop(5.0), **spo(0.0)}),
    ("Bases", "DPOP, lambda 5, + SPO", {**dpop(5.0), **spo(1.0)}),
    ("Bases", "DPOP, lambda 50", {**dpop(50.0), **spo(0.0)}),
    ("Bases", "DPOP, lambda 50, + SPO", {**dpop(50.0), **spo(1.0)}),
    ("Bases", "SimPO", {**SIMPO, **spo(0.0)}),
    ("Bases", "SimPO + SPO", {**SIMPO, **spo(1.0)}),
    ("Data and hinge", "SPO, chosen responses only", spo(1.0, lower_level="chosen")),
    ("Data and hinge", "SPO, separate text only", spo(1.0, lower_level="sft_dataset")),
    ("Data and hinge", "SPO, batch hinge", spo(1.0, hinge="batch")),
    *[
        (
            "Data and hinge",
            f"DPO + SFT of TRL (chosen only), weight {value:g}",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, value]},
        )
        for value in (0.1, 1.0)
    ],
    *[
        (
            "Solvers",
            f"{solver}, inner rate {inner:g}",
            spo(1.0, bilevel_solver=solver, inner_learning_rate=inner),
        )
        for solver in ("unrolled", "alternating")
        for inner in (0.0, 0.001, 0.01)
    ],
    (
        "Solvers",
        "unrolled, central difference, inner rate 0.001",
        spo(1.0, bilevel_solver="unrolled", inner_learning_rate=0.001, hypergradient="central_difference"),
    ),
]
TUNING: list[tuple[str, str, dict[str, Any]]] = [
    *[("Tuning", f"DPO, learning rate {rate:g}", {"learning_rate": rate}) for rate in (1e-4, 3e-4, 1e-3)],
    *[("Tuning", f"SimPO, beta {beta:g}", {**SIMPO, **spo(0.0), "beta": beta}) for beta in (0.1, 2.0, 10.0)],
]
MAIN = ("DPO", "SPO, lambda 1 (the default)", "DPO + SFT, weight 0.1")


# ---- Data ----


def make_pair(text: str, tokenizer: PreTrainedTokenizerFast, draw: random.Random) -> dict[str, str] | None:
    """
    A snippet's first words, the rest as it is and the rest with two tokens replaced; None if it is too short or long.

    The replacement is drawn again until the tokenizer makes of the new text what it was made of: as many tokens, all
    but two of them the same.
    """
    words = text.split()
    prompt = " ".join(words[:PROMPT_WORDS])
    tokens, begin = tokenizer(text)["input_ids"], len(tokenizer(prompt)["input_ids"])
    if len(tokens) - begin < SHORTEST or len(tokens) >= LONGEST:
        return None
    for _ in range(1000):
        changed = list(tokens)
        for place in draw.sample(range(begin, len(tokens)), REPLACED):
            changed[place] = draw.randrange(2, len(tokenizer))  # 0 and 1 are padding and the end
        rejected = tokenizer.decode(changed).removeprefix(" ")
        differing = sum(a != b for a, b in zip(tokens, changed, strict=True))
        if differing == REPLACED and tokenizer(rejected)["input_ids"] == changed and rejected.startswith(prompt):
            return {"prompt": prompt, "chosen": text[len(prompt) :], "rejected": rejected[len(prompt) :]}
    return None


def make_model(cache: Path, seed: int, pretraining: int, epochs: int) -> Path:
    """The folder with a seed's pretrained model and the snippets that it has not seen; made once."""
    import sentiment_task

    folder = cache / f"model-{seed}-{pretraining}-{epochs}"
    if not folder.exists():
        # No two are alike in lower case, letters and digits, so neither are any two of the parts.
        texts = [text for _, text in sentiment_task.snippets(sentiment_task.fetch(cache))]
        texts = random.Random(seed).sample(texts, len(texts))
        tokenizer = sentiment_task.make_tokenizer(texts[:pretraining])
        model = sentiment_task.pretrain(tokenizer, texts[:pretraining], seed, epochs)
        partial = folder.with_suffix(f".{os.getpid()}")
        for part in (model, tokenizer):
            part.save_pretrained(partial)
        (partial / "left.json").write_text(json.dumps(texts[pretraining:]), encoding="utf-8")
        partial.rename(folder)
    return folder


def make_data(folder: Path, seed: int) -> dict[str, Any]:
    """Pairs, separate rows and unseen text, no snippet in two of them, and what the model of `folder` gives them."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    kept = folder / f"data-{seed}.json"
    if not kept.exists():
        left, draw = json.loads((folder / "left.json").read_text(encoding="utf-8")), random.Random(seed)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        data: dict[str, Any] = {"unseen": left[: SIZES["unseen"]]}
        rest = draw.sample(left[SIZES["unseen"] :], len(left) - SIZES["unseen"])
        pairs = (pair for text in rest if (pair := make_pair(text, tokenizer, draw)) is not None)
        for name in ("train", "test", "sft"):
            data[name] = list(itertools.islice(pairs, SIZES[name]))
            if len(data[name]) < SIZES[name]:
                raise SystemExit(f"Too few snippets that are neither short nor long for the {name} rows")
        data["sft"] = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in data["sft"]]
        data["start"] = measure(LlamaForCausalLM.from_pretrained(folder).eval(), tokenizer, data)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(data), encoding="utf-8")
        partial.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


# ---- Measuring ----


def log_probs(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]]
) -> list[float]:
    """Nats of each response after its prompt, the end token included, as the trainers count it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    found: list[float] = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len("".join(rows[index])))
    for start in range(0, len(rows), 50):
        indices = order[start : start + 50]
        some = [rows[index] for index in indices]
        ids = [torch.tensor([*tokenizer(a + b)["input_ids"], tokenizer.eos_token_id]) for a, b in some]
        begins = torch.tensor([[len(tokenizer(prompt)["input_ids"])] for prompt, _ in some])  # (B, 1)
        ends = torch.tensor([[len(row)] for row in ids])  # (B, 1)
        padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, T)
        places = torch.arange(padded.shape[1])[None]  # (1, T)
        with torch.no_grad():
            logits = model(input_ids=padded, attention_mask=(places < ends).long()).logits[:, :-1]
        each = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]  # (B, T - 1)
        counted = (places >= begins) & (places < ends)  # (B, T)
        for index, value in zip(indices, (each * counted[:, 1:]).sum(-1).tolist(), strict=True):
            found[index] = value
    return found


def measure(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, data: dict[str, Any]) -> dict[str, Any]:
    """Log-probability of every response of the pairs by split, and nats a token on the unseen text."""
    import sentiment_task

    found: dict[str, Any] = {"unseen": sentiment_task.loss_on(model, tokenizer, data["unseen"])}
    for split in ("train", "test"):
        for side in ("chosen", "rejected"):
            rows = [(pair["prompt"], pair[side]) for pair in data[split]]
            found[f"{split}_{side}"] = log_probs(model, tokenizer, rows)
    return found


def changes(start: dict[str, Any], end: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run, the same for every method: all are changes against the start."""
    found = {"damage": end["unseen"] - start["unseen"]}
    for split in ("train", "test"):
        moved = {
            side: [b - a for a, b in zip(start[f"{split}_{side}"], end[f"{split}_{side}"], strict=True)]
            for side in ("chosen", "rejected")
        }
        margins = [a - b for a, b in zip(moved["chosen"], moved["rejected"], strict=True)]
        found[f"{split}_chosen"] = statistics.fmean(moved["chosen"])
        found[f"{split}_rejected"] = statistics.fmean(moved["rejected"])
        found[f"{split}_displaced"] = statistics.fmean(change < 0 for change in moved["chosen"])
        found[f"{split}_accuracy"] = statistics.fmean(margin > 0 for margin in margins)
    return found


# ---- One run, in a worker ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train one row with one seed; without a row only the model that it starts with is made."""
    import common
    import datasets
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    begun = time.monotonic()
    folder = make_model(Path(job["cache"]), job["model_seed"], job["pretraining"], job["pretraining_epochs"])
    result = {name: value for name, value in job.items() if name != "cache"}
    if job["row"] is not None:
        data = make_data(folder, job["seed"])
        result["start"] = data["start"]["unseen"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config_class, trainer_class, more = DPOConfig, DPOTrainer, {}
        if "sft_coef" in job["settings"]:
            from trl_extras import SPOConfig, SPOTrainer

            config_class, trainer_class = SPOConfig, SPOTrainer
            if job["settings"]["sft_coef"] and job["settings"].get("lower_level") != "chosen":
                more["sft_dataset"] = datasets.Dataset.from_list(data["sft"])
        with tempfile.TemporaryDirectory() as out:
            settings = {
                "learning_rate": RATE,
                "beta": BETA,
                "num_train_epochs": EPOCHS,
                "lr_scheduler_type": "linear",
                "max_length": LONGEST,
                "precompute_ref_log_probs": True,
                "precompute_ref_batch_size": 50,
                "seed": job["seed"],
                # The same numbers wherever it runs.
                "use_cpu": True,
                "bf16": False,
                "logging_steps": 1000,
                **job["settings"],
            }
            trainer = trainer_class(
                model=model,
                args=config_class(**common.arguments(out, BATCH, **settings)),
                train_dataset=datasets.Dataset.from_list(data["train"]),
                processing_class=tokenizer,
                **more,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        # The trainers replace the model's forward: what is measured is a plain model with the trained weights.
        plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain.load_state_dict(trainer.model.state_dict())
        result |= changes(data["start"], measure(plain.eval(), tokenizer, data))
    return {**result, "seconds": round(time.monotonic() - begun, 1)}


# ---- The campaign ----


class Campaign:
    """The runs of a folder: those that are done, and doing the others."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.path = options.out / "runs.jsonl"
        self.deadline = time.monotonic() + options.minutes * 60
        self.done: dict[str, dict[str, Any]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            if line.endswith("}"):  # a kill may have cut the last one
                run = json.loads(line)
                names = ("settings", "seed", "model_seed", "pretraining", "pretraining_epochs")
                self.done[json.dumps([run[name] for name in names], sort_keys=True)] = run

    def key(self, settings: dict[str, Any] | None, seed: int) -> str:
        """Names may change and rows may share a run: what was trained decides."""
        return json.dumps([settings, seed, *self.model(seed).values()], sort_keys=True)

    def model(self, seed: int) -> dict[str, int]:
        options = self.options
        one = options.one_model and seed in options.seeds
        return {
            "model_seed": options.seeds[0] if one else seed,
            "pretraining": options.pretraining,
            "pretraining_epochs": options.pretraining_epochs,
        }

    def job(self, row: str | None, settings: dict[str, Any] | None, seed: int) -> dict[str, Any]:
        cache = str(self.options.out / "cache")
        return {"row": row, "settings": settings, "seed": seed, "cache": cache, **self.model(seed)}

    def run(self, jobs: Iterable[dict[str, Any]]) -> list[str]:
        """Do what is not done; the failures, one line each."""
        wanted = {self.key(job["settings"], job["seed"]): job for job in jobs}
        left = [job for key, job in wanted.items() if key not in self.done]
        begun, failures, finished = time.monotonic(), [], 0
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.options.workers, context) as pool:
            pending: dict[concurrent.futures.Future[dict[str, Any]], dict[str, Any]] = {}
            while left or pending:
                # Handed out as workers come free, so that none begins after the deadline.
                while left and len(pending) < self.options.workers:
                    if time.monotonic() > self.deadline:
                        print(f"{len(left)} runs left out, the time is up: the same command goes on", flush=True)
                        left = []
                    else:
                        job = left.pop(0)
                        pending[pool.submit(work, job)] = job
                over, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in over:
                    job = pending.pop(future)
                    what = f"{job['row'] or 'pretraining'}, seed {job['seed']}"
                    finished += 1
                    if (error := future.exception()) is not None:
                        failures.append(f"{what}: {type(error).__name__}: {error}")
                        print(f"FAILED {failures[-1]}", flush=True)
                        continue
                    run = future.result()
                    self.done[self.key(run["settings"], run["seed"])] = run
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(run) + "\n")
                    remaining = (time.monotonic() - begun) / finished * (len(left) + len(pending)) / 60
                    print(f"{what}: {run['seconds']:.0f} s, about {remaining:.0f} min left", flush=True)
        return failures

    def values(self, settings: dict[str, Any], name: str, seeds: Sequence[int]) -> dict[int, float]:
        """A number of the runs that there are, by seed."""
        runs = {seed: self.done.get(self.key(settings, seed)) for seed in seeds}
        return {seed: run[name] for seed, run in runs.items() if run is not None}


# ---- Tables, claims and plot ----


COLUMNS = {
    "train_chosen": ("chosen, train", "{:+.1f}"),
    "train_displaced": ("displaced, train", "{:.1%}"),
    "test_chosen": ("chosen, test", "{:+.1f}"),
    "test_displaced": ("displaced, test", "{:.1%}"),
    "test_accuracy": ("accuracy, test", "{:.3f}"),
    "damage": ("damage, unseen", "{:+.3f}"),
}


def folded(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation between seeds; 0 for one seed."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def shown(values: Iterable[float], form: str) -> str:
    found = list(values)
    if not found:
        return ""
    mean, deviation = folded(found)
    after = f" ± {form.replace('+', '').format(deviation)}" if len(found) > 1 else ""
    return (form.format(mean) + after).replace("%", " %")


def table(campaign: Campaign, rows: Iterable[tuple[str, str, dict[str, Any]]], seeds: Sequence[int]) -> list[str]:
    lines, missing = [], []
    for _, name, settings in rows:
        number = len(campaign.values(settings, "damage", seeds))
        cells = [
            shown(campaign.values(settings, column, seeds).values(), form) for column, (_, form) in COLUMNS.items()
        ]
        note = "" if number == len(seeds) else f" ({number} of {len(seeds)} seeds)"
        if number:
            lines.append(f"| {name}{note} | " + " | ".join(cells) + " |")
        else:
            missing.append(name)
    if lines:
        titles = " | ".join(title for title, _ in COLUMNS.values())
        lines = [f"| objective | {titles} |", "|---|" + "---|" * len(COLUMNS), *lines, ""]
    return [*lines, *([f"Not run: {'; '.join(missing)}.", ""] if missing else [])]


def difference(campaign: Campaign, name: str, a: dict[str, Any], b: dict[str, Any]) -> list[float]:
    """a - b of each seed that has both: the seeds' pairs and models differ, and cancel so."""
    first, second = (campaign.values(settings, name, campaign.options.seeds) for settings in (a, b))
    return [first[seed] - second[seed] for seed in first if seed in second]


def error(values: Sequence[float]) -> float:
    """The standard error of a mean over seeds."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def at_damage(campaign: Campaign, settings: Sequence[dict[str, Any]], seed: int, damage: float) -> float | None:
    """Accuracy of a seed's curve where it has that damage, on straight lines between its points; None outside them."""
    points = []
    for one in settings:
        places, heights = (campaign.values(one, name, [seed]) for name in ("damage", "test_accuracy"))
        if seed in places:
            points.append((places[seed], heights[seed]))
    points.sort()
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= damage <= right:
            return low + (high - low) * (damage - left) / ((right - left) or 1)
    return None


def claims(campaign: Campaign) -> list[str]:
    """What was hoped for beforehand, and the numbers that decide it."""
    seeds, default = campaign.options.seeds, spo(1.0)
    numbers = {
        (label, name): list(campaign.values(settings, name, seeds).values())
        for label, settings in (("DPO", {}), ("SPO", default))
        for name in ("test_accuracy", "train_displaced", "damage")
    }
    if not all(numbers.values()):
        return ["No claims: DPO and SPO's default are needed.", ""]
    means = {key: statistics.fmean(values) for key, values in numbers.items()}
    base, stable = means["DPO", "test_accuracy"], means["SPO", "test_accuracy"]
    pairs = SIZES["test"] * len(numbers["DPO", "test_accuracy"])
    paired = difference(campaign, "test_accuracy", default, {})
    share = means["SPO", "damage"] / means["DPO", "damage"]
    lines = [
        f"- Accuracy (test): DPO {base:.3f}, SPO {stable:.3f}; SPO - DPO {stable - base:+.3f}, by seed "
        f"{', '.join(f'{value:+.3f}' for value in paired)}. Standard error of DPO's mean: "
        f"{error(numbers['DPO', 'test_accuracy']):.4f} over seeds, "
        f"{math.sqrt(base * (1 - base) / pairs):.4f} over the {pairs} pairs.",
        f"- Displaced (train): {means['SPO', 'train_displaced']:.2%}, by seed "
        f"{', '.join(f'{value:.2%}' for value in numbers['SPO', 'train_displaced'])}.",
        f"- Damage: {means['SPO', 'damage']:.3f} against {means['DPO', 'damage']:.3f}, a share of {share:.3f}.",
    ]
    curves = {
        "SPO": ("lambda", [(value, spo(value)) for value in LAMBDAS]),
        "DPO + SFT": ("weight", [(value, mixed(value)) for value in WEIGHTS]),
    }
    lines.append("- Accuracy at equal damage, SPO - DPO + SFT, by seed where the curves meet (DPO ends both):")
    # At the points of each: straight lines cut off what a curve has above them, so either curve flatters itself.
    for sign, label, other in ((1, "SPO", "DPO + SFT"), (-1, "DPO + SFT", "SPO")):
        rival = [{}, *(settings for _, settings in curves[other][1])]
        for value, settings in curves[label][1]:
            found = []
            for seed, damage in campaign.values(settings, "damage", seeds).items():
                if (there := at_damage(campaign, rival, seed, damage)) is not None:
                    here = campaign.values(settings, "test_accuracy", [seed])[seed]
                    found.append(sign * (here - there))
            if found:
                gaps = ", ".join(f"{gap:+.3f}" for gap in found)
                spread = f" ± {error(found):.3f} (standard error)" if len(found) > 1 else ""
                lines.append(f"  - {curves[label][0]} {value:g}: {gaps}; mean {statistics.fmean(found):+.3f}{spread}")
    lines.append("- Accuracy that a tenfold parameter costs:")
    for label, (parameter, entries) in curves.items():
        for (low, before), (high, after) in zip(entries, entries[2:], strict=False):
            costs = difference(campaign, "test_accuracy", before, after)
            if costs:
                mean = f"{statistics.fmean(costs):+.3f} ± {error(costs):.3f}"
                lines.append(f"  - {label}, {parameter} {low:g} to {high:g}: {mean} (standard error)")
    return [*lines, ""]


def report(campaign: Campaign) -> str:
    seeds = campaign.options.seeds
    starts = campaign.values({}, "start", seeds).values()
    lines = [f"Seeds {', '.join(map(str, seeds))}; the start: {shown(starts, '{:.2f}')} nats a token, unseen.", ""]
    for group in dict.fromkeys(group for group, *_ in ROWS):
        lines += [f"### {group}", "", *table(campaign, (row for row in ROWS if row[0] == group), seeds)]
    tuned = campaign.options.tuning_seeds
    if tuned:
        lines += [f"### Tuning, seeds {', '.join(map(str, tuned))}", "", *table(campaign, TUNING, tuned)]
    return "\n".join([*lines, "### Claims", "", *claims(campaign)])


def plot(campaign: Campaign, path: Path) -> None:
    """Accuracy over damage, one curve a method; bars are standard deviations between seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seeds = campaign.options.seeds
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")

    def draw(label: str, entries: Sequence[tuple[str, dict[str, Any]]], line: str, colour: str) -> None:
        points = []
        for text, settings in entries:
            places, heights = (campaign.values(settings, name, seeds).values() for name in ("damage", "test_accuracy"))
            if places:
                points.append((text, *folded(places), *folded(heights)))
        if not points:
            return
        texts, x, x_error, y, y_error = zip(*points, strict=True)
        axes.errorbar(x, y, y_error, x_error, line, color=colour, label=label, markersize=4, elinewidth=0.6)
        for text, across, up in zip(texts, x, y, strict=True):
            axes.annotate(text, (across, up), textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour)

    draw("SPO (lambda)", [(f"{value:g}", spo(value)) for value in LAMBDAS], "o-", "tab:blue")
    draw("DPO + SFT on the same data (weight)", [(f"{value:g}", mixed(value)) for value in WEIGHTS], "s--", "tab:red")
    draw("DPO", [("", {})], "D", "black")
    others = [(name, settings) for group, name, settings in ROWS if group == "Bases" and name != "DPO"]
    draw("other bases", others, "^", "grey")
    axes.set(xlabel="damage: nats a token above the start, unseen text", ylabel="preference accuracy, test pairs")
    axes.set_xscale("log")
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    stages = ("pretraining", "tuning", "tables", "report")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=stages, help="a part: 'tables' all but the tuning seeds, 'report' no runs")
    parser.add_argument("--rows", nargs="+", help="do only rows whose names contain one of these texts")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--out", type=Path, help="the folder of runs, models and tables; gone on with if it has some")
    parser.add_argument("--plot", type=Path, help="the plot's file; displacement.png in --out by default")
    parser.add_argument("--quick", action="store_true", help="a few minutes: the main rows, one seed, no result")
    parser.add_argument("--one-model", action="store_true", help="pretrain once for all seeds of the tables")
    options = parser.parse_args()
    options.tuning_seeds, options.seeds = TUNING_SEEDS, FRESH_SEEDS
    options.pretraining, options.pretraining_epochs = 20_000, 3
    rows = ROWS
    if options.quick:
        options.tuning_seeds, options.seeds = (), FRESH_SEEDS[:1]
        options.pretraining, options.pretraining_epochs = 4_000, 1
        rows = [row for row in ROWS if row[1] in MAIN]
        options.out = options.out or Path(tempfile.gettempdir()) / "displacement-quick"
    if options.out is None:
        parser.error("--out is missing: a folder for the runs")
    (options.out / "cache").mkdir(parents=True, exist_ok=True)
    # Inherited by the workers: they share the machine, and the campaign's lines are the ones to read.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    campaign = Campaign(options)
    failures = []
    if options.only != "report":
        tuning_seeds = () if options.only == "tables" else options.tuning_seeds
        seeds = {campaign.model(seed)["model_seed"] for seed in (*tuning_seeds, *options.seeds)}
        failures = campaign.run([campaign.job(None, None, seed) for seed in sorted(seeds)])
        if options.only != "pretraining":
            jobs = [campaign.job(name, made, seed) for seed in tuning_seeds for _, name, made in TUNING]
            rows = [row for row in rows if not options.rows or any(text in row[1] for text in options.rows)]
            if options.only != "tuning":
                jobs += [campaign.job(name, made, seed) for _, name, made in rows for seed in options.seeds]
            failures += campaign.run(jobs)
    text = report(campaign)
    (options.out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    plot(campaign, options.plot or options.out / "displacement.png")
    if failures:
        raise SystemExit("\n".join(["These failed:", *failures]))


if __name__ == "__main__":
    main()
