"""Cross-view pairing: what counts as a question, and the summary of its predictions."""

import pytest

from geo_r1.data import PromptEncoder, Sample, World, exemplars
from geo_r1.eval.cross_view import Prediction, predict, question_of, summarise
from geo_r1.models import PackedVLM
from geo_r1.models.tiny import build_tiny
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
    predictions = []
    for i, (answer, choice, formed, length) in enumerate(said):
        record = {"answered": choice is not None, "correct": choice == answer, "well_formed": formed}
        completion = Completion([0] * length, [0.0] * length, True)
        predictions.append(Prediction(str(i), completion, "", record | {"num_choices": 5}))
    summary = summarise(predictions)
    assert summary["accuracy"] == 0.5
    assert summary["accuracy_interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert (summary["completion_length"], summary["well_formed"]) == (25.0, 0.75)
    assert (summary["num_samples"], summary["chance"]) == (4, 0.2)


@pytest.mark.parametrize("on_overlong", ["error", "skip"])
def test_a_prompt_that_is_too_long_is_an_error_or_a_wrong_answer(on_overlong):
    samples = [exemplars.question(World(num_candidates=n), "test", 0) for n in (3, 10, 3)]
    model, tokenizer, image_processor = build_tiny(["north A B"], hidden_size=64, num_layers=1)
    image_token = model.config.image_token_id
    plain = PromptEncoder(tokenizer, image_processor, image_token)
    longest = max(len(plain.encode(sample).token_ids) for sample in samples)
    encoder = PromptEncoder(
        tokenizer, image_processor, image_token, max_prompt_tokens=longest - 1, on_overlong=on_overlong
    )

    def predictions():
        options = {"max_new_tokens": 4, "max_tokens": 4096, "progress": lambda done: None}
        return predict(PackedVLM(model), tokenizer, encoder, samples, **options)

    if on_overlong == "error":
        with pytest.raises(ValueError, match=f"^sample {samples[1].id}: the prompt has"):
            predictions()
        return
    found = predictions()
    assert [p.id for p in found] == [sample.id for sample in samples]
    assert [len(p.completion.token_ids) > 0 for p in found] == [True, False, True]
    read = [found[1].record[name] for name in ("prediction", "correct", "well_formed")]
    assert read == [None, False, False]
    assert found[0].completion == found[2].completion
