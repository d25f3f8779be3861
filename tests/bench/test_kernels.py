"""The static report on the kernels for GPUs (bench/kernels.py): what it counts, and that it notices."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from bench import kernels as report
from bench import kernels_adaptive as adaptive
from bench import kernels_cuda as cuda
from tests.support.runs import INTERPRETED

triton_kernels = pytest.importorskip("sofim_fused.backends.triton.kernels")
if INTERPRETED:
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

CASES = {(label, case.name): case for label, case in report.cases(triton_kernels)}


def changed(tmp_path: Path, *replacements: tuple[str, str]) -> ModuleType:
    """The kernels with other source."""
    assert triton_kernels.__file__ is not None
    source = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in source
        source = source.replace(old, new)
    path = tmp_path / "changed_kernels.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["accumulate (moment)", "apply (moment)"])
def test_a_kernel_is_as_it_should_be(name: str, target: str) -> None:
    row = report.examined(CASES["fp32", name], "fp32", target, triton_kernels)
    assert row.wrong == []
    assert (row.read, row.written) == (8, 4)
    assert set(row.widths) == {128}
    assert row.milliseconds == pytest.approx(0.4)
    assert row.registers > 16
    assert row.programs >= 2


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_for_sums_are_compiled(target: str) -> None:
    """``fold`` and ``solve`` with all that they can do."""
    both = {case.launch: case for case in report.solve_cases(triton_kernels) if case.config.guarded}
    for name, case in both.items():
        row = report.examined_solve(case, target, triton_kernels)
        assert row.wrong == [], name
        assert row.registers > 16
        assert (row.kind, row.read, row.written) == (report.SUMS, None, None)
        assert case.name in report.as_text([row])


ADAPTIVE = {(label, case.name): case for label, case in adaptive.cases(report.KINDS, report.SUMS)}


def test_kernels_of_adaptive_diagonals_are_as_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a sweep as docs/method.md has them; slots for sums of tiles are counted and limited."""
    commit = report.examined_adaptive(ADAPTIVE["fp32", "commit_scaled (blocks)"], "fp32", "sm_90")
    assert (commit.wrong, commit.read, commit.written) == ([], 12, 8)
    adapt = report.examined_adaptive(ADAPTIVE[report.SUMS, "adapt"], report.SUMS, "sm_90")
    assert (adapt.wrong, adapt.read) == ([], None)
    monkeypatch.setattr(adaptive, "MOST_SLOTS", 0.1)
    squares = report.examined_adaptive(ADAPTIVE["fp32", "squares (matrices)"], "fp32", "sm_90")
    assert (squares.wrong, squares.read, squares.written) == (
        ["slots take 0.125 bytes per parameter, 0.1 are allowed"],
        4,
        0.125,
    )


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 10**7), (2, 4097), (5, 129), (129, 1), (513, 25), (129, 129), (50_257, 768), (768, 50_257)],
    ids=str,
)
def test_slots_take_little(shape: tuple[int, int]) -> None:
    assert adaptive.slots_of(shape) <= adaptive.MOST_SLOTS


MASK = [
    ("x = _load_full(pointer, offsets)", "x = _load_full(pointer, offsets, left)"),
    ("def _load_full(pointer, offsets):", "def _load_full(pointer, offsets, left):"),
    ("return tl.load(pointer + offsets)\n", "return tl.load(pointer + offsets, mask=offsets < left, other=0.0)\n"),
]
NO_HINT = [("    if not UNALIGNED:\n        pointer = tl.multiple_of(pointer, 16)\n", "")]
READ_TWICE = [
    (
        "    g = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)\n    if L2 or GRADIENT:",
        "    g = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)\n"
        "    g += _load(_weights(row, at, KIND), offsets, left, KIND, FULL)\n    if L2 or GRADIENT:",
    )
]


@pytest.mark.parametrize(
    ("replacements", "message"),
    [(MASK, "accesses of 32 bits"), (NO_HINT, "accesses of 32 bits"), (READ_TWICE, "moves 12 \\+ 4 bytes")],
    ids=["a mask on full tiles", "no hint of alignment", "another read"],
)
def test_a_worse_kernel_is_noticed(replacements: list[tuple[str, str]], message: str, tmp_path: Path) -> None:
    module = changed(tmp_path, *replacements)
    row = report.examined(CASES["fp32", "accumulate (moment)"], "fp32", "sm_90", module)
    assert any(re.search(message, text) for text in row.wrong), row.wrong


