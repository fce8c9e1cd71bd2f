"""
*Accelerated* Preference Optimization (arXiv 2410.06293), as a subclass of TRL's DPOTrainer.

| paper (Algorithm 1) | here |
|---|---|
| t, T | round index, `num_rounds` |
| D_t | the round's rows: sampled from pi_t and ranked, or a fold of given pairs, or what `round_data_builder` makes |
| pi_t, its weights theta_t | policy at the start of round t and the round's reference |
| pihat_{t+1}, thetahat_{t+1} | what round t has trained, the iterate |
| (3.5) | the parent's training, with any of its losses |
| (3.6), on the weights as in section 5.2 | `_transition` |
"""

from __future__ import annotations

import contextlib
import copy
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
import xxhash
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from trl import DPOTrainer

from ..errors import ConfigurationError
from ..reference import copy_into_reference, mover_of_reference, plain_reference, with_reference
from ..rollouts.trainer import RolloutsTrainer
from ..rounds import durable, sharding
from ..rounds.data import batches_of, rows_fingerprint
from ..rounds.saving import asks_for_deepspeed, fsdp_version
from ..rounds.state import ROUNDS_DIR, FullWeights, RoundFolder
from .config import APOConfig


if TYPE_CHECKING:
    from ..rounds.adapters import LoraRounds

_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")


