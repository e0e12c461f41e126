"""The fact check: claims that it finds, claims that it lets pass, and the files of samples."""

import json
from pathlib import Path

import pytest
from chat_server import ChatServer
from data_cases import lines, write
from planted import PLANTERS, measure

from geo_r1.data.__main__ import main
from geo_r1.data.sample import Sample
from geo_r1.data.teaching.claims import contradictions
from geo_r1.data.teaching.fact_check import read_verdict
from geo_r1.data.teaching.rules import FORM, Finding, Limits, check, outcome
from geo_r1.data.teaching.world_teacher import world_samples
from geo_r1.places import open_gazetteer

LYON = {
    "city": "Lyon",
    "country": "France",
    "continent": "Europe",
    "latitude": 45.7485,
    "longitude": 4.8467,
    "driving_side": "right",
    "num_choices": 5,
}
FILLER = "The street is wide and lined with plane trees, the houses are tall and pale."
GOOD = (
    f"<think>\nVisual cues: {FILLER}\nKnowledge association: This is Lyon, France.\n"
    "Evidence corroboration: Tile A shows a lake, B does not fit, C has both rivers.\n"
    "Conclusion: Tile C.\n</think>\n<answer>C</answer>"
)


def found(text, **metadata):
    known = {key: value for key, value in (LYON | metadata).items() if value is not None}
    return {c.kind for c in contradictions(text, known, open_gazetteer(), 100.0, 50.0)}


def kinds(response, answer="C"):
    sample = Sample("a", ({"role": "user", "content": []},), response=response, answer=answer, metadata=LYON)
    return {finding.kind for finding in check(sample, open_gazetteer(), Limits())}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("This is Marseille.", "city"),
        ("It lies in Paris, France.", "city"),
        ("Everything suggests São Paulo.", "city"),
        ("It was taken near St. Petersburg.", "city"),
        ("We are in the city of 東京.", "city"),
        ("The plates point to Spain.", "country"),
        ("It is in the United States of America.", "country"),
        ("The signs point to the U.K. at once.", "country"),
        ("We are in South America.", "continent"),
        ("It lies at 48.85, 2.35.", "coordinates"),
        ("It lies at 45.75° S, 4.85° E.", "coordinates"),
        ("The sun shows the southern hemisphere.", "hemisphere"),
        ("This is the Western Hemisphere.", "hemisphere"),
        ("Cars drive on the left.", "driving_side"),
        ("Left-hand traffic is visible.", "driving_side"),
        ("Traffic keeps to the left here.", "driving_side"),
    ],
)
def test_a_claim_that_the_metadata_denies_is_found(text, kind):
    assert found(text) == {kind}


@pytest.mark.parametrize(
    "text",
    [
        "This is Lyon in France, in Europe.",
        "This is Villeurbanne.",  # beside Lyon
        "Lugdunum, now Lyon, lies at about 45.8° N, 4.8° E.",
        "Unlike Spain, the signs are French.",
        "This rules out Italy. It cannot be Paris.",
        "It could be Belgium or Switzerland at first sight.",
        "Italy is ruled out by the signs.",
        "It is not in the southern hemisphere, and nobody drives on the left.",
        "It resembles Turin more than Nice.",
        "A Toyota and a Lincoln stand at the left; a car is parked on the left.",
        "The road bends to the left, the bay is 4.3 km wide.",
        "The Rue de Paris leads to the Gare.",
        "He turns left. The left tile is darker. These are right-hand drive cars, imported from Japan.",
        "Geneva lies over the border. Kigali drives on the left, and Peru, France and Chile on the right.",
        "English signs leave Spain, Portugal, France and Italy. It was named after Santiago.",
        "Such houses stand in Spain and France.",
        "Most of the Same Tiles are Orange.",
        "",
    ],
)
def test_what_agrees_or_is_not_asserted_is_let_pass(text):
    assert found(text) == set()


def test_what_the_metadata_lacks_is_not_judged():
    nothing = dict.fromkeys(LYON)
    text = (
        "This is Tokyo, Japan, in Asia, at 35.68, 139.69, in the southern hemisphere; cars drive on the left."
    )
    assert found(text, **nothing) == set()
    assert found(text, **(nothing | {"country": "France"})) == {
        "city",
        "country",
        "continent",
        "driving_side",
    }
    assert found(text, **(nothing | {"latitude": 35.7, "longitude": 139.7})) == {"hemisphere"}


