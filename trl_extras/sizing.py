"""
How much memory and disk a run takes, from its configuration alone. Pure arithmetic: no torch, no trainer.

`docs/sizing.md` says the formulas in words, shows what they give for some models, and what runs have measured. Its
tables are this module's output:

    python -m trl_extras.sizing

All sizes are bytes; GB are 10^9 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any


GB = 1e9


def shown(size: float) -> str:
    """A size for people, in the unit that leaves it some digits."""
    if size >= 1e8:
        return f"{size / GB:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.2f} kB"


# TRL's fused head (trl/kernels/chunked_logprob.py): tokens and vocabulary entries of a tile of logits.
_TILE_TOKENS = 4096
_TILE_VOCABULARY = 32768
# Tiles in float32 that its torch form, which machines without Triton use, has at a time: buffer, scaled, tempered,
# log-probabilities, probabilities, gradient, two intermediate results and a mask of bytes; forward about five.
_TILES_BACKWARD, _TILES_FORWARD = 8.25, 5.0
# Scheduler, random states, trainer_state.json, training_args.bin, manifest and card of a checkpoint.
_SMALL_FILES = 64 * 1024
# The logits of the last token and what a nucleus needs of them: float32, probabilities, sorted, their order.
_SAMPLING_LOGITS = 5
# A row of rollouts on disk: token ids, log-probabilities and the text of each token, before compression.
_ROLLOUT_TOKEN = 16

DDP, ZERO2, ZERO3, FSDP = "DDP", "ZeRO-2", "ZeRO-3", "FSDP2"
SHARDINGS = (DDP, ZERO2, ZERO3, FSDP)


# ---- The model ----


@dataclass(frozen=True)
class Decoder:
    """The widths of a decoder of the Llama kind, which activations follow from."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool = False
    attention_bias: bool = False

    @property
    def query(self) -> int:
        return self.heads * self.head_width

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def layer_matrices(self) -> int:
        """Parameters in the linear layers of one decoder layer."""
        return self.hidden * (2 * self.query + 2 * self.key) + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        bias = self.query + 2 * self.key if self.attention_bias else 0
        return self.layer_matrices + 2 * self.hidden + bias

    @property
    def table(self) -> int:
        """Parameters of the embedding, and as many of the head where the two are not tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.table * (1 if self.tied else 2) + self.layers * self.layer_parameters + self.hidden


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter.

    Args:
        parameters: trained ones.
        modules: adapted modules in a layer.
        inputs: their input widths added up.
        rank: of one module.
        dropout: whether the adapter drops inputs out.
    """

    parameters: int
    modules: float
    inputs: float
    rank: int
    dropout: bool = True


def lora(model: Decoder, rank: int = 16, everywhere: bool = False) -> Adapter:
    """TRL's default adapter (query and value projections), or one on every linear layer."""
    h, q, k, i = model.hidden, model.query, model.key, model.intermediate
    shapes = [(h, q), (h, k)] if not everywhere else [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]
    parameters = rank * sum(inputs + outputs for inputs, outputs in shapes) * model.layers
    return Adapter(parameters, len(shapes), sum(inputs for inputs, _ in shapes), rank)


# ---- Optimisers ----

# Tensors of a parameter's size that they keep.
_MOMENTS = {"adamw": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}


