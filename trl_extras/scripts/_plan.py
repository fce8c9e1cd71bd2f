"""
`trl-extras METHOD --plan`: what a run would take. Reads the configuration, the model's config and the dataset; loads
no weights, starts nothing and writes nothing.

The arithmetic is `trl_extras.sizing`'s; here is what it is given, and how it is shown.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trl_extras import sizing
from trl_extras.errors import ConfigurationError
from trl_extras.rollouts.config import EXTERNAL
from trl_extras.rounds.plan import RoundPlan
from trl_extras.run import UserError
from trl_extras.sizing import shown


if TYPE_CHECKING:
    from trl_extras.registry import Swap

    from ._training import Arguments, TrainingScript


# Rows that are tokenised to find the longest: those with the most characters.
_LONGEST = 64
# Beside a decoder whose parameters we count like this, the model is another kind.
_SAME_SIZE = 0.02
_SHARDINGS = {1: sizing.DDP, 2: sizing.ZERO2, 3: sizing.ZERO3}


class _Checked(Exception):
    """The trainer's own checks are through, and what follows is the parent's constructor, which loads weights."""


@dataclass(frozen=True)
class Launch:
    """How many processes there would be, and what they share."""

    processes: int = 1
    sharding: str = sizing.DDP
    # What accelerate tells its processes by their environment.
    environment: tuple[tuple[str, str], ...] = ()
    machines: int = 1
    gpu: bool = False
    # Mixed precision by the launcher, None where it says nothing.
    precision: str | None = None
    notes: tuple[str, ...] = ()
    # DeepSpeed's configuration, as far as the launcher's flags or file tell it; None without DeepSpeed.
    deepspeed: Any = None


@dataclass
class Round:
    """A round, or the whole run of a method without rounds."""

    rows: int | None
    epochs: float
    steps: int | None
    learning_rate: float
    schedule: str
    warmup_steps: int | None
    settings: dict[str, Any]


@dataclass
class RunPlan:
    """What `--plan` says."""

    method: str
    launch: Launch
    model: dict[str, Any]
    rounds: list[Round]
    folds: int
    rows: int | None
    left_out: int
    steps: int | None
    batch: dict[str, Any]
    disk: sizing.Disk | None
    memory: sizing.Memory | None
    free_disk: int
    checkpoints: str
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, sizes in bytes."""
        content = asdict(self)
        if self.memory is not None:
            content["memory"] |= {
                "peak": self.memory.peak, "highest": self.memory.highest, "unknown": self.memory.unknown,
            }  # fmt: skip
        return content


def show(
    script: TrainingScript, arguments: Arguments, launcher: Any, as_json: bool = False, machine: str | None = None
) -> int:
    """
    Print the plan of a run; the exit status.

    Args:
        arguments: what the script would be called with.
        launcher: the parsed arguments of `accelerate launch`.
        machine: "gpu" or "cpu", what the run would have; what this machine has by default.

    Raises:
        UserError: the run would be refused, with the same words.
    """
    try:
        with _without_bars(), on_machine(machine):
            plan = make(script, arguments, launch_of(launcher, arguments[1], machine))
    except ConfigurationError as error:
        raise UserError(str(error)) from error
    print(json.dumps(plan.to_dict(), default=str) if as_json else text(plan))
    return 0


@contextmanager
def _without_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# ---- What the launcher would start ----


@contextmanager
def on_machine(machine: str | None) -> Iterator[None]:
    """Let what looks for a GPU while arguments are checked find the machine that is planned for."""
    if machine is None:
        yield
        return
    from transformers import training_args

    from trl_extras.rollouts import vllm

    there = machine == "gpu"
    stand_ins: list[tuple[Any, str, Any]] = [
        (training_args, "is_torch_bf16_gpu_available", lambda: there),
        (training_args, "is_torch_tf32_available", lambda: there),
        # It would set up a GPU that is not there.
        (training_args, "enable_tf32", lambda enable: None),
        (vllm, "has_gpu", lambda: there),
    ]
    with ExitStack() as undo:
        for module, name, stand_in in stand_ins:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, stand_in)
        yield


