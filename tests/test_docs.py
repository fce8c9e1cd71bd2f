"""What the documentation says of links, commands, defaults, keys and tests is so."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from trl import DPOConfig, SFTConfig

import trl_extras
from tests import tiny
from trl_extras import SPRTrainer, cli
from trl_extras.apo import APOConfig
from trl_extras.apo_spo import APOSPOConfig
from trl_extras.errors import ConfigurationError
from trl_extras.run import Ledger, option_actions, script_path
from trl_extras.scripts import apo, apo_spo, extrapolate, spo, spr
from trl_extras.spo import SPOConfig
from trl_extras.spr import SPRConfig


ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")])
FOLDERS = ("docs", "recipes", "tests", "trl_extras")
FILES = [path for folder in ("*.*", *(f"{name}/**/*.*" for name in FOLDERS)) for path in ROOT.glob(folder)]
# What a reader brings, and TRL's own.
YOURS = {"recipe.yaml", "my_rewards.py", "dpo.py", "sft.py"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def section(page: Path, title: str) -> str:
    """A section with its subsections, up to the next heading of the same or a higher level."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(title)}", line))
    level = len(lines[start]) - len(lines[start].lstrip("#"))
    heading = re.compile(rf"#{{1,{level}}} ")
    end = next((i for i in range(start + 1, len(lines)) if heading.match(lines[i])), len(lines))
    return "\n".join(lines[start + 1 : end])


