import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_extras
from trl_extras import cli

from .test_run import environment, run_tiny, write_sft  # noqa: F401 (a fixture)


SCRIPTS = Path(cli.__file__).parent / "scripts"
METHODS = ["apo", "apo_spo", "spo", "spr"]
GIVEN = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "--bf16", "False", "--output_dir", "o"]


def test_help_is_light():
    code = "import sys; from trl_extras.cli import main; main(['--help']); print({'torch', 'trl'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
    for words in (
        "METHOD --config recipe.yaml", "extrapolate NEW OLD", "trainers for `run --trainer`: apo, apo_spo, spo, spr, ",
        "    apo           Accelerated Preference Optimization (APO, ",
        "    spo           Stable Preference Optimization (SPO, ",
        "    apo_spo       Accelerated Preference Optimization over Stable Preference Optimization",
        "    spr           Successive Policy Re-weighting (SPR, ",
    ):  # fmt: skip
        assert words in result.stdout


def test_without_arguments(capsys):
    assert cli.main([]) == 0
    assert "usage: trl-extras COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-extras {trl_extras.__version__}\n"


def test_subcommands_are_the_methods_with_a_script():
    """What the scripts share is none of them."""
    assert (SCRIPTS / "_training.py").is_file()
    assert cli.methods() == METHODS


def test_registered_trainers_are_listed(tmp_path, monkeypatch, capsys):
    info = tmp_path / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trl_extras.trainers]\nloud = loud.trainers:LoudTrainer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cli.main(["--help"])
    assert (
        "apo, apo_spo, spo, spr, loud (loud.trainers:LoudTrainer), or package.module:Class" in capsys.readouterr().out
    )


