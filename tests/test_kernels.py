"""The static report on the Triton kernels (bench/kernels.py): what it counts, and that it notices."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from bench import kernels as report
from tests.runs import INTERPRETED

triton_kernels = pytest.importorskip("sofim_fused.backends.triton_kernels")
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


MASK = [
    ("x = _load_full(pointer, lanes)", "x = _load_full(pointer, lanes, left)"),
    ("def _load_full(pointer, lanes):", "def _load_full(pointer, lanes, left):"),
    ("return tl.load(pointer + lanes)\n", "return tl.load(pointer + lanes, mask=lanes < left, other=0.0)\n"),
]
NO_HINT = [("    if not UNALIGNED:\n        pointer = tl.multiple_of(pointer, 16)\n", "")]
READ_TWICE = [
    (
        "    g = _load(_gradients(row, at, KIND), lanes, left, KIND, FULL)\n    if L2 or GRADIENT:",
        "    g = _load(_gradients(row, at, KIND), lanes, left, KIND, FULL)\n"
        "    g += _load(_weights(row, at, KIND), lanes, left, KIND, FULL)\n    if L2 or GRADIENT:",
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
    case = CASES["fp32", "one launch, plain (moment)"]
    fields = ("fp32", case.name, "sm_90", 16.0, 8.0, {128: 24}, 200, 3, 0, 1, 0.1, 1.0, 1.0, [])
    assert list(report._wrong(report.Row(*fields), case, triton_kernels)) == [
        "3 spills",
        "room for 1 programs on a multiprocessor, 2 are started",
    ]


def test_bytes_of_the_table() -> None:
    """As in docs/method.md, and for 16-bit types by their sizes."""
    assert report.table_bytes(CASES["fp32", "commit (moment)"], triton_kernels) == (12, 8)
    assert report.table_bytes(CASES["fp32", "dots (L2)"], triton_kernels) == (12, 0)
    assert report.table_bytes(CASES["fp32", "apply (gradient)"], triton_kernels) == (12, 4)
    assert report.table_bytes(CASES["bf16, bf16 moment", "one launch, plain (moment)"], triton_kernels) == (8, 4)
    assert report.table_bytes(CASES["bf16, Kahan", "apply (moment)"], triton_kernels) == (8, 4)
    early = CASES["fp32", "accumulate with the gradient's part of the step"]
    assert report.table_bytes(early, triton_kernels) == (12, 8)


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
