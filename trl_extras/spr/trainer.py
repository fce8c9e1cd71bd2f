"""
Successive Policy Re-weighting (ICLR 2025 submission 12963), as a subclass of TRL's SFTTrainer.

Of the paper only the abstract was at hand: one model in memory, a step that costs a step of fine-tuning, policy
improvement by re-weighting responses by their performance, successively, on offline and online data. How the weights
are made is our derivation, in `docs/spr.md`.

| derivation | here |
|---|---|
| pi_k | the policy at the start of round k |
| y_i ~ q | a round's responses: sampled from pi_k, and offline ones |
| w_i | `weights.policy_weights`, over all responses of a prompt |
| - sum_i w_i log pi_theta(y_i given x) / tokens | `compute_loss`: SFTTrainer's, each row times its weight |
"""

from __future__ import annotations

import copy
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from tqdm.auto import tqdm
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import named_data
from ..errors import ConfigurationError
from ..own_loss import OwnLoss, refuse_override
from ..rollouts.config import EXTERNAL
from ..rollouts.judges import Rewards
from ..rollouts.sampling import batch_seed
from ..rollouts.trainer import RolloutsTrainer, _Task, is_prompts
from ..rounds import sharding
from ..rounds.data import batches_of, rows_fingerprint
from ..rounds.state import RoundFolder
from ..rows import check_responses
from .config import SPRConfig
from .offline import REWARD, TRAINING_SET, Responses, each_once, has_responses, prompts_of, read_responses, without
from .phases import PhaseMemory
from .rows import Counts, Response, counts_of_round, rows_of_run, taken, weigh


logger = logging.get_logger(__name__)

WEIGHT = "weight"
_IGNORED = -100
_PHASES = ("sample", "score", "importance", "train")
# Below it a prompt teaches hardly more than one of its responses; of prompts with one response, which are one group,
# it is this share.
_SMALL_SAMPLE, _SMALL_SHARE = 1.2, 0.05
# What is said of a round's weights, in the order in which it is read.
_SAID = (
    "online_rows", "offline_rows", "offline_responses", "repeated_rows", "groups", "group_size", "equal_groups",
    "skipped_groups", "singletons", "effective_sample_size", "effective_share", "effective_where_unequal",
    "singletons_effective", "weight_max", "offline_weight_share", "offline_reward_mean", "reward_spread",
    "ratios_clipped", "empty", "importance_seconds",
)  # fmt: skip


