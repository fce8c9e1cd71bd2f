"""
What `--plan` says of short runs, against what they take: peak memory of the process and peak disk of `output_dir`.

    python recipes/benchmarks/plan_check.py
    python recipes/benchmarks/plan_check.py --model FOLDER --only apo apo-lora

Each run is a process of its own, without a launcher; so is each plan. Memory is the process's highest resident size;
disk is looked at twenty times a second, a file with several names counted once. Wanted: disk within 5 %, memory within
15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


SECONDS = 0.05
# Two rounds of two steps: gradients meet Adam's state in a round's second step.
STEPS = 4
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-6,
    "num_train_epochs": 1,
    "save_strategy": "epoch",
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
}
ROUNDS = {"num_rounds": 2}
AHEAD = {"precompute_ref_log_probs": True}
ONE = {"per_device_train_batch_size": 1}
PROMPTS = {
    "reward_funcs": "{folder}/reward.py:length", "num_generations": 2, "max_completion_length": 24, "num_rounds": 2,
}  # fmt: skip
# Name: method, words of each text, settings.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "apo": ("apo", 60, ROUNDS),
    "apo-precomputed": ("apo", 60, ROUNDS | AHEAD),
    "apo-lora": ("apo", 60, ROUNDS | {"use_peft": True}),
    "apo-long": ("apo", 240, ROUNDS | AHEAD | ONE | {"save_strategy": "no"}),
    "apo-checkpointing": ("apo", 240, ROUNDS | AHEAD | ONE | {"gradient_checkpointing": True, "save_total_limit": 1}),
    "spo": ("spo", 60, {"sft_dataset_name": "{folder}/texts", "lower_level": "both"}),
    # Checkpoints at the boundaries alone, which on-policy runs save whatever the strategy.
    "apo-on-policy": ("apo", 24, PROMPTS | {"save_strategy": "steps"}),
    "spr": ("spr", 24, PROMPTS),
    "spr-keep": ("spr", 24, PROMPTS | {"num_rounds": 3, "keep_iterates": True, "save_only_model": True}),
}
_WORDS = ("the", "film", "was", "good", "and", "bad", "with", "one", "old", "story", "of", "people", "at", "night")


def write_data(folder: Path, words: int, number: int, seed: int = 0) -> None:
    """Pairs, texts, prompts, and a reward."""
    draw = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(n))

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    prompt = max(words // 4, 4)
    write(
        "pairs",
        [
            {"prompt": text(prompt) + " ", "chosen": text(words - prompt), "rejected": text(words - prompt)}
            for _ in range(number)
        ],
    )
    write("texts", [{"text": text(words)} for _ in range(number)])
    write("prompts", [{"prompt": text(prompt)} for _ in range(number)])
    (folder / "reward.py").write_text(
        "def length(completions, **kwargs):\n    return [sum(map(ord, text[-6:])) / 1000 for text in completions]\n",
        encoding="utf-8",
    )


def write_recipe(name: str, folder: Path, model: str, output: Path) -> Path:
    _, words, settings = CASES[name]
    write_data(folder, words, STEPS * {**COMMON, **settings}["per_device_train_batch_size"])
    keys = {**COMMON, **settings, "model_name_or_path": model, "output_dir": str(output)}
    keys["dataset_name"] = str(folder / ("prompts" if "reward_funcs" in keys else "pairs"))
    keys = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in keys.items()}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8")
    return path


def used(folder: Path) -> int:
    """Bytes of all files below a folder, each once however many names it has."""
    found: dict[tuple[int, int], int] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                about = os.lstat(os.path.join(where, name))
            except FileNotFoundError:
                continue
            found[(about.st_dev, about.st_ino)] = about.st_size
    return sum(found.values())


def environment() -> dict[str, str]:
    added = {"CI": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **added}


def measure(command: list[str], output: Path, log: Path) -> tuple[int, int, float]:
    """Peak resident size and peak disk of a run, bytes, and its seconds."""
    peak = 0
    over = threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(SECONDS):
            peak = max(peak, used(output))

    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)
        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        watch.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return usage.ru_maxrss * 1024, max(peak, used(output)), time.monotonic() - begun


def check(name: str, model: str, parent: str | None) -> dict[str, Any]:
    method = CASES[name][0]
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary)
        output = folder / "out"
        recipe = write_recipe(name, folder / "data", model, output)
        script = Path(__file__).resolve().parents[2] / "trl_extras" / "scripts" / f"{method}.py"
        plan = subprocess.run(
            [sys.executable, "-m", "trl_extras.cli", method, "--plan_json", "--config", str(recipe)],
            env=environment(), check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        said = json.loads(plan.splitlines()[-1])
        memory, disk, seconds = measure([sys.executable, str(script), "--config", str(recipe)], output, folder / "log")
    return {
        "name": name, "seconds": seconds, "disk": disk, "planned_disk": said["disk"]["peak"], "memory": memory,
        "planned_memory": said["memory"]["peak"], "phase": said["memory"]["highest"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="runs")
    parser.add_argument("--dir", help="where to put temporary files")
    options = parser.parse_args()
    if Path(options.model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"{platform.machine()} CPU, {os.cpu_count()} cores\n")
    columns = ("run", "disk, GB", "planned", "ratio", "memory, GB", "planned", "ratio", "highest in")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.only:
        row = check(name, options.model, options.dir)
        disk, memory = row["planned_disk"] / row["disk"], row["planned_memory"] / row["memory"]
        print(
            f"| {name} | {row['disk'] / 1e9:.3f} | {row['planned_disk'] / 1e9:.3f} | {disk:.3f} | "
            f"{row['memory'] / 1e9:.2f} | {row['planned_memory'] / 1e9:.2f} | {memory:.3f} | {row['phase']} |",
            flush=True,
        )
        print(f"{name}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
