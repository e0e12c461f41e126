"""A mistake of the user's is one line that names the culprit, exit code 2, and nothing half done."""

import json
import shutil

import pytest
import saved_states
import small_runs as runs
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

import geo_r1.train.run
from geo_r1.train.__main__ import main
from geo_r1.train.state.checkpoint import Checkpoints


def row_of(**changes):
    """A dataset of four rows whose second has these columns changed."""
    return lambda folder: {"data": runs.write_dataset(folder, 4, **changes)}


def truncated(folder):
    data = runs.write_dataset(folder, 4)
    image = folder / "images" / "ground1.jpg"
    Image.new("RGB", (280, 280), (9, 9, 9)).save(image)
    image.write_bytes(image.read_bytes()[:-300])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["images"][0] = "images/ground1.jpg"
    return {"data": runs.write_rows(data, rows)}


def empty_dataset(folder):
    return {"data": runs.write_rows(folder / "none.jsonl", [])}


def whole(folder):
    return {"data": runs.write_dataset(folder, 4)}


def other_family(folder):
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return {"model__path": folder / "llama"}


def broken_weights(folder):
    shutil.copytree(runs.SMALL["model.path"], folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"not weights")
    return {"model__path": folder / "broken"}


def a_file(folder):
    (folder / "run").write_text("")
    return {}


def reward(name, **options):
    return {"rewards__functions": [name], "rewards__options": {name: options} if options else {}}


# what is wrong: (stage, settings or a function of the folder, how the line goes on, does the run start)
MISTAKES = {
    "missing image": (
        "sft",
        row_of(images=["images/none.png", "images/above1.png"]),
        "{}/data.jsonl, row 2: image {}/images/none.png does not exist",
        False,
    ),
    "truncated JPEG": ("sft", truncated, "sample row1: image {}/images/ground1.jpg cannot be read: ", True),
    "more images than markers": (
        "sft",
        row_of(images=["images/ground1.png"] * 3),
        "{}/data.jsonl, row 2: the prompt marks 2 images but the sample has 3",
        False,
    ),
    "prompt over its budget": ("sft", {"data__max_prompt_tokens": 20}, "sample train-1000000", True),
    "sample over the batch": ("sft", {"sft__optim__max_tokens": 50}, "sample train-1000000", True),
    "nothing to train": (
        "sft",
        {"sft__freeze": ["vision", "projector", "text"]},
        "freeze = ['vision', 'projector', 'text'] leaves nothing to train",
        True,
    ),
    "group over the batch": ("grpo", {"grpo__optim__max_tokens": 50}, "sample train-2000000", True),
    "group over the cache": ("grpo", {"rollout__max_tokens": 50}, "sample train-2000000", True),
    "reward raises": (
        "grpo",
        reward("small_runs:raises"),
        "reward 'small_runs:raises' raised KeyError: 'heading'",
        True,
    ),
    "reward returns too few": (
        "grpo",
        reward("small_runs:one_too_few"),
        "reward 'small_runs:one_too_few' returned 3 values, expected 4",
        True,
    ),
    "unknown reward": (
        "grpo",
        reward("acuracy"),
        "unknown reward 'acuracy'; did you mean 'accuracy'?",
        False,
    ),
    "unknown module": ("grpo", reward("no_such:f"), "reward 'no_such:f': cannot import 'no_such'", False),
    "unknown function": (
        "sft",
        reward("small_runs:nothing"),
        "reward 'small_runs:nothing': module 'small_runs' has no",
        False,
    ),
    "unknown reward option": (
        "grpo",
        reward("accuracy", wrong=1),
        "reward 'accuracy' takes no option",
        False,
    ),
    "cispo without its bound": (
        "grpo",
        {"grpo__loss__policy": "cispo"},
        "grpo.loss: policy='cispo' needs epsilon_high",
        False,
    ),
    "option of no reward": (
        "grpo",
        {"rewards__options": {"format": {"n": 1}}},
        "rewards.options names format, but rewards.functions has small_runs:spread",
        False,
    ),
    "empty dataset": ("grpo", empty_dataset, "{}/none.jsonl holds no samples", False),
    "missing dataset": ("eval", {"data": "none.jsonl"}, "data file none.jsonl does not exist", False),
    "no response": (
        "sft",
        row_of(response=None),
        "sample row1 of {}/data.jsonl has no response, which sft needs",
        False,
    ),
    "no answer": (
        "eval",
        row_of(answer=None),
        "sample row1: the answer must be a letter from A to B, got None",
        False,
    ),
    "no such folder": (
        "sft",
        {"model__path": "/no/such/model"},
        "model folder /no/such/model does not exist",
        False,
    ),
    "no such relative folder": (
        "sft",
        {"model__path": "./none"},
        "model folder ./none does not exist",
        False,
    ),
    "another family": (
        "sft",
        other_family,
        "model {}/llama cannot be loaded: config.json: it is a llama",
        False,
    ),
    "broken weights": ("sft", broken_weights, "model {}/broken cannot be loaded: ", False),
    "run folder is a file": ("sft", a_file, "run.dir {}/run cannot be written: File exists", False),
    "unknown key": ("sft", {"sft__stepz": 3}, "unknown option --sft.stepz; did you mean sft.steps?", False),
    "wrong type": (
        "sft",
        {"sft__steps": "many"},
        "recipe {}/small.toml: sft.steps: Input should be a valid int",
        False,
    ),
    "wrong stage": (
        "sftt",
        {},
        "recipe {}/small.toml: run.stages.0: Input should be 'pretrain', 'sft', ",
        False,
    ),
}


