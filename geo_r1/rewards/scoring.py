"""Find reward functions, built in or users' own, call them and add up their values."""

import copy
import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, SupportsFloat

from geo_r1.errors import UserError, one_line
from geo_r1.rewards.builtin import REWARDS, Column, Values, column
from geo_r1.rewards.calling import Caller, Owners, RewardError, described, watched

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

# Its square, added up over ten million completions, is finite in float32, which advantages are computed in.
LARGEST = 1e15


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
    for name, value in options.items():
        if spec in REWARDS and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"reward {spec!r}: option {name!r} is {value}, expected a finite number")
        if name == "completions" or (name not in known and not takes_any):
            raise UserError(
                f"reward {spec!r} takes no option {name!r}; it takes: {', '.join(sorted(known)) or 'none'}"
            )
    return functools.partial(function, **options)


def _import_function(spec: str) -> RewardFunction:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"reward {spec!r}: expected module:function")
    found = None
    try:
        with watched({spec}) as found:
            module = importlib.import_module(module_name)
    except (
        BaseException
    ) as error:  # importing runs the user's code, which may raise anything, even SystemExit
        if found is not None and found.interrupts(error):
            raise
        reason = described(error).removeprefix(" raised ").removeprefix(": ")
        raise UserError(f"reward {spec!r}: cannot import {module_name!r}: {reason}") from error
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
    *,
    owners: Sequence[str] = (),
    caller: Caller | None = None,
) -> RewardTable:
    """Call every function on N completions and add up what they return.

    Every function gets copies of the arguments. `async def` functions run at the same time.

    Args:
        functions: by name, as used in weights, errors and the table.
        weights: by name; 1 if a name is missing or weights is None.
        completions: N texts or N lists of messages.
        completion_ids: N lists of token ids, or None.
        columns: dataset columns of N values; every function gets each as a keyword.
        owners: names of N samples, for errors.
        caller: calls the functions; by default without a time limit.

    Raises:
        UserError: a weight is not finite or has no function, or a column has the name of an argument.
        RewardError: a function raised, took too long, or did not return N finite numbers or Nones.
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

    def arguments() -> tuple[dict[str, Any], Owners]:
        texts = copy.deepcopy(list(completions))
        ids = None if completion_ids is None else [list(tokens) for tokens in completion_ids]
        own: dict[int, tuple[object, str]] = {}
        for rows in (texts, ids or ()):
            for row, owner in zip(rows, owners, strict=False):
                parts = [row, *row] if isinstance(row, list) and rows is texts else [row]
                parts += [part["content"] for part in parts if isinstance(part, dict) and "content" in part]
                own |= {id(part): (part, owner) for part in parts if part}
        return {"completions": texts, "completion_ids": ids, **copy.deepcopy(dict(columns))}, own

    with closing(Caller()) as default:
        returned = (caller or default).call(functions, arguments)
    per_function: dict[str, Values] = {}
    for name, values in returned.items():
        if not isinstance(values, list):
            raise RewardError(
                f"reward {name!r} returned {_shown(values)}, expected {len(completions)} values"
            )
        if len(values) != len(completions):
            raise RewardError(f"reward {name!r} returned {len(values)} values, expected {len(completions)}")
        per_function[name] = [
            _number_or_none(name, value, f"{i}{f' (sample {owners[i]})' if owners else ''}", weights[name])
            for i, value in enumerate(values)
        ]
    total: Values = []
    for i in range(len(completions)):
        parts = [weights[name] * x for name, values in per_function.items() if (x := values[i]) is not None]
        total.append(sum(parts) if parts else None)
    return RewardTable(per_function, total)


def score_groups(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, float],
    samples: Sequence[Any],
    groups: Sequence[Sequence[Any]],
    texts: Sequence[Sequence[str]],
    caller: Caller | None = None,
) -> RewardTable:
    """Score every completion, group after group.

    A sample's metadata, answer and prompt reach the functions by name.

    Args:
        functions, weights, caller: as in `score`.
        samples: the `Sample` of each group.
        groups: the completions of each sample, with their `token_ids`.
        texts: the completions of each sample as text.

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
    completions = [  # as TRL passes them to chats
        [{"role": "assistant", "content": text}] for group in texts for text in group
    ]
    ids = [owner.id for owner in owners]
    return score(functions, weights, completions, token_ids, columns, owners=ids, caller=caller)


def _number_or_none(name: str, value: Any, where: str, weight: float) -> float | None:
    if value is None:
        return None
    try:
        item = value.item() if hasattr(value, "item") else value  # of numpy and torch
        number = float(item) if isinstance(item, SupportsFloat) else math.nan
    except Exception:  # several numbers, one too large for a float, or a user's class that raises
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} returned {_shown(value)} at index {where}, expected a finite number"
        )
    if max(abs(number), abs(number * weight)) > LARGEST:
        times = "" if weight == 1 else f" (weight {weight:g})"
        raise RewardError(
            f"reward {name!r} returned {_shown(value)} at index {where}{times}, expected at most {LARGEST:g}"
        )
    return number


def _shown(value: Any) -> str:
    try:
        return f"{one_line(repr(value)):.80}"
    except Exception:  # a user's class may raise anything; Python itself does for an int of 5,000 digits
        return f"a {type(value).__name__} that cannot be printed"