def test_two_continents_and_names_of_states():
    assert found("This is in Asia.", country="Turkey", continent="Asia") == set()
    assert found("This is in Europe.", country="Turkey", continent="Asia") == set()
    assert found("This is Georgia.", country="United States", city="Atlanta", continent=None) == set()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, set()),
        (GOOD.replace("Visual cues:", "**Visual Cues:**").replace("Conclusion:", "4. Conclusion:"), set()),
        (GOOD.replace("<answer>C", "<answer>B"), {"answer", "conclusion"}),
        (GOOD.replace("Conclusion: Tile C.", "Conclusion: Tile D."), {"conclusion"}),
        (GOOD.replace("Conclusion: Tile C.", "Conclusion:"), {"steps"}),
        (GOOD.replace("Evidence corroboration", "Also"), {"steps"}),
        (GOOD.replace("Visual cues", "Conclusion", 1), {"steps"}),
        (GOOD.replace("</think>", ""), {"structure"}),
        (GOOD.removesuffix("</answer>"), {"structure"}),
        (GOOD.replace("<answer>C", "<answer>B or C"), {"structure"}),  # nothing that can be read
        (GOOD.replace(FILLER, f"{FILLER} " * 5), {"repetition"}),
        ("<think>x</think><answer>C</answer>", {"steps", "length"}),
        ("", {"structure", "steps", "length"}),
        (None, {"structure", "steps", "length"}),
    ],
)
def test_form_and_answer(response, expected):
    assert kinds(response) == expected


def test_an_answer_in_words_is_compared_as_words():
    assert kinds(GOOD.replace("<answer>C", "<answer>city: lyon"), answer="City: Lyon") == set()
    assert kinds(GOOD, answer="City: Lyon") == {"answer"}


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 200_000,
        "Aa " * 20_000,
        "In " * 20_000,
        "1.5, " * 20_000,
        "St. " * 20_000,
        "drives the " * 20_000,
        "A" * 10**6,
    ],
)
def test_a_hundred_kilobytes_of_anything_are_checked(text):
    assert "steps" in kinds(f"<think>{text}</think><answer>C</answer>")


def test_form_is_asked_for_again_and_contradictions_are_not():
    assert outcome([]) == "kept"
    assert outcome([Finding(kind, "") for kind in FORM]) == "again"
    assert outcome([Finding("steps", ""), Finding("city", "")]) == "rejected"


def test_planted_errors_are_found_and_good_exemplars_are_kept():
    """The figures in docs/data.md are of 2,000; each kind is here at least 20 times."""
    counts, rejected = measure(240, Limits(), seed=7)
    assert counts.keys() == PLANTERS.keys()
    assert rejected <= 0.01
    assert {kind: c.recall for kind, c in counts.items() if c.recall < 0.95} == {}
    assert sum(c.found for c in counts.values()) >= 0.99 * sum(c.planted for c in counts.values())
    assert {kind: c.false for kind, c in counts.items() if c.false > 1} == {}


def test_prose_of_other_writers_is_read_as_a_person_would():
    """330 chains of thought by writers who did not know the rules; the rules have since learned from them.

    Half have one contradiction each. Good ones compare with other places, rule them out, and hedge.
    """
    missed, alarms, gazetteer = [], [], open_gazetteer()
    rows = lines(Path(__file__).parent / "reasoned.jsonl")
    for row in rows:
        message = {"role": "user", "content": []}
        sample = Sample(row["id"], (message,), (), row["response"], row["answer"], row["metadata"])
        found = {finding.kind for finding in check(sample, gazetteer, Limits())}
        missed += [row["id"]] if row["wrong"] and not found & set(row["wrong"]) else []
        alarms += [row["id"]] if found and not row["wrong"] else []
    assert sum(not row["wrong"] for row in rows) == len(rows) // 2 == 165
    assert alarms == []
    assert missed == ["held-017", "held-061", "held-091", "second-068", "third-022"]


def test_the_worlds_teacher_is_the_same_at_every_call_and_knows_its_place():
    first, again = (list(world_samples(5, seed=3)) for _ in range(2))
    assert [s.response for s in first] == [s.response for s in again]
    assert [s.response for s in world_samples(5, seed=4)] != [s.response for s in first]
    gazetteer = open_gazetteer()
    for sample in first:
        place = sample.metadata
        assert gazetteer.country(place["country"]).continent == place["continent"]
        assert gazetteer.nearest(place["latitude"], place["longitude"]).country == (
            gazetteer.country(place["country"]).code
        )


@pytest.fixture
def rows(tmp_path):
    samples = list(world_samples(3, seed=1))
    texts = {
        "good": samples[0].response.replace("Visual cues:", "Visual cues: [good]"),
        "bare": "<answer>A</answer>",
        "wrong": samples[2].response,
    }
    texts["wrong"] = texts["wrong"].replace(samples[2].metadata["country"], "Atlantis, in Fiji")
    made = [
        {"id": name, "prompt": "<image> Which?", "images": ["p.png"], "answer": s.answer, "response": text}
        | dict(s.metadata)
        for (name, text), s in zip(texts.items(), samples, strict=True)
    ]
    made[1]["answer"] = "A"
    return write(tmp_path / "in" / "cot.jsonl", made)