def optimizer_bytes(name: str, elements: int, width: int = 4, sides: int = 0, embedding: int = 0) -> float | None:
    """
    The state of an optimiser; None where it is not known here.

    Args:
        name: transformers' name of it (`optim`).
        elements: trained parameters.
        width: bytes of one of them; moments have their parameter's dtype.
        sides: rows and columns of all matrices and elements of all vectors, which Adafactor keeps instead.
        embedding: elements in embeddings, whose moments transformers keeps in float32 with 8-bit optimisers.
    """
    short = name.removeprefix("paged_")
    if short == "adafactor":
        return 4.0 * sides
    if short == "sgd":
        return 0.0
    moments = next((count for kind, count in _MOMENTS.items() if short.startswith(kind)), None)
    own_kinds = ("", "_torch", "_torch_fused", "_torch_xla", "_torch_npu_fused", "_hf", "_apex_fused")
    if moments is not None and short.endswith("_8bit") and short != "adamw_torch_8bit":
        # bitsandbytes: one byte an element, and a scale in float32 for each block of 256.
        return moments * ((elements - embedding) * (1 + 4 / 256) + embedding * 4.0)
    if moments is not None and (short.endswith(("_32bit", "_bnb"))):
        return 4.0 * moments * elements
    if any(short == kind + own for kind in _MOMENTS for own in own_kinds):
        return float((moments or 0) * elements * width)
    return None


# ---- Memory ----


@dataclass(frozen=True)
class Setup:
    """
    One process of a run, as far as its memory depends on it.

    Args:
        parameters: of the model, tied weights once; without an adapter's.
        weight_width: bytes of a weight as loaded (TRL's default: 4).
        autocast: bf16 or fp16 mixed precision (TRL's default).
        rows: sequences in a micro-batch: two for each pair.
        tokens: of the longest row, to which the others are padded.
        other_rows, other_tokens: of a second batch in the same step, such as SPO's SFT rows.
        reference: "model" in memory beside the policy, "adapter" (the model without it), or None.
        reference_rows: rows of a batch whose reference log-probabilities are computed ahead; 0 for none.
        evaluation_rows: rows of a batch that is evaluated between two steps; 0 for none.
        inner: "unrolled", "alternating" or "central_difference" (SPO), or None.
        sampled, sampled_tokens: sequences sampled at a time and their largest length; 0 for none.
        gpu: whether the head's Triton kernel is there.
        trained: trained parameters of the model itself; all of them by default, none with an adapter.
        weights: bytes of the model's weights, where they are not `parameters * weight_width` (quantised).
        sides, embedding: as for [`optimizer_bytes`].
        process: what the process takes by itself (Python and its libraries; on a GPU its context).
    """

    parameters: int
    decoder: Decoder | None
    adapter: Adapter | None = None
    weight_width: int = 4
    autocast: bool = True
    optimizer: str = "adamw_torch_fused"
    processes: int = 1
    sharding: str = DDP
    accumulates: bool = False
    gradient_checkpointing: bool = True
    rows: int = 16
    tokens: int = 1024
    other_rows: int = 0
    other_tokens: int = 0
    reference: str | None = None
    reference_rows: int = 0
    evaluation_rows: int = 0
    inner: str | None = None
    sampled: int = 0
    sampled_tokens: int = 0
    gpu: bool = True
    trained: int | None = None
    weights: float | None = None
    sides: int = 0
    embedding: int = 0
    process: float = 0.0

    @property
    def deepspeed(self) -> bool:
        return self.sharding in (ZERO2, ZERO3)

    @property
    def computed_in(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.autocast else self.weight_width

    @property
    def held_in(self) -> int:
        """Bytes of a weight as the layers see it: sharded weights come in the precision of the products."""
        sharded = self.sharding != DDP and self.processes > 1
        return 2 if self.autocast and (sharded or self.deepspeed) else self.weight_width

    @property
    def trains(self) -> int:
        """Trained parameters."""
        if self.adapter is not None:
            return self.adapter.parameters
        return self.parameters if self.trained is None else self.trained

    @property
    def trained_width(self) -> int:
        """Bytes of a trained weight while it trains."""
        if self.deepspeed:
            return self.computed_in
        if self.adapter is not None or (self.sharding == FSDP and self.autocast):
            # peft keeps adapters in float32, and accelerate what FSDP2 trains with mixed precision.
            return 4
        return self.weight_width


@dataclass(frozen=True)
class Memory:
    """
    What one process takes.

    Attributes:
        phases: by phase of a run its parts, by name; a part that is not known is None.
    """

    phases: dict[str, dict[str, float | None]]

    @staticmethod
    def total(parts: dict[str, float | None]) -> float:
        return sum(size for size in parts.values() if size is not None)

    @property
    def highest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.total(self.phases[phase]))

    @property
    def peak(self) -> float:
        return self.total(self.phases[self.highest])

    @property
    def unknown(self) -> list[str]:
        """Parts that are not known, in the order of the phases."""
        found = [name for parts in self.phases.values() for name, size in parts.items() if size is None]
        return list(dict.fromkeys(found))


