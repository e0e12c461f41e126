"""The client of a vLLM server against a server of the tests' own, that fails in every way that they know."""

import base64
import io
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Client
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from geo_r1.models import EncodedPrompt
from geo_r1.models.lora import DOWN, UP, merged_state
from geo_r1.rollout import SamplingConfig
from geo_r1.rollout.engine import EngineLost, WeightsLost
from geo_r1.rollout.vllm import channel
from geo_r1.rollout.vllm.channel import WeightReceiver, WeightSender
from geo_r1.rollout.vllm.requests import flags, seed_of, serve_command
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
        self.rpc = None  # what becomes of a call of the workers; None: they are called
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


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(channel, "expected_weights", lambda _: {n: t.shape for n, t in WEIGHTS.items()})
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    made = Server()
    yield made
    made.close()


def engine_of(server, **options):
    options = {"timeout": 5.0, "patience": 5.0} | options
    return ServerEngine(server.url, end_token_ids=[END], vision_token_ids=[IMAGE], **options)


@pytest.fixture
def engine(server):
    made = engine_of(server)
    made.load(WEIGHTS.items())
    return made


def prompt_of(name, token_ids, **pictures):
    fields = {"image_rows": [], "pixel_values": None, "image_grids": ()} | pictures
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


def test_completions_come_in_order_each_from_its_stream(server, engine):
    assert sampled(engine) == expected()
    requests = sorted((body for path, body in server.asked if path == GENERATE), key=lambda b: b["token_ids"])
    assert [body["token_ids"] for body in requests] == [[8, 10], [8, 11], [8, 12]]
    assert [body["sampling_params"]["seed"] for body in requests] == [seed_of(s) for s in STREAMS]
    for body in requests:
        assert (body["return_token_ids"], body["content_parts"], "model" in body) == (True, [], False)
    assert {len(c) for group in sampled(engine) for c in group} == {3} and sampled(engine, [], []) == []


def test_pictures_go_with_short_prompts_and_come_back_expanded(server, engine):
    pictures = tuple(
        np.random.default_rng(i).integers(0, 256, (28, 28 + 28 * i, 3), np.uint8) for i in (0, 1)
    )
    grids = ((1, 2, 2), (1, 2, 4))
    tokens = [IMAGE, 9, IMAGE, IMAGE, 9]
    prompt = prompt_of("s", tokens, image_rows=[0, 2, 3], image_grids=grids, pictures=pictures)
    server.expanded = lambda short: [IMAGE, 9, IMAGE, *short[2:]]
    assert sampled(engine, [prompt], ["0/4"]) == expected(["0/4"])
    body = server.asked[-1][1]
    assert body["token_ids"] == [IMAGE, 9, IMAGE, 9]
    for picture, part in zip(pictures, body["content_parts"], strict=True):
        head, _, data = part["url"].partition(",")
        assert (part["type"], head) == ("image_url", "data:image/png;base64")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture)
    with pytest.raises(ValueError, match=r"sample t: 2 images were encoded and 0 kept"):
        engine.sample([prompt_of("t", tokens, image_rows=[0, 2, 3], image_grids=grids)], 2, SAMPLING, ["0/4"])


def test_a_prompt_that_is_too_long_is_not_sent(server, engine):
    long = prompt_of("long", range(8, 14))
    with pytest.raises(
        ValueError, match=r"sample long: a prompt of 6 .* 4 more are over the server's .* = 9"
    ):
        engine.sample([*PROMPTS, long], 2, SAMPLING, [*STREAMS, "0/7"])
    assert server.count() == 0


def test_a_prompt_that_the_server_reads_otherwise_is_refused(server, engine):
    server.expanded = lambda short: [*short, 0]
    with pytest.raises(ValueError, match=r"sample s1: vLLM reads a prompt of 3 tokens where .* has 2"):
        sample_one(engine, 1)


