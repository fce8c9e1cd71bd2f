"""Every recipe is read by the parser that `trl-extras` uses: no key that nobody knows, no value of a wrong kind."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_extras import cli
from trl_extras.registry import BUILT_IN
from trl_extras.run import Ledger, UserError, option_actions


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ACCELERATE = RECIPES / "accelerate_configs"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if ACCELERATE not in path.parents)
# A recipe for a GPU is read on a machine that has none.
ANY_MACHINE = ("--use_cpu", "true", "--bf16", "false", "--fp16", "false")


def method_of(recipe: Path) -> str:
    """The method of the command in the comment that a recipe begins with, which names the recipe itself."""
    name = recipe.relative_to(RECIPES.parent).as_posix()
    text = recipe.read_text(encoding="utf-8")
    (method,) = re.findall(rf"^#   trl-extras (\w+) --config {re.escape(name)}\b", text, re.MULTILINE)
    return str(method)


def read(recipe: Path, *flags: str, method: str | None = None) -> tuple[tuple[Any, ...], argparse.Namespace]:
    """What the script gets and what `accelerate launch` gets of `trl-extras METHOD --config RECIPE FLAGS`."""
    method = method or method_of(recipe)
    error = Ledger(f"trl-extras {method}", f"trl-extras {method}")
    module = importlib.import_module(f"trl_extras.scripts.{method}")
    script = option_actions(module.make_parser())
    launcher_parser, launcher = cli._launcher_options(error)
    ours, theirs = cli._split_words(["--config", str(recipe), *flags, *ANY_MACHINE], script, launcher, error)
    with cli._without_launcher_keys(ours, theirs, script, launcher, error) as ours:
        arguments = module.parse_arguments(ours)
    words = [word for group in theirs.values() for word in group]
    return arguments, launcher_parser.parse_args([*words, "script.py"])


@pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe(recipe: Path, tmp_path: Path) -> None:
    arguments, _ = read(recipe)
    method = method_of(recipe)
    folder = recipe.parent.name
    assert folder not in BUILT_IN or folder == method
    config = BUILT_IN[method].load().config
    assert [type(part) for part in arguments] == [ScriptArguments, config, ModelConfig, DatasetMixtureConfig]
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
        read(wrong, method=method)


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


def test_the_quickstart_with_lora(tmp_path: Path) -> None:
    """Its own learning rate, kept for a resume; and a run of before there was the flag is one without."""
    pytest.importorskip("rich")
    sys.path.insert(0, str(RECIPES / "quickstart"))
    quickstart = importlib.import_module("quickstart")
    (tmp_path / "run").mkdir()

    def settle(*flags: str) -> dict[str, Any]:
        return quickstart.settle(quickstart.parse(["--output", str(tmp_path / "run"), *flags]), print)[1]

    settings = settle("--lora")
    assert settings == {**quickstart.DEFAULTS, "lora": True, "learning_rate": quickstart.LORA_LEARNING_RATE}
    assert settle("--lora", "--learning-rate", "1e-4")["learning_rate"] == 1e-4
    assert LoraConfig(**quickstart.LORA).r == 8
    quickstart.write_json(tmp_path / "run" / quickstart.SETTINGS_FILE, settings)
    assert settle("--resume") == settle("--resume", "--lora") == settings
    del settings["lora"]
    quickstart.write_json(tmp_path / "run" / quickstart.SETTINGS_FILE, settings)
    assert settle("--resume") == {**settings, "lora": False}
    with pytest.raises(quickstart.Refused, match=r"--lora is True, but the run in .* began with False"):
        settle("--resume", "--lora")


def test_the_quickstart_above_a_floor_differs_by_the_floor_alone() -> None:
    bare, floor = (
        yaml.safe_load((RECIPES / f"quickstart/{name}.yaml").read_text(encoding="utf-8"))
        for name in ("apo", "apo_spo")
    )
    added = {"sft_dataset_name", "lower_level", "sft_coef", "sft_batch_size"}
    assert floor.keys() - bare.keys() == added
    assert {key for key in bare if bare[key] != floor.get(key)} == {"output_dir"}


SPO_RECIPES = ("spo/smollm2-cpu.yaml", "spo/qwen2.5-0.5b-ultrafeedback.yaml", "film_lines/spo.yaml")


@pytest.mark.parametrize("name", SPO_RECIPES)
def test_spo_recipes_keep_chosen_and_other_text(name: str) -> None:
    """What docs/spo.md advises: both sources, a floor an example, the penalty solver, weight 1."""
    (_, config, _, _), _ = read(RECIPES / name)
    assert (config.lower_level, config.hinge, config.bilevel_solver) == ("both", "example", "penalty")
    assert (config.sft_coef, config.sft_optimum) == (1.0, "reference")
    assert config.sft_dataset_name


def test_the_floor_of_sampled_rounds_is_under_other_text() -> None:
    (_, config, _, _), _ = read(RECIPES / "apo_spo/smollm2-ultrafeedback.yaml")
    assert (config.lower_level, config.extrapolation_alpha, config.num_rounds) == ("sft_dataset", [0.6], 3)
    assert config.reward_funcs
    assert config.gradient_checkpointing


SPR_RECIPES = (
    "film_lines/spr.yaml", "spr/film-lines-reward-model.yaml", "spr/smollm2-ultrafeedback.yaml", "spr/offline.yaml",
)  # fmt: skip


@pytest.mark.parametrize("name", SPR_RECIPES)
def test_spr_recipes_sample_from_the_policy_itself(name: str) -> None:
    """What docs/spr.md advises: no ratio to correct for, and nothing that no weight could bring back."""
    (script, config, _, _), _ = read(RECIPES / name)
    assert config.samples_exactly
    assert config.temperature == config.top_p == 1
    sampled = config.num_generations > 0
    assert bool(config.reward_funcs) == sampled
    # A prompt and its response have to fit.
    assert config.max_length is None or not sampled or config.max_completion_length < config.max_length // 2
    # Text is given, or made by the commands of the comment above.
    text = (RECIPES / name).read_text(encoding="utf-8")
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert not script.dataset_name.startswith("data/") or script.dataset_name in comment


def test_rewards_of_spr_recipes_are_there() -> None:
    (_, words, _, _), _ = read(RECIPES / "film_lines/spr.yaml")
    file, _, function = words.reward_funcs[0].partition(":")
    assert f"def {function}(" in (RECIPES.parent / file).read_text(encoding="utf-8")
    neural = RECIPES / "spr/film-lines-reward-model.yaml"
    (_, config, _, _), _ = read(neural)
    assert f"train_reward_model.py --out {config.reward_funcs[0]}\n" in neural.read_text(encoding="utf-8")


def test_the_reward_model_takes_the_scorers_place_and_nothing_else_changes() -> None:
    words, neural = (
        yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
        for name in ("film_lines/spr.yaml", "spr/film-lines-reward-model.yaml")
    )
    assert words.keys() == neural.keys()
    assert {key for key in neural if neural[key] != words[key]} == {
        "output_dir", "reward_funcs", "reward_temperature", "learning_rate",
    }  # fmt: skip


def test_film_openings_suffice_for_the_rounds() -> None:
    """`make_data.py` of the quickstart makes, by its defaults, as many prompts as the recipe's rounds sample for."""
    (script, config, _, _), _ = read(RECIPES / "film_lines/spr.yaml")
    assert script.dataset_name == "data/film-openings"
    source = (RECIPES / "quickstart/make_data.py").read_text(encoding="utf-8")
    rounds, prompts = (
        int(re.search(rf'"--{name}", type=int, default=(\d+)', source)[1])  # type: ignore[index]
        for name in ("rounds", "prompts")
    )
    assert (config.num_rounds, config.prompts_per_round) == (rounds, prompts)


