"""The row formats of other trainers: TRL, LLaMA-Factory, VLM-R1, EasyR1 and ms-swift.

Content that does not fit a format is an error. Nothing is left out, and other columns stay unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geo_r1.data.formats.row_kinds import WITHOUT_TOOLS, Chat, Format, Own, Problem
from geo_r1.data.messages import IMAGE_MARKER


def _reserved(names: str) -> frozenset[str]:
    return frozenset(["images", *names.split()])


FORMATS: Mapping[str, Format] = {
    kind.name: kind
    for kind in (
        Own("geo_r1"),
        Chat(
            "trl",
            _reserved(
                "image videos prompt prompts solution completion completions completion_ids trainer_state"
            ),
            key="prompt",
            answer="solution",
            response="column",
        ),
        Chat(
            "trl-sft",
            _reserved("image videos messages prompt completion text completion_mask assistant_masks"),
            key="prompt",
            response="completion",
        ),
        Chat(
            "llama-factory",
            _reserved("messages system videos audios"),
            names=WITHOUT_TOOLS,
            markers=True,
            alternates=True,
        ),
        Chat(
            "sharegpt",
            _reserved("conversations system videos audios"),
            key="conversations",
            role="from",
            content="value",
            names={"system": "system", "user": "human", "assistant": "gpt"},
            markers=True,
            alternates=True,
        ),
        Problem(
            "vlm-r1", _reserved("image conversations problem solution prompt image_path"), two_turns=True
        ),
        Problem("easyr1", _reserved("problem prompt videos ground_truth multi_modal_data")),
        Chat(
            "ms-swift",
            _reserved(
                "image messages conversations conversation system solution videos audios tools objects label "
                "rejected_response rejected_images"
            ),
            markers=True,
            answer="solution",
        ),
    )
}


def detect(row: Any) -> str | None:
    """The format of a row; None if no format fits, or several do that would read it differently."""
    if not isinstance(row, Mapping):
        return None
    has = {key for key, value in row.items() if value is not None}
    keys = [key for key in ("prompt", "messages", "conversations", "problem") if key in has]
    if keys == ["problem"]:
        return "easyr1"
    if keys == ["prompt"]:
        ours = "answer" in has or not {"solution", "image"} & has
        return "trl-sft" if "completion" in has else "geo_r1" if ours else "trl"
    turns = row[keys[0]] if len(keys) == 1 else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    if keys == ["conversations"]:
        images = {"image", "images"} & has
        several = images == {"images"} or (not images and len(turns) != 2)
        return "sharegpt" if several else "vlm-r1" if images == {"image"} else None
    if any(isinstance(turn.get("content"), list) for turn in turns):
        return "trl-sft"
    if "solution" in has or turns[-1].get("role") != "assistant":
        return "ms-swift"
    no_doubt = any(IMAGE_MARKER in str(turn.get("content")) for turn in turns) or not row.get("images")
    return "llama-factory" if no_doubt and "image" not in has else None
