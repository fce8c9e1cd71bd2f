"""
Sampling from the policy with vLLM, through TRL's own `VLLMGeneration`: an engine in the training processes
(`vllm_mode="colocate"`), or a server (`"server"`). It has the interface of `TransformersSampler` and keeps the same.

The engine has weights of its own, which are brought up to date when sampling begins and the policy is another one than
last time. TRL merges an adapter into the base for that (`LoraRounds` sees to it that the history of earlier rounds is
merged with it) and subtracts it again, which rounds: here the base gets its own bytes back.
"""

from __future__ import annotations

import http.client
import random
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import set_seed
from transformers.utils import logging
from trl.import_utils import is_vllm_available

from ..errors import ConfigurationError
from ..rounds.saving import asks_for_deepspeed, fsdp_version
from .sampling import Batch, Completion, SamplingSettings


logger = logging.get_logger(__name__)

# vLLM looks at so many tokens at a time (TRL's setting) and refuses more sequences than that; what is above waits.
_MOST_SEQUENCES = 1024
# Between two looks at a server that is not up, and for one of them, in seconds.
_PAUSE, _PATIENCE = 1.0, 10.0
_PROCESSED = "processed_logprobs"
_QUANTIZED = (
    "`use_vllm=True` does not work with quantized weights: merging an adapter into them for the engine would change "
    "them for good. Load the model in bfloat16, or sample with transformers."
)


class SamplingError(ConfigurationError):
    """The engine or its server failed, or answered something that cannot be used."""


# ---- Checks, before any weights load ----


def check_vllm(config: Any, samples: bool, given: dict[str, Any]) -> None:
    """
    Check that a run can sample with vLLM.

    Args:
        config: a [`SamplingConfig`] with `use_vllm`.
        samples: whether the run samples anything.
        given: the trainer's arguments.

    Raises:
        ConfigurationError: it cannot, in one line that says why.
    """
    if not samples:
        raise ConfigurationError(
            "`use_vllm=True`, but nothing is sampled in this run: leave it out, or pass prompts alone (a column "
            "`prompt` without answers), with `reward_funcs` or a `ranker`."
        )
    if not is_vllm_available():
        raise ConfigurationError(
            "`use_vllm=True`, but vLLM is not installed: `pip install trl-extras[vllm]`, or leave it out and sample "
            "with transformers."
        )
    if config.use_cpu or not has_gpu():
        raise ConfigurationError(
            f"`use_vllm=True` with `vllm_mode={config.vllm_mode!r}` needs a CUDA GPU in the training process, "
            + (
                "where the engine runs, "
                if config.vllm_mode == "colocate"
                else "because weights go to the server from GPU to GPU, "
            )
            + f"but {'`use_cpu` is set' if config.use_cpu else 'there is none'}: leave it out and sample with "
            "transformers."
        )
    if fsdp_version(config) is not None or asks_for_deepspeed(config):
        raise ConfigurationError(
            "`use_vllm=True` does not work with FSDP or DeepSpeed so far: leave it out and sample with transformers, "
            "or use DDP."
        )
    if given.get("quantization_config") is not None or getattr(given.get("model"), "is_quantized", False):
        raise ConfigurationError(_QUANTIZED)
    if config.vllm_structured_outputs_regex is not None and hasattr(config, "samples_exactly"):
        raise ConfigurationError(
            "`vllm_structured_outputs_regex` does not work with SPR: its weights are those of responses that the "
            "policy itself may give, any of them. Leave it out."
        )
    if config.vllm_mode == "server":
        if config.process_index == 0:
            wait_for_server(config.vllm_server, config.vllm_server_timeout)
        return
    tensor_parallel, processes = config.vllm_tensor_parallel_size, config.world_size
    if processes % tensor_parallel:
        raise ConfigurationError(
            f"`vllm_tensor_parallel_size` is {tensor_parallel}, but has to divide the number of processes, which is "
            f"{processes}."
        )
    model = given.get("model")
    if not isinstance(model, str) and not getattr(model, "name_or_path", ""):
        raise ConfigurationError(
            "`use_vllm=True` with `vllm_mode='colocate'` needs a model that was loaded from a folder or the Hub, "
            "because vLLM reads its configuration there, but `model` was made in memory: save it and pass the folder."
        )


def has_gpu() -> bool:
    """Whether this process can have a CUDA GPU."""
    return torch.cuda.is_available()


