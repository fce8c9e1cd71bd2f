import argparse
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trl_extras import run


TESTS_ENV = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CI": "1"}

# A trainer that weighs nothing: what the launcher does can be seen without training.
PLUGIN = """
from dataclasses import dataclass, field

from trl import DPOConfig, DPOTrainer

MADE = []


@dataclass
class LoudConfig(DPOConfig):
    loudness: int = 1
    echoes: list[float] = field(default_factory=lambda: [0.5])

    def __post_init__(self):
        super().__post_init__()
        if self.loudness < 0:
            raise ValueError(f"loudness must not be negative,\\n    got {self.loudness}")


class LoudTrainer(DPOTrainer):
    config_class = LoudConfig

    def __init__(self, *args, **kwargs):
        MADE.append((args, kwargs))
"""

LOUD = "run_plugin:LoudTrainer"

STOCK_SCRIPT = """
    from trl import DPOConfig, DPOTrainer, TrlParser

    if __name__ == "__main__":
        (args,) = TrlParser(DPOConfig).parse_args_and_config(fail_with_unknown_args=False)
        trainer = DPOTrainer(args=args)
        print(type(trainer).__name__, type(args).__name__, args.loudness, args.echoes)
"""


@pytest.fixture(scope="module")
def run_plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "run_plugin.py").write_text(PLUGIN)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("run_plugin")
    sys.path.remove(str(folder))
    del sys.modules["run_plugin"]


class Launcher:
    def __init__(self, folder, capfd, plugin):
        self.folder, self.capfd, self.plugin = folder, capfd, plugin
        self.err = self.out = ""

    def write(self, name, text):
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    def __call__(self, script, *arguments, trainer=LOUD):
        """Run a script's text, or a file, in this process; returns the exit status."""
        path = script if script.endswith(".py") else self.write("script.py", script)
        self.capfd.readouterr()
        try:
            return run.main(["--trainer", trainer, path, *map(str, arguments)])
        finally:
            self.out, self.err = self.capfd.readouterr()

    @property
    def errors(self):
        """The lines of stderr that this program wrote, without the one that says what was swapped."""
        return [line for line in self.err.splitlines() if line.startswith("trl-extras run:")]

    def refuses(self, script, *arguments, says, status=2):
        """Assert one line that says why, no traceback, a bad exit status and nothing trained."""
        assert self(script, *arguments) == status, self.err
        assert "Traceback" not in self.err
        assert len(self.errors) == 1, self.err
        assert self.errors[0].startswith("trl-extras run: error: ")
        for words in [says] if isinstance(says, str) else says:
            assert words in self.errors[0]


@pytest.fixture
def launch(tmp_path, capfd, run_plugin, monkeypatch):
    """The launcher in this process; afterwards everything must be as it was."""
    import transformers
    import trl

    monkeypatch.delenv("RANK", raising=False)
    run_plugin.MADE.clear()
    before = snapshot(trl, transformers)
    yield Launcher(tmp_path, capfd, run_plugin)
    assert snapshot(trl, transformers) == before


def snapshot(trl, transformers):
    from trl.trainer import dpo_config, dpo_trainer

    parsers = (argparse.ArgumentParser, transformers.HfArgumentParser, *trl.TrlParser.__mro__)
    return [
        *(trl.DPOTrainer, trl.DPOConfig, trl.trainer.DPOTrainer, trl.trainer.DPOConfig),
        *(dpo_trainer.DPOTrainer, dpo_trainer.DPOConfig, dpo_config.DPOConfig),
        *(value for parser in parsers for value in vars(parser).values() if callable(value)),
        *(sys.argv, list(sys.path), sys.modules["__main__"], vars(sys.modules["run_plugin"].LoudTrainer)["__init__"]),
        *(run._watch, argparse.ArgumentParser().allow_abbrev),
    ]


# --- What it does ----------------------------------------------------------------------------------------------------


