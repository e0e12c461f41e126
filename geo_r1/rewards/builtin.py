"""The rewards of Geo-R1 (arXiv:2510.00072), and DAPO's penalty on long answers.

If the dataset has answers, every function returns None for a sample without one.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from geo_r1.answers import DEFAULT_NUM_CHOICES, extract_answer, extract_choice, well_formed
from geo_r1.errors import UserError

Column = Sequence[Any] | None  # N values of a dataset column
Values = list[float | None]  # N rewards
MOST_CHOICES = 26


def accuracy(
    completions: Sequence[Any],
    answer: Column = None,
    num_choices: Column = None,
    *,
    wrong_score: float = 0.0,
    **kwargs: Any,
) -> Values:
    """1 for a right answer block, `wrong_score` for a wrong or missing one, None if the answer is None.

    A one-letter answer is compared with the choice that `extract_choice` reads in the block; any other is
    compared with the block's text, ignoring case, amounts of white space and how accents are encoded.

    Args:
        completions: N texts, or N lists of TRL messages; the last message counts.
        answer: N true answers.
        num_choices: N numbers of choices; None means 5.
        wrong_score: task units; the paper's versions have 0, -0.8 and -1.

    Raises:
        UserError: an answer is empty or not among its choices, or num_choices is not 2 to 26.
        ValueError: a column does not have N values.
    """
    judged = _judge_answers(completions, answer, num_choices)
    return [None if right is None else 1.0 if right else float(wrong_score) for right in judged]


def format_reward(completions: Sequence[Any], answer: Column = None, **kwargs: Any) -> Values:
    """1 if the whole text is a think block, optional white space and a non-empty answer block, else 0.

    Each of the four tags must occur exactly once; white space around the text is allowed.
    """
    return _each(lambda text: float(well_formed(text)), _texts(completions, answer))


def repetition(completions: Sequence[Any], answer: Column = None, *, n: int = 6, **kwargs: Any) -> Values:
    """-(1 - unique / total) over the n-grams of lower-cased words; 0 for fewer than n words.

    Raises:
        UserError: n is below 1.
    """
    _at_least_1("repetition: n", n)

    def one(text: str) -> float:
        words = text.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return _each(one, _texts(completions, answer))


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
    """Cosine of the length: a longer right answer earns less, a longer wrong one loses less.

        value = end + (start - end) / 2 * (1 + cos(pi * min(length, max_length) / max_length))

    Args:
        completions, answer, num_choices: as in `accuracy`, which decides what is right.
        completion_ids: N lists of token ids; without them, length is the number of words.
        max_length: tokens; from this length on, the value is `end`.
        right_start, right_end, wrong_start, wrong_end: values at length 0 and at max_length, in task units.

    Raises:
        UserError: max_length is below 1; also as in `accuracy`.
    """
    judged = _judge_answers(completions, answer, num_choices)
    ends = {True: (right_start, right_end), False: (wrong_start, wrong_end)}
    fractions = _length_fractions(completions, completion_ids, max_length)
    return _each(lambda right, x: _cosine(*ends[right], min(x, 1.0)), judged, fractions)


def length_published(
    completions: Sequence[Any],
    answer: Column = None,
    completion_ids: Column = None,
    *,
    max_length: int = 1024,
    **kwargs: Any,
) -> Values:
    """The flawed length reward of the published code; use it only to reproduce that code's runs.

    Wrong answers earn as much as right ones, and the curve is not clamped: it rises from 0.5 at max_length
    to 1 again at twice that.
    """
    fractions = _length_fractions(completions, completion_ids, max_length)
    return _each(lambda text, x: _cosine(1.0, 0.5, x), _texts(completions, answer), fractions)


def overlong(
    completions: Sequence[Any],
    answer: Column = None,
    completion_ids: Column = None,
    *,
    max_length: int = 1024,
    cache: int = 256,
    **kwargs: Any,
) -> Values:
    """Soft penalty on length: 0, falling to -1 over the last `cache` tokens before max_length.

        value = min(0, max(-1, (max_length - cache - length) / cache))

    No completion is longer than rollout.max_new_tokens, so max_length should be at most that.

    Args:
        completion_ids: as in `length`.
        max_length: tokens; from this length on, the value is -1.
        cache: tokens, 1 to max_length.

    Raises:
        UserError: max_length is below 1, or cache is out of range.

    Source: DAPO, arXiv:2503.14476, section 3.4.
    """
    _at_least_1("overlong: max_length", max_length)
    if not 1 <= cache <= max_length:
        raise UserError(f"overlong: cache is {cache}, expected 1 to max_length = {max_length}")

    def one(text: str, tokens: int) -> float:
        return min(0.0, max(-1.0, (max_length - cache - tokens) / cache))

    return _each(one, _texts(completions, answer), _lengths(completions, completion_ids))


REWARDS: dict[str, Callable[..., Values]] = {
    "accuracy": accuracy,
    "format": format_reward,
    "length": length,
    "repetition": repetition,
    "overlong": overlong,
    "length_published": length_published,
}


def column(name: str, values: Column, count: int) -> Sequence[Any]:
    """The values of a dataset column; `count` Nones if there is no such column.

    Raises:
        ValueError: the column does not have `count` values.
    """
    if values is None:
        return [None] * count
    if len(values) != count:
        raise ValueError(f"column {name!r} has {len(values)} values for {count} completions")
    return values


def read_answer(answer: Any, num_choices: Any) -> tuple[str, int | None]:
    """A true answer: a capital letter with its number of choices, or other text with None.

    Raises:
        UserError: no completion can match it.
    """
    text = str(answer).strip()
    if not text:
        raise UserError("the answer is empty; null stands for none")
    if len(text) > 1 or not (text.isascii() and text.isalpha()):
        if (
            extract_answer(f"<answer>{text}</answer>") != text
            or text.encode("utf-8", "replace").decode() != text
        ):
            raise UserError(
                f"the answer is {text!r:.80}, which no text between <answer> and </answer> can be"
            )
        return text, None
    count = DEFAULT_NUM_CHOICES if num_choices is None else num_choices
    if isinstance(count, float) and count.is_integer():  # as pandas writes a column with gaps
        count = int(count)
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MOST_CHOICES:
        raise UserError(f"num_choices is {count!r:.80}, expected an integer from 2 to {MOST_CHOICES}")
    if ord(text.upper()) - ord("A") >= count:
        known = "no num_choices, so 5" if num_choices is None else f"num_choices {count}"
        raise UserError(f"the answer is {text!r}, expected one of the first {count} letters ({known})")
    return text.upper(), count


def _each(value: Callable[..., float], first: Sequence[Any], *others: Sequence[Any]) -> Values:
    """Apply `value` to each row of the columns; None if the first column has None."""
    return [None if x is None else value(x, *rest) for x, *rest in zip(first, *others, strict=True)]


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}, expected at least 1")


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * fraction))


def _length_fractions(completions: Sequence[Any], completion_ids: Column, max_length: int) -> list[float]:
    _at_least_1("length: max_length", max_length)
    return [x / max_length for x in _lengths(completions, completion_ids)]


def _lengths(completions: Sequence[Any], completion_ids: Column) -> list[int]:
    """Numbers of tokens, or of words without token ids."""
    if completion_ids is None:
        return [len(_text(completion).split()) for completion in completions]
    return [len(ids) for ids in column("completion_ids", completion_ids, len(completions))]


def _judge_answers(completions: Sequence[Any], answer: Column, num_choices: Column) -> list[bool | None]:
    """Whether each completion is right; None if there is no answer to compare it with."""
    answers = column("answer", answer, len(completions))
    counts = column("num_choices", num_choices, len(completions))
    judged: list[bool | None] = []
    for i, (completion, true, count) in enumerate(zip(completions, answers, counts, strict=True)):
        if true is None:
            judged.append(None)
            continue
        try:
            truth = read_answer(true, count)
        except UserError as error:
            raise UserError(f"answer[{i}]: {error}") from None
        block = extract_answer(_text(completion))
        judged.append(block is not None and _is_right(block, *truth))
    return judged


def _is_right(block: str, answer: str, num_choices: int | None) -> bool:
    if num_choices is not None:
        return extract_choice(block, num_choices) == answer
    # a tokenizer may compose letters with their accents (NFC)
    one, other = (unicodedata.normalize("NFC", text).casefold().split() for text in (block, answer))
    return one == other


def _texts(completions: Sequence[Any], answer: Column) -> list[str | None]:
    """The texts to score; None if the dataset has answers, but not for this sample."""
    answers = column("answer", [""] * len(completions) if answer is None else answer, len(completions))
    return [None if true is None else _text(x) for x, true in zip(completions, answers, strict=True)]


def _text(completion: Any) -> str:
    """A completion's text: itself, or the content of its last message, which may be in parts."""
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(part["text"] for part in content or () if part["type"] == "text")
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"a completion is text or a list of messages, got {completion!r:.80}") from None
