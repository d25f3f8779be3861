"""The kernels of csrc/cuda, compiled and examined without a GPU: the CUDA C++ part of bench.kernels.

The shipped kernels are compiled for sets of storage types, with a branch per chunk, and get some options at run time,
so their code does not show the bytes per parameter, only widths of accesses, registers and spills. To count bytes,
:func:`instantiated` compiles the same templates for one combination of types and options each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from typing import NamedTuple

PASSES = ("accumulate", "apply", "dots", "commit")  # in the order of the enum Pass
SHIPPED = {  # the sets of storage types
    "Float32Weights": "fp32 weights, as shipped",
    "NarrowWeights": "16-bit weights, as shipped",
    "AnyWeights": "any weights, as shipped",
}
NO_TENSORS = {  # kernels that touch none, by name
    "copy": "arguments to a table",
    "fold": "fold",
    "solve": "solve",
    "adapt": "adapt",
    "fold_scaled": "fold_scaled",
    "solve_scaled": "solve_scaled",
    "finish_scaled": "fold_scaled and solve_scaled",
}
SCALED = ("accumulate", "apply", "commit")  # in the order of the enum ScaledPass
FOLDER = Path(__file__).parent.parent / "csrc"
STORAGE = "cuda/storage.cuh"  # the file with load and store
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-lineinfo")  # as in setup.py
ARCHITECTURE = "compute_80"  # of the PTX, from which it makes the code for each GPU

_PROCESSES = Semaphore(os.cpu_count() or 1)


def find_nvcc() -> str | None:
    """The compiler: of ``CUDA_HOME``, or on the ``PATH``."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def known_targets(nvcc: str) -> list[str]:
    """What the compiler compiles for."""
    return _output(nvcc, "--list-gpu-code").split()


class Instance(NamedTuple):
    """A kernel for one kind of tensors.

    Attributes:
        template: ``"first"``, ``"second"`` or ``"both"``.
        storage: C++ types of weight, gradient and moment.
        kinds: of its passes, as :func:`kind_of` gives them.
        l2, gradient: options that shipped kernels get at run time.
    """

    template: str
    storage: tuple[str, str, str]
    kinds: tuple[str, ...]
    l2: bool
    gradient: bool


def kind_of(which: str, *, l2: bool = False, gradient: bool = False, step: bool = False) -> str:
    """What a sweep is compiled for, as a type in C++."""
    if which in ("dots", "commit"):
        gradient = False  # dots computes the same sums in both forms; commit gets the form at run time
    if which in ("apply", "commit"):
        l2 = False
    return f"Kind<Pass::{which}, {', '.join(map(_cpp, (gradient, l2, step)))}>"


def _cpp(x: bool) -> str:
    return str(x).lower()


def sources() -> dict[str, str]:
    """The kernels and what they include, by path in ``csrc``."""
    files = [file for name in ("step", "cuda") for file in sorted((FOLDER / name).iterdir()) if file.suffix != ".cpp"]
    return {file.relative_to(FOLDER).as_posix(): file.read_text(encoding="utf-8") for file in files}


def instantiated(instances: Sequence[Instance]) -> str:
    """A source with the kernels for these instances and nothing else; the i-th has ``Only<i, ...>`` in its name."""
    lines = [
        '#include "cuda/one_launch.cuh"',
        "namespace sofim::cuda {",
        "namespace {",
        "template <int index, class S, bool l2, bool gradient>",
        "struct Only {",
        "  template <class K>",
        "  static __device__ __forceinline__ void sweep(const Chunk& given, Sums<K>& sums) {",
        "    Chunk chunk = given;",
        "    chunk.l2 = l2, chunk.gradient = gradient;",
        "    return chunk.full() ? chunk.sweep<S, K, S::kVector>(sums) : chunk.sweep<S, K, 1>(sums);",
        "  }",
        "};",
    ]
    numbers = {"threads": "kThreads", "tile": "kTile", "blocks": "kBlocks"}
    for i, (template, storage, kinds, l2, gradient) in enumerate(instances):
        storing = f"Storage<{', '.join(storage)}>"
        arguments = ", ".join((f"Only<{i}, {storing}, {_cpp(l2)}, {_cpp(gradient)}>", *kinds, "kMost"))
        lines.append(
            f"template __global__ void {template}<{arguments}>(const __grid_constant__ Arguments<Task, kMost>);"
        )
        numbers[f"turns_{i}"] = f"kTile / (kThreads * {storing}::kVector * {storing}::kBatch)"
    lines.append("}  // namespace")
    # What the compiled code is to be multiplied by; the PTX has it as numbers.
    lines += [f'extern "C" {{ __device__ int {name} = {value}; }}' for name, value in numbers.items()]
    return "\n".join([*lines, "}  // namespace sofim::cuda", ""])


