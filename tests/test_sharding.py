"""
Weights in shards against the same weights whole: two processes with FSDP2 as torch has it, on the CPU, one launch for
all of the checks below. What trainers make of it is `matrix.py`'s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests import tiny
from trl_extras.errors import ConfigurationError
from trl_extras.rounds import sharding
from trl_extras.rounds import state as rounds_state
from trl_extras.rounds.state import FullWeights


CHECKS: dict[str, Callable[..., None]] = {}


def on_two_processes(check: Callable[..., None]) -> Callable[..., None]:
    CHECKS[check.__name__] = check
    return check


# Widths that two processes share unevenly: 3 rows are 2 and 1, and one row is all on the first.
def uneven() -> torch.nn.Module:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1), torch.nn.LayerNorm(1))
    return model.requires_grad_(True)


def make(seed: int = 0, tied: bool = True) -> Any:
    return tiny.make_model(seed, num_hidden_layers=2, tied=tied)


def sharded(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    inner = getattr(model, "model", None)
    for layer in inner.layers if inner is not None else []:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


@on_two_processes
def parts_make_up_the_whole(folder: Path, rank: int) -> None:
    whole, model = uneven(), sharded(uneven())
    values = dict(whole.named_parameters())
    assert sharding.is_sharded(model)
    assert not sharding.is_sharded(whole)
    sizes = set()
    for name, weight in model.named_parameters():
        part, flat = sharding.part_of(weight), values[name].detach().view(-1)
        assert torch.equal(part.flat, flat[part.start : part.start + len(part.flat)]), name
        assert part.counts
        assert torch.equal(sharding.whole(weight), values[name]), name
        ends = sharding.of_all((part.start, len(part.flat)))
        assert ends[0][0] == 0
        assert ends[0][1] + ends[1][1] == len(flat)
        assert ends[1][1] == 0 or ends[1][0] == ends[0][1]
        sizes.add(ends[0][1] - ends[1][1])
        sharding.write_(weight, values[name] * 2)
        assert torch.equal(sharding.whole(weight), values[name] * 2), name
    assert sizes - {0}, "nothing was uneven"


@on_two_processes
def replicas_count_once(folder: Path, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for _, weight in sharded(uneven(), mesh).named_parameters():
        part = sharding.part_of(weight)
        assert part.counts == (rank == 0)
        assert (part.start, len(part.flat)) == (0, weight.numel())


@on_two_processes
def other_placements_are_refused(folder: Path, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    is_refused("whole rows", lambda: sharding.part_of(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])))


@on_two_processes
def a_saved_model_is_whole_and_one_file_a_process(folder: Path, rank: int) -> None:
    for tied in (True, False):
        target = folder / f"saved-{tied}"
        whole, model = make(tied=tied), sharded(make(tied=tied))
        FullWeights(model).save(target, rank == 0)
        torch.distributed.barrier()
        files = sorted(path.name for path in target.glob("*.safetensors"))
        assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        sizes = [os.path.getsize(target / name) for name in files]
        assert min(sizes) > max(sizes) / 3, sizes
        loaded = AutoModelForCausalLM.from_pretrained(target)
        assert tiny.same_weights(loaded, whole)
        assert type(loaded).__name__ == "LlamaForCausalLM"
        about = json.loads((target / "config.json").read_text())
        assert about["architectures"] == ["LlamaForCausalLM"]
        # And back, into shards of other values and into whole weights.
        for other in (sharded(make(5, tied)), make(5, tied)):
            state = FullWeights(other)
            state.load(target)
            for name, weight in other.named_parameters():
                assert torch.equal(sharding.whole(weight), dict(whole.named_parameters())[name]), name


@on_two_processes
def a_full_file_is_written_and_another_begun(folder: Path, rank: int) -> None:
    """So that no process ever has a large part of a large model in memory."""
    kept, rounds_state._FILE_BYTES = rounds_state._FILE_BYTES, 3000
    whole, model = make(tied=False), sharded(make(tied=False))
    try:
        FullWeights(model).save(folder / "saved", rank == 0)
    finally:
        rounds_state._FILE_BYTES = kept
    torch.distributed.barrier()
    files = sorted((folder / "saved").glob("*.safetensors"))
    assert len(files) > 4
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(weight.numel() for weight in whole.parameters()) * 4
    assert all(path.stat().st_size < max(largest, 3000) + 2000 for path in files)
    assert tiny.same_weights(AutoModelForCausalLM.from_pretrained(folder / "saved"), whole)


@on_two_processes
def arithmetic_is_that_of_whole_weights_to_the_bit(folder: Path, rank: int) -> None:
    folders = [folder / f"whole-{seed}" for seed in range(3)]
    for seed, target in enumerate(folders):
        FullWeights(make(seed)).save(target, rank == 0)
    torch.distributed.barrier()
    whole, model = FullWeights(make(4)), FullWeights(sharded(make(4)))
    here, there = (state.distances(folders[0], folders[1], folders[2]) for state in (whole, model))
    for name, value in here.items():
        assert there[name] == pytest.approx(value, rel=1e-6), name
    for state in (whole, model):
        state.extrapolate(folders[0], 0.7)
    values = dict(whole.model.named_parameters())
    for name, weight in model.model.named_parameters():
        assert torch.equal(sharding.whole(weight), values[name]), name
    reference = sharded(make(7))
    model.copy_to(reference)
    for name, weight in reference.named_parameters():
        assert torch.equal(sharding.whole(weight), values[name]), name


@on_two_processes
def a_hash_is_the_same_on_all_processes_and_sees_every_shard(folder: Path, rank: int) -> None:
    model = sharded(make())
    state = FullWeights(model)
    first = state.fingerprint()
    assert sharding.of_all(first) == [first, first]
    if rank == 1:
        sharding.part_of(model.model.layers[1].mlp.up_proj.weight).flat[0] += 1
    second = state.fingerprint()
    assert second != first
    assert sharding.of_all(second) == [second, second]


@on_two_processes
def a_nan_on_one_process_is_seen_by_all(folder: Path, rank: int) -> None:
    model = sharded(make())
    state = FullWeights(model)
    assert state.non_finite() is None
    if rank == 1:
        sharding.part_of(model.model.layers[1].mlp.up_proj.weight).flat[-1] = float("nan")
    assert state.non_finite() == "model.layers.1.mlp.up_proj.weight"


@on_two_processes
def a_forward_leaves_no_stale_copies(folder: Path, rank: int) -> None:
    """Without `settle` the root's weights would be written to copies that are thrown away."""
    model = sharded(make())
    state, ids = FullWeights(model), torch.arange(5, 11)[None]
    with torch.no_grad():
        model(input_ids=ids)
    target = folder / "other"
    FullWeights(make(6)).save(target, rank == 0)
    torch.distributed.barrier()
    state.load(target)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        wanted = make(6)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)
    # As a backward does: what has been written has to be there still.
    model.reshard()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)


