"""How users' reward functions are called: with their own arguments, awaited, watched, interrupted, blamed."""

import asyncio
import copy
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from geo_r1.rewards import Caller, RewardError, calling, score

TEXTS = [[{"role": "assistant", "content": text}] for text in ("first", "second", "third")]
IDS = [[1, 2], [3], [4, 5, 6]]
OWNERS = ["row0", "row0", "row1"]
LIMIT = 0.5  # seconds


def run(*functions, limit=0.0, tell=pytest.fail, columns=None):
    """The values of each function on three completions of two samples."""
    named = {function.__name__: function for function in functions}
    with closing(Caller(limit, tell)) as caller:
        table = score(named, None, TEXTS, IDS, columns or {}, owners=OWNERS, caller=caller)
    return list(table.per_function.values())


def line_of(function, offset):
    return f"{__file__}, line {function.__code__.co_firstlineno + offset}"


def test_every_function_gets_arguments_of_its_own():
    columns = {"answer": ["A", "A", None], "place": [{"at": [1, 2]}, {"at": [3]}, None]}

    def spoils(completions, completion_ids, answer, place, **_):
        completions[0][0]["content"] = "spoilt"
        completions.pop()
        completion_ids[0].clear()
        completion_ids.reverse()
        answer[0] = place[0]["at"][0] = "spoilt"
        place.clear()
        return [0.0] * 3

    def sees(completions, completion_ids, answer, place, **_):
        assert (completions, completion_ids) == (TEXTS, IDS)
        assert answer == ["A", "A", None] and place == [{"at": [1, 2]}, {"at": [3]}, None]
        return [1.0] * 3

    assert run(spoils, sees, columns=columns) == [[0.0] * 3, [1.0] * 3]
    assert IDS == [[1, 2], [3], [4, 5, 6]] and TEXTS[0][0]["content"] == "first"
    assert columns["place"][0] == {"at": [1, 2]}


def test_async_functions_run_together_in_one_loop_that_stays():
    loops, here = [], asyncio.Event()

    async def waits(completions, **_):
        loops.append(asyncio.get_running_loop())
        await here.wait()
        return [float(len(messages[0]["content"])) for messages in completions]

    def plain(completions, **_):
        return (0.5 for _ in completions)  # a generator, too

    async def wakes(completions, **_):
        here.set()
        return [None] * len(completions)

    functions = {"waits": waits, "plain": plain, "wakes": wakes}
    with closing(Caller()) as caller:
        for _ in range(2):
            table = score(functions, None, TEXTS, IDS, {}, caller=caller)
            assert table.per_function == {"waits": [5, 6, 5], "plain": [0.5] * 3, "wakes": [None] * 3}
            assert table.total == [5.5, 6.5, 5.5]
    assert loops[0] is loops[1] and loops[0].is_closed()


def test_so_many_async_functions_run_at_a_time():
    running, most = set(), []

    def numbered(number):
        async def reward(completions, **_):
            running.add(number)
            most.append(len(running))
            await asyncio.sleep(0)
            running.remove(number)
            return [float(number)] * len(completions)

        return reward

    functions = {str(number): numbered(number) for number in range(2 * calling.MOST_AT_ONCE)}
    table = score(functions, None, TEXTS, IDS, {})
    assert max(most) == calling.MOST_AT_ONCE
    assert [values[0] for values in table.per_function.values()] == [*range(2 * calling.MOST_AT_ONCE)]


def test_an_async_function_that_raises_ends_the_others():
    ended = []

    async def waits(**_):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fails(completions, **_):
        await asyncio.sleep(0)
        raise ConnectionError("no judge")

    expected = f"reward 'fails' raised ConnectionError: no judge ({line_of(fails, 2)})"
    with pytest.raises(RewardError, match=f"^{re.escape(expected)}$"):
        run(waits, fails)
    assert ended == [True]


def test_an_async_function_is_not_left_waiting_when_a_plain_one_raises():
    async def never(**_):
        raise AssertionError("started")

    def fails(**_):
        raise ValueError

    with pytest.raises(RewardError, match=r"reward 'fails' raised ValueError \("):  # and no warning
        run(never, fails)


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("a\nb"), SystemExit(0), SystemExit(None), KeyboardInterrupt(), GeneratorExit("x")),
        *(asyncio.CancelledError("x"), BaseExceptionGroup("many", [OSError("one"), OSError("two")])),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_whatever_a_function_raises_is_an_error_that_names_it(error, kind):
    error = copy.copy(error)  # with a traceback of its own

    def mine(**_):
        raise error

    async def mine_async(**_):
        await asyncio.sleep(0)
        raise error

    function = mine if kind == "plain" else mine_async
    with pytest.raises(RewardError) as caught:
        run(function)
    shown = OSError("one") if isinstance(error, BaseExceptionGroup) else error
    text = f"{type(shown).__name__}: {str(shown).replace(chr(10), ' ')}".removesuffix(": ")
    place = "" if shown is not error else f" ({line_of(function, 1 + (kind == 'async'))})"
    assert str(caught.value) == f"reward {function.__name__!r} raised {text}{place}"
    assert caught.value.__cause__ is error


def loop(completions, **_):
    for messages in completions:
        if "third" in messages[0]["content"]:
            raise ValueError("odd")


