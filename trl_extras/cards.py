"""
Model cards: what was trained and how exactly, with no local path and no secret.

Imported when a card is written, which may be in a script whose TRL classes have been swapped for ours: nothing that
derives from a class of TRL's may be imported here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import trl
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from . import __version__
from .rollouts.judges import public_name
from .rounds.config import RoundsConfig


# Shown although they have their defaults, because they decide what a run does.
_ALWAYS = ("learning_rate", "lr_scheduler_type", "optim", "num_train_epochs", "seed", "per_device_train_batch_size")
# Paths, names and secrets of the machine or account, and what does not change the model.
_NEVER_PREFIXES = (
    "hub_", "push_", "logging_", "log_", "report_", "run_", "disable_", "do_", "save_", "eval_", "dataloader_",
    "local_",
    "trackio_", "_", "ddp_", "resume_", "output_dir", "deepspeed", "fsdp", "accelerator_", "project", "include_",
    "parallelism", "restore_", "skip_memory", "metric_for", "greater_is", "load_best", "per_device_eval",
)  # fmt: skip
_COLUMNS = (
    ("round", "round"), ("alpha", "alpha"), ("beta", "beta"), ("epochs", "epochs"), ("last_step", "steps so far"),
    ("update_norm", "update norm"), ("momentum_norm", "momentum norm"), ("update_cosine", "cosine"),
    ("loss", "last loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin"),
    ("eval_loss", "eval loss"), ("eval_rewards/accuracies",
    "eval accuracy"), ("eval_rewards/margins", "eval margin"),
)  # fmt: skip

# Of completions, where there are any.
_SAMPLE_COLUMNS = (
    ("round", "round"), ("pairs", "pairs"), ("ties", "ties"), ("repeated", "repeated"),
    ("reward_mean", "reward of samples"), ("reward_best", "best"), ("reward_worst", "worst"),
    ("share_cut", "share cut"), ("distinct_bigrams", "distinct bigrams"), ("mean_length", "mean length"),
    ("tokens_per_second", "tokens a second"), ("sample_seconds", "sampling, s"), ("score_seconds", "scoring, s"),
    ("boundary_reference_seconds", "reference, s"), ("importance_seconds", "importance, s"),
    ("train_seconds", "training, s"),
)  # fmt: skip
# Of weights, where there are any.
_WEIGHT_COLUMNS = (
    ("round", "round"), ("groups", "prompts with several responses"), ("equal_groups", "of equal reward"),
    ("singletons", "prompts with one"), ("effective_sample_size", "effective sample size"),
    ("singletons_effective", "effective sample size of those with one"),
    ("weight_max", "largest weight"), ("online_rows", "sampled rows"),
    ("offline_rows", "offline rows"), ("offline_weight_share", "offline share of the weight"),
    ("offline_reward_mean", "reward of offline responses"), ("repeated_rows", "repeated rows"),
    ("sample_memory_gb", "memory of sampling, GB"), ("score_memory_gb", "memory of scoring, GB"),
    ("importance_memory_gb", "memory of importance, GB"), ("train_memory_gb", "memory of training, GB"),
)  # fmt: skip
_HELDOUT_COLUMNS = (
    ("round", "after round"), ("reward", "held-out reward"), ("distinct_bigrams", "distinct bigrams"),
    ("share_cut", "share cut"), ("mean_length", "mean length"), ("reward_next", "held-out reward, extrapolated"),
    ("distinct_bigrams_next", "distinct bigrams, extrapolated"), ("share_cut_next", "share cut, extrapolated"),
)  # fmt: skip

_SPO = "Stable Preference Optimization"
# Of a floor, where there is one.
_FLOOR_METRICS = (
    ("loss", "loss, the gap included"),
    ("rewards/accuracies", "accuracy"),
    ("spo/chosen_change", "`spo/chosen_change`: log-probability of the chosen response less the reference's, nats"),
    ("spo/rejected_change", "`spo/rejected_change`: the same of the rejected response, nats"),
    ("spo/displaced", "`spo/displaced`: share of pairs whose chosen response is less likely than under the reference"),
    ("spo/gap_chosen", "`spo/gap_chosen`: how far chosen responses are below their floor, nats per token"),
    ("spo/gap_sft", "`spo/gap_sft`: the same of the SFT rows, nats per token"),
    ("spo/penalty_share", "`spo/penalty_share`: the weighted gaps' share of the objective"),
)

_TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

This model was trained by {{ method }},
with trl-extras {{ version }} on [TRL](https://github.com/huggingface/trl) {{ trl_version }}.
{{ origin }} {{ data }}

{{ how }}

## Use

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{{ repo_id }}")
messages = [{"role": "user", "content": "What is a good film for a rainy day?"}]
print(generator(messages, max_new_tokens=64)[0]["generated_text"])
```

{{ results }}

## Configuration

```yaml
{{ configuration }}```

transformers {{ transformers_version }}, torch {{ torch_version }}.

## Citation

```bibtex
{{ citation }}
```
"""