def test_swaps_and_says_so(launch):
    status = launch(STOCK_SCRIPT, "--use_cpu", "--bf16", "False", "--loudness", "7", "--echoes", "0.1", "0.2")
    assert status == 0, launch.err
    assert launch.out == "LoudTrainer LoudConfig 7 [0.1, 0.2]\n"
    path = launch.folder / "script.py"
    said = [line for line in launch.err.splitlines() if line.startswith("trl-extras")]
    assert said == [f"trl-extras: DPOTrainer -> run_plugin.LoudTrainer, DPOConfig -> run_plugin.LoudConfig in {path}"]


@pytest.mark.parametrize(
    "imports",
    [
        "from trl import DPOConfig, DPOTrainer",
        "from trl.trainer import DPOConfig, DPOTrainer",
        "from trl.trainer.dpo_trainer import DPOTrainer; from trl.trainer.dpo_config import DPOConfig",
        "from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer",
        "import trl; DPOConfig, DPOTrainer = trl.DPOConfig, trl.DPOTrainer",
        "import trl.trainer.dpo_trainer as d; DPOConfig, DPOTrainer = d.DPOConfig, d.DPOTrainer",
    ],
)
def test_every_way_to_import(launch, imports):
    assert launch(f"{imports}\nDPOTrainer(args=DPOConfig(use_cpu=True, bf16=False))\n") == 0, launch.err
    ((_, made),) = launch.plugin.MADE
    assert type(made["args"]) is launch.plugin.LoudConfig


def test_subclass_in_the_script(launch):
    assert launch("from trl import DPOTrainer\nclass Mine(DPOTrainer):\n    pass\nMine()\n") == 0, launch.err
    assert len(launch.plugin.MADE) == 1


def test_yaml_and_the_scripts_own_dataclass(launch):
    """Postponed annotations are looked up in `sys.modules["__main__"]`, which must be the script."""
    config = launch.write("x.yaml", "loudness: 3\nechoes: 0.25\ncolour: red\nuse_cpu: true\nbf16: false\n")
    status = launch(
        """
        from __future__ import annotations

        import sys
        from dataclasses import dataclass

        from trl import DPOConfig, DPOTrainer, TrlParser


        @dataclass
        class Mine:
            colour: str | None = None
            sizes: list[int] | None = None


        if __name__ == "__main__":
            mine, args = TrlParser((Mine, DPOConfig)).parse_args_and_config(fail_with_unknown_args=False)
            DPOTrainer(args=args)
            print(mine.colour, mine.sizes, args.loudness, args.echoes, Mine.__module__)
            print(sys.modules["__main__"].Mine is Mine)
        """,
        *("--config", config, "--sizes", "1", "2"),
    )
    assert status == 0, launch.err
    assert launch.out == "red [1, 2] 3 0.25 __main__\nTrue\n"


def test_looks_like_a_python_script(launch):
    launch.write("neighbour.py", "WORD = 'found'\n")
    status = launch(
        """
        import sys, neighbour
        from trl import DPOTrainer
        print(neighbour.WORD, sys.argv[1:], sys.argv[0] == __file__, __name__)
        DPOTrainer()
        """,
        *("a", "-0.3", "--", "--trainer"),
    )
    sys.modules.pop("neighbour")
    assert status == 0, launch.err
    assert launch.out == "found ['a', '-0.3', '--', '--trainer'] True __main__\n"


def test_plain_argparse(launch):
    script = """
        import argparse
        from trl import DPOConfig, DPOTrainer
        parser = argparse.ArgumentParser()
        parser.add_argument("--learning-rate", type=float, default=1.0)
        args = parser.parse_args()
        DPOTrainer(args=DPOConfig(learning_rate=args.learning_rate, use_cpu=True, bf16=False))
    """
    assert launch(script, "--learning-rate", "0.5") == 0, launch.err
    assert launch.plugin.MADE[0][1]["args"].learning_rate == 0.5
    launch.refuses(
        script, "--learning", "0.5", says="--learning (flags cannot be shortened); did you mean --learning-rate"
    )
    launch.refuses(script, "--batch", "0.5", says="script.py does not know --batch")


