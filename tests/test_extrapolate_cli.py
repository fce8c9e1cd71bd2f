"""`trl-extras extrapolate`: one extrapolation of *accelerated* preference optimization on checkpoints on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from tests import tiny
from trl_extras.scripts import extrapolate as cli
from trl_extras.state_dicts import difference, extrapolate


Pair = tuple[Path, Path]
# Small enough for several shards of the tiny model.
SHARD = "8KB"


def save(folder: Path, seed: int, shard: str = "1GB", tokenizer: bool = True, **model: Any) -> Path:
    tiny.make_model(seed=seed, **model).save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return save(tmp_path / "new", 1), save(tmp_path / "old", 0)


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        result |= load_file(file)
    return result


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run, expect exit code 2 and one line on stderr; returns it."""
    assert run(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("trl-extras extrapolate: error: ")
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("shard_new", "shard_old"), [("1GB", "1GB"), (SHARD, SHARD), (SHARD, "1GB"), ("1GB", SHARD)])
def test_equals_the_function_in_memory(
    tmp_path: Path, tied: bool, shard_new: str, shard_old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new = save(tmp_path / "new", 1, shard_new, tied=tied, dtype=torch.bfloat16, num_hidden_layers=2)
    old = save(tmp_path / "old", 0, shard_old, tied=tied, dtype=torch.bfloat16, num_hidden_layers=2, tokenizer=False)
    out = tmp_path / "out"
    assert run(new, old, "--alpha", 0.3, "-o", out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]

    expected = extrapolate(weights(new), weights(old), 0.3)
    assert_same(weights(out), expected)
    assert {file.name for file in out.glob("model*")} == {file.name for file in new.glob("model*")}
    if shard_new == SHARD:
        assert len(list(out.glob("*.safetensors"))) > 1
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index == json.loads((new / "model.safetensors.index.json").read_text())
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as a, safe_open(new / file.name, framework="pt") as b:
            assert a.metadata() == b.metadata() == {"format": "pt"}

    model = AutoModelForCausalLM.from_pretrained(out)
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (new, old)]
    assert_same(model.state_dict(), extrapolate(states[0], states[1], 0.3))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE

    line = capsys.readouterr().out.strip().splitlines()[-1]
    norm = sum(d.double().square().sum().item() for d in difference(weights(new), weights(old)).values()) ** 0.5
    assert line == f"{len(expected)} tensors, alpha 0.3, ||NEW - OLD|| = {norm:.6g}, written to {out}"


