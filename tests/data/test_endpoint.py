"""An endpoint that fails in every way: each request ends once, and the key stays where it is."""

import json
import logging
import os
import signal
import threading

import pytest
from chat_server import RUBBISH, ChatServer, closed_port, completion
from data_cases import KEY, encoded, ends_with, make_image

from geo_r1.data import Sample
from geo_r1.data.teaching.endpoint import (
    Endpoint,
    EndpointConfig,
    Failure,
    Reply,
    chat_messages,
)

pytestmark = pytest.mark.usefixtures("no_waits")


def messages_of(name):
    return lambda: [{"role": "user", "content": f"[{name}] where is it?"}]


def ask(server, names, **options):
    """Ask for these names; returns outcomes by name, each of which came once."""
    url = server if isinstance(server, str) else server.url
    options = {"concurrency": 4, "retries": 2, "timeout": 10.0, **options}
    with Endpoint(EndpointConfig(url, "m", **options)) as chat:
        outcomes = list(chat.run((name, messages_of(name)) for name in names))
    assert sorted(name for name, _ in outcomes) == sorted(names)
    return dict(outcomes)


# Replies


def test_a_reply_has_its_text_tokens_and_finish_reason():
    script = {
        "cut": [completion("so far", "length", (7, 3))],
        "bare": [b'{"choices": [{"message": {"content": "hi"}}]}'],
    }
    with ChatServer(script) as server:
        outcomes = ask(server, ["a", "cut", "bare"], temperature=0.5, max_tokens=9)
    assert outcomes == {
        "a": Reply("<answer>a</answer>", 100, 10, "stop"),
        "cut": Reply("so far", 7, 3, "length"),
        "bare": Reply("hi", 0, 0, "unknown"),
    }
    for _, body, headers in server.requests:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 9)
        assert headers["Authorization"] == f"Bearer {KEY}"


def test_what_is_not_set_is_not_sent_and_no_key_is_none(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer() as server:
        ask(server, ["a"])
    _, body, headers = server.requests[0]
    assert "temperature" not in body
    assert headers["Authorization"] == "Bearer none"


def test_half_a_surrogate_pair_is_replaced():
    with ChatServer({"a": [completion("x\ud800y")]}) as server:
        assert ask(server, ["a"])["a"].text == "x?y"


@pytest.mark.parametrize(
    "usage", ['"many"', "null", '{"prompt_tokens": -5, "completion_tokens": "3"}', "[1]"]
)
def test_tokens_that_are_no_numbers_count_as_none(usage):
    body = f'{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {usage}}}'
    with ChatServer({"a": [body.encode()]}) as server:
        assert ask(server, ["a"])["a"] == Reply("x", 0, 0, "unknown")


def test_nothing_to_ask():
    assert ask(closed_port(), []) == {}


# Concurrency


def test_as_many_requests_as_allowed_are_in_flight_and_no_more():
    barrier = threading.Barrier(3)
    with ChatServer(gate=lambda name: barrier.wait(20)) as server:
        ask(server, [f"n{i}" for i in range(12)], concurrency=3)
    assert server.most_at_once == 3


def test_messages_are_made_only_when_they_are_sent():
    made, seen = [], []

    def maker(name):
        return lambda: made.append(name) or messages_of(name)()

    with ChatServer() as server, Endpoint(EndpointConfig(server.url, "m", concurrency=2)) as chat:
        for name, _ in chat.run((f"n{i}", maker(f"n{i}")) for i in range(20)):
            seen.append(name)
            assert len(made) <= len(seen) + 2
    assert sorted(seen) == sorted(made) and len(made) == 20


# Trouble


@pytest.mark.parametrize("step", [408, 409, 429, 500, 503, "close", *RUBBISH])
def test_what_may_pass_is_tried_again(step, no_waits):
    with ChatServer({"a": [step, step, "answer"]}) as server:
        outcomes = ask(server, ["a", "b"])
    assert outcomes["a"].text == "<answer>a</answer>"
    assert server.asked == {"a": 3, "b": 1}
    assert len(no_waits) == 2


def test_a_stalled_request_is_given_up_and_tried_again():
    with ChatServer({"a": ["stall", "answer"]}) as server:
        assert ask(server, ["a"], timeout=0.2, retries=20)["a"].text == "<answer>a</answer>"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (500, "status 500: sorry, 500 (3 tries)"),
        ("html", "the response is not JSON (3 tries)"),
        ("no choices", "the response has no choices (3 tries)"),
        ("null", "the reply is empty (finish reason stop) (3 tries)"),
        (
            (502, {}, RUBBISH["html"]),
            "status 502: <html><body>502, says the [31mproxy</body></html> (3 tries)",
        ),
        ((500, {}, b'{"error": "out of\\nmemory"}'), "status 500: out of memory (3 tries)"),
        ((500, {}, b'{"error": {"message": "' + b"x" * 9999 + b'"}}'), "status 500: " + "x" * 388),
        ((500, {}, b"[" * 70_000), "status 500: " + "[" * 388),
    ],
)
def test_after_the_last_try_it_is_a_failure(step, reason):
    with ChatServer({"a": [step]}) as server:
        outcomes = ask(server, ["a", "b"])
    assert outcomes["a"] == Failure(reason)
    assert isinstance(outcomes["b"], Reply)
    assert server.asked["a"] == 3


