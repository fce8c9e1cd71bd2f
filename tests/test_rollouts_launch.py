"""On-policy APO as its users start it: TRL's own script, flags as text, one process and two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.test_rollouts import by_threes, fill


REWARDS = """
import asyncio


def threes(completions, **kwargs):
    return [float(sum(word.endswith("3") for word in text.split())) for text in completions]


async def short(completions, number, **kwargs):
    await asyncio.sleep(0)
    return [None if n % 2 else -0.1 * len(text.split()) for text, n in zip(completions, number)]
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny.save_model(folder / "model")
    for split, rows, seed in (("train", 32, 0), ("test", 6, 9)):
        data = tiny.make_pairs(rows, seed).remove_columns(["chosen", "rejected"])
        data = data.add_column("number", list(range(rows)))
        (folder / "data").mkdir(exist_ok=True)
        data.to_json(folder / "data" / f"{split}.jsonl")
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def run(parts: Path, out: Path, processes: int, batch_size: int, *more: str) -> subprocess.CompletedProcess[str]:
    spec = find_spec("trl.scripts.dpo")
    assert spec is not None
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [
        sys.executable, *(torchrun if processes > 1 else []), "-m", "trl_extras.run", "--trainer", "apo",
        str(spec.origin), "--model_name_or_path", str(parts / "model"), "--dataset_name", str(parts / "data"),
        "--num_rounds", "2", "--extrapolation_alpha", "0.5", "--round_data", "reuse", "--prompts_per_round", "8",
        "--num_generations", "3", "--generation_batch_size", "9", "--max_completion_length", "6",
        "--per_device_train_batch_size", str(batch_size), "--learning_rate", "1e-2", "--optim", "sgd",
        "--train_sampling_strategy", "sequential", "--gradient_checkpointing", "false", "--use_cpu", "true",
        "--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--max_length", "32",
        "--output_dir", str(out), *more,
    ]  # fmt: skip
    # Texts are the same for the same arithmetic, which depends on the number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(parts / "hf"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=parts, start_new_session=True,
        env=environment,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"too slow, or processes wait for each other: {process.communicate()[0][-2000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def table(out: Path, name: str) -> dict[str, list[Any]]:
    return pq.read_table(out / "_rounds" / "rollouts" / name / "rollouts.parquet").to_pydict()  # type: ignore[no-any-return]


def test_the_stock_script_samples_the_same_with_one_process_and_two(parts: Path, tmp_path: Path) -> None:
    rewards = ["--reward_funcs", "my_rewards.py:threes", "my_rewards:short", "--reward_weights", "1", "0.5"]
    for processes, batch_size in ((1, 4), (2, 2)):
        done = run(
            parts, tmp_path / str(processes), processes, batch_size, *rewards, "--eval_strategy", "epoch",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        assert done.stdout.count("trl-extras: DPOTrainer -> trl_extras.apo.APOTrainer") == 1
        assert (tmp_path / str(processes) / "model.safetensors").is_file()
    for name in (
        "heldout-0000-start",
        "round-0000",
        "round-0001",
        "heldout-0001-iterate",
        "heldout-0001-extrapolated",
    ):
        one, two = table(tmp_path / "1", name), table(tmp_path / "2", name)
        # Of later rounds the weights agree to rounding only: gradients are summed in another order.
        exact = name in ("heldout-0000-start", "round-0000")
        for column in one:
            if column == "logps" and not exact:
                for a, b in zip(one[column], two[column], strict=True):
                    assert a == pytest.approx(b, abs=1e-3)
            else:
                assert one[column] == two[column], (name, column)


def test_a_run_that_waits_for_labels_ends_cleanly(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for t in range(2):
        done = run(parts, out, 2, 2, "--ranker", "external", "--resume_from_checkpoint", "last")
        assert done.returncode == 0, done.stdout[-3000:]
        assert "Traceback" not in done.stdout
        assert f"Round {t + 1}: 8 prompts are sampled and wait for labels" in done.stdout
        assert not (out / "model.safetensors").exists()
        fill(out / "_rounds" / "rollouts" / f"round-{t:04d}" / "labels.jsonl", by_threes)
    done = run(parts, out, 2, 2, "--ranker", "external", "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stdout[-3000:]
    assert (out / "model.safetensors").is_file()


def test_a_reward_that_raises_shows_its_own_traceback(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def score(completions, **kwargs):\n    return 1 / 0  # mine\n")
    done = run(parts, tmp_path / "out", 1, 4, "--reward_funcs", f"{tmp_path}/broken.py:score")
    assert done.returncode != 0
    assert "return 1 / 0  # mine" in done.stdout
    assert "Round 1: reward function 'score' raised ZeroDivisionError" in done.stdout


def test_bad_rewards_are_refused_in_one_line(parts: Path, tmp_path: Path) -> None:
    done = run(parts, tmp_path / "out", 1, 4, "--reward_funcs", "my_rewards.py:fours")
    assert done.returncode != 0
    assert "my_rewards.py has no 'fours'" in done.stdout
    assert "Traceback" not in done.stdout
