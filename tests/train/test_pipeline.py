"""From raw imagery to a figure: pairs, chains of thought, fact check, fine-tuning, GRPO, evaluation."""

import json

import pytest
from chat_server import ChatServer
from PIL import Image
from small_runs import train

from geo_r1.data.__main__ import main as data
from geo_r1.eval.__main__ import main as evaluate

CITIES = {"tokyo": (35.68, 139.76), "paris": (48.86, 2.35), "sydney": (-33.87, 151.2)}
NUM_SITES = 5  # a city
PROMPT = "[{answer}] Known: {metadata}"


def make_image(path, red, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red % 256, 90, 160)).save(path)


def sites():
    """City, number, latitude and longitude of sites a kilometre apart."""
    for city, (latitude, longitude) in CITIES.items():
        for i in range(NUM_SITES):
            yield city, i, latitude + 0.01 * i, longitude


def cv_cities(root):
    lines = dict.fromkeys(CITIES, "")
    for city, i, latitude, longitude in sites():
        ground, above = f"{city}/pano_images/{i:04d}.jpg", f"{city}/sat_images/{i:04d}.jpg"
        make_image(root / ground, 40 * i, (56, 28))
        make_image(root / above, 40 * i, (56, 56))
        lines[city] += f"{city}_{i:04d},{longitude},{latitude},{city},{above},{ground}\n"
    for city, text in lines.items():
        (root / city / "img_info.csv").write_text(text)
    return ["--source", "cv-cities", "--root", root, "--test-cities", "sydney"]


def vigor(root):
    lists = dict.fromkeys(CITIES, "")
    for city, i, latitude, longitude in sites():
        ground = f"pano{i}-_,{latitude:.6f},{longitude:.6f},.jpg"
        tiles = [f"satellite_{latitude + d:.7f}_{longitude}.png" for d in (0.00002, 0.0003, -0.0003, 0.0005)]
        make_image(root / city / "panorama" / ground, 40 * i, (56, 28))
        for tile in tiles:
            make_image(root / city / "satellite" / tile, 40 * i, (56, 56))
        lists[city] += " ".join([ground, *(f"{tile} 3.0 -4.0" for tile in tiles)]) + "\n"
    for city, text in lists.items():
        (root / "splits" / city).mkdir(parents=True)
        (root / "splits" / city / "same_area_balanced_train.txt").write_text(text)
    return ["--source", "vigor", "--root", root, "--test-cities", "sydney"]


def cvusa(root):
    split, places = "", ""
    for number, (_, i, latitude, longitude) in enumerate(sites(), 1):
        above, ground = f"bingmap/19/{number:07d}.jpg", f"streetview/panos/{number:07d}.jpg"
        make_image(root / ground, 40 * i, (56, 28))
        make_image(root / above, 40 * i, (56, 56))
        split += f"{above},{ground},streetview/annotations/{number:07d}.png\n"
        places += f"{latitude},{longitude},{latitude},{longitude},0\n"
    for name, text in (("splits/train-19zl.csv", split), ("split_locations/all.csv", places)):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    return ["--source", "cvusa", "--root", root, "--test-share", "0.34"]


def manifest(root):
    lines = "id,lat,lon,city,ground,satellite\n"
    for city, i, latitude, longitude in sites():
        make_image(root / f"{city}{i}g.png", 40 * i, (56, 28))
        make_image(root / f"{city}{i}s.png", 40 * i, (56, 56))
        lines += f"{city}-{i},{latitude},{longitude},{city},{city}{i}g.png,{city}{i}s.png\n"
    (root / "sites.csv").write_text(lines)
    return ["--source", "manifest", "--manifest", root / "sites.csv", "--test-cities", "sydney"]


def thought(letter):
    """What the teacher says; of one letter it has the hemisphere of nowhere."""
    where = "It lies at 10.5, 10.5." if letter == "A" else "English signs and clean streets."
    return (
        "<think>\nVisual cues: A street with trees and cars, seen under a clear sky at noon.\n"
        f"Knowledge association: {where}\nEvidence corroboration: The roofs agree with one tile alone.\n"
        f"Conclusion: Tile {letter}.\n</think>\n<answer>{letter}</answer>"
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", [cv_cities, vigor, cvusa, manifest])
def test_raw_imagery_becomes_a_trained_model_and_a_table(layout, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "prompt.txt").write_text(PROMPT)

    def run(command, *arguments):
        assert command([str(argument) for argument in arguments]) == 0

    pairs = tmp_path / "pairs"
    run(data, "pairs", *layout(tmp_path / "raw"), "--out", pairs, "-k", 3, "--check-images")
    train_rows, test_rows = read(pairs / "train.jsonl"), read(pairs / "test.jsonl")
    assert (len(train_rows), len(test_rows)) == (2 * NUM_SITES, NUM_SITES)
    assert not {row["city"] for row in train_rows} & {row["city"] for row in test_rows}

    with ChatServer(reply=thought) as server:
        asked = ["--data", pairs / "train.jsonl", "--url", server.url, "--model", "m"]
        run(data, "cot", *asked, "--prompt", tmp_path / "prompt.txt", "--out", tmp_path / "cot.jsonl")
    assert len(read(tmp_path / "cot.jsonl")) == len(server.requests) == 2 * NUM_SITES

    checked = tmp_path / "checked"
    run(data, "fact-check", "--data", tmp_path / "cot.jsonl", "--out", checked)
    kept, rejected = read(checked / "kept.jsonl"), read(checked / "rejected.jsonl")
    assert {row["answer"] for row in rejected} == {"A"} and {row["answer"] for row in kept} == {"B", "C"}
    assert {finding["kind"] for row in rejected for finding in row["fact_check"]} == {"coordinates"}
    assert len(kept) + len(rejected) == 2 * NUM_SITES

    run_dir = train(
        tmp_path / "run",
        *("sft", "grpo", "eval"),
        sft__data=checked / "kept.jsonl",
        sft__steps=2,
        grpo__data=pairs / "train.jsonl",
        grpo__steps=2,
        eval__data=pairs / "test.jsonl",
    )
    model = run_dir / "models" / "grpo"
    asked = ["--data", pairs / "test.jsonl", "--model", model, "--max-new-tokens", 8]
    run(evaluate, "cross-view", *asked, "--out", tmp_path / "eval")
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    within = json.loads((run_dir / "summary.json").read_text())["grpo"]
    assert (summary["num_samples"], summary["chance"]) == (NUM_SITES, pytest.approx(1 / 3))
    assert {key: summary[key] for key in ("accuracy", "completion_length", "well_formed")} == {
        key: within[key] for key in ("accuracy", "completion_length", "well_formed")
    }
    assert set(summary["by_confusers"]) == {"same_city"}
    assert (tmp_path / "eval" / "map.png").stat().st_size > 10_000
