"""`trl-extras METHOD --plan`, in this process: what it says, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_extras import cli, sizing

from .test_cli import METHODS, launched  # noqa: F401 (a fixture)
from .test_run import run_tiny, write_sft  # noqa: F401 (a fixture)


@pytest.fixture
def planned(run_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: Any, capsys: Any) -> Any:  # noqa: F811
    """`planned("apo", num_rounds=2, ...)`: the plan as JSON, by a run that may load no weights and launch nothing."""
    import transformers

    model, data = run_tiny

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def plan(method: str, *words: str, text: bool = False, **settings: Any) -> Any:
        keys = {
            "model_name_or_path": str(model), "dataset_name": str(data), "use_cpu": True, "bf16": False,
            "per_device_train_batch_size": 2, "report_to": "none", "output_dir": str(tmp_path / "out"), **settings,
        }  # fmt: skip
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({name: value for name, value in keys.items() if value is not None}))
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status = cli.main([method, "--plan" if text else "--plan_json", "--config", str(recipe), *words])
        out, err = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before, "something is left behind"
        assert not launched
        if status:
            assert status == 2
            (line,) = [line for line in err.splitlines() if line.startswith("trl-extras")]
            return line
        return out if text else json.loads(out)

    return plan


def judged(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "reward.py").write_text("def count(completions, **kwargs):\n    return [*map(len, completions)]\n")
    return {"reward_funcs": f"{tmp_path / 'reward.py'}:count", "num_generations": 2, "max_completion_length": 4}


def settings_of(method: str, tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"save_strategy": "epoch", "max_length": 16}
    if method == "spr":
        found |= judged(tmp_path)
    if "spo" in method:
        found |= {"sft_dataset_name": str(write_sft(tmp_path)), "sft_coef": 0.5}
    return found if method == "spo" else found | {"num_rounds": 2}


@pytest.mark.parametrize("method", METHODS)
def test_says_what_a_run_takes(planned: Callable[..., Any], tmp_path: Path, method: str) -> None:
    settings = settings_of(method, tmp_path)
    said = planned(method, **settings)
    assert said["method"] == method
    assert said["model"]["parameters"] == sum(
        width for width in (60 * 16, 60 * 16, 2 * (4 * 16 * 16 + 3 * 16 * 16 + 2 * 16), 16)
    )
    in_rounds = method != "spo"
    assert len(said["rounds"]) == (2 if in_rounds else 1)
    # SPR: 4 prompts of the fold, 2 samples each, and as many offline responses.
    rows = {"spr": 16, "spo": 8}.get(method, 4)
    assert said["rows"] == rows
    each = said["rounds"][0]
    assert each["steps"] == rows // 2 * (1 if in_rounds else 3)
    assert said["steps"] == each["steps"] * len(said["rounds"])
    assert said["disk"]["checkpoints"] == (2 if in_rounds else 3)
    assert said["disk"]["peak"] == pytest.approx(sum(said["disk"]["parts"].values()))
    assert {"weights", "optimiser"} <= said["memory"]["phases"]["forward pass"].keys()
    assert ("reference model" in said["memory"]["phases"]["forward pass"]) == (method != "spr")
    assert ("sampling" in said["memory"]["phases"]) == (method == "spr")
    if "apo" in method:
        assert each["settings"]["alpha"] == 0.3
    assert not said["memory"]["unknown"]
    out = planned(method, text=True, **settings) if not (tmp_path / "kept").exists() else planned(
        method, text=True, **{**settings, "save_strategy": "no"}
    )  # fmt: skip
    for words in ("nothing is trained", "Steps: ", "Checkpoints: ", "Disk: ", "Memory of a process: ", "weights"):
        assert words in out
    assert re.search(r"^ +1 +[13] +\d+ ", out, re.MULTILINE)


def test_schedule(planned: Callable[..., Any]) -> None:
    said = planned(
        "apo", num_rounds=2, round_epochs=[1, 3], extrapolation_alpha=[0.1, 0.2], round_beta=[0.01, 0.5],
        warmup_steps=0.5, lr_scheduler_type="cosine", learning_rate=1e-5, save_strategy="steps", save_steps=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    rounds = said["rounds"]
    assert [(r["epochs"], r["steps"], r["warmup_steps"]) for r in rounds] == [(1, 1, 1), (3, 3, 2)]
    assert [r["settings"] for r in rounds] == [{"alpha": 0.1, "beta": 0.01}, {"alpha": 0.2, "beta": 0.5}]
    assert {(r["schedule"], r["learning_rate"]) for r in rounds} == {("cosine", 1e-5)}
    assert (said["steps"], said["disk"]["checkpoints"]) == (4, 2)


def test_processes(planned: Callable[..., Any], tmp_path: Path) -> None:
    assert planned("apo", num_rounds=2)["steps"] == 4
    assert planned("apo", "--num_processes", "2", num_rounds=2)["steps"] == 2
    assert planned("apo", num_rounds=2, num_processes=2)["launch"]["processes"] == 2
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 4}
    config |= {"machine_rank": 0, "num_machines": 1, "mixed_precision": "no", "use_cpu": False, "debug": False}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    said = planned("apo", "--config_file", str(tmp_path / "accelerate.yaml"), num_rounds=2)
    assert (said["launch"]["processes"], said["steps"], said["launch"]["sharding"]) == (4, 2, sizing.DDP)
    assert "DDP's buckets" in said["memory"]["phases"]["forward pass"]


def test_shards(planned: Callable[..., Any], tmp_path: Path) -> None:
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 4}
    config |= {"machine_rank": 0, "num_machines": 1, "mixed_precision": "no", "use_cpu": False, "debug": False}
    gpus: dict[str, Any] = {"plan_for": "gpu", "use_cpu": None}
    whole = planned("spo", **gpus)["memory"]["phases"]["forward pass"]
    for sharding, words in (
        (sizing.FSDP, ("--use_fsdp", "--fsdp_version", "2")),
        (sizing.ZERO3, ("--use_deepspeed", "--zero_stage", "3")),
    ):
        said = planned("spo", *words, "--num_processes", "4", **gpus)
        assert (said["launch"]["processes"], said["launch"]["sharding"]) == (4, sharding)
        assert said["memory"]["phases"]["forward pass"]["weights"] == whole["weights"] / 4
    path = tmp_path / "fsdp.yaml"
    path.write_text(yaml.safe_dump({**config, "fsdp_config": {"fsdp_version": 2}}))
    assert planned("spo", "--config_file", str(path), **gpus)["launch"]["sharding"] == sizing.FSDP
    # Without a GPU accelerate runs something else.
    for on_cpu in ({"use_cpu": True}, {"use_cpu": None, "plan_for": "cpu"}):
        said = planned("spo", "--config_file", str(path), **on_cpu)
        assert (said["launch"]["processes"], said["launch"]["sharding"]) == (4, sizing.DDP)
        assert said["memory"]["phases"]["forward pass"]["weights"] == whole["weights"]
        assert any("without a GPU accelerate runs DDP instead" in note for note in said["notes"])
    path.write_text(yaml.safe_dump({**config, "fsdp_config": {"fsdp_version": 1}}))
    assert "FSDP1 does not work" in planned("apo", "--config_file", str(path), num_rounds=2)


def test_the_configurations_of_the_repository(planned: Callable[..., Any], tmp_path: Path) -> None:
    configs = Path(__file__).parents[1] / "recipes/accelerate_configs"
    gpus: dict[str, Any] = {"plan_for": "gpu", "use_cpu": None, "bf16": True, "num_rounds": 2}
    checkpoints = {}
    for name, sharding in (
        ("ddp", sizing.DDP), ("fsdp2", sizing.FSDP), ("zero2", sizing.ZERO2), ("zero3", sizing.ZERO3),
    ):  # fmt: skip
        said = planned("apo", "--accelerate_config", str(configs / f"{name}.yaml"), **gpus)
        assert (said["launch"]["processes"], said["launch"]["sharding"]) == (8, sharding), name
        checkpoints[name] = said["disk"]["parts"]["checkpoints"]
    # float32 masters beside 16-bit weights; accelerate's own copy of the model beside transformers'.
    assert checkpoints["zero3"] == checkpoints["zero2"]
    assert checkpoints["fsdp2"] > checkpoints["ddp"]
    offload = ("--use_deepspeed", "--zero_stage", "3", "--offload_optimizer_device", "cpu")
    assert "`offload_optimizer` in the DeepSpeed configuration does not work" in planned("apo", *offload, **gpus)
    assert "DeepSpeed with ZeRO 1 does not work" in planned("apo", "--use_deepspeed", "--zero_stage", "1", **gpus)


def test_a_run_on_gpus_is_planned_without_one(planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import training_args

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("CUDA is set up")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    given: dict[str, Any] = {"num_rounds": 2, "use_cpu": None, "bf16": True}
    before = training_args.is_torch_bf16_gpu_available
    line = planned("apo", **given)
    assert "support bf16/gpu" in line
    assert line.endswith("To plan a run on GPUs on a machine without one, add --plan_for gpu.")
    assert "support bf16/gpu" in planned("apo", "--plan_for", "cpu", **given)
    said = planned("apo", "--plan_for", "gpu", "--num_processes", "8", **given, tf32=True)
    assert (said["launch"]["processes"], said["launch"]["gpu"], said["batch"]["gpu"]) == (8, True, True)
    assert said["model"]["autocast"]
    assert "boundary" not in said["memory"]["phases"]
    assert not any("process" in parts for parts in said["memory"]["phases"].values())
    assert any("does not have" in note for note in said["notes"])
    assert any("says how many GPUs" in note for note in planned("apo", "--plan_for", "gpu", **given)["notes"])
    assert "GPU memory of a process" in planned("apo", text=True, **given, plan_for="gpu")
    assert training_args.is_torch_bf16_gpu_available is before


def test_plan_for_wants_a_plan(planned: Callable[..., Any], launched: Any, capsys: Any) -> None:  # noqa: F811
    assert cli.main(["apo", "--plan_for", "gpu", "--model_name_or_path", "m", "--dataset_name", "d"]) == 2
    assert "it wants --plan or --plan_json beside it" in capsys.readouterr().err
    assert not launched
    assert "wants gpu or cpu" in planned("apo", "--plan_for", "tpu")


def test_the_launchers_mixed_precision(planned: Callable[..., Any], tmp_path: Path) -> None:
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1}
    config |= {"machine_rank": 0, "num_machines": 1, "mixed_precision": "bf16", "use_cpu": True, "debug": False}
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config))
    decides = "`mixed_precision: bf16` of the accelerate configuration decides"
    for words in (("--config_file", str(path)), ("--mixed_precision", "bf16")):
        said = planned("apo", *words)
        assert said["model"]["autocast"]
        assert any(decides in note for note in said["notes"])
    assert not planned("apo", "--config_file", str(path), "--mixed_precision", "no")["model"]["autocast"]
    said = planned("apo", "--mixed_precision", "no", bf16=True)
    assert said["model"]["autocast"]
    assert any("`bf16` decides, not `mixed_precision: no`" in note for note in said["notes"])
    # accelerate has no float16 on a CPU.
    assert not planned("apo", "--mixed_precision", "fp16")["model"]["autocast"]
    gpu = planned("apo", "--mixed_precision", "fp16", "--plan_for", "gpu", use_cpu=None)
    assert gpu["model"]["autocast"]


def test_the_run_computes_as_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from transformers import TrainingArguments

    # Training arguments begin with accelerate's state anew.
    for asked, autocasts in (("bf16", True), ("fp16", False), ("no", False)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        args = TrainingArguments(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
        accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
        assert (args.mixed_precision, accelerator.native_amp) == (asked, autocasts)
    assert TrainingArguments(str(tmp_path), bf16=True, use_cpu=True).mixed_precision == "bf16"


def test_all_processes_of_a_machine(planned: Callable[..., Any]) -> None:
    out = planned("apo", "--num_processes", "3", text=True, num_rounds=2)
    assert re.search(r"all 3 processes of the machine: [\d.]+ GB", out)
    assert re.search(r"weights +[\d.]+ kB", out)
    assert re.search(r"^    [\w', ]+: [\d.]+ [kMG]B \(weights [\d.]+ kB, ", out, re.MULTILINE)
    several = planned("apo", "--num_processes", "4", "--num_machines", "2", text=True, num_rounds=2)
    assert "processes of the machine" not in several
    assert "processes of the machine" not in planned("apo", text=True, num_rounds=2)


def test_plan_can_stand_in_the_recipe(planned: Callable[..., Any]) -> None:
    assert "Steps: 4 in all" in planned("apo", text=True, num_rounds=2, plan=True)


def test_adapter(planned: Callable[..., Any]) -> None:
    full = planned("apo", num_rounds=2)
    said = planned("apo", num_rounds=2, use_peft=True, lora_r=2, lora_target_modules=["q_proj", "down_proj"])
    assert said["model"]["parameters"] == full["model"]["parameters"]
    assert said["model"]["trained"] == 2 * 2 * (2 * 16 + 2 * 16)
    assert said["memory"]["phases"]["forward pass"]["optimiser"] == 8 * said["model"]["trained"]
    assert "reference model" not in said["memory"]["phases"]["forward pass"]
    assert said["disk"]["peak"] < full["disk"]["peak"]


def test_on_policy(planned: Callable[..., Any], tmp_path: Path, run_tiny: Any) -> None:  # noqa: F811
    _, data = run_tiny
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (prompts / "train.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    given = {**judged(tmp_path), "dataset_name": str(prompts), "num_rounds": 2}
    said = planned("apo", **given)
    assert (said["rows"], said["steps"]) == (4, 4)
    assert said["disk"]["parts"]["rollouts"] == 2 * sizing.rollout_bytes(4, 2, 1, 4)
    assert any("judge" in note for note in said["notes"])
    # Every boundary has a checkpoint, whatever the strategy says.
    assert said["disk"]["checkpoints"] == 2
    assert planned("apo", save_total_limit=1, **given)["disk"]["at_once"] == 2
    assert planned("apo", save_strategy="no", **given)["disk"]["checkpoints"] == 0
    waiting = {**given, "reward_funcs": None, "ranker": "external"}
    assert planned("apo", save_strategy="no", **waiting)["disk"]["checkpoints"] == 1
    assert planned("apo", prompts_per_round=2, **given)["steps"] == 2
    assert "nothing judges them" in planned("apo", **{**given, "reward_funcs": None})


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("apo", {"num_rounds": 0}, "num_rounds"),
        ("apo", {"extrapolation_alfa": 1}, "did you mean extrapolation_alpha?"),
        ("apo", {"num_rounds": 9}, "`train_dataset` has 8 rows, but `num_rounds` is 9"),
        ("apo", {"max_steps": 2}, "`max_steps` is 2, but the rounds take"),
        ("apo", {"max_steps": 300}, "`max_steps` is 300, but the rounds take"),
        ("apo", {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
         "`load_best_model_at_end=True` does not work with more than one round"),
        ("apo", {"reward_funcs": "os:getcwd"}, "`reward_funcs` is given, but `train_dataset` holds preference pairs"),
        ("apo", {"adapter_rank": 4}, "none is trained"),
        ("apo", {"resume_from_checkpoint": "nowhere"}, "`resume_from_checkpoint` is 'nowhere'"),
        ("apo", {"dataset_name": None}, "no dataset is given"),
        ("apo", {"dataset_name": "/nowhere/at/all"}, "`dataset_name` ('/nowhere/at/all'), split 'train', cannot be "),
        ("apo", {"dataset_train_split": "trian"}, "split 'trian', cannot be loaded: it has train (`dataset_train_sp"),
        ("apo", {"eval_strategy": "epoch"}, "split 'test', cannot be loaded: it has train (`dataset_test_split`)"),
        ("apo", {"model_name_or_path": "/no/where"}, "`model_name_or_path` is '/no/where', but there is no such fo"),
        ("apo", {"num_processes": 0}, "num_processes is 0, but wants at least 1"),
        ("apo", {"plan_for": "gpu"}, "`--plan_for` is 'gpu', but `use_cpu`"),
        ("spo", {"lower_level": "both"}, "there is no SFT dataset"),
        ("spo", {"inner_steps": 2}, "takes no inner steps"),
        ("spr", {}, "responses without a reward"),
        ("spr", {"packing": True}, "`packing=True` does not work with SPR"),
    ],
)  # fmt: skip
def test_refuses_what_the_run_would(
    planned: Callable[..., Any], method: str, settings: dict[str, Any], says: str
) -> None:
    line = planned(method, **settings)
    assert line.startswith(f"trl-extras {method}: error: ")
    assert says in line


def test_refuses_another_runs_folder(planned: Callable[..., Any], tmp_path: Path) -> None:
    rounds = tmp_path / "out" / "_rounds"
    rounds.mkdir(parents=True)
    (rounds / "run.json").write_text(json.dumps({"run_id": "x", "configuration": {"seed": 7}}))
    assert "`seed` is 42" in planned("apo")


def test_unknown_sizes_are_not_guessed(planned: Callable[..., Any], tmp_path: Path, run_tiny: Any) -> None:  # noqa: F811
    import shutil

    model, _ = run_tiny
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "model.safetensors").unlink()  # its weights are not looked at
    config = json.loads((other / "config.json").read_text())
    gpt = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 60, "n_embd": 16, "n_head": 2}
    (other / "config.json").write_text(json.dumps({**gpt, "n_layer": 2, "n_positions": 32}))
    said = planned("apo", num_rounds=2, model_name_or_path=str(other))
    assert said["memory"]["unknown"] == ["activations", "head"]
    assert any("Activations are unknown" in note for note in said["notes"])
    out = planned("apo", text=True, num_rounds=2, model_name_or_path=str(other))
    assert re.search(r"Memory of a process: at least .*", out)
    assert re.search(r"activations +unknown", out)
    assert "The state of the optimiser" in planned("apo", text=True, optim="stable_adamw", num_rounds=2)
    (other / "config.json").write_text(json.dumps({**config, "model_type": "nowhere"}))
    said = planned("apo", num_rounds=2, model_name_or_path=str(other))
    assert (said["memory"], said["disk"], said["steps"]) == (None, None, 4)
    assert any("The model's size is unknown" in note for note in said["notes"])


def test_a_model_that_is_not_there(planned: Callable[..., Any], tmp_path: Path) -> None:
    assert "there is no such folder" in planned("apo", model_name_or_path=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "the tokenizer of the model" in planned("apo", model_name_or_path=str(tmp_path / "empty"))


def test_a_run_says_the_same_of_its_data(
    run_tiny: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    from trl_extras.scripts import apo

    words = ["--model_name_or_path", str(run_tiny[0]), "--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["apo.py", *words, "--dataset_name", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        apo.script.run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-extras")]
    assert "split 'train', cannot be loaded: " in line


def test_an_on_policy_run_leaves_the_planned_checkpoints(
    run_tiny: Any,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
) -> None:
    from trl_extras.scripts import apo

    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "train.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(6)))
    given = {"model_name_or_path": str(run_tiny[0]), "dataset_name": str(prompts), "num_rounds": 3, **judged(tmp_path)}
    given |= {"output_dir": str(out), "per_device_train_batch_size": 2, "report_to": "none", "max_length": 16}
    words = ["--use_cpu", "--bf16", "False", "--disable_tqdm", "True", "--temperature", "2"]
    words += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert cli.main(["apo", "--plan_json", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    apo.script.main(*apo.parse_arguments(words))
    assert said["disk"]["checkpoints"] == len(list(out.glob("checkpoint-*"))) == 3
    # What the run itself says of the disk counts them too: each has small files beside the weights.
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "disk: at most" in line]
    found = re.search(r"([\d.]+) kB for the checkpoints", line)
    assert found is not None
    assert float(found[1]) * 1000 > 3 * sizing._SMALL_FILES


def test_run_says_where_plan_belongs() -> None:
    from trl_extras.run import Ledger

    assert "--plan; it belongs to `trl-extras METHOD`" in Ledger("dpo.py").unknown(["--plan"]).message


def test_the_plan_is_what_the_run_does(
    run_tiny: Any,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
) -> None:
    from trl_extras.scripts import apo

    model, data = run_tiny
    words = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--use_cpu", "--bf16", "False"]
    words += ["--output_dir", str(tmp_path / "out"), "--num_rounds", "2", "--report_to", "none", "--save_strategy"]
    words += ["epoch", "--per_device_train_batch_size", "2", "--disable_tqdm", "True", "--max_length", "16"]
    assert cli.main(["apo", "--plan_json", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    apo.script.main(*apo.parse_arguments(words))
    states = sorted((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))
    assert len(states) == said["disk"]["checkpoints"]
    assert max(json.loads(path.read_text())["global_step"] for path in states) == said["steps"]
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text().splitlines()]
    assert [row["rows"] for row in rows] == [r["rows"] for r in said["rounds"]]
    assert [row["last_step"] for row in rows] == [2, 4]
