"""
Every method on several processes against one: which cells of {way of dividing the work} x {weights} x {method} pass.

    python tests/matrix.py                            # everything that this machine can run
    python tests/matrix.py --ways ddp fsdp2 --only apo
    python tests/matrix.py --write docs/matrix.json   # what the table of docs/compatibility.md is made from
    python tests/matrix.py --table docs/matrix.json   # prints that table

A cell passes if two processes end with the weights of one (within the tolerance below, a share of how far training has
moved them), have sampled the same tokens where the method samples, and if a run that resumes inside its second round
is the uninterrupted one, bit for bit. A cell is refused if it is in `REFUSED` and stops with one line before training.

FSDP2 and DeepSpeed run on the CPU as `shards_on_cpu.py` and `zero_matrix.py` say; nothing is said about speed or NCCL.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from tests import shards_on_cpu, tiny  # noqa: E402


# Largest difference of a weight's change, relative to the largest change: the order in which gradients are summed
# differs between one process and two, in float32.
TOLERANCE = 1e-4
PROCESSES = 2
SECONDS, SECONDS_A_CELL = 1500, 150
WAYS = ("ddp", "fsdp2", "zero2", "zero3")
WEIGHTS = ("full", "LoRA", "passed PeftModel")


def threes(completions: list[str], **kwargs: Any) -> list[float]:
    """Words that end in a 3, and a little for each word, so that few completions are alike."""
    return [sum(word.endswith("3") for word in text.split()) + 0.01 * len(text) for text in completions]


class Cell(NamedTuple):
    """A method with its settings, as a name for the table and what its trainer takes."""

    method: str
    config: dict[str, Any]
    data: Callable[[], Any]
    given: Callable[[], dict[str, Any]] = dict
    samples: bool = False


def _prompts() -> Any:
    return tiny.make_pairs(24).select_columns(["prompt"])


def _sft() -> dict[str, Any]:
    # Rejected responses, which training makes less likely: so that their floor is felt.
    pairs = tiny.make_pairs(24).select(range(10))
    return {"sft_dataset": pairs.select_columns(["prompt", "rejected"]).rename_column("rejected", "completion")}


def _rewards() -> dict[str, Any]:
    return {"reward_funcs": threes}


ROUNDS = {"num_rounds": 3}
APO = {**ROUNDS, "extrapolation_alpha": [0.6, 0.3, 0.0]}
# Batches of three prompts, of which one process has more than the other.
SAMPLING = {"num_generations": 3, "max_completion_length": 6, "generation_batch_size": 9}
# The policy begins at the floor, where rounding would decide whether a hinge is active.
FLOOR = {"sft_coef": 1.0, "sft_tolerance": 1e-4}
SPO = {"num_train_epochs": 3, **FLOOR}
CELLS = {
    "apo": Cell("apo", APO, lambda: tiny.make_pairs(24)),
    "apo, reference ahead": Cell("apo", {**APO, "precompute_ref_log_probs": True}, lambda: tiny.make_pairs(24)),
    "apo, a reference of the user's": Cell(
        "apo", APO, lambda: tiny.make_pairs(24), lambda: {"ref_model": tiny.make_model(9, num_hidden_layers=2)}
    ),
    "apo, on-policy": Cell("apo", {**APO, **SAMPLING}, _prompts, _rewards, samples=True),
    "spo": Cell("spo", SPO, lambda: tiny.make_pairs(8), _sft),
    "spo, hinge over the batch": Cell("spo", {**SPO, "hinge": "batch"}, lambda: tiny.make_pairs(8), _sft),
    "spo, unrolled": Cell("spo", {**SPO, "bilevel_solver": "unrolled"}, lambda: tiny.make_pairs(8), _sft),
    "spo, alternating": Cell("spo", {**SPO, "bilevel_solver": "alternating"}, lambda: tiny.make_pairs(8), _sft),
    "apo_spo": Cell("apo_spo", {**APO, **FLOOR}, lambda: tiny.make_pairs(24), _sft),
    "apo_spo, unrolled": Cell(
        "apo_spo", {**APO, **FLOOR, "bilevel_solver": "unrolled"}, lambda: tiny.make_pairs(24), _sft
    ),
    "apo_spo, on-policy": Cell(
        "apo_spo",
        {**APO, **SAMPLING, **FLOOR, "lower_level": "sft_dataset"},
        _prompts,
        lambda: {**_sft(), **_rewards()},
        samples=True,
    ),
    "spr, on-policy": Cell(
        "spr",
        {**ROUNDS, **SAMPLING, "num_generations": 2, "generation_batch_size": 6},
        _prompts,
        _rewards,
        samples=True,
    ),
    "spr, offline": Cell(
        "spr",
        {**ROUNDS, "num_generations": 0},
        lambda: tiny.make_sft_rows(24).map(lambda row: {"reward": float(len(row["completion"]) % 5)}),
    ),
}


# Inner steps would be lost between the two forms that DeepSpeed keeps weights in.
REFUSED = {
    (way, name)
    for way in ("zero2", "zero3")
    for name, cell in CELLS.items()
    if cell.config.get("bilevel_solver", "penalty") != "penalty"
}


def make_trainer(name: str, weights: str, output_dir: Path, batch: int) -> Any:
    """The trainer of a cell."""
    from trl_extras import registry

    cell = CELLS[name]
    method = registry.resolve(cell.method).load()
    arguments = {
        # An epsilon this large makes it nearly linear in the gradient: else rounding decides signs where a gradient is
        # close to zero. (Plain SGD has no state, which FSDP2's own loading of an optimizer cannot have.)
        "optim": "adamw_torch",
        "adam_epsilon": 0.1,
        "learning_rate": 0.02,
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_eval_batch_size": batch,
        **cell.config,
    }
    if "sft_dataset" in cell.given():
        arguments["sft_batch_size"] = batch
    if cell.config.get("bilevel_solver"):
        arguments["inner_learning_rate"] = 0.01
    config = method.config(**tiny.arguments(output_dir, per_device_train_batch_size=batch, **arguments))
    model: Any = AutoModelForCausalLM.from_pretrained(os.environ["MATRIX_MODEL"])
    given = cell.given()
    if weights == "LoRA":
        given["peft_config"] = LoraConfig(
            r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
    if weights == "passed PeftModel":
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    return method.trainer(
        model=model, args=config, train_dataset=cell.data(), processing_class=tiny.make_tokenizer(), **given
    )


def run_cell(name: str, weights: str, folder: Path, batch: int, resume: bool) -> None:
    """Train a cell to its end, and, on request, again from a checkpoint inside its second round."""
    trainer = make_trainer(name, weights, folder / "whole", batch)
    trainer.train()
    trainer.save_model()
    if "sft_coef" in CELLS[name].config:
        assert max(entry.get("spo/penalty", 0) for entry in trainer.state.log_history) > 0, "no floor was felt"
    if shards_on_cpu.asked():
        assert any(hasattr(weight, "placements") for weight in trainer.model.parameters()), "not sharded"
    if not resume:
        return
    trainer.accelerator.wait_for_everyone()
    # After the first step of the second round, for the methods in rounds.
    checkpoint = folder / "whole" / f"checkpoint-{trainer.state.max_steps // 3 + 1}"
    again = make_trainer(name, weights, folder / "resumed", batch)
    again.train(resume_from_checkpoint=str(checkpoint))
    again.save_model()
    trainer.accelerator.wait_for_everyone()


def worker(names: list[str], weights: list[str], folder: Path) -> None:
    """Run cells as one of several processes; the first one writes what came of each."""
    from trl_extras.errors import ConfigurationError

    rank = int(os.environ["RANK"])
    if shards_on_cpu.asked():
        shards_on_cpu.allow()
    if "MATRIX_ZERO" in os.environ:
        from tests import zero_matrix

        zero_matrix.use_deepspeed(int(os.environ["MATRIX_ZERO"]))
    for name in names:
        for kind in weights:
            begun, where = time.monotonic(), folder / slug(name, kind)
            # Stuck in a collective: show where, and end.
            faulthandler.dump_traceback_later(SECONDS_A_CELL, exit=True)
            try:
                run_cell(name, kind, where, 2, resume=True)
                result: dict[str, Any] = {"status": "ran"}
            except ConfigurationError as error:
                result = {"status": "refused", "why": str(error)}
            except Exception as error:
                # The other process is likely to be stuck in a collective: this one ends, and the launcher with it.
                (folder / f"failed-{slug(name, kind)}.json").write_text(json.dumps({"why": repr(error)[:500]}))
                traceback.print_exc()
                os._exit(3)
            if rank == 0:
                where.mkdir(parents=True, exist_ok=True)
                result["seconds"] = round(time.monotonic() - begun, 1)
                (where / "result.json").write_text(json.dumps(result), encoding="utf-8")


def slug(*parts: str) -> str:
    return "-".join(part.replace(", ", "-").replace(" ", "_").replace("'", "") for part in parts)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors")) or [folder / "adapter_model.safetensors"]
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def change_of(weights: str, result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training has made of each weight of the model, less what it was."""
    if weights == "full":
        state = tiny.make_model(num_hidden_layers=2, tied=True).state_dict()
        return {key: value.float() - state[key] for key, value in result.items()}
    # Up to the scaling, which is one number for all of them.
    first = [key for key in result if ".lora_A." in key]
    return {key: result[key.replace(".lora_A.", ".lora_B.")].float() @ result[key].float() for key in first}