def test_two_step_parsing(launch):
    """What one parser leaves to the next was read."""
    script = """
        import argparse
        from transformers import HfArgumentParser
        from trl import DPOConfig, DPOTrainer
        parser = argparse.ArgumentParser()
        parser.add_argument("--colour")
        mine, rest = parser.parse_known_args()
        parsed = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(rest, return_remaining_strings=True)
        DPOTrainer(args=parsed[0])
    """
    cpu = ("--use_cpu", "--bf16", "False")
    assert launch(script, "--colour", "red", "--loudness", "2", *cpu) == 0, launch.err
    launch.plugin.MADE.clear()
    launch.refuses(script, "--color", "red", "--loudness=2", *cpu, says="--color; did you mean --colour")
    assert not launch.plugin.MADE  # before any weights were loaded


def test_transformers_parser(launch):
    """A class of its own, not the one that TRL's parser derives from."""
    script = """
        from transformers import HfArgumentParser
        from trl import DPOConfig, DPOTrainer
        (args,) = HfArgumentParser((DPOConfig,)).parse_args_into_dataclasses()
        DPOTrainer(args=args)
    """
    cpu = ("--use_cpu", "--bf16", "False")
    assert launch(script, "--loudness", "2", *cpu) == 0, launch.err
    launch.refuses(
        script, "--loudnes", "2", *cpu, says="--loudnes (flags cannot be shortened); did you mean --loudness"
    )
    launch.refuses(script, "--volume", "2", *cpu, says="script.py does not know --volume")
    launch.refuses(script, "--loudness", "-2", *cpu, says="loudness must not be negative, got -2")
    assert len(launch.plugin.MADE) == 1


def test_dict_and_file_configs(launch):
    script = """
        import sys
        from transformers import HfArgumentParser
        from trl import DPOConfig, DPOTrainer
        (args,) = HfArgumentParser(DPOConfig).parse_json_file(sys.argv[1], allow_extra_keys=True)
        DPOTrainer(args=args)
    """
    config = {"use_cpu": True, "bf16": False, "loudness": 2}
    assert launch(script, launch.write("good.json", json.dumps(config))) == 0, launch.err
    launch.plugin.MADE.clear()
    bad = launch.write("bad.json", json.dumps({**config, "loudnes": 2}))
    launch.refuses(script, bad, says="loudnes; did you mean loudness")
    assert not launch.plugin.MADE
    strict = script.replace(", allow_extra_keys=True", "").replace("json_file", "yaml_file")
    launch.refuses(strict, launch.write("bad.yaml", json.dumps({**config, "loudnes": 2})), says="loudnes; did you")


def test_help_is_not_a_failure(launch):
    with pytest.raises(SystemExit) as leaving:
        launch(STOCK_SCRIPT, "--help")
    assert not leaving.value.code
    assert "--loudness" in launch.out


def test_own_errors_and_exit_codes_pass(launch):
    with pytest.raises(ZeroDivisionError) as caught:
        launch("import trl\n1 / 0\n")
    assert caught.traceback[-1].path == launch.folder / "script.py"
    for code in (3, "a message"):
        with pytest.raises(SystemExit) as leaving:
            launch(f"import sys\nsys.exit({code!r})\n")
        assert leaving.value.code == code
    with pytest.raises(KeyboardInterrupt):
        launch("raise KeyboardInterrupt\n")
    with pytest.raises(SystemExit) as leaving:
        launch("import sys\nfrom trl import DPOTrainer\nDPOTrainer()\nsys.exit(0)\n")
    assert leaving.value.code == 0


def test_names_nobody_has_asked_for_yet(launch):
    """TRL's packages fill in their names when first asked: they must not keep the swapped ones."""
    import trl

    for package in (trl, trl.trainer):
        for name in ("DPOTrainer", "DPOConfig"):
            vars(package).pop(name)
    assert launch(STOCK_SCRIPT, "--use_cpu", "--bf16", "False") == 0, launch.err


def test_stock_config_made_by_hand(launch):
    """`DPOTrainer()` without arguments makes its config from the swapped class too."""
    from trl.trainer import dpo_trainer

    script = "import trl.trainer.dpo_trainer as d\nprint(d.DPOConfig.__name__)\nd.DPOTrainer()\n"
    assert launch(script) == 0
    assert launch.out == "LoudConfig\n"
    assert dpo_trainer.DPOConfig.__name__ == "DPOConfig"


