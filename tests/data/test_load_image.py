"""Images of samples: upright RGB whatever they were, and one line for each mistake."""

import io
import os
import pickle
import random
import socket
import zlib

import numpy as np
import pytest
from data_cases import encoded, ends_with, make_image
from PIL import Image, ImageFile

from geo_r1.data import decoding, load_image
from geo_r1.data.decoding import ImageError, check_image, read_image

UNKNOWN = "is in no known image format: AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP are read"


def test_image_from_file_bytes_and_memory(tmp_path):
    whole = make_image(9, 6)
    whole.save(tmp_path / "x.png")
    for source in (tmp_path / "x.png", encoded(whole), whole):
        image = load_image(source, "x")
        assert (image.mode, image.size, image.tobytes()) == ("RGB", (9, 6), whole.tobytes())


def test_greyscale_and_palette():
    grey = make_image(9, 6).convert("L")
    assert load_image(encoded(grey), "x").tobytes() == grey.convert("RGB").tobytes()
    palette = make_image(9, 6).quantize(8)
    assert load_image(encoded(palette), "x").tobytes() == palette.convert("RGB").tobytes()
    bilevel = make_image(9, 6).convert("1")
    assert load_image(encoded(bilevel), "x").tobytes() == bilevel.convert("RGB").tobytes()


def test_what_is_transparent_turns_white():
    whole = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    whole.putpixel((1, 0), (0, 0, 0, 0))
    whole.putpixel((2, 0), (0, 0, 0, 128))
    for source in (encoded(whole), whole):
        pixels = np.asarray(load_image(source, "x"))[0].tolist()
        assert pixels == [[200, 0, 0], [255, 255, 255], [127, 127, 127]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):  # one index, or an alpha for each: both are in use
        data = encoded(palette, transparency=transparency)
        assert np.asarray(load_image(data, "x"))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(orientation):
    # How a camera stores an image, by EXIF orientation: what undoes it.
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    whole, exif = make_image(9, 6), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(whole if stored is None else whole.transpose(stored), exif=exif)
    image = load_image(data, "x")
    assert image.size == (9, 6) and image.tobytes() == whole.tobytes()


def test_images_in_memory_are_left_alone():
    whole, exif = make_image(9, 6), Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encoded(whole, exif=exif))) as opened:
        opened.load()
        assert load_image(opened, "x").size == (6, 9)
        assert opened.size == (9, 6) and opened.getexif()[0x0112] == 6


