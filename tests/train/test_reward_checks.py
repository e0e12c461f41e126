"""Rewards in a run: checks before it, warnings about idle ones, and functions that fail in its middle."""

import json
import os
import shutil
import signal

import pytest
import small_runs as runs
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoTokenizer

from geo_r1.rollout import Completion
from geo_r1.train.__main__ import main
from geo_r1.train.report.log import Log
from geo_r1.train.rl import rehearsal, rollout_engines
from geo_r1.train.rl.metrics import idle_rewards
from geo_r1.train.stages import sft
from geo_r1.train.stages.sft import share_out

HERE = "test_reward_checks"
CALLS = []  # the arguments of each call


def later(act):
    """A reward function that acts from its second call on; the first is the rehearsal."""

    def reward(completions, completion_ids, **columns):
        CALLS.append({"completions": completions, "completion_ids": completion_ids, **columns})
        if len(CALLS) > 1:
            act()
        return runs.spread(completion_ids)

    return reward


leaves = later(lambda: exec("raise SystemExit(0)"))
hangs = later(signal.pause)
asks_to_stop = later(lambda: os.kill(os.getpid(), signal.SIGTERM))
watches = later(lambda: None)


async def judges(completions, completion_ids, **_):
    return runs.spread(completion_ids)


def spoils(completions, completion_ids, prompts, **_):
    values = runs.spread(completion_ids)
    for ids, messages, prompt in zip(completion_ids, completions, prompts, strict=True):
        ids[:] = [0] * len(ids)
        messages[0]["content"] = prompt[0]["content"] = ""
    return values


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()


@pytest.fixture
def said(monkeypatch):
    """The lines that a run prints."""
    lines = []
    monkeypatch.setattr(Log, "say", lambda self, text: lines.append(text))
    return lines


def rewards(*names, **changes):
    return {"rewards__functions": list(names), **changes}


def error_of(tmp_path, capfd, *names, **changes):
    """The line in which a run of GRPO ends."""
    capfd.readouterr()
    assert main(runs.arguments(tmp_path / "run", "grpo", **rewards(*names, **changes))) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("geo_r1: "), err
    return err.removeprefix("geo_r1: ").rstrip("\n")


BAD_ANSWERS = [
    (["accuracy"], {"answer": "F"}, "the answer is 'F', expected one of the first 2 letters (num_choices 2)"),
    (["length"], {"answer": "F", "num_choices": None}, "the answer is 'F', expected one of the first 5"),
    (["accuracy"], {"num_choices": "2"}, "num_choices is '2', expected an integer from 2 to 26"),
    (["accuracy"], {"answer": " "}, "the answer is empty; null stands for none"),
    (
        ["format", "accuracy"],
        {"answer": "<answer>A</answer>"},
        "the answer is '<answer>A</answer>', which no",
    ),
]


@pytest.mark.parametrize(("names", "changes", "message"), BAD_ANSWERS)
def test_answers_that_no_completion_can_match_name_their_sample(names, changes, message, tmp_path, capfd):
    data = runs.write_dataset(tmp_path, 4, **changes)
    error = error_of(tmp_path, capfd, *names, grpo__data=data)
    assert error.startswith(f"sample row1 of {data}: {message}")
    assert not (tmp_path / "run").exists()
    runs.train(tmp_path / "run", "grpo", **rewards("format", grpo__data=data, grpo__steps=1))


def without_answers(folder):
    data = runs.write_dataset(folder, 4)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return runs.write_rows(data, [{k: v for k, v in row.items() if k != "answer"} for row in rows])


@pytest.mark.parametrize("name", ["accuracy", "length"])
def test_a_file_without_answers_cannot_earn_what_compares_with_them(name, tmp_path, capfd):
    data = without_answers(tmp_path)
    error = error_of(tmp_path, capfd, "format", name, grpo__data=data)
    assert error.startswith(f"{data}: no sample has an answer, which reward {name!r} compares with; ")


def test_other_rewards_score_a_file_without_answers(tmp_path):
    names = ("format", "repetition", "overlong", "length_published")
    data = without_answers(tmp_path)
    run_dir = runs.train(tmp_path / "run", "grpo", **rewards(*names, grpo__data=data, grpo__steps=1))
    [row] = runs.metrics(run_dir, "grpo")
    assert {name for name in names if f"rewards/{name}/mean" in row} == set(names)


