"""A chat endpoint on this machine that does what a script says, request by request."""

import json
import re
import socket
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RUBBISH = {
    "html": b"<html><body>502, says the \x1b[31mproxy</body></html>",
    "truncated": b'{"choices": [{"message": {"content": "<thi',
    "deep": b"[" * 100_000,
    "no choices": b'{"choices": []}',
    "not a list": b'{"choices": {"message": 3}}',
    "null": b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
    "blank": b'{"choices": [{"message": {"content": " \\n"}, "finish_reason": "stop"}]}',
}


def completion(text, finish_reason="stop", usage=(100, 10), **message):
    body = {
        "choices": [{"message": {"content": text, **message}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }
    return json.dumps(body).encode()


class ChatServer:
    """Answers /v1/chat/completions; use it in a `with` statement.

    Requests are told apart by a name in square brackets in their last message, "[a7] which tile is it?".
    Each takes the next step of its script, and the last one ever after; a name without a script is answered.
    A step is a status, a tuple (status, headers, body), bytes that are the body of a response with status
    200, a key of `RUBBISH`, or one of:

        "answer": what `reply(name)` returns;
        "stall": nothing, until the client has had enough;
        "close": the connection ends before the response does;
        "endless": a response that does not end.

    Args:
        script: steps by name.
        reply: text by name.
        gate: called with the name while a request counts as in flight, before its step.

    Attributes:
        requests: (name, body, headers) in the order in which they came.
        asked, answered: how often, by name.
        most_at_once: requests in flight.
    """

    def __init__(self, script=None, reply=lambda name: f"<answer>{name}</answer>", gate=lambda name: None):
        self.script, self.reply, self.gate = script or {}, reply, gate
        self.requests, self.asked, self.answered = [], Counter(), Counter()
        self.most_at_once = self._at_once = 0
        self._steps = defaultdict(int)
        self._lock, self.ended = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": self}))
        self._server.daemon_threads = False  # joined, so that no socket is left open
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_step(self, body, headers):
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
        name = re.search(r"\[([\w.-]+)\]", text)[1]
        with self._lock:
            self.requests.append((name, body, headers))
            self.asked[name] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            steps = self.script.get(name, ["answer"])
            step = steps[min(self._steps[name], len(steps) - 1)]
            self._steps[name] += 1
        return name, step

    def left(self, name, answered):
        """Before the client can know: what it sends next is not in flight with this one."""
        with self._lock:
            self._at_once -= 1
            self.answered[name] += answered


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20  # of a connection that is kept

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, step = self.chat.next_step(body, self.headers)
        self.chat.gate(name)
        self.chat.left(name, step == "answer")
        with suppress(OSError):  # the client has gone
            self._take(name, step)

    def _take(self, name, step):
        if step == "answer":
            self._send(200, {}, completion(self.chat.reply(name)))
        elif isinstance(step, bytes):
            self._send(200, {}, step)
        elif isinstance(step, str) and step in RUBBISH:
            self._send(200, {}, RUBBISH[step])
        elif step == "stall":
            self.close_connection = True
            self.connection.recv(1)  # returns when the client closes
        elif step == "close":
            self.close_connection = True
            self._send(200, {"Content-Length": "1000"}, b'{"choices": [')
        elif step == "endless":
            self.close_connection = True
            self._send(200, {"Content-Length": str(2**40)}, b"")
            while not self.chat.ended.is_set():
                self.wfile.write(b" " * 65536)
        else:
            status, headers, said = step if isinstance(step, tuple) else (step, {}, b"")
            said = said or json.dumps({"error": {"message": f"sorry, {status}"}}).encode()
            self._send(status, headers, said)

    def _send(self, status, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self):
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_):
        pass


def closed_port():
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
