"""The command `cot`: its output, the key that it keeps to itself, and one line for each mistake."""

import io
import json
import re
from datetime import date

import numpy as np
import pytest
from chat_server import ChatServer, closed_port, completion
from cot_cases import arguments, card, dataset, files, make_image, run
from data_cases import KEY, ends_with, lines, write

from geo_r1.data import Sample, load_image, read_samples
from geo_r1.data.teaching import cot, cot_output

pytestmark = pytest.mark.usefixtures("no_waits")


# Output


def test_a_sample_is_its_training_row_and_the_teachers_words(tmp_path, capsys):
    data, out = dataset(tmp_path, 3, latitude=38.7), tmp_path / "made" / "here" / "cot.jsonl"
    with ChatServer(reply=lambda name: f"<think>{name}</think><answer>B</answer>") as server:
        run(server, data, out, "--price-in", "2", "--price-out", "10", "--seed", "3")
    rows = {row["id"]: row for row in lines(out)}
    assert rows["s1"] == {
        "id": "s1",
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "[s1] which tile?"}]}
        ],
        "images": ["../../data/images/1.png"],
        "response": "<think>s1</think><answer>B</answer>",
        "answer": "B",
        "num_choices": 5,
        "city": "Lisbon",
        "latitude": 38.7,
        "teacher": "teach",
        "usage": {"input_tokens": 100, "output_tokens": 10},
    }
    samples = read_samples(out)
    assert [load_image(s.images[0], s.id).size for s in samples] == [(9, 7)] * 3
    assert samples[0].metadata["city"] == "Lisbon"
    made = card(out)
    assert len(made.pop("prompt_sha256")) == 64
    assert made == {
        "teacher": "endpoint",
        "model": "teach",
        "url": server.url,
        "temperature": None,
        "max_tokens": 2048,
        "max_pixels": None,
        "num_samples": 3,
        "num_failed": 0,
        "input_tokens": 300,
        "output_tokens": 30,
        "cost_usd": pytest.approx(0.0009),
    }
    assert capsys.readouterr().out == f"{out}: 3 samples, 330 tokens, 0.00 USD, 0 failed\n"


def test_the_teacher_sees_images_question_answer_and_place(tmp_path):
    data = dataset(tmp_path, 1, country="PT", latitude=38.72, longitude=-9.14, driving_side="right", mood="x")
    with ChatServer() as server:
        run(server, data, tmp_path / "cot.jsonl", "--max-pixels", "20")
    [(_, body, _)] = server.requests
    [message] = body["messages"]
    kinds = [part["type"] for part in message["content"]]
    asked = message["content"][2]["text"]
    assert kinds == ["image_url", "text", "text"] and message["content"][1]["text"] == "[s0] which tile?"
    assert (
        "- right answer: B\n- city: Lisbon\n- country: PT\n- latitude: 38.72\n- longitude: -9.14\n" in asked
    )
    assert "- driving side: right\n" in asked and "mood" not in asked and asked.endswith("<answer>B</answer>")
    steps = ["Visual cues:", "Knowledge association:", "Evidence corroboration:", "Conclusion:"]
    assert re.findall(r"^(?:Vis|Kno|Evi|Con)[^:]*:", asked, re.MULTILINE) == steps * 2