def test_dispatches_run(capsys):
    assert cli.main(["run", "--trainer", "apo", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "trl-extras run: error: there is no script 'nowhere.py'\n"


def test_dispatches_extrapolate(monkeypatch):
    import types

    seen = []
    module = types.ModuleType("extrapolate")
    module.main = lambda argv: seen.append(argv) or 5
    monkeypatch.setitem(sys.modules, "trl_extras.scripts.extrapolate", module)
    assert cli.main(["extrapolate", "new", "old", "--alpha", "0.3"]) == 5
    assert seen == [["new", "old", "--alpha", "0.3"]]


@pytest.fixture
def launched(monkeypatch):
    """What would be launched, with the YAML file as the processes would read it."""
    from accelerate.commands import launch

    calls = []

    def record(arguments):
        words = arguments.training_script_args
        path = Path(words[words.index("--config") + 1]) if "--config" in words else None
        calls.append((arguments, yaml.safe_load(path.read_text()) if path else None, path))

    monkeypatch.setattr(launch, "launch_command", record)
    return calls


def test_parts_flags(launched):
    words = ["--num_processes", "2", *GIVEN, "--num-machines=1", "--multi_gpu", "--num_rounds", "2"]
    words += [
        "--extrapolation_alpha",
        "0.3",
        "0.4",
        "--max_grad_norm",
        "-1",
        "--main_process_port",
        "2",
        "--mixed_precision=no",
    ]
    assert cli.main(["apo", *words]) == 0
    ((arguments, _, _),) = launched
    assert arguments.training_script == str(SCRIPTS / "apo.py")
    expected = [*GIVEN, "--num_rounds", "2", "--extrapolation_alpha", "0.3", "0.4", "--max_grad_norm", "-1"]
    assert arguments.training_script_args == expected
    assert (arguments.num_processes, arguments.num_machines, arguments.multi_gpu) == (2, 1, True)
    assert (arguments.main_process_port, arguments.mixed_precision) == (2, "no")


def test_parts_yaml(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    ours = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True, "bf16": False, "learning_rate": "1e-6"}
    ours |= {"extrapolation_alpha": [0.3, 0.4], "num_rounds": 2, "env": {"TRL_EXTRAS_TEST": "é"}}
    theirs = {
        "num_processes": 2,
        "multi_gpu": True,
        "use_fsdp": False,
        "accelerate_config": "multi_gpu",
        "rdzv_conf": None,
    }
    recipe.write_text(yaml.safe_dump(ours | theirs))
    try:
        assert cli.main(["apo", "--config", str(recipe), "--num_processes", "4"]) == 0
    finally:
        os.environ.pop("TRL_EXTRAS_TEST", None)
    ((arguments, read, path),) = launched
    assert read == ours
    assert not path.exists()
    assert not path.parent.exists()
    assert arguments.num_processes == 4  # the command line wins
    assert arguments.multi_gpu
    assert not arguments.use_fsdp
    assert arguments.config_file.endswith(os.path.join("accelerate_configs", "multi_gpu.yaml"))
    assert arguments.rdzv_conf == ""
    assert recipe.read_text() == yaml.safe_dump(ours | theirs)


def test_yaml_without_launcher_keys_is_passed_as_it_is(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: m\ndataset_name: d\nuse_cpu: true\nbf16: false\n")
    assert cli.main(["apo", f"--config={recipe}"]) == 0
    assert launched[0][2] == recipe


def test_temporary_file_goes_when_launching_fails(launched, tmp_path, monkeypatch):
    import tempfile

    from accelerate.commands import launch

    def fail(arguments):
        raise subprocess.CalledProcessError(-9, "python")

    monkeypatch.setattr(launch, "launch_command", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: m\ndataset_name: d\nuse_cpu: true\nbf16: false\nnum_processes: 1\n")
    assert cli.main(["apo", "--config", str(recipe)]) == 137
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dpo"], "unknown command 'dpo': known are apo, apo_spo, spo, spr, run, extrapolate"),
        (["apoo"], "did you mean apo?"),
        (["apo-spo"], "did you mean apo_spo?"),
        (["_training"], "unknown command '_training'"),
        (
            ["--vers"],
            "unknown flag '--vers': known are --help, --version (flags cannot be shortened); did you mean --version?",
        ),
    ],
)
def test_unknown_command(capsys, words, says):
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "yaml_text", "says"),
    [
        (["--num_round", "2"], None, "--num_round (flags cannot be shortened); did you mean --num_rounds"),
        (["--num_process", "2"], None, "--num_process (flags cannot be shortened); did you mean --num_processes"),
        (["--extrapolation_alfa=1"], None, "--extrapolation_alfa; did you mean --extrapolation_alpha?"),
        (["--num_rounds", "two"], None, "--num_rounds/--num-rounds: invalid int value: 'two'"),
        (["--num_rounds", "0"], None, "num_rounds"),
        (["--num_processes", "two"], None, "argument --num_processes"),
        (["--num_processes"], None, "--num_processes wants a value"),
        (["--multi_gpu=yes"], None, "--multi_gpu takes no value"),
        (["--module"], None, "--module"),
        (["--accelerate_config", "nowhere"], None, "nowhere"),
        (["--config"], None, "--config wants a file"),
        (["--config", "nowhere.yaml"], None, "nowhere.yaml"),
        (["stray"], None, "stray"),
        ([], "extrapolation_alfa: 1", "does not know extrapolation_alfa; did you mean extrapolation_alpha?"),
        ([], "num_process: 1", "does not know num_process; did you mean num_processes?"),
        ([], "num_processes: two", "argument --num_processes"),
        ([], "multi_gpu: 2", "multi_gpu is a switch"),
        ([], "- apo", "must be a YAML mapping, not list"),
        ([], "apo: [", "cannot read the config file"),
    ],
)
def test_refuses_before_launching(launched, tmp_path, capsys, words, yaml_text, says):
    if yaml_text is not None:
        (tmp_path / "recipe.yaml").write_text(yaml_text + "\n")
        words = [*words, "--config", str(tmp_path / "recipe.yaml")]
    assert cli.main(["apo", *GIVEN, *words]) == 2
    assert not launched
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-extras")]
    assert len(lines) == 1
    assert lines[0].startswith("trl-extras apo: error: ")
    assert says in lines[0]


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("spo", ["--sft_coeff", "1"], "does not know --sft_coeff; did you mean --sft-coef?"),
        ("spo", ["--bilevel", "penalty"], "--bilevel (flags cannot be shortened); did you mean --bilevel-solver?"),
        ("spo", ["--num_rounds", "2"], "does not know --num_rounds"),
        ("spo", ["--extrapolation_alpha", "0.3"], "does not know --extrapolation_alpha"),
        ("spo", ["--hinge", "token"], "argument --hinge: invalid choice: 'token'"),
        ("spo", ["--sft_coef", "-1"], "`sft_coef` is -1.0, but wants a finite number of at least 0"),
        ("spo", ["--inner_steps", "2"], "`bilevel_solver='penalty'` takes no inner steps"),
        ("spo", ["--sft_dataset_split", "train"], "there is no `sft_dataset_name` for it"),
        ("apo", ["--sft_coef", "1"], "does not know --sft_coef"),
        ("apo_spo", ["--sft_tolerence", "1"], "did you mean --sft-tolerance?"),
        ("apo_spo", ["--extrapolation_alfa", "1"], "did you mean --extrapolation-alpha?"),
        ("apo_spo", ["--num_rounds", "0"], "num_rounds"),
        ("spr", ["--reward_temprature", "1"], "did you mean --reward-temperature?"),
        ("spr", ["--reward_temp", "1"], "--reward_temp (flags cannot be shortened); did you mean --reward-temp"),
        ("spr", ["--reward_temperature", "0"], "`reward_temperature` is 0.0, but wants a finite number above 0"),
        ("spr", ["--importance_clip", "some"], "`importance_clip` is 'some', but wants a finite number above 0"),
        ("spr", ["--offline_ratio", "0.5", "2"], "`offline_ratio` is [0.5, 2.0], but wants numbers from 0 to 1"),
        ("spr", ["--packing", "true"], "`packing=True` does not work with SPR"),
        ("spr", ["--beta", "1"], "does not know --beta"),
        ("spr", ["--extrapolation_alpha", "0.3"], "does not know --extrapolation_alpha"),
        ("apo", ["--reward_temperature", "1"], "does not know --reward_temperature"),
    ],
)
def test_each_method_has_its_own_flags(launched, capsys, method, words, says):
    assert cli.main([method, *GIVEN, *words]) == 2
    assert not launched
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-extras")]
    assert len(lines) == 1
    assert lines[0].startswith(f"trl-extras {method}: error: ")
    assert says.replace("-", "_") in lines[0].replace("-", "_")