def layer_activations(setup: Setup, tokens: int) -> float:
    """
    What one decoder layer keeps for its backward pass, bytes a token, in rows of `tokens` tokens.

    Counted from what autograd saves (sdpa attention with a padding mask, which repeats keys and values for each query
    head); `tests/test_sizing.py` holds it against a model.
    """
    d, adapter = setup.decoder, setup.adapter
    assert d is not None
    width = setup.computed_in
    # Keys and values for each query head, queries, the attention's output; its normaliser; the mask of each row.
    attention = (4 * d.query + tokens) * width + 4 * d.heads
    norms = 2 * 4
    residual = 2 * 4 * d.hidden
    if adapter is not None:
        # Frozen weights need no inputs: activation, gate and up, and each adapted module's input and low-rank output.
        noise = 1 if setup.gpu else 4
        inputs = adapter.inputs * (width + (noise if adapter.dropout else 0))
        inputs += adapter.modules * adapter.rank * width
        return residual + norms + attention + 3 * d.intermediate * width + inputs
    # The norms' results before their weights, and the linear layers' inputs: under autocast each has its own copy.
    if setup.autocast and setup.held_in == 4:
        inputs = 2 * 4 * d.hidden + 5 * 2 * d.hidden
    else:
        inputs = 4 * d.hidden * setup.held_in
    return residual + norms + inputs + attention + 4 * d.intermediate * width


def _activations(setup: Setup, rows: int, tokens: int) -> tuple[float, float]:
    """What the layers keep of a batch, and what one layer adds while it is computed again for its backward pass."""
    d = setup.decoder
    assert d is not None
    layer = rows * tokens * layer_activations(setup, tokens)
    if not setup.gradient_checkpointing:
        return d.layers * layer, 0.0
    between = setup.held_in
    return d.layers * rows * tokens * d.hidden * between, layer


def _head(setup: Setup, tokens: int) -> tuple[float, float]:
    """The fused head of a batch of so many tokens: forward, and backward with the gradient of its weights."""
    d = setup.decoder
    assert d is not None
    hidden = 4.0 * tokens * d.hidden
    tile = min(tokens, _TILE_TOKENS) * min(d.vocabulary, _TILE_VOCABULARY)
    if setup.gpu:
        forward = backward = float(tile * setup.computed_in)
    else:
        forward, backward = _TILES_FORWARD * tile * 4, _TILES_BACKWARD * tile * 4
    weights = 4.0 * d.table if setup.adapter is None else 0.0
    return hidden + forward, 2 * hidden + backward + weights