def wait_for_server(address: str, seconds: float) -> None:
    """
    Wait until a vLLM server says that it is up. TRL's client waits too, but for ever where the other side takes the
    connection and says nothing, or answers with an error.

    Raises:
        SamplingError: it did not within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        patience = min(max(end - time.monotonic(), _PAUSE), _PATIENCE)
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=patience) as answer:
                if answer.status == 200:
                    return
                found = f"status {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            found = str(error) or type(error).__name__
        if time.monotonic() >= end:
            raise SamplingError(
                f"No vLLM server answers at {address} within {seconds:g} s, the `vllm_server_timeout` ({found}): "
                "start it (`vllm serve`), or correct `vllm_server_base_url`, or `vllm_server_host` and "
                "`vllm_server_port`."
            )
        time.sleep(min(_PAUSE, max(end - time.monotonic(), 0)))


def check_model(model: Any) -> None:
    """
    Check that the engine can hold a policy, which it takes as plain weights.

    Raises:
        ConfigurationError: naming what cannot be merged.
    """
    if getattr(model, "is_quantized", False):
        raise ConfigurationError(_QUANTIZED)
    if not is_peft_model(model):
        return
    if not hasattr(model, "merge_adapter"):
        raise ConfigurationError(
            "`use_vllm=True` does not work with an adapter that cannot be merged into the base: use LoRA, or sample "
            "with transformers."
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in _adapted(model).items():
        for parameter in layer.get_base_layer().parameters():
            others = [other for other in names[id(parameter)] if not other.startswith(f"{name}.")]
            if others:
                raise ConfigurationError(
                    f"`use_vllm=True` does not work with an adapter on {name}, whose weight {others[0]} shares: "
                    "merged for the engine, it would change that too. Leave it out of `target_modules`, or sample "
                    "with transformers."
                )


def _adapted(model: Any) -> dict[str, BaseTunerLayer]:
    """The layers that an adapter changes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


# ---- Sampling ----


