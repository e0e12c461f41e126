"""Samples as messages of a chat: the order of their parts, and images as they are sent."""

import base64
import io

import pytest
from data_cases import encoded, make_image
from PIL import Image

from geo_r1.data import Sample
from geo_r1.data.teaching.chat import chat_messages


def sent(source, **options):
    """The kind and bytes of an image as it is sent."""
    sample = Sample("x", ({"role": "user", "content": [{"type": "image"}]},), (source,))
    [message] = chat_messages(sample, **options)
    [part] = message["content"]
    head, data = part["image_url"]["url"].split(",")
    assert part["type"] == "image_url"
    return head, base64.b64decode(data, validate=True)


def test_a_sample_becomes_messages_in_its_order():
    content = [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "[x] which?"}]
    sample = Sample(
        "x",
        ({"role": "system", "content": [content[0]]}, {"role": "user", "content": content}),
        (make_image(3, 2),),
    )
    messages = chat_messages(sample, system="be brief", text="now")
    assert [message["role"] for message in messages] == ["system", "system", "user"]
    assert [message["content"] for message in messages[:2]] == ["be brief", "A"]
    parts = messages[2]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "text"]
    assert parts[3] == {"type": "text", "text": "now"}


def test_text_alone_is_plain_and_follows_the_last_turn():
    turns = ({"role": "user", "content": [{"type": "text", "text": "q"}]},)
    assert chat_messages(Sample("x", turns), text="more") == [{"role": "user", "content": "q\n\nmore"}]
    turns += ({"role": "assistant", "content": [{"type": "text", "text": "a"}]},)
    assert chat_messages(Sample("x", turns), text="more")[2:] == [{"role": "user", "content": "more"}]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_small_file_is_sent_as_it_is(kind, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(make_image(9, 7), kind))
    for source in (path, path.read_bytes()):
        assert sent(source) == (f"data:image/{kind.lower()};base64", path.read_bytes())


def test_metadata_stays_here():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif.get_ifd(0x8825)[1] = "N"
    for data in (
        encoded(make_image(9, 7), "JPEG", exif=exif),
        encoded(make_image(9, 7), "JPEG", comment=b"38.7 N"),
        encoded(make_image(9, 7), "WEBP", xmp=b"<x:xmpmeta/>"),
    ):
        head, got = sent(data)
        shown = Image.open(io.BytesIO(got))
        assert head == "data:image/png;base64" and got != data
        assert shown.size == ((7, 9) if b"Exif" in data else (9, 7))
        assert not shown.getexif() and not shown.info


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (make_image(9, 7), "png"),
        (make_image(300, 300), "jpeg"),
        (encoded(make_image(9, 7), "BMP"), "png"),
        (encoded(Image.new("RGBA", (9, 7), (9, 9, 9, 0)), "PNG"), "png"),
        (encoded(make_image(9, 7), "GIF", save_all=True, append_images=[make_image(9, 7)]), "png"),
        (encoded(make_image(700, 600), "PNG"), "jpeg"),
    ],
)
def test_other_images_are_encoded_anew(source, kind):
    head, data = sent(source)
    shown = Image.open(io.BytesIO(data))
    assert head == f"data:image/{kind};base64"
    assert (shown.format, shown.mode) == (kind.upper(), "RGB")


def test_large_images_are_shrunk():
    for source in (make_image(90, 40), encoded(make_image(90, 40), "PNG")):
        assert Image.open(io.BytesIO(sent(source, max_pixels=100)[1])).size == (15, 6)
    data = encoded(make_image(10, 10), "PNG")
    assert sent(data, max_pixels=100)[1] == data
    assert Image.open(io.BytesIO(sent(make_image(1, 50), max_pixels=1)[1])).size == (1, 1)
