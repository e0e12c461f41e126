"""Rewards: what is read as an answer, every value by hand, and every error."""

import dataclasses
import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from geo_r1 import rewards
from geo_r1.answers import extract_answer, extract_choice, said, well_formed
from geo_r1.kernels import group_advantage
from geo_r1.rewards import RewardError, load_reward, score

RIGHT = "<think>water matches</think>\n<answer>(C)</answer>"
WRONG = "<think>road differs</think><answer>B</answer>"

# Completions by the choice, of five, that a person reads in them.
CHOICES: dict[str | None, str] = {
    "A": (
        "A | A) | A: | A is correct | **A** | I think A | It is a | A: the building by the river | "
        "A. The building | A) a building | the first image | Image A shows a river | Option A. | "
        "option a | A? | A\n | A, a building | A matches | A — the road fits | A, not B"
    ),
    "B": (
        "B. | [B] | candidate B | #2 | `B` | I choose B. | B because it has a river | "
        "A is wrong, B is right | B rather than A | B instead of C | "
        "A is near a lake, B is in the woods. The answer is B. | B is the answer, not C | the 2nd image | "
        "the answer is option (b) | It cannot be A, so B | B.\nThe roof of B matches. | B and not C | "
        "B. D is too far. | I'd go with B | <answer>B</answer> | <answer>A</answer><answer>B</answer> | "
        "I, however, pick B | Option 2"
    ),
    "C": (
        "(C) | **C** | The answer is C. | Answer: C | Image 3 | image 3 | the third image | 3 | "
        "C, not D. | C, D's road differs | not D but C | C because A is too far | c | (c) | **C.** | "
        "**Image C** | \\boxed{C} | $\\boxed{\\text{C}}$ | I think C | C, not A or B | "
        "It's not D, it's C | D isn't right; C is. | The answer is not D. It is C. | C is the answer | "
        "Image: 3 | Image 3 (C) | 3. | (3) | 3, not 2 | third | the third | "
        "The third satellite image matches best. | Since A is too far, C. | The answer is 3 | "
        "The answer is 3. | Answer: image 3 | THE ANSWER IS C | choice: C | My choice is C | Answer:\nC | "
        "C - same bridge | C (Image 3) | C not D | <think>A</think><answer>(C)</answer> | "
        "Image C, the third image | c, not d"
    ),
    "D": (
        "Option D | option d | \"D\" | 'D' | The correct answer is: **D** | Satellite image 4 | image #4 | "
        "Image number 4 | Let's pick D"
    ),
    "E": "the last image | Final answer: (E) | Candidate E, not candidate D",
    None: (
        "A or B | A, B | A/B | either A or C | both | A and B | not A |  | F | Image 7 | "
        "a building near the water | A building near water | I think it is near a river | I | "
        "The answer is a building | The answer is A building | The answer: A large building | not A or B | "
        "neither A nor B | It is not necessarily A | I don't think it is D | not only A but also B | "
        "rather than A, B | A B | A B C | A-frame house | AB | Washington D.C. | "
        "The answer is C. Actually, D. | The answer is F. A is near | The answer is F | Image 1 or 2 | "
        "Images 1 and 2 | Image 3 (B) | 1 or 2 | the first and third images | the seventh image | "
        "in the image a river flows | In the image I see a river | Image 0 | 12 | 2024 | 3 buildings | "
        "There are 3 images | B, C | B; D | (A) (B) | (A) and (B) | A & B | Option A and option B | "
        "Either option A or the second image | None of A, B | Near Avenue B | Robert E. Lee street | "
        "It can't be A. | 48.85 N, 2.35 E | not C | not the third image | A not B | B, C or D | "
        "<think>A</think> | <answer>B | <think>A | <answer> </answer> | <think>A</think> B | "
        "Ambiguous: A or maybe B | A and C are alike | The answer is either A or C | "
        "A or the third image | No. | All of them | option two | image 3D | Image 1, 2 | Is it B or C? | "
        "Images A-C | C/D | c or d"
    ),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(text, letter) for letter, texts in CHOICES.items() for text in texts.split(" | ")],
)
def test_extract_choice(text, expected):
    assert extract_choice(text) == expected


