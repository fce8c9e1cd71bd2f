"""
What a machine without a GPU cannot tell, in one run on one that has one: speed and memory as ratios, and whether what
holds to the bit on a CPU holds there.

    python recipes/benchmarks/gpu_checks.py --out gpu_checks.json
    python recipes/benchmarks/gpu_checks.py --sections correctness sampling
    python recipes/benchmarks/gpu_checks.py --cpu-smoke

It needs no network and takes less than eight minutes on a GPU of this decade: sections that have not begun by
`--minutes` are left out, and said to be. A Llama of 0.3 billion random parameters, made here, in bfloat16 with
gradient checkpointing. `--cpu-smoke` runs the same code with a tiny model on the CPU in minutes: its numbers
mean nothing, it shows that the code runs.

- correctness: APO with alpha 0 and one round against DPOTrainer, SPR with equal rewards against SFTTrainer (losses of
  every step, with deterministic kernels; the stock trainer against itself beside it), and the losses after a resume at
  a boundary against those of the run that was not interrupted.
- steps: seconds a training step and peak memory of whole `train()` calls, each method against its stock trainer, in
  turn and in a drawn order, `--repeats` times; of a run the median step counts, the first ones being warm-up. SPO's
  solvers `unrolled` and `alternating` refuse bfloat16 weights: they and a DPOTrainer of their own have float32 weights
  under bfloat16 autocast.
- memory: SPRTrainer's whole run, sampling and scoring included, against SFTTrainer on rows of the same length.
- boundary: bytes that an extrapolation moves (two reads, one write) a second against those of a copy on the device
  (one read, one write); and the boundary's own step, which reads the older weights from disk.
- lora: three rounds of rank 16 against a stock LoRA DPOTrainer, step time round by round; with bitsandbytes also on a
  base in 4 bits.
- sampling: tokens a second of our sampler against `model.generate`; with vLLM also through `use_vllm`'s code, and how
  far its log-probabilities are from the policy's own.

A failure is a row of the table, and the rest goes on; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


if "--cpu-smoke" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")  # no telemetry
# For deterministic kernels; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))

import common
import datasets
import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_extras import (
    APOConfig,
    APOSPOConfig,
    APOSPOTrainer,
    APOTrainer,
    SPOConfig,
    SPOTrainer,
    SPRConfig,
    SPRTrainer,
    extrapolate,
)
from trl_extras.rollouts.sampling import SamplingSettings, TransformersSampler
from trl_extras.rounds.state import FullWeights


datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LARGE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
LORA_ROUNDS = 3
WARMUP = 2


class Checks:
    """The settings of a run, its model, and what has been found."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder = folder
        self.small: bool = options.cpu_smoke
        self.repeats: int = options.repeats
        self.steps = 4 if self.small else 10
        self.batch = 2 if self.small else 4
        self.tokens = 24 if self.small else 512
        self.generations, self.new_tokens = (2, 8) if self.small else (8, 256)
        self.begun, self.minutes = time.monotonic(), options.minutes
        self.rows: list[dict[str, Any]] = []
        self.section = ""
        self._runs = 0
        self._model: Any = None
        self.tokenizer = self._make_tokenizer()

    # ---- Model and data ----

    def _make_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word, a word for each of the model's tokens: whatever is sampled is text."""
        shape = SMALL if self.small else LARGE
        words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, shape["vocab_size"])}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
        )

    def model(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A copy of the model; one stays on the device."""
        if self._model is None:
            torch.manual_seed(0)
            config = LlamaConfig(
                **(SMALL if self.small else LARGE), max_position_embeddings=2048, tie_word_embeddings=True,
                pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )  # fmt: skip
            with DEVICE:
                self._model = LlamaForCausalLM(config).to(torch.bfloat16)
        return copy.deepcopy(self._model).to(dtype)

    def saved(self) -> str:
        """The model and its tokenizer in a folder, for what loads by name."""
        folder = self.folder / "model"
        if not folder.exists():
            self.model().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return str(folder)

    def pairs(self, rows: int, seed: int = 0) -> datasets.Dataset:
        """Pairs of words that even the small model knows, all equally long."""
        draw = random.Random(seed)

        def text(n: int) -> str:
            return " ".join(f"w{draw.randrange(2, 300)}" for _ in range(n))

        prompt = self.tokens // 4
        return datasets.Dataset.from_list(
            [
                {"prompt": text(prompt) + " ", "chosen": text(answer), "rejected": text(answer)}
                for answer in [self.tokens - prompt - 1] * rows
            ]
        )

    def completions(self, rows: int, equal: bool = False) -> datasets.Dataset:
        pairs, draw = self.pairs(rows), random.Random(1)
        rewards = [1.0 if equal else draw.random() for _ in range(rows)]
        return pairs.rename_column("chosen", "completion").remove_columns("rejected").add_column("reward", rewards)

    def arguments(self, **kwargs: Any) -> dict[str, Any]:
        self._runs += 1
        return common.arguments(
            self.folder / f"run-{self._runs}",
            self.batch,
            **{"gradient_checkpointing": True, "logging_steps": 1, "train_sampling_strategy": "sequential", **kwargs},
        )

    # ---- What is found ----

    def note(self, what: str, value: str, wanted: str = "", failed: bool = False, **numbers: Any) -> None:
        row = {"section": self.section, "what": what, "value": value, "wanted": wanted, "failed": failed, **numbers}
        self.rows.append(row)
        print(f"[{time.monotonic() - self.begun:5.0f} s] {self.section}: {what}: {value}", file=sys.stderr, flush=True)

    def ratio(self, what: str, each: list[float], wanted: str = "", **numbers: Any) -> None:
        self.note(what, spread(each), wanted, ratios=each, **numbers)

    def out_of_time(self) -> bool:
        return time.monotonic() - self.begun > 60 * self.minutes


def spread(each: list[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def tidy() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """The highest memory on the device since, GB, beyond what was there before; 0 on a CPU."""
    tidy()
    if not GPU:
        yield lambda: 0.0
        return
    before, seen, reset = torch.cuda.memory_allocated(), [0], torch.cuda.reset_peak_memory_stats

    def noted(*args: Any) -> None:
        # SPRTrainer looks at its phases and sets torch's peak back: what was before counts all the same.
        seen.append(torch.cuda.max_memory_allocated())
        reset(*args)

    reset()
    torch.cuda.reset_peak_memory_stats = noted
    try:
        yield lambda: (max(*seen, torch.cuda.max_memory_allocated()) - before) / 1e9
    finally:
        torch.cuda.reset_peak_memory_stats = reset


class Clock(TrainerCallback):
    """Seconds of every step, from its beginning to the end of the optimizer's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.begun)


def run(make: Callable[[], Any]) -> dict[str, Any]:
    """Train once: seconds a step, peak memory and losses."""
    with peak() as highest:
        trainer, clock = make(), Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
        wait()
        found = {
            "seconds": clock.seconds,
            "peak_gb": highest(),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "summaries": getattr(trainer, "round_summaries", []),
        }
        del trainer
    tidy()
    return found


def in_turn(
    checks: Checks, makers: dict[str, Callable[[], Any]], repeats: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Each of them `repeats` times, in a drawn order; one that fails is told of and left out."""
    draw, found = random.Random(0), {name: [] for name in makers}
    for _ in range(repeats or checks.repeats):
        for name in draw.sample(list(makers), len(makers)):
            if name not in found or (checks.out_of_time() and found[name]):
                continue
            try:
                found[name].append(run(makers[name]))
            except Exception as error:
                failed(checks, name, error)
                del found[name]
                tidy()
    return found


def failed(checks: Checks, what: str, error: Exception) -> None:
    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    checks.note(what, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "", True)


def compare(
    checks: Checks, found: dict[str, list[dict[str, Any]]], stock: str, wanted: dict[str, str], steps: slice
) -> None:
    """Ratios of step time and of peak memory to those of the stock trainer's run of the same repeat."""
    for name, runs in found.items():
        if name == stock or stock not in found:
            continue
        of_both = list(zip(found[stock], runs, strict=False))
        times = [
            statistics.median(ours["seconds"][steps]) / statistics.median(theirs["seconds"][steps])
            for theirs, ours in of_both
        ]
        seconds = statistics.median(runs[0]["seconds"][steps])
        checks.ratio(f"{name}: step time against {stock}", times, wanted.get(name, ""), seconds=seconds)
        if GPU:
            peaks = [ours["peak_gb"] / theirs["peak_gb"] for theirs, ours in of_both]
            checks.ratio(f"{name}: peak memory against {stock}", peaks, peak_gb=[r["peak_gb"] for r in runs])


# ---- Trainers ----


def preference_trainer(checks: Checks, kind: str, steps: int, dtype: torch.dtype, **own: Any) -> Any:
    """A trainer on pairs: `kind` is dpo, apo, spo or apo_spo; `own` are settings of its config."""
    classes: dict[str, tuple[Any, Any]] = {
        "dpo": (DPOConfig, DPOTrainer), "apo": (APOConfig, APOTrainer), "spo": (SPOConfig, SPOTrainer),
        "apo_spo": (APOSPOConfig, APOSPOTrainer),
    }  # fmt: skip
    config, trainer = classes[kind]
    rounds = own.get("num_rounds", 2) if "apo" in kind else 1
    more: dict[str, Any] = {}
    if kind == "spo" and own.pop("sft_rows", False):
        more["sft_dataset"] = checks.completions(steps * checks.batch).remove_columns("reward")
    settings = {"num_train_epochs": 1, **({"num_rounds": rounds} if "apo" in kind else {}), **own}
    given = settings.pop("given", {})
    policy = given.pop("model", None)
    if policy is None:
        policy = checks.model(dtype)
        if "peft_config" not in given and "apo" not in kind:
            # Upstream would load a reference from the model's path; it has none.
            more["ref_model"] = checks.model(dtype)
    return trainer(
        model=policy,
        args=config(**checks.arguments(**settings)),
        train_dataset=checks.pairs(steps * checks.batch),
        processing_class=checks.tokenizer,
        **given,
        **more,
    )


def fine_tuner(checks: Checks, kind: str, steps: int, **own: Any) -> Any:
    rows = own.pop("data", None) or checks.completions(steps * checks.batch, equal=own.pop("equal", False))
    given = {"model": checks.model(), "processing_class": checks.tokenizer}
    if kind == "sft":
        config = SFTConfig(**checks.arguments(num_train_epochs=1, **own))
        return SFTTrainer(args=config, train_dataset=rows.remove_columns("reward"), **given)
    args = SPRConfig(**checks.arguments(**{"num_generations": 0, "num_rounds": 2, **own}))
    return SPRTrainer(args=args, train_dataset=rows, **given)


# ---- Sections ----


def check_correctness(checks: Checks) -> None:
    # A rate that bfloat16 weights notice.
    steps, rate = 4, {"learning_rate": 1e-3}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for what, stock, ours in (
            (
                "APO, alpha 0, one round, against DPOTrainer",
                lambda: preference_trainer(checks, "dpo", steps, torch.bfloat16, **rate),
                lambda: preference_trainer(
                    checks, "apo", steps, torch.bfloat16, num_rounds=1, extrapolation_alpha=[0.0], **rate
                ),
            ),
            (
                "SPR, equal rewards, against SFTTrainer",
                lambda: fine_tuner(checks, "sft", steps, equal=True, **rate),
                lambda: fine_tuner(checks, "spr", steps, equal=True, num_rounds=1, **rate),
            ),
        ):
            try:
                theirs, again, own = run(stock)["losses"], run(stock)["losses"], run(ours)["losses"]
                noise = max(abs(a - b) for a, b in zip(theirs, again, strict=True))
                apart = max(abs(a - b) for a, b in zip(theirs, own, strict=True))
                value = f"{apart:.3g} (the stock trainer against itself: {noise:.3g}), {len(own)} steps"
                checks.note(f"largest difference of losses: {what}", value, "0", apart > noise, losses=[theirs, own])
            except Exception as error:
                failed(checks, what, error)
        check_resume(checks, steps)
    finally:
        torch.use_deterministic_algorithms(False)


def check_resume(checks: Checks, steps: int) -> None:
    rates = {"learning_rate": 1e-3, "extrapolation_alpha": [0.3], "save_strategy": "steps", "save_steps": steps}

    def make() -> Any:
        return preference_trainer(checks, "apo", 2 * steps, torch.bfloat16, num_rounds=2, **rates)

    def losses(trainer: Any) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

    try:
        trainer = make()
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        whole, checkpoint = losses(trainer), Path(trainer.args.output_dir) / f"checkpoint-{steps}"
        del trainer
        tidy()
        again = make()
        again.remove_callback(PrinterCallback)
        # Its own folder, as after a copy to another machine.
        again.train(resume_from_checkpoint=str(checkpoint))
        resumed = {step: loss for step, loss in losses(again).items() if step > steps}
        del again
        tidy()
        apart = max(abs(resumed[step] - whole[step]) for step in resumed)
        value = f"{apart:.3g}, steps {min(resumed)} to {max(resumed)}"
        checks.note(
            "largest difference of losses: resumed at a boundary, against uninterrupted", value, "0", apart > 0
        )
    except Exception as error:
        failed(checks, "resume at a boundary", error)


def check_steps(checks: Checks) -> None:
    steps, seen = checks.steps, slice(WARMUP, checks.steps)

    def made(kind: str, dtype: torch.dtype = torch.bfloat16, **own: Any) -> Callable[[], Any]:
        rounds = 2 if "apo" in kind else 1
        return lambda: preference_trainer(checks, kind, steps * rounds, dtype, **own)

    stock = "DPOTrainer"
    found = in_turn(
        checks,
        {
            stock: made("dpo"),
            "DPOTrainer again (the yardstick)": made("dpo"),
            "APO": made("apo"),
            "SPO, penalty": made("spo"),
            "SPO, penalty, SFT rows as well": made("spo", sft_rows=True),
            "APO x SPO, penalty": made("apo_spo"),
        },
    )
    wanted = {"APO": "at most 1.03", "SPO, penalty": "at most 1.03", "SPO, penalty, SFT rows as well": "at most 1.55"}
    compare(checks, found, stock, wanted, seen)
    stock = "DPOTrainer, float32 weights"
    inner = {"inner_learning_rate": 1e-6}
    found = in_turn(
        checks,
        {
            stock: made("dpo", torch.float32),
            "SPO, unrolled": made("spo", torch.float32, bilevel_solver="unrolled", **inner),
            "SPO, unrolled, central difference": made(
                "spo", torch.float32, bilevel_solver="unrolled", hypergradient="central_difference", **inner
            ),
            "SPO, alternating": made("spo", torch.float32, bilevel_solver="alternating", **inner),
        },
    )
    wanted = {"SPO, unrolled": "at most 1.65", "SPO, unrolled, central difference": "at most 2.8"}
    compare(checks, found, stock, wanted, seen)
    stock = "SFTTrainer"
    found = in_turn(
        checks,
        {
            stock: lambda: fine_tuner(checks, "sft", steps),
            "SFTTrainer again (the yardstick)": lambda: fine_tuner(checks, "sft", steps),
            "SPR": lambda: fine_tuner(checks, "spr", 2 * steps),
        },
    )
    compare(checks, found, stock, {"SPR": "at most 1.03"}, seen)


def last_word(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that costs nothing and has few ties."""
    return [float(sum(map(ord, text[-6:]))) for text in completions]


def check_memory(checks: Checks) -> None:
    # Sampled responses as long as the given ones; the end token has to be unlikely, as with random weights it is.
    prompt = checks.tokens // 4
    prompts = checks.pairs(4 * checks.batch).select_columns(["prompt"])

    def whole() -> Any:
        args = SPRConfig(
            **checks.arguments(
                num_rounds=2, num_generations=2, max_completion_length=checks.tokens - prompt,
                generation_batch_size=2 * checks.batch, max_length=checks.tokens,
            )
        )  # fmt: skip
        return SPRTrainer(
            model=checks.model(), args=args, train_dataset=prompts, processing_class=checks.tokenizer,
            reward_funcs=last_word,
        )  # fmt: skip

    # Memory hardly differs from run to run, and sampling takes long.
    stock = {"SFTTrainer": lambda: fine_tuner(checks, "sft", 4)}
    found = in_turn(checks, {**stock, "SPR, whole run": whole}, min(checks.repeats, 2))
    if len(found) < 2:
        return
    peaks = {name: [r["peak_gb"] for r in runs] for name, runs in found.items()}
    if GPU:
        both = list(zip(*peaks.values(), strict=False))
        each = [ours / theirs for theirs, ours in both]
        checks.ratio("SPR's whole run: peak memory against SFTTrainer", each, "at most 1.05", peak_gb=peaks)
    phases = [
        {key: value for key, value in row.items() if key.endswith("_memory_gb")}
        for row in found["SPR, whole run"][0]["summaries"]
    ]
    text = ", ".join(f"{name.removesuffix('_memory_gb')} {value:.2f}" for name, value in phases[-1].items() if value)
    checks.note("SPR, peak of each phase of the second round, GB", text, phases=phases)


def check_boundary(checks: Checks) -> None:
    model = checks.model()
    new = {name: parameter.detach() for name, parameter in model.named_parameters()}
    old = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in new.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in new.values())
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def timed(work: Callable[[], Any]) -> float:
        wait()
        begun = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begun

    copies, steps = [], []
    for turn in range(checks.repeats + 1):
        copied, stepped = timed(lambda: target.copy_(source)), timed(lambda: extrapolate(new, old, 0.3))
        if turn:
            # The first ones are warm-up.
            copies.append(2 * size / copied / 1e9)
            steps.append(3 * size / stepped / 1e9)
    checks.note("copy on the device, GB/s", spread(copies), each=copies)
    checks.note("extrapolation on the device, GB/s", spread(steps), each=steps, bytes=3 * size)
    checks.ratio("extrapolation against a copy, bytes a second", [a / b for a, b in zip(steps, copies, strict=True)])
    weights, folder = FullWeights(model), checks.folder / "iterate"
    saved = timed(lambda: weights.save(folder, True))
    moved = [timed(lambda: weights.extrapolate(folder, 0.3)) for _ in range(checks.repeats)]
    checks.note("saving an iterate, seconds", f"{saved:.3f}", bytes=size)
    checks.note("the boundary's extrapolation, older weights from disk, seconds", spread(moved), bytes=3 * size)


def adapter() -> LoraConfig:
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )


def check_lora(checks: Checks) -> None:
    steps = checks.steps

    def made(kind: str, load: Callable[[], Any] | None = None) -> Callable[[], Any]:
        def make() -> Any:
            given = {"peft_config": adapter()} | ({} if load is None else {"model": load()})
            own = {"num_rounds": LORA_ROUNDS} if kind == "apo" else {}
            return preference_trainer(checks, kind, steps * LORA_ROUNDS, torch.bfloat16, given=given, **own)

        return make

    def by_round(found: dict[str, list[dict[str, Any]]], stock: str, name: str, title: str) -> None:
        if not {stock, name} <= found.keys():
            return
        both = list(zip(found[stock], found[name], strict=False))
        for number in range(LORA_ROUNDS):
            some = slice(number * steps + WARMUP, (number + 1) * steps)
            each = [statistics.median(b["seconds"][some]) / statistics.median(a["seconds"][some]) for a, b in both]
            wanted = ("at most 1.03", "", "at most 1.10")[number] if "again" not in name else ""
            checks.ratio(f"{title}, step time in round {number + 1}", each, wanted)
        if GPU:
            peaks = [b["peak_gb"] / a["peak_gb"] for a, b in both]
            checks.ratio(f"{title}, peak memory", peaks, "at most 1.03" if "again" not in name else "")

    stock = "DPOTrainer, LoRA"
    found = in_turn(checks, {stock: made("dpo"), "DPOTrainer, LoRA, again": made("dpo"), "APO, LoRA": made("apo")})
    by_round(found, stock, "DPOTrainer, LoRA, again", "DPOTrainer, LoRA, against itself (the yardstick)")
    by_round(found, stock, "APO, LoRA", "APO, LoRA rank 16, against DPOTrainer")
    for row in (found.get("APO, LoRA") or [{"summaries": []}])[0]["summaries"]:
        checks.note(f"APO, LoRA: boundary of round {row['round'] + 1}, seconds", f"{row['boundary_weights_seconds']}")
    if find_spec("bitsandbytes") is None or not GPU:
        checks.note("QLoRA", "left out: it needs bitsandbytes and a GPU")
        return
    folder = checks.saved()

    def quantized() -> Any:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)

    stock = "DPOTrainer, QLoRA"
    found = in_turn(checks, {stock: made("dpo", quantized), "APO, QLoRA": made("apo", quantized)})
    by_round(found, stock, "APO, QLoRA", "APO, QLoRA rank 16, against DPOTrainer")


def check_sampling(checks: Checks) -> None:
    model = checks.model().eval()
    # Random weights give nearly flat distributions; peaked as a trained model's they cost what sampling costs in use.
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    draw, words = random.Random(0), (SMALL if checks.small else LARGE)["vocab_size"]
    prompts = [[draw.randrange(2, words) for _ in range(draw.randint(16, 32))] for _ in range(8)]
    num, most = checks.generations, checks.new_tokens
    settings = SamplingSettings(0.7, 0.9, 0, None, 1.0, most, (1,), 0)
    sampler = TransformersSampler(model, settings)
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=most, eos_token_id=1, pad_token_id=0,
        num_return_sequences=num,
    )  # fmt: skip
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=DEVICE)

    @torch.inference_mode()
    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        out = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
        return int((out[:, longest:] != 0).sum())

    def ours(seed: int) -> int:
        return sum(len(completion.ids) for group in sampler(prompts, num, seed) for completion in group)

    kinds: dict[str, Callable[[int], int]] = {"generate": generate, "generate again": generate, "sampler": ours}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(checks.repeats + 1):
        for name in draw.sample(list(kinds), len(kinds)):
            wait()
            begun = time.perf_counter()
            tokens = kinds[name](turn)
            wait()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - begun))
    checks.note("`model.generate`, tokens a second", spread(rates["generate"]), each=rates["generate"])
    for name, title in (("generate again", "itself (the yardstick)"), ("sampler", "our sampler")):
        each = [b / a for a, b in zip(rates["generate"], rates[name], strict=True)]
        checks.ratio(f"tokens a second of {title} against `model.generate`", each)
    if find_spec("vllm") is None or not GPU:
        checks.note("vLLM", "left out: it needs vLLM and a GPU")
        return
    try:
        check_vllm(checks, model, prompts, settings, statistics.median(rates["generate"]))
    except Exception as error:
        failed(checks, "vLLM", error)


def check_vllm(
    checks: Checks, model: Any, prompts: list[list[int]], settings: SamplingSettings, generate: float
) -> None:
    """The sampler that `use_vllm` has, colocated; many prompts at a time, as it is used."""
    from accelerate import Accelerator

    from trl_extras.rollouts.config import SamplingConfig
    from trl_extras.rollouts.vllm import VLLMSampler

    folder = checks.folder / "vllm"
    model.save_pretrained(folder)
    checks.tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    many, num = [ids for ids in prompts for _ in range(8)], checks.generations
    config = SamplingConfig(use_vllm=True, vllm_max_model_length=1024, max_completion_length=checks.new_tokens)
    sampler = VLLMSampler(config, Accelerator(), checks.tokenizer, settings, len(many) * num)
    begun = time.perf_counter()
    with sampler.phase(model, "first"):
        checks.note("vLLM: engine and weights, seconds", f"{time.perf_counter() - begun:.1f}")
        rates = []
        for turn in range(checks.repeats + 1):
            begun = time.perf_counter()
            groups = sampler(many, num, turn)
            tokens = sum(len(completion.ids) for group in groups for completion in group)
            if turn:
                rates.append(tokens / (time.perf_counter() - begun))
        again = sampler(many, num, turn)
        same = sum(a.ids == b.ids for x, y in zip(groups, again, strict=True) for a, b in zip(x, y, strict=True))
    checks.note(
        f"vLLM, {len(many)} prompts x {num}: tokens a second against `model.generate` on {len(prompts)} x {num}",
        spread([rate / generate for rate in rates]),
        each=rates,
    )
    checks.note("vLLM: completions that the same seed gives again", f"{same} of {len(many) * num}", "all")
    # Other weights have to arrive: the log-probabilities are then those of the weights that are live now.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    begun = time.perf_counter()
    with sampler.phase(model, "second"):
        checks.note("vLLM: bringing weights up to date, seconds", f"{time.perf_counter() - begun:.2f}")
        apart = []
        for ids, (completion,) in zip(prompts, sampler(prompts, 1, 5), strict=True):
            apart.append(abs(log_probability(model, ids, completion.ids, settings) - completion.logp))
            apart[-1] /= len(completion.ids)
    value = f"{statistics.mean(apart):.4f} nats a token, the largest {max(apart):.4f}"
    checks.note(
        "vLLM: log-probabilities against the policy's own, after an update", value, "below 0.05", max(apart) > 0.5
    )


@torch.inference_mode()
def log_probability(model: Any, prompt: list[int], ids: list[int], settings: SamplingSettings) -> float:
    """Of a completion under the distribution that was sampled from; a token at its edge may be outside for us."""
    logits = model(torch.tensor([prompt + ids], device=DEVICE)).logits[0, len(prompt) - 1 : -1].float()
    scores = settings.processors()(torch.tensor([prompt], device=DEVICE).expand(len(ids), -1), logits)
    found = scores.log_softmax(-1).gather(1, torch.tensor(ids, device=DEVICE)[:, None]).squeeze(1)
    return float(found[found.isfinite()].sum())


SECTIONS: dict[str, Callable[[Checks], None]] = {
    "correctness": check_correctness,
    "steps": check_steps,
    "lora": check_lora,
    "sampling": check_sampling,
    "memory": check_memory,
    "boundary": check_boundary,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each configuration")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no further section begins")
    parser.add_argument("--out", type=Path, help="where to write what was found, as JSON")
    parser.add_argument("--dir", help="where to put temporary files")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny model on the CPU: does the code run?")
    options = parser.parse_args()
    if options.cpu_smoke:
        options.repeats = 1
    elif not GPU:
        parser.error("there is no CUDA GPU; --cpu-smoke runs the code without one")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        checks = Checks(options, Path(folder))
        for name in options.sections:
            checks.section = name
            if checks.out_of_time():
                checks.note("-", f"left out: {options.minutes:g} minutes are over")
                continue
            try:
                SECTIONS[name](checks)
            except Exception as error:
                failed(checks, "-", error)
            tidy()
    seconds = time.monotonic() - checks.begun
    about = f"{common.machine()}, TRL {version('trl')}, transformers {version('transformers')}; {seconds:.0f} s"
    print(f"\n{about}{'; SMOKE: the numbers mean nothing' * options.cpu_smoke}\n")
    print("| section | what | median (least to largest) | wanted |\n|---|---|---|---|")
    for row in checks.rows:
        print(f"| {row['section']} | {row['what']} | {row['value']} | {row['wanted']} |")
    if options.out is not None:
        found = {"about": about, "smoke": options.cpu_smoke, "repeats": options.repeats, "rows": checks.rows}
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(any(row["failed"] for row in checks.rows))


def version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


if __name__ == "__main__":
    raise SystemExit(main())