class VLLMSampler:
    """
    Samples with vLLM. The engine starts when something is sampled for the first time, and stays.

    Args:
        config: a [`SamplingConfig`].
        accelerator: the trainer's.
        processing_class: the tokenizer.
        settings: what to sample from.
        completions: the most of one batch.
    """

    def __init__(
        self, config: Any, accelerator: Any, processing_class: Any, settings: SamplingSettings, completions: int
    ):
        self._config = config
        self._accelerator = accelerator
        self._processing_class = processing_class
        self._settings = settings
        self._completions = completions
        self._engine: Any = None
        self._holds: str | None = None
        # TRL's calls are then collective: as many on every process, with equally many prompts.
        self._in_step = accelerator.num_processes > 1 and (self._is_server or config.vllm_tensor_parallel_size > 1)

    @property
    def _is_server(self) -> bool:
        return self._config.vllm_mode == "server"

    # ---- The engine and its weights ----

    @contextmanager
    def phase(self, model: Any, policy: str) -> Iterator[VLLMSampler]:
        """
        Batches of one policy are sampled inside. Every process enters, whether it has any or not.

        Args:
            model: the policy, unwrapped.
            policy: a hash of its weights: the engine gets them once.
        """
        config = self._config
        with _random_numbers(None), torch.no_grad(), self._one_line():
            if self._is_server and self._accelerator.is_main_process:
                wait_for_server(config.vllm_server, config.vllm_server_timeout)
            if self._engine is None:
                self._engine = self._start(model)
            self._engine.model = model
            if self._holds != policy:
                # Until it is over nobody knows what the engine holds.
                self._holds = None
                with base_untouched(model):
                    self._engine.sync_weights()
                self._holds = policy
        if self._is_server or not config.vllm_enable_sleep_mode:
            yield self
            return
        # TRL would put the engine to sleep after every batch and send it all weights before the next.
        self._engine.enable_sleep_mode = False
        self._engine.llm.wake_up(tags=["kv_cache"])
        try:
            yield self
        finally:
            # Level 2 gives the weights up.
            self._holds = None
            self._engine.enable_sleep_mode = True
            self._engine.llm.sleep(level=2)

    def _start(self, model: Any) -> Any:
        # vLLM is imported with it, which takes long and is not there everywhere.
        from trl.generation.vllm_generation import VLLMGeneration

        config, settings = self._config, self._settings
        check_model(model)
        logger.warning(
            "Sampling with vLLM (`use_vllm=True`) has not been run on a GPU yet: its code has been tested with a "
            "stand-in for vLLM alone. Look at the rollouts before you trust a run."
        )
        engine = VLLMGeneration(
            model=model,
            accelerator=self._accelerator,
            processing_class=self._processing_class,
            mode=config.vllm_mode,
            structured_outputs_regex=config.vllm_structured_outputs_regex,
            server_base_url=config.vllm_server,
            server_timeout=config.vllm_server_timeout,
            group_port=config.vllm_group_port,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_length=config.vllm_max_model_length,
            max_num_seqs=min(self._completions * config.vllm_tensor_parallel_size, _MOST_SEQUENCES),
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            model_impl=config.vllm_model_impl,
            trust_remote_code=bool(getattr(config, "trust_remote_code", False)),
            repetition_penalty=settings.repetition_penalty,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p or 0.0,
            max_completion_length=settings.max_completion_length,
            # The sampled token's alone.
            logprobs=0,
            # Ends are those that transformers samples with, whatever the files of the engine's model say.
            generation_kwargs={"stop_token_ids": list(settings.stop_token_ids), "ignore_eos": True},
        )
        if self._is_server and self._accelerator.is_main_process:
            self._check_logprobs(engine.vllm_client)
        return engine

    def _check_logprobs(self, client: Any) -> None:
        """
        A colocated engine is made to tell the log-probabilities of what was sampled from; a server does as it was
        started.
        """
        settings = self._settings
        plain = settings.temperature == 1 and settings.top_p == 1 and settings.top_k == 0 and not settings.min_p
        if plain and settings.repetition_penalty == 1 and self._config.vllm_structured_outputs_regex is None:
            # The model's own distribution is sampled from.
            return
        mode = client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != _PROCESSED:
            raise SamplingError(
                f"The vLLM server at {self._config.vllm_server} tells log-probabilities before temperature and "
                f"truncation (`--logprobs-mode {mode}`), but rollouts keep those of what was sampled from: start it "
                f"with `--logprobs-mode {_PROCESSED}`."
            )

    # ---- Batches ----

    def batches(self, mine: Sequence[Batch], num: int) -> Iterator[Batch]:
        """The batches of this process; where processes work in step, it takes part in the others' as well."""
        if not self._in_step:
            yield from mine
            return
        steps = max(gather_object([len(mine)]))
        yield from mine
        for _ in range(steps - len(mine)):
            self([], num, 0)

    def __call__(self, prompts: Sequence[Sequence[int]], num: int, seed: int) -> list[list[Completion]]:
        """
        `num` completions of each prompt, inside a `phase`.

        Args:
            prompts: token ids.
            num: completions a prompt.
            seed: of the batch. In a colocated engine it sets the random numbers; a server has its own. The random
                numbers of the caller are left alone.
        """
        room, most = self._config.vllm_max_model_length, self._settings.max_completion_length
        for ids in prompts:
            if not self._is_server and room is not None and len(ids) + most > room:
                raise SamplingError(
                    f"`vllm_max_model_length` is {room}, but a prompt of {len(ids)} tokens and "
                    f"`max_completion_length` ({most}) need {len(ids) + most}: raise it, or lower the latter."
                )
        asked = [list(ids) for ids in prompts]
        if self._in_step:
            asked, seed = self._agree(asked, seed)
        repeated = [ids for ids in asked for _ in range(num)]
        with _random_numbers(seed), torch.no_grad(), self._one_line():
            _, sampled, logps, tokens = self._engine.generate(prompts=repeated, images=None, num_generations=num)
        rows = self._completions_of(sampled, logps, tokens, len(repeated))
        return [rows[start : start + num] for start in range(0, len(prompts) * num, num)]

    def _agree(self, prompts: list[list[int]], seed: int) -> tuple[list[list[int]], int]:
        """As many prompts on every process, and the seed of the first of those that share an engine."""
        others = gather_object([(len(prompts), seed)])
        filler = [self._settings.pad_token_id]
        prompts = prompts + [filler] * (max(size for size, _ in others) - len(prompts))
        together = self._config.vllm_tensor_parallel_size
        return prompts, others[self._accelerator.process_index // together * together][1]

    def _completions_of(self, sampled: Any, logps: Any, tokens: Any, wanted: int) -> list[Completion]:
        if logps is None or tokens is None or not len(sampled) == len(logps) == len(tokens) == wanted:
            raise SamplingError(
                f"vLLM was asked for {wanted} completions with log-probabilities, but gave {len(sampled)} completions "
                f"and {'none' if logps is None else len(logps)}: look at its log."
            )
        rows, stops = [], set(self._settings.stop_token_ids)
        for ids, values, named in zip(sampled, logps, tokens, strict=True):
            end = next((index + 1 for index, token in enumerate(ids) if token in stops), None)
            kept = list(ids[:end])
            total = 0.0
            for token, several, of in zip(kept, values[:end], named[:end], strict=True):
                value = several[of.index(token)] if token in of else None
                if value is None:
                    raise SamplingError(
                        f"vLLM gives no log-probability for the token {token} that it has sampled: look at its log."
                    )
                total += value
            rows.append(Completion(kept, total, end is None))
        return rows

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """A server that fails is told of with its address."""
        try:
            yield
        except Exception as error:
            # TRL's client raises a plain Exception where the server answers with an error.
            if not self._is_server or not (isinstance(error, OSError) or type(error) is Exception):
                raise
            raise SamplingError(
                f"The vLLM server at {self._config.vllm_server} failed or went away ({error}): start it again and "
                "run the same command; what was sampled is kept."
            ) from error


@contextmanager
def _random_numbers(seed: int | None) -> Iterator[None]:
    """
    The caller's random numbers are as they were afterwards. A colocated engine draws its own from those of the
    process, and seeds all of them when it starts.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        states = random.getstate(), np.random.get_state()
        try:
            if seed is not None:
                set_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def base_untouched(model: Any) -> Iterator[None]:
    """
    What an adapter is merged into has its own bytes afterwards: adding and subtracting rounds, and a base that
    drifts from round to round is no longer the one that is saved adapters' base. The copies wait in the CPU's memory.
    """
    layers = _adapted(model) if is_peft_model(model) else {}
    parameters = {id(p): p for layer in layers.values() for p in layer.get_base_layer().parameters()}
    kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters.values()]
    try:
        yield
    finally:
        # Where sending the weights failed half-way they are merged still.
        if any(layer.merged for layer in layers.values()):
            model.unmerge_adapter()
        with torch.no_grad():
            for parameter, own in kept:
                parameter.copy_(own)
