"""Checks and reports on the compiled GPU kernels, without a GPU: ``python -m bench.kernels``.

Compiles every Triton kernel as the backend launches it for sm_80, sm_90, sm_100 and gfx942, and the CUDA C++ kernels
for the first three if nvcc is installed. The compilers' output shows which memory accesses each pass makes, and which
resources it needs. The exit code is 1 if the full tiles of a kernel, its hot path,

- have an access narrower than 128 bits, or none at all,
- move more or fewer bytes per parameter than docs/method.md says, or if a kernel
- spills registers (kernels for any mixture of types: more than 16, for 16-bit weights more than 4), or
- starts more programs that wait for each other than fit on a multiprocessor, or fits fewer blocks than
  ``__launch_bounds__`` promises.

Between the passes of a step that runs pass by pass, ``fold`` and ``solve`` work on a few numbers per tensor: of them
only registers and spills are reported.

Tensors at addresses that are not multiples of 16 need narrow accesses in full tiles too, and the compiler may merge
both paths; for these kernels only the other conditions hold. The CUDA C++ kernels occur twice: as shipped, for several
combinations of types, whose bytes cannot be counted; and as instances of the same templates for one combination each.

With ``--covering`` it takes half as long: all kernels for sm_90, and some of them for the other targets.
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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from bench import kernels_adaptive, kernels_cuda
from bench.kernels_adaptive import AdaptiveCase
from bench.kernels_cuda import SHIPPED, Instance, kind_of
from sofim_fused.backends import Sums
from sofim_fused.backends.triton import pack
from sofim_fused.backends.triton.launch import (
    KernelConfig,
    SolveConfig,
    launch_first,
    launch_fold,
    launch_second,
    launch_single,
    launch_solve,
    programs_per_multiprocessor,
)
from sofim_fused.backends.triton.workspace import Located, Workspace

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MAIN_TARGET = "sm_90"
TRITON, CUDA = "Triton", "CUDA C++"
BANDWIDTH = 3.0e12  # bytes/s, about what an H100 copies with
PARAMETERS = 100_000_000
SGD_BYTES = 20  # float32 SGD with momentum in one sweep: reads g, m, w; writes m, w
NARROWEST = 128  # bits of an access in the hot path
# Instructions for a tile, in kernels of about a hundred accesses each. With room for one block less nothing is spilled,
# and on an H200 steps with bfloat16 weights took no less time. The guarded step of 16-bit weights in one launch spills
# three on sm_90 since its coefficients include those of the look-ahead; no GPU has timed that yet.
SPILLS = {SHIPPED["AnyWeights"]: 16, SHIPPED["NarrowWeights"]: 4}
# Bits of accesses that are narrower on purpose: weights of 24 bits and their lost bits go element by element, and share
# the kernels of all weights. Those of single kinds of weights, which are looked at too, have no such accesses.
NARROWER = {SHIPPED["AnyWeights"]: {8}}

# A multiprocessor of sm_80 to sm_100; what is reserved of shared memory per program is in the compiler's figure.
_REGISTERS, _WARPS, _PROGRAMS = 65_536, 64, 32
_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


@dataclass(frozen=True)
class Case:
    """A kernel as it is used.

    Attributes:
        name: of the pass or passes.
        config: what the backend asks for; ``config.kinds`` has one kind.
        launch: ``"first"``, ``"second"`` or ``"single"``.
        with_step: ``accumulate`` also takes the known part of the update.
    """

    name: str
    config: KernelConfig
    launch: str
    with_step: bool = False


@dataclass(frozen=True)
class SolveCase:
    """``fold`` and ``solve`` as they are used between passes.

    Attributes:
        name: of the kernel, and of what it is compiled for.
        config: what the backend asks for.
        launch: ``"fold"`` or ``"solve"``.
        l2: some tensor has L2 weight decay; ``fold`` alone asks.
        classes: of tensors; ``fold`` alone asks.
    """

    name: str
    config: SolveConfig
    launch: str
    l2: bool = False
    classes: int = 1


FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (
    pack.TYPES[dtype] for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
)
KINDS = {
    "fp32": FLOAT32,
    "fp32, bf16 moment": FLOAT32 | pack.ROUNDS,
    "bf16, Kahan": BFLOAT16 | pack.KEEPS,
    "bf16, master bits": BFLOAT16 | pack.KEEPS | pack.MASTER,
    "bf16, bf16 moment, Kahan": BFLOAT16 | pack.ROUNDS | pack.KEEPS,
    "bf16, bf16 moment": BFLOAT16 | pack.ROUNDS,
    "bf16, fp32 gradient, Kahan": BFLOAT16 | pack.WIDE | pack.KEEPS,
    "fp32, 8-bit moment": FLOAT32 | pack.CODES,
    "fp32, 8-bit moment, ragged": FLOAT32 | pack.CODES | pack.RAGGED,
    "fp32, 8-bit moment, unaligned": FLOAT32 | pack.CODES | pack.RAGGED | pack.UNALIGNED,
    "bf16, 8-bit moment, master bits": BFLOAT16 | pack.CODES | pack.KEEPS | pack.MASTER,
    "fp16, Kahan": FLOAT16 | pack.KEEPS,
    "fp64": FLOAT64,
    "fp32, unaligned": FLOAT32 | pack.UNALIGNED,
}
# Where a thread has eight elements of a tile, their codes are 64 bits.
NARROWER.update({label: {64} for label, kind in KINDS.items() if kind & pack.CODES})
# In CUDA C++, whether bits are kept is found out at run time: kinds that keep none have the code of those that do.
CUDA_KINDS = {
    "fp32": ("float", "float", "float"),
    "fp32, bf16 moment": ("float", "float", "BFloat16"),
    "bf16, Kahan": ("BFloat16", "BFloat16", "float"),
    "bf16, bf16 moment, Kahan": ("BFloat16", "BFloat16", "BFloat16"),
    "bf16, fp32 gradient, Kahan": ("BFloat16", "float", "float"),
    "fp16, Kahan": ("Float16", "Float16", "float"),
    "fp64": ("double", "double", "double"),
}
TWO_LAUNCHES = ("bf16, fp32 gradient, Kahan", "fp64")  # kinds whose steps always take two launches
SUMS = "sums"  # replaces the kind for kernels that work on sums
ALL_KINDS = list(dict.fromkeys([*KINDS, SUMS, *CUDA_KINDS, *SHIPPED.values()]))


# Kinds like others, of which three passes are looked at, one for each of the targets beside the main one.
FEW_PASSES = ("fp32, 8-bit moment, ragged", "fp32, 8-bit moment, unaligned", "bf16, 8-bit moment, master bits")


def cases(kernels: ModuleType) -> Iterator[tuple[str, Case]]:
    """Every kernel with the kind that it is for; the gradient form and L2 decay for float32 and float64 alone."""
    k = kernels
    for label, kind in KINDS.items():
        variants = [("moment", k.MOMENT, False)]
        if kind == FLOAT32:
            variants += [("gradient", k.GRADIENT, False), ("L2", k.MOMENT, True)]
        if kind in (FLOAT32, FLOAT64):
            variants += [("gradient, L2", k.GRADIENT, True)]
        for name, numerator, l2 in variants:
            plain = KernelConfig((kind,), k.ACCUMULATE, k.APPLY, k.PLAIN, l2=l2, numerator=numerator)
            guarded = KernelConfig(
                (kind,), k.DOTS, k.COMMIT, k.GUARDED, l2=l2, numerator=numerator, clip=True, skip=True
            )
            yield label, Case(f"accumulate ({name})", plain, "first")
            if label in FEW_PASSES:
                yield label, Case(f"commit ({name})", guarded, "second")
                if guarded.takes_two:
                    yield label, Case(f"dots ({name})", guarded, "first")
                else:
                    yield label, Case(f"one launch, guarded ({name})", guarded, "single")
                continue
            if not l2:
                yield label, Case(f"apply ({name})", plain, "second")
            yield label, Case(f"dots ({name})", guarded, "first")
            yield label, Case(f"commit ({name})", guarded, "second")
            yield label, Case(f"one launch, plain ({name})", plain, "single")
            yield label, Case(f"one launch, guarded ({name})", guarded, "single")
    blocks = KernelConfig(
        (FLOAT32,), k.DOTS, k.COMMIT, k.GUARDED, numerator=k.GRADIENT, clip=True, skip=True, per_tensor=True
    )
    yield "fp32", Case("dots (gradient, a block per tensor)", blocks, "first")
    ahead = KernelConfig(
        (FLOAT32,), k.DOTS, k.COMMIT, k.GUARDED, l2=True, numerator=k.NESTEROV, clip=True, skip=True, per_tensor=True
    )
    yield "fp32", Case("one launch, guarded (nesterov, L2)", ahead, "single")
    early = KernelConfig((FLOAT32,), k.ACCUMULATE, 0, k.SUMS_ONLY, numerator=k.GRADIENT)
    yield "fp32", Case("accumulate with the gradient's part of the step", early, "first", with_step=True)


def solve_cases(kernels: ModuleType) -> Iterator[SolveCase]:
    """``fold`` and ``solve``: the least that they do and the most, for each kind of Fisher block."""
    for name, fisher in (("model", kernels.MODEL), ("group", kernels.GROUP), ("parameter", kernels.PARAMETER)):
        for guarded in (False, True):
            config = SolveConfig(fisher, kernels.GRADIENT if guarded else kernels.MOMENT, guarded)
            label = f"{'guarded, gradient' if guarded else 'plain, moment'}, a block per {name}"
            yield SolveCase(f"fold ({label})", config, "fold", l2=guarded, classes=2 if guarded else 1)
            yield SolveCase(f"solve ({label})", config, "solve")
    ahead = SolveConfig(kernels.PARAMETER, kernels.NESTEROV, True)
    yield SolveCase("fold (guarded, nesterov, a block per parameter)", ahead, "fold", l2=True, classes=2)
    yield SolveCase("solve (guarded, nesterov, a block per parameter)", ahead, "solve")


def cuda_cases(kernels: ModuleType) -> Iterator[tuple[str, Case, Instance]]:
    """The same cases in CUDA C++, those left out that are another one's kernel."""
    seen: set[Instance] = set()
    for label, storage in CUDA_KINDS.items():
        for other, case in cases(kernels):
            if other != label or case.config.per_tensor or (case.launch == "single" and label in TWO_LAUNCHES):
                continue
            config = case.config
            passes = {
                kernels.ACCUMULATE: kind_of(
                    "accumulate", l2=config.l2, gradient=config.reads_gradient, step=case.with_step
                ),
                kernels.APPLY: kind_of("apply", gradient=config.reads_gradient),
                kernels.DOTS: kind_of("dots", l2=config.l2),
                kernels.COMMIT: kind_of("commit", l2=config.l2, gradient=config.reads_gradient),
            }
            template = {"first": "first", "second": "second", "single": "both"}[case.launch]
            kinds = tuple(passes[which] for which in _passes(case))
            instance = Instance(
                template, storage, kinds, config.l2, config.reads_gradient and kernels.COMMIT in _passes(case)
            )
            if instance not in seen:
                seen.add(instance)
                yield label, case, instance


