"""Geolocation: what is read of an answer, how far it is from the truth, and what stays in the denominator."""

import argparse
from pathlib import Path

import pytest
from PIL import Image

from geo_r1.data import Sample
from geo_r1.eval.benchmark import Question
from geo_r1.eval.geolocation import BENCHMARK, answered_place, score, summarise
from geo_r1.places import open_gazetteer

PARIS, NEVER = (48.85341, 2.3488), {"city": None, "country": None, "coordinates": None}


def question(latitude, longitude, city=None, country=None, name="a"):
    sample = Sample(name, ({"role": "user", "content": [{"type": "text", "text": "Where?"}]},))
    return Question(sample, {"latitude": latitude, "longitude": longitude, "city": city, "country": country})


def answered(text):
    return answered_place(text, open_gazetteer())


def write_photos(folder: Path, rows: str, names: list[str]) -> argparse.Namespace:
    for name in names:
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (folder / "rows.csv").write_text(rows)
    return argparse.Namespace(data=folder / "rows.csv", images=folder / "photos", predictions=None)


@pytest.mark.parametrize(
    "text",
    [
        "<think>Is it Lyon?</think><answer>country: France\ncity: Paris</answer>",
        "<answer>\nCountry: France \n City : **Paris**.\n</answer>",
        "<answer>Paris, France</answer>",
        "Paris, France.",
        "<answer>city: PARIS\r\ncountry: république française</answer>",
        '<answer>- country: `France`\n- city: "Paris"</answer>',
    ],
)
def test_country_and_city_are_looked_up(text):
    place = answered(text)
    assert place["coordinates"] == PARIS
    assert place["city"].strip('"').casefold() == "paris"


@pytest.mark.parametrize(
    ("text", "city"),
    [
        ("The photo was taken in Lyon, France.", "Lyon"),
        ("Answer: Lyon, Auvergne-Rhône-Alpes, France", "Lyon"), ("<think>x</think>Lyon, France", "Lyon"),
        ("This is Edinburgh, Scotland, United Kingdom", "Edinburgh"),
        ("<answer>country: France\ncity: near Lyon</answer>", "Lyon"),
        ("<answer>country: UK city: London</answer>", "London"),
        ("<answer>country: Japan, city: Kyoto</answer>", "Kyoto"),
        ("<answer>**Country:** Japan / **City:** Kyoto</answer>", "Kyoto"),
        ("<answer>1. Country: Japan\n2. City: Kyoto</answer>", "Kyoto"),
        ('<answer>{"country": "Japan", "city": "Kyoto"}</answer>', "Kyoto"),
        ("<answer>country：China\ncity：Shanghai</answer>", "Shanghai"),
        ("<answer>Country name: <b>France</b>\nCity name: <b>Lyon</b></answer>", "Lyon"),
        ("<answer>Lyon\nFrance</answer>", "Lyon"),
        ("<answer>País: España\nCiudad: Sevilla</answer>", "Sevilla"),
        ("<answer>国家：中国\n城市：上海</answer>", "Shanghai"),
        ("<answer>country: United States\ncity: New York City, NY</answer>", "New York City"),
    ],
)  # fmt: skip
def test_places_are_read_as_a_person_would(text, city):
    gazetteer = open_gazetteer()
    [there, *_] = gazetteer.cities(city)
    place = answered(text)
    assert (place["coordinates"], place["located_by"]) == ((there.latitude, there.longitude), "city")


@pytest.mark.parametrize(
    ("text", "latitude", "longitude"),
    [
        ("Birmingham, AL", 33.5, -86.8),  # not Albania
        ("Atlanta, Georgia", 33.7, -84.4),  # not Tbilisi
        ("country: United Kingdom (Scotland)\ncity: Perth", 56.4, -3.4),  # not Australia
        ("city: Paris, Texas\ncountry: USA", 33.7, -95.6),
    ],
)
def test_namesakes_are_told_apart_by_what_they_lie_in(text, latitude, longitude):
    place = answered(f"<answer>{text}</answer>")
    assert place["coordinates"] == pytest.approx((latitude, longitude), abs=0.1)