_ROUNDS_RESULTS = """\
## Rounds

{table}
{samples}
Norms are Euclidean, over all trained weights: the update is the round's result minus the policy that it started from,
the momentum is its result minus the result before, the cosine is that between this update and the one before. Accuracy
and margin are DPO's implicit rewards against the round's own reference."""

_WEIGHTED_RESULTS = """\
## Rounds

{table}
{weights}
{samples}
Norms are Euclidean, over all trained weights: the update is the round's result minus the policy that it started from,
the cosine is that between this update and the one before. The effective sample size is how many equally weighted
responses of a prompt the weights amount to. Memory is the highest of one process in each phase."""

_FLOOR_RESULTS = """\
## What was kept

{table}

The last values logged: in training, means over the last logging window; in evaluation, over the whole set. Accuracy is
that of DPO's implicit rewards.{reference}"""


def build_card(
    trainer: Any, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> ModelCard:
    """
    The card of a trained model.

    Args:
        trainer: its trainer, which works in rounds, above a floor, or both.
        model_name, dataset_name, tags: as for [`~trl.DPOTrainer.create_model_card`].
    """
    import torch

    args = trainer.args
    base_id = _hub_id(getattr(trainer.model.config, "_name_or_path", None))
    dataset_name = _hub_id(dataset_name)
    names = {tags} if isinstance(tags, str) else set(tags or ())
    names.update(trainer._tag_names, ["trl-extras", "generated_from_trainer"])
    repo_id = trainer.hub_model_id or model_name or Path(args.output_dir).name
    data = ModelCardData(
        base_model=base_id,
        datasets=dataset_name,
        library_name="peft" if _is_adapter(trainer) else "transformers",
        model_name=model_name or repo_id.split("/")[-1],
        tags=sorted(names),
        license=None,
    )
    what = "prompts" if isinstance(args, RoundsConfig) and trainer._makes_rows else "preferences"
    if getattr(trainer, "_offline", None) is not None:
        what = "prompts and responses"
    method, how, results = _about(trainer)
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        version=__version__,
        trl_version=trl.__version__,
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
        repo_id=repo_id,
        model_name=data.model_name,
        method=method,
        citation=trainer._paper["citation"],
        origin=(
            f"It started from [{base_id}](https://huggingface.co/{base_id})."
            if base_id
            else "It started from a model that is not on the Hub."
        )
        + _adapter(trainer),
        data=f"The {what} are [{dataset_name}](https://huggingface.co/datasets/{dataset_name})."
        if dataset_name
        else "",
        how=how,
        results=results,
        configuration=yaml.safe_dump(
            _configuration(args, _hub_id(getattr(trainer, "sft_dataset_name", None))),
            sort_keys=True,
            allow_unicode=True,
        ),
    )


