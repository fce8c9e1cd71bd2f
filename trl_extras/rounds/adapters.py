"""
Rounds with LoRA, exactly: every round trains a fresh adapter on top of what the rounds before have made.

With `D_i = s B_i A_i` the change that round i has trained, every iterate and every policy of a run is `W_0 + sum_i c_i
D_i` (`trl_extras.low_rank` has the arithmetic). Here that sum is kept in three parts:

- the base, which is never written;
- the history, `sum_i c_i D_i` over the rounds that are over: the adapters of those rounds as they were trained, and
  their coefficients. A forward hook on each LoRA layer's `base_layer` adds it, below the adapter, so that TRL's
  reference, which is the model with its adapter disabled, is theta_t;
- the adapter of the round that is trained, one that plain peft made. At a boundary its change joins the history and it
  starts again from the first round's initial values, in place: optimisers keep their parameters.

An extrapolation changes the coefficients, nothing else. Whatever is saved is one adapter, of history and adapter
together, that plain peft loads on the original base; `merge_adapter` and its relatives merge both.

A second peft adapter would not do for the history: disabling the adapter disables that one too, and peft makes it
trainable when it is enabled again.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from peft import LoraConfig, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import set_seed
from transformers.utils import logging

from .. import low_rank, state_dicts
from .._compat import REFERENCE_ADAPTER
from ..errors import ConfigurationError
from ..low_rank import Factors
from ..tensor_files import ADAPTER_STATE_ENTRY, ADAPTER_STATE_FILE, read_adapter_state
from . import sharding
from .state import TrainableState, base_fingerprint, one_thread


_STATE_FORMAT = "trl-extras adapter rounds"

logger = logging.get_logger(__name__)

# Fields of LoraConfig that say how large an adapter is and where it goes, or nothing about its arithmetic.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "eva_config",
}  # fmt: skip
_REASONS = {
    "use_dora": "DoRA reads the base's weights past the history of earlier rounds. Use plain LoRA or rsLoRA.",
    "modules_to_save": "whole modules would be trained, which the sum of the rounds' adapters cannot hold. Leave it "
    "out.",
    "trainable_token_indices": "rows of the embedding would be trained, which the sum of the rounds' adapters cannot "
    "hold. Leave it out; where TRL adds it for new tokens, add those to the base model first.",
    "bias": "the base's biases would be trained, but the base is never written. Use 'none'.",
    "lora_bias": "a bias is no change of low rank. Leave it out.",
    "target_parameters": "those layers have no place for the history of earlier rounds. Name modules instead.",
    "ensure_weight_tying": "tied adapters have no history of their own. Leave it out.",
    "layer_replication": "a saved adapter would fit the replicated layers alone. Leave it out.",
}
# Set on the layers that a history is added to.
_MARK = "trl_extras_history"
# What an adapter of a later round starts from, and what starts a run at the base itself.
_ZERO_STARTS = (True, "gaussian", "eva")
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "mica", "lora_ga")


def why_not(config: Any, passed: bool, fresh: bool) -> tuple[str, str] | None:
    """
    Why rounds cannot have an adapter of this configuration, or None.

    Args:
        passed: the user passes a PeftModel, whose adapter may have any value by now.
        fresh: every round trains a fresh adapter; otherwise one is trained on, and whatever peft saves with it.

    Returns:
        The setting, and the reason with what to do.
    """
    if getattr(config, "peft_type", None) != PeftType.LORA or not isinstance(config, LoraConfig):
        kind = getattr(getattr(config, "peft_type", None), "value", type(config).__name__)
        return f"A PEFT adapter of type {kind}", (
            "rounds add up changes of low rank. Use LoRA, or one round on given rows."
            if fresh
            else "its rounds have been made to work with LoRA alone. Use LoRA, or one round."
        )
    if not fresh:
        return None
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        return (
            f"`init_lora_weights={start!r}`",
            "it changes the base's weights, and the result is to be loaded on the original ones. Use the default.",
        )
    if not passed and start not in _ZERO_STARTS:
        return (
            f"`init_lora_weights={start!r}`",
            "the policy would not start at the base model. Use the default, or 'gaussian'.",
        )
    default = LoraConfig()
    for name, value in vars(config).items():
        if name in _UNDERSTOOD or name.startswith("_") or not hasattr(default, name):
            continue
        if value != getattr(default, name) and value not in (None, False, [], {}):
            reason = _REASONS.get(name, "rounds have not been made to work with it. Leave it out.")
            return f"`{name}` of the LoRA configuration", reason
    return None


def has_history(model: Any) -> bool:
    """Whether an earlier run in rounds has left its history in a model, below an adapter or where one has been."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return any(hasattr(module, _MARK) for module in modules)


