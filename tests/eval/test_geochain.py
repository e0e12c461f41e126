"""GeoChain: which questions are asked, truths from metadata, and what is summed up."""

import json

import pytest
from geochain_photos import (
    GOA,
    HEADER,
    MELBOURNE,
    NAIROBI,
    OTTAWA,
    PARIS,
    TRONDHEIM,
    answers,
    ask,
    row,
    write,
)

from geo_r1.eval.geochain import BENCHMARK
from geo_r1.eval.geochain_answers import CITY_NAMES
from geo_r1.eval.geochain_truths import BINARY_RANKS, CITIES_OF, CITY_OF, STATES, read_city_facts, read_tasks

FACTS = ("City", "Near Coast", "Island", "Desert Region", "Mountainous", "Climate Type", "Big City",
         "Small Town", "Languages")  # fmt: skip


def test_the_21_questions_and_13_of_yes_or_no():
    tasks = read_tasks()
    assert list(tasks) == list(range(1, 22))
    assert tasks[2].text.endswith("Car, Van, Motorbike, Minibike, Bicycle?")
    assert tasks[21].text.endswith("Please give a tuple of float coordinates (lat, lon)")
    by = [[task.difficulty for task in tasks.values()].count(name) for name in ("Easy", "Medium", "Hard")]
    assert by == [11, 6, 4] and len(BINARY_RANKS) == 13
    assert len(read_city_facts()) == len(CITY_NAMES) == 24


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        (
            NAIROBI,
            "yes no no|Africa Left Kenya|no no no yes Temperate yes no|"
            "Swahili, English|Nairobi|-1.2921, 36.8219",
        ),
        (GOA, "no no yes|Asia Left India|yes no no no Tropical no yes|Konkani, Marathi|Goa|15.4989, 73.8278"),
        (
            TRONDHEIM,
            "no no yes|Europe Right Norway|yes no no yes Continental no yes|"
            "Norwegian|Trondheim|63.4305, 10.3951",
        ),
        (
            MELBOURNE,
            "no no no|Oceania Left Australia|yes no no no Temperate yes no|"
            "English|Melbourne|-37.8136, 144.9631",
        ),
    ],
)  # fmt: skip
def test_truths_come_from_where_a_photo_was_taken(tmp_path, point, expected):
    found = answers(ask(tmp_path, [row("p", point)]))
    groups = [(5, 6, 7), (8, 9, 10), range(11, 18), (18,), (20,), (21,)]
    assert "|".join(" ".join(found[rank] for rank in ranks) for ranks in groups) == expected
    assert [found[rank] for rank in (1, 2, 3, 4)] == ["no"] * 4


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({"boat": 3.26e-06}, "yes no no no"), ({"ship": 0.5, "flag": 0.01}, "yes no no yes"),
        ({"minibike, motorbike": 0.1, "window ": 0.2}, "no yes no no"),
        ({"traffic light": 0.0}, "no no yes no"), ({"cart": 1, "flagpole": 1}, "no no no no"),
        ("{'car': 1}", "no no no no"), ('["car"]', "no no no no"), ("", "no no no no"),
        ("[" * 100_000, "no no no no"),
    ],
)  # fmt: skip
def test_a_class_is_seen_however_small_and_a_broken_mapping_shows_nothing(tmp_path, classes, expected):
    text = classes if isinstance(classes, str) else json.dumps(classes)
    found = answers(ask(tmp_path, [row("p", NAIROBI, classes=text)], "1,2,3,4"))
    assert " ".join(found.values()) == expected


@pytest.mark.parametrize(
    ("point", "ranks", "expected"),
    [
        ((45.4287, -75.7137), "19,20", ["Quebec, QC", "Ottawa"]),  # Hull
        ((43.70, -79.40), "19,20", ["Ontario, ON", "Toronto"]),
        ((29.76, -95.37), "19,20", ["Texas, TX", "Austin"]),  # Houston
        ((40.71, -74.01), "20,", ["Boston"]),  # New York is nearer to it than to the others
        ((55.7558, 37.6173), "8,10,19", ["Europe", "Russia", "Moscow, Moscow City"]),
        ((-36.85, 174.76), "9,10,18,20", ["Left", "New Zealand"]),  # no city in GeoChain
        ((-33.45, -70.66), "9,19", ["Right"]),  # Chile: its states are not known here
        ((-6.8, 39.28), "9,", ["Right"]),  # Tanzania drives on the left, but not in the public list
        ((0, 0), "5,7", ["yes"]),  # on the equator rank 7 has no truth
        ((70, 25), "6,", ["yes"]), ((10, -84), "5,", ["no"]),
        ((-16.5, -179.99), "21,", ["-16.5000, -179.9900"]),
    ],
)  # fmt: skip
def test_rules_have_the_public_generators_oddities(tmp_path, point, ranks, expected):
    assert list(answers(ask(tmp_path, [row("p", point)], ranks)).values()) == expected


