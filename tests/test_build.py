"""The build of csrc/: the toolchain, the architectures, incremental builds, and packaging without nvcc."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11")

import geo_r1
from csrc import nvcc

ROOT = Path(nvcc.__file__).parent.parent
KNOWN = ["75", "80", "86", "90", "100"]

# Stands in for nvcc: an object is its source and headers, a report the source's name, a library the objects.
FAKE = """#!{python} -I
import re, sys
from pathlib import Path
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Cuda compilation tools, release {release}, V{release}.88")
elif arguments == ["--list-gpu-arch"]:
    print("\\n".join("compute_" + number for number in {known}))
else:
    out = Path(arguments[arguments.index("-o") + 1])
    if "-shared" in arguments:
        out.write_text("".join(Path(a).read_text() for a in arguments if a.endswith(".o") and a != str(out)))
        sys.exit()
    source = Path(arguments[arguments.index("-c") + 1])
    text = source.read_text()
    if "error" in text:
        sys.exit("ptxas info    : 0 bytes gmem\\n" + str(source) + "(1): error: as it says")
    if "edited" in text:
        source.write_text("// while nvcc ran\\n")
    headers = [source.parent / name for name in re.findall('#include "(.*)"', text)]
    out.write_text(text + "".join(header.read_text() for header in headers))
    print("compiled", source.name)
"""


def put_nvcc(home, release="13.0", known=KNOWN):
    """A stand-in below a toolkit's folder."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(python=sys.executable, release=release, known=known), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project of two CUDA files, one for sm_90 alone, and a toolkit."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    for name in ("GEO_R1_BUILD_CUDA", "GEO_R1_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    put_nvcc(tmp_path / "toolkit")
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "common.cuh").write_text("// common\n", encoding="utf-8")
    (csrc / "rows.cu").write_text('#include "common.cuh"\n// rows\n', encoding="utf-8")
    (csrc / "tiles_sm90.cu").write_text("// tiles\n", encoding="utf-8")
    (csrc / "bindings.cpp").write_text("//\n", encoding="utf-8")
    return tmp_path


def rebuilt(tree, capfd):
    """Build; the names of what was compiled."""
    nvcc.build(nvcc.find_toolchain(), tree)
    return sorted(re.findall(r"^\[\d/\d\] (\S+) \(\d+ s\)$", capfd.readouterr().err, re.MULTILINE))


def test_the_toolkit_named_comes_first_then_the_path_then_the_usual_place(tmp_path, monkeypatch):
    home, other, path, usual = (tmp_path / name for name in ("home", "other", "path", "usual"))
    expected = [put_nvcc(place) for place in (home, other, path, usual)]
    monkeypatch.setattr(nvcc, "_DEFAULT_HOME", usual)
    environ = {"CUDA_HOME": str(home), "CUDA_PATH": str(other), "PATH": str(path / "bin")}
    for name, found in zip([*environ, None], expected, strict=True):
        assert nvcc.find_nvcc(environ) == found
        environ.pop(name, None)


def test_where_nvcc_was_looked_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc, "_DEFAULT_HOME", tmp_path)
    with pytest.raises(
        nvcc.UnavailableError, match=f"no nvcc on PATH nor in {tmp_path}/bin, and CUDA_HOME is"
    ):
        nvcc.find_nvcc({"PATH": ""})
    # A toolkit that is named and lacks nvcc is not passed over in silence.
    environ = {"CUDA_HOME": str(tmp_path), "PATH": str(put_nvcc(tmp_path / "other").parent)}
    with pytest.raises(nvcc.UnavailableError, match=f"no {tmp_path}/bin/nvcc \\(CUDA_HOME={tmp_path}\\)"):
        nvcc.find_nvcc(environ)


@pytest.mark.parametrize(
    ("wish", "release", "error", "message"),
    [
        ("", None, nvcc.UnavailableError, "there is no .*/bin/nvcc"),
        ("0", "13.0", nvcc.UnavailableError, "GEO_R1_BUILD_CUDA=0"),
        ("", "12.6", nvcc.UnavailableError, "nvcc is 12.6, and CUDA 12.8 or later is needed"),
        ("1", None, nvcc.BuildError, "GEO_R1_BUILD_CUDA=1, but there is no .*/bin/nvcc"),
        ("1", "12.6", nvcc.BuildError, "GEO_R1_BUILD_CUDA=1, but .*nvcc is 12.6, and CUDA 12.8"),
        ("yes", "13.0", nvcc.BuildError, "GEO_R1_BUILD_CUDA=yes: expected 0 .* or 1"),
    ],
)
def test_whether_it_builds(wish, release, error, message, tmp_path):
    if release:
        put_nvcc(tmp_path, release)
    with pytest.raises(error, match=message):
        nvcc.find_toolchain({"GEO_R1_BUILD_CUDA": wish, "CUDA_HOME": str(tmp_path)})


