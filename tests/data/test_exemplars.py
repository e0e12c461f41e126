"""The teacher of the procedural world: well formed, true when it should be, wrong as set."""

import pickle
import re
from itertools import pairwise

import pytest

from geo_r1.answers import extract_choice
from geo_r1.data import World, exemplars
from geo_r1.data.exemplars import Numbered, RisingQuestions
from geo_r1.data.world import COVERS, LETTERS
from geo_r1.rewards import accuracy, format_reward

WORLD = World()
STEPS = re.compile(
    r"<think>Cues: (?P<cues>[a-z ]+)\. "
    r"Knowledge: (?P<kind>\w+)\. Evidence: (?P<evidence>.+\.) "
    r"Conclusion: (?P<letter>[A-J])\.</think><answer>(?P<answer>[A-J])</answer>"
)


def thoughts(count=200, world=WORLD, **errors):
    """(pairing, steps, comparisons); a comparison is (letter, [(cue, named)], verdict)."""
    for index in range(count):
        steps = STEPS.fullmatch(exemplars.chain_of_thought(world, "train", index, **errors).response)
        comparisons = []
        for line in re.findall(r"([A-J]) ((?:\w+ )+)(yes|no)\.", steps["evidence"]):
            words = line[1].replace(" same", "").split()
            comparisons.append((line[0], list(zip(words[::2], words[1::2], strict=True)), line[2]))
        yield world.pairing("train", index), steps, comparisons


def right_share(count=250, **errors):
    return sum(steps["answer"] == pairing.answer for pairing, steps, _ in thoughts(count, **errors)) / count


def test_texts_are_pinned():
    assert exemplars.chain_of_thought(WORLD, "train", 0).response == (
        "<think>Cues: roofs roofs woods woods. Knowledge: town. Evidence: A roofs rock no. "
        "B roofs roofs same roofs roofs same woods woods same woods woods same yes. "
        "C roofs roofs same roofs water no. D roofs roofs same roofs rock no. E roofs sand no. "
        "Conclusion: B.</think><answer>B</answer>"
    )
    assert exemplars.caption(WORLD, "train", 0).response == (
        "panorama roofs roofs woods woods. A rock roofs water woods. B roofs roofs woods woods. "
        "C roofs water woods field. D roofs rock woods woods. E sand woods woods woods."
    )
    assert exemplars.direct_answer(WORLD, "train", 0).response == "<answer>B</answer>"
    assert exemplars.question(WORLD, "train", 0).messages[0]["content"][-1]["text"] == (
        "The first image is a panorama. Which of the tiles A to E shows the same place from above? "
        "Think in <think> </think>, then answer in <answer> </answer>."
    )


@pytest.mark.parametrize("errors", [{}, {"careless": 0.6}, {"slip": 0.3}, {"careless": 1, "slip": 1}])
def test_four_steps_well_formed(errors):
    for pairing, steps, comparisons in thoughts(100, **errors):
        assert format_reward([steps.string]) == [1.0]
        assert steps["cues"].split() == list(pairing.place.covers)
        assert steps["kind"] == exemplars.association(pairing.place.covers)
        assert steps["letter"] == steps["answer"]
        letters = [letter for letter, _, _ in comparisons]
        assert letters in (["A"], list("ABCDE"))
        assert steps["letter"] == next((c[0] for c in comparisons if c[2] == "yes"), letters[-1])


def test_without_errors_every_verdict_is_true():
    for pairing, steps, comparisons in thoughts():
        assert steps["answer"] == pairing.answer
        assert accuracy([steps.string], [pairing.answer], [5]) == [1.0]
        for letter, sides, verdict in comparisons:
            covers = pairing.candidates[LETTERS.index(letter)].covers
            assert sides == list(zip(pairing.place.covers, covers, strict=True))[: len(sides)]
            assert all(cue == named for cue, named in sides[:-1])
            assert (sides[-1][0] == sides[-1][1]) == (verdict == "yes") == (letter == pairing.answer)
            assert verdict == "no" or len(sides) == 4


def test_a_careless_teacher_takes_the_first_at_its_rate():
    careless = 0
    for pairing, steps, comparisons in thoughts(400, careless=0.6):
        if len(comparisons) == 1:
            letter, sides, verdict = comparisons[0]
            covers = pairing.candidates[0].covers
            assert sides == list(zip(pairing.place.covers, covers, strict=True))
            assert (letter, verdict, steps["answer"]) == ("A", "yes", "A")
            careless += 1
        else:
            assert len(comparisons) == 5 and steps["answer"] == pairing.answer
    assert careless / 400 == pytest.approx(0.6, abs=0.06)


@pytest.mark.parametrize("slip", [0.05, 0.2, 1.0])
def test_slips_misname_at_their_rate(slip):
    wrong = total = 0
    for pairing, _, comparisons in thoughts(400, slip=slip):
        for (_, sides, _), candidate in zip(comparisons, pairing.candidates, strict=False):
            assert all(named in COVERS for _, named in sides)
            wrong += sum(named != cover for (_, named), cover in zip(sides, candidate.covers, strict=False))
            total += len(sides)
    assert wrong / total == pytest.approx(slip, abs=0.03)


def test_more_errors_less_accuracy():
    by_careless = [right_share(careless=careless) for careless in (0, 0.1, 0.3, 0.6, 1)]
    by_slip = [right_share(slip=slip) for slip in (0, 0.05, 0.2, 0.5)]
    for shares in (by_careless, by_slip):
        assert shares[0] == 1.0 and all(a > b + 0.05 for a, b in pairwise(shares))
    assert by_careless[3] == pytest.approx(0.52, abs=0.1)