def test_missing_image(tmp_path):
    message = f"sample x: image {tmp_path}/no.png does not exist"
    ends_with(message, lambda: load_image(tmp_path / "no.png", "x"))


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path, data):
    ends_with(f"sample x: image of {len(data)} bytes {UNKNOWN}", lambda: load_image(data, "x"))
    (tmp_path / "x.jpg").write_bytes(data)
    message = f"sample x: image {tmp_path}/x.jpg {UNKNOWN}"
    ends_with(message, lambda: load_image(tmp_path / "x.jpg", "x"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_image(tmp_path, kind):
    data = encoded(make_image(64, 64), kind)
    (tmp_path / "x").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=f"^sample x: image {tmp_path}/x (cannot be read: .+|{UNKNOWN})$"):
        load_image(tmp_path / "x", "x")


def test_sixteen_bits_are_not_clipped():
    deep = Image.fromarray((np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4))
    data = encoded(deep)
    reason = "has more than 8 bits a channel: mode I;16; convert it to 8"
    ends_with(f"sample x: image of {len(data)} bytes {reason}", lambda: load_image(data, "x"))
    ends_with(f"sample x: image in memory {reason}", lambda: load_image(deep, "x"))


def bomb(width, height):
    """A small PNG whose header says that it is large."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    data = b"IDAT" + zlib.compress(bytes(9))
    tail = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + tail


@pytest.mark.parametrize("size", [(13_000, 13_000), (9_460, 9_460), (30_000, 30_000)])
def test_an_image_with_too_many_pixels_is_refused_by_its_header(tmp_path, size):
    data = bomb(*size)
    (tmp_path / "x.png").write_bytes(data)
    reason = "has too many pixels: over 89,478,485; shrink it"
    for source, name in ((data, f"of {len(data)} bytes"), (tmp_path / "x.png", f"{tmp_path}/x.png")):
        for look in (load_image, check_image):
            ends_with(f"sample x: image {name} {reason}", lambda look=look, s=source: look(s, "x"))


def test_pixels_up_to_the_limit(monkeypatch):
    data = encoded(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)
    assert load_image(data, "x").size == (100, 100)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 9_999)
    with pytest.raises(ImageError, match="has too many pixels"):
        load_image(data, "x")


@pytest.mark.parametrize("size", [(2010, 10), (10, 2010)])
def test_a_model_cannot_be_shown_a_narrow_image(size):
    data = encoded(Image.new("RGB", size))
    reason = f"is too narrow: {size[0]} x {size[1]}; a side may be 200 times the other"
    ends_with(f"sample x: image of {len(data)} bytes {reason}", lambda: check_image(data, "x"))
    check_image(encoded(Image.new("RGB", (2000, 10))), "x")
    assert load_image(data, "x").size == size  # `pairs` may stitch it


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    """A pipe without a writer would wait for ever, and /dev/zero would fill the memory."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 2**29 + 1)
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind("plug.png")
        for name, reason in (
            ("pipe.png", "is not a file: a named pipe"),
            ("folder.png", "is not a file: a folder"),
            ("zero.png", "is not a file: a device"),
            ("plug.png", "cannot be read: No such device or address"),
            ("loop.png", "cannot be read: Too many levels of symbolic links"),
            ("sparse.png", "is too large: 536,870,913 bytes; at most 536,870,912"),
            ("a\0b", "cannot be read: embedded null byte"),
            ("x" * 10**6, "cannot be read: File name too long"),
        ):
            for look in (load_image, read_image, check_image):
                with pytest.raises(ImageError) as caught:
                    look(tmp_path / name, "x")
                message = str(caught.value)
                assert message.endswith(f" {reason}") and len(message) < 500 and message.isprintable()


def test_files_stay_inside_their_root(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    for folder in (tmp_path, root, root / "in", tmp_path / "root2"):
        make_image(9, 6).save(folder / "x.png")
    (root / "out.png").symlink_to("../x.png")
    (root / "up").symlink_to("..")
    (root / "stays.png").symlink_to("in/x.png")
    (tmp_path / "link").symlink_to("root")
    inside = ("x.png", "in/x.png", "in/../x.png", "stays.png", f"{root}/x.png", f"{tmp_path}/link/x.png")
    outside = ("../x.png", f"{tmp_path}/x.png", "out.png", "up/x.png", "../root2/x.png", "/etc/passwd", "..")
    for base in (root, tmp_path / "link"):
        for name in inside:
            assert load_image(base / name, "x", root=base).size == (9, 6)
            check_image(base / name, "x", base)
        for name in outside:
            for look in (load_image, read_image, check_image):
                with pytest.raises(ImageError, match=r"leads outside the root: only files in .* are read$"):
                    look(base / name, "x", root=base)


@pytest.mark.parametrize(
    "kind", ["AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "TIFF", "WEBP"]
)
def test_a_damaged_image_is_one_line(kind):
    """Pillow's decoders raise whatever damage leads them to."""
    rng, whole, seen = random.Random(kind), encoded(make_image(40, 30), kind), set()
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.5 else data)
        try:
            load_image(data, "x")
        except ImageError as error:
            message = str(error)
            assert message.startswith("sample x: image of ") and message.isprintable() and len(message) < 500
            seen.add(error.kind)
    assert seen & {"cannot be read", "is in no known image format"}


@pytest.mark.parametrize("fault", [KeyError("x"), RuntimeError("\x1b[1m\n" * 10**5), ZeroDivisionError()])
def test_whatever_a_decoder_raises_is_one_line(monkeypatch, fault):
    def load(self):
        raise fault

    data = encoded(make_image(9, 6))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError) as caught:
        load_image(data, "x")
    message = str(caught.value)
    assert caught.value.kind == "cannot be read" and caught.value.__cause__ is fault
    assert message.isprintable() and len(message) < 500
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    fault = MemoryError()
    with pytest.raises(MemoryError):
        load_image(data, "x")
