"""Multiple choice: rows of several kinds become questions with letters."""

import argparse
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geo_r1.eval.mcq import BENCHMARK


def questions(path, by=()):
    return BENCHMARK.questions(argparse.Namespace(data=path, images=None, by=[*by]))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_our_own_rows_are_taken_as_they_are(tmp_path):
    row = {"prompt": "<image> A or B?", "images": ["a.png"], "answer": "b", "num_choices": 2}
    [question] = questions(write(tmp_path / "a.jsonl", row))
    assert question.truth == {"answer": "B", "num_choices": 2, "city": "", "by": {}, "left_out": 0}
    assert question.sample.images == (tmp_path / "a.png",)


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["red", "green", "blue"], "C", ("C", 3)),
        ("['red', 'green']", "B", ("B", 2)),  # as MMMU writes a list
        (["red", "green"], 1, ("B", 2)),
        (["red", "green"], "green", ("B", 2)),
        (["B", "A", "C"], "A", ("A", 3)),  # a letter is a letter, whatever the options are called
    ],
)
def test_options_get_letters(tmp_path, options, answer, expected):
    row = {"id": "q", "question": "Which colour?", "options": options, "answer": answer, "subject": "Art"}
    [question] = questions(write(tmp_path / "a.jsonl", row), by=["subject"])
    assert (question.truth["answer"], question.truth["num_choices"]) == expected
    assert question.truth["by"] == {"subject": "Art"}
    [part] = question.sample.messages[0]["content"]
    assert part["text"].startswith("Which colour?\nA. ") and part["text"].count("\nB. ") == 1


def test_numbered_images_stand_where_they_are_marked_and_may_repeat(tmp_path):
    row = {
        "id": "q",
        "question": "<image 2> beside <image 1>",
        "options": ["<image 2>", "none"],
        "answer": "A",
    }
    row |= {"image_1": {"path": "one.png"}, "image_2": {"path": "two.png"}}
    [question] = questions(write(tmp_path / "a.jsonl", row))
    assert [path.name for path in question.sample.images] == ["two.png", "one.png", "two.png"]


def test_images_in_a_parquet_file_come_as_bytes(tmp_path):
    row = {"id": "q", "question": "Which?", "options": ["a", "b"], "answer": "A"}
    row |= {"image": {"bytes": b"P", "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    [question] = questions(tmp_path / "a.parquet")
    assert question.sample.images == (b"P",)
    assert question.sample.messages[0]["content"][0] == {"type": "image"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": ["one"]}, "options must be a list of 2 to 26, got"),
        ({"options": "['a', 'b'"}, "options must be a list of 2 to 26, got"),
        ({"options": "[" * 10_000}, "options must be a list of 2 to 26, got"),
        ({"options": ["1", "2", "3"], "answer": 1}, "the answer 1 is a number from 0, or an option"),
        ({"options": 3}, "options must be a list of 2 to 26, got 3"),
        ({"answer": "Z"}, "the answer must be a letter from A to B, got 'Z'"),
        ({"question": "see <image 3>"}, "the text marks image 3, the row has 0"),
        ({"subject": None}, "--by subject: no row has a value in that column"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(tmp_path, changes, message):
    row = {"id": "q", "question": "Which?", "options": ["a", "b"], "answer": "A", "subject": "Art"} | changes
    with pytest.raises(ValueError, match=message):
        questions(write(tmp_path / "a.jsonl", row), by=["subject"])


def test_open_questions_are_left_out_and_counted(tmp_path):
    rows = [{"id": "a", "question": "?", "options": options, "answer": "3"} for options in ("[]", None)]
    rows.append({"id": "b", "question": "?", "options": ["x", "y"], "answer": "A"})
    [question] = questions(write(tmp_path / "a.jsonl", *rows))
    assert (question.sample.id, question.truth["left_out"]) == ("b", 2)


def test_accuracy_by_column():
    def record(subject, correct):
        known = {"answered": True, "well_formed": True, "length": None, "num_choices": 4, "left_out": 2}
        return known | {"correct": correct, "by": {"s": subject}}

    summary = BENCHMARK.summarise([record("x", True), record("x", False), record("y", True)])
    assert (summary["accuracy"], summary["chance"]) == (2 / 3, 0.25)
    assert {name: row["accuracy"] for name, row in summary["by"].items()} == {"s: x": 0.5, "s: y": 1.0}
