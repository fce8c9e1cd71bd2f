"""
Kill small runs with SIGKILL at random instants of their training, resume them, and compare with runs left alone.

```bash
python tests/kill_campaign.py 60 --seed 0
python tests/kill_campaign.py 20 --processes 2
python tests/kill_campaign.py 20 --processes 2 --fsdp2
python tests/kill_campaign.py 40 --on-policy
python tests/kill_campaign.py 30 --method spo
python tests/kill_campaign.py 20 --method apo_spo
python tests/kill_campaign.py 44 --method spr
```

Each case is a tiny model and a configuration drawn at random. One run is left alone; a second one is killed, up to
four times, and resumed with `resume_from_checkpoint="True"` (or another spelling) until it is done. After every kill:

- every folder named `checkpoint-N` is complete, checksums included;
- the newest is at least as new as the newest one that was announced as complete before the kill: none is lost;
- the next life goes on from exactly that one, or from an older one where that is named.

At the end of a case the weights, the logged losses, rates and gradient norms, `rounds.jsonl` (but for durations) and
all weights on disk are those of the run left alone, to the bit, and the same files lie in the output folder: no
leftovers.

With `--processes 2`, half of the kills hit one of the two alone: then the other has to end by itself, in less than
`SURVIVOR_SECONDS`. With `--fsdp2` each of the two holds a part of the weights (`shards_on_cpu.py`).

With `--on-policy` the runs sample their own rows (`kill_campaign_rollouts.py`): then the rollouts are the same too, to
the byte, no finished phase is repeated, and the table has kills by phase. With `--method` the runs are another
method's: of SPO (`kill_campaign_spo.py`) the floor and the SFT rows of every step are the same too, and some lives get
another model in memory; SPR's (`kill_campaign_spr.py`) sample their own rows, and score offline responses beside them.

A process that has imported everything forks one child a life, because most of a small run is imports. The children
wait at random at durable operations, upstream's `TrainerState.save_to_json` included, and wherever a file is made,
renamed or removed inside them; and more than half of the kills wait for such an operation. So instants in which a
folder is half-written are long enough to be met, and often met. SIGKILL is the end of a process, not of a machine:
what the disk itself would lose without fsync is not tested here.
"""

from __future__ import annotations

import os


# Before anything of torch: a process that has threads cannot be forked safely.
os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1",
    HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)  # fmt: skip

import argparse
import collections
import contextlib
import ctypes
import functools
import hashlib
import json
import mmap
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerState
from transformers.trainer_callback import CallbackHandler
from trl import DPOTrainer

from tests import kill_campaign_rollouts as on_policy
from tests import kill_campaign_spo as spo
from tests import kill_campaign_spr as spr
from tests import shards_on_cpu, tiny
from trl_extras import APOTrainer
from trl_extras.rollouts.sampling import TransformersSampler
from trl_extras.rollouts.store import RolloutStore
from trl_extras.rollouts.trainer import RolloutsTrainer
from trl_extras.rounds import checkpoints, durable, sharding
from trl_extras.rounds.adapters import LoraRounds
from trl_extras.rounds.saving import WholeCheckpoints
from trl_extras.rounds.state import FullWeights
from trl_extras.rounds.trainer import RoundsTrainer


# No thread in the process that forks; and no lock that all children share, which one of them is killed with.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

MOST_KILLS = 4
LIFE_SECONDS = 180
# What a process may take to end when the other one has been killed: it notices at their next collective.
SURVIVOR_SECONDS = 60
SPELLINGS = ("True", "True", "true", "last", True)

