"""From raw imagery to questions: `python -m geo_r1.data pairs`."""

import argparse
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from geo_r1.data import load_image, read_samples
from geo_r1.data.pairing.confusers import KINDS
from geo_r1.data.pairing.pairs import command, configure
from geo_r1.data.pairing.questions import difficulty, prompt
from geo_r1.places import distance_km

HEADER = "id,lat,lon,city,ground,satellite,semi_positives"


def pairs(*arguments):
    parser = argparse.ArgumentParser()
    configure(parser)
    command(parser.parse_args([str(argument) for argument in arguments]))


def manifest(folder, cities, *, images=False, seed=0, spread=0.05, shared=1, semi=False):
    """A table of so many sites a city; `shared` sites in a row have one tile."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [HEADER]
    for number, (city, count) in enumerate(cities.items()):
        for i in range(count):
            if i % shared == 0:
                latitude, longitude = rng.normal((7 * number - 30, -20 * number), spread)
            tile = f"{city}/s{i // shared}.png"
            semis = f"{city}/s{(i // shared + 1) % (count // shared)}.png" if semi else ""
            lines.append(f"{city}-{i},{latitude:.6f},{longitude:.6f},{city},{city}/g{i}.png,{tile},{semis}")
            if images:
                (folder / city).mkdir(exist_ok=True)
                Image.new("RGB", (16, 8), (number * 40, i * 20, 0)).save(folder / city / f"g{i}.png")
                Image.new("RGB", (8, 8), (number * 40, i * 20, 255)).save(folder / tile)
    path = folder / "m.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def questions(out, split):
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def card(out):
    return json.loads((out / "card.json").read_text())


def build(tmp_path, cities=None, *more, **options):
    path = manifest(tmp_path / "raw", cities or {"Oslo": 12, "Rio": 12, "Lima": 12}, **options)
    out = tmp_path / "out"
    pairs("--source", "manifest", "--manifest", path, "--out", out, *more)
    return out


def fails(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_20_000_rows_keep_every_promise(tmp_path, kind):
    cities = {f"city{i}": 2000 for i in range(10)}
    bounds = ["--min-distance", 200, *(["--max-distance", 9000] if kind != "global" else [])]
    out = build(tmp_path, cities, *bounds, "--k-range", 3, 10, "--confusers", kind, shared=2, semi=True)
    rows = [line.split(",") for line in (tmp_path / "raw" / "m.csv").read_text().splitlines()[1:]]
    root = f"{tmp_path}/raw/"
    place = {root + row[5]: (float(row[1]), float(row[2])) for row in rows}
    truth = {row[0]: (root + row[4], root + row[5], root + row[6], row[3]) for row in rows}
    seen, letters, here, there, told = set(), defaultdict(Counter), [], [], []
    cities_of = {}
    for split in ("train", "test"):
        made = questions(out, split)
        cities_of[split] = {row["city"] for row in made}
        for row in made:
            k = row["num_choices"]
            ground, satellite, semi, city = truth[row["id"]]
            answer = "ABCDEFGHIJ".index(row["answer"])
            image, *tiles = row["images"]
            assert (image, tiles[answer], row["city"]) == (ground, satellite, city)
            wrong = tiles[:answer] + tiles[answer + 1 :]
            assert len(wrong) == len(row["confuser_distances_m"]) == k - 1 == len({place[t] for t in wrong})
            assert satellite not in wrong and semi not in wrong and row["prompt"].count("<image>") == k + 1
            if kind != "global":
                assert {tile.split("/")[-2] for tile in wrong} == {city}
            here += [(row["latitude"], row["longitude"])] * (k - 1)
            there += [place[tile] for tile in wrong]
            told += row["confuser_distances_m"]
            seen.add(row["id"])
            letters[split, k][row["answer"]] += 1
            if kind == "global":
                assert {tile.split("/")[-2] for tile in wrong} <= cities_of[split]
    assert len(seen) > 19_000 and cities_of["train"] | cities_of["test"] == cities.keys()
    assert not cities_of["train"] & cities_of["test"] and len(cities_of["test"]) == 2
    assert len(letters) == 16
    for (_, k), counts in letters.items():
        assert len(counts) == k and max(counts.values()) - min(counts.values()) <= 1
    metres = 1000 * distance_km(*np.array(here).T, *np.array(there).T)
    np.testing.assert_allclose(told, metres, atol=0.06)
    assert metres.min() >= 200 and (kind == "global" or metres.max() <= 9000)


def test_a_row_is_a_sample_of_ours(tmp_path):
    out = build(tmp_path, None, "-k", 4, images=True)
    samples = read_samples(out / "train.jsonl")
    assert len(samples) == 24
    sample = samples[0]
    kinds = [part.get("text") for part in sample.messages[0]["content"]]
    assert kinds[:8] == [None, " A ", None, " B ", None, " C ", None, " D "]
    assert kinds[8] is None and kinds[9].startswith("\nThe first picture")
    assert kinds[9].endswith(
        "Think in <think> </think>, then give the letter of the tile in <answer> </answer>."
    )
    columns = "num_choices city latitude longitude confusers confuser_distances_m difficulty"
    assert sample.metadata.keys() == set(columns.split())
    colours = [load_image(image, sample.id).getpixel((0, 0)) for image in sample.images]
    assert len(set(colours)) == 5 and [colour[2] for colour in colours] == [0, 255, 255, 255, 255]
    right = colours[1 + "ABCD".index(sample.answer)]
    assert right[:2] == colours[0][:2]
    assert sample.metadata["difficulty"] == round(difficulty(sample.metadata["confuser_distances_m"]), 4)


def test_difficulty_falls_tenfold_by_tenfold():
    assert [difficulty([d, d]) for d in (0.0, 1.0, 100.0, 10_000.0)] == [1, 0, -2, -4]


def test_the_card_says_what_is_there_and_what_is_not(tmp_path):
    out = build(tmp_path, {"Oslo": 12, "Rio": 12, "Hamlet": 3}, "-k", 5, "--test-cities", "Rio")
    told = card(out)
    assert told["splits"]["train"]["cities"] == {"Oslo": 12} and told["splits"]["test"]["cities"] == {
        "Rio": 12
    }
    assert told["splits"]["train"]["questions"] == 12 and told["splits"]["train"]["k"] == {"5": 12}
    assert sorted(told["splits"]["train"]["answers"].values()) == [2, 2, 2, 3, 3]
    distances = [d for row in questions(out, "test") for d in row["confuser_distances_m"]]
    quantiles = told["splits"]["test"]["confuser_distance_m"]
    assert (quantiles["0%"], quantiles["100%"]) == (min(distances), max(distances))
    assert told["dropped"] == {
        "too few tiles within the bounds": {"count": 3, "first": ["'Hamlet-0'", "'Hamlet-1'", "'Hamlet-2'"]}
    }
    assert told["arguments"]["test_cities"] == ["Rio"] and told["arguments"]["out"] == str(out)
    assert not list(out.glob(".*"))


def test_the_first_questions_of_a_file_are_from_all_its_cities(tmp_path):
    rows = questions(build(tmp_path, {"Oslo": 60, "Rio": 60, "Lima": 60}, "--test-cities", "Lima"), "train")
    assert 5 <= sum(row["city"] == "Oslo" for row in rows[:30]) <= 25


def test_the_seed_alone_decides(tmp_path):
    def made(name, *more):
        path = manifest(tmp_path / "raw", {"Oslo": 40, "Rio": 40, "Lima": 40})
        pairs("--source", "manifest", "--manifest", path, "--out", tmp_path / name, *more)
        return questions(tmp_path / name, "train"), questions(tmp_path / name, "test")

    first, again = made("a"), made("b")
    assert first == again
    other = made("c", "--seed", 1, "--test-cities", first[1][0]["city"])
    assert sorted(row["id"] for row in other[0]) == sorted(row["id"] for row in first[0])
    assert sum(a["images"] != b["images"] for a, b in zip(first[0], other[0], strict=True)) > 70


def test_a_limit_takes_questions_from_everywhere(tmp_path):
    out = build(tmp_path, {f"c{i}": 20 for i in range(5)}, "--limit", 30)
    ids = [row["id"] for row in questions(out, "train")]
    assert len(ids) == len(set(ids)) == 30 and len({name.split("-")[0] for name in ids}) == 4
    assert len(questions(out, "test")) == 20
    counts = Counter(row["answer"] for row in questions(out, "train"))
    assert counts == dict.fromkeys("ABCDE", 6)


def test_paths_are_relative_where_images_lie_below_the_output(tmp_path):
    path = manifest(tmp_path / "raw", {"Oslo": 9, "Rio": 9}, images=True)
    pairs("--source", "manifest", "--manifest", path, "--out", tmp_path)
    assert questions(tmp_path, "train")[0]["images"][0].startswith("raw/")
    [sample, *_] = read_samples(tmp_path / "test.jsonl")
    assert load_image(sample.images[0], "").size == (16, 8)


def test_one_city_cannot_be_split(tmp_path):
    message = (
        "all sites are in one city, 'Oslo', and the splits share no city: give two or more cities, or put"
    )
    fails(message, lambda: build(tmp_path, {"Oslo": 9}))
    out = build(tmp_path, {"Oslo": 9}, "--test-share", 0)
    assert len(questions(out, "train")) == 9 and not (out / "test.jsonl").exists()
    build(tmp_path, {"Oslo": 9}, "--test-share", 1)
    assert len(questions(out, "test")) == 9 and not (out / "train.jsonl").exists()


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.5, 2), (0.999, 3)])
def test_each_split_has_a_city(tmp_path, share, count):
    out = build(tmp_path, dict.fromkeys("abcd", 6), "--test-share", share)
    assert len(card(out)["splits"]["test"]["cities"]) == count


def test_a_tile_that_two_cities_share_stays_with_the_first(tmp_path):
    path = manifest(tmp_path / "raw", {"Oslo": 9, "Rio": 9})
    path.write_text(path.read_text() + "stray,1,1,Rio,Rio/g.png,Oslo/s0.png,\n")
    pairs("--source", "manifest", "--manifest", path, "--out", tmp_path / "out")
    told = card(tmp_path / "out")["dropped"]
    assert told == {
        "the satellite tile is another city's, too": {"count": 1, "first": ["'stray', tile of Oslo"]}
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", 2], "-k 2: a question has 3 to 10 tiles to choose from"),
        (["-k", 11], "-k 11: a question has 3 to 10"),
        (["--k-range", 6, 4], "--k-range 6 4: a question has 3 to 10"),
        (["--min-distance", "nan"], "--min-distance nan must be 0 or more and at most --max-distance inf"),
        (["--min-distance", "inf"], "--min-distance inf must be 0 or more"),
        (["--max-distance", 10], "--min-distance 50.0 must be 0 or more and at most --max-distance 10.0"),
        (["--max-distance", "nan"], "at most --max-distance nan"),
        (["--test-share", 1.5], "--test-share must be 0 to 1, got 1.5"),
        (["--limit", 0], "--limit must be at least 1, got 0"),
        (["--max-pixels", 0], "--max-pixels must be at least 1, got 0"),
        (["--num-workers", -1], "--num-workers must be at least 0, got -1"),
        (["--test-cities", "Bern"], "--test-cities: no sites in 'Bern'; there are Lima, Oslo, Rio"),
        (["--test-cities", "Lima", "Oslo", "Rio"], "--test-cities names every city; leave one for training"),
        (
            ["-k", 10, "--max-distance", 60],
            "no question for train: not one of 24 sites has 9 wrong tiles from 50",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(tmp_path, arguments, message):
    fails(message, lambda: build(tmp_path, None, *arguments))
    assert not list((tmp_path / "out").glob("*.json*"))


def test_all_sites_at_one_spot_make_no_question(tmp_path):
    fails("no question for train", lambda: build(tmp_path, None, "--min-distance", 0, spread=0.0))


# Images


def test_sites_with_bad_images_are_left_out_before_tiles_are_chosen(tmp_path):
    path = manifest(tmp_path / "raw", {"Oslo": 9, "Rio": 9}, images=True)
    (tmp_path / "raw" / "Oslo" / "s3.png").unlink()
    (tmp_path / "raw" / "Rio" / "g4.png").write_text("no image")
    (tmp_path / "raw" / "Rio" / "s5.png").unlink()
    (tmp_path / "raw" / "Rio" / "s5.png").symlink_to("/etc/hostname")
    options = ["--source", "manifest", "--manifest", path, "--out", tmp_path / "out", "--check-images"]
    pairs(*options, "--num-workers", 1)
    rows = questions(tmp_path / "out", "train") + questions(tmp_path / "out", "test")
    assert len(rows) == 15
    used = {image for row in rows for image in row["images"]}
    assert not any(name.endswith(("Oslo/s3.png", "Rio/g4.png", "Rio/s4.png", "Rio/s5.png")) for name in used)
    assert {reason: found["count"] for reason, found in card(tmp_path / "out")["dropped"].items()} == {
        "an image does not exist": 1,
        "an image is in no known image format": 1,
        "an image leads outside the root": 1,
    }


def test_no_good_image_at_all(tmp_path):
    check = ["--check-images", "--num-workers", 0]
    fails("no site has two good images: 36 x an image does not exist", lambda: build(tmp_path, None, *check))


def test_larger_images_are_shrunk_below_the_output(tmp_path):
    out = build(tmp_path, None, "--max-pixels", 64, "--num-workers", 0, images=True)
    ground, *tiles = questions(out, "train")[0]["images"]
    assert ground.startswith("images/") and all(tile.startswith(f"{tmp_path}/raw/") for tile in tiles)
    with Image.open(out / ground) as image:
        assert image.size == (11, 5)


def test_images_are_not_shrunk_over_the_originals(tmp_path):
    path = manifest(tmp_path / "out" / "images", {"Oslo": 9, "Rio": 9}, images=True)
    options = ["--source", "manifest", "--manifest", path, "--num-workers", 0, "--max-pixels", 64]
    fails("which holds Oslo/g0.png; choose another --out", lambda: pairs(*options, "--out", tmp_path / "out"))


def test_a_stitched_question_is_one_image(tmp_path):
    stitch = ["--stitch", "--k-range", 3, 4, "--max-pixels", 250_000, "--num-workers", 0]
    out = build(tmp_path, None, *stitch, images=True)
    for sample in read_samples(out / "test.jsonl"):
        [image] = sample.images
        assert image.parent == out / "stitched" and image.is_file()
        page = np.asarray(load_image(image, sample.id)).astype(int)
        assert page.shape[0] * page.shape[1] <= 250_000
        k = sample.metadata["num_choices"]
        columns, side = (3, page.shape[1] // 3) if k == 3 else (2, page.shape[1] // 2)
        index = "ABCD".index(sample.answer)
        height = (
            page.shape[0]
            - side // 2
            - (1 - index // columns if k == 4 else 0) * ((page.shape[0] - page.shape[1] // 2) // 2)
        )
        right = page[height, side * (index % columns) + side // 2]
        assert abs(right[:2] - page[5, 5][:2]).max() < 8 and right[2] > 245
    assert prompt(4, stitch=True).startswith("<image>\nThe upper part") and "A to D" in prompt(4, stitch=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Paris", "paris"),
        ("S\u00e3o Paulo", "Sa\u0303o Paulo"),
        ("GIESSEN", "Gie\u00dfen"),
        ("New York", "new\u00a0 york"),
        ("\u0130zmir", "i\u0307zmir"),
    ],
)
def test_spellings_of_a_city_are_one_city(tmp_path, first, second):
    """Otherwise one of them may be in the training split and the other in the test split."""
    cities = {first: 8, second: 8, "Oslo": 8}
    out = build(tmp_path, cities, "--test-share", 0.5, "--confusers", "global", "-k", 3)
    found = {split: set(told["cities"]) for split, told in card(out)["splits"].items()}
    assert found["train"] | found["test"] == {first, "Oslo"} and not found["train"] & found["test"]
    out = build(tmp_path, cities, "--test-cities", second, "--confusers", "global", "-k", 3)
    assert set(card(out)["splits"]["test"]["cities"]) == {first}
    assert card(out)["splits"]["test"]["questions"] == 16