def memory(setup: Setup) -> Memory:
    """The memory of one process, phase by phase."""
    s, d, n = setup, setup.decoder, setup.processes
    alone = s.sharding == DDP or n == 1
    whole = s.sharding in (ZERO3, FSDP)
    # Weights that stay as they were loaded, and those that are trained.
    if s.adapter is not None:
        weights = (s.weights or s.parameters * (2 if s.deepspeed and s.autocast else s.weight_width)) + (
            s.trains * s.trained_width
        )
    else:
        frozen = s.parameters - s.trains
        weights = s.weights or frozen * s.weight_width + s.trains * s.trained_width
    gradients = float(s.trains * s.trained_width)
    state = optimizer_bytes(s.optimizer, s.trains, 4 if s.deepspeed else s.trained_width, s.sides, s.embedding)
    if s.deepspeed and state is not None:
        state += 4.0 * s.trains  # float32 masters
    reference = weights if s.reference == "model" else 0.0
    share = 1 if n == 1 else n
    per_process = share if whole else 1
    sharded = share if s.sharding != DDP else 1
    base: dict[str, float | None] = {
        "weights": weights / per_process,
        "reference model": reference / per_process,
        "process": s.process,
    }
    optimiser: dict[str, float | None] = {"optimiser": None if state is None else state / sharded}
    held = gradients / sharded
    # DDP sends gradients in buckets of its own.
    buckets = gradients if n > 1 and alone else 0.0
    gathered: float | None = 0.0
    if n > 1 and whole:
        # Two layers and the tables in the precision of the products, and the gradients of one layer and one table.
        gathered = None if d is None else s.computed_in * (
            3.0 * d.layer_parameters + (d.table * (1 if d.tied else 2)) + (d.table if s.adapter is None else 0)
        )  # fmt: skip
    inner = 0.0
    if s.inner is not None:
        # Weights to come back to, and gradients beside those of the step; a central difference has two more.
        inner = (held if whole else gradients) * {"alternating": 1, "unrolled": 2, "central_difference": 4}[s.inner]
    always = {**base, **optimiser, "gathered layers": gathered, "DDP's buckets": buckets, "inner steps": inner}
    before = held if s.accumulates else 0.0
    phases: dict[str, dict[str, float | None]] = {}
    if d is None:
        phases["training"] = {**always, "gradients": held, "activations": None, "head": None}
    else:
        kept, again = first, _ = _activations(s, s.rows, s.tokens)
        forward, backward = _, first_backward = _head(s, s.rows * s.tokens)
        if s.other_rows:
            more, more_again = _activations(s, s.other_rows, s.other_tokens)
            other_forward, other_backward = _head(s, s.other_rows * s.other_tokens)
            kept, again = kept + more, max(again, more_again)
            forward, backward = max(forward, other_forward), max(backward, other_backward)
        # Copies of float32 weights for the products: kept for the backward pass, or, with gradient checkpointing, as
        # long as the forward pass lasts.
        copies = 0.0
        if s.autocast and s.held_in == 4:
            copies = 2.0 * d.layers * d.layer_matrices
        saved_copies = 0.0 if s.gradient_checkpointing else copies
        forward_copies = copies if s.adapter is None else saved_copies
        acts: dict[str, float | None] = {"activations": kept + saved_copies}
        phases["forward pass"] = {
            **always, "gradients": before, "activations": kept + forward_copies, "head": forward,
        }  # fmt: skip
        if s.reference == "model":
            phases["reference's forward pass"] = {
                **always, "gradients": before, "activations": kept + saved_copies + copies, "head": forward,
            }  # fmt: skip
        if s.other_rows:
            # The later batch goes backward first, whole. Its gradients wait, not yet reduced, for those of the first,
            # whose activations are still there.
            waiting = held if whole else gradients
            phases["backward pass of the pairs"] = {
                **always, "gradients": waiting + before, "activations": first + saved_copies, "head": first_backward,
            }  # fmt: skip
        phases["backward pass begins"] = {**always, "gradients": before, **acts, "head": backward}
        if s.gradient_checkpointing:
            phases["backward pass, first layer"] = {
                **always, "gradients": before, "activations": kept + again,
                "head": 4.0 * d.table if s.adapter is None else 0.0,
            }  # fmt: skip
        # A tied table's gradient comes in two parts, from the head and from the embedding.
        twice = 4.0 * d.table if d.tied and s.adapter is None else 0.0
        phases["backward pass ends"] = {**always, "gradients": held, "head": twice}
    if s.optimizer == "adamw_torch" and s.gpu:
        # It works on all weights at a time, with a temporary copy of a moment.
        phases["optimiser's step"] = {**always, "gradients": held, "temporary": gradients / sharded}
    if s.reference_rows and d is not None:
        forward, _ = _head(s, s.reference_rows * s.tokens)
        work = s.reference_rows * s.tokens * layer_activations(replace(s, adapter=None), s.tokens)
        phases["reference log-probabilities"] = {
            **base, "gathered layers": gathered, "activations": work, "head": forward,
        }  # fmt: skip
    if s.evaluation_rows and d is not None:
        forward, _ = _head(s, s.evaluation_rows * s.tokens)
        work = s.evaluation_rows * s.tokens * layer_activations(replace(s, adapter=None), s.tokens)
        phases["evaluation"] = {
            **base, **optimiser, "gathered layers": gathered, "activations": work, "head": forward,
        }  # fmt: skip
    if s.sampled:
        cache = logits = None
        if d is not None:
            cache = float(s.sampled * s.sampled_tokens * 2 * d.layers * d.key * s.weight_width)
            logits = float(s.sampled * d.vocabulary * 4 * _SAMPLING_LOGITS)
        # Sampling takes as many forward passes as there are tokens: each process holds the whole model for it.
        model = float(s.parameters * s.held_in) if n > 1 and whole else 0.0
        phases["sampling"] = {**base, "gathered model": model, "key-value cache": cache, "head": logits}
    if not s.gpu:
        # Weights are written from a copy on the CPU; the optimiser's state is gone by then.
        copy = float(s.trains * s.trained_width)
        phases["boundary"] = {**base, "copy to write": copy}
    return Memory({phase: {k: v for k, v in parts.items() if v != 0} for phase, parts in phases.items()})


