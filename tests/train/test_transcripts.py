"""Files of what was asked and said: their values, how they are read elsewhere, and what a broken one says."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from geo_r1.data import Sample, load_image, read_samples
from geo_r1.rollout import Completion
from geo_r1.train.report.transcripts import (
    Transcript,
    forget_after,
    read_transcripts,
    transcript_files,
    write_transcripts,
)

FIXED = ["stage", "step", "position", "sample_id", "prompt", "answer", "images", "completion", "text"]
FIXED += ["num_tokens", "ended", "reward", "advantage", "logp_mean"]


def make_image(seed):
    return Image.new("RGB", (8 + seed, 5), (10 * seed, 90, 200))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def message(text, role="user"):
    parts = []
    for i, piece in enumerate(text.split("<image>")):
        parts += ([{"type": "image"}] if i else []) + ([{"type": "text", "text": piece}] if piece else [])
    return {"role": role, "content": parts}


def sample(number=0, images=(), messages=None, answer="B"):
    messages = messages or (message("<image>" * len(images) + "Which one?"),)
    return Sample(f"sample-{number}", messages, tuple(images), answer=answer)


QUESTION = sample()


def transcript(position=0, sample=QUESTION, **changes):
    """Two completions, the second cut off and not scored."""
    values = {
        "completions": [Completion([5, 6, 2], [-0.5, -1.0, 0.0], True), Completion([7], [-2.0], False)],
        "texts": ["<think>b</think><answer>B</answer>", "<think>"],
        "reward": [1.25, None],
        "by_function": {"accuracy": [1.0, None], "mine:brief": [0.25, 0.5]},
        "advantage": [0.7, 0.0],
    }
    return Transcript(position, sample, **values | changes)


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_a_row_a_completion(tmp_path):
    path = write_transcripts(tmp_path, "grpo", 100, [transcript(40), transcript(41, sample(1, answer=None))])
    assert path == tmp_path / "rollouts/grpo-000100.parquet"
    rows = rows_of(path)
    assert list(rows[0]) == [*FIXED, "rewards/accuracy", "rewards/mine:brief"]
    assert rows[0] == {
        "stage": "grpo", "step": 100, "position": 40, "sample_id": "sample-0", "prompt": "Which one?",
        "answer": "B", "images": [], "completion": 0, "text": "<think>b</think><answer>B</answer>",
        "num_tokens": 3, "ended": True, "reward": 1.25, "advantage": 0.7, "logp_mean": -0.5,
        "rewards/accuracy": 1.0, "rewards/mine:brief": 0.25,
    }  # fmt: skip
    assert [(row["position"], row["completion"], row["answer"]) for row in rows] == [
        (40, 0, "B"), (40, 1, "B"), (41, 0, None), (41, 1, None)]  # fmt: skip
    assert rows[1] | {"reward": None, "rewards/accuracy": None, "ended": False, "logp_mean": -2.0} == rows[1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_nothing_is_written_of_nothing(tmp_path):
    assert write_transcripts(tmp_path, "grpo", 1, []) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_known_is_null(tmp_path):
    nothing = {"completions": [Completion([], [], False)], "texts": [""], "reward": [None]}
    path = write_transcripts(
        tmp_path, "grpo", 1, [transcript(by_function={"f": [None]}, advantage=None, **nothing)]
    )
    (row,) = rows_of(path)
    assert [row[name] for name in ("reward", "advantage", "logp_mean", "rewards/f")] == [None] * 4
    assert pq.read_schema(path).field("rewards/f").type == pa.float64()  # files of a run go together


def test_the_prompt_as_text(tmp_path):
    chat = (message("Be brief.", "system"), message("<image> A<image> B", "user"), message("Well?"))
    samples = [
        sample(0, [make_image(0), make_image(1)], chat),
        sample(1, [make_image(0)], (message("See <image>"),)),
    ]
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(i, s) for i, s in enumerate(samples)])
    assert [row["prompt"] for row in rows_of(path)[::2]] == [
        "system: Be brief.\n\nuser: <image> A<image> B\n\nuser: Well?",
        "See <image>",
    ]


def test_every_row_has_the_images(tmp_path):
    file = tmp_path / "street.png"
    file.write_bytes(png(make_image(1)))
    images = [file, png(make_image(2)), make_image(3), make_image(4).convert("CMYK")]
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(0, sample(0, images))])
    for row in rows_of(path):
        found = row["images"]
        assert [image["path"] for image in found] == ["street.png", None, None, None]
        assert [image["bytes"] for image in found[:2]] == [file.read_bytes(), images[1]]
        for image, original in zip(found, images, strict=True):
            expected = load_image(original, "x")
            assert Image.open(io.BytesIO(image["bytes"])).format == "PNG"
            assert load_image(image["bytes"], "x").tobytes() == expected.tobytes()


def test_images_lie_once_a_prompt(tmp_path):
    noise = [png(Image.effect_noise((1200, 1000 + i), 90)) for i in range(2)]  # over pyarrow's own limit
    size = 16
    many = {
        "completions": [Completion([1], [0.0], True)] * size,
        "texts": ["B"] * size,
        "reward": [1.0] * size,
        "by_function": {},
        "advantage": None,
    }
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(0, sample(0, noise), **many)])
    assert path.stat().st_size < 1.1 * sum(map(len, noise))
    assert [[image["bytes"] for image in row["images"]] for row in rows_of(path)] == [noise] * size


def test_a_file_is_a_data_set(tmp_path):
    images = [png(make_image(0))]
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(0, sample(0, images))])
    schema = pq.read_schema(path)
    types = {name: str(schema.field(name).type) for name in ("images", "text", "reward")}
    assert types["images"] == "list<element: struct<bytes: binary, path: string>>"
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["images"] == {"_type": "Sequence", "feature": {"_type": "Image"}}
    assert features["reward"] == {"_type": "Value", "dtype": "float64"}
    first, second = read_samples(path)
    assert first.images == second.images == tuple(images) and first.answer == "B"
    assert first.messages == (message("<image>Which one?"),)


def test_text_that_is_no_text(tmp_path):
    odd = sample(0, [], (message("a\ud800b\0"),), "\udfff")
    by_function = {"x\ud800": [0.0, 0.0]}
    texts = ["\0\0", "\ud83d and \U0001f600"]
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(0, odd, texts=texts, by_function=by_function)])
    rows = rows_of(path)
    assert [row["text"] for row in rows] == ["\0\0", "? and \U0001f600"]
    assert (rows[0]["prompt"], rows[0]["answer"], rows[0]["rewards/x?"]) == ("a?b\0", "?", 0.0)


def test_a_missing_image_is_named_and_leaves_no_file(tmp_path):
    gone = sample(3, [tmp_path / "gone.png"])
    with pytest.raises(ValueError, match=r"sample sample-3: image .*gone\.png does not exist"):
        write_transcripts(tmp_path, "grpo", 1, [transcript(0), transcript(1, gone)])
    assert transcript_files(tmp_path) == []
    forget_after(tmp_path, "grpo", 1)
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_a_step_that_is_run_again_replaces_its_file(tmp_path):
    for text in ("before", "after"):
        path = write_transcripts(tmp_path, "grpo", 7, [transcript(texts=[text, text])])
    assert [row["text"] for row in rows_of(path)] == ["after", "after"]


def test_forgets_later_steps_of_a_stage(tmp_path):
    for stage, step in [("grpo", 9), ("grpo", 10), ("grpo", 1_000_000), ("grpo-two", 10), ("sft", 10)]:
        write_transcripts(tmp_path, stage, step, [transcript()])
    others = [tmp_path / "rollouts" / name for name in ("notes.parquet", "grpo-best.parquet", "grpo-11.txt")]
    half = [
        tmp_path / "rollouts" / name
        for name in (".grpo-000010.parquet.partial", ".sft-000010.parquet.partial")
    ]
    for file in [*others, *half]:
        file.touch()
    forget_after(tmp_path, "grpo", 9)
    assert [(stage, step) for stage, step, _ in transcript_files(tmp_path)] == [
        ("grpo", 9), ("grpo-two", 10), ("sft", 10)]  # fmt: skip
    assert all(file.exists() for file in others)
    assert [file.exists() for file in half] == [False, True]
    forget_after(tmp_path / "elsewhere", "grpo", 0)  # a run that recorded nothing


def test_the_first_prompts_are_read(tmp_path):
    images = [png(make_image(1)), png(make_image(2))]
    written = [transcript(i, sample(i, images)) for i in (4, 5, 6)]
    path = write_transcripts(tmp_path, "grpo", 1, written)
    prompts, count = read_transcripts(path, 2)
    assert count == 3 and [rows[0]["position"] for rows in prompts] == [4, 5]
    assert [image["bytes"] for image in prompts[1][0]["images"]] == images
    assert "images" not in prompts[1][1]
    assert prompts[0][1]["rewards/mine:brief"] == 0.5 and prompts[0][1]["reward"] is None
    assert len(read_transcripts(path, 9)[0]) == 3


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.999])
def test_half_a_file_is_named(share, tmp_path):
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(0, sample(0, [png(make_image(0))]))])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(
        ValueError, match=r"grpo-000001\.parquet: expected the transcripts of a step"
    ) as caught:
        read_transcripts(path, 1)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_found(tmp_path):
    text = "The quay is on the left."
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(texts=[text, text])])
    data = bytearray(path.read_bytes())
    data[data.index(text.encode()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"grpo-000001\.parquet: .*CRC"):
        read_transcripts(path, 1)


def test_another_table_is_refused(tmp_path):
    path = write_transcripts(tmp_path, "grpo", 1, [transcript(0), transcript(1)])
    table = pq.read_table(path)
    for other, message in [
        (table.drop_columns(["text", "images"]), "no column text, images"),
        (table, "row group 0 is not one prompt"),
        (table.set_column(2, "position", pa.array(["first"] * 4)), "'first'"),
        (table.set_column(8, "text", pa.array([None] * 4, pa.string())), "null"),
    ]:
        pq.write_table(other, path)
        with pytest.raises(ValueError, match=rf"grpo-000001\.parquet: .*{message}"):
            read_transcripts(path, 1)
