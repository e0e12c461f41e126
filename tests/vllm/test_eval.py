"""Evaluation by vLLM: the answers, and so the figures, of the native sampler."""

import json

from geo_r1.data import World, exemplars
from geo_r1.eval.__main__ import main

NUM_QUESTIONS = 12


def test_vllm_answers_as_the_native_sampler_does(lab, tmp_path):
    lab.weights(5)
    for part in (lab.vlm.model, lab.tokenizer, lab.image_processor):
        part.save_pretrained(tmp_path / "model")
    world, rows = World(), []
    for index in range(NUM_QUESTIONS):
        sample = exemplars.question(world, "test", index)
        paths = [f"{index}_{i}.png" for i in range(len(sample.images))]
        for path, image in zip(paths, sample.images, strict=True):
            image.save(tmp_path / path)
        row = {"id": sample.id, "prompt": list(sample.messages), "images": paths, "answer": sample.answer}
        rows.append(row | {"num_choices": 5})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answers(engine):
        options = ["--engine", engine, "--model", str(tmp_path / "model"), "--dtype", "float32"]
        data = ["--data", str(tmp_path / "test.jsonl"), "--max-new-tokens", "12", "--max-tokens", "8192"]
        assert main(["cross-view", *data, *options, "--out", str(tmp_path / engine)]) == 0
        lines = (tmp_path / engine / "answers.jsonl").read_text().splitlines()
        return {row["id"]: (row["text"], row["length"]) for row in map(json.loads, lines)}

    native = answers("native")
    assert len(native) == NUM_QUESTIONS and len(set(native.values())) > 1
    assert answers("vllm") == native