# ---- Disk ----


@dataclass(frozen=True)
class Files:
    """
    The sizes of what a run writes.

    Args:
        iterate, policy, model: bytes of the weights of a round's iterate, of its policy where that differs, and of a
            checkpoint in that round, by round.
        output: bytes of the weights that the run ends with.
        optimizer: bytes of an optimiser's state on disk.
        tokenizer: bytes of the tokenizer's files, which stand beside most weights.
        rollouts: bytes of the rollouts of each round, which stay.
        rows: bytes of the rows and reference log-probabilities of a round.
    """

    iterate: tuple[float, ...]
    policy: tuple[float, ...]
    model: tuple[float, ...]
    output: float
    optimizer: float = 0.0
    tokenizer: float = 0.0
    rollouts: tuple[float, ...] = ()
    rows: float = 0.0


def full_files(weights: float, rounds: int, **others: Any) -> Files:
    """Of full weights: every copy is as large as the model."""
    each = (float(weights),) * rounds
    return Files(iterate=each, policy=each, model=each, output=float(weights), **others)


def adapter_files(
    adapter: float, rounds: int, fresh: bool = True, output: float | None = None, **others: Any
) -> Files:
    """
    Of a LoRA adapter of `adapter` bytes. Where each round trains a fresh one, what is saved after t rounds is one
    adapter of t times the rank, and beside it the rounds' own, the initial values and the current ones.
    """
    if not fresh:
        each = (float(adapter),) * rounds
        return Files(iterate=each, policy=each, model=each, output=output or float(adapter), **others)
    # At the start of round t there are t rounds behind it: their adapters, the last of which is still the live one in
    # the iterate and is history in the policy.
    iterate = tuple(float(adapter) * (max(t, 1) + 2 + max(t - 1, 0)) for t in range(rounds))
    policy = tuple(float(adapter) * (t + 2 + t) for t in range(rounds))
    model = tuple(float(adapter) * (t + 1 + 2 + t) for t in range(rounds))
    final = float(adapter) * rounds if output is None else output
    return Files(iterate=iterate, policy=policy, model=model, output=final, **others)