def table(text: str, *columns: str) -> list[list[str]]:
    """The rows of the first table whose header begins with these columns."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            if inside:
                break
            continue
        cells = [cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]
        if inside:
            rows.append(cells)
        inside = inside or tuple(cells[: len(columns)]) == columns
    assert len(rows) > 1, f"there is no table with {columns}"
    return rows[1:]


# ---- Links ----


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


# ---- Commands ----


def commands() -> Iterator[Any]:
    """Every shell command of the pages' code blocks, and those of ours that stand in running text or in a recipe."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in fences(page, "bash"):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                for command in line.split("&&"):
                    if words := shlex.split(command, comments=True):
                        yield pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")
        for command in re.findall(r"`((?:trl-extras|python -m trl_extras)[^`]* [^`]*)`", prose(page)):
            yield pytest.param(shlex.split(command), id=f"{name}: {command[:60]}")
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        for command in re.findall(
            r"^#   (trl-extras .*|python .*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield pytest.param(shlex.split(command), id=f"{recipe.relative_to(ROOT).as_posix()}: {command[:60]}")


SCRIPTS: dict[str, Any] = {"apo": apo, "spo": spo, "apo_spo": apo_spo, "spr": spr}


@cache
def flags_of(name: str) -> dict[str, Any]:
    return option_actions(SCRIPTS[name].make_parser())


def assert_flags(words: list[str], known: dict[str, Any]) -> None:
    unknown = [word for word in words if re.match(r"--?[a-zA-Z]", word) and word.split("=")[0] not in known]
    assert not unknown


def assert_parses(name: str, words: list[str]) -> None:
    """A script's own flags of a complete command, with their values, on a machine of any kind."""
    if "--dataset_name" in words and "--model_name_or_path" in words:
        SCRIPTS[name].parse_arguments([*words, "--use_cpu", "true", "--bf16", "false"])


def test_every_method_with_a_command_is_looked_at() -> None:
    assert set(SCRIPTS) == set(cli.methods())


@pytest.mark.parametrize("name", ["apo", "spo", "spr"])
def test_recipes_on_a_methods_page_have_keys_that_exist(name: str) -> None:
    known = {flag.lstrip("-") for flag in flags_of(name)}
    blocks = fences(ROOT / f"docs/{name}.md", "yaml")
    assert blocks
    for block in blocks:
        assert yaml.safe_load(block).keys() <= known


@pytest.mark.parametrize("words", commands())
def test_commands_have_flags_that_exist(words: list[str]) -> None:
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    launcher = cli._launcher_options(Ledger("docs", "docs"))[1]
    if "trl_extras.run" in words:
        at = words.index("trl_extras.run")
        assert words[at - 1] == "-m"
        assert_flags(words[1 : at - 1], launcher)
        assert words[at + 1] == "--trainer"
        if (name := words[at + 2]) in SCRIPTS:
            # The script comes next; the rest of the line is its arguments.
            script_path(words[at + 3])
            assert_flags(words[at + 4 :], {**flags_of(name), "--config": None})
            assert_parses(name, words[at + 4 :])
    elif words[:2] == ["trl-extras", "extrapolate"]:
        if len(words) > 2:
            extrapolate.build_parser().parse_args(words[2:])
    elif any(word.startswith("trl_extras.scripts.") for word in words):
        at = next(i for i, word in enumerate(words) if word.startswith("trl_extras.scripts."))
        assert_flags(words[at + 1 :], {**flags_of(words[at].rpartition(".")[2]), "--config": None})
    elif words[0] == "trl-extras" and words[1] in SCRIPTS:
        assert_flags(words[2:], {**flags_of(words[1]), **launcher, "--config": None})
        if "--config" in words and (recipe := words[words.index("--config") + 1]).startswith("recipes/"):
            assert (ROOT / recipe).is_file()
    elif words[0] == "trl-extras":
        assert words[1] in (*cli.methods(), "run", "--help", "--version")
    elif words[0] in ("bash", "python") and "/" in words[1]:
        # A file of this repository: its flags stand in its source.
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--"))


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def sources(page: Path) -> list[Path]:
    """This repository's programs that a page is about: beside it, or named there."""
    text = page.read_text(encoding="utf-8")
    return [
        path for path in FILES if path.suffix in (".py", ".sh") and (path.parent == page.parent or path.name in text)
    ]


@each_page
def test_inline_flags_exist(page: Path) -> None:
    """Those of training and its launchers, of the programs that the page is about, and of other blocks' commands."""
    known = set(cli._launcher_options(Ledger("docs", "docs"))[1])
    known |= {"--trainer", "--config", "--nproc_per_node", *(flag for name in SCRIPTS for flag in flags_of(name))}
    known |= {word for block in fences(page, "bash") for word in block.split() if word.startswith("--")}
    text = "".join(path.read_text(encoding="utf-8") for path in sources(page))
    for code in inline(page):
        for flag in re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", code) if code.startswith("--") else ():
            assert flag in known or f'"{flag}"' in text, code


@each_page
def test_inline_paths_and_extras_exist(page: Path) -> None:
    names = [path.as_posix() for path in FILES]
    for code in inline(page):
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"[\w./-]+\.(?:py|sh|toml|yaml)", code) and code not in YOURS:
            assert any(name.endswith(f"/{code.removeprefix('../')}") for name in names), code
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for found in re.findall(r"(?:trl-extras|\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
        assert set(found.split(",")) <= set(extras), found


# ---- Code ----


@each_page
def test_python_blocks_are_python_and_import_what_is_there(page: Path) -> None:
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "trl_extras":
                assert all(hasattr(trl_extras, alias.name) for alias in node.names)


@each_page
def test_quoted_tests_are_there(page: Path) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+\.py|(?:test_\w+\.py::)?test_\w+)", prose(page))):
        file, _, function = name.rpartition("::")
        if name.endswith(".py") or file:
            assert (ROOT / "tests" / (file or name)).is_file(), name
        if not name.endswith(".py"):
            assert f"def {function}(" in tests, name


# ---- Defaults and keys ----


def defaults(config: type[Any]) -> dict[str, Any]:
    return {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }


def read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


HELD_OUT = "Measured on held-out prompts"
VLLM_TABLE = (("docs/rollouts.md", "vLLM"),)
ROUNDS_TABLES = (("docs/apo.md", "Configuration"), ("docs/rollouts.md", "Sampling"), *VLLM_TABLE)
FLOOR_TABLE = (("docs/spo.md", "Configuration"),)
WEIGHTS_TABLE = (("docs/spr.md", "Configuration"), *VLLM_TABLE)


