"""
What judges completions: reward functions and models by TRL's convention, and rankers. Names given as text are looked
up and imported here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl import apply_chat_template

from .._compat import outside_zero3
from ..errors import ConfigurationError
from ..rounds import sharding


# What a reward function is called with, by name, beside the dataset's columns.
_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


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
    where, colon, attribute = name.rpartition(":")
    if not colon and "." in name:
        # TRL's own form, with a dot before the function.
        where, _, attribute = name.rpartition(".")
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
        return f"{_last_part(where) if where.endswith('.py') else where}:{attribute}"
    return _last_part(name) if Path(name).is_dir() or Path(name).is_absolute() else name


def _last_part(path: str) -> str:
    """Of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _callable_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _check_signature(field: str, name: str, function: Any) -> None:
    """Refuse a function that cannot take what it will be called with, before anything has been sampled for it."""
    if inspect.isbuiltin(function):
        return
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = [argument for argument in _ARGUMENTS if argument not in takes]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ConfigurationError(
            f"`{field}` has {name!r}, which has no parameter {missing[0]!r}, but is called with "
            f"{', '.join(_ARGUMENTS)} and the dataset's columns, all by name: add `**kwargs` to its parameters."
        )


def _check_columns(field: str, name: str, function: Any, where: str, columns: Collection[str]) -> None:
    """Refuse a function that wants a column which a dataset does not have."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    for parameter in parameters:
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.default is parameter.empty and parameter.name not in {*_ARGUMENTS, *columns}:
            raise ConfigurationError(
                f"`{field}` has {name!r}, which wants a column `{parameter.name}`, but {where} has only "
                f"{', '.join(f'`{column}`' for column in sorted(columns)) or 'prompts'}: add that column."
            )


def _hash(*parts: Any) -> str:
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())


def _function_identity(function: Any) -> dict[str, str]:
    """
    Which function has answered, as hashes that name no path: `where` it is and with what arguments or state it was
    made, and the `content` of its source. One may change and it is still the same (a moved file, an edit), but not
    both.
    """
    arguments: list[str] = []
    while isinstance(function, functools.partial):
        arguments += [_stable(function.args), _stable(sorted(function.keywords.items()))]
        function = function.func
    plain = inspect.isroutine(function)
    owner = function if plain else type(function)
    if not plain:
        arguments.append(_stable(sorted(vars(function).items()) if hasattr(function, "__dict__") else ()))
    try:
        file = str(Path(inspect.getfile(owner)).resolve())
    except (OSError, TypeError):
        file = ""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        source = ""
    if file.endswith(".py") and Path(file).is_file() and getattr(owner, "__module__", "").startswith("_trl_extras_"):
        # A file of the user's: constants beside the function count as well.
        source = Path(file).read_text(encoding="utf-8", errors="replace")
    module = "" if file else getattr(owner, "__module__", "")
    return {
        "where": _hash(file, module, getattr(owner, "__qualname__", ""), arguments),
        "content": _hash(source, arguments),
    }


def _stable(value: Any) -> str:
    """What a value looks like, without the addresses of objects in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _model_identity(path: str | None, model: Any) -> dict[str, str]:
    """As `_function_identity`, of a reward model, by its id or folder, or loaded."""
    if model is not None:
        digest = xxhash.xxh3_64()
        for name, parameter in model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return {"where": digest.hexdigest(), "content": digest.hexdigest()}
    folder = Path(str(path))
    if not folder.is_dir():
        return {"where": _hash(path), "content": _hash(path)}
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    content = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"where": _hash(str(folder.resolve())), "content": _hash(content)}


def same_judges(now: dict[str, dict[str, str]], before: dict[str, dict[str, str]]) -> tuple[list[str], list[str]]:
    """Which judges are other ones than before, and which are the same but edited."""
    other, edited = [], []
    for name, identity in now.items():
        known = before.get(name)
        if known is None or known == identity:
            continue
        where, content = (identity[key] == known.get(key) for key in ("where", "content"))
        if not where and not content:
            other.append(name)
        elif where:
            edited.append(name)
    return other, edited


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


async def _caught(work: Any) -> tuple[Any, BaseException | None]:
    """
    What was awaited, or what it raised: a SystemExit inside the loop would end its thread, and nobody would know.
    """
    try:
        return await work, None
    except BaseException as error:
        return None, error


