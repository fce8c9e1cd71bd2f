"""
What we rely on in TRL, transformers, accelerate and huggingface_hub beyond their documented interfaces. When an
upgrade breaks us, it breaks here first; the line under each test says what of ours goes wrong if it fails.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import trl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.training_args import OptimizerNames
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser

import trl_extras
from tests import tiny
from trl_extras import _compat
from trl_extras.apo import APOConfig, APOTrainer
from trl_extras.rollouts import RolloutsTrainer
from trl_extras.rounds import RoundsTrainer, checkpoints, durable
from trl_extras.rounds import config as rounds_config
from trl_extras.rounds.saving import WholeCheckpoints
from trl_extras.rounds.state import ROUNDS_DIR, FullWeights
from trl_extras.rounds.trainer import _FREE_FIELDS
from trl_extras.spo import SPOTrainer
from trl_extras.spr import SPRConfig, SPRTrainer


PACKAGE = Path(trl_extras.__file__).parent
STOCK = (DPOTrainer, SFTTrainer)


# ---- Our own code: what it may touch ----


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_only_compat_imports_private_names() -> None:
    """Else: a private name that moves has to be looked for all over the package."""
    found = []
    for path, tree in trees():
        if path == Path("_compat.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [f"{path}: {name}" for name in names if private(name) and not name.startswith("trl_extras.")]
    assert not found


# Private attributes of other packages that the package reads, sets or calls, with the test below that pins each.
FOREIGN_ATTRIBUTES = {
    "_AppendAction": "test_argparse",
    "_SubParsersAction": "test_argparse",
    "_actions": "test_argparse",
    "_option_string_actions": "test_argparse",
    "_auto_reshard_after_forward": "test_fsdp2_keeps_how_it_reshards_in_groups",
    "_dp_group": "test_deepspeed_is_pinned_elsewhere",
    "_created_lr_scheduler": "test_the_scheduler_is_made_anew_and_for_the_steps_that_are_given",
    "_ddp_params_and_buffers_to_ignore": "test_ddp_reads_the_buffers_to_ignore",
    "_finish_current_push": "test_a_push_can_be_waited_for",
    "_from_config": "test_an_empty_model_is_made_of_a_config",
    "_fsdp_param_groups": "test_fsdp2_keeps_how_it_reshards_in_groups",
    "_get_fsdp_state": "test_fsdp2_keeps_how_it_reshards_in_groups",
    "_get_output_dir": "test_a_checkpoint_goes_where_get_output_dir_says",
    "_hf_deepspeed_config_weak_ref": "test_transformers_remembers_the_deepspeed_configuration",
    "_hp_mapping": "test_deepspeed_is_pinned_elsewhere",
    "_hp_optimizer_states_linked": "test_deepspeed_is_pinned_elsewhere",
    "_is_root": "test_fsdp2_keeps_how_it_reshards_in_groups",
    "_metrics": "test_metrics_are_lists_that_log_averages",
    "_name": "test_card_attributes",
    "_name_or_path": "test_a_model_knows_where_it_came_from",
    "_load_best_model": "test_the_best_model_is_loaded_by_one_method",
    "_load_from_checkpoint": "test_a_resume_loads_the_adapter_by_one_method",
    "_paper": "test_card_attributes",
    "_precompute_model_hash": "test_the_model_hash_keys_the_cache_of_reference_log_probs",
    "_precompute_ref_logps": "test_reference_log_probs_are_computed_in_the_constructor",
    "_prepare_dataset": "test_signatures",
    "_prepare_inputs": "test_signatures",
    "_push_from_checkpoint": "test_uploads_leave_out_what_begins_with_an_underscore",
    "_set_signature_columns_if_needed": "test_columns_that_reach_the_collator_are_listed",
    "_signature_columns": "test_columns_that_reach_the_collator_are_listed",
    "_save_checkpoint": "test_a_checkpoint_goes_where_get_output_dir_says",
    "_tag_names": "test_card_attributes",
    "_get_train_sampler": "test_compat_names_are_there",
    "_train_batch_size": "test_compat_names_are_there",
}


def test_fsdp2_keeps_how_it_reshards_in_groups() -> None:
    """Else: after sampling from shards, training has whole weights in memory that it should have given back."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    setter = inspect.getsource(FSDPModule.set_reshard_after_forward)
    for used in ("_get_fsdp_state()", "state._auto_reshard_after_forward", "state._fsdp_param_groups",
                 "fsdp_param_group.post_forward_mesh_info ="):  # fmt: skip
        assert used in setter
    settled = inspect.getsource(FSDPState._lazy_init)
    assert "if self._auto_reshard_after_forward:" in settled
    assert "self._is_root = True" in settled
    # What it comes to: test_sharding.py, `resharding_is_what_it_was`.


