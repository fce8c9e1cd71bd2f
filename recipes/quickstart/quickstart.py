"""Accelerated Preference Optimization of a 135M model on what it says itself, judged by a sentiment scorer, on a CPU.

    bash recipes/quickstart/run.sh [options]

`run.sh` makes the environment and calls this file. It fetches the model and the film lines (`parts.py`), makes the
prompts (`openings.py`), and runs three rounds with `APOTrainer`: each samples completions from its policy, has them
judged (`rewards.py`), trains on best against worst, and is measured on held-out prompts and on unseen human text
(`measure.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from progress import Meter, Watch, duration, plan, reading_label
from rich import box
from rich.console import Console
from rich.table import Table


STARTED = time.monotonic()
REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS_FILE = "quickstart_settings.json"
RESULT_FILE = "quickstart.json"
TABLE_FILE = "quickstart.md"

# recipes/quickstart/README.md says why, with the numbers of the runs.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "rounds": 3,
    "prompts": 24,
    "learning_rate": 4e-5,
    "beta": 0.1,
    "alpha": 0.3,
    "batch_size": 4,
    "lora": False,
}
# An adapter's rate is about ten times that of the weights themselves.
LORA_LEARNING_RATE = 1e-3
# On every linear layer; twice the rank is the usual alpha.
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

# The distribution that is sampled from: the paper's, with fewer tokens.
NUM_GENERATIONS = 5
MAX_NEW_TOKENS = 20
TEMPERATURE, TOP_P = 0.7, 0.9
# Completions at a time: more rows share the reading of the weights, which is much of a step's cost on a CPU.
GENERATION_BATCH_SIZE = 200
# How many held-out prompts are answered before and after: the first ones, whatever they are.
SHOWN = 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="draws the training prompts and all samples (default: 0)")
    parser.add_argument("--rounds", type=int, help="rounds of sampling, training and extrapolation (default: 3)")
    parser.add_argument(
        "--prompts", type=int, help=f"prompts a round, a pair of completions each (default: {DEFAULTS['prompts']})"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"(default: {DEFAULTS['learning_rate']:g}, with --lora {LORA_LEARNING_RATE:g})",
    )
    parser.add_argument("--beta", type=float, help=f"DPO's beta (default: {DEFAULTS['beta']:g})")
    parser.add_argument(
        "--extrapolation_alpha",
        dest="alpha",
        type=float,
        help="extrapolation parameter; 0 is iterative DPO (default: 0.3)",
    )
    parser.add_argument("--batch-size", type=int, help=f"pairs a step (default: {DEFAULTS['batch_size']})")
    parser.add_argument(
        "--lora", action="store_true", default=None, help="train a LoRA adapter a round instead of the whole model"
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/quickstart, -2, -3, ...)")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument(
        "--cache",
        type=Path,
        default=REPOSITORY / ".cache" / "trl-extras-quickstart",
        help="folder of the downloads (default: .cache/trl-extras-quickstart in the repository)",
    )
    return parser.parse_args(argv)


class Refused(RuntimeError):
    """The run cannot go on as asked; the message is one line that says why and what to do."""


# ---- The folder of a run ----


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def runs_folder() -> list[Path]:
    """The default folders that exist, oldest first."""
    folders = []
    number = 1
    while (folder := REPOSITORY / "runs" / ("quickstart" if number == 1 else f"quickstart-{number}")).exists():
        folders.append(folder)
        number += 1
    return folders


def settle(options: argparse.Namespace, say: Any) -> tuple[Path, dict[str, Any]]:
    """Where the run lies, and what it is run with: a resume takes what the run began with."""
    existing = runs_folder()
    if options.resume:
        output = options.output or (existing[-1] if existing else None)
        settings = read_json(output / SETTINGS_FILE) if output else None
        if output is None or settings is None:
            raise Refused(f"--resume: there is no run in {output or 'runs/quickstart'} to go on with")
        if (output / RESULT_FILE).exists():
            raise Refused(f"--resume: the run in {output} is finished; its table is {output / TABLE_FILE}")
        for name in DEFAULTS:
            given = getattr(options, name)
            # A run of before there was --lora has no word on it.
            if given is not None and given != settings.get(name, DEFAULTS[name]):
                flag = "--" + name.replace("_", "-")
                began = settings.get(name, DEFAULTS[name])
                raise Refused(f"{flag} is {given}, but the run in {output} began with {began}: leave it out")
        return output, {"lora": False, **settings}
    if options.output is not None:
        output = options.output
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise Refused(f"--output {output} is not empty: choose another folder, or go on with that run by --resume")
    else:
        if existing and not (existing[-1] / RESULT_FILE).exists() and (existing[-1] / SETTINGS_FILE).exists():
            say(f"[yellow]{existing[-1]} holds an unfinished run; --resume would go on with it[/yellow]")
        number = len(existing) + 1
        output = REPOSITORY / "runs" / ("quickstart" if number == 1 else f"quickstart-{number}")
    settings = {
        name: value if getattr(options, name) is None else getattr(options, name) for name, value in DEFAULTS.items()
    }
    if settings["lora"] and options.learning_rate is None:
        settings["learning_rate"] = LORA_LEARNING_RATE
    for name in ("rounds", "prompts", "batch_size"):
        if settings[name] < 1:
            raise Refused(f"--{name.replace('_', '-')} is {settings[name]}, but has to be at least 1")
    for name in ("learning_rate", "beta", "alpha"):
        value, least = settings[name], "at least 0" if name == "alpha" else "above 0"
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "alpha"):
            raise Refused(f"--{name.replace('_', '-')} is {value:g}, but has to be a finite number {least}")
    return output, settings


# ---- The table ----


HEADINGS = (
    "after round",
    "held-out reward",
    "extrapolated",
    "distinct bigrams",
    "cut, %",
    "loss on unseen text, nats/token",
    "its change",
    "pairs",
    "ties",
    "norm of update",
    "norm of momentum",
    "cosine",
)


def pm(measured: dict[str, Any]) -> str:
    return f"{measured['reward']:.3f} ± {measured['reward_error']:.3f}"


def table_rows(summaries: list[dict[str, Any]], start_loss: float) -> list[dict[str, Any]]:
    """The start, then the trainer's rows."""
    start = {"round": 0, "iterate": summaries[0]["heldout_start"], "extrapolated": None}
    rows = [start | {"unseen": {"loss": start_loss, "change": 0.0, "change_error": 0.0}}]
    for summary in summaries:
        row = {
            "round": summary["round"] + 1,
            "iterate": summary["heldout_iterate"],
            "extrapolated": summary["heldout_extrapolated"],
        }
        names = ("unseen", "pairs", "ties", "repeated", "update_norm", "momentum_norm", "update_cosine")
        more = ("reward_mean", "reward_best", "reward_worst", "tokens_per_second", "sample_seconds", "train_seconds")
        rows.append(row | {name: summary.get(name) for name in (*names, *more)})
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    def number(name: str, digits: int) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    def reward(measured: dict[str, Any] | None) -> str:
        return "-" if measured is None else pm(measured)

    return [
        "start" if row["round"] == 0 else str(row["round"]),
        reward(row["iterate"]),
        reward(row["extrapolated"]),
        f"{row['iterate']['distinct_bigrams']:.3f}",
        f"{100 * row['iterate']['share_cut']:.0f}",
        f"{row['unseen']['loss']:.3f}",
        f"{row['unseen']['change']:+.3f} ± {row['unseen']['change_error']:.3f}",
        number("pairs", 0),
        number("ties", 0),
        number("update_norm", 3),
        number("momentum_norm", 3),
        number("update_cosine", 2),
    ]