@dataclass
class Kernel:
    """A compiled kernel.

    Attributes:
        entry: its name for the linker.
        target: what it is compiled for.
        accesses: to the elements of tensors in full tiles: how often a thread loads or stores how many bits. Those in a
            loop count once.
        instructions: of PTX, in the code for full tiles; both sides of each branch.
        registers: per thread. ``spills``: instructions that move registers to memory or back.
        shared: bytes per block.
    """

    entry: str
    target: str
    accesses: Counter[tuple[str, int]]
    instructions: int
    registers: int
    spills: int
    shared: int


class Compiled(NamedTuple):
    """A compiled source: its kernels for each target, and the numbers that it defines."""

    kernels: list[Kernel]
    numbers: dict[str, int]


def compiled(
    sources: Mapping[str, str], name: str, targets: Sequence[str], nvcc: str, tools: Path, folder: Path, pool: Executor
) -> Future[Compiled]:
    """Compile a source and read what comes out.

    Args:
        sources: of all files, like those of :func:`sources`.
        name: of the one to compile, there.
        targets: "sm_80" and the like.
        nvcc: the compiler.
        tools: the folder of cuobjdump and nvdisasm.
        folder: for a copy of the sources and intermediate files; of this call alone.
        pool: of threads, at least one per target and two more for each call; most of them wait.
    """
    for path, content in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    ptx = folder / "kernels.ptx"

    def front_end() -> str:
        includes = ("-I", folder, "-diag-suppress=177")  # functions that the chosen kernels do not call
        _output(nvcc, *FLAGS, "-ptx", f"-arch={ARCHITECTURE}", *includes, "-o", ptx, folder / name)
        return ptx.read_text(encoding="utf-8")

    def back_end(target: str) -> dict[str, tuple[int, int, int]]:
        text.result()
        cubin = folder / f"{target}.cubin"
        _output(nvcc, "-cubin", f"-arch={target}", "-o", cubin, ptx)
        return usage(cubin, tools)

    def read() -> Compiled:
        paths = dict(hot_paths(text.result(), single_lines(sources[STORAGE])))
        kernels = []
        for target, figures in zip(targets, done, strict=True):
            assert figures.result().keys() == paths.keys(), f"kernels and machine code for {target} differ"
            kernels += [Kernel(name, target, *path, *figures.result()[name]) for name, path in paths.items()]
        return Compiled(kernels, numbers(text.result()))

    text = pool.submit(front_end)
    done = [pool.submit(back_end, target) for target in targets]
    return pool.submit(read)


# The PTX