def test_deepspeed_is_pinned_elsewhere() -> None:
    """DeepSpeed is no dependency: what is used of it is pinned where it is installed, and this sees to the list."""
    pinned = (Path(__file__).parent / "test_zero.py").read_text(encoding="utf-8")
    for name, test in FOREIGN_ATTRIBUTES.items():
        if test == "test_deepspeed_is_pinned_elsewhere":
            assert name in pinned.split("def test_what_is_used_of_deepspeed")[1]


def test_transformers_remembers_the_deepspeed_configuration() -> None:
    """Else: reward models are divided like the policy, and sampling waits for processes that have nothing to do."""
    from transformers.integrations import deepspeed

    assert deepspeed._hf_deepspeed_config_weak_ref is None
    assert not deepspeed.is_deepspeed_zero3_enabled()
    source = inspect.getsource(deepspeed.is_deepspeed_zero3_enabled)
    assert "_hf_deepspeed_config_weak_ref" in source
    assert "_hf_deepspeed_config_weak_ref = None" in inspect.getsource(deepspeed.unset_hf_deepspeed_config)


def test_an_empty_model_is_made_of_a_config() -> None:
    """Else: `--plan` cannot count the weights of a model whose class is not AutoModelForCausalLM's."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(tiny.make_model().config)
    assert next(model.parameters()).is_meta


def test_every_foreign_private_attribute_is_listed_and_tested() -> None:
    """Else: something of ours rests on a private name that no test watches."""
    used: dict[str, str] = {}
    own: set[str] = set()
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and private(node.attr):
                used.setdefault(node.attr, f"{path}:{node.lineno}")
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
    upstream = {name for stock in STOCK for name in dir(stock)} | set_on_self(*STOCK)
    foreign = {name: where for name, where in used.items() if name not in own or name in upstream}
    assert foreign.keys() <= FOREIGN_ATTRIBUTES.keys(), {k: foreign[k] for k in foreign.keys() - FOREIGN_ATTRIBUTES}
    assert set(FOREIGN_ATTRIBUTES.values()) <= globals().keys()


def test_columns_that_reach_the_collator_are_listed(tmp_path: Path) -> None:
    """Else: the weights of SPR's rows are removed before its loss sees them, or our list is overwritten."""
    rows = tiny.make_sft_rows(4).add_column("reward", [0.0, 1.0, 0.0, 1.0])
    trainer = SPRTrainer(
        model=tiny.make_model(),
        args=SPRConfig(**tiny.arguments(tmp_path, num_generations=0, num_rounds=1)),
        train_dataset=rows,
        processing_class=tiny.make_tokenizer(),
    )
    trainer._set_signature_columns_if_needed()
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns == ["input_ids", "labels", "seq_lengths", "weight"]


def adapted() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def test_a_resume_loads_the_adapter_by_one_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: a resume would put the rounds' adapters together, of another rank, into the adapter of one round."""
    asked: list[str] = []
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, path, model=None: asked.append(path))

    def make(**kwargs: Any) -> Any:
        return DPOTrainer(
            model=adapted(),
            args=DPOConfig(**tiny.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **kwargs)),
            train_dataset=tiny.make_pairs(12),
            processing_class=tiny.make_tokenizer(),
        )

    make().train()
    make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert asked == [str(tmp_path / "checkpoint-1")]


def test_the_best_model_is_loaded_by_one_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: the best model is loaded by name, and what was saved under other names stays the last one's."""
    asked: list[str] = []
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: asked.append(self.state.best_model_checkpoint))
    trainer = DPOTrainer(
        model=tiny.make_model(),
        args=DPOConfig(
            **tiny.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps"),
            eval_steps=1,
            load_best_model_at_end=True,
        ),
        train_dataset=tiny.make_pairs(12),
        eval_dataset=tiny.make_pairs(4, seed=3),
        ref_model=tiny.make_model(),
        processing_class=tiny.make_tokenizer(),
    )
    trainer.train()
    assert asked == [trainer.state.best_model_checkpoint]


def test_a_passed_adapter_has_a_copy_as_reference(tmp_path: Path) -> None:
    """Else: rounds would leave it in the output, or take the wrong reference."""
    trainer = DPOTrainer(
        model=adapted(),
        args=DPOConfig(**tiny.arguments(tmp_path)),
        train_dataset=tiny.make_pairs(12),
        processing_class=tiny.make_tokenizer(),
    )
    assert set(trainer.model.peft_config) == {"default", _compat.REFERENCE_ADAPTER}
    batch = trainer.data_collator([trainer.train_dataset[0]])
    copied = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.model.delete_adapter(_compat.REFERENCE_ADAPTER)
    disabled = trainer.compute_ref_log_probs(trainer.model, batch)
    assert not torch.equal(copied[0], disabled[0])