@pytest.mark.parametrize(
    ("text", "num_choices", "expected"),
    [
        ("F", 6, "F"),
        ("Z", 26, "Z"),
        ("C", 2, None),
        ("the last image", 3, "C"),
        ("I", 9, "I"),
        ("I is correct", 26, "I"),
        ("I think so", 26, None),
        ("In the image I see a river", 26, None),
        ("I believe it's J", 10, "J"),
        ("10", 26, "J"),
        ("10:30", 26, None),
    ],
)
def test_extract_choice_counts_choices(text, num_choices, expected):
    assert extract_choice(text, num_choices) == expected


@pytest.mark.parametrize("num_choices", [-1, 0, 1, 27])
def test_extract_choice_refuses_counts(num_choices):
    with pytest.raises(ValueError, match=f"num_choices: got {num_choices}, expected 2 to 26"):
        extract_choice("A", num_choices)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> Paris \n</answer>", "Paris"),
        ("<answer>A</answer> <answer>B</answer>", "B"),
        ("<answer>A</answer><answer>B", "A"),
        ("<answer>A <answer>B</answer>", "B"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        ("</answer>B<answer>", None),
        ("B", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_accuracy_letters():
    completions = [RIGHT, WRONG, "C", "<think>C</think>", RIGHT]
    assert rewards.accuracy(completions, ["C", "c", "C", "C", None]) == [1.0, 0.0, 0.0, 0.0, None]
    assert rewards.accuracy(completions[:2], ["C", "C"], wrong_score=-0.8) == [1.0, -0.8]
    assert rewards.accuracy(["<answer>F</answer>"] * 3, ["F", "A", "F"], [6, None, 6.0]) == [1.0, 0.0, 1.0]
    assert rewards.accuracy([RIGHT]) == [None]
    assert rewards.accuracy([], []) == []


def test_accuracy_text():
    completions = ["<answer> new\n YORK </answer>", "<answer>York</answer>", "New York"]
    assert rewards.accuracy(completions, ["New York"] * 3, wrong_score=-1) == [1.0, -1.0, -1.0]
    assert rewards.accuracy(["<answer>12</answer>"], [12]) == [1.0]
    # a tokenizer that composes accents must not make an answer wrong
    assert rewards.accuracy(["<answer>Orl\u00e9ans</answer>"], ["Orle\u0301ans"]) == [1.0]


def test_accuracy_refuses():
    for answer, count, message in (
        (
            "F",
            None,
            "answer[0]: the answer is 'F', expected one of the first 5 letters (no num_choices, so 5)",
        ),
        ("f", 5, "answer[0]: the answer is 'f', expected one of the first 5 letters (num_choices 5)"),
        (" ", None, "answer[0]: the answer is empty; null stands for none"),
        ("<answer>C</answer>", None, "which no text between <answer> and </answer> can be"),
        ("\ud800x", None, "which no text between <answer> and </answer> can be"),
        ("A", "5", "num_choices is '5', expected an integer from 2 to 26"),
        ("A", True, "num_choices is True, expected an integer from 2 to 26"),
        ("A", 5.5, "num_choices is 5.5, expected an integer from 2 to 26"),
        ("A", 27, "num_choices is 27, expected an integer from 2 to 26"),
        ("A", math.nan, "num_choices is nan, expected an integer from 2 to 26"),
    ):
        for completion in (RIGHT, "no block"):  # not only if there is something to compare
            with pytest.raises(ValueError, match=re.escape(message)):
                rewards.accuracy([completion], [answer], [count])
    with pytest.raises(ValueError, match="column 'answer' has 1 values for 2 completions"):
        rewards.accuracy([RIGHT, WRONG], ["C"])
    with pytest.raises(ValueError, match="column 'num_choices' has 0 values for 1 completions"):
        rewards.accuracy([RIGHT], ["C"], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT, 1.0),
        (WRONG, 1.0),
        (f" \n{RIGHT}\n", 1.0),
        (f"So: {RIGHT}", 0.0),
        (f"{RIGHT} done", 0.0),
        ("<think>x</think> so <answer>B</answer>", 0.0),
        ("<think>x</think><answer> </answer>", 0.0),
        ("<think>x</think><answer></answer>", 0.0),
        ("<answer>B</answer><think>x</think>", 0.0),
        ("<think>x<think></think><answer>B</answer>", 0.0),
        ("<think>x</think><answer>A</answer><answer>B</answer>", 0.0),
        ("<think>x</think><answer>B", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, expected):
    assert rewards.format_reward([text]) == [expected]


def test_repetition():
    # 7 words make two 6-grams; equal words make them equal: 1 unique of 2. 8 words: 1 of 3.
    texts = ["a a a a a", "a b c d e f", "a A a A a A a", "a a a a a a a a", "a b c d e f g", ""]
    expected = [0.0, 0.0, -0.5, -2 / 3, 0.0, 0.0]
    assert rewards.repetition(texts) == pytest.approx(expected, abs=1e-12)
    # bigrams of "x y x y": xy yx xy, 2 unique of 3
    assert rewards.repetition(["x y x y"], n=2) == pytest.approx([-1 / 3], abs=1e-12)
    with pytest.raises(ValueError, match="repetition: n is 0"):
        rewards.repetition(["x"], n=0)


LENGTHS = [0, 256, 512, 1024, 2048]
QUARTER = 0.5 * (1 + math.sqrt(0.5))  # (1 + cos(pi / 4)) / 2


def test_length():
    ids = [[0] * count for count in LENGTHS]
    right = rewards.length([RIGHT] * 5, ["C"] * 5, completion_ids=ids)
    assert right == pytest.approx([1.0, 0.5 + 0.5 * QUARTER, 0.75, 0.5, 0.5], abs=1e-12)
    wrong = rewards.length([WRONG] * 5, ["C"] * 5, completion_ids=ids)
    assert wrong == pytest.approx([-0.5, -0.5 * QUARTER, -0.25, 0.0, 0.0], abs=1e-12)
    assert rewards.length([RIGHT], completion_ids=[[1]]) == [None]


def test_length_options():
    # "<think>water matches</think>\n<answer>(C)</answer>" is 3 words; 3 of 6 is half way
    options = {"max_length": 6, "right_start": 3.0, "right_end": 1.0, "wrong_start": -4.0, "wrong_end": -2.0}
    assert rewards.length([RIGHT, RIGHT], ["C", "D"], **options) == pytest.approx([2.0, -3.0], abs=1e-12)
    with pytest.raises(ValueError, match="length: max_length is 0"):
        rewards.length([RIGHT], ["C"], max_length=0)
    with pytest.raises(ValueError, match="'completion_ids' has 2 values for 1"):
        rewards.length([RIGHT], ["C"], completion_ids=[[1], [2]])


def test_length_published_rises_again():
    ids = [[0] * count for count in LENGTHS]
    values = rewards.length_published([WRONG] * 5, ["C"] * 5, ids)
    assert values == pytest.approx([1.0, 0.5 + 0.5 * QUARTER, 0.75, 0.5, 1.0], abs=1e-12)


def test_overlong():
    """10 tokens at most, the last 4 of them ever worse: 6 cost nothing, each more a quarter."""
    ids = [[0] * count for count in (0, 1, 6, 7, 8, 9, 10, 11, 4000)]
    expected = [0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    assert rewards.overlong([RIGHT] * 9, completion_ids=ids, max_length=10, cache=4) == expected
    # by default from 768 to 1024
    defaults = rewards.overlong([WRONG] * 4, completion_ids=[[0] * n for n in (768, 769, 896, 1024)])
    assert defaults == [0.0, -1 / 256, -0.5, -1.0]
    # the whole length as the cache, and the last token alone
    assert rewards.overlong(["x"], completion_ids=[[0] * 3], max_length=6, cache=6) == [-0.5]
    assert rewards.overlong(["x"] * 2, completion_ids=[[0], [0, 0]], max_length=2, cache=1) == [0.0, -1.0]
    # without token ids words count: RIGHT has 3
    assert rewards.overlong([RIGHT, "x"], max_length=4, cache=2) == [-0.5, 0.0]
    assert rewards.overlong([]) == []
    assert load_reward("overlong", max_length=4, cache=2)([RIGHT], completion_ids=[[1] * 4]) == [-1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "overlong: max_length is 0, expected at least 1"),
        ({"max_length": 8, "cache": 0}, "overlong: cache is 0, expected 1 to max_length = 8"),
        ({"max_length": 8, "cache": 9}, "overlong: cache is 9, expected 1 to max_length = 8"),
        ({"completion_ids": [[1], [2]]}, "column 'completion_ids' has 2 values for 1 completions"),
    ],
)
def test_overlong_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rewards.overlong([RIGHT], **options)


@pytest.mark.parametrize("name", rewards.REWARDS)
def test_a_sample_without_answer_takes_no_part(name):
    values = rewards.REWARDS[name]([RIGHT, RIGHT], answer=[None, "C"], prompts=["x", "y"])
    assert values[0] is None and isinstance(values[1], float)


def test_conversations():
    messages = [{"role": "user", "content": WRONG}, {"role": "assistant", "content": RIGHT}]
    parts = [{"type": "image"}, {"type": "text", "text": RIGHT[:20]}, {"type": "text", "text": RIGHT[20:]}]
    completions = [messages, [{"role": "assistant", "content": parts}], [{"role": "a", "content": None}]]
    assert rewards.accuracy(completions, ["C"] * 3) == [1.0, 1.0, 0.0]
    assert rewards.format_reward(completions) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("completion", [[], 3, [{"role": "assistant"}], ["text"], [{"content": ["text"]}]])
def test_a_completion_that_is_neither_text_nor_messages(completion):
    with pytest.raises(ValueError, match="a completion is text or a list of messages, got"):
        rewards.format_reward([completion])


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    source = """
LIMIT = 3
def constant(completions, *, value=2.0, **kwargs):
    return [value] * len(completions)
def strict(completions, completion_ids, scale=1.0):
    return [scale * len(ids) for ids in completion_ids]
"""
    (tmp_path / "my_rewards.py").write_text(source)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no\\nlicence')")
    (tmp_path / "leaving_rewards.py").write_text("import sys\nsys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)


def test_registry():
    names = {"accuracy", "format", "length", "repetition", "overlong", "length_published"}
    assert set(rewards.REWARDS) == names
    assert load_reward("format") is rewards.format_reward
    assert load_reward("accuracy", wrong_score=-1.0)([WRONG], answer=["C"]) == [-1.0]


def test_load_user_functions(user_module):
    assert load_reward("my_rewards:constant")(["x"]) == [2.0]
    assert load_reward("my_rewards:constant", value=5.0)(["x"]) == [5.0]
    assert load_reward("my_rewards:strict", scale=2.0)(["x"], [[1, 2, 3]]) == [6.0]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("acuracy", {}, "unknown reward 'acuracy'; did you mean 'accuracy'?"),
        (
            "zzz",
            {},
            "unknown reward 'zzz'; known: accuracy, format, length, repetition, overlong, length_published",
        ),
        (":f", {}, "reward ':f': expected module:function"),
        ("my_rewards:", {}, "reward 'my_rewards:': expected module:function"),
        ("no_such:f", {}, "cannot import 'no_such': ModuleNotFoundError: No module named 'no_such'"),
        (".relative:f", {}, "cannot import '.relative': TypeError"),
        ("broken_rewards:f", {}, "cannot import 'broken_rewards': RuntimeError: no licence"),
        ("my_rewards:f", {}, "reward 'my_rewards:f': module 'my_rewards' has no 'f'"),
        ("my_rewards:LIMIT", {}, "reward 'my_rewards:LIMIT': 'LIMIT' is a int, expected a function"),
        ("accuracy", {"wrong": 0}, "reward 'accuracy' takes no option 'wrong'; it takes: wrong_score"),
        ("accuracy", {"answer": []}, "reward 'accuracy' takes no option 'answer'"),
        ("accuracy", {"wrong_score": math.nan}, "option 'wrong_score' is nan, expected a finite number"),
        ("leaving_rewards:f", {}, "cannot import 'leaving_rewards': SystemExit: 3 ("),
        ("format", {"n": 6}, "reward 'format' takes no option 'n'; it takes: none"),
        ("my_rewards:strict", {"n": 6}, "takes no option 'n'; it takes: completion_ids, scale"),
        ("my_rewards:constant", {"completions": 6}, "takes no option 'completions'; it takes: value"),
    ],
)
def test_load_reward_refuses(user_module, spec, options, message):
    with pytest.raises(ValueError) as caught:
        load_reward(spec, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_score():
    def parity(completions, completion_ids, answer, **kwargs):
        return [None if len(ids) % 2 else 4 for ids in completion_ids]

    functions = {"accuracy": rewards.accuracy, "parity": parity}
    columns = {"answer": ["C", "C", None, None]}
    ids = [[1], [1, 2], [1, 2], [1]]
    table = score(functions, {"parity": 0.5}, [RIGHT, WRONG, WRONG, WRONG], ids, columns)
    assert table.per_function == {"accuracy": [1.0, 0.0, None, None], "parity": [None, 4.0, 4.0, None]}
    assert table.total == [1.0, 2.0, 2.0, None]
    assert score(functions, None, [RIGHT, WRONG, WRONG, WRONG], ids, columns).total == [1.0, 4.0, 4.0, None]
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.total = []


def test_score_of_nothing():
    assert score({"format": rewards.format_reward}, None, [], [], {}).total == []
    assert score({}, None, ["x"], [[1]], {}).total == [None]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "reward 'mine' returned 1 values, expected 2"),
        ([1.0, 2.0, 3.0], "reward 'mine' returned 3 values, expected 2"),
        (None, "reward 'mine' returned None, expected 2 values"),
        (1.0, "reward 'mine' returned 1.0, expected 2 values"),
        ("12", "reward 'mine' returned '12', expected 2 values"),
        ({"x": 1.0, "y": 2.0}, "reward 'mine' returned {'x': 1.0, 'y': 2.0}, expected 2 values"),
        ([1.0, "2"], "reward 'mine' returned '2' at index 1, expected a finite number"),
        ([[1.0], 2.0], "reward 'mine' returned [1.0] at index 0, expected a finite number"),
        ([1.0, math.nan], "reward 'mine' returned nan at index 1, expected a finite number"),
        ([-math.inf, 1.0], "reward 'mine' returned -inf at index 0, expected a finite number"),
        ([1j, 1.0], "reward 'mine' returned 1j at index 0, expected a finite number"),
        ([Decimal("NaN"), 1.0], "reward 'mine' returned Decimal('NaN') at index 0, expected a finite number"),
        (
            [np.complex64(1), 1],
            "reward 'mine' returned np.complex64(1+0j) at index 0, expected a finite number",
        ),
        ([torch.zeros(2), 1], "reward 'mine' returned tensor([0., 0.]) at index 0, expected a finite number"),
        (
            [1, np.float32("inf")],
            "reward 'mine' returned np.float32(inf) at index 1, expected a finite number",
        ),
        ([1, 1e308], "reward 'mine' returned 1e+308 at index 1, expected at most 1e+15"),
        ([-1e16, 1], "reward 'mine' returned -1e+16 at index 0, expected at most 1e+15"),
        ([1, 10**16], "reward 'mine' returned 10000000000000000 at index 1, expected at most 1e+15"),
        (
            [1, 10**5000],
            "reward 'mine' returned a int that cannot be printed at index 1, expected a finite number",
        ),
    ],
)
def test_score_refuses_what_a_function_returns(returned, message):
    with pytest.raises(RewardError) as caught:
        score({"mine": lambda **kwargs: returned}, None, ["x", "y"], [[1], [2]], {})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value",
    [
        *(True, 1, np.float32(1), np.int64(1), np.bool_(True), np.ones(1), np.array(1)),
        *(Decimal(1), Fraction(1), torch.tensor(1.0), torch.ones(1, 1), torch.tensor(True)),
        *(torch.ones((), dtype=torch.bfloat16), torch.ones((), requires_grad=True)),
    ],
)
def test_numbers_of_all_kinds_become_floats(value):
    [found] = score({"mine": lambda **kwargs: (value,)}, {"mine": 2.0}, ["x"], [[1]], {}).total
    assert type(found) is float and found == 2.0