FAULTS = {
    "hangs up": "hangs up",
    "dies": "dies",
    "aborts": "aborts",
    "fails": (500, {"error": {"message": "EngineCore encountered an issue"}}),
    "is busy": (503, b""),
    "talks rubbish": (200, b"<html>"),
    "says something else": (200, {"choices": [{"index": 0}]}),
    "says nothing": (200, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_asked_for_again_and_nothing_else(server, engine, fault):
    server.faults = [FAULTS[fault]]
    assert sampled(engine) == expected()
    if fault != "dies":
        assert server.count() == len(PROMPTS) + 1


def test_a_request_that_stalls_is_asked_again(server):
    engine = engine_of(server, timeout=0.3)
    engine.load(WEIGHTS.items())
    server.faults = ["stalls"]
    assert sampled(engine) == expected()
    assert server.count() == len(PROMPTS) + 1


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"error": {"message": "The prompt is\n too long"}}, "400 The prompt is too long"),
        (404, {"detail": "no such model"}, "404 no such model"),
        (422, b"what?", "422 what\\?"),
    ],
)
def test_a_refusal_is_told_once(server, engine, status, body, told):
    server.faults = [(status, body)]
    with pytest.raises(ValueError, match=rf"^sample s1: {server.url} refuses {GENERATE}: {told}$") as caught:
        sample_one(engine, 1)
    assert server.count() == 1 and not isinstance(caught.value, EngineLost)


def test_nan_is_no_log_probability(server, engine, monkeypatch):
    monkeypatch.setitem(globals(), "said", lambda *_: [8 * 9999])
    with pytest.raises(ValueError, match="sample s0: a token has no log-probability"):
        sample_one(engine, 0, 1)


def test_patience_ends(server, engine):
    impatient = engine_of(server, patience=0.3)
    impatient.load(WEIGHTS.items())
    server.dead_for = 10**9
    told = rf"^{server.url} has not answered for \d s \(.*\); start it with: .*; then the .* command goes on$"
    with pytest.raises(EngineLost, match=told) as caught:
        impatient.sample(PROMPTS, 2, SAMPLING, STREAMS)
    assert not isinstance(caught.value, WeightsLost)
    with pytest.raises(EngineLost, match=told):
        impatient.load(WEIGHTS.items())


def test_no_server_at_all():
    with socket.create_server(("127.0.0.1", 0)) as port:
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
    with pytest.raises(EngineLost, match=rf"^{url} has not answered .*/health: ConnectError"):
        ServerEngine(url, end_token_ids=[END], vision_token_ids=[], timeout=1.0, patience=0.2)
    with pytest.raises(ValueError, match="a server's address is like http://host:8000, not ftp://there"):
        ServerEngine("ftp://there", end_token_ids=[END], vision_token_ids=[], timeout=1.0, patience=0.2)


def lose_the_last(server, engine, fault):
    """A call that ends when the server has lost its weights and two of three prompts are answered."""
    server.fault_of = {PROMPTS[2].token_ids[-1]: fault}
    server.until = lambda: len(engine._kept) == 2
    with pytest.raises(WeightsLost, match=f"{server.url} has no weights of this run"):
        engine.sample(PROMPTS, 2, SAMPLING, STREAMS)
    server.fault_of, server.asked = {}, []


@pytest.mark.parametrize("fault", ["dies and forgets", "forgets"])
def test_a_server_that_lost_its_weights_gets_them_and_says_only_the_rest(server, engine, fault):
    lose_the_last(server, engine, fault)
    with pytest.raises(WeightsLost):  # still
        sampled(engine)
    engine.load(WEIGHTS.items())
    assert sampled(engine) == expected()
    assert [body["token_ids"] for path, body in server.asked if path == GENERATE] == [[8, 12]]
    assert sampled(engine) == expected() and server.count() == 1 + 3  # the call ended well: nothing is kept


def test_other_weights_say_everything_anew(server, engine):
    lose_the_last(server, engine, "forgets")
    engine.load((WEIGHTS | {"a": WEIGHTS["a"] + 1}).items())
    assert sampled(engine) == expected() and server.count() == 3


def test_clients_of_one_run_share_its_weights(server):
    one, other, stranger = engine_of(server, run="r"), engine_of(server, run="r"), engine_of(server)
    one.load(WEIGHTS.items())
    assert sampled(other) == expected()
    with pytest.raises(WeightsLost):
        sampled(stranger)
    server.version += "/loading"
    for client in (one, other):
        with pytest.raises(WeightsLost):
            sampled(client)


