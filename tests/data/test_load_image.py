"""Images of samples: upright RGB whatever they were, and one line for each mistake."""

import io

import numpy as np
import pytest
from data_cases import encoded, ends_with, make_image
from PIL import Image

from geo_r1.data import load_image


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
    with pytest.raises(ValueError, match=f"^sample x: image {tmp_path} cannot be read: .+$"):
        load_image(tmp_path, "x")


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path, data):
    ends_with(
        f"sample x: image of {len(data)} bytes is in no known image format", lambda: load_image(data, "x")
    )
    (tmp_path / "x.jpg").write_bytes(data)
    message = f"sample x: image {tmp_path}/x.jpg is in no known image format"
    ends_with(message, lambda: load_image(tmp_path / "x.jpg", "x"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_image(tmp_path, kind):
    data = encoded(make_image(64, 64), kind)
    (tmp_path / "x").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(
        ValueError, match=f"^sample x: image {tmp_path}/x (cannot be read: .+|is in no known image format)$"
    ):
        load_image(tmp_path / "x", "x")


def test_sixteen_bits_are_not_clipped():
    deep = Image.fromarray((np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4))
    data = encoded(deep)
    reason = "it has more than 8 bits a channel (mode I;16); convert it to 8"
    ends_with(f"sample x: image of {len(data)} bytes cannot be read: {reason}", lambda: load_image(data, "x"))
    ends_with(f"sample x: image in memory cannot be read: {reason}", lambda: load_image(deep, "x"))


def test_decompression_bomb(monkeypatch):
    data = encoded(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # Pillow refuses twice that
    reason = "Image size (10000 pixels) exceeds limit of 8000 pixels, could be decompression bomb DOS attack."
    ends_with(f"sample x: image of {len(data)} bytes cannot be read: {reason}", lambda: load_image(data, "x"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert load_image(data, "x").size == (100, 100)