def test_pieces_do_not_show(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_PIECE_BYTES", 64)
    assert run(*pair, "--alpha", 0.6, "-o", tmp_path / "out") == 0
    assert_same(weights(tmp_path / "out"), extrapolate(weights(pair[0]), weights(pair[1]), 0.6))


def test_dtypes_are_kept_and_integers_are_those_of_new(pair: Pair, tmp_path: Path) -> None:
    def mixed(value: float) -> dict[str, torch.Tensor]:
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
        return {str(dtype): torch.full((3,), value).to(dtype) for dtype in dtypes} | {"empty": torch.zeros(0, 4)}

    new, old = pair
    save_file(mixed(2.0), new / "model.safetensors", {"format": "pt"})
    save_file(mixed(1.0), old / "model.safetensors", {"format": "pt"})
    assert run(new, old, "--alpha", 0.5, "-o", tmp_path / "out") == 0
    result = weights(tmp_path / "out")
    assert_same(result, extrapolate(mixed(2.0), mixed(1.0), 0.5))
    assert result["torch.float16"].tolist() == [2.5] * 3
    assert result["torch.int64"].tolist() == [2] * 3


def test_alpha_zero_is_a_copy_of_the_files(pair: Pair, tmp_path: Path) -> None:
    assert run(*pair, "--alpha", 0, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pair[0] / "model.safetensors").read_bytes()


def test_what_is_copied_and_what_is_not(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = pair
    kept = ["generation_config.json", "special.model", "merges.txt", "LICENSE", "additional_chat_templates/rag.jinja"]
    left = [
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json", "training_args.bin",
        "manifest.json", "all_results.json", "rounds.jsonl", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "modeling_custom.py", "checkpoint-5/config.json", "_rounds/round_0/config.json", "events.out",
    ]  # fmt: skip
    for name in kept + left:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text(f"{{}} {name}")
    (new / "README.md").write_text("a card of something else")
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_custom.Model"}}))

    out = tmp_path / "out"
    assert run(new, old, "--alpha", 0.3, "-o", out) == 0
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tokenizer = {path.name for path in new.glob("tokenizer*")} | {"chat_template.jinja"}
    assert tokenizer <= written
    assert written == {*kept, *tokenizer, "config.json", "model.safetensors", "README.md"}
    for name in [*kept, *tokenizer, "config.json"]:
        assert (out / name).read_bytes() == (new / name).read_bytes()
    assert "auto_map" in capsys.readouterr().err


def test_the_card_names_no_local_paths(pair: Pair, tmp_path: Path) -> None:
    cli.extrapolate_checkpoints(*pair, 0.3, tmp_path / "out", new_hub_id="somebody/model")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "*accelerated*" in card
    assert "| alpha | 0.3 |" in card
    assert "base_model:\n- somebody/model\n" in card
    assert "| OLD | a local checkpoint |" in card
    assert str(tmp_path) not in card
    cli.extrapolate_checkpoints(*pair, 0.3, tmp_path / "out_2")
    assert "base_model" not in (tmp_path / "out_2" / "README.md").read_text()


def test_hub_ids(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repo_id, revision))
        assert not any(pattern in ("*", "*.bin", "*.py", "*.pt") for pattern in allow_patterns)
        return str(pair[len(asked) - 1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    out = tmp_path / "out"
    assert run("me/new", "me/old", "--alpha", 0.3, "-o", out, "--revision-old", "v1") == 0
    assert asked == [("me/new", None), ("me/old", "v1")]
    assert "- me/new\n- me/old\n" in (out / "README.md").read_text()
    assert_same(weights(out), extrapolate(weights(pair[0]), weights(pair[1]), 0.3))


Damage = Callable[[Path, Path], None]


def rewrite(folder: Path, **change: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of an unsharded checkpoint; `embed` stands for the embedding."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors")}
    tensors |= {"model.embed_tokens.weight" if name == "embed" else name: value for name, value in change.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, **change: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def to_adapter(new: Path, old: Path) -> None:
    (new / "model.safetensors").rename(new / "adapter_model.safetensors")
    (new / "adapter_config.json").write_text("{}")


def to_pickle(new: Path, old: Path) -> None:
    (old / "model.safetensors").rename(old / "pytorch_model.bin")


def truncate(new: Path, old: Path) -> None:
    with (old / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)


def lose_a_shard(new: Path, old: Path) -> None:
    shutil.rmtree(new)
    save(new, 1, SHARD)
    sorted(new.glob("*.safetensors"))[-1].unlink()


def leave_the_folder(new: Path, old: Path) -> None:
    (new / "model.safetensors").unlink()
    (new / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../old/model.safetensors"}}')


def untie(new: Path, old: Path) -> None:
    shutil.rmtree(old)
    save(old, 0, tied=False)


def grow(new: Path, old: Path) -> None:
    largest = torch.full((tiny.make_model().config.vocab_size, 16), 65504.0, dtype=torch.float16)
    rewrite(new, embed=largest)
    rewrite(old, embed=-largest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda new, old: rewrite(old, embed=None), "'model.embed_tokens.weight' is in NEW"),
        (lambda new, old: rewrite(old, more=torch.ones(2)), "'more' is in OLD"),
        (lambda new, old: rewrite(old, embed=torch.ones(9, 16)), "has shape (64, 16) in NEW and (9, 16) in OLD"),
        (lambda new, old: rewrite(old, embed=torch.ones(64, 16).half()), "has dtype F32 in NEW and F16 in OLD"),
        (untie, "ties its embeddings"),
        (lambda new, old: reconfigure(new, quantization_config={"quant_method": "x"}), "is quantised"),
        (to_adapter, ") is a PEFT adapter and OLD ("),
        (to_pickle, "pickle (pytorch_model.bin)"),
        (lambda new, old: (new / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (truncate, "model.safetensors is damaged"),
        (lose_a_shard, "the checkpoint is incomplete"),
        (leave_the_folder, "no usable weight_map"),
        (lambda new, old: (new / "config.json").write_text("{"), "config.json is not valid JSON"),
        (grow, "'model.embed_tokens.weight': the extrapolation with alpha 0.3 leaves the range of torch.float16"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_refused(
    pair: Pair, tmp_path: Path, damage: Damage, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(*pair)
    assert message in refused(capsys, *pair, "--alpha", 0.3, "-o", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}


@pytest.mark.parametrize("stored_by", ["new", "old"])
def test_a_tied_head_that_only_one_folder_stores(pair: Pair, tmp_path: Path, stored_by: str) -> None:
    """Other tools than transformers write a tied head beside the embedding."""
    expected = extrapolate(weights(pair[0]), weights(pair[1]), 0.3)
    folder = pair[0] if stored_by == "new" else pair[1]
    rewrite(folder, **{"lm_head.weight": weights(folder)["model.embed_tokens.weight"].clone()})
    assert run(*pair, "--alpha", 0.3, "-o", tmp_path / "out") == 0
    found = weights(tmp_path / "out")
    if stored_by == "new":
        assert torch.equal(found.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert_same(found, expected)


def test_a_lone_tensor_that_is_no_copy_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = weights(pair[0])["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    for lone in (head, torch.zeros_like(head)):
        rewrite(pair[0], **{"lm_head.weight": lone})
        assert "'lm_head.weight' is in NEW" in refused(capsys, *pair, "--alpha", 0.3, "-o", tmp_path / "out")


def test_names_in_memory_against_original_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kept iterate of GPT-NeoX beside its base: the message says what to do, and that works."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, max_position_embeddings=64, **sizes)))
    models[0].save_pretrained(tmp_path / "base")
    models[1].save_pretrained(tmp_path / "iterate", save_original_format=False)
    message = refused(capsys, tmp_path / "iterate", tmp_path / "base", "--alpha", 0.3, "-o", tmp_path / "out")
    assert "load both with transformers' from_pretrained and save both with save_pretrained(" in message
    for name in ("iterate", "base"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name} again", save_original_format=False)
    assert run(tmp_path / "iterate again", tmp_path / "base again", "--alpha", 0.3, "-o", tmp_path / "out") == 0
    expected = extrapolate(models[1].state_dict(), models[0].state_dict(), 0.3)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), expected)


def test_float8_is_refused(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in pair:
        rewrite(folder, embed=torch.ones(64, 16).to(torch.float8_e4m3fn))
    assert "has dtype F8_E4M3" in refused(capsys, *pair, "--alpha", 0.3, "-o", tmp_path / "out")


def test_arguments_that_are_refused(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = pair
    out = tmp_path / "out"
    for alpha in ("nan", "inf", "-0.1"):
        assert "`alpha` is" in refused(capsys, new, old, f"--alpha={alpha}", "-o", out)
    assert "neither a folder nor a Hub id" in refused(capsys, tmp_path / "no", old, "--alpha", 0.3, "-o", out)
    # The tests are offline, as a machine without a network is.
    assert "the Hub did not give it" in refused(capsys, "no/such-model", old, "--alpha", 0.3, "-o", out)
    revision = refused(capsys, new, old, "--alpha", 0.3, "-o", out, "--revision-old", "main")
    assert "--revision-old is for Hub ids" in revision
    assert "does not exist: create it" in refused(capsys, new, old, "--alpha", 0.3, "-o", tmp_path / "no" / "out")
    for words in ([new, old, "-o", out], [new, old, "--alph", "0.3", "-o", out], [new, "--alpha", "0.3", "-o", out]):
        with pytest.raises(SystemExit, match="2"):
            run(*words)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_refused(
    pair: Pair, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[kind]()
    assert "exists already" in refused(capsys, *pair, "--alpha", 0.3, "-o", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]


def test_a_full_disk_is_seen_before(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    assert "0.00 GB free" in refused(capsys, *pair, "--alpha", 0.3, "-o", tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_write_leaves_nothing(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = cli._extrapolate_piece, []

    def fail_third(*args: Any) -> float:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(cli, "_extrapolate_piece", fail_third)
    words = (*pair, "--alpha", 0.3, "-o", tmp_path / "out")
    if isinstance(error, OSError):
        assert "No space left" in refused(capsys, *words)
    elif isinstance(error, KeyboardInterrupt):
        assert run(*words) == 130
        assert "was not written" in capsys.readouterr().err
    else:
        with pytest.raises(MemoryError):
            run(*words)
    assert len(calls) >= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_threads_of_torch_are_given_back(pair: Pair, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert run(*pair, "--alpha", 0.3, "-o", tmp_path / "out") == 0
    assert torch.get_num_threads() == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_in_the_middle(pair: Pair, tmp_path: Path) -> None:
    """SIGTERM leaves nothing; SIGKILL, which nobody can catch, at least nothing under the name asked for."""
    code = (
        "import sys, time; from trl_extras.scripts import extrapolate as cli; real = cli._extrapolate_piece\n"
        "def slow(*args):\n    result = real(*args); time.sleep(0.05); return result\n"
        "cli._extrapolate_piece = slow; cli._PIECE_BYTES = 64; sys.exit(cli.main(sys.argv[1:]))"
    )
    processes = {}
    for name in ("SIGTERM", "SIGKILL"):
        words = [str(word) for word in (*pair, "--alpha", 0.3, "-o", tmp_path / name)]
        processes[name] = subprocess.Popen([sys.executable, "-c", code, *words])
    try:
        for name, process in processes.items():
            partial = tmp_path / f".{name}.partial-{process.pid}"
            deadline = time.monotonic() + 120
            while not (partial / "model.safetensors").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(getattr(signal, name))
        assert processes["SIGTERM"].wait(60) == 128 + signal.SIGTERM
        assert processes["SIGKILL"].wait(60) == -signal.SIGKILL
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".SIGKILL.partial-{processes['SIGKILL'].pid}", "new", "old"]


def test_importing_the_command_is_cheap() -> None:
    code = (
        "import sys; from trl_extras.scripts import extrapolate; extrapolate.build_parser().format_help(); "
        "print([m for m in ('torch', 'transformers', 'safetensors', 'huggingface_hub', 'tqdm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