def test_weights_arrive_at_every_worker(server):
    server.workers = [Worker(), Worker()]
    engine_of(server).load(WEIGHTS.items())
    for worker in server.workers:
        assert worker.given.keys() == WEIGHTS.keys()
        for name, tensor in WEIGHTS.items():
            assert worker.given[name].dtype == tensor.dtype and torch.equal(worker.given[name], tensor)
    assert server.version.count("/") == 2
    told = [path for path, _ in server.asked]
    resets = [f"/reset_{cache}_cache" for cache in ("prefix", "mm", "encoder")]
    assert told[-4:] == [*resets, "/update_weight_version"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"f": torch.zeros(1)}, "f is no weight of this model"),
        ({"a": torch.zeros(3, 2)}, r"a has shape \[3, 2\], not \[2, 3\]"),
        ({"a": None}, "a is missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(server, change, told):
    engine = engine_of(server)
    tensors = {n: t for n, t in (WEIGHTS | change).items() if t is not None}
    with pytest.raises(ValueError, match=rf"^{server.url}: 1 weights do not fit the engine's model: {told}$"):
        engine.load(tensors.items())
    with pytest.raises(WeightsLost):
        sampled(engine)
    engine.load(WEIGHTS.items())
    assert sampled(engine) == expected()


def test_what_vllm_raises_reaches_the_trainer(server):
    server.workers[0].fails_at = "c"
    engine = engine_of(server, timeout=1.0)
    big = {"e": torch.zeros(3_000_000), **WEIGHTS}  # so that it is still being sent
    with pytest.raises(ValueError, match=r"vLLM cannot load the weights: RuntimeError: out of memory"):
        engine.load([*WEIGHTS.items(), *[(f"x{i}", big["e"]) for i in range(4)]])


def test_a_server_that_dies_while_it_loads(server, engine):
    def dies(handler, body):
        arguments = body["kwargs"]
        key = bytes.fromhex(arguments["key"])
        with Client((arguments["host"], arguments["port"]), authkey=key) as connection:
            assert connection.recv()[0] == "a"
        # and the request gets no answer

    server.rpc = dies
    with pytest.raises(WeightsLost, match=r"did not take the weights: /collective_rpc: RemoteProtocolError"):
        engine.load([*WEIGHTS.items(), ("x", torch.zeros(10_000_000))])
    server.rpc = None
    with pytest.raises(WeightsLost):
        sampled(engine)
    engine.load(WEIGHTS.items())
    assert sampled(engine) == expected()


def test_workers_that_never_come_end_the_load(server):
    engine = engine_of(server, timeout=0.3)
    server.rpc = lambda handler, body: server.over.wait()
    with pytest.raises(WeightsLost, match="did not take the weights"):
        engine.load(WEIGHTS.items())


def broken(tensors):
    yield from [*tensors.items()][:2]
    raise KeyError("mine")


def test_a_trainer_that_fails_in_the_middle_leaves_the_worker_free(server):
    engine = engine_of(server)
    with pytest.raises(KeyError, match="mine"):
        engine.load(broken(WEIGHTS))
    engine.load(WEIGHTS.items())
    assert sampled(engine) == expected()


def test_whoever_does_not_know_the_key_gets_nothing(server):
    with WeightSender(("127.0.0.1", server.http.server_port), 2.0) as sender, ThreadPoolExecutor(2) as pool:
        stranger, worker = Worker(), Worker()
        arguments = sender.arguments() | WHOLE_MODEL
        wrong = pool.submit(stranger.receive_weights, **(arguments | {"key": "00" * 32}))
        assert not sender.accept(1, lambda: not wrong.done())
        assert (
            wrong.result()["refused"] is None
            and "worker of the server lost the trainer" in wrong.result()["lost"]
        )
        right = pool.submit(worker.receive_weights, **arguments)
        assert sender.accept(1, lambda: True)
        sender.send(WEIGHTS.items())
        assert right.result() == {"refused": None, "lost": None}
    assert not stranger.given and worker.given.keys() == WEIGHTS.keys()


def test_a_worker_that_cannot_reach_the_trainer_says_so(server):
    with WeightSender(("127.0.0.1", server.http.server_port), 1.0) as sender:
        arguments = sender.arguments() | WHOLE_MODEL
    told = Worker().receive_weights(**arguments)["refused"]
    assert f"cannot connect to the trainer at 127.0.0.1:{arguments['port']}" in told


@pytest.fixture
def adapted(server, monkeypatch):
    """The server's model is one that may have adapters; it has been sent all of it once."""
    plain = {"x.weight": (40, 90), "x.bias": (40,), "y.weight": (70, 50), "z.weight": (7, 5)}
    shapes = {name: torch.Size(shape) for name, shape in plain.items()}
    monkeypatch.setattr(channel, "expected_weights", lambda _: shapes)
    server.workers = [Worker(), Worker()]
    engine = engine_of(server)
    assert not engine.holds_base
    engine.load(with_adapters(1).items(), alpha=ALPHA)
    return engine


def assert_has_merged(server, tensors):
    expected = dict(merged_state(tensors.items(), ALPHA))
    for worker in server.workers:
        assert worker.given.keys() == expected.keys() == {"x.weight", "x.bias", "y.weight", "z.weight"}
        for name, tensor in expected.items():
            assert worker.given[name].dtype == torch.bfloat16 and torch.equal(worker.given[name], tensor)


def test_adapters_alone_are_merged_where_they_arrive(server, adapted, monkeypatch):
    assert_has_merged(server, with_adapters(1))
    sent, send = [], WeightSender._send_all
    monkeypatch.setattr(WeightSender, "_send_all", lambda self, *one: (sent.append(one), send(self, *one)))
    for seed in (2, 3):
        sent.clear()
        assert adapted.holds_base
        adapters = adapters_of(with_adapters(seed))
        adapted.load(adapters.items(), alpha=ALPHA)
        assert_has_merged(server, with_adapters(seed))
        assert sampled(adapted) == expected()
        values = sum(data.nbytes for _, data in sent)
        assert values == sum(tensor.nbytes for tensor in adapters.values()) == 2 * 3 * (90 + 40 + 50 + 70)
        assert len(sent) == len(adapters) + 1  # and the end


def test_workers_that_lost_the_base_weights_want_all(server, adapted):
    server.workers = [Worker(), Worker()]
    adapters = adapters_of(with_adapters(2)).items()
    with pytest.raises(WeightsLost, match=r"did not take the weights: a worker .* has lost the base weights"):
        adapted.load(adapters, alpha=ALPHA)
    assert not adapted.holds_base and not server.workers[0].given
    adapted.load(with_adapters(2).items(), alpha=ALPHA)
    assert_has_merged(server, with_adapters(2))
    other = engine_of(server)  # another run's base weights are not this one's
    other.load(with_adapters(3).items(), alpha=ALPHA)
    with pytest.raises(WeightsLost, match="has lost the base weights"):
        adapted.load(adapters, alpha=ALPHA)


@pytest.mark.parametrize(
    ("change", "alpha", "asked"),
    [
        ({}, ALPHA, 1),
        (adapters_of(with_adapters(3)), ALPHA, 3),
        ({"z.weight": torch.zeros(7, 5).bfloat16()}, ALPHA, 3),
        ({}, ALPHA + 1, 3),
    ],
    ids=["the same", "other adapters", "another base", "another alpha"],
)
def test_what_was_said_is_kept_for_the_same_weights_however_they_are_sent(
    server, adapted, change, alpha, asked
):
    adapted.load(adapters_of(with_adapters(2)).items(), alpha=ALPHA)
    lose_the_last(server, adapted, "forgets")
    assert not adapted.holds_base
    adapted.load((with_adapters(2) | change).items(), alpha=alpha)
    assert sampled(adapted) == expected() and server.count() == asked


WHOLE = with_adapters(2)
ALONE = adapters_of(WHOLE)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (WHOLE | {"x.base_layer.bias": None}, "1 .*: x.base_layer.bias is missing"),
        (WHOLE | {f"y{DOWN}": None}, f"1 .*: y{DOWN} is missing"),
        (WHOLE | {f"x{UP}": torch.zeros(40, 4)}, rf"1 .*: x{UP} has shape \[40, 4\], not \[40, 3\]"),
        (WHOLE | {f"x{DOWN}": torch.zeros(3, 9)}, rf"1 .*: x{DOWN} has shape \[3, 9\], not \[3, 90\]"),
        (WHOLE | {f"w{UP}": torch.zeros(9, 3)}, f"1 .*: w{UP} is no weight of this model"),
        (WHOLE | dict.fromkeys(ALONE), "6 .*: x.base_layer.weight is no weight of this model; .*"),
        (ALONE | {f"y{UP}": None}, f"1 .*: y{UP} is missing"),
        (ALONE | {f"y{UP}": torch.zeros(70, 2)}, rf"1 .*: y{UP} has shape \[70, 2\], not \[70, 3\]"),
        (ALONE | {"z.weight": torch.zeros(7, 5)}, "1 .*: z.weight is no weight of this model"),
    ],
)
def test_adapters_that_do_not_fit_are_named(server, adapted, tensors, told):
    if "x.base_layer.weight" in tensors:
        adapted = engine_of(server)
    sent = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    with pytest.raises(ValueError, match=rf"^{server.url}: {told}$"):
        adapted.load(sent, alpha=ALPHA)
    assert_has_merged(server, with_adapters(1))  # as they were before
    assert not adapted.holds_base
    with pytest.raises(WeightsLost):
        sampled(adapted)
    adapted.load(WHOLE.items(), alpha=ALPHA)
    assert_has_merged(server, WHOLE)


