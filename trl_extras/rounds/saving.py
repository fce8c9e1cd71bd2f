"""
Checkpoints that survive a kill, resuming from them, and the model card: a mixin in front of any trainer of TRL's.

What upstream leaves open, and what is done instead, stands in `checkpoints.py`.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import DistributedType, is_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from .. import __version__
from .._compat import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME
from ..errors import ConfigurationError
from ..named_data import check_kinds
from ..rows import check_extracted, check_pairs, check_templates, plain
from ..tensor_files import WeightsFolder
from ..used_up import UsedUp
from . import checkpoints, durable, sharding
from .data import rows_fingerprint
from .state import STATE_VERSION, FullWeights, fingerprint
from .tokens import FOLDER as TOKENS_DIR
from .tokens import DatedRows


if TYPE_CHECKING:
    # For the type checker the mixin is a trainer; at run time it goes in front of one.
    from transformers import Trainer as _Parent
else:
    _Parent = object

logger = logging.get_logger(__name__)

# What a user mends by making room or changing rights.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}


def asked_for(plugin: str) -> bool:
    """Whether `accelerate launch` was told to use a plugin."""
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true", "yes", "on")


def fsdp_version(config: Any) -> int | None:
    """Which FSDP is asked for, by the training arguments or by `accelerate launch`; None if none is."""
    version = (getattr(config, "fsdp_plugin_args", None) or {}).get("fsdp_version")
    if version is None and asked_for("FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
    return None if version is None else int(version)


def asks_for_deepspeed(config: Any) -> bool:
    """Whether the arguments or `accelerate launch` ask for DeepSpeed."""
    return bool(config.deepspeed or getattr(config, "deepspeed_plugin", None) is not None or asked_for("DEEPSPEED"))


def _rows_of(dataset: Any) -> str:
    """A hash of a dataset, or of several by name; of one without a length, its kind."""
    if isinstance(dataset, dict):
        return " ".join(f"{name}: {_rows_of(one)}" for name, one in dataset.items())
    return rows_fingerprint(dataset) if isinstance(dataset, datasets.Dataset) else type(dataset).__name__


class NonFiniteError(RuntimeError):
    """Training has produced a nan or an infinity. The last good state is on disk."""


class _AfterLoading(TrainerCallback):
    """Looks at the weights of a resumed run before anything else does."""

    def __init__(self, trainer: WholeCheckpoints):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._resumed_from is not None:
            self.trainer._on_loaded(self.trainer._resumed_from)


class WholeCheckpoints(_Parent):
    """
    Mixin for a TRL trainer: a folder named `checkpoint-N` is whole or not there, a loss that is not finite stops the
    run, and the model card says what was done.

    Attributes:
        config_class: the config dataclass of this trainer.
    """

    config_class: type[Any]
    # The folder that a checkpoint is written to before it gets its name.
    _staging: Path | None = None
    _resume_is_checked = False
    # The checkpoint that the run goes on from.
    _resumed_from: Path | None = None
    # What `_complete_checkpoint` writes of the weights, on which all processes have to look.
    _saved_weights: dict[str, str] | None = None
    # Of a model with an adapter, the names of what is trained.
    _adapter_names: frozenset[str] = frozenset()
    _dated: DatedRows
    # Datasets whose rows have been looked at.
    _read: list[datasets.Dataset]
    _made_with: UsedUp

    # ---- The constructor's arguments ----

    def _stock_class(self) -> Any:
        """The TRL class behind this one."""
        return next(cls for cls in type(self).__mro__ if cls.__module__.startswith("trl."))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments by name, as the TRL class behind this one takes them, with a config."""
        stock = self._stock_class()
        names = list(inspect.signature(stock.__init__).parameters)[1:]
        if len(args) > len(names) or set(names[: len(args)]) & kwargs.keys():
            raise TypeError(f"{type(self).__name__} takes the arguments of {stock.__name__}, each once: {names}.")
        self.__dict__.setdefault("_dated", DatedRows())
        self.__dict__.setdefault("_read", [])
        # Keywords that TRL's class does not know are those of a class in between.
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        config = given.get("args")
        if config is None:
            model = given.get("model")
            name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
            config = given["args"] = self.config_class(f"{str(name).split('/')[-1] or 'model'}-{self._name}")
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"`args` has to be of type {self.config_class.__name__} for {type(self).__name__}, but is of type "
                f"{type(config).__name__}: the former has the same fields and its own."
            )
        check_kinds(given)
        self._read_rows(given)
        return given

    def _read_rows(self, given: dict[str, Any]) -> None:
        """The datasets as they are read, once, and what can be known to be wrong with their rows."""
        tokenizer = given.get("processing_class")
        if isinstance(tokenizer, ProcessorMixin):
            # It has a template of its own, and messages are made into parts for it first.
            tokenizer = None
        for field in ("train_dataset", "eval_dataset"):
            value = given.get(field)
            named = value if isinstance(value, dict) else {"": value}
            read = {name: plain(rows) for name, rows in named.items()}
            given[field] = read if isinstance(value, dict) else read[""]
            for name, rows in read.items():
                if any(rows is known for known in self._read) or not isinstance(rows, datasets.Dataset):
                    continue
                self._read.append(rows)
                where = f"`{field}`" + (f" {name!r}" if name else "")
                self._check_raw_rows(rows, where, tokenizer)

    def _check_raw_rows(self, rows: datasets.Dataset, where: str, tokenizer: Any) -> None:
        """Refuse rows that would be read as something else; `tokenizer` is None where none is given."""
        if {"chosen", "rejected"} <= set(rows.column_names):
            check_pairs(rows, where)
            check_extracted(rows, where)
        if tokenizer is not None:
            check_templates(rows, where, tokenizer)

    def _check_resume(self, config: Any) -> None:
        """Check the checkpoint that the configuration names; one given to `train()` alone is checked there."""
        if self._resume_is_checked:
            return
        self._resume_is_checked = True
        checkpoint, _ = self._resolve(config.resume_from_checkpoint, Path(config.output_dir))
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)

    def _resolve(self, value: Any, output_dir: Path) -> tuple[Path | None, list[str]]:
        """
        Which checkpoint to go on from. The main process reads and checks them, which may be a terabyte; the others
        take its word, and its error.
        """
        found: Any = None
        if not sharding.several_processes() or torch.distributed.get_rank() == 0:
            try:
                found = checkpoints.resolve(value, output_dir, self._run_of(output_dir))
            except ValueError as error:
                found = error
        found = sharding.of_main(found)
        if isinstance(found, ValueError):
            raise found
        checkpoint, told = found
        return checkpoint, told

    def _check_checkpoint(self, checkpoint: Path) -> dict[str, Any] | None:
        """
        Check that a checkpoint is one that this run can go on from. Returns its manifest, or None for a stock
        trainer's.

        Raises:
            ValueError: what is wrong with it.
        """
        manifest = self._checkpoint_manifest(checkpoint)
        method = (manifest or {}).get("method", self._name)
        if method != self._name:
            raise ConfigurationError(
                f"{checkpoint.name} was written by {method}, but this run is {self._name}: start from its weights "
                "instead, with it as the model, in another `output_dir`."
            )
        return manifest

    @staticmethod
    def _checkpoint_manifest(checkpoint: Path) -> dict[str, Any] | None:
        path = checkpoint / durable.MANIFEST
        return durable.read_manifest(checkpoint) if path.is_file() else None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **named: Any) -> Any:
        prepare: Any = super()._prepare_dataset
        rows = self._dated.rows(
            dataset,
            processing_class,
            args,
            self._stock_class().__name__,
            lambda: prepare(dataset, processing_class, args, *rest, **named),
        )
        name = named.get("dataset_name") or rest[-1]
        # SPR says it of offline responses itself.
        if name != "offline" and isinstance(rows, datasets.Dataset) and len(rows) == 0 < len(dataset):
            raise ConfigurationError(
                f"All {len(dataset)} rows of the {name} set are dropped, because their prompts alone fill "
                f"`max_length` ({args.max_length}): raise it."
            )
        return rows

    # ---- The run ----

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def _say(self, message: str) -> None:
        """A line for the user, once, without tearing progress bars."""
        if self.is_world_process_zero():
            tqdm.write(f"[{self._name}] {message}")

    def _warn(self, message: str) -> None:
        """A warning, once for all processes."""
        if self.is_world_process_zero():
            logger.warning(message)

    def _run_of(self, output_dir: Path) -> str | None:
        """The run that an output folder belongs to, if known: checkpoints of another one are not resumed from."""
        return None

    def _begin(self, checkpoint: Path | None) -> None:
        """The checkpoint to go on from is settled, and upstream has not begun."""
        self._check_vocabulary()
        self._dated.keep(self._output_dir, self.args.should_save, self.accelerator.wait_for_everyone)
        if is_peft_model(self.model):
            trained = (name for name, weight in self.model.named_parameters() if weight.requires_grad)
            self._adapter_names = frozenset(trained)
        if fsdp_version(self.args) is not None and self.accelerator.distributed_type != DistributedType.FSDP:
            kind = "DDP" if self.accelerator.num_processes > 1 else "a single process"
            self._warn(
                f"FSDP is asked for, but accelerate runs {kind}, as it does where there is no GPU: every process "
                "holds the whole model."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        shards = plugin is not None and "SHARDED" in str(plugin.state_dict_type)
        if shards and getattr(self, "_weights", None) is None:
            self._warn(
                "FSDP has `SHARDED_STATE_DICT`, with which `save_model` writes nothing that transformers loads: use "
                "`FULL_STATE_DICT`, or merge the newest checkpoint with `accelerate merge-weights`."
            )
        if sharding.several_processes():
            # All in any case: one process that streams would leave the others waiting.
            for name in ("train_dataset", "eval_dataset"):
                sharding.agree(f"`{name}`", _rows_of(getattr(self, name, None)), "how it is loaded")

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The parent's `train`.

        Args:
            resume_from_checkpoint: `True`, `"true"`, `"True"` or `"last"` takes the newest whole checkpoint in
                `output_dir`, or starts from the beginning, saying so; a path takes that one.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another run.
        """
        self._settle_arguments()
        self._tidy()
        checkpoint, told = self._resolve(resume_from_checkpoint, self._output_dir)
        for line in told:
            self._say(line)
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
        self._resumed_from = checkpoint
        self._begin(checkpoint)
        if checkpoint is not None:
            self._say(f"Going on from {checkpoint.name}.")
        if not any(isinstance(callback, _AfterLoading) for callback in self.callback_handler.callbacks):
            self.callback_handler.callbacks.insert(0, _AfterLoading(self))
        if (
            checkpoint is not None
            and self.args.should_save
            and checkpoint.parent.resolve() == self._output_dir.resolve()
        ):
            # A kill may have come between a checkpoint and the removal of older ones.
            state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            checkpoints.rotate(
                self._output_dir, self.args.save_total_limit, state["global_step"], state.get("best_model_checkpoint")
            )
        path = None if checkpoint is None else str(checkpoint)
        try:
            return super().train(
                resume_from_checkpoint=path, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs
            )
        finally:
            # Upstream leaves it set where training ends by an exception; an evaluation by hand looks at it.
            self.is_in_train = False

    def _partly_used(self) -> dict[str, Callable[[Any], Any]]:
        """Of fields that the constructor has used in part, which part, as a function of the value; a method's own."""
        return {}

    def _note_arguments(self) -> None:
        """The end of the constructor: `args` may be changed until `train()`, where that can still count."""
        self._made_with = UsedUp(self.args, self._partly_used())

    def _settle_arguments(self) -> None:
        """
        `train()` begins, with `args` as they are now.

        Raises:
            ConfigurationError: they are not valid, or a change since the trainer was made cannot count.
        """
        self._made_with.check(self.args)
        self._train_batch_size = self.args.train_batch_size

    def _tidy(self) -> None:
        """Remove what a killed run left unfinished."""
        if self.args.should_save:
            durable.sweep(self._folders_to_sweep())
            durable.remove(self._output_dir / checkpoints.STAGING_DIR)
        self.accelerator.wait_for_everyone()

    def _check_vocabulary(self) -> None:
        """A token without an embedding fails in the middle of a step, or on a GPU somewhere else."""
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        embeddings = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        pad, known = tokenizer.pad_token_id, getattr(embeddings, "num_embeddings", None)
        if pad is not None and known is not None and pad >= known:
            raise ConfigurationError(
                f"The padding token {tokenizer.pad_token!r} has the id {pad}, but the model has {known} embeddings: "
                "call `model.resize_token_embeddings(len(tokenizer))`, or use EOS for padding."
            )

    def _folders_to_sweep(self) -> list[Path]:
        """Where a killed run may have left files under temporary names."""
        return [self._output_dir, self._output_dir / TOKENS_DIR]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, without dropout, and as it was afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    # ---- Guards ----

    def _where(self, round_index: int | None = None, ahead: int = 0) -> str:
        """The last step, or the one that many ahead of it, for messages; a method in rounds names the round too."""
        return f"Step {self.state.global_step + ahead}"

    @contextmanager
    def _state_errors(self, round_index: int | None = None) -> Iterator[None]:
        """Name the step in whatever goes wrong while state is written."""
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            free = shutil.disk_usage(self._output_dir).free if self._output_dir.is_dir() else 0
            raise RuntimeError(
                f"{self._where(round_index)}: the run's state could not be written ({error.strerror or error}; "
                f"{free / 1e9:.1f} GB are free). The last whole checkpoint stays; make room and go on with "
                "`resume_from_checkpoint='last'`."
            ) from error

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Upstream logs the mean of earlier losses in place of a non-finite one, and trains on.
        if not torch.isfinite(loss).all():
            raise NonFiniteError(
                f"{self._where(ahead=1)}: the loss is {loss.item()}. Training stops; the last whole checkpoint is "
                "good. Lower the learning rate or look at the data of this step."
            )
        return loss

    def _refuse_non_finite_weights(self) -> None:
        """Raise a [`NonFiniteError`] if a weight is not finite; a method's own."""

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A push reads the folder in the background: it waits until the checkpoint has its final name.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Upstream's checkpoint, written elsewhere, completed, synced, and then renamed."""
        if trial is not None:
            return super()._save_checkpoint(model, trial)
        self._refuse_non_finite_weights()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run_dir, staging = self._output_dir, self._output_dir / checkpoints.STAGING_DIR
        final, staged = run_dir / name, staging / name
        with self._state_errors():
            if self.args.should_save:
                durable.remove(staging)
            self.accelerator.wait_for_everyone()
            try:
                self._staging = staging
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            self._correct_best_checkpoint(run_dir)
            self._saved_weights = self._describe_weights()
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                content, known = self._complete_checkpoint(staged)
                durable.write_manifest(staged, content, known)
                durable.publish(staged, final)
                durable.remove(staging)
                if self.args.push_to_hub:
                    # A push under way may still read a checkpoint that is about to go.
                    self._finish_current_push()
                best = self.state.best_model_checkpoint
                checkpoints.rotate(run_dir, self.args.save_total_limit, self.state.global_step, best)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        return None

    def _correct_best_checkpoint(self, run_dir: Path) -> None:
        """Upstream has looked for the best checkpoint in the staging folder."""
        best = self.state.best_global_step
        if best:
            folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            if best == self.state.global_step or folder.is_dir():
                self.state.best_model_checkpoint = str(folder)

    def _complete_checkpoint(self, staged: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """
        Add to a checkpoint that is about to get its name what going on from it takes, on the process that writes.

        Returns:
            What its manifest says, and the entries of files whose checksums are known already, by relative path.
        """
        content = {
            "format": "trl-extras checkpoint",
            "version": STATE_VERSION,
            "trl_extras": __version__,
            "method": self._name,
            "weights": self._saved_weights,
        }
        return content, {}

    # ---- Weights that are loaded ----

    def _describe_weights(self) -> dict[str, str]:
        """
        A hash of the live weights, and how they are divided, on which it depends. All processes call it.
        """
        model = self.accelerator.unwrap_model(self.model)
        sharded = sharding.is_sharded(model)
        layout = f"{self.accelerator.distributed_type.value}, {self.accelerator.num_processes} parts"
        return {"fingerprint": self._fingerprint(model, sharded), "layout": layout if sharded else "whole"}

    def _fingerprint(self, model: torch.nn.Module, sharded: bool) -> str:
        if not is_peft_model(model):
            return FullWeights(model).fingerprint()
        sharding.settle(model)
        adapter = ((name, p) for name, p in model.named_parameters() if name in self._adapter_names)
        return fingerprint(adapter, sharded)

    def _on_loaded(self, checkpoint: Path) -> None:
        """Upstream has loaded a checkpoint to go on from."""
        self._check_loaded(checkpoint)
        if self.state.global_step >= self.state.max_steps:
            self._say(f"{checkpoint.name} is the end of a run of this length: there is nothing left to train.")

    def _check_loaded(self, checkpoint: Path) -> None:
        """Refuse to go on with other weights than a checkpoint was saved with: upstream loads what names agree on."""
        saved = (self._checkpoint_manifest(checkpoint) or {}).get("weights")
        found = self._describe_weights()
        if saved is not None and saved["layout"] == found["layout"] and saved["fingerprint"] != found["fingerprint"]:
            raise ConfigurationError(
                f"The weights after loading {checkpoint.name} are not those that it was saved with: pass a model of "
                "the same architecture, in the same dtype, with the same adapter."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Upstream's, with every weight in the dtype it had: peft loads adapters in float32, but TRL trains one on a
        quantized model in bfloat16."""
        if self._is_renamed(Path(resume_from_checkpoint)):
            self._load_renamed(Path(resume_from_checkpoint))
            return
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self._is_renamed(best):
            self._load_renamed(best)
        else:
            super()._load_best_model()
        self._check_loaded(best)

    def _is_renamed(self, folder: Path) -> bool:
        """
        Whether a model was saved under other names than it has in memory: transformers gives many architectures their
        original ones (GPT-NeoX, mixtures of experts), but its Trainer loads by name and keeps what it does not find.
        """
        model = self.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(model, PreTrainedModel):
            return False
        if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            return False
        saved = WeightsFolder(folder)
        return any(name not in saved for name, _ in model.named_parameters())

    def _load_renamed(self, folder: Path) -> None:
        """Load a whole model by way of transformers' own conversion of names."""
        model: Any = self.model
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())

    # ---- Model card ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Upstream writes a card with a checkpoint or a push only.
        if not _internal_call and self.args.should_save:
            self._write_card(Path(output_dir or self.args.output_dir))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card to `output_dir`: what was trained, how, and what came of it; no local paths."""
        if not self._paper.get("title"):
            # A method of somebody's own, which has no card of ours.
            super().create_model_card(model_name, dataset_name, tags)
            return
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
        self._write_card(folder, model_name, dataset_name, tags)

    def _write_card(self, folder: Path, *about: Any) -> None:
        """Write the model card of a saved model."""
        # Here, because a card tells of rounds and rollouts, which stand on this module.
        from ..cards import build_card

        if self.is_world_process_zero() and self._paper.get("title"):
            build_card(self, *about).save(folder / "README.md")