@pytest.mark.parametrize(
    ("config", "stock_config", "tables"),
    [
        (APOConfig, DPOConfig, ROUNDS_TABLES),
        (SPOConfig, DPOConfig, FLOOR_TABLE),
        (APOSPOConfig, DPOConfig, ROUNDS_TABLES + FLOOR_TABLE),
        (SPRConfig, SFTConfig, WEIGHTS_TABLE),
    ],
    ids=["apo", "spo", "apo_spo", "spr"],
)
def test_configuration_table_has_our_fields_and_their_defaults(
    config: type[Any], stock_config: type[Any], tables: tuple[tuple[str, str], ...]
) -> None:
    rows = [row for page, title in tables for row in table(section(ROOT / page, title), "field", "default")]
    documented = {row[0].strip("`"): read(row[1].strip("`")) for row in rows}
    assert len(documented) == len(rows), "a field stands there twice"
    ours, stock = defaults(config), defaults(stock_config)
    assert documented == {name: value for name, value in ours.items() if name not in stock or stock[name] != value}


def test_defaults_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"`(num_rounds|extrapolation_alpha|num_train_epochs)`\s+\(([\d.]+)", text)
    assert {name for name, _ in found} == {"num_rounds", "extrapolation_alpha", "num_train_epochs"}
    for name, value in found:
        assert defaults(APOConfig)[name] in (read(value), [read(value)]), name


def test_docstrings_say_the_defaults() -> None:
    rounds = [cls for cls in APOConfig.__mro__ if cls.__name__ == "RoundsConfig"]
    for config in (APOConfig, SPOConfig, SPRConfig, *rounds):
        found = re.findall(r"^\s+(\w+) \(`.*`, \*optional\*, defaults to `(.*)`\):$", config.__doc__, re.MULTILINE)
        assert len(found) >= 3
        assert {name: read(value) for name, value in found}.items() <= defaults(config).items()


@pytest.mark.parametrize("builder", [False, True], ids=["folds", "builder"])
def test_keys_of_a_run_are_those_that_are_documented(make_apo: Any, tmp_path: Path, builder: bool) -> None:
    trackers = tiny.Trackers()
    trainer = make_apo(
        num_rounds=2, eval_dataset=tiny.make_pairs(4, seed=3), eval_strategy="epoch", callbacks=[trackers]
    )
    if builder:
        trainer.round_data_builder = lambda round_index, policy, seed: tiny.make_pairs(12, seed=round_index)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = [row[0].strip("`") for row in table(section(ROOT / "docs/apo.md", "rounds.jsonl"), "key")]
    for row in rows:
        assert list(row) == keys, "in the order of the table"
    logged = {key for entry in trackers.rows for key in entry if key.startswith("round/")}
    assert logged == {row[0].strip("`") for row in table(section(ROOT / "docs/apo.md", "The logger"), "key")}