def covering(kernels: ModuleType, targets: Sequence[str]) -> list[list[str]]:
    """For each of the cases the main target and, in turn, one of the others, so that each has all kinds and passes."""
    main = main_of(targets)
    others = [target for target in targets if target != main]
    labels = [*KINDS, SUMS]
    return [
        [main, *(others[(i + labels.index(label)) % len(others)] for _ in others[:1])]
        for i, (label, _) in enumerate(every_case(kernels))
    ]


def every_case(kernels: ModuleType) -> list[tuple[str, Case | SolveCase | AdaptiveCase]]:
    """All Triton kernels, with their kinds."""
    others = ((SUMS, case) for case in solve_cases(kernels))
    return [*cases(kernels), *others, *kernels_adaptive.cases(KINDS, SUMS)]


def main_of(targets: Sequence[str]) -> str:
    """The target for which nothing is left out."""
    return MAIN_TARGET if MAIN_TARGET in targets else targets[0]


def _passes(case: Case) -> list[int]:
    """The passes of a case, as the Triton kernels number them."""
    config = case.config
    return {"first": [config.first], "second": [config.second], "single": [config.first, config.second]}[case.launch]


def table_bytes(case: Case, kernels: ModuleType) -> tuple[int, int]:
    """Bytes per parameter that a case has to read and to write, from the table of passes in docs/method.md."""
    kind = case.config.kinds[0]
    w = 8 if kind & 3 == FLOAT64 else 4 if kind & 3 == FLOAT32 else 2
    g = 4 if kind & pack.WIDE else w
    m = 1 if kind & pack.CODES else 2 if kind & pack.ROUNDS else max(w, 4)  # scales, 1/32 of a byte, are apart
    lost = w if kind & pack.KEEPS else 0
    l2, cross = case.config.l2, case.config.reads_gradient
    step = case.with_step
    passes = {
        kernels.ACCUMULATE: (g + m + (w if l2 or step else 0) + (lost if step else 0), m + (w + lost if step else 0)),
        kernels.APPLY: (m + w + lost + (g if cross else 0), w + lost),
        kernels.DOTS: (g + m + (w if l2 else 0), 0),
        kernels.COMMIT: (g + m + w + lost, m + w + lost),
    }
    chosen = [passes[which] for which in _passes(case)]
    return sum(read for read, _ in chosen), sum(written for _, written in chosen)