def test_a_prompt_of_ones_own_is_filled_in_once(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{metadata} {answer} {other} {0} {answer.__class__} {{answer}}")
    sample = Sample(
        "x", ({"role": "user", "content": []},), answer="{metadata}", metadata={"city": "a\nb {answer}"}
    )
    assert cot.fill(prompt.read_text(), sample) == (
        "- city: a b {answer} {metadata} {other} {0} {answer.__class__} {{metadata}}"
    )
    data = dataset(tmp_path, 1)
    with ChatServer() as server:
        run(server, data, tmp_path / "cot.jsonl", "--prompt", prompt)
    assert "- city: Lisbon B {other}" in json.dumps(server.requests[0][1])


def test_embedded_images_become_files(tmp_path):
    data = (tmp_path / "0.png", tmp_path / "1.jpg")
    encoded = [make_image(path).read_bytes() for path in data]
    rows = [
        {
            "id": name,
            "prompt": "<image><image>[s] which?",
            "images": [{"bytes": b, "path": None} for b in encoded],
            "answer": "A",
            "taken": date(2020, 1, 2),
        }
        for name in ("s", "../../s")
    ]
    write(tmp_path / "train.parquet", rows)
    out = tmp_path / "out" / "cot.jsonl"
    with ChatServer() as server:
        run(server, tmp_path / "train.parquet", out)
    written = {row["id"]: row for row in lines(out)}
    assert written["s"]["images"] == ["cot_images/s_0.png", "cot_images/s_1.jpeg"]
    assert written["s"]["taken"] == "2020-01-02"
    assert [(out.parent / name).read_bytes() for name in written["s"]["images"]] == encoded
    assert all(
        re.fullmatch(r"cot_images/[0-9a-f]{32}_\d\.\w+", name) for name in written["../../s"]["images"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.jpg", "train.parquet", "out"}


def test_the_worlds_teacher_writes_without_an_endpoint(tmp_path, capsys):
    out = tmp_path / "world.jsonl"
    command = ("--teacher", "world", "--out", out, "--num")
    cot.command(arguments(*command, 3))
    first = out.read_bytes()
    cot.command(arguments(*command, 5))
    assert out.read_bytes().startswith(first)
    samples = read_samples(out)
    assert len({sample.id for sample in samples}) == 5
    for sample in samples:
        assert f"<answer>{sample.answer}</answer>" in sample.response
        assert sample.metadata["teacher"] == "world" and "city" in sample.metadata
        assert all(image.parent == tmp_path / "world_images" for image in sample.images)
        assert load_image(sample.images[0], sample.id).mode == "RGB"
    assert card(out)["num_samples"] == 5
    assert capsys.readouterr().out.endswith("world.jsonl: 5 samples, 0 tokens, 0 failed\n")
    again = f"{out} was made with seed 0, not 1: choose another --out"
    ends_with(again, lambda: cot.command(arguments(*command, 5, "--seed", 1)))


# The key


def test_the_key_is_nowhere(tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    data, out = dataset(tmp_path, 3), tmp_path / "out" / "cot.jsonl"
    body = json.dumps({"error": {"message": f"you sent {KEY}"}}).encode()
    with ChatServer({"s0": [(400, {}, body)], "s1": [completion(f"I know {KEY}")]}) as server:
        run(server, data, out, "--concurrency", "1")
        server.script["s9"] = [(401, {}, body)]
        more = write(tmp_path / "data" / "more.jsonl", [{"id": "s9", "prompt": "[s9]", "answer": "A"}])
        ends_with(f"{server.url}, model 'teach': status 401: you sent [key]", lambda: run(server, more, out))
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers in server.requests)
    for path in out.parent.iterdir():
        assert KEY not in path.read_text(), path
    assert KEY not in caplog.text + "".join(capfd.readouterr())


# Mistakes


def test_another_model_or_prompt_does_not_go_on_with_a_file(tmp_path):
    data, out, prompt = dataset(tmp_path, 1), tmp_path / "cot.jsonl", tmp_path / "prompt.txt"
    prompt.write_text("why {answer}?")
    with ChatServer() as server:
        run(server, data, out)
        ends_with(
            f"{out} was made with model 'teach', not 'other': choose another --out",
            lambda: run(server, data, out, "--model", "other"),
        )
        with pytest.raises(ValueError, match=f"^{out} was made with prompt_sha256 '"):
            run(server, data, out, "--prompt", prompt)
        out.with_suffix(".card.json").write_text("[]")
        ends_with(
            f"{out} has no readable cot.card.json, which says how it was made: choose another --out",
            lambda: run(server, data, out),
        )
        out.write_text("")
        run(server, data, out, "--model", "other")
    assert card(out)["model"] == "other"


def test_another_question_of_the_same_id_is_not_taken_for_answered(tmp_path):
    data, out = dataset(tmp_path, 3), tmp_path / "cot.jsonl"
    with ChatServer() as server:
        run(server, data, out)
        rows = lines(data)
        rows[1]["answer"] = "C" if rows[1]["answer"] != "C" else "D"
        write(data, rows)
        named = f"{out}: sample 's1' was another question: choose another --out"
        ends_with(named, lambda: run(server, data, out))
    assert len(server.requests) == 3


def test_mistakes_are_one_line(tmp_path):
    data, out, url = dataset(tmp_path, 1), tmp_path / "cot.jsonl", closed_port()
    bare = write(tmp_path / "bare.jsonl", [{"id": "s0", "prompt": "where?"}])
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    long = tmp_path / "long.txt"
    long.write_text("x" * (2**20 + 1))
    for message, more in [
        (f"{bare}: sample s0 has no answer to tell the teacher", ("--data", bare)),
        (f"--out {data} is --data itself: choose another", ("--out", data)),
        (f"--out {tmp_path / 'x.json'} must end in .jsonl", ("--out", tmp_path / "x.json")),
        ("--limit must be at least 1, got 0", ("--limit", 0)),
        ("--max-pixels must be at least 1, got -4", ("--max-pixels", -4)),
        ("--price-in must be at least 0, got nan", ("--price-in", "nan")),
        (f"--prompt {broken} is not UTF-8: byte 3", ("--prompt", broken)),
        (
            f"--prompt {tmp_path / 'gone'} cannot be read: No such file or directory",
            ("--prompt", tmp_path / "gone"),
        ),
        (f"--prompt {long} must hold from 1 byte to 1 MiB of text", ("--prompt", long)),
        (
            f"--prompt {tmp_path / 'empty.txt'} must hold from 1 byte to 1 MiB of text",
            ("--prompt", tmp_path / "empty.txt"),
        ),
        (f"data file {tmp_path / 'no.jsonl'} does not exist", ("--data", tmp_path / "no.jsonl")),
        ("an endpoint needs --url and --model", ("--url", "")),
        (
            "--teacher world makes its own samples and asks nobody: leave out --data and --url",
            ("--teacher", "world"),
        ),
    ]:
        ends_with(message, lambda more=more: run(url, data, out, *more))
    with pytest.raises(ValueError, match=f"^{url}/v1 cannot be reached"):
        run(url, data, out)
    assert files(out) == ([], [])


def test_the_figures_of_a_bar(tmp_path, monkeypatch):
    said = io.StringIO()
    console = cot_output.Console(file=said, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(cot_output, "Console", lambda stderr: console)
    data = dataset(tmp_path, 4)
    with ChatServer({"s2": [400]}) as server:
        run(server, data, tmp_path / "cot.jsonl", "--price-out", "1000")
    last = said.getvalue().split("\r")[-1] + said.getvalue().split("\n")[-2]
    assert "chains of thought" in last and "4/4" in last
    assert re.search(r"/s, 330 tokens, 0\.03 USD, 1 failed", last)


def test_images_may_be_anywhere(tmp_path):
    elsewhere = make_image(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "link.png"
    link.symlink_to(elsewhere)
    rows = [{"id": "s0", "prompt": "[s0]", "images": [str(elsewhere)], "answer": "A"}]
    rows.append({"id": "s1", "prompt": "[s1]", "images": ["link.png"], "answer": "A"})
    out = tmp_path / "out" / "cot.jsonl"
    with ChatServer() as server:
        run(server, write(tmp_path / "data" / "train.jsonl", rows), out)
    assert [row["images"] for row in lines(out)] == [["../elsewhere/x.png"]] * 2
    assert np.asarray(load_image(read_samples(out)[1].images[0], "s1"))[0, 0].tolist() == [9, 99, 9]
