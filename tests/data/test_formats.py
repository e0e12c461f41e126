"""Rows of other trainers: a written row is read as the same sample; what a format cannot hold is an error."""

import json
from pathlib import Path

import pytest

from geo_r1.data.formats import FORMATS, detect
from geo_r1.data.sample import sample_of

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def turn(role, *parts):
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


TILES = [part for letter in "ABCDE" for part in (f"\n{letter}: ", IMAGE)]
SIX = ["q.jpg", *(f"tiles/{letter}.png" for letter in "abcde")]
REST = {"city": "Zürich", "num_choices": 5, "latitude": 47.5, "tags": ["x", "y"]}
COMMON = {"id": "7", "answer": "B", "response": "<think>…</think><answer>B</answer>"}
# what a row shows: (its own columns, formats that cannot hold it, formats that cannot unless flattened)
ONE_TURN, TEACHING = {"vlm-r1", "easyr1"}, {"trl-sft", "llama-factory", "sharegpt"}
CASES = {
    "a single image": ({"prompt": [turn("user", IMAGE, "Where?")], "images": ["a.jpg"]}, set(), set()),
    "images first": ({"prompt": [turn("user", IMAGE, IMAGE, "?")], "images": ["b", "a"]}, set(), set()),
    "six interleaved": (
        {"prompt": [turn("user", "Match", IMAGE, *TILES, "\nWhich?")], "images": SIX},
        set(),
        {"vlm-r1"},
    ),
    "no image": ({"prompt": [turn("user", "Two\n\nlines \u2028 of 東京 🌍\x00")]}, set(), set()),
    "a system turn": (
        {"prompt": [turn("system", "Be brief."), turn("user", IMAGE, "Where?")], "images": ["a.jpg"]},
        set(),
        ONE_TURN,
    ),
    "several turns": (
        {
            "prompt": [turn("user", IMAGE, "?"), turn("assistant", "Hm."), turn("user", "And ", IMAGE)],
            "images": ["a.jpg", "b.jpg"],
        },
        ONE_TURN,
        set(),
    ),
    "no response": (
        {"prompt": [turn("user", IMAGE, "Where?")], "images": ["a.jpg"], "response": None},
        TEACHING,
        set(),
    ),
    "no answer": ({"prompt": [turn("user", "Where?")], "answer": None}, ONE_TURN, set()),
    "an answer without a name": ({"prompt": [turn("user", "Where?")], "id": None}, set(), set()),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_as_the_same_sample(case, name):
    columns, never, flat = CASES[case]
    columns = COMMON | columns | REST
    sample = sample_of(columns, "it", Path("/root"))
    if name in never | flat:
        with pytest.raises(ValueError, match=f"^sample 7: .*{name}") as caught:
            FORMATS[name].write(columns)
        assert ("--flatten" in str(caught.value)) == (name in flat)
        return
    row = json.loads(json.dumps(FORMATS[name].write(columns)))
    assert sample_of(FORMATS[name].read(row, "it"), "it", Path("/root")) == sample
    assert None not in row.values()


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "trl",
            {
                "prompt": [
                    {"role": "user", "content": [text("See "), IMAGE, text(" and "), IMAGE, text(".")]},
                ],
                "images": ["a", "b"],
                "solution": "B",
                "response": "so",
            },
        ),
        (
            "trl-sft",
            {
                "prompt": [
                    {"role": "user", "content": [text("See "), IMAGE, text(" and "), IMAGE, text(".")]},
                ],
                "completion": [{"role": "assistant", "content": [text("so")]}],
                "images": ["a", "b"],
                "answer": "B",
            },
        ),
        (
            "llama-factory",
            {
                "messages": [
                    {"role": "user", "content": "See <image> and <image>."},
                    {"role": "assistant", "content": "so"},
                ],
                "images": ["a", "b"],
                "answer": "B",
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "See <image> and <image>."},
                    {"from": "gpt", "value": "so"},
                ],
                "images": ["a", "b"],
                "answer": "B",
            },
        ),
        (
            "vlm-r1",
            {
                "image": ["a", "b"],
                "conversations": [
                    {"from": "human", "value": "<image><image>See image 1 and image 2."},
                    {"from": "gpt", "value": "B"},
                ],
                "response": "so",
            },
        ),
        (
            "easyr1",
            {
                "problem": "See <image> and <image>.",
                "images": ["a", "b"],
                "answer": "B",
                "response": "so",
            },
        ),
        (
            "ms-swift",
            {
                "messages": [
                    {"role": "user", "content": "See <image> and <image>."},
                    {"role": "assistant", "content": "so"},
                ],
                "images": ["a", "b"],
                "solution": "B",
            },
        ),
    ],
)
def test_rows_are_those_of_the_other_trainer(name, row):
    own = {
        "id": 1,
        "prompt": "See <image> and <image>.",
        "images": ["a", "b"],
        "answer": "B",
        "response": "so",
    }
    written = FORMATS[name].write(own | {"city": "Oslo"}, flatten=True)
    assert written == {"id": "1", "city": "Oslo"} | row
    if name == "vlm-r1":  # where nothing stands within the text, nothing is rewritten
        row = {
            "image": "a",
            "conversations": [{"from": "human", "value": "<image>x"}, row["conversations"][1]],
        }
        one = {"prompt": [turn("user", IMAGE, "x")], "images": ["a"], "answer": "B"}
        assert FORMATS[name].write(one) == FORMATS[name].write(one, flatten=True) == row