def one_line(capfd):
    """The line on stderr; there is exactly one."""
    out, err = capfd.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith("geo_r1: ")
    assert "Traceback" not in out
    return err.removeprefix("geo_r1: ").rstrip("\n")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, capfd):
    stage, given, expected, starts = MISTAKES[mistake]
    settings = dict(given(tmp_path) if callable(given) else given)
    if "data" in settings:
        settings[f"{stage}__data"] = settings.pop("data")
    run_dir = tmp_path / "run"
    capfd.readouterr()
    assert main(runs.arguments(run_dir, stage, **settings)) == 2
    assert one_line(capfd).startswith(expected.replace("{}", str(tmp_path)))
    if starts:  # the folder holds the recipe, and nothing that a later run would take for a result
        assert not runs.files_under(run_dir) & {"checkpoints", "models", "eval"}
        assert not [name for name in runs.files_under(run_dir) if "partial" in name]
    else:
        assert not run_dir.is_dir()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["none.toml"], "recipe none.toml cannot be read: No such file or directory"),
        (["{}/bad.toml"], "recipe {}/bad.toml is not valid TOML: "),
        (["{}/small.toml", "--sft.stpes", "3"], "unknown option --sft.stpes; did you mean sft.steps?"),
        (["{}/small.toml", "--sft.steps"], "argument --sft.steps: expected one argument"),
        (["{}/small.toml", "stray"], "unrecognized arguments: stray"),
        (["{}/small.toml", "--sft.optim.betas", "[0.5"], "Parsing error encountered for sft.optim.betas: "),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, expected, tmp_path, capfd):
    runs.empty_recipe(tmp_path)
    (tmp_path / "bad.toml").write_text("[sft\nsteps = 3")
    assert main([argument.replace("{}", str(tmp_path)) for argument in argv]) == 2
    assert one_line(capfd).startswith(expected.replace("{}", str(tmp_path)))