@pytest.mark.parametrize("wish", ["", "1"])
def test_it_builds_where_nvcc_is(wish, tmp_path):
    path = put_nvcc(tmp_path, "12.8")
    found = nvcc.find_toolchain({"GEO_R1_BUILD_CUDA": wish, "CUDA_HOME": str(tmp_path)})
    assert (found.nvcc, found.release, found.archs) == (path, (12, 8), ("80", "90a", "100"))


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", ("80", "90a", "100")),
        ("90a", ("90a",)),
        (" 86, 90a;86;", ("86", "90a")),
        ("100a,80", ("100a", "80")),
    ],
)
def test_architectures(text, archs):
    assert nvcc.parse_archs(text, KNOWN) == archs


def test_the_default_is_what_nvcc_knows_of_it():
    assert nvcc.parse_archs("", ["80", "86", "90"]) == ("80", "90a")


@pytest.mark.parametrize("arch", ["75", "80a", "120", "sm_90a", "90b"])
def test_an_unknown_architecture_is_named_with_those_that_are_known(arch):
    message = f"GEO_R1_CUDA_ARCHS=80;{arch}: '{arch}' is none of .*: 80, 86, 90, 90a, 100, 100a$"
    with pytest.raises(nvcc.BuildError, match=message):
        nvcc.parse_archs(f"80;{arch}", KNOWN)


def test_what_sources_are_built_for(tree, monkeypatch):
    monkeypatch.setenv("GEO_R1_CUDA_ARCHS", "80;100")
    units = {unit.source.name: unit for unit in nvcc.list_units(tree, nvcc.find_toolchain())}
    assert {name: unit.archs for name, unit in units.items()} == {
        "bindings.cpp": (),
        "rows.cu": ("80", "100"),
        "tiles_sm90.cu": ("90a",),
    }
    assert '-DGEO_R1_CUDA_ARCHS="80;100"' in units["bindings.cpp"].command
    chips = [word for word in units["rows.cu"].command if "gencode" in word]
    assert chips == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 100)]


def test_only_what_changed_is_built_again(tree, capfd, monkeypatch):
    everything = ["bindings.cpp", "rows.cu", "tiles_sm90.cu"]
    assert rebuilt(tree, capfd) == everything
    built = tree / "build" / "csrc" / nvcc.EXTENSION
    assert built.read_text() == '//\n#include "common.cuh"\n// rows\n// common\n// tiles\n'
    assert (tree / "build" / "csrc" / "rows.log").read_text() == "compiled rows.cu\n"
    assert rebuilt(tree, capfd) == []
    (tree / "csrc" / "common.cuh").touch()
    assert rebuilt(tree, capfd) == []
    (tree / "csrc" / "common.cuh").write_text("// other\n", encoding="utf-8")
    assert rebuilt(tree, capfd) == ["rows.cu"]
    assert "// other\n" in built.read_text() and "// common\n" not in built.read_text()
    (tree / "build" / "csrc" / "tiles_sm90.log").unlink()  # the gate needs it
    assert rebuilt(tree, capfd) == ["tiles_sm90.cu"]
    monkeypatch.setenv("GEO_R1_CUDA_ARCHS", "90a")
    assert rebuilt(tree, capfd) == ["bindings.cpp", "rows.cu"]
    put_nvcc(tree / "toolkit", "13.1")
    assert rebuilt(tree, capfd) == everything
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    assert rebuilt(tree, capfd) == everything
    (tree / "csrc" / "rows.cu").unlink()
    assert rebuilt(tree, capfd) == []
    assert built.read_text() == "//\n// tiles\n"
    assert not list((tree / "build" / "csrc").glob(".*"))  # nothing half made


def test_an_edit_while_nvcc_runs_is_not_lost(tree, capfd):
    (tree / "csrc" / "rows.cu").write_text("// edited\n", encoding="utf-8")
    assert "rows.cu" in rebuilt(tree, capfd)
    assert rebuilt(tree, capfd) == ["rows.cu"]
    assert rebuilt(tree, capfd) == []


