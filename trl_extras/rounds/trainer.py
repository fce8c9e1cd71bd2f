"""
Rounds inside one `Trainer.train()`: a mixin in front of any DPOTrainer or SFTTrainer subclass.

At the first step of a round the callback below calls `_enter_round`; everything in between is the parent's training,
untouched. What a method adds (an extrapolation, a reference, a beta) are the hooks `round_settings`, `_transition` and
`_prepare_round`.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from accelerate.utils import is_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

from .. import __version__, sizing
from ..errors import ConfigurationError
from . import checkpoints, durable, optimizers, sharding, zero
from .data import NoRowsYetError, RoundDataBuilder, RoundDataset, group_keys, rows_fingerprint, split_folds
from .plan import RoundPlan
from .saving import NonFiniteError, WholeCheckpoints, asked_for, fsdp_version
from .state import ROUNDS_DIR, STATE_VERSION, AdapterWeights, FullWeights, RoundFolder, TrainableState


logger = logging.get_logger(__name__)

# Fields that do not change what is trained: a run may go on with other values. `num_rounds` and the epochs of later
# rounds are compared round by round instead.
_FREE_FIELDS = {
    "output_dir", "num_rounds", "num_train_epochs", "round_epochs", "max_steps", "keep_iterates", "disable_tqdm",
    "report_to", "run_name", "project", "resume_from_checkpoint", "prediction_loss_only", "per_device_eval_batch_size",
    "dataset_num_proc", "precompute_ref_batch_size", "debug", "use_cpu", "deepspeed", "fsdp", "fsdp_config",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "remove_unused_columns",
    "batch_eval_metrics", "restore_callback_states_from_checkpoint", "torch_empty_cache_steps",
    "logging_nan_inf_filter", "skip_memory_metrics", "average_tokens_across_devices", "parallelism_config",
    "liger_kernel_config",
}  # fmt: skip
_FREE_PREFIXES = (
    "logging_", "log_", "hub_", "push_", "save_", "eval_", "do_", "include_", "dataloader_num", "dataloader_pin",
    "dataloader_prefetch", "dataloader_multi", "dataloader_in", "trackio_", "ddp_", "local_", "gradient_checkpointing",
    "activation_checkpointing", "torch_compile", "fp16_full", "bf16_full", "_",
)  # fmt: skip


_ROWS_FILE = "data.parquet"
# What a boundary's time goes into; the last two are parts of the second.
_BOUNDARY_PARTS = ("weights", "data", "rows", "reference")


class _RoundBoundaries(TrainerCallback):
    """Tells the trainer when a round begins and when the run is over."""

    def __init__(self, trainer: RoundsTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._on_train_begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._on_epoch_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.trainer._on_step_end(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._on_train_end()


class RoundsTrainer(WholeCheckpoints):
    """
    Mixin for a TRL trainer whose config is a [`RoundsConfig`].

    A callback with a method `on_round_end(args, state, control, *, round_index, summary, model)` has it called after
    every round, while `model` still is the iterate as trained (thetahat_{t+1}, before any extrapolation) and `summary`
    is the round's row of `rounds.jsonl`; what it adds to `summary` is kept.

    Attributes:
        round_summaries (`list[dict]`): the rows of `rounds.jsonl` so far.
        round_data_builder ([`RoundDataBuilder`], *optional*): makes the rows of each round; set it before `train()`.
    """

    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    control: Any
    # Whether a round's rows are made in that round, from its policy; then one round is a run in rounds too.
    _makes_rows = False
    # Whether the method works on adapters as well, and whether each of its rounds trains a fresh one, on top of what
    # the rounds before have made. Otherwise one is trained on through all rounds, without a reference.
    _trains_adapters = False
    _fresh_adapters = False

    def __init__(self, *args: Any, **kwargs: Any):
        given = self._bind(args, kwargs)
        config = given["args"]
        self.round_summaries: list[dict[str, Any]] = []
        self.round_data_builder: RoundDataBuilder | None = None
        self._plan: RoundPlan | None = None
        self._round = -1
        self._rows: RoundDataset | None = None
        # The training loader, where its sampler is the user's own.
        self._loader: Any = None
        self._folds: list[list[int]] | None = None
        self._num_folds = config.num_rounds if config.round_data == "split" else 1
        self._run_id: str | None = None
        self._calling_round_end = self._resumes = False
        # Of an optimizer that was passed, what its groups were.
        self._given_optimizer = False
        self._initial_groups: list[dict[str, Any]] = []
        # The names of the parameters that are trained when `train()` begins.
        self._trained_names: frozenset[str] = frozenset()
        self._weights: TrainableState | None = None
        self._round_started = self._run_started = 0.0
        self._boundary_seconds = dict.fromkeys(_BOUNDARY_PARTS, 0.0)
        self._run_started_step = 0
        # Before the parent moves defaults into the arguments, and before any weights load.
        self.args = config
        self._configuration = self._comparable_configuration(config) | self._comparable_adapter(given)
        self._check_arguments(given, config)
        unsupported = self._unsupported(given, config)
        if self._multi_round and unsupported:
            setting, reason = unsupported[0]
            raise ConfigurationError(f"{setting} does not work with {self._what_rounds()}: {reason}")
        # One round is the parent's run and takes whatever the parent takes; then nothing is kept for a second round.
        self._keeps_rounds = not unsupported and not config.single_round_settings()
        for setting in () if self._keeps_rounds else self._needs_rounds(config):
            setting_in_force = (unsupported or config.single_round_settings())[0][0]
            raise ConfigurationError(f"{setting} needs the rounds' state, which is not kept with {setting_in_force}.")
        self._check_rows(given.get("train_dataset"), config)
        if self._keeps_rounds:
            self._refuse_foreign_rounds(config)
        self._check_resume(config)
        optimizer, _ = given.get("optimizers") or (None, None)
        if optimizer is not None:
            self._given_optimizer, self._initial_groups = True, optimizers.groups_of(optimizer)
        super().__init__(**self._complete_arguments(given))
        if self._keeps_rounds:
            try:
                self._weights = self._make_weights(given)
            except ConfigurationError:
                if self._multi_round or self._needs_rounds(config):
                    raise
                # One round is the parent's run, which takes it.
                self._keeps_rounds = False
        if self._keeps_rounds:
            # In front, so that every other callback sees the weights and data of the round that begins.
            self.callback_handler.callbacks.insert(0, _RoundBoundaries(self))
        self._prepared_train_dataset: Any = self.train_dataset
        self._note_arguments()
        self._noted_configuration = self._comparable_configuration(self.args)

    def _make_weights(self, given: dict[str, Any]) -> TrainableState:
        if not is_peft_model(self.model):
            return FullWeights(self.model)
        if not self._fresh_adapters:
            return AdapterWeights(self.model)
        # Here, because peft takes a second to import and most runs have none.
        from .adapters import LoraRounds

        passed = given.get("peft_config") is None
        return LoraRounds(self.model, passed, self.args.seed, self.args.num_rounds)

    # ---- Checks, before any weights load ----

    def _check_arguments(self, given: dict[str, Any], config: Any) -> None:
        """Further checks of the constructor's arguments; a method's own. It also settles `_makes_rows`."""

    def _what_rounds(self) -> str:
        """Why the run is one in rounds, for messages."""
        if self.args.num_rounds > 1:
            return f"more than one round (`num_rounds` is {self.args.num_rounds})"
        return "rows that are sampled from the policy"

    def _check_single_round(self, config: Any) -> None:
        """One round on rows of its own is a run in rounds: what only the parent's can have does not work with it."""
        for setting, reason in config.single_round_settings():
            raise ConfigurationError(f"{setting} does not work with {self._what_rounds()}: {reason}")
        epochs = config.num_train_epochs
        if config.round_epochs is None and not (math.isfinite(epochs) and epochs >= 1 and epochs == int(epochs)):
            raise ConfigurationError(
                f"`num_train_epochs` is {epochs!r}, but means epochs a round and wants a whole number of at least 1 "
                f"with {self._what_rounds()}."
            )

    def _planned_rows(self, available: int) -> int:
        """Rows of every round's epochs, if `available` belong to the round."""
        return available

    def _complete_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The parent's constructor arguments, once all of them have been checked."""
        return given

    def _unsupported(self, given: dict[str, Any], config: Any) -> list[tuple[str, str]]:
        """What was passed to the constructor that rounds cannot work with yet, each with the reason."""
        found: list[tuple[str, str]] = []
        found.extend(self._unsupported_adapters(given, config))
        found.extend(self._unsupported_shards(config))
        if isinstance(given.get("train_dataset"), datasets.IterableDataset):
            found.append(
                (
                    "A streaming `train_dataset`",
                    "a round is a whole number of epochs. Load the dataset without streaming.",
                )
            )
        optimizer, scheduler = given.get("optimizers") or (None, None)
        if scheduler is not None:
            found.append(
                (
                    "A scheduler object in `optimizers`",
                    "each round starts a fresh one. Set `lr_scheduler_type` instead, or override `create_scheduler`.",
                )
            )
        if optimizer is not None and (reason := optimizers.why_not(optimizer, given=True)) is not None:
            found.append((f"A {type(optimizer).__name__} in `optimizers`", reason))
        found.extend(self._unsupported_callbacks(given.get("callbacks") or []))
        return found

    @staticmethod
    def _unsupported_shards(config: Any) -> Iterator[tuple[str, str]]:
        """Ways to divide a model that rounds do not know."""
        plugin = getattr(config, "deepspeed_plugin", None)
        if plugin is not None:
            yield from zero.why_not(plugin.hf_ds_config.config)
        elif config.deepspeed or asked_for("DEEPSPEED"):
            yield "DeepSpeed without a configuration", "rounds have to know it. Pass `deepspeed` a file or a dict."
        if asked_for("MEGATRON_LM"):
            yield "Megatron-LM", "rounds do not know how it divides weights. Use FSDP2 or DDP."
        if fsdp_version(config) == 1:
            yield "FSDP1", "its flattened weights are not those of the model. Use FSDP2 (`fsdp_version: 2`)."
        if getattr(config, "parallelism_config", None) is not None:
            yield "`parallelism_config`", "rounds have been made to work with whole sequences and rows. Use FSDP2."

    def _unsupported_adapters(self, given: dict[str, Any], config: Any) -> Iterator[tuple[str, str]]:
        model, peft_config = given.get("model"), given.get("peft_config")
        passed = peft_config is None and isinstance(getattr(model, "peft_config", None), dict)
        adapted = passed or peft_config is not None
        if adapted:
            from .adapters import has_history, why_not

            if has_history(model):
                # Also with one round: what is trained would rest on it, and be saved without it.
                raise ConfigurationError(
                    "`model` holds what an earlier run in rounds has trained below its adapter: load the model anew, "
                    "with the adapter that was saved (`PeftModel.from_pretrained(..., is_trainable=True)`) to train "
                    "that on, or pass `model.unload()` to begin at the base."
                )
        if passed and not is_peft_model(model):
            yield (
                "A model that has adapters but is no PeftModel",
                "pass it without them, with `peft_config`, or as a PeftModel (`peft.get_peft_model`).",
            )
        elif adapted and not self._trains_adapters:
            yield "A PEFT adapter", "rounds train full weights so far. Leave the adapter away."
        elif adapted:
            if not self._fresh_adapters and config.num_rounds == 1:
                return
            for adapter in model.peft_config.values() if model is not None and passed else [peft_config]:
                reason = why_not(adapter, passed, self._fresh_adapters)
                if reason is not None:
                    yield reason
            if self._fresh_adapters and config.torch_compile:
                yield "`torch_compile=True` with an adapter", "it does not see the rounds' history. Leave it out."
        quantized = given.get("quantization_config") is not None or getattr(model, "is_quantized", False)
        if quantized and not adapted:
            yield "A quantized model", "only adapters on it can be trained. Add one, or load it unquantized."

    @staticmethod
    def _unsupported_callbacks(callbacks: list[Any]) -> Iterator[tuple[str, str]]:
        for callback in callbacks:
            if callback is EarlyStoppingCallback or isinstance(callback, EarlyStoppingCallback):
                yield (
                    "EarlyStoppingCallback",
                    "a round is a whole number of epochs. Choose among the folders of `keep_iterates` instead.",
                )
            if callback is JITCheckpointCallback or isinstance(callback, JITCheckpointCallback):
                yield (
                    "JITCheckpointCallback",
                    "it can save the extrapolated policy where the iterate is expected. Leave it out.",
                )

    def _check_rows(self, train_dataset: Any, config: Any) -> None:
        if not self._multi_round or not isinstance(train_dataset, datasets.Dataset):
            return
        rows = len(train_dataset)
        if config.round_data == "split" and rows < config.num_rounds:
            raise ConfigurationError(
                f"`train_dataset` has {rows} rows, but `num_rounds` is {config.num_rounds} and `round_data='split'` "
                "gives each round its own: use fewer rounds, more data, or `round_data='reuse'`."
            )
        if config.round_data == "split" and "prompt" in train_dataset.column_names:
            distinct: set[str] = set()
            for row in train_dataset.select_columns(["prompt"]):
                distinct.add(repr(row["prompt"]))
                if len(distinct) >= config.num_rounds:
                    break
            else:
                raise ConfigurationError(
                    f"`train_dataset` has {len(distinct)} distinct prompts, but `num_rounds` is {config.num_rounds} "
                    "and "
                    "`round_data='split'` gives each round its own: use fewer rounds, more prompts, or "
                    "`round_data='reuse'`."
                )
        if config.max_steps > 0:
            share = self._planned_rows(rows // config.num_rounds if config.round_data == "split" else rows)
            batches = math.ceil(share / (config.train_batch_size * max(config.world_size, 1)))
            steps = math.ceil(batches / config.gradient_accumulation_steps) * sum(config.epochs_of_rounds())
            # Preparation may drop rows, so that only more than this is certainly wrong before the data are tokenised.
            if config.max_steps > steps:
                self._refuse_max_steps(config.max_steps, steps)

    @staticmethod
    def _refuse_max_steps(got: int, plan: int) -> None:
        raise ConfigurationError(
            f"`max_steps` is {got}, but the rounds take {plan} steps, epochs and rows together: leave `max_steps` at "
            "-1 "
            "and set `num_rounds` and `num_train_epochs` (epochs a round)."
        )

    def _comparable_configuration(self, config: Any) -> dict[str, Any]:
        """The fields that a run cannot change when it goes on, as JSON values."""
        fields = {
            name: value
            for name, value in config.to_dict().items()
            if name not in _FREE_FIELDS | self._per_round_fields() and not name.startswith(_FREE_PREFIXES)
        }
        # Nested values can hold tokens and paths, and manifests are uploaded with checkpoints: a hash tells them
        # apart.
        loading = config.model_init_kwargs if isinstance(getattr(config, "model_init_kwargs", None), dict) else {}
        fields["model_init_kwargs"] = {
            name: str(loading[name]) for name in ("dtype", "revision", "attn_implementation") if loading.get(name)
        }
        for name, value in fields.items():
            if isinstance(value, dict) and name != "model_init_kwargs":
                text = json.dumps(value, default=str, sort_keys=True)
                fields[name] = f"xxh3:{xxhash.xxh3_128_hexdigest(text.encode())}"
        return json.loads(json.dumps(fields, default=str, sort_keys=True))

    @staticmethod
    def _comparable_adapter(given: dict[str, Any]) -> dict[str, Any]:
        """What an adapter's configuration adds to the fields that a run cannot change when it goes on."""
        adapter = given.get("peft_config")
        configurations = getattr(given.get("model"), "peft_config", None)
        if adapter is None and isinstance(configurations, dict):
            adapter = configurations.get("default")
        kind = getattr(adapter, "peft_type", None)
        found: dict[str, Any] = {"peft_type": None if kind is None else str(getattr(kind, "value", kind))}
        for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"):
            if hasattr(adapter, name):
                found[name] = getattr(adapter, name)
        return json.loads(json.dumps(found, default=str, sort_keys=True))

    def _compare_configuration(self, other: dict[str, Any], where: str) -> None:
        """Raise a ValueError naming the first field that differs from another run's."""
        # Fields of one version only are no difference: upgrading a library must not strand a run.
        for name in sorted(set(other) & set(self._configuration)):
            if other[name] != self._configuration[name]:
                raise ConfigurationError(
                    f"`{name}` is {self._configuration[name]!r}, but {where} was made with {other[name]!r}: set it "
                    "back "
                    "to go on with that run, or use another `output_dir`."
                )

    def _refuse_foreign_rounds(self, config: Any) -> None:
        """Raise a ValueError if the output folder holds the rounds of another configuration."""
        run = self._read_run(Path(config.output_dir))
        if run is not None:
            self._compare_configuration(
                run["configuration"], f"the run whose rounds `output_dir` holds ({config.output_dir}/{ROUNDS_DIR})"
            )

    def _check_resume(self, config: Any) -> None:
        if config.save_only_model and config.resume_from_checkpoint and self._multi_round:
            raise ConfigurationError(
                "`save_only_model=True` leaves nothing to resume from, but `resume_from_checkpoint` is set: leave "
                "one out."
            )
        super()._check_resume(config)

    def _run_of(self, output_dir: Path) -> str | None:
        run = self._read_run(output_dir) if self._keeps_rounds else None
        return run.get("run_id") if run else None

    @staticmethod
    def _read_run(output_dir: Path) -> dict[str, Any] | None:
        path = output_dir / ROUNDS_DIR / "run.json"
        if not path.is_file():
            return None
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            run["configuration"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"`output_dir` holds rounds, but {path} is unreadable: remove it or use another folder."
            ) from error
        return run

    # ---- What a method adds ----

    def _needs_rounds(self, config: Any) -> list[str]:
        """The settings in force that do nothing where no rounds are kept."""
        return ["`keep_iterates=True`"] if config.keep_iterates else []

    def _per_round_fields(self) -> set[str]:
        """Config fields whose values belong to rounds: compared round by round when a run goes on."""
        return set()

    def round_settings(self, round_index: int) -> dict[str, Any]:
        """What round `round_index` is trained with, beyond the configuration; JSON values."""
        return {"epochs": self.args.epochs_of_rounds()[round_index]}

    def _summary_settings(self, round_index: int) -> dict[str, Any]:
        """The settings that the round's row in `rounds.jsonl` shows."""
        return self.round_settings(round_index)

    def _transition_settings(self, round_index: int) -> dict[str, Any]:
        """What the step from the iterate to the policy of round `round_index` depends on."""
        return {}

    def _transition(self, round_index: int, previous: RoundFolder) -> bool:
        """Turn the live weights from thetahat_t into theta_t, t > 0, in place; whether they changed."""
        return False

    def _round_builder(self, round_index: int) -> Callable[[RoundFolder], tuple[Any, dict[str, Any]]] | None:
        """
        What makes the rows of a round, or None for its share of the training set: a function of the round's folder
        that returns rows, ready for the collator, and what the folder's manifest keeps beside them.
        """
        builder = self.round_data_builder
        if builder is None:
            return None

        def build(folder: RoundFolder) -> tuple[Any, dict[str, Any]]:
            policy = self.accelerator.unwrap_model(self.model)
            with self._gathered():
                built = builder(round_index=round_index, policy=policy, seed=self._round_seed(round_index))
            return self._prepare_built(built, round_index), {}

        return build

    def _gathered(self) -> AbstractContextManager[None]:
        """Every process holds the whole policy; all of them enter and leave together."""
        return nullcontext() if self._weights is None else self._weights.gathered()

    def _held(self) -> AbstractContextManager[None]:
        """The main process may save by itself; all of them enter and leave together."""
        return nullcontext() if self._weights is None else self._weights.held()

    def _measure_iterate(self, round_index: int, summary: dict[str, Any]) -> None:
        """Add to a round's row what the method measures while the live weights are the round's iterate."""

    def _after_weights(self, round_index: int, folder: RoundFolder) -> None:
        """The live weights are theta_t now, on disk too, and the round's rows not yet made."""

    def _prepare_round(self, round_index: int, rows: Any, folder: RoundFolder, restored: bool) -> Any:
        """
        Set up what the round's training needs besides weights and rows, such as a reference.

        Args:
            restored: the run resumes inside this round: the live weights are no longer theta_t, which is on disk.

        Returns:
            The rows, with whatever columns the method adds.
        """
        return rows

    def _finish_policy(self) -> None:
        """After the last round, with the last iterate as live weights."""

    # ---- The run ----

    @property
    def _multi_round(self) -> bool:
        return self.args.num_rounds > 1 or self._makes_rows

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The parent's `train`, through all rounds.

        Args:
            resume_from_checkpoint: `True`, `"true"`, `"True"` or `"last"` takes the newest whole checkpoint in
                `output_dir`, or starts from the beginning, saying so; a path takes that one. A finished run goes on if
                `num_rounds` has grown.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another run.
        """
        if trial is not None and self._multi_round:
            raise ConfigurationError(
                f"A hyperparameter search does not work with {self._what_rounds()}: search with `num_rounds=1`, on "
                "pairs."
            )
        for setting, reason in (
            self._unsupported_callbacks(self.callback_handler.callbacks) if self._multi_round else []
        ):
            raise ConfigurationError(f"{setting} does not work with {self._what_rounds()}: {reason}")
        if self.round_data_builder is not None and not self._multi_round:
            raise ConfigurationError(
                "`round_data_builder` is set, but `num_rounds` is 1 and the run is the parent's, on `train_dataset`: "
                "pass "
                "the rows as `train_dataset`, or use more rounds."
            )
        if self._multi_round and self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise ConfigurationError(
                f"A scheduler object of the trainer's does not work with {self._what_rounds()}: each round starts a "
                "fresh one. Set `lr_scheduler_type` instead, or override `create_scheduler`."
            )
        self._resumes = bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)

    def _partly_used(self) -> dict[str, Callable[[Any], Any]]:
        return {**super()._partly_used(), "num_rounds": lambda number: number > 1}

    def _settle_arguments(self) -> None:
        self.args.validate_rounds()
        super()._settle_arguments()
        # The parent has moved defaults into the arguments since what is compared was taken down.
        now = self._comparable_configuration(self.args)
        self._configuration |= {name: v for name, v in now.items() if v != self._noted_configuration.get(name)}
        self._noted_configuration = now
        if self._keeps_rounds:
            self._refuse_foreign_rounds(self.args)
        elif needing := self._needs_rounds(self.args):
            raise ConfigurationError(
                f"{needing[0]} needs the rounds' state, which is not kept as the trainer was made: make a new one."
            )

    def _begin(self, checkpoint: Path | None) -> None:
        super()._begin(checkpoint)
        if self._keeps_rounds:
            self._start_run(checkpoint)

    def _folders_to_sweep(self) -> list[Path]:
        """Where a killed run may have left files under temporary names."""
        rounds = self._output_dir / ROUNDS_DIR
        return [*super()._folders_to_sweep(), rounds, rounds / "iterates"]

    def _start_run(self, checkpoint: Path | None) -> None:
        """Settle which run this is and how long an epoch is, before upstream counts steps."""
        self._round = -1
        self.round_summaries = []
        self._num_folds = self.args.num_rounds if self.args.round_data == "split" else 1
        if self.train_dataset is not self._rows:
            # Also where someone has put another one in place.
            self._prepared_train_dataset = self.train_dataset
        if checkpoint is None:
            self._run_id = None
        else:
            self._adopt(checkpoint)
        if self._run_id is None:
            earlier = [folder.name for _, folder in checkpoints.list_checkpoints(self._output_dir)]
            if self._multi_round and earlier:
                self._warn(
                    f"`output_dir` holds {', '.join(earlier)} of an earlier run, which this one replaces step by "
                    "step: stop, and set `resume_from_checkpoint='last'` to go on with that run, or use another "
                    "`output_dir`."
                )
            identity = [uuid.uuid4().hex]
            if self.accelerator.num_processes > 1:
                torch.distributed.broadcast_object_list(identity)
            self._run_id = identity[0]
        if self._num_folds > 1:
            keys = group_keys(self._prepared_train_dataset)
            self._folds = split_folds(
                len(self._prepared_train_dataset) if keys is None else keys, self._num_folds, self.args.seed
            )
        else:
            self._folds = None
        if self._weights is not None:
            self._weights.begin(fresh=self._multi_round and checkpoint is None)
        if self._multi_round:
            available = len(self._folds[0]) if self._folds else len(self._prepared_train_dataset)
            self._rows = RoundDataset(self._planned_rows(available))
            self.train_dataset = self._rows
            if self._folds and checkpoint is None:
                left_out = len(self._prepared_train_dataset) - available * self._num_folds
                self._say(
                    f"{self._num_folds} folds of {available} rows each"
                    + (f"; {left_out} rows are left out to keep them equal" if left_out else "")
                    + "."
                )

    def _adopt(self, checkpoint: Path) -> None:
        """Take over what a checkpoint fixes."""
        manifest = self._check_checkpoint(checkpoint)
        if manifest is None:
            return
        base = None if self._weights is None else self._weights.base
        if manifest.get("base") is not None and base is not None and manifest["base"] != base:
            raise ConfigurationError(
                f"The model below the adapter is not the one that {checkpoint.name} was trained on (names, shapes, "
                "dtypes or values of its weights differ): load that model, in the same dtype."
            )
        self._run_id = manifest["run_id"]
        self._num_folds = manifest["num_folds"]
        if self.args.round_data == "split" and self._num_folds != self.args.num_rounds:
            self._say(f"The run began with {self._num_folds} folds; later rounds use them again, in order.")
        self.round_summaries = [row for row in manifest["summaries"] if row["round"] < manifest["round"]]

    def _check_checkpoint(self, checkpoint: Path) -> dict[str, Any] | None:
        manifest = super()._check_checkpoint(checkpoint)
        if not self._keeps_rounds:
            return manifest
        if manifest is None or "round" not in manifest:
            if self._multi_round:
                raise ConfigurationError(
                    f"`resume_from_checkpoint` names {checkpoint.name}, which holds no rounds (the stock trainer "
                    "wrote "
                    "it, or a run that kept none): start from its weights instead, with it as the model."
                )
            return None
        if self._multi_round and manifest["world_size"] != self.args.world_size:
            raise ConfigurationError(
                f"{checkpoint.name} was written by {manifest['world_size']} processes, but there are "
                f"{self.args.world_size}: start {manifest['world_size']} (`--num_processes`), or begin anew with that "
                "checkpoint as the model."
            )
        if (
            self._multi_round
            and not (checkpoint / "scheduler.pt").is_file()
            and not (checkpoint / "optimizer.pt").is_file()
        ):
            raise ConfigurationError(
                f"{checkpoint.name} was written with `save_only_model=True` and has no optimizer state to resume "
                "from: "
                "start from its weights instead, with it as the model."
            )
        self._compare_configuration(manifest["configuration"], checkpoint.name)
        round_index = manifest["round"]
        if round_index >= self.args.num_rounds:
            raise ConfigurationError(
                f"`num_rounds` is {self.args.num_rounds}, but {checkpoint.name} is in round {round_index + 1}: set "
                "`num_rounds` to at least that."
            )
        for t, settings in enumerate(manifest["settings"]):
            # What a finished step was made with is history; the last round's own alpha is still to come.
            now = {**self.round_settings(t), **(self._transition_settings(t) if t else {})}
            for name in settings.keys() & now.keys():
                if settings[name] != now[name]:
                    raise ConfigurationError(
                        f"`{name}` of round {t + 1} is {now[name]!r}, but {checkpoint.name} has had it with "
                        f"{settings[name]!r}: only rounds to come can be changed."
                    )
        return manifest

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        epochs = args.epochs_of_rounds()
        whole = copy.copy(args)
        if self._multi_round or args.round_epochs is not None:
            # A copy, because upstream reads the epochs of the whole run where the field means those of a round.
            whole.num_train_epochs = sum(epochs)
        values = super().set_initial_training_values(whole, dataloader)
        if not self._keeps_rounds:
            return values
        num_epochs, steps_per_epoch, *_, max_steps = values
        if not self._multi_round:
            # One round may have a fraction of an epoch, or a number of steps.
            self._plan = RoundPlan((1,), max_steps)
            return values
        self._plan = RoundPlan(tuple(epochs), steps_per_epoch)
        if max_steps != self._plan.total_steps or num_epochs != self._plan.total_epochs:
            self._refuse_max_steps(max_steps, self._plan.total_steps)
        return values

    def get_train_dataloader(self) -> Any:
        """The parent's. A `_get_train_sampler` of the user's may read `train_dataset`: every round calls it anew."""
        overridden = "_get_train_sampler" in vars(self)
        overridden |= type(self)._get_train_sampler is not self._stock_class()._get_train_sampler
        if self._rows is None or not overridden:
            return super().get_train_dataloader()
        if self._round_builder(0) is None:
            # What it reads now is the first round's; in a later one it is called before anything is drawn.
            self._rows.swap(self._fold(0))
        try:
            self._loader = super().get_train_dataloader()
        except NoRowsYetError:
            with self._placeholder_sampler():
                self._loader = super().get_train_dataloader()
        self._rows.content = None
        return self._loader

    @contextmanager
    def _placeholder_sampler(self) -> Iterator[None]:
        kept = {name: value for name, value in vars(self).items() if name == "_get_train_sampler"}
        self.__dict__["_get_train_sampler"] = torch.utils.data.SequentialSampler
        try:
            yield
        finally:
            del self.__dict__["_get_train_sampler"]
            self.__dict__.update(kept)

    def _swap_rows(self, rows: Any) -> None:
        """Put a round's rows in place, and a sampler of the user's that has seen them."""
        if self._rows is None:
            return
        self._rows.swap(rows)
        if self._loader is None:
            return
        sampler, before = self._get_train_sampler(self._rows), self._loader.get_sampler()
        shuffles = torch.utils.data.RandomSampler
        if sampler is None or (isinstance(sampler, shuffles) and isinstance(before, shuffles)):
            # It reads no rows, and accelerate has put one with a seed of its own in its place.
            return
        planned = len(before)
        if len(sampler) != planned:
            raise ConfigurationError(
                f"`_get_train_sampler` draws {len(sampler)} rows in round {self._round + 1}, but every epoch of a run "
                f"has {planned}: draw as many in every round."
            )
        self._loader.set_sampler(sampler)

    # ---- Optimizer and schedule: fresh in every round ----

    def _forget_optimizer(self) -> None:
        """Drop what the optimizer has gathered: it makes room for a boundary."""
        zero.reset_state(optimizers.inner(self.optimizer))

    def _fresh_optimizer(self, round_index: int) -> None:
        """
        Optimizer and schedule as `create_optimizer` and `create_scheduler` make them for a round, whoever has
        overridden these. The optimizer object stays, because accelerate and callbacks hold it.
        """
        wrapper: Any = self.optimizer
        inner = optimizers.inner(wrapper)
        if self._given_optimizer:
            inner.state.clear()
            optimizers.set_groups(inner, self._initial_groups)
        else:
            self.optimizer = None
            with self._initially_trained():
                self.create_optimizer()
            fresh, self.optimizer = self.optimizer, wrapper
            if self.is_deepspeed_enabled:
                # Its optimizer has flattened the parameters, and drops a group that has nothing in it.
                optimizers.set_groups(inner, optimizers.groups_of(fresh, with_parameters=True), keep_others=True)
            else:
                optimizers.take_over(inner, fresh)
        self._fresh_schedule(round_index)

    def _fresh_schedule(self, round_index: int) -> None:
        assert self._plan is not None
        self.lr_scheduler = None
        self.create_scheduler(num_training_steps=self._plan.steps(round_index))
        self.callback_handler.lr_scheduler = self.lr_scheduler
        for kind, made in (("optimizer", optimizers.inner(self.optimizer)), ("schedule", self.lr_scheduler)):
            reason = optimizers.why_not(made)
            if reason is not None:
                raise ConfigurationError(
                    f"The {kind} is a {type(made).__name__}, which does not work with {self._what_rounds()}: {reason}"
                )

    def _restore_schedule(self, round_index: int) -> None:
        """A run resumes inside a round: upstream has made a schedule of the whole run's length, and filled it."""
        state, groups = self.lr_scheduler.state_dict(), optimizers.groups_of(self.optimizer)
        self._fresh_schedule(round_index)
        self.lr_scheduler.load_state_dict(state)
        # Making a schedule writes its first rate.
        optimizers.set_groups(self.optimizer, groups)

    @contextmanager
    def _initially_trained(self) -> Iterator[None]:
        """What was to be trained when the run began, also where a callback has frozen some of it since."""
        now = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trained_names)
        try:
            yield
        finally:
            for parameter, trained in now:
                parameter.requires_grad_(trained)

    # ---- Boundaries ----

    def _on_loaded(self, checkpoint: Path) -> None:
        if self.is_deepspeed_enabled and self._weights is not None and self._weights.holds_state(checkpoint):
            # DeepSpeed loads its checkpoints itself, which hold the adapter and not what lies below it.
            self._weights.load(checkpoint)
        super()._on_loaded(checkpoint)

    def _fingerprint(self, model: torch.nn.Module, sharded: bool) -> str:
        return super()._fingerprint(model, sharded) if self._weights is None else self._weights.fingerprint()

    def _on_train_begin(self) -> None:
        assert self._plan is not None
        self._trained_names = frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)
        self._run_started, self._run_started_step = time.monotonic(), self.state.global_step
        self._log_disk_use()
        step = self.state.global_step
        round_index = self._plan.starts_at(step)
        if self._resumed_from is None:
            self._write_run()
        else:
            self._restore_folder(self._resumed_from, self._plan.round_of_checkpoint(step))
        if round_index is not None and (round_index == 0 or self._multi_round):
            # Also where a run resumes exactly at a boundary, so that an evaluation at its start sees the new round.
            self._enter_round(round_index)
        elif self._resumed_from is not None:
            self._reenter_round(self._plan.round_of_checkpoint(step))

    def _on_epoch_begin(self) -> None:
        assert self._plan is not None
        round_index = self._plan.starts_at(self.state.global_step)
        # This event also comes when a run resumes inside an epoch, and after `_on_train_begin` has done the work.
        if self._multi_round and round_index is not None and round_index != self._round:
            self._enter_round(round_index)

    def _on_step_end(self, control: Any) -> Any:
        assert self._plan is not None
        if self._multi_round and self._given_optimizer and self.state.global_step == self._run_started_step + 1:
            # Some make what they keep in their first step.
            inner = optimizers.inner(self.optimizer)
            if (reason := optimizers.why_not(inner, given=True)) is not None:
                raise ConfigurationError(
                    f"A {type(inner).__name__} in `optimizers` does not work with rounds: {reason}"
                )
        # The last steps of a round are logged with it, so that no logged mean spans two rounds.
        if self._multi_round and self.state.global_step in self._plan.starts and self.args.logging_strategy != "no":
            control.should_log = True
        return control

    def _on_train_end(self) -> None:
        assert self._plan is not None
        if self.state.global_step < self._plan.total_steps:
            self._say(
                f"Stopped at step {self.state.global_step} of {self._plan.total_steps}, inside round "
                f"{self._round + 1}: "
                "the weights are those of that step."
            )
            return
        last = self._plan.num_rounds - 1
        self._finish_round(last)
        if self.args.keep_iterates:
            self._keep_final_iterate(last + 1)
        self._finish_policy()
        if self.args.should_save and any(True for _ in self._saving().checkpoint_steps()):
            # The last checkpoint wrote the card before its round was over.
            self._write_card(self._output_dir)

    def _enter_round(self, round_index: int) -> None:
        """From thetahat_t in the live weights to the first step of round t."""
        assert self._weights is not None
        if round_index > 0:
            self._finish_round(round_index - 1)
        begun = time.monotonic()
        if self._multi_round:
            # First of all: the optimizer's state is what makes room for everything below. In the first round it is
            # there only where `train()` is called again.
            self._forget_optimizer()
        folder = RoundFolder(self._output_dir, round_index)
        previous = RoundFolder(self._output_dir, round_index - 1)
        with self._state_errors(round_index):
            self._write_weights(round_index, folder, previous)
        if self._multi_round:
            self._fresh_optimizer(round_index)
        self._round = round_index
        settled = time.monotonic()
        with self._own_random_numbers(round_index), self._evaluating():
            self._after_weights(round_index, folder)
            looked = time.monotonic()
            rows = self._make_rows(round_index, folder)
            made = time.monotonic()
            rows = self._prepare_round(round_index, rows, folder, restored=False)
            prepared = time.monotonic()
        self._swap_rows(rows)
        if round_index > 0 and self.args.should_save:
            durable.discard(previous.path)
        self._round_started = time.monotonic()
        self._boundary_seconds = {
            "weights": settled - begun,
            "data": self._round_started - settled,
            "rows": made - looked,
            "reference": prepared - made,
        }

    def _reenter_round(self, round_index: int) -> None:
        """
        Resume inside round t: the live weights are the checkpoint's, everything else comes from the round's folder.
        """
        folder = RoundFolder(self._output_dir, round_index)
        self._round = round_index
        if self._multi_round:
            self._restore_schedule(round_index)
            with self._own_random_numbers(round_index), self._evaluating():
                rows = self._make_rows(round_index, folder)
                rows = self._prepare_round(round_index, rows, folder, restored=True)
            self._swap_rows(rows)
        self._round_started = time.monotonic()
        self._boundary_seconds = dict.fromkeys(_BOUNDARY_PARTS, 0.0)

    @contextmanager
    def _own_random_numbers(self, round_index: int) -> Iterator[None]:
        """Random numbers drawn inside leave those of training alone; without this a resume at a boundary differs."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            python_state, numpy_state = random.getstate(), np.random.get_state()
            try:
                set_seed(self._round_seed(round_index))
                yield
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)

    def _round_seed(self, round_index: int) -> int:
        return (self.args.seed + 1_000_003 * (round_index + 1)) % 2**31

    def _write_weights(self, round_index: int, folder: RoundFolder, previous: RoundFolder) -> None:
        """Make thetahat_t durable, step to theta_t, make that durable too; or find that both are there already."""
        assert self._weights is not None
        write = self.args.should_save
        fingerprint = self._weights.fingerprint()
        found = folder.manifest()
        # All have looked before anyone writes: else a slow process would find what a fast one has just written.
        self.accelerator.wait_for_everyone()
        content = self._state_content(round_index) | {"iterate": fingerprint}
        if found is not None and all(
            found.get(key) == content[key] for key in ("iterate", "settings", "configuration_hash")
        ):
            if round_index > 0:
                self._step_to_policy(round_index, previous)
            if self._weights.fingerprint() == found["policy"]:
                if write:
                    files = found["files"]
                    if found["run_id"] != self._run_id:
                        # Another run's builder may have made other rows of the same policy.
                        files = {name: entry for name, entry in files.items() if name != _ROWS_FILE}
                        found.pop("num_rows", None)
                    news = {"files": files, "run_id": self._run_id, "summaries": self.round_summaries}
                    durable.write_json(folder.path / durable.MANIFEST, {**found, **news})
                    self._link_iterate(folder)
                self.accelerator.wait_for_everyone()
                return
            self._load_weights(folder.iterate, fingerprint)
        partial = folder.path.with_name(f"{durable.PARTIAL_PREFIX}{folder.path.name}")
        try:
            if write:
                durable.remove(partial)
                partial.mkdir(parents=True)
            self._weights.save(partial / "iterate", write)
            if write and self.processing_class is not None:
                self.processing_class.save_pretrained(partial / "iterate")
            # Every process has read what it needs of the old folder before the writer may replace anything.
            changed = round_index > 0 and self._step_to_policy(round_index, previous)
            if changed:
                self._weights.save(partial / "policy", write)
            content["policy"] = self._weights.fingerprint() if changed else fingerprint
            if write:
                if round_index > 0:
                    durable.link_tree(previous.policy, partial / "previous_policy")
                durable.write_manifest(partial, content)
                durable.publish(partial, folder.path)
                self._link_iterate(folder)
        except BaseException:
            if write:
                durable.remove(partial)
            raise
        self.accelerator.wait_for_everyone()
        # Here rather than in the middle of a round, if processes write to disks of their own.
        folder.whole_manifest()

    def _load_weights(self, folder: Path, expected: str) -> None:
        """Load saved weights; `expected` is their hash."""
        assert self._weights is not None
        self._weights.load(folder)
        if self._weights.fingerprint() != expected:
            raise durable.DamagedStateError(f"The weights in {folder.name} are not those that were saved there.")

    def _step_to_policy(self, round_index: int, previous: RoundFolder) -> bool:
        """From thetahat_t to theta_t in the live weights; whether that is to be saved by itself."""
        assert self._weights is not None
        rebased = self._weights.rebase()
        return self._transition(round_index, previous) or rebased

    def _state_content(self, round_index: int) -> dict[str, Any]:
        """What every manifest of this run says, as of round `round_index`."""
        return {
            "format": "trl-extras rounds",
            "version": STATE_VERSION,
            "trl_extras": __version__,
            "run_id": self._run_id,
            "world_size": self.accelerator.num_processes,
            "round": round_index,
            "base": None if self._weights is None else self._weights.base,
            "num_folds": self._num_folds,
            "settings": [
                {**self.round_settings(t), **(self._transition_settings(t) if t else {})}
                for t in range(round_index + 1)
            ],
            "summaries": self.round_summaries,
            "configuration": self._configuration,
            "configuration_hash": xxhash.xxh3_128_hexdigest(json.dumps(self._configuration, sort_keys=True).encode()),
        }

    def _write_run(self) -> None:
        """
        A fresh start: the folder now belongs to this run, and nobody shall take an earlier one's results for its.
        """
        assert self._plan is not None
        if self.args.should_save:
            rounds = self._output_dir / ROUNDS_DIR
            with self._state_errors(0):
                rounds.mkdir(parents=True, exist_ok=True)
                self._set_iterates_aside(rounds / "iterates")
                for old in rounds.glob("round-*"):
                    if int(old.name.removeprefix("round-")) >= self._plan.num_rounds:
                        durable.discard(old)
                durable.write_json(
                    rounds / "run.json",
                    {"version": STATE_VERSION, "run_id": self._run_id, "configuration": self._configuration},
                )
            self._write_summaries()
        self.accelerator.wait_for_everyone()

    def _set_iterates_aside(self, iterates: Path) -> None:
        """What an earlier run has kept is its result, and its rows of `rounds.jsonl` belong to it."""
        if not iterates.is_dir():
            return
        aside, rows = durable.set_aside(iterates), self._output_dir / "rounds.jsonl"
        if rows.is_file():
            rows.replace(aside / rows.name)
        self._say(f"The iterates that an earlier run has kept in this folder are now in {ROUNDS_DIR}/{aside.name}.")

    def _restore_folder(self, checkpoint: Path, round_index: int) -> None:
        """Bring the round's folder from a checkpoint into the output folder, which may be another one."""
        if self._checkpoint_manifest(checkpoint) is None:
            return
        source, target = RoundFolder(checkpoint, round_index), RoundFolder(self._output_dir, round_index)
        if self.args.should_save:
            with self._state_errors(round_index):
                (self._output_dir / ROUNDS_DIR).mkdir(parents=True, exist_ok=True)
                if source.path.is_dir():
                    here = target.manifest()
                    if here is None or here["files"] != durable.read_manifest(source.path)["files"]:
                        with durable.new_folder(target.path) as partial:
                            durable.link_tree(source.path, partial)
                durable.write_json(
                    self._output_dir / ROUNDS_DIR / "run.json",
                    {"version": STATE_VERSION, "run_id": self._run_id, "configuration": self._configuration},
                )
                self._write_summaries()
        self.accelerator.wait_for_everyone()
        if self._multi_round and target.manifest() is None:
            raise ConfigurationError(
                f"{checkpoint.name} does not hold the state of its round: use another checkpoint."
            )

    def _link_iterate(self, folder: RoundFolder) -> None:
        """Keep what the round before `folder`'s ended with, if iterates are kept."""
        if self.args.keep_iterates and folder.round_index > 0:
            target = self._output_dir / ROUNDS_DIR / "iterates" / str(folder.round_index)
            with durable.new_folder(target) as partial:
                durable.link_tree(folder.iterate, partial)

    def _keep_final_iterate(self, number: int) -> None:
        assert self._weights is not None
        target = self._output_dir / ROUNDS_DIR / "iterates" / str(number)
        partial = target.with_name(f"{durable.PARTIAL_PREFIX}{target.name}")
        with self._state_errors(number - 1):
            if self.args.should_save:
                durable.remove(partial)
            self._weights.save(partial, self.args.should_save)
            if self.args.should_save:
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(partial)
                for path in durable.files_below(partial):
                    durable.sync(path)
                durable.publish(partial, target)
        self.accelerator.wait_for_everyone()

    # ---- Rows ----

    def _make_rows(self, round_index: int, folder: RoundFolder) -> Any:
        """The rows of a round: from its builder, or its fold."""
        if not self._multi_round:
            # The parent's own way, whatever the dataset is; what a second round would compare is recorded all the
            # same.
            self._check_same_rows(self._prepared_train_dataset, folder)
            return self._prepared_train_dataset
        build = self._round_builder(round_index)
        if build is not None:
            return self._built_rows(round_index, folder, build)
        rows = self._fold(round_index)
        self._check_same_rows(rows, folder)
        return rows

    def _fold(self, round_index: int) -> Any:
        """A round's share of the training set."""
        rows = self._prepared_train_dataset
        return rows.select(self._folds[round_index % len(self._folds)]) if self._folds else rows

    def _built_rows(
        self, round_index: int, folder: RoundFolder, build: Callable[[RoundFolder], tuple[Any, dict[str, Any]]]
    ) -> Any:
        assert self._rows is not None
        path = folder.path / _ROWS_FILE
        # Rows that this run built before are kept: the policy that made them may be gone by now. A manifest lists what
        # lies in its folder, but their number, and what is noted beside it, comes with them alone.
        manifest = folder.whole_manifest()
        if self._resumed_from is None or _ROWS_FILE not in manifest["files"] or "num_rows" not in manifest:
            rows, noted = build(folder)
            with self._state_errors(round_index):
                if self.args.should_save:
                    partial = path.with_name(f"{durable.PARTIAL_PREFIX}{path.name}")
                    with _no_dataset_bars():
                        rows.to_parquet(str(partial))
                    durable.sync(partial)
                    partial.replace(path)
                self._add_to_manifest(folder, changed=[_ROWS_FILE], num_rows=len(rows), **noted)
        # From disk for all processes and lives, so that all train on the same rows.
        with _no_dataset_bars():
            rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        planned = len(self._rows)
        if len(rows) > planned:
            raise ConfigurationError(
                f"Round {round_index + 1}: the round data builder returned {len(rows)} rows, but every round has "
                f"{planned}: return at most that many."
            )
        if len(rows) < planned:
            self._warn(
                f"Round {round_index + 1}: {len(rows)} rows instead of {planned}; {planned - len(rows)} are repeats, "
                "in order, because every epoch of a run is equally long."
            )
        return rows

    def _prepare_built(self, built: Any, round_index: int) -> Any:
        if not isinstance(built, datasets.Dataset) or len(built) == 0:
            raise ConfigurationError(
                f"Round {round_index + 1}: the round data builder returned "
                f"{'no rows' if isinstance(built, datasets.Dataset) else type(built).__name__}, but has to return a "
                "`datasets.Dataset` with at least one row."
            )
        # SFTTrainer's method takes more than DPOTrainer's.
        wanted = inspect.signature(self._stock_class()._prepare_dataset).parameters
        offered = {
            "dataset": built,
            "processing_class": self.processing_class,
            "args": self.args,
            "packing": getattr(self.args, "packing", False),
            "formatting_func": None,
            "dataset_name": "train",
        }
        rows = self._prepare_dataset(**{name: value for name, value in offered.items() if name in wanted})
        if len(rows) == 0:
            raise ConfigurationError(
                f"Round {round_index + 1}: all {len(built)} rows of the round data builder were dropped in "
                "preparation, because their responses are empty, or their prompts alone fill `max_length`."
            )
        return rows

    def _check_same_rows(self, rows: Any, folder: RoundFolder) -> None:
        """Record what a round is trained on; refuse to go on with other rows."""
        digest = rows_fingerprint(rows)
        manifest = folder.whole_manifest()
        # Another run's folder that is taken over has lost its number of rows, which a builder of this one may change.
        same = manifest.get("rows") == digest
        if same and "num_rows" in manifest:
            return
        if not same and self._resumed_from is not None and folder.round_index == self._plan_round():
            raise ConfigurationError(
                "`train_dataset` does not give the rows that this round has been trained on so far: pass the data "
                "of the run that you resume, or use another `output_dir`."
            )
        self._add_to_manifest(folder, rows=digest, num_rows=len(rows))

    def _plan_round(self) -> int | None:
        """The round that the run resumed inside of, or None where it began or resumed at a boundary."""
        assert self._plan is not None
        step = self.state.global_step
        return None if self._plan.starts_at(step) is not None else self._plan.round_of_checkpoint(step)

    def _add_to_manifest(self, folder: RoundFolder, changed: Sequence[str] = (), **content: Any) -> None:
        """Bring a manifest up to date: files that are new or `changed`, and further entries. All processes call it."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            manifest = durable.read_manifest(folder.path)
            known = {
                name: entry
                for name, entry in manifest.pop("files").items()
                if name not in changed and (folder.path / name).is_file()
            }
            durable.write_manifest(folder.path, {**manifest, **content}, known)
        self.accelerator.wait_for_everyone()

    # ---- What a round leaves behind ----

    def _finish_round(self, round_index: int) -> None:
        """Measure and record a round while the live weights are what it ended with, thetahat_{t+1}."""
        assert self._weights is not None
        assert self._plan is not None
        self._refuse_non_finite_weights(round_index)
        folder = RoundFolder(self._output_dir, round_index)
        summary: dict[str, Any] = {
            "round": round_index,
            **self._summary_settings(round_index),
            "first_step": self._plan.starts[round_index] + 1,
            "last_step": self._plan.starts[round_index + 1],
        }
        manifest = folder.manifest()
        if manifest is not None:
            summary["rows"] = manifest.get("num_rows")
            summary |= self._weights.distances(folder.policy, folder.iterate, folder.previous_policy)
        now = time.monotonic()
        summary["train_seconds"] = round(now - self._round_started, 3) if self._round == round_index else None
        for name in _BOUNDARY_PARTS:
            # Unknown where the run has resumed at the round's end.
            known = self._round == round_index
            summary[f"boundary_{name}_seconds"] = round(self._boundary_seconds[name], 3) if known else None
        summary |= self._logged_in(round_index)
        self._measure_iterate(round_index, summary)
        self._call_round_end(round_index, summary)
        not_finite: list[str] = []
        summary = durable.as_json(summary, not_finite)
        if not_finite:
            self._warn(
                f"Round {round_index + 1}: {', '.join(not_finite)} in the round's `summary` is not finite, and is "
                "written as null."
            )
        self.round_summaries = [row for row in self.round_summaries if row["round"] != round_index] + [summary]
        with self._state_errors(round_index):
            self._write_summaries()
        self._log_numbers({name: value for name, value in summary.items() if name not in ("train", "eval")})
        self._say(self._round_line(round_index, summary))

    def _log_numbers(self, values: dict[str, Any]) -> None:
        """
        Give a round's numbers to the trackers, as `round/name`, nested ones as `round/name/inner`. Not by `log`: the
        rows of `state.log_history` are upstream's, and overrides of `log` expect those alone.
        """
        logged: dict[str, float] = {}

        def collect(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for name, inner in value.items():
                    collect(f"{prefix}/{name}", inner)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                logged[prefix] = float(value)

        collect("round", values)
        if not logged:
            return
        if self.state.epoch is not None:
            logged["epoch"] = self.state.epoch
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logged)

    def _logged_in(self, round_index: int) -> dict[str, Any]:
        """The last training log and the last evaluation of a round."""
        assert self._plan is not None
        first, last = self._plan.starts[round_index], self._plan.starts[round_index + 1]
        found: dict[str, Any] = {"train": None, "eval": None}
        for entry in self.state.log_history:
            if not first < entry.get("step", 0) <= last:
                continue
            numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float)) and math.isfinite(v)}
            if any(name.startswith("eval_") for name in entry):
                found["eval"] = {k.removeprefix("eval_"): v for k, v in numbers.items() if k.startswith("eval_")}
            elif "loss" in entry:
                found["train"] = {k: v for k, v in numbers.items() if k not in ("epoch", "step")}
        return found

    def _call_round_end(self, round_index: int, summary: dict[str, Any]) -> None:
        hooks = [getattr(callback, "on_round_end", None) for callback in self.callback_handler.callbacks]
        self._calling_round_end = True
        try:
            with self._own_random_numbers(round_index), self._evaluating(), self._held():
                for hook in hooks:
                    if hook is not None:
                        hook(
                            self.args,
                            self.state,
                            self.control,
                            round_index=round_index,
                            summary=summary,
                            model=self.accelerator.unwrap_model(self.model),
                        )
        finally:
            self._calling_round_end = False

    def _round_line(self, round_index: int, summary: dict[str, Any]) -> str:
        assert self._plan is not None
        parts = [f"round {round_index + 1} of {self._plan.num_rounds} done"]
        for name in ("update_norm", "momentum_norm", "update_cosine"):
            if summary.get(name) is not None:
                parts.append(f"{name} {summary[name]:.4g}")
        done = self.state.global_step - self._run_started_step
        left = self._plan.total_steps - self.state.global_step
        if done and left:
            seconds = (time.monotonic() - self._run_started) / done * left
            parts.append(f"about {int(seconds // 60)} min {int(seconds % 60)} s left")
        return ", ".join(parts)

    def _write_summaries(self) -> None:
        if not self.args.should_save:
            return
        path = self._output_dir / "rounds.jsonl"
        temporary = path.with_name(f"{durable.PARTIAL_PREFIX}{path.name}")
        self._output_dir.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in self.round_summaries)
        durable.sync(temporary)
        temporary.replace(path)

    def _log_disk_use(self) -> None:
        """Say what the run will need on disk before it needs it."""
        assert self._weights is not None
        assert self._plan is not None
        # The same formula as `--plan`, with every copy as large as the largest.
        masters = sharding.has_masters(self.model)
        # Two moments; DeepSpeed has its masters and moments in float32, and FSDP2 its own copy of what is trained.
        optimizer = sum(
            sharding.shape_of(p).numel() * (12 if masters else (3 if sharded else 2) * p.element_size())
            for sharded in [self._weights.sharded]
            for p in self.model.parameters()
            if p.requires_grad
        )
        files = sizing.full_files(self._weights.nbytes, self._plan.num_rounds, optimizer=optimizer)
        use = sizing.disk(files, self._saving())
        target = next(path for path in [self._output_dir, *self._output_dir.parents] if path.is_dir())
        free = shutil.disk_usage(target).free
        parts = ", ".join(f"{sizing.shown(size)} for the {part}" for part, size in use.parts.items())
        message = f"disk: at most {sizing.shown(use.peak)} ({parts}); {sizing.shown(free)} are free."
        if use.peak > free:
            self._warn(f"{message} This may not be enough: lower `save_total_limit` or use another `output_dir`.")
        else:
            self._say(message)

    def _saving(self) -> sizing.Saving:
        """What the run saves, and when."""
        assert self._plan is not None
        args, plan = self.args, self._plan
        strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
        epochs, steps = plan.epochs, plan.steps_per_epoch
        if not self._multi_round and strategy == "epoch":
            # The plan of one round has no epochs.
            epochs = (max(math.ceil(args.num_train_epochs), 1),)
            steps = math.ceil(plan.total_steps / epochs[0])
        # Whether the method steps from an iterate to another policy.
        moves = type(self)._transition is not RoundsTrainer._transition
        return sizing.Saving(
            epochs=epochs,
            steps_per_epoch=steps,
            changes=tuple(moves and t > 0 for t in range(plan.num_rounds)),
            strategy=strategy,
            save_steps=max(int(self.state.save_steps or 1), 1),
            limit=args.save_total_limit,
            only_model=args.save_only_model,
            keep_iterates=args.keep_iterates,
            makes_rows=self._makes_rows,
            waits=getattr(self, "_judge", None) == "external",  # `rollouts.config.EXTERNAL`, which builds on this
        )

    # ---- Guards and checkpoints ----

    def _where(self, round_index: int | None = None, ahead: int = 0) -> str:
        at = max(self._round, 0) if round_index is None else round_index
        return f"Round {at + 1}, step {self.state.global_step + ahead}"

    def _refuse_non_finite_weights(self, round_index: int | None = None) -> None:
        name = self._weights.non_finite() if self._weights is not None else None
        if name is not None:
            raise NonFiniteError(
                f"{self._where(round_index)}: {name} holds a nan or an infinity. Training stops, and nothing of this "
                "state is saved; the last whole checkpoint is good. Lower the learning rate."
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self._held():
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._held():
            super().save_model(output_dir, _internal_call)
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            saved = plugin is None or "SHARDED" not in str(plugin.state_dict_type)
            if self._weights is None or _internal_call or saved or not self._weights.sharded:
                return
            # Upstream leaves nothing there that could be loaded.
            folder = Path(output_dir or self.args.output_dir)
            self._weights.save(folder, self.args.should_save)
            if self.args.should_save and self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self._weights is not None and self._weights.holds_state(folder):
            # The adapter that a checkpoint shows is history and adapter in one, of a rank that does not fit.
            self._weights.load(folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _correct_best_checkpoint(self, run_dir: Path) -> None:
        super()._correct_best_checkpoint(run_dir)
        if self._multi_round:
            # Upstream would end the run by removing every checkpoint but this one, the last iterate's included.
            self.state.best_model_checkpoint = None

    def _complete_checkpoint(self, staged: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        content, known = super()._complete_checkpoint(staged)
        if self._weights is not None:
            self._weights.save_state(staged)
        round_index = max(self._round, 0)
        source = RoundFolder(self._output_dir, round_index)
        # A run of one round may have been resumed from a stock checkpoint, which holds none.
        if self._keeps_rounds and source.path.is_dir():
            content = self._state_content(round_index) | content
            target = RoundFolder(staged, round_index)
            durable.link_tree(source.path, target.path)
            prefix = target.path.relative_to(staged).as_posix()
            files = durable.read_manifest(source.path)["files"]
            known |= {f"{prefix}/{name}": entry for name, entry in files.items() if (target.path / name).is_file()}
        return content, known


@contextmanager
def _no_dataset_bars() -> Iterator[None]:
    """A bar for a file that is written in a blink says nothing."""
    if datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