def test_a_lora_layer_calls_its_base_layer_and_merges_by_get_delta_weight(tmp_path: Path) -> None:
    """Else: the rounds' history below the adapter would be left out, of the reference or of what is merged."""
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    called: list[bool] = []
    layer.base_layer.register_forward_hook(lambda *args: called.append(layer.disable_adapters))
    tokens = torch.arange(4, 8)[None]
    model(input_ids=tokens)
    with model.disable_adapter():
        model(input_ids=tokens)
    assert called == [False, True]
    before = layer.base_layer.weight.detach().clone()
    layer.get_delta_weight = lambda adapter: torch.ones_like(before)
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before + 1)
    assert layer.merged


def test_peft_saves_the_state_that_it_is_given(tmp_path: Path) -> None:
    """Else: the rounds' adapters together could not be saved as one."""
    model = adapted()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    state = {f"{name}.default.weight": torch.ones(5, 7)}
    model.save_pretrained(str(tmp_path), state_dict=state, selected_adapters=["default"], save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert list(saved) == [f"{name}.weight"]
    assert saved[f"{name}.weight"].shape == (5, 7)


def test_a_push_can_be_waited_for() -> None:
    """Else: rotation could remove a checkpoint that a push in the background still reads."""
    for name in _compat.CALLED_TRAINER_METHODS:
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self"]


def set_on_self(*classes: type[Any]) -> set[str]:
    """The instance attributes that the methods of these classes and of their bases set."""
    source = "".join(inspect.getsource(base) for cls in classes for base in cls.__mro__ if base is not object)
    return set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", source))


def test_our_names_hide_nothing_of_upstreams_by_accident() -> None:
    """Else: a new method or attribute of upstream's and one of ours overwrite each other, silently."""
    overridden = {
        WholeCheckpoints: {
            *_compat.OVERRIDDEN_TRAINER_METHODS, *_compat.OVERRIDDEN_LOADING, *_compat.OVERRIDDEN_DATA_METHODS,
            "create_model_card", "save_model", "train", "training_step",
        },
        RoundsTrainer: {
            "_load_from_checkpoint", "_save_checkpoint", "get_train_dataloader", "save_model",
            "set_initial_training_values", "train",
        },
        RolloutsTrainer: {*_compat.OVERRIDDEN_DATA_METHODS, "evaluate"},
        APOTrainer: {*_compat.OVERRIDDEN_DPO_METHODS, "_name", "_paper", "_tag_names"},
        SPOTrainer: {
            *_compat.OVERRIDDEN_DPO_METHODS, "compute_loss", "evaluate", "evaluation_loop", "get_batch_samples",
            "log", "prediction_step", "train", "training_step", "_name", "_paper", "_tag_names",
        },
        SPRTrainer: {
            *_compat.OVERRIDDEN_DATA_METHODS, *_compat.OVERRIDDEN_SFT_METHODS, "compute_loss", "train", "_name",
            "_paper", "_tag_names",
        },
    }  # fmt: skip
    set_on_purpose = {
        WholeCheckpoints: {"is_in_train", *_compat.TRAINER_ATTRIBUTES},
        RoundsTrainer: {"args", "control", "train_dataset", "optimizer", "lr_scheduler"},
        RolloutsTrainer: set(),
        APOTrainer: {*_compat.DPO_ATTRIBUTES, "eval_dataset"} - {"precompute_ref_logps"},
        SPOTrainer: {*_compat.SPO_ATTRIBUTES, "beta", "ref_model"} - {"_metrics"},
        SPRTrainer: set(_compat.SPR_ATTRIBUTES),
    }
    for ours, wanted in overridden.items():
        own = SFTTrainer if ours is SPRTrainer else DPOTrainer
        for stock in STOCK if ours in (WholeCheckpoints, RoundsTrainer) else (own,):
            theirs = {*dir(stock), *set_on_self(stock)}
            hidden = {name for name in vars(ours) if name in theirs and not name.startswith("__")}
            assert hidden == wanted, (ours.__name__, stock.__name__)
            set_by_us = set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(ours)))
            assert set_by_us & theirs == set_on_purpose[ours], (ours.__name__, stock.__name__)


def test_compat_names_are_there() -> None:
    """Else: a name listed in `_compat.py` has gone, and what overrides it is never called."""
    assert all(hasattr(_compat, name) for name in _compat.__all__)
    assert all(callable(getattr(Trainer, name)) for name in _compat.OVERRIDDEN_TRAINER_METHODS)
    assert all(callable(getattr(DPOTrainer, name)) for name in _compat.OVERRIDDEN_DPO_METHODS)
    assert all(callable(getattr(SFTTrainer, name)) for name in _compat.OVERRIDDEN_SFT_METHODS)
    assert set(_compat.SPR_ATTRIBUTES) <= set_on_self(SFTTrainer)
    assert {*_compat.DPO_ATTRIBUTES, *_compat.SPO_ATTRIBUTES} <= set_on_self(DPOTrainer)
    for name in _compat.CALLED_IN_ROUNDS:
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", "train_dataset"]
    assert set(_compat.TRAINER_ATTRIBUTES) <= set_on_self(Trainer)
    assert all(callable(getattr(Trainer, name)) for name in _compat.CALLED_BY_SPO)
    assert transformers.trainer.TRAINER_STATE_NAME == _compat.TRAINER_STATE_NAME


