"""Columns by the names that the field uses: read as what they mean, or refused by name; never dropped."""

import base64
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import encoded, ends_with, make_image, write

from geo_r1.data import load_image, read_samples
from geo_r1.data import parquet as parquet_module
from geo_r1.data.sample import sample_of

IMAGE = {"type": "image"}
PNG = encoded(make_image(9, 6))
BASE64 = base64.b64encode(PNG).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"
NAN = math.nan


def text(value):
    return {"type": "text", "text": value}


def turn(role, *parts):
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


def user(*parts):
    return turn("user", *parts)


def said(role, content):
    return {"role": role, "content": content}


HUMAN, GPT = {"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}
ALPACA = {"instruction": "Sum", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("row", "messages", "rest"),
    [
        # images
        ({"prompt": "?", "image": "x"}, [user(IMAGE, "?")], {"images": ["x"]}),
        ({"prompt": "?", "image": ["x", "y"]}, [user(IMAGE, IMAGE, "?")], {"images": ["x", "y"]}),
        ({"prompt": "?<image>", "image": {"path": "x", "bytes": None}}, [user("?", IMAGE)],
         {"images": ["x"]}),
        ({"prompt": "?", "image": PNG, "images": []}, [user(IMAGE, "?")], {"images": [PNG]}),
        ({"prompt": "?", "image": "", "images": ["x"]}, [user(IMAGE, "?")], {"images": ["x"]}),
        ({"prompt": "?", "image": NAN, "videos": [], "tools": None, "audio": ""}, [user("?")], {}),
        # chats
        ({"messages": [said("user", "?"), said("assistant", "!")], "image": "x"}, [user(IMAGE, "?")],
         {"images": ["x"], "response": "!"}),
        ({"messages": [said("user", "?"), said("assistant", "a"), said("user", "b")]},
         [user("?"), turn("assistant", "a"), user("b")], {}),
        ({"messages": [user("?"), turn("assistant", "a", "b")]}, [user("?")], {"response": "ab"}),
        ({"conversations": [HUMAN, GPT], "images": ["x"]}, [user(IMAGE, "?")],
         {"images": ["x"], "response": "!"}),
        ({"conversations": [said("user", "?")], "system": "s"}, [turn("system", "s"), user("?")], {}),
        ({"prompt": [said("user", "?")], "system": "s", "messages": []}, [turn("system",
         "s"), user("?")], {}),
        ({"prompt": "?", "system_prompt": "s"}, [turn("system", "s"), user("?")], {}),
        # questions
        ({"question": "?<image>", "image": "x"}, [user("?", IMAGE)], {"images": ["x"]}),
        ({"problem": "?", "answer": "B"}, [user("?")], {"answer": "B"}),
        ({"query": "?", "response": "!"}, [user("?")], {"response": "!"}),
        (ALPACA, [user("Sum\n1 2")], {"response": "3"}),
        (ALPACA | {"input": "", "system": ""}, [user("Sum")], {"response": "3"}),
        ({"question": "A, B?", "options": ["A", "B"]}, [user("A, B?")], {"metadata": {"options": ["A",
         "B"]}}),
        ({"prompt": "Say: ?", "question": "?"}, [user("Say: ?")], {"metadata": {"question": "?"}}),
        # responses and answers
        ({"prompt": "?", "completion": "!"}, [user("?")], {"response": "!"}),
        ({"prompt": "?", "completion": [said("assistant", "!")]}, [user("?")], {"response": "!"}),
        ({"prompt": "?", "solution": "<answer> B </answer>"}, [user("?")],
         {"answer": "B", "metadata": {"solution": "<answer> B </answer>"}}),
        ({"prompt": "?", "answer": "A", "solution": "why"}, [user("?")],
         {"answer": "A", "metadata": {"solution": "why"}}),
        ({"prompt": "?", "reward_model": {"style": "rule", "ground_truth": 3.0}}, [user("?")],
         {"answer": "3", "metadata": {"reward_model": {"style": "rule", "ground_truth": 3.0}}}),
        ({"prompt": "?", "solution": "A", "ground_truth": "B"}, [user("?")],
         {"metadata": {"solution": "A", "ground_truth": "B"}}),  # which?
        # names that only look like images
        ({"prompt": "?", "images": ["x"], "image_path": "a/x", "image_id": 3}, [user(IMAGE, "?")],
         {"images": ["x"], "metadata": {"image_path": "a/x", "image_id": 3}}),
    ],
)  # fmt: skip
def test_a_column_is_read_as_what_it_means(tmp_path, row, messages, rest):
    sample = sample_of(row, "it", tmp_path)
    assert [*sample.messages] == messages
    images = tuple(
        image if isinstance(image, bytes) else tmp_path / image for image in rest.get("images", ())
    )
    assert sample.images == images
    assert (sample.response, sample.answer) == (rest.get("response"), rest.get("answer"))
    assert sample.metadata == rest.get("metadata", {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "x", "images": ["y"]}, "it has both 'image' and 'images'; keep one of them"),
        ({"Image": "x"}, "its column 'Image' is read only by the name 'image'; rename it"),
        ({"Images": ["x"]}, "its column 'Images' is read only by the name 'images'; rename it"),
        ({" response": "x"}, "its column ' response' is read only by the name 'response'; rename it"),
        *(
            ({name: "x"}, f"it has {name!r} but no images; if it holds them, name it 'images'")
            for name in ("img", "image_path", "image_paths", "image_url", "image_bytes", "imgs", "file_name")
        ),
        ({"image_1": "x"}, "it has 'image_1', which is not read: put its images into a list in 'images'"),
        *(
            ({name: ["x"]}, f"it has {name!r}, which is not read: only text and images are read")
            for name in ("video", "videos", "audio", "audios")
        ),
        ({"tools": [{"name": "f"}]}, "it has 'tools', which is not read: prompts have no tools"),
        ({"rejected": "x"},
         "it has 'rejected', which is not read: preferences are not learned; name the text"),
        ({"history": [["a", "b"]]},
         "it has 'history', which is not read: write earlier turns into 'prompt', as messages"),
        ({"messages": [said("user", "?")]}, "it has both 'prompt' and 'messages'; keep one of them"),
        ({"conversations": [HUMAN]}, "it has both 'prompt' and 'conversations'; keep one of them"),
        ({"question": "Where?"},
         "it has 'question', which its prompt does not show; write it into 'prompt'"),
        ({"prompt": [turn("system", "a"), user("?")], "system": "s"},
         "it has 'system', and its prompt begins with a system message; keep one of them"),
        ({"system": ["s"]}, "'system' must be text, got list ['s']"),
        ({"response": "a", "completion": "b"}, "it has both 'response' and 'completion'; keep one of them"),
        ({"completion": [said("user", "b")]},
         "'completion' must be text or one assistant's message, got list"),
        ({"prompt": [said("user", "?") | {"tool_calls": [{}]}]},
         "a message has 'tool_calls', which is not read"),
        ({"prompt": [said("user", "?") | {"name": "x"}]}, "a message has 'name', which is not read"),
        ({"prompt": [user(text("?") | {"cache": 1})]}, "a content part has 'cache', which is not read"),
        ({"prompt": [user({"type": "video", "video": "x"})]},
         "a content part must be text or image, got dict"),
        ({"prompt": [user(IMAGE | {"image": "x", "url": "y"})]},
         "an image part must hold one image, got dict"),
        ({"prompt": [user({"type": "image_url"})]}, "an image part must hold one image, got dict"),
        ({"prompt": [user(IMAGE | {"image": "x"})], "images": ["y"]},
         "the prompt marks 1 images but the sample has 2"),
        ({"prompt": "\ud800"}, "its text is not Unicode: surrogates not allowed at character 0"),
        ({"id": "x" * 10**6}, "its id has 1,000,000 characters, more than 500"),
        ({"image": "http://a.b/x.png"},
         "an image must be a file, got the address 'http://a.b/x.png'; download it first"),
        ({"images": ["s3://a/" + "x" * 10**6]}, "an image must be a file, got the address 's3://a/xxxx"),
        ({"image": "data:image/png;base64," + "!" * 10**6}, "an image's base64 cannot be decoded: "),
        ({"image": "data:image/png," + "x" * 10**6},
         "an image's base64 cannot be decoded: it is no ;base64,"),
        ({"image": {"bytes": "x" * (10**6 + 1)}}, "an image's base64 cannot be decoded: "),
        ({"image": {"bytes": [1, 2]}},
         "an image must be a path or {'path', 'bytes'}, got dict {'bytes': [1, 2]}"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(tmp_path, row, reason):
    with pytest.raises(ValueError) as caught:
        sample_of({"prompt": "?"} | row, "x.jsonl, row 2", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"x.jsonl, row 2: {reason}") and message.isprintable() and len(message) < 400


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "?", "problem": "!"}, "it has both 'question' and 'problem'; keep one of them"),
        ({"messages": [HUMAN], "conversations": [HUMAN]}, "it has both 'messages' and 'conversations'; keep"),
        ({"messages": [said("user", "?"), said("assistant", "!")], "response": "x"},
         "it has a response, and 'messages' ends with another; keep one of them"),
        ({"question": "Which?", "options": ["red", "blue"]},
         "it has 'options', which its prompt does not show; write it into 'prompt'"),
        ({"text": "?"}, "no column 'prompt'; it has text"),
        ({"x" * 10**6: "?"}, "no column 'prompt'; it has xxxx"),
        ({"question": ["?"]}, "'question' must be text, got list ['?']"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "f"}]}, "from must be one of system, "),
        ({"messages": [said("assistant", "!")]}, "the prompt is empty"),
    ],
)  # fmt: skip
def test_rows_without_a_clear_prompt(tmp_path, row, reason):
    with pytest.raises(ValueError) as caught:
        sample_of(row, "it", tmp_path)
    assert str(caught.value).startswith(f"it: {reason}") and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("part", "image"),
    [
        (IMAGE | {"image": "x"}, "x"),
        (IMAGE | {"image": "file:///b/x.png"}, "/b/x.png"),
        (IMAGE | {"image": PNG, "text": None}, PNG),
        (IMAGE | {"image": {"bytes": PNG, "path": None}}, PNG),
        (IMAGE | {"image": DATA_URI}, PNG),
        (IMAGE | {"url": DATA_URI, "image": None}, PNG),
        (IMAGE | {"path": "x"}, "x"),
        (IMAGE | {"base64": BASE64}, PNG),
        ({"type": "image_url", "image_url": {"url": DATA_URI, "detail": "auto"}}, PNG),
        ({"type": "image_url", "image_url": "x"}, "x"),
    ],
)
def test_images_in_a_message_stay_in_their_places(tmp_path, part, image):
    row = {"prompt": [user("a", part, "b <image> c", IMAGE, "d")], "images": ["y", "z"]}
    sample = sample_of(row, "it", tmp_path)
    assert [*sample.messages] == [user("a", IMAGE, "b ", IMAGE, " c", IMAGE, "d")]
    first = image if isinstance(image, bytes) else tmp_path / image
    assert sample.images == (first, tmp_path / "y", tmp_path / "z")


