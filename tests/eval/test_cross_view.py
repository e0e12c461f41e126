"""Cross-view pairing: what counts as a question, and the summary of its predictions."""

import pytest

from geo_r1.data import Sample
from geo_r1.eval.cross_view import Prediction, question_of, summarise
from geo_r1.rollout import Completion

MESSAGES = ({"role": "user", "content": [{"type": "text", "text": "Which?"}]},)


def sample(answer, **metadata):
    return Sample("row7", MESSAGES, answer=answer, metadata=metadata)


@pytest.mark.parametrize(
    ("answer", "metadata", "expected"),
    [("B", {}, ("B", 5)), (" c ", {"num_choices": 3}, ("C", 3)), ("Z", {"num_choices": 26}, ("Z", 26))],
)
def test_a_question_has_a_letter_and_choices(answer, metadata, expected):
    assert question_of(sample(answer, **metadata)) == expected


@pytest.mark.parametrize(
    ("answer", "metadata", "message"),
    [
        (None, {}, "the answer must be a letter from A to E, got None"),
        ("Paris", {}, "the answer must be a letter from A to E, got 'Paris'"),
        ("D", {"num_choices": 3}, "the answer must be a letter from A to C, got 'D'"),
        ("A", {"num_choices": "4"}, "num_choices must be an integer from 2 to 26, got '4'"),
        ("A", {"num_choices": 1}, "num_choices must be an integer from 2 to 26, got 1"),
    ],
)
def test_anything_else_is_an_error_with_the_samples_name(answer, metadata, message):
    with pytest.raises(ValueError, match=f"^sample row7: {message}$"):
        question_of(sample(answer, **metadata))


def test_every_sample_counts():
    said = [("A", "A", True, 10), ("A", None, False, 30), ("B", "A", True, 20), ("C", "C", True, 40)]
    predictions = [
        Prediction(str(i), "", answer, 5, Completion([0] * length, [0.0] * length, True), "", choice, formed)
        for i, (answer, choice, formed, length) in enumerate(said)
    ]
    summary = summarise(predictions)
    assert summary["accuracy"] == 0.5
    assert summary["accuracy_interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert (summary["completion_length"], summary["well_formed"]) == (25.0, 0.75)
    assert (summary["num_samples"], summary["chance"]) == (4, 0.2)
