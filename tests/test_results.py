"""What docs/results.md says of a record."""

import json

import pytest

from benchmarks import results
from benchmarks.plots import curves, draw_steps, steps
from benchmarks.records import RESULTS, ROOT
from benchmarks.targets import TARGETS, Finding, verdict


def row(op, size, provider, kind, ms=None, **more):
    return (
        {"op": op, "size": size, "provider": provider, "kind": kind, "status": "measured"}
        | ({"ms": ms, "share": 0.5, "peak_mib": 1024.0, "error": 1e-3} if ms else {})
        | more
    )


LINEAR = ("linear_grpo_loss", "R=8192 C=3584 V=152064")
FORWARD = ("packed_attention forward", "causal 4 x 4096")
LOSS_ROWS = ("grpo_loss rows", "R=4096 V=152064")
STEP = ("training step", "Qwen2.5-VL-7B, 6 images, 8 completions")
ROWS = [
    row(*LINEAR, "geo_r1 triton", "ours", 11.5),
    row(*LINEAR, "geo_r1 reference", "ours", 20.0),
    row(*LINEAR, "geo_r1 cuda", "ours", 11.0),  # not the default, but the fastest
    row(*LINEAR, "bare products", "floor", 10.0),
    row(*LINEAR, "Liger fused-linear GRPO", "peer", status="missing", reason="liger_kernel is not installed"),
    row(*LOSS_ROWS, "geo_r1 triton, out of place", "ours", 1.2, share=0.8),
    row(*LOSS_ROWS, "geo_r1 triton, in place", "ours", 1.1, share=0.86),
    row(*LOSS_ROWS, "geo_r1 cuda, out of place", "ours", 1.0, share=0.9),
    row(*LOSS_ROWS, "geo_r1 cuda, in place", "ours", status="wrong", reason="error 1"),
    row(*FORWARD, "geo_r1 triton", "ours", 2.0),
    row(*FORWARD, "geo_r1 cuda", "ours", 1.0),
    row(*FORWARD, "flash-attn 3", "peer", 0.96),
    row("packed_attention", "causal 4 x 4096", "geo_r1 triton", "ours", 2.0),
    row("packed_attention", "causal 4 x 4096", "geo_r1 flash", "ours", 1.0),  # it is the library's
    row("packed_attention", "causal 4 x 4096", "torch SDPA, cuDNN", "peer", 1.0),
    row(
        *("packed_attention", "shared prompt 4300 + 8 x 400", "geo_r1 triton", "ours", 1.0),
        facts={"operations_saved": 4.0},
    ),
    row(
        *("packed_attention", "shared prompt 4300 + 8 x 400", "geo_r1 flash", "ours", 0.96),
        facts={"operations_saved": 4.0},
    ),
    row("packed_attention", "shared prompt 4300 + 8 x 400", "torch flash varlen", "peer", 3.6),
    row("packed_attention", "shared prompt 4300 + 8 x 400", "flex_attention, compiled", "peer", 0.5),
    row("packed_attention", "vision windows", "geo_r1 triton", "ours", status="wrong", reason="error 1"),
    row("packed_attention", "vision whole images", "geo_r1 cuda", "ours", status="missing", reason="no nvcc"),
    row(
        *STEP,
        "geo_r1 packed",
        "ours",
        100.0,
        facts={"layers": 28, "tokens": 5000, "teraflop": 407.0},
        peak_mib=2048.0,
    ),
    row(*STEP, "transformers, padded", "peer", 500.0, peak_mib=4096.0),
]
SHARES = {"vision": 0.25, "text": 0.25, "loss": 0.125, "backward": 0.375}


def scaling_row(provider, kind, ms, completions, images, length):
    facts = {"completions": completions, "images": images, "length": length, "tokens": 1, **SHARES}
    return row(
        "training step, scaling", f"{completions}, {images}, {length}", provider, kind, ms, facts=facts
    )