def _hub_id(name: str | None) -> str | None:
    """A name that leads to a page of the Hub; a folder of this machine has none, and its path is nobody's business."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _about(trainer: Any) -> tuple[str, str, str]:
    """The method with its paper, how it went about the training, and what came of it."""
    in_rounds, above_floor = isinstance(trainer.args, RoundsConfig), hasattr(trainer, "_spo_paper")
    name = trainer._paper["title"]
    how, results = [], []
    weighted = hasattr(trainer.args, "reward_temperature")
    if weighted:
        name = "successive policy re-weighting"
        how.append(_weighted(trainer))
        rows = [{**row, "round": row["round"] + 1} for row in trainer.round_summaries]
        weights = f"\n{_markdown(_WEIGHT_COLUMNS, rows)}\n" if rows else ""
        table = round_table(trainer.round_summaries)
        samples = sample_tables([{**row, "boundary_reference_seconds": None} for row in trainer.round_summaries])
        results.append(_WEIGHTED_RESULTS.format(table=table, weights=weights, samples=samples))
    elif in_rounds:
        # What tells this method from the others with the same three letters.
        name = "*accelerated* preference optimization"
        how.append(_sampled(trainer) + _rounds(trainer.args))
        tables = {"table": round_table(trainer.round_summaries), "samples": sample_tables(trainer.round_summaries)}
        results.append(_ROUNDS_RESULTS.format(**tables))
    if above_floor:
        name = name if in_rounds else _SPO
        how.append(_floor(trainer))
        results.append(_kept(trainer))
    method = f"{name}\n({_link(trainer._paper)})"
    if in_rounds and above_floor:
        method += f" over\nthe objective of {_SPO}\n({_link(trainer._spo_paper)})"
    return method, "\n\n".join(how), "\n\n".join(results)


def _link(paper: dict[str, str]) -> str:
    return f"[{paper['title']}]({paper.get('url') or 'https://arxiv.org/abs/' + paper['id']})"


def _plural(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _rounds(args: Any) -> str:
    """What a round is, and what the run ends with."""
    epochs = sorted(set(args.epochs_of_rounds())) if args.num_rounds > 1 else [args.num_train_epochs]
    span = _plural(epochs[0], "epoch") if len(epochs) == 1 else f"{epochs[0]:g} to {epochs[-1]:g} epochs"
    output = "not extrapolated" if getattr(args, "output_policy", "iterate") == "iterate" else "extrapolated once more"
    return _paragraph(
        f"In {_plural(args.num_rounds, 'round')} of {span} each, the policy is trained against a reference that is "
        "the policy the round started from; after a round the weights are extrapolated, "
        f"`theta = iterate + alpha * (iterate - previous iterate)`. The output is the last iterate, {output}."
    )


def _output(trainer: Any) -> Any:
    """What a run in rounds with fresh adapters leaves, if that is not the sum of them as it is."""
    return getattr(getattr(trainer, "_weights", None), "output", None)


def _is_adapter(trainer: Any) -> bool:
    return hasattr(trainer.model, "peft_config") and not getattr(_output(trainer), "merged", False)


def _adapter(trainer: Any) -> str:
    """What was trained in place of the model's own weights, or nothing."""
    configs = list(getattr(trainer.model, "peft_config", {}).values())
    if not configs:
        return ""
    kind = str(getattr(configs[0].peft_type, "value", configs[0].peft_type))
    rank = getattr(configs[0], "r", None)
    name = f"{kind}{f', rank {rank}' if rank else ''}"
    whole, output = getattr(getattr(trainer, "_weights", None), "rank", None), _output(trainer)
    if whole is None or (whole == rank and output is None):
        return f" An adapter of it was trained ({name}), which peft loads."
    of_rank = f" of rank {whole}"
    if output is not None and output.rank is not None:
        error = trainer.round_summaries[-1].get("adapter_rank_error", 0.0)
        of_rank = f" truncated to rank {output.rank} (which leaves out {error:.1%} of the change)"
    saved = (
        f"That sum,{of_rank}, is merged into the weights of this model, in float32."
        if output is not None and output.merged
        else f"What is saved is that sum, one adapter{of_rank} for the original model, which peft loads."
    )
    first = " The first round trained on an adapter that it came with." if trainer._weights.trained_on else ""
    each = "Each later round" if first else "Each round"
    return f"{first} {each} trained a fresh adapter of it ({name}) on top of the sum of those before. {saved}"


def _weighted(trainer: Any) -> str:
    """Where a run's responses came from, and how they were weighted."""
    args, offline = trainer.args, trainer._offline
    sources = []
    if args.num_generations:
        sources.append(
            f"{args.num_generations} responses a prompt, sampled from the policy that the round starts from and "
            f"judged by {trainer.judged_by}"
        )
    if offline is not None:
        shares = sorted({args.ratio_of(t) for t in range(args.num_rounds)})
        share = f"{shares[0]:.0%}" if len(shares) == 1 else f"{shares[0]:.0%} to {shares[-1]:.0%}"
        sources.append(f"{len(offline):,} responses of a dataset ({share} of a round's rows)")
    clip = ""
    if not args.samples_exactly or (offline is not None and offline.behavior is not None):
        bound = "unbounded" if args.clip is None else f"bounded to {args.clip:g} nats around the prompt's median"
        clip = f", times its importance ratio, whose logarithm is {bound}"
    epochs = sorted(set(args.epochs_of_rounds()))
    span = _plural(epochs[0], "epoch") if len(epochs) == 1 else f"{epochs[0]:g} to {epochs[-1]:g} epochs"
    return _paragraph(
        f"In {_plural(args.num_rounds, 'round')} of {span} each, the policy is fine-tuned on "
        f"{' and on '.join(sources)}. A response weighs exp(reward / {args.reward_temperature:g}), relative to the "
        f"others of its prompt{clip}; the loss is that of supervised fine-tuning. "
        "The paper's abstract was at hand alone; the weights are trl-extras' own derivation."
    )