def test_adapters_that_came_twice_are_named(server, adapted):
    with pytest.raises(ValueError, match=f"1 weights .*: x{UP} came twice"):
        adapted.load([*ALONE.items(), (f"x{UP}", ALONE[f"x{UP}"])], alpha=ALPHA)


def test_adapters_that_came_in_part_change_nothing(server, adapted):
    with pytest.raises(KeyError, match="mine"):
        adapted.load(broken(ALONE), alpha=ALPHA)
    assert_has_merged(server, with_adapters(1))
    assert not adapted.holds_base
    adapted.load(WHOLE.items(), alpha=ALPHA)
    assert_has_merged(server, WHOLE)
    assert sampled(adapted) == expected()


def test_without_adapters_nothing_is_kept(server, adapted):
    adapted.load(merged_state(WHOLE.items(), ALPHA))
    assert_has_merged(server, WHOLE)
    assert not adapted.holds_base and server.workers[0].kept_weights is None


def test_the_checksum_tells_weights_apart(server):
    def checksum(tensors):
        with WeightSender(("127.0.0.1", server.http.server_port), 1.0) as sender:
            return sender.send(tensors)

    same = checksum(WEIGHTS.items())
    assert same == checksum(WEIGHTS.items())
    assert same != checksum((WEIGHTS | {"b": WEIGHTS["b"] * 2}).items())
    assert same != checksum((WEIGHTS | {"d": torch.empty(0, 4)}).items())


