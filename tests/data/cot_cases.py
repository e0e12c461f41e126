"""Helpers for the tests of the command `cot`: a data set, a run of the command, and its files."""

import argparse
import json

from data_cases import lines, write
from PIL import Image

from geo_r1.data.teaching import cot

FAST = ("--concurrency", "4", "--retries", "2", "--timeout", "10")


def make_image(path, colour=(9, 99, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), colour).save(path)
    return path


def dataset(folder, num=12, **columns):
    """Samples s0, s1, ... of one image each, in folder/data/train.jsonl."""
    rows = []
    for i in range(num):
        make_image(folder / "data" / "images" / f"{i}.png")
        row = {"id": f"s{i}", "prompt": f"<image>[s{i}] which tile?", "images": [f"images/{i}.png"]}
        rows.append({**row, "answer": "B", "num_choices": 5, "city": "Lisbon", **columns})
    return write(folder / "data" / "train.jsonl", rows)


def arguments(*given):
    parser = argparse.ArgumentParser()
    cot.configure(parser)
    return parser.parse_args([str(argument) for argument in given])


def run(server, data, out, *more):
    url = server if isinstance(server, str) else server.url
    cot.command(arguments("--data", data, "--out", out, "--url", url, "--model", "teach", *FAST, *more))


def files(out):
    """Ids of whole samples and of failures."""
    assert not [*out.parent.glob("*.partial"), *out.parent.glob(".*.partial")]
    failed = lines(out.with_suffix(".failed.jsonl"))
    return [row["id"] for row in lines(out)], [row["id"] for row in failed]


def card(out):
    return json.loads(out.with_suffix(".card.json").read_text())
