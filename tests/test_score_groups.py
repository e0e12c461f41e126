"""What reward functions are handed: TRL's arguments, one entry a completion."""

import pytest

from geo_r1.data import Sample
from geo_r1.rewards import score_groups
from geo_r1.rollout import Completion


def sample(name, answer, **metadata):
    content = [{"type": "text", "text": name}]
    return Sample(name, ({"role": "user", "content": content},), answer=answer, metadata=metadata)


def groups(*texts):
    """Completions and their texts."""
    completions = [
        [Completion([ord(c) for c in text], [0.0] * len(text), True) for text in group] for group in texts
    ]
    return completions, texts


def test_columns_follow_their_completions():
    seen = {}

    def reward(completions, completion_ids, **columns):
        seen.update(columns, completions=completions, completion_ids=completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    samples = [sample("one", "A", city="Rome"), sample("two", None, mood=3)]
    table = score_groups({"r": reward}, {"r": 2.0}, samples, *groups(["ab", "c"], ["def"]))
    assert table.total == [4.0, 2.0, 6.0]
    assert [message[0] for message in seen["completions"]] == [
        {"role": "assistant", "content": text} for text in ("ab", "c", "def")
    ]
    assert seen["answer"] == ["A", "A", None]
    assert seen["city"] == ["Rome", "Rome", None]
    assert seen["mood"] == [None, None, 3]
    assert [prompt[0]["content"][0]["text"] for prompt in seen["prompts"]] == ["one", "one", "two"]


def test_a_column_cannot_take_the_name_of_an_argument():
    with pytest.raises(ValueError, match="column 'prompts' has the name of an argument"):
        score_groups({}, {}, [sample("one", "A", prompts=1)], *groups(["a"]))
