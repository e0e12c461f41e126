"""The pages that people read first: short, linked, and true of the recipe, the commands and the files."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import geo_r1
from geo_r1.__main__ import COMMANDS
from geo_r1.train.recipe.load import _keys
from geo_r1.train.recipe.sections import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
KEYS = set(_keys(Recipe))
SECTIONS = set(Recipe.model_fields)


def ids(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors(path):
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len(text_of(ROOT / "README.md").split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_contents():
    contents = text_of(ROOT / "docs" / "index.md").split("{toctree}")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"\n{page.stem}\n" in contents


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_keys_of_the_recipe_exist(page):
    if page.name in ("CHANGELOG.md", "NOTES.md"):
        return
    text = text_of(page)
    named = re.findall(r"--(\w+\.[\w.]+)", text)
    named += [key for key in re.findall(r"`(\w+\.[\w.]+)", text) if key.split(".")[0] in SECTIONS]
    files = (".py", ".jsonl", ".json", ".md", ".parquet", ".toml", ".png")
    unknown = {key.rstrip(".") for key in named if not key.endswith(files)} - KEYS
    assert not unknown - {"grpo.stepz"}  # a mistake, as an example


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_exist(page):
    text = text_of(page)
    assert set(re.findall(r"geo-r1 (\w+)", text)) <= {*COMMANDS, "COMMAND"}
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][\w-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"python -m (geo_r1[\w.]*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_paths_of_the_code_exist(page):
    folders = "geo_r1|csrc|benchmarks|tests|examples|deploy|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text_of(page)):
        assert (ROOT / path).exists(), path


def test_the_migration_table_names_defaults_as_they_are():
    recipe = Recipe()
    assert recipe.grpo.optim.lr == 1e-6 and recipe.grpo.num_completions == 8
    assert (recipe.rollout.max_new_tokens, recipe.rollout.patience, recipe.rollout.gpu_memory) == (
        256,
        300,
        0.35,
    )
    assert (recipe.rollout.importance_sampling, recipe.rollout.importance_cap) == ("none", 2.0)
    assert (recipe.grpo.loss.beta, recipe.grpo.reference.sync_share) == (0, 0.6)


def test_the_version_stands_in_one_place():
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert yaml.safe_load(text_of(ROOT / "CITATION.cff"))["version"] == geo_r1.__version__
    assert geo_r1.__version__ in text_of(ROOT / "CHANGELOG.md")


def test_the_link_leads_to_the_recipes_of_the_package():
    assert (ROOT / "recipes").resolve() == ROOT / "geo_r1" / "recipes"


def test_the_workflow_runs_the_commands_that_people_run():
    workflow = yaml.safe_load(text_of(ROOT / ".github" / "workflows" / "ci.yml"))
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make check", "make test", "make docs", "make demo"} <= set(steps)


def test_the_cluster_task_runs_the_trainer():
    task = yaml.safe_load(text_of(ROOT / "deploy" / "skypilot.yaml"))
    assert "-m geo_r1.train geo_r1_7b" in task["run"] and task["workdir"] == "."


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_a_container_copies_from_the_checkout_and_names_what_it_runs(name):
    lines = text_of(ROOT / "deploy" / name).replace("\\\n", " ").splitlines()
    instructions = [line.split()[0] for line in lines if line and not line.startswith(("#", " "))]
    assert set(instructions) <= {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert instructions[0] == "FROM" and instructions[-1] == "CMD"
    assert f"docker build -f deploy/{name}" in text_of(ROOT / "deploy" / name)
