"""
Cells of `matrix.py` under DeepSpeed on a CPU, as one of several processes that torchrun has started.

    python -m torch.distributed.run --nproc_per_node 2 --standalone tests/zero_matrix.py --stage 3 --folder OUT \
        --cells "apo|full" "apo|LoRA"

accelerate knows DeepSpeed on accelerators alone: it is told here that there are some. DeepSpeed's own operators, which
it would compile first, are left out. The arithmetic is the same; nothing is said about speed or NCCL.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
for name, value in {
    "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "DS_SKIP_CUDA_CHECK": "1", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_TORCH_DEVICE": "cpu",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from tests import matrix, tiny  # noqa: E402
from trl_extras.rounds import sharding  # noqa: E402
from trl_extras.rounds.state import RoundFolder  # noqa: E402


SECONDS_A_CELL = 150


def configuration(stage: int, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration; the threshold leaves the norms' weights, and those alone, whole under ZeRO 3."""
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 20,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        **extra,
    }


def use_deepspeed(stage: int, **extra: Any) -> None:
    """Let every trainer of this process run under DeepSpeed, on the CPU."""
    import deepspeed
    import transformers.training_args
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    for operator in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[operator] = False
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    stock = tiny.arguments

    def arguments(output_dir: Any, **kwargs: Any) -> dict[str, Any]:
        return {**stock(output_dir, **kwargs), "use_cpu": False, "deepspeed": configuration(stage, **extra)}

    tiny.arguments = arguments


class _Watch(TrainerCallback):
    """Looks at the weights where a round begins, and after its first step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.seen: list[dict[str, Any]] = []
        self.start: dict[str, torch.Tensor] = {}

    def _masters(self) -> dict[str, torch.Tensor]:
        return {name: sharding.whole(weight).clone() for name, weight in self.trainer.model.named_parameters()}

    def _visible(self, model: Any) -> dict[str, torch.Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, self.start = self.trainer, self._masters()
        visible = self._visible(trainer.model)
        for name, master in self.start.items():
            assert master.dtype == torch.float32
            assert torch.equal(visible[name], master.to(visible[name].dtype)), f"{name}: not what its master is"
        if trainer.ref_model is not None:
            reference = self._visible(trainer.accelerator.unwrap_model(trainer.ref_model))
            assert all(torch.equal(reference[name], visible[name]) for name in visible), "not the reference"
        folder = RoundFolder(trainer._output_dir, trainer._round)
        saved = matrix.tensors_of(folder.policy)
        assert saved.keys() == self.start.keys()
        assert all(torch.equal(saved[name], master.cpu()) for name, master in self.start.items()), "not what is saved"
        # What lies between the round's end and the next one's start.
        before = matrix.tensors_of(folder.iterate)
        moved = max(float((saved[name] - before[name]).abs().max()) for name in saved)
        assert len(set(sharding.of_all(trainer._weights.fingerprint()))) == 1, "another hash on each process"
        self.seen.append({"edit": moved, "rate": trainer.optimizer.param_groups[0]["lr"]})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.start:
            return
        now = self._masters()
        steps = [float(held["step"]) for held in self.trainer.optimizer.optimizer.state.values()]
        self.seen[-1] |= {
            "step": max(float((now[name] - start).abs().max()) for name, start in self.start.items()),
            "count": max(steps),
        }
        self.start = {}


def edits(stage: int, bf16: bool, folder: Path) -> list[dict[str, Any]]:
    """Three rounds with a large extrapolation; what was seen at the start of each."""
    from trl_extras import APOConfig, APOTrainer

    def make(where: Path) -> Any:
        config = APOConfig(
            **tiny.arguments(
                where, num_rounds=3, extrapolation_alpha=[4.0], learning_rate=1e-3, bf16=bf16, max_grad_norm=0.5,
                save_strategy="steps", save_steps=1, keep_iterates=True, gradient_accumulation_steps=2,
                train_sampling_strategy="sequential", logging_strategy="no",
            )
        )  # fmt: skip
        model = tiny.make_model(num_hidden_layers=2)
        pairs = tiny.make_pairs(48)
        return APOTrainer(model=model, args=config, train_dataset=pairs, processing_class=tiny.make_tokenizer())

    whole = make(folder / "whole")
    watch = _Watch(whole)
    whole.add_callback(watch)
    whole.train()
    last = matrix.tensors_of(folder / "whole" / "_rounds" / "iterates" / "3")
    a_round = whole.state.max_steps // 3
    for stop in (a_round, a_round + 1):
        where = folder / f"resumed-{stop}"
        again = make(where)
        again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{stop}"))
        again.accelerator.wait_for_everyone()
        found = matrix.tensors_of(where / "_rounds" / "iterates" / "3")
        assert all(torch.equal(last[name], found[name]) for name in last), f"resumed at {stop}: another result"
    return watch.seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", nargs="*", default=[], help="method|weights")
    parser.add_argument("--edits", action="store_true", help="what becomes of weights that are edited at a boundary")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    use_deepspeed(options.stage)
    faulthandler.dump_traceback_later(SECONDS_A_CELL, exit=True)
    if options.edits:
        seen = edits(options.stage, options.bf16, options.folder)
        if os.environ["RANK"] == "0":
            (options.folder / "edits.json").write_text(json.dumps(seen), encoding="utf-8")
    for cell in options.cells:
        name, weights = cell.split("|")
        where = options.folder / matrix.slug(name, weights)
        # Stuck in a collective: show where, and end.
        faulthandler.dump_traceback_later(SECONDS_A_CELL, exit=True)
        try:
            matrix.run_cell(name, weights, where, 2, resume=True)
            result = {"status": "ran"}
        except Exception as error:
            traceback.print_exc()
            result = {"status": "failed", "why": repr(error)[:500]}
        if os.environ["RANK"] == "0":
            where.mkdir(parents=True, exist_ok=True)
            (where / "result.json").write_text(json.dumps(result), encoding="utf-8")
        if result["status"] == "failed":
            # The other process is likely to be stuck in a collective.
            os._exit(3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
