"""The client of a vLLM server: its requests, and the server's failures."""

import base64
import io
import json
import random
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import fake_server
import numpy as np
import pytest
from fake_server import (
    END,
    IMAGE,
    PROMPTS,
    SAMPLING,
    STREAMS,
    WEIGHTS,
    engine_of,
    expected,
    lose_the_last,
    prompt_of,
    sample_one,
    sampled,
)
from PIL import Image

from geo_r1.errors import UserError
from geo_r1.rollout.engine import EngineLost, WeightsLost
from geo_r1.rollout.vllm.requests import flags, seed_of, serve_command
from geo_r1.rollout.vllm.server import GENERATE, ServerEngine


def test_completions_come_in_order_each_from_its_stream(server, engine):
    assert sampled(engine) == expected()
    requests = sorted((body for path, body in server.asked if path == GENERATE), key=lambda b: b["token_ids"])
    assert [body["token_ids"] for body in requests] == [[8, 10], [8, 11], [8, 12]]
    assert [body["sampling_params"]["seed"] for body in requests] == [seed_of(s) for s in STREAMS]
    for body in requests:
        assert (body["return_token_ids"], body["content_parts"], "model" in body) == (True, [], False)
    assert {len(c) for group in sampled(engine) for c in group} == {3} and sampled(engine, [], []) == []


def test_images_go_with_short_prompts_and_come_back_expanded(server, engine):
    images = tuple(np.random.default_rng(i).integers(0, 256, (28, 28 + 28 * i, 3), np.uint8) for i in (0, 1))
    grids = ((1, 2, 2), (1, 2, 4))
    tokens = [IMAGE, 9, IMAGE, IMAGE, 9]
    prompt = prompt_of("s", tokens, image_rows=[0, 2, 3], image_grids=grids, images=images)
    server.expanded = lambda short: [IMAGE, 9, IMAGE, *short[2:]]
    assert sampled(engine, [prompt], ["0/4"]) == expected(["0/4"])
    body = server.asked[-1][1]
    assert body["token_ids"] == [IMAGE, 9, IMAGE, 9]
    for image, part in zip(images, body["content_parts"], strict=True):
        head, _, data = part["url"].partition(",")
        assert (part["type"], head) == ("image_url", "data:image/png;base64")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), image)
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


def good_answer(server, engine):
    """What the server answers to the first prompt, as JSON."""
    sample_one(engine, 0)
    found, (_, body) = {}, server.asked[-1]
    server.generate(SimpleNamespace(answer=lambda _, answer: found.update(answer)), body)
    server.asked = []
    return json.dumps(found)


def broken_in(answer, rng):
    """The answer with one value, somewhere in it, of another kind."""
    place, path = answer, []
    while isinstance(place, dict | list) and place and rng.random() < 0.8:
        key = rng.choice([*place] if isinstance(place, dict) else range(len(place)))
        path.append((place, key))
        place = place[key]
    if not path:
        return rng.choice([None, 7, [], "text", [1]])
    parent, key = path[-1]
    parent[key] = rng.choice([None, "text", {}, [], [None], -1.5, {"x": 1}, "\x1b[31m"])
    return answer


def test_answers_of_any_form_are_asked_for_again_or_refused_in_one_line(server, engine):
    """Never a traceback of another kind: 60 answers, each broken in one place."""
    rng, endings = random.Random(0), Counter()
    good = good_answer(server, engine)
    for _ in range(60):
        server.faults = [(200, broken_in(json.loads(good), rng))]
        try:
            [group] = sample_one(engine, 0)
            endings["asked again" if server.count() > 1 else "as it was"] += 1
            assert [c.token_ids for c in group] == [tokens for tokens, *_ in expected(STREAMS[:1])[0]]
        except (UserError, WeightsLost) as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            endings[type(error).__name__] += 1
            engine.load(WEIGHTS.items())
            good = good_answer(server, engine)
        server.asked = []
    assert endings["asked again"] > 30, endings


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff" * 50, b"null"])
def test_content_that_is_no_answer_is_asked_for_again(content, server, engine):
    server.faults = [(200, content)]
    sample_one(engine, 0)
    assert server.count() == 2


def test_an_endless_answer_is_cut_off(server, engine, monkeypatch):
    monkeypatch.setattr("geo_r1.rollout.vllm.http_client.LONGEST_ANSWER", 50_000)
    server.faults = [(200, b" " * 60_000)]
    sample_one(engine, 0)
    assert server.count() == 2


def test_an_answer_that_comes_byte_by_byte_takes_no_longer_than_the_limit(server):
    engine = engine_of(server, timeout=0.5)
    engine.load(WEIGHTS.items())

    def dribble(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        with suppress(OSError):
            while not server.over.wait(0.05):
                handler.wfile.write(b" ")

    generate, server.generate = server.generate, dribble
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sample_one, engine, 0)
        while server.count() < 2:  # it has given up the first
            pass
        server.generate = generate
        assert waiting.result()


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
    monkeypatch.setattr(fake_server, "said", lambda *_: [8 * 9999])
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
