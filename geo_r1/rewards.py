"""Read answers out of completions and score them: the Geo-R1 rewards, and a registry for others.

Functions have TRL's signature: completions first, each dataset column as a keyword list, one value back
for each completion. Standard library only. Source: Geo-R1, arXiv:2510.00072.
"""

import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from geo_r1.answers import DEFAULT_NUM_CHOICES, extract_answer, extract_choice, well_formed

Column = Sequence[Any] | None  # N values of a dataset column
Values = list[float | None]  # N rewards
RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(ValueError):
    """A reward function raised, or returned something other than one finite number or None a completion."""


@dataclass(frozen=True)
class RewardTable:
    """Rewards of N completions, in task units; None where nothing scored the completion.

    Attributes:
        per_function: for each function its N values, before weighting.
        total: N weighted sums over the functions that gave a number.
    """

    per_function: dict[str, Values]
    total: Values


def accuracy(
    completions: Sequence[Any],
    answer: Column = None,
    num_choices: Column = None,
    *,
    wrong_score: float = 0.0,
    **kwargs: Any,
) -> Values:
    """1 for a right answer block, `wrong_score` for a wrong or missing one, None where the answer is None.

    A one-letter answer is compared with what extract_choice reads in the block; any other with the block's
    text, ignoring case and runs of white space.

    Args:
        completions: N texts, or N lists of TRL messages of which the last counts.
        answer: N true answers.
        num_choices: N numbers of choices; 5 where None.
        wrong_score: task units; the paper's versions have 0, -0.8 and -1.

    Raises:
        ValueError: a column of another length, or an answer that is not among its choices.
    """
    judged = _judge_answers(completions, answer, num_choices)
    return [None if right is None else 1.0 if right else float(wrong_score) for right in judged]


def format_reward(completions: Sequence[Any], answer: Column = None, **kwargs: Any) -> Values:
    """1 where the whole text is a think block, optional white space and a non-empty answer block, else 0.

    Each of the four tags stands exactly once; white space around the text is allowed. None where the answer
    column is given and None.
    """
    return [None if text is None else float(well_formed(text)) for text in _texts(completions, answer)]