def test_a_connection_lost_each_time_is_the_failure_of_one():
    with ChatServer({"a": ["close"]}) as server:
        outcomes = ask(server, ["a", "b"], concurrency=1)
    assert outcomes["a"].reason.startswith("the connection failed: ")
    assert isinstance(outcomes["b"], Reply)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (400, "status 400: sorry, 400"),
        (413, "status 413: sorry, 413"),
        ((422, {}, b'{"detail": "too long"}'), "status 422: too long"),
        (completion("x", "content_filter"), "the model refuses: content_filter"),
        (completion(None, refusal="not this place"), "the model refuses: not this place"),
        (completion("", "length"), "the reply is empty (finish reason length)"),
        ("endless", "the response is longer than 1 MiB"),
    ],
)
def test_a_refusal_is_the_failure_of_one_and_not_tried_again(step, reason):
    with ChatServer({"a": [step]}) as server:
        outcomes = ask(server, ["a", "b"])
    assert outcomes["a"] == Failure(reason)
    assert isinstance(outcomes["b"], Reply)
    assert server.asked["a"] == 1


def test_an_error_page_without_end_is_read_as_far_as_it_is_shown():
    page = (503, {"Content-Length": str(2**40)}, b"busy" * 2**15)
    with ChatServer({"a": [page]}) as server:
        assert ask(server, ["a"], retries=0)["a"].reason == "status 503: " + "busy" * 97


@pytest.mark.parametrize(
    ("after", "wait"),
    [("7", 7), ("1.5", 1.5), ("1e9", 120), ("inf", 120), ("-3", 0), ("nan", 0), ("soon", 0)],
)
def test_the_wait_that_a_server_asks_for_is_kept_within_limits(after, wait, no_waits):
    with ChatServer({"a": [(429, {"Retry-After": after}, b""), "answer"]}) as server:
        assert isinstance(ask(server, ["a"])["a"], Reply)
    assert no_waits == [pytest.approx(wait)] if wait else no_waits[0] <= 0.5


# The end of all


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (401, "status 401: sorry, 401"),
        (403, "status 403: sorry, 403"),
        (404, "status 404: sorry, 404"),
        ((307, {"Location": "http://127.0.0.1:1/"}, b"elsewhere"), "status 307: elsewhere"),
        (
            (400, {}, b'{"error": {"message": "no model m", "code": "model_not_found"}}'),
            "status 400: no model m",
        ),
        ((400, {}, b'{"error": {"message": "which?", "param": "model"}}'), "status 400: which?"),
        ((429, {}, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'), "status 429: pay"),
    ],
)
def test_what_fails_for_every_request_ends_the_run(step, said):
    with ChatServer({f"n{i}": [step] for i in range(9)}) as server:
        ends_with(f"{server.url}, model 'm': {said}", lambda: ask(server, [f"n{i}" for i in range(9)]))
    assert server.asked.total() <= 4 and max(server.asked.values()) == 1


def test_replies_that_came_with_the_end_are_kept():
    barrier = threading.Barrier(2)
    came = []
    with (
        ChatServer({"bad": [401]}, gate=lambda name: barrier.wait(20)) as server,
        Endpoint(EndpointConfig(server.url, "m", concurrency=2)) as chat,
        pytest.raises(ValueError, match="status 401"),
    ):
        for name, _ in chat.run((name, messages_of(name)) for name in ("good", "good2", "good3", "bad")):
            came.append(name)
    assert "bad" not in came and {"good", "good2"} <= {*came}