class SPRTrainer(RolloutsTrainer, SFTTrainer):
    """
    Trainer for Successive Policy Re-weighting: rounds of supervised fine-tuning on responses of the policy itself and
    of a dataset, each weighted by what it earned.

    Each round samples responses from the current policy, has them scored, weights every response by exp(reward / beta)
    relative to the others of its prompt, corrected for what it was drawn from, and fine-tunes on all of them with
    [`~trl.SFTTrainer`]'s loss, one weight a response. There is one model in memory; a reward model takes its place
    while it scores. Takes exactly the arguments of [`~trl.SFTTrainer`]; `args` is an [`SPRConfig`].

    `train_dataset` holds prompts (`prompt`), or responses (`prompt` and `completion`) or preference pairs (`prompt`,
    `chosen` and `rejected`), whose responses are trained on beside those that are sampled for the same prompts. With
    `num_generations=0` nothing is sampled: reward-weighted regression on the responses of the dataset.

    Args:
        reward_funcs: as for [`~trl.GRPOTrainer`]: a function, a model, a model's id, or a list of them.
        reward_processing_classes: as for [`~trl.GRPOTrainer`].
        ranker: `"external"` stops the run after sampling for rewards from elsewhere.
        offline_dataset: responses or pairs, if `train_dataset` is to hold the prompts alone. Offline responses have
            their reward in a column `reward`, or are scored like sampled ones.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import think_format_reward
    >>> from trl_extras import SPRConfig, SPRTrainer

    >>> trainer = SPRTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=SPRConfig("out", num_rounds=3, reward_temperature=0.2),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    ...     reward_funcs=think_format_reward,
    ... )
    >>> trainer.train()
    ```
    """

    config_class = SPRConfig
    _tag_names = ["trl", "sft", "successive-policy-re-weighting"]  # noqa: RUF012
    _name = "SPR"
    _paper = {  # noqa: RUF012
        "title": "Policy optimization can be memory-efficient: LLM Alignment Through Successive Policy Re-weighting "
        "(SPR)",
        "url": "https://openreview.net/forum?id=LglOy15bqe",
        "citation": textwrap.dedent("""\
            @misc{spr2024,
                title = {{Policy optimization can be memory-efficient: LLM Alignment Through Successive Policy
                         Re-weighting (SPR)}},
                author = {{Anonymous}},
                year = 2024,
                note = {Submission 12963 to ICLR 2025},
                url = {https://openreview.net/forum?id=LglOy15bqe},
            }"""),
    }
    _extrapolates = False
    _trains_adapters = True

    def __init__(self, *args: Any, offline_dataset: Any = None, **kwargs: Any):
        self._given_offline = offline_dataset
        self._given_train: Any = None
        self._offline: Responses | None = None
        self._offline_pools: list[list[int]] = []
        self._offline_digest: str | None = None
        self._told_of_small_samples = False
        super().__init__(*args, **kwargs)
        self._watch = OwnLoss(self, "the weights of the responses")
        self.add_callback(self._watch)
        self._memory = PhaseMemory(self.accelerator.device)
        self.data_collator: Any = WeightedCollator(self.data_collator)
        if isinstance(self._judge, Rewards) and self.accelerator.device.type != "cpu":
            for reward in self._judge.rewards:
                # One that was passed already loaded waits for its phase elsewhere, too.
                if reward.model is not None:
                    reward.model.to("cpu")
        cut_away = self.args.truncates
        if cut_away and self.args.num_generations > 0:
            logger.warning(
                f"{', '.join(cut_away)}: responses that are cut away can never be sampled, and weights cannot bring "
                "them back, so that every round sharpens the policy, whatever the rewards are. Leave it out."
            )

    # ---- Checks, before any weights load ----

    def _check_arguments(self, given: dict[str, Any], config: SPRConfig) -> None:
        train = given.get("train_dataset")
        for name in ("formatting_func", "compute_loss_func"):
            if given.get(name) is not None:
                raise ConfigurationError(
                    f"`{name}` does not work with SPR: the loss is that of whole responses to prompts. Leave it out."
                )
        collator = given.get("data_collator")
        if isinstance(collator, DataCollatorForLanguageModeling) and collator.padding_free:
            raise ConfigurationError(
                "`data_collator` has `padding_free=True`, which does not work with SPR: it makes one row of a batch, "
                "and each response has a weight of its own. Leave it False."
            )
        if isinstance(train, datasets.IterableDataset):
            raise ConfigurationError(
                "A streaming `train_dataset` does not work with SPR: a round is a whole number of epochs. Load the "
                "dataset without streaming."
            )
        evaluation = given.get("eval_dataset")
        for dataset in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
            if {"chosen", "rejected"} <= set(getattr(dataset, "column_names", None) or ()):
                raise ConfigurationError(
                    "`eval_dataset` holds preference pairs, but SPR measures the loss of rows with a `completion`, or "
                    "the reward of prompts alone: give one of these."
                )
        self._given_train = train
        self._read_offline(train, config)
        if self._offline is None:
            self._check_without_offline(config)
        elif config.num_generations == 0 and config.num_rounds > 1 and self._offline.behavior is None:
            logger.warning(
                f"Nothing is sampled and the responses' log-probabilities are unknown, so that {config.num_rounds} "
                "rounds weigh by the rewards alone: they only start the optimiser afresh. `num_rounds=1` is the plain "
                "form; `behavior_logps_column` makes the rounds build on each other."
            )
        super()._check_arguments(given, config)
        if config.num_generations > 0 and self._offline is not None and self._offline.where != TRAINING_SET:
            # Its responses, if it has any, are not used; its prompts are.
            prompts = without(train, {"completion", "chosen", "rejected"})
            if "prompt" in prompts.column_names:
                self._check_prompts(prompts, {}, config)

    def _read_offline(self, train: Any, config: SPRConfig) -> None:
        """Find the offline responses and check them as far as that goes without a tokenizer."""
        offline, where = named_data.load_rows(
            "offline_dataset", self._given_offline, config, "its rows are looked up by number"
        )
        self._given_offline = None
        if isinstance(train, datasets.Dataset) and not {"prompt", "chosen"} & set(train.column_names):
            raise ConfigurationError(
                f"`train_dataset` has the columns {sorted(train.column_names)}, but SPR wants prompts (`prompt`), "
                "responses (`prompt` and `completion`) or preference pairs (`prompt`, `chosen` and `rejected`); "
                "conversations have to be split into `prompt` and `completion`."
            )
        if offline is not None:
            if config.num_generations == 0:
                logger.warning(
                    f"{where} is given and `num_generations` is 0, so that `train_dataset` is not used at all."
                )
            elif has_responses(train):
                logger.warning(
                    f"{where} is given, so that the responses in `train_dataset` are not used, its prompts alone."
                )
        elif isinstance(train, datasets.Dataset) and has_responses(train):
            offline, where = train, TRAINING_SET
        elif isinstance(train, datasets.Dataset) and REWARD in train.column_names:
            logger.warning(
                f"`train_dataset` has a column `{REWARD}`, but no responses that have earned it (its columns: "
                f"{sorted(train.column_names)}): if they are there under another name, rename it to `completion`."
            )
        if offline is not None:
            self._offline = read_responses(offline, where, config)
            unanswered = len(offline) - len(self._offline or ()) if "completion" in offline.column_names else 0
            if unanswered and config.num_generations == 0:
                logger.warning(
                    f"{unanswered} of {len(offline)} rows of {where} have no response and are not used, because "
                    "`num_generations` is 0."
                )

    @staticmethod
    def _check_without_offline(config: SPRConfig) -> None:
        if config.num_generations == 0:
            raise ConfigurationError(
                "`num_generations` is 0, but there are no offline responses to train on: give `train_dataset` a "
                "column `completion`, or pass an `offline_dataset`, or sample some."
            )
        for name in ("behavior_logps_column", "offline_ratio"):
            if getattr(config, name) is not None:
                raise ConfigurationError(
                    f"`{name}` is {getattr(config, name)!r}, but there are no offline responses: give `train_dataset` "
                    "a column `completion`, or pass an `offline_dataset`, or leave it out."
                )

    def _check_raw_rows(self, rows: datasets.Dataset, where: str, tokenizer: Any) -> None:
        # Responses are looked at where they are read, one by one.
        if not has_responses(rows):
            super()._check_raw_rows(rows, where, tokenizer)

    def _judged_sets(self, train: Any, named: dict[str, Any]) -> dict[str, Any]:
        asked = super()._judged_sets(train, named)
        asked = {where: dataset for where, dataset in asked.items() if dataset is not train}
        if isinstance(train, datasets.Dataset) and self.args.num_generations > 0:
            asked["`train_dataset`"] = prompts_of(train.select(range(min(len(train), 1))), self.args)
        if self._offline is not None and np.isnan(self._offline.rewards).any():
            asked[self._offline.where] = self._offline.rows
        return asked

    def _what_rounds(self) -> str:
        return "SPR, where each round makes its rows"

    def _is_prompts(self, dataset: Any) -> bool:
        columns = getattr(dataset, "column_names", None)
        return is_prompts(dataset) and not {"completion", "input_ids"} & set(columns or ())

    def _rows_are_made(self, train: Any) -> bool:
        return True

    def _judge_is_needed(
        self, given: dict[str, Any], config: Any, evaluates: bool, reward_funcs: Any, ranker: Any
    ) -> bool:
        if ranker is not None and ranker != EXTERNAL:
            raise ConfigurationError(
                "`ranker` is given, which orders responses, but SPR weights them by rewards: give `reward_funcs`, or "
                f"the ranker {EXTERNAL!r} with `rewards` in its label file."
            )
        unscored = 0 if self._offline is None else int(np.isnan(self._offline.rewards).sum())
        offline = "" if self._offline is None else self._offline.where
        if unscored and reward_funcs is None:
            raise ConfigurationError(
                f"{offline} has {unscored} of {len(self._offline or ())} responses without a reward, and there is no "
                "function to score them: give them a column `reward` of finite numbers, or give `reward_funcs`."
            )
        if config.num_generations > 0 and reward_funcs is None and ranker is None:
            raise ConfigurationError(
                f"responses are sampled (`num_generations` is {config.num_generations}), but nothing scores them: "
                "give `reward_funcs`; or set `num_generations=0` to train on offline responses alone."
            )
        if evaluates and reward_funcs is None and ranker is None:
            raise ConfigurationError(
                "`eval_dataset` holds prompts alone, so that responses are sampled for it, but nothing scores them: "
                "give `reward_funcs`, or rows with a `completion`, whose loss is measured."
            )
        if ranker == EXTERNAL and config.num_generations == 0:
            raise ConfigurationError(
                f"`ranker` is {EXTERNAL!r}, but `num_generations` is 0, so that there is nothing to label."
            )
        if reward_funcs is not None and not (unscored or config.num_generations > 0 or evaluates):
            logger.warning(
                "`reward_funcs` is given, but every response has its `reward` already and none is sampled: it is "
                "used for the prompts of `eval_dataset` alone, if there are any."
            )
        return reward_funcs is not None or ranker is not None

    def _check_rows(self, train_dataset: Any, config: Any) -> None:
        if config.num_generations == 0 and self._offline is not None:
            train_dataset = self._offline.rows
        super()._check_rows(train_dataset, config)

    def _partly_used(self) -> dict[str, Callable[[Any], Any]]:
        return {**super()._partly_used(), "num_generations": lambda number: number == 0}

    def _settle_arguments(self) -> None:
        self.args.validate_spr()
        super()._settle_arguments()

    def _per_round_fields(self) -> set[str]:
        return {"offline_ratio"}

    def round_settings(self, round_index: int) -> dict[str, Any]:
        settings = super().round_settings(round_index)
        return settings if self._offline is None else settings | {"offline_ratio": self._ratio(round_index)}

    def _comparable_configuration(self, config: Any) -> dict[str, Any]:
        fields = super()._comparable_configuration(config)
        # What is in the rows is compared, not where they lie.
        for name in ("offline_dataset_name", "offline_dataset_config", "offline_dataset_split"):
            fields.pop(name, None)
        template = Path(str(config.chat_template_path))
        if config.chat_template_path is not None and template.is_file():
            # What is in it, not where it lies.
            fields["chat_template_path"] = f"xxh3:{xxhash.xxh3_128_hexdigest(template.read_bytes())}"
        elif config.chat_template_path is not None and template.is_dir():
            fields.pop("chat_template_path")
        return fields

    # ---- Data ----

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **named: Any) -> Any:
        # Upstream looks at the training set, which may hold prompts alone.
        self.completion_only_loss = True
        if dataset is self._given_train:
            self._given_train = None
            return self._prepare_train(dataset, processing_class, args)
        name = named.get("dataset_name") or rest[-1]
        if name == "train":
            # A set for evaluation that somebody calls so.
            name = "eval train"
            rest, named = (*rest[:-1], name) if rest else rest, named | ({} if rest else {"dataset_name": name})
        if {"prompt", "completion", "text"} <= set(dataset.column_names or ()):
            # Upstream would put the end of text after the one that it does not train on.
            dataset = dataset.remove_columns("text")
        prepared = super()._prepare_dataset(dataset, processing_class, args, *rest, **named)
        columns = getattr(prepared, "column_names", None) or []
        if self._judge is not None and "prompt" in columns and "prompt_ids" not in columns:
            # Rows whose loss is measured have prompts too, and those can be sampled for.
            prepared = self._with_prompt_ids(prepared, processing_class, args, name)
        return prepared

    def _prepare_train(self, dataset: Any, processing_class: Any, args: Any) -> Any:
        """The rows that are dealt to the rounds: prompts to sample for, or offline responses."""
        mine, own = has_responses(dataset), False
        if self._offline is not None:
            own = self._offline.where == TRAINING_SET
            self._offline = self._prepare_offline(self._offline, processing_class, args)
            if args.num_generations == 0:
                return self._offline.rows
        prompts = prompts_of(dataset, args) if mine else dataset
        if not own:
            return self._prepare_prompts(prompts, processing_class, args, "train")
        # A prompt with several responses is still one prompt. What they are has been looked at with the responses.
        prompts = self._with_prompt_ids(prompts, processing_class, args, "train")
        return self._fitting(each_once(prompts), args, "train")

    def _have_room(self, lengths: Any, args: Any) -> Any:
        long = int((lengths + args.max_completion_length > args.max_length).sum())
        if long and args.num_generations > 0:
            raise ConfigurationError(
                f"{long} of {len(lengths)} prompts, of up to {int(lengths.max())} tokens, and `max_completion_length` "
                f"({args.max_completion_length}) are longer than `max_length` ({args.max_length}), so that sampled "
                "responses could not be trained on whole: lower the one, raise the other, or leave those prompts out."
            )
        return lengths > 0

    def _prepare_offline(self, offline: Responses, processing_class: Any, args: Any) -> Responses:
        """Offline responses as SFTTrainer would have them, with the tokens of their prompts."""
        number, limit = len(offline), args.max_length
        # Upstream looks at some other columns too, by their names, and adds the end of text to what reward functions
        # are to see: it gets what it needs, and the rest goes beside what it made.
        wanted = [
            name for name in ("prompt", "completion", "chat_template_kwargs") if name in offline.rows.column_names
        ]
        check_responses(offline.rows, offline.where, getattr(processing_class, "tokenizer", processing_class))
        rows = offline.rows.select_columns(wanted).add_column("_row", list(range(number)))
        rows = self._with_prompt_ids(rows, processing_class, args, "offline")
        lengths = [len(ids) for ids in rows["prompt_ids"]]
        if limit is not None and offline.behavior is not None:
            # One token more tells a response that would be cut from one that just fits.
            args = copy.copy(args)
            args.max_length = limit + 1
        rows = super()._prepare_dataset(rows, processing_class, args, False, None, "offline")
        kept = rows["_row"]
        lost = [lengths[row] for row in set(range(number)) - set(kept)]
        full = sum(limit is not None and length >= limit for length in lost)
        why = [f"prompts alone fill `max_length` ({limit})"] * (full > 0) + ["texts are empty"] * (full < len(lost))
        if not kept:
            raise ConfigurationError(f"{offline.where}: the {' or the '.join(why)}, so that nothing is left to learn.")
        if lost:
            their = " or their ".join(why)
            self._warn(f"{len(lost)} of {number} responses of {offline.where} are left out, because their {their}.")
        if limit is not None and offline.behavior is not None:
            cut = sum(len(ids) > limit for ids in rows["input_ids"])
            if cut:
                raise ConfigurationError(
                    f"{offline.where}: {cut} responses are cut at `max_length` ({limit}), but their log-probabilities "
                    "are those of the whole response: raise `max_length`, or leave them out."
                )
        rows = rows.select_columns(["prompt_ids", "input_ids", "labels"])
        rows = datasets.concatenate_datasets([offline.rows.select(kept), rows], axis=1)
        answers = [[token for token in labels if token != _IGNORED] for labels in rows["labels"]]
        rows = rows.add_column("completion_ids", answers)
        behavior = None if offline.behavior is None else offline.behavior[kept]
        return Responses(rows, offline.rewards[kept], behavior, offline.where)

    def _planned_rows(self, available: int) -> int:
        if self.args.num_generations == 0:
            return available
        samples = min(self.args.prompts_per_round or available, available) * self.args.num_generations
        return rows_of_run(samples, self._ratios())

    def _ratios(self) -> list[float]:
        return [self._ratio(t) for t in range(self.args.num_rounds)]

    def _ratio(self, round_index: int) -> float:
        return 0.0 if self._offline is None else self.args.ratio_of(round_index)

    # ---- The run ----

    def _start_run(self, checkpoint: Any) -> None:
        self._offline_digest = self._digest_of_offline()
        sharding.agree("`offline_dataset`", str(self._offline_digest), "how it is loaded")
        self._told_of_small_samples = False
        super()._start_run(checkpoint)
        manifest = self._checkpoint_manifest(checkpoint) if checkpoint is not None else None
        if manifest is not None and manifest["offline"] != self._offline_digest:
            raise ConfigurationError(
                "The offline responses are not those of the run that is resumed: pass those, or use another "
                "`output_dir`."
            )
        assert self._rows is not None
        if manifest is not None and manifest.get("planned_rows", len(self._rows)) != len(self._rows):
            raise ConfigurationError(
                f"A round has {len(self._rows)} rows now, but had {manifest['planned_rows']} in the run that is "
                "resumed: give later rounds no smaller `offline_ratio` than the smallest so far."
            )
        self._deal_offline()

    def _digest_of_offline(self) -> str | None:
        """A hash of the offline responses with their rewards."""
        if self._offline is None:
            return None
        digest = xxhash.xxh3_128(rows_fingerprint(self._offline.rows).encode())
        for values in (self._offline.rewards, self._offline.behavior):
            digest.update(b"none" if values is None else values.tobytes())
        return digest.hexdigest()

    def _deal_offline(self) -> None:
        """
        Which offline responses belong to which fold: that of their prompt, and those whose prompt is in none are dealt
        out prompt by prompt.
        """
        self._offline_pools = []
        if self._offline is None or self.args.num_generations == 0:
            return
        folds = self._folds or [list(range(len(self._prepared_train_dataset)))]
        prompts = [tuple(ids) for ids in self._prepared_train_dataset["prompt_ids"]]
        fold_of = {prompts[position]: fold for fold, positions in enumerate(folds) for position in positions}
        keys = [tuple(ids) for ids in self._offline.rows["prompt_ids"]]
        others = [key for key in dict.fromkeys(keys) if key not in fold_of]
        draw = np.random.default_rng(batch_seed(self.args.seed, "offline", 0))
        for number, index in enumerate(draw.permutation(len(others))):
            fold_of[others[index]] = number % len(folds)
        self._offline_pools = [[] for _ in folds]
        for index, key in enumerate(keys):
            self._offline_pools[fold_of[key]].append(index)
        for round_index, ratio in enumerate(self._ratios()):
            if ratio > 0 and not self._offline_pools[round_index % len(folds)]:
                raise ConfigurationError(
                    f"`offline_ratio` is {ratio:g} in round {round_index + 1}, but none of the {len(keys)} offline "
                    "responses falls to it: use `round_data='reuse'`, more responses, or a ratio of 0 there."
                )

    def _state_content(self, round_index: int) -> dict[str, Any]:
        content = super()._state_content(round_index)
        if self._rows is not None:
            content |= {"planned_rows": len(self._rows)}
        return content | {"offline": self._offline_digest}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            # A phase that ended by an exception is not looked at any longer.
            self._memory.end()

    def _check_rollouts(self) -> None:
        if self.args.num_generations > 0 and self._ratio(0) < 1:
            super()._check_rollouts()
        self._deal_offline()
        if self._offline is not None:
            _, lacking = self._scored_before(0)
            if lacking:
                self._offline_task(0, lacking).store.check()

    # ---- Phases ----

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._memory(name)

    @contextmanager
    def _policy_away(self, judge: Rewards) -> Iterator[None]:
        """While a reward model is on the accelerator, the policy is not."""
        device = self.accelerator.device
        sharded = self._weights is not None and self._weights.sharded
        if device.type == "cpu" or sharded or not any(reward.has_model for reward in judge.rewards):
            # A shard takes little room, and not every process need be here.
            yield
            return
        model = self.accelerator.unwrap_model(self.model)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            # It is spread over several accelerators, and moving it would put it all on one.
            logger.warning_once("The policy is spread over several devices and stays there while rewards are scored.")
            yield
            return
        model.to("cpu")
        _empty_cache(device)
        try:
            yield
        finally:
            _empty_cache(device)
            model.to(device)

    def _round_task(self, round_index: int, policy: str) -> _Task:
        task = super()._round_task(round_index, policy)
        # Every response counts, so that no prompt stands in for another.
        task.wanted = None
        return task

    def _order_of(self, round_index: int) -> list[int]:
        order = super()._order_of(round_index)
        return order[: self.args.prompts_per_round or len(order)]

    def _read_external(self, task: _Task, rows: list[dict[str, Any]]) -> None:
        super()._read_external(task, rows)
        for number, row in enumerate(rows, start=1):
            if row["reward"] is None:
                raise ConfigurationError(
                    f"{task.where}: the label file's row {number} has no `rewards`, which SPR weights responses by: "
                    f"give {task.num_generations} numbers there."
                )

    def _sampled_rows(self, round_index: int, folder: RoundFolder) -> tuple[Any, dict[str, Any]]:
        """A round's weighted rows, from all its phases but the last; and what the manifest keeps of it."""
        assert self._rows is not None
        ratio, rows = self._ratio(round_index), len(self._rows)
        samples = self.args.num_generations > 0 and ratio < 1
        statistics: dict[str, Any] | None = None
        responses: list[Response] = []
        empty = 0
        if samples:
            task = self._round_task(round_index, str(folder.whole_manifest()["policy"]))
            statistics = self._collect(task)
            sampled, empty = self._online(task)
            responses.extend(sampled)
        counts = self._counts(round_index)
        responses.extend(self._offline_responses(round_index))
        seconds = self._importance(round_index, responses)
        weights, said, equal = weigh(responses, self.args.reward_temperature, self.args.clip)
        built, of_rows = self._rows_of(round_index, responses, weights, equal, counts)
        said |= of_rows | {"importance_seconds": seconds}
        if samples:
            said["empty"] = empty
        self._say(_weights_line(round_index, said, rows))
        self._warn_of_small_samples(round_index, said)
        return built, {"rollouts": statistics, "spr": said}

    def _counts(self, round_index: int) -> Counts:
        assert self._rows is not None
        rows = len(self._rows)
        if self.args.num_generations == 0:
            return Counts(0, rows)
        samples = len(self._order_of(round_index)) * self.args.num_generations
        return counts_of_round(rows, samples, self._ratio(round_index))

    def _online(self, task: _Task) -> tuple[list[Response], int]:
        """The sampled responses; and the number of prompts that got nothing but empty ones, which are left out."""
        columns = ["prompt_ids", "completion_ids", "completions", "logps", "reward"]
        exact, found, empty = self.args.samples_exactly, [], 0
        for row in task.store.table(columns).to_pylist():
            if not any(text.strip() for text in row["completions"]):
                empty += 1
                continue
            prompt = tuple(row["prompt_ids"])
            for ids, logp, reward in zip(row["completion_ids"], row["logps"], row["reward"], strict=True):
                found.append(
                    Response(
                        prompt_ids=prompt,
                        input_ids=[*prompt, *ids],
                        labels=[_IGNORED] * len(prompt) + ids,
                        reward=reward,
                        offline=False,
                        # Sampled from the policy itself: the ratio is 1, to the bit.
                        source_logp=0.0 if exact else logp,
                        policy_logp=0.0 if exact else None,
                    )
                )
        if not found:
            raise ConfigurationError(
                f"{task.where}: all responses of all {empty} prompts are empty, so that there is nothing to train "
                "on: look at the prompts and at `max_completion_length`."
            )
        if empty:
            self._warn(f"{task.where}: {empty} prompts got nothing but empty responses and are left out.")
        return found, empty

    def _offline_of(self, round_index: int) -> list[int]:
        """
        Which offline responses are weighted in a round: all of the prompts that are sampled for, and where these do
        not suffice for its rows, those of other prompts of the fold.
        """
        counts = self._counts(round_index)
        if self._offline is None or counts.offline == 0:
            return []
        if self.args.num_generations == 0:
            fold = self._folds[round_index % len(self._folds)] if self._folds else range(len(self._offline))
            return list(fold)
        pool = self._offline_pools[round_index % len(self._offline_pools)]
        if len(pool) <= counts.offline:
            return pool
        prompts, keys = self._prepared_train_dataset["prompt_ids"], self._offline.rows["prompt_ids"]
        sampled = {tuple(prompts[position]) for position in self._order_of(round_index)}
        # All of a prompt's responses are weighted against each other, also where not all are trained on.
        chosen = [index for index in pool if tuple(keys[index]) in sampled]
        others: dict[tuple[int, ...], list[int]] = {}
        for index in pool:
            if tuple(keys[index]) not in sampled:
                others.setdefault(tuple(keys[index]), []).append(index)
        draw = np.random.default_rng(batch_seed(self.args.seed, f"offline {round_index}", 0))
        members = list(others.values())
        for place in draw.permutation(len(members)):
            if len(chosen) >= counts.offline:
                break
            chosen += members[place]
        return sorted(chosen)

    def _offline_responses(self, round_index: int) -> list[Response]:
        chosen = self._offline_of(round_index)
        if not chosen:
            return []
        assert self._offline is not None
        offline = self._offline.select(chosen)
        rewards = self._offline_rewards(round_index, chosen)
        columns = offline.rows.select_columns(["prompt_ids", "input_ids", "labels"])
        return [
            Response(
                prompt_ids=tuple(row["prompt_ids"]),
                input_ids=row["input_ids"],
                labels=row["labels"],
                reward=float(rewards[index]),
                offline=True,
                source_logp=None if offline.behavior is None else float(offline.behavior[index]),
            )
            for index, row in enumerate(columns)
        ]

    def _offline_rewards(self, round_index: int, chosen: list[int]) -> list[float]:
        """Rewards of offline responses: their own, and those of the reward functions, asked once for each."""
        assert self._offline is not None
        known, lacking = self._scored_before(round_index)
        if lacking:
            task = self._offline_task(round_index, lacking)
            self._collect(task)
            known |= _scores_of(task, lacking)
        return [known.get(index, float(self._offline.rewards[index])) for index in chosen]

    def _scored_before(self, round_index: int) -> tuple[dict[int, float], list[int]]:
        """The scores that earlier rounds have asked for, by response; and which of this round's are still to be."""
        assert self._offline is not None
        known: dict[int, float] = {}
        if not np.isnan(self._offline.rewards).any():
            return known, []
        for earlier in range(round_index + 1):
            lacking = [
                index
                for index in self._offline_of(earlier)
                if np.isnan(self._offline.rewards[index]) and index not in known
            ]
            if earlier == round_index:
                break
            task = self._offline_task(earlier, lacking) if lacking else None
            if task is not None and task.store.finished() is not None:
                # Also where the judge is another one by now, which is refused.
                task.store.check()
                known |= _scores_of(task, lacking)
        return known, lacking

    def _offline_task(self, round_index: int, lacking: list[int]) -> _Task:
        """What there is to score of a round's offline responses; the policy has no part in it."""
        assert self._offline is not None
        rows = without(self._offline.rows.select(lacking), {"input_ids", "labels"})
        digest, where = rows_fingerprint(rows), f"Round {round_index + 1}, offline responses"
        belongs_to = {"policy": "none", "prompts": digest}
        return _Task(
            store=self._store(f"offline-{digest[:16]}", belongs_to, 1, self._judge, where, for_training=True),
            prompts=rows,
            order=range(len(rows)),
            wanted=None,
            num_generations=1,
            judge=self._judge,
            purpose="offline",
            where=where,
            for_training=True,
            given=True,
        )

    def _importance(self, round_index: int, responses: list[Response]) -> float:
        """
        Fill in log pi_k of the responses whose ratio needs it. Returns the seconds that it took.

        All processes share the work, and all know the result.
        """
        wanted = [r for r in responses if r.source_logp is not None and r.policy_logp is None]
        if not wanted:
            return 0.0
        begun = time.monotonic()
        rows = [{"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in wanted]
        batches = batches_of(
            torch.utils.data.DataLoader(
                rows,  # type: ignore[arg-type]
                batch_size=self.args.per_device_train_batch_size,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            ),
            self.accelerator,
        )
        what = f"Round {round_index + 1}: importance"
        found: list[float] = []
        with self._memory("importance"), torch.no_grad(), self.compute_loss_context_manager():
            for batch in tqdm(batches, desc=what, disable=self.args.disable_tqdm or not self.is_world_process_zero()):
                outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
                logps = outputs.log_probs.double().sum(dim=1)
                found.extend(self.accelerator.gather_for_metrics(logps).tolist())
        for response, logp in zip(wanted, found, strict=True):
            if not math.isfinite(logp):
                raise ConfigurationError(
                    f"Round {round_index + 1}: the policy gives a response the log-probability {logp}: its weights or "
                    "the response's tokens are damaged."
                )
            response.policy_logp = logp
        return round(time.monotonic() - begun, 3)

    def _rows_of(
        self, round_index: int, responses: list[Response], weights: np.ndarray, equal: np.ndarray, counts: Counts
    ) -> tuple[datasets.Dataset, dict[str, Any]]:
        """The rows that a round is trained on, and what is said of them."""
        skipped = self.args.skip_equal_groups
        if skipped and equal.all():
            # Also what success looks like, with a reward that all of them earn.
            self._warn(
                f"Round {round_index + 1}: the responses of every prompt have equal rewards, so that "
                "`skip_equal_groups=True` would leave nothing: they are trained on, with weights of 1 but for ratios."
            )
            skipped = False
        kept = [index for index in range(len(responses)) if not (skipped and equal[index])]
        online = [index for index in kept if not responses[index].offline]
        offline = [index for index in kept if responses[index].offline]
        if not online or not offline:
            # One kind has nothing left: the other one makes up for it.
            whole = counts.online + counts.offline
            counts = Counts(whole, 0) if online else Counts(0, whole)
        draw = np.random.default_rng(batch_seed(self.args.seed, f"rows {round_index}", 0))
        rows = taken(online, counts.online, draw) + taken(offline, counts.offline, draw)
        if self.args.num_generations > 0:
            rows = [rows[index] for index in draw.permutation(len(rows))]
        of_rows = weights[rows]
        from_offline = np.array([responses[index].offline for index in rows])
        said = {
            "skipped_groups": len({responses[index].prompt_ids for index in np.flatnonzero(equal)}) if skipped else 0,
            "online_rows": int((~from_offline).sum()),
            "offline_rows": int(from_offline.sum()),
            "offline_responses": len(offline),
            "repeated_rows": len(rows) - len(set(rows)),
            "offline_weight_share": float(of_rows[from_offline].sum() / of_rows.sum()) if of_rows.sum() else 0.0,
            "offline_reward_mean": float(np.mean([responses[i].reward for i in offline])) if offline else None,
        }
        if said["repeated_rows"]:
            self._warn(
                f"Round {round_index + 1}: {said['repeated_rows']} of {len(rows)} rows are repeats: there are "
                f"{len(online)} sampled and {len(offline)} offline responses for {counts.online} and "
                f"{counts.offline} rows."
            )
        built = datasets.Dataset.from_dict(
            {
                "input_ids": [list(responses[index].input_ids) for index in rows],
                "labels": [list(responses[index].labels) for index in rows],
                WEIGHT: of_rows.tolist(),
                "reward": [responses[index].reward for index in rows],
                "offline": from_offline.tolist(),
            }
        )
        return built, said

    def _warn_of_small_samples(self, round_index: int, said: dict[str, Any]) -> None:
        if self._told_of_small_samples:
            return
        advice = f"Raise `reward_temperature`, which is {self.args.reward_temperature:g}, so that more of them count."
        effective, alone = said["effective_where_unequal"], said["singletons"]
        if effective is not None and effective < _SMALL_SAMPLE:
            message = (
                f"the effective sample size is {effective:.2f} where rewards differ, so that a prompt teaches hardly "
                f"more than its best response. Rewards differ by {said['reward_spread']:.3g} there on average. "
                f"{advice}"
            )
        elif alone > 1 and said["singletons_effective"] < max(_SMALL_SAMPLE, _SMALL_SHARE * alone):
            message = (
                f"{alone} prompts with one response each are worth {said['singletons_effective']:.1f} responses, so "
                f"that hardly any but the best is learnt from. {advice}"
            )
        else:
            return
        self._told_of_small_samples = True
        self._warn(f"Round {round_index + 1}: {message}")

    # ---- Measuring ----

    def _heldout(self) -> dict[str, Any]:
        evaluation = self.eval_dataset
        named = evaluation if isinstance(evaluation, dict) else {} if evaluation is None else {"eval": evaluation}
        if self._judge is None:
            return {}
        return {
            name: without(dataset, {"input_ids", "labels"})
            for name, dataset in named.items()
            if "prompt_ids" in (getattr(dataset, "column_names", None) or [])
        }

    def _prepare_round(self, round_index: int, rows: Any, folder: RoundFolder, restored: bool) -> Any:
        rows = super()._prepare_round(round_index, rows, folder, restored)
        self._memory.begin("train")
        return rows

    def _measure_iterate(self, round_index: int, summary: dict[str, Any]) -> None:
        self._memory.end()
        # What this process has seen of the round: nothing of phases that were over when it began.
        for name in _PHASES:
            peak = self._memory.peaks.get(name)
            summary[f"{name}_memory_gb"] = None if peak is None else round(peak / 1e9, 3)
        manifest = RoundFolder(self._output_dir, round_index).manifest() or {}
        said = manifest.get("spr") or {}
        summary |= {name: said[name] for name in _SAID if name in said}
        # Nothing moves the weights between rounds, so that it is the update's.
        summary.pop("momentum_norm", None)
        # The round's steps are over, and the next one's start afresh: room for what measures.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer.state.clear()
        super()._measure_iterate(round_index, summary)
        self._memory.peaks.clear()

    # ---- Loss ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if WEIGHT not in self._signature_columns:
            self._signature_columns.append(WEIGHT)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        The parent's loss with the log-probabilities of each row times its weight: -sum_i w_i log pi(y_i given x_i)
        over the number of tokens. Rows without weights, such as those of evaluation, count 1.
        """
        weights = inputs.get(WEIGHT)
        if weights is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name != WEIGHT}
        return super().compute_loss(_Weighted(self, model, weights), inputs, *args, **kwargs)


class _Weighted:
    """A model whose log-probabilities come out times the weight of their row."""

    def __init__(self, trainer: SPRTrainer, model: Any, weights: torch.Tensor):
        self._trainer = trainer
        self._model = model
        self._weights = weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._model(*args, **kwargs)
        if outputs.get("log_probs") is None:
            raise refuse_override(
                self._trainer, "log-probabilities, by which responses are weighted", "ask for them as SFTTrainer does"
            )
        self._trainer._watch.seen()
        outputs.log_probs = outputs.log_probs * self._weights[:, None].to(outputs.log_probs.dtype)
        return outputs


class WeightedCollator:
    """Another collator's batches, with the rows' weights beside them, (rows,), float32, if they have any."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        plain = [{name: value for name, value in row.items() if name != WEIGHT} for row in examples]
        batch = self.collator(plain)
        if WEIGHT in examples[0]:
            if len(batch["input_ids"]) != len(examples):
                raise ConfigurationError(
                    f"`data_collator` made {len(batch['input_ids'])} rows of {len(examples)}, but each response has a "
                    "weight of its own: pass one that keeps the rows, or leave it out."
                )
            batch[WEIGHT] = torch.tensor([row[WEIGHT] for row in examples], dtype=torch.float32)
        return batch


def _scores_of(task: _Task, lacking: Sequence[int]) -> dict[int, float]:
    """What a finished task's responses were given, by their place among the offline ones."""
    # A row of the table is one of the task's, in its order.
    scores = [values[0] for values in task.store.table(["reward"]).column("reward").to_pylist()]
    return dict(zip(lacking, scores, strict=True))


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _weights_line(round_index: int, said: dict[str, Any], rows: int) -> str:
    """What the weights of a round are like, in a line."""
    parts = [f"{rows} rows"]
    if said["effective_sample_size"] is not None:
        parts.append(f"effective sample size {said['effective_sample_size']:.2f} of {said['group_size']:.3g}")
    if said["singletons"] > 1:
        parts.append(f"{said['singletons']} prompts with one response, worth {said['singletons_effective']:.1f}")
    parts.append(f"largest weight {said['weight_max']:.3g}")
    if said["groups"]:
        parts.append(f"{said['equal_groups']} of {said['groups']} prompts with equal rewards")
    if said["offline_rows"]:
        share = said["offline_rows"] / (said["offline_rows"] + said["online_rows"])
        parts.append(f"offline {share:.0%} of the rows and {said['offline_weight_share']:.0%} of the weight")
    return f"Round {round_index + 1}: {', '.join(parts)}."
