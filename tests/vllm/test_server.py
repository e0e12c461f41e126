"""A vLLM server, in its own processes, samples from the policy, also after it was killed."""

import copy
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from engine_lab import END

from geo_r1.models import PackedVLM
from geo_r1.models.lora import DOWN, UP, add_lora, merged_state
from geo_r1.rollout import SamplingConfig, generate
from geo_r1.rollout.engine import WeightsLost
from geo_r1.rollout.vllm.requests import cpu_options, serve_command
from geo_r1.rollout.vllm.server import ServerEngine

MAX_LEN = 320
MAX_SEQS = 32
SAMPLING = SamplingConfig(max_new_tokens=48)
STREAMS = [f"7/{index}" for index in range(16)]


class Server:
    """A server that can be killed, with all its processes, and started again."""

    def __init__(self, lab, log):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = {"max_num_seqs": MAX_SEQS, "kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
        options |= {} if torch.cuda.is_available() else cpu_options(MAX_LEN)
        environment, self.command = serve_command(
            lab.folder, port=port, dtype="float32", max_model_len=MAX_LEN, **options
        )
        self.environment = os.environ | environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.url, self.log, self.process = f"http://127.0.0.1:{port}", log, None

    def start(self):
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(lab, tmp_path_factory):
    server = Server(lab, tmp_path_factory.mktemp("server") / "log")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def engine(lab, server):
    vision = lab.vlm.vision_token_ids
    return ServerEngine(server.url, end_token_ids=[END], vision_token_ids=vision, timeout=60, patience=300)


@pytest.mark.parametrize("seed", [1, 2])
def test_after_each_load_it_samples_from_the_policys_weights(lab, engine, seed):
    engine.load(lab.weights(seed).items())
    prompts = lab.prompts[:4]
    groups = engine.sample(prompts, 4, SAMPLING, STREAMS[:4])
    lab.assert_logp(prompts, groups, 1e-3)
    assert all(len({tuple(c.token_ids) for c in group}) == 4 for group in groups)
    assert groups == engine.sample(prompts, 4, SAMPLING, STREAMS[:4])

    prompts, greedy = lab.prompts[:16], replace(SAMPLING, temperature=0.0)
    own = generate(lab.vlm, prompts, 1, sampling=greedy, eos_token_id=END, streams=STREAMS)
    theirs = engine.sample(prompts, 1, greedy, STREAMS)
    assert [group[0].token_ids for group in theirs] == [group[0].token_ids for group in own]


def test_adapters_alone_make_its_weights_the_policys(lab, engine):
    model = copy.deepcopy(lab.vlm.model)
    add_lora(model, 4, 8.0, 0.0, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], vision=True)
    lab = replace(lab, vlm=PackedVLM(model))
    weights = lab.weights(5)
    adapters = {name: tensor for name, tensor in weights.items() if name.endswith((DOWN, UP))}
    prompts, streams = lab.prompts[:8], STREAMS[:8]
    groups = None
    for seed, sent in ((1, weights), (2, adapters), (3, adapters)):
        generator = torch.Generator().manual_seed(seed)
        before = lab.logp(prompts, groups) if groups else None
        with torch.no_grad():
            for tensor in adapters.values():  # larger ones make the model magnify what is rounded off
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        assert groups is None or (lab.logp(prompts, groups) - before).abs().mean() > 0.1
        assert engine.holds_base == (sent is adapters)
        engine.load(sent.items(), alpha=8.0)
        groups = engine.sample(prompts, 4, SAMPLING, streams)
        lab.assert_logp(prompts, groups, 1e-3)
    engine.load(merged_state(weights.items(), 8.0))
    assert not engine.holds_base and engine.sample(prompts, 4, SAMPLING, streams) == groups


def test_what_cannot_be_answered_is_told(lab, engine):
    sample = f"sample {lab.prompts[0].sample_id}"
    with pytest.raises(ValueError, match=f"{sample}: .* over the server's max_model_len = {MAX_LEN}"):
        engine.sample(lab.prompts[:1], 1, replace(SAMPLING, max_new_tokens=MAX_LEN), STREAMS[:1])
    with pytest.raises(ValueError, match=f"{sample}: .* refuses .*: 400 .*max_num_seqs"):
        engine.sample(lab.prompts[:1], MAX_SEQS + 1, SAMPLING, STREAMS[:1])


def test_a_load_that_broke_off_is_followed_by_a_good_one(lab, engine):
    tensors = lab.weights(3)
    name = list(tensors)[-1]
    with pytest.raises(ValueError, match=f"1 weights do not fit the engine's model: {name} is missing"):
        engine.load([item for item in tensors.items() if item[0] != name])

    def broken():
        yield from list(tensors.items())[:20]
        raise KeyError("the trainer's")

    with pytest.raises(KeyError):
        engine.load(broken())
    with pytest.raises(WeightsLost):
        engine.sample(lab.prompts[:1], 1, SAMPLING, STREAMS[:1])
    engine.load(tensors.items())
    prompts = lab.prompts[:4]
    lab.assert_logp(prompts, engine.sample(prompts, 4, SAMPLING, STREAMS[:4]), 1e-3)


def test_a_server_that_was_killed_says_the_same_when_it_is_back(lab, server, engine):
    tensors, prompts = lab.weights(4), lab.prompts[:16]
    engine.load(tensors.items())
    undisturbed = engine.sample(prompts, 8, SAMPLING, STREAMS)
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(engine.sample, prompts, 8, SAMPLING, STREAMS)
        while not engine._kept:
            assert not wait([sampling], 0.01).done
        server.kill()
        server.start()
        with pytest.raises(WeightsLost):
            sampling.result()
    assert 0 < len(engine._kept) < len(prompts)
    engine.load(tensors.items())
    assert engine.sample(prompts, 8, SAMPLING, STREAMS) == undisturbed