def test_help_prints_usage(capfd):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    out, err = capfd.readouterr()
    assert out.startswith("usage: python -m geo_r1.train")
    assert "--grpo.num_completions" in out
    assert err == ""


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run folder with a checkpoint after two steps of four, as a killed run leaves it."""
    with monkeypatch.context() as patch:

        def save_then_interrupt(self, step, state, **_):
            save(self, step, state, wait=True)
            raise KeyboardInterrupt

        save = Checkpoints.save
        patch.setattr(Checkpoints, "save", save_then_interrupt)
        assert main(runs.arguments(tmp_path / "run", "sft", sft__steps=4, sft__save_every=2)) == 130
    return tmp_path / "run"


def another(change):
    """Put a whole checkpoint of something else in its place; `change` makes it something else."""

    def breakage(checkpoint):
        state = {"model": {}, "optim": {}}
        for key, kind in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
            section, name = key.split(".", 1)
            state[section][name] = torch.zeros(kind.size, dtype=kind.properties.dtype)
        state |= json.loads((checkpoint / "trainer.json").read_text())
        change(state)
        shutil.rmtree(checkpoint)
        Checkpoints(checkpoint.parents[1], "sft", saved_states.ALONE, 2).save(2, state, wait=True)

    return breakage


NORM = "model.language_model.norm.weight"
FIRST = "model.language_model.layers.0."
ANOTHER = "is of another model: "
# how it is broken: (what breaks it, how the line goes on)
BREAKAGES = {
    "a wider model": (
        another(lambda state: state["model"].update({NORM: torch.zeros(9)})),
        f"{ANOTHER}model.{NORM} is [9] float32 there, [64] float32 here",
    ),
    "a shorter model": (
        another(lambda state: [state["model"].pop(n) for n in [*state["model"]] if n.startswith(FIRST)]),
        f"{ANOTHER}it has no model.{FIRST}",
    ),
    "a model more": (
        another(lambda state: state["model"].update({"reference.x": torch.zeros(9)})),
        f"{ANOTHER}model.reference.x is [9] float32 there, absent here",
    ),
    "another optimizer": (
        another(lambda state: state["optim"].update({f"{NORM}.exp_avg": torch.zeros(9)})),
        f"{ANOTHER}optim.{NORM}.exp_avg is [9] float32 there, [64] float32 here",
    ),
    "no optimizer": (another(lambda state: state["optim"].clear()), f"{ANOTHER}it has no optim."),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_checkpoint_of_another_model_is_one_line(breakage, stopped, capfd):
    checkpoint = stopped / "checkpoints" / "sft-000002"
    breaks, expected = BREAKAGES[breakage]
    breaks(checkpoint)
    capfd.readouterr()
    assert main(runs.arguments(stopped, "sft", sft__steps=4, sft__save_every=2)) == 2
    line = one_line(capfd)
    assert line.startswith(f"checkpoint {checkpoint} {expected}")
    assert not (stopped / "models").exists()


def test_another_recipe_in_the_same_folder_is_one_line(stopped, capfd):
    for change, named in (
        ({"sft__batch_size": 3}, "sft.batch_size = 4, now 3"),
        ({"run__seed": 1}, "run.seed = 0, now 1"),
        ({"data__max_pixels": 9999}, "data.max_pixels = None, now 9999"),
    ):
        capfd.readouterr()
        assert main(runs.arguments(stopped, "sft", **{"sft__steps": 4, "sft__save_every": 2} | change)) == 2
        assert one_line(capfd).startswith(f"{stopped} was made with {named}; ")
    assert (stopped / "checkpoints" / "sft-000002").exists()


def test_overwrite_deletes_only_for_a_run_that_can_start(stopped, tmp_path, capfd):
    assert main(runs.arguments(stopped, "sft", run__overwrite=True, model__path="/no/model")) == 2
    assert (stopped / "checkpoints" / "sft-000002").exists()
    runs.train(stopped, "sft", run__overwrite=True, sft__steps=1)
    assert [row["step"] for row in runs.metrics(stopped, "sft")] == [1]
    assert runs.checkpoints(stopped) == {"sft-000001"}


def test_a_cached_model_is_not_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr(geo_r1.train.models, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    monkeypatch.setattr(geo_r1.train.models, "model_info", None)
    geo_r1.train.models.check_model_exists("Qwen/Qwen2.5-VL-3B-Instruct")


def test_from_a_shell_without_the_hub(tmp_path):
    """Nothing listens on port 9, so the answer is the same with and without a network, and comes at once."""
    argv = runs.arguments(tmp_path / "run", "sft", model__path="no/such-model")
    done = runs.launch(argv, environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "geo_r1: model no/such-model: no such folder, and the hub does not answer for it: "
    )
    assert not (tmp_path / "run").exists()


def test_from_a_shell_with_a_wrong_option():
    done = runs.launch(["--grpo.los.beta", "1"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "geo_r1: unknown option --grpo.los.beta; did you mean grpo.loss.beta?\n"
