"""Samples that cannot be used: they end a run before its first step, or are left out, counted and limited."""

import json
import threading
from types import SimpleNamespace

import forked_ranks
import pytest
import small_runs as runs
from PIL import Image

import geo_r1.train.sources
from geo_r1.data.decoding import ImageError
from geo_r1.train.__main__ import main
from geo_r1.train.recipe.load import load_recipe
from geo_r1.train.sources import open_sources

SKIP = {"data__on_bad_sample": "skip", "data__max_bad_share": 0.5}


def spoilt(folder, count=8, cut=(), **changes):
    """A file of rows, some with changed columns and some with a truncated image; returns its path."""
    data = runs.write_dataset(folder, count)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, columns in changes.items():
        rows[int(number[3:])] |= columns
    for number in cut:
        path = folder / "images" / f"cut{number}.jpg"
        Image.effect_noise((280, 280), 90).save(path)
        path.write_bytes(path.read_bytes()[:-9000])
        rows[number]["images"][0] = f"images/cut{number}.jpg"
    return runs.write_rows(data, rows)


def of_file(data, **changes):
    changes = {"sft__data": data, "sft__steps": 4, "sft__batch_size": 4, "grpo__data": data} | changes
    return changes | {"grpo__steps": 4, "eval__data": data}


def wide(folder):
    Image.new("RGB", (2010, 10)).save(folder / "wide.png")
    return "wide.png"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (lambda folder: {"images": ["gone.png"] * 2}, "image {}/gone.png does not exist"),
        (lambda folder: {"images": [wide(folder)] * 2}, "image {}/wide.png is too narrow: 2010 x 10; a side"),
        (lambda folder: {"images": ["."] * 2}, "image {} is not a file: a folder"),
        (lambda folder: {"images": ["data.jsonl"] * 2}, "image {}/data.jsonl is in no known image format: "),
        (lambda folder: {"images": ["http://a/b.png"] * 2}, "an image must be a file, got the address "),
        (lambda folder: {"images": ["a.png"]}, "the prompt marks 2 images but the sample has 1"),
        (lambda folder: {"video": "a.mp4"}, "it has 'video', which is not read: only text and images are"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "grpo", "eval"])
def test_a_bad_sample_ends_a_run_before_its_first_step_by_file_and_row(
    columns, reason, stage, tmp_path, capfd
):
    data = spoilt(tmp_path, row5=columns(tmp_path))
    assert main(runs.arguments(tmp_path / "run", stage, **{f"{stage}__data": data})) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("geo_r1: ")]
    expected = f"geo_r1: {data}, row 6: {reason}".replace("{}", str(tmp_path))
    assert len(said) == 1 and said[0].startswith(expected)
    assert not (tmp_path / "run").exists()


def test_images_stay_inside_the_root_that_a_recipe_names(tmp_path, capfd):
    (tmp_path / "root").mkdir()
    data = spoilt(tmp_path / "root")
    Image.new("RGB", (56, 56)).save(tmp_path / "secret.png")
    changes = {"sft__data": data, "sft__steps": 1, "data__image_root": tmp_path / "root"}
    runs.train(tmp_path / "run", "sft", **changes)
    spoilt(tmp_path / "root", row2={"images": ["images/ground2.png", "../secret.png"]})
    capfd.readouterr()
    assert main(runs.arguments(tmp_path / "fenced", "sft", **changes)) == 2
    assert (
        f"{data}, row 3: image {tmp_path}/root/../secret.png leads outside the root" in capfd.readouterr().err
    )
    del changes["data__image_root"]  # then paths may lead anywhere
    runs.train(tmp_path / "free", "sft", **changes)


def test_bad_samples_are_left_out_and_counted(tmp_path, capfd):
    """Two are found at the start, one when its image is decoded."""
    changes = {"row3": {"images": ["gone.png"] * 2}, "row6": {"prompt": 3}}
    data = spoilt(tmp_path, cut=[1], **changes)
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", "eval", **of_file(data), **SKIP)
    out, err = capfd.readouterr()
    for stage in ("sft", "grpo", "eval"):
        listed = f"(python -m geo_r1.data check lists them; {data}, row 7"
        start = f"geo_r1: {stage}: 2 of 8 samples are bad {listed}"
        assert err.count(f"{start}: 'prompt' must be text or a list of messages, got int 3)") == 1
    assert " ".join(out.split()).count("3 of 8 samples are bad") == 2
    for stage, drawn in (("sft", 16), ("grpo", 8)):
        rows = runs.metrics(run_dir, stage)
        counts = [(row["num_skipped"], row["num_bad_samples"]) for row in rows if "num_skipped" in row]
        assert len(counts) >= drawn // 6 and {*counts} == {(1, 3)}
    summary = json.loads((run_dir / "eval" / "sft" / "summary.json").read_text())
    assert summary["num_samples"] == 6