def notes(held_out: int, unseen: int) -> list[str]:
    return [
        f"Reward: VADER's compound score of a completion, from -1 to 1, mean over {held_out} held-out prompts, one "
        "completion each, the same random numbers every time. ± is one standard error.",
        "Extrapolated: of the policy that the next round samples from and starts at. The saved model is the last "
        "iterate, without it.",
        "Distinct bigrams: pairs of neighbouring words that are distinct, as a share of all, over the iterate's "
        "held-out completions. It falls where a model repeats itself, which is how this reward is easily had.",
        f"Cut: completions that end at {MAX_NEW_TOKENS} tokens. Ties: prompts whose completions were judged alike; "
        "others stand in for them as far as there are any.",
        f"Unseen text: {unseen} lines that people wrote about films, products and in newspapers; no prompt is from "
        "them. Its change's error is that of the paired difference.",
    ]


def verdict(rows: list[dict[str, Any]]) -> str:
    """The run in a sentence, with what the reward cost in variety."""
    start, last = rows[0]["iterate"], rows[-1]["iterate"]
    gain = last["reward"] - start["reward"]
    error = math.hypot(last["reward_error"], start["reward_error"])
    kept = last["distinct_bigrams"] / max(start["distinct_bigrams"], 1e-9)
    return (
        f"Held-out reward {gain:+.3f} ± {error:.3f} against the start ({gain / max(error, 1e-9):.1f} standard errors "
        f"of the difference), at {100 * kept:.0f} % of its distinct bigrams."
    )


