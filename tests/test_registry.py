import subprocess
import sys
import textwrap

import pytest

from trl_extras import registry
from trl_extras.registry import MethodError, resolve


PLUGIN = """
from dataclasses import dataclass

from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


@dataclass
class LoudConfig(DPOConfig):
    loudness: int = 1


class LoudTrainer(DPOTrainer):
    config_class = LoudConfig


class LouderTrainer(LoudTrainer):
    pass


class PlainConfigTrainer(SFTTrainer):
    config_class = SFTConfig


class NoConfigTrainer(DPOTrainer):
    pass


class WrongConfigTrainer(SFTTrainer):
    config_class = LoudConfig


class TextConfigTrainer(DPOTrainer):
    config_class = "LoudConfig"


class OwnTrainer(Trainer):
    config_class = TrainingArguments


class NoTrainer:
    config_class = LoudConfig


not_a_class = LoudTrainer.__init__
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "registry_plugin.py").write_text(PLUGIN)
    (tmp_path / "registry_broken.py").write_text("raise ValueError('half written')\n")
    (tmp_path / "registry_needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "registry_plugin"
    for name in ("registry_plugin", "registry_broken", "registry_needy"):
        sys.modules.pop(name, None)


def make_distribution(folder, points):
    """What `pip install` leaves of a package with entry points."""
    info = folder / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{textwrap.dedent(points)}\n")


def test_importing_is_light():
    code = "import sys, trl_extras.registry as r; r.known_names(); print({'torch', 'trl'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "trainer", "config"),
    [
        ("apo", "APOTrainer", "APOConfig"),
        ("apo_spo", "APOSPOTrainer", "APOSPOConfig"),
        ("spo", "SPOTrainer", "SPOConfig"),
    ],
)
def test_built_in(name, trainer, config):
    import trl

    import trl_extras

    swap = resolve(name).load()
    assert (swap.trainer, swap.config) == (getattr(trl_extras, trainer), getattr(trl_extras, config))
    assert (swap.stock_trainer, swap.stock_config) == (trl.DPOTrainer, trl.DPOConfig)
    # What is written down is what would be inferred.
    assert swap == registry.Method(f"trl_extras.{name}:{trainer}").load()


def test_every_built_in_method_is_tested():
    assert list(registry.BUILT_IN) == ["apo", "apo_spo", "spo", "spr"]


def test_module_and_class(plugin):
    import trl

    swap = resolve(f"{plugin}:LoudTrainer").load()
    assert swap.trainer.__name__ == "LoudTrainer"
    assert swap.config.__name__ == "LoudConfig"
    assert (swap.stock_trainer, swap.stock_config) == (trl.DPOTrainer, trl.DPOConfig)
    # Further down the line, and with the stock config itself.
    assert resolve(f"{plugin}:LouderTrainer").load().stock_trainer is trl.DPOTrainer
    plain = resolve(f"{plugin}:PlainConfigTrainer").load()
    assert (plain.stock_trainer, plain.config, plain.stock_config) == (trl.SFTTrainer, trl.SFTConfig, trl.SFTConfig)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("registry_plugins:LoudTrainer", "there is no module 'registry_plugins'"),
        ("registry_plugin.deeper:LoudTrainer", "there is no module 'registry_plugin.deeper'|is not a package"),
        ("registry_broken:LoudTrainer", "importing 'registry_broken' failed: ValueError: half written"),
        ("registry_needy:LoudTrainer", "importing 'registry_needy' failed: No module named 'a_package_that_nobody"),
        ("registry_plugin:LoudTrainr", "has no 'LoudTrainr'; did you mean LoudTrainer"),
        ("registry_plugin:not_a_class", "is not a class but function"),
        ("registry_plugin:NoTrainer", "does not derive from transformers.Trainer"),
        ("registry_plugin:OwnTrainer", "no TRL trainer among its bases"),
        ("registry_plugin:NoConfigTrainer", "has no config_class"),
        ("registry_plugin:TextConfigTrainer", "config_class is no config class"),
        ("registry_plugin:WrongConfigTrainer", "LoudConfig does not derive from SFTConfig, which SFTTrainer takes"),
        ("registry_plugin:", "not of the form package.module:Class"),
    ],
)
def test_says_which_part_failed(plugin, path, message):
    with pytest.raises(MethodError, match=message):
        resolve(path).load()


def test_unknown_name_lists_the_known(plugin, tmp_path):
    make_distribution(tmp_path, "loud = registry_plugin:LoudTrainer")
    with pytest.raises(MethodError, match=r"'lout': known are apo, apo_spo, spo, spr, loud, .*did you mean loud\?"):
        resolve("lout")


def test_entry_point(plugin, tmp_path):
    make_distribution(tmp_path, "loud = registry_plugin:LoudTrainer\napo = registry_plugin:LoudTrainer")
    assert registry.known_names() == ["apo", "apo_spo", "spo", "spr", "loud"]
    assert plugin not in sys.modules  # listing imports nobody's code
    assert resolve("loud").load().trainer.__name__ == "LoudTrainer"
    # A built-in name wins.
    assert resolve("apo") is registry.BUILT_IN["apo"]
