"""GeoChain: how answers are read and judged."""

import json
import time

import pytest
from geochain_photos import GOA, MELBOURNE, NAIROBI, OTTAWA, PARIS, TRONDHEIM, ask, one, row

from geo_r1.eval.geochain import BENCHMARK

RIGHT, WRONG, NONE = (True, True), (True, False), (False, False)  # answered, right


def check(question, said, expected):
    record = BENCHMARK.score(question, said)
    assert (record["answered"], record["right"]) == expected, record["read"]
    assert (record["read"] is not None) == expected[0]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("<think>No sign.</think><answer>Yes</answer>", RIGHT),
        ("<think>Hm.</think>\n<answer>\n**Yes.**\n</answer>", RIGHT),
        ("<answer><b>YES</b></answer>", RIGHT), ("Yes, there are no clouds over the Rift.", RIGHT),
        ("There is no doubt: yes", RIGHT), ("Let me think, no rush.\nYes", RIGHT),
        ("<answer>No</answer>", WRONG), ("There is no sign of that", WRONG),
        ("<answer>Yes</answer> or <answer>no</answer>", WRONG),  # the last block counts
        ("<answer>Yes or no</answer>", NONE), ("yes/no", NONE), ("No. Yes.", NONE),
        ("Yesterday, nobody knew", NONE), ("<think>Yes</think>", NONE), ("<answer></answer>", NONE),
        ("", NONE),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_as_a_person_would(tmp_path, said, expected):
    check(one(tmp_path, 5, NAIROBI), said, expected)


@pytest.mark.parametrize(
    ("rank", "point", "said", "expected"),
    [
        (8, OTTAWA, "<answer>North America</answer>", RIGHT), (8, OTTAWA, "It is north  america.", RIGHT),
        (8, OTTAWA, "South America", WRONG), (8, OTTAWA, "America", NONE),
        (8, OTTAWA, "North America or Europe", NONE), (8, MELBOURNE, "Australia", RIGHT),
        (8, MELBOURNE, "Oceania (Australia)", RIGHT), (9, NAIROBI, "On the left-hand side", RIGHT),
        (9, NAIROBI, "RIGHT", WRONG), (9, NAIROBI, "left or right", NONE),
        (9, NAIROBI, "nothing is left-ish of leftover", RIGHT), (15, PARIS, r"\boxed{Temperate}", RIGHT),
        (15, PARIS, "Temperate, not continental", NONE), (15, PARIS, "arid", WRONG),
        (15, PARIS, "oceanic", NONE),
    ],
)  # fmt: skip
def test_one_option_must_be_named(tmp_path, rank, point, said, expected):
    check(one(tmp_path, rank, point), said, expected)


@pytest.mark.parametrize(
    ("point", "said", "expected"),
    [
        (PARIS, "<answer>France</answer>", RIGHT), (PARIS, "Paris is in France.", RIGHT),
        (PARIS, "country: france", RIGHT), (PARIS, "FR", RIGHT), (PARIS, "Germany", WRONG),
        (PARIS, "France or Belgium", NONE), (PARIS, "France/Belgium", NONE), (PARIS, "Europe", NONE),
        (PARIS, "I do not know", NONE), (PARIS, "", NONE), ((52.37, 4.9), "The Netherlands", RIGHT),
        ((52.37, 4.9), "Holland", RIGHT), ((55.75, 37.6), "the Russian Federation", RIGHT),
        ((51.5, -0.12), "This is the U.K.", RIGHT), ((33.45, -112), "Phoenix, AZ, U.S.A.", RIGHT),
        ((42.36, -71.06), "New Jersey, USA", RIGHT),
        ((-23.55, -46.63), "It must be Brazil in South America", RIGHT),
        ((35.68, 139.7), "日本 (Japan)", RIGHT),
    ],
)  # fmt: skip
def test_countries_have_many_names(tmp_path, point, said, expected):
    check(one(tmp_path, 10, point), said, expected)


@pytest.mark.parametrize(
    ("point", "said", "expected"),
    [
        (GOA, "Marathi", RIGHT), (GOA, "konkani and English", RIGHT), (GOA, "Hindi", WRONG),
        (GOA, "unknown", NONE), (GOA, "", NONE),
        (GOA, "English, Hindi, Thai, Dutch, Danish, French, Marathi", NONE),
        ((14.6, 120.98), "Tagalog", RIGHT), (TRONDHEIM, "Norwegian (Bokmål)", RIGHT),
        (TRONDHEIM, "Tagalog", WRONG),
    ],
)  # fmt: skip
def test_one_true_language_is_enough_and_a_list_is_no_answer(tmp_path, point, said, expected):
    check(one(tmp_path, 18, point), said, expected)


@pytest.mark.parametrize(
    ("point", "said", "expected"),
    [
        ((42.36, -71.06), "<answer>Massachusetts</answer>", RIGHT),
        ((42.36, -71.06), "Boston, MA, USA", RIGHT),
        ((42.36, -71.06), "The state or province is Massachusetts.", RIGHT),
        ((42.36, -71.06), "Texas", WRONG), ((42.36, -71.06), "Massachusetts or Rhode Island", NONE),
        ((42.36, -71.06), "Massachusetts or Vermont", NONE), ((42.36, -71.06), "ma", WRONG),
        ((42.36, -71.06), "It cannot be said", NONE), (PARIS, "Ile de France", RIGHT),
        (TRONDHEIM, "Sør-Trøndelag", RIGHT), ((52.37, 4.9), "Noord-Holland, Netherlands", RIGHT),
        ((55.75, 37.6), "Moscow Oblast", WRONG), ((47.38, 8.54), "Canton of Zürich", RIGHT),
        (OTTAWA, "Ontario", RIGHT),
    ],
)  # fmt: skip
def test_states_have_many_names(tmp_path, point, said, expected):
    check(one(tmp_path, 19, point), said, expected)


