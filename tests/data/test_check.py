"""The command that looks for bad samples: a table of what is wrong, and an exit code."""

import json
import os

import pytest
from data_cases import encoded, make_image, write
from PIL import Image

from geo_r1.data.__main__ import main
from geo_r1.data.check import faults_of
from geo_r1.data.processes import in_processes

WHOLE = {kind: encoded(make_image(64, 48), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")}


def good_rows(folder, count=6):
    rows = []
    for number in range(count):
        make_image(40, 30, number).save(folder / f"{number}.png")
        images = ["0.png", f"{number}.png", {"bytes": None, "path": "0.png"}]
        rows.append({"id": f"r{number}", "prompt": "?", "images": images, "answer": "A"})
    return rows


def spoil(folder):
    """Bad rows by what is wrong with them; the row's number in the file is its place plus one."""
    for kind, data in WHOLE.items():
        (folder / f"cut.{kind}").write_bytes(data[: len(data) * 2 // 3])
    (folder / "text.jpg").write_text("<html>")
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (2010, 10)).save(folder / "wide.png")
    Image.new("I;16", (9, 9)).save(folder / "deep.png")
    return {
        "an image cannot be read": [{"prompt": "?", "images": [f"cut.{kind}"]} for kind in ("JPEG", "PNG")],
        "an image is in no known image format": [{"prompt": "?", "images": ["text.jpg"]}],
        "an image is not a file": [{"prompt": "?", "images": ["pipe.png"]}, {"prompt": "?", "images": ["."]}],
        "an image is too narrow": [{"prompt": "?", "images": ["wide.png"]}],
        "an image has more than 8 bits a channel": [{"prompt": "?", "images": ["deep.png"]}],
        "an image does not exist": [{"prompt": "?", "images": ["gone.png"]}] * 3,
        "an image must be a file": [{"prompt": "?", "images": ["https://a/b.png"]}],
        "the prompt marks N images but the sample has N": [
            {"prompt": "<image>", "images": []},
            {"prompt": "<image><image>", "images": ["0.png"]},
        ],
        "it has 'video', which is not read": [{"prompt": "?", "video": "x"}],
        "no column 'prompt'": [{"text": "?"}],
        "rows N and N share": [{"prompt": "?", "id": "r0"}],
        "broken JSON": ["{"],
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_fault_is_counted_by_kind_and_row(tmp_path, num_workers):
    rows, expected = good_rows(tmp_path), {}
    for kind, bad in spoil(tmp_path).items():
        for row in bad:
            rows.append(row)
            expected.setdefault(kind, []).append(f"{tmp_path}/x.jsonl, row {len(rows)}")
    path = tmp_path / "x.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    num_rows, faults = faults_of(path, None, num_workers)
    assert num_rows == len(rows)
    found = {}
    for fault in faults:
        found.setdefault(fault.kind, []).append(fault.where)
        assert fault.reason.isprintable() and len(fault.reason) < 400
    assert {kind: sorted(where) for kind, where in found.items()} == {
        kind: sorted(where) for kind, where in expected.items()
    }


@pytest.mark.parametrize("kind", WHOLE)
def test_an_image_that_was_cut_anywhere_is_found(tmp_path, kind):
    data = WHOLE[kind]

    def table(content):
        return write(tmp_path / "x.parquet", [{"prompt": "?", "images": [{"bytes": content}]}])

    for share in (0.2, 0.6, 0.95):
        path = table(data[: int(share * len(data))])
        num_rows, [fault] = faults_of(path, None, 0)
        assert (num_rows, fault.where) == (1, f"{path}, row 1")
        assert fault.kind in ("an image cannot be read", "an image is in no known image format")
    assert faults_of(table(data), None, 0) == (1, [])


def test_the_command(tmp_path, capsys):
    rows = good_rows(tmp_path)
    path = write(tmp_path / "x.jsonl", rows)
    assert main(["check", str(path), "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{path}: 6 samples, nothing is wrong\n"
    (tmp_path / "in").mkdir()
    assert main(["check", str(path), "--image-root", str(tmp_path / "in"), "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert err == f"geo_r1: {path}: 6 of 6 samples are bad\n"
    assert "does not exist" in " ".join(out.split()) and "1, 2, 3, ..." in " ".join(out.split())
    write(path, [row | {"images": [f"../{name}" for name in ("0.png", "1.png")]} for row in rows[:2]])
    assert main(["check", str(path), "--image-root", str(tmp_path / "in"), "--workers", "0"]) == 2
    assert capsys.readouterr().out.count("root") >= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.jsonl"], "data file gone.jsonl does not exist"),
        (["{}/x.csv"], "data file {}/x.csv: expected .jsonl, .json or .parquet"),
        (["{}/x.jsonl"], "{}/x.jsonl holds no samples"),
        (["{}/x.jsonl", "--workers", "-1"], "--workers must be at least 0, got -1"),
    ],
)
def test_a_file_that_cannot_be_checked(tmp_path, capsys, arguments, said):
    for name in ("x.csv", "x.jsonl"):
        (tmp_path / name).touch()
    assert main(["check", *(argument.replace("{}", str(tmp_path)) for argument in arguments)]) == 2
    assert capsys.readouterr().err == f"geo_r1: {said}\n".replace("{}", str(tmp_path))


def test_chunks_of_any_size_keep_the_order():
    for chunk in (1, 7, 100):
        assert list(in_processes(abs, range(-50, 50), 0, chunk=chunk)) == [abs(n) for n in range(-50, 50)]