# --- What it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "import trl\n",
        "from trl import DPOTrainer, SFTTrainer\n",
        "import sys\nsys.exit()\n",
        "import sys\nsys.exit(0)\n",
        "from trl import DPOTrainer\nclass Mine(DPOTrainer):\n    def __init__(self):\n        pass\nMine()\n",
    ],
)
def test_never_used(launch, script):
    says = "script.py ended without using DPOTrainer, so nothing was trained with run_plugin:LoudTrainer"
    launch.refuses(script, says=says, status=1)


def test_fork_counts_as_used(launch):
    """As with accelerate's `notebook_launcher`, which trains in forked processes."""
    script = """
        import os
        from trl import DPOTrainer

        pid = os.fork()
        if not pid:
            DPOTrainer()
            os._exit(0)
        os.waitpid(pid, 0)
    """
    assert launch(script) == 0, launch.err


@pytest.fixture
def stock_dpo():
    import trl.scripts

    return str(Path(trl.scripts.__file__).parent / "dpo.py")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--loudnes", "2"], "dpo.py does not know --loudnes (flags cannot be shortened); did you mean --loudness?"),
        (["--laudness=2"], "dpo.py does not know --laudness; did you mean --loudness?"),
        (["--num_train_epoch", "2"], "did you mean --num_train_epochs?"),
        (["--zzz"], "dpo.py does not know --zzz"),
        (["--loudness", "soft"], "argument --loudness: invalid int value: 'soft'"),
        (["--loudness", "-1"], "error: loudness must not be negative, got -1"),
        (["--loudness", "-1", "--laudness", "2"], "--laudness; did you mean"),
        (["--config=x.yaml"], "two words: --config FILE"),
        (["--config"], "--config wants a file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_flags_of_the_stock_script(launch, stock_dpo, arguments, says):
    launch.refuses(stock_dpo, "--use_cpu", "--bf16", "False", *arguments, says=says)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("laudness: 2", "dpo.py does not know laudness; did you mean loudness?"),
        ("num_processes: 2", "dpo.py does not know num_processes"),
        ("loudness: -2", "loudness must not be negative, got -2"),
        ("- loudness", "must contain a YAML mapping"),
        ("loudness: [", "not valid YAML"),
    ],
)
def test_keys_of_the_stock_script(launch, stock_dpo, yaml, says):
    config = launch.write("recipe.yaml", yaml if yaml[0] == "-" else f"use_cpu: true\nbf16: false\n{yaml}\n")
    launch.refuses(stock_dpo, "--config", config, says=says)


def test_keys_returned_to_the_script(launch):
    script = """
        from trl import DPOConfig, DPOTrainer, TrlParser
        args, rest = TrlParser(DPOConfig).parse_args_and_config(return_remaining_strings=True)
        DPOTrainer(args=args)
    """
    config = launch.write("recipe.yaml", "use_cpu: true\nbf16: false\nlaudness: 2\n")
    launch.refuses(script, "--config", config, says="--laudness; did you mean --loudness")
    assert not launch.plugin.MADE


def test_swallowed_flag_error(launch):
    """Read by nobody stays read by nobody."""
    script = """
        from trl import DPOConfig, DPOTrainer, TrlParser
        try:
            TrlParser(DPOConfig).parse_args_and_config()
        except SystemExit:
            pass
        DPOTrainer(args=None)
    """
    launch.refuses(script, "--laudness", "2", says="--laudness")
    assert not launch.plugin.MADE


def test_missing_required_flag_names_the_misspelt_one(launch):
    script = """
        import argparse
        from trl import DPOTrainer
        parser = argparse.ArgumentParser()
        parser.add_argument("--colour", required=True)
        parser.parse_args()
    """
    launch.refuses(script, says="the following arguments are required: --colour")
    launch.refuses(script, "--colur", "red", says="--colur; did you mean --colour")


