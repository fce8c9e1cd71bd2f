"""
*Accelerated* Preference Optimization (arXiv 2410.06293), as a subclass of TRL's DPOTrainer.

| paper (Algorithm 1) | here |
|---|---|
| t, T | round index, `num_rounds` |
| D_t | the round's rows: a fold of `train_dataset`, all of it, or what `round_data_builder` makes |
| pi_t, its weights theta_t | policy at the start of round t and the round's reference |
| pihat_{t+1}, thetahat_{t+1} | what round t has trained, the iterate |
| (3.5) | the parent's training, with any of its losses |
| (3.6), on the weights as in section 5.2 | `_transition` |
"""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from trl import DPOTrainer

from ..cards import build_card
from ..errors import ConfigurationError
from ..rounds import RoundsTrainer, durable
from ..rounds.state import FullWeights, RoundFolder
from .config import APOConfig


_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_LOGPS_FILE = "reference_logps.safetensors"


class APOTrainer(RoundsTrainer, DPOTrainer):
    """
    Trainer for *Accelerated* Preference Optimization: iterative DPO as a proximal-point method, with a Nesterov
    extrapolation of the policy after every round (arXiv 2410.06293, Algorithm 1).

    Each round trains the policy theta_t with [`~trl.DPOTrainer`]'s loss against theta_t itself as reference; the
    resulting iterate thetahat_{t+1} is then extrapolated, theta_{t+1} = thetahat_{t+1} + alpha * (thetahat_{t+1} -
    thetahat_t), and the last iterate is the output. Takes exactly the arguments of [`~trl.DPOTrainer`]; `args` is an
    [`APOConfig`]. With one round it is a DPOTrainer. A `ref_model` is the reference of the first round only.

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
        super().__init__(*args, **kwargs)
        if self._user_reference and self._multi_round and not self.precompute_ref_logps:
            self._check_user_reference()

    def _complete_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        given = super()._complete_arguments(given)
        model, config = given.get("model"), given["args"]
        self._user_reference = given.get("ref_model") is not None
        if not self._keeps_rounds or self._user_reference or config.precompute_ref_log_probs:
            return given
        if isinstance(model, PreTrainedModel):
            # Upstream reloads the reference from the model's path: another model if this one was changed in memory.
            given["ref_model"] = copy.deepcopy(model)
        return given

    def _check_user_reference(self) -> None:
        """
        The later rounds' references are written into the model that the user passed: it has to be able to hold them.
        """
        assert self.ref_model is not None
        wanted = {name: (tuple(p.shape), p.dtype) for name, p in self.model.named_parameters()}
        given = {
            name: (tuple(p.shape), p.dtype)
            for name, p in self.accelerator.unwrap_model(self.ref_model).named_parameters()
        }
        for name in sorted(wanted.keys() | given.keys()):
            if wanted.get(name) != given.get(name):
                raise ConfigurationError(
                    f"`ref_model` differs from the policy in {name!r} ({given.get(name)} against "
                    f"{wanted.get(name)}), but "
                    "from the second round on the reference is a copy of the policy: pass a `ref_model` of the same "
                    "architecture and dtype, or set `precompute_ref_log_probs=True`."
                )

    # ---- A round ----

    def _needs_rounds(self, config: Any) -> list[str]:
        extrapolated = ["`output_policy='extrapolated'`"] if config.output_policy == "extrapolated" else []
        return super()._needs_rounds(config) + extrapolated

    def _per_round_fields(self) -> set[str]:
        return {"extrapolation_alpha", "round_beta", "beta", "output_policy"}

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
        last = self.args.num_rounds - 1
        if self.args.output_policy == "extrapolated":
            self._extrapolate(self.args.alpha_of(last), RoundFolder(self._output_dir, last))
            self._say(f"The output is the last iterate extrapolated with alpha {self.args.alpha_of(last):g}.")

    def _prepare_round(self, round_index: int, rows: Any, folder: RoundFolder, restored: bool) -> Any:
        rows = super()._prepare_round(round_index, rows, folder, restored)
        self.beta = self.args.beta_of(round_index)
        if not self._multi_round:
            return rows
        given = self._user_reference and round_index == 0
        self._check_same_reference(given, folder, restored)
        if self.precompute_ref_logps:
            return self._with_reference_logps(given, rows, folder)
        if not given:
            assert self._weights is not None
            reference = self.accelerator.unwrap_model(self.ref_model)
            if restored:
                self._weights.load_into(reference, folder.policy)
            else:
                self._weights.copy_to(reference)
        return rows

    def _check_same_reference(self, given: bool, folder: RoundFolder, restored: bool) -> None:
        """Record which reference the round has; refuse to go on with another `ref_model` than the run began with."""
        manifest = folder.manifest() or {}
        reference = manifest["policy"]
        if given and self.ref_model is not None:
            reference = FullWeights(self.accelerator.unwrap_model(self.ref_model)).fingerprint()
        recorded = manifest.get("reference")
        if recorded == reference:
            return
        if restored and recorded is not None:
            raise ConfigurationError(
                "`ref_model` is not the one that this round began with: pass that one again to resume."
            )
        if self.args.should_save:
            # Numbers of another reference.
            (folder.path / _LOGPS_FILE).unlink(missing_ok=True)
        self._add_to_manifest(folder, reference=reference)

    # ---- Reference log-probabilities computed ahead ----

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        # The parent does this for the whole training set while it is made; a round needs its own rows, later.
        if self._multi_round and self._round < 0 and dataset is self.train_dataset:
            self._eval_without_logps = copy.copy(self.eval_dataset)
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _with_reference_logps(self, given: bool, rows: Any, folder: RoundFolder) -> Any:
        """
        The round's rows, and the evaluation sets, with the reference's log-probabilities: from disk, or computed.
        """
        if not given:
            # The reference is theta_t, the live policy; a model passed by the user has served its round.
            self.ref_model = None
        evaluation = self._eval_without_logps
        named = evaluation if isinstance(evaluation, dict) else ({} if evaluation is None else {"eval": evaluation})
        sets = {"train": rows, **{f"eval/{name}": dataset for name, dataset in named.items()}}
        sizes = {name: len(dataset) for name, dataset in sets.items()}
        path = folder.path / _LOGPS_FILE
        logps = _read_logps(path, sizes)
        if logps is None:
            # Upstream's cache is keyed by this value; a stale one would silently return another round's numbers.
            self._precompute_model_hash = (folder.manifest() or {})["reference"]
            logps = {}
            # Upstream's own bar shows the forward passes; those of `datasets` around it would bury it.
            quiet = not datasets.are_progress_bars_disabled()
            if quiet:
                datasets.disable_progress_bars()
            for name, dataset in sets.items():
                batch_size = self.args.precompute_ref_batch_size or (
                    self.args.per_device_train_batch_size if name == "train" else self.args.per_device_eval_batch_size
                )
                computed = (
                    super()._precompute_ref_logps(dataset, name.rpartition("/")[2], batch_size).with_format("torch")
                )
                for column in _LOGPS:
                    logps[f"{name}/{column}"] = torch.as_tensor(computed[column][:], dtype=torch.float32)
            if quiet:
                datasets.enable_progress_bars()
            if self.args.should_save:
                _write_logps(path, logps)
            self._add_to_manifest(folder)
        complete = {
            name: _with_columns(dataset, {column: logps[f"{name}/{column}"] for column in _LOGPS})
            for name, dataset in sets.items()
        }
        if isinstance(evaluation, dict):
            self.eval_dataset = {name: complete[f"eval/{name}"] for name in evaluation}
        elif evaluation is not None:
            self.eval_dataset = complete["eval/eval"]
        return complete["train"]

    # ---- Model card ----

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card to `output_dir`: what was trained, how, and the table of rounds; no local paths."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            build_card(self, model_name, dataset_name, tags).save(folder / "README.md")

    def _write_card(self, folder: Path) -> None:
        if self.is_world_process_zero():
            build_card(self).save(folder / "README.md")


def _with_columns(dataset: Any, columns: dict[str, torch.Tensor]) -> Any:
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values.numpy())
    return dataset


def _read_logps(path: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor] | None:
    """Log-probabilities written before, or None if there are none for sets of these sizes."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        logps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = {f"{name}/{column}": size for name, size in sizes.items() for column in _LOGPS}
    return logps if {name: len(values) for name, values in logps.items()} == wanted else None


def _write_logps(path: Path, logps: dict[str, torch.Tensor]) -> None:
    partial = path.with_name(f"{durable.PARTIAL_PREFIX}{path.name}")
    save_file(logps, partial)
    durable.sync(partial)
    partial.replace(path)
