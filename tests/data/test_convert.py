"""Files of other trainers: rewritten whole or not at all, and their images are found from the new file."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data_cases import write

from geo_r1.data import read_samples
from geo_r1.data.formats import FORMATS
from geo_r1.data.formats import convert as converting
from geo_r1.data.formats.convert import command, configure, convert_file
from geo_r1.data.journal import MAX_LINE


def run(*arguments):
    parser = argparse.ArgumentParser()
    configure(parser)
    command(parser.parse_args([str(argument) for argument in arguments]))


def rows_of(count):
    return [
        {"id": str(i), "prompt": f"{i}: <image> or <image>?", "images": [f"{i}.png", "pics/ä.png"],
         "response": f"<answer>{i}</answer>", "answer": str(i)} | ({"city": "Oslo"} if i % 3 == 1 else {})
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"vlm-r1"}))
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_there_and_back_is_the_same_file_of_samples(tmp_path, capsys, name, suffix):
    first = write(tmp_path / "in" / "x.jsonl", rows_of(5))
    run("--to", name, "--in", first, "--out", tmp_path / "out" / f"y.{suffix}")
    run("--to", "geo_r1", "--in", tmp_path / "out" / f"y.{suffix}", "--out", tmp_path / "in" / "z.jsonl")
    assert read_samples(tmp_path / "in" / "z.jsonl") == read_samples(first)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"5 rows of geo_r1, as the first one looks, written as {name}: {tmp_path}/out/y.{suffix}",
        f"5 rows of {name}, as the first one looks, written as geo_r1: {tmp_path}/in/z.jsonl",
    ]
    assert json.loads((tmp_path / "in" / "z.jsonl").read_text().splitlines()[0])["images"][0] == "0.png"


def test_columns_that_come_late_are_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "BATCH", 2)
    rows = [row | {"n": 1.5 if i == 6 else i} for i, row in enumerate(rows_of(7))]
    rows += [{"prompt": "?", "id": "text", "place": {"a": None, "b": [1]}}]
    path = write(tmp_path / "x.jsonl", rows)
    assert convert_file(path, tmp_path / "x.parquet", source="geo_r1", target="geo_r1") == 8
    expected = read_samples(path)
    place = expected[-1].metadata | {"place": {"a": None, "b": [1]}}
    assert read_samples(tmp_path / "x.parquet") == [*expected[:-1], replace(expected[-1], metadata=place)]


def test_images_in_a_table_stay_in_it(tmp_path):
    rows = [{"problem": "<image>", "answer": "B", "images": [{"bytes": b"x", "path": "a.png"}]}]
    path = write(tmp_path / "x.parquet", rows)
    convert_file(path, tmp_path / "y.parquet", source="easyr1", target="trl")
    assert pq.read_table(tmp_path / "y.parquet").to_pylist()[0]["images"] == rows[0]["images"]
    message = f"^{path}, row 1: not to be written as JSON: Object of type bytes is not JSON serializable$"
    with pytest.raises(ValueError, match=message):
        convert_file(path, tmp_path / "y.jsonl", source="easyr1", target="trl")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.parquet", "y.parquet"]


def test_paths_are_right_from_the_new_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    given = ["a.png", "../out/sub/b.png", str(tmp_path / "out" / "c.png"), "link/../d.png", "./out.png"]
    row = {"prompt": "?", "images": [*given, {"path": "e.png", "bytes": None}]}
    write(tmp_path / "in" / "x.jsonl", [row])
    monkeypatch.chdir(tmp_path)

    def images(**options):
        convert_file(Path("in/x.jsonl"), Path("out/y.jsonl"), source="geo_r1", target="trl", **options)
        return json.loads((tmp_path / "out" / "y.jsonl").read_text())["images"]

    home = str(tmp_path)
    there = [f"{home}/elsewhere/d.png"]  # `..` is the parent of where the link leads
    assert images() == [
        f"{home}/in/a.png",
        "sub/b.png",
        "c.png",
        *there,
        f"{home}/in/out.png",
        f"{home}/in/e.png",
    ]
    assert images(image_root=Path("out")) == ["a.png", "sub/b.png", "c.png", "d.png", "out.png", "e.png"]


@pytest.mark.parametrize("image", ["https://example.org/a.png", "data:image/png;base64,AAAA"])
def test_images_by_address_are_refused(tmp_path, image):
    path = write(tmp_path / "x.jsonl", [{"prompt": "?", "images": [image]}])
    with pytest.raises(ValueError, match=f"^{path}, row 1: image '.+' is no path; save it as a file$"):
        convert_file(path, tmp_path / "y.jsonl", source="geo_r1", target="trl")


def test_llama_factory_is_told_of_its_files(tmp_path):
    path, info = write(tmp_path / "x.jsonl", rows_of(2)), tmp_path / "out" / "dataset_info.json"
    convert_file(path, tmp_path / "out" / "one.jsonl", source="geo_r1", target="sharegpt")
    info.write_text(json.dumps(json.loads(info.read_text()) | {"theirs": {"file_name": "ü"}}))
    convert_file(path, tmp_path / "out" / "two.json", source="geo_r1", target="llama-factory")
    assert json.loads(info.read_text()) == {
        "one": {
            "file_name": "one.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "images": "images"},
        },
        "theirs": {"file_name": "ü"},
        "two": {
            "file_name": "two.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
    }
    for content, reason in (
        ("[", "cannot be read: Expecting value"),
        ("[]", "is a list, not a table of data"),
    ):
        info.write_text(content)
        with pytest.raises(ValueError, match=f"^{info} {reason}"):
            convert_file(path, tmp_path / "out" / "three.jsonl", source="geo_r1", target="sharegpt")
    with pytest.raises(ValueError, match=f"^{info}: LLaMA-Factory lists its data sets there"):
        convert_file(path, info, source="geo_r1", target="sharegpt")
    assert sorted(file.name for file in info.parent.iterdir()) == [
        "dataset_info.json",
        "one.jsonl",
        "two.json",
    ]


TABLE = "row 1 and the 2 after it: a table wants one type a column: "


@pytest.mark.parametrize(
    ("line", "suffix", "reason"),
    [
        (b'{"prompt": 3}', "jsonl", "row 2: 'prompt' must be text or a list of "),
        (b'{"prompt": "<image>", "images": ["a", "b"], "id": 3}', "jsonl",
         "row 2: the prompt marks 1 images but the sample has 2"),
        (b'{"prompt": "?", "images": ["a\\u0000/../b"]}', "json", "row 2: embedded null byte"),
        (b'{"prompt": "?", "images": [3]}', "json", "row 2: a sample without id: an image must be a path"),
        (b'{"prompt": "?", "x": [NaN]}', "jsonl", "row 2: not to be written as JSON: Out of range float"),
        (b'{"prompt": "?", "x": "\\ud800"}', "json", "row 2: not to be written as JSON: 'utf-8' codec can't"),
        (b'{"prompt": "?", "x": "\\ud800"}', "parquet", TABLE),
        (b'{"prompt": "\\ud800"}', "json", "row 2: a sample without id: its text is not Unicode: "),
        (b'{"prompt": "?", "x": "one"}', "parquet", TABLE),
        (b'{"prompt": "?", "x": 99999999999999999999}', "parquet", TABLE),
        (b'{"prompt": "?", "y": {}}', "parquet", TABLE),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "jsonl", "line 2: broken JSON: maximum recurs"),
        (b'{"prompt": "\xff"}', "jsonl", "line 2: broken JSON: 'utf-8' codec can't decode"),
        (b'{"prompt": "' + b"x" * MAX_LINE, "jsonl", "line 2: longer than 16 MiB; one record a line"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_what_was_there_stays(tmp_path, line, suffix, reason):
    path, good = tmp_path / "x.jsonl", b'{"prompt": "?", "x": 1}\n'
    path.write_bytes(good + line + b"\n" + good)
    out = tmp_path / f"y.{suffix}"
    out.write_text("before")
    with pytest.raises(ValueError) as caught:
        convert_file(path, out, source="geo_r1", target="geo_r1")
    assert str(caught.value).startswith(f"{path}, {reason}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))
    assert out.read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.jsonl", out.name]


def test_a_list_may_nest_as_deep_as_it_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    for depth in range(700, 1000, 10):
        path.write_text('{"prompt": "?", "x": ' + "[" * depth + "]" * depth + "}\n")
        try:
            assert convert_file(path, tmp_path / "y.jsonl", source="geo_r1", target="trl") == 1
        except ValueError as error:
            assert "recursion" in str(error) or "nested" in str(error)


def test_a_row_that_grows_past_the_limit_of_a_line(tmp_path):
    path = write(tmp_path / "x.json", [{"prompt": "x" * MAX_LINE}])
    with pytest.raises(ValueError, match=f"^{path}, row 1: it takes [0-9]+ bytes as JSON, more than 16 MiB$"):
        convert_file(path, tmp_path / "y.jsonl", source="geo_r1", target="trl")


def test_mistakes_of_the_command(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}],
    )
    with pytest.raises(
        ValueError, match=f"^{path}, row 1: of no format, or of several; say --from with one of geo"
    ):
        run("--to", "trl", "--in", path, "--out", tmp_path / "y.jsonl")
    run("--from", "vlm-r1", "--to", "trl", "--in", path, "--out", tmp_path / "y.jsonl")
    with pytest.raises(ValueError, match=r"y.csv: expected .jsonl, .json, .parquet$"):
        run("--from", "vlm-r1", "--to", "trl", "--in", path, "--out", tmp_path / "y.csv")
    with pytest.raises(ValueError, match=r"^data file none.jsonl does not exist$"):
        run("--to", "trl", "--in", "none.jsonl", "--out", tmp_path / "y.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl/y.jsonl cannot be written: "):
        run("--from", "vlm-r1", "--to", "trl", "--in", path, "--out", path / "y.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"folder.jsonl cannot be written: Is a directory$"):
        run("--from", "vlm-r1", "--to", "trl", "--in", path, "--out", tmp_path / "folder.jsonl")
    path.write_text("\n")
    for source in ("auto", "trl"):
        with pytest.raises(ValueError, match=f"^{path} holds no samples$"):
            run("--from", source, "--to", "trl", "--in", path, "--out", tmp_path / "z.jsonl")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.jsonl", "x.jsonl", "y.jsonl"]
    with pytest.raises(SystemExit):
        run("--to", "nothing", "--in", path, "--out", path)


def test_a_file_may_be_rewritten_in_place(tmp_path):
    path = write(tmp_path / "x.jsonl", rows_of(3))
    before = read_samples(path)
    run("--to", "ms-swift", "--in", path, "--out", path)
    run("--to", "geo_r1", "--in", path, "--out", path)
    assert read_samples(path) == before


def test_flatten_from_the_command_line(tmp_path):
    path, out = write(tmp_path / "x.jsonl", rows_of(1)), tmp_path / "y.jsonl"
    with pytest.raises(
        ValueError, match=f"^{path}, row 1: sample 0: images stand within its text, and vlm-r1 "
    ):
        run("--to", "vlm-r1", "--in", path, "--out", out)
    run("--to", "vlm-r1", "--in", path, "--out", out, "--flatten")
    assert json.loads(out.read_text())["conversations"][0]["value"] == "<image><image>0: image 1 or image 2?"
