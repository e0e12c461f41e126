"""Images checked, shrunk and stitched."""

import os

import numpy as np
import pytest
from PIL import Image

from geo_r1.data import decoding
from geo_r1.data.decoding import shrink
from geo_r1.data.pairing.images import Check, Images, Stitch, stitched
from geo_r1.data.processes import in_processes

COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "gray", "navy", "maroon", "olive"]


def save(path, size=(8, 6), colour="red", mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def check(root, **options):
    return Check(root, root / "out" / "images", **options)


def test_a_good_image_stays_where_it_is(tmp_path):
    path = save(tmp_path / "a" / "b.png")
    assert check(tmp_path)("a/b.png") == (str(path), None)
    assert check(tmp_path, max_pixels=48)("a/b.png") == (str(path), None)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    root = tmp_path / "root"
    save(root / "cut.png", (30, 30), "red")
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:60])
    (root / "text.jpg").write_text("not an image")
    save(root / "deep.png", mode="I;16", colour=1000)
    save(root / "warned.png", (40, 30))
    save(root / "bomb.png", (80, 80))
    save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    (root / "inside.png").symlink_to("cut.png")
    os.mkfifo(root / "pipe.png")
    faults = {
        "cut.png": "an image cannot be read",
        "text.jpg": "an image is in no known image format",
        "deep.png": "an image has more than 8 bits a channel",
        "warned.png": "an image has too many pixels",
        "bomb.png": "an image has too many pixels",
        "link.png": "an image leads outside the root",
        "up/outside.png": "an image leads outside the root",
        "loop.png": "an image cannot be read",
        "inside.png": "an image cannot be read",
        "pipe.png": "an image is not a file",
        "gone.png": "an image does not exist",
        "x" * 300: "an image cannot be read",
    }
    assert {path: check(root)(path)[1] for path in faults} == faults


def test_a_root_behind_a_link_is_a_root(tmp_path):
    save(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to("real")
    assert check(tmp_path / "link")("a.png") == (str(tmp_path / "link" / "a.png"), None)


@pytest.mark.parametrize(
    ("name", "shrunk", "kind"),
    [("a.png", "a.png", "PNG"), ("b/a.JPG", "b/a.JPG", "JPEG"), ("a.bmp", "a.bmp.png", "PNG")],
)
def test_a_larger_image_is_written_shrunk(tmp_path, name, shrunk, kind):
    save(tmp_path / name, (40, 20))
    where, fault = check(tmp_path, max_pixels=200)(name)
    assert (where, fault) == (str(tmp_path / "out" / "images" / shrunk), None)
    with Image.open(where) as image:
        assert (image.size, image.format) == ((20, 10), kind)
        assert image.getpixel((5, 5))[0] > 250
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [shrunk.split("/")[-1]]


@pytest.mark.parametrize(
    ("size", "most"), [((7, 5), 34), ((1, 90), 4), ((90, 1), 4), ((3, 3), 1), ((99, 2), 50)]
)
def test_a_shrunk_image_keeps_to_its_limit(size, most):
    image = shrink(Image.new("RGB", size), most)
    assert 0 < image.width * image.height <= most
    assert (image.width >= image.height) == (size[0] >= size[1])


def test_an_image_that_cannot_be_written(tmp_path):
    save(tmp_path / "a.png", (40, 20))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"out/images/a.png cannot be written: Not a directory"):
        check(tmp_path, max_pixels=200)("a.png")


def test_paths_stand_for_files(tmp_path):
    known = Images(tmp_path)
    known.move("a", f"{tmp_path}/a")
    known.move("b", "/elsewhere/b")
    assert [known[path] for path in "abc"] == [f"{tmp_path}/a", "/elsewhere/b", f"{tmp_path}/c"]
    assert Images(tmp_path.__class__("/"))["a"] == "/a"


# Stitching


@pytest.mark.parametrize("k", [3, 4, 5, 10])
def test_a_stitched_image_has_the_ground_above_and_all_tiles_in_order(k):
    tiles = [Image.new("RGB", (20, 20), colour) for colour in COLOURS[:k]]
    page = stitched(Image.new("RGB", (60, 20), "orange"), *tiles, max_pixels=300_000)
    assert page.width * page.height <= 300_000 and page.width == 448
    pixels = np.asarray(page)
    assert pixels[10, page.width // 2].tolist() == [255, 165, 0]
    found = []  # colours row by row, each where it is first
    rows = pixels[page.width // 3 :]
    for row in rows[:: page.width // 40]:
        for pixel in row[::4].tolist():
            if max(pixel) - min(pixel) > 100 or pixel == [128] * 3:
                found.append(tuple(pixel))
    assert list(dict.fromkeys(found)) == [tile.getpixel((0, 0)) for tile in tiles]


def test_labels_are_drawn_above_their_tiles():
    tiles = [Image.new("RGB", (20, 20), "red")] * 3
    page = np.asarray(stitched(Image.new("RGB", (60, 20), "red"), *tiles, max_pixels=10**6))
    top, side = 448 // 3, 448 // 3
    band = page[top : page.shape[0] - side].min(axis=2)
    letters = [band[:, i * side : (i + 1) * side] for i in range(3)]
    assert all((letter < 64).any() and (letter > 192).mean() > 0.5 for letter in letters)
    dark = [np.flatnonzero((letter < 128).any(axis=1)) for letter in letters]
    assert all(len(rows) >= 10 for rows in dark)  # pixels tall
    assert not np.array_equal(letters[0], letters[1]) and not np.array_equal(letters[1], letters[2])


def test_narrow_and_tall_images_are_fitted():
    tiles = [Image.new("RGB", size, "blue") for size in ((1, 500), (500, 1), (1, 1))]
    page = stitched(Image.new("RGB", (2, 900), "red"), *tiles, max_pixels=300_000)
    assert page.width * page.height <= 300_000


def test_too_few_pixels_for_labels():
    tiles = [Image.new("RGB", (20, 20))] * 10
    with pytest.raises(ValueError, match="10 labelled tiles needs more than 10000 pixels"):
        stitched(Image.new("RGB", (20, 20)), *tiles, max_pixels=10_000)


def test_a_stitched_file_is_named_after_what_it_shows(tmp_path):
    paths = [str(save(tmp_path / f"{colour}.png", colour=colour)) for colour in COLOURS[:4]]
    stitch = Stitch(tmp_path / "out")
    first, again, other = stitch(paths), stitch(paths), stitch([paths[0], *paths[:0:-1]])
    assert first == again != other and len(list((tmp_path / "out").iterdir())) == 2
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        stitch([*paths, str(tmp_path / "gone.png")])


# Processes


def _double(number):
    if number == 99:
        raise ValueError("not 99")
    if number == 98:
        os._exit(9)
    return 2 * number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_order(num_workers):
    done = []
    assert list(in_processes(_double, range(90), num_workers, done.append)) == list(range(0, 180, 2))
    assert sum(done) == 90
    assert list(in_processes(_double, [], num_workers)) == []


def test_what_goes_wrong_in_a_process_is_told():
    with pytest.raises(ValueError, match="not 99"):
        list(in_processes(_double, [99], 1))
    with pytest.raises(ValueError, match=r"ended unexpectedly .*: lower --num-workers"):
        list(in_processes(_double, [98], 1))


def test_processes_check_images(tmp_path):
    save(tmp_path / "a.png")
    results = list(in_processes(check(tmp_path), ["a.png", "b.png"], 1))
    assert [fault for _, fault in results] == [None, "an image does not exist"]