BAD_SECTIONS = [
    ({"rewards__weights": {"format": 0}}, "rewards.weights are 0 for every function"),
    ({"rewards__functions": ["format", "format"]}, "functions names a function twice"),
    ({"rewards__timeout": -1}, "rewards.timeout: Input should be greater than or equal to 0"),
    ({"rewards__weights": {"formt": 1}}, "rewards.weights names formt, but rewards.functions has format"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SECTIONS)
def test_a_wrong_section_is_refused(changes, message, tmp_path, capfd):
    assert message in error_of(tmp_path, capfd, **({"rewards__functions": ["format"]} | changes))


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_weights_are_finite(weight, tmp_path, capfd):
    arguments = runs.arguments(tmp_path / "run", "grpo", **rewards("format"))
    (tmp_path / "small.toml").write_text(f"[rewards]\nweights = {{ format = {weight} }}")
    assert main(arguments) == 2
    assert "rewards.weights.format: Input should be a finite number" in capfd.readouterr().err


def changed_model(folder, change):
    """The small model, after a change of its tokenizer."""
    shutil.copytree(runs.SMALL["model.path"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def opens_a_thought(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )


def special_tags(tokenizer):
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in tags], special_tokens=True)


@pytest.mark.parametrize("change", [opens_a_thought, special_tags])
def test_right_answers_earn_their_rewards_whatever_the_tags_are(change, tmp_path, monkeypatch):
    """The sampler says what fine-tuning on this template teaches: all is right in every second completion."""
    model = changed_model(tmp_path / "changed", change)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rest = "" if change is opens_a_thought else "<think>"

    def generate(vlm, prompts, num_completions, **_):
        texts = [f"{rest}x</think><answer>A</answer>", "A"]
        completions = [
            Completion([*tokenizer.encode(text), tokenizer.eos_token_id], [], True) for text in texts
        ]
        for completion in completions:
            completion.logp[:] = [0.0] * len(completion.token_ids)
        return [(completions * num_completions)[:num_completions] for _ in prompts]

    monkeypatch.setattr(rollout_engines, "generate", generate)
    data = runs.write_dataset(tmp_path, 3, answer="A")  # of each row
    rows = [json.loads(line) | {"answer": "A"} for line in data.read_text().splitlines()]
    runs.write_rows(data, rows)
    run_dir = runs.train(
        tmp_path / "run",
        "grpo",
        **rewards("accuracy", "format", grpo__steps=1, grpo__data=data, model__path=model),
    )
    [row] = runs.metrics(run_dir, "grpo")
    assert (row["rewards/accuracy/mean"], row["rewards/format/mean"]) == (0.5, 0.5)


def test_fine_tuning_repeats_neither_the_thought_nor_the_end(tmp_path, monkeypatch):
    model = changed_model(tmp_path / "changed", opens_a_thought)
    tokenizer, learned = AutoTokenizer.from_pretrained(model), []

    def watched(policy, groups, *rest):
        for group in groups:
            ids = [*group.prompt.token_ids, *group.completions[0].token_ids]
            learned.append(tokenizer.decode(ids).rpartition("assistant\n")[2])
        return share_out(policy, groups, *rest)

    monkeypatch.setattr(sft, "share_out", watched)
    data = runs.write_dataset(tmp_path, 2, response="<think>\n1</think><answer>B</answer><|im_end|>\n")
    runs.train(tmp_path / "run", "sft", sft__data=data, sft__steps=1, sft__batch_size=2, model__path=model)
    assert sorted(learned) == [
        f"<think>\n{number}</think><answer>{letter}</answer><|im_end|>"
        for number, letter in ((0, "A"), (1, "B"))
    ]


def test_a_tokenizer_that_loses_the_tags_is_refused(tmp_path, capfd, monkeypatch):
    text = rehearsal.completion_text
    monkeypatch.setattr(
        rehearsal, "completion_text", lambda *args: text(*args).replace("<answer>", "< answer>")
    )
    error = error_of(tmp_path, capfd, "format")
    assert error == (
        "sample train-2000000: reward 'format' cannot be earned: chat template and tokenizer turn the right "
        "answer '<think>yes</think><answer>E</answer>' into '<think>yes</think>< answer>E</answer>'"
    )


def test_own_functions_are_called_once_on_a_group_before_the_first_step(tmp_path):
    runs.train(tmp_path / "run", "grpo", **rewards(f"{HERE}:watches", grpo__steps=1))
    rehearsal, step = CALLS
    assert len(rehearsal["completions"]) == 4 and len(step["completions"]) == 8
    [text] = {messages[0]["content"] for messages in rehearsal["completions"]}
    assert text == f"<think>yes</think><answer>{rehearsal['answer'][0]}</answer>"
    assert rehearsal["city"] == [rehearsal["city"][0]] * 4


def test_async_functions_and_copies_change_nothing(tmp_path):
    plain, awaited, spoilt = (
        runs.train(tmp_path / name.partition(":")[2], "grpo", **rewards(name, grpo__steps=2))
        for name in ("small_runs:spread", f"{HERE}:judges", f"{HERE}:spoils")
    )
    assert runs.weights(plain, "grpo") == runs.weights(awaited, "grpo") == runs.weights(spoilt, "grpo")


def test_a_function_that_leaves_ends_the_run_with_its_line_and_its_traceback(tmp_path, capfd):
    error = error_of(tmp_path, capfd, f"{HERE}:leaves")
    file = tmp_path / "run" / "bad" / "reward-rank0.txt"
    assert error.startswith(f"reward '{HERE}:leaves' raised SystemExit: 0 (")
    assert error.endswith(f"; its traceback is in {file}")
    assert "SystemExit: 0" in file.read_text() and "in reward\n    act()" in file.read_text()


def test_a_function_that_hangs_ends_the_run(tmp_path, capfd):
    error = error_of(tmp_path, capfd, f"{HERE}:hangs", rewards__timeout=0.5)
    assert error.startswith(
        f"reward '{HERE}:hangs' has not returned within rewards.timeout = 0.5 s; its trace"
    )


def test_a_stop_while_a_reward_runs_ends_the_step_whole(tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "grpo", **rewards(f"{HERE}:asks_to_stop"))) == 0
    assert "grpo stopped after step 1 of 5; the same command goes on" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "grpo-000001").is_dir()