CHILDREN = [
    "subprocess.run([sys.executable, 'train.py'])",
    "subprocess.Popen(['python', 'train.py'])",
    "subprocess.call('cd /tmp && python3.11 train.py | tee log', shell=True)",
    "subprocess.check_output(['trl', 'dpo', '--config', 'x.yaml'])",
    "subprocess.run(['accelerate', 'launch', 'train.py'])",
    "subprocess.run(['torchrun', '--nproc_per_node', '2', 'train.py'])",
    "subprocess.run(['deepspeed', 'train.py'])",
    "subprocess.run(['env', 'A=1', 'python', 'train.py'])",
    "subprocess.run(['nohup', 'bash', '-lc', 'A=1 python train.py'])",
    "subprocess.run(['train'], executable=sys.executable)",
    "os.system('python train.py')",
    "os.system('echo `python train.py`; echo \"$(python train.py)\"')",
    "os.system('if true; then accelerate launch train.py; fi')",
    "os.popen('torchrun train.py')",
    "os.posix_spawn(sys.executable, ['python', 'train.py'], {})",
    "os.execv(sys.executable, ['python', 'train.py'])",
    "os.execlp('accelerate', 'accelerate', 'launch', 'train.py')",
    "subprocess.run([os.path.join(HERE, 'train')])",
    "subprocess.run(['sh', os.path.join(HERE, 'train.sh')])",
    "subprocess.run([sys.executable, '-m', 'torch.distributed.run', 'train.py'])",
    "subprocess.run([sys.executable, '-c', 'import trl'])",
]


def write_children(folder):
    (folder / "train").write_text("#!/usr/bin/env python\nimport trl\n")
    (folder / "train.sh").write_text("# trains\nset -e\nA=1 python train.py --x 1\n")
    for name in ("train", "train.sh"):
        os.chmod(folder / name, 0o755)


@pytest.mark.parametrize("child", CHILDREN)
def test_python_children(launch, child):
    write_children(launch.folder)
    imports = "import os, subprocess, sys\nfrom trl import DPOTrainer\nHERE = os.path.dirname(__file__)\n"
    script = f"{imports}DPOTrainer()\n{child}\n"
    says = [
        "script.py would start another Python process, in which DPOTrainer is not swapped: ",
        "--trainer run_plugin",
    ]
    launch.refuses(script, says=says, status=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "catch",
    [
        "try:\n    {child}\nexcept Exception:\n    pass\nDPOTrainer()",
        "try:\n    {child}\nexcept BaseException:\n    pass\nDPOTrainer()",
        "DPOTrainer()\ntry:\n    {child}\nexcept BaseException:\n    pass",
        "DPOTrainer()\ntry:\n    {child}\nexcept BaseException as e:\n    raise RuntimeError('failed') from e",
        "DPOTrainer()\ntry:\n    {child}\nexcept BaseException:\n    sys.exit(7)",
        "DPOTrainer()\nimport threading\nt = threading.Thread(target=lambda: {child})\nt.start(); t.join()",
        "DPOTrainer()\nif not os.fork():\n    try:\n        {child}\n    finally:\n        os._exit(0)\nos.wait()",
    ],
)
def test_swallowing_does_not_help(launch, catch):
    child = "subprocess.run([sys.executable, 'train.py'])"
    script = f"import os, subprocess, sys\nfrom trl import DPOTrainer\n{catch.format(child=child)}\n"
    launch.refuses(script, says="would start another Python process", status=1)
    assert len(launch.plugin.MADE) == (0 if catch.endswith("DPOTrainer()") else 1)


def test_spawn_forks_first(launch):
    spawn = "os.spawnv(os.P_WAIT, sys.executable, ['python', 'train.py'])"
    script = f"import os, sys\nfrom trl import DPOTrainer\nDPOTrainer()\n{spawn}\n"
    launch.refuses(script, says="would start another Python process", status=1)