@dataclass(frozen=True)
class Saving:
    """
    What is saved when.

    Args:
        epochs: of each round.
        steps_per_epoch: the same in every epoch.
        changes: for each round whether its policy differs from its iterate; False for the first.
        keeps_rounds: whether rounds' state is kept at all (SPO alone keeps none).
        strategy: `save_strategy`.
        save_steps: steps between checkpoints, where the strategy is "steps".
        limit: `save_total_limit`.
        only_model: `save_only_model`.
        keep_iterates: as in the config.
        ends_extrapolated: whether the end of the run sets the last iterate aside while its extrapolation is measured.
        saves_output: whether the run ends with `save_model`, as the scripts do.
        makes_rows: whether each round begins with making its rows, by sampling (`_on_step_end` in
            `rollouts/trainer.py`).
        waits: whether it then stops for labels from elsewhere.
    """

    epochs: tuple[int, ...]
    steps_per_epoch: int
    changes: tuple[bool, ...]
    keeps_rounds: bool = True
    strategy: str = "epoch"
    save_steps: int = 500
    limit: int | None = None
    only_model: bool = False
    keep_iterates: bool = False
    ends_extrapolated: bool = False
    saves_output: bool = True
    makes_rows: bool = False
    waits: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """The step after which each round is over."""
        return tuple(self.steps_per_epoch * epochs for epochs in accumulate(self.epochs))

    def checkpoint_steps(self) -> Iterator[int]:
        """The steps after which a checkpoint is written."""
        total = self.ends[-1]
        steps: set[int] = set()
        if self.strategy == "epoch":
            steps.update(range(self.steps_per_epoch, total + 1, self.steps_per_epoch))
        elif self.strategy == "steps":
            steps.update(range(self.save_steps, total, self.save_steps))
            steps.add(total)  # upstream's last one, whatever the interval
        elif self.strategy != "no":
            # "best": how often is known afterwards; two are the least that have to fit.
            steps.update((self.ends[0], total))
        if self.makes_rows and (self.strategy != "no" or self.waits):
            # What comes next takes long, is paid for, or stops the run: each boundary can be gone on from.
            steps.update(self.ends[:-1])
        yield from sorted(steps)


ROUND_STATE, KEPT, CHECKPOINTS, ROLLOUTS, OUTPUT = (
    "round state", "kept iterates", "checkpoints", "rollouts", "final output",
)  # fmt: skip
_KINDS = (ROUND_STATE, KEPT, CHECKPOINTS, ROLLOUTS, OUTPUT)


@dataclass(frozen=True)
class Disk:
    """
    Attributes:
        peak: the most that the run has on disk at a time.
        parts: what that consists of. A file with several names counts once, for the first of these parts it is in.
        left: what is there when the run is over.
        checkpoints: how many are written.
        at_once: how many there are at a time, at most.
    """

    peak: float
    parts: dict[str, float]
    left: float
    checkpoints: int
    at_once: int


class _Folder:
    """The output folder while a run is played through: files, and the names that keep them."""

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}
        self.names: dict[str, list[int]] = {}
        self.held: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.bytes = [0.0] * len(_KINDS)
        self.peak: list[float] = list(self.bytes)

    def _count(self, file: str, kind: int, change: int) -> None:
        counts = self.names.setdefault(file, [0] * len(_KINDS))
        before = next((k for k, count in enumerate(counts) if count), None)
        counts[kind] += change
        after = next((k for k, count in enumerate(counts) if count), None)
        if before is not None:
            self.bytes[before] -= self.sizes[file]
        if after is not None:
            self.bytes[after] += self.sizes[file]

    def add(self, folder: str, kind: str, files: dict[str, float]) -> None:
        """A folder with files, new ones or further names of those that are there."""
        for file, size in files.items():
            self.sizes.setdefault(file, size)
            self._count(file, _KINDS.index(kind), 1)
        self.held[folder] = (kind, tuple(files))
        if sum(self.bytes) > sum(self.peak):
            self.peak = list(self.bytes)

    def remove(self, folder: str) -> None:
        kind, files = self.held.pop(folder)
        for file in files:
            self._count(file, _KINDS.index(kind), -1)