@pytest.mark.parametrize("num_candidates", [3, 10])
def test_caption_and_direct_answer_agree_with_the_world(num_candidates):
    world = World(num_candidates=num_candidates)
    for index in range(30):
        pairing = world.pairing("test", index)
        caption = exemplars.caption(world, "test", index)
        names = ["panorama", *LETTERS[:num_candidates]]
        views = [pairing.place, *pairing.candidates]
        assert caption.response.removesuffix(".").split(". ") == [
            " ".join([name, *place.covers]) for name, place in zip(names, views, strict=True)
        ]
        direct = exemplars.direct_answer(world, "test", index)
        assert extract_choice(direct.response, num_candidates) == pairing.answer == direct.answer
        last = LETTERS[num_candidates - 1]
        assert (
            caption.messages[0]["content"][-1]["text"] == f"Describe the panorama and the tiles A to {last}."
        )


def test_samples_carry_images_and_metadata():
    pairing = WORLD.pairing("test", 7)
    kinds = (exemplars.question, exemplars.chain_of_thought, exemplars.direct_answer, exemplars.caption)
    for sample in (kind(WORLD, "test", 7) for kind in kinds):
        assert (sample.id, sample.answer) == ("test-7", "E")
        assert sample.metadata == {
            "num_choices": 5, "city": "Zanrizan", "latitude": -17.06, "longitude": -14.12
        }  # fmt: skip
        (message,) = sample.messages
        assert message["role"] == "user"
        parts = [part.get("text", "image") for part in message["content"]]
        assert parts[:-1] == [
            "image",
            " A",
            "image",
            " B",
            "image",
            " C",
            "image",
            " D",
            "image",
            " E",
            "image",
        ]
        expected = [image.tobytes() for image in WORLD.images(pairing)]
        assert [image.tobytes() for image in sample.images] == expected
    assert exemplars.question(WORLD, "test", 7).response is None


@pytest.mark.parametrize(
    ("covers", "kind"),
    [("water sand", "coast"), ("rock sand", "desert"), ("rock roofs", "mountain"), ("roofs field", "town"),
     ("woods field", "country")],
)  # fmt: skip
def test_association_prefers_the_most_telling_side(covers, kind):
    assert exemplars.association(covers.split()) == kind
    assert exemplars.association(covers.split()[::-1]) == kind


def test_pretraining_is_captions_and_direct_answers():
    said = [exemplars.pretraining(WORLD, "train", index).response for index in range(64)]
    answers = [text for text in said if "<answer>" in text]
    assert len(answers) == 16
    described = [text for text in answers if text.startswith("<think>Cues: ")]
    assert len(described) == 4 and all(text.count(".") == 1 for text in described)  # the panorama alone
    assert all("same" not in text and "Evidence" not in text for text in said)


def shared_sides(pairing):
    """Mean sides that a confuser has in common with the truth."""
    others = [p.covers for i, p in enumerate(pairing.candidates) if i != pairing.truth]
    same = [sum(a == b for a, b in zip(c, pairing.place.covers, strict=True)) for c in others]
    return sum(same) / len(same)


def test_numbered_samples_pickle_and_start_where_they_should():
    source = Numbered(exemplars.chain_of_thought, WORLD, "train", 50, {"careless": 1.0})
    expected = exemplars.chain_of_thought(WORLD, "train", 57, careless=1.0)
    for numbered in (source, pickle.loads(pickle.dumps(source))):
        sample = numbered(7)
        assert (sample.id, sample.response) == ("train-57", expected.response)
        assert [i.tobytes() for i in sample.images] == [i.tobytes() for i in expected.images]


def test_rising_questions():
    world = World(difficulty=1.0)
    rising = pickle.loads(pickle.dumps(RisingQuestions(world, "train", 1000, 0.25, 300)))
    assert [rising.difficulty(i) for i in (0, 100, 150, 299, 300, 5000)] == [
        0.25, 0.5, 0.625, pytest.approx(0.9975), 1.0, 1.0,
    ]  # fmt: skip
    shares = [shared_sides(world.pairing("train", 1000 + i, rising.difficulty(i))) for i in range(400)]
    for first, mean in ((0, 0.75 + 0.375), (100, 1.5 + 0.375), (200, 2.25 + 0.375), (300, 3.0)):
        assert abs(sum(shares[first : first + 100]) / 100 - mean) < 0.12
    for index in (300, 399):  # at the world's own difficulty: the questions that there would be without it
        plain, sample = exemplars.question(world, "train", 1000 + index), rising(index)
        assert [i.tobytes() for i in sample.images] == [i.tobytes() for i in plain.images]
        assert (sample.id, sample.answer) == (plain.id, plain.answer)
    assert rising(3).answer == rising(3).answer and rising(3).id == "train-1003"
    assert [rising(3).images[i].tobytes() for i in range(6)] != [
        exemplars.question(world, "train", 1003).images[i].tobytes() for i in range(6)
    ]


@pytest.mark.parametrize("start", [-0.1, 0.9])
def test_a_rise_starts_below_its_end(start):
    expected = rf"world.curriculum_start must be 0 to world.difficulty = 0.8, got {start}"
    with pytest.raises(ValueError, match=expected):
        RisingQuestions(World(), "train", 0, start, 10)
