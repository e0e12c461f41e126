"""What holds the house together: the public names, and the direction of imports."""

import ast
import importlib
import inspect
import subprocess
import sys
import typing
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import geo_r1
from geo_r1 import kernels
from geo_r1.kernels import GRPOLossConfig

PACKAGE = Path(geo_r1.__file__).parent

# The ops as the design states them: arguments in order, then keyword-only options with their defaults.
_LOSS_OPTIONS = {
    "old_logp_R": None,
    "ref_logp_R": None,
    "importance_weight_R": None,
    "sequence_R": None,
    "entropy_weight_R": None,
    "config": GRPOLossConfig(),
    "impl": None,
}
OPS = {
    "group_advantage": (
        "reward_N cu_group",
        {
            "valid_N": None,
            "baseline": "mean",
            "scale": "group",
            "eps": 1e-4,
            "correction": 1,
            "cu_completion": None,
            "num_rows": None,
            "impl": None,
        },
    ),
    "grpo_loss": ("logits_RV target_R advantage_R token_weight_R", _LOSS_OPTIONS),
    "linear_grpo_loss": (
        "hidden_RC lm_head_VC target_R advantage_R token_weight_R",
        _LOSS_OPTIONS | {"scratch_bytes": None},
    ),
    "linear_logprob": (
        "hidden_RC lm_head_VC target_R",
        {"temperature": 1.0, "impl": None, "scratch_bytes": None},
    ),
    "linear_cross_entropy": (
        "hidden_RC lm_head_VC target_R token_weight_R",
        {"impl": None, "scratch_bytes": None},
    ),
    "packed_attention": ("q_THD k_TKD v_TKD layout", {"causal": True, "scale": None, "impl": None}),
    "token_weights": (
        "completion_len_N loss_type",
        {"num_items": None, "max_completion_length": None, "mask_R": None, "dtype": torch.float32},
    ),
    "available_impls": ("", {}),
}
CLASSES = {"PackedLayout", "GRPOLossConfig", "GRPOLossOutput"}

