"""
What one extrapolation of *accelerated* preference optimization costs on disk: `trl-extras extrapolate` against copying
its two inputs.

    python recipes/benchmarks/extrapolate.py --dir /a/folder/on/the/disk/to/measure

Makes two Llama checkpoints of 1 GB each (495 M weights in bfloat16, random, 4 shards), then measures in turn, each
time in a fresh process: extrapolating (reads both, writes one, fsync) and copying both (reads both, writes both,
fsync). The seconds are those of the work itself: the process start and the imports are left out of both. The inputs
are in the page cache, as they are after a training run that has just written them. Needs 6 GB of disk and two minutes
or so; cleans up after itself.

Expected, from a virtual machine with 2 cores of an AMD EPYC and a disk that syncs 2.5 GB/s, shared with other work but
at a higher priority; 7 repeats, medians: 0.90 times the copy's speed (pair by pair 0.79 to 0.98), 245 MiB at the peak,
of which 23 MiB above what the imports take (two shards and 300 MB would be 790 MiB). On such a disk extrapolating is
bound by the processor, about 2.2 core seconds a GB: where other work takes the cores it falls behind the copy (0.55 to
0.7 with seven processes on the two cores), and on a slower disk it comes out ahead, since it writes half as much.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SHARDS = 4


def make_checkpoints(new: Path, old: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=12,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(old, max_shard_size="265MB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(new, max_shard_size="265MB")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def copy_both(new: Path, old: Path, output: Path) -> None:
    for source in (new, old):
        target = output / source.name
        target.mkdir(parents=True)
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
            fsync(target / file.name)
        fsync(target)


def peak_mb() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def child(task: str, new: Path, old: Path, output: Path) -> None:
    """One measurement, in a process of its own; prints it as JSON."""
    if task == "make":
        make_checkpoints(new, old)
        return
    if task == "load":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(output)
        print(json.dumps({"parameters": model.num_parameters()}))
        return
    if task == "extrapolate":
        from trl_extras.scripts.extrapolate import extrapolate_checkpoints

        for lazily_imported in ("safetensors.torch", "tqdm", "trl_extras.state_dicts"):
            importlib.import_module(lazily_imported)
    baseline = peak_mb()
    start = time.perf_counter()
    if task == "extrapolate":
        extrapolate_checkpoints(new, old, 0.3, output)
    else:
        copy_both(new, old, output)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), "baseline_mb": baseline}))


def run_child(task: str, new: Path, old: Path, output: Path) -> dict[str, float]:
    # The parent imports nothing large: a child's peak begins with what its parent had at the fork.
    command = [sys.executable, __file__, "--child", task, str(new), str(old), str(output)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = result.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def measure(folder: Path, repeats: int) -> None:
    new, old, output = folder / "new", folder / "old", folder / "out"
    run_child("make", new, old, output)
    shards = sorted(new.glob("*.safetensors"))
    if len(shards) != SHARDS:
        raise SystemExit(f"expected {SHARDS} shards, transformers wrote {len(shards)}")
    shard_mb = max(shard.stat().st_size for shard in shards) / (1 << 20)
    total_gb = sum(shard.stat().st_size for shard in shards) / 1e9

    results: dict[str, list[dict[str, float]]] = {"copy": [], "extrapolate": []}
    for repeat in range(repeats + 1):
        # In turn, and in the other order every second time, so that a disk that gets slower slows down both.
        for task in list(results) if repeat % 2 else reversed(list(results)):
            os.sync()  # what the last run or the deletion left to be written is not this run's
            measurement = run_child(task, new, old, output)
            if repeat > 0:  # the first pass fills the page cache
                results[task].append(measurement)
            if repeat == repeats and task == "extrapolate":
                parameters = run_child("load", new, old, output)["parameters"]
            shutil.rmtree(output)

    print(
        f"\n{total_gb:.2f} GB a checkpoint, {SHARDS} shards of at most {shard_mb:.0f} MiB, {parameters:,} parameters"
    )
    print(f"{repeats} repeats, interleaved; {os.cpu_count()} cores\n")
    print("| | median s | min to max s | peak MiB | of which after imports MiB |")
    print("|---|---|---|---|---|")
    for task, name in (("copy", "copy both inputs"), ("extrapolate", "extrapolate")):
        seconds = [m["seconds"] for m in results[task]]
        peak = max(m["peak_mb"] for m in results[task])
        above = max(m["peak_mb"] - m["baseline_mb"] for m in results[task])
        print(
            f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {peak:.0f} | "
            f"{above:.0f} |"
        )
    ratios = [c["seconds"] / e["seconds"] for c, e in zip(results["copy"], results["extrapolate"], strict=True)]
    medians = [statistics.median(m["seconds"] for m in results[task]) for task in ("copy", "extrapolate")]
    peak = max(m["peak_mb"] for m in results["extrapolate"])
    print(
        f"\nspeed relative to the copy: {medians[0] / medians[1]:.2f} (pair by pair: median "
        f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}); wanted at least 0.85\n"
        f"peak: {peak:.0f} MiB; wanted at most two shards + 300 MB = {2 * shard_mb + 300e6 / (1 << 20):.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to put the 6 GB; defaults to the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", nargs=4, metavar=("TASK", "NEW", "OLD", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], *(Path(path) for path in args.child[1:]))
        return
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="extrapolate-benchmark-") as folder:
        measure(Path(folder), args.repeats)


if __name__ == "__main__":
    main()