SCALING_ROWS = [
    scaling_row(provider, kind, factor * (completions + images + length), completions, images, length)
    for provider, kind, factor in (("geo_r1 packed", "ours", 1.0), ("transformers, padded", "peer", 5.0))
    for completions, images, length in ((4, 6, 40.0), (1, 6, 40.0), (8, 6, 40.0), (8, 0, 40.0), (8, 6, 10.0))
]
RECORD = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234",
    "dirty": False,
    "device": {
        "type": "cuda",
        "name": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "driver": "580",
        "extension": "90a",
    },
    "ceilings": {"matmul_tflops": 800.0, "copy_gbps": 4300.0},
    "parts": {
        "tests of the kernels": {"status": "ok", "tests": {"passed": 9, "skipped": 1}},
        "compute-sanitizer": {"status": "ok", "tests": {"passed": 2}},
        "world run": {"status": "skipped", "reason": "not installed: rich"},
    },
    "measurements": ROWS,
}


def make_results(tmp_path, *records, page=f"# top\n{results.BEGIN}\nold\n{results.END}\nend\n"):
    (tmp_path / "records").mkdir()
    for index, record in enumerate(records):
        (tmp_path / "records" / f"{index}.json").write_text(json.dumps(record))
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text(page)
    code = results.main(["--records", str(tmp_path / "records"), "--page", str(path)])
    return code, path.read_text()


