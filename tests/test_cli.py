"""The command geo-r1: what it answers without torch, whom it hands over to, and where it finds recipes."""

import subprocess
import sys
from pathlib import Path

import pytest

import geo_r1
from geo_r1 import __main__ as cli
from geo_r1.errors import UserError
from geo_r1.train.recipe.load import find_recipe

PACKAGE = Path(geo_r1.__file__).parent


def command(*arguments, cwd=None):
    """Run the console script's function in a process of its own, which prints its slow imports."""
    code = (
        f"import sys; sys.argv = ['geo-r1', *{arguments!r}]; from geo_r1.__main__ import main; "
        "code = main(); print(sorted({'torch', 'transformers'} & set(sys.modules))); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, f"geo-r1 {geo_r1.__version__}"),
        (["--help"], 0, "geo-r1 train    run a recipe"),
        (["-h"], 0, "geo-r1 data     make training data"),
        ([], 2, "geo-r1 COMMAND ..."),
    ],
)
def test_help_and_version_load_no_torch(arguments, code, words):
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (code, "")
    assert words in done.stdout and done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "geo_r1: unknown command trian: did you mean train?"),
        ("xyz", "geo_r1: unknown command xyz: there are train, ablate, data, eval, ops"),
    ],
)
def test_an_unknown_command_is_one_line(name, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["geo-r1", name])
    assert cli.main() == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_help_names_every_command():
    for name, module in cli.COMMANDS.items():
        assert f"geo-r1 {name} " in cli.__doc__ and f"python -m {module}\n" in cli.__doc__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_its_module_with_the_same_arguments(name, monkeypatch):
    ran = []
    monkeypatch.setattr(sys, "argv", ["geo-r1", name, "--option", "value"])
    monkeypatch.setattr(cli.runpy, "run_module", lambda *args, **options: ran.append((args, options)))
    assert cli.main() == 0
    assert ran == [((cli.COMMANDS[name],), {"run_name": "__main__", "alter_sys": True})]
    assert sys.argv[1:] == ["--option", "value"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "wrld"], 2, "geo_r1: no recipe wrld: geo_r1 has ablations_world, geo_r1_7b,"),
        (["train", "--grpo.stepz", "1"], 2, "geo_r1: unknown option --grpo.stepz; did you mean grpo.steps?"),
        (["ablate", "wrld"], 2, "geo_r1: no recipe wrld: "),
    ],
)
def test_the_exit_code_of_a_command_is_its_own(arguments, code, message, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_a_bare_name_is_a_recipe_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("world") == PACKAGE / "recipes" / "world.toml"
    for path in ("world.toml", "./world", "recipes/world.toml", str(tmp_path / "world")):
        assert find_recipe(path) == Path(path)
    Path("world").touch()  # a file of the user's comes first
    assert find_recipe("world") == Path("world")
    with pytest.raises(UserError, match=r"no recipe moon: geo_r1 has .*world, world_zero; a file"):
        find_recipe("moon")
