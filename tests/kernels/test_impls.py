"""The choice of the implementation, on simulated GPUs and builds."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from geo_r1.kernels import __main__, available_impls, extension, impls
from geo_r1.kernels.impls import resolve_impl, runs_on, why_not

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H200, A100 = ("NVIDIA H200", (9, 0)), ("NVIDIA A100-SXM4-80GB", (8, 0))


@pytest.fixture
def machine(monkeypatch):
    """Pretend that there is a GPU and a build of the extension, None for no build."""

    def pretend(device, archs):
        name, capability = device
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(impls, "_HAS_TRITON", True)
        monkeypatch.setattr(extension, "_absent", "no nvcc")
        module = None if archs is None else SimpleNamespace(archs=archs, __file__="/x/_C.so")
        monkeypatch.setattr(extension, "_C", module)

    return pretend


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90", (9, 0), True),
        ("100", (10, 3), True),
        ("100a", (10, 3), False),
        ("80;90a;100", (12, 0), False),
        ("80;90a;120", (12, 1), True),
    ],
)
def test_code_runs_on_the_chips_that_it_was_made_for(archs, capability, runs, machine):
    machine(("a GPU", capability), archs)
    reason = why_not("grpo_loss", "cuda", GPU)
    if runs:
        assert reason is None and resolve_impl("grpo_loss", "cuda", GPU) == "cuda"
    else:
        major, minor = capability
        told = "90a" if capability == (9, 0) else f"{major}{minor}"
        expected = f"built for {archs}, this GPU is {major}.{minor}; GEO_R1_CUDA_ARCHS={told} builds for it"
        assert reason == expected


@pytest.mark.parametrize(
    ("device", "archs", "reason"),
    [
        (H200, "80;90a;100", None),
        (H200, "80;90", None),
        (("Tesla T4", (7, 5)), "80", "written for compute capability 8.0 or later, this GPU is 7.5"),
        (A100, "80;90a;100", "written for compute capability 9.0, this GPU is 8.0"),
        (H200, None, "no nvcc"),
    ],
)
def test_attention_in_cuda_is_for_one_chip(device, archs, reason, machine):
    machine(device, archs)
    assert why_not("packed_attention", "cuda", GPU) == reason
    assert ("cuda" in runs_on("packed_attention", GPU)) == (reason is None)


@pytest.mark.parametrize("op", list(available_impls()))
def test_the_default_is_triton_on_a_gpu_and_the_reference_without_it(op, machine, monkeypatch):
    machine(H200, "80;90a")
    assert runs_on(op, GPU)[:3] == ("triton", "reference", "cuda")
    assert resolve_impl(op, None, GPU) == "triton"
    assert resolve_impl(op, None, GPU, {"triton": "float64 inputs", "cuda": "float64 inputs"}) == "reference"
    assert available_impls()[op][0] == "triton"
    machine(H200, None)
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run here \(no nvcc\); available: triton, ref"):
        resolve_impl(op, "cuda", GPU)
    monkeypatch.setattr(impls, "_HAS_TRITON", False)
    assert resolve_impl(op, None, GPU) == "reference"
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here \(triton is not installed\)"):
        resolve_impl(op, "triton", GPU)


@pytest.mark.parametrize("op", list(available_impls()))
def test_on_a_cpu_the_reference_comes_first_and_a_build_for_gpus_does_not_run(op, machine):
    machine(H200, "80;90a")
    assert runs_on(op, CPU)[0] == "reference" and "cuda" not in runs_on(op, CPU)
    with pytest.raises(
        ValueError, match=rf"{op}: impl='cuda' cannot run here \(device cpu\); available: ref"
    ):
        resolve_impl(op, "cuda", CPU)


def test_a_record_changes_the_default_on_its_own_device(machine, monkeypatch):
    row = {("grpo_loss", "NVIDIA H200"): ("cuda", "h200-abc1234.json")}
    monkeypatch.setattr(impls, "_FASTEST", row)
    machine(H200, "90a")
    assert resolve_impl("grpo_loss", None, GPU) == "cuda"
    assert resolve_impl("grpo_loss", None, GPU, {"cuda": "float64 inputs"}) == "triton"
    assert resolve_impl("grpo_loss", "triton", GPU) == "triton"
    assert resolve_impl("linear_logprob", None, GPU) == "triton"
    assert resolve_impl("grpo_loss", None, CPU) == "reference"
    assert available_impls()["grpo_loss"] == ("cuda", "triton", "reference")
    machine(H200, "80")  # its build is not here
    assert resolve_impl("grpo_loss", None, GPU) == "triton"
    machine(A100, "80")
    assert resolve_impl("grpo_loss", None, GPU) == "triton"


def test_a_tracer_asks_for_the_default_of_the_device(machine, monkeypatch):
    """The names and capabilities of devices are nothing that a graph can hold."""

    def name(_):
        time.sleep(0)  # cannot be traced
        return "NVIDIA H200"

    machine(H200, "90a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which torch asks as well
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(impls, "_FASTEST", {("grpo_loss", "NVIDIA H200"): ("cuda", "")})

    def chosen(x, op):
        try:
            resolve_impl(op, "flash", GPU)
        except ValueError:
            x = x + 1
        return x + len(resolve_impl(op, None, GPU, {"reference": "anything"}))

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1), "grpo_loss").item() == 1 + len("cuda")
    assert compiled(torch.zeros(1), "linear_logprob").item() == 1 + len("triton")


def fastest_of_ours(record, op):
    """Of two or more implementations, the one whose times have the smallest geometric mean over sizes."""
    ms = {}
    for row in record["measurements"]:
        if (row["op"], row["kind"]) == (op, "ours"):
            time = row["ms"] if row["status"] == "measured" else math.inf
            ms.setdefault(row["provider"].removeprefix("geo_r1 "), {})[row["size"]] = time
    sizes = set().union(*ms.values())
    assert len(ms) > 1 and all(times.keys() == sizes for times in ms.values()), f"{op}: nothing to compare"
    return min(ms, key=lambda name: sum(map(math.log, ms[name].values())))


def test_every_row_of_the_table_is_shown_by_its_record():
    for (op, device), (impl, name) in impls._FASTEST.items():
        record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        assert record["device"]["name"] == device and not record["dirty"]
        assert impl != "flash"  # which inputs it refuses is only asked where it is named
        assert fastest_of_ours(record, op) == impl


def test_the_fastest_of_a_record():
    def row(impl, size, ms, **changes):
        return {
            "op": "grpo_loss",
            "kind": "ours",
            "provider": f"geo_r1 {impl}",
            "size": size,
            "status": "measured",
            "ms": ms,
        } | changes

    rows = [row("triton", "small", 1.0), row("triton", "large", 8.0)]
    with pytest.raises(AssertionError, match="nothing to compare"):
        fastest_of_ours({"measurements": rows}, "grpo_loss")
    other = [row("x", "small", 0.1, kind="peer"), row("x", "small", 0.1, op="linear_logprob")]
    cuda = [row("cuda", "small", 1.5), row("cuda", "large", 4.0)]
    assert fastest_of_ours({"measurements": rows + cuda + other}, "grpo_loss") == "cuda"
    wrong = row("cuda", "large", 4.0, status="wrong")
    assert fastest_of_ours({"measurements": [*rows, cuda[0], wrong]}, "grpo_loss") == "triton"
    with pytest.raises(AssertionError, match="nothing to compare"):
        fastest_of_ours({"measurements": rows + cuda[:1]}, "grpo_loss")


def test_what_is_printed_of_a_machine(machine, monkeypatch, capsys):
    monkeypatch.setattr(impls, "_FASTEST", {("grpo_loss", "NVIDIA A100-SXM4-80GB"): ("cuda", "a100.json")})
    machine(A100, "80;90a")
    monkeypatch.setattr(impls, "_INTERPRETED", False)
    __main__.main()
    printed = capsys.readouterr().out
    cpu, gpu = printed.split("\n\n")[1:]
    assert printed.startswith("CUDA kernels  built for 80;90a: /x/_C.so\nTriton        ")
    assert re.search(rf"^flash         .*torch {re.escape(torch.__version__)}$", printed, re.MULTILINE)
    assert cpu.splitlines() == [
        "cpu",
        "  op                    default    because          by name  cannot run",
        "  group_advantage       reference  always on a CPU  -        triton, cuda",
        "  grpo_loss             reference  always on a CPU  -        triton, cuda",
        "  linear_grpo_loss      reference  always on a CPU  -        triton, cuda",
        "  linear_logprob        reference  always on a CPU  -        triton, cuda",
        "  linear_cross_entropy  reference  always on a CPU  -        triton, cuda",
        "  packed_attention      reference  always on a CPU  -        triton, cuda, flash",
        "  no triton: device cpu",
        "  no cuda: device cpu",
        "  no flash: device cpu",
    ]
    assert gpu.startswith("cuda:0: NVIDIA A100-SXM4-80GB, compute capability 8.0\n")
    lines = [line.split() for line in gpu.splitlines()]
    order = ["first", "that", "runs"]
    assert ["group_advantage", "triton", *order, "reference,", "cuda", "-"] in lines
    fastest = ["fastest", "in", "benchmarks/results/a100.json"]
    assert ["grpo_loss", "cuda", *fastest, "triton,", "reference", "-"] in lines
    assert ["packed_attention", "triton", *order, "reference,", "flash", "cuda"] in lines
    assert gpu.rstrip().endswith("  no cuda: written for compute capability 9.0, this GPU is 8.0")

    machine(A100, None)
    __main__.main()
    assert capsys.readouterr().out.startswith("CUDA kernels  none: no nvcc\n")


def test_it_prints_where_there_is_neither_triton_nor_an_extension():
    probe = (
        "import runpy, sys\n"
        "sys.modules |= {'triton': None, 'geo_r1._C': None}\n"
        "runpy.run_module('geo_r1.kernels', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("CUDA kernels  none: geo_r1._C is not built")


@pytest.mark.parametrize("impl", ["cuda"])
def test_an_extension_is_called_with_plain_values(impl, monkeypatch):
    """Addresses, names and the queue; whatever it is given by mistake is named."""
    seen = {}

    def group_advantage_launcher(**arguments):
        seen.update(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reward = torch.zeros(4, device=device)
    with pytest.raises(TypeError, match="missing argument dtype"):
        extension.launch("group_advantage", reward, out=reward)
    given = dict.fromkeys(("logits", "target", "logp", "entropy", "lse"))
    sizes = dict.fromkeys(("num_rows", "num_cols", "stride_r", "stride_v"), 0)
    with pytest.raises(TypeError, match="no argument lsee in this launcher"):
        numbers = {"dtype": torch.float32, "inv_temperature": 1.0, "lsee": 0}
        extension.launch("row_statistics", reward, **given, **sizes, **numbers)
    monkeypatch.setattr(extension._C, "group_advantage", group_advantage_launcher)
    extension.launch("group_advantage", reward, dtype=torch.bfloat16, out=reward, valid=None, eps=0.5)
    assert seen.pop("device") == 0 and isinstance(seen.pop("stream"), int)
    assert seen == {"dtype": "bfloat16", "out": reward.data_ptr(), "valid": None, "eps": 0.5}