def rows_of(*steps):
    return [{"stage": "sft", "step": 1}, *({"stage": "grpo", **step} for step in steps)]


def stats(mean, std):
    return {"rewards/mine/mean": mean, "rewards/mine/std": std}


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        (rows_of(stats(0.5, 0.0), stats(0.5, 0.0)), None, "0.5 for every completion, in 2 steps"),
        (rows_of(stats(0.5, 0.0), stats(1.0, 0.0)), None, "the same for all completions of each step, in 2"),
        (rows_of({}, {}, {}), None, "None for every completion, in 3 steps"),
        (rows_of({}, stats(1.0, 0.1)), 1, "None for every completion, in 1 steps"),
        (rows_of({}, stats(1.0, 0.1)), None, None),
        (rows_of(), None, None),
    ],
)
def test_idle_rewards(rows, most, expected, tmp_path):
    lines = idle_rewards(runs.write_rows(tmp_path / "metrics.jsonl", rows), ["mine"], most)
    assert [line.startswith(f"warning: reward mine was {expected}") for line in lines] == [True] * bool(
        expected
    )
    assert len(lines) == (expected is not None)


def test_a_reward_at_its_best_is_not_idle(tmp_path):
    steps = [
        {f"rewards/{name}/{part}": value if part == "mean" else 0.0 for part in ("mean", "std")}
        for name, value in (("accuracy", 1.0), ("format", 1.0), ("repetition", 0.0), ("overlong", 0.0))
    ]
    row = {key: value for step in steps for key, value in step.items()}
    file = runs.write_rows(tmp_path / "metrics.jsonl", rows_of(row, row))
    assert idle_rewards(file, ["accuracy", "format", "repetition", "overlong"]) == []
    row["rewards/accuracy/mean"] = 0.0
    runs.write_rows(file, rows_of(row, row))
    assert [line.split(" was ")[0] for line in idle_rewards(file, ["accuracy", "format"])] == [
        "warning: reward accuracy"
    ]


def test_idle_rewards_are_spoken_of_in_the_run_and_at_its_end(tmp_path, said, monkeypatch):
    monkeypatch.setattr("geo_r1.train.stages.grpo.FIRST_STEPS", 2)
    names = ["small_runs:spread", "small_runs:never_scores", "format"]
    runs.train(tmp_path / "run", "grpo", **rewards(*names, rewards__weights={"format": 0}))
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings == [
        f"warning: reward small_runs:never_scores was None for every completion, in {steps} steps of GRPO: "
        "it teaches nothing"
        for steps in (2, 5)
    ]