@pytest.mark.parametrize(
    ("prompt", "flat"),
    [
        ("<image>a<image>", "<image><image>a image 2"),
        ("<image><image>", "<image><image>"),
        ("A:<image>B:<image>", "<image><image>A: image 1 B: image 2"),
        ("(<image>), <image><image>.", "<image><image><image>(image 1), image 2 image 3."),
        ([turn("system", "Be brief."), turn("user", IMAGE, "?")], "<image>Be brief.\n\n?"),
        ([turn("system", "See ", IMAGE), turn("user", IMAGE, "?")],
         "<image><image>See image 1\n\nimage 2?"),
    ],
)  # fmt: skip
def test_flattened_text_names_its_images(prompt, flat):
    images = ["x", "y", "z"][: flat.count("<image>")]
    row = FORMATS["vlm-r1"].write({"prompt": prompt, "images": images, "answer": "B"}, flatten=True)
    assert row["conversations"][0]["value"] == flat
    assert row["image"] == (images if len(images) > 1 else images[0])


def test_easyr1_keeps_images_in_their_places_when_flattened():
    prompt = [turn("system", "Be brief."), turn("user", IMAGE, "a", IMAGE)]
    row = FORMATS["easyr1"].write({"prompt": prompt, "images": ["x", "y"], "answer": "B"}, flatten=True)
    assert row["problem"] == "<image>Be brief.\n\na<image>"


@pytest.mark.parametrize(
    ("name", "row", "own"),
    [
        ("trl", {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a <image>"}],
                 "image": "x", "solution": "B"},  # a marker has its place
         {"prompt": [turn("system", "s"), turn("user", "a ", IMAGE)], "images": ["x"], "answer": "B"}),
        ("trl", {"prompt": [{"role": "user", "content": [IMAGE | {"text": None, "image": None}]}],
                 "images": ["x"], "answer": "B", "id": None},
         {"prompt": [turn("user", IMAGE)], "images": ["x"], "answer": "B"}),
        ("trl-sft", {"messages": [turn("user", IMAGE, "a"), turn("assistant", "b", "c")], "images": ["x"]},
         {"prompt": [turn("user", IMAGE, "a")], "images": ["x"], "response": "bc"}),
        ("trl-sft", {"prompt": "a", "completion": "b"}, {"prompt": [turn("user", "a")], "response": "b"}),
        ("llama-factory",
         {"messages": [{"role": "user", "content": "<image>a"}], "images": "x", "system": "s"},
         {"prompt": [turn("system", "s"), turn("user", IMAGE, "a")], "images": ["x"]}),
        ("vlm-r1", {"image": ["x", "y"], "accu_reward_method": "mcq", "conversations": [
            {"from": "a", "value": "<image>a<image>\nb"}, {"from": "b", "value": "<answer> C </answer>"}]},
         {"prompt": [turn("user", IMAGE, IMAGE, "a\nb")], "images": ["x", "y"], "answer": "C",
          "accu_reward_method": "mcq"}),
        ("vlm-r1", {"conversations": [{"value": "1 + 1"}, {"value": 2}]},
         {"prompt": [turn("user", "1 + 1")], "answer": "2"}),
        ("easyr1", {"problem": "a<image>", "images": [b"x"], "videos": [], "answer": 2},
         {"prompt": [turn("user", "a", IMAGE)], "images": [{"bytes": b"x"}], "answer": "2"}),
        ("ms-swift", {"messages": [{"role": "user", "content": "a"}], "images": ["x"],
                      "solution": "<think>t</think><answer> B </answer>"},
         {"prompt": [turn("user", IMAGE, "a")], "images": ["x"], "answer": "B"}),
    ],
)  # fmt: skip
def test_what_others_write(name, row, own):
    read = FORMATS[name].read(row, "it")
    read["images"] = [{"bytes": i} if isinstance(i, bytes) else i for i in read.get("images") or []]
    assert sample_of(read, "it", Path()) == sample_of(own, "it", Path())