def _floor(trainer: Any) -> str:
    """The objective of Stable Preference Optimization as this run had it."""
    args = trainer.args
    reference = "the round's reference" if isinstance(args, RoundsConfig) else "the reference model"
    kept, floors = [], []
    if "chosen" in trainer._spo_sources:
        kept.append("the chosen responses")
        floors.append(f"what {reference} gives the chosen responses")
    if "sft" in trainer._spo_sources:
        name = _hub_id(trainer.sft_dataset_name)
        where = f"[{name}](https://huggingface.co/datasets/{name})" if name else "an SFT dataset"
        kept.append(f"{len(trainer._spo_rows):,} rows of {where}")
        floors.append("what the initial model gave the SFT rows")
    losses = ", ".join(f"`{name}`" for name in args.loss_type)
    gap = f"the gap by which the likelihood of {' and '.join(kept)} has fallen below a floor"
    if args.sft_coef:
        objective = f"plus {args.sft_coef:g} times {gap}; above the floor nothing is added."
    else:
        objective = f"alone; {gap} is measured, but has the weight 0."
    floor = " and ".join(floors) if args.optimum is None else f"a loss of {args.optimum:g} nats per token"
    if args.sft_tolerance:
        floor += f", with a tolerance of {args.sft_tolerance:g} nats per token"
    hinge = {
        "example": "each example has its own",
        "batch": "it holds for the mean over all tokens of a batch",
    }[args.hinge]
    where = "at the weights"
    if args.bilevel_solver != "penalty":
        fate = "are kept" if args.bilevel_solver == "alternating" else "are taken back"
        where = (
            f"after {_plural(args.inner_steps, 'step')} of supervised fine-tuning on what is to be kept, of size "
            f"{args.inner_rate:g}, which {fate}"
        )
    return _paragraph(
        f"The objective is a preference loss ({losses}) {objective} "
        f"The floor is {floor}; {hinge} (`hinge`: `{args.hinge}`). "
        f"The gradient is taken {where} (`bilevel_solver`: `{args.bilevel_solver}`)."
    )


def _kept(trainer: Any) -> str:
    """What became of the likelihoods, from the values logged last."""
    columns = [("metric", "")]
    entries: dict[str, dict[str, Any]] = {}
    for entry in trainer.state.log_history:
        for key in entry:
            # Of several evaluation sets each has a loss of its own.
            found = re.fullmatch(r"(eval_)?(?:([^/]+)_)?loss", key)
            if found and (found[1] or not found[2]):
                where = f"evaluation{f' ({found[2]})' if found[2] else ''}" if found[1] else "training"
                entries[where] = {**entry, f"{found[1] or ''}loss": entry[key]}
    rows: list[dict[str, Any]] = [{"metric": meaning} for _, meaning in _FLOOR_METRICS]
    for where, entry in sorted(entries.items(), key=lambda item: item[0] != "training"):
        columns.append((where, f"{where}, step {entry['step']}"))
        for row, (key, _) in zip(rows, _FLOOR_METRICS, strict=True):
            row[where] = entry.get(key if where == "training" else f"eval_{key}")
    shown = [row for row in rows if any(value is not None for where, value in row.items() if where != "metric")]
    return _FLOOR_RESULTS.format(
        table=_markdown(columns, shown) if shown else "Nothing has been logged yet.",
        reference=" The reference is the last round's." if isinstance(trainer.args, RoundsConfig) else "",
    )


def round_table(summaries: list[dict[str, Any]]) -> str:
    """A Markdown table with a row a round, of the columns that have values; rounds are counted from 1."""
    if not summaries:
        return "No round is finished yet."
    rows = []
    for summary in summaries:
        flat = {
            **(summary.get("train") or {}),
            **{f"eval_{k}": v for k, v in (summary.get("eval") or {}).items()},
            **summary,
        }
        rows.append({**flat, "round": summary["round"] + 1})
    return _markdown(_COLUMNS, rows)