@pytest.mark.parametrize(
    "text", ["<answer>country: France\ncity: Lyon or Grenoble</answer>", "<answer>France</answer>"]
)
def test_a_country_alone_is_its_capital_and_the_record_says_so(text):
    place = answered(text)
    assert (place["coordinates"], place["located_by"]) == (PARIS, "capital")


def test_what_was_cut_off_has_not_been_answered():
    for text in ("<think>maybe 48.8566, 2.3522 but", "<think>x</think><answer>country: France"):
        assert score(question(*PARIS), text)["answered"] is False


def test_coordinates_count_before_names():
    place = answered("<answer>country: France\ncity: Paris\n(40.0, -3.5)</answer>")
    assert place["coordinates"] == (40.0, -3.5)


@pytest.mark.parametrize(
    "text",
    ["", "<answer></answer>", "<think>Paris, France</think>", "<answer>", "?" * 9, ",", " , ,\n,", "/ or /"],
)
def test_nothing_said_is_nothing_read(text):
    assert answered(text)["coordinates"] is None


@pytest.mark.parametrize(
    "text",
    [
        "<answer>(91.0, 2.0)</answer>", "<answer>nan, nan</answer>",
        "<answer>(48.8, 2.3) or (45.7, 4.8)</answer>",
    ],
)  # fmt: skip
def test_coordinates_that_are_none_or_two_are_a_miss(text):
    assert score(question(*PARIS), text)["answered"] is False


@pytest.mark.parametrize(
    ("truth", "text", "km"),
    [
        ((0.0, 0.0), "<answer>(0.0, 180.0)</answer>", 20015.087),  # antipodes: half the way round
        ((37.5, -122.0), "<answer>(-37.5, 58.0)</answer>", 20015.087),
        ((0.0, 179.9), "<answer>(0.0, -179.9)</answer>", 22.239),  # across the date line
        ((90.0, 0.0), "<answer>(90.0, 137.0)</answer>", 0.0),  # a pole has every longitude
        ((-90.0, 12.0), "<answer>(-89.0, 100.0)</answer>", 111.195),
        ((0.0, 0.0), "<answer>(0, 0)</answer>", 0.0),  # 0, 0 is a place
        ((0.0, 0.0), "<answer>latitude: 0, longitude: 1</answer>", 111.195),
        ((48.8566, 2.3522), "<answer>51.5074° N, 0.1278° W</answer>", 343.556),  # London
    ],
)
def test_distances_are_those_computed_by_hand(truth, text, km):
    record = score(question(*truth), text)
    assert record["distance_km"] == pytest.approx(km, abs=0.01)
    assert record["answered"] is True


@pytest.mark.parametrize(
    ("city", "country", "text", "right"),
    [
        ("São Paulo", "Brazil", "country: Brasil\ncity: Sao Paulo", (True, True)),
        ("Cologne", "Germany", "country: Deutschland\ncity: Köln", (True, True)),
        ("Vienna", "AT", "country: Austria\ncity: Wien", (True, True)),
        ("Vienna", "AT", "country: Germany\ncity: Munich", (False, False)),
        ("Saint Petersburg", "RU", "country: Russian Federation\ncity: St. Petersburg", (True, True)),
        ("Springfield", None, "", (False, None)),
        (None, "US", "country: USA\ncity: Boston", (None, True)),
    ],
)
def test_city_and_country_by_any_of_their_names(city, country, text, right):
    record = score(question(10.0, 20.0, city, country), f"<answer>{text}</answer>")
    assert (record["city_correct"], record["country_correct"]) == right


def test_an_unknown_city_is_placed_in_its_countrys_capital():
    record = score(question(*PARIS), "<answer>country: France\ncity: Xyzzyville</answer>")
    assert record["distance_km"] < 2


