"""The gate of csrc/: how it reads reports and machine code, the faults that it finds, a real build."""

import dataclasses
import json
import shutil

import pytest

pytest.importorskip("triton")

from csrc import gate, nvcc
from geo_r1.kernels import sass

# Output of nvcc 13.0. The second kernel calls a function that has an array.
REPORT = """\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count.
ptxas info    : (C7519) warpgroup.arrive is injected in around line 329 by compiler to allow use of \
registers in GMMA in function '_Z6serialPfmmi'
ptxas info    : (C7519) warpgroup.arrive is injected in around line 347 by compiler to allow use of \
registers in GMMA in function '_Z6serialPfmmi'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
insufficient register resources for the wgmma pipeline in the function '_Z6serialPfmmi'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5spillILi64EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z5spillILi64EEvPf
    376 bytes stack frame, 424 bytes spill stores, 420 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 376 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 10.991 ms
ptxas info    : Compiling entry function '_Z6callerPfi' for 'sm_90a'
ptxas info    : Function properties for _Z6callerPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 0 barriers, 400 bytes cumulative stack size
ptxas info    : Compile time = 19.320 ms
ptxas info    : Function properties for _Z6helperfi
    400 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z6serialPfmmi' for 'sm_90a'
ptxas info    : Function properties for _Z6serialPfmmi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 16 barriers, 256 bytes smem, 364 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3cutPf' for 'sm_90a'
"""

SASS = """\
arch = sm_80
\tcode for sm_80
\t\tFunction : _Z5spillILi64EEvPf
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                         /* 0x00000a0000017a02 */
                                                                                  /* 0x003fde0000000f00 */
        /*0200*/                   STL [R1+0x170], R4 ;                           /* 0x0001700401007387 */
        /*0210*/              @!P0 STL.64 [R1+0x174], R4 ;                        /* 0x0001740501007387 */
        /*0220*/                   LDL R1, [R1+0x16c] ;                           /* 0x0001740501007387 */
        /*10230*/             @P1  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;          /* 0x0000000000000000 */
\tcode for sm_90a
\t\tFunction : _Z6serialPfmmi
        /*0300*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ; /* 0x0000000000000000 */
        /*0310*/            @!UP0  UTMALDG.3D [UR8], [UR4], desc[UR6] ;           /* 0x0000000000000000 */
        /*0320*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;              /* 0x0000000000000000 */
        /*0330*/                   MUFU.EX2 R4, R4 ;                              /* 0x0000000000000000 */
        /*0340*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;                /* 0x0000000000000000 */
        /*0350*/                   MUFU.EX2 R4, R4 ;                              /* 0x0000000000000000 */
        /*0360*/              @!P0 MUFU.EX2 R5, R5 ;                              /* 0x0000000000000000 */
        /*0370*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                /* 0x0000000000000000 */
        /*0380*/                   MUFU.EX2 R4, R4 ;                              /* 0x0000000000000000 */
        /*0390*/                   EXIT ;                                         /* 0x0000000000000000 */
\t\tFunction : _Z5emptyv
        /*0000*/                   EXIT ;                                         /* 0x0000000000000000 */
"""

BESIDE = "MUFU.EX2 beside HGMMA"
HOPPER = {"HGMMA": 8, "UTMALDG": 4, BESIDE: 2}
GOOD = gate.Kernel(
    source="some_sm90.cu",
    name="some_kernel<float>",
    arch="90a",
    report=gate.Report(168, stack=0, spill_stores=0, spill_loads=0, shared=1024, barriers=2),
    instructions=HOPPER,
)


CHANGING = dataclasses.replace(GOOD, instructions=HOPPER | {"USETMAXREG": 2})


def test_a_report_is_read():
    kernels, advice = gate.read_report(REPORT)
    assert kernels == {
        ("_Z5spillILi64EEvPf", "80"): gate.Report(32, 376, 424, 420, shared=0, barriers=1),
        ("_Z6callerPfi", "90a"): gate.Report(34, 400, 0, 0, shared=0, barriers=0),
        ("_Z6serialPfmmi", "90a"): gate.Report(34, 0, 0, 0, shared=256, barriers=16),
    }
    assert [line.split(")")[0] for line in advice] == ["(C7508", "(C7519", "(C7511"]
    assert advice[1].startswith("(C7519) warpgroup.arrive is injected by compiler to allow use")


