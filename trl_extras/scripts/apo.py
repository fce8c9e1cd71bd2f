"""Accelerated Preference Optimization (APO) from the command line: a dataset of preferences, or of prompts with
something that judges, a model, and rounds of DPO.

```bash
trl-extras apo --config recipe.yaml
accelerate launch trl_extras/scripts/apo.py \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --num_rounds 3 \\
    --extrapolation_alpha 0.3 \\
    --output_dir Qwen2-0.5B-APO
```

Flags and YAML keys are those of TRL's `dpo` script plus the fields of [`APOConfig`]; unknown and shortened ones are
refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from trl_extras.apo import APOConfig

    Arguments = tuple[ScriptArguments, APOConfig, ModelConfig, DatasetMixtureConfig]

PROG = "trl-extras apo"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The script's parser, a `TrlParser` that takes no shortened flags."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_extras.apo import APOConfig

    dataclass_types = (ScriptArguments, APOConfig, ModelConfig, DatasetMixtureConfig)
    parser: argparse.ArgumentParser = TrlParser(dataclass_types, prog=prog, allow_abbrev=False)
    return parser


def parse_arguments(argv: Sequence[str] | None = None, prog: str = PROG) -> Arguments:
    """Read the command line and the YAML file it names. Raises `trl_extras.run.UserError` where they are wrong."""
    from trl_extras.run import Ledger, strict_parsers

    ledger = Ledger(prog, prog)
    with strict_parsers(ledger):
        parser: Any = make_parser(prog)
        arguments: Arguments = parser.parse_args_and_config(argv)
    script_args, _, model_args, dataset_args = arguments
    if not script_args.dataset_name and not dataset_args.datasets:
        raise ledger.error("no dataset is given: set dataset_name, or datasets in the YAML file")
    if not model_args.model_name_or_path:
        raise ledger.error("no model is given: set model_name_or_path")
    return arguments


def main(
    script_args: ScriptArguments,
    training_args: APOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Load, train, save and, if asked to, push."""
    import torch
    from accelerate.logging import get_logger
    from datasets import load_dataset
    from trl import get_dataset, get_peft_config, get_quantization_config

    from trl_extras.apo import APOTrainer

    if dataset_args.datasets:
        if script_args.dataset_name:
            get_logger(__name__).warning("`datasets` is given, so `dataset_name` is not used.")
        dataset: Any = get_dataset(dataset_args)
    else:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )

    # What the user put into `model_init_kwargs` is the more specific wish.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluates = training_args.eval_strategy != "no"
    trainer: Any = APOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
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


if __name__ == "__main__":
    from trl_extras.errors import ConfigurationError
    from trl_extras.run import UserError, report

    try:
        main(*parse_arguments())
    except UserError as error:
        raise SystemExit(report(error, PROG)) from None
    except ConfigurationError as error:
        raise SystemExit(report(UserError(str(error)), PROG)) from None