def repetition(completions: Sequence[Any], answer: Column = None, *, n: int = 6, **kwargs: Any) -> Values:
    """-(1 - unique / total) over the n-grams of lower-cased words; 0 under n words, None as in format_reward.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"repetition: n is {n}, expected at least 1")

    def one(text: str) -> float:
        words = text.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return [None if text is None else one(text) for text in _texts(completions, answer)]


def length(
    completions: Sequence[Any],
    answer: Column = None,
    num_choices: Column = None,
    completion_ids: Column = None,
    *,
    max_length: int = 1024,
    right_start: float = 1.0,
    right_end: float = 0.5,
    wrong_start: float = -0.5,
    wrong_end: float = 0.0,
    **kwargs: Any,
) -> Values:
    """Cosine of the length: a right answer earns less the longer it is, a wrong one loses less.

        value = end + (start - end) / 2 * (1 + cos(pi * min(length, max_length) / max_length))

    Args:
        completions, answer, num_choices: as in accuracy, which says what is right; None where answer is.
        completion_ids: N lists of token ids; without them a length is a number of words.
        max_length: tokens; from there on the value is `end`.
        right_start, right_end, wrong_start, wrong_end: task units, at length 0 and at max_length.

    Raises:
        ValueError: max_length is below 1, or as in accuracy.
    """
    judged = _judge_answers(completions, answer, num_choices)
    ends = {True: (right_start, right_end), False: (wrong_start, wrong_end)}
    fractions = [min(x, 1.0) for x in _length_fractions(completions, completion_ids, max_length)]
    return [
        None if right is None else _cosine(*ends[right], x)
        for right, x in zip(judged, fractions, strict=True)
    ]


def length_published(
    completions: Sequence[Any],
    answer: Column = None,
    completion_ids: Column = None,
    *,
    max_length: int = 1024,
    **kwargs: Any,
) -> Values:
    """The flawed length reward of the published code; it exists only to reproduce that code's runs.

    Wrong answers earn the curve of right ones, and it is not clamped: 0.5 at max_length rises to 1 again at
    twice that. None as in format_reward.
    """
    texts = _texts(completions, answer)
    fractions = _length_fractions(completions, completion_ids, max_length)
    return [None if text is None else _cosine(1.0, 0.5, x) for text, x in zip(texts, fractions, strict=True)]


def overlong(
    completions: Sequence[Any],
    answer: Column = None,
    completion_ids: Column = None,
    *,
    max_length: int = 1024,
    cache: int = 256,
    **kwargs: Any,
) -> Values:
    """Soft punishment of the length: 0, but over the last `cache` tokens up to max_length it falls to -1.

        value = min(0, max(-1, (max_length - cache - length) / cache))

    It never sees more than rollout.max_new_tokens, so max_length should be at most that. None as in
    format_reward.

    Args:
        completion_ids: as in length.
        max_length: tokens; from there on the value is -1.
        cache: tokens, 1 to max_length.

    Raises:
        ValueError: max_length is below 1, or cache out of its range.

    Source: DAPO, arXiv:2503.14476, section 3.4.
    """
    if max_length < 1:
        raise ValueError(f"overlong: max_length is {max_length}, expected at least 1")
    if not 1 <= cache <= max_length:
        raise ValueError(f"overlong: cache is {cache}, expected 1 to max_length = {max_length}")
    texts, lengths = _texts(completions, answer), _lengths(completions, completion_ids)
    return [
        None if text is None else min(0.0, max(-1.0, (max_length - cache - x) / cache))
        for text, x in zip(texts, lengths, strict=True)
    ]


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * fraction))


def _length_fractions(completions: Sequence[Any], completion_ids: Column, max_length: int) -> list[float]:
    if max_length < 1:
        raise ValueError(f"length: max_length is {max_length}, expected at least 1")
    return [x / max_length for x in _lengths(completions, completion_ids)]


def _lengths(completions: Sequence[Any], completion_ids: Column) -> list[int]:
    """Numbers of tokens; of words where there are no token ids."""
    if completion_ids is None:
        return [len(_text(completion).split()) for completion in completions]
    return [len(ids) for ids in _column("completion_ids", completion_ids, len(completions))]


def _judge_answers(completions: Sequence[Any], answer: Column, num_choices: Column) -> list[bool | None]:
    """Say for each completion whether it is right; None where there is no answer to compare with."""
    answers = _column("answer", answer, len(completions))
    counts = _column("num_choices", num_choices, len(completions))
    judged: list[bool | None] = []
    for i, (completion, true, count) in enumerate(zip(completions, answers, counts, strict=True)):
        if true is None:
            judged.append(None)
            continue
        true, block = str(true).strip(), extract_answer(_text(completion))
        if len(true) == 1 and true.isascii() and true.isalpha():
            count = DEFAULT_NUM_CHOICES if count is None else count
            if ord(true.upper()) - ord("A") >= count:
                raise ValueError(f"answer[{i}] is {true!r}, expected one of the first {count} letters")
            judged.append(block is not None and extract_choice(block, count) == true.upper())
        else:
            judged.append(block is not None and block.casefold().split() == true.casefold().split())
    return judged


def _texts(completions: Sequence[Any], answer: Column) -> list[str | None]:
    """Return the texts to score; None where the answer column is given and None."""
    answers = [""] * len(completions) if answer is None else _column("answer", answer, len(completions))
    return [None if true is None else _text(x) for x, true in zip(completions, answers, strict=True)]


def _column(name: str, values: Column, count: int) -> Sequence[Any]:
    if values is None:
        return [None] * count
    if len(values) != count:
        raise ValueError(f"column {name!r} has {len(values)} values for {count} completions")
    return values


def _text(completion: Any) -> str:
    """Return a completion's text: itself, or the last message's content, which may come in parts."""
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(part["text"] for part in content or () if part["type"] == "text")
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"a completion is text or a list of messages, got {completion!r:.80}") from None


REWARDS: dict[str, RewardFunction] = {"accuracy": accuracy, "format": format_reward, "length": length}
REWARDS |= {"repetition": repetition, "overlong": overlong, "length_published": length_published}


def load_reward(spec: str, **options: Any) -> RewardFunction:
    """Find a reward function and bind its options.

    Args:
        spec: a key of REWARDS, or `module:function`.
        options: keyword-only parameters of a function of REWARDS; of another function any that it takes by
            keyword, except completions.

    Raises:
        ValueError: no such key, module or function; not callable; an option that it does not take.
    """
    function = _import_function(spec) if ":" in spec else REWARDS.get(spec)
    if function is None:
        near = difflib.get_close_matches(spec, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REWARDS)}, or module:function"
        raise ValueError(f"unknown reward {spec!r}; {hint}")
    if not options:
        return function
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if spec not in REWARDS:
        known |= {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} - {"completions"}
    takes_any = spec not in REWARDS and any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in options:
        if name == "completions" or (name not in known and not takes_any):
            raise ValueError(
                f"reward {spec!r} takes no option {name!r}; it takes: {', '.join(sorted(known)) or 'none'}"
            )
    return functools.partial(function, **options)


def _import_function(spec: str) -> RewardFunction:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"reward {spec!r}: expected module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs a user's code, which may raise anything
        raise ValueError(f"reward {spec!r}: cannot import {module_name!r}: {_one_line(error)}") from error
    if not hasattr(module, name):
        raise ValueError(f"reward {spec!r}: module {module_name!r} has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {name!r} is a {type(function).__name__}, expected a function")
    return function


def score(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, float] | None,
    completions: Sequence[Any],
    completion_ids: Column,
    columns: Mapping[str, Sequence[Any]],
) -> RewardTable:
    """Call every function on N completions and add up what they return.

    Args:
        functions: by the name that weights, errors and the table use.
        weights: by name; 1 where a name is missing or weights is None.
        completions: N texts or N lists of messages.
        completion_ids: N lists of token ids, or None.
        columns: dataset columns of N values; each reaches every function as a keyword.

    Raises:
        ValueError: a weight that is not finite or has no function, or a column of another length.
        RewardError: a function raised, or returned other than N finite numbers or Nones.
    """
    weights = {name: 1.0 for name in functions} | dict(weights or {})
    for name, weight in weights.items():
        if name not in functions:
            raise ValueError(f"weight {name!r} has no reward; rewards: {', '.join(functions)}")
        if not math.isfinite(weight):
            raise ValueError(f"weight {name!r} is {weight}, expected a finite number")
    for name, values in columns.items():
        if name in ("completions", "completion_ids"):
            raise ValueError(f"column {name!r} has the name of an argument of reward functions; rename it")
        _column(name, values, len(completions))
    _column("completion_ids", completion_ids, len(completions))
    per_function: dict[str, Values] = {}
    for name, function in functions.items():
        try:
            returned = list(function(completions=completions, completion_ids=completion_ids, **columns))
        except Exception as error:  # a user's function may raise anything; the name must reach the reader
            raise RewardError(f"reward {name!r} raised {_one_line(error)}") from error
        if len(returned) != len(completions):
            raise RewardError(f"reward {name!r} returned {len(returned)} values, expected {len(completions)}")
        per_function[name] = [_number_or_none(name, i, value) for i, value in enumerate(returned)]
    total: Values = []
    for i in range(len(completions)):
        parts = [weights[name] * x for name, values in per_function.items() if (x := values[i]) is not None]
        total.append(sum(parts) if parts else None)
    return RewardTable(per_function, total)


def _number_or_none(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, SupportsFloat) else None
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several numbers
        number = None
    if number is None or not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} returned {value!r:.80} at index {index}, expected a finite number"
        )
    return number


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