# ---- Signatures ----


@pytest.mark.parametrize(
    ("owner", "method", "parameters"),
    [
        (Trainer, "_get_output_dir", "trial"),
        (Trainer, "_save_checkpoint", "model trial"),
        (Trainer, "_push_from_checkpoint", "checkpoint_folder"),
        (Trainer, "set_initial_training_values", "args dataloader"),
        (Trainer, "create_scheduler", "num_training_steps optimizer"),
        (Trainer, "create_optimizer", "model"),
        (Trainer, "save_model", "output_dir _internal_call"),
        (Trainer, "train", "resume_from_checkpoint trial ignore_keys_for_eval"),
        (Trainer, "training_step", "model inputs num_items_in_batch"),
        (Trainer, "get_batch_samples", "epoch_iterator num_batches device"),
        (Trainer, "_prepare_inputs", "inputs"),
        (DPOTrainer, "compute_loss", "model inputs return_outputs num_items_in_batch"),
        (DPOTrainer, "compute_ref_log_probs", "model inputs"),
        (DPOTrainer, "prediction_step", "model inputs prediction_loss_only ignore_keys"),
        (DPOTrainer, "log", "logs start_time"),
        (DPOTrainer, "_precompute_ref_logps", "dataset name batch_size"),
        (DPOTrainer, "_prepare_dataset", "dataset processing_class args dataset_name"),
        (SFTTrainer, "_prepare_dataset", "dataset processing_class args packing formatting_func dataset_name"),
        (SFTTrainer, "compute_loss", "model inputs return_outputs num_items_in_batch"),
        (SFTTrainer, "_set_signature_columns_if_needed", ""),
        (DPOTrainer, "create_model_card", "model_name dataset_name tags"),
        (TrlParser, "parse_args_and_config",
         "args return_remaining_strings fail_with_unknown_args separate_remaining_strings"),
        (TrlParser, "parse_dict", "args allow_extra_keys"),
        (transformers.HfArgumentParser, "parse_dict", "args allow_extra_keys"),
        (TrlParser, "parse_args_into_dataclasses",
         "args return_remaining_strings look_for_args_file args_filename args_file_flag"),
        (transformers.HfArgumentParser, "parse_args_into_dataclasses",
         "args return_remaining_strings look_for_args_file args_filename args_file_flag"),
        (transformers.TrainerState, "save_to_json", "json_path"),
    ],
)  # fmt: skip
def test_signatures(owner: type[Any], method: str, parameters: str) -> None:
    """Else: our override, or our call, passes arguments to the wrong places."""
    assert " ".join(list(inspect.signature(getattr(owner, method)).parameters)[1:]) == parameters


def test_constructors_have_the_arguments_that_are_checked_before_weights_load() -> None:
    """Else: `RoundsTrainer._unsupported` looks for an argument that has another name, and refuses nothing."""
    common = {
        "model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers",
        "quantization_config", "peft_config",
    }  # fmt: skip
    for stock in STOCK:
        assert common <= inspect.signature(stock.__init__).parameters.keys()
    assert "ref_model" in inspect.signature(DPOTrainer.__init__).parameters


# ---- Settings that we name ----


def test_settings_that_we_refuse_are_still_settings() -> None:
    """Else: a renamed setting or value is no longer refused with more than one round."""
    wanted = {
        "load_best_model_at_end", "auto_find_batch_size", "dataloader_persistent_workers", "train_sampling_strategy",
        "optim", "lr_scheduler_type", "max_steps", "num_train_epochs", "deepspeed", "fsdp", "parallelism_config",
        "enable_jit_checkpoint", "save_only_model", "gradient_accumulation_steps", "seed",
    }  # fmt: skip
    for config in (DPOConfig, SFTConfig):
        assert wanted <= {field.name for field in fields(config)}
    assert "sync_ref_model" in {field.name for field in fields(DPOConfig)}
    assert set(rounds_config._METRIC_SCHEDULES) <= {kind.value for kind in SchedulerType}
    optimizers = {kind.value for kind in OptimizerNames}
    assert set(rounds_config._UNRESETTABLE_OPTIMIZERS) <= optimizers
    assert any(name.startswith("schedule_free") for name in optimizers)
    assert any(name.endswith("_layerwise") for name in optimizers)
    sampling = next(field for field in fields(DPOConfig) if field.name == "train_sampling_strategy")
    assert set(sampling.metadata["choices"]) == {"random", "sequential", *rounds_config._LENGTH_SAMPLING}


def tiny_config(config: type[Any], folder: Any = "unused", **kwargs: Any) -> Any:
    return config(**tiny.arguments(folder, **kwargs))


