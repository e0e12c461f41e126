"""Loading by position: the same bits with any number of workers, and what happens when something breaks."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import loader_cases
import pytest
import torch
from data_cases import encoded, make_image
from loader_cases import CountingEncoder, deadly_source, encoder, sample

from geo_r1.data import PromptLoader, World
from geo_r1.data.exemplars import Numbered, chain_of_thought
from geo_r1.data.source import Source
from geo_r1.data.workers import send

WORLD = Source(Numbered(chain_of_thought, World(num_candidates=3), "train", 100, {"careless": 0.5}), None)


def files(tmp_path):
    """Prompts of paths, bytes and images; some have many, one is large, one has none, tiles are shared."""
    tile, photo = make_image(56, 56, 1), make_image(500, 500, 2)
    tile.save(tmp_path / "tile.png")
    photo.save(tmp_path / "photo.jpg")
    path, data = tmp_path / "tile.png", encoded(make_image(90, 61, 3), "JPEG")
    return [
        sample("a", path, tmp_path / "photo.jpg"),
        sample("b", data, path, data, tile),
        sample("many", *[path, data] * 12),
        sample("large", tmp_path / "photo.jpg", *[make_image(224, 224, seed) for seed in range(9)]),
        sample("text"),
    ]


def same(got, expected):
    if got is None or expected is None:
        return got is expected
    (sample, g), (other, e) = got, expected
    assert (sample.id, sample.response) == (other.id, other.response)
    assert [g.token_ids, g.image_rows, g.image_grids] == [e.token_ids, e.image_rows, e.image_grids]
    assert torch.equal(g.position_ids, e.position_ids)
    assert (g.pixel_values is None) == (e.pixel_values is None)
    return g.pixel_values is None or torch.equal(g.pixel_values, e.pixel_values)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 22])
def test_the_same_bits_with_any_number_of_workers(tmp_path, num_workers, cache_bytes):
    finite = Source.of(files(tmp_path))
    for source in (finite, WORLD):
        expected = PromptLoader(source, encoder(), seed=5).load(range(12))
        options = {"num_workers": num_workers, "cache_bytes": cache_bytes}
        with PromptLoader(source, encoder(), seed=5, **options) as loader:
            got = loader.load([0, 1, 2], [[3, 4], [5, 99]])  # 99: announced, never asked for
            got += loader.load([3, 4], [[7, 8]])  # and a guess that was wrong
            got += loader.load([5, 6, 7, 8, 9, 10, 11])
            assert loader.load([]) == []
            assert all(same(g, e) for g, e in zip(got, expected, strict=True))
            if source is finite:
                assert all(g[0] is e[0] for g, e in zip(got, expected, strict=True))
            assert len(got) == 12 and None not in got
        if source is finite:
            assert {sample.id: len(prompt.image_grids) for sample, prompt in got} == {
                "a": 2, "b": 4, "many": 24, "large": 10, "text": 0,
            }  # fmt: skip
            shared = [prompt.pixel_values.is_shared() for sample, prompt in got if sample.id == "large"]
            assert shared and all(shared)


def test_a_position_may_be_asked_for_twice():
    with PromptLoader(WORLD, encoder(), seed=0, num_workers=1) as loader:
        first, again, other = loader.load([4, 4, 5], [[4]])
        assert same(first, again) and first[0].id == "train-104" and other[0].id == "train-105"
        assert same(loader.load([4])[0], first)


def test_shared_tiles_are_decoded_once(tmp_path):
    make_image(100, 60).save(tmp_path / "tile.png")
    tile = tmp_path / "tile.png"
    source = Source.of([sample(str(i), tile, make_image(56, 56, 1 + i), tile) for i in range(3)])
    for num_workers in (0, 1):
        options = {"seed": 0, "num_workers": num_workers, "cache_bytes": 1 << 20}
        with PromptLoader(source, encoder(CountingEncoder), **options) as loader:
            assert [prompt.sample_id for _, prompt in loader.load(range(3))][-1] == "5 hits, 4 misses"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_long_prompts_are_skipped(num_workers):
    samples = [sample(str(i), *[make_image(56, 56, i)] * (1 + 8 * (i == 1))) for i in range(3)]
    options = {"max_prompt_tokens": 60}
    source = replace(Source.of(samples), difficulty=(0, 1, 2))
    with PromptLoader(
        source, encoder(on_overlong="skip", **options), seed=0, num_workers=num_workers
    ) as loader:
        first, none, last = loader.load([0, 1, 2])
        assert none is None and (first[0].id, last[0].id) == ("0", "2")
    with (
        PromptLoader(source, encoder(**options), seed=0, num_workers=num_workers) as loader,
        pytest.raises(ValueError, match=r"^sample 1: the prompt has .* the budget is 60") as caught,
    ):
        loader.load([0, 1, 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_the_same_line(tmp_path, num_workers):
    whole = encoded(make_image(64, 64))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    samples = [sample("good", whole), sample("bad", tmp_path / "cut.png"), sample("good", whole)]
    source = replace(Source.of(samples), difficulty=(0, 1, 2))
    with PromptLoader(source, encoder(), seed=0, num_workers=num_workers) as loader:
        assert loader.load([0], [[1, 2]])[0][0].id == "good"  # nobody has asked for the broken one yet
        with pytest.raises(ValueError) as caught:
            loader.load([1, 2])
        found = f"sample bad: image {tmp_path}/cut.png cannot be read: image file is truncated"
        assert str(caught.value).startswith(found) and "\n" not in str(caught.value)
        assert loader.load([2])[0][0].id == "good"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_worker_is_an_error_that_says_what_to_do(num_workers):
    before = {child.pid for child in active_children()}
    with PromptLoader(deadly_source(3), encoder(), seed=0, num_workers=num_workers) as loader:
        assert loader.load([0, 1], [[2]])[1][0].id == "1"
        for _ in range(2):
            with pytest.raises(ValueError, match=r"exit code -9.*lower data\.num_workers") as caught:
                loader.load([2, 3, 4], [[5, 6]])
            assert "\n" not in str(caught.value)
    assert {child.pid for child in active_children()} <= before


def test_a_worker_that_dies_while_idle_is_an_error_too():
    before = {child.pid for child in active_children()}
    with PromptLoader(WORLD, encoder(), seed=0, num_workers=1) as loader:
        loader.load([0])
        [worker] = [child for child in active_children() if child.pid not in before]
        worker.kill()
        worker.join()
        with pytest.raises(ValueError, match="exit code -9"):
            loader.load([1])
    assert {child.pid for child in active_children()} <= before


@pytest.mark.parametrize("text", ["short", "long" * 100_000])  # the second does not fit into a pipe
def test_a_worker_that_hangs_is_named_and_killed(text):
    before = {child.pid for child in active_children()}
    source = Source.of([sample(name, text=text) for name in "abc"])
    with PromptLoader(source, encoder(), seed=0, num_workers=1, timeout=30.0) as loader:
        [worker] = [child for child in active_children() if child.pid not in before]
        first = loader.load([0])[0][0].id  # starting takes a while
        loader._workers.timeout = 2.0
        time.sleep(6)  # an idle one is never late
        os.kill(worker.pid, signal.SIGSTOP)
        [waiting] = {*"abc"} - {first, loader._draw(2).id}
        with pytest.raises(ValueError, match=rf"not answered for 2 s .* or sample {waiting} takes for ever$"):
            loader.load([1])
        with pytest.raises(ValueError, match="not answered for 2 s"):
            loader.load([2])
    assert {child.pid for child in active_children()} <= before


def test_closing_ends_the_workers_in_the_middle_of_work():
    before = {child.pid for child in active_children()}
    loader = PromptLoader(WORLD, encoder(), seed=0, num_workers=2)
    loader.load([0], [range(1, 200)])
    assert {child.pid for child in active_children()} > before
    loader.close()
    assert {child.pid for child in active_children()} <= before
    PromptLoader(WORLD, encoder(), seed=0, num_workers=2).close()  # none had started


def test_signals_are_for_the_main_process_and_its_death_ends_the_workers():
    command = [sys.executable, "-c", "import loader_cases; loader_cases.killed_run()"]
    folder = Path(loader_cases.__file__).parent
    scratch = tempfile.TemporaryDirectory()  # not tmp_path: the name of a socket must be short
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder.parents[1]}", "TMPDIR": scratch.name}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        scratch,
        subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes) as run,
    ):
        received, ids, workers, served = json.loads(run.stdout.readline() or run.stderr.read())
        assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        assert ids == ["train-2", "train-3", "train-4"]
        assert workers and all(served)  # the server, too, got none of the signals
        handles = [os.pidfd_open(pid) for pid in workers]
        try:
            run.stdin.write("\n")
            run.stdin.flush()
            assert run.wait(60) == -signal.SIGKILL
            for handle in handles:  # readable once the process has ended
                assert select.select([handle], [], [], 60)[0]
        finally:
            for handle in handles:
                os.close(handle)


def test_no_room_in_shared_memory_says_what_to_do(monkeypatch):
    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )

    [(_, prompt)] = PromptLoader(
        Source.of([sample("x", *[make_image(224, 224)] * 9)]), encoder(), seed=0
    ).load([0])
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(
        ValueError, match=r"^sample x: no shared memory for 10 MiB of pixels; give /dev/shm more"
    ):
        send(None, (None, prompt))


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no such role') }}", "refuses the messages: no such role"),
        ("{{ messages[9].content }}", "refuses the messages: list object has no element 9"),
        ("{{ 1 // 0 }}", "refuses the messages: integer division or modulo by zero"),
        ("{{ 'a' + 1 }}", 'refuses the messages: can only concatenate str (not "int") to str'),
        ("{% for i in range(10**9) %}a{% endfor %}", "refuses the messages: Range too big."),
        ("{{ 'a' * 10**15 }}", "takes all memory"),
        ("{{ 'a' * 20000000 }}", "makes 20,000,000 characters of the messages, more than 16,777,216"),
        (ENDLESS, "has not ended after 1 s of computing"),
    ],
)
def test_a_chat_template_with_a_mistake_is_one_line(template, reason, monkeypatch):
    monkeypatch.setattr("geo_r1.models.chat.MAX_SECONDS", 1)
    with_template = encoder()
    with_template.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"^sample x: the chat template ") as caught:
        with_template.encode(sample("x"))
    assert reason in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_skipped_with_their_reasons(tmp_path, num_workers):
    (tmp_path / "cut.png").write_bytes(encoded(make_image(64, 64))[:300])
    bad = [sample("cut", tmp_path / "cut.png"), sample("narrow", make_image(2010, 10))]
    bad += [
        sample("mark", text="<|image_pad|>"),
        replace(sample("row", tmp_path / "no.png"), where="x, row 3"),
    ]
    source = replace(Source.of([*bad, sample("good")]), difficulty=(0, 1, 2, 3, 4))
    skipping = encoder(on_bad_sample="skip")
    with PromptLoader(source, skipping, seed=0, num_workers=num_workers) as loader:
        assert [item and item[0].id for item in loader.load(range(5))] == [None, None, None, None, "good"]
        assert [*loader.bad] == ["cut", "narrow", "mark", "x, row 3"]
        assert loader.bad["cut"].startswith(f"sample cut: image {tmp_path}/cut.png cannot be read: ")
        assert "absolute aspect ratio must be smaller than 200" in loader.bad["narrow"]
        assert loader.bad["x, row 3"] == f"sample row: image {tmp_path}/no.png does not exist"


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_prompts_have_no_images_from_outside_their_root(tmp_path, cache_bytes):
    make_image(56, 56).save(tmp_path / "x.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").symlink_to("../x.png")
    fenced = replace(sample("x", tmp_path / "in" / "x.png"), image_root=tmp_path / "in")
    with (
        PromptLoader(Source.of([fenced]), encoder(), seed=0, cache_bytes=cache_bytes) as loader,
        pytest.raises(ValueError, match=r"x\.png leads outside the root: "),
    ):
        loader.load([0])