@pytest.mark.parametrize("judged", ["reward", "ranker"])
def test_keys_of_an_on_policy_run_are_those_that_are_documented(make_apo: Any, tmp_path: Path, judged: str) -> None:
    def reward(completions: list[str], log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float]:
        log_metric("seen", len(completions))
        log_extra("words", [text.split() for text in completions])
        return [float(sum(map(ord, text))) for text in completions]

    def ranker(completions: list[list[str]], **kwargs: Any) -> list[Any]:
        return [sorted(range(len(group)), key=lambda i: group[i]) for group in completions]

    prompts = tiny.make_pairs(8).select_columns(["prompt"])
    trainer = make_apo(
        num_rounds=2, data=prompts, eval_dataset=prompts, num_generations=2, max_completion_length=4,
        **({"reward_funcs": reward} if judged == "reward" else {"ranker": ranker}),
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    page = ROOT / "docs/rollouts.md"
    rounds = [row[0].strip("`") for row in table(section(ROOT / "docs/apo.md", "rounds.jsonl"), "key")]
    ours = [row[0].strip("`") for row in table(section(page, "Keys of a round"), "key")]
    measured = {row[0].strip("`") for row in table(section(page, HELD_OUT), "key")}
    rewards = {"reward_mean", "reward_best", "reward_worst", "rewards", "metrics"} if judged == "ranker" else set()
    for t, row in enumerate(rows):
        missing = rewards | ({"heldout_start"} if t else set())
        assert list(row) == [*rounds, *(key for key in ours if key not in missing)], "in the order of the tables"
        for which in ("iterate", "extrapolated"):
            found = row[f"heldout_{which}"].keys() - {"metrics"}
            assert found == measured - ({"reward", "reward_error"} if judged == "ranker" else set())
    folder = tmp_path / "out/_rounds/rollouts/round-0000"
    found = set(pyarrow.parquet.read_table(folder / "rollouts.parquet").column_names)
    columns = " ".join(row[0] for row in table(section(page, "On disk"), "column"))
    documented = set(re.findall(r"`(\w+)`", columns)) - {"reward_NAME", "extra_NAME"}
    assert found == documented | ({"reward_reward", "extra_words"} if judged == "reward" else set())


@pytest.mark.parametrize("kind", ["both", "sampled", "offline"])
def test_keys_of_an_spr_run_are_those_that_are_documented(base: Path, tmp_path: Path, kind: str) -> None:
    def reward(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("seen", len(completions))
        return [float(sum(map(ord, text)) % 7) for text in completions]

    trackers = tiny.Trackers()
    data = tiny.make_sft_rows(8)
    settings: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4}
    if kind == "sampled":
        # A ratio has to be computed, and rows without one are the others' part.
        data, settings = data.select_columns(["prompt"]), {**settings, "temperature": 0.7}
    if kind == "offline":
        data, settings = data.add_column("reward", [float(i) for i in range(8)]), {"num_generations": 0}
    trainer = SPRTrainer(
        model=str(base),
        args=SPRConfig(
            **tiny.arguments(tmp_path / "out", num_rounds=2, eval_strategy="epoch", reward_temperature=3, **settings)
        ),
        train_dataset=data,
        eval_dataset=tiny.make_sft_rows(3, seed=3),
        processing_class=tiny.make_tokenizer(),
        reward_funcs=None if kind == "offline" else reward,
        callbacks=[trackers],
    )
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    page = ROOT / "docs/spr.md"
    documented = [row[0].strip("`") for row in table(section(page, "rounds.jsonl"), "key", "meaning")]
    sampling = documented[documented.index("prompts") :]
    assert sampling[-1] == "heldout_iterate"
    for t, row in enumerate(rows):
        missing = {"both": set(), "sampled": {"offline_ratio"}, "offline": {"empty", *sampling}}[kind]
        missing |= {"heldout_start"} if t else set()
        assert list(row) == [key for key in documented if key not in missing], "in the order of the table"
        assert row["eval"]["loss"] > 0
        assert (row["importance_memory_gb"] is None) == (kind != "sampled")
        if kind != "offline":
            held_out = {row[0].strip("`") for row in table(section(ROOT / "docs/rollouts.md", HELD_OUT), "key")}
            assert row["heldout_iterate"].keys() - {"metrics"} == held_out
    numbers = {
        f"round/{key}"
        for row in rows
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    logged = {key for entry in trackers.rows for key in entry if key.startswith("round/")}
    assert {key for key in logged if key.count("/") == 1} == numbers
    assert {key.split("/")[1] for key in logged if key.count("/") > 1} <= set(documented)


def test_sizes_of_an_spr_round_are_those_of_the_page() -> None:
    """120 samples and two ratios, as docs/spr.md has it."""
    from trl_extras.spr.rows import counts_of_round, rows_of_run

    text = " ".join(section(ROOT / "docs/spr.md", "A round's rows").split())
    found = re.search(
        r"For (\d+) samples and `\[([\d.]+), ([\d.]+)\]` that is (\d+) rows: (\d+) and (\d+) in the first round, "
        r"(\d+) and (\d+) in the second",
        text,
    )
    assert found is not None
    samples, rows, *wanted = (int(found[i]) for i in (1, 4, 5, 6, 7, 8))
    ratios = [float(found[2]), float(found[3])]
    assert rows_of_run(samples, ratios) == rows
    counts = [counts_of_round(rows, samples, ratio) for ratio in ratios]
    assert [number for count in counts for number in (count.online, count.offline)] == wanted


def test_what_spr_refuses_is_refused_as_its_page_says() -> None:
    """Every field that the table names is one, and what the config refuses by itself names it."""
    rows = table(section(ROOT / "docs/spr.md", "What is refused"), "what", "why")
    named = {name for row in rows for name in re.findall(r"`(\w+)", row[0])}
    arguments = {"train_dataset", "formatting_func", "compute_loss_func", "train"}
    columns_and_values = {"prompt", "completion", "reward", "rewards", "external", "nll"}
    assert named <= defaults(SPRConfig).keys() | arguments | columns_and_values
    for setting in (
        {"packing": True}, {"padding_free": True}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1},
        {"completion_only_loss": False}, {"assistant_only_loss": True}, {"shuffle_dataset": True},
        {"dataset_kwargs": {"skip_prepare_dataset": True}}, {"ranker": "m:f"}, {"offline_ratio": 1},
        {"num_generations": 0, "prompts_per_round": 2},
    ):  # fmt: skip
        (name, *_) = sorted(setting, key=lambda field: field == "num_generations")
        assert name in named
        with pytest.raises(ConfigurationError, match=name):
            SPRConfig("out", use_cpu=True, bf16=False, **setting)


@pytest.mark.parametrize("lower_level", ["chosen", "sft_dataset", "both"])
@pytest.mark.parametrize("setting", [{}, {"sft_coef": 0.0}, {"bilevel_solver": "unrolled"}], ids=str)
def test_metrics_of_an_spo_run_are_those_that_are_documented(
    make_spo: Any, lower_level: str, setting: dict[str, Any]
) -> None:
    trainer = make_spo(
        lower_level=lower_level, sft_dataset=None if lower_level == "chosen" else tiny.make_sft_rows(),
        eval_dataset=tiny.make_pairs(4, seed=3), eval_strategy="epoch", **setting,
    )  # fmt: skip
    trainer.train()
    documented = {row[0].strip("`") for row in table(section(ROOT / "docs/spo.md", "What is logged"), "metric")}
    missing = {"chosen": {"spo/gap_sft"}, "sft_dataset": {"spo/gap_chosen"}, "both": set()}[lower_level]
    for prefix, loss in (("", "loss"), ("eval_", "eval_loss")):
        entries = [entry for entry in trainer.state.log_history if loss in entry]
        assert entries
        for entry in entries:
            assert {key for key in entry if "spo/" in key} == {f"{prefix}{name}" for name in documented - missing}


def test_formulas_of_an_spo_run_are_those_that_are_documented(make_spo: Any) -> None:
    """With one micro-batch a log, what one metric says of the others holds to a rounding."""
    coefficient, beta = 0.7, 0.3
    trainer = make_spo(
        sft_dataset=tiny.make_sft_rows(), sft_coef=coefficient, beta=beta, learning_rate=5e-2,
        eval_dataset=tiny.make_pairs(2, seed=3), eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    seen = 0.0
    for entry in trainer.state.log_history:
        for prefix, loss in (("", "loss"), ("eval_", "eval_loss")):
            if loss not in entry:
                continue
            found = {key.removeprefix(f"{prefix}spo/"): value for key, value in entry.items() if "spo/" in key}
            assert found["penalty"] == pytest.approx(coefficient * (found["gap_chosen"] + found["gap_sft"]), abs=1e-6)
            assert found["penalty_share"] == pytest.approx(found["penalty"] / entry[loss], abs=2e-4)
            assert found["preference_loss"] + found["penalty"] == pytest.approx(entry[loss], abs=2e-4)
            for which in ("chosen", "rejected"):
                reward = entry[f"{prefix}rewards/{which}"]
                assert beta * found[f"{which}_change"] == pytest.approx(reward, abs=1e-4)
            seen += found["penalty"]
    assert seen > 0
