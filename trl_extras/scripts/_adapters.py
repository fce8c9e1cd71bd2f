"""
`trl-extras extrapolate` for two LoRA adapters of one base.

With `D = s B A` the change that an adapter makes in a layer's weight, the extrapolation step of *accelerated*
preference optimization (arXiv 2410.06293, equation 3.6 on the weights) is one of the changes, because the base is the
same in both: `D_new + alpha * (D_new - D_old) = (1 + alpha) D_new - alpha D_old`. That is again one adapter, exactly,
of rank `r_new + r_old`: the A one below the other, the B side by side, each scaled by its coefficient times its
scaling. So the result's own scaling is 1. A and B extrapolated by themselves would be another matrix.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_extras.low_rank import Factors, concatenate, extrapolate_coefficients, inner_product
from trl_extras.scripts._folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CheckpointError,
    Source,
    read_header,
    read_json,
)
from trl_extras.tensor_files import ADAPTER_STATE_FILE, read_adapter_state


_PICKLE = "adapter_model.bin"

# Fields of an adapter's configuration that say which peft class it is, how large it is and where it goes, or nothing
# about its arithmetic. All others have to be off, those of later versions of peft included.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_REASONS = {
    "use_dora": "DoRA's magnitudes multiply the base's weights: the result is no sum of two changes.",
    "modules_to_save": "modules that were trained whole are no changes of low rank.",
    "trainable_token_indices": "rows of the embedding that were trained whole are no changes of low rank.",
    "lora_bias": "a bias is no change of low rank.",
    "target_parameters": "parameters without a module of their own are not handled.",
    "layer_replication": "replicated layers are not handled.",
}
# Initialisations that leave the base's weights as they are. Others (pissa, olora, loftq, corda, mica, lora_ga) do not,
# or start from a part of them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?:lora_(?P<weight>[AB])\.weight|lora_embedding_(?P<row>[AB]))")


@dataclass(frozen=True)
class _Layer:
    """The change `scaling * b @ a` that an adapter makes in a layer, and how peft stores it."""

    keys: tuple[str, str]  # of A and of B
    a: Tensor  # (rank, inputs), for a convolution (rank, inputs, *kernel)
    b: Tensor  # (outputs, rank), for a convolution (outputs, rank / groups, 1, ...)
    scaling: float

    @property
    def groups(self) -> int:
        return self.a.shape[0] // self.b.shape[1]

    @property
    def change(self) -> Factors:
        """Without the scaling."""
        groups, rank = self.groups, self.b.shape[1]
        return Factors(self.a.reshape(groups, rank, -1), self.b.reshape(groups, -1, rank))


@dataclass(frozen=True)
class _Adapter:
    config: dict[str, Any]
    layers: dict[str, _Layer]
    base: str | None  # the hash of the base's weights, where a run in rounds has left it


@dataclass(frozen=True)
class ExtrapolatedAdapter:
    """What `extrapolate_adapters` makes, in memory."""

    num_tensors: int
    momentum_norm: float
    rank: int
    base_model: str | None
    nbytes: int
    # Both None where the files of NEW are the result.
    tensors: dict[str, Tensor] | None
    config: dict[str, Any] | None
    new: Path

    def save(self, folder: Path) -> None:
        if self.tensors is None:
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
                shutil.copyfile(self.new / name, folder / name)
            return
        save_file(self.tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


@torch.no_grad()
def extrapolate_adapters(new: Source, old: Source, alpha: float) -> ExtrapolatedAdapter:
    """
    The adapter whose change is `D_new + alpha * (D_new - D_old)` in every layer. Reads, computes and checks
    everything; writes nothing.

    In float32 (float64 where a factor is), so that a coefficient times B is rounded once and factors of lower
    precision lose nothing. With alpha 0 the result is NEW's own files.

    Raises:
        CheckpointError: the adapters do not fit each other, or are no plain LoRA.
    """
    adapter_new, adapter_old = _read(new), _read(old)
    _check_same_base(adapter_new, adapter_old, new, old)
    _check_same_structure(adapter_new, adapter_old, new, old)
    momentum_norm = _momentum_norm(adapter_new.layers, adapter_old.layers)
    base_model = adapter_new.config.get("base_model_name_or_path")
    tensors = _sum(adapter_new.layers, adapter_old.layers, alpha) if alpha else None
    config = _config_of_sum(adapter_new, adapter_old) if alpha else None
    if tensors is None:
        nbytes = (new.folder / ADAPTER_WEIGHTS).stat().st_size
    else:
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return ExtrapolatedAdapter(
        num_tensors=2 * len(adapter_new.layers),
        momentum_norm=momentum_norm,
        rank=(config or adapter_new.config)["r"],
        base_model=base_model if isinstance(base_model, str) else None,
        nbytes=nbytes,
        tensors=tensors,
        config=config,
        new=new.folder,
    )


# ---- Reading ----


def _read(source: Source) -> _Adapter:
    config = read_json(source.folder / ADAPTER_CONFIG)
    _check_config(config, source)
    if not (source.folder / ADAPTER_WEIGHTS).is_file():
        if (source.folder / _PICKLE).is_file():
            raise CheckpointError(
                f"{source.name} has its adapter as a pickle ({_PICKLE}), which is not read because it can run code: "
                "convert it with PeftModel.from_pretrained(...).save_pretrained(...)."
            )
        raise CheckpointError(f"{source.name} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}: save the adapter again.")
    read_header(source.folder / ADAPTER_WEIGHTS)  # for its check of a damaged file
    tensors = load_file(source.folder / ADAPTER_WEIGHTS)
    base = None
    if (source.folder / ADAPTER_STATE_FILE).is_file():
        read_header(source.folder / ADAPTER_STATE_FILE)
        # A hash: it tells the base by its weights, not by its name.
        base = read_adapter_state(source.folder / ADAPTER_STATE_FILE).get("base")
    return _Adapter(config, _layers(tensors, config, source), base)


def _check_config(config: dict[str, Any], source: Source) -> None:
    """Refuse what is not two factors a layer on the original base, naming the field."""

    def refuse(field: str, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{source.name} has {field}={json.dumps(config.get(field))} in its {ADAPTER_CONFIG}: {reason} Merge both "
            "adapters into their bases (merge_and_unload, in float32) and extrapolate the models."
        )

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only LoRA adapters are changes of low rank that add up.")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "the base's biases that were trained are no changes of low rank.")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"{source.name} has init_lora_weights={json.dumps(start)} in its {ADAPTER_CONFIG}, which changes the "
            "base's weights (or may do so), so that the adapter is no change of the original base: save it with "
            "peft's path_initial_model_for_weight_conversion, or merge both adapters and extrapolate the models."
        )
    for field, value in config.items():
        if field not in _UNDERSTOOD and value not in (None, False, [], {}):
            raise refuse(field, _REASONS.get(field, "this kind of LoRA is not handled."))
    for field, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(field)
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(
                f"{source.name} has no usable `{field}` in its {ADAPTER_CONFIG}: save the adapter again."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        usable = isinstance(patterns, dict) and all(isinstance(value, (int, float)) for value in patterns.values())
        if not usable or not all(_is_regex(pattern) for pattern in patterns):
            raise CheckpointError(
                f"{source.name} has no usable `{field}` in its {ADAPTER_CONFIG}: save the adapter again."
            )


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _layers(tensors: Mapping[str, Tensor], config: dict[str, Any], source: Source) -> dict[str, _Layer]:
    found: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        # A LoRA layer inside of another one (attention modules of torch) takes its rank by the outer one's name.
        if match is None or ".base_layer." in key or ".modules_to_save." in key:
            raise CheckpointError(
                f"{key!r} in {source.name} is no factor of a LoRA layer: pass an adapter that was saved alone "
                "(save_embedding_layers=False), without weights of the base or modules that were trained whole."
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{key!r} in {source.name} has dtype {tensor.dtype}, which is not extrapolated: save the adapter in "
                "float16, bfloat16, float32 or float64."
            )
        found.setdefault(match["layer"], {})[key] = match["weight"] or match["row"]
    if not found:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS} of {source.name} is empty: save the adapter again, gathered if sharded."
        )
    layers: dict[str, _Layer] = {}
    for name, factors in sorted(found.items()):
        key_a, key_b = sorted(factors)[0], sorted(factors)[-1]
        if [factors[key] for key in sorted(factors)] != ["A", "B"]:
            raise CheckpointError(f"{name!r} in {source.name} has not one A and one B: save the adapter again.")
        a, b = tensors[key_a], tensors[key_b]
        rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
        if not _shapes_fit(a, b) or a.shape[0] != rank:
            raise CheckpointError(
                f"{name!r} in {source.name} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, which are no "
                f"A and B of rank {rank}, its rank by {ADAPTER_CONFIG}: save the adapter again, gathered if sharded."
            )
        numerator = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = numerator / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = _Layer((key_a, key_b), a, b, scaling)
    return layers


def _by_pattern(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """A layer's value by the rule of peft's `get_pattern_key`; to import peft would take longer than all the rest."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return (patterns or {}).get(layer, default)