def test_every_sample_stays_in_the_denominator():
    questions = [question(0.0, 0.0, "A", "FR", str(i)) for i in range(4)]
    texts = ["(0.0, 0.005)", "(0.0, 1.0)", "(0.0, 20.0)", ""]  # 0.6, 111.2, 2223.9 km, none
    records = [score(q, f"<answer>{t}</answer>") for q, t in zip(questions, texts, strict=True)]
    summary = summarise(records)
    assert summary["within"] == {"1": 0.25, "25": 0.25, "200": 0.5, "750": 0.5, "2500": 0.75}
    assert summary["median_km"] == pytest.approx(111.195, abs=0.01)
    assert summary["mean_km"] == pytest.approx((0.55597 + 111.19493 + 2223.8985) / 3, abs=0.01)
    assert (summary["answered"], summary["num_samples"], summary["city_accuracy"]) == (0.75, 4, 0.0)
    assert summary["by_country"]["FR"]["num_samples"] == 4


def test_nobody_answered_has_no_distance_and_no_share():
    summary = summarise([score(question(0.0, 0.0), "")])
    assert (summary["median_km"], summary["mean_km"], summary["answered"]) == (None, None, 0.0)
    assert set(summary["within"].values()) == {0.0}


@pytest.mark.parametrize(
    ("header", "row", "image"),
    [
        ("IMG_ID,AUTHOR,LAT,LON", "x_1.jpg,me,32.3,-64.7", "x_1.jpg"),  # IM2GPS3k, YFCC4k
        ("id,latitude,longitude,country,region,sub-region,city", "77,32.3,-64.7,BM,a,b,Hamilton",
         "test/00/77.jpg"),
        ("IMG_ID,LAT,LON,city,country", "y,32.3,-64.7,Hamilton,Bermuda", "y.png"),  # MP16-Reason
    ],
)  # fmt: skip
def test_each_data_set_is_read_in_its_own_columns(tmp_path, header, row, image):
    [found] = BENCHMARK.questions(write_photos(tmp_path, f"{header}\n{row}\n", [image]))
    assert found.truth["latitude"], found.truth["longitude"] == (32.3, -64.7)
    assert found.sample.images == ((tmp_path / "photos" / image).resolve(),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("IMG_ID,LAT,LON\na.jpg,,3\n", r"rows.csv, row 1: no value in lat or latitude"),
        ("IMG_ID,LAT,LON\na.jpg,north,3\n", r"row 1: coordinates must be numbers, got 'north' and '3'"),
        ("IMG_ID,LAT,LON\na.jpg,95,100\n", r"row 1: latitude 95.0 and longitude 100.0 are not on the globe"),
        ("IMG_ID,LAT,LON\na.jpg,nan,3\n", r"row 1: latitude nan and longitude 3.0 are not on the globe"),
        ("IMG_ID,LON,LAT\na.jpg,32,-164\n", r"their names are swapped"),
        ("IMG_ID,LAT,LON\n../secret.jpg,1,3\n", r"row 1: image '../secret.jpg' leads out of"),
        ("IMG_ID,LAT,LON\n/etc/passwd,1,3\n", r"row 1: image '/etc/passwd' leads out of"),
        ("IMG_ID,LAT,LON\nb.jpg,1,3\n", r"row 1: there is no image 'b.jpg' under"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, message):
    (tmp_path / "secret.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        BENCHMARK.questions(write_photos(tmp_path, rows, ["a.jpg"]))


def test_a_link_out_of_the_image_folder_is_refused(tmp_path):
    options = write_photos(tmp_path, "IMG_ID,LAT,LON\nlink.jpg,1,3\n", ["a.jpg"])
    (tmp_path / "photos" / "link.jpg").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="leads out of"):
        BENCHMARK.questions(options)


@pytest.mark.parametrize(
    "text",
    [
        "country: " * 100_000, "\n" * 10**6, "city:" + " " * 10**6, "1 " * 10**6, "<answer>" * 10**5,
        "(" * 10**6,
    ],
)  # fmt: skip
def test_hostile_answers_are_read_as_none(text):
    assert score(question(*PARIS), f"<answer>{text}</answer>")["answered"] is False