USER = {"role": "user", "content": "?"}
HUMAN, GPT = {"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("geo_r1", {"prompt": "?", "answer": "B", "solution": "C"}),
        ("geo_r1", {"prompt": [USER], "images": ["x"]}),
        ("trl", {"prompt": [USER], "images": ["x"], "solution": "B"}),
        ("trl-sft", {"prompt": [USER], "completion": "!"}),
        ("trl-sft", {"messages": [turn("user", "?"), turn("assistant", "!")]}),
        ("llama-factory", {"messages": [USER | {"content": "<image>"}, {"role": "assistant", "content": "!"}],
                           "images": ["x"]}),
        ("sharegpt", {"conversations": [HUMAN, GPT], "images": ["x"]}),
        ("sharegpt", {"conversations": [HUMAN, GPT, HUMAN, GPT]}),
        ("vlm-r1", {"conversations": [HUMAN, GPT], "image": "x"}),
        ("easyr1", {"problem": "?", "answer": "B"}),
        ("ms-swift", {"messages": [USER], "images": ["x"]}),
        ("ms-swift", {"messages": [USER, {"role": "assistant", "content": "!"}], "solution": "B"}),
        (None, {"messages": [USER, {"role": "assistant", "content": "!"}], "images": ["x"]}),  # where is it?
        (None, {"conversations": [HUMAN, GPT]}),  # a response, or the truth
        (None, {"prompt": "?", "messages": [USER]}),
        *((None, row) for row in ([], None, 3, {}, {"messages": None}, {"messages": [3]}, {"messages": "?"})),
    ],
)  # fmt: skip
def test_a_row_shows_its_format(name, row):
    assert detect(row) == name


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_empty_stays_empty(name):
    own = {
        "id": "",
        "prompt": [turn("user")],
        "answer": "",
        "response": "",
        "images": [],
        "place": {"a": None},
    }
    row = FORMATS[name].write(own)
    assert "id" not in row
    assert sample_of(FORMATS[name].read(row, "it"), "it", Path()) == sample_of(own, "it", Path())


