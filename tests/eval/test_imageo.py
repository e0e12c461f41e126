"""IMAGEO-Bench: JSON answers, names and coordinates against the truth."""

import argparse
import json

import pytest
from PIL import Image

from geo_r1.data import Sample
from geo_r1.eval.benchmark import Question
from geo_r1.eval.imageo import BENCHMARK, parse_answer, score, summarise

PLACE = {"city": "New York", "state": "NY", "country": "United States", "continent": "North America"}
TRUTH = {"latitude": 40.7128, "longitude": -74.006, **PLACE}


def question(**changes):
    sample = Sample("a", ({"role": "user", "content": [{"type": "text", "text": "Where?"}]},))
    return Question(sample, TRUTH | changes)


def answer(city="New York", state="NY", country="USA", latitude="40.7128", longitude="-74.0060"):
    address = {"street": "", "city": city, "state": state, "country": country}
    coordinates = {"latitude": latitude, "longitude": longitude}
    inner = {"confidence": "4", "address": address, "coordinates": coordinates}
    return json.dumps({"reverse_geocoding": inner})


@pytest.mark.parametrize(
    "wrap", ["{}", "```json\n{}\n```", "I think so.\n{}\nDone.", "<think>{{a}}</think><answer>{}</answer>"]
)
def test_the_object_is_found_wherever_it_stands(wrap):
    assert parse_answer(wrap.format(answer()))["address"]["city"] == "New York"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", '{"a": 1}', "{}" * 10**5, "{{1, {2}}: 1or}", "{{{1}}}", "{" * 10**5,
        '{"address": ' * 10**4, "null",
    ],
)  # fmt: skip
def test_anything_else_is_no_answer(text):
    record = score(question(), text)
    assert (record["answered"], record["city_correct"], record["distance_km"]) == (False, False, None)


def test_names_are_compared_as_the_gazetteer_reads_them():
    record = score(question(), answer(state="New York"))
    assert [record[f"{level}_correct"] for level in ("city", "state", "country")] == [True, True, True]
    assert [record[f"{level}_exact"] for level in ("city", "state", "country")] == [True, False, False]
    assert record["distance_km"] == pytest.approx(0, abs=1e-6)


def test_a_level_that_the_data_lacks_is_not_judged():
    record = score(question(state=None), answer())
    assert record["state_correct"] is None and record["state_exact"] is None


def test_a_number_that_no_float_holds_is_no_coordinate():
    text = '{"reverse_geocoding": {"coordinates": {"latitude": 1' + "0" * 400 + ', "longitude": true}}}'
    assert score(question(), text)["distance_km"] is None


@pytest.mark.parametrize(
    "text",
    ["{'reverse_geocoding': {'address': {'city': 'Lima', 'state': None},}}", "{x} " + answer(city="Lima")],
)
def test_what_is_nearly_json_is_read(text):
    assert parse_answer(text)["address"]["city"] == "Lima"


@pytest.mark.parametrize("latitude", ["", "none", "north", "91", "inf", None, [], {"a": 1}])
def test_broken_coordinates_have_no_distance_but_the_names_count(latitude):
    record = score(question(), answer(latitude=latitude))
    assert (record["distance_km"], record["city_correct"], record["answered"]) == (None, True, True)


def test_zero_is_the_equator_and_no_missing_value():
    record = score(question(latitude=0.0, longitude=0.0), answer(latitude="0.0", longitude="0.0"))
    assert record["distance_km"] == 0.0


def test_every_sample_stays_in_the_denominator():
    boston = answer(city="Boston", latitude="42.3601", longitude="-71.0589")
    texts = [answer(), boston, answer(city="Unknown"), ""]
    summary = summarise([score(question(), text) for text in texts])
    shares = [summary[name] for name in ("city_accuracy", "country_accuracy", "answered")]
    assert shares == [0.25, 0.75, 0.75]
    assert summary["median_km"] == pytest.approx(0, abs=1e-6)
    assert summary["mean_km"] == pytest.approx(306.108 / 3, abs=0.5)  # New York to Boston, over three
    assert summary["by_continent"]["North America"]["num_samples"] == 4


def read(folder, text):
    (folder / "rows.csv").write_text(text)
    options = argparse.Namespace(data=folder / "rows.csv", images=folder, predictions=None)
    [found] = BENCHMARK.questions(options)
    return found


def test_both_sets_are_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "9_0x1.png")
    found = read(
        tmp_path,
        'image_id,name,address,latitude,longitude,street,city,state\n9_0x1,Bar,"1 A St, B",1.5,2.5,A,B,CA\n',
    )
    place = {"latitude": 1.5, "longitude": 2.5, "city": "B", "state": "CA"}
    assert found.truth == {**place, "country": None, "continent": None}
    found = read(
        tmp_path,
        "image_id,city,country,continent,latitude,longitude,img_path\n"
        "u1,B,Peru,South America,1,2,x/9_0x1.png\n",
    )
    assert (found.truth["country"], found.sample.images[0].name) == ("Peru", "9_0x1.png")
