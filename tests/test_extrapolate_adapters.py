"""`trl-extras extrapolate` of two LoRA adapters of one base: the change of the weights, exactly, by plain peft."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from trl_extras.scripts import _adapters
from trl_extras.scripts import extrapolate as cli


ALPHA = 0.7
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def fill(model: torch.nn.Module, seed: int) -> None:
    """Values for both factors: an adapter as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def save(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    model = get_peft_model(load(base), LoraConfig(**{**LORA, **config}))
    fill(model, seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save(base, folder / "new", 1)
    save(base, folder / "old", 2)
    return folder


@pytest.fixture
def pair(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    return shutil.copytree(saved / "new", tmp_path / "new"), shutil.copytree(saved / "old", tmp_path / "old")


def write_state(folder: Path, **about: Any) -> None:
    """What a run in rounds keeps beside an adapter, as far as the command reads it."""
    save_file({"x": torch.zeros(1)}, folder / "adapter_rounds.safetensors", {"trl_extras": json.dumps(about)})


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], new: Path, old: Path) -> str:
    """Run, expect exit code 2, one line on stderr and nothing written; returns the line."""
    before = sorted(new.parent.iterdir())
    capsys.readouterr()
    assert run(new, old, "--alpha", ALPHA, "-o", new.parent / "out") == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("trl-extras extrapolate: error: ")
    assert captured.out == ""
    assert sorted(new.parent.iterdir()) == before
    return lines[0]


def changes(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What plain peft makes of a saved adapter in each weight of the base, in float64."""
    before = load(base).double().state_dict()
    merged = PeftModel.from_pretrained(load(base).double(), folder).merge_and_unload().state_dict()
    return {name: merged[name] - before[name] for name in before}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def assert_extrapolated(base: Path, new: Path, old: Path, out: Path) -> dict[str, torch.Tensor]:
    """The output's change of each weight against the dense extrapolation; returns the momentum."""
    change_new, change_old, change = (changes(base, folder) for folder in (new, old, out))
    changed = [name for name in change_new if change_new[name].any()]
    assert changed
    for name, got in change.items():
        expected = change_new[name] + ALPHA * (change_new[name] - change_old[name])
        if name in changed:
            assert relative(got, expected) < 1e-6, name
        else:
            assert not got.any(), name
    return {name: change_new[name] - change_old[name] for name in changed}


PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 1},
    "alpha_pattern": {"v_proj": 5, "q_proj": 1},
}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}


