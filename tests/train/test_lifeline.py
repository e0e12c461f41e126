"""Whatever becomes of a rank, the others end soon after, and the job says why in exactly one line."""

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from geo_r1.train.parallel import lifeline, peers
from geo_r1.train.parallel.lifeline import Lifeline

SOON = 10  # seconds; a machine that is shared may be slow
KILLED = "geo_r1: rank {} was killed (no goodbye)\n"


class Job:
    """Ranks in processes of their own, each stuck until it is told something."""

    def __init__(self, folder: Path, size: int, known=True, grace=0.1):
        self.stderr = folder / "stderr"
        # Python warns of every fork beside a thread; that is what is tested
        python = [sys.executable, "-W", "ignore::DeprecationWarning"]
        script = [*python, Path(__file__).with_name("lifeline_rank.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        with self.stderr.open("w") as stderr:
            self.ranks = [
                subprocess.Popen(
                    [*script, str(i), str(size), str(grace)], stderr=stderr, env=environment, **pipes
                )
                for i in range(size)
            ]
        self.keys = [self.answer(i) for i in range(size)]
        if known:
            self.meet()

    def meet(self):
        for i in range(len(self.ranks)):
            for key in self.keys[:i]:
                self.order(i, key)
        assert [self.answer(i) for i in range(len(self.ranks))] == ["here"] * len(self.ranks)

    def order(self, rank, words):
        self.ranks[rank].stdin.write(words + "\n")
        self.ranks[rank].stdin.flush()

    def answer(self, rank):
        return self.ranks[rank].stdout.readline().strip()

    def ask(self, rank, words):
        self.order(rank, words)
        return self.answer(rank)

    def send(self, rank, number):
        self.ranks[rank].send_signal(number)
        if number == signal.SIGSTOP:
            os.waitpid(self.ranks[rank].pid, os.WUNTRACED)

    def codes(self, *ranks):
        """The exit codes of these ranks, or all; a signal's number, negative."""
        return [self.ranks[i].wait(timeout=SOON) for i in ranks or range(len(self.ranks))]

    def said(self):
        return self.stderr.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_all(victim, tmp_path):
    with Job(tmp_path, 4) as job:
        job.send(victim, signal.SIGKILL)
        assert job.codes() == [-signal.SIGKILL if i == victim else 1 for i in range(4)]
        assert job.said() == KILLED.format(victim)


def test_the_grace_is_short():
    assert lifeline.GRACE + 1 < 5


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_ends_all_with_its_line(culprit, tmp_path):
    with Job(tmp_path, 3) as job:
        assert job.ask(culprit, "fail row 7:   no answer") == "None"
        job.order(culprit, "leave 0")
        assert job.codes() == [2, 2, 2]
        assert job.said() == f"geo_r1: rank {culprit}: row 7: no answer\n"


def test_an_error_that_is_not_the_users_has_another_code(tmp_path):
    with Job(tmp_path, 2) as job:
        job.order(1, "crash KeyError: 'x'")
        assert job.codes() == [1, 1]
        assert job.said() == "geo_r1: rank 1: KeyError: 'x'\n"


def test_a_long_reason_in_any_script_arrives(tmp_path):
    with Job(tmp_path, 2) as job:
        job.order(1, "fail " + "größer " * 1000)
        assert job.codes() == [2, 2]
        [line] = job.said().splitlines()
        assert line.startswith("geo_r1: rank 1: größer größer ")
        assert 1900 < len(line.encode()) <= 2020


def test_all_fail_at_once_and_one_line_says_so(tmp_path):
    with Job(tmp_path, 4) as job:
        for i in range(4):
            job.order(i, "fail no such file")
        assert job.codes() == [2] * 4
        [line] = job.said().splitlines()
        assert line in {f"geo_r1: rank {i}: no such file" for i in range(4)}


@pytest.mark.parametrize("victims", [(0, 1), (2, 0), (1, 3)])
def test_two_killed_at_once(victims, tmp_path):
    with Job(tmp_path, 4) as job:
        for victim in victims:
            job.send(victim, signal.SIGKILL)
        assert job.codes() == [-signal.SIGKILL if i in victims else 1 for i in range(4)]
        assert job.said() in {KILLED.format(victim) for victim in victims}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_clean_ends_in_any_order(order, tmp_path):
    with Job(tmp_path, 3) as job:
        for i, rank in enumerate(order):
            assert job.ask(rank, "close") == "None"
            job.order(rank, "leave -1")
            assert job.codes(rank) == [0]
            for other in order[i + 1 :]:
                assert job.ask(other, "reason 0") == "None"
        assert job.said() == ""


def test_those_who_remain_watch_each_other(tmp_path):
    with Job(tmp_path, 4) as job:
        assert job.ask(0, "close") == "None"
        job.send(3, signal.SIGKILL)
        assert job.codes(1, 2, 3) == [1, 1, -signal.SIGKILL]
        assert job.ask(0, "reason 0") == "None"
        assert job.said() == KILLED.format(3)


def test_the_main_thread_learns_why_and_may_leave_by_itself(tmp_path):
    with Job(tmp_path, 3, grace=SOON) as job:
        for i in (0, 2):
            job.order(i, "reason 60")
            job.order(i, "leave 40")
        job.order(1, "fail too few")
        job.order(1, "leave 30")
        assert [job.answer(i) for i in (0, 2)] == ["rank 1: too few"] * 2
        assert job.codes() == [42, 32, 42]
        assert job.said() == "geo_r1: rank 1: too few\n"


def test_an_error_after_the_first_cause_is_not_printed(tmp_path):
    with Job(tmp_path, 2, grace=SOON) as job:
        job.order(0, "reason 60")
        job.order(0, "fail a connection has closed")
        job.order(0, "leave 40")
        job.send(1, signal.SIGKILL)
        assert job.codes() == [41, -signal.SIGKILL]
        assert job.said() == KILLED.format(1)


def test_an_interpreter_that_hangs_while_it_leaves_is_ended(tmp_path):
    with Job(tmp_path, 2, grace=1) as job:
        job.order(0, "reason 60")
        job.order(0, "hang")
        job.send(1, signal.SIGKILL)
        assert job.codes() == [-signal.SIGALRM, -signal.SIGKILL]


def test_a_stopped_rank_is_not_dead(tmp_path):
    with Job(tmp_path, 3) as job:
        for stopped in (0, 1):
            job.send(stopped, signal.SIGSTOP)
            assert [job.ask(i, "reason 0.2") for i in range(3) if i != stopped] == ["None"] * 2
            job.send(stopped, signal.SIGCONT)
            assert job.ask(stopped, "reason 0.2") == "None"
        for i in range(3):
            assert job.ask(i, "close") == "None"
        assert job.said() == ""


def test_a_stopped_rank_says_the_reason_once_it_goes_on(tmp_path):
    with Job(tmp_path, 4) as job:
        job.send(0, signal.SIGSTOP)
        job.send(2, signal.SIGKILL)
        assert job.codes(1, 3) == [1, 1]
        assert job.said() == ""
        job.send(0, signal.SIGCONT)
        assert job.codes(0) == [1]
        assert job.said() == KILLED.format(2)


def test_forks_hold_no_connection(tmp_path):
    with Job(tmp_path, 3) as job:
        fork = int(job.ask(2, "fork"))
        try:
            job.send(2, signal.SIGKILL)
            assert job.codes() == [1, 1, -signal.SIGKILL]
            assert job.said() == KILLED.format(2)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_the_end_of_a_fork_is_no_death(tmp_path):
    with Job(tmp_path, 3) as job:
        os.kill(int(job.ask(1, "fork")), signal.SIGKILL)
        assert [job.ask(i, "reason 0.2") for i in range(3)] == ["None"] * 3


def test_strangers_are_dropped(tmp_path):
    with Job(tmp_path, 3, known=False) as job:
        _, address, port, token = job.keys[0].split()
        assert address == "127.0.0.1"
        strangers = {
            "a wrong token": f"{token[:-1]}x 1\n",
            "no token": "\n",
            "a rank that is not missing": f"{token} 0\n",
            "no end": "x" * 100_000,
        }
        for sent in strangers.values():
            with socket.create_connection((address, int(port)), timeout=SOON) as stranger:
                stranger.sendall(sent.encode())
                assert dropped(stranger)
        with socket.create_connection((address, int(port)), timeout=SOON) as silent:
            job.meet()
            assert dropped(silent)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, int(port)), timeout=SOON)
        assert [job.ask(i, "reason 0") for i in range(3)] == ["None"] * 3
        assert job.said() == ""


