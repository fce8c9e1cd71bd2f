"""
Rounds whose rows are sampled from their own policy: a mixin between the rounds and a method's trainer.

A round's phases are: sample, judge, finish. Each leaves its batches on disk as it goes (`store.py`), so that a run
which was killed goes on with the batch it was at.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from tqdm.auto import tqdm
from transformers.utils import logging

from .._compat import _tokenize
from ..errors import ConfigurationError
from ..rounds import durable, sharding
from ..rounds.data import rows_fingerprint
from ..rounds.state import ROUNDS_DIR, RoundFolder
from ..rounds.trainer import RoundsTrainer
from ..rows import check_prompts, plain
from .config import EXTERNAL
from .judges import JudgementError, Ranker, Rewards, public_name, same_judges
from .labels import WaitingForLabels, label_rows, read_labels
from .pairs import best_and_worst, combine, distinct_bigrams, mean_and_error
from .sampling import Batch, SamplingSettings, TransformersSampler, batch_seed, plan_batches, stop_tokens
from .store import LABELS, RolloutStore, folders_to_sweep
from .texts import appended_tokens, completion_text, without_appended


logger = logging.get_logger(__name__)

# A replacement for prompts without a pair expects at least this share of pairs, so that it samples at most so many
# times what is missing at once.
_LEAST_PAIR_RATE = 0.1
# After so many prompts without a single pair no further ones are sampled: whatever judges does not tell them apart.
_HOPELESS = 64
# Completions a prompt that batches are made for where none are sampled to train on.
_FEW_GENERATIONS = 5
_STATISTICS = (
    "prompts", "samples", "tokens", "mean_length", "share_cut", "distinct_bigrams", "sample_seconds", "score_seconds",
    "tokens_per_second", "reward_mean", "reward_best", "reward_worst", "pairs", "ties", "repeated", "empty", "rewards",
    "metrics",
)  # fmt: skip
# What a method makes its rows of.
_ROW_COLUMNS = ("prompt_ids", "completion_ids", "logps", "reward", "chosen", "rejected")
_TEXT_COLUMNS = {"prompt", "completion", "completions", "completion_ids", "prompt_ids"}


@dataclass
class _Task:
    """What to sample and judge."""

    store: RolloutStore
    prompts: Any
    order: Sequence[int]
    wanted: int | None
    num_generations: int
    judge: Rewards | Ranker | str | None
    purpose: str
    where: str
    # Of a round that is trained on, not of a measurement.
    for_training: bool = False
    # The completions are there already, one a row (`completion`, `completion_ids`): nothing is sampled.
    given: bool = False


class RolloutsTrainer(RoundsTrainer):
    """
    Mixin for a trainer in rounds whose config is a [`SamplingConfig`] too. A `train_dataset` of prompts alone is
    sampled from in every round; what a method makes of the judged completions is `_rows_of_rollouts`.

    Args:
        reward_funcs: as for [`~trl.GRPOTrainer`]: a function, a model, a model's id, or a list of them.
        reward_processing_classes: as for [`~trl.GRPOTrainer`].
        ranker: instead of rewards, a function that orders a prompt's completions ([`Ranker`]), or `"external"`.
    """

    # Whether a round may begin with other weights than the last one ended with.
    _extrapolates = True

    def __init__(
        self,
        *args: Any,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        ranker: Any = None,
        **kwargs: Any,
    ):
        self._judge: Rewards | Ranker | str | None = None
        self._given_judges = (reward_funcs, reward_processing_classes, ranker)
        self._prompts_digest: str | None = None
        self._evaluates_prompts = False
        # Made here, started when something is sampled for the first time.
        self._vllm: Any = None
        super().__init__(*args, **kwargs)
        if self.args.use_vllm:
            from .vllm import VLLMSampler

            tokenizer, settings = self._text_tokenizer(), self._sampling_settings()
            self._vllm = VLLMSampler(self.args, self.accelerator, tokenizer, settings, self._batch_prompts(1))

    @property
    def judged_by(self) -> str | None:
        """What judges sampled completions, for people; None where the training set is one of pairs."""
        if not self._makes_rows:
            return None
        if isinstance(self._judge, Rewards):
            weights = self._judge.weights
            return " + ".join(
                f"`{name}`" if weight == 1 else f"{weight:g} `{name}`"
                for name, weight in zip(self._judge.names, weights, strict=True)
            )
        return f"the ranker `{self._judge.name}`" if isinstance(self._judge, Ranker) else "labels from elsewhere"

    # ---- Checks, before any weights load ----

    def _check_arguments(self, given: dict[str, Any], config: Any) -> None:
        super()._check_arguments(given, config)
        reward_funcs, processing_classes, ranker = self._given_judges
        for name, value in (("reward_funcs", reward_funcs), ("ranker", ranker)):
            if value is not None and getattr(config, name) is not None:
                logger.warning(f"`{name}` is given to the trainer and in its config; the trainer's is used.")
        if reward_funcs is None:
            reward_funcs = config.reward_funcs
        if ranker is None:
            ranker = config.ranker
        if isinstance(reward_funcs, (list, tuple)) and not reward_funcs:
            reward_funcs = None
        if reward_funcs is not None and ranker is not None:
            raise ConfigurationError(
                "`reward_funcs` and `ranker` are both given, but a pair is chosen by one of them: leave one out."
            )
        for name, value in (
            ("reward_weights", config.reward_weights),
            ("reward_processing_classes", processing_classes),
        ):
            if ranker is not None and value is not None:
                raise ConfigurationError(f"`{name}` is given, but a ranker gives no rewards: leave one out.")
        train, named = given.get("train_dataset"), _named(given.get("eval_dataset"))
        self._makes_rows = self._rows_are_made(train)
        evaluated = [name for name, dataset in named.items() if self._is_prompts(dataset)]
        self._evaluates_prompts = bool(evaluated)
        if config.use_vllm:
            # Here, because most runs have none, and it takes a second to import.
            from .vllm import check_vllm

            check_vllm(config, self._evaluates_prompts or (self._makes_rows and config.num_generations > 0), given)
        if self._makes_rows:
            self._check_single_round(config)
        if not self._judge_is_needed(given, config, bool(evaluated), reward_funcs, ranker):
            return
        self._check_prompts(train, named, config)
        if evaluated and len(evaluated) == len(named):
            self._check_best_metric(config)
        if ranker is not None:
            self._judge = EXTERNAL if ranker == EXTERNAL else Ranker(ranker)
        else:
            self._judge = Rewards(
                reward_funcs,
                processing_classes,
                config.reward_weights,
                bool(getattr(config, "trust_remote_code", False)),
                config.per_device_eval_batch_size,
            )
        if isinstance(self._judge, (Rewards, Ranker)):
            for where, dataset in self._judged_sets(train, named).items():
                columns = dataset.column_names
                if isinstance(columns, list) and len(dataset):
                    conversational = isinstance(dataset[0]["prompt"], list)
                    self._judge.check(where, set(columns) - _TEXT_COLUMNS, conversational)
        if self._judge == EXTERNAL and config.save_only_model:
            raise ConfigurationError(
                "`save_only_model=True` leaves nothing to go on from, but `ranker='external'` stops the run in every "
                "round: leave one out."
            )

    def _check_raw_rows(self, rows: datasets.Dataset, where: str, tokenizer: Any) -> None:
        super()._check_raw_rows(rows, where, tokenizer)
        if self._is_prompts(rows):
            check_prompts(rows, where)

    def _is_prompts(self, dataset: Any) -> bool:
        """Whether completions of a dataset's rows have to be sampled; a method's own."""
        return is_prompts(dataset)

    def _rows_are_made(self, train: Any) -> bool:
        """Whether each round makes its rows itself."""
        return self._is_prompts(train)

    def _judge_is_needed(
        self, given: dict[str, Any], config: Any, evaluates: bool, reward_funcs: Any, ranker: Any
    ) -> bool:
        """
        Whether the run asks a judge anything.

        Args:
            evaluates: some evaluation set is one of prompts.
            reward_funcs, ranker: what is given, by either way.

        Raises:
            ValueError: it does and there is none, or there is one for nothing.
        """
        if not self._makes_rows and not evaluates:
            for name, value in (("reward_funcs", reward_funcs), ("ranker", ranker)):
                if value is not None:
                    raise ConfigurationError(
                        f"`{name}` is given, but `train_dataset` holds preference pairs, which need no judge: leave "
                        "it away, or pass prompts alone (a column `prompt` without `chosen` and `rejected`)."
                    )
            return False
        if reward_funcs is None and ranker is None:
            raise ConfigurationError(
                f"`{'train' if self._makes_rows else 'eval'}_dataset` holds prompts alone, so completions are "
                "sampled, but nothing judges them: give `reward_funcs` or `ranker`."
            )
        return True

    def _judged_sets(self, train: Any, named: dict[str, Any]) -> dict[str, Any]:
        """The datasets whose rows judges are asked about, by what to call them in messages."""
        sets = {"`train_dataset`": train} | {f"`eval_dataset` {name!r}": dataset for name, dataset in named.items()}
        asked = {where: dataset for where, dataset in sets.items() if self._is_prompts(dataset)}
        # People and rankers are not asked about held-out prompts.
        return asked if isinstance(self._judge, Rewards) else {w: d for w, d in asked.items() if d is train}

    @staticmethod
    def _check_best_metric(config: Any) -> None:
        """Prompts are measured at the ends of rounds, when upstream has long looked for its metric."""
        strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
        for name, asked in (
            ("load_best_model_at_end=True", config.load_best_model_at_end),
            ("save_strategy='best'", strategy == "best"),
            (f"metric_for_best_model={config.metric_for_best_model!r}", config.metric_for_best_model is not None),
        ):
            if asked:
                raise ConfigurationError(
                    f"`{name}` needs a metric of every evaluation, but `eval_dataset` holds prompts, which are "
                    "measured at "
                    "the ends of rounds: leave it away, and choose among the folders of `keep_iterates` by "
                    "`rounds.jsonl`."
                )

    def _needs_rounds(self, config: Any) -> list[str]:
        return super()._needs_rounds(config) + (["An `eval_dataset` of prompts"] if self._evaluates_prompts else [])

    def _check_prompts(self, train: Any, named: dict[str, Any], config: Any) -> None:
        sets = {f"eval_dataset {name!r}": dataset for name, dataset in named.items()} | {"train_dataset": train}
        for name, dataset in sets.items():
            if not self._is_prompts(dataset):
                continue
            if not isinstance(dataset, datasets.Dataset):
                if name != "train_dataset":
                    raise ConfigurationError(
                        f"`{name}` streams, but its prompts are sampled for several times: load it without streaming."
                    )
                continue
            if len(dataset) == 0:
                raise ConfigurationError(f"`{name}` is empty, but wants at least one prompt.")
            if "prompt_ids" in dataset.column_names:
                raise ConfigurationError(
                    f"`{name}` has a column `prompt_ids`, which is where the prompts' tokens go: give it another name."
                )
            found = {"image", "images", "tools"} & set(dataset.column_names)
            if found:
                raise ConfigurationError(
                    f"`{name}` has the column `{sorted(found)[0]}`, but images and tool calls cannot be sampled with "
                    "so far: use text prompts."
                )
        if (
            self._makes_rows
            and config.num_generations > 0
            and config.max_length is not None
            and config.max_completion_length >= config.max_length
        ):
            raise ConfigurationError(
                f"`max_completion_length` is {config.max_completion_length}, but prompt and completion together are "
                f"cut at `max_length`, which is {config.max_length}: lower the one or raise the other."
            )
        if not self._makes_rows or not isinstance(train, datasets.Dataset):
            return
        if config.resume_from_checkpoint or self._read_run(Path(config.output_dir)) is not None:
            # A run that goes on keeps the folds it began with: `_start_run` knows them.
            return
        share = len(train) // config.num_rounds if config.round_data == "split" else len(train)
        if config.prompts_per_round is not None and config.prompts_per_round > share:
            raise ConfigurationError(
                f"`prompts_per_round` is {config.prompts_per_round}, but a round has {share} prompts "
                f"({len(train)} in all, `round_data={config.round_data!r}`): use fewer, more prompts, or "
                "`round_data='reuse'`."
            )

    def _planned_rows(self, available: int) -> int:
        wanted = self.args.prompts_per_round
        return super()._planned_rows(available) if not self._makes_rows or wanted is None else min(wanted, available)

    def _comparable_configuration(self, config: Any) -> dict[str, Any]:
        fields = super()._comparable_configuration(config)
        if fields.get("reward_funcs"):
            fields["reward_funcs"] = [public_name(name) for name in fields["reward_funcs"]]
        if fields.get("ranker"):
            fields["ranker"] = public_name(fields["ranker"])
        # Which engine samples, and where it runs, may change from round to round; what it may say is told with the
        # rollouts.
        return {name: value for name, value in fields.items() if name != "use_vllm" and not name.startswith("vllm_")}

    # ---- Prompts ----

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **named: Any) -> Any:
        if not self._is_prompts(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, *rest, **named)
        # SFTTrainer's method takes more than DPOTrainer's, but the set's name is the last in both.
        return self._prepare_prompts(dataset, processing_class, args, named.get("dataset_name") or rest[-1])

    def _prepare_prompts(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Prompts with `prompt_ids`, tokenised as the parent tokenises the prompts of pairs."""
        if "prompt_ids" in dataset.column_names:
            return dataset
        dataset = plain(dataset)
        if not any(dataset is known for known in self._read):
            check_prompts(dataset, f"The {dataset_name} set")
        dataset = self._with_prompt_ids(dataset, processing_class, args, dataset_name)
        return self._fitting(dataset, args, dataset_name)

    def _with_prompt_ids(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        appended = appended_tokens(getattr(processing_class, "tokenizer", processing_class))

        def tokenize(example: dict[str, Any], processing_class: Any, appended: list[int]) -> dict[str, Any]:
            prompt = example["prompt"]
            extra = dict(example.get("chat_template_kwargs") or {})
            if isinstance(prompt, list):
                extra["add_generation_prompt"] = True
            ids = list(_tokenize(processing_class, prompt, **extra)["input_ids"])
            return {"prompt_ids": ids if isinstance(prompt, list) else without_appended(ids, appended)}

        return self._dated.rows(
            dataset,
            processing_class,
            args,
            "prompts",
            lambda: dataset.map(
                tokenize,
                fn_kwargs={"processing_class": processing_class, "appended": appended},
                num_proc=args.dataset_num_proc,
                desc=f"Tokenizing {dataset_name} prompts",
            ),
        )

    def _fitting(self, dataset: Any, args: Any, dataset_name: str) -> Any:
        """The prompts that can be sampled for."""
        before = len(dataset)
        lengths = np.array([len(ids) for ids in dataset["prompt_ids"]])
        fits = lengths > 0
        if args.max_length is not None and dataset_name == "train":
            fits &= self._have_room(lengths, args)
        if not fits.all():
            dataset = dataset.select(np.flatnonzero(fits))
            logger.warning(
                f"{before - len(dataset)} of {before} {dataset_name} prompts are left out: they are empty, or fill "
                f"`max_length` ({args.max_length}) alone."
            )
        if len(dataset) == 0:
            raise ConfigurationError(
                f"no prompt of the {dataset_name} set can be sampled for: they are empty or too long."
            )
        return dataset

    def _have_room(self, lengths: Any, args: Any) -> Any:
        """Which training prompts leave room for a completion below `max_length`, by their numbers of tokens."""
        fits = lengths < args.max_length
        cut = int((fits & (lengths + args.max_completion_length > args.max_length)).sum())
        if cut:
            logger.warning(
                f"{cut} of {len(lengths)} prompts leave less room below `max_length` ({args.max_length}) than "
                f"`max_completion_length` ({args.max_completion_length}): their completions may be cut for training."
            )
        return fits

    def _start_run(self, checkpoint: Path | None) -> None:
        super()._start_run(checkpoint)
        if not self._makes_rows:
            return
        if self.round_data_builder is not None:
            raise ConfigurationError(
                "`round_data_builder` is set, but each round makes its rows of `train_dataset` itself: use one of the "
                "two."
            )
        wanted = self.args.prompts_per_round
        available = len(self._folds[0]) if self._folds else len(self._prepared_train_dataset)
        if wanted is not None and wanted > available:
            raise ConfigurationError(
                f"`prompts_per_round` is {wanted}, but a round has {available} prompts, once equal ones are kept "
                "together and those that do not fit are left out: use fewer."
            )
        self._check_positions()
        self._prompts_digest = rows_fingerprint(self._prepared_train_dataset)
        judges = json.dumps(self._judged_with(), sort_keys=True).encode()
        sharding.agree(
            "What judges the completions", xxhash.xxh3_64_hexdigest(judges), "`reward_funcs`, `ranker` and their code"
        )
        manifest = self._checkpoint_manifest(checkpoint) if checkpoint is not None else None
        if manifest is not None and manifest.get("prompts", self._prompts_digest) != self._prompts_digest:
            raise ConfigurationError(
                "`train_dataset` does not hold the prompts of the run that is resumed, or they are tokenized "
                "otherwise: pass those with the same tokenizer, or use another `output_dir`."
            )
        if manifest is not None:
            self._compare_judges(manifest.get("judges"))
        elif checkpoint is None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Before the folder is this run's: a start that is refused must not take it from the run that was there.
            # Weights that are divided later have another hash then, by which rollouts are found.
            self._check_rollouts()

    def _check_positions(self) -> None:
        """What is sampled has to fit into the model's positions, where it says how many it has."""
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or self.args.num_generations == 0:
            return
        for ids in self._prepared_train_dataset["prompt_ids"]:
            if len(ids) + self.args.max_completion_length > positions:
                raise ConfigurationError(
                    f"`train_dataset`: the prompt that begins with {self._text_tokenizer().decode(ids[:10])!r} has "
                    f"{len(ids)} tokens, which with `max_completion_length` ({self.args.max_completion_length}) are "
                    f"more than the model's {positions} positions: leave it out, or lower `max_completion_length`."
                )

    def _check_rollouts(self) -> None:
        """Refuse rollouts on disk that the first round can neither use nor replace."""
        assert self._weights is not None
        self._round_task(0, self._weights.fingerprint()).store.check()

    def _compare_judges(self, before: dict[str, Any] | None) -> None:
        """A run that goes on has to be judged as it was so far."""
        if before is None:
            return
        now = self._judged_with()
        other = sorted(before.keys() ^ now.keys()) or same_judges(now, before)[0]
        if other:
            raise ConfigurationError(
                f"The run that is resumed was judged by {', '.join(sorted(before))}, but {other[0]!r} is another one "
                "now, or "
                "on one side only: use the same rewards, or another `output_dir`."
            )
        for name in same_judges(now, before)[1]:
            self._warn(f"{name} has been edited since the run began; later rounds are judged by it as it is now.")

    def _judged_with(self) -> dict[str, dict[str, str]]:
        return self._judge.identities() if isinstance(self._judge, (Rewards, Ranker)) else {str(self._judge): {}}

    @property
    def _rollouts_dir(self) -> Path:
        return self._output_dir / ROUNDS_DIR / "rollouts"

    def _folders_to_sweep(self) -> list[Path]:
        return [*super()._folders_to_sweep(), *folders_to_sweep(self._rollouts_dir)]

    def _write_run(self) -> None:
        super()._write_run()
        if self.args.should_save:
            # A longer run of before: its later rounds are not this one's.
            for folder in self._rollouts_dir.glob("*"):
                numbered = re.fullmatch(r"(?:round|heldout)-(\d{4})(?:-.*)?", folder.name)
                if numbered is None or int(numbered[1]) < self.args.num_rounds:
                    continue
                if (folder / LABELS).exists():
                    durable.set_aside(folder)
                else:
                    durable.discard(folder)
        self.accelerator.wait_for_everyone()

    def _state_content(self, round_index: int) -> dict[str, Any]:
        content = super()._state_content(round_index)
        return (
            content | {"prompts": self._prompts_digest, "judges": self._judged_with()}
            if self._prompts_digest
            else content
        )

    # ---- A round's rows ----

    def _rows_of_rollouts(self, rollouts: list[dict[str, Any]], planned: int) -> Any:
        """
        The training rows of a round, a `datasets.Dataset`; a method's own.

        Args:
            rollouts: a row a prompt, as on disk: `prompt_ids`, `completion_ids`, `logps`, `reward`, `chosen` and
                `rejected`.
            planned: rows that the round has room for.
        """
        raise NotImplementedError

    def _round_builder(self, round_index: int) -> Any:
        if not self._makes_rows:
            return super()._round_builder(round_index)
        return lambda folder: self._sampled_rows(round_index, folder)

    def _sampled_rows(self, round_index: int, folder: RoundFolder) -> tuple[Any, dict[str, Any]]:
        """Sample, judge, and make rows; and what the manifest keeps of it."""
        assert self._rows is not None
        task = self._round_task(round_index, str(folder.whole_manifest()["policy"]))
        statistics = self._collect(task)
        rows = self._rows_of_rollouts(task.store.table(_ROW_COLUMNS).to_pylist(), len(self._rows))
        return rows, {"rollouts": statistics}

    def _round_task(self, round_index: int, policy: str) -> _Task:
        """
        What a round samples and has judged.

        Args:
            policy: hash of the weights that it samples from.
        """
        assert self._rows is not None
        where, order = f"Round {round_index + 1}", self._order_of(round_index)
        belongs_to = {
            "policy": policy,
            "prompts": self._prompts_digest,
            "order": xxhash.xxh3_64_hexdigest(np.array(order, dtype="<i8").tobytes()),
            "wanted": len(self._rows),
        }
        return _Task(
            store=self._store(
                f"round-{round_index:04d}",
                belongs_to,
                self.args.num_generations,
                self._judge,
                where,
                for_training=True,
            ),
            prompts=self._prepared_train_dataset,
            order=order,
            wanted=len(self._rows),
            num_generations=self.args.num_generations,
            judge=self._judge,
            purpose=f"round {round_index}",
            where=where,
            for_training=True,
        )

    def _order_of(self, round_index: int) -> list[int]:
        """
        The positions of a round's prompts, in an order of the round's own: the first of them are sampled for, the
        others stand in where needed.
        """
        fold = self._folds[round_index % len(self._folds)] if self._folds else range(len(self._prepared_train_dataset))
        draw = np.random.default_rng(batch_seed(self.args.seed, f"order {round_index}", 0))
        return [int(position) for position in draw.permutation(list(fold))]

    def _store(
        self,
        name: str,
        belongs_to: dict[str, Any],
        num_generations: int,
        judge: Any,
        where: str,
        for_training: bool = False,
    ) -> RolloutStore:
        described = {"ranker": EXTERNAL} if judge == EXTERNAL else (judge.to_dict() if judge is not None else {})
        description = {
            **belongs_to,
            **described,
            "sampling": self._sampling_settings().to_dict(),
            "num_generations": num_generations,
            "batch_prompts": self._batch_prompts(num_generations),
            "seed": self.args.seed,
        }
        if self.args.use_vllm:
            description["vllm"] = {"structured_outputs_regex": self.args.vllm_structured_outputs_regex}
        return RolloutStore(
            self._rollouts_dir / name,
            description,
            write=self.args.should_save,
            barrier=self.accelerator.wait_for_everyone,
            name=where,
            replace=not for_training,
            judges=judge.identities() if isinstance(judge, (Rewards, Ranker)) else None,
            resumes=self._resumes,
        )

    def _batch_prompts(self, num_generations: int) -> int:
        """Prompts a batch: as many completions at a time, however many each prompt has."""
        return max(self.args.batch_prompts * (self.args.num_generations or _FEW_GENERATIONS) // num_generations, 1)

    def _sampling_settings(self) -> SamplingSettings:
        args, tokenizer = self.args, self._text_tokenizer()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return SamplingSettings(
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            max_completion_length=args.max_completion_length,
            stop_token_ids=stop_tokens(tokenizer, self.accelerator.unwrap_model(self.model)),
            pad_token_id=pad,
        )

    def _text_tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    # ---- Phases ----

    def _collect(self, task: _Task) -> dict[str, Any]:
        """Sample and judge until there are as many pairs as wanted, or no prompts left. Returns the statistics."""
        store = task.store
        held = task.judge.held() if isinstance(task.judge, Rewards) else nullcontext()
        with self._state_errors(max(self._round, 0)), held:
            if store.open() and task.for_training:
                self._say(
                    f"{task.where}: the rollouts on disk were of other weights; they are set aside, and it samples "
                    "again."
                )
            finished = store.finished()
            self.accelerator.wait_for_everyone()
            if finished is not None:
                self._say(f"{task.where}: sampled and judged before; taken from disk.")
                return dict(finished["statistics"])
            lengths = [len(ids) for ids in task.prompts["prompt_ids"]]
            rows: list[dict[str, Any]] = []
            number_of_batches = taken = pairs = 0
            size = len(task.order) if task.wanted is None else min(task.wanted, len(task.order))
            while size:
                wave = task.order[taken : taken + size]
                batches = plan_batches(
                    lengths,
                    wave,
                    self._batch_prompts(task.num_generations),
                    number_of_batches,
                    self.args.seed,
                    task.purpose,
                )
                number_of_batches, taken = number_of_batches + len(batches), taken + len(wave)
                with self._phase("sample"):
                    self._sample(task, batches)
                rows.extend(self._judged(task, batches, wave))
                pairs = sum(row["chosen"] is not None for row in rows)
                size = self._replacements(task, pairs, taken)
            statistics = self._statistics(task, rows, pairs)
            if task.wanted is not None and pairs == 0:
                self._refuse_no_pairs(task, rows)
            store.finish(_table(task, rows), statistics)
        self._say(_line(task, statistics))
        return statistics

    def _replacements(self, task: _Task, pairs: int, taken: int) -> int:
        """How many further prompts to sample for."""
        if task.wanted is None or task.judge == EXTERNAL or pairs >= task.wanted:
            return 0
        if pairs == 0 and taken >= _HOPELESS:
            return 0
        rate = max(pairs / taken, _LEAST_PAIR_RATE)
        return min(math.ceil((task.wanted - pairs) / rate), len(task.order) - taken)

    def _refuse_no_pairs(self, task: _Task, rows: list[dict[str, Any]]) -> None:
        empty = sum(not any(row["completions"]) for row in rows)
        why = (
            f"every completion of {empty} of them is empty"
            if empty == len(rows)
            else f"all completions of a prompt are judged alike{f' or empty ({empty} prompts)' if empty else ''}"
        )
        left = len(task.order) - len(rows)
        untried = f" (the round's other {left} prompts were not tried)" if left else ""
        name = getattr(task.judge, "name", None) or ", ".join(getattr(task.judge, "names", [])) or str(task.judge)
        raise ConfigurationError(
            f"{task.where}: not one pair out of {len(rows)} prompts, because {why} ({name}): there is nothing to "
            f"train on{untried}. Look at the rollouts and at what judges them, raise `temperature` or "
            "`num_generations`."
        )

    def _mine(self, batches: Iterable[Batch]) -> list[Batch]:
        """The batches of this process: by index, so that every process agrees without asking."""
        return [
            batch
            for batch in batches
            if batch.index % self.accelerator.num_processes == self.accelerator.process_index
        ]

    def _progress(self, total: int, what: str) -> Any:
        return tqdm(
            total=total, desc=what, unit="prompt", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        )

    def _sample(self, task: _Task, batches: list[Batch]) -> None:
        """Sample the batches that are not on disk, each process its own."""
        mine = self._mine(batches)
        left = [batch for batch in mine if not task.store.has("samples", batch.index)]
        # Where processes hold parts of the policy, all put it together, also one that has nothing left to do.
        anybody = not task.given and any(sharding.of_all(bool(left)))
        with self._gathered() if anybody else nullcontext():
            self._sample_here(task, mine, left, anybody)
        self.accelerator.wait_for_everyone()

    def _sampler(self, task: _Task) -> AbstractContextManager[Any]:
        """What samples, while a task's policy is the live one."""
        model = self.accelerator.unwrap_model(self.model)
        if self._vllm is not None:
            return self._vllm.phase(model, str(task.store.description["policy"]))
        return nullcontext(TransformersSampler(model, self._sampling_settings(), self.accelerator.autocast))

    def _sample_here(self, task: _Task, mine: list[Batch], left: list[Batch], anybody: bool) -> None:
        if left and task.given:
            for batch in left:
                task.store.put("samples", batch.index, self._given_samples(task, batch))
        elif left or (anybody and self._vllm is not None):
            prompts_of_mine = sum(len(batch.positions) for batch in mine)
            with self._sampler(task) as sampler, self._progress(prompts_of_mine, f"{task.where}: sampling") as bar:
                bar.update(prompts_of_mine - sum(len(batch.positions) for batch in left))
                tokens, begun = 0, time.monotonic()
                for batch in sampler.batches(left, task.num_generations):
                    started = time.monotonic()
                    prompts = [task.prompts[position]["prompt_ids"] for position in batch.positions]
                    groups = sampler(prompts, task.num_generations, batch.seed)
                    seconds = time.monotonic() - started
                    rows = [
                        {
                            "position": position,
                            "prompt_ids": list(ids),
                            "completion_ids": [completion.ids for completion in group],
                            "completions": [
                                self._text(task.prompts[position]["prompt"], ids, completion.ids)
                                for completion in group
                            ],
                            "logps": [completion.logp for completion in group],
                            "cut": [completion.cut for completion in group],
                            "batch": batch.index,
                            "seed": batch.seed,
                            "seconds": seconds,
                        }
                        for position, ids, group in zip(batch.positions, prompts, groups, strict=True)
                    ]
                    task.store.put("samples", batch.index, rows)
                    tokens += sum(len(completion.ids) for group in groups for completion in group)
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - begun):.0f} tokens/s")
                    bar.update(len(batch.positions))

    def _text(self, prompt: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
        """What judges read of a completion: a message's content begins a text, that of a text prompt goes on."""
        tokenizer = self._text_tokenizer()
        if isinstance(prompt, str):
            return completion_text(tokenizer, prompt_ids, completion_ids)
        return str(tokenizer.decode(completion_ids, skip_special_tokens=True))

    @staticmethod
    def _given_samples(task: _Task, batch: Batch) -> list[dict[str, Any]]:
        """Rows like those of samples, of completions that the task's prompts have beside them."""
        rows = []
        for position in batch.positions:
            row = task.prompts[position]
            text = row["completion"]
            rows.append(
                {
                    "position": position,
                    "prompt_ids": list(row["prompt_ids"]),
                    "completion_ids": [list(row["completion_ids"])],
                    "completions": [text if isinstance(text, str) else str(text[-1]["content"])],
                    "logps": [None],
                    "cut": [False],
                    "batch": batch.index,
                    "seed": batch.seed,
                    "seconds": 0.0,
                }
            )
        return rows

    def _judged(self, task: _Task, batches: list[Batch], wave: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a wave with what was said of them, in the wave's order; the same on every process."""
        samples = {row["position"]: row for batch in batches for row in task.store.get("samples", batch.index)}
        rows = [samples[position] for position in wave]
        for row in rows:
            row.update(chosen=None, rejected=None, reward=None, rewards={}, extras={}, metrics={}, score_seconds=0.0)
        if task.judge == EXTERNAL:
            self._read_external(task, rows)
        elif task.judge is not None:
            self._ask(task, batches)
            for batch in batches:
                for scored in task.store.get("scores", batch.index):
                    samples[scored.pop("position")].update(_unpacked(scored))
        for row in rows:
            if isinstance(task.judge, Rewards):
                names, weights = task.judge.names, task.judge.weights
                row["reward"] = [
                    combine([row["rewards"][name][index] for name in names], weights)
                    for index in range(task.num_generations)
                ]
                if not all(math.isfinite(value) for value in row["reward"]):
                    raise JudgementError(
                        f"{task.where}: the weighted sum of {', '.join(names)} is {row['reward']}, beyond what a "
                        "float "
                        "holds: use smaller rewards or `reward_weights`."
                    )
                if task.wanted is not None:
                    row["chosen"], row["rejected"] = best_and_worst(row["reward"]) or (None, None)
            if row["chosen"] is not None:
                room = self._room(row)
                chosen, rejected = (row["completion_ids"][row[name]][:room] for name in ("chosen", "rejected"))
                # The same tokens, judged differently, or nothing but empty texts: nothing to learn.
                if chosen == rejected or not any(row["completions"]):
                    row["chosen"] = row["rejected"] = None
        if sharding.several_processes():
            said = json.dumps([[row["position"], row["reward"], row["chosen"], row["rejected"]] for row in rows])
            digest = xxhash.xxh3_64_hexdigest(said.encode())
            sharding.agree(f"{task.where}: what is said of the completions", digest, "what judges them")
        return rows

    def _room(self, row: dict[str, Any]) -> int | None:
        """Tokens of a completion that are left of it in training, or None for all."""
        args = self.args
        if args.max_length is None or getattr(args, "truncation_mode", "keep_start") != "keep_start":
            return None
        return max(args.max_length - len(row["prompt_ids"]), 0)

    def _ask(self, task: _Task, batches: list[Batch]) -> None:
        """Judge the batches that are not on disk, each process its own; each is stored as soon as it is answered."""
        judge = task.judge
        assert isinstance(judge, (Rewards, Ranker))
        mine = self._mine(batches)
        left = [batch for batch in mine if not task.store.has("scores", batch.index)]
        if left:
            begun = time.monotonic()
            with self._phase("score"):
                if isinstance(judge, Rewards):
                    with self._policy_away(judge), judge.loaded(self.accelerator.device):
                        self._ask_about(task, mine, left, begun)
                else:
                    self._ask_about(task, mine, left, begun)
        self.accelerator.wait_for_everyone()

    def _phase(self, name: str) -> AbstractContextManager[None]:
        """What surrounds a phase of a round (`"sample"`, `"score"`); a method's own."""
        return nullcontext()

    def _policy_away(self, judge: Rewards) -> AbstractContextManager[None]:
        """What surrounds the time in which reward models are loaded; a method's own."""
        return nullcontext()

    def _ask_about(self, task: _Task, mine: list[Batch], left: list[Batch], begun: float) -> None:
        with self._progress(sum(len(batch.positions) for batch in mine), f"{task.where}: scoring") as bar:
            bar.update(sum(len(batch.positions) for batch in mine) - sum(len(batch.positions) for batch in left))
            for batch in left:
                rows = self._answer(task, batch)
                # What came before the first answer, such as loading a model, is part of the phase.
                seconds, begun = time.monotonic() - begun, time.monotonic()
                task.store.put("scores", batch.index, [{**row, "score_seconds": seconds} for row in rows])
                bar.update(len(batch.positions))

    def _answer(self, task: _Task, batch: Batch) -> list[dict[str, Any]]:
        samples = task.store.get("samples", batch.index)
        examples = [task.prompts[row["position"]] for row in samples]
        conversational = isinstance(examples[0]["prompt"], list)
        groups = [
            [[{"role": "assistant", "content": text}] if conversational else text for text in row["completions"]]
            for row in samples
        ]
        if task.given:
            groups = [[example["completion"]] for example in examples]
        names = [name for name in task.prompts.column_names if name not in _TEXT_COLUMNS]
        if isinstance(task.judge, Ranker):
            columns = {name: [example[name] for example in examples] for name in names}
            prompts = [example["prompt"] for example in examples]
            orders = task.judge.judge(task.where, prompts, groups, columns)
            return [
                {
                    "position": row["position"],
                    "chosen": None if order is None else order[0],
                    "rejected": None if order is None else order[1],
                }
                for row, order in zip(samples, orders, strict=True)
            ]
        assert isinstance(task.judge, Rewards)
        repeated = [example for example in examples for _ in range(task.num_generations)]
        judgement = task.judge.judge(
            task.where,
            [example["prompt"] for example in repeated],
            [completion for group in groups for completion in group],
            [ids for row in samples for ids in row["completion_ids"]],
            {name: [example[name] for example in repeated] for name in names},
            self.state,
            *self._kept(task, batch),
        )
        rows = []
        for index, row in enumerate(samples):
            part = slice(index * task.num_generations, (index + 1) * task.num_generations)
            rows.append(
                {
                    "position": row["position"],
                    **{f"reward/{name}": values[part] for name, values in judgement.values.items()},
                    # As JSON: what a function gives may be of one type here and of another there.
                    **{f"extra/{name}": _as_json(values[part]) for name, values in judgement.extras.items()},
                    **{f"metric/{name}": values if index == 0 else [] for name, values in judgement.metrics.items()},
                }
            )
        return rows

    def _kept(self, task: _Task, batch: Batch) -> tuple[dict[str, Any], Any]:
        """Where one of several rewards fails, the others are not asked again."""
        assert isinstance(task.judge, Rewards)
        if len(task.judge.names) == 1:
            return {}, None
        known = task.store.kept_answers(batch.index, task.judge.names)
        return known, lambda name, answer: task.store.keep_answer(batch.index, name, answer)

    def _read_external(self, task: _Task, rows: list[dict[str, Any]]) -> None:
        """Labels that people or another machine have filled in; without them the run stops here."""
        prompts = [task.prompts[row["position"]]["prompt"] for row in rows]
        completions = [row["completions"] for row in rows]
        filled = task.store.read_labels()
        self.accelerator.wait_for_everyone()
        labels = None
        if filled is None:
            task.store.write_labels(label_rows(prompts, completions))
        else:
            labels = read_labels(filled, prompts, completions, f"{task.where}, {LABELS}")
            if labels is not None:
                self._say(f"{task.where}: labels of {len(rows)} prompts found.")
        if labels is None:
            message = (
                f"{task.where}: {len(rows)} prompts are sampled and wait for labels"
                f"{'' if filled is None else ', of which there are none yet'}. Fill in "
                f"{task.store.folder / LABELS}: for every line either `rewards`, {task.num_generations} numbers, or "
                "`chosen` and `rejected`, indices from 0 (both -1 for a tie). Then run the same command again with "
                "`resume_from_checkpoint` set to 'last'."
            )
            self._say(message)
            raise WaitingForLabels(message)
        for row, (rewards, ends) in zip(rows, labels, strict=True):
            row["chosen"], row["rejected"] = ends or (None, None)
            if rewards is not None:
                row["reward"] = rewards
            row["rewards"] = {EXTERNAL: rewards}

    # ---- What is said of it ----

    def _statistics(self, task: _Task, rows: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
        found = text_statistics(rows)
        world = self.accelerator.num_processes
        for key, name in (("seconds", "sample_seconds"), ("score_seconds", "score_seconds")):
            by_batch = {row["batch"]: row[key] for row in rows}
            # Processes work side by side: the phase took as long as the one with most to do.
            shares = [sum(s for batch, s in by_batch.items() if batch % world == rank) for rank in range(world)]
            found[name] = round(max(shares), 3)
        found["tokens_per_second"] = round(found["tokens"] / max(found["sample_seconds"], 1e-9), 1)
        rewarded = [row["reward"] for row in rows if row["reward"] is not None]
        if rewarded:
            found["reward_mean"] = mean_and_error([value for values in rewarded for value in values])[0]
            found["reward_best"] = mean_and_error([max(values) for values in rewarded])[0]
            found["reward_worst"] = mean_and_error([min(values) for values in rewarded])[0]
            found["rewards"] = _by_function(rows)
        metrics: dict[str, list[float]] = {}
        for row in rows:
            for name, values in row["metrics"].items():
                metrics.setdefault(name, []).extend(values)
        if metrics:
            found["metrics"] = {name: mean_and_error(values)[0] for name, values in metrics.items() if values}
        if task.wanted is not None:
            used = min(pairs, task.wanted)
            empty = sum(not any(row["completions"]) for row in rows)
            found |= {"pairs": used, "ties": len(rows) - pairs, "repeated": task.wanted - used, "empty": empty}
            if empty and pairs:
                self._warn(
                    f"{task.where}: {empty} of {len(rows)} prompts got nothing but empty completions and are left out."
                )
        return found

    # ---- Held-out prompts ----

    def _heldout(self) -> dict[str, Any]:
        """The evaluation sets of prompts, by name."""
        return {name: dataset for name, dataset in _named(self.eval_dataset).items() if self._is_prompts(dataset)}

    def _heldout_digest(self) -> dict[str, str]:
        return {name: rows_fingerprint(dataset) for name, dataset in self._heldout().items()}

    def _measure(self, which: str, round_index: int) -> dict[str, Any] | None:
        """
        Sample one completion for every held-out prompt from the live weights, and judge them.

        Args:
            which: `"start"`, `"iterate"` or `"extrapolated"`, of round `round_index`.

        Returns:
            Mean reward and its standard error, distinct bigrams, share cut, mean length; None without such prompts.
        """
        assert self._weights is not None
        heldout = self._heldout()
        if not heldout:
            return None
        policy = self._weights.fingerprint()
        found: dict[str, Any] = {}
        for name, prompts in heldout.items():
            folder = f"heldout-{round_index:04d}-{which}" + (f"-{_safe(name)}" if name != "eval" else "")
            where = f"Round {round_index + 1}, held-out prompts ({which}{'' if name == 'eval' else f', {name}'})"
            measured = self._measure_set(prompts, policy, folder, where)
            found |= measured if name == "eval" else {f"{name}_{key}": value for key, value in measured.items()}
        return found

    def _measure_set(self, prompts: Any, policy: str, folder: str, where: str) -> dict[str, Any]:
        # People who label a round's pairs are not asked about held-out prompts, and a ranker has nothing to compare.
        judge = self._judge if isinstance(self._judge, Rewards) else None
        digest = rows_fingerprint(prompts)
        task = _Task(
            store=self._store(folder, {"policy": policy, "prompts": digest}, 1, judge, where),
            prompts=prompts,
            order=range(len(prompts)),
            wanted=None,
            num_generations=1,
            judge=judge,
            # The same seeds every time, so that two policies are compared on the same random numbers.
            purpose="heldout",
            where=where,
        )
        statistics = self._collect(task)
        kept = ("prompts", "distinct_bigrams", "share_cut", "mean_length", "metrics")
        found = {name: statistics[name] for name in kept if name in statistics}
        found["seconds"] = round(statistics["sample_seconds"] + statistics["score_seconds"], 3)
        if judge is not None:
            rewards = [values[0] for values in task.store.table(["reward"]).column("reward").to_pylist()]
            found["reward"], found["reward_error"] = mean_and_error(rewards)
            if len(judge.names) > 1:
                found["rewards"] = statistics["rewards"]
        return found

    def _measure_iterate(self, round_index: int, summary: dict[str, Any]) -> None:
        super()._measure_iterate(round_index, summary)
        folder = RoundFolder(self._output_dir, round_index)
        manifest = folder.manifest() or {}
        rollouts = manifest.get("rollouts")
        if rollouts:
            # Manifests are sorted by name; a row is in the order in which it is read.
            summary |= {name: rollouts[name] for name in _STATISTICS if name in rollouts}
        if self._heldout():
            if round_index == 0:
                # Of the same prompts only: a run that goes on may be measured on others.
                same = manifest.get("heldout") == self._heldout_digest()
                summary["heldout_start"] = manifest.get("heldout_start") if same else None
            with self._own_random_numbers(round_index), self._evaluating():
                summary["heldout_iterate"] = self._measure("iterate", round_index)
            if self._extrapolates:
                summary["heldout_extrapolated"] = None

    def _after_weights(self, round_index: int, folder: RoundFolder) -> None:
        super()._after_weights(round_index, folder)
        if not self._heldout():
            return
        if round_index == 0:
            self._add_to_manifest(folder, heldout_start=self._measure("start", 0), heldout=self._heldout_digest())
            return
        if not self._extrapolates:
            return
        self._note_extrapolated(round_index - 1, self._measure_extrapolated(round_index - 1, folder))
        self._add_to_manifest(folder, summaries=self.round_summaries)

    def _measure_extrapolated(self, round_index: int, folder: RoundFolder) -> dict[str, Any] | None:
        manifest = folder.whole_manifest()
        if manifest["policy"] == manifest["iterate"]:
            return dict(self.round_summaries[-1]["heldout_iterate"])
        return self._measure("extrapolated", round_index)

    def _note_extrapolated(self, round_index: int, measured: dict[str, Any] | None) -> None:
        """Complete the row of a round that is over with what its extrapolated policy does."""
        for row in self.round_summaries:
            if row["round"] == round_index:
                row["heldout_extrapolated"] = measured
                self._log_numbers({"heldout_extrapolated": measured})
        with self._state_errors(round_index):
            self._write_summaries()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        The parent's metrics on preference pairs. Prompts are sampled for and judged; inside training this happens at
        the ends of rounds only, whatever `eval_strategy` says.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, str):
            given = self.eval_dataset[given]
        if isinstance(given, dict) and any(self._is_prompts(dataset) for dataset in given.values()):
            metrics: dict[str, float] = {}
            for name, dataset in given.items():
                # The parent looks its own sets up by name, prepared as they are.
                one = name if eval_dataset is None else dataset
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if not self._is_prompts(given):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.is_in_train and not self._calling_round_end:
            return {}
        prompts = self._prepare_prompts(given, self.processing_class, self.args, metric_key_prefix)
        assert self._weights is not None
        with self._evaluating():
            measured = self._measure_set(
                prompts, self._weights.fingerprint(), f"heldout-{_safe(metric_key_prefix)}", "Evaluation"
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in _flat(measured).items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- A run that waits ----

    def _on_step_end(self, control: Any) -> Any:
        control = super()._on_step_end(control)
        assert self._plan is not None
        if self._makes_rows and self.state.global_step in self._plan.starts[1:-1]:
            # What comes next takes long, may be paid for, or stops for labels: it has to be possible to go on from
            # here.
            strategy = str(getattr(self.args.save_strategy, "value", self.args.save_strategy))
            # At the end of an epoch upstream saves by itself, if asked to.
            if strategy not in ("no", "epoch") or (strategy == "no" and self._judge == EXTERNAL):
                control.should_save = True
        return control


def is_prompts(dataset: Any) -> bool:
    """Whether a dataset holds prompts alone, so that completions have to be sampled."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        return False
    return "prompt" in columns and not {"chosen", "rejected", "chosen_ids", "rejected_ids"} & set(columns)


def text_statistics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is said of sampled text whatever its rewards: a reward is never shown alone."""
    texts = [text for row in rows for text in row["completions"]]
    lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
    cut = [flag for row in rows for flag in row["cut"]]
    return {
        "prompts": len(rows),
        "samples": len(texts),
        "tokens": sum(lengths),
        "mean_length": mean_and_error(lengths)[0],
        "share_cut": sum(cut) / len(cut),
        "distinct_bigrams": distinct_bigrams(texts),
    }


def _named(evaluation: Any) -> dict[str, Any]:
    if evaluation is None:
        return {}
    return dict(evaluation) if isinstance(evaluation, dict) else {"eval": evaluation}


def _safe(name: str) -> str:
    """A set's name as part of a folder's."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
    return plain if plain == name else f"{plain}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"


def _as_json(values: Sequence[Any]) -> list[str]:
    return [json.dumps(value, default=str) for value in values]


def _extras_column(values: Sequence[Any]) -> pa.Array:
    """What functions gave to `log_extra`, as it is where all of it is of one type, and as JSON otherwise."""
    read = [None if row is None else [json.loads(value) for value in row] for row in values]
    try:
        return pa.array(read)
    except (pa.ArrowException, OverflowError):
        return pa.array(values, pa.list_(pa.string()))


def _unpacked(scored: dict[str, Any]) -> dict[str, Any]:
    """A row of scores with its values by name."""
    found: dict[str, Any] = {"rewards": {}, "extras": {}, "metrics": {}}
    kinds = {"reward": "rewards", "extra": "extras", "metric": "metrics"}
    for name, value in scored.items():
        kind, slash, rest = name.partition("/")
        if slash:
            found[kinds[kind]][rest] = value
        else:
            found[name] = value
    return found


def _line(task: _Task, found: dict[str, Any]) -> str:
    """What a set of rollouts is like, in a line."""
    parts = [
        f"{found['samples']} responses scored in {found['score_seconds']:.1f} s"
        if task.given
        else f"{found['prompts']} prompts x {task.num_generations} sampled in {found['sample_seconds']:.1f} s "
        f"({found['tokens_per_second']:.0f} tokens/s)"
    ]
    if "reward_mean" in found:
        parts.append(f"mean reward {found['reward_mean']:.3g}")
    if task.wanted is not None:
        parts.append(f"{found['pairs']} pairs, {found['ties']} ties")
    parts.append(f"{found['share_cut']:.0%} cut, distinct bigrams {found['distinct_bigrams']:.2f}")
    return f"{task.where}: {', '.join(parts)}."


def _by_function(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The mean of each reward function over the completions that it applies to."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, values in row["rewards"].items():
            found.setdefault(name, []).extend(value for value in values or () if value is not None)
    return {name: mean_and_error(values)[0] if values else None for name, values in found.items()}


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of nested dicts, keys joined."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}_{key}": number for key, number in _flat(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def _table(task: _Task, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """The documented form: a row a prompt, in the order of the round."""
    prompts = task.prompts.select_columns(["prompt"]).select([row["position"] for row in rows])
    numbers, several = pa.list_(pa.float64()), pa.list_(pa.list_(pa.int32()))
    columns: dict[str, pa.Array] = {
        # As the dataset has it in Arrow: turns of mixed types are JSON there.
        "prompt": prompts.with_format("arrow")[:].column("prompt").combine_chunks(),
        "row": pa.array([row["position"] for row in rows], pa.int64()),
        "prompt_ids": pa.array([row["prompt_ids"] for row in rows], pa.list_(pa.int32())),
        "completions": pa.array([row["completions"] for row in rows], pa.list_(pa.string())),
        "completion_ids": pa.array([row["completion_ids"] for row in rows], several),
        "logps": pa.array([row["logps"] for row in rows], numbers),
        "cut": pa.array([row["cut"] for row in rows], pa.list_(pa.bool_())),
        "reward": pa.array([row["reward"] for row in rows], numbers),
        "chosen": pa.array([row["chosen"] for row in rows], pa.int32()),
        "rejected": pa.array([row["rejected"] for row in rows], pa.int32()),
        "batch": pa.array([row["batch"] for row in rows], pa.int32()),
        "seed": pa.array([row["seed"] for row in rows], pa.int64()),
    }
    for name in dict.fromkeys(name for row in rows for name in row["rewards"]):
        columns[f"reward_{name}"] = pa.array([row["rewards"].get(name) for row in rows], numbers)
    for name in dict.fromkeys(name for row in rows for name in row["extras"]):
        columns[f"extra_{name}"] = _extras_column([row["extras"].get(name) for row in rows])
    return pa.table(columns)


__all__ = ["RolloutsTrainer", "WaitingForLabels", "is_prompts", "text_statistics"]