# ---- Rewards ----


class Reward:
    """One reward: a function, plain or async, a loaded model, or a model by its id."""

    def __init__(self, source: Any, processing_class: Any, trust_remote_code: bool, field: str = "reward_funcs"):
        self.model_id: str | None = None
        self.model: Any = None
        self.function: Any = None
        self._home: torch.device | None = None
        self._before: tuple[bool, Any] | None = None
        self._identity: dict[str, str] | None = None
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
        if self.model is not None:
            self._check_config(field, self.name, self.model.config)
        if self.function is not None:
            _check_signature(field, self.name, self.function)
        if self.function is None:
            if self.processing_class is None:
                self._load_tokenizer(field)
            if self.processing_class.pad_token_id is None and self.processing_class.eos_token_id is None:
                raise ConfigurationError(
                    f"`{field}` has {self.name!r}, whose tokenizer has neither a padding token nor EOS, so that texts "
                    "of several lengths cannot be scored together: set its `pad_token`."
                )

    @property
    def identity(self) -> dict[str, str]:
        """Which reward this is, as hashes; see `same_judges`."""
        if self._identity is None:
            if self.function is not None:
                self._identity = _function_identity(self.function)
            else:
                self._identity = _model_identity(self.model_id, self.model)
        return self._identity

    @property
    def has_model(self) -> bool:
        """Whether there is a model to bring onto the device."""
        return self.model_id is not None or self.model is not None

    def _check_config(self, field: str, text: str, config: Any) -> None:
        """A model with another head would be given a random one when it is loaded, and score at random."""
        heads = getattr(config, "architectures", None) or []
        if heads and not any("SequenceClassification" in head or "Reward" in head for head in heads):
            raise ConfigurationError(
                f"`{field}` has {public_name(text)!r}, which is a {heads[0]}, but wants a model for sequence "
                "classification with one label, or a function."
            )
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ConfigurationError(
                f"`{field}` has {public_name(text)!r}, whose model has {labels} labels, but wants one: its single "
                "logit is the "
                "reward. Name a function of your own that makes a reward of several."
            )

    def _load_tokenizer(self, field: str) -> None:
        try:
            self.processing_class = AutoTokenizer.from_pretrained(
                self._tokenizer_id, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise ConfigurationError(
                f"`{field}` has {self.name!r}, but its tokenizer does not load ({type(error).__name__}: {first}): "
                "pass "
                "it as `reward_processing_classes`."
            ) from error

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
            self.function, self.name = load_function(field, text), text.rpartition(".")[2]
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
            self._check_config(field, text, config)

    def check(self, where: str, columns: Collection[str], conversational: bool) -> None:
        """
        Refuse what this reward could not score.

        Args:
            where: which dataset, for errors.
            columns: those that it passes to functions.
            conversational: whether its prompts are messages.
        """
        if self.function is not None:
            _check_columns("reward_funcs", self.name, self.function, where, columns)
        elif conversational and self.processing_class.chat_template is None:
            raise ConfigurationError(
                f"`reward_funcs` has {self.name!r}, whose tokenizer has no chat template, but {where} has "
                "conversations: set its `chat_template` and pass it as `reward_processing_classes`, or use text."
            )

    def load(self, device: torch.device) -> None:
        """Bring a model into memory and onto the device."""
        if self.model_id is not None and self.model is None:
            # Whole on every process, each of which scores by itself.
            with outside_zero3(), sharding.loading_whole():
                self.model = AutoModelForSequenceClassification.from_pretrained(
                    self.model_id, num_labels=1, trust_remote_code=self.trust_remote_code
                )
        if self.model is None:
            return
        if any(hasattr(weight, "ds_id") for weight in self.model.parameters()):
            raise ConfigurationError(
                f"The reward model {self.name} was loaded in parts, for ZeRO 3, but every process scores by itself: "
                "pass its id or folder instead, or load it before the training arguments are made."
            )
        self._home = next(self.model.parameters()).device
        self._before = (self.model.training, self.model.config.get_text_config().pad_token_id)
        self.model.to(device).eval()
        if self.processing_class.pad_token_id is None:
            self.processing_class.pad_token = self.processing_class.eos_token
        # A reward model reads the last token that is not padding.
        self.model.config.get_text_config().pad_token_id = self.processing_class.pad_token_id

    def unload(self, held: bool = False) -> None:
        """
        Let a model go: one loaded by id is gone after its phase, or waits in main memory where it is `held`; the
        user's own returns to where it was.
        """
        if self.model_id is not None:
            self.model = self.model.to("cpu") if held and self.model is not None else None
        elif self.model is not None and self._home is not None and self._before is not None:
            self.model.to(self._home).train(self._before[0])
            self.model.config.get_text_config().pad_token_id = self._before[1]

    @torch.inference_mode()
    def score_with_model(self, prompts: Sequence[Any], completions: Sequence[Any], batch_size: int) -> list[float]:
        """Rewards of a loaded model, whose one logit is the reward; texts are what RewardTrainer trains on."""
        tokenizer = self.processing_class
        conversational = isinstance(prompts[0], list)
        if conversational:
            texts = [
                apply_chat_template({"messages": prompt + completion}, tokenizer)["text"]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            end = tokenizer.eos_token
            texts = [text if end is None or text.endswith(end) else text + end for text in texts]
        device = next(self.model.parameters()).device
        rewards: list[float] = []
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                text=texts[start : start + batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=not conversational,
            )
            logits = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
            rewards += logits[:, 0].float().tolist()
        return rewards


class Judgement:
    """What was said of a batch of completions: `values` by name, and what the functions logged themselves."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras.setdefault(str(column), []).extend(values)

    def log_metric(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"log_metric({name!r}, {value}) wants a finite number")
        self.metrics.setdefault(str(name), []).append(float(value))

    def check_extras(self, where: str, name: str, number: int) -> None:
        for column, values in self.extras.items():
            if len(values) != number:
                raise JudgementError(
                    f"{where}: reward function {name!r} gave {len(values)} values to `log_extra({column!r}, ...)` "
                    f"for {number} "
                    "completions: give one each."
                )


class Rewards:
    """
    All rewards of a run.

    Args:
        sources: one of, or a list of, what TRL's `reward_funcs` takes, names included.
        processing_classes: one or a list, for those that are models.
        weights: one a reward; None for 1.
        trust_remote_code: of the user's flag, for models by id.
        batch_size: texts that a model scores at a time.

    Raises:
        ValueError: saying which reward is wrong and how; no weights have been loaded.
    """

    def __init__(
        self,
        sources: Any,
        processing_classes: Any,
        weights: Sequence[float] | None,
        trust_remote_code: bool,
        batch_size: int = 8,
    ):
        self.batch_size = batch_size
        self._held = False
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
        taken: set[str] = set()
        for reward in self.rewards:
            plain, number = reward.name, 1
            while reward.name in taken:
                number += 1
                reward.name = f"{plain}_{number}"
            taken.add(reward.name)

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    def to_dict(self) -> dict[str, Any]:
        """What scores on disk are compared with."""
        return {"rewards": self.names, "reward_weights": self.weights}

    def identities(self) -> dict[str, dict[str, str]]:
        """Which rewards these are; see `same_judges`."""
        return {reward.name: reward.identity for reward in self.rewards}

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[None]:
        """The phase in which models are in memory."""
        try:
            for reward in self.rewards:
                reward.load(device)
            yield
        finally:
            self._unload()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The time in which several phases follow each other: a model by id is loaded once and waits in between."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._unload()

    def _unload(self) -> None:
        for reward in self.rewards:
            reward.unload(self._held)
        if any(reward.model_id is not None for reward in self.rewards):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def check(self, where: str, columns: Collection[str], conversational: bool) -> None:
        """Refuse what one of the rewards could not score; see [`Reward.check`]."""
        for reward in self.rewards:
            reward.check(where, columns, conversational)

    def judge(
        self,
        where: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any,
        known: dict[str, Any] | None = None,
        keep: Callable[[str, Any], None] | None = None,
    ) -> Judgement:
        """
        The rewards of a batch, each (completions,), None where a function does not apply.

        Args:
            where: the round, for errors.
            columns: the dataset's further columns, repeated for each completion.
            known: what rewards answered for this batch before another one failed, by name, as `keep` was given it.
            keep: told what each reward answers, as soon as it has.

        Raises:
            RewardError: a function raised.
            ValueError: an answer of the wrong length or type, nan, infinite, or none for a completion.
        """
        judgement, known = Judgement(), dict(known or {})
        number = len(completions)

        def arguments(part: Judgement) -> dict[str, Any]:
            # Copies: what one function does to its lists is no business of the next one's.
            return {
                **{name: [copy.deepcopy(value) for value in values] for name, values in columns.items()},
                "prompts": [copy.deepcopy(prompt) for prompt in prompts],
                "completions": [copy.deepcopy(completion) for completion in completions],
                "completion_ids": [list(ids) for ids in completion_ids],
                "trainer_state": trainer_state,
                "log_extra": part.log_extra,
                "log_metric": part.log_metric,
            }

        def take(reward: Reward, part: Judgement, answer: Any) -> None:
            values = _checked(where, reward.name, answer, number)
            part.check_extras(where, reward.name, number)
            known[reward.name] = {"values": values, "extras": part.extras, "metrics": part.metrics}
            if keep is not None:
                keep(reward.name, known[reward.name])

        waiting: list[tuple[Reward, Judgement, Any]] = []
        for reward in self.rewards:
            if reward.name in known:
                continue
            part = Judgement()
            with _naming(where, "reward function", reward.name):
                if reward.model is not None:
                    answer = reward.score_with_model(prompts, completions, self.batch_size)
                else:
                    answer = reward.function(**arguments(part))
            if inspect.isawaitable(answer):
                waiting.append((reward, part, answer))
            else:
                take(reward, part, answer)
        if waiting:

            async def ask_all() -> list[tuple[Any, BaseException | None]]:
                return await asyncio.gather(*(_caught(answer) for *_, answer in waiting))

            failed: list[tuple[Reward, BaseException]] = []
            for (reward, part, _), (answer, error) in zip(waiting, _wait_for(ask_all()), strict=True):
                if error is None:
                    take(reward, part, answer)
                else:
                    failed.append((reward, error))
            for reward, error in failed:
                with _naming(where, "reward function", reward.name):
                    raise error
        for name in self.names:
            judgement.values[name] = known[name]["values"]
            judgement.extras |= known[name]["extras"]
            for metric, values in known[name]["metrics"].items():
                judgement.metrics.setdefault(metric, []).extend(values)
        for index in range(len(completions)):
            if all(judgement.values[name][index] is None for name in self.names):
                raise JudgementError(
                    f"{where}: no reward function applies to this completion ({', '.join(self.names)} all gave None): "
                    f"prompt {_short(prompts[index])}, completion {_short(completions[index])}. At least one has to."
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
            self.name = source.replace(":", ".").rpartition(".")[2]
        elif callable(source):
            self.function, self.name = source, _callable_name(source)
        else:
            raise ConfigurationError(f"`ranker` is a {type(source).__name__}, but wants a function or its name.")

    def to_dict(self) -> dict[str, Any]:
        return {"ranker": self.name}

    def identities(self) -> dict[str, dict[str, str]]:
        """Which ranker this is; see `same_judges`."""
        return {self.name: _function_identity(self.function)}

    def check(self, where: str, columns: Collection[str], conversational: bool) -> None:
        """Refuse a ranker that wants a column which a dataset does not have."""
        _check_columns("ranker", self.name, self.function, where, columns)

    def judge(
        self, where: str, prompts: Sequence[Any], completions: Sequence[Sequence[Any]], columns: dict[str, list[Any]]
    ) -> list[tuple[int, int] | None]:
        """The best and the worst completion of each prompt, or None for a tie."""
        arguments = copy.deepcopy(
            {**columns, "prompts": list(prompts), "completions": [list(group) for group in completions]}
        )
        with _naming(where, "ranker", self.name):
            answer = self.function(**arguments)
            if inspect.isawaitable(answer):
                answer, failure = _wait_for(_caught(answer))
                if failure is not None:
                    raise failure
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
    except (Exception, asyncio.CancelledError) as error:
        raise RewardError(
            f"{where}: {kind} {name!r} raised {type(error).__name__}: {error}. What it answered before is kept: mend "
            "it "
            "and start again to go on from there."
        ) from error


def _checked(where: str, name: str, answer: Any, expected: int) -> list[float | None]:
    """The answer of a reward function as floats and Nones."""
    try:
        if isinstance(answer, (str, bytes, dict, set)):
            raise TypeError
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
