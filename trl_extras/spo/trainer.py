"""
Stable Preference Optimization (arXiv 2507.07723), as a subclass of TRL's DPOTrainer.

| symbol (`docs/spo.md`) | here |
|---|---|
| L_pref, the upper level | the parent's loss, with any of its losses, and those of `losses.py` |
| gap, the lower level's distance from its floor | `objective.py` |
| lambda, epsilon, eta | `sft_coef`, `sft_tolerance`, `inner_learning_rate` |
| theta' = theta - eta * grad L_SFT(theta) | `_move_inside`, with the steps of `inner.py` |

The parent's loss is not copied: a callable stands in for the model, hands the call on and keeps the log-probabilities.
"""

from __future__ import annotations

import contextlib
import copy
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging
from trl import DPOTrainer

from ..errors import ConfigurationError
from ..own_loss import OwnLoss, refuse_override
from ..reference import copy_into_reference, mover_of_reference, with_reference
from ..rounds import sharding
from ..rounds.saving import WholeCheckpoints, asked_for, fsdp_version
from . import inner, losses, objective
from .config import OWN_LOSSES, REFERENCE, SPOConfig
from .floor import Floor, model_fingerprint
from .sft_data import IGNORED, SFTRows, load_rows, processing_class_of


logger = logging.get_logger(__name__)

# Beside the run and in every checkpoint; upstream leaves out of uploads what begins with "_".
_FOLDER = "_spo"
_OPTIMUM_FILE = "sft_optimum.safetensors"
# More than this share of displaced pairs in one logging window is worth a word.
_MANY_DISPLACED = 0.5


class _Forward:
    """Stands in for a model: hands calls on, keeps the first one's output, and then calls `after` once."""

    def __init__(self, model: Any, after: Any):
        self.model, self.after = model, after
        self.outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        if self.outputs is None:
            self.outputs = outputs
            self.after()
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Window:
    """The micro-batches of one optimizer step on this process, and what belongs to them together."""

    def __init__(self, batches: list[Any]):
        self.batches = batches
        self.position = 0
        # The weights that inner steps move, and what they were before, while the live ones are elsewhere.
        self.weights: list[Tensor] = []
        self.saved: list[Tensor] | None = None
        # By source, where one hinge spans several micro-batches: whether it is active, and the tokens of all.
        self.totals: dict[str, tuple[bool, Tensor]] = {}
        # By micro-batch: the reference's log-probabilities of chosen and rejected, where they are known already.
        self.references: dict[int, tuple[Tensor, Tensor]] = {}
        # By micro-batch: the SFT rows on the device, where they have been used already.
        self.sft: dict[int, dict[str, Tensor]] = {}