def test_each_sample_goes_to_one_file_with_its_reasons(rows, tmp_path):
    out = tmp_path / "out"
    assert main(["fact-check", "--data", str(rows), "--out", str(out)]) == 0
    [kept], [again], [rejected] = (lines(out / f"{name}.jsonl") for name in ("kept", "again", "rejected"))
    assert (kept["id"], again["id"], rejected["id"]) == ("good", "bare", "wrong")
    assert kept["images"] == [str(rows.parent / "p.png")]
    assert "fact_check" not in kept and "response" not in again
    assert {f["kind"] for f in again["fact_check"]} == {"structure", "steps", "length"}
    assert {f["kind"] for f in rejected["fact_check"]} == {"country"}
    card = json.loads((out / "card.json").read_text())
    assert (card["samples"], card["kept"], card["again"], card["rejected"]) == (3, 1, 1, 1)
    assert card["found"]["country"] == {"samples": 1, "share": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("verdict", "name"),
    [
        ('{"contradictions": []}', "kept"),
        ('Well: {"contradictions": ["it says X"]}', "rejected"),
        ("no", "again"),
    ],
)
def test_a_judge_sees_what_the_rules_let_pass(rows, tmp_path, verdict, name):
    with ChatServer(reply=lambda _: verdict) as server:
        arguments = ["--judge-url", server.url, "--judge-model", "m", "--judge-retries", "0"]
        assert main(["fact-check", "--data", str(rows), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert len(server.requests) == 1
    assert "good" in {row["id"] for row in lines(tmp_path / "out" / f"{name}.jsonl")}


@pytest.mark.parametrize("text", ["", "[]", '{"contradictions": 3}', "}{", '{"x": 1}', "{" * 10**5])
def test_an_unreadable_verdict_is_none(text):
    assert read_verdict(text) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fact-check needs --data and --out"),
        (["--data", "none.jsonl", "--out", "x"], "data file none.jsonl does not exist"),
        (["--min-words", "50", "--max-words", "10"], "--min-words 50 must be 0 to --max-words 10"),
        (["--city-km", "nan"], "--city-km and --coordinate-km must be distances, got nan"),
        (["--data", "none.jsonl", "--out", "x", "--judge-model", "m"], "an endpoint needs --judge-url"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["fact-check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_was_found_before_is_not_replaced_by_another_files(rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["fact-check", "--data", str(rows), "--out", str(out)]) == 0
    before = {path.name: path.read_text() for path in out.iterdir()}
    assert main(["fact-check", "--data", str(out / "again.jsonl"), "--out", str(out)]) == 2
    assert "again.jsonl is in --out" in capsys.readouterr().err
    other = rows.with_name("other.jsonl")
    other.write_text(rows.read_text())
    assert main(["fact-check", "--data", str(other), "--out", str(out)]) == 2
    assert "holds what was found in" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    assert main(["fact-check", "--data", str(rows), "--out", str(out), "--max-words", "2000"]) == 0


def test_a_second_round_keeps_no_reasons_of_the_first(rows, tmp_path):
    assert main(["fact-check", "--data", str(rows), "--out", str(tmp_path / "first")]) == 0
    [row] = lines(tmp_path / "first" / "again.jsonl")
    assert "fact_check" in row and not {"response", "teacher", "usage"} & row.keys()
    good = json.loads(rows.read_text().splitlines()[0])
    row |= {key: value for key, value in good.items() if key != "id"}
    rows.write_text(json.dumps(row) + "\n")
    assert main(["fact-check", "--data", str(rows), "--out", str(tmp_path / "second")]) == 0
    [kept] = lines(tmp_path / "second" / "kept.jsonl")
    assert "fact_check" not in kept


def test_a_judge_is_asked_once(rows, tmp_path):
    with ChatServer(reply=lambda _: '{"contradictions": []}') as server:
        arguments = ["--judge-url", server.url, "--judge-model", "m"]
        for _ in range(2):
            assert main(["fact-check", "--data", str(rows), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert len(server.requests) == 1


def test_images_in_a_table_are_refused_before_anything_is_written(tmp_path, capsys):
    row = {
        "id": "a",
        "prompt": "<image>?",
        "images": [{"bytes": b"P", "path": None}],
        "answer": "A",
        "response": "x",
    }
    write(tmp_path / "a.parquet", [row])
    assert main(["fact-check", "--data", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "row 1: its images are in the table" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_is_one_line(rows, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fact-check", "--data", str(rows), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"geo_r1: {tmp_path / 'file'} cannot be written or read: File exists"


def test_a_row_that_stands_there_twice_is_named(rows, tmp_path, capsys):
    rows.write_text(rows.read_text() * 2)
    assert main(["fact-check", "--data", str(rows), "--out", str(tmp_path / "out")]) == 2
    assert "row 4: the id 'good' stands there twice" in capsys.readouterr().err