_NAME = re.compile(r"(\$L__info_string\d+):\n((?:\s*\.b8 .*\n)+)")
_NUMBER = re.compile(r"\.global \.align \d+ \.[bsu]32 (\w+)(?: = (\d+))?;")
_ENTRY = re.compile(r"\.entry (\w+)\([^)]*\)[^{]*\{\n(.*?)\n\}", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:\{\s*)?(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);")
_REGISTER = re.compile(r"%(?!p\d)\w+")  # predicates choose between addresses, they are no part of one
_WIDTH = re.compile(r"(?:\.v(\d))?\.[bfsu](\d+)$")
# The functions that have the elements of a vector, and how many that is, as they are named for the linker.
_SWEEPING = re.compile(r"\d(?:load|store)ILi(\d+)E|\dsweepI.*Li(\d+)EEEvR")
# What they read or write belongs to no element: factors of a diagonal that adapts, and sums.
_FACTORS = re.compile(r"\d(?:factor|factors_at)I|\dset_row_sum")
_OUTSIDE = re.compile(
    r"\d(?:first_sweep|second_sweep|factors|load_cg|block_total|warp_total|tensor_of|is_last_block|atomic_inc_acq_rel)"
)


def numbers(ptx: str) -> dict[str, int]:
    """The integers that a source defines for the device."""
    return {name: int(value or 0) for name, value in _NUMBER.findall(ptx)}


def single_lines(storage: str) -> set[int]:
    """The lines of ``load`` and ``store`` that are about single elements: up to their last branch."""
    lines: set[int] = set()
    for function in re.finditer(r"^__device__ __forceinline__ void (?:load|store)\(.*?^}", storage, re.M | re.S):
        first = storage.count("\n", 0, function.start()) + 1
        before = function[0].rpartition("\n  } else {\n")[0]
        lines.update(range(first, first + before.count("\n") + 1))
    return lines


def hot_paths(ptx: str, single: Collection[int]) -> Iterator[tuple[str, tuple[Counter[tuple[str, int]], int]]]:
    """Of each kernel, the accesses to tensors in full tiles, and the number of instructions there.

    An access to a tensor is one whose address is made of an address that was found in memory, where the table of
    tensors is, and of the thread's index. It is taken to be in a full tile unless it stands in a function for single
    elements: the directives ``.loc`` tell from which function an instruction was inlined, and the template arguments in
    its name how many elements it takes at a time. Where the compiler has lost the function, the line has to do.

    Args:
        ptx: with ``.loc`` directives.
        single: the lines of storage.cuh that are about single elements.

    Outside of its sweep, ``squares`` writes sums to addresses from its table, too; there nothing is counted.
    """
    names = {
        label: bytes(map(int, re.findall(r"\b\d+\b", data))).decode().rstrip("\0") for label, data in _NAME.findall(ptx)
    }
    files = re.findall(r'\.file\s+(\d+) "[^"]*/storage\.cuh"', ptx)
    places = {(file, str(line)) for file in files for line in single}
    for entry, body in _ENTRY.findall(ptx):
        yield entry, _hot_path(body, names, places, only_sweeps="7squaresE" in entry)


def _hot_path(
    body: str, names: Mapping[str, str], single: Collection[tuple[str, ...]], only_sweeps: bool
) -> tuple[Counter[tuple[str, int]], int]:
    size: int | None = None  # elements at a time, where that is known
    flows: list[tuple[list[str], list[str]]] = []  # registers, and those that they are computed from
    found: list[tuple[str, str, str]] = []
    indices, addresses = set(), set()
    instructions = 0
    for line in body.splitlines():
        stripped = line.strip()
        if stripped.startswith(".loc"):
            function = re.search(r"function_name (\S+),", stripped)
            name = names[function[1]] if function else ""
            if _FACTORS.search(name):
                size = 1
            elif sweeping := _SWEEPING.search(name):
                size = int(sweeping[1] or sweeping[2])
            elif not function:
                size = 1 if tuple(stripped.split()[1:3]) in single else None
            elif _OUTSIDE.search(name):
                size = None
            continue  # small functions belong to whoever calls them
        instruction = _INSTRUCTION.match(stripped)
        if instruction is None:
            continue
        instructions += (size or 0) > 1
        what, operands = instruction.groups()
        if what.startswith(("ld.", "st.")):
            place = operands.partition("[")[2].partition("]")[0]
            if not place.startswith("%") or re.match(r"\w+\.(volatile\.)?(shared|local|param)\b", what):
                continue
            if size != 1 and not (size is None and only_sweeps):
                found.append(("load" if what.startswith("ld") else "store", what, _REGISTER.findall(place)[0]))
            if re.match(r"ld\b.*\.[bsu]64$", what):
                addresses.update(_REGISTER.findall(operands.partition("[")[0]))
            continue
        to, _, of = operands.partition("}," if operands.startswith("{") else ",")
        if "%tid." in of:
            indices.update(_REGISTER.findall(to))
        flows.append((_REGISTER.findall(to), _REGISTER.findall(of)))
    for reached in (indices, addresses):
        before = -1
        while before != len(reached):
            before = len(reached)
            for to, of in flows:
                if not reached.isdisjoint(of):
                    reached.update(to)
    accesses: Counter[tuple[str, int]] = Counter()
    for direction, what, register in found:
        if register in indices and register in addresses:
            width = _WIDTH.search(what)
            assert width is not None, what
            accesses[direction, int(width[1] or 1) * int(width[2])] += 1
    return accesses, instructions


# The machine code


def usage(cubin: Path, tools: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, spilling instructions and bytes of shared memory of each kernel."""
    listed = _output(tools / "cuobjdump", "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", listed)
    # Without a stack there is no memory to spill to; reading the machine code would take seconds.
    spills = _spills(_output(tools / "nvdisasm", "-c", cubin)) if any(int(stack) for _, _, stack, _ in found) else {}
    return {name: (int(registers), spills.get(name, 0), int(shared)) for name, registers, _, shared in found}


def _spills(assembly: str) -> dict[str, int]:
    """Accesses to local memory of each kernel, those of the functions that it calls left out."""
    counts: Counter[str] = Counter()
    kernel = ""
    for line in assembly.splitlines():
        if line.startswith(".text."):
            kernel = line[len(".text.") :].rstrip(":")
        elif line.startswith("$"):
            kernel = ""
        elif kernel and re.search(r"\b(?:LDL|STL)\b", line):
            counts[kernel] += 1
    return counts


def described(entry: str) -> tuple[str, str]:
    """Set of storage types and passes of a kernel that is shipped."""
    if other := re.search(rf"\d({'|'.join(NO_TENSORS)})(?:I|E)", entry):
        return SHIPPED["AnyWeights"], NO_TENSORS[other[1]]
    if re.search(r"\d(?:squares)E", entry):
        return SHIPPED["AnyWeights"], "squares"
    if scaled := re.search(r"\d(?:accumulate_scaledI|update_scaledILN\w*?10ScaledPassE(\d)E)Lb(\d)E", entry):
        return SHIPPED["Float32Weights" if scaled[2] == "1" else "AnyWeights"], f"{SCALED[int(scaled[1] or 0)]}_scaled"
    name = re.search(rf"(?:first|second|both)I\w*?\d({'|'.join(SHIPPED)})E", entry)
    size = re.search(r"Li(\d+)E", entry)
    sweeps = re.findall(r"L(?:N\w*?4PassE|S\w*?_)(\d)ELb(\d)ELb(\d)ELb(\d)E", entry)
    assert name is not None, entry
    assert size is not None, entry
    assert 1 <= len(sweeps) <= 2, entry
    which, gradient, l2, step = sweeps[0]
    what = PASSES[int(which)]
    form = "gradient" if gradient == "1" else "moment"
    if len(sweeps) == 2:
        forms = "one launch, guarded" if what == "dots" else f"one launch, plain ({form})"
        return SHIPPED[name[1]], f"{forms}, {int(size[1])} bytes"
    if step == "1":
        return SHIPPED[name[1]], f"{what} with the step"
    if what in ("accumulate", "dots") and l2 == "1":
        return SHIPPED[name[1]], f"{what} (L2)"  # in both forms
    return SHIPPED[name[1]], what if what in ("dots", "commit") else f"{what} ({form})"


def _output(*command: str | Path) -> str:
    with _PROCESSES:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