def nested(completions, **_):
    return [one(messages[0]["content"]) for messages in completions]


def one(text):
    return int(text[0].replace("f", "1"))


def of_the_library(completion_ids, **_):
    return [re.compile("(" * ids[0]) for ids in completion_ids[1:]]


@pytest.mark.parametrize(
    ("function", "place", "sample"),
    [
        (loop, line_of(loop, 3), "row1"),
        (nested, line_of(one, 1), "row0"),
        (of_the_library, line_of(of_the_library, 1), "row0"),
        (lambda **_: [1.0] + None, None, None),
    ],
)
def test_an_error_names_the_users_own_line_and_the_sample(function, place, sample):
    with pytest.raises(RewardError) as caught:
        run(function)
    message = str(caught.value)
    assert place is None or f"({place})" in message
    assert message.partition("; it last looked at sample ")[2] == (sample or "")
    assert len(message) < 400 and "\n" not in message


def test_the_only_sample_is_named_whatever_the_function_looks_at():
    def fails(**_):
        raise ValueError

    with pytest.raises(RewardError, match=r"it last looked at sample row7$"):
        score({"f": fails}, None, TEXTS[:1], IDS[:1], {}, owners=["row7"])


@pytest.mark.usefixtures("ctrl_c")
def test_a_real_interrupt_stays_one(caplog):
    def slow(**_):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()

    async def slow_async(**_):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    for function in (slow, slow_async):
        with pytest.raises(KeyboardInterrupt):
            run(function, tell=lambda text: None)
    gc.collect()
    assert not caplog.records
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def blocks(**_):
    threading.Event().wait()


def spins(**_):
    while True:
        pass


def backtracks(**_):
    """Holds the interpreter's lock all the time."""
    re.match("(a+)+$", "a" * 60 + "b")


def retries(**_):
    while True:
        try:
            threading.Event().wait()
        except Exception:
            continue


def waits_for_a_process(**_):
    subprocess.run([sys.executable, "-c", "import signal; signal.pause()"])


def gives_up_late(completions, **_):
    try:
        threading.Event().wait()
    except BaseException:
        return [1.0] * len(completions)


def fails_late(**_):
    try:
        threading.Event().wait()
    finally:
        raise ValueError("cleaning up")


async def blocks_the_loop(**_):
    threading.Event().wait()


async def awaits_for_ever(**_):
    await asyncio.Event().wait()


HANGING = [blocks, spins, backtracks, retries, waits_for_a_process, gives_up_late, fails_late]


@pytest.mark.parametrize("function", [*HANGING, blocks_the_loop, awaits_for_ever])
def test_a_function_that_hangs_is_named(function, caplog, capfd):
    async def quick(completions, **_):
        return [0.0] * len(completions)

    expected = f"reward {function.__name__!r} has not returned within rewards.timeout = {LIMIT} s"
    with pytest.raises(RewardError, match=f"^{re.escape(expected)}$"):
        run(quick, function, limit=LIMIT)
    assert run(quick, limit=LIMIT) == [[0.0] * 3]  # the next call is as any
    gc.collect()
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_function_that_swallows_interruptions_ends_the_process():
    program = """
import threading
from geo_r1.rewards import Caller, calling, score
calling.LAST_TRIES = 1
def stubborn(**_):
    while True:
        try:
            threading.Event().wait()
        except BaseException:
            pass
score({"stubborn": stubborn}, None, ["x"], [[1]], {}, caller=Caller(0.25))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == (
        "geo_r1: reward 'stubborn' has not returned within rewards.timeout = 0.25 s, "
        "and does not let itself be interrupted\n"
    )


def test_long_calls_and_stop_signals_are_spoken_of(monkeypatch):
    monkeypatch.setattr(calling, "FIRST_WORD", calling.TICK)
    told, received = [], []
    heard = threading.Event()

    def tell(text):
        told.append(text)
        if len(told) == 3:
            heard.set()

    def slow(completions, **_):
        os.kill(os.getpid(), signal.SIGUSR1)
        heard.wait()
        return [1.0] * len(completions)

    def receive(number, _):
        received.append(number)

    before = signal.signal(signal.SIGUSR1, receive)
    try:
        assert run(slow, tell=tell) == [[1.0] * 3]
        assert signal.getsignal(signal.SIGUSR1) is receive
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]
    assert told == [
        "SIGUSR1: this step ends first; it waits for reward 'slow'",
        "reward 'slow' has been running for 0 s",
        "reward 'slow' has been running for 0 s",
    ]


def test_a_function_may_set_an_alarm():
    """math_verify does; it works in the main thread alone."""
    rang = []

    def alarmed(completions, **_):
        before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while not rang:
            signal.pause()
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(completions)

    assert run(alarmed, limit=60.0) == [[1.0] * 3]


def squares(completion_ids, **_):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(len, completion_ids)


def test_a_function_may_use_processes():
    """A pool ends its own by SIGTERM, which the trainer handles."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        assert run(squares, limit=20.0) == [[2.0, 1.0, 3.0]]
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_calls_from_another_thread_work_without_a_limit():
    found = []

    def mine(completions, **_):
        return [1.0] * len(completions)

    thread = threading.Thread(target=lambda: found.extend(run(mine)))
    thread.start()
    thread.join()
    assert found == [[1.0] * 3]