def why_not_model(model: Any) -> tuple[str, str] | None:
    """Why rounds cannot train a PeftModel of a user's, whatever its configuration; or None. Returns as `why_not`."""
    own = [name for name in model.peft_config if name != REFERENCE_ADAPTER]
    active = list(model.active_adapters)
    if len(own) != 1 or active != own:
        return (
            f"A PeftModel with the adapters {', '.join(own) or 'none'}, of which {', '.join(active) or 'none'} is "
            "active,",
            "rounds train the only one there is. Delete the others.",
        )
    if own != ["default"]:
        return (
            f"A PeftModel whose adapter is called {own[0]!r}",
            "DPOTrainer looks for one called 'default', and peft saves others in folders of their own. Call it that.",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return (
            "A PeftModel whose adapter is frozen",
            "there is nothing to train. Load it with `is_trainable=True`.",
        )
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            return (
                f"A PeftModel whose adapter is merged into {name}",
                "the base is never written, but holds the adapter now. Pass the model without merging it.",
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f".{own[0]}" not in name:
            return (
                f"{name}, which is trained beside the adapter,",
                "the base is never written. Freeze it, or name its module in `target_modules`.",
            )
    return None


class LoraRounds(TrainableState):
    """
    The policy of rounds with LoRA. Its weights are the base, the history below the adapter, and the adapter.

    Args:
        model: a PeftModel with one LoRA adapter besides TRL's copy of it.
        passed: the adapter is a user's own and may have been trained. Then its value is the run's start: a change of
            its own, which the first round trains on.
        seed: for the initial values of a passed adapter's later rounds.
        num_rounds: for `nbytes`.
    """

    def __init__(self, model: Any, passed: bool, seed: int, num_rounds: int):
        self.model = model
        self._num_rounds = num_rounds
        if reason := why_not_model(model):
            raise ConfigurationError(f"{reason[0]} does not work with rounds: {reason[1]}")
        (self._adapter,) = model.active_adapters
        self._config: LoraConfig = model.peft_config[self._adapter]
        self._layers: dict[str, LoraLayer] = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and self._adapter in module.r:
                self._check_layer(name, module)
                self._layers[name] = module
        self._base = sharding.look_at(model, base_fingerprint)
        self._bases: list[dict[str, Factors]] = []
        self._digests: list[str] = []
        self._below: list[float] = []
        self._reference: list[float] | None = None
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._begun = False
        self._embeddings: list[str] | None = None
        self.output: Output | None = None
        # The whole factors where processes hold parts of them, while one process works by itself.
        self._held: dict[str, Factors] | None = None
        self._held_embeddings: dict[str, Tensor] = {}
        # Changes in the sum that the weights are.
        self._terms = 1
        if sharding.several_processes():
            # What is copied here has to be alike on all processes. DDP sees to that later, when it wraps the model.
            self._set_current(sharding.of_main(_copies(self._current())))
        current = self._current()
        self._has_start = not all(_is_zero(change) for change in current.values())
        if not self._has_start:
            self._initial = _copies(current)
        else:
            if not passed:
                raise ConfigurationError(
                    "The fresh adapter does not start at zero, so that the policy would not start at the base model: "
                    "use the default `init_lora_weights`."
                )
            self._initial = self._fresh(seed)
            # Round 0 trains the adapter itself on; of the start as such its policy has nothing.
            self._append(_copies(current), [0.0])
        self._hooks = {name: _History(layer, self._adapter) for name, layer in self._layers.items()}
        self._handles: list[RemovableHandle] = []
        self._installed = False

    @staticmethod
    def _check_layer(name: str, layer: Any) -> None:
        plain = hasattr(layer, "lora_A") and not layer.lora_variant and hasattr(layer.base_layer, "forward")
        if not plain or type(layer).__name__ in ("ParamWrapper", "MultiheadAttention"):
            raise ConfigurationError(
                f"{name} is a LoRA layer of type {type(layer).__name__}, which rounds have not been made to work "
                "with: leave it out of `target_modules`."
            )
        if getattr(layer.get_base_layer(), "max_norm", None) is not None:
            raise ConfigurationError(
                f"{name} is an embedding with `max_norm`, which writes to its weights as they are read, but rounds "
                "keep the base and the history as they are: leave it out of `target_modules`."
            )

    # ---- The live parts ----

    def _current(self) -> dict[str, Factors]:
        """The adapter's factors: views of its parameters, or, where those are sharded, gathered copies."""
        if self._held is not None:
            return self._held
        sharding.settle(self.model)
        return {name: _factors_of(layer, self._adapter) for name, layer in self._layers.items()}

    def _current_of(self, name: str) -> Factors:
        return _factors_of(self._layers[name], self._adapter) if self._held is None else self._held[name]

    @contextmanager
    def held(self) -> Iterator[None]:
        before = self._held
        if before is None and self.sharded:
            self._held_embeddings = self._resized_embeddings()
            self._held = _copies(self._current())
        try:
            yield
        finally:
            self._held = before

    def _fresh(self, seed: int) -> dict[str, Factors]:
        """Initial values as peft draws them, with nothing else disturbed."""
        kept = _copies(self._current())
        start = self._config.init_lora_weights
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            set_seed(seed)
            for layer in self._layers.values():
                layer.reset_lora_parameters(self._adapter, start if start in (True, "gaussian") else True)
        random.setstate(states[0])
        np.random.set_state(states[1])
        fresh = _copies(self._current())
        self._set_current(kept)
        return fresh

    @torch.no_grad()
    def _set_current(self, values: dict[str, Factors]) -> None:
        sharding.settle(self.model)
        for name, layer in self._layers.items():
            _write_factors(layer, self._adapter, values[name])
        sharding.publish(self.model)

    def _trains_passed(self) -> bool:
        """Whether this is the round in which an adapter that the user passed is trained on."""
        return self._has_start and len(self._bases) == 1

    def _drop_reference_adapter(self) -> None:
        if REFERENCE_ADAPTER in self.model.peft_config:
            self.model.delete_adapter(REFERENCE_ADAPTER)

    def _append(self, change: dict[str, Factors], below: list[float]) -> None:
        digest = xxhash.xxh3_128()
        for factors in change.values():
            for tensor in factors:
                digest.update(_bytes(tensor))
        self._bases.append(change)
        self._digests.append(digest.hexdigest())
        self._below = below

    def _vector(self) -> list[float]:
        """The weights' coefficients over the history's changes and, last, the adapter's own."""
        current = self._current()
        if _equal(current, self._initial):
            vector = list(self._below)
        elif self._trains_passed() and _equal(current, self._bases[0]):
            vector = [1.0]
        else:
            vector = [*self._below, 1.0]
        self._terms = max(sum(c != 0 for c in vector), 1)
        return vector

    def _install(self) -> None:
        """Bring the hooks up to date with the history, and put them in place where there is one."""
        if not self._installed:
            if not any(self._below) and self._reference is None and self.output is None:
                return
            self._installed = True
            for name, layer in self._layers.items():
                self._handles.append(layer.base_layer.register_forward_hook(self._hooks[name]))
                setattr(layer.base_layer, _MARK, True)
                layer.get_delta_weight = types.MethodType(_delta_with_history, self._hooks[name])
            # Bound to this object, so that a copy of the model has a copy of it.
            self.model.save_pretrained = types.MethodType(_save_pretrained, self)
            for way in ("unload", "merge_and_unload"):
                setattr(self.model.base_model, way, functools.partial(self._unload, way))
        for name, layer in self._layers.items():
            hook, (device, dtype) = self._hooks[name], self._place(layer)
            hook.policy = self._sum(name, self._below, device, dtype)
            hook.has_reference = self._reference is not None
            hook.reference = self._sum(name, self._reference or [], device, dtype)

    def _unload(self, way: str, *args: Any, **kwargs: Any) -> Any:
        """peft's `unload` or `merge_and_unload`: the plain model that it leaves has no business with the history."""
        tuner = self.model.base_model
        plain = getattr(type(tuner), way)(tuner, *args, **kwargs)
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            if hasattr(layer.base_layer, _MARK):
                delattr(layer.base_layer, _MARK)
        return plain

    def _place(self, layer: LoraLayer) -> tuple[torch.device, torch.dtype]:
        weight = _weights_of(layer, self._adapter)[0]
        return weight.device, weight.dtype

    def _sum(self, name: str, vector: Sequence[float], device: Any = None, dtype: Any = None) -> Factors | None:
        """`sum_i c_i D_i` of a layer in peft's shapes, or None where it is nothing."""
        if not any(vector):
            return None
        layer = self._layers[name]
        changes = [basis[name] for basis in self._bases]
        if len(vector) > len(changes):
            changes.append(self._current_of(name))
        changes = [Factors(change.a.detach().cpu(), change.b.detach().cpu()) for change in changes]
        scaling = layer.scaling[self._adapter]
        whole = low_rank.concatenate(changes, [c * scaling for c in low_rank.pad(vector, len(changes))])
        return _peft_shapes(layer, self._adapter, Factors(*(t.to(device=device, dtype=dtype) for t in whole)))

    # ---- TrainableState ----

    @property
    def nbytes(self) -> int:
        tensors = [weight for layer in self._layers.values() for weight in _weights_of(layer, self._adapter)]
        sizes = [(sharding.shape_of(tensor).numel(), sharding.dtype_of(tensor).itemsize) for tensor in tensors]
        own = sum(elements * size for elements, size in sizes)
        whole = sum(elements * max(size, 4) for elements, size in sizes)
        # The concatenation, and the rounds' own adapters with the initial values beside it; at the end of the run.
        return whole * (self._num_rounds + 1) + own * (self._num_rounds + 2)

    def begin(self, fresh: bool) -> None:
        """Where a run has been before, the policy that it ended with is this one's start."""
        self.output = None
        if fresh:
            if self._begun:
                self.rebase()
            self._begun = True

    def holds_state(self, folder: Path) -> bool:
        # With one round the parent takes a stock trainer's checkpoint too; a run in rounds is told that it is none.
        return self._num_rounds > 1 or (folder / ADAPTER_STATE_FILE).is_file()

    def rebase(self, hold_reference: bool = False) -> bool:
        """
        What the adapter has become joins the history, and the adapter is a fresh one: the same policy, whose
        reference (the adapter disabled) it is now itself.

        Args:
            hold_reference: the reference stays what it was.
        """
        # In the round that trains a passed adapter on, the reference is its start, of which TRL has a copy.
        before = [1.0] if self._trains_passed() else list(self._below)
        vector = low_rank.pad(self._vector(), len(self._bases) + 1)
        self._append(_copies(self._current()), vector)
        # One that is held already is what the last round was trained against.
        held = self._reference if self._reference is not None else before
        self._reference = held if hold_reference else None
        self._drop_reference_adapter()
        self._set_current(self._initial)
        self._install()
        return True

    @one_thread
    def extrapolate(self, previous: Path, alpha: float) -> None:
        """As for full weights, on the coefficients; the adapter has just been rebased."""
        self._below = low_rank.extrapolate_coefficients(self._below, self._read_vector(previous), alpha)
        self._install()

    @one_thread
    def distances(self, policy: Path, iterate: Path, previous_policy: Path | None) -> dict[str, float | None]:
        now, theta, thetahat = self._vector(), self._read_vector(policy), self._read_vector(iterate)
        gram = self._gram_with_current()
        size = len(gram)

        def minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
            return [a - b for a, b in zip(low_rank.pad(left, size), low_rank.pad(right, size), strict=True)]

        def squared(vector: list[float]) -> float:
            return max(low_rank.product_under(gram, vector, vector), 0.0)

        update = minus(now, theta)
        cosine = None
        if previous_policy is not None:
            before = minus(thetahat, self._read_vector(previous_policy))
            product = low_rank.product_under(gram, update, before)
            cosine = state_dicts.cosine(product, squared(update), squared(before))
        return {
            "update_norm": math.sqrt(squared(update)),
            "momentum_norm": math.sqrt(squared(minus(now, thetahat))),
            "update_cosine": cosine,
        }

    def _gram_with_current(self) -> Tensor:
        """Inner products of the history's changes and, last, the adapter's, with each layer's scaling in them."""
        scalings = {name: layer.scaling[self._adapter] for name, layer in self._layers.items()}

        def scaled(change: dict[str, Factors]) -> dict[str, Factors]:
            return {
                name: Factors(f.a.detach().cpu(), f.b.detach().cpu() * scalings[name]) for name, f in change.items()
            }

        changes = [scaled(basis) for basis in self._bases]
        known = len(self._gram)
        whole = torch.zeros(len(changes) + 1, len(changes) + 1, dtype=torch.float64)
        whole[:known, :known] = self._gram
        changes.append(scaled(self._current()))
        for row in range(known, len(changes)):
            for column in range(row + 1):
                total = math.fsum(low_rank.inner_product(changes[row][n], changes[column][n]) for n in self._layers)
                whole[row, column] = whole[column, row] = total
        # The adapter goes on changing; the history does not.
        self._gram = whole[:-1, :-1].clone()
        return whole

    @property
    def base(self) -> str:
        return self._base

    def _scalings(self) -> dict[str, float]:
        return {name: float(layer.scaling[self._adapter]) for name, layer in self._layers.items()}

    def fingerprint(self) -> str:
        parts = [self._base, self._below, self._digests, self._scalings()]
        digest = xxhash.xxh3_128(json.dumps(parts).encode())
        for change in self._current().values():
            for tensor in change:
                digest.update(_bytes(tensor))
        return digest.hexdigest()

    def non_finite(self) -> str | None:
        for name, change in self._current().items():
            for factor, tensor in zip(("A", "B"), change, strict=True):
                if not bool(tensor.isfinite().all()):
                    return f"{name}.lora_{factor}"
        return None if all(math.isfinite(c) for c in self._below) else "the sum of the rounds' changes"

    def save(self, folder: Path, write: bool) -> None:
        """A folder that plain peft loads on the original base, with what going on from it takes."""
        with self.held():
            if not write:
                return
            folder.mkdir(parents=True, exist_ok=True)
            self._write_adapter(folder)
            # peft's card tells where the base lies on this machine; kept iterates may be handed on.
            (folder / "README.md").unlink(missing_ok=True)
            self.save_state(folder)

    def save_state(self, folder: Path) -> None:
        """The parts apart, in one file: what a resume needs and the concatenation does not tell."""
        tensors: dict[str, Tensor] = {}
        parts = {"initial": self._initial, "adapter": self._current()}
        parts |= {f"history.{index}": change for index, change in enumerate(self._bases)}
        for part, change in parts.items():
            for name, factors in change.items():
                for factor, tensor in zip("ab", factors, strict=True):
                    tensors[f"{part}.{factor}.{name}"] = tensor.detach().cpu().contiguous().clone()
        about = {
            "format": _STATE_FORMAT,
            "version": 1,
            "base": self._base,
            "scalings": self._scalings(),
            "has_start": self._has_start,
            "num_history": len(self._bases),
            "below": self._below,
            "reference": self._reference,
            "vector": self._vector(),
        }
        # In one entry: several would come in an order of their own each time, and equal states in other bytes.
        save_file(tensors, folder / ADAPTER_STATE_FILE, metadata={ADAPTER_STATE_ENTRY: json.dumps(about)})

    def load(self, folder: Path) -> None:
        about = self.check(folder)
        with safe_open(folder / ADAPTER_STATE_FILE, framework="pt") as file:

            def part(name: str) -> dict[str, Factors]:
                return {
                    layer: Factors(file.get_tensor(f"{name}.a.{layer}"), file.get_tensor(f"{name}.b.{layer}"))
                    for layer in self._layers
                }

            history = [part(f"history.{index}") for index in range(about["num_history"])]
            self._initial, current = part("initial"), part("adapter")
        self._bases, self._digests = [], []
        for change in history:
            self._append(change, [])
        self._below = about["below"]
        self._reference = about["reference"]
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._has_start = about["has_start"]
        start = self._bases[0] if self._has_start else self._initial
        if len(self._bases) > int(self._has_start):
            self._drop_reference_adapter()
        elif REFERENCE_ADAPTER in self.model.peft_config:
            # Of the model that has been passed now, which need not have the adapter that the run began with.
            for name, layer in self._layers.items():
                _write_factors(layer, REFERENCE_ADAPTER, start[name])
            sharding.publish(self.model)
        elif self._has_start:
            # An earlier run of this trainer has dropped TRL's copy of the start.
            self._reference = [1.0]
        self._set_current(current)
        self._begun = True
        # A run goes on, whose checkpoints show adapters, after one of this object may have ended with something else.
        self.output = None
        self._install()

    def check(self, folder: Path) -> dict[str, Any]:
        """
        Check that a saved state is one of this model. Returns what its file says of it.

        Raises:
            ConfigurationError: another base, or an adapter of another structure.
        """
        path = folder / ADAPTER_STATE_FILE
        if not path.is_file():
            raise ConfigurationError(
                f"{folder.name} holds no adapter of a run in rounds ({ADAPTER_STATE_FILE} is missing): use another."
            )
        about = read_adapter_state(path)
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if about.get("format") != _STATE_FORMAT or about.get("version") != 1:
                raise ConfigurationError(
                    f"{path.name} in {folder.name} is of another version: use another checkpoint."
                )
            own = {
                f"adapter.{factor}.{name}": tuple(tensor.shape)
                for name, change in self._current().items()
                for factor, tensor in zip("ab", change, strict=True)
            }
            saved = {name for name in names if name.startswith("adapter.")}
            for name in sorted(own.keys() ^ saved):
                where = "in memory" if name in own else "there"
                raise ConfigurationError(
                    f"The adapter in {folder.name} is of another structure: {name.split('.', 2)[2]} is adapted "
                    f"{where} only. Use the `target_modules` that it was made with."
                )
            for name, shape in own.items():
                there = tuple(file.get_slice(name).get_shape())
                if there != shape:
                    raise ConfigurationError(
                        f"The adapter in {folder.name} is of another structure: {name.split('.', 2)[2]} has factors "
                        f"of shape {there} there and {shape} in memory. Use the rank that it was made with."
                    )
        for name, scaling in self._scalings().items():
            if about["scalings"].get(name) != scaling:
                raise ConfigurationError(
                    f"The adapter in {folder.name} is of another structure: {name} has a scaling of "
                    f"{about['scalings'].get(name)} there and {scaling} in memory. Use the `lora_alpha` and "
                    "`use_rslora` that it was made with."
                )
        if about["base"] != self._base:
            raise ConfigurationError(
                f"The model below the adapter is not the one that the adapter in {folder.name} was trained on (names, "
                "shapes, dtypes or values of its weights differ): load that model, in the same dtype."
            )
        return about

    @staticmethod
    def _read_vector(folder: Path) -> list[float]:
        vector: list[float] = read_adapter_state(folder / ADAPTER_STATE_FILE)["vector"]
        return vector

    def copy_to(self, reference: torch.nn.Module) -> None:
        raise TypeError("An adapter's reference is the model with the adapter disabled: there is none to copy to.")

    def load_into(self, reference: torch.nn.Module, folder: Path) -> None:
        raise TypeError("An adapter's reference is the model with the adapter disabled: there is none to load.")

    @property
    def has_reference(self) -> bool:
        return True

    # ---- What is saved ----

    @property
    def trained_on(self) -> bool:
        """Whether the first round trained an adapter on that a user had passed."""
        return self._has_start

    @property
    def largest_rank(self) -> int:
        """The largest rank that a layer of the saved adapter has."""
        self._vector()
        return self._terms * max(layer.r[self._adapter] for layer in self._layers.values())

    @property
    def rank(self) -> int:
        """The rank of the adapter that is saved, where no pattern says otherwise."""
        # A card is written by one process, which cannot look at sharded weights alone: as they were last seen.
        if not self.sharded or self._held is not None:
            self._vector()
        return self._config.r * self._terms

    def _whole(self) -> tuple[dict[str, Factors], LoraConfig]:
        """History and adapter as one: the layers' factors in peft's shapes, and the configuration that fits them."""
        vector, config = self._vector(), copy.deepcopy(self._config)
        used = sum(c != 0 for c in vector)
        if not any(self._below) and used <= 1:
            # The adapter alone, as peft itself would save it.
            return {n: _peft_shapes(self._layers[n], self._adapter, f) for n, f in self._current().items()}, config
        return self._summed(vector), _with_scaling_inside(
            config, config.r * used, {key: rank * used for key, rank in (config.rank_pattern or {}).items()}
        )

    def _summed(self, vector: Sequence[float]) -> dict[str, Factors]:
        summed = {name: self._sum(name, vector) for name in self._layers}
        return {name: factors for name, factors in summed.items() if factors is not None}

    def check_rank(self, rank: int) -> None:
        """Raise a ConfigurationError if no adapter of this structure has that rank."""
        for name, change in self._current().items():
            if rank % len(change.a):
                raise ConfigurationError(
                    f"`adapter_rank` is {rank}, but {name} is a convolution of {len(change.a)} groups, which share "
                    "its rank: use a multiple of that number."
                )

    def check_merge(self) -> None:
        """Raise a ConfigurationError if the sum cannot be written into the base's weights."""
        base = self.model.get_base_model()
        if getattr(base, "is_quantized", False):
            # Only the loaded model tells where its files are quantized.
            raise ConfigurationError(
                "`adapter_output` is 'merged', but the base is quantized, and merging into it would round the change "
                "away: save the adapter, and merge it into the original weights with peft."
            )
        names: dict[int, list[str]] = {}
        for name, parameter in base.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
        for name, layer in self._layers.items():
            own = name.removeprefix("base_model.model.")
            others = [other for other in names[id(layer.get_base_layer().weight)] if other != f"{own}.weight"]
            if others:
                raise ConfigurationError(
                    f"`adapter_output` is 'merged', but the adapter changes {name}, whose weight {others[0]} shares: "
                    "merged, it would change that too. Save the adapter, or untie the weights first."
                )
            if (groups := getattr(layer.get_base_layer(), "groups", 1)) > 1:
                raise ConfigurationError(
                    f"`adapter_output` is 'merged', but {name} is a convolution of {groups} groups, whose weight has "
                    "no place for its adapter's change, which mixes them: save the adapter, or leave the layer out "
                    "of `target_modules`."
                )

    @one_thread
    def truncated(self, rank: int) -> tuple[dict[str, Factors], LoraConfig, float]:
        """
        The adapter of at most `rank` that is nearest to the whole one, layer by layer in the Frobenius norm.

        Returns:
            The factors in peft's shapes, their configuration, and the relative error of the weights' change.
        """
        left_out = whole = 0.0
        result = {}
        for name, shapes in self._summed(self._vector()).items():
            layer = self._layers[name]
            change = _canonical(layer, self._adapter, shapes)
            near, squared_error, squared_norm = low_rank.truncate(change, rank // len(change.a))
            left_out, whole = left_out + squared_error, whole + squared_norm
            missing = rank // len(change.a) - near.a.shape[1]
            near = Factors(functional.pad(near.a, (0, 0, 0, missing)), functional.pad(near.b, (0, missing)))
            result[name] = _peft_shapes(layer, self._adapter, near)
        config = _with_scaling_inside(copy.deepcopy(self._config), rank, {})
        return result, config, math.sqrt(left_out / whole) if whole else 0.0

    def set_output(self, rank: int | None, merged: bool) -> None:
        """What `save_pretrained` of the model writes from now on, instead of history and adapter as one adapter."""
        self.output = Output(rank, merged)
        self._install()

    def _write_adapter(self, folder: Path, rank: int | None = None, **kwargs: Any) -> None:
        """peft's own files, of history and adapter as one, truncated if a `rank` is given."""
        if rank is None:
            factors, config = self._whole()
        else:
            factors, config, _ = self.truncated(rank)
        state = {}
        for name, change in factors.items():
            for key, tensor in _keys(self._layers[name], self._adapter, change).items():
                state[f"{name}.{key}"] = tensor.detach().cpu().contiguous().clone()
        live = self.model.peft_config[self._adapter]
        self.model.peft_config[self._adapter] = config
        try:
            embeddings = self._resized_embeddings()
            kwargs |= {"selected_adapters": [self._adapter], "save_embedding_layers": bool(embeddings)}
            kwargs["state_dict"] = state | embeddings
            type(self.model).save_pretrained(self.model, str(folder), **kwargs)
        finally:
            self.model.peft_config[self._adapter] = live

    def _resized_embeddings(self) -> dict[str, Tensor]:
        """The base's embeddings where peft saves them beside an adapter: somebody has resized them after loading."""
        if self._held is not None:
            return self._held_embeddings
        if self._embeddings is None:
            # Once: peft may ask the Hub for the vocabulary that the base came with.
            stock: dict[str, Tensor] = {}
            if not any(self._adapter in layer.lora_embedding_A for layer in self._layers.values()):
                # Else peft would save them because they are adapted; no base weight has changed.
                stock = get_peft_model_state_dict(self.model, adapter_name=self._adapter)
            self._embeddings = [name for name in stock if "lora_" not in name]
        state = self.model.state_dict(keep_vars=True) if self._embeddings else {}
        return {name: sharding.whole(state[name]).cpu() for name in self._embeddings}

    def _write_merged(self, folder: Path) -> None:
        """The whole model with history and adapter in its weights, in float32, as transformers saves one."""
        base, vector = self.model.get_base_model(), self._vector()
        rank = self.output.rank if self.output is not None else None
        merged_factors = self.truncated(rank)[0] if rank is not None else None
        own = {f".{kind}." for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")}
        prefix = "base_model.model."
        state: dict[str, Tensor] = {}
        for name, tensor in base.state_dict().items():
            if any(kind in name for kind in own):
                continue
            merged = tensor.detach().cpu()
            state[name.replace(".base_layer.", ".")] = merged.float() if merged.is_floating_point() else merged
        for name, layer in self._layers.items():
            # A policy that is the base has no factors.
            shapes = merged_factors.get(name) if merged_factors is not None else self._sum(name, vector)
            if shapes is not None:
                key = f"{name.removeprefix(prefix)}.weight"
                state[key] = state[key] + _delta(layer, self._adapter, shapes).cpu()
        base.save_pretrained(str(folder), state_dict=state)
        # transformers writes the dtype of the model in memory.
        path = folder / "config.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        about["dtype"] = "float32"
        about.pop("torch_dtype", None)
        path.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for stale in ("adapter_model.safetensors", "adapter_config.json"):
            # Of an earlier run in this folder; transformers would load it on top.
            (folder / stale).unlink(missing_ok=True)


class Output(NamedTuple):
    """What a run in rounds leaves: one adapter, of a `rank` at most if that is given, or the whole model `merged`."""

    rank: int | None = None
    merged: bool = False


class _History:
    """
    The forward hook on a LoRA layer's `base_layer` that adds the history to the layer's output, in peft's order of
    operations, without dropout.
    """

    def __init__(self, layer: Any, adapter: str):
        self.layer, self.adapter = layer, adapter
        self.policy: Factors | None = None
        # What the disabled adapter leaves, where that is something else.
        self.has_reference = False
        self.reference: Factors | None = None

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        layer = self.layer
        disabled = self.has_reference and layer.disable_adapters
        factors = self.reference if disabled else self.policy
        # Where the adapter is merged, so is the history (`_delta_with_history`).
        if factors is None or layer.merged:
            return output
        x = args[0]
        if factors.a.device != x.device:
            factors = Factors(*(tensor.to(x.device) for tensor in factors))
            if disabled:
                self.reference = factors
            else:
                self.policy = factors
        a, b = factors
        if self.adapter in layer.lora_embedding_A:
            own = layer.get_base_layer()
            low = functional.embedding(
                x, a.T, own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq, own.sparse
            )
            added = low @ b.T
            scale = getattr(own, "embed_scale", None)
            if isinstance(scale, (int, float)):
                # In the weight's dtype, as peft takes it.
                scale = torch.tensor(scale, dtype=own.weight.dtype, device=x.device)
            return (output + (added if scale is None else added * scale.to(added.dtype))).to(output.dtype)
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast:
            x = x.to(a.dtype)
        if a.dim() > 2:
            first, second = layer.lora_A[self.adapter], layer.lora_B[self.adapter]
            convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[a.dim() - 3]
            low = convolve(x, a, None, first.stride, first.padding, first.dilation, first.groups)
            added = convolve(low, b, None, second.stride, second.padding, second.dilation, second.groups)
            return (output + added).to(output.dtype)
        low = functional.linear(x, a)
        if output.dtype == low.dtype and output.dim() > 1:
            # One pass and one tensor fewer than the product and then the sum.
            flat = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b.T)
            return flat.view(output.shape)
        return (output + functional.linear(low, b)).to(output.dtype)


def _delta_with_history(hook: _History, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
    """`get_delta_weight` of a LoRA layer: peft merges by it, and history and adapter have to go together."""
    own = type(hook.layer).get_delta_weight(hook.layer, adapter, *args, **kwargs)
    if adapter != hook.adapter or hook.policy is None:
        return own
    return own + _delta(hook.layer, adapter, hook.policy).to(own.device, own.dtype)


def _delta(layer: Any, adapter: str, factors: Factors) -> Tensor:
    """The change of a layer's weight that factors in peft's shapes make, in the layout of that weight."""
    holders = (layer.lora_embedding_A, layer.lora_embedding_B)
    scaling = layer.scaling[adapter]
    layer.scaling[adapter] = 1.0
    wrapped = [torch.nn.Parameter(tensor, requires_grad=False) for tensor in factors]
    try:
        if adapter in layer.lora_embedding_A:
            own = [holder[adapter] for holder in holders]
            for holder, tensor in zip(holders, wrapped, strict=True):
                holder[adapter] = tensor
            try:
                return type(layer).get_delta_weight(layer, adapter)
            finally:
                for holder, tensor in zip(holders, own, strict=True):
                    holder[adapter] = tensor
        modules = (layer.lora_A[adapter], layer.lora_B[adapter])
        own = [module.weight for module in modules]
        for module, tensor in zip(modules, wrapped, strict=True):
            module.weight = tensor
        try:
            return type(layer).get_delta_weight(layer, adapter)
        finally:
            for module, tensor in zip(modules, own, strict=True):
                module.weight = tensor
    finally:
        layer.scaling[adapter] = scaling


def _save_pretrained(self: LoraRounds, save_directory: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
    """
    `save_pretrained` of a model with a history: its adapter alone would be another policy. Takes what peft's takes;
    which adapter, and that no base weight comes with it, is settled.
    """
    folder = Path(save_directory)
    for name in ("state_dict", "selected_adapters", "save_embedding_layers"):
        kwargs.pop(name, None)
    if self.output is not None and self.output.merged:
        if kwargs.get("is_main_process", True):
            folder.mkdir(parents=True, exist_ok=True)
            self._write_merged(folder)
        return
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        logger.warning(
            f"{folder.name} holds a whole model, beside which an adapter is saved now: transformers would load one on "
            "top of the other. Remove that model, or save to another folder."
        )
    rank = None if self.output is None else self.output.rank
    self._write_adapter(folder, rank, safe_serialization=safe_serialization, **kwargs)


# ---- peft's layouts ----


def _factors_of(layer: Any, adapter: str) -> Factors:
    """The factors of a layer's adapter, without the scaling: views of its parameters unless those are sharded."""
    return _canonical(layer, adapter, Factors(*(sharding.whole(weight) for weight in _weights_of(layer, adapter))))


def _write_factors(layer: Any, adapter: str, values: Factors) -> None:
    """Put whole factors into the parameters of a layer's adapter, or into what this process holds of them."""
    for weight, value in zip(_weights_of(layer, adapter), values, strict=True):
        # Canonical factors have the parameters' elements in the same order.
        sharding.write_(weight, value)


def _weights_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The parameters of a layer's adapter, A and B."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _groups(layer: Any, adapter: str) -> int:
    return 1 if adapter in layer.lora_embedding_A else getattr(layer.lora_B[adapter], "groups", 1)


def _canonical(layer: Any, adapter: str, shapes: Factors) -> Factors:
    """peft's shapes as (groups, rank, inputs) and (groups, outputs, rank)."""
    a, b = shapes
    groups = _groups(layer, adapter)
    return Factors(a.reshape(groups, a.shape[0] // groups, -1), b.reshape(groups, b.shape[0] // groups, b.shape[1]))


def _peft_shapes(layer: Any, adapter: str, change: Factors) -> Factors:
    a, b = change
    shape = sharding.shape_of(_weights_of(layer, adapter)[0])
    if adapter in layer.lora_embedding_A or len(shape) == 2:
        return Factors(a[0], b[0])
    places = shape[1:]
    return Factors(a.reshape(-1, *places), b.reshape(-1, b.shape[2], *[1] * (len(places) - 1)))


def _keys(layer: Any, adapter: str, factors: Factors) -> dict[str, Tensor]:
    """The entries of a state dict, after the layer's name."""
    if adapter in layer.lora_embedding_A:
        return {f"lora_embedding_A.{adapter}": factors.a, f"lora_embedding_B.{adapter}": factors.b}
    return {f"lora_A.{adapter}.weight": factors.a, f"lora_B.{adapter}.weight": factors.b}


def _with_scaling_inside(config: LoraConfig, rank: int, pattern: dict[str, int]) -> LoraConfig:
    """A configuration whose layers have a scaling of 1, because their factors have it in them."""
    config.r = config.lora_alpha = rank
    config.use_rslora = False
    config.init_lora_weights = True
    config.rank_pattern, config.alpha_pattern = dict(pattern), dict(pattern)
    return config


def _copies(changes: dict[str, Factors]) -> dict[str, Factors]:
    return {name: Factors(*(t.detach().cpu().clone() for t in change)) for name, change in changes.items()}


def _equal(first: dict[str, Factors], second: dict[str, Factors]) -> bool:
    return all(
        torch.equal(one.cpu(), other) for name in first for one, other in zip(first[name], second[name], strict=True)
    )


def _is_zero(change: Factors) -> bool:
    return not bool(change.a.any()) or not bool(change.b.any())


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
