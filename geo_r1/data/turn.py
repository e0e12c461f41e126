"""The assistant's turn as text and as tokens: what the chat template opens, a response, a completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

TAG = re.compile(r"</?[a-zA-Z][\w-]*>")
ENDS = ("<|im_end|>", "<|endoftext|>")  # of Qwen; which of them is the tokenizer's own differs by model
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def opening_of(prompt: str, messages: str) -> str:
    """What a chat template has already written of the answer, from its first tag: mostly empty or `<think>`.

    A thought that the template also closes is no opening: the answer may begin with a thought of its own.

    Args:
        prompt: the chat as text, with the start of the assistant's turn.
        messages: the chat as text, without it.
    """
    turn = prompt[len(commonprefix([prompt, messages])) :]  # noqa: RUF071  # texts, not paths
    tags = [*TAG.finditer(turn)]
    return turn[tags[0].start() :] if tags and not tags[-1][0].startswith("</") else ""


def encode_response(tokenizer: Any, text: str, opening: str = "") -> list[int]:
    """Token ids of a response after what the template opened, and of one end token.

    A response that begins with the opening does not repeat it. After an open `<think>`, a response without a
    thought first closes it, as the templates of Qwen3 do. End tokens that the text brings along are dropped.
    """
    text = _continuation(text, opening)
    ends = tuple({*ENDS, tokenizer.eos_token} - {None})
    while (bare := text.rstrip()).endswith(ends):
        text = next(bare.removesuffix(end) for end in ends if bare.endswith(end))
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def _continuation(text: str, opening: str) -> str:
    """What is left of a response to write after the opening."""
    if not opening:
        return text
    last = TAG.findall(opening)[-1]
    before, found, rest = text.partition(last)
    if found and (not before.strip() or "</" in opening):  # a thought that the template closed stays empty
        skipped = opening.rpartition(last)[2]
        return rest.removeprefix(skipped) if rest.startswith(skipped) else rest.lstrip()
    if last == "<think>" and "</think>" not in text:
        return f"\n</think>\n\n{text.lstrip()}"
    return text


def completion_text(tokenizer: Any, opening: str, token_ids: Sequence[int]) -> str:
    """The text of a completion that is scored and shown: the opening, then the tokens.

    Special tokens are left out, except for tags such as `<think>`, which some tokenizers count among them.
    """
    hidden = _control_ids(tokenizer)
    kept = [token for token in token_ids if token not in hidden]
    return opening + tokenizer.decode(kept, skip_special_tokens=False)


def _control_ids(tokenizer: Any) -> set[int]:
    named = {getattr(tokenizer, name) for name in NAMED}
    return {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and (token.content in named or not TAG.fullmatch(token.content.strip()))
    }
