"""
What the boundary between two rounds costs when nothing is sampled, against reading and writing the same bytes.

    python recipes/benchmarks/boundary.py

A model of SmolLM2-135M's shape in float32 trains one step a round. At every boundary APOTrainer checks and measures
the iterate, writes it, extrapolates, writes the extrapolated policy, both with fsync and checksums, and copies the
policy into the reference. It reads three copies of the weights (the last iterate, the policy that the round began with
and the one before) and writes two. Right after each boundary the yardsticks run in the same process:

- the same bytes: three copies are loaded from safetensors files, and two are saved with fsync to files that stay until
  the next boundary, as the round's own do;
- one copy: one is loaded, and one is saved with fsync to a file that goes at once, whose memory the next one reuses.

The reference's log-probabilities, which the round may compute ahead (`precompute_ref_log_probs`), are reported beside
it; they grow with the data.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry
sys.path.insert(0, str(Path(__file__).parent))

import common
import datasets
import transformers
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trl_extras import APOConfig, APOTrainer
from trl_extras.rounds import durable


datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Yardstick(TrainerCallback):
    """Loads and saves the weights after every boundary; comes after the trainer's own callback."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[str, list[float]] = {"same": [], "one": []}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sources = [self.folder / f"source-{i}.safetensors" for i in range(3)]
        for name, reads, writes in (("same", 3, 2), ("one", 1, 1)):
            begun = time.perf_counter()
            for source in sources[:reads]:
                weights = load_file(source)
                # Every page has to have been read, as at a boundary.
                sum(float(tensor.view(-1)[::1024].sum()) for tensor in weights.values())
            for copy in range(writes):
                target = self.folder / f"{name}-{state.global_step % 2}-{copy}.safetensors"
                save_file(weights, target)
                durable.sync(target)
            durable.sync(self.folder)
            self.seconds[name].append(time.perf_counter() - begun)
        for old in (*self.folder.glob(f"same-{(state.global_step + 1) % 2}-*"), *self.folder.glob("one-*")):
            old.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=32, help="rows a round")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precompute", action="store_true", help="reference log-probabilities computed ahead")
    parser.add_argument("--dir", help="where to put temporary files: the disk that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        model = common.make_model()
        for i in range(3):
            save_file({n: p.detach() for n, p in model.named_parameters()}, folder / f"source-{i}.safetensors")
        yardstick = Yardstick(folder)
        trainer = APOTrainer(
            model=model,
            args=APOConfig(
                **common.arguments(folder / "out", 1, gradient_accumulation_steps=1),
                num_rounds=options.rounds,
                precompute_ref_log_probs=options.precompute,
                precompute_ref_batch_size=4,
            ),
            train_dataset=common.make_pairs(
                options.rounds * (options.rows if options.precompute else 1), options.tokens
            ),
            processing_class=common.make_tokenizer(),
            callbacks=[yardstick],
        )
        if options.precompute:
            # One step a round is enough; the rows are there for the reference.
            trainer.args.per_device_train_batch_size = options.rows
        trainer.train()
        # The first two boundaries have less to compare with, and the files are not in the page cache yet.
        rows = [row for row in trainer.round_summaries if row["round"] >= 2]
        weights = [row["boundary_weights_seconds"] for row in rows]
        data = [row["boundary_data_seconds"] for row in rows]
        same, one = yardstick.seconds["same"][2:], yardstick.seconds["one"][2:]
    print(f"\n{common.machine()}; {len(weights)} boundaries, 0.54 GB of weights\n")
    print("| | median (middle half) |\n|---|---|")
    print(f"| load three copies, save two with fsync (the same bytes), seconds | {common.spread(same)} |")
    print(f"| load and save one copy with fsync, seconds | {common.spread(one)} |")
    print(f"| boundary, seconds | {common.spread(weights)} |")
    for name, yard in (("the same bytes", same), ("one copy", one)):
        ratios = [a / b for a, b in zip(weights, yard, strict=True)]
        print(f"| boundary / {name}, pair by pair | {common.spread(ratios)} |")
    what = f"reference log-probs of {options.rows} pairs" if options.precompute else "copying into the reference"
    print(f"| {what}, seconds | {common.spread(data)} |")


if __name__ == "__main__":
    main()