def disk(files: Files, saving: Saving) -> Disk:
    """Plays a run through: what is written and removed, in the order of the trainer, hard links counted once."""
    folder, ends = _Folder(), saving.ends
    states: list[dict[str, float]] = []

    def policy_of(t: int) -> dict[str, float]:
        iterate = f"iterate {t}"
        return {f"policy {t}": files.policy[t]} if saving.changes[t] else {iterate: files.iterate[t] + files.tokenizer}

    def enter(t: int) -> None:
        if saving.keeps_rounds:
            state = {f"iterate {t}": files.iterate[t] + files.tokenizer, **policy_of(t)}
            if t > 0:
                state |= policy_of(t - 1)
            folder.add(f"round {t}", ROUND_STATE, state)
            if saving.keep_iterates and t > 0:
                name = f"iterate {t}"
                folder.add(f"kept {t}", KEPT, {name: state[name]})
            if files.rollouts:
                folder.add(f"rollouts {t}", ROLLOUTS, {f"rollouts {t}": files.rollouts[t]})
            if files.rows:
                # The rows of a round lie in its folder, and go with it.
                folder.remove(f"round {t}")
                state |= {f"rows {t}": files.rows}
                folder.add(f"round {t}", ROUND_STATE, state)
            if t > 0:
                folder.remove(f"round {t - 1}")
            states.append(state)

    there: list[int] = []
    written = at_once = 0

    def checkpoint(step: int, t: int) -> None:
        nonlocal written, at_once
        own = {f"checkpoint {step}": files.model[t] + files.tokenizer + _SMALL_FILES}
        if not saving.only_model:
            own |= {f"optimiser {step}": files.optimizer}
        folder.add(f"checkpoint {step}", CHECKPOINTS, own | (states[t] if saving.keeps_rounds else {}))
        there.append(step)
        written, at_once = written + 1, max(at_once, len(there))
        while saving.limit and saving.limit > 0 and len(there) > saving.limit:
            folder.remove(f"checkpoint {there.pop(0)}")

    saves = list(saving.checkpoint_steps())
    position = 0
    for t, end in enumerate(ends):
        enter(t)
        while position < len(saves) and saves[position] <= end:
            checkpoint(saves[position], t)
            position += 1
    last = len(ends)
    if saving.keep_iterates and saving.keeps_rounds:
        folder.add(f"kept {last}", KEPT, {"last iterate": files.model[-1] + files.tokenizer})
    if saving.ends_extrapolated:
        folder.add("aside", ROUND_STATE, {"aside": files.model[-1]})
        folder.remove("aside")
    if saving.saves_output:
        folder.add("output", OUTPUT, {"output": files.output + files.tokenizer})
    parts = {kind: size for kind, size in zip(_KINDS, folder.peak, strict=True) if size}
    return Disk(sum(folder.peak), parts, sum(folder.bytes), written, at_once)


def rollout_bytes(prompts: int, generations: int, prompt_tokens: int, completion_tokens: int) -> float:
    """The rollouts of a round on disk, at most: completions may be shorter, and the files are compressed."""
    return float(_ROLLOUT_TOKEN * prompts * (prompt_tokens + generations * completion_tokens))


# ---- The tables of docs/sizing.md ----

# Widths from the models' own configs.
MODELS = {
    "1.5B": Decoder(151936, 1536, 8960, 28, 12, 2, 128, tied=True, attention_bias=True),  # Qwen2.5-1.5B
    "8B": Decoder(128256, 4096, 14336, 32, 32, 8, 128),  # Llama-3.1-8B
    "70B": Decoder(128256, 8192, 28672, 80, 64, 8, 128),  # Llama-3.1-70B
}
CARD = 80 * GB
_PLACES = (
    ("1 GPU", 1, DDP), ("8, DDP", 8, DDP), ("8, ZeRO-2", 8, ZERO2), ("8, FSDP2", 8, FSDP), ("64, FSDP2", 64, FSDP),
    ("64, ZeRO-3", 64, ZERO3),
)  # fmt: skip
_PAIRS: dict[str, Any] = {"rows": 4, "tokens": 1024}
_AHEAD: dict[str, Any] = {"reference_rows": 4}