def test_an_endpoint_that_is_not_there_is_named():
    url = closed_port()
    with pytest.raises(ValueError, match=rf"^{url}/v1 cannot be reached: the connection failed: ") as caught:
        ask(url, ["a", "b", "c"])
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_the_run_at_once(ctrl_c):
    came = []

    def gate(name):
        if name == "n5":
            os.kill(os.getpid(), signal.SIGINT)

    with (
        ChatServer({"n5": ["stall"]}, gate=gate) as server,
        pytest.raises(KeyboardInterrupt),
        Endpoint(EndpointConfig(server.url, "m", concurrency=1)) as chat,
    ):
        for name, _ in chat.run((f"n{i}", messages_of(f"n{i}")) for i in range(9)):
            came.append(name)
    assert came == ["n0", "n1", "n2", "n3", "n4"]


def test_who_stops_listening_leaves_nothing_in_flight():
    with (
        ChatServer({"n1": ["stall"]}) as server,
        Endpoint(EndpointConfig(server.url, "m", concurrency=2)) as chat,
    ):
        replies = chat.run((f"n{i}", messages_of(f"n{i}")) for i in range(9))
        assert next(replies)[0] == "n0"
        replies.close()


def test_an_error_between_two_replies_ends_all_quietly():
    """A generator that outlives its endpoint must not ask for the event loop again; warnings are errors."""
    with ChatServer({"n1": ["stall"]}) as server:
        chat = Endpoint(EndpointConfig(server.url, "m", concurrency=2))
        replies = chat.run((f"n{i}", messages_of(f"n{i}")) for i in range(9))
        with pytest.raises(ZeroDivisionError), chat:
            next(replies)
            raise ZeroDivisionError
        replies.close()


# The key


@pytest.mark.parametrize(
    "step",
    [
        (400, {}, json.dumps({"error": {"message": f"bad key {KEY}!"}}).encode()),
        (500, {}, f"<p>{KEY}".encode() * 50),
        completion(f"your key is {KEY}"),
        completion(None, refusal=f"not with {KEY}"),
    ],
)
def test_an_echoed_key_is_taken_out(step, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with ChatServer({"a": [step]}) as server:
        outcome = ask(server, ["a"])["a"]
    assert KEY not in repr(outcome) and "[key]" in repr(outcome)
    assert not any(KEY[i:] in repr(outcome) for i in range(len(KEY) - 8))
    assert KEY not in caplog.text + "".join(capfd.readouterr())


def test_an_echoed_key_is_taken_out_of_the_end_of_all():
    body = json.dumps({"error": {"message": f"Incorrect key {KEY}"}}).encode()
    with ChatServer({"a": [(401, {}, body)]}) as server:
        ends_with(f"{server.url}, model 'm': status 401: Incorrect key [key]", lambda: ask(server, ["a"]))


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv("OTHER", f"{KEY}\nX-Evil: 1")
    ends_with(
        "OTHER holds characters that cannot be part of a key",
        lambda: Endpoint(EndpointConfig("http://localhost", "m", key_variable="OTHER")),
    )


def test_a_key_in_the_address_is_refused_and_not_shown():
    said = "--url must be http(s)://host[:port]/path; a key belongs in OPENAI_API_KEY"
    for url in (
        f"http://me:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        f"ftp://{KEY}",
        "",
        "http://a:x/",
        "http://[",
    ):
        ends_with(said, lambda url=url: EndpointConfig(url, "m"))
    assert KEY not in repr(EndpointConfig("http://host/v1", "m"))


# Messages that cannot be made


def test_text_that_cannot_be_sent_is_the_failure_of_its_request():
    with ChatServer() as server, Endpoint(EndpointConfig(server.url, "m")) as chat:
        outcomes = dict(chat.run([("bad", messages_of("b\ud800")), ("fine", messages_of("fine"))]))
    assert outcomes["bad"] == Failure("the messages cannot be written as UTF-8: surrogates not allowed")
    assert isinstance(outcomes["fine"], Reply)


def test_a_missing_or_broken_image_is_the_failure_of_its_request(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(make_image(40, 40), "PNG")[:900])
    samples = [
        Sample(path.stem, ({"role": "user", "content": [{"type": "image"}]},), (path,))
        for path in (tmp_path / "gone.png", broken)
    ]
    with ChatServer() as server, Endpoint(EndpointConfig(server.url, "m")) as chat:
        requests = [(s.id, lambda s=s: chat_messages(s)) for s in samples]
        outcomes = dict(chat.run([*requests, ("fine", messages_of("fine"))]))
    assert outcomes["gone"] == Failure(f"sample gone: image {tmp_path / 'gone.png'} does not exist")
    assert outcomes["broken"].reason.startswith(f"sample broken: image {broken} cannot be read")
    assert server.asked == {"fine": 1}
