"""What the methods' scripts share: everything but the method's name and description."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trl_extras.registry import Swap, resolve


if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    Arguments = tuple[ScriptArguments, TrainingArguments, ModelConfig, DatasetMixtureConfig]


@dataclass(frozen=True)
class TrainingScript:
    """
    TRL's `dpo` or `sft` script, which take the same arguments, for a registered method: their flags and YAML keys,
    those of the method's config, and no others.

    Args:
        name: the method's name in the registry, and the subcommand's.
        summary: one line that says what the method is, its abbreviation written out.
    """

    name: str
    summary: str

    @property
    def prog(self) -> str:
        return f"trl-extras {self.name}"

    @cached_property
    def _classes(self) -> Swap:
        # Not before they are needed: `trl-extras --help` asks for the summary alone.
        return resolve(self.name).load()

    def make_parser(self, prog: str | None = None) -> argparse.ArgumentParser:
        """The script's parser, a `TrlParser` that takes no shortened flags and shows the method's own ones first."""
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

        config = self._classes.config
        dataclass_types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig)
        sections = _sections(config, [ScriptArguments, ModelConfig, DatasetMixtureConfig])

        class Parser(TrlParser):
            """Puts each flag under the class that it is a field of, where upstream adds them to the parser itself."""

            groups: Any = None

            def add_argument(self, *names: Any, **kwargs: Any) -> Any:
                section = sections.get(kwargs.get("dest") or str(names[0]).lstrip("-"))
                if section is None:  # --help
                    return super().add_argument(*names, **kwargs)
                if self.groups is None:
                    titles = dict.fromkeys(sections.values())
                    self.groups = {title: self.add_argument_group(title) for title in titles}
                return self.groups[section].add_argument(*names, **kwargs)

        parser: argparse.ArgumentParser = Parser(
            dataclass_types,
            prog=prog,
            allow_abbrev=False,
            # argparse's own names every flag before it explains the first one.
            usage="%(prog)s [--config recipe.yaml] [flags]",
            description=f"{self.summary} Every flag is a key of the YAML file too, and wins over it. `{self.prog}` "
            "also takes the flags of `accelerate launch`, and --accelerate_config; with --plan it says what the run "
            "would take (steps, disk, memory) and trains nothing, with --plan_json the same as JSON; --plan_for gpu "
            "(or cpu) plans for a machine with GPUs (or without), whatever this one has.",
        )
        return parser

    def parse_arguments(self, argv: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
        """Read the command line and the YAML file it names. Raises `trl_extras.run.UserError` where they are wrong."""
        from trl_extras.run import Ledger, strict_parsers

        prog = prog or self.prog
        ledger = Ledger(prog, prog)
        with strict_parsers(ledger):
            parser: Any = self.make_parser(prog)
            arguments: Arguments = parser.parse_args_and_config(argv)
        script_args, _, model_args, dataset_args = arguments
        if not script_args.dataset_name and not dataset_args.datasets:
            raise ledger.error("no dataset is given: set dataset_name, or datasets in the YAML file")
        if not model_args.model_name_or_path:
            raise ledger.error("no model is given: set model_name_or_path")
        return arguments

    def trainer_arguments(
        self,
        script_args: ScriptArguments,
        training_args: Any,
        model_args: ModelConfig,
        dataset_args: DatasetMixtureConfig,
    ) -> dict[str, Any]:
        """What the trainer is made with; loads the dataset."""
        from accelerate.logging import get_logger
        from trl import get_dataset, get_peft_config, get_quantization_config

        from trl_extras.errors import ConfigurationError
        from trl_extras.named_data import load

        _refuse_missing_folder(str(model_args.model_name_or_path))
        train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
        where = "`datasets`" if dataset_args.datasets else f"`dataset_name` ({script_args.dataset_name!r})"
        if dataset_args.datasets and script_args.dataset_name:
            get_logger(__name__).warning("`datasets` is given, so `dataset_name` is not used.")
        try:
            if dataset_args.datasets:
                dataset: Any = get_dataset(dataset_args)
            else:
                dataset = load(
                    script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming
                )
        except Exception as error:
            raise ConfigurationError(f"{where}, split {train_split!r}, cannot be loaded: {error}") from error
        evaluates = training_args.eval_strategy != "no"
        for field, split in (("dataset_train_split", train_split), ("dataset_test_split", test_split)):
            if split not in dataset and (evaluates or field == "dataset_train_split"):
                raise ConfigurationError(
                    f"{where}, split {split!r}, cannot be loaded: it has {', '.join(dataset)} (`{field}`)."
                )

        # What the user put into `model_init_kwargs` is the more specific wish.
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "trust_remote_code": training_args.trust_remote_code,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
        return {
            "model": model_args.model_name_or_path,
            "args": training_args,
            "train_dataset": dataset[train_split],
            "eval_dataset": dataset[test_split] if evaluates else None,
            "quantization_config": get_quantization_config(model_args),
            "peft_config": get_peft_config(model_args),
        }

    def main(
        self,
        script_args: ScriptArguments,
        training_args: Any,
        model_args: ModelConfig,
        dataset_args: DatasetMixtureConfig,
    ) -> None:
        """Load, train, save and, if asked to, push."""
        import torch

        given = self.trainer_arguments(script_args, training_args, model_args, dataset_args)
        trainer: Any = self._classes.trainer(**given)
        if script_args.ignore_bias_buffers:
            # The name under which torch's DDP looks for buffers that it must not synchronise.
            trainer.model._ddp_params_and_buffers_to_ignore = [
                name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
            ]

        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model(training_args.output_dir)
        trainer.accelerator.print(f"Trained; the model is in {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
            trainer.accelerator.print(f"Pushed to the Hub as {trainer.hub_model_id}.")
        if hasattr(trainer, "end"):  # transformers 5.18: closes the trackers and the process group
            trainer.end()

    def run(self) -> None:
        """The script as a program: `main`, with what the user can mend said in one line."""
        from trl_extras.errors import ConfigurationError
        from trl_extras.run import UserError, report

        try:
            self.main(*self.parse_arguments())
        except UserError as error:
            raise SystemExit(report(error, self.prog)) from None
        except ConfigurationError as error:
            raise SystemExit(report(UserError(str(error)), self.prog)) from None


def _refuse_missing_folder(model: str) -> None:
    """Refuse what can only be a path and is not there: transformers would look for it on the Hub."""
    from trl_extras.errors import ConfigurationError

    if (model.startswith((os.sep, ".", "~")) or model.count("/") > 1) and not os.path.isdir(model):
        raise ConfigurationError(f"`model_name_or_path` is {model!r}, but there is no such folder.")


def _sections(config: type[Any], others: Sequence[type[Any]]) -> dict[str, str]:
    """
    The heading that each flag stands under in `--help`, by its field: the class that brings the field or changes its
    default. In the order of the headings: the method's own classes, model and data, and what the method inherits.
    """
    lines = [cls for cls in config.__mro__ if "__dataclass_fields__" in vars(cls)]
    inherited = [cls for cls in lines if cls.__module__.split(".")[0] in ("trl", "transformers")]
    own = [cls for cls in lines if cls not in inherited]
    sections: dict[str, str] = {}
    title = config.__name__
    for cls in [*own, *others, *inherited]:
        # What TRL's private bases bring goes with the public class that they stand behind.
        title = title if cls.__name__.startswith("_") else cls.__name__
        for name in inspect.get_annotations(cls):
            sections.setdefault(name, f"fields of {title}")
    return sections