# What is watched: what the trainer is doing, and the operation inside it.
LEVELS: tuple[tuple[tuple[Any, str, str], ...], ...] = (
    (
        (WholeCheckpoints, "_tidy", "tidying up"),
        (RoundsTrainer, "_start_run", "start of a run"),
        (RoundsTrainer, "_restore_folder", "round restored from a checkpoint"),
        (RoundsTrainer, "_reenter_round", "resumed inside a round"),
        (RoundsTrainer, "_enter_round", "boundary"),
        (WholeCheckpoints, "_save_checkpoint", "checkpoint"),
        (RoundsTrainer, "_on_train_end", "end of the run"),
        (WholeCheckpoints, "training_step", "training step"),
        *spo.DOING,
    ),
    (
        (durable, "write_manifest", "manifest"),
        (durable, "publish", "rename to the final name"),
        (durable, "discard", "an old folder goes"),
        (durable, "write_json", "JSON write"),
        (durable, "link_tree", "hard links"),
        (durable, "sweep", "leftovers go"),
        (PreTrainedModel, "save_pretrained", "model files"),
        (torch, "save", "optimiser and random state"),
        (FullWeights, "save", "weights written"),
        (FullWeights, "extrapolate", "extrapolation"),
        (FullWeights, "distances", "norms"),
        (LoraRounds, "save", "adapters written"),
        (LoraRounds, "save_state", "adapters apart written"),
        (LoraRounds, "rebase", "an adapter joins the history"),
        (LoraRounds, "load", "adapters read"),
        (TrainerState, "save_to_json", "trainer_state.json"),
        (APOTrainer, "_with_reference_logps", "reference log-probs"),
        (RoundsTrainer, "_write_summaries", "rounds.jsonl"),
        (RoundsTrainer, "_add_to_manifest", "manifest of a round"),
        (TransformersSampler, "__call__", "a batch is sampled"),
        (RolloutsTrainer, "_answer", "a batch is judged"),
        (RolloutStore, "put", "a batch is written"),
        (RolloutStore, "open", "a set is opened"),
        (parquet, "write_table", "a table is written"),
        (datasets.Dataset, "to_parquet", "rows are written"),
        *spo.OPERATIONS,
        *spr.OPERATIONS,
    ),
)
FLOOR = 1 + [name for _, _, name in LEVELS[0]].index(spo.FLOOR)
# Whatever changes the file system inside these waits as well, so that there is time between any two such calls.
FILE_EVENTS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
# The longest waits, in seconds: at an operation, at a file, and before upstream's last file, which makes its
# half-written window a good part of a checkpoint.
WAIT, WAIT_FILE, WAIT_STATE_FILE = 0.02, 0.004, 0.04


class Status:
    """Numbers that a child leaves for its parent, in memory that outlives it."""

    NAMES = (
        "training",
        "resumed_at",
        "announced",
        "step",
        "level0",
        "level1",
        "seen",
        "finished",
        "phase",
        "phases_seen",
    )

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))
        self.resumed_at = self.announced = -1

    def __getattr__(self, name: str) -> int:
        if name not in self.NAMES:
            raise AttributeError(name)
        value: int = struct.unpack_from("q", self._memory, 8 * self.NAMES.index(name))[0]
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.NAMES:
            # One aligned word: a kill cannot tear it.
            struct.pack_into("q", self._memory, 8 * self.NAMES.index(name), value)
        else:
            super().__setattr__(name, value)

    def where(self) -> str:
        """What a dead child was doing."""
        if not self.training and not self.level0:
            return "before the training"
        levels = zip((self.level0, self.level1), LEVELS, strict=True)
        return ": ".join(operations[at - 1][2] for at, operations in levels if at) or "between steps"


# ---- In a child ----