@pytest.mark.parametrize(
    ("config_new", "config_old"),
    [
        ({}, {}),
        ({"r": 3, "lora_alpha": 1}, {"r": 5, "lora_alpha": 16}),
        ({"use_rslora": True}, {"r": 3}),
        ({}, {"use_rslora": True, "r": 3}),
        (PATTERNS, {}),
        ({"use_rslora": True, **PATTERNS}, {**PATTERNS, "alpha_pattern": {"^model.layers.0.mlp.down_proj": 9}}),
        (EMBEDDING, {**EMBEDDING, "r": 4, "use_rslora": True}),
        ({"target_modules": "all-linear"}, {"target_modules": "all-linear", "layers_to_transform": None}),
    ],
    ids=["plain", "ranks", "rslora new", "rslora old", "patterns new", "patterns", "embedding", "all linear"],
)
def test_equals_the_dense_extrapolation(
    tmp_path: Path, config_new: dict[str, Any], config_old: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    # Untied, so that a change of the embedding can be merged.
    base = tiny.save_model(tmp_path / "base", num_hidden_layers=2, tied=False)
    new, old = save(base, tmp_path / "new", 1, **config_new), save(base, tmp_path / "old", 2, **config_old)
    out = tmp_path / "out"
    assert run(new, old, "--alpha", ALPHA, "-o", out) == 0
    momentum = assert_extrapolated(base, new, old, out)

    tensors = load_file(out / "adapter_model.safetensors")
    norm = math.sqrt(sum(float(change.square().sum()) for change in momentum.values()))
    line = capsys.readouterr().out.strip().splitlines()[-1]
    start, _, printed = line.rpartition(", ||NEW - OLD|| = ")
    assert start == f"{len(tensors)} tensors, alpha {ALPHA:g}"
    assert float(printed.removesuffix(f", written to {out}")) == pytest.approx(norm, rel=1e-5)

    config = json.loads((out / "adapter_config.json").read_text())
    rank = config_new.get("r", 2) + config_old.get("r", 2)
    assert config["r"] == config["lora_alpha"] == rank
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["init_lora_weights"] is True
    assert config["inference_mode"] is True
    before = json.loads((new / "adapter_config.json").read_text())
    changed = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    loaded = PeftModel.from_pretrained(load(base), out)
    scalings = [layer.scaling["default"] for layer in loaded.modules() if hasattr(layer, "lora_A")]
    assert scalings
    assert set(scalings) == {1.0}


def test_loads_on_the_original_base(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """By peft and by transformers, with the logits of the dense extrapolation; and the output goes on as an input."""
    new, old = pair
    assert run(new, old, "--alpha", ALPHA, "-o", tmp_path / "out") == 0
    tokens = torch.arange(4, 20)[None]
    dense = load(base)
    momentum = assert_extrapolated(base, new, old, tmp_path / "out")
    change_new = changes(base, new)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name in momentum:
                parameter.add_((change_new[name] + ALPHA * momentum[name]).float())
        expected = dense.eval()(tokens).logits
        adapted = PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
        assert relative(adapted(tokens).logits, expected) < 1e-5
        assert relative(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits, expected) < 1e-5
    assert run(tmp_path / "out", new, "--alpha", ALPHA, "-o", tmp_path / "next") == 0
    assert_extrapolated(base, tmp_path / "out", new, tmp_path / "next")
    assert json.loads((tmp_path / "next/adapter_config.json").read_text())["r"] == 6


class Layers(torch.nn.Module):
    """Layers of every kind side by side, so that each output is linear in its own layer's change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 5)
        self.embedding = torch.nn.Embedding(7, 4)
        self.conv1d = torch.nn.Conv1d(4, 6, 3)
        self.conv2d = torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.grouped = torch.nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        image = torch.randn(2, 4, 8, 8, generator=draw, dtype=torch.float64)
        return {
            "linear": self.linear(torch.randn(3, 6, generator=draw, dtype=torch.float64)),
            "embedding": self.embedding(torch.arange(7)),
            "conv1d": self.conv1d(torch.randn(2, 4, 9, generator=draw, dtype=torch.float64)),
            "conv2d": self.conv2d(image),
            "grouped": self.grouped(image),
        }


def save_layers(folder: Path, seed: int, **config: Any) -> Path:
    targets = [name for name, _ in Layers().named_children()]
    model = get_peft_model(Layers(), LoraConfig(target_modules=targets, **config))
    fill(model, seed)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    new = save_layers(tmp_path / "new", 1, r=4, alpha_pattern={"conv2d": 3})
    old = save_layers(tmp_path / "old", 2, r=2, use_rslora=True, rank_pattern={"conv1d": 3})
    out = tmp_path / "out"
    assert run(new, old, "--alpha", ALPHA, "-o", out) == 0
    one, other, got = (
        PeftModel.from_pretrained(Layers().double(), folder).double().eval()(3) for folder in (new, old, out)
    )
    plain = Layers().double()(3)
    for name, value in got.items():
        expected = one[name] + ALPHA * (one[name] - other[name])
        assert relative(value - plain[name], expected - plain[name]) < 1e-6, name


def test_layers_take_their_rank_and_alpha_by_pefts_rule() -> None:
    names = ["model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "my_q_proj", "a+b.q_proj"]
    patterns: list[dict[str, int]] = [
        {"q_proj": 3}, {"layers.1.q_proj": 3, "q_proj": 4}, {"q_proj": 4, "layers.1.q_proj": 3}, {"^q_proj": 3},
        {r"model\.layers\.\d\.q_proj": 3}, {"_q_proj": 3}, {"a|q": 3}, {"a+b.q_proj": 3}, {".*proj": 3}, {},
    ]  # fmt: skip
    for pattern in patterns:
        for name in names:
            assert _adapters._by_pattern(pattern, name, 8) == pattern.get(get_pattern_key(pattern.keys(), name), 8)


def test_two_iterates_of_a_run_give_its_next_policy(make_apo: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    trainer = make_apo(
        peft_config=LoraConfig(**LORA), num_rounds=3, extrapolation_alpha=[0.3, ALPHA, 0.0], keep_iterates=True,
        learning_rate=5e-3,
    )  # fmt: skip
    trainer.train()
    rounds = tmp_path / "out/_rounds"
    iterates = rounds / "iterates"
    policy = next(path for path in rounds.glob("*/policy") if (path / "adapter_config.json").is_file())
    assert run(iterates / "2", iterates / "1", "--alpha", ALPHA, "-o", tmp_path / "theta") == 0
    assert "adapter_rounds.safetensors" not in {path.name for path in (tmp_path / "theta").iterdir()}
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        theta, own, iterate = (
            PeftModel.from_pretrained(load(base), folder).eval()(tokens).logits
            for folder in (tmp_path / "theta", policy, iterates / "2")
        )
    assert relative(theta, own) < 1e-5
    assert relative(iterate, own) > 1e-3


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision(pair: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype, which: int) -> None:
    new, old = pair
    rewrite(pair[which], lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert run(new, old, "--alpha", ALPHA, "-o", tmp_path / "out") == 0
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (new, old)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in written.items():
        assert tensor.dtype == wide
        one, other = (own[name].double() for own in tensors)
        if "lora_B" in name:
            # alpha / r is 3. A coefficient times B is rounded once, from float64.
            parts = [one * ((1 + ALPHA) * 3), other * (-ALPHA * 3)]
            assert torch.equal(tensor, torch.cat(parts, dim=1).to(wide))
        else:
            assert torch.equal(tensor, torch.cat([one, other]).to(wide))


def test_alpha_zero_is_a_copy_of_the_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(*pair, "--alpha", 0, "-o", tmp_path / "out") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pair[0] / name).read_bytes()


def test_equal_adapters_have_no_momentum(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair[0], pair[0], "--alpha", ALPHA, "-o", tmp_path / "out") == 0
    assert "||NEW - OLD|| = 0, written" in capsys.readouterr().out


def test_what_is_written(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    new, old = pair
    tiny.make_tokenizer().save_pretrained(new)
    tokenizer = {path.name for path in new.glob("tokenizer*")} | {"chat_template.jinja"}
    for name in ("adapter_rounds.safetensors", "training_args.bin", "trainer_state.json", "optimizer.pt"):
        (new / name).write_bytes(b"{}")
    (new / "adapter_rounds.safetensors").unlink()
    write_state(new, base="a")
    assert run(new, old, "--alpha", ALPHA, "-o", tmp_path / "out") == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*tokenizer, "adapter_config.json", "adapter_model.safetensors", "README.md"}
    with safe_open(tmp_path / "out/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- accelerated-preference-optimization\n- lora\n")
    assert "*accelerated*" in card
    assert f"| alpha | {ALPHA} |" in card
    assert "at rank 4." in card
    assert "| NEW | a local checkpoint |" in card
    assert str(tmp_path) not in card
    assert str(base) not in card


def test_hub_ids(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(repo_id)
        assert "adapter_model.safetensors" in allow_patterns
        assert "*.json" in allow_patterns
        return str(pair[len(asked) - 1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for folder in pair:
        reconfigure(folder, base_model_name_or_path="somebody/model")
    assert run("me/new", "me/old", "--alpha", ALPHA, "-o", tmp_path / "out") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: peft\nbase_model: somebody/model\ntags:\n" in card
    assert "| OLD | [me/old](https://huggingface.co/me/old) |" in card


# ---- What is refused ----


def reconfigure(folder: Path, **change: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def add(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(2)}))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", 'has peft_type="LOHA"'),
        ("use_dora", True, "has use_dora=true"),
        ("modules_to_save", ["lm_head"], 'has modules_to_save=["lm_head"]'),
        ("bias", "all", 'has bias="all"'),
        ("lora_bias", True, "a bias is no change of low rank"),
        ("trainable_token_indices", [1], "has trainable_token_indices=[1]"),
        ("target_parameters", ["experts.up"], "has target_parameters"),
        ("a_field_of_a_later_peft", {"x": 1}, "this kind of LoRA is not handled"),
        *[
            ("init_lora_weights", start, "is no change of the original base")
            for start in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "mica", "lora_ga", "of a later peft")
        ],
        ("r", None, "no usable `r`"),
        ("r", 3, "which are no A and B of rank 3, its rank by adapter_config.json"),
        ("rank_pattern", {"q_proj": 3}, "which are no A and B of rank 3, its rank by adapter_config.json"),
        ("alpha_pattern", {"(": 3}, "no usable `alpha_pattern`"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_configurations_that_are_refused(
    pair: tuple[Path, Path], field: str, value: object, message: str, which: int, capsys: pytest.CaptureFixture[str]
) -> None:
    reconfigure(pair[which], **{field: value})
    line = refused(capsys, *pair)
    assert message in line
    assert str(pair[which]) in line


def to_pickle(new: Path, old: Path) -> None:
    (old / "adapter_model.safetensors").rename(old / "adapter_model.bin")


def truncate(new: Path, old: Path) -> None:
    with (old / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(3000)


def flat(new: Path, old: Path) -> None:
    """As DeepSpeed leaves factors that were not gathered."""
    rewrite(new, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(0)}))


def other_width(new: Path, old: Path) -> None:
    rewrite(old, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(2, 9)}))


def overflow(new: Path, old: Path) -> None:
    rewrite(new, lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(3e38))


def both_kinds(new: Path, old: Path) -> None:
    save_file({"w": torch.ones(2)}, new / "model.safetensors", {"format": "pt"})


def float8(new: Path, old: Path) -> None:
    rewrite(new, lambda t: t.update({key: tensor.to(torch.float8_e4m3fn) for key, tensor in t.items()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda new, old: add(new, "model.embed_tokens.base_layer.weight"), "save_embedding_layers=False"),
        (lambda new, old: add(old, "lm_head.weight"), "is no factor of a LoRA layer"),
        (lambda new, old: add(old, "q_proj.lora_magnitude_vector"), "is no factor of a LoRA layer"),
        (lambda new, old: add(old, "q_proj.lora_B.bias"), "is no factor of a LoRA layer"),
        (lambda new, old: add(old, "attn.base_layer.out_proj.lora_A.weight"), "is no factor of a LoRA layer"),
        (lambda new, old: rewrite(new, lambda t: t.pop(f"{Q}.lora_B.weight")), "has not one A and one B"),
        (lambda new, old: rewrite(new, lambda t: t.clear()), "is empty"),
        (to_pickle, "pickle (adapter_model.bin)"),
        (lambda new, old: (old / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
        (truncate, "adapter_model.safetensors is damaged"),
        (flat, "gathered if sharded"),
        (other_width, "'model.layers.0.self_attn.q_proj' has factors of shape (2, 16) and (16, 2) in NEW and (2, 9)"),
        (overflow, "'model.layers.0.self_attn.q_proj': the extrapolation with alpha 0.7 leaves the range of"),
        (float8, "has dtype torch.float8_e4m3fn"),
        (both_kinds, "holds a model and an adapter"),
        (lambda new, old: (new / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda new, old: reconfigure(old, base_model_name_or_path="b"), "If both name the same model, write one"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(
    pair: tuple[Path, Path], damage: Callable[[Path, Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(*pair)
    assert message in refused(capsys, *pair)


def test_another_structure_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    less = save(base, tmp_path / "less", 1, target_modules=["q_proj", "v_proj"])
    more = save(base, tmp_path / "more", 2)
    name = "'model.layers.0.mlp.down_proj'"
    assert f"{name} has an adapter in OLD ({more}) but not in NEW ({less})" in refused(capsys, less, more)
    assert f"{name} has an adapter in NEW ({more}) but not in OLD ({less})" in refused(capsys, more, less)


def test_an_adapter_against_full_weights_is_refused(
    base: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"NEW ({pair[0]}) is a PEFT adapter and OLD ({base}) is not" in refused(capsys, pair[0], base)
    model = shutil.copytree(base, pair[0].parent / "model")
    assert f"OLD ({pair[0]}) is a PEFT adapter and NEW ({model}) is not" in refused(capsys, model, pair[0])


def test_the_base_is_compared_by_hash_or_by_name(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = pair
    reconfigure(new, base_model_name_or_path="me/base", revision="v1")
    reconfigure(old, base_model_name_or_path="me/base/", revision="v2")
    assert "revision is 'v1' in NEW" in refused(capsys, new, old)
    reconfigure(old, revision=None)
    assert run(new, old, "--alpha", ALPHA, "-o", tmp_path / "by_name") == 0
    for folder in pair:
        save_file(
            {"x": torch.zeros(1)},
            folder / "adapter_rounds.safetensors",
            {"trl_extras": json.dumps({"base": folder.name})},
        )
    assert "trained on different bases, by the hash" in refused(capsys, new, old)
    # The same weights under two names.
    save_file(
        {"x": torch.zeros(1)}, old / "adapter_rounds.safetensors", {"trl_extras": json.dumps({"base": new.name})}
    )
    reconfigure(old, base_model_name_or_path="moved/base")
    assert run(new, old, "--alpha", ALPHA, "-o", tmp_path / "by_hash") == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = sorted(tmp_path.iterdir())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(_adapters, "save_file", fail)
    assert run(*pair, "--alpha", ALPHA, "-o", tmp_path / "out") == (2 if isinstance(error, OSError) else 130)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_seen_before(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    assert "0.00 GB free" in refused(capsys, *pair)
