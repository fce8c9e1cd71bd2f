"""
Sampling with vLLM, which is not installed here: TRL's own `VLLMGeneration` and `VLLMClient` run, over a stand-in for
what they take from vLLM itself. The stand-in samples with transformers from weights of its own, which it gets only by
the way that vLLM gets them: so a run with it has to be the run without it.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import GRPOConfig
from trl.generation import vllm_client, vllm_generation

from tests import tiny
from trl_extras import APOConfig, APOSPOConfig, APOSPOTrainer, APOTrainer, SPRConfig, SPRTrainer
from trl_extras.errors import ConfigurationError
from trl_extras.rollouts import vllm
from trl_extras.rollouts.config import SamplingConfig
from trl_extras.rollouts.sampling import Batch, SamplingSettings, TransformersSampler
from trl_extras.rollouts.vllm import SamplingError, VLLMSampler, base_untouched, check_vllm, wait_for_server


def threes(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(word.endswith("3") for word in text.split())) for text in completions]


SETTINGS: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
    "max_completion_length": 6, "stop_token_ids": (1,), "pad_token_id": 0,
}  # fmt: skip


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ---- The stand-in ----


class Engine:
    """What both kinds have: weights of its own, loaded by name, and sampling from them."""

    def __init__(self, model: str):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)
        self.received: list[dict[str, torch.Tensor]] = []
        self.asked: list[dict[str, Any]] = []

    def begin(self) -> None:
        self.received.append({})

    def load(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self.received[-1], "twice"
        self.received[-1][name] = tensor.detach().clone()
        with torch.no_grad():
            dict(self.model.named_parameters())[name].copy_(tensor)

    def sample(self, prompts: list[list[int]], n: int, asked: dict[str, Any], seed: int) -> list[list[Any]]:
        assert all(bool(p.isfinite().all()) for p in self.model.parameters()), "weights that never came"
        self.asked.append({"prompts": prompts, **asked})
        assert asked["ignore_eos"] is True
        settings = SamplingSettings(
            temperature=asked["temperature"],
            top_p=asked["top_p"],
            top_k=asked["top_k"],
            min_p=asked["min_p"] or None,
            repetition_penalty=asked["repetition_penalty"],
            max_completion_length=asked["max_tokens"],
            stop_token_ids=tuple(asked["stop_token_ids"]),
            pad_token_id=0,
        )
        return TransformersSampler(self.model, settings)(prompts, n, seed)


class LLM:
    """`vllm.LLM`, as far as TRL uses it."""

    made: ClassVar[list[LLM]] = []
    # Of a launcher, which TRL sets for vLLM where there is none. They go when the engine has started: with them the
    # next trainer of this process would believe that it has been launched, and leave a process group to later tests.
    lacking: ClassVar[list[str]] = []

    def __init__(self, model: str, **kwargs: Any):
        # As vLLM does where it runs in the process.
        set_seed(kwargs["seed"])
        self.kwargs, self.engine = kwargs, Engine(model)
        self.calls: list[str] = []
        self.awake = {"weights", "kv_cache"}
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)
        LLM.made.append(self)
        for name in LLM.lacking:
            os.environ.pop(name)

    def _load_weights(self, pairs: list[tuple[str, torch.Tensor]]) -> None:
        assert "weights" in self.awake
        if not self.calls or self.calls[-1] != "load":
            self.calls.append("load")
            self.engine.begin()
        for name, tensor in pairs:
            self.engine.load(name, tensor)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")
        self.awake |= set(tags)

    def sleep(self, level: int) -> None:
        assert level == 2
        self.calls.append("sleep")
        self.awake = set()
        with torch.no_grad():
            for parameter in self.engine.model.parameters():
                parameter.fill_(torch.nan)

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append("generate")
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        # Unseeded requests draw from the random numbers of the process.
        groups = self.engine.sample(ids, 1, vars(sampling_params), torch.initial_seed())
        torch.rand(7), random.random(), np.random.rand()
        return [
            SimpleNamespace(prompt_token_ids=prompt, outputs=[_output(completion) for completion in group])
            for prompt, group in zip(ids, groups, strict=True)
        ]


def _spread(completion: Any) -> list[float]:
    """Log-probabilities of tokens whose sum is the completion's, to the bit."""
    return [completion.logp] + [0.0] * (len(completion.ids) - 1)


