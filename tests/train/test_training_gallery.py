"""The report's part on training: what it chooses, what it says is left out, and that it stays small."""

import base64
import io
import re
from itertools import pairwise

import pytest
from PIL import Image

from geo_r1.data import Sample
from geo_r1.rollout import Completion
from geo_r1.train.report.gallery import (
    NUM_CHARACTERS,
    NUM_COMPLETIONS,
    NUM_IMAGES,
    NUM_PROMPTS,
    NUM_STEPS,
    read_training_gallery,
)
from geo_r1.train.report.page import write_report
from geo_r1.train.report.transcripts import Transcript, write_transcripts

HEADING = "<h2>Rollouts in training</h2>"


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def question(number=0, names=("", " A", " B"), images=None, answer="B"):
    content = []
    for name in names:
        content += [{"type": "text", "text": name}] * bool(name) + [{"type": "image"}]
    content.append({"type": "text", "text": "Which tile?"})
    images = images or [Image.new("RGB", (20, 10), (9 * number, 50 * i, 7)) for i in range(len(names))]
    return Sample(f"q-{number}", ({"role": "user", "content": content},), tuple(images), answer=answer)


def transcript(position=0, sample=None, reward=(0.5, 2.0, None, -1.0), texts=None, **changes):
    size = len(reward)
    values = {
        "completions": [Completion([1] * (i + 1), [-1.0] * (i + 1), i % 2 == 0) for i in range(size)],
        "texts": texts or [f"<think>t{i}</think><answer>B</answer>" for i in range(size)],
        "reward": list(reward),
        "by_function": {"accuracy": [float(i) for i in range(size)]},
        "advantage": [0.25] * size,
    }
    return Transcript(position, sample or question(position), **values | changes)


def page_of(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def only_prompt(run_dir):
    ((prompt,),) = [step["prompts"] for step in read_training_gallery(run_dir)["steps"]]
    return prompt


def test_no_rollouts_no_part(tmp_path):
    assert read_training_gallery(tmp_path) is None
    assert HEADING not in page_of(tmp_path)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/.grpo-000001.parquet.partial").write_bytes(b"PAR1")  # of a killed run
    assert HEADING not in page_of(tmp_path)


def test_best_and_worst_come_first(tmp_path):
    write_transcripts(tmp_path, "grpo", 3, [transcript(7)])
    prompt = only_prompt(tmp_path)
    assert (prompt["id"], prompt["position"], prompt["answer"], prompt["left_out"]) == ("q-7", 7, "B", 0)
    best, worst = prompt["extremes"]
    assert (best["name"], best["reward"], best["length"], best["ended"]) == (
        "best: completion 2",
        2.0,
        2,
        False,
    )
    assert best["parts"] == [("think", "<think>t1</think>"), ("answer", "<answer>B</answer>")]
    assert best["figures"] == {"accuracy": 1.0, "advantage": 0.25}
    assert (worst["name"], worst["rank"], worst["reward"]) == ("worst: completion 4", "worst", -1.0)
    assert [(other["name"], other["reward"]) for other in prompt["others"]] == [
        ("completion 1", 0.5), ("completion 3", None)]  # fmt: skip
    page = page_of(tmp_path)
    assert HEADING in page and "grpo step 3<" in page and "position 7<" in page
    assert '<span class="mark right">reward 2.00</span>' in page
    assert '<span class="mark wrong">reward -1.00</span>' in page
    assert page.index("best: completion 2") < page.index("worst: completion 4") < page.index("<details>")
    assert page.index("<details>") < page.index("2 more completions<") < page.index("<b>completion 1</b>")
    assert (
        page.count('2 tokens, <b class="wrong">cut off<') == 1 and "3 tokens<" in page and "no reward" in page
    )
    assert '<span class="chip">accuracy <b>3.00</b></span>' in page
    assert '<span class="chip">advantage <b>0.25</b></span>' in page


@pytest.mark.parametrize(
    ("reward", "names", "others"),
    [
        ([1.0, 1.0, 1.0], ["completion 1", "completion 2"], ["completion 3"]),
        ([None, None], ["completion 1", "completion 2"], []),
        ([None, 3.0, float("nan")], ["completion 2", "completion 1"], ["completion 3"]),
        ([0.0], ["completion 1"], []),
        ([0.0, 1.0], ["best: completion 2", "worst: completion 1"], []),
    ],
)
def test_groups_without_a_best(reward, names, others, tmp_path):
    write_transcripts(tmp_path, "grpo", 1, [transcript(reward=reward)])
    prompt = only_prompt(tmp_path)
    assert [shown["name"] for shown in prompt["extremes"]] == names
    assert [shown["name"] for shown in prompt["others"]] == others
    assert page_of(tmp_path).count("<details>") == bool(others)


def test_images_have_the_names_of_the_prompt(tmp_path):
    write_transcripts(tmp_path, "grpo", 1, [transcript()])
    assert [image.label for image in only_prompt(tmp_path)["images"]] == ["image 1", "A", "B"]
    page = page_of(tmp_path)
    (true,) = re.findall(r'class="candidate true">\s*(<img[^>]*>)', page)
    image = base64.b64encode(png(Image.new("RGB", (20, 10), (0, 100, 7)))).decode()
    assert image in true and page.count(image) == 1
    assert page.count('<img class="tiny"') == 3 and page.count('class="lead"') == 0


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["View (1): ", "Tile C:", "(D) "], ["View (1", "Tile C", "D"]),
        (["", "A\nlong story", "x" * 25], ["image 1", "image 2", "image 3"]),
        (["the marker <image> itself", "A", "B"], ["image 1", "image 2", "image 3"]),
    ],
)
def test_other_ways_to_name_images(names, labels, tmp_path):
    write_transcripts(tmp_path, "grpo", 1, [transcript(sample=question(names=names))])
    assert [image.label for image in only_prompt(tmp_path)["images"]] == labels


