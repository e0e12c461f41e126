"""Find reward functions, built in or users' own, call them and add up their values."""

import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from geo_r1.errors import UserError, one_line
from geo_r1.rewards.builtin import REWARDS, Column, Values, column

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(UserError):
    """A reward function raised, or did not return one finite number or None per completion."""


@dataclass(frozen=True)
class RewardTable:
    """Rewards of N completions, in task units.

    Attributes:
        per_function: each function's N values, before weighting; None if it did not score the completion.
        total: N weighted sums over the functions that returned a number; None if none did.
    """

    per_function: dict[str, Values]
    total: Values


def load_reward(spec: str, **options: Any) -> RewardFunction:
    """Find a reward function and bind its options.

    Args:
        spec: a key of REWARDS, or `module:function`.
        options: for a function in REWARDS, its keyword-only parameters; for others, any that they take by
            keyword, except completions.

    Raises:
        UserError: no such key, module or function; not callable; or it does not take an option.
    """
    function = _import_function(spec) if ":" in spec else REWARDS.get(spec)
    if function is None:
        near = difflib.get_close_matches(spec, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REWARDS)}, or module:function"
        raise UserError(f"unknown reward {spec!r}; {hint}")
    if not options:
        return function
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if spec not in REWARDS:
        known |= {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} - {"completions"}
    takes_any = spec not in REWARDS and any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in options:
        if name == "completions" or (name not in known and not takes_any):
            raise UserError(
                f"reward {spec!r} takes no option {name!r}; it takes: {', '.join(sorted(known)) or 'none'}"
            )
    return functools.partial(function, **options)


def _import_function(spec: str) -> RewardFunction:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"reward {spec!r}: expected module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UserError(f"reward {spec!r}: cannot import {module_name!r}: {_described(error)}") from error
    if not hasattr(module, name):
        raise UserError(f"reward {spec!r}: module {module_name!r} has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"reward {spec!r}: {name!r} is a {type(function).__name__}, expected a function")
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
        functions: by name, as used in weights, errors and the table.
        weights: by name; 1 if a name is missing or weights is None.
        completions: N texts or N lists of messages.
        completion_ids: N lists of token ids, or None.
        columns: dataset columns of N values; every function gets each as a keyword.

    Raises:
        UserError: a weight is not finite or has no function, or a column has the name of an argument.
        RewardError: a function raised, or did not return N finite numbers or Nones.
        ValueError: a column does not have N values.
    """
    weights = {name: 1.0 for name in functions} | dict(weights or {})
    for name, weight in weights.items():
        if name not in functions:
            raise UserError(f"weight {name!r} has no reward; rewards: {', '.join(functions)}")
        if not math.isfinite(weight):
            raise UserError(f"weight {name!r} is {weight}, expected a finite number")
    for name, values in columns.items():
        if name in ("completions", "completion_ids"):
            raise UserError(f"column {name!r} has the name of an argument of reward functions; rename it")
        column(name, values, len(completions))
    column("completion_ids", completion_ids, len(completions))
    per_function: dict[str, Values] = {}
    for name, function in functions.items():
        try:
            returned = list(function(completions=completions, completion_ids=completion_ids, **columns))
        except Exception as error:  # a user's function may raise anything; the error must name it
            raise RewardError(f"reward {name!r} raised {_described(error)}") from error
        if len(returned) != len(completions):
            raise RewardError(f"reward {name!r} returned {len(returned)} values, expected {len(completions)}")
        per_function[name] = [_number_or_none(name, i, value) for i, value in enumerate(returned)]
    total: Values = []
    for i in range(len(completions)):
        parts = [weights[name] * x for name, values in per_function.items() if (x := values[i]) is not None]
        total.append(sum(parts) if parts else None)
    return RewardTable(per_function, total)


def score_groups(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, float],
    tokenizer: Any,
    samples: Sequence[Any],
    groups: Sequence[Sequence[Any]],
) -> RewardTable:
    """Score every completion, group after group.

    A sample's metadata, answer and prompt reach the functions by name.

    Args:
        functions, weights: as in `score`.
        tokenizer: decodes completions into the texts that are scored, without special tokens.
        samples: the `Sample` of each group.
        groups: the completions of each sample, with their `token_ids`.

    Raises:
        UserError: as `score`; or the samples have a column named prompts.
    """
    owners = [sample for sample, group in zip(samples, groups, strict=True) for _ in group]
    names = sorted({name for sample in samples for name in sample.metadata})
    columns: dict[str, list[Any]] = {name: [owner.metadata.get(name) for owner in owners] for name in names}
    if "prompts" in names:
        raise UserError("column 'prompts' has the name of an argument of reward functions; rename it")
    columns["answer"] = [owner.answer for owner in owners]
    columns["prompts"] = [list(owner.messages) for owner in owners]
    token_ids = [completion.token_ids for group in groups for completion in group]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in token_ids]
    completions = [[{"role": "assistant", "content": text}] for text in texts]  # as TRL passes them to chats
    return score(functions, weights, completions, token_ids, columns)


def _number_or_none(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} returned {value!r:.80} at index {index}, expected a finite number"
        )
    return number


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