def test_without_records_nothing_is_measured(tmp_path):
    code, text = make_results(tmp_path)
    assert (
        code == 0
        and text.startswith(f"# top\n{results.BEGIN}\n| work |")
        and text.endswith(f"{results.END}\nend\n")
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(TARGETS) and all(line.endswith("| not measured | – |") for line in rows)
    assert "old" not in text


def test_targets_are_judged_from_the_newest_record_of_a_device(tmp_path):
    older = RECORD | {"date": "2025-01-01T00:00:00+00:00", "commit": "0ld", "measurements": []}
    code, text = make_results(tmp_path, RECORD, older)
    assert code == 0 and "0ld" not in text
    assert "**NVIDIA H200, commit abc1234.** 2026-01-02; driver 580; torch 2.11.0; triton 3.6.0; " in text
    assert "; CUDA kernels for 90a; " in text
    assert "geo_r1 cuda, in place (wrong: error 1)" in text  # what is not the fastest is not passed over
    assert "; tests of the kernels: 9 passed, 1 skipped; compute-sanitizer: 2 passed." in text
    assert "world run (skipped: not installed: rich)" in text
    line = {target.work: next(x for x in text.splitlines() if target.work in x) for target in TARGETS}
    ends = [x.split(" | ", 2)[2] for x in line.values()]
    assert ends == [
        "cuda: 1.10 × the bare products; 1.00 GiB; Liger: liger_kernel is not installed | not fully measured "
        "|",
        "not measured | – |",
        "triton, in place: 86.0%; cuda, out of place: 90.0% | yes |",
        "causal 4 x 4096, triton: 0.50 × as fast as torch SDPA, cuDNN | no |",
        "causal 4 x 4096, cuda: 0.96 × as fast as flash-attn 3 | yes |",
        "flash: 3.75 × as fast as torch flash varlen: 0.94 of the 4.00 × saved | yes |",
        "vision windows, triton: wrong (error 1); vision whole images, cuda: missing (no nvcc) | no |",
        "packed: 50,000 tokens/s, 5.00 × as fast as transformers, padded; MFU 50% (407 TFLOP); "
        "2.0 GiB against 4.0 above the weights | yes |",
        "not measured | – |",
        "not measured | – |",
    ]
    assert "| linear_grpo_loss | R=8192 C=3584 V=152064 | cuda | 11 | 50% | 1,024 | 1e-03 | none |  |" in text
    assert "![Times of every provider on NVIDIA H200, commit abc1234](results-nvidia-h200.png)" in text
    assert (tmp_path / "docs" / "results-nvidia-h200.png").stat().st_size > 10_000


def test_the_page_in_docs_is_what_the_records_say():
    """A record of a CPU, with every table."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = results.section(results.newest_records(RESULTS))
    assert results.replace_section(page, tables) == page


def test_how_a_step_scales_is_a_plot_of_its_own(tmp_path):
    device = {"type": "cpu", "name": "cpu", "versions": {"torch": "2.13.0"}}
    code, text = make_results(tmp_path, RECORD | {"device": device, "measurements": SCALING_ROWS})
    assert code == 0 and "training step, scaling" not in text
    assert "![Cost of a training step on cpu, commit abc1234](scaling-cpu.png)" in text
    assert (tmp_path / "docs" / "scaling-cpu.png").stat().st_size > 10_000


def test_a_curve_holds_all_but_one_number():
    found = curves([*ROWS, *SCALING_ROWS, row("training step, scaling", "x", "p", "peer")])
    assert {axis: by["geo_r1 packed"] for axis, by in found.items()} == {
        "completions": [(1, 47.0), (4, 50.0), (8, 54.0)],
        "images": [(0, 48.0), (6, 54.0)],
        "length": [(10.0, 24.0), (40.0, 54.0)],
    }
    assert found["images"]["transformers, padded"] == [(0, 240.0), (6, 270.0)]
    assert curves(ROWS) == {}


def test_the_step_has_a_chart_of_its_own(tmp_path):
    facts = {
        "parameters": 7e9,
        "images": 6,
        "prompt": 438,
        "completions": 8,
        "length": 40.0,
        "tokens": 5000,
        "layers": 28,
        "teraflop": 407.0,
    }
    timed = [row(*STEP, "geo_r1 packed", "ours", 100.0, facts=facts, dtype="bfloat16"),
             row(*STEP, "geo_r1 slow", "ours", 200.0, facts=facts, dtype="bfloat16"),
             row(*STEP, "transformers, padded", "peer", 650.0, facts=facts, dtype="bfloat16"),
             row("training step", "alone", "geo_r1 packed", "ours", 1.0, facts=facts)]  # fmt: skip
    [(ours, peer)] = steps(timed)
    assert (ours["provider"], peer["provider"]) == ("geo_r1 packed", "transformers, padded")
    record = RECORD | {"measurements": timed}
    code, text = make_results(tmp_path, record)
    chart = (tmp_path / "docs" / "step-nvidia-h200.svg").read_text()
    assert code == 0 and "(step-nvidia-h200.svg)" in text
    assert (
        "<!-- 6.5 × -->" in chart
        and "<!-- 50,000 tokens/s -->" in chart
        and "<!-- 7,692 tokens/s -->" in chart
    )
    assert "<!-- GPU: NVIDIA H200, bfloat16, random weights, commit abc1234, 2026-01-02 -->" in chart
    draw_steps(timed, results.small_print(record), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == chart  # the same records, the same file


def test_milliseconds_are_whole_numbers_above_a_thousand(tmp_path):
    timed = [row(*LINEAR, "geo_r1 triton", "ours", 1004.2), row(*LINEAR, "eager torch", "peer", 16513.2)]
    _, text = make_results(tmp_path, RECORD | {"measurements": timed})
    assert "| triton | 1,004 |" in text and "| eager torch | 16,513 |" in text


def test_a_verdict_needs_every_condition():
    yes, no, unknown = Finding("", True), Finding("", False), Finding("", None)
    assert verdict([yes, yes]) == "yes"
    assert verdict([yes, unknown, no]) == "no"
    assert verdict([yes, unknown]) == "not fully measured"
    assert verdict([unknown]) == "not measured"


@pytest.mark.parametrize("page", ["no markers", f"{results.END} {results.BEGIN}"])
def test_a_page_without_its_markers_is_left_alone(tmp_path, capsys, page):
    assert make_results(tmp_path, RECORD, page=page) == (2, page)
    assert "the page needs one <!-- results:begin -->" in capsys.readouterr().err


def test_a_file_that_is_no_record_is_named(tmp_path, capsys):
    assert make_results(tmp_path, {"date": "2026"})[0] == 2
    assert "0.json is not a record: KeyError('device')" in capsys.readouterr().err
