"""docs/training.md is what would be made now, and knows every key and the models' true sizes."""

import pytest

from geo_r1.models.cost import ModelCost
from geo_r1.train.estimate.page import PAGE, model_config, training_page
from geo_r1.train.recipe.load import _keys
from geo_r1.train.recipe.sections import Recipe


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == training_page(), "make docs"


def test_every_key_is_there():
    page, section, found = PAGE.read_text(encoding="utf-8"), [], set()
    for line in page.splitlines():
        if line.startswith("### "):
            section = [name.strip("`[]") for name in line.removeprefix("### ").split(", ")]
        elif line.startswith("| `") and section:
            found |= {f"{name}.{line.split('`')[1]}" for name in section}
    keys = set(_keys(Recipe))
    assert found == {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


# Source: the parameter counts that the models' files state.
@pytest.mark.parametrize(
    ("name", "count"),
    [("3B", 3_754_622_976), ("7B", 8_292_166_656), ("32B", 33_452_718_336), ("72B", 73_410_777_344)],
)
def test_models_have_their_true_sizes(name, count):
    assert ModelCost.of(model_config(name)).num_parameters == count
