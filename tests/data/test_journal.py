"""JSON lines: after a kill, with lines that are too long, with records that were written twice."""

import json
from pathlib import Path

import pytest

from geo_r1.data.journal import MAX_LINE, Journal, read_lines
from geo_r1.errors import UserError


def test_records_are_there_at_the_next_start_in_their_order(tmp_path):
    path = tmp_path / "new" / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"id": "b", "text": "\u2028é"})
        journal.append({"id": "a", "n": 1})
        assert list(read_lines(path)) == [(1, {"id": "b", "text": "\u2028é"}), (2, {"id": "a", "n": 1})]
    with Journal(path) as journal:
        assert list(journal.records) == ["b", "a"]
        with pytest.raises(ValueError, match="'a' is there already"):
            journal.append({"id": "a"})


@pytest.mark.parametrize("torn", [b'{"id": "c", "te', b'{"id": "c"}', b"x" * 200_000, b"\xff"])
def test_a_line_that_a_kill_cut_is_dropped_and_written_anew(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b"}\n' + torn)
    with Journal(path) as journal:
        assert list(journal.records) == ["a", "b"]
        journal.append({"id": "c"})
    assert path.read_bytes() == b'{"id": "a"}\n{"id": "b"}\n{"id": "c"}\n'


def test_nothing_but_a_cut_line_is_an_empty_journal(tmp_path):
    (tmp_path / "j.jsonl").write_bytes(b'{"id')
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.records == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a"}\n{broken\n', r"j.jsonl, line 2: broken JSON: Expecting property name"),
        (b"[1]\n", r"j.jsonl, line 1: expected a record with an id"),
        (b'{"id": 3}\n', r"j.jsonl, line 1: expected a record with an id"),
        (b"[" * 10**5 + b"\n", r"j.jsonl, line 1: broken JSON: maximum recursion"),
        (b'{"id": "\xff"}\n', r"j.jsonl, line 1: broken JSON: 'utf-8' codec"),
    ],
)
def test_a_whole_line_that_is_broken_is_an_error(tmp_path, content, message):
    (tmp_path / "j.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Journal(tmp_path / "j.jsonl")


def test_a_line_of_a_hundred_megabytes_is_refused_without_being_read(tmp_path):
    path = tmp_path / "j.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": "a"}\n')
        file.truncate(100 * 2**20)  # a hole that reads as zeros, with no end of line
    lines = read_lines(path)
    assert next(lines) == (1, {"id": "a"})
    with pytest.raises(ValueError, match="line 2: longer than 16 MiB; one record a line is expected"):
        next(lines)


def test_a_record_that_would_be_too_long_is_refused_and_nothing_is_written(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        with pytest.raises(ValueError, match=r"the record 'a' takes \d+ bytes"):
            journal.append({"id": "a", "text": "x" * MAX_LINE})
        assert (tmp_path / "j.jsonl").read_bytes() == b""


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf{}\r\n\n \n[1]")
    assert list(read_lines(tmp_path / "x.jsonl")) == [(1, {}), (4, [1])]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        list(read_lines(tmp_path / "none.jsonl"))


def test_a_full_disk_is_named():
    with (
        pytest.raises(UserError, match=r"^/dev/full cannot be written: No space left on device$"),
        Journal(Path("/dev/full")) as journal,
    ):
        journal.append({"id": "a"})


def test_each_record_is_one_ascii_line(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append({"id": "a", "text": "two\nlines \ud800"})
    [line] = (tmp_path / "j.jsonl").read_text("ascii").splitlines()
    assert json.loads(line)["text"] == "two\nlines \ud800"