def _methods(model: Decoder) -> dict[str, Setup]:
    """Micro-batches of 2 pairs (SPR: 4 responses) of 1024 tokens, with gradient checkpointing and accumulation."""
    full = Setup(model.parameters, model, accumulates=True, **_PAIRS)
    adapted = replace(full, adapter=lora(model, 16, everywhere=True), weight_width=2, reference="adapter")
    sampled: dict[str, Any] = {"sampled": 40, "sampled_tokens": 768}
    return {
        "APO, reference model": replace(full, reference="model"),
        "APO, reference ahead": replace(full, **_AHEAD),
        "APO, on-policy, ahead": replace(full, **_AHEAD, **sampled),
        "APO, bf16 weights, ahead": replace(full, **_AHEAD, weight_width=2),
        "APO, adafactor, ahead": replace(
            full, **_AHEAD, optimizer="adafactor", sides=model.layers * 2 * (model.hidden + model.intermediate)
        ),
        "APO, 8-bit AdamW, ahead": replace(full, **_AHEAD, optimizer="adamw_8bit", embedding=model.table),
        "APO, LoRA, bf16 base": adapted,
        "SPO, ahead, SFT rows": replace(full, **_AHEAD, other_rows=2, other_tokens=1024),
        "SPO, unrolled, ahead": replace(full, **_AHEAD, inner="unrolled"),
        "SPR": replace(full, **sampled),
    }


def memory_table(model: Decoder) -> str:
    """GB of a GPU, by method and by what shares the work."""
    lines = [f"| | {' | '.join(place for place, _, _ in _PLACES)} |", f"|---|{'---|' * len(_PLACES)}"]
    for name, setup in _methods(model).items():
        cells = []
        for _, processes, sharding in _PLACES:
            if setup.inner is not None and sharding in (ZERO2, ZERO3):
                # Refused: DeepSpeed keeps the weights that count in a form of its own.
                cells.append("-")
                continue
            peak = memory(replace(setup, processes=processes, sharding=sharding)).peak
            cells.append(f"{peak / GB:.1f}" if peak <= CARD else f"**{peak / GB:.0f}**")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def disk_table(model: Decoder) -> str:
    """GB on disk at the peak of three rounds of one epoch, however many processes train."""
    weights, epochs = 4.0 * model.parameters, (1, 1, 1)
    full = full_files(weights, 3, optimizer=2 * weights)
    small = lora(model, 16, everywhere=True).parameters * 4.0
    moves, stays = (False, True, True), (False, False, False)
    runs: dict[str, tuple[Files, Saving]] = {
        "APO": (full, Saving(epochs, 100, moves)),
        "APO, LoRA": (adapter_files(small, 3, optimizer=2 * small), Saving(epochs, 100, moves)),
        "SPO, 3 epochs": (
            full_files(weights, 1, optimizer=2 * weights), Saving((3,), 100, (False,), keeps_rounds=False),
        ),
        "SPR": (full, Saving(epochs, 100, stays)),
    }  # fmt: skip
    columns: dict[str, dict[str, Any]] = {
        "no checkpoints": {"strategy": "no"},
        "`save_total_limit` 1": {"limit": 1},
        "the same, `save_only_model`": {"limit": 1, "only_model": True},
        "a checkpoint an epoch": {},
        "the same, `keep_iterates`": {"keep_iterates": True},
    }
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, (files, saving) in runs.items():
        peaks = [disk(files, replace(saving, **settings)).peak for settings in columns.values()]
        lines.append(f"| {name} | {' | '.join(f'{peak / GB:.1f}' for peak in peaks)} |")
    return "\n".join(lines)


def tables() -> str:
    """All tables, in Markdown."""
    parts = []
    for name, model in MODELS.items():
        parts += [f"### {name}: {model.parameters / GB:.2f} billion parameters", "Memory of a GPU, GB:"]
        parts += [memory_table(model), "Disk, GB, three rounds:", disk_table(model)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables())
