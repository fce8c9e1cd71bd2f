"""
DeepSpeed ZeRO 2 and 3, on two processes of a CPU: the cells of `matrix.py` against one process and against themselves
resumed, and what becomes of weights that are edited at a round's boundary. Skipped where DeepSpeed is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import matrix, tiny
from trl_extras.rounds import RoundsTrainer, sharding, zero
from trl_extras.rounds.state import AdapterWeights


ROOT = Path(__file__).parents[1]
STAGES = (2, 3)
CELLS = ("apo", "spo", "apo_spo", "spr, on-policy")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (`pip install deepspeed`)"
)


def launch(stage: int, folder: Path, *more: str) -> None:
    """Two processes; what went wrong on them is the failure's message."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "tests/zero_matrix.py", "--stage", str(stage), "--folder", str(folder), *more,
    ]  # fmt: skip
    own = {"PYTHONPATH": str(ROOT), "CI": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that all cells load their model from."""
    folder = tiny.save_model(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATRIX_MODEL", str(folder))
        yield folder


@needs_deepspeed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weights", ["full", "LoRA"])
@pytest.mark.parametrize("name", CELLS)
def test_two_processes_are_one(name: str, weights: str, model: Path, tmp_path: Path) -> None:
    """
    Weights within `matrix.TOLERANCE` of the largest change, the same tokens sampled, and a run that resumes inside its
    second round equal to the uninterrupted one, bit for bit.
    """
    one = tmp_path / "one"
    matrix.run_cell(name, weights, one, 2 * matrix.PROCESSES, resume=False)
    for stage in STAGES:
        launch(stage, tmp_path / str(stage), "--cells", f"{name}|{weights}")
        result = matrix.judge(name, weights, one, tmp_path / str(stage) / matrix.slug(name, weights))
        assert result["status"] == "passes", (stage, result)


@needs_deepspeed
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_edit_at_a_boundary_lasts(stage: int, precision: list[str], tmp_path: Path) -> None:
    """
    The workers check more: masters, what the model computes with, the reference and the saved policy agree at the
    start of a round; resuming at a round's boundary and inside it is going on, to the bit. Steps of Adam are no longer
    than the learning rate, so that a larger one after an extrapolation would be its loss.
    """
    launch(stage, tmp_path, "--edits", *precision)
    rounds = json.loads((tmp_path / "edits.json").read_text())
    assert len(rounds) == 3
    assert [seen["edit"] > 5 * seen["rate"] for seen in rounds] == [False, True, True]
    for seen in rounds:
        assert seen["rate"] == pytest.approx(1e-3), "the schedule begins anew"
        assert seen["step"] <= 1.01 * seen["rate"], "the edit was lost with the first step"
        assert seen["count"] == 1, "the optimizer's state is another round's"


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"optimizer": {"type": "AdamW"}}, "`optimizer`"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler`"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "`offload_optimizer`"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "`offload_param`"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "`zero_hpz_partition_size`"),
        ({"zero_optimization": {"stage": 1}}, "DeepSpeed with ZeRO 1"),
        ({"zero_optimization": None}, "DeepSpeed with ZeRO 0"),
        ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel`"),
        ({"fp16": {"enabled": True}}, "`fp16`"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "`bf16.bf16_master_weights_and_grads`"),
    ],
)
def test_refused(extra: dict[str, Any], what: str) -> None:
    settings = {"zero_optimization": {"stage": 3}, **extra}
    config: Any = SimpleNamespace(
        deepspeed="x", deepspeed_plugin=SimpleNamespace(hf_ds_config=SimpleNamespace(config=settings))
    )
    ((setting, reason),) = RoundsTrainer._unsupported_shards(config)
    assert setting.startswith(what)
    assert "\n" not in reason


def test_not_refused() -> None:
    """What accelerate writes for nothing."""
    none = {"device": "none", "nvme_path": None}
    settings = {
        "zero_optimization": {"stage": 2, "offload_optimizer": none, "offload_param": none},
        "fp16": {"enabled": "auto"},
    }
    assert not list(zero.why_not(settings))


def test_an_adapters_parameters_are_the_models_own() -> None:
    """DeepSpeed marks parameters: a detached tensor of the same memory would be taken for a plain one."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.make_model(tied=False), config)
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(tensor) for _, tensor in AdapterWeights(model)._parameters()} == own


def test_plain_weights_are_nobodys() -> None:
    model = tiny.make_model()
    assert not sharding.has_masters(model)
    assert not sharding.is_sharded(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    sharding.publish(model)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


@needs_deepspeed
def test_what_is_used_of_deepspeed(tmp_path: Path) -> None:
    """Without these, the weights of a run under ZeRO are not to be found, or an optimizer keeps its state."""
    code = """
import inspect
from deepspeed.runtime.zero import stage3, stage_1_and_2, parameter_offload
from deepspeed.utils import safe_get_local_fp32_param
from deepspeed.utils.tensor_fragment import tensor_fragment
from trl.models.utils import add_hooks, remove_hooks
from transformers.integrations import deepspeed as integration

three, two = stage3.DeepSpeedZeroOptimizer_Stage3, stage_1_and_2.DeepSpeedZeroOptimizer
assert "_z3_optimizer" in inspect.getsource(three._link_all_hp_params)
assert isinstance(three.state, property) and isinstance(two.state, property)
assert isinstance(three.param_groups, property) and isinstance(two.param_groups, property)
source = inspect.getsource(two)
for name in ("self.bit16_groups", "self._hp_optimizer_states_linked"):
    assert name in source, name
from deepspeed.utils import mixed_precision_linkage

for name in ("._hp_mapping", "._dp_group"):
    assert name in inspect.getsource(mixed_precision_linkage), name
assert {"optim_fragment", "hp_fragment", "lp_fragment_address"} <= set(tensor_fragment.__dataclass_fields__)
assert hasattr(integration, "_hf_deepspeed_config_weak_ref") and callable(integration.unset_hf_deepspeed_config)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
