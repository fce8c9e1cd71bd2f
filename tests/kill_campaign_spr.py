"""
The part of the kill campaign for SPR (`python tests/kill_campaign.py 44 --method spr`): runs on sampled and offline
responses. Beyond what holds for every run that samples its own rows (`kill_campaign_rollouts.py`):

- offline responses are scored once: no batch that was answered is asked about again, by any life and in any round;
- the rows of every round, their weights included, are those of the run left alone, in whatever life they were made;
- importance log-probabilities are not computed again where the rows that they are for were on disk, except by lives
  that start anew, which make their rows from what was sampled and scored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from peft import LoraConfig

from tests import kill_campaign_rollouts as on_policy
from tests import tiny
from trl_extras import SPRConfig, SPRTrainer
from trl_extras.rounds.data import rows_fingerprint
from trl_extras.rounds.state import AdapterWeights
from trl_extras.rounds.trainer import RoundsTrainer


OFFLINE = tuple(f"offline responses, {phase}" for phase in on_policy.SET_PHASES)
IMPORTANCE, WEIGHING = "importance log-probabilities", "weighing rows"
# Those of the other runs under the same numbers, then SPR's own.
PHASES = (
    *("writing weights" if phase.endswith("writing weights") else phase for phase in on_policy.PHASES),
    *OFFLINE,
    IMPORTANCE,
    WEIGHING,
)
_METHODS = ((SPRTrainer, "_start_run", "start of a run"), (SPRTrainer, "_rows_of", WEIGHING))
# As in `kill_campaign.LEVELS`.
OPERATIONS = (
    (SPRTrainer, "_importance", "importance log-probs"),
    (SPRTrainer, "_offline_rewards", "rewards of offline responses"),
    (SPRTrainer, "_rows_of", "rows are weighed"),
    (AdapterWeights, "save", "adapter written"),
)
JUDGES = {name: judge for name, judge in on_policy.JUDGES.items() if "ranker" not in judge}
BEHAVIOR = "behavior_logp"


# ---- What is drawn ----


def draw_settings(draw: random.Random, processes: int) -> dict[str, Any]:
    rounds = draw.choice([2, 3, 3, 3])
    data = draw.choice(["split", "reuse"])
    offline = draw.choice(["train_dataset"] * 4 + ["pairs", "offline_dataset", None])
    sampled = offline in (None, "offline_dataset") or draw.random() < 0.75
    generations = draw.choice([2, 3]) if sampled else 0
    share = 5 * processes
    settings = {
        "num_rounds": rounds,
        "round_data": data if sampled else "reuse",
        "rows": share * (rounds if data == "split" and sampled else 1),
        "offline": offline,
        "prompts_per_round": draw.choice([None, None, 3 * processes]) if sampled else None,
        "num_generations": generations,
        "generation_batch_size": draw.choice([None, generations, 2 * generations]) if sampled else None,
        "temperature": draw.choice([0.8, 0.8, 1.0]),
        "max_completion_length": 8,
        "reward_temperature": draw.choice([0.2, 1.0]),
        "importance_clip": draw.choice(["5.0", "none"]),
        "skip_equal_groups": draw.random() < 0.4,
        "judge": draw.choice(list(JUDGES)),
        "heldout": draw.choice([0, 1, 1, 1, 2]),
        "conversational": draw.random() < 0.3,
        "adapter": draw.choice([None, None, 0.0, 0.1]),
        "per_device_train_batch_size": draw.choice([2, 3, 4]),
        "gradient_accumulation_steps": draw.choice([1, 1, 2]),
        "round_epochs": draw.choice([[1, 2, 1][:rounds], [2, 1, 1][:rounds], None]),
        "save_strategy": draw.choice(["steps"] * 6 + ["epoch", "no"]),
        "save_steps": draw.choice([1, 2, 3]),
        "save_total_limit": draw.choice([1, 1, 2, None]),
        "keep_iterates": draw.random() < 0.3,
        "train_sampling_strategy": draw.choice(["sequential", "random"]),
        "lr_scheduler_type": draw.choice(["linear", "cosine"]),
    }
    if offline is not None:
        settings["behavior_logps_column"] = draw.choice([BEHAVIOR, BEHAVIOR, BEHAVIOR, None])
        if sampled:
            ratios = [[0.25, 0.5, 0.75], [0.5, 0.3, 0.6], [0.6, 0.0, 0.3], [0.3, 1.0, 0.5]]
            settings["offline_ratio"] = draw.choice([None, *(ratio[:rounds] for ratio in ratios)])
    return settings


def make_responses(rows: int, conversational: bool, pairs: bool) -> datasets.Dataset:
    """Two responses for every prompt, as rows or as pairs, most without a reward, all with a log-probability."""
    draw = random.Random(7)
    prompts = on_policy.make_prompts(rows, 0, conversational, False)
    texts = tiny.make_pairs(rows, seed=0, conversational=conversational)

    def rated() -> dict[str, float | None]:
        return {"reward": draw.choice([None, None, draw.random()]), BEHAVIOR: -draw.uniform(2, 20)}

    found: list[dict[str, Any]] = []
    for prompt, text in zip(prompts, texts, strict=True):
        both = {name: {"completion": text[name], **rated()} for name in ("chosen", "rejected")}
        if pairs:
            answers = {name: response.pop("completion") for name, response in both.items()}
            said = {f"{name}_{key}": value for name, response in both.items() for key, value in response.items()}
            found.append({**prompt, **answers, **said})
        else:
            found.extend({**prompt, **response} for response in both.values())
    return datasets.Dataset.from_list(found)


def make_trainer(base: Path, folder: Path, settings: dict[str, Any]) -> SPRTrainer:
    settings = dict(settings)
    rows, conversational, offline = settings.pop("rows"), settings.pop("conversational"), settings.pop("offline")
    heldout, adapter, judge = settings.pop("heldout"), settings.pop("adapter"), dict(JUDGES[settings.pop("judge")])
    sets = {
        name: on_policy.make_prompts(number, seed, conversational, False)
        for name, number, seed in (("eval", 6, 100), ("other set", 3, 200))
    }
    given: dict[str, Any] = {"eval_dataset": [None, sets["eval"], sets][heldout]}
    if adapter is not None:
        given["peft_config"] = LoraConfig(r=2, lora_dropout=adapter, target_modules=["q_proj", "v_proj"])
    if "reward_weights" in judge:
        settings["reward_weights"] = judge.pop("reward_weights")
    if offline in (None, "offline_dataset"):
        train = on_policy.make_prompts(rows, 0, conversational, False)
        if offline is not None:
            # Of prompts that are sampled for, and of others.
            given["offline_dataset"] = make_responses(rows + 4, conversational, False)
    else:
        train = make_responses(rows, conversational, offline == "pairs")
    return SPRTrainer(
        model=str(base),
        args=SPRConfig(**tiny.arguments(folder, **settings)),
        train_dataset=train,
        processing_class=tiny.make_tokenizer(),
        **judge,
        **given,
    )


# ---- In a child ----


class _OwnPhases:
    """A `Status` for the other runs' patches: what they call a set's phase is another one for offline responses."""

    def __init__(self, status: Any):
        self.status = status
        self.offline = False

    @property
    def phase(self) -> int:
        index: int = self.status.phase
        return index

    @phase.setter
    def phase(self, index: int) -> None:
        if self.offline and index < len(on_policy.PHASES) and on_policy.PHASES[index] in on_policy.SET_PHASES:
            index = PHASES.index(OFFLINE[on_policy.SET_PHASES.index(on_policy.PHASES[index])])
        self.status.phase = index
        self.status.phases_seen |= 1 << index

    @property
    def phases_seen(self) -> int:
        # What is written to it names phases that they are not.
        return 0

    @phases_seen.setter
    def phases_seen(self, seen: int) -> None:
        pass


def watch(status: Any, log: Path) -> None:
    """As `kill_campaign_rollouts.watch`, and for what SPR does besides."""
    phases = _OwnPhases(status)
    on_policy.watch(phases, log)

    def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(make(original)))

    def phased(name: str) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def patched(*args: Any, **kwargs: Any) -> Any:
                before, phases.phase = phases.phase, PHASES.index(name)
                try:
                    return original(*args, **kwargs)
                finally:
                    phases.phase = before

            return patched

        return make

    def rewards(original: Any) -> Any:
        def patched(self: Any, *args: Any) -> Any:
            phases.offline = True
            try:
                return original(self, *args)
            finally:
                phases.offline = False

        return patched

    def importance(original: Any) -> Any:
        inside = phased(IMPORTANCE)(original)

        def patched(self: Any, round_index: int, responses: Any) -> Any:
            if all(response.source_logp is None or response.policy_logp is not None for response in responses):
                return original(self, round_index, responses)
            found = inside(self, round_index, responses)
            logps = [response.policy_logp for response in responses]
            if self.args.should_save:
                _note("importance", round=round_index, digest=_digest(logps))
            return found

        return patched

    def weighed(original: Any) -> Any:
        def patched(self: Any, round_index: int, *args: Any) -> Any:
            if self.args.should_save:
                _note("rows made", round=round_index)
            return original(self, round_index, *args)

        return patched

    def rows(original: Any) -> Any:
        def patched(self: Any, round_index: int, *args: Any) -> Any:
            found = original(self, round_index, *args)
            _note("rows", round=round_index, digest=rows_fingerprint(found))
            return found

        return patched

    def save(original: Any) -> Any:
        def patched(self: Any, folder: Path, write: bool) -> Any:
            if write and folder.parent.name.startswith("_partial-round-"):
                _note("weights saved", round=int(folder.parent.name.rpartition("-")[2]))
            return original(self, folder, write)

        return patched

    for owner, method, name in _METHODS:
        patch(owner, method, phased(name))
    patch(SPRTrainer, "_offline_rewards", rewards)
    patch(SPRTrainer, "_importance", importance)
    patch(SPRTrainer, "_rows_of", weighed)
    patch(RoundsTrainer, "_built_rows", rows)
    patch(AdapterWeights, "save", save)


_note = on_policy._note


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# ---- In the parent ----


class Ledger(on_policy.Ledger):
    """As the parent, and with what SPR makes of sampled and offline responses."""

    def __init__(self, folder: Path, log: Path, tables: dict[str, str]):
        super().__init__(folder, log, tables)
        self._own: list[dict[str, Any]] = []
        alone = log.with_name("done-alone.jsonl").read_text(encoding="utf-8").splitlines()
        self._expected = {
            (entry["what"], entry["round"]): entry["digest"] for entry in map(json.loads, alone) if "digest" in entry
        }

    def _entries(self) -> list[dict[str, Any]]:
        entries = super()._entries()
        self._own = [entry for entry in entries if "digest" in entry]
        return [entry for entry in entries if "digest" not in entry]

    def _repeated(self, anew: bool) -> list[str]:
        problems = super()._repeated(anew)
        for entry in self._own:
            what, number = entry["what"], entry["round"]
            if entry["digest"] != self._expected[what, number]:
                problems.append(f"round {number}: {what} are not those of the run left alone")
            if what == "importance" and "data.parquet" in self._rounds.get(number, ()) and not anew:
                problems.append(f"round {number}: importance again, though its rows were there before the kill")
        return problems


def in_order_of_a_run(phase: str) -> tuple[int, str]:
    """Sorts phases; what is none comes after them, by name."""
    own, after = PHASES[len(on_policy.PHASES) :], PHASES.index(on_policy.SET_PHASES[-1]) + 1
    order = [*PHASES[:after], *own, *PHASES[after : len(on_policy.PHASES)]]
    return (order.index(phase) if phase in order else len(order), phase)


def wait_for_phase(life: Any, seen: int, hits: Counter[str], draw: random.Random, seconds: float) -> None:
    """As `kill_campaign_rollouts.wait_for_phase`, with SPR's phases."""
    had = [index for index in range(1, len(PHASES)) if seen >> index & 1]
    target = draw.choices(had, [1 / (1 + hits[PHASES[index]]) ** 2 for index in had])[0]
    life.wait(lambda: life.status.phase == target, seconds)
    end = time.monotonic() + draw.choice([0.0, draw.uniform(0, 0.03), draw.uniform(0, 0.15)])
    # Not beyond the end of the phase, which may be short.
    life.wait(lambda: time.monotonic() >= end or life.status.phase != target, 1.0)
