"""Recipes, command lines, rows and checkpoints with random mistakes: accepted or one line, never a traceback.

FUZZ=20 tries twenty times as many.
"""

import copy
import json
import os
import random
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import tomli_w

import geo_r1
from geo_r1.data.sample import sample_of
from geo_r1.errors import LONGEST, UserError, one_line
from geo_r1.train.recipe.load import load_recipe

sys.path.append(str(Path(__file__).parent / "train"))
from saved_states import ALONE, changed, make_state

from geo_r1.train.state.checkpoint import Checkpoints, DamagedCheckpointError

TIMES = int(os.environ.get("FUZZ", "1"))
WORLD = tomllib.loads((Path(geo_r1.__file__).parent / "recipes" / "world.toml").read_text())
ROW = {
    "id": "a",
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where? <image>"}]},
    ],
    "images": ["a.png", {"path": None, "bytes": b"\x89PNG"}],
    "response": "<think>x</think><answer>A</answer>",
    "answer": "A",
    "num_choices": 2,
}
VALUES = [
    None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, float("inf"), float("nan"), 10**30,
    "", "x", "world", "A" * 5000, "\x1b[31mred\x07", "é\u0301\u202e", "\ud800", "../../etc/passwd",
    "/dev/zero", "data:image/png;base64,AAAA", "data:" + "A" * 100_000, "http://x/y.png", b"", b"\x00\xff",
    [], [[]], [None], ["x"] * 50, [{"type": "text", "text": 3}],
    {}, {"x": {}}, {"": 1}, {"type": "text"}, {"type": "image", "image": 7}, {"role": "user"},
    {"path": "a.png"},
]  # fmt: skip


def places(value, found=()):
    """Every (container, key) below a value."""
    keys = [*value] if isinstance(value, dict) else [*range(len(value))] if isinstance(value, list) else []
    for key in keys:
        found = (*found, (value, key))
        found = places(value[key], found)
    return found


def mutated(value, rng, values=VALUES):
    """A copy with one to three values replaced, deleted, added, or moved to another place."""
    value = json.loads(json.dumps(value, default=lambda data: data.hex()))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        container, key = rng.choice(places(value) or [({}, "x")])
        change = rng.randrange(4)
        if change == 0 and isinstance(container, dict):
            container.pop(key, None)
        elif change == 1 and isinstance(container, dict):
            name = rng.choice(["x", "", "images", "prompt", "steps", "é", "a.b", "\x1b[1m"])
            container[name] = copy.deepcopy(rng.choice(values))
        elif change == 2:
            container[key] = json.loads(json.dumps(rng.choice(places(value))[0], default=str))
        else:
            container[key] = copy.deepcopy(rng.choice(values))
    return value


def judged(call, endings):
    """Count how a call ends; any error but a UserError is a defect, and passes through."""
    try:
        call()
        endings["accepted"] += 1
    except UserError as error:
        assert 5 < len(one_line(error)) <= LONGEST
        endings["refused"] += 1
    except SystemExit as leaving:
        assert leaving.code == 0, "a command line left without an error of ours"
        endings["help"] += 1


@pytest.mark.parametrize("seed", range(100 * TIMES))
def test_recipes(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, endings, file = random.Random(seed), Counter(), tmp_path / "recipe.toml"
    values = [
        value for value in VALUES if value is not None and value != [None] and not isinstance(value, bytes)
    ]
    for _ in range(3):
        try:
            text = tomli_w.dumps(mutated(WORLD, rng, values))
        except (TypeError, ValueError, OverflowError):
            continue
        if rng.random() < 0.3:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(['"', "[", "]]", "\x00", "=", "\n[[a]]\n", "'''", "1_"]) + text[at:]
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        judged(lambda: load_recipe([str(file)], ""), endings)


@pytest.mark.parametrize("seed", range(100 * TIMES))
def test_command_lines(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, endings = random.Random(seed), Counter()
    keys = [f"{section}.{key}" for section, table in WORLD.items() for key in table] + [
        "run",
        "sft.optim",
        "x.y",
    ]
    keys += [
        "learning_rate",
        "num_generations",
        "seed",
        "help",
        "",
        "-",
        "grpo.loss.beta",
        "run.dir",
        "\x1b[1m",
    ]
    for _ in range(3):
        argv = (
            ["world"] if rng.random() < 0.8 else [rng.choice(["", "x", "/", "\x00", "-", "world.toml", "."])]
        )
        for _ in range(rng.randrange(1, 4)):
            value = rng.choice(VALUES)
            word = rng.choice([str(value), repr(value)]) if value == value else "nan"
            argv += rng.choice(
                [[f"--{rng.choice(keys)}", word], [f"--{rng.choice(keys)}={word}"], [word], [f"-{word[:3]}"]]
            )
        judged(lambda argv=argv: load_recipe(argv, ""), endings)


@pytest.mark.parametrize("seed", range(100 * TIMES))
def test_rows(seed, tmp_path):
    rng, endings = random.Random(seed), Counter()
    for _ in range(6):
        row = mutated(ROW, rng)
        judged(lambda row=row: sample_of(row, "rows.jsonl, row 3", tmp_path), endings)
    assert sum(endings.values()) == 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    Checkpoints(folder, "sft", ALONE, 2).save(1, make_state(), wait=True)
    return folder


@pytest.mark.parametrize("seed", range(20 * TIMES))
def test_checkpoints(seed, saved):
    """One change of one byte, or of the length, anywhere."""
    rng, checkpoints = random.Random(seed), Checkpoints(saved, "sft", ALONE, 2)
    folder = checkpoints.folder(1)
    file = rng.choice(sorted(path for path in folder.iterdir() if path.name != "manifest.json"))
    before = file.read_bytes()
    data = bytearray(before)
    at = rng.randrange(len(data))
    change = rng.randrange(3)
    if change == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif change == 1:
        del data[at:]
    else:
        data[at:at] = bytes(rng.randrange(1, 70_000))
    state = changed(make_state())
    file.write_bytes(data)
    try:
        with pytest.raises(DamagedCheckpointError, match=file.name):
            checkpoints.load(folder, state)
    finally:
        file.write_bytes(before)
    checkpoints.load(folder, state)
