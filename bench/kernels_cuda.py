"""The kernels of csrc/cuda/kernels.cu, compiled and examined without a GPU: the CUDA C++ part of bench.kernels.

The shipped kernels are compiled for sets of storage types, with a branch per tile, so their code does not show the
bytes per parameter, only widths of accesses, registers and spills. To count bytes, :func:`instantiated` compiles the
same templates for one combination of types each.
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
    "Float32": "fp32 weights, as shipped",
    "Alike": "16-bit weights, as shipped",
    "Any": "any weights, as shipped",
}
COPY = "arguments to a table"  # the kernel that touches no tensor
SOURCE = Path(__file__).parent.parent / "csrc" / "cuda" / "kernels.cu"
LAUNCHES = "\n// Launches\n"  # where the kernels end, in the source
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
    """

    template: str
    storage: tuple[str, str, str]
    kinds: tuple[str, ...]


def kind_of(which: str, *, l2: bool = False, gradient: bool = False, step: bool = False) -> str:
    """What a sweep is compiled for, as a type in C++."""
    if which == "dots":
        gradient = False  # it takes the same sums in both forms
    if which == "apply":
        l2 = False
    return f"Kind<Pass::{which}, {', '.join(str(x).lower() for x in (l2, gradient, step))}>"


def instantiated(source: str, instances: Sequence[Instance]) -> str:
    """The kernels in ``source`` for these instances and nothing else; the i-th has ``Only<i, ...>`` in its name."""
    kernels, found, _ = source.partition(LAUNCHES)
    assert found, f"no line {LAUNCHES.strip()!r} in the source"
    lines = [
        kernels,
        "template <int index, class S>",
        "struct Only {",
        "  template <class K>",
        "  static __device__ __forceinline__ void sweep(const Tile& tile, Sums<K>& sums) {",
        "    return tile.full() ? tile.swept<S, K, S::kVector>(sums) : tile.swept<S, K, 1>(sums);",
        "  }",
        "};",
    ]
    numbers = {"threads": "kThreads", "tile": "kTile", "blocks": "kBlocks"}
    for i, (template, storage, kinds) in enumerate(instances):
        storing = f"Storage<{', '.join(storage)}>"
        arguments = ", ".join((f"Only<{i}, {storing}>", *kinds, "kMost"))
        lines.append(f"template __global__ void {template}<{arguments}>(const __grid_constant__ Arguments<kMost>);")
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
    """What a source came to: its kernels for each target, and the numbers that it defines."""

    kernels: list[Kernel]
    numbers: dict[str, int]


def compiled(
    source: str, targets: Sequence[str], nvcc: str, tools: Path, folder: Path, pool: Executor
) -> Future[Compiled]:
    """Compile a source and read what comes out.

    Args:
        source: like csrc/cuda/kernels.cu.
        targets: "sm_80" and the like.
        nvcc: the compiler.
        tools: the folder of cuobjdump and nvdisasm.
        folder: for intermediate files; of this call alone.
        pool: of threads, at least one per target and two more; most of them wait.
    """
    folder.mkdir()
    file, ptx = folder / "kernels.cu", folder / "kernels.ptx"
    file.write_text(source, encoding="utf-8")

    def front_end() -> str:
        includes = ("-I", SOURCE.parent, "-diag-suppress=177")  # functions that the chosen kernels do not call
        _output(nvcc, *FLAGS, "-ptx", f"-arch={ARCHITECTURE}", *includes, "-o", ptx, file)
        return ptx.read_text(encoding="utf-8")

    def back_end(target: str) -> dict[str, tuple[int, int, int]]:
        text.result()
        cubin = folder / f"{target}.cubin"
        _output(nvcc, "-cubin", f"-arch={target}", "-o", cubin, ptx)
        return usage(cubin, tools)

    def read() -> Compiled:
        paths = dict(hot_paths(text.result(), single_lines(source)))
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
_SWEEPING = re.compile(r"\d(?:load|store)ILi(\d+)E|\dswee?pt?I.*Li(\d+)EEEvR")
_OUTSIDE = re.compile(r"\d(?:first_sweep|second_sweep|factors_of|seen|block_total|warp_total|tensor_of|last_to_come)")


def numbers(ptx: str) -> dict[str, int]:
    """The integers that a source defines for the device."""
    return {name: int(value or 0) for name, value in _NUMBER.findall(ptx)}


def single_lines(source: str) -> set[int]:
    """The lines of ``load`` and ``store`` that are about single elements: up to their last branch."""
    lines: set[int] = set()
    for function in re.finditer(r"^__device__ __forceinline__ void (?:load|store)\(.*?^}", source, re.M | re.S):
        first = source.count("\n", 0, function.start()) + 1
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
        single: the lines that are about single elements.
    """
    names = {
        label: bytes(map(int, re.findall(r"\b\d+\b", data))).decode().rstrip("\0") for label, data in _NAME.findall(ptx)
    }
    files = re.findall(r'\.file\s+(\d+) "[^"]*/kernels\.cu"', ptx)
    places = {(file, str(line)) for file in files for line in single}
    for entry, body in _ENTRY.findall(ptx):
        yield entry, _hot_path(body, names, places)


def _hot_path(
    body: str, names: Mapping[str, str], single: Collection[tuple[str, ...]]
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
            if sweeping := _SWEEPING.search(name):
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
            if size != 1:
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
    if "4copyI" in entry:
        return SHIPPED["Any"], COPY
    name = re.search(rf"(?:first|second|both)I\w*?\d({'|'.join(SHIPPED)})E", entry)
    size = re.search(r"Li(\d+)E", entry)
    sweeps = re.findall(r"L(?:N\w*?4PassE|S\w*?_)(\d)ELb(\d)ELb(\d)ELb(\d)E", entry)
    assert name is not None, entry
    assert size is not None, entry
    assert 1 <= len(sweeps) <= 2, entry
    (first, *_, step), second = sweeps[0], sweeps[-1]
    what = PASSES[int(first)]
    if len(sweeps) == 2:
        what = f"one launch, {'guarded' if what == 'dots' else 'plain'}"
    l2 = any(sweep[1] == "1" for sweep in sweeps)
    forms = [text for text, said in (("gradient", second[2] == "1"), ("L2", l2)) if said]
    if what == "dots":
        forms = forms or ["no L2"]  # it is the same for both forms
    more = " with the step" if step == "1" else ""
    room = f", {int(size[1])} bytes" if len(sweeps) == 2 else ""
    return SHIPPED[name[1]], f"{what}{more} ({', '.join(forms) or 'moment'}){room}"


def _output(*command: str | Path) -> str:
    with _PROCESSES:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