class APOTrainer(RolloutsTrainer, DPOTrainer):
    """
    Trainer for *Accelerated* Preference Optimization: iterative DPO as a proximal-point method, with a Nesterov
    extrapolation of the policy after every round (arXiv 2410.06293, Algorithm 1).

    Each round trains the policy theta_t with [`~trl.DPOTrainer`]'s loss against theta_t itself as reference; the
    resulting iterate thetahat_{t+1} is then extrapolated, theta_{t+1} = thetahat_{t+1} + alpha * (thetahat_{t+1} -
    thetahat_t), and the last iterate is the output. Takes exactly the arguments of [`~trl.DPOTrainer`]; `args` is an
    [`APOConfig`]. With one round it is a DPOTrainer. A `ref_model` is the reference of the first round only.

    A `train_dataset` of prompts alone makes it on-policy, as in the paper: each round samples completions from
    theta_t, has them judged, and trains on the best and the worst of each prompt. That takes one of these keywords
    more: `reward_funcs` (with `reward_processing_classes`), as for [`~trl.GRPOTrainer`], or `ranker`.

    Overrides what belongs to a round's boundary; loss, data preparation and training are the parent's.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_extras import APOConfig, APOTrainer

    >>> trainer = APOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=APOConfig("out", num_rounds=3, extrapolation_alpha=[0.3]),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = APOConfig
    _trains_adapters = True
    _fresh_adapters = True
    _tag_names = ["trl", "dpo", "accelerated-preference-optimization"]  # noqa: RUF012
    _name = "APO"
    _paper = {  # noqa: RUF012
        "title": "Accelerated Preference Optimization for Large Language Model Alignment",
        "id": "2410.06293",
        "citation": textwrap.dedent("""\
            @article{he2024accelerated,
                title  = {{Accelerated Preference Optimization for Large Language Model Alignment}},
                author = {Jiafan He and Huizhuo Yuan and Quanquan Gu},
                year   = 2024,
                eprint = {arXiv:2410.06293},
            }"""),
    }

    def __init__(self, *args: Any, **kwargs: Any):
        self._eval_without_logps: Any = None
        self._user_reference = False
        self._reference_spent = self._reference_follows = False
        self._dtypes_settled = False
        super().__init__(*args, **kwargs)
        if self._reference_follows:
            copy_into_reference(self)
        self.beta = self.args.beta_of(0)
        if self._multi_round and self.precompute_ref_logps and not self._user_reference:
            # With FSDP the parent has one, for values that are computed later here, with the policy.
            self.ref_model = None
        if self._user_reference and self._writes_reference and not self.precompute_ref_logps:
            self._check_user_reference()
        if config_rank := self.args.adapter_rank:
            self._adapters.check_rank(config_rank)
        if self.args.adapter_output == "merged":
            self._adapters.check_merge()

    @property
    def _adapters(self) -> LoraRounds:
        assert self._weights is not None
        assert self._weights.has_reference
        return cast("LoraRounds", self._weights)

    def _check_arguments(self, given: dict[str, Any], config: Any) -> None:
        judged = [*self._given_judges, config.reward_funcs, config.ranker]
        if isinstance(given["train_dataset"], datasets.IterableDataset) and any(judge is not None for judge in judged):
            raise ConfigurationError(
                "A streaming `train_dataset` does not work with `reward_funcs` or a `ranker`: prompts to sample for "
                "are looked up by number. Load the dataset without streaming."
            )
        super()._check_arguments(given, config)
        model, outputs = given.get("model"), self._adapter_outputs(config)
        if outputs and given.get("peft_config") is None and not hasattr(model, "peft_config"):
            raise ConfigurationError(
                f"{outputs[0]} is about a LoRA adapter, but none is trained: pass `peft_config` (`use_peft` in TRL's "
                "scripts), or leave it out."
            )
        if config.adapter_output == "merged" and (fsdp_version(config) or asks_for_deepspeed(config)):
            raise ConfigurationError(
                "`adapter_output` is 'merged', which takes the whole base on one process, but processes hold parts of "
                "it: save the adapter, and merge it with peft."
            )
        quantized = given.get("quantization_config") is not None or getattr(model, "is_quantized", False)
        if quantized and config.adapter_output == "merged":
            raise ConfigurationError(
                "`adapter_output` is 'merged', but the base is quantized, and merging into it would round the "
                "change away: save the adapter, and merge it into the original weights with peft."
            )

    def _unsupported_adapters(self, given: dict[str, Any], config: Any) -> Iterator[tuple[str, str]]:
        yield from super()._unsupported_adapters(given, config)
        model = given.get("model")
        if given.get("peft_config") is None and hasattr(model, "peft_config") and is_peft_model(model):
            from ..rounds.adapters import why_not_model

            # Before the parent adds its copy of the adapter, at which peft takes a merged one out of the base again.
            if reason := why_not_model(model):
                yield reason

    @staticmethod
    def _unsupported_callbacks(callbacks: list[Any]) -> Iterator[tuple[str, str]]:
        yield from RolloutsTrainer._unsupported_callbacks(callbacks)
        if mover := mover_of_reference(callbacks):
            yield mover, "the reference belongs to the rounds. Leave it out."

    @staticmethod
    def _adapter_outputs(config: Any) -> list[str]:
        """The settings in force of what a LoRA run leaves."""
        merged = ["`adapter_output='merged'`"] if config.adapter_output == "merged" else []
        return merged + ([] if config.adapter_rank is None else [f"`adapter_rank={config.adapter_rank}`"])

    def _complete_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        given = super()._complete_arguments(given)
        config = given["args"]
        self._user_reference = given.get("ref_model") is not None
        if self._user_reference and config.num_rounds > 1 and not config.precompute_ref_log_probs:
            # Later rounds' references are written into it; the user's own object stays as it is.
            return {**given, "ref_model": copy.deepcopy(given["ref_model"])}
        given, self._reference_follows = with_reference(given)
        return given

    @property
    def _writes_reference(self) -> bool:
        """Whether later rounds' references are written into the reference model."""
        return self.args.num_rounds > 1 and self._weights is not None and not self._weights.has_reference

    def _check_user_reference(self) -> None:
        """
        The later rounds' references are written into the model that the user passed: it has to be able to hold them.
        """
        assert self.ref_model is not None
        # DeepSpeed gives both the dtype that it trains with.
        wanted, given = (
            {
                name: (tuple(sharding.shape_of(p)), None if self.is_deepspeed_enabled else p.dtype)
                for name, p in model.named_parameters()
            }
            for model in (self.model, plain_reference(self))
        )
        for name in sorted(wanted.keys() | given.keys()):
            if wanted.get(name) != given.get(name):
                raise ConfigurationError(
                    f"`ref_model` differs from the policy in {name!r} ({given.get(name)} against "
                    f"{wanted.get(name)}), but "
                    "from the second round on the reference is a copy of the policy: pass a `ref_model` of the same "
                    "architecture and dtype, or set `precompute_ref_log_probs=True`."
                )

    # ---- A round ----

    def _settle_arguments(self) -> None:
        self.args.validate_apo()
        super()._settle_arguments()
        self.beta = self.args.beta_of(0)

    def _needs_rounds(self, config: Any) -> list[str]:
        extrapolated = ["`output_policy='extrapolated'`"] if config.output_policy == "extrapolated" else []
        return super()._needs_rounds(config) + extrapolated + self._adapter_outputs(config)

    def _per_round_fields(self) -> set[str]:
        return {
            "extrapolation_alpha", "round_beta", "beta", "output_policy", "adapter_output", "adapter_rank",
            "adapter_rank_tolerance",
        }  # fmt: skip

    def round_settings(self, round_index: int) -> dict[str, Any]:
        return {**super().round_settings(round_index), "beta": self.args.beta_of(round_index)}

    def _summary_settings(self, round_index: int) -> dict[str, Any]:
        return {"alpha": self.args.alpha_of(round_index), **self.round_settings(round_index)}

    def _transition_settings(self, round_index: int) -> dict[str, Any]:
        return {"alpha_before": self.args.alpha_of(round_index - 1)}

    def _transition(self, round_index: int, previous: RoundFolder) -> bool:
        """The extrapolation (3.6) on the weights; it changes nothing, to the bit, for alpha = 0."""
        return self._extrapolate(self.args.alpha_of(round_index - 1), previous)

    def _extrapolate(self, alpha: float, previous: RoundFolder) -> bool:
        assert self._weights is not None
        if alpha == 0:
            return False
        origin = previous.iterate if self.args.momentum_from == "previous_iterate" else previous.policy
        self._weights.extrapolate(origin, alpha)
        return True

    def _finish_policy(self) -> None:
        self._extrapolate_last()
        if not self._adapter_outputs(self.args):
            return
        rank = self.args.adapter_rank
        if rank is not None and rank >= self._adapters.largest_rank:
            self._say(f"The output has rank {self._adapters.largest_rank}: nothing is truncated.")
            rank = None
        if rank is not None:
            *_, error = self._adapters.truncated(rank)
            self.round_summaries[-1]["adapter_rank_error"] = error
            with self._state_errors(self.args.num_rounds - 1):
                self._write_summaries()
            if error > self.args.adapter_rank_tolerance:
                self.save_model()
                raise ConfigurationError(
                    f"`adapter_rank` is {rank}, to which the change of rank {self._adapters.rank} is truncated with a "
                    f"relative error of {error:.3g}, but `adapter_rank_tolerance` is "
                    f"{self.args.adapter_rank_tolerance:g}: the adapter of rank {self._adapters.rank} has been saved "
                    "in `output_dir` instead. Use a larger rank or tolerance; a run with checkpoints can be resumed."
                )
            self._say(f"The output is truncated to rank {rank}, with a relative error of {error:.3g}.")
        self._adapters.set_output(rank, self.args.adapter_output == "merged")

    def _extrapolate_last(self) -> None:
        last = self.args.num_rounds - 1
        alpha, extrapolates = self.args.alpha_of(last), self.args.output_policy == "extrapolated"
        if not extrapolates and not self._heldout():
            return
        assert self._weights is not None
        folder = RoundFolder(self._output_dir, last)
        kept = self._output_dir / ROUNDS_DIR / f"{durable.PARTIAL_PREFIX}iterate"
        iterate = self._weights.fingerprint() if not extrapolates and alpha > 0 else ""
        if not extrapolates and alpha > 0:
            # On disk, like every round's iterate: a copy in memory would be the run's peak.
            with self._state_errors(last):
                self._weights.save(kept, self.args.should_save)
            self.accelerator.wait_for_everyone()
        if alpha > 0:
            # What is evaluated afterwards is measured against the last round's reference.
            self._weights.rebase(hold_reference=True)
        changed = self._extrapolate(alpha, folder)
        try:
            if self._heldout():
                with self._own_random_numbers(last), self._evaluating():
                    row = self.round_summaries[-1]
                    self._note_extrapolated(
                        last, self._measure("extrapolated", last) if changed else dict(row["heldout_iterate"])
                    )
        finally:
            # Also where a reward has raised: whoever catches that and saves shall save the iterate.
            if changed and not extrapolates:
                self._load_weights(kept, iterate)
        if extrapolates:
            self._say(f"The output is the last iterate extrapolated with alpha {alpha:g}.")
        elif changed:
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                durable.remove(kept)

    # ---- On-policy pairs ----

    def _rows_of_rollouts(self, rollouts: list[dict[str, Any]], planned: int) -> datasets.Dataset:
        """The best completion of a prompt as chosen, the worst as rejected, as the tokens that were sampled."""
        pairs = [row for row in rollouts if row["chosen"] is not None][:planned]
        columns = {
            "prompt_ids": [row["prompt_ids"] for row in pairs],
            "chosen_ids": [row["completion_ids"][row["chosen"]] for row in pairs],
            "rejected_ids": [row["completion_ids"][row["rejected"]] for row in pairs],
        }
        return datasets.Dataset.from_dict(columns)

    def _prepare_round(self, round_index: int, rows: Any, folder: RoundFolder, restored: bool) -> Any:
        rows = super()._prepare_round(round_index, rows, folder, restored)
        self.beta = self.args.beta_of(round_index)
        if not self._multi_round:
            return rows
        given = self._user_reference and round_index == 0
        if given and self._reference_spent:
            raise ConfigurationError(
                "`ref_model` has served its round and is gone, so that `train()` cannot begin anew: make a new "
                "trainer."
            )
        if not given:
            self._reference_spent = True
        if self.precompute_ref_logps:
            if not given:
                # The reference is theta_t, the live policy; a model passed by the user has served its round.
                self.ref_model = None
            reference = (
                self._check_given_reference(folder, restored) if given else str(folder.whole_manifest()["policy"])
            )
            return self._with_reference_logps(reference, rows, folder, restored)
        assert self._weights is not None
        if given:
            self._check_given_reference(folder, restored)
        elif self._weights.has_reference:
            self.ref_model = None
        else:
            model = plain_reference(self)
            if restored:
                self._weights.load_into(model, folder.policy)
                self._check_reference(model, folder)
            else:
                self._weights.copy_to(model)
        return rows

    def _check_reference(self, model: torch.nn.Module, folder: RoundFolder) -> None:
        """The reference that has been read from disk is theta_t, unless processes divide the two differently."""
        assert self._weights is not None
        divided = self._weights.sharded or sharding.is_sharded(model)
        if not divided and FullWeights(model).fingerprint() != folder.whole_manifest()["policy"]:
            raise durable.DamagedStateError(f"The reference in {folder.policy.name} is not what was saved there.")

    def _check_given_reference(self, folder: RoundFolder, restored: bool) -> str:
        """Record which `ref_model` the first round has; refuse to go on with another. Returns its hash."""
        assert self.ref_model is not None
        reference = FullWeights(plain_reference(self)).fingerprint()
        recorded = folder.whole_manifest().get("reference")
        if restored and recorded != reference:
            raise ConfigurationError(
                "`ref_model` is not the one that this round began with: pass that one again to resume."
            )
        if recorded != reference:
            self._add_to_manifest(folder, reference=reference)
        return reference

    # ---- Reference log-probabilities computed ahead ----

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        if self._is_prompts(dataset) and dataset is not self.train_dataset:
            return dataset
        # The parent does this for the whole training set while it is made; a round needs its own rows, later.
        if self._multi_round and self._round < 0 and dataset is self.train_dataset:
            self._eval_without_logps = copy.copy(self.eval_dataset)
            return dataset
        if self._multi_round and self._round >= 0:
            # Of a set that `evaluate` is given. The parent keeps values for good, by the model that it began with, but
            # the reference is another one in every round.
            with self._evaluating():
                return _with_columns(dataset, self._reference_logps(dataset, name))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _with_reference_logps(self, reference: str, rows: Any, folder: RoundFolder, restored: bool) -> Any:
        """
        The round's rows, and the evaluation sets, with the reference's log-probabilities: from disk, or computed.

        Args:
            reference: hash of the reference's weights.
        """
        evaluation = self._eval_without_logps
        if not isinstance(evaluation, dict) and self._is_prompts(evaluation):
            evaluation = None
        named = evaluation if isinstance(evaluation, dict) else ({} if evaluation is None else {"eval": evaluation})
        named = {name: dataset for name, dataset in named.items() if not self._is_prompts(dataset)}
        complete = {}
        for name, dataset in {"train": rows, **{f"eval {name}": dataset for name, dataset in named.items()}}.items():
            # The name says whose numbers for which rows: a file of other rows or another reference is never taken.
            key = xxhash.xxh3_128_hexdigest(f"{reference} {rows_fingerprint(dataset)}".encode())
            path = folder.path / f"reference_logps-{key}.safetensors"
            if path.name in folder.whole_manifest()["files"]:
                with safe_open(path, framework="pt") as file:
                    logps = {column: file.get_tensor(column) for column in _LOGPS}
            else:
                with self._policy_of(folder) if restored and self.ref_model is None else contextlib.nullcontext():
                    logps = self._reference_logps(dataset, name)
                with self._state_errors(folder.round_index):
                    if self.args.should_save:
                        partial = path.with_name(f"{durable.PARTIAL_PREFIX}{path.name}")
                        save_file(logps, partial)
                        durable.sync(partial)
                        partial.replace(path)
                    self._add_to_manifest(folder, changed=[path.name])
            complete[name] = _with_columns(dataset, logps)
        if isinstance(evaluation, dict):
            self.eval_dataset = {name: complete.get(f"eval {name}", dataset) for name, dataset in evaluation.items()}
        elif evaluation is not None:
            self.eval_dataset = complete["eval eval"]
        return complete["train"]

    def _reference_logps(self, dataset: Any, name: str) -> dict[str, torch.Tensor]:
        """
        Log-probabilities of chosen and rejected under the reference, (rows,) each, on every process.

        Not the parent's method: its cache lies in a folder that processes do not share where rows are in memory, and
        would keep every round's numbers for good.
        """
        batch_size = self.args.precompute_ref_batch_size or (
            self.args.per_device_train_batch_size if name == "train" else self.args.per_device_eval_batch_size
        )
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        batches = batches_of(loader, self.accelerator)
        what = f"Reference log-probabilities, round {self._round + 1}, {name}"
        gathered: dict[str, list[torch.Tensor]] = {column: [] for column in _LOGPS}
        for batch in tqdm(batches, desc=what, disable=self.args.disable_tqdm or not self.is_world_process_zero()):
            self._settle_dtypes(batch)
            logps = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, batch)
            for column, values in zip(_LOGPS, self.accelerator.gather_for_metrics(logps), strict=True):
                gathered[column].append(values.float().cpu())
        return {column: torch.cat(values) for column, values in gathered.items()}

    def _settle_dtypes(self, batch: dict[str, Any]) -> None:
        """
        FSDP2 settles the dtype of gradients in its first forward, by what is trained then: with the adapter disabled,
        as for the reference, that is nothing, and with a bfloat16 base training would fail at its first gradient.
        """
        if (
            self._dtypes_settled
            or self._weights is None
            or not (self._weights.has_reference and self._weights.sharded)
        ):
            return
        self._dtypes_settled = True
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.accelerator.autocast():
            self.model(**inputs, labels=inputs["input_ids"], use_cache=False, fused_lm_head=True)

    @contextlib.contextmanager
    def _policy_of(self, folder: RoundFolder) -> Iterator[None]:
        """
        theta_t as live weights; a run that resumed inside round t needs it for a set that it did not have before.
        """
        assert self._weights is not None
        if self._weights.has_reference:
            yield
            return
        # A copy in memory: this happens only where someone resumes with another evaluation set.
        sharding.settle(self.model)
        live = {name: sharding.part_of(weight).flat.clone() for name, weight in self.model.named_parameters()}
        self._weights.load(folder.policy)
        try:
            yield
        finally:
            sharding.settle(self.model)
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    sharding.part_of(weight).flat.copy_(live[name])
            sharding.publish(self.model)


def _with_columns(dataset: Any, columns: dict[str, torch.Tensor]) -> Any:
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values.numpy())
    return dataset