@pytest.mark.parametrize(
    "image",
    [
        PNG,
        {"bytes": PNG},
        DATA_URI,
        BASE64,
        {"bytes": BASE64, "path": "x"},
        {"bytes": DATA_URI},
        {"url": DATA_URI},
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
def test_encoded_images_are_read(tmp_path, image, kind):
    data = encoded(make_image(9, 6), kind)
    fits = {PNG: data, BASE64: base64.b64encode(data).decode()}
    fits[DATA_URI] = f"data:image/x;base64,{fits[BASE64]}"

    def changed(value):
        return (
            {key: fits.get(item, item) for key, item in value.items()}
            if isinstance(value, dict)
            else fits[value]
        )

    [source] = sample_of({"prompt": "?", "images": [changed(image)]}, "it", tmp_path).images
    assert source == data and load_image(source, "x").size == (9, 6)


@pytest.mark.parametrize(
    "name", ["a" * 64, "b" * 63 + "/c", "iVBORw0KGgo", "9j/" + "4" * 20, "a/" * 100 + "x"]
)
def test_what_may_be_a_path_is_a_path(tmp_path, name):
    assert sample_of({"prompt": "?", "image": name}, "it", tmp_path).images == (tmp_path / name,)


# Numbers and nulls of tables


def test_whole_floats_are_integers_and_nan_is_absent(tmp_path):
    rows = [
        {"prompt": "?", "id": 7.0, "answer": 3.0, "num_choices": 5.0, "latitude": 47.5, "city": "Oslo"},
        {"prompt": "?", "id": 8.0, "answer": None, "num_choices": None, "latitude": None, "city": None},
        {"prompt": "?", "id": 9.0, "answer": NAN, "num_choices": NAN, "latitude": NAN, "city": None},
        {"prompt": "?", "id": 10.0, "answer": 2.5, "num_choices": 1e300, "latitude": -3.0, "city": None},
    ]
    columns = {key: pa.array([row[key] for row in rows], from_pandas=False) for key in rows[0]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    for path in (tmp_path / "x.parquet", write(tmp_path / "x.jsonl", rows)):
        first, second, third, last = read_samples(path)
        assert [s.id for s in (first, second, third, last)] == ["7", "8", "9", "10"]
        assert (first.answer, second.answer, third.answer, last.answer) == ("3", None, None, "2.5")
        assert first.metadata == {"num_choices": 5, "latitude": 47.5, "city": "Oslo"}
        assert isinstance(first.metadata["num_choices"], int)
        assert second.metadata == third.metadata == {}
        assert last.metadata == {"num_choices": 1e300, "latitude": -3}


# Parquet that unpacks to more than it seems


def packed(values, indices, nested=False):
    """A table of few bytes: each text is stored once."""
    column = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))
    if nested:
        column = pa.ListArray.from_arrays(pa.array([0, len(indices)], pa.int32()), column)
        return pa.table({"prompt": ["?"], "x": column})
    return pa.table({"prompt": column})


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(parquet_module, "MAX_UNPACKED", 2**24)


@pytest.mark.parametrize(
    "table",
    [
        packed(["a" * 2**20], [0] * 64),
        packed(["a" * 2**20], [0] * 64, nested=True),
        pa.table({"prompt": pa.array(["a" * 2**20 + str(i) for i in range(40)])}),
        pa.table({"prompt": ["?"] * 2**20, "x": pa.nulls(2**20, pa.int64())}),
        pa.table({"prompt": ["?"], "x": pa.array([[0] * 2**20], pa.list_(pa.int8()))}),
    ],
)
@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY", "plain"])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, small_limit, table, encoding):
    path = tmp_path / "x.parquet"
    column = {} if encoding != "DELTA_BYTE_ARRAY" else {"column_encoding": {"prompt": encoding}}
    flat = pa.table({name: c.cast(pa.string()) if c.type == packed([""], [0]).schema[0].type else c
                     for name, c in zip(table.column_names, table.columns, strict=True)})  # fmt: skip
    pq.write_table(flat, path, compression="zstd", use_dictionary=encoding == "dictionary", **column)
    assert path.stat().st_size < 2**20
    with pytest.raises(
        ValueError, match=r"x.parquet takes [\d,]+ bytes and unpacks to more than 0 GiB; "
    ) as caught:
        read_samples(path)
    assert len(str(caught.value)) < 400


def test_dense_and_large_files_are_read_if_they_unpack_to_little(tmp_path, small_limit):
    texts = [f"{'a' * 2**18}{i}" for i in range(20)]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "x.parquet", compression="zstd")
    assert [s.messages[0]["content"][0]["text"] for s in read_samples(tmp_path / "x.parquet")] == texts
    images = [[{"bytes": bytes(make_image(300, 300, i).tobytes()), "path": None}] for i in range(80)]
    pq.write_table(pa.table({"prompt": ["?"] * 80, "images": images}), tmp_path / "y.parquet")
    assert [s.images[0] for s in read_samples(tmp_path / "y.parquet")] == [i[0]["bytes"] for i in images]


def test_more_rows_than_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "MANY", 1000)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["?"] * 10**5}), path)
    reason = "has 100,000 rows, more than bytes: they are all alike"
    ends_with(f"data file {path} {reason}", lambda: read_samples(path))