def _shapes_fit(a: Tensor, b: Tensor) -> bool:
    if a.dim() != b.dim() or a.dim() < 2 or 0 in a.shape or 0 in b.shape:
        return False
    if a.dim() == 2:
        return a.shape[0] == b.shape[1]
    # Only a convolution's second factor has groups, and a kernel of one place.
    rank, outputs, rank_of_group = a.shape[0], b.shape[0], b.shape[1]
    return rank % rank_of_group == 0 and outputs % (rank // rank_of_group) == 0 and set(b.shape[2:]) == {1}


# ---- The pair ----


def _check_same_base(new: _Adapter, old: _Adapter, source_new: Source, source_old: Source) -> None:
    if new.base is not None and old.base is not None:
        if new.base != old.base:
            raise CheckpointError(
                f"NEW ({source_new.name}) and OLD ({source_old.name}) were trained on different bases, by the hash in "
                f"their {ADAPTER_STATE_FILE} (names, shapes, dtypes or values of the base's weights differ): pass two "
                "adapters of one base."
            )
        return
    for field in ("base_model_name_or_path", "revision"):
        value_new, value_old = new.config.get(field), old.config.get(field)
        if value_new and value_old and str(value_new).rstrip("/") != str(value_old).rstrip("/"):
            raise CheckpointError(
                f"{field} is {value_new!r} in NEW ({source_new.name}) and {value_old!r} in OLD ({source_old.name}): "
                "pass two adapters of one base. If both name the same model, write one name into both "
                f"{ADAPTER_CONFIG}."
            )


def _check_same_structure(new: _Adapter, old: _Adapter, source_new: Source, source_old: Source) -> None:
    for name in sorted(new.layers.keys() ^ old.layers.keys()):
        one, other = (source_new, source_old) if name in new.layers else (source_old, source_new)
        here, there = ("NEW", "OLD") if name in new.layers else ("OLD", "NEW")
        raise CheckpointError(
            f"{name!r} has an adapter in {here} ({one.name}) but not in {there} ({other.name}): pass two adapters "
            "with the same target_modules."
        )
    for name, layer in new.layers.items():
        other_layer = old.layers[name]
        same_kind = layer.keys == other_layer.keys and layer.groups == other_layer.groups
        if not same_kind or layer.a.shape[1:] != other_layer.a.shape[1:] or len(layer.b) != len(other_layer.b):
            shapes = [f"{tuple(one.a.shape)} and {tuple(one.b.shape)}" for one in (layer, other_layer)]
            raise CheckpointError(
                f"{name!r} has factors of shape {shapes[0]} in NEW and {shapes[1]} in OLD, which differ in more than "
                "their rank: pass two adapters of one base."
            )


def _momentum_norm(new: dict[str, _Layer], old: dict[str, _Layer]) -> float:
    """`|D_new - D_old|` over all layers, without making any of these matrices."""
    squared = 0.0
    for name, one in new.items():
        other = old[name]
        # One sum for each layer: where both are equal it is 0, not what rounding leaves of the whole model.
        squared += (
            one.scaling * one.scaling * inner_product(one.change, one.change)
            - 2 * one.scaling * other.scaling * inner_product(one.change, other.change)
            + other.scaling * other.scaling * inner_product(other.change, other.change)
        )
    return math.sqrt(max(squared, 0.0))


def _sum(new: dict[str, _Layer], old: dict[str, _Layer], alpha: float) -> dict[str, Tensor]:
    """`(1 + alpha) D_new - alpha D_old`, in peft's shapes and under its names."""
    coefficients = extrapolate_coefficients([1.0, 0.0], [0.0, 1.0], alpha)
    tensors = {}
    for name, layer in new.items():
        pair = (layer, old[name])
        changes = [one.change for one in pair]
        if any(factor.dtype == torch.float64 for change in changes for factor in change):
            changes = [Factors(change.a.double(), change.b.double()) for change in changes]
        a, b = concatenate(changes, [c * one.scaling for c, one in zip(coefficients, pair, strict=True)])
        finite = all(bool(factor.isfinite().all()) for change in changes for factor in change)
        if finite and not bool(b.isfinite().all()):
            raise CheckpointError(
                f"{name!r}: the extrapolation with alpha {alpha} leaves the range of {b.dtype} though both adapters "
                "are finite: use a smaller alpha."
            )
        places, ones = layer.a.shape[1:], layer.b.shape[2:]
        tensors[layer.keys[0]] = a.reshape(-1, *places).contiguous()
        tensors[layer.keys[1]] = b.reshape(-1, b.shape[2], *ones).contiguous()
    return tensors


def _config_of_sum(new: _Adapter, old: _Adapter) -> dict[str, Any]:
    """NEW's configuration with the sum's ranks, and alphas equal to them, so that every layer's scaling is 1."""
    rank = new.config["r"] + old.config["r"]
    ranks = {name: len(layer.a) + len(old.layers[name].a) for name, layer in new.layers.items()}
    # Whole names, each for one layer alone.
    patterns = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    return new.config | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "init_lora_weights": True,
        "eva_config": None,
        "inference_mode": True,
    }
