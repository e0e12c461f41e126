"""The command: where answers come from, resumption, and hostile text in questions and answers."""

import json

import pytest
from chat_server import ChatServer
from PIL import Image

from geo_r1.data import World, exemplars
from geo_r1.data.world import LETTERS
from geo_r1.eval.__main__ import main
from geo_r1.eval.benchmark import broken_down, wilson_interval
from geo_r1.eval.map import draw_map
from geo_r1.eval.table import markdown
from geo_r1.models.tiny import build_tiny

HOSTILE = "<script>alert(1)</script>|x\n# [a](javascript:1)"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine questions: three each of 3, 4 and 5 tiles, in three cities of which one is hostile."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    for index in range(9):
        world = World(num_candidates=3 + index % 3)
        sample = exemplars.question(world, "test", index)
        paths = [f"{index}_{i}.png" for i in range(len(sample.images))]
        for path, image in zip(paths, sample.images, strict=True):
            image.save(folder / path)
        prompt = [{"role": "user", "content": f"[q{index}] " + "<image>" * len(paths)}]
        row = {"id": f"q{index}", "prompt": prompt, "images": paths, "answer": sample.answer}
        row |= {"num_choices": world.num_candidates, "city": (HOSTILE, "Oslo", "Lima")[index // 3]}
        row |= {"confusers": "nearest" if index % 2 else "global", "difficulty": float(index)}
        rows.append(row | {"latitude": 10.0 * index - 40, "longitude": 179.0 - index})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "test.jsonl", {row["id"]: row["answer"] for row in rows}


def evaluate(out, *arguments):
    code = main(["cross-view", "--out", str(out), *map(str, arguments)])
    return code, json.loads((out / "summary.json").read_text()) if (out / "summary.json").exists() else None


def evaluate_predictions(folder, data, texts, *arguments):
    """Texts by the id of their question, or the content of a file."""
    if not isinstance(texts, str):
        texts = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items())
    (folder / "p.jsonl").write_text(texts)
    return evaluate(folder / "out", "--data", data[0], "--predictions", folder / "p.jsonl", *arguments)


def test_somebodys_answers_are_scored_and_broken_down(data, tmp_path):
    texts = {i: f"<think>x</think><answer>{a}</answer>" for i, a in data[1].items() if i != "q0"}
    code, summary = evaluate_predictions(tmp_path, data, texts | {"q1": "not A"})
    assert code == 0
    assert (summary["num_samples"], summary["accuracy"], summary["answered"]) == (9, 7 / 9, 7 / 9)
    assert summary["accuracy_interval"] == list(wilson_interval(7, 9))
    assert summary["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert {k: row["accuracy"] for k, row in summary["by_k"].items()} == {"3": 2 / 3, "4": 2 / 3, "5": 1.0}
    counts = {k: row["num_samples"] for k, row in summary["by_confusers"].items()}
    assert counts == {"global": 5, "nearest": 4}
    assert list(summary["by_difficulty"]) == ["3 to 6", "6 and above", "below 3"]
    assert summary["by_difficulty"]["below 3"]["accuracy"] == pytest.approx(1 / 3)
    assert summary["by_city"]["Oslo"]["accuracy"] == 1.0


def test_no_answers_at_all_are_all_wrong(data, tmp_path):
    code, summary = evaluate_predictions(tmp_path, data, {})
    assert (code, summary["accuracy"], summary["answered"], summary["num_samples"]) == (0, 0.0, 0.0, 9)
    assert summary["completion_length"] is None


def test_a_csv_of_answers_serves_too(data, tmp_path):
    lines = [f'{i},"<answer>{a}</answer>"' for i, a in data[1].items()]
    (tmp_path / "p.csv").write_text("\n".join(["ID,Prediction", *lines]))
    summary = evaluate(tmp_path / "out", "--data", data[0], "--predictions", tmp_path / "p.csv")[1]
    assert summary["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "other", "text": "A"}\n', "answers none of these questions: its ids are such as 'other'"),
        ('{"id": "q0", "text": "A"}\n' * 2, "row 2: 'q0' is answered twice"),
        ('{"text": "A"}\n', "row 1: needs an id"), ('{"id": "q0"}\n', "row 1: needs an id"),
        (
            '{"id": "q0", "prediction": "A", "response": "B"}\n',
            "which is the answer, prediction or response?",
        ),
        ('{"id": "q0", "answer": "A"}\n', "row 1: needs an id"),  # which is mostly the truth
        ("[1]\n", "row 1: expected an object"), ("{\n", "line 1: broken JSON"),
        ('{"id": "q0", "text": "' + "A" * 2**24 + '"}\n', "line 1: longer than 16 MiB"),
    ],
)  # fmt: skip
def test_malformed_answers_are_one_line_and_exit_code_2(data, tmp_path, capsys, content, message):
    code, summary = evaluate_predictions(tmp_path, data, content)
    error = capsys.readouterr().err
    assert (code, summary) == (2, None)
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nobody to ask: give --model"),
        (["--url", "http://localhost:1"], "--engine endpoint needs --model"),
        (["--engine", "vllm"], "--engine vllm needs --model"),
        (["--model", "/nowhere"], "model /nowhere cannot be loaded"),
        (["--model", "m", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--model", "m", "--max-pixels", "-5"], "--max-pixels must be at least 1, got -5"),
        (["--url", "http://a:1", "--model", "m", "--temperature", "9"], "--temperature must be from 0"),
    ],
)  # fmt: skip
def test_who_answers_must_be_said(data, tmp_path, capsys, arguments, message):
    assert evaluate(tmp_path / "out", "--data", data[0], *arguments)[0] == 2
    assert message in capsys.readouterr().err


def test_an_endpoint_is_asked_once_and_its_failures_again(data, tmp_path):
    path, answers = data

    def reply(name):
        return f"<think>{HOSTILE}</think><answer>{answers[name]}</answer>"

    with ChatServer({"q4": [400, "answer"]}, reply) as server:
        arguments = ["--data", path, "--url", server.url, "--model", "m", "--concurrency", 3]
        first = evaluate(tmp_path / "out", *arguments)[1]
        second = evaluate(tmp_path / "out", *arguments)[1]
    assert (first["accuracy"], first["failed"]) == (8 / 9, 1)
    assert (second["accuracy"], second["failed"], second["completion_length"]) == (1.0, 0, 10.0)
    assert {name: server.asked[name] for name in answers} == {name: 1 + (name == "q4") for name in answers}


def test_failures_are_told_and_nothing_but_failures_is_an_error(data, tmp_path, capsys):
    path, answers = data
    with ChatServer({name: [400] for name in answers if name != "q4"}) as server:
        arguments = ["--data", path, "--url", server.url, "--model", "m"]
        assert evaluate(tmp_path / "some", *arguments)[0] == 0
        told = " ".join(capsys.readouterr().err.split())
        assert "8 of 9 were not answered, such as 'q0': " in told and "the same command asks again" in told
        assert evaluate(tmp_path / "none", *arguments, "--limit", 4)[0] == 2
        assert "4 of 4 were not answered" in capsys.readouterr().err


def test_answers_are_found_by_the_names_of_their_images_and_may_be_null(data, tmp_path, capsys):
    texts = {"q0.jpg": None, "q1.png": f"<answer>{data[1]['q1']}</answer>"}
    lines = "".join(json.dumps({"image_file": name, "text": text}) + "\n" for name, text in texts.items())
    code, summary = evaluate_predictions(tmp_path, data, lines)
    assert (code, summary["accuracy"], summary["failed"]) == (0, 1 / 9, 7)
    assert "7 of 9 were not answered, such as 'q2': not in" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_folder_that_does_not_say_how_it_was_made_is_refused(data, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text(content)
    assert evaluate_predictions(tmp_path, data, {})[0] == 2
    assert "give another --out" in capsys.readouterr().err


def test_the_native_sampler_goes_on_where_it_was_stopped(data, tmp_path):
    names = " ".join(f"[q{i}]" for i in range(9))
    words = ["user\n", "assistant\n", names, "<think> </think>", *LETTERS]
    model, tokenizer, image_processor = build_tiny(words, hidden_size=64, num_layers=1)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(tmp_path / "model")
    arguments = ["--data", data[0], "--model", tmp_path / "model", "--max-new-tokens", 5]
    whole = evaluate(tmp_path / "whole", *arguments)[1]
    evaluate(tmp_path / "parts", *arguments)
    lines = (tmp_path / "parts" / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 9
    (tmp_path / "parts" / "answers.jsonl").write_text("".join(lines[:4]) + lines[4][:7])  # torn by a kill
    assert evaluate(tmp_path / "parts", *arguments)[1] == whole
    again = (tmp_path / "parts" / "answers.jsonl").read_text().splitlines(keepends=True)
    assert sorted(again) == sorted(lines)


def test_another_models_folder_is_not_gone_on_with(data, tmp_path, capsys):
    evaluate_predictions(tmp_path, data, {})
    assert evaluate_predictions(tmp_path, data, {}, "--limit", 3)[0] == 2
    assert "was made with questions = " in capsys.readouterr().err


def test_strangers_text_is_harmless_in_the_table_and_on_the_terminal(data, tmp_path, capsys):
    evaluate_predictions(tmp_path, data, dict.fromkeys(data[1], HOSTILE), "--name", "[red]x\x1b[31m|<b>")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "<script>" not in table and "<b>" not in table and "\x1b" not in table
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|x \\# \\[a\\](javascript:1)" in table
    assert "[red]x" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "map.png") as image:
        assert image.size[0] > 1000


def test_a_map_joins_true_places_to_answers_the_short_way_round():
    def record(longitude, to, distance):
        predicted = {"predicted_latitude": 20.0, "predicted_longitude": to, "distance_km": distance}
        return {"latitude": 10.0, "longitude": longitude, **predicted}

    missed = {"latitude": 1.0, "longitude": 2.0, "distance_km": None}
    figure = draw_map([record(179.0, -179.0, 1100.0), record(0.0, 5.0, 1200.0), missed])
    [lines] = [c for c in figure.axes[0].collections if hasattr(c, "get_segments")]
    assert [segment.tolist() for segment in lines.get_segments()] == [
        [[179.0, 10.0], [181.0, 20.0]],
        [[-181.0, 10.0], [-179.0, 20.0]],
        [[0.0, 10.0], [5.0, 20.0]],
    ]
    assert draw_map([]) is None and draw_map([{"correct": True}]) is None


def test_groups_come_in_order_and_without_those_that_have_no_key():
    records = [{"k": k} for k in (10, 3, None, 3)]
    groups = broken_down(records, lambda r: r["k"], lambda rs: {"n": len(rs)})
    assert groups == {"3": {"n": 2}, "10": {"n": 1}}


def test_a_table_has_the_published_rows_beside_ours():
    from geo_r1.eval.geolocation import BENCHMARK

    summary = {"within": {"1": 0.5}, "median_km": 12.345, "answered": 1.0, "num_samples": 2}
    lines = markdown(BENCHMARK, "ours", summary).splitlines()
    assert lines[4] == "| ours | 50.00% |  |  |  |  | 12.35 |  |  | 100.00% |  | 2 |"
    assert lines[5] == "| Geo-R1 | 17.98% | 61.02% | 73.91% | 86.78% | 93.56% |  |  |  |  |  |  |"