def test_a_prompt_without_images_or_answer(tmp_path):
    write_transcripts(tmp_path, "grpo", 1, [transcript(sample=question(names=(), answer=None))])
    page = page_of(tmp_path)
    assert "no true answer" in page and "<img" not in page and '<pre class="prompt">Which tile?</pre>' in page


def test_steps_and_prompts_are_bounded(tmp_path):
    steps = list(range(10, 1000, 10))
    for step in steps:
        write_transcripts(tmp_path, "grpo", step, [transcript(i) for i in range(NUM_PROMPTS + 3)])
    gallery = read_training_gallery(tmp_path)
    shown = [step["step"] for step in gallery["steps"]]
    assert len(shown) == NUM_STEPS and shown == sorted(shown) and (shown[0], shown[-1]) == (10, 990)
    assert max(b - a for a, b in pairwise(shown)) <= 200
    assert gallery["left_out"] == len(steps) - NUM_STEPS
    assert [len(step["prompts"]) for step in gallery["steps"]] == [NUM_PROMPTS] * NUM_STEPS
    page = page_of(tmp_path)
    assert f"{NUM_STEPS} of {len(steps)} recorded steps" in page
    assert page.count("3 more prompts in rollouts/grpo-") == NUM_STEPS
    assert page.index("grpo step 10<") < page.index("grpo step 990<")


def test_completions_images_and_text_are_bounded(tmp_path):
    size, long = 30, "a" * NUM_CHARACTERS
    texts = [long + "b", *["c"] * (size - 2), long]
    sample = question(names=[""] * (NUM_IMAGES + 2))
    reward = [float(i) for i in range(size)]
    write_transcripts(tmp_path, "grpo", 1, [transcript(sample=sample, reward=reward, texts=texts)])
    prompt = only_prompt(tmp_path)
    assert (len(prompt["images"]), prompt["images_left_out"]) == (NUM_IMAGES, 2)
    assert len(prompt["extremes"] + prompt["others"]) == NUM_COMPLETIONS
    assert prompt["left_out"] == size - NUM_COMPLETIONS
    assert prompt["extremes"][0]["parts"] == [("text", long)]
    half = "a" * (NUM_CHARACTERS // 2)
    assert prompt["extremes"][1]["parts"] == [("text", f"{half}\n[… 1 characters left out …]\n{half[1:]}b")]
    page = page_of(tmp_path)
    assert f"a further {size - NUM_COMPLETIONS} in rollouts/grpo-000001.parquet" in page
    assert "2 more images in rollouts/grpo-000001.parquet" in page


def test_large_and_odd_images_become_small_jpegs(tmp_path):
    noise, tiff = Image.effect_noise((2000, 1500), 90), io.BytesIO()
    Image.new("RGB", (30, 20)).save(tiff, "TIFF")
    sample = question(names=["", "", ""], images=[png(noise), tiff.getvalue(), png(noise.resize((512, 900)))])
    write_transcripts(tmp_path, "grpo", 1, [transcript(sample=sample)])
    found = re.findall(r"data:image/jpeg;base64,([^\"]*)", page_of(tmp_path))
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found]
    assert sizes == [(512, 384), (30, 20), (291, 512)]
    assert max(map(len, found)) < 400_000  # of noise


def test_hostile_text_stays_text(tmp_path):
    evil = "\"></pre><script>x</script><img src=x onerror='y'>\0\ud800"
    content = [{"type": "text", "text": evil[:20]}, {"type": "image"}, {"type": "text", "text": evil}]
    images = (Image.new("RGB", (5, 5)),)
    sample = Sample(evil, ({"role": "user", "content": content},), images, answer=evil)
    by_function = {evil: [1.0, 2.0]}
    hostile = transcript(sample=sample, reward=[1.0, 2.0], texts=[evil, evil], by_function=by_function)
    write_transcripts(tmp_path, "grpo", 1, [hostile])
    page = page_of(tmp_path)
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") == 9  # id, prompt twice, image, answer, 2 texts, 2 chips


def test_a_broken_file_is_named(tmp_path):
    path = write_transcripts(tmp_path, "grpo", 2, [transcript()])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"grpo-000002\.parquet: expected the transcripts of a step"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