def test_the_offline_recipe_samples_nothing() -> None:
    (script, config, _, _), _ = read(RECIPES / "spr/offline.yaml")
    assert (config.num_generations, config.prompts_per_round, config.ratio_of(0)) == (0, None, 1.0)
    assert config.behavior_logps_column is None
    # What its comment makes of another dataset is Python, and has the columns that are wanted.
    lines = (RECIPES / "spr/offline.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if re.match(r"#(     .*)?$", line)]
    code = "\n".join(line.removeprefix("#     ").removeprefix("#") for line in lines)
    names = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {"prompt", "completion", "reward", f"{script.dataset_name}/train.jsonl"} <= names


def test_the_text_that_film_lines_keeps_is_in_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a pair nor measured on; and the recipe's datasets are the files that its `make_data.py` writes."""
    monkeypatch.syspath_prepend(str(RECIPES / "quickstart"))
    film_lines, parts = importlib.import_module("film_lines"), importlib.import_module("parts")
    spec = importlib.util.spec_from_file_location("film_lines_make_data", RECIPES / "film_lines/make_data.py")
    assert spec is not None
    assert spec.loader is not None
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    draw = random.Random(0)
    snippets = [
        film_lines.Snippet(draw.choice(list(film_lines.FILES)), draw.uniform(-4, 4), " ".join(words))
        for words in ([f"w{draw.randrange(10**6)}" for _ in range(draw.randint(5, 16))] for _ in range(9000))
    ]
    monkeypatch.setattr(parts, "ratings", lambda cache, say: tmp_path)
    monkeypatch.setattr(film_lines, "read_sdist", lambda path: [*snippets, *snippets[:50]])
    monkeypatch.chdir(tmp_path)
    (script, config, _, _), _ = read(RECIPES / "film_lines/spo.yaml")
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--out", script.dataset_name])
    assert make_data.main() == 0

    def rows(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    kept = [row["text"] for row in rows(Path(config.sft_dataset_name) / "train.jsonl")]
    assert len(set(kept)) == len(kept) == 96
    others = {row["text"] for row in rows(Path("data/film-lines-unseen.jsonl"))}
    for name in ("train.jsonl", "test.jsonl"):
        pairs = rows(Path(script.dataset_name) / name)
        others |= {row[side][0]["content"] for row in pairs for side in ("chosen", "rejected")}
    assert len(others) == 120 + 2 * (144 + 200)
    assert not set(kept) & others
    by_text = {snippet.text: snippet for snippet in snippets}
    assert {by_text[text].source for text in kept} == {"film", "product", "editorial"}
    assert all(abs(by_text[text].rating) < 1 for text in kept if by_text[text].source == "film")
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--out", "data/other", "--kept", "100000"])
    assert make_data.main() == 2


def test_accelerate_configs() -> None:
    for path in sorted(ACCELERATE.glob("*.yaml")):
        assert load_config_from_file(str(path)).distributed_type, path.name


def test_there_are_recipes() -> None:
    assert {path.relative_to(RECIPES).as_posix() for path in FILES} >= {
        "apo/mistral-7b-ultrafeedback.yaml", "quickstart/apo.yaml", "film_lines/apo.yaml",
        "apo_spo/smollm2-ultrafeedback.yaml", *SPO_RECIPES, *SPR_RECIPES,
    }  # fmt: skip