@dataclass
class Launch:
    """Replaces a kernel, and records the arguments that the backend passes to it."""

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
    rows = torch.zeros(1, pack.COLUMNS, dtype=torch.int64)
    rows[0, pack.NUMEL], rows[0, pack.KIND] = kernels.TILE, case.config.kinds[0]
    workspace = Workspace(
        kernels, torch.device("cpu"), rows, torch.zeros(1, pack.HYPERS, dtype=torch.float64), 1, [0, 1]
    )
    noted = {name: Launch(getattr(kernels, name)) for name in ("first", "second", "single")}
    spy: Any = SimpleNamespace(**{**vars(kernels), **noted})
    if case.launch == "first":
        launch_first(spy, workspace, case.config, case.with_step)
    elif case.launch == "second":
        launch_second(spy, workspace, case.config)
    else:
        launch_single(spy, workspace, case.config, 1)
    return noted[case.launch]


def launched_solve(case: SolveCase, kernels: ModuleType) -> Launch:
    """What the backend passes to Triton for ``fold`` and ``solve``: of two tensors, in one group."""
    noted = {name: Launch(getattr(kernels, name)) for name in ("fold", "solve")}
    spy: Any = SimpleNamespace(**{**vars(kernels), **noted})
    located = Located(torch.device("cpu"), [torch.tensor(1), torch.tensor(1)], [2], case.config.fisher == kernels.GROUP)
    blocks = 2 if case.config.fisher == kernels.PARAMETER else 1
    double = torch.float64
    hyper, totals = torch.ones(1, 6, dtype=double), torch.ones(case.classes, case.config.rows, blocks, dtype=double)
    one = torch.ones((), dtype=double)
    if case.launch == "fold":
        some = torch.ones(2, dtype=double)
        weights = some if case.l2 else None
        sums = Sums(mm=some, mg=some, mw=weights, gg=some, gw=weights, ww=weights)
        class_of = torch.tensor([0, 1]) if case.classes > 1 else None
        launch_fold(spy, case.config, located, hyper, sums, class_of, totals, torch.ones(case.classes, dtype=double))
    else:
        coefficients = torch.ones(kernels.COEFFICIENTS, 2, dtype=double)
        guard: dict[str, Any] = {}
        if case.config.guarded:
            outcome, skipped = torch.ones(2, dtype=double), torch.zeros(1, dtype=torch.int8)
            guard = {"square": one, "outcome": outcome, "skipped": skipped, "max_norm": 1.0, "skip_nonfinite": True}
            guard.update(grad_scale=torch.ones(()), found_inf=torch.zeros(()))
        launch_solve(spy, case.config, located, hyper, totals[0], coefficients, **guard)
    return noted[case.launch]


