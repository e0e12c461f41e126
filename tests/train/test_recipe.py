"""A recipe: a file, options on top, checked once, frozen, written back."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from geo_r1.errors import UserError
from geo_r1.train.recipe.load import _keys, decisive, dump_recipe, load_recipe
from geo_r1.train.recipe.names import FINE_TUNED, LACKING, NEEDLESS, STAGE, TRL, hint
from geo_r1.train.recipe.run_sections import EvalConfig
from geo_r1.train.recipe.sections import GRPOConfig, OptimConfig, Recipe


@pytest.fixture
def load(tmp_path):
    def load(text="", *options):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe([str(path), *options])

    return load


def test_an_empty_recipe_is_the_default_one(load):
    assert load() == Recipe()


def test_what_is_dumped_loads_equal(load):
    recipe = load(
        """
        [run]
        dir = "runs/a \\"quoted\\" name\\\\ü\\n"
        stages = ["pretrain", "eval"]
        [sft]
        data = "rows.jsonl"
        epochs = 1.5
        optim = { lr = 1e-5, betas = [0.9, 0.95] }
        [grpo]
        steps = 7
        loss = { type = "grpo", beta = 1e-3, epsilon_high = 0.28 }
        [rewards]
        functions = ["accuracy", "my.f"]
        weights = { accuracy = 2, "my.f" = 0.5 }
        options = { accuracy = { wrong_score = -0.8 }, "my.f" = { words = ["a"], deep = { x = true } } }
        [eval]
        data = "rows.jsonl"
        num_samples = 0
        """
    )
    assert load(dump_recipe(recipe)) == recipe
    assert load(dump_recipe(Recipe())) == Recipe()
    assert recipe.sft.steps is None
    assert recipe.rewards.options["my.f"] == {"words": ["a"], "deep": {"x": True}}


def test_options_replace_values_of_every_kind(load):
    recipe = load(
        "[sft]\nsteps = 3\nbatch_size = 4\noptim = { lr = 0.5, betas = [0.1, 0.2] }\n"
        "[rewards]\nweights = { format = 3 }",
        "--run.stages=[\"sft\", \"eval\"]",
        "--run.overwrite=true",
        "--model.liger", "0",
        "--sft.optim.betas", "0.7,0.8",
        "--sft.optim.schedule=linear",
        "--grpo.steps", "9",
        "--grpo.loss.beta=0.25",
        "--rewards.functions", "[\"accuracy\",\"format\"]",
        "--rewards.weights", '{"accuracy": 2}',
        "--rewards.options", '{"accuracy": {"wrong_score": -1}}',
        "--data.max_pixels", "3136",
    )  # fmt: skip
    assert recipe.run.stages == ("sft", "eval")
    assert recipe.run.overwrite is True
    assert recipe.model.liger is False
    assert recipe.sft.optim == OptimConfig(lr=0.5, betas=(0.7, 0.8), schedule="linear")
    assert (recipe.sft.steps, recipe.sft.batch_size) == (3, 4)
    assert recipe.grpo == GRPOConfig(steps=9, loss={"beta": 0.25})
    assert recipe.rewards.functions == ("accuracy", "format")
    assert recipe.rewards.weights == {"format": 3, "accuracy": 2}
    assert recipe.rewards.options == {"accuracy": {"wrong_score": -1}}
    assert recipe.data.max_pixels == 3136


def test_a_duration_option_replaces_the_recipe_s(load):
    text = '[sft]\ndata = "rows.jsonl"\nepochs = 2\n[grpo]\ndata = "rows.jsonl"\nsteps = 5'
    recipe = load(text, "--sft.steps=4", "--grpo.epochs=0.5")
    assert (recipe.sft.steps, recipe.sft.epochs) == (4, None)
    assert (recipe.grpo.steps, recipe.grpo.epochs) == (None, 0.5)
    with pytest.raises(ValueError, match="sft: set exactly one of steps and epochs"):
        load(text, "--sft.steps=4", "--sft.epochs=1")


def test_grpo_keeps_its_small_rate_when_another_setting_changes(load):
    assert load("[grpo]\nsteps = 1\noptim = { schedule = 'linear' }").grpo.optim.lr == 1e-6
    assert load().sft.optim.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grop]\nsteps = 3", "unknown key grop; did you mean grpo?"),
        ("[sft]\nsteps = 1\nbatchsize = 3", "unknown key sft.batchsize; did you mean sft.batch_size?"),
        (
            "[grpo]\nsteps = 1\nloss = { betta = 1 }",
            "unknown key grpo.loss.betta; did you mean grpo.loss.beta?",
        ),
        (
            "[grpo]\nsteps = 1\ntemperature = 1",
            "unknown key grpo.temperature; did you mean rollout.temperature?",
        ),
        ("qqqq = 1", "unknown key qqqq"),
        ("[sft]\nsteps = 'three'", "sft.steps: Input should be a valid integer, unable to parse string"),
        (
            "[grpo]\nsteps = 1\nloss = { type = 'ppo' }",
            "grpo.loss.type: Input should be 'grpo', 'bnpo', 'dapo', 'dr_grpo' or",
        ),
        ("sft = 3", "sft: Input should be a valid dictionary"),
        ("[sft]\nbatch_size = 3", "sft: set exactly one of steps and epochs"),
        ("[sft]\nepochs = 3", "sft: the world never ends: set steps, not epochs"),
        ("[eval]\nnum_samples = 0", "eval: the world never ends: set num_samples"),
        ("[run]\nstages = ['grpo', 'sft']", "in this order, each once; got grpo, sft"),
        ("[run]\nstages = []", "each once; got none"),
    ],
)
def test_a_mistake_names_its_key(load, text, message):
    with pytest.raises(ValueError) as error:
        load(text)
    assert message in str(error.value)
    assert "recipe.toml: " in str(error.value)


def test_every_section_is_frozen():
    recipe = Recipe()
    for section, name, value in (
        (recipe, "run", None),
        (recipe.sft, "steps", 1),
        (recipe.sft.optim, "lr", 1.0),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, value)


def test_all_samples_of_a_file_can_be_asked_for():
    assert EvalConfig(data="rows.jsonl", num_samples=0).num_samples == 0


def test_the_environment_does_not_reach_a_recipe(monkeypatch, load):
    monkeypatch.setenv("RUN", '{"seed": 5}')
    monkeypatch.setenv("run__seed", "5")
    assert load().run.seed == 0


def test_both_world_recipes_start_from_the_same_base():
    ours, zero = (load_recipe([f"recipes/{name}.toml"]) for name in ("world", "world_zero"))
    assert zero.run.stages == ("pretrain", "grpo", "eval")
    for section in ("model", "data", "pretrain", "grpo", "rollout", "rewards", "eval"):
        assert getattr(ours, section) == getattr(zero, section)
    assert ours.world.model_copy(update={"careless": 0.0}) == zero.world


def test_the_papers_recipes_differ_in_their_stages_alone():
    full, zero = (load_recipe([f"recipes/{name}.toml"]) for name in ("geo_r1_7b", "geo_r1_zero_7b"))
    assert (full.run.stages, zero.run.stages) == (("sft", "grpo", "eval"), ("grpo", "eval"))
    for section in ("model", "data", "grpo", "rollout", "rewards", "eval"):
        assert getattr(full, section) == getattr(zero, section)
    assert full.grpo.prompts_per_step * full.grpo.num_completions == 64


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        load_recipe(list(arguments), "What it does.\n\nAnd how.")
    assert leaving.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_short_and_says_how_to_see_the_rest(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = helped(capsys, "none.toml", flag)
    assert lines[0] == "usage: python -m geo_r1.train [RECIPE] [--section.key VALUE ...] [--dry-run[=RANKS]]"
    assert "What it does." in lines and "And how." in lines and len(lines) < 70
    assert "  --grpo.num_completions = 8" in lines and "      Completions per prompt: M." in lines
    assert any(line.startswith("  rollout   Sampling of completions") for line in lines)
    assert lines[-1] == "--help grpo lists the keys of a section, --help all every key."


@pytest.mark.parametrize("arguments", [("--help", "grpo"), ("--help=grpo",), ("world", "-h", "grpo")])
def test_help_of_a_section_has_its_keys_their_defaults_and_meanings(arguments, capsys):
    lines = helped(capsys, *arguments)
    assert lines[0] == "[grpo] Group relative policy optimisation."
    assert "  --grpo.num_completions  integer >= 2, default 8" in lines
    assert '  --grpo.loss.type  grpo | bnpo | dapo | dr_grpo | luspo, default "dapo"' in lines
    assert {line.split(".")[0] for line in lines if line.startswith("  --")} == {"  --grpo"}


def test_help_all_has_every_key_once(capsys):
    found = [line.split()[0][2:] for line in helped(capsys, "--help", "all") if line.startswith("  --")]
    keys = _keys(Recipe)
    assert sorted(found) == sorted(k for k in keys if not any(other.startswith(f"{k}.") for other in keys))


def test_help_of_a_key_and_of_nothing(capsys):
    assert helped(capsys, "--help", "lora.rank")[0] == "  --lora.rank  integer >= 0, default 0"
    with pytest.raises(UserError, match=r"--help knows no grop; did you mean grpo\?"):
        load_recipe(["--help", "grop"])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("sevre", "did you mean serve?"),
        ("dry-rnu=8", "did you mean dry-run?"),
        ("sft.stpes", "did you mean sft.steps?"),
        ("grop.steps", "did you mean grpo.steps?"),
        ("grpo.num-completions", "did you mean grpo.num_completions?"),
        ("lr", "did you mean pretrain.optim.lr, sft.optim.lr or grpo.optim.lr?"),
        ("seed", "did you mean run.seed or world.seed?"),
        ("top_p", "did you mean rollout.top_p?"),
        ("grpo.temperature", "did you mean rollout.temperature?"),
        ("beta", "did you mean grpo.loss.beta?"),
        ("num_generations", "TRL's num_generations is grpo.num_completions here"),
        ("grpo.num_generations", "TRL's num_generations is grpo.num_completions here"),
        ("learning_rate", "TRL's learning_rate is sft.optim.lr or grpo.optim.lr here"),
        ("sft.learning_rate", "TRL's learning_rate is sft.optim.lr here"),
        ("max_completion_length=9", "TRL's max_completion_length is rollout.max_new_tokens here"),
        ("max-prompt-length", "TRL's max_prompt_length is data.max_prompt_tokens here"),
        ("pad_to_multiple_of", "TRL's pad_to_multiple_of is needless: there is nothing to set here"),
        ("min_p", "geo_r1 has nothing like TRL's min_p"),
    ],
)
def test_an_unknown_option_is_told_what_it_may_mean(load, option, meant):
    with pytest.raises(UserError) as error:
        load("", f"--{option}")
    assert str(error.value) == f"unknown option --{option.split('=')[0]}; {meant}"
    with pytest.raises(UserError, match=f"unknown option -{option[0]}"):
        load("", f"-{option}")


def test_an_unknown_key_of_a_file_is_told_trls_name(load):
    with pytest.raises(
        UserError, match=r"unknown key grpo\.save_steps; TRL's save_steps is grpo\.save_every"
    ):
        load("[grpo]\nsteps = 1\nsave_steps = 3")


def test_every_suggestion_is_a_key():
    known = set(_keys(Recipe))
    for name, keys in TRL.items():
        assert name not in {key.rsplit(".", 1)[-1] for key in known}, f"{name} has the same name here"
        assert {key.replace(STAGE, stage) for key in keys for stage in FINE_TUNED} <= known, name


def rows_of_the_trl_page():
    """Each row of docs/trl.md that compares fields: names there, text about here, keys here."""
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    for line in page.split("## Every field")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        names = re.findall(r"`([a-z_0-9]+)`", cells[0])
        if names:
            keys = []
            for key in re.findall(r"`([a-z_0-9.]+)(?: = [^`]*)?`", cells[1]):
                before = keys[-1].rsplit(".", 1)[0] if keys else ""
                keys.append(f"{before}{key}" if key.startswith(".") else key)
            yield names, cells[1], keys


def test_the_page_on_trl_says_the_same():
    known, seen = _keys(Recipe), set()
    for names, text, keys in rows_of_the_trl_page():
        seen |= {*names}
        if text.startswith(("needless", "–")):
            assert {*names} <= (NEEDLESS if text.startswith("needless") else LACKING), names
            continue
        hints = " ".join(hint(f"grpo.{name}", known) for name in names)
        for key in keys:
            assert re.search(rf"\b{re.escape(key)}\b", hints), (names, key, hints)
    assert seen >= NEEDLESS | LACKING


def test_what_decides_a_result_leaves_out_free_keys_and_sections():
    values = decisive(Recipe())
    assert values["run"] == {"seed": 0} and not values.keys() & {"parallel", "eval", "log"}
    assert values["sft"].keys() == {"data", "steps", "epochs", "freeze", "batch_size", "optim"}
    assert "max_tokens" not in values["grpo"]["optim"] and values["grpo"]["optim"]["lr"] == 1e-6
    assert values["model"] == {"path": "tiny", "dtype": "float32", "export_dtype": "base"}
