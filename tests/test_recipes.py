"""Every recipe is read by the parser that `trl-extras` uses: no key that nobody knows, no value of a wrong kind."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_extras import cli
from trl_extras.apo import APOConfig
from trl_extras.run import Ledger, UserError, option_actions
from trl_extras.scripts import apo


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ACCELERATE = RECIPES / "accelerate_configs"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if ACCELERATE not in path.parents)
# A recipe for a GPU is read on a machine that has none.
ANY_MACHINE = ("--use_cpu", "true", "--bf16", "false", "--fp16", "false")


def read(recipe: Path, *flags: str) -> tuple[tuple[Any, ...], argparse.Namespace]:
    """What the script gets and what `accelerate launch` gets of `trl-extras apo --config RECIPE FLAGS`."""
    error = Ledger("trl-extras apo", "trl-extras apo")
    script = option_actions(apo.make_parser())
    launcher_parser, launcher = cli._launcher_options(error)
    ours, theirs = cli._split_words(["--config", str(recipe), *flags, *ANY_MACHINE], script, launcher, error)
    with cli._without_launcher_keys(ours, theirs, script, launcher, error) as ours:
        arguments = apo.parse_arguments(ours)
    words = [word for group in theirs.values() for word in group]
    return arguments, launcher_parser.parse_args([*words, "script.py"])


@pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe(recipe: Path, tmp_path: Path) -> None:
    arguments, _ = read(recipe)
    assert [type(part) for part in arguments] == [ScriptArguments, APOConfig, ModelConfig, DatasetMixtureConfig]
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    # Every key arrives, in one of the four or at the launcher.
    script_keys = {key: value for key, value in content.items() if any(hasattr(part, key) for part in arguments)}
    for key, value in script_keys.items():
        found = next(getattr(part, key) for part in arguments if hasattr(part, key))
        found = getattr(found, "value", found)
        if key not in ("use_cpu", "bf16", "fp16", "report_to"):
            assert found == value or found == [value], key
    # The check has teeth: one letter more and it is refused.
    key = next(iter(script_keys))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({**content, f"{key}s": content[key]}), encoding="utf-8")
    with pytest.raises(UserError, match=f"{key}s"):
        read(wrong)


def test_the_published_run() -> None:
    """The settings of arXiv 2410.06293, section 5 and appendix F.1."""
    (script, config, model, _), launch = read(RECIPES / "apo/mistral-7b-ultrafeedback.yaml", "--num_processes", "8")
    assert model.model_name_or_path == "mistralai/Mistral-7B-Instruct-v0.2"
    assert script.dataset_name == "trl-lib/ultrafeedback-prompt"
    sampling = (config.num_generations, config.temperature, config.top_p, config.max_completion_length)
    assert sampling == (5, 0.7, 0.9, 2048)
    assert (config.num_rounds, config.extrapolation_alpha, config.round_data) == (3, [0.3], "split")
    assert (config.round_beta, config.epochs_of_rounds()) == ([0.01, 0.1, 1.0], [1, 1, 4])
    assert (config.momentum_from, config.output_policy, config.loss_type) == (
        "previous_iterate", "iterate", ["sigmoid"],
    )  # fmt: skip
    assert (config.optim, config.learning_rate, config.lr_scheduler_type) == ("rmsprop", 5e-7, "linear")
    assert config.warmup_steps == 0.1
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * launch.num_processes == 64


def test_the_quickstart_as_a_recipe() -> None:
    """The same settings as run.sh, and a reward that is there."""
    pytest.importorskip("rich")
    sys.path.insert(0, str(RECIPES / "quickstart"))
    quickstart = importlib.import_module("quickstart")
    (_, config, _, _), _ = read(RECIPES / "quickstart/apo.yaml")
    defaults = quickstart.DEFAULTS
    assert (config.num_rounds, config.extrapolation_alpha) == (defaults["rounds"], [defaults["alpha"]])
    assert (config.prompts_per_round, config.learning_rate) == (defaults["prompts"], defaults["learning_rate"])
    assert (config.beta, config.per_device_train_batch_size) == (defaults["beta"], defaults["batch_size"])
    assert (config.num_generations, config.generation_batch_size) == (
        quickstart.NUM_GENERATIONS, quickstart.GENERATION_BATCH_SIZE,
    )  # fmt: skip
    assert (config.temperature, config.top_p) == (quickstart.TEMPERATURE, quickstart.TOP_P)
    assert config.max_completion_length == quickstart.MAX_NEW_TOKENS
    file, _, function = config.reward_funcs[0].partition(":")
    assert f"def {function}(" in (RECIPES.parent / file).read_text(encoding="utf-8")


def test_accelerate_configs() -> None:
    for path in sorted(ACCELERATE.glob("*.yaml")):
        assert load_config_from_file(str(path)).distributed_type, path.name


def test_there_are_recipes() -> None:
    assert {path.relative_to(RECIPES).as_posix() for path in FILES} >= {
        "apo/mistral-7b-ultrafeedback.yaml", "quickstart/apo.yaml", "film_lines/apo.yaml",
    }  # fmt: skip