@pytest.mark.parametrize("point", [("", ""), ("nan", "1"), ("12", "")])
def test_a_photo_without_coordinates_is_asked_what_can_be_seen(tmp_path, point):
    questions = ask(tmp_path, [row("a", point), row("b", NAIROBI)])
    assert [q.sample.id for q in questions[:4]] == ["a/1", "a/2", "a/3", "a/4"]
    assert len(questions) == 4 + 21
    assert {q.sample.metadata["left_out"] for q in questions} == {17}
    records = [BENCHMARK.score(q, "") for q in questions]
    assert BENCHMARK.summarise(records)["left_out"] == 17


def test_a_question_shows_the_photo_and_says_what_an_answer_is(tmp_path):
    questions = ask(tmp_path, [row("p", GOA, "goa", folder="database")], "8,21")
    first, last = (q.sample for q in questions)
    assert first.images == (tmp_path / "images/goa/database/images/p.jpg",)
    image, text = first.messages[0]["content"]
    assert image == {"type": "image"}
    assert text["text"] == (
        "Which continent best describes where this location is? Think in <think> </think>, then give one of "
        "North America, South America, Europe, Africa, Asia, Oceania, Antarctica, alone, in <answer> "
        "</answer>."
    )
    assert "two decimal numbers" in last.messages[0]["content"][1]["text"]
    assert dict(last.metadata) == {
        "image": "p", "city": "goa", "latitude": GOA[0], "longitude": GOA[1], "left_out": 0,
        "rank": 21, "difficulty": "Hard", "category": "Exact Location",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("all", list(range(1, 22))), ("13", list(BINARY_RANKS)), ("13,", [13]), (" 21, 1,1", [1, 21]),
    ],
)  # fmt: skip
def test_tasks_are_chosen_by_rank(tmp_path, tasks, expected):
    assert list(answers(ask(tmp_path, [row("p", PARIS)], tasks))) == expected


def test_questions_and_truths_can_be_ones_own(tmp_path):
    asked = write(
        tmp_path / "questions.csv",
        [(11, "Hard", "Sea?", "Binary", "Mine"), (15, "Easy", "Climate?", "Multiclass", "Mine")],
        ("Rank", "Difficulty", "Question", "Type", "Category"),
    )
    facts = ("PARIS", "yes", "no", "No", "No", "polar", "Yes", "No", "x")
    city = write(tmp_path / "city.csv", [facts], FACTS)
    questions = ask(tmp_path, [row("p", PARIS)], questions=asked, per_city=city)
    assert answers(questions) == {11: "yes", 15: "Polar"}
    assert questions[0].sample.metadata["difficulty"] == "Hard"
    assert questions[0].sample.messages[0]["content"][1]["text"].startswith("Sea? Think")


def test_the_first_photos_only(tmp_path):
    rows = [row(key, PARIS) for key in "abc"]
    assert [q.sample.id for q in ask(tmp_path, rows, "1,", photos=2)] == ["a/1", "b/1"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "test_samples.csv holds no photos"),
        ([row("p", ("", ""))], {"tasks": "21,"}, "holds no photo that these tasks can be asked of"),
        ([row("p", PARIS), row("p", PARIS)], {}, "row 2: the key 'p' is that of .*row 1 too"),
        ([row("p", ("north", "1"))], {}, "row 1: coordinates must be numbers, got 'north'"),
        ([row("p", ("91", "1"))], {}, "row 1: latitude 91.0 and longitude 1.0 are not on the globe"),
        ([row("p", ("inf", "1"))], {}, "row 1: .*not on the globe"),
        ([row("../p", PARIS)], {}, "row 1: city, sub_folder and key must be names without slashes"),
        ([row("p", PARIS, city="..")], {}, "without slashes, got '..'"),
        ([row("p", PARIS, folder="C:\\x")], {}, "without slashes"),
        ([row("", PARIS)], {}, "row 1: no value in key"),
        ([("p", "0.3")], {}, "row 1: no value in city"),
        ([row("p", PARIS)], {"tasks": "0"}, "--tasks must be all, 13, or ranks from 1 to 21.*got '0'"),
        ([row("p", PARIS)], {"tasks": "some"}, "got 'some'"),
        ([row("p", PARIS)], {"photos": 0}, "--photos must be at least 1, got 0"),
    ],
)
def test_what_is_malformed_is_an_error_with_its_row(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        ask(tmp_path, rows, **options)


@pytest.mark.parametrize("column", ["lat", "lon", "class_mapping", "key", "city", "sub_folder"])
def test_a_missing_column_is_an_error(tmp_path, column):
    header = [name for name in HEADER if name != column]
    fields = dict(zip(HEADER, row("p", PARIS), strict=True))
    path = write(tmp_path / "t.csv", [[fields[name] for name in header]], header)
    with pytest.raises(ValueError, match=rf"t\.csv, row 1: no (column|value in) {column}; its columns are"):
        ask(tmp_path, [], data=path)


def test_a_circle_of_links_is_a_missing_image(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "goa").symlink_to(tmp_path / "images" / "goa")
    assert len(ask(tmp_path, [row("p", GOA, "goa")])) == 21


def test_a_link_out_of_the_folder_of_images_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "goa").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"row 1: image .*p\.jpg leads out of"):
        ask(tmp_path, [row("p", GOA, "goa")])


