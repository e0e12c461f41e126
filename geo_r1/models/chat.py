"""A chat as text. A template is a program that comes with a model, so its time and its memory have limits."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from geo_r1.errors import one_line

MAX_TEXT = 1 << 24  # characters; a row of a file is no longer, and tokenizing takes seconds
MAX_SECONDS = 10.0  # of computing; an honest template takes milliseconds
MAX_MEMORY = 4 << 30  # bytes
MISTAKES = (
    TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip


class TemplateFault(ValueError):  # noqa: N818  # as a sentence goes on: "the chat template" ...
    """What a chat template did instead of writing a chat; the subject of the sentence is the template."""


class _TimeUp(BaseException):  # which no library takes for an error of its own
    """A template has computed for too long."""


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool) -> str:
    """A chat as the tokenizer's template writes it.

    Args:
        ask: end with the start of the assistant's turn.

    Raises:
        TemplateFault: the template refuses the messages, does not end, or writes too much.
    """
    try:
        with _time_limit(MAX_SECONDS):
            text = tokenizer.apply_chat_template([*messages], add_generation_prompt=ask, tokenize=False)
    except _TimeUp:
        raise TemplateFault(f"has not ended after {MAX_SECONDS:g} s of computing") from None
    except MemoryError:
        raise TemplateFault("takes all memory") from None
    except MISTAKES as error:  # for example, a role that it does not know
        raise TemplateFault(f"refuses the messages: {one_line(error):.300}") from error
    if len(text) > MAX_TEXT:
        raise TemplateFault(f"makes {len(text):,} characters of the messages, more than {MAX_TEXT:,}")
    return text


@contextmanager
def memory_limit() -> Iterator[None]:
    """Let the process take MAX_MEMORY more at most. It holds for all its threads: not for use in a run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_MEMORY
    known = [one for one in (limit, soft, hard) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the body after so many seconds of computing; outside the main thread nothing can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = False

    def interrupt(*_: object) -> None:
        if not over:
            raise _TimeUp

    handler = signal.signal(signal.SIGVTALRM, interrupt)
    before = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_VIRTUAL, *before)
        signal.signal(signal.SIGVTALRM, handler)
