"""Accelerated Preference Optimization of a 135M instruct model on human-rated film lines, in minutes on a CPU.

    bash recipes/quickstart/run.sh [options]

`run.sh` makes the environment and calls this file. It fetches the model and the ratings (`parts.py`), makes the pairs
(`film_lines.py`), trains three rounds with `APOTrainer`, measures after each one (`measure.py`) and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any


STARTED = time.monotonic()
# Before the libraries are imported: their own progress bars and advice would bury what this run has to say.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not sys.stderr.isatty():
    # In a log every refresh of a bar is a line.
    os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore")

from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402


REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS_FILE = "quickstart_settings.json"
RESULT_FILE = "quickstart.json"
TABLE_FILE = "quickstart.md"

# Chosen on seed 0; recipes/quickstart/README.md has the numbers.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "rounds": 3,
    "pairs": 48,
    "learning_rate": 1e-5,
    "beta": 0.1,
    "alpha": 0.3,
    "batch_size": 8,
}

# Fixed before any result was seen: the task in words that no training row has, a neighbouring task, and a fact.
QUESTIONS = (
    "Write one line about a film that recommends it.",
    "Write one line about a hotel that recommends it.",
    "What is the capital of France?",
)
MAX_NEW_TOKENS = 40


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="draws the training pairs and their order (default: 0)")
    parser.add_argument("--rounds", type=int, help="rounds of training and extrapolation (default: 3)")
    parser.add_argument("--pairs", type=int, help=f"preference pairs a round (default: {DEFAULTS['pairs']})")
    parser.add_argument("--learning-rate", type=float, help=f"(default: {DEFAULTS['learning_rate']:g})")
    parser.add_argument("--beta", type=float, help=f"DPO's beta (default: {DEFAULTS['beta']:g})")
    parser.add_argument("--alpha", type=float, help="extrapolation parameter; 0 is iterative DPO (default: 0.3)")
    parser.add_argument("--batch-size", type=int, help=f"pairs a step (default: {DEFAULTS['batch_size']})")
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
            if given is not None and given != settings[name]:
                flag = "--" + name.replace("_", "-")
                raise Refused(f"{flag} is {given}, but the run in {output} began with {settings[name]}: leave it out")
        return output, settings
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
    for name in ("rounds", "pairs", "batch_size"):
        if settings[name] < 1:
            raise Refused(f"--{name.replace('_', '-')} is {settings[name]}, but has to be at least 1")
    for name in ("learning_rate", "beta", "alpha"):
        value, least = settings[name], "at least 0" if name == "alpha" else "above 0"
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "alpha"):
            raise Refused(f"--{name.replace('_', '-')} is {value:g}, but has to be a finite number {least}")
    return output, settings


# ---- Progress ----


class Meter:
    """One bar with the time left, for training and measuring together; without a terminal a line every 15 seconds."""

    def __init__(self, console: Console, total: float):
        self.console, self.total, self.done = console, total, 0.0
        self.begun = self.told = time.monotonic()
        self.skipped = 0.0
        self.what = ""
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("time left"),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=120,
                transient=True,
            )
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Meter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def skip(self, units: float) -> None:
        """Work that a resumed run finds done."""
        self.done += units
        self.skipped += units
        self._show()

    def advance(self, units: float, what: str) -> None:
        self.done += units
        self.what = what
        self._show()

    def _show(self) -> None:
        if self.bar:
            self.bar.update(self.task, completed=min(self.done, self.total), description=self.what)
            return
        now = time.monotonic()
        worked = self.done - self.skipped
        if worked > 0 and now - self.told >= 15:
            left = (now - self.begun) / worked * max(self.total - self.done, 0)
            self.told = now
            self.say(f"  {self.what}: {100 * self.done / self.total:.0f} %, about {duration(left)} left")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# ---- The table ----


def pm(row: dict[str, Any], name: str, scale: float = 1.0, digits: int = 1, plus: str = "") -> str:
    return f"{scale * row[name]:{plus}.{digits}f} ± {scale * row[name + '_error']:.{digits}f}"


HEADINGS = (
    "after round",
    "held-out accuracy, %",
    "margin, nats",
    "chosen likelier, %",
    "chosen log-prob. change, nats",
    "loss on unseen text, nats/token",
    "its change",
    "norm of update",
    "norm of momentum",
    "cosine",
)


def cells(row: dict[str, Any]) -> list[str]:
    def number(name: str, digits: int) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    return [
        "start" if row["round"] == 0 else str(row["round"]),
        pm(row, "accuracy", 100),
        pm(row, "margin", digits=2),
        pm(row, "chosen_likelier", 100),
        pm(row, "chosen_change", digits=2, plus="+"),
        f"{row['unseen_loss']:.3f}",
        pm(row, "unseen_loss_change", digits=3, plus="+"),
        number("update_norm", 3),
        number("momentum_norm", 3),
        number("update_cosine", 2),
    ]


def notes(held_out: int, unseen: int) -> list[str]:
    return [
        f"{held_out} held-out pairs: no line of theirs is in the training data, and neither is the wording that asks "
        "for it. ± is one standard error.",
        "Accuracy and margin are of the implicit reward log pi - log pi_start of the chosen line against that of the "
        "rejected one. At the start all pairs are ties, which count one half.",
        "Chosen likelier: share of pairs with log pi(chosen) > log pi(rejected), without reference to the start.",
        f"Unseen text: {unseen} lines that people wrote about films, products and in newspapers, in no pair. Its "
        "change's error is that of the paired difference.",
        "The two lines of a pair are about different films and answer no common prompt but the one we gave them: the "
        "model learns the manner of praise, not which film is good.",
    ]


def as_markdown(rows: list[dict[str, Any]], lines: list[str]) -> str:
    out = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    out += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(out + [""] + [f"- {line}" for line in lines])


# ---- Answers ----


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Greedy, so that before and after differ by the weights alone."""
    import torch

    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(**encoded, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    model.train(training)
    return tokenizer.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def plain_lines(folder: Path) -> tuple[str, str]:
    """How anyone loads the result, without this package."""
    return (
        "from transformers import pipeline",
        f'chat = pipeline("text-generation", {str(folder)!r}, max_new_tokens={MAX_NEW_TOKENS}, do_sample=False)',
    )


def ask_plainly(folder: Path) -> str:
    """Run those two lines in a fresh interpreter, without trl or trl_extras, and ask the first question."""
    code = "\n".join(
        [
            *plain_lines(folder),
            f"said = chat([{{'role': 'user', 'content': {QUESTIONS[0]!r}}}])[0]['generated_text'][-1]['content']",
            "import json, sys",
            "assert not {'trl', 'trl_extras'} & set(sys.modules)",
            "print('ANSWER ' + json.dumps(said.strip()))",
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
    import datasets
    import film_lines
    import measure
    import parts
    import torch
    import transformers
    from transformers import PrinterCallback, TrainerCallback

    from trl_extras import APOConfig, APOTrainer

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    say("[bold]2/5[/bold] the model and the human ratings")
    # First: a wrong --pairs is then refused before a model is fetched.
    snippets = film_lines.read_sdist(parts.ratings(cache, say))
    try:
        data = film_lines.make(snippets, settings["rounds"], settings["pairs"], settings["seed"])
    except ValueError as error:
        raise Refused(str(error)) from error
    transformers.utils.logging.disable_progress_bar()
    base = parts.base_model(cache, say, settings.get("source"))
    model, tokenizer = parts.load(base)
    has_gpu = torch.cuda.is_available()
    model.to("cuda" if has_gpu else "cpu")
    say(f"  weights: {base.description}")
    say(
        f"  {len(data.train)} training pairs for {settings['rounds']} rounds, {len(data.held_out)} held-out pairs, "
        f"{len(data.unseen)} unseen texts; {'on the GPU' if has_gpu else f'on {torch.get_num_threads()} CPU threads'}"
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SETTINGS_FILE, {**settings, "source": base.revision or "package"})

    # The bar's unit is a forward pass over one token of a whole row; a training step is three, its reference one more.
    measured_tokens = sum(
        len(measure.completion_ids(tokenizer, row, side)[1])
        for row in data.held_out
        for side in ("chosen", "rejected")
    ) + sum(len(tokenizer(text)["input_ids"]) for text in data.unseen)
    texts = 2 * len(data.held_out) + len(data.unseen)
    trained_tokens = sum(
        sum(map(len, measure.completion_ids(tokenizer, row, side)))
        for row in data.train
        for side in ("chosen", "rejected")
    )
    steps = settings["rounds"] * math.ceil(settings["pairs"] / settings["batch_size"])
    total = 4.0 * trained_tokens + (settings["rounds"] + 1) * measured_tokens
    a_step, a_text = 4.0 * trained_tokens / steps, measured_tokens / texts

    measured = output / "measured"
    measured.mkdir(exist_ok=True)

    with Meter(console, total) as meter:
        say("[bold]3/5[/bold] measuring the model as it is, and asking it three questions")
        start_file = measured / "start.json"
        saved = read_json(start_file)
        if saved is None:
            before = {question: answer(model, tokenizer, question) for question in QUESTIONS}
            start = measure.measure(model, tokenizer, data, lambda n: meter.advance(n * a_text, "measuring the start"))
            write_json(start_file, {"answers": before, "measured": start.to_json()})
        else:
            before, start = saved["answers"], measure.Measured.from_json(saved["measured"])
            meter.skip(measured_tokens)

        class AfterRound(TrainerCallback):
            """Moves the bar; measures each round's iterate as soon as it is there."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                # A round that ended before the checkpoint was measured then, unless the checkpoint is its last step:
                # then the trainer comes to the round's end once more.
                meter.skip(state.global_step * a_step)
                a_round = steps // settings["rounds"]
                meter.skip(max(0, math.ceil(state.global_step / a_round) - 1) * measured_tokens)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                current = min((state.global_step - 1) * settings["rounds"] // steps + 1, settings["rounds"])
                meter.advance(a_step, f"training round {current}")

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
                what = f"measuring round {round_index + 1}"
                now = measure.measure(model, tokenizer, data, lambda n: meter.advance(n * a_text, what))
                row = {"round": round_index + 1, **measure.compare(now, start)}
                row |= {
                    name: summary.get(name)
                    for name in ("alpha", "beta", "update_norm", "momentum_norm", "update_cosine")
                }
                write_json(measured / f"round-{round_index + 1}.json", row)
                summary["held_out"] = measure.compare(now, start)
                meter.say(
                    f"  round {round_index + 1}: held-out accuracy {pm(row, 'accuracy', 100)} %, margin "
                    f"{pm(row, 'margin', digits=2)} nats, loss on unseen text {row['unseen_loss']:.3f} "
                    f"({row['unseen_loss_change']:+.3f})"
                )

        say(f"[bold]4/5[/bold] training: {settings['rounds']} rounds of accelerated preference optimization")
        config = APOConfig(
            output_dir=str(output),
            num_rounds=settings["rounds"],
            extrapolation_alpha=[settings["alpha"]],
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
        trainer = APOTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(data.train),
            processing_class=tokenizer,
            callbacks=[AfterRound()],
        )
        trainer.remove_callback(PrinterCallback)
        os.environ["TQDM_DISABLE"] = "1"  # the trainer's bar for the reference; ours counts it
        trainer.train(resume_from_checkpoint="last" if options.resume else None)

    final = output / "model"
    trainer.save_model(str(final))
    say("[bold]5/5[/bold] the same three questions, and loading the saved model with plain transformers")
    policy = trainer.accelerator.unwrap_model(trainer.model)
    after = {question: answer(policy, tokenizer, question) for question in QUESTIONS}
    plain = ask_plainly(final)

    start_row = {"round": 0, **measure.compare(start, start)}
    rows = [start_row] + [
        row
        for index in range(settings["rounds"])
        if (row := read_json(measured / f"round-{index + 1}.json")) is not None
    ]
    seconds = time.monotonic() - STARTED
    report(console, rows, notes(len(data.held_out), len(data.unseen)), base.description, before, after, final, plain)
    result = {
        "settings": {**settings, "source": base.revision or "package"},
        "weights": base.description,
        "rows": rows,
        "answers": [{"question": q, "before": before[q], "after": after[q]} for q in QUESTIONS],
        "model": "model",
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "threads": torch.get_num_threads(),
    }
    lines = notes(len(data.held_out), len(data.unseen))
    asked = "".join(f"\n**{q}**\n- before: {before[q]}\n- after: {after[q]}\n" for q in QUESTIONS)
    (output / TABLE_FILE).write_text(
        f"# Quickstart\n\nWeights: {base.description}.\n\n{as_markdown(rows, lines)}\n\n## Answers, greedy\n{asked}",
        encoding="utf-8",
    )
    write_json(output / RESULT_FILE, result)
    say(f"\nTook {duration(seconds)}. The table is also in {output / TABLE_FILE} and {output / RESULT_FILE}.")


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
    for line in lines:
        console.print(f"- {line}", style="dim", highlight=False)

    console.print(f"\n[bold]Before and after[/bold] (greedy, at most {MAX_NEW_TOKENS} tokens)")
    for question in QUESTIONS:
        console.print(f"[bold]{question}[/bold]", highlight=False)
        console.print(f"  before: {before[question]}", highlight=False, markup=False)
        console.print(f"  after:  {after[question]}", highlight=False, markup=False)

    console.print(
        f"\n[bold]The model[/bold] is in {final}. Two lines load it with plain transformers:", highlight=False
    )
    for line in plain_lines(final):
        console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  (just done in a fresh interpreter; it said: {plain})", highlight=False, markup=False)
    console.print(
        "\n[bold]What to try next[/bold]\n"
        "  bash recipes/quickstart/run.sh --alpha 0        iterative DPO: the same rounds without the momentum\n"
        "  bash recipes/quickstart/run.sh --seed 1         how much of the table is chance\n"
        "  docs/apo.md                                     your own data and model; when not to use it",
        highlight=False,
    )


def main(argv: list[str] | None = None) -> int:
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