@pytest.mark.parametrize(
    ("rank", "message"),
    [("22", "row 1: Rank must be 1 to 21, each once, got '22'"), ("x", "got 'x'"), ("", "no value in rank")],
)
def test_a_malformed_file_of_questions_is_an_error(tmp_path, rank, message):
    header = ("Rank", "Difficulty", "Question", "Question Category")
    path = write(tmp_path / "q.csv", [(rank, "Easy", "?", "x")], header)
    with pytest.raises(ValueError, match=message):
        read_tasks(path)
    with pytest.raises(ValueError, match="row 2: Rank must be 1 to 21, each once, got '5'"):
        read_tasks(write(path, [(5, "Easy", "?", "x")] * 2, header))
    with pytest.raises(ValueError, match=r"q\.csv holds no questions"):
        read_tasks(write(path, [], header))
    with pytest.raises(ValueError, match="the file of questions has no rank 6"):
        ask(tmp_path, [row("p", GOA)], "6,", questions=write(path, [(5, "Easy", "?", "x")], header))


def test_a_city_with_an_unknown_climate_is_an_error(tmp_path):
    path = write(tmp_path / "c.csv", [("Paris", *["No"] * 4, "Nice", "No", "No", "French")], FACTS)
    with pytest.raises(ValueError, match=r"row 1: Climate Type must be Tropical or Dry or .*got 'Nice'"):
        read_city_facts(path)


def test_figures_count_every_question(tmp_path):
    rows = [row("a", PARIS, "paris"), row("b", OTTAWA, "ottawa"), row("c", ("", ""), "goa")]
    questions = ask(tmp_path, rows, "1,7,21")
    said = {
        "a/1": "no", "a/7": "no", "a/21": "(48.8566, 2.3522)",
        "b/1": "maybe", "b/7": "yes", "b/21": "unknown",
        "c/1": "no",
    }  # fmt: skip
    records = [{"id": q.sample.id, "length": 1} | BENCHMARK.score(q, said[q.sample.id]) for q in questions]
    summary = BENCHMARK.summarise(records)
    assert summary["accuracy"] == pytest.approx(4 / 7)
    assert summary["pass_score"] == pytest.approx((2 / 3 + 1 / 3 + 1) / 3)
    assert summary["answered"] == pytest.approx(5 / 7)
    assert (summary["num_samples"], summary["num_images"], summary["left_out"]) == (7, 3, 2)
    assert summary["coordinates"] == {
        "within": {"1": 0.5, "25": 0.5, "200": 0.5, "750": 0.5, "2500": 0.5},
        "mean_km": 0.0, "median_km": 0.0, "located": 0.5, "answered": 0.5, "num_samples": 2,
    }  # fmt: skip
    assert {rank: group["accuracy"] for rank, group in summary["by_rank"].items()} == {
        "1": pytest.approx(2 / 3), "7": 0.5, "21": 0.5,
    }  # fmt: skip
    assert summary["by_rank"]["1"]["coordinates"] is None
    assert {name: group["num_samples"] for name, group in summary["by_difficulty"].items()} == {
        "Easy": 5, "Hard": 2,
    }  # fmt: skip
    assert list(summary["by_category"]) == ["Exact Location", "Geographical localization", "Visual Cues"]
    assert summary["by_city"]["paris"]["accuracy"] == pytest.approx(2 / 3)
    json.dumps(summary, allow_nan=False)


def test_each_country_of_geochain_has_states():
    assert {country for country, _ in STATES} >= {*CITY_OF, *CITIES_OF}