def test_a_worker_sees_an_error(launch):
    """An exit would take a pool's worker away and leave its parent waiting for ever."""
    script = """
        import os, subprocess, sys
        from trl import DPOTrainer

        DPOTrainer()
        pid = os.fork()
        if not pid:
            try:
                subprocess.run([sys.executable, "train.py"])
            except Exception:
                os._exit(42)
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    launch.refuses(script, says="would start another Python process", status=1)
    assert launch.out == "42\n"


def test_other_children_are_fine(launch):
    (launch.folder / "harmless.sh").write_text("# python train.py\necho python\n")
    script = """
        import os, subprocess, sys
        from trl import DPOTrainer
        for command in (
            ["git", "--version"],
            ["sh", "-c", "echo python train.py; ls /usr/bin/python* 2>/dev/null; true"],
            ["sh", os.path.join(os.path.dirname(__file__), "harmless.sh")],
            [sys.executable, "--version"],
        ):
            subprocess.run(command, stdout=subprocess.DEVNULL)
        os.system("uname > /dev/null")
        DPOTrainer()
    """
    assert launch(script) == 0, launch.err
    # Nothing is watched once the run is over.
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.parametrize(
    "words",
    [
        [
            "python",
            "-c",
            "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)",
            "--multiprocessing-fork",
        ],
        ["python", "-E", "-X", "dev", "-c", "from multiprocessing.resource_tracker import main;main(5)"],
        ["python", "-c", "from multiprocess.forkserver import main; main(5)"],
        ["python", "/x/site-packages/torch/_inductor/compile_worker/__main__.py", "--workers=2"],
        ["python", "-m", "torch._inductor.compile_worker", "--workers=2"],
        ["python", "-m", "joblib.externals.loky.backend.popen_loky_posix"],
        ["python", "-m", "pip", "install", "x"],
        ["gcc", "--version"],
        ["/usr/bin/ninja", "-v"],
        ["nvidia-smi"],
        ["lscpu"],
        ["which", "python"],
        ["sh", "-c", "ldconfig -p | grep python"],
    ],
)
def test_workers_and_tools_by_name(words):
    assert not run._unswapped(words[0], words)


def test_workers_for_real(launch):
    """Dataset and dataloader workers, spawned ones too, which are started like any Python child."""
    script = """
        def double(row):
            return {"x": row["x"] * 2}

        if __name__ == "__main__":  # the imports too: a spawned worker runs what is above
            from datasets import Dataset
            from torch.utils.data import DataLoader
            from trl import DPOTrainer

            rows = Dataset.from_dict({"x": list(range(8))}).map(double, num_proc=2)
            forked = DataLoader(rows.with_format("torch"), batch_size=4, num_workers=2)
            spawned = DataLoader(list(range(4)), batch_size=4, num_workers=1, multiprocessing_context="spawn")
            print(sum(int(batch["x"].sum()) for batch in forked), [batch.tolist() for batch in spawned])
            DPOTrainer()
    """
    assert launch(script) == 0, launch.err
    assert launch.out.splitlines()[-1] == "56 [[0, 1, 2, 3]]"


def test_helper_libraries_may_start_theirs(launch, monkeypatch):
    """A tracker's service or a compiler's worker is not the script's doing; torch's launcher is."""
    launch.write("wandb.py", "import subprocess, sys\ndef start():\n    subprocess.run([sys.executable, '-c', ''])\n")
    script = "import wandb\nfrom trl import DPOTrainer\nDPOTrainer()\nwandb.start()\n"
    assert launch(script) == 0, launch.err
    sys.modules.pop("wandb")
    launch.write("other_library.py", (launch.folder / "wandb.py").read_text())
    launch.refuses(script.replace("wandb", "other_library"), says="another Python process", status=1)
    sys.modules.pop("other_library")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trainer", "apoo", "SCRIPT"], "unknown trainer 'apoo': known are apo, apo_spo, spo, "),
        (["--trainer=no_such_module:Trainer", "SCRIPT"], "there is no module 'no_such_module'"),
        (["--trainer", "apo", "nowhere.py"], "there is no script 'nowhere.py'"),
        (["--trainer", "apo", "dpo.py"], "there is no script 'dpo.py'; TRL's own is trl:dpo"),
        (["--trainer", "apo", "trl:dop"], "no script 'trl:dop'; of TRL's own there are trl:distillation, trl:dpo, "),
        (["--trainer", "apo"], "the script is missing"),
        (["SCRIPT"], "--trainer NAME is missing before the script; known are apo, apo_spo, spo"),
        (["SCRIPT", "--trainer", "apo"], "--trainer NAME is missing before the script"),
        (["--trainer"], "--trainer wants a name"),
        (["--train", "apo", "SCRIPT"], "unknown flag --train before the script (flags cannot be shortened)"),
        ([], "--trainer NAME is missing"),
    ],
)
def test_command_line(tmp_path, capsys, arguments, says):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('must not run')\n")
    assert run.main([str(script) if word == "SCRIPT" else word for word in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trl-extras run: error: ")
    assert err.count("\n") == 1
    assert says in err


def test_help(capsys):
    assert run.main(["--help"]) == 0
    assert "apo, apo_spo, spo, spr, or package.module:Class" in capsys.readouterr().out


def test_entry_point_by_name(launch):
    info = launch.folder / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trl_extras.trainers]\nloud = run_plugin:LoudTrainer\n")
    sys.path.insert(0, str(launch.folder))
    try:
        assert launch("from trl import DPOTrainer\nDPOTrainer()\n", trainer="loud") == 0, launch.err
    finally:
        sys.path.remove(str(launch.folder))
    assert len(launch.plugin.MADE) == 1


# --- Other processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_tiny(tmp_path_factory):
    """A two-layer Llama with a tokenizer of words, and a folder of preferences; returns both paths."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(57))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w{i + 2}", "rejected": f" w{i + 3}"} for i in range(8)]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "model", folder / "data"


