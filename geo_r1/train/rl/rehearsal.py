"""Before a run: whether the rewards of its recipe can be earned with its data and its tokenizer."""

from __future__ import annotations

from collections.abc import Collection

from geo_r1.data import Sample
from geo_r1.data.source import Source
from geo_r1.data.turn import completion_text
from geo_r1.errors import UserError
from geo_r1.rewards import accuracy, format_reward
from geo_r1.rewards.builtin import read_answer
from geo_r1.rollout import Completion
from geo_r1.train.context import RunContext
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.rl.scoring import Scorer

NEED_ANSWERS = ("accuracy", "length")
SAMPLES = 4  # whose right answers go through the tokenizer


def has_answers(source: Source) -> bool:
    """Whether some sample has an answer; those of the endless world have."""
    return source.size is None or any(source.sample(i).answer is not None for i in range(source.size))


def check_answers(recipe: Recipe, source: Source) -> None:
    """Check every answer of a file that a built-in reward compares with.

    Raises:
        UserError: there is no answer, or no completion can match one; names the file and the sample.
    """
    needing = [name for name in recipe.rewards.functions if name in NEED_ANSWERS]
    if not needing or source.size is None:
        return
    data = recipe.grpo.data
    if not has_answers(source):
        raise UserError(
            f"{data}: no sample has an answer, which reward {needing[0]!r} compares with; add a column "
            "'answer', or name other rewards.functions"
        )
    for index in range(source.size):
        sample = source.sample(index)
        try:
            if sample.answer is not None:
                read_answer(sample.answer, sample.metadata.get("num_choices"))
        except UserError as error:
            raise UserError(f"sample {sample.id} of {data}: {error}") from error


def rehearse(context: RunContext, source: Source, scorer: Scorer) -> None:
    """Score right answers to the first samples, as the tokenizer writes them, before anything is sampled.

    All functions are called once, on a group of the first sample. Only built-in ones are judged.

    Raises:
        UserError: a built-in reward cannot be earned, and why.
        RewardError: a function fails.
    """
    recipe, tokenizer, encoder = context.recipe, context.tokenizer, context.encoder
    for index in range(min(SAMPLES, source.size or SAMPLES)):
        sample = source.sample(index)
        _, opening = encoder.chat(sample)
        wanted = _right_answer(sample)
        token_ids = encoder.encode_response(wanted, opening)
        text = completion_text(tokenizer, opening, token_ids)
        earned, kept = (_earned(recipe.rewards.functions, sample, said) for said in (wanted, text))
        for name in earned:
            if name not in kept:
                raise UserError(
                    f"sample {sample.id}: reward {name!r} cannot be earned: chat template and tokenizer turn "
                    f"the right answer {wanted!r:.80} into {text!r:.80}"
                )
        if index == 0:
            copies = recipe.grpo.num_completions
            completion = Completion(token_ids, [0.0] * len(token_ids), True)
            scorer.score([sample], [[completion] * copies], [[text] * copies])
            most = recipe.rollout.max_new_tokens
            if earned and len(token_ids) > most:
                context.log.say(
                    f"rollout.max_new_tokens = {most}: even a short right answer, of {len(token_ids)} "
                    "tokens, would be cut off"
                )


def _right_answer(sample: Sample) -> str:
    answer = "A" if sample.answer is None else sample.answer
    text = f"<think>yes</think><answer>{answer}</answer>"
    return text.encode("utf-8", "replace").decode()  # a lone surrogate reaches no tokenizer


def _earned(functions: Collection[str], sample: Sample, text: str) -> list[str]:
    """The built-in rewards in use that a text earns."""
    right, formed = _is_right(sample, text), format_reward([text]) == [1.0]
    return [name for name in functions if (name in NEED_ANSWERS and right) or (name == "format" and formed)]


def _is_right(sample: Sample, text: str) -> bool:
    """Whether `accuracy` calls a text right; a sample without an answer takes no part."""
    try:
        judged = accuracy([text], [sample.answer], [sample.metadata.get("num_choices")])
    except UserError:  # no text is; `check_answers` speaks up if a reward compares with it
        return False
    return judged in ([1.0], [None])