def test_the_same_samples_are_left_out_by_two_ranks(tmp_path, tiny_model):
    data = spoilt(tmp_path, cut=[1], row3={"images": ["gone.png"] * 2})
    for name in ("one", "ddp"):
        forked_ranks.train(tmp_path / name, "sft", strategy=name, **of_file(data), **SKIP)
    one, two = (runs.metrics(tmp_path / name, "sft") for name in ("one", "ddp"))
    assert [row.get("num_bad_samples") for row in one] == [row.get("num_bad_samples") for row in two]
    assert [row["num_tokens"] for row in one] == [row["num_tokens"] for row in two]
    assert {row.get("num_bad_samples") for row in one} == {None, 2}


@pytest.mark.parametrize("when", ["start", "step"])
def test_too_many_bad_samples_end_a_run(when, tmp_path, capfd):
    gone = {"images": ["gone.png"] * 2}
    data = spoilt(tmp_path, cut=[0, 1], **({"row3": gone, "row4": gone} if when == "start" else {}))
    changes = of_file(data) | SKIP | {"data__max_bad_share": 0.15, "sft__steps": 8}
    assert main(runs.arguments(tmp_path / "run", "sft", **changes)) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("geo_r1: 2 of 8 samples are bad (python -m geo_r1.data check lists them; ")
    assert last.endswith(", more than data.max_bad_share = 0.15")
    assert (tmp_path / "run").exists() == (when == "step")


def test_a_file_of_bad_samples_alone(tmp_path, capfd):
    data = runs.write_rows(tmp_path / "x.jsonl", [{"prompt": 3}] * 2)
    changes = {"sft__data": data, "data__on_bad_sample": "skip", "data__max_bad_share": 1}
    assert main(runs.arguments(tmp_path / "run", "sft", **changes)) == 2
    assert f"geo_r1: {data} holds no good sample: 2 of 2 samples are bad" in capfd.readouterr().err


def test_a_limit_without_skipping_is_refused(tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "sft", data__max_bad_share=0.1)) == 2
    assert 'max_bad_share is for on_bad_sample = "skip"' in capfd.readouterr().err


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"], ["a", "b", "a"]])
def test_ranks_of_a_machine_share_its_images_and_all_agree(hosts, tmp_path, monkeypatch):
    data = spoilt(tmp_path)
    arguments = runs.arguments(tmp_path / "run", "sft", "grpo", **of_file(data), **SKIP)
    recipe, looked = load_recipe(arguments, ""), []
    barrier, board, local = threading.Barrier(len(hosts), timeout=60), {}, threading.local()

    def gather(rank):
        def collect(value):
            board[rank] = value
            barrier.wait()
            values = [board[i] for i in range(len(hosts))]
            barrier.wait()
            return values

        return collect

    monkeypatch.setattr(geo_r1.train.sources.socket, "gethostname", lambda: hosts[local.rank])

    def look(image, owner, root):
        looked.append(image.name)
        if image.name == "ground3.png":
            raise ImageError(owner, "x", "is broken")

    monkeypatch.setattr(geo_r1.train.sources, "check_image", look)
    found = [{} for _ in hosts]

    def run(rank):
        local.rank = rank
        ranks = SimpleNamespace(rank=rank, size=len(hosts), is_main=rank == 0, gather=gather(rank))
        found[rank] = open_sources(recipe, None, {"grpo", "sft"}, ranks)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{view}{number}.png" for view in ("above", "ground") for number in range(8)]
    # 8 questions of two images, which both stages show: each machine looks at each once
    assert sorted(looked) == sorted([*names] * len({*hosts}))
    assert [sources["sft"].size for sources in found] == [7] * len(hosts)
    assert [sources["grpo"].bad for sources in found] == [{f"{data}, row 4": "image x is broken"}] * len(
        hosts
    )