def test_machine_code_is_read():
    counts = {key: gate.count_code(lines) for key, lines in gate.split_code(SASS.splitlines()).items()}
    assert counts == {
        ("_Z5spillILi64EEvPf", "80"): {"STL": 2, "LDL": 1, "HMMA": 1},
        ("_Z6serialPfmmi", "90a"): {"HGMMA": 1, "UTMALDG": 1, "USETMAXREG": 1, BESIDE: 2},
        ("_Z5emptyv", "90a"): {},
    }


@pytest.mark.parametrize(
    ("change", "report", "faults"),
    [
        ({}, {}, []),
        ({}, {"stack": 8}, ["8 bytes of stack, 0 of spill stores and 0 of spill loads"]),
        ({}, {"spill_stores": 4}, ["0 bytes of stack, 4 of spill stores and 0 of spill loads"]),
        ({}, {"spill_loads": 4}, ["0 bytes of stack, 0 of spill stores and 4 of spill loads"]),
        ({"report": None}, {}, ["ptxas reported nothing on it"]),
        ({"instructions": None}, {}, ["not in the object"]),
        ({"instructions": {**HOPPER, "STL": 2, "LDL": 1}}, {}, ["3 local loads and stores"]),
        *(
            (
                {"instructions": {name: 4 for name in HOPPER if name != missing}},
                {},
                [f"no {missing}, which every kernel of this file must have"],
            )
            for missing in HOPPER
        ),
        ({"instructions": {}, "source": "rows.cu"}, {}, []),
        (
            {"instructions": {"LDL": 1}, "source": "rows.cu"},
            {"stack": 8},
            ["8 bytes of stack, 0 of spill stores and 0 of spill loads", "1 local loads and stores"],
        ),
    ],
)
def test_faults_are_found_and_named(change, report, faults):
    kernel = dataclasses.replace(GOOD, report=dataclasses.replace(GOOD.report, **report))
    kernel = dataclasses.replace(kernel, **change)
    place = f"{kernel.source}, some_kernel<float>, sm_90a"
    assert gate.judge(kernel) == [f"{place}: {fault}" for fault in faults]


def test_a_kernel_of_a_benchmark_has_a_limit():
    name = "rows_kernel<__nv_bfloat16, true, true>"
    rows = dataclasses.replace(GOOD, source="rows.cu", name=name, pace=sass.Pace(instructions=20.0))
    place = f"rows.cu, {name}, sm_90a: "
    assert gate.judge(rows) == []
    slow = dataclasses.replace(rows, pace=sass.Pace(instructions=21.0))
    assert gate.judge(slow) == [f"{place}21.00 instructions an element, over the limit of 20.8"]
    assert gate.judge(dataclasses.replace(rows, pace=None)) == [place + sass.NO_LOOP]
    assert gate.judge(dataclasses.replace(rows, pace=None, arch="80")) == []
    heading, line = gate.benchmark_table([rows, GOOD]).splitlines()
    assert line.startswith(f"{name}  4096 x 152064 ") and len(heading) == len(line)


def test_a_pace_is_read_by_the_template():
    loop = """\
        /*0200*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
{exponentials}
        /*0400*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0410*/              @!P0 BRA 0x200 ;
"""
    each = [f"        /*{0x210 + 16 * k:04x}*/          MUFU.EX2 R4, R4 ;" for k in range(16)]
    lines = loop.format(exponentials="\n".join(each)).splitlines()
    rows, text = "rows_kernel<__nv_bfloat16, true, true>", "forward_kernel<__nv_bfloat16, 128, 2>"
    assert gate.measure(rows, lines) == sass.Pace(19 / 8, 2.0, loaded=2.0, stored=2.0)
    assert gate.measure("rows_kernel<__half, true, true>", lines) is None, "in no benchmark"
    assert gate.measure(text, lines) is None, "no products"
    product = "        /*0310*/          HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;"
    pairs = 64 * 256 * 16 / 128 / 256
    assert gate.measure(text, [lines[0], *each, product, lines[-1]]).instructions == 19 / pairs


