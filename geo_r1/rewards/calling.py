"""Call users' functions, watched by a second thread; whatever they do wrong becomes an error that names them.

They run in the main thread, as in TRL: a signal can interrupt them there, and some libraries need it
(math_verify sets an alarm) or keep state by thread. `async def` functions run together, in an event loop
that stays, so that their clients can keep connections.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from geo_r1.errors import MISTAKE, UserError, one_line, say

MOST_AT_ONCE = 16  # async functions
TICK = 0.25  # seconds
FIRST_WORD = 30.0  # seconds until the first line about a function that runs; each next wait is twice as long
LAST_TRIES = 10  # interruptions, a second apart, of code that swallows them, before the process ends
TIME_TO_CLOSE = 10.0  # seconds
INTERRUPT = signal.SIGURG  # ignored by default, so one that comes too late does nothing
BEAT = signal.SIGVTALRM  # every TICK that the process computes
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PACKAGE = (f"{Path(__file__).parents[1]}{os.sep}", "<frozen ")
LIBRARIES = tuple(
    f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")
)

# By id: an object among a function's arguments, and the sample that it belongs to.
Owners = Mapping[int, tuple[object, str]]


class RewardError(UserError):
    """A reward function raised, took too long, or did not return one finite number or None per completion."""


class _TimeUp(KeyboardInterrupt):  # which libraries pass on
    """The time limit interrupts a function."""


class _Watched:
    """What happened while users' code ran: it was late (who, and by how much), or Ctrl-C came."""

    late = ""
    interrupted = False

    def interrupts(self, error: BaseException | None) -> bool:
        """Whether an error is a Ctrl-C of the user's, not one that the code raised itself."""
        return self.interrupted and isinstance(error, KeyboardInterrupt)


_active: set[_Watched] = set()