def test_spills_and_lack_of_room_are_wrong() -> None:
    for by in (report.TRITON, report.CUDA):
        row = report.Row(by, "fp32", "apply", "sm_90", 16.0, 8.0, {128: 24}, 200, 3, 0, 1, 0.1, 1.0, 1.0, [])
        assert list(report._wrong(row, 2, (16, 8), 128)) == [
            "3 spills",
            "room for 1 programs on a multiprocessor, 2 are needed",
        ]
        row.spills, row.widths = 0, {}
        assert list(report._wrong(row, 1, (16, 4), 128)) == [
            "moves 16 + 8 bytes per parameter, docs/method.md has 16 + 4",
            "no access in the hot path",
        ]
        assert not list(report._wrong(row, 0))
    for spills, wrong in ((16, []), (17, ["17 spills"])):  # a few, in kernels for any mixture of types
        row = dataclasses.replace(row, kind="any weights, as shipped", spills=spills)
        assert list(report._wrong(row, 0)) == wrong


def test_bytes_of_the_table() -> None:
    """As in docs/method.md, and for 16-bit types by their sizes."""
    assert report.table_bytes(CASES["fp32", "commit (moment)"], triton_kernels) == (12, 8)
    assert report.table_bytes(CASES["fp32", "dots (L2)"], triton_kernels) == (12, 0)
    assert report.table_bytes(CASES["fp32", "apply (gradient)"], triton_kernels) == (12, 4)
    assert report.table_bytes(CASES["bf16, bf16 moment", "one launch, plain (moment)"], triton_kernels) == (8, 4)
    assert report.table_bytes(CASES["bf16, Kahan", "apply (moment)"], triton_kernels) == (8, 4)
    assert report.table_bytes(CASES["fp32, 8-bit moment", "commit (moment)"], triton_kernels) == (9, 5)
    early = CASES["fp32", "accumulate with the gradient's part of the step"]
    assert report.table_bytes(early, triton_kernels) == (12, 8)


@pytest.mark.parametrize("targets", [report.TARGETS, ("gfx942", "sm_80"), ("sm_100",)], ids=str)
def test_a_covering_has_all_kinds_and_passes_for_each_target(targets: tuple[str, ...]) -> None:
    plan = report.covering(triton_kernels, targets)
    every = [(label, case.name) for label, case in report.every_case(triton_kernels)]
    assert len(plan) == len(every)
    main = "sm_90" if "sm_90" in targets else targets[0]
    assert all(some[0] == main and len(some) == min(len(targets), 2) for some in plan)
    for target in targets:
        met = [place for place, some in zip(every, plan, strict=True) if target in some]
        assert {label for label, _ in met} == {*report.KINDS, report.SUMS}
        assert {name for _, name in met} >= {name for _, name in CASES if name.endswith("(moment)")}
        assert any("L2" in name for _, name in met)
        assert any("gradient" in name for _, name in met)


def test_machine_code_is_read_for_spills_where_there_is_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "Function one:\n REG:72 STACK:{} SHARED:400 LOCAL:0"
    texts = {"nvdisasm": " STL [R1], R2 ;\n LDL R2, [R1] ;\n LDG.E R2 ;"}
    monkeypatch.setattr(report, "_output", lambda tool, *_: texts[tool.name])
    for stack, spills in ((0, 0), (16, 2)):
        texts["cuobjdump"] = usage.format(stack)
        assert report._of_cubin(b"") == (72, spills, 400)


PTX = """
$L__BB0_1:
	.loc	1 178 12, function_name $L__info_string0, inlined_at 1 195 13 // kernels.py:178:12
	mov.u32 %r1, 0x0;
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.v2.b64 { %rd4, %rd5 }, [ %rd1 + 0 ];
	add.f32 %f1, %f2, %f3;
	.loc	1 183 12, function_name $L__info_string0, inlined_at 1 197 13 // kernels.py:183:12
	@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
$L__BB0_2:
	add.f32 %f1, %f2, %f3;
	.loc	1 188 12, function_name $L__info_string0, inlined_at 1 204 13
	st.global.b16 [ %rd1 + 0 ], { %rs1 };
"""
PTX_OF_3_6 = PTX.replace(
    ", function_name $L__info_string0, inlined_at 1 195 13 // kernels.py:178:12", " // k.py:178:12 @[ k.py:195:13 ]"
)
GCN = """
	.loc	1 178 12                        ; kernels.py:178:12 @[ kernels.py:195:13 @[ kernels.py:9:9 ] ]
	buffer_load_dwordx4 v[4:7], v27, s[20:23], 0 offen
	global_load_dwordx2 v[4:5], v27, s[20:21]
	.loc	1 183 12                        ; kernels.py:183:12 @[ kernels.py:197:13 @[ kernels.py:9:9 ] ]
	buffer_load_dword v4, v27, s[20:23], 0 offen
	.loc	1 188 12                        ; kernels.py:188:12 @[ kernels.py:204:13 @[ kernels.py:9:9 ] ]
	buffer_store_short v4, v27, s[20:23], 0 offen
"""


