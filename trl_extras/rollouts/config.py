"""What a method that samples from its policy can be configured with; names as in TRL's GRPOConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import ConfigurationError
from ..rounds.config import as_list, set_number


# The word that stands for a labeller elsewhere.
EXTERNAL = "external"
# Prompts whose completions are sampled together unless `generation_batch_size` says otherwise; vLLM keeps its own
# queue and is fast with many only.
_DEFAULT_BATCH_PROMPTS = 8
_VLLM_BATCH_PROMPTS = 64

VLLM_MODES = ("colocate", "server")
VLLM_MODEL_IMPLS = ("vllm", "transformers", "auto")


@dataclass
class SamplingConfig:
    """
    Mixin for a config dataclass of TRL: how responses are sampled and judged, where `train_dataset` holds
    prompts alone.

    Parameters:
        reward_funcs (`list[str]`, *optional*):
            Rewards: `package.module:function`, `path/to/file.py:function`, TRL's `package.module.function`, the name
            of a function in `trl.rewards`, or the id or folder of a sequence classification model with one label.
        reward_weights (`list[float]`, *optional*):
            One weight a reward; all 1 by default.
        ranker (`str`, *optional*):
            Instead of rewards: a function, named like a reward, that orders the completions of a prompt, or
            `"external"`: the run stops after sampling and goes on when the labels have been filled in.
        num_generations (`int`, *optional*, defaults to `5`):
            Completions per prompt (K).
        prompts_per_round (`int`, *optional*):
            Prompts that each round samples for, and the pairs that it trains on; further prompts of the round replace
            those that give no pair. By default all prompts of the round.
        temperature, top_p, top_k, min_p, repetition_penalty (*optional*):
            The distribution that is sampled from, whatever the checkpoint's own settings are. `top_k=0` and
            `min_p=None` are off.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens after which a completion is cut.
        generation_batch_size (`int`, *optional*):
            Completions that one process samples at a time, a multiple of `num_generations`; those of 8 prompts by
            default, of 64 with vLLM. What is sampled depends on it, but not on the number of processes.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples, through TRL's `VLLMGeneration`, instead of transformers. It has not been run on a
            GPU yet.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: the engine lives in the training processes, on their GPUs. `"server"`: prompts and weights
            go to a server that you have started with `vllm serve`.
        vllm_model_impl, vllm_structured_outputs_regex (*optional*):
            Whose implementation of the model the engine runs, and a regular expression that completions have to
            match.
        vllm_gpu_memory_utilization, vllm_max_model_length, vllm_tensor_parallel_size, vllm_enable_sleep_mode:
            With `"colocate"`: share of the GPU's memory that the engine takes, its context in tokens, GPUs that share
            one engine, and whether it frees its memory between rounds.
        vllm_server_base_url, vllm_server_host, vllm_server_port, vllm_server_timeout, vllm_group_port:
            With `"server"`: where the server is (the URL, or host and port), how many seconds it may take to answer
            that it is up, and the port over which weights go.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: package.module:function, path/to/file.py:function, the name of a function in "
            "trl.rewards, or the id or folder of a reward model."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a reward; all 1 by default."}
    )
    ranker: str | None = field(
        default=None,
        metadata={
            "help": "Instead of rewards: a function that orders completions (named like a reward), or 'external': "
            "stop "
            "after sampling and go on when labels have been filled in."
        },
    )
    num_generations: int = field(default=5, metadata={"help": "Completions per prompt."})
    prompts_per_round: int | None = field(
        default=None,
        metadata={
            "help": "Prompts that each round samples for; further ones replace those that give no pair. By default "
            "all prompts of the round."
        },
    )
    temperature: float = field(default=0.7, metadata={"help": "Temperature for sampling."})
    top_p: float = field(default=0.9, metadata={"help": "Probability mass of the tokens to sample from; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens to sample from; 0 is off."})
    min_p: float | None = field(
        default=None, metadata={"help": "Least probability of a token, as a share of the likeliest one's."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty on tokens that have occurred, prompt included; 1 is off."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens after which a completion is cut."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions that one process samples at a time, a multiple of num_generations."},
    )

    use_vllm: bool = field(
        default=False,
        metadata={"help": "Sample with vLLM, through TRL's VLLMGeneration. Not run on a GPU yet."},
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'colocate': vLLM in the training processes, on their GPUs. 'server': a server that you have "
            "started with `vllm serve`.",
            "choices": list(VLLM_MODES),
        },
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={"help": "Whose implementation of the model vLLM runs: 'vllm', 'transformers' or 'auto'."},
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={
            "help": "With 'colocate': the engine gives its weights and cache up between rounds. Frees memory, takes "
            "time."
        },
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "Regular expression that vLLM makes completions match; none by default."}
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "With 'server': its URL, such as http://localhost:8000, instead of host and port."},
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "With 'server': its host, without a URL."})
    vllm_server_port: int = field(default=8000, metadata={"help": "With 'server': its port, without a URL."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "With 'server': seconds within which it has to answer that it is up."}
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "With 'server': port over which the weights go to it."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "With 'colocate': share of the GPU's memory for vLLM. A server has a flag of its own for it."
        },
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={
            "help": "With 'colocate': tokens of prompt and completion together that vLLM has room for. By default "
            "what the model's configuration says."
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "With 'colocate': GPUs that share one engine. A server has a flag of its own for it."},
    )

    def validate_sampling(self, least_generations: int = 2) -> None:
        """
        Check the fields of this mixin.

        Args:
            least_generations: how many completions of a prompt the method needs.

        Raises:
            ValueError: naming the field, what it got, what it wants.
        """

        def whole(name: str, least: int, wants: str) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"`{name}` is {value!r}, but wants {wants}.")

        whole(
            "num_generations",
            least_generations,
            f"a whole number of at least {least_generations}, the completions of a prompt",
        )
        if self.prompts_per_round is not None:
            whole("prompts_per_round", 1, "a whole number of at least 1, or nothing for all prompts of the round")
        whole("max_completion_length", 1, "a whole number of at least 1")
        whole("top_k", 0, "a whole number of at least 0; 0 is off")
        set_number(self, "temperature", lambda t: t > 0, "a finite number above 0")
        set_number(self, "top_p", lambda p: 0 < p <= 1, "a number above 0 and at most 1; 1 is off")
        set_number(self, "repetition_penalty", lambda p: p > 0, "a finite number above 0; 1 is off")
        if self.min_p is not None:
            set_number(self, "min_p", lambda p: 0 <= p <= 1, "a number from 0 to 1, or nothing")
        if self.generation_batch_size is not None:
            size, each = self.generation_batch_size, max(self.num_generations, 1)
            whole("generation_batch_size", 1, "a whole number of at least 1")
            if size % each:
                raise ConfigurationError(
                    f"`generation_batch_size` is {size}, but wants a multiple of `num_generations`, which is {each}: "
                    f"the completions of a prompt are sampled together. Use {max(size // each, 1) * each}."
                )
        self._validate_vllm()
        self._validate_judges()

    def _validate_vllm(self) -> None:
        """What can be told from the values alone; `vllm.check_vllm` looks at the machine."""
        for name, choices in (("vllm_mode", VLLM_MODES), ("vllm_model_impl", VLLM_MODEL_IMPLS)):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"`{name}` is {getattr(self, name)!r}, but wants one of {', '.join(choices)}."
                )
        for name, least, most in (
            ("vllm_server_port", 1, 65535),
            ("vllm_group_port", 1, 65535),
            ("vllm_tensor_parallel_size", 1, math.inf),
            ("vllm_max_model_length", 1, math.inf),
        ):
            value = getattr(self, name)
            if value is None and name == "vllm_max_model_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                limit = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ConfigurationError(f"`{name}` is {value!r}, but wants a whole number {limit}.")
        set_number(self, "vllm_gpu_memory_utilization", lambda u: 0 < u <= 1, "a number above 0 and at most 1")
        set_number(self, "vllm_server_timeout", lambda s: s >= 0, "a finite number of seconds, at least 0")
        url = self.vllm_server_base_url
        if url is not None and not str(url).startswith(("http://", "https://")):
            raise ConfigurationError(
                f"`vllm_server_base_url` is {url!r}, but wants a URL such as http://localhost:8000."
            )
        room = self.vllm_max_model_length
        if self.use_vllm and self.vllm_mode == "colocate" and room is not None and room <= self.max_completion_length:
            raise ConfigurationError(
                f"`vllm_max_model_length` is {room}, but has to hold a prompt and `max_completion_length`, which is "
                f"{self.max_completion_length}, together: raise the one or lower the other."
            )

    def _validate_judges(self) -> None:
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if self.reward_funcs is not None:
            if not all(isinstance(name, str) and name.strip() for name in self.reward_funcs):
                raise ConfigurationError(
                    f"`reward_funcs` is {self.reward_funcs!r}, but wants names: package.module:function, "
                    "path/to/file.py:function, or a model; functions and models themselves are the trainer's argument "
                    "`reward_funcs`."
                )
            self.reward_funcs = list(self.reward_funcs) or None
        if self.ranker is not None and (not isinstance(self.ranker, str) or not self.ranker.strip()):
            raise ConfigurationError(
                f"`ranker` is {self.ranker!r}, but wants a name: package.module:function, path/to/file.py:function, "
                "or "
                f"{EXTERNAL!r}; a function itself is the trainer's argument `ranker`."
            )
        if self.reward_weights is not None:
            self.reward_weights = as_list(
                "reward_weights", self.reward_weights, float, math.isfinite, "finite numbers, one a reward"
            )
        if self.reward_funcs and self.ranker:
            raise ConfigurationError(
                "`reward_funcs` and `ranker` are both set, but a pair is chosen by one of them: leave one out."
            )
        if self.reward_funcs and self.reward_weights and len(self.reward_funcs) != len(self.reward_weights):
            raise ConfigurationError(
                f"`reward_weights` has {len(self.reward_weights)} values, but `reward_funcs` has "
                f"{len(self.reward_funcs)}: give one weight a reward."
            )

    @property
    def vllm_server(self) -> str:
        """Where the server is, without a slash at the end."""
        return (self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}").rstrip("/")

    @property
    def batch_prompts(self) -> int:
        """Prompts whose completions are sampled in one batch."""
        if self.generation_batch_size is None:
            return _VLLM_BATCH_PROMPTS if self.use_vllm else _DEFAULT_BATCH_PROMPTS
        return self.generation_batch_size // max(self.num_generations, 1)