def environment(folder):
    return {**os.environ, **TESTS_ENV, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}


def write_sft(folder):
    """A dataset of text to keep, in a folder."""
    path = folder / "kept"
    path.mkdir()
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(6)]
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture
def run_stock(run_tiny, tmp_path):
    """TRL's own dpo.py in another process: `run_stock("spo", "--sft_coef", "1", ...)`, with what every run takes."""
    model, data = run_tiny
    recipe = tmp_path / "recipe.yaml"
    keys = f"model_name_or_path: {model}\ndataset_name: {data}\nuse_cpu: true\nbf16: false\nlearning_rate: 1.0e-2\n"
    recipe.write_text(f"{keys}per_device_train_batch_size: 4\nreport_to: none\nsave_strategy: 'no'\n")

    def run_stock(trainer, *words, yaml=""):
        if yaml:
            recipe.write_text(recipe.read_text() + yaml)
        command = [sys.executable, "-m", "trl_extras.run", f"--trainer={trainer}", "trl:dpo", "--config", str(recipe)]
        command += ["--output_dir", str(tmp_path / "out"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path))

    return run_stock


@pytest.mark.parametrize(
    ("trainer", "classes", "yaml", "words", "fields"),
    [
        (
            "apo", "apo.APO", "extrapolation_alpha: 0.4\n", "--num_rounds 2",
            {"num_rounds": 2, "extrapolation_alpha": [0.4]},
        ),
        (
            "spo", "spo.SPO", "sft_optimum: 1\nlogging_steps: 1\n",
            "--sft_dataset_name kept --sft_coef 0.5 --hinge batch --gradient_accumulation_steps 2",
            {"sft_coef": 0.5, "sft_optimum": "1.0", "hinge": "batch", "sft_dataset_name": "kept"},
        ),
        (
            "apo_spo", "apo_spo.APOSPO", "extrapolation_alpha: [0.4]\nlower_level: sft_dataset\n",
            "--num_rounds 2 --sft_dataset_name kept --logging_steps 1",
            {"num_rounds": 2, "extrapolation_alpha": [0.4], "lower_level": "sft_dataset"},
        ),
    ],
)  # fmt: skip
def test_unmodified_stock_script_end_to_end(
    run_stock, run_tiny, stock_dpo, tmp_path, trainer, classes, yaml, words, fields
):
    """TRL's own dpo.py with settings, and a dataset of supervised rows, from both a file and the command line."""
    import torch
    from safetensors.torch import load_file

    write_sft(tmp_path)
    result = run_stock(trainer, *words.split(), yaml=yaml)
    assert result.returncode == 0, result.stderr[-4000:]
    swap = f"DPOTrainer -> trl_extras.{classes}Trainer, DPOConfig -> trl_extras.{classes}Config"
    assert f"trl-extras: {swap} in {stock_dpo}" in result.stderr.splitlines()
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert type(args).__name__ == f"{classes.partition('.')[2]}Config"
    assert {name: getattr(args, name) for name in fields} == fields
    before = load_file(run_tiny[0] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    # The SFT rows were not only named, but kept.
    assert ("'spo/gap_sft'" in result.stdout) == (trainer != "apo")
    assert ("'spo/gap_chosen'" in result.stdout) == (trainer == "spo")


def test_an_adapter_in_the_unmodified_stock_script(run_stock, run_tiny, tmp_path):
    """TRL's own flags for LoRA: an adapter a round, and one adapter of their sum that plain peft loads."""
    import json

    from peft import AutoPeftModelForCausalLM

    flags = "--use_peft --lora_r 2 --lora_alpha 6 --lora_target_modules q_proj v_proj --num_rounds 3"
    result = run_stock("apo", *flags.split())
    assert result.returncode == 0, result.stderr[-4000:]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
    assert len((tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    ("trainer", "words", "says"),
    [
        ("spo", ["--sft_tolerence", "0.1"], "dpo.py does not know --sft_tolerence; did you mean --sft-tolerance?"),
        ("spo", ["--num_rounds", "2"], "dpo.py does not know --num_rounds"),
        ("spo", ["--inner_steps", "2"], "`bilevel_solver='penalty'` takes no inner steps"),
        ("spo", ["--lower_level", "both"], "`lower_level` is 'both', but there is no SFT dataset"),
        ("spo", ["--sft_dataset_name", "nowhere"], "`sft_dataset_name` ('nowhere'), split 'train', cannot be loaded"),
        ("apo_spo", ["--extrapolation_alfa", "1"], "did you mean --extrapolation-alpha?"),
        ("apo_spo", ["--ld_alpha", "0.5"], "`ld_alpha` is 0.5"),
    ],
)
def test_methods_refuse_in_the_stock_script(launch, stock_dpo, run_tiny, monkeypatch, trainer, words, says):
    model, data = run_tiny
    monkeypatch.chdir(launch.folder)
    given = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--use_cpu", "--bf16", "False"]
    status = launch(stock_dpo, *given, "--output_dir", "out", "--report_to", "none", *words, trainer=trainer)
    assert status == 2, launch.err
    assert "Traceback" not in launch.err
    assert len(launch.errors) == 1, launch.err
    assert says.replace("-", "_") in launch.errors[0].replace("-", "_")
    assert not (launch.folder / "out").exists()


def test_two_processes(tmp_path, run_plugin):
    """The swap is announced once, and a failure is a failure of every process."""
    script = tmp_path / "script.py"
    # Each waits for the other: the first one to fail would have it ended.
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, time
            from trl import DPOTrainer

            here = pathlib.Path(__file__).parent
            (here / f"rank{os.environ['RANK']}").write_text(DPOTrainer.__name__)
            while len(list(here.glob("rank*"))) < 2:
                time.sleep(0.1)
            """
        )
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    result = subprocess.run(
        [*torchrun, "-m", "trl_extras.run", "--trainer", LOUD, str(script)],
        **{
            "capture_output": True,
            "text": True,
            "cwd": Path(run_plugin.__file__).parent,
            "env": environment(tmp_path),
        },
    )
    assert result.returncode != 0
    assert result.stderr.count("trl-extras: DPOTrainer -> run_plugin.LoudTrainer") == 1
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["LoudTrainer"] * 2
    assert "trl-extras run: error: script.py ended without using DPOTrainer" in result.stderr
    assert "Traceback" not in result.stderr.split("script.py ended without")[0]
