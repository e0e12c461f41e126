"""A server of the tests' own in place of vLLM's: it fails in every way that the tests ask for."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from geo_r1.models import EncodedPrompt
from geo_r1.models.lora import DOWN, UP
from geo_r1.rollout import SamplingConfig
from geo_r1.rollout.engine import WeightsLost
from geo_r1.rollout.vllm.channel import WeightReceiver
from geo_r1.rollout.vllm.requests import seed_of
from geo_r1.rollout.vllm.server import GENERATE, ServerEngine

IMAGE, END = 5, 6
SAMPLING = SamplingConfig(max_new_tokens=4)
WEIGHTS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1.5, -2.25, 3e38]).bfloat16(),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.empty(0, 3),
    "e": torch.arange(100_000.0).view(400, 250).T,  # not contiguous, and more than a socket takes at once
}
ALPHA = 5.0
WHOLE_MODEL = {"alpha": None, "base": "", "whole": True}  # how weights without adapters are sent


def with_adapters(seed):
    """A model with adapters on two layers, one of them with a bias; only they depend on the seed."""
    frozen, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def drawn(*shape, generator=own):
        return torch.randn(shape, generator=generator).bfloat16()

    return {
        "x.base_layer.weight": drawn(40, 90, generator=frozen),
        "x.base_layer.bias": drawn(40, generator=frozen),
        f"x{DOWN}": drawn(3, 90),
        f"x{UP}": drawn(40, 3),
        "y.base_layer.weight": drawn(70, 50, generator=frozen),
        f"y{DOWN}": drawn(3, 50),
        f"y{UP}": drawn(70, 3),
        "z.weight": drawn(7, 5, generator=frozen),
    }


def adapters_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith((DOWN, UP))}


class Worker(WeightReceiver):
    """Stands in for a worker of vLLM: a model that keeps what it is given."""

    def __init__(self):
        self.given, self.fails_at, self.device = {}, None, torch.device("cpu")
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(logprobs_mode="processed_logprobs", hf_config=None, max_model_len=9),
            parallel_config=SimpleNamespace(data_parallel_size=1),
        )
        self.model_runner = SimpleNamespace(vllm_config=self.config, get_model=lambda: self)
        language_model = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=False))
        self.get_language_model, self.state_dict = lambda: language_model, dict
        self.named_parameters = lambda remove_duplicate=True: []

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == self.fails_at:
                raise RuntimeError("out of memory")
            self.given[name] = tensor
        return set(self.given)

    def reload_weights(self, weights_iterator):
        self.load_weights(weights_iterator)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        server = self.server.owner
        if server.dead():
            return
        answers = {"/health": (200, b""), "/weight_info": (200, {"weight_version": server.version})}
        missing = (404, {"detail": "Not Found"})
        self.answer(*(missing if self.path in server.missing else answers.get(self.path, (405, b""))))

    def do_POST(self):
        server = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.dead():
            return
        server.headers = dict(self.headers)
        server.asked.append((self.path, body))
        if self.path == "/update_weight_version":
            server.version = body["new_version"]
        special = {"/collective_rpc": server.call, GENERATE: server.generate}
        special.get(self.path, lambda handler, _: handler.answer(200, b""))(self, body)


class Server:
    """A server with `workers`; every fault befalls one request for completions."""

    def __init__(self):
        self.workers, self.version, self.faults = [Worker()], "default", []
        self.asked, self.headers, self.missing, self.dead_for = [], {}, set(), 0
        self.fault_of, self.until = {}, lambda: True  # faults by a prompt's last token; when they come
        self.expanded = lambda token_ids: token_ids
        self.rpc = None  # answers a call of the workers; None: they are called
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # closing it waits for what it still answers
        self.http.owner = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def dead(self):
        with self.lock:
            self.dead_for -= self.dead_for > 0
            return self.dead_for > 0

    def count(self, path=GENERATE):
        return sum(asked == path for asked, _ in self.asked)

    def call(self, handler, body):
        if self.rpc is not None and body["method"] == "receive_weights":
            return self.rpc(handler, body)
        with ThreadPoolExecutor(len(self.workers)) as pool:
            kwargs = body.get("kwargs", {})
            told = [pool.submit(getattr(worker, body["method"]), **kwargs) for worker in self.workers]
        handler.answer(200, {"results": [result.result() for result in told]})

    def generate(self, handler, body):
        with self.lock:
            fault = self.faults.pop(0) if self.faults else self.fault_of.pop(body["token_ids"][-1], None)
        if fault == "hangs up":
            return
        if fault == "stalls":
            self.over.wait()
            return
        while fault and not self.until():
            pass
        if fault in ("dies", "dies and forgets"):
            self.dead_for = 4
            self.version = "default" if "forgets" in fault else self.version
            return
        if fault == "forgets":
            self.version = "default"
        if isinstance(fault, tuple):
            return handler.answer(*fault)
        params = body["sampling_params"]
        choices = []
        for i in reversed(range(params["n"])):  # in no order
            tokens = said(params["seed"], i)
            choices.append(
                {
                    "index": i,
                    "token_ids": tokens,
                    "logprobs": {"content": [{"token_id": t, "logprob": -t / 8} for t in tokens]},
                    "finish_reason": "abort"
                    if fault == "aborts"
                    else "stop"
                    if tokens[-1] == END
                    else "length",
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
                }
            )
        handler.answer(200, {"choices": choices, "prompt_token_ids": self.expanded(body["token_ids"])})


def said(seed, index):
    """What the server says to a seed: three tokens and the end, or four tokens."""
    tokens = [7 + (seed + index + i) % 90 for i in range(3)]
    return [*tokens, END if (seed + index) % 2 else 99]


def engine_of(server, **options):
    options = {"timeout": 5.0, "patience": 5.0} | options
    return ServerEngine(server.url, end_token_ids=[END], vision_token_ids=[IMAGE], **options)


def prompt_of(name, token_ids, **images):
    fields = {"image_rows": [], "pixel_values": None, "image_grids": ()} | images
    return EncodedPrompt(name, list(token_ids), torch.zeros(3, len(token_ids), dtype=torch.int64), **fields)


PROMPTS = [prompt_of(f"s{i}", [8, 10 + i]) for i in range(3)]
STREAMS = ["0/4", "0/5", "0/6"]


def sampled(engine, prompts=PROMPTS, streams=STREAMS, count=2):
    groups = engine.sample(prompts, count, SAMPLING, streams)
    return [[(c.token_ids, c.logp, c.ended) for c in group] for group in groups]


def sample_one(engine, i, count=2):
    return engine.sample(PROMPTS[i : i + 1], count, SAMPLING, STREAMS[i : i + 1])


def expected(streams=STREAMS, count=2):
    groups = [[said(seed_of(stream), i) for i in range(count)] for stream in streams]
    return [[(t, [-v / 8 for v in t], t[-1] == END) for t in group] for group in groups]


def lose_the_last(server, engine, fault):
    """A call that ends when the server has lost its weights and two of three prompts are answered."""
    server.fault_of = {PROMPTS[2].token_ids[-1]: fault}
    server.until = lambda: len(engine._kept) == 2
    with pytest.raises(WeightsLost, match=f"{server.url} has no weights of this run"):
        engine.sample(PROMPTS, 2, SAMPLING, STREAMS)
    server.fault_of, server.asked = {}, []