def launch_of(launcher: Any, training_args: Any, machine: str | None = None) -> Launch:
    """Processes and sharding by the launcher's flags, its configuration file, or the training arguments."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = launcher.config_file
    if path is None and os.path.isfile(default_config_file) and not launcher.cpu:
        path = default_config_file
    defaults: Any = load_config_from_file(path) if path is not None else None
    kind = str(getattr(getattr(defaults, "distributed_type", None), "value", "")).upper()
    asked = launcher.multi_gpu or launcher.use_fsdp or launcher.use_deepspeed
    fsdp = bool(launcher.use_fsdp or getattr(training_args, "fsdp", None) or (kind == "FSDP" and not asked))
    deepspeed = bool(launcher.use_deepspeed or training_args.deepspeed or (kind == "DEEPSPEED" and not asked))
    notes = []
    here = torch.cuda.is_available()
    on_cpu = bool(training_args.use_cpu or launcher.cpu or getattr(defaults, "use_cpu", False))
    if on_cpu and machine == "gpu":
        raise ConfigurationError(
            "`--plan_for` is 'gpu', but `use_cpu` (or the launcher's `--cpu`) asks for a run on the CPU: leave one "
            "out."
        )
    gpu = not on_cpu and (here if machine is None else machine == "gpu")
    processes = launcher.num_processes
    if processes is None and defaults is not None:
        processes = defaults.num_processes
        if processes is not None and processes < 1:
            raise ConfigurationError(f"`num_processes` of {path} is {processes}, but wants at least 1.")
    if processes is None:
        processes = torch.cuda.device_count() if gpu and here else 1
        if gpu and not here:
            notes.append("One process is planned, because nothing says how many GPUs there are: `--num_processes`.")
    if gpu and not here:
        notes.append("Planned for GPUs, which this machine does not have; the free disk is this machine's.")
    sharding, environment, ours = sizing.DDP, {}, None
    if fsdp:
        settings = getattr(defaults, "fsdp_config", None) or {}
        version = settings.get("fsdp_version", launcher.fsdp_version)
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(version)}
        if gpu:
            sharding = sizing.FSDP
        else:
            notes.append(
                "FSDP is asked for, but without a GPU accelerate runs DDP instead: every process holds the whole "
                "model. `--plan_for gpu` plans the run on GPUs."
            )
    if deepspeed:
        own = getattr(defaults, "deepspeed_config", None) or {}
        settings = training_args.deepspeed or launcher.deepspeed_config_file or own.get("deepspeed_config_file")
        if isinstance(settings, str) and Path(settings).is_file():
            settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            stage = int((settings.get("zero_optimization") or {}).get("stage", 0))
        else:
            stage = int(launcher.zero_stage or own.get("zero_stage") or 2)
            settings = {"zero_optimization": {"stage": stage}}
            for part in ("optimizer", "param"):
                device = getattr(launcher, f"offload_{part}_device") or own.get(f"offload_{part}_device")
                settings["zero_optimization"][f"offload_{part}"] = {"device": device or "none"}
        ours = settings
        sharding = _SHARDINGS.get(stage, sizing.DDP)
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    machines = launcher.num_machines or getattr(defaults, "num_machines", None) or 1
    precision = launcher.mixed_precision or getattr(defaults, "mixed_precision", None)
    return Launch(
        int(processes), sharding, tuple(environment.items()), int(machines), gpu,
        None if precision is None else str(precision).lower(), tuple(notes), ours,
    )  # fmt: skip


def _computes_in(cfg: Any, launch: Launch, notes: list[str]) -> bool:
    """
    Whether products are computed in 16 bit. transformers takes accelerate's mixed precision where the training
    arguments ask for none, and accelerate does without float16 on a CPU.
    """
    own = "fp16" if cfg.fp16 else "bf16" if cfg.bf16 else None
    asked = launch.precision
    used = own or asked or "no"
    if own is None and used != "no":
        notes.append(
            f"`bf16` and `fp16` are false, so that `mixed_precision: {used}` of the accelerate configuration decides."
        )
    elif own is not None and asked not in (None, own):
        notes.append(f"`{own}` decides, not `mixed_precision: {asked}` of the accelerate configuration.")
    if used == "fp8":
        notes.append("fp8 is planned like bf16.")
    if used == "fp16" and not launch.gpu:
        notes.append("On a CPU accelerate does without fp16's mixed precision.")
        return False
    return used != "no"


@contextmanager
def _as_launched(launch: Launch) -> Iterator[None]:
    """What the trainer's checks find in the environment of a process that `accelerate launch` has started."""
    added = dict(launch.environment)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def checked(classes: Swap, given: dict[str, Any], launch: Launch) -> Any:
    """
    The trainer after its own checks, which come before any weights load: a half-made one, to be asked no more than
    what it has settled by then.
    """
    stock: Any = classes.stock_trainer

    class Stop(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise _Checked

    # Behind the method's classes and in front of TRL's.
    probe: Any = type(classes.trainer.__name__, (classes.trainer, Stop), {})
    trainer = probe.__new__(probe)
    config = given["args"]
    if launch.deepspeed is not None and getattr(config, "deepspeed_plugin", None) is None:
        # As the training arguments of a launched process have it.
        config.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=launch.deepspeed))
    with _as_launched(launch):
        try:
            trainer.__init__(**given)
        except _Checked:
            return trainer
    raise AssertionError(f"{classes.trainer.__name__} has not called {stock.__name__}'s constructor")


