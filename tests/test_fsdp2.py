"""
FSDP2 through a trainer, on two processes of a CPU: some cells of `matrix.py`, and mixed precision, which has no one
process to be compared with. All cells are the command's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import matrix, shards_on_cpu, tiny


CELLS = [("apo, on-policy", "full"), ("spo, unrolled", "LoRA")]
# A frozen bfloat16 base below a float32 adapter; a bfloat16 reference of a policy that FSDP2 trains in float32.
MIXED = [("apo, reference ahead", "LoRA"), ("apo", "full")]


# Where upstream's `save_model` leaves nothing that could be loaded.
SHARDED = [("apo", "full"), ("apo", "LoRA")]


def main(folder: Path) -> None:
    """One of the processes."""
    shards_on_cpu.allow()
    for name, weights in CELLS:
        matrix.run_cell(name, weights, folder / matrix.slug(name, weights), 2, resume=True)
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    for name, weights in SHARDED:
        matrix.run_cell(name, weights, folder / "sharded" / matrix.slug(name, weights), 2, resume=True)
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    stock, load = tiny.arguments, matrix.AutoModelForCausalLM.from_pretrained

    def mixed(output_dir: Any, **settings: Any) -> dict[str, Any]:
        return {**stock(output_dir, **settings), "bf16": True}

    tiny.arguments = mixed  # type: ignore[assignment]
    matrix.AutoModelForCausalLM.from_pretrained = lambda path: load(path, dtype=torch.bfloat16)
    for name, weights in MIXED:
        matrix.run_cell(name, weights, folder / "mixed" / matrix.slug(name, weights), 2, resume=True)


SCRIPT = "import sys\nfrom pathlib import Path\nfrom tests.test_fsdp2 import main\nmain(Path(sys.argv[1]))\n"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    model = tiny.save_model(folder / "model", num_hidden_layers=2)
    script, root = folder / "two.py", str(Path(__file__).parents[1])
    script.write_text(SCRIPT, encoding="utf-8")
    own = {**shards_on_cpu.ENVIRONMENT, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MATRIX_MODEL": str(model)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script, folder],
        capture_output=True, text=True, timeout=280, cwd=root, env={**os.environ, **own}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("name", "weights"), CELLS)
def test_two_processes_with_shards_are_one(
    name: str, weights: str, launched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATRIX_MODEL", str(launched / "model"))
    matrix.run_cell(name, weights, tmp_path, 2 * matrix.PROCESSES, resume=False)
    result = matrix.judge(name, weights, tmp_path, launched / matrix.slug(name, weights))
    assert result["status"] == "passes", result
    if weights == "full":
        saved = sorted((launched / matrix.slug(name, weights)).glob("whole/_rounds/round-0002/*/model-*.safetensors"))
        assert len(saved) >= 4, "one file a process"


@pytest.mark.parametrize(("name", "weights"), MIXED)
def test_mixed_precision_trains_and_resumes(name: str, weights: str, launched: Path) -> None:
    folder = launched / "mixed" / matrix.slug(name, weights)
    whole, resumed = (matrix.tensors_of(folder / part) for part in ("whole", "resumed"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(("name", "weights"), SHARDED)
def test_a_sharded_state_dict_leaves_a_model_too(
    name: str, weights: str, launched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATRIX_MODEL", str(launched / "model"))
    matrix.run_cell(name, weights, tmp_path, 2 * matrix.PROCESSES, resume=False)
    folder = launched / "sharded" / matrix.slug(name, weights)
    assert list(folder.glob("whole/checkpoint-*/pytorch_model_fsdp_0")), "nothing was sharded"
    assert matrix.judge(name, weights, tmp_path, folder)["status"] == "passes"