def test_accesses_are_those_of_the_lines_asked_for() -> None:
    expected = Counter({("load", 128): 2, ("store", 16): 1})
    assert report.hot_path(PTX, {195, 204}) == (expected, 7)
    accesses, _ = report.hot_path(GCN, {195, 204})
    assert accesses == Counter({("load", 128): 1, ("load", 64): 1, ("store", 16): 1})
    assert report.hot_path(PTX_OF_3_6, {195})[0] == Counter({("load", 128): 2})
    assert report.hot_path(PTX, {1}) == (Counter(), 0)


# CUDA C++

NVCC = cuda.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not there")
SOURCES = cuda.sources()


def examined_cuda(kind: str, name: str, *replacements: tuple[str, str]) -> report.Row:
    """One kernel from the sources, or from other ones."""
    sources = SOURCES
    for old, new in replacements:
        assert any(old in text for text in sources.values())
        sources = {path: text.replace(old, new) for path, text in sources.items()}
    assert NVCC is not None
    (row,) = report.examined_cuda(NVCC, ["sm_90"], [kind], triton_kernels, sources, [name])
    return row


@needs_nvcc
def test_kernels_in_cuda_are_as_they_should_be() -> None:
    """Compiled together: most of the time goes into reading headers."""
    moved = {
        ("fp32", "accumulate (moment)"): (8, 4),
        ("fp32", "one launch, guarded (L2)"): (24, 8),
        ("bf16, bf16 moment, Kahan", "commit (moment)"): (8, 6),
        ("fp64", "dots (moment)"): (16, 0),
    }
    kinds, names = ({pair[i] for pair in moved} for i in range(2))
    assert NVCC is not None
    rows = report.examined_cuda(NVCC, ["sm_90"], kinds, triton_kernels, SOURCES, names)
    found = {(row.kind, row.case): row for row in rows}
    assert len(found) == len(rows)
    for pair, expected in moved.items():
        row = found[pair]
        assert row.wrong == []
        assert (row.by, row.target) == (report.CUDA, "sm_90")
        assert (row.read, row.written) == expected
        assert set(row.widths) == {128}
        assert row.registers > 16
        assert row.programs >= 2
        assert row.instructions is not None
        assert row.instructions > 2


HALVES = [("uint4", "uint2"), ("sizeof x / 16", "sizeof x / 8")]
READ_MORE = [
    ("if constexpr (K::writes_w) {\n          load(", "if constexpr (true) {\n          load("),
    ("sums.add(kMM, kept, kept);", "sums.add(kMM, kept, widened(ws[i].at[j], row.w_type));"),
]
CROWDED = [("__launch_bounds__(kThreads, blocks_of<K>())", "__launch_bounds__(kThreads, 8)")]
ELEMENT_BY_ELEMENT = [("return row.aligned && ", "return false && ")]


@needs_nvcc
@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        (HALVES, "accesses of 64 bits"),
        (READ_MORE, "moves 12 \\+ 4 bytes"),
        (CROWDED, "spills"),
        (ELEMENT_BY_ELEMENT, "moves 0 \\+ 0 bytes"),
    ],
    ids=["8 bytes at a time", "another read", "too few registers", "no vectors"],
)
def test_a_worse_kernel_in_cuda_is_noticed(replacements: list[tuple[str, str]], message: str) -> None:
    row = examined_cuda("fp32", "accumulate (moment)", *replacements)
    assert any(re.search(message, text) for text in row.wrong), row.wrong