# ---- The model, from its config ----


@dataclass
class _Model:
    name: str
    parameters: int = 0
    trained: int = 0
    adapter: sizing.Adapter | None = None
    decoder: sizing.Decoder | None = None
    weight_width: int = 4
    # Where weights are quantised.
    weights: float | None = None
    sides: int = 0
    embedding: int = 0
    known: bool = True
    notes: list[str] = field(default_factory=list)


def _decoder_of(config: Any) -> sizing.Decoder | None:
    text = config.get_text_config()
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes: list[Any] = [getattr(text, name, None) for name in names]
    if not all(isinstance(size, int) for size in sizes) or any(getattr(text, name, None) for name in experts):
        return None
    vocabulary, hidden, intermediate, layers, heads = sizes
    return sizing.Decoder(
        vocabulary, hidden, intermediate, layers, heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or hidden // heads,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )  # fmt: skip


def model_of(name: str, training_args: Any, model_args: Any, peft_config: Any) -> _Model:
    """Counts a model's parameters on the meta device, where no weight takes memory."""
    import torch
    import transformers

    kwargs = training_args.model_init_kwargs
    found = _Model(name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, revision=kwargs.get("revision"), trust_remote_code=False
        )
        kind = getattr(transformers, str((config.architectures or [""])[0]), None)
        with torch.device("meta"):
            model = (
                transformers.AutoModelForCausalLM.from_config(config) if kind is None else kind._from_config(config)
            )
    except OSError as error:
        raise UserError(f"the config of the model {name!r} cannot be read: {str(error).splitlines()[0]}") from error
    except (ValueError, KeyError) as error:
        found.known = False
        reason = "its code is not in transformers" if "trust_remote_code" in str(error) else str(error)
        found.notes.append(f"The model's size is unknown: {' '.join(reason.split())}")
        return found
    found.parameters = sum(parameter.numel() for parameter in model.parameters())
    decoder = _decoder_of(config)
    if decoder is not None and abs(decoder.parameters / found.parameters - 1) <= _SAME_SIZE:
        found.decoder = decoder
    else:
        found.notes.append(
            "Activations are unknown: this is no decoder of the Llama kind (what is given is without them)."
        )
    dtype = kwargs.get("dtype")
    if dtype in (None, "auto"):
        dtype = (getattr(config, "dtype", None) if dtype == "auto" else None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    found.weight_width = dtype.itemsize
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    if model_args.load_in_4bit or model_args.load_in_8bit:
        matrices = [
            module for module in model.modules() if isinstance(module, torch.nn.Linear) and id(module) not in tables
        ]
        elements = sum(module.weight.numel() for module in matrices)
        if model_args.load_in_8bit:
            each = 1 + 4 / 4096
        else:
            # A scale for each block of 64: float32, or a byte with a scale of its own.
            each = 0.5 + (1 + 4 / 256 if model_args.use_bnb_nested_quant else 4) / 64
        found.weights = elements * each + (found.parameters - elements) * found.weight_width
    if peft_config is not None:
        found.adapter = _adapter_on(model, peft_config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found.trained = sum(parameter.numel() for parameter in trained)
    found.sides = sum(
        p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in trained
    )
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    found.embedding = sum(weight.numel() for weight in embeddings if weight.requires_grad)
    return found


def _adapter_on(model: Any, peft_config: Any) -> sizing.Adapter:
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"):
        adapted: Any = get_peft_model(model, peft_config)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    number = max(int(getattr(model.config.get_text_config(), "num_hidden_layers", 1)), 1)
    return sizing.Adapter(
        parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        modules=len(layers) / number,
        inputs=sum(layer.in_features for layer in layers) / number,
        rank=int(getattr(peft_config, "r", 0)),
        dropout=bool(getattr(peft_config, "lora_dropout", 0)),
    )


# ---- The data ----


@dataclass
class _Data:
    available: int | None
    folds: int
    left_out: int
    tokens: int
    prompt_tokens: int


def _columns(dataset: Any) -> set[str]:
    return set(getattr(dataset, "column_names", None) or ())


def _keys(rows: Any) -> list[Any] | None:
    """For each row what stands for its prompt; None where rows have none."""
    if "prompt" in _columns(rows):
        return [repr(prompt) for prompt in rows["prompt"]]
    if {"chosen", "rejected"} <= _columns(rows):
        from trl import maybe_extract_prompt

        extracted = (maybe_extract_prompt(row) for row in rows.select_columns(["chosen", "rejected"]))
        return [repr(row.get("prompt")) for row in extracted]
    return None


def _shares(trainer: Any, config: Any, dataset: Any) -> tuple[int | None, int, int]:
    """Rows (or prompts) that belong to a round, how many folds they are of, and how many are left out."""
    from trl_extras.rounds.data import split_folds

    if not hasattr(dataset, "__len__"):
        return None, 1, 0
    rounds = getattr(config, "num_rounds", 1)
    keys: list[Any] | None = None
    offline = getattr(trainer, "_offline", None)
    if offline is not None:
        from trl_extras.spr.offline import TRAINING_SET

        if config.num_generations == 0:
            dataset = offline.rows
        elif offline.where == TRAINING_SET:
            # A prompt with several responses is sampled for once.
            keys = list(dict.fromkeys(_keys(dataset) or range(len(dataset))))
    total = len(keys) if isinstance(keys, list) else len(dataset)
    if rounds == 1 or config.round_data != "split":
        return total, 1, 0
    if keys is None:
        keys = _keys(dataset)
    folds = split_folds(total if keys is None else keys, rounds, config.seed)
    return len(folds[0]), rounds, total - rounds * len(folds[0])


def _longest(tokenizer: Any, dataset: Any, completions: Sequence[str], limit: int | None) -> tuple[int, int]:
    """Tokens of the longest row, and of the longest prompt, among the rows with the most characters."""
    if not hasattr(dataset, "__len__"):
        return limit or 0, limit or 0

    def size(row: dict[str, Any]) -> int:
        return len(str(row.get("prompt") or "")) + max(
            (len(str(row.get(name) or "")) for name in completions), default=0
        )

    names = [name for name in ("prompt", *completions) if name in _columns(dataset)]
    if not names:
        return limit or 0, limit or 0
    rows = dataset.select_columns(names)
    sizes = [size(row) for row in rows]
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:_LONGEST]

    def tokens(prompt: Any, completion: Any) -> int:
        parts = [part for part in (prompt, completion) if part]
        if not parts:
            return 0
        if any(isinstance(part, list) for part in parts):
            messages = [message for part in parts for message in part]
            return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        # The end of text that TRL adds to completions.
        return len(tokenizer("".join(parts))["input_ids"]) + (1 if completion else 0)

    longest = prompts = 0
    for index in order:
        row = rows[index]
        prompts = max(prompts, tokens(row.get("prompt"), None))
        longest = max([longest, prompts, *(tokens(row.get("prompt"), row.get(name)) for name in completions)])
    return min(longest, limit) if limit else longest, prompts


# ---- The plan ----


def make(script: TrainingScript, arguments: Arguments, launch: Launch) -> RunPlan:
    """
    Plan a run.

    Raises:
        ConfigurationError: the run would be refused.
    """
    import psutil

    _, config, model_args, _ = arguments
    classes = script._classes
    cfg: Any = config
    given = script.trainer_arguments(*arguments)
    trainer = checked(classes, given, launch)
    cfg = trainer.args if hasattr(trainer, "args") else cfg
    model = model_of(given["model"], cfg, model_args, given["peft_config"])
    notes = [*launch.notes, *model.notes]
    autocast = _computes_in(cfg, launch, notes)
    tokenizer, tokenizer_bytes = _tokenizer(given["model"], cfg)
    train, evaluation = given["train_dataset"], given["eval_dataset"]

    # Rounds and steps.
    in_rounds = hasattr(cfg, "num_rounds")
    makes_rows = bool(getattr(trainer, "_makes_rows", False))
    multi_round = in_rounds and trainer._multi_round
    available, folds, left_out = _shares(trainer, cfg, train)
    rows = available
    if available is not None and in_rounds and multi_round:
        rows = trainer._planned_rows(available)
    plan = _round_plan(trainer, cfg, rows, launch, multi_round, notes)
    if not makes_rows or cfg.num_generations == 0:
        notes.append("Rows are counted as they are loaded: preparation leaves out those that truncation empties.")
    rounds = _rounds(cfg, plan, rows, multi_round)

    # Lengths and batches.
    is_sft = classes.stock_trainer.__name__ == "SFTTrainer"
    names = ("completion", "text", "messages") if is_sft else ("chosen", "rejected")
    names = (*names, "chosen", "rejected") if is_sft else names
    tokens, prompt_tokens = _longest(tokenizer, train, names, cfg.max_length)
    generations = cfg.num_generations if makes_rows else 0
    if generations:
        tokens = max(tokens, min(prompt_tokens + cfg.max_completion_length, cfg.max_length or 10**9))
    per_row = 1 if is_sft else 2
    setup = sizing.Setup(
        parameters=model.parameters, decoder=model.decoder, adapter=model.adapter, weight_width=model.weight_width,
        autocast=autocast, optimizer=str(getattr(cfg.optim, "value", cfg.optim)),
        processes=launch.processes, sharding=launch.sharding, accumulates=cfg.gradient_accumulation_steps > 1,
        gradient_checkpointing=bool(cfg.gradient_checkpointing), rows=cfg.per_device_train_batch_size * per_row,
        tokens=tokens, gpu=launch.gpu, trained=model.trained,
        weights=model.weights, sides=model.sides, embedding=model.embedding,
        **_method_setup(trainer, cfg, model, is_sft, per_row, evaluation, prompt_tokens, generations, rows),
    )  # fmt: skip
    if not setup.gpu:
        # By now this process has imported and loaded what the run has, but for the weights.
        setup = replace(setup, process=float(psutil.Process().memory_info().rss))
        notes.append("On a CPU, memory that was freed leaves holes: runs took 4 to 15 % more than their plans.")
    else:
        notes.append("The GPU's context (some hundred MB) and what torch's allocator keeps free are not counted.")
    memory = sizing.memory(setup) if model.known else None
    if generations and getattr(cfg, "use_vllm", False):
        if cfg.vllm_mode == "colocate":
            share = cfg.vllm_gpu_memory_utilization
            notes.append(f"vLLM takes {share:g} of each GPU beside this (`vllm_gpu_memory_utilization`).")
        else:
            notes.append("What the vLLM server takes is not counted.")
    if getattr(trainer, "_judge", None) is not None:
        notes.append("What judges (a reward model) take while they score is unknown.")
    state = sizing.optimizer_bytes(setup.optimizer, setup.trains, setup.trained_width, setup.sides, setup.embedding)
    if state is None:
        notes.append(
            f"The state of the optimiser {setup.optimizer!r} is unknown: memory and checkpoints are without it."
        )

    # Disk.
    disk = None
    strategy = str(getattr(cfg.save_strategy, "value", cfg.save_strategy))
    checkpoints = "unknown"
    if model.known and plan is not None:
        saving = _saving(trainer, cfg, plan, strategy, model, evaluation)
        files = _files(trainer, cfg, setup, model, tokenizer_bytes, rows or 0, generations, prompt_tokens, state)
        disk = sizing.disk(files, saving)
        checkpoints = f"{disk.checkpoints}, at most {disk.at_once} at a time"
        if strategy == "best":
            checkpoints += " (with save_strategy 'best' their number is unknown: two are assumed)"
    else:
        notes.append("Disk is unknown without the model's size and the number of steps.")
    output = Path(cfg.output_dir).absolute()
    target = next(path for path in [output, *output.parents] if path.is_dir())
    if generations:
        notes.append("Rollouts are given as if every completion had max_completion_length tokens, uncompressed.")
    return RunPlan(
        method=script.name, launch=launch,
        model={
            "name": model.name, "parameters": model.parameters if model.known else None, "trained": model.trained,
            "weight_bytes": model.weight_width, "adapter": model.adapter is not None, "autocast": setup.autocast,
        },
        rounds=rounds, folds=folds, rows=rows, left_out=left_out, steps=None if plan is None else plan.total_steps,
        batch={
            "per_process": cfg.per_device_train_batch_size, "accumulation": cfg.gradient_accumulation_steps,
            "longest_row_tokens": tokens, "gradient_checkpointing": setup.gradient_checkpointing,
            "optimizer": setup.optimizer, "gpu": setup.gpu,
        },
        disk=disk, memory=memory, free_disk=shutil.disk_usage(target).free, checkpoints=checkpoints, notes=notes,
    )  # fmt: skip


def _tokenizer(name: str, cfg: Any) -> tuple[Any, int]:
    """The tokenizer as the trainer would load it, and the bytes of its files."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(
            name, revision=cfg.model_init_kwargs.get("revision"), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of the model {name!r} cannot be loaded: {error}") from error
    with tempfile.TemporaryDirectory(prefix="trl-extras-plan-") as folder:
        processor.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return getattr(processor, "tokenizer", processor), size


def _round_plan(
    trainer: Any, cfg: Any, rows: int | None, launch: Launch, multi_round: bool, notes: list[str]
) -> RoundPlan | None:
    if rows is None:
        if cfg.max_steps > 0:
            return RoundPlan((1,), cfg.max_steps)
        notes.append("The dataset streams: rows and steps are unknown.")
        return None
    per_step = cfg.per_device_train_batch_size * launch.processes
    batches = rows // per_step if cfg.dataloader_drop_last else -(-rows // per_step)
    steps = max(-(-batches // cfg.gradient_accumulation_steps), 1)
    if multi_round:
        plan = RoundPlan(tuple(cfg.epochs_of_rounds()), steps)
        if cfg.max_steps > 0 and cfg.max_steps != plan.total_steps:
            trainer._refuse_max_steps(cfg.max_steps, plan.total_steps)
        return plan
    epochs = sum(cfg.round_epochs) if getattr(cfg, "round_epochs", None) else cfg.num_train_epochs
    if cfg.max_steps > 0:
        return RoundPlan((1,), cfg.max_steps)
    if epochs == int(epochs):
        return RoundPlan((int(epochs),), steps)
    return RoundPlan((1,), -int(-epochs * steps // 1))


def _rounds(cfg: Any, plan: RoundPlan | None, rows: int | None, multi_round: bool) -> list[Round]:
    number = cfg.num_rounds if hasattr(cfg, "num_rounds") else 1
    schedule = str(getattr(cfg.lr_scheduler_type, "value", cfg.lr_scheduler_type))
    found = []
    for t in range(number):
        steps = None if plan is None else plan.steps(t)
        settings: dict[str, Any] = {}
        if hasattr(cfg, "alpha_of"):
            settings["alpha"] = cfg.alpha_of(t)
        if hasattr(cfg, "beta_of"):
            settings["beta"] = cfg.beta_of(t)
        elif hasattr(cfg, "beta"):
            settings["beta"] = cfg.beta
        for name in ("reward_temperature", "sft_coef"):
            if hasattr(cfg, name):
                settings[name] = getattr(cfg, name)
        epochs = cfg.epochs_of_rounds()[t] if multi_round else cfg.num_train_epochs
        found.append(
            Round(
                rows=rows, epochs=epochs, steps=steps, learning_rate=cfg.learning_rate, schedule=schedule,
                warmup_steps=None if steps is None else cfg.get_warmup_steps(steps), settings=settings,
            )
        )  # fmt: skip
    return found


def _method_setup(
    trainer: Any, cfg: Any, model: _Model, is_sft: bool, per_row: int, evaluation: Any, prompt_tokens: int,
    generations: int, rows: int | None,
) -> dict[str, Any]:  # fmt: skip
    """What a method adds to a process's memory."""
    found: dict[str, Any] = {}
    if not is_sft:
        ahead = bool(cfg.precompute_ref_log_probs) or getattr(cfg, "is_reference_free", False)
        if ahead:
            batch = cfg.precompute_ref_batch_size or cfg.per_device_train_batch_size
            found["reference_rows"] = 2 * min(batch, rows or batch)
        elif model.adapter is None:
            found["reference"] = "model"
        else:
            found["reference"] = "adapter"
    kept = getattr(trainer, "_spo_rows", None)
    if kept is not None:
        found["other_rows"] = cfg.sft_batch_size or cfg.per_device_train_batch_size
        found["other_tokens"] = max(len(ids) for ids in kept.rows["input_ids"])
    if getattr(cfg, "bilevel_solver", "penalty") != "penalty":
        central = cfg.hypergradient == "central_difference"
        found["inner"] = "central_difference" if central else cfg.bilevel_solver
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    sizes = [len(d) for d in named.values() if d is not None and hasattr(d, "__len__") and not _is_prompts(trainer, d)]
    if sizes:
        found["evaluation_rows"] = per_row * min(cfg.per_device_eval_batch_size, max(sizes))
    if generations and not getattr(cfg, "use_vllm", False):
        prompts = rows or cfg.batch_prompts
        if is_sft:
            prompts = -(-prompts // generations)
        found["sampled"] = min(cfg.batch_prompts, prompts) * generations
        found["sampled_tokens"] = prompt_tokens + cfg.max_completion_length
    return found


def _is_prompts(trainer: Any, dataset: Any) -> bool:
    return bool(hasattr(trainer, "_is_prompts") and trainer._is_prompts(dataset))


def _saving(trainer: Any, cfg: Any, plan: RoundPlan, strategy: str, model: _Model, evaluation: Any) -> sizing.Saving:
    fresh = model.adapter is not None and bool(getattr(trainer, "_fresh_adapters", False))
    rounds = plan.num_rounds
    changes = tuple(t > 0 and (fresh or (hasattr(cfg, "alpha_of") and cfg.alpha_of(t - 1) > 0)) for t in range(rounds))
    epochs, steps = plan.epochs, plan.steps_per_epoch
    if rounds == 1 and strategy == "epoch" and len(epochs) == 1 and epochs[0] == 1 and cfg.max_steps <= 0:
        # A fraction of an epoch ends like an epoch.
        epochs = (max(-int(-cfg.num_train_epochs // 1), 1),)
        steps = -(-plan.total_steps // epochs[0])
    every = cfg.save_steps if cfg.save_steps >= 1 else max(-int(-plan.total_steps * cfg.save_steps // 1), 1)
    held_out = any(
        _is_prompts(trainer, d) for d in (evaluation.values() if isinstance(evaluation, dict) else [evaluation])
    )
    aside = (
        held_out and hasattr(cfg, "alpha_of") and cfg.alpha_of(cfg.num_rounds - 1) > 0
        and cfg.output_policy == "iterate"
    )  # fmt: skip
    return sizing.Saving(
        epochs=epochs, steps_per_epoch=steps, changes=changes,
        keeps_rounds=bool(getattr(trainer, "_keeps_rounds", False)), strategy=strategy,
        save_steps=int(every), limit=cfg.save_total_limit, only_model=bool(cfg.save_only_model),
        keep_iterates=bool(getattr(cfg, "keep_iterates", False)), ends_extrapolated=aside,
        makes_rows=bool(getattr(trainer, "_makes_rows", False)), waits=getattr(trainer, "_judge", None) == EXTERNAL,
    )  # fmt: skip


def _files(
    trainer: Any, cfg: Any, setup: sizing.Setup, model: _Model, tokenizer: int, rows: int, generations: int,
    prompt_tokens: int, state: float | None,
) -> sizing.Files:  # fmt: skip
    rounds = cfg.num_rounds if hasattr(cfg, "num_rounds") else 1
    others: dict[str, Any] = {"tokenizer": float(tokenizer), "optimizer": state or 0.0}
    if setup.deepspeed:
        others["optimizer"] += 4.0 * setup.trains
    if setup.sharding == sizing.FSDP:
        # A full state dict lies in a checkpoint twice: as transformers' model, and as accelerate's.
        held = setup.trains if model.adapter is not None else model.parameters
        others["optimizer"] += float(held * setup.trained_width)
    if setup.reference_rows and rounds > 1:
        others["rows"] = 8.0 * rows
    if generations:
        is_sft = not hasattr(cfg, "alpha_of")
        prompts = -(-rows // generations) if is_sft else rows
        size = sizing.rollout_bytes(prompts, generations, prompt_tokens, cfg.max_completion_length)
        others["rollouts"] = (size,) * rounds
        others["rows"] = others.get("rows", 0.0) + 4.0 * rows * setup.tokens
    if model.adapter is None:
        frozen = model.parameters - setup.trains
        return sizing.full_files(frozen * setup.weight_width + setup.trains * setup.trained_width, rounds, **others)
    fresh = bool(getattr(trainer, "_fresh_adapters", False)) and bool(getattr(trainer, "_keeps_rounds", False))
    output = 4.0 * model.parameters if getattr(cfg, "adapter_output", "adapter") == "merged" else None
    return sizing.adapter_files(setup.trains * setup.trained_width, rounds, fresh=fresh, output=output, **others)


# ---- What is printed ----


def text(plan: RunPlan) -> str:
    """The plan for people."""
    lines = []
    model, batch, launch = plan.model, plan.batch, plan.launch
    where = f"{launch.processes} process{'es' if launch.processes != 1 else ''}"
    if launch.processes > 1:
        where += f", {launch.sharding}"
    where += f", {'a GPU each' if launch.gpu else 'no GPU'}"
    lines.append(f"Plan of `trl-extras {plan.method}` on {where}; nothing is trained, loaded or written.")
    count = "unknown size" if model["parameters"] is None else f"{model['parameters']:,} parameters"
    trained = "" if not model["adapter"] else f", of an adapter {model['trained']:,} trained"
    lines.append(f"Model: {model['name']}, {count}{trained}; {8 * model['weight_bytes']}-bit weights, "
                 f"{'16-bit mixed precision' if model['autocast'] else 'no mixed precision'}.")  # fmt: skip
    rows = "unknown" if plan.rows is None else f"{plan.rows:,}"
    if len(plan.rounds) > 1:
        folds = f"{plan.folds} folds" if plan.folds > 1 else "all rows in every round"
        out = f", {plan.left_out:,} left out" if plan.left_out else ""
        lines.append(f"Rounds: {len(plan.rounds)}; {rows} training rows a round ({folds}{out}).")
    else:
        lines.append(f"Training rows: {rows}.")
    per_step = batch["per_process"] * batch["accumulation"] * launch.processes
    lines.append(
        f"A step: {per_step} rows ({batch['per_process']} a process x {batch['accumulation']} x {launch.processes}); "
        f"longest row {batch['longest_row_tokens']} tokens; {batch['optimizer']}"
        f"{', gradient checkpointing' if batch['gradient_checkpointing'] else ''}."
    )
    steps = "unknown" if plan.steps is None else f"{plan.steps:,}"
    lines += ["", f"Steps: {steps} in all"]
    names = list(plan.rounds[0].settings)
    lines.append("  " + "  ".join(f"{h:>12}" for h in ("round", "epochs", "steps", "peak rate", "warmup", *names)))
    for number, r in enumerate(plan.rounds, start=1):
        cells = [number, f"{r.epochs:g}", r.steps if r.steps is not None else "unknown", f"{r.learning_rate:g}"]
        cells += [
            r.warmup_steps if r.warmup_steps is not None else "unknown",
            *(f"{v:g}" for v in r.settings.values()),
        ]
        lines.append("  " + "  ".join(f"{cell!s:>12}" for cell in cells))
    again = ", again in every round" if len(plan.rounds) > 1 else ""
    lines.append(f"  schedule: {plan.rounds[0].schedule}{again}")
    lines += ["", f"Checkpoints: {plan.checkpoints}"]
    if plan.disk is None:
        lines.append("Disk: unknown")
    else:
        lines.append(
            f"Disk: {shown(plan.disk.peak)} at its peak, {shown(plan.disk.left)} at the end; "
            f"{shown(plan.free_disk)} are free"
        )
        lines += [f"  {name:<28}{shown(size):>12}" for name, size in plan.disk.parts.items()]
        if plan.disk.peak > plan.free_disk:
            lines.append("  This is not enough: lower `save_total_limit`, or use another `output_dir`.")
    lines.append("")
    if plan.memory is None:
        lines.append("Memory of a process: unknown")
    else:
        atleast = "at least " if plan.memory.unknown else ""
        kind = "GPU memory" if batch["gpu"] else "Memory"
        highest = plan.memory.highest
        lines.append(f"{kind} of a process: {atleast}{shown(plan.memory.peak)} at its peak ({highest})")
        for name, size in plan.memory.phases[highest].items():
            lines.append(f"  {name:<28}{'unknown' if size is None else shown(size):>12}")
        if launch.processes > 1 and launch.machines == 1:
            total = launch.processes * plan.memory.peak
            lines.append(f"  all {launch.processes} processes of the machine: {atleast}{shown(total)}")
        others = {phase: parts for phase, parts in plan.memory.phases.items() if phase != highest}
        if others:
            lines.append("  other phases:")
        for phase, parts in others.items():
            known = ", ".join(f"{name} {'unknown' if size is None else shown(size)}" for name, size in parts.items())
            line = f"    {phase}: {shown(plan.memory.total(parts))} ({known})"
            lines += textwrap.wrap(line, 119, subsequent_indent=" " * 6, break_long_words=False)
    if plan.notes:
        lines += ["", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines)
