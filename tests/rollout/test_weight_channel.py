"""How weights reach a server's workers, whole or as adapters alone, and what is said when they do not."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client

import pytest
import torch
from fake_server import (
    ALPHA,
    WEIGHTS,
    WHOLE_MODEL,
    Worker,
    adapters_of,
    engine_of,
    expected,
    lose_the_last,
    sampled,
    with_adapters,
)

from geo_r1.models.lora import DOWN, UP, merged_state
from geo_r1.rollout.engine import WeightsLost
from geo_r1.rollout.vllm import channel
from geo_r1.rollout.vllm.channel import WeightSender


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
            assert json.loads(connection.recv_bytes())[0] == "a"
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


def test_strangers_keep_no_worker_waiting(server, monkeypatch):
    """Thirty that say nothing, each with a minute to prove itself, came before the worker."""
    monkeypatch.setattr(channel, "GREETING", 60.0)
    with WeightSender(("127.0.0.1", server.http.server_port), 20.0) as sender, ThreadPoolExecutor(1) as pool:
        arguments, worker = sender.arguments() | WHOLE_MODEL, Worker()
        address = arguments["host"], arguments["port"]
        strangers = [socket.create_connection(address) for _ in range(30)]
        right = pool.submit(worker.receive_weights, **arguments)
        assert sender.accept(1, lambda: True)
        sender.send(WEIGHTS.items())
        assert right.result() == {"refused": None, "lost": None}
        for stranger in strangers:
            stranger.close()


def test_a_stranger_that_sends_a_byte_now_and_then_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(channel, "GREETING", 0.3)
    with WeightSender(("127.0.0.1", server.http.server_port), 20.0) as sender:
        arguments = sender.arguments()
        with socket.create_connection((arguments["host"], arguments["port"])) as stranger:
            stranger.settimeout(0.05)
            for _ in range(600):  # a byte resets the time limit of a read
                try:
                    stranger.send(b"x")
                    if not stranger.recv(4096):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("the stranger was not cut off")


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
