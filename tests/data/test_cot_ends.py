"""The command `cot` against a server that misbehaves: each sample ends once, also after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import RUBBISH, ChatServer, completion
from cot_cases import FAST, card, dataset, files, run
from data_cases import KEY, ends_with, lines

import geo_r1
from geo_r1.data import read_samples
from geo_r1.data.__main__ import main

pytestmark = pytest.mark.usefixtures("no_waits")


def test_every_sample_ends_once_on_a_server_that_fails_stalls_and_talks_rubbish(tmp_path):
    data, out = dataset(tmp_path, 40), tmp_path / "cot.jsonl"
    (tmp_path / "data" / "images" / "3.png").unlink()
    (tmp_path / "data" / "images" / "4.png").write_bytes(b"GIF89a")
    troubles = [500, 503, (429, {"Retry-After": "9"}, b""), "stall", "close", *RUBBISH]
    script = {f"s{i}": [trouble, "answer"] for i, trouble in enumerate(troubles, 5)}
    script |= {"s30": [400], "s31": [500], "s32": ["html"], "s33": [completion("<think>", "length", (50, 7))]}
    script |= {"s34": [completion("x", "content_filter")], "s35": [completion("é" * 10)]}
    with ChatServer(script) as server:
        run(server, data, out, "--timeout", "0.5", "--retries", "30", "--price-in", "1")
    written, failed = files(out)
    assert sorted(written + failed) == sorted(f"s{i}" for i in range(40))
    assert sorted(failed) == ["s3", "s30", "s31", "s32", "s33", "s34", "s4"]
    assert server.most_at_once <= 4
    assert "s3" not in server.asked and "s4" not in server.asked
    errors = {row["id"]: row["error"] for row in lines(out.with_suffix(".failed.jsonl"))}
    assert errors["s3"] == f"sample s3: image {tmp_path / 'data/images/3.png'} does not exist"
    assert errors["s33"] == "cut off after 7 tokens: raise --max-tokens"
    assert (card(out)["num_samples"], card(out)["num_failed"]) == (33, 7)
    assert card(out)["output_tokens"] == 33 * 10 + 7


def test_what_has_ended_is_not_asked_again_unless_failures_shall_be(tmp_path):
    data, out = dataset(tmp_path, 6), tmp_path / "cot.jsonl"
    script = {"s1": [400, "answer"], "s4": [400, 400, "answer"]}
    with ChatServer(script) as server:
        run(server, data, out, "--limit", "3")
        assert sorted(server.asked.elements()) == ["s0", "s1", "s2"]
        run(server, data, out)
        run(server, data, out)
        assert server.asked.total() == 6 and server.asked["s1"] == 1
        run(server, data, out, "--retry-failed", "--limit", "2")  # s4 is not among these
        assert sorted(files(out)[0]) == ["s0", "s1", "s2", "s3", "s5"] and files(out)[1] == ["s4"]
        run(server, data, out, "--retry-failed")
        assert files(out)[1] == ["s4"]
        run(server, data, out, "--retry-failed", "--max-tokens", "4096")
    assert sorted(files(out)[0]) == [f"s{i}" for i in range(6)] and files(out)[1] == []
    assert server.asked == {"s0": 1, "s1": 2, "s2": 1, "s3": 1, "s4": 3, "s5": 1}
    assert card(out)["max_tokens"] == 4096


def test_a_kill_and_restart_loses_and_repeats_none(tmp_path):
    data, out, num, limit = dataset(tmp_path, 30), tmp_path / "cot.jsonl", 30, 4
    held = {"count": 0}

    def gate(name):
        if server.answered.total() >= 13 and process.poll() is None:
            held["count"] += 1
            if held["count"] == limit:  # all that may be in flight are held, so whatever came is recorded
                process.send_signal(signal.SIGKILL)
            process.wait(60)

    with ChatServer({"s7": [400]}, gate=gate) as server:
        given = ["--data", data, "--out", out, "--url", server.url, "--model", "teach", *FAST]
        process = subprocess.Popen(
            [sys.executable, "-m", "geo_r1.data", "cot", *given],
            cwd=Path(geo_r1.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, said
        written, failed = files(out)
        before = dict(server.asked)
        unfinished = before.keys() - {*written, *failed}
        assert len(unfinished) == limit and 12 <= len(written) + len(failed) < num
        with out.open("a") as file:
            file.write('{"id": "s29", "resp')  # the line that was being written
        run(server, data, out)
    written, failed = files(out)
    assert sorted(written + failed) == sorted(f"s{i}" for i in range(num))
    assert failed == ["s7"]
    for name, count in server.asked.items():
        assert count == 1 + (name in unfinished), name
    assert KEY not in said
    read_samples(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_keeps_what_came(tmp_path, number, capsys, ctrl_c):
    data, out = dataset(tmp_path, 8), tmp_path / "cot.jsonl"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def gate(name):
        if name == "s5" and server.asked["s5"] == 1:
            os.kill(os.getpid(), number)

    with ChatServer({"s5": ["stall", "answer"]}, gate=gate) as server:
        given = ["--data", data, "--out", out, "--url", server.url, "--model", "teach", "--concurrency", "1"]
        assert main(["cot", *map(str, given)]) == 130
        assert files(out) == ([f"s{i}" for i in range(5)], [])
        assert card(out)["num_samples"] == 5
        run(server, data, out)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert sorted(files(out)[0]) == [f"s{i}" for i in range(8)]
    assert server.asked == {f"s{i}": 1 + (i == 5) for i in range(8)}
    assert "5 samples" in capsys.readouterr().out


def test_the_end_of_all_keeps_what_came(tmp_path):
    data, out = dataset(tmp_path, 8), tmp_path / "cot.jsonl"
    with ChatServer({"s5": [401, "answer"]}) as server:
        message = f"{server.url}, model 'teach': status 401: sorry, 401"
        ends_with(message, lambda: run(server, data, out, "--concurrency", "1"))
        assert files(out) == ([f"s{i}" for i in range(5)], [])
        run(server, data, out)
    assert sorted(files(out)[0]) == [f"s{i}" for i in range(8)]


def test_a_reply_that_fits_into_no_line_is_a_failure(tmp_path, monkeypatch):
    data, out = dataset(tmp_path, 2), tmp_path / "cot.jsonl"
    monkeypatch.setattr("geo_r1.data.journal.MAX_LINE", 2000)
    with ChatServer({"s1": [completion("x" * 3000)]}) as server:
        run(server, data, out)
    assert files(out) == (["s0"], ["s1"])
    assert "too many for a line" in lines(out.with_suffix(".failed.jsonl"))[0]["error"]