@pytest.mark.parametrize("method", METHODS)
def test_launches_the_methods_own_script(launched, method):
    assert cli.main([method, *GIVEN]) == 0
    ((arguments, _, _),) = launched
    assert (arguments.training_script, arguments.training_script_args) == (str(SCRIPTS / f"{method}.py"), GIVEN)


@pytest.mark.parametrize(("missing", "says"), [("--dataset_name", "no dataset"), ("--model_name_or_path", "no model")])
def test_refuses_what_is_missing(launched, capsys, missing, says):
    at = GIVEN.index(missing)
    assert cli.main(["apo", *GIVEN[:at], *GIVEN[at + 2 :]]) == 2
    assert not launched
    assert says in capsys.readouterr().err


OWN = {
    "apo": ["APOConfig", "SamplingConfig", "RoundsConfig"],
    "apo_spo": ["APOConfig", "SamplingConfig", "RoundsConfig", "SPOConfig"],
    "spo": ["SPOConfig"],
    "spr": ["SPRConfig", "SamplingConfig", "RoundsConfig"],
}
STOCK = {method: "SFTConfig" if method == "spr" else "DPOConfig" for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_methods_own_flags_first(capsys, method):
    assert cli.main([method, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: trl-extras {method} [--config recipe.yaml] [flags]\n\n")
    headings = re.findall(r"^fields of (\w+):$", out, re.MULTILINE)
    theirs = ["ScriptArguments", "ModelConfig", "DatasetMixtureConfig", STOCK[method], "TrainingArguments"]
    assert headings == [*OWN[method], *theirs]
    sections = dict(zip(headings, re.split(r"^fields of \w+:$", out, flags=re.MULTILINE)[1:], strict=True))
    flags = {name: set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) for name, text in sections.items()}
    assert "model_name_or_path" in flags["ModelConfig"]
    assert ("packing" if method == "spr" else "beta") in flags[STOCK[method]]
    assert "output_dir" in flags["TrainingArguments"]
    if "RoundsConfig" in OWN[method]:
        # Where a class changes a default, or what is said of it, the flag is that class's.
        assert {"num_rounds", "num_train_epochs"} <= flags["SPRConfig" if method == "spr" else "RoundsConfig"]
        assert {"round_epochs", "round_data"} <= flags["RoundsConfig"]
    if "APOConfig" in OWN[method]:
        assert "extrapolation_alpha" in flags["APOConfig"]
    if "SPOConfig" in OWN[method]:
        assert {"sft_coef", "bilevel_solver", "sft_dataset_name"} <= flags["SPOConfig"]
    if method == "spr":
        own = {"reward_temperature", "importance_clip", "offline_ratio", "num_generations", "temperature", "top_p"}
        assert own <= flags["SPRConfig"]
        assert "reward_funcs" in flags["SamplingConfig"]
    # Nothing is lost.
    from trl_extras.run import option_actions
    from trl_extras.scripts import apo, apo_spo, spo, spr

    parser = {"apo": apo, "apo_spo": apo_spo, "spo": spo, "spr": spr}[method].make_parser()
    known = {flag.removeprefix("--") for flag in option_actions(parser) if flag.startswith("--") and flag != "--help"}
    shown = set(re.findall(r"--([\w-]+)", out))
    assert known <= shown


@pytest.mark.parametrize("method", METHODS)
def test_end_to_end(run_tiny, tmp_path, monkeypatch, method):  # noqa: F811
    """Both kinds of keys in one file; the launched script saves a model."""
    import tempfile

    model, data = run_tiny
    keys = {
        "num_processes": 1,
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
    }
    if "RoundsConfig" in OWN[method]:
        keys["num_rounds"] = 2
    if method == "spr":
        # The pairs are offline responses, and scored like those that are sampled beside them.
        (tmp_path / "reward.py").write_text("def count(completions, **kwargs):\n    return [*map(len, completions)]\n")
        keys |= {"reward_funcs": f"{tmp_path / 'reward.py'}:count", "num_generations": 2, "max_completion_length": 4}
    if "SPOConfig" in OWN[method]:
        keys |= {"sft_dataset_name": str(write_sft(tmp_path)), "sft_coef": 0.5, "sft_optimum": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    words = [method, "--config", str(recipe), "--output_dir", str(tmp_path / "out"), "--max_length", "16"]
    assert cli.main(words) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("rounds of" in card) == ("RoundsConfig" in OWN[method])
    assert ("Stable Preference Optimization" in card) == ("SPOConfig" in OWN[method])
    assert ("policy re-weighting" in card) == (method == "spr")
    assert str(tmp_path) not in card
    assert not list(temporary.glob("trl-extras-*"))