def watch(status: Status, seed: int, method: str | None = None) -> None:
    """Patch this process's operations so that they say where the run is and wait at random before and after."""
    # Not the global generator: the training's random numbers are its own.
    draw = random.Random(seed)

    def pause(longest: float) -> None:
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, longest))

    def patch(level: int, index: int, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        longest = 0 if level == 0 else WAIT_STATE_FILE if name == "save_to_json" else WAIT

        def patched(*args: Any, **kwargs: Any) -> Any:
            field_name = f"level{level}"
            before = getattr(status, field_name)
            setattr(status, field_name, index + 1)
            if level == 1:
                status.seen |= 1 << index
            pause(longest)
            try:
                result = original(*args, **kwargs)
                if name == "publish" and (match := re.fullmatch(r"checkpoint-(\d+)", Path(args[1]).name)):
                    status.announced = int(match[1])
                pause(longest)
                return result
            finally:
                setattr(status, field_name, before)

        setattr(owner, name, patched)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writes = event in FILE_EVENTS and (event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes and (status.level0 or status.level1):
            pause(WAIT_FILE)

    sys.addaudithook(audit)
    for level, operations in enumerate(LEVELS):
        for index, (owner, name, _) in enumerate(operations):
            # Rounds do upstream's work at their boundaries, under a name of their own.
            if owner is not DPOTrainer or method == "spo":
                patch(level, index, owner, name)

    train, began, stepped = WholeCheckpoints.train, CallbackHandler.on_train_begin, CallbackHandler.on_step_end

    def training(self: Any, *args: Any, **kwargs: Any) -> Any:
        status.training = 1
        return train(self, *args, **kwargs)

    def beginning(self: Any, args: Any, state: Any, control: Any) -> Any:
        status.resumed_at = state.global_step
        return began(self, args, state, control)

    def step_done(self: Any, args: Any, state: Any, control: Any) -> Any:
        status.step = state.global_step
        return stepped(self, args, state, control)

    WholeCheckpoints.train = training  # type: ignore[method-assign]
    CallbackHandler.on_train_begin, CallbackHandler.on_step_end = beginning, step_done  # type: ignore[method-assign]


def make_trainer(case: Case, folder: Path, other: str | None) -> Any:
    cls: Any = APOTrainer
    base, settings, given = case.base, dict(case.settings), {}
    adapter = settings.get("adapter")
    if case.method is not None:
        cls = spo.METHODS[case.method]
        base, settings, given = spo.arguments(case, other)
    elif settings.pop("ref_model", False):
        given["ref_model"] = tiny.make_model(seed=9)
    if case.sampling is spr:
        return spr.make_trainer(base, folder, settings)
    if case.on_policy:
        return on_policy.make_trainer(base, folder, settings, cls, **given)
    settings.pop("adapter", None)
    if adapter is not None:
        given |= adapted(base, adapter)
    data = tiny.make_pairs(settings.pop("rows"))
    if case.processes > 1:
        data = datasets.load_from_disk(str(case.data / "train"))
        if "eval_dataset" in given:
            given["eval_dataset"] = datasets.load_from_disk(str(case.data / "eval"))
    return cls(
        args=cls.config_class(**tiny.arguments(folder, **settings)),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **{"model": str(base), **given},
    )


def adapted(base: Path, way: str) -> dict[str, Any]:
    """The trainer's arguments for an adapter."""
    config = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    if way == "configured":
        return {"peft_config": config}
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return {"model": model}


def live(case: Case, folder: Path, resume: Any, other: str | None) -> dict[str, Any]:
    """One life of a run, to its end; what it ended with."""
    trainer = make_trainer(case, folder, other)
    trainer.train(resume_from_checkpoint=resume)
    weights = hashlib.sha256()
    sharding.settle(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        values = sharding.whole(parameter).detach().contiguous()
        weights.update(name.encode() + values.numpy().tobytes())
    keys = ("step", "loss", "learning_rate", "grad_norm")
    summaries = folder / "rounds.jsonl"
    lines = summaries.read_text(encoding="utf-8").splitlines() if summaries.is_file() else []
    return {
        "weights": weights.hexdigest(),
        "steps": trainer.state.global_step,
        "logs": [[entry.get(key) for key in keys] for entry in trainer.state.log_history if "loss" in entry],
        "rounds": [comparable(json.loads(line)) for line in lines],
        # All that loggers get in a run, but for upstream's last line, which is about this life alone.
        "log_history": [comparable(entry) for entry in trainer.state.log_history if "train_runtime" not in entry],
    }


def comparable(content: dict[str, Any]) -> dict[str, Any]:
    """A row of `rounds.jsonl` without times, rates, memory, and TRL's count of tokens, which starts anew."""
    return {
        key: comparable(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not re.search(r"(^|/|_)(seconds|(tokens|samples|steps)_per_second|runtime|num_tokens|memory_gb)$", key)
    }


# ---- In the parent ----


@dataclass
class Case:
    """A configuration and what became of it."""

    number: int
    base: Path
    folder: Path
    settings: dict[str, Any]
    processes: int
    on_policy: bool = False
    fsdp2: bool = False
    # Of `spo.METHODS`, or None for APO.
    method: str | None = None
    expected: dict[str, Any] = field(default_factory=dict)
    duration: float = 0.0
    operations: int = 0
    phases: int = 0
    # Of the whole campaign, by what the run was doing.
    hits: collections.Counter[str] = field(default_factory=collections.Counter)
    kills: list[tuple[str, list[str]]] = field(default_factory=list)
    lives: int = 0
    # Seconds that one process took to end after the other.
    survived: list[float] = field(default_factory=list)
    # Of the life that begins, where processes share it.
    data: Path = Path()
    # Lives that had another model in memory than the first one.
    others: int = 0
    # The part of this campaign that knows runs which sample their own rows.
    sampling: Any = on_policy


def draw_settings(draw: random.Random, processes: int) -> dict[str, Any]:
    rounds = draw.choice([2, 3, 3])
    data = draw.choice(["split", "reuse"])
    return {
        "num_rounds": rounds,
        "round_data": data,
        # Four steps an epoch.
        "rows": 8 * processes * (rounds if data == "split" else 1),
        "round_epochs": draw.choice([None, None, [1, 2, 1][:rounds], [2, 1, 1][:rounds]]),
        "save_strategy": draw.choice(["steps"] * 6 + ["epoch", "no"]),
        "save_steps": draw.choice([1, 2, 3]),
        "save_total_limit": draw.choice([1, 1, None]),
        "precompute_ref_log_probs": draw.random() < 0.4,
        "keep_iterates": draw.random() < 0.4,
        "momentum_from": draw.choice(["previous_iterate"] * 3 + ["reference"]),
        "output_policy": draw.choice(["iterate"] * 3 + ["extrapolated"]),
        "extrapolation_alpha": draw.choice([[0.3], [0.6], [0.0]]),
        "train_sampling_strategy": draw.choice(["sequential", "random"]),
        "lr_scheduler_type": draw.choice(["linear", "cosine"]),
        "optim": draw.choice(["adamw_torch"] * 3 + ["rmsprop"]),
        "ref_model": draw.random() < 0.15,
        # A fresh adapter a round, from a configuration or after one that is passed; or full weights.
        "adapter": draw.choice([None, None, "configured", "passed"]),
    }


def draw_case(draw: random.Random, options: Any) -> dict[str, Any]:
    if options.method == "spo":
        return spo.draw_settings(draw, options.processes)
    if options.method == "spr":
        return spr.draw_settings(draw, options.processes)
    settings = (on_policy.draw_settings if options.on_policy else draw_settings)(draw, options.processes)
    return settings if options.method is None else {**settings, **spo.draw_objective(draw, options.processes)}


class Life:
    """A forked run, of one process or of several that train together."""

    def __init__(self, case: Case, folder: Path, resume: Any, seed: int, other: str | None = None):
        case.lives += 1
        case.others += other is not None
        if case.processes > 1 and not case.on_policy:
            # Of rows in memory every process has its own cache file, and upstream's reference log-probabilities are
            # lost. Of a folder that an earlier life had they would be taken from its cache: upstream then draws fewer
            # random numbers before the training, and dropout is another one.
            case.data = case.folder / f"data-{case.lives}"
            tiny.make_pairs(case.settings["rows"]).save_to_disk(case.data / "train")
            spo.make_eval_rows().save_to_disk(case.data / "eval")
        self.folder = folder
        self.log = case.folder / f"life-{case.lives}.log"
        self.result = case.folder / f"life-{case.lives}.json"
        self.done = case.folder / f"done-{folder.name}.jsonl"
        self.rows = case.folder / f"rows-{folder.name}.jsonl"
        self.sampling = case.sampling if case.on_policy else None
        self.statuses = [Status() for _ in range(case.processes)]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.running = {}
        for rank in range(case.processes):
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                self._child(case, resume, seed, rank, port, other)
            self.running[pid] = rank
        self.failed = False

    def _child(self, case: Case, resume: Any, seed: int, rank: int, port: int, other: str | None) -> None:
        code = 1
        try:
            # No child outlives its parent, however that ends.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if case.processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.processes),
                    LOCAL_WORLD_SIZE=str(case.processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            if case.fsdp2:
                os.environ.update(shards_on_cpu.ENVIRONMENT)
                shards_on_cpu.allow()
            watch(self.statuses[rank], seed + rank, case.method)
            if case.on_policy:
                case.sampling.watch(self.statuses[rank], self.done)
            if case.method is not None:
                spo.write_down_rows(self.rows, rank)
            found = live(case, self.folder, resume, other)
            if rank == 0:
                self.result.write_text(json.dumps(found), encoding="utf-8")
            self.statuses[rank].finished = 1
            if case.processes > 1:
                torch.distributed.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def status(self) -> Status:
        return self.statuses[0]

    def reap(self) -> None:
        for pid in list(self.running):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.running[pid]
                self.failed = self.failed or os.waitstatus_to_exitcode(code) != 0

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait until something holds or every process has ended; whether there was time enough."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.reap()
            if not self.running or until():
                return True
            time.sleep(0.001)
        return False

    def wait_for_training(self) -> None:
        self.wait(lambda: bool(self.status.training), LIFE_SECONDS)

    def is_at(self, operation: int) -> bool:
        return self.status.level1 == operation

    def where(self) -> str:
        """What it was doing: its phase if it samples its own rows."""
        if self.sampling is not None and self.status.training:
            phase: str = self.sampling.PHASES[self.status.phase]
            return phase
        return self.status.where()

    def kill(self, only: int | None = None) -> None:
        for pid, rank in list(self.running.items()):
            if only is None or rank == only:
                os.kill(pid, signal.SIGKILL)
                if only is None:
                    os.waitpid(pid, 0)
                    del self.running[pid]

    def finish(self) -> dict[str, Any]:
        """What a run that nobody kills ends with; raises a RuntimeError with the end of its log if it fails."""
        in_time = self.wait(lambda: False, LIFE_SECONDS)
        self.kill()
        if not in_time or self.failed or not self.result.is_file():
            end = "".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines(True)[-25:])
            raise RuntimeError(f"{'hangs' if not in_time else 'fails'}:\n{end}")
        result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return result


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint there, 0 without one."""
    return max((step for step, _ in checkpoints.list_checkpoints(folder)), default=0)


def on_disk(folder: Path) -> dict[str, str | None]:
    """All that an output folder holds, with a checksum for the files that equal runs write with equal bytes."""
    found: dict[str, str | None] = {}
    for path in folder.rglob("*"):
        equal = path.suffix in (".safetensors", ".parquet") or path.name == "description.json"
        found[path.relative_to(folder).as_posix()] = durable.checksum(path) if equal and path.is_file() else None
    return found


def problems_at_the_end(case: Case, folder: Path, found: dict[str, Any]) -> list[str]:
    problems = [f"{key} differ from the run left alone" for key in found if found[key] != case.expected[key]]
    here, there = on_disk(folder), case.expected["on_disk"]
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            problems.append(f"left over: {name}")
        elif name not in here:
            problems.append(f"missing: {name}")
        elif here[name] != there[name]:
            problems.append(f"another content: {name}")
    return problems


def wait_for_an_instant(life: Life, case: Case, draw: random.Random, share: float, fresh: bool) -> None:
    """
    Let a life go on until it is to be killed.

    Args:
        share: what is left of the training.
        fresh: whether its floor is not on disk.
    """
    if case.method is not None and fresh and draw.random() < 0.3:
        # The floor comes before the training.
        life.wait(lambda: bool(life.status.training) or life.status.level0 == FLOOR, LIFE_SECONDS)
        life.wait(lambda: False, draw.uniform(0, 0.08))
        return
    life.wait_for_training()
    # And the start of a resumed run, which can be killed as well.
    left = case.duration * max(share, 0.15)
    if (not case.on_policy and case.method is None) or draw.random() < 0.4:
        life.wait(lambda: False, draw.uniform(0, 0.85 * left))
    if case.on_policy and draw.random() < 0.7:
        case.sampling.wait_for_phase(life, case.phases, case.hits, draw, left * draw.uniform(0.4, 1))
    elif draw.random() < (0.6 if case.method is None else 0.8):
        # Training takes most of the time, and of the operations some are rare: most kills wait for one that was drawn
        # among all that this configuration has.
        targets = [at + 1 for at in range(len(LEVELS[1])) if case.operations >> at & 1]
        if case.method is None:
            target = draw.choice(targets)
        else:
            # Rather one that few kills have hit; what comes before the training is over.
            targets = [at for at in targets if LEVELS[1][at - 1][1] != "_write_floor"]
            names = [LEVELS[1][at - 1][2] for at in targets]
            hit = [sum(number for where, number in case.hits.items() if where.endswith(name)) for name in names]
            target = draw.choices(targets, [1 / (1 + number) ** 2 for number in hit])[0]
        life.wait(functools.partial(life.is_at, target), left)
        life.wait(lambda: False, draw.uniform(0, WAIT))


def run_case(case: Case, draw: random.Random, most_kills: int) -> None:
    """Run a configuration alone, then with kills; the kills and what was wrong after each are in `case.kills`."""
    if case.processes > 1:
        spo.save_sft(case)
    alone = case.folder / "alone"
    life = Life(case, alone, None, draw.randrange(2**31))
    life.wait_for_training()
    begun = time.monotonic()
    case.expected = life.finish()
    # With its waits, as the lives to be killed have them.
    case.duration = time.monotonic() - begun
    case.expected["on_disk"], case.operations = on_disk(alone), life.status.seen
    case.phases = life.status.phases_seen
    total, rows_alone = case.expected["steps"], life.rows

    folder = case.folder / "out"
    ledger = case.sampling.Ledger(folder, life.done.with_name("done-out.jsonl"), on_policy.tables(alone))
    wanted, resume, announced, other = 0, None, 0, None
    for kills in range(most_kills + 1):
        life = Life(case, folder, resume, draw.randrange(2**31), other)
        if kills < most_kills:
            wait_for_an_instant(life, case, draw, 1 - wanted / total, fresh=not kills or other is not None)
        killed = bool(life.running) and kills < most_kills and not life.status.finished
        problems: list[str] = []
        if killed:
            where = life.where()
            if case.processes > 1 and draw.random() < 0.5:
                # One alone; no launcher ends the other.
                life.kill(only=draw.randrange(case.processes))
                since = time.monotonic()
                if not life.wait(lambda: False, SURVIVOR_SECONDS):
                    problems.append(f"a process went on for {SURVIVOR_SECONDS} s without the other")
                case.survived.append(time.monotonic() - since)
            life.kill()
            case.hits[where] += 1
            case.kills.append((where if case.processes > 1 else life.where(), problems))
        else:
            problems += problems_at_the_end(case, folder, life.finish())
        if life.status.resumed_at >= 0 and life.status.resumed_at != wanted:
            problems.append(f"resumed at step {life.status.resumed_at}, but the newest checkpoint was {wanted}")
        announced = max(announced, life.status.announced)
        for _, checkpoint in checkpoints.list_checkpoints(folder):
            try:
                durable.verify(checkpoint)
            except durable.DamagedStateError as error:
                problems.append(f"{checkpoint.name} is not complete: {error}")
        if case.on_policy:
            problems += ledger.problems(anew=not wanted)
        if case.method is not None:
            problems += spo.problems(folder, alone, (life.rows, rows_alone), other is None, not killed)
        wanted = newest_checkpoint(folder)
        if wanted < announced:
            problems.append(f"checkpoint-{announced} was complete, but the newest is {wanted}")
        if not killed:
            # What is wrong with the end is wrong with every kill on the way there.
            for _, earlier in case.kills:
                earlier.extend(problem for problem in problems if problem not in earlier)
            if problems and not case.kills:
                raise RuntimeError("; ".join(problems))
            return
        resume = draw.choice(SPELLINGS)
        other = spo.draw_other(case, folder, draw) if case.method is not None else None
        older = checkpoints.list_checkpoints(folder)[:-1]
        if (case.on_policy or case.method is not None) and older and draw.random() < 0.3:
            # By name: what later rounds have sampled is of the same weights all the same. The newer ones may go.
            wanted, path = draw.choice(older)
            resume, announced = str(path), wanted


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder; what failed in it stays, for a look."""
    folder = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder / "base", ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, metavar="N", help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="draws configurations and instants (default: 0)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="processes of a run (default: 1)")
    parser.add_argument("--fsdp2", action="store_true", help="two processes that hold parts of the weights")
    parser.add_argument("--on-policy", action="store_true", help="runs that sample their own rows")
    parser.add_argument("--method", choices=[*spo.METHODS, "spr"], help="another method than APO")
    options = parser.parse_args()
    if options.on_policy and options.method == "spo":
        parser.error("SPO has no rounds to sample rows in: use --method apo_spo.")
    if options.fsdp2 and options.processes == 1:
        parser.error("--fsdp2 takes --processes 2.")
    # SPR's runs always do.
    options.on_policy = options.on_policy or options.method == "spr"
    sampling, method = (spr, None) if options.method == "spr" else (on_policy, options.method)
    draw = random.Random(options.seed)
    hit: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    hits: collections.Counter[str] = collections.Counter()
    begun, done, failed, number, others = time.monotonic(), 0, 0, 0, 0
    survived: list[float] = []
    with workspace() as work:
        tiny.save_model(work / "base")
        spo.save_models(work / "base")
        while done < options.kills:
            number += 1
            settings = draw_case(draw, options)
            folder, base = work / f"case-{number}", work / "base"
            case = Case(
                number, base, folder, settings, options.processes, options.on_policy, options.fsdp2, method,
                hits=hits, sampling=sampling,
            )  # fmt: skip
            case.folder.mkdir()
            try:
                run_case(case, draw, min(draw.randint(1 + options.on_policy, MOST_KILLS), options.kills - done))
            except RuntimeError as error:
                if not case.kills:
                    case.kills.append(("(a run that nobody killed)", []))
                case.kills[-1][1].append(f"a run {error}")
            done, others = done + len(case.kills), others + case.others
            survived += case.survived
            wrong = sorted({problem for _, problems in case.kills for problem in problems})
            for where, problems in case.kills:
                hit[where]["failed" if problems else "passed"] += 1
                failed += bool(problems)
            print(
                f"[{time.monotonic() - begun:5.0f} s] case {number}: {case.duration:.1f} s of training alone, "
                f"{len(case.kills)} kills ({'; '.join(where for where, _ in case.kills)}): "
                f"{'FAILED' if wrong else 'passed'}; {done} of {options.kills}",
                flush=True,
            )
            if wrong:
                print(f"    {settings}\n    kept: {case.folder}", flush=True)
                for problem in wrong:
                    print(f"    {problem}", flush=True)
            else:
                shutil.rmtree(case.folder)

    width = max(map(len, hit))
    print(f"\n| {'where the kill hit':{width}} | kills | passed | failed |")
    print(f"|{'-' * (width + 2)}|------:|-------:|-------:|")
    for where, outcomes in sorted(hit.items(), key=lambda item: sampling.in_order_of_a_run(item[0])):
        print(f"| {where:{width}} | {outcomes.total():5} | {outcomes['passed']:6} | {outcomes['failed']:6} |")
    print(f"\n{done - failed} passed, {failed} failed")
    if survived:
        print(f"{len(survived)} times one process died alone; the other ended within {max(survived):.1f} s")
    if others:
        print(f"{others} lives that went on had another model in memory")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
