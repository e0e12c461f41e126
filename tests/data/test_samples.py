"""Files of samples: the rows that can be read, and one line for each mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import encoded, ends_with, make_image, write

from geo_r1.data import Sample, load_image, read_samples
from geo_r1.data import rows as rows_module
from geo_r1.data.journal import MAX_LINE

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return ({"role": "user", "content": list(parts)},)


@pytest.fixture(params=["jsonl", "json", "parquet"])
def read(request, tmp_path):
    """Writes rows in one of the formats and reads them back."""
    return lambda rows, **options: read_samples(write(tmp_path / f"data.{request.param}", rows), **options)


# Samples


def test_sample_without_messages():
    ends_with("sample x: the prompt is empty", lambda: Sample("x", ()))


def test_sample_counts_its_markers():
    message = "sample x: the prompt marks 1 images but the sample has 0"
    ends_with(message, lambda: Sample("x", user(IMAGE, text("?"))))
    message = "sample x: the prompt marks 0 images but the sample has 1"
    ends_with(message, lambda: Sample("x", user(text("?")), images=(b"",)))


# Good files


def test_text_with_markers(read):
    (sample,) = read([{"prompt": "a<image> b <image><image>", "images": ["1", "2", "3"]}])
    assert sample.messages == user(text("a"), IMAGE, text(" b "), IMAGE, IMAGE)
    assert sample.response is None and sample.answer is None and sample.metadata == {}


def test_messages_with_markers(read):
    (sample,) = read([{
        "prompt": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "see <image>"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "and <image>?"},
        ],
        "images": ["1", "2"],
    }])  # fmt: skip
    assert sample.messages == (
        {"role": "system", "content": [text("be brief")]},
        *user(text("see "), IMAGE),
        {"role": "assistant", "content": [text("yes")]},
        *user(text("and "), IMAGE, text("?")),
    )


def test_parts_filled_with_nulls(read):
    # A table gives every part of a column the same keys; so does JSON that was exported from one.
    part = {"type": "image", "text": None}
    (sample,) = read([{
        "prompt": [{"role": "user", "name": None, "content": [text("a"), part, text("b")]}],
        "images": ["1"],
    }])  # fmt: skip
    assert sample.messages == user(text("a"), IMAGE, text("b"))


def test_rows_filled_with_nulls(read):
    first, second = read([
        {"prompt": "<image>", "images": ["1"], "answer": None, "response": None, "id": None, "city": None},
        {"prompt": "?", "images": None, "answer": "B", "response": "so", "id": "x", "city": "Oslo"},
    ])  # fmt: skip
    assert (first.answer, first.response, first.metadata) == (None, None, {})
    assert (second.answer, second.response, second.metadata) == ("B", "so", {"city": "Oslo"})
    assert (second.images, second.id) == ((), "x")


def test_no_marker_puts_images_first(read):
    (plain,) = read([{"prompt": "where?", "images": ["1", "2"]}])
    assert plain.messages == user(IMAGE, IMAGE, text("where?"))
    prompt = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    (chat,) = read([{"prompt": prompt, "images": ["1"]}])
    assert chat.messages[0]["content"] == [text("system")]
    assert chat.messages[1]["content"] == [IMAGE, text("user")]
    assert chat.messages[3]["content"] == [text("user")]
    (no_user,) = read([{"prompt": prompt[:1], "images": ["1"]}])
    assert no_user.messages[0]["content"] == [IMAGE, text("system")]


def test_paths_are_relative_to_the_file_or_the_root(read, tmp_path):
    rows = [{"prompt": "<image><image>", "images": ["a/1.png", "/b/2.png"]}]
    assert read(rows)[0].images == (tmp_path / "a/1.png", Path("/b/2.png"))
    assert read(rows, image_root="/root")[0].images == (Path("/root/a/1.png"), Path("/b/2.png"))


def test_image_mappings(tmp_path):
    images = [
        {"path": "1.png", "bytes": None},
        {"path": "2.png", "bytes": b"two"},
        {"path": None, "bytes": b"3"},
    ]
    path = write(tmp_path / "x.parquet", [{"prompt": "?", "images": images}])
    assert read_samples(path)[0].images == (tmp_path / "1.png", b"two", b"3")
    path = write(tmp_path / "x.jsonl", [{"prompt": "?", "images": [{"path": "1.png"}]}])
    assert read_samples(path)[0].images == (tmp_path / "1.png",)


def test_parquet_with_the_image_type_of_datasets(tmp_path):
    # The file says that `images` is datasets.Image(): the bytes must come through, not decoded images.
    data = encoded(make_image(9, 6))
    feature = {"_type": "List", "feature": {"_type": "Image"}}
    features = {"prompt": {"dtype": "string", "_type": "Value"}, "images": feature}
    table = pa.Table.from_pylist([{"prompt": "?", "images": [{"bytes": data, "path": None}]}])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    (sample,) = read_samples(tmp_path / "x.parquet")
    assert sample.images == (data,)
    assert load_image(sample.images[0], "x").tobytes() == make_image(9, 6).tobytes()


def test_further_columns_become_metadata(read):
    place = {"lat": 1.5, "tags": ["a", "b"]}
    (sample,) = read([{"prompt": "?", "num_choices": 7, "place": place, "ok": False, "solution": ""}])
    assert sample.metadata == {"num_choices": 7, "place": place, "ok": False, "solution": ""}


@pytest.mark.parametrize(
    ("given", "kept"), [("B", "B"), (3, "3"), (0, "0"), (2.5, "2.5"), (True, "True"), ("", "")]
)
def test_answers_and_responses_become_text(read, given, kept):
    (sample,) = read([{"prompt": "?", "answer": given, "response": given}])
    assert (sample.answer, sample.response) == (kept, kept)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_types_may_differ_between_rows(tmp_path, suffix):
    rows = [{"prompt": "?", "answer": 1, "x": [1]}, {"prompt": [*user(text("!"))], "answer": "B", "x": "two"}]
    samples = read_samples(write(tmp_path / f"x.{suffix}", rows))
    assert [sample.answer for sample in samples] == ["1", "B"]
    assert [sample.metadata for sample in samples] == [{"x": [1]}, {"x": "two"}]
    assert [sample.messages for sample in samples] == [user(text("?")), user(text("!"))]


def test_ids(read, tmp_path):
    assert [s.id for s in read([{"prompt": "?", "id": 7}, {"prompt": "?", "id": 8}])] == ["7", "8"]
    first, second = read([{"prompt": "?"}, {"prompt": "?"}])
    assert re.fullmatch(rf"{tmp_path}/data\.\w+, row 1", first.id)
    assert second.id == first.id.replace("row 1", "row 2")


def test_lines_as_editors_leave_them(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"prompt": "\u2028é"}\r\n\r\n{"prompt": "b"}'.encode())
    samples = read_samples(str(path))
    assert [sample.id for sample in samples] == [f"{path}, row 1", f"{path}, row 3"]
    assert samples[0].messages == user(text("\u2028é"))


def test_many_rows_keep_their_order(tmp_path):
    path = write(tmp_path / "x.parquet", [{"prompt": str(i)} for i in range(2500)])
    samples = read_samples(path)
    assert [s.messages[0]["content"][0]["text"] for s in samples] == [str(i) for i in range(2500)]
    assert samples[-1].id == f"{path}, row 2500"


# Mistakes


def test_missing_file_and_wrong_suffix(tmp_path):
    ends_with(f"data file {tmp_path}/no.jsonl does not exist", lambda: read_samples(tmp_path / "no.jsonl"))
    ends_with(f"data file {tmp_path} is not a file", lambda: read_samples(tmp_path))
    long = "x" * 300 + ".jsonl"
    ends_with(f"data file {tmp_path}/{long} does not exist", lambda: read_samples(tmp_path / long))
    os.mkfifo(tmp_path / "pipe.jsonl")
    ends_with(f"data file {tmp_path}/pipe.jsonl is not a file", lambda: read_samples(tmp_path / "pipe.jsonl"))
    (tmp_path / "x.csv").write_text("prompt\n?\n")
    message = f"data file {tmp_path}/x.csv: expected .jsonl, .json or .parquet"
    ends_with(message, lambda: read_samples(tmp_path / "x.csv"))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    ends_with(f"{tmp_path}/x.jsonl holds no samples", lambda: read_samples(tmp_path / "x.jsonl"))


def test_no_rows(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "x.parquet")
    write(tmp_path / "x.json", [])
    for name in ("x.parquet", "x.json"):
        ends_with(f"{tmp_path}/{name} holds no samples", lambda name=name: read_samples(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "?"', "Expecting ',' delimiter: line 1 column 15 (char 14)"),
        ("prompt", "Expecting value: line 1 column 1 (char 0)"),
        ("{} {}", "Extra data: line 1 column 4 (char 3)"),
    ],
)
def test_broken_line(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": "?"}}\n{line}\n{{"prompt": "?"}}\n')
    ends_with(f"{path}, line 2: broken JSON: {reason}", lambda: read_samples(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.json", b"[{}\n", "Expecting ',' delimiter: line 2 column 1 (char 4)"),
        ("x.json", b'{"prompt": "?"}', "it is a dict, not a list of samples"),
        ("x.json", b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_broken_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    ends_with(f"data file {tmp_path}/{name} cannot be read: {reason}", lambda: read_samples(tmp_path / name))


def test_lines_that_are_not_utf8_or_too_long_or_too_deep(tmp_path):
    path, good = tmp_path / "x.jsonl", b'{"prompt": "?"}\n'
    for bad, reason in (
        (
            b'{"prompt": "\xff"}',
            "broken JSON: 'utf-8' codec can't decode byte 0xff in position 12: invalid start byte",
        ),
        (
            b"[" * 10**5,
            "broken JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
        ),
        (b" " * (MAX_LINE + 1), "longer than 16 MiB; one record a line is expected"),
    ):
        path.write_bytes(good + bad + b"\n" + good)
        ends_with(f"{path}, line 2: {reason}", lambda: read_samples(path))


def test_a_list_is_limited_in_bytes_and_in_depth(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", [{"prompt": "?"}])
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=f"^data file {path} cannot be read: maximum recursion depth"):
        read_samples(path)
    monkeypatch.setattr(rows_module, "MAX_JSON", 10)
    reason = "it takes more than 0 GiB; .jsonl has no limit"
    ends_with(f"data file {path} cannot be read: {reason}", lambda: read_samples(path))


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_broken_parquet(tmp_path, kept):
    path = write(tmp_path / "x.parquet", [{"prompt": "?"}] * 100)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"^data file {path} cannot be read: .+$") as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)


ROW = {"prompt": "?"}
BAD_CONTENT = "content must be text or a list of parts, got"
BAD_PART = "a content part must be text or image, got"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no column 'prompt'; it has none"),
        ({"prompt": None, "b": 1, "a": 1}, "no column 'prompt'; it has a, b"),
        ([1], "a sample must be a mapping of columns, got list [1]"),
        ({"prompt": "<image>"}, "the prompt marks 1 images but the sample has 0"),
        ({"prompt": "<image>", "images": ["1", "2"]}, "the prompt marks 1 images but the sample has 2"),
        ({"prompt": "<image>", "id": "x"}, "the prompt marks 1 images but the sample has 0"),
        ({"prompt": 5}, "'prompt' must be text or a list of messages, got int 5"),
        ({"prompt": {"a": 1}}, "'prompt' must be text or a list of messages, got dict {'a': 1}"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [], "images": ["1"]}, "the prompt is empty"),
        ({"prompt": ["?"]}, "a message must have role and content, got str '?'"),
        ({"prompt": [{"content": "?"}]}, "a message must have role and content, got dict {'content': '?'}"),
        ({"prompt": [{"role": None}]}, "a message must have role and content, got dict {'role': None}"),
        ({"prompt": [{"role": "user"}]}, f"{BAD_CONTENT} NoneType None"),
        ({"prompt": [{"role": "user", "content": None}]}, f"{BAD_CONTENT} NoneType None"),
        ({"prompt": [{"role": "user", "content": {"a": 1}}]}, f"{BAD_CONTENT} dict {{'a': 1}}"),
        ({"prompt": [*user(None)]}, f"{BAD_PART} NoneType None"),
        ({"prompt": [*user("?")]}, f"{BAD_PART} str '?'"),
        ({"prompt": [*user({"type": "video"})]}, f"{BAD_PART} dict {{'type': 'video'}}"),
        ({"prompt": [*user({"type": "text", "text": None})]},
         f"{BAD_PART} dict {{'type': 'text', 'text': None}}"),
        (ROW | {"images": "1.png"}, "'images' must be a list, got str '1.png'"),
        (ROW | {"images": 3}, "'images' must be a list, got int 3"),
        (ROW | {"images": [None]}, "an image must be a path or {'path', 'bytes'}, got NoneType None"),
        (ROW | {"images": [{"path": None, "bytes": None}]},
         "an image must be a path or {'path', 'bytes'}, got dict {'path': None, 'bytes': None}"),
        (ROW | {"answer": ["A"]}, "'answer' must be text or a number, got list ['A']"),
        (ROW | {"response": {"a": "b"}}, "'response' must be text or a number, got dict {'a': 'b'}"),
        (ROW | {"id": [1]}, "'id' must be text or a number, got list [1]"),
    ],
)  # fmt: skip
def test_bad_row(tmp_path, row, reason):
    path = write(tmp_path / "x.jsonl", [ROW, ROW, row, ROW])
    ends_with(f"{path}, row 3: {reason}", lambda: read_samples(path))


def test_bad_parquet_rows(tmp_path):
    images = [[{"path": "1", "bytes": None}], [{"path": None, "bytes": None}]]
    path = write(tmp_path / "x.parquet", [{"prompt": "?", "images": value} for value in images])
    reason = "an image must be a path or {'path', 'bytes'}, got dict {'path': None, 'bytes': None}"
    ends_with(f"{path}, row 2: {reason}", lambda: read_samples(path))
    path = write(tmp_path / "x.parquet", [{"prompt": "?"}, {"prompt": None}])
    ends_with(f"{path}, row 2: no column 'prompt'; it has none", lambda: read_samples(path))


def test_long_values_are_cut(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW | {"images": "x\n" * 5000}])
    with pytest.raises(ValueError) as caught:
        read_samples(path)
    assert len(str(caught.value)) < len(str(path)) + 150 and "\n" not in str(caught.value)


def test_shared_id(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW | {"id": 1}, ROW, ROW | {"id": "1"}])
    ends_with(f"{path}: rows 1 and 3 share the id '1'", lambda: read_samples(path))


def test_reading_leaves_no_trace(tmp_path):
    """In a process of its own nothing is printed, and nothing lands in the home folder or beside the file."""
    data, home, scratch = (tmp_path / name for name in ("data", "home", "scratch"))
    for folder in (data, home, scratch):
        folder.mkdir()
    write(data / "x.jsonl", [ROW])
    write(data / "x.parquet", [ROW])
    program = (
        "import sys; from geo_r1.data import __main__, read_samples\n"  # with all that the commands import
        "for path in sys.argv[1:]: assert len(read_samples(path)) == 1\n"
        "assert not {'datasets', 'torch'} & sys.modules.keys()\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    command = [sys.executable, "-c", program, str(data / "x.jsonl"), str(data / "x.parquet")]
    root = Path(rows_module.__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path for folder in (home, scratch) for path in folder.rglob("*")] == []
    assert sorted(path.name for path in data.iterdir()) == ["x.jsonl", "x.parquet"]