def test_free_fields_are_fields() -> None:
    """Else: a renamed field that changes nothing makes a run that goes on look like another run."""
    known = {field.name for config in (APOConfig, SFTConfig) for field in fields(config)}
    assert not _FREE_FIELDS - known


def test_config_tells_what_we_ask_it() -> None:
    """Else: the rows are counted wrongly before training, or a folder is written by every process."""
    config = tiny_config(DPOConfig)
    assert (config.train_batch_size, config.world_size, config.should_save) == (2, 1, True)
    assert config.distributed_state is not None
    assert {"learning_rate", "beta", "seed"} <= config.to_dict().keys()
    assert issubclass(DPOConfig, _compat._BaseConfig)
    assert issubclass(DPOTrainer, _compat._BaseTrainer)


# ---- The training loop ----


@pytest.fixture
def make_dpo(base: Path, tmp_path: Path) -> Any:
    def make(callbacks: Any = None, **kwargs: Any) -> DPOTrainer:
        return DPOTrainer(
            model=str(base),
            args=tiny_config(DPOConfig, tmp_path / "dpo", **{"num_train_epochs": 2, **kwargs}),
            train_dataset=tiny.make_pairs(6),
            processing_class=tiny.make_tokenizer(),
            callbacks=callbacks,
        )

    return make