def test_a_server_that_was_started_otherwise_is_refused_with_the_right_command(server):
    command = rf"python -m geo_r1.train RECIPE --serve=HOST:{server.http.server_port}$"
    server.missing = {GENERATE, "/collective_rpc", "/weight_info"}
    with pytest.raises(ValueError, match=rf"it has no {GENERATE}; .*; start it with: {command}"):
        engine_of(server)
    server.missing = set()
    server.workers[0].config.model_config.logprobs_mode = "raw_logprobs"
    with pytest.raises(ValueError, match="its log-probabilities are raw_logprobs, not processed_logprobs"):
        engine_of(server)
    server.workers[0].config.parallel_config.data_parallel_size = 2
    with pytest.raises(ValueError, match="it has data parallel ranks"):
        engine_of(server)
    server.call = lambda handler, body: handler.answer(500, {"error": {"message": "no 'describe_receiver'"}})
    with pytest.raises(ValueError, match="its workers are not of WeightReceiver; start it with"):
        engine_of(server)


def test_a_server_that_is_not_quite_up_is_waited_for(server):
    answers = [(500, {"error": {"message": "EngineCore encountered an issue"}}), (503, b"")]
    call = server.call
    server.call = lambda handler, body: handler.answer(*answers.pop()) if answers else call(handler, body)
    engine_of(server)
    assert not answers and server.count("/collective_rpc") == 3


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    engine = engine_of(server)
    engine.load(WEIGHTS.items())
    assert server.headers["Authorization"] == "Bearer s3cret"
    server.faults = [(401, {"error": "Unauthorized"})]
    with pytest.raises(ValueError, match="401") as caught:
        sample_one(engine, 0)
    assert "s3cret" not in str(caught.value)


def test_closing_ends_what_another_thread_waits_for(server, engine):
    server.faults = ["stalls"] * 3
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.sample, PROMPTS, 2, SAMPLING, STREAMS)
        while server.count() < 3:
            pass
        engine.close()
        assert waiting.exception() is not None


def test_the_command_of_a_server():
    environment, command = serve_command("/m", port=81, dtype="float32", max_model_len=512, x=1)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "/m"]
    assert command[:5] == server and command[-2:] == ["--x", "1"]
    line = " ".join(command)
    for part in (
        "--load-format dummy",
        "--enable-scale-out",
        "--logprobs-mode processed_logprobs",
        "--worker-extension-cls geo_r1.rollout.vllm.channel.WeightReceiver --host 127.0.0.1",
        "--port 81 --dtype float32 --max-model-len 512",
    ):
        assert part in line
    words = ["--a-b", "--no-c", "--d", '{"e": 0}', "--f", "1"]
    assert flags({"a_b": True, "c": False, "d": {"e": 0}, "f": 1}) == words