def test_kernels_that_are_shipped_are_judged_without_bytes() -> None:
    numbers = {"threads": 256, "tile": 4096, "blocks": 2}

    def wrong(accesses: dict[tuple[str, int], int], registers: int = 128, name: str = "apply (moment)") -> list[str]:
        kernel = cuda.Kernel("", "sm_90", Counter(accesses), 100, registers, 0, 400)
        row = report._cuda_row(kernel, "fp32 weights, as shipped", name, numbers)
        assert (row.read, row.written, row.milliseconds, row.instructions) == (None, None, None, None)
        assert "shipped" in report.as_text([row])
        return row.wrong

    assert wrong({("load", 128): 8}) == []
    assert wrong({("load", 128): 8, ("store", 32): 1}) == ["accesses of 32 bits in the hot path"]
    assert wrong({("load", 128): 8}, 129) == ["room for 1 programs on a multiprocessor, 2 are needed"]
    assert wrong({}) == ["no access in the hot path"]
    assert all(wrong({}, 129, name) == [] for name in cuda.NO_TENSORS.values())


def test_cases_in_cuda_are_those_of_triton() -> None:
    """Each kernel once: dots is the same in both forms."""
    found = list(report.cuda_cases(triton_kernels))
    assert len({instance for *_, instance in found}) == len(found)
    assert {label for label, *_ in found} == set(report.CUDA_KINDS)
    fp32 = {case.name for label, case, _ in found if label == "fp32"}
    left_out = {"dots (gradient)", "dots (gradient, L2)", "dots (gradient, a block per tensor)"}
    left_out |= {"one launch, guarded (nesterov, L2)"}  # CUDA's kernels are told the numerator when they run
    assert fp32 == {name for label, name in CASES if label == "fp32"} - left_out
    assert not [case.name for label, case, _ in found if label in report.TWO_LAUNCHES and case.launch == "single"]


def test_without_nvcc_triton_is_reported_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    assert report.main(["--kinds", *cuda.SHIPPED.values(), "--targets", "sm_90"]) == 0
    assert "\nnvcc is not there: the CUDA C++ kernels are left out\n" in capsys.readouterr().out


def test_a_target_that_nvcc_does_not_know_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda, "known_targets", lambda _: ["sm_90"])
    asked: list[list[str]] = []
    monkeypatch.setattr(report, "examined_cuda", lambda nvcc, targets, *_, **__: asked.append(targets) or [])
    assert report.main(["--kinds", *cuda.SHIPPED.values()]) == 0
    assert asked == [["sm_90"]]
    assert "\nnvcc does not know sm_80, sm_100: " in capsys.readouterr().out


def test_names_of_kernels_are_read() -> None:
    start = "_ZN5sofim4cuda46_GLOBAL__N__de38f752_13_accumulate_cu_5bda4930"
    accumulate, step, dots, with_l2, commit = (
        f"NS0_4KindILNS0_4PassE{which}ELb{gradient}ELb{l2}ELb{step}EEE"
        for which, gradient, l2, step in ((0, 1, 0, 0), (0, 1, 1, 1), (2, 0, 0, 0), (2, 0, 1, 0), (3, 0, 0, 0))
    )
    plain = "NS0_4KindILNS0_4PassE0ELb0ELb1ELb0EEENS4_ILS5_1ELb0ELb0ELb0EEE"
    guarded = "NS0_4KindILNS0_4PassE2ELb0ELb1ELb0EEENS4_ILS5_3ELb0ELb0ELb0EEE"
    end = "EvNS0_9ArgumentsINS0_4TaskEXT1_EEE"
    fp32, narrow, some = (cuda.SHIPPED[name] for name in ("Float32Weights", "NarrowWeights", "AnyWeights"))
    for middle, expected in (
        (f"5firstINS0_14Float32WeightsE{accumulate}Li32764E", (fp32, "accumulate (gradient)")),
        (f"5firstINS0_10AnyWeightsE{step}Li32764E", (some, "accumulate with the step")),
        (f"5firstINS0_10AnyWeightsE{dots}Li32764E", (some, "dots")),
        (f"5firstINS0_10AnyWeightsE{with_l2}Li32764E", (some, "dots (L2)")),
        (f"6secondINS0_10AnyWeightsE{commit}Li32764E", (some, "commit")),
        (f"4bothINS0_14Float32WeightsE{plain}Li4096E", (fp32, "one launch, plain (moment), 4096 bytes")),
        (f"4bothINS0_13NarrowWeightsE{guarded}Li32764E", (narrow, "one launch, guarded, 32764 bytes")),
        ("4copyILi32764E", (some, "arguments to a table")),
    ):
        assert cuda.described(start + middle + end) == expected
    scaled = "NS0_9ArgumentsINS0_10ScaledTaskELi32764EEE"
    for middle, expected in (
        ("17accumulate_scaledILb0EEEv", (some, "accumulate_scaled")),
        ("13update_scaledILNS0_10ScaledPassE1ELb1EEEv", (fp32, "apply_scaled")),
        ("13update_scaledILNS0_10ScaledPassE2ELb0EEEv", (some, "commit_scaled")),
        ("7squaresE", (some, "squares")),
        ("13finish_scaledE", (some, "fold_scaled and solve_scaled")),
    ):
        assert cuda.described(start + middle + scaled) == expected
    for name in ("fold", "solve", "adapt", "fold_scaled", "solve_scaled"):
        entry = f"{start}{len(name)}{name}ENS0_9ArgumentsINS0_11AlgebraTaskELi32764EEE"
        assert cuda.described(entry) == (some, name)