_POINTERS = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
}


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
            signature[name] = "fp64" if isinstance(value, float) else "i32"
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
    """The results for a case on a target.

    Attributes:
        by: ``TRITON`` or ``CUDA``.
        read, written: bytes per parameter that the hot path moves; ``None`` where it serves several kinds.
        widths: bits of its accesses, and how many of each a thread has.
        registers: per thread. ``spills``: instructions that move registers to memory or back.
        shared: bytes per program, as CUDA C++'s blocks are called here.
        programs: per multiprocessor; ``occupancy``: their share of the threads that it can hold.
        instructions: PTX instructions per element in the blocks that touch parameters' memory, in CUDA C++ in the code
            for full tiles, both sides of each branch; ``None`` for AMD, where each access stands in a loop (of one
            turn) of its own, and where it serves several kinds.
        milliseconds: for ``PARAMETERS`` at ``BANDWIDTH``.
        wrong: what is wrong with the kernel; if any is, the exit code is 1.
    """

    by: str
    kind: str
    case: str
    target: str
    read: float | None
    written: float | None
    widths: dict[int, int]
    registers: int
    spills: int
    shared: int
    programs: int
    occupancy: float
    instructions: float | None
    milliseconds: float | None
    wrong: list[str]


def examined(case: Case, label: str, target: str, kernels: ModuleType) -> Row:
    """Compile a case for a target and read what came out."""
    launch = launched(case, kernels)
    kernel = compiled(launch, target)
    nvidia = target.startswith("sm_")
    threads = launch.options["num_warps"] * (32 if nvidia else 64)
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    accesses, instructions = hot_path(text, _full_lines(kernels, case.config.kinds[0]))
    read, written, widths = _moved(accesses, threads / kernels.TILE)
    if nvidia:
        registers, spills, shared = _of_cubin(kernel.asm["cubin"])
        programs, occupancy = _room(registers, shared, launch.options["num_warps"], target)
    else:
        registers, spills, shared, programs, occupancy = _of_amdgcn(text, launch.options["num_warps"])
    row = Row(
        TRITON, label, case.name, target, read, written, widths, registers, spills, shared, programs, occupancy,
        instructions * threads / kernels.TILE if nvidia else None, _milliseconds(read + written), [],
    )  # fmt: skip
    single = case.launch == "single"
    needed = programs_per_multiprocessor(case.config, hip=not nvidia) if single else 0
    if case.config.kinds[0] & pack.UNALIGNED:
        row.wrong = list(_wrong(row, needed))
    else:
        row.wrong = list(_wrong(row, needed, table_bytes(case, kernels), NARROWEST))
    return row