@pytest.mark.parametrize(
    ("source", "text", "archs", "kernels", "faults"),
    [
        ("a_sm90.cu", "", ("90a",), [GOOD], []),
        ("a_sm90.cu", "", ("90a",), [], ["no kernel"]),
        ("device.cu", "", ("80", "90a"), [], []),
        ("rows.cu", "", ("80", "90a"), [GOOD], ["no kernel for sm_80"]),
        ("rows.cu", "extern __shared__ char s[];", ("90a",), [GOOD], ["extern __shared__, and its size is"]),
        ("rows.cu", "extern __shared__ c;\nstatic_assert(\n  2 * b <= kSharedLimit);", ("90a",), [GOOD], []),
        ("rows.cu", "extern __shared__ c; cudaDevAttrMaxSharedMemoryPerBlockOptin", ("90a",), [GOOD], []),
        ("a_sm90.cu", "registers_raise<240>();", ("90a",), [GOOD], ["registers_raise is called, and no"]),
        ("a_sm90.cu", "registers_raise<240>(); registers_lower<24>();", ("90a",), [CHANGING], []),
        (
            "a_sm90.cu",
            "registers_raise<240>(); registers_lower<32>();",
            ("90a",),
            [CHANGING],
            ["some_kernel<float> starts with 168 registers: with fewer than 171 its"],
        ),
    ],
)
def test_faults_of_a_file(source, text, archs, kernels, faults):
    found = gate.judge_source(source, text, archs, kernels)
    assert len(found) == len(faults)
    assert all(line.startswith(f"{source}: {fault}") for line, fault in zip(found, faults, strict=True))


def test_the_table_is_aligned():
    head, line = gate.table([GOOD, dataclasses.replace(GOOD, report=None)]).splitlines()
    place = ["some_sm90.cu", "some_kernel<float>", "sm_90a"]
    assert line.split() == [*place, "168", "1024", "2", "HGMMA+UTMALDG"]
    assert len(head) == len(line)


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt comes with a compiler")
def test_names_are_those_of_the_source():
    symbol = "_ZN6geo_r136_GLOBAL__N__c4d7b5bc_4_a_cu_7f5b9f475spillILi64E6__halfEEvPf"
    line = f"serialized in the function '{symbol}'"
    assert gate.demangle([symbol, line]) == [
        "spill<64, __half>",
        "serialized in the function 'spill<64, __half>'",
    ]


def test_where_nothing_is_built_nothing_is_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GEO_R1_BUILD_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gate.main([]) == 0
    assert capsys.readouterr().out == (
        f"csrc: not built and not judged: there is no {tmp_path}/bin/nvcc (CUDA_HOME={tmp_path})\n"
    )
    monkeypatch.setenv("GEO_R1_BUILD_CUDA", "1")
    assert gate.main([]) == 1
    assert capsys.readouterr().err.startswith("GEO_R1_BUILD_CUDA=1, but there is no ")


def test_mistakes_on_the_command_line_are_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        gate.main(["--json", "nowhere/gate.json"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--json: no folder nowhere")


def test_a_file_is_built_and_judged(tmp_path, monkeypatch, capsys):
    """A kernel whose array is indexed at run time has a stack, and it has nothing of what sm_90 offers."""
    monkeypatch.setenv("GEO_R1_CUDA_ARCHS", "80")
    monkeypatch.setenv("GEO_R1_BUILD_CUDA", "")
    try:
        nvcc.find_toolchain()
    except nvcc.UnavailableError as reason:
        pytest.skip(str(reason))
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "bindings.cpp").write_text("// no module\n", encoding="utf-8")
    (csrc / "rows.cu").write_text(
        "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n", encoding="utf-8"
    )
    (csrc / "tiles_sm90.cu").write_text(
        "namespace {\n"
        "template <int n>\n"
        "__global__ void wanders(float* x, int k) {\n"
        "  float a[n];\n"
        "  for (int i = 0; i < n; ++i) a[i] = x[i];\n"
        "  for (int i = 0; i < k; ++i) a[(i * 7) % n] += a[i % n];\n"
        "  x[0] = a[k];\n"
        "}\n"
        "}  // namespace\n"
        "void start(float* x) { wanders<64><<<1, 1>>>(x, 3); }\n",
        encoding="utf-8",
    )
    assert gate.main(["--json", str(tmp_path / "gate.json")], tmp_path) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == "2 kernels of csrc, 5 faults"
    place = "tiles_sm90.cu, wanders<64>, sm_90a: "
    stack, local, *missing = (line for line in told.err.splitlines() if line.startswith("tiles_sm90.cu"))
    assert stack == f"{place}256 bytes of stack, 0 of spill stores and 0 of spill loads"
    assert local.startswith(place) and local.endswith(" local loads and stores")
    assert missing == [f"{place}no {name}, which every kernel of this file must have" for name in HOPPER]
    written = json.loads((tmp_path / "gate.json").read_text(encoding="utf-8"))
    assert written["archs"] == ["80"] and len(written["faults"]) == 5
    twice, wanders = written["kernels"]
    assert (twice["name"], twice["arch"], twice["instructions"]) == ("twice", "80", {})
    assert (wanders["name"], wanders["arch"], wanders["report"]["stack"]) == ("wanders<64>", "90a", 256)
    assert (tmp_path / "geo_r1" / nvcc.EXTENSION).exists()