def of_nvcc(body: str) -> str:
    """PTX of a kernel, in which ``{8}`` and ``{1}`` stand for functions that load so many elements."""
    labels = {8: "$L__info_string0", 1: "$L__info_string1"}
    names = {label: ",".join(map(str, f"_ZN4loadILi{size}EfEEv".encode() + b"\0")) for size, label in labels.items()}
    strings = "".join(f"{label}:\n.b8 {data}\n" for label, data in names.items())
    code = body.replace("{8}", labels[8]).replace("{1}", labels[1])
    numbers = '\t.file\t1 "/a/storage.cuh"\n\t.file\t2 "/a/other.h"\n.visible .global .align 4 .u32 tile = 4096;\n'
    return f".visible .entry kernel(\n\t.param .u64 kernel_param_0\n)\n{{\n{code}\n}}\n{strings}{numbers}"


OF_A_TILE = """\
	mov.u32 	%r1, %tid.x;
	ld.param.u64 	%rd1, [kernel_param_0+8];
	ld.param.u64 	%rd2, [%rd1+16];
	ld.u64 	%rd3, [%rd2+-40];
	mul.wide.u32 	%rd4, %r1, 16;
	add.s64 	%rd5, %rd3, %rd4;
	add.s64 	%rd6, %rd2, %rd4;
	.loc	1 10 5, function_name {8}, inlined_at 1 50 5
	ld.global.v4.u32 	{%r2, %r3, %r4, %r5}, [%rd5];
	@%p1 ld.global.v2.f64 	{%fd1, %fd2}, [%rd5+4096];
	ld.global.v4.u32 	{%r2, %r3, %r4, %r5}, [%rd6];
	ld.u8 	%rs1, [%rd3+14];
	.loc	1 12 5, function_name {1}, inlined_at 1 51 5
	ld.global.u16 	%rs1, [%rd5];
"""


def test_accesses_in_cuda_are_those_to_tensors_in_full_tiles() -> None:
    """Its address comes from a table, and differs between threads; others are sums, and what the table says."""
    text = of_nvcc(OF_A_TILE)
    expected = Counter({("load", 128): 2})
    assert dict(cuda.hot_paths(text, [])) == {"kernel": (expected, 4)}
    assert cuda.numbers(text) == {"tile": 4096}
    # A place without a function is in the hot path, unless it is a line for single elements.
    lost = "\t.loc\t{} 12 5\n\tst.global.u16 \t[%rd5], %rs1;\n"
    for place, single in ((1, True), (2, False)):
        ((_, (found, _)),) = cuda.hot_paths(of_nvcc(OF_A_TILE + lost.format(place)), [12])
        assert found == expected + (Counter() if single else Counter({("store", 16): 1})), place


def test_lines_for_single_elements_are_found() -> None:
    storage = SOURCES[cuda.STORAGE]
    lines = storage.splitlines()
    single = [lines[i - 1] for i in sorted(cuda.single_lines(storage))]
    assert [line for line in single if "x.at[0]" in line]
    assert not [line for line in single if "vector" in line or "piece" in line]


def test_spills_are_those_of_the_sweeps() -> None:
    text = ".text.one:\n STL [R1], R2 ;\n LDL R2, [R1] ;\n$one$finish:\n STL [R1], R2 ;\n.text.two:\n LDG.E R2 ;\n"
    assert cuda._spills(text) == {"one": 2}