def difference(weights: str, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of two results, relative to the largest change."""
    # From shards, upstream saves a tied head beside the embedding.
    assert one.keys() == two.keys() - {"lm_head.weight"} | one.keys() & {"lm_head.weight"}, one.keys() ^ two.keys()
    mine, theirs = change_of(weights, one), change_of(weights, two)
    moved = max(float(value.abs().max()) for value in mine.values())
    assert moved > 0, "nothing was trained"
    return max(float((value - theirs[key]).abs().max()) for key, value in mine.items()) / moved


def rollouts_of(folder: Path) -> list[tuple[Any, ...]]:
    """What was sampled, in every round, in the order of the prompts."""
    import pyarrow.parquet

    found = []
    for path in sorted((folder / "_rounds" / "rollouts").glob("round-*/rollouts.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            found.append((path.parent.name, tuple(row["prompt_ids"]), [tuple(ids) for ids in row["completion_ids"]]))
    return found


def judge(name: str, weights: str, one: Path, two: Path) -> dict[str, Any]:
    """What a cell that ran came to."""
    alone, together, resumed = (tensors_of(folder) for folder in (one / "whole", two / "whole", two / "resumed"))
    off = difference(weights, alone, together)
    exact = together.keys() == resumed.keys() and all(torch.equal(together[key], resumed[key]) for key in together)
    problems = []
    if off > TOLERANCE:
        problems.append(f"differs from one process by {off:.2g}, beyond {TOLERANCE:g}")
    if not exact:
        problems.append("a resumed run differs from the uninterrupted one")
    if CELLS[name].samples:
        mine, theirs = rollouts_of(one / "whole"), rollouts_of(two / "whole")
        if not mine or mine != theirs:
            problems.append("has sampled other tokens than one process")
    return {"status": "failed" if problems else "passes", "difference": off, "why": "; ".join(problems)}


def environment(way: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if way == "fsdp2":
        own |= shards_on_cpu.ENVIRONMENT
    if way.startswith("zero"):
        own |= {
            "MATRIX_ZERO": way[-1], "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "DS_SKIP_CUDA_CHECK": "1",
            "ACCELERATE_TORCH_DEVICE": "cpu",
        }  # fmt: skip
    return {**os.environ, **own}


def run_way(way: str, names: list[str], weights: list[str], folder: Path, log: Path) -> Iterator[tuple[str, str, Any]]:
    """Run the cells of one way on two processes; a cell that takes the processes down is passed over after that."""
    left = [(name, kind) for name in names for kind in weights]
    while left:
        todo, where = sorted({name for name, _ in left}, key=names.index), folder / way
        kinds = [kind for kind in weights if any(kind == k for _, k in left)]
        if len(left) < len(todo) * len(kinds):
            # The rest of a method whose first kind has failed.
            todo, kinds = [left[0][0]], [kind for name, kind in left if name == left[0][0]]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES), "--standalone",
            str(Path(__file__)), "--worker", str(where), "--only", *todo, "--weights", *kinds,
        ]  # fmt: skip
        where.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            try:
                subprocess.run(
                    command, cwd=ROOT, env=environment(way), stdout=file, stderr=file, timeout=SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                file.write("timed out\n")
        for name in todo:
            for kind in kinds:
                found = where / slug(name, kind) / "result.json"
                failed = where / f"failed-{slug(name, kind)}.json"
                if found.is_file():
                    yield name, kind, json.loads(found.read_text())
                elif failed.is_file():
                    yield name, kind, {"status": "failed", **json.loads(failed.read_text())}
                else:
                    continue
                left.remove((name, kind))
        if (
            left
            and (left[0][0] in todo)
            and not any((where / f"failed-{slug(*cell)}.json").is_file() for cell in left)
        ):
            done = {(n, k) for n in todo for k in kinds} - set(left)
            if not done:
                yield (*left[0], {"status": "failed", "why": "the processes ended without a word; see the log"})
                left.pop(0)


def available(way: str) -> str | None:
    """Why a way cannot be run here, or None."""
    if way.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    return None


def table(found: dict[str, Any]) -> str:
    """What is in a JSON file of results as the table of docs/compatibility.md."""
    cells = found["cells"]

    def entry(way: str, name: str) -> str:
        results = {kind: cells.get(f"{way} | {name} | {kind}", {"status": "untested"}) for kind in WEIGHTS}
        statuses = {kind: result["status"] for kind, result in results.items()}
        if len(set(statuses.values())) == 1:
            return statuses[WEIGHTS[0]]
        return ", ".join(f"{kind}: {status}" for kind, status in statuses.items())

    rows = ["| method | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    rows += [f"| {name} | " + " | ".join(entry(way, name) for way in WAYS) + " |" for name in CELLS]
    reasons = sorted({result["why"] for result in cells.values() if result["status"] == "refused"})
    largest = max((result.get("difference", 0.0) for result in cells.values()), default=0.0)
    versions = ", ".join(f"{package} {version}" for package, version in sorted(found["versions"].items()))
    about = f"Each cell stands for {', '.join(WEIGHTS)}. The largest difference is {largest:.1g}. Run with {versions}."
    notes = [textwrap.fill(about, 118, break_on_hyphens=False)]
    if reasons:
        told = [
            textwrap.fill(f"- {reason}", 118, subsequent_indent="  ", break_on_hyphens=False) for reason in reasons
        ]
        notes += ["", "Refused, in these words:", "", *told]
    return "\n".join([*rows, "", *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--write", type=Path, help="JSON file that gets the results; cells not run keep theirs")
    parser.add_argument("--table", type=Path, help="print the table of a JSON file, and run nothing")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which is left")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.only, options.weights, options.worker)
        return 0
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    folder = options.keep or Path(tempfile.mkdtemp(prefix="matrix-"))
    folder.mkdir(parents=True, exist_ok=True)
    # With a name, from which TRL loads references of its own.
    os.environ["MATRIX_MODEL"] = str(tiny.save_model(folder / "model", num_hidden_layers=2))
    results: dict[str, Any] = {}
    for name in options.only:
        for kind in options.weights:
            run_cell(name, kind, folder / "one" / slug(name, kind), 2 * PROCESSES, resume=False)
            print(f"one process: {name}, {kind}", flush=True)
    for way in options.ways:
        if why := available(way):
            print(f"{way}: untested, because {why}", flush=True)
            continue
        for name, kind, result in run_way(way, options.only, options.weights, folder, folder / f"{way}.log"):
            if result["status"] == "ran":
                cell = slug(name, kind)
                try:
                    result |= judge(name, kind, folder / "one" / cell, folder / way / cell)
                except (AssertionError, OSError) as error:
                    result |= {"status": "failed", "why": repr(error)[:300]}
            if (result["status"] == "refused") != ((way, name) in REFUSED):
                result |= {"status": "failed", "why": result.get("why") or "was to be refused"}
            results[f"{way} | {name} | {kind}"] = result
            print(f"{way}: {name}, {kind}: {result}", flush=True)
    if options.write:
        before = json.loads(options.write.read_text()) if options.write.is_file() else {"cells": {}}
        packages = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")
        versions = {}
        for package in packages:
            if importlib.util.find_spec(package):
                versions[package] = importlib.metadata.version(package)
        merged = {"versions": {**before.get("versions", {}), **versions}, "tolerance": TOLERANCE}
        merged["cells"] = {**before["cells"], **results}
        options.write.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not options.keep:
        shutil.rmtree(folder)
    failed = [cell for cell, result in results.items() if result["status"] == "failed"]
    print(f"{len(results)} cells, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
