"""Builds the package's native parts, for CPUs and for CUDA, from ``csrc``, if the machine allows it.

Settings that do not depend on the machine are in pyproject.toml. Environment variables:

    SOFIM_BUILD_CPU=auto|1|0  auto: install without the CPU part if it cannot be built; 1: fail then; 0: do not build
        it. If torch cannot be imported, nothing can be compiled, and pip would not show it: this is an error, except
        with 0
    SOFIM_BUILD_CUDA=auto|1|0|emulated  the same for the CUDA part, which needs the CPU part; emulated: compile the
        kernels for the CPU, for the tests (tests/emulator), and fail if they cannot be built
    SOFIM_INSTRUCTION_SETS=avx512,avx2,default|native  build the CPU part only for these; native: for the one that
        PyTorch uses on this machine
    SOFIM_SANITIZE=address,undefined  build with these sanitizers, for the tests
    SOFIM_WHEEL=1  record that a wheel was built, for others to install (make wheel)
    SOFIM_WERROR=1  turn warnings of the C++ compiler into errors, as in .ci/run
    TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, CFLAGS, MAX_JOBS  as in PyTorch's extensions; GPUs from 8.0

``sofim_fused/_build.json`` records what was built, or why nothing was (see ``sofim_fused/native.py``). Preparing
metadata or a source distribution (``pip download``, ``python -m build --sdist``) does not need torch.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "sofim_fused"
NATIVE = {"CPU": ("_C.*.so", "_cpu_*.so"), "CUDA": ("_cuda.*.so",)}  # the files of the native parts in the package
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {  # flags by instruction set, the best first
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *_AVX2],
    "avx2": _AVX2,
    "default": [],
}
# For kernels.cpp: GCC warns in its own AVX-512 headers, and about vectors as parameters, all of which are inlined.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# The sources of _cuda: everything in csrc/cuda, and the shared files that do not depend on the CPU part.
SHARED = [Path("csrc/gather", f"{name}.cpp") for name in ("op_arguments", "param_groups", "step_tensors", "tiling")]
EMULATOR = Path("tests/emulator")
GPUS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # compute capabilities, unless TORCH_CUDA_ARCH_LIST is set
# The kernels need only the features of the first one (older GPUs have no bfloat16). So the compiler's front end, which
# takes most of the time, runs once, for that one. Its output, PTX, is translated for each GPU, here or at load time.
PTX = "compute_80"
NO_CPU = "it needs the native CPU part, which is not there"
OLDEST_TORCH, OLDEST_SETUPTOOLS = (
    re.findall(rf'"{name}>=([\d.]+)"', Path(ROOT, "pyproject.toml").read_text(encoding="utf-8"))[0]
    for name in ("torch", "setuptools")
)
INSTALL = (
    f'    pip install "torch>={OLDEST_TORCH}" "setuptools>={OLDEST_SETUPTOOLS}" ninja && '
    "pip install --no-build-isolation --no-cache-dir ."
)


class UnavailableError(Exception):
    """The reason why a native part cannot be built, as part of a sentence."""


class UnusableTorchError(Exception):
    """The reason why the build fails, unless SOFIM_BUILD_CPU=0 is set, in several sentences."""


def switch(name: str, *values: str) -> str:
    """The environment variable ``name``: one of ``values``, "auto" if it is not set."""
    value = os.environ.get(name, "auto")
    if value not in values:
        raise SystemExit(f"{name}={value!r}: take {', '.join(values[:-1])} or {values[-1]}")
    return value


def find_compiler() -> str:
    """The name and version that the C++ compiler prints."""
    command = shlex.split(os.environ.setdefault("CXX", "c++"))  # the same for compiling and for linking
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, IndexError, subprocess.CalledProcessError):
        raise UnavailableError(f"there is no C++ compiler ({os.environ['CXX']} does not run)") from None
    return done.stdout.partition("\n")[0].strip()


def find_torch() -> tuple[Any, type[build_ext]]:
    """The torch module to compile for, and its setuptools command that compiles extensions."""
    try:
        torch = importlib.import_module("torch")
        command = importlib.import_module("torch.utils.cpp_extension").BuildExtension
    except Exception as error:  # a broken installation may raise anything
        problem = (
            f"torch cannot be imported where {PACKAGE} is built ({type(error).__name__}: {error}). By default pip "
            "builds in a separate environment, which has no torch."
        )
    else:
        if release(torch.__version__) >= release(OLDEST_TORCH):
            return torch, command
        problem = f"{PACKAGE} is compiled for the installed torch, and torch {torch.__version__} is too old."
    raise UnusableTorchError(
        f"{problem} Run this instead (the dot at the end stands for what you install):\n\n{INSTALL}\n\n"
        "To install without the C++ part, set SOFIM_BUILD_CPU=0: it then runs in pure PyTorch, many times slower."
    ) from None


def release(version: str) -> list[int]:
    """The first two numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", str(version))[:2]]