def test_a_failure_is_told_in_the_compiler_s_words_and_leaves_no_object(tree, capfd):
    rebuilt(tree, capfd)
    (tree / "csrc" / "rows.cu").write_text("// error\n", encoding="utf-8")
    with pytest.raises(nvcc.BuildError) as failed:
        nvcc.build(nvcc.find_toolchain(), tree)
    command, *words = str(failed.value).splitlines()
    assert command.startswith(str(tree / "toolkit" / "bin" / "nvcc")) and command.endswith("csrc/rows.cu")
    assert words == [
        "csrc/rows.cu(1): error: as it says",
        "nvcc fails; GEO_R1_BUILD_CUDA=0 installs without CUDA kernels",
    ]
    (unit,) = (u for u in nvcc.list_units(tree, nvcc.find_toolchain()) if u.source.name == "rows.cu")
    assert nvcc.is_stale(unit, tree)


def test_an_extension_in_use_is_not_written_to(tmp_path):
    built, target = tmp_path / "built.so", tmp_path / "package" / "_C.so"
    built.write_bytes(b"one")
    nvcc.install(built, target)
    first = target.stat().st_ino
    nvcc.install(built, target)
    assert target.stat().st_ino == first
    with target.open("rb") as used:
        built.write_bytes(b"two")
        nvcc.install(built, target)
        assert used.read() == b"one"
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["_C.so"]


def package(project, hook, environ):
    """Run a hook of the build backend."""
    code = f"from setuptools import build_meta; build_meta.{hook}('out')"
    environ = os.environ | {"GEO_R1_BUILD_CUDA": ""} | environ
    return subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environ, capture_output=True, text=True, check=False
    )


def test_without_nvcc_it_packages_and_says_so(tmp_path):
    """Builds from the source package, to show that it holds all inputs of a build."""
    pytest.importorskip("setuptools")
    project = tmp_path / "project"
    for name in ("csrc", "geo_r1"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    (project / "geo_r1" / nvcc.EXTENSION).touch()  # of an earlier build; not part of this one
    nowhere = {"CUDA_HOME": str(tmp_path / "nowhere")}

    done = package(project, "build_sdist", nowhere)
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "out").iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    sources = sorted(path.name for path in (project / "csrc").iterdir())
    assert sorted(path.name for path in (unpacked / "csrc").iterdir()) == sources

    done = package(unpacked, "build_wheel", nowhere)
    assert done.returncode == 0, done.stderr
    says = f"geo_r1 installs without CUDA kernels: there is no {tmp_path}/nowhere/bin/nvcc"
    assert [line for line in done.stderr.splitlines() if "CUDA kernels" in line] == [
        f"{says} (CUDA_HOME={tmp_path}/nowhere)"
    ]
    (wheel,) = (unpacked / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        assert not [name for name in names if name.startswith(("csrc", "geo_r1/_C"))]
        files = [path for path in (ROOT / "geo_r1").rglob("*") if path.is_file()]
        data = {
            path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".py", ".pyc", ".so")
        }
        assert data >= {"geo_r1/py.typed", "geo_r1/recipes/world.toml", "geo_r1/train/report/report.html.j2"}
        assert names >= data
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"geo-r1 = geo_r1.__main__:main" in packed.read(entry_points)
        packed.extractall(tmp_path / "installed")
    probe = "import geo_r1.kernels as k; print(k.__file__); print('cuda' in str(k.available_impls()))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", probe],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [f"{tmp_path}/installed/geo_r1/kernels/__init__.py", "False"], done.stderr


def test_a_demand_that_cannot_be_met_is_one_line(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    done = package(tmp_path, "build_wheel", {"GEO_R1_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"GEO_R1_BUILD_CUDA=1, but there is no {tmp_path}/bin/nvcc (CUDA_HOME={tmp_path})"
    ]


def test_the_extension_imports_without_torch_or_a_driver_and_says_what_is_missing():
    # On disk: a test may have put an emulated build in its place.
    if importlib.machinery.PathFinder.find_spec("geo_r1._C", geo_r1.__path__) is None:
        pytest.skip("geo_r1._C is not built")
    probe = "\n".join(
        [
            "import sys, geo_r1._C as extension",
            "print(extension.archs, 'torch' in sys.modules)",
            "try: extension.device_count()",
            "except RuntimeError as error: print(error)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    archs, reason = done.stdout.splitlines()
    assert re.fullmatch(r"\d+a?(;\d+a?)* False", archs)
    assert reason.startswith("no CUDA device: ")