def test_a_weight_counts_towards_what_is_too_large():
    message = re.escape(
        "reward 'mine' returned 100000000000000.0 at index 0 (weight 100), expected at most 1e+15"
    )
    with pytest.raises(RewardError, match=message):
        score({"mine": lambda **kwargs: [1e14]}, {"mine": 100.0}, ["x"], [[1]], {})
    largest = [1e15, -1e15, 0.0, 1e15]
    table = score({"mine": lambda **kwargs: largest}, None, ["x"] * 4, [[1]] * 4, {})
    advantage = group_advantage(torch.tensor(table.total), torch.tensor([0, 4]), scale="batch")
    assert advantage.isfinite().all() and advantage[0] > 0 > advantage[1]


@pytest.mark.parametrize(
    ("weights", "ids", "columns", "message"),
    [
        ({"formt": 1.0}, [[1]], {}, "weight 'formt' has no reward; rewards: format"),
        ({"format": math.nan}, [[1]], {}, "weight 'format' is nan, expected a finite number"),
        (None, [[1], [2]], {}, "column 'completion_ids' has 2 values for 1 completions"),
        (None, [[1]], {"answer": []}, "column 'answer' has 0 values for 1 completions"),
        (None, [[1]], {"completions": ["x"]}, "column 'completions' has the name of an argument"),
    ],
)
def test_score_refuses_inputs(weights, ids, columns, message):
    with pytest.raises(ValueError) as caught:
        score({"format": rewards.format_reward}, weights, ["x"], ids, columns)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "piece",
    ["\n", " ", "<answer>", "\\boxed{", "A, B, ", "*", "because ", "'a", "not ", "<think>", "answer is "],
)
def test_a_megabyte_of_anything_is_no_answer_and_takes_no_time(piece):
    text = piece * (10**6 // len(piece))
    assert extract_choice(text) is None and extract_choice(f"{text}\n<answer>{text}</answer>") is None
    assert not well_formed(text) and not well_formed(f"<think>{text}</think><answer>{text}</answer>x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>x</think>\n<answer>A</answer>\n", True),
        ("<think>x</think> and <answer>A</answer>", False),
        ("<answer>A</answer><think>x</think>", False),
        ("<think>x</think><answer> \n</answer>", False),
        ("<think>x<answer>A</think></answer>", False),
    ],
)
def test_form_is_a_thought_and_an_answer_in_this_order(text, expected):
    assert well_formed(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>B?</think><answer> A </answer>.", "A"),
        ("<think>B?</think> A ", "A"),
        (" A ", "A"),
        ("<think>A", ""),
        ("<think>x</think><answer>A", ""),
        ("", ""),
    ],
)
def test_what_is_said_is_the_block_or_what_follows_the_thought(text, expected):
    assert said(text) == expected