def sample_tables(summaries: list[dict[str, Any]]) -> str:
    """Markdown tables of what was sampled in the rounds and for held-out prompts; nothing where nothing was."""
    parts = []
    if any("samples" in summary for summary in summaries):
        parts.append(_markdown(_SAMPLE_COLUMNS, [{**row, "round": row["round"] + 1} for row in summaries]))
    measured = [("start", summaries[0].get("heldout_start"), None)] if summaries else []
    measured += [(row["round"] + 1, row.get("heldout_iterate"), row.get("heldout_extrapolated")) for row in summaries]
    rows = []
    for name, now, following in measured:
        for which in _sets(now or following or {}):
            what, later = _heldout(now, which), _heldout(following, which)
            title = f"{name} ({which[:-1]})" if which else name
            rows.append({"round": title, **what, **{f"{key}_next": value for key, value in later.items()}})
    if rows:
        parts.append(_markdown(_HELDOUT_COLUMNS, rows))
    return "".join(f"\n{part}\n" for part in parts)


def _markdown(columns: Sequence[tuple[str, str]], rows: list[dict[str, Any]]) -> str:
    shown = [(key, title) for key, title in columns if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(title for _, title in shown) + " |", "|" + " --- |" * len(shown)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key, _ in shown) + " |" for row in rows]
    return "\n".join(lines)


def _sampled(trainer: Any) -> str:
    """How on-policy pairs were made, or nothing."""
    judge = trainer.judged_by
    if judge is None:
        return ""
    args = trainer.args
    return (
        f"Each round's pairs were sampled from the policy that the round started from: {args.num_generations} "
        f"completions a prompt, best against worst, judged by {judge}. Rewards are means over sampled completions; "
        "the held-out ones have their standard error beside them.\n\n"
    )


def _sets(measured: dict[str, Any]) -> list[str]:
    """The prefixes of the sets of held-out prompts: none for a single one, its name and `_` for each of several."""
    return [key.removesuffix("prompts") for key in measured if key == "prompts" or key.endswith("_prompts")]


def _heldout(measured: dict[str, Any] | None, prefix: str) -> dict[str, Any]:
    """What a set of held-out prompts showed, its reward with the error."""
    measured = measured or {}
    found = {key: measured.get(prefix + key) for key in ("distinct_bigrams", "share_cut", "mean_length")}
    if prefix + "reward" in measured:
        found["reward"] = f"{measured[prefix + 'reward']:.4g} ± {measured[prefix + 'reward_error']:.2g}"
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _configuration(args: Any, sft_dataset_name: str | None) -> dict[str, Any]:
    """Every setting that differs from its default or is always shown; nothing that names this machine."""
    values = args.to_dict()
    defaults = {name: field.default for name, field in type(args).__dataclass_fields__.items()}
    own = set(type(args).__dataclass_fields__) - set(transformers.TrainingArguments.__dataclass_fields__)
    shown = {}
    for name, value in values.items():
        if name.startswith(_NEVER_PREFIXES) or not isinstance(value, (str, int, float, bool, list, dict, type(None))):
            continue
        if name in _ALWAYS or name in own or value != defaults.get(name):
            shown[name] = value
    # Arguments for loading may name files of this machine.
    kwargs = shown.pop("model_init_kwargs", None)
    if isinstance(kwargs, dict):
        plain = {
            key: str(value) for key, value in kwargs.items() if value is not None and key in ("dtype", "revision")
        }
        if plain:
            shown["model_init_kwargs"] = plain
    # Files and folders of this machine, by their last part.
    names, ranker = shown.get("reward_funcs"), shown.get("ranker")
    if isinstance(names, list):
        shown["reward_funcs"] = [public_name(str(name)) for name in names]
    if isinstance(ranker, str):
        shown["ranker"] = public_name(ranker)
    template = shown.get("chat_template_path")
    if template is not None and _hub_id(str(template)) is None:
        shown["chat_template_path"] = Path(str(template)).name
    if _hub_id(getattr(args, "offline_dataset_name", None)) is None:
        for name in ("offline_dataset_name", "offline_dataset_config", "offline_dataset_split"):
            shown.pop(name, None)
    if sft_dataset_name is None:
        for name in ("sft_dataset_name", "sft_dataset_config", "sft_dataset_split"):
            shown.pop(name, None)
    # "<NAME>" is what transformers shows in place of a secret.
    return {name: value for name, value in shown.items() if value is not None and not str(value).startswith("<")}