# What each part of geo_r1 may import of it, besides itself.
MAY_IMPORT = {
    "__main__": {"errors"},
    "kernels": set(),
    "models": {"errors", "kernels"},
    "errors": set(),
    "answers": set(),
    "cores": set(),
    "files": set(),
    "place_names": set(),
    "places": {"errors", "place_names"},
    "data": {"errors", "kernels", "models", "answers", "files", "places", "cores"},
    "rewards": {"errors", "answers"},
    "rollout": {"errors", "files", "kernels", "models", "data", "rewards"},
    "eval": {"errors", "kernels", "models", "answers", "files", "places", "data", "rewards", "rollout"},
    "train": {
        "errors",
        "kernels",
        "models",
        "answers",
        "files",
        "data",
        "rewards",
        "rollout",
        "eval",
        "cores",
    },
}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module, source, is_package=False):
    """Every module a file imports, wherever in the file: absolute names, submodules resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level + is_package or None] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & FILES.keys()
            # `from geo_r1 import kernels` asks for the submodule, not for what stands in geo_r1 itself.
            found |= submodules if len(submodules) == len(node.names) else submodules | {base}
    return found


IMPORTS = {
    module: imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    for module, path in FILES.items()
}


def part_of(module):
    """The part of geo_r1 a module is in; None outside geo_r1, and for geo_r1 itself."""
    top, *rest = module.split(".")
    return rest[0] if top == "geo_r1" and rest else None


def reach(module):
    """Every module of geo_r1 that importing this one leads to, itself left out unless in a circle."""
    seen, todo = set(), [module]
    while todo:
        new = (IMPORTS[todo.pop()] & FILES.keys()) - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import geo_r1.train.stages.loop as x, torch", {"geo_r1.train.stages.loop", "torch"}),
        ("from geo_r1.train.stages.loop import Step", {"geo_r1.train.stages.loop"}),
        ("from geo_r1.train.stages import loop", {"geo_r1.train.stages.loop"}),
        ("from geo_r1 import kernels, train", {"geo_r1.kernels", "geo_r1.train"}),
        ("from geo_r1.kernels import layout, packed_attention", {"geo_r1.kernels", "geo_r1.kernels.layout"}),
        ("from .loop import Step", {"geo_r1.train.stages.loop"}),
        ("from . import loop", {"geo_r1.train.stages.loop"}),
        ("from ...kernels.layout import plan_batches", {"geo_r1.kernels.layout"}),
        ("def f():\n    if x:\n        from benchmarks import y", {"benchmarks"}),
    ],
)
def test_imports_are_seen_however_they_are_written(source, found):
    assert imports("geo_r1.train.stages.grpo", source) == found
    assert imports("geo_r1.train.stages", source, is_package=True) == found


def test_every_part_has_its_place():
    assert {part_of(module) for module in FILES} - {None} == MAY_IMPORT.keys()
    for part, others in MAY_IMPORT.items():
        for other in others:
            assert part not in MAY_IMPORT[other], f"{part} and {other} may import each other"


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    part = part_of(module)
    wrong = {
        name
        for name in IMPORTS[module]
        if part_of(name) not in {None, part} | MAY_IMPORT.get(part, set())
        or (name == "geo_r1" and part not in ("__main__", "train"))  # these say the version
    }
    assert not wrong


# Within train, each row may import the rows above it.
TRAIN_FLOORS = [
    {"recipe", "group"},
    {"parallel"},
    {"state"},
    {"report"},
    {"context", "sources", "models"},
    {"updater"},
    {"rl"},
    {"stages", "serve"},
    {"run", "estimate"},
    {"ablate"},
    {"__main__"},
]


def test_train_has_no_upward_import():
    floor = {name: number for number, names in enumerate(TRAIN_FLOORS) for name in names}
    for module, imported in IMPORTS.items():
        if not module.startswith("geo_r1.train."):
            continue
        own = module.split(".")[2]
        for name in imported:
            if name.startswith("geo_r1.train.") and name.split(".")[2] != own:
                assert floor[name.split(".")[2]] < floor[own], f"{module} imports {name}"


def test_no_circle():
    TopologicalSorter({module: IMPORTS[module] & FILES.keys() - {module} for module in FILES}).prepare()


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_benchmarks_or_tests(module):
    assert not {name.split(".")[0] for name in IMPORTS[module]} & {"benchmarks", "tests", "conftest"}


@pytest.mark.parametrize(("one", "other"), [("sft", "grpo"), ("grpo", "sft")])
def test_stages_share_the_loop_and_never_each_other(one, other):
    reached = reach(f"geo_r1.train.stages.{one}")
    assert "geo_r1.train.stages.loop" in reached
    assert f"geo_r1.train.stages.{other}" not in reached


@pytest.mark.parametrize("module", ["geo_r1.train.recipe.load", "geo_r1.rewards", "geo_r1.answers"])
def test_recipes_and_rewards_are_read_without_torch(module):
    probe = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_public_names_are_exactly_these():
    assert sorted(kernels.__all__) == sorted(OPS.keys() | CLASSES)
    assert len(kernels.__all__) == len(set(kernels.__all__)) == 11
    assert all(inspect.isclass(getattr(kernels, name)) == (name in CLASSES) for name in kernels.__all__)


@pytest.mark.parametrize("name", OPS)
def test_arguments_are_those_of_the_design(name):
    arguments, options = OPS[name]
    parameters = inspect.signature(getattr(kernels, name)).parameters.values()
    expected = [
        (a, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty) for a in arguments.split()
    ]
    expected += [(o, inspect.Parameter.KEYWORD_ONLY, default) for o, default in options.items()]
    assert [(p.name, p.kind, p.default) for p in parameters] == expected


@pytest.mark.parametrize(
    ("owner", "field", "choices"),
    [
        (kernels.group_advantage, "baseline", {"mean", "leave_one_out"}),
        (kernels.group_advantage, "scale", {"group", "batch", "none"}),
        (GRPOLossConfig, "policy", {"clip", "cispo", "sapo", "vespo", "geo_mean"}),
        (GRPOLossConfig, "importance_sampling_level", {"token", "sequence", "sequence_token"}),
        (GRPOLossConfig, "kl_estimator", {"k1", "k2", "k3", "abs", "k1+", "k3+", "low_var_kl"}),
    ],
)
def test_choices_are_those_of_the_design(owner, field, choices):
    assert set(typing.get_args(typing.get_type_hints(owner)[field])) == choices


def test_fields_of_the_public_classes():
    def fields(cls):
        return list(inspect.signature(cls).parameters)

    lengths, boundaries = ["prompt_len", "completion_len"], ["cu_group", "prefix_len", "cu_segment"]
    assert fields(kernels.PackedLayout) == [*lengths, *boundaries, "segment_parent"]
    assert fields(kernels.PackedLayout.from_lengths) == [*lengths, "device"]
    outputs = ["loss", "logp_R", "entropy_R", "kl_R", "ratio_R", "clipped_R"]
    assert fields(kernels.GRPOLossOutput) == outputs
    named = {
        "epsilon",
        "epsilon_high",
        "delta",
        "policy",
        "importance_sampling_level",
        "beta",
        "entropy_coef",
    }
    assert named <= set(fields(GRPOLossConfig))


@pytest.mark.parametrize("name", [*OPS, "PackedLayout.from_lengths"])
def test_a_function_says_what_goes_in_what_comes_out_and_what_goes_wrong(name):
    function = kernels
    for part in name.split("."):
        function = getattr(function, part)
    text, parameters = inspect.getdoc(function), inspect.signature(function).parameters
    assert "\nReturns:\n" in text
    if parameters:
        assert "\nArgs:\n" in text and "\nRaises:\n" in text
        described = text.split("\nArgs:\n")[1].split("\nReturns:\n")[0]
        assert not [p for p in parameters if p not in described]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_says_what_it_is(name):
    text = getattr(kernels, name).__doc__
    assert text and not text.startswith(f"{name}(")  # what dataclass writes where there is none


def test_no_module_is_hidden_behind_another_name():
    """`import geo_r1.a.b as x` gives the module, not a function of that name in `geo_r1.a`."""
    hidden = []
    for module in sorted(FILES.keys() - {"geo_r1"}):
        parent, _, name = module.rpartition(".")
        if name == "__main__":
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            assert not error.name.startswith("geo_r1"), error  # an optional package that is not installed
            continue
        if not inspect.ismodule(getattr(sys.modules[parent], name)):
            hidden.append(module)
    assert not hidden
