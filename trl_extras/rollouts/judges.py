"""
What judges completions: reward functions and models by TRL's convention, and rankers. Names given as text are looked
up and imported here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl import apply_chat_template

from ..errors import ConfigurationError


class RewardError(RuntimeError):
    """A reward function or ranker has raised; its own error is the cause."""


class JudgementError(ConfigurationError):
    """A reward function or ranker has answered something that cannot be used."""


# ---- Names ----


def load_function(field: str, name: str) -> Callable[..., Any]:
    """
    The function that a name given as text stands for: `package.module:function` or `path/to/file.py:function`.

    Raises:
        ValueError: saying which part failed: the file, the module, the name inside it, or that it is no function.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ConfigurationError(
            f"`{field}` has {name!r}, but wants package.module:function or path/to/file.py:function."
        )
    if where.endswith(".py"):
        module = _import_file(field, name, Path(where))
    else:
        module = _import_module(field, name, where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"`{field}` has {name!r}, but {where} has no {attribute!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(
            f"`{field}` has {name!r}, but {attribute!r} there is of type {type(found).__name__} and cannot be called."
        )
    return found


def _import_file(field: str, name: str, path: Path) -> Any:
    if not path.is_file():
        raise ConfigurationError(f"`{field}` has {name!r}, but there is no file {path}.")
    # A name of its own, so that two files of one name are two modules, and none hides an installed one.
    module_name = f"_trl_extras_{path.stem}_{xxhash.xxh3_64_hexdigest(str(path.resolve()).encode())}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, Exception):
            raise ConfigurationError(
                f"`{field}` has {name!r}, but running {path} failed: {type(error).__name__}: {error}"
            ) from error
        raise
    return module


def _import_module(field: str, name: str, module: str) -> Any:
    # As TRL's scripts do, modules beside the place where the run was started can be named; installed ones come first.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ConfigurationError(
            f"`{field}` has {name!r}, but there is no module {missing!r}"
            + (f", which {module!r} imports." if missing != module and not module.startswith(f"{missing}.") else ".")
        ) from error
    except Exception as error:
        raise ConfigurationError(
            f"`{field}` has {name!r}, but importing {module!r} failed: {type(error).__name__}: {error}"
        ) from error


def public_name(name: str) -> str:
    """A name given as text without the folders of this machine, for cards, manifests and tables."""
    where, colon, attribute = name.rpartition(":")
    if colon:
        return f"{Path(where).name if where.endswith('.py') else where}:{attribute}"
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name


def _callable_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _source_hash(function: Any) -> str | None:
    """Tells an edited function from the one that made scores on disk; None where there is no source to look at."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        return None
    return xxhash.xxh3_64_hexdigest(source.encode())


# ---- Async functions ----


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """
    One loop for the life of the process, in a thread of its own: clients hold on to the loop of their first call, and
    a notebook's own loop is running already.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="trl-extras-rewards", daemon=True).start()
    return loop