def test_initial_values(make_dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: the plan of the rounds is made of the wrong numbers, or upstream trains another number of epochs."""
    seen = []
    original = Trainer.set_initial_training_values

    def longer(self: Any, args: Any, dataloader: Any) -> Any:
        seen.append(original(self, args, dataloader))
        args = copy.copy(args)
        args.num_train_epochs = 3
        seen.append(original(self, args, dataloader))
        return seen[-1]

    monkeypatch.setattr(Trainer, "set_initial_training_values", longer)
    trainer = make_dpo(gradient_accumulation_steps=2)
    trainer.train()
    # 6 rows in batches of 2, two to a step: two steps an epoch, the second of one batch.
    assert [(len(values), values[0], values[1], values[-1]) for values in seen] == [(7, 2, 2, 4), (7, 3, 2, 6)]
    assert (trainer.state.global_step, trainer.state.max_steps, trainer.state.num_train_epochs) == (6, 6, 3)
    assert trainer.args.num_train_epochs == 2


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.events.append(f"{name} {state.global_step}")
        return super().__getattribute__(name)


def test_order_of_events(make_dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: a round's data are swapped after they were read, or a checkpoint holds theta in place of thetahat."""
    recorder = Recorder()
    trainer = make_dpo(callbacks=[recorder], save_strategy="steps", save_steps=3)
    iterate = torch.utils.data.SequentialSampler.__iter__
    monkeypatch.setattr(
        torch.utils.data.RandomSampler,
        "__iter__",
        lambda self: recorder.events.append("the dataloader is read") or iterate(self),
    )
    save = type(trainer)._save_checkpoint
    monkeypatch.setattr(
        type(trainer),
        "_save_checkpoint",
        lambda self, *args: recorder.events.append("_save_checkpoint") or save(self, *args),
    )
    trainer.train()
    wanted = {
        "on_train_begin",
        "on_epoch_begin",
        "on_step_end",
        "on_log",
        "on_save",
        "on_train_end",
        "the",
        "_save_checkpoint",
    }
    events = [event for event in recorder.events if event.split()[0] in wanted]
    epoch = ["on_epoch_begin {}", "the dataloader is read"]
    assert events[:3] == ["on_train_begin 0", *(event.format(0) for event in epoch)]
    assert events[3:5] == ["on_step_end 1", "on_log 1"]
    end = events.index("on_step_end 3")
    assert events[end : end + 6] == [
        "on_step_end 3", "on_log 3", "_save_checkpoint", "on_save 3", "on_epoch_begin 3", "the dataloader is read",
    ]  # fmt: skip
    assert events[-1] == "on_train_end 6"


def test_epoch_begin_fires_inside_an_epoch_when_resumed(make_dpo: Any, tmp_path: Path) -> None:
    """Else: `_on_epoch_begin` need not tell a boundary from a resume."""
    make_dpo(save_strategy="steps", save_steps=2).train()
    recorder = Recorder()
    resumed = make_dpo(callbacks=[recorder])
    resumed.train(resume_from_checkpoint=str(tmp_path / "dpo/checkpoint-2"))
    assert [event for event in recorder.events if "begin" in event and "step" not in event] == [
        "on_init_begin 0", "on_train_begin 2", "on_epoch_begin 2", "on_epoch_begin 3",
    ][1:]  # fmt: skip


def test_callbacks_are_a_list(make_dpo: Any) -> None:
    """Else: our callback cannot be put in front, and others see a round's old weights."""
    assert isinstance(make_dpo().callback_handler.callbacks, list)


def test_a_checkpoint_goes_where_get_output_dir_says(make_dpo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Else: upstream writes into `checkpoint-N` itself, half-written for a while, or deletes finished checkpoints."""
    finished = tmp_path / "dpo/checkpoint-1"
    finished.mkdir(parents=True)
    staging = tmp_path / "dpo" / checkpoints.STAGING_DIR
    written: list[str] = []
    save = transformers.TrainerState.save_to_json
    monkeypatch.setattr(
        transformers.TrainerState,
        "save_to_json",
        lambda self, path: written.extend(p.name for p in Path(path).parent.iterdir()) or save(self, path),
    )
    monkeypatch.setattr(DPOTrainer, "_get_output_dir", lambda self, trial: str(staging))
    make_dpo(save_strategy="steps", save_steps=6, save_total_limit=1).train()
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(written), "the state is last"
    assert (staging / "checkpoint-6" / _compat.TRAINER_STATE_NAME).is_file()
    assert finished.is_dir(), "only the folder that it was told of is rotated"


def test_the_state_of_a_schedule_does_not_hold_its_length() -> None:
    """Else: a run that resumes inside a round goes on with the schedule that upstream makes for the whole run."""
    needed: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": 1e-6},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-6},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }

    def make(kind: Any, steps: int) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = transformers.get_scheduler(
            kind, optimizer, num_warmup_steps=1, num_training_steps=steps,
            scheduler_specific_kwargs=needed.get(kind.value),
        )  # fmt: skip
        return optimizer, scheduler

    def step(optimizer: Any, scheduler: Any) -> float:
        optimizer.step()
        scheduler.step()
        return optimizer.param_groups[0]["lr"]  # type: ignore[no-any-return]

    for kind in SchedulerType:
        if kind.value in rounds_config._METRIC_SCHEDULES:
            continue
        whole = make(kind, 6)
        rates = [step(*whole) for _ in range(5)]
        before, upstreams = make(kind, 6), make(kind, 18)
        assert [step(*before) for _ in range(3)] == rates[:3], kind
        upstreams[1].load_state_dict(before[1].state_dict())
        again = make(kind, 6)
        again[1].load_state_dict(upstreams[1].state_dict())
        assert [step(*again) for _ in range(2)] == rates[3:], kind


def test_the_scheduler_is_made_anew_and_for_the_steps_that_are_given(make_dpo: Any) -> None:
    """Else: every round has the whole run's schedule."""
    trainer = make_dpo(learning_rate=1.0)
    assert not trainer._created_lr_scheduler
    trainer.create_optimizer()
    trainer.create_scheduler(num_training_steps=4)
    first, trainer.lr_scheduler = trainer.lr_scheduler, None
    trainer.create_scheduler(num_training_steps=8)
    second = trainer.lr_scheduler
    assert trainer._created_lr_scheduler
    assert first is not second
    assert (first.lr_lambdas[0](2), second.lr_lambdas[0](2)) == (0.5, 0.75)


def test_the_optimizer_is_wrapped_and_its_state_can_be_cleared(make_dpo: Any) -> None:
    """Else: a round begins with the last round's moments."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            inner = optimizer.optimizer
            assert isinstance(inner, torch.optim.Optimizer)
            seen.append(len(inner.state))
            assert len(optimizer.state) == len(inner.state)
            inner.state.clear()

    make_dpo(callbacks=[Look()], max_steps=2).train()
    assert seen[0] == seen[1] > 0


def test_a_training_step_returns_its_loss(make_dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: a nan loss goes unseen: upstream logs the mean of the others in its place."""
    losses = []
    step = DPOTrainer.training_step
    monkeypatch.setattr(
        DPOTrainer, "training_step", lambda self, *a, **k: losses.append(step(self, *a, **k)) or losses[-1]
    )
    trainer = make_dpo(max_steps=2)
    trainer.train()
    assert [loss.item() for loss in losses] == [
        pytest.approx(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    assert trainer.args.logging_nan_inf_filter


# ---- DPO ----


def test_reference_log_probs_are_computed_in_the_constructor(make_dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: APOTrainer does not recognise the training set that it leaves for the rounds."""
    calls = []

    def record(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        calls.append((name, dataset is self.train_dataset, batch_size))
        return dataset

    monkeypatch.setattr(DPOTrainer, "_precompute_ref_logps", record)
    trainer = make_dpo(precompute_ref_log_probs=True)
    assert calls == [("train", True, 2)]
    assert trainer.precompute_ref_logps is True


def test_the_model_hash_keys_the_cache_of_reference_log_probs(make_dpo: Any) -> None:
    """Else: a round silently gets another round's reference."""
    trainer = make_dpo(precompute_ref_log_probs=True)
    columns = ["ref_chosen_logps", "ref_rejected_logps"]
    bare = trainer.train_dataset.remove_columns(columns)
    first = trainer._precompute_ref_logps(bare, "train", 2)[columns[0]][:]
    trainer.ref_model = None
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2)
    trainer.model.eval()
    assert trainer._precompute_ref_logps(bare, "train", 2)[columns[0]][:] == first, "an old hash, the old values"
    trainer._precompute_model_hash = "another"
    again = trainer._precompute_ref_logps(bare, "train", 2)
    assert again[columns[0]][:] != first
    assert again.column_names[-2:] == columns


def test_without_precomputing_there_is_a_reference_to_write_into(make_dpo: Any) -> None:
    """Else: a round's reference cannot be the policy that it starts from."""
    trainer = make_dpo()
    assert trainer.precompute_ref_logps is False
    assert trainer.ref_model is not trainer.model
    names = [name for name, _ in trainer.model.named_parameters()]
    assert [name for name, _ in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters()] == names


def test_beta_and_the_reference_are_read_at_every_step(make_dpo: Any) -> None:
    """Else: a round is trained with the first round's beta or reference."""
    trainer = make_dpo()
    inputs = trainer.data_collator([trainer.train_dataset[0]])

    def loss() -> float:
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, inputs).item()

    trainer.ref_model.get_output_embeddings().weight.data.mul_(2)
    first = loss()
    trainer.beta = 10 * trainer.beta
    second = loss()
    trainer.ref_model.get_output_embeddings().weight.data.mul_(2)
    assert len({first, second, loss()}) == 3


# ---- What SPO stands on ----


def test_the_model_is_called_first_for_the_policy_and_then_the_reference_is_read(make_dpo: Any) -> None:
    """Else: SPOTrainer's stand-in for the model keeps something else than the policy's log-probabilities."""
    trainer = make_dpo()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    calls = []

    def model(**kwargs: Any) -> Any:
        calls.append((sorted(kwargs), trainer.model(**kwargs)))
        # From here on the parent looks into the batch, not at a reference model.
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (
            torch.tensor([-1.0, -2.0]),
            torch.tensor([-3.0, -4.0]),
        )
        return calls[-1][1]

    trainer.ref_model = None
    trainer.precompute_ref_logps = True
    loss = trainer.compute_loss(model, inputs)
    ((names, outputs),) = calls
    assert {"labels", "fused_lm_head", "input_ids", "attention_mask"} <= set(names)
    mask = inputs["completion_mask"][:, 1:]
    assert outputs.log_probs.shape == mask.shape
    assert not outputs.log_probs[mask == 0].any(), "zero outside of the responses"
    chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
    margin = (chosen + torch.tensor([1.0, 2.0])) - (rejected + torch.tensor([3.0, 4.0]))
    assert torch.allclose(loss, -torch.nn.functional.logsigmoid(trainer.beta * margin).mean())


def test_an_empty_list_of_losses_is_a_loss_of_zero(make_dpo: Any) -> None:
    """Else: SimPO or DPOP alone cannot be added to nothing."""
    trainer = make_dpo()
    trainer.loss_types, trainer.loss_weights = [], []
    assert trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]])) == 0.0