def examined_solve(case: SolveCase, target: str, kernels: ModuleType) -> Row:
    """Compile ``fold`` or ``solve`` for a target and read what came out."""
    launch = launched_solve(case, kernels)
    kernel = compiled(launch, target)
    warps = launch.options["num_warps"]
    if target.startswith("sm_"):
        registers, spills, shared = _of_cubin(kernel.asm["cubin"])
        programs, occupancy = _room(registers, shared, warps, target)
    else:
        registers, spills, shared, programs, occupancy = _of_amdgcn(kernel.asm["amdgcn"], warps)
    row = Row(
        TRITON, SUMS, case.name, target, None, None, {}, registers, spills, shared, programs, occupancy, None, None, []
    )
    row.wrong = list(_wrong(row, 1))
    return row


def examined_adaptive(case: AdaptiveCase, label: str, target: str) -> Row:
    """Compile a kernel of a step with a diagonal that adapts, and read what came out."""
    adaptive = kernels_adaptive.adaptive_kernels()
    nvidia = target.startswith("sm_")
    noted = Launch(getattr(adaptive, case.kernel))
    others = {name: Launch(getattr(adaptive, name)) for name in ("squares", "add_up")}
    spy = SimpleNamespace(**{**vars(adaptive), **others, case.kernel: noted})
    slots = kernels_adaptive.launch(case, spy, hip=not nvidia)
    kernel = compiled(noted, target)
    warps = noted.options["num_warps"]
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    if nvidia:
        registers, spills, shared = _of_cubin(kernel.asm["cubin"])
        programs, occupancy = _room(registers, shared, warps, target)
    else:
        registers, spills, shared, programs, occupancy = _of_amdgcn(text, warps)
    row = Row(
        TRITON, label, case.name, target, None, None, {}, registers, spills, shared, programs, occupancy, None, None, []
    )
    if case.what == kernels_adaptive.ALGEBRA:
        row.wrong = list(_wrong(row, 1))
        return row
    sweep = case.what == kernels_adaptive.SWEEP
    source = importlib.import_module("sofim_fused.backends.triton.kernels") if sweep else adaptive
    kind = 0 if case.config is None else case.config.kinds[0]
    accesses, instructions = hot_path(text, _full_lines(source, kind))
    per_element = warps * (32 if nvidia else 64) / kernels_adaptive.elements(case, hip=not nvidia)
    row.read, row.written, row.widths = _moved(accesses, per_element)
    row.instructions = instructions * per_element if nvidia and sweep else None
    unaligned = kind & pack.UNALIGNED
    row.wrong = list(_wrong(row, 1) if unaligned else _wrong(row, 1, kernels_adaptive.table_bytes(case), NARROWEST))
    if slots > kernels_adaptive.MOST_SLOTS:
        row.wrong.append(f"slots take {slots:g} bytes per parameter, {kernels_adaptive.MOST_SLOTS} are allowed")
    row.written += slots
    row.milliseconds = _milliseconds(row.read + row.written)
    return row