def instruction_sets() -> list[str]:
    """The instruction sets to build for on this machine."""
    possible = list(INSTRUCTION_SETS) if platform.machine().lower() in ("x86_64", "amd64") else ["default"]
    if wanted := os.environ.get("SOFIM_INSTRUCTION_SETS"):
        if wanted == "native":
            used = importlib.import_module("torch").backends.cpu.get_cpu_capability().lower()
            return [used if used in possible else "default"]
        if not set(wanted.split(",")) <= set(possible):
            raise SystemExit(f"SOFIM_INSTRUCTION_SETS={wanted!r}: take some of {','.join(possible)}, or native")
        return [name for name in possible if name in wanted.split(",")]
    return possible


def cxx_flags(optimization: str) -> list[str]:
    """Compiler flags for all C++."""
    from torch.utils.cpp_extension import include_paths

    flags = ["-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += [f"-ffile-prefix-map={ROOT}/=", *(part for path in include_paths() for part in ("-isystem", path))]
    if os.environ.get("SOFIM_WERROR") == "1":
        flags.append("-Werror")
    if sanitizers := os.environ.get("SOFIM_SANITIZE"):
        return [*flags, "-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
    return [*flags, optimization, "-g0"]


def extension(
    name: str,
    sources: list[Path],
    record: dict[str, Any],
    flags: list[str] | dict[str, list[str]],
    include_dirs: Iterable[str] = (),
    library_dirs: Iterable[str] = (),
    libraries: Iterable[str] = (),
) -> Extension:
    """An extension module, with the settings that all of them share."""
    from torch.utils.cpp_extension import library_paths

    sanitizers = [f"-fsanitize={record['sanitizers']}"] if record["sanitizers"] else []
    return Extension(
        f"{PACKAGE}.{name}",
        [str(source) for source in sources],
        language="c++",
        depends=[str(header) for pattern in ("*.h", "*.cuh") for header in sorted(Path("csrc").rglob(pattern))],
        include_dirs=[*include_dirs, str(ROOT / "csrc")],
        define_macros=[("SOFIM_TORCH_VERSION", record["torch"])],  # another torch then recompiles
        library_dirs=[*library_paths(), *library_dirs],
        libraries=["c10", "torch", "torch_cpu", "torch_python", *libraries],
        extra_compile_args=flags,
        extra_link_args=[*openmp(library_paths(), record["compiler"]), *sanitizers],
    )


def openmp(torch_libraries: list[str], compiler: str) -> list[str]:
    """Link flags for OpenMP: torch's own library, because a second one would start threads of its own."""
    own = [str(file) for path in torch_libraries for file in sorted(Path(path).glob("libgomp*.so*"))]
    return own[:1] if own and "clang" not in compiler else ["-fopenmp"]


def cpu_extensions(record: dict[str, Any]) -> list[Extension]:
    """The extension modules of the CPU part, those that compile longest first."""
    flags = cxx_flags("-O2")  # the passes mark what to inline and vectorize; -O3 is not faster
    result = [
        extension(
            f"_cpu_{name}",
            [Path("csrc/cpu/module.cpp"), Path("csrc/cpu/kernels.cpp")],
            record,
            [
                *flags,
                f"-DCPU_CAPABILITY={name.upper()}",
                f"-DCPU_CAPABILITY_{name.upper()}",
                *INSTRUCTION_SETS[name],
                *(QUIET if name == "avx512" else QUIET[-1:]),
            ],
        )
        for name in record["instruction_sets"]
    ]
    every = {Path("csrc/bindings.cpp"), *Path("csrc/gather").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")}
    rest = sorted(every - {Path("csrc/cpu", f"{name}.cpp") for name in ("module", "kernels")})
    # What handles tensors one by one gains from -O3, and takes no longer to compile.
    return [*result, extension("_C", rest, record, cxx_flags("-O3"))]


def find_nvcc(home: str | None, torch_cuda: str) -> tuple[str, str]:
    """The path of CUDA's compiler, and its version."""
    nvcc = os.path.join(home or "", "bin", "nvcc")
    if home is None or not shutil.which(nvcc):
        raise UnavailableError("nvcc was not found; CUDA_HOME may say where CUDA is")
    found = re.search(r"\bV(\d+)([.\d]*)", said(nvcc, "--version"))
    version = found[1] + found[2] if found else "of an unknown version"
    if found is None or found[1] != torch_cuda.partition(".")[0]:
        raise UnavailableError(f"nvcc is {version}, and torch was built with CUDA {torch_cuda}")
    return nvcc, version


def said(nvcc: str, *arguments: str) -> str:
    """The output of CUDA's compiler for options that print information."""
    try:
        done = subprocess.run(
            [nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise UnavailableError(f"{nvcc} {arguments[0]} does not run") from None
    return done.stdout


def toolkit(nvcc: str) -> tuple[list[str], list[str]]:
    """CUDA's folders of headers and of libraries, from nvcc, which may itself be a script in another place."""
    text = said(nvcc, "--dryrun", "-x", "cu", os.devnull)
    headers, libraries = (dict.fromkeys(map(os.path.realpath, re.findall(rf'"-{x}([^"]+)"', text))) for x in "IL")
    # /usr/include is a default of the compiler and must keep its place in the order.
    return [path for path in headers if path != "/usr/include"], list(libraries)


def architectures(wanted: str, known: Iterable[str], visible: Callable[[], Iterable[tuple[int, int]]]) -> list[str]:
    """The GPUs to compile for, as "sm_90", and then ``PTX`` if the code should also run on others, such as later ones.

    Args:
        wanted: as TORCH_CUDA_ARCH_LIST has it; empty: all of ``GPUS`` that the compiler knows, and ``PTX``.
        known: what the compiler compiles for, as "compute_90".
        visible: gives the compute capabilities of the GPUs in this machine.
    """
    known = set(known)
    words = re.findall(r"[^\s;]+", wanted)
    named = words not in ([], ["native"])
    if not words:
        words = [f"{gpu}+PTX" for gpu in GPUS]
    elif not named:
        words = [f"{major}.{minor}+PTX" for major, minor in visible()]
        if not words:
            raise UnavailableError("TORCH_CUDA_ARCH_LIST=native, but PyTorch finds no GPU")
    numbers, ptx = set(), False
    for word in words:
        read = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if read is None:
            raise UnavailableError(f"TORCH_CUDA_ARCH_LIST: {word!r} is not understood; take numbers, as 8.0 or 9.0+PTX")
        number = int(read[1] + read[2])
        if number < 80:
            raise UnavailableError(f"TORCH_CUDA_ARCH_LIST: {word!r} is too old, as the kernels need 8.0 (for bfloat16)")
        if f"compute_{number}" in known:
            numbers.add(number)
        elif named:
            raise UnavailableError(f"TORCH_CUDA_ARCH_LIST: nvcc does not compile for {word!r}")
        ptx |= read[3] is not None
    if PTX not in known:
        raise UnavailableError(f"nvcc does not compile for {PTX}")
    return [*(f"sm_{number}" for number in sorted(numbers)), *([PTX] if ptx else [])]


def cuda_extension(record: dict[str, Any]) -> Extension:
    """The extension module of the CUDA part; records its compiler and its GPUs."""
    cuda = record["cuda"]
    if SWITCHES["CUDA"] == "0":
        raise UnavailableError("SOFIM_BUILD_CUDA=0 was set")
    if record["reason"] is not None:
        raise UnavailableError(f"{NO_CPU}: {record['reason']}")
    # What takes longest to compile comes first.
    kernels = sorted(Path("csrc/cuda").glob("*.cu"), key=lambda path: path.stem not in ("one_launch", "accumulate"))
    sources = [*kernels, *sorted(Path("csrc/cuda").glob("*.cpp")), *SHARED]
    if SWITCHES["CUDA"] == "emulated":
        if not Path(ROOT, EMULATOR).is_dir():
            raise UnavailableError(f"{EMULATOR} is not there")
        cuda["compiler"] = record["compiler"]
        flags = [*cxx_flags("-O2"), "-DSOFIM_EMULATED", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-pthread"]
        return extension("_cuda", sources, record, flags, include_dirs=[str(ROOT / EMULATOR)])
    torch = importlib.import_module("torch")
    if torch.version.hip:
        raise UnavailableError("not tried on ROCm; Triton serves there")
    if torch.version.cuda is None:
        raise UnavailableError("torch was built without CUDA")
    nvcc, version = find_nvcc(importlib.import_module("torch.utils.cpp_extension").CUDA_HOME, torch.version.cuda)
    cuda["compiler"] = f"nvcc {version}"
    cuda["architectures"] = architectures(
        os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        said(nvcc, "--list-gpu-arch").split(),
        lambda: map(torch.cuda.get_device_capability, range(torch.cuda.device_count())),
    )
    headers, libraries = toolkit(nvcc)
    flags = {
        "cxx": [*cxx_flags("-O3"), *(part for path in headers for part in ("-isystem", path))],
        "nvcc": [
            *("-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off"),
            *(f"-gencode=arch={PTX},code={name}" for name in cuda["architectures"]),  # else torch adds its own GPUs
        ],
    }
    return extension(
        "_cuda", sources, record, flags, library_dirs=libraries, libraries=["cudart", "c10_cuda", "torch_cuda"]
    )


def as_cpp(source: str, folder: str) -> str:
    """A source for the C++ compiler; for a CUDA file, which nvcc would compile, a C++ file that includes it."""
    if not source.endswith(".cu"):
        return source
    path, text = Path(folder, Path(source).name).with_suffix(".cpp"), f'#include "{ROOT / source}"\n'
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # otherwise ninja would recompile it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(path)


def plan() -> tuple[list[Extension], type[build_ext], dict[str, Any], str | None]:
    """The extension modules, the command that builds them, and the record, with reasons if a part cannot be built.

    The last value is the reason why the build must fail, or ``None``. Metadata can be prepared in any case.
    """
    refusal = None
    record: dict[str, Any] = {
        "expected": SWITCHES["CPU"] != "0" and os.name == "posix",  # whether users may expect a CPU part
        "torch": None,
        "python": platform.python_version(),
        "compiler": None,
        "instruction_sets": [],
        "sanitizers": os.environ.get("SOFIM_SANITIZE") or None,
        "wheel": os.environ.get("SOFIM_WHEEL") == "1",
        "reason": None,
        "cuda": {
            "reason": None,
            "compiler": None,
            "architectures": [],
            "emulated": SWITCHES["CUDA"] == "emulated",
        },
    }
    modules: list[Extension] = []
    command = build_ext
    try:
        if SWITCHES["CPU"] == "0":
            raise UnavailableError("SOFIM_BUILD_CPU=0 was set")
        if os.name != "posix":
            raise UnavailableError(f"it was not written for {platform.system()}")
        if not Path(ROOT, "csrc").is_dir():
            raise UnavailableError("csrc is not there")
        torch, compiling = find_torch()
        record["torch"] = str(torch.__version__)
        record["compiler"] = find_compiler()
        headers = Path(sysconfig.get_path("include"))
        if not Path(headers, "Python.h").is_file():
            raise UnavailableError(f"Python's headers are not there ({headers}/Python.h; Debian's package python3-dev)")
        record["instruction_sets"] = instruction_sets()
        command = compiling
        modules = cpu_extensions(record)
    except UnavailableError as reason:
        record["reason"] = str(reason)
    except UnusableTorchError as reason:
        refusal = record["reason"] = str(reason)
    try:
        modules = [cuda_extension(record), *modules]
    except Exception as error:  # of any type: PyTorch may be asked for its GPUs
        record["cuda"]["reason"] = str(error)
    return modules, command, record, refusal


if release(setuptools.__version__) < release(OLDEST_SETUPTOOLS):  # it cannot read pyproject.toml
    raise SystemExit(
        f"error: setuptools {setuptools.__version__} is too old to build {PACKAGE}. Run this (the dot at the end "
        f"stands for what you install):\n\n{INSTALL}\n"
    )

# pip runs this file with its caller's PATH; ninja may be installed in the environment of this Python only.
if not shutil.which("ninja"):
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))

SWITCHES = {
    "CPU": switch("SOFIM_BUILD_CPU", "0", "1", "auto"),
    "CUDA": switch("SOFIM_BUILD_CUDA", "0", "1", "auto", "emulated"),
}
EXTENSIONS, COMMAND, RECORD, REFUSAL = plan()


def part_of(ext: Extension) -> str:
    """The native part that an extension module belongs to."""
    return "CUDA" if ext.name == f"{PACKAGE}._cuda" else "CPU"


class BuildNative(COMMAND):  # type: ignore[misc, valid-type]
    """Builds each native part completely or not at all, and writes the record."""

    def run(self) -> None:
        """Build, write the record, and decide whether failures are errors."""
        if REFUSAL is not None:  # before anything is changed, so that earlier builds are kept
            raise SetupError(REFUSAL)
        inplace = self.inplace
        self.failures: dict[str, str] = {}  # reasons by part
        try:
            if self.extensions:
                super().run()
        except Exception as error:
            self.fail("CPU", error)
        cuda = RECORD["cuda"]
        if RECORD["reason"] is None and "CPU" in self.failures:
            RECORD.update(instruction_sets=[], reason=self.failures["CPU"])
            self.failures.setdefault("CUDA", f"{NO_CPU}: {RECORD['reason']}")
        if cuda["reason"] is None and "CUDA" in self.failures:
            cuda.update(architectures=[], reason=self.failures["CUDA"])
        reasons = {"CPU": RECORD["reason"], "CUDA": cuda["reason"]}
        package = Path(self.build_lib, PACKAGE)
        for place in [package, ROOT / PACKAGE] if inplace else [package]:
            for part, patterns in NATIVE.items():
                for pattern in patterns if reasons[part] is not None else ():
                    for file in place.glob(pattern):
                        file.unlink()
            place.mkdir(parents=True, exist_ok=True)
            (place / "_build.json").write_text(json.dumps(RECORD, indent=2) + "\n", encoding="utf-8")
        self.extensions = [ext for ext in self.extensions if reasons[part_of(ext)] is None]  # only these have outputs
        failed = {part: reason for part, reason in reasons.items() if reason is not None}
        for part, reason in failed.items():
            if SWITCHES[part] not in ("0", "auto"):
                text = f"SOFIM_BUILD_{part}={SWITCHES[part]}, but the native {part} part cannot be built"
                raise SetupError(f"{text}: {reason}")
        for part, reason in failed.items():
            # Without nvcc nobody expects a CUDA part; and the message about the CPU part covers both.
            if part == "CPU" or (cuda["compiler"] and "CPU" not in failed):
                print(f"{PACKAGE}: going on without the native {part} part: {reason}", file=sys.stderr)

    def fail(self, part: str, error: Exception) -> None:
        """Store why a part could not be built, unless there is an earlier reason."""
        self.failures.setdefault(part, " ".join(str(error).split()))

    def build_extensions(self) -> None:
        """Build several extensions at a time, with ``MAX_JOBS`` processes in total."""
        self.force = True  # distutils does not notice a new torch or new flags; ninja does
        jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
        if self.use_ninja:
            self.parallel = min(jobs, len(self.extensions))
            os.environ["MAX_JOBS"] = str(jobs // self.parallel)
        # Half of the processes for nvcc, which takes longest and compiles for several GPUs; the other extensions have
        # one long source each. Set in the environment, because a change of an option would cause a recompilation.
        threads = f"--threads={max(1, jobs // 2)}"
        os.environ["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {threads}".strip()
        if SWITCHES["CUDA"] == "emulated":
            for ext in self.extensions:
                ext.sources = [as_cpp(source, self.build_temp) for source in ext.sources]
        try:
            super().build_extensions()
        except Exception as error:  # from PyTorch, which checks its tools before it compiles anything
            cpu = [ext for ext in self.extensions if part_of(ext) == "CPU"]
            if len(cpu) == len(self.extensions):
                raise
            self.fail("CUDA", error)
            self.extensions = cpu
            super().build_extensions()
        self.extensions = [ext for ext in self.extensions if part_of(ext) not in self.failures]

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, with a separate directory for its objects. If that fails, the others are still built."""
        # Extensions share sources, but not flags: in one directory they would reuse each other's objects.
        command = copy.copy(self)
        command.build_temp = os.path.join(self.build_temp, ext.name)
        try:
            super(BuildNative, command).build_extension(ext)
        except Exception:
            hint = f"SOFIM_BUILD_{part_of(ext)}=1 and pip's option -v show the compiler's messages"
            self.fail(part_of(ext), CompileError(f"{ext.name} could not be compiled ({hint})"))

    def get_outputs(self) -> list[str]:
        """The extensions and the record."""
        if self.inplace:
            return list(self.get_output_mapping())
        return [*super().get_outputs(), os.path.join(self.build_lib, PACKAGE, "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        """The places where an editable installation finds the outputs."""
        record = {os.path.join(self.build_lib, PACKAGE, "_build.json"): os.path.join(PACKAGE, "_build.json")}
        return {**super().get_output_mapping(), **(record if self.inplace else {})}


class Build(build):
    """Runs ``build_ext`` even if there is nothing to compile, because it writes the record."""

    sub_commands: ClassVar = [(name, None if name == "build_ext" else wanted) for name, wanted in build.sub_commands]


setup(ext_modules=EXTENSIONS, cmdclass={"build": Build, "build_ext": BuildNative})