def test_tags_around_an_answer_are_taken_off_where_they_are_the_custom():
    own = {"prompt": "?", "answer": "<answer> B </answer>", "response": "!"}
    for name, kind in FORMATS.items():
        bare = name in {"trl", "vlm-r1", "ms-swift"}
        assert kind.read(kind.write(own), "it")["answer"] == ("B" if bare else own["answer"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_written_row_shows_its_format(name):
    own = COMMON | {"prompt": "<image>?", "images": ["x"]}
    found = detect(FORMATS[name].write(own))
    assert found == name


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        *((name, 3, "a row must be a mapping of columns, got int 3") for name in FORMATS),
        ("trl", {}, "no column 'prompt'; it has none"),
        ("trl", {"prompt": 3}, "its messages must be a list, got int 3"),
        ("trl", {"prompt": [USER], "solution": "A", "answer": "B"}, "its column 'answer' is none of trl; "),
        ("trl", {"prompt": [USER], "image": "x", "images": ["x"]}, "it has both 'image' and 'images'"),
        ("trl", {"prompt": [turn("user", IMAGE | {"image": "x"})], "images": ["y"]},
         "the prompt marks 1 images but the sample has 2"),
        ("trl-sft", {"prompt": [USER], "completion": [USER]}, "a response must be one assistant's turn"),
        ("trl-sft", {"messages": [USER, turn("assistant", IMAGE)]}, "a response must be text, got list"),
        ("llama-factory", {"messages": {"role": "user"}}, "its messages must be a list, got dict"),
        ("llama-factory", {"messages": [USER], "images": ["x"]}, "its text has no <image>, but the row has"),
        ("llama-factory", {"messages": [USER], "videos": ["x"]}, "it has videos; only images are read"),
        ("llama-factory", {"messages": [{"role": 3, "content": "?"}]}, "a message must have role and"),
        ("llama-factory", {"messages": [USER | {"tool_calls": []}]}, "a message has 'tool_calls', which is"),
        ("llama-factory", {"messages": [USER | {"role": "function"}]}, "role must be one of system, user"),
        ("llama-factory", {"messages": [USER, {"role": "assistant", "content": "<image>"}], "images": ["x"]},
         "its response has an image"),
        ("sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "a response must be text, got"),
        ("sharegpt", {"conversations": [{"from": "user", "value": "?"}]}, "from must be one of system, "),
        ("vlm-r1", {"conversations": [HUMAN]}, "'conversations' must be a question and"),
        ("vlm-r1", {"conversations": [HUMAN, GPT, HUMAN]}, "'conversations' must be a question and"),
        ("vlm-r1", {"conversations": [[], []]}, "'conversations' must be a question and"),
        ("vlm-r1", {"conversations": [{"value": None}, GPT]}, "the question must be text, got NoneType None"),
        ("easyr1", {"problem": [USER]}, "the question must be text, got list"),
        ("easyr1", {"problem": "?", "images": ["x"]}, "its text has no <image>, but the row has images"),
        ("easyr1", {"problem": "?", "prompt": "!"}, "its column 'prompt' is none of easyr1; rename it"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_one_line(name, row, reason):
    with pytest.raises(ValueError) as caught:
        FORMATS[name].read(row, "x.jsonl, row 2")
    assert str(caught.value).startswith(f"x.jsonl, row 2: {reason}")
    assert "\n" not in str(caught.value)


WRONG = [3, True, "x", b"x", [], {}, [None], [[]], [{}], {"a": None}, [{"role": None}], float("nan")]


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_types_in_every_column_are_refused_or_harmless(name):
    """Whatever stands in a column, the row is read as a sample or refused in one line."""
    good = FORMATS[name].write(COMMON | {"prompt": "<image>?", "images": ["x"]})
    for key in good:
        for wrong in WRONG:
            try:
                sample = sample_of(FORMATS[name].read(good | {key: wrong}, "it"), "it", Path())
            except ValueError as error:
                assert str(error).startswith("it: ") and "\n" not in str(error)
            else:
                assert len(sample.images) in (0, 1)
    for turns in ("prompt", "messages", "conversations"):
        for wrong in WRONG if isinstance(good.get(turns), list) else []:
            for role in good[turns][0]:
                bad = [good[turns][0] | {role: wrong}, *good[turns][1:]]
                try:
                    FORMATS[name].read(good | {turns: bad}, "it")
                except ValueError as error:
                    assert str(error).startswith("it: ")


@pytest.mark.parametrize(
    ("name", "own", "reason"),
    [
        ("trl", {"prompt": [turn("critic", "?")]},
         "trl has no role 'critic'; it has system, user, assistant, tool"),
        ("trl", {"prompt": [turn("user", "?"), turn("assistant", "So ")]},
         "its prompt ends with an assistant's turn, trl would take it for a response"),
        ("trl", {"prompt": "?", "solution": 3}, "its column 'solution' has a meaning in trl; rename it"),
        ("ms-swift", {"prompt": "?", "label": 3}, "its column 'label' has a meaning in ms-swift; rename it"),
        ("sharegpt", {"prompt": [turn("user", "?"), turn("user", "?")], "response": "!"},
         "sharegpt has a system turn, then user and assistant by turns; got ['user', 'user']"),
        ("sharegpt", {"prompt": [turn("system", "?")], "response": "!"},
         "sharegpt has a system turn, then user and assistant by turns; got ['system']"),
        ("llama-factory", {"prompt": [turn("user", "say <image>")], "response": "!"},
         "the prompt marks 1 images but the sample has 0"),
        ("llama-factory", {"prompt": "?", "response": "<image>"},
         "its text says <image>, which would be taken for an image"),
        ("vlm-r1", {"prompt": "<image>", "images": [{"bytes": b"x"}], "answer": "B"},
         "its images are in the file, and vlm-r1 reads them by path"),
        ("easyr1", {"prompt": "<image>", "answer": "B"}, "the prompt marks 1 images but the sample has 0"),
        ("easyr1", {"prompt": [turn("tool", "?")], "answer": "B"},
         "easyr1 holds one user turn, got ['tool']"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_said(name, own, reason):
    for where, row in (("a sample without id", own), ("sample x", own | {"id": "x"})):
        with pytest.raises(ValueError) as caught:
            FORMATS[name].write(row)
        assert str(caught.value) == f"{where}: {reason}"