def _output(completion: Any) -> Any:
    pairs = zip(completion.ids, _spread(completion), strict=True)
    logprobs = [{token: SimpleNamespace(logprob=value, rank=1)} for token, value in pairs]
    return SimpleNamespace(token_ids=completion.ids, logprobs=logprobs)


class Server:
    """`vllm serve`, as far as TRL's client speaks to it."""

    def __init__(self, model: str, mode: str = "processed_logprobs"):
        self.engine, self.mode = Engine(model), mode
        self.asked: list[str] = []
        self.announced: list[dict[str, Any]] = []
        self.failing: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self, None)

            def do_POST(self) -> None:
                outer.answer(self, json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}"))

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, handler: Any, body: Any) -> None:
        path = handler.path.split("?")[0]
        self.asked.append(path)
        failing = path == self.failing
        if path == "/v1/completions" and not failing:
            said: Any = {"choices": self._choices(body)}
        elif path == "/update_weights":
            self.announced.append(body["update_info"])
            said = {}
        else:
            info = {"model_config": {"logprobs_mode": self.mode}, "weight_transfer_config": {"backend": "nccl"}}
            said = {
                "/health": {}, "/v1/models": {"data": [{"id": "tiny"}]}, "/server_info": {"vllm_config": info},
                "/get_world_size": {"world_size": 1}, "/start_weight_update": {}, "/finish_weight_update": {},
                "/reset_prefix_cache": {"success": True},
            }.get(path)  # fmt: skip
        data = json.dumps(said).encode()
        handler.send_response(400 if failing else 404 if said is None else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _choices(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        assert asked["return_token_ids"]
        assert asked["return_tokens_as_token_ids"]
        assert "seed" not in asked, "one seed for all would tie the prompts of a batch to each other"
        choices = []
        for prompt, group in zip(
            asked["prompt"],
            self.engine.sample(asked["prompt"], asked["n"], asked, len(self.asked)),
            strict=True,
        ):
            for completion in group:
                names = [f"token_id:{token}" for token in completion.ids]
                choices.append(
                    {
                        "prompt_token_ids": prompt,
                        "token_ids": completion.ids,
                        "logprobs": {
                            "tokens": names,
                            "token_logprobs": _spread(completion),
                            "top_logprobs": [{} for _ in names],
                        },
                    }
                )
        return choices


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as if it were there, and a GPU."""
    LLM.made, LLM.lacking = [], [name for name in LAUNCHED if name not in os.environ]
    for module in (vllm_generation, vllm_client, vllm):
        monkeypatch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm, "has_gpu", lambda: True)
    monkeypatch.setattr(vllm, "_PAUSE", 0.05)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "StructuredOutputsParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "empty_cache", lambda: None)


def serve(base: str, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server that weights reach within the process, since NCCL needs GPUs on both sides."""
    running = Server(base)

    class Transfer:
        @staticmethod
        def trainer_send_weights(iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: Any) -> None:
            assert trainer_args.group == "group"
            running.engine.begin()
            for name, tensor in iterator:
                running.engine.load(name, tensor)

    def join(self: Any, device: Any = 0) -> None:
        # What TRL's own asks before it joins.
        assert self.get_server_info()["weight_transfer_config"] is not None
        assert self.get_world_size() == 1
        self.communicator = "group"

    monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", Transfer, raising=False)
    monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", False)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", join)
    return running


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


@pytest.fixture
def server(base: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = serve(str(base), monkeypatch)
    yield running
    running.close()


@pytest.fixture
def make(make_apo: Any) -> Callable[..., Any]:
    def made(folder: str = "out", **kwargs: Any) -> Any:
        defaults: dict[str, Any] = {
            "data": tiny.make_pairs(12).select_columns(["prompt"]), "num_rounds": 2, "num_generations": 3,
            "max_completion_length": 6, "generation_batch_size": 9, "round_data": "reuse", "prompts_per_round": 6,
            "reward_funcs": threes, "use_cpu": False, "bf16": False, "extrapolation_alpha": 0.5,
        }  # fmt: skip
        return make_apo(folder, **{**defaults, **kwargs})

    return made


def rollouts(out: Path, round_index: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        out / f"_rounds/rollouts/round-{round_index:04d}/rollouts.parquet"
    ).to_pylist()
    return rows


# ---- Colocated ----


def test_a_run_with_a_colocated_engine_is_the_run_without(
    make: Any, tmp_path: Path, installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, seeds, ends, settings, log-probabilities, and training's own random numbers: to the bit."""
    heldout = {"eval_dataset": tiny.make_pairs(4, seed=8).select_columns(["prompt"]), "top_p": 0.95, "top_k": 40}
    # Shuffled, so that random numbers of training that had been touched would show.
    heldout["train_sampling_strategy"] = "random"
    own = make("own", **heldout)
    own.train()
    trainer = make("vllm", use_vllm=True, **heldout)
    assert not LLM.made, "the engine takes memory as soon as it is there"
    trainer.train()
    assert tiny.same_weights(own.model, trainer.model)
    for t in range(2):
        assert rollouts(tmp_path / "own", t) == rollouts(tmp_path / "vllm", t)
    (engine,) = LLM.made
    # theta_0, thetahat_1 (held-out prompts), theta_1, thetahat_2, and what it is extrapolated to
    assert len(engine.engine.received) == 5
    assert engine.calls.count("reset") == 5
    assert engine.kwargs["max_num_seqs"] == 9
    assert engine.kwargs["gpu_memory_utilization"] == 0.3
    # What an engine is, and where, may change from round to round; rollouts say that it was another one.
    assert own._configuration == trainer._configuration
    assert "vllm" in trainer._round_task(0, "policy").store.description
    assert "vllm" not in own._round_task(0, "policy").store.description
    assert {request["temperature"] for request in engine.engine.asked} == {0.7}
    assert sum("not been run on a GPU" in record.message for record in caplog.records) == 1


def test_full_weights_arrive_as_they_are(make: Any, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(use_vllm=True)
    compared = []
    generate = LLM.generate

    def watched(self: LLM, *args: Any, **kwargs: Any) -> Any:
        received = self.engine.received[-1]
        live = dict(trainer.model.named_parameters())
        assert received.keys() == live.keys()
        assert all(torch.equal(received[name], live[name]) for name in live)
        compared.append(len(self.engine.received))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LLM, "generate", watched)
    trainer.train()
    # Two batches a round at least, and the weights once, before the first.
    assert set(compared) == {1, 2}
    assert len(compared) >= 4


@pytest.mark.parametrize("sleep", [False, True])
def test_base_history_and_adapter_arrive_together(
    make: Any, base: Path, installed: None, monkeypatch: pytest.MonkeyPatch, sleep: bool
) -> None:
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = make(
        use_vllm=True, peft_config=adapter, num_rounds=3, extrapolation_alpha=[0.5, 0.25, 0.0], learning_rate=5e-2,
        vllm_enable_sleep_mode=sleep, eval_dataset=tiny.make_pairs(4, seed=8).select_columns(["prompt"]),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if "lora_" not in name}
    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    expected: list[dict[str, torch.Tensor]] = []
    sync = vllm_generation.VLLMGeneration.sync_weights

    def watched(self: Any) -> None:
        # By hand: W_0 + sum_i c_i s B_i A_i, with the adapter's own change last.
        rounds = trainer._weights
        whole = {name: tensor.detach().double().clone() for name, tensor in plain.items()}
        for name, layer in rounds._layers.items():
            changes = [change[name] for change in rounds._bases] + [rounds._current()[name]]
            factors = [*rounds._below, 1.0]
            total = sum(c * f.b[0].double() @ f.a[0].double() for c, f in zip(factors, changes, strict=True))
            key = f"{name.removeprefix('base_model.model.')}.weight"
            whole[key] += layer.scaling["default"] * total
        expected.append(whole)
        sync(self)

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", watched)
    trainer.train()
    (engine,) = LLM.made
    received = engine.engine.received
    # theta_0, thetahat_1, theta_1, thetahat_2, theta_2, thetahat_3; asleep between the two of theta_0, for the measure
    # and the round.
    assert len(received) == len(expected)
    assert len(received) >= 6
    moved = 0.0
    for got, wanted in zip(received, expected, strict=True):
        assert got.keys() == wanted.keys() == plain.keys()
        for name in got:
            torch.testing.assert_close(got[name].double(), wanted[name], atol=1e-6, rtol=1e-6)
            moved = max(moved, float((got[name] - plain[name].detach()).abs().max()))
    assert moved > 1e-2
    assert [len([c for c in vector if c]) for vector in [trainer._weights._below]] == [2], "a history there was"
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the base drifted"
    assert not any(layer.merged for layer in trainer._weights._layers.values())
    if sleep:
        assert engine.calls[-1] == "sleep"
        assert engine.calls.count("sleep") == engine.calls.count("wake kv_cache") + 1
        assert engine.calls.count("generate") > engine.calls.count("sleep"), "once a phase, not once a batch"


def test_what_sending_leaves_half_done_is_undone(base: Path, installed: None) -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny.make_model(dtype=torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def break_off() -> None:
        with base_untouched(model):
            model.merge_adapter()
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        break_off()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with base_untouched(model):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_spr_with_a_colocated_engine_is_spr_without(base: Path, tmp_path: Path, installed: None) -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        args = tiny.arguments(
            tmp_path / folder, num_rounds=2, num_generations=3, max_completion_length=6, generation_batch_size=9,
            **{"use_cpu": False, **kwargs},
        )  # fmt: skip
        trainer = SPRTrainer(
            model=str(base), args=SPRConfig(**args), train_dataset=tiny.make_pairs(12).select_columns(["prompt"]),
            reward_funcs=threes,
        )  # fmt: skip
        trainer.train()
        return trainer

    for temperature in (1.0, 0.8):
        own = run(f"own-{temperature}", temperature=temperature)
        other = run(f"vllm-{temperature}", temperature=temperature, use_vllm=True)
        assert tiny.same_weights(own.model, other.model)


def test_apo_over_spo_with_a_colocated_engine(base: Path, tmp_path: Path, installed: None) -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        args = tiny.arguments(
            tmp_path / folder, num_rounds=2, num_generations=3, max_completion_length=6, generation_batch_size=9,
            use_cpu=False, **kwargs,
        )  # fmt: skip
        trainer = APOSPOTrainer(
            model=str(base), args=APOSPOConfig(**args), reward_funcs=threes,
            train_dataset=tiny.make_pairs(24).select_columns(["prompt"]),
        )  # fmt: skip
        trainer.train()
        return trainer

    assert tiny.same_weights(run("own").model, run("vllm", use_vllm=True).model)


def test_a_killed_run_samples_what_is_missing(make: Any, tmp_path: Path, installed: None, monkeypatch: Any) -> None:
    whole = make("whole", use_vllm=True)
    whole.train()
    put, killed = vllm.VLLMSampler.__call__, make("killed", use_vllm=True)
    calls = 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return put(self, *args)

    monkeypatch.setattr(vllm.VLLMSampler, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    monkeypatch.setattr(vllm.VLLMSampler, "__call__", put)
    again = make("killed", use_vllm=True)
    again.train()
    assert tiny.same_weights(whole.model, again.model)
    # A batch less than the whole run: the one that was there.
    asked = [engine.calls.count("generate") for engine in LLM.made]
    assert asked[2] == asked[0] - 1
    assert [row["completion_ids"] for row in rollouts(tmp_path / "whole", 1)] == [
        row["completion_ids"] for row in rollouts(tmp_path / "killed", 1)
    ]


def test_random_numbers_of_the_caller_are_left_alone(base: Path, installed: None) -> None:
    sampler = make_sampler(base)
    set_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    model = tiny.make_model(seed=3).eval()
    torch.set_rng_state(before[0])
    with sampler.phase(named(model, base), "one"):
        first = sampler([[5, 9]], 4, seed=7)
        assert sampler([[5, 9]], 4, seed=7) == first
        assert sampler([[5, 9]], 4, seed=8) != first
        assert len({tuple(completion.ids) for completion in first[0]}) > 1, "the completions of a prompt differ"
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def named(model: Any, base: Path) -> Any:
    model.name_or_path = str(base)
    return model


def make_sampler(base: Path, accelerator: Any = None, settings: Any = None, **given: Any) -> VLLMSampler:
    config = SamplingConfig(use_vllm=True, **given)
    config.validate_sampling()
    accelerator = accelerator or SimpleNamespace(
        num_processes=1, process_index=0, local_process_index=0, is_main_process=True, device=torch.device("cpu"),
        wait_for_everyone=lambda: None, state=SimpleNamespace(deepspeed_plugin=None),
    )  # fmt: skip
    return VLLMSampler(
        config, accelerator, tiny.make_tokenizer(), SamplingSettings(**{**SETTINGS, **(settings or {})}), 12
    )


def test_log_probabilities_are_sums_up_to_the_end(base: Path) -> None:
    sampler = make_sampler(base, settings={"stop_token_ids": (1, 20)})
    rows = sampler._completions_of(
        [[5, 20, 7], [5, 6, 7]],
        [[[-0.5], [-1.0, -3.0], [-9.0]], [[-0.1], [-0.2], [-0.25]]],
        # Where others than the sampled token are told too, the sampled one's counts.
        [[[5], [8, 20], [7]], [[5], [6], [7]]],
        2,
    )
    assert [(row.ids, row.logp, row.cut) for row in rows] == [
        ([5, 20], -3.5, False),
        ([5, 6, 7], pytest.approx(-0.55), True),
    ]
    for logps, tokens in ((None, None), ([[[None]]], [[[5]]]), ([[[-1.0]]], [[[6]]])):
        with pytest.raises(SamplingError, match="look at its log"):
            sampler._completions_of([[5]], logps, tokens, 1)


def test_a_prompt_that_does_not_fit_is_told_of(base: Path, installed: None) -> None:
    sampler = make_sampler(base, max_completion_length=6, vllm_max_model_length=8)
    with sampler.phase(named(tiny.make_model(), base), "one"):
        assert sampler([[5, 6]], 2, 0)
        with pytest.raises(SamplingError, match="`vllm_max_model_length` is 8, but a prompt of 3 tokens"):
            sampler([[5, 6, 7]], 2, 0)


# ---- A server ----


def test_a_run_with_a_server(make: Any, tmp_path: Path, server: Server) -> None:
    trainer = make(use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url + "/")
    seen: list[dict[str, torch.Tensor]] = []
    sample = trainer._sampler

    def watched(task: Any) -> Any:
        seen.append({name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()})
        return sample(task)

    trainer._sampler = watched
    trainer.train()
    received = server.engine.received
    assert len(received) == 2
    for got in received:
        assert any(all(torch.equal(got[name], live[name]) for name in live) for live in seen)
    for announced, got in zip(server.announced, received, strict=True):
        assert announced["names"] == list(got)
        assert announced["shapes"] == [list(tensor.shape) for tensor in got.values()]
    assert server.asked.count("/reset_prefix_cache") == 2
    assert {(request["temperature"], request["top_p"], request["top_k"], request["n"], request["logprobs"])
            for request in server.engine.asked} == {(0.7, 0.9, 0, 3, 0)}  # fmt: skip
    for t in range(2):
        for row in rollouts(tmp_path / "out", t):
            assert len(row["completion_ids"]) == 3
            assert all(logp < 0 for logp in row["logps"])


def test_log_probabilities_of_another_distribution_are_refused(base: Path, server: Server) -> None:
    server.mode = "raw_logprobs"
    given = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    model = named(tiny.make_model(), base)
    for settings in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        with (
            pytest.raises(SamplingError, match="--logprobs-mode processed_logprobs"),
            make_sampler(base, settings=settings, **given).phase(model, "one"),
        ):
            pass
    # The two are the same where the model's own distribution is sampled from.
    with make_sampler(base, **given).phase(model, "one") as sampler:
        assert len(sampler([[5]], 2, 0)[0]) == 2


def test_a_server_that_fails_is_named(base: Path, server: Server) -> None:
    sampler = make_sampler(base, vllm_mode="server", vllm_server_base_url=server.url, vllm_server_timeout=0.2)
    model = named(tiny.make_model(), base)
    with sampler.phase(model, "one"):
        server.failing = "/v1/completions"
        with pytest.raises(SamplingError, match=f"{server.url} failed or went away .Request failed: 400"):
            sampler([[5]], 2, 0)
    server.close()
    begun = time.monotonic()
    with (
        pytest.raises(SamplingError, match=f"No vLLM server answers at {server.url} within 0.2 s"),
        sampler.phase(model, "two"),
    ):
        pass
    assert time.monotonic() - begun < 5
    server.http.server_close()
    server.close = lambda: None  # type: ignore[method-assign]


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and is silent: TRL's client, which sets no time limit, would wait for ever."""
    monkeypatch.setattr(vllm, "_PAUSE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(SamplingError, match=rf"{address} within 0.5 s, the `vllm_server_timeout` \(.*timed out"):
            wait_for_server(address, 0.5)
        assert 0.5 <= time.monotonic() - begun < 5


def test_a_server_that_is_not_ready(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """TRL's client would go on for ever where the other side answers with an error."""
    monkeypatch.setattr(vllm, "_PAUSE", 0.05)
    other = Server(str(base))
    try:
        other.failing = "/health"
        with pytest.raises(SamplingError, match="HTTP Error 400"):
            wait_for_server(other.url, 0.2)
        threading.Timer(0.2, setattr, (other, "failing", None)).start()
        wait_for_server(other.url, 30)
    finally:
        other.close()


def test_processes_work_in_step_on_one_server(base: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's calls are collective; here one process has three batches, of uneven sizes, and the other has one."""
    waiting, shared = threading.Barrier(2, timeout=60), {}
    rank = threading.local()

    def gather(values: list[Any]) -> list[Any]:
        shared[rank.number] = values
        waiting.wait()
        found = [value for number in range(2) for value in shared[number]]
        waiting.wait()
        return found

    def broadcast(values: list[Any], from_process: int) -> None:
        if rank.number == from_process:
            shared["sent"] = values[0]
        waiting.wait()
        values[0] = shared["sent"]
        waiting.wait()

    monkeypatch.setattr(vllm, "gather_object", gather)
    monkeypatch.setattr(vllm_generation, "gather_object", gather)
    monkeypatch.setattr(vllm_generation, "broadcast_object_list", broadcast)
    prompts = {0: [[[5], [6, 7]], [[8]], [[9], [10], [11]]], 1: [[[12]]]}
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        rank.number = number
        accelerator = SimpleNamespace(
            num_processes=2, process_index=number, is_main_process=number == 0, device=torch.device("cpu"),
            wait_for_everyone=waiting.wait, state=SimpleNamespace(deepspeed_plugin=None),
        )  # fmt: skip
        sampler = make_sampler(base, accelerator, vllm_mode="server", vllm_server_base_url=server.url)
        with sampler.phase(named(tiny.make_model(seed=number), base), "one"):
            mine = [Batch(2 * i + number, tuple(range(len(p))), i) for i, p in enumerate(prompts[number])]
            found[number] = [
                sampler(prompts[number][batch.index // 2], 2, batch.seed) for batch in sampler.batches(mine, 2)
            ]

    # Random number states belong to the process, not to its threads.
    monkeypatch.setattr(vllm, "_random_numbers", lambda seed: torch.no_grad())
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [[len(group) for group in groups] for groups in found[0]] == [[2, 2], [2], [2, 2, 2]]
    assert [[len(group) for group in groups] for groups in found[1]] == [[2]]
    asked = [request["prompts"] for request in server.engine.asked]
    assert asked == [[[5], [6, 7], [12], [0]], [[8], [0]], [[9], [10], [11], [0], [0], [0]]] or asked == [
        [[5], [6, 7], [12], [0]], [[8]], [[9], [10], [11], [0], [0], [0]],
    ]  # fmt: skip


def test_processes_that_share_an_engine_share_a_seed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "gather_object", lambda values: [(1, 10), (2, 11), (0, 12), (1, 13)])
    for number, seed in enumerate((10, 10, 12, 12)):
        sampler = make_sampler(
            base, SimpleNamespace(num_processes=4, process_index=number), vllm_tensor_parallel_size=2
        )
        assert sampler._agree([[5]], 10 + number) == ([[5], [0]], seed)
    assert not make_sampler(base, SimpleNamespace(num_processes=4, process_index=0))._in_step


def of_processes(base: str, out: str, mode: str) -> None:
    """What each process of the test below runs, and the test itself."""
    patch, more = pytest.MonkeyPatch(), {}
    pretend(patch)
    # No GPU, so that torch takes gloo.
    patch.setattr(vllm, "check_vllm", lambda *args: None)
    if mode == "server" and os.environ.get("RANK", "0") == "0":
        more["vllm_server_base_url"] = serve(base, patch).url
    args = tiny.arguments(
        out, num_rounds=2, num_generations=3, max_completion_length=6, generation_batch_size=6, round_data="reuse",
        prompts_per_round=7, train_sampling_strategy="sequential", optim="sgd", use_vllm=True, vllm_mode=mode, **more,
    )  # fmt: skip
    args["per_device_train_batch_size"] = 2 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = APOTrainer(
        model=base, args=APOConfig(**args), reward_funcs=threes,
        train_dataset=tiny.make_pairs(12).select_columns(["prompt"]),
        eval_dataset=tiny.make_pairs(5, seed=8).select_columns(["prompt"]),
    )  # fmt: skip
    trainer.train()
    patch.undo()


def test_two_processes(base: Path, tmp_path: Path, installed: None) -> None:
    """With engines of their own the text of one process; on one server, whose calls are collective, an end."""
    of_processes(str(base), str(tmp_path / "one"), "colocate")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m",
               "tests.test_vllm", str(base), str(tmp_path)]  # fmt: skip
    # A group of its own, so that nothing is left behind if they wait for each other.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"too slow, or processes wait for each other: {process.communicate()[0][-3000:]}")
    assert process.returncode == 0, output[-3000:]
    for t in range(2):
        one, two = rollouts(tmp_path / "one", t), rollouts(tmp_path / "colocate", t)
        assert [row["completion_ids"] for row in one] == [row["completion_ids"] for row in two]
        assert {row["batch"] % 2 for row in rollouts(tmp_path / "server", t)} == {0, 1}


# ---- What is refused ----


@pytest.mark.parametrize(
    ("given", "wants"),
    [
        ({"vllm_mode": "elsewhere"}, "`vllm_mode` is 'elsewhere', but wants one of colocate, server"),
        ({"vllm_model_impl": "mine"}, "`vllm_model_impl` is 'mine', but wants one of"),
        ({"vllm_server_port": 0}, "`vllm_server_port` is 0, but wants a whole number from 1 to 65535"),
        ({"vllm_group_port": 1.5}, "`vllm_group_port` is 1.5"),
        ({"vllm_tensor_parallel_size": 0}, "`vllm_tensor_parallel_size` is 0, but wants a whole number of at least 1"),
        ({"vllm_gpu_memory_utilization": 1.5}, "`vllm_gpu_memory_utilization` is 1.5"),
        ({"vllm_server_timeout": "soon"}, "`vllm_server_timeout` is 'soon'"),
        ({"vllm_server_base_url": "localhost:8000"}, "`vllm_server_base_url` is 'localhost:8000', but wants a URL"),
        ({"vllm_max_model_length": 0}, "`vllm_max_model_length` is 0"),
        ({"vllm_max_model_length": 256, "use_vllm": True}, "has to hold a prompt and `max_completion_length`"),
    ],
    ids=str,
)
def test_bad_values(given: dict[str, Any], wants: str) -> None:
    with pytest.raises(ConfigurationError, match=wants) as caught:
        SamplingConfig(**given).validate_sampling()
    assert "\n" not in str(caught.value)


def test_refused_before_weights_load(
    make: Any, base: Path, installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A folder without weights: whatever loads them fails otherwise.
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (nothing / name).write_bytes((base / name).read_bytes())

    def refused(wants: str, **given: Any) -> None:
        with pytest.raises(ConfigurationError, match=wants) as caught:
            make(**{"model": str(nothing), "use_vllm": True, **given})
        assert "\n" not in str(caught.value)

    refused("nothing is sampled in this run", data=tiny.make_pairs(12), reward_funcs=None, prompts_per_round=None)
    refused("`use_cpu` is set", use_cpu=True)
    refused("needs a model that was loaded from a folder or the Hub", model=tiny.make_model())
    refused("has to divide the number of processes, which is 1", vllm_tensor_parallel_size=2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        refused(f"http://127.0.0.1:{port} within 0.1 s", vllm_mode="server", vllm_server_host="127.0.0.1",
                vllm_server_port=port, vllm_server_timeout=0.1)  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("does not work with FSDP or DeepSpeed")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setattr(vllm, "has_gpu", lambda: False)
    refused("needs a CUDA GPU in the training process, where the engine runs, but there is none")
    refused("from GPU to GPU, but there is none", vllm_mode="server")
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: False)
    refused("vLLM is not installed")


def test_spr_refuses_what_narrows_responses(base: Path, tmp_path: Path, installed: None) -> None:
    args = SPRConfig(**tiny.arguments(tmp_path, use_vllm=True, use_cpu=False, vllm_structured_outputs_regex="w3.*"))
    with pytest.raises(ConfigurationError, match="does not work with SPR"):
        check_vllm(args, True, {"model": str(base)})
    with pytest.raises(ConfigurationError, match="nothing is sampled"):
        SPRTrainer(
            model=str(base), args=SPRConfig(**tiny.arguments(tmp_path, use_vllm=True, num_generations=0)),
            train_dataset=tiny.make_sft_rows().add_column("reward", [float(i % 3) for i in range(10)]),
        )  # fmt: skip


def test_a_shared_weight_below_an_adapter_is_refused(base: Path) -> None:
    from peft import get_peft_model

    tied = get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ConfigurationError, match=r"an adapter on .*embed_tokens, whose weight .* shares"):
        vllm.check_model(tied)
    vllm.check_model(get_peft_model(tiny.make_model(), LoraConfig(r=2, target_modules=["q_proj"])))


# ---- What we rely on in TRL ----


def test_companions_are_those_of_grpo() -> None:
    """Else: a field of ours has another name, type or default than GRPOConfig's of the same meaning."""
    theirs = {field.name: field for field in fields(GRPOConfig)}
    ours = {field.name: field for field in fields(SamplingConfig) if "vllm" in field.name}
    assert len(ours) == 13
    for name, field in ours.items():
        assert field.default == theirs[name].default, name
        assert get_type_hints(SamplingConfig)[name] == get_type_hints(GRPOConfig)[name], name
    # Of the loss, which is not GRPO's here; nothing else is left out.
    left = {name for name in theirs if "vllm" in name} - ours.keys()
    assert all(name.startswith("vllm_importance_sampling") for name in left), left


def test_what_is_used_of_vllm_generation() -> None:
    """Else: `VLLMSampler` hands an argument to the wrong place, or reads something else than it thinks."""
    parameters = inspect.signature(vllm_generation.VLLMGeneration.__init__).parameters
    assert {name: parameter.default for name, parameter in parameters.items() if name != "self"} == {
        "model": inspect.Parameter.empty,
        "accelerator": inspect.Parameter.empty,
        "processing_class": inspect.Parameter.empty,
        "mode": "colocate",
        "structured_outputs_regex": None,
        "server_base_url": None,
        "server_host": "0.0.0.0",
        "server_port": 8000,
        "server_timeout": 240.0,
        "group_port": 51216,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.9,
        "max_model_length": None,
        "max_num_seqs": None,
        "enable_sleep_mode": False,
        "model_impl": "auto",
        "trust_remote_code": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_completion_length": 16,
        "logprobs": 0,
        "generation_kwargs": None,
    }
    signature = inspect.signature(vllm_generation.VLLMGeneration.generate)
    assert list(signature.parameters) == ["self", "prompts", "images", "num_generations", "profiler"]
    assert list(inspect.signature(vllm_generation.VLLMGeneration.sync_weights).parameters) == ["self"]
    assert list(inspect.signature(vllm_client.VLLMClient.get_server_info).parameters) == ["self"]
    source = inspect.getsource(vllm_generation.VLLMGeneration)
    # Attributes that are read or set on it from outside.
    for text in (
        "self.llm = LLM(",
        "self.vllm_client = VLLMClient(",
        "self.model = model",
        "self.enable_sleep_mode =",
    ):
        assert text in source
    # The log-probabilities of a colocated engine are those of what was sampled from.
    assert 'logprobs_mode="processed_logprobs"' in source
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in source


if __name__ == "__main__":
    for _mode in ("colocate", "server"):
        of_processes(sys.argv[1], f"{sys.argv[2]}/{_mode}", _mode)