def examined_cuda(
    nvcc: str,
    targets: Sequence[str],
    kinds: Collection[str],
    kernels: ModuleType,
    sources: Mapping[str, str] | None = None,
    names: Collection[str] | None = None,
    shipped_for: Sequence[str] | None = None,
) -> list[Row]:
    """Compile the CUDA C++ kernels and read what came out.

    Args:
        nvcc: the compiler.
        targets: of NVIDIA's, such as it knows.
        kinds: labels of ``CUDA_KINDS``, and of kernels as they are shipped.
        kernels: the Triton kernels, whose cases these are.
        sources: of the kernels; ``None``: those in csrc.
        names: of the cases; ``None``: all.
        shipped_for: targets of kernels as they are shipped; ``None``: ``targets``.
    """
    sources = kernels_cuda.sources() if sources is None else sources
    chosen = [c for c in cuda_cases(kernels) if c[0] in kinds and (names is None or c[1].name in names)]
    shipped = not set(kinds).isdisjoint(SHIPPED.values())
    chosen_file, files = "cuda/chosen.cu", [path for path in sources if path.endswith(".cu")]
    threads = (len(files) + 1) * (len(targets) + 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:

        def compiled(sources: Mapping[str, str], name: str, targets: Sequence[str]) -> Future[kernels_cuda.Compiled]:
            return kernels_cuda.compiled(sources, name, targets, nvcc, _tools(), Path(folder, Path(name).stem), pool)

        instances = kernels_cuda.instantiated([instance for _, _, instance in chosen])
        single = compiled({**sources, chosen_file: instances}, chosen_file, targets)
        several = [
            compiled(sources, name, targets if shipped_for is None else shipped_for) for name in files if shipped
        ]
        numbers = single.result().numbers
        rows = []
        for kernel in single.result().kernels:
            number = int(re.findall(r"4OnlyILi(\d+)E", kernel.entry)[0])
            label, case, _ = chosen[number]
            per_element = numbers["threads"] * numbers[f"turns_{number}"] / numbers["tile"]
            rows.append(_cuda_row(kernel, label, case.name, numbers, per_element, table_bytes(case, kernels)))
        for kernel in (kernel for file in several for kernel in file.result().kernels):
            label, name = kernels_cuda.described(kernel.entry)
            if label in kinds:
                rows.append(_cuda_row(kernel, label, name, numbers))
    order = [*((label, case.name) for label, case, _ in chosen), *((label, "") for label in SHIPPED.values())]
    return sorted(
        rows,
        key=lambda row: (
            order.index((row.kind, "" if row.read is None else row.case)),
            row.case,
            targets.index(row.target),
        ),
    )


def _cuda_row(
    kernel: kernels_cuda.Kernel,
    label: str,
    name: str,
    numbers: Mapping[str, int],
    per_element: float | None = None,
    moved: tuple[int, int] | None = None,
) -> Row:
    """The row of a kernel for one kind, of which the last two arguments are known, or of a kernel for several."""
    programs, occupancy = _room(kernel.registers, kernel.shared, numbers["threads"] // 32, kernel.target)
    read, written, widths = _moved(kernel.accesses, per_element or 0.0)
    row = Row(
        CUDA, label, name, kernel.target, read, written, widths, kernel.registers, kernel.spills, kernel.shared,
        programs, occupancy, None, _milliseconds(read + written), [],
    )  # fmt: skip
    if per_element is None:
        row.read = row.written = row.milliseconds = None
    else:
        row.instructions = kernel.instructions * per_element
    if per_element is None and name in kernels_cuda.NO_TENSORS.values():
        row.widths, row.wrong = {}, list(_wrong(row, 0))
    else:
        row.wrong = list(_wrong(row, numbers["blocks"], moved, NARROWEST))
    return row


def _moved(accesses: Counter[tuple[str, int]], per_element: float) -> tuple[float, float, dict[int, int]]:
    """Bytes per parameter that are read and written, and how often an access has which width."""
    widths: Counter[int] = Counter()
    moved = {"load": 0, "store": 0}
    for (what, bits), n in accesses.items():
        widths[bits] += n
        moved[what] += n * bits // 8
    return moved["load"] * per_element, moved["store"] * per_element, dict(widths)


def _milliseconds(moved: float) -> float:
    return moved * PARAMETERS / BANDWIDTH * 1e3


def _room(registers: int, shared: int, warps: int, target: str) -> tuple[int, float]:
    """Programs per multiprocessor, and their share of the threads that it can hold."""
    per_program = -(-registers // 8) * 8 * 32 * warps
    programs = min(_REGISTERS // per_program, _WARPS // warps, _PROGRAMS, _SHARED[target] // max(shared, 1))
    return programs, programs * warps / _WARPS


def _wrong(row: Row, needed: int, moved: tuple[int, int] | None = None, narrowest: int = 0) -> Iterator[str]:
    """What is wrong with a kernel.

    Args:
        row: what is known of it.
        needed: programs on a multiprocessor.
        moved: bytes per parameter to be read and written; ``None``: anything.
        narrowest: bits of an access, of which there has to be one; 0: any, or none.
    """
    if moved is not None and (row.read, row.written) != moved:
        yield f"moves {row.read:g} + {row.written:g} bytes per parameter, docs/method.md has {moved[0]} + {moved[1]}"
    if narrowest and not row.widths:
        yield "no access in the hot path"
    narrow = [bits for bits in row.widths if bits < narrowest and bits not in NARROWER.get(row.kind, set())]
    if narrow:
        yield f"accesses of {', '.join(map(str, sorted(narrow)))} bits in the hot path"
    if row.spills > SPILLS.get(row.kind, 0):
        yield f"{row.spills} spills"
    if row.programs < needed:
        yield f"room for {row.programs} programs on a multiprocessor, {needed} are needed"


def _full_lines(kernels: ModuleType, kind: int = 0) -> set[int]:
    """The lines that call what touches the memory of full tiles; of tensors of a kind that has none, of all tiles."""
    tile = "tail" if kind & pack.RAGGED else "full"
    assert kernels.__file__ is not None
    lines = Path(kernels.__file__).read_text(encoding="utf-8").splitlines()
    return {i for i, line in enumerate(lines, 1) if re.search(rf"(?<!def )_(load|store)_{tile}\(", line)}


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


def _tools() -> Path:
    """Where Triton has cuobjdump and nvdisasm."""
    triton: Any = importlib.import_module("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _of_cubin(cubin: bytes) -> tuple[int, int, int]:
    """Registers, spilling instructions, and bytes of shared memory."""
    tools = _tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        assert found is not None, usage
        # Without a stack there is no memory to spill to; reading the machine code takes half a second.
        assembly = _output(tools / "nvdisasm", "-c", file.name) if int(found[2]) else ""
    return int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", assembly)), int(found[3])


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
        f"{'':<8} {'kind':<28} {'pass':<48} {'target':<7} {'read':>5} {'write':>5} {'ms':>6} {'widths':<14} "
        f"{'regs':>4} {'spills':>6} {'shared':>6} {'occup.':>6} {'instr.':>6}",
    ]
    for r in rows:
        widths = ", ".join(f"{n}x{bits}" for bits, n in sorted(r.widths.items()))
        lines.append(
            f"{r.by:<8} {r.kind:<28} {r.case:<48} {r.target:<7} {_figure(r.read, 'g'):>5} {_figure(r.written, 'g'):>5} "
            f"{_figure(r.milliseconds, '.3f'):>6} {widths:<14} {r.registers:4} {r.spills:6} {r.shared:6} "
            f"{r.occupancy:6.0%} {_figure(r.instructions, '.1f'):>6}"
            + "".join(f"\n    WRONG: {text}" for text in r.wrong)
        )
    return "\n".join(lines)


def _figure(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _examined(index: int, targets: Iterable[str]) -> list[Row]:
    kernels = importlib.import_module("sofim_fused.backends.triton.kernels")
    label, case = every_case(kernels)[index]
    if isinstance(case, AdaptiveCase):
        return [examined_adaptive(case, label, target) for target in targets]
    if isinstance(case, SolveCase):
        return [examined_solve(case, target, kernels) for target in targets]
    return [examined(case, label, target, kernels) for target in targets]


def main(argv: list[str] | None = None) -> int:
    """Report; 1 if something is wrong with a kernel."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, help="GPUs (default: all)")
    parser.add_argument("--kinds", nargs="+", default=ALL_KINDS, choices=ALL_KINDS, help="dtypes (default: all)")
    parser.add_argument(
        "--covering", action="store_true", help=f"all kernels for {MAIN_TARGET}, and some of them for the others"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    kernels = importlib.import_module("sofim_fused.backends.triton.kernels")
    every = every_case(kernels)
    chosen = [i for i, (label, _) in enumerate(every) if label in args.kinds]
    targets_of = covering(kernels, args.targets) if args.covering else [args.targets] * len(every)
    with ProcessPoolExecutor() as pool:
        rows = [row for some in pool.map(_examined, chosen, [targets_of[i] for i in chosen]) for row in some]
    targets = [target for target in args.targets if target.startswith("sm_")]
    left_out = ""
    if targets and not set(args.kinds).isdisjoint([*CUDA_KINDS, *SHIPPED.values()]):
        nvcc = kernels_cuda.find_nvcc()
        known = kernels_cuda.known_targets(nvcc) if nvcc is not None else []
        if nvcc is None:
            left_out = "nvcc is not there: the CUDA C++ kernels are left out"
        elif unknown := [target for target in targets if target not in known]:
            left_out = f"nvcc does not know {', '.join(unknown)}: the CUDA C++ kernels for these are left out"
        if nvcc is not None and (targets := [target for target in targets if target in known]):
            shipped_for = [main_of(targets)] if args.covering else targets
            rows += examined_cuda(nvcc, targets, args.kinds, kernels, shipped_for=shipped_for)
    print(as_text(rows))
    if left_out:
        print(left_out)
    if args.covering:
        print(
            f"A covering: Triton kernels for {main_of(args.targets)} and one other target each, in turn; CUDA C++ as "
            "shipped for one target"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    wrong = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} kernels compiled, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