@pytest.mark.parametrize(
    ("point", "said", "expected"),
    [
        (PARIS, "<answer>Paris</answer>", RIGHT), (PARIS, "The city, town or village is Paris.", RIGHT),
        (PARIS, "France, Paris", RIGHT), (PARIS, "Paris (France)", RIGHT),
        (PARIS, "Montmartre, Paris", RIGHT), (PARIS, "Lyon", WRONG), (PARIS, "Paris, Texas", WRONG),
        (PARIS, "Paris, Canada", WRONG), (PARIS, "Lyon, Paris, Lille", WRONG),
        (PARIS, "Paris or Lyon", NONE), (PARIS, "Paris/London", NONE),
        (PARIS, "Amman, Berlin, Paris, Tokyo", NONE), (PARIS, "a place that nobody could ever name", NONE),
        (PARIS, "unknown", NONE), (PARIS, "", NONE), ((55.68, 12.57), "København", RIGHT),
        ((55.68, 12.57), "Copenhague", RIGHT), ((47.38, 8.54), "Zürich", RIGHT),
        ((-23.55, -46.63), "São Paulo", RIGHT), ((35.68, 139.7), "東京", RIGHT),
        ((35.68, 139.7), "Shibuya, Tokyo", RIGHT), ((51.5, -0.12), "London, Ontario", WRONG),
        (OTTAWA, "Ottawa, Ontario, Canada", RIGHT), (OTTAWA, "Ontario, Ottawa", RIGHT),
        (OTTAWA, "Toronto", WRONG), (GOA, "Panaji, Goa", RIGHT), ((37.77, -122.42), "SF", RIGHT),
        ((37.77, -122.42), "downtown San Francisco, CA", RIGHT),
    ],
)  # fmt: skip
def test_cities_have_many_names_and_lie_somewhere(tmp_path, point, said, expected):
    check(one(tmp_path, 20, point), said, expected)


@pytest.mark.parametrize(
    ("point", "said", "distance", "expected"),
    [
        (PARIS, "<think>48.0, 2.0?</think><answer>(48.8566, 2.3522)</answer>", 0, RIGHT),
        (PARIS, "48.8566° N, 2.3522° E", 0, RIGHT),
        (PARIS, "Latitude: 48.8566\nLongitude: 2.3522", 0, RIGHT),
        (PARIS, "First 1.0, 2.0, but\n48.9566, 2.3522", 11.119, RIGHT),
        (PARIS, "48.8566, 3.3522", 73.16, WRONG),
        (PARIS, "0, 0", 5436.5, WRONG),
        (PARIS, "-48.8566, -177.6478", 20015.087, WRONG),  # the antipode
        (PARIS, "90.0, 0.0", 4574.8, WRONG),
        (PARIS, "48.8566, 2.3522 or 48.0, 2.0", None, NONE),
        (PARIS, "148.8566, 2.3522", None, NONE),
        (PARIS, "nan, inf", None, NONE),
        (PARIS, "", None, NONE),
        ((-16.5, -179.99), "(-16.5, 179.99)", 2.132, RIGHT),  # over the date line
        ((0, 0), "(0, 0)", 0, RIGHT),
    ],
)
def test_coordinates_are_right_within_25_km(tmp_path, point, said, distance, expected):
    question = one(tmp_path, 21, point)
    check(question, said, expected)
    record = BENCHMARK.score(question, said)
    assert record["distance_km"] == (
        None if distance is None else pytest.approx(distance, rel=1e-3, abs=1e-6)
    )
    assert (record["latitude"], record["longitude"]) == point
    assert (record["predicted_latitude"] is None) == (distance is None)


def test_a_question_without_coordinates_has_no_place_on_the_map(tmp_path):
    assert "latitude" not in BENCHMARK.score(one(tmp_path, 5, PARIS), "no")


@pytest.mark.parametrize(
    "said",
    [
        "Paris, " * 150_000, "<answer>" * 130_000, "<answer>" + "yes or " * 150_000 + "</answer>",
        "<" * 1_000_000, "\n" * 1_000_000, "<answer>" + "<" * 2000 + "</answer>",
        "<answer>" + "1." * 1000 + "</answer>", "<answer>" + "A b " * 500 + "</answer>",
    ],
    ids=range(8),
)  # fmt: skip
def test_a_hostile_answer_is_no_answer_and_takes_no_time(tmp_path, said):
    questions = ask(tmp_path, [row("p", PARIS)])
    BENCHMARK.score(questions[19], "Paris")  # reads the gazetteer
    start = time.process_time()
    records = [BENCHMARK.score(question, said) for question in questions]
    assert time.process_time() - start < 10
    assert not any(record["right"] for record in records)


@pytest.mark.parametrize(
    "said",
    [
        "<b onclick='x'>Lyon</b>", "&lt;img src=x&gt;Lyon", "<answer><h1>Lyon</answer>",
    ],
)  # fmt: skip
def test_html_in_an_answer_is_left_out(tmp_path, said):
    assert BENCHMARK.score(one(tmp_path, 20, PARIS), said)["read"] == "Lyon"
