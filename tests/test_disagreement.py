"""Two processes that do not train on the same stop before the first step, and each says which rank differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from trl_extras.errors import ConfigurationError


def threes(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text.count("3")) for text in completions]


def fours(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text.count("4")) for text in completions]


def prompts() -> Any:
    return tiny.make_pairs(8).select_columns(["prompt"])


def cases(base: Path, out: Path, rank: int) -> Any:
    """A trainer of which rank 1 is handed something else, by the words that the message begins with."""
    from trl_extras import APOConfig, APOTrainer, SPOConfig, SPOTrainer, SPRConfig, SPRTrainer

    def make(trainer: Any, config: Any, name: str, settings: dict[str, Any], **given: Any) -> Any:
        arguments = config(**tiny.arguments(out / name, **settings))
        return trainer(model=str(base), args=arguments, processing_class=tiny.make_tokenizer(), **given)

    two = {"num_rounds": 2}
    sampled = {**two, "num_generations": 2, "max_completion_length": 4}
    pairs, sft = tiny.make_pairs(8), tiny.make_sft_rows(8)
    yield "`train_dataset`", make(APOTrainer, APOConfig, "data", two, train_dataset=tiny.make_pairs(8, seed=rank))
    other = {"train_dataset": pairs, "eval_dataset": {"a": tiny.make_pairs(3 + rank)}}
    yield "`eval_dataset`", make(APOTrainer, APOConfig, "evaluation", {"num_rounds": 1}, **other)
    order = [1, 0, *range(2, 8)] if rank else list(range(8))
    yield "`train_dataset`", make(SPOTrainer, SPOConfig, "order", {}, train_dataset=pairs.select(order))
    floor = {"train_dataset": pairs, "sft_dataset": tiny.make_sft_rows(8, seed=rank)}
    yield "`sft_dataset`", make(SPOTrainer, SPOConfig, "floor", {"sft_optimum": 1.0}, **floor)
    rewarded = {"train_dataset": prompts(), "reward_funcs": [threes, fours][rank]}
    yield "What judges the completions", make(APOTrainer, APOConfig, "rewards", sampled, **rewarded)
    offline = sft.add_column("reward", [float(i + rank) for i in range(8)])
    settings = {**sampled, "offline_ratio": [0.5]}
    given = {"train_dataset": prompts(), "reward_funcs": threes, "offline_dataset": offline}
    yield "`offline_dataset`", make(SPRTrainer, SPRConfig, "offline", settings, **given)


def main(base: Path, out: Path) -> None:
    rank = int(os.environ["RANK"])
    for what, trainer in cases(base, out, rank):
        with pytest.raises(ConfigurationError, match="rank 1 has another than rank 0") as error:
            trainer.train()
        assert str(error.value).startswith(what), error.value
        assert trainer.state.global_step == 0
        print(f"refused: {what}", flush=True)


SCRIPT = (
    "import sys\nfrom pathlib import Path\nfrom tests.test_disagreement import main\nmain(*map(Path, sys.argv[1:]))\n"
)


def test_two_processes_that_differ_stop(tmp_path: Path) -> None:
    script, root = tmp_path / "two.py", str(Path(__file__).parents[1])
    script.write_text(SCRIPT, encoding="utf-8")
    base = tiny.save_model(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script, base,
         tmp_path / "out"],
        capture_output=True, text=True, timeout=240, cwd=root, check=False,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("refused: ") == 12