@on_two_processes
def one_process_runs_a_gathered_model_alone(folder: Path, rank: int) -> None:
    whole, model = make(), sharded(make())
    ids = torch.arange(5, 11)[None]
    for _ in range(2):
        with sharding.gathered(model), torch.no_grad():
            for step in range(3 * rank):
                assert torch.equal(model(input_ids=ids + step).logits, whole(input_ids=ids + step).logits)
        assert sharding.is_sharded(model)
    # And it trains on as before.
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    whole(input_ids=ids, labels=ids).loss.backward()
    gradients = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad.full_tensor(), gradients[name].grad)
    assert all(type(weight).__name__ == "DTensor" for weight in model.model.layers.parameters())


@on_two_processes
def resharding_is_what_it_was(folder: Path, rank: int) -> None:
    def kept(model: Any) -> list[bool]:
        states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
        return [group.post_forward_mesh_info is None for state in states for group in state._fsdp_param_groups]

    ids = torch.arange(5, 11)[None]
    used, gathered = sharded(make()), sharded(make())
    with sharding.gathered(gathered):
        pass
    for model in (used, gathered):
        with torch.no_grad():
            model(input_ids=ids)
    assert kept(used) == kept(gathered)
    assert set(kept(used)) == {True, False}


@on_two_processes
def ranks_that_differ_are_named(folder: Path, rank: int) -> None:
    sharding.agree("The answer", "42", "the question")
    is_refused("The answer differs between processes: rank 1 has another than rank 0. Look at the question",
               lambda: sharding.agree("The answer", str(rank), "the question"))  # fmt: skip
    assert sharding.of_main(rank) == 0


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, check in CHECKS.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        torch.distributed.barrier()
        check(own, rank)
        if rank == 0:
            (own / "passed").touch()
    torch.distributed.destroy_process_group()


SCRIPT = "import sys\nfrom pathlib import Path\nfrom tests.test_sharding import main\nmain(Path(sys.argv[1]))\n"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("shards")
    script, root = folder / "two.py", str(Path(__file__).parents[1])
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script, folder],
        capture_output=True, text=True, timeout=240, cwd=root, check=False,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder, done.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, launched: tuple[Path, str]) -> None:
    folder, errors = launched
    assert (folder / name / "passed").is_file(), errors[-3000:]


# ---- One process ----


def test_a_whole_weight_is_its_own_part() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    part = sharding.part_of(weight)
    assert (part.start, part.counts, part.flat.tolist()) == (0, True, list(range(6)))
    part.flat[0] = 9
    assert weight[0, 0] == 9
    assert sharding.whole(weight).data_ptr() == weight.data_ptr()


def test_alone_everybody_agrees() -> None:
    assert sharding.of_all(3) == [3]
    assert sharding.of_main(3) == 3
    sharding.agree("It", "1", "nothing")


def test_a_weight_that_is_not_contiguous_can_be_written_to() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3).T)
    sharding.write_(weight, torch.arange(6.0))
    assert weight.flatten().tolist() == list(range(6))


def test_files_of_shards_are_read_by_place(tmp_path: Path) -> None:
    """A process reads its own rows alone: what else a file holds is never touched."""
    model = make()
    FullWeights(model).save(tmp_path, True)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(dict(model.named_parameters()))