def as_markdown(rows: list[dict[str, Any]], lines: list[str]) -> str:
    out = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    out += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*out, "", verdict(rows), ""] + [f"- {line}" for line in lines])


# ---- Answers ----


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy, so that before and after differ by the weights alone."""
    import torch

    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(**encoded, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    model.train(training)
    said = tokenizer.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def plain_lines(folder: Path) -> tuple[str, str]:
    """How anyone loads the result, without this package."""
    return (
        "from transformers import pipeline",
        f'write = pipeline("text-generation", {str(folder)!r}, max_new_tokens={MAX_NEW_TOKENS}, do_sample=False)',
    )


def ask_plainly(folder: Path, prompt: str) -> str:
    """Run those two lines in a fresh interpreter, without trl or trl_extras, and have a prompt continued."""
    code = "\n".join(
        [
            *plain_lines(folder),
            f"said = write({prompt!r})[0]['generated_text']",
            "import json, sys",
            "assert not {'trl', 'trl_extras'} & set(sys.modules)",
            "print('ANSWER ' + json.dumps(' '.join(said.split())))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if done.returncode != 0 or not answers:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise Refused(f"the saved model in {folder} does not load with plain transformers: {last}")
    return json.loads(answers[-1].removeprefix("ANSWER "))


# ---- The run ----


def run(options: argparse.Namespace, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False)

    output, settings = settle(options, say)
    output = output.resolve()
    cache = options.cache.resolve()

    say("[bold]1/5[/bold] loading the libraries")
    with console.status("loading"):
        import datasets
        import film_lines
        import measure
        import openings
        import parts
        import rewards
        import torch
        import transformers
        from transformers import PrinterCallback, TrainerCallback

        from trl_extras import APOConfig, APOTrainer

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    say("[bold]2/5[/bold] the model and the film lines")
    with console.status("fetching"):
        # First: a wrong --prompts is then refused before a model is fetched.
        snippets = film_lines.read_sdist(parts.ratings(cache, say))
        try:
            data = openings.make(snippets, settings["rounds"], settings["prompts"], settings["seed"])
        except ValueError as error:
            raise Refused(str(error)) from error
        transformers.utils.logging.disable_progress_bar()
        base = parts.base_model(cache, say, settings.get("source"))
        model, tokenizer = parts.load(base)
    has_gpu = torch.cuda.is_available()
    model.to("cuda" if has_gpu else "cpu")
    say(f"  weights: {base.description}")
    say(
        f"  {settings['prompts']} prompts a round ({len(data.train)} in all, some to spare), {len(data.held_out)} "
        f"held-out prompts, {len(data.unseen)} unseen texts; "
        f"{'on the GPU' if has_gpu else f'on {torch.get_num_threads()} CPU threads'}"
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SETTINGS_FILE, {**settings, "source": base.revision or "package"})
    shown = data.held_out[:SHOWN]

    with Meter(
        console, plan({**settings, "num_generations": NUM_GENERATIONS}, len(data.held_out), len(data.unseen))
    ) as meter:
        say(f"[bold]3/5[/bold] measuring the model as it is, and {SHOWN} held-out prompts answered by it")
        meter.enter("the start: loss on unseen text")
        start_file = output / "start.json"
        saved = read_json(start_file)
        if saved is None:
            before = {prompt: answer(model, tokenizer, prompt) for prompt in shown}
            start = measure.measure(model, tokenizer, data.unseen, meter.advance)
            write_json(start_file, {"answers": before, "unseen": start.to_json()})
        else:
            before, start = saved["answers"], measure.Unseen.from_json(saved["unseen"])

        watch = Watch(meter, model, settings["prompts"], settings["batch_size"])

        class AfterRound(TrainerCallback):
            """Moves the bar; measures each round's iterate on unseen text as soon as it is there."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.step(state.global_step)

            def on_round_end(
                self,
                args: Any,
                state: Any,
                control: Any,
                *,
                round_index: int,
                summary: dict,
                model: Any,
                **kwargs: Any,
            ) -> None:
                meter.enter(reading_label(round_index))
                with watch.reading():
                    now = measure.measure(model, tokenizer, data.unseen, meter.advance)
                watch.ended = round_index + 1
                summary["unseen"] = measure.compare(now, start)
                held_out = summary["heldout_iterate"]
                if round_index == 0:
                    meter.say(f"  start: held-out reward {pm(summary['heldout_start'])}")
                meter.say(
                    f"  round {round_index + 1}: held-out reward {pm(held_out)}, distinct bigrams "
                    f"{held_out['distinct_bigrams']:.3f}, loss on unseen text {summary['unseen']['loss']:.3f} "
                    f"({summary['unseen']['change']:+.3f})"
                )

        say(f"[bold]4/5[/bold] {settings['rounds']} rounds: sample, judge, train on best against worst, extrapolate")
        config = APOConfig(
            output_dir=str(output),
            num_rounds=settings["rounds"],
            extrapolation_alpha=[settings["alpha"]],
            prompts_per_round=settings["prompts"],
            num_generations=NUM_GENERATIONS,
            generation_batch_size=GENERATION_BATCH_SIZE,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_completion_length=MAX_NEW_TOKENS,
            beta=settings["beta"],
            learning_rate=settings["learning_rate"],
            per_device_train_batch_size=settings["batch_size"],
            seed=settings["seed"],
            # The round's reference log-probabilities once, ahead: no second model in memory.
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=16,
            # 135M parameters and short lines fit easily: recomputing activations would only cost time.
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not has_gpu,
            save_strategy="epoch",
            save_total_limit=1,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        adapter = {}
        if settings["lora"]:
            from peft import LoraConfig

            adapter["peft_config"] = LoraConfig(**LORA)
        trainer = APOTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": data.train}),
            eval_dataset=datasets.Dataset.from_dict({"prompt": data.held_out}),
            reward_funcs=rewards.vader,
            processing_class=tokenizer,
            callbacks=[AfterRound()],
            **adapter,
        )
        trainer.remove_callback(PrinterCallback)
        os.environ["TQDM_DISABLE"] = "1"  # the bar above counts everything
        if options.resume:
            watch.resume(newest_step(output))
        with watch:
            trainer.train(resume_from_checkpoint="last" if options.resume else None)

    final = output / "model"
    trainer.save_model(str(final))
    say(f"[bold]5/5[/bold] the same {SHOWN} prompts, and loading the saved model with plain transformers")
    with console.status("answering"):
        policy = trainer.accelerator.unwrap_model(trainer.model)
        after = {prompt: answer(policy, tokenizer, prompt) for prompt in shown}
        plain = ask_plainly(final, shown[0])

    rows = table_rows(trainer.round_summaries, measure.compare(start, start)["loss"])
    seconds = time.monotonic() - STARTED
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(use.ru_utime + use.ru_stime for use in usage)
    lines = notes(len(data.held_out), len(data.unseen))
    report(console, rows, lines, base.description, before, after, final, plain)
    result = {
        "settings": {**settings, "source": base.revision or "package"},
        "weights": base.description,
        "rows": rows,
        "answers": [{"prompt": p, "before": before[p], "after": after[p]} for p in shown],
        "model": "model",
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "threads": torch.get_num_threads(),
    }
    asked = "".join(f"\n**{p}** ...\n- before: {before[p]}\n- after: {after[p]}\n" for p in shown)
    (output / TABLE_FILE).write_text(
        f"# Quickstart\n\nWeights: {base.description}.\n\n{as_markdown(rows, lines)}\n\n## Answers, greedy\n{asked}",
        encoding="utf-8",
    )
    write_json(output / RESULT_FILE, result)
    say(
        f"\nTook {duration(seconds)}{' since it was resumed' if options.resume else ''} ({duration(cpu_seconds)} of "
        f"processor time). The table is also in "
        f"{output / TABLE_FILE} and {output / RESULT_FILE}."
    )


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint, which a resume goes on from; 0 where there is none yet."""
    return max((int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*[0-9]")), default=0)


def report(
    console: Console,
    rows: list[dict[str, Any]],
    lines: list[str],
    weights: str,
    before: dict[str, str],
    after: dict[str, str],
    final: Path,
    plain: str,
) -> None:
    table = Table(
        title=f"Accelerated Preference Optimization of SmolLM2-135M-Instruct\n{weights}",
        box=box.HORIZONTALS,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(HEADINGS):
        # Fold: a narrow terminal breaks numbers, but never leaves a digit out.
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    # Errors beside the values where there is room, below them where there is not.
    joint = "±" if console.width >= 112 else "\n±"
    for row in rows:
        table.add_row(*(cell.replace(" ± ", joint) for cell in cells(row)))
    console.print()
    console.print(table)
    console.print(verdict(rows), highlight=False)
    for line in lines:
        console.print(f"- {line}", style="dim", highlight=False)

    console.print(
        f"\n[bold]Before and after[/bold] (the first {len(before)} held-out prompts, greedy, {MAX_NEW_TOKENS} tokens)"
    )
    for prompt, said in before.items():
        console.print(f"{prompt} ...", style="bold", highlight=False, markup=False)
        console.print(f"  before: {said}", highlight=False, markup=False)
        console.print(f"  after:  {after[prompt]}", highlight=False, markup=False)

    console.print(
        f"\n[bold]The model[/bold] is in {final}. Two lines load it with plain transformers:", highlight=False
    )
    for line in plain_lines(final):
        console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  (just done in a fresh interpreter; it wrote: {plain})", highlight=False, markup=False)
    console.print(
        "\n[bold]What to try next[/bold]\n"
        "  bash recipes/quickstart/run.sh --extrapolation_alpha 0   iterative DPO: no momentum\n"
        "  bash recipes/quickstart/run.sh --seed 1         how much of the table is chance\n"
        "  bash recipes/quickstart/run.sh --lora           a LoRA adapter a round: little memory and state\n"
        "  recipes/quickstart/apo.yaml                     the same rounds as a recipe: put your own reward in\n"
        "  docs/apo.md                                     your own data and model; when not to use it",
        highlight=False,
    )


def quiet() -> None:
    """Before the libraries are imported: their own bars and advice would bury what this run has to say."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        # In a log every refresh of a bar is a line.
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")


def main(argv: list[str] | None = None) -> int:
    quiet()
    options = parse(argv)
    console = Console()
    if not console.is_terminal:
        # A log has no width of its own: rich would take 80 columns, and break the table.
        console = Console(width=150)
    try:
        run(options, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command with --resume goes on from the last finished round.")
        return 130
    except Exception as error:
        # Ours are one line for the user; anything else is a bug and keeps its traceback.
        if type(error).__name__ not in ("Refused", "PartError"):
            raise
        console.print(f"quickstart: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