def dropped(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(peers, "SECONDS_TO_MEET", 0.1)
    with pytest.raises(TimeoutError, match=r"^ranks \[1, 2\] have not come within 0.1 s$"):
        Lifeline.start(0, 3, dist.HashStore(), "localhost")


def test_a_rank_that_cannot_be_reached_is_named():
    store = dist.HashStore()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        store.set("lifeline/0", f"127.0.0.1 {taken.getsockname()[1]} token")
        with pytest.raises(ConnectionError, match=r"^rank 1 cannot reach rank 0 at 127.0.0.1 port \d+ \("):
            Lifeline.start(1, 2, store, "127.0.0.1")


def test_torch_stores_will_do():
    store, threads = dist.HashStore(), threading.active_count()
    with ThreadPoolExecutor(3) as pool:
        lines = [*pool.map(lambda rank: Lifeline.start(rank, 3, store, "localhost"), range(3))]
    assert [line.reason(0) for line in lines] == [None] * 3
    for line in lines:
        line.close()
        line.close()  # once more does nothing
    assert threading.active_count() == threads


def test_one_rank_alone_only_says_its_reason(capfd):
    threads = threading.active_count()
    line = Lifeline.start(0, 1, dist.HashStore(), "localhost")
    assert threading.active_count() == threads
    assert line.reason(60) is None
    line.fail("no such\nfile")
    line.fail("nor this")
    line.close()
    assert capfd.readouterr().err == "geo_r1: no such file\n"