def _in_child() -> None:
    """Let SIGTERM end what users' code forks: else multiprocessing.Pool waits for its children for ever."""
    if _active:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def watched(
    running: Collection[str], limit: float = 0.0, tell: Callable[[str], object] = say
) -> Iterator[_Watched]:
    """Run the body, users' code, under a second thread that says what is still running.

    A stop signal has the effect that it had before, and is spoken of. After `limit` seconds the body is
    interrupted; if it goes on all the same, the process ends. Outside the main thread nothing can interrupt.

    Args:
        running: names of the rewards that have not returned; may change meanwhile.
        limit: seconds; 0 is none.
    """
    found, over, stops = _Watched(), threading.Event(), list[int]()
    begun, beats = time.monotonic(), 0
    main = threading.main_thread()
    if threading.current_thread() is not main:
        assert not limit, "only the main thread can be interrupted"
        yield found
        return

    def watch() -> None:
        ticks, word, told = 0, FIRST_WORD, 0
        while not over.wait(TICK):
            ticks += 1  # a process that is suspended does not age
            seconds = ticks * TICK
            if told < len(stops):
                told = len(stops)
                name = signal.Signals(stops[-1]).name
                tell(f"{name}: this step ends first; it waits for {_named(running)}")
            if limit and seconds >= limit:
                break
            if seconds >= word:
                word *= 2
                tell(f"{_named(running)} has been running for {seconds:.0f} s")
        else:
            return
        found.late = found.late or too_late()
        for _ in range(LAST_TRIES):
            assert main.ident is not None
            signal.pthread_kill(main.ident, INTERRUPT)
            if over.wait(1.0):
                return
        say(f"{found.late}, and does not let itself be interrupted")
        sys.stdout.flush()
        os._exit(MISTAKE)

    def interrupt(*_: object) -> None:
        if not over.is_set():
            raise _TimeUp

    def beat(*_: object) -> None:  # comes where the other thread cannot run, as beside a regular expression
        nonlocal beats
        beats += 1
        if limit and min(beats * TICK, time.monotonic() - begun) >= limit and not over.is_set():
            found.late = found.late or too_late()
            raise _TimeUp

    def too_late() -> str:
        return f"{_named(running)} has not returned within rewards.timeout = {limit:g} s"

    def stop(number: int, frame: FrameType | None) -> None:
        stops.append(number)
        found.interrupted |= number == signal.SIGINT
        handler = before[number]
        assert callable(handler)
        handler(number, frame)

    before = {int(number): signal.getsignal(number) for number in STOPS}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, stop)
    signal.signal(INTERRUPT, interrupt)
    signal.signal(BEAT, beat)
    signal.siginterrupt(BEAT, False)
    signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
    _active.add(found)
    watcher = threading.Thread(target=watch, name="rewards", daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        watcher.join()
        _active.remove(found)
        signal.signal(INTERRUPT, signal.SIG_DFL)
        signal.signal(BEAT, signal.SIG_IGN)  # one may still be on its way, and would end the process
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def blamed(
    running: Collection[str],
    limit: float = 0.0,
    tell: Callable[[str], object] = say,
    owners: Owners | None = None,
) -> Iterator[_Watched]:
    """Turn whatever the body, the code of these rewards, raises into a RewardError.

    Only a Ctrl-C of the user's is none.
    """
    found = _Watched()
    try:
        with watched(running, limit, tell) as found:
            yield found
            if found.late:  # it swallowed the interruption
                raise _TimeUp
    except BaseException as error:  # users' code may raise anything, SystemExit included
        if found.late:
            raise RewardError(found.late) from error
        if isinstance(error, RewardError) or found.interrupts(error):
            raise
        raise RewardError(f"{_named(running)}{described(error, owners)}") from error


def _named(running: Collection[str]) -> str:
    return " and ".join(f"reward {name!r}" for name in sorted(running))


class Caller:
    """Calls reward functions. Close it, or use it with `contextlib.closing`.

    Args:
        timeout: most seconds that a call may take, and all `async def` functions together; 0 is no limit.
        tell: prints a line about a function that takes long.
    """

    def __init__(self, timeout: float = 0.0, tell: Callable[[str], object] = say) -> None:
        self.timeout, self.tell = timeout, tell
        self._runner: asyncio.Runner | None = None

    def close(self) -> None:
        """Close the event loop, and end what async functions left in it."""
        if self._runner is not None:
            in_main = threading.current_thread() is threading.main_thread()
            with suppress(KeyboardInterrupt), watched((), TIME_TO_CLOSE if in_main else 0.0):
                self._runner.close()

    def call(
        self,
        functions: Mapping[str, Callable[..., Any]],
        arguments: Callable[[], tuple[dict[str, Any], Owners]],
    ) -> dict[str, Any]:
        """What each function returns, async ones after the others; iterables as lists.

        Args:
            arguments: makes a function's own copy of the arguments, and says whose the objects in it are.

        Raises:
            RewardError: a function raised or took too long.
        """
        returned: dict[str, Any] = {}
        pending: dict[str, tuple[Any, Owners]] = {}
        try:
            for name, function in functions.items():
                keywords, owners = arguments()
                with blamed({name}, self.timeout, self.tell, owners):
                    value = function(**keywords)
                    if inspect.isawaitable(value):
                        pending[name] = value, owners
                    else:
                        returned[name] = _listed(value)
            if pending:
                running = set(pending)
                with blamed(running, self.timeout, self.tell) as found:
                    self._runner = self._runner or asyncio.Runner()
                    try:
                        returned |= self._runner.run(_together(pending, running, found))
                    except KeyboardInterrupt:  # the loop would print how its tasks ended
                        self._runner.get_loop().set_exception_handler(lambda *_: None)
                        raise
        finally:
            for value, _ in pending.values():
                if inspect.iscoroutine(value):
                    value.close()  # no warning of one that was never awaited
        return {name: returned[name] for name in functions}


async def _together(
    pending: Mapping[str, tuple[Any, Owners]], running: set[str], found: _Watched
) -> dict[str, Any]:
    """Await all, at most MOST_AT_ONCE at a time; the first that raises ends the others."""
    gate = asyncio.Semaphore(MOST_AT_ONCE)

    async def one(name: str, value: Any, owners: Owners) -> Any:
        async with gate:
            try:
                return _listed(await value)
            except BaseException as error:
                task = asyncio.current_task()
                if found.late or found.interrupts(error) or (task is not None and task.cancelling()):
                    raise
                raise RewardError(f"reward {name!r}{described(error, owners)}") from error
            finally:
                running.discard(name)

    tasks = {}
    try:
        async with asyncio.TaskGroup() as group:
            for name, (value, owners) in pending.items():
                tasks[name] = group.create_task(one(name, value, owners))
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return {name: task.result() for name, task in tasks.items()}


def _listed(value: Any) -> Any:
    """An iterable as a list, since iterating may run the user's code."""
    return [*value] if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value


def described(error: BaseException, owners: Owners | None = None) -> str:
    """An error as the end of a line: what was raised, where in the user's own files, at which sample."""
    if isinstance(error, UserError):
        return f": {error}"
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = [*traceback.walk_tb(error.__traceback__)]
    text = f" raised {type(error).__name__}: {one_line(error):.200}".removesuffix(": ")
    for others in ((*PACKAGE, *LIBRARIES), PACKAGE):  # a function may be a library's itself
        own = [pair for pair in frames if not pair[0].f_code.co_filename.startswith(others)]
        if own:
            text += f" ({own[-1][0].f_code.co_filename}, line {own[-1][1]})"
            break
    sample = _last_seen([frame for frame, _ in frames], owners or {})
    return text if sample is None else f"{text}; it last looked at sample {sample}"


def _last_seen(frames: Sequence[FrameType], owners: Owners) -> str | None:
    """The only sample, or the one with an object in a variable of the innermost frame that has such one."""
    samples = {sample for _, sample in owners.values()}
    if len(samples) == 1:
        return samples.pop()
    for frame in reversed(frames):
        for value in reversed([*frame.f_locals.values()]):
            if id(value) in owners:
                return owners[id(value)][1]
    return None
