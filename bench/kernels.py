"""What the Triton kernels come to, without a GPU: ``python -m bench.kernels``.

Compiles every kernel as the backend launches it for sm_80, sm_90, sm_100 and gfx942, and reads from the compiler's
output what each pass moves and needs. The exit code is 1 where the full tiles of a kernel, its hot path,

- have an access narrower than 128 bits, or none at all,
- move more or fewer bytes per parameter than docs/method.md says, or where a kernel
- spills registers, or
- starts more programs that wait for each other than a multiprocessor has room for.

Tensors whose addresses are no multiple of 16 have narrow accesses by nature, in full tiles as in others, so that the
compiler may make one of both; of those only the rest is required.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sofim_fused.backends import table
from sofim_fused.backends import triton as backend
from sofim_fused.backends.triton import Form, Sheet, launch_first, launch_second, launch_single

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BANDWIDTH = 3.0e12  # bytes/s, about what an H100 copies with
PARAMETERS = 100_000_000
SGD_BYTES = 20  # float32 SGD with momentum in one sweep: reads g, m, w; writes m, w
NARROWEST = 128  # bits of an access in the hot path

# A multiprocessor of sm_80 to sm_100; what is reserved of shared memory per program is in the compiler's figure.
_REGISTERS, _WARPS, _PROGRAMS = 65_536, 64, 32
_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


@dataclass(frozen=True)
class Case:
    """A kernel as it is used.

    Attributes:
        name: of the pass or passes.
        form: what the backend asks for; ``form.kinds`` has one kind.
        launch: ``"first"``, ``"second"`` or ``"single"``.
        with_step: ``accumulate`` also takes the known part of the update.
    """

    name: str
    form: Form
    launch: str
    with_step: bool = False


FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (
    table.TYPES[dtype] for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
)
KINDS = {
    "fp32": FLOAT32,
    "fp32, bf16 moment": FLOAT32 | table.ROUNDS,
    "bf16, Kahan": BFLOAT16 | table.KEEPS,
    "bf16, bf16 moment, Kahan": BFLOAT16 | table.ROUNDS | table.KEEPS,
    "bf16, bf16 moment": BFLOAT16 | table.ROUNDS,
    "bf16, fp32 gradient, Kahan": BFLOAT16 | table.WIDE | table.KEEPS,
    "fp16, Kahan": FLOAT16 | table.KEEPS,
    "fp64": FLOAT64,
    "fp32, unaligned": FLOAT32 | table.UNALIGNED,
}


def cases(kernels: ModuleType) -> Iterator[tuple[str, Case]]:
    """Every kernel with the kind that it is for; the gradient form and L2 decay for float32 and float64 alone."""
    k = kernels
    for label, kind in KINDS.items():
        forms = [("moment", False, False)]
        if kind == FLOAT32:
            forms += [("gradient", True, False), ("L2", False, True)]
        if kind in (FLOAT32, FLOAT64):
            forms += [("gradient, L2", True, True)]
        for name, cross, l2 in forms:
            plain = Form((kind,), k.ACCUMULATE, k.APPLY, k.PLAIN, l2=l2, cross=cross)
            guarded = Form((kind,), k.DOTS, k.COMMIT, k.GUARDED, l2=l2, cross=cross, clip=True, skip=True)
            yield label, Case(f"accumulate ({name})", plain, "first")
            if not l2:
                yield label, Case(f"apply ({name})", plain, "second")
            yield label, Case(f"dots ({name})", guarded, "first")
            yield label, Case(f"commit ({name})", guarded, "second")
            yield label, Case(f"one launch, plain ({name})", plain, "single")
            yield label, Case(f"one launch, guarded ({name})", guarded, "single")
    blocks = Form((FLOAT32,), k.DOTS, k.COMMIT, k.GUARDED, cross=True, clip=True, skip=True, per_tensor=True)
    yield "fp32", Case("dots (gradient, a block per tensor)", blocks, "first")
    early = Form((FLOAT32,), k.ACCUMULATE, 0, k.SUMS_ONLY, cross=True)
    yield "fp32", Case("accumulate with the gradient's part of the step", early, "first", with_step=True)


def table_bytes(case: Case, kernels: ModuleType) -> tuple[int, int]:
    """Bytes per parameter that a case has to read and to write, from the table of passes in docs/method.md."""
    kind = case.form.kinds[0]
    w = 8 if kind & 3 == FLOAT64 else 4 if kind & 3 == FLOAT32 else 2
    g = 4 if kind & table.WIDE else w
    m = 2 if kind & table.ROUNDS else max(w, 4)
    kahan = w if kind & table.KEEPS else 0
    l2, cross = case.form.l2, case.form.cross
    step = case.with_step
    passes = {
        kernels.ACCUMULATE: (g + m + (w if l2 or step else 0) + (kahan if step else 0), m + (w + kahan if step else 0)),
        kernels.APPLY: (m + w + kahan + (g if cross else 0), w + kahan),
        kernels.DOTS: (g + m + (w if l2 else 0), 0),
        kernels.COMMIT: (g + m + w + kahan, m + w + kahan),
    }
    taken = {"first": [case.form.first], "second": [case.form.second], "single": [case.form.first, case.form.second]}
    chosen = [passes[which] for which in taken[case.launch]]
    return sum(read for read, _ in chosen), sum(written for _, written in chosen)


@dataclass
class Launch:
    """A kernel with the arguments that the backend passed; in the place of a kernel it takes note of them."""

    kernel: Any
    args: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            self.args = dict(zip(names, args, strict=False))
            self.args.update({name: value for name, value in kwargs.items() if name in names})
            self.options = {name: value for name, value in kwargs.items() if name not in names}

        return launch


def launched(case: Case, kernels: ModuleType) -> Launch:
    """What the backend passes to Triton for a case."""
    rows = torch.zeros(1, table.COLUMNS, dtype=torch.int64)
    rows[0, table.NUMEL], rows[0, table.KIND] = kernels.TILE, case.form.kinds[0]
    sheet = Sheet(kernels, torch.device("cpu"), rows, torch.zeros(1, table.HYPERS, dtype=torch.float64), 1, [0, 1])
    noted = {name: Launch(getattr(kernels, name)) for name in ("first", "second", "single")}
    spy: Any = SimpleNamespace(**{**vars(kernels), **noted})
    if case.launch == "first":
        launch_first(spy, sheet, case.form, case.with_step)
    elif case.launch == "second":
        launch_second(spy, sheet, case.form)
    else:
        launch_single(spy, sheet, case.form, 1)
    return noted[case.launch]


_POINTERS = {torch.int64: "*i64", torch.int32: "*i32", torch.float64: "*fp64"}


def compiled(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for a target, as ``triton.compile`` returns it."""
    triton: Any = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.backends.compiler")
    signature: dict[str, str] = {}
    constants, hints = {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            hints[(i,)] = [["tt.divisibility", 16]]  # as memory is allocated
        elif name.isupper():
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = "i32"
    options = dict(launch.options)
    if target.startswith("sm_"):
        gpu = compiler.GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = compiler.GPUTarget("hip", target, 64)
        options.pop("maxnreg", None)  # the backend does not ask for it there
    source = triton.compiler.ASTSource(launch.kernel, signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=gpu, options=options)


@dataclass
class Row:
    """What became of a case on a target.

    Attributes:
        read, written: bytes per parameter that the hot path moves.
        widths: bits of its accesses, and how many of each a thread has.
        registers: per thread. ``spills``: instructions that move registers to memory or back.
        shared: bytes per program.
        programs: per multiprocessor; ``occupancy``: their share of the threads that it can hold.
        instructions: PTX instructions per element in the blocks that touch parameters' memory; ``None`` for AMD, where
            each access stands in a loop (of one turn) of its own.
        milliseconds: for ``PARAMETERS`` at ``BANDWIDTH``.
        wrong: what the exit code is about.
    """

    kind: str
    case: str
    target: str
    read: float
    written: float
    widths: dict[int, int]
    registers: int
    spills: int
    shared: int
    programs: int
    occupancy: float
    instructions: float | None
    milliseconds: float
    wrong: list[str]


def examined(case: Case, label: str, target: str, kernels: ModuleType) -> Row:
    """Compile a case for a target and read what came out."""
    launch = launched(case, kernels)
    kernel = compiled(launch, target)
    nvidia = target.startswith("sm_")
    threads = launch.options["num_warps"] * (32 if nvidia else 64)
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    accesses, instructions = hot_path(text, _full_lines(kernels))
    moved = {
        what: sum(n * bits for (kind, bits), n in accesses.items() if kind == what) / 8 for what in ("load", "store")
    }
    read, written = (moved[what] * threads / kernels.TILE for what in ("load", "store"))
    widths: Counter[int] = Counter()
    for (_, bits), n in accesses.items():
        widths[bits] += n
    if nvidia:
        registers, spills, shared = _of_cubin(kernel.asm["cubin"])
        warps = launch.options["num_warps"]
        per_program = -(-registers // 8) * 8 * 32 * warps
        programs = min(_REGISTERS // per_program, _WARPS // warps, _PROGRAMS, _SHARED[target] // max(shared, 1))
        occupancy = programs * warps / _WARPS
    else:
        registers, spills, shared, programs, occupancy = _of_amdgcn(text, launch.options["num_warps"])
    row = Row(
        label, case.name, target, read, written, dict(widths), registers, spills, shared, programs, occupancy,
        instructions * threads / kernels.TILE if nvidia else None, (read + written) * PARAMETERS / BANDWIDTH * 1e3, [],
    )  # fmt: skip
    row.wrong = list(_wrong(row, case, kernels))
    return row


def _wrong(row: Row, case: Case, kernels: ModuleType) -> Iterator[str]:
    read, written = table_bytes(case, kernels)
    if not case.form.kinds[0] & table.UNALIGNED:
        if (row.read, row.written) != (read, written):
            yield f"moves {row.read:g} + {row.written:g} bytes per parameter, docs/method.md has {read} + {written}"
        narrow = [bits for bits in row.widths if bits < NARROWEST]
        if narrow:
            yield f"accesses of {', '.join(map(str, sorted(narrow)))} bits in the hot path"
    if row.spills:
        yield f"{row.spills} spills"
    needed = backend.programs_per_multiprocessor(case.form, hip=not row.target.startswith("sm_"))
    if case.launch == "single" and row.programs < needed:
        yield f"room for {row.programs} programs on a multiprocessor, {needed} are started"


def _full_lines(kernels: ModuleType) -> set[int]:
    """The lines that call what touches the memory of full tiles."""
    assert kernels.__file__ is not None
    lines = Path(kernels.__file__).read_text(encoding="utf-8").splitlines()
    return {i for i, line in enumerate(lines, 1) if re.search(r"(?<!def )_(load|store)_full\(", line)}


_PTX_LOC = re.compile(r"\s*\.loc\s+\d+ \d+ \d+, function_name \S+, inlined_at \d+ (\d+)")
_PTX_ACCESS = re.compile(
    r"\s*(?:@!?%p\d+ )?(ld|st)\.(?:volatile\.)?global\.(?:[a-z]\w*[.:])*?(?:v(\d)\.)?[bfsu](\d+)\b"
)
_COMMENTED_LOC = re.compile(r"\s*\.loc\s+.*?(?:;|//).*?@\[ \w+\.py:(\d+):")  # AMD; PTX of Triton 3.6
_GCN_ACCESS = re.compile(r"\s*(?:buffer|global|flat)_(load|store)_(dwordx?\d?|u?short\w*|s?byte\w*)\b")
_GCN_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def hot_path(text: str, lines: set[int]) -> tuple[Counter[tuple[str, int]], int]:
    """Accesses of full tiles in PTX or AMD assembly, and the instructions of the blocks that they stand in.

    Args:
        text: with ``.loc`` directives.
        lines: those from which the functions were inlined that touch the memory of full tiles.

    Returns:
        How often a thread loads or stores how many bits (``{("load", 128): 8}``), and instructions per thread.
    """
    accesses: Counter[tuple[str, int]] = Counter()
    instructions = in_block = 0
    hot = block_is_hot = False
    for line in text.splitlines():
        place = _PTX_LOC.match(line) or _COMMENTED_LOC.match(line)
        if line.lstrip().startswith(".loc"):
            hot = place is not None and int(place[1]) in lines
            continue
        stripped = line.strip()
        if re.match(r"(\$L__BB|\.LBB)\w+:|; %bb", stripped):
            instructions += in_block if block_is_hot else 0
            in_block, block_is_hot = 0, False
            continue
        if not stripped or stripped[0] in ".;/${}" or stripped.endswith(":"):
            continue
        in_block += 1
        if not hot:
            continue
        if ptx := _PTX_ACCESS.match(line):
            accesses["load" if ptx[1] == "ld" else "store", int(ptx[2] or 1) * int(ptx[3])] += 1
            block_is_hot = True
        elif gcn := _GCN_ACCESS.match(line):
            accesses[gcn[1], _GCN_BITS.get(gcn[2], 16 if "short" in gcn[2] else 8)] += 1
            block_is_hot = True
    return accesses, instructions + (in_block if block_is_hot else 0)


def _of_cubin(cubin: bytes) -> tuple[int, int, int]:
    """Registers, spilling instructions, and bytes of shared memory."""
    triton: Any = importlib.import_module("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        assembly = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", assembly)), int(found[2])


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _of_amdgcn(text: str, warps: int) -> tuple[int, int, int, int, float]:
    """Registers, spills, shared memory, programs per compute unit, and their share of its waves."""
    figures = {name: int(n) for name, n in re.findall(r"\.(\w+): +(\d+)\s*$", text, re.MULTILINE)}
    # Spilled scalar registers go to vector registers, not to memory.
    spills = figures["vgpr_spill_count"] + figures["private_segment_fixed_size"]
    occupancy = re.search(r"; Occupancy: (\d+)", text)
    assert occupancy is not None
    waves = int(occupancy[1])  # of 8 per SIMD, of which a unit has four
    return figures["vgpr_count"], spills, figures["group_segment_fixed_size"], waves * 4 // warps, waves / 8


def as_text(rows: Iterable[Row]) -> str:
    """The table, one line per case and target."""
    sgd = SGD_BYTES * PARAMETERS / BANDWIDTH * 1e3
    lines = [
        f"Time for {PARAMETERS / 1e6:g} M parameters at {BANDWIDTH / 1e12:g} TB/s; SGD with momentum, fused, fp32: "
        f"{SGD_BYTES} bytes, {sgd:.3f} ms",
        f"{'kind':<27} {'pass':<48} {'target':<7} {'read':>5} {'write':>5} {'ms':>6} {'widths':<14} {'regs':>4} "
        f"{'spills':>6} {'shared':>6} {'occup.':>6} {'instr.':>6}",
    ]
    for r in rows:
        widths = ", ".join(f"{n}x{bits}" for bits, n in sorted(r.widths.items()))
        instructions = "" if r.instructions is None else f"{r.instructions:.1f}"
        lines.append(
            f"{r.kind:<27} {r.case:<48} {r.target:<7} {r.read:5g} {r.written:5g} {r.milliseconds:6.3f} {widths:<14} "
            f"{r.registers:4} {r.spills:6} {r.shared:6} {r.occupancy:6.0%} {instructions:>6}"
            + "".join(f"\n    WRONG: {text}" for text in r.wrong)
        )
    return "\n".join(lines)


def _examined(targets: Iterable[str], index: int) -> list[Row]:
    kernels = importlib.import_module("sofim_fused.backends.triton_kernels")
    label, case = list(cases(kernels))[index]
    return [examined(case, label, target, kernels) for target in targets]


def main(argv: list[str] | None = None) -> int:
    """Report; 1 if something is wrong with a kernel."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    kernels = importlib.import_module("sofim_fused.backends.triton_kernels")
    chosen = [i for i, (label, _) in enumerate(cases(kernels)) if label in args.kinds]
    with ProcessPoolExecutor() as pool:
        rows = [row for some in pool.map(partial(_examined, args.targets), chosen) for row in some]
    print(as_text(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    wrong = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} kernels compiled, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