def test_metrics_are_lists_that_log_averages(make_dpo: Any) -> None:
    """Else: SPO's metrics are not logged, or not averaged over the logging window."""
    trainer = make_dpo(logging_steps=3)
    step = trainer.training_step

    def training_step(*args: Any) -> Any:
        trainer._metrics["train"]["ours"].append(float(trainer.state.global_step))
        return step(*args)

    trainer.training_step = training_step
    trainer.train()
    assert [entry["ours"] for entry in trainer.state.log_history if "ours" in entry] == [1.0, 4.0]


def test_a_window_is_what_get_batch_samples_returns(make_dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: inner steps do not know their window: its micro-batches, in order, the very objects."""
    trainer = make_dpo(gradient_accumulation_steps=2, num_train_epochs=1)
    windows, seen = [], []
    get, step = trainer.get_batch_samples, trainer.training_step
    monkeypatch.setattr(trainer, "get_batch_samples", lambda *args: windows.append(get(*args)) or windows[-1])
    monkeypatch.setattr(
        trainer,
        "training_step",
        lambda *args: seen.append((args[1], trainer.current_gradient_accumulation_steps)) or step(*args),
    )
    trainer.train()
    assert [len(samples) for samples, _ in windows] == [2, 1]
    batches = [batch for samples, _ in windows for batch in samples]
    assert all(given is batch for (given, _), batch in zip(seen, batches, strict=True))
    assert [count for _, count in seen] == [2, 2, 1], "what the loss is divided by"


def test_a_model_knows_where_it_came_from(base: Path) -> None:
    """Else: the tokenizer of a model that was passed as an object is not found."""
    assert transformers.AutoModelForCausalLM.from_pretrained(base).config._name_or_path == str(base)


def test_the_help_of_loss_type_names_the_losses() -> None:
    """Else: a slip in `loss_type` is found out after the weights have loaded."""
    known = set(re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))
    assert {"sigmoid", "hinge", "ipo", "sft", "robust", "sigmoid_norm"} <= known
    source = inspect.getsource(DPOTrainer)
    assert all(f'"{name}"' in source for name in known)
    assert not known & {"simpo", "dpop"}, "TRL has one of our losses now: leave it to TRL"


def test_card_attributes() -> None:
    """Else: the model card shows another method's name, tags or paper."""
    assert isinstance(DPOTrainer._tag_names, list)
    assert isinstance(DPOTrainer._name, str)
    assert {"title", "id", "citation"} <= DPOTrainer._paper.keys()


# ---- Files ----


def test_weights_are_saved_under_the_names_in_memory(tmp_path: Path) -> None:
    """Else: a round's weights cannot be read back by name."""
    assert "save_original_format" in inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    model = tiny.make_model()
    model.save_pretrained(tmp_path, save_original_format=False)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys(), "tied weights once, under the same name"
    FullWeights(model).load(tmp_path)


def test_get_last_checkpoint_sees_finished_ones_only(tmp_path: Path) -> None:
    """Else: a stock script resumes from a folder that is being written or removed."""
    names = (
        "checkpoint-2", checkpoints.STAGING_DIR, ROUNDS_DIR, f"{durable.PARTIAL_PREFIX}checkpoint-9",
        f"{durable.TRASH_PREFIX}checkpoint-8", f"{checkpoints.STAGING_DIR}/checkpoint-7",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_uploads_leave_out_what_begins_with_an_underscore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: the rounds' state, several copies of the weights, is pushed to the Hub."""
    uploads: list[dict[str, Any]] = []
    api = SimpleNamespace(upload_folder=lambda **kwargs: uploads.append(kwargs))
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    trainer = SimpleNamespace(
        is_world_process_zero=lambda: True, push_in_progress=None, processing_class=None, hub_model_id="a/b",
        state=SimpleNamespace(global_step=1, epoch=1),
        control=None, callback_handler=SimpleNamespace(on_push_begin=lambda *args: None),
        args=tiny_config(DPOConfig, tmp_path),
    )  # fmt: skip
    Trainer._push_from_checkpoint(trainer, str(tmp_path / "checkpoint-1"))
    ours = [f"{ROUNDS_DIR}/round-0001/iterate/model.safetensors", f"{ROUNDS_DIR}/run.json"]
    ours += [f"{checkpoints.STAGING_DIR}/checkpoint-3/model.safetensors", f"{durable.TRASH_PREFIX}checkpoint-2/x"]
    kept = filter_repo_objects(
        [*ours, "rounds.jsonl", "model.safetensors"], ignore_patterns=uploads[0]["ignore_patterns"]
    )
    assert list(kept) == ["rounds.jsonl", "model.safetensors"]
    assert 'ignore_patterns=["_*"' in inspect.getsource(Trainer.push_to_hub), "the push at the end, too"


# ---- The command line ----


def test_argparse() -> None:
    """Else: `trl-extras` and the launcher cannot tell which flags exist."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="append")
    parser.add_subparsers().add_parser("child")
    assert isinstance(parser._option_string_actions["--flag"], argparse._AppendAction)
    assert any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)


def test_trl_parser_leaves_unknown_keys_over() -> None:
    """Else: a misspelt YAML key vanishes, because the launcher finds out from what this returns."""
    parser = TrlParser(DPOConfig)
    assert parser.set_defaults_with_config(no_such_field=3, learning_rate=1e-3) == ["--no_such_field", "3"]
    assert TrlParser.__mro__[1] is not transformers.HfArgumentParser, "two families of parsers to make strict"


def test_launching() -> None:
    """Else: `trl-extras apo` cannot start a run."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    arguments = launch_command_parser().parse_args(["--num_processes", "2", "script.py", "--flag", "1"])
    assert (arguments.num_processes, arguments.training_script) == (2, "script.py")
    assert arguments.training_script_args == ["--flag", "1"]
    assert list(inspect.signature(launch_command).parameters) == ["args"]
    assert resolve_accelerate_config_argument(["--num_processes", "2"]) == ["--num_processes", "2"]
    words = resolve_accelerate_config_argument(["--accelerate_config", "single_gpu"])
    assert words[0] == "--config_file"
    assert words[1].endswith("single_gpu.yaml")


def test_stock_scripts_and_classes_are_where_the_launcher_swaps_them() -> None:
    """Else: a script goes on with the stock class."""
    script = Path(trl.__file__).parent / "scripts/dpo.py"
    assert "DPOTrainer(" in script.read_text(encoding="utf-8")
    assert trl.DPOTrainer is trl.trainer.dpo_trainer.DPOTrainer
    assert trl.DPOConfig is trl.trainer.dpo_config.DPOConfig


def test_ddp_reads_the_buffers_to_ignore() -> None:
    """Else: `--ignore_bias_buffers` does nothing."""
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(torch.nn.parallel.DistributedDataParallel)