class _FloorAtStart(TrainerCallback):
    """Computes the floor of the SFT dataset when the model has been sharded, before it is trained."""

    def __init__(self, trainer: SPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._spo_floor is None:
            self.trainer._spo_floor = self.trainer._initial_floor()


class SPOTrainer(WholeCheckpoints, DPOTrainer):
    """
    Trainer for Stable Preference Optimization: preference learning above a floor for the likelihood of what the model
    shall keep (arXiv 2507.07723).

    The objective is [`~trl.DPOTrainer`]'s loss plus `sft_coef` times the gap by which the chosen responses, rows of an
    SFT dataset, or both have fallen below what the reference gives them; above the floor it adds nothing. Takes
    exactly the arguments of [`~trl.DPOTrainer`]; `args` is an [`SPOConfig`].

    Args:
        sft_dataset ([`~datasets.Dataset`], *optional*):
            Rows whose likelihood is to be kept, in any format that [`~trl.SFTTrainer`] takes. Wins over the config's
            `sft_dataset_name`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_extras import SPOConfig, SPOTrainer

    >>> trainer = SPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=SPOConfig("out", sft_coef=1.0),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ...     sft_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = SPOConfig
    loss_types: list[str]
    loss_weights: list[float]
    precompute_ref_logps: bool
    _tag_names = ["trl", "dpo", "stable-preference-optimization"]  # noqa: RUF012
    _name = "SPO"
    _paper = {  # noqa: RUF012
        "title": "Stable Preference Optimization: A Bilevel Approach to Catastrophic Preference Shift",
        "id": "2507.07723",
        "citation": textwrap.dedent("""\
            @article{jian2025stable,
                title  = {{Stable Preference Optimization: A Bilevel Approach to Catastrophic Preference Shift}},
                author = {Chengtao Jian and Kai Yang and Tianhao Gao and Wuguang Ni and Keying Yang and Bowen Xiao and
                          Jiajun Liu and Ye Ouyang},
                year   = 2025,
                eprint = {arXiv:2507.07723},
            }"""),
    }

    # For the card of a method that is built over this one and names another paper first.
    _spo_paper = _paper

    def __init__(self, *args: Any, sft_dataset: Any = None, **kwargs: Any):
        given = self._bind(args, kwargs)
        config = given["args"]
        self._spo_window: _Window | None = None
        self._spo_eval_batches = 0
        self._spo_warned = False
        self._spo_rows: SFTRows | None = None
        self._spo_floor: Floor | None = None
        # Where the floor is the initial model's: of which rows under which model.
        self._spo_floor_key: str | None = None
        # None where the rows are no named dataset's.
        self.sft_dataset_name: str | None = config.sft_dataset_name if sft_dataset is None else None
        rows = load_rows(sft_dataset, config)
        self._spo_sources = self._check_sources(config, rows is not None)
        self._check_settings(given, config)
        self._check_resume(config)
        if rows is not None:
            # Before any weights load, as far as a mistake in the rows can be found without them.
            given["processing_class"] = processing_class_of(given, config)
            self._spo_rows = SFTRows(rows, given["processing_class"], config, self._dated)
        given, follows = with_reference(given)
        super().__init__(**given)
        if follows:
            copy_into_reference(self)
        # The parent computes its own losses of the list, ours are added to them.
        pairs = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._spo_losses = [(name, weight) for name, weight in pairs if name in OWN_LOSSES]
        self.loss_types = [name for name, _ in pairs if name not in OWN_LOSSES]
        self.loss_weights = [weight for name, weight in pairs if name not in OWN_LOSSES]
        if config.bilevel_solver != "penalty":
            self._check_precision()
        if self._spo_rows is not None and config.optimum is None:
            model, precision = self.accelerator.unwrap_model(self.model), str(self.accelerator.mixed_precision)
            found = sharding.look_at(model, lambda model: model_fingerprint(model, precision))
            self._spo_floor_key = f"{found} {self._spo_rows.fingerprint}"
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                # In front, so that the model is still the one that was handed in.
                self.callback_handler.callbacks.insert(0, _FloorAtStart(self))
            else:
                self._spo_floor = self._initial_floor()
        if config.is_reference_free:
            self._release_reference()
        self._spo_watch = OwnLoss(self, "what SPO adds to the loss")
        self._note_arguments()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = super()._bind(args, kwargs)
        config = given["args"]
        config.validate_spo()
        if config.is_reference_free and not config.precompute_ref_log_probs:
            # The floor and the metrics take the reference's values from before training, and no model stays for them.
            # On a copy: the user's may be used again, with another loss.
            given["args"] = copy.copy(config)
            given["args"].precompute_ref_log_probs = True
        return given

    def _partly_used(self) -> dict[str, Callable[[Any], Any]]:
        # The floor of an SFT dataset is the initial model's, if it is not a number.
        # TRL keeps beta beside the arguments, where it can be set again.
        floor = {"sft_optimum": lambda value: self._spo_rows is None or value == REFERENCE}
        return {**super()._partly_used(), **floor, "beta": lambda value: None}

    def _settle_arguments(self) -> None:
        args = self.args
        args.validate_spo()
        super()._settle_arguments()
        if args.beta != self._made_with.values["beta"]:
            self.beta = args.beta
        self._check_sources(args, self._spo_rows is not None)
        self._check_settings({"model": self.model, "callbacks": self.callback_handler.callbacks}, args)
        if args.bilevel_solver != "penalty":
            self._check_precision()
        self.remove_callback(OwnLoss)
        if args.sft_coef > 0 or self._spo_losses:
            self.add_callback(self._spo_watch)

    @property
    def _reference(self) -> Any:
        # Not `or`: a compiled model has no truth value.
        return self.model if self.ref_model is None else self.ref_model

    def _release_reference(self) -> None:
        """The reference has done its work before training."""
        self.ref_model = None

    # ---- Checks ----

    @staticmethod
    def _check_sources(config: SPOConfig, has_rows: bool) -> tuple[str, ...]:
        """The sources of lower-level data."""
        lower_level = config.lower_level or ("both" if has_rows else "chosen")
        if lower_level != "chosen" and not has_rows:
            raise ConfigurationError(
                f"`lower_level` is {lower_level!r}, but there is no SFT dataset: give `sft_dataset` or "
                "`sft_dataset_name`, or use 'chosen'."
            )
        if lower_level == "chosen" and has_rows:
            raise ConfigurationError(
                "`sft_dataset` is given, but `lower_level='chosen'` does not use it: leave one out, or use 'both'."
            )
        if config.sft_batch_size is not None and not has_rows:
            raise ConfigurationError(
                f"`sft_batch_size` is {config.sft_batch_size}, but there is no SFT dataset: leave it out, or give "
                "`sft_dataset` or `sft_dataset_name`."
            )
        return {"chosen": ("chosen",), "sft_dataset": ("sft",), "both": ("chosen", "sft")}[lower_level]

    def _check_settings(self, given: dict[str, Any], config: SPOConfig) -> None:
        """What this method cannot be right with."""
        inside, accumulates = config.bilevel_solver != "penalty", config.gradient_accumulation_steps > 1
        solver = f"`bilevel_solver={config.bilevel_solver!r}`"
        sharded = None
        if config.deepspeed or getattr(config, "deepspeed_plugin", None) is not None or asked_for("DEEPSPEED"):
            sharded = "DeepSpeed"
        elif fsdp_version(config) == 1 or asked_for("MEGATRON_LM"):
            sharded = "FSDP1" if fsdp_version(config) == 1 else "Megatron-LM"
        if sharded and inside:
            raise ConfigurationError(
                f"{solver} moves whole weights in place, but {sharded} keeps them in shards of its own: use DDP or "
                "FSDP2, or 'penalty'."
            )
        quantized = given.get("quantization_config") is not None or getattr(given.get("model"), "is_quantized", False)
        if quantized and inside:
            raise ConfigurationError(
                f"{solver} adds small steps to the weights, but TRL trains the adapter of a quantized model in "
                "bfloat16, which would lose them to rounding: use 'penalty', or load the model unquantized."
            )
        if getattr(config, "parallelism_config", None) is not None:
            raise ConfigurationError(
                "`parallelism_config` splits sequences or repeats batches over processes, and the floor is one of "
                "whole responses: leave it out."
            )
        self._check_callbacks(given.get("callbacks") or [], config)
        train = given.get("train_dataset")
        sample: Any = next(iter(train), {}) if isinstance(train, (datasets.Dataset, datasets.IterableDataset)) else {}
        columns = set(sample)
        pairs = {"chosen", "rejected"} <= columns or {"chosen_ids", "rejected_ids"} <= columns
        if columns and not pairs and not getattr(self, "_makes_rows", False):
            raise ConfigurationError(
                f"`train_dataset` has the columns {sorted(columns)}, but wants preference pairs, `chosen` and "
                "`rejected`: rows to keep go into `sft_dataset`."
            )
        if {"image", "images"} & set(sample) and (inside or (config.hinge == "batch" and accumulates)):
            setting = solver if inside else "`hinge='batch'` with gradient accumulation"
            raise ConfigurationError(
                f"{setting} takes chosen responses out of their pairs, which does not work with images so far: use "
                "'penalty' with `hinge='example'`."
            )
        if config.is_reference_free and isinstance(train, datasets.IterableDataset):
            raise ConfigurationError(
                f"`loss_type={config.loss_type}` keeps no reference model, so the floor's values are computed before "
                "training, but `train_dataset` streams: load it without streaming."
            )

    @staticmethod
    def _check_callbacks(callbacks: list[Any], config: SPOConfig) -> None:
        """What the configuration refuses as a field, added as an object."""
        if mover := mover_of_reference(callbacks):
            raise ConfigurationError(
                f"{mover} moves the reference after the policy, and the floor with it: leave it out."
            )
        saves = any(c is JITCheckpointCallback or isinstance(c, JITCheckpointCallback) for c in callbacks)
        if saves and config.bilevel_solver == "alternating":
            raise ConfigurationError(
                "JITCheckpointCallback may save between an inner step that is kept and the step that belongs to it: "
                "leave it out, or use 'unrolled' or 'penalty'."
            )

    def _check_precision(self) -> None:
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
                raise ConfigurationError(
                    f"`bilevel_solver={self.args.bilevel_solver!r}` adds small steps to the weights, but {name!r} is "
                    f"{str(weight.dtype).removeprefix('torch.')} and would lose them to rounding: load the model in "
                    "float32 (`bf16=True` still computes in bfloat16), or use 'penalty'."
                )

    # ---- The floor of the SFT dataset: the initial model's values, once ----

    def _initial_floor(self) -> Floor:
        """
        nll* of every SFT row under the model as it was handed in; from disk where a run in this folder has computed it
        for the same model and rows.
        """
        rows, key = self._spo_rows, self._spo_floor_key
        assert rows is not None
        assert key is not None
        found = self._from_main(lambda: Floor.read(self._floor_path(self._output_dir)))
        if found is not None and found.key == key and len(found.nll) == len(rows):
            return found
        size = self.args.per_device_eval_batch_size
        batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        mine = list(range(self.accelerator.process_index, len(batches), self.accelerator.num_processes))
        # Processes that hold parts of the model run it together, equally often.
        spare = -(-len(batches) // self.accelerator.num_processes) - len(mine) if self._is_sharded() else 0
        values: list[tuple[int, list[float]]] = []
        bar = tqdm(
            mine + [0] * spare,
            desc="The SFT rows' likelihood under the initial model",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        with self._evaluating():
            for turn, number in enumerate(bar):
                with torch.no_grad(), self.accelerator.autocast():
                    batch = self._on_device(rows.batch(batches[number]))
                    log_probs, tokens = self._sft_log_probs(self.model, batch)
                if turn < len(mine):
                    values.append((number, objective.nll_per_token(log_probs, tokens).float().tolist()))
        if self.accelerator.num_processes > 1:
            values = gather_object(values)
        floor = Floor(key, torch.tensor([value for _, part in sorted(values) for value in part]))
        self._write_floor(floor)
        return floor

    def _is_sharded(self) -> bool:
        return sharding.is_sharded(self.accelerator.unwrap_model(self.model))

    def _from_main(self, read: Callable[[], Floor | None]) -> Floor | None:
        """What the main process reads, on all of them: their disks need not show the same."""
        found = [read() if self.is_world_process_zero() else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return found[0]

    @staticmethod
    def _floor_path(folder: Path) -> Path:
        return folder / _FOLDER / _OPTIMUM_FILE

    def _write_floor(self, floor: Floor) -> None:
        if self.args.should_save:
            with self._state_errors():
                floor.write(self._floor_path(self._output_dir))

    def _folders_to_sweep(self) -> list[Path]:
        return [*super()._folders_to_sweep(), self._output_dir / _FOLDER]

    def _begin(self, checkpoint: Path | None) -> None:
        super()._begin(checkpoint)
        self._spo_warned = False
        if self._spo_rows is not None:
            sharding.agree("`sft_dataset`", self._spo_rows.fingerprint, "how it is loaded")
        if checkpoint is None:
            return
        before = (self._checkpoint_manifest(checkpoint) or {}).get("sft_rows")
        if self._spo_rows is None:
            if before is not None:
                raise ConfigurationError(
                    f"{checkpoint.name} was written with an SFT dataset, but there is none now: give it again, or "
                    "begin anew in another `output_dir`."
                )
            return
        if before is None:
            if self._spo_floor_key is not None and self._spo_floor is None:
                raise ConfigurationError(
                    f"{checkpoint.name} was written without an SFT dataset, and a floor of one cannot be had from "
                    "the model handed in, of which processes hold parts once training has begun: give `sft_optimum` "
                    "as a number."
                )
            self._say(
                f"{checkpoint.name} was written without an SFT dataset: its floor is that of the model handed in now."
            )
            return
        if before != self._spo_rows.fingerprint:
            raise ConfigurationError(
                "`sft_dataset` does not hold the rows of the run that is resumed: pass those, or begin anew in "
                "another `output_dir`."
            )
        if self._spo_floor_key is None:
            return
        found = self._from_main(lambda: Floor.read(self._floor_path(checkpoint)))
        if found is None or len(found.nll) != len(self._spo_rows):
            raise ConfigurationError(
                f"{checkpoint.name} does not hold the floor of its SFT dataset (was it written with a number as "
                "`sft_optimum`?), and the model handed in now need not be the one that the run began with: give that "
                "number again, or begin anew in another `output_dir`."
            )
        if found.key != self._spo_floor_key:
            # The model that a run goes on with need not be the one it began with, but the floor is that one's.
            self._say("The floor of the SFT dataset is that of the run's initial model, from the checkpoint.")
        self._spo_floor = found
        self._write_floor(found)

    def _check_checkpoint(self, checkpoint: Path) -> dict[str, Any] | None:
        manifest = super()._check_checkpoint(checkpoint)
        if manifest is None:
            raise ConfigurationError(
                f"{checkpoint.name} was written by a stock trainer, whose steps would count as this run's: start from "
                "its weights instead, with it as the model, in another `output_dir`."
            )
        return manifest

    def _complete_checkpoint(self, staged: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        content, known = super()._complete_checkpoint(staged)
        if self._spo_rows is not None:
            content["sft_rows"] = self._spo_rows.fingerprint
        if self._spo_floor is not None:
            self._spo_floor.write(self._floor_path(staged))
        return content, known

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # Elsewhere the parent's way is kept, to the bit; here there is no parent, and a floor must not scatter.
        with self._evaluating() if self.args.is_reference_free else contextlib.nullcontext():
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's `evaluate`; a loss without a reference evaluates sets that it was given with the trainer."""
        new = eval_dataset is not None and not isinstance(eval_dataset, str)
        # A model with an adapter has its reference in it.
        gone = self.ref_model is None and not hasattr(self.model, "peft_config")
        if new and self.args.is_reference_free and gone and self.state.global_step > 0:
            raise ConfigurationError(
                f"`loss_type={self.args.loss_type}` keeps no reference model, so the reference's values of another "
                "`eval_dataset` cannot be had once training has begun: pass it when the trainer is made."
            )
        return super().evaluate(eval_dataset, *args, **kwargs)

    # ---- The loss ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        The objective of a batch of pairs: the parent's loss, our losses, and lambda times the gap.

        Returns:
            As the parent's.
        """
        training = self.model.training
        # A copy: the reference's values are put into it, where the parent looks for values computed ahead.
        inputs = dict(inputs)
        ahead = self.precompute_ref_logps

        def add_reference() -> None:
            # After the policy's forward, as in the parent: it may draw random numbers.
            if not ahead:
                known = self._current(training).references.get(self._current(training).position)
                if known is None:
                    known = self.compute_ref_log_probs(self._reference, inputs)
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = known

        forward = _Forward(model, add_reference)
        self.precompute_ref_logps = True
        try:
            result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = ahead
        if forward.outputs is None:
            raise refuse_override(self, "the model that it is given", "call that model")
        loss, outputs = result if return_outputs else (result, None)
        if training:
            self._spo_watch.seen()
        loss = self._spo_objective(model, inputs, forward.outputs, loss, training)
        return (loss, outputs) if return_outputs else loss

    def _spo_objective(self, model: Any, inputs: dict[str, Any], outputs: Any, loss: Any, training: bool) -> Tensor:
        """Our losses and the gap added to the parent's loss, and the metrics."""
        mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning adapters put virtual tokens in front.
        chosen, rejected = outputs.log_probs[:, -mask.size(1) :].sum(dim=1).chunk(2)
        chosen_tokens, rejected_tokens = mask.sum(dim=1).chunk(2)
        ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        for name, weight in self._spo_losses:
            if name == "simpo":
                pairs = losses.simpo_loss(
                    chosen, rejected, chosen_tokens, rejected_tokens, self.beta, self.args.simpo_gamma
                )
            else:
                pairs = losses.dpop_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta, self.args.dpop_lambda)
            loss = loss + weight * pairs.mean()

        coefficient = self.args.sft_coef
        gaps: dict[str, Tensor] = {}
        if "chosen" in self._spo_sources:
            gaps["chosen"] = self._gap("chosen", chosen, chosen_tokens, ref_chosen, training)
        if "sft" in self._spo_sources:
            gaps["sft"] = self._sft_gap(model, training, with_gradient=coefficient > 0)
        penalty = coefficient * sum(gaps.values())
        self._spo_metrics(
            chosen.detach() - ref_chosen, rejected.detach() - ref_rejected, gaps, loss.detach(), training
        )
        # Not added where it is zero: then this is the parent's loss, to the bit.
        return loss + penalty if coefficient > 0 else loss

    def _gap(self, source: str, log_probs: Tensor, tokens: Tensor, reference: Tensor | None, training: bool) -> Tensor:
        """
        The gap of the responses of one micro-batch, or its part of one that spans all micro-batches and processes.

        Args:
            log_probs, tokens: of each response, (N,).
            reference: log-probabilities under the reference, (N,), or None for a number as floor.
        """
        optimum: Any = self.args.optimum
        if optimum is None:
            assert reference is not None
            optimum = objective.nll_per_token(reference, tokens)
        tolerance = self.args.sft_tolerance
        if self.args.hinge == "example":
            return objective.example_gap(objective.nll_per_token(log_probs, tokens), optimum, tolerance)
        nll_sum, optimum_sum = -log_probs.sum(), (optimum * tokens).sum()
        window = self._current(training)
        if source in window.totals:
            active, all_tokens = window.totals[source]
        else:
            active, all_tokens = self._is_active(nll_sum, optimum_sum, tokens.sum())
        parts = len(window.batches) * self.accelerator.num_processes
        part = objective.batch_part(nll_sum, optimum_sum, all_tokens, tolerance, parts)
        return part if active else part.detach() * 0

    def _is_active(self, nll_sum: Tensor, optimum_sum: Tensor, tokens: Tensor) -> tuple[bool, Tensor]:
        """Whether the hinge over the global batch is active, from this process's sums; and the batch's tokens."""
        sums = torch.stack([nll_sum.detach().double(), optimum_sum.detach().double(), tokens.double()])
        sums = self.accelerator.reduce(sums, reduction="sum")
        excess = objective.batch_excess(sums[0], sums[1], sums[2], self.args.sft_tolerance)
        return bool(excess > 0), sums[2].float()

    def _sft_gap(self, model: Any, training: bool, with_gradient: bool) -> Tensor:
        window = self._current(training)
        position = window.position
        indices = self._sft_indices(position, training)
        batch = window.sft[position] if position in window.sft else self._sft_batch(indices)
        # Nothing of what a forward without a gradient draws may reach training.
        with contextlib.ExitStack() as stack:
            if not with_gradient:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self._fork_of_random_numbers())
            log_probs, tokens = self._sft_log_probs(model, batch)
        return self._gap("sft", log_probs, tokens, self._sft_reference(indices, tokens), training)

    def _sft_reference(self, indices: list[int], tokens: Tensor) -> Tensor | None:
        """Log-probabilities of SFT rows under the initial model, (N,), or None where the floor is a number."""
        if self._spo_floor is None:
            if self._spo_floor_key is not None:
                raise ConfigurationError(
                    "The floor of the SFT dataset is computed when training begins, where processes hold parts of the "
                    "model: call `evaluate` after `train`."
                )
            return None
        return -self._spo_floor.nll[indices].to(tokens.device) * tokens

    def _sft_indices(self, position: int, training: bool) -> list[int]:
        """The SFT rows beside micro-batch `position` of this process: a function of the step, the same in any life."""
        assert self._spo_rows is not None
        # The state's where it is settled: `auto_find_batch_size` may have lowered it.
        size = self.args.sft_batch_size or self.state.train_batch_size or self.args.per_device_train_batch_size
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        if not training:
            # In order from the first row on, so that evaluations see the same rows.
            return self._spo_rows.indices((self._spo_eval_batches * processes + process) * size, size, shuffled=False)
        batch = self.state.global_step * self.args.gradient_accumulation_steps + position
        return self._spo_rows.indices((batch * processes + process) * size, size)

    def _sft_batch(self, indices: list[int]) -> dict[str, Tensor]:
        assert self._spo_rows is not None
        return self._on_device(self._spo_rows.batch(indices))

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    @staticmethod
    def _sft_log_probs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probability and number of tokens of each row's response, (N,) each."""
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
        tokens = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
        return outputs.log_probs[:, -(batch["labels"].size(1) - 1) :].sum(dim=1), tokens

    def _fork_of_random_numbers(self) -> Any:
        return torch.random.fork_rng(devices=range(torch.cuda.device_count()))

    # ---- Metrics ----

    def _spo_metrics(
        self, chosen_change: Tensor, rejected_change: Tensor, gaps: dict[str, Tensor], loss: Tensor, training: bool
    ) -> None:
        """Record what the docs list, averaged over processes; `log` averages over the logging window."""
        metrics = self._metrics["train" if training else "eval"]
        values = torch.stack(
            [
                chosen_change.mean(), rejected_change.mean(), (chosen_change < 0).float().mean(), loss,
                *(gap.detach() for gap in gaps.values()),
            ]
        )  # fmt: skip
        values = self.accelerator.gather(values.float()[None]).mean(dim=0)
        chosen, rejected, displaced, preference, *gap_values = values.tolist()
        metrics["spo/chosen_change"].append(chosen)
        metrics["spo/rejected_change"].append(rejected)
        metrics["spo/displaced"].append(displaced)
        for source, value in zip(gaps, gap_values, strict=True):
            metrics[f"spo/gap_{source}"].append(value)
        metrics["spo/penalty"].append(self.args.sft_coef * sum(gap_values))
        metrics["spo/preference_loss"].append(preference)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's `log`, with the penalty's share; says once if pairs are displaced and nothing holds them."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if metrics.get("spo/penalty"):
            # Of the window's means: a hinge over several micro-batches has parts, which may be negative.
            preference, penalty = (
                sum(metrics[f"spo/{name}"]) / len(metrics[f"spo/{name}"]) for name in ("preference_loss", "penalty")
            )
            metrics["spo/penalty_share"] = [objective.penalty_share(preference, penalty)]
        displaced = self._metrics["train"].get("spo/displaced") if self.model.training else None
        if displaced and self.args.sft_coef == 0 and not self._spo_warned:
            share = sum(displaced) / len(displaced)
            if share > _MANY_DISPLACED:
                self._spo_warned = True
                self._warn(
                    f"{share:.0%} of the chosen responses of the last {len(displaced)} batches are less likely than "
                    "under the reference: training moves probability to responses outside the data. Set `sft_coef` "
                    "above 0 (1.0 by default) and, better still, give an `sft_dataset` of what the model shall keep; "
                    "a lower learning rate or a larger `beta` displace less, too."
                )
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._spo_eval_batches = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)
        self._spo_eval_batches += 1
        return result

    # ---- One window: the micro-batches of an optimizer step ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._leave_window()
        self._spo_window = _Window(samples)
        return samples, items

    def _current(self, training: bool) -> _Window:
        """The window of the loss being computed: one of a single batch outside of training steps."""
        if training and self._spo_window is not None:
            return self._spo_window
        return _Window([None])

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's training step; inner steps come before the first one of a window and end with its last."""
        window = self._spo_window
        if window is None or window.position >= len(window.batches) or window.batches[window.position] is not inputs:
            # Called by hand.
            self._leave_window()
            window = self._spo_window = _Window([inputs])
        try:
            if window.position == 0:
                self._begin_window(model, window)
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            window.position += 1
            if window.position == len(window.batches):
                self._end_window(model, window)
        except BaseException:
            self._leave_window()
            raise
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's `train`; where it fails between two micro-batches, the weights are back as well."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._leave_window()

    def _leave_window(self) -> None:
        """Whoever catches an error finds the weights, not what inner steps have made of them."""
        window, self._spo_window = self._spo_window, None
        if window is not None and window.saved is not None:
            self._restore(window)

    def _restore(self, window: _Window) -> None:
        """theta' -> theta."""
        assert window.saved is not None
        sharding.settle(self.model)
        inner.restore_(window.weights, window.saved)

    def _begin_window(self, model: Any, window: _Window) -> None:
        model.train()
        if self.args.bilevel_solver != "penalty":
            self._move_inside(model, window)
        if self.args.hinge == "batch" and len(window.batches) > 1:
            self._settle_hinges(model, window)

    def _end_window(self, model: Any, window: _Window) -> None:
        self._spo_window = None
        if self.args.bilevel_solver == "unrolled":
            self._restore(window)
            if self.args.hypergradient == "central_difference":
                # Before anything touches the weights: `window.saved` is what an error would bring back.
                self._correct_gradient(model, window, window.weights)
        window.saved = None

    def _move_inside(self, model: Any, window: _Window) -> None:
        """theta -> theta': the inner steps, in place."""
        sharding.settle(self.model)
        # Kept, because a callback may freeze or free weights between two micro-batches.
        weights = window.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        window.saved = inner.copies(weights)
        for _ in range(self.args.inner_steps):
            inner.step_(weights, self._lower_gradient(model, window, weights), self.args.inner_rate)

    def _correct_gradient(self, model: Any, window: _Window, weights: list[Tensor]) -> None:
        """The gradient v of the window, taken at theta', becomes (I - eta * H) v, H at theta."""
        vector = [weight.grad for weight in weights]
        products = inner.hessian_vector(
            weights,
            vector,
            lambda: self._lower_gradient(model, window, weights),
            inner.difference_radius(weights, vector, torch.bfloat16 if self.args.bf16 else None),
        )
        for weight, product in zip(weights, products, strict=True):
            if weight.grad is None and product is not None:
                weight.grad = torch.zeros_like(weight)
        moved = [(weight.grad, product) for weight, product in zip(weights, products, strict=True)]
        inner.step_(
            [gradient for gradient, _ in moved if gradient is not None],
            [product for gradient, product in moved if gradient is not None],
            self.args.inner_rate,
        )

    def _lower_gradient(self, model: Any, window: _Window, weights: list[Tensor]) -> list[Tensor | None]:
        """
        The gradient of L_SFT, the token-mean negative log-likelihood of the window's lower-level responses on all
        processes, at the live weights. Leaves gradients, random numbers and DDP's buckets alone.
        """
        # Not the wrapped model: `autograd.grad` never runs the hooks by which DDP adds up gradients.
        plain = self.accelerator.unwrap_model(model)
        with self._fork_of_random_numbers():
            total = self._lower_tokens(window)
            if self._is_sharded():
                return self._lower_gradient_of_shards(plain, window, weights, total)
            gradients: list[Tensor | None] = [None] * len(weights)
            for position in range(len(window.batches)):
                for batch in self._lower_batches(window, position):
                    with self.compute_loss_context_manager():
                        log_probs, _ = self._sft_log_probs(plain, batch)
                    found = torch.autograd.grad(-log_probs.sum() / total, weights, allow_unused=True)
                    for number, gradient in enumerate(found):
                        before = gradients[number]
                        if gradient is not None:
                            gradients[number] = gradient if before is None else before.add_(gradient)
        if self.accelerator.num_processes > 1:
            # One that got no gradient here may have got one elsewhere.
            gradients = [
                self.accelerator.reduce(torch.zeros_like(weight) if gradient is None else gradient, reduction="sum")
                for weight, gradient in zip(weights, gradients, strict=True)
            ]
        return gradients

    def _lower_gradient_of_shards(
        self, model: Any, window: _Window, weights: list[Tensor], total: Tensor
    ) -> list[Tensor | None]:
        """As above, with FSDP2: its hooks add up gradients and divide them, and only a plain backward runs them."""
        before = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        # Upstream switches it off for all but the last micro-batch of an optimizer step.
        model.set_requires_gradient_sync(True)
        try:
            for position in range(len(window.batches)):
                for batch in self._lower_batches(window, position):
                    with self.compute_loss_context_manager():
                        log_probs, _ = self._sft_log_probs(model, batch)
                    # It takes the mean over processes.
                    (-log_probs.sum() / total * self.accelerator.num_processes).backward()
            return [weight.grad for weight in weights]
        finally:
            for weight, gradient in zip(weights, before, strict=True):
                weight.grad = gradient
            last = window.position >= len(window.batches) - 1
            model.set_requires_gradient_sync(last)
            sharding.settle(model)

    def _lower_tokens(self, window: _Window) -> Tensor:
        count = sum(
            (batch["labels"][:, 1:] != IGNORED).sum()
            for position in range(len(window.batches))
            for batch in self._lower_batches(window, position)
        )
        return self.accelerator.reduce(torch.as_tensor(count).float(), reduction="sum").clamp(min=1)

    def _lower_batches(self, window: _Window, position: int) -> Iterator[dict[str, Tensor]]:
        """The lower-level responses beside one micro-batch, each kind as a batch with labels."""
        if "chosen" in self._spo_sources:
            yield self._chosen_batch(window.batches[position])
        if "sft" in self._spo_sources:
            if position not in window.sft:
                window.sft[position] = self._sft_batch(self._sft_indices(position, training=True))
            yield window.sft[position]

    def _chosen_batch(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The chosen half of a batch of pairs, without the columns that only the rejected half fills."""
        inputs = self._prepare_inputs(inputs)
        half = inputs["input_ids"].size(0) // 2
        attention = inputs["attention_mask"][:half]
        # Padded on the right.
        length = int(attention.sum(dim=1).max())
        ids, mask = inputs["input_ids"][:half, :length], inputs["completion_mask"][:half, :length]
        return {
            "input_ids": ids,
            "attention_mask": attention[:, :length],
            "labels": ids.masked_fill(mask == 0, IGNORED),
        }

    def _settle_hinges(self, model: Any, window: _Window) -> None:
        """
        Whether each hinge over the window is active: a pass without gradients, because the gradient of every
        micro-batch depends on it. Values of the reference that it takes are kept for the loss.
        """
        plain = self.accelerator.unwrap_model(model)
        sums = {
            source: torch.zeros(3, dtype=torch.double, device=self.accelerator.device) for source in self._spo_sources
        }
        with self._fork_of_random_numbers(), torch.no_grad(), self.compute_loss_context_manager():
            for position, given in enumerate(window.batches):
                inputs = self._prepare_inputs(given)
                if "chosen" in sums:
                    log_probs, tokens = self._sft_log_probs(plain, self._chosen_batch(given))
                    reference = None
                    if self.args.optimum is None:
                        if self.precompute_ref_logps:
                            reference = inputs["ref_chosen_logps"]
                        else:
                            known = self.compute_ref_log_probs(self._reference, inputs)
                            reference = known[0]
                            if self.args.sft_coef > 0:
                                # A reference that draws random numbers has to draw them where the parent lets it,
                                # wherever the run shall be the parent's.
                                window.references[position] = known
                    sums["chosen"] += self._sums(log_probs, tokens, reference)
                if "sft" in sums:
                    indices = self._sft_indices(position, training=True)
                    if position not in window.sft:
                        window.sft[position] = self._sft_batch(indices)
                    log_probs, tokens = self._sft_log_probs(plain, window.sft[position])
                    sums["sft"] += self._sums(log_probs, tokens, self._sft_reference(indices, tokens))
        for source, (nll_sum, optimum_sum, tokens) in sums.items():
            window.totals[source] = self._is_active(nll_sum, optimum_sum, tokens)

    def _sums(self, log_probs: Tensor, tokens: Tensor, reference: Tensor | None) -> Tensor:
        optimum_sum = self.args.optimum * tokens.sum() if reference is None else -reference.sum()
        return torch.stack([-log_probs.sum().double(), optimum_sum.double(), tokens.sum().double()])