def _wait_for(work: Coroutine[Any, Any, Any]) -> Any:
    future = asyncio.run_coroutine_threadsafe(work, _event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


# ---- Rewards ----


class Reward:
    """One reward: a function, plain or async, a loaded model, or a model by its id."""

    def __init__(self, source: Any, processing_class: Any, trust_remote_code: bool, field: str = "reward_funcs"):
        self.model_id: str | None = None
        self.model: Any = None
        self.function: Any = None
        self._tokenizer_id: str | None = None
        self.processing_class = processing_class
        self.trust_remote_code = trust_remote_code
        if isinstance(source, str):
            self._resolve(source, field)
        elif isinstance(source, torch.nn.Module):
            self.model = source
            path = str(getattr(getattr(source, "config", None), "_name_or_path", "") or "")
            self.name = path.rstrip("/").split("/")[-1] or type(source).__name__
            self._tokenizer_id = path
            if processing_class is None and not path:
                raise ConfigurationError(
                    f"`{field}` has a {type(source).__name__} that was not loaded from anywhere, so its tokenizer is "
                    "unknown: pass `reward_processing_classes`."
                )
        elif callable(source):
            self.function, self.name = source, _callable_name(source)
        else:
            raise ConfigurationError(
                f"`{field}` has a {type(source).__name__}, but wants functions, models, or their names."
            )
        if self.function is not None:
            self.asynchronous = _is_async(self.function)
            self.source_hash = _source_hash(self.function)
        else:
            self.asynchronous, self.source_hash = False, None

    def _resolve(self, text: str, field: str) -> None:
        import trl.rewards

        if ":" in text:
            self.function = load_function(field, text)
            self.name = text.rpartition(":")[2]
        elif text == "get_soft_overlong_punishment":
            # As TRL's own scripts understand this name.
            self.function = trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
            self.name = "soft_overlong_punishment"
        elif text.endswith("_reward") and not text.startswith("get_") and hasattr(trl.rewards, text):
            self.function, self.name = getattr(trl.rewards, text), text
        elif "." in text and "/" not in text and not Path(text).is_dir():
            # TRL's own form, with a dot before the function.
            module, _, function = text.rpartition(".")
            self.function, self.name = load_function(field, f"{module}:{function}"), function
        else:
            self.model_id = self._tokenizer_id = text
            self.name = text.rstrip("/").split("/")[-1]
            try:
                config = AutoConfig.from_pretrained(text, trust_remote_code=self.trust_remote_code)
            except Exception as error:
                first = str(error).strip().split("\n")[0]
                raise ConfigurationError(
                    f"`{field}` has {text!r}, which was taken for the id or folder of a reward model, but its "
                    f"configuration does not load ({type(error).__name__}: {first}). A function is named "
                    "package.module:function or path/to/file.py:function."
                ) from error
            del config

    def load(self, device: torch.device) -> None:
        """Bring a model into memory and onto the device."""
        if self.model_id is not None:
            self.model = AutoModelForSequenceClassification.from_pretrained(
                self.model_id, num_labels=1, trust_remote_code=self.trust_remote_code
            )
        if self.model is None:
            return
        self._home = next(self.model.parameters()).device
        self.model.to(device).eval()
        if self.processing_class is None:
            self.processing_class = AutoTokenizer.from_pretrained(
                self._tokenizer_id, trust_remote_code=self.trust_remote_code
            )
        if self.processing_class.pad_token_id is None:
            self.processing_class.pad_token = self.processing_class.eos_token
        # A reward model reads the last token that is not padding.
        self.model.config.get_text_config().pad_token_id = self.processing_class.pad_token_id

    def unload(self) -> None:
        """Let a model go: one loaded by id is gone after its phase, the user's own returns to where it was."""
        if self.model_id is not None:
            self.model = None
        elif self.model is not None:
            self.model.to(self._home)

    @torch.inference_mode()
    def score_with_model(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Rewards of a loaded model, whose one logit is the reward."""
        if isinstance(prompts[0], list):
            texts = [
                apply_chat_template({"messages": prompt + completion}, self.processing_class)["text"]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        inputs = self.processing_class(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        device = next(self.model.parameters()).device
        logits = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        return logits[:, 0].float().tolist()


class Judgement:
    """What was said of a batch of completions: `values` by name, and what the functions logged themselves."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras.setdefault(str(column), []).extend(values)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(str(name), []).append(float(value))


class Rewards:
    """
    All rewards of a run.

    Args:
        sources: one of, or a list of, what TRL's `reward_funcs` takes, names included.
        processing_classes: one or a list, for those that are models.
        weights: one a reward; None for 1.
        trust_remote_code: of the user's flag, for models by id.

    Raises:
        ValueError: saying which reward is wrong and how; no weights have been loaded.
    """

    def __init__(
        self, sources: Any, processing_classes: Any, weights: Sequence[float] | None, trust_remote_code: bool
    ):
        sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
        if not isinstance(processing_classes, (list, tuple)):
            processing_classes = [processing_classes] * (len(sources) if processing_classes is None else 1)
        if len(processing_classes) != len(sources):
            raise ConfigurationError(
                f"`reward_processing_classes` has {len(processing_classes)} entries, but `reward_funcs` has "
                f"{len(sources)}: give one a reward, None for functions."
            )
        if weights is not None and len(weights) != len(sources):
            raise ConfigurationError(
                f"`reward_weights` has {len(weights)} values, but `reward_funcs` has {len(sources)}: give one weight "
                "a reward."
            )
        self.rewards = [
            Reward(source, processing_class, trust_remote_code)
            for source, processing_class in zip(sources, processing_classes, strict=True)
        ]
        self.weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        seen: dict[str, int] = {}
        for reward in self.rewards:
            seen[reward.name] = seen.get(reward.name, 0) + 1
            if seen[reward.name] > 1:
                reward.name = f"{reward.name}_{seen[reward.name]}"

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    def to_dict(self) -> dict[str, Any]:
        """What scores on disk are compared with."""
        return {"rewards": self.names, "reward_weights": self.weights}

    def sources(self) -> dict[str, str | None]:
        """A hash of each function's source, to notice an edit."""
        return {reward.name: reward.source_hash for reward in self.rewards}

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[None]:
        """The phase in which models are in memory."""
        try:
            for reward in self.rewards:
                reward.load(device)
            yield
        finally:
            for reward in self.rewards:
                reward.unload()
            if any(reward.model_id is not None for reward in self.rewards):
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def judge(
        self,
        where: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any,
    ) -> Judgement:
        """
        The rewards of a batch, each (completions,), None where a function does not apply.

        Args:
            where: the round, for errors.
            columns: the dataset's further columns, repeated for each completion.

        Raises:
            RewardError: a function raised.
            ValueError: an answer of the wrong length or type, nan, infinite, or none for a completion.
        """
        judgement = Judgement()
        arguments = {
            **columns,
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": [list(ids) for ids in completion_ids],
            "trainer_state": trainer_state,
            "log_extra": judgement.log_extra,
            "log_metric": judgement.log_metric,
        }
        answers: dict[str, Any] = {}
        waiting = []
        for reward in self.rewards:
            if reward.model is not None:
                answers[reward.name] = reward.score_with_model(prompts, completions)
            elif reward.asynchronous:
                waiting.append(reward)
            else:
                with _naming(where, "reward function", reward.name):
                    answers[reward.name] = reward.function(**arguments)
        if waiting:

            async def ask(reward: Reward) -> Any:
                with _naming(where, "reward function", reward.name):
                    return await reward.function(**arguments)

            async def ask_all() -> list[Any]:
                return await asyncio.gather(*(ask(reward) for reward in waiting))

            for reward, answer in zip(waiting, _wait_for(ask_all()), strict=True):
                answers[reward.name] = answer
        for name in self.names:
            judgement.values[name] = _checked(where, name, answers[name], len(completions))
        for index in range(len(completions)):
            if all(judgement.values[name][index] is None for name in self.names):
                raise JudgementError(
                    f"{where}: no reward function applies to this completion ({', '.join(self.names)} all gave None): "
                    f"prompt {_short(prompts[index])}, completion {_short(completions[index])}. At least one has to."
                )
        for column, values in judgement.extras.items():
            if len(values) != len(completions):
                raise JudgementError(
                    f"{where}: `log_extra({column!r}, ...)` got {len(values)} values for {len(completions)} "
                    "completions: give one each."
                )
        return judgement


class Ranker:
    """
    A function that orders the completions of prompts: `ranker(prompts, completions, **columns)` with `completions` a
    list of K completions for each prompt, returns for each prompt the indices of its completions from best to worst,
    all of them or the best and the worst alone, or None for a tie. It may be async.
    """

    def __init__(self, source: Any):
        if isinstance(source, str):
            self.function: Any = load_function("ranker", source)
            self.name = source.rpartition(":")[2]
        elif callable(source):
            self.function, self.name = source, _callable_name(source)
        else:
            raise ConfigurationError(f"`ranker` is a {type(source).__name__}, but wants a function or its name.")

    def to_dict(self) -> dict[str, Any]:
        return {"ranker": self.name}

    def sources(self) -> dict[str, str | None]:
        return {self.name: _source_hash(self.function)}

    def judge(
        self, where: str, prompts: Sequence[Any], completions: Sequence[Sequence[Any]], columns: dict[str, list[Any]]
    ) -> list[tuple[int, int] | None]:
        """The best and the worst completion of each prompt, or None for a tie."""
        arguments = {**columns, "prompts": list(prompts), "completions": [list(group) for group in completions]}
        with _naming(where, "ranker", self.name):
            answer = _wait_for(self.function(**arguments)) if _is_async(self.function) else self.function(**arguments)
        try:
            orders = list(answer)
        except TypeError:
            raise JudgementError(
                f"{where}: ranker {self.name!r} returned {type(answer).__name__}, but has to return a list with an "
                "order, or None, for each prompt."
            ) from None
        if len(orders) != len(prompts):
            raise JudgementError(
                f"{where}: ranker {self.name!r} returned {len(orders)} orders for {len(prompts)} prompts: return one "
                "each."
            )
        return [
            None if order is None else self._ends(where, order, len(group))
            for order, group in zip(orders, completions, strict=True)
        ]

    def _ends(self, where: str, order: Any, number: int) -> tuple[int, int]:
        try:
            indices = [int(index) for index in order]
            whole = all(index == given for index, given in zip(indices, order, strict=True))
        except (TypeError, ValueError):
            indices, whole = [], False
        valid = whole and len(indices) >= 2 and len(set(indices)) == len(indices)
        if not valid or not all(0 <= index < number for index in indices):
            raise JudgementError(
                f"{where}: ranker {self.name!r} ordered {number} completions as {order!r}, but has to give their "
                f"indices (0 to {number - 1}) from best to worst, each once, all or the best and the worst alone."
            )
        return indices[0], indices[-1]


@contextmanager
def _naming(where: str, kind: str, name: str) -> Iterator[None]:
    """Say where and in which function of the user's an error came up; its own traceback stays with it."""
    try:
        yield
    except Exception as error:
        raise RewardError(
            f"{where}: {kind} {name!r} raised {type(error).__name__}: {error}. What it answered before is kept: mend "
            "it "
            "and start again to go on from there."
        ) from error


def _checked(where: str, name: str, answer: Any, expected: int) -> list[float | None]:
    """The answer of a reward function as floats and Nones."""
    try:
        values = list(answer)
    except TypeError:
        raise JudgementError(
            f"{where}: reward function {name!r} returned {type(answer).__name__}, but has to return a list of "
            f"{expected} numbers, one a completion."
        ) from None
    if len(values) != expected:
        raise JudgementError(
            f"{where}: reward function {name!r} returned {len(values)} rewards for {expected} completions: return one "
            "each, None where it does not apply."
        )
    result: list[float | None] = []
    for index, value in enumerate(values):
        if value is None:
            result.append(None)
            continue
        single = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not isinstance(single, numbers.Real):
            raise JudgementError(
                f"{where}: reward function {name!r} returned {value!r} ({type(value).__name__}) for completion "
                f"{index} of its batch, but has to return numbers, or None where it does not apply."
            )
        if not math.isfinite(single):
            raise JudgementError(
                f"{where}: reward function {name!r} returned {single} for completion {index} of its batch, but has to "
                "return finite numbers, or None where it does not apply."
            )
        result.append(float(single))
    return result


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
